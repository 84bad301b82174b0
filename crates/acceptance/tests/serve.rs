//! What `cistern serve` promises to the person who runs it: everything comes back, one writer at a time, and an end that
//! says why.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::{Duration, Instant};

use acceptance::objects::files_below;
use acceptance::server::{Plan, Server, free_port};
use mysql::prelude::Queryable;
use mysql::{Conn, OptsBuilder};
use rustix::process::{Pid, Signal, kill_process};

fn column(connection: &mut Conn, query: &str) -> Vec<String> {
    connection.query(query).unwrap_or_else(|error| panic!("{query}: {error}"))
}

const OBJECTS: [&str; 12] = [
    "CREATE DATABASE shop CHARACTER SET latin1",
    "CREATE TABLE shop.item (id INT AUTO_INCREMENT PRIMARY KEY, name VARCHAR(50), price DECIMAL(9,2), UNIQUE (name)) ENGINE=InnoDB",
    "INSERT INTO shop.item (name, price) VALUES ('tea', 3.10), ('milk', 1.05)",
    "CREATE TABLE shop.log (id INT AUTO_INCREMENT PRIMARY KEY, what TEXT)",
    "CREATE VIEW shop.cheap AS SELECT name FROM shop.item WHERE price < 2",
    "CREATE TRIGGER shop.noted AFTER INSERT ON shop.item FOR EACH ROW INSERT INTO shop.log (what) VALUES (NEW.name)",
    "CREATE PROCEDURE shop.add_item(n VARCHAR(50)) INSERT INTO shop.item (name, price) VALUES (n, 1)",
    "CREATE EVENT shop.nightly ON SCHEDULE EVERY 1 DAY DISABLE DO DELETE FROM shop.log",
    "CREATE USER 'ann'@'%' IDENTIFIED BY 'secret'",
    "GRANT SELECT ON shop.* TO 'ann'@'%'",
    "CREATE TABLE shop.part (id INT PRIMARY KEY, v INT) PARTITION BY HASH (id) PARTITIONS 4",
    "INSERT INTO shop.part VALUES (1, 1), (2, 2), (3, 3), (4, 4), (5, 5)",
];

fn check_objects(server: &Server) {
    let root = &mut server.connect().expect("it is ready");
    assert_eq!(column(root, "SELECT name FROM shop.item WHERE id < 3 ORDER BY id"), ["tea", "milk"]);
    assert_eq!(column(root, "SELECT name FROM shop.cheap WHERE name = 'milk'"), ["milk"]);
    assert_eq!(column(root, "SELECT CAST(SUM(v) AS CHAR) FROM shop.part"), ["15"]);
    assert_eq!(column(root, "SELECT EVENT_NAME FROM information_schema.EVENTS"), ["nightly"]);
    let charset =
        "SELECT DEFAULT_CHARACTER_SET_NAME FROM information_schema.SCHEMATA WHERE SCHEMA_NAME = 'shop'";
    assert_eq!(column(root, charset), ["latin1"]);
    root.query_drop("DELETE FROM shop.log").expect("a table");
    root.query_drop("DELETE FROM shop.item WHERE name = 'jam'").expect("a table");
    root.query_drop("CALL shop.add_item('jam')").expect("the procedure is there");
    assert_eq!(column(root, "SELECT what FROM shop.log"), ["jam"], "the trigger is there");
    let ann = OptsBuilder::new().ip_or_hostname(Some("127.0.0.1")).tcp_port(server.port()).user(Some("ann"));
    let mut ann = Conn::new(ann.pass(Some("secret")).prefer_socket(false)).expect("ann can log in");
    assert_eq!(column(&mut ann, "SELECT name FROM shop.item WHERE id = 1"), ["tea"]);
    ann.query_drop("DELETE FROM shop.item").expect_err("ann may only read");
}

#[test]
fn everything_is_in_the_bucket() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let plan = Plan::in_directory(scratch.path());
    let server = plan.started();
    let mut root = server.connect().expect("it is ready");
    for statement in OBJECTS {
        root.query_drop(statement).unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
    drop(root);
    check_objects(&server);

    // A clean stop, the same directory.
    let ended = server.stop();
    assert_eq!(ended.code(), 0, "{}", ended.said);
    let mut server = plan.started();
    check_objects(&server);

    // kill -9, the same directory: nothing acknowledged is lost, up to the last moment.
    server
        .connect()
        .expect("it is ready")
        .query_drop("INSERT INTO shop.log (what) VALUES ('last words')")
        .expect("a row");
    server.kill();
    let server = plan.started();
    let words = "SELECT what FROM shop.log WHERE what = 'last words'";
    assert_eq!(column(&mut server.connect().expect("it is ready"), words), ["last words"]);
    check_objects(&server);

    // A clean stop, no directory.
    let ended = server.stop();
    assert_eq!(ended.code(), 0, "{}", ended.said);
    fs::remove_dir_all(&plan.data).expect("the data directory can be deleted");
    let mut server = plan.started();
    check_objects(&server);

    // kill -9 and no directory, two seconds after the last change: all is there.
    std::thread::sleep(Duration::from_secs(2));
    server.kill();
    fs::remove_dir_all(&plan.data).expect("the data directory can be deleted");
    let server = plan.started();
    check_objects(&server);
    drop(server);

    // Only the local cache of definitions is gone.
    for file in files_below(&plan.data.join("server")).into_keys() {
        if file.ends_with(".frm") {
            fs::remove_file(plan.data.join("server").join(file)).expect("a cache may be deleted");
        }
    }
    check_objects(&plan.started());
}

#[test]
fn a_short_crash_test_loses_nothing() {
    let status = std::process::Command::new(env!("CARGO_BIN_EXE_crash"))
        .args(["--cycles=8", "--deletions=3"])
        .status();
    assert!(status.expect("the crash test starts").success());
}

#[test]
fn the_first_accounts_are_those_of_the_environment() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let mut plan = Plan::in_directory(scratch.path());
    let variables = [
        ("MYSQL_ROOT_PASSWORD", "r'\\oot"),
        ("MYSQL_DATABASE", "my_app"),
        ("MYSQL_USER", "app"),
        ("MYSQL_PASSWORD", "pw"),
    ];
    plan.environment = variables.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    let server = plan.started();
    let login = |user: &str, password: &str| {
        let options =
            OptsBuilder::new().ip_or_hostname(Some("127.0.0.1")).tcp_port(server.port()).prefer_socket(false);
        Conn::new(options.user(Some(user)).pass(Some(password)))
    };
    login("root", "").expect_err("root has a password");
    login("root", "r'\\oot")
        .expect("the password is right")
        .query_drop("SELECT * FROM mysql.global_priv")
        .expect("root");
    let mut app = login("app", "pw").expect("the user is there");
    app.query_drop("CREATE TABLE my_app.t (id INT)").expect("the user owns the database");
    app.query_drop("CREATE DATABASE myxapp").expect_err("and nothing else");
    let environment =
        fs::read(format!("/proc/{}/environ", server.mariadbd_pid().expect("it runs").as_raw_nonzero()));
    let environment = String::from_utf8_lossy(&environment.expect("our own process")).into_owned();
    assert!(!environment.contains("r'\\oot"), "the password is in the server's environment");
}

#[test]
fn without_a_password_root_is_for_this_machine_and_a_dump_for_innodb_loads_with_a_warning() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let server = Plan::in_directory(scratch.path()).started();
    let mut root = server.connect().expect("it is ready");
    let hosts = column(&mut root, "SELECT Host FROM mysql.global_priv WHERE User = 'root' ORDER BY Host");
    assert_eq!(hosts, ["127.0.0.1", "::1", "localhost"]);
    root.query_drop("CREATE DATABASE d").expect("a database");
    root.query_drop("CREATE TABLE d.t (id INT) ENGINE=InnoDB").expect("it loads");
    let warnings: Vec<(String, u32, String)> = root.query("SHOW WARNINGS").expect("warnings");
    assert!(warnings.iter().any(|warning| warning.2.contains("CISTERN")), "{warnings:?}");
    let engine = column(&mut root, "SELECT ENGINE FROM information_schema.TABLES WHERE TABLE_NAME = 't'");
    assert_eq!(engine, ["CISTERN"]);
}

#[test]
fn bad_input_is_refused_by_name_and_nothing_is_lost() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let plan = Plan::in_directory(scratch.path());
    let server = plan.started();
    let mut root = server.connect().expect("it is ready");
    root.query_drop("CREATE DATABASE d").expect("a database");
    root.query_drop("CREATE TABLE d.t (id INT PRIMARY KEY)").expect("a table");
    root.query_drop("INSERT INTO d.t VALUES (1), (2)").expect("rows");
    drop(root);
    assert_eq!(server.stop().code(), 0);
    let bucket = scratch.path().join("bucket");

    let wrong = |bucket: &str| {
        Plan { bucket: bucket.to_owned(), data: scratch.path().join("w"), ..plan.clone() }.refused()
    };
    let ended = wrong("ftp://somewhere");
    assert_eq!(ended.code(), 2, "{}", ended.said);
    assert!(ended.said.contains("ftp"), "{}", ended.said);
    let ended = wrong("file:///no/such/directory/at/all");
    assert_eq!(ended.code(), 2, "{}", ended.said);
    assert!(ended.said.contains("/no/such"), "{}", ended.said);

    // A data directory that is a file.
    fs::write(scratch.path().join("file"), "x").expect("a file");
    let ended = Plan { data: scratch.path().join("file"), ..plan.clone() }.refused();
    assert_eq!(ended.code(), 2, "{}", ended.said);

    // A manifest object with a flipped bit, then one of a version of tomorrow: refused by name, and unharmed once mended.
    let manifests: Vec<_> =
        files_below(&bucket).into_iter().filter(|file| file.0.contains("/manifest/")).collect();
    let (name, body) = manifests.last().expect("there is a manifest");
    let path = bucket.join(name);
    let damage = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = body.clone();
        change(&mut bytes);
        fs::write(&path, bytes).expect("the bucket is ours");
        let ended = Plan { data: scratch.path().join("x"), ..plan.clone() }.refused();
        fs::remove_dir_all(scratch.path().join("x")).expect("it was made");
        assert_eq!(ended.code(), 2, "{}", ended.said);
        assert!(ended.said.contains("manifest"), "{}", ended.said);
    };
    damage(&|bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
    });
    damage(&|bytes| bytes.truncate(bytes.len() / 2));
    fs::write(&path, body).expect("the bucket is ours");
    let server = Plan { data: scratch.path().join("y"), ..plan.clone() }.started();
    assert_eq!(
        column(&mut server.connect().expect("ready"), "SELECT CAST(COUNT(*) AS CHAR) FROM d.t"),
        ["2"]
    );
}

#[test]
fn a_start_leaves_the_temporary_tables_of_other_servers_alone() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let [first, second] = ["first", "second"].map(|name| scratch.path().join(name));
    for directory in [&first, &second] {
        fs::create_dir(directory).expect("a directory");
    }
    let first = Plan::in_directory(&first).started();
    let mut root = first.connect().expect("it is ready");
    // mariadbd deletes every #sql… file in its tmpdir when it starts.
    let own: Option<String> = root.query_first("SELECT @@tmpdir").expect("a variable");
    let file = Path::new(&own.expect("a value")).join("#sql-temptable-of-the-first");
    fs::write(&file, "x").expect("a temporary directory can be written");
    let second = Plan::in_directory(&second).started();
    second.connect().expect("it is ready").query_drop("SELECT 1").expect("it answers");
    assert!(file.exists(), "the second server deleted a file of the first");
}

#[test]
fn make_run_works_in_a_fresh_clone() {
    // The bucket is inside a data directory that nobody has made yet.
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let data = scratch.path().join("data");
    let bucket = format!("file://{}", data.join("bucket").display());
    let server = Plan { bucket, data, ..Plan::in_directory(scratch.path()) }.started();
    assert_eq!(column(&mut server.connect().expect("it is ready"), "SELECT 'here'"), ["here"]);
}

#[test]
fn a_server_whose_log_nobody_reads_any_more_stops_when_it_is_asked_to() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let mut child = Plan::in_directory(scratch.path()).command(free_port()).spawn().expect("cistern starts");
    let mut log = BufReader::new(child.stderr.take().expect("stderr is piped")).lines();
    assert!(log.any(|line| line.expect("text").starts_with("cistern: ready")), "it ended");
    drop(log);
    kill_process(Pid::from_child(&child), Signal::TERM).expect("our own child can be signalled");
    let end = Instant::now() + Duration::from_secs(60);
    let status = loop {
        match child.try_wait().expect("our own child can be waited for") {
            Some(status) => break status,
            None if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
            None => {
                child.kill().expect("it is there");
                panic!("it does not stop");
            }
        }
    };
    assert_eq!(status.code(), Some(0), "a clean end");
}
