//! How a transaction becomes durable and visible: a place in the wal, the memtable, one sync for a group, and then the
//! seqno that readers go by.
//!
//! * Seqnos and places in the wal are given out in the same order, under `turn`. The rest of a commit is parallel.
//! * A record is handed to the wal after its writes are in the memtable. So when the wal is durable up to a record's
//!   end, that record and all before it are readable, and `visible` may move there in one step.
//! * `visible <= applied` but for moments: up to `applied` all commits are in the memtables and handed to the wal. Row locks go there
//!   already, before the sync; who then locks such a row reads at `applied`, and a later place in the wal makes its own commit
//!   durable no sooner (`docs/decisions/0005`).
//! * A memtable is frozen between two places: it holds exactly the records before its end. It is read by a flush when
//!   its last writer is done and its end is durable.
//! * A commit that fails after it got its place fails the engine: nobody knows what a restart will find.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::{ArcSwap, Guard};
use parking_lot::{Mutex, MutexGuard};

use crate::load::Loaded;
use crate::memtable::Memtable;
use crate::points::{self, Point};
use crate::version::{Run, SstMeta, Version};
use crate::view::View;
use crate::wal::{Op, Wal};
use crate::writeset::WriteSet;
use crate::{Error, Kind, OpKind, Result, Seqno, SstId, TreeId, WalPosition};

/// The engine's own tree.
const OWN_TREE: TreeId = TreeId(0);
/// Its one key: the next tree id to give out.
const NEXT_TREE: &[u8] = b"next-tree";
/// The same with its tree.
const NEXT_TREE_FULL: &[u8] = b"\0\0\0\0next-tree";

/// A memtable with what its flush must know.
pub(crate) struct Table {
    pub(crate) memtable: Arc<Memtable>,
    /// Commits that have a place before the end and are not in the memtable yet.
    writers: AtomicUsize,
    drops: Mutex<Vec<(TreeId, Seqno)>>,
    /// Ssts that were committed beside the memtable.
    loads: Mutex<Vec<Arc<SstMeta>>>,
    /// Set when it is frozen.
    end: Mutex<Option<TableEnd>>,
}

/// What a frozen memtable holds of the wal: everything from the end of the one before up to here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableEnd {
    pub(crate) position: WalPosition,
    pub(crate) seqno: Seqno,
    pub(crate) next_tree: TreeId,
}

/// What is done one commit at a time.
struct Turn {
    last_seqno: Seqno,
    /// Tree ids below this one are in the wal as given out.
    recorded_tree: TreeId,
    active: Arc<Table>,
    /// Oldest first.
    frozen: VecDeque<Arc<Table>>,
    /// The loaded runs of views that may still be read. (Those of versions are watched where ssts are deleted.)
    loaded_runs: Vec<Weak<[Arc<SstMeta>]>>,
    closed: Option<(Kind, String)>,
}

/// The newest data, and the way into it.
pub(crate) struct Commits {
    wal: Arc<Wal>,
    turn: Mutex<Turn>,
    visible: AtomicU64,
    applied: AtomicU64,
    /// The end of that commit's record, or of a later one's.
    applied_end: AtomicU64,
    order: Mutex<Order>,
    view: ArcSwap<View>,
}

/// Which commits are in the memtables and handed to the wal.
struct Order {
    applied: u64,
    /// Those that an unfinished one comes before, with the ends of their records.
    ahead: BTreeMap<u64, WalPosition>,
}

/// Up to where a transaction has seen commits that may not be durable yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    seqno: Seqno,
    end: WalPosition,
}

/// What a commit is to make visible beside its writes.
pub(crate) struct Loads {
    pub(crate) loaded: Vec<Loaded>,
    /// In this version there was nothing of their trees.
    pub(crate) checked: Arc<Version>,
}

/// What a commit did.
pub(crate) struct Committed {
    pub(crate) seqno: Seqno,
    /// The memtable was full, and another one takes writes now.
    pub(crate) froze: bool,
}

impl Table {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            memtable: Memtable::new(),
            writers: AtomicUsize::new(0),
            drops: Mutex::default(),
            loads: Mutex::default(),
            end: Mutex::default(),
        })
    }

    /// Whether every commit before its end is in it.
    pub(crate) fn is_complete(&self) -> bool {
        self.writers.load(Ordering::Acquire) == 0
    }

    pub(crate) fn end(&self) -> Option<TableEnd> {
        *self.end.lock()
    }

    pub(crate) fn drops(&self) -> Vec<(TreeId, Seqno)> {
        self.drops.lock().clone()
    }

    pub(crate) fn loads(&self) -> Vec<Arc<SstMeta>> {
        self.loads.lock().clone()
    }

    /// Whether a flush of it would change anything.
    fn is_empty(&self) -> bool {
        self.memtable.is_empty() && self.drops.lock().is_empty() && self.loads.lock().is_empty()
    }

    /// Nothing comes after `end`.
    pub(crate) fn freeze(&self, end: TableEnd) {
        *self.end.lock() = Some(end);
    }

    pub(crate) fn drop_tree(&self, tree: TreeId, seqno: Seqno) {
        self.memtable.drop_tree(tree, seqno);
        self.drops.lock().push((tree, seqno));
    }

    pub(crate) fn load(&self, sst: SstMeta) {
        self.loads.lock().push(Arc::new(sst));
    }
}

impl Commits {
    /// Goes on with `tables`, the last of which takes writes, over `version`. `last` is the seqno of the newest commit,
    /// `recorded_tree` what the wal says of tree ids.
    pub(crate) fn new(
        wal: Arc<Wal>,
        mut tables: VecDeque<Arc<Table>>,
        version: Arc<Version>,
        dropped: BTreeSet<TreeId>,
        last: Seqno,
        recorded_tree: TreeId,
    ) -> Self {
        let active = tables.pop_back().expect("a replay leaves a memtable that takes writes");
        let mut turn = Turn {
            last_seqno: last,
            recorded_tree,
            active,
            frozen: tables,
            loaded_runs: Vec::new(),
            closed: None,
        };
        let view = View {
            active: Arc::clone(&turn.active.memtable),
            frozen: turn.frozen.iter().rev().map(|table| Arc::clone(&table.memtable)).collect(),
            loaded: turn.loaded(),
            version,
            dropped: Arc::new(&dropped | &turn.drops()),
        };
        Self {
            turn: Mutex::new(turn),
            visible: AtomicU64::new(last.0),
            applied: AtomicU64::new(last.0),
            applied_end: AtomicU64::new(wal.start().0),
            order: Mutex::new(Order { applied: last.0, ahead: BTreeMap::new() }),
            wal,
            view: ArcSwap::from_pointee(view),
        }
    }

    pub(crate) fn wal(&self) -> &Wal {
        &self.wal
    }

    pub(crate) fn visible(&self) -> Seqno {
        // In one order with the slots of snapshots.
        Seqno(self.visible.load(Ordering::SeqCst))
    }

    pub(crate) fn visible_counter(&self) -> &AtomicU64 {
        &self.visible
    }

    /// What is there now. A snapshot that is registered before this call can be read from it.
    #[inline]
    pub(crate) fn view(&self) -> Guard<Arc<View>> {
        self.view.load()
    }

    /// The newest commit whose locks may have been given back: no earlier one is missing in the memtables.
    #[inline]
    pub(crate) fn applied(&self) -> Seqno {
        if self.wal.failed() {
            // The commits behind that end in an error, and show nothing.
            return self.visible();
        }
        // A commit becomes visible after its record was handed over, and perhaps before it was noted as applied.
        Seqno(self.applied.load(Ordering::Acquire)).max(self.visible())
    }

    /// What a transaction that reads at `at` must wait for before it says so. `None`: all of it is visible.
    pub(crate) fn not_yet_visible(&self, at: Seqno) -> Option<Seen> {
        // The end is stored before the seqno: it is not that of an earlier record.
        let unseen = at > self.visible();
        unseen.then(|| Seen { seqno: at, end: WalPosition(self.applied_end.load(Ordering::Acquire)) })
    }

    /// Returns when what was seen is durable, and visible to every later snapshot.
    pub(crate) fn settle(&self, seen: Seen) -> Result<()> {
        self.wal.sync_to(seen.end)?;
        self.visible.fetch_max(seen.seqno.0, Ordering::SeqCst);
        Ok(())
    }

    /// What is there now, and the newest applied seqno, which is whole in it. For a snapshot that nobody registered.
    #[inline]
    pub(crate) fn newest(&self) -> (Guard<Arc<View>>, Seqno) {
        loop {
            let view = self.view.load();
            let at = self.applied();
            // Had the view changed before `at` was read, a memtable could be missing in it; had it changed afterwards
            // and been loaded afterwards, the version visible at `at` could have been compacted away.
            if Arc::ptr_eq(&view, &self.view.load()) {
                return (view, at);
            }
        }
    }

    /// Returns when `writes` and `loads` are durable and visible. Trees of `drops` are gone from then on. `unlock` may be called before
    /// that, once whatever else is locked then comes after this commit. `next_tree`: all tree ids below it have been given out. `None`:
    /// the tree is not the one that `loads` were checked against any more.
    pub(crate) fn commit(
        &self,
        writes: &WriteSet,
        drops: &[TreeId],
        mut loads: Option<&mut Loads>,
        next_tree: TreeId,
        memtable_bytes: usize,
        unlock: impl FnOnce(),
    ) -> Result<Option<Committed>> {
        let payload_bytes =
            writes.in_order().map(|(key, kind, value)| op(key, kind, value).encoded_len()).sum::<usize>()
                + drops.iter().map(|tree| Op::DropTree(*tree).encoded_len()).sum::<usize>()
                + loads.iter().flat_map(|loads| loads.ops()).map(|op| op.encoded_len()).sum::<usize>();
        let mut turn = self.open_turn()?;
        if let Some(loads) = &loads {
            if !Arc::ptr_eq(&loads.checked, &self.view.load().version) {
                return Ok(None);
            }
            turn.check(loads)?;
        }
        let froze = turn.active.memtable.bytes() >= memtable_bytes;
        if froze {
            self.freeze(&mut turn);
        }
        let named = next_tree.0.to_be_bytes();
        let own = Op::Put(NEXT_TREE_FULL, &named);
        let records_tree = next_tree > turn.recorded_tree;
        let seqno = Seqno(turn.last_seqno.0 + 1);
        let own_bytes = if records_tree { own.encoded_len() } else { 0 };
        let mut slot = self.wal.reserve(payload_bytes + own_bytes, seqno)?;
        turn.last_seqno = seqno;
        turn.recorded_tree = turn.recorded_tree.max(next_tree);
        let table = Arc::clone(&turn.active);
        table.writers.fetch_add(1, Ordering::Relaxed);
        if let Some(loads) = &mut loads {
            // Nobody reads at this seqno before the record is durable; then the ssts must be there. From now on only a restart may
            // find that they are not wanted.
            loads.loaded.iter_mut().for_each(Loaded::keep);
            loads.ssts().for_each(|sst| table.load(sst.committed_at(seqno)));
            let run = turn.loaded();
            self.change_view_in_turn(|view| view.loaded = run);
        }
        drop(turn);

        let unfinished = Unfinished { commits: self };
        for (key, kind, value) in writes.in_order() {
            slot.write(op(key, kind, value));
            table.memtable.insert(key, seqno, kind, value);
        }
        if records_tree {
            slot.write(own);
            table.memtable.insert(NEXT_TREE_FULL, seqno, OpKind::Put, &named);
        }
        for tree in drops {
            slot.write(Op::DropTree(*tree));
        }
        loads.iter().flat_map(|loads| loads.ops()).for_each(|op| slot.write(op));
        let end = slot.finish();
        if drops.is_empty() {
            table.writers.fetch_sub(1, Ordering::Release);
        }
        if self.note_applied(seqno, end) && drops.is_empty() && loads.is_none() {
            unlock();
            points::pass(Point::AfterUnlock);
        }
        self.wal.sync_to(end)?;
        if !drops.is_empty() {
            // Only now: before, a reader could miss a tree whose drop never happens.
            drops.iter().for_each(|tree| table.drop_tree(*tree, seqno));
            self.change_view(|view| {
                view.dropped = Arc::new(&*view.dropped | &drops.iter().copied().collect())
            });
            table.writers.fetch_sub(1, Ordering::Release);
        }
        self.visible.fetch_max(seqno.0, Ordering::SeqCst);
        std::mem::forget(unfinished);
        Ok(Some(Committed { seqno, froze }))
    }

    /// The commit is in its memtable and handed to the wal. `false`: one before it is not.
    fn note_applied(&self, seqno: Seqno, end: WalPosition) -> bool {
        let mut order = self.order.lock();
        let Some((applied, end)) = order.note(seqno.0, end) else { return false };
        self.applied_end.store(end.0, Ordering::Release);
        self.applied.store(applied, Ordering::Release);
        true
    }

    /// No commit gets a place from now on; they fail with `kind`.
    pub(crate) fn close(&self, kind: Kind, message: &str) {
        self.turn.lock().closed.get_or_insert_with(|| (kind, message.to_owned()));
    }

    /// Freezes the memtable that takes writes. `false`: there is nothing in it.
    pub(crate) fn freeze_active(&self) -> Result<bool> {
        let mut turn = self.open_turn()?;
        if turn.active.is_empty() {
            return Ok(false);
        }
        self.freeze(&mut turn);
        Ok(true)
    }

    /// Ssts of loads that readers find beside the memtables: those that only the wal names, and those that views of before their
    /// flush still show.
    pub(crate) fn loaded(&self) -> BTreeSet<SstId> {
        let runs: Vec<Run> = self.turn.lock().loaded_runs.iter().filter_map(Weak::upgrade).collect();
        runs.iter().flat_map(|run| run.iter()).map(|sst| sst.id).collect()
    }

    pub(crate) fn oldest_frozen(&self) -> Option<Arc<Table>> {
        self.turn.lock().frozen.front().cloned()
    }

    pub(crate) fn frozen_count(&self) -> usize {
        self.turn.lock().frozen.len()
    }

    /// Readers see `version` from now on, in which `flushed`, the oldest frozen memtable, is found instead, loads and all. `dropped`:
    /// the trees whose drop is flushed.
    pub(crate) fn install(
        &self,
        version: Arc<Version>,
        dropped: BTreeSet<TreeId>,
        flushed: Option<&Arc<Table>>,
    ) {
        let mut turn = self.turn.lock();
        if let Some(flushed) = flushed {
            let oldest = turn.frozen.pop_front().expect("a flushed memtable is still there");
            assert!(Arc::ptr_eq(&oldest, flushed), "memtables are flushed in order");
        }
        let mut view = View::clone(&self.view.load());
        view.frozen = turn.frozen.iter().rev().map(|table| Arc::clone(&table.memtable)).collect();
        view.dropped = Arc::new(&dropped | &turn.drops());
        view.loaded = turn.loaded();
        view.version = version;
        self.view.store(Arc::new(view));
    }

    fn open_turn(&self) -> Result<MutexGuard<'_, Turn>> {
        let turn = self.turn.lock();
        match &turn.closed {
            None => Ok(turn),
            Some((kind, message)) => Err(Error::new(*kind, message.clone())),
        }
    }

    fn freeze(&self, turn: &mut Turn) {
        let end =
            TableEnd { position: self.wal.end(), seqno: turn.last_seqno, next_tree: turn.recorded_tree };
        turn.active.freeze(end);
        let full = std::mem::replace(&mut turn.active, Table::new());
        turn.frozen.push_back(full);
        let mut view = View::clone(&self.view.load());
        view.active = Arc::clone(&turn.active.memtable);
        view.frozen = turn.frozen.iter().rev().map(|table| Arc::clone(&table.memtable)).collect();
        self.view.store(Arc::new(view));
    }

    fn change_view(&self, change: impl FnOnce(&mut View)) {
        let _turn = self.turn.lock();
        self.change_view_in_turn(change);
    }

    fn change_view_in_turn(&self, change: impl FnOnce(&mut View)) {
        let mut view = View::clone(&self.view.load());
        change(&mut view);
        self.view.store(Arc::new(view));
    }
}

impl Order {
    /// The commit `seqno`, whose record ends at `end`, is applied: up to which one all are now, and the end of its record. `None`: one before
    /// it is not.
    fn note(&mut self, seqno: u64, end: WalPosition) -> Option<(u64, WalPosition)> {
        if seqno != self.applied + 1 {
            self.ahead.insert(seqno, end);
            return None;
        }
        let mut newest = (seqno, end);
        while let Some(end) = self.ahead.remove(&(newest.0 + 1)) {
            newest = (newest.0 + 1, end);
        }
        self.applied = newest.0;
        Some(newest)
    }
}

impl Turn {
    /// Trees whose drop is in a memtable.
    fn drops(&self) -> BTreeSet<TreeId> {
        let tables = self.frozen.iter().chain([&self.active]);
        tables.flat_map(|table| table.drops()).map(|(tree, _)| tree).collect()
    }

    /// Ssts that were committed beside these memtables, for a view. They do not overlap, or `check` would not have let them.
    fn loaded(&mut self) -> Run {
        let tables = self.frozen.iter().chain([&self.active]);
        let mut ssts: Vec<_> = tables.flat_map(|table| table.loads()).collect();
        ssts.sort_by(|a, b| a.first_key.cmp(&b.first_key));
        let run: Run = ssts.into();
        self.loaded_runs.retain(|run| run.strong_count() > 0);
        if !run.is_empty() {
            self.loaded_runs.push(Arc::downgrade(&run));
        }
        run
    }

    /// Whether no memtable, and no load that waits for its flush, holds anything of the trees of `loads`.
    fn check(&self, loads: &Loads) -> Result<()> {
        let trees: Vec<TreeId> = loads.loaded.iter().map(Loaded::tree).collect();
        let mut tables = self.frozen.iter().chain([&self.active]);
        let holds = |table: &Arc<Table>, tree: &TreeId| {
            table.memtable.holds(*tree) || table.loads.lock().iter().any(|sst| sst.first_tree() == *tree)
        };
        match tables.find_map(|table| trees.iter().find(|tree| holds(table, tree))) {
            None => Ok(()),
            Some(tree) => Err(not_empty(*tree)),
        }
    }
}

impl Loads {
    fn ssts(&self) -> impl Iterator<Item = &Arc<SstMeta>> {
        self.loaded.iter().flat_map(Loaded::ssts)
    }

    fn ops(&self) -> impl Iterator<Item = Op<'_>> {
        self.ssts().map(|sst| Op::Load(sst.as_load()))
    }
}

/// The answer to a load into a tree that has been written to.
pub(crate) fn not_empty(tree: TreeId) -> Error {
    let message =
        format!("tree {} has been written to; only a tree of which there is nothing can be loaded", tree.0);
    Error::new(Kind::BadRequest, message)
}

/// Dropped when a commit fails or panics between its place in the wal and the end.
struct Unfinished<'a> {
    commits: &'a Commits,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        let message = "a commit failed half-way; nothing is acknowledged until the process starts anew";
        self.commits.close(Kind::Failed, message);
    }
}

fn op<'a>(key: &'a [u8], kind: OpKind, value: &'a [u8]) -> Op<'a> {
    match kind {
        OpKind::Put => Op::Put(key, value),
        OpKind::Delete => Op::Delete(key),
    }
}

/// The next tree id that the put says, or the one after the tree that it writes to.
pub(crate) fn named_tree(key: &[u8], value: &[u8]) -> TreeId {
    let (tree, key) = key.split_at(4);
    let tree = u32::from_be_bytes(tree.try_into().expect("split at four"));
    match <[u8; 4]>::try_from(value) {
        Ok(value) if tree == OWN_TREE.0 && key == NEXT_TREE => TreeId(u32::from_be_bytes(value)),
        _ => TreeId(tree.saturating_add(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::{Stream, WalLimits};
    use crate::{BranchId, Epoch, SimDisk};

    #[test]
    fn in_whatever_order_commits_come_none_counts_before_those_before_it() {
        for seed in 1..200_u64 {
            let mut dice = seed;
            let mut left: Vec<u64> = (6..36).collect();
            let mut come = BTreeSet::new();
            let mut order = Order { applied: 5, ahead: BTreeMap::new() };
            while !left.is_empty() {
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let seqno = left.remove((dice >> 33) as usize % left.len().min(8));
                come.insert(seqno);
                let all_before = (6..seqno).all(|before| come.contains(&before));
                let newest = (6..).take_while(|seqno| come.contains(seqno)).last();
                let expected =
                    newest.filter(|_| all_before).map(|newest| (newest, WalPosition(newest * 100)));
                assert_eq!(
                    order.note(seqno, WalPosition(seqno * 100)),
                    expected,
                    "seed {seed}, commit {seqno}"
                );
            }
            assert!(order.ahead.is_empty());
        }
    }

    #[test]
    fn who_reads_what_is_applied_never_waits_for_an_earlier_end() {
        const LAST: Seqno = Seqno(300_000);
        let stream = Stream::new(BranchId([5; 16]), Epoch(1));
        let wal = Wal::create(Arc::new(SimDisk::new(1)), stream, WalPosition(0), WalLimits::default())
            .expect("there is room");
        let tables = VecDeque::from([Table::new()]);
        let commits =
            Commits::new(Arc::new(wal), tables, Arc::default(), BTreeSet::new(), Seqno(0), TreeId(1));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                (1..=LAST.0).for_each(|seqno| {
                    assert!(commits.note_applied(Seqno(seqno), WalPosition(seqno * 100)), "in order");
                });
            });
            let mut at = Seqno(0);
            while at < LAST {
                at = commits.applied();
                let end = commits.not_yet_visible(at).map_or(WalPosition(0), |seen| seen.end);
                assert!(end >= WalPosition(at.0 * 100), "{at:?} ends behind {end:?}");
            }
        });
    }
}
