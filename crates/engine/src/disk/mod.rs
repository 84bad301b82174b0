//! The local disk as the engine sees it: a flat set of files under relative names with `/` in them.
//!
//! * Bytes that were not synced may be lost or torn by a crash; a name is durable only after `sync_directory`.
//! * A failed sync is final for the file: what it holds is unknown until it is read again after a restart.

mod direct;
mod real;
mod sim;

use std::ops::Range;
use std::sync::Arc;

pub use real::RealDisk;
pub use sim::{DiskFault, SimDisk};

/// What a log file is written in: a multiple of the blocks of every disk and file system in use.
pub(crate) const LOG_BLOCK: u64 = 4096;

/// A failed disk operation, naming the file.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {path}: {message}")]
pub struct DiskError {
    /// `open`, `write`, `sync` and so on.
    pub operation: &'static str,
    /// The file, as an operator would find it.
    pub path: String,
    /// The system's words.
    pub message: String,
    /// The disk or its quota is full.
    pub full: bool,
    /// There is no such file.
    pub absent: bool,
}

/// The local disk. The machine's in production, one that forgets unsynced bytes in the simulator.
pub trait Disk: Send + Sync + 'static {
    /// A new, empty file open for writing and reading; directories on the way are made. An existing file is an error.
    fn create(&self, name: &str) -> Result<Arc<dyn DiskFile>, DiskError>;
    /// An existing file, open for writing and reading.
    fn open(&self, name: &str) -> Result<Arc<dyn DiskFile>, DiskError>;
    /// An existing file that is written from front to back, in pieces that are synced one by one: a log. Where the file system can, and the
    /// file is whole blocks of [`LOG_BLOCK`] long, writes go past the page cache. Behind the end of a write, up to the end of its block, the file
    /// holds zeros afterwards. It is not made longer by writes.
    fn open_log(&self, name: &str) -> Result<Arc<dyn DiskFile>, DiskError>;
    /// Renames a file, replacing what has the new name. Durable after `sync_directory` of both.
    fn rename(&self, from: &str, to: &str) -> Result<(), DiskError>;
    /// Removes a file; an absent one is fine.
    fn remove(&self, name: &str) -> Result<(), DiskError>;
    /// Names of all files under `directory` (relative to the disk's root, recursively), sorted. Absent: empty.
    fn list(&self, directory: &str) -> Result<Vec<String>, DiskError>;
    /// Makes creations, renames and removals in `directory` durable.
    fn sync_directory(&self, directory: &str) -> Result<(), DiskError>;
}

/// An open file. Reads and writes name their offset, so one handle serves many threads.
pub trait DiskFile: Send + Sync + 'static {
    /// Writes all of `bytes` at `offset`, extending the file as needed. Not durable until `sync`.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError>;
    /// Fills `buffer` from `offset`; a file that is too short is an error.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError>;
    /// Makes all earlier writes durable (fdatasync).
    fn sync(&self) -> Result<(), DiskError>;
    /// Length in bytes.
    fn len(&self) -> Result<u64, DiskError>;
    /// Whether the file has no bytes.
    fn is_empty(&self) -> Result<bool, DiskError> {
        Ok(self.len()? == 0)
    }
    /// Cuts or extends the file.
    fn set_len(&self, bytes: u64) -> Result<(), DiskError>;
    /// Extends the file to at least `bytes` with the space for them set aside, so that writing there later can not
    /// fail for want of space. Where the file system can't promise that, the file is only extended.
    fn allocate(&self, bytes: u64) -> Result<(), DiskError> {
        if self.len()? < bytes { self.set_len(bytes) } else { Ok(()) }
    }
    /// Hints that `range` will not be read soon.
    fn forget(&self, _range: Range<u64>) {}
}

impl From<DiskError> for crate::Error {
    fn from(error: DiskError) -> Self {
        let kind = if error.full { crate::Kind::Full } else { crate::Kind::Unavailable };
        Self::new(kind, "local disk").with_cause(error)
    }
}
