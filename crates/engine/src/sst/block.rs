//! A decoded block: sorted versions, searched without decoding them.
//!
//! ```text
//! count u32 │ common u16 │ seqno width u8 │ 0 │ least seqno u64     16 bytes, little-endian as all numbers here
//! prefixes  count × u64   the eight key bytes after the first `common` ones, as a number that sorts as they do
//! offsets   count × u16   where each record starts, from the first one on
//! records   kind u8 │ key length u16 │ seqno − least, in `seqno width` bytes │ full key │ value up to the next record
//! ```
//! * `common` bytes begin every key of the block; a shorter rest of a key is padded with zeroes in its prefix.
//! * Order: full key ascending, then seqno descending.
//! * What [`Block::decode`] accepted can be walked and searched without a check failing.

use std::cmp::Ordering;

use crate::{Error, OpKind, Result, Seqno};

const HEADER_BYTES: usize = 16;
/// Kind and key length.
const RECORD_HEADER_BYTES: usize = 3;
/// What a row costs beyond its key and value, when its seqno takes eight bytes.
const ROW_BYTES: usize = 8 + 2 + RECORD_HEADER_BYTES + 8;

/// A block in memory. Immutable.
pub(crate) struct Block {
    bytes: Box<[u8]>,
    least_seqno: u64,
    rows: u32,
    records_at: u32,
    common: u16,
    seqno_width: u8,
}

/// Where the parts of a version lie in its block. The value starts where the key ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    key_start: u32,
    key_end: u32,
    value_end: u32,
    pub(crate) kind: OpKind,
    pub(crate) seqno: Seqno,
}

impl Row {
    /// What an iterator holds before its first seek.
    pub(crate) const NOWHERE: Self =
        Self { key_start: 0, key_end: 0, value_end: 0, kind: OpKind::Delete, seqno: Seqno(0) };
}

impl Block {
    /// Takes a decoded payload, checks that every row lies within it, and keeps it.
    pub(crate) fn decode(bytes: Vec<u8>) -> Result<Self> {
        match Self::checked(bytes.into_boxed_slice()) {
            Some(block) => Ok(block),
            None => Err(Error::corrupt("a block whose rows do not add up")),
        }
    }

    fn checked(bytes: Box<[u8]>) -> Option<Self> {
        let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let rows = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let common = u16::from_le_bytes([header[4], header[5]]);
        let seqno_width = header[6];
        let least_seqno = u64::from_le_bytes(header[8..].try_into().ok()?);
        let arrays = (rows as usize).checked_mul(10)?;
        if rows == 0 || arrays > rest.len() || !matches!(seqno_width, 0 | 1 | 2 | 4 | 8) {
            return None;
        }
        let records_at = u32::try_from(HEADER_BYTES + arrays).ok()?;
        u32::try_from(bytes.len()).ok()?;
        let block = Self { bytes, least_seqno, rows, records_at, common, seqno_width };
        block.rows_are_sound().then_some(block)
    }

    fn rows_are_sound(&self) -> bool {
        let header = RECORD_HEADER_BYTES + usize::from(self.seqno_width);
        let records = &self.bytes[self.records_at as usize..];
        let (offsets, _) = self.bytes[self.offsets_at()..self.records_at as usize].as_chunks::<2>();
        let mut end = records.len();
        for offset in offsets.iter().rev() {
            let start = usize::from(u16::from_le_bytes(*offset));
            let Some(record) = records.get(start..end) else { return false };
            if record.len() < header || OpKind::from_tag(record[0]).is_none() {
                return false;
            }
            let key_bytes = u16::from_le_bytes([record[1], record[2]]);
            if key_bytes < self.common || header + usize::from(key_bytes) > record.len() {
                return false;
            }
            end = start;
        }
        end == 0
    }

    /// The same with `seqno` for all versions. They were written without one: as 0, which takes no bytes in a row.
    pub(crate) fn committed_at(mut self, seqno: Seqno) -> Result<Self> {
        if self.seqno_width != 0 || self.least_seqno != 0 {
            return Err(Error::corrupt("a block of a load that has seqnos of its own"));
        }
        self.least_seqno = seqno.0;
        Ok(self)
    }

    /// Versions in it; at least one.
    #[inline]
    pub(crate) fn rows(&self) -> usize {
        self.rows as usize
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len() + size_of::<Self>()
    }

    /// Where version `row` lies.
    #[inline]
    pub(crate) fn row(&self, row: usize) -> Row {
        let start = self.record_start(row);
        let end = if row + 1 < self.rows() { self.record_start(row + 1) } else { self.bytes.len() };
        let record = &self.bytes[start..end];
        let width = usize::from(self.seqno_width);
        let key_bytes = usize::from(u16::from_le_bytes([record[1], record[2]]));
        let delta = match width {
            0 => 0,
            1 => u64::from(record[3]),
            2 => u64::from(u16::from_le_bytes([record[3], record[4]])),
            4 => u64::from(u32::from_le_bytes([record[3], record[4], record[5], record[6]])),
            _ => u64::from_le_bytes(record[3..11].try_into().expect("eight bytes")),
        };
        let key_start = start + RECORD_HEADER_BYTES + width;
        Row {
            key_start: key_start as u32,
            key_end: (key_start + key_bytes) as u32,
            value_end: end as u32,
            kind: if record[0] == OpKind::Put as u8 { OpKind::Put } else { OpKind::Delete },
            seqno: Seqno(self.least_seqno.wrapping_add(delta)),
        }
    }

    /// Full key of a row of this block.
    #[inline]
    pub(crate) fn key(&self, row: &Row) -> &[u8] {
        &self.bytes[row.key_start as usize..row.key_end as usize]
    }

    /// Value of a row of this block.
    #[inline]
    pub(crate) fn value(&self, row: &Row) -> &[u8] {
        &self.bytes[row.key_end as usize..row.value_end as usize]
    }

    /// Whether a row, which is not the first, is another version of the key of the row before it.
    #[inline]
    pub(crate) fn same_key_as_before(&self, row: usize, at: &Row) -> bool {
        let prefixes = self.prefixes();
        prefixes[row] == prefixes[row - 1] && self.key(at) == self.key(&self.row(row - 1))
    }

    /// The first row at or after (`key`, `seqno`); `rows()` if there is none.
    #[inline]
    pub(crate) fn lower_bound(&self, key: &[u8], seqno: Seqno) -> usize {
        let common = usize::from(self.common);
        if common > 0 {
            let first = self.records_at as usize + RECORD_HEADER_BYTES + usize::from(self.seqno_width);
            let shared = &self.bytes[first..first + common];
            match key.get(..common).unwrap_or(key).cmp(shared) {
                Ordering::Less => return 0,
                Ordering::Greater => return self.rows(),
                Ordering::Equal => (),
            }
        }
        // The search ends in one of the offsets: ask for their memory now, so that it comes while prefixes are compared.
        std::hint::black_box(self.bytes[self.offsets_at() + self.rows()]);
        let rest = &key[common..];
        let wanted = prefix(rest);
        let prefixes = self.prefixes();
        let row = rank(prefixes, wanted);
        if row == prefixes.len()
            || u64::from_le_bytes(prefixes[row]) != wanted
            || self.is_at_or_after(row, key, seqno)
        {
            return row;
        }
        // The prefix does not tell them apart: compare whole keys among the rows that share it.
        let (mut low, mut high) = (row + 1, row + 1 + ties(&prefixes[row + 1..], wanted));
        while low < high {
            let middle = low.midpoint(high);
            if self.is_at_or_after(middle, key, seqno) { high = middle } else { low = middle + 1 }
        }
        low
    }

    #[inline]
    fn is_at_or_after(&self, row: usize, key: &[u8], seqno: Seqno) -> bool {
        let row = self.row(row);
        match self.key(&row).cmp(key) {
            Ordering::Less => false,
            Ordering::Greater => true,
            Ordering::Equal => row.seqno <= seqno,
        }
    }

    #[inline]
    fn prefixes(&self) -> &[[u8; 8]] {
        self.bytes[HEADER_BYTES..self.offsets_at()].as_chunks().0
    }

    #[inline]
    fn offsets_at(&self) -> usize {
        HEADER_BYTES + self.rows() * 8
    }

    #[inline]
    fn record_start(&self, row: usize) -> usize {
        let at = self.offsets_at() + row * 2;
        self.records_at as usize + usize::from(u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]]))
    }
}

/// How many of `prefixes`, which ascend, are less than `wanted`.
///
/// In a block that is cold in the processor's caches a binary search waits for memory at each step. So it only narrows
/// down large arrays; then one prefix of each cache line is looked at, all at once, and then one line.
#[inline]
fn rank(prefixes: &[[u8; 8]], wanted: u64) -> usize {
    let less = |found: &[u8; 8]| usize::from(u64::from_le_bytes(*found) < wanted);
    let mut start = 0;
    let mut rest = prefixes;
    while rest.len() > 16 * LINE {
        let (front, back) = rest.split_at(rest.len() / 2);
        if less(&back[0]) == 1 {
            start += front.len();
            rest = back;
        } else {
            rest = front;
        }
    }
    let lines: usize = rest.iter().skip(LINE - 1).step_by(LINE).map(less).sum();
    let line = rest[lines * LINE..].iter().take(LINE);
    start + lines * LINE + line.map(less).sum::<usize>()
}

/// Prefixes in a cache line.
const LINE: usize = 8;

/// How many of `prefixes` at its front equal `wanted`. Mostly none or a few: look nearby first.
#[inline]
fn ties(prefixes: &[[u8; 8]], wanted: u64) -> usize {
    let near = prefixes.iter().take(4).take_while(|found| u64::from_le_bytes(**found) == wanted).count();
    if near < 4 { near } else { prefixes.partition_point(|found| u64::from_le_bytes(*found) <= wanted) }
}

/// The first eight bytes as a number that sorts as they do.
#[inline]
fn prefix(bytes: &[u8]) -> u64 {
    match bytes.first_chunk::<8>() {
        Some(chunk) => u64::from_be_bytes(*chunk),
        None => {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            u64::from_be_bytes(padded)
        }
    }
}

/// Collects versions in order and lays them out as one block.
#[derive(Default)]
pub(crate) struct BlockBuilder {
    rows: Vec<PendingRow>,
    /// Keys and values, one after the other.
    bytes: Vec<u8>,
}

struct PendingRow {
    start: usize,
    key_bytes: u16,
    kind: OpKind,
    seqno: u64,
}

impl BlockBuilder {
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// About the length that `finish` would write; never less than it.
    pub(crate) fn estimated_bytes(&self) -> usize {
        HEADER_BYTES + self.rows.len() * ROW_BYTES + self.bytes.len()
    }

    /// What adding a version would do to [`Self::estimated_bytes`].
    pub(crate) fn cost_of(key: &[u8], value: &[u8]) -> usize {
        ROW_BYTES + key.len() + value.len()
    }

    /// The caller keeps the order.
    pub(crate) fn add(&mut self, key: &[u8], seqno: Seqno, kind: OpKind, value: &[u8]) {
        let key_bytes = u16::try_from(key.len()).expect("the builder refuses longer keys");
        self.rows.push(PendingRow { start: self.bytes.len(), key_bytes, kind, seqno: seqno.0 });
        self.bytes.extend_from_slice(key);
        self.bytes.extend_from_slice(value);
    }

    pub(crate) fn first_key(&self) -> Option<&[u8]> {
        self.rows.first().map(|row| self.key(row))
    }

    pub(crate) fn last_key(&self) -> Option<&[u8]> {
        self.rows.last().map(|row| self.key(row))
    }

    /// Lays the block out in `out`, which is cleared first, and starts anew.
    pub(crate) fn finish(&mut self, out: &mut Vec<u8>) {
        let (Some(first), Some(last)) = (self.first_key(), self.last_key()) else {
            panic!("a block holds at least one version");
        };
        let common = first.iter().zip(last).take_while(|(a, b)| a == b).count();
        let seqnos = || self.rows.iter().map(|row| row.seqno);
        let least = seqnos().min().unwrap_or(0);
        let width = width_of(seqnos().max().unwrap_or(0) - least);
        out.clear();
        out.reserve(self.estimated_bytes());
        out.extend_from_slice(&(self.rows.len() as u32).to_le_bytes());
        out.extend_from_slice(&(common as u16).to_le_bytes());
        out.extend_from_slice(&[width as u8, 0]);
        out.extend_from_slice(&least.to_le_bytes());
        for row in &self.rows {
            out.extend_from_slice(&prefix(&self.key(row)[common..]).to_le_bytes());
        }
        for (number, row) in self.rows.iter().enumerate() {
            let offset = row.start + number * (RECORD_HEADER_BYTES + width);
            out.extend_from_slice(
                &u16::try_from(offset).expect("blocks of several rows are cut early").to_le_bytes(),
            );
        }
        for (number, row) in self.rows.iter().enumerate() {
            let end = self.rows.get(number + 1).map_or(self.bytes.len(), |next| next.start);
            out.push(row.kind as u8);
            out.extend_from_slice(&row.key_bytes.to_le_bytes());
            out.extend_from_slice(&(row.seqno - least).to_le_bytes()[..width]);
            out.extend_from_slice(&self.bytes[row.start..end]);
        }
        self.rows.clear();
        self.bytes.clear();
    }

    fn key(&self, row: &PendingRow) -> &[u8] {
        &self.bytes[row.start..row.start + usize::from(row.key_bytes)]
    }
}

/// Bytes that hold `delta`: 0, 1, 2, 4 or 8.
fn width_of(delta: u64) -> usize {
    match delta {
        0 => 0,
        1..=0xff => 1,
        0x100..=0xffff => 2,
        0x1_0000..=0xffff_ffff => 4,
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Version = (Vec<u8>, u64, bool, Vec<u8>);

    /// Sorted as in a block, one for each key and seqno.
    fn sorted(mut versions: Vec<Version>) -> Vec<Version> {
        versions.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        versions.dedup_by(|a, b| a.0 == b.0 && a.1 == b.1);
        versions
    }

    fn encoded(versions: &[Version]) -> Vec<u8> {
        let mut builder = BlockBuilder::default();
        for (key, seqno, put, value) in versions {
            builder.add(key, Seqno(*seqno), if *put { OpKind::Put } else { OpKind::Delete }, value);
        }
        let estimate = builder.estimated_bytes();
        let mut out = Vec::new();
        builder.finish(&mut out);
        assert!(out.len() <= estimate, "{} > {estimate}", out.len());
        out
    }

    fn versions() -> impl Strategy<Value = Vec<Version>> {
        // Few letters and long shared heads, so that prefixes tie and keys begin each other.
        let key = (0..3usize, prop::collection::vec(prop::sample::select(vec![0u8, 1, 255]), 0..12))
            .prop_map(|(heads, tail)| [&b"0000head"[..heads * 4], &tail].concat());
        let seqno = prop_oneof![0..4u64, Just(300), Just(70_000), Just(1 << 40), Just(u64::MAX)];
        let version = (key, seqno, any::<bool>(), prop::collection::vec(any::<u8>(), 0..20));
        prop::collection::vec(version, 1..60).prop_map(sorted)
    }

    proptest! {
        #[test]
        fn every_row_comes_back_and_every_search_agrees_with_a_sorted_list(
            rows in versions(), probes in versions()
        ) {
            let block = Block::decode(encoded(&rows)).unwrap();
            prop_assert_eq!(block.rows(), rows.len());
            for (number, (key, seqno, put, value)) in rows.iter().enumerate() {
                let row = block.row(number);
                prop_assert_eq!(block.key(&row), &key[..]);
                prop_assert_eq!(block.value(&row), &value[..]);
                prop_assert_eq!(row.seqno, Seqno(*seqno));
                prop_assert_eq!(row.kind == OpKind::Put, *put);
            }
            for (key, seqno, ..) in rows.iter().chain(&probes) {
                let before = |row: &Version| (&row.0, std::cmp::Reverse(row.1)) < (key, std::cmp::Reverse(*seqno));
                prop_assert_eq!(block.lower_bound(key, Seqno(*seqno)), rows.partition_point(before));
            }
        }

        #[test]
        fn damaged_blocks_are_refused_or_walked_without_a_panic(
            rows in versions(), damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in any::<prop::sample::Index>()
        ) {
            let mut bytes = encoded(&rows);
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let whole = bytes.clone();
            bytes.truncate(cut.index(bytes.len() + 1));
            for bytes in [whole, bytes] {
                let Ok(block) = Block::decode(bytes) else { continue };
                for number in 0..block.rows() {
                    let row = block.row(number);
                    let key = block.key(&row).to_vec();
                    prop_assert!(block.lower_bound(&key, row.seqno) <= block.rows());
                    prop_assert!(block.lower_bound(&[], row.seqno) <= block.rows());
                    prop_assert!(block.value(&row).len() <= block.bytes());
                }
            }
        }
    }

    #[test]
    fn one_large_row_is_a_block() {
        let rows = [(b"key".to_vec(), 5, true, vec![7; 1 << 20])];
        let block = Block::decode(encoded(&rows)).unwrap();
        assert_eq!(block.value(&block.row(0)).len(), 1 << 20);
    }
}
