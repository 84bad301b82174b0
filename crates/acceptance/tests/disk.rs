//! What `cistern serve` promises about disks that are full or may not be written: it says so, and loses nothing.
//!
//! A file system of its own (tmpfs) stands for the disk, so these need root, or sudo without a password.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use acceptance::oracle::{self, Memory, Writers};
use acceptance::server::{Ended, Plan};
use mysql::Conn;
use mysql::prelude::Queryable;

/// A small file system of its own; unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, megabytes: u32) -> Self {
        fs::create_dir_all(&at).expect("a directory");
        as_root(&["mount", "-t", "tmpfs", "-o", &format!("size={megabytes}m,mode=777"), "cistern-test"], &at);
        Self(at)
    }
    fn may_be_written(&self, may: bool) {
        as_root(&["mount", "-o", if may { "remount,rw" } else { "remount,ro" }], &self.0);
    }
    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }
    /// Takes the last free byte.
    fn fill(&self) {
        let mut ballast =
            fs::File::options().create(true).append(true).open(self.ballast()).expect("a file can be made");
        for piece in [1 << 20, 4096] {
            while ballast.write_all(&vec![0; piece]).is_ok() {}
        }
    }
    fn free(&self) {
        fs::remove_file(self.ballast()).expect("the ballast is ours");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a server that is being killed may still hold a file.
        as_root(&["umount", "-l"], &self.0);
    }
}

fn as_root(command: &[&str], path: &Path) {
    let sudo: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["sudo", "-n"] };
    let words = [sudo, command].concat();
    let status = Command::new(words[0]).args(&words[1..]).arg(path).status();
    assert!(status.is_ok_and(|status| status.success()), "{words:?} {} needs root", path.display());
}

/// Rows of 64 KiB until one is refused; how many were acknowledged, and the refusal.
fn insert_until_refused(connection: &mut Conn, first: u32) -> (u32, mysql::Error) {
    for id in first.. {
        let row = format!("INSERT INTO d.t VALUES ({id}, REPEAT(MD5({id}), 2048))");
        if let Err(error) = connection.query_drop(row) {
            return (id - first, error);
        }
        assert!(id - first < 5_000, "a full disk took 300 MB");
    }
    unreachable!("the numbers do not end")
}

fn ids(connection: &mut Conn) -> Vec<u32> {
    connection
        .query("SELECT id FROM d.t WHERE b = REPEAT(MD5(id), 2048) ORDER BY id")
        .expect("what is there can be read")
}

#[test]
fn a_full_disk_is_an_error_that_names_it_and_costs_no_acknowledged_row() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let disk = SmallDisk::mount(scratch.path().join("disk"), 160);
    let plan = Plan { data: disk.0.join("data"), ..Plan::in_directory(scratch.path()) };
    let mut server = plan.started();
    let mut root = server.connect().expect("it is ready");
    root.query_drop("CREATE DATABASE d").expect("a database");
    root.query_drop("CREATE TABLE d.t (id INT PRIMARY KEY, b LONGTEXT)").expect("a table");
    // The server keeps a definition as a file from a table's first use on: that must come before the disk is full.
    assert!(ids(&mut root).is_empty());

    disk.fill();
    let (acknowledged, error) = insert_until_refused(&mut root, 0);
    let said = error.to_string();
    assert!(said.contains("No space left") && said.contains("disk"), "{said}");
    // It reads on, refuses on, and does not mix up what was refused.
    assert_eq!(ids(&mut root), (0..acknowledged).collect::<Vec<_>>());
    root.query_drop("INSERT INTO d.t VALUES (1000000, REPEAT('x', 65536))").expect_err("it is still full");
    root.query_drop("SELECT 1").expect("the connection lives");

    // Killed while it is full; started again when there is room.
    drop(root);
    server.kill();
    disk.free();
    let server = plan.started();
    let mut root = server.connect().expect("it is ready");
    assert_eq!(ids(&mut root), (0..acknowledged).collect::<Vec<_>>());

    // Full again, and this time room is made under the running server: it goes on by itself.
    disk.fill();
    let (more, _) = insert_until_refused(&mut root, acknowledged);
    disk.free();
    let end = Instant::now() + Duration::from_secs(30);
    while root.query_drop("INSERT INTO d.t VALUES (1000000, REPEAT(MD5(1000000), 2048))").is_err() {
        assert!(Instant::now() < end, "there is room, and it still refuses:\n{}", server.said());
        std::thread::sleep(Duration::from_millis(100));
    }
    let mut expected: Vec<_> = (0..acknowledged + more).collect();
    expected.push(1_000_000);
    assert_eq!(ids(&mut root), expected);
    drop(root);
    let ended = server.stop();
    assert_eq!(ended.code(), 0, "{}", ended.said);
    let server = plan.started();
    assert_eq!(ids(&mut server.connect().expect("it is ready")), expected);
}

#[test]
fn writers_that_run_into_a_full_disk_lose_nothing_and_tear_nothing() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let disk = SmallDisk::mount(scratch.path().join("disk"), 160);
    let mut plan = Plan { data: disk.0.join("data"), ..Plan::in_directory(scratch.path()) };
    // Small tables in memory, so that flushes and the cache meet the full disk too.
    plan.server_options.push("--cistern-memtable-size=1M".into());
    let mut server = plan.started();
    oracle::prepare(&mut server.connect().expect("it is ready")).expect("tables can be made");
    let mut memories = Memory::of(0..4);
    for round in 0..3 {
        let writers = Writers::start(server.port(), memories);
        std::thread::sleep(Duration::from_millis(500));
        disk.fill();
        std::thread::sleep(Duration::from_millis(1_500));
        server.kill();
        memories = writers.stop();
        disk.free();
        server = plan.started();
        let mut connection = server.connect().expect("it is ready");
        let verdict = oracle::judge(&mut connection, &mut memories, None).expect("the judge can read");
        assert_eq!((verdict.lost, verdict.torn), (0, 0), "round {round}: {verdict:?}");
        assert!(verdict.kept > 0, "round {round}: nothing was written: {verdict:?}");
    }
}

#[test]
fn a_start_on_a_full_disk_says_so_and_harms_nothing() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let disk = SmallDisk::mount(scratch.path().join("disk"), 160);
    let plan = Plan { data: disk.0.join("data"), ..Plan::in_directory(scratch.path()) };
    let refused_for_space = |ended: Ended| {
        assert!(ended.said.contains("No space left"), "code {}: {}", ended.code(), ended.said);
        assert_eq!(ended.code(), 2, "{}", ended.said);
    };
    let elsewhere = Plan::in_directory(scratch.path());
    assert_eq!(elsewhere.started().stop().code(), 0);
    // A machine's first start has no old files whose space it could use.
    disk.fill();
    refused_for_space(plan.refused());
    disk.free();
    let mut server = plan.started();
    let mut root = server.connect().expect("it is ready");
    root.query_drop("CREATE DATABASE d").expect("a database");
    root.query_drop("CREATE TABLE d.t (id INT PRIMARY KEY, b LONGTEXT)").expect("a table");
    root.query_drop("INSERT INTO d.t VALUES (7, REPEAT(MD5(7), 2048))").expect("a row");
    drop(root);
    server.kill();
    // A later one may make do with the space of the wal before it.
    disk.fill();
    match plan.start() {
        Ok(mut server) => server.kill(),
        Err(ended) => refused_for_space(ended),
    }
    disk.free();
    let server = plan.started();
    assert_eq!(ids(&mut server.connect().expect("it is ready")), [7]);
}

#[test]
fn a_directory_that_may_not_be_written_is_refused_by_name() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let disk = SmallDisk::mount(scratch.path().join("disk"), 160);
    let plan = Plan {
        bucket: format!("file://{}", disk.0.join("bucket").display()),
        ..Plan::in_directory(scratch.path())
    };
    let server = plan.started();
    server.connect().expect("it is ready").query_drop("CREATE DATABASE d").expect("a database");
    assert_eq!(server.stop().code(), 0);

    // The bucket, then the data directory.
    disk.may_be_written(false);
    let ended = plan.refused();
    assert_eq!(ended.code(), 2, "{}", ended.said);
    let name = disk.0.join("bucket").display().to_string();
    assert!(ended.said.contains(&name) && ended.said.contains("read-only"), "{}", ended.said);
    let local = Plan { data: disk.0.join("data"), ..Plan::in_directory(scratch.path()) };
    let ended = local.refused();
    assert_eq!(ended.code(), 2, "{}", ended.said);
    assert!(ended.said.contains(&disk.0.join("data").display().to_string()), "{}", ended.said);

    disk.may_be_written(true);
    let server = plan.started();
    let found: Option<String> = server
        .connect()
        .expect("it is ready")
        .query_first("SHOW DATABASES LIKE 'd'")
        .expect("databases can be listed");
    assert_eq!(found.as_deref(), Some("d"));
}
