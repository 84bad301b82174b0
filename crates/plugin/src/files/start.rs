//! Whose state counts when the server is about to look at its data directory: the directory's or the catalogue's.
//!
//! * The directory counts if nobody wrote since it was last in use: the engine goes on with the local wal of the last writer, and the
//!   seals of directory and catalogue fit. Then what was acknowledged last is in the directory: files that are new or changed here
//!   are so in the catalogue too.
//! * A file that is gone was dropped only if a statement was under way that may drop files. Otherwise somebody deleted a cache, and it is
//!   filled again. So is a database that is gone as a whole: DROP DATABASE leaves nothing of it in the catalogue before it touches the
//!   directory itself.
//! * A directory and a catalogue that were never filled or sealed meet for the first time: what a server has had there so far is adopted.
//! * In every other case the catalogue counts: a fresh directory, one that was not filled to the end, one that another writer overtook.
//! * The directory is not sealed while it is filled. A stop in the middle makes the catalogue count at the next start; so what only the
//!   directory knew is in the catalogue before filling begins.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use tables::Store;

use crate::leftovers::settle_backups;

use super::{
    CHANGING, Changing, FileMirror, Found, MARKER, OPTIONS, SEAL, State, database_of, digest, sync_directory,
};

/// The server's log of DDL that a crash may leave half done, and the first byte of it that is not its header.
const DDL_LOG: &str = "ddl_recovery.log";
const DDL_LOG_ENTRIES: u64 = 4096;

/// Why a data directory can not be prepared.
#[derive(Debug)]
pub enum Failure {
    /// The catalogue can not be read or written.
    Catalogue(tables::Error),
    /// A file of the data directory can not.
    File(PathBuf, io::Error),
}

impl From<tables::Error> for Failure {
    fn from(error: tables::Error) -> Self {
        Self::Catalogue(error)
    }
}

/// What a directory and the catalogue both carry while they belong together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Seal {
    /// Names the directory, from when it was filled.
    directory: String,
    generation: u64,
}

impl Seal {
    pub(super) fn next(&self) -> Self {
        Self { directory: self.directory.clone(), generation: self.generation + 1 }
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (directory, generation) = std::str::from_utf8(bytes).ok()?.trim_end().rsplit_once(' ')?;
        Some(Self { directory: directory.to_owned(), generation: generation.parse().ok()? })
    }
}

impl fmt::Display for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}", self.directory, self.generation)
    }
}

/// Whether what the directory has is as new as anything.
fn directory_counts(continues_local_wal: bool, here: Option<&Seal>, catalogue: Option<&Seal>) -> bool {
    let fit =
        |here: &Seal, there: &Seal| here.directory == there.directory && here.generation >= there.generation;
    continues_local_wal && here.zip(catalogue).is_some_and(|(here, there)| fit(here, there))
}

/// What of the directory follows the catalogue.
#[derive(Debug, Default, PartialEq, Eq)]
struct Filling {
    write: BTreeSet<String>,
    remove: BTreeSet<String>,
}

impl Filling {
    /// The catalogue counts.
    fn all(copies: &Found, present: &Found) -> Self {
        let differs = |(name, bytes): &(&String, &Vec<u8>)| present.get(*name) != Some(*bytes);
        Self {
            write: copies.iter().filter(differs).map(|(name, _)| name.clone()).collect(),
            remove: present.keys().filter(|name| !copies.contains_key(*name)).cloned().collect(),
        }
    }

    /// The directory counts; what it can only have lost comes back.
    fn lost(copies: &Found, present: &Found, directories: &[String], changing: bool) -> Self {
        let kept: BTreeSet<&str> = present.keys().map(|name| database_of(name)).collect();
        let lost_whole = |database: &str| {
            let had_options = copies.contains_key(&format!("{database}/{OPTIONS}"));
            !directories.iter().any(|name| name == database) || (had_options && !kept.contains(database))
        };
        let lost = |name: &&String| {
            let never_dropped = !changing || name.ends_with(&format!("/{OPTIONS}"));
            !present.contains_key(*name) && (never_dropped || lost_whole(database_of(name)))
        };
        Self { write: copies.keys().filter(lost).cloned().collect(), remove: BTreeSet::new() }
    }
}

/// The table that a trigger's file is about; `None` for other files, and where it can't be told.
fn table_of(file: &str, body: &[u8]) -> Option<String> {
    if let Some(table) = file.strip_suffix(".TRG") {
        return Some(table.to_owned());
    }
    file.strip_suffix(".TRN")?;
    let table =
        std::str::from_utf8(body).ok()?.lines().find_map(|line| line.strip_prefix("trigger_table="))?;
    // Other letters are written in another way in names of files.
    let plain = table.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    plain.then(|| format!("{}/{table}", database_of(file)))
}

impl FileMirror {
    /// Brings a data directory and the catalogue together, as the server is about to look at the directory. `fresh` names the directory
    /// if it has to be filled: no other was ever given this name.
    ///
    /// `continues_local_wal`: the engine's, of this start. On an error the call may be repeated.
    pub fn restore(
        root: &Path,
        store: Arc<Store>,
        continues_local_wal: bool,
        fresh: &str,
    ) -> Result<Self, Failure> {
        let mut copies = Found::new();
        store.files("", &mut |name, bytes| {
            copies.insert(name.to_owned(), bytes.to_owned());
        })?;
        let catalogue = copies.remove(SEAL).and_then(|bytes| Seal::parse(&bytes));
        copies.retain(|name, _| !name.starts_with('#'));
        let here = fs::read(root.join(MARKER)).ok().and_then(|bytes| Seal::parse(&bytes));
        let belongs = directory_counts(continues_local_wal, here.as_ref(), catalogue.as_ref());
        let counts = belongs || (here.is_none() && catalogue.is_none());
        let changing = fs::read(root.join(CHANGING)).is_ok_and(|bytes| bytes == b"1");
        let state = State { seal: catalogue.unwrap_or_default(), ..State::default() };
        let mirror =
            Self { root: root.to_owned(), store, state: Mutex::new(state), changing: Mutex::default() };

        if !counts {
            // The server's log of unfinished DDL will be forgotten.
            settle_backups(&mirror.store)?;
        }
        mirror.remove_cached_definitions();
        let present = mirror.scan_all();
        let filling = if counts {
            let lost = Filling::lost(&copies, &present, &mirror.databases(), changing);
            mirror.expect_copies(copies.iter().filter(|(name, _)| !lost.write.contains(*name)));
            mirror.sync()?;
            lost
        } else {
            mirror.forget_orphans(&mut copies)?;
            Filling::all(&copies, &present)
        };
        mirror.make_directories()?;
        if !belongs || !filling.write.is_empty() {
            mirror.fill(&filling, &copies, !counts, fresh)?;
        }
        if !counts {
            mirror.remove_unknown_databases(&copies)?;
            mirror.expect_copies(copies.iter());
        } else {
            mirror.expect_copies(copies.iter().filter(|(name, _)| filling.write.contains(*name)));
        }
        mirror.sync()?;
        mirror.begin_at_rest()?;
        Ok(mirror)
    }

    /// A machine that is lost after it dropped a table, and before it dropped the table's triggers, leaves these. They would be the next
    /// table's of this name.
    fn forget_orphans(&self, copies: &mut Found) -> Result<(), Failure> {
        let mut tables = BTreeSet::new();
        for database in self.store.databases()? {
            self.store.list(&database, &mut |table| {
                let whole = table.split_once("#P#").map_or(table, |(whole, _)| whole);
                tables.insert(format!("{database}/{whole}"));
            })?;
        }
        let elsewhere = |table: &str| self.root.join(format!("{table}.frm")).exists();
        let orphan = |(name, body): &(&String, &Vec<u8>)| {
            table_of(name, body).is_some_and(|table| !tables.contains(&table) && !elsewhere(&table))
        };
        let orphans: Vec<String> = copies.iter().filter(orphan).map(|(name, _)| name.clone()).collect();
        let removals: Vec<(&str, Option<&[u8]>)> = orphans.iter().map(|name| (name.as_str(), None)).collect();
        self.store.files_apply(&removals)?;
        copies.retain(|name, _| !orphans.contains(name));
        Ok(())
    }

    fn begin_at_rest(&self) -> Result<(), Failure> {
        let path = self.root.join(CHANGING);
        let file = File::options().create(true).truncate(false).write(true).open(path);
        let file = self.must(CHANGING, file)?;
        let mut changing = self.changing.lock();
        *changing = Changing { said: true, file: Some(file), ..Changing::default() };
        let said = changing.say(false);
        self.must(CHANGING, said)
    }

    fn expect_copies<'a>(&self, copies: impl Iterator<Item = (&'a String, &'a Vec<u8>)>) {
        let digests = copies.map(|(name, bytes)| (name.clone(), digest(bytes)));
        self.state.lock().copies.extend(digests);
    }

    fn make_directories(&self) -> Result<(), Failure> {
        for database in self.store.databases()?.iter().filter(|name| !name.starts_with('#')) {
            self.must(database, fs::create_dir_all(self.root.join(database)))?;
        }
        Ok(())
    }

    /// The directory is durable and sealed on return.
    fn fill(&self, filling: &Filling, copies: &Found, forget_ddl: bool, fresh: &str) -> Result<(), Failure> {
        self.must(MARKER, absent_is_fine(fs::remove_file(self.root.join(MARKER))))?;
        self.must("", sync_directory(&self.root))?;
        if forget_ddl {
            self.must(DDL_LOG, absent_is_fine(forget_entries(&self.root.join(DDL_LOG))))?;
        }
        for name in &filling.write {
            self.must(name, self.put_file(name, &copies[name]))?;
        }
        for name in &filling.remove {
            self.must(name, absent_is_fine(fs::remove_file(self.root.join(name))))?;
        }
        let touched: BTreeSet<&str> =
            filling.write.iter().chain(&filling.remove).map(|name| database_of(name)).collect();
        for database in touched {
            self.must(database, sync_directory(&self.root.join(database)))?;
        }
        let mut state = self.state.lock();
        let seal = Seal { directory: fresh.to_owned(), generation: state.seal.generation + 1 };
        self.store.files_apply(&[(SEAL, Some(seal.to_string().as_bytes()))])?;
        self.must(MARKER, self.write_marker(&seal))?;
        state.seal = seal;
        Ok(())
    }

    /// Databases that were dropped elsewhere while this directory slept.
    fn remove_unknown_databases(&self, copies: &Found) -> Result<(), Failure> {
        let known = self.store.databases()?;
        for name in self.databases() {
            if !known.contains(&name) && !copies.keys().any(|file| database_of(file) == name) {
                // Only an empty one goes; what else is in it is not ours to remove.
                let _not_empty = fs::remove_dir(self.root.join(&name)).is_err();
            }
        }
        Ok(())
    }

    /// What is not in the directory when the server starts would be taken as dropped later.
    fn must<T>(&self, name: &str, result: io::Result<T>) -> Result<T, Failure> {
        result.map_err(|error| Failure::File(self.root.join(name), error))
    }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The server has opened its log by now, and counted the entries; it will find that they are void. They speak of tables as they were
/// before another writer went on without this directory.
fn forget_entries(ddl_log: &Path) -> io::Result<()> {
    let mut file = File::options().write(true).open(ddl_log)?;
    let bytes = file.metadata()?.len().saturating_sub(DDL_LOG_ENTRIES);
    file.seek(SeekFrom::Start(DDL_LOG_ENTRIES))?;
    io::copy(&mut io::Read::take(io::repeat(0), bytes), &mut file)?;
    file.flush()?;
    file.sync_all()
}
