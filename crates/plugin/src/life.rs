//! The engine inside the server: started once, stopped once, reachable from every entry.
//!
//! * Files of views, triggers and schema options are in the data directory before the server looks for them.
//! * When the engine can not go on (fenced, wal failed) the process ends at once: nothing may be acknowledged any more.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use engine::{Background, Clock, Disk, Engine, Error, Hooks, Kind, Parts, RealDisk, Settings, SystemClock};
use parking_lot::RwLock;
use tables::Store;

use crate::border::Callbacks;
use crate::codes::exit;
use crate::collations::ServerCollations;
use crate::files::{Failure, FileMirror, Watcher};
use crate::log::{self, Level};
use crate::memory;
use crate::paths::TEMPORARY;

/// Names a point of the engine at which the process is killed or stopped. For tests of crashes alone.
const TEST_POINT: &str = "CISTERN_TEST_POINT";

/// What an operator set.
pub struct Start {
    pub bucket: String,
    pub branch: String,
    pub data_dir: String,
    pub server_dir: String,
    /// For the whole process; 0: as the machine allows.
    pub memory_bytes: u64,
    /// 0: as fits the memory.
    pub memtable_bytes: u64,
    /// 0: as fits the disk.
    pub disk_cache_bytes: u64,
    /// 0: as fits the disk.
    pub unuploaded_bytes_max: u64,
    /// 0: as fits the memory.
    pub transaction_bytes_max: u64,
    pub wal_upload_interval: Duration,
}

/// All that runs.
pub struct Life {
    pub store: Arc<Store>,
    pub collations: Arc<ServerCollations>,
    pub files: Arc<FileMirror>,
    engine: Arc<Engine>,
    watcher: Watcher,
}

static LIFE: RwLock<Option<Arc<Life>>> = RwLock::new(None);

/// What runs now; an error if nothing does.
pub fn life() -> tables::Result<Arc<Life>> {
    LIFE.read().clone().ok_or(tables::Error::Malformed("call: the engine is not running"))
}

/// Starts the engine. On refusal the reason is in the log, and the result is the exit status that says it.
pub fn start(callbacks: &Callbacks, start: &Start) -> Result<(), i32> {
    log::set_callbacks(*callbacks);
    match open(callbacks, start) {
        Ok(life) => {
            *LIFE.write() = Some(Arc::new(life));
            Ok(())
        }
        Err((status, message)) => {
            log::write(Level::Error, &message);
            Err(status)
        }
    }
}

/// Stops it: files mirrored, counters written, wal durable and uploaded.
pub fn stop() {
    let Some(life) = LIFE.write().take() else { return };
    life.watcher.stop();
    for (what, result) in [
        ("mirroring the files of views and triggers", life.files.sync().map_err(|error| error.to_string())),
        ("writing the tables' counters", life.store.close().map_err(|error| error.to_string())),
        ("closing the engine", life.engine.close().map_err(|error| error.to_string())),
    ] {
        if let Err(error) = result {
            log::write(Level::Error, &format!("{what}: {error}"));
        }
    }
}

impl Life {
    /// All counters for SHOW STATUS.
    pub fn counters(&self) -> Vec<(String, u64)> {
        let engine = self.engine.status();
        let tables = ("index_condition_rows_spared", self.store.rows_spared());
        engine.rows().iter().copied().chain([tables]).map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// SHOW ENGINE CISTERN STATUS.
    pub fn status_text(&self) -> String {
        let mut text = String::new();
        for (name, value) in self.counters() {
            text.push_str(&format!("{name} {value}\n"));
        }
        text
    }
}

type Refusal = (i32, String);

fn refused(error: &Error, doing: &str) -> Refusal {
    (exit::status_of(error.kind()), format!("{doing}: {error}"))
}

fn open(callbacks: &Callbacks, start: &Start) -> Result<Life, Refusal> {
    let url = match start.bucket.as_str() {
        "" => std::env::var("CISTERN_BUCKET").unwrap_or_default(),
        url => url.to_owned(),
    };
    if url.is_empty() {
        return Err((
            exit::CONFIGURATION,
            "no bucket: set cistern_bucket or the environment variable CISTERN_BUCKET to its URL".to_owned(),
        ));
    }
    if let Ok(point) = std::env::var(TEST_POINT) {
        let armed = engine::points::arm(&point);
        armed.map_err(|why| (exit::CONFIGURATION, format!("{TEST_POINT}: {why}")))?;
    }
    let server_dir = PathBuf::from(&start.server_dir);
    let url = below_server_dir(&url, &server_dir)?;
    let bucket = bucket::open(&url, &bucket::Options::default())
        .map_err(|error| refused(&error.into(), "cistern_bucket"))?;
    let local = match start.data_dir.as_str() {
        "" => server_dir.join("#cistern"),
        set => PathBuf::from(set),
    };
    let disk = RealDisk::open(&local)
        .map_err(|error| (exit::CONFIGURATION, format!("cistern_data_dir {}: {error}", local.display())))?;
    let settings = settings(start, &disk);
    let parts = Parts {
        bucket,
        disk: Arc::new(disk) as Arc<dyn Disk>,
        clock: Arc::new(SystemClock::default()) as Arc<dyn Clock>,
        seed: chance(),
    };
    let engine = Engine::open(parts, settings).map_err(|error| refused(&error, "opening the bucket"))?;
    open_tables(callbacks, engine, &server_dir)
}

/// `file:./name` is a directory in the server's data directory, made if it is absent. For tests that start many servers: each has its own.
fn below_server_dir(url: &str, server_dir: &Path) -> Result<String, Refusal> {
    let Some(name) = url.strip_prefix("file:./") else { return Ok(url.to_owned()) };
    let directory = server_dir.join(name);
    let made = std::fs::create_dir_all(&directory).and_then(|()| directory.canonicalize());
    match made {
        Ok(directory) => Ok(format!("file://{}", directory.display())
            .replace('%', "%25")
            .replace('#', "%23")
            .replace('?', "%3F")),
        Err(error) => Err((exit::CONFIGURATION, format!("cistern_bucket {}: {error}", directory.display()))),
    }
}

fn open_tables(callbacks: &Callbacks, engine: Arc<Engine>, server_dir: &Path) -> Result<Life, Refusal> {
    let broken = |error: tables::Error| match &error {
        tables::Error::Engine(error) => refused(error, "opening the catalogue"),
        _ => (exit::CONFIGURATION, format!("opening the catalogue: {error}")),
    };
    let collations = Arc::new(ServerCollations::new(callbacks));
    let store = Store::open(Arc::clone(&engine), Arc::clone(&collations) as Arc<dyn tables::Collations>)
        .map_err(broken)?;
    store.drop_database(TEMPORARY).map_err(broken)?;
    let fresh = format!("{:x}-{:016x}", engine.epoch().0, chance());
    let files = FileMirror::restore(server_dir, Arc::clone(&store), engine.continues_local_wal(), &fresh);
    let files = Arc::new(files.map_err(|failure| match failure {
        Failure::Catalogue(error) => broken(error),
        Failure::File(path, error) => (exit::CONFIGURATION, format!("{}: {error}", path.display())),
    })?);
    let watcher = Watcher::start(Arc::clone(&files));
    Ok(Life { store, collations, files, engine, watcher })
}

fn settings(start: &Start, disk: &RealDisk) -> Settings {
    let set = |value: u64, least: usize, derived: usize| match value {
        0 => derived,
        set => usize::try_from(set).unwrap_or(usize::MAX).max(least),
    };
    let process = memory::process_bytes(start.memory_bytes);
    let derived = Settings::for_memory(memory::engine_bytes(process, memory::resident_bytes()));
    let derived = match Settings::disk_space(disk) {
        Ok(space) => derived.for_disk(space),
        Err(error) => {
            log::write(Level::Warning, &format!("sizes for the local disk are guessed: {error}"));
            derived
        }
    };
    let set_bytes = |value: u64, derived: u64| if value == 0 { derived } else { value.max(1 << 20) };
    let scale = memory::Scale::new(process);
    Settings {
        branch: start.branch.clone(),
        memtable_bytes: set(start.memtable_bytes, 64 << 10, derived.memtable_bytes),
        disk_cache_bytes: set_bytes(start.disk_cache_bytes, derived.disk_cache_bytes),
        unuploaded_bytes_max: set_bytes(start.unuploaded_bytes_max, derived.unuploaded_bytes_max),
        transaction_bytes_max: set(start.transaction_bytes_max, 1 << 20, derived.transaction_bytes_max),
        wal_upload_interval: start.wal_upload_interval,
        background: Background::Threads,
        hooks: Hooks { on_fatal: Arc::new(end_process), oversize: Arc::new(move || scale.oversize()) },
        ..derived
    }
}

/// Chance from the operating system, by way of the keys that std makes for its hash maps.
fn chance() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0_u64)
}

/// The engine's last word. The server may hold transactions that wait for it; none of them may be answered, so there is no
/// orderly way down: what was acknowledged is durable, the rest never happened.
fn end_process(error: &Error) {
    let status = exit::status_of(error.kind());
    let why = if error.kind() == Kind::Fenced { "fenced by another writer" } else { "can not go on" };
    log::write(Level::Error, &format!("{why}, the server ends now: {error}"));
    // SAFETY: `_exit` takes any status and does not return; no destructor of the server may run while its threads do.
    unsafe { _exit(status) }
}

unsafe extern "C" {
    fn _exit(status: i32) -> !;
}
