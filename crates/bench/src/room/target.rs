//! One server among those that are compared: ours or a stock one, each its own process with 1 GiB of cache.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use acceptance::server::{Peer, Plan, Server, Stock};
use bench::machine;
use mysql::prelude::Queryable;
use mysql::{Conn, Row};

/// Who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ours.
    Cistern,
    /// The stock server's own engine.
    InnoDb,
    /// RocksDB in the stock server.
    MyRocks,
}

/// A server that runs, or can be started again.
pub struct Target {
    kind: Kind,
    directory: PathBuf,
    plan: Plan,
    running: Option<Running>,
}

enum Running {
    Ours(Server),
    Stock(Peer),
}

impl Target {
    /// A new one with its files below `directory` and more options for mariadbd.
    pub fn start(kind: Kind, directory: &Path, options: &[&str]) -> Result<Self, String> {
        let mut plan = Plan::in_directory(directory);
        if kind == Kind::Cistern {
            plan.server_options.push("--cistern-memory-size=1152M".into());
        }
        plan.server_options.extend(options.iter().map(|&option| option.into()));
        Self::start_planned(kind, directory, plan)
    }

    /// The same, and the plan says how; stock servers take its options for mariadbd only.
    pub fn start_planned(kind: Kind, directory: &Path, plan: Plan) -> Result<Self, String> {
        let mut target = Self { kind, directory: directory.to_owned(), plan, running: None };
        target.start_again()?;
        Ok(target)
    }

    /// Ours, InnoDB and, if wanted, MyRocks.
    pub fn start_all(directory: &Path, with_myrocks: bool) -> Result<Vec<Self>, String> {
        let mut kinds = vec![Kind::Cistern, Kind::InnoDb];
        kinds.extend(with_myrocks.then_some(Kind::MyRocks));
        kinds.into_iter().map(|kind| Self::start(kind, directory, &[])).collect()
    }

    /// Starts it on its files; how long until it answered.
    pub fn start_again(&mut self) -> Result<Duration, String> {
        assert!(self.running.is_none(), "{} is stopped before it is started again", self.name());
        let options: Vec<&str> = self.plan.server_options.iter().map(String::as_str).collect();
        let stock = |stock| Running::Stock(Peer::start_with(stock, &self.directory, &options));
        let running = match self.kind {
            Kind::Cistern => Running::Ours(
                self.plan.start().map_err(|ended| format!("cistern did not start:\n{}", ended.said))?,
            ),
            Kind::InnoDb => stock(Stock::InnoDb),
            Kind::MyRocks => stock(Stock::MyRocks),
        };
        let took = match &running {
            Running::Ours(server) => server.ready_in(),
            Running::Stock(peer) => peer.ready_in(),
        };
        self.running = Some(running);
        Ok(took)
    }

    /// A clean stop, if it runs.
    pub fn stop(&mut self) {
        match self.running.take() {
            Some(Running::Ours(server)) => drop(server.stop()),
            Some(Running::Stock(peer)) => peer.stop(),
            None => (),
        }
    }

    /// As in the table's head.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Cistern => "cistern",
            Kind::InnoDb => "innodb",
            Kind::MyRocks => "myrocks",
        }
    }

    /// Who it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        match self.running.as_ref().expect("it runs") {
            Running::Ours(server) => server.port(),
            Running::Stock(peer) => peer.port(),
        }
    }

    /// The process id of its mariadbd.
    pub fn pid(&self) -> Result<i32, String> {
        match self.running.as_ref().expect("it runs") {
            Running::Ours(server) => server.mariadbd_pid().map(|pid| pid.as_raw_nonzero().get()),
            Running::Stock(peer) => Some(peer.pid().as_raw_nonzero().get()),
        }
        .ok_or_else(|| format!("{} has no pid", self.name()))
    }

    /// What its mariadbd has taken of the processors so far.
    pub fn processor_time(&self) -> Result<Duration, String> {
        machine::processor_time(self.pid()?)
    }

    /// A connection as root, without the query cache.
    pub fn connect(&self) -> Result<Conn, String> {
        let mut connection = acceptance::server::connect(self.port()).map_err(|error| error.to_string())?;
        execute(&mut connection, "SET SESSION query_cache_type = OFF")?;
        Ok(connection)
    }

    /// Its counters whose names begin with `prefix`, in lower case.
    pub fn counters(&self, prefix: &str) -> Result<BTreeMap<String, u64>, String> {
        let rows: Vec<(String, String)> = self
            .connect()?
            .query(format!("SHOW GLOBAL STATUS LIKE '{prefix}%'"))
            .map_err(|error| error.to_string())?;
        let number = |(name, value): (String, String)| Some((name.to_lowercase(), value.parse().ok()?));
        Ok(rows.into_iter().filter_map(number).collect())
    }

    /// Waits until it has nothing more to do in the background: what was written is where it will stay.
    pub fn settle(&self) -> Result<(), String> {
        let mut connection = self.connect()?;
        match self.kind {
            Kind::Cistern => self.wait_until_still("cistern_", &QUIET_COUNTERS, &DEBTS),
            Kind::InnoDb => {
                execute(&mut connection, "SET GLOBAL innodb_max_dirty_pages_pct = 0")?;
                self.wait_until_still(
                    "innodb_",
                    &["innodb_pages_written"],
                    &["innodb_buffer_pool_pages_dirty"],
                )?;
                execute(&mut connection, "SET GLOBAL innodb_max_dirty_pages_pct = DEFAULT")
            }
            Kind::MyRocks => {
                execute(&mut connection, "SET GLOBAL rocksdb_force_flush_memtable_and_lzero_now = ON")?;
                self.wait_until_still("rocksdb_", &["rocksdb_compact_write_bytes"], &[])
            }
        }
    }

    /// Until the first counters stood still and the others were 0 for some seconds.
    fn wait_until_still(&self, prefix: &str, still: &[&str], zero: &[&str]) -> Result<(), String> {
        let end = Instant::now() + SETTLE_LIMIT;
        let (mut last, mut since) = (Vec::new(), Instant::now());
        while since.elapsed() < STILL {
            if Instant::now() > end {
                return Err(format!("it is not quiet {} s after the load", SETTLE_LIMIT.as_secs()));
            }
            std::thread::sleep(Duration::from_millis(300));
            let counters = self.counters(prefix)?;
            let now: Vec<_> = still.iter().map(|name| counters.get(*name).copied()).collect();
            if now != last || zero.iter().any(|name| counters.get(*name).is_some_and(|&value| value > 0)) {
                (last, since) = (now, Instant::now());
            }
        }
        Ok(())
    }
}

/// Longer than the pause between two uploads of the wal.
const STILL: Duration = Duration::from_secs(3);
const SETTLE_LIMIT: Duration = Duration::from_secs(600);
/// A merge may take long before a counter shows it, and those for space wait until hardly anybody writes.
const DEBTS: [&str; 3] = ["cistern_edits_queued", "cistern_compactions_running", "cistern_surplus_bytes"];
const QUIET_COUNTERS: [&str; 4] = [
    "cistern_flushes",
    "cistern_compactions",
    "cistern_bucket_put_requests",
    "cistern_bucket_delete_requests",
];

/// Runs a statement for its effect.
pub fn execute(connection: &mut Conn, sql: &str) -> Result<(), String> {
    connection.query_drop(sql).map_err(|error| format!("{error} in {}", shortened(sql)))
}

/// All rows as text.
pub fn query(connection: &mut Conn, sql: &str) -> Result<Vec<Vec<String>>, String> {
    let rows: Vec<Row> = connection.query(sql).map_err(|error| format!("{error} in {}", shortened(sql)))?;
    let text = |value: mysql::Value| match value {
        mysql::Value::Bytes(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        mysql::Value::NULL => "NULL".into(),
        other => other.as_sql(false),
    };
    Ok(rows.into_iter().map(|row| row.unwrap().into_iter().map(text).collect()).collect())
}

fn shortened(sql: &str) -> String {
    let short: String = sql.chars().take(200).collect();
    if short.len() < sql.len() { short + " …" } else { short }
}
