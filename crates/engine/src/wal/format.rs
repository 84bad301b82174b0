//! The bytes of the wal: records, segment files, slices. `docs/formats/wal.md` draws them.
//!
//! * A record's header checksum covers where it stands (branch, epoch, position), so bytes of another place, another
//!   wal or a recycled file are never taken for it.
//! * Each record says how far the wal was durable when it was begun. A gap before such a place is damage, not a torn
//!   tail.
//! * Decoders take any bytes and answer with an error or `None`, never with a panic.

use crate::{BranchId, Epoch, Error, OpKind, Result, Seqno, SstId, TreeId, WalPosition};

/// Bytes before a record's payload.
pub(crate) const RECORD_HEADER: usize = 32;
/// Bytes before the records of a segment file or of a slice.
pub(crate) const FILE_HEADER: usize = 64;
/// Longest payload: a length beyond it is damage.
pub(crate) const PAYLOAD_BYTES_MAX: usize = 1 << 30;

const SEGMENT_MAGIC: [u8; 8] = *b"CISTWAL\n";
const SLICE_MAGIC: [u8; 8] = *b"CISTSLC\n";
const VERSION: u32 = 1;

/// Set on a record whose writer gave up: its payload means nothing.
const FLAG_VOID: u8 = 1;

/// Which wal a byte belongs to.
#[derive(Clone)]
pub struct Stream {
    pub(crate) branch: BranchId,
    pub(crate) epoch: Epoch,
    seed: crc32fast::Hasher,
}

/// A record's header, found to be whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub(crate) payload_bytes: usize,
    pub(crate) seqno: Seqno,
    pub(crate) durable: WalPosition,
    pub(crate) void: bool,
    payload_crc: u32,
}

impl Stream {
    /// The wal of `epoch` in `branch`.
    pub fn new(branch: BranchId, epoch: Epoch) -> Self {
        let mut seed = crc32fast::Hasher::new();
        seed.update(&branch.0);
        seed.update(&epoch.0.to_le_bytes());
        Self { branch, epoch, seed }
    }

    /// Writes the header of a record that starts at `position` into its first bytes; the payload is already there.
    pub(crate) fn seal(&self, record: &mut [u8], position: u64, seqno: Seqno, durable: u64, void: bool) {
        let (header, payload) = record.split_at_mut(RECORD_HEADER);
        let length = u32::try_from(payload.len()).expect("reserve checked the length");
        header[4..8].copy_from_slice(&length.to_le_bytes());
        header[8..16].copy_from_slice(&seqno.0.to_le_bytes());
        header[16..24].copy_from_slice(&durable.to_le_bytes());
        header[24..28].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
        header[28..32].copy_from_slice(&[if void { FLAG_VOID } else { 0 }, 0, 0, 0]);
        let crc = self.header_crc(position, header);
        header[..4].copy_from_slice(&crc.to_le_bytes());
    }

    /// The header in the first bytes of `bytes`, if it is one that was written for `position`.
    pub(crate) fn parse_header(&self, position: u64, bytes: &[u8]) -> Option<RecordHeader> {
        let header = bytes.get(..RECORD_HEADER)?;
        let payload_bytes = u32_at(header, 4) as usize;
        if payload_bytes > PAYLOAD_BYTES_MAX || self.header_crc(position, header) != u32_at(header, 0) {
            return None;
        }
        Some(RecordHeader {
            payload_bytes,
            seqno: Seqno(u64_at(header, 8)),
            durable: WalPosition(u64_at(header, 16)),
            void: header[28] & FLAG_VOID != 0,
            payload_crc: u32_at(header, 24),
        })
    }

    fn header_crc(&self, position: u64, header: &[u8]) -> u32 {
        let mut crc = self.seed.clone();
        crc.update(&position.to_le_bytes());
        crc.update(&header[4..RECORD_HEADER]);
        crc.finalize()
    }

    pub(crate) fn segment_header(&self, first: WalPosition, bytes: u64) -> [u8; FILE_HEADER] {
        self.file_header(SEGMENT_MAGIC, first, bytes, 0)
    }

    /// The object of a slice: `records` are whole records, the first of them at `first`.
    pub(crate) fn encode_slice(&self, first: WalPosition, records: &[u8]) -> Vec<u8> {
        let header = self.file_header(SLICE_MAGIC, first, records.len() as u64, crc32fast::hash(records));
        [header.as_slice(), records].concat()
    }

    /// The records of the slice `object`, which must be the one of this wal that starts at `first`. `name` is for the
    /// error.
    pub(crate) fn decode_slice<'a>(
        &self,
        object: &'a [u8],
        first: WalPosition,
        name: &str,
    ) -> Result<&'a [u8]> {
        let header = FileHeader::parse(object, SLICE_MAGIC, name)?;
        if (header.branch, header.epoch, header.first) != (self.branch, self.epoch, first) {
            return Err(Error::corrupt(format!("{name} holds a wal slice of another place")));
        }
        let records = &object[FILE_HEADER..];
        if records.len() as u64 != header.bytes || crc32fast::hash(records) != header.body_crc {
            return Err(Error::corrupt(format!(
                "{name}: the wal slice is cut short or its checksum is wrong"
            )));
        }
        Ok(records)
    }

    fn file_header(
        &self,
        magic: [u8; 8],
        first: WalPosition,
        bytes: u64,
        body_crc: u32,
    ) -> [u8; FILE_HEADER] {
        let mut header = [0; FILE_HEADER];
        header[..8].copy_from_slice(&magic);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..32].copy_from_slice(&self.branch.0);
        header[32..40].copy_from_slice(&self.epoch.0.to_le_bytes());
        header[40..48].copy_from_slice(&first.0.to_le_bytes());
        header[48..56].copy_from_slice(&bytes.to_le_bytes());
        header[56..60].copy_from_slice(&body_crc.to_le_bytes());
        let crc = crc32fast::hash(&header[..60]);
        header[60..].copy_from_slice(&crc.to_le_bytes());
        header
    }
}

impl RecordHeader {
    /// Whether `payload` is what the header was written for.
    pub(crate) fn matches(&self, payload: &[u8]) -> bool {
        payload.len() == self.payload_bytes && crc32fast::hash(payload) == self.payload_crc
    }
}

/// What stands before the records of a segment file or a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileHeader {
    pub(crate) branch: BranchId,
    pub(crate) epoch: Epoch,
    pub(crate) first: WalPosition,
    pub(crate) bytes: u64,
    body_crc: u32,
}

impl FileHeader {
    pub(crate) fn parse_segment(bytes: &[u8], name: &str) -> Result<Self> {
        Self::parse(bytes, SEGMENT_MAGIC, name)
    }

    pub(crate) fn parse_slice(bytes: &[u8], name: &str) -> Result<Self> {
        Self::parse(bytes, SLICE_MAGIC, name)
    }

    fn parse(bytes: &[u8], magic: [u8; 8], name: &str) -> Result<Self> {
        let damaged = || Error::corrupt(format!("{name}: the wal header is damaged"));
        let header = bytes.get(..FILE_HEADER).ok_or_else(damaged)?;
        if header[..8] != magic || crc32fast::hash(&header[..60]) != u32_at(header, 60) {
            return Err(damaged());
        }
        let version = u32_at(header, 8);
        if version != VERSION {
            let message =
                format!("{name} has wal format version {version}; this program reads version {VERSION}");
            return Err(Error::new(crate::Kind::BadRequest, message));
        }
        Ok(Self {
            branch: BranchId(header[16..32].try_into().expect("16 bytes")),
            epoch: Epoch(u64_at(header, 32)),
            first: WalPosition(u64_at(header, 40)),
            bytes: u64_at(header, 48),
            body_crc: u32_at(header, 56),
        })
    }
}

/// One change of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op<'a> {
    /// The full key has this value.
    Put(&'a [u8], &'a [u8]),
    /// The full key is gone.
    Delete(&'a [u8]),
    /// All keys of the tree are gone, and it will never be written again.
    DropTree(TreeId),
    /// An sst in the bucket holds puts of one tree, which count as made by this record.
    Load(LoadedSst<'a>),
}

/// An sst as a record names it. It was written before the record had a seqno: its bytes say 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedSst<'a> {
    /// Its name.
    pub id: SstId,
    /// Length of the object.
    pub bytes: u64,
    /// Versions in it, all of them puts.
    pub entries: u64,
    /// Full key of its first version.
    pub first_key: &'a [u8],
    /// Full key of its last version.
    pub last_key: &'a [u8],
}

const TAG_DROP_TREE: u8 = 3;
const TAG_LOAD: u8 = 4;

impl Op<'_> {
    /// Bytes that it takes in a record's payload.
    pub fn encoded_len(&self) -> usize {
        match self {
            Self::Put(key, value) => {
                1 + length_len(key.len()) + length_len(value.len()) + key.len() + value.len()
            }
            Self::Delete(key) => 1 + length_len(key.len()) + key.len(),
            Self::DropTree(_) => 5,
            Self::Load(sst) => {
                let keys = [sst.first_key, sst.last_key];
                1 + 4 * 8 + keys.map(|key| length_len(key.len()) + key.len()).iter().sum::<usize>()
            }
        }
    }

    /// Writes it at the start of `out`, which is long enough, and returns how long it is.
    pub(crate) fn encode(&self, out: &mut [u8]) -> usize {
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        match self {
            Self::Put(key, value) => {
                put(&[OpKind::Put as u8]);
                put_length(key.len(), &mut put);
                put_length(value.len(), &mut put);
                put(key);
                put(value);
            }
            Self::Delete(key) => {
                put(&[OpKind::Delete as u8]);
                put_length(key.len(), &mut put);
                put(key);
            }
            Self::DropTree(tree) => {
                put(&[TAG_DROP_TREE]);
                put(&tree.0.to_be_bytes());
            }
            Self::Load(sst) => {
                put(&[TAG_LOAD]);
                for number in [sst.id.epoch.0, sst.id.counter, sst.bytes, sst.entries] {
                    put(&number.to_le_bytes());
                }
                for key in [sst.first_key, sst.last_key] {
                    put_length(key.len(), &mut put);
                    put(key);
                }
            }
        }
        at
    }
}

/// The changes in a payload, in the order in which they were made. Ends after the first error.
#[derive(Clone, Debug)]
pub struct Ops<'a> {
    rest: &'a [u8],
}

impl<'a> Ops<'a> {
    pub(crate) fn new(payload: &'a [u8]) -> Self {
        Self { rest: payload }
    }

    fn decode(&mut self) -> Option<Op<'a>> {
        match *self.take(1)?.first()? {
            TAG_DROP_TREE => Some(Op::DropTree(TreeId(u32::from_be_bytes(self.take(4)?.try_into().ok()?)))),
            TAG_LOAD => self.load().map(Op::Load),
            tag => match OpKind::from_tag(tag)? {
                OpKind::Put => {
                    let (key_len, value_len) = (self.length()?, self.length()?);
                    Some(Op::Put(self.key(key_len)?, self.take(value_len)?))
                }
                OpKind::Delete => {
                    let key_len = self.length()?;
                    Some(Op::Delete(self.key(key_len)?))
                }
            },
        }
    }

    fn load(&mut self) -> Option<LoadedSst<'a>> {
        let id = SstId { epoch: Epoch(self.number()?), counter: self.number()? };
        let (bytes, entries) = (self.number()?, self.number()?);
        let mut key = || {
            let length = self.length()?;
            self.key(length)
        };
        let (first_key, last_key) = (key()?, key()?);
        let sound = first_key[..4] == last_key[..4] && first_key <= last_key && entries > 0;
        sound.then_some(LoadedSst { id, bytes, entries, first_key, last_key })
    }

    fn number(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn key(&mut self, length: usize) -> Option<&'a [u8]> {
        // Shorter than a tree id is no full key.
        if length < 4 { None } else { self.take(length) }
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(taken)
    }

    fn length(&mut self) -> Option<usize> {
        let mut value = 0;
        for shift in (0..35).step_by(7) {
            let byte = *self.take(1)?.first()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return usize::try_from(value).ok().filter(|value| *value <= PAYLOAD_BYTES_MAX);
            }
        }
        None
    }
}

impl<'a> Iterator for Ops<'a> {
    type Item = Result<Op<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let op = self.decode();
        if op.is_none() {
            self.rest = &[];
        }
        // The checksum was right, so this was written wrongly or by a newer program.
        Some(op.ok_or_else(|| Error::corrupt("a wal record holds a change that this program does not know")))
    }
}

fn length_len(length: usize) -> usize {
    (usize::BITS - (length | 1).leading_zeros()).div_ceil(7) as usize
}

fn put_length(mut length: usize, put: &mut impl FnMut(&[u8])) {
    while length >= 0x80 {
        put(&[(length & 0x7f) as u8 | 0x80]);
        length >>= 7;
    }
    put(&[length as u8]);
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Kind;

    fn stream() -> Stream {
        Stream::new(BranchId([7; 16]), Epoch(3))
    }

    fn payload(ops: &[Op<'_>]) -> Vec<u8> {
        let mut out = vec![0; ops.iter().map(Op::encoded_len).sum()];
        let mut at = 0;
        for op in ops {
            let length = op.encode(&mut out[at..]);
            assert_eq!(length, op.encoded_len());
            at += length;
        }
        out
    }

    fn record(position: u64, payload: &[u8]) -> Vec<u8> {
        let mut record = vec![0; RECORD_HEADER];
        record.extend_from_slice(payload);
        stream().seal(&mut record, position, Seqno(5), 17, false);
        record
    }

    #[test]
    fn changes_come_back_as_they_were_written() {
        let long = vec![b'v'; 40_000];
        let far = [&b"\0\0\0\x05"[..], &long[..300]].concat();
        let ops = [
            Op::Put(b"\0\0\0\x01key", b""),
            Op::Put(&long[..129], &long),
            Op::Delete(b"\0\0\0\x02"),
            Op::DropTree(TreeId(0x0102_0304)),
            load(b"\0\0\0\x05", &far),
            load(b"\0\0\0\x05k", b"\0\0\0\x05k"),
        ];
        let bytes = payload(&ops);
        let decoded: Vec<_> = Ops::new(&bytes).map(Result::unwrap).collect();
        assert_eq!(decoded, ops);
    }

    fn load<'a>(first_key: &'a [u8], last_key: &'a [u8]) -> Op<'a> {
        let id = SstId { epoch: Epoch(3), counter: 1 << 40 };
        Op::Load(LoadedSst { id, bytes: u64::MAX, entries: 1, first_key, last_key })
    }

    /// The bytes are in wals and slices: they stay.
    #[test]
    fn a_load_is_these_bytes() {
        let id = SstId { epoch: Epoch(3), counter: 0x0102 };
        let (first_key, last_key) = (&b"\0\0\0\x05a"[..], &b"\0\0\0\x05bc"[..]);
        let bytes = payload(&[Op::Load(LoadedSst { id, bytes: 4096, entries: 7, first_key, last_key })]);
        let numbers = b"\x03\0\0\0\0\0\0\0\x02\x01\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\x07\0\0\0\0\0\0\0";
        assert_eq!(bytes, [&b"\x04"[..], numbers, b"\x05\0\0\0\x05a", b"\x06\0\0\0\x05bc"].concat());
    }

    #[test]
    fn a_load_over_two_trees_or_the_wrong_way_round_is_refused() {
        for (first, last) in [(&b"\0\0\0\x05a"[..], &b"\0\0\0\x06a"[..]), (b"\0\0\0\x05b", b"\0\0\0\x05a")] {
            let bytes = payload(&[load(first, last)]);
            let error = Ops::new(&bytes).next().expect("there is one").expect_err("unsound");
            assert_eq!(error.kind(), crate::Kind::Corrupt);
        }
    }

    #[test]
    fn a_record_is_one_only_where_it_was_written() {
        let bytes = record(100, b"payload");
        let header = stream().parse_header(100, &bytes).expect("whole");
        assert_eq!((header.seqno, header.durable, header.void), (Seqno(5), WalPosition(17), false));
        assert!(header.matches(b"payload") && !header.matches(b"payloaX") && !header.matches(b"payloa"));
        assert_eq!(stream().parse_header(101, &bytes), None, "another position");
        assert_eq!(Stream::new(BranchId([7; 16]), Epoch(4)).parse_header(100, &bytes), None, "another epoch");
        assert_eq!(
            Stream::new(BranchId([8; 16]), Epoch(3)).parse_header(100, &bytes),
            None,
            "another branch"
        );
    }

    #[test]
    fn a_slice_of_another_place_or_version_is_refused_by_name() {
        let records = record(64, b"abc");
        let object = stream().encode_slice(WalPosition(64), &records);
        assert_eq!(stream().decode_slice(&object, WalPosition(64), "s").unwrap(), records);
        let error = stream().decode_slice(&object, WalPosition(65), "the-name").unwrap_err();
        assert!(error.to_string().contains("the-name"), "{error}");
        assert_eq!(
            stream().decode_slice(&object[..object.len() - 1], WalPosition(64), "s").unwrap_err().kind(),
            Kind::Corrupt
        );
        let mut newer = object;
        newer[8] = 9;
        let crc = crc32fast::hash(&newer[..60]);
        newer[60..64].copy_from_slice(&crc.to_le_bytes());
        let error = stream().decode_slice(&newer, WalPosition(64), "s").unwrap_err();
        assert!(error.kind() == Kind::BadRequest && error.to_string().contains("version 9"), "{error}");
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for op in Ops::new(&bytes) {
                let _known = op.is_ok();
            }
            prop_assert_eq!(stream().parse_header(0, &bytes), None);
            prop_assert!(FileHeader::parse_segment(&bytes, "x").is_err());
            prop_assert!(stream().decode_slice(&bytes, WalPosition(0), "x").is_err());
        }

        #[test]
        fn one_flipped_bit_is_noticed(bit in 0usize..(32 + 11) * 8) {
            let mut bytes = record(9, b"hello world");
            bytes[bit / 8] ^= 1 << (bit % 8);
            let whole = stream().parse_header(9, &bytes).is_some_and(|header| header.matches(&bytes[RECORD_HEADER..]));
            prop_assert!(!whole);
        }
    }
}
