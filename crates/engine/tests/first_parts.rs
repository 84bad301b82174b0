//! Seeks within a prefix: the same answers as a plain map, and no look at runs that hold nothing of it.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use bucket::MemoryBucket;
use common::{parts, status};
use engine::{Background, Cursor, Engine, FirstPart, Job, ReadAs, Settings, SimDisk, TreeId, Txn};
use proptest::prelude::*;

const TREE: TreeId = TreeId(70);

/// A first part ends with a zero byte.
struct ZeroEnded;

impl FirstPart for ZeroEnded {
    fn end(&self, key: &[u8]) -> Option<usize> {
        key.iter().position(|byte| *byte == 0).map(|zero| zero + 1)
    }
}

/// Compaction starts at so many runs.
fn engine(sst_bytes: usize, l0_runs: usize) -> Arc<Engine> {
    let mut settings = Settings { background: Background::Manual, ..Settings::default() };
    settings.shape.sst_bytes = sst_bytes;
    settings.shape.level_base_bytes = 4 * sst_bytes as u64;
    settings.shape.l0_runs = l0_runs;
    settings.shape.wal_segment_bytes = 256 << 10;
    Engine::open(parts(Arc::new(MemoryBucket::new()), &SimDisk::new(1)), settings).unwrap()
}

fn flush(engine: &Engine) {
    engine.step(Job::Freeze).unwrap();
    while engine.step(Job::Flush).unwrap() {}
}

fn key(part: &str, row: u32) -> Vec<u8> {
    [part.as_bytes(), b"\0", &row.to_be_bytes()].concat()
}

fn blocks_read(engine: &Engine) -> u64 {
    status(engine, "block_cache_hits") + status(engine, "block_cache_misses")
}

fn within(engine: &Arc<Engine>, txn: &mut Txn, prefix: &[u8]) -> Vec<Vec<u8>> {
    let mut cursor = Cursor::new(engine);
    cursor.open(txn, TREE, ReadAs::Snapshot).unwrap();
    let mut found = Vec::new();
    let mut more = cursor.seek_within(txn, prefix).unwrap();
    while more {
        found.push(cursor.key().to_vec());
        more = cursor.next_within(txn).unwrap();
    }
    let mut backwards = Vec::new();
    let mut more = cursor.seek_last_within(txn, prefix).unwrap();
    while more {
        backwards.push(cursor.key().to_vec());
        more = cursor.prev_within(txn).unwrap();
    }
    backwards.reverse();
    assert_eq!(found, backwards, "both directions show the same");
    found
}

/// Six runs of customers' orders; each customer's are in one run only.
#[test]
fn runs_that_hold_nothing_of_a_prefix_are_passed_over() {
    for told in [false, true] {
        let engine = engine(1 << 20, 8);
        if told {
            engine.set_first_part(TREE, Arc::new(ZeroEnded));
        }
        for run in 0..6u32 {
            let mut txn = engine.begin();
            for customer in (run..600).step_by(6) {
                for order in 0..20 {
                    txn.put(TREE, &key(&format!("customer {customer:04}"), order), &[7; 100]).unwrap();
                }
            }
            txn.commit().unwrap();
            flush(&engine);
        }
        assert_eq!(engine.status().get("l0_runs"), Some(6));
        let mut txn = engine.begin();
        let before = blocks_read(&engine);
        for customer in 0..600 {
            let prefix = format!("customer {customer:04}\0");
            assert_eq!(within(&engine, &mut txn, prefix.as_bytes()).len(), 20);
        }
        let seeks = blocks_read(&engine) - before;
        let before = blocks_read(&engine);
        for customer in 600..1200 {
            // They sort between the others, so only a filter can tell.
            let prefix = format!("customer {:04}x\0", customer - 600);
            assert!(within(&engine, &mut txn, prefix.as_bytes()).is_empty());
        }
        let misses = blocks_read(&engine) - before;
        if told {
            assert!(seeks <= 600 * 2 * 2, "{seeks} blocks for 1200 seeks of what one run in six holds");
            assert!(misses <= 300, "{misses} blocks for 1200 seeks of what no run holds");
        } else {
            // Each but those at the ends of a run.
            assert!(seeks >= 600 * 2 * 6 - 100, "without filters every run is read: {seeks}");
            assert!(misses >= 600 * 2 * 6 - 100, "without filters every run is read: {misses}");
        }
        // An optimizer's question for the same keys is answered in the same way.
        let before = blocks_read(&engine);
        for customer in 0..600 {
            let low = format!("customer {customer:04}x\0");
            let high = format!("customer {customer:04}x\u{1}");
            let (low, high) =
                (std::ops::Bound::Included(low.as_bytes()), std::ops::Bound::Excluded(high.as_bytes()));
            assert_eq!(engine.estimate(TREE, low, high).entries, 0);
        }
        assert_eq!(blocks_read(&engine) - before <= 150, told);
        txn.rollback();
    }
}

/// Compaction has full keys only, and its output is filtered all the same; a deletion in a newer run is seen though the
/// put that it hides is elsewhere.
#[test]
fn merged_runs_have_filters_too_and_deletions_are_found() {
    let engine = engine(64 << 10, 2);
    engine.set_first_part(TREE, Arc::new(ZeroEnded));
    for round in 0..5u32 {
        let mut txn = engine.begin();
        for part in 0..300u32 {
            txn.put(TREE, &key(&format!("{part:05}"), round), &[1; 200]).unwrap();
        }
        if round > 0 {
            (0..100).for_each(|part| txn.delete(TREE, &key(&format!("{part:05}"), round - 1)).unwrap());
        }
        txn.commit().unwrap();
        flush(&engine);
        while engine.step(Job::Compact).unwrap() {}
    }
    assert!(engine.status().get("l0_runs") <= Some(1) && engine.status().get("compactions") >= Some(2));
    let mut txn = engine.begin();
    for part in 0..300 {
        let rows = within(&engine, &mut txn, format!("{part:05}\0").as_bytes()).len();
        assert_eq!(rows, if part < 100 { 1 } else { 5 });
    }
    let before = blocks_read(&engine);
    for part in 0..300 {
        assert!(within(&engine, &mut txn, format!("{part:05}.\0").as_bytes()).is_empty());
    }
    let misses = blocks_read(&engine) - before;
    assert!(misses < 60, "{misses} blocks for 600 seeks of what no run holds");
}

#[derive(Clone, Debug)]
enum Step {
    Put(Vec<u8>),
    Delete(Vec<u8>),
    Commit,
    Flush,
    Compact,
    /// The rule is told, or forgotten.
    Told(bool),
    /// A prefix, and how to go on from what is found first: within, out of the prefix, forward or backward.
    Seek(Vec<u8>, bool, Vec<(bool, bool)>),
}

fn step() -> impl Strategy<Value = Step> {
    let letters = || prop::collection::vec(prop::sample::select(vec![0u8, 1, b'a', 255]), 0..5);
    let walk = prop::collection::vec((any::<bool>(), any::<bool>()), 0..6);
    prop_oneof![
        10 => letters().prop_map(Step::Put),
        4 => letters().prop_map(Step::Delete),
        3 => Just(Step::Commit),
        2 => Just(Step::Flush),
        1 => Just(Step::Compact),
        1 => any::<bool>().prop_map(Step::Told),
        10 => (letters(), any::<bool>(), walk).prop_map(|(prefix, last, walk)| Step::Seek(prefix, last, walk)),
    ]
}

type Map = BTreeMap<Vec<u8>, u32>;

/// The neighbour of `at`; within `prefix` only, if there is one.
fn neighbour(map: &Map, at: &[u8], forward: bool, prefix: Option<&[u8]>) -> Option<Vec<u8>> {
    let found = match forward {
        true => map.keys().find(|key| &key[..] > at),
        false => map.keys().rfind(|key| &key[..] < at),
    };
    found.filter(|key| prefix.is_none_or(|prefix| key.starts_with(prefix))).cloned()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn a_seek_within_a_prefix_finds_what_a_map_holds(steps in prop::collection::vec(step(), 1..120)) {
        let engine = engine(4 << 10, 2);
        engine.set_first_part(TREE, Arc::new(ZeroEnded));
        let mut map = Map::new();
        let mut txn = engine.begin();
        for (number, step) in steps.iter().enumerate() {
            match step {
                Step::Put(key) => {
                    txn.put(TREE, key, &(number as u32).to_be_bytes()).unwrap();
                    map.insert(key.clone(), number as u32);
                }
                Step::Delete(key) => {
                    txn.delete(TREE, key).unwrap();
                    map.remove(key);
                }
                Step::Commit => drop(txn.commit().unwrap()),
                Step::Flush => flush(&engine),
                Step::Compact => drop(engine.step(Job::Compact).unwrap()),
                Step::Told(true) => engine.set_first_part(TREE, Arc::new(ZeroEnded)),
                Step::Told(false) => engine.forget_first_part(TREE),
                Step::Seek(prefix, last, walk) => {
                    let mut cursor = Cursor::new(&engine);
                    cursor.open(&mut txn, TREE, ReadAs::Newest).unwrap();
                    let mut inside = map.keys().filter(|key| key.starts_with(prefix));
                    let mut expected = if *last { inside.next_back() } else { inside.next() }.cloned();
                    let mut found = match last {
                        true => cursor.seek_last_within(&mut txn, prefix).unwrap(),
                        false => cursor.seek_within(&mut txn, prefix).unwrap(),
                    };
                    let mut bound = Some(&prefix[..]);
                    for (forward, stay) in walk {
                        prop_assert_eq!(found.then(|| cursor.key().to_vec()), expected.clone(), "step {}", number);
                        let Some(at) = expected else { break };
                        prop_assert_eq!(cursor.value(), map[&at].to_be_bytes());
                        let limit = bound.filter(|_| *stay);
                        expected = neighbour(&map, &at, *forward, limit);
                        found = match (forward, stay) {
                            (true, true) => cursor.next_within(&mut txn).unwrap(),
                            (false, true) => cursor.prev_within(&mut txn).unwrap(),
                            (true, false) => cursor.next(&mut txn).unwrap(),
                            (false, false) => cursor.prev(&mut txn).unwrap(),
                        };
                        // Once outside it stays a cursor on the whole tree.
                        bound = bound.filter(|prefix| expected.as_ref().is_some_and(|key| key.starts_with(prefix)));
                    }
                }
            }
        }
    }
}
