//! Reading and writing rows in the server's own record layout.
//!
//! * A cursor writes a row's columns straight into the caller's record; only the columns asked for are decoded.
//! * Pointers of BLOBs in a record point into the cursor and stay valid until the next call that reads a row with it.
//! * The *current row* is the last one read; update, delete, position and unlock mean it.

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

/// A record to be written.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// The record buffer, `record_length` bytes.
    pub image: &'a [u8],
    /// The bytes of each BLOB column, in order of columns ([`crate::Kind::Blob`] only); empty for NULL.
    pub blobs: &'a [&'a [u8]],
}

/// A handler's way to the rows of a table.
pub struct RowCursor {}

const NOT_YET: Error = Error::Malformed("call: this build has signatures only");

impl RowCursor {
    /// Which columns the reads that follow are to decode: bit i of `columns` (byte i / 8, bit i % 8, as in MY_BITMAP) for column
    /// i; `None` is all. For statements that update: read_set ∪ write_set. Cheap when nothing changed.
    pub fn set_columns(&mut self, _columns: Option<&[u8]>) {}
    /// Lets the reads that follow answer from the index alone where it holds all wanted columns (HA_EXTRA_KEYREAD); others
    /// read the row, so the answer is the same.
    pub fn set_key_only(&mut self, _yes: bool) {}
    /// What the reads that follow do to rows (store_lock, external_lock).
    pub fn set_lock(&mut self, _lock: RowLock) {}

    /// Starts using an index (index_init), or the rows in primary order (`None`: rnd_init). Does no I/O.
    pub fn start(&mut self, _index: Option<usize>) -> Result<()> {
        Err(NOT_YET)
    }
    /// Done with it (index_end, rnd_end, reset): lets go of snapshots and memory. The current row stays current.
    pub fn stop(&mut self) {}

    /// index_read_map: finds by a key tuple of one or more leading parts. False: there is none (HA_ERR_KEY_NOT_FOUND).
    pub fn read(
        &mut self,
        _session: &mut Session,
        _tuple: &[u8],
        _flag: ReadFlag,
        _record: &mut [u8],
    ) -> Result<bool> {
        Err(NOT_YET)
    }
    /// index_first, and the first rnd_next. False: end (HA_ERR_END_OF_FILE).
    pub fn first(&mut self, _session: &mut Session, _record: &mut [u8]) -> Result<bool> {
        Err(NOT_YET)
    }
    /// index_last.
    pub fn last(&mut self, _session: &mut Session, _record: &mut [u8]) -> Result<bool> {
        Err(NOT_YET)
    }
    /// index_next, rnd_next; the first one after `start` reads the first row.
    pub fn next(&mut self, _session: &mut Session, _record: &mut [u8]) -> Result<bool> {
        Err(NOT_YET)
    }
    /// index_prev; the first one after `start` reads the last row.
    pub fn prev(&mut self, _session: &mut Session, _record: &mut [u8]) -> Result<bool> {
        Err(NOT_YET)
    }
    /// index_next_same: the next with the same key tuple.
    pub fn next_same(&mut self, _session: &mut Session, _tuple: &[u8], _record: &mut [u8]) -> Result<bool> {
        Err(NOT_YET)
    }
    /// rnd_pos: the row at a position that `position` or `duplicate_position` gave. False: it is gone. Needs no `start`, and leaves
    /// a scan where it was.
    pub fn read_position(
        &mut self,
        _session: &mut Session,
        _position: &[u8],
        _record: &mut [u8],
    ) -> Result<bool> {
        Err(NOT_YET)
    }
    /// The position of the current row, into `position_length` bytes. Positions compare as bytes, in primary order.
    pub fn position(&self, _position: &mut [u8]) {}
    /// unlock_row: the current row was not wanted. In READ COMMITTED its lock goes, if this read took it.
    pub fn unlock_row(&mut self, _session: &mut Session) {}

    /// write_row. Locks what must stay unique; on `Duplicate` nothing was written and `duplicate_position` tells the other row. An
    /// explicit AUTO_INCREMENT value moves the counter.
    pub fn insert(&mut self, _session: &mut Session, _record: Record) -> Result<()> {
        Err(NOT_YET)
    }
    /// update_row: the current row becomes `new`. Columns that are equal in `old` (the image as it was read) and `new` keep their
    /// stored value, so neither needs columns that were not read. The current row is then the new one.
    pub fn update(&mut self, _session: &mut Session, _old: &[u8], _new: Record) -> Result<()> {
        Err(NOT_YET)
    }
    /// delete_row: removes the current row.
    pub fn delete(&mut self, _session: &mut Session) -> Result<()> {
        Err(NOT_YET)
    }
    /// The position of the row that made the last insert or update end in `Duplicate` (dup_ref).
    pub fn duplicate_position(&self, _position: &mut [u8]) {}
}
