//! Readers that keep stepping over what they do not want have it merged, once they have wasted as much as that costs; nobody else
//! has, and it ends.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::sync::Arc;

use bucket::MemoryBucket;
use common::{noise, parts, status};
use engine::limits::BYTES_A_STEP;
use engine::{Background, Cursor, Engine, Job, ReadAs, Settings, SimDisk, TreeId, Txn};

const TREE: TreeId = TreeId(70);
const ROWS: u32 = 8000;

fn open() -> Arc<Engine> {
    let mut settings = Settings { background: Background::Manual, ..Settings::default() };
    settings.shape.sst_bytes = 256 << 10;
    settings.shape.level_base_bytes = 4 << 20;
    Engine::open(parts(Arc::new(MemoryBucket::new()), &SimDisk::new(1)), settings).unwrap()
}

fn flush(engine: &Engine, txn: &mut Txn) {
    txn.commit().unwrap();
    engine.step(Job::Freeze).unwrap();
    engine.step(Job::Flush).unwrap();
}

/// All rows in one run below L0.
fn filled() -> Arc<Engine> {
    let engine = open();
    let mut txn = engine.begin();
    // The oldest sinks unread, the other four are merged into it.
    for run in 0..5 {
        for row in (run..ROWS).step_by(5) {
            txn.put(TREE, &row.to_be_bytes(), &noise(row, 100)).unwrap();
        }
        flush(&engine, &mut txn);
    }
    while engine.step(Job::Compact).unwrap() {}
    assert_eq!(status(&engine, "l0_runs"), 0);
    engine
}

/// The first row at or after this one.
fn first_from(engine: &Arc<Engine>, cursor: &mut Cursor, row: u32) -> Option<Vec<u8>> {
    let mut txn = engine.begin();
    cursor.open(&mut txn, TREE, ReadAs::Snapshot).unwrap();
    let found = cursor.seek(&mut txn, &row.to_be_bytes()).unwrap().then(|| cursor.key().to_vec());
    cursor.close();
    found
}

/// Reads until there is something to merge and merges it; how many reads that took, and the steps in vain of the first 100.
fn read_until_merged(engine: &Arc<Engine>, mut read: impl FnMut(u32)) -> (u32, u64) {
    let mut of_some = 0;
    for reads in 0..1_000_000 {
        if reads == 100 {
            of_some = status(engine, "read_steps_in_vain");
        }
        let (wasted, before) = (status(engine, "read_steps_in_vain"), status(engine, "compacted_bytes_read"));
        if engine.step(Job::Compact).unwrap() {
            let merged = status(engine, "compacted_bytes_read") - before;
            assert!(merged <= wasted * BYTES_A_STEP, "{merged} bytes for {wasted} steps");
            while engine.step(Job::Compact).unwrap() {}
            return (reads, of_some);
        }
        read(reads);
    }
    panic!("nothing was merged");
}

fn nothing_more_is_merged(engine: &Arc<Engine>, mut read: impl FnMut(u32)) {
    let before = (status(engine, "compactions"), status(engine, "read_steps_in_vain"));
    (0..2000).for_each(&mut read);
    assert!(!engine.step(Job::Compact).unwrap());
    assert_eq!((status(engine, "compactions"), status(engine, "read_steps_in_vain")), before);
}

#[test]
fn a_queue_whose_readers_step_over_its_deleted_front_is_merged_once_and_only_then() {
    let engine = filled();
    let mut txn = engine.begin();
    (0..50_u32).for_each(|row| txn.delete(TREE, &row.to_be_bytes()).unwrap());
    flush(&engine, &mut txn);
    assert!(!engine.step(Job::Compact).unwrap(), "nobody has read anything");

    let mut cursor = Cursor::new(&engine);
    let first = 50_u32.to_be_bytes();
    let mut read = |_| assert_eq!(first_from(&engine, &mut cursor, 0).unwrap(), first);
    let (reads, of_hundred) = read_until_merged(&engine, &mut read);
    assert!(reads > 100, "{reads} reads have not wasted what the merge costs");
    assert!(
        (9_000..11_000).contains(&of_hundred),
        "two steps for each deleted row, not {of_hundred} of 100 reads"
    );
    assert_eq!(status(&engine, "l0_runs"), 0);
    // What is left of the sums that were too small to be charged.
    (0..2000).for_each(&mut read);
    nothing_more_is_merged(&engine, read);
}

#[test]
fn runs_that_lookups_seek_in_for_nothing_are_merged() {
    let engine = filled();
    let mut txn = engine.begin();
    for run in 0..3 {
        (run..ROWS).step_by(400).for_each(|row| txn.put(TREE, &row.to_be_bytes(), &noise(row, 100)).unwrap());
        flush(&engine, &mut txn);
    }
    // A look-up of one key is told by filters and costs them nothing.
    for row in 0..ROWS {
        assert!(txn.get(TREE, &row.to_be_bytes(), ReadAs::Snapshot, |_| ()).unwrap().is_some());
    }
    assert_eq!(status(&engine, "read_steps_in_vain"), 0);
    assert!(!engine.step(Job::Compact).unwrap());

    let mut cursor = Cursor::new(&engine);
    let mut read = |n: u32| {
        let row = n * 7919 % ROWS;
        assert_eq!(first_from(&engine, &mut cursor, row).unwrap(), row.to_be_bytes());
    };
    let (reads, _) = read_until_merged(&engine, &mut read);
    assert!(reads > 1000, "{reads} reads have not wasted what the merge costs");
    assert_eq!(status(&engine, "l0_runs"), 0);
    let merges = status(&engine, "compactions");
    (0..20_000).for_each(|n| {
        read(n);
        assert!(!engine.step(Job::Compact).unwrap(), "one run is all that is left");
    });
    assert_eq!(status(&engine, "compactions"), merges);
}

/// What an old snapshot still sees can't be left out, however often it is stepped over.
#[test]
fn where_a_merge_spares_nothing_it_is_not_made_again() {
    let engine = filled();
    let mut old = engine.begin();
    old.snapshot_now();
    let mut txn = engine.begin();
    (0..2000_u32).for_each(|row| txn.delete(TREE, &row.to_be_bytes()).unwrap());
    flush(&engine, &mut txn);
    let merges = status(&engine, "compactions");
    let mut cursor = Cursor::new(&engine);
    for _ in 0..3000 {
        assert_eq!(first_from(&engine, &mut cursor, 0).unwrap(), 2000_u32.to_be_bytes());
        engine.step(Job::Compact).unwrap();
    }
    let merges = status(&engine, "compactions") - merges;
    assert!((1..=3).contains(&merges), "{merges} merges");
    assert!(old.get(TREE, &7_u32.to_be_bytes(), ReadAs::Snapshot, |_| ()).unwrap().is_some());
}
