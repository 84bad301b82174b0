//! Estimates that make sane plans.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::*;
use tables::{RangeEnd, ReadFlag};

/// id, one of five kinds, one of 500 groups, unique code.
fn filled(rows: i64) -> (Handler, tables::Session) {
    let store = store();
    let shape = Shape::new(
        &[int(4), int(4), int(4), int(4)],
        &[
            unique(&[part(0)]),
            plain(&[part(1)]),
            plain(&[part(2)]),
            unique(&[part(3)]),
            plain(&[part(1), part(2)]),
        ],
    );
    let mut t = create(&store, "d/t", &shape);
    let mut s = session(&store);
    for id in 0..rows {
        let scattered = id * 7919 % rows;
        t.insert(&mut s, &[V::I(id), V::I(scattered % 5), V::I(scattered % 500), V::I(scattered)]).unwrap();
    }
    s.commit().unwrap();
    (t, s)
}

fn near(got: u64, expected: u64) {
    assert!(got >= expected / 2 && got <= expected * 2, "{got} is not near {expected}");
}

#[test]
fn rows_per_key_come_near_the_truth() {
    for rows in [1500, 10_000] {
        let (t, _) = filled(rows);
        t.table.analyze().unwrap();
        let rows = rows as u64;
        assert_eq!(t.table.row_count(), rows);
        near(t.table.records_per_key(1, 0), rows / 5);
        near(t.table.records_per_key(2, 0), rows / 500);
        assert_eq!(t.table.records_per_key(0, 0), 1);
        assert_eq!(t.table.records_per_key(3, 0), 1);
        near(t.table.records_per_key(4, 0), rows / 5);
        near(t.table.records_per_key(4, 1), rows / 500);
        // The primary key follows in every index, and makes it unique.
        assert_eq!(t.table.records_per_key(1, 1), 1);
        assert!(t.table.data_bytes() > rows * 8);
        assert!(t.table.index_bytes() > rows * 8);
    }
}

#[test]
fn statistics_refresh_by_themselves_when_much_has_changed() {
    let (mut t, mut s) = filled(3000);
    let first = t.table.refresh_statistics().unwrap();
    near(t.table.records_per_key(1, 0), 600);
    assert_eq!(t.table.refresh_statistics().unwrap(), first, "nothing changed");
    s.statement_begin();
    for id in 3000..6000 {
        t.insert(&mut s, &[V::I(id), V::I(id), V::I(0), V::I(id)]).unwrap();
    }
    s.commit().unwrap();
    assert_ne!(t.table.refresh_statistics().unwrap(), first);
    assert!(t.table.records_per_key(1, 0) < 20, "{}", t.table.records_per_key(1, 0));
}

#[test]
fn an_empty_table_has_statistics_too() {
    let (t, _) = filled(0);
    t.table.analyze().unwrap();
    t.table.refresh_statistics().unwrap();
    assert_eq!(t.table.row_count(), 0);
    assert_eq!(t.table.records_per_key(1, 0), 1);
    assert_eq!(t.table.records_in_range(1, None, None).unwrap(), 1);
}

#[test]
fn ranges_are_estimated_by_their_ends() {
    let (t, _) = filled(5000);
    let tuple = |value: i64| t.shape.tuple(0, &[V::I(value)]);
    let (low, high) = (tuple(1000), tuple(1999));
    let end = |tuple, flag| Some(RangeEnd { tuple, flag });
    let between = |low, high| t.table.records_in_range(0, low, high).unwrap();
    near(between(end(&low, ReadFlag::OrNext), end(&high, ReadFlag::After)), 1000);
    near(between(end(&low, ReadFlag::After), end(&high, ReadFlag::Before)), 998);
    near(between(end(&low, ReadFlag::OrNext), None), 4000);
    near(between(None, end(&high, ReadFlag::After)), 2000);
    near(between(None, None), 5000);
    assert_eq!(between(end(&high, ReadFlag::OrNext), end(&low, ReadFlag::After)), 1, "nothing is between");
    let five = t.shape.tuple(1, &[V::I(3)]);
    let same = t.table.records_in_range(1, end(&five, ReadFlag::Exact), end(&five, ReadFlag::After)).unwrap();
    near(same, 1000);
}
