//! `make bench`: what Cistern does beside what InnoDB and MyRocks do, measured in turn, in one table.
//!
//! * A figure is the median of rounds in which every server has its turn; the order rotates.
//! * A ratio above 1 says that Cistern is ahead, whether more or less of the unit is better.
//! * Nothing is asserted about speed. A run that failed, or servers that answered differently, end it with code 1.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

mod beyond;
mod cost;
mod handler;
mod report;
mod sysbench;
mod target;
mod throttle;
mod time;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use report::Report;

/// Measures Cistern beside InnoDB and MyRocks and prints one table; figures are medians of interleaved rounds.
#[derive(Parser)]
#[command(name = "make bench", after_help = TEACHING)]
pub struct Arguments {
    /// Sections to run, comma-separated; all without it
    #[arg(long, value_delimiter = ',', value_name = "SECTION")]
    only: Vec<Section>,
    /// The long form: every workload, longer runs, ten times the data in `time`
    #[arg(long)]
    all: bool,
    /// Seconds of each run of `sysbench` and `beyond`, instead of 3 and 5, or 15 and 30 with --all
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    seconds: Option<u32>,
    /// Rounds in which every server has its turn
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Share of the data and of the seconds, for trying the room itself; a run at less than 1 is never recorded
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Leave MyRocks out
    #[arg(long)]
    without_myrocks: bool,
    /// Record this run in docs/performance.md although only some sections ran
    #[arg(long)]
    record: bool,
    /// Put the servers' files here and keep them, instead of a directory below target/ that goes away
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

impl Arguments {
    /// Of a run: what is asked for, or else the form's own.
    fn seconds(&self, short: f64, long: f64) -> u32 {
        let seconds = if self.all { long } else { short };
        self.seconds.unwrap_or((seconds * self.scale).max(1.0) as u32)
    }
}

const TEACHING: &str = "\
Examples:
  make bench                                 the default set, in less than 40 minutes on a quiet machine
  make bench ONLY=handler,cost               two sections
  make bench ALL=1                           the long form
  make bench ALL=1 ONLY=sysbench ARGS='--seconds=3 --record'   all of sysbench in less than 45 minutes, for the history
  make bench ONLY=handler ARGS='--scale=0.1 --rounds=1'   to see whether it works

Reading the table: `ratio` above 1 means that Cistern is ahead. `spread` is (slowest - fastest) / median of Cistern's own
rounds. `load` is the machine's load average before and after the row; `others` is how many processors were busy with
what is not this run: with more than half a one the row is marked with `!` and proves little.
docs/performance.md says how each row is measured and keeps the history.";

/// A part of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Section {
    /// One SQL statement over many cached rows: what the storage engine costs below the executor
    Handler,
    /// Whole statements from sysbench's own process, 1, 8 and 32 threads
    Sysbench,
    /// Requests and bytes that the bucket sees for what a user writes, and for nothing
    Cost,
    /// Loads, index builds, and starts with and without a disk
    Time,
    /// Data three times the cache, on a slow disk and beside a distant bucket, 2 to 64 threads
    Beyond,
}

impl Section {
    fn run(
        self,
        arguments: &Arguments,
        directory: &std::path::Path,
        report: &mut Report,
    ) -> Result<(), String> {
        match self {
            Self::Handler => handler::run(arguments, directory, report),
            Self::Sysbench => sysbench::run(arguments, directory, report),
            Self::Cost => cost::run(arguments, directory, report),
            Self::Time => time::run(arguments, directory, report),
            Self::Beyond => beyond::run(arguments, directory, report),
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let sections =
        if arguments.only.is_empty() { Section::value_variants().to_vec() } else { arguments.only.clone() };
    let shortened = arguments.scale < 1.0 || arguments.rounds < 3 || arguments.seconds.is_some();
    let complete = arguments.only.is_empty() && !shortened;
    let place = acceptance::server::root().join("target/bench-room");
    std::fs::create_dir_all(&place).expect("target/ can be written");
    let scratch = tempfile::tempdir_in(&place).expect("target/ can be written");
    let directory = arguments.directory.clone().unwrap_or_else(|| scratch.path().to_owned());

    let mut report = Report::begin();
    for section in sections {
        let name = format!("{section:?}").to_lowercase();
        eprintln!("bench: {name}");
        let directory = directory.join(&name);
        std::fs::create_dir_all(&directory).expect("the directory can be made");
        // A server that does not start panics; the rows that are there, and the sections that follow, outlive that.
        let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            section.run(&arguments, &directory, &mut report)
        }));
        match ran {
            Ok(Ok(())) => (),
            Ok(Err(reason)) => report.fail(&name, reason),
            Err(_) => report.fail(&name, "it panicked; what it said is above".into()),
        }
        if arguments.directory.is_none()
            && let Err(error) = std::fs::remove_dir_all(&directory)
        {
            eprintln!("bench: {}: {error}", directory.display());
        }
    }
    println!("{}", report.table());
    if report.failed() {
        println!("At least one row failed: see above. Nothing is recorded.");
        return ExitCode::FAILURE;
    }
    if complete || arguments.record && arguments.scale >= 1.0 {
        match report.record(&bench::history::command_line("bench")) {
            Ok(file) => println!("recorded in {}", file.display()),
            Err(reason) => {
                println!("{reason}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
