//! An open sst: its top index in memory, everything else fetched when wanted and kept in the block cache.
//!
//! * Every block that arrives from outside memory has its checksum verified; a wrong one is fetched once more from
//!   where the truth is, and only then is the sst [`Kind::Corrupt`].
//! * A lookup of a cached key takes no lock and allocates nothing.

use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::Guard;
use bytes::Bytes;

use super::block::{Block, Row};
use super::filter::{Filter, FirstPartFilter};
use super::format::{BlockKind, Compression, Footer, Handle, check_seal, unseal, unseal_block};
use super::window::Window;
use crate::cache::{BlockCache, Held, Loan, Slots};
use crate::first_part::Probe;
use crate::store::{ByteSource, Keep};
use crate::version::SstMeta;
use crate::{Error, Kind, OpKind, Result, Seqno, SstId, TreeId};

/// The tail that is fetched at once when an sst is opened: footer, summary and, mostly, the top index.
const TAIL_BYTES: u64 = 16 * 1024;
/// Memory of an open sst for each partition and for each data block, whether anything of them is cached or not.
const PARTITION_BYTES: usize = 192;
const SLOT_BYTES: usize = 16;

/// Why blocks are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// For a query: blocks are cached; sequential reads fetch ahead once they are seen to be sequential.
    Query,
    /// For a compaction: all of the sst is read once, in large pieces; nothing is cached.
    Compaction,
    /// For a few questions before a compaction: single blocks; nothing is cached, or made hotter.
    Probe,
}

/// An immutable sst that is open for reading.
pub(crate) struct Sst {
    id: SstId,
    entries: u64,
    blocks: u32,
    /// Bytes of data blocks; they start at 0.
    data_bytes: u64,
    /// Counts for all versions, whose own is 0.
    loaded: Option<Seqno>,
    top: Block,
    partitions: Box<[Partition]>,
    slots: Arc<Slots<PartitionBody, FirstPartFilter, Block>>,
    cache: Arc<BlockCache>,
    /// See [`Sst::charge`].
    wasted: AtomicU64,
    /// What it takes while it is open and none of its blocks is cached.
    _memory: Loan,
    source: ByteSource,
}

#[derive(Clone, Copy)]
struct Partition {
    /// Of no bytes if there is none.
    first_parts: Handle,
    filter: Handle,
    index: Handle,
    first_block: u32,
    blocks: u32,
}

/// A loaded partition: they lie side by side and are fetched together.
pub(crate) struct PartitionBody {
    filter: Filter,
    pub(super) index: Block,
}

/// How far a lookup comes without asking the bucket.
pub(crate) enum Reach {
    /// The key is not in this sst.
    Absent,
    /// To the block that the key should be in.
    Block,
    /// To a piece that is neither in memory nor on the local disk.
    Missing(Piece),
}

/// A piece of an sst that is fetched as a whole.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Piece {
    /// Filter and index of a partition.
    Partition(usize),
    /// A data block.
    Block(BlockPlace),
}

/// A version that was found; keeps its block in memory. Not for long: a thread has few of the guards that it may hold.
pub(crate) struct Found {
    block: BlockGuard,
    row: Row,
}

/// A block that stays, without touching its reference count if it was in the cache.
pub(super) enum BlockGuard {
    /// What a slot held, which was not nothing.
    Looked(Guard<Option<Arc<Held<Block>>>>),
    Fetched(Arc<Held<Block>>),
}

impl Deref for BlockGuard {
    type Target = Block;
    #[inline]
    fn deref(&self) -> &Block {
        match self {
            Self::Looked(guard) => guard.as_ref().expect("only made of a slot that is full"),
            Self::Fetched(block) => block,
        }
    }
}

impl Found {
    /// What the version says.
    pub(crate) fn kind(&self) -> OpKind {
        self.row.kind
    }
    /// When it was committed.
    pub(crate) fn seqno(&self) -> Seqno {
        self.row.seqno
    }
    /// Its value; empty for a deletion.
    pub(crate) fn value(&self) -> &[u8] {
        self.block.value(&self.row)
    }
}

/// What is read of an sst of so many bytes when it is opened; mostly all that is.
pub(crate) fn tail_range(bytes: u64) -> Range<u64> {
    bytes.saturating_sub(TAIL_BYTES)..bytes
}

/// The ssts of a run do not overlap: the one that may hold `full_key`.
#[inline]
pub(crate) fn find_in_run<'a>(run: &'a [Arc<SstMeta>], full_key: &[u8]) -> Option<&'a Arc<SstMeta>> {
    let at = run.partition_point(|meta| &meta.last_key[..] < full_key);
    run.get(at).filter(|meta| &meta.first_key[..] <= full_key)
}

impl Sst {
    /// Opens the sst that the manifest calls `meta`.
    ///
    /// [`Kind::Corrupt`] if `source` holds something else or is damaged, [`Kind::BadRequest`] if its format version is
    /// unknown.
    pub(crate) fn open(meta: &SstMeta, source: ByteSource, cache: &Arc<BlockCache>) -> Result<Self> {
        let opened = match Tail::read(meta, &source) {
            Err(error) if error.kind() == Kind::Corrupt && source.distrust(0..meta.bytes) => {
                tracing::warn!(sst = %meta.id, %error, "a local copy is damaged; reading the bucket's");
                Tail::read(meta, &source)
            }
            answer => answer,
        };
        let Tail { top, partitions, blocks, data_bytes } = opened?;
        let slots = Slots::new(cache, partitions.iter().map(|partition| partition.blocks));
        let slots_bytes = partitions.len() * PARTITION_BYTES + blocks as usize * SLOT_BYTES;
        let keys = meta.first_key.len() + meta.last_key.len();
        let memory = cache.lend(slots_bytes + top.bytes() + keys + size_of::<Self>());
        let cache = Arc::clone(cache);
        Ok(Self {
            _memory: memory,
            id: meta.id,
            entries: meta.entries,
            blocks,
            data_bytes,
            loaded: meta.loaded.then_some(meta.seqno_min),
            top,
            partitions,
            slots,
            cache,
            wasted: AtomicU64::new(0),
            source,
        })
    }

    /// Notes that readers took so many steps in vain for its lying above or beside others: what `compaction::pick` weighs
    /// against the cost of a merge. Called once for many steps.
    pub(crate) fn charge(&self, steps: u64) {
        self.wasted.fetch_add(steps, Ordering::Relaxed);
    }

    /// All that it was charged with.
    pub(crate) fn wasted(&self) -> u64 {
        self.wasted.load(Ordering::Relaxed)
    }

    /// The newest version of `full_key`, whose [`hash`](super::hash) is `hash`, that is not newer than `at`.
    pub(crate) fn get_hashed(&self, full_key: &[u8], hash: u64, at: Seqno) -> Result<Option<Found>> {
        self.get_or_tell(full_key, hash, at, &|| ())
    }

    /// The same. `cold` is called before filter and index are fetched from the bucket: whoever knows what else will be missing
    /// may fetch all of it at once.
    pub(crate) fn get_or_tell(
        &self,
        full_key: &[u8],
        hash: u64,
        at: Seqno,
        cold: &dyn Fn(),
    ) -> Result<Option<Found>> {
        let partition = self.top.lower_bound(full_key, Seqno(u64::MAX));
        if partition == self.partitions.len() {
            return Ok(None);
        }
        let Some(place) = self.place_of(partition, full_key, hash, cold)? else { return Ok(None) };
        let block = self.look_at_block(&place)?;
        let row = block.lower_bound(full_key, at);
        if row < block.rows() {
            return Ok(found(block, row, full_key));
        }
        if block.key(&block.row(row - 1)) != full_key {
            return Ok(None);
        }
        self.get_from_next_block(partition, place.block, full_key, at)
    }

    /// The block of a partition that should have the key; `None`: it is not there.
    #[inline]
    fn place_of(
        &self,
        partition: usize,
        full_key: &[u8],
        hash: u64,
        cold: &dyn Fn(),
    ) -> Result<Option<BlockPlace>> {
        self.with_partition(partition, cold, |body| {
            if !body.filter.may_contain(hash) {
                return None;
            }
            let block = body.index.lower_bound(full_key, Seqno(u64::MAX));
            (block < body.index.rows()).then(|| BlockPlace {
                partition,
                block,
                handle: handle_at(&body.index, block),
            })
        })
    }

    /// How far a lookup of `full_key`, whose hash is `hash`, comes without the bucket. Counts as no hit of a data block.
    pub(crate) fn reach(&self, full_key: &[u8], hash: u64) -> Result<Reach> {
        let number = self.top.lower_bound(full_key, Seqno(u64::MAX));
        let Some(partition) = self.partitions.get(number) else { return Ok(Reach::Absent) };
        let in_memory = self.slots.partition(number).peek().is_some();
        if !in_memory && !self.source.is_here(&partition.range()) {
            return Ok(Reach::Missing(Piece::Partition(number)));
        }
        let Some(place) = self.place_of(number, full_key, hash, &|| ())? else { return Ok(Reach::Absent) };
        let in_memory = self.slots.block(place.partition, place.block).peek().is_some();
        if in_memory || self.source.is_here(&place.handle.range()) {
            return Ok(Reach::Block);
        }
        Ok(Reach::Missing(Piece::Block(place)))
    }

    /// Brings a piece into the caches.
    pub(crate) fn fetch(&self, piece: Piece) -> Result<()> {
        match piece {
            Piece::Partition(number) => self.partition(number).map(drop),
            Piece::Block(place) => self.block(&place).map(drop),
        }
    }

    /// Every version in that block was too new, and older ones may follow in the next one.
    #[cold]
    fn get_from_next_block(
        &self,
        partition: usize,
        block: usize,
        full_key: &[u8],
        at: Seqno,
    ) -> Result<Option<Found>> {
        let (mut partition, mut block) = (partition, block + 1);
        loop {
            if block == self.partitions[partition].blocks as usize {
                (partition, block) = (partition + 1, 0);
                if partition == self.partitions.len() {
                    return Ok(None);
                }
            }
            let handle = self.with_partition(partition, &|| (), |body| handle_at(&body.index, block))?;
            let data = self.block(&BlockPlace { partition, block, handle })?;
            let row = data.lower_bound(full_key, at);
            if row < data.rows() {
                return Ok(found(BlockGuard::Fetched(data), row, full_key));
            }
            block += 1;
        }
    }

    /// `false`: no key here starts with the probe's prefix.
    pub(super) fn may_hold(&self, probe: &Probe<'_>) -> Result<bool> {
        let Some(hash) = probe.hash else { return Ok(true) };
        let first = self.top.lower_bound(probe.prefix, Seqno(u64::MAX));
        for partition in first..self.partitions.len() {
            if self.partition_may_hold(partition, probe.tree, hash)? {
                return Ok(true);
            }
            if !self.top.key(&self.top.row(partition)).starts_with(probe.prefix) {
                break;
            }
        }
        Ok(false)
    }

    fn partition_may_hold(&self, number: usize, tree: TreeId, hash: u64) -> Result<bool> {
        let handle = self.partitions[number].first_parts;
        if handle.bytes == 0 {
            return Ok(true);
        }
        if let Some(filter) = &*self.slots.first_parts(number).look() {
            return Ok(filter.may_contain(tree.0, hash));
        }
        let filter = self.verified(handle.range(), None, |stored| {
            FirstPartFilter::decode(&unseal(self.id, handle.offset, BlockKind::FirstParts, stored)?)
        })?;
        let bytes = filter.bytes();
        let filter = self.slots.keep_first_parts(number, filter, bytes);
        Ok(filter.may_contain(tree.0, hash))
    }

    /// The block that the first version at or after `full_key` is in; `None`: all sort before it.
    pub(crate) fn find_block(&self, full_key: &[u8]) -> Result<Option<BlockPlace>> {
        Ok(self.find_block_until(full_key, full_key)?.map(|(place, _)| place))
    }

    /// The blocks that [`Sst::find_block`] finds for two keys, `low` not above `high`. Where both are in one, which is mostly so, it is
    /// looked for once.
    pub(super) fn find_blocks(
        &self,
        low: &[u8],
        high: &[u8],
    ) -> Result<Option<(BlockPlace, Option<BlockPlace>)>> {
        let Some((from, both)) = self.find_block_until(low, high)? else { return Ok(None) };
        let to = if both { Some(from) } else { self.find_block(high)? };
        Ok(Some((from, to)))
    }

    /// The block that [`Sst::find_block`] finds for `low`, and whether it finds the same for `high`.
    fn find_block_until(&self, low: &[u8], high: &[u8]) -> Result<Option<(BlockPlace, bool)>> {
        let partition = self.top.lower_bound(low, Seqno(u64::MAX));
        if partition == self.partitions.len() {
            return Ok(None);
        }
        self.with_partition(partition, &|| (), |body| {
            let block = body.index.lower_bound(low, Seqno(u64::MAX)).min(body.index.rows() - 1);
            let ends_at = body.index.key(&body.index.row(block));
            Some((BlockPlace { partition, block, handle: handle_at(&body.index, block) }, high <= ends_at))
        })
    }

    /// The blocks of the partitions whose index is in memory: the last key that each may hold, where it lies, and how often it was hit lately if it
    /// is in memory too.
    pub(crate) fn blocks_at_hand(&self) -> Vec<(Vec<u8>, u64, Option<u8>)> {
        let mut blocks = Vec::new();
        for number in 0..self.partitions.len() {
            let Some(body) = self.slots.partition(number).peek() else { continue };
            for row in 0..body.index.rows() {
                let key = body.index.key(&body.index.row(row)).to_vec();
                let heat = self.slots.block(number, row).heat();
                blocks.push((key, handle_at(&body.index, row).offset, heat));
            }
        }
        blocks
    }

    /// Brings a block into memory that is likely to be wanted.
    pub(crate) fn warm_block(&self, place: &BlockPlace) -> Result<()> {
        let BlockPlace { partition, block, handle } = *place;
        if self.slots.block(partition, block).heat().is_none() {
            // Nobody asked for it yet: it is no read of its chunk.
            let data = self.decode_block(handle, &self.source.read(handle.range(), Keep::No)?)?;
            let bytes = data.bytes();
            self.slots.keep_block(partition, block, data, bytes);
        }
        Ok(())
    }

    /// About what lies before a block, or before the end.
    pub(super) fn rank(&self, place: Option<&BlockPlace>) -> Rank {
        let Some(place) = place else {
            return Rank { block: self.blocks, entries: self.entries, bytes: self.data_bytes };
        };
        let block = self.partitions[place.partition].first_block + place.block as u32;
        let entries = self.entries as u128 * u128::from(block) / u128::from(self.blocks);
        Rank { block, entries: entries as u64, bytes: place.handle.offset }
    }

    pub(super) fn partitions(&self) -> usize {
        self.partitions.len()
    }

    pub(crate) fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    pub(super) fn top(&self) -> &Block {
        &self.top
    }

    /// A partition to hold on to.
    pub(super) fn partition(&self, partition: usize) -> Result<Arc<Held<PartitionBody>>> {
        match &*self.slots.partition(partition).look() {
            Some(body) => Ok(Arc::clone(body)),
            None => self.fetch_partition(partition),
        }
    }

    /// Lets `f` see a partition, without touching its reference count when it is cached.
    #[inline]
    fn with_partition<R>(
        &self,
        partition: usize,
        cold: &dyn Fn(),
        f: impl FnOnce(&PartitionBody) -> R,
    ) -> Result<R> {
        if let Some(body) = &*self.slots.partition(partition).look() {
            return Ok(f(body));
        }
        if !self.source.is_here(&self.partitions[partition].range()) {
            cold();
        }
        Ok(f(&*self.partition(partition)?))
    }

    #[cold]
    fn fetch_partition(&self, number: usize) -> Result<Arc<Held<PartitionBody>>> {
        let partition = self.partitions[number];
        let range = partition.range();
        let body = self.verified(range.clone(), None, |stored| {
            let (filter, index) = stored.split_at(partition.filter.bytes as usize);
            let filter = unseal(self.id, partition.filter.offset, BlockKind::Filter, filter)?;
            let index = unseal_block(self.id, partition.index.offset, BlockKind::Index, index)?;
            let filter = Filter::decode(filter)?;
            self.check_index(&index, partition)?;
            Ok(PartitionBody { filter, index })
        })?;
        let bytes = body.filter.bytes() + body.index.bytes();
        Ok(self.slots.keep_partition(number, body, bytes))
    }

    /// So that no handle in it can lead astray.
    fn check_index(&self, index: &Block, partition: Partition) -> Result<()> {
        let wrong =
            || Error::corrupt(format!("{}: index at {} does not add up", self.id, partition.index.offset));
        if index.rows() != partition.blocks as usize {
            return Err(wrong());
        }
        for row in 0..index.rows() {
            let handle = Handle::decode(index.value(&index.row(row))).ok_or_else(wrong)?;
            if handle.offset.checked_add(handle.bytes.into()).is_none_or(|end| end > self.data_bytes) {
                return Err(wrong());
            }
        }
        Ok(())
    }

    /// A data block to look at and let go.
    #[inline]
    pub(super) fn look_at_block(&self, place: &BlockPlace) -> Result<BlockGuard> {
        let BlockPlace { partition, block, handle } = *place;
        let guard = self.slots.block(partition, block).look();
        if guard.is_some() {
            self.cache.count_hit();
            return Ok(BlockGuard::Looked(guard));
        }
        Ok(BlockGuard::Fetched(self.fetch_block(partition, block, handle, None)?))
    }

    /// A data block, from the cache or fetched into it.
    #[inline]
    pub(super) fn block(&self, place: &BlockPlace) -> Result<Arc<Held<Block>>> {
        let BlockPlace { partition, block, handle } = *place;
        if let Some(held) = &*self.slots.block(partition, block).look() {
            self.cache.count_hit();
            return Ok(Arc::clone(held));
        }
        self.fetch_block(partition, block, handle, None)
    }

    /// The same for an iterator, which reads windows.
    pub(super) fn block_in_window(
        &self,
        partition: usize,
        block: usize,
        handle: Handle,
        purpose: Purpose,
        window: &mut Window,
    ) -> Result<Arc<Held<Block>>> {
        let slot = self.slots.block(partition, block);
        match purpose {
            Purpose::Query => {
                if let Some(held) = &*slot.look() {
                    self.cache.count_hit();
                    window.pass(handle.range());
                    return Ok(Arc::clone(held));
                }
                self.fetch_block(partition, block, handle, Some(window))
            }
            Purpose::Compaction | Purpose::Probe => match slot.peek() {
                Some(held) => Ok(held),
                None => {
                    let data = self.decoded_block(handle, Some(window))?;
                    let bytes = data.bytes();
                    Ok(Slots::<PartitionBody, FirstPartFilter, Block>::unkept(data, bytes))
                }
            },
        }
    }

    #[cold]
    fn fetch_block(
        &self,
        partition: usize,
        block: usize,
        handle: Handle,
        window: Option<&mut Window>,
    ) -> Result<Arc<Held<Block>>> {
        self.cache.count_miss();
        let data = self.decoded_block(handle, window)?;
        let bytes = data.bytes();
        Ok(self.slots.keep_block(partition, block, data, bytes))
    }

    fn decoded_block(&self, handle: Handle, window: Option<&mut Window>) -> Result<Block> {
        self.verified(handle.range(), window, |stored| self.decode_block(handle, stored))
    }

    fn decode_block(&self, handle: Handle, stored: &[u8]) -> Result<Block> {
        let block = unseal_block(self.id, handle.offset, BlockKind::Data, stored)?;
        match self.loaded {
            None => Ok(block),
            Some(seqno) => block.committed_at(seqno),
        }
    }

    /// Fetches `range` and decodes it; what does not verify is fetched again past every local copy.
    fn verified<T>(
        &self,
        range: Range<u64>,
        window: Option<&mut Window>,
        decode: impl Fn(&[u8]) -> Result<T>,
    ) -> Result<T> {
        let stored = match window {
            Some(window) => window.read(&self.source, &self.cache, range.clone(), self.data_bytes)?,
            None => self.source.read(range.clone(), Keep::Yes)?,
        };
        match decode(&stored) {
            Err(error) if error.kind() == Kind::Corrupt && self.source.distrust(range.clone()) => {
                tracing::warn!(sst = %self.id, %error, "a local copy is damaged; reading the bucket's");
                decode(&self.source.read(range, Keep::Yes)?)
            }
            answer => answer,
        }
    }
}

/// Which data block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockPlace {
    partition: usize,
    /// Within the partition.
    block: usize,
    handle: Handle,
}

impl BlockPlace {
    /// Where its bytes begin.
    pub(crate) fn offset(&self) -> u64 {
        self.handle.offset
    }
}

/// What [`Sst::rank`] found: the number of the block among all, and about what lies before it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rank {
    pub(super) block: u32,
    pub(super) entries: u64,
    pub(super) bytes: u64,
}

/// What the end of an sst says, checked.
struct Tail {
    top: Block,
    partitions: Box<[Partition]>,
    blocks: u32,
    data_bytes: u64,
}

impl Tail {
    fn read(meta: &SstMeta, source: &ByteSource) -> Result<Self> {
        let id = meta.id;
        let wrong = |what: &str| Error::corrupt(format!("{id}: {what}"));
        let range = tail_range(meta.bytes);
        let start = range.start;
        let tail = source.read(range, Keep::Yes)?;
        let footer = Footer::decode(id, meta.bytes, &tail)?;
        let fetch = |handle: Handle| -> Result<Bytes> {
            let end = handle.offset.checked_add(handle.bytes.into()).filter(|&end| end <= meta.bytes);
            let end = end.ok_or_else(|| wrong("its footer points past its end"))?;
            match handle.offset.checked_sub(start) {
                Some(from) => Ok(tail.slice(from as usize..(end - start) as usize)),
                None => source.read(handle.offset..end, Keep::Yes),
            }
        };
        let summary = unseal(id, footer.summary.offset, BlockKind::Summary, &fetch(footer.summary)?)?;
        let summary = SstSummary::decode(&summary).ok_or_else(|| wrong("its summary does not add up"))?;
        let blocks = summary.blocks;
        let said = summary.into_meta(id, meta.bytes);
        let said = match meta.loaded {
            true if said.seqno_max > Seqno(0) => {
                return Err(wrong("it has seqnos of its own, and a load wrote it"));
            }
            true => said.committed_at(meta.seqno_min),
            false => said,
        };
        if said != *meta {
            return Err(wrong("its summary is not what the manifest says of it"));
        }
        let top = unseal_block(id, footer.top.offset, BlockKind::Top, &fetch(footer.top)?)?;
        let partitions: Option<Box<[Partition]>> =
            (0..top.rows()).map(|row| Partition::decode(footer.version, top.value(&top.row(row)))).collect();
        let partitions = partitions.ok_or_else(|| wrong("its top index does not add up"))?;
        let data_bytes = partitions.first().map_or(0, |partition| partition.first_parts.offset);
        let (mut at, mut block) = (data_bytes, 0u32);
        for partition in &partitions {
            let in_place = partition.first_parts.offset == at
                && partition.filter.offset == partition.first_parts.range().end
                && partition.index.offset == partition.filter.range().end
                && partition.first_block == block
                && partition.blocks > 0;
            if !in_place {
                return Err(wrong("its top index does not add up"));
            }
            at = partition.index.range().end;
            block = block.saturating_add(partition.blocks);
        }
        if at != footer.top.offset || block != blocks {
            return Err(wrong("its top index does not add up"));
        }
        Ok(Self { top, partitions, blocks, data_bytes })
    }
}

impl Partition {
    /// The bytes that are fetched together.
    fn range(&self) -> Range<u64> {
        self.filter.offset..self.index.range().end
    }

    fn decode(version: u32, entry: &[u8]) -> Option<Self> {
        let filter = Handle::decode(entry)?;
        let index = Handle::decode(entry.get(Handle::ENCODED_BYTES..)?)?;
        let (first_block, rest) = entry.get(2 * Handle::ENCODED_BYTES..)?.split_first_chunk()?;
        let (blocks, rest) = rest.split_first_chunk()?;
        let first_parts = match version {
            1 => Handle { offset: filter.offset, bytes: 0 },
            _ => Handle::decode(rest)?,
        };
        first_parts.offset.checked_add(first_parts.bytes.into())?;
        filter.offset.checked_add(filter.bytes.into())?;
        index.offset.checked_add(index.bytes.into())?;
        Some(Self {
            first_parts,
            filter,
            index,
            first_block: u32::from_le_bytes(*first_block),
            blocks: u32::from_le_bytes(*blocks),
        })
    }
}

/// The handle in a row of an index that `check_index` accepted.
#[inline]
pub(super) fn handle_at(index: &Block, row: usize) -> Handle {
    Handle::decode(index.value(&index.row(row))).expect("checked when the partition was loaded")
}

#[inline(always)]
fn found(block: BlockGuard, row: usize, full_key: &[u8]) -> Option<Found> {
    let row = block.row(row);
    if block.key(&row) != full_key {
        return None;
    }
    Some(Found { block, row })
}

/// Counts and key range of an sst, kept in it so that it can be checked against the manifest, and inspected without.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SstSummary {
    pub(crate) entries: u64,
    pub(crate) tombstones: u64,
    pub(crate) seqno_min: Seqno,
    pub(crate) seqno_max: Seqno,
    pub(crate) blocks: u32,
    pub(crate) first_key: Vec<u8>,
    pub(crate) last_key: Vec<u8>,
}

impl SstSummary {
    pub(super) fn count(&mut self, full_key: &[u8], seqno: Seqno, kind: OpKind) {
        if self.entries == 0 {
            self.first_key = full_key.to_vec();
            self.seqno_min = seqno;
        }
        self.entries += 1;
        self.tombstones += u64::from(kind == OpKind::Delete);
        self.seqno_min = self.seqno_min.min(seqno);
        self.seqno_max = self.seqno_max.max(seqno);
        self.last_key.clear();
        self.last_key.extend_from_slice(full_key);
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(44 + self.first_key.len() + self.last_key.len());
        for number in [self.entries, self.tombstones, self.seqno_min.0, self.seqno_max.0] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.blocks.to_le_bytes());
        for key in [&self.first_key, &self.last_key] {
            out.extend_from_slice(&(key.len() as u32).to_le_bytes());
            out.extend_from_slice(key);
        }
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        fn number<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
            let (number, rest) = bytes.split_first_chunk()?;
            *bytes = rest;
            Some(*number)
        }
        fn key(bytes: &mut &[u8]) -> Option<Vec<u8>> {
            let length = u32::from_le_bytes(number(bytes)?) as usize;
            let (key, rest) = bytes.split_at_checked(length)?;
            *bytes = rest;
            Some(key.to_vec())
        }
        let rest = &mut &bytes[..];
        Some(Self {
            entries: u64::from_le_bytes(number(rest)?),
            tombstones: u64::from_le_bytes(number(rest)?),
            seqno_min: Seqno(u64::from_le_bytes(number(rest)?)),
            seqno_max: Seqno(u64::from_le_bytes(number(rest)?)),
            blocks: u32::from_le_bytes(number(rest)?),
            first_key: key(rest)?,
            last_key: key(rest)?,
        })
    }

    /// What the manifest says of an sst with this summary.
    pub(crate) fn into_meta(self, id: SstId, bytes: u64) -> SstMeta {
        SstMeta {
            id,
            bytes,
            entries: self.entries,
            tombstones: self.tombstones,
            first_key: self.first_key.into_boxed_slice(),
            last_key: self.last_key.into_boxed_slice(),
            seqno_min: self.seqno_min,
            seqno_max: self.seqno_max,
            loaded: false,
            opened: Default::default(),
        }
    }
}

/// What the manifest should say of `object`, by its own account.
pub(super) fn meta_of(id: SstId, object: &Bytes) -> Result<SstMeta> {
    let wrong = || Error::corrupt(format!("{id}: its summary does not add up"));
    let bytes = object.len() as u64;
    let handle = Footer::decode(id, bytes, object)?.summary;
    let end = handle.offset.checked_add(handle.bytes.into()).filter(|&end| end <= bytes).ok_or_else(wrong)?;
    let sealed = &object[handle.offset as usize..end as usize];
    let summary = unseal(id, handle.offset, BlockKind::Summary, sealed)?;
    Ok(SstSummary::decode(&summary).ok_or_else(wrong)?.into_meta(id, bytes))
}

/// Calls `see` with each data block's handle, packing and block, in order.
pub(super) fn each_block(
    meta: &SstMeta,
    object: &Bytes,
    mut see: impl FnMut(Handle, Compression, &Block),
) -> Result<()> {
    let sst = Sst::open(meta, ByteSource::Memory(object.clone()), &BlockCache::new(0))?;
    for partition in 0..sst.partitions() {
        let body = sst.partition(partition)?;
        for row in 0..body.index.rows() {
            let handle = handle_at(&body.index, row);
            let sealed = &object[handle.offset as usize..handle.range().end as usize];
            let sealed = check_seal(meta.id, handle.offset, BlockKind::Data, sealed)?;
            see(handle, sealed.compression, &sst.decoded_block(handle, None)?);
        }
    }
    Ok(())
}

/// Checks every checksum in `bytes`, which should be the sst that the manifest calls `meta`.
pub(crate) fn verify(meta: &SstMeta, bytes: &Bytes) -> Result<()> {
    let id = meta.id;
    if bytes.len() as u64 != meta.bytes {
        return Err(Error::corrupt(format!(
            "{id}: {} bytes where the manifest says {}",
            bytes.len(),
            meta.bytes
        )));
    }
    let source = ByteSource::Memory(bytes.clone());
    let cache = BlockCache::new(0);
    let sst = Sst::open(meta, source, &cache)?;
    let mut at = 0;
    for partition in 0..sst.partitions() {
        sst.partition_may_hold(partition, TreeId(0), 0)?;
        let body = sst.partition(partition)?;
        for block in 0..body.index.rows() {
            let handle = handle_at(&body.index, block);
            if handle.offset != at {
                return Err(Error::corrupt(format!("{id}: a gap at {at}")));
            }
            at = handle.range().end;
            check_seal(id, handle.offset, BlockKind::Data, &bytes[handle.offset as usize..at as usize])?;
        }
    }
    if at != sst.data_bytes {
        return Err(Error::corrupt(format!("{id}: a gap at {at}")));
    }
    Ok(())
}
