//! The tree of runs as it changes: flushes and compactions put their results in, readers see them at once, and the
//! bucket gets the same changes as edits, in the same order, when it answers.
//!
//! * What is published is always a state that memory had, perhaps a while ago. Until an edit is published nothing that it removes
//!   is deleted, and the wal that it makes superfluous stays.
//! * An edit is published after every sst that it adds is in the bucket.
//! * An edit that was handed out to be sent never changes: it may be in the bucket. Those behind it become one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::commit::{Commits, Table, TableEnd};
use crate::compaction::pick::{
    CompactionPlan, MergePlan, TreeView, debt_bytes, forgettable, pick, surplus_bytes,
};
use crate::compaction::run::Merged;
use crate::gc::Graveyard;
use crate::limits::{LEVELS, Shape};
use crate::manifest::{Edit, Flushed, Manifest};
use crate::replay::Replayed;
use crate::version::{SstMeta, Version};
use crate::{Epoch, Error, Kind, Result, Seqno, SstId, TreeId, WalPosition};

/// The newest tree and what is under way.
pub(crate) struct Tree {
    state: Mutex<State>,
    shape: Shape,
    epoch: Epoch,
}

struct State {
    version: Arc<Version>,
    /// Trees whose drop is flushed and of which ssts may still hold something.
    dropped: BTreeMap<TreeId, Seqno>,
    /// The edit that is being sent.
    sending: Option<Queued>,
    /// How many of the ssts that it brings are in the bucket.
    uploaded: usize,
    /// All that comes after it, in one.
    waiting: Option<Queued>,
    running: Vec<Arc<MergePlan>>,
    graveyard: Graveyard,
    next_sst: u64,
}

/// A change of the tree that the bucket does not know of.
struct Queued {
    edit: Edit,
    /// Loads that came and went in it: they are in the bucket, and until it is published the wal names them.
    spent_loads: Vec<SstId>,
}

/// The next thing to send to the bucket.
pub(crate) enum Sending {
    /// Ssts of the first edit.
    Upload(Vec<SstId>),
    /// The first edit, whose ssts are all there.
    Publish(Edit),
}

/// A compaction that was begun.
pub(crate) enum Begun {
    /// It was done on the spot: nothing had to be read.
    Done,
    /// To be run on this version, and then ended with [`Tree::end_merge`].
    Merge(Arc<MergePlan>, Arc<Version>),
}

impl Tree {
    /// As the manifest has it. `next_sst`: the counter of the next sst.
    pub(crate) fn new(manifest: &Manifest, shape: Shape, epoch: Epoch, next_sst: u64) -> Self {
        let version = Arc::new(manifest.version.clone());
        let mut graveyard = Graveyard::default();
        graveyard.watch(&version);
        let state = State {
            version,
            dropped: manifest.dropped.clone(),
            sending: None,
            uploaded: 0,
            waiting: None,
            running: Vec::new(),
            graveyard,
            next_sst,
        };
        Self { state: Mutex::new(state), shape, epoch }
    }

    pub(crate) fn version(&self) -> Arc<Version> {
        Arc::clone(&self.state.lock().version)
    }

    /// A name that no sst has had.
    pub(crate) fn next_sst(&self) -> SstId {
        let mut state = self.state.lock();
        let counter = state.next_sst;
        state.next_sst += 1;
        SstId { epoch: self.epoch, counter }
    }

    /// Puts in what recovery wrote, before anybody reads.
    pub(crate) fn add_replayed(&self, replayed: Replayed, slice: WalPosition) -> Result<()> {
        let Replayed { ssts, loads, drops, end } = replayed;
        let edit = flush_edit(ssts, loads, drops, &end, slice);
        self.apply(&mut self.state.lock(), edit).map(drop)
    }

    /// Puts in what `table`, the oldest frozen memtable, was written to, and the loads committed with it. Readers find it there from now on.
    pub(crate) fn install_flush(
        &self,
        commits: &Commits,
        table: &Arc<Table>,
        ssts: Vec<Arc<SstMeta>>,
        slice: WalPosition,
    ) -> Result<()> {
        let end = table.end().expect("a frozen memtable has an end");
        let edit = flush_edit(ssts, table.loads(), table.drops(), &end, slice);
        self.install(&mut self.state.lock(), commits, edit, Some(table))
    }

    /// Begins the most urgent compaction, if there is one; `quiet`: for space too. `oldest_snapshot` is read at or was let go.
    pub(crate) fn begin_compaction(
        &self,
        commits: &Commits,
        oldest_snapshot: Seqno,
        quiet: bool,
    ) -> Result<Option<Begun>> {
        let mut state = self.state.lock();
        let dropped: BTreeSet<TreeId> = state.dropped.keys().copied().collect();
        let wasted = state.version.ssts().map(|(_, sst)| (sst.id, sst.opened.wasted()));
        let wasted: BTreeMap<SstId, u64> = wasted.filter(|(_, steps)| *steps > 0).collect();
        let view = TreeView {
            version: &state.version,
            wasted: &wasted,
            running: &state.running,
            dropped: &dropped,
            quiet,
            oldest_snapshot,
            shape: &self.shape,
        };
        let edit = match pick(&view) {
            None => return Ok(None),
            Some(CompactionPlan::Drop(removed)) => Edit { removed, ..Edit::default() },
            Some(CompactionPlan::Move(moved)) => Edit {
                removed: moved.iter().map(|(_, sst)| sst.id).collect(),
                added: moved,
                ..Edit::default()
            },
            Some(CompactionPlan::Merge(plan)) => {
                state.running.push(Arc::clone(&plan));
                return Ok(Some(Begun::Merge(plan, Arc::clone(&state.version))));
            }
        };
        self.install(&mut state, commits, edit, None)?;
        Ok(Some(Begun::Done))
    }

    /// Puts in the result of a merge, or gives it up if there is none.
    pub(crate) fn end_merge(
        &self,
        commits: &Commits,
        plan: &Arc<MergePlan>,
        result: Option<Merged>,
    ) -> Result<()> {
        let mut state = self.state.lock();
        state.running.retain(|running| !Arc::ptr_eq(running, plan));
        let Some(Merged { inputs, outputs }) = result else { return Ok(()) };
        let added = outputs.into_iter().map(|sst| (plan.to as u8, sst)).collect();
        let removed = inputs.iter().map(|sst| sst.id).collect();
        self.install(&mut state, commits, Edit { added, removed, ..Edit::default() }, None)
    }

    /// What must be sent next: at most `uploads` ssts, or an edit.
    pub(crate) fn next_to_send(&self, uploads: usize) -> Option<Sending> {
        let mut state = self.state.lock();
        if state.sending.is_none() {
            state.sending = Some(state.waiting.take()?);
        }
        let edit = &state.sending.as_ref()?.edit;
        // A moved sst is added and removed by the same edit; the one that added it first has sent it. A load was sent by itself.
        let removed: BTreeSet<SstId> = edit.removed.iter().copied().collect();
        let added = edit.ssts().filter(|sst| !sst.loaded && !removed.contains(&sst.id)).map(|sst| sst.id);
        let next: Vec<SstId> = added.skip(state.uploaded).take(uploads).collect();
        Some(if next.is_empty() { Sending::Publish(edit.clone()) } else { Sending::Upload(next) })
    }

    /// The next `ssts` that were to be sent are in the bucket.
    pub(crate) fn uploaded(&self, ssts: usize) {
        self.state.lock().uploaded += ssts;
    }

    /// The edit that was handed out is published.
    pub(crate) fn published(&self) {
        let mut state = self.state.lock();
        let Queued { edit, spent_loads } = state.sending.take().expect("the edit that was published");
        state.uploaded = 0;
        state.graveyard.bury(edit.removed);
        state.graveyard.bury(spent_loads);
    }

    /// Edits that wait for the bucket.
    pub(crate) fn queued(&self) -> usize {
        self.state.lock().queued().count()
    }

    /// Ssts that were removed from the published tree and that nobody reads any more.
    pub(crate) fn dead(&self, published: &Version) -> Vec<SstId> {
        self.state.lock().graveyard.dead(published)
    }

    /// Ssts that left the tree before anything named them in the bucket, and that nobody reads any more. They are told once.
    pub(crate) fn dead_unsent(&self) -> Vec<SstId> {
        self.state.lock().graveyard.dead_unsent()
    }

    /// Every sst that must stay.
    pub(crate) fn held(&self, published: &Version) -> BTreeSet<SstId> {
        let state = self.state.lock();
        // A load of an earlier epoch is in the wal until the edit that brings it into the tree is published, however soon memory
        // has merged it away.
        let mut held = state.graveyard.held(published);
        for Queued { edit, spent_loads } in state.queued() {
            held.extend(edit.ssts().map(|sst| sst.id).chain(spent_loads.iter().copied()));
        }
        held
    }

    /// `ssts` were made by this writer, and neither the tree nor the wal will ever name them.
    pub(crate) fn discard(&self, ssts: impl IntoIterator<Item = SstId>) {
        self.state.lock().graveyard.bury(ssts);
    }

    /// `ssts` are deleted.
    pub(crate) fn forget(&self, ssts: &[SstId]) {
        self.state.lock().graveyard.forget(ssts);
    }

    /// Trees whose drop is flushed and of which ssts may still hold something.
    pub(crate) fn dropped(&self) -> BTreeSet<TreeId> {
        self.state.lock().dropped.keys().copied().collect()
    }

    /// Runs in L0, and bytes by which the levels exceed their targets.
    pub(crate) fn debt(&self) -> (usize, u64) {
        let version = self.version();
        (version.l0.len(), debt_bytes(&version, &self.shape))
    }

    /// See [`surplus_bytes`].
    pub(crate) fn surplus(&self, memtable: u64) -> u64 {
        surplus_bytes(&self.version(), &self.shape, memtable)
    }

    /// Merges under way.
    pub(crate) fn merging(&self) -> usize {
        self.state.lock().running.len()
    }

    fn install(
        &self,
        state: &mut State,
        commits: &Commits,
        edit: Edit,
        flushed: Option<&Arc<Table>>,
    ) -> Result<()> {
        let version = self.apply(state, edit)?;
        commits.install(version, state.dropped.keys().copied().collect(), flushed);
        Ok(())
    }

    fn apply(&self, state: &mut State, mut edit: Edit) -> Result<Arc<Version>> {
        let applied = state.version.apply(&edit.added, &edit.removed);
        let version = applied.map_err(|misfit| {
            Error::new(Kind::Bug, format!("a change of the tree does not fit: {misfit}"))
        })?;
        let version = Arc::new(version);
        state.dropped.extend(edit.dropped.iter().copied());
        edit.gone = forgettable(&version, &state.dropped.keys().copied().collect());
        edit.gone.iter().for_each(|tree| _ = state.dropped.remove(tree));
        state.graveyard.watch(&version);
        state.version = Arc::clone(&version);
        state.queue(edit);
        Ok(version)
    }
}

/// Loads go to the deepest level, which holds nothing of their trees: they were committed to trees of which there was nothing.
const LOAD_LEVEL: u8 = LEVELS as u8 - 1;

impl State {
    fn queue(&mut self, edit: Edit) {
        let Some(Queued { edit: waiting, mut spent_loads }) = self.waiting.take() else {
            self.waiting = Some(Queued { edit, spent_loads: Vec::new() });
            return;
        };
        let stays: BTreeSet<SstId> = edit.ssts().map(|sst| sst.id).collect();
        let leaves: BTreeSet<SstId> = edit.removed.iter().copied().filter(|id| !stays.contains(id)).collect();
        // What `waiting` only moved was there before it.
        let moved: BTreeSet<SstId> = waiting.removed.iter().copied().collect();
        let unnamed = waiting.ssts().filter(|sst| leaves.contains(&sst.id) && !moved.contains(&sst.id));
        let (loads, unsent): (Vec<_>, Vec<_>) = unnamed.partition(|sst| sst.loaded);
        spent_loads.extend(loads.iter().map(|sst| sst.id));
        self.graveyard.bury_unsent(unsent.iter().map(|sst| sst.id));
        self.waiting = Some(Queued { edit: waiting.followed_by(edit), spent_loads });
    }

    fn queued(&self) -> impl Iterator<Item = &Queued> {
        self.sending.iter().chain(&self.waiting)
    }
}

/// `slice`: where reading the wal from the bucket starts to meet `end`.
fn flush_edit(
    ssts: Vec<Arc<SstMeta>>,
    loads: Vec<Arc<SstMeta>>,
    dropped: Vec<(TreeId, Seqno)>,
    end: &TableEnd,
    slice: WalPosition,
) -> Edit {
    let added = ssts.into_iter().map(|sst| (0, sst));
    Edit {
        added: added.chain(loads.into_iter().map(|sst| (LOAD_LEVEL, sst))).collect(),
        dropped,
        flushed: Some(Flushed { position: end.position, seqno: end.seqno, slice }),
        next_tree: Some(end.next_tree),
        ..Edit::default()
    }
}
