//! Two servers on one bucket: the newer one takes over, and the older one harms nothing and says why it ends.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use acceptance::objects::Objects;
use acceptance::oracle::{self, Filler, Memory, Writers};
use acceptance::server::{Plan, Server};
use mysql::prelude::Queryable;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// What a crash of machine and disk may cost, and so may a takeover.
const PROMISE: Duration = Duration::from_secs(1);
const CLIENTS: u64 = 4;

fn signal(server: &Server, signal: Signal) -> Pid {
    let pid = server.mariadbd_pid().expect("it runs");
    kill_process(pid, signal).expect("our own process");
    pid
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < end, "{what} does not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_stopped(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
}

fn epoch(server: &Server) -> u64 {
    let row = "SHOW GLOBAL STATUS LIKE 'cistern_epoch'";
    let row: Option<(String, u64)> =
        server.connect().expect("it is ready").query_first(row).expect("a status");
    row.expect("there is an epoch").1
}

/// What is gone since `before` was gone for good: the manifest of now, which is `now`'s, does without it.
fn check_gone(now: &Objects, before: &Objects) {
    let named = now.named_by_the_manifest();
    for name in now.gone_since(before) {
        assert!(!named.contains(name), "the manifest names {name}, and it was deleted");
        assert!(!name.starts_with("main/epoch/"), "the claim {name} was deleted");
    }
}

/// The older server stops at `point`; the newer one takes over, writes, and is held still; the older one resumes. All that
/// happens to the bucket from then on is the older one's doing.
fn a_server_stopped_at(point: &str, may_delete: bool) {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let bucket = scratch.path().join("bucket");
    let mut plan = Plan::in_directory(scratch.path());
    plan.server_options.push("--cistern-memtable-size=1M".into());
    let first = plan.started();
    oracle::prepare(&mut first.connect().expect("it is ready")).expect("tables can be made");
    assert_eq!(first.stop().code(), 0);

    let mut armed = plan.clone();
    armed.environment.push(("CISTERN_TEST_POINT".into(), format!("stop@{point}")));
    let older = armed.started();
    let old_epoch = epoch(&older);
    let writers = Writers::start(older.port(), Memory::of(0..CLIENTS));
    let filler = Filler::start(older.port());
    wait_for(point, || older.said().contains("a test ends or stops this process here"));
    let old_pid = older.mariadbd_pid().expect("it runs");
    wait_for("the stop", || is_stopped(old_pid));
    let stopped = Instant::now();
    let when_stopped = Objects::now(&bucket);

    let newer = Plan { data: scratch.path().join("other"), ..plan.clone() }.started();
    let new_epoch = epoch(&newer);
    assert!(new_epoch > old_epoch, "{new_epoch} follows {old_epoch}");
    let new_writers = Writers::start(newer.port(), Memory::of(CLIENTS..2 * CLIENTS));
    let new_filler = Filler::start(newer.port());
    std::thread::sleep(Duration::from_secs(2));
    let mut new_memories = new_writers.stop();
    new_filler.stop();
    let new_pid = signal(&newer, Signal::STOP);
    wait_for("the newer one's stop", || is_stopped(new_pid));
    let when_resumed = Objects::now(&bucket);
    assert_eq!(when_resumed.changed_since(&when_stopped), [""; 0], "overwritten by the newer one");
    check_gone(&when_resumed, &when_stopped);
    when_resumed.check_whole();

    let resumed = Instant::now();
    signal(&older, Signal::CONT);
    let ended = older.wait(Duration::from_secs(30)).expect("the older one ends by itself");
    assert_eq!(ended.code(), 3, "{}", ended.said);
    let why = ended.said.lines().last().expect("it says something");
    assert!(why.contains("fenced") && why.contains(&format!("epoch {new_epoch}")), "{why}");
    let mut old_memories = writers.stop();
    filler.stop();
    // What was on its way to a client when the process stopped may arrive; nothing else is acknowledged.
    for memory in &old_memories {
        let late = memory.acknowledged_after(resumed);
        assert!(late <= 1, "{late} commits were acknowledged after the resume:\n{}", ended.said);
    }
    let when_gone = Objects::now(&bucket);
    assert_eq!(when_gone.changed_since(&when_resumed), [""; 0], "overwritten by the older one");
    if !may_delete {
        assert_eq!(when_gone.gone_since(&when_resumed), [""; 0], "deleted by the older one");
    }
    check_gone(&when_gone, &when_resumed);
    when_gone.check_whole();
    let old_names = [format!("main/sst/{old_epoch:016x}-"), format!("main/wal/{old_epoch:016x}/")];
    let named = when_gone.named_by_the_manifest();
    for name in when_gone.new_since(&when_resumed) {
        // Its number was cleaned away while it slept: nobody reads edits below the newest base (docs/formats/names.md).
        let unread = name.starts_with("main/manifest/edit-") && !named.contains(name);
        assert!(
            unread || old_names.iter().any(|own| name.starts_with(own)),
            "{name} is not of epoch {old_epoch}"
        );
    }
    assert!(test_kill_process(old_pid).is_err(), "the older mariadbd is gone");

    // The newer one goes on, and nobody starts the older one again.
    signal(&newer, Signal::CONT);
    let new_writers = Writers::start(newer.port(), new_memories);
    std::thread::sleep(Duration::from_secs(1));
    new_memories = new_writers.stop();
    assert_eq!(epoch(&newer), new_epoch);
    let ended = newer.stop();
    assert_eq!(ended.code(), 0, "{}", ended.said);
    let at_the_end = Objects::now(&bucket);
    let claims: BTreeSet<_> =
        at_the_end.bodies.keys().filter(|name| name.starts_with("main/epoch/")).collect();
    assert_eq!(claims.len() as u64, new_epoch, "{claims:?}");
    assert_eq!(at_the_end.changed_since(&when_stopped), [""; 0]);
    check_gone(&at_the_end, &when_gone);
    at_the_end.check_whole();

    // The bucket alone has it all.
    let third = Plan { data: scratch.path().join("third"), ..plan.clone() }.started();
    let mut connection = third.connect().expect("it is ready");
    let promised = stopped.checked_sub(PROMISE);
    let of_old = oracle::judge(&mut connection, &mut old_memories, promised).expect("the judge can read");
    let of_new = oracle::judge(&mut connection, &mut new_memories, None).expect("the judge can read");
    assert_eq!((of_old.lost, of_old.torn), (0, 0), "{of_old:?}");
    assert_eq!((of_new.lost, of_new.torn), (0, 0), "{of_new:?}");
    assert!(of_old.kept > 0 && of_new.kept > 0, "{of_old:?} {of_new:?}");
}

#[test]
fn a_server_stopped_in_the_middle_of_a_flush_damages_nothing_when_it_resumes() {
    a_server_stopped_at("in-flush#3", false);
}

#[test]
fn a_server_stopped_before_it_publishes_damages_nothing_when_it_resumes() {
    a_server_stopped_at("before-edit-put#4", false);
}

/// It has made sure that it is the newest, and sleeps before it deletes: what it deletes is of no use to anybody.
#[test]
fn a_server_stopped_before_it_deletes_damages_nothing_when_it_resumes() {
    a_server_stopped_at("before-delete#2", true);
}

/// Names of the slices of `epoch`.
fn slices(bucket: &Path, epoch: u64) -> BTreeSet<String> {
    let listed = fs::read_dir(bucket.join(format!("main/wal/{epoch:016x}"))).into_iter().flatten();
    listed.map(|slice| slice.expect("it can be read").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn the_older_server_acknowledges_nothing_from_its_next_write_to_the_bucket_on() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let bucket = scratch.path().join("bucket");
    let plan = Plan::in_directory(scratch.path());
    let older = plan.started();
    let old_epoch = epoch(&older);
    let mut connection = older.connect().expect("it is ready");
    connection.query_drop("CREATE DATABASE d").expect("a database");
    connection.query_drop("CREATE TABLE d.t (id INT PRIMARY KEY)").expect("a table");
    connection.query_drop("INSERT INTO d.t VALUES (1)").expect("a row");
    std::thread::sleep(PROMISE + Duration::from_millis(500));
    let newer = Plan { data: scratch.path().join("other"), ..plan.clone() }.started();
    let new_epoch = epoch(&newer);
    let mut at_newer = newer.connect().expect("it is ready");
    at_newer.query_drop("INSERT INTO d.t VALUES (2)").expect("the newer one writes");

    // The older one does not know yet, and may acknowledge until it next writes to the bucket.
    let before = slices(&bucket, old_epoch);
    let watched = bucket.clone();
    let watcher = std::thread::spawn(move || {
        wait_for("the older one's next write", || slices(&watched, old_epoch) != before);
        Instant::now()
    });
    let taken_over = Instant::now();
    let mut acknowledged = Vec::new();
    while connection.query_drop(format!("INSERT INTO d.t VALUES ({})", 1000 + acknowledged.len())).is_ok() {
        acknowledged.push(Instant::now());
    }
    let written = watcher.join().expect("the watcher does not panic");
    let ended = older.wait(Duration::from_secs(20)).expect("the older one ends by itself");
    assert_eq!(ended.code(), 3, "{}", ended.said);
    let why = ended.said.lines().last().expect("it says something");
    assert!(why.contains("fenced") && why.contains(&format!("epoch {new_epoch}")), "{why}");
    // It writes each 0.7 s. The look that follows the write takes a moment.
    if let Some(last) = acknowledged.last() {
        let (after_write, after) = (last.saturating_duration_since(written), *last - taken_over);
        assert!(after_write < Duration::from_millis(300), "acknowledged {after_write:?} after its write");
        assert!(after < Duration::from_secs(3), "acknowledged {after:?} after the takeover");
    }

    // What it acknowledged in between counts nowhere, and whoever starts it again is told.
    let rows = "SELECT CAST(id AS CHAR) FROM d.t ORDER BY id";
    assert_eq!(at_newer.query::<String, _>(rows).expect("rows"), ["1", "2"]);
    drop(at_newer);
    assert_eq!(newer.stop().code(), 0);
    let again = plan.started();
    assert_eq!(again.connect().expect("it is ready").query::<String, _>(rows).expect("rows"), ["1", "2"]);
    let told = again.said().contains("another writer went on without what this local wal holds");
    assert_eq!(told, !acknowledged.is_empty(), "{} rows: {}", acknowledged.len(), again.said());
}
