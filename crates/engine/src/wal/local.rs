//! A wal found on the local disk after its writer is gone.
//!
//! * It ends where the next whole record would have to be and is not. That is a torn tail, which nobody was told to be
//!   safe, unless something later proves that this very place was durable once: then it is damage, and an error.
//! * No record is changed here: recovery reads, decides, and may be interrupted and start again.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::format::{FILE_HEADER, FileHeader, Ops, RECORD_HEADER, RecordHeader, Stream, u64_at};
use super::segments::{DIRECTORY, file_name, parse_file_name};
use crate::{BranchId, Disk, DiskFile, Epoch, Error, Result, Seqno, WalPosition};

/// Where wal files go that may hold something that nobody else has and that can't be replayed.
pub(crate) const SET_ASIDE: &str = "set-aside";

/// How much is read at a time.
const WINDOW_BYTES: u64 = 1 << 20;

/// One transaction read back from a wal.
#[derive(Clone, Debug)]
pub(crate) struct Record<'a> {
    /// Where it starts.
    pub position: WalPosition,
    /// Where it ends.
    pub end: WalPosition,
    /// Its place in the order of commits.
    pub seqno: Seqno,
    /// The encoded changes.
    pub payload: &'a [u8],
    /// Its writer gave up; there are no changes.
    pub void: bool,
}

impl<'a> Record<'a> {
    /// Its changes in order.
    pub fn ops(&self) -> Ops<'a> {
        Ops::new(if self.void { &[] } else { self.payload })
    }

    /// The record at the start of `bytes`, which stand at `position`. `None`: there is no whole one.
    pub(crate) fn parse(stream: &Stream, position: u64, bytes: &'a [u8]) -> Option<Self> {
        let header = stream.parse_header(position, bytes)?;
        let payload = bytes.get(RECORD_HEADER..RECORD_HEADER + header.payload_bytes)?;
        header.matches(payload).then(|| Self::new(position, header, payload))
    }

    fn new(position: u64, header: RecordHeader, payload: &'a [u8]) -> Self {
        let end = WalPosition(position + (RECORD_HEADER + payload.len()) as u64);
        Self { position: WalPosition(position), end, seqno: header.seqno, payload, void: header.void }
    }
}

/// The files of one epoch's wal, open for reading.
pub(crate) struct LocalWal {
    /// Whose wal it is; `None` if no file has a whole header, so that none was ever used.
    pub branch: Option<BranchId>,
    pub epoch: Epoch,
    /// By start.
    segments: BTreeMap<u64, Segment>,
}

struct Segment {
    file: Arc<dyn DiskFile>,
    /// Bytes after the header.
    bytes: u64,
}

impl LocalWal {
    /// The epochs of which there are segment files, ascending.
    pub(crate) fn epochs(disk: &dyn Disk) -> Result<Vec<Epoch>> {
        let mut epochs: Vec<Epoch> =
            disk.list(DIRECTORY)?.iter().filter_map(|name| Some(parse_file_name(name)?.0)).collect();
        epochs.dedup();
        Ok(epochs)
    }

    /// The names of the files of `epoch`.
    pub(crate) fn files(disk: &dyn Disk, epoch: Epoch) -> Result<Vec<String>> {
        let mut names = disk.list(DIRECTORY)?;
        names.retain(|name| parse_file_name(name).is_some_and(|(of, _)| of == epoch));
        Ok(names)
    }

    /// Removes the files of `epoch`, durably.
    pub(crate) fn remove(disk: &dyn Disk, epoch: Epoch) -> Result<()> {
        let names = Self::files(disk, epoch)?;
        if names.is_empty() {
            return Ok(());
        }
        names.iter().try_for_each(|name| disk.remove(name))?;
        Ok(disk.sync_directory(DIRECTORY)?)
    }

    /// Moves the files of `epoch` to [`SET_ASIDE`], durably, under names that start with `label`, which is never used
    /// twice. Returns how many there were.
    pub(crate) fn set_aside(disk: &dyn Disk, epoch: Epoch, label: &str) -> Result<usize> {
        let names = Self::files(disk, epoch)?;
        for name in &names {
            let file = name.rsplit('/').next().expect("split yields at least one part");
            disk.rename(name, &format!("{SET_ASIDE}/{label}-wal-{file}"))?;
        }
        if !names.is_empty() {
            disk.sync_directory(SET_ASIDE)?;
            disk.sync_directory(DIRECTORY)?;
        }
        Ok(names.len())
    }

    /// Opens what there is of `epoch`. An unknown format version is refused by name.
    pub(crate) fn open(disk: &dyn Disk, epoch: Epoch) -> Result<Self> {
        let mut wal = Self { branch: None, epoch, segments: BTreeMap::new() };
        for name in Self::files(disk, epoch)? {
            let Some((_, first)) = parse_file_name(&name) else { continue };
            let file = disk.open(&name)?;
            let bytes = file.len()?.saturating_sub(FILE_HEADER as u64);
            if bytes > 0 {
                let mut header = [0; FILE_HEADER];
                file.read_at(0, &mut header)?;
                wal.check_header(FileHeader::parse_segment(&header, &name), &name, first)?;
                wal.segments.insert(first, Segment { file, bytes });
            }
        }
        Ok(wal)
    }

    fn check_header(&mut self, header: Result<FileHeader>, name: &str, first: u64) -> Result<()> {
        match header {
            Ok(header) => {
                let of_others = self.branch.is_some_and(|branch| branch != header.branch);
                if of_others || header.epoch != self.epoch || header.first.0 != first {
                    return Err(Error::corrupt(format!("{name} holds a wal segment of another place")));
                }
                self.branch = Some(header.branch);
                Ok(())
            }
            // A crash while the file was made leaves such a header, and rot does. The search for proof that bytes behind
            // it were durable tells them apart.
            Err(error) if error.kind() == crate::Kind::Corrupt => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Shows `visit` every record from the one at `from` on (a record's start), in order, and returns the end of the last
    /// one. Damage before that end is an error that names file and offset.
    pub(crate) fn read(
        &self,
        branch: BranchId,
        from: WalPosition,
        visit: &mut dyn FnMut(&Record<'_>) -> Result<()>,
    ) -> Result<WalPosition> {
        let stream = Stream::new(branch, self.epoch);
        let mut window = Window { wal: self, bytes: Vec::new(), start: from.0 };
        let mut at = from.0;
        let mut newest = Seqno(0);
        while let Some(record) = window.record(&stream, at)? {
            if record.seqno <= newest {
                return Err(self.damaged(at, "its records are out of order"));
            }
            newest = record.seqno;
            at = record.end.0;
            visit(&record)?;
        }
        match self.proof_that_durable(&stream, at)? {
            None => Ok(WalPosition(at)),
            Some(proof) => Err(self.damaged(
                at,
                &format!("a later record, at {proof:#x}, was written after this place was durable"),
            )),
        }
    }

    /// The start of the oldest byte that is left, or `None` if there is none.
    pub(crate) fn oldest(&self) -> Option<WalPosition> {
        self.segments.first_key_value().map(|(first, _)| WalPosition(*first))
    }

    /// Gives back the space of files that hold no byte of `range`, and of what was allocated behind it.
    pub(crate) fn keep_only(&self, disk: &dyn Disk, range: Range<WalPosition>) -> Result<()> {
        for (first, segment) in &self.segments {
            if first + segment.bytes <= range.start.0 || *first >= range.end.0 {
                disk.remove(&file_name(self.epoch, *first))?;
            } else if first + segment.bytes > range.end.0 {
                segment.file.set_len(FILE_HEADER as u64 + range.end.0 - first)?;
                segment.file.sync()?;
            }
        }
        Ok(disk.sync_directory(DIRECTORY)?)
    }

    fn damaged(&self, position: u64, why: &str) -> Error {
        let place = match self.segments.range(..=position).next_back() {
            Some((first, _)) => {
                format!(
                    "{} at offset {}",
                    file_name(self.epoch, *first),
                    FILE_HEADER as u64 + position - first
                )
            }
            None => format!("of epoch {:x} at position {position:#x}", self.epoch.0),
        };
        Error::corrupt(format!(
            "the local wal {place} is damaged: {why}. Restore the file, or move the directory `{DIRECTORY}` away to start from what the bucket has"
        ))
    }

    /// Where a whole record header behind `position` says that `position` was durable.
    fn proof_that_durable(&self, stream: &Stream, position: u64) -> Result<Option<u64>> {
        for (first, segment) in &self.segments {
            let mut at = (*first).max(position);
            let end = first + segment.bytes;
            while at + RECORD_HEADER as u64 <= end {
                let stop = end.min(at + WINDOW_BYTES);
                let mut bytes = vec![0; (stop - at) as usize];
                segment.file.read_at(FILE_HEADER as u64 + at - first, &mut bytes)?;
                if let Some(found) = proof_in(stream, position, at, &bytes) {
                    return Ok(Some(found));
                }
                // The next window begins with the headers that this one cut.
                at = if stop == end { end } else { stop - (RECORD_HEADER as u64 - 1) };
            }
        }
        Ok(None)
    }

    /// Reads up to `bytes` from `at` on, as far as there are files edge to edge.
    fn bytes_at(&self, range: Range<u64>) -> Result<Vec<u8>> {
        let mut read = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let Some((first, segment)) = self.segments.range(..=at).next_back() else { break };
            let end = range.end.min(first + segment.bytes);
            if end <= at {
                break;
            }
            let done = read.len();
            read.resize(done + (end - at) as usize, 0);
            segment.file.read_at(FILE_HEADER as u64 + at - first, &mut read[done..])?;
            at = end;
        }
        Ok(read)
    }
}

fn proof_in(stream: &Stream, position: u64, start: u64, bytes: &[u8]) -> Option<u64> {
    // Most of what follows a tail is zeros that were allocated and never written.
    if bytes.iter().all(|byte| *byte == 0) {
        return None;
    }
    (0..bytes.len().saturating_sub(RECORD_HEADER - 1)).find_map(|offset| {
        let at = start + offset as u64;
        let durable = u64_at(bytes, offset + 16);
        let proves =
            durable > position && durable <= at && stream.parse_header(at, &bytes[offset..]).is_some();
        proves.then_some(at)
    })
}

struct Window<'a> {
    wal: &'a LocalWal,
    bytes: Vec<u8>,
    start: u64,
}

impl Window<'_> {
    fn record(&mut self, stream: &Stream, position: u64) -> Result<Option<Record<'_>>> {
        if !self.reach(position, RECORD_HEADER as u64)? {
            return Ok(None);
        }
        let Some(header) = stream.parse_header(position, self.from(position)) else { return Ok(None) };
        if !self.reach(position, (RECORD_HEADER + header.payload_bytes) as u64)? {
            return Ok(None);
        }
        Ok(Record::parse(stream, position, self.from(position)))
    }

    fn from(&self, position: u64) -> &[u8] {
        &self.bytes[(position - self.start) as usize..]
    }

    /// Whether there are `length` bytes at `position`; afterwards the window holds them.
    fn reach(&mut self, position: u64, length: u64) -> Result<bool> {
        let Some(end) = position.checked_add(length) else { return Ok(false) };
        if end > self.start + self.bytes.len() as u64 {
            self.bytes = self.wal.bytes_at(position..end.max(position.saturating_add(WINDOW_BYTES)))?;
            self.start = position;
        }
        Ok(end <= self.start + self.bytes.len() as u64)
    }
}
