//! Carries out a merge, or writes a memtable: reads versions in order, leaves out what nobody sees, writes local ssts.
//!
//! * On success the outputs hold, for every snapshot, what the inputs held. On an error none of them is left.
//! * Outputs are local, and not synced: until they are published, their inputs have their contents. Nothing here uploads or publishes them.

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
    let mut above = Merge::new();
    for run in &plan.sources[..plan.sources.len() - 1] {
        above.add(LevelIter::new(Arc::clone(context.store), Arc::clone(run), Purpose::Probe));
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
mod tests;
