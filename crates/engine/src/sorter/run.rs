//! A sorted run on the local disk: blocks of records, packed with LZ4.
//!
//! * A file loses its name as soon as it is made, so it is gone when its run is, or the process.
//! * Length and checksum of each block stay in memory, and are checked by every read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::xxh3_64;

use super::buffer::{put_record, record};
use crate::disk::{Disk, DiskFile};
use crate::{Error, Result};

const DIRECTORY: &str = "sort";
/// Unpacked bytes that a block is cut at.
const BLOCK_BYTES: usize = 64 << 10;
/// Packed bytes that are written at once.
const WRITE_BYTES: usize = 1 << 20;

/// Where runs are written.
pub(crate) struct SpillSpace {
    disk: Arc<dyn Disk>,
    next: AtomicU64,
}

impl SpillSpace {
    /// Removes what a crash between the making of a file and the removal of its name has left.
    pub(crate) fn open(disk: Arc<dyn Disk>) -> Result<Arc<Self>> {
        for name in disk.list(DIRECTORY)? {
            disk.remove(&name)?;
        }
        Ok(Arc::new(Self { disk, next: AtomicU64::new(0) }))
    }

    fn create(&self) -> Result<(String, Arc<dyn DiskFile>)> {
        let name = format!("{DIRECTORY}/{}", self.next.fetch_add(1, Ordering::Relaxed));
        let file = self.disk.create(&name)?;
        self.disk.remove(&name)?;
        Ok((name, file))
    }
}

pub(super) struct Run {
    /// What its file was called, for errors.
    name: String,
    file: Arc<dyn DiskFile>,
    blocks: Vec<Block>,
}

struct Block {
    packed_bytes: u32,
    bytes: u32,
    checksum: u64,
}

/// Writes a run; see [`Run::write`].
pub(super) struct RunWriter {
    run: Run,
    block: Vec<u8>,
    packed: Vec<u8>,
    /// Bytes of `packed` that count.
    packed_bytes: usize,
    written: u64,
}

impl Run {
    /// A run of what `fill` pushes, in ascending order.
    pub(super) fn write(space: &SpillSpace, fill: impl FnOnce(&mut RunWriter) -> Result<()>) -> Result<Self> {
        let (name, file) = space.create()?;
        let run = Run { name, file, blocks: Vec::new() };
        let mut writer =
            RunWriter { run, block: Vec::new(), packed: Vec::new(), packed_bytes: 0, written: 0 };
        fill(&mut writer)?;
        writer.end_block();
        writer.flush()?;
        Ok(writer.run)
    }
}

impl RunWriter {
    pub(super) fn push(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        put_record(&mut self.block, key, value);
        if self.block.len() >= BLOCK_BYTES {
            self.end_block();
            if self.packed_bytes >= WRITE_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn end_block(&mut self) {
        if self.block.is_empty() {
            return;
        }
        let room = lz4_flex::block::get_maximum_output_size(self.block.len());
        let start = self.packed_bytes;
        self.packed.resize(start + room, 0);
        let packed = lz4_flex::block::compress_into(&self.block, &mut self.packed[start..])
            .expect("there is room for the longest output");
        self.packed_bytes += packed;
        let narrow = |bytes: usize| u32::try_from(bytes).expect("a block is a little longer than one value");
        self.run.blocks.push(Block {
            packed_bytes: narrow(packed),
            bytes: narrow(self.block.len()),
            checksum: xxh3_64(&self.packed[start..self.packed_bytes]),
        });
        self.block.clear();
    }

    fn flush(&mut self) -> Result<()> {
        self.run.file.write_at(self.written, &self.packed[..self.packed_bytes])?;
        self.written += self.packed_bytes as u64;
        self.packed_bytes = 0;
        Ok(())
    }
}

pub(super) struct RunReader {
    run: Run,
    /// The block that is in memory, by number, and where the next one starts.
    current: usize,
    next_at: u64,
    packed: Vec<u8>,
    block: Vec<u8>,
    /// In `block`.
    at: usize,
    end: usize,
}

impl RunReader {
    /// On the first entry; `None` if there is none.
    pub(super) fn open(run: Run) -> Result<Option<Self>> {
        let mut reader =
            Self { run, current: 0, next_at: 0, packed: Vec::new(), block: Vec::new(), at: 0, end: 0 };
        Ok(reader.load()?.then_some(reader))
    }

    pub(super) fn entry(&self) -> (&[u8], &[u8]) {
        let (key, value, _) = record(&self.block, self.at);
        (key, value)
    }

    pub(super) fn advance(&mut self) -> Result<bool> {
        if self.end < self.block.len() {
            self.at = self.end;
            self.end = record(&self.block, self.at).2;
            return Ok(true);
        }
        self.current += 1;
        self.load()
    }

    fn load(&mut self) -> Result<bool> {
        let Some(block) = self.run.blocks.get(self.current) else { return Ok(false) };
        self.packed.resize(block.packed_bytes as usize, 0);
        self.run.file.read_at(self.next_at, &mut self.packed)?;
        let wrong =
            |what: &str| Error::corrupt(format!("{}: block at {}: {what}", self.run.name, self.next_at));
        if xxh3_64(&self.packed) != block.checksum {
            return Err(wrong("wrong checksum"));
        }
        self.block.resize(block.bytes as usize, 0);
        let unpacked = lz4_flex::block::decompress_into(&self.packed, &mut self.block)
            .map_err(|error| wrong("LZ4 can not unpack it").with_cause(error))?;
        if unpacked != self.block.len() {
            return Err(wrong("length differs from what was written"));
        }
        self.next_at += u64::from(block.packed_bytes);
        self.at = 0;
        self.end = record(&self.block, 0).2;
        Ok(true)
    }
}
