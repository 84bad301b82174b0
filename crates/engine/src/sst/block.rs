//! A block: sorted versions, in memory searched without decoding them.
//!
//! ```text
//! count u32 │ common u16 │ seqno width u8 │ 0 │ least seqno u64     16 bytes, little-endian as all numbers here
//! prefixes  count × u64   the eight key bytes after the first `common` ones, as a number that sorts as they do
//! offsets   count × u16   where each record starts, from the first one on
//! records   kind u8 │ key length u16 │ seqno − least, in `seqno width` bytes │ full key │ value up to the next record
//! ```
//! * `common` bytes begin every key of the block; a shorter rest of a key is padded with zeroes in its prefix.
//! * Order: full key ascending, then seqno descending.
//! * What was accepted once can be walked and searched without a check failing.
//! * An sst stores it without prefixes, which repeat keys, and with each record's length in the place of its offset, because lengths
//!   are alike and offsets are not. Both pack badly: rows of 200 bytes come out 5 % smaller, entries of an index by half. (Versions
//!   1 and 2 stored it as above.)

use std::cmp::Ordering;

use crate::{Error, OpKind, Result, Seqno};

const HEADER_BYTES: usize = 16;
const PREFIX_BYTES: usize = 8;
const OFFSET_BYTES: usize = 2;
/// Kind and key length.
const RECORD_HEADER_BYTES: usize = 3;
/// What a row costs beyond its key and value, when its seqno takes eight bytes.
const ROW_BYTES: usize = PREFIX_BYTES + OFFSET_BYTES + RECORD_HEADER_BYTES + 8;

/// A block in memory. Immutable.
pub(crate) struct Block {
    bytes: Box<[u8]>,
    least_seqno: u64,
    rows: u32,
    records_at: u32,
    common: u16,
    seqno_width: u8,
}

/// What a block begins with.
struct Header {
    rows: u32,
    common: u16,
    seqno_width: u8,
    least_seqno: u64,
}

impl Header {
    fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let rows = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let common = u16::from_le_bytes([bytes[4], bytes[5]]);
        let least_seqno = u64::from_le_bytes(bytes[8..].try_into().ok()?);
        let sound = rows > 0 && matches!(bytes[6], 0 | 1 | 2 | 4 | 8);
        sound.then_some(Self { rows, common, seqno_width: bytes[6], least_seqno })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.rows.to_le_bytes());
        out.extend_from_slice(&self.common.to_le_bytes());
        out.extend_from_slice(&[self.seqno_width, 0]);
        out.extend_from_slice(&self.least_seqno.to_le_bytes());
    }
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
    /// Takes a block as it is in memory and checks that every row lies within it.
    pub(crate) fn decode(bytes: Vec<u8>) -> Option<Self> {
        let bytes = bytes.into_boxed_slice();
        let header = Header::decode(bytes.first_chunk()?)?;
        let arrays = (header.rows as usize).checked_mul(PREFIX_BYTES + OFFSET_BYTES)?;
        if arrays > bytes.len() - HEADER_BYTES {
            return None;
        }
        let block = Self::new(header, HEADER_BYTES + arrays, bytes)?;
        block.rows_are_sound().then_some(block)
    }

    /// Bytes that [`Self::expand`] needs before a stored block of `rows` rows.
    pub(crate) fn room(rows: u16) -> usize {
        usize::from(rows) * PREFIX_BYTES
    }

    /// Takes a block of `rows` rows as an sst stores it, after [`Self::room`], checks that every row lies within it, and works out
    /// the rest in place.
    pub(crate) fn expand(bytes: Vec<u8>, rows: u16) -> Option<Self> {
        let mut bytes = bytes.into_boxed_slice();
        let stored = *bytes.get(Self::room(rows)..)?.first_chunk::<HEADER_BYTES>()?;
        let header = Header::decode(&stored)?;
        let records_at = HEADER_BYTES + usize::from(rows) * (PREFIX_BYTES + OFFSET_BYTES);
        if header.rows != u32::from(rows) || records_at > bytes.len() {
            return None;
        }
        bytes[..HEADER_BYTES].copy_from_slice(&stored);
        let (front, records) = bytes.split_at_mut(records_at);
        let (prefixes, lengths) = front[HEADER_BYTES..].split_at_mut(Self::room(rows));
        let (prefixes, lengths) = (prefixes.as_chunks_mut::<PREFIX_BYTES>().0, lengths.as_chunks_mut().0);
        let key_at = RECORD_HEADER_BYTES + usize::from(header.seqno_width);
        let common = usize::from(header.common);
        let last = prefixes.len() - 1;
        let mut start = 0;
        for (row, (prefix_at, length)) in prefixes.iter_mut().zip(lengths).enumerate() {
            let bytes = usize::from(u16::from_le_bytes(*length));
            *length = u16::try_from(start).ok()?.to_le_bytes();
            let record = match row < last {
                true => records.get(start..start + bytes)?,
                // The last one may be longer than a u16 can say.
                false if bytes == 0 => records.get(start..)?,
                false => return None,
            };
            let (head, _) = record.split_first_chunk::<RECORD_HEADER_BYTES>()?;
            OpKind::from_tag(head[0])?;
            let key = record.get(key_at..key_at + usize::from(u16::from_le_bytes([head[1], head[2]])))?;
            *prefix_at = prefix(key.get(common..)?).to_le_bytes();
            start += bytes;
        }
        Self::new(header, records_at, bytes)
    }

    fn new(header: Header, records_at: usize, bytes: Box<[u8]>) -> Option<Self> {
        let Header { rows, common, seqno_width, least_seqno } = header;
        u32::try_from(bytes.len()).ok()?;
        Some(Self { bytes, least_seqno, rows, records_at: records_at as u32, common, seqno_width })
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
        let (offsets, _) = self.bytes[self.offsets_at()..self.records_at as usize].as_chunks::<2>();
        let place = |offset: &[u8; 2]| self.records_at as usize + usize::from(u16::from_le_bytes(*offset));
        let start = place(&offsets[row]);
        let end = offsets.get(row + 1).map_or(self.bytes.len(), place);
        let record = &self.bytes[start..end];
        let width = usize::from(self.seqno_width);
        let (header, rest) = record.split_first_chunk::<RECORD_HEADER_BYTES>().expect("checked");
        let delta = match (width, rest.first_chunk::<8>()) {
            (0, _) => 0,
            // Nearly always there is so much behind it: one load for all widths.
            (_, Some(more)) => u64::from_le_bytes(*more) & (u64::MAX >> (64 - 8 * width)),
            _ => rest[..width].iter().rev().fold(0, |delta, byte| delta << 8 | u64::from(*byte)),
        };
        let key_start = start + RECORD_HEADER_BYTES + width;
        let key_bytes = usize::from(u16::from_le_bytes([header[1], header[2]]));
        Row {
            key_start: key_start as u32,
            key_end: (key_start + key_bytes) as u32,
            value_end: end as u32,
            kind: if header[0] == OpKind::Put as u8 { OpKind::Put } else { OpKind::Delete },
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
    // A sum that is checked for overflow is not unrolled; these are at most the rows of a block.
    let count = |counted: usize, found| counted.wrapping_add(less(found));
    let lines = rest.as_chunks::<LINE>().0.iter().fold(0, |counted, line| count(counted, &line[LINE - 1]));
    let line = rest[lines * LINE..].iter().take(LINE);
    start + lines * LINE + line.fold(0, count)
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

    /// Lays the block out in `out`, which is cleared first, as an sst stores it, and starts anew. Returns its rows.
    pub(crate) fn finish(&mut self, out: &mut Vec<u8>) -> u16 {
        let (Some(first), Some(last)) = (self.first_key(), self.last_key()) else {
            panic!("a block holds at least one version");
        };
        let short = |number: usize| u16::try_from(number).expect("blocks of several rows are cut early");
        let common = short(first.iter().zip(last).take_while(|(a, b)| a == b).count());
        let seqnos = || self.rows.iter().map(|row| row.seqno);
        let least_seqno = seqnos().min().unwrap_or(0);
        let width = width_of(seqnos().max().unwrap_or(0) - least_seqno);
        let rows = short(self.rows.len());
        out.clear();
        out.reserve(self.estimated_bytes());
        Header { rows: u32::from(rows), common, seqno_width: width as u8, least_seqno }.encode(out);
        for pair in self.rows.windows(2) {
            let length = RECORD_HEADER_BYTES + width + pair[1].start - pair[0].start;
            out.extend_from_slice(&short(length).to_le_bytes());
        }
        out.extend_from_slice(&[0; OFFSET_BYTES]);
        for (number, row) in self.rows.iter().enumerate() {
            let end = self.rows.get(number + 1).map_or(self.bytes.len(), |next| next.start);
            out.push(row.kind as u8);
            out.extend_from_slice(&row.key_bytes.to_le_bytes());
            out.extend_from_slice(&(row.seqno - least_seqno).to_le_bytes()[..width]);
            out.extend_from_slice(&self.bytes[row.start..end]);
        }
        self.rows.clear();
        self.bytes.clear();
        rows
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

    /// As stored, after the room that expanding takes.
    fn stored(versions: &[Version]) -> (Vec<u8>, u16) {
        let mut builder = BlockBuilder::default();
        for (key, seqno, put, value) in versions {
            builder.add(key, Seqno(*seqno), if *put { OpKind::Put } else { OpKind::Delete }, value);
        }
        let estimate = builder.estimated_bytes();
        let mut out = Vec::new();
        let rows = builder.finish(&mut out);
        assert!(out.len() + Block::room(rows) <= estimate, "{} > {estimate}", out.len());
        ([vec![0; Block::room(rows)], out].concat(), rows)
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
            let (bytes, count) = stored(&rows);
            let block = Block::expand(bytes, count).unwrap();
            prop_assert_eq!(block.rows(), rows.len());
            prop_assert!(Block::decode(block.bytes.to_vec()).is_some(), "as versions 1 and 2 stored it");
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
            let (stored, count) = stored(&rows);
            let in_memory = Block::expand(stored.clone(), count).unwrap().bytes.into_vec();
            for (mut bytes, expand) in [(stored, true), (in_memory, false)] {
            for (at, byte) in &damage {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            let whole = bytes.clone();
            bytes.truncate(cut.index(bytes.len() + 1));
            for bytes in [whole, bytes] {
                let block = if expand { Block::expand(bytes, count) } else { Block::decode(bytes) };
                let Some(block) = block else { continue };
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
    }

    #[test]
    fn one_large_row_is_a_block() {
        let rows = [(b"key".to_vec(), 5, true, vec![7; 1 << 20])];
        let (bytes, count) = stored(&rows);
        let block = Block::expand(bytes, count).unwrap();
        assert_eq!(block.value(&block.row(0)).len(), 1 << 20);
    }
}
