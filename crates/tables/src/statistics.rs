//! Sampling: how many rows share a value of the first parts of an index.
//!
//! * A small table is read whole. A large one is looked at in a few windows, started at rows spread over the primary key, so that values
//!   which many rows have are met as often as they occur.
//! * Few distinct values are counted exactly, by jumping from each to the next.

use std::ops::Bound;
use std::sync::atomic::Ordering::Relaxed;

use engine::{Cursor, ReadAs, Txn};

use crate::Result;
use crate::catalogue::PER_KEY_SCALE;
use crate::keys::successor;
use crate::rows::Parts;
use crate::table::{COUNTED_ROWS, Table};

const WINDOWS: u64 = 8;
const WINDOW_ENTRIES: usize = 64;
/// Distinct values that are still counted by jumping.
const JUMPS_MAX: u64 = 40;

/// What windows showed of one index: for each number of leading parts, neighbours that differ in them; and all neighbours.
struct Neighbours {
    differ: Vec<u64>,
    pairs: u64,
}

impl Table {
    /// Samples all indexes. The caller holds `sampling`.
    pub(crate) fn sample(&self, exactly: bool) -> Result<()> {
        let mut txn = self.store.engine().begin();
        let mut cursor = Cursor::new(self.store.engine());
        let tree = self.state.primary_tree();
        let changed = self.state.changed();
        let estimate = self.store.engine().estimate(tree, Bound::Unbounded, Bound::Unbounded);
        if exactly || self.state.rows() <= COUNTED_ROWS {
            self.count(&mut txn, &mut cursor)?;
        }
        if let Some(bytes) = estimate.bytes.checked_div(estimate.entries) {
            self.state.row_bytes.store(bytes.max(1), Relaxed);
        }
        let starts = self.spread_rows(&mut txn, &mut cursor)?;
        let mut per_key = Vec::with_capacity(self.layout.indexes.len());
        let mut entry_bytes = 0;
        for index in 0..self.layout.indexes.len() {
            per_key.push(self.sample_index(index, &starts, &mut txn, &mut cursor)?);
            if self.layout.descriptor.primary != Some(index) {
                let tree = self.state.index_tree(index);
                let estimate = self.store.engine().estimate(tree, Bound::Unbounded, Bound::Unbounded);
                entry_bytes += estimate.bytes.checked_div(estimate.entries).unwrap_or(0);
            }
        }
        self.state.index_entry_bytes.store(entry_bytes, Relaxed);
        let since = self.state.changed().saturating_sub(changed);
        self.state.set_per_key(per_key, since);
        Ok(())
    }

    fn count(&self, txn: &mut Txn, cursor: &mut Cursor) -> Result<()> {
        let before = self.state.rows();
        cursor.open(txn, self.state.primary_tree(), ReadAs::Newest)?;
        let (mut rows, mut more) = (0, cursor.seek_first(txn)?);
        while more {
            rows += 1;
            more = cursor.next(txn)?;
        }
        // What was committed while counting would be lost by a plain store; a count that others moved is left to them.
        if self.state.rows() == before {
            self.state.set_rows(rows);
        }
        Ok(())
    }

    /// Primary key and row of some rows, spread over the primary key.
    fn spread_rows(&self, txn: &mut Txn, cursor: &mut Cursor) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut found = Vec::new();
        cursor.open(txn, self.state.primary_tree(), ReadAs::Newest)?;
        if !cursor.seek_last(txn)? {
            return Ok(found);
        }
        let last = cursor.key().to_vec();
        cursor.seek_first(txn)?;
        let first = cursor.key().to_vec();
        for window in 0..WINDOWS {
            if cursor.seek(txn, &between(&first, &last, window, WINDOWS))? {
                found.push((cursor.key().to_vec(), cursor.value().to_vec()));
            }
        }
        Ok(found)
    }

    fn sample_index(
        &self,
        index: usize,
        starts: &[(Vec<u8>, Vec<u8>)],
        txn: &mut Txn,
        cursor: &mut Cursor,
    ) -> Result<Vec<u64>> {
        let (codec, descriptor) = (&self.layout.indexes[index], &self.layout.descriptor);
        let user_parts = codec.parts.len();
        let parts = user_parts + descriptor.indexes[index].extension.len();
        let rows = self.state.rows();
        cursor.open(txn, self.state.index_tree(index), ReadAs::Newest)?;
        let small = rows <= COUNTED_ROWS;
        let mut seen = Neighbours { differ: vec![0; parts], pairs: 0 };
        if small {
            let more = cursor.seek_first(txn)?;
            self.window(index, more, usize::MAX, &mut seen, txn, cursor)?;
        } else {
            for (key, row) in starts {
                let start = self.entry_of(index, key, row)?;
                let more = cursor.seek(txn, &start)?;
                self.window(index, more, WINDOW_ENTRIES, &mut seen, txn, cursor)?;
            }
        }
        let mut per_key = Vec::with_capacity(parts);
        for part in 0..parts {
            let per_value = if codec.unique && part + 1 >= user_parts {
                PER_KEY_SCALE
            } else if small {
                rows * PER_KEY_SCALE / (seen.differ[part] + 1)
            } else {
                match self.jump(index, part, txn, cursor)? {
                    Some(distinct) => rows * PER_KEY_SCALE / distinct.max(1),
                    None if seen.differ[part] > 0 => seen.pairs * PER_KEY_SCALE / seen.differ[part],
                    None => self.group_size(index, part, starts)? * PER_KEY_SCALE,
                }
            };
            per_key.push(per_value.clamp(PER_KEY_SCALE, rows.max(1) * PER_KEY_SCALE));
        }
        Ok(per_key)
    }

    /// Reads entries in order and compares each with the one before.
    fn window(
        &self,
        index: usize,
        mut more: bool,
        entries: usize,
        seen: &mut Neighbours,
        txn: &mut Txn,
        cursor: &mut Cursor,
    ) -> Result<()> {
        let codec = &self.layout.indexes[index];
        let mut before = Vec::new();
        let mut ends = vec![0; seen.differ.len()];
        let mut n = 0;
        while more && n < entries {
            let key = cursor.key();
            if n > 0 {
                seen.pairs += 1;
                let known = codec.part_ends(key, &mut ends).map_err(self.garbled("an index entry"))?;
                for (part, differ) in seen.differ.iter_mut().enumerate() {
                    let end = if part < known { ends[part] } else { key.len() };
                    *differ += u64::from(before.get(..end) != Some(&key[..end]));
                }
            }
            before.clear();
            before.extend_from_slice(key);
            n += 1;
            more = cursor.next(txn)?;
        }
        Ok(())
    }

    /// Counts the distinct values of the first `part + 1` parts, if they are few.
    fn jump(&self, index: usize, part: usize, txn: &mut Txn, cursor: &mut Cursor) -> Result<Option<u64>> {
        let codec = &self.layout.indexes[index];
        let mut ends = vec![0; part + 1];
        let mut more = cursor.seek_first(txn)?;
        let mut distinct = 0;
        while more {
            distinct += 1;
            if distinct > JUMPS_MAX {
                return Ok(None);
            }
            let key = cursor.key();
            let known = codec.part_ends(key, &mut ends).map_err(self.garbled("an index entry"))?;
            let mut next = key[..ends[known - 1]].to_vec();
            more = successor(&mut next) && cursor.seek(txn, &next)?;
        }
        Ok(Some(distinct))
    }

    /// Rows that share the first `part + 1` parts with one of some rows, on average.
    fn group_size(&self, index: usize, part: usize, starts: &[(Vec<u8>, Vec<u8>)]) -> Result<u64> {
        let codec = &self.layout.indexes[index];
        let mut ends = vec![0; part + 1];
        let mut sum = 0;
        for (key, row) in starts {
            let entry = self.entry_of(index, key, row)?;
            let known = codec.part_ends(&entry, &mut ends).map_err(self.garbled("an index entry"))?;
            let low = &entry[..ends[known.max(1) - 1]];
            let mut high = low.to_vec();
            let high = if successor(&mut high) { Bound::Excluded(&high[..]) } else { Bound::Unbounded };
            sum += self
                .store
                .engine()
                .estimate(self.state.index_tree(index), Bound::Included(low), high)
                .entries;
        }
        Ok((sum / starts.len().max(1) as u64).max(1))
    }

    fn entry_of(&self, index: usize, key: &[u8], row: &[u8]) -> Result<Vec<u8>> {
        if self.layout.descriptor.primary == Some(index) {
            return Ok(key.to_vec());
        }
        let (mut parts, mut entry) = (Parts::default(), Vec::new());
        self.layout.rows.parse(row, key, &mut parts).map_err(self.garbled("a row"))?;
        self.layout.indexes[index]
            .entry(
                &|field| Ok(self.layout.rows.value(field, row, &parts)),
                key,
                self.collations(),
                &mut Vec::new(),
                (&mut entry, &mut Vec::new()),
            )
            .map_err(self.garbled("a row"))?;
        Ok(entry)
    }
}

/// The n-th of `of` keys spread evenly between two.
fn between(first: &[u8], last: &[u8], n: u64, of: u64) -> Vec<u8> {
    let common = first.iter().zip(last).take_while(|(a, b)| a == b).count();
    let number = |key: &[u8]| {
        (0..8).fold(0u64, |number, i| number << 8 | u64::from(*key.get(common + i).unwrap_or(&0)))
    };
    let (low, high) = (number(first), number(last));
    let step = (high.saturating_sub(low)) / of;
    let mut key = first[..common].to_vec();
    key.extend_from_slice(&(low + step * n + step / 2).to_be_bytes());
    key
}
