//! The promises of a bucket, kept by those that need no network.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod suite;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use bucket::{Bucket, DirectoryBucket, ErrorKind, FaultyBucket, MemoryBucket, ObjectName, PutOutcome, Rule};

#[test]
fn memory_keeps_the_promises() {
    suite::check_all(&MemoryBucket::new(), "main", false);
}

#[test]
fn a_directory_keeps_the_promises() {
    let directory = tempfile::tempdir().unwrap();
    suite::check_all(&DirectoryBucket::open(directory.path()).unwrap(), "main", false);
}

#[test]
fn bad_weather_breaks_no_promise_once_requests_are_retried() {
    for seed in 0..100 {
        // Nothing lands late here: a delete that lands after a later put is what epochs in names are for.
        let mut rules = Rule::weather(0.2);
        rules.retain(|rule| !matches!(rule.when, bucket::When::Late(_)));
        let bucket = FaultyBucket::new(Arc::new(MemoryBucket::new()), seed, rules).with_tries(20);
        suite::check_all(&bucket, "main", true);
    }
}

/// A file system of its own in memory; unmounted when dropped. `None` where this user may not mount.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new() -> Option<Self> {
        let mount = Self(tempfile::tempdir().unwrap());
        mount.mount(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).then_some(mount)
    }
    fn mount(&self, arguments: &[&str]) -> bool {
        let mut mount = Command::new("mount");
        mount.args(arguments).arg(self.0.path()).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(self.0.path()).stderr(Stdio::null()).status());
    }
}

#[test]
fn a_full_disk_and_a_read_only_one_say_so_and_lose_nothing() {
    let Some(mount) = Mount::new() else {
        eprintln!("not run: this user may not mount a file system");
        return;
    };
    let bucket = DirectoryBucket::open(mount.0.path()).unwrap();
    let name = |text: &str| ObjectName::from_listing(text);
    bucket.put(&name("kept"), suite::body(300_000)).unwrap();
    let error = bucket.put(&name("too/large"), suite::body(900_000)).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.message.contains("no space is left"), "{error}");
    assert_eq!(bucket.head(&name("too/large")).unwrap(), None);
    bucket.put(&name("fits"), suite::body(300_000)).unwrap();
    bucket.delete(&[name("fits")]).unwrap();
    bucket.put(&name("fits/again"), suite::body(600_000)).unwrap();

    assert!(mount.mount(&["-o", "remount,ro"]));
    let error = bucket.put(&name("more"), suite::body(1)).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Denied);
    assert!(error.message.contains("read-only"), "{error}");
    assert_eq!(bucket.get(&name("kept")).unwrap(), suite::body(300_000));
    assert_eq!(bucket.list(&name("")).unwrap().len(), 2);
}

/// Set in the child processes of the test below: the directory, and who the child is.
const WRITER: &str = "BUCKET_TEST_WRITER";
const ROUNDS: usize = 200;

#[test]
fn one_of_many_processes_creates_a_name() {
    if let Ok(writer) = std::env::var(WRITER) {
        return write_as_a_child(&writer);
    }
    let directory = tempfile::tempdir().unwrap();
    let children: Vec<_> = (0..4)
        .map(|writer| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "one_of_many_processes_creates_a_name"])
                .env(WRITER, format!("{writer} {}", directory.path().display()))
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let bucket = DirectoryBucket::open(directory.path()).unwrap();
    for round in 0..ROUNDS {
        let winner = bucket.get(&round_name(round)).unwrap();
        let claims: Vec<_> = (0..4)
            .filter(|writer| bucket.head(&claim_name(*writer, round)).unwrap().is_some())
            .map(|writer| writer.to_string())
            .collect();
        assert_eq!(claims, [std::str::from_utf8(&winner).unwrap()], "round {round}");
    }
}

fn round_name(round: usize) -> ObjectName {
    ObjectName::from_listing(format!("main/epoch/{round}"))
}

fn claim_name(writer: usize, round: usize) -> ObjectName {
    ObjectName::from_listing(format!("claims/{writer}/{round}"))
}

fn write_as_a_child(writer: &str) {
    let (writer, directory) = writer.split_once(' ').unwrap();
    let bucket = DirectoryBucket::open(&PathBuf::from(directory)).unwrap();
    for round in 0..ROUNDS {
        if bucket.put_if_absent(&round_name(round), writer.to_owned().into()).unwrap() == PutOutcome::Created
        {
            bucket.put(&claim_name(writer.parse().unwrap(), round), bytes::Bytes::new()).unwrap();
        }
    }
}
