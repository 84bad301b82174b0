//! Kills the server under load, again and again, and counts what is lost.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use acceptance::oracle::{self, Memory, Verdict, Writers};
use acceptance::s3::{Moto, Weather};
use acceptance::server::{Plan, Server};
use clap::Parser;
use mysql::prelude::Queryable;

/// The server's own default.
const UPLOAD_INTERVAL: Duration = Duration::from_millis(700);

/// kill -9 under load, restart, compare with what the writers were told. Ends with code 1 at the first loss.
#[derive(Parser)]
struct Arguments {
    /// Kills
    #[arg(long, default_value_t = 100)]
    cycles: u64,
    /// Of these, how many also lose the data directory (spread evenly)
    #[arg(long, default_value_t = 20)]
    deletions: u64,
    /// Connections that write
    #[arg(long, default_value_t = 8)]
    writers: usize,
    /// Longest time under load before a kill, in milliseconds
    #[arg(long, default_value_t = 1500)]
    load_ms: u64,
    /// Seed of the kill times
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Bucket URL; a directory of its own if not given
    #[arg(long)]
    bucket: Option<String>,
    /// Instead of a bucket: start moto, and before it a server that breaks this share of the requests
    #[arg(long, conflicts_with = "bucket")]
    faulty_s3: Option<f64>,
    /// How much of the past may be gone when the directory is, in milliseconds; on S3 the slowest upload of the wal since the
    /// start, as the server measured it, comes on top
    #[arg(long, default_value_t = 1000)]
    window_ms: u64,
    /// Further options of `cistern serve`
    #[arg(long = "serve-option", allow_hyphen_values = true)]
    serve_options: Vec<String>,
    /// Keep the files here instead of in a temporary directory
    #[arg(long)]
    directory: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let directory = arguments.directory.clone().unwrap_or_else(|| scratch.path().to_owned());
    let mut plan = Plan::in_directory(&directory);
    plan.options.clone_from(&arguments.serve_options);
    if let Some(bucket) = &arguments.bucket {
        plan.bucket.clone_from(bucket);
    }
    let s3 = arguments.faulty_s3.map(|share| {
        let moto = Moto::start();
        (Weather::before(&moto, share, arguments.seed), moto)
    });
    if let Some((weather, _)) = &s3 {
        weather.serve(&mut plan);
    }
    let promised = Duration::from_millis(arguments.window_ms);
    let mut widest = promised;
    let mut random = arguments.seed;
    let mut memories = Memory::of(0..arguments.writers as u64);
    let (mut total, mut restarts) = (Verdict::default(), vec![]);
    let mut server = plan.start().expect("the first start works");
    oracle::prepare(&mut server.connect().expect("it is ready")).expect("tables can be made");

    for cycle in 1..=arguments.cycles {
        let delete = cycle * arguments.deletions / arguments.cycles
            != (cycle - 1) * arguments.deletions / arguments.cycles;
        let writers = Writers::start(server.port(), std::mem::take(&mut memories));
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(Duration::from_millis(200 + (random >> 33) % arguments.load_ms.max(1)));
        let asked = Instant::now();
        let slowest = if s3.is_some() { slowest_upload(&server) } else { Duration::ZERO };
        let killed = Instant::now();
        let window = window(promised, slowest, killed - asked);
        server.kill();
        memories = writers.stop();
        if delete {
            std::fs::remove_dir_all(&plan.data).expect("the data directory can be deleted");
        }
        server = match plan.start() {
            Ok(server) => server,
            Err(ended) => {
                println!("cycle {cycle}: failed start (code {}):\n{}", ended.code(), ended.said);
                return ExitCode::FAILURE;
            }
        };
        restarts.push(server.ready_in());
        let promise = if delete { killed.checked_sub(window) } else { None };
        widest = if delete { widest.max(window) } else { widest };
        let mut connection = server.connect().expect("it is ready");
        let verdict = oracle::judge(&mut connection, &mut memories, promise).expect("the judge can read");
        println!(
            "cycle {cycle}{}: ready in {:.2} s, {verdict:?}",
            if delete {
                format!(" (directory deleted, window {} ms)", window.as_millis())
            } else {
                String::new()
            },
            server.ready_in().as_secs_f64()
        );
        total.kept += verdict.kept;
        total.forgone += verdict.forgone;
        total.in_doubt += verdict.in_doubt;
        if verdict.lost + verdict.torn > 0 {
            println!("replay: {}", std::env::args().collect::<Vec<_>>().join(" "));
            if arguments.directory.is_none() {
                println!("kept: {}", scratch.keep().display());
            }
            return ExitCode::FAILURE;
        }
    }
    restarts.sort_unstable();
    println!(
        "{} kills, {} directories lost: 0 lost, 0 torn, 0 failed starts; {} kept, {} within the last {} ms, {} in doubt; \
         restart median {:.2} s, slowest {:.2} s",
        arguments.cycles,
        arguments.deletions,
        total.kept,
        total.forgone,
        widest.as_millis(),
        total.in_doubt,
        restarts.get(restarts.len() / 2).map_or(0.0, Duration::as_secs_f64),
        restarts.last().map_or(0.0, Duration::as_secs_f64),
    );
    if let Some((weather, _moto)) = s3 {
        println!("S3: {}", weather.counts());
    }
    println!("1 passed, 0 failed");
    ExitCode::SUCCESS
}

/// Uploads begin every 0.7 s, or when the one before is done. So a commit waits at most for the end of the upload that began just
/// before it, and then for its own.
fn window(promised: Duration, slowest: Duration, since_asked: Duration) -> Duration {
    let slack = promised.saturating_sub(UPLOAD_INTERVAL);
    promised.max(slowest + slack) + if slowest.is_zero() { Duration::ZERO } else { slowest + since_asked }
}

fn slowest_upload(server: &Server) -> Duration {
    let mut connection = server.connect().expect("it is ready");
    let row: Option<(String, u64)> =
        connection.query_first("SHOW GLOBAL STATUS LIKE 'cistern_wal_upload_ms_max'").expect("a status");
    Duration::from_millis(row.expect("uploads are measured").1)
}
