//! What `cistern serve` promises on S3: the same as on a directory, while one request in twenty goes wrong.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use acceptance::s3::{Weather, point_at};
use acceptance::server::{Plan, free_port};
use mysql::prelude::Queryable;

#[test]
fn a_short_crash_test_on_a_foreign_s3_with_faults_loses_nothing() {
    let status = std::process::Command::new(env!("CARGO_BIN_EXE_crash"))
        .args(["--cycles=6", "--deletions=2", "--faulty-s3=0.05"])
        .status();
    assert!(status.expect("the crash test starts").success());
}

#[test]
fn wrong_credentials_and_a_dead_endpoint_are_told_apart() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let store = Weather::clear();
    let plan = Plan::in_directory(scratch.path());

    // A store that turns us away: a person must change something. Nothing was made in it, as the right keys show.
    let mut wrong = plan.clone();
    point_at(&mut wrong, store.port(), "test", "not the secret");
    let ended = wrong.refused();
    assert_eq!(ended.code(), 2, "{}", ended.said);
    assert!(ended.said.contains("s3://test"), "the bucket is not named: {}", ended.said);
    assert!(!ended.said.contains("not the secret"), "{}", ended.said);

    let mut right = plan.clone();
    store.serve(&mut right);
    let server = right.start().expect("the right keys work");
    let mut root = server.connect().expect("it is ready");
    root.query_drop("CREATE DATABASE d").expect("a database");
    drop(root);
    assert_eq!(server.stop().code(), 0);

    // Keys that were changed while the server was down.
    let ended = wrong.refused();
    assert_eq!(ended.code(), 2, "{}", ended.said);
    assert!(ended.said.contains("s3://test"), "the bucket is not named: {}", ended.said);

    // Nobody there: later may help.
    let mut dead = plan;
    let port = free_port();
    point_at(&mut dead, port, "test", "test");
    let ended = dead.refused();
    assert_eq!(ended.code(), 4, "{}", ended.said);
    assert!(ended.said.contains(&port.to_string()), "the endpoint is not named: {}", ended.said);
}
