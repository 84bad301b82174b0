//! A write storm on the real engine, real disk, bucket 30 ms away: how long commits take, second by second.
//!
//! * Writers commit as fast as they are let: some rows anywhere in a table larger than the memtables, so flush, merges and uploads never rest.
//! * What the machine does to everybody is measured beside it: a thread that syncs 4 KiB of its own to the same disk, and one that only
//!   sleeps. A slow second in which neither was slow was made by the engine.
//! * Each second is a row of a table (CSV) and a point of a picture beside it. Nothing is asserted.
//!
//! ```console
//! $ make soak-writes MINUTES=5
//! ```
#![expect(clippy::disallowed_methods, reason = "a benchmark is about the machine's own time")]

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bucket::{DirectoryBucket, Effect, FaultyBucket, Rule};
use clap::Parser;
use engine::{Engine, LockMode, LockWait, Parts, RealDisk, Settings, SystemClock, TreeId};

/// Writes for a while and draws how long commits took
#[derive(Parser)]
struct Arguments {
    /// How long
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Connections that write at the same time
    #[arg(long, default_value_t = 8)]
    writers: u64,
    /// Rows of the table, 200 bytes each
    #[arg(long, default_value_t = 4_000_000)]
    rows: u64,
    /// Rows of one transaction, anywhere in the table
    #[arg(long, default_value_t = 10)]
    rows_a_commit: u64,
    /// Most transactions a second, of all writers together; as many as they can without it
    #[arg(long)]
    rate: Option<u64>,
}

const TREE: TreeId = TreeId(70);
/// A commit that takes longer is told with what the engine was at.
const STALL: Duration = Duration::from_millis(250);
const DELAY: Effect = Effect::Latency { p50: Duration::from_millis(30), p99: Duration::from_millis(120) };

/// Latencies of one second: counts by power of two of microseconds, in eighths.
struct Second {
    counts: Vec<AtomicU64>,
    slowest_us: AtomicU64,
    sync_us: AtomicU64,
    sleep_us: AtomicU64,
}

const STEPS: usize = 8;

impl Second {
    fn new() -> Self {
        let counter = AtomicU64::default;
        let counts = std::iter::repeat_with(counter).take(40 * STEPS).collect();
        Self { counts, slowest_us: counter(), sync_us: counter(), sleep_us: counter() }
    }

    fn count(&self, time: Duration) {
        let us = time.as_micros() as u64;
        self.counts[bucket_of(us).min(self.counts.len() - 1)].fetch_add(1, Ordering::Relaxed);
        self.slowest_us.fetch_max(us, Ordering::Relaxed);
    }

    fn commits(&self) -> u64 {
        self.counts.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// About what `share` of the commits stayed below.
    fn quantile(&self, share: f64) -> u64 {
        let wanted = (self.commits() as f64 * share).ceil() as u64;
        let mut seen = 0;
        let place = self.counts.iter().position(|count| {
            seen += count.load(Ordering::Relaxed);
            seen >= wanted
        });
        let ceiling = place.map_or(0.0, |place| 2f64.powf((place + 1) as f64 / STEPS as f64));
        (ceiling as u64).min(self.slowest_us.load(Ordering::Relaxed))
    }
}

fn bucket_of(us: u64) -> usize {
    ((us.max(1) as f64).log2() * STEPS as f64) as usize
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("soak-writes: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), String> {
    let target = Path::new("target/soak-writes");
    let root = target.join(std::process::id().to_string());
    let wrong = |error: std::io::Error| format!("{}: {error}", root.display());
    std::fs::create_dir_all(root.join("bucket")).map_err(wrong)?;
    let result = storm(arguments, &root).and_then(|seconds| report(arguments, target, &seconds));
    _ = std::fs::remove_dir_all(&root);
    result
}

fn storm(arguments: &Arguments, root: &Path) -> Result<Vec<(Second, State)>, String> {
    let told = |error: engine::Error| error.to_string();
    let directory = DirectoryBucket::open(&root.join("bucket")).map_err(|error| error.to_string())?;
    let far = FaultyBucket::new(Arc::new(directory), 1, vec![Rule::new("*", DELAY)])
        .with_pause(Arc::new(std::thread::sleep));
    let disk = RealDisk::open(root.join("data")).map_err(|error| error.to_string())?;
    let parts = Parts {
        bucket: Arc::new(far),
        disk: Arc::new(disk),
        clock: Arc::new(SystemClock::default()),
        seed: 1,
    };
    let settings = Settings { wal_upload_interval: Duration::from_millis(700), ..Settings::default() };
    let engine = Engine::open(parts, settings).map_err(told)?;
    let probe = File::create(root.join("probe")).map_err(|error| error.to_string())?;
    let count = (arguments.minutes * 60.0) as usize;
    let seconds: Vec<Second> = std::iter::repeat_with(Second::new).take(count + 120).collect();
    let mut states = Vec::new();
    let over = AtomicBool::new(false);
    let tickets = AtomicU64::new(0);
    let start = Instant::now();
    let now = |at: Instant| &seconds[((at - start).as_secs() as usize).min(seconds.len() - 1)];
    let written: Result<(), engine::Error> = std::thread::scope(|scope| {
        let (over, engine, tickets) = (&over, &engine, &tickets);
        let writers: Vec<_> = (0..arguments.writers)
            .map(|writer| scope.spawn(move || write(engine, arguments, writer, start, &now, over, tickets)))
            .collect();
        scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let at = Instant::now();
                let synced = probe.write_all_at(&[7; 4096], 0).and_then(|()| probe.sync_data());
                synced.expect("the disk takes 4 KiB");
                now(at).sync_us.fetch_max(at.elapsed().as_micros() as u64, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        scope.spawn(move || {
            const NAP: Duration = Duration::from_millis(2);
            while !over.load(Ordering::Relaxed) {
                let at = Instant::now();
                std::thread::sleep(NAP);
                let us = (at.elapsed() - NAP).as_micros() as u64;
                now(at).sleep_us.fetch_max(us, Ordering::Relaxed);
            }
        });
        for second in 0..count as u64 {
            std::thread::sleep(
                (start + Duration::from_secs(second + 1)).saturating_duration_since(Instant::now()),
            );
            states.push(State::of(engine));
        }
        over.store(true, Ordering::Relaxed);
        writers.into_iter().try_for_each(|writer| writer.join().expect("a writer does not panic"))
    });
    written.map_err(told)?;
    engine.close().map_err(told)?;
    // The last second is cut short.
    Ok(seconds.into_iter().zip(states).take(count.saturating_sub(1)).collect())
}

fn write<'a>(
    engine: &Arc<Engine>,
    arguments: &Arguments,
    writer: u64,
    start: Instant,
    second: &dyn Fn(Instant) -> &'a Second,
    over: &AtomicBool,
    tickets: &AtomicU64,
) -> Result<(), engine::Error> {
    let wait = LockWait { timeout: Duration::from_secs(50), interrupted: &|| false };
    let mut txn = engine.begin();
    let mut n = writer << 40;
    while !over.load(Ordering::Relaxed) {
        if let Some(rate) = arguments.rate {
            let ticket = tickets.fetch_add(1, Ordering::Relaxed);
            let due = start + Duration::from_secs_f64(ticket as f64 / rate as f64);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        for _ in 0..arguments.rows_a_commit {
            n += 1;
            // Writers have rows of their own, so that none waits for another's locks.
            let row = scattered(n) % (arguments.rows / arguments.writers) * arguments.writers + writer;
            txn.lock(TREE, &row.to_be_bytes(), LockMode::Exclusive, &wait)?;
            txn.put(TREE, &row.to_be_bytes(), &value(n))?;
        }
        let at = Instant::now();
        txn.commit()?;
        let time = at.elapsed();
        second(at).count(time);
        if time > STALL {
            let when = (at - start).as_secs_f64();
            eprintln!("{when:7.1} s: writer {writer} committed in {time:.0?}; now {}", State::of(engine));
        }
    }
    Ok(())
}

/// What the engine owes, and how many of its commits were made to wait for that since it was opened.
struct State {
    l0_runs: u64,
    frozen: u64,
    mib_to_upload: u64,
    edits: u64,
    merges: u64,
    delayed: u64,
}

impl State {
    fn of(engine: &Engine) -> Self {
        let status = engine.status();
        let count = |name: &str| status.get(name).expect("the engine counts it");
        Self {
            l0_runs: count("l0_runs"),
            frozen: count("memtables_frozen"),
            mib_to_upload: (count("unuploaded_bytes") + count("wal_unuploaded_bytes")) >> 20,
            edits: count("edits_queued"),
            merges: count("compactions"),
            delayed: count("writes_delayed"),
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { l0_runs, frozen, mib_to_upload, edits, merges, delayed } = self;
        write!(f, "{l0_runs} runs in L0, {frozen} memtables frozen, {mib_to_upload} MiB to upload, ")?;
        write!(f, "{edits} edits, {merges} merges, {delayed} commits delayed")
    }
}

/// How many seconds there were of each number, in words.
fn seconds_of_each(numbers: impl Iterator<Item = u64>) -> String {
    let mut counts = BTreeMap::new();
    numbers.for_each(|number| *counts.entry(number).or_insert(0_u64) += 1);
    let all: u64 = counts.values().sum();
    let each = counts.iter().map(|(number, count)| {
        format!("{number} in {count} s ({:.1} %)", *count as f64 * 100.0 / all as f64)
    });
    each.collect::<Vec<_>>().join(", ")
}

fn report(arguments: &Arguments, target: &Path, seconds: &[(Second, State)]) -> Result<(), String> {
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let ms = |us: u64| us as f64 / 1000.0;
    let mut table = "second,commits,p99_ms,max_ms,machine_sync_ms,machine_sleep_ms,\
                     l0_runs,frozen,mib_to_upload,edits,merges,delayed\n"
        .to_owned();
    for (number, (second, state)) in seconds.iter().enumerate() {
        let times =
            [second.quantile(0.99), load(&second.slowest_us), load(&second.sync_us), load(&second.sleep_us)];
        let times = times.map(|us| format!("{:.2}", ms(us))).join(",");
        let State { l0_runs, frozen, mib_to_upload, edits, merges, delayed } = state;
        let debts = [l0_runs, frozen, mib_to_upload, edits, merges, delayed].map(u64::to_string).join(",");
        writeln!(table, "{number},{},{times},{debts}", second.commits()).expect("a string takes all");
    }
    let (csv, picture) = (target.join("commits.csv"), target.join("commits.png"));
    std::fs::write(&csv, table).map_err(|error| format!("{}: {error}", csv.display()))?;
    let commits: u64 = seconds.iter().map(|(second, _)| second.commits()).sum();
    let slow = |second: &&(Second, State)| load(&second.0.slowest_us) > STALL.as_micros() as u64;
    let machine = |second: &&(Second, State)| {
        load(&second.0.sync_us).max(load(&second.0.sleep_us)) > STALL.as_micros() as u64 / 2
    };
    let stalled = seconds.iter().filter(slow).count();
    let slowest = seconds.iter().map(|(second, _)| load(&second.slowest_us)).max().unwrap_or(0);
    println!(
        "{commits} commits of {} rows by {} writers in {} s, {:.0} a second; the slowest took {:.0} ms",
        arguments.rows_a_commit,
        arguments.writers,
        seconds.len(),
        commits as f64 / seconds.len().max(1) as f64,
        ms(slowest)
    );
    println!(
        "{stalled} seconds with a commit above {} ms; in {} of them the machine itself was slow",
        STALL.as_millis(),
        seconds.iter().filter(slow).filter(machine).count()
    );
    let delayed = seconds.last().map_or(0, |(_, state)| state.delayed);
    println!("{delayed} commits delayed by back-pressure");
    println!("runs of L0: {}", seconds_of_each(seconds.iter().map(|(_, state)| state.l0_runs)));
    println!("frozen memtables: {}", seconds_of_each(seconds.iter().map(|(_, state)| state.frozen)));
    let drawn = Command::new("tools/plot").arg(&csv).arg(&picture).status();
    if !drawn.map_err(|error| format!("tools/plot: {error}"))?.success() {
        return Err("tools/plot says why there is no picture".into());
    }
    println!("{} and {}", csv.display(), picture.display());
    Ok(())
}

fn scattered(n: u64) -> u64 {
    let n = (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (n ^ (n >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 8
}

/// Half of it can be packed, as in real rows.
fn value(n: u64) -> [u8; 192] {
    let mut value = [b'.'; 192];
    for (word, bytes) in value[..96].chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&scattered(n * 12 + word as u64).to_le_bytes());
    }
    value
}
