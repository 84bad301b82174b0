//! A B+tree of records that many threads read and extend at once, by optimistic lock coupling.
//!
//! * Readers take no lock. They note a node's version, read, and check that the version is the same; if not, they start
//!   again at the root. What they read in between may be a mixture, but each pointer in it is a good one.
//! * A writer locks only the leaf that it changes, and its parent when it splits. Full nodes are split on the way down,
//!   so a parent always has room.
//! * Nothing is ever removed, and nodes never merge. So a node's lower fence never changes and, except in the leftmost
//!   leaf, is its first record; its upper fence is the first record of the next leaf.
//! * A node covers `lower <= version < upper`. All keys in it share the bytes that the keys of its fences share: `skip`
//!   counts these, and `prefixes` holds the 8 bytes behind them, so that most comparisons are of two integers, also
//!   where keys have a long common beginning.

use std::cmp::Ordering as Order;
use std::ops::Bound;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::arena::{Arena, Link, Placed, Record, RecordLink};
use crate::{Seqno, TreeId};

/// Records of a leaf, separators of an inner node.
pub(super) const FANOUT: usize = 64;
/// The tree id in front of each full key, the same in the whole tree.
const TREE_ID_BYTES: usize = 4;
/// Cache lines of a node up to the end of its prefixes: what a search will touch.
const SEARCH_LINES: usize = 1 + FANOUT * 8 / 64;
/// Leaves that an estimate looks at before it guesses.
const COUNTED_LEAVES_MAX: usize = 8;

/// The versions of one tree's keys.
pub(super) struct Tree {
    pub id: TreeId,
    /// The next tree in the directory's bucket; never changes once the tree is known.
    pub sibling: Link<Tree>,
    /// Seqno of the commit that dropped the tree; `u64::MAX` while it lives.
    dropped: AtomicU64,
    /// Guards `root`.
    lock: Lock,
    root: Link<Node>,
}

/// Sorted records (leaf) or separators with children around them (inner).
#[repr(C, align(64))]
pub(super) struct Node {
    lock: Lock,
    count: AtomicU32,
    skip: AtomicU32,
    lower: RecordLink,
    upper: RecordLink,
    /// The leaf to the right.
    next: Link<Node>,
    /// None in a leaf. Set before the node is published, then never again.
    children: Link<Children>,
    prefixes: [AtomicU64; FANOUT],
    records: [RecordLink; FANOUT],
}

/// Child `i` covers the versions before separator `i` and from separator `i - 1` on.
struct Children([Link<Node>; FANOUT + 1]);

/// Where in the tree a descent ends.
#[derive(Clone, Copy)]
pub(super) enum Target<'k> {
    /// The leaf that covers this version.
    At(&'k [u8], Seqno),
    /// The leaf that covers what comes just before this version.
    Before(&'k [u8], Seqno),
    /// The rightmost leaf.
    End,
}

/// What was in a leaf at one moment.
pub(super) struct LeafView<'a> {
    leaf: &'a Node,
    /// Records in it.
    pub count: usize,
    /// Where the target's version stands or would stand.
    pub position: usize,
    version: u64,
}

impl Tree {
    pub fn new(id: TreeId, arena: &Arena) -> Self {
        let tree = Self {
            id,
            sibling: Link::default(),
            dropped: AtomicU64::new(u64::MAX),
            lock: Lock::default(),
            root: Link::default(),
        };
        tree.root.set(Some(arena.place(Node::new())));
        tree
    }

    /// The seqno at which it was dropped.
    pub fn dropped(&self) -> Option<Seqno> {
        let seqno = self.dropped.load(Ordering::Acquire);
        (seqno != u64::MAX).then_some(Seqno(seqno))
    }

    pub fn drop_at(&self, seqno: Seqno) {
        self.dropped.fetch_min(seqno.0, Ordering::AcqRel);
    }

    /// Adds a record of `arena`. One that is there already, key and seqno, stays as it is.
    pub fn insert(&self, arena: &Arena, record: Record<'_>) {
        let (key, seqno) = (record.key(), record.seqno());
        while self.try_insert(arena, record, key, seqno).is_none() {}
    }

    /// `None`: something changed on the way, or a node was split; try again.
    fn try_insert(&self, arena: &Arena, record: Record<'_>, key: &[u8], seqno: Seqno) -> Option<()> {
        let mut parent = None;
        let mut parent_lock = &self.lock;
        let mut parent_version = parent_lock.read();
        let mut node = self.root.get()?.get();
        let mut version = node.lock.read();
        parent_lock.check(parent_version)?;
        loop {
            let (position, exact) = node.search(key, seqno)?;
            if node.count() == FANOUT {
                let _parent = parent_lock.acquire(parent_version)?;
                let _node = node.lock.acquire(version)?;
                self.split(arena, parent, node, position);
                return None;
            }
            let Some(children) = node.children.get() else {
                if exact {
                    return node.lock.check(version);
                }
                let _node = node.lock.acquire(version)?;
                node.insert_at(position, record);
                return Some(());
            };
            let child = children.get().0[position + usize::from(exact)].get()?;
            child.prefetch(SEARCH_LINES);
            let child = child.get();
            let child_version = child.lock.read();
            node.lock.check(version)?;
            (parent, parent_lock, parent_version) = (Some(node), &node.lock, version);
            (node, version) = (child, child_version);
        }
    }

    /// Halves a full node, with it and its parent (the tree itself, for the root) locked.
    fn split(&self, arena: &Arena, parent: Option<&Node>, node: &Node, position: usize) {
        let count = node.count();
        // Who appends leaves full nodes behind; a little room stays for those who come late.
        let appending = position == count && node.upper.get().is_none();
        let middle = if appending { count - count / 8 } else { count / 2 };
        let separator = node.records[middle].get().expect("the node is full and locked");

        let right = arena.place(Node::new());
        let children = node.children.get();
        let moved = middle + usize::from(children.is_some());
        for from in moved..count {
            right.records[from - moved].set(node.records[from].get());
        }
        if let Some(children) = children {
            let right_children = arena.place(Children(std::array::from_fn(|_| Link::default())));
            for from in moved..=count {
                right_children.0[from - moved].set(children.0[from].get());
            }
            right.children.set(Some(right_children));
        }
        right.set_count(count - moved);
        right.lower.set(Some(separator));
        right.upper.set(node.upper.get());
        right.next.set(node.next.get());
        right.write_prefixes();

        node.set_count(middle);
        node.upper.set(Some(separator));
        node.next.set(Some(right));
        node.narrow();

        match parent {
            Some(parent) => parent.adopt(separator, right),
            None => self.grow(arena, separator, right),
        }
    }

    /// Puts a new root above the old one and its new right neighbour, with the tree locked.
    fn grow(&self, arena: &Arena, separator: Record<'_>, right: Placed<'_, Node>) {
        let root = arena.place(Node::new());
        let children = arena.place(Children(std::array::from_fn(|_| Link::default())));
        children.0[0].set(self.root.get());
        children.0[1].set(Some(right));
        root.children.set(Some(children));
        root.records[0].set(Some(separator));
        root.set_count(1);
        root.write_prefixes();
        self.root.set(Some(root));
    }

    /// The newest version of `key` that is not newer than `at`.
    pub fn get(&self, key: &[u8], at: Seqno) -> Option<Record<'_>> {
        loop {
            let view = self.view(Target::At(key, at));
            // Behind the last record of a leaf comes its upper fence: the first record of the next one.
            let found = match view.position {
                position if position < view.count => view.leaf.records[position].get(),
                _ => view.leaf.upper.get(),
            };
            if view.still_true() {
                return found.filter(|record| record.key() == key);
            }
        }
    }

    /// About how many versions lie between two keys: counted if they are in few leaves, else judged from how far
    /// apart the two are in the tree.
    pub fn estimate(&self, low: Bound<&[u8]>, high: Bound<&[u8]>) -> u64 {
        let from = match low {
            Bound::Included(key) => Target::At(key, Seqno(u64::MAX)),
            Bound::Excluded(key) => Target::At(key, Seqno(0)),
            Bound::Unbounded => Target::At(&[], Seqno(u64::MAX)),
        };
        let to = match high {
            Bound::Included(key) => Target::At(key, Seqno(0)),
            Bound::Excluded(key) => Target::At(key, Seqno(u64::MAX)),
            Bound::Unbounded => Target::End,
        };
        self.count_between(from, to).unwrap_or_else(|| {
            let ((from, all_from), (to, all_to)) = (self.rank(from), self.rank(to));
            ((to - from).max(0.0) * f64::midpoint(all_from, all_to)) as u64
        })
    }

    /// `None`: too many, or they change too fast.
    fn count_between(&self, from: Target<'_>, to: Target<'_>) -> Option<u64> {
        let (from, to) = (self.view(from), self.view(to));
        let (mut leaf, mut counted) = (from.leaf, 0);
        for _ in 0..COUNTED_LEAVES_MAX {
            if std::ptr::eq(leaf, to.leaf) {
                let entries = (counted + to.position).saturating_sub(from.position);
                return (from.still_true() && to.still_true()).then_some(entries as u64);
            }
            counted += leaf.count();
            leaf = leaf.next.get()?.get();
        }
        None
    }

    /// How far into the tree `target` is, from 0 to 1, and how many versions the tree has if it is like that path.
    fn rank(&self, target: Target<'_>) -> (f64, f64) {
        loop {
            let (mut before, mut share) = (0.0, 1.0);
            let view = self.try_view(target, |index, children| {
                before += share * index as f64 / children as f64;
                share /= children as f64;
            });
            if let Some(view) = view {
                let count = view.count.max(1) as f64;
                return (before + share * view.position as f64 / count, count / share);
            }
        }
    }

    /// The leaf where `target` is. What it shows holds if `still_true` says so after it was read.
    pub fn view(&self, target: Target<'_>) -> LeafView<'_> {
        loop {
            if let Some(view) = self.try_view(target, |_, _| ()) {
                return view;
            }
        }
    }

    #[inline]
    fn try_view(&self, target: Target<'_>, mut on_path: impl FnMut(usize, usize)) -> Option<LeafView<'_>> {
        let root_version = self.lock.read();
        let mut node = self.root.get()?.get();
        let mut version = node.lock.read();
        self.lock.check(root_version)?;
        while let Some(children) = node.children.get() {
            let index = match target {
                Target::At(key, seqno) => {
                    let (position, exact) = node.search(key, seqno)?;
                    position + usize::from(exact)
                }
                Target::Before(key, seqno) => node.search(key, seqno)?.0,
                Target::End => node.count(),
            };
            on_path(index, node.count() + 1);
            let child = children.get().0[index].get()?;
            child.prefetch(SEARCH_LINES);
            let child = child.get();
            let child_version = child.lock.read();
            node.lock.check(version)?;
            (node, version) = (child, child_version);
        }
        let position = match target {
            Target::At(key, seqno) | Target::Before(key, seqno) => node.search(key, seqno)?.0,
            Target::End => node.count(),
        };
        Some(LeafView { leaf: node, count: node.count(), position, version })
    }
}

impl<'a> LeafView<'a> {
    /// Whether all that was read through this view was there at one moment.
    pub fn still_true(&self) -> bool {
        self.leaf.lock.check(self.version).is_some()
    }
    pub fn record(&self, position: usize) -> Option<Record<'a>> {
        self.leaf.records[position].get()
    }
    /// The leaf's first record; `None` for the leftmost leaf, whatever it holds.
    pub fn lower(&self) -> Option<Record<'a>> {
        self.leaf.lower.get()
    }
    /// The leaf to the right.
    pub fn next(&self) -> Option<Placed<'a, Node>> {
        self.leaf.next.get()
    }
}

impl Node {
    fn new() -> Self {
        Self {
            lock: Lock::default(),
            count: AtomicU32::new(0),
            skip: AtomicU32::new(TREE_ID_BYTES as u32),
            lower: RecordLink::default(),
            upper: RecordLink::default(),
            next: Link::default(),
            children: Link::default(),
            prefixes: [const { AtomicU64::new(0) }; FANOUT],
            records: std::array::from_fn(|_| RecordLink::default()),
        }
    }

    /// This leaf from its first record on.
    pub fn view(&self) -> LeafView<'_> {
        let version = self.lock.read();
        LeafView { leaf: self, count: self.count(), position: 0, version }
    }

    fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed) as usize
    }

    fn set_count(&self, count: usize) {
        self.count.store(count as u32, Ordering::Relaxed);
    }

    /// The position of the first version that is not before (`key`, `seqno`), and whether it is that one.
    /// `None`: the node changed meanwhile. An answer holds only if the node's version is still the same.
    #[inline]
    fn search(&self, key: &[u8], seqno: Seqno) -> Option<(usize, bool)> {
        let count = self.count();
        let prefix = prefix_at(key, self.skip.load(Ordering::Relaxed) as usize);
        let first = self.first_not_below(prefix, count);
        let equal = |position: usize| position < count && self.prefix(position) == prefix;
        if !equal(first) {
            return Some((first, false));
        }
        match self.records[first].get()?.cmp(key, seqno) {
            Order::Equal => return Some((first, true)),
            Order::Greater => return Some((first, false)),
            Order::Less if !equal(first + 1) => return Some((first + 1, false)),
            Order::Less => (),
        }
        let mut from = first + 1;
        let mut to = prefix.checked_add(1).map_or(count, |above| self.first_not_below(above, count));
        while from < to {
            let middle = usize::midpoint(from, to);
            match self.records[middle].get()?.cmp(key, seqno) {
                Order::Less => from = middle + 1,
                Order::Equal => return Some((middle, true)),
                Order::Greater => to = middle,
            }
        }
        Some((from, false))
    }

    /// Position of the first prefix that is not less than `prefix`.
    #[inline]
    fn first_not_below(&self, prefix: u64, count: usize) -> usize {
        let (mut base, mut size) = (0, count);
        while size > 0 {
            let half = size / 2;
            // Both ways are computed and one is chosen: a branch here would be mispredicted every other time.
            let (above, rest) = (base + half + 1, size - half - 1);
            let below = self.prefix(base + half) < prefix;
            base = if below { above } else { base };
            size = if below { rest } else { half };
        }
        base
    }

    #[inline]
    fn prefix(&self, position: usize) -> u64 {
        // A count is never above FANOUT, so the mask changes nothing but spares the check.
        self.prefixes[position % FANOUT].load(Ordering::Relaxed)
    }

    /// Makes room at `position`; the node is locked and not full.
    fn insert_at(&self, position: usize, record: Record<'_>) {
        let count = self.count();
        for from in (position..count).rev() {
            self.prefixes[from + 1].store(self.prefix(from), Ordering::Relaxed);
            self.records[from + 1].set(self.records[from].get());
        }
        let skip = self.skip.load(Ordering::Relaxed) as usize;
        self.prefixes[position].store(prefix_at(record.key(), skip), Ordering::Relaxed);
        self.records[position].set(Some(record));
        self.set_count(count + 1);
    }

    /// Takes in a new child, right of the one that covered `separator`; the node is locked and not full.
    fn adopt(&self, separator: Record<'_>, child: Placed<'_, Node>) {
        let children = self.children.get().expect("a parent is an inner node");
        let (position, _) =
            self.search(separator.key(), separator.seqno()).expect("nobody changes a locked node");
        for from in (position + 1..=self.count()).rev() {
            children.0[from + 1].set(children.0[from].get());
        }
        children.0[position + 1].set(Some(child));
        self.insert_at(position, separator);
    }

    /// Sets `skip` and the prefixes of all records from the fences; the node is locked or not yet published.
    fn write_prefixes(&self) {
        let skip = self.shared_bytes();
        self.skip.store(skip as u32, Ordering::Relaxed);
        for position in 0..self.count() {
            let record = self.records[position].get().expect("there is a record below the count");
            self.prefixes[position].store(prefix_at(record.key(), skip), Ordering::Relaxed);
        }
    }

    /// After the fences came closer: writes the prefixes anew if that lets them start further behind.
    fn narrow(&self) {
        if self.shared_bytes() != self.skip.load(Ordering::Relaxed) as usize {
            self.write_prefixes();
        }
    }

    /// How many leading bytes all keys between the fences share.
    fn shared_bytes(&self) -> usize {
        let (Some(lower), Some(upper)) = (self.lower.get(), self.upper.get()) else {
            return TREE_ID_BYTES;
        };
        lower.key().iter().zip(upper.key()).take_while(|(a, b)| a == b).count()
    }
}

/// Eight bytes of `key` from `skip` on as a number that sorts like them; zeros stand for what is not there.
#[inline]
fn prefix_at(key: &[u8], skip: usize) -> u64 {
    if let Some(bytes) = key.get(skip..skip + 8) {
        return u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
    }
    let missing = (skip + 8).saturating_sub(key.len()) as u32;
    match key.last_chunk() {
        _ if missing >= 8 => 0,
        Some(&last) => u64::from_be_bytes(last) << (missing * 8),
        None => {
            let mut bytes = [0; 8];
            bytes[..key.len() - skip].copy_from_slice(&key[skip..]);
            u64::from_be_bytes(bytes)
        }
    }
}

/// A version that counts changes; odd while someone changes what it guards.
///
/// The guarded fields are atomics, so reading them meanwhile is defined, only perhaps inconsistent. The fences make a
/// reader that saw any store of a writer see that writer's version too.
#[derive(Default)]
struct Lock(AtomicU64);

/// Unlocks, with a new version, when dropped.
struct Acquired<'a>(&'a Lock);

impl Lock {
    /// The version, once nobody holds the lock.
    #[inline]
    fn read(&self) -> u64 {
        let version = self.0.load(Ordering::Acquire);
        if version.is_multiple_of(2) { version } else { self.wait() }
    }

    #[cold]
    fn wait(&self) -> u64 {
        let mut spins = 0_u32;
        loop {
            let version = self.0.load(Ordering::Acquire);
            if version.is_multiple_of(2) {
                return version;
            }
            // The holder needs well under a microsecond, unless the scheduler took its core.
            spins += 1;
            if spins < 100 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// Some if nothing changed since `version` was read.
    #[inline]
    fn check(&self, version: u64) -> Option<()> {
        fence(Ordering::Acquire);
        (self.0.load(Ordering::Relaxed) == version).then_some(())
    }

    /// Locks if nothing changed since `version` was read.
    #[inline]
    fn acquire(&self, version: u64) -> Option<Acquired<'_>> {
        self.0.compare_exchange(version, version + 1, Ordering::Acquire, Ordering::Relaxed).ok()?;
        fence(Ordering::Release);
        Some(Acquired(self))
    }
}

impl Drop for Acquired<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.0.store(self.0.0.load(Ordering::Relaxed) + 1, Ordering::Release);
    }
}
