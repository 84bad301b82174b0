//! The ssts of a branch, wherever their bytes are: a local file, the bucket, and on the way memory.
//!
//! * An sst that is not in the bucket yet has a local file, which nothing but `forget` removes.
//! * The bucket is the truth: what does not verify locally is dropped and read from there.
//! * A chunk is fetched by one thread at a time, however many want it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bucket::{Bucket, Names, ObjectName};
use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use crate::cache::{
    BlockCache, BlockCacheStatus, DiskCache, DiskCacheStatus, Lookup, chunk_range, chunks_of,
};
use crate::disk::Disk;
use crate::first_part::FirstParts;
use crate::sst::{self, Sst};
use crate::version::{SstMeta, Version};
use crate::{BranchId, Error, Kind, Result, SstId};

/// What a store is made of.
pub(crate) struct StoreParts {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) bucket: Arc<dyn Bucket>,
    pub(crate) names: Names,
    /// Whose ssts these are.
    pub(crate) branch: BranchId,
    pub(crate) block_cache_bytes: usize,
    pub(crate) disk_cache_bytes: u64,
}

/// Ssts by name.
pub(crate) struct SstStore {
    bucket: Arc<dyn Bucket>,
    names: Names,
    blocks: Arc<BlockCache>,
    /// What the filters of new ssts are made by, and old ones asked with.
    first_parts: Arc<FirstParts>,
    local: DiskCache,
    /// What the ssts that are not in the bucket yet should be.
    pinned: Mutex<BTreeMap<SstId, SstMeta>>,
    /// Chunks that some thread is fetching.
    flights: Mutex<BTreeMap<(SstId, u32), Arc<Flight>>>,
}

impl SstStore {
    /// A store without local files; those of an earlier life come in with `adopt`.
    pub(crate) fn new(parts: StoreParts) -> Arc<Self> {
        Arc::new(Self {
            bucket: parts.bucket,
            names: parts.names,
            blocks: BlockCache::new(parts.block_cache_bytes),
            first_parts: Arc::default(),
            local: DiskCache::new(parts.disk, parts.branch, parts.disk_cache_bytes),
            pinned: Mutex::default(),
            flights: Mutex::default(),
        })
    }

    /// Takes over the local copies of an earlier life, of ssts that `version` names, and of `loads`: these are in the bucket. All other
    /// local sst and cache files are removed. Call it once, before ssts are written.
    pub(crate) fn adopt(
        &self,
        version: &Version,
        loads: impl IntoIterator<Item = Arc<SstMeta>>,
    ) -> Result<()> {
        let named = version.ssts().map(|(_, sst)| (sst.id, sst.bytes));
        let live: BTreeMap<SstId, u64> =
            named.chain(loads.into_iter().map(|sst| (sst.id, sst.bytes))).collect();
        self.local.adopt(&|id| live.get(&id).copied())
    }

    /// The open sst that the manifest calls `meta`; opened at its first use, for as long as `meta` lives.
    #[inline]
    pub(crate) fn open<'a>(self: &Arc<Self>, meta: &'a Arc<SstMeta>) -> Result<&'a Arc<Sst>> {
        match meta.opened.0.get() {
            Some(sst) => Ok(sst),
            None => self.open_first(meta),
        }
    }

    /// Whether `open` would not have to ask the bucket.
    pub(crate) fn opens_here(&self, meta: &SstMeta) -> bool {
        meta.opened.0.get().is_some() || self.local.has(meta.id, &sst::tail_range(meta.bytes))
    }

    #[cold]
    fn open_first<'a>(self: &Arc<Self>, meta: &'a Arc<SstMeta>) -> Result<&'a Arc<Sst>> {
        let source = ByteSource::Stored { store: Arc::clone(self), id: meta.id, bytes: meta.bytes };
        let sst = Arc::new(Sst::open(meta, source, &self.blocks)?);
        Ok(meta.opened.0.get_or_init(|| sst))
    }

    /// Writes the sst to a local file that stays until it is in the bucket. The file is not synced: until the sst is
    /// published its contents are in the wal.
    ///
    /// Copies in the disk cache make way. [`Kind::Full`] if that is not enough; nothing is left behind then.
    pub(crate) fn write_local(&self, meta: &Arc<SstMeta>, bytes: &Bytes) -> Result<()> {
        assert_eq!(bytes.len() as u64, meta.bytes, "{}: its meta says otherwise", meta.id);
        self.local.write_pinned(meta.id, bytes)?;
        // Closed: an open sst holds on to the store.
        self.pinned.lock().insert(meta.id, SstMeta { opened: OpenSst::default(), ..SstMeta::clone(meta) });
        Ok(())
    }

    /// Returns once the sst, written by `write_local`, is in the bucket. Calling it again is harmless.
    ///
    /// Its local file is read back and verified first: damage stays here and never becomes the truth.
    pub(crate) fn upload(&self, id: SstId) -> Result<()> {
        let Some(meta) = self.pinned.lock().get(&id).cloned() else { return Ok(()) };
        let Some(bytes) = self.local.read_pinned(id)? else { return Ok(()) };
        sst::verify(&meta, &bytes)?;
        self.bucket.put(&self.object_name(id), bytes)?;
        self.pinned.lock().remove(&id);
        self.local.unpin(id);
        Ok(())
    }

    /// Returns once the sst is in the bucket, straight from memory. With `copy` a copy stays here as far as there is room.
    pub(crate) fn upload_new(&self, id: SstId, bytes: &Bytes, copy: bool) -> Result<()> {
        self.bucket.put(&self.object_name(id), bytes.clone())?;
        if copy {
            self.local.keep_sst(id, bytes);
        }
        Ok(())
    }

    /// Drops every local trace of an sst that nothing names any more. Readers that have it open may fail afterwards
    /// if its object is deleted, too.
    pub(crate) fn forget(&self, id: SstId) {
        self.pinned.lock().remove(&id);
        self.local.forget(id);
    }

    /// Where first parts of keys end.
    pub(crate) fn first_parts(&self) -> &Arc<FirstParts> {
        &self.first_parts
    }

    /// Bytes that are only here so far.
    pub(crate) fn unuploaded_bytes(&self) -> u64 {
        self.pinned.lock().values().map(|meta| meta.bytes).sum()
    }

    /// Data blocks that were not in memory, so far.
    #[inline]
    pub(crate) fn block_misses(&self) -> u64 {
        self.blocks.misses()
    }

    /// Counters of the block cache.
    pub(crate) fn block_cache_status(&self) -> BlockCacheStatus {
        self.blocks.status()
    }

    /// Counters of the disk cache.
    pub(crate) fn disk_cache_status(&self) -> DiskCacheStatus {
        self.local.status()
    }

    fn object_name(&self, id: SstId) -> ObjectName {
        self.names.sst(id.epoch.0, id.counter)
    }

    /// The bytes of `range`, from here or else from the bucket.
    fn read(&self, id: SstId, sst_bytes: u64, range: Range<u64>, keep: Keep) -> Result<Bytes> {
        let mark = keep == Keep::Yes;
        match self.local.look(id, range.clone(), mark)? {
            Lookup::Hit(bytes) => {
                self.local.count(true);
                Ok(bytes)
            }
            Lookup::Lacks(_) if keep == Keep::No => {
                self.local.count(false);
                self.fetch(id, std::slice::from_ref(&range))?.pop().ok_or_else(no_answer)
            }
            Lookup::Lacks(missing) => {
                self.local.count(false);
                self.read_chunks(id, sst_bytes, &range, &missing)
            }
        }
    }

    /// The bytes of `range`, of which the disk lacks some chunks: these are fetched, all at once, and kept.
    fn read_chunks(&self, id: SstId, sst_bytes: u64, range: &Range<u64>, missing: &[u32]) -> Result<Bytes> {
        let mut wanted = missing.to_vec();
        let mut pieces = BTreeMap::new();
        for chunk in chunks_of(range).filter(|chunk| !missing.contains(chunk)) {
            match self.local.look(id, part_of(range, sst_bytes, chunk), true)? {
                Lookup::Hit(bytes) => drop(pieces.insert(chunk, bytes)),
                Lookup::Lacks(_) => wanted.push(chunk), // evicted just now
            }
        }
        for (chunk, bytes) in self.fetch_chunks(id, sst_bytes, &wanted)? {
            let (part, whole) = (part_of(range, sst_bytes, chunk), chunk_range(sst_bytes, chunk));
            let piece = bytes.slice((part.start - whole.start) as usize..(part.end - whole.start) as usize);
            pieces.insert(chunk, piece);
        }
        if pieces.len() == 1 {
            return pieces.into_values().next().ok_or_else(no_answer);
        }
        let mut out = Vec::with_capacity((range.end - range.start) as usize);
        pieces.values().for_each(|piece| out.extend_from_slice(piece));
        Ok(Bytes::from(out))
    }

    /// Whole chunks from the bucket. A chunk that another thread is fetching is waited for, not fetched twice.
    fn fetch_chunks(&self, id: SstId, sst_bytes: u64, chunks: &[u32]) -> Result<Vec<(u32, Bytes)>> {
        let mut others = Vec::new();
        let mut departure = Departure { store: self, id, chunks: Vec::new() };
        let mut flights = self.flights.lock();
        for &chunk in chunks {
            match flights.entry((id, chunk)) {
                Entry::Occupied(flight) => others.push((chunk, Arc::clone(flight.get()))),
                Entry::Vacant(place) => {
                    departure.chunks.push((chunk, Arc::clone(place.insert(Arc::default()))));
                }
            }
        }
        drop(flights);
        // Ours first: whoever waits for us while we wait for them gets what they need.
        let ours: Vec<u32> = departure.chunks.iter().map(|(chunk, _)| *chunk).collect();
        let mut fetched = self.fetch_whole_chunks(id, sst_bytes, &ours)?;
        for ((chunk, flight), (_, bytes)) in departure.chunks.iter().zip(&fetched) {
            self.local.keep(id, *chunk, bytes);
            flight.land(Some(bytes.clone()));
        }
        drop(departure);
        let mut failed = Vec::new();
        for (chunk, flight) in others {
            match flight.wait() {
                Some(bytes) => fetched.push((chunk, bytes)),
                None => failed.push(chunk),
            }
        }
        fetched.extend(self.fetch_whole_chunks(id, sst_bytes, &failed)?);
        Ok(fetched)
    }

    fn fetch_whole_chunks(&self, id: SstId, sst_bytes: u64, chunks: &[u32]) -> Result<Vec<(u32, Bytes)>> {
        let ranges: Vec<_> = chunks.iter().map(|&chunk| chunk_range(sst_bytes, chunk)).collect();
        if ranges.is_empty() {
            return Ok(Vec::new());
        }
        Ok(chunks.iter().copied().zip(self.fetch(id, &ranges)?).collect())
    }

    fn fetch(&self, id: SstId, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let answer = self.bucket.get_ranges(&self.object_name(id), ranges);
        let pieces = answer.map_err(|error| match error.kind {
            bucket::ErrorKind::NotFound => {
                Error::corrupt(format!("{id}: the manifest names it, the bucket does not have it"))
                    .with_cause(error)
            }
            bucket::ErrorKind::BadRequest => {
                Error::corrupt(format!("{id}: its object is shorter than the manifest says"))
                    .with_cause(error)
            }
            _ => error.into(),
        })?;
        let whole = pieces.len() == ranges.len()
            && ranges.iter().zip(&pieces).all(|(range, piece)| range.end - range.start == piece.len() as u64);
        if whole { Ok(pieces) } else { Err(no_answer()) }
    }
}

/// A chunk on its way from the bucket.
#[derive(Default)]
struct Flight {
    landed: Mutex<Option<Option<Bytes>>>,
    news: Condvar,
}

impl Flight {
    fn land(&self, bytes: Option<Bytes>) {
        self.landed.lock().get_or_insert(bytes);
        self.news.notify_all();
    }

    /// What came; `None` if it did not.
    fn wait(&self) -> Option<Bytes> {
        let mut landed = self.landed.lock();
        loop {
            match &*landed {
                Some(bytes) => return bytes.clone(),
                None => self.news.wait(&mut landed),
            }
        }
    }
}

/// The flights that this thread began. However it leaves, they end.
struct Departure<'a> {
    store: &'a SstStore,
    id: SstId,
    chunks: Vec<(u32, Arc<Flight>)>,
}

impl Drop for Departure<'_> {
    fn drop(&mut self) {
        let mut flights = self.store.flights.lock();
        for (chunk, flight) in &self.chunks {
            flights.remove(&(self.id, *chunk));
            flight.land(None); // nothing, if bytes landed before
        }
    }
}

fn part_of(range: &Range<u64>, sst_bytes: u64, chunk: u32) -> Range<u64> {
    let whole = chunk_range(sst_bytes, chunk);
    whole.start.max(range.start)..whole.end.min(range.end)
}

fn no_answer() -> Error {
    Error::new(Kind::Bug, "a bucket that answers other bytes than it was asked for")
}

/// Whether what is fetched may be wanted again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    Yes,
    No,
}

/// Where an open sst gets its bytes from.
pub(crate) enum ByteSource {
    /// All of them are here.
    Memory(Bytes),
    /// The store knows.
    Stored {
        /// Which store.
        store: Arc<SstStore>,
        /// Its name there.
        id: SstId,
        /// How long it is.
        bytes: u64,
    },
}

impl ByteSource {
    /// The bytes of `range`, all of them, unverified.
    pub(crate) fn read(&self, range: Range<u64>, keep: Keep) -> Result<Bytes> {
        let bytes = match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::Stored { bytes, .. } => *bytes,
        };
        if range.end > bytes || range.start > range.end {
            return Err(Error::corrupt(format!("bytes {range:?} of an sst that has {bytes}")));
        }
        match self {
            Self::Memory(bytes) => Ok(bytes.slice(range.start as usize..range.end as usize)),
            Self::Stored { store, id, bytes } => store.read(*id, *bytes, range, keep),
        }
    }

    /// Whether a read of `range` would not have to ask the bucket.
    pub(crate) fn is_here(&self, range: &Range<u64>) -> bool {
        match self {
            Self::Memory(_) => true,
            Self::Stored { store, id, .. } => store.local.has(*id, range),
        }
    }

    /// Told that `range` did not verify; `true`: reading it again may give better bytes.
    pub(crate) fn distrust(&self, range: Range<u64>) -> bool {
        match self {
            Self::Memory(_) => false,
            Self::Stored { store, id, .. } => store.local.distrust(*id, range),
        }
    }
}

/// The open sst of a meta, once there is one. Says nothing about what the sst is, so all of them are equal.
#[derive(Clone, Default)]
pub struct OpenSst(OnceLock<Arc<Sst>>);

impl PartialEq for OpenSst {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for OpenSst {}
impl fmt::Debug for OpenSst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.get().is_some() { "open" } else { "closed" })
    }
}

#[cfg(test)]
mod tests;
