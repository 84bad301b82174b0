//! A batch of reads that finds nothing on the machine waits for a few round trips, and sees what it would see one by one.

#![allow(clippy::unwrap_used, reason = "a test may fail")]
#![allow(clippy::disallowed_methods, reason = "requests have to meet on real threads")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use bucket::{Bucket, Effect, FaultyBucket, MemoryBucket, Operation, Rule};
use common::{noise, parts};
use engine::{Background, Engine, Job, ReadAs, Settings, SimDisk, TreeId};

const TREE: TreeId = TreeId(70);
const ROWS: u32 = 40_000;
const KEYS: u32 = 100;
/// Bytes of a value.
const VALUE: usize = 200;

/// Counts requests, and the times that one had to be waited for while no other was under way.
#[derive(Default)]
struct Waits {
    under_way: AtomicUsize,
    requests: AtomicUsize,
    round_trips: AtomicUsize,
}

impl Waits {
    fn pause(&self) {
        self.requests.fetch_add(1, SeqCst);
        if self.under_way.fetch_add(1, SeqCst) == 0 {
            self.round_trips.fetch_add(1, SeqCst);
        }
        std::thread::sleep(Duration::from_millis(10));
        self.under_way.fetch_sub(1, SeqCst);
    }
    fn take(&self) -> (usize, usize) {
        (self.requests.swap(0, SeqCst), self.round_trips.swap(0, SeqCst))
    }
}

fn open(bucket: Arc<dyn Bucket>, background: Background, disk_cache_bytes: u64) -> Arc<Engine> {
    let mut settings = Settings { background, disk_cache_bytes, ..Settings::default() };
    settings.shape.sst_bytes = 1 << 20;
    Engine::open(parts(bucket, &SimDisk::new(1)), settings).unwrap()
}

/// Rows in two runs, in the bucket alone: `second` are newer versions.
fn filled(second: u32) -> Arc<MemoryBucket> {
    let bucket = Arc::new(MemoryBucket::new());
    let engine = open(bucket.clone(), Background::Manual, 1 << 30);
    for (rows, shift) in [(0..ROWS, 0), (0..second, 1)] {
        for chunk in rows.collect::<Vec<_>>().chunks(1000) {
            let mut txn = engine.begin();
            chunk
                .iter()
                .for_each(|row| txn.put(TREE, &row.to_be_bytes(), &noise(row + shift, VALUE)).unwrap());
            txn.commit().unwrap();
        }
        for job in [Job::Freeze, Job::Flush, Job::Publish] {
            while engine.step(job).unwrap() {}
        }
    }
    engine.close().unwrap();
    bucket
}

fn keys() -> Vec<[u8; 4]> {
    (0..KEYS).map(|n| (n * 7919 % ROWS).to_be_bytes()).collect()
}

fn read(engine: &Arc<Engine>, keys: &[[u8; 4]]) -> Vec<Option<Vec<u8>>> {
    let mut txn = engine.begin();
    keys.iter().map(|key| txn.get(TREE, key, ReadAs::Snapshot, <[u8]>::to_vec).unwrap()).collect()
}

/// The engine before has told what is hot; the next one would warm itself by it, beside what is counted.
fn forget_heat(bucket: &MemoryBucket) {
    let heat: Vec<_> =
        bucket.contents().into_keys().filter(|name| name.as_str().contains("/heat/")).collect();
    bucket.delete(&heat).unwrap();
}

#[test]
fn a_hundred_cold_reads_wait_for_a_few_round_trips() {
    let inner = filled(ROWS / 2);
    let waits = Arc::new(Waits::default());
    let cold = || {
        forget_heat(&inner);
        let counted = Arc::clone(&waits);
        let latency = Effect::Latency { p50: Duration::from_millis(1), p99: Duration::from_millis(1) };
        let rule = Rule::new("*/sst/*", latency).on(Operation::Get);
        let bucket = FaultyBucket::new(inner.clone(), 1, vec![rule]);
        let engine = open(
            Arc::new(bucket.with_pause(Arc::new(move |_| counted.pause()))),
            Background::Threads,
            1 << 30,
        );
        waits.take();
        engine
    };
    let keys = keys();
    let expected: Vec<_> = keys
        .iter()
        .map(|key| {
            let row = u32::from_be_bytes(*key);
            Some(noise(row + u32::from(row < ROWS / 2), VALUE))
        })
        .collect();

    let engine = cold();
    assert_eq!(read(&engine, &keys), expected);
    let (requests_alone, round_trips_alone) = waits.take();
    assert!(round_trips_alone > 40, "the test reads what is not cold: {round_trips_alone}");
    engine.close().unwrap();

    let engine = cold();
    let came = engine.begin().prefetch(TREE, keys.iter().map(|key| &key[..]));
    let (requests, round_trips) = waits.take();
    assert_eq!(read(&engine, &keys), expected);
    assert_eq!(waits.take(), (0, 0), "the reads find all of it here");
    assert!(
        round_trips <= 10,
        "{round_trips} round trips of {requests} requests; {round_trips_alone} one by one"
    );
    assert!(requests <= requests_alone + 5, "{requests} requests; {requests_alone} one by one");
    assert!(came >= 40, "{came} pieces");
    assert_eq!(engine.status().get("prefetched"), Some(came as u64));

    let again = engine.begin().prefetch(TREE, keys.iter().map(|key| &key[..]));
    assert_eq!((again, waits.take()), (0, (0, 0)), "nothing is fetched twice");
    engine.close().unwrap();
}

#[test]
fn a_batch_without_threads_or_without_room_on_disk_changes_no_answer() {
    let inner = filled(100);
    for (background, disk_cache_bytes) in [(Background::Manual, 1 << 30), (Background::Threads, 1)] {
        let engine = open(inner.clone(), background, disk_cache_bytes);
        let mut keys = keys();
        keys.extend([(ROWS + 5).to_be_bytes(), keys[3]]);
        assert!(engine.begin().prefetch(TREE, keys.iter().map(|key| &key[..])) > 0);
        let found = read(&engine, &keys);
        assert_eq!(found[100], None);
        for (key, found) in keys.iter().zip(found).filter(|(key, _)| u32::from_be_bytes(**key) < ROWS) {
            let row = u32::from_be_bytes(*key);
            assert_eq!(found, Some(noise(row + u32::from(row < 100), VALUE)), "{row}");
        }
        engine.close().unwrap();
    }
}

#[test]
fn a_bucket_that_does_not_answer_ends_a_batch_at_once_and_the_read_says_why() {
    let inner = filled(0);
    let bucket = Arc::new(FaultyBucket::new(inner, 1, vec![]));
    let engine = open(bucket.clone(), Background::Manual, 1 << 30);
    bucket.faults().set_rules(vec![Rule::outage()]);
    let keys = keys();
    let before = bucket.meters().get.errors();
    assert_eq!(engine.begin().prefetch(TREE, keys.iter().map(|key| &key[..])), 0);
    assert_eq!(bucket.meters().get.errors() - before, 1, "the rest is not tried");
    let mut txn = engine.begin();
    let refused = txn.get(TREE, &keys[0], ReadAs::Snapshot, |_| ()).unwrap_err();
    assert_eq!(refused.kind(), engine::Kind::Unavailable);
}

/// So many runs, each with its share of the rows, evenly spread.
fn in_runs(runs: u32) -> Arc<MemoryBucket> {
    let bucket = Arc::new(MemoryBucket::new());
    let engine = open(bucket.clone(), Background::Manual, 1 << 30);
    for run in 0..runs {
        let mut txn = engine.begin();
        for row in (0..4000).filter(|row| row % runs == run) {
            txn.put(TREE, &u32::to_be_bytes(row), &noise(row, VALUE)).unwrap();
        }
        txn.commit().unwrap();
        for job in [Job::Freeze, Job::Flush, Job::Publish] {
            while engine.step(job).unwrap() {}
        }
    }
    engine.close().unwrap();
    bucket
}

#[test]
fn a_cold_look_up_in_many_runs_waits_as_if_there_were_one() {
    let inner = in_runs(4);
    let round_trips = |background: Background| {
        forget_heat(&inner);
        let waits = Arc::new(Waits::default());
        let counted = Arc::clone(&waits);
        let latency = Effect::Latency { p50: Duration::from_millis(1), p99: Duration::from_millis(1) };
        let rule = Rule::new("*/sst/*", latency).on(Operation::Get);
        let bucket = FaultyBucket::new(inner.clone(), 1, vec![rule]);
        let bucket = Arc::new(bucket.with_pause(Arc::new(move |_| counted.pause())));
        let engine = open(bucket, background, 1 << 30);
        waits.take();
        // Of the oldest run; all newer ones have keys on both sides of it.
        assert_eq!(read(&engine, &[2000u32.to_be_bytes()]), vec![Some(noise(2000, VALUE))]);
        assert_eq!(read(&engine, &[9000u32.to_be_bytes()]), vec![None]);
        let (_, round_trips) = waits.take();
        engine.close().unwrap();
        round_trips
    };
    let one_by_one = round_trips(Background::Manual);
    let together = round_trips(Background::Threads);
    assert!(one_by_one >= 5, "each run is opened, its filter asked: {one_by_one}");
    assert!(together <= 3, "{together} round trips, {one_by_one} one by one");
}
