//! The bytes and the names of the cache's files (`docs/formats/disk-cache.md`). A cache, so what is unknown is just not there.

use xxhash_rust::xxh3::xxh3_64;

use super::{Place, Queue, read_file};
use crate::disk::{DiskError, DiskFile};
use crate::{Epoch, SstId};

const SEGMENT_MAGIC: [u8; 8] = *b"CISTchk\x01";
pub(super) const HEADER_BYTES: u64 = 40;
const TRAILER_BYTES: u64 = 24;

/// Before each chunk: what it is, for segments that never got their index.
pub(super) fn header(id: SstId, chunk: u32, bytes: u32) -> [u8; HEADER_BYTES as usize] {
    let mut header = [0; HEADER_BYTES as usize];
    header[..8].copy_from_slice(&SEGMENT_MAGIC);
    header[8..16].copy_from_slice(&id.epoch.0.to_le_bytes());
    header[16..24].copy_from_slice(&id.counter.to_le_bytes());
    header[24..28].copy_from_slice(&chunk.to_le_bytes());
    header[28..32].copy_from_slice(&bytes.to_le_bytes());
    let checksum = xxh3_64(&header[..32]);
    header[32..].copy_from_slice(&checksum.to_le_bytes());
    header
}

/// Where a chunk is in its segment.
pub(super) struct SegmentEntry {
    pub(super) id: SstId,
    pub(super) chunk: u32,
    pub(super) bytes: u32,
    pub(super) offset: u64,
}

impl SegmentEntry {
    const BYTES: usize = 32;

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.epoch.0.to_le_bytes());
        out.extend_from_slice(&self.id.counter.to_le_bytes());
        out.extend_from_slice(&self.chunk.to_le_bytes());
        out.extend_from_slice(&self.bytes.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
    }

    fn decode(entry: &[u8; Self::BYTES]) -> Self {
        let long = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().expect("eight bytes"));
        let short = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("four bytes"));
        let id = SstId { epoch: Epoch(long(0)), counter: long(8) };
        Self { id, chunk: short(16), bytes: short(20), offset: long(24) }
    }
}

/// What a segment that is full ends with.
pub(super) fn sealed_index(entries: impl Iterator<Item = SegmentEntry>) -> Vec<u8> {
    let mut index = Vec::new();
    entries.for_each(|entry| entry.encode(&mut index));
    let count = (index.len() / SegmentEntry::BYTES) as u64;
    index.extend_from_slice(&count.to_le_bytes());
    let checksum = xxh3_64(&index);
    index.extend_from_slice(&checksum.to_le_bytes());
    index.extend_from_slice(&SEGMENT_MAGIC);
    index
}

/// What a segment of an earlier life holds: from its index, or header by header if it never got one.
pub(super) fn read_segment_index(
    file: &dyn DiskFile,
    length: u64,
) -> std::result::Result<Vec<SegmentEntry>, DiskError> {
    let entries = match read_sealed_index(file, length)? {
        Some(entries) => entries,
        None => read_headers(file, length)?,
    };
    let sound =
        |entry: &SegmentEntry| entry.offset.checked_add(entry.bytes.into()).is_some_and(|end| end <= length);
    Ok(entries.into_iter().filter(sound).collect())
}

fn read_sealed_index(
    file: &dyn DiskFile,
    length: u64,
) -> std::result::Result<Option<Vec<SegmentEntry>>, DiskError> {
    let Some(trailer_at) = length.checked_sub(TRAILER_BYTES) else { return Ok(None) };
    let trailer = read_file(file, trailer_at..length)?;
    let (count, _) = trailer.split_first_chunk().expect("a trailer is 24 bytes");
    let index_at = u64::from_le_bytes(*count)
        .checked_mul(SegmentEntry::BYTES as u64)
        .and_then(|bytes| trailer_at.checked_sub(bytes));
    let (Some(index_at), true) = (index_at, trailer[16..] == SEGMENT_MAGIC) else { return Ok(None) };
    let index = read_file(file, index_at..trailer_at + 8)?;
    if xxh3_64(&index).to_le_bytes() != trailer[8..16] {
        return Ok(None);
    }
    Ok(Some(index.as_chunks().0.iter().map(SegmentEntry::decode).collect()))
}

fn read_headers(file: &dyn DiskFile, length: u64) -> std::result::Result<Vec<SegmentEntry>, DiskError> {
    let (mut entries, mut at) = (Vec::new(), 0);
    while at + HEADER_BYTES <= length {
        let found = read_file(file, at..at + HEADER_BYTES)?;
        let long = |at: usize| u64::from_le_bytes(found[at..at + 8].try_into().expect("eight bytes"));
        let short = |at: usize| u32::from_le_bytes(found[at..at + 4].try_into().expect("four bytes"));
        let id = SstId { epoch: Epoch(long(8)), counter: long(16) };
        let (chunk, bytes) = (short(24), short(28));
        if header(id, chunk, bytes)[..] != found[..] {
            break;
        }
        entries.push(SegmentEntry { id, chunk, bytes, offset: at + HEADER_BYTES });
        at += HEADER_BYTES + u64::from(bytes);
    }
    Ok(entries)
}

/// The name of an sst's file in its directory: without a place as long as it is pinned.
pub(super) fn sst_name(id: SstId, place: Option<Place>) -> String {
    let place = place.map(|place| format!("-{}", place_name(place)));
    format!("{:016x}-{:016x}{}", id.epoch.0, id.counter, place.unwrap_or_default())
}

/// Also of an earlier version, which knew no places: the file may have been pinned.
pub(super) fn parse_sst(name: &str) -> Option<(SstId, Option<Place>)> {
    let (epoch, rest) = name.split_once('-')?;
    let (counter, place) = match rest.split_once('-') {
        Some((counter, place)) => (counter, Some(parse_place(place)?)),
        None => (rest, None),
    };
    Some((SstId { epoch: Epoch(parse_hex(epoch)?), counter: parse_hex(counter)? }, place))
}

/// The name of a segment in its directory.
pub(super) fn place_name(place: Place) -> String {
    let queue = match place.queue {
        Queue::Small => "s",
        Queue::Main => "m",
    };
    format!("{queue}{:016x}", place.number)
}

/// Also of an earlier version, which had one queue.
pub(super) fn parse_place(name: &str) -> Option<Place> {
    let (queue, number) = match name.strip_prefix('m') {
        Some(number) => (Queue::Main, number),
        None => (Queue::Small, name.strip_prefix('s').unwrap_or(name)),
    };
    Some(Place { queue, number: parse_hex(number)? })
}

fn parse_hex(digits: &str) -> Option<u64> {
    if digits.len() == 16 { u64::from_str_radix(digits, 16).ok() } else { None }
}
