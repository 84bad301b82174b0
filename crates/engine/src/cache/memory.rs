//! Decoded blocks in memory. Each open sst has an array of slots, one for each of its blocks, so a hit is one atomic
//! load: no lock, no hash.
//!
//! * What stays is decided by S3-FIFO: new blocks pass through a small queue and reach the main one only if they are
//!   hit again, so a scan does not push out what is hot.
//! * The bytes in slots are at most the capacity once `keep` returns; a reader may hold on to an evicted block.
//! * The capacity is what is left of the engine's memory: whatever else grows there takes a [`Loan`], and blocks make room at once.
//! * A slot is emptied by eviction or with its sst, never refilled with something else: an sst does not change.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use arc_swap::{ArcSwapOption, Guard};
use parking_lot::Mutex;

/// Share of the capacity that the small queue may take: a tenth.
const SMALL_DIVISOR: usize = 10;
/// Hits beyond this many do not count.
const HOT_MAX: u8 = 3;
/// Bookkeeping of one cached block: counts, queue entry, allocator.
const HELD_BYTES: usize = 96;

/// A cached thing and how often it was hit lately.
pub(crate) struct Held<T> {
    hot: AtomicU8,
    bytes: u32,
    item: T,
}

impl<T> Deref for Held<T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.item
    }
}

/// The place of one block in its sst's array.
pub(crate) struct Slot<T> {
    held: ArcSwapOption<Held<T>>,
    /// When it was evicted from the small queue, counted in such evictions; 0: never.
    evicted: AtomicU32,
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self { held: ArcSwapOption::const_empty(), evicted: AtomicU32::new(0) }
    }
}

impl<T> Slot<T> {
    /// What is there, held without touching its reference count. Counts as a hit.
    #[inline]
    pub(crate) fn look(&self) -> Guard<Option<Arc<Held<T>>>> {
        let guard = self.held.load();
        if let Some(held) = &*guard {
            let hot = held.hot.load(Ordering::Relaxed);
            // Saturated blocks are not written to, so that their cache line stays shared between cores.
            if hot < HOT_MAX {
                held.hot.store(hot + 1, Ordering::Relaxed);
            }
        }
        guard
    }

    /// How often what is there was hit lately; `None`: nothing is there.
    pub(crate) fn heat(&self) -> Option<u8> {
        self.held.load().as_ref().map(|held| held.hot.load(Ordering::Relaxed))
    }

    /// What is there, without counting as a hit: for those who pass by once.
    pub(crate) fn peek(&self) -> Option<Arc<Held<T>>> {
        self.held.load_full()
    }

    /// Puts `held` here unless another thread was first; returns what is here now and whether it is ours.
    fn fill(&self, held: Arc<Held<T>>) -> (Arc<Held<T>>, bool) {
        match &*self.held.compare_and_swap(&None::<Arc<Held<T>>>, Some(Arc::clone(&held))) {
            Some(first) => (Arc::clone(first), false),
            None => (held, true),
        }
    }

    /// Takes a hit back if there was one (`true`: it stays), else empties the slot.
    fn cool(&self, now: u32) -> bool {
        let held = self.held.load();
        let Some(held) = &*held else { return false };
        let hot = held.hot.load(Ordering::Relaxed);
        if hot > 0 {
            held.hot.store(hot - 1, Ordering::Relaxed);
            return true;
        }
        self.evicted.store(now, Ordering::Relaxed);
        self.held.store(None);
        false
    }

    fn resident_bytes(&self) -> usize {
        self.held.load().as_ref().map_or(0, |held| held.bytes as usize)
    }
}

/// All slots of one open sst: for each partition one for `P` (its filter and index), one for `F` (its filter of first parts) and
/// one for each data block `B`.
pub(crate) struct Slots<P, F, B> {
    cache: Arc<BlockCache>,
    partitions: Box<[PartitionSlots<P, F, B>]>,
}

struct PartitionSlots<P, F, B> {
    own: Slot<P>,
    first_parts: Slot<F>,
    blocks: u32,
    /// Made when the first block is wanted: a cold sst costs little.
    data: OnceLock<Box<[Slot<B>]>>,
}

/// Names a slot in its array.
#[derive(Clone, Copy, Debug)]
struct Place {
    partition: u32,
    piece: Piece,
}

#[derive(Clone, Copy, Debug)]
enum Piece {
    /// Filter and index.
    Own,
    FirstParts,
    /// A data block, by its number within the partition.
    Block(u32),
}

impl<P: Send + Sync + 'static, F: Send + Sync + 'static, B: Send + Sync + 'static> Slots<P, F, B> {
    /// Empty slots for partitions of that many data blocks.
    pub(crate) fn new(cache: &Arc<BlockCache>, blocks: impl Iterator<Item = u32>) -> Arc<Self> {
        let partitions = blocks
            .map(|blocks| PartitionSlots {
                own: Slot::default(),
                first_parts: Slot::default(),
                blocks,
                data: OnceLock::new(),
            })
            .collect();
        Arc::new(Self { cache: Arc::clone(cache), partitions })
    }

    /// The slot of a partition.
    #[inline]
    pub(crate) fn partition(&self, partition: usize) -> &Slot<P> {
        &self.partitions[partition].own
    }

    /// The slot of a partition's filter of first parts.
    pub(crate) fn first_parts(&self, partition: usize) -> &Slot<F> {
        &self.partitions[partition].first_parts
    }

    /// The slot of a data block.
    #[inline]
    pub(crate) fn block(&self, partition: usize, block: usize) -> &Slot<B> {
        let slots = &self.partitions[partition];
        &slots.data.get_or_init(|| (0..slots.blocks).map(|_| Slot::default()).collect())[block]
    }

    /// Caches a partition; returns what is cached now, which may be another thread's.
    pub(crate) fn keep_partition(self: &Arc<Self>, partition: usize, item: P, bytes: usize) -> Arc<Held<P>> {
        let place = Place { partition: partition as u32, piece: Piece::Own };
        self.keep(self.partition(partition), place, item, bytes)
    }

    /// Caches a partition's filter of first parts; returns what is cached now, which may be another thread's.
    pub(crate) fn keep_first_parts(
        self: &Arc<Self>,
        partition: usize,
        item: F,
        bytes: usize,
    ) -> Arc<Held<F>> {
        let place = Place { partition: partition as u32, piece: Piece::FirstParts };
        self.keep(self.first_parts(partition), place, item, bytes)
    }

    /// Caches a data block; returns what is cached now, which may be another thread's.
    pub(crate) fn keep_block(
        self: &Arc<Self>,
        partition: usize,
        block: usize,
        item: B,
        bytes: usize,
    ) -> Arc<Held<B>> {
        let place = Place { partition: partition as u32, piece: Piece::Block(block as u32) };
        self.keep(self.block(partition, block), place, item, bytes)
    }

    fn keep<T>(self: &Arc<Self>, slot: &Slot<T>, place: Place, item: T, bytes: usize) -> Arc<Held<T>> {
        let held = Self::unkept(item, bytes);
        let bytes = held.bytes as usize;
        let (held, ours) = slot.fill(held);
        if ours {
            let owner: Arc<dyn Evictable> = Arc::clone(self) as Arc<dyn Evictable>;
            self.cache.admit(&owner, place, bytes, slot.evicted.load(Ordering::Relaxed));
        }
        held
    }

    /// The same for someone who passes by once: nothing is cached.
    pub(crate) fn unkept<T>(item: T, bytes: usize) -> Arc<Held<T>> {
        let bytes = u32::try_from(bytes + HELD_BYTES).unwrap_or(u32::MAX);
        Arc::new(Held { hot: AtomicU8::new(0), bytes, item })
    }
}

/// An array of slots as the queues see it. (A trait because the cache does not know what it caches.)
trait Evictable: Send + Sync {
    /// Takes a hit back (`true`) or empties the slot.
    fn cool(&self, place: Place, now: u32) -> bool;
}

impl<P: Send + Sync, F: Send + Sync, B: Send + Sync> Evictable for Slots<P, F, B> {
    fn cool(&self, place: Place, now: u32) -> bool {
        let partition = &self.partitions[place.partition as usize];
        match place.piece {
            Piece::Own => partition.own.cool(now),
            Piece::FirstParts => partition.first_parts.cool(now),
            Piece::Block(block) => partition.data.get().is_some_and(|slots| slots[block as usize].cool(now)),
        }
    }
}

impl<P, F, B> Drop for Slots<P, F, B> {
    fn drop(&mut self) {
        // The queue entries stay behind until they are met or swept; their bytes are free from now on.
        let bytes: usize = self
            .partitions
            .iter()
            .map(|p| {
                let data = p.data.get().map_or(0, |slots| slots.iter().map(Slot::resident_bytes).sum());
                p.own.resident_bytes() + p.first_parts.resident_bytes() + data
            })
            .sum();
        self.cache.dead_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// The memory of an engine: what nobody has borrowed is for blocks.
pub(crate) struct BlockCache {
    memory: usize,
    /// The sum of all loans.
    lent: AtomicUsize,
    /// By how much the process is larger than it should be, whatever the reason.
    excess: AtomicUsize,
    queues: Mutex<Queues>,
    /// Bytes of entries in the queues whose sst is gone.
    dead_bytes: AtomicUsize,
    hits: [Stripe; STRIPES],
    misses: AtomicU64,
}

/// What SHOW STATUS tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCacheStatus {
    /// Data blocks found in memory.
    pub hits: u64,
    /// Data blocks that were not.
    pub misses: u64,
    /// Bytes that cached blocks take.
    pub bytes: u64,
    /// Bytes that they may take.
    pub capacity: u64,
    /// Blocks evicted.
    pub evictions: u64,
    /// Bytes that others have borrowed.
    pub lent: u64,
    /// Bytes that the process was found to take beyond its limit, and that blocks give up for it.
    pub excess: u64,
}

/// Memory that is not for blocks as long as this lives.
pub(crate) struct Loan {
    cache: Arc<BlockCache>,
    bytes: AtomicUsize,
}

impl Loan {
    /// What it is from now on.
    pub(crate) fn resize(&self, bytes: usize) {
        let before = self.bytes.swap(bytes, Ordering::Relaxed);
        if bytes > before {
            self.cache.lent.fetch_add(bytes - before, Ordering::Relaxed);
            self.cache.make_room();
        } else {
            self.cache.lent.fetch_sub(before - bytes, Ordering::Relaxed);
        }
    }

    /// Grows to so many, unless it is larger.
    pub(crate) fn at_least(&self, bytes: usize) {
        if bytes > self.bytes.load(Ordering::Relaxed) {
            self.resize(bytes);
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.cache.lent.fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

/// Blocks keep a sixteenth of the memory whatever others borrow: without any of them, each read would unpack a block anew.
const FLOOR_DIVISOR: usize = 16;

const STRIPES: usize = 16;

/// A counter on a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Stripe(AtomicU64);

#[derive(Default)]
struct Queues {
    small: VecDeque<Entry>,
    main: VecDeque<Entry>,
    small_bytes: usize,
    main_bytes: usize,
    /// Evictions from the small queue; wraps. Never 0 when stored in a slot.
    small_evictions: u32,
    evictions: u64,
}

struct Entry {
    owner: Weak<dyn Evictable>,
    place: Place,
    bytes: u32,
}

impl BlockCache {
    /// An empty cache of that many bytes.
    pub(crate) fn new(memory: usize) -> Arc<Self> {
        Arc::new(Self {
            memory,
            lent: AtomicUsize::new(0),
            excess: AtomicUsize::new(0),
            queues: Mutex::default(),
            dead_bytes: AtomicUsize::new(0),
            hits: Default::default(),
            misses: AtomicU64::new(0),
        })
    }

    /// Takes `bytes` out of the memory for blocks; some are evicted if need be. Never fails: who must not grow asks [`Self::spares`] first.
    pub(crate) fn lend(self: &Arc<Self>, bytes: usize) -> Loan {
        let loan = Loan { cache: Arc::clone(self), bytes: AtomicUsize::new(0) };
        loan.resize(bytes);
        loan
    }

    /// Whether a loan of `bytes` would leave at least half of the memory to blocks.
    pub(crate) fn spares(&self, bytes: usize) -> bool {
        self.lent.load(Ordering::Relaxed).saturating_add(bytes) <= self.memory / 2
    }

    /// The process was found to take so many bytes more than it should, or fewer. What is counted here is never all that it takes, so
    /// blocks make up for the rest: at once for what is too much, step by step back.
    pub(crate) fn heed(&self, too_much: i64) {
        let excess = self.excess.load(Ordering::Relaxed);
        let bytes = usize::try_from(too_much.unsigned_abs()).unwrap_or(usize::MAX);
        let next = if too_much > 0 {
            excess.saturating_add(bytes).min(self.memory)
        } else {
            excess.saturating_sub(bytes / 8)
        };
        self.excess.store(next, Ordering::Relaxed);
        if next > excess {
            self.make_room();
        }
    }

    fn capacity(&self) -> usize {
        let taken = self.lent.load(Ordering::Relaxed).saturating_add(self.excess.load(Ordering::Relaxed));
        self.memory.saturating_sub(taken).max(self.memory / FLOOR_DIVISOR)
    }

    /// Counts a hit of a data block.
    #[inline]
    pub(crate) fn count_hit(&self) {
        thread_local!(static STRIPE: usize = {
            static NEXT: AtomicUsize = const { AtomicUsize::new(0) };
            NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES
        });
        self.hits[STRIPE.with(|stripe| *stripe)].0.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a miss of a data block.
    pub(crate) fn count_miss(&self) {
        self.misses.fetch_add(1, Ordering::Relaxed);
    }

    /// Misses so far.
    #[inline]
    pub(crate) fn misses(&self) -> u64 {
        self.misses.load(Ordering::Relaxed)
    }

    /// Counters and sizes at about this moment.
    pub(crate) fn status(&self) -> BlockCacheStatus {
        let queues = self.queues.lock();
        let dead = self.dead_bytes.load(Ordering::Relaxed);
        BlockCacheStatus {
            hits: self.hits.iter().map(|stripe| stripe.0.load(Ordering::Relaxed)).sum(),
            misses: self.misses.load(Ordering::Relaxed),
            bytes: queues.bytes().saturating_sub(dead) as u64,
            capacity: self.capacity() as u64,
            evictions: queues.evictions,
            lent: self.lent.load(Ordering::Relaxed) as u64,
            excess: self.excess.load(Ordering::Relaxed) as u64,
        }
    }

    fn admit(&self, owner: &Arc<dyn Evictable>, place: Place, bytes: usize, evicted: u32) {
        let mut queues = self.queues.lock();
        let entry = Entry { owner: Arc::downgrade(owner), place, bytes: bytes as u32 };
        // Evicted not long ago and wanted again: that was a mistake, the main queue is its place.
        let age = queues.small_evictions.wrapping_sub(evicted);
        if evicted != 0 && (age as usize) < queues.main.len().max(queues.small.len()) {
            queues.push_main(entry);
        } else {
            queues.push_small(entry);
        }
        self.fit(&mut queues);
    }

    fn make_room(&self) {
        self.fit(&mut self.queues.lock());
    }

    fn fit(&self, queues: &mut Queues) {
        let capacity = self.capacity();
        if self.dead_bytes.load(Ordering::Relaxed) > capacity / 8 {
            let swept = queues.sweep();
            self.forgive(swept);
        }
        while queues.bytes().saturating_sub(self.dead_bytes.load(Ordering::Relaxed)) > capacity {
            let Some(dead) = queues.evict_one(capacity / SMALL_DIVISOR) else { break };
            self.forgive(dead);
        }
    }

    fn forgive(&self, bytes: usize) {
        // An owner that dies right now may not have added its bytes yet; being short for a moment is harmless.
        let less = |dead: usize| Some(dead.saturating_sub(bytes));
        self.dead_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok();
    }
}

impl Queues {
    fn bytes(&self) -> usize {
        self.small_bytes + self.main_bytes
    }

    fn push_small(&mut self, entry: Entry) {
        self.small_bytes += entry.bytes as usize;
        self.small.push_back(entry);
    }

    fn push_main(&mut self, entry: Entry) {
        self.main_bytes += entry.bytes as usize;
        self.main.push_back(entry);
    }

    /// Takes one entry off a queue: moved on if it was hit, gone if not. Returns the bytes of a dead one; `None` when
    /// both queues are empty.
    fn evict_one(&mut self, small_target: usize) -> Option<usize> {
        let from_small = !self.small.is_empty() && (self.small_bytes > small_target || self.main.is_empty());
        let entry = if from_small { self.small.pop_front() } else { self.main.pop_front() }?;
        let bytes = entry.bytes as usize;
        if from_small {
            self.small_bytes -= bytes;
        } else {
            self.main_bytes -= bytes;
        }
        let Some(owner) = entry.owner.upgrade() else { return Some(bytes) };
        let now = if from_small { self.next_small_eviction() } else { 0 };
        if owner.cool(entry.place, now) {
            self.push_main(entry);
        } else {
            self.evictions += 1;
        }
        Some(0)
    }

    fn next_small_eviction(&mut self) -> u32 {
        self.small_evictions = self.small_evictions.wrapping_add(1).max(1);
        self.small_evictions
    }

    /// Drops the entries whose sst is gone; returns their bytes.
    fn sweep(&mut self) -> usize {
        let before = self.bytes();
        let alive = |entry: &Entry| entry.owner.strong_count() > 0;
        self.small.retain(alive);
        self.main.retain(alive);
        self.small_bytes = self.small.iter().map(|entry| entry.bytes as usize).sum();
        self.main_bytes = self.main.iter().map(|entry| entry.bytes as usize).sum();
        before - self.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type TestSlots = Slots<(), (), usize>;
    const ITEM: usize = 1000;

    fn slots(cache: &Arc<BlockCache>, blocks: u32) -> Arc<TestSlots> {
        Slots::new(cache, std::iter::once(blocks))
    }

    fn fits(items: usize) -> Arc<BlockCache> {
        BlockCache::new(items * (ITEM + HELD_BYTES))
    }

    fn touch(slots: &Arc<TestSlots>, block: usize) -> bool {
        let hit = slots.block(0, block).look().is_some();
        if !hit {
            slots.keep_block(0, block, block, ITEM);
        }
        hit
    }

    #[test]
    fn what_was_kept_is_found_and_the_budget_holds() {
        let cache = fits(100);
        let slots = slots(&cache, 1000);
        for block in 0..1000 {
            assert!(!touch(&slots, block));
            assert!(cache.status().bytes <= cache.status().capacity);
        }
        let resident = (0..1000).filter(|&block| slots.block(0, block).peek().is_some()).count();
        assert!((95..=100).contains(&resident), "{resident}");
        assert!(slots.block(0, 999).peek().is_some_and(|held| **held == 999));
    }

    #[test]
    fn a_scan_does_not_push_out_what_is_hot() {
        let cache = fits(100);
        let (hot, cold) = (slots(&cache, 50), slots(&cache, 10_000));
        for _ in 0..4 {
            (0..50).for_each(|block| {
                touch(&hot, block);
            });
        }
        (0..10_000).for_each(|block| {
            touch(&cold, block);
        });
        let kept = (0..50).filter(|&block| hot.block(0, block).peek().is_some()).count();
        assert_eq!(kept, 50);
    }

    #[test]
    fn a_block_wanted_again_soon_after_its_eviction_stays() {
        let cache = fits(100);
        let (hot, cold) = (slots(&cache, 60), slots(&cache, 10_000));
        (0..60).for_each(|block| {
            touch(&hot, block);
        });
        (0..60).for_each(|block| {
            touch(&cold, block);
        }); // pushes some of `hot` out of the small queue, unhit
        let evicted: Vec<_> = (0..60).filter(|&block| hot.block(0, block).peek().is_none()).collect();
        assert!(!evicted.is_empty());
        evicted.iter().for_each(|&block| {
            touch(&hot, block);
        });
        (100..400).for_each(|block| {
            touch(&cold, block);
        });
        assert!(evicted.iter().all(|&block| hot.block(0, block).peek().is_some()));
    }

    #[test]
    fn the_blocks_of_a_closed_sst_are_free_at_once() {
        let cache = fits(100);
        for _ in 0..20 {
            let slots = slots(&cache, 90);
            (0..90).for_each(|block| {
                touch(&slots, block);
            });
            assert_eq!((0..90).filter(|&block| slots.block(0, block).peek().is_some()).count(), 90);
            drop(slots);
            assert_eq!(cache.status().bytes, 0);
        }
        assert!(cache.queues.lock().small.len() <= 200, "dead entries are swept");
    }

    #[test]
    fn without_capacity_everything_still_works() {
        let cache = BlockCache::new(0);
        let slots = slots(&cache, 10);
        assert_eq!(**slots.keep_block(0, 3, 3, ITEM), 3);
        assert!(slots.block(0, 3).peek().is_none());
    }

    #[test]
    fn blocks_make_room_for_loans_and_get_it_back() {
        let cache = fits(100);
        let slots = slots(&cache, 1000);
        let fill = |slots: &Arc<TestSlots>| {
            (0..1000).for_each(|block| {
                touch(slots, block);
            });
        };
        let item = ITEM + HELD_BYTES;
        fill(&slots);
        let loan = cache.lend(60 * item);
        assert!(cache.status().bytes <= 40 * item as u64);
        loan.at_least(10 * item); // it is more already
        fill(&slots);
        assert!(cache.status().bytes <= 40 * item as u64);
        assert!(!cache.spares(0), "more than half is lent");
        loan.resize(1000 * item);
        assert_eq!(cache.status().bytes, 6 * item as u64, "a sixteenth stays");
        drop(loan);
        fill(&slots);
        assert!(cache.status().bytes >= 95 * item as u64);
        assert_eq!(cache.status().lent, 0);
    }

    #[test]
    fn blocks_make_up_for_what_was_not_counted() {
        let cache = fits(100);
        let slots = slots(&cache, 1000);
        let item = (ITEM + HELD_BYTES) as i64;
        (0..1000).for_each(|block| {
            touch(&slots, block);
        });
        cache.heed(30 * item);
        assert!(cache.status().bytes <= 70 * item as u64);
        cache.heed(10 * item);
        assert_eq!(cache.status().excess, 40 * item as u64, "it did not help enough");
        cache.heed(-80 * item);
        assert_eq!(cache.status().excess, 30 * item as u64);
        for _ in 0..100 {
            cache.heed(-80 * item);
        }
        assert_eq!(cache.status().excess, 0);
    }

    #[test]
    fn threads_agree_on_what_is_in_a_slot() {
        let cache = fits(20);
        let slots = slots(&cache, 50);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let slots = &slots;
                scope.spawn(move || {
                    for round in 0..20_000usize {
                        let block = (round * (7 + thread)) % 50;
                        let found = match &*slots.block(0, block).look() {
                            Some(held) => ***held,
                            None => **slots.keep_block(0, block, block, ITEM),
                        };
                        assert_eq!(found, block);
                    }
                });
            }
        });
        assert!(cache.status().bytes <= cache.status().capacity);
    }
}
