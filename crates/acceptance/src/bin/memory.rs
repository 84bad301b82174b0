//! Whether a server keeps to the memory that it was given: sysbench and a reader of whole tables, on many times as much data, in a control
//! group (v1) that kills it if it takes more than a seventh beyond.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use acceptance::server::{Plan, Server, connect};
use acceptance::sysbench::Run;
use clap::Parser;
use mysql::prelude::Queryable;

/// Loads, then runs oltp_read_write beside full scans, and prints what the process takes. Ends with code 1 if it was killed, or was ever
/// above setting + 15 %.
#[derive(Parser)]
struct Arguments {
    /// cistern_memory_size, in MiB
    #[arg(long, default_value_t = 256)]
    memory_mib: u64,
    /// How many times as much data, as clients count it
    #[arg(long, default_value_t = 10)]
    times: u64,
    /// Seconds under load, the loading not counted
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Connections of sysbench
    #[arg(long, default_value_t = 16)]
    threads: u32,
    /// Connections that read whole tables, again and again
    #[arg(long, default_value_t = 1)]
    scans: u32,
    /// Seconds between two printed lines
    #[arg(long, default_value_t = 15)]
    every: u64,
    /// Keep the files here instead of in a temporary directory
    #[arg(long)]
    directory: Option<PathBuf>,
    /// More options for mariadbd
    #[arg(long = "server-option", allow_hyphen_values = true)]
    server_options: Vec<String>,
}

const TABLES: u32 = 4;
/// A row of sysbench: two integers and 180 characters, and the entry of its index.
const ROW_BYTES: u64 = 200;
/// What a server may take beyond its setting.
const SLACK: f64 = 1.15;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            println!("{reason}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool, String> {
    let scratch = tempfile::tempdir().map_err(|error| error.to_string())?;
    let directory = arguments.directory.clone().unwrap_or_else(|| scratch.path().to_owned());
    fs::create_dir_all(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let memory = arguments.memory_mib << 20;
    let limit = (memory as f64 * SLACK) as u64;
    let group = Group::new(limit)?;
    let mut plan = Plan::in_directory(&directory);
    plan.server_options.push(format!("--cistern-memory-size={memory}"));
    plan.server_options.extend(arguments.server_options.iter().cloned());
    let server = plan.start().map_err(|ended| format!("it did not start:\n{}", ended.said))?;
    let pid = server.mariadbd_pid().ok_or("no pid of mariadbd")?.as_raw_nonzero().get();
    group.hold(pid)?;
    println!("setting {} MiB, limit {} MiB; at the start {}", memory >> 20, limit >> 20, taken(pid)?);

    let wrong = |error: mysql::Error| error.to_string();
    server.connect().map_err(wrong)?.query_drop("CREATE DATABASE sbtest").map_err(wrong)?;
    let rows = memory * arguments.times / ROW_BYTES / u64::from(TABLES);
    let sizes = [format!("--tables={TABLES}"), format!("--table-size={rows}")];
    let peak = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<(), String> {
        // Whoever leaves this block, by whatever way, ends the others.
        let _end = EndOf(&done);
        scope.spawn(|| watch(pid, &server, &peak, &done, arguments.every));
        let sysbench = |threads, options: &[String], verb| {
            let (port, workload) = (server.port(), "oltp_read_write");
            Run { port, engine: "cistern", workload, database: "sbtest", threads }.verb(verb, options)
        };
        let began = Instant::now();
        sysbench(TABLES, &sizes, "prepare")?;
        println!("{} rows loaded in {:.0} s", rows * u64::from(TABLES), began.elapsed().as_secs_f64());
        for scan in 0..arguments.scans {
            let (port, done) = (server.port(), &done);
            scope.spawn(move || scan_tables(port, scan, done));
        }
        let time = [format!("--time={}", arguments.seconds)];
        let said = sysbench(arguments.threads, &[&sizes[..], &time].concat(), "run")?;
        let wanted = |line: &&str| line.contains("transactions:") || line.contains("95th");
        said.lines().filter(wanted).for_each(|line| println!("{}", line.trim()));
        Ok(())
    })
    .map_err(|reason| format!("{reason}\nkilled for want of memory: {} times", group.kills()))?;
    let peak = peak.load(Ordering::Relaxed);
    println!(
        "peak {} MiB of {} MiB ({:.2} × the setting); the group's limit was met {} times (page cache made room), {} kills",
        peak >> 20,
        limit >> 20,
        peak as f64 / memory as f64,
        group.met(),
        group.kills()
    );
    Ok(peak <= limit && group.kills() == 0)
}

struct EndOf<'a>(&'a AtomicBool);

impl Drop for EndOf<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Samples ten times a second, prints now and then.
fn watch(pid: i32, server: &Server, peak: &AtomicU64, done: &AtomicBool, every: u64) {
    let began = Instant::now();
    let mut printed = 0;
    while !done.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(100));
        let Ok(now) = resident(pid) else { return };
        peak.fetch_max(now, Ordering::Relaxed);
        let seconds = began.elapsed().as_secs();
        if seconds / every > printed {
            printed = seconds / every;
            let counters = counters(server).unwrap_or_else(|error| error.to_string());
            println!("{seconds:>5} s  resident {:>5} MiB  {counters}", now >> 20);
        }
    }
}

fn counters(server: &Server) -> mysql::Result<String> {
    let rows: Vec<(String, u64)> = server.connect()?.query("SHOW GLOBAL STATUS LIKE 'cistern%'")?;
    let mib =
        |name: &str| rows.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map_or(0, |row| row.1 >> 20);
    Ok(format!(
        "blocks {} of {}, lent {}, excess {}, memtable {}",
        mib("cistern_block_cache_bytes"),
        mib("cistern_block_cache_capacity"),
        mib("cistern_memory_lent"),
        mib("cistern_memory_excess"),
        mib("cistern_memtable_bytes")
    ))
}

fn scan_tables(port: u16, first: u32, done: &AtomicBool) {
    let scan = || -> mysql::Result<()> {
        let mut connection = connect(port)?;
        for number in (0..TABLES).cycle().skip(first as usize) {
            if done.load(Ordering::Relaxed) {
                break;
            }
            let sum = format!("SELECT SUM(LENGTH(c) + LENGTH(pad)) FROM sbtest.sbtest{}", number + 1);
            connection.query_drop(sum)?;
            println!("table {} was read", number + 1);
        }
        Ok(())
    };
    if let Err(error) = scan() {
        println!("a scan ended: {error}");
    }
}

fn resident(pid: i32) -> Result<u64, String> {
    field(pid, "VmRSS:")
}

fn field(pid: i32, name: &str) -> Result<u64, String> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) << 10)
}

fn taken(pid: i32) -> Result<String, String> {
    let [all, own] = [field(pid, "VmRSS:")?, field(pid, "RssAnon:")?];
    Ok(format!("{} MiB resident, {} MiB of them anonymous", all >> 20, own >> 20))
}

/// A control group with a limit of memory; gone with the value.
struct Group(PathBuf);

impl Group {
    fn new(limit: u64) -> Result<Self, String> {
        let path = PathBuf::from(format!("/sys/fs/cgroup/memory/cistern-memory-{}", std::process::id()));
        fs::create_dir(&path)
            .map_err(|error| format!("{}: {error} (cgroup v1 and root are needed)", path.display()))?;
        let group = Self(path);
        group.write("memory.limit_in_bytes", &limit.to_string())?;
        Ok(group)
    }

    /// A process that is in no group's way any more is moved nowhere: the group goes when its last process has gone.
    fn hold(&self, pid: i32) -> Result<(), String> {
        self.write("cgroup.procs", &pid.to_string())
    }

    fn met(&self) -> String {
        fs::read_to_string(self.0.join("memory.failcnt")).unwrap_or_default().trim().to_owned()
    }

    fn kills(&self) -> u64 {
        let text = fs::read_to_string(self.0.join("memory.oom_control")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill ")).unwrap_or("0");
        line.trim().parse().unwrap_or(0)
    }

    fn write(&self, file: &str, text: &str) -> Result<(), String> {
        let path: &Path = &self.0.join(file);
        fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            println!("{}: {error}", self.0.display());
        }
    }
}
