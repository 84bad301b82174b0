//! What is kept near: found again by a new node, not pushed out by scans, within one budget of memory.

#![allow(clippy::unwrap_used, reason = "a test may fail")]
#![allow(clippy::disallowed_methods, reason = "engines with threads run on real time")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bucket::{Bucket, MemoryBucket, Names};
use common::{noise, parts, status};
use engine::{Background, Cursor, Engine, Job, ReadAs, Settings, SimDisk, TreeId};

const TREE: TreeId = TreeId(70);
const ROWS: u32 = 60_000;
/// Bytes of a value.
const VALUE: usize = 200;

fn open(bucket: &Arc<MemoryBucket>, disk: &SimDisk, settings: Settings) -> Arc<Engine> {
    Engine::open(parts(bucket.clone(), disk), settings).unwrap()
}

fn settings(background: Background) -> Settings {
    let mut settings = Settings { background, ..Settings::default() };
    settings.shape.sst_bytes = 1 << 20;
    settings
}

/// 12 MB of rows, in the bucket alone.
fn filled() -> Arc<MemoryBucket> {
    let bucket = Arc::new(MemoryBucket::new());
    let engine = open(&bucket, &SimDisk::new(1), settings(Background::Manual));
    for chunk in (0..ROWS).collect::<Vec<_>>().chunks(1000) {
        let mut txn = engine.begin();
        chunk.iter().for_each(|row| txn.put(TREE, &row.to_be_bytes(), &noise(*row, VALUE)).unwrap());
        txn.commit().unwrap();
    }
    for job in [Job::Freeze, Job::Flush, Job::Publish] {
        while engine.step(job).unwrap() {}
    }
    engine.close().unwrap();
    bucket
}

fn read(engine: &Arc<Engine>, rows: impl Iterator<Item = u32>) {
    let mut txn = engine.begin();
    for row in rows {
        let found =
            txn.get(TREE, &row.to_be_bytes(), ReadAs::Snapshot, |found| found == noise(row, VALUE)).unwrap();
        assert_eq!(found, Some(true), "row {row}");
    }
}

fn scan(engine: &Arc<Engine>) -> u32 {
    let mut txn = engine.begin();
    let mut cursor = Cursor::new(engine);
    cursor.open(&mut txn, TREE, ReadAs::Snapshot).unwrap();
    let mut rows = 0_u32;
    let mut found = cursor.seek_first(&mut txn).unwrap();
    while found {
        assert_eq!((cursor.key(), cursor.value()), (&rows.to_be_bytes()[..], &noise(rows, VALUE)[..]));
        rows += 1;
        found = cursor.next(&mut txn).unwrap();
    }
    rows
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_new_node_has_what_was_hot_before_anyone_asks() {
    let bucket = filled();
    let hot = || (30_000..32_000).step_by(7);
    let heats = || bucket.list(&Names::new("main").heats()).unwrap().len();
    let engine = open(&bucket, &SimDisk::new(2), settings(Background::Threads));
    for _ in 0..3 {
        read(&engine, hot());
    }
    assert_eq!(heats(), 0, "not while it runs, so soon");
    engine.close().unwrap();
    assert_eq!(heats(), 1);

    let engine = open(&bucket, &SimDisk::new(3), settings(Background::Threads));
    until("it warms itself", || status(&engine, "warmed_chunks") > 0);
    assert!(status(&engine, "disk_cache_bytes") < 3 << 20, "with that alone");
    let waits = status(&engine, "bucket_waits");
    read(&engine, hot());
    assert_eq!(status(&engine, "bucket_waits"), waits, "nothing is waited for");
    engine.close().unwrap();
    assert_eq!(heats(), 1, "nothing new to tell");

    // What it says is no more than a hint.
    let name = bucket.list(&Names::new("main").heats()).unwrap()[0].name.clone();
    let damaged: Vec<u8> = bucket.get(&name).unwrap().iter().map(|byte| byte ^ 1).collect();
    bucket.put(&name, damaged.into()).unwrap();
    let engine = open(&bucket, &SimDisk::new(4), settings(Background::Threads));
    read(&engine, hot());
    engine.close().unwrap();
}

#[test]
fn a_scan_of_everything_leaves_what_is_hot_in_memory() {
    let bucket = filled();
    // A third of the rows fits.
    let memory = Settings { memory_bytes: 8 << 20, memtable_bytes: 1 << 20, ..settings(Background::Manual) };
    let mut memory = memory;
    memory.shape.wal_slice_bytes = 64 << 10;
    let engine = open(&bucket, &SimDisk::new(2), memory);
    let hot = || (10_000..16_000).step_by(3);
    for _ in 0..4 {
        read(&engine, hot());
    }
    let misses = || status(&engine, "block_cache_misses");
    let before = misses();
    assert_eq!(scan(&engine), ROWS);
    assert!(misses() - before > 400, "it was cold: {}", misses() - before);
    let before = misses();
    read(&engine, hot());
    assert!(misses() - before <= 2, "{} of 80 blocks were pushed out", misses() - before);
    assert_eq!(scan(&engine), ROWS);
    engine.close().unwrap();
}

#[test]
fn what_is_borrowed_is_given_back() {
    let bucket = filled();
    for background in [Background::Manual, Background::Threads] {
        let engine = open(&bucket, &SimDisk::new(2), settings(background));
        let lent = || status(&engine, "memory_lent");
        let before = lent();
        assert_eq!(scan(&engine), ROWS);
        until("windows are given back", || lent() < before + (1 << 20));
        let before = lent();
        let mut txn = engine.begin();
        for row in 0..20_000u32 {
            txn.put(TREE, &row.to_be_bytes(), &noise(row, VALUE)).unwrap();
        }
        assert!(lent() >= before + 3 * 4_000_000, "a large transaction is counted: {} {before}", lent());
        txn.rollback();
        // Background threads count what is known of the disk's chunks now and then.
        assert!(lent() <= before + (1 << 20), "{} {before}", lent());
        engine.close().unwrap();
    }
}

/// Before it merges it looks which ssts it may leave alone, and that is a few blocks of what lies above.
#[test]
fn a_merge_on_a_new_node_asks_the_bucket_for_each_byte_once() {
    let bucket = filled();
    let engine = open(&bucket, &SimDisk::new(2), settings(Background::Manual));
    for run in 0..4 {
        let mut txn = engine.begin();
        (run..ROWS)
            .step_by(20)
            .for_each(|row| txn.put(TREE, &row.to_be_bytes(), &noise(row, VALUE)).unwrap());
        txn.commit().unwrap();
        for job in [Job::Freeze, Job::Flush, Job::Publish] {
            while engine.step(job).unwrap() {}
        }
    }
    engine.close().unwrap();
    let ssts = |bucket: &MemoryBucket| -> usize {
        let contents = bucket.contents().into_iter();
        contents.filter(|(name, _)| name.as_str().contains("/sst/")).map(|(_, bytes)| bytes.len()).sum()
    };
    let bytes = ssts(&bucket) as u64;

    let engine = open(&bucket, &SimDisk::new(3), settings(Background::Manual));
    let before = status(&engine, "bucket_get_bytes");
    let misses = status(&engine, "block_cache_misses");
    while engine.step(Job::Compact).unwrap() {}
    assert_eq!(status(&engine, "block_cache_misses"), misses, "nothing was read as if a query wanted it");
    assert_eq!(status(&engine, "l0_runs"), 0);
    let fetched = status(&engine, "bucket_get_bytes") - before;
    assert!(fetched * 20 < bytes * 23, "{fetched} bytes fetched, {bytes} there are");
}
