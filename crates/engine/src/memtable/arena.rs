//! Memory that a memtable's records and nodes live in, and the pointers between them. All `unsafe` of the memtable
//! except the iterator's two dereferences is here.
//!
//! * Nothing placed in an arena is freed, moved or dropped before the arena itself is (or is reset, which takes `&mut`).
//!   So a pointer into an arena is good for as long as the arena can be borrowed.
//! * A record is immutable from the moment it is made. Placed values are shared and change only through atomics.
//! * A link holds nothing or something from the arena it lives in or beside. It is stored with `Release` and loaded
//!   with `Acquire`, so who can load it sees a fully written target.
#![allow(unsafe_code, reason = "raw memory shared between threads; each block says why it is sound")]

use std::alloc::Layout;
use std::cmp::Ordering as Order;
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::{OpKind, Seqno};

/// First chunk of a shard; each further one is twice as large, up to the maximum.
const CHUNK_BYTES_MIN: usize = 16 << 10;
const CHUNK_BYTES_MAX: usize = 1 << 20;
/// What is larger than this gets an allocation of its own, so that it does not waste the rest of a chunk.
const OWN_CHUNK_BYTES: usize = CHUNK_BYTES_MAX / 4;
/// Each allocation is a multiple of this.
const ALIGN: usize = 8;
/// The largest alignment that may be asked for.
const ALIGN_MAX: usize = 64;

/// Bump-allocated memory in shards, so that threads which insert at the same time seldom meet.
pub(super) struct Arena {
    /// A power of two of them.
    shards: Box<[Shard]>,
}

/// Two cache lines (processors fetch them in pairs), so that shards do not disturb each other.
#[repr(align(128))]
struct Shard {
    chunk: AtomicPtr<Chunk>,
    bytes: AtomicUsize,
    /// Of all chunks, whether handed out or not.
    allocated: AtomicUsize,
    records: AtomicUsize,
    seqno_min: AtomicU64,
    seqno_max: AtomicU64,
    chunks: Mutex<Vec<OwnedChunk>>,
}

struct Chunk {
    start: NonNull<u8>,
    layout: Layout,
    /// Bytes handed out; passes the end when the chunk is full.
    used: AtomicUsize,
}

/// A chunk made by `Chunk::allocate` and not yet freed.
struct OwnedChunk(NonNull<Chunk>);

// SAFETY: the chunk is plain memory, freed by whoever owns the arena, from any thread.
unsafe impl Send for OwnedChunk {}

/// What an arena holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Totals {
    /// Bytes handed out, to records and to nodes.
    pub bytes: usize,
    pub records: usize,
    /// Least and greatest seqno; `None` when there is no record.
    pub seqnos: Option<(Seqno, Seqno)>,
}

impl Arena {
    /// An empty arena; `shards` is a power of two.
    pub fn new(shards: usize) -> Self {
        assert!(shards.is_power_of_two());
        Self { shards: (0..shards).map(|_| Shard::new()).collect() }
    }

    /// Copies a record in.
    ///
    /// # Panics
    /// If the key or the value is longer than `limits` allow.
    pub fn record(&self, key: &[u8], seqno: Seqno, kind: OpKind, value: &[u8]) -> Record<'_> {
        let header = Header {
            seqno: seqno.0,
            value_bytes: u32::try_from(value.len()).expect("values are limited to VALUE_BYTES_MAX"),
            key_bytes: u16::try_from(key.len()).expect("keys are limited to KEY_BYTES_MAX"),
            kind,
        };
        let shard = self.shard();
        let to = shard.allocate(size_of::<Header>() + key.len() + value.len(), ALIGN);
        shard.count(seqno);
        // SAFETY: `to` starts fresh memory of the size just asked for, aligned for `Header`, which no one else knows
        // yet; key and value are borrowed from elsewhere, so nothing overlaps.
        unsafe {
            to.cast::<Header>().write(header);
            let bytes = to.add(size_of::<Header>());
            bytes.copy_from_nonoverlapping(NonNull::from(key).cast(), key.len());
            bytes.add(key.len()).copy_from_nonoverlapping(NonNull::from(value).cast(), value.len());
        }
        Record { at: to, arena: PhantomData }
    }

    /// Moves a value in.
    pub fn place<T: Sync>(&self, value: T) -> Placed<'_, T> {
        const {
            assert!(!std::mem::needs_drop::<T>(), "an arena drops nothing");
            assert!(align_of::<T>() <= ALIGN_MAX);
        }
        let to = self.shard().allocate(size_of::<T>(), align_of::<T>().max(ALIGN)).cast::<T>();
        // SAFETY: fresh memory of T's size and alignment, known to nobody else; it stays until the arena goes, which the
        // returned lifetime can not outlive.
        unsafe {
            to.write(value);
            Placed(to.as_ref())
        }
    }

    pub fn totals(&self) -> Totals {
        let mut totals = Totals { bytes: 0, records: 0, seqnos: None };
        let (mut min, mut max) = (u64::MAX, 0);
        for shard in &self.shards {
            totals.bytes += shard.bytes.load(Ordering::Relaxed);
            totals.records += shard.records.load(Ordering::Relaxed);
            min = min.min(shard.seqno_min.load(Ordering::Relaxed));
            max = max.max(shard.seqno_max.load(Ordering::Relaxed));
        }
        totals.seqnos = (totals.records > 0).then_some((Seqno(min), Seqno(max)));
        totals
    }

    pub fn bytes(&self) -> usize {
        self.shards.iter().map(|shard| shard.bytes.load(Ordering::Relaxed)).sum()
    }

    /// Memory that it takes, handed out or not.
    pub fn allocated(&self) -> usize {
        self.shards.iter().map(|shard| shard.allocated.load(Ordering::Relaxed)).sum()
    }

    /// Forgets everything in it and keeps a little memory for the next use. Exclusive access proves that no record or
    /// placed value is borrowed; whoever holds links into it must forget them too.
    pub fn reset(&mut self) {
        for shard in &mut self.shards {
            shard.reset();
        }
    }

    fn shard(&self) -> &Shard {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        thread_local!(static THREAD: usize = THREADS.fetch_add(1, Ordering::Relaxed));
        if self.shards.len() == 1 {
            return &self.shards[0];
        }
        &self.shards[THREAD.with(|thread| *thread) & (self.shards.len() - 1)]
    }
}

impl Shard {
    fn new() -> Self {
        Self {
            chunk: AtomicPtr::default(),
            bytes: AtomicUsize::new(0),
            allocated: AtomicUsize::new(0),
            records: AtomicUsize::new(0),
            seqno_min: AtomicU64::new(u64::MAX),
            seqno_max: AtomicU64::new(0),
            chunks: Mutex::default(),
        }
    }

    fn count(&self, seqno: Seqno) {
        self.records.fetch_add(1, Ordering::Relaxed);
        if seqno.0 < self.seqno_min.load(Ordering::Relaxed) {
            self.seqno_min.fetch_min(seqno.0, Ordering::Relaxed);
        }
        if seqno.0 > self.seqno_max.load(Ordering::Relaxed) {
            self.seqno_max.fetch_max(seqno.0, Ordering::Relaxed);
        }
    }

    /// Fresh memory, valid until the arena is dropped or reset.
    fn allocate(&self, bytes: usize, align: usize) -> NonNull<u8> {
        // A chunk is handed out in multiples of ALIGN; what needs more takes its worst case along.
        let bytes = bytes.next_multiple_of(ALIGN) + (align - ALIGN);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if bytes > OWN_CHUNK_BYTES {
            let chunk = Chunk::allocate(bytes);
            self.allocated.fetch_add(bytes, Ordering::Relaxed);
            self.chunks.lock().push(OwnedChunk(chunk));
            // SAFETY: just made, and freed only with exclusive access to the arena.
            return unsafe { chunk.as_ref() }.start;
        }
        loop {
            let seen = self.chunk.load(Ordering::Acquire);
            // SAFETY: null or a chunk in `chunks`, which is freed only with exclusive access to the arena.
            if let Some(chunk) = unsafe { seen.as_ref() } {
                let from = chunk.used.fetch_add(bytes, Ordering::Relaxed);
                if from + bytes <= chunk.layout.size() {
                    // SAFETY: inside the chunk: rounding up takes at most `align - ALIGN`, which `bytes` includes.
                    // The chunk starts at ALIGN_MAX, so the sum is as aligned as its offset.
                    return unsafe { chunk.start.add(from.next_multiple_of(align)) };
                }
            }
            self.grow(seen);
        }
    }

    /// Makes a new chunk current unless another thread already replaced `seen`.
    #[cold]
    fn grow(&self, seen: *mut Chunk) {
        let mut chunks = self.chunks.lock();
        if self.chunk.load(Ordering::Relaxed) != seen {
            return;
        }
        // SAFETY: as in `allocate`.
        let size = unsafe { seen.as_ref() }.map_or(CHUNK_BYTES_MIN, |chunk| chunk.layout.size() * 2);
        let size = size.clamp(CHUNK_BYTES_MIN.max(OWN_CHUNK_BYTES.min(size)), CHUNK_BYTES_MAX);
        let chunk = Chunk::allocate(size);
        self.allocated.fetch_add(size, Ordering::Relaxed);
        chunks.push(OwnedChunk(chunk));
        self.chunk.store(chunk.as_ptr(), Ordering::Release);
    }

    fn reset(&mut self) {
        let mut kept = None;
        for OwnedChunk(chunk) in self.chunks.get_mut().drain(..) {
            // SAFETY: owned, so not freed yet, and `&mut self` shows that nobody else looks at it.
            let small = unsafe { chunk.as_ref() }.layout.size() <= OWN_CHUNK_BYTES;
            if small && kept.is_none() {
                kept = Some(chunk);
            } else {
                // SAFETY: leaves `chunks` here; the current chunk is replaced below.
                unsafe { Chunk::free(chunk) };
            }
        }
        let current = kept.map_or(std::ptr::null_mut(), NonNull::as_ptr);
        *self = Self::new();
        *self.chunk.get_mut() = current;
        if let Some(chunk) = kept {
            // SAFETY: owned and not shared, as above.
            *self.allocated.get_mut() = unsafe { chunk.as_ref() }.layout.size();
            // SAFETY: owned and not shared, as above.
            unsafe { chunk.as_ref() }.used.store(0, Ordering::Relaxed);
            self.chunks.get_mut().push(OwnedChunk(chunk));
        }
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        for OwnedChunk(chunk) in self.chunks.get_mut().drain(..) {
            // SAFETY: owned, and nothing borrowed from the arena outlives it.
            unsafe { Chunk::free(chunk) };
        }
    }
}

impl Chunk {
    fn allocate(bytes: usize) -> NonNull<Self> {
        let layout =
            Layout::from_size_align(bytes, ALIGN_MAX).expect("chunks are far smaller than isize::MAX");
        // SAFETY: the size is not zero: at least a record's header or CHUNK_BYTES_MIN.
        let start = NonNull::new(unsafe { std::alloc::alloc(layout) })
            .unwrap_or_else(|| std::alloc::handle_alloc_error(layout));
        NonNull::from(Box::leak(Box::new(Self { start, layout, used: AtomicUsize::new(0) })))
    }

    /// # Safety
    /// Made by `allocate`, not freed before, and nothing in it is used afterwards.
    unsafe fn free(chunk: NonNull<Self>) {
        // SAFETY: promised by the caller; `start` and `layout` are what `alloc` gave and took.
        unsafe {
            let chunk = Box::from_raw(chunk.as_ptr());
            std::alloc::dealloc(chunk.start.as_ptr(), chunk.layout);
        }
    }
}

/// A record's first 16 bytes; key and value follow.
#[repr(C)]
struct Header {
    seqno: u64,
    value_bytes: u32,
    key_bytes: u16,
    kind: OpKind,
}

/// One version of one key, in an arena that lives for `'a`.
#[derive(Clone, Copy)]
pub(super) struct Record<'a> {
    /// Kept raw, because a reference to the header may not be used to reach the bytes behind it.
    at: NonNull<u8>,
    arena: PhantomData<&'a [u8]>,
}

impl<'a> Record<'a> {
    fn header(self) -> &'a Header {
        // SAFETY: `at` came from `Arena::record`, which wrote a header there; immutable since; alive for 'a.
        unsafe { self.at.cast::<Header>().as_ref() }
    }
    /// The full key.
    pub fn key(self) -> &'a [u8] {
        // SAFETY: `Arena::record` wrote this many bytes behind the header; immutable since; alive for 'a.
        unsafe {
            std::slice::from_raw_parts(
                self.at.add(size_of::<Header>()).as_ptr(),
                usize::from(self.header().key_bytes),
            )
        }
    }
    pub fn value(self) -> &'a [u8] {
        let header = self.header();
        // SAFETY: as for the key, which comes before it.
        unsafe {
            let start = self.at.add(size_of::<Header>() + usize::from(header.key_bytes));
            std::slice::from_raw_parts(start.as_ptr(), header.value_bytes as usize)
        }
    }
    pub fn seqno(self) -> Seqno {
        Seqno(self.header().seqno)
    }
    pub fn kind(self) -> OpKind {
        self.header().kind
    }
    /// How it sorts against version `seqno` of `key`.
    pub fn cmp(self, key: &[u8], seqno: Seqno) -> Order {
        self.key().cmp(key).then_with(|| seqno.cmp(&self.seqno()))
    }
    /// Asks the processor to have it at hand soon.
    pub fn prefetch(self) {
        prefetch(self.at.as_ptr());
        prefetch(self.at.as_ptr().wrapping_add(64));
    }
    /// Forgets how long it lives.
    pub fn hold(self) -> HeldRecord {
        HeldRecord(self.at)
    }
}

/// A record whose arena is kept alive by other means.
#[derive(Clone, Copy)]
pub(super) struct HeldRecord(NonNull<u8>);

// SAFETY: as good as a `&[u8]`: immutable bytes.
unsafe impl Send for HeldRecord {}
// SAFETY: the same.
unsafe impl Sync for HeldRecord {}

impl HeldRecord {
    /// # Safety
    /// The arena that it came from is neither dropped nor reset during `'a`.
    pub unsafe fn get<'a>(self) -> Record<'a> {
        Record { at: self.0, arena: PhantomData }
    }
}

/// A value in an arena that lives for `'a`.
pub(super) struct Placed<'a, T>(&'a T);

impl<T> Clone for Placed<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Placed<'_, T> {}

impl<T> Deref for Placed<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.0
    }
}

impl<'a, T> Placed<'a, T> {
    /// The value for as long as the arena lives.
    pub fn get(self) -> &'a T {
        self.0
    }
    /// Forgets how long it lives.
    pub fn hold(self) -> Held<T> {
        Held(NonNull::from(self.0))
    }
    /// Asks the processor to have the first `lines` cache lines at hand soon.
    pub fn prefetch(self, lines: usize) {
        for line in 0..lines {
            prefetch(std::ptr::from_ref(self.0).cast::<u8>().wrapping_add(line * 64));
        }
    }
}

/// A placed value whose arena is kept alive by other means.
pub(super) struct Held<T>(NonNull<T>);

impl<T> Clone for Held<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Held<T> {}

// SAFETY: as good as a `&T`.
unsafe impl<T: Sync> Send for Held<T> {}
// SAFETY: the same.
unsafe impl<T: Sync> Sync for Held<T> {}

impl<T> Held<T> {
    /// # Safety
    /// The arena that it came from is neither dropped nor reset during `'a`.
    pub unsafe fn get<'a>(self) -> Placed<'a, T> {
        // SAFETY: made from a reference into an arena which, by the caller's promise, still holds it.
        Placed(unsafe { self.0.as_ref() })
    }
}

/// An atomic pointer to a placed value, or to none.
pub(super) struct Link<T>(AtomicPtr<T>);

impl<T> Default for Link<T> {
    fn default() -> Self {
        Self(AtomicPtr::default())
    }
}

impl<T> Link<T> {
    pub fn get(&self) -> Option<Placed<'_, T>> {
        // SAFETY: null, or set from a `Placed` of the arena that this link lives in or beside, so alive while `self` is;
        // the Acquire pairs with the Release in `set`.
        unsafe { self.0.load(Ordering::Acquire).as_ref() }.map(Placed)
    }
    /// `target` must be of the arena that this link lives in or beside.
    pub fn set(&self, target: Option<Placed<'_, T>>) {
        let target = target.map_or(std::ptr::null_mut(), |target| std::ptr::from_ref(target.0).cast_mut());
        self.0.store(target, Ordering::Release);
    }
}

/// An atomic pointer to a record, or to none.
#[derive(Default)]
pub(super) struct RecordLink(AtomicPtr<u8>);

impl RecordLink {
    #[inline]
    pub fn get(&self) -> Option<Record<'_>> {
        // As for `Link`: null, or a record of the arena that this link lives in.
        NonNull::new(self.0.load(Ordering::Acquire)).map(|at| Record { at, arena: PhantomData })
    }
    /// `target` must be of the arena that this link lives in.
    #[inline]
    pub fn set(&self, target: Option<Record<'_>>) {
        self.0.store(target.map_or(std::ptr::null_mut(), |record| record.at.as_ptr()), Ordering::Release);
    }
}

#[inline]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; any address is allowed.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
