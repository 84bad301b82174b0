//! An open table: its counters and its statistics. Rows are reached through a cursor.

use std::sync::Arc;

use crate::cursor::ReadFlag;
use crate::{Error, Result, RowCursor};

/// One end of a range, as `records_in_range` gets it (key_range).
#[derive(Clone, Copy, Debug)]
pub struct RangeEnd<'a> {
    /// The key tuple.
    pub tuple: &'a [u8],
    /// For the lower end `Exact`, `OrNext` or `After`; for the upper end `Exact`, `Before` or `After` (inclusive).
    pub flag: ReadFlag,
}

/// A table that the server has open. Shared by all its handlers; every method may be called from any thread.
pub struct Table {}

const NOT_YET: Error = Error::Malformed("call: this build has signatures only");

impl Table {
    /// A cursor. Belongs to one handler and is reused for all its statements, by whatever session.
    pub fn cursor(self: &Arc<Self>) -> RowCursor {
        RowCursor {}
    }
    /// Bytes of a row position (`handler::ref_length`).
    pub fn position_length(&self) -> usize {
        0
    }
    /// Version of the definition it was opened with; compare with `Store::definition` in discover_check_version.
    pub fn definition_version(&self) -> u64 {
        0
    }

    /// Rows, about: exact but for changes of transactions that have not ended, and for a crash since the last count.
    pub fn row_count(&self) -> u64 {
        0
    }
    /// Bytes of all rows, about.
    pub fn data_bytes(&self) -> u64 {
        0
    }
    /// Bytes of all secondary indexes, about.
    pub fn index_bytes(&self) -> u64 {
        0
    }
    /// How many rows share the values of the first `part + 1` parts of an index (user's parts, then extension), about; at least 1.
    pub fn records_per_key(&self, _index: usize, _part: usize) -> u64 {
        1
    }
    /// Counts rows and samples every index anew (ANALYZE TABLE). Also done by itself when a table has changed much.
    pub fn analyze(&self) -> Result<()> {
        Err(NOT_YET)
    }
    /// How many entries of an index lie between two ends, about; at least 1.
    pub fn records_in_range(
        &self,
        _index: usize,
        _low: Option<RangeEnd>,
        _high: Option<RangeEnd>,
    ) -> Result<u64> {
        Err(NOT_YET)
    }

    /// Removes all rows and sets auto-increment back to 1. Takes effect at once, whatever the caller's transaction does later;
    /// the caller holds the table alone (TRUNCATE TABLE).
    pub fn truncate(&self) -> Result<()> {
        Err(NOT_YET)
    }

    /// Reserves `count` values of the series `offset + n × increment` (auto_increment_offset, _increment), for
    /// `handler::get_auto_increment`. Returns the first and how many; values are never handed out twice. At the end of the
    /// type's range the first is `u64::MAX`.
    pub fn reserve_auto_increment(&self, _offset: u64, _increment: u64, _count: u64) -> (u64, u64) {
        (u64::MAX, 0)
    }
    /// The next value it would hand out (HA_STATUS_AUTO, SHOW CREATE TABLE).
    pub fn next_auto_increment(&self) -> u64 {
        1
    }
    /// Sets the next value, but never to one in use (ALTER TABLE … AUTO_INCREMENT = n). Durable when it returns.
    pub fn set_auto_increment(&self, _next: u64) -> Result<()> {
        Err(NOT_YET)
    }
}
