//! What the local disk holds of the ssts: whole files that were written here, and chunks of objects fetched from the
//! bucket, appended to segment files.
//!
//! * A pinned sst (not in the bucket yet) is never evicted. Everything else is a copy and may go at any moment.
//! * Evictable bytes are at most the capacity, but for what was admitted a moment ago.
//! * Eviction is S3-FIFO (`docs/decisions/0007-s3-fifo.md`), with files in the place of chunks: each file stands in one queue, and its name says where.
//!   What comes stands in the small queue, which has a tenth once the disk is full; chunks of it that were read again go on to the main queue, others go and leave
//!   a ghost if they were read at all. What comes back while it is a ghost goes to the main queue at once; of the oldest file of main, what was read since it came is appended there anew.
//! * A file of which more than half goes on does so as it is, under another name. So an eviction never writes more than it frees.
//! * Nothing here is synced, pinned ssts included: until an sst is published, the wal has its contents. What survives a
//!   restart may be wrong: every block carries a checksum that names its sst and its place, the readers verify it, and
//!   `distrust` drops what failed.
//! * All files lie under the branch's identity: a data directory that meets another bucket starts with an empty cache.

mod files;
mod ghosts;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod traces;
mod visits;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use self::files::{HEADER_BYTES, SegmentEntry};
use self::ghosts::{GHOST_BYTES, Ghosts};
use self::visits::{Visits, faded};
use crate::disk::{Disk, DiskError, DiskFile};
use crate::limits::{CHUNK_BYTES, SST_BYTES};
use crate::{BranchId, Result, SstId};

const CHUNK: u64 = CHUNK_BYTES as u64;
/// Files of ssts that are kept open; the process has a limit.
const OPEN_SSTS_MAX: usize = 4096;
/// Memory for one chunk: its place, its name in its segment, its share of the maps.
const INDEX_BYTES: usize = 112;
/// No more segments than this, whatever the capacity: each is an open file.
const SEGMENTS_MAX: u64 = 2048;
/// And, where chunks are small enough, no fewer: the small queue has a few of them.
const SEGMENTS_MIN: u64 = 64;
/// The small queue's share.
const SMALL_SHARE: u64 = 10;

const SSTS: &str = "sst";
const CHUNKS: &str = "cache";
/// Directories of files that may go.
pub(crate) const COPIES: [&str; 2] = [SSTS, CHUNKS];

/// How large a cache may be of which `memory` bytes know all.
pub(crate) fn bytes_known_in(memory: usize) -> u64 {
    (memory / (INDEX_BYTES + GHOST_BYTES)) as u64 * CHUNK
}

/// The local disk's share in reading ssts.
pub(crate) struct DiskCache {
    disk: Arc<dyn Disk>,
    ssts_directory: String,
    chunks_directory: String,
    capacity: u64,
    /// Of a whole one.
    chunk_bytes: u64,
    segment_bytes: u64,
    state: Mutex<State>,
    /// One thread evicts at a time; others go on.
    evicting: Mutex<()>,
    /// A failed write was reported; it will not be again until one succeeds.
    reported: AtomicBool,
    hits: AtomicU64,
    misses: AtomicU64,
    written: AtomicU64,
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
    /// Bytes of chunks that were written, those that moved included.
    pub written: u64,
}

#[derive(Default)]
struct State {
    ssts: BTreeMap<SstId, LocalSst>,
    chunks: BTreeMap<SstId, BTreeMap<u32, Chunk>>,
    /// By the number that they began with.
    segments: BTreeMap<u64, Segment>,
    small: Files,
    main: Files,
    ghosts: Ghosts,
    next_number: u64,
    /// Evictable ssts whose file is open, in the order of opening.
    opened: VecDeque<SstId>,
}

/// A queue.
#[derive(Default)]
struct Files {
    /// Oldest first.
    order: VecDeque<Unit>,
    bytes: u64,
    /// The segment that chunks are appended to.
    current: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Unit {
    Sst(SstId),
    Segment(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    Small,
    Main,
}

/// Where a file stands: in `queue`, behind all files with lower numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    queue: Queue,
    number: u64,
}

struct LocalSst {
    file: Option<Arc<dyn DiskFile>>,
    bytes: u64,
    /// `None`: it is pinned.
    place: Option<Place>,
    /// Of each of its chunks.
    visits: Vec<Visits>,
    /// It replaces ssts that nobody read: unless somebody does, it is the first to go.
    cold: bool,
}

struct Chunk {
    segment: u64,
    offset: u64,
    bytes: u32,
    visits: Visits,
}

struct Segment {
    file: Arc<dyn DiskFile>,
    bytes: u64,
    entries: Vec<(SstId, u32)>,
    place: Place,
}

/// Files of an earlier life.
#[derive(Default)]
struct Found {
    placed: Vec<(Place, Unit)>,
    /// Ssts that were never unpinned.
    unplaced: Vec<SstId>,
}

/// A file that is the next to go.
struct Leaving {
    queue: Queue,
    bytes: u64,
    file: Arc<dyn DiskFile>,
    chunks: Vec<LeavingChunk>,
}

struct LeavingChunk {
    id: SstId,
    chunk: u32,
    offset: u64,
    bytes: u32,
    /// As [`Visits::reads`] has them.
    reads: u8,
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
        Self::of_chunks(disk, branch, capacity, CHUNK)
    }

    fn of_chunks(disk: Arc<dyn Disk>, branch: BranchId, capacity: u64, chunk_bytes: u64) -> Self {
        let segment_bytes = (capacity / SEGMENTS_MIN).min(SST_BYTES as u64).max(capacity / SEGMENTS_MAX);
        let branch: String = branch.0.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            disk,
            ssts_directory: format!("{SSTS}/{branch}"),
            chunks_directory: format!("{CHUNKS}/{branch}"),
            capacity,
            chunk_bytes,
            // Small ones have one chunk, if there is room for a few.
            segment_bytes: segment_bytes.max((HEADER_BYTES + chunk_bytes).min(capacity / 2)),
            state: Mutex::default(),
            evicting: Mutex::new(()),
            reported: AtomicBool::new(false),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            written: AtomicU64::new(0),
        }
    }

    /// Takes over the files of an earlier life, in the order that they stood in: copies of ssts for which `live` knows the length. Removes all
    /// others, those of other branches too.
    pub(crate) fn adopt(&self, live: &dyn Fn(SstId) -> Option<u64>) -> Result<()> {
        let mut found = Found::default();
        for name in self.disk.list(CHUNKS)? {
            if !self.adopt_segment(&name, live, &mut found)? {
                self.disk.remove(&name)?;
            }
        }
        for name in self.disk.list(SSTS)? {
            if !self.adopt_sst(&name, live, &mut found)? {
                self.disk.remove(&name)?;
            }
        }
        let mut state = self.state.lock();
        found.placed.sort_by_key(|(place, unit)| (place.number, *unit));
        for (Place { queue, .. }, unit) in found.placed.into_iter().rev() {
            state.files(queue).order.push_front(unit);
        }
        // They were pinned when the process died.
        found.unplaced.into_iter().for_each(|id| state.admit(self, id));
        drop(state);
        self.make_room();
        Ok(())
    }

    fn adopt_sst(&self, name: &str, live: &dyn Fn(SstId) -> Option<u64>, found: &mut Found) -> Result<bool> {
        let name_here = name.strip_prefix(&self.ssts_directory).and_then(|name| name.strip_prefix('/'));
        let Some((id, place)) = name_here.and_then(files::parse_sst) else { return Ok(false) };
        let mut state = self.state.lock();
        if state.ssts.contains_key(&id) {
            return Ok(false); // one copy of it is enough
        }
        let Some(bytes) = live(id) else { return Ok(false) };
        if self.disk.open(name)?.len()? != bytes {
            return Ok(false);
        }
        state.ssts.insert(id, LocalSst { place, ..LocalSst::new(None, bytes) });
        match place {
            Some(place) => {
                state.next_number = state.next_number.max(place.number + 1);
                state.files(place.queue).bytes += bytes;
                found.placed.push((place, Unit::Sst(id)));
            }
            None => found.unplaced.push(id),
        }
        Ok(true)
    }

    fn adopt_segment(
        &self,
        name: &str,
        live: &dyn Fn(SstId) -> Option<u64>,
        found: &mut Found,
    ) -> Result<bool> {
        let name_here = name.strip_prefix(&self.chunks_directory).and_then(|name| name.strip_prefix('/'));
        let Some(place) = name_here.and_then(files::parse_place) else { return Ok(false) };
        let proper = self.segment_name(place);
        if name != proper {
            self.disk.rename(name, &proper)?; // the version before gave it another
        }
        let file = self.disk.open(&proper)?;
        let bytes = file.len()?;
        let entries = files::read_segment_index(&*file, bytes)?;
        let mut state = self.state.lock();
        state.next_number = state.next_number.max(place.number + 1);
        let mut kept = Vec::new();
        for entry in entries {
            if live(entry.id).is_none_or(|bytes| entry.bytes != chunk_bytes(bytes, entry.chunk)) {
                continue;
            }
            // A crash may leave the older of two copies behind.
            let chunks = state.chunks.entry(entry.id).or_default();
            if chunks.get(&entry.chunk).is_none_or(|other| other.segment < place.number) {
                let (segment, offset) = (place.number, entry.offset);
                let chunk = Chunk { segment, offset, bytes: entry.bytes, visits: Visits::NONE };
                chunks.insert(entry.chunk, chunk);
                kept.push((entry.id, entry.chunk));
            }
        }
        if kept.is_empty() {
            return self.disk.remove(&proper).map(|()| true).map_err(Into::into);
        }
        state.files(place.queue).bytes += bytes;
        state.segments.insert(place.number, Segment { file, bytes, entries: kept, place });
        found.placed.push((place, Unit::Segment(place.number)));
        Ok(true)
    }

    /// Writes the sst to a file of its own, pinned until `unpin`.
    ///
    /// [`Kind::Full`](crate::Kind::Full) if the disk is full even without the cache's copies; nothing is left behind.
    pub(crate) fn write_pinned(&self, id: SstId, bytes: &Bytes) -> Result<()> {
        let file = loop {
            match self.write_file(id, bytes) {
                Ok(file) => break file,
                Err(error) => {
                    self.remove_file(&self.sst_name(id, None));
                    let evicted = error.full && self.evict_one();
                    if !evicted {
                        return Err(error.into());
                    }
                }
            }
        };
        let mut state = self.state.lock();
        state.ssts.insert(id, LocalSst::new(Some(file), bytes.len() as u64));
        Ok(())
    }

    /// Keeps a copy of a whole sst that the bucket has, unless the disk is full.
    pub(crate) fn keep_sst(&self, id: SstId, bytes: &Bytes) {
        match self.write_file(id, bytes) {
            Ok(file) => {
                let sst = LocalSst::new(Some(file), bytes.len() as u64);
                self.state.lock().ssts.insert(id, sst);
                self.unpin(id);
            }
            Err(error) => {
                self.remove_file(&self.sst_name(id, None));
                self.report(&error);
            }
        }
    }

    fn write_file(&self, id: SstId, bytes: &[u8]) -> std::result::Result<Arc<dyn DiskFile>, DiskError> {
        let file = self.disk.create(&self.sst_name(id, None))?;
        file.write_at(0, bytes)?;
        Ok(file)
    }

    /// All bytes of a pinned sst; `None` if it is not pinned here.
    pub(crate) fn read_pinned(&self, id: SstId) -> Result<Option<Bytes>> {
        let (file, bytes) = match self.state.lock().ssts.get(&id) {
            Some(LocalSst { file: Some(file), bytes, place: None, .. }) => (Arc::clone(file), *bytes),
            _ => return Ok(None),
        };
        Ok(Some(read_file(&*file, 0..bytes)?))
    }

    /// The bucket has it now: the file becomes a copy like any other, and `make_room` may be due.
    pub(crate) fn unpin(&self, id: SstId) {
        let mut state = self.state.lock();
        if state.ssts.get(&id).is_some_and(|sst| sst.place.is_none()) {
            state.admit(self, id);
            state.opened.push_back(id);
        }
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
        let pinned = state.ssts.get(&id).is_some_and(|sst| sst.place.is_none());
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
        let queue = if self.state.lock().ghosts.take(id, chunk) { Queue::Main } else { Queue::Small };
        if let Err(error) = self.append(id, chunk, bytes, queue, 0) {
            self.report(&error);
            if error.full {
                self.evict_one();
            }
        }
    }

    /// Chunks were fetched for the sake of `range`.
    pub(crate) fn read_first(&self, id: SstId, range: &Range<u64>) {
        let mut state = self.state.lock();
        let state = &mut *state;
        let Some(chunks) = state.chunks.get_mut(&id) else { return };
        for number in chunks_of(range) {
            if let Some(chunk) = chunks.get_mut(&number) {
                chunk.visits.stand(range, number);
                if queue_of(&state.segments, chunk) == Some(Queue::Small) {
                    chunk.visits.count = chunk.visits.count.max(1);
                }
            }
        }
    }

    /// Whether `make_room` has something to do.
    pub(crate) fn is_too_full(&self) -> bool {
        self.state.lock().evictable_bytes() > self.capacity
    }

    /// Whether whoever evicts is left behind by those who insert.
    pub(crate) fn is_far_too_full(&self) -> bool {
        self.state.lock().evictable_bytes() > self.capacity + self.capacity / 16 + 2 * self.segment_bytes
    }

    fn append(
        &self,
        id: SstId,
        chunk: u32,
        bytes: &Bytes,
        queue: Queue,
        count: u8,
    ) -> std::result::Result<(), DiskError> {
        let length = HEADER_BYTES + bytes.len() as u64;
        if length > self.segment_bytes {
            return Ok(()); // no capacity to speak of
        }
        let Some((segment, file, offset)) = self.reserve(id, chunk, length, queue)? else { return Ok(()) };
        let header = files::header(id, chunk, bytes.len() as u32);
        let written =
            file.write_at(offset, &header).and_then(|()| file.write_at(offset + HEADER_BYTES, bytes));
        let mut state = self.state.lock();
        if let Err(error) = written {
            state.end_segment(segment); // its tail is unknown: the next chunk starts a new one
            return Err(error);
        }
        self.written.fetch_add(length, Ordering::Relaxed);
        self.reported.store(false, Ordering::Relaxed);
        let Some(home) = state.segments.get_mut(&segment) else { return Ok(()) };
        home.entries.push((id, chunk));
        let visits = Visits::counted(count);
        let place = Chunk { segment, offset: offset + HEADER_BYTES, bytes: bytes.len() as u32, visits };
        state.chunks.entry(id).or_default().insert(chunk, place);
        Ok(())
    }

    /// A place of `length` bytes in the queue's current segment; `None` if the chunk is here already.
    #[expect(clippy::type_complexity, reason = "segment, file and offset, taken apart at once")]
    fn reserve(
        &self,
        id: SstId,
        chunk: u32,
        length: u64,
        queue: Queue,
    ) -> std::result::Result<Option<(u64, Arc<dyn DiskFile>, u64)>, DiskError> {
        let mut state = self.state.lock();
        let state = &mut *state;
        if state.chunks.get(&id).is_some_and(|chunks| chunks.contains_key(&chunk)) {
            return Ok(None);
        }
        if let Some(number) = state.files(queue).current
            && state.segments.get(&number).is_none_or(|segment| segment.bytes + length > self.segment_bytes)
        {
            state.files(queue).current = None;
            state.seal(number)?;
        }
        let number = match state.files(queue).current {
            Some(number) => number,
            None => {
                let place = state.behind(queue);
                let file = self.disk.create(&self.segment_name(place))?;
                let number = place.number;
                state.segments.insert(number, Segment { file, bytes: 0, entries: Vec::new(), place });
                let files = state.files(queue);
                files.order.push_back(Unit::Segment(number));
                files.current = Some(number);
                number
            }
        };
        let segment = state.segments.get_mut(&number).expect("the current segment is there");
        let offset = segment.bytes;
        segment.bytes += length;
        let file = Arc::clone(&segment.file);
        state.files(queue).bytes += length;
        Ok(Some((number, file, offset)))
    }

    /// Drops every copy of `range`, for the next one may be no better. `true`: the bucket may have better bytes.
    pub(crate) fn distrust(&self, id: SstId, range: Range<u64>) -> bool {
        let mut state = self.state.lock();
        if state.ssts.get(&id).is_some_and(|sst| sst.place.is_none()) {
            return false;
        }
        if let Some(chunks) = state.chunks.get_mut(&id) {
            for chunk in chunks_of(&range) {
                chunks.remove(&chunk);
            }
        }
        if let Some(sst) = state.drop_sst(id) {
            drop(state);
            self.remove_file(&self.sst_name(id, sst.place));
        }
        true
    }

    /// Drops all that is here of an sst, pinned or not.
    pub(crate) fn forget(&self, id: SstId) {
        let mut state = self.state.lock();
        state.chunks.remove(&id); // their bytes go with their segments
        if let Some(sst) = state.drop_sst(id) {
            drop(state);
            self.remove_file(&self.sst_name(id, sst.place));
        }
    }

    /// How often chunks of an sst were read since they came here, those that were. To be in the main queue counts as one.
    pub(crate) fn heat(&self, id: SstId) -> BTreeMap<u32, u8> {
        let state = self.state.lock();
        let whole = state.ssts.get(&id).map(|sst| {
            let queue = sst.place.map(|place| place.queue);
            (0..).zip(&sst.visits).map(move |(chunk, visits)| (chunk, visits.reads(queue)))
        });
        let pieces = state.chunks.get(&id).map(|chunks| {
            chunks
                .iter()
                .map(|(number, chunk)| (*number, chunk.visits.reads(queue_of(&state.segments, chunk))))
        });
        let all = whole.into_iter().flatten().chain(pieces.into_iter().flatten());
        all.filter(|(_, reads)| *reads > 0).collect()
    }

    /// A pinned sst that holds what nobody read before.
    pub(crate) fn set_cold(&self, id: SstId) {
        if let Some(sst) = self.state.lock().ssts.get_mut(&id) {
            sst.cold = true;
        }
    }

    /// A chunk that is here counts as read so many times, at least, as `heat` tells it.
    pub(crate) fn heat_up(&self, id: SstId, chunk: u32, reads: u8) {
        let mut state = self.state.lock();
        let state = &mut *state;
        if let Some(sst) = state.ssts.get_mut(&id) {
            let queue = sst.place.map(|place| place.queue);
            sst.visits.get_mut(chunk as usize).into_iter().for_each(|visits| visits.heat_up(reads, queue));
        }
        if let Some(chunk) = state.chunks.get_mut(&id).and_then(|chunks| chunks.get_mut(&chunk)) {
            chunk.visits.heat_up(reads, queue_of(&state.segments, chunk));
        }
    }

    /// Whether what is brought here unasked would soon push out something else.
    pub(crate) fn is_nearly_full(&self) -> bool {
        self.state.lock().evictable_bytes() > self.capacity / 10 * 9
    }

    /// Counters and sizes at about this moment.
    pub(crate) fn status(&self) -> DiskCacheStatus {
        let state = self.state.lock();
        let pinned = || state.ssts.values().filter(|sst| sst.place.is_none());
        DiskCacheStatus {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            bytes: state.evictable_bytes(),
            capacity: self.capacity,
            unuploaded_bytes: pinned().map(|sst| sst.bytes).sum(),
            unuploaded_ssts: pinned().count() as u64,
            written: self.written.load(Ordering::Relaxed),
        }
    }

    /// About what is kept in memory of the chunks that are here, and of those that went.
    pub(crate) fn index_bytes(&self) -> usize {
        let state = self.state.lock();
        (state.evictable_bytes() / self.chunk_bytes) as usize * INDEX_BYTES + state.ghosts.len() * GHOST_BYTES
    }

    /// Evicts while there is too much. Another thread that already does so is left to it.
    pub(crate) fn make_room(&self) {
        let Some(_evicting) = self.evicting.try_lock() else { return };
        while self.state.lock().evictable_bytes() > self.capacity && self.evict_oldest() {}
    }

    /// Evicts until some room is made; `false` if there is nothing left to evict.
    fn evict_one(&self) -> bool {
        let _evicting = self.evicting.lock();
        let before = self.state.lock().evictable_bytes();
        while self.evict_oldest() {
            if self.state.lock().evictable_bytes() < before {
                return true;
            }
        }
        false
    }

    /// Takes the file that is the next to go: it goes, or becomes the newest of the main queue. `false` if there is none.
    fn evict_oldest(&self) -> bool {
        let mut state = self.state.lock();
        let (unit, leaving) = loop {
            let Some(unit) = state.pop_oldest(self.capacity / SMALL_SHARE) else { return false };
            if let Some(leaving) = state.leaving(self, unit) {
                break (unit, leaving);
            }
        };
        let hot: u64 = leaving.chunks.iter().filter(|chunk| chunk.stays()).map(LeavingChunk::length).sum();
        if hot > leaving.bytes / 2 && state.move_whole(self, unit) {
            return true;
        }
        let name = state.take_out(self, unit);
        let (stay, go): (Vec<_>, Vec<_>) = leaving.chunks.into_iter().partition(LeavingChunk::stays);
        let ghosts_max = (self.capacity - self.capacity / SMALL_SHARE) / self.chunk_bytes;
        for chunk in go.iter().filter(|chunk| leaving.queue == Queue::Small && chunk.reads > 0) {
            state.ghosts.add(chunk.id, chunk.chunk, ghosts_max as usize);
        }
        drop(state);
        for chunk in stay {
            let range = chunk.offset..chunk.offset + u64::from(chunk.bytes);
            let count = faded(chunk.reads);
            let moved = read_file(&*leaving.file, range)
                .and_then(|bytes| self.append(chunk.id, chunk.chunk, &bytes, Queue::Main, count));
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

    fn sst_name(&self, id: SstId, place: Option<Place>) -> String {
        format!("{}/{}", self.ssts_directory, files::sst_name(id, place))
    }

    fn segment_name(&self, place: Place) -> String {
        format!("{}/{}", self.chunks_directory, files::place_name(place))
    }
}

/// Bytes in an open file.
struct Piece {
    file: Arc<dyn DiskFile>,
    offset: u64,
    bytes: u64,
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
        for chunk in chunks_of(range).filter(|_| mark) {
            sst.visits[chunk as usize].note(range, chunk);
        }
        Some(Piece { file, offset: range.start, bytes: range.end - range.start })
    }

    /// The file of a local sst, opened if need be; another one may be closed for it.
    fn open_sst(&mut self, cache: &DiskCache, id: SstId) -> Option<Arc<dyn DiskFile>> {
        let sst = self.ssts.get_mut(&id)?;
        if let Some(file) = &sst.file {
            return Some(Arc::clone(file));
        }
        let file = match cache.disk.open(&cache.sst_name(id, sst.place)) {
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
            && let Some(sst) = self.ssts.get_mut(&oldest).filter(|sst| sst.place.is_some())
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
            if mark {
                chunk.visits.note(range, number);
            }
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

    fn files(&mut self, queue: Queue) -> &mut Files {
        match queue {
            Queue::Small => &mut self.small,
            Queue::Main => &mut self.main,
        }
    }

    fn evictable_bytes(&self) -> u64 {
        self.small.bytes + self.main.bytes
    }

    /// The next place in a queue.
    fn behind(&mut self, queue: Queue) -> Place {
        let number = self.next_number.max(1); // 0 is before all others
        self.next_number = number + 1;
        Place { queue, number }
    }

    /// A pinned sst is a copy from now on.
    fn admit(&mut self, cache: &DiskCache, id: SstId) {
        let Some(sst) = self.ssts.get(&id) else { return };
        let first = sst.cold && sst.visits.iter().all(|visits| visits.count == 0);
        let bytes = sst.bytes;
        let place = if first { Place { queue: Queue::Small, number: 0 } } else { self.behind(Queue::Small) };
        if let Err(error) = cache.disk.rename(&cache.sst_name(id, None), &cache.sst_name(id, Some(place))) {
            cache.report(&error);
            self.ssts.remove(&id);
            return cache.remove_file(&cache.sst_name(id, None));
        }
        self.ssts.get_mut(&id).expect("just seen").place = Some(place);
        self.small.bytes += bytes;
        if first {
            self.small.order.push_front(Unit::Sst(id));
        } else {
            self.small.order.push_back(Unit::Sst(id));
        }
    }

    fn drop_sst(&mut self, id: SstId) -> Option<LocalSst> {
        let sst = self.ssts.remove(&id)?;
        if let Some(place) = sst.place {
            let files = self.files(place.queue);
            files.bytes -= sst.bytes;
            files.order.retain(|unit| *unit != Unit::Sst(id));
            self.opened.retain(|opened| *opened != id);
        }
        Some(sst)
    }

    /// Takes what goes next out of its queue's order: from the small queue, while it has more than its share.
    fn pop_oldest(&mut self, small_bytes: u64) -> Option<Unit> {
        let small = self.small.bytes > small_bytes || self.main.order.is_empty();
        self.files(if small { Queue::Small } else { Queue::Main }).order.pop_front()
    }

    /// What is in a file that may go. `None`: nothing, it is gone.
    fn leaving(&mut self, cache: &DiskCache, unit: Unit) -> Option<Leaving> {
        match unit {
            Unit::Sst(id) => {
                let file = self.open_sst(cache, id)?;
                let sst = self.ssts.get(&id)?;
                let queue = sst.place?.queue;
                let chunk = |(chunk, visits): (u32, &Visits)| LeavingChunk {
                    id,
                    chunk,
                    offset: u64::from(chunk) * CHUNK,
                    bytes: chunk_bytes(sst.bytes, chunk),
                    reads: visits.reads(Some(queue)),
                };
                let chunks = (0..).zip(&sst.visits).map(chunk).collect();
                Some(Leaving { queue, bytes: sst.bytes, file, chunks })
            }
            Unit::Segment(number) => {
                let segment = self.segments.get(&number)?;
                let queue = segment.place.queue;
                let chunks = segment.entries.iter().filter_map(|&(id, chunk)| {
                    let place = self.chunks.get(&id)?.get(&chunk).filter(|place| place.segment == number)?;
                    let (offset, bytes, reads) = (place.offset, place.bytes, place.visits.reads(Some(queue)));
                    Some(LeavingChunk { id, chunk, offset, bytes, reads })
                });
                let (chunks, file) = (chunks.collect(), Arc::clone(&segment.file));
                Some(Leaving { queue, bytes: segment.bytes, file, chunks })
            }
        }
    }

    /// Makes a file that left its queue's order the newest of the main queue. `false`: it is where it was.
    fn move_whole(&mut self, cache: &DiskCache, unit: Unit) -> bool {
        let to = self.behind(Queue::Main);
        let (from, bytes) = match unit {
            Unit::Sst(id) => self.ssts.get(&id).and_then(|sst| Some((sst.place?, sst.bytes))),
            Unit::Segment(number) => self.segments.get(&number).map(|segment| (segment.place, segment.bytes)),
        }
        .expect("a file that is leaving is there");
        let name = |place: Place| match unit {
            Unit::Sst(id) => cache.sst_name(id, Some(place)),
            Unit::Segment(_) => cache.segment_name(place),
        };
        if let Err(error) = cache.disk.rename(&name(from), &name(to)) {
            cache.report(&error);
            return false;
        }
        match unit {
            Unit::Sst(id) => {
                let sst = self.ssts.get_mut(&id).expect("just seen");
                sst.place = Some(to);
                sst.visits.iter_mut().for_each(|visits| visits.move_on(from.queue));
            }
            Unit::Segment(number) => {
                self.end_segment(number);
                let segment = self.segments.get_mut(&number).expect("just seen");
                segment.place = to;
                for (id, chunk) in &segment.entries {
                    let place = self.chunks.get_mut(id).and_then(|chunks| chunks.get_mut(chunk));
                    if let Some(place) = place.filter(|place| place.segment == number) {
                        place.visits.move_on(from.queue);
                    }
                }
            }
        }
        self.files(from.queue).bytes -= bytes;
        self.main.bytes += bytes;
        self.main.order.push_back(unit);
        true
    }

    /// Forgets a file that is leaving and what is in it; returns its name.
    fn take_out(&mut self, cache: &DiskCache, unit: Unit) -> String {
        match unit {
            Unit::Sst(id) => {
                let sst = self.drop_sst(id).expect("a file that is leaving is there");
                cache.sst_name(id, sst.place)
            }
            Unit::Segment(number) => {
                self.end_segment(number);
                let segment = self.segments.remove(&number).expect("a file that is leaving is there");
                self.files(segment.place.queue).bytes -= segment.bytes;
                for (id, chunk) in segment.entries {
                    let Some(chunks) = self.chunks.get_mut(&id) else { continue };
                    if chunks.get(&chunk).is_some_and(|place| place.segment == number) {
                        chunks.remove(&chunk);
                    }
                    if chunks.is_empty() {
                        self.chunks.remove(&id);
                    }
                }
                cache.segment_name(segment.place)
            }
        }
    }

    /// Nothing is appended to a segment any more.
    fn end_segment(&mut self, number: u64) {
        for files in [&mut self.small, &mut self.main] {
            files.current = files.current.filter(|current| *current != number);
        }
    }

    /// Ends a segment with its index, for the next start.
    fn seal(&mut self, number: u64) -> std::result::Result<(), DiskError> {
        let Some(segment) = self.segments.get_mut(&number) else { return Ok(()) };
        let entries = segment.entries.iter().filter_map(|&(id, chunk)| {
            let place = self.chunks.get(&id)?.get(&chunk).filter(|place| place.segment == number)?;
            Some(SegmentEntry { id, chunk, bytes: place.bytes, offset: place.offset })
        });
        let index = files::sealed_index(entries);
        let offset = segment.bytes;
        segment.bytes += index.len() as u64;
        let (file, queue) = (Arc::clone(&segment.file), segment.place.queue);
        self.files(queue).bytes += index.len() as u64;
        file.write_at(offset, &index)
    }
}

impl LocalSst {
    /// A pinned one.
    fn new(file: Option<Arc<dyn DiskFile>>, bytes: u64) -> Self {
        let visits = vec![Visits::NONE; bytes.div_ceil(CHUNK) as usize];
        Self { file, bytes, place: None, visits, cold: false }
    }
}

impl LeavingChunk {
    /// Whether it was read again.
    fn stays(&self) -> bool {
        self.reads > 1
    }

    fn length(&self) -> u64 {
        u64::from(self.bytes) + HEADER_BYTES
    }
}

fn queue_of(segments: &BTreeMap<u64, Segment>, chunk: &Chunk) -> Option<Queue> {
    segments.get(&chunk.segment).map(|segment| segment.place.queue)
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
