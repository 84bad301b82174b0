//! The bytes of an sst around its blocks: seals, footer, stamp (`docs/formats/sst.md`).
//!
//! * Every byte of an sst is covered by a checksum, and every checksum is seeded with the sst's id and the place of
//!   the bytes in it: a block of another sst, or of another place, is as wrong as a flipped bit.
//! * Nothing is decoded before its checksum was right.
//! * The last 24 bytes (the stamp) look the same in every format version, so that an unknown one is refused by name.

use std::borrow::Cow;
use std::ops::Range;

use parking_lot::Mutex;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::block::Block;
use crate::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use crate::{Epoch, Error, Kind, Result, SstId};

/// The newest version that this program reads, and the one that it writes.
pub(crate) const VERSION: u32 = 3;
/// Bytes that follow the payload of each block.
pub(crate) const SEAL_BYTES: usize = 16;
/// Footer of versions 1 to 3, stamp included.
pub(crate) const FOOTER_BYTES: usize = 72;
/// The part of the footer that all versions share.
const STAMP_BYTES: usize = 24;
const MAGIC: [u8; 8] = *b"CISTsst\n";
/// No payload is larger once unpacked: one record of the longest key and value, with its bookkeeping.
const PAYLOAD_BYTES_MAX: usize = VALUE_BYTES_MAX + KEY_BYTES_MAX + 4096;
/// Blocks are small and matches few: level 3 takes 1.9 times the instructions and makes source text 3 % smaller, sysbench's rows 5 % larger.
const ZSTD_LEVEL: i32 = 1;

/// What a block holds. Stored: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum BlockKind {
    /// Versions.
    Data = 1,
    /// Separators and handles of data blocks.
    Index = 2,
    /// A blocked Bloom filter over the keys of one index partition.
    Filter = 3,
    /// Separators and handles of index and filter partitions.
    Top = 4,
    /// Counts and key range of the whole sst.
    Summary = 5,
    /// Trees, and a blocked Bloom filter over the first parts of their keys in one index partition.
    FirstParts = 6,
}

/// How a block's payload is packed. Stored: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Compression {
    /// As it is.
    None = 0,
    /// LZ4 block: read, and no longer written.
    Lz4 = 1,
    /// Zstandard frame.
    Zstd = 2,
}

/// Where a sealed block lies in its sst; the seal is part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Handle {
    pub(crate) offset: u64,
    pub(crate) bytes: u32,
}

impl Handle {
    pub(crate) const ENCODED_BYTES: usize = 12;

    pub(crate) fn range(self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.bytes)
    }
    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&self.bytes.to_le_bytes());
    }
    /// Reads a handle from the front of `bytes`.
    #[inline]
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (offset, rest) = bytes.split_first_chunk()?;
        let (bytes, _) = rest.split_first_chunk()?;
        Some(Self { offset: u64::from_le_bytes(*offset), bytes: u32::from_le_bytes(*bytes) })
    }
}

/// Packs and seals blocks one after the other; keeps its compressor between them.
pub(crate) struct Sealer {
    id: SstId,
    compression: Compression,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    scratch: Vec<u8>,
}

impl Sealer {
    pub(crate) fn new(id: SstId, compression: Compression) -> Self {
        assert_ne!(compression, Compression::Lz4, "version {VERSION} does not write it");
        Self { id, compression, zstd: None, scratch: Vec::new() }
    }

    /// Appends `payload` to `out`, packed if that saves an eighth, with its seal; `out` starts at offset 0 of the sst.
    /// `rows`: of a block, what [`BlockBuilder::finish`](super::block::BlockBuilder::finish) said; otherwise 0.
    pub(crate) fn seal(&mut self, out: &mut Vec<u8>, kind: BlockKind, rows: u16, payload: &[u8]) -> Handle {
        assert!(payload.len() <= PAYLOAD_BYTES_MAX, "{}: a block of {} bytes", self.id, payload.len());
        let offset = out.len();
        let packed = self.pack(payload);
        match packed {
            Some(bytes) => out.extend_from_slice(&self.scratch[..bytes]),
            None => out.extend_from_slice(payload),
        }
        let compression = if packed.is_some() { self.compression } else { Compression::None };
        out.extend_from_slice(&[kind as u8, compression as u8]);
        out.extend_from_slice(&rows.to_le_bytes());
        out.extend_from_slice(&narrow(payload.len()).to_le_bytes());
        let checksum = xxh3_64_with_seed(&out[offset..], seed(self.id, offset as u64));
        out.extend_from_slice(&checksum.to_le_bytes());
        Handle { offset: offset as u64, bytes: narrow(out.len() - offset) }
    }

    /// Packs `payload` into the front of `scratch`; `None` if it is not worth the reader's time.
    fn pack(&mut self, payload: &[u8]) -> Option<usize> {
        if self.compression == Compression::None {
            return None;
        }
        if self.zstd.is_none() {
            self.zstd = zstd::bulk::Compressor::new(ZSTD_LEVEL).ok();
        }
        self.scratch.resize(zstd::zstd_safe::compress_bound(payload.len()), 0);
        let bytes = self.zstd.as_mut()?.compress_to_buffer(payload, &mut self.scratch[..]).ok()?;
        (bytes < payload.len() - payload.len() / 8).then_some(bytes)
    }
}

/// Checks the seal of a stored block and returns its rows. `offset` is where `stored` lies in `id`.
pub(crate) fn unseal_block(id: SstId, offset: u64, kind: BlockKind, stored: &[u8]) -> Result<Block> {
    let sealed = check_seal(id, offset, kind, stored)?;
    let wrong = |what: &str| Error::corrupt(format!("{id}: block at {offset}: {what}"));
    let block = match sealed.rows {
        // As versions 1 and 2 wrote them: with everything that a search needs.
        0 => Block::decode(sealed.unpack(0, &wrong)?),
        rows => Block::expand(sealed.unpack(Block::room(rows), &wrong)?, rows),
    };
    block.ok_or_else(|| wrong("its rows do not add up"))
}

/// Checks the seal of what is stored without rows and returns its payload. `offset` is where `stored` lies in `id`.
pub(crate) fn unseal(id: SstId, offset: u64, kind: BlockKind, stored: &[u8]) -> Result<Vec<u8>> {
    let wrong = |what: &str| Error::corrupt(format!("{id}: block at {offset}: {what}"));
    check_seal(id, offset, kind, stored)?.unpack(0, &wrong)
}

/// A payload whose seal was right.
pub(crate) struct Sealed<'a> {
    payload: &'a [u8],
    pub(crate) compression: Compression,
    /// Length of the payload once unpacked.
    bytes: usize,
    /// Rows of a block that is stored without what can be worked out; 0 for all else.
    rows: u16,
}

impl Sealed<'_> {
    /// The payload, after `room` zeroes.
    fn unpack(&self, room: usize, wrong: &dyn Fn(&str) -> Error) -> Result<Vec<u8>> {
        let mut out = vec![0; room + self.bytes];
        let to = &mut out[room..];
        let bytes = match self.compression {
            Compression::None if self.payload.len() == self.bytes => {
                to.copy_from_slice(self.payload);
                self.bytes
            }
            Compression::None => return Err(wrong("length differs from its seal")),
            Compression::Lz4 => lz4_flex::block::decompress_into(self.payload, to)
                .map_err(|error| wrong("LZ4 can not unpack it").with_cause(error))?,
            Compression::Zstd => unpack_zstd(self.payload, to)
                .map_err(|error| wrong("zstd can not unpack it").with_cause(error))?,
        };
        if bytes == self.bytes { Ok(out) } else { Err(wrong("length differs from its seal")) }
    }
}

/// Checks the seal only; returns what it seals.
pub(crate) fn check_seal(id: SstId, offset: u64, kind: BlockKind, stored: &[u8]) -> Result<Sealed<'_>> {
    let wrong = |what: Cow<'static, str>| Err(Error::corrupt(format!("{id}: block at {offset}: {what}")));
    let Some((sealed, checksum)) = stored.split_last_chunk::<8>() else { return wrong("too short".into()) };
    let Some((payload, seal)) = sealed.split_last_chunk::<8>() else { return wrong("too short".into()) };
    if xxh3_64_with_seed(sealed, seed(id, offset)) != u64::from_le_bytes(*checksum) {
        return wrong("wrong checksum".into());
    }
    if seal[0] != kind as u8 {
        return wrong(format!("kind {} where {kind:?} should be", seal[0]).into());
    }
    let compression = match seal[1] {
        0 => Compression::None,
        1 => Compression::Lz4,
        2 => Compression::Zstd,
        other => return wrong(format!("compression {other} is unknown").into()),
    };
    let rows = u16::from_le_bytes([seal[2], seal[3]]);
    let bytes = u32::from_le_bytes([seal[4], seal[5], seal[6], seal[7]]) as usize;
    if bytes > PAYLOAD_BYTES_MAX {
        return wrong(format!("claims {bytes} bytes").into());
    }
    Ok(Sealed { payload, compression, bytes, rows })
}

/// Unpacking contexts are 100 KiB each and slow to make, so a few wait here for whoever needs one.
static ZSTD_IDLE: Mutex<Vec<zstd::bulk::Decompressor<'static>>> = Mutex::new(Vec::new());
const ZSTD_IDLE_MAX: usize = 16;

fn unpack_zstd(payload: &[u8], to: &mut [u8]) -> std::io::Result<usize> {
    let idle = ZSTD_IDLE.lock().pop();
    let mut context = match idle {
        Some(context) => context,
        None => zstd::bulk::Decompressor::new()?,
    };
    let bytes = context.decompress_to_buffer(payload, to);
    let mut waiting = ZSTD_IDLE.lock();
    if waiting.len() < ZSTD_IDLE_MAX {
        waiting.push(context);
    }
    bytes
}

/// What the end of an sst says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) version: u32,
    pub(crate) top: Handle,
    pub(crate) summary: Handle,
}

impl Footer {
    /// Appends the footer of `id`; `out` starts at offset 0 of the sst.
    pub(crate) fn encode(self, id: SstId, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&id.epoch.0.to_le_bytes());
        out.extend_from_slice(&id.counter.to_le_bytes());
        self.top.encode(out);
        self.summary.encode(out);
        let checksum = xxh3_64_with_seed(&out[start..], seed(id, start as u64));
        out.extend_from_slice(&checksum.to_le_bytes());
        let stamp = stamp(self.version);
        out.extend_from_slice(&stamp);
        assert_eq!(out.len() - start, FOOTER_BYTES, "the footer's length is part of the format");
    }

    /// Reads the footer at the end of `tail`, which ends at offset `sst_bytes` of `id`.
    ///
    /// [`Kind::BadRequest`] for a format version that this program does not know, [`Kind::Corrupt`] for the rest.
    pub(crate) fn decode(id: SstId, sst_bytes: u64, tail: &[u8]) -> Result<Self> {
        let wrong = |what: &str| Err(Error::corrupt(format!("{id}: footer: {what}")));
        let Some((before, found)) = tail.split_last_chunk::<STAMP_BYTES>() else { return wrong("too short") };
        let version = u32::from_le_bytes([found[0], found[1], found[2], found[3]]);
        if *found != stamp(version) {
            return wrong("this is not the end of an sst, or it is damaged");
        }
        if !(1..=VERSION).contains(&version) {
            let text =
                format!("{id}: format version {version}; this program knows 1 to {VERSION}, use a newer one");
            return Err(Error::new(Kind::BadRequest, text));
        }
        let Some((_, body)) = before.split_last_chunk::<{ FOOTER_BYTES - STAMP_BYTES }>() else {
            return wrong("too short");
        };
        let (Some((body, checksum)), Some(start)) =
            (body.split_last_chunk::<8>(), sst_bytes.checked_sub(FOOTER_BYTES as u64))
        else {
            return wrong("too short");
        };
        let word = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("eight bytes"));
        let found = SstId { epoch: Epoch(word(0)), counter: word(8) };
        if found != id {
            return wrong(&format!("another object lies under this name: {found}"));
        }
        if xxh3_64_with_seed(body, seed(id, start)) != u64::from_le_bytes(*checksum) {
            return wrong("wrong checksum");
        }
        match (Handle::decode(&body[16..]), Handle::decode(&body[28..])) {
            (Some(top), Some(summary)) => Ok(Self { version, top, summary }),
            _ => wrong("too short"),
        }
    }
}

/// The last bytes of every sst, in every version: version, zero, checksum of the two, magic.
fn stamp(version: u32) -> [u8; STAMP_BYTES] {
    let mut stamp = [0; STAMP_BYTES];
    stamp[..4].copy_from_slice(&version.to_le_bytes());
    let checksum = xxh3_64(&stamp[..8]);
    stamp[8..16].copy_from_slice(&checksum.to_le_bytes());
    stamp[16..].copy_from_slice(&MAGIC);
    stamp
}

/// Ties a checksum to the sst and to the place in it.
fn seed(id: SstId, offset: u64) -> u64 {
    let mut place = [0; 24];
    place[..8].copy_from_slice(&id.epoch.0.to_le_bytes());
    place[8..16].copy_from_slice(&id.counter.to_le_bytes());
    place[16..].copy_from_slice(&offset.to_le_bytes());
    xxh3_64(&place)
}

fn narrow(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("a block is smaller than PAYLOAD_BYTES_MAX")
}

const _: () = assert!(PAYLOAD_BYTES_MAX + SEAL_BYTES < u32::MAX as usize);

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SstId = SstId { epoch: Epoch(3), counter: 9 };

    fn sealed(compression: Compression, payload: &[u8]) -> (Vec<u8>, Handle) {
        let mut out = vec![7; 100]; // a block need not be the first
        let handle = Sealer::new(ID, compression).seal(&mut out, BlockKind::Data, 0, payload);
        assert_eq!(handle.range(), 100..out.len() as u64);
        (out.split_off(100), handle)
    }

    #[test]
    fn a_sealed_block_comes_back_whatever_its_packing() {
        let text = b"the quick brown fox jumps over the lazy dog; ".repeat(50);
        for compression in [Compression::None, Compression::Zstd] {
            for payload in [&text[..], &[], &[1, 2, 3]] {
                let (stored, _) = sealed(compression, payload);
                assert_eq!(unseal(ID, 100, BlockKind::Data, &stored).unwrap(), payload, "{compression:?}");
            }
        }
        assert!(sealed(Compression::Zstd, &text).0.len() < text.len() / 4);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_breaks_the_seal() {
        let (stored, _) = sealed(Compression::Zstd, &b"abcabcabc".repeat(20));
        for bit in 0..stored.len() * 8 {
            let mut damaged = stored.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let error = unseal(ID, 100, BlockKind::Data, &damaged).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "bit {bit}");
        }
        for len in 0..stored.len() {
            let error = unseal(ID, 100, BlockKind::Data, &stored[..len]).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "cut to {len}");
        }
    }

    #[test]
    fn a_block_of_another_sst_place_or_kind_is_refused() {
        let (stored, _) = sealed(Compression::None, b"rows");
        let other = SstId { epoch: Epoch(3), counter: 10 };
        assert!(unseal(ID, 100, BlockKind::Data, &stored).is_ok());
        assert_eq!(unseal(other, 100, BlockKind::Data, &stored).unwrap_err().kind(), Kind::Corrupt);
        assert_eq!(unseal(ID, 101, BlockKind::Data, &stored).unwrap_err().kind(), Kind::Corrupt);
        assert_eq!(unseal(ID, 100, BlockKind::Index, &stored).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn an_unknown_version_is_refused_by_name_and_a_damaged_one_is_corrupt() {
        let footer = Footer {
            version: VERSION,
            top: Handle { offset: 1, bytes: 2 },
            summary: Handle { offset: 3, bytes: 4 },
        };
        let mut bytes = Vec::new();
        footer.encode(ID, &mut bytes);
        assert_eq!(Footer::decode(ID, bytes.len() as u64, &bytes).unwrap(), footer);

        let mut newer = bytes.clone();
        let at = newer.len() - STAMP_BYTES;
        newer[at..].copy_from_slice(&stamp(VERSION + 1));
        let error = Footer::decode(ID, newer.len() as u64, &newer).unwrap_err();
        assert_eq!(error.kind(), Kind::BadRequest);
        assert!(error.to_string().contains("format version 4"), "{error}");

        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let error = Footer::decode(ID, damaged.len() as u64, &damaged).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert_eq!(Footer::decode(ID, len as u64, &bytes[..len]).unwrap_err().kind(), Kind::Corrupt);
        }
    }
}
