//! One SQL statement over many cached rows: what an engine costs below the executor, without the client's share.

use std::path::Path;
use std::time::Instant;

use crate::Arguments;
use crate::report::{Better, Report, Subject};
use crate::target::{Kind, Target, execute, query};

struct Statement {
    name: &'static str,
    goal: &'static str,
    sql: String,
    /// Rows that the engine hands over.
    rows: u64,
}

/// Loads 500,000 rows of 200 bytes into each server and measures every statement.
pub fn run(arguments: &Arguments, directory: &Path, report: &mut Report) -> Result<(), String> {
    let rows = ((500_000.0 * arguments.scale) as u64).max(1000);
    let targets = Target::start_all(directory, !arguments.without_myrocks)?;
    for target in &targets {
        load(target, rows).map_err(|reason| format!("{}: {reason}", target.name()))?;
    }
    let rounds = arguments.rounds.max(1) + if arguments.all { 4 } else { 2 };
    for statement in statements(rows) {
        compare(&statement, rounds, &targets, report)?;
    }
    Ok(())
}

fn load(target: &Target, rows: u64) -> Result<(), String> {
    let mut connection = target.connect()?;
    execute(&mut connection, "CREATE DATABASE bench")?;
    execute(&mut connection, "USE bench")?;
    let engine = match target.kind() {
        Kind::Cistern => "CISTERN",
        Kind::InnoDb => "InnoDB",
        Kind::MyRocks => "ROCKSDB",
    };
    execute(
        &mut connection,
        &format!(
            "CREATE TABLE t (id INT UNSIGNED NOT NULL PRIMARY KEY, k INT UNSIGNED NOT NULL, j INT UNSIGNED NOT NULL, \
             g INT UNSIGNED NOT NULL, pad VARCHAR(180) NOT NULL, KEY k (k)) CHARACTER SET latin1 ENGINE={engine}"
        ),
    )?;
    const BATCH: u64 = 50_000;
    for first in (1..=rows).step_by(BATCH as usize) {
        let last = (first + BATCH - 1).min(rows);
        execute(
            &mut connection,
            &format!(
                "INSERT INTO t SELECT seq, CRC32(seq) % {rows}, CRC32(seq * 7) % {rows} + 1, seq % 1000, \
                 CONCAT(MD5(seq * 8), MD5(seq * 8 + 1), MD5(seq * 8 + 2), MD5(seq * 8 + 3), MD5(seq * 8 + 4), LEFT(MD5(seq * 8 + 5), 20)) \
                 FROM seq_{first}_to_{last}"
            ),
        )?;
    }
    execute(
        &mut connection,
        &format!(
            "CREATE PROCEDURE point_reads(times INT UNSIGNED) BEGIN DECLARE n, total INT UNSIGNED DEFAULT 0; \
             DECLARE found INT UNSIGNED; WHILE n < times DO SELECT g INTO found FROM t WHERE id = CRC32(n) % {rows} + 1; \
             SET n = n + 1, total = total + found; END WHILE; SELECT total; END"
        ),
    )?;
    query(&mut connection, "ANALYZE TABLE t")?;
    target.settle()
}

fn statements(rows: u64) -> Vec<Statement> {
    let (half, tenth, fiftieth) = (rows / 2, rows / 10, rows / 50);
    // CRC32 is out of the server's reach while it reads, so the list is made here.
    let listed: std::collections::BTreeSet<u64> = (0..fiftieth).map(|n| scattered(n) % rows + 1).collect();
    let list: Vec<String> = listed.iter().map(u64::to_string).collect();
    let statement = |name, goal, sql: String, rows| Statement { name, goal, sql, rows };
    vec![
        statement("full scan, one column", "200 ns", "SELECT SUM(g) FROM t".into(), rows),
        statement(
            "full scan, all columns",
            "",
            "SELECT SUM(k), SUM(j), SUM(g), SUM(LENGTH(pad)), MAX(pad) FROM t FORCE INDEX (PRIMARY)".into(),
            rows,
        ),
        statement("COUNT(*)", "", "SELECT COUNT(*) FROM t".into(), rows),
        statement("index-only scan", "", "SELECT SUM(k) FROM t FORCE INDEX (k)".into(), rows),
        statement(
            "secondary range, covering",
            "",
            format!(
                "SELECT SUM(k), MAX(id) FROM t FORCE INDEX (k) WHERE k >= {tenth} AND k < {}",
                tenth + half
            ),
            half,
        ),
        statement(
            "secondary range, not covering",
            "",
            format!("SELECT SUM(g) FROM t FORCE INDEX (k) WHERE k >= {tenth} AND k < {}", 2 * tenth),
            tenth,
        ),
        statement(
            "eq_ref join, outer row and inner row",
            "",
            format!(
                "SELECT SUM(b.g) FROM t AS a FORCE INDEX (PRIMARY) STRAIGHT_JOIN t AS b FORCE INDEX (PRIMARY) \
                 ON b.id = a.j WHERE a.id <= {}",
                2 * tenth
            ),
            2 * tenth,
        ),
        statement(
            "ORDER BY pk DESC LIMIT",
            "",
            format!("SELECT g FROM t ORDER BY id DESC LIMIT {half}, 1"),
            half + 1,
        ),
        statement(
            "point reads, one IN list",
            "",
            format!("SELECT SUM(g) FROM t FORCE INDEX (PRIMARY) WHERE id IN ({})", list.join(",")),
            listed.len() as u64,
        ),
        statement(
            "point reads, a statement each, in a procedure",
            "",
            format!("CALL point_reads({fiftieth})"),
            fiftieth,
        ),
    ]
}

/// The same each time, in no order.
fn scattered(n: u64) -> u64 {
    let n = (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (n ^ (n >> 29)) >> 16
}

fn compare(
    statement: &Statement,
    rounds: u32,
    targets: &[Target],
    report: &mut Report,
) -> Result<(), String> {
    let mut connections = Vec::new();
    let (mut answers, mut plans) = (Vec::new(), Vec::new());
    for target in targets.iter() {
        let mut connection = target.connect()?;
        // Nested loops over the engine's own look-ups, and a list that stays a list.
        for setup in [
            "USE bench",
            "SET SESSION join_cache_level = 0",
            "SET SESSION in_predicate_conversion_threshold = 0",
        ] {
            execute(&mut connection, setup)?;
        }
        if statement.sql.starts_with("SELECT") {
            plans.push((target.name(), plan(&mut connection, &statement.sql)?));
        }
        // The first one fills the caches, and says what every later one must answer.
        answers.push((target.name(), query(&mut connection, &statement.sql)));
        connections.push((target.name(), connection));
    }
    let expected = answers.first().and_then(|(_, answer)| answer.clone().ok());
    let subject = Subject {
        section: "handler",
        name: statement.name.into(),
        unit: "ns a row",
        better: Better::Less,
        goal: statement.goal,
    };
    report.measure([subject], rounds, targets, |target, _| {
        let (_, connection) =
            connections.iter_mut().find(|(name, _)| *name == target.name()).expect("each has a connection");
        let start = Instant::now();
        let answer = query(connection, &statement.sql)?;
        let took = start.elapsed();
        if Some(&answer) != expected.as_ref() {
            return Err(format!("it answers {answer:?}, cistern's first answer was {expected:?}"));
        }
        Ok([took.as_nanos() as f64 / statement.rows as f64])
    });
    for (name, answer) in answers {
        if let Err(reason) = answer {
            report.fail_last(format!("{name}: {reason}"));
        }
    }
    if plans.iter().any(|(_, plan)| *plan != plans[0].1) {
        let plans: Vec<_> = plans.iter().map(|(name, plan)| format!("{name} {plan}")).collect();
        report.note(format!("plans differ: {}", plans.join("; ")));
    }
    Ok(())
}

/// Access method, index and remarks of each table.
fn plan(connection: &mut mysql::Conn, sql: &str) -> Result<String, String> {
    let rows = query(connection, &format!("EXPLAIN {sql}"))?;
    let cell = |row: &Vec<String>, index: usize| row.get(index).cloned().unwrap_or_default();
    let tables = rows.iter().map(|row| format!("{}({}) {}", cell(row, 3), cell(row, 5), cell(row, 9)));
    Ok(tables.map(|table| table.trim().to_owned()).collect::<Vec<_>>().join(" + "))
}
