//! Row locks go before the sync (docs/decisions/0005): what others may do and see between, and what a crash there leaves.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

use bucket::{Bucket, MemoryBucket};
use common::parts_on;
use engine::{
    Cursor, Disk, DiskError, DiskFault, DiskFile, Engine, Isolation, Kind, Loaded, LockMode, LockWait,
    ReadAs, Result, Seqno, Settings, SimDisk, TreeId, Txn,
};
use parking_lot::{Condvar, Mutex};

const TREE: TreeId = TreeId(7);
const OTHER: TreeId = TreeId(8);
const LONG: LockWait<'static> = LockWait { timeout: Duration::from_secs(50), interrupted: &|| false };

/// Holds up the syncs of the wal.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    closed: bool,
    /// Syncs that may pass all the same.
    permits: u64,
    waiting: u64,
    /// How long each takes.
    pause: Duration,
}

impl Gate {
    fn close(&self) {
        self.state.lock().closed = true;
    }
    fn open(&self) {
        self.state.lock().closed = false;
        self.changed.notify_all();
    }
    fn let_one_pass(&self) {
        self.state.lock().permits += 1;
        self.changed.notify_all();
    }
    fn wait_for_a_sync(&self) {
        let mut state = self.state.lock();
        while state.waiting == 0 || state.permits > 0 {
            self.changed.wait(&mut state);
        }
    }
    fn pass(&self) {
        let mut state = self.state.lock();
        let pause = state.pause;
        if pause > Duration::ZERO {
            self.changed.wait_for(&mut state, pause);
        }
        state.waiting += 1;
        self.changed.notify_all();
        while state.closed && state.permits == 0 {
            self.changed.wait(&mut state);
        }
        state.waiting -= 1;
        state.permits = state.permits.saturating_sub(1);
        self.changed.notify_all();
    }
}

#[derive(Clone)]
struct GatedDisk {
    disk: SimDisk,
    gate: Arc<Gate>,
}

struct GatedFile {
    file: Arc<dyn DiskFile>,
    gate: Arc<Gate>,
}

type DiskResult<T> = std::result::Result<T, DiskError>;

impl Disk for GatedDisk {
    fn create(&self, name: &str) -> DiskResult<Arc<dyn DiskFile>> {
        self.disk.create(name)
    }
    fn open(&self, name: &str) -> DiskResult<Arc<dyn DiskFile>> {
        self.disk.open(name)
    }
    fn open_log(&self, name: &str) -> DiskResult<Arc<dyn DiskFile>> {
        let gate = Arc::clone(&self.gate);
        Ok(Arc::new(GatedFile { file: self.disk.open_log(name)?, gate }))
    }
    fn rename(&self, from: &str, to: &str) -> DiskResult<()> {
        self.disk.rename(from, to)
    }
    fn remove(&self, name: &str) -> DiskResult<()> {
        self.disk.remove(name)
    }
    fn list(&self, directory: &str) -> DiskResult<Vec<String>> {
        self.disk.list(directory)
    }
    fn sync_directory(&self, directory: &str) -> DiskResult<()> {
        self.disk.sync_directory(directory)
    }
}

impl DiskFile for GatedFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> DiskResult<()> {
        self.file.write_at(offset, bytes)
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> DiskResult<()> {
        self.file.read_at(offset, buffer)
    }
    fn sync(&self) -> DiskResult<()> {
        self.gate.pass();
        self.file.sync()
    }
    fn len(&self) -> DiskResult<u64> {
        self.file.len()
    }
    fn set_len(&self, bytes: u64) -> DiskResult<()> {
        self.file.set_len(bytes)
    }
    fn allocate(&self, bytes: u64) -> DiskResult<()> {
        self.file.allocate(bytes)
    }
}

fn open(disk: &SimDisk, gate: &Arc<Gate>, bucket: &Arc<dyn Bucket>, memtable_bytes: usize) -> Arc<Engine> {
    let disk = GatedDisk { disk: disk.clone(), gate: Arc::clone(gate) };
    let parts = parts_on(Arc::clone(bucket), Arc::new(disk));
    Engine::open(parts, Settings { memtable_bytes, ..Settings::default() }).expect("the engine opens")
}

fn open_fresh(memtable_bytes: usize) -> (Arc<Engine>, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let bucket: Arc<dyn Bucket> = Arc::new(MemoryBucket::new());
    (open(&SimDisk::new(1), &gate, &bucket, memtable_bytes), gate)
}

fn get(txn: &mut Txn, key: &str, read: ReadAs) -> Option<String> {
    let text = |value: &[u8]| String::from_utf8(value.to_vec()).expect("text");
    txn.get(TREE, key.as_bytes(), read, text).expect("reads")
}

fn lock(txn: &mut Txn, key: &str) -> Result<()> {
    txn.lock(TREE, key.as_bytes(), LockMode::Exclusive, &LONG).map(drop)
}

fn put(engine: &Arc<Engine>, key: &str, value: &str) -> Result<Seqno> {
    put_in(engine, TREE, key, value)
}

fn put_in(engine: &Arc<Engine>, tree: TreeId, key: &str, value: &str) -> Result<Seqno> {
    let mut txn = engine.begin();
    txn.lock(tree, key.as_bytes(), LockMode::Exclusive, &LONG)?;
    txn.put(tree, key.as_bytes(), value.as_bytes())?;
    txn.commit()
}

fn loaded(engine: &Arc<Engine>) -> Loaded {
    let mut load = engine.load(OTHER).expect("nothing is there");
    load.put(b"a", b"loaded").expect("ascends");
    load.finish().expect("the bucket answers")
}

/// Something that goes on in a thread.
struct Task<'s, T> {
    thread: ScopedJoinHandle<'s, T>,
    over: Receiver<()>,
}

fn start<'s, 'e, T: Send + 's>(
    scope: &'s Scope<'s, 'e>,
    work: impl FnOnce() -> T + Send + 's,
) -> Task<'s, T> {
    let (says, over) = channel();
    let thread = scope.spawn(move || {
        let result = work();
        drop(says);
        result
    });
    Task { thread, over }
}

impl<T> Task<'_, T> {
    /// It waits, as far as one can see.
    fn waits(&self) {
        let heard = self.over.recv_timeout(Duration::from_millis(50));
        assert_eq!(heard, Err(RecvTimeoutError::Timeout), "it did not wait for the sync");
    }
    fn ends(self) -> T {
        self.thread.join().expect("it does not panic")
    }
}

#[test]
fn a_row_is_free_before_the_sync_and_nobody_is_told_of_it_before() {
    let (engine, gate) = open_fresh(1 << 20);
    put(&engine, "a", "0").expect("commits");
    let mut too_late = engine.begin();
    too_late.add_loaded(loaded(&engine)).expect("nothing is there");
    put_in(&engine, OTHER, "b", "not by the load").expect("commits");
    let mut old = engine.begin();
    assert_eq!(get(&mut old, "a", ReadAs::Snapshot).as_deref(), Some("0"));
    gate.close();
    std::thread::scope(|scope| {
        let first = start(scope, || put(&engine, "a", "1"));
        gate.wait_for_a_sync();
        let mut second = engine.begin();
        lock(&mut second, "a").expect("free while the first one syncs");
        assert_eq!(get(&mut second, "a", ReadAs::Newest).as_deref(), Some("1"));
        second.put(TREE, b"a", b"2").expect("fits");
        let second = start(scope, move || second.commit());
        second.waits();

        // Nothing is visible, and whoever has read it does not get away before it is.
        assert_eq!(get(&mut engine.begin(), "a", ReadAs::Snapshot).as_deref(), Some("0"));
        let read_only = start(scope, || {
            let mut txn = engine.begin();
            lock(&mut txn, "a").expect("free");
            let value = get(&mut txn, "a", ReadAs::Newest);
            txn.commit().map(|_| value)
        });
        let refused = start(scope, move || {
            assert_eq!(lock(&mut old, "a").expect_err("it changed").kind(), Kind::Conflict);
            old.rollback();
            // The next try is not refused for the same commit.
            let value = get(&mut old, "a", ReadAs::Snapshot);
            lock(&mut old, "a").map(|()| value)
        });
        let reads_on = [Isolation::RepeatableRead, Isolation::ReadCommitted].map(|isolation| {
            let mut txn = engine.begin();
            txn.set_isolation(isolation);
            txn.lock(TREE, b"a", LockMode::Shared, &LONG).expect("free");
            for read in [ReadAs::Newest, ReadAs::Snapshot] {
                assert_eq!(
                    get(&mut txn, "a", read).as_deref(),
                    Some("2"),
                    "one snapshot, under the lock or not"
                );
            }
            start(scope, move || txn.commit())
        });
        let settles = start(scope, || {
            let mut txn = engine.begin();
            assert_eq!(get(&mut txn, "a", ReadAs::Newest).as_deref(), Some("2"));
            txn.commit_and(|settled| assert!(settled.is_ok()))
        });
        let fails = start(scope, || {
            lock(&mut too_late, "a").expect("free");
            too_late.commit().expect_err("its tree was written to").kind()
        });
        let reads = start(scope, || get(&mut engine.begin(), "a", ReadAs::Newest));
        let scans = start(scope, || {
            let mut txn = engine.begin();
            let mut cursor = Cursor::new(&engine);
            cursor.open(&mut txn, TREE, ReadAs::Newest).expect("opens");
            assert!(cursor.seek_first(&mut txn).expect("seeks"));
            let value = cursor.value().to_vec();
            drop(txn);
            value
        });
        read_only.waits();
        refused.waits();
        settles.waits();
        fails.waits();
        reads.waits();
        scans.waits();
        reads_on.iter().for_each(Task::waits);
        first.waits();
        second.waits();
        gate.open();
        let (first, second) = (first.ends().expect("commits"), second.ends().expect("commits"));
        assert!(first < second);
        assert_eq!(read_only.ends().expect("commits").as_deref(), Some("2"));
        assert_eq!(refused.ends().expect("locks").as_deref(), Some("2"));
        assert!(settles.ends().expect("commits") >= second);
        assert_eq!(fails.ends(), Kind::BadRequest);
        assert_eq!(reads.ends().as_deref(), Some("2"));
        assert_eq!(scans.ends(), b"2");
        for reads_on in reads_on {
            assert!(reads_on.ends().expect("commits") >= second);
        }
        assert_eq!(get(&mut engine.begin(), "a", ReadAs::Snapshot).as_deref(), Some("2"));
    });
}

#[test]
fn a_snapshot_that_shows_more_than_the_lock_did_is_waited_for() {
    let (engine, gate) = open_fresh(1 << 20);
    put(&engine, "a", "0").expect("commits");
    gate.close();
    std::thread::scope(|scope| {
        let first = start(scope, || put(&engine, "a", "1"));
        gate.wait_for_a_sync();
        let mut reader = engine.begin();
        lock(&mut reader, "b").expect("free");
        let second = start(scope, || put(&engine, "a", "2"));
        // Its end would wait for the sync.
        let mut watcher = engine.begin();
        while get(&mut watcher, "a", ReadAs::Newest).as_deref() != Some("2") {
            std::thread::yield_now();
        }
        assert_eq!(get(&mut reader, "a", ReadAs::Snapshot).as_deref(), Some("2"));
        let reader = start(scope, move || reader.commit());
        gate.let_one_pass();
        first.ends().expect("its sync passed");
        gate.wait_for_a_sync();
        reader.waits();
        second.waits();
        gate.open();
        let second = second.ends().expect("commits");
        assert!(reader.ends().expect("commits") >= second);
    });
}

/// What all readers are to see in one step changes after the sync; nobody may act on the rows before.
#[test]
fn who_drops_or_loads_a_tree_or_is_to_settle_keeps_the_locks_over_the_sync() {
    let ends: [fn(&mut Txn, Loaded) -> Result<Seqno>; 3] = [
        |txn, _| {
            txn.drop_tree(OTHER);
            txn.commit()
        },
        |txn, loaded| {
            txn.add_loaded(loaded)?;
            txn.commit()
        },
        |txn, _| txn.commit_and(|settled| assert!(settled.is_ok())),
    ];
    for (number, end) in ends.into_iter().enumerate() {
        let (engine, gate) = open_fresh(1 << 20);
        put(&engine, "a", "0").expect("commits");
        let loaded = loaded(&engine);
        gate.close();
        std::thread::scope(|scope| {
            let first = start(scope, || {
                let mut txn = engine.begin();
                lock(&mut txn, "a")?;
                txn.put(TREE, b"a", b"1")?;
                end(&mut txn, loaded)
            });
            gate.wait_for_a_sync();
            let early = engine
                .begin()
                .lock(TREE, b"a", LockMode::Exclusive, &LockWait::NOT_AT_ALL)
                .map_err(|e| e.kind());
            first.waits();
            gate.open();
            assert_eq!(early, Err(Kind::LockTimeout), "end {number} gave its locks back before the sync");
            first.ends().expect("commits");
        });
        lock(&mut engine.begin(), "a").expect("free");
    }
}

#[test]
fn a_failed_sync_takes_back_what_was_shown_under_the_lock() {
    let (gate, bucket) = (Arc::new(Gate::default()), Arc::new(MemoryBucket::new()) as Arc<dyn Bucket>);
    let disk = SimDisk::new(1);
    let engine = open(&disk, &gate, &bucket, 1 << 20);
    put(&engine, "a", "0").expect("commits");
    gate.close();
    std::thread::scope(|scope| {
        let first = start(scope, || put(&engine, "a", "1"));
        gate.wait_for_a_sync();
        let second = start(scope, || {
            let mut txn = engine.begin();
            lock(&mut txn, "a").expect("free");
            assert_eq!(get(&mut txn, "a", ReadAs::Newest).as_deref(), Some("1"));
            txn.commit()
        });
        second.waits();
        disk.arm(DiskFault::FailSyncAt(disk.operations()));
        gate.open();
        assert_eq!(first.ends().expect_err("not durable").kind(), Kind::Failed);
        assert_eq!(second.ends().expect_err("it has read what is not durable").kind(), Kind::Failed);
    });
    let mut txn = engine.begin();
    lock(&mut txn, "a").expect("free");
    for read in [ReadAs::Newest, ReadAs::Snapshot] {
        assert_eq!(get(&mut txn, "a", read).as_deref(), Some("0"));
    }
}

/// Each transaction counts one key up, and leaves a key of its own behind. All of a group are written when the machine stops in its sync.
#[test]
fn a_crash_in_the_sync_leaves_no_commit_without_those_that_it_built_on() {
    let mut found = BTreeMap::new();
    for seed in 0..60 {
        let (gate, bucket) = (Arc::new(Gate::default()), Arc::new(MemoryBucket::new()) as Arc<dyn Bucket>);
        let disk = SimDisk::new(seed);
        let engine = open(&disk, &gate, &bucket, 1 << 20);
        put(&engine, "count", "0").expect("commits");
        gate.close();
        let acknowledged = AtomicU64::new(0);
        let count_up = || -> Result<()> {
            let mut txn = engine.begin();
            lock(&mut txn, "count")?;
            let count: u64 =
                get(&mut txn, "count", ReadAs::Newest).expect("is there").parse().expect("a number");
            txn.put(TREE, b"count", (count + 1).to_string().as_bytes())?;
            txn.put(TREE, format!("own {:02}", count + 1).as_bytes(), &[b'x'; 700])?;
            txn.commit()?;
            acknowledged.fetch_max(count + 1, Ordering::SeqCst);
            Ok(())
        };
        let crashed = std::thread::scope(|scope| {
            let first = start(scope, count_up);
            gate.wait_for_a_sync();
            let others: Vec<_> = (0..6).map(|_| start(scope, count_up)).collect();
            // Its end would wait for the sync.
            let mut watcher = engine.begin();
            let mut applied = || get(&mut watcher, "count", ReadAs::Newest).as_deref() == Some("7");
            while !applied() {
                std::thread::yield_now();
            }
            gate.let_one_pass();
            first.ends().expect("its sync passed");
            gate.wait_for_a_sync();
            let crashed = disk.crash();
            gate.open();
            others.into_iter().for_each(|other| drop(other.ends().expect_err("the disk is dead")));
            crashed
        });
        drop(engine);
        let engine = open(&crashed, &gate, &bucket, 1 << 20);
        let mut txn = engine.begin();
        let count: u64 =
            get(&mut txn, "count", ReadAs::Snapshot).expect("is there").parse().expect("a number");
        assert!(count >= acknowledged.load(Ordering::SeqCst), "seed {seed}: an acknowledged commit is lost");
        for own in 1..=7 {
            let there = get(&mut txn, &format!("own {own:02}"), ReadAs::Snapshot).is_some();
            assert_eq!(there, own <= count, "seed {seed}: commit {own} of {count}");
        }
        *found.entry(count).or_insert(0) += 1;
    }
    assert!(found.len() > 2 && found.contains_key(&7), "crashes of every kind: {found:?}");
}

#[derive(Default)]
struct History {
    /// By seqno: what the transaction read, and wrote.
    commits: BTreeMap<u64, (State, State)>,
    /// What was read under locks without writing, and the seqno that its commit answered.
    locked: Vec<(u64, State)>,
    /// What was seen at once, and the newest seqno that was acknowledged before.
    scans: Vec<(u64, State)>,
    snapshots: Vec<(u64, State)>,
}

/// Keys to values, each of which is written once.
type State = BTreeMap<String, Option<String>>;

const KEYS: u64 = 7;

/// xorshift
fn random(state: &mut u64, below: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 11) % below
}

fn run_transaction(
    txn: &mut Txn,
    dice: &mut u64,
    stamp: &str,
    history: &Mutex<History>,
    last: &AtomicU64,
) -> Result<()> {
    let (mut read, mut written) = (State::new(), State::new());
    for _ in 0..=random(dice, 3) {
        let key = format!("key {}", random(dice, KEYS));
        let mode = if random(dice, 4) == 0 { LockMode::Shared } else { LockMode::Exclusive };
        txn.lock(TREE, key.as_bytes(), mode, &LONG)?;
        if !written.contains_key(&key) {
            read.insert(key.clone(), get(txn, &key, ReadAs::Newest));
        }
        if mode == LockMode::Exclusive && random(dice, 4) > 0 {
            let value = (random(dice, 4) > 0).then(|| stamp.to_owned());
            match &value {
                Some(value) => txn.put(TREE, key.as_bytes(), value.as_bytes())?,
                None => txn.delete(TREE, key.as_bytes())?,
            }
            written.insert(key, value);
        }
    }
    if !written.is_empty() && random(dice, 8) == 0 {
        // Takes long to be applied, and later commits are there before it.
        txn.put(OTHER, stamp.as_bytes(), &[b'x'; 200_000])?;
    }
    let seqno = txn.commit()?.0;
    last.fetch_max(seqno, Ordering::SeqCst);
    let mut history = history.lock();
    if written.is_empty() {
        history.locked.push((seqno, read));
    } else {
        assert!(history.commits.insert(seqno, (read, written)).is_none(), "seqno {seqno} twice");
    }
    Ok(())
}

fn scan(engine: &Arc<Engine>, txn: &mut Txn, read: ReadAs) -> State {
    let mut cursor = Cursor::new(engine);
    cursor.open(txn, TREE, read).expect("opens");
    let mut state: State = (0..KEYS).map(|key| (format!("key {key}"), None)).collect();
    let mut more = cursor.seek_first(txn).expect("seeks");
    while more {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        state.insert(text(cursor.key()), Some(text(cursor.value())));
        more = cursor.next(txn).expect("steps");
    }
    state
}

/// Random transactions in threads, over memtables so small that some are flushed, beside the same ones one after the other by seqno.
#[test]
fn transactions_on_hot_rows_are_as_if_one_came_after_the_other() {
    let (engine, gate) = open_fresh(16 << 10);
    gate.state.lock().pause = Duration::from_micros(300);
    let (history, last) = (Mutex::new(History::default()), AtomicU64::new(0));
    let padding = "x".repeat(40);
    std::thread::scope(|scope| {
        for writer in 0..6_u64 {
            let (engine, history, last, padding) = (&engine, &history, &last, &padding);
            scope.spawn(move || {
                let mut dice = 0x9e37_79b9 + writer;
                let mut txn = engine.begin();
                for number in 0..400 {
                    let stamp = format!("{writer}-{number} {padding}");
                    if let Err(error) = run_transaction(&mut txn, &mut dice, &stamp, history, last) {
                        assert_eq!(error.kind(), Kind::Deadlock, "{error}");
                        txn.rollback();
                    }
                }
            });
        }
        for read in [ReadAs::Snapshot, ReadAs::Newest] {
            let (engine, history, last) = (&engine, &history, &last);
            scope.spawn(move || {
                let mut txn = engine.begin();
                for _ in 0..400 {
                    let before = last.load(Ordering::SeqCst);
                    let state = scan(engine, &mut txn, read);
                    txn.rollback();
                    let mut history = history.lock();
                    let seen =
                        if read == ReadAs::Newest { &mut history.scans } else { &mut history.snapshots };
                    seen.push((before, state));
                }
            });
        }
    });
    let History { commits, locked, scans, snapshots } = history.into_inner();
    let mut state: State = (0..KEYS).map(|key| (format!("key {key}"), None)).collect();
    let mut states = BTreeMap::from([(0, state.clone())]);
    for (seqno, (read, written)) in commits {
        for (key, value) in read {
            assert_eq!(state[&key], value, "seqno {seqno} did not read {key} as the one before left it");
        }
        state.extend(written);
        states.insert(seqno, state.clone());
    }
    for (seqno, read) in locked {
        let fits = |state: &State| read.iter().all(|(key, value)| state[key] == *value);
        assert!(states.range(..=seqno).any(|(_, state)| fits(state)), "{read:?} was not there at {seqno}");
    }
    for (before, seen) in scans.into_iter().chain(snapshots) {
        let from = states.range(..=before).next_back().map_or(0, |(seqno, _)| *seqno);
        assert!(states.range(from..).any(|(_, state)| *state == seen), "{seen:?} never was, after {before}");
    }
    assert_eq!(scan(&engine, &mut engine.begin(), ReadAs::Snapshot), state);
}
