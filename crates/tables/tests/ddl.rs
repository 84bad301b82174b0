//! Definitions, files and counters: what a restart, a rename or a truncation leaves.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::sync::Arc;

use common::*;
use tables::{Error, Store, TableImages};

fn numbered() -> Shape {
    let mut shape = Shape::new(&[int(4), int(4)], &[unique(&[part(0)]), plain(&[part(1)])]);
    shape.auto_increment = Some(0);
    shape
}

fn restarted(store: &Arc<Store>) -> Arc<Store> {
    Store::open(Arc::clone(store.engine()), Arc::new(Ascii)).unwrap()
}

fn images(frm: &[u8]) -> TableImages<'_> {
    TableImages { frm, par: b"par" }
}

#[test]
fn a_definition_is_found_under_its_path_and_only_there() {
    let store = store();
    store.create("./shop/t", &numbered().descriptor(), images(b"one"), 0).unwrap();
    let definition = store.definition("shop/t").unwrap().expect("a definition");
    assert_eq!((&definition.frm[..], &definition.par[..], definition.version), (&b"one"[..], &b"par"[..], 1));
    assert!(store.exists("./shop/t").unwrap());
    assert!(!store.exists("shop/other").unwrap());
    assert_eq!(store.definition("shop").unwrap(), None);
    let again = store.create("shop/t", &numbered().descriptor(), images(b"two"), 0);
    assert!(matches!(again, Err(Error::TableExists(path)) if path == "shop/t"));
    let got = store.open_table("shop/other", numbered().descriptor());
    assert!(matches!(got, Err(Error::NoSuchTable(path)) if path == "shop/other"));
}

#[test]
fn tables_are_listed_by_database() {
    let store = store();
    for path in ["a/t", "a/u", "a/#sql-1", "a/p#P#p0", "ab/t", "b/t"] {
        store.create(path, &numbered().descriptor(), images(b""), 0).unwrap();
    }
    store.file_put("c/db.opt", b"x").unwrap();
    let mut names = Vec::new();
    store.list("./a/", &mut |name| names.push(name.to_owned())).unwrap();
    assert_eq!(names, ["#sql-1", "p#P#p0", "t", "u"]);
    assert_eq!(store.databases().unwrap(), ["a", "ab", "b", "c"]);
}

#[test]
fn a_dropped_database_takes_its_tables_and_files_along_and_no_others() {
    let store = store();
    for path in ["a/t", "a/u", "ab/t"] {
        store.create(path, &numbered().descriptor(), images(b""), 0).unwrap();
    }
    store
        .files_apply(&[("a/db.opt", Some(b"x")), ("a/v.frm", Some(b"view")), ("ab/db.opt", Some(b"y"))])
        .unwrap();
    store.drop_database("a").unwrap();
    assert_eq!(store.databases().unwrap(), ["ab"]);
    assert!(!store.exists("a/t").unwrap());
    assert_eq!(store.file_get("ab/db.opt").unwrap().as_deref(), Some(&b"y"[..]));
}

#[test]
fn a_dropped_table_is_gone_and_its_name_is_free() {
    let store = store();
    let mut t = create(&store, "d/t", &numbered());
    let mut s = session(&store);
    t.insert(&mut s, &[V::I(1), V::I(1)]).unwrap();
    s.commit().unwrap();
    store.drop_table("d/t").unwrap();
    assert!(matches!(store.drop_table("d/t"), Err(Error::NoSuchTable(_))));
    let mut t = create(&store, "d/t", &numbered());
    s.statement_begin();
    assert_eq!(t.scan(&mut s, None), Vec::<Vec<V>>::new());
    assert_eq!((t.table.row_count(), t.table.next_auto_increment()), (0, 1));
}

#[test]
fn a_renamed_table_keeps_rows_and_counters_in_another_database_too() {
    let store = store();
    let mut t = create(&store, "a/t", &numbered());
    let mut s = session(&store);
    t.insert(&mut s, &[V::I(41), V::I(1)]).unwrap();
    s.commit().unwrap();
    create(&store, "b/taken", &numbered());
    assert!(matches!(store.rename("a/t", "b/taken"), Err(Error::TableExists(_))));
    assert!(matches!(store.rename("a/nothing", "b/u"), Err(Error::NoSuchTable(_))));
    store.rename("./a/t", "./b/u").unwrap();
    assert!(!store.exists("a/t").unwrap());
    let mut t = open(&store, "b/u", &numbered());
    s.statement_begin();
    assert_eq!(t.scan(&mut s, Some(1)), [[V::I(41), V::I(1)]]);
    assert_eq!((t.table.row_count(), t.table.next_auto_increment()), (1, 42));
}

/// Other handlers of the table are open while one truncates it, and go on with the new trees.
#[test]
fn a_truncated_table_is_empty_for_every_open_handler() {
    let store = store();
    let (mut t, mut other) = (create(&store, "d/t", &numbered()), open(&store, "d/t", &numbered()));
    let mut s = session(&store);
    for id in 1..5 {
        t.insert(&mut s, &[V::I(id), V::I(id)]).unwrap();
    }
    s.commit().unwrap();
    t.table.truncate().unwrap();
    s.statement_begin();
    assert_eq!(other.scan(&mut s, Some(1)), Vec::<Vec<V>>::new());
    assert_eq!((other.table.row_count(), other.table.next_auto_increment()), (0, 1));
    other.insert(&mut s, &[V::I(1), V::I(7)]).unwrap();
    s.commit().unwrap();
    s.statement_begin();
    assert_eq!(t.scan(&mut s, None), [[V::I(1), V::I(7)]]);
    let mut again = open(&restarted(&store), "d/t", &numbered());
    assert_eq!(again.scan(&mut session(&store), Some(1)), [[V::I(1), V::I(7)]]);
}

#[test]
fn auto_increment_survives_a_restart_even_of_rows_that_were_deleted() {
    let store = store();
    let mut t = create(&store, "d/t", &numbered());
    let mut s = session(&store);
    s.statement_begin();
    for _ in 0..3 {
        let (first, count) = t.table.reserve_auto_increment(1, 1, 1);
        assert_eq!(count, 1);
        t.insert(&mut s, &[V::I(first as i64), V::I(0)]).unwrap();
    }
    t.insert(&mut s, &[V::I(100), V::I(0)]).unwrap();
    s.commit().unwrap();
    s.statement_begin();
    t.read(&mut s, 0, &[V::I(100)], tables::ReadFlag::Exact).unwrap();
    t.cursor.delete(&mut s).unwrap();
    s.commit().unwrap();
    let t = open(&restarted(&store), "d/t", &numbered());
    assert_eq!(t.table.reserve_auto_increment(1, 1, 1), (101, 1));
    assert_eq!(t.table.reserve_auto_increment(5, 10, 2), (105, 2));
    assert_eq!(t.table.next_auto_increment(), 116);
}

#[test]
fn auto_increment_starts_where_the_table_says_and_never_below_a_row() {
    let store = store();
    store.create("d/t", &numbered().descriptor(), images(b""), 1000).unwrap();
    let mut t = open(&store, "d/t", &numbered());
    assert_eq!(t.table.reserve_auto_increment(1, 1, 1), (1000, 1));
    let mut s = session(&store);
    t.insert(&mut s, &[V::I(1000), V::I(0)]).unwrap();
    s.commit().unwrap();
    t.table.set_auto_increment(10).unwrap();
    assert_eq!(t.table.next_auto_increment(), 1001);
    t.table.set_auto_increment(5000).unwrap();
    assert_eq!(open(&restarted(&store), "d/t", &numbered()).table.next_auto_increment(), 5000);
}

#[test]
fn negative_and_refused_values_do_not_move_auto_increment() {
    let store = store();
    let mut t = create(&store, "d/t", &numbered());
    let mut s = session(&store);
    t.insert(&mut s, &[V::I(-5), V::I(0)]).unwrap();
    assert_eq!(t.table.next_auto_increment(), 1);
    t.insert(&mut s, &[V::I(7), V::I(0)]).unwrap();
    t.insert(&mut s, &[V::I(7), V::I(0)]).unwrap_err();
    assert_eq!(t.table.next_auto_increment(), 8);
}

#[test]
fn two_threads_never_get_the_same_auto_increment_value() {
    let store = store();
    let t = create(&store, "d/t", &numbered());
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let table = Arc::clone(&t.table);
            std::thread::spawn(move || {
                (0..1000).map(|_| table.reserve_auto_increment(1, 1, 1).0).collect::<Vec<_>>()
            })
        })
        .collect();
    let mut values: Vec<u64> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    values.sort_unstable();
    values.dedup();
    assert_eq!(values.len(), 4000);
}

/// A hidden primary key goes on after the last row; a row that is there must never be overwritten.
#[test]
fn hidden_keys_go_on_after_a_restart() {
    let store = store();
    let shape = Shape::hidden(&[int(4)], &[]);
    let mut t = create(&store, "d/t", &shape);
    let mut s = session(&store);
    for id in 0..5 {
        t.insert(&mut s, &[V::I(id)]).unwrap();
    }
    s.commit().unwrap();
    let store = restarted(&store);
    let mut t = open(&store, "d/t", &shape);
    let mut s = session(&store);
    t.insert(&mut s, &[V::I(5)]).unwrap();
    let ids: Vec<Vec<V>> = (0..6).map(|id| vec![V::I(id)]).collect();
    assert_eq!(t.scan(&mut s, None), ids);
}

#[test]
fn row_counts_survive_a_restart() {
    let store = store();
    let mut t = create(&store, "d/t", &numbered());
    let mut s = session(&store);
    for id in 1..=3000 {
        t.insert(&mut s, &[V::I(id), V::I(id % 7)]).unwrap();
    }
    s.commit().unwrap();
    store.close().unwrap();
    assert_eq!(open(&restarted(&store), "d/t", &numbered()).table.row_count(), 3000);
    // Without a clean end a table of some size may be a little off, a small one is counted.
    create(&store, "d/small", &numbered()).insert(&mut s, &[V::I(1), V::I(1)]).unwrap();
    s.commit().unwrap();
    assert_eq!(open(&restarted(&store), "d/small", &numbered()).table.row_count(), 1);
}

#[test]
fn images_change_without_touching_rows() {
    let store = store();
    let mut t = create(&store, "d/t", &numbered());
    let mut s = session(&store);
    t.insert(&mut s, &[V::I(1), V::I(2)]).unwrap();
    s.commit().unwrap();
    store.set_images("d/t", &numbered().descriptor(), images(b"new")).unwrap();
    let definition = store.definition("d/t").unwrap().unwrap();
    assert_eq!((&definition.frm[..], definition.version), (&b"new"[..], 2));
    assert_ne!(t.table.definition_version(), definition.version, "an open table can tell that it is stale");
    s.statement_begin();
    assert_eq!(open(&store, "d/t", &numbered()).scan(&mut s, Some(1)), [[V::I(1), V::I(2)]]);
}

/// Rows of four-byte integers must not be read as eight-byte ones because a .frm file was swapped.
#[test]
fn a_definition_that_does_not_fit_the_stored_rows_is_refused() {
    let store = store();
    create(&store, "d/t", &numbered());
    let wider = Shape::new(&[int(8), int(4)], &[unique(&[part(0)]), plain(&[part(1)])]);
    let fewer = Shape::new(&[int(4), int(4)], &[unique(&[part(0)])]);
    let turned = Shape::new(&[int(4), int(4)], &[unique(&[part(0)]), plain(&[part(1).desc()])]);
    for other in [wider, fewer, turned] {
        let got = store.open_table("d/t", other.descriptor()).map(|_| ());
        assert!(matches!(got, Err(Error::DefinitionChanged { .. })), "{got:?}");
        let got = store.set_images("d/t", &other.descriptor(), images(b"new"));
        assert!(matches!(got, Err(Error::DefinitionChanged { .. })), "{got:?}");
    }
}

#[test]
fn files_come_back_as_they_were_put() {
    let store = store();
    let big = vec![3; 100_000];
    store.file_put("./shop/db.opt", b"utf8").unwrap();
    store.file_put("shop/v.frm", &big).unwrap();
    store.file_put("shop/v.frm", b"replaced").unwrap();
    store.file_put("top", &big).unwrap();
    store.files_apply(&[("shop/t.TRG", Some(b"t")), ("shop/db.opt", None)]).unwrap();
    store.file_remove("shop/never").unwrap();
    let store = restarted(&store);
    let mut seen = Vec::new();
    store.files("", &mut |name, bytes| seen.push((name.to_owned(), bytes.len()))).unwrap();
    assert_eq!(
        seen,
        [("shop/t.TRG".to_owned(), 1), ("shop/v.frm".to_owned(), 8), ("top".to_owned(), 100_000)]
    );
    let mut seen = 0;
    store.files("shop", &mut |_, _| seen += 1).unwrap();
    assert_eq!(seen, 2);
    assert_eq!(store.file_get("shop/db.opt").unwrap(), None);
}

#[test]
fn a_catalogue_of_another_format_is_refused_by_name() {
    let store = store();
    let mut txn = store.engine().begin();
    txn.put(engine::TreeId(1), &[0], b"cistern catalogue 77").unwrap();
    txn.commit().unwrap();
    let error = Store::open(Arc::clone(store.engine()), Arc::new(Ascii)).err().expect("a refusal");
    assert!(error.to_string().contains("cistern catalogue 77"), "{error}");
}

#[test]
fn a_garbled_definition_is_refused_and_named() {
    let store = store();
    create(&store, "d/t", &numbered());
    for garbled in [&b""[..], &[99, 1, 2], &[1, 2, 3]] {
        let mut txn = store.engine().begin();
        txn.put(engine::TreeId(1), b"\x01d/t", garbled).unwrap();
        txn.commit().unwrap();
        let error = store.definition("d/t").unwrap_err();
        assert!(matches!(&error, Error::Corrupt(what) if what.contains("d/t")), "{error}");
    }
}

#[test]
fn a_table_that_an_alter_put_aside_gets_its_name_back_or_goes() {
    let store = store();
    let make = |path: &str| store.create(path, &numbered().descriptor(), images(b""), 0).unwrap();
    let id = |path: &str| store.definition(path).unwrap().map(|definition| definition.table);
    for table in ["d/t", "d/u"] {
        make(table);
    }
    let (t, u) = (id("d/t"), id("d/u"));
    make("d/#sql-alter-1-2");
    store.rename("d/t", "d/#sql-backup-1-2").unwrap();
    make("d/#sql-alter-1-3");
    store.rename("d/u", "d/#sql-backup-1-3").unwrap();
    store.rename("d/#sql-alter-1-3", "d/u").unwrap();

    let settled = restarted(&store).settle_backups().unwrap();
    assert_eq!(settled.len(), 2);
    assert_eq!(id("d/t"), t, "undone");
    assert!(id("d/u").is_some() && id("d/u") != u, "done");
    assert!(!store.exists("d/#sql-backup-1-2").unwrap() && !store.exists("d/#sql-backup-1-3").unwrap());
    assert_eq!(store.settle_backups().unwrap(), []);

    // A name that is given back is not remembered.
    store.rename("d/t", "d/#sql-backup-1-4").unwrap();
    store.rename("d/#sql-backup-1-4", "d/v").unwrap();
    store.rename("d/v", "d/#sql-backup-1-4").unwrap();
    store.settle_backups().unwrap();
    assert_eq!((id("d/t"), id("d/v")), (None, t));
}
