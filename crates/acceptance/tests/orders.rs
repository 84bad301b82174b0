//! Whatever the type and the collation: an index answers as the server does without it.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use acceptance::server::{Plan, Server};
use mysql::Conn;
use mysql::prelude::Queryable;

const ROWS: usize = 40;
const PROBES: usize = 2;

/// Anything will do, as long as a failure can be had again.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    fn of<'a>(&mut self, some: &[&'a str]) -> &'a str {
        some[self.below(some.len() as u64) as usize]
    }
}

fn start() -> (tempfile::TempDir, Server, Conn) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let server = Plan::in_directory(directory.path()).start();
    let server = server.unwrap_or_else(|ended| panic!("cistern did not start:\n{}", ended.said));
    let mut root = server.connect().expect("it is ready");
    root.query_drop("CREATE DATABASE o; USE o; SET sql_mode='', time_zone='+00:00', NAMES utf8mb4")
        .expect("a database");
    (directory, server, root)
}

struct Column<'a> {
    /// As CREATE TABLE has it.
    kind: String,
    /// Of an index: BLOBs want one.
    prefix: &'a str,
    values: Vec<String>,
    patterns: Vec<String>,
}

/// What differs between the queries with an index and those without.
fn differences(root: &mut Conn, column: &Column<'_>) -> Vec<String> {
    let Column { kind, prefix, values, patterns } = column;
    let (rows, probes) = values.split_at(ROWS);
    let run = |root: &mut Conn, sql: &str| {
        root.query_drop(sql).unwrap_or_else(|error| panic!("{kind}: {error}: {sql}"));
    };
    let answer = |root: &mut Conn, sql: &str| -> (u64, Option<u64>) {
        let row = root.query_first(sql).unwrap_or_else(|error| panic!("{kind}: {error}: {sql}"));
        row.expect("an aggregate has a row")
    };
    run(
        root,
        &format!(
            "CREATE OR REPLACE TABLE t (id INT PRIMARY KEY, v {kind} NULL, KEY k (v{prefix}), KEY d (v{prefix} DESC, id))"
        ),
    );
    let tuples: Vec<String> = rows.iter().enumerate().map(|(id, value)| format!("({id},{value})")).collect();
    run(root, &format!("INSERT INTO t VALUES {},(1000,NULL),(1001,NULL)", tuples.join(",")));
    run(
        root,
        &format!("CREATE OR REPLACE TABLE u (id INT PRIMARY KEY, v {kind} NULL, UNIQUE KEY u (v{prefix}))"),
    );
    run(root, &format!("INSERT IGNORE INTO u VALUES {}", tuples.join(",")));

    run(root, &format!("CREATE OR REPLACE TABLE q (n INT PRIMARY KEY AUTO_INCREMENT, v {kind} NULL)"));

    let mut questions: Vec<String> = Vec::new();
    for probe in probes {
        for operator in ["=", "<", "<=", ">", ">=", "<>"] {
            questions.push(format!("SELECT COUNT(*), BIT_XOR(id*7919) FROM t @ WHERE v {operator} {probe}"));
        }
    }
    questions
        .push(format!("SELECT COUNT(*), SUM(id) FROM t @ WHERE v BETWEEN {} AND {}", probes[0], probes[1]));
    questions.push(format!("SELECT COUNT(*), SUM(id) FROM t @ WHERE v IN ({})", probes.join(",")));
    questions.push("SELECT COUNT(*), SUM(id) FROM t @ WHERE v IS NULL".to_owned());
    questions.push("SELECT COUNT(DISTINCT v), 0 FROM t @".to_owned());
    questions.push("SELECT COUNT(*), SUM(n*n) FROM (SELECT COUNT(*) n FROM t @ GROUP BY v) g".to_owned());
    for pattern in patterns {
        questions.push(format!("SELECT COUNT(*), SUM(id) FROM t @ WHERE v LIKE {pattern}"));
    }
    let mut found = Vec::new();
    for question in &questions {
        let expected = answer(root, &question.replace('@', "IGNORE INDEX (k, d, PRIMARY)"));
        for index in ["k", "d"] {
            let got = answer(root, &question.replace('@', &format!("FORCE INDEX ({index})")));
            if got != expected {
                found.push(format!("{kind}: {index} says {got:?}, not {expected:?}: {question}"));
            }
        }
    }
    // These must be nothing: rows of an index in another order than `<` has it, and rows beside their equals under a unique key.
    // ORDER BY of a BLOB is a sort of the server's whatever index there is, and ENUM and SET have a number that orders them.
    let ways = if prefix.is_empty() { 4 } else { 0 };
    let number = if kind.starts_with("ENUM") || kind.starts_with("SET") { "+0" } else { "" };
    for (way, index, wrong) in
        [("", "k", ">"), ("DESC", "k", "<"), ("DESC", "d", "<"), ("", "d", ">")].into_iter().take(ways)
    {
        run(root, "TRUNCATE q");
        run(
            root,
            &format!("INSERT INTO q (v) SELECT v FROM t FORCE INDEX ({index}) ORDER BY v {way} LIMIT 1000"),
        );
        let pairs = format!(
            "SELECT COUNT(*), 0 FROM q a JOIN q b ON b.n = a.n + 1 WHERE a.v{number} {wrong} b.v{number}"
        );
        if answer(root, &pairs).0 != 0 {
            found.push(format!("{kind}: {index} is not in order {way}"));
        }
    }
    for extreme in ["MIN", "MAX"] {
        let sql = format!(
            "SELECT (SELECT {extreme}(v{number}) FROM t FORCE INDEX (k)) = (SELECT {extreme}(v{number}) FROM t IGNORE INDEX (k, d)), 0"
        );
        if answer(root, &sql).0 != 1 {
            found.push(format!("{kind}: {extreme}"));
        }
    }
    let twice = answer(
        root,
        "SELECT COUNT(*), 0 FROM u a IGNORE INDEX (u) JOIN u b IGNORE INDEX (u) ON a.v = b.v AND a.id < b.id",
    )
    .0;
    let lost =
        answer(root, "SELECT COUNT(*), 0 FROM t WHERE v IS NOT NULL AND NOT EXISTS (SELECT 1 FROM u IGNORE INDEX (u) WHERE u.v = t.v)").0;
    if (twice, lost) != (0, 0) {
        found.push(format!("{kind}: a unique key let {twice} equal values in and kept {lost} others out"));
    }
    found
}

fn check(columns: &[Column<'_>]) {
    let (_directory, _server, mut root) = start();
    let found: Vec<String> = columns.iter().flat_map(|column| differences(&mut root, column)).collect();
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
}

fn text(dice: &mut Dice, collation: &str, letters: &[&str]) -> String {
    let length = dice.below(6);
    let text: String = (0..length).map(|_| dice.of(letters)).collect();
    literal(&text.chars().take(6).collect::<String>(), collation)
}

fn literal(text: &str, collation: &str) -> String {
    let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    let charset = collation.split('_').next().expect("a name");
    format!("CONVERT(_utf8mb4 x'{hex}' USING {charset}) COLLATE {collation}")
}

#[test]
fn an_index_on_text_answers_as_a_scan_in_every_kind_of_collation() {
    const LETTERS: [&str; 26] = [
        "a", "A", "b", "B", "c", "h", "ch", " ", " ", "!", "z", "ä", "Ä", "ß", "é", "e", "0", "-", "ss",
        "oe", "č", "ř", "日", "ﬁ", "Ω", "ω",
    ];
    const CONTROL: [&str; 2] = ["\t", "\u{1}"];
    let collations = [
        "latin1_swedish_ci",
        "latin1_bin",
        "latin1_german2_ci",
        "latin1_swedish_nopad_ci",
        "utf8mb4_general_ci",
        "utf8mb4_bin",
        "utf8mb4_nopad_bin",
        "utf8mb4_general_nopad_ci",
        "utf8mb4_unicode_ci",
        "utf8mb4_unicode_520_nopad_ci",
        "utf8mb4_uca1400_ai_ci",
        "utf8mb4_uca1400_as_cs",
        "utf8mb4_uca1400_as_ci",
        "utf8mb4_uca1400_ai_cs",
        "utf8mb4_uca1400_nopad_as_cs",
        "utf8mb4_uca1400_czech_as_cs",
        "utf8mb4_thai_520_w2",
        "utf8mb3_general_ci",
        "ucs2_bin",
        "utf16_unicode_ci",
        "utf16_uca1400_as_cs",
        "utf32_general_ci",
        "cp1250_czech_cs",
        "latin2_czech_cs",
        "sjis_japanese_ci",
        "gbk_chinese_ci",
        "tis620_thai_ci",
        "cp1251_bin",
    ];
    let mut dice = Dice(7);
    let mut columns = Vec::new();
    for collation in collations {
        let charset = collation.split('_').next().expect("a name");
        for (kind, prefix) in [("CHAR(6)", ""), ("VARCHAR(6)", ""), ("TEXT", "(100)")] {
            let mut letters = LETTERS.to_vec();
            // What is less than a space makes the server itself waver: docs/formats/keys.md says where, and InnoDB does the same.
            let char_no_pad = kind == "CHAR(6)" && collation.contains("nopad");
            let binary_like = collation.ends_with("_bin") && !collation.contains("nopad");
            if !char_no_pad && !binary_like {
                letters.extend(CONTROL);
            }
            columns.push(Column {
                kind: format!("{kind} CHARACTER SET {charset} COLLATE {collation}"),
                prefix,
                values: (0..ROWS + PROBES).map(|_| text(&mut dice, collation, &letters)).collect(),
                patterns: ["a%", " %", "c%", "ß%"].map(|pattern| literal(pattern, collation)).to_vec(),
            });
        }
    }
    check(&columns);
}

/// Weights of CHARs and VARCHARs were cut after as many as there are characters, and an `ß` weighs two.
#[test]
fn letters_that_weigh_more_than_one_are_told_apart_to_the_last() {
    let columns: Vec<Column<'_>> = ["as_cs", "as_ci", "ai_cs", "nopad_as_cs", "ai_ci"]
        .iter()
        .flat_map(|collation| ["CHAR(6)", "VARCHAR(6)", "TEXT"].map(|kind| (collation, kind)))
        .map(|(collation, kind)| Column {
            kind: format!("{kind} CHARACTER SET utf8mb4 COLLATE utf8mb4_uca1400_{collation}"),
            prefix: if kind == "TEXT" { "(6)" } else { "" },
            values: (0..ROWS + PROBES)
                .map(|i| {
                    format!(
                        "'{}{}'",
                        ["ßßßßß", "ßßßsß", "ﷺﷺﷺﷺﷺ", "ﷺﷺﷺﷺ"][i % 4],
                        ["a", "b", "A", "é", "e"][i % 5]
                    )
                })
                .collect(),
            patterns: vec!["'ßßß%'".to_owned()],
        })
        .collect();
    check(&columns);
}

#[test]
fn an_index_on_numbers_and_times_answers_as_a_scan() {
    let mut dice = Dice(11);
    let mut columns = Vec::new();
    let mut add = |kind: &str, value: &mut dyn FnMut(&mut Dice) -> String| {
        let values = (0..ROWS + PROBES).map(|_| value(&mut dice)).collect();
        columns.push(Column { kind: kind.to_owned(), prefix: "", values, patterns: vec![] });
    };
    let whole = |bits: u32, signed: bool| {
        move |dice: &mut Dice| {
            let number = (dice.below(1 << 31) << 31 | dice.below(1 << 31)) % (1 << bits.min(62));
            let number = if dice.below(3) == 0 { number % 3 } else { number };
            if signed && dice.below(2) == 0 { format!("-{number}") } else { number.to_string() }
        }
    };
    for (kind, bits) in [("TINYINT", 7), ("SMALLINT", 15), ("MEDIUMINT", 23), ("INT", 31), ("BIGINT", 62)] {
        add(kind, &mut whole(bits, true));
        add(&format!("{kind} UNSIGNED"), &mut whole(bits + 1, false));
    }
    for kind in ["FLOAT", "DOUBLE", "DECIMAL(12,3)", "DECIMAL(38,10)"] {
        add(kind, &mut |dice| {
            let sign = dice.of(&["", "-"]);
            format!("{sign}{}.{}", dice.below(3) * dice.below(100_000), dice.of(&["0", "25", "5", "125"]))
        });
    }
    for (kind, bits) in [("BIT(1)", 1), ("BIT(17)", 17), ("BIT(64)", 62)] {
        add(kind, &mut whole(bits, false));
    }
    add("YEAR", &mut |dice| (1901 + dice.below(254)).to_string());
    for kind in ["DATE", "DATETIME", "DATETIME(6)", "TIMESTAMP", "TIMESTAMP(2)"] {
        add(kind, &mut |dice| {
            let (year, month, day) = (1971 + dice.below(66), 1 + dice.below(12), 1 + dice.below(28));
            format!(
                "'{year}-{month}-{day} {}:{}:{}.{}'",
                dice.below(20) + 4,
                dice.below(60),
                dice.below(60),
                dice.below(10)
            )
        });
    }
    for kind in ["TIME", "TIME(3)", "TIME(6)"] {
        add(kind, &mut |dice| {
            format!(
                "'{}{}:{}:{}.{}'",
                dice.of(&["", "-"]),
                dice.below(800),
                dice.below(60),
                dice.below(60),
                dice.below(1000)
            )
        });
    }
    add("ENUM('z','a','M','b')", &mut |dice| format!("'{}'", dice.of(&["z", "a", "M", "b"])));
    add("SET('x','y','z','a')", &mut |dice| format!("'{}'", dice.of(&["x", "x,y", "a", "y,z", "", "x,a"])));
    for kind in ["BINARY(5)", "VARBINARY(8)", "VARBINARY(400)"] {
        add(kind, &mut |dice| {
            let bytes: String =
                (0..dice.below(6)).map(|_| dice.of(&["00", "01", "20", "61", "ff"])).collect();
            format!("x'{bytes}'")
        });
    }
    add("UUID", &mut |dice| format!("'{:08x}-0000-1000-8000-{:012x}'", dice.below(3), dice.below(1 << 40)));
    add("INET6", &mut |dice| format!("'{:x}::{:x}'", dice.below(65536), dice.below(3)));
    add("INET4", &mut |dice| format!("'{}.{}.1.{}'", dice.below(256), dice.below(3), dice.below(256)));
    check(&columns);
}
