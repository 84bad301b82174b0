//! Where a secret key must not be seen: anywhere but in the environment or file that it came from.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use acceptance::objects::files_below;
use acceptance::s3::{Weather, point_at, point_without_keys};
use acceptance::server::{Plan, Server};
use mysql::Row;
use mysql::prelude::Queryable;

const SECRET: &str = "s3cr3tv4lue+of/the/key";
const WRONG: &str = "wr0ngs3cr3t+of/nobody";
const TOKEN: &str = "t0kenofasession";

fn check_text(place: &str, text: &str) {
    for secret in [SECRET, WRONG, TOKEN] {
        assert!(!text.contains(secret), "a secret is in {place}: {text}");
    }
}

/// All that a user, a neighbour on the machine, or a reader of logs could look at.
fn check(server: &Server, data: &Path) {
    for pid in [server.pid(), server.mariadbd_pid().expect("it runs")] {
        let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).expect("our own process");
        assert!(!line.is_empty());
        check_text("a command line", &String::from_utf8_lossy(&line));
    }
    let mut root = server.connect().expect("it is ready");
    for query in [
        "SHOW VARIABLES",
        "SHOW GLOBAL VARIABLES",
        "SHOW GLOBAL STATUS",
        "SHOW ENGINE CISTERN STATUS",
        "SELECT * FROM information_schema.SYSTEM_VARIABLES",
        "SELECT * FROM information_schema.PLUGINS",
        "SHOW FULL PROCESSLIST",
    ] {
        let rows: Vec<Row> = root.query(query).unwrap_or_else(|error| panic!("{query}: {error}"));
        assert!(!rows.is_empty(), "{query} says nothing");
        let values = rows.into_iter().flat_map(Row::unwrap);
        let text = values.map(|value| value.as_sql(true));
        check_text(query, &text.collect::<Vec<_>>().join("\n"));
    }
    check_text("the log", &server.said());
    for (name, bytes) in files_below(data) {
        check_text(&name, &String::from_utf8_lossy(&bytes));
    }
}

fn write_a_row(server: &Server, id: u32) {
    let mut root = server.connect().expect("it is ready");
    root.query_drop("CREATE DATABASE IF NOT EXISTS d").expect("a database");
    root.query_drop("CREATE TABLE IF NOT EXISTS d.t (id INT PRIMARY KEY)").expect("a table");
    root.query_drop(format!("INSERT INTO d.t VALUES ({id})")).expect("a row");
}

#[test]
fn a_secret_from_the_environment_is_seen_nowhere() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let store = Weather::clear_for(SECRET);
    let mut plan = Plan::in_directory(scratch.path());
    point_at(&mut plan, store.port(), "test", SECRET);
    plan.environment.push(("AWS_SESSION_TOKEN".into(), TOKEN.into()));
    let server = plan.started();
    write_a_row(&server, 1);
    check(&server, &plan.data);
    let ended = server.stop();
    assert_eq!(ended.code(), 0, "{}", ended.said);
    check_text("the log", &ended.said);

    let mut wrong = Plan::in_directory(scratch.path());
    point_at(&mut wrong, store.port(), "test", WRONG);
    let ended = wrong.refused();
    assert_eq!(ended.code(), 2, "{}", ended.said);
    check_text("the refusal", &ended.said);
}

#[test]
fn a_secret_from_a_profile_is_seen_nowhere_not_even_when_it_is_changed_under_a_running_server() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let store = Weather::clear_for(SECRET);
    let mut plan = Plan::in_directory(scratch.path());
    point_without_keys(&mut plan, store.port());
    let profile = scratch.path().join("credentials");
    let write = |secret: &str| {
        let text = format!("[shop]\naws_access_key_id = test\naws_secret_access_key = {secret}\n");
        // Renamed, as tools that renew keys do: no request may read half a file.
        fs::write(profile.with_extension("new"), text).expect("a file can be written");
        fs::rename(profile.with_extension("new"), &profile).expect("and renamed");
    };
    write(SECRET);
    for (name, value) in
        [("AWS_PROFILE", "shop".to_owned()), ("AWS_SHARED_CREDENTIALS_FILE", profile.display().to_string())]
    {
        plan.environment.push((name.into(), value));
    }
    let server = plan.started();
    write_a_row(&server, 1);
    check(&server, &plan.data);

    // The store turns the server away from now on. It says so, goes on, and names no key.
    write(WRONG);
    let end = Instant::now() + Duration::from_secs(30);
    for id in 2.. {
        write_a_row(&server, id);
        if server.said().contains("a background step failed") {
            break;
        }
        assert!(Instant::now() < end, "a denied upload is not told: {}", server.said());
        std::thread::sleep(Duration::from_millis(100));
    }
    check(&server, &plan.data);
    write(SECRET);
    let ended = server.stop();
    assert_eq!(ended.code(), 0, "{}", ended.said);
    check_text("the log", &ended.said);
}
