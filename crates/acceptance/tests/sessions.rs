//! What one connection may expect of another: waits that end, conflicts that are told, snapshots that hold still.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use acceptance::server::{Plan, Server, server_env};
use mysql::prelude::Queryable;
use mysql::{Conn, Error};

const LOCK_WAIT_TIMEOUT: u16 = 1205;
const DEADLOCK: u16 = 1213;
const INTERRUPTED: u16 = 1317;

fn start() -> (tempfile::TempDir, Server) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let server = Plan::in_directory(directory.path()).start();
    let server = server.unwrap_or_else(|ended| panic!("cistern did not start:\n{}", ended.said));
    let mut root = server.connect().expect("it is ready");
    root.query_drop("CREATE DATABASE s").expect("a database");
    root.query_drop("CREATE TABLE s.t (id INT PRIMARY KEY, v INT)").expect("a table");
    root.query_drop("INSERT INTO s.t VALUES (1, 10), (2, 20), (3, 30)").expect("rows");
    (directory, server)
}

fn connect(server: &Server) -> Conn {
    let mut connection = server.connect().expect("it is ready");
    connection.query_drop("USE s").expect("a database");
    connection
}

fn run(connection: &mut Conn, statements: &[&str]) {
    for statement in statements {
        connection.query_drop(statement).unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}

fn value(connection: &mut Conn, id: i32) -> i32 {
    let row = connection.query_first(format!("SELECT v FROM t WHERE id = {id}")).expect("a query");
    row.expect("a row")
}

fn code(result: mysql::Result<()>) -> u16 {
    match result {
        Err(Error::MySqlError(error)) => error.code,
        other => panic!("a refusal was expected: {other:?}"),
    }
}

fn until(mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(20), "it never came");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn every_wait_for_a_lock_has_an_end() {
    let (_directory, server) = start();
    let mut holder = connect(&server);
    run(&mut holder, &["BEGIN", "UPDATE t SET v = 11 WHERE id = 1"]);

    // By the limit, under both of its names.
    for limit in ["cistern_lock_wait_timeout", "innodb_lock_wait_timeout"] {
        let mut waiter = connect(&server);
        run(&mut waiter, &[&format!("SET {limit} = 1")]);
        let began = Instant::now();
        assert_eq!(code(waiter.query_drop("UPDATE t SET v = 12 WHERE id = 1")), LOCK_WAIT_TIMEOUT);
        assert!(began.elapsed() >= Duration::from_millis(900), "{limit}");
        assert_eq!(value(&mut waiter, 1), 10, "a plain read waits for nobody");
    }

    // By KILL.
    let mut waiter = connect(&server);
    let number = waiter.connection_id();
    let killed = thread::spawn(move || code(waiter.query_drop("SELECT v FROM t WHERE id = 1 FOR UPDATE")));
    thread::sleep(Duration::from_millis(400));
    run(&mut holder, &[&format!("KILL QUERY {number}")]);
    assert_eq!(killed.join().expect("no panic"), INTERRUPTED);

    // By its client going away.
    let port = format!("--port={}", server.port());
    let mut client = Command::new(server_env("MARIADB_CLIENT"))
        .args(["--no-defaults", "-h127.0.0.1", "-uroot", &port, "-e", "UPDATE s.t SET v = 13 WHERE id = 1"])
        .stderr(Stdio::null())
        .spawn()
        .expect("the server's own client");
    let waiting = "SELECT COUNT(*) FROM information_schema.PROCESSLIST WHERE INFO LIKE 'UPDATE s.t%'";
    let mut waits = || holder.query_first::<i32, _>(waiting).expect("a query").expect("a row");
    until(|| waits() == 1);
    client.kill().expect("it runs");
    client.wait().expect("it ran");
    until(|| waits() == 0);

    run(&mut holder, &["COMMIT"]);
    assert_eq!(value(&mut holder, 1), 11, "none of those who gave up wrote");
}

#[test]
fn a_deadlock_costs_one_transaction_and_the_other_goes_on() {
    let (_directory, server) = start();
    let (mut one, mut other) = (connect(&server), connect(&server));
    run(&mut one, &["BEGIN", "UPDATE t SET v = v + 1 WHERE id = 1"]);
    run(&mut other, &["BEGIN", "UPDATE t SET v = v + 1 WHERE id = 2"]);
    let crossing = thread::spawn(move || {
        let result = one.query_drop("UPDATE t SET v = v + 1 WHERE id = 2");
        (one, result)
    });
    thread::sleep(Duration::from_millis(300));
    let second = other.query_drop("UPDATE t SET v = v + 1 WHERE id = 1");
    // The survivor may wait for the other's rollback only, which its refusal did.
    let (mut one, first) = crossing.join().expect("no panic");
    let refused: Vec<u16> = [first, second].into_iter().filter(Result::is_err).map(code).collect();
    assert_eq!(refused, [DEADLOCK]);
    run(&mut one, &["COMMIT"]);
    run(&mut other, &["COMMIT"]);
    assert_eq!((value(&mut one, 1), value(&mut one, 2)), (11, 21), "one transaction, whole");
}

#[test]
fn repeatable_read_holds_still_and_tells_of_a_lost_update() {
    let (_directory, server) = start();
    let (mut reader, mut writer) = (connect(&server), connect(&server));
    run(&mut reader, &["BEGIN"]);
    assert_eq!(value(&mut reader, 3), 30);
    run(
        &mut writer,
        &["UPDATE t SET v = 31 WHERE id = 3", "INSERT INTO t VALUES (4, 40)", "DELETE FROM t WHERE id = 2"],
    );
    assert_eq!(value(&mut reader, 3), 30);
    let ids: Vec<i32> = reader.query("SELECT id FROM t ORDER BY id").expect("a query");
    assert_eq!(ids, [1, 2, 3]);
    assert_eq!(code(reader.query_drop("UPDATE t SET v = v + 1 WHERE id = 3")), DEADLOCK);
    assert_eq!(value(&mut reader, 3), 31, "the transaction is over");

    // Who asks for it gets what InnoDB did.
    run(&mut reader, &["SET cistern_snapshot_isolation = OFF", "BEGIN"]);
    assert_eq!(value(&mut reader, 3), 31);
    run(&mut writer, &["UPDATE t SET v = 32 WHERE id = 3"]);
    run(&mut reader, &["UPDATE t SET v = v + 1 WHERE id = 3", "COMMIT"]);
    assert_eq!(value(&mut reader, 3), 33);
}

#[test]
fn read_committed_sees_each_commit_and_writes_over_it() {
    let (_directory, server) = start();
    let (mut reader, mut writer) = (connect(&server), connect(&server));
    run(&mut reader, &["SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED", "BEGIN"]);
    assert_eq!(value(&mut reader, 3), 30);
    run(&mut writer, &["BEGIN", "UPDATE t SET v = 40 WHERE id = 3"]);
    assert_eq!(value(&mut reader, 3), 30, "nothing of a transaction that goes on");
    run(&mut writer, &["COMMIT"]);
    assert_eq!(value(&mut reader, 3), 40);
    run(&mut reader, &["UPDATE t SET v = v + 1 WHERE id = 3"]);
    assert_eq!(value(&mut reader, 3), 41);
    run(&mut reader, &["COMMIT"]);
}

#[test]
fn a_statement_or_a_savepoint_is_undone_alone() {
    let (_directory, server) = start();
    let mut one = connect(&server);
    run(
        &mut one,
        &[
            "BEGIN",
            "UPDATE t SET v = 11 WHERE id = 1",
            "SAVEPOINT a",
            "DELETE FROM t WHERE id = 2",
            "SAVEPOINT b",
        ],
    );
    one.query_drop("INSERT INTO t VALUES (7, 70), (8, 80), (3, 0)").expect_err("3 is taken");
    let ids: Vec<i32> = one.query("SELECT id FROM t ORDER BY id").expect("a query");
    assert_eq!(ids, [1, 3], "nothing of the statement that failed");
    run(&mut one, &["INSERT INTO t VALUES (9, 90)", "ROLLBACK TO b", "ROLLBACK TO a", "COMMIT"]);
    let rows: Vec<(i32, i32)> = one.query("SELECT id, v FROM t ORDER BY id").expect("a query");
    assert_eq!(rows, [(1, 11), (2, 20), (3, 30)]);
}

/// Each row that an UPDATE met counted as changed, and one that took DEFAULT(a + 5) as a parameter took it for `a` of a row never read.
#[test]
fn an_update_counts_the_rows_that_it_changes() {
    let (_directory, server) = start();
    let mut connection = connect(&server);
    for (sql, changed) in [
        ("UPDATE t SET v = 10", 2),
        ("UPDATE t SET v = 10", 0),
        ("UPDATE t a JOIN t b ON a.id = b.id SET a.v = b.id + 9", 2),
        ("CREATE TABLE d (a INT, b INT DEFAULT (a + 5), c TEXT)", 0),
        ("INSERT INTO d VALUES (1, 1, 'x'), (2, 2, 'y')", 2),
        ("UPDATE d SET c = 'x'", 1),
        ("EXECUTE IMMEDIATE 'UPDATE d SET b = ?' USING DEFAULT", 2),
    ] {
        connection.query_drop(sql).expect(sql);
        assert_eq!(connection.affected_rows(), changed, "{sql}");
    }
    let rows: Vec<(i32, i32)> = connection.query("SELECT a, b FROM d ORDER BY a").expect("rows");
    assert_eq!(rows, [(1, 6), (2, 7)]);
}
