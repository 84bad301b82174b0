//! The wal being written: the order of all commits, as bytes.
//!
//! * Places are given out in order (`reserve`), filled in parallel, written in order, and made durable by one sync for
//!   all who wait (`sync_to`): whoever comes first leads, the others follow.
//! * `durable` only grows, and only after a sync that covers every byte below it.
//! * Space on disk is there before a place is given out: a full disk refuses a commit, it never tears one.
//! * After one failed write or sync nothing is written or acknowledged any more: nobody can know what the disk holds.

mod format;
mod local;
mod segments;
mod slices;
mod turns;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::BytesMut;
use parking_lot::{Condvar, Mutex, MutexGuard};

pub(crate) use format::FileHeader;
pub use format::{LoadedSst, Op, Stream};
use format::{PAYLOAD_BYTES_MAX, RECORD_HEADER};
pub(crate) use local::{LocalWal, Record, SET_ASIDE};
use segments::{Need, Segments};
pub(crate) use slices::{Chain, Uploader, chain, read_slice};
use turns::{Leader, Turns};

use crate::limits::{WAL_SEGMENT_BYTES, WAL_SLICE_BYTES};
use crate::points::{self, Point};
use crate::{Disk, Error, Kind, Result, Seqno, WalPosition};

/// Sizes, so that tests can make them small.
#[derive(Clone, Copy, Debug)]
pub struct WalLimits {
    /// Length of a segment file; the disk space that an idle wal holds is up to twice that.
    pub segment_bytes: u64,
    /// Reserved bytes that may wait for being written; reserving waits beyond it.
    pub buffered_bytes_max: usize,
    /// Records are cut from allocations of this size.
    pub chunk_bytes: usize,
    /// Bytes of records after which a slice is cut.
    pub slice_bytes: u64,
}

impl Default for WalLimits {
    fn default() -> Self {
        Self {
            segment_bytes: WAL_SEGMENT_BYTES,
            buffered_bytes_max: 16 << 20,
            chunk_bytes: 256 << 10,
            slice_bytes: WAL_SLICE_BYTES,
        }
    }
}

/// The wal of one epoch, open for writing. Shared by all threads.
pub struct Wal {
    stream: Stream,
    start: WalPosition,
    limits: WalLimits,
    segments: Segments,
    queue: Mutex<Queue>,
    /// A slot was filled while somebody waited for that.
    filled: Condvar,
    turns: Turns,
    durable: AtomicU64,
    /// The end of the segment files. Whoever moves it holds `extending`.
    allocated: AtomicU64,
    extending: Mutex<()>,
    failed: AtomicBool,
    syncs: AtomicU64,
}

/// What has a place and is not written yet.
struct Queue {
    /// The end of what has a place.
    end: u64,
    /// The start of the oldest slot in `slots`.
    start: u64,
    /// How many slots were taken out at the front so far.
    taken: u64,
    /// `None` until it is filled.
    slots: VecDeque<Option<BytesMut>>,
    /// New records are cut from here.
    chunk: BytesMut,
    awaited: bool,
    failure: Option<Arc<str>>,
}

impl Wal {
    /// An empty wal whose first record will be at `start`. Its first segment exists and is durable.
    pub fn create(
        disk: Arc<dyn Disk>,
        stream: Stream,
        start: WalPosition,
        limits: WalLimits,
    ) -> Result<Self> {
        let segments = Segments::new(disk, stream.clone(), limits.segment_bytes, start)?;
        let allocated = segments.extend(start.0, Need::Later)?;
        Ok(Self {
            stream,
            start,
            limits,
            segments,
            queue: Mutex::new(Queue {
                end: start.0,
                start: start.0,
                taken: 0,
                slots: VecDeque::new(),
                chunk: BytesMut::new(),
                awaited: false,
                failure: None,
            }),
            filled: Condvar::new(),
            turns: Turns::new(start.0),
            durable: AtomicU64::new(start.0),
            allocated: AtomicU64::new(allocated),
            extending: Mutex::new(()),
            failed: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
        })
    }

    /// Gives out the place of the next record, whose payload will be `payload_bytes` long (sum of [`Op::encoded_len`]).
    /// Callers hold the commit lock: seqnos rise with places.
    ///
    /// Waits (and writes) while too much is buffered. `Full`: the disk has no room; no place was given out and the
    /// caller may try again later. `Failed`: see [`Self::sync_to`].
    pub fn reserve(&self, payload_bytes: usize, seqno: Seqno) -> Result<Slot<'_>> {
        if payload_bytes > PAYLOAD_BYTES_MAX {
            return Err(Error::new(
                Kind::BadRequest,
                format!("a transaction of {payload_bytes} bytes is too large"),
            ));
        }
        let bytes = RECORD_HEADER + payload_bytes;
        let mut queue = self.queue_with_room_for(bytes)?;
        self.make_room(queue.end + bytes as u64, Need::Now)?;
        let position = queue.end;
        queue.end += bytes as u64;
        let number = queue.taken + queue.slots.len() as u64;
        queue.slots.push_back(None);
        if queue.chunk.len() < bytes {
            let chunk_bytes = self.limits.chunk_bytes.max(bytes);
            queue.chunk = BytesMut::zeroed(chunk_bytes);
        }
        let record = queue.chunk.split_to(bytes);
        let durable = self.durable.load(Ordering::Acquire);
        drop(queue);
        Ok(Slot { wal: self, position, number, seqno, durable, record, written: RECORD_HEADER })
    }

    /// Returns once every byte below `end` is durable; `end` is a slot's end. The slots before it must be filled by
    /// other threads or already be.
    ///
    /// `Failed`: a write or sync went wrong, now or earlier. The transaction may or may not survive a restart, and
    /// nothing more is written until then.
    pub fn sync_to(&self, end: WalPosition) -> Result<()> {
        let mut leader = loop {
            if self.durable() >= end {
                return Ok(());
            }
            if self.failed() {
                return Err(self.failure());
            }
            let done = || self.durable() >= end || self.failed();
            if let Some(leader) = self.turns.lead_or_sleep(end.0, done) {
                break leader;
            }
        };
        let guard = FailsOnPanic(self);
        let result = self.write_group(end, &leader);
        drop(guard);
        leader.last = result.is_err();
        drop(leader);
        result
    }

    /// Whether a write or sync went wrong: what is not durable yet never will be for this process.
    #[inline]
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Whether the last segment is half full, so that it is time to [`Self::prepare`] the next one.
    pub fn wants_room(&self) -> bool {
        self.allocated.load(Ordering::Acquire) < self.wanted()
    }

    /// Makes the next segment before a commit has to wait for it. `false`: there was no need.
    pub fn prepare(&self) -> Result<bool> {
        let wanted = self.wants_room();
        self.make_room(self.wanted(), Need::Later)?;
        Ok(wanted)
    }

    fn wanted(&self) -> u64 {
        self.durable().0 + self.limits.segment_bytes / 2
    }

    /// The end of what is durable.
    pub fn durable(&self) -> WalPosition {
        WalPosition(self.durable.load(Ordering::Acquire))
    }

    /// The end of what has a place. Exact under the commit lock.
    pub fn end(&self) -> WalPosition {
        WalPosition(self.queue.lock().end)
    }

    /// Where this epoch's wal begins.
    pub fn start(&self) -> WalPosition {
        self.start
    }

    /// Groups made durable so far.
    pub fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    /// Takes every filled slot up to the first gap, waiting until that covers `end`, writes and syncs them.
    fn write_group(&self, end: WalPosition, leader: &Leader<'_>) -> Result<()> {
        let (start, group) = self.take_group(end);
        leader.takes(start + group.iter().map(|bytes| bytes.len() as u64).sum::<u64>());
        let mut at = start;
        let mut touched = BTreeSet::new();
        let written = join_neighbours(group)
            .try_for_each(|bytes| {
                let position = at;
                at += bytes.len() as u64;
                self.segments.write(position, &bytes, &mut touched)
            })
            .and_then(|()| {
                points::pass(Point::BeforeSync);
                self.segments.sync(&touched)
            });
        if let Err(error) = written {
            return Err(self.fail(&error.to_string()));
        }
        assert!(at >= end.0, "a group covers what its leader waits for");
        points::pass(Point::AfterSync);
        self.durable.store(at, Ordering::Release);
        self.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn take_group(&self, end: WalPosition) -> (u64, Vec<BytesMut>) {
        let mut queue = self.queue.lock();
        assert!(end.0 <= queue.end, "{end:?} was never reserved");
        let start = queue.start;
        let mut group = Vec::new();
        loop {
            while let Some(Some(_)) = queue.slots.front() {
                let bytes = queue.slots.pop_front().flatten().expect("seen on the line above");
                queue.taken += 1;
                queue.start += bytes.len() as u64;
                group.push(bytes);
            }
            if queue.start >= end.0 {
                return (start, group);
            }
            queue.awaited = true;
            self.filled.wait(&mut queue);
        }
    }

    /// Returns once the segment files reach `end`.
    fn make_room(&self, end: u64, need: Need) -> Result<()> {
        if self.allocated.load(Ordering::Acquire) >= end {
            return Ok(());
        }
        let _extending = self.extending.lock();
        loop {
            let allocated = self.allocated.load(Ordering::Acquire);
            if allocated >= end {
                return Ok(());
            }
            self.allocated.store(self.segments.extend(allocated, need)?, Ordering::Release);
        }
    }

    fn queue_with_room_for(&self, bytes: usize) -> Result<MutexGuard<'_, Queue>> {
        loop {
            let queue = self.queue.lock();
            if queue.failure.is_some() {
                drop(queue);
                return Err(self.failure());
            }
            let buffered = queue.end - self.durable().0;
            if buffered == 0 || buffered + bytes as u64 <= self.limits.buffered_bytes_max as u64 {
                return Ok(queue);
            }
            let end = WalPosition(queue.end);
            drop(queue);
            self.sync_to(end)?;
        }
    }

    fn fill(&self, number: u64, record: BytesMut) {
        let mut queue = self.queue.lock();
        let index = (number - queue.taken) as usize;
        queue.slots[index] = Some(record);
        if queue.awaited {
            queue.awaited = false;
            self.filled.notify_all();
        }
    }

    fn fail(&self, why: &str) -> Error {
        tracing::error!(why, "the wal can not be written; nothing is acknowledged until a restart");
        self.queue.lock().failure = Some(why.into());
        self.failed.store(true, Ordering::Release);
        self.failure()
    }

    fn failure(&self) -> Error {
        let why = self.queue.lock().failure.clone().unwrap_or_else(|| "unknown".into());
        Error::new(Kind::Failed, format!("the wal can not be written since: {why}"))
    }
}

/// A record's place. Write each change, then `finish`; dropped before that, the place is marked void, so a panic in one
/// thread does not hold up the others.
pub struct Slot<'a> {
    wal: &'a Wal,
    position: u64,
    number: u64,
    seqno: Seqno,
    durable: u64,
    record: BytesMut,
    written: usize,
}

impl Slot<'_> {
    /// What to pass to `sync_to`.
    pub fn end(&self) -> WalPosition {
        WalPosition(self.position + self.record.len() as u64)
    }

    /// Adds `op`.
    ///
    /// # Panics
    /// If more is written than was reserved.
    pub fn write(&mut self, op: Op<'_>) {
        self.written += op.encode(&mut self.record[self.written..]);
    }

    /// Adds changes that are encoded already.
    pub fn fill(&mut self, payload: &[u8]) {
        self.record[self.written..self.written + payload.len()].copy_from_slice(payload);
        self.written += payload.len();
    }

    /// The record is complete and may be written. Its end is for `sync_to`.
    ///
    /// # Panics
    /// If less was written than was reserved.
    pub fn finish(mut self) -> WalPosition {
        assert_eq!(self.written, self.record.len(), "a record must fill its place");
        let end = self.end();
        self.hand_over(false);
        end
    }

    fn hand_over(&mut self, void: bool) {
        let mut record = std::mem::take(&mut self.record);
        self.wal.stream.seal(&mut record, self.position, self.seqno, self.durable, void);
        self.wal.fill(self.number, record);
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        if !self.record.is_empty() {
            self.hand_over(true);
        }
    }
}

/// Nothing may follow a group that its leader took out of the queue and perhaps did not write.
struct FailsOnPanic<'a>(&'a Wal);

impl Drop for FailsOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail("a thread panicked while it wrote a group");
        }
    }
}

/// Joins pieces that were cut from one chunk, without copying, so that most groups are one write.
fn join_neighbours(pieces: Vec<BytesMut>) -> impl Iterator<Item = BytesMut> {
    let mut pieces = pieces.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut joined = pieces.next()?;
        while let Some(next) = pieces.next_if(|next| joined.as_ptr_range().end == next.as_ptr()) {
            joined.unsplit(next);
        }
        Some(joined)
    })
}

#[cfg(test)]
mod tests;
