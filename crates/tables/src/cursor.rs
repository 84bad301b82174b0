//! Reading rows into the server's own record layout.
//!
//! * A cursor writes a row's columns straight into the caller's record; only the columns asked for are decoded.
//! * Pointers of BLOBs in a record point into the cursor and stay valid until the next call that reads a row with it.
//! * The *current row* is the one that the last read found; update, delete, position and unlock mean it. Its key stays in the entry that led to it
//!   where that is enough.
//! * A locking read locks the row, then reads its newest version, and skips it if it is gone or has left the index entry that
//!   led to it.
//! * A scan never meets a row again that this cursor's own update moved.
//! * A scan of entries whose rows are not in memory goes ahead of itself, so that what the next rows lack is fetched at once.
//! * While a condition is set for the index in use, no row is returned whose entry does not meet it, whatever led to the entry; the row is
//!   neither fetched nor locked.

use std::collections::BTreeSet;
use std::sync::Arc;

use engine::{Cursor, Granted, LockMode, ReadAs};

use crate::ahead::Ahead;
use crate::bulk::Bulk;
use crate::keys::successor;
use crate::layout::{EntryProgram, Layout, TupleShape};
use crate::rows::{Parts, Program};
use crate::scout::{Scan, Scout};
use crate::table::{MALFORMED_TUPLE, Table};
use crate::{Error, Result, Session};

/// How `read` compares (enum ha_rkey_function; the numbers are the server's).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ReadFlag {
    /// HA_READ_KEY_EXACT: the first entry with this key.
    Exact = 0,
    /// HA_READ_KEY_OR_NEXT: the first with this key or a greater one.
    OrNext = 1,
    /// HA_READ_KEY_OR_PREV: the last with this key or a smaller one.
    OrPrev = 2,
    /// HA_READ_AFTER_KEY: the first with a greater key.
    After = 3,
    /// HA_READ_BEFORE_KEY: the last with a smaller key.
    Before = 4,
    /// HA_READ_PREFIX: the first with this prefix.
    Prefix = 5,
    /// HA_READ_PREFIX_LAST: the last with this prefix.
    PrefixLast = 6,
    /// HA_READ_PREFIX_LAST_OR_PREV: the last with this prefix or a smaller one.
    PrefixLastOrPrev = 7,
}

impl ReadFlag {
    /// From the server's number; spatial flags have none.
    pub fn from_server(number: u32) -> Option<Self> {
        use ReadFlag::*;
        [Exact, OrNext, OrPrev, After, Before, Prefix, PrefixLast, PrefixLastOrPrev]
            .get(number as usize)
            .copied()
    }

    fn is_backward(self) -> bool {
        use ReadFlag::*;
        matches!(self, OrPrev | Before | PrefixLast | PrefixLastOrPrev)
    }

    fn stays_in_prefix(self) -> bool {
        use ReadFlag::*;
        matches!(self, Exact | Prefix | PrefixLast)
    }
}

/// What a read does to the rows that it returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowLock {
    /// Nothing: reads the snapshot.
    None,
    /// LOCK IN SHARE MODE: locks the row, reads its newest version.
    Shared,
    /// FOR UPDATE, UPDATE, DELETE: the same, for this transaction alone.
    Exclusive,
}

/// What a condition says of an index entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its row is not wanted.
    Skip,
    /// Its row is wanted, as far as the entry tells.
    Take,
    /// It lies beyond the end of what is read: nothing that follows is wanted.
    PastTheEnd,
    /// The statement was killed.
    Killed,
}

/// Entries that are counted before somebody is asked whether the statement was killed.
const COUNTED_AT_A_TIME: u64 = 10_000;

/// A part of a statement's WHERE that entries of one index can answer. Gets a record in which the columns that the entry gives back stand.
pub type Condition = Box<dyn FnMut(&mut [u8]) -> Verdict + Send>;

/// How much of a condition is left to the cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// Nothing: the caller goes on to check it by itself.
    Refused,
    /// The condition; but the entry can not tell where a range ends.
    WithoutRange,
    /// The condition, and the end of a range: all parts of the key can be had back, the primary key's too.
    WithRange,
}

/// A record to be written.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// The record buffer, `record_length` bytes.
    pub image: &'a [u8],
    /// The bytes of each BLOB column, in order of columns ([`crate::Kind::Blob`] only); empty for NULL.
    pub blobs: &'a [&'a [u8]],
}

/// A handler's way to the rows of a table.
pub struct RowCursor {
    pub(crate) table: Arc<Table>,
    pub(crate) engine: Cursor,
    lock: RowLock,
    pub(crate) alone: bool,
    columns: Columns,
    key_only: bool,
    positions_only: bool,
    /// The index in use; `None` is the rows in primary order.
    pub(crate) index: Option<usize>,
    /// The wanted columns are all in that index's entries.
    covered: bool,
    way: Way,
    pub(crate) place: Place,
    /// Session and statement that the engine's cursor was opened for.
    opened_for: (u64, u64),
    opened_as: ReadAs,
    /// What the engine's cursor sees is older than what a lock has shown: open it again before the next step.
    stale: bool,
    /// For `Place::Detached`: the key of the entry it stands on.
    entry: Vec<u8>,
    /// The last tuple, encoded.
    bound: Vec<u8>,
    pub(crate) current: Current,
    /// Entries of the index in use that this cursor's own updates made since the scan started.
    pub(crate) moved: BTreeSet<Vec<u8>>,
    pub(crate) scratch: Scratch,
    condition: Option<Box<PushedCondition>>,
    /// Entries whose rows a condition spared, not told the store yet.
    spared: u64,
    ahead: Ahead,
    scout: Scout,
    /// Takes the rows that are inserted.
    pub(crate) bulk: Option<Box<Bulk>>,
}

/// A condition on entries of one index.
pub(crate) struct PushedCondition {
    index: usize,
    /// All columns that an entry gives back.
    pub(crate) entry: EntryProgram,
    pub(crate) check: Condition,
}

/// How a row is had from the entry that the engine's cursor stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The entry is the row, and what is wanted is copied from it.
    Row,
    /// It is an entry of this index, and what is wanted is copied from it.
    Entry(usize),
    /// There is more to do: a lock, a condition, BLOBs, another tree.
    Longer,
}

/// What came of an entry.
enum Met {
    Row,
    Nothing,
    End,
}

/// Where a scan is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Before the first read.
    Unset,
    /// Where the engine's cursor is.
    On,
    /// On an entry that was read without the engine's cursor.
    Detached,
    BeforeFirst,
    AfterLast,
}

/// The last row read.
#[derive(Default)]
pub(crate) struct Current {
    pub(crate) key: Vec<u8>,
    pub(crate) known: bool,
    /// If set, its key is not in `key` but so many bytes at the end of the key that the engine's cursor stands on: few ask for it.
    in_entry: Option<usize>,
    /// Its bytes, if they were kept: BLOB pointers of the last record point here.
    pub(crate) row: Vec<u8>,
    /// `Session::writes` when `row` was read under a lock; only then is it surely the newest version.
    pub(crate) row_as_of: Option<(u64, u64)>,
    /// The lock that this session has on it, and whether this read took it.
    pub(crate) locked: Option<(LockMode, Granted)>,
}

/// Buffers that are used again and again.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) weights: Vec<u8>,
    pub(crate) parts: Parts,
    pub(crate) stored: Vec<u8>,
    pub(crate) row: Vec<u8>,
    pub(crate) key: Vec<u8>,
    pub(crate) entry_key: Vec<u8>,
    pub(crate) entry_value: Vec<u8>,
    pub(crate) entries: Vec<EntryChange>,
    pub(crate) changed: Vec<bool>,
    pub(crate) duplicate: Vec<u8>,
}

/// What a write does to one index.
#[derive(Default)]
pub(crate) struct EntryChange {
    pub(crate) old_key: Vec<u8>,
    pub(crate) old_value: Vec<u8>,
    pub(crate) new_key: Vec<u8>,
    pub(crate) new_value: Vec<u8>,
    pub(crate) touched: bool,
    /// Nobody else may have the new key.
    pub(crate) alone: bool,
}

/// The columns that reads decode.
struct Columns {
    /// The server's bitmap; `None`: all.
    wanted: Option<Vec<u8>>,
    program: Program,
    /// For entries of the index in use, where they are all that is read.
    entry: EntryProgram,
    wants_blobs: bool,
}

impl Columns {
    fn wants(wanted: Option<&[u8]>, field: usize) -> bool {
        wanted.is_none_or(|bits| bits.get(field / 8).is_some_and(|byte| byte >> (field % 8) & 1 == 1))
    }
}

impl RowCursor {
    pub(crate) fn new(table: Arc<Table>) -> Self {
        let mut program = Program::default();
        table.layout.rows.compile(|_| true, &mut program);
        let wants_blobs = table.layout.rows.has_blobs();
        Self {
            engine: Cursor::new(table.store.engine()),
            lock: RowLock::None,
            alone: false,
            columns: Columns { wanted: None, program, entry: EntryProgram::default(), wants_blobs },
            key_only: false,
            positions_only: false,
            index: None,
            covered: false,
            way: Way::Longer,
            place: Place::Unset,
            opened_for: (0, 0),
            opened_as: ReadAs::Snapshot,
            stale: false,
            entry: Vec::new(),
            bound: Vec::new(),
            current: Current::default(),
            moved: BTreeSet::new(),
            scratch: Scratch::default(),
            condition: None,
            spared: 0,
            ahead: Ahead::default(),
            scout: Scout::default(),
            bulk: None,
            table,
        }
    }

    /// The table.
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// Which columns the reads that follow are to decode: bit i of `columns` (byte i / 8, bit i % 8, as in MY_BITMAP) for column
    /// i; `None` is all. For statements that update: read_set ∪ write_set. Cheap when nothing changed.
    pub fn set_columns(&mut self, columns: Option<&[u8]>) {
        if self.columns.wanted.as_deref() == columns {
            return;
        }
        match (&mut self.columns.wanted, columns) {
            (Some(known), Some(columns)) => {
                known.clear();
                known.extend_from_slice(columns);
            }
            (known, columns) => *known = columns.map(<[u8]>::to_vec),
        }
        let rows = &self.table.layout.rows;
        rows.compile(|field| Columns::wants(columns, field), &mut self.columns.program);
        self.columns.wants_blobs = rows.has_blobs() && self.columns.program.has_blobs();
        self.settle_cover();
    }
    /// Lets the reads that follow answer from the index alone where it holds all wanted columns (HA_EXTRA_KEYREAD); others
    /// read the row, so the answer is the same.
    pub fn set_key_only(&mut self, yes: bool) {
        self.key_only = yes;
        self.settle_cover();
    }
    /// The reads that follow are for positions: by a secondary index they answer from the entry, whatever columns are wanted. Reads that lock go on to
    /// the row.
    pub fn set_positions_only(&mut self, yes: bool) {
        self.positions_only = yes;
        self.settle_cover();
    }
    /// What the reads that follow do to rows (store_lock, external_lock).
    pub fn set_lock(&mut self, lock: RowLock) {
        self.lock = lock;
        self.choose_way();
    }

    /// Nobody else can see this table (ALTER TABLE's copy): inserts take no locks.
    pub fn set_alone(&mut self, yes: bool) {
        self.alone = yes;
    }

    /// Leaves a condition to the reads by `index` that follow, until [`RowCursor::clear_condition`]. `columns` (a bitmap as in `set_columns`):
    /// those that it may look at. Call after `set_lock`. It is refused if entries do not give all of them back, and if reads lock in
    /// REPEATABLE READ: there the rows that do not meet it stay locked too, so that they can't come to meet it before the transaction ends.
    pub fn push_condition(
        &mut self,
        session: &Session,
        index: usize,
        columns: &[u8],
        condition: Condition,
    ) -> Pushed {
        let layout = &self.table.layout;
        let Some(codec) = layout.indexes.get(index).filter(|_| layout.descriptor.primary != Some(index))
        else {
            return Pushed::Refused;
        };
        let locks_all = self.lock != RowLock::None && !session.is_read_committed();
        let all = layout.descriptor.fields.len();
        if locks_all || !codec.covers(all, |field| Columns::wants(Some(columns), field)) {
            return Pushed::Refused;
        }
        let mut entry = EntryProgram::default();
        codec.compile(|_| true, &mut entry);
        let tells_range = codec.gives_back_its_key();
        self.condition = Some(Box::new(PushedCondition { index, entry, check: condition }));
        self.choose_way();
        if tells_range { Pushed::WithRange } else { Pushed::WithoutRange }
    }
    /// Forgets the condition.
    pub fn clear_condition(&mut self) {
        self.condition = None;
        self.choose_way();
    }

    fn settle_cover(&mut self) {
        let wanted = self.columns.wanted.as_deref();
        let layout = &self.table.layout;
        self.covered = match self.index {
            Some(index)
                if (self.key_only || self.positions_only) && layout.descriptor.primary != Some(index) =>
            {
                let columns = layout.descriptor.fields.len();
                let codec = &layout.indexes[index];
                codec.compile(|field| Columns::wants(wanted, field), &mut self.columns.entry);
                self.positions_only || codec.covers(columns, |field| Columns::wants(wanted, field))
            }
            _ => false,
        };
        self.choose_way();
    }

    /// To be called whenever something that it looks at has changed.
    fn choose_way(&mut self) {
        let primary = self.table.layout.descriptor.primary;
        self.way = match self.index {
            _ if self.lock != RowLock::None || self.condition.is_some() => Way::Longer,
            Some(index) if primary != Some(index) && self.covered => Way::Entry(index),
            Some(index) if primary != Some(index) => Way::Longer,
            _ if self.columns.wants_blobs => Way::Longer,
            _ => Way::Row,
        };
    }

    /// Starts using an index (index_init), or the rows in primary order (`None`: rnd_init). Does no I/O.
    pub fn start(&mut self, index: Option<usize>) -> Result<()> {
        if index.is_some_and(|index| index >= self.table.layout.indexes.len()) {
            return Err(Error::Malformed("index number"));
        }
        self.keep_current();
        self.engine.close();
        self.index = index;
        self.place = Place::Unset;
        self.moved.clear();
        self.scout = Scout::default();
        self.settle_cover();
        Ok(())
    }
    /// Done with it (index_end, rnd_end, reset): lets go of snapshots and memory. The current row stays current.
    pub fn stop(&mut self) {
        self.table.store.note_spared(std::mem::take(&mut self.spared));
        self.ahead.clear();
        self.keep_current();
        self.engine.close();
        self.place = Place::Unset;
        self.moved.clear();
    }

    /// index_read_map: finds by a key tuple of one or more leading parts. False: there is none (HA_ERR_KEY_NOT_FOUND).
    pub fn read(
        &mut self,
        session: &mut Session,
        tuple: &[u8],
        flag: ReadFlag,
        record: &mut [u8],
    ) -> Result<bool> {
        let index = self.index.ok_or_else(|| Error::Malformed("call: no index in use"))?;
        let shape = self.encode_bound(index, tuple)?;
        let codec = &self.table.layout.indexes[index];
        let point = codec.unique && shape.full && !shape.null;
        let is_primary = self.table.layout.descriptor.primary == Some(index);
        if point && shape.user_end == self.bound.len() && matches!(flag, ReadFlag::Exact | ReadFlag::Prefix) {
            return if is_primary {
                self.read_point(session, record)
            } else {
                self.read_unique(session, index, record)
            };
        }
        // The key of an entry of a unique index has no primary key in it, so an extended tuple is compared in two steps.
        let split = (point && shape.user_end < self.bound.len()).then_some(shape.user_end);
        let found = self.seek_bound(session, flag, split)?;
        let backward = flag.is_backward();
        self.settle(
            session,
            found,
            backward,
            flag.stays_in_prefix().then_some(split.unwrap_or(self.bound.len())),
            record,
        )
    }
    /// index_first. False: end (HA_ERR_END_OF_FILE).
    pub fn first(&mut self, session: &mut Session, record: &mut [u8]) -> Result<bool> {
        self.open(session)?;
        let found = self.engine.seek_first(&mut session.txn)?;
        self.settle(session, found, false, None, record)
    }
    /// index_last.
    pub fn last(&mut self, session: &mut Session, record: &mut [u8]) -> Result<bool> {
        self.open(session)?;
        let found = self.engine.seek_last(&mut session.txn)?;
        self.settle(session, found, true, None, record)
    }
    /// index_next, rnd_next; the first one after `start` reads the first row.
    #[inline]
    pub fn next(&mut self, session: &mut Session, record: &mut [u8]) -> Result<bool> {
        self.current.forget();
        let found = match self.place {
            Place::Unset | Place::BeforeFirst => return self.first(session, record),
            Place::AfterLast => return Ok(false),
            Place::On if self.is_open_for(session) => self.engine.next(&mut session.txn)?,
            Place::On | Place::Detached => {
                self.reopen(session)?;
                self.engine.seek_after(&mut session.txn, &self.entry)?
            }
        };
        self.settle(session, found, false, None, record)
    }
    /// How many rows there are (records), without reading them: entries of the smallest index are counted. `None`: each row has to be locked,
    /// so it must be read. Ends what was started.
    pub fn count(&mut self, session: &mut Session) -> Result<Option<u64>> {
        if self.lock != RowLock::None {
            return Ok(None);
        }
        self.start(self.table.smallest_index())?;
        let counted = self.count_entries(session);
        self.stop();
        counted.map(Some)
    }

    fn count_entries(&mut self, session: &mut Session) -> Result<u64> {
        self.open(session)?;
        let mut rows = u64::from(self.engine.seek_first(&mut session.txn)?);
        if rows > 0 {
            loop {
                let passed = self.engine.skip(&mut session.txn, COUNTED_AT_A_TIME)?;
                rows += passed;
                if passed < COUNTED_AT_A_TIME {
                    break;
                }
                if session.is_interrupted() {
                    return Err(killed());
                }
            }
        }
        Ok(rows)
    }
    /// index_prev; the first one after `start` reads the last row.
    pub fn prev(&mut self, session: &mut Session, record: &mut [u8]) -> Result<bool> {
        self.current.forget();
        let found = match self.place {
            Place::Unset | Place::AfterLast => return self.last(session, record),
            Place::BeforeFirst => return Ok(false),
            Place::On if self.is_open_for(session) => self.engine.prev(&mut session.txn)?,
            Place::On | Place::Detached => {
                self.reopen(session)?;
                self.engine.seek_before(&mut session.txn, &self.entry)?
            }
        };
        self.settle(session, found, true, None, record)
    }
    /// index_next_same: the next with the same key tuple.
    pub fn next_same(&mut self, session: &mut Session, tuple: &[u8], record: &mut [u8]) -> Result<bool> {
        let index = self.index.ok_or_else(|| Error::Malformed("call: no index in use"))?;
        let shape = self.encode_bound(index, tuple)?;
        if self.table.layout.indexes[index].unique && shape.full && !shape.null {
            return Ok(false);
        }
        self.current.forget();
        let found = match self.place {
            Place::Unset | Place::BeforeFirst | Place::AfterLast => return Ok(false),
            Place::On if self.is_open_for(session) => self.engine.next_within(&mut session.txn)?,
            Place::On | Place::Detached => {
                self.reopen(session)?;
                self.engine.seek_after(&mut session.txn, &self.entry)?
            }
        };
        self.settle(session, found, false, Some(self.bound.len()), record)
    }
    /// rnd_pos: the row at a position that `position` or `duplicate_position` gave. False: it is gone. Needs no `start`, and leaves
    /// a scan where it was.
    pub fn read_position(
        &mut self,
        session: &mut Session,
        position: &[u8],
        record: &mut [u8],
    ) -> Result<bool> {
        let key = position_key(position).ok_or_else(|| Error::Malformed("position"))?;
        self.set_current(key);
        self.fetch_ahead(session);
        self.fetch_current(session, record, false)
    }
    /// The position of the current row, into `position_length` bytes. Positions compare as bytes, in primary order.
    pub fn position(&self, position: &mut [u8]) {
        put_position(self.in_entry().unwrap_or(&self.current.key), position);
    }
    /// The row at a position will be read, one of a batch: what the batch lacks may be fetched at once. Until `stop`.
    pub fn note_position(&mut self, position: &[u8]) {
        if let Some(key) = position_key(position) {
            self.ahead.note(key);
        }
    }
    /// The same for a tuple of an index, if it is a whole primary key.
    pub fn note_key(&mut self, index: usize, tuple: &[u8]) {
        if self.table.layout.descriptor.primary == Some(index)
            && self.encode_bound(index, tuple).is_ok_and(|shape| shape.full)
        {
            self.ahead.note(&self.bound);
        }
    }
    /// Makes a row that is not in the table the current one, for `duplicate_record`.
    pub(crate) fn set_duplicate(&mut self, key: Vec<u8>, row: Vec<u8>) {
        self.current = Current { key, row, ..Current::default() };
    }
    /// All columns of the current row, from the bytes that were kept of it.
    pub(crate) fn decode_whole(&self, record: &mut [u8]) -> Result<()> {
        let (layout, current) = (&self.table.layout, &self.current);
        let mut program = Program::default();
        layout.rows.compile(|_| true, &mut program);
        decode(layout, &program, &current.row, &current.key, record, &self.table)
    }
    fn fetch_ahead(&mut self, session: &Session) {
        if let Some(window) = self.ahead.window(&self.current.key) {
            session.txn.prefetch(self.table.state.primary_tree(), window);
        }
    }
    /// unlock_row: the current row was not wanted. In READ COMMITTED its lock goes, if this read took it.
    pub fn unlock_row(&mut self, session: &mut Session) {
        // After a write the row may be one that was written, by another cursor of this session perhaps.
        if self.current.row_as_of == Some((session.txn.id(), session.writes())) {
            self.give_back_lock(session);
        }
    }

    fn give_back_lock(&mut self, session: &mut Session) {
        if let Some((_, Granted::New)) = self.current.locked
            && session.is_read_committed()
        {
            session.txn.unlock(self.table.state.primary_tree(), &self.current.key);
            self.current.locked = None;
            self.current.row_as_of = None;
        }
    }

    /// The current row's key, if that was not copied.
    fn in_entry(&self) -> Option<&[u8]> {
        let bytes = self.current.in_entry?;
        let key = self.engine.key();
        Some(&key[key.len() - bytes..])
    }

    /// Copies the current row's key, before the engine's cursor leaves it or somebody asks for more than the position.
    pub(crate) fn keep_current(&mut self) {
        if let Some(bytes) = self.current.in_entry.take() {
            let key = self.engine.key();
            self.current.key.clear();
            self.current.key.extend_from_slice(&key[key.len() - bytes..]);
        }
    }

    fn encode_bound(&mut self, index: usize, tuple: &[u8]) -> Result<TupleShape> {
        self.bound.clear();
        let codec = &self.table.layout.indexes[index];
        let collations = self.table.store.collations();
        codec
            .encode_tuple(tuple, collations, &mut self.scratch.weights, &mut self.bound)
            .map_err(|_| MALFORMED_TUPLE)
    }

    fn tree(&self) -> engine::TreeId {
        match self.index {
            Some(index) => self.table.state.index_tree(index),
            None => self.table.state.primary_tree(),
        }
    }

    fn open(&mut self, session: &mut Session) -> Result<()> {
        let read = match self.lock {
            RowLock::None => self.read_snapshot(session)?,
            _ => session.read_for_lock(),
        };
        self.current.forget();
        self.engine.open(&mut session.txn, self.tree(), read)?;
        self.opened_for = session.serial();
        self.opened_as = read;
        self.stale = false;
        Ok(())
    }

    #[inline]
    fn is_open_for(&self, session: &Session) -> bool {
        self.opened_for == session.serial() && !self.stale
    }

    /// Opens the engine's cursor anew, after remembering where it was.
    fn reopen(&mut self, session: &mut Session) -> Result<()> {
        if self.place == Place::On {
            self.entry.clear();
            self.entry.extend_from_slice(self.engine.key());
            self.place = Place::Detached;
        }
        self.open(session)
    }

    /// Moves the engine's cursor to where a read with `flag` has to look first.
    fn seek_bound(&mut self, session: &mut Session, flag: ReadFlag, split: Option<usize>) -> Result<bool> {
        use ReadFlag::*;
        self.open(session)?;
        let txn = &mut session.txn;
        let whole = split.unwrap_or(self.bound.len());
        let after =
            matches!(flag, OrPrev | PrefixLast | PrefixLastOrPrev) || flag == After && split.is_none();
        if !after {
            let bound = &self.bound[..whole];
            let backward = flag == Before && split.is_none();
            let mut found = if backward {
                self.engine.seek_before(txn, bound)?
            } else if flag == Before {
                // The entry itself may be before the extended tuple.
                let mut next = bound.to_vec();
                if successor(&mut next) {
                    self.engine.seek_before(txn, &next)?
                } else {
                    self.engine.seek_last(txn)?
                }
            } else if flag.stays_in_prefix() {
                self.engine.seek_within(txn, bound)?
            } else {
                self.engine.seek(txn, bound)?
            };
            if found
                && split.is_some()
                && self.engine.key() == &self.bound[..whole]
                && !self.extension_fits(flag)?
            {
                found = match flag {
                    Exact | Prefix => false,
                    Before => self.engine.prev(&mut session.txn)?,
                    _ => self.engine.next(&mut session.txn)?,
                };
            }
            return Ok(found);
        }
        self.entry.clear();
        self.entry.extend_from_slice(&self.bound[..whole]);
        let bounded = successor(&mut self.entry);
        let mut found = match (flag, bounded) {
            (PrefixLast, _) => self.engine.seek_last_within(txn, &self.bound[..whole])?,
            (After, true) => self.engine.seek(txn, &self.entry)?,
            (After, false) => false,
            (_, true) => self.engine.seek_before(txn, &self.entry)?,
            (_, false) => self.engine.seek_last(txn)?,
        };
        if found
            && split.is_some()
            && self.engine.key() == &self.bound[..whole]
            && !self.extension_fits(flag)?
        {
            found = flag != PrefixLast && self.engine.prev(&mut session.txn)?;
        }
        Ok(found)
    }

    /// For an entry of a unique index whose key equals the user's parts of an extended tuple: whether its primary key is where
    /// `flag` wants it.
    fn extension_fits(&self, flag: ReadFlag) -> Result<bool> {
        use ReadFlag::*;
        let index = self.index.ok_or_else(|| Error::Malformed("call: no index in use"))?;
        let (primary, _) = self.table.layout.indexes[index]
            .split(self.engine.key(), self.engine.value())
            .map_err(self.table.garbled("an index entry"))?;
        let extension = &self.bound[self.engine.key().len()..];
        let inside = primary.starts_with(extension);
        Ok(match flag {
            Exact | Prefix | PrefixLast => inside,
            OrNext => primary >= extension,
            After => primary > extension && !inside,
            OrPrev | PrefixLastOrPrev => inside || primary < extension,
            Before => primary < extension,
        })
    }

    /// Reads the row of the entry that was found, or of the next one in order whose row is there to be read.
    #[inline]
    fn settle(
        &mut self,
        session: &mut Session,
        mut found: bool,
        backward: bool,
        prefix: Option<usize>,
        record: &mut [u8],
    ) -> Result<bool> {
        loop {
            if !found {
                self.place = match prefix {
                    Some(prefix) => self.edge_of(backward, prefix),
                    None if backward => Place::BeforeFirst,
                    None => Place::AfterLast,
                };
                return Ok(false);
            }
            self.place = Place::On;
            if let Some(prefix) = prefix
                && !self.engine.key().starts_with(&self.bound[..prefix])
            {
                return Ok(false);
            }
            match self.fetch(session, backward, prefix, record)? {
                Met::Row => return Ok(true),
                Met::End => return Ok(false),
                Met::Nothing => {}
            }
            if self.stale {
                self.reopen(session)?;
                found = match backward {
                    false => self.engine.seek_after(&mut session.txn, &self.entry)?,
                    true => self.engine.seek_before(&mut session.txn, &self.entry)?,
                };
                continue;
            }
            found = match (backward, prefix) {
                (false, None) => self.engine.next(&mut session.txn)?,
                (true, None) => self.engine.prev(&mut session.txn)?,
                (false, Some(_)) => self.engine.next_within(&mut session.txn)?,
                (true, Some(_)) => self.engine.prev_within(&mut session.txn)?,
            };
        }
    }

    /// Where a read that found no more in a prefix of the bound leaves the cursor: a step goes on from there.
    fn edge_of(&mut self, backward: bool, prefix: usize) -> Place {
        self.entry.clear();
        self.entry.extend_from_slice(&self.bound[..prefix]);
        if backward || successor(&mut self.entry) { Place::Detached } else { Place::AfterLast }
    }

    /// Reads the row of the entry that the engine's cursor stands on, if there is one for this reader.
    #[inline]
    fn fetch(
        &mut self,
        session: &mut Session,
        backward: bool,
        prefix: Option<usize>,
        record: &mut [u8],
    ) -> Result<Met> {
        let table = &self.table;
        match self.way {
            Way::Row if self.moved.is_empty() => {
                let (key, value) = self.engine.entry();
                self.current.set_in_entry(key.len());
                decode(&table.layout, &self.columns.program, value, key, record, table).map(|()| Met::Row)
            }
            Way::Entry(index) if self.moved.is_empty() => {
                let (key, value) = self.engine.entry();
                let codec = &table.layout.indexes[index];
                match codec.primary_len().filter(|bytes| *bytes <= key.len()) {
                    Some(bytes) => self.current.set_in_entry(bytes),
                    None => {
                        self.current.set(codec.split(key, value).map_err(table.garbled("an index entry"))?.0)
                    }
                }
                codec
                    .decode(&self.columns.entry, key, value, record, &mut self.scratch.weights)
                    .map_err(table.garbled("an index entry"))?;
                Ok(Met::Row)
            }
            _ => self.fetch_longer(session, backward, prefix, record),
        }
    }

    fn fetch_longer(
        &mut self,
        session: &mut Session,
        backward: bool,
        prefix: Option<usize>,
        record: &mut [u8],
    ) -> Result<Met> {
        if self.scout.missed {
            self.look_ahead(session, backward, prefix, record)?;
        }
        let (key, value) = self.engine.entry();
        if !self.moved.is_empty() && self.moved.contains(key) {
            return Ok(Met::Nothing);
        }
        let layout = &self.table.layout;
        let secondary = self.index.filter(|index| layout.descriptor.primary != Some(*index));
        let Some(index) = secondary else {
            self.current.set(key);
            if self.lock != RowLock::None {
                return self.fetch_current(session, record, false).map(Met::of);
            }
            if self.columns.wants_blobs {
                self.current.row.clear();
                self.current.row.extend_from_slice(value);
            }
            let row = if self.columns.wants_blobs { &self.current.row } else { value };
            return decode(layout, &self.columns.program, row, key, record, &self.table).map(|()| Met::Row);
        };
        let codec = &layout.indexes[index];
        let covered = self.covered && self.lock == RowLock::None;
        let condition = self.condition.as_deref_mut().filter(|condition| condition.index == index);
        if let Some(program) = entry_program(covered, condition.as_deref(), &self.columns) {
            codec
                .decode(program, key, value, record, &mut self.scratch.weights)
                .map_err(self.table.garbled("an index entry"))?;
        }
        if let Some(condition) = condition {
            match (condition.check)(record) {
                Verdict::Take => {}
                Verdict::Skip => {
                    self.spared += 1;
                    return Ok(Met::Nothing);
                }
                Verdict::PastTheEnd => return Ok(Met::End),
                Verdict::Killed => return Err(killed()),
            }
        }
        let (primary, _) = codec.split(key, value).map_err(self.table.garbled("an index entry"))?;
        self.current.set(primary);
        if covered {
            return Ok(Met::Row);
        }
        let misses = self.table.store.engine().block_misses();
        let found = self.fetch_current(session, record, true)?;
        self.scout.note_row(self.table.store.engine().block_misses() != misses);
        Ok(Met::of(found))
    }

    /// Fetches at once what the rows of the entries that follow lack. `record` is written to if there is a condition.
    #[cold]
    fn look_ahead(
        &mut self,
        session: &mut Session,
        backward: bool,
        prefix: Option<usize>,
        record: &mut [u8],
    ) -> Result<()> {
        let Some(index) = self.index.filter(|_| self.scout.is_due() && self.lock == RowLock::None) else {
            return Ok(());
        };
        let scan = Scan {
            table: &self.table,
            index,
            tree: self.tree(),
            read: self.opened_as,
            from: self.engine.key(),
            backward,
            prefix: prefix.map_or(&[], |prefix| &self.bound[..prefix]),
        };
        let condition = self.condition.as_deref_mut().filter(|condition| condition.index == index);
        self.scout.look(session, &scan, condition, record, &mut self.scratch.weights)
    }

    /// Reads the current row by its primary key, under a lock if the reads lock. `entry`: an entry of the index in use led to it.
    fn fetch_current(&mut self, session: &mut Session, record: &mut [u8], entry: bool) -> Result<bool> {
        if self.lock != RowLock::None {
            return self.fetch_locked(session, record, entry);
        }
        let table = &self.table;
        let read = session.read_snapshot();
        let tree = table.state.primary_tree();
        let (current, columns) = (&mut self.current, &self.columns);
        let (key, kept) = (&current.key, &mut current.row);
        let found = if columns.wants_blobs {
            let found = session.txn.get(tree, key, read, |row| {
                kept.clear();
                kept.extend_from_slice(row);
            })?;
            found.map(|()| decode(&table.layout, &columns.program, kept, key, record, table))
        } else {
            session.txn.get(tree, key, read, |row| {
                decode(&table.layout, &columns.program, row, key, record, table)
            })?
        };
        match found {
            Some(decoded) => decoded.map(|()| true),
            None if entry => Err(Error::Corrupt(format!(
                "table {}: an entry of index {:?} has no row",
                table.path, self.index
            ))),
            None => Ok(false),
        }
    }

    fn fetch_locked(&mut self, session: &mut Session, record: &mut [u8], entry: bool) -> Result<bool> {
        let tree = self.table.state.primary_tree();
        let mode = if self.lock == RowLock::Shared { LockMode::Shared } else { LockMode::Exclusive };
        let granted = session.lock(tree, &self.current.key, mode)?;
        self.current.locked = Some((mode, granted));
        let kept = &mut self.current.row;
        let found = session.txn.get(tree, &self.current.key, ReadAs::Newest, |row| {
            kept.clear();
            kept.extend_from_slice(row);
        })?;
        if found.is_none() || entry && !(self.entry_is_current()? && self.still_meets_condition(record)?) {
            self.give_back_lock(session);
            // Others were here since the cursor was opened: what they wrote further on is wanted too.
            self.stale = self.place == Place::On && self.opened_as == ReadAs::Newest;
            return Ok(false);
        }
        self.current.row_as_of = Some((session.txn.id(), session.writes()));
        let current = &self.current;
        decode(&self.table.layout, &self.columns.program, &current.row, &current.key, record, &self.table)?;
        Ok(true)
    }

    /// Whether the current row, as it is now, still makes the entry that led to it.
    fn entry_is_current(&mut self) -> Result<bool> {
        let Some(index) = self.index else { return Ok(true) };
        let (layout, scratch) = (&self.table.layout, &mut self.scratch);
        let row = &self.current.row[..];
        layout.rows.parse(row, &self.current.key, &mut scratch.parts).map_err(self.table.garbled("a row"))?;
        let parts = &scratch.parts;
        layout.indexes[index]
            .entry(
                &|field| Ok(layout.rows.value(field, row, parts)),
                &self.current.key,
                self.table.store.collations(),
                &mut scratch.weights,
                (&mut scratch.entry_key, &mut scratch.entry_value),
            )
            .map_err(self.table.garbled("a row"))?;
        let entry = if self.place == Place::On { self.engine.key() } else { &self.entry };
        Ok(scratch.entry_key == entry)
    }

    /// Whether the entry that [`entry_is_current`](Self::entry_is_current) has just made meets the pushed condition. Its key is
    /// that of the entry which met it, but equal keys may differ in what they spell: 'a' may have become 'A'.
    fn still_meets_condition(&mut self, record: &mut [u8]) -> Result<bool> {
        let condition = self.condition.as_deref_mut();
        let Some(condition) = condition.filter(|condition| self.index == Some(condition.index)) else {
            return Ok(true);
        };
        let Scratch { entry_key, entry_value, weights, .. } = &mut self.scratch;
        self.table.layout.indexes[condition.index]
            .decode(&condition.entry, entry_key, entry_value, record, weights)
            .map_err(self.table.garbled("an index entry"))?;
        match (condition.check)(record) {
            Verdict::Take => Ok(true),
            Verdict::Skip | Verdict::PastTheEnd => Ok(false),
            Verdict::Killed => Err(killed()),
        }
    }

    /// The row whose primary key is the bound.
    fn read_point(&mut self, session: &mut Session, record: &mut [u8]) -> Result<bool> {
        self.detach();
        self.current.set(&self.bound);
        self.fetch_ahead(session);
        self.fetch_current(session, record, false)
    }

    /// The row of a unique index's entry whose key is the bound.
    fn read_unique(&mut self, session: &mut Session, index: usize, record: &mut [u8]) -> Result<bool> {
        let read =
            if self.lock == RowLock::None { self.read_snapshot(session)? } else { session.read_for_lock() };
        let tree = self.tree();
        let (codec, current) = (&self.table.layout.indexes[index], &mut self.current);
        let (bound, scratch) = (&self.bound, &mut self.scratch.weights);
        let covered = self.covered && self.lock == RowLock::None;
        let condition = self.condition.as_deref_mut().filter(|condition| condition.index == index);
        let program = entry_program(covered, condition.as_deref(), &self.columns);
        let found = session.txn.get(tree, bound, read, |value| {
            let (primary, _) = codec.split(bound, value)?;
            current.set(primary);
            program.map_or(Ok(()), |program| codec.decode(program, bound, value, record, scratch))
        })?;
        let verdict = match (&found, condition) {
            (Some(Ok(())), Some(condition)) => (condition.check)(record),
            _ => Verdict::Take,
        };
        self.detach();
        let Some(decoded) = found else { return Ok(false) };
        decoded.map_err(self.table.garbled("an index entry"))?;
        match verdict {
            Verdict::Take if covered => Ok(true),
            Verdict::Take => self.fetch_current(session, record, true),
            Verdict::Skip => {
                self.spared += 1;
                Ok(false)
            }
            Verdict::PastTheEnd => Ok(false),
            Verdict::Killed => Err(killed()),
        }
    }

    /// For reads that lock nothing. An index that was built after the snapshot has no entries for what it sees.
    fn read_snapshot(&self, session: &mut Session) -> Result<ReadAs> {
        let since = self.table.state.indexed_since();
        let secondary = self.index.is_some() && self.index != self.table.layout.descriptor.primary;
        if since.0 != 0 && secondary && session.txn.snapshot_seqno() < since {
            let reason = "an index is younger than the transaction's snapshot";
            return Err(Error::DefinitionChanged { path: self.table.path.clone(), reason });
        }
        Ok(session.read_snapshot())
    }

    /// Stands on the bound without the engine's cursor.
    fn detach(&mut self) {
        std::mem::swap(&mut self.entry, &mut self.bound);
        self.bound.clear();
        self.bound.extend_from_slice(&self.entry);
        self.place = Place::Detached;
    }

    fn set_current(&mut self, key: &[u8]) {
        self.current.set(key);
    }
}

impl Met {
    fn of(found: bool) -> Self {
        if found { Self::Row } else { Self::Nothing }
    }
}

/// What has to be decoded of an entry, if anything.
fn entry_program<'a>(
    covered: bool,
    condition: Option<&'a PushedCondition>,
    columns: &'a Columns,
) -> Option<&'a EntryProgram> {
    condition.map(|condition| &condition.entry).or(covered.then_some(&columns.entry))
}

fn killed() -> Error {
    engine::Error::new(engine::Kind::Interrupted, "the read was interrupted").into()
}

impl Current {
    #[inline]
    pub(crate) fn set(&mut self, key: &[u8]) {
        self.key.clear();
        self.key.extend_from_slice(key);
        self.set_in_entry(0);
        self.in_entry = None;
    }

    /// The key of the engine's cursor ends with its key.
    #[inline]
    fn set_in_entry(&mut self, bytes: usize) {
        self.in_entry = Some(bytes);
        self.known = true;
        self.row_as_of = None;
        self.locked = None;
    }

    /// The engine's cursor is about to leave it.
    #[inline]
    fn forget(&mut self) {
        if self.in_entry.take().is_some() {
            self.known = false;
        }
    }
}

#[inline]
fn decode(
    layout: &Layout,
    program: &Program,
    row: &[u8],
    key: &[u8],
    record: &mut [u8],
    table: &Table,
) -> Result<()> {
    layout.rows.decode(program, row, key, record).map_err(table.garbled("a row"))
}

/// A position is the primary key, zeros, and its length.
pub(crate) fn put_position(key: &[u8], position: &mut [u8]) {
    let (room, len) = (position.len() - 2, key.len());
    assert!(
        len <= room,
        "a primary key of {len} bytes; a collation's longest weights were said to fit {room}"
    );
    position[..len].copy_from_slice(&key[..len]);
    position[len..room].fill(0);
    position[room..].copy_from_slice(&(len as u16).to_be_bytes());
}

fn position_key(position: &[u8]) -> Option<&[u8]> {
    let (key, len) = position.split_last_chunk::<2>()?;
    key.get(..usize::from(u16::from_be_bytes(*len)))
}
