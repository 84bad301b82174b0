//! sysbench 1.0.20: whole statements from a client in a process of its own, on the same machine.
//!
//! * Deadlocks and write conflicts (1213, 1205, 1020) are repeated by sysbench and counted by it; any other error fails
//!   the row.
//! * `pareto` is sysbench's own: a fifth of the rows gets most of the requests.
//! * A run tells two rows: how many transactions were done, and what one took of the server's processor time.
//! * Whoever runs faster changes more. What that can do to a figure is undone before each round: see [`adds_or_removes_rows`].

use std::path::Path;
use std::time::{Duration, Instant};

use acceptance::sysbench::Run;
use bench::machine::Awake;

use crate::Arguments;
use crate::report::{Better, Report, Subject};
use crate::target::{Kind, Target, execute, query};

const TABLES: u32 = 4;
const BULK: &str = "bulk_insert";
const DATABASE: &str = "sbtest";

/// (workload, DESIGN's wish against InnoDB); the first ones are the default.
const WORKLOADS: [(&str, &str); 11] = [
    ("oltp_point_select", "1.0×"),
    ("oltp_read_only", "0.95×"),
    ("oltp_read_write", "1.1×"),
    ("oltp_write_only", "1.5×"),
    ("oltp_update_index", "2×"),
    ("oltp_update_non_index", ""),
    ("select_random_points", ""),
    ("select_random_ranges", ""),
    ("oltp_insert", ""),
    ("oltp_delete", ""),
    (BULK, ""),
];
const SHORT: usize = 5;

/// After these the tables have other rows than before, and the others' figures would tell of that. They come last, and have
/// the same rows at the beginning of each round, however many a server added or removed in the one before.
fn adds_or_removes_rows(workload: &str) -> bool {
    matches!(workload, "oltp_insert" | "oltp_delete")
}

/// Four tables of 250,000 rows; transactions a second, and processor time for each.
pub fn run(arguments: &Arguments, directory: &Path, report: &mut Report) -> Result<(), String> {
    let rows = ((250_000.0 * arguments.scale) as u32).max(1000);
    let loads = loads(arguments.all, rows, arguments.seconds(3.0, 15.0));
    let servers = if arguments.without_myrocks { 2 } else { 3 };
    let whole = estimate(&loads, arguments.rounds, servers).as_secs_f64() / 60.0;
    let begun = Instant::now();
    eprintln!("  {} loads, about {whole:.0} minutes on a quiet machine", loads.len());

    let targets = Target::start_all(directory, !arguments.without_myrocks)?;
    side_by_side(&targets, 1, |target, _| {
        prepare(target, rows, TABLES)?;
        target.settle()
    })?;
    let mut warm_for = "";
    let mut is_kept = false;
    for (index, (load, goal)) in loads.iter().enumerate() {
        // Before it is warmed, which changes them already.
        let changes = adds_or_removes_rows(load.workload);
        if changes && !is_kept {
            keep(&targets)?;
            is_kept = true;
        }
        // Pages and blocks that the workload before did not need come back before it counts.
        if warm_for != load.workload {
            for target in &targets {
                Load { threads: 8, seconds: 1, ..load.clone() }.run(target)?;
            }
            warm_for = load.workload;
        }
        let mut restored = None;
        report.measure(subjects(load, goal), arguments.rounds, &targets, |target, round| {
            if changes && restored.replace(round) != Some(round) {
                restore(&targets, rows)?;
            }
            load.run(target).map(|outcome| [outcome.rate, outcome.processor_us])
        });
        if index == 0 {
            report.note(format!("{rows} rows in each of {TABLES} tables; runs of {} s", load.seconds));
        }
        let minutes = begun.elapsed().as_secs_f64() / 60.0;
        eprintln!("  {} of {} after {minutes:.0} of about {whole:.0} minutes", index + 1, loads.len());
    }
    Ok(())
}

fn loads(all: bool, rows: u32, seconds: u32) -> Vec<(Load<'static>, &'static str)> {
    let mut loads = Vec::new();
    for &(workload, goal) in if all { &WORKLOADS[..] } else { &WORKLOADS[..SHORT] } {
        for distribution in ["uniform", "pareto"] {
            for threads in [1, 8, 32] {
                if distribution == "uniform" || workload != BULK && (all || threads == 8) {
                    let load = Load { workload, threads, rows, distribution, seconds, awake: false };
                    loads.push((load.clone(), goal));
                    if !all && threads == 1 {
                        loads.push((Load { awake: true, ..load }, goal));
                    }
                }
            }
        }
    }
    loads
}

/// How long it takes on a quiet machine: mostly the runs themselves.
fn estimate(loads: &[(Load<'_>, &str)], rounds: u32, servers: u32) -> Duration {
    const PREPARE: f64 = 60.0;
    const TURN: f64 = 0.3; // beside its seconds: sysbench starts, connects, prepares its statements
    const RESTORE: f64 = 15.0; // all servers at once
    let of = |load: &Load<'_>| {
        let turns = f64::from(servers) * (f64::from(load.seconds) + TURN);
        f64::from(rounds) * (turns + if adds_or_removes_rows(load.workload) { RESTORE } else { 0.0 })
    };
    let seconds: f64 = loads.iter().map(|(load, _)| of(load)).sum();
    Duration::from_secs_f64(PREPARE + seconds)
}

/// The two rows of one load.
fn subjects(load: &Load<'_>, goal: &'static str) -> [Subject; 2] {
    let is_bulk = load.workload == BULK;
    let distribution = if is_bulk { String::new() } else { format!(", {}", load.distribution) };
    let threads = if load.threads == 1 { "1 thread".into() } else { format!("{} threads", load.threads) };
    let awake = if load.awake { ", processors awake" } else { "" };
    let name = format!("{}{distribution}, {threads}{awake}", load.workload);
    let subject = |name, unit, better| Subject { section: "sysbench", name, unit, better, goal };
    [
        subject(name.clone(), if is_bulk { "rows/s" } else { "tx/s" }, Better::More),
        subject(
            format!("{name}, processor time"),
            if is_bulk { "µs a row" } else { "µs a tx" },
            Better::Less,
        ),
    ]
}

/// Keeps the rows of all tables as they are now.
fn keep(targets: &[Target]) -> Result<(), String> {
    side_by_side(targets, TABLES, |target, table| {
        let mut connection = target.connect()?;
        execute(
            &mut connection,
            &format!("CREATE TABLE {DATABASE}.kept{table} LIKE {DATABASE}.sbtest{table}"),
        )?;
        copy(&mut connection, &format!("sbtest{table}"), &format!("kept{table}"))
    })
}

/// Gives the tables the rows that were kept, `rows` each: all of them cached, and nothing left to do in the background.
fn restore(targets: &[Target], rows: u32) -> Result<(), String> {
    side_by_side(targets, TABLES, |target, table| {
        let mut connection = target.connect()?;
        execute(&mut connection, &format!("TRUNCATE {DATABASE}.sbtest{table}"))?;
        copy(&mut connection, &format!("kept{table}"), &format!("sbtest{table}"))
    })?;
    side_by_side(targets, 1, |target, _| target.settle())?;
    side_by_side(targets, TABLES, |target, table| {
        let read = |index: &str| {
            format!("SELECT COUNT(*), SUM(k) FROM {DATABASE}.sbtest{table} FORCE INDEX ({index})")
        };
        let mut connection = target.connect()?;
        for index in ["PRIMARY".to_owned(), format!("k_{table}")] {
            let found = query(&mut connection, &read(&index))?;
            if found[0][0] != rows.to_string() {
                return Err(format!(
                    "{index} of sbtest{table} has {} entries again, not {rows}",
                    found[0][0]
                ));
            }
        }
        Ok(())
    })
}

fn copy(connection: &mut mysql::Conn, from: &str, to: &str) -> Result<(), String> {
    execute(connection, &format!("INSERT INTO {DATABASE}.{to} SELECT * FROM {DATABASE}.{from}"))
}

/// Acts on tables 1 to `tables` of all servers at once; nothing is measured meanwhile.
fn side_by_side(
    targets: &[Target],
    tables: u32,
    act: impl Fn(&Target, u32) -> Result<(), String> + Sync,
) -> Result<(), String> {
    let act = &act;
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for target in targets {
            let named = |reason| format!("{}: {reason}", target.name());
            threads.extend((1..=tables).map(|table| scope.spawn(move || act(target, table).map_err(named))));
        }
        threads.into_iter().try_for_each(|thread| thread.join().expect("what it does returns its errors"))
    })
}

/// Makes and fills the tables of every workload but `bulk_insert`, by `threads` connections.
pub fn prepare(target: &Target, rows: u32, threads: u32) -> Result<(), String> {
    execute(&mut target.connect()?, &format!("CREATE DATABASE IF NOT EXISTS {DATABASE}"))?;
    let options = [format!("--tables={TABLES}"), format!("--table-size={rows}")];
    sysbench(target, "oltp_read_write", DATABASE, threads, &options, "prepare").map(drop)
}

/// One run of one workload.
#[derive(Clone, Debug)]
pub struct Load<'a> {
    /// Its name.
    pub workload: &'a str,
    /// Connections.
    pub threads: u32,
    /// Of each table.
    pub rows: u32,
    /// Which rows: uniform or pareto.
    pub distribution: &'a str,
    /// How long.
    pub seconds: u32,
    /// Whether processors that have nothing to do are kept from sleeping.
    pub awake: bool,
}

impl Load<'_> {
    /// Runs it on `target`.
    pub fn run(&self, target: &Target) -> Result<Outcome, String> {
        let mut options = vec![format!("--time={}", self.seconds)];
        let mut database = DATABASE;
        if self.workload == BULK {
            // Its tables, one a thread, are made anew for each run.
            database = "sbbulk";
            execute(&mut target.connect()?, "CREATE DATABASE IF NOT EXISTS sbbulk")?;
            sysbench(target, self.workload, database, self.threads, &[], "cleanup")?;
            sysbench(target, self.workload, database, self.threads, &[], "prepare")?;
        } else {
            options.push(format!("--tables={TABLES}"));
            options.push(format!("--table-size={}", self.rows));
            options.push(format!("--rand-type={}", self.distribution));
        }
        let awake = if self.awake { Some(Awake::begin()?) } else { None };
        let before = target.processor_time()?;
        let said = sysbench(target, self.workload, database, self.threads, &options, "run")?;
        let processor = target.processor_time()?.saturating_sub(before);
        drop(awake);
        outcome(&said, processor)
            .ok_or_else(|| format!("sysbench {} said something else:\n{said}", self.workload))
    }
}

/// What sysbench and the kernel say of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Transactions (of `bulk_insert`: rows) a second.
    pub rate: f64,
    /// Milliseconds that 95 of 100 of them stay below.
    pub p95_ms: f64,
    /// Microseconds that the server took of the processors for one of them: all its threads, the background's included.
    pub processor_us: f64,
}

fn outcome(said: &str, processor: Duration) -> Option<Outcome> {
    let line = |beginning: &str| said.lines().map(str::trim).find(|line| line.starts_with(beginning));
    let p95_ms = line("95th percentile:")?.rsplit(' ').next()?.parse().ok()?;
    // An event is a transaction, however often it had to be repeated; of bulk_insert it is a row, and it has no others.
    let events: f64 = line("total number of events:")?.rsplit(' ').next()?.parse().ok()?;
    let processor_us = processor.as_secs_f64() * 1e6 / events;
    if let Some(transactions) = line("transactions:") {
        let rate = transactions.split_once('(')?.1.split(' ').next()?.parse().ok()?;
        return Some(Outcome { rate, p95_ms, processor_us });
    }
    let seconds: f64 = line("total time:")?.rsplit(' ').next()?.trim_end_matches('s').parse().ok()?;
    Some(Outcome { rate: events / seconds, p95_ms, processor_us })
}

fn sysbench(
    target: &Target,
    workload: &str,
    database: &str,
    threads: u32,
    options: &[String],
    verb: &str,
) -> Result<String, String> {
    // Ours enforces its own engine, whatever is asked for.
    let engine = if target.kind() == Kind::MyRocks { "rocksdb" } else { "innodb" };
    let run = Run { port: target.port(), engine, workload, database, threads };
    run.verb(verb, options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_in_what_sysbench_says() {
        let took = Duration::from_millis(2469);
        let said = "SQL statistics:\n    transactions:                        12345  (4115.00 per sec.)\n\
                    General statistics:\n    total number of events:              12345\n\
                    Latency (ms):\n         95th percentile:                        2.57\n";
        let found = Outcome { rate: 4115.0, p95_ms: 2.57, processor_us: 200.0 };
        assert_eq!(outcome(said, took), Some(found));
        let bulk = "General statistics:\n    total time:                          2.0000s\n    \
                    total number of events:              500\nLatency (ms):\n         95th percentile:    0.50\n";
        let found = Outcome { rate: 250.0, p95_ms: 0.5, processor_us: 4938.0 };
        assert_eq!(outcome(bulk, took), Some(found));
        assert_eq!(outcome("nothing", took), None);
    }

    #[test]
    fn a_load_tells_of_its_transactions_and_of_their_processor_time() {
        let loads = loads(true, 1000, 3);
        let [rate, processor] = subjects(&loads[0].0, loads[0].1);
        assert_eq!(
            (rate.name.as_str(), rate.unit, rate.goal),
            ("oltp_point_select, uniform, 1 thread", "tx/s", "1.0×")
        );
        assert_eq!(processor.name, "oltp_point_select, uniform, 1 thread, processor time");
        assert_eq!((processor.unit, processor.better, processor.goal), ("µs a tx", Better::Less, "1.0×"));
        let awake = Load { awake: true, ..loads[0].0.clone() };
        assert_eq!(subjects(&awake, "")[0].name, "oltp_point_select, uniform, 1 thread, processors awake");
        let (bulk, _) = loads.last().unwrap();
        let [rate, processor] = subjects(bulk, "");
        assert_eq!((rate.name.as_str(), rate.unit), ("bulk_insert, 32 threads", "rows/s"));
        assert_eq!(processor.unit, "µs a row");
    }

    #[test]
    fn nothing_is_measured_on_tables_that_another_load_has_made_larger_or_smaller() {
        let loads = loads(true, 1000, 3);
        let first = loads.iter().position(|(load, _)| adds_or_removes_rows(load.workload)).unwrap();
        for (load, _) in &loads[first..] {
            assert!(adds_or_removes_rows(load.workload) || load.workload == BULK, "{load:?}");
        }
    }

    #[test]
    fn every_workload_at_three_seconds_is_a_matter_of_less_than_45_minutes() {
        let every = loads(true, 250_000, 3);
        assert_eq!(every.len(), 10 * 2 * 3 + 3);
        assert!(estimate(&every, 3, 3) < Duration::from_secs(45 * 60), "{:?}", estimate(&every, 3, 3));
        assert_eq!(loads(false, 250_000, 3).len(), 5 * 5);
    }
}
