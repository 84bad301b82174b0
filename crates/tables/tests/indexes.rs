//! Indexes that are built for a table with rows beside those that were there from the start.

#![allow(clippy::unwrap_used, reason = "a test may fail")]
#![allow(clippy::disallowed_methods, reason = "readers meet on real threads")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bucket::{Bucket, Effect, FaultyBucket, MemoryBucket, Operation, Rule};
use common::*;
use engine::{Background, Cursor, Disk, FIRST_ALLOCATED_TREE, Job, ReadAs, Settings, SimDisk, TreeId};
use proptest::prelude::*;
use tables::{Error, Kind, ReadFlag, RowLock, Session, Store, TableImages};

const IMAGES: TableImages<'static> = TableImages { frm: b"new frm", par: b"" };

/// A store whose memtables are so small that few entries are many, the default, and one whose ssts are small too, so that rows are read in stretches.
fn stores() -> &'static [Arc<Store>] {
    static STORES: OnceLock<Vec<Arc<Store>>> = OnceLock::new();
    STORES.get_or_init(|| {
        let store = |(memtable_bytes, sst_bytes)| {
            let mut settings = Settings { memtable_bytes, ..Settings::default() };
            settings.shape.sst_bytes = sst_bytes;
            store_with(settings)
        };
        [(2 << 10, 32 << 20), (64 << 20, 32 << 20), (2 << 10, 1 << 10)].map(store).to_vec()
    })
}

fn columns() -> Vec<Column> {
    vec![
        int(4),
        int(2).null(),
        varchar(20, Text::Caseless).null(),
        char(6, Text::TwoLevels),
        blob(2, Text::CaselessWide).null(),
    ]
}

/// Secondary keys to choose from.
fn keys() -> Vec<Key> {
    vec![
        plain(&[part(1)]),
        unique(&[part(2), part(1)]),
        plain(&[part(2).prefix(3), part(0)]),
        plain(&[part(3).desc(), part(4).prefix(5)]),
        unique(&[part(3), part(0)]),
        unique(&[part(4).prefix(4)]),
    ]
}

fn shape(hidden: bool, chosen: &[usize]) -> Shape {
    let mut all: Vec<Key> = if hidden { vec![] } else { vec![unique(&[part(0)])] };
    all.extend(chosen.iter().map(|key| keys()[*key].clone()));
    Shape { hidden, ..Shape::new(&columns(), &all) }
}

/// For each key of `new`, which of `old` it is.
fn kept(hidden: bool, old: &[usize], new: &[usize]) -> Vec<Option<usize>> {
    let primary = usize::from(!hidden);
    let own = new.iter().map(|key| old.iter().position(|other| other == key).map(|at| at + primary));
    (0..primary).map(Some).chain(own).collect()
}

fn text_value(max: usize) -> BoxedStrategy<V> {
    prop::collection::vec(prop_oneof![Just(b'a'), Just(b'B'), Just(b' ')], 0..max)
        .prop_map(|mut text| {
            text.truncate(text.iter().rposition(|b| *b != b' ').map_or(0, |last| last + 1));
            V::B(text)
        })
        .boxed()
}

fn rows() -> impl Strategy<Value = Vec<Vec<V>>> {
    let row = (
        0..10_000i64,
        prop_oneof![1 => Just(V::Null), 3 => (0..40i64).prop_map(V::I)],
        prop_oneof![1 => Just(V::Null), 5 => text_value(15)],
        text_value(6),
        prop_oneof![2 => Just(V::Null), 1 => text_value(30)],
    );
    let row = row.prop_map(|(a, b, c, d, e)| vec![V::I(a), b, c, d, e]);
    prop::collection::vec(row, 0..120)
}

fn chosen() -> impl Strategy<Value = Vec<usize>> {
    prop::sample::subsequence((0..keys().len()).collect::<Vec<_>>(), 0..=keys().len()).prop_shuffle()
}

fn fresh_path() -> String {
    static TABLES: AtomicU64 = AtomicU64::new(0);
    format!("d/t{}", TABLES.fetch_add(1, Relaxed))
}

fn everything(t: &mut Handler, session: &mut Session) -> Vec<Vec<Vec<V>>> {
    let keys: Vec<_> = std::iter::once(None).chain((0..t.shape.keys.len()).map(Some)).collect();
    keys.into_iter().map(|key| t.scan(session, key)).collect()
}

proptest! {
    // Each case makes tables in a store that holds those of all others.
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn built_indexes_are_those_that_were_there_from_the_start(
        rows in rows(), old in chosen(), new in chosen(), hidden in any::<bool>(), store in 0usize..3,
    ) {
        let store = &stores()[store];
        let (path, model_path) = (fresh_path(), fresh_path());
        let (before, after) = (shape(hidden, &old), shape(hidden, &new));
        let mut t = create(store, &path, &before);
        let mut s = session(store);
        let mut held = Vec::new();
        for row in &rows {
            s.statement_begin();
            if t.insert(&mut s, row).is_ok() { held.push(row.clone()) } else { s.statement_rollback() }
        }
        s.commit().unwrap();
        let mut model = create(store, &model_path, &after);
        s.statement_begin();
        let fits = held.iter().try_for_each(|row| model.insert(&mut s, row));
        if fits.is_ok() { s.commit().unwrap() } else { s.rollback() }

        let plan = t.table.plan_indexes(after.descriptor(), &kept(hidden, &old, &new)).unwrap();
        match (t.cursor.build_indexes(&mut s, plan), fits) {
            (Err(Error::Duplicate { key }), Err(Error::Duplicate { .. })) => {
                let mut record = after.empty();
                t.cursor.duplicate_record(&mut record).unwrap();
                let row = after.row(&record);
                let same = |other: &&Vec<V>| after.compare_parts(key, usize::MAX, other, &row).is_eq();
                prop_assert!(held.iter().filter(same).count() > 1, "{row:?} is one of two");
                // Nothing has changed.
                s.statement_begin();
                prop_assert_eq!(everything(&mut t, &mut s), everything(&mut open(store, &path, &before), &mut s));
            }
            (Ok(built), Ok(())) => {
                store.set_indexes(&t.table, IMAGES, built).unwrap();
                prop_assert_eq!(&store.definition(&path).unwrap().unwrap().frm, b"new frm");
                for store in [Arc::clone(store), Store::open(Arc::clone(store.engine()), Arc::new(Ascii)).unwrap()] {
                    let (mut t, mut model) = (open(&store, &path, &after), open(&store, &model_path, &after));
                    let mut s = session(&store);
                    s.statement_begin();
                    prop_assert_eq!(everything(&mut t, &mut s), everything(&mut model, &mut s));
                    prop_assert_eq!(t.table.row_count(), model.table.row_count());
                    // Its indexes follow what is written from now on.
                    for t in [&mut t, &mut model] {
                        t.cursor.start(None).unwrap();
                        if t.next(&mut s).is_some() {
                            t.cursor.delete(&mut s).unwrap();
                        }
                        let row = [V::I(-1), V::I(77), text("new"), text("n"), V::Null];
                        t.insert(&mut s, &row).unwrap();
                    }
                    prop_assert_eq!(everything(&mut t, &mut s), everything(&mut model, &mut s));
                    s.rollback();
                }
            }
            (built, fits) => panic!("built: {:?}, from the start: {fits:?}", built.map(|_| ())),
        }
    }
}

/// Puts rows into a table until they are in several ssts, so that an index build reads it in stretches. How many there are.
fn stretch(store: &Arc<Store>, t: &mut Handler, mut row: impl FnMut(i64) -> Vec<V>) -> i64 {
    let mut s = session(store);
    let mut rows = 0;
    // Writers wait for flushes, so that some are done when there are enough rows.
    while rows < 5000 || stretches(store) < 3 {
        assert!(rows < 30_000, "nothing was flushed");
        s.statement_begin();
        (rows..rows + 100).for_each(|a| t.insert(&mut s, &row(a)).unwrap());
        s.commit().unwrap();
        rows += 100;
    }
    rows
}

/// Into how many its largest tree would be cut for four readers.
fn stretches(store: &Store) -> usize {
    let of = |tree| store.engine().cuts(TreeId(tree), 4).len() + 1;
    (0..1000).map(of).max().unwrap()
}

fn small_ssts() -> Settings {
    let mut settings = Settings { memtable_bytes: 32 << 10, ..Settings::default() };
    settings.shape.sst_bytes = 4 << 10;
    settings
}

/// A store with such a table.
fn stretched(second: impl Fn(i64) -> i64) -> (Arc<Store>, Handler, i64) {
    let store = store_with(small_ssts());
    let mut t = create(&store, "d/t", &shape(false, &[]));
    let rows = stretch(&store, &mut t, |a| {
        vec![V::I(a), V::I(second(a)), text(&format!("row {}", a * 7919 % 1009)), text("c"), V::Null]
    });
    (store, t, rows)
}

/// Columns of any types after a number, a primary key or none, and secondary keys to be built.
fn any_shape(dice: &mut Dice) -> (Shape, Vec<Key>) {
    let mut columns = vec![int(4)];
    for _ in 0..3 + dice.below(5) {
        let text = *dice.of(&Text::ALL);
        let column = match dice.below(8) {
            0 => int(*dice.of(&[1, 2, 3, 4, 8])),
            1 => uint(*dice.of(&[1, 2, 3, 4, 8])),
            2 => float(),
            3 => double(),
            4 => fixed(5),
            5 => char(6, text),
            6 => varchar(12, text),
            _ => blob(2, text),
        };
        columns.push(if dice.one_in(2) { column.null() } else { column });
    }
    let part_of = |dice: &mut Dice, field: usize| {
        let mut part = part(field);
        if dice.one_in(3) {
            part = part.desc();
        }
        match columns[field].kind {
            Kind::Blob => part.prefix(1 + dice.below(8) as u32),
            Kind::Char | Kind::VarChar if dice.one_in(3) => part.prefix(1 + dice.below(4) as u32),
            _ => part,
        }
    };
    let keys = (0..3 + dice.below(3)).map(|_| {
        let mut fields: Vec<usize> = (1..columns.len()).collect();
        dice.shuffle(&mut fields);
        fields.truncate(1 + dice.index(3));
        let mut parts: Vec<Part> = fields.into_iter().map(|field| part_of(dice, field)).collect();
        match dice.one_in(3) {
            true => {
                parts.insert(dice.index(parts.len() + 1), part(0));
                unique(&parts)
            }
            false => plain(&parts),
        }
    });
    let keys: Vec<Key> = keys.collect();
    let hidden = dice.one_in(3);
    let mut primary = vec![part(0)];
    let first = 1 + dice.index(columns.len() - 1);
    if !columns[first].nullable && columns[first].kind != Kind::Blob && dice.one_in(2) {
        primary.insert(0, part(first));
    }
    let primary = if hidden { vec![] } else { vec![unique(&primary)] };
    (Shape { hidden, ..Shape::new(&columns, &primary) }, keys)
}

/// Keys and values of a tree.
type Entries = Vec<(Vec<u8>, Vec<u8>)>;

/// Of the trees from `from` on that have any, by number.
fn trees(store: &Store, from: u32) -> BTreeMap<u32, Entries> {
    let mut txn = store.engine().begin();
    let mut entries = |tree| {
        let mut cursor = Cursor::new(store.engine());
        cursor.open(&mut txn, TreeId(tree), ReadAs::Newest).unwrap();
        let mut found = cursor.seek_first(&mut txn).unwrap();
        let mut entries = Vec::new();
        while found {
            entries.push((cursor.key().to_vec(), cursor.value().to_vec()));
            found = cursor.next(&mut txn).unwrap();
        }
        entries
    };
    let all = (from..from + 1000).map(|tree| (tree, entries(tree)));
    all.filter(|(_, entries)| !entries.is_empty()).collect()
}

#[test]
fn several_readers_make_the_entries_that_one_makes() {
    for seed in 0..6 {
        let mut dice = Dice::new(seed);
        let (before, keys) = any_shape(&mut dice);
        let (bucket, disk) = (Arc::new(bucket::MemoryBucket::new()), SimDisk::new(1));
        let store = store_on(bucket.clone(), disk.clone(), small_ssts());
        let mut t = create(&store, "d/t", &before);
        let columns = before.columns.clone();
        let any_row = |dice: &mut Dice, id| {
            let rest: Vec<V> = columns[1..].iter().map(|column| dice.value(column, 1000)).collect();
            [vec![V::I(id)], rest].concat()
        };
        // Neighbours come at different times.
        let rows = stretch(&store, &mut t, |n| any_row(&mut dice, n * 7919 % 40_009));
        let mut s = session(&store);
        s.statement_begin();
        t.cursor.set_lock(RowLock::Exclusive);
        t.cursor.start(None).unwrap();
        while let Some(row) = t.next(&mut s) {
            match dice.below(12) {
                0 => t.cursor.delete(&mut s).unwrap(),
                1 => {
                    let V::I(id) = row[0] else { panic!("a number") };
                    let mut new = any_row(&mut dice, id);
                    before.keys.iter().flat_map(|key| &key.parts).for_each(|part| {
                        new[part.field] = row[part.field].clone();
                    });
                    t.update(&mut s, &new).unwrap();
                }
                _ => {}
            }
        }
        t.cursor.stop();
        s.commit().unwrap();

        let after = Shape { keys: [before.keys.clone(), keys].concat(), ..before.clone() };
        let built_by = |store: &Arc<Store>, t: &mut Handler| {
            let kept = (0..after.keys.len()).map(|key| (key < before.keys.len()).then_some(key));
            let known = trees(store, FIRST_ALLOCATED_TREE.0).into_keys().max().unwrap();
            let plan = t.table.plan_indexes(after.descriptor(), &kept.collect::<Vec<_>>()).unwrap();
            let built = t.cursor.build_indexes(&mut session(store), plan).unwrap();
            store.set_indexes(&t.table, IMAGES, built).unwrap();
            trees(store, known + 1).into_values().collect::<Vec<_>>()
        };
        // That more than one reads them then is seen below, where one fails.
        assert!(stretches(&store) > 1, "seed {seed}");
        let by_several = built_by(&store, &mut t);
        drop((t, s));
        stop(store);

        let store =
            store_on(bucket, disk, Settings { background: Background::Manual, ..Settings::default() });
        let mut t = open(&store, "d/t", &after);
        assert_eq!(stretches(&store), 1);
        let by_one = built_by(&store, &mut t);
        assert_eq!(by_one.len(), after.keys.len() - before.keys.len());
        let counts = |trees: &[Entries]| trees.iter().map(Vec::len).collect::<Vec<_>>();
        assert!(by_one.iter().all(|entries| (entries.len() as i64) > rows / 2), "seed {seed}");
        assert_eq!(counts(&by_several), counts(&by_one), "seed {seed}: {after:?}");
        assert!(by_several == by_one, "seed {seed}: {after:?}");
    }
}

/// Names of ssts that were asked for.
fn ssts_asked_for(bucket: &FaultyBucket) -> BTreeSet<String> {
    let log = bucket.faults().log().into_iter().filter(|request| request.operation == Operation::Get);
    log.map(|request| request.name.to_string()).filter(|name| name.contains("/sst/")).collect()
}

/// Threads that read rows for the caller of `build_indexes`.
fn other_readers() -> usize {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let names = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    names.filter(|name| name.trim_end() == "cistern-index").count()
}

/// The caller would have read all of its own rows before it asked how the others are.
#[test]
fn a_reader_that_fails_ends_all_of_them_at_once_and_leaves_nothing() {
    const ROWS: i64 = 96_000;
    let memory = Arc::new(MemoryBucket::new());
    let cold = |background| {
        let heat: Vec<_> =
            memory.contents().into_keys().filter(|name| name.as_str().contains("/heat/")).collect();
        memory.delete(&heat).unwrap();
        let bucket = Arc::new(FaultyBucket::new(memory.clone(), 1, vec![]));
        let mut settings = Settings { background, ..Settings::default() };
        settings.shape.sst_bytes = 32 << 10;
        let disk = SimDisk::new(1);
        (store_on(bucket.clone(), disk.clone(), settings), bucket, disk)
    };
    let pairs = |keys: &[Key]| Shape::new(&[int(4), int(4)], &[&[unique(&[part(0)])], keys].concat());
    let row = |a: i64| vec![V::I(a), V::I(a * 7919 % ROWS)];
    let (store, ..) = cold(Background::Manual);
    let mut t = create(&store, "d/t", &pairs(&[]));
    let mut s = session(&store);
    for chunk in 0..12 {
        s.statement_begin();
        (chunk * ROWS / 12..(chunk + 1) * ROWS / 12).for_each(|a| t.insert(&mut s, &row(a)).unwrap());
        s.commit().unwrap();
        for job in [Job::Freeze, Job::Flush, Job::Publish, Job::Compact, Job::Publish] {
            while store.engine().step(job).unwrap() {}
        }
    }
    assert_eq!(store.engine().status().get("l0_runs"), Some(0), "each sst has rows of one stretch");
    drop((t, s));
    stop(store);

    let asked_by_reading = |from: i64, to: i64| {
        let (store, bucket, _) = cold(Background::Manual);
        let mut t = open(&store, "d/t", &pairs(&[]));
        let mut s = session(&store);
        s.statement_begin();
        assert!(t.read(&mut s, 0, &[V::I(from)], ReadFlag::Exact).is_some());
        (from + 1..to).for_each(|a| assert_eq!(t.next(&mut s), Some(row(a))));
        let asked = ssts_asked_for(&bucket);
        drop((t, s));
        stop(store);
        asked
    };
    let early = asked_by_reading(0, ROWS * 6 / 10);
    let late: Vec<String> = asked_by_reading(ROWS * 9 / 10, ROWS).difference(&early).cloned().collect();
    assert!(!late.is_empty());

    let (store, bucket, disk) = cold(Background::Threads);
    let mut t = open(&store, "d/t", &pairs(&[]));
    let fails = |name: &String| Rule::new(name, Effect::Status { code: 500, burst: 0 }).on(Operation::Get);
    bucket.faults().set_rules(late.iter().map(fails).collect());
    let looks = Arc::new(AtomicU64::new(0));
    let (counted, faults) = (Arc::clone(&looks), Arc::clone(&bucket));
    // There are no more readers than processors.
    let alone = std::thread::available_parallelism().map_or(1, |processors| processors.get()) == 1;
    // Goes on when another reader has failed, and all others have ended.
    let has_met = move || faults.faults().log().iter().any(|request| request.decision.fault.is_some());
    let mut s = store.session(Box::new(move || {
        counted.fetch_add(1, Relaxed);
        let waits = (0..30_000).take_while(|_| !(alone || has_met() && other_readers() == 0));
        waits.for_each(|_| std::thread::sleep(Duration::from_millis(1)));
        false
    }));
    let held = || {
        let status = store.engine().status();
        let counts = ["transactions_open", "locks_held", "ssts"].map(|name| status.get(name).unwrap());
        (counts, disk.list("sort").unwrap_or_default())
    };
    let ssts = || -> BTreeSet<String> {
        let names = memory.contents().into_keys().map(|name| name.to_string());
        names.filter(|name| name.contains("/sst/")).collect()
    };
    let (before, known) = (held(), ssts());
    let after = pairs(&[plain(&[part(1)])]);
    let plan = || t.table.plan_indexes(after.descriptor(), &[Some(0), None]).unwrap();
    let (first, second) = (plan(), plan());
    let refused = t.cursor.build_indexes(&mut s, first).map(drop).expect_err("rows can not be read");
    assert!(
        matches!(&refused, Error::Engine(error) if error.kind() == engine::Kind::Unavailable),
        "{refused}"
    );
    let looked = looks.load(Relaxed);
    assert!(looked == 1 || alone, "the caller looked {looked} times, and would have six times");
    assert_eq!(held(), before);
    assert!(ssts().is_subset(&known), "{:?} are new", ssts().difference(&known));

    bucket.faults().set_rules(vec![]);
    let built = t.cursor.build_indexes(&mut session(&store), second).unwrap();
    store.set_indexes(&t.table, IMAGES, built).unwrap();
    let mut t = open(&store, "d/t", &after);
    let mut rows: Vec<Vec<V>> = (0..ROWS).map(row).collect();
    rows.sort_by(|a, b| after.compare_parts(1, 1, a, b));
    assert!(t.scan(&mut session(&store), Some(1)) == rows);
}

#[test]
fn an_index_is_the_same_whoever_reads_the_rows_and_a_twin_is_found_wherever_it_is() {
    let after = shape(false, &[0, 2, 4]);
    let (store, mut t, rows) = stretched(|a| a % 1000);
    let mut s = session(&store);
    let plan = t.table.plan_indexes(after.descriptor(), &kept(false, &[], &[0, 2, 4])).unwrap();
    let built = t.cursor.build_indexes(&mut s, plan).unwrap();
    store.set_indexes(&t.table, IMAGES, built).unwrap();
    let mut t = open(&store, "d/t", &after);
    let all = everything(&mut t, &mut s);
    let compare = |key: usize| {
        let after = &after;
        move |a: &Vec<V>, b: &Vec<V>| {
            after.compare_parts(key, usize::MAX, a, b).then_with(|| after.compare_parts(0, 1, a, b))
        }
    };
    for (key, found) in all[1..].iter().enumerate() {
        let mut expected = all[0].clone();
        expected.sort_by(compare(key));
        assert_eq!(found.len() as i64, rows);
        assert!(*found == expected, "key {key}");
    }

    // Rows far from each other agree in what the new index wants to be unique.
    let (store, mut t, _) = stretched(|a| a % 4999);
    let mut s = session(&store);
    let descriptor = Shape::new(&columns(), &[unique(&[part(0)]), unique(&[part(1)])]);
    let plan = t.table.plan_indexes(descriptor.descriptor(), &[Some(0), None]).unwrap();
    let Err(Error::Duplicate { key: 1 }) = t.cursor.build_indexes(&mut s, plan) else {
        panic!("two rows have the same");
    };
    let mut record = descriptor.empty();
    t.cursor.duplicate_record(&mut record).unwrap();
    let twin = descriptor.row(&record);
    assert!(matches!((&twin[0], &twin[1]), (V::I(a), V::I(second)) if a % 4999 == *second), "{twin:?}");
}

#[test]
fn an_interrupted_build_ends_all_its_readers_and_can_be_tried_again() {
    let (store, mut t, _) = stretched(|a| a / 2);
    let after = shape(false, &[0]);
    let plan = || t.table.plan_indexes(after.descriptor(), &[Some(0), None]).unwrap();
    let (first, second) = (plan(), plan());
    let mut s = store.session(Box::new(|| true));
    let refused = t.cursor.build_indexes(&mut s, first).map(drop).expect_err("it was interrupted");
    assert!(
        matches!(&refused, Error::Engine(error) if error.kind() == engine::Kind::Interrupted),
        "{refused}"
    );
    let mut s = session(&store);
    let built = t.cursor.build_indexes(&mut s, second).unwrap();
    store.set_indexes(&t.table, IMAGES, built).unwrap();
    let mut t = open(&store, "d/t", &after);
    assert_eq!(t.scan(&mut s, Some(1)), t.scan(&mut s, None));
}

#[test]
fn what_changes_rows_or_primary_key_is_not_done_in_place() {
    let store = &stores()[1];
    let t = create(store, &fresh_path(), &shape(false, &[0]));
    let possible =
        |shape: &Shape, kept: &[Option<usize>]| t.table.plan_indexes(shape.descriptor(), kept).is_some();
    assert!(possible(&shape(false, &[0, 2]), &[Some(0), Some(1), None]));
    assert!(possible(&shape(false, &[]), &[Some(0)]));
    assert!(!possible(&shape(false, &[2]), &[Some(0), Some(1)]), "another index than it is said to be");
    assert!(!possible(&shape(false, &[2]), &[Some(0), Some(7)]), "there is no such index");
    assert!(!possible(&shape(false, &[0]), &[None, Some(1)]), "a new primary key");
    assert!(!possible(&shape(true, &[0]), &[Some(1)]), "no primary key");
    assert!(!possible(&shape(false, &[0]), &[Some(0)]));
    let mut wider = shape(false, &[0]);
    wider.columns[1] = int(4).null();
    assert!(!possible(&wider, &[Some(0), Some(1)]));
}

/// Its entries are younger than what the snapshot sees, so by the index the rows would seem to be gone.
#[test]
fn an_older_snapshot_is_not_answered_from_a_younger_index() {
    let store = &stores()[1];
    let path = fresh_path();
    let (before, after) = (shape(false, &[]), shape(false, &[0]));
    let mut t = create(store, &path, &before);
    let (mut s, mut old) = (session(store), session(store));
    let row = vec![V::I(1), V::I(2), V::Null, text("c"), V::Null];
    s.statement_begin();
    t.insert(&mut s, &row).unwrap();
    s.commit().unwrap();
    old.snapshot_now();
    let plan = t.table.plan_indexes(after.descriptor(), &[Some(0), None]).unwrap();
    let built = t.cursor.build_indexes(&mut s, plan).unwrap();
    store.set_indexes(&t.table, IMAGES, built).unwrap();
    let mut t = open(store, &path, &after);
    assert_eq!(t.scan(&mut old, Some(0)), std::slice::from_ref(&row));
    t.cursor.start(Some(1)).unwrap();
    let refused = t.cursor.first(&mut old, &mut t.image).expect_err("the index is younger");
    assert!(matches!(refused, Error::DefinitionChanged { .. }), "{refused}");
    old.rollback();
    assert_eq!(t.scan(&mut old, Some(1)), [row]);
}
