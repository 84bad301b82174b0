//! More data than memory: what a cloud's ordinary volume gives InnoDB, beside a bucket that is 30 ms away.
//!
//! * InnoDB's whole data directory is on a disk of 3,000 operations and 125 MB a second; of ours, only the wal is.
//! * Our chunk cache is on the machine's free disk, as an instance has one; it starts with what the load left in it.
//! * Both have the same memory for data, a third of what is stored.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use acceptance::s3::Weather;
use acceptance::server::Plan;
use bench::machine::Watch;

use crate::Arguments;
use crate::report::{Better, Report, Subject, median};
use crate::sysbench::{Load, prepare};
use crate::target::{Kind, Target};
use crate::throttle::LimitedDisk;

const AWAY: Duration = Duration::from_millis(30);
const THREADS: [u32; 6] = [2, 4, 8, 16, 32, 64];
const MIB: u64 = 1 << 20;
/// What InnoDB needs for a row of sysbench, its index included.
const ROW_BYTES: u64 = 230;

/// Throughput and p95 of sysbench from 2 to 64 threads, as rows and as a picture.
pub fn run(arguments: &Arguments, directory: &Path, report: &mut Report) -> Result<(), String> {
    let cache = if arguments.all { 1024.0 } else { 256.0 } * arguments.scale;
    let cache = (cache as u64).max(16);
    let seconds = arguments.seconds(5.0, 30.0);
    let rows = (3 * cache * MIB / ROW_BYTES / 4) as u32;

    // The servers come after their disks, so that they end before them.
    let disk = |name: &str, mount: &str, mib: u64| {
        let image = directory.join(format!("{name}.img"));
        LimitedDisk::mount(name, &directory.join(mount), &image, mib * MIB)
    };
    let theirs = disk("innodb", "innodb", 10 * cache + 2048)?;
    let wal = disk("wal", "data/engine/wal", 2048)?;
    let limits = format!("InnoDB's disk {}; our wal's {}", theirs.probe()?, wal.probe()?);
    eprintln!("  {limits}");

    let store = Weather::slow(&directory.join("bucket"), AWAY);
    let mut plan = Plan::in_directory(directory);
    store.serve(&mut plan);
    // InnoDB's pool is one part of its server's memory; a server without any engine takes some 100 MiB beside it.
    plan.server_options.push(format!("--cistern-memory-size={}M", cache + 128));
    let ours = Target::start_planned(Kind::Cistern, directory, plan)?;
    let pool = format!("--innodb-buffer-pool-size={cache}M");
    let options =
        [&pool, "--innodb-log-file-size=512M", "--innodb-io-capacity=2000", "--innodb-io-capacity-max=3000"];
    let innodb = Target::start(Kind::InnoDb, directory, &options)?;
    let targets = [ours, innodb];
    for target in &targets {
        prepare(target, rows, 4)?;
        target.settle()?;
    }
    wal.hold(targets[0].pid()?)?;
    theirs.hold(targets[1].pid()?)?;

    let mut csv = String::from("workload,server,threads,tx_s,p95_ms\n");
    let mut is_noted = false;
    for workload in ["oltp_read_write", "oltp_write_only", "oltp_read_only"] {
        if workload == "oltp_read_only" && !arguments.all {
            continue;
        }
        let load = |threads, seconds| Load {
            workload,
            threads,
            rows,
            distribution: "uniform",
            seconds,
            awake: false,
        };
        for target in &targets {
            let warm = (20.0 * arguments.scale).max(2.0) as u32;
            load(16, warm).run(target)?;
        }
        for threads in THREADS {
            let load = load(threads, seconds);
            let (before, begun) = (theirs.operations(), Instant::now());
            let (rates, p95s) = measure(&load, arguments.rounds, &targets, report, &mut csv)?;
            if !is_noted {
                report.note(format!(
                    "three times the cache of {cache} MiB: {} MB in {rows} rows of each of four tables; probed limits: {limits}; \
                     bucket {} ms away; chunk cache on the free disk (and in its page cache)",
                    3 * cache * MIB / 1_000_000,
                    AWAY.as_millis()
                ));
                is_noted = true;
            }
            // It also writes while it is our turn.
            let served = (theirs.operations() - before) as f64 / begun.elapsed().as_secs_f64();
            eprintln!(
                "  InnoDB's disk served {served:.0} operations a second; {rates:.0?} tx/s, p95 {p95s:.1?} ms"
            );
        }
    }
    let figures = directory.join("beyond.csv");
    std::fs::write(&figures, csv).map_err(|error| format!("{}: {error}", figures.display()))?;
    report.draw(&figures, "beyond-memory")
}

/// Two rows from the same runs; their medians, ours first.
fn measure(
    load: &Load<'_>,
    rounds: u32,
    targets: &[Target; 2],
    report: &mut Report,
    csv: &mut String,
) -> Result<([f64; 2], [f64; 2]), String> {
    let watch = Watch::begin();
    let mut rates = [const { Vec::new() }; 2];
    let mut p95s = [const { Vec::new() }; 2];
    let mut failures = Vec::new();
    for round in 0..rounds as usize {
        for turn in 0..2 {
            let index = (turn + round) % 2;
            match load.run(&targets[index]) {
                Ok(outcome) => {
                    rates[index].push(outcome.rate);
                    p95s[index].push(outcome.p95_ms);
                }
                Err(reason) => failures.push(format!("{}: {reason}", targets[index].name())),
            }
        }
    }
    let during = watch.end();
    let medians = |all: &[Vec<f64>; 2]| [0, 1].map(|index| median(&all[index]).unwrap_or(f64::NAN));
    let found = (medians(&rates), medians(&p95s));
    for (index, target) in targets.iter().enumerate() {
        let (rate, p95) = (found.0[index], found.1[index]);
        writeln!(csv, "{},{},{},{rate},{p95}", load.workload, target.name(), load.threads)
            .expect("writing to a string does not fail");
    }
    let goal = if load.workload == "oltp_write_only" { "3×" } else { "2×" };
    for (unit, better, goal, all) in [("tx/s", Better::More, goal, rates), ("ms", Better::Less, "", p95s)] {
        let part = if unit == "ms" { ", p95" } else { "" };
        let name = format!("{}, {} threads{part}", load.workload, load.threads);
        let figures = targets.iter().map(Target::name).zip(all).collect();
        let subject = Subject { section: "beyond", name, unit, better, goal };
        report.push(subject, figures, during, Vec::new(), std::mem::take(&mut failures));
    }
    Ok(found)
}
