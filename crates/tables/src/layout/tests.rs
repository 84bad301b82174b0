//! Entries that are read by copies from known places read as they do part by part; and what the codecs cost, for whoever changes them:
//! `cargo nextest run --release -p tables --run-ignored only --no-capture`.

use engine::{Clock, SystemClock};
use proptest::prelude::*;

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

const COLUMNS: usize = 8;

fn columns() -> [common::Column; COLUMNS] {
    [
        common::int(4),
        common::uint(8),
        common::int(3),
        common::uint(1),
        common::fixed(5),
        common::int(4).null(),
        common::double(),
        common::varchar(9, Text::Caseless),
    ]
}

fn a_row(seed: u64, null: bool) -> Vec<V> {
    let bytes = seed.to_le_bytes();
    vec![
        V::I(i64::from(seed as i32)),
        V::U(seed),
        V::I(seed as i64 % (1 << 23)),
        V::U(seed & 0xff),
        V::B(bytes[..5].to_vec()),
        if null { V::Null } else { V::I(i64::from(seed as i32)) },
        V::D(seed as f64 - 1e9),
        common::text(&"aB c"[..seed as usize % 5]),
    ]
}

/// Parts of different columns, some of them descending.
fn parts(most: usize) -> impl Strategy<Value = Vec<common::Part>> {
    let fields = prop::sample::subsequence((0..COLUMNS).collect::<Vec<_>>(), 1..=most).prop_shuffle();
    (fields, any::<u8>()).prop_map(|(fields, descending)| {
        let part = |field| common::Part { field, prefix: None, descending: descending >> field & 1 == 1 };
        fields.into_iter().map(part).collect()
    })
}

proptest! {
    #[test]
    fn copies_from_known_places_give_what_decoding_part_by_part_gives(
        primary in parts(2), secondary in parts(3), unique: bool, hidden: bool, wanted: u8, seed: u64, null: bool,
        cut in any::<prop::sample::Index>()
    ) {
        let secondary =
            if unique { common::unique(&secondary) } else { common::plain(&secondary) };
        let (number, shape) = match hidden {
            true => (0, Shape::hidden(&columns(), &[secondary])),
            false => (1, Shape::new(&columns(), &[common::unique(&primary), secondary])),
        };
        let layout = Layout::new(shape.descriptor(), &Ascii);
        let codec = &layout.indexes[number];
        let (mut key, mut scratch) = (Vec::new(), Vec::new());
        let (mut entry_key, mut entry_value) = (Vec::new(), Vec::new());
        shape.record(&a_row(seed, null)).with(|record| {
            let value = |field| layout.rows.record_value(field, &record);
            match hidden {
                true => key.extend_from_slice(&seed.to_be_bytes()),
                false => _ = layout.indexes[0].encode_parts(&value, &Ascii, &mut scratch, &mut key),
            }
            _ = codec.entry(&value, &key, &Ascii, &mut scratch, (&mut entry_key, &mut entry_value));
        });
        let mut program = EntryProgram::default();
        codec.compile(|field| wanted >> field & 1 == 1, &mut program);
        let (mut fast, mut slow) = (shape.empty(), shape.empty());
        let got = codec.decode(&program, &entry_key, &entry_value, &mut fast, &mut scratch);
        prop_assert_eq!(got, codec.decode_parts(&program, &entry_key, &entry_value, &mut slow, &mut scratch));
        prop_assert_eq!(&fast, &slow);
        if let Some(bytes) = codec.primary_len() {
            prop_assert_eq!(&entry_key[entry_key.len() - bytes..], &key);
        }
        // A shorter key is garbled or gives something; it does not panic.
        let cut = &entry_key[..cut.index(entry_key.len())];
        _ = codec.decode(&program, cut, &entry_value, &mut fast, &mut scratch);
    }
}

#[test]
fn numbers_are_read_from_entries_by_copies() {
    let columns = [common::int(4), common::int(4), common::char(480, Text::Caseless)];
    let keys = [common::unique(&[common::part(0)]), common::plain(&[common::part(1)])];
    let layout = Layout::new(Shape::new(&columns, &keys).descriptor(), &Ascii);
    let mut program = EntryProgram::default();
    for wanted in 0..4 {
        layout.indexes[1].compile(|field| wanted >> field & 1 == 1, &mut program);
        assert!(program.copies.is_some(), "columns {wanted:#b}");
    }
}
