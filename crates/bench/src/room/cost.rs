//! What a bucket is asked for, and what it keeps: requests and bytes for what a user writes.
//!
//! * A user's byte is a byte of a column; keys, headers and wal are the engine's own affair.
//! * The bucket is S3 over HTTP on this machine, so that a large object costs as many requests as it would there.
//! * Counts do not depend on the machine's mood: they are taken once.

use std::path::Path;
use std::time::{Duration, Instant};

use acceptance::s3::Weather;
use acceptance::server::Plan;
use bench::machine::{Load, Watch};

use crate::Arguments;
use crate::report::{Better, Report, Subject};
use crate::target::{Kind, Target, execute};

/// An id and 196 characters.
const ROW_BYTES: f64 = 200.0;
const WRITERS: u64 = 4;
const GIB: f64 = (1_u64 << 30) as f64;

/// A bulk load, uniform random updates, small transactions, and silence.
pub fn run(arguments: &Arguments, directory: &Path, report: &mut Report) -> Result<(), String> {
    let store = Weather::slow(&directory.join("bucket"), Duration::ZERO);
    let mut plan = Plan::in_directory(directory);
    store.serve(&mut plan);
    plan.server_options.push("--cistern-memory-size=1152M".into());
    let ours = Target::start_planned(Kind::Cistern, directory, plan)?;
    let innodb = Target::start(Kind::InnoDb, directory, &[])?;
    let rows = ((arguments.scale * GIB / ROW_BYTES) as u64).max(10_000);
    let seconds = Duration::from_secs_f64((10.0 * arguments.scale).max(2.0));
    for target in [&ours, &innodb] {
        let mut connection = target.connect()?;
        execute(&mut connection, "CREATE DATABASE bench")?;
        execute(
            &mut connection,
            "CREATE TABLE bench.c (id INT UNSIGNED NOT NULL PRIMARY KEY, pad CHAR(196) NOT NULL) CHARACTER SET latin1",
        )?;
    }

    let mut room = Room { ours: &ours, innodb: &innodb, report };
    let bulk = |connection: &mut mysql::Conn, writer, _| load(connection, rows, writer);
    room.each_gib("bulk load", rows as f64 * ROW_BYTES, "", &bulk)?;
    room.space(directory, rows, "after the bulk load")?;
    // A quarter of the rows each gets a new value; what the tree still owes for it is paid before the counting ends.
    let updates = rows / 4;
    let update =
        |connection: &mut mysql::Conn, writer, round| update(connection, rows, updates, writer, round);
    room.each_gib("uniform updates", updates as f64 * ROW_BYTES, "12 bytes, 400 PUT", &update)?;
    room.space(directory, rows, "after the updates")?;
    for writers in [1, 8] {
        room.each_thousand(writers, rows, seconds)?;
    }
    room.idle(Duration::from_secs_f64((60.0 * arguments.scale).max(5.0)))
}

struct Room<'a> {
    ours: &'a Target,
    innodb: &'a Target,
    report: &'a mut Report,
}

/// What the bucket was asked for.
#[derive(Clone, Copy, Debug)]
struct Requests {
    put: f64,
    get: f64,
    list: f64,
    delete: f64,
    bytes: f64,
}

impl Requests {
    fn of(target: &Target) -> Result<Self, String> {
        let counters = target.counters("cistern_bucket_")?;
        let count = |name: &str| {
            let value = counters.get(&format!("cistern_bucket_{name}"));
            value
                .map(|&value| value as f64)
                .ok_or_else(|| format!("there is no counter cistern_bucket_{name}"))
        };
        Ok(Self {
            put: count("put_requests")?,
            get: count("get_requests")? + count("head_requests")?,
            list: count("list_requests")?,
            delete: count("delete_requests")?,
            bytes: count("put_bytes")?,
        })
    }
    fn since(self, before: Self) -> Self {
        Self {
            put: self.put - before.put,
            get: self.get - before.get,
            list: self.list - before.list,
            delete: self.delete - before.delete,
            bytes: self.bytes - before.bytes,
        }
    }
    fn kinds(self) -> [(&'static str, f64); 4] {
        [("PUT", self.put), ("GET", self.get), ("LIST", self.list), ("DELETE", self.delete)]
    }
}

type Work<'a> = &'a (dyn Fn(&mut mysql::Conn, u64, u64) -> Result<(), String> + Sync);

impl Room<'_> {
    /// Rows for one kind of writing, with everything that it makes the background do.
    fn each_gib(
        &mut self,
        what: &str,
        user_bytes: f64,
        goal: &'static str,
        work: Work<'_>,
    ) -> Result<(), String> {
        let watch = Watch::begin();
        let before = Requests::of(self.ours)?;
        self.on(self.ours, work)?;
        let asked = Requests::of(self.ours)?.since(before);
        let written = written_by(self.innodb)?;
        self.on(self.innodb, work)?;
        let written = written_by(self.innodb)? - written;
        let load = watch.end();
        for (kind, count) in asked.kinds() {
            let goal = if kind == "PUT" { goal.rsplit(", ").next().unwrap_or_default() } else { "" };
            self.row(format!("{what}: {kind}"), "a GiB", goal, vec![count / user_bytes * GIB], None, load);
        }
        let goal = goal.split(", ").next().unwrap_or_default();
        let (ours, theirs) = (asked.bytes / user_bytes, written / user_bytes);
        self.row(format!("{what}: bytes written"), "a byte", goal, vec![ours], Some(theirs), load);
        self.report.note(format!(
            "{:.0} MiB of a user; ours to the bucket, InnoDB's to its disk (/proc/<pid>/io: double writes, redo and undo included)",
            user_bytes / 1e6 * 1e6 / (1 << 20) as f64
        ));
        Ok(())
    }

    /// `work` by several connections, and then silence.
    fn on(&self, target: &Target, work: Work<'_>) -> Result<(), String> {
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    scope.spawn(move || {
                        let mut connection = target.connect()?;
                        execute(&mut connection, "USE bench")?;
                        work(&mut connection, writer, 1)
                    })
                })
                .collect();
            writers.into_iter().try_for_each(|writer| writer.join().expect("a writer does not panic"))
        })
        .map_err(|reason: String| format!("{}: {reason}", target.name()))?;
        target.settle().map_err(|reason| format!("{}: {reason}", target.name()))
    }

    fn space(&mut self, directory: &Path, rows: u64, when: &str) -> Result<(), String> {
        let bucket = size_of(&directory.join("bucket"))?;
        let file = size_of(&directory.join("innodb/bench/c.ibd"))?;
        let (row, load) = (1.0 / rows as f64, Watch::begin().end());
        let name = format!("space {when}");
        self.row(name, "bytes a row", "50 % (2×)", vec![bucket * row], Some(file * row), load);
        self.report
            .note("the whole bucket, what waits for its deletion included, against one .ibd file".into());
        Ok(())
    }

    /// Single-row updates, each a transaction, as fast as they go.
    fn each_thousand(&mut self, writers: u64, rows: u64, time: Duration) -> Result<(), String> {
        let watch = Watch::begin();
        self.ours.settle()?;
        let before = Requests::of(self.ours)?;
        let transactions: Result<Vec<u64>, String> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..writers)
                .map(|writer| {
                    let ours = self.ours;
                    scope.spawn(move || -> Result<u64, String> {
                        let mut connection = ours.connect()?;
                        let end = Instant::now() + time;
                        let mut done = 0;
                        while Instant::now() < end {
                            let id = scattered(done * writers + writer) % rows + 1;
                            execute(
                                &mut connection,
                                &format!("UPDATE bench.c SET pad = 'transaction {done}' WHERE id = {id}"),
                            )?;
                            done += 1;
                        }
                        Ok(done)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("a writer does not panic")).collect()
        });
        let transactions = transactions?.iter().sum::<u64>().max(1) as f64;
        self.ours.settle()?;
        let asked = Requests::of(self.ours)?.since(before);
        let load = watch.end();
        for (kind, count) in asked.kinds() {
            let name = format!("single-row updates, {writers} writers: {kind}");
            self.row(name, "1000 tx", "", vec![count / transactions * 1000.0], None, load);
        }
        let rate = transactions / time.as_secs_f64();
        self.report.note(format!(
            "{rate:.0} transactions a second for {} s; the wal goes up on a clock, so slower writers pay more for each",
            time.as_secs()
        ));
        Ok(())
    }

    fn idle(&mut self, time: Duration) -> Result<(), String> {
        self.ours.settle()?;
        let watch = Watch::begin();
        let before = Requests::of(self.ours)?;
        std::thread::sleep(time);
        let asked = Requests::of(self.ours)?.since(before);
        let load = watch.end();
        for (kind, count) in asked.kinds() {
            let goal = match kind {
                "PUT" => "0",
                "GET" => "≤ 60",
                _ => "",
            };
            let hour = count * 3600.0 / time.as_secs_f64();
            self.row(format!("idle: {kind}"), "an hour", goal, vec![hour], None, load);
        }
        self.report.note(format!("measured over {} idle seconds and scaled to an hour", time.as_secs()));
        Ok(())
    }

    fn row(
        &mut self,
        name: String,
        unit: &'static str,
        goal: &'static str,
        ours: Vec<f64>,
        innodb: Option<f64>,
        load: Load,
    ) {
        let subject = Subject { section: "cost", name, unit, better: Better::Less, goal };
        let mut figures = vec![("cistern", ours)];
        figures.extend(innodb.map(|figure| ("innodb", vec![figure])));
        self.report.push(subject, figures, load, Vec::new(), Vec::new());
    }
}

/// Ascending keys in `WRITERS` stretches, 5,000 rows to a statement; half of each value can be packed, as in real rows.
fn load(connection: &mut mysql::Conn, rows: u64, writer: u64) -> Result<(), String> {
    const BATCH: u64 = 5_000;
    let (first, end) = (rows * writer / WRITERS + 1, rows * (writer + 1) / WRITERS + 1);
    for from in (first..end).step_by(BATCH as usize) {
        let to = (from + BATCH).min(end) - 1;
        let value = value(0);
        execute(connection, &format!("INSERT INTO c SELECT seq, {value} FROM seq_{from}_to_{to}"))?;
    }
    Ok(())
}

/// Each of `updates` rows somewhere, 100 to a transaction.
fn update(
    connection: &mut mysql::Conn,
    rows: u64,
    updates: u64,
    writer: u64,
    round: u64,
) -> Result<(), String> {
    const BATCH: u64 = 100;
    for batch in 0..updates / WRITERS / BATCH {
        let rows = (0..BATCH).map(|n| {
            // Writers take turns with the rows, so that none waits for another's locks.
            let any = scattered((batch * BATCH + n) * WRITERS + writer) % (rows / WRITERS);
            (any * WRITERS + writer + 1).to_string()
        });
        let list: Vec<String> = rows.collect();
        let value = value(round).replace("seq", "id");
        // A long list shall stay a list of keys, not become a table to join.
        execute(
            connection,
            &format!(
                "SET STATEMENT in_predicate_conversion_threshold = 0 FOR \
                 UPDATE c SET pad = {value} WHERE id IN ({})",
                list.join(",")
            ),
        )?;
    }
    Ok(())
}

fn value(round: u64) -> String {
    // No number is hashed twice, or rows would pack by what they have in common with their neighbours.
    let parts = (0..6).map(|part| format!("MD5(seq * 8 + {})", (round << 40) + part));
    format!("CONCAT({}, 'abcd')", parts.collect::<Vec<_>>().join(", "))
}

fn scattered(n: u64) -> u64 {
    let n = (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (n ^ (n >> 29)) >> 16
}

/// Bytes that a process made the kernel write.
fn written_by(target: &Target) -> Result<f64, String> {
    let file = format!("/proc/{}/io", target.pid()?);
    let text = std::fs::read_to_string(&file).map_err(|error| format!("{file}: {error}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|number| number.parse().ok()).ok_or_else(|| format!("{file} has no write_bytes"))
}

/// Of a file, or of everything below a directory.
fn size_of(path: &Path) -> Result<f64, String> {
    let wrong = |error| format!("{}: {error}", path.display());
    let about = std::fs::symlink_metadata(path).map_err(wrong)?;
    if !about.is_dir() {
        return Ok(about.len() as f64);
    }
    let entries = std::fs::read_dir(path).map_err(wrong)?;
    // What is deleted meanwhile has no size.
    Ok(entries.flatten().filter_map(|entry| size_of(&entry.path()).ok()).sum())
}
