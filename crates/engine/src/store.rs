//! The ssts of a branch, wherever their bytes are: a local file, the bucket, and on the way memory.
//!
//! * An sst that is not in the bucket yet has a local file, which nothing but `forget` removes.
//! * The bucket is the truth: what does not verify locally is dropped and read from there.
//! * A chunk is fetched by one thread at a time, however many want it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bucket::{Bucket, Names, ObjectName};
use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use crate::cache::{
    BlockCache, BlockCacheStatus, DiskCache, DiskCacheStatus, Loan, Lookup, chunk_at, chunk_range, chunks_of,
};
use crate::disk::Disk;
use crate::first_part::FirstParts;
use crate::memtable::Memtable;
use crate::sst::{self, Sst};
use crate::version::{SstMeta, Version};
use crate::{BranchId, Clock, Error, Kind, Result, SstId};

/// What a store is made of.
pub(crate) struct StoreParts {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) bucket: Arc<dyn Bucket>,
    pub(crate) names: Names,
    /// Whose ssts these are.
    pub(crate) branch: BranchId,
    /// See [`crate::Settings::memory_bytes`].
    pub(crate) memory_bytes: usize,
    pub(crate) disk_cache_bytes: u64,
    /// Whether other threads may read ahead and evict. If not, everything happens in the call that wants it.
    pub(crate) threads: bool,
}

/// Windows that are read ahead at the same time, by all scans together. Each has a thread.
const READ_AHEAD_MAX: usize = 32;
/// How often a close looks whether they are back.
const SETTLE_POLL: Duration = Duration::from_millis(5);

/// Ssts by name.
pub(crate) struct SstStore {
    bucket: Arc<dyn Bucket>,
    names: Names,
    blocks: Arc<BlockCache>,
    /// What the filters of new ssts are made by, and old ones asked with.
    first_parts: Arc<FirstParts>,
    local: DiskCache,
    /// What is known of `local`.
    local_index: Loan,
    /// What the ssts that are not in the bucket yet should be.
    pinned: Mutex<BTreeMap<SstId, SstMeta>>,
    /// Chunks that some thread is fetching.
    flights: Mutex<BTreeMap<(SstId, u32), Arc<Flight>>>,
    threads: bool,
    /// Windows that are being read ahead.
    ahead: AtomicUsize,
    /// A thread evicts from the local disk.
    evicting: AtomicBool,
    /// Reads that had to wait for the bucket.
    waits: AtomicU64,
    /// How many do so now.
    waiting: AtomicUsize,
}

impl SstStore {
    /// A store without local files; those of an earlier life come in with `adopt`.
    pub(crate) fn new(parts: StoreParts) -> Arc<Self> {
        let blocks = BlockCache::new(parts.memory_bytes);
        Arc::new(Self {
            bucket: parts.bucket,
            names: parts.names,
            local_index: blocks.lend(0),
            blocks,
            first_parts: Arc::default(),
            local: DiskCache::new(parts.disk, parts.branch, parts.disk_cache_bytes),
            pinned: Mutex::default(),
            flights: Mutex::default(),
            threads: parts.threads,
            ahead: AtomicUsize::new(0),
            evicting: AtomicBool::new(false),
            waits: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
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

    /// The same, unless it is still to be opened.
    #[inline]
    pub(crate) fn opened<'a>(&self, meta: &'a SstMeta) -> Option<&'a Arc<Sst>> {
        meta.opened.0.get()
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
    pub(crate) fn upload(self: &Arc<Self>, id: SstId) -> Result<()> {
        let Some(meta) = self.pinned.lock().get(&id).cloned() else { return Ok(()) };
        let _whole = self.lend(meta.bytes as usize);
        let Some(bytes) = self.local.read_pinned(id)? else { return Ok(()) };
        sst::verify(&meta, &bytes)?;
        self.bucket.put(&self.object_name(id), bytes)?;
        self.pinned.lock().remove(&id);
        self.local.unpin(id);
        self.make_room();
        Ok(())
    }

    /// Returns once the sst is in the bucket, straight from memory. With `copy` a copy stays here as far as there is room.
    pub(crate) fn upload_new(self: &Arc<Self>, id: SstId, bytes: &Bytes, copy: bool) -> Result<()> {
        self.bucket.put(&self.object_name(id), bytes.clone())?;
        if copy {
            self.local.keep_sst(id, bytes);
            self.make_room();
        }
        Ok(())
    }

    /// Drops every local trace of an sst that nothing names any more. Readers that have it open may fail afterwards
    /// if its object is deleted, too.
    pub(crate) fn forget(&self, id: SstId) {
        self.pinned.lock().remove(&id);
        self.local.forget(id);
    }

    /// Takes memory that blocks do without as long as the loan lives.
    pub(crate) fn lend(&self, bytes: usize) -> Loan {
        self.blocks.lend(bytes)
    }

    /// See [`Memtable::count_memory`].
    pub(crate) fn count_memtable(&self, memtable: &Memtable, planned: usize) {
        memtable.count_memory(&self.blocks, planned);
    }

    /// See [`BlockCache::heed`].
    pub(crate) fn heed(&self, too_much: i64) {
        self.local_index.resize(self.local.index_bytes());
        self.blocks.heed(too_much);
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

    /// How hot the chunks of an sst are, here and in memory.
    pub(crate) fn heat_of(&self, meta: &SstMeta) -> BTreeMap<u32, u8> {
        let mut heat = self.local.heat(meta.id);
        let Some(sst) = self.opened(meta) else { return heat };
        for (_, offset, hits) in sst.blocks_at_hand() {
            let Some(hits) = hits else { continue };
            let heat = heat.entry(chunk_at(offset)).or_default();
            *heat = heat.saturating_add(1 + hits);
        }
        // Indexes and filters are read once and stay in memory; whoever reads the blocks anew needs them first.
        if let Some(hottest) = heat.values().copied().max() {
            let around = chunks_of(&(sst.data_bytes()..meta.bytes));
            heat.extend(around.map(|chunk| (chunk, hottest)));
        }
        heat
    }

    /// The same, on the local disk alone.
    pub(crate) fn disk_heat_of(&self, id: SstId) -> BTreeMap<u32, u8> {
        self.local.heat(id)
    }

    /// A chunk that is on the local disk is as good as read again so many times.
    pub(crate) fn heat_up(&self, id: SstId, chunk: u32, reads: u8) {
        self.local.heat_up(id, chunk, reads);
    }

    /// An sst that was written here holds what nobody read before, unless it is heated up.
    pub(crate) fn set_cold(&self, id: SstId) {
        self.local.set_cold(id);
    }

    /// Whether some read waits for the bucket now.
    pub(crate) fn readers_wait(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Whether more can be brought here without pushing anything out.
    pub(crate) fn has_room_to_warm(&self) -> bool {
        !self.local.is_nearly_full()
    }

    /// Brings chunks to the local disk, unless they are there. Returns how many came.
    pub(crate) fn warm_chunks(
        self: &Arc<Self>,
        id: SstId,
        sst_bytes: u64,
        chunks: Range<u32>,
    ) -> Result<usize> {
        let lacking = |chunk: &u32| {
            let range = chunk_range(sst_bytes, *chunk);
            !range.is_empty() && !self.local.has(id, &range)
        };
        let missing: Vec<u32> = chunks.filter(lacking).collect();
        Ok(self.fetch_chunks(id, sst_bytes, &missing)?.len())
    }

    /// Times that a read had to wait for the bucket, so far.
    pub(crate) fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    /// Whether other threads may work for a read.
    pub(crate) fn has_threads(&self) -> bool {
        self.threads
    }

    /// Returns when no thread works for a read any more, or `gives_up`.
    pub(crate) fn settle(&self, clock: &dyn Clock, gives_up: Duration) {
        let busy = || self.ahead.load(Ordering::Acquire) > 0 || self.evicting.load(Ordering::Acquire);
        while busy() && clock.now() < gives_up {
            clock.sleep(SETTLE_POLL);
        }
    }

    /// Starts to read `range` while the caller goes on. `None`: it is here already, or nobody can be sent for it.
    fn read_ahead(
        self: &Arc<Self>,
        id: SstId,
        bytes: u64,
        range: Range<u64>,
        keep: Keep,
        memory: &Arc<Loan>,
    ) -> Option<Arc<Flight>> {
        if !self.threads || self.local.has(id, &range) {
            return None;
        }
        let errand = Errand::begin(self, memory)?;
        let landing = Arc::clone(&errand.flight);
        let read = move || {
            let store = &errand.store;
            match store.read_uncounted(id, bytes, range, keep) {
                Ok(bytes) => errand.flight.land(Some(bytes)),
                Err(error) => tracing::debug!(%error, "not read ahead; the read will tell"),
            }
        };
        std::thread::Builder::new().name("cistern-ahead".to_owned()).spawn(read).ok()?;
        Some(landing)
    }

    /// Evicts what is too much on the local disk, in a thread of its own if there are threads.
    fn make_room(self: &Arc<Self>) {
        if !self.threads || self.local.is_far_too_full() {
            return self.local.make_room();
        }
        if !self.local.is_too_full() || self.evicting.swap(true, Ordering::AcqRel) {
            return;
        }
        let store = Arc::clone(self);
        let evict = move || {
            store.local.make_room();
            // What comes between these two lines waits for the next that comes.
            store.evicting.store(false, Ordering::Release);
        };
        if std::thread::Builder::new().name("cistern-evict".to_owned()).spawn(evict).is_err() {
            self.evicting.store(false, Ordering::Release);
            self.local.make_room();
        }
    }

    /// The bytes of `range`, from here or else from the bucket.
    fn read(self: &Arc<Self>, id: SstId, sst_bytes: u64, range: Range<u64>, keep: Keep) -> Result<Bytes> {
        if self.local.has(id, &range) {
            return self.read_uncounted(id, sst_bytes, range, keep);
        }
        self.wait_counted(|| self.read_uncounted(id, sst_bytes, range, keep))
    }

    fn wait_counted<R>(&self, wait: impl FnOnce() -> R) -> R {
        self.waits.fetch_add(1, Ordering::Relaxed);
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let answer = wait();
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        answer
    }

    fn read_uncounted(
        self: &Arc<Self>,
        id: SstId,
        sst_bytes: u64,
        range: Range<u64>,
        keep: Keep,
    ) -> Result<Bytes> {
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
    fn read_chunks(
        self: &Arc<Self>,
        id: SstId,
        sst_bytes: u64,
        range: &Range<u64>,
        missing: &[u32],
    ) -> Result<Bytes> {
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
            self.local.read_first(id, &part);
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
    fn fetch_chunks(
        self: &Arc<Self>,
        id: SstId,
        sst_bytes: u64,
        chunks: &[u32],
    ) -> Result<Vec<(u32, Bytes)>> {
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
        self.make_room();
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

/// Reading ahead, in another thread. However that ends, nobody waits for it any longer.
struct Errand {
    store: Arc<SstStore>,
    flight: Arc<Flight>,
    /// Whoever sent for it may go away before it is there.
    _memory: Arc<Loan>,
}

impl Errand {
    fn begin(store: &Arc<SstStore>, memory: &Arc<Loan>) -> Option<Self> {
        // Counted down by `drop`, also if this is one too many.
        let others = store.ahead.fetch_add(1, Ordering::Relaxed);
        let errand = Self { store: Arc::clone(store), flight: Arc::default(), _memory: Arc::clone(memory) };
        (others < READ_AHEAD_MAX).then_some(errand)
    }
}

impl Drop for Errand {
    fn drop(&mut self) {
        self.store.ahead.fetch_sub(1, Ordering::Relaxed);
        self.flight.land(None); // nothing, if bytes landed before
    }
}

/// Bytes on their way from the bucket.
#[derive(Default)]
pub(crate) struct Flight {
    landed: Mutex<Option<Option<Bytes>>>,
    news: Condvar,
}

impl Flight {
    fn land(&self, bytes: Option<Bytes>) {
        self.landed.lock().get_or_insert(bytes);
        self.news.notify_all();
    }

    fn has_landed(&self) -> bool {
        self.landed.lock().is_some()
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

    /// Starts to read `range`, into `memory`, while the caller goes on; `None`: it is not worth it, or not possible.
    pub(crate) fn read_ahead(
        &self,
        range: Range<u64>,
        keep: Keep,
        memory: &Arc<Loan>,
    ) -> Option<Arc<Flight>> {
        match self {
            Self::Memory(_) => None,
            Self::Stored { store, id, bytes } => store.read_ahead(*id, *bytes, range, keep, memory),
        }
    }

    /// What `read_ahead` brought; `None` if nothing came.
    pub(crate) fn wait_for(&self, flight: &Flight) -> Option<Bytes> {
        match self {
            Self::Stored { store, .. } if !flight.has_landed() => store.wait_counted(|| flight.wait()),
            _ => flight.wait(),
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

impl OpenSst {
    /// What readers took in vain for it, in steps.
    pub(crate) fn wasted(&self) -> u64 {
        self.0.get().map_or(0, |sst| sst.wasted())
    }
}

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
