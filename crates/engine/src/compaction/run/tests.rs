//! Flushes and merges on a disk that can be full; last, merges of whatever there may be, against a model.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use bucket::{MemoryBucket, Names};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::*;
use crate::store::StoreParts;
use crate::version::tests::id;
use crate::{BranchId, OpKind, SimDisk, full_key};

/// Key, seqno, kind and value.
type Entry = (Vec<u8>, u64, OpKind, Vec<u8>);

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
        self.entries(run).into_iter().map(|(key, seqno, ..)| (key, seqno)).collect()
    }

    fn entries(&self, run: &[Arc<SstMeta>]) -> Vec<Entry> {
        let mut iter = LevelIter::new(Arc::clone(&self.store), run.into(), Purpose::Query);
        iter.seek(&[], Seqno(u64::MAX)).expect("readable");
        let mut all = Vec::new();
        while iter.valid() {
            all.push((iter.key().to_vec(), iter.seqno().0, iter.kind(), iter.value().to_vec()));
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
        let merged =
            bench.with(&[3], &[2], |context| merge(&plan, &version, parts, context).expect("merge").outputs);
        let rows = bench.read(&merged);
        assert_eq!(rows.len(), 750, "deletions leave with what they hide, dropped trees leave");
        assert_eq!(rows[0], (full_key(TreeId(1), &250u32.to_be_bytes()), 2));
        let in_level: Vec<_> = merged.iter().map(|sst| (6, Arc::clone(sst))).collect();
        Version::default().apply(&in_level, &[]).expect("fits a level");
        let held = bench
            .with(&[2, 3], &[2], |context| merge(&plan, &version, parts, context).expect("merge").outputs);
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
        let merged = bench.with(&[9], &[], |context| merge(&plan, &version, parts, context)).expect("merge");
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
        let error =
            bench.with(&[1], &[], |context| merge(&plan, &version, parts, context)).expect_err("disk full");
        assert_eq!((error.kind(), bench.disk.used()), (Kind::Full, used));
        bench.disk.limit(u64::MAX);
    }
}

/// Many keys in a row, every `step`-th of them, written one after the other.
#[derive(Clone, Debug)]
struct Stretch {
    tree: u32,
    from: u16,
    count: u16,
    step: u16,
    /// One in this many is a deletion; 0: none.
    deletions: u16,
}

/// What was written between two flushes, and became one run.
#[derive(Clone, Debug)]
struct Layer {
    stretches: Vec<Stretch>,
    /// One commit brought all of it, as a load.
    loaded: bool,
    /// Entries after which an sst ends.
    cut_every: usize,
    /// One in this many of the newest versions beneath is in this run too, as when a crash had the wal replayed; 0: none.
    repeats: usize,
}

/// A run of a level, the target's runs of L0 over it, and what lies beneath, oldest first; who reads; what is merged.
#[derive(Clone, Debug)]
struct Case {
    layers: Vec<Layer>,
    snapshots: Vec<prop::sample::Index>,
    /// How many of the newest versions are not visible yet.
    invisible: u64,
    dropped: BTreeSet<u32>,
    what: What,
}

#[derive(Clone, Copy, Debug)]
enum What {
    /// L0 into L5, with the ssts of L5 that its ssts meet.
    L0,
    /// L0 into L5, with all of L5 between its first key and its last.
    WideL0,
    /// An sst of L5 into L6.
    Sink(prop::sample::Index),
    /// All of L5 where it is.
    Rewrite,
}

fn case() -> impl Strategy<Value = Case> {
    let count = prop_oneof![3 => 1u16..4, 2 => 20u16..120];
    let stretch = (1u32..4, 0u16..600, count, 1u16..4, prop_oneof![2 => Just(0), 1 => Just(1), 1 => 2u16..5])
        .prop_map(|(tree, from, count, step, deletions)| Stretch { tree, from, count, step, deletions });
    let layer = (
        prop::collection::vec(stretch, 1..8),
        prop::bool::weighted(0.2),
        5usize..60,
        prop_oneof![4 => Just(0usize), 1 => 1usize..9],
    )
        .prop_map(|(stretches, loaded, cut_every, repeats)| Layer {
            stretches,
            loaded,
            cut_every,
            repeats,
        });
    let what = prop_oneof![
        3 => Just(What::L0),
        3 => Just(What::WideL0),
        2 => any::<prop::sample::Index>().prop_map(What::Sink),
        1 => Just(What::Rewrite),
    ];
    (
        prop::collection::vec(layer, 3..6),
        prop::collection::vec(any::<prop::sample::Index>(), 0..5),
        prop_oneof![3 => Just(0u64), 1 => 0u64..300],
        prop::collection::btree_set(1u32..4, 0..2),
        what,
    )
        .prop_map(|(layers, snapshots, invisible, dropped, what)| Case {
            layers,
            snapshots,
            invisible,
            dropped,
            what,
        })
}

/// The place of each layer: beneath the target, the target, L0 from its oldest run on.
const PLACES: [u8; 5] = [6, 5, 0, 0, 0];

impl Bench {
    /// `entries`, in order, as a run of `level`.
    fn write(&self, level: u8, entries: &[Entry], layer: &Layer) -> Vec<(u8, Arc<SstMeta>)> {
        let mut ssts: Vec<&[Entry]> = Vec::new();
        let mut from = 0;
        for at in 1..=entries.len() {
            let ends = entries.get(at).is_none_or(|(key, ..)| {
                let before = &entries[at - 1].0;
                key != before
                    && (at - from >= layer.cut_every || (level > 0 && tree_of(key) != tree_of(before)))
            });
            if ends {
                ssts.push(&entries[from..at]);
                from = at;
            }
        }
        let sst = |entries: &&[Entry]| {
            let name = id(self.names.fetch_add(1, Ordering::Relaxed) + 1);
            let mut builder = SstBuilder::new(name, SstOptions::default());
            for (key, seqno, kind, value) in *entries {
                builder.add(key, Seqno(if layer.loaded { 0 } else { *seqno }), *kind, value);
            }
            let (meta, bytes) = builder.finish();
            let meta = if layer.loaded { meta.committed_at(Seqno(entries[0].1)) } else { meta };
            let meta = Arc::new(meta);
            self.store.write_local(&meta, &bytes).expect("there is room");
            (level, meta)
        };
        ssts.iter().map(sst).collect()
    }

    /// What everybody reads in `version`, a place before the ones beneath it: by key, from the newest version found on.
    fn contents(&self, version: &Version) -> BTreeMap<Vec<u8>, Vec<Entry>> {
        let mut contents: BTreeMap<Vec<u8>, Vec<Entry>> = BTreeMap::new();
        for run in version.l0.iter().chain(&version.levels) {
            for entry in self.entries(run) {
                contents.entry(entry.0.clone()).or_default().push(entry);
            }
        }
        contents
    }
}

/// The entries of each layer, in order. A later one is newer in all that it has.
fn written(layers: &[Layer]) -> Vec<Vec<Entry>> {
    let mut seqno = 0;
    let mut before: Vec<Entry> = Vec::new();
    let mut all = Vec::new();
    for layer in layers {
        let mut entries: Vec<Entry> = Vec::new();
        seqno += 1;
        for stretch in &layer.stretches {
            for n in 0..stretch.count {
                let number = stretch.from + n * stretch.step;
                let tail = vec![b'x'; usize::from(number % 7) * 5];
                let key = full_key(TreeId(stretch.tree), &[&number.to_be_bytes()[..], &tail].concat());
                let deletes = !layer.loaded && stretch.deletions > 0 && n % stretch.deletions == 0;
                seqno += u64::from(!layer.loaded);
                let put = || (0..seqno % 90).map(|at| (at * seqno + u64::from(number)) as u8).collect();
                let change = if deletes { (OpKind::Delete, Vec::new()) } else { (OpKind::Put, put()) };
                entries.push((key, seqno, change.0, change.1));
            }
        }
        if layer.repeats > 0 && !layer.loaded {
            let newest = before.chunk_by(|a, b| a.0 == b.0).map(|versions| &versions[0]);
            entries.extend(newest.step_by(layer.repeats).cloned());
        }
        entries.sort_by(|a, b| (&a.0, b.1).cmp(&(&b.0, a.1)));
        // A load has each key once.
        entries.dedup_by(|a, b| (&a.0, a.1) == (&b.0, b.1));
        before.clone_from(&entries);
        all.push(entries);
    }
    all
}

/// What a merge of `inputs` must come to, version by version, told without looking at how it is done.
fn expected(
    inputs: &[Entry],
    snapshots: &[u64],
    dropped: &BTreeSet<u32>,
    deeper: impl Fn(&[u8]) -> bool,
) -> Vec<Entry> {
    let mut by_key: BTreeMap<&[u8], BTreeMap<u64, &Entry>> = BTreeMap::new();
    for entry in inputs.iter().filter(|entry| !dropped.contains(&tree_of(&entry.0).0)) {
        by_key.entry(&entry.0).or_default().insert(entry.1, entry);
    }
    let mut kept = Vec::new();
    for (key, versions) in by_key {
        let mut needed: BTreeSet<u64> =
            snapshots.iter().filter_map(|at| versions.range(..=at).next_back()).map(|(s, _)| *s).collect();
        let newest_snapshot = snapshots[snapshots.len() - 1];
        needed.extend(versions.range(newest_snapshot + 1..).map(|(seqno, _)| *seqno));
        let hides_nothing =
            |entry: &&Entry| entry.2 == OpKind::Delete && entry.1 <= snapshots[0] && !deeper(key);
        kept.extend(needed.iter().rev().map(|seqno| versions[seqno]).filter(|e| !hides_nothing(e)).cloned());
    }
    kept
}

/// What a reader at `at` finds in each key: the first version that it may see.
fn visible<'a>(
    contents: &'a BTreeMap<Vec<u8>, Vec<Entry>>,
    at: u64,
    dropped: &BTreeSet<u32>,
) -> Vec<&'a Entry> {
    let kept = contents.iter().filter(|(key, _)| !dropped.contains(&tree_of(key).0));
    let found = kept.filter_map(|(_, versions)| versions.iter().find(|(_, seqno, ..)| *seqno <= at));
    found.filter(|(_, _, kind, _)| *kind == OpKind::Put).collect()
}

/// How often the things happened that the test is about.
#[derive(Default)]
struct Seen {
    divided: Cell<usize>,
    divided_narrow: Cell<usize>,
    stayed: Cell<usize>,
    repeated: Cell<usize>,
    dropped: Cell<usize>,
    deletions_left: Cell<usize>,
}

fn add(counter: &Cell<usize>, more: usize) {
    counter.set(counter.get() + more);
}

fn check(case: &Case, seen: &Seen) {
    let bench = Bench { shape: Shape { sst_bytes: 2 << 10, ..Shape::default() }, ..Bench::new() };
    let layers = written(&case.layers);
    let mut version = Version::default();
    for ((entries, layer), level) in layers.iter().zip(&case.layers).zip(PLACES) {
        version = version.apply(&bench.write(level, entries, layer), &[]).expect("a run");
    }
    let last = layers.iter().flatten().map(|(_, seqno, ..)| *seqno).max().expect("each layer has an entry");
    let newest = last.saturating_sub(case.invisible);
    let snapshots: BTreeSet<u64> =
        case.snapshots.iter().map(|at| at.index(newest as usize + 1) as u64).chain([newest]).collect();
    let snapshots: Vec<u64> = snapshots.into_iter().collect();
    let dropped: Vec<u32> = case.dropped.iter().copied().collect();

    let l0 = || version.l0.iter().flat_map(|run| run.iter());
    let (sources, to): (Vec<_>, _) = match case.what {
        What::L0 => {
            let met = |sst: &&Arc<SstMeta>| l0().any(|over| over.overlaps(&sst.first_key, &sst.last_key));
            (
                version
                    .l0
                    .iter()
                    .cloned()
                    .chain([version.levels[4].iter().filter(met).cloned().collect()])
                    .collect(),
                5,
            )
        }
        What::WideL0 => {
            let first = l0().map(|sst| &sst.first_key).min().expect("L0 has runs");
            let last = l0().map(|sst| &sst.last_key).max().expect("L0 has runs");
            (version.l0.iter().cloned().chain([version.overlapping(5, first, last).into()]).collect(), 5)
        }
        What::Sink(which) => {
            let sst = &version.levels[4][which.index(version.levels[4].len())];
            let beneath = version.overlapping(6, &sst.first_key, &sst.last_key);
            (vec![[Arc::clone(sst)].into(), beneath.into()], 6)
        }
        What::Rewrite => (vec![version.levels[4].clone()], 5),
    };
    let plan = MergePlan::new(sources, to);
    let deeper = |key: &[u8]| version.ssts().any(|(level, sst)| level > to && sst.overlaps(key, key));
    let expected_of = |inputs: &mut dyn Iterator<Item = &Arc<SstMeta>>| {
        let inputs: Vec<Entry> = inputs.flat_map(|sst| bench.entries(std::slice::from_ref(sst))).collect();
        expected(&inputs, &snapshots, &case.dropped, deeper)
    };
    // Whatever the outputs: they fit where they go, and everybody reads what they read before.
    let before = bench.contents(&version);
    let reads_the_same = |inputs: &mut dyn Iterator<Item = &Arc<SstMeta>>, outputs: &[Arc<SstMeta>]| {
        let removed: Vec<SstId> = inputs.map(|sst| sst.id).collect();
        let added: Vec<_> = outputs.iter().map(|sst| (to as u8, Arc::clone(sst))).collect();
        let after =
            bench.contents(&version.apply(&added, &removed).expect("outputs overlap nothing that stays"));
        for at in snapshots.iter().copied().chain([newest + (last - newest) / 2, last]) {
            assert_eq!(visible(&after, at, &case.dropped), visible(&before, at, &case.dropped), "at {at}");
        }
        after
    };

    let whole = expected_of(&mut plan.inputs());
    let mut narrow = None;
    for parts in 1..=4 {
        let outputs = bench.with(&snapshots, &dropped, |context| outputs(&plan, &version, parts, context));
        let outputs = outputs.expect("merges");
        assert_eq!(bench.entries(&outputs), whole, "{parts} parts of the whole plan");
        reads_the_same(&mut plan.inputs(), &outputs);
        add(&seen.divided, plan.cuts(parts).len());

        let merged = bench.with(&snapshots, &dropped, |context| merge(&plan, &version, parts, context));
        let Merged { inputs, outputs } = merged.expect("merges");
        let (names, wanted) = narrow.get_or_insert_with(|| (inputs.clone(), expected_of(&mut inputs.iter())));
        assert_eq!(&inputs, names, "what stays is no question of the parts");
        assert_eq!(&bench.entries(&outputs), wanted, "{parts} parts of what is to be merged");
        reads_the_same(&mut inputs.iter(), &outputs);
        let alone: Vec<_> = inputs.iter().map(|sst| [Arc::clone(sst)].into()).collect();
        add(&seen.divided_narrow, MergePlan::new(alone, to).cuts(parts).len());
        add(&seen.stayed, plan.inputs().count() - inputs.len());
    }
    let versions: Vec<_> = layers.iter().flatten().map(|(key, seqno, ..)| (key, *seqno)).collect();
    add(&seen.repeated, versions.len() - versions.iter().collect::<BTreeSet<_>>().len());
    add(&seen.dropped, plan.inputs().filter(|sst| case.dropped.contains(&sst.first_tree().0)).count());
    add(&seen.deletions_left, whole.iter().filter(|(_, _, kind, _)| *kind == OpKind::Delete).count());
}

#[test]
fn a_merge_is_what_a_model_says_however_it_is_divided_and_whatever_it_leaves_alone() {
    let seen = Seen::default();
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 100,
        source_file: Some(file!()),
        ..ProptestConfig::default()
    });
    let ran = runner.run(&case(), |case| {
        check(&case, &seen);
        Ok(())
    });
    ran.unwrap_or_else(|failure| panic!("{failure}"));
    for (what, count) in [
        ("cuts", &seen.divided),
        ("cuts of narrowed plans", &seen.divided_narrow),
        ("inputs that stayed", &seen.stayed),
        ("versions that came twice", &seen.repeated),
        ("ssts of dropped trees", &seen.dropped),
        ("deletions that hide something", &seen.deletions_left),
    ] {
        assert!(count.get() > 100, "{} {what} in all", count.get());
    }
}
