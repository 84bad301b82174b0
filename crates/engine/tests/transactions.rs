//! What transactions promise, through the public face of the engine.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bucket::MemoryBucket;
use common::{Random, parts, status};
use engine::{
    Background, Cursor, Engine, FIRST_ALLOCATED_TREE, Granted, Isolation, Job, Kind, LockMode, LockWait,
    ReadAs, Result, Settings, SimDisk, TreeId, Txn,
};

const TREE: TreeId = TreeId(7);
const LONG: LockWait<'static> = LockWait { timeout: Duration::from_secs(50), interrupted: &|| false };

fn engine() -> Arc<Engine> {
    let parts = parts(Arc::new(MemoryBucket::new()), &SimDisk::new(1));
    Engine::open(parts, Settings::default()).expect("a fresh bucket opens")
}

fn put(engine: &Arc<Engine>, key: &str, value: &str) {
    let mut txn = engine.begin();
    txn.put(TREE, key.as_bytes(), value.as_bytes()).expect("fits");
    txn.commit().expect("commits");
}

fn delete(engine: &Arc<Engine>, key: &str) {
    let mut txn = engine.begin();
    txn.delete(TREE, key.as_bytes()).expect("fits");
    txn.commit().expect("commits");
}

fn get(txn: &mut Txn, key: &str, read: ReadAs) -> Option<String> {
    txn.get(TREE, key.as_bytes(), read, |value| String::from_utf8(value.to_vec()).expect("text"))
        .expect("reads")
}

fn snapshot(txn: &mut Txn, key: &str) -> Option<String> {
    get(txn, key, ReadAs::Snapshot)
}

fn lock(txn: &mut Txn, key: &str) -> Result<Granted> {
    txn.lock(TREE, key.as_bytes(), LockMode::Exclusive, &LONG)
}

fn entry(cursor: &Cursor) -> String {
    assert_eq!(cursor.entry(), (cursor.key(), cursor.value()));
    format!("{}={}", String::from_utf8_lossy(cursor.key()), String::from_utf8_lossy(cursor.value()))
}

fn scan(engine: &Arc<Engine>, txn: &mut Txn) -> String {
    let mut cursor = Cursor::new(engine);
    cursor.open(txn, TREE, ReadAs::Snapshot).expect("opens");
    let mut found = Vec::new();
    let mut more = cursor.seek_first(txn).expect("seeks");
    while more {
        found.push(entry(&cursor));
        more = cursor.next(txn).expect("steps");
    }
    let mut backwards = Vec::new();
    more = cursor.seek_last(txn).expect("seeks");
    while more {
        backwards.push(entry(&cursor));
        more = cursor.prev(txn).expect("steps");
    }
    backwards.reverse();
    assert_eq!(found, backwards, "both directions show the same");
    found.join(" ")
}

#[test]
fn a_transaction_sees_its_own_writes_and_nobody_else_does_until_the_commit() {
    let engine = engine();
    put(&engine, "a", "1");
    let mut writer = engine.begin();
    writer.put(TREE, b"a", b"2").unwrap();
    writer.put(TREE, b"b", b"3").unwrap();
    writer.delete(TREE, b"a").unwrap();
    assert_eq!(snapshot(&mut writer, "a"), None);
    assert_eq!(snapshot(&mut writer, "b").as_deref(), Some("3"));
    assert_eq!(scan(&engine, &mut writer), "b=3");
    assert_eq!(scan(&engine, &mut engine.begin()), "a=1");
    writer.commit().unwrap();
    assert_eq!(scan(&engine, &mut engine.begin()), "b=3");
}

#[test]
fn repeatable_read_answers_as_of_its_first_read() {
    let engine = engine();
    put(&engine, "a", "1");
    let mut reader = engine.begin();
    assert_eq!(snapshot(&mut reader, "a").as_deref(), Some("1"));
    put(&engine, "a", "2");
    put(&engine, "b", "2");
    reader.statement_begin();
    assert_eq!(scan(&engine, &mut reader), "a=1");
    assert_eq!(get(&mut reader, "a", ReadAs::Newest).as_deref(), Some("2"));
    delete(&engine, "a");
    assert_eq!(scan(&engine, &mut reader), "a=1");
    reader.commit().unwrap();
    assert_eq!(scan(&engine, &mut reader), "b=2", "a new snapshot after the commit");
}

#[test]
fn read_committed_sees_what_was_committed_before_each_statement() {
    let engine = engine();
    put(&engine, "a", "1");
    let mut reader = engine.begin();
    reader.set_isolation(Isolation::ReadCommitted);
    assert_eq!(snapshot(&mut reader, "a").as_deref(), Some("1"));
    put(&engine, "a", "2");
    assert_eq!(snapshot(&mut reader, "a").as_deref(), Some("1"), "within the statement");
    reader.statement_begin();
    assert_eq!(snapshot(&mut reader, "a").as_deref(), Some("2"));
    put(&engine, "a", "3");
    assert_eq!(lock(&mut reader, "a").unwrap(), Granted::New, "no conflict in READ COMMITTED");
}

#[test]
fn an_update_on_an_old_snapshot_is_refused_so_none_is_lost() {
    let engine = engine();
    put(&engine, "a", "1");
    let mut first = engine.begin();
    assert_eq!(snapshot(&mut first, "a").as_deref(), Some("1"));
    put(&engine, "a", "2");
    assert_eq!(lock(&mut first, "a").unwrap_err().kind(), Kind::Conflict);
    assert_eq!(engine.status().get("locks_held"), Some(0), "a refused lock is not kept");
    first.set_conflict_detection(false);
    assert_eq!(lock(&mut first, "a").unwrap(), Granted::New);
    first.rollback();
    first.set_conflict_detection(true);
    assert_eq!(lock(&mut first, "a").unwrap(), Granted::New, "no snapshot yet, so nothing to conflict with");
    first.put(TREE, b"a", b"3").unwrap();
    first.commit().unwrap();
    assert_eq!(scan(&engine, &mut engine.begin()), "a=3");
}

#[test]
fn a_deletion_after_the_snapshot_conflicts_too() {
    let engine = engine();
    put(&engine, "a", "1");
    let mut first = engine.begin();
    first.snapshot_now();
    delete(&engine, "a");
    assert_eq!(lock(&mut first, "a").unwrap_err().kind(), Kind::Conflict);
}

#[test]
fn rolling_back_to_a_mark_restores_exactly_what_was_written_before() {
    let engine = engine();
    put(&engine, "a", "old");
    let mut txn = engine.begin();
    txn.put(TREE, b"a", b"1").unwrap();
    txn.put(TREE, b"b", b"1").unwrap();
    let mark = txn.mark();
    txn.put(TREE, b"a", b"2").unwrap();
    txn.put(TREE, b"a", b"3").unwrap();
    txn.delete(TREE, b"b").unwrap();
    txn.put(TREE, b"c", b"1").unwrap();
    assert_eq!(scan(&engine, &mut txn), "a=3 c=1");
    txn.rollback_to(mark);
    assert_eq!(scan(&engine, &mut txn), "a=1 b=1");
    txn.commit().unwrap();
    assert_eq!(scan(&engine, &mut engine.begin()), "a=1 b=1");
}

#[test]
fn a_cursor_sees_what_its_transaction_writes_between_its_steps() {
    let engine = engine();
    for key in ["b", "d", "f"] {
        put(&engine, key, "0");
    }
    let mut txn = engine.begin();
    let mut cursor = Cursor::new(&engine);
    cursor.open(&mut txn, TREE, ReadAs::Snapshot).unwrap();
    assert!(cursor.seek(&mut txn, b"a").unwrap());
    assert_eq!(entry(&cursor), "b=0");
    txn.put(TREE, b"c", b"1").unwrap();
    txn.delete(TREE, b"d").unwrap();
    assert!(cursor.next(&mut txn).unwrap());
    assert_eq!(entry(&cursor), "c=1");
    txn.put(TREE, b"e", b"1").unwrap();
    txn.put(TREE, b"f", b"1").unwrap();
    assert!(cursor.next(&mut txn).unwrap());
    assert_eq!(entry(&cursor), "e=1");
    assert!(cursor.next(&mut txn).unwrap());
    assert_eq!(entry(&cursor), "f=1");
    txn.put(TREE, b"d", b"2").unwrap();
    txn.delete(TREE, b"e").unwrap();
    assert!(cursor.prev(&mut txn).unwrap());
    assert_eq!(entry(&cursor), "d=2");
    txn.delete(TREE, b"d").unwrap();
    assert!(cursor.next(&mut txn).unwrap());
    assert_eq!(entry(&cursor), "f=1");
    assert!(!cursor.next(&mut txn).unwrap());
}

/// A transaction writes, rolls back, drops the tree and ends, others write, and what they wrote moves from memory to ssts; after each
/// step a cursor that was opened before, and is opened again, shows what a new one shows.
#[test]
fn a_cursor_that_is_opened_again_shows_what_a_new_one_shows() {
    let mut flushes = 0;
    for seed in 0..100 {
        let settings = Settings { background: Background::Manual, ..Settings::default() };
        let parts = parts(Arc::new(MemoryBucket::new()), &SimDisk::new(seed));
        let engine = Engine::open(parts, settings).expect("a fresh bucket opens");
        let mut random = Random(seed);
        for key in 0..8 {
            put(&engine, &format!("k{key}"), "old");
        }
        let mut txn = engine.begin();
        if seed % 2 == 0 {
            txn.set_isolation(Isolation::ReadCommitted);
        }
        let mut cursor = Cursor::new(&engine);
        let mut mark = txn.mark();
        for step in 0..40 {
            let key = format!("k{}", random.below(10));
            match random.below(10) {
                0 => put(&engine, &key, &format!("other {step}")),
                1 => delete(&engine, &key),
                2 => txn.put(TREE, key.as_bytes(), format!("own {step}").as_bytes()).expect("fits"),
                3 => txn.delete(TREE, key.as_bytes()).expect("fits"),
                4 => mark = txn.mark(),
                5 => txn.rollback_to(mark),
                6 if random.below(4) == 0 => txn.drop_tree(TREE),
                7 if random.below(4) == 0 => {
                    txn.rollback();
                    mark = txn.mark();
                }
                8 => txn.statement_begin(),
                _ => {
                    let job = [Job::Freeze, Job::Flush, Job::Compact][random.below(3) as usize];
                    engine.step(job).expect("works");
                }
            }
            let read = if random.below(8) == 0 { ReadAs::Newest } else { ReadAs::Snapshot };
            cursor.open(&mut txn, TREE, read).expect("opens");
            let (from, forward) = (format!("k{}", random.below(10)), random.below(2) == 0);
            let shown = walk(&mut cursor, &mut txn, &from, forward);
            let mut fresh = Cursor::new(&engine);
            fresh.open(&mut txn, TREE, read).expect("opens");
            assert_eq!(shown, walk(&mut fresh, &mut txn, &from, forward), "seed {seed}, step {step}");
        }
        flushes += status(&engine, "flushes");
    }
    assert!(flushes > 20, "{flushes} flushes");
}

/// All that comes from a key on, in one direction.
fn walk(cursor: &mut Cursor, txn: &mut Txn, from: &str, forward: bool) -> Vec<String> {
    let mut found = Vec::new();
    let mut more =
        if forward { cursor.seek(txn, from.as_bytes()) } else { cursor.seek_before(txn, from.as_bytes()) };
    while more.expect("moves") {
        found.push(entry(cursor));
        more = if forward { cursor.next(txn) } else { cursor.prev(txn) };
    }
    found
}

#[test]
fn seeks_stop_at_the_borders_of_their_tree() {
    let engine = engine();
    let mut txn = engine.begin();
    for (tree, key) in [(6, "z"), (7, "b"), (7, "d"), (8, "a")] {
        txn.put(TreeId(tree), key.as_bytes(), b"0").unwrap();
    }
    txn.commit().unwrap();
    let mut cursor = Cursor::new(&engine);
    cursor.open(&mut txn, TREE, ReadAs::Snapshot).unwrap();
    assert!(cursor.seek_after(&mut txn, b"b").unwrap());
    assert_eq!(entry(&cursor), "d=0");
    assert!(!cursor.seek_after(&mut txn, b"d").unwrap());
    assert!(cursor.seek_before(&mut txn, b"d").unwrap());
    assert_eq!(entry(&cursor), "b=0");
    assert!(!cursor.seek_before(&mut txn, b"b").unwrap());
    assert!(cursor.seek_last(&mut txn).unwrap());
    assert_eq!(entry(&cursor), "d=0");
    assert!(cursor.seek_first(&mut txn).unwrap());
    assert_eq!(entry(&cursor), "b=0");
    assert!(!cursor.prev(&mut txn).unwrap());
}

#[test]
fn a_dropped_tree_is_gone_with_the_commit() {
    let engine = engine();
    put(&engine, "a", "1");
    let mut txn = engine.begin();
    let mark = txn.mark();
    txn.drop_tree(TREE);
    assert_eq!(scan(&engine, &mut txn), "");
    txn.rollback_to(mark);
    assert_eq!(scan(&engine, &mut txn), "a=1");
    txn.drop_tree(TREE);
    assert_eq!(scan(&engine, &mut engine.begin()), "a=1");
    txn.commit().unwrap();
    assert_eq!(scan(&engine, &mut engine.begin()), "");
}

#[test]
fn an_exclusive_lock_is_waited_for_until_the_holder_commits() {
    let engine = engine();
    put(&engine, "a", "0");
    let mut first = engine.begin();
    lock(&mut first, "a").unwrap();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            let mut second = engine.begin();
            lock(&mut second, "a").unwrap();
            get(&mut second, "a", ReadAs::Newest)
        });
        while engine.status().get("locks_waiting") == Some(0) {
            std::thread::yield_now();
        }
        first.put(TREE, b"a", b"1").unwrap();
        first.commit().unwrap();
        assert_eq!(second.join().unwrap().as_deref(), Some("1"));
    });
    assert_eq!(engine.status().get("locks_held"), Some(0));
}

#[test]
fn a_wait_ends_with_its_time_its_interrupt_or_its_flag() {
    let engine = engine();
    let mut holder = engine.begin();
    lock(&mut holder, "a").unwrap();
    let mut txn = engine.begin();
    let short = LockWait { timeout: Duration::from_millis(30), interrupted: &|| false };
    let kind = |result: Result<Granted>| result.unwrap_err().kind();
    assert_eq!(kind(txn.lock(TREE, b"a", LockMode::Shared, &LockWait::NOT_AT_ALL)), Kind::LockTimeout);
    assert_eq!(kind(txn.lock(TREE, b"a", LockMode::Shared, &short)), Kind::LockTimeout);
    let flag = AtomicBool::new(true);
    let killed = LockWait { timeout: Duration::from_secs(50), interrupted: &|| flag.load(Ordering::Relaxed) };
    assert_eq!(kind(txn.lock(TREE, b"a", LockMode::Shared, &killed)), Kind::Interrupted);
    let interrupt = txn.interrupt_handle();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| kind(lock(&mut txn, "a")));
        while engine.status().get("locks_waiting") == Some(0) {
            std::thread::yield_now();
        }
        interrupt.interrupt();
        assert_eq!(waiter.join().unwrap(), Kind::Interrupted);
    });
    holder.rollback();
    assert_eq!(lock(&mut txn, "a").unwrap(), Granted::New, "nothing is left of the failed waits");
}

#[test]
fn of_a_deadlock_the_transaction_that_wrote_least_fails_and_the_other_goes_on() {
    for heavy_waits_first in [true, false] {
        let engine = engine();
        let mut heavy = engine.begin();
        let mut light = engine.begin();
        lock(&mut heavy, "a").unwrap();
        heavy.put(TREE, b"a", &[0; 1000]).unwrap();
        lock(&mut light, "b").unwrap();
        light.put(TREE, b"b", &[0; 10]).unwrap();
        let (mut early, early_key, mut late, late_key) =
            if heavy_waits_first { (heavy, "b", light, "a") } else { (light, "a", heavy, "b") };
        let (early, late) = std::thread::scope(|scope| {
            let early = scope.spawn(move || {
                let result = lock(&mut early, early_key);
                early.rollback();
                result
            });
            while engine.status().get("locks_waiting") == Some(0) {
                std::thread::yield_now();
            }
            let result = lock(&mut late, late_key);
            late.rollback();
            (early.join().unwrap(), result)
        });
        let (heavy, light) = if heavy_waits_first { (early, late) } else { (late, early) };
        assert_eq!(light.unwrap_err().kind(), Kind::Deadlock);
        assert_eq!(heavy.unwrap(), Granted::New);
        assert_eq!(engine.status().get("locks_deadlocks"), Some(1));
        assert_eq!(engine.status().get("locks_held"), Some(0));
    }
}

#[test]
fn shared_locks_are_shared_and_two_upgrades_are_a_deadlock() {
    let engine = engine();
    let mut first = engine.begin();
    let mut second = engine.begin();
    first.lock(TREE, b"a", LockMode::Shared, &LONG).unwrap();
    second.lock(TREE, b"a", LockMode::Shared, &LONG).unwrap();
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| lock(&mut first, "a"));
        while engine.status().get("locks_waiting") == Some(0) {
            std::thread::yield_now();
        }
        assert_eq!(lock(&mut second, "a").unwrap_err().kind(), Kind::Deadlock, "the newcomer of two equals");
        second.rollback();
        assert_eq!(upgrade.join().unwrap().unwrap(), Granted::Held);
    });
}

#[test]
fn a_reader_that_comes_after_a_waiting_writer_does_not_overtake_it() {
    let engine = engine();
    let mut reader = engine.begin();
    reader.lock(TREE, b"a", LockMode::Shared, &LONG).unwrap();
    let mut writer = engine.begin();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| lock(&mut writer, "a"));
        while engine.status().get("locks_waiting") == Some(0) {
            std::thread::yield_now();
        }
        let mut late = engine.begin();
        let result = late.lock(TREE, b"a", LockMode::Shared, &LockWait::NOT_AT_ALL);
        assert_eq!(result.unwrap_err().kind(), Kind::LockTimeout);
        reader.rollback();
        assert_eq!(waiting.join().unwrap().unwrap(), Granted::New);
    });
}

#[test]
fn limits_are_refused_by_name_and_leave_the_transaction_as_it_was() {
    let engine = engine();
    let mut txn = engine.begin();
    txn.put(TREE, b"a", b"1").unwrap();
    let long = vec![0; engine::limits::KEY_BYTES_MAX + 1];
    assert_eq!(txn.put(TREE, &long, b"").unwrap_err().kind(), Kind::BadRequest);
    assert_eq!(scan(&engine, &mut txn), "a=1");
}

#[test]
fn counters_under_contention_lose_no_update() {
    let engine = engine();
    put(&engine, "n", "0");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut txn = engine.begin();
                for _ in 0..200 {
                    lock(&mut txn, "n").expect("granted in turn");
                    let n: u64 =
                        get(&mut txn, "n", ReadAs::Newest).expect("is there").parse().expect("a number");
                    txn.put(TREE, b"n", (n + 1).to_string().as_bytes()).expect("fits");
                    txn.commit().expect("commits");
                }
            });
        }
    });
    assert_eq!(scan(&engine, &mut engine.begin()), "n=800");
}

#[test]
fn no_tree_is_allocated_twice_and_the_first_ones_never() {
    let engine = engine();
    let first = engine.allocate_tree();
    assert!(first >= FIRST_ALLOCATED_TREE);
    assert!(engine.allocate_tree() > first);
}
