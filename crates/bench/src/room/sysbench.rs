//! sysbench 1.0.20: whole statements from a client in a process of its own, on the same machine.
//!
//! * Deadlocks and write conflicts (1213, 1205, 1020) are repeated by sysbench and counted by it; any other error fails
//!   the row.
//! * `pareto` is sysbench's own: a fifth of the rows gets most of the requests.

use std::path::Path;

use acceptance::sysbench::Run;

use crate::Arguments;
use crate::report::{Better, Report, Subject};
use crate::target::{Kind, Target, execute};

const TABLES: u32 = 4;
const DATABASE: &str = "sbtest";

/// (workload, DESIGN's wish against InnoDB); the first ones are the default.
const WORKLOADS: [(&str, &str); 11] = [
    ("oltp_point_select", "1.0×"),
    ("oltp_read_only", "0.95×"),
    ("oltp_read_write", "1.1×"),
    ("oltp_write_only", "1.5×"),
    ("oltp_update_index", "2×"),
    ("oltp_update_non_index", ""),
    ("oltp_insert", ""),
    ("oltp_delete", ""),
    ("select_random_points", ""),
    ("select_random_ranges", ""),
    ("bulk_insert", ""),
];
const SHORT: usize = 5;

/// Four tables of 250,000 rows; transactions a second.
pub fn run(arguments: &Arguments, directory: &Path, report: &mut Report) -> Result<(), String> {
    let rows = ((250_000.0 * arguments.scale) as u32).max(1000);
    let seconds = if arguments.all { 15.0 } else { 3.0 };
    let seconds = (seconds * arguments.scale).max(1.0) as u32;
    let mut targets = Target::start_all(directory, !arguments.without_myrocks)?;
    for target in &targets {
        prepare(target, rows, TABLES)?;
        target.settle()?;
    }
    let workloads = if arguments.all { &WORKLOADS[..] } else { &WORKLOADS[..SHORT] };
    for &(workload, goal) in workloads {
        for distribution in ["uniform", "pareto"] {
            for threads in [1, 8, 32] {
                let is_bulk = workload == "bulk_insert";
                if distribution == "pareto" && (is_bulk || !arguments.all && threads != 8) {
                    continue;
                }
                let load = Load { workload, threads, rows, distribution, seconds };
                let name = if is_bulk { String::new() } else { format!(", {distribution}") };
                let subject = Subject {
                    section: "sysbench",
                    name: format!(
                        "{workload}{name}, {threads} thread{}",
                        if threads == 1 { "" } else { "s" }
                    ),
                    unit: if is_bulk { "rows/s" } else { "tx/s" },
                    better: Better::More,
                    goal,
                };
                // Pages and blocks that the workload before did not need come back before it counts.
                for target in &targets {
                    Load { seconds: 1, ..load.clone() }.run(target)?;
                }
                report.measure(subject, arguments.rounds, &mut targets, |target, _| {
                    load.run(target).map(|outcome| outcome.rate)
                });
            }
        }
    }
    Ok(())
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
}

impl Load<'_> {
    /// Runs it on `target`.
    pub fn run(&self, target: &Target) -> Result<Outcome, String> {
        let mut options = vec![format!("--time={}", self.seconds)];
        let mut database = DATABASE;
        let is_bulk = self.workload == "bulk_insert";
        if is_bulk {
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
        let said = sysbench(target, self.workload, database, self.threads, &options, "run")?;
        outcome(&said).ok_or_else(|| format!("sysbench {} said something else:\n{said}", self.workload))
    }
}

/// What sysbench says of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Transactions (of `bulk_insert`: rows) a second.
    pub rate: f64,
    /// Milliseconds that 95 of 100 of them stay below.
    pub p95_ms: f64,
}

fn outcome(said: &str) -> Option<Outcome> {
    let line = |beginning: &str| said.lines().map(str::trim).find(|line| line.starts_with(beginning));
    let p95_ms = line("95th percentile:")?.rsplit(' ').next()?.parse().ok()?;
    if let Some(transactions) = line("transactions:") {
        let rate = transactions.split_once('(')?.1.split(' ').next()?.parse().ok()?;
        return Some(Outcome { rate, p95_ms });
    }
    // bulk_insert has events only.
    let events: f64 = line("total number of events:")?.rsplit(' ').next()?.parse().ok()?;
    let seconds: f64 = line("total time:")?.rsplit(' ').next()?.trim_end_matches('s').parse().ok()?;
    Some(Outcome { rate: events / seconds, p95_ms })
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
        let said = "SQL statistics:\n    transactions:                        12345  (4115.00 per sec.)\n\
                    Latency (ms):\n         95th percentile:                        2.57\n";
        assert_eq!(outcome(said), Some(Outcome { rate: 4115.0, p95_ms: 2.57 }));
        let bulk = "General statistics:\n    total time:                          2.0000s\n    \
                    total number of events:              500\nLatency (ms):\n         95th percentile:    0.50\n";
        assert_eq!(outcome(bulk), Some(Outcome { rate: 250.0, p95_ms: 0.5 }));
        assert_eq!(outcome("nothing"), None);
    }
}
