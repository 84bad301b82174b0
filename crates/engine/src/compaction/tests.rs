//! The pure parts together, over ssts that are plain vectors: whatever is flushed, picked, merged side by side and
//! installed in whatever order, every snapshot reads the same, and the tree comes to rest.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;

use super::cut::{Cutter, Deeper};
use super::pick::{CompactionPlan, MergePlan, TreeView, debt_bytes, forgettable, pick, surplus_bytes};
use super::retain::Retention;
use super::run::narrowed;
use crate::limits::Shape;
use crate::version::tests::id;
use crate::version::{SstMeta, Version};
use crate::{OpKind, Seqno, SstId, TreeId, full_key, tree_of};

type Entry = (Vec<u8>, Seqno, OpKind);

/// A tree whose ssts are vectors.
struct Toy {
    shape: Shape,
    version: Version,
    contents: BTreeMap<SstId, Vec<Entry>>,
    names: u64,
    running: Vec<(Arc<MergePlan>, Version, Vec<Seqno>)>,
    /// What every snapshot must read.
    truth: BTreeMap<Vec<u8>, Vec<(Seqno, OpKind)>>,
    memtable: Vec<Entry>,
    seqno: u64,
    snapshots: BTreeSet<Seqno>,
    dropped: BTreeSet<TreeId>,
    wasted: BTreeMap<SstId, u64>,
    merges: usize,
    moves: usize,
    /// Inputs of plans that were left as they are.
    stayed: usize,
}

impl Toy {
    fn new() -> Self {
        Self {
            shape: Shape {
                sst_bytes: 60,
                level_base_bytes: 200,
                level_ratio: 2,
                l0_runs: 3,
                l0_runs_stop: 9,
                ..Shape::default()
            },
            version: Version::default(),
            contents: BTreeMap::new(),
            names: 0,
            running: Vec::new(),
            truth: BTreeMap::new(),
            memtable: Vec::new(),
            seqno: 0,
            snapshots: BTreeSet::new(),
            dropped: BTreeSet::new(),
            wasted: BTreeMap::new(),
            merges: 0,
            moves: 0,
            stayed: 0,
        }
    }

    fn write(&mut self, tree: u32, key: u8, kind: OpKind) {
        if self.dropped.contains(&TreeId(tree)) {
            return;
        }
        self.seqno += 1;
        let key = full_key(TreeId(tree), &[key]);
        self.truth.entry(key.clone()).or_default().insert(0, (Seqno(self.seqno), kind));
        self.memtable.push((key, Seqno(self.seqno), kind));
    }

    fn live_snapshots(&self) -> Vec<Seqno> {
        self.snapshots
            .iter()
            .copied()
            .chain([Seqno(self.seqno)])
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect()
    }

    fn flush(&mut self) {
        let mut entries = std::mem::take(&mut self.memtable);
        entries.sort_by(|a, b| (&a.0, b.1).cmp(&(&b.0, a.1)));
        let ssts = self.rewrite(entries, None, &self.version.clone(), &self.live_snapshots());
        let added: Vec<_> = ssts.into_iter().map(|sst| (0, sst)).collect();
        self.install(&added, &[]);
    }

    fn install(&mut self, added: &[(u8, Arc<SstMeta>)], removed: &[SstId]) {
        self.version = self.version.apply(added, removed).expect("plans fit the tree");
    }

    /// By a plan, or for a flush.
    fn rewrite(
        &mut self,
        entries: Vec<Entry>,
        plan: Option<&MergePlan>,
        version: &Version,
        snapshots: &[Seqno],
    ) -> Vec<Arc<SstMeta>> {
        let mut outputs = Vec::new();
        let mut open: Vec<Entry> = Vec::new();
        let Some((first, ..)) = entries.first().cloned() else { return outputs };
        let mut retention = Retention::new(snapshots);
        let mut cutter = match plan {
            Some(plan) => Cutter::for_merge(version, plan, &first, &self.shape),
            None => Cutter::for_flush(&self.shape),
        };
        let mut deeper = plan.map(|plan| Deeper::new(version, plan.to));
        let mut last_key = Vec::new();
        for (key, seqno, kind) in entries {
            if key != last_key {
                retention.next_key();
                if cutter.ends_before(&key, open.len() as u64 * 10) {
                    outputs.push(self.finish(std::mem::take(&mut open)));
                }
                last_key.clone_from(&key);
            }
            if !self.dropped.contains(&tree_of(&key))
                && retention.keeps(seqno, kind, || deeper.as_mut().is_none_or(|deeper| deeper.may_hold(&key)))
            {
                open.push((key, seqno, kind));
            }
        }
        if !open.is_empty() {
            outputs.push(self.finish(open));
        }
        outputs
    }

    fn finish(&mut self, entries: Vec<Entry>) -> Arc<SstMeta> {
        self.names += 1;
        let seqnos = || entries.iter().map(|(_, seqno, _)| *seqno);
        let meta = SstMeta {
            id: id(self.names),
            bytes: entries.len() as u64 * 10,
            entries: entries.len() as u64,
            tombstones: entries.iter().filter(|(_, _, kind)| *kind == OpKind::Delete).count() as u64,
            first_key: entries[0].0.clone().into(),
            last_key: entries[entries.len() - 1].0.clone().into(),
            seqno_min: seqnos().min().expect("not empty"),
            seqno_max: seqnos().max().expect("not empty"),
            loaded: false,
            opened: Default::default(),
        };
        self.contents.insert(meta.id, entries);
        Arc::new(meta)
    }

    /// Starts what `pick` says is due, or says that there is nothing.
    fn start(&mut self) -> bool {
        self.start_what(false)
    }

    /// The same, with nothing else to do.
    fn start_what(&mut self, quiet: bool) -> bool {
        let running: Vec<_> = self.running.iter().map(|(plan, ..)| Arc::clone(plan)).collect();
        let snapshots = self.live_snapshots();
        let view = TreeView {
            version: &self.version,
            wasted: &self.wasted,
            running: &running,
            dropped: &self.dropped,
            quiet,
            oldest_snapshot: snapshots[0],
            shape: &self.shape,
        };
        match pick(&view) {
            None => return false,
            Some(CompactionPlan::Drop(ssts)) => self.install(&[], &ssts),
            Some(CompactionPlan::Move(moves)) => {
                self.moves += 1;
                let removed: Vec<SstId> = moves.iter().map(|(_, sst)| sst.id).collect();
                self.install(&moves, &removed);
            }
            Some(CompactionPlan::Merge(plan)) => self.running.push((plan, self.version.clone(), snapshots)),
        }
        true
    }

    fn waste(&mut self, which: usize, steps: u64) {
        if let Some((_, sst)) = self.version.ssts().nth(which) {
            *self.wasted.entry(sst.id).or_default() += steps;
        }
    }

    /// Does and installs one of the merges under way.
    fn finish_one(&mut self, which: usize) -> bool {
        if self.running.is_empty() {
            return false;
        }
        let (plan, version, snapshots) = self.running.remove(which % self.running.len());
        self.merges += 1;
        // The merge in the way that run.rs does it: without what stays, part by part, each with its own cutter.
        let above: Vec<&Entry> = plan.sources[..plan.sources.len() - 1]
            .iter()
            .flat_map(|run| run.iter())
            .flat_map(|sst| &self.contents[&sst.id])
            .collect();
        let among = |sst: &SstMeta| Ok(above.iter().any(|(key, ..)| sst.overlaps(key, key)));
        let narrowed = narrowed(&plan, &version, among).expect("it looks into memory").map(Arc::new);
        self.stayed +=
            narrowed.as_ref().map_or(0, |narrowed| plan.inputs().count() - narrowed.inputs().count());
        let plan = narrowed.unwrap_or(plan);
        let mut entries: Vec<Entry> = plan.inputs().flat_map(|sst| self.contents[&sst.id].clone()).collect();
        entries.sort_by(|a, b| (&a.0, b.1).cmp(&(&b.0, a.1)));
        let mut added = Vec::new();
        for cut in plan.cuts(2).into_iter().map(Some).chain([None]) {
            let rest = cut.map_or(Vec::new(), |cut| {
                entries.split_off(entries.partition_point(|(key, ..)| **key < *cut))
            });
            let part = std::mem::replace(&mut entries, rest);
            added.extend(self.rewrite(part, Some(&plan), &version, &snapshots));
        }
        let added: Vec<_> = added.into_iter().map(|sst| (plan.to as u8, sst)).collect();
        let removed: Vec<SstId> = plan.inputs().map(|sst| sst.id).collect();
        self.install(&added, &removed);
        true
    }

    fn read(&self, key: &[u8], at: Seqno) -> Option<Seqno> {
        let visible = |entry: &&Entry| entry.0 == key && entry.1 <= at;
        let memory = self.memtable.iter().rev().find(visible);
        let found = memory.or_else(|| {
            let near = |sst: &SstMeta| sst.overlaps(key, key);
            let mut places =
                self.version.ssts().filter(|(_, sst)| near(sst)).map(|(_, sst)| &self.contents[&sst.id]);
            places.find_map(|entries| entries.iter().find(visible))
        });
        found.filter(|(_, _, kind)| *kind == OpKind::Put).map(|(_, seqno, _)| *seqno)
    }

    fn check(&self) {
        for (key, versions) in self.truth.iter().filter(|(key, _)| !self.dropped.contains(&tree_of(key))) {
            for at in self.live_snapshots() {
                let newest = versions.iter().find(|(seqno, _)| *seqno <= at);
                let truth = newest.filter(|(_, kind)| *kind == OpKind::Put).map(|(seqno, _)| *seqno);
                assert_eq!(self.read(key, at), truth, "{key:?} at {at:?} in {:#?}", self.version);
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write {
        tree: u32,
        key: u8,
        kind: OpKind,
    },
    Ascend {
        tree: u32,
        from: u8,
    },
    Flush,
    /// A merge that is due, or also one for space.
    Start(bool),
    Finish(usize),
    Snapshot,
    Release(usize),
    Drop(u32),
    /// Readers waste steps on an sst.
    Waste(usize, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kind = prop_oneof![2 => Just(OpKind::Put), 1 => Just(OpKind::Delete)];
    let step = prop_oneof![
        40 => (1u32..5, 0u8..40, kind).prop_map(|(tree, key, kind)| Step::Write { tree, key, kind }),
        4 => (1u32..5, 0u8..200).prop_map(|(tree, from)| Step::Ascend { tree, from }),
        8 => Just(Step::Flush),
        8 => prop::bool::weighted(0.2).prop_map(Step::Start),
        6 => (0usize..9).prop_map(Step::Finish),
        2 => Just(Step::Snapshot),
        2 => (0usize..9).prop_map(Step::Release),
        1 => (1u32..5).prop_map(Step::Drop),
        4 => (0usize..20, 1u64..50).prop_map(|(which, steps)| Step::Waste(which, steps)),
    ];
    prop::collection::vec(step, 1..300)
}

fn play(steps: &[Step]) -> Toy {
    let mut toy = Toy::new();
    for step in steps {
        match *step {
            Step::Write { tree, key, kind } => toy.write(tree, key, kind),
            Step::Ascend { tree, from } => {
                (from..from.saturating_add(20)).for_each(|k| toy.write(tree, k, OpKind::Put))
            }
            Step::Flush => toy.flush(),
            Step::Start(quiet) => _ = toy.start_what(quiet),
            Step::Finish(which) => _ = toy.finish_one(which),
            Step::Snapshot => _ = toy.snapshots.insert(Seqno(toy.seqno)),
            Step::Waste(which, steps) => toy.waste(which, steps),
            Step::Release(which) => {
                let gone = toy.snapshots.iter().nth(which).copied();
                gone.map(|seqno| toy.snapshots.remove(&seqno));
            }
            Step::Drop(tree) => {
                // Flushed with what came before it, as `TreeView` asks; the tree's own rows in memory are then gone.
                toy.dropped.insert(TreeId(tree));
                toy.flush();
            }
        }
        if !matches!(step, Step::Write { .. } | Step::Ascend { .. } | Step::Snapshot | Step::Release(_)) {
            toy.check();
        }
    }
    toy
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn every_snapshot_reads_the_same_whatever_is_compacted(steps in steps()) {
        let mut toy = play(&steps);
        toy.flush();
        let mut work = 0;
        while toy.start() || toy.finish_one(0) {
            toy.check();
            work += 1;
            prop_assert!(work < 1000, "compaction must come to rest");
        }
        prop_assert!(toy.version.l0.len() < toy.shape.l0_runs);
        prop_assert_eq!(debt_bytes(&toy.version, &toy.shape), 0);
        while toy.start_what(true) || toy.finish_one(0) {
            toy.check();
            work += 1;
            prop_assert!(work < 2000, "what is merged for space must come to rest");
        }
        prop_assert_eq!(surplus_bytes(&toy.version, &toy.shape, 0), 0);
        for tree in &toy.dropped {
            let in_levels = toy.version.ssts().any(|(level, sst)| level > 0 && sst.first_tree() == *tree);
            prop_assert!(!in_levels, "a dropped tree has left all levels");
        }
        for tree in forgettable(&toy.version, &toy.dropped) {
            let holds = |sst: &SstMeta| toy.contents[&sst.id].iter().any(|(key, ..)| tree_of(key) == tree);
            prop_assert!(!toy.version.ssts().any(|(_, sst)| holds(sst)));
        }
    }
}

#[test]
fn rows_loaded_in_order_sink_without_being_read() {
    let mut toy = Toy::new();
    for key in 0..200 {
        toy.write(1, key, OpKind::Put);
        if key % 10 == 9 {
            toy.flush();
            while toy.start() || toy.finish_one(0) {}
        }
    }
    assert_eq!(toy.merges, 0);
    assert!(toy.moves > 0);
    toy.check();
}

#[test]
fn what_lies_between_keys_far_from_each_other_is_not_rewritten() {
    let mut toy = Toy::new();
    (0..200).for_each(|key| toy.write(1, key, OpKind::Put));
    toy.flush();
    toy.write(3, 0, OpKind::Put);
    toy.flush();
    while toy.start() || toy.finish_one(0) {}
    let before: BTreeSet<SstId> = toy.version.ssts().map(|(_, sst)| sst.id).collect();
    assert!(before.len() > 10);
    for round in 0..60 {
        [round % 10, 190 + round % 10].into_iter().for_each(|key| toy.write(1, key, OpKind::Put));
        toy.flush();
        while toy.start() || toy.finish_one(0) {}
        toy.check();
    }
    assert!(toy.merges > 3 && toy.stayed > 10, "{} merges left {} alone", toy.merges, toy.stayed);
    let now: BTreeSet<SstId> = toy.version.ssts().map(|(_, sst)| sst.id).collect();
    assert!(before.intersection(&now).count() >= before.len() - 6, "{before:?} {now:?}");
}

#[test]
fn when_nobody_writes_little_is_there_twice() {
    let mut toy = Toy::new();
    (0..4).for_each(|tree| (0..200).for_each(|key| toy.write(tree, key, OpKind::Put)));
    toy.flush();
    while toy.start() || toy.finish_one(0) {}
    let bytes = |toy: &Toy| toy.version.ssts().map(|(_, sst)| sst.bytes).sum::<u64>();
    assert_eq!(bytes(&toy), 8000);
    for tree in 0..4 {
        (0..200).step_by(3).for_each(|key| toy.write(tree, key, OpKind::Put));
        toy.flush();
        while toy.start() || toy.finish_one(0) {}
    }
    assert!(bytes(&toy) > 9000, "a merge that is due left {} bytes", bytes(&toy));
    assert!(surplus_bytes(&toy.version, &toy.shape, 0) > 0);
    let merges = toy.merges;
    while toy.start_what(true) || toy.finish_one(0) {}
    assert!(toy.merges > merges && bytes(&toy) <= 8800, "{} bytes are left", bytes(&toy));
    assert_eq!(surplus_bytes(&toy.version, &toy.shape, 0), 0);
    toy.check();
    let memtable = 8800 - bytes(&toy) + 7;
    assert!(surplus_bytes(&toy.version, &toy.shape, memtable) > 0, "the wal of a memtable counts");
    assert_eq!(surplus_bytes(&toy.version, &toy.shape, 6), 0, "unless it is little");
}

#[test]
fn deletions_leave_once_nobody_reads_what_they_hide() {
    let mut toy = Toy::new();
    (0..40).for_each(|key| toy.write(1, key, OpKind::Put));
    toy.flush();
    toy.snapshots.insert(Seqno(toy.seqno));
    (0..40).for_each(|key| toy.write(1, key, OpKind::Delete));
    for key in 0..6 {
        toy.flush();
        toy.write(1, key, OpKind::Delete);
        while toy.start() || toy.finish_one(0) {}
    }
    toy.check();
    let sunk = |toy: &Toy| {
        toy.version.ssts().filter(|(level, _)| *level > 0).map(|(_, sst)| sst.tombstones).sum::<u64>()
    };
    assert!(sunk(&toy) > 30, "the snapshot still reads the rows");
    toy.snapshots.clear();
    while toy.start() || toy.finish_one(0) {}
    toy.check();
    assert_eq!(sunk(&toy), 0, "{:#?}", toy.version);
}

#[test]
fn readers_pay_for_the_merge_that_spares_them() {
    let mut toy = Toy::new();
    for run in 0..4 {
        (run..20).step_by(4).for_each(|key| toy.write(1, key, OpKind::Put));
        toy.flush();
    }
    while toy.start() || toy.finish_one(0) {}
    (0..4).for_each(|key| toy.write(1, 5 * key, OpKind::Delete));
    toy.flush();
    let charged = |toy: &mut Toy, steps: u64| {
        (0..toy.version.ssts().count()).for_each(|which| toy.waste(which, steps));
    };
    let bytes: u64 = toy.version.ssts().map(|(_, sst)| sst.bytes).sum();
    assert_eq!((bytes, toy.version.l0.len()), (240, 1), "a run of L0 over all there is");
    charged(&mut toy, 240 / 16 - 1);
    assert!(!toy.start(), "not paid for yet");
    charged(&mut toy, 1);
    while toy.start() || toy.finish_one(0) {}
    toy.check();
    let runs =
        |toy: &Toy| toy.version.l0.len() + toy.version.levels.iter().filter(|run| !run.is_empty()).count();
    assert_eq!(runs(&toy), 1, "{:#?}", toy.version);
    charged(&mut toy, u64::MAX / 2);
    let merges = toy.merges;
    while toy.start() || toy.finish_one(0) {}
    assert_eq!(toy.merges, merges, "where nothing is to be spared reads are never enough");
}

#[test]
fn a_merge_is_divided_at_most_in_the_parts_asked_for() {
    let run: Vec<_> = (0..10u8)
        .map(|n| crate::version::tests::sst(n.into(), &format!("{n}a"), &format!("{n}b"), 10))
        .collect();
    let version = Version::default();
    let l0 = version.apply(&run.into_iter().map(|sst| (0, sst)).collect::<Vec<_>>(), &[]).expect("fits").l0;
    let plan = MergePlan::new(l0, 6);
    assert_eq!(plan.cuts(1), Vec::<&[u8]>::new());
    assert_eq!(plan.cuts(3).len(), 2);
    assert!(plan.cuts(100).len() <= 9);
    assert!(plan.cuts(100).is_sorted());
}
