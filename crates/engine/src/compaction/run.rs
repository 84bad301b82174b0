//! Carries out a merge, or writes a memtable: reads versions in order, leaves out what nobody sees, writes local ssts.
//!
//! * On success the outputs hold, for every snapshot, what the inputs held. On an error none of them is left.
//! * Outputs are local and synced; nothing here uploads or publishes them.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::cut::{Cutter, Deeper};
use super::pick::MergePlan;
use super::retain::Retention;
use crate::cache::Loan;
use crate::limits::Shape;
use crate::memtable::Memtable;
use crate::merge::Merge;
use crate::source::Source;
use crate::sst::{LevelIter, Purpose, SstBuilder, SstOptions};
use crate::store::SstStore;
use crate::version::{SstMeta, Version};
use crate::{Error, Kind, Result, Seqno, SstId, TreeId, tree_of};

/// What a rewrite needs to know beside its input.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) store: &'a Arc<SstStore>,
    /// What is read at now, ascending, the newest visible seqno last.
    pub(crate) snapshots: &'a [Seqno],
    /// As in [`super::pick::TreeView`]; their versions are left out.
    pub(crate) dropped: &'a BTreeSet<TreeId>,
    pub(crate) shape: &'a Shape,
    /// A name that was never used.
    pub(crate) next_id: &'a (dyn Fn() -> SstId + Sync),
    /// Asked now and then; `false` ends the rewrite with [`Kind::Interrupted`].
    pub(crate) goes_on: &'a (dyn Fn() -> bool + Sync),
}

/// How many versions go by between two looks at `goes_on`.
const VERSIONS_BETWEEN_LOOKS: u32 = 4096;

/// What a merge has done.
#[derive(Debug)]
pub(crate) struct Merged {
    /// The inputs of its plan, without those that stay as they are.
    pub(crate) inputs: Vec<Arc<SstMeta>>,
    /// What takes their place, in order; perhaps nothing.
    pub(crate) outputs: Vec<Arc<SstMeta>>,
}

/// Carries out `plan`, which was made in `version`. At most `parts` threads work on it, this one included.
pub(crate) fn merge(
    plan: &MergePlan,
    version: &Version,
    parts: usize,
    context: &Context<'_>,
) -> Result<Merged> {
    // As a query reads: a block for each question, not windows of what will be read again.
    let mut above = Merge::new();
    for run in &plan.sources[..plan.sources.len() - 1] {
        above.add(LevelIter::new(Arc::clone(context.store), Arc::clone(run), Purpose::Query));
    }
    let narrowed = narrowed(plan, version, |sst| {
        above.seek(&sst.first_key, Seqno(u64::MAX))?;
        Ok(above.valid() && above.key() <= &*sst.last_key)
    })?;
    let plan = narrowed.as_ref().unwrap_or(plan);
    let outputs = outputs(plan, version, parts, context)?;
    Ok(Merged { inputs: plan.inputs().cloned().collect(), outputs })
}

/// `plan` without the ssts of its target level that have no key of the shallower sources `among` theirs: there is nothing to merge them with, so
/// they stay, and outputs end before them. A plan takes all that its key range meets, and that may be a few keys far from each other. `None`: there
/// are none.
pub(super) fn narrowed(
    plan: &MergePlan,
    version: &Version,
    mut among: impl FnMut(&SstMeta) -> Result<bool>,
) -> Result<Option<MergePlan>> {
    let Some((lowest, above)) = plan.sources.split_last().filter(|(_, above)| !above.is_empty()) else {
        return Ok(None);
    };
    let beneath = version.overlapping(plan.to, &plan.first, &plan.last);
    if plan.to == 0 || !beneath.iter().any(|sst| sst.id == lowest[0].id) {
        return Ok(None);
    }
    let mut touched = Vec::with_capacity(lowest.len());
    for sst in lowest.iter() {
        if among(sst)? {
            touched.push(Arc::clone(sst));
        }
    }
    let fewer = touched.len() < lowest.len();
    Ok(fewer.then(|| MergePlan::new(above.iter().cloned().chain([touched.into()]).collect(), plan.to)))
}

fn outputs(
    plan: &MergePlan,
    version: &Version,
    parts: usize,
    context: &Context<'_>,
) -> Result<Vec<Arc<SstMeta>>> {
    let cuts = if parts > 1 { plan.cuts(parts) } else { Vec::new() };
    let starts = std::iter::once(&*plan.first).chain(cuts.iter().copied());
    let ends = cuts.iter().copied().map(Some).chain([None]);
    let part = |start: &[u8], end: Option<&[u8]>| {
        let mut source = Merge::new();
        for run in &plan.sources {
            source.add(LevelIter::new(Arc::clone(context.store), Arc::clone(run), Purpose::Compaction));
        }
        source.seek(start, Seqno(u64::MAX))?;
        let output = Output::new(context, Cutter::for_merge(version, plan, start, context.shape));
        let mut deeper = Deeper::new(version, plan.to);
        output.take(source, end, |key| deeper.may_hold(key))
    };
    let results: Vec<Result<Vec<Arc<SstMeta>>>> = std::thread::scope(|scope| {
        let mut others = Vec::new();
        let mut ranges: Vec<_> = starts.zip(ends).collect();
        let (first_start, first_end) = ranges.remove(0);
        for (start, end) in ranges {
            let part = &part;
            others.push(scope.spawn(move || part(start, end)));
        }
        let first = part(first_start, first_end);
        let join = |part: std::thread::ScopedJoinHandle<'_, _>| {
            part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        std::iter::once(first).chain(others.into_iter().map(join)).collect()
    });
    let failed = results.iter().any(Result::is_err);
    if failed {
        results.iter().flatten().flatten().for_each(|sst| context.store.forget(sst.id));
    }
    Ok(results.into_iter().collect::<Result<Vec<_>>>()?.concat())
}

/// The ssts of level 0 that hold what `memtable` does, in order; perhaps none. Nobody writes to it any more.
pub(crate) fn flush(memtable: &Arc<Memtable>, context: &Context<'_>) -> Result<Vec<Arc<SstMeta>>> {
    let mut source = memtable.iter();
    source.seek(&TreeId(0).0.to_be_bytes(), Seqno(u64::MAX))?;
    Output::new(context, Cutter::for_flush(context.shape)).take(source, None, |_| true)
}

/// The outputs of one part of a rewrite.
struct Output<'a> {
    context: &'a Context<'a>,
    cutter: Cutter<'a>,
    options: SstOptions,
    builder: Option<SstBuilder>,
    done: Vec<Arc<SstMeta>>,
    /// The sst in the making; its buffer grows by doubling, and hashes of its keys lie beside it.
    _memory: Loan,
}

impl<'a> Output<'a> {
    fn new(context: &'a Context<'a>, cutter: Cutter<'a>) -> Self {
        Self {
            context,
            cutter,
            options: SstOptions::default(),
            builder: None,
            done: Vec::new(),
            _memory: context.store.lend(context.shape.sst_bytes / 2 * 3),
        }
    }

    /// Takes what `source` has from where it stands to `end`. `older_elsewhere`: may a key have older versions that this source
    /// does not show? Asked with ascending keys.
    fn take(
        mut self,
        source: impl Source,
        end: Option<&[u8]>,
        older_elsewhere: impl FnMut(&[u8]) -> bool,
    ) -> Result<Vec<Arc<SstMeta>>> {
        match self.take_all(source, end, older_elsewhere) {
            Ok(()) => Ok(self.done),
            Err(error) => {
                self.done.iter().for_each(|sst| self.context.store.forget(sst.id));
                Err(error)
            }
        }
    }

    fn take_all(
        &mut self,
        mut source: impl Source,
        end: Option<&[u8]>,
        mut older_elsewhere: impl FnMut(&[u8]) -> bool,
    ) -> Result<()> {
        let context = self.context;
        let mut retention = Retention::new(context.snapshots);
        let mut key: Vec<u8> = Vec::new();
        let mut leave_out = false;
        let mut until_look = 0;
        while source.valid() && end.is_none_or(|end| source.key() < end) {
            if until_look == 0 {
                self.look()?;
                until_look = VERSIONS_BETWEEN_LOOKS;
            }
            until_look -= 1;
            if source.key() != key {
                let other_tree = key.is_empty() || tree_of(source.key()) != tree_of(&key);
                if other_tree {
                    leave_out = context.dropped.contains(&tree_of(source.key()));
                }
                key.clear();
                key.extend_from_slice(source.key());
                retention.next_key();
                let bytes = self.builder.as_ref().map_or(0, SstBuilder::estimated_bytes);
                if self.cutter.ends_before(&key, bytes) {
                    self.finish()?;
                }
            }
            if !leave_out && retention.keeps(source.seqno(), source.kind(), || older_elsewhere(&key)) {
                let new = || {
                    let rules = Arc::clone(context.store.first_parts());
                    SstBuilder::new((context.next_id)(), self.options).with_first_parts(rules)
                };
                self.builder.get_or_insert_with(new).add(&key, source.seqno(), source.kind(), source.value());
            }
            source.next()?;
        }
        self.finish()
    }

    fn look(&self) -> Result<()> {
        match (self.context.goes_on)() {
            true => Ok(()),
            false => Err(Error::new(Kind::Interrupted, "the engine is being closed")),
        }
    }

    fn finish(&mut self) -> Result<()> {
        let Some(builder) = self.builder.take() else { return Ok(()) };
        let (meta, bytes) = builder.finish();
        let meta = Arc::new(meta);
        self.context.store.write_local(&meta, &bytes)?;
        self.done.push(meta);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use bucket::{MemoryBucket, Names};

    use super::*;
    use crate::store::StoreParts;
    use crate::version::tests::id;
    use crate::{BranchId, OpKind, SimDisk, full_key};

    struct Bench {
        disk: SimDisk,
        store: Arc<SstStore>,
        shape: Shape,
        names: AtomicU64,
    }

    impl Bench {
        fn new() -> Self {
            let disk = SimDisk::new(1);
            let parts = StoreParts {
                disk: Arc::new(disk.clone()),
                bucket: Arc::new(MemoryBucket::new()),
                names: Names::new("main"),
                branch: BranchId([7; 16]),
                memory_bytes: 1 << 20,
                disk_cache_bytes: 0,
                threads: false,
            };
            let store = SstStore::new(parts);
            Self {
                disk,
                store,
                shape: Shape { sst_bytes: 8 << 10, ..Shape::default() },
                names: AtomicU64::new(0),
            }
        }

        fn with<T>(&self, snapshots: &[u64], dropped: &[u32], act: impl FnOnce(&Context<'_>) -> T) -> T {
            let snapshots: Vec<Seqno> = snapshots.iter().copied().map(Seqno).collect();
            let dropped = dropped.iter().copied().map(TreeId).collect();
            act(&Context {
                store: &self.store,
                snapshots: &snapshots,
                dropped: &dropped,
                shape: &self.shape,
                next_id: &|| id(self.names.fetch_add(1, Ordering::Relaxed) + 1),
                goes_on: &|| true,
            })
        }

        fn read(&self, run: &[Arc<SstMeta>]) -> Vec<(Vec<u8>, u64)> {
            let mut iter = LevelIter::new(Arc::clone(&self.store), run.into(), Purpose::Query);
            iter.seek(&[], Seqno(u64::MAX)).expect("readable");
            let mut all = Vec::new();
            while iter.valid() {
                all.push((iter.key().to_vec(), iter.seqno().0));
                iter.next().expect("readable");
            }
            all
        }
    }

    /// Rows `from..to` of `tree`, all written at `seqno`.
    fn fill(memtable: &Memtable, tree: u32, rows: std::ops::Range<u32>, seqno: u64, kind: OpKind) {
        for row in rows {
            let value = if kind == OpKind::Put { vec![seqno as u8; 50] } else { Vec::new() };
            memtable.insert(&full_key(TreeId(tree), &row.to_be_bytes()), Seqno(seqno), kind, &value);
        }
    }

    fn l0(runs: &[&Vec<Arc<SstMeta>>]) -> Version {
        runs.iter().rev().fold(Version::default(), |version, run| {
            let added: Vec<_> = run.iter().map(|sst| (0, Arc::clone(sst))).collect();
            version.apply(&added, &[]).expect("a run")
        })
    }

    #[test]
    fn a_flush_and_a_merge_keep_what_snapshots_see_and_nothing_else() {
        let bench = Bench::new();
        let old = Memtable::new();
        fill(&old, 1, 0..1000, 1, OpKind::Put);
        fill(&old, 1, 0..500, 2, OpKind::Put);
        fill(&old, 2, 0..500, 2, OpKind::Put);
        let new = Memtable::new();
        fill(&new, 1, 0..250, 3, OpKind::Delete);
        let (old, new) = bench.with(&[3], &[], |context| {
            (flush(&old, context).expect("flush"), flush(&new, context).expect("flush"))
        });
        assert!(old.len() > 2, "cut at the size and at the tree");
        assert_eq!(bench.read(&old).len(), 1500, "shadowed versions end with the flush");
        let version = l0(&[&new, &old]);
        let plan = MergePlan::new(version.l0.clone(), 6);
        for parts in [1, 3] {
            let merged = bench
                .with(&[3], &[2], |context| merge(&plan, &version, parts, context).expect("merge").outputs);
            let rows = bench.read(&merged);
            assert_eq!(rows.len(), 750, "deletions leave with what they hide, dropped trees leave");
            assert_eq!(rows[0], (full_key(TreeId(1), &250u32.to_be_bytes()), 2));
            let in_level: Vec<_> = merged.iter().map(|sst| (6, Arc::clone(sst))).collect();
            Version::default().apply(&in_level, &[]).expect("fits a level");
            let held = bench.with(&[2, 3], &[2], |context| {
                merge(&plan, &version, parts, context).expect("merge").outputs
            });
            assert_eq!(bench.read(&held).len(), 1250, "a snapshot holds what was deleted after it");
        }
    }

    #[test]
    fn ssts_without_a_key_of_the_newer_ones_stay_and_nothing_reaches_across_them() {
        let bench = Bench::new();
        let old = Memtable::new();
        fill(&old, 1, 0..3000, 1, OpKind::Put);
        let old = bench.with(&[9], &[], |context| flush(&old, context).expect("flush"));
        let in_level = |level: u8, ssts: &[Arc<SstMeta>]| {
            ssts.iter().map(|sst| (level, Arc::clone(sst))).collect::<Vec<_>>()
        };
        assert!(old.len() > 5);
        // Two newer runs, with keys in the first, the last and a middle sst; the middle one only loses a row.
        let middle = u32::from_be_bytes(old[old.len() / 2].first_key[4..].try_into().expect("four bytes"));
        let newer = [(1..2, 2990..3500, OpKind::Put), (middle..middle + 1, 2999..3000, OpKind::Delete)];
        let newer = newer.map(|(few, many, kind)| {
            let memtable = Memtable::new();
            fill(&memtable, 1, few, 2, kind);
            fill(&memtable, 1, many, 2, OpKind::Put);
            bench.with(&[9], &[], |context| flush(&memtable, context).expect("flush"))
        });
        let version = Version::default().apply(&in_level(6, &old), &[]).expect("fits");
        let version =
            newer.iter().fold(version, |version, run| version.apply(&in_level(0, run), &[]).expect("fits"));
        let sources = version.l0.iter().cloned().chain([version.levels[5].clone()]).collect();
        let plan = MergePlan::new(sources, 6);
        for parts in [1, 3] {
            let merged =
                bench.with(&[9], &[], |context| merge(&plan, &version, parts, context)).expect("merge");
            let newer = newer.iter().map(Vec::len).sum::<usize>();
            assert_eq!(merged.inputs.len(), newer + 3, "the others have nothing to merge with");
            let removed: Vec<SstId> = merged.inputs.iter().map(|sst| sst.id).collect();
            // That outputs do not overlap what stays is checked here.
            let after = version.apply(&in_level(6, &merged.outputs), &removed).expect("fits the level");
            assert!(after.l0.is_empty());
            let rows = bench.read(&after.levels[5]);
            assert_eq!(rows.len(), 3499, "one is deleted");
            assert_eq!(rows.iter().filter(|(_, seqno)| *seqno == 2).count(), 511);
        }
        // Without newer keys all of it is the caller's wish.
        let alone = MergePlan::new(vec![version.levels[5].clone()], 6);
        let merged = bench.with(&[9], &[], |context| merge(&alone, &version, 1, context)).expect("merge");
        assert_eq!(merged.inputs.len(), old.len());
    }

    #[test]
    fn a_rewrite_that_fails_leaves_nothing_behind() {
        let bench = Bench::new();
        let memtable = Memtable::new();
        fill(&memtable, 1, 0..2000, 1, OpKind::Put);
        bench.disk.limit(4 << 10);
        let error = bench.with(&[1], &[], |context| flush(&memtable, context)).expect_err("the disk is full");
        assert_eq!(error.kind(), Kind::Full);
        assert_eq!(bench.disk.used(), 0);
        assert_eq!(bench.store.unuploaded_bytes(), 0);

        bench.disk.limit(u64::MAX);
        let run = bench.with(&[1], &[], |context| flush(&memtable, context)).expect("flush");
        let used = bench.disk.used();
        let version = l0(&[&run]);
        let plan = MergePlan::new(version.l0.clone(), 6);
        for parts in [1, 3] {
            let stop = |context: &Context<'_>| {
                merge(&plan, &version, parts, &Context { goes_on: &|| false, ..*context })
            };
            let error = bench.with(&[1], &[], stop).expect_err("told to stop");
            assert_eq!((error.kind(), bench.disk.used()), (Kind::Interrupted, used));
            bench.disk.limit(used + (2 << 10));
            let error = bench
                .with(&[1], &[], |context| merge(&plan, &version, parts, context))
                .expect_err("disk full");
            assert_eq!((error.kind(), bench.disk.used()), (Kind::Full, used));
            bench.disk.limit(u64::MAX);
        }
    }
}
