//! Bulk loads: sorted data straight to ssts must read as if it had been written row by row, be there as a whole or not at all
//! after any crash, and leave nothing behind when it is given up.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bucket::{Bucket, Effect, FaultyBucket, MemoryBucket, Operation, Rule};
use common::{Random, all, parts, small, status};
use engine::{
    Background, Cursor, Engine, Job, Kind, Load, Loaded, LockMode, LockWait, ReadAs, Result, Settings,
    SimDisk, TreeId, Txn, inspect_object,
};

const OTHER: TreeId = TreeId(7);

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

/// A machine with its disk, and the bucket.
struct Place {
    disk: SimDisk,
    bucket: Arc<MemoryBucket>,
}

impl Place {
    fn new() -> Self {
        Self { disk: SimDisk::new(1), bucket: Arc::new(MemoryBucket::new()) }
    }

    fn open(&self) -> Arc<Engine> {
        open(&self.disk, Arc::clone(&self.bucket) as _, small(Background::Manual)).expect("opens")
    }

    /// The power is cut and comes back.
    fn crash(&mut self) {
        self.disk = self.disk.crash();
    }

    /// Only the bucket is left.
    fn lose_machine(&mut self) {
        self.disk = SimDisk::new(2);
    }

    fn ssts_in_bucket(&self) -> usize {
        self.bucket.contents().keys().filter(|name| name.as_str().contains("/sst/")).count()
    }
}

fn open(disk: &SimDisk, bucket: Arc<dyn Bucket>, settings: Settings) -> Result<Arc<Engine>> {
    Engine::open(parts(bucket, disk), settings)
}

fn step(engine: &Engine, job: Job) {
    while engine.step(job).expect("fair weather") {}
}

/// All background work there is, memtables included.
fn settle(engine: &Engine) {
    engine.step(Job::Freeze).expect("fair weather");
    let jobs = [Job::Flush, Job::UploadWal, Job::Publish, Job::Compact, Job::CollectGarbage];
    while jobs.iter().any(|job| engine.step(*job).expect("fair weather")) {}
}

/// Rows that look like nothing in particular.
fn rows(count: u64, seed: u64) -> Rows {
    let mut random = Random(seed);
    let row = |_| {
        let key = random.below(1 << 40).to_be_bytes()[3..].to_vec();
        (key, vec![random.below(256) as u8; random.below(200) as usize])
    };
    (0..count).map(row).collect()
}

fn fill(load: &mut Load, rows: &Rows) {
    rows.iter().for_each(|(key, value)| load.put(key, value).expect("ascends"));
}

fn loaded(engine: &Arc<Engine>, tree: TreeId, rows: &Rows) -> Loaded {
    let mut load = engine.load(tree).expect("nothing is there");
    fill(&mut load, rows);
    load.finish().expect("the bucket answers")
}

/// In a tree of its own, together with a write that says which.
fn load_and_commit(engine: &Arc<Engine>, rows: &Rows) -> TreeId {
    let tree = engine.allocate_tree();
    let mut txn = engine.begin();
    txn.add_loaded(loaded(engine, tree, rows)).expect("nothing is there");
    txn.put(OTHER, b"loaded", &tree.0.to_be_bytes()).expect("fits");
    txn.commit().expect("commits");
    tree
}

/// What the newest load in the catalogue holds.
fn named(engine: &Arc<Engine>) -> Option<Rows> {
    let mut txn = engine.begin();
    let tree = txn.get(OTHER, b"loaded", ReadAs::Snapshot, |value| {
        TreeId(u32::from_be_bytes(value.try_into().expect("a tree id")))
    });
    tree.expect("reads").map(|tree| all(engine, &mut txn, tree))
}

fn write(engine: &Arc<Engine>, tree: TreeId, changes: &BTreeMap<Vec<u8>, Option<Vec<u8>>>) {
    for part in changes.iter().collect::<Vec<_>>().chunks(50) {
        let mut txn = engine.begin();
        for (key, value) in part {
            txn.lock(tree, key, LockMode::Exclusive, &LockWait::NOT_AT_ALL).expect("nobody has it");
            match value {
                Some(value) => txn.put(tree, key, value).expect("fits"),
                None => txn.delete(tree, key).expect("fits"),
            }
        }
        txn.commit().expect("commits");
    }
}

/// The slow way and the fast one, side by side: before the flush, after it, after changes, merges and a restart.
#[test]
fn what_is_loaded_reads_as_if_it_had_been_written_row_by_row() {
    for seed in 1..=6 {
        let mut place = Place::new();
        let mut engine = place.open();
        let mut want = rows(seed * 400, seed);
        let by_hand = engine.allocate_tree();
        write(
            &engine,
            by_hand,
            &want.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect(),
        );
        let mut before = engine.begin();
        before.snapshot_now();
        let tree = load_and_commit(&engine, &want);
        let mut after = engine.begin();
        after.snapshot_now();
        let first = want.clone();
        let mut random = Random(seed);
        for round in 0..6 {
            let same = |engine: &Arc<Engine>, txn: &mut Txn, want: &Rows| {
                assert_eq!(&all(engine, txn, tree), want, "seed {seed}, round {round}");
                assert_eq!(&all(engine, txn, by_hand), want, "seed {seed}, round {round}");
            };
            same(&engine, &mut engine.begin(), &want);
            assert_eq!(all(&engine, &mut after, tree), first, "an old snapshot, seed {seed}, round {round}");
            assert_eq!(all(&engine, &mut before, tree), Rows::new(), "a snapshot from before the load");
            let estimate =
                |tree| engine.estimate(tree, std::ops::Bound::Unbounded, std::ops::Bound::Unbounded).entries;
            assert!(estimate(tree) >= want.len() as u64 / 2, "{} of {}", estimate(tree), want.len());
            match round {
                1 => settle(&engine),
                _ => _ = engine.step(Job::Freeze).expect("fair weather"),
            }
            let mut changes = BTreeMap::new();
            for key in want.keys() {
                if random.below(5) > 0 {
                    continue;
                }
                changes.insert(key.clone(), (random.below(3) > 0).then(|| vec![round; 30]));
            }
            for (key, value) in rows(50, seed * 100 + u64::from(round)) {
                changes.insert(key, Some(value));
            }
            write(&engine, tree, &changes);
            write(&engine, by_hand, &changes);
            for (key, value) in changes {
                match value {
                    Some(value) => _ = want.insert(key, value),
                    None => _ = want.remove(&key),
                }
            }
            if round == 3 {
                settle(&engine);
            }
        }
        drop((before, after));
        drop(engine);
        place.crash();
        engine = place.open();
        assert_eq!(all(&engine, &mut engine.begin(), tree), want);
        settle(&engine);
        drop(engine);
        place.lose_machine();
        engine = place.open();
        assert_eq!(all(&engine, &mut engine.begin(), tree), want);
        assert_eq!(all(&engine, &mut engine.begin(), by_hand), want);
    }
}

/// Flushes and merges of everything around it leave a load where it is: nothing is written twice.
#[test]
fn what_was_loaded_is_not_written_again_without_need() {
    let place = Place::new();
    let engine = place.open();
    let (before, tree, after) = (engine.allocate_tree(), engine.allocate_tree(), engine.allocate_tree());
    let mut txn = engine.begin();
    let want = rows(3000, 1);
    txn.add_loaded(loaded(&engine, tree, &want)).unwrap();
    txn.commit().unwrap();
    let put = || place.bucket.meters().put.bytes();
    let loaded_bytes = status(&engine, "loaded_bytes");
    assert!(put() <= loaded_bytes + 4096, "a load is sent once: {} of {loaded_bytes}", put());
    let names = || place.bucket.contents().keys().cloned().collect::<std::collections::BTreeSet<_>>();
    let ssts: Vec<_> = names().into_iter().filter(|name| name.as_str().contains("/sst/")).collect();
    assert!(ssts.len() > 5);
    for round in 0..30 {
        for tree in [before, after] {
            let changes = rows(100, round).into_iter().map(|(key, value)| (key, Some(value))).collect();
            write(&engine, tree, &changes);
        }
        settle(&engine);
    }
    assert!(status(&engine, "compactions") > 0);
    assert!(ssts.iter().all(|name| names().contains(name)), "some were merged away");
    assert_eq!(all(&engine, &mut engine.begin(), tree), want);
}

/// What a person sees who looks into the bucket.
#[test]
fn a_load_is_told_in_words() {
    let place = Place::new();
    let engine = place.open();
    load_and_commit(&engine, &rows(100, 1));
    let told = |kind: &str| -> String {
        let objects = place.bucket.contents();
        let objects = objects.iter().filter(|(name, _)| name.as_str().contains(kind));
        objects.map(|(name, body)| inspect_object(name, body).expect("whole")).collect()
    };
    step(&engine, Job::UploadWal);
    assert!(told("/wal/").contains(" load sst 1-1 ("), "{}", told("/wal/"));
    settle(&engine);
    let words = "adds to level 6: sst 1-1, ";
    assert!(
        told("/edit-").contains(words) && told("/edit-").contains("loaded at seqno 1,"),
        "{}",
        told("/edit-")
    );
    assert!(
        told("/sst/").contains("seqno 0 (the commit of a load, as the manifest says)"),
        "{}",
        told("/sst/")
    );
}

#[test]
fn keys_that_do_not_ascend_are_refused_by_name() {
    let engine = Place::new().open();
    let mut load = engine.load(TreeId(70)).unwrap();
    load.put(b"b", b"1").unwrap();
    for key in ["b", "a", ""] {
        let error = load.put(key.as_bytes(), b"2").unwrap_err();
        assert_eq!(error.kind(), Kind::BadRequest);
        assert!(error.to_string().contains("tree 70"), "{error}");
    }
    assert_eq!(load.put(&vec![b'x'; 17 << 10], b"").unwrap_err().kind(), Kind::BadRequest);
    load.put(b"c", b"3").unwrap();
    assert_eq!((load.entries(), load.bytes()), (2, 4));
    let mut txn = engine.begin();
    txn.add_loaded(load.finish().unwrap()).unwrap();
    txn.commit().unwrap();
    let want = [(b"b".to_vec(), b"1".to_vec()), (b"c".to_vec(), b"3".to_vec())].into();
    assert_eq!(all(&engine, &mut engine.begin(), TreeId(70)), want);
}

/// A version that is newer than a load would be found after it, and an older one before it. So there may be none, seen or not, wherever it is.
#[test]
fn a_tree_that_was_written_to_is_not_loaded() {
    let engine = Place::new().open();
    let refused = |tree| {
        let error = engine.load(tree).map(drop).expect_err("something is there");
        assert_eq!(error.kind(), Kind::BadRequest);
        assert!(error.to_string().contains(&format!("tree {}", tree.0)), "{error}");
    };
    let trees: Vec<TreeId> = (0..3).map(|_| engine.allocate_tree()).collect();
    for tree in [trees[0], trees[2]] {
        write(&engine, tree, &[(b"k".to_vec(), Some(b"v".to_vec()))].into());
    }
    write(&engine, trees[0], &[(b"k".to_vec(), None)].into());
    refused(trees[0]); // a deletion in the memtable
    engine.step(Job::Freeze).unwrap();
    refused(trees[0]);
    step(&engine, Job::Flush);
    refused(trees[0]); // in an sst of level 0
    assert!(engine.load(trees[1]).is_ok(), "an sst with keys on both sides of a tree holds nothing of it");
    settle(&engine);
    refused(trees[2]);
    // Written between the begin of a load and its commit: before, after, and by the transaction itself.
    for late in 0..5 {
        let tree = engine.allocate_tree();
        let change = [(b"x".to_vec(), Some(b"y".to_vec()))].into();
        let finished = loaded(&engine, tree, &rows(10, late));
        let mut txn = engine.begin();
        match late {
            0 => write(&engine, tree, &change),
            1 => {
                write(&engine, tree, &change);
                engine.step(Job::Freeze).unwrap();
                step(&engine, Job::Flush);
            }
            2 => txn.put(tree, b"x", b"y").unwrap(),
            3 => {
                let mut other = engine.begin();
                other.add_loaded(loaded(&engine, tree, &rows(10, 99))).unwrap();
                other.commit().unwrap();
            }
            _ => txn.drop_tree(tree),
        }
        let error = txn.add_loaded(finished).and_then(|()| txn.commit()).expect_err("written to");
        assert_eq!(error.kind(), Kind::BadRequest, "{late}");
    }
    let tree = load_and_commit(&engine, &rows(10, 1));
    refused(tree);
    let mut txn = engine.begin();
    txn.drop_tree(tree);
    txn.commit().unwrap();
    refused(tree);
    settle(&engine);
    write(&engine, OTHER, &[(b"still".to_vec(), Some(b"alive".to_vec()))].into());
}

#[test]
fn what_is_given_up_goes_away() {
    let place = Place::new();
    let engine = place.open();
    load_and_commit(&engine, &rows(500, 3));
    settle(&engine);
    let (at_rest, used) = (place.ssts_in_bucket(), place.disk.used());
    let want = rows(2000, 4);
    for way in 0..5 {
        let tree = engine.allocate_tree();
        let mut load = engine.load(tree).unwrap();
        fill(&mut load, &want);
        assert!(place.ssts_in_bucket() > at_rest + 3, "it uploads as it goes");
        let mut txn = engine.begin();
        match way {
            0 => drop(load),
            1 => drop(load.finish().unwrap()),
            2 => {
                txn.add_loaded(load.finish().unwrap()).unwrap();
                txn.rollback();
            }
            3 => {
                txn.put(OTHER, b"kept", b"1").unwrap();
                let mark = txn.mark();
                txn.add_loaded(load.finish().unwrap()).unwrap();
                txn.rollback_to(mark);
                txn.commit().unwrap();
            }
            _ => {
                txn.add_loaded(load.finish().unwrap()).unwrap();
                place.disk.limit(place.disk.used());
                txn.put(OTHER, b"large", &vec![1; 20 << 20]).unwrap();
                assert_eq!(txn.commit().unwrap_err().kind(), Kind::Full, "no place in the wal");
                place.disk.limit(u64::MAX);
            }
        }
        step(&engine, Job::CollectGarbage);
        assert_eq!(place.ssts_in_bucket(), at_rest, "way {way}");
        assert!(all(&engine, &mut engine.begin(), tree).is_empty());
        assert!(engine.load(tree).is_ok(), "nothing is there, so another try may follow");
    }
    assert!(place.disk.used() <= used + (40 << 10), "no local copy stays either");
}

/// A crash at each step of a load: it is there as a whole, or not at all; what is not named goes with the next start.
#[test]
fn a_crash_leaves_all_of_a_load_or_nothing() {
    let want = rows(1500, 5);
    // What is done before the crash, whether the load is there on the same machine, and whether on another.
    type Story = (&'static str, &'static [Job], bool, bool);
    let stories: [Story; 6] = [
        ("committed", &[], true, false),
        ("in the wal's slice", &[Job::UploadWal], true, true),
        ("flushed, not published", &[Job::UploadWal, Job::Freeze, Job::Flush], true, true),
        ("flushed, no slice", &[Job::Freeze, Job::Flush], true, false),
        ("published, no slice", &[Job::Freeze, Job::Flush, Job::Publish], true, true),
        (
            "at rest",
            &[Job::Freeze, Job::Flush, Job::Publish, Job::UploadWal, Job::CollectGarbage],
            true,
            true,
        ),
    ];
    for (story, jobs, on_this_machine, on_another) in stories {
        for lost in [false, true] {
            let mut place = Place::new();
            let engine = place.open();
            write(&engine, OTHER, &[(b"k".to_vec(), Some(b"v".to_vec()))].into());
            load_and_commit(&engine, &want);
            for job in jobs {
                step_once_or_all(&engine, *job);
            }
            drop(engine);
            if lost {
                place.lose_machine()
            } else {
                place.crash()
            }
            // Once more, so that what a start leaves to the next one is seen too.
            for start in 0..3 {
                let engine = place.open();
                let there = if lost { on_another } else { on_this_machine };
                assert_eq!(
                    named(&engine),
                    there.then(|| want.clone()),
                    "{story}, lost: {lost}, start {start}"
                );
                // A sweep before the flush must spare what only the wal names.
                step(&engine, Job::CollectGarbage);
                assert_eq!(named(&engine), there.then(|| want.clone()), "{story}, lost: {lost}, swept");
                drop(engine);
                place.crash();
            }
            let engine = place.open();
            settle(&engine);
            assert_eq!(
                place.ssts_in_bucket() as u64,
                status(&engine, "ssts"),
                "{story}, lost: {lost}: orphans"
            );
        }
    }
}

fn step_once_or_all(engine: &Engine, job: Job) {
    match job {
        Job::Freeze => _ = engine.step(job).expect("fair weather"),
        _ => step(engine, job),
    }
}

#[test]
fn a_crash_in_the_middle_of_a_load_leaves_what_the_next_start_removes() {
    for finished in [false, true] {
        let mut place = Place::new();
        let engine = place.open();
        load_and_commit(&engine, &rows(100, 1));
        settle(&engine);
        let at_rest = place.ssts_in_bucket();
        let mut load = engine.load(engine.allocate_tree()).unwrap();
        fill(&mut load, &rows(2000, 2));
        if finished {
            std::mem::forget(load.finish().unwrap());
        } else {
            std::mem::forget(load);
        }
        assert!(place.ssts_in_bucket() > at_rest + 3);
        place.crash();
        let next = place.open();
        settle(&next);
        assert_eq!(place.ssts_in_bucket(), at_rest, "finished: {finished}");
        assert_eq!(named(&next), Some(rows(100, 1)));
        drop(engine);
    }
}

/// A start replays a load of an earlier epoch, flushes it and merges it away before any of that is published. Until then the wal
/// names what memory has replaced, and the sweep of earlier epochs' leftovers must spare it: the next start needs it.
#[test]
fn what_only_the_wal_names_outlives_its_merge_in_memory() {
    let mut place = Place::new();
    let engine = place.open();
    let mut want = rows(1500, 6);
    let tree = load_and_commit(&engine, &want);
    step(&engine, Job::UploadWal);
    drop(engine);
    place.lose_machine();
    let engine = place.open();
    for round in 0..5u8 {
        let changes: BTreeMap<_, _> = want.keys().map(|key| (key.clone(), Some(vec![round; 9]))).collect();
        write(&engine, tree, &changes);
        want = changes.into_iter().map(|(key, value)| (key, value.expect("a put"))).collect();
        engine.step(Job::Freeze).unwrap();
        step(&engine, Job::Flush);
    }
    step(&engine, Job::Compact);
    assert!(status(&engine, "compactions") > 0);
    step(&engine, Job::CollectGarbage);
    step(&engine, Job::UploadWal);
    drop(engine);
    place.lose_machine();
    let engine = place.open();
    assert_eq!(all(&engine, &mut engine.begin(), tree), want);
    settle(&engine);
    assert_eq!(place.ssts_in_bucket() as u64, status(&engine, "ssts"));
    assert_eq!(all(&engine, &mut engine.begin(), tree), want);
}

/// One edit tells of the flush that brings a load into the tree and of the merge that replaces it, and so names it nowhere. Its
/// objects stay while the wal names them, and go when the edit is published.
#[test]
fn a_load_that_came_and_went_in_one_edit_stays_as_long_as_the_wal_names_it() {
    let place = Place::new();
    let engine = place.open();
    let want = rows(1500, 6);
    let tree = load_and_commit(&engine, &want);
    let loads = place.ssts_in_bucket();
    assert!(loads > 0);
    for round in 0..5u8 {
        write(&engine, tree, &want.keys().map(|key| (key.clone(), Some(vec![round; 9]))).collect());
        engine.step(Job::Freeze).unwrap();
        step(&engine, Job::Flush);
    }
    step(&engine, Job::Compact);
    assert!(status(&engine, "compactions") > 0);
    step(&engine, Job::CollectGarbage);
    assert_eq!(place.ssts_in_bucket(), loads, "a start would replay them");
    settle(&engine);
    assert_eq!(place.ssts_in_bucket() as u64, status(&engine, "ssts"));
}

/// Found by the simulation: a cursor from before the flush finds a load beside the memtables and not in its version of the tree.
/// When all of it was merged away and nobody had a version with it any more, what the cursor stood in was deleted.
#[test]
fn a_cursor_goes_on_in_a_load_that_was_merged_away_under_it() {
    let place = Place::new();
    let engine = place.open();
    let want = rows(6000, 12);
    let tree = load_and_commit(&engine, &want);
    let mut txn = engine.begin();
    let mut cursor = Cursor::new(&engine);
    cursor.open(&mut txn, tree, ReadAs::Snapshot).unwrap();
    assert!(cursor.seek_first(&mut txn).unwrap());
    let ssts = || place.bucket.contents().into_keys().filter(|name| name.as_str().contains("/sst/"));
    let loaded: Vec<_> = ssts().collect();
    let left = || ssts().filter(|name| loaded.contains(name)).count();
    for round in 0..5u8 {
        write(&engine, tree, &want.keys().map(|key| (key.clone(), Some(vec![round; 9]))).collect());
        settle(&engine);
    }
    assert_eq!(left(), loaded.len(), "the cursor may still come to each");
    assert!(place.ssts_in_bucket() as u64 > status(&engine, "ssts"), "the tree has merged some away");
    for (key, value) in &want {
        assert_eq!((cursor.key(), cursor.value()), (&key[..], &value[..]));
        _ = cursor.next(&mut txn).expect("its ssts are there");
    }
    drop((cursor, txn));
    settle(&engine);
    assert_eq!(place.ssts_in_bucket() as u64, status(&engine, "ssts"), "now they go");
    assert!(left() < loaded.len());
}

#[test]
fn a_tree_that_is_dropped_after_its_load_stays_dropped() {
    for jobs in [&[][..], &[Job::Freeze, Job::Flush], &[Job::Freeze, Job::Flush, Job::Publish]] {
        for late in [false, true] {
            let mut place = Place::new();
            let engine = place.open();
            let tree = load_and_commit(&engine, &rows(800, 7));
            let work = || jobs.iter().for_each(|job| step_once_or_all(&engine, *job));
            if late {
                work();
            }
            let mut txn = engine.begin();
            txn.drop_tree(tree);
            txn.commit().unwrap();
            if !late {
                work();
            }
            drop(engine);
            place.crash();
            let engine = place.open();
            assert!(all(&engine, &mut engine.begin(), tree).is_empty(), "{jobs:?} {late}");
            settle(&engine);
            assert!(all(&engine, &mut engine.begin(), tree).is_empty(), "{jobs:?} {late}");
            assert_eq!(place.ssts_in_bucket() as u64, status(&engine, "ssts"));
        }
    }
}

#[test]
fn a_writer_that_was_taken_over_finishes_no_load() {
    let place = Place::new();
    let engine = place.open();
    let mut early = engine.load(TreeId(70)).unwrap();
    fill(&mut early, &rows(1000, 8));
    let finished = loaded(&engine, TreeId(71), &rows(1000, 9));
    let next = open(&SimDisk::new(3), Arc::clone(&place.bucket) as _, small(Background::Manual)).unwrap();
    settle(&next);
    assert_eq!(early.finish().map(drop).unwrap_err().kind(), Kind::Fenced);
    let mut txn = engine.begin();
    txn.add_loaded(finished).unwrap();
    assert_eq!(txn.commit().unwrap_err().kind(), Kind::Fenced, "it has learned so above");
    drop(engine);
    assert!(all(&next, &mut next.begin(), TreeId(71)).is_empty());
}

#[test]
fn a_bucket_that_refuses_ends_a_load_and_the_next_one_succeeds() {
    let place = Place::new();
    let faulty = FaultyBucket::new(Arc::clone(&place.bucket) as _, 1, Vec::new()).with_tries(1);
    let faulty = Arc::new(faulty);
    let engine = open(&place.disk, Arc::clone(&faulty) as _, small(Background::Manual)).unwrap();
    let want = rows(2000, 10);
    let outage = Rule::new("*/sst/*", Effect::Status { code: 503, burst: 0 }).on(Operation::Put);
    faulty.faults().set_rules(vec![outage]);
    let mut load = engine.load(TreeId(70)).unwrap();
    let error = want.iter().find_map(|(key, value)| load.put(key, value).err()).expect("the first sst fails");
    assert_eq!(error.kind(), Kind::Unavailable);
    drop(load);
    faulty.faults().set_rules(Vec::new());
    step(&engine, Job::CollectGarbage);
    assert_eq!(place.ssts_in_bucket(), 0);
    load_and_commit(&engine, &want);
    assert_eq!(named(&engine), Some(want));
}

/// Loads beside each other, beside writers and drops, with every thread at work and a bucket in bad weather; and all of it again
/// from the bucket alone.
#[test]
fn loads_of_many_threads_do_not_meet() {
    let place = Place::new();
    let bucket = Arc::new(FaultyBucket::new(Arc::clone(&place.bucket) as _, 5, Vec::new()).with_tries(2));
    let engine = open(&place.disk, Arc::clone(&bucket) as _, small(Background::Threads)).unwrap();
    bucket.faults().set_rules(Rule::weather(0.1));
    let loader = |thread: u64| {
        let mut kept = Vec::new();
        for round in 0..8 {
            let want = rows(300 + 200 * round, thread * 100 + round);
            let tree = engine.allocate_tree();
            let mut txn = engine.begin();
            txn.add_loaded(loaded(&engine, tree, &want)).unwrap();
            txn.put(OTHER, &tree.0.to_be_bytes(), b"load").unwrap();
            match round % 4 {
                0 => drop(txn),
                1 => {
                    txn.commit().unwrap();
                    txn.drop_tree(tree);
                    txn.commit().unwrap();
                }
                _ => {
                    txn.commit().unwrap();
                    assert_eq!(all(&engine, &mut engine.begin(), tree), want);
                    kept.push((tree, want));
                }
            }
        }
        kept
    };
    let stop = AtomicBool::new(false);
    let kept: Vec<(TreeId, Rows)> = std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0u64.. {
                write(&engine, TreeId(8), &[(n.to_be_bytes().to_vec(), Some(vec![1; 500]))].into());
                if stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let loader = &loader;
        let loaders: Vec<_> = (0..3).map(|thread| scope.spawn(move || loader(thread))).collect();
        let kept = loaders.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect();
        stop.store(true, Ordering::Relaxed);
        kept
    });
    bucket.faults().set_rules(Vec::new());
    engine.close().unwrap();
    drop(engine);
    let mut place = Place { disk: SimDisk::new(6), bucket: Arc::clone(&place.bucket) };
    for _ in 0..2 {
        let engine = place.open();
        for (tree, want) in &kept {
            assert_eq!(&all(&engine, &mut engine.begin(), *tree), want);
        }
        settle(&engine);
        assert_eq!(place.ssts_in_bucket() as u64, status(&engine, "ssts"));
        place.lose_machine();
    }
}

/// With threads of its own a load waits while the bucket is away, and whoever waits can be killed.
#[test]
fn a_load_waits_for_the_bucket_until_somebody_kills_it() {
    let place = Place::new();
    let faulty = FaultyBucket::new(Arc::clone(&place.bucket) as _, 1, Vec::new()).with_tries(1);
    let faulty = Arc::new(faulty);
    let engine = open(&place.disk, Arc::clone(&faulty) as _, small(Background::Threads)).unwrap();
    let want = rows(3000, 11);
    let outage = || Rule::new("*/sst/*", Effect::Status { code: 503, burst: 0 }).on(Operation::Put);
    faulty.faults().set_rules(vec![outage()]);
    let tree = engine.allocate_tree();
    let killed = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&killed);
    let mut load = engine.load(tree).unwrap().interrupted_by(move || asked.load(Ordering::Relaxed));
    fill(&mut load, &want);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| load.finish().map(drop).expect_err("killed").kind());
        killed.store(true, Ordering::Relaxed);
        assert_eq!(waits.join().unwrap(), Kind::Interrupted);
    });
    let mut load = engine.load(tree).unwrap();
    fill(&mut load, &want);
    let finished = std::thread::scope(|scope| {
        let waits = scope.spawn(|| load.finish());
        faulty.faults().set_rules(Vec::new());
        waits.join().unwrap().expect("the bucket is back")
    });
    let mut txn = engine.begin();
    txn.add_loaded(finished).unwrap();
    txn.commit().unwrap();
    assert_eq!(all(&engine, &mut engine.begin(), tree), want);
    engine.close().unwrap();
    drop(engine);
    let place = Place { disk: SimDisk::new(4), bucket: Arc::clone(&place.bucket) };
    let engine = place.open();
    assert_eq!(all(&engine, &mut engine.begin(), tree), want);
    settle(&engine);
    assert_eq!(place.ssts_in_bucket() as u64, status(&engine, "ssts"), "what was killed is gone");
}

#[test]
fn how_a_commit_ended_is_known_before_its_locks_are_given_back() {
    let engine = Place::new().open();
    let name = b"name";
    for fails in [false, true] {
        let tree = engine.allocate_tree();
        let (mut txn, mut other) = (engine.begin(), engine.begin());
        txn.lock_name(OTHER, name, LockMode::Exclusive, &LockWait::NOT_AT_ALL).unwrap();
        txn.add_loaded(loaded(&engine, tree, &rows(10, 1))).unwrap();
        if fails {
            txn.put(tree, b"x", b"y").unwrap();
        }
        let mut settled = None;
        let result = txn.commit_and(|result| {
            let taken = other.lock_name(OTHER, name, LockMode::Exclusive, &LockWait::NOT_AT_ALL);
            assert_eq!(taken.expect_err("it is held").kind(), Kind::LockTimeout);
            settled = Some(result.is_ok());
        });
        assert_eq!((settled, result.is_ok()), (Some(!fails), !fails));
        other.lock_name(OTHER, name, LockMode::Exclusive, &LockWait::NOT_AT_ALL).unwrap();
    }
}
