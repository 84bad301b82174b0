//! What a transaction has written and nobody else sees yet.
//!
//! * Kept in a memtable of its own under the number of the write instead of a seqno: the newest live write of a key is
//!   what the transaction reads. So going back to a mark takes no undoing: the writes since are declared dead.
//! * Iterators own what they read, so the transaction may write between their steps; the next step sees it.
//! * Memory taken by dead writes is at most that of the live ones and a constant.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::memtable::{Memtable, MemtableIter};
use crate::source::Source;
use crate::{OpKind, Result, Seqno, TreeId, tree_of};

/// What a write costs in memory beyond its key and value, roughly.
const OVERHEAD_BYTES: usize = 48;
/// Dead bytes are never worth a rebuild below this.
const DEAD_BYTES_KEPT: usize = 1 << 20;

/// A transaction's private writes.
pub struct WriteSet {
    memtable: Arc<Memtable>,
    shared: Arc<Shared>,
    /// Number of the next write; the first is 1.
    next: u64,
    live: Live,
    dead_bytes: usize,
}

/// What iterators must learn of.
struct Shared {
    /// Counts writes and rollbacks.
    changes: AtomicU64,
    /// Equal to `changes` at the last rollback; 0 if there was none, and then there is nothing to look up.
    rollbacks: AtomicU64,
    dead: Mutex<Dead>,
}

#[derive(Default)]
struct Dead {
    /// Numbers of dead writes, sorted, apart from each other.
    ranges: Vec<DeadRange>,
    /// The memtable that took the place of the first one.
    rebuilt: Option<Arc<Memtable>>,
}

struct DeadRange {
    first: u64,
    /// The first number behind it.
    end: u64,
    /// Dead writes in all ranges before it.
    before: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Live {
    writes: usize,
    bytes: usize,
}

/// A moment in a write set's life to go back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteMark {
    next: u64,
    live: Live,
}

impl Default for WriteSet {
    fn default() -> Self {
        Self::new()
    }
}

impl WriteSet {
    /// An empty one.
    pub fn new() -> Self {
        Self {
            memtable: Arc::new(Memtable::for_one_thread()),
            shared: Arc::new(Shared::new()),
            next: 1,
            live: Live::default(),
            dead_bytes: 0,
        }
    }

    /// From here on `full_key` has `value`.
    pub fn put(&mut self, full_key: &[u8], value: &[u8]) {
        self.write(full_key, OpKind::Put, value);
    }

    /// From here on `full_key` has no value.
    pub fn delete(&mut self, full_key: &[u8]) {
        self.write(full_key, OpKind::Delete, &[]);
    }

    /// What the transaction wrote to `full_key`; none if it did not.
    #[inline]
    pub fn get(&self, full_key: &[u8]) -> Option<(OpKind, &[u8])> {
        if self.live.writes == 0 {
            return None;
        }
        let mut at = u64::MAX;
        loop {
            let (kind, number, value) = self.memtable.get(full_key, Seqno(at))?;
            match self.shared.dead_since(number.0) {
                None => return Some((kind, value)),
                Some(first_dead) => at = first_dead - 1,
            }
        }
    }

    /// All keys written, standing on nothing until its first seek.
    pub fn iter(&self) -> WriteSetIter {
        WriteSetIter::new(self, self.memtable.iter())
    }

    /// The keys of one tree.
    pub fn iter_tree(&self, tree: TreeId) -> WriteSetIter {
        WriteSetIter::new(self, self.memtable.iter_tree(tree))
    }

    /// Each key written, once, in order, with what it got last: what a commit carries out.
    pub fn in_order(&self) -> impl Iterator<Item = (&[u8], OpKind, &[u8])> {
        let mut last: Option<&[u8]> = None;
        self.memtable.in_order().filter_map(move |(key, number, kind, value)| {
            if last == Some(key) || self.shared.dead_since(number.0).is_some() {
                return None;
            }
            last = Some(key);
            Some((key, kind, value))
        })
    }

    /// Here and now, for `rollback_to`.
    pub fn mark(&self) -> WriteMark {
        WriteMark { next: self.next, live: self.live }
    }

    /// Takes back exactly the writes made since `mark`, as if they had not been made. Later marks are void.
    ///
    /// # Panics
    /// If `mark` is void, or of a time before `clear`.
    pub fn rollback_to(&mut self, mark: WriteMark) {
        assert!(mark.next <= self.next, "a mark from before the write set was cleared");
        if mark.next == self.next {
            return;
        }
        self.dead_bytes += self.live.bytes - mark.live.bytes;
        self.live = mark.live;
        let dead_before = self.shared.kill(mark.next, self.next);
        // Each write before the mark that was live then and is not now died in a rollback to before the mark.
        let live_before = mark.next - 1 - dead_before;
        assert!(mark.live.writes as u64 == live_before, "a mark of writes that were rolled back already");
        if self.dead_bytes > DEAD_BYTES_KEPT + self.live.bytes {
            self.rebuild();
        }
    }

    /// Forgets all writes and marks; the next transaction can use it. Iterators from before go on showing what they
    /// showed, and nothing of what comes.
    pub fn clear(&mut self) {
        if self.next == 1 {
            return;
        }
        match (Arc::get_mut(&mut self.memtable), Arc::get_mut(&mut self.shared)) {
            (Some(memtable), Some(shared)) => {
                memtable.reset();
                *shared = Shared::new();
                (self.next, self.live, self.dead_bytes) = (1, Live::default(), 0);
            }
            _ => *self = Self::new(),
        }
    }

    /// Whether there is a live write to `tree`.
    pub(crate) fn holds(&self, tree: TreeId) -> bool {
        self.in_order().any(|(key, ..)| tree_of(key) == tree)
    }

    /// Bytes of live writes with what keeping them costs; a key written twice counts twice.
    pub fn bytes(&self) -> usize {
        self.live.bytes
    }

    /// Live writes; a key written twice counts twice.
    pub fn len(&self) -> usize {
        self.live.writes
    }

    /// Whether there is nothing to commit.
    pub fn is_empty(&self) -> bool {
        self.live.writes == 0
    }

    fn write(&mut self, full_key: &[u8], kind: OpKind, value: &[u8]) {
        self.memtable.insert(full_key, Seqno(self.next), kind, value);
        self.next += 1;
        self.live.writes += 1;
        self.live.bytes += full_key.len() + value.len() + OVERHEAD_BYTES;
        self.shared.changes.fetch_add(1, Ordering::Release);
    }

    /// Moves the live writes to a new memtable. Their numbers stay, so marks stay good.
    #[cold]
    fn rebuild(&mut self) {
        let rebuilt = Arc::new(Memtable::for_one_thread());
        for (key, number, kind, value) in self.memtable.in_order() {
            if self.shared.dead_since(number.0).is_none() {
                rebuilt.insert(key, number, kind, value);
            }
        }
        self.shared.dead.lock().rebuilt = Some(Arc::clone(&rebuilt));
        self.memtable = rebuilt;
        self.dead_bytes = 0;
    }
}

impl Shared {
    fn new() -> Self {
        Self { changes: AtomicU64::new(0), rollbacks: AtomicU64::new(0), dead: Mutex::default() }
    }

    /// If write `number` is dead, the first number from which on all up to it are.
    #[inline]
    fn dead_since(&self, number: u64) -> Option<u64> {
        if self.rollbacks.load(Ordering::Acquire) == 0 {
            return None;
        }
        let dead = self.dead.lock();
        let behind = dead.ranges.partition_point(|range| range.first <= number);
        let range = dead.ranges.get(behind.checked_sub(1)?)?;
        (number < range.end).then_some(range.first)
    }

    /// Declares a range dead. Returns how many writes before it were dead already.
    fn kill(&self, first: u64, end: u64) -> u64 {
        let mut dead = self.dead.lock();
        while dead.ranges.last().is_some_and(|range| range.first >= first) {
            dead.ranges.pop();
        }
        let before = dead.ranges.last().map_or(0, |last| last.before + last.end.min(first) - last.first);
        match dead.ranges.last_mut() {
            Some(last) if last.end >= first => last.end = end,
            _ => dead.ranges.push(DeadRange { first, end, before }),
        }
        let changes = self.changes.fetch_add(1, Ordering::Release) + 1;
        self.rollbacks.store(changes, Ordering::Release);
        before
    }
}

/// The keys of a write set in order, each once, with what it got last. As a [`Source`] its versions have the greatest
/// seqno there is: they come before all others of their key, and a seek to (key, any lesser seqno) passes them over.
pub struct WriteSetIter {
    writes: MemtableIter,
    shared: Arc<Shared>,
    /// `changes` when it was positioned.
    seen: u64,
    /// Rebuilds it knows of: whether `writes` reads the memtable in `Dead::rebuilt`.
    rollbacks_seen: u64,
}

impl WriteSetIter {
    fn new(set: &WriteSet, writes: MemtableIter) -> Self {
        let rollbacks_seen = set.shared.rollbacks.load(Ordering::Acquire);
        Self { writes, shared: Arc::clone(&set.shared), seen: 0, rollbacks_seen }
    }

    /// Before a seek: reads where the writes are now. If that is another place it stands on nothing.
    fn refresh(&mut self) {
        self.seen = self.shared.changes.load(Ordering::Acquire);
        let rollbacks = self.shared.rollbacks.load(Ordering::Acquire);
        if rollbacks == self.rollbacks_seen {
            return;
        }
        self.rollbacks_seen = rollbacks;
        if let Some(rebuilt) = &self.shared.dead.lock().rebuilt {
            self.writes.change_to(rebuilt);
        }
    }

    /// If there was a rollback, `refresh` may move it elsewhere, and what it stood on is needed beyond that.
    #[cold]
    fn key_before_rollback(&self) -> Option<Vec<u8>> {
        let rolled_back = self.shared.rollbacks.load(Ordering::Acquire) != self.rollbacks_seen;
        rolled_back.then(|| self.writes.key().to_vec())
    }

    fn dead(&self) -> bool {
        self.shared.dead_since(self.writes.seqno().0).is_some()
    }

    /// From the newest version of a key, perhaps dead, to the first live one of this key or those behind it.
    #[inline]
    fn settle_forward(&mut self) -> Result<()> {
        while self.writes.valid() && self.dead() {
            self.writes.next()?;
        }
        Ok(())
    }

    /// From the newest version of a key, perhaps dead, to the newest live one of this key or of those before it.
    fn settle_backward(&mut self) -> Result<()> {
        while self.writes.valid() && self.dead() {
            let key = self.writes.key().to_vec();
            self.settle_forward()?;
            if self.writes.valid() && self.writes.key() == key {
                return Ok(());
            }
            self.writes.seek(&key, Seqno(u64::MAX))?;
            self.writes.prev_key();
        }
        Ok(())
    }
}

impl Source for WriteSetIter {
    fn seek(&mut self, key: &[u8], seqno: Seqno) -> Result<()> {
        self.refresh();
        let passed = if seqno == Seqno(u64::MAX) { seqno } else { Seqno(0) };
        self.writes.seek(key, passed)?;
        self.settle_forward()
    }

    fn seek_before(&mut self, key: &[u8]) -> Result<()> {
        self.refresh();
        self.writes.seek_before(key)?;
        self.writes.newest_of_key();
        self.settle_backward()
    }

    #[inline]
    fn next(&mut self) -> Result<()> {
        if !self.stale() {
            self.writes.next_key();
        } else if let Some(key) = self.key_before_rollback() {
            return self.seek(&key, Seqno(0));
        } else {
            self.refresh();
            self.writes.seek_past_key();
        }
        self.settle_forward()
    }

    /// It shows one version of a key.
    #[inline]
    fn pass_key(&mut self) -> Result<()> {
        self.next()
    }

    #[inline]
    fn prev(&mut self) -> Result<()> {
        if !self.stale() {
            self.writes.prev_key();
        } else if let Some(key) = self.key_before_rollback() {
            return self.seek_before(&key);
        } else {
            self.refresh();
            self.writes.seek_before_key();
        }
        self.settle_backward()
    }

    #[inline]
    fn valid(&self) -> bool {
        self.writes.valid()
    }
    #[inline]
    fn key(&self) -> &[u8] {
        self.writes.key()
    }
    #[inline]
    fn seqno(&self) -> Seqno {
        Seqno(u64::MAX)
    }
    #[inline]
    fn kind(&self) -> OpKind {
        self.writes.kind()
    }
    #[inline]
    fn value(&self) -> &[u8] {
        self.writes.value()
    }
    #[inline]
    fn stale(&self) -> bool {
        self.seen != self.shared.changes.load(Ordering::Acquire)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::full_key;

    type Op = (OpKind, Vec<u8>);
    type Model = BTreeMap<Vec<u8>, Op>;

    #[derive(Clone, Debug)]
    enum Act {
        Put(u16, u8),
        Delete(u16),
        Mark,
        Rollback(usize),
        Get(u16),
        Seek(u16),
        SeekBefore(u16),
        Next,
        Prev,
        Clear,
    }

    fn key(number: u16) -> Vec<u8> {
        full_key(TreeId(u32::from(number % 3)), &(number / 3).to_be_bytes())
    }

    fn act() -> impl Strategy<Value = Act> {
        let number = 0_u16..250;
        prop_oneof![
            12 => (number.clone(), any::<u8>()).prop_map(|(key, value)| Act::Put(key, value)),
            3 => number.clone().prop_map(Act::Delete),
            2 => Just(Act::Mark),
            1 => (0_usize..4).prop_map(Act::Rollback),
            2 => number.clone().prop_map(Act::Get),
            2 => number.clone().prop_map(Act::Seek),
            2 => number.prop_map(Act::SeekBefore),
            8 => Just(Act::Next),
            8 => Just(Act::Prev),
            1 => prop::bool::weighted(0.02).prop_map(|clear| if clear { Act::Clear } else { Act::Next }),
        ]
    }

    fn shown(iter: &WriteSetIter) -> Option<(Vec<u8>, Op)> {
        iter.valid().then(|| (iter.key().to_vec(), (iter.kind(), iter.value().to_vec())))
    }

    /// Values long enough that rollbacks cause rebuilds if `long`.
    fn plays_like_a_map(acts: Vec<Act>, long: bool) -> std::result::Result<(), TestCaseError> {
        let mut set = WriteSet::new();
        let mut model = Model::new();
        let mut marks: Vec<(WriteMark, Model)> = Vec::new();
        let mut iter = set.iter();
        // Where the model's iterator stands.
        let mut at: Option<Vec<u8>> = None;
        for act in acts {
            let place = |found: Option<(&Vec<u8>, &Op)>| found.map(|(key, op)| (key.clone(), op.clone()));
            let expected = match act {
                Act::Put(number, byte) => {
                    let value = vec![byte; if long { 40_000 } else { 3 }];
                    set.put(&key(number), &value);
                    model.insert(key(number), (OpKind::Put, value));
                    continue;
                }
                Act::Delete(number) => {
                    set.delete(&key(number));
                    model.insert(key(number), (OpKind::Delete, vec![]));
                    continue;
                }
                Act::Mark => {
                    marks.push((set.mark(), model.clone()));
                    continue;
                }
                Act::Rollback(back) => {
                    marks.truncate(marks.len().saturating_sub(back));
                    let Some((mark, then)) = marks.last() else { continue };
                    set.rollback_to(*mark);
                    model = then.clone();
                    prop_assert_eq!(set.mark().live, mark.live);
                    continue;
                }
                Act::Get(number) => {
                    let got = set.get(&key(number)).map(|(kind, value)| (kind, value.to_vec()));
                    prop_assert_eq!(got.as_ref(), model.get(&key(number)));
                    continue;
                }
                Act::Clear => {
                    set.clear();
                    prop_assert_eq!((set.len(), set.bytes(), set.is_empty()), (0, 0, true));
                    model.clear();
                    marks.clear();
                    iter = set.iter();
                    at = None;
                    continue;
                }
                Act::Seek(number) => {
                    iter.seek(&key(number), Seqno(u64::MAX)).unwrap();
                    place(model.range(key(number)..).next())
                }
                Act::SeekBefore(number) => {
                    iter.seek_before(&key(number)).unwrap();
                    place(model.range(..key(number)).next_back())
                }
                Act::Next => {
                    let Some(from) = at.take() else { continue };
                    iter.next().unwrap();
                    place(model.range(from.clone()..).find(|(key, _)| **key != from))
                }
                Act::Prev => {
                    let Some(from) = at.take() else { continue };
                    iter.prev().unwrap();
                    place(model.range(..from).next_back())
                }
            };
            prop_assert_eq!(shown(&iter), expected.clone());
            prop_assert!(!iter.stale());
            at = expected.map(|(key, _)| key);
        }
        let all: Vec<_> =
            set.in_order().map(|(key, kind, value)| (key.to_vec(), (kind, value.to_vec()))).collect();
        prop_assert_eq!(all, model.into_iter().collect::<Vec<_>>());
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]
        #[test]
        fn it_plays_like_a_map_with_copies_for_marks(acts in prop::collection::vec(act(), 0..600)) {
            plays_like_a_map(acts, false)?;
        }
    }
    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
        #[test]
        fn it_plays_like_a_map_when_rollbacks_free_memory(acts in prop::collection::vec(act(), 0..300)) {
            plays_like_a_map(acts, true)?;
        }
    }

    #[test]
    fn rolled_back_writes_do_not_pile_up() {
        let mut set = WriteSet::new();
        set.put(&key(1), b"kept");
        for _ in 0..200 {
            let mark = set.mark();
            for number in 0..50 {
                set.put(&key(number), &[7; 1000]);
            }
            set.rollback_to(mark);
        }
        assert!(set.memtable.bytes() < 2 * DEAD_BYTES_KEPT, "{} bytes", set.memtable.bytes());
        assert_eq!(set.get(&key(1)), Some((OpKind::Put, b"kept".as_slice())));
    }

    #[test]
    fn a_cleared_set_reuses_its_memory_unless_someone_reads_it() {
        let mut set = WriteSet::new();
        set.put(&key(1), b"one");
        let before = Arc::as_ptr(&set.memtable);
        set.clear();
        assert_eq!((Arc::as_ptr(&set.memtable), set.get(&key(1))), (before, None));
        set.put(&key(1), b"two");
        let mut reader = set.iter();
        reader.seek(&[], Seqno(u64::MAX)).unwrap();
        set.clear();
        set.put(&key(1), b"three");
        assert_eq!(reader.value(), b"two");
        assert_eq!(set.get(&key(1)).unwrap().1, b"three");
    }

    #[test]
    #[should_panic(expected = "rolled back already")]
    fn a_void_mark_is_refused() {
        let mut set = WriteSet::new();
        let first = set.mark();
        set.put(&key(1), b"");
        let second = set.mark();
        set.put(&key(2), b"");
        set.rollback_to(first);
        set.put(&key(3), b"");
        set.rollback_to(second);
    }
}
