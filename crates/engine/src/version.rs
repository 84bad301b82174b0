//! The tree of runs at one moment: immutable, shared by readers without a lock.
//!
//! * L0 holds runs newest first; runs overlap, the ssts inside one run do not.
//! * From L1 down a level is one run, sorted by first key; an sst there holds a single tree.
//! * Every version of a key in a shallower place is newer than every version of it in a deeper one.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::limits::LEVELS;
use crate::store::OpenSst;
use crate::wal::LoadedSst;
use crate::{Seqno, SstId, TreeId, tree_of};

/// What the manifest knows of an sst. Immutable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SstMeta {
    /// Its name.
    pub id: SstId,
    /// Length of the object.
    pub bytes: u64,
    /// Versions in it.
    pub entries: u64,
    /// Of these, deletions.
    pub tombstones: u64,
    /// Full key of its first version.
    pub first_key: Box<[u8]>,
    /// Full key of its last version.
    pub last_key: Box<[u8]>,
    /// Least seqno in it.
    pub seqno_min: Seqno,
    /// Greatest seqno in it.
    pub seqno_max: Seqno,
    /// It was written before the commit that it belongs to had a seqno: its bytes say 0, and `seqno_min`, which is
    /// `seqno_max`, counts for all versions in it.
    pub loaded: bool,
    /// The sst, once it was opened: readers reach it from the version without a lock or a hash.
    pub opened: OpenSst,
}

/// Ssts sorted by key that do not overlap.
pub type Run = Arc<[Arc<SstMeta>]>;

/// The tree of runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Version {
    /// Newest first.
    pub l0: Vec<Run>,
    /// `levels[0]` is L1.
    pub levels: [Run; LEVELS - 1],
}

/// A change that does not fit the version it was applied to: damage if it was read from the bucket, our bug if not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Misfit(String);

impl SstMeta {
    /// Tree of its first version.
    pub fn first_tree(&self) -> TreeId {
        tree_of(&self.first_key)
    }
    /// Tree of its last version.
    pub fn last_tree(&self) -> TreeId {
        tree_of(&self.last_key)
    }
    /// The sst that the wal's record with `seqno` names.
    pub(crate) fn of_record(sst: &LoadedSst<'_>, seqno: Seqno) -> SstMeta {
        SstMeta {
            id: sst.id,
            bytes: sst.bytes,
            entries: sst.entries,
            tombstones: 0,
            first_key: sst.first_key.into(),
            last_key: sst.last_key.into(),
            seqno_min: seqno,
            seqno_max: seqno,
            loaded: true,
            opened: OpenSst::default(),
        }
    }
    /// It as a record of the wal names it.
    pub(crate) fn as_load(&self) -> LoadedSst<'_> {
        assert_eq!(self.tombstones, 0, "{}: a load writes no deletions", self.id);
        LoadedSst {
            id: self.id,
            bytes: self.bytes,
            entries: self.entries,
            first_key: &self.first_key,
            last_key: &self.last_key,
        }
    }
    /// The sst of a load that a commit took in at `seqno`.
    pub fn committed_at(&self, seqno: Seqno) -> SstMeta {
        assert_eq!((self.seqno_min, self.seqno_max), (Seqno(0), Seqno(0)), "{}: it has its seqnos", self.id);
        SstMeta {
            seqno_min: seqno,
            seqno_max: seqno,
            loaded: true,
            opened: OpenSst::default(),
            ..self.clone()
        }
    }
    /// Whether it may hold a key of `first..=last`.
    #[cfg(test)]
    pub fn overlaps(&self, first: &[u8], last: &[u8]) -> bool {
        *self.first_key <= *last && *first <= *self.last_key
    }
}

impl Version {
    /// This version without `removed` and with `added`, in that order, so that an sst can move down a level in one
    /// change. What is added to level 0 becomes one run, the newest, in the order given; deeper levels sort themselves.
    ///
    /// The result keeps the invariants at the top of this file, or there is none: an sst removed that is not here,
    /// added twice, overlapping its neighbours or holding two trees below L0 is a [`Misfit`].
    pub fn apply(&self, added: &[(u8, Arc<SstMeta>)], removed: &[SstId]) -> Result<Version, Misfit> {
        let mut gone: BTreeSet<SstId> = removed.iter().copied().collect();
        let mut kept = |run: &Run| -> Run {
            if run.iter().any(|sst| gone.contains(&sst.id)) {
                run.iter().filter(|sst| !gone.remove(&sst.id)).cloned().collect()
            } else {
                Arc::clone(run)
            }
        };
        let mut l0: Vec<Run> = self.l0.iter().map(&mut kept).filter(|run| !run.is_empty()).collect();
        let mut levels: [Run; LEVELS - 1] = std::array::from_fn(|i| kept(&self.levels[i]));
        if let Some(missing) = gone.first() {
            return Err(Misfit(format!("{missing} is removed but not in the tree")));
        }

        let newest: Run =
            added.iter().filter(|(level, _)| *level == 0).map(|(_, sst)| Arc::clone(sst)).collect();
        check_run(0, &newest)?;
        if !newest.is_empty() {
            l0.insert(0, newest);
        }
        for (index, run) in levels.iter_mut().enumerate() {
            let level = index + 1;
            let mut ssts: Vec<_> = added
                .iter()
                .filter(|(to, _)| usize::from(*to) == level)
                .map(|(_, sst)| Arc::clone(sst))
                .collect();
            if ssts.is_empty() {
                continue;
            }
            ssts.extend(run.iter().cloned());
            ssts.sort_by(|a, b| a.first_key.cmp(&b.first_key));
            check_run(level, &ssts)?;
            *run = ssts.into();
        }
        if let Some((level, sst)) = added.iter().find(|(level, _)| usize::from(*level) >= LEVELS) {
            return Err(Misfit(format!("{} is added to level {level}, and there are {LEVELS}", sst.id)));
        }

        let version = Version { l0, levels };
        version.check_names(added)?;
        Ok(version)
    }

    /// Every sst with its level; L0 newest run first.
    pub fn ssts(&self) -> impl Iterator<Item = (usize, &Arc<SstMeta>)> {
        let l0 = self.l0.iter().flat_map(|run| run.iter()).map(|sst| (0, sst));
        let deeper =
            self.levels.iter().enumerate().flat_map(|(i, run)| run.iter().map(move |sst| (i + 1, sst)));
        l0.chain(deeper)
    }

    /// The ssts of `level` (1 or deeper) that may hold a key of `first..=last`, in order.
    pub fn overlapping(&self, level: usize, first: &[u8], last: &[u8]) -> &[Arc<SstMeta>] {
        overlapping(&self.levels[level - 1], first, last)
    }

    /// Bytes in `level`.
    pub fn level_bytes(&self, level: usize) -> u64 {
        match level {
            0 => self.l0.iter().flat_map(|run| run.iter()).map(|sst| sst.bytes).sum(),
            _ => self.levels[level - 1].iter().map(|sst| sst.bytes).sum(),
        }
    }

    fn check_names(&self, added: &[(u8, Arc<SstMeta>)]) -> Result<(), Misfit> {
        // Only an addition can make a name appear twice; a removal alone need not look at the whole tree.
        if added.is_empty() {
            return Ok(());
        }
        let mut names = BTreeSet::new();
        match self.ssts().find(|(_, sst)| !names.insert(sst.id)) {
            Some((level, twice)) => {
                Err(Misfit(format!("{} is in the tree twice, once in level {level}", twice.id)))
            }
            None => Ok(()),
        }
    }
}

/// The ssts of one run that may hold a key of `first..=last`, in order.
pub fn overlapping<'a>(run: &'a [Arc<SstMeta>], first: &[u8], last: &[u8]) -> &'a [Arc<SstMeta>] {
    let from = run.partition_point(|sst| *sst.last_key < *first);
    // They are few for most who ask: to look at them in turn takes less than a second search.
    let many = run[from..].iter().take_while(|sst| *sst.first_key <= *last).count();
    &run[from..from + many]
}

/// Keys at which to divide what `ssts` hold into at most `parts` of about equal size. Ascending; the least key of all is not among them.
pub(crate) fn cuts<'a>(ssts: impl Iterator<Item = &'a Arc<SstMeta>>, parts: usize) -> Vec<&'a [u8]> {
    let mut starts: Vec<(&[u8], u64)> = ssts.map(|sst| (&*sst.first_key, sst.bytes)).collect();
    starts.sort();
    let share = starts.iter().map(|(_, bytes)| bytes).sum::<u64>() / parts.max(1) as u64 + 1;
    let mut last_cut = starts.first().map_or(&[][..], |(key, _)| key);
    let (mut cuts, mut bytes) = (Vec::new(), 0);
    for (key, more) in starts {
        if bytes >= share * (cuts.len() as u64 + 1) && key > last_cut {
            cuts.push(key);
            last_cut = key;
        }
        bytes += more;
    }
    cuts
}

fn check_run(level: usize, run: &[Arc<SstMeta>]) -> Result<(), Misfit> {
    for sst in run {
        if sst.first_key.len() < 4 || sst.last_key.len() < 4 || sst.last_key < sst.first_key {
            return Err(Misfit(format!("{} has an impossible key range", sst.id)));
        }
        if level > 0 && sst.first_tree() != sst.last_tree() {
            return Err(Misfit(format!("{} holds more than one tree in level {level}", sst.id)));
        }
    }
    match run.windows(2).find(|pair| pair[1].first_key <= pair[0].last_key) {
        Some(pair) => {
            Err(Misfit(format!("{} overlaps {} in one run of level {level}", pair[1].id, pair[0].id)))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{Epoch, full_key};

    /// An sst of tree 1 from `first` to `last` of 100 entries and `bytes`.
    pub(crate) fn sst(counter: u64, first: &str, last: &str, bytes: u64) -> Arc<SstMeta> {
        in_tree(1, counter, first, last, bytes)
    }

    pub(crate) fn in_tree(tree: u32, counter: u64, first: &str, last: &str, bytes: u64) -> Arc<SstMeta> {
        Arc::new(SstMeta {
            id: id(counter),
            bytes,
            entries: 100,
            tombstones: 0,
            first_key: full_key(TreeId(tree), first.as_bytes()).into(),
            last_key: full_key(TreeId(tree), last.as_bytes()).into(),
            seqno_min: Seqno(1),
            seqno_max: Seqno(100),
            loaded: false,
            opened: Default::default(),
        })
    }

    pub(crate) fn id(counter: u64) -> SstId {
        SstId { epoch: Epoch(1), counter }
    }

    fn names(run: &Run) -> Vec<u64> {
        run.iter().map(|sst| sst.id.counter).collect()
    }

    #[test]
    fn a_flush_becomes_the_newest_run_and_a_compaction_sorts_into_its_level() {
        let version = Version::default()
            .apply(&[(0, sst(1, "a", "c", 1)), (0, sst(2, "d", "f", 1))], &[])
            .and_then(|version| version.apply(&[(0, sst(3, "a", "z", 1))], &[]))
            .and_then(|version| {
                version.apply(&[(1, sst(5, "m", "p", 1)), (1, sst(4, "a", "b", 1))], &[id(2)])
            })
            .expect("every change fits");
        assert_eq!(version.l0.iter().map(names).collect::<Vec<_>>(), [vec![3], vec![1]]);
        assert_eq!(names(&version.levels[0]), [4, 5]);
        let moved =
            version.apply(&[(2, sst(4, "a", "b", 1))], &[id(4)]).expect("an sst may move down in one change");
        assert_eq!((names(&moved.levels[0]), names(&moved.levels[1])), (vec![5], vec![4]));
        let emptied = moved.apply(&[], &[id(1)]).expect("removal of the last sst of a run");
        assert_eq!(emptied.l0.len(), 1, "an empty run leaves L0");
    }

    #[test]
    fn a_change_that_breaks_an_invariant_is_refused_by_name() {
        let version = Version::default().apply(&[(1, sst(1, "a", "c", 1))], &[]).expect("fits");
        let refusal = |added: &[(u8, Arc<SstMeta>)], removed: &[SstId]| {
            version.apply(added, removed).expect_err("must be refused").to_string()
        };
        assert!(refusal(&[], &[id(9)]).contains("not in the tree"));
        assert!(refusal(&[(1, sst(2, "c", "d", 1))], &[]).contains("overlaps"));
        assert!(refusal(&[(2, sst(1, "a", "c", 1))], &[]).contains("twice"));
        assert!(refusal(&[(7, sst(2, "x", "y", 1))], &[]).contains("level 7"));
        assert!(refusal(&[(2, sst(2, "y", "x", 1))], &[]).contains("impossible key range"));
        let mut two_trees = SstMeta::clone(&sst(2, "a", "c", 1));
        two_trees.last_key = full_key(TreeId(2), b"a").into();
        assert!(refusal(&[(2, Arc::new(two_trees.clone()))], &[]).contains("more than one tree"));
        assert!(version.apply(&[(0, Arc::new(two_trees))], &[]).is_ok(), "L0 shares ssts between trees");
    }

    #[test]
    fn overlap_counts_both_ends() {
        let version = Version::default()
            .apply(&[(1, sst(1, "b", "d", 1)), (1, sst(2, "f", "h", 1)), (1, sst(3, "k", "m", 1))], &[])
            .expect("fits");
        let found = |first: &str, last: &str| {
            let key = |k: &str| full_key(TreeId(1), k.as_bytes());
            version.overlapping(1, &key(first), &key(last)).iter().map(|s| s.id.counter).collect::<Vec<_>>()
        };
        assert_eq!(found("d", "f"), [1, 2]);
        assert!(found("e", "e").is_empty());
        assert_eq!(found("a", "z"), [1, 2, 3]);
        assert_eq!(found("m", "m"), [3]);
        assert!(found("n", "z").is_empty());
    }
}
