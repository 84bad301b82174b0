//! kill -9 at named points of the engine: between two effects that a crash may separate.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::time::{Duration, Instant};

use acceptance::oracle::{self, Filler, Memory, Writers};
use acceptance::server::Plan;
use mysql::Conn;
use mysql::prelude::Queryable;

/// Each with the pass at which it kills: late enough that clients were told something.
const POINTS: [&str; 10] = [
    "after-unlock#150",
    "before-sync#150",
    "after-sync#150",
    "in-flush#2",
    "after-slice-put#3",
    "after-sst-put#2",
    "before-edit-put#3",
    "after-edit-put#3",
    "before-trim#2",
    "before-delete#1",
];

/// What a server says when its point has come.
const KILLED: &str = "a test ends or stops this process here";

/// Returns when the server has brought everything to the bucket, so that the next one meets no point before its clients come.
fn rest(connection: &mut Conn) {
    let waiting = |connection: &mut Conn| {
        let rows: Vec<(String, String)> = connection
            .query("SHOW GLOBAL STATUS WHERE variable_name IN ('cistern_edits_queued', 'cistern_unuploaded_bytes')")
            .expect("counters can be read");
        assert_eq!(rows.len(), 2, "both are there");
        rows.iter().any(|(_, value)| value != "0")
    };
    let began = Instant::now();
    while waiting(connection) {
        assert!(began.elapsed() < Duration::from_secs(60), "it does not come to rest");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn kill_at_each_point(loses_directory: bool) {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let mut plan = Plan::in_directory(scratch.path());
    plan.server_options.push("--cistern-memtable-size=1M".into());
    let server = plan.started();
    oracle::prepare(&mut server.connect().expect("it is ready")).expect("tables can be made");
    assert_eq!(server.stop().code(), 0);
    let (mut memories, mut kept) = (Memory::of(0..4), 0);
    for point in POINTS {
        let mut armed = plan.clone();
        armed.environment.push(("CISTERN_TEST_POINT".into(), format!("kill@{point}")));
        let server = armed.started();
        let (port, writers) = (server.port(), Writers::start(server.port(), memories));
        let filler = Filler::start(port);
        let ended = server.wait(Duration::from_secs(60)).unwrap_or_else(|| panic!("{point} does not come"));
        let killed = Instant::now();
        memories = writers.stop();
        filler.stop();
        assert_eq!(ended.code(), 5, "{point}: {}", ended.said);
        assert!(ended.said.contains(KILLED), "{point}: {}", ended.said);
        if loses_directory {
            std::fs::remove_dir_all(&plan.data).expect("the data directory can be deleted");
        }
        let server = plan.started();
        let promise = if loses_directory { killed.checked_sub(Duration::from_secs(1)) } else { None };
        let mut connection = server.connect().expect("it is ready");
        let verdict = oracle::judge(&mut connection, &mut memories, promise).expect("the judge can read");
        println!("{point}: {verdict:?}");
        assert_eq!((verdict.lost, verdict.torn), (0, 0), "{point}: {verdict:?}");
        assert!(verdict.kept + verdict.forgone > 0, "{point}: nothing was acknowledged: {verdict:?}");
        kept += verdict.kept;
        rest(&mut connection);
        drop(connection);
        assert_eq!(server.stop().code(), 0, "{point}");
    }
    assert!(kept > 0, "nothing was there that had to be");
}

#[test]
fn a_kill_at_a_named_point_loses_nothing() {
    kill_at_each_point(false);
}

#[test]
fn a_kill_at_a_named_point_and_the_loss_of_the_directory_cost_a_second_at_most() {
    kill_at_each_point(true);
}
