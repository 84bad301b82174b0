//! The small files that the server keeps beside its tables, mirrored in the catalogue: schema options (`db.opt`), views (`.frm` that
//! are text), triggers (`.TRG`, `.TRN`), and the definition of partitioned tables (`.frm` with a `.par`).
//!
//! * The server writes them without telling a storage engine. We look after each statement that may have written one, once a second
//!   (the event scheduler's statements are announced by nobody), and at shutdown. `start` says whose state counts at a start.
//! * Catalogue and data directory carry a *seal*: the name of the directory, and a generation that the directory reaches just before the
//!   catalogue does. It breaks when another directory is filled from the catalogue.
//! * `.frm` files of our own tables are a cache of the server's. They are removed at start, and discovered anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};
use tables::{Result, Store};

use crate::log::{Level, write};

mod start;
mod statement;

pub use start::Failure;
use start::Seal;
pub use statement::may_remove_files;

/// Where the catalogue keeps its seal; `#` is in no name of a database's directory.
const SEAL: &str = "#cistern/directory";
/// The seal in the data directory.
const MARKER: &str = "cistern_files";
/// In the data directory: `1` while a statement runs that may remove a file, or what it did is not in the catalogue yet.
const CHANGING: &str = "cistern_files_changing";
const OPTIONS: &str = "db.opt";
const VIEW_STARTS: &[u8] = b"TYPE=VIEW";

/// Keeps the catalogue's copies equal to a data directory.
pub struct FileMirror {
    root: PathBuf,
    store: Arc<Store>,
    state: Mutex<State>,
    changing: Mutex<Changing>,
}

/// Statements that may remove files.
#[derive(Default)]
struct Changing {
    running: usize,
    /// What one of them did could not be written to the catalogue.
    owed: bool,
    /// What the file says, and the file.
    said: bool,
    file: Option<File>,
}

impl Changing {
    /// Survives the end of the process, not that of the machine.
    fn say(&mut self, changing: bool) -> io::Result<()> {
        if self.said != changing
            && let Some(file) = &self.file
        {
            file.write_all_at(if changing { b"1" } else { b"0" }, 0)?;
            self.said = changing;
        }
        Ok(())
    }
}

/// What was last seen of a file or directory: modified, size, inode. A file that is replaced by a rename has a new inode.
type Stamp = (i64, i64, u64, u64);

#[derive(Default)]
struct State {
    seal: Seal,
    /// Digest of each copy in the catalogue.
    copies: BTreeMap<String, u64>,
    directories: BTreeMap<String, Directory>,
}

#[derive(Default)]
struct Directory {
    stamp: Option<Stamp>,
    options_stamp: Option<Stamp>,
    /// The same stamp was seen by two ticks of the watcher, so no change hides within the resolution of the clock of the file system.
    settled: bool,
    /// What each file was when it was last read: digest of its bytes, or nothing if it is none of ours to keep.
    files: BTreeMap<String, (Stamp, Option<u64>)>,
}

type Found = BTreeMap<String, Vec<u8>>;

impl FileMirror {
    /// Writes what changed since the last call to the catalogue; durable on return. Reads nothing but directories' stamps if nothing did.
    pub fn sync(&self) -> Result<()> {
        let synced = self.pass(false);
        self.changing.lock().owed |= synced.is_err();
        synced
    }

    /// Once a second.
    fn tick(&self) -> Result<()> {
        self.pass(true)?;
        let mut changing = self.changing.lock();
        changing.owed &= changing.running > 0;
        self.say_if_at_rest(changing);
        Ok(())
    }

    /// A statement begins that may remove a file. From here on a file that is gone after a crash was dropped, not lost.
    pub fn statement_begins(&self) {
        let mut changing = self.changing.lock();
        changing.running += 1;
        let said = changing.say(true);
        self.attempt(CHANGING, said);
    }

    /// It has ended; `changed` if it was one that changes files. What it did is in the catalogue on return.
    pub fn statement_ends(&self, changed: bool) -> Result<()> {
        let synced = if changed { self.sync() } else { Ok(()) };
        let mut changing = self.changing.lock();
        changing.running = changing.running.saturating_sub(1);
        self.say_if_at_rest(changing);
        synced
    }

    fn say_if_at_rest(&self, mut changing: MutexGuard<'_, Changing>) {
        if changing.running == 0 && !changing.owed {
            let said = changing.say(false);
            self.attempt(CHANGING, said);
        }
    }

    /// Drops a database's tables and forgets its files, as the server is about to remove its directory.
    pub fn drop_database(&self, database: &str) -> Result<()> {
        self.store.drop_database(database)?;
        self.state.lock().copies.retain(|name, _| database_of(name) != database);
        Ok(())
    }

    fn pass(&self, tick: bool) -> Result<()> {
        let mut state = self.state.lock();
        let mut found: BTreeMap<String, u64> = BTreeMap::new();
        let mut bodies: Found = BTreeMap::new();
        let names = self.databases();
        let mut unchanged = names.len() == state.directories.len();
        for name in names {
            let directory = state.directories.entry(name.clone()).or_default();
            unchanged &= !self.look(&name, directory, tick, &mut bodies);
            found.extend(
                directory.files.iter().filter_map(|(file, (_, digest))| Some((file.clone(), (*digest)?))),
            );
        }
        if unchanged && bodies.is_empty() {
            return Ok(());
        }
        let present: BTreeSet<String> = self.databases().into_iter().collect();
        state.directories.retain(|name, _| present.contains(name));
        let changes = self.changes(&state.copies, &found, &bodies);
        if changes.is_empty() {
            return Ok(());
        }
        for (name, body) in &changes {
            self.make_durable(name, body.is_some());
        }
        let seal = state.seal.next();
        let text = seal.to_string();
        // First here, then there: a catalogue that is ahead of the directory was written by somebody else.
        self.attempt(MARKER, self.write_marker(&seal));
        let mut batch: Vec<(&str, Option<&[u8]>)> =
            changes.iter().map(|(name, body)| (name.as_str(), body.as_deref())).collect();
        batch.push((SEAL, Some(text.as_bytes())));
        self.store.files_apply(&batch)?;
        state.seal = seal;
        for (name, body) in changes {
            match body {
                Some(body) => state.copies.insert(name, digest(&body)),
                None => state.copies.remove(&name),
            };
        }
        Ok(())
    }

    /// What has to be written to the catalogue so that its copies are what was found.
    fn changes(
        &self,
        copies: &BTreeMap<String, u64>,
        found: &BTreeMap<String, u64>,
        bodies: &Found,
    ) -> Vec<(String, Option<Vec<u8>>)> {
        let mut changes = Vec::new();
        for (name, digest_now) in found {
            if copies.get(name) != Some(digest_now) {
                let body = bodies.get(name).cloned().or_else(|| fs::read(self.root.join(name)).ok());
                changes.extend(body.map(|body| (name.clone(), Some(body))));
            }
        }
        // Options are rewritten in place; half of them are none, and no reason to forget the old ones.
        let half_written = |name: &str| name.ends_with(OPTIONS) && self.root.join(name).exists();
        let gone = copies.keys().filter(|name| !found.contains_key(*name) && !half_written(name));
        changes.extend(gone.map(|name| (name.clone(), None)));
        changes
    }

    /// Looks at one database's directory; true if anything in it had to be looked at closely.
    fn look(&self, name: &str, directory: &mut Directory, tick: bool, bodies: &mut Found) -> bool {
        let path = self.root.join(name);
        let now = stamp(&path);
        let options = stamp(&path.join(OPTIONS));
        let same = now.is_some() && now == directory.stamp && options == directory.options_stamp;
        if same && directory.settled {
            return false;
        }
        directory.settled = same && tick;
        directory.stamp = now;
        directory.options_stamp = options;
        let mut seen = BTreeMap::new();
        for file in self.candidates(name) {
            let Some(stamp) = stamp(&self.root.join(&file)) else { continue };
            let known =
                directory.files.get(&file).filter(|(old, _)| *old == stamp).map(|(_, digest)| *digest);
            let kept = match known {
                Some(digest) => digest,
                None => self.read_kept(&file).map(|body| {
                    let sum = digest(&body);
                    bodies.insert(file.clone(), body);
                    sum
                }),
            };
            seen.insert(file, (stamp, kept));
        }
        let changed = seen
            .iter()
            .map(|(file, (_, kept))| (file, kept))
            .ne(directory.files.iter().map(|(file, (_, kept))| (file, kept)));
        directory.files = seen;
        changed
    }

    /// Files of a database that may be ours to keep, by their names.
    fn candidates(&self, database: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.root.join(database)) else { return Vec::new() };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let kept = |name: &String| {
            !name.starts_with('#')
                && (name == OPTIONS || [".frm", ".TRG", ".TRN", ".par"].iter().any(|end| name.ends_with(end)))
        };
        names.filter(kept).map(|name| format!("{database}/{name}")).collect()
    }

    /// The bytes of a file that is to be kept; nothing for a table's definition.
    fn read_kept(&self, file: &str) -> Option<Vec<u8>> {
        let path = self.root.join(file);
        if let Some(stem) = file.strip_suffix(".frm") {
            let partitioned = self.root.join(format!("{stem}.par")).exists();
            if !partitioned && !starts_with(&path, VIEW_STARTS) {
                return None;
            }
        }
        let complete = |body: &Vec<u8>| !file.ends_with(OPTIONS) || body.ends_with(b"\n");
        fs::read(path).ok().filter(complete)
    }

    fn databases(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.root) else { return Vec::new() };
        let directory = |entry: io::Result<fs::DirEntry>| {
            let entry = entry.ok()?;
            entry.file_type().ok()?.is_dir().then(|| entry.file_name().into_string().ok())?
        };
        let mut names: Vec<String> = entries
            .filter_map(directory)
            .filter(|name| !name.starts_with(['#', '.']) && name != "lost+found")
            .collect();
        names.sort();
        names
    }

    fn scan_all(&self) -> Found {
        let mut all = BTreeMap::new();
        for database in self.databases() {
            for file in self.candidates(&database) {
                if let Some(body) = self.read_kept(&file) {
                    all.insert(file, body);
                }
            }
        }
        all
    }

    /// Removes .frm files of our tables. Which those are is written in them.
    fn remove_cached_definitions(&self) {
        for database in self.databases() {
            let Ok(entries) = fs::read_dir(self.root.join(&database)) else { continue };
            for entry in entries.flatten() {
                let path = entry.path();
                let is_frm = path.extension().is_some_and(|end| end == "frm");
                if is_frm && !path.with_extension("par").exists() && self.is_cached_definition(&path) {
                    self.attempt(&path.display().to_string(), fs::remove_file(&path));
                }
            }
        }
    }

    fn is_cached_definition(&self, path: &Path) -> bool {
        let Ok(body) = fs::read(path) else { return false };
        const ENGINE: &[u8] = b"CISTERN";
        !body.starts_with(VIEW_STARTS) && body.windows(ENGINE.len()).any(|window| window == ENGINE)
    }

    fn put_file(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let path = self.root.join(name);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let new = path.with_extension("cistern-new");
        fs::write(&new, bytes)?;
        File::open(&new)?.sync_all()?;
        fs::rename(&new, &path)
    }

    fn make_durable(&self, name: &str, exists: bool) {
        let path = self.root.join(name);
        if exists {
            self.attempt(name, File::open(&path).and_then(|file| file.sync_all()));
        }
        for directory in path.ancestors().skip(1).take(2).filter(|directory| directory.exists()) {
            self.attempt(name, sync_directory(directory));
        }
    }

    fn write_marker(&self, seal: &Seal) -> io::Result<()> {
        self.put_file(MARKER, seal.to_string().as_bytes())?;
        sync_directory(&self.root)
    }

    /// A local file that can not be read or written costs its newest state at most, not the server.
    fn attempt(&self, name: &str, result: io::Result<()>) {
        if let Err(error) = result
            && error.kind() != io::ErrorKind::NotFound
        {
            write(Level::Warning, &format!("{}: {error}", self.root.join(name).display()));
        }
    }
}

fn database_of(file: &str) -> &str {
    file.split_once('/').map_or("", |(database, _)| database)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.mtime(), metadata.mtime_nsec(), metadata.size(), metadata.ino()))
}

fn starts_with(path: &Path, start: &[u8]) -> bool {
    let mut head = vec![0; start.len()];
    File::open(path).and_then(|mut file| file.read_exact(&mut head)).is_ok() && head == start
}

/// Looks once a second.
pub struct Watcher {
    wake: Arc<(Mutex<bool>, Condvar)>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Watcher {
    const PAUSE: Duration = Duration::from_secs(1);

    pub fn start(files: Arc<FileMirror>) -> Self {
        let wake = Arc::new((Mutex::new(false), Condvar::new()));
        let waits = Arc::clone(&wake);
        let watch = move || {
            let (stopping, condition) = &*waits;
            let mut stopping = stopping.lock();
            let mut complained = false;
            while !*stopping {
                condition.wait_for(&mut stopping, Self::PAUSE);
                match files.tick() {
                    Ok(()) => complained = false,
                    Err(error) if !complained => {
                        complained = true;
                        write(
                            Level::Warning,
                            &format!("files of views and triggers are not in the bucket yet: {error}"),
                        );
                    }
                    Err(_) => (), // said already
                }
            }
        };
        let thread = std::thread::Builder::new().name("cistern-files".into()).spawn(watch);
        if let Err(error) = &thread {
            write(
                Level::Warning,
                &format!("no thread to watch files with, they are mirrored after statements only: {error}"),
            );
        }
        Self { wake, thread: Mutex::new(thread.ok()) }
    }

    /// Returns when the thread has ended.
    pub fn stop(&self) {
        *self.wake.0.lock() = true;
        self.wake.1.notify_all();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            write(Level::Error, "the thread that watched the files of views and triggers had panicked");
        }
    }
}

#[cfg(test)]
mod tests;
