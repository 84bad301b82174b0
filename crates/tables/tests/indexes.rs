//! Indexes that are built for a table with rows beside those that were there from the start.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use common::*;
use engine::{Settings, TreeId};
use proptest::prelude::*;
use tables::{Error, Session, Store, TableImages};

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

/// A store whose one table has its rows in several ssts, so that an index build reads it in stretches; and how many rows there are.
fn stretched(second: impl Fn(i64) -> i64) -> (Arc<Store>, Handler, i64) {
    let mut settings = Settings { memtable_bytes: 32 << 10, ..Settings::default() };
    settings.shape.sst_bytes = 4 << 10;
    let store = store_with(settings);
    let mut t = create(&store, "d/t", &shape(false, &[]));
    let mut s = session(&store);
    let stretches = |tree| store.engine().cuts(TreeId(tree), 4).len() + 1;
    let mut rows = 0;
    // Writers wait for flushes, so that some are done when there are enough rows.
    while rows < 5000 || (0..1000).map(stretches).max() < Some(3) {
        assert!(rows < 30_000, "nothing was flushed");
        s.statement_begin();
        for a in rows..rows + 100 {
            let row =
                [V::I(a), V::I(second(a)), text(&format!("row {}", a * 7919 % 1009)), text("c"), V::Null];
            t.insert(&mut s, &row).unwrap();
        }
        s.commit().unwrap();
        rows += 100;
    }
    drop(s);
    (store, t, rows)
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
