//! A log file written past the page cache (`O_DIRECT`).
//!
//! * A sync has one thing left to do, to flush the disk's own cache: with the page cache in between, a group of commits of 4 kB took 190 µs
//!   to be durable on blocks that had been written before, and takes 120 (docs/performance.md).
//! * The disk takes whole blocks. The one that the last write ended in is kept, so that the next write can begin in its middle.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use parking_lot::Mutex;

use super::real::{self, failed};
use super::{DiskError, DiskFile, LOG_BLOCK};

const BLOCK: usize = LOG_BLOCK as usize;
/// Written by one system call at most.
const PIECE: usize = 64 * BLOCK;

pub(super) struct DirectFile {
    file: File,
    path: PathBuf,
    tail: Mutex<Tail>,
}

struct Tail {
    buffer: Buffer,
    /// Where the block stands that the buffer begins with, if it holds one.
    block: Option<u64>,
}

impl DirectFile {
    /// `file` was opened with `O_DIRECT` and is whole blocks long.
    pub(super) fn new(file: File, path: PathBuf) -> Self {
        Self { file, path, tail: Mutex::new(Tail { buffer: Buffer::new(PIECE), block: None }) }
    }

    fn write(&self, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        let mut tail = self.tail.lock();
        let Tail { buffer, block: kept } = &mut *tail;
        let buffer = buffer.bytes();
        while !bytes.is_empty() {
            let block = offset / LOG_BLOCK * LOG_BLOCK;
            let before = (offset - block) as usize;
            if before > 0 && *kept != Some(block) {
                self.file.read_exact_at(&mut buffer[..BLOCK], block)?;
            }
            // Until the write has succeeded nobody knows what stands there.
            *kept = None;
            let (now, later) = bytes.split_at(bytes.len().min(PIECE - before));
            let end = before + now.len();
            let whole = end.next_multiple_of(BLOCK);
            buffer[before..end].copy_from_slice(now);
            buffer[end..whole].fill(0);
            self.file.write_all_at(&buffer[..whole], block)?;
            if end < whole {
                buffer.copy_within(whole - BLOCK..whole, 0);
                *kept = Some(block + (whole - BLOCK) as u64);
            }
            offset += now.len() as u64;
            bytes = later;
        }
        Ok(())
    }

    fn read(&self, mut offset: u64, mut target: &mut [u8]) -> io::Result<()> {
        let mut buffer = Buffer::new(PIECE.min((target.len() + BLOCK).next_multiple_of(BLOCK)));
        let buffer = buffer.bytes();
        while !target.is_empty() {
            let block = offset / LOG_BLOCK * LOG_BLOCK;
            let before = (offset - block) as usize;
            let length = target.len().min(buffer.len() - before);
            let whole = (before + length).next_multiple_of(BLOCK);
            self.file.read_exact_at(&mut buffer[..whole], block)?;
            let (now, later) = target.split_at_mut(length);
            now.copy_from_slice(&buffer[before..before + length]);
            offset += length as u64;
            target = later;
        }
        Ok(())
    }
}

impl DiskFile for DirectFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.write(offset, bytes).map_err(|e| failed("write", &self.path, &e))
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.read(offset, buffer).map_err(|e| failed("read", &self.path, &e))
    }
    fn sync(&self) -> Result<(), DiskError> {
        real::sync(&self.file, &self.path)
    }
    fn len(&self) -> Result<u64, DiskError> {
        real::len(&self.file, &self.path)
    }
    fn set_len(&self, bytes: u64) -> Result<(), DiskError> {
        self.tail.lock().block = None;
        real::set_len(&self.file, &self.path, bytes)
    }
}

/// Memory that starts where a block may.
struct Buffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    fn new(length: usize) -> Self {
        let memory = vec![0; length + BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        Self { memory, start, length }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}
