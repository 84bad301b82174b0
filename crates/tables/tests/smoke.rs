//! The shortest way through every room.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;
use common::*;
use tables::{Error, ReadFlag};

#[test]
fn rows_come_back_by_scan_and_by_every_index() {
    let store = store();
    let shape = Shape::new(
        &[
            int(4),
            varchar(20, Text::Caseless).null(),
            double(),
            blob(4, Text::Binary).null(),
            char(6, Text::BinaryPadded),
        ],
        &[unique(&[part(0)]), plain(&[part(1)]), unique(&[part(4)])],
    );
    let mut t = create(&store, "./shop/t", &shape);
    let mut s = session(&store);
    s.statement_begin();
    let rows = [
        vec![V::I(-5), text("pear"), V::D(-0.0), V::B(vec![7; 3000]), text("aa")],
        vec![V::I(1), V::Null, V::D(2.5), V::Null, text("b")],
        vec![V::I(9), text("Apple "), V::D(-1e300), V::B(vec![]), text("c")],
    ];
    for row in &rows {
        t.insert(&mut s, row).unwrap();
    }
    assert_eq!(t.scan(&mut s, None), rows);
    assert_eq!(t.scan_back(&mut s, Some(1)), [rows[0].clone(), rows[2].clone(), rows[1].clone()]);
    s.commit().unwrap();
    s.statement_begin();
    assert_eq!(t.read(&mut s, 1, &[text("APPLE")], ReadFlag::Exact), Some(rows[2].clone()));
    assert_eq!(t.read(&mut s, 2, &[text("b")], ReadFlag::Exact), Some(rows[1].clone()));
    let error = t.insert(&mut s, &[V::I(2), V::Null, V::D(0.0), V::Null, text("c ")]).unwrap_err();
    assert!(matches!(error, Error::Duplicate { key: 2 }), "{error}");
    let mut position = vec![0; t.table.position_length()];
    t.cursor.duplicate_position(&mut position);
    assert!(t.cursor.read_position(&mut s, &position, &mut t.image).unwrap());
    assert_eq!(t.shape.row(&t.image), rows[2]);
    t.cursor.delete(&mut s).unwrap();
    assert_eq!(t.scan(&mut s, Some(2)), rows[..2]);
    s.rollback();
    assert_eq!(t.scan(&mut s, None).len(), 3);
    assert_eq!(t.table.row_count(), 3);
}
