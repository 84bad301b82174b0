//! What a row costs through the whole of table and engine: `cargo nextest run --release -p tables --run-ignored only --no-capture`.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::*;
use engine::{Clock, SystemClock};
use tables::{RangeEnd, ReadFlag, RowLock};

#[test]
#[ignore = "prints times, promises nothing"]
fn what_a_row_of_sysbench_costs() {
    let store = store();
    let shape = Shape::new(
        &[int(4), int(4), char(480, Text::Caseless), char(240, Text::Caseless)],
        &[unique(&[part(0)]), plain(&[part(1)])],
    );
    let mut t = create(&store, "d/t", &shape);
    let mut s = session(&store);
    let rows = 200_000u32;
    let long = text(&"68487932199-".repeat(10)[..119]);
    let row = shape.record(&[V::I(0), V::I(0), long.clone(), text(&"22195207048-".repeat(5)[..59])]);
    let scattered = |id: u32| id.wrapping_mul(2_654_435_761) % rows;
    let clock = SystemClock::default();
    let mut image = row.image.clone();
    let measure = |what: &str, count: u32, work: &mut dyn FnMut(u32)| {
        let start = clock.now();
        (0..count).for_each(work);
        println!("{what}: {:.0} ns", (clock.now() - start).as_nanos() as f64 / f64::from(count));
    };
    let set = |image: &mut [u8], id: u32, k: u32| {
        image[1..5].copy_from_slice(&id.to_le_bytes());
        image[5..9].copy_from_slice(&k.to_le_bytes());
    };
    s.statement_begin();
    measure("insert, 1000 in a transaction", rows, &mut |id| {
        set(&mut image, id, scattered(id));
        t.cursor.insert(&mut s, tables::Record { image: &image, blobs: &[] }).unwrap();
        if id % 1000 == 999 {
            s.commit().unwrap();
        }
    });
    s.commit().unwrap();
    s.statement_begin();
    t.cursor.start(None).unwrap();
    measure("scan", rows - 1, &mut |_| assert!(t.cursor.next(&mut s, &mut image).unwrap()));
    t.cursor.set_columns(Some(&[0b0011]));
    t.cursor.start(None).unwrap();
    measure("scan, two numbers", rows - 1, &mut |_| assert!(t.cursor.next(&mut s, &mut image).unwrap()));
    t.cursor.set_key_only(true);
    t.cursor.start(Some(1)).unwrap();
    measure("scan, covered", rows - 1, &mut |_| assert!(t.cursor.next(&mut s, &mut image).unwrap()));
    t.cursor.set_key_only(false);
    t.cursor.set_columns(None);
    t.cursor.start(Some(1)).unwrap();
    measure("scan by index, row each", rows - 1, &mut |_| {
        assert!(t.cursor.next(&mut s, &mut image).unwrap())
    });
    measure("read by primary key", rows, &mut |id| {
        t.cursor.start(Some(0)).unwrap();
        let key = scattered(id).to_le_bytes();
        assert!(t.cursor.read(&mut s, &key, ReadFlag::Exact, &mut image).unwrap());
    });
    measure("range of 100 rows by primary key", rows / 100, &mut |id| {
        t.cursor.start(Some(0)).unwrap();
        let key = (scattered(id) % (rows - 100)).to_le_bytes();
        assert!(t.cursor.read(&mut s, &key, ReadFlag::OrNext, &mut image).unwrap());
        (0..99).for_each(|_| assert!(t.cursor.next(&mut s, &mut image).unwrap()));
    });
    for (what, width) in [("estimate of a range of 100", 100), ("estimate of half the table", rows / 2)] {
        measure(what, 2000, &mut |id| {
            let (low, high) = (scattered(id) % (rows - width), scattered(id) % (rows - width) + width);
            let (low, high) = (low.to_le_bytes(), high.to_le_bytes());
            let end = |tuple, flag| Some(RangeEnd { tuple, flag });
            let table = &t.table;
            table.records_in_range(0, end(&low, ReadFlag::OrNext), end(&high, ReadFlag::After)).unwrap();
        });
    }
    t.cursor.set_lock(RowLock::Exclusive);
    for (what, place) in [("update of a number with an index", 5), ("update of a text", 20)] {
        measure(what, rows, &mut |id| {
            t.cursor.start(Some(0)).unwrap();
            let key = scattered(id).to_le_bytes();
            assert!(t.cursor.read(&mut s, &key, ReadFlag::Exact, &mut image).unwrap());
            let mut new = image.clone();
            new[place] = new[place].wrapping_add(1);
            t.cursor.update(&mut s, &image, tables::Record { image: &new, blobs: &[] }).unwrap();
            if id % 1000 == 999 {
                s.commit().unwrap();
                s.statement_begin();
            }
        });
        s.commit().unwrap();
        s.statement_begin();
    }
    measure("update and commit", 2000, &mut |id| {
        t.cursor.start(Some(0)).unwrap();
        let key = scattered(id).to_le_bytes();
        assert!(t.cursor.read(&mut s, &key, ReadFlag::Exact, &mut image).unwrap());
        let mut new = image.clone();
        new[20] = new[20].wrapping_add(1);
        t.cursor.update(&mut s, &image, tables::Record { image: &new, blobs: &[] }).unwrap();
        s.commit().unwrap();
        s.statement_begin();
    });
}
