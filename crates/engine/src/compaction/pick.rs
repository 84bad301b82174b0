//! Decides what to compact next. Touches nothing: a version and what is under way go in, a plan comes out.
//!
//! Level sizes follow the data from below: the deepest level may have any size, each level above it an eighth of the one
//! beneath, down to the *base*, the level that L0 is merged into. Levels between L0 and the base are empty, so a small
//! database has two levels and a large one no level that is nearly empty.
//!
//! * A plan that takes an sst takes every sst of deeper-lying, older data that overlaps it up to the level it writes to.
//! * Plans under way together share no input, and two that write to one level have key ranges that do not meet.
//! * From the same input comes the same plan.
//! * What is due by size comes first, then deletions, then what readers have paid for, and when nobody writes what takes space.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::limits::{LEVELS, SURPLUS_PART, Shape};
use crate::version::{Run, SstMeta, Version, cuts, overlapping};
use crate::{Seqno, SstId, TreeId};

/// What the decision is made from.
#[derive(Clone, Copy)]
pub(crate) struct TreeView<'a> {
    pub(crate) version: &'a Version,
    /// Steps that readers took in vain for an sst, since it was opened.
    pub(crate) wasted: &'a BTreeMap<SstId, u64>,
    /// Merges under way.
    pub(crate) running: &'a [Arc<MergePlan>],
    /// Trees whose drop is flushed. (Of one that is only in the wal, a lost directory may bring the tree back, and its
    /// ssts must then still be there.)
    pub(crate) dropped: &'a BTreeSet<TreeId>,
    /// Nobody writes: merge for space too.
    pub(crate) quiet: bool,
    /// The least seqno that anyone reads at.
    pub(crate) oldest_snapshot: Seqno,
    pub(crate) shape: &'a Shape,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CompactionPlan {
    /// Takes ssts of dropped trees out of the tree, unread.
    Drop(Vec<SstId>),
    /// Moves ssts to deeper levels (each with the one it goes to), unread.
    Move(Vec<(u8, Arc<SstMeta>)>),
    /// Reads, merges, writes.
    Merge(Arc<MergePlan>),
}

/// Ssts to be replaced by the merge of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MergePlan {
    /// Newest data first; no two ssts of one run overlap.
    pub(crate) sources: Vec<Run>,
    /// The level that takes the result.
    pub(crate) to: usize,
    /// Least key of all sources.
    pub(crate) first: Box<[u8]>,
    /// Greatest key of all sources.
    pub(crate) last: Box<[u8]>,
}

/// The most urgent thing to do, if there is anything.
pub(crate) fn pick(view: &TreeView<'_>) -> Option<CompactionPlan> {
    let busy: BTreeSet<SstId> =
        view.running.iter().flat_map(|plan| plan.inputs()).map(|sst| sst.id).collect();
    let picker = Picker { view, busy: &busy, targets: Targets::of(view.version, view.shape) };
    if let Some(plan) = picker.drop_trees() {
        return Some(plan);
    }
    let mut urgent: Vec<(f64, usize)> =
        (0..LEVELS).map(|level| (picker.score(level), level)).filter(|(score, _)| *score >= 1.0).collect();
    // The highest score first; of equal ones the shallower level, which is the one that readers feel.
    urgent.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let by_size = urgent.iter().find_map(|(_, level)| picker.shrink(*level));
    let due = by_size.or_else(|| picker.clear_tombstones()).or_else(|| picker.spare_readers());
    due.or_else(|| picker.save_space())
}

/// How many bytes must be merged before every level has its target size again.
pub(crate) fn debt_bytes(version: &Version, shape: &Shape) -> u64 {
    let targets = Targets::of(version, shape);
    let l0 = if version.l0.len() >= shape.l0_runs { version.level_bytes(0) } else { 0 };
    let over = |level: usize| version.level_bytes(level).saturating_sub(targets.bytes[level]);
    l0 + (targets.base..LEVELS).map(over).sum::<u64>()
}

/// Bytes beyond what the bucket should keep when nobody writes: in ssts above the deepest level, where what they hold may be a second time, and as
/// the wal of a memtable of `memtable` bytes. Little is left alone.
pub(crate) fn surplus_bytes(version: &Version, shape: &Shape, memtable: u64) -> u64 {
    surplus(version, shape, memtable, |_| true)
}

fn surplus(version: &Version, shape: &Shape, memtable: u64, counts: impl Fn(&SstMeta) -> bool) -> u64 {
    let deepest = version.ssts().map(|(level, _)| level).max().unwrap_or(0);
    let above: u64 =
        version.ssts().filter(|(level, sst)| *level < deepest && counts(sst)).map(|(_, sst)| sst.bytes).sum();
    let little = shape.sst_bytes as u64 / 8;
    let memtable = if memtable < little { 0 } else { memtable };
    (above + memtable).saturating_sub(little.max(version.level_bytes(deepest) / SURPLUS_PART))
}

/// The dropped trees that nothing flushed can hold any more, so that the manifest may forget them. `dropped` as in
/// [`TreeView`].
pub(crate) fn forgettable(version: &Version, dropped: &BTreeSet<TreeId>) -> Vec<TreeId> {
    let held =
        |tree: TreeId| version.ssts().any(|(_, sst)| sst.first_tree() <= tree && tree <= sst.last_tree());
    dropped.iter().copied().filter(|tree| !held(*tree)).collect()
}

impl MergePlan {
    pub(super) fn new(sources: Vec<Run>, to: usize) -> Self {
        let sources: Vec<Run> = sources.into_iter().filter(|run| !run.is_empty()).collect();
        let first = sources.iter().map(|run| &run[0].first_key).min().expect("a merge has a source").clone();
        let last = sources
            .iter()
            .map(|run| &run[run.len() - 1].last_key)
            .max()
            .expect("a merge has a source")
            .clone();
        Self { sources, to, first, last }
    }

    /// Every sst that it takes; those that it would only copy stay (`run::narrowed`).
    pub(crate) fn inputs(&self) -> impl Iterator<Item = &Arc<SstMeta>> {
        self.sources.iter().flat_map(|run| run.iter())
    }

    /// Keys at which to divide the work into at most `parts` of about equal size: part `i` has the keys from cut `i-1`
    /// (inclusive) to cut `i` (exclusive). At most `parts - 1` cuts, ascending.
    pub(crate) fn cuts(&self, parts: usize) -> Vec<&[u8]> {
        cuts(self.inputs(), parts)
    }
}

/// The size that each level should have.
#[derive(Debug, PartialEq, Eq)]
struct Targets {
    /// The level that L0 is merged into.
    base: usize,
    /// By level; `u64::MAX` for the deepest and for those above the base.
    bytes: [u64; LEVELS],
}

impl Targets {
    fn of(version: &Version, shape: &Shape) -> Self {
        let sizes: Vec<u64> =
            (0..LEVELS).map(|level| if level == 0 { 0 } else { version.level_bytes(level) }).collect();
        let top = (1..LEVELS).find(|level| sizes[*level] > 0).unwrap_or(LEVELS - 1);
        let mut bytes = [u64::MAX; LEVELS];
        let mut base = LEVELS - 1;
        // What is lowest in the tree counts as the deepest level even when it has not sunk to the bottom yet.
        let mut target = sizes.iter().copied().max().unwrap_or(0);
        while base > 1 && (base > top || target > shape.level_base_bytes) {
            base -= 1;
            target = (target / shape.level_ratio).max(1);
            bytes[base] = target;
        }
        // The base takes whole merges of L0, however small the rest of the tree is.
        if base < LEVELS - 1 {
            bytes[base] = bytes[base].max(shape.level_base_bytes / shape.level_ratio).max(1);
        }
        Self { base, bytes }
    }
}

struct Picker<'a> {
    view: &'a TreeView<'a>,
    busy: &'a BTreeSet<SstId>,
    targets: Targets,
}

impl Picker<'_> {
    fn drop_trees(&self) -> Option<CompactionPlan> {
        if self.view.dropped.is_empty() {
            return None;
        }
        let gone = |sst: &SstMeta| {
            sst.first_tree() == sst.last_tree() && self.view.dropped.contains(&sst.first_tree())
        };
        let ssts = self.view.version.ssts().map(|(_, sst)| sst);
        let ids: Vec<SstId> = ssts.filter(|sst| gone(sst) && self.free(sst)).map(|sst| sst.id).collect();
        (!ids.is_empty()).then_some(CompactionPlan::Drop(ids))
    }

    /// How far a level is beyond its size; 1 or more calls for work.
    fn score(&self, level: usize) -> f64 {
        let version = self.view.version;
        match level {
            0 => version.l0.len() as f64 / self.view.shape.l0_runs as f64,
            _ if level < self.targets.base || level == LEVELS - 1 => 0.0,
            _ => {
                let free = |sst: &&Arc<SstMeta>| self.free(sst);
                let bytes: u64 = version.levels[level - 1].iter().filter(free).map(|sst| sst.bytes).sum();
                // One byte over is over; a level at its target is at rest.
                if bytes <= self.targets.bytes[level] {
                    0.0
                } else {
                    bytes as f64 / self.targets.bytes[level] as f64
                }
            }
        }
    }

    fn shrink(&self, level: usize) -> Option<CompactionPlan> {
        if level == 0 { self.shrink_l0() } else { self.shrink_level(level) }
    }

    fn shrink_l0(&self) -> Option<CompactionPlan> {
        let version = self.view.version;
        // Runs of L0 leave together or, unread, one by one, but never while some of them are being merged: what is older
        // could then end up above what is newer.
        if version.l0.iter().any(|run| run.iter().any(|sst| !self.free(sst))) {
            return None;
        }
        let moves = self.moves_from_l0();
        if !moves.is_empty() {
            return Some(CompactionPlan::Move(moves));
        }
        let mut sources = version.l0.clone();
        let base = self.targets.base;
        let below: BTreeSet<SstId> = version
            .l0
            .iter()
            .flat_map(|run| run.iter())
            .flat_map(|sst| version.overlapping(base, &sst.first_key, &sst.last_key))
            .map(|sst| sst.id)
            .collect();
        sources
            .push(version.levels[base - 1].iter().filter(|sst| below.contains(&sst.id)).cloned().collect());
        self.merge(sources, base)
    }

    /// The ssts of L0 that can sink unread: of one tree, over nothing older in L0, each to the level above the first one
    /// that holds something in its range.
    fn moves_from_l0(&self) -> Vec<(u8, Arc<SstMeta>)> {
        let version = self.view.version;
        let mut moves: Vec<(u8, Arc<SstMeta>)> = Vec::new();
        // From the oldest run: once an sst has left, it no longer stands in the way of newer ones, except by where it went.
        for (age, run) in version.l0.iter().enumerate().rev() {
            for sst in run.iter().filter(|sst| sst.first_tree() == sst.last_tree()) {
                let older = &version.l0[age + 1..];
                if older.iter().any(|run| !overlapping(run, &sst.first_key, &sst.last_key).is_empty()) {
                    continue;
                }
                let free_until = (1..LEVELS)
                    .take_while(|level| version.overlapping(*level, &sst.first_key, &sst.last_key).is_empty())
                    .last();
                if let Some(to) = free_until.filter(|to| *to >= self.targets.base && self.may_write(*to, sst))
                {
                    moves.push((level_byte(to), Arc::clone(sst)));
                }
            }
        }
        moves
    }

    fn shrink_level(&self, level: usize) -> Option<CompactionPlan> {
        let version = self.view.version;
        let mut candidates: Vec<(u64, &Arc<SstMeta>)> = version.levels[level - 1]
            .iter()
            .filter(|sst| self.free(sst))
            .map(|sst| (self.cost(level, sst), sst))
            .collect();
        candidates.sort_by_key(|(cost, sst)| (*cost, sst.id));
        candidates.iter().find_map(|(_, sst)| self.sink(level, sst))
    }

    /// Bytes to be rewritten for each KiB that leaves the level. Deletions count double: they take others with them.
    fn cost(&self, level: usize, sst: &SstMeta) -> u64 {
        let below = self.view.version.overlapping(level + 1, &sst.first_key, &sst.last_key);
        let rewritten: u64 = below.iter().map(|sst| sst.bytes).sum();
        let weight = sst.bytes + sst.bytes * sst.tombstones / sst.entries.max(1);
        rewritten.saturating_mul(1024) / weight.max(1)
    }

    /// Takes `sst` one level down.
    fn sink(&self, level: usize, sst: &Arc<SstMeta>) -> Option<CompactionPlan> {
        let below = self.view.version.overlapping(level + 1, &sst.first_key, &sst.last_key);
        if !below.is_empty() {
            return self.merge(vec![Arc::from([Arc::clone(sst)]), below.into()], level + 1);
        }
        let moved = || CompactionPlan::Move(vec![(level_byte(level + 1), Arc::clone(sst))]);
        self.may_write(level + 1, sst).then(moved)
    }

    fn merge(&self, sources: Vec<Run>, to: usize) -> Option<CompactionPlan> {
        let plan = MergePlan::new(sources, to);
        let possible =
            plan.inputs().all(|sst| self.free(sst)) && !self.meets_running(to, &plan.first, &plan.last);
        possible.then(|| CompactionPlan::Merge(Arc::new(plan)))
    }

    /// Deletions slow every scan over them, however small their level is: sink an sst that is made of little else, and
    /// rewrite one where it is if nothing lies below and nobody reads what it deletes any more. (Not too eagerly above the
    /// bottom: half of what an update writes to a secondary index is a deletion.)
    fn clear_tombstones(&self) -> Option<CompactionPlan> {
        let version = self.view.version;
        let candidates = version
            .ssts()
            .filter(|(level, sst)| *level > 0 && sst.tombstones * 3 >= sst.entries && self.free(sst));
        candidates.into_iter().find_map(|(level, sst)| {
            let lowest =
                (level + 1..LEVELS).all(|l| version.overlapping(l, &sst.first_key, &sst.last_key).is_empty());
            match lowest {
                true => self.rewrite(level, sst),
                false if sst.tombstones * 4 >= sst.entries * 3 => self.sink(level, sst),
                _ => None,
            }
        })
    }

    /// Merges what readers have wasted as much time on as the merge takes. Who rents until the rent has cost the price and then
    /// buys, pays at most twice what foresight would have. What comes out of a merge begins at nothing, and what lies
    /// over nothing stays as it is, so reads alone can't keep this going.
    fn spare_readers(&self) -> Option<CompactionPlan> {
        if self.view.wasted.is_empty() {
            return None;
        }
        let wasted = |sst: &SstMeta| self.view.wasted.get(&sst.id).copied().unwrap_or(0);
        let pays =
            |steps: u64, bytes: u64| steps > 0 && steps.saturating_mul(self.view.shape.bytes_a_step) >= bytes;
        let version = self.view.version;
        let l0 = || version.l0.iter().flat_map(|run| run.iter());
        let under_l0: BTreeMap<SstId, u64> = l0()
            .flat_map(|sst| version.overlapping(self.targets.base, &sst.first_key, &sst.last_key))
            .map(|sst| (sst.id, sst.bytes))
            .collect();
        let l0_bytes = version.level_bytes(0) + under_l0.values().sum::<u64>();
        if (version.l0.len() > 1 || !under_l0.is_empty()) && pays(l0().map(|sst| wasted(sst)).sum(), l0_bytes)
        {
            return self.shrink_l0();
        }
        let paying = version.ssts().filter(|(level, sst)| *level > 0 && wasted(sst) > 0 && self.free(sst));
        paying.into_iter().find_map(|(level, sst)| {
            let mut deeper =
                (level + 1..LEVELS).map(|l| version.overlapping(l, &sst.first_key, &sst.last_key));
            match deeper.find(|ssts| !ssts.is_empty()) {
                Some(ssts)
                    if pays(wasted(sst), sst.bytes + ssts.iter().map(|sst| sst.bytes).sum::<u64>()) =>
                {
                    self.sink(level, sst)
                }
                // Deletions that hide nothing are left out.
                None if sst.tombstones > 0 && pays(wasted(sst), sst.bytes) => self.rewrite(level, sst),
                _ => None,
            }
        })
    }

    /// Sinks what may be there twice until that is little. All of it, in the end, so this ends.
    fn save_space(&self) -> Option<CompactionPlan> {
        let version = self.view.version;
        if !self.view.quiet || surplus(version, self.view.shape, 0, |sst| self.free(sst)) == 0 {
            return None;
        }
        let from_l0 = if version.l0.is_empty() { None } else { self.shrink_l0() };
        let deepest = version.ssts().map(|(level, _)| level).max().unwrap_or(0);
        from_l0.or_else(|| (1..deepest).find_map(|level| self.shrink_level(level)))
    }

    /// An sst over nothing, without its deletions, unless somebody still reads what they delete.
    fn rewrite(&self, level: usize, sst: &Arc<SstMeta>) -> Option<CompactionPlan> {
        let unread = sst.seqno_max <= self.view.oldest_snapshot;
        unread.then(|| self.merge(vec![Arc::from([Arc::clone(sst)])], level)).flatten()
    }

    fn free(&self, sst: &SstMeta) -> bool {
        !self.busy.contains(&sst.id)
    }

    fn may_write(&self, to: usize, sst: &SstMeta) -> bool {
        !self.meets_running(to, &sst.first_key, &sst.last_key)
    }

    fn meets_running(&self, to: usize, first: &[u8], last: &[u8]) -> bool {
        self.view.running.iter().any(|plan| plan.to == to && *plan.first <= *last && *first <= *plan.last)
    }
}

fn level_byte(level: usize) -> u8 {
    u8::try_from(level).expect("there are fewer than 256 levels")
}
