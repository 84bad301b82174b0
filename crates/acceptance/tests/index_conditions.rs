//! Conditions that entries of an index answer before the row is fetched, and rows that are read in batches: the same rows as without,
//! and fewer of them fetched.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use acceptance::company::Random;
use acceptance::server::{Peer, Plan, Server};
use mysql::prelude::Queryable;
use mysql::{Conn, Row};

const ROWS: u64 = 600;
const QUERIES: usize = 400;

const OFF: &str =
    "SET optimizer_switch='index_condition_pushdown=off,mrr=off,mrr_sort_keys=off', join_cache_level=2";
const ON: &str =
    "SET optimizer_switch='index_condition_pushdown=on,mrr=off,mrr_sort_keys=off', join_cache_level=2";
/// Entries first, then rows in primary order; joins by batches of keys.
const BATCHED: &str = "SET optimizer_switch='index_condition_pushdown=on,mrr=on,mrr_cost_based=off,mrr_sort_keys=on', join_cache_level=6";

/// Columns in all kinds of company: in whole and by their start, ascending and not, beside a primary key of a number, of text whose bytes
/// an entry does not give back, and beside none.
const COLUMNS: &str = "a INT NULL, b SMALLINT UNSIGNED NULL, c VARCHAR(12) COLLATE utf8mb4_general_ci NULL, d DECIMAL(8,2) NOT NULL, e DATE NULL,
    f CHAR(6) COLLATE utf8mb4_bin NULL, g DOUBLE NULL, h VARCHAR(8) COLLATE utf8mb4_unicode_ci NOT NULL, i ENUM('x','y','z') NULL, n TEXT NULL,
    v INT AS (b + 1) VIRTUAL, pad VARCHAR(200) NOT NULL,
    KEY ab (a, b), KEY cb (c, b), KEY efd (e, f, d), KEY prefix (c(3), a), KEY down (d DESC, b), KEY gh (g, h), UNIQUE KEY ui (a, id), UNIQUE KEY un (i, c, id),
    KEY text (a, n(4), b), KEY computed (a, v)";
const PRIMARIES: [&str; 3] = [
    "id INT NOT NULL PRIMARY KEY",
    "id VARCHAR(20) COLLATE utf8mb4_general_ci NOT NULL PRIMARY KEY",
    "id INT NOT NULL",
];

fn start() -> (tempfile::TempDir, Server, Conn) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let server = Plan::in_directory(directory.path()).started();
    let mut root = server.connect().expect("it is ready");
    root.query_drop("CREATE DATABASE o; USE o; SET sql_mode='', NAMES utf8mb4").expect("a database");
    (directory, server, root)
}

fn of<'a>(dice: &mut Random, some: &[&'a str]) -> &'a str {
    some[dice.below(some.len() as u64) as usize]
}

fn number(dice: &mut Random, below: u64) -> String {
    dice.below(below).to_string()
}

fn word(dice: &mut Random) -> String {
    let letters = ["a", "A", "b", "ä", "B ", "ß"];
    let length = 1 + dice.below(3);
    let word: String = (0..length).map(|_| of(dice, &letters)).collect();
    format!("'{word}'")
}

fn value(dice: &mut Random, column: &str) -> String {
    match column {
        "a" => number(dice, 20),
        "b" => number(dice, 12),
        "d" => format!("{}.{}", dice.below(9), dice.below(4) * 25),
        "e" => format!("'2026-01-{:02}'", 1 + dice.below(15)),
        "g" => format!("{}.5", dice.below(10) as i64 - 5),
        "i" => format!("'{}'", of(dice, &["x", "y", "z"])),
        "v" => number(dice, 13),
        _ => word(dice),
    }
}

fn fill(root: &mut Conn, dice: &mut Random, table: &str, text_id: bool) {
    for chunk in 0..ROWS / 100 {
        let rows: Vec<String> = (0..100)
            .map(|row| {
                let id = chunk * 100 + row;
                let mut row = vec![if text_id { format!("'K{id}'") } else { id.to_string() }];
                for column in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "n"] {
                    let null = dice.below(8) == 0 && !["d", "h"].contains(&column);
                    row.push(if null { "NULL".to_owned() } else { value(dice, column) });
                }
                format!("({},REPEAT('p',{}))", row.join(","), dice.below(150))
            })
            .collect();
        root.query_drop(format!(
            "INSERT INTO {table} (id,a,b,c,d,e,f,g,h,i,n,pad) VALUES {}",
            rows.join(",")
        ))
        .expect("rows");
    }
}

/// Something about a column that an index may be good for.
fn comparison(dice: &mut Random, column: &str) -> String {
    let (one, other) = (value(dice, column), value(dice, column));
    match dice.below(9) {
        0 => format!("{column} IS NULL"),
        1 => format!("{column} IS NOT NULL"),
        2 => format!("{column} BETWEEN {one} AND {other}"),
        3 => format!("{column} IN ({one}, {other})"),
        4 => format!("({column} <> {one} OR {column} IS NULL)"),
        5 if !["a", "b", "d", "e", "g", "v"].contains(&column) => {
            format!("{column} LIKE '{}%'", of(dice, &["a", "B", "_a"]))
        }
        _ => format!("{column} {} {one}", of(dice, &["=", "<", "<=", ">", ">=", "<=>"])),
    }
}

/// An index, its first column, and others that its entries may know.
const INDEXES: [(&str, &[&str]); 10] = [
    ("ab", &["a", "b"]),
    ("cb", &["c", "b"]),
    ("efd", &["e", "f", "d"]),
    ("prefix", &["c", "a"]),
    ("down", &["d", "b"]),
    ("gh", &["g", "h"]),
    ("ui", &["a", "id"]),
    ("un", &["i", "c"]),
    ("text", &["a", "n", "b"]),
    ("computed", &["a", "v"]),
];

fn query(dice: &mut Random) -> String {
    let (index, columns) = INDEXES[dice.below(INDEXES.len() as u64) as usize];
    let mut wanted = vec![comparison(dice, columns[0])];
    for column in &columns[1..] {
        for _ in 0..dice.below(3) {
            wanted.push(match (*column, dice.below(4)) {
                ("id", _) => format!("id LIKE '%{}%'", dice.below(10)),
                (_, 0) => format!("({} OR {})", comparison(dice, column), comparison(dice, columns[0])),
                _ => comparison(dice, column),
            });
        }
    }
    if dice.below(4) == 0 {
        wanted.push(comparison(dice, "g"));
    }
    let wanted = wanted.join(" AND ");
    let way = of(dice, &["", " DESC"]);
    let order: Vec<String> = columns.iter().chain(&["id"]).map(|column| format!("x.{column}{way}")).collect();
    let order = match dice.below(3) {
        0 => format!(" ORDER BY {}", order.join(",")),
        1 => format!(" ORDER BY {} LIMIT {}", order.join(","), 1 + dice.below(20)),
        _ => String::new(),
    };
    let lock = of(dice, &["", "", "", " FOR UPDATE", " LOCK IN SHARE MODE"]);
    match dice.below(4) {
        0 => format!(
            "SELECT o.k, x.* FROM outside o {} JOIN t x FORCE INDEX ({index}) ON x.a = o.k AND {wanted}{}{lock}",
            of(dice, &["", "LEFT"]),
            order.replace("x.id", "x.id, o.k"),
        ),
        _ => format!("SELECT x.* FROM t x FORCE INDEX ({index}) WHERE {wanted}{order}{lock}"),
    }
}

/// As text, in order where the query says so.
fn answer(root: &mut Conn, sql: &str) -> Vec<String> {
    let rows: Vec<Row> = root.query(sql).unwrap_or_else(|error| panic!("{error}: {sql}"));
    let mut rows: Vec<String> = rows.into_iter().map(|row| format!("{:?}", row.unwrap())).collect();
    if !sql.contains("ORDER BY") {
        rows.sort();
    }
    rows
}

/// What EXPLAIN says beside each table.
fn plan(root: &mut Conn, sql: &str) -> String {
    let rows: Vec<Row> = root.query(format!("EXPLAIN {sql}")).expect("a plan");
    rows.iter().map(|row| row.get::<Option<String>, _>("Extra").flatten().unwrap_or_default()).collect()
}

fn spared(root: &mut Conn) -> u64 {
    let row: Option<(String, u64)> =
        root.query_first("SHOW GLOBAL STATUS LIKE 'cistern_index_condition_rows_spared'").expect("a counter");
    row.expect("a counter").1
}

#[test]
fn conditions_answered_by_entries_change_no_answer() {
    let (_directory, _server, mut root) = start();
    let mut dice = Random::new(20_261_123);
    root.query_drop("CREATE TABLE outside (k INT NULL); INSERT INTO outside VALUES (3),(NULL),(7),(7),(400)")
        .expect("a table to join");
    let mut differences = Vec::new();
    for (round, primary) in PRIMARIES.into_iter().enumerate() {
        root.query_drop(format!("CREATE OR REPLACE TABLE t ({primary}, {COLUMNS})")).expect("a table");
        fill(&mut root, &mut dice, "t", round == 1);
        root.query_drop("ANALYZE TABLE t").expect("statistics");
        root.query_drop(BATCHED).expect("a setting");
        for batched in [
            "SELECT pad FROM t FORCE INDEX (ab) WHERE a BETWEEN 3 AND 9",
            "SELECT x.pad FROM outside o JOIN t x FORCE INDEX (ab) ON x.a = o.k",
        ] {
            assert!(plan(&mut root, batched).contains("Rowid-ordered scan"), "{primary}: {batched}");
        }
        let before = spared(&mut root);
        for _ in 0..QUERIES {
            let sql = query(&mut dice);
            let isolation = of(&mut dice, &["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]);
            root.query_drop(format!("SET TRANSACTION ISOLATION LEVEL {isolation}; BEGIN; {OFF}"))
                .expect("off");
            let so_far = spared(&mut root);
            let expected = answer(&mut root, &sql);
            assert_eq!(spared(&mut root), so_far, "nothing is pushed that the server keeps: {sql}");
            for (setting, name) in [(ON, "one by one"), (BATCHED, "batched")] {
                root.query_drop(setting).expect("a setting");
                let got = answer(&mut root, &sql);
                if got != expected {
                    let (got, expected) = (got.len(), expected.len());
                    differences
                        .push(format!("{primary}, {isolation}, {name}: {got} rows, not {expected}: {sql}"));
                }
            }
            root.query_drop("COMMIT").expect("a commit");
        }
        assert!(spared(&mut root) > before + ROWS, "{primary}: rows are fetched all the same");
    }
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
}

#[test]
fn writes_by_such_conditions_leave_the_same_tables() {
    let (_directory, _server, mut root) = start();
    let mut dice = Random::new(7_919);
    root.query_drop(format!("CREATE TABLE t ({}, {COLUMNS})", PRIMARIES[0])).expect("a table");
    fill(&mut root, &mut dice, "t", false);
    root.query_drop("CREATE TABLE u LIKE t; CREATE TABLE t_kept LIKE t; CREATE TABLE u_kept LIKE t")
        .expect("tables");
    let stored = "id,a,b,c,d,e,f,g,h,i,n,pad";
    root.query_drop(format!("INSERT INTO u ({stored}) SELECT {stored} FROM t")).expect("a copy");
    for _ in 0..150 {
        let (index, columns) = INDEXES[dice.below(INDEXES.len() as u64) as usize];
        let wanted: Vec<String> = columns
            .iter()
            .filter(|column| **column != "id")
            .map(|column| comparison(&mut dice, column))
            .collect();
        let wanted = wanted.join(" AND ");
        let (column, limit) = (of(&mut dice, &["a", "b", "d", "g"]), 1 + dice.below(30));
        let new = value(&mut dice, column);
        let sql = match dice.below(4) {
            0 => format!(
                "UPDATE @ FORCE INDEX ({index}) SET {column} = {new} WHERE {wanted} ORDER BY id LIMIT {limit}"
            ),
            1 => format!(
                "UPDATE @ x FORCE INDEX ({index}) JOIN (SELECT 1) y SET {column} = {new} WHERE {wanted}"
            ),
            2 => format!(
                "REPLACE INTO @_kept ({stored}) SELECT {stored} FROM @ FORCE INDEX ({index}) WHERE {wanted}"
            ),
            _ => format!(
                "DELETE FROM @ WHERE id IN (SELECT id FROM (SELECT id, pad FROM @ FORCE INDEX ({index}) WHERE {wanted} ORDER BY id LIMIT 3) x)"
            ),
        };
        let setting = of(&mut dice, &[ON, BATCHED]);
        for (setting, table) in [(setting, "t"), (OFF, "u")] {
            root.query_drop(setting).expect("a setting");
            let sql = sql.replace('@', table);
            root.query_drop(&sql).unwrap_or_else(|error| panic!("{error}: {sql}"));
        }
    }
    for (one, other) in [("t", "u"), ("t_kept", "u_kept")] {
        let rows = answer(&mut root, &format!("SELECT * FROM {one}"));
        assert_eq!(rows, answer(&mut root, &format!("SELECT * FROM {other}")));
        assert!(!rows.is_empty());
    }
}

/// In REPEATABLE READ what a locking read looked at stays as it is; in READ COMMITTED only what it returned.
#[test]
fn rows_that_do_not_meet_the_condition_are_locked_as_the_isolation_asks() {
    let (_directory, server, mut root) = start();
    root.query_drop("CREATE TABLE t (id INT PRIMARY KEY, a INT, b INT, c INT, KEY ab (a, b))")
        .expect("a table");
    root.query_drop("INSERT INTO t SELECT seq, seq DIV 10, seq MOD 10, 0 FROM seq_0_to_99").expect("rows");
    let read = "SELECT * FROM t FORCE INDEX (ab) WHERE a BETWEEN 3 AND 4 AND b MOD 5 = 1 FOR UPDATE";
    let mut other = server.connect().expect("a second connection");
    other.query_drop("USE o; SET cistern_lock_wait_timeout=0").expect("a setting");
    for (isolation, pushed) in [("READ COMMITTED", true), ("REPEATABLE READ", false)] {
        root.query_drop(format!("SET SESSION TRANSACTION ISOLATION LEVEL {isolation}; BEGIN"))
            .expect("a start");
        assert_eq!(plan(&mut root, read).contains("index condition"), pushed, "{isolation}");
        let before = spared(&mut root);
        assert_eq!(answer(&mut root, read).len(), 4);
        assert_eq!(spared(&mut root) - before, if pushed { 16 } else { 0 }, "{isolation}");
        other.query_drop("UPDATE t SET c = 1 WHERE id = 31").expect_err("it is locked");
        let free = other.query_drop("UPDATE t SET c = 1 WHERE id = 32");
        assert_eq!(free.is_ok(), pushed, "{isolation}");
        root.query_drop("ROLLBACK").expect("an end");
    }
}

/// Blocks that were looked at so far.
fn blocks(root: &mut Conn) -> u64 {
    let rows: Vec<(String, u64)> =
        root.query("SHOW GLOBAL STATUS LIKE 'cistern_block_cache_%s'").expect("counters");
    let counts = |name: &str| name.ends_with("_hits") || name.ends_with("_misses");
    rows.iter().filter(|(name, _)| counts(name)).map(|(_, count)| count).sum()
}

/// The optimizer asks in the same words how many rows there are for an estimate and for the answer of COUNT(*).
#[test]
fn rows_are_counted_for_an_answer_and_not_for_a_plan() {
    let (_directory, _server, mut root) = start();
    for statement in [
        "CREATE TABLE t (id INT PRIMARY KEY, k INT NOT NULL, pad CHAR(60) NOT NULL, KEY k (k))",
        // So many that they go to ssts at once, where blocks are counted.
        "INSERT INTO t SELECT seq, seq * 7919 MOD 100000, SHA2(seq, 224) FROM seq_1_to_100000",
        "CREATE TABLE p (id INT PRIMARY KEY, k INT NOT NULL, KEY k (k)) PARTITION BY HASH (id) PARTITIONS 3",
        "INSERT INTO p SELECT id, k FROM t WHERE id <= 9000",
        "CREATE VIEW v AS SELECT id, k FROM t",
        "CREATE TABLE few (id INT NOT NULL)",
        "INSERT INTO few VALUES (1)",
    ] {
        root.query_drop(statement).unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
    let mut asked = |sql: &str| {
        let before = blocks(&mut root);
        let answer: Option<u64> = root.query_first(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
        (answer.expect("a row"), blocks(&mut root) - before)
    };
    let (rows, counted) = asked("SELECT COUNT(*) FROM t");
    assert!(rows == 100_000 && counted > 20, "{rows} rows, {counted} blocks");
    for sql in [
        "SELECT SUM(k) FROM t WHERE k < 10",
        "SELECT k FROM t WHERE k = 5",
        "SELECT MAX(k) FROM t WHERE k < 9",
        "SELECT COUNT(*) FROM t GROUP BY k LIMIT 1",
    ] {
        let (_, looked_at) = asked(sql);
        assert!(looked_at * 4 < counted, "{sql}: {looked_at} blocks, and {counted} for all rows");
    }
    // What is counted may depend on other tables: then rows are read.
    for sql in [
        "SELECT COUNT(*) FROM t LEFT JOIN (SELECT 1 AS n) AS one ON one.n = t.k",
        "SELECT (SELECT COUNT(t.k + few.id) FROM t) FROM few",
    ] {
        let (rows, looked_at) = asked(sql);
        assert_eq!(rows, 100_000, "{sql}");
        assert!(
            looked_at * 2 < counted * 3,
            "{sql}: {looked_at} blocks, and {counted} for all rows: they were counted and read"
        );
    }
    for (sql, rows) in [
        ("SELECT COUNT(*) FROM (SELECT * FROM t) AS d", 100_000),
        ("SELECT COUNT(*) FROM v", 100_000),
        ("SELECT COUNT(id) FROM v AS a JOIN (SELECT 1) AS b", 100_000),
        ("SELECT COUNT(*) FROM p", 9000),
        ("SELECT COUNT(*) FROM p AS a, (SELECT COUNT(*) AS n FROM p) AS b WHERE b.n = 9000", 9000),
        ("SELECT COUNT(*) FROM t WHERE id > (SELECT COUNT(*) FROM p)", 91_000),
        ("SELECT COUNT(*) + SUM(k) * 0 FROM t", 100_000),
        ("SELECT COUNT(*) FROM t HAVING COUNT(*) > 5", 100_000),
        ("SELECT COUNT(*) FROM t UNION ALL SELECT COUNT(*) FROM p LIMIT 1", 100_000),
    ] {
        assert_eq!(asked(sql).0, rows, "{sql}");
    }
}

/// The optimizer puts constants in place of COUNT, MIN and MAX where it can: in a subquery of which nothing but the WHERE, or nothing but what
/// is counted, depends on the row outside, as elsewhere.
#[test]
fn counts_and_ends_in_subqueries_are_innodbs() {
    let (directory, _server, mut ours) = start();
    let peer = Peer::start(directory.path(), &[]);
    let mut theirs = peer.connect();
    theirs.query_drop("CREATE DATABASE o; USE o; SET sql_mode='', NAMES utf8mb4").expect("a database");
    let mut both = |sql: &str| {
        let (ours, theirs) = (answer(&mut ours, sql), answer(&mut theirs, sql));
        assert_eq!(ours, theirs, "{sql}");
    };
    for statement in [
        "CREATE TABLE few (id INT PRIMARY KEY, n INT NULL)",
        "INSERT INTO few SELECT seq, IF(seq MOD 5 = 0, NULL, seq * 3) FROM seq_1_to_12",
        "CREATE TABLE t (id INT PRIMARY KEY, k INT NULL, c INT NOT NULL, KEY k (k), KEY ck (c, k))",
        "INSERT INTO t SELECT seq * 2, IF(seq MOD 7 = 0, NULL, seq * 7919 MOD 101), seq MOD 9 FROM seq_1_to_400",
        "CREATE TABLE p (id INT PRIMARY KEY, k INT NULL, c INT NOT NULL, KEY k (k)) PARTITION BY HASH (id) PARTITIONS 3",
        "INSERT INTO p SELECT id, k, c FROM t WHERE id < 100",
        "CREATE TABLE e (id INT PRIMARY KEY, k INT NULL, c INT NOT NULL, KEY k (k))",
        "CREATE VIEW v AS SELECT id, k, c FROM t",
    ] {
        both(statement);
    }
    let wanted = [
        "COUNT(*)",
        "COUNT(x.id)",
        "COUNT(x.k)",
        "COUNT(few.id + x.id)",
        "COUNT(DISTINCT x.k)",
        "MIN(x.k)",
        "MAX(x.k)",
        "MAX(x.id)",
        "MIN(x.id + few.id)",
        "MAX(7)",
        "COUNT(*) * 1000 + MIN(x.c)",
        "COUNT(*) + few.id",
    ];
    let tables = [
        "t AS x",
        "p AS x",
        "e AS x",
        "v AS x",
        "t AS x LEFT JOIN e ON e.id = few.id",
        "p AS x JOIN few AS f",
    ];
    let conditions =
        ["", "WHERE x.k = few.n", "WHERE x.c = 3 AND x.k > few.n", "WHERE x.id < 50", "WHERE few.n IS NULL"];
    let all = |both: &mut dyn FnMut(&str)| {
        for (wanted, table) in wanted.iter().flat_map(|wanted| tables.map(|table| (wanted, table))) {
            for condition in conditions {
                let inner = format!("(SELECT {wanted} FROM {table} {condition})");
                both(&format!("SELECT few.id, {inner} FROM few ORDER BY few.id"));
                both(&format!("SELECT few.id FROM few WHERE few.id * 5 > {inner} ORDER BY few.id"));
            }
        }
    };
    all(&mut both);
    // The transaction's own writes count, too.
    both("BEGIN");
    both("DELETE FROM t WHERE k < 20 OR c = 3");
    both("INSERT INTO e SELECT id, k, c FROM t WHERE id > 700");
    both("UPDATE p SET id = id + 1000, k = NULL WHERE id < 30");
    all(&mut both);
    both("ROLLBACK");
    both("UPDATE few SET n = (SELECT COUNT(*) FROM t) + (SELECT COUNT(few.id + p.id) FROM p)");
    both("SELECT * FROM few ORDER BY id");
}
