//! The wal on the local disk: files of equal length that hold one stretch of the stream each.
//!
//! * A position maps to a file and an offset by arithmetic; records may run across files.
//! * A file's space is allocated, its header and its name are durable, before a byte of the stream is meant for it. So
//!   a full disk is found out while a commit can still be refused cleanly.
//! * A sync is twice as fast where all blocks of a file were written before (docs/performance.md): else the file system must note each time
//!   that they are now. So files that are not needed any more are kept as spares, and others are filled with zeros beforehand, if there is time.
//!   What a spare still holds passes for nothing: checksums of records cover epoch and position.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use super::format::{FILE_HEADER, Stream};
use crate::{Disk, DiskError, DiskFile, Epoch, WalPosition};

/// Where segment files are.
pub(crate) const DIRECTORY: &str = "wal";

/// How names of spares begin.
const SPARE: &str = "wal/spare-";
/// Spares that are kept: what one flush of a memtable frees at once.
const SPARES_MAX: usize = 4;
/// Zeros that are written at a time.
const ZEROS_BYTES: usize = 1 << 20;

/// When a new segment is needed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// A commit waits for it.
    Now,
    /// There is time to write it once.
    Later,
}

/// The segment files of the wal being written.
pub(crate) struct Segments {
    disk: Arc<dyn Disk>,
    stream: Stream,
    segment_bytes: u64,
    start: u64,
    files: Mutex<BTreeMap<u64, Arc<dyn DiskFile>>>,
    spares: Mutex<Vec<String>>,
}

impl Segments {
    /// No file yet; the first one will start at `start`. Spares of an earlier run are taken over, once it is durable that they are no segments
    /// any more.
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        stream: Stream,
        segment_bytes: u64,
        start: WalPosition,
    ) -> Result<Self, DiskError> {
        let mut spares = Vec::new();
        for name in disk.list(DIRECTORY)?.into_iter().filter(|name| name.starts_with(SPARE)) {
            let fits = disk.open(&name)?.len()? == file_bytes(segment_bytes);
            if fits && spares.len() < SPARES_MAX {
                spares.push(name);
            } else {
                disk.remove(&name)?;
            }
        }
        if !spares.is_empty() {
            disk.sync_directory(DIRECTORY)?;
        }
        let (files, spares) = (Mutex::default(), Mutex::new(spares));
        Ok(Self { disk, stream, segment_bytes, start: start.0, files, spares })
    }

    /// Adds the segment that starts at `first`, where the last one ends, and returns its end. On an error there is no
    /// such file, or one that holds nothing.
    pub(crate) fn extend(&self, first: u64, need: Need) -> Result<u64, DiskError> {
        assert_eq!((first - self.start) % self.segment_bytes, 0, "segments lie edge to edge");
        let name = file_name(self.stream.epoch, first);
        let spare = self.spares.lock().pop();
        let made = match &spare {
            Some(spare) => self.reuse(spare, &name, first),
            None => self.make(&name, first, need),
        };
        match made {
            Ok(file) => {
                self.files.lock().insert(first, file);
                Ok(first + self.segment_bytes)
            }
            Err(error) => {
                // Gives the space back; what can't be removed now is removed by the next try, or start.
                for name in spare.iter().chain([&name]) {
                    if let Err(error) = self.disk.remove(name) {
                        tracing::debug!(%error, "half a wal segment stays behind, empty");
                    }
                }
                Err(error)
            }
        }
    }

    fn reuse(&self, spare: &str, name: &str, first: u64) -> Result<Arc<dyn DiskFile>, DiskError> {
        self.finish(&*self.disk.open_log(spare)?, first)?;
        self.disk.rename(spare, name)?;
        self.disk.sync_directory(DIRECTORY)?;
        self.disk.open_log(name)
    }

    fn make(&self, name: &str, first: u64, need: Need) -> Result<Arc<dyn DiskFile>, DiskError> {
        self.disk.remove(name)?;
        let length = file_bytes(self.segment_bytes);
        self.disk.create(name)?.allocate(length)?;
        let file = self.disk.open_log(name)?;
        if need == Need::Later {
            let zeros = vec![0; ZEROS_BYTES.min(length as usize)];
            for at in (0..length).step_by(ZEROS_BYTES) {
                file.write_at(at, &zeros[..zeros.len().min((length - at) as usize)])?;
            }
        }
        self.finish(&*file, first)?;
        self.disk.sync_directory(DIRECTORY)?;
        Ok(file)
    }

    /// The header makes a segment of a file.
    fn finish(&self, file: &dyn DiskFile, first: u64) -> Result<(), DiskError> {
        file.write_at(0, &self.stream.segment_header(WalPosition(first), self.segment_bytes))?;
        file.sync()
    }

    /// Writes `bytes` at `position` and notes in `touched` which files need a sync.
    pub(crate) fn write(
        &self,
        position: u64,
        bytes: &[u8],
        touched: &mut BTreeSet<u64>,
    ) -> Result<(), DiskError> {
        let mut done = 0;
        for (first, range) in self.pieces(position..position + bytes.len() as u64) {
            let length = (range.end - range.start) as usize;
            self.file(first).write_at(FILE_HEADER as u64 + range.start, &bytes[done..done + length])?;
            touched.insert(first);
            done += length;
        }
        Ok(())
    }

    /// Makes the files in `touched` durable.
    pub(crate) fn sync(&self, touched: &BTreeSet<u64>) -> Result<(), DiskError> {
        touched.iter().try_for_each(|first| self.file(*first).sync())
    }

    /// The bytes of `range`, all of them written before and not trimmed.
    pub(crate) fn read(&self, range: Range<u64>) -> Result<Vec<u8>, DiskError> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let mut done = 0;
        for (first, part) in self.pieces(range) {
            let length = (part.end - part.start) as usize;
            self.file(first).read_at(FILE_HEADER as u64 + part.start, &mut bytes[done..done + length])?;
            done += length;
        }
        Ok(bytes)
    }

    /// Removes the files that lie wholly below `position`, the oldest first, and returns how many. Some become spares, once their new names
    /// are durable: a power cut must not bring an old name back over what its file is used for next.
    pub(crate) fn trim(&self, position: u64) -> Result<usize, DiskError> {
        let mut removed = 0;
        let mut renamed = Vec::new();
        let done = self
            .trim_files(position, &mut renamed, &mut removed)
            .and_then(|()| if removed > 0 { self.disk.sync_directory(DIRECTORY) } else { Ok(()) });
        match done {
            Ok(()) => {
                self.spares.lock().append(&mut renamed);
                Ok(removed)
            }
            Err(error) => {
                for name in &renamed {
                    if let Err(error) = self.disk.remove(name) {
                        tracing::debug!(%error, "a wal segment that was trimmed stays behind until the next start");
                    }
                }
                Err(error)
            }
        }
    }

    fn trim_files(
        &self,
        position: u64,
        renamed: &mut Vec<String>,
        removed: &mut usize,
    ) -> Result<(), DiskError> {
        loop {
            let oldest = self.files.lock().first_key_value().map(|(first, _)| *first);
            let Some(first) = oldest.filter(|first| first + self.segment_bytes <= position) else {
                return Ok(());
            };
            let name = file_name(self.stream.epoch, first);
            if self.spares.lock().len() + renamed.len() < SPARES_MAX {
                let spare = format!("{SPARE}{:016x}-{first:016x}", self.stream.epoch.0);
                self.disk.rename(&name, &spare)?;
                renamed.push(spare);
            } else {
                self.disk.remove(&name)?;
            }
            self.files.lock().remove(&first);
            *removed += 1;
        }
    }

    /// How many spares there are.
    #[cfg(test)]
    pub(super) fn spares(&self) -> usize {
        self.spares.lock().len()
    }

    fn file(&self, first: u64) -> Arc<dyn DiskFile> {
        Arc::clone(self.files.lock().get(&first).expect("positions are reserved only where there is a file"))
    }

    /// The parts of `range` by segment: where the segment starts, and offsets in it.
    fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> {
        let (start, step) = (self.start, self.segment_bytes);
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let first = start + (at - start) / step * step;
            let end = range.end.min(first + step);
            let piece = (first, at - first..end - first);
            at = end;
            Some(piece)
        })
    }
}

/// How long the file of a segment is.
fn file_bytes(segment_bytes: u64) -> u64 {
    FILE_HEADER as u64 + segment_bytes
}

/// The name of the segment of `epoch` that starts at `first`.
pub(crate) fn file_name(epoch: Epoch, first: u64) -> String {
    format!("{DIRECTORY}/{:016x}-{first:016x}", epoch.0)
}

/// Epoch and start of a segment's name.
pub(crate) fn parse_file_name(name: &str) -> Option<(Epoch, u64)> {
    let (epoch, first) = name.strip_prefix(DIRECTORY)?.strip_prefix('/')?.split_once('-')?;
    let hex = |digits: &str| if digits.len() == 16 { u64::from_str_radix(digits, 16).ok() } else { None };
    Some((Epoch(hex(epoch)?), hex(first)?))
}
