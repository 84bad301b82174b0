//! The newest writes, in memory: sorted, shared by all threads, extended and read at the same time.
//!
//! * A B+tree for each tree id, found through a small table that takes no lock to read.
//! * Records are never changed or removed. A memtable grows until it is frozen (nobody inserts any more), is flushed
//!   and goes away as a whole, when the last reader lets go of it.
//! * What `insert` added is seen by every `get` and seek that starts after it returned.

mod arena;
mod iter;
#[cfg(test)]
mod tests;
mod tree;

use std::ops::Bound;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use self::arena::{Arena, Link, Placed};
use self::tree::Tree;
use crate::cache::{BlockCache, Loan};
use crate::{OpKind, Seqno, TreeId, tree_of};

pub use self::iter::{InOrder, MemtableIter};

/// Shards of a shared memtable's arena: as many threads insert without meeting.
const SHARDS: usize = 8;
/// Tree ids are given out one by one, so the low bits spread them well. Powers of two.
const BUCKETS: usize = 256;
/// A transaction writes to few trees, and its memtable is walked and reset for each commit.
const BUCKETS_FOR_ONE_THREAD: usize = 8;

/// The newest writes, in memory.
pub struct Memtable {
    arena: Arena,
    buckets: Box<[Link<Tree>]>,
    tree_count: AtomicUsize,
    /// Held while a tree is added.
    adding: Mutex<()>,
    /// What it takes of the engine's memory, until its last reader lets go of it.
    memory: OnceLock<Loan>,
}

impl Memtable {
    /// An empty one for many threads.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::with(SHARDS, BUCKETS))
    }

    /// An empty one that a single thread inserts into.
    pub(crate) fn for_one_thread() -> Self {
        Self::with(1, BUCKETS_FOR_ONE_THREAD)
    }

    fn with(shards: usize, buckets: usize) -> Self {
        Self {
            arena: Arena::new(shards),
            buckets: (0..buckets).map(|_| Link::default()).collect(),
            tree_count: AtomicUsize::new(0),
            adding: Mutex::new(()),
            memory: OnceLock::new(),
        }
    }

    /// Adds a version; on return every thread can see it. The same key and seqno again is ignored, so that records
    /// of the wal may be replayed twice.
    ///
    /// # Panics
    /// If `full_key` has no tree id, or key or value are longer than `limits` allow.
    pub fn insert(&self, full_key: &[u8], seqno: Seqno, kind: OpKind, value: &[u8]) {
        let tree = self.tree_or_new(tree_of(full_key));
        let record = self.arena.record(full_key, seqno, kind, value);
        tree.insert(&self.arena, record);
    }

    /// The newest version of `full_key` that is not newer than `at`; none if its tree was dropped by then.
    #[inline]
    pub fn get(&self, full_key: &[u8], at: Seqno) -> Option<(OpKind, Seqno, &[u8])> {
        let tree = self.tree(tree_of(full_key))?.get();
        if tree.dropped().is_some_and(|dropped| dropped <= at) {
            return None;
        }
        tree.get(full_key, at).map(|record| (record.kind(), record.seqno(), record.value()))
    }

    /// Seqno of the newest version of `full_key`.
    pub fn newest(&self, full_key: &[u8]) -> Option<Seqno> {
        self.get(full_key, Seqno(u64::MAX)).map(|(_, seqno, _)| seqno)
    }

    /// Whether anything was ever written to `tree` here.
    pub(crate) fn holds(&self, tree: TreeId) -> bool {
        self.tree(tree).is_some()
    }

    /// From here on reads at `seqno` and later do not see the tree, and iterators pass it over.
    pub fn drop_tree(&self, tree: TreeId, seqno: Seqno) {
        self.tree_or_new(tree).drop_at(seqno);
    }

    /// Bytes taken by records and by the trees above them.
    pub fn bytes(&self) -> usize {
        self.arena.bytes()
    }

    /// Counts what it takes as a loan from `cache`: `planned` bytes at least.
    pub(crate) fn count_memory(&self, cache: &Arc<BlockCache>, planned: usize) {
        let loan = self.memory.get_or_init(|| cache.lend(0));
        loan.at_least(self.arena.allocated().max(planned));
    }

    /// Versions in it.
    pub fn entries(&self) -> usize {
        self.arena.totals().records
    }

    /// Whether there is no version in it.
    pub fn is_empty(&self) -> bool {
        self.entries() == 0
    }

    /// Least and greatest seqno in it. Exact once nobody inserts any more.
    pub fn seqnos(&self) -> Option<(Seqno, Seqno)> {
        self.arena.totals().seqnos
    }

    /// All versions of all trees, standing on nothing until its first seek.
    pub fn iter(self: &Arc<Self>) -> MemtableIter {
        MemtableIter::new(Arc::clone(self), None)
    }

    /// The versions of one tree. Cheaper than `iter` for who needs no other, which is every cursor.
    pub fn iter_tree(self: &Arc<Self>, tree: TreeId) -> MemtableIter {
        MemtableIter::new(Arc::clone(self), Some(tree))
    }

    /// All versions, borrowed.
    pub(crate) fn in_order(&self) -> InOrder<'_> {
        InOrder::new(self)
    }

    /// About how many versions lie between two full keys of one tree: exact when they are few.
    pub fn estimate(&self, low: Bound<&[u8]>, high: Bound<&[u8]>) -> u64 {
        let (Bound::Included(key) | Bound::Excluded(key)) = low else { return self.entries() as u64 };
        self.live_tree(iter::first_tree_of(key)).map_or(0, |tree| tree.estimate(low, high))
    }

    /// Forgets everything; some memory is kept for the next use.
    pub(crate) fn reset(&mut self) {
        for bucket in self.buckets.iter() {
            bucket.set(None);
        }
        *self.tree_count.get_mut() = 0;
        self.arena.reset();
    }

    #[inline]
    fn tree(&self, id: TreeId) -> Option<Placed<'_, Tree>> {
        let mut tree = self.bucket(id).get()?;
        while tree.id != id {
            tree = tree.get().sibling.get()?;
        }
        Some(tree)
    }

    fn live_tree(&self, id: TreeId) -> Option<Placed<'_, Tree>> {
        self.tree(id).filter(|tree| tree.dropped().is_none())
    }

    fn tree_or_new(&self, id: TreeId) -> Placed<'_, Tree> {
        self.tree(id).unwrap_or_else(|| self.add_tree(id))
    }

    #[cold]
    fn add_tree(&self, id: TreeId) -> Placed<'_, Tree> {
        let _adding = self.adding.lock();
        if let Some(tree) = self.tree(id) {
            return tree;
        }
        let tree = self.arena.place(Tree::new(id, &self.arena));
        let bucket = self.bucket(id);
        tree.sibling.set(bucket.get());
        bucket.set(Some(tree));
        self.tree_count.fetch_add(1, Ordering::Release);
        tree
    }

    fn bucket(&self, id: TreeId) -> &Link<Tree> {
        &self.buckets[id.0 as usize & (self.buckets.len() - 1)]
    }

    /// Trees added so far, dropped ones included.
    fn tree_count(&self) -> usize {
        self.tree_count.load(Ordering::Acquire)
    }

    /// At least the trees that `tree_count` counted before; in no order.
    fn trees(&self) -> Vec<Placed<'_, Tree>> {
        let chain = |bucket| {
            std::iter::successors(Link::get(bucket), |tree: &Placed<'_, Tree>| tree.get().sibling.get())
        };
        self.buckets.iter().flat_map(chain).collect()
    }
}
