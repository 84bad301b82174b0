//! Rows come and go without a trip to the allocator for each.

#![allow(clippy::unwrap_used, reason = "a test may fail")]
#![allow(unsafe_code, reason = "an allocator that counts")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::*;
use engine::{Background, Job, Settings};
use tables::{ReadFlag, RowLock, Session};

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

/// A table of [`ROWS`] rows, and what it takes to find them.
struct Bench {
    shape: Shape,
    t: Handler,
    s: Session,
    tuples: Vec<Vec<u8>>,
    names: Vec<Vec<u8>>,
    image: Vec<u8>,
}

const ROWS: u64 = 2000;

impl Bench {
    /// Every way to read a row from `what`. None may allocate; a block that is entered may.
    fn reads(&mut self, what: &str) {
        let Self { t, s, tuples, names, image, .. } = self;
        s.statement_begin();
        let mut seen = Vec::new();
        // What is read for the first time has to come into memory, block by block.
        for index in [None, Some(1), Some(2)] {
            t.cursor.start(index).unwrap();
            while t.cursor.next(s, image).unwrap() {}
        }
        t.cursor.start(None).unwrap();
        seen.push(("a step of a scan", per_row(ROWS, |_| assert!(t.cursor.next(s, image).unwrap()))));
        t.cursor.start(None).unwrap();
        seen.push(("a step of a scan back", per_row(ROWS, |_| assert!(t.cursor.prev(s, image).unwrap()))));
        t.cursor.start(Some(1)).unwrap();
        seen.push(("a step of an index", per_row(ROWS, |_| assert!(t.cursor.next(s, image).unwrap()))));
        t.cursor.start(Some(1)).unwrap();
        seen.push(("a step back", per_row(ROWS, |_| assert!(t.cursor.prev(s, image).unwrap()))));
        t.cursor.set_columns(Some(&[0b0011]));
        t.cursor.set_key_only(true);
        t.cursor.start(Some(1)).unwrap();
        seen.push(("a covered step", per_row(ROWS, |_| assert!(t.cursor.next(s, image).unwrap()))));
        t.cursor.set_columns(None);
        t.cursor.set_key_only(false);
        let read = per_row(ROWS, |id| {
            t.cursor.start(Some(0)).unwrap();
            assert!(t.cursor.read(s, &tuples[id as usize], ReadFlag::Exact, image).unwrap());
        });
        seen.push(("a read by primary key", read));
        let read = per_row(ROWS, |id| {
            t.cursor.start(Some(2)).unwrap();
            assert!(t.cursor.read(s, &names[id as usize], ReadFlag::Exact, image).unwrap());
        });
        seen.push(("a read by a unique key", read));
        t.cursor.set_lock(RowLock::Exclusive);
        // The lock table grows to as many locks as were ever held at once.
        t.cursor.start(None).unwrap();
        while t.cursor.next(s, image).unwrap() {}
        s.rollback();
        s.statement_begin();
        t.cursor.start(None).unwrap();
        seen.push(("a locking step", per_row(ROWS, |_| assert!(t.cursor.next(s, image).unwrap()))));
        s.rollback();
        t.cursor.set_lock(RowLock::None);
        println!("{what}: {seen:?}");
        for (how, allocations) in &seen {
            assert!(*allocations < 0.05, "{what}, {how}: {allocations} allocations");
        }
    }

    /// Changes an indexed column of one row in `step`, in a transaction of its own. Returns the allocations for each.
    fn updates(&mut self, step: usize) -> f64 {
        let place = self.shape.descriptor().fields[1].offset as usize;
        let Self { t, s, tuples, image, .. } = self;
        s.statement_begin();
        t.cursor.set_lock(RowLock::Exclusive);
        let updates = per_row(ROWS / step as u64, |id| {
            t.cursor.start(Some(0)).unwrap();
            assert!(t.cursor.read(s, &tuples[id as usize * step], ReadFlag::Exact, image).unwrap());
            let mut new = [0; 512];
            let new = &mut new[..image.len()];
            new.copy_from_slice(image);
            new[place] ^= 1;
            t.cursor.update(s, image, tables::Record { image: new, blobs: &[] }).unwrap();
        });
        s.commit().unwrap();
        t.cursor.set_lock(RowLock::None);
        updates
    }
}

#[test]
fn reading_and_writing_a_row_allocates_nothing() {
    let store = store_with(Settings { background: Background::Manual, ..Settings::default() });
    let flush = || {
        assert!(store.engine().step(Job::Freeze).unwrap());
        while store.engine().step(Job::Flush).unwrap() {}
    };
    let shape = Shape::new(
        &[int(4), int(4), varchar(40, Text::Caseless), char(60, Text::Caseless).null()],
        &[unique(&[part(0)]), plain(&[part(1)]), unique(&[part(2)])],
    );
    let mut t = create(&store, "d/t", &shape);
    let mut s = session(&store);
    let row = |id: u64| {
        vec![
            V::I(id as i64),
            V::I(id as i64 % 300),
            text(&format!("name {id}")),
            text(&format!("padding {id}")),
        ]
    };
    s.statement_begin();
    let records: Vec<OwnedRecord> = (0..2 * ROWS).map(|id| shape.record(&row(id))).collect();
    let blobs: &[&[u8]] = &[];
    let record = |id: u64| tables::Record { image: &records[id as usize].image, blobs };
    let inserts = per_row(ROWS, |id| {
        t.cursor.insert(&mut s, record(id)).unwrap();
        if id % 100 == 99 {
            s.commit().unwrap();
        }
    });
    s.commit().unwrap();

    let tuples = (0..ROWS).map(|id| shape.tuple(0, &[V::I(id as i64)])).collect();
    let names = (0..ROWS).map(|id| shape.tuple(2, &row(id)[2..3])).collect();
    let image = shape.empty();
    let mut bench = Bench { shape, t, s, tuples, names, image };
    bench.reads("a memtable");
    flush();
    bench.reads("an sst");
    let mut updates = vec![bench.updates(400)];
    bench.reads("few rows in a memtable over an sst");
    updates.push(bench.updates(3));
    bench.reads("many rows in a memtable over an sst");
    flush();
    bench.reads("two ssts");
    updates.push(bench.updates(2));
    bench.reads("a memtable over two ssts");
    println!("insert {inserts} updates {updates:?}");
    // The engine keeps what was written: memory for it comes in chunks.
    assert!(inserts < 1.0, "an insert: {inserts} allocations");
    assert!(updates[2] < 1.0, "an update: {} allocations", updates[2]);
}
