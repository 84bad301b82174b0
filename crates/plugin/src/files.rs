//! The small files that the server keeps beside its tables, mirrored in the catalogue: schema options (`db.opt`), views (`.frm` that
//! are text), triggers (`.TRG`, `.TRN`), and the definition of partitioned tables (`.frm` with a `.par`).
//!
//! * The server writes them without telling a storage engine. We look after each statement that may have written one, once a second
//!   (the event scheduler's statements are announced by nobody), and at shutdown.
//! * The catalogue's copies carry a *generation*; so does the data directory (in `cistern_files`), where it is raised after the files it speaks
//!   of are durable and in the catalogue. Equal generations at start: what differs here was written just before a crash, and is taken over. Unequal:
//!   another machine wrote since, or the directory is fresh, and the catalogue is right.
//! * A file that is missing at start is always restored: files may be lost, a `DROP VIEW` in a crash's last milliseconds may be repeated.
//! * `.frm` files of our own tables are a cache of the server's. They are removed at start, and discovered anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tables::{Result, Store};

use crate::log::{Level, write};
use crate::paths::TEMPORARY;

/// In the catalogue; `#` is in no name of a database's directory.
const GENERATION: &str = "#cistern/generation";
/// In the data directory.
const MARKER: &str = "cistern_files";
/// The server's own log tables; CSV, of this machine.
const VIEW_STARTS: &[u8] = b"TYPE=VIEW";

/// Keeps the catalogue's copies equal to a data directory.
pub struct FileMirror {
    root: PathBuf,
    store: Arc<Store>,
    state: Mutex<State>,
}

/// What was last seen of a file or directory: modified, size, inode. A file that is replaced by a rename has a new inode.
type Stamp = (i64, i64, u64, u64);

#[derive(Default)]
struct State {
    generation: u64,
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
    /// Brings a data directory and the catalogue together, as the server is about to look at the directory.
    pub fn restore(root: &Path, store: Arc<Store>) -> Result<Self> {
        let mut copies: Found = BTreeMap::new();
        store.files("", &mut |name, bytes| {
            copies.insert(name.to_owned(), bytes.to_owned());
        })?;
        let generation = copies.remove(GENERATION).map_or(0, |bytes| parse_generation(&bytes));
        let mirror = Self { root: root.to_owned(), store, state: Mutex::new(State::default()) };
        let trusted = fs::read(root.join(MARKER)).map_or(0, |bytes| parse_generation(&bytes)) == generation;
        for database in mirror.store.databases()? {
            if database != TEMPORARY && !database.starts_with('#') {
                mirror.attempt(&database, fs::create_dir_all(root.join(&database)));
            }
        }
        mirror.remove_cached_definitions();
        let present = mirror.scan_all();
        for (name, bytes) in &copies {
            if present.get(name) != Some(bytes) && !(trusted && present.contains_key(name)) {
                mirror.attempt(name, mirror.put_file(name, bytes));
            }
        }
        if !trusted {
            for name in present.keys().filter(|name| !copies.contains_key(*name)) {
                mirror.attempt(name, fs::remove_file(root.join(name)));
            }
            mirror.remove_empty_databases(&copies);
        }
        {
            let mut state = mirror.state.lock();
            state.generation = generation;
            state.copies = copies.iter().map(|(name, bytes)| (name.clone(), digest(bytes))).collect();
        }
        mirror.sync()?;
        mirror.write_marker(mirror.state.lock().generation);
        Ok(mirror)
    }

    /// Writes what changed since the last call to the catalogue; durable on return. Reads nothing but directories' stamps if nothing did.
    pub fn sync(&self) -> Result<()> {
        self.pass(false)
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
        let generation = state.generation + 1;
        let number = generation.to_string();
        let mut batch: Vec<(&str, Option<&[u8]>)> =
            changes.iter().map(|(name, body)| (name.as_str(), body.as_deref())).collect();
        batch.push((GENERATION, Some(number.as_bytes())));
        self.store.files_apply(&batch)?;
        state.generation = generation;
        for (name, body) in changes {
            match body {
                Some(body) => state.copies.insert(name, digest(&body)),
                None => state.copies.remove(&name),
            };
        }
        self.write_marker(generation);
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
        changes
            .extend(copies.keys().filter(|name| !found.contains_key(*name)).map(|name| (name.clone(), None)));
        changes
    }

    /// Looks at one database's directory; true if anything in it had to be looked at closely.
    fn look(&self, name: &str, directory: &mut Directory, tick: bool, bodies: &mut Found) -> bool {
        let path = self.root.join(name);
        let now = stamp(&path);
        let options = stamp(&path.join("db.opt"));
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
                && (name == "db.opt"
                    || [".frm", ".TRG", ".TRN", ".par"].iter().any(|end| name.ends_with(end)))
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
        fs::read(path).ok()
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

    /// Databases that were dropped elsewhere while this directory slept.
    fn remove_empty_databases(&self, copies: &Found) {
        let Ok(known) = self.store.databases() else { return };
        for name in self.databases() {
            let kept =
                known.contains(&name) || copies.keys().any(|file| file.starts_with(&format!("{name}/")));
            if !kept {
                // Only an empty one goes; what else is in it is not ours to remove.
                let _not_empty = fs::remove_dir(self.root.join(&name)).is_err();
            }
        }
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
        if let Some(directory) = path.parent().filter(|directory| directory.exists()) {
            self.attempt(name, File::open(directory).and_then(|directory| directory.sync_all()));
        }
    }

    fn write_marker(&self, generation: u64) {
        let current = fs::read(self.root.join(MARKER)).map(|bytes| parse_generation(&bytes));
        if current.is_ok_and(|current| current == generation) {
            return;
        }
        self.attempt(MARKER, self.put_file(MARKER, generation.to_string().as_bytes()));
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

fn parse_generation(bytes: &[u8]) -> u64 {
    std::str::from_utf8(bytes).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
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
                match files.pass(true) {
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
mod tests {
    use super::*;
    use engine::{Background, Engine, Parts, Settings, SimDisk, SystemClock};
    use tables::{CollationId, Collations};

    struct NoText;
    impl Collations for NoText {
        fn weights(&self, _: CollationId, text: &[u8], out: &mut Vec<u8>) {
            out.extend_from_slice(text);
        }
        fn padded_weights(&self, _: CollationId, text: &[u8], _: usize, bytes: usize, out: &mut Vec<u8>) {
            let start = out.len();
            out.extend_from_slice(text);
            out.resize(start + bytes, b' ');
        }
        fn prefix_bytes(&self, _: CollationId, text: &[u8], chars: usize) -> usize {
            chars.min(text.len())
        }
    }

    fn store() -> Arc<Store> {
        let parts = Parts {
            bucket: Arc::new(bucket::MemoryBucket::new()),
            disk: Arc::new(SimDisk::new(1)),
            clock: Arc::new(SystemClock::default()),
            seed: 1,
        };
        let settings = Settings { background: Background::Manual, ..Settings::default() };
        Store::open(Engine::open(parts, settings).unwrap(), Arc::new(NoText)).unwrap()
    }

    fn put(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn get(root: &Path, name: &str) -> Option<String> {
        fs::read_to_string(root.join(name)).ok()
    }

    fn with_shop(store: &Arc<Store>) -> (tempfile::TempDir, FileMirror) {
        let here = tempfile::tempdir().unwrap();
        let mirror = FileMirror::restore(here.path(), Arc::clone(store)).unwrap();
        put(here.path(), "shop/db.opt", "utf8mb4");
        put(here.path(), "shop/v.frm", "TYPE=VIEW\nquery=1");
        put(here.path(), "shop/t.TRG", "TYPE=TRIGGERS");
        put(here.path(), "shop/t.frm", "\u{1}CISTERN table");
        put(here.path(), "shop/p.frm", "\u{1}partitioned");
        put(here.path(), "shop/p.par", "parts");
        mirror.sync().unwrap();
        (here, mirror)
    }

    #[test]
    fn a_fresh_directory_gets_back_all_but_the_cached_definitions_of_tables() {
        let store = store();
        let (_here, _mirror) = with_shop(&store);
        let there = tempfile::tempdir().unwrap();
        FileMirror::restore(there.path(), Arc::clone(&store)).unwrap();
        for name in ["shop/db.opt", "shop/v.frm", "shop/t.TRG", "shop/p.frm", "shop/p.par"] {
            assert!(get(there.path(), name).is_some(), "{name}");
        }
        assert_eq!(get(there.path(), "shop/t.frm"), None);
    }

    #[test]
    fn changes_and_removals_while_running_reach_the_catalogue() {
        let store = store();
        let (here, mirror) = with_shop(&store);
        put(here.path(), "shop/v.frm", "TYPE=VIEW\nquery=22");
        fs::remove_file(here.path().join("shop/t.TRG")).unwrap();
        put(here.path(), "other/db.opt", "latin1");
        mirror.sync().unwrap();
        let there = tempfile::tempdir().unwrap();
        FileMirror::restore(there.path(), Arc::clone(&store)).unwrap();
        assert_eq!(get(there.path(), "shop/v.frm").as_deref(), Some("TYPE=VIEW\nquery=22"));
        assert_eq!(get(there.path(), "shop/t.TRG"), None);
        assert_eq!(get(there.path(), "other/db.opt").as_deref(), Some("latin1"));
    }

    #[test]
    fn what_was_written_just_before_a_crash_is_taken_over_on_the_same_machine() {
        let store = store();
        let (here, mirror) = with_shop(&store);
        drop(mirror);
        put(here.path(), "shop/v.frm", "TYPE=VIEW\nquery=3");
        put(here.path(), "shop/w.frm", "TYPE=VIEW\nquery=new");
        FileMirror::restore(here.path(), Arc::clone(&store)).unwrap();
        assert_eq!(get(here.path(), "shop/v.frm").as_deref(), Some("TYPE=VIEW\nquery=3"));
        assert_eq!(store.file_get("shop/v.frm").unwrap().as_deref(), Some(&b"TYPE=VIEW\nquery=3"[..]));
        assert_eq!(store.file_get("shop/w.frm").unwrap().as_deref(), Some(&b"TYPE=VIEW\nquery=new"[..]));
    }

    #[test]
    fn a_lost_file_comes_back() {
        let store = store();
        let (here, mirror) = with_shop(&store);
        drop(mirror);
        fs::remove_file(here.path().join("shop/v.frm")).unwrap();
        FileMirror::restore(here.path(), Arc::clone(&store)).unwrap();
        assert!(get(here.path(), "shop/v.frm").is_some());
    }

    #[test]
    fn a_directory_that_another_writer_overtook_follows_the_catalogue() {
        let store = store();
        let (here, mirror) = with_shop(&store);
        drop(mirror);
        let there = tempfile::tempdir().unwrap();
        let other = FileMirror::restore(there.path(), Arc::clone(&store)).unwrap();
        put(there.path(), "shop/v.frm", "TYPE=VIEW\nquery=theirs");
        fs::remove_file(there.path().join("shop/t.TRG")).unwrap();
        other.sync().unwrap();
        put(here.path(), "shop/v.frm", "TYPE=VIEW\nquery=ours, late");
        put(here.path(), "gone/db.opt", "late too");
        FileMirror::restore(here.path(), Arc::clone(&store)).unwrap();
        assert_eq!(get(here.path(), "shop/v.frm").as_deref(), Some("TYPE=VIEW\nquery=theirs"));
        assert_eq!(get(here.path(), "shop/t.TRG"), None);
        assert!(!here.path().join("gone").exists());
    }

    #[test]
    fn schema_options_that_are_rewritten_in_place_are_noticed() {
        let store = store();
        let (here, mirror) = with_shop(&store);
        mirror.pass(true).unwrap();
        mirror.pass(true).unwrap();
        put(here.path(), "shop/db.opt", "latin1_bin");
        mirror.sync().unwrap();
        assert_eq!(store.file_get("shop/db.opt").unwrap().as_deref(), Some(&b"latin1_bin"[..]));
    }
}
