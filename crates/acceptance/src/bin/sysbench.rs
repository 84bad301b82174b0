//! sysbench 1.0.20 against ours and against InnoDB, in turn, and the ratio of the medians.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use acceptance::server::{Peer, Plan};
use acceptance::sysbench::Run;
use clap::Parser;
use mysql::prelude::Queryable;

/// Runs each workload on both servers, A B A B …, and prints one table. Errors other than ignored deadlocks end it with code 1.
#[derive(Parser)]
struct Arguments {
    /// Rounds
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of each run
    #[arg(long, default_value_t = 15)]
    seconds: u32,
    /// Rows of each of the four tables
    #[arg(long, default_value_t = 250_000)]
    rows: u32,
    /// Threads, comma-separated
    #[arg(long, default_value = "1,8", value_delimiter = ',')]
    threads: Vec<u32>,
    /// Workloads, comma-separated
    #[arg(
        long,
        default_value = "oltp_point_select,oltp_read_write,oltp_write_only,oltp_insert,bulk_insert",
        value_delimiter = ','
    )]
    workloads: Vec<String>,
    /// Which rows: sysbench's `--rand-type`; `pareto` has a few hot ones
    #[arg(long, default_value = "special")]
    rand_type: String,
    /// Only ours, without the peer
    #[arg(long)]
    alone: bool,
    /// Keep the files here instead of in a temporary directory
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Options for our mariadbd
    #[arg(long = "server-option", allow_hyphen_values = true)]
    server_options: Vec<String>,
    /// Options for InnoDB's
    #[arg(long = "peer-option", allow_hyphen_values = true)]
    peer_options: Vec<String>,
}

const TABLES: u32 = 4;

struct Target {
    name: &'static str,
    port: u16,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let directory = arguments.directory.clone().unwrap_or_else(|| scratch.path().to_owned());
    std::fs::create_dir_all(&directory).expect("the directory can be made");
    let mut plan = Plan::in_directory(&directory);
    plan.server_options.clone_from(&arguments.server_options);
    let ours = plan.start().unwrap_or_else(|ended| panic!("cistern did not start:\n{}", ended.said));
    let peer_options: Vec<&str> = arguments.peer_options.iter().map(String::as_str).collect();
    let peer = (!arguments.alone).then(|| Peer::start(&directory, &peer_options));
    let mut targets = vec![Target { name: "cistern", port: ours.port() }];
    targets.extend(peer.as_ref().map(|peer| Target { name: "innodb", port: peer.port() }));
    println!("load average before: {}", std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim());

    let mut failed = false;
    for target in &targets {
        let mut connection = acceptance::server::connect(target.port).expect("it is ready");
        for database in ["sbtest", "sbbulk"] {
            connection.query_drop(format!("CREATE DATABASE {database}")).expect("a database can be made");
        }
        let options = [format!("--tables={TABLES}"), format!("--table-size={}", arguments.rows)];
        let output = sysbench(target, "oltp_read_write", "sbtest", 4, &options, "prepare");
        failed |= output.is_none();
    }
    let mut figures: BTreeMap<(usize, u32, &'static str), Vec<f64>> = BTreeMap::new();
    for round in 0..arguments.rounds {
        for (index, workload) in arguments.workloads.iter().enumerate() {
            for threads in &arguments.threads {
                for target in &targets {
                    let rate = measure(target, workload, *threads, &arguments);
                    eprintln!("round {round} {workload} {threads} threads {}: {rate:?}", target.name);
                    failed |= rate.is_none();
                    figures.entry((index, *threads, target.name)).or_default().push(rate.unwrap_or(0.0));
                }
            }
        }
    }
    println!("load average after: {}", std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim());
    println!("{:<20} {:>7} {:>12} {:>12} {:>7}", "workload (per s)", "threads", "cistern", "innodb", "ratio");
    for (index, workload) in arguments.workloads.iter().enumerate() {
        for threads in &arguments.threads {
            let median = |name| median(figures.get(&(index, *threads, name)).map_or(&[][..], Vec::as_slice));
            let (ours, theirs) = (median("cistern"), median("innodb"));
            println!("{workload:<20} {threads:>7} {ours:>12.0} {theirs:>12.0} {:>7.2}", ours / theirs);
        }
    }
    if failed {
        println!("at least one run failed: see above");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Transactions a second (rows a second for `bulk_insert`), or `None` after an error.
fn measure(target: &Target, workload: &str, threads: u32, arguments: &Arguments) -> Option<f64> {
    let bulk = workload == "bulk_insert";
    let database = if bulk { "sbbulk" } else { "sbtest" };
    let mut options = vec![format!("--time={}", arguments.seconds)];
    if bulk {
        // Its tables, one a thread, are made anew for each run.
        sysbench(target, workload, database, threads, &[], "cleanup")?;
        sysbench(target, workload, database, threads, &[], "prepare")?;
    } else {
        options.push(format!("--tables={TABLES}"));
        options.push(format!("--table-size={}", arguments.rows));
        options.push(format!("--rand-type={}", arguments.rand_type));
    }
    let output = sysbench(target, workload, database, threads, &options, "run")?;
    if let Some(repeated) = output.lines().find(|line| line.contains("ignored errors:")) {
        eprintln!(
            "{}, after deadlocks and conflicts",
            repeated.split_whitespace().collect::<Vec<_>>().join(" ")
        );
    }
    let line = output
        .lines()
        .map(str::trim)
        .find(|line| line.starts_with(if bulk { "events/s" } else { "transactions:" }));
    let line =
        line.or_else(|| output.lines().map(str::trim).find(|line| line.starts_with("transactions:")))?;
    match line.split_once('(') {
        Some((_, rest)) => rest.split_whitespace().next()?.parse().ok(),
        None => line.rsplit(char::is_whitespace).next()?.parse().ok(),
    }
}

fn sysbench(
    target: &Target,
    workload: &str,
    database: &str,
    threads: u32,
    options: &[String],
    verb: &str,
) -> Option<String> {
    let run = Run { port: target.port, engine: "innodb", workload, database, threads };
    run.verb(verb, options).inspect_err(|error| eprintln!("on {}: {error}", target.name)).ok()
}

fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
