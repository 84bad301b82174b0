//! What `cistern serve` promises to the person who runs it: everything comes back, one writer at a time, and an end that
//! says why.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use acceptance::oracle::{self, Memory, Writers};
use acceptance::server::{Ended, Plan, Server};
use mysql::prelude::Queryable;
use mysql::{Conn, OptsBuilder};
use rustix::process::{Signal, kill_process};

fn start(plan: &Plan) -> Server {
    plan.start()
        .unwrap_or_else(|ended| panic!("cistern did not start (code {}):\n{}", ended.code(), ended.said))
}

fn refused(plan: &Plan) -> Ended {
    match plan.start() {
        Ok(_) => panic!("it started"),
        Err(ended) => ended,
    }
}

fn column(connection: &mut Conn, query: &str) -> Vec<String> {
    connection.query(query).unwrap_or_else(|error| panic!("{query}: {error}"))
}

fn files_below(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = vec![];
    let mut pending = vec![directory.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in fs::read_dir(&next).expect("the directory can be read") {
            let path = entry.expect("the directory can be read").path();
            if path.is_dir() {
                pending.push(path);
            } else {
                let name = path.strip_prefix(directory).expect("it is below").display().to_string();
                found.push((name, fs::read(&path).unwrap_or_default()));
            }
        }
    }
    found.sort();
    found
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
    let server = start(&plan);
    let mut root = server.connect().expect("it is ready");
    for statement in OBJECTS {
        root.query_drop(statement).unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
    drop(root);
    check_objects(&server);

    // A clean stop, the same directory.
    let ended = server.stop();
    assert_eq!(ended.code(), 0, "{}", ended.said);
    let mut server = start(&plan);
    check_objects(&server);

    // kill -9, the same directory: nothing acknowledged is lost, up to the last moment.
    server
        .connect()
        .expect("it is ready")
        .query_drop("INSERT INTO shop.log (what) VALUES ('last words')")
        .expect("a row");
    server.kill();
    let server = start(&plan);
    let words = "SELECT what FROM shop.log WHERE what = 'last words'";
    assert_eq!(column(&mut server.connect().expect("it is ready"), words), ["last words"]);
    check_objects(&server);

    // A clean stop, no directory.
    let ended = server.stop();
    assert_eq!(ended.code(), 0, "{}", ended.said);
    fs::remove_dir_all(&plan.data).expect("the data directory can be deleted");
    let mut server = start(&plan);
    check_objects(&server);

    // kill -9 and no directory, two seconds after the last change: all is there.
    std::thread::sleep(Duration::from_secs(2));
    server.kill();
    fs::remove_dir_all(&plan.data).expect("the data directory can be deleted");
    let server = start(&plan);
    check_objects(&server);
    drop(server);

    // Only the local cache of definitions is gone.
    for file in files_below(&plan.data.join("server")) {
        if file.0.ends_with(".frm") {
            fs::remove_file(plan.data.join("server").join(file.0)).expect("a cache may be deleted");
        }
    }
    check_objects(&start(&plan));
}

#[test]
fn the_newer_server_takes_over_and_the_older_one_says_so() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let plan = Plan::in_directory(scratch.path());
    let older = start(&plan);
    let mut connection = older.connect().expect("it is ready");
    connection.query_drop("CREATE DATABASE d").expect("a database");
    connection.query_drop("CREATE TABLE d.t (id INT PRIMARY KEY)").expect("a table");
    connection.query_drop("INSERT INTO d.t VALUES (1)").expect("a row");
    std::thread::sleep(Duration::from_millis(1_500));
    let newer = start(&Plan { data: scratch.path().join("other"), ..plan.clone() });
    newer
        .connect()
        .expect("it is ready")
        .query_drop("INSERT INTO d.t VALUES (2)")
        .expect("the newer one writes");
    // The older one may still acknowledge this one: it notices at its next write to the bucket.
    let unnoticed = connection.query_drop("INSERT INTO d.t VALUES (3)");
    let ended = older.wait(Duration::from_secs(20)).expect("the older one ends by itself");
    assert_eq!(ended.code(), 3, "{}", ended.said);
    assert!(ended.said.contains("fenced") && ended.said.contains("epoch"), "{}", ended.said);
    assert!(unnoticed.is_ok() || connection.query_drop("SELECT 1").is_err());
    let rows =
        column(&mut newer.connect().expect("it is ready"), "SELECT CAST(id AS CHAR) FROM d.t ORDER BY id");
    assert_eq!(rows, ["1", "2"]);
}

#[test]
fn a_server_stopped_in_the_middle_of_a_flush_damages_nothing_when_it_resumes() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let mut plan = Plan::in_directory(scratch.path());
    plan.server_options.push("--cistern-memtable-size=1M".into());
    let older = start(&plan);
    oracle::prepare(&mut older.connect().expect("it is ready")).expect("tables can be made");
    let writers = Writers::start(older.port(), vec![Memory::default(); 4]);
    std::thread::sleep(Duration::from_secs(4));
    let pid = older.mariadbd_pid().expect("it runs");
    kill_process(pid, Signal::STOP).expect("our own process");
    let before = files_below(&scratch.path().join("bucket"));
    let newer = start(&Plan { data: scratch.path().join("other"), ..plan.clone() });
    let mut connection = newer.connect().expect("it is ready");
    connection
        .query_drop("CREATE TABLE crash.after_takeover (id INT PRIMARY KEY)")
        .expect("the newer one writes");
    connection.query_drop("INSERT INTO crash.after_takeover VALUES (1), (2)").expect("the newer one writes");
    std::thread::sleep(Duration::from_millis(1_500));
    let published = files_below(&scratch.path().join("bucket"));
    kill_process(pid, Signal::CONT).expect("our own process");
    let ended = older.wait(Duration::from_secs(30)).expect("the older one ends by itself");
    assert_eq!(ended.code(), 3, "{}", ended.said);
    drop(writers.stop());
    // Nothing that was there when it resumed has changed or gone, but what the newer one itself cleans away.
    let after: std::collections::BTreeMap<_, _> =
        files_below(&scratch.path().join("bucket")).into_iter().collect();
    for (name, body) in published.iter().chain(&before) {
        if let Some(now) = after.get(name) {
            assert_eq!(now, body, "{name} was overwritten");
        }
    }
    drop(connection);
    let ended = newer.stop();
    assert_eq!(ended.code(), 0, "{}", ended.said);
    // The bucket alone is whole: sums add up, indexes agree.
    let third = start(&Plan { data: scratch.path().join("third"), ..plan.clone() });
    let mut connection = third.connect().expect("it is ready");
    let verdict = oracle::judge(&mut connection, &mut [], None).expect("the judge can read");
    assert_eq!(verdict.torn, 0, "{verdict:?}");
    assert_eq!(column(&mut connection, "SELECT CAST(COUNT(*) AS CHAR) FROM crash.after_takeover"), ["2"]);
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
    let server = start(&plan);
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
    let server = start(&Plan::in_directory(scratch.path()));
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
    let server = start(&plan);
    let mut root = server.connect().expect("it is ready");
    root.query_drop("CREATE DATABASE d").expect("a database");
    root.query_drop("CREATE TABLE d.t (id INT PRIMARY KEY)").expect("a table");
    root.query_drop("INSERT INTO d.t VALUES (1), (2)").expect("rows");
    drop(root);
    assert_eq!(server.stop().code(), 0);
    let bucket = scratch.path().join("bucket");

    let wrong = |bucket: &str| {
        refused(&Plan { bucket: bucket.to_owned(), data: scratch.path().join("w"), ..plan.clone() })
    };
    let ended = wrong("ftp://somewhere");
    assert_eq!(ended.code(), 2, "{}", ended.said);
    assert!(ended.said.contains("ftp"), "{}", ended.said);
    let ended = wrong("file:///no/such/directory/at/all");
    assert_eq!(ended.code(), 2, "{}", ended.said);
    assert!(ended.said.contains("/no/such"), "{}", ended.said);

    // A data directory that is a file.
    fs::write(scratch.path().join("file"), "x").expect("a file");
    let ended = refused(&Plan { data: scratch.path().join("file"), ..plan.clone() });
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
        let ended = refused(&Plan { data: scratch.path().join("x"), ..plan.clone() });
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
    let server = start(&Plan { data: scratch.path().join("y"), ..plan.clone() });
    assert_eq!(
        column(&mut server.connect().expect("ready"), "SELECT CAST(COUNT(*) AS CHAR) FROM d.t"),
        ["2"]
    );
}

#[test]
fn no_secret_is_on_a_command_line_or_in_a_variable() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let mut plan = Plan::in_directory(scratch.path());
    plan.environment = vec![("AWS_SECRET_ACCESS_KEY".into(), "s3cr3tv4lue".into())];
    let server = start(&plan);
    let command =
        fs::read(format!("/proc/{}/cmdline", server.mariadbd_pid().expect("it runs").as_raw_nonzero()));
    assert!(!String::from_utf8_lossy(&command.expect("our own process")).contains("s3cr3tv4lue"));
    let variables: Vec<(String, String)> =
        server.connect().expect("it is ready").query("SHOW VARIABLES").expect("variables");
    assert!(variables.iter().all(|(_, value)| !value.contains("s3cr3tv4lue")));
    assert!(!server.said().contains("s3cr3tv4lue"));
}

#[test]
fn a_start_leaves_the_temporary_tables_of_other_servers_alone() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let [first, second] = ["first", "second"].map(|name| scratch.path().join(name));
    for directory in [&first, &second] {
        fs::create_dir(directory).expect("a directory");
    }
    let first = start(&Plan::in_directory(&first));
    let mut root = first.connect().expect("it is ready");
    // mariadbd deletes every #sql… file in its tmpdir when it starts.
    let own: Option<String> = root.query_first("SELECT @@tmpdir").expect("a variable");
    let file = Path::new(&own.expect("a value")).join("#sql-temptable-of-the-first");
    fs::write(&file, "x").expect("a temporary directory can be written");
    let second = start(&Plan::in_directory(&second));
    second.connect().expect("it is ready").query_drop("SELECT 1").expect("it answers");
    assert!(file.exists(), "the second server deleted a file of the first");
}

#[test]
fn make_run_works_in_a_fresh_clone() {
    // The bucket is inside a data directory that nobody has made yet.
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let data = scratch.path().join("data");
    let bucket = format!("file://{}", data.join("bucket").display());
    let server = start(&Plan { bucket, data, ..Plan::in_directory(scratch.path()) });
    assert_eq!(column(&mut server.connect().expect("it is ready"), "SELECT 'here'"), ["here"]);
}
