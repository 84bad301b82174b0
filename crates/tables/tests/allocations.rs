//! Rows come and go without a trip to the allocator for each.

#![allow(clippy::unwrap_used, reason = "a test may fail")]
#![allow(unsafe_code, reason = "an allocator that counts")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::*;
use tables::{ReadFlag, RowLock};

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: passes every call on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread for each of `rows` rounds, the first rounds apart.
fn per_row(rows: u64, mut round: impl FnMut(u64)) -> f64 {
    (0..rows / 10).for_each(&mut round);
    let before = COUNT.with(Cell::get);
    (rows / 10..rows).for_each(&mut round);
    (COUNT.with(Cell::get) - before) as f64 / (rows - rows / 10) as f64
}

#[test]
fn reading_and_writing_a_row_allocates_nothing() {
    let store = store();
    let shape = Shape::new(
        &[int(4), int(4), varchar(40, Text::Caseless), char(60, Text::Caseless).null()],
        &[unique(&[part(0)]), plain(&[part(1)]), unique(&[part(2)])],
    );
    let mut t = create(&store, "d/t", &shape);
    let mut s = session(&store);
    let rows = 2000;
    let row = |id: u64| {
        vec![
            V::I(id as i64),
            V::I(id as i64 % 300),
            text(&format!("name {id}")),
            text(&format!("padding {id}")),
        ]
    };
    s.statement_begin();
    let records: Vec<OwnedRecord> = (0..2 * rows).map(|id| shape.record(&row(id))).collect();
    let tuples: Vec<Vec<u8>> = (0..rows).map(|id| shape.tuple(0, &[V::I(id as i64)])).collect();
    let names: Vec<Vec<u8>> = (0..rows).map(|id| shape.tuple(2, &row(id)[2..3])).collect();
    let blobs: &[&[u8]] = &[];
    let record = |id: u64| tables::Record { image: &records[id as usize].image, blobs };

    let inserts = per_row(rows, |id| {
        t.cursor.insert(&mut s, record(id)).unwrap();
        if id % 100 == 99 {
            s.commit().unwrap();
        }
    });
    s.statement_begin();
    let mut image = shape.empty();
    let mut seen = Vec::new();
    t.cursor.start(None).unwrap();
    seen.push(("a step of a scan", per_row(rows, |_| assert!(t.cursor.next(&mut s, &mut image).unwrap()))));
    t.cursor.start(Some(1)).unwrap();
    seen.push(("a step of an index", per_row(rows, |_| assert!(t.cursor.next(&mut s, &mut image).unwrap()))));
    t.cursor.start(Some(1)).unwrap();
    seen.push(("a step back", per_row(rows, |_| assert!(t.cursor.prev(&mut s, &mut image).unwrap()))));
    t.cursor.set_columns(Some(&[0b0011]));
    t.cursor.set_key_only(true);
    t.cursor.start(Some(1)).unwrap();
    seen.push(("a covered step", per_row(rows, |_| assert!(t.cursor.next(&mut s, &mut image).unwrap()))));
    t.cursor.set_columns(None);
    t.cursor.set_key_only(false);
    let read = per_row(rows, |id| {
        t.cursor.start(Some(0)).unwrap();
        assert!(t.cursor.read(&mut s, &tuples[id as usize], ReadFlag::Exact, &mut image).unwrap());
    });
    seen.push(("a read by primary key", read));
    let read = per_row(rows, |id| {
        t.cursor.start(Some(2)).unwrap();
        assert!(t.cursor.read(&mut s, &names[id as usize], ReadFlag::Exact, &mut image).unwrap());
    });
    seen.push(("a read by a unique key", read));
    t.cursor.set_lock(RowLock::Exclusive);
    // The lock table grows to as many locks as were ever held at once.
    t.cursor.start(None).unwrap();
    while t.cursor.next(&mut s, &mut image).unwrap() {}
    s.rollback();
    s.statement_begin();
    t.cursor.start(None).unwrap();
    seen.push(("a locking step", per_row(rows, |_| assert!(t.cursor.next(&mut s, &mut image).unwrap()))));
    for (what, allocations) in &seen {
        assert!(*allocations < 0.05, "{what}: {allocations} allocations");
    }

    let place = shape.descriptor().fields[1].offset as usize;
    let updates = per_row(rows, |id| {
        t.cursor.start(Some(0)).unwrap();
        assert!(t.cursor.read(&mut s, &tuples[id as usize], ReadFlag::Exact, &mut image).unwrap());
        let mut new = [0; 512];
        let new = &mut new[..image.len()];
        new.copy_from_slice(&image);
        new[place] ^= 1;
        t.cursor.update(&mut s, &image, tables::Record { image: new, blobs }).unwrap();
    });
    // The engine keeps what was written: memory for it comes in chunks.
    for (what, allocations) in [("an insert", inserts), ("an update", updates)] {
        assert!(allocations < 1.0, "{what}: {allocations} allocations");
    }
    println!("{seen:?} insert {inserts} update {updates}");
}
