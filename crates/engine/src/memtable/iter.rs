//! Walks a memtable in order while others extend it.
//!
//! * A walk stands in a private copy of one leaf's record pointers, taken at one moment; a step inside it touches
//!   nothing shared.
//! * It shows everything that was inserted before its last seek, and of what came later any part. Who reads at a
//!   snapshot does not notice: what comes later is newer than the snapshot.
//! * Dropped trees are passed over.
#![allow(unsafe_code, reason = "records and nodes are held beside the memtable that owns them")]

use std::sync::Arc;

use super::Memtable;
use super::arena::{Held, HeldRecord, Placed, Record};
use super::tree::{FANOUT, LeafView, Node, Target, Tree};
use crate::source::Source;
use crate::{OpKind, Result, Seqno, TreeId};

/// How far ahead records are fetched into the processor's cache while walking.
const PREFETCH_RECORDS: usize = 6;
/// Older versions of a key that are passed one by one before a seek is cheaper.
const VERSIONS_STEPPED_MAX: usize = 16;

/// A position in a memtable. All its calls take the memtable that it was first used with.
struct Walk {
    /// The one tree to walk, or all of them.
    only: Option<TreeId>,
    /// All trees by id; kept only when all are walked.
    trees: Vec<Held<Tree>>,
    tree: Option<Held<Tree>>,
    records: [Option<HeldRecord>; FANOUT],
    count: usize,
    /// Valid while it is below `count`.
    at: usize,
    lower: Option<HeldRecord>,
    next: Option<Held<Node>>,
}

/// A [`Source`] over a memtable, which it keeps alive.
pub struct MemtableIter {
    memtable: Arc<Memtable>,
    walk: Walk,
}

impl MemtableIter {
    pub(super) fn new(memtable: Arc<Memtable>, only: Option<TreeId>) -> Self {
        Self { memtable, walk: Walk::new(only) }
    }

    #[inline]
    fn record(&self) -> Record<'_> {
        self.walk.record(&self.memtable)
    }
}

/// For a write set, where the newest version of a key stands for all of them.
impl MemtableIter {
    /// Past all versions of the key it stands on.
    pub(crate) fn next_key(&mut self) {
        let from = self.walk.record(&self.memtable);
        for _ in 0..VERSIONS_STEPPED_MAX {
            self.walk.next(&self.memtable);
            if self.walk.at >= self.walk.count || self.walk.record(&self.memtable).key() != from.key() {
                return;
            }
        }
        self.seek_past_key();
    }

    /// The same, not from the copied leaf but from what is there now.
    pub(crate) fn seek_past_key(&mut self) {
        let from = self.walk.record(&self.memtable);
        self.walk.seek(&self.memtable, from.key(), Seqno(0));
    }

    /// To the newest version of the key before the one it stands on.
    pub(crate) fn prev_key(&mut self) {
        let from = self.walk.record(&self.memtable);
        match self.walk.before_in_leaf(&self.memtable) {
            Some(before) if before.key() != from.key() => self.walk.at -= 1,
            _ => self.walk.seek_before(&self.memtable, from.key()),
        }
        self.newest_of_key();
    }

    /// The same, not from the copied leaf but from what is there now.
    pub(crate) fn seek_before_key(&mut self) {
        let from = self.walk.record(&self.memtable);
        self.walk.seek_before(&self.memtable, from.key());
        self.newest_of_key();
    }

    /// To the newest version of the key it stands on, if it stands on one.
    pub(crate) fn newest_of_key(&mut self) {
        if self.walk.at >= self.walk.count {
            return;
        }
        let oldest = self.walk.record(&self.memtable);
        match self.walk.before_in_leaf(&self.memtable) {
            Some(before) if before.key() != oldest.key() => (),
            _ => self.walk.seek(&self.memtable, oldest.key(), Seqno(u64::MAX)),
        }
    }

    /// Stands on nothing in `memtable`, which may be the one it had.
    pub(crate) fn change_to(&mut self, memtable: &Arc<Memtable>) {
        (self.walk, self.memtable) = (Walk::new(self.walk.only), Arc::clone(memtable));
    }
}

impl Source for MemtableIter {
    fn seek(&mut self, key: &[u8], seqno: Seqno) -> Result<()> {
        self.walk.seek(&self.memtable, key, seqno);
        Ok(())
    }
    fn seek_before(&mut self, key: &[u8]) -> Result<()> {
        self.walk.seek_before(&self.memtable, key);
        Ok(())
    }
    #[inline]
    fn next(&mut self) -> Result<()> {
        self.walk.next(&self.memtable);
        Ok(())
    }
    #[inline]
    fn prev(&mut self) -> Result<()> {
        self.walk.prev(&self.memtable);
        Ok(())
    }
    #[inline]
    fn valid(&self) -> bool {
        self.walk.at < self.walk.count
    }
    #[inline]
    fn key(&self) -> &[u8] {
        self.record().key()
    }
    #[inline]
    fn seqno(&self) -> Seqno {
        self.record().seqno()
    }
    #[inline]
    fn kind(&self) -> OpKind {
        self.record().kind()
    }
    #[inline]
    fn value(&self) -> &[u8] {
        self.record().value()
    }

    #[inline]
    fn pass_key(&mut self) -> Result<()> {
        self.next_key();
        Ok(())
    }

    fn steps_before(&self, key: &[u8]) -> usize {
        let ahead = &self.walk.records[self.walk.at + 1..self.walk.count];
        ahead.partition_point(|&held| held.is_some_and(|held| record(&self.memtable, held).key() < key))
    }

    #[inline]
    fn glide_step(&mut self) -> bool {
        let from = self.walk.record(&self.memtable);
        self.walk.next(&self.memtable);
        self.walk.record(&self.memtable).key() == from.key()
    }
}

/// Every version of a borrowed memtable in order.
pub struct InOrder<'a> {
    memtable: &'a Memtable,
    walk: Walk,
}

impl<'a> InOrder<'a> {
    pub(super) fn new(memtable: &'a Memtable) -> Self {
        let mut walk = Walk::new(None);
        walk.seek(memtable, &[], Seqno(u64::MAX));
        Self { memtable, walk }
    }
}

impl<'a> Iterator for InOrder<'a> {
    /// Full key, seqno, kind and value.
    type Item = (&'a [u8], Seqno, OpKind, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.walk.at >= self.walk.count {
            return None;
        }
        let record = self.walk.record(self.memtable);
        self.walk.next(self.memtable);
        Some((record.key(), record.seqno(), record.kind(), record.value()))
    }
}

impl Walk {
    fn new(only: Option<TreeId>) -> Self {
        Self {
            only,
            trees: Vec::new(),
            tree: None,
            records: [None; FANOUT],
            count: 0,
            at: 0,
            lower: None,
            next: None,
        }
    }

    #[inline]
    fn record<'a>(&self, memtable: &'a Memtable) -> Record<'a> {
        record(memtable, self.records[self.at].expect("only a valid source is asked for its version"))
    }

    fn seek(&mut self, memtable: &Memtable, key: &[u8], seqno: Seqno) {
        self.refresh(memtable);
        let tree = first_tree_of(key);
        match self.only {
            Some(only) if tree > only => return self.leave(),
            Some(only) if tree < only => return self.first_from(memtable, only),
            _ => (),
        }
        if let Some(found) = memtable.live_tree(tree) {
            self.enter_tree(found, Target::At(key, seqno));
            self.skip_forward(memtable);
        } else {
            self.first_from(memtable, tree);
        }
    }

    fn seek_before(&mut self, memtable: &Memtable, key: &[u8]) {
        self.refresh(memtable);
        let tree = first_tree_of(key);
        match self.only {
            Some(only) if tree < only => return self.leave(),
            Some(only) if tree > only => return self.last_until(memtable, only),
            _ => (),
        }
        match memtable.live_tree(tree) {
            Some(found) => self.before(memtable, found, key, Seqno(u64::MAX)),
            None => self.last_below(memtable, tree),
        }
    }

    #[inline]
    fn next(&mut self, memtable: &Memtable) {
        assert!(self.at < self.count, "next on an iterator that stands on nothing");
        self.at += 1;
        if self.at == self.count {
            self.skip_forward(memtable);
        } else if let Some(Some(ahead)) = self.records.get(self.at + PREFETCH_RECORDS) {
            record(memtable, *ahead).prefetch();
        }
    }

    #[inline]
    fn prev(&mut self, memtable: &Memtable) {
        assert!(self.at < self.count, "prev on an iterator that stands on nothing");
        if self.at > 0 {
            self.at -= 1;
            if let Some(Some(ahead)) = self.at.checked_sub(PREFETCH_RECORDS).map(|ahead| self.records[ahead])
            {
                record(memtable, ahead).prefetch();
            }
            return;
        }
        self.skip_backward(memtable);
    }

    /// The record before the one it stands on, if that is in the copied leaf.
    fn before_in_leaf<'a>(&self, memtable: &'a Memtable) -> Option<Record<'a>> {
        let before = self.records[self.at.checked_sub(1)?]?;
        Some(record(memtable, before))
    }

    /// From behind the last record of the copied leaf to the next record there is.
    fn skip_forward(&mut self, memtable: &Memtable) {
        while self.at >= self.count {
            if let Some(next) = self.next {
                self.copy_whole(placed(memtable, next));
                self.at = 0;
            } else {
                let Some(tree) = self.tree else { return self.leave() };
                return self.first_above(memtable, placed(memtable, tree).id);
            }
        }
    }

    /// To the record before the first one of the copied leaf.
    fn skip_backward(&mut self, memtable: &Memtable) {
        let Some(tree) = self.tree else { return self.leave() };
        let tree = placed(memtable, tree);
        match self.lower {
            // What is left of this leaf may have been split since, so the way back starts at the root.
            Some(lower) => {
                let lower = record(memtable, lower);
                self.before(memtable, tree, lower.key(), lower.seqno());
            }
            None => self.last_below(memtable, tree.id),
        }
    }

    fn before(&mut self, memtable: &Memtable, tree: Placed<'_, Tree>, key: &[u8], seqno: Seqno) {
        self.enter_tree(tree, Target::Before(key, seqno));
        match self.at.checked_sub(1) {
            Some(at) => self.at = at,
            // Only the leftmost leaf can have nothing before a version that it covers.
            None => self.last_below(memtable, tree.id),
        }
    }

    fn first_above(&mut self, memtable: &Memtable, tree: TreeId) {
        match tree.0.checked_add(1) {
            Some(above) => self.first_from(memtable, TreeId(above)),
            None => self.leave(),
        }
    }

    /// To the first record of the trees from `least` on.
    fn first_from(&mut self, memtable: &Memtable, least: TreeId) {
        let mut least = Some(least);
        while let Some(tree) = least.and_then(|least| self.tree_from(memtable, least)) {
            self.enter_tree(tree, Target::At(&tree.id.0.to_be_bytes(), Seqno(u64::MAX)));
            if self.at < self.count {
                return;
            }
            least = tree.id.0.checked_add(1).map(TreeId);
        }
        self.leave();
    }

    fn last_below(&mut self, memtable: &Memtable, tree: TreeId) {
        match tree.0.checked_sub(1) {
            Some(below) => self.last_until(memtable, TreeId(below)),
            None => self.leave(),
        }
    }

    /// To the last record of the trees up to `greatest`.
    fn last_until(&mut self, memtable: &Memtable, greatest: TreeId) {
        let mut greatest = Some(greatest);
        while let Some(tree) = greatest.and_then(|greatest| self.tree_until(memtable, greatest)) {
            self.enter_tree(tree, Target::End);
            if let Some(at) = self.at.checked_sub(1) {
                self.at = at;
                return;
            }
            greatest = tree.id.0.checked_sub(1).map(TreeId);
        }
        self.leave();
    }

    fn tree_from<'a>(&self, memtable: &'a Memtable, least: TreeId) -> Option<Placed<'a, Tree>> {
        if let Some(only) = self.only {
            return memtable.live_tree(only).filter(|_| only >= least);
        }
        let from = self.trees.partition_point(|&tree| placed(memtable, tree).id < least);
        self.trees[from..].iter().map(|&tree| placed(memtable, tree)).find(|tree| tree.dropped().is_none())
    }

    fn tree_until<'a>(&self, memtable: &'a Memtable, greatest: TreeId) -> Option<Placed<'a, Tree>> {
        if let Some(only) = self.only {
            return memtable.live_tree(only).filter(|_| only <= greatest);
        }
        let to = self.trees.partition_point(|&tree| placed(memtable, tree).id <= greatest);
        let mut trees = self.trees[..to].iter().rev().map(|&tree| placed(memtable, tree));
        trees.find(|tree| tree.dropped().is_none())
    }

    /// Learns of trees that are new since the last seek.
    fn refresh(&mut self, memtable: &Memtable) {
        if self.only.is_none() && self.trees.len() != memtable.tree_count() {
            self.trees = memtable.trees().into_iter().map(Placed::hold).collect();
            self.trees.sort_by_key(|&tree| placed(memtable, tree).id);
        }
    }

    /// Stands on nothing.
    fn leave(&mut self) {
        (self.at, self.count, self.next, self.lower, self.tree) = (0, 0, None, None, None);
    }

    /// Copies the leaf where `target` is and stands at its position there, which may be behind the last record.
    fn enter_tree(&mut self, tree: Placed<'_, Tree>, target: Target<'_>) {
        self.tree = Some(tree.hold());
        while !self.copy(&tree.view(target)) {}
    }

    fn copy_whole(&mut self, leaf: Placed<'_, Node>) {
        while !self.copy(&leaf.view()) {}
    }

    fn copy(&mut self, view: &LeafView<'_>) -> bool {
        for position in 0..view.count {
            self.records[position] = view.record(position).map(Record::hold);
        }
        self.count = view.count;
        self.at = view.position;
        self.lower = view.lower().map(Record::hold);
        self.next = view.next().map(Placed::hold);
        view.still_true()
    }
}

/// What was held of `memtable`, which all calls of a walk borrow.
#[inline]
fn placed<T>(_memtable: &Memtable, held: Held<T>) -> Placed<'_, T> {
    // SAFETY: a walk holds only what it got from the memtable that all its calls are made with: that is private to this
    // file and kept by `MemtableIter` and `InOrder`. The memtable's arena is dropped or reset only when nothing borrows it.
    unsafe { held.get() }
}

/// The same for a record.
#[inline]
fn record(_memtable: &Memtable, held: HeldRecord) -> Record<'_> {
    // SAFETY: as for `placed`.
    unsafe { held.get() }
}

/// The first tree that can have keys from `key` on; a bound may be shorter than a tree id.
pub(super) fn first_tree_of(key: &[u8]) -> TreeId {
    let mut id = [0; 4];
    let bytes = key.len().min(4);
    id[..bytes].copy_from_slice(&key[..bytes]);
    TreeId(u32::from_be_bytes(id))
}
