//! What the local disk holds of the ssts: whole files that were written here, and chunks of objects fetched from the
//! bucket, appended to segment files.
//!
//! * A pinned sst (not in the bucket yet) is never evicted. Everything else is a copy and may go at any moment.
//! * Evictable bytes are at most the capacity, but for what was admitted a moment ago. The oldest file goes first,
//!   sst or segment; chunks of it that were read most since they came are appended anew. What a merge made of data that nobody read goes
//!   before all others.
//! * Nothing here is synced, pinned ssts included: until an sst is published, the wal has its contents. What survives a
//!   restart may be wrong: every block carries a checksum that names its sst and its place, the readers verify it, and
//!   `distrust` drops what failed.
//! * All files lie under the branch's identity: a data directory that meets another bucket starts with an empty cache.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_64;

use crate::disk::{Disk, DiskError, DiskFile};
use crate::limits::{CHUNK_BYTES, SST_BYTES};
use crate::{BranchId, Epoch, Result, SstId};

const CHUNK: u64 = CHUNK_BYTES as u64;
/// Files of ssts that are kept open; the process has a limit.
const OPEN_SSTS_MAX: usize = 4096;
/// Memory for one chunk: its place, its name in its segment, its share of the maps.
const INDEX_BYTES: usize = 112;
/// No more segments than this, whatever the capacity: each is an open file.
const SEGMENTS_MAX: u64 = 2048;

/// The local disk's share in reading ssts.
pub(crate) struct DiskCache {
    disk: Arc<dyn Disk>,
    ssts_directory: String,
    chunks_directory: String,
    capacity: u64,
    segment_bytes: u64,
    state: Mutex<State>,
    /// One thread evicts at a time; others go on.
    evicting: Mutex<()>,
    /// A failed write was reported; it will not be again until one succeeds.
    reported: AtomicBool,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// What SHOW STATUS tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCacheStatus {
    /// Reads that the local disk answered.
    pub hits: u64,
    /// Reads that had to ask the bucket for at least one chunk.
    pub misses: u64,
    /// Bytes that may be evicted.
    pub bytes: u64,
    /// Bytes that they may take.
    pub capacity: u64,
    /// Bytes of ssts that are not in the bucket yet.
    pub unuploaded_bytes: u64,
    /// How many ssts that are.
    pub unuploaded_ssts: u64,
}

#[derive(Default)]
struct State {
    ssts: BTreeMap<SstId, LocalSst>,
    chunks: BTreeMap<SstId, BTreeMap<u32, Chunk>>,
    segments: BTreeMap<u64, Segment>,
    /// The segment that chunks are appended to.
    current: Option<u64>,
    next_segment: u64,
    /// What may be evicted, oldest first.
    queue: VecDeque<Unit>,
    evictable_bytes: u64,
    /// Evictable ssts whose file is open, in the order of opening.
    opened: VecDeque<SstId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Sst(SstId),
    Segment(u64),
}

struct LocalSst {
    file: Option<Arc<dyn DiskFile>>,
    bytes: u64,
    pinned: bool,
    /// How often each of its chunks was read.
    reads: Vec<u8>,
    /// It replaces ssts that nobody read: unless somebody does, it is the first to go.
    cold: bool,
}

struct Chunk {
    segment: u64,
    offset: u64,
    bytes: u32,
    /// How often it was read since it came.
    reads: u8,
}

struct Segment {
    file: Arc<dyn DiskFile>,
    bytes: u64,
    entries: Vec<(SstId, u32)>,
}

/// What the disk has of a range.
pub(crate) enum Lookup {
    /// All of it.
    Hit(Bytes),
    /// It lacks these chunks, ascending.
    Lacks(Vec<u32>),
}

impl DiskCache {
    pub(crate) fn new(disk: Arc<dyn Disk>, branch: BranchId, capacity: u64) -> Self {
        let branch: String = branch.0.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            disk,
            ssts_directory: format!("sst/{branch}"),
            chunks_directory: format!("cache/{branch}"),
            capacity,
            segment_bytes: (capacity / 8).min(SST_BYTES as u64).max(capacity / SEGMENTS_MAX),
            state: Mutex::default(),
            evicting: Mutex::new(()),
            reported: AtomicBool::new(false),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    /// Takes over the files of an earlier life: copies of ssts for which `live` knows the length. Removes all others,
    /// those of other branches too.
    pub(crate) fn adopt(&self, live: &dyn Fn(SstId) -> Option<u64>) -> Result<()> {
        let mut ssts = VecDeque::new();
        for name in self.disk.list("sst")? {
            match self.adopt_sst(&name, live)? {
                Some(id) => ssts.push_back(Unit::Sst(id)),
                None => self.disk.remove(&name)?,
            }
        }
        let mut segments = VecDeque::new();
        for name in self.disk.list("cache")? {
            match self.adopt_segment(&name, live)? {
                Some(number) => segments.push_back(Unit::Segment(number)),
                None => self.disk.remove(&name)?,
            }
        }
        // Which of the two kinds is older is not known: they take turns.
        let mut state = self.state.lock();
        while !ssts.is_empty() || !segments.is_empty() {
            let next = [ssts.pop_front(), segments.pop_front()];
            state.queue.extend(next.into_iter().flatten());
        }
        drop(state);
        self.make_room();
        Ok(())
    }

    fn adopt_sst(&self, name: &str, live: &dyn Fn(SstId) -> Option<u64>) -> Result<Option<SstId>> {
        let Some(id) = name.strip_prefix(&self.ssts_directory).and_then(parse_sst) else { return Ok(None) };
        let mut state = self.state.lock();
        if state.ssts.contains_key(&id) {
            return Ok(Some(id)); // written in this life
        }
        let Some(bytes) = live(id) else { return Ok(None) };
        let file = self.disk.open(name)?;
        if file.len()? != bytes {
            return Ok(None);
        }
        state.evictable_bytes += bytes;
        state.ssts.insert(id, LocalSst::new(None, bytes, false));
        Ok(Some(id))
    }

    fn adopt_segment(&self, name: &str, live: &dyn Fn(SstId) -> Option<u64>) -> Result<Option<u64>> {
        let Some(number) = name.strip_prefix(&self.chunks_directory).and_then(parse_segment) else {
            return Ok(None);
        };
        let file = self.disk.open(name)?;
        let bytes = file.len()?;
        let entries = read_segment_index(&*file, bytes)?;
        let mut state = self.state.lock();
        state.next_segment = state.next_segment.max(number + 1);
        let mut kept = Vec::new();
        for entry in entries {
            if live(entry.id).is_none_or(|bytes| entry.bytes != chunk_bytes(bytes, entry.chunk)) {
                continue;
            }
            kept.push((entry.id, entry.chunk));
            let chunk = Chunk { segment: number, offset: entry.offset, bytes: entry.bytes, reads: 0 };
            state.chunks.entry(entry.id).or_default().insert(entry.chunk, chunk);
        }
        if kept.is_empty() {
            return Ok(None);
        }
        state.evictable_bytes += bytes;
        state.segments.insert(number, Segment { file, bytes, entries: kept });
        Ok(Some(number))
    }

    /// Writes the sst to a file of its own, pinned until `unpin`.
    ///
    /// [`Kind::Full`](crate::Kind::Full) if the disk is full even without the cache's copies; nothing is left behind.
    pub(crate) fn write_pinned(&self, id: SstId, bytes: &Bytes) -> Result<()> {
        let file = loop {
            match self.write_file(id, bytes) {
                Ok(file) => break file,
                Err(error) => {
                    self.remove_file(&self.sst_name(id));
                    let evicted = error.full && self.evict_one();
                    if !evicted {
                        return Err(error.into());
                    }
                }
            }
        };
        let mut state = self.state.lock();
        state.ssts.insert(id, LocalSst::new(Some(file), bytes.len() as u64, true));
        Ok(())
    }

    /// Keeps a copy of a whole sst that the bucket has, unless the disk is full.
    pub(crate) fn keep_sst(&self, id: SstId, bytes: &Bytes) {
        match self.write_file(id, bytes) {
            Ok(file) => {
                let sst = LocalSst::new(Some(file), bytes.len() as u64, true);
                self.state.lock().ssts.insert(id, sst);
                self.unpin(id);
            }
            Err(error) => {
                self.remove_file(&self.sst_name(id));
                self.report(&error);
            }
        }
    }

    fn write_file(&self, id: SstId, bytes: &[u8]) -> std::result::Result<Arc<dyn DiskFile>, DiskError> {
        let file = self.disk.create(&self.sst_name(id))?;
        file.write_at(0, bytes)?;
        Ok(file)
    }

    /// All bytes of a pinned sst; `None` if it is not pinned here.
    pub(crate) fn read_pinned(&self, id: SstId) -> Result<Option<Bytes>> {
        let (file, bytes) = match self.state.lock().ssts.get(&id) {
            Some(LocalSst { file: Some(file), bytes, pinned: true, .. }) => (Arc::clone(file), *bytes),
            _ => return Ok(None),
        };
        Ok(Some(read_file(&*file, 0..bytes)?))
    }

    /// The bucket has it now: the file becomes a copy like any other, and `make_room` may be due.
    pub(crate) fn unpin(&self, id: SstId) {
        let mut state = self.state.lock();
        let Some(sst) = state.ssts.get_mut(&id).filter(|sst| sst.pinned) else { return };
        sst.pinned = false;
        let (bytes, cold) = (sst.bytes, sst.cold && sst.reads.iter().all(|reads| *reads == 0));
        state.evictable_bytes += bytes;
        if cold {
            state.queue.push_front(Unit::Sst(id));
        } else {
            state.queue.push_back(Unit::Sst(id));
        }
        state.opened.push_back(id);
    }

    /// What is here of `range`. Bytes come as they are: the reader verifies. `mark`: the chunks are worth keeping.
    pub(crate) fn look(&self, id: SstId, range: Range<u64>, mark: bool) -> Result<Lookup> {
        let mut state = self.state.lock();
        let pieces = match state.piece_of_sst(self, id, &range, mark) {
            Some(piece) => vec![piece],
            None => match state.pieces_of_chunks(id, &range, mark) {
                Ok(pieces) => pieces,
                Err(missing) => return Ok(Lookup::Lacks(missing)),
            },
        };
        let pinned = state.ssts.get(&id).is_some_and(|sst| sst.pinned);
        drop(state);
        match read_pieces(&pieces, range.end - range.start) {
            Ok(bytes) => Ok(Lookup::Hit(bytes)),
            Err(error) if pinned => Err(error.into()),
            Err(error) => {
                tracing::warn!(sst = %id, %error, "a local copy can not be read; reading the bucket's");
                self.distrust(id, range.clone());
                Ok(Lookup::Lacks(chunks_of(&range).collect()))
            }
        }
    }

    /// Whether all of `range` is here, as far as is known without reading it.
    pub(crate) fn has(&self, id: SstId, range: &Range<u64>) -> bool {
        let state = self.state.lock();
        let chunks = state.chunks.get(&id);
        state.ssts.contains_key(&id)
            || chunks_of(range).all(|chunk| chunks.is_some_and(|chunks| chunks.contains_key(&chunk)))
    }

    /// Counts a read that was answered from here, or not.
    pub(crate) fn count(&self, hit: bool) {
        if hit { &self.hits } else { &self.misses }.fetch_add(1, Ordering::Relaxed);
    }

    /// Keeps a chunk that was fetched; `make_room` may be due afterwards. On failure it is simply not kept.
    pub(crate) fn keep(&self, id: SstId, chunk: u32, bytes: &Bytes) {
        if let Err(error) = self.append(id, chunk, bytes) {
            self.report(&error);
            if error.full {
                self.evict_one();
            }
        }
    }

    /// Whether `make_room` has something to do.
    pub(crate) fn is_too_full(&self) -> bool {
        self.state.lock().evictable_bytes > self.capacity
    }

    /// Whether whoever evicts is left behind by those who insert.
    pub(crate) fn is_far_too_full(&self) -> bool {
        self.state.lock().evictable_bytes > self.capacity + self.capacity / 16 + 2 * self.segment_bytes
    }

    fn append(&self, id: SstId, chunk: u32, bytes: &Bytes) -> std::result::Result<(), DiskError> {
        let length = HEADER_BYTES + bytes.len() as u64;
        if length > self.segment_bytes {
            return Ok(()); // no capacity to speak of
        }
        let Some((segment, file, offset)) = self.reserve(id, chunk, length)? else { return Ok(()) };
        let header = header(id, chunk, bytes.len() as u32);
        let written =
            file.write_at(offset, &header).and_then(|()| file.write_at(offset + HEADER_BYTES, bytes));
        let mut state = self.state.lock();
        if let Err(error) = written {
            if state.current == Some(segment) {
                state.current = None; // its tail is unknown: the next chunk starts a new one
            }
            return Err(error);
        }
        self.reported.store(false, Ordering::Relaxed);
        let Some(home) = state.segments.get_mut(&segment) else { return Ok(()) };
        home.entries.push((id, chunk));
        let place = Chunk { segment, offset: offset + HEADER_BYTES, bytes: bytes.len() as u32, reads: 0 };
        state.chunks.entry(id).or_default().insert(chunk, place);
        Ok(())
    }

    /// A place of `length` bytes in the current segment; `None` if the chunk is here already.
    #[expect(clippy::type_complexity, reason = "segment, file and offset, taken apart at once")]
    fn reserve(
        &self,
        id: SstId,
        chunk: u32,
        length: u64,
    ) -> std::result::Result<Option<(u64, Arc<dyn DiskFile>, u64)>, DiskError> {
        let mut state = self.state.lock();
        let state = &mut *state;
        if state.chunks.get(&id).is_some_and(|chunks| chunks.contains_key(&chunk)) {
            return Ok(None);
        }
        if let Some(number) = state.current
            && state.segments.get(&number).is_none_or(|segment| segment.bytes + length > self.segment_bytes)
        {
            state.current = None;
            state.seal(number)?;
        }
        let number = match state.current {
            Some(number) => number,
            None => {
                let number = state.next_segment;
                state.next_segment += 1;
                let file = self.disk.create(&self.segment_name(number))?;
                state.segments.insert(number, Segment { file, bytes: 0, entries: Vec::new() });
                state.queue.push_back(Unit::Segment(number));
                state.current = Some(number);
                number
            }
        };
        let segment = state.segments.get_mut(&number).expect("the current segment is there");
        let offset = segment.bytes;
        segment.bytes += length;
        state.evictable_bytes += length;
        Ok(Some((number, Arc::clone(&segment.file), offset)))
    }

    /// Drops every copy of `range`, for the next one may be no better. `true`: the bucket may have better bytes.
    pub(crate) fn distrust(&self, id: SstId, range: Range<u64>) -> bool {
        let mut state = self.state.lock();
        if state.ssts.get(&id).is_some_and(|sst| sst.pinned) {
            return false;
        }
        if let Some(chunks) = state.chunks.get_mut(&id) {
            for chunk in chunks_of(&range) {
                chunks.remove(&chunk);
            }
        }
        if state.drop_sst(id) {
            drop(state);
            self.remove_file(&self.sst_name(id));
        }
        true
    }

    /// Drops all that is here of an sst, pinned or not.
    pub(crate) fn forget(&self, id: SstId) {
        let mut state = self.state.lock();
        state.chunks.remove(&id); // their bytes go with their segments
        if state.drop_sst(id) {
            drop(state);
            self.remove_file(&self.sst_name(id));
        }
    }

    /// How often chunks of an sst were read since they came here, those that were.
    pub(crate) fn heat(&self, id: SstId) -> BTreeMap<u32, u8> {
        let state = self.state.lock();
        let whole = state.ssts.get(&id).map(|sst| (0..).zip(sst.reads.iter().copied()));
        let pieces =
            state.chunks.get(&id).map(|chunks| chunks.iter().map(|(chunk, place)| (*chunk, place.reads)));
        let all = whole.into_iter().flatten().chain(pieces.into_iter().flatten());
        all.filter(|(_, reads)| *reads > 0).collect()
    }

    /// A pinned sst that holds what nobody read before.
    pub(crate) fn set_cold(&self, id: SstId) {
        if let Some(sst) = self.state.lock().ssts.get_mut(&id) {
            sst.cold = true;
        }
    }

    /// A chunk that is here counts as read so many times, at least.
    pub(crate) fn heat_up(&self, id: SstId, chunk: u32, reads: u8) {
        let mut state = self.state.lock();
        if let Some(count) = state.ssts.get_mut(&id).and_then(|sst| sst.reads.get_mut(chunk as usize)) {
            *count = (*count).max(reads);
        }
    }

    /// Whether what is brought here unasked would soon push out something else.
    pub(crate) fn is_nearly_full(&self) -> bool {
        self.state.lock().evictable_bytes > self.capacity / 10 * 9
    }

    /// Counters and sizes at about this moment.
    pub(crate) fn status(&self) -> DiskCacheStatus {
        let state = self.state.lock();
        let pinned = || state.ssts.values().filter(|sst| sst.pinned);
        DiskCacheStatus {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            bytes: state.evictable_bytes,
            capacity: self.capacity,
            unuploaded_bytes: pinned().map(|sst| sst.bytes).sum(),
            unuploaded_ssts: pinned().count() as u64,
        }
    }

    /// About what is kept in memory of the chunks that are here.
    pub(crate) fn index_bytes(&self) -> usize {
        (self.state.lock().evictable_bytes / CHUNK) as usize * INDEX_BYTES
    }

    /// Evicts while there is too much. Another thread that already does so is left to it.
    pub(crate) fn make_room(&self) {
        let Some(_evicting) = self.evicting.try_lock() else { return };
        while self.state.lock().evictable_bytes > self.capacity && self.evict_oldest() {}
    }

    /// Evicts one file; `false` if there is none.
    fn evict_one(&self) -> bool {
        let _evicting = self.evicting.lock();
        self.evict_oldest()
    }

    fn evict_oldest(&self) -> bool {
        let mut state = self.state.lock();
        let before = state.evictable_bytes;
        let (name, mut kept) = loop {
            let Some(unit) = state.queue.pop_front() else { return false };
            let found = match unit {
                Unit::Sst(id) => state.evict_sst(self, id).map(|kept| (self.sst_name(id), kept)),
                Unit::Segment(number) => {
                    state.evict_segment(number).map(|kept| (self.segment_name(number), kept))
                }
            };
            if let Some(found) = found {
                break found;
            }
        };
        // At most half of what goes comes back, so that room is made whatever was read.
        let mut room = (before - state.evictable_bytes) / 2;
        drop(state);
        kept.sort_by_key(|kept| std::cmp::Reverse(kept.reads));
        for Kept { id, chunk, piece, .. } in kept {
            let Some(rest) = room.checked_sub(piece.bytes + HEADER_BYTES) else { break };
            room = rest;
            let moved = read_file(&*piece.file, piece.offset..piece.offset + piece.bytes)
                .and_then(|bytes| self.append(id, chunk, &bytes));
            if let Err(error) = moved {
                self.report(&error);
                break;
            }
        }
        self.remove_file(&name);
        true
    }

    fn remove_file(&self, name: &str) {
        if let Err(error) = self.disk.remove(name) {
            self.report(&error);
        }
    }

    fn report(&self, error: &DiskError) {
        if !self.reported.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "the disk cache goes on without this");
        }
    }

    fn sst_name(&self, id: SstId) -> String {
        format!("{}/{:016x}-{:016x}", self.ssts_directory, id.epoch.0, id.counter)
    }

    fn segment_name(&self, number: u64) -> String {
        format!("{}/{number:016x}", self.chunks_directory)
    }
}

/// Bytes in an open file.
struct Piece {
    file: Arc<dyn DiskFile>,
    offset: u64,
    bytes: u64,
}

/// A chunk that outlives its file's eviction.
struct Kept {
    id: SstId,
    chunk: u32,
    reads: u8,
    piece: Piece,
}

impl State {
    fn piece_of_sst(
        &mut self,
        cache: &DiskCache,
        id: SstId,
        range: &Range<u64>,
        mark: bool,
    ) -> Option<Piece> {
        let file = self.open_sst(cache, id)?;
        let sst = self.ssts.get_mut(&id).filter(|sst| range.end <= sst.bytes)?;
        for chunk in chunks_of(range) {
            let reads = &mut sst.reads[chunk as usize];
            *reads = reads.saturating_add(mark.into());
        }
        Some(Piece { file, offset: range.start, bytes: range.end - range.start })
    }

    /// The file of a local sst, opened if need be; another one may be closed for it.
    fn open_sst(&mut self, cache: &DiskCache, id: SstId) -> Option<Arc<dyn DiskFile>> {
        let sst = self.ssts.get_mut(&id)?;
        if let Some(file) = &sst.file {
            return Some(Arc::clone(file));
        }
        let file = match cache.disk.open(&cache.sst_name(id)) {
            Ok(file) => file,
            Err(error) => {
                cache.report(&error);
                self.drop_sst(id);
                return None;
            }
        };
        sst.file = Some(Arc::clone(&file));
        self.opened.push_back(id);
        if self.opened.len() > OPEN_SSTS_MAX
            && let Some(oldest) = self.opened.pop_front()
            && let Some(sst) = self.ssts.get_mut(&oldest).filter(|sst| !sst.pinned)
        {
            sst.file = None;
        }
        Some(file)
    }

    /// Pieces that make up `range`, in order, or the chunks that are not here.
    fn pieces_of_chunks(
        &mut self,
        id: SstId,
        range: &Range<u64>,
        mark: bool,
    ) -> std::result::Result<Vec<Piece>, Vec<u32>> {
        let Some(chunks) = self.chunks.get_mut(&id) else { return Err(chunks_of(range).collect()) };
        let missing: Vec<u32> = chunks_of(range).filter(|chunk| !chunks.contains_key(chunk)).collect();
        if !missing.is_empty() {
            return Err(missing);
        }
        let mut pieces = Vec::new();
        for number in chunks_of(range) {
            let chunk = chunks.get_mut(&number).expect("none is missing");
            chunk.reads = chunk.reads.saturating_add(mark.into());
            let start = u64::from(number) * CHUNK;
            let from = range.start.max(start) - start;
            let to = (range.end - start).min(u64::from(chunk.bytes));
            let segment = &self.segments[&chunk.segment];
            pieces.push(Piece {
                file: Arc::clone(&segment.file),
                offset: chunk.offset + from,
                bytes: to.saturating_sub(from),
            });
        }
        Ok(pieces)
    }

    /// Whether there was one.
    fn drop_sst(&mut self, id: SstId) -> bool {
        let Some(sst) = self.ssts.remove(&id) else { return false };
        if !sst.pinned {
            self.evictable_bytes -= sst.bytes;
            self.queue.retain(|unit| *unit != Unit::Sst(id));
            self.opened.retain(|opened| *opened != id);
        }
        true
    }

    /// Takes a local sst out, unless it is gone; returns the chunks of it that were read.
    fn evict_sst(&mut self, cache: &DiskCache, id: SstId) -> Option<Vec<Kept>> {
        let bytes = self.ssts.get(&id).filter(|sst| !sst.pinned)?.bytes;
        let file = self.open_sst(cache, id)?;
        let reads = std::mem::take(&mut self.ssts.get_mut(&id)?.reads);
        self.drop_sst(id);
        let kept = (0..).zip(reads).filter(|(_, reads)| *reads > 0).map(|(chunk, reads)| {
            let offset = u64::from(chunk) * CHUNK;
            let piece = Piece { file: Arc::clone(&file), offset, bytes: chunk_bytes(bytes, chunk).into() };
            Kept { id, chunk, reads, piece }
        });
        Some(kept.collect())
    }

    /// The same for a segment.
    fn evict_segment(&mut self, number: u64) -> Option<Vec<Kept>> {
        let segment = self.segments.remove(&number)?;
        self.evictable_bytes -= segment.bytes;
        if self.current == Some(number) {
            self.current = None;
        }
        let mut kept = Vec::new();
        for (id, chunk) in segment.entries {
            let Some(chunks) = self.chunks.get_mut(&id) else { continue };
            if chunks.get(&chunk).is_none_or(|place| place.segment != number) {
                continue;
            }
            let place = chunks.remove(&chunk).expect("just seen");
            if place.reads > 0 {
                let piece = Piece {
                    file: Arc::clone(&segment.file),
                    offset: place.offset,
                    bytes: place.bytes.into(),
                };
                kept.push(Kept { id, chunk, reads: place.reads, piece });
            }
            if chunks.is_empty() {
                self.chunks.remove(&id);
            }
        }
        Some(kept)
    }

    /// Ends a segment with its index, for the next start.
    fn seal(&mut self, number: u64) -> std::result::Result<(), DiskError> {
        let Some(segment) = self.segments.get_mut(&number) else { return Ok(()) };
        let mut index = Vec::new();
        for (id, chunk) in &segment.entries {
            let place = self.chunks.get(id).and_then(|chunks| chunks.get(chunk));
            if let Some(place) = place.filter(|place| place.segment == number) {
                SegmentEntry { id: *id, chunk: *chunk, bytes: place.bytes, offset: place.offset }
                    .encode(&mut index);
            }
        }
        let count = (index.len() / SegmentEntry::BYTES) as u64;
        index.extend_from_slice(&count.to_le_bytes());
        let checksum = xxh3_64(&index);
        index.extend_from_slice(&checksum.to_le_bytes());
        index.extend_from_slice(&SEGMENT_MAGIC);
        let offset = segment.bytes;
        segment.bytes += index.len() as u64;
        self.evictable_bytes += index.len() as u64;
        segment.file.write_at(offset, &index)
    }
}

impl LocalSst {
    fn new(file: Option<Arc<dyn DiskFile>>, bytes: u64, pinned: bool) -> Self {
        Self { file, bytes, pinned, reads: vec![0; bytes.div_ceil(CHUNK) as usize], cold: false }
    }
}

// ---- the bytes of a segment (`docs/formats/disk-cache.md`): a cache, so an unknown version is just empty ----

const SEGMENT_MAGIC: [u8; 8] = *b"CISTchk\x01";
const HEADER_BYTES: u64 = 40;
const TRAILER_BYTES: u64 = 24;

/// Before each chunk: what it is, for segments that never got their index.
fn header(id: SstId, chunk: u32, bytes: u32) -> [u8; HEADER_BYTES as usize] {
    let mut header = [0; HEADER_BYTES as usize];
    header[..8].copy_from_slice(&SEGMENT_MAGIC);
    header[8..16].copy_from_slice(&id.epoch.0.to_le_bytes());
    header[16..24].copy_from_slice(&id.counter.to_le_bytes());
    header[24..28].copy_from_slice(&chunk.to_le_bytes());
    header[28..32].copy_from_slice(&bytes.to_le_bytes());
    let checksum = xxh3_64(&header[..32]);
    header[32..].copy_from_slice(&checksum.to_le_bytes());
    header
}

struct SegmentEntry {
    id: SstId,
    chunk: u32,
    bytes: u32,
    offset: u64,
}

impl SegmentEntry {
    const BYTES: usize = 32;

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.epoch.0.to_le_bytes());
        out.extend_from_slice(&self.id.counter.to_le_bytes());
        out.extend_from_slice(&self.chunk.to_le_bytes());
        out.extend_from_slice(&self.bytes.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
    }

    fn decode(entry: &[u8; Self::BYTES]) -> Self {
        let long = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().expect("eight bytes"));
        let short = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("four bytes"));
        let id = SstId { epoch: Epoch(long(0)), counter: long(8) };
        Self { id, chunk: short(16), bytes: short(20), offset: long(24) }
    }
}

/// What a segment of an earlier life holds: from its index, or header by header if it never got one.
fn read_segment_index(file: &dyn DiskFile, length: u64) -> std::result::Result<Vec<SegmentEntry>, DiskError> {
    let entries = match read_sealed_index(file, length)? {
        Some(entries) => entries,
        None => read_headers(file, length)?,
    };
    let sound =
        |entry: &SegmentEntry| entry.offset.checked_add(entry.bytes.into()).is_some_and(|end| end <= length);
    Ok(entries.into_iter().filter(sound).collect())
}

fn read_sealed_index(
    file: &dyn DiskFile,
    length: u64,
) -> std::result::Result<Option<Vec<SegmentEntry>>, DiskError> {
    let Some(trailer_at) = length.checked_sub(TRAILER_BYTES) else { return Ok(None) };
    let trailer = read_file(file, trailer_at..length)?;
    let (count, _) = trailer.split_first_chunk().expect("a trailer is 24 bytes");
    let index_at = u64::from_le_bytes(*count)
        .checked_mul(SegmentEntry::BYTES as u64)
        .and_then(|bytes| trailer_at.checked_sub(bytes));
    let (Some(index_at), true) = (index_at, trailer[16..] == SEGMENT_MAGIC) else { return Ok(None) };
    let index = read_file(file, index_at..trailer_at + 8)?;
    if xxh3_64(&index).to_le_bytes() != trailer[8..16] {
        return Ok(None);
    }
    Ok(Some(index.as_chunks().0.iter().map(SegmentEntry::decode).collect()))
}

fn read_headers(file: &dyn DiskFile, length: u64) -> std::result::Result<Vec<SegmentEntry>, DiskError> {
    let (mut entries, mut at) = (Vec::new(), 0);
    while at + HEADER_BYTES <= length {
        let found = read_file(file, at..at + HEADER_BYTES)?;
        let long = |at: usize| u64::from_le_bytes(found[at..at + 8].try_into().expect("eight bytes"));
        let short = |at: usize| u32::from_le_bytes(found[at..at + 4].try_into().expect("four bytes"));
        let id = SstId { epoch: Epoch(long(8)), counter: long(16) };
        let (chunk, bytes) = (short(24), short(28));
        if header(id, chunk, bytes)[..] != found[..] {
            break;
        }
        entries.push(SegmentEntry { id, chunk, bytes, offset: at + HEADER_BYTES });
        at += HEADER_BYTES + u64::from(bytes);
    }
    Ok(entries)
}

/// The chunk of an object that its byte at `offset` is in.
pub(crate) fn chunk_at(offset: u64) -> u32 {
    (offset / CHUNK) as u32
}

/// The chunks that `range` touches.
pub(crate) fn chunks_of(range: &Range<u64>) -> impl Iterator<Item = u32> + use<> {
    (range.start / CHUNK) as u32..range.end.div_ceil(CHUNK) as u32
}

/// The bytes of a chunk's object that it covers.
pub(crate) fn chunk_range(sst_bytes: u64, chunk: u32) -> Range<u64> {
    let start = u64::from(chunk) * CHUNK;
    start.min(sst_bytes)..(start + CHUNK).min(sst_bytes)
}

fn chunk_bytes(sst_bytes: u64, chunk: u32) -> u32 {
    let range = chunk_range(sst_bytes, chunk);
    (range.end - range.start) as u32
}

fn read_file(file: &dyn DiskFile, range: Range<u64>) -> std::result::Result<Bytes, DiskError> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    file.read_at(range.start, &mut bytes)?;
    Ok(Bytes::from(bytes))
}

fn read_pieces(pieces: &[Piece], bytes: u64) -> std::result::Result<Bytes, DiskError> {
    let mut out = vec![0; bytes as usize];
    let mut rest = &mut out[..];
    for piece in pieces {
        let (part, after) = rest.split_at_mut((piece.bytes as usize).min(rest.len()));
        piece.file.read_at(piece.offset, part)?;
        rest = after;
    }
    Ok(Bytes::from(out))
}

fn parse_sst(name: &str) -> Option<SstId> {
    let (epoch, counter) = name.strip_prefix('/')?.split_once('-')?;
    Some(SstId { epoch: Epoch(parse_hex(epoch)?), counter: parse_hex(counter)? })
}

fn parse_segment(name: &str) -> Option<u64> {
    parse_hex(name.strip_prefix('/')?)
}

fn parse_hex(digits: &str) -> Option<u64> {
    if digits.len() == 16 { u64::from_str_radix(digits, 16).ok() } else { None }
}
