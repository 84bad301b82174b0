//! An open table: its counters and where its trees are. Rows are reached through a cursor.
//!
//! * All handlers of a table share one `TableState`, whatever the table is called now; it lives until the table is dropped.
//! * An auto-increment value is handed out once in the life of a process; a restart goes on after the greatest committed one.

use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicI64, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use engine::{Cursor, ReadAs, Seqno, TreeId};
use parking_lot::{Mutex, RwLock};

use crate::catalogue::{
    CATALOGUE, Definition, PER_KEY_SCALE, Space, StoredStatistics, Trees, key, mark_key, table_key,
};
use crate::cursor::ReadFlag;
use crate::keys::{Garbled, successor};
use crate::layout::Layout;
use crate::session::Counts;
use crate::{Collations, Error, Result, RowCursor, Store};

/// One end of a range, as `records_in_range` gets it (key_range).
#[derive(Clone, Copy, Debug)]
pub struct RangeEnd<'a> {
    /// The key tuple.
    pub tuple: &'a [u8],
    /// For the lower end `Exact`, `OrNext` or `After`; for the upper end `Exact`, `Before` or `After` (inclusive).
    pub flag: ReadFlag,
}

/// A table that the server has open. Shared by its handlers; every method may be called from any thread.
pub struct Table {
    pub(crate) store: Arc<Store>,
    pub(crate) path: String,
    pub(crate) layout: Layout,
    pub(crate) state: Arc<TableState>,
    definition_version: u64,
}

/// What all handlers of a table share.
pub(crate) struct TableState {
    pub(crate) id: u64,
    primary: AtomicU32,
    /// 0: none of its own.
    indexes: Box<[AtomicU32]>,
    rows: AtomicI64,
    /// Rows changed since the indexes were sampled.
    changed: AtomicU64,
    /// Rows changed since statistics were written to the catalogue.
    unsaved: AtomicU64,
    next_auto_increment: AtomicU64,
    mark_slots: Mutex<MarkSlots>,
    next_hidden: AtomicU64,
    pub(crate) row_bytes: AtomicU64,
    pub(crate) index_entry_bytes: AtomicU64,
    per_key: RwLock<Vec<Vec<u64>>>,
    statistics_version: AtomicU64,
    pub(crate) sampling: Mutex<()>,
    /// Whether the counters say what is stored. Held while they are filled, so that nobody hands out values before.
    recovered: Mutex<bool>,
    /// Seqno of the commit that gave it its indexes, if that was in this process's life and after the table was made.
    since: AtomicU64,
}

/// Rows up to which a table is counted exactly when it is opened, and its indexes are read whole.
pub(crate) const COUNTED_ROWS: u64 = 2000;

/// Slots of the auto-increment mark: as many as there ever were commits at the same time.
#[derive(Default)]
struct MarkSlots {
    free: Vec<u16>,
    made: u16,
}

impl TableState {
    pub(crate) fn new(id: u64, trees: &Trees) -> Self {
        Self {
            id,
            primary: AtomicU32::new(trees.primary.0),
            indexes: trees.indexes.iter().map(|tree| AtomicU32::new(tree.map_or(0, |tree| tree.0))).collect(),
            rows: AtomicI64::new(0),
            changed: AtomicU64::new(0),
            unsaved: AtomicU64::new(0),
            next_auto_increment: AtomicU64::new(1),
            mark_slots: Mutex::new(MarkSlots::default()),
            next_hidden: AtomicU64::new(1),
            row_bytes: AtomicU64::new(0),
            index_entry_bytes: AtomicU64::new(0),
            per_key: RwLock::new(Vec::new()),
            statistics_version: AtomicU64::new(1),
            sampling: Mutex::new(()),
            recovered: Mutex::new(false),
            since: AtomicU64::new(0),
        }
    }

    /// Counts of a transaction that has committed.
    pub(crate) fn apply(&self, counts: &Counts) {
        self.rows.fetch_add(counts.rows, Relaxed);
        self.changed.fetch_add(counts.changed, Relaxed);
        self.unsaved.fetch_add(counts.changed, Relaxed);
    }

    /// Statistics to be written by the transaction that makes these changes, once enough has changed.
    pub(crate) fn statistics_due(&self, counts: &Counts) -> Option<Vec<u8>> {
        let unsaved = self.unsaved.load(Relaxed) + counts.changed;
        let due = unsaved > COUNTED_ROWS / 2 + self.rows() / 16;
        due.then(|| {
            self.unsaved.store(0, Relaxed);
            self.stored_statistics(counts).encode()
        })
    }

    /// Of the rows alone: the indexes are others.
    pub(crate) fn stored_rows(&self) -> StoredStatistics {
        StoredStatistics { changed: 0, per_key: Vec::new(), ..self.stored_statistics(&Counts::default()) }
    }

    pub(crate) fn stored_statistics(&self, counts: &Counts) -> StoredStatistics {
        StoredStatistics {
            rows: (self.rows.load(Relaxed) + counts.rows).max(0) as u64,
            changed: self.changed.load(Relaxed) + counts.changed,
            per_key: self.per_key.read().clone(),
        }
    }

    /// Whether the counters say what is stored.
    pub(crate) fn is_recovered(&self) -> bool {
        *self.recovered.lock()
    }
    pub(crate) fn rows(&self) -> u64 {
        self.rows.load(Relaxed).max(0) as u64
    }
    pub(crate) fn set_rows(&self, rows: u64) {
        self.rows.store(rows as i64, Relaxed);
    }
    pub(crate) fn changed(&self) -> u64 {
        self.changed.load(Relaxed)
    }
    pub(crate) fn set_per_key(&self, per_key: Vec<Vec<u64>>, changed: u64) {
        *self.per_key.write() = per_key;
        self.changed.store(changed, Relaxed);
        self.statistics_version.fetch_add(1, Relaxed);
    }
    pub(crate) fn has_samples(&self) -> bool {
        !self.per_key.read().is_empty()
    }
    pub(crate) fn next_auto_increment(&self) -> u64 {
        self.next_auto_increment.load(Relaxed)
    }
    /// An explicit value was stored: the next one is greater.
    #[inline]
    pub(crate) fn note_auto_increment(&self, value: u64) {
        if value >= self.next_auto_increment.load(Relaxed) {
            self.next_auto_increment.fetch_max(value.saturating_add(1), Relaxed);
        }
    }
    /// A slot for the auto-increment mark that nobody else writes to until it is given back.
    pub(crate) fn take_mark_slot(&self) -> u16 {
        let mut slots = self.mark_slots.lock();
        slots.free.pop().unwrap_or_else(|| {
            let slot = slots.made;
            slots.made = slot.checked_add(1).expect("there are fewer connections than slots");
            slot
        })
    }
    pub(crate) fn give_mark_slot(&self, slot: u16) {
        self.mark_slots.lock().free.push(slot);
    }
    pub(crate) fn allocate_hidden(&self) -> u64 {
        self.next_hidden.fetch_add(1, Relaxed)
    }
    #[inline]
    pub(crate) fn primary_tree(&self) -> TreeId {
        TreeId(self.primary.load(Acquire))
    }
    /// The tree of an index; the primary tree for the primary key.
    #[inline]
    pub(crate) fn index_tree(&self, index: usize) -> TreeId {
        match self.indexes[index].load(Acquire) {
            0 => self.primary_tree(),
            tree => TreeId(tree),
        }
    }

    /// The rows are elsewhere now. Rows first: who finds an entry of an index finds its row too.
    pub(crate) fn exchange_trees(&self, trees: &Trees) {
        self.primary.store(trees.primary.0, Release);
        for (to, from) in self.indexes.iter().zip(&trees.indexes) {
            to.store(from.map_or(0, |tree| tree.0), Release);
        }
    }

    /// The same table with other indexes, as of `since`.
    pub(crate) fn with_indexes(&self, trees: &Trees, since: Seqno) -> Self {
        let copy = |from: &AtomicU64, to: &AtomicU64| to.store(from.load(Relaxed), Relaxed);
        let since = since.0.max(self.since.load(Relaxed));
        let new = Self { since: AtomicU64::new(since), ..Self::new(self.id, trees) };
        new.rows.store(self.rows.load(Relaxed), Relaxed);
        copy(&self.next_auto_increment, &new.next_auto_increment);
        copy(&self.next_hidden, &new.next_hidden);
        copy(&self.row_bytes, &new.row_bytes);
        *new.recovered.lock() = true;
        new
    }
    /// Entries of indexes are there for snapshots from this one on.
    #[inline]
    pub(crate) fn indexed_since(&self) -> Seqno {
        Seqno(self.since.load(Relaxed))
    }

    fn replace_trees(&self, trees: &Trees) {
        self.exchange_trees(trees);
        self.set_rows(0);
        self.unsaved.store(0, Relaxed);
        self.next_auto_increment.store(1, Relaxed);
        self.next_hidden.store(1, Relaxed);
        self.set_per_key(Vec::new(), 0);
    }
}

impl Table {
    pub(crate) fn new(
        store: Arc<Store>,
        path: String,
        layout: Layout,
        state: Arc<TableState>,
        definition: &Definition,
    ) -> Self {
        Self { store, path, layout, state, definition_version: definition.version }
    }

    /// A cursor. Belongs to one handler and is reused for all its statements, by whatever session.
    pub fn cursor(self: &Arc<Self>) -> RowCursor {
        RowCursor::new(Arc::clone(self))
    }
    /// Bytes of a row position (`handler::ref_length`).
    pub fn position_length(&self) -> usize {
        self.layout.position_length
    }
    /// Version of the definition it was opened with; compare with `Store::definition` in discover_check_version.
    pub fn definition_version(&self) -> u64 {
        self.definition_version
    }
    /// Names the table for ever; a rename keeps it.
    pub fn id(&self) -> u64 {
        self.state.id
    }

    /// Rows, about: exact but for changes of transactions that have not ended, and for a crash since the last count.
    pub fn row_count(&self) -> u64 {
        self.state.rows()
    }
    /// Bytes of all rows, about.
    pub fn data_bytes(&self) -> u64 {
        let row_bytes = match self.state.row_bytes.load(Relaxed) {
            0 => u64::from(self.layout.descriptor.record_length),
            known => known,
        };
        self.row_count() * row_bytes
    }
    /// Bytes of all secondary indexes, about.
    pub fn index_bytes(&self) -> u64 {
        self.row_count() * self.state.index_entry_bytes.load(Relaxed)
    }
    /// How many rows share the values of the first `part + 1` parts of an index (user's parts, then extension), about; at least 1.
    pub fn records_per_key(&self, index: usize, part: usize) -> u64 {
        let codec = &self.layout.indexes[index];
        if codec.unique && part + 1 >= codec.parts.len() {
            return 1;
        }
        let per_key = self.state.per_key.read();
        match per_key.get(index).and_then(|parts| parts.get(part)) {
            Some(scaled) => (scaled.div_ceil(PER_KEY_SCALE)).clamp(1, self.row_count().max(1)),
            // Never sampled: a guess that makes more parts better than fewer.
            None => (self.row_count() >> (4 + 3 * part.min(12))).max(1),
        }
    }
    /// Counts and samples anew if the table has changed much since the last time, else does nothing. Returns a number that changes
    /// when [`Table::records_per_key`] does. For `handler::info`: cheap when there is nothing to do.
    pub fn refresh_statistics(&self) -> Result<u64> {
        let changed = self.state.changed();
        let due =
            changed > 200 + self.row_count() / 10 || (self.row_count() > 0 && !self.state.has_samples());
        if due && let Some(_turn) = self.state.sampling.try_lock() {
            self.sample(false)?;
        }
        Ok(self.state.statistics_version.load(Relaxed))
    }
    /// Counts rows and samples every index anew, and keeps what it finds (ANALYZE TABLE).
    pub fn analyze(&self) -> Result<()> {
        let _turn = self.state.sampling.lock();
        self.sample(true)?;
        let statistics = self.state.stored_statistics(&Counts::default()).encode();
        self.store.change(|txn| {
            Ok(txn.put(CATALOGUE, &table_key(Space::Statistics, self.state.id), &statistics)?)
        })
    }
    /// How many entries of an index lie between two ends, about; at least 1.
    pub fn records_in_range(
        &self,
        index: usize,
        low: Option<RangeEnd>,
        high: Option<RangeEnd>,
    ) -> Result<u64> {
        let (mut from, mut to, mut unbounded) = (Vec::new(), Vec::new(), high.is_none());
        if let Some(low) = low {
            self.encode_bound(index, low.tuple, &mut from)?;
            if low.flag == ReadFlag::After && !successor(&mut from) {
                return Ok(1);
            }
        }
        if let Some(high) = high {
            self.encode_bound(index, high.tuple, &mut to)?;
            if high.flag != ReadFlag::Before {
                unbounded = !successor(&mut to);
            }
        }
        if !unbounded && from >= to {
            return Ok(1);
        }
        let to = if unbounded { Bound::Unbounded } else { Bound::Excluded(&to[..]) };
        let estimate = self.store.engine().estimate(self.state.index_tree(index), Bound::Included(&from), to);
        Ok(estimate.entries.min(self.row_count()).max(1))
    }

    fn encode_bound(&self, index: usize, tuple: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let codec = &self.layout.indexes[index];
        let shape = codec
            .encode_tuple(tuple, self.collations(), &mut Vec::new(), out)
            .map_err(|_| MALFORMED_TUPLE)?;
        if codec.unique && shape.full && !shape.null {
            out.truncate(shape.user_end);
        }
        Ok(())
    }

    /// Removes all rows and sets auto-increment back to 1. Takes effect at once, whatever the caller's transaction does later;
    /// the caller holds the table alone (TRUNCATE TABLE).
    pub fn truncate(&self) -> Result<()> {
        let trees = self.store.truncate(&self.path, &self.layout)?;
        self.state.replace_trees(&trees);
        Ok(())
    }

    /// Reserves `count` values of the series `offset + n × increment` (auto_increment_offset, _increment), for
    /// `handler::get_auto_increment`. Returns the first and how many; values are never handed out twice. At the end of the
    /// range the first is `u64::MAX`.
    pub fn reserve_auto_increment(&self, offset: u64, increment: u64, count: u64) -> (u64, u64) {
        let mut reserved = (u64::MAX, 0);
        // The closure never refuses, so there is nothing to learn from the result.
        _ = self.state.next_auto_increment.fetch_update(Relaxed, Relaxed, |next| {
            reserved = series(next, offset, increment, count);
            Some(match reserved {
                (_, 0) => next,
                (first, count) => {
                    first.saturating_add((count - 1).saturating_mul(increment.max(1))).saturating_add(1)
                }
            })
        });
        reserved
    }
    /// The next value it would hand out (HA_STATUS_AUTO, SHOW CREATE TABLE).
    pub fn next_auto_increment(&self) -> u64 {
        self.state.next_auto_increment()
    }
    /// Sets the next value, but never to one in use (ALTER TABLE … AUTO_INCREMENT = n). Durable when it returns.
    pub fn set_auto_increment(&self, next: u64) -> Result<()> {
        let next = next.max(1).max(self.greatest_auto_increment()?.saturating_add(1));
        self.store.change(|txn| {
            self.store.forget_marks(txn, self.state.id)?;
            Ok(txn.put(CATALOGUE, &mark_key(self.state.id, 0), &next.to_le_bytes())?)
        })?;
        self.state.next_auto_increment.store(next, Relaxed);
        Ok(())
    }

    pub(crate) fn collations(&self) -> &dyn Collations {
        self.store.collations()
    }

    pub(crate) fn garbled(&self, what: &str) -> impl Fn(Garbled) -> Error {
        move |_| Error::Corrupt(format!("table {}: {what}", self.path))
    }

    /// Fills counters that a new process does not have, once for each table and process.
    pub(crate) fn recover_counters(&self) -> Result<()> {
        let mut recovered = self.state.recovered.lock();
        if !*recovered {
            self.fill_counters()?;
            *recovered = true;
        }
        Ok(())
    }

    /// The secondary index with the fewest bytes of entries; `None`: the rows have fewer.
    pub(crate) fn smallest_index(&self) -> Option<usize> {
        let bytes = |tree| self.store.engine().estimate(tree, Bound::Unbounded, Bound::Unbounded).bytes;
        let secondary =
            (0..self.layout.indexes.len()).filter(|index| self.layout.descriptor.primary != Some(*index));
        let (least, index) = secondary.map(|index| (bytes(self.state.index_tree(index)), index)).min()?;
        (least < bytes(self.state.primary_tree())).then_some(index)
    }

    fn fill_counters(&self) -> Result<()> {
        let mut txn = self.store.engine().begin();
        let mut cursor = Cursor::new(self.store.engine());
        let stored = txn.get(
            CATALOGUE,
            &table_key(Space::Statistics, self.state.id),
            ReadAs::Newest,
            StoredStatistics::decode,
        )?;
        let stored = stored.flatten().unwrap_or_default();
        let tree = self.state.primary_tree();
        let estimate = self.store.engine().estimate(tree, Bound::Unbounded, Bound::Unbounded);
        let mut rows = if stored.rows == 0 { estimate.entries } else { stored.rows };
        if rows <= COUNTED_ROWS {
            cursor.open(&mut txn, tree, ReadAs::Newest)?;
            let (mut counted, mut more) = (0, cursor.seek_first(&mut txn)?);
            while more && counted <= COUNTED_ROWS {
                counted += 1;
                more = cursor.next(&mut txn)?;
            }
            rows = if more { rows.max(counted) } else { counted };
        }
        if let Some(bytes) = estimate.bytes.checked_div(estimate.entries) {
            self.state.row_bytes.store(bytes.max(1), Relaxed);
        }
        self.state.set_rows(rows);
        let usable = stored.per_key.len() == self.layout.indexes.len();
        self.state.set_per_key(if usable { stored.per_key } else { Vec::new() }, stored.changed);

        if self.layout.descriptor.primary.is_none() {
            cursor.open(&mut txn, tree, ReadAs::Newest)?;
            if cursor.seek_last(&mut txn)? {
                let last = cursor.key().try_into().map(u64::from_be_bytes);
                let last = last.map_err(|_| Error::Corrupt(format!("table {}: a hidden key", self.path)))?;
                self.state.next_hidden.store(last.saturating_add(1), Relaxed);
            }
        }
        if self.layout.descriptor.auto_increment.is_some() {
            let mut stored = 1;
            self.store.marks(self.state.id, |_, value| {
                let mark = value.try_into().map(u64::from_le_bytes);
                let mark = mark
                    .map_err(|_| Error::Corrupt(format!("table {}: its auto-increment mark", self.path)))?;
                stored = stored.max(mark);
                Ok(())
            })?;
            let next = self.greatest_auto_increment()?.saturating_add(1).max(stored);
            self.state.next_auto_increment.store(next, Relaxed);
        }
        Ok(())
    }

    /// The greatest committed value of the auto-increment column, if an index starts with it; else 0.
    fn greatest_auto_increment(&self) -> Result<u64> {
        let Some(field) = self.layout.descriptor.auto_increment else { return Ok(0) };
        let index = self.layout.indexes.iter().position(|index| index.parts[0].field == field);
        let Some(index) = index else { return Ok(0) };
        let part = &self.layout.indexes[index].parts[0];
        let mut txn = self.store.engine().begin();
        let mut cursor = Cursor::new(self.store.engine());
        cursor.open(&mut txn, self.state.index_tree(index), ReadAs::Newest)?;
        let found =
            if part.descending() { cursor.seek_first(&mut txn)? } else { cursor.seek_last(&mut txn)? };
        Ok(if found { part.decode_unsigned(cursor.key()).unwrap_or(0) } else { 0 })
    }
}

/// The first value of the series at or after `next`, and how many there may be of `count`.
fn series(next: u64, offset: u64, increment: u64, count: u64) -> (u64, u64) {
    let increment = increment.max(1);
    // As documented by the server: an offset greater than the increment is ignored.
    let offset = if offset > increment || offset == 0 { 1 } else { offset };
    let steps = next.saturating_sub(offset).div_ceil(increment);
    match steps.checked_mul(increment).and_then(|past| past.checked_add(offset)) {
        Some(first) if first < u64::MAX => (first, count.max(1).min((u64::MAX - first - 1) / increment + 1)),
        _ => (u64::MAX, 0),
    }
}

pub(crate) const MALFORMED_TUPLE: Error = Error::Malformed("key tuple");
pub(crate) const MALFORMED_RECORD: Error = Error::Malformed("record");

/// The catalogue key of a table.
pub(crate) fn path_key(path: &str) -> Vec<u8> {
    key(Space::Table, path.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::series;

    #[test]
    fn auto_increment_follows_offset_and_increment() {
        assert_eq!(series(1, 1, 1, 3), (1, 3));
        assert_eq!(series(1, 5, 10, 1), (5, 1));
        assert_eq!(series(6, 5, 10, 2), (15, 2));
        assert_eq!(series(15, 5, 10, 1), (15, 1));
        assert_eq!(series(7, 20, 10, 1), (11, 1), "an offset greater than the increment is ignored");
        assert_eq!(series(u64::MAX, 1, 1, 1), (u64::MAX, 0));
        assert_eq!(series(u64::MAX - 1, 1, 1, 5), (u64::MAX - 1, 1));
    }
}
