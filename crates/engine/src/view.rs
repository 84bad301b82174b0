//! What a reader reads from: the memtables and the tree of runs at one moment. Immutable; a change makes a new one.
//!
//! * A view has every version that some snapshot taken before it was loaded, and not let go since, can see.
//! * Newer data comes first: the active memtable, the frozen ones by age, L0 by age, then the levels.
//! * Loading the current view takes no lock, and a point read no reference count.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::Arc;

use crate::engine::Estimate;
use crate::first_part::successor;
use crate::limits::{L0_RUNS_STOP, LEVELS};
use crate::memtable::Memtable;
use crate::merge::{AnySource, Merge};
use crate::prefetch::prefetch;
use crate::source::Source;
use crate::sst::{self, LevelIter, Purpose, SstIter, find_in_run};
use crate::store::SstStore;
use crate::version::{Run, Version, cuts, overlapping};
use crate::{OpKind, Result, Seqno, TreeId, full_key, tree_of};

/// Everything that can be read.
#[derive(Clone)]
pub(crate) struct View {
    /// Takes writes.
    pub(crate) active: Arc<Memtable>,
    /// Wait for their flush; newest first.
    pub(crate) frozen: Vec<Arc<Memtable>>,
    /// Ssts of loads that were committed since the memtables began; they hold all that there is of their trees below
    /// the memtables. They do not overlap, and come into the version with the flush of the memtable they were committed with.
    pub(crate) loaded: Run,
    /// What is flushed. May be ahead of what is published.
    pub(crate) version: Arc<Version>,
    /// Trees that are gone although data of theirs may still be there.
    pub(crate) dropped: Arc<BTreeSet<TreeId>>,
}

impl View {
    /// Calls `f` with the value of `full_key` at `at`, if it has one.
    pub(crate) fn get<R>(
        &self,
        store: &Arc<SstStore>,
        full_key: &[u8],
        at: Seqno,
        f: impl FnOnce(&[u8]) -> R,
    ) -> Result<Option<R>> {
        for memtable in self.memtables() {
            if let Some((kind, _, value)) = memtable.get(full_key, at) {
                return Ok((kind == OpKind::Put).then(|| f(value)));
            }
        }
        let hash = sst::hash(full_key);
        let told = Cell::new(false);
        // What all runs lack comes in as many round trips as one of them would cost.
        let cold = || {
            if store.has_threads() && !told.replace(true) {
                prefetch(self, store, &[full_key], LEVELS + L0_RUNS_STOP);
            }
        };
        for run in self.runs() {
            let Some(meta) = find_in_run(run, full_key) else { continue };
            let sst = match store.opened(meta) {
                Some(sst) => sst,
                None => {
                    if !store.opens_here(meta) {
                        cold();
                    }
                    store.open(meta)?
                }
            };
            if let Some(found) = sst.get_or_tell(full_key, hash, at, &cold)? {
                return Ok((found.kind() == OpKind::Put).then(|| f(found.value())));
            }
        }
        Ok(None)
    }

    /// Whether `full_key` has a version, a deletion too, that is newer than `than`.
    pub(crate) fn changed_since(&self, store: &Arc<SstStore>, full_key: &[u8], than: Seqno) -> Result<bool> {
        for memtable in self.memtables() {
            if let Some(newest) = memtable.newest(full_key) {
                return Ok(newest > than);
            }
        }
        let hash = sst::hash(full_key);
        for run in self.runs() {
            let Some(meta) = find_in_run(run, full_key).filter(|meta| meta.seqno_max > than) else {
                continue;
            };
            if let Some(found) = store.open(meta)?.get_hashed(full_key, hash, Seqno(u64::MAX))? {
                return Ok(found.seqno() > than);
            }
        }
        Ok(false)
    }

    /// Adds to `merge` all versions of `tree`, and perhaps of others beside it.
    pub(crate) fn add_sources(&self, store: &Arc<SstStore>, tree: TreeId, merge: &mut Merge<AnySource>) {
        if self.dropped.contains(&tree) {
            return;
        }
        for memtable in self.memtables() {
            merge.add(AnySource::Memtable(memtable.iter_tree(tree)));
        }
        let first = tree.0.to_be_bytes();
        let end = tree.0.checked_add(1).expect("tree ids stay below 2^32 - 1").to_be_bytes();
        for run in self.runs() {
            let from = run.partition_point(|meta| *meta.last_key < first[..]);
            let to = run.partition_point(|meta| *meta.first_key < end[..]);
            if from < to {
                let part: Run = if to - from == run.len() { Arc::clone(run) } else { run[from..to].into() };
                if let Some(AnySource::Level(above)) = merge.last_mut() {
                    above.cover();
                }
                merge.add(AnySource::Level(LevelIter::new(Arc::clone(store), part, Purpose::Query)));
            }
        }
    }

    /// Whether there is any version of a key of `tree` other than the empty one, a deletion or one that nobody sees any more included.
    pub(crate) fn holds_keys(&self, store: &Arc<SstStore>, tree: TreeId) -> Result<bool> {
        let mut merge = Merge::new();
        self.add_sources(store, tree, &mut merge);
        let least = full_key(tree, &[0]);
        merge.seek(&least, Seqno(u64::MAX))?;
        Ok(merge.valid() && merge.key().starts_with(&least[..4]))
    }

    /// About how much of `tree` lies between two full keys of it, old versions too. A few are counted; what can not be
    /// read counts as nothing.
    pub(crate) fn estimate(
        &self,
        store: &Arc<SstStore>,
        tree: TreeId,
        low: Bound<&[u8]>,
        high: Bound<&[u8]>,
    ) -> Estimate {
        let (Bound::Included(from) | Bound::Excluded(from), Bound::Included(to) | Bound::Excluded(to)) =
            (low, high)
        else {
            return Estimate::default();
        };
        if from > to || self.dropped.contains(&tree) {
            return Estimate::default();
        }
        let probe = store.first_parts().probe(common_prefix(from, high));
        let edge = |key, inside: bool| (key, if inside { Seqno(u64::MAX) } else { Seqno(0) });
        let edges =
            (edge(from, matches!(low, Bound::Included(_))), edge(to, matches!(high, Bound::Excluded(_))));
        let mut estimate = Estimate::default();
        // A memtable looks into the one tree that the low end is in, and wants the high end there too.
        let high = if to[..4] == from[..4] { high } else { Bound::Unbounded };
        for memtable in self.memtables() {
            let entries = memtable.estimate(low, high);
            estimate.entries += entries;
            let each = memtable.bytes() as u64 / (memtable.entries() as u64).max(1);
            estimate.bytes += entries * each;
        }
        for meta in self.runs().flat_map(|run| overlapping(run, from, to)) {
            if from <= &*meta.first_key && &*meta.last_key < to {
                estimate.entries += meta.entries;
                estimate.bytes += meta.bytes;
            } else if let Ok((entries, bytes)) =
                store.open(meta).and_then(|sst| sst::estimate(sst, &probe, edges.0, edges.1))
            {
                estimate.entries += entries;
                estimate.bytes += bytes;
            }
        }
        estimate
    }

    /// Keys (without their tree) at which to divide what `tree` has in ssts into at most `parts` of about equal size, ascending.
    pub(crate) fn cuts(&self, tree: TreeId, parts: usize) -> Vec<Vec<u8>> {
        let (first, end) = (full_key(tree, &[]), full_key(TreeId(tree.0.saturating_add(1)), &[]));
        let ssts = self.runs().flat_map(|run| overlapping(run, &first, &end));
        let inside = |key: &&[u8]| tree_of(key) == tree && key.len() > first.len();
        let cuts = cuts(ssts, parts).into_iter().filter(inside);
        cuts.map(|key| key[first.len()..].to_vec()).collect()
    }

    /// Newest first.
    pub(crate) fn memtables(&self) -> impl Iterator<Item = &Arc<Memtable>> {
        std::iter::once(&self.active).chain(&self.frozen)
    }

    /// Newest first.
    pub(crate) fn runs(&self) -> impl Iterator<Item = &Run> {
        let flushed = self.version.l0.iter().chain(&self.version.levels);
        std::iter::once(&self.loaded).chain(flushed).filter(|run| !run.is_empty())
    }

    /// Whether there is any version of `tree`, a deletion or one that nobody sees any more included.
    pub(crate) fn holds(&self, store: &Arc<SstStore>, tree: TreeId) -> Result<bool> {
        if self.memtables().any(|memtable| memtable.holds(tree)) {
            return Ok(true);
        }
        let prefix = full_key(tree, &[]);
        for run in self.runs() {
            let around = run.iter().filter(|sst| sst.first_tree() <= tree && tree <= sst.last_tree());
            for sst in around {
                if sst.first_tree() == tree || sst.last_tree() == tree {
                    return Ok(true);
                }
                let mut iter = SstIter::new(Arc::clone(store.open(sst)?), Purpose::Query);
                iter.seek(&prefix, Seqno(u64::MAX))?;
                if iter.valid() && iter.key().starts_with(&prefix) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// What all keys from `low` to `high` start with.
fn common_prefix<'a>(low: &'a [u8], high: Bound<&[u8]>) -> &'a [u8] {
    let (Bound::Included(end) | Bound::Excluded(end)) = high else { return &low[..4] };
    if matches!(high, Bound::Excluded(end) if end == successor(low)) {
        return low;
    }
    let shared = low.iter().zip(end).take_while(|(a, b)| a == b).count();
    // The trees may differ only where the high end is the beginning of the next one.
    &low[..shared.max(4)]
}
