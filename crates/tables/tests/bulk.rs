//! Rows that are written together beside rows that are written one by one.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use common::*;
use engine::Settings;
use proptest::prelude::*;
use tables::{BulkFacts, Error, Kind, ReadFlag, Session, Store};

/// Stores whose memtables are so small that few rows are many, and the default.
fn stores() -> &'static [Arc<Store>] {
    static STORES: OnceLock<Vec<Arc<Store>>> = OnceLock::new();
    STORES.get_or_init(|| {
        let settings = [1 << 10, 8 << 10, 64 << 20];
        let store = |memtable_bytes| store_with(Settings { memtable_bytes, ..Settings::default() });
        settings.map(store).to_vec()
    })
}

const LOAD_DATA: BulkFacts = BulkFacts {
    rows: 0,
    copies: false,
    gathers: true,
    autocommit: true,
    refuses_duplicates: true,
    looks_back: false,
};

fn fresh_path() -> String {
    static TABLES: AtomicU64 = AtomicU64::new(0);
    format!("d/t{}", TABLES.fetch_add(1, Relaxed))
}

fn shapes() -> Vec<Shape> {
    let mut numbered = Shape::new(&[int(4), int(4).null()], &[unique(&[part(0)]), plain(&[part(1)])]);
    numbered.auto_increment = Some(0);
    vec![
        numbered,
        Shape::hidden(&[int(2).null(), varchar(20, Text::Caseless).null()], &[plain(&[part(1), part(0)])]),
        Shape::hidden(&[int(2).null()], &[]),
        Shape::new(
            &[varchar(20, Text::TwoLevels), int(2), blob(2, Text::Caseless).null()],
            &[
                unique(&[part(0), part(1).desc()]),
                unique(&[part(2).prefix(3), part(1)]),
                plain(&[part(2).prefix(2)]),
            ],
        ),
        Shape::new(
            &[uint(8), char(8, Text::CaselessWide).null(), double().null()],
            &[unique(&[part(0)]), unique(&[part(1)]), plain(&[part(2).desc(), part(1)])],
        ),
    ]
}

fn value(column: Column, spread: u16) -> BoxedStrategy<V> {
    let text = |bytes: usize| {
        prop::collection::vec(prop_oneof![Just(b'a'), Just(b'A'), Just(b' '), b'a'..=b'z'], 0..bytes)
    };
    let value = match column.kind {
        Kind::Int => (0..spread).prop_map(|n| V::I(i64::from(n as i16))).boxed(),
        Kind::UInt => (0..spread).prop_map(|n| V::U(u64::from(n))).boxed(),
        Kind::Double => (0..spread).prop_map(|n| V::D(f64::from(n) - 100.0)).boxed(),
        Kind::Char => text(8)
            .prop_map(|mut text| {
                text.truncate(text.iter().rposition(|b| *b != b' ').map_or(0, |last| last + 1));
                V::B(text)
            })
            .boxed(),
        Kind::Blob => text(60).prop_map(V::B).boxed(),
        _ => text(20).prop_map(V::B).boxed(),
    };
    if column.nullable { prop_oneof![1 => Just(V::Null), 4 => value].boxed() } else { value }
}

fn rows(shape: &Shape, spread: u16) -> BoxedStrategy<Vec<Vec<V>>> {
    let row: Vec<_> = shape.columns.iter().map(|column| value(*column, spread)).collect();
    prop::collection::vec(row, 0..200).boxed()
}

fn cases() -> impl Strategy<Value = (Shape, Vec<Vec<V>>, bool)> {
    let spread = prop_oneof![Just(60u16), Just(30_000)];
    (prop::sample::select(shapes()), spread, any::<bool>())
        .prop_flat_map(|(shape, spread, sorted)| (Just(shape.clone()), rows(&shape, spread), Just(sorted)))
}

/// Inserts all, with the first refusal.
fn insert(t: &mut Handler, session: &mut Session, rows: &[Vec<V>]) -> tables::Result<()> {
    rows.iter().try_for_each(|row| t.insert(session, row))
}

fn everything(t: &mut Handler, session: &mut Session) -> Vec<Vec<Vec<V>>> {
    let keys: Vec<_> = std::iter::once(None).chain((0..t.shape.keys.len()).map(Some)).collect();
    keys.into_iter().map(|key| t.scan(session, key)).collect()
}

proptest! {
    #[test]
    fn rows_written_together_are_those_written_one_by_one((shape, mut rows, sorted) in cases(), store in 0usize..3) {
        let store = &stores()[store];
        if sorted && !shape.hidden {
            rows.sort_by(|a, b| shape.compare_parts(0, usize::MAX, a, b));
        }
        let (slow_path, path) = (fresh_path(), fresh_path());
        let (mut slow, mut quick) = (create(store, &slow_path, &shape), create(store, &path, &shape));
        let (mut s, mut other) = (session(store), session(store));
        s.statement_begin();
        let expected = insert(&mut slow, &mut s, &rows);
        if expected.is_ok() { s.commit().unwrap() } else { s.rollback() }

        s.statement_begin();
        prop_assert!(quick.cursor.begin_bulk(&mut s, &LOAD_DATA).unwrap());
        let inserted = insert(&mut quick, &mut s, &rows);
        let at_once = inserted.is_err();
        let got = inserted.and_then(|()| quick.cursor.end_bulk(&mut s));
        other.statement_begin();
        prop_assert_eq!(open(store, &path, &shape).scan(&mut other, None), Vec::<Vec<V>>::new());
        other.rollback();
        match (&expected, &got) {
            (Ok(()), Ok(())) => s.commit().unwrap(),
            (Err(Error::Duplicate { .. }), Err(Error::Duplicate { key })) => {
                if !at_once {
                    let mut record = shape.empty();
                    quick.cursor.duplicate_record(&mut record).unwrap();
                    let row = shape.row(&record);
                    let same = |other: &&Vec<V>| shape.compare_parts(*key, usize::MAX, other, &row).is_eq();
                    prop_assert!(rows.contains(&row), "{row:?} is one of the rows");
                    prop_assert!(rows.iter().filter(same).count() > 1, "key {key} of {row:?} comes twice");
                }
                quick.cursor.abort_bulk();
                s.rollback();
            }
            other => panic!("one by one and together: {other:?}"),
        }
        let more = &rows[..rows.len().min(3)];
        for round in 0..2 {
            s.statement_begin();
            prop_assert_eq!(everything(&mut quick, &mut s), everything(&mut slow, &mut s), "round {}", round);
            s.rollback();
            if expected.is_ok() {
                prop_assert_eq!(quick.table.row_count(), slow.table.row_count());
                prop_assert_eq!(quick.table.next_auto_increment(), slow.table.next_auto_increment());
            }
            // What was loaded is a table like any other.
            for t in [&mut slow, &mut quick] {
                s.statement_begin();
                match insert(t, &mut s, more) { Ok(()) => s.commit().unwrap(), Err(_) => s.rollback() }
                s.statement_begin();
                if t.cursor.start(None).is_ok() && t.next(&mut s).is_some() {
                    t.cursor.delete(&mut s).unwrap();
                }
                s.commit().unwrap();
            }
        }
        // A restart: what the catalogue says, and nothing that is only in memory.
        let again = Store::open(Arc::clone(store.engine()), Arc::new(Ascii)).unwrap();
        let mut s = session(&again);
        s.statement_begin();
        let (mut slow, mut quick) = (open(&again, &slow_path, &shape), open(&again, &path, &shape));
        prop_assert_eq!(everything(&mut quick, &mut s), everything(&mut slow, &mut s));
    }
}

fn small_store() -> Arc<Store> {
    store_with(Settings { memtable_bytes: 4 << 10, ..Settings::default() })
}

fn pairs() -> Shape {
    Shape::new(&[int(4), int(4)], &[unique(&[part(0)]), plain(&[part(1)])])
}

fn pair(n: i64) -> Vec<V> {
    vec![V::I(n), V::I(-n)]
}

#[test]
fn whoever_writes_to_the_table_keeps_a_load_away_and_a_load_keeps_him_away() {
    let store = small_store();
    let mut t = create(&store, "d/t", &pairs());
    let mut other = open(&store, "d/t", &pairs());
    let (mut s, mut o) = (session(&store), session(&store));
    o.statement_begin();
    other.insert(&mut o, &pair(1)).unwrap();
    s.statement_begin();
    assert!(!t.cursor.begin_bulk(&mut s, &LOAD_DATA).unwrap(), "somebody writes");
    o.rollback();
    assert!(t.cursor.begin_bulk(&mut s, &LOAD_DATA).unwrap());
    o.statement_begin();
    std::thread::scope(|scope| {
        // Not for as long as for a row (50 ms here): until the load is over.
        let waits = scope.spawn(|| other.insert(&mut o, &pair(1)));
        (0..1000).for_each(|n| t.insert(&mut s, &pair(n)).unwrap());
        engine::Clock::sleep(&engine::SystemClock::default(), std::time::Duration::from_millis(80));
        t.cursor.end_bulk(&mut s).unwrap();
        assert!(!waits.is_finished());
        s.commit().unwrap();
        assert!(matches!(waits.join().expect("no panic"), Err(Error::Duplicate { key: 0 })));
    });
    other.insert(&mut o, &pair(1000)).unwrap();
    o.commit().unwrap();
    assert_eq!(t.scan(&mut s, Some(1)).len(), 1001);
    s.rollback();
    s.statement_begin();
    assert!(!t.cursor.begin_bulk(&mut s, &LOAD_DATA).unwrap(), "there are rows");
}

#[test]
fn what_an_old_snapshot_sees_keeps_a_load_away() {
    let store = small_store();
    let mut t = create(&store, "d/t", &pairs());
    let (mut s, mut old) = (session(&store), session(&store));
    s.statement_begin();
    t.insert(&mut s, &pair(1)).unwrap();
    s.commit().unwrap();
    old.snapshot_now();
    s.statement_begin();
    t.read(&mut s, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    t.cursor.delete(&mut s).unwrap();
    s.commit().unwrap();
    s.statement_begin();
    assert!(!t.cursor.begin_bulk(&mut s, &LOAD_DATA).unwrap());
    assert_eq!(t.scan(&mut old, None), [pair(1)]);
}

#[test]
fn a_load_that_is_given_up_leaves_an_empty_table() {
    let store = small_store();
    let mut t = create(&store, "d/t", &pairs());
    let mut s = session(&store);
    for how in 0..3 {
        s.statement_begin();
        assert!(t.cursor.begin_bulk(&mut s, &LOAD_DATA).unwrap());
        (0..1000).for_each(|n| t.insert(&mut s, &pair(n)).unwrap());
        match how {
            0 => t.cursor.abort_bulk(),
            1 => t.cursor.end_bulk(&mut s).unwrap(),
            _ => {
                t.cursor.end_bulk(&mut s).unwrap();
                s.statement_rollback();
            }
        }
        s.rollback();
        s.statement_begin();
        assert_eq!(everything(&mut t, &mut s), vec![Vec::<Vec<V>>::new(); 3]);
        s.rollback();
    }
    assert_eq!(t.table.row_count(), 0);
}

/// Much comes in order, so it is loaded as it comes; then something does not.
#[test]
fn a_row_out_of_order_after_many_in_order_is_sorted_in() {
    let store = small_store();
    let mut t = create(&store, "d/t", &pairs());
    let mut s = session(&store);
    for (late, fine) in [(-5, true), (500, false)] {
        s.statement_begin();
        assert!(t.cursor.begin_bulk(&mut s, &LOAD_DATA).unwrap());
        (0..3000).for_each(|n| t.insert(&mut s, &pair(n)).unwrap());
        t.insert(&mut s, &pair(late)).unwrap();
        t.insert(&mut s, &pair(4000)).unwrap();
        let ended = t.cursor.end_bulk(&mut s);
        assert_eq!(ended.is_ok(), fine, "{ended:?}");
        s.rollback();
    }
    s.statement_begin();
    assert!(t.cursor.begin_bulk(&mut s, &LOAD_DATA).unwrap());
    (0..3000).for_each(|n| t.insert(&mut s, &pair(n)).unwrap());
    t.insert(&mut s, &pair(-5)).unwrap();
    t.cursor.end_bulk(&mut s).unwrap();
    s.commit().unwrap();
    s.statement_begin();
    let expected: Vec<_> = std::iter::once(-5).chain(0..3000).map(pair).collect();
    assert_eq!(t.scan(&mut s, None), expected);
    assert_eq!(t.scan_back(&mut s, Some(1)), expected);
}

#[test]
fn a_load_tells_how_far_it_is_and_ends_when_it_is_interrupted() {
    let store = small_store();
    let mut t = create(&store, "d/t", &pairs());
    let interrupted = Arc::new(AtomicBool::new(false));
    let told = Arc::new(AtomicU64::new(0));
    let asked = Arc::clone(&interrupted);
    let mut s = store.session(Box::new(move || asked.load(Relaxed)));
    let (noted, stop) = (Arc::clone(&told), Arc::clone(&interrupted));
    s.set_progress(Box::new(move |done, total| {
        assert!(done <= total && total == 40_000);
        noted.fetch_add(1, Relaxed);
        stop.store(true, Relaxed);
    }));
    s.statement_begin();
    assert!(t.cursor.begin_bulk(&mut s, &LOAD_DATA).unwrap());
    (0..20_000).rev().for_each(|n| t.insert(&mut s, &pair(n)).unwrap());
    let ended = t.cursor.end_bulk(&mut s).expect_err("interrupted");
    assert!(matches!(&ended, Error::Engine(e) if e.kind() == engine::Kind::Interrupted), "{ended}");
    assert_eq!(told.load(Relaxed), 1);
    s.rollback();
    s.statement_begin();
    assert_eq!(t.scan(&mut s, None), Vec::<Vec<V>>::new());
}

#[test]
fn only_statements_that_nobody_looks_into_are_loads() {
    assert!(LOAD_DATA.suit());
    assert!(!BulkFacts { rows: 100, ..LOAD_DATA }.suit(), "few rows");
    assert!(BulkFacts { rows: 100_000, ..LOAD_DATA }.suit());
    assert!(!BulkFacts { autocommit: false, ..LOAD_DATA }.suit(), "later statements would not see the rows");
    assert!(
        !BulkFacts { refuses_duplicates: false, ..LOAD_DATA }.suit(),
        "IGNORE and REPLACE look for each row"
    );
    assert!(!BulkFacts { looks_back: true, ..LOAD_DATA }.suit());
    assert!(!BulkFacts { gathers: false, ..LOAD_DATA }.suit());
    let alter = BulkFacts { copies: true, gathers: false, autocommit: false, ..LOAD_DATA };
    assert!(alter.suit());
    assert!(!BulkFacts { refuses_duplicates: false, ..alter }.suit(), "ALTER IGNORE TABLE");
}
