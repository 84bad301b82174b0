//! Many rows at once: LOAD DATA, INSERT … SELECT, CREATE TABLE … SELECT, ALTER TABLE and index builds beside InnoDB's, killed and interrupted.
//!
//! Memtables are so small here that a few thousand rows are many.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use acceptance::company::Random;
use acceptance::server::{Peer, Plan, connect};
use mysql::prelude::Queryable;
use mysql::{Conn, Error, Row, Value};
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

const ROWS: u64 = 6_000;

const COLUMNS: &str = "(id INT NOT NULL, n INT, word VARCHAR(40) COLLATE utf8mb4_general_ci, name VARCHAR(30) CHARACTER SET latin1 COLLATE latin1_swedish_ci, \
    code CHAR(12) COLLATE utf8mb4_bin NOT NULL, amount DECIMAL(9,2), at DATETIME(3), share DOUBLE, body MEDIUMTEXT, \
    sized VARBINARY(300), kind ENUM('a','b','c') NOT NULL DEFAULT 'b', deutsch VARCHAR(20) COLLATE utf8mb4_german2_ci";

fn plan(directory: &Path) -> Plan {
    let mut plan = Plan::in_directory(directory);
    plan.server_options.push("--cistern-memtable-size=512K".into());
    plan
}

/// Rows in a scattered order, as LOAD DATA wants them. Ids come once; so do codes.
fn write_rows(path: &Path, seed: u64) {
    let random = &mut Random::new(seed);
    let words = ["Straße", "strasse", "ÄPFEL", "äpfel", "", " ", "zoë", "Zoe ", "日本", "a", "A", "b\u{301}"];
    let mut text = String::new();
    for n in 0..ROWS {
        let id = n * 7919 % ROWS;
        let mut maybe = |make: &dyn Fn(&mut Random) -> String| {
            if random.below(8) == 0 { "\\N".to_owned() } else { make(random) }
        };
        let number = maybe(&|random| (random.below(500) as i64 - 250).to_string());
        let word = maybe(&|random| format!("{}{}", words[random.below(12) as usize], random.below(300)));
        let name = maybe(&|random| ["Ångström", "angstrom", "x", "X "][random.below(4) as usize].to_owned());
        let amount = maybe(&|random| format!("{}.{:02}", random.below(99_999), random.below(100)));
        let at = maybe(&|random| {
            format!("2026-0{}-1{} 11:12:13.{:03}", 1 + random.below(9), random.below(9), random.below(1000))
        });
        let share = maybe(&|random| format!("{}", random.below(1000) as f64 / 7.0 - 60.0));
        let body = maybe(&|random| {
            let length = if n % 1500 == 1 { 400_000 } else { random.below(200) as usize };
            "the quick brown fox ".repeat(length / 20 + 1)[..length].to_owned()
        });
        let sized = maybe(&|random| "z".repeat(random.below(300) as usize));
        let deutsch = maybe(&|random| words[random.below(9) as usize].to_owned());
        let kind = ["a", "b", "c"][random.below(3) as usize];
        writeln!(
            text,
            "{id}\t{number}\t{word}\t{name}\tc{:08x}\t{amount}\t{at}\t{share}\t{body}\t{sized}\t{kind}\t{deutsch}",
            id.wrapping_mul(0x9e37_79b1) as u32
        )
        .expect("memory");
    }
    std::fs::write(path, text).expect("the directory can be written");
}

/// What a client learns of a statement.
#[derive(Debug, PartialEq)]
enum Answer {
    Rows(Vec<Vec<Value>>),
    Done { affected: u64, info: String },
    Refused { code: u16, message: String },
}

fn ask(conn: &mut Conn, statement: &str) -> Answer {
    let done = match conn.query_iter(statement) {
        Ok(mut result) if result.columns().as_ref().is_empty() => {
            let info = result.info_str().into_owned();
            let affected = result.affected_rows();
            match result.by_ref().find_map(Result::err) {
                None => Ok(Answer::Done { affected, info }),
                Some(error) => Err(error),
            }
        }
        Ok(result) => result.map(|row| row.map(Row::unwrap)).collect::<Result<Vec<_>, _>>().map(Answer::Rows),
        Err(error) => Err(error),
    };
    match done {
        Ok(answer) => answer,
        Err(Error::MySqlError(error)) => Answer::Refused { code: error.code, message: error.message },
        Err(error) => panic!("{statement}: {error}"),
    }
}

struct Both {
    ours: Conn,
    theirs: Conn,
}

impl Both {
    /// Does it on both, and returns what both answered.
    fn ask(&mut self, statement: &str) -> Answer {
        let ours = ask(&mut self.ours, statement);
        let theirs = ask(&mut self.theirs, statement);
        assert_eq!(short(&ours), short(&theirs), "{statement}: ours and InnoDB's answer");
        assert!(ours == theirs, "{statement}: rows differ somewhere");
        ours
    }
    fn done(&mut self, statement: &str) {
        let answer = self.ask(statement);
        assert!(!matches!(answer, Answer::Refused { .. }), "{statement}: {answer:?}");
    }
    fn refused(&mut self, code: u16, statement: &str) {
        let answer = self.ask(statement);
        assert!(matches!(answer, Answer::Refused { code: c, .. } if c == code), "{statement}: {answer:?}");
    }
    /// All rows, by the table and by each of its indexes.
    fn compare(&mut self, table: &str) {
        let keys: Vec<(String, u64)> = self
            .ours
            .query(format!(
                "SELECT INDEX_NAME, COUNT(*) FROM information_schema.STATISTICS \
                 WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = '{table}' GROUP BY 1 ORDER BY 1"
            ))
            .expect("the server tells");
        self.done(&format!("SELECT * FROM {table} USE INDEX () ORDER BY code, id"));
        for (key, _) in keys {
            let columns: Vec<String> = self
                .ours
                .query(format!(
                    "SELECT COLUMN_NAME FROM information_schema.STATISTICS WHERE TABLE_SCHEMA = DATABASE() \
                     AND TABLE_NAME = '{table}' AND INDEX_NAME = '{key}' ORDER BY SEQ_IN_INDEX"
                ))
                .expect("the server tells");
            let first = &columns[0];
            self.done(&format!("SELECT COUNT(*) FROM {table} FORCE INDEX (`{key}`) WHERE `{first}` IS NULL OR `{first}` >= ''"));
            self.done(&format!(
                "SELECT id, `{first}` FROM {table} FORCE INDEX (`{key}`) WHERE `{first}` > '5' ORDER BY 2, 1"
            ));
        }
        self.done(&format!("SHOW CREATE TABLE {table}").replace("SHOW CREATE TABLE", "SELECT COUNT(*) FROM"));
        self.done(&format!("CHECK TABLE {table}"));
    }
}

/// Rows are too many to print.
fn short(answer: &Answer) -> String {
    match answer {
        Answer::Rows(rows) => format!(
            "{} rows, first {:?}",
            rows.len(),
            rows.first().map(|row| format!("{row:?}").chars().take(300).collect::<String>())
        ),
        other => format!("{other:?}"),
    }
}

fn loaded_bytes(server: &mut Conn) -> u64 {
    let row: Option<(String, u64)> =
        server.query_first("SHOW GLOBAL STATUS LIKE 'Cistern_loaded_bytes'").expect("it answers");
    row.expect("there is such a counter").1
}

#[test]
fn what_comes_together_answers_as_innodb_does() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let server = plan(scratch.path()).started();
    let peer = Peer::start(scratch.path(), &[]);
    let file = scratch.path().join("rows.txt");
    write_rows(&file, 1);
    let mut both = Both { ours: server.connect().expect("it is ready"), theirs: peer.connect() };
    let mut loaded = 0;
    let mut expect_load = |both: &mut Both, what: &str| {
        let now = loaded_bytes(&mut both.ours);
        assert!(now > loaded, "{what} did not take the quick way");
        loaded = now;
    };
    for statement in [
        "CREATE DATABASE d CHARACTER SET utf8mb4",
        "USE d",
        "SET SESSION sql_mode = 'STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO'",
    ] {
        both.done(statement);
    }
    let load = format!("LOAD DATA INFILE '{}' INTO TABLE", file.display());
    both.done(&format!("CREATE TABLE t {COLUMNS}, PRIMARY KEY (id), UNIQUE (code), KEY (n), KEY w (word(5), n), KEY (name DESC), KEY (body(10)), KEY (deutsch, amount))"));
    both.done(&format!("{load} t"));
    expect_load(&mut both, "LOAD DATA");
    both.compare("t");
    // A second time there are rows: one by one, and refused at the first.
    both.refused(1062, &format!("{load} t"));
    both.compare("t");

    for (name, keys) in [("h", ""), ("p", ", PRIMARY KEY (code, id), KEY (at), KEY (share)")] {
        both.done(&format!("CREATE TABLE {name} {COLUMNS}{keys})"));
        both.done(&format!("INSERT INTO {name} SELECT * FROM t ORDER BY id DESC"));
        expect_load(&mut both, "INSERT … SELECT");
        both.compare(name);
    }
    both.done("INSERT INTO h SELECT * FROM h WHERE id < 3000");
    both.done("CREATE TABLE made (PRIMARY KEY (id), KEY (sized)) SELECT * FROM t");
    expect_load(&mut both, "CREATE TABLE … SELECT");
    both.compare("made");

    // Each statement finds the value that comes twice; nothing of it stays.
    both.done("UPDATE h SET code = 'twice' WHERE id IN (4000, 5000)");
    for unique in ["UNIQUE u (code)", "PRIMARY KEY (code)", "UNIQUE (n), UNIQUE u (code(3))"] {
        both.done(&format!("CREATE TABLE e {COLUMNS}, {unique})"));
        let answer = (
            ask(&mut both.ours, "INSERT INTO e SELECT * FROM h"),
            ask(&mut both.theirs, "INSERT INTO e SELECT * FROM h"),
        );
        assert!(
            matches!(answer, (Answer::Refused { code: 1062, .. }, Answer::Refused { code: 1062, .. })),
            "{answer:?}"
        );
        both.done("SELECT COUNT(*) FROM e");
        both.done("INSERT INTO e SELECT * FROM t WHERE id = 7");
        both.done("SELECT id, n, code FROM e");
        both.done("DROP TABLE e");
    }
    both.done(&format!("CREATE TABLE e {COLUMNS}, UNIQUE (code))"));
    both.refused(1062, "INSERT INTO e SELECT * FROM h WHERE id >= 3000");
    both.done("INSERT IGNORE INTO e SELECT * FROM h WHERE id >= 3000");
    both.compare("e");
    both.done("TRUNCATE e");
    both.done("REPLACE INTO e SELECT * FROM h WHERE id >= 3000");
    both.done("SELECT COUNT(*) FROM e");
    // InnoDB names another value here, of a row that it happens to have at hand.
    let create = "CREATE TABLE f (UNIQUE (code)) SELECT * FROM h WHERE id >= 3000";
    let (ours, theirs) = (ask(&mut both.ours, create), ask(&mut both.theirs, create));
    assert!(matches!(theirs, Answer::Refused { code: 1062, .. }), "{theirs:?}");
    let message = "Duplicate entry 'twice' for key 'code'".to_owned();
    assert_eq!(ours, Answer::Refused { code: 1062, message });
    both.refused(1146, "SELECT COUNT(*) FROM f");

    // In a transaction of several statements later ones see the rows, and a rollback takes them back.
    both.done("TRUNCATE e");
    both.done("BEGIN");
    both.done("INSERT INTO e SELECT * FROM t");
    both.done("SELECT COUNT(*), SUM(n) FROM e");
    both.done("ROLLBACK");
    both.done("SELECT COUNT(*), SUM(n) FROM e");

    // AUTO_INCREMENT.
    both.done("CREATE TABLE a (id INT AUTO_INCREMENT PRIMARY KEY, code VARCHAR(20), KEY (code))");
    both.done("INSERT INTO a (code) SELECT code FROM t ORDER BY id");
    both.done("SELECT LAST_INSERT_ID(), ROW_COUNT()");
    expect_load(&mut both, "INSERT … SELECT with AUTO_INCREMENT");
    both.compare("a");
    both.done("CREATE TABLE a2 LIKE a");
    both.done("INSERT INTO a2 SELECT id * 3, code FROM a");
    both.done("INSERT INTO a2 (code) VALUES ('next')");
    both.done("SELECT MAX(id) FROM a2");

    // A trigger sees each row, in order.
    both.done(&format!("CREATE TABLE g {COLUMNS}, PRIMARY KEY (id))"));
    both.done("CREATE TRIGGER g_before BEFORE INSERT ON g FOR EACH ROW SET NEW.n = NEW.id * 2");
    both.done("INSERT INTO g SELECT * FROM t");
    both.compare("g");
}

#[test]
fn tables_are_altered_as_innodb_alters_them() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let server = plan(scratch.path()).started();
    let peer = Peer::start(scratch.path(), &[]);
    let file = scratch.path().join("rows.txt");
    write_rows(&file, 2);
    let mut both = Both { ours: server.connect().expect("it is ready"), theirs: peer.connect() };
    for statement in ["CREATE DATABASE d CHARACTER SET utf8mb4", "USE d"] {
        both.done(statement);
    }
    both.done(&format!("CREATE TABLE t {COLUMNS}, PRIMARY KEY (id))"));
    both.done(&format!("LOAD DATA INFILE '{}' INTO TABLE t", file.display()));
    let mut loaded = loaded_bytes(&mut both.ours);
    // Those that write rows or entries anew have to have taken the quick way.
    for (alter, loads) in [
        ("ALTER TABLE t ADD INDEX i_n (n), ALGORITHM=INPLACE", true),
        (
            "ALTER TABLE t ADD UNIQUE u_code (code), ADD INDEX i_word (word(4) DESC, n), ADD INDEX (body(20)), ALGORITHM=INPLACE",
            true,
        ),
        ("CREATE INDEX i_at ON t (at, share) ALGORITHM=INPLACE", true),
        ("ALTER TABLE t DROP INDEX i_n, ADD INDEX i_n (n, deutsch), ALGORITHM=INPLACE", true),
        ("ALTER TABLE t RENAME INDEX i_at TO i_when, ADD INDEX i_sized (sized(9)), ALGORITHM=INPLACE", true),
        ("ALTER TABLE t DROP INDEX i_word, ALGORITHM=INPLACE", false),
        ("ALTER TABLE t ADD COLUMN more INT NOT NULL DEFAULT 7 AFTER n", true),
        ("ALTER TABLE t MODIFY n BIGINT", true),
        ("ALTER TABLE t DROP COLUMN more, ADD INDEX i_name (name)", true),
        ("ALTER TABLE t FORCE", true),
        ("ALTER TABLE t DROP PRIMARY KEY", true),
        ("ALTER TABLE t ADD PRIMARY KEY (code)", true),
        ("ALTER TABLE t DROP PRIMARY KEY, ADD PRIMARY KEY (id DESC)", true),
        ("ALTER TABLE t CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci", true),
        ("ALTER TABLE t ADD INDEX i_deutsch (deutsch), ALGORITHM=INPLACE", true),
        ("ALTER TABLE t ADD COLUMN v INT AS (id * 2) VIRTUAL, ADD INDEX i_v (v)", true),
        ("ALTER TABLE t DROP INDEX i_v, DROP COLUMN v", true),
    ] {
        let (ours, theirs) = (ask(&mut both.ours, alter), ask(&mut both.theirs, alter));
        // How many rows were copied is the engine's affair.
        assert!(
            matches!((&ours, &theirs), (Answer::Done { .. }, Answer::Done { .. })),
            "{alter}: {ours:?} {theirs:?}"
        );
        let now = loaded_bytes(&mut both.ours);
        assert!(!loads || now > loaded, "{alter} did not take the quick way");
        loaded = now;
        both.compare("t");
    }
    both.done("INSERT INTO t (id, code, kind, n) VALUES (900000, 'late', 'a', 5)");
    both.done("UPDATE t SET n = n + 1 WHERE id % 7 = 0");
    both.done("DELETE FROM t WHERE id % 5 = 0");
    both.compare("t");

    // What can not be unique is refused, with the value, and changes nothing.
    both.done("UPDATE t SET sized = CONCAT('s', id), word = CONCAT('w', id)");
    both.done("UPDATE t SET sized = 'twice', word = 'Twice' WHERE id IN (101, 4001)");
    for alter in [
        "ALTER TABLE t ADD UNIQUE u_sized (sized), ALGORITHM=INPLACE",
        "ALTER TABLE t ADD INDEX i_more (amount), ADD UNIQUE u_word (word), ALGORITHM=INPLACE",
        "ALTER TABLE t ADD UNIQUE u_word (word(30)), ALGORITHM=INPLACE",
        "ALTER TABLE t DROP PRIMARY KEY, ADD PRIMARY KEY (sized)",
    ] {
        let (ours, theirs) = (ask(&mut both.ours, alter), ask(&mut both.theirs, alter));
        assert!(matches!(ours, Answer::Refused { code: 1062 | 1138, .. }), "{alter}: {ours:?}");
        assert_eq!(ours, theirs, "{alter}");
        both.compare("t");
    }
    for (alter, why) in [
        ("ADD INDEX (amount), ADD COLUMN more INT", "nothing but indexes"),
        ("DROP PRIMARY KEY, ADD PRIMARY KEY (id), ADD INDEX (amount)", "nothing but indexes"),
        ("ADD UNIQUE (body)", "the server itself checks"),
    ] {
        let answer = ask(&mut both.ours, &format!("ALTER TABLE t {alter}, ALGORITHM=INPLACE"));
        let Answer::Refused { code: 1846, message } = answer else { panic!("{alter}: {answer:?}") };
        assert!(message.contains(why), "{alter}: {message}");
    }
    for alter in ["ADD INDEX i_more (amount)", "DROP INDEX i_deutsch"] {
        let alter = format!("ALTER TABLE t {alter}, ALGORITHM=INSTANT");
        let (ours, theirs) = (ask(&mut both.ours, &alter), ask(&mut both.theirs, &alter));
        for answer in [ours, theirs] {
            let Answer::Refused { code: 1845 | 1846, message } = answer else {
                panic!("{alter}: {answer:?}")
            };
            assert!(message.contains("Try ALGORITHM=NOCOPY"), "{alter}: {message}");
        }
    }
    both.done("ALTER TABLE t ADD INDEX i_more (amount), ALGORITHM=NOCOPY, LOCK=SHARED");
    both.compare("t");
    both.done("CREATE TABLE empty (id INT PRIMARY KEY, code INT, KEY (code))");
    both.done("ALTER TABLE empty ADD INDEX (id, code)");
    both.done("ALTER TABLE empty ADD COLUMN c INT");
    both.done("INSERT INTO empty SELECT id, id, id FROM t");
    both.compare("empty");
}

/// Statements that write many rows or entries, what makes their stage, and what tells that they have happened.
const WORKS: [(&str, &str, &str); 5] = [
    ("load", "LOAD", "SELECT COUNT(*) > 0 FROM empty"),
    ("insert", "INSERT INTO empty SELECT * FROM t", "SELECT COUNT(*) > 0 FROM empty"),
    (
        "create",
        "CREATE TABLE made (KEY (n)) SELECT * FROM t",
        "SELECT COUNT(*) > 0 FROM information_schema.TABLES WHERE TABLE_NAME = 'made'",
    ),
    (
        "copy",
        "ALTER TABLE t ADD COLUMN more INT FIRST",
        "SELECT COUNT(*) > 0 FROM information_schema.COLUMNS WHERE COLUMN_NAME = 'more'",
    ),
    (
        "index",
        "ALTER TABLE t ADD INDEX i_new (word, n)",
        "SELECT COUNT(*) > 0 FROM information_schema.STATISTICS WHERE INDEX_NAME = 'i_new'",
    ),
];

fn prepare(conn: &mut Conn, file: &Path) {
    for statement in [
        "CREATE DATABASE d CHARACTER SET utf8mb4".to_owned(),
        "USE d".to_owned(),
        format!("CREATE TABLE t {COLUMNS}, PRIMARY KEY (id), KEY (n))"),
        format!("CREATE TABLE empty {COLUMNS}, PRIMARY KEY (id), KEY (n))"),
        format!("LOAD DATA INFILE '{}' INTO TABLE t", file.display()),
    ] {
        conn.query_drop(&statement).unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}

fn rows_of(conn: &mut Conn, from: &str) -> u64 {
    conn.query_first(format!("SELECT COUNT(*) FROM {from}")).expect("it answers").expect("a row")
}

/// The work has happened as a whole, or not at all; the answer is which.
fn judge(conn: &mut Conn, work: &str, happened: &str) -> bool {
    conn.query_drop("USE d").expect("the database is there");
    let happened: bool = conn.query_first(happened).expect("it answers").expect("a row");
    assert_eq!(rows_of(conn, "t"), ROWS, "{work}");
    assert_eq!(rows_of(conn, "t FORCE INDEX (n) WHERE n IS NULL OR n < 9999"), ROWS, "{work}");
    let expected = |yes: bool| if yes { ROWS } else { 0 };
    let filled = matches!(work, "load" | "insert") && happened;
    assert_eq!(rows_of(conn, "empty"), expected(filled), "{work}");
    assert_eq!(
        rows_of(conn, "empty FORCE INDEX (n) WHERE n IS NULL OR n < 9999"),
        expected(filled),
        "{work}"
    );
    if happened && work == "create" {
        assert_eq!(rows_of(conn, "made FORCE INDEX (n) WHERE n IS NULL OR n < 9999"), ROWS, "{work}");
    }
    if happened && work == "index" {
        assert_eq!(rows_of(conn, "t FORCE INDEX (i_new) WHERE word IS NULL OR word >= ''"), ROWS, "{work}");
    }
    let tables: Vec<String> = conn.query("SHOW TABLES").expect("it answers");
    assert!(tables.iter().all(|table| !table.contains("sql")), "{work}: {tables:?}");
    happened
}

fn statement_of(statement: &str, file: &Path) -> String {
    match statement {
        "LOAD" => format!("LOAD DATA INFILE '{}' INTO TABLE empty", file.display()),
        other => other.to_owned(),
    }
}

fn copy(from: &Path, to: &Path) {
    let done = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp runs");
    assert!(done.success(), "a directory can be copied");
}

/// Where a server is killed.
#[derive(Clone, Copy, Debug)]
enum Kill {
    /// The n-th tree is in the bucket, and no transaction names it.
    InLoad(u64),
    /// So long after the statement began.
    After(Duration),
}

#[test]
fn a_kill_in_the_middle_leaves_all_of_it_or_nothing() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let file = scratch.path().join("rows.txt");
    write_rows(&file, 3);
    let prepared = scratch.path().join("prepared");
    std::fs::create_dir(&prepared).expect("a directory");
    let server = plan(&prepared).started();
    prepare(&mut server.connect().expect("it is ready"), &file);
    assert_eq!(server.stop().code(), 0);
    let mut random = Random::new(4);
    for (number, (work, statement, happened)) in WORKS.into_iter().enumerate() {
        let moment = Duration::from_millis(20 + random.below(400));
        for (turn, kill) in [Kill::InLoad(1), Kill::InLoad(2), Kill::After(moment)].into_iter().enumerate() {
            let loses_directory = (number + turn) % 2 == 0;
            let directory = scratch.path().join("run");
            copy(&prepared, &directory);
            let plan = plan(&directory);
            let mut armed = plan.clone();
            if let Kill::InLoad(pass) = kill {
                armed.environment.push(("CISTERN_TEST_POINT".into(), format!("kill@in-load#{pass}")));
            }
            let mut server = armed.started();
            let (port, statement) = (server.port(), statement_of(statement, &file));
            let client = std::thread::spawn(move || {
                let mut conn = connect(port).expect("it is ready");
                conn.query_drop("USE d").and_then(|()| conn.query_drop(statement)).is_ok()
            });
            if let Kill::After(moment) = kill {
                std::thread::sleep(moment);
                server.kill();
            }
            let answered = client.join().expect("the client does not panic");
            drop(server);
            if loses_directory {
                std::fs::remove_dir_all(&plan.data).expect("the data directory can be deleted");
            }
            let server = plan.started();
            let mut conn = server.connect().expect("it is ready");
            // The server's own log says that the table was being made; it is lost with the directory.
            let half_made = work == "create" && loses_directory;
            if half_made {
                conn.query_drop("DROP TABLE IF EXISTS d.made").expect("it can be dropped");
            }
            let happened = judge(&mut conn, work, happened);
            println!(
                "{work} {kill:?}, directory lost: {loses_directory}: answered {answered}, happened {happened}"
            );
            match kill {
                // An index is one tree.
                Kill::InLoad(2) if work == "index" => {
                    assert!(answered && (happened || loses_directory), "{work}")
                }
                Kill::InLoad(_) => assert!(!answered && !happened, "{work} {kill:?}"),
                Kill::After(_) => {
                    assert!(happened || !answered || loses_directory, "{work}: it was acknowledged")
                }
            }
            drop(conn);
            assert_eq!(server.stop().code(), 0);
            std::fs::remove_dir_all(&directory).expect("a directory of this test");
        }
    }
}

fn progress_of(conn: &mut Conn, id: u32) -> Option<(String, f64)> {
    let query = format!(
        "SELECT INFO, PROGRESS FROM information_schema.PROCESSLIST WHERE ID = {id} AND INFO IS NOT NULL"
    );
    conn.query_first(query).expect("it answers")
}

/// The bucket answers slowly, so all of these take long.
#[test]
fn kill_query_ends_them_and_leaves_nothing() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let file = scratch.path().join("rows.txt");
    write_rows(&file, 5);
    let mut plan = plan(scratch.path());
    let slow = acceptance::s3::Weather::slow(&scratch.path().join("objects"), Duration::from_millis(500));
    slow.serve(&mut plan);
    let server = plan.started();
    let mut root = server.connect().expect("it is ready");
    prepare(&mut root, &file);
    let mut seen = 0;
    for (work, statement, happened) in WORKS {
        let mut conn = server.connect().expect("it is ready");
        conn.query_drop("USE d").expect("the database is there");
        let id = conn.connection_id();
        let statement = statement_of(statement, &file);
        let client = std::thread::spawn(move || {
            let result = conn.query_drop(statement);
            (result, Instant::now())
        });
        std::thread::sleep(Duration::from_millis(500));
        seen += u32::from(progress_of(&mut root, id).is_some_and(|(_, progress)| progress > 0.0));
        let killed = Instant::now();
        root.query_drop(format!("KILL QUERY {id}")).expect("it can be killed");
        let (result, ended) = client.join().expect("the client does not panic");
        let refused = matches!(&result, Err(Error::MySqlError(error)) if error.code == 1317);
        println!("{work}: {result:?} after {:?}", ended - killed);
        assert!(refused || result.is_ok(), "{work}: {result:?}");
        let happened = judge(&mut root, work, happened);
        assert_eq!(happened, result.is_ok(), "{work}");
    }
    println!("progress was seen {seen} times");
}
