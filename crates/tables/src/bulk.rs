//! Filling an empty table with many rows, past row locks, write set and memtable.
//!
//! * The rows go, sorted, into fresh trees, which take the place of the table's own with the commit: a tree can be loaded only if there
//!   never was anything in it. What the old ones hold nobody can see any more.
//! * From `begin` to the end of the transaction nobody else writes to the table. Nobody sees the rows before the commit, this
//!   transaction neither.
//! * That a value of a unique key comes twice turns out when the entries are in order, at the end at the latest; all is over then.
//! * Few rows are not worth ssts of their own: at the end they are written like any others.

use std::cmp::Ordering;
use std::sync::Arc;

use engine::{Engine, Load, Loaded, Sorted, Sorter, TreeId};

use crate::catalogue::Trees;
use crate::cursor::{Record, RowCursor, Scratch};
use crate::table::{MALFORMED_RECORD, Table};
use crate::{Error, Result, Session, Store};

/// Rows and entries are few if they take no more than this share of a memtable: 4 MiB of 64.
pub(crate) const FEW_SHARE: u64 = 16;
/// Entries between two looks whether the session was interrupted.
pub(crate) const LOOK_EVERY: u64 = 4096;

/// Known rows that are fewer are inserted as always.
const ROWS_MIN: u64 = 5_000;

/// What is known of rows that are about to be inserted.
#[derive(Clone, Copy, Debug, Default)]
pub struct BulkFacts {
    /// How many, about. 0: nobody knows.
    pub rows: u64,
    /// Nobody else can see the table, and it is given up if the statement fails: ALTER TABLE, CREATE TABLE … SELECT.
    pub copies: bool,
    /// The statement is one that brings many rows: LOAD DATA, INSERT … SELECT.
    pub gathers: bool,
    /// The transaction ends with the statement.
    pub autocommit: bool,
    /// A duplicate ends the statement, instead of being left out or put in the other's place.
    pub refuses_duplicates: bool,
    /// The server may want to see the rows before the statement ends: triggers, unique keys that it checks itself; or the rows go to
    /// several tables of ours.
    pub looks_back: bool,
}

impl BulkFacts {
    /// Whether such rows may be written together.
    pub fn suit(&self) -> bool {
        let many = self.copies || (self.gathers && (self.rows == 0 || self.rows >= ROWS_MIN));
        many && (self.copies || self.autocommit) && self.refuses_duplicates && !self.looks_back
    }
}

/// Trees that were allocated and that no definition names yet.
pub(crate) struct Fresh {
    store: Arc<Store>,
    trees: Vec<TreeId>,
}

impl Fresh {
    pub(crate) fn new(store: &Arc<Store>, trees: Vec<TreeId>) -> Self {
        Self { store: Arc::clone(store), trees }
    }
    /// A definition names them now.
    pub(crate) fn keep(mut self) {
        self.trees.clear();
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        self.trees.iter().for_each(|tree| self.store.engine().forget_first_part(*tree));
    }
}

/// A load that has begun.
pub(crate) struct Bulk {
    trees: Trees,
    fresh: Fresh,
    primary: Stream,
    /// By number of the index; none for the primary key.
    indexes: Vec<Option<Stream>>,
    rows: u64,
    bytes: u64,
}

/// What one tree gets.
pub(crate) struct Stream {
    tree: TreeId,
    /// Takes the entries until they are many, and all in order.
    sorter: Sorter,
    /// Takes them from then on, as long as they stay in order.
    load: Option<Load>,
    last_key: Vec<u8>,
}

/// What became of a stream.
enum Written {
    /// Its entries are many.
    Loaded(Loaded),
    /// They are few: the transaction has them.
    Put,
}

/// How far a load is.
pub(crate) struct Progress {
    pub(crate) done: u64,
    pub(crate) total: u64,
}

/// An entry has the key of another one. Both their values may tell more.
pub(crate) struct Twice {
    pub(crate) key: Vec<u8>,
    pub(crate) value: Vec<u8>,
}

pub(crate) enum StreamError {
    Twice(Twice),
    Other(Error),
}

impl From<Error> for StreamError {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}
impl From<engine::Error> for StreamError {
    fn from(error: engine::Error) -> Self {
        Self::Other(error.into())
    }
}

impl RowCursor {
    /// Rows inserted from now on, until `end_bulk`, are gathered and written together.
    ///
    /// False: rows are inserted as always, because the facts do not suit, the table is not empty, somebody writes to it, or this
    /// transaction wrote before.
    pub fn begin_bulk(&mut self, session: &mut Session, facts: &BulkFacts) -> Result<bool> {
        self.alone = facts.copies;
        if !facts.suit() {
            return Ok(false);
        }
        let table = &self.table;
        let (engine, state) = (table.store.engine(), &table.state);
        if session.has_writes() || !engine.is_untouched(state.primary_tree())? {
            return Ok(false);
        }
        if !self.alone && !session.lock_table_alone(state)? {
            return Ok(false);
        }
        // Somebody may have written before the lock was there.
        if !engine.is_untouched(state.primary_tree())? {
            session.unlock_table(state);
            return Ok(false);
        }
        self.bulk = Some(Box::new(Bulk::new(table)));
        Ok(true)
    }

    /// The rows are all there: makes them part of the transaction. On `Duplicate` nothing was written, and `duplicate_record` has the row.
    pub fn end_bulk(&mut self, session: &mut Session) -> Result<()> {
        let Some(bulk) = self.bulk.take() else { return Ok(()) };
        bulk.finish(self, session)
    }

    /// Forgets the rows.
    pub fn abort_bulk(&mut self) {
        self.bulk = None;
    }

    /// The row that made `end_bulk` end in `Duplicate`. BLOBs point into this cursor, until its next use.
    pub fn duplicate_record(&mut self, record: &mut [u8]) -> Result<()> {
        self.decode_whole(record)
    }

    pub(crate) fn insert_bulk(&mut self, session: &Session, record: Record) -> Result<()> {
        let bulk = self.bulk.as_mut().expect("the caller has seen it");
        bulk.insert(&self.table, session, &mut self.scratch, record)
    }
}

impl Bulk {
    fn new(table: &Table) -> Self {
        let store = &table.store;
        let trees = store.allocate(&table.layout.descriptor);
        let fresh = Fresh::new(store, trees.all().collect());
        store.tell_first_parts(&table.layout, &trees);
        let share = trees.all().count();
        let stream = |tree| Stream::new(store.engine(), tree, share);
        Self {
            primary: stream(trees.primary),
            indexes: trees.indexes.iter().map(|tree| tree.map(stream)).collect(),
            trees,
            fresh,
            rows: 0,
            bytes: 0,
        }
    }

    fn insert(
        &mut self,
        table: &Table,
        session: &Session,
        scratch: &mut Scratch,
        record: Record,
    ) -> Result<()> {
        let (layout, collations) = (&table.layout, table.store.collations());
        table.encode_new(scratch, &record)?;
        self.bytes += (scratch.key.len() + scratch.row.len()) as u64;
        match self.primary.push(session, &scratch.key, &scratch.row) {
            Err(StreamError::Twice(_)) => {
                scratch.duplicate.clone_from(&scratch.key);
                return Err(Error::Duplicate { key: layout.descriptor.primary.unwrap_or(0) });
            }
            Err(StreamError::Other(error)) => return Err(error),
            Ok(()) => {}
        }
        let value = |field| layout.rows.record_value(field, &record);
        for (index, stream) in self.indexes.iter_mut().enumerate() {
            let Some(stream) = stream else { continue };
            let buffers = (&mut scratch.entry_key, &mut scratch.entry_value);
            layout.indexes[index]
                .entry(&value, &scratch.key, collations, &mut scratch.weights, buffers)
                .map_err(|_| MALFORMED_RECORD)?;
            self.bytes += (scratch.entry_key.len() + scratch.entry_value.len()) as u64;
            match stream.push(session, &scratch.entry_key, &scratch.entry_value) {
                Err(StreamError::Twice(_)) => return Err(Error::Duplicate { key: index }),
                Err(StreamError::Other(error)) => return Err(error),
                Ok(()) => {}
            }
        }
        table.note_number(&record);
        self.rows += 1;
        Ok(())
    }

    fn finish(self, cursor: &mut RowCursor, session: &mut Session) -> Result<()> {
        let Self { trees, fresh, primary, indexes, rows, bytes } = self;
        if rows == 0 {
            return Ok(());
        }
        let table = Arc::clone(&cursor.table);
        let (layout, state) = (&table.layout, &table.state);
        let streams = 1 + indexes.iter().flatten().count() as u64;
        let mut progress = Progress { done: 0, total: rows * streams };
        let few_bytes = session.store().engine().memtable_bytes() as u64 / FEW_SHARE;
        let few = bytes <= few_bytes && indexes.iter().flatten().chain([&primary]).all(Stream::is_unloaded);
        let primary = match primary.finish(session, few.then(|| state.primary_tree()), &mut progress) {
            Ok(written) => written,
            Err(StreamError::Other(error)) => return Err(error),
            Err(StreamError::Twice(twice)) => {
                cursor.set_duplicate(twice.key, twice.value);
                return Err(Error::Duplicate { key: layout.descriptor.primary.unwrap_or(0) });
            }
        };
        let mut loaded = Vec::new();
        for (index, stream) in indexes.into_iter().enumerate() {
            let Some(stream) = stream else { continue };
            match stream.finish(session, few.then(|| state.index_tree(index)), &mut progress) {
                Ok(Written::Loaded(tree)) => loaded.push(tree),
                Ok(Written::Put) => {}
                Err(StreamError::Other(error)) => return Err(error),
                Err(StreamError::Twice(twice)) => {
                    let garbled = || table.garbled("an index entry");
                    let (key, _) = layout.indexes[index].split(&twice.key, &twice.value).map_err(garbled())?;
                    let row = match &primary {
                        Written::Loaded(rows) => rows.get(key, <[u8]>::to_vec)?,
                        Written::Put => {
                            let newest = engine::ReadAs::Newest;
                            session.txn.get(state.primary_tree(), key, newest, <[u8]>::to_vec)?
                        }
                    };
                    cursor.set_duplicate(key.to_vec(), row.ok_or(Error::RowGone)?);
                    return Err(Error::Duplicate { key: index });
                }
            }
        }
        if let Written::Loaded(rows) = primary {
            loaded.push(rows);
            for tree in loaded {
                session.txn.add_loaded(tree)?;
            }
            session.exchange_trees(&table, trees, fresh)?;
        }
        session.note_many(state, rows, layout.descriptor.auto_increment.is_some());
        Ok(())
    }
}

impl Stream {
    /// One of `share` that are filled at the same time.
    fn new(engine: &Arc<Engine>, tree: TreeId, share: usize) -> Self {
        Self { tree, sorter: engine.sorter(share), load: None, last_key: Vec::new() }
    }

    fn is_unloaded(&self) -> bool {
        self.load.is_none()
    }

    fn push(&mut self, session: &Session, key: &[u8], value: &[u8]) -> std::result::Result<(), StreamError> {
        let Some(load) = &mut self.load else {
            if self.sorter.is_full() && self.sorter.ascends() {
                self.start_load(session)?;
                return self.push(session, key, value);
            }
            return Ok(self.sorter.push(key, value)?);
        };
        match key.cmp(&self.last_key[..]) {
            Ordering::Greater => {
                load.put(key, value)?;
                self.last_key.clear();
                self.last_key.extend_from_slice(key);
                Ok(())
            }
            Ordering::Equal => Err(StreamError::Twice(Twice { key: key.to_vec(), value: value.to_vec() })),
            Ordering::Less => {
                self.take_back()?;
                Ok(self.sorter.push(key, value)?)
            }
        }
    }

    fn start_load(&mut self, session: &Session) -> Result<()> {
        let mut load = open_load(session, self.tree)?;
        let last_key = &mut self.last_key;
        self.sorter.drain(|key, value| {
            last_key.clear();
            last_key.extend_from_slice(key);
            load.put(key, value)
        })?;
        self.load = Some(load);
        Ok(())
    }

    /// After much that came in order something did not: all of it has to be sorted after all.
    fn take_back(&mut self) -> Result<()> {
        let Some(load) = self.load.take() else { return Ok(()) };
        let loaded = load.finish()?;
        Ok(loaded.read(|key, value| self.sorter.push(key, value))?)
    }

    /// Writes the entries in order: to `few`, if there is such a tree, in the session's transaction, otherwise to the stream's own.
    fn finish(
        self,
        session: &mut Session,
        few: Option<TreeId>,
        progress: &mut Progress,
    ) -> std::result::Result<Written, StreamError> {
        let load = match (self.load, few) {
            (Some(load), _) => {
                progress.done += load.entries();
                load
            }
            (None, Some(tree)) => {
                let put = |session: &mut Session, key: &[u8], value: &[u8]| {
                    Ok(session.txn.put(tree, key, value)?)
                };
                in_order(self.sorter.finish()?, session, progress, put)?;
                return Ok(Written::Put);
            }
            (None, None) => open_load(session, self.tree)?,
        };
        Ok(Written::Loaded(load_sorted(load, self.sorter.finish()?, session, progress)?))
    }
}

pub(crate) fn open_load(session: &Session, tree: TreeId) -> Result<Load> {
    Ok(session.store().engine().load(tree)?.interrupted_by(session.interrupted()))
}

/// Brings a load to its end.
pub(crate) fn load_sorted(
    mut load: Load,
    sorted: Sorted,
    session: &mut Session,
    progress: &mut Progress,
) -> std::result::Result<Loaded, StreamError> {
    in_order(sorted, session, progress, |_, key, value| Ok(load.put(key, value)?))?;
    Ok(load.finish()?)
}

/// Hands on entries of which no two may have one key.
pub(crate) fn in_order(
    mut sorted: Sorted,
    session: &mut Session,
    progress: &mut Progress,
    mut each: impl FnMut(&mut Session, &[u8], &[u8]) -> Result<()>,
) -> std::result::Result<(), StreamError> {
    while sorted.next()? {
        if sorted.repeats() {
            let (key, value) = (sorted.key().to_vec(), sorted.value().to_vec());
            return Err(StreamError::Twice(Twice { key, value }));
        }
        each(session, sorted.key(), sorted.value())?;
        progress.done += 1;
        look_at(session, progress.done, progress.total)?;
    }
    Ok(())
}

/// Now and then: tells how much of how much is done, and ends what was interrupted.
#[inline]
fn look_at(session: &Session, done: u64, total: u64) -> Result<()> {
    if done.is_multiple_of(LOOK_EVERY) { session.go_on(done, total) } else { Ok(()) }
}
