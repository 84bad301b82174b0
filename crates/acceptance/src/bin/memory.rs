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

/// Loads, then runs oltp_read_write beside full scans, and prints what the process takes. Ends with code 1 if it was killed, or its own memory
/// (without what it maps of files, which the kernel takes back when it likes) was ever above setting + 15 %.
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
    // What a process takes before it is in the group does not count there, so it is started from inside.
    group.enter()?;
    let started = plan.start();
    group.leave()?;
    let server = started.map_err(|ended| format!("it did not start:\n{}", ended.said))?;
    let pid = server.mariadbd_pid().ok_or("no pid of mariadbd")?.as_raw_nonzero().get();
    let [resident, files] = taken(pid)?;
    println!(
        "setting {} MiB, limit {} MiB; at the start {} MiB of its own, {} MiB of mapped files",
        memory >> 20,
        limit >> 20,
        (resident - files) >> 20,
        files >> 20
    );

    let wrong = |error: mysql::Error| error.to_string();
    server.connect().map_err(wrong)?.query_drop("CREATE DATABASE sbtest").map_err(wrong)?;
    let rows = memory * arguments.times / ROW_BYTES / u64::from(TABLES);
    let sizes = [format!("--tables={TABLES}"), format!("--table-size={rows}")];
    let peak = Peak::default();
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
    let own = peak.own.load(Ordering::Relaxed);
    println!(
        "peak of its own {} MiB of {} MiB ({:.2} × the setting), with mapped files {} MiB; the group's limit was met {} times (page cache made room), {} kills",
        own >> 20,
        limit >> 20,
        own as f64 / memory as f64,
        peak.resident.load(Ordering::Relaxed) >> 20,
        group.met(),
        group.kills()
    );
    Ok(own <= limit && group.kills() == 0)
}

/// The most that the server took.
#[derive(Default)]
struct Peak {
    /// Anonymous and shared memory.
    own: AtomicU64,
    /// And what it maps of files.
    resident: AtomicU64,
}

struct EndOf<'a>(&'a AtomicBool);

impl Drop for EndOf<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Samples ten times a second, prints now and then.
fn watch(pid: i32, server: &Server, peak: &Peak, done: &AtomicBool, every: u64) {
    let began = Instant::now();
    let mut printed = 0;
    while !done.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(100));
        let Ok([resident, files]) = taken(pid) else { return };
        let own = resident - files;
        peak.own.fetch_max(own, Ordering::Relaxed);
        peak.resident.fetch_max(resident, Ordering::Relaxed);
        let seconds = began.elapsed().as_secs();
        if seconds / every > printed {
            printed = seconds / every;
            let counters = counters(server).unwrap_or_else(|error| error.to_string());
            println!(
                "{seconds:>5} s  its own {:>5} MiB, mapped files {} MiB  {counters}",
                own >> 20,
                files >> 20
            );
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

/// What is in memory, and how much of that are files.
fn taken(pid: i32) -> Result<[u64; 2], String> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        kib.map(|kib| kib << 10).ok_or_else(|| format!("{path} has no {name}"))
    };
    Ok([field("VmRSS:")?, field("RssFile:")?])
}

/// A control group with a limit of memory; gone with the value.
struct Group {
    path: PathBuf,
    /// The group that this process was in before.
    outside: PathBuf,
}

impl Group {
    fn new(limit: u64) -> Result<Self, String> {
        let groups =
            fs::read_to_string("/proc/self/cgroup").map_err(|error| format!("/proc/self/cgroup: {error}"))?;
        let own = groups.lines().find_map(|line| line.split_once(":memory:"));
        let (_, own) = own.ok_or("/proc/self/cgroup names no group for memory (cgroup v1 is needed)")?;
        let root = Path::new("/sys/fs/cgroup/memory");
        let outside = root.join(own.trim_start_matches('/'));
        let path = root.join(format!("cistern-memory-{}", std::process::id()));
        fs::create_dir(&path)
            .map_err(|error| format!("{}: {error} (cgroup v1 and root are needed)", path.display()))?;
        let group = Self { path, outside };
        group.write("memory.limit_in_bytes", &limit.to_string())?;
        Ok(group)
    }

    /// This process, and those that it starts from now on.
    fn enter(&self) -> Result<(), String> {
        self.write("cgroup.procs", &std::process::id().to_string())
    }

    /// This process alone.
    fn leave(&self) -> Result<(), String> {
        let path = self.outside.join("cgroup.procs");
        fs::write(&path, std::process::id().to_string())
            .map_err(|error| format!("{}: {error}", path.display()))
    }

    fn met(&self) -> String {
        fs::read_to_string(self.path.join("memory.failcnt")).unwrap_or_default().trim().to_owned()
    }

    fn kills(&self) -> u64 {
        let text = fs::read_to_string(self.path.join("memory.oom_control")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill ")).unwrap_or("0");
        line.trim().parse().unwrap_or(0)
    }

    fn write(&self, file: &str, text: &str) -> Result<(), String> {
        let path: &Path = &self.path.join(file);
        fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            println!("{}: {error}", self.path.display());
        }
    }
}
