//! What survives: a stop, a crash, the loss of the local directory, another writer, an outage of the bucket. On a real
//! disk, with the engine's own threads where that is the point.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bucket::{Bucket, DirectoryBucket, Effect, FaultyBucket, MemoryBucket, Operation, Rule};
use common::{Random, all, parts, parts_on, small, status};
use engine::limits::Shape;
use engine::{
    Background, Clock, Disk, DiskError, DiskFile, Engine, Hooks, Job, Kind, LockMode, LockWait, Parts,
    ReadAs, RealDisk, Result, Settings, SimDisk, SystemClock, TreeId,
};
use parking_lot::Mutex;
use tempfile::TempDir;

const TREE: TreeId = TreeId(7);
const BACKGROUND_JOBS: [Job; 6] =
    [Job::PrepareWal, Job::Flush, Job::UploadWal, Job::Publish, Job::Compact, Job::CollectGarbage];

/// A machine's directory and a bucket's.
struct Place {
    data: TempDir,
    bucket: TempDir,
}

impl Place {
    fn new() -> Self {
        let new = || tempfile::tempdir().expect("a temporary directory");
        Self { data: new(), bucket: new() }
    }

    fn bucket(&self) -> Arc<dyn Bucket> {
        Arc::new(DirectoryBucket::open(self.bucket.path()).expect("the bucket opens"))
    }

    fn open(&self, settings: Settings) -> Arc<Engine> {
        open_at(self.data.path(), self.bucket(), settings).expect("the engine opens")
    }

    /// What a new machine finds.
    fn lose_data(&mut self) {
        self.data = tempfile::tempdir().expect("a temporary directory");
    }
}

fn open_at(data: &Path, bucket: Arc<dyn Bucket>, settings: Settings) -> Result<Arc<Engine>> {
    // A background thread of a dropped engine may hold it for one more step.
    let disk = loop {
        match RealDisk::open(data) {
            Ok(disk) => break disk,
            Err(error) => assert!(error.message.contains("another process"), "{error}"),
        }
        std::thread::yield_now();
    };
    Engine::open(parts_on(bucket, Arc::new(disk)), settings)
}

fn manual() -> Settings {
    small(Background::Manual)
}

fn put(engine: &Arc<Engine>, key: &str, value: &str) -> Result<()> {
    let mut txn = engine.begin();
    txn.put(TREE, key.as_bytes(), value.as_bytes())?;
    txn.commit().map(drop)
}

fn text(engine: &Arc<Engine>) -> String {
    let entries = all(engine, &mut engine.begin(), TREE);
    let show = |(key, value): (&Vec<u8>, &Vec<u8>)| {
        format!("{}={}", String::from_utf8_lossy(key), String::from_utf8_lossy(value))
    };
    entries.iter().map(show).collect::<Vec<_>>().join(" ")
}

fn drain(engine: &Engine) {
    while BACKGROUND_JOBS.iter().any(|job| engine.step(*job).expect("fair weather")) {}
}

#[test]
fn what_was_committed_is_there_after_a_clean_stop() {
    let place = Place::new();
    let engine = place.open(Settings::default());
    put(&engine, "a", "1").unwrap();
    engine.close().unwrap();
    assert_eq!(put(&engine, "b", "2").unwrap_err().kind(), Kind::Unavailable, "closed");
    drop(engine);
    assert_eq!(text(&place.open(Settings::default())), "a=1");
}

#[test]
fn what_was_committed_is_there_after_a_crash() {
    let place = Place::new();
    for round in 0..5 {
        let engine = place.open(manual());
        assert_eq!(text(&engine), (0..round).map(|n| format!("{n}={n}")).collect::<Vec<_>>().join(" "));
        put(&engine, &round.to_string(), &round.to_string()).unwrap();
        // Dropped without a word: nothing was uploaded.
    }
}

#[test]
fn the_bucket_alone_has_all_that_was_uploaded() {
    let mut place = Place::new();
    let engine = place.open(manual());
    put(&engine, "a", "1").unwrap();
    while engine.step(Job::UploadWal).unwrap() {}
    put(&engine, "b", "2").unwrap();
    drop(engine);
    place.lose_data();
    let engine = place.open(manual());
    assert_eq!(text(&engine), "a=1", "the second was on the lost disk only");
    put(&engine, "c", "3").unwrap();
    engine.close().unwrap();
    drop(engine);
    place.lose_data();
    assert_eq!(text(&place.open(manual())), "a=1 c=3");
}

#[test]
fn a_stopped_server_needs_nothing_of_its_directory() {
    let mut place = Place::new();
    let engine = place.open(small(Background::Threads));
    for n in 0..2000 {
        put(&engine, &format!("{n:05}"), &"x".repeat(100)).unwrap();
    }
    engine.close().unwrap();
    drop(engine);
    place.lose_data();
    let engine = place.open(small(Background::Threads));
    assert_eq!(all(&engine, &mut engine.begin(), TREE).len(), 2000);
}

/// Random transactions, background work and ends of all kinds, against a plain map.
#[test]
fn it_agrees_with_a_plain_map_through_flushes_merges_crashes_and_lost_directories() {
    const JOBS: [Job; 7] = [
        Job::PrepareWal,
        Job::Freeze,
        Job::Flush,
        Job::UploadWal,
        Job::Publish,
        Job::Compact,
        Job::CollectGarbage,
    ];
    let mut worked = [false; JOBS.len()];
    let mut settings = manual();
    settings.shape.wal_segment_bytes = 32 << 10;
    for seed in 0..3 {
        let mut random = Random(seed);
        let mut place = Place::new();
        let mut model: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        for _life in 0..6 {
            let engine = place.open(settings.clone());
            assert_eq!(all(&engine, &mut engine.begin(), TREE), model, "seed {seed}");
            let mut reader = engine.begin();
            reader.snapshot_now();
            let then = model.clone();
            for _ in 0..random.below(300) {
                let mut txn = engine.begin();
                for _ in 0..=random.below(10) {
                    let key = format!("key {:04}", random.below(800)).into_bytes();
                    if random.below(4) == 0 {
                        txn.delete(TREE, &key).unwrap();
                        model.remove(&key);
                    } else {
                        let value = vec![b'a' + random.below(26) as u8; random.below(300) as usize];
                        txn.put(TREE, &key, &value).unwrap();
                        model.insert(key, value);
                    }
                }
                txn.commit().unwrap();
                let which = random.below(JOBS.len() as u64) as usize;
                if random.below(3) == 0 || JOBS[which] != Job::Freeze {
                    worked[which] |= engine.step(JOBS[which]).unwrap();
                }
            }
            assert_eq!(all(&engine, &mut reader, TREE), then, "an old snapshot, seed {seed}");
            assert_eq!(all(&engine, &mut engine.begin(), TREE), model, "seed {seed}");
            drop(reader);
            match random.below(3) {
                0 => drop(engine),
                1 => {
                    engine.close().unwrap();
                    drop(engine);
                    place.lose_data();
                }
                _ => {
                    engine.step(Job::Freeze).unwrap();
                    drain(&engine);
                    assert_eq!(all(&engine, &mut engine.begin(), TREE), model, "seed {seed}");
                    drop(engine);
                    place.lose_data();
                }
            }
        }
    }
    assert_eq!(worked, [true; JOBS.len()], "each of {JOBS:?} had something to do");
}

#[test]
fn writers_in_many_threads_lose_nothing_to_a_crash() {
    let place = Place::new();
    let acknowledged: Vec<Mutex<u64>> = (0..4).map(|_| Mutex::new(0)).collect();
    for _round in 0..3 {
        let engine = place.open(small(Background::Threads));
        for (writer, count) in acknowledged.iter().enumerate() {
            let found = engine
                .begin()
                .get(TREE, format!("count {writer}").as_bytes(), ReadAs::Newest, |v| {
                    String::from_utf8_lossy(v).parse()
                })
                .unwrap();
            assert_eq!(found.map_or(0, |n| n.expect("a number")), *count.lock(), "writer {writer}");
        }
        std::thread::scope(|scope| {
            for (writer, count) in acknowledged.iter().enumerate() {
                let engine = &engine;
                scope.spawn(move || {
                    for _ in 0..500 {
                        let mut count = count.lock();
                        let mut txn = engine.begin();
                        let filler = format!("{writer} {count} {}", "x".repeat(100));
                        txn.put(TREE, format!("row {writer} {count}").as_bytes(), filler.as_bytes())
                            .expect("fits");
                        let next = (*count + 1).to_string();
                        txn.put(TREE, format!("count {writer}").as_bytes(), next.as_bytes()).expect("fits");
                        txn.commit().expect("commits");
                        *count += 1;
                    }
                });
            }
        });
        assert!(status(&engine, "flushes") > 0, "small memtables fill up");
    }
    let engine = place.open(small(Background::Threads));
    assert_eq!(all(&engine, &mut engine.begin(), TREE).len(), 4 * 1500 + 4);
}

#[test]
fn one_sync_serves_many_commits() {
    let place = Place::new();
    let engine = place.open(Settings::default());
    std::thread::scope(|scope| {
        for writer in 0..16 {
            let engine = &engine;
            scope.spawn(move || {
                for n in 0..50 {
                    put(engine, &format!("{writer} {n}"), "").expect("commits");
                }
            });
        }
    });
    let (commits, syncs) = (status(&engine, "commits"), status(&engine, "wal_syncs"));
    assert_eq!(commits, 800);
    assert!(syncs < 600, "{syncs} syncs for {commits} commits of 16 threads");
}

#[test]
fn a_tree_id_that_a_commit_came_after_is_never_given_out_again() {
    let mut place = Place::new();
    let mut last = TreeId(0);
    for life in 0..6 {
        let engine = place.open(manual());
        let tree = engine.allocate_tree();
        assert!(tree > last, "life {life}");
        last = tree;
        // Its name stands in a value only, as in the catalogue.
        put(&engine, "tree", &tree.0.to_string()).unwrap();
        match life % 3 {
            0 => (),
            1 => engine.close().unwrap(),
            _ => {
                engine.step(Job::Freeze).unwrap();
                drain(&engine);
            }
        }
        drop(engine);
        if life % 3 > 0 {
            place.lose_data();
        }
    }
}

#[test]
fn a_dropped_tree_stays_dropped_and_its_objects_go_away() {
    let mut place = Place::new();
    let engine = place.open(manual());
    for round in 0..20 {
        let mut txn = engine.begin();
        for n in 0..50 {
            txn.put(TREE, format!("{round} {n}").as_bytes(), &[round; 200]).unwrap();
        }
        txn.commit().unwrap();
        engine.step(Job::Freeze).unwrap();
        drain(&engine);
    }
    assert!(status(&engine, "sst_bytes") > 5_000);
    let mut txn = engine.begin();
    txn.drop_tree(TREE);
    txn.commit().unwrap();
    assert_eq!(text(&engine), "");
    drop((txn, engine));
    let engine = place.open(manual());
    assert_eq!(text(&engine), "", "the drop is in the wal");
    engine.step(Job::Freeze).unwrap();
    drain(&engine);
    assert_eq!(status(&engine, "ssts"), 0);
    let objects = std::fs::read_dir(place.bucket.path().join("main/sst")).map_or(0, Iterator::count);
    assert_eq!(objects, 0, "nothing names them any more");
    drop(engine);
    place.lose_data();
    assert_eq!(text(&place.open(manual())), "");
}

#[test]
fn a_writer_that_another_one_followed_acknowledges_nothing_more_and_says_why() {
    let place = Place::new();
    let told = Arc::new(Mutex::new(Vec::new()));
    let hooks = {
        let told = Arc::clone(&told);
        Hooks { on_fatal: Arc::new(move |error| told.lock().push(error.to_string())), ..Hooks::default() }
    };
    let old = place.open(Settings { hooks, ..manual() });
    put(&old, "a", "1").unwrap();
    while old.step(Job::UploadWal).unwrap() {}
    let elsewhere = tempfile::tempdir().expect("a temporary directory");
    let new = open_at(elsewhere.path(), place.bucket(), manual()).unwrap();
    put(&new, "b", "2").unwrap();
    // The old one does not know yet; its commit is one of those that a takeover may lose.
    put(&old, "c", "3").unwrap();
    assert_eq!(old.step(Job::UploadWal).unwrap_err().kind(), Kind::Fenced);
    assert_eq!(put(&old, "d", "4").unwrap_err().kind(), Kind::Fenced);
    assert_eq!(old.step(Job::Publish).unwrap_err().kind(), Kind::Fenced);
    let told = told.lock();
    assert_eq!(told.len(), 1);
    assert!(told[0].contains("epoch 2"), "{}", told[0]);
    assert_eq!(text(&new), "a=1 b=2");
    while new.step(Job::UploadWal).unwrap() {}
    drop((old, new));
    let engine = place.open(manual());
    assert_eq!(text(&engine), "a=1 b=2");
    assert_eq!(status(&engine, "wals_set_aside"), 1, "what only the old one's disk had is kept");
}

#[test]
fn slices_go_up_from_start_to_start_so_that_a_slow_bucket_adds_its_delay_once() {
    let place = Place::new();
    let (step, clock) = (Duration::from_millis(300), SystemClock::default());
    let faulty = FaultyBucket::new(place.bucket(), 1, Vec::new())
        .with_pause(Arc::new(move |_| SystemClock::default().sleep(step)));
    let faulty = Arc::new(faulty);
    // No flush takes slices away.
    let settings =
        Settings { wal_upload_interval: step, memtable_bytes: 64 << 20, ..small(Background::Threads) };
    let engine = open_at(place.data.path(), Arc::clone(&faulty) as _, settings).expect("it opens");
    let latency = Effect::Latency { p50: step, p99: step };
    faulty.faults().set_rules(vec![Rule::new("*/wal/*", latency).on(Operation::Put)]);
    let (start, first) = (clock.now(), status(&engine, "wal_slices"));
    while status(&engine, "wal_slices") < first + 8 {
        put(&engine, "a", "1").expect("it commits");
    }
    // A pause after each upload would make it sixteen steps.
    let took = clock.now() - start;
    assert!(took < 14 * step, "{took:?}");
    assert!(status(&engine, "wal_upload_ms_max") >= 300);
}

/// A clock that can be set forward, as a process sees it that was stopped for a while.
#[derive(Default)]
struct JumpingClock(SystemClock, AtomicU64);

impl Clock for JumpingClock {
    fn now(&self) -> Duration {
        self.0.now() + Duration::from_secs(self.1.load(Ordering::Relaxed))
    }
    fn sleep(&self, pause: Duration) {
        self.0.sleep(pause);
    }
}

#[test]
fn a_writer_that_slept_looks_for_newer_claims_before_it_acknowledges_anything() {
    let memory = Arc::new(MemoryBucket::new());
    // It has no other reason to write to the bucket.
    let settings =
        || Settings { wal_upload_interval: Duration::from_secs(3600), ..small(Background::Threads) };
    for taken_over in [false, true] {
        let (data, clock) = (tempfile::tempdir().expect("a directory"), Arc::new(JumpingClock::default()));
        let faulty = Arc::new(FaultyBucket::new(memory.clone(), 1, Vec::new()));
        let disk = Arc::new(RealDisk::open(data.path()).expect("a disk"));
        let parts = Parts { bucket: faulty.clone(), disk, clock: clock.clone(), seed: 7 };
        let older = Engine::open(parts, settings()).expect("it opens");
        put(&older, "a", "1").expect("nobody else is there");
        let other = tempfile::tempdir().expect("a directory");
        let newer = taken_over.then(|| open_at(other.path(), memory.clone(), settings()).expect("it opens"));
        clock.1.fetch_add(60, Ordering::Relaxed);
        let answer = put(&older, "b", "2");
        if taken_over {
            let error = answer.expect_err("it slept through the other's claim");
            assert_eq!(error.kind(), Kind::Fenced, "{error}");
        } else {
            answer.expect("it is still the newest");
            // An outage stops no commits, not even after a sleep.
            faulty.faults().set_rules(vec![Rule::outage()]);
            clock.1.fetch_add(60, Ordering::Relaxed);
            put(&older, "c", "3").expect("the bucket does not answer, and that is no claim");
        }
        drop(newer);
    }
}

#[test]
fn an_outage_of_the_bucket_stops_nobody_until_the_limit_and_loses_nothing() {
    let place = Place::new();
    let faulty = Arc::new(FaultyBucket::new(place.bucket(), 1, Vec::new()).with_tries(1));
    let settings = Settings { unuploaded_bytes_max: 300 << 10, ..manual() };
    let engine = open_at(place.data.path(), Arc::clone(&faulty) as _, settings.clone()).unwrap();
    faulty.faults().set_rules(vec![Rule::outage()]);
    let mut acknowledged = 0;
    let error = loop {
        match put(&engine, &format!("{acknowledged:06}"), &"x".repeat(1000)) {
            Ok(()) => acknowledged += 1,
            Err(error) => break error,
        }
        assert!(acknowledged < 10_000, "the limit is never reached");
        engine.step(Job::Flush).unwrap();
        let error = engine.step(Job::UploadWal).expect_err("the bucket is away");
        assert_eq!(error.kind(), Kind::Unavailable);
        let published = engine.step(Job::Publish);
        assert!(matches!(&published, Ok(false)) || published.is_err_and(|e| e.kind() == Kind::Unavailable));
    };
    assert_eq!(error.kind(), Kind::Full);
    assert!(acknowledged > 100, "{acknowledged} commits before the limit");
    faulty.faults().set_rules(Vec::new());
    drain(&engine);
    put(&engine, "zzz", "").expect("there is room again");
    drop(engine);
    let engine = open_at(place.data.path(), faulty, settings).unwrap();
    assert_eq!(all(&engine, &mut engine.begin(), TREE).len(), acknowledged + 1);
}

/// A clock that stands still and counts who sleeps.
#[derive(Default)]
struct CountingClock {
    time: Mutex<Duration>,
    sleeps: AtomicU64,
}

impl Clock for CountingClock {
    fn now(&self) -> Duration {
        *self.time.lock()
    }
    fn sleep(&self, pause: Duration) {
        self.sleeps.fetch_add(1, Ordering::Relaxed);
        *self.time.lock() += pause;
    }
}

/// Ten minutes of simulated time and more, a hundred commits a second, every kind of background work tried each second, as its threads
/// would. From the first commit to the one that meets the limit none asks the bucket or sleeps.
#[test]
fn an_outage_of_ten_minutes_is_felt_by_no_commit_before_the_limit() {
    let clock = Arc::new(CountingClock::default());
    let (disk, memory) = (SimDisk::new(8), Arc::new(MemoryBucket::new()));
    let faulty = Arc::new(FaultyBucket::new(Arc::clone(&memory) as _, 1, Vec::new()).with_tries(1));
    let own = Parts {
        bucket: Arc::clone(&faulty) as _,
        clock: Arc::clone(&clock) as _,
        ..parts(memory.clone(), &disk)
    };
    let shape = Shape { sst_bytes: 256 << 10, level_base_bytes: 1 << 20, ..Shape::default() };
    let settings = Settings { memtable_bytes: 1 << 20, unuploaded_bytes_max: 50 << 20, shape, ..manual() };
    let engine = Engine::open(own, settings).unwrap();
    faulty.faults().set_rules(vec![Rule::outage()]);
    let mut random = Random(3);
    let mut model = BTreeMap::new();
    let (mut seconds, mut full) = (0, false);
    while !full {
        for _ in 0..100 {
            let key = format!("{:05}", random.below(30_000)).into_bytes();
            let value: String = (0..300).map(|_| char::from(b'!' + random.below(90) as u8)).collect();
            let mut txn = engine.begin();
            txn.put(TREE, &key, value.as_bytes()).unwrap();
            let waits = || (faulty.faults().requests(), clock.sleeps.load(Ordering::Relaxed));
            let before = waits();
            let committed = txn.commit();
            assert_eq!(waits(), before, "a commit asked the bucket or slept, {seconds} s into the outage");
            match committed {
                Ok(_) => _ = model.insert(key, value.into_bytes()),
                Err(error) => {
                    assert_eq!(error.kind(), Kind::Full, "{error}");
                    full = true;
                    break;
                }
            }
        }
        for job in BACKGROUND_JOBS {
            while matches!(engine.step(job), Ok(true)) {}
        }
        *clock.time.lock() += Duration::from_secs(1);
        seconds += 1;
        assert!(seconds < 2000, "the limit is never met");
    }
    assert!(seconds > 600, "the limit was met after {seconds} s already");
    assert_eq!(status(&engine, "writes_delayed"), 1, "the commit that was refused");
    assert!(status(&engine, "compactions") > 0 && status(&engine, "edits_queued") == 2);
    faulty.faults().set_rules(Vec::new());
    drain(&engine);
    drop(engine);
    let engine = Engine::open(parts(memory.clone(), &SimDisk::new(9)), manual()).unwrap();
    assert_eq!(all(&engine, &mut engine.begin(), TREE), model);
}

/// What a merge writes during an outage only adds to what waits, so beyond half of the limit the rest is left to writers.
#[test]
fn merges_pause_in_an_outage_and_go_on_after_it() {
    let place = Place::new();
    let faulty = Arc::new(FaultyBucket::new(place.bucket(), 1, Vec::new()).with_tries(1));
    let limit = 2 << 20;
    let settings = Settings { unuploaded_bytes_max: limit, ..manual() };
    let engine = open_at(place.data.path(), Arc::clone(&faulty) as _, settings).unwrap();
    faulty.faults().set_rules(vec![Rule::outage()]);
    let mut random = Random(7);
    let (mut merged_beyond_half, mut runs_most) = (0, 0);
    let error = loop {
        let value: String = (0..1000).map(|_| char::from(b'!' + random.below(90) as u8)).collect();
        if let Err(error) = put(&engine, &format!("{:06}", random.below(100_000)), &value) {
            break error;
        }
        engine.step(Job::Flush).unwrap();
        loop {
            let waiting = status(&engine, "unuploaded_bytes") + status(&engine, "wal_unuploaded_bytes");
            // So many that writers would be slowed are merged all the same.
            let runs = status(&engine, "l0_runs");
            if !engine.step(Job::Compact).unwrap() {
                break;
            }
            merged_beyond_half += u64::from(waiting > limit / 2 && runs < 8);
        }
        runs_most = runs_most.max(status(&engine, "l0_runs"));
    };
    assert_eq!(error.kind(), Kind::Full);
    assert_eq!(merged_beyond_half, 0);
    let merges = status(&engine, "compactions");
    assert!(merges > 0 && (5..9).contains(&runs_most), "{merges} merges, {runs_most} runs waited at most");
    faulty.faults().set_rules(Vec::new());
    drain(&engine);
    assert!(status(&engine, "l0_runs") < 4);
}

/// Rows, flushes and merges while the bucket is away. What is committed is in `model`.
fn write_through_an_outage(engine: &Arc<Engine>, rows: u64, model: &mut BTreeMap<Vec<u8>, Vec<u8>>) {
    let mut random = Random(rows);
    for _ in 0..rows {
        let mut txn = engine.begin();
        let key = format!("{:04}", random.below(1000)).into_bytes();
        let value: String = (0..300).map(|_| char::from(b'!' + random.below(90) as u8)).collect();
        txn.put(TREE, &key, value.as_bytes()).expect("puts");
        txn.commit().expect("commits");
        model.insert(key, value.into_bytes());
        engine.step(Job::Flush).expect("needs no bucket");
        while engine.step(Job::Compact).expect("needs no bucket") {}
        if random.below(50) == 0 {
            // The edit that is tried now may be on its way for ever, and stays as it is.
            _ = engine.step(Job::Publish);
        }
    }
}

#[test]
fn an_outage_leaves_two_edits_however_long_it_was_and_sends_only_what_is_still_needed() {
    let place = Place::new();
    let memory = Arc::new(MemoryBucket::new());
    let faulty = Arc::new(FaultyBucket::new(Arc::clone(&memory) as _, 1, Vec::new()).with_tries(1));
    let engine = open_at(place.data.path(), Arc::clone(&faulty) as _, manual()).unwrap();
    faulty.faults().set_rules(vec![Rule::outage()]);
    let mut model = BTreeMap::new();
    write_through_an_outage(&engine, 4000, &mut model);
    let (flushes, merges) = (status(&engine, "flushes"), status(&engine, "compactions"));
    assert!(flushes >= 6 && merges >= 2, "{flushes} flushes and {merges} merges");
    assert_eq!(status(&engine, "edits_queued"), 2, "the one that may have been sent, and one for all others");
    let mut txn = engine.begin();
    let (waiting, tree) = (status(&engine, "unuploaded_bytes"), status(&engine, "sst_bytes"));
    assert!(
        waiting < tree + (200 << 10),
        "what was merged away before its upload makes room: {waiting} bytes wait, {tree} are in the tree"
    );
    faulty.faults().set_rules(Vec::new());
    let before = status(&engine, "edits_published");
    let mut sent = 0;
    while engine.step(Job::Publish).unwrap() {
        sent += 1;
    }
    assert_eq!(status(&engine, "edits_published") - before, 2);
    assert!(status(&engine, "ssts_uploaded") <= sent);
    assert_eq!(all(&engine, &mut txn, TREE), model);
    drop(txn);
    engine.step(Job::Freeze).unwrap();
    drain(&engine);
    let ssts = memory.contents().into_keys().filter(|name| name.as_str().contains("/sst/")).count();
    assert_eq!(ssts as u64, status(&engine, "ssts"), "nothing is left over in the bucket");
    drop(engine);
    let elsewhere = Place::new();
    let engine = open_at(elsewhere.data.path(), memory as _, manual()).unwrap();
    assert_eq!(all(&engine, &mut engine.begin(), TREE), model, "the bucket alone has everything");
}

/// The machine dies at each step of sending what an outage left, with the answer to its last request lost.
#[test]
fn a_crash_anywhere_while_the_edits_of_an_outage_are_sent_loses_nothing() {
    let mut step = 0;
    let mut over = false;
    while !over {
        let (disk, memory) = (SimDisk::new(step), Arc::new(MemoryBucket::new()));
        let faulty = Arc::new(FaultyBucket::new(Arc::clone(&memory) as _, 1, Vec::new()).with_tries(1));
        let own = Parts { bucket: Arc::clone(&faulty) as _, ..parts(memory.clone(), &disk) };
        let engine = Engine::open(own, manual()).unwrap();
        faulty.faults().set_rules(vec![Rule::outage()]);
        let mut model = BTreeMap::new();
        write_through_an_outage(&engine, 1500, &mut model);
        faulty.faults().set_rules(Vec::new());
        while engine.step(Job::UploadWal).unwrap() {}
        for _ in 0..step {
            engine.step(Job::Publish).unwrap();
        }
        faulty.faults().set_rules(vec![Rule::lost_answer("*")]);
        over = matches!(engine.step(Job::Publish), Ok(false));
        // More is written and merged before the end, so that the edit that was sent is not the newest.
        _ = engine.step(Job::Freeze);
        _ = engine.step(Job::Flush);
        _ = engine.step(Job::Compact);
        drop(engine);
        for disk in [disk, SimDisk::new(step + 1)] {
            let engine = Engine::open(parts(memory.clone(), &disk), manual()).unwrap();
            assert_eq!(all(&engine, &mut engine.begin(), TREE), model, "a crash at step {step}");
            drain(&engine);
            assert_eq!(all(&engine, &mut engine.begin(), TREE), model, "after a crash at step {step}");
        }
        step += 1;
    }
    assert!(step > 5, "{step} steps send everything");
}

/// A byte rots in the local wal before it is uploaded. What it said is in memory still.
#[test]
fn rot_in_the_wal_before_its_upload_is_told_and_passed_by_a_flush() {
    let (bucket, disk) = (Arc::new(MemoryBucket::new()), SimDisk::new(3));
    let open =
        |disk: &SimDisk| Engine::open(parts(bucket.clone(), disk), manual()).expect("the engine opens");
    let engine = open(&disk);
    put(&engine, "a", "1").unwrap();
    assert!(engine.step(Job::UploadWal).unwrap());
    put(&engine, "b", "the byte that rots: ~").unwrap();
    put(&engine, "c", "3").unwrap();
    for name in disk.list("wal").unwrap() {
        disk.tamper(&name, |bytes| {
            if let Some(rots) = bytes.iter().position(|byte| *byte == b'~') {
                bytes[rots] ^= 1;
            }
        });
    }
    for _ in 0..3 {
        engine.step(Job::UploadWal).expect("it is reported and dealt with, not passed on for ever");
    }
    assert_eq!(status(&engine, "wal_damages"), 1);
    assert!(engine.step(Job::Flush).unwrap(), "what memory has of it is flushed");
    put(&engine, "d", "4").unwrap();
    drain(&engine);
    put(&engine, "e", "5").unwrap();
    assert!(engine.step(Job::UploadWal).unwrap(), "the upload has gone on behind the damage");
    assert_eq!((status(&engine, "wal_damages"), status(&engine, "wal_unuploaded_bytes")), (1, 0));
    drop(engine);
    for disk in [disk.crash(), SimDisk::new(4)] {
        let engine = open(&disk);
        assert_eq!(text(&engine), "a=1 b=the byte that rots: ~ c=3 d=4 e=5");
    }
}

/// Segments that were allocated ahead, or hold only what is flushed, are room for a start.
#[test]
fn a_start_finds_room_on_a_full_disk_where_the_wal_holds_nothing() {
    let bucket = Arc::new(MemoryBucket::new());
    let open = |disk: &SimDisk| {
        let mut settings = manual();
        settings.shape.wal_segment_bytes = 64 << 10;
        Engine::open(parts(bucket.clone(), disk), settings)
    };
    // What is nowhere else has to be copied, which takes as much again.
    for (uploaded, most) in [(false, 40), (true, 300)] {
        for rows in [1, 20, 40, 300].into_iter().filter(|rows| *rows <= most) {
            let disk = SimDisk::new(3);
            let engine = open(&disk).expect("an empty disk");
            let before = all(&engine, &mut engine.begin(), TREE).len();
            for row in 0..rows {
                put(&engine, &format!("{uploaded} {rows} {row}"), &"x".repeat(1000)).unwrap();
            }
            if uploaded {
                drain(&engine);
            }
            put(&engine, &format!("{uploaded} {rows} last"), "acknowledged, and only here").unwrap();
            while engine.step(Job::PrepareWal).unwrap() {}
            drop(engine);
            let disk = disk.kill();
            disk.limit(disk.used());
            let engine = open(&disk).expect("there is room where nothing is");
            assert_eq!(all(&engine, &mut engine.begin(), TREE).len(), before + rows + 1);
            // Somewhat later the disk has room again.
            disk.limit(u64::MAX);
            drain(&engine);
        }
    }
}

#[test]
fn an_old_snapshot_reads_the_same_while_everything_under_it_is_merged_away() {
    let place = Place::new();
    let engine = place.open(small(Background::Threads));
    for n in 0..500 {
        put(&engine, &format!("{n:04}"), "old").unwrap();
    }
    let mut reader = engine.begin();
    reader.snapshot_now();
    for round in 0..4 {
        for n in 0..500 {
            let mut txn = engine.begin();
            match (n + round) % 3 {
                0 => txn.delete(TREE, format!("{n:04}").as_bytes()).unwrap(),
                _ => txn.put(TREE, format!("{n:04}").as_bytes(), &[b'n'; 100]).unwrap(),
            }
            txn.commit().unwrap();
        }
        let seen = all(&engine, &mut reader, TREE);
        assert!(seen.len() == 500 && seen.values().all(|value| value == b"old"), "round {round}");
    }
    assert!(status(&engine, "flushes") > 2);
}

#[test]
fn nothing_is_asked_of_the_bucket_while_nothing_happens() {
    let place = Place::new();
    let engine = place.open(small(Background::Threads));
    for n in 0..3000 {
        put(&engine, &format!("{n:05}"), &"x".repeat(100)).unwrap();
    }
    let requests = || {
        let names = ["put", "get", "head", "list", "delete"];
        names.iter().map(|name| status(&engine, &format!("bucket_{name}_requests"))).sum::<u64>()
    };
    let settled = || {
        let before = requests();
        std::thread::yield_now();
        let pause = std::sync::mpsc::channel::<()>();
        assert!(pause.1.recv_timeout(Duration::from_millis(700)).is_err());
        requests() == before
    };
    assert!((0..40).any(|_| settled()), "the engine never comes to rest");
    assert!(settled() && settled());
}

/// Transfers between accounts, in threads, over memtables so small that one is frozen every few commits.
#[test]
fn every_snapshot_shows_whole_transactions_whatever_is_flushed_and_merged_meanwhile() {
    const ACCOUNTS: u64 = 40;
    const EACH: u64 = 1000;
    let place = Place::new();
    let engine = place.open(Settings { memtable_bytes: 16 << 10, ..small(Background::Threads) });
    let name = |n: u64| format!("account {n:03}").into_bytes();
    let mut txn = engine.begin();
    for n in 0..ACCOUNTS {
        txn.put(TREE, &name(n), &EACH.to_le_bytes()).unwrap();
    }
    txn.commit().unwrap();
    let number = |value: &[u8]| u64::from_le_bytes(value.try_into().expect("eight bytes"));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for reader in 0..2 {
            let (engine, over) = (&engine, &over);
            scope.spawn(move || {
                let mut txn = engine.begin();
                let mut snapshots = 0;
                while !over.load(Ordering::Relaxed) || snapshots < 20 {
                    txn.snapshot_now();
                    for _ in 0..3 {
                        let sum: u64 = if reader == 0 {
                            all(engine, &mut txn, TREE).values().map(|value| number(value)).sum()
                        } else {
                            let get = |n| txn.get(TREE, &name(n), ReadAs::Snapshot, number).expect("reads");
                            (0..ACCOUNTS).map(get).map(|found| found.expect("an account stays")).sum()
                        };
                        assert_eq!(sum, ACCOUNTS * EACH);
                    }
                    txn.rollback();
                    snapshots += 1;
                }
            });
        }
        let writers: Vec<_> = (0..3)
            .map(|writer| {
                let engine = &engine;
                scope.spawn(move || {
                    let wait = LockWait { timeout: Duration::from_secs(60), interrupted: &|| false };
                    let mut random = Random(writer);
                    let mut txn = engine.begin();
                    let mut done = 0;
                    while done < 700 {
                        let (from, to) = (random.below(ACCOUNTS), random.below(ACCOUNTS));
                        let mut transfer = || -> Result<()> {
                            for (account, minus, plus) in [(from, 1, 0), (to, 0, 1)] {
                                txn.lock(TREE, &name(account), LockMode::Exclusive, &wait)?;
                                let has = txn.get(TREE, &name(account), ReadAs::Newest, number)?;
                                let has = has.expect("an account stays") + EACH;
                                txn.put(TREE, &name(account), &(has - minus + plus - EACH).to_le_bytes())?;
                            }
                            txn.commit().map(drop)
                        };
                        match transfer() {
                            Ok(()) => done += 1,
                            Err(error) => {
                                assert_eq!(error.kind(), Kind::Deadlock, "{error}");
                                txn.rollback();
                            }
                        }
                    }
                })
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().expect("a writer does not panic"));
        over.store(true, Ordering::Relaxed);
    });
    assert!(status(&engine, "flushes") > 5 && status(&engine, "compactions") > 0);
}

#[test]
fn a_restart_after_a_long_outage_writes_what_it_replays_to_ssts_and_keeps_it_through_another_crash() {
    let place = Place::new();
    let faulty = Arc::new(FaultyBucket::new(place.bucket(), 1, Vec::new()).with_tries(1));
    let engine = open_at(place.data.path(), Arc::clone(&faulty) as _, manual()).unwrap();
    faulty.faults().set_rules(vec![Rule::outage()]);
    for n in 0..2000 {
        let mut txn = engine.begin();
        txn.put(TREE, format!("{:04}", n % 1500).as_bytes(), format!("{n} {}", "x".repeat(300)).as_bytes())
            .unwrap();
        if n == 900 {
            txn.put(TreeId(8), b"gone", b"").unwrap();
        }
        if n == 1000 {
            txn.drop_tree(TreeId(8));
        }
        txn.commit().unwrap();
        engine.step(Job::Flush).unwrap();
    }
    let before = all(&engine, &mut engine.begin(), TREE);
    assert!(status(&engine, "flushes") > 8);
    drop(engine);
    faulty.faults().set_rules(Vec::new());
    for published in [0, 3, 100] {
        let engine = open_at(place.data.path(), Arc::clone(&faulty) as _, manual()).unwrap();
        assert!(status(&engine, "memtables_frozen") < 4);
        assert!(status(&engine, "l0_runs") > 0, "what did not fit is in ssts");
        assert_eq!(all(&engine, &mut engine.begin(), TREE), before);
        assert_eq!(all(&engine, &mut engine.begin(), TreeId(8)).len(), 0);
        for _ in 0..published {
            engine.step(Job::Publish).unwrap();
        }
    }
    let engine = open_at(place.data.path(), Arc::clone(&faulty) as _, manual()).unwrap();
    engine.step(Job::Freeze).unwrap();
    drain(&engine);
    assert_eq!(all(&engine, &mut engine.begin(), TREE), before);
}

/// A disk on which a flush meets a bug of ours.
struct Treacherous(SimDisk);

impl Disk for Treacherous {
    fn create(&self, name: &str) -> std::result::Result<Arc<dyn DiskFile>, DiskError> {
        assert!(!name.starts_with("sst/"), "planted");
        self.0.create(name)
    }
    fn open(&self, name: &str) -> std::result::Result<Arc<dyn DiskFile>, DiskError> {
        self.0.open(name)
    }
    fn open_log(&self, name: &str) -> std::result::Result<Arc<dyn DiskFile>, DiskError> {
        self.0.open_log(name)
    }
    fn rename(&self, from: &str, to: &str) -> std::result::Result<(), DiskError> {
        self.0.rename(from, to)
    }
    fn remove(&self, name: &str) -> std::result::Result<(), DiskError> {
        self.0.remove(name)
    }
    fn list(&self, directory: &str) -> std::result::Result<Vec<String>, DiskError> {
        self.0.list(directory)
    }
    fn sync_directory(&self, directory: &str) -> std::result::Result<(), DiskError> {
        self.0.sync_directory(directory)
    }
}

#[test]
fn a_panic_in_a_background_thread_is_told_and_stops_the_engine() {
    let (tell, told) = std::sync::mpsc::channel();
    let tell = Mutex::new(tell);
    let on_fatal = move |error: &engine::Error| tell.lock().send(error.to_string()).unwrap();
    let hooks = Hooks { on_fatal: Arc::new(on_fatal), ..Hooks::default() };
    let parts = parts_on(Arc::new(MemoryBucket::new()), Arc::new(Treacherous(SimDisk::new(1))));
    let engine = Engine::open(parts, Settings { hooks, ..small(Background::Threads) }).unwrap();
    let error = (0..1_000_000).find_map(|n| put(&engine, &format!("{n}"), &"x".repeat(1000)).err());
    assert_eq!(error.expect("the engine stops").kind(), Kind::Failed);
    // A commit may learn of it a moment before the hook is called.
    let message = told.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!(message.contains("flush") && message.contains("planted"), "{message}");
    assert_eq!(told.recv_timeout(Duration::from_millis(50)).ok(), None, "it is told once");
}
