//! What the codecs cost, for whoever changes them: `cargo nextest run --release -p tables --run-ignored only --no-capture`.

use engine::{Clock, SystemClock};

use crate::common::{self, Ascii, Shape, Text, V};
use crate::layout::{EntryProgram, Layout};
use crate::rows::{Parts, Program};

fn print_cost(what: &str, mut work: impl FnMut()) {
    let clock = SystemClock::default();
    let rounds = 200_000u32;
    (0..1000).for_each(|_| work());
    let start = clock.now();
    (0..rounds).for_each(|_| work());
    println!("{what}: {:.0} ns", (clock.now() - start).as_nanos() as f64 / f64::from(rounds));
}

#[test]
#[ignore = "prints times, promises nothing"]
fn what_a_row_of_sysbench_costs() {
    let shape = Shape::new(
        &[
            common::int(4),
            common::int(4),
            common::char(480, Text::Caseless),
            common::char(240, Text::Caseless),
        ],
        &[common::unique(&[common::part(0)]), common::plain(&[common::part(1)])],
    );
    let layout = Layout::new(shape.descriptor(), &Ascii);
    let row = [
        V::I(77),
        V::I(5000),
        V::B(b"68487932199-96439406143-93774651418-41631865787-96406072701-20604855487-25459966574-28203206787-41238978918-19503783441".to_vec()),
        V::B(b"22195207048-70116052123-74140395089-76317954521-98694025897".to_vec()),
    ];
    let (owned, mut bytes, mut key) = (shape.record(&row), Vec::new(), Vec::new());
    let (mut entry_key, mut entry_value, mut scratch) = (Vec::new(), Vec::new(), Vec::new());
    owned.with(|record| {
        let value = |field| layout.rows.record_value(field, &record);
        layout.indexes[0].encode_parts(&value, &Ascii, &mut scratch, &mut key).expect("a sound record");
        print_cost("encode a row", || {
            bytes.clear();
            layout.rows.encode(&record, &mut bytes).expect("a sound record");
        });
        print_cost("encode an index entry", || {
            let buffers = (&mut entry_key, &mut entry_value);
            _ = layout.indexes[1].entry(&value, &key, &Ascii, &mut scratch, buffers);
        });
    });
    let mut image = shape.empty();
    for (what, wanted) in
        [("decode a row, all columns", 0b1111), ("one text", 0b0100), ("one number", 0b0010)]
    {
        let mut program = Program::default();
        layout.rows.compile(|field| wanted >> field & 1 == 1, &mut program);
        print_cost(what, || layout.rows.decode(&program, &bytes, &key, &mut image).expect("a sound row"));
    }
    let mut parts = Parts::default();
    print_cost("parse a row", || layout.rows.parse(&bytes, &key, &mut parts).expect("a sound row"));
    print_cost("decode an index entry", || {
        let mut program = EntryProgram::default();
        layout.indexes[1].compile(|_| true, &mut program);
        _ = layout.indexes[1].decode(&program, &entry_key, &entry_value, &mut image, &mut scratch);
    });
    let tuple = shape.tuple(0, &row[..1]);
    print_cost("encode a key tuple", || {
        key.clear();
        _ = layout.indexes[0].encode_tuple(&tuple, &Ascii, &mut scratch, &mut key);
    });
}
