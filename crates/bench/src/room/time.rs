//! How long a user waits: for a load, for an index, and for a machine that knows nothing yet.
//!
//! * Loads and index builds: a third of the data in each of three rounds, each round into a table of its own, so that the
//!   starts that follow find all of it.
//! * Starts: the bucket answers 30 ms late, as one in another building does. InnoDB has no start from an empty disk;
//!   beside it stands its clean restart on its own disk, with an empty buffer pool.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use acceptance::s3::Weather;
use acceptance::server::{Plan, server_env};
use bench::machine::Watch;

use crate::Arguments;
use crate::report::{Better, Report, Subject};
use crate::target::{Kind, Target, execute, query};

const TABLES: u64 = 3;
const ROW_BYTES: u64 = 200;
const AWAY: Duration = Duration::from_millis(30);
/// Connections that read after a start.
const READERS: u64 = 8;

/// At 1 GB, and with ALL=1 at 10 GB.
pub fn run(arguments: &Arguments, directory: &Path, report: &mut Report) -> Result<(), String> {
    let gigabytes: &[f64] = if arguments.all { &[1.0, 10.0] } else { &[1.0] };
    for &size in gigabytes {
        let size = size * arguments.scale;
        let directory = directory.join(format!("{size}"));
        std::fs::create_dir_all(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
        at_size(size, &directory, report)?;
    }
    Ok(())
}

fn at_size(gigabytes: f64, directory: &Path, report: &mut Report) -> Result<(), String> {
    let rows = ((gigabytes * 1e9) as u64 / ROW_BYTES / TABLES).max(2000);
    let store = Weather::slow(&directory.join("bucket"), AWAY);
    let mut plan = Plan::in_directory(directory);
    store.serve(&mut plan);
    for option in ["--cistern-memory-size=1152M", "--cistern-transaction-size-max=16G"] {
        plan.server_options.push(option.into());
    }
    let ours = Target::start_planned(Kind::Cistern, directory, plan)?;
    let innodb = Target::start(Kind::InnoDb, directory, &[])?;
    let mut targets = [ours, innodb];
    for target in &targets {
        execute(&mut target.connect()?, "CREATE DATABASE bench")?;
    }
    loads(gigabytes, rows, directory, &targets, report)?;
    for target in &targets {
        target.settle()?;
    }
    starts(gigabytes, rows, directory, &mut targets, report)
}

fn subject(name: &str, gigabytes: f64, unit: &'static str, goal: &'static str) -> Subject {
    let name = format!("{name}, {gigabytes} GB");
    Subject { section: "time", name, unit, better: Better::Less, goal }
}

fn seconds_of(connection: &mut mysql::Conn, statement: &str) -> Result<f64, String> {
    let start = Instant::now();
    execute(connection, statement)?;
    Ok(start.elapsed().as_secs_f64())
}

// ---- loads ----

fn loads(
    gigabytes: f64,
    rows: u64,
    directory: &Path,
    targets: &[Target],
    report: &mut Report,
) -> Result<(), String> {
    let (text, dump) = (directory.join("rows.tsv"), directory.join("dump.sql"));
    write_files(rows, &text, &dump).map_err(|error| format!("{}: {error}", directory.display()))?;
    let bytes = (rows * ROW_BYTES) as f64 / 1e9;
    report.measure(
        [subject("LOAD DATA", gigabytes, "s a GB", "")],
        TABLES as u32,
        targets,
        |target, round| {
            let mut connection = target.connect()?;
            execute(&mut connection, &create_table(&format!("bench.t{round}")))?;
            let load = format!("LOAD DATA INFILE '{}' INTO TABLE bench.t{round}", text.display());
            Ok([seconds_of(&mut connection, &load)? / bytes])
        },
    );
    report.measure(
        [subject("ADD INDEX", gigabytes, "s a GB", "")],
        TABLES as u32,
        targets,
        |target, round| {
            let alter = format!("ALTER TABLE bench.t{round} ADD INDEX (k)");
            Ok([seconds_of(&mut target.connect()?, &alter)? / bytes])
        },
    );
    report.measure(
        [subject("mysqldump file", gigabytes, "s a GB", "")],
        TABLES as u32,
        targets,
        |target, _| {
            let mut connection = target.connect()?;
            execute(&mut connection, "CREATE OR REPLACE DATABASE dumped")?;
            let start = Instant::now();
            feed(target, &dump)?;
            let took = start.elapsed().as_secs_f64();
            let expected = vec![vec![rows.to_string()]];
            let found = query(&mut connection, "SELECT COUNT(*) FROM dumped.t")?;
            if found != expected {
                return Err(format!("{rows} rows were loaded, {found:?} are there"));
            }
            Ok([took / bytes])
        },
    );
    for target in targets.iter() {
        execute(&mut target.connect()?, "DROP DATABASE dumped")?;
    }
    for file in [text, dump] {
        std::fs::remove_file(&file).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(())
}

fn create_table(name: &str) -> String {
    format!(
        "CREATE TABLE {name} (id INT UNSIGNED NOT NULL PRIMARY KEY, k INT UNSIGNED NOT NULL, pad CHAR(192) NOT NULL) \
         CHARACTER SET latin1"
    )
}

/// The same rows as tab-separated text and as what mysqldump writes: ascending keys, statements of a megabyte.
fn write_files(rows: u64, text: &PathBuf, dump: &PathBuf) -> std::io::Result<()> {
    let (mut text, mut dump) = (BufWriter::new(File::create(text)?), BufWriter::new(File::create(dump)?));
    writeln!(dump, "SET NAMES utf8mb4;\nSET UNIQUE_CHECKS=0, FOREIGN_KEY_CHECKS=0;")?;
    writeln!(dump, "{};\nLOCK TABLES `t` WRITE;\nALTER TABLE `t` DISABLE KEYS;", create_table("`t`"))?;
    const STATEMENT: u64 = 5000;
    for n in 0..rows {
        let (id, k) = (n + 1, scattered(n) >> 33);
        let mut pad = String::with_capacity(192);
        for part in 0..12 {
            pad.push_str(&format!("{:016x}", scattered(n * 12 + part)));
        }
        writeln!(text, "{id}\t{k}\t{pad}")?;
        let before = if n % STATEMENT == 0 { "INSERT INTO `t` VALUES " } else { "," };
        let after = if n % STATEMENT == STATEMENT - 1 || n == rows - 1 { ";\n" } else { "" };
        write!(dump, "{before}({id},{k},'{pad}'){after}")?;
    }
    writeln!(dump, "ALTER TABLE `t` ENABLE KEYS;\nUNLOCK TABLES;")?;
    text.flush()?;
    dump.flush()
}

fn scattered(n: u64) -> u64 {
    let n = (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    n ^ (n >> 27)
}

/// The server's own client reads the file, as a person would have it.
fn feed(target: &Target, dump: &Path) -> Result<(), String> {
    let file = File::open(dump).map_err(|error| format!("{}: {error}", dump.display()))?;
    let output = Command::new(server_env("MARIADB_CLIENT"))
        .args(["--no-defaults", "--protocol=tcp", "--host=127.0.0.1", "--user=root", "dumped"])
        .arg(format!("--port={}", target.port()))
        .stdin(file)
        .stdout(Stdio::null())
        .output()
        .map_err(|error| format!("the client: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    // It repeats the statement, which has a megabyte.
    let said = String::from_utf8_lossy(&output.stderr);
    let errors = said.lines().filter(|line| line.starts_with("ERROR"));
    Err(errors.collect::<Vec<_>>().join("\n"))
}

// ---- starts ----

/// Seconds from the start of the program.
#[derive(Clone, Debug)]
struct Start {
    ready: f64,
    first_query: f64,
    thousand_reads: f64,
    ninety_percent: f64,
    hits_at_once: f64,
    /// Why nine of ten reads never hit; `ninety_percent` is then how long it was tried.
    gave_up: Option<String>,
}

fn starts(
    gigabytes: f64,
    rows: u64,
    directory: &Path,
    targets: &mut [Target],
    report: &mut Report,
) -> Result<(), String> {
    for is_empty in [true, false] {
        let watch = Watch::begin();
        let mut figures: Vec<_> = targets.iter().map(|target| (target.name(), Vec::new())).collect();
        let (mut failures, mut notes) = (Vec::new(), Vec::new());
        for round in 0..3 {
            for (target, (name, starts)) in targets.iter_mut().zip(&mut figures) {
                // InnoDB without its disk is a database without its data: it is restarted both times.
                let loses_disk = is_empty && target.kind() == Kind::Cistern;
                match start(target, rows, round, loses_disk.then(|| directory.join("data"))) {
                    Ok(start) => {
                        let reason = start.gave_up.as_ref().map(|reason| format!("{name}: {reason}"));
                        // What does not fit into a peer's memory is its own affair.
                        let of = if target.kind() == Kind::Cistern { &mut failures } else { &mut notes };
                        of.extend(reason);
                        starts.push(start);
                    }
                    Err(reason) => failures.push(format!("{name}: {reason}")),
                }
            }
        }
        let load = watch.end();
        let what = if is_empty { "from an empty disk" } else { "restart, disk intact" };
        type Part = (&'static str, &'static str, Better, &'static str, fn(&Start) -> f64);
        let parts: [Part; 5] = [
            ("accepts connections", "s", Better::Less, if is_empty { "" } else { "2 s" }, |start| {
                start.ready
            }),
            ("first query", "s", Better::Less, if is_empty { "3 s" } else { "" }, |start| start.first_query),
            ("1,000 point reads", "s", Better::Less, "", |start| start.thousand_reads),
            ("90 % of reads hit", "s", Better::Less, "", |start| start.ninety_percent),
            ("hits of the first 1,000", "%", Better::More, if is_empty { "" } else { "90 %" }, |start| {
                start.hits_at_once * 100.0
            }),
        ];
        for (part, unit, better, goal, get) in parts {
            let subject = Subject { better, ..subject(&format!("{what}: {part}"), gigabytes, unit, goal) };
            let figures =
                figures.iter().map(|(name, starts)| (*name, starts.iter().map(get).collect())).collect();
            report.push(subject, figures, load, Vec::new(), std::mem::take(&mut failures));
        }
        report.note(format!(
            "a hit needs nothing from the bucket (InnoDB: from its disk); {READERS} connections read evenly from the newest \
             tenth of the rows; the bucket answers after {} ms",
            AWAY.as_millis()
        ));
        notes.into_iter().for_each(|note| report.note(note));
    }
    Ok(())
}

fn start(target: &mut Target, rows: u64, round: u64, lose: Option<PathBuf>) -> Result<Start, String> {
    const READS_MAX: u64 = 400_000;
    target.stop();
    if let Some(data) = lose {
        std::fs::remove_dir_all(&data).map_err(|error| format!("{}: {error}", data.display()))?;
    }
    let begun = Instant::now();
    target.start_again()?;
    let ready = begun.elapsed().as_secs_f64();
    query(&mut target.connect()?, &read(rows, 0))?;
    let first_query = begun.elapsed().as_secs_f64();
    let before = misses(target)?;
    let mut last = (0, before);
    let (mut thousand_reads, mut hits_at_once) = (0.0, 0.0);
    let readers = Readers::connect(target)?;
    let (mut reads, mut gave_up) = (0, None);
    loop {
        const BATCH: u64 = 1000;
        let seed = (round + 1) << 32 | reads;
        readers.read(rows, seed, BATCH)?;
        reads += BATCH;
        let now = misses(target)?;
        let hits = 1.0 - (now - last.1) as f64 / (reads - last.0) as f64;
        if thousand_reads == 0.0 {
            (thousand_reads, hits_at_once) = (begun.elapsed().as_secs_f64(), hits.max(0.0));
        }
        last = (reads, now);
        if hits >= 0.9 {
            break;
        }
        if reads > READS_MAX {
            gave_up = Some(format!(
                "after {READS_MAX} reads only {:.0} % hit; it was not tried longer",
                hits * 100.0
            ));
            break;
        }
    }
    Ok(Start {
        ready,
        first_query,
        thousand_reads,
        ninety_percent: begun.elapsed().as_secs_f64(),
        hits_at_once,
        gave_up,
    })
}

/// Requests that had to leave the machine, or for InnoDB the memory.
fn misses(target: &Target) -> Result<u64, String> {
    let name = match target.kind() {
        Kind::Cistern => "cistern_bucket_waits",
        _ => "innodb_buffer_pool_reads",
    };
    target.counters(name)?.get(name).copied().ok_or_else(|| format!("there is no counter {name}"))
}

/// A row of the newest tenth of one of the tables.
fn read(rows: u64, n: u64) -> String {
    let any = scattered(n);
    let (table, id) = (any % TABLES, rows - (any >> 8) % (rows / 10).max(1));
    format!("SELECT pad FROM bench.t{table} WHERE id = {id}")
}

/// Connections that are made once.
struct Readers(Vec<std::sync::Mutex<mysql::Conn>>);

impl Readers {
    fn connect(target: &Target) -> Result<Self, String> {
        let connections = (0..READERS).map(|_| target.connect().map(std::sync::Mutex::new));
        Ok(Self(connections.collect::<Result<_, String>>()?))
    }

    fn read(&self, rows: u64, seed: u64, reads: u64) -> Result<(), String> {
        let next = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .0
                .iter()
                .map(|connection| {
                    let next = &next;
                    scope.spawn(move || {
                        let mut connection = connection.lock().expect("no reader panics");
                        loop {
                            let n = next.fetch_add(1, Ordering::Relaxed);
                            if n >= reads {
                                return Ok(());
                            }
                            let rows = query(&mut connection, &read(rows, seed.wrapping_add(n)))?;
                            if rows.len() != 1 {
                                return Err(format!("a row that was loaded is not there: {}", rows.len()));
                            }
                        }
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("a reader does not panic"))
        })
    }
}
