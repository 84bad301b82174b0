//! What single statements do: moves, repeats, replacements, rollbacks.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::sync::Arc;

use common::*;
use engine::{Background, Job, Settings};
use tables::{Error, ReadFlag, RowLock, Session, Storage, Store};

fn accounts() -> Shape {
    Shape::new(
        &[int(4), varchar(20, Text::Caseless), int(8), blob(4, Text::Binary).null()],
        &[unique(&[part(0)]), unique(&[part(1)]), plain(&[part(2)])],
    )
}

fn account(id: i64, name: &str, sum: i64) -> Vec<V> {
    vec![V::I(id), text(name), V::I(sum), V::Null]
}

/// A table of its own, and a session in its first statement.
fn begun(shape: &Shape) -> (Arc<Store>, Handler, Session) {
    let store = store();
    let table = create(&store, "d/t", shape);
    let mut session = session(&store);
    session.statement_begin();
    (store, table, session)
}

/// UPDATE t SET id = id + 10 would follow its own rows to the end of numbers if a scan met them again.
#[test]
fn an_update_that_moves_rows_ahead_of_its_scan_meets_each_once() {
    let (_store, mut t, mut s) = begun(&accounts());
    for id in 1..=20 {
        t.insert(&mut s, &account(id, &format!("n{id}"), id)).unwrap();
    }
    t.cursor.set_lock(RowLock::Exclusive);
    for key in [None, Some(0), Some(2)] {
        t.cursor.start(key).unwrap();
        let mut met = 0;
        while let Some(mut row) = t.next(&mut s) {
            met += 1;
            let (V::I(id), V::I(sum)) = (&row[0], &row[2]) else { panic!("numbers") };
            let (id, sum) = (*id, *sum);
            match key {
                Some(2) => row[2] = V::I(sum + 5),
                _ => row[0] = V::I(id + 100),
            }
            t.update(&mut s, &row).unwrap();
        }
        assert_eq!(met, 20, "by {key:?}");
    }
    let ids: Vec<V> = t.scan(&mut s, Some(2)).into_iter().map(|row| row[0].clone()).collect();
    assert_eq!(ids, (201..=220).map(V::I).collect::<Vec<_>>());
}

#[test]
fn a_duplicate_names_its_key_and_leads_to_the_row_in_the_way() {
    let (_store, mut t, mut s) = begun(&accounts());
    t.insert(&mut s, &account(1, "ann", 0)).unwrap();
    t.insert(&mut s, &account(2, "bob", 0)).unwrap();
    for (row, key, in_the_way) in [
        (account(1, "cid", 0), 0, account(1, "ann", 0)),
        (account(3, "BOB  ", 0), 1, account(2, "bob", 0)),
        (account(1, "bob", 0), 0, account(1, "ann", 0)),
    ] {
        let got = t.insert(&mut s, &row);
        assert!(matches!(got, Err(Error::Duplicate { key: named }) if named == key), "{got:?}");
        let mut position = vec![0; t.table.position_length()];
        t.cursor.duplicate_position(&mut position);
        assert!(t.cursor.read_position(&mut s, &position, &mut t.image).unwrap());
        assert_eq!(t.shape.row(&t.image), in_the_way);
    }
    assert_eq!(t.scan(&mut s, Some(2)).len(), 2, "a refused row leaves nothing behind");
}

/// REPLACE: delete what is in the way, one after the other, then insert.
#[test]
fn a_row_replaces_all_that_are_in_its_way() {
    let (_store, mut t, mut s) = begun(&accounts());
    t.insert(&mut s, &account(1, "ann", 0)).unwrap();
    t.insert(&mut s, &account(2, "bob", 0)).unwrap();
    let mut removed = 0;
    while let Err(error) = t.insert(&mut s, &account(1, "bob", 9)) {
        assert!(matches!(error, Error::Duplicate { .. }), "{error}");
        let mut position = vec![0; t.table.position_length()];
        t.cursor.duplicate_position(&mut position);
        assert!(t.cursor.read_position(&mut s, &position, &mut t.image).unwrap());
        t.cursor.delete(&mut s).unwrap();
        removed += 1;
    }
    assert_eq!(removed, 2);
    s.commit().unwrap();
    s.statement_begin();
    for key in [None, Some(0), Some(1), Some(2)] {
        assert_eq!(t.scan(&mut s, key), [account(1, "bob", 9)]);
    }
    assert_eq!(t.table.row_count(), 1);
}

#[test]
fn a_failed_statement_is_undone_and_the_ones_before_it_stay() {
    let (_store, mut t, mut s) = begun(&accounts());
    t.insert(&mut s, &account(1, "ann", 0)).unwrap();
    s.statement_begin();
    t.insert(&mut s, &account(2, "bob", 0)).unwrap();
    t.read(&mut s, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    t.update(&mut s, &account(5, "eve", 3)).unwrap();
    s.statement_rollback();
    assert_eq!(t.scan(&mut s, Some(1)), [account(1, "ann", 0)]);
    s.commit().unwrap();
    s.statement_begin();
    assert_eq!(t.scan(&mut s, Some(2)), [account(1, "ann", 0)]);
    assert_eq!(t.table.row_count(), 1, "rows of the failed statement do not count");
}

#[test]
fn savepoints_nest_and_can_be_used_again() {
    let (_store, mut t, mut s) = begun(&accounts());
    t.insert(&mut s, &account(1, "a", 0)).unwrap();
    let one = s.savepoint();
    t.insert(&mut s, &account(2, "b", 0)).unwrap();
    let two = s.savepoint();
    t.insert(&mut s, &account(3, "c", 0)).unwrap();
    s.rollback_to(&two);
    assert_eq!(t.scan(&mut s, None).len(), 2);
    t.insert(&mut s, &account(4, "d", 0)).unwrap();
    s.rollback_to(&two);
    s.rollback_to(&one);
    assert_eq!(t.scan(&mut s, None), [account(1, "a", 0)]);
    s.commit().unwrap();
    assert_eq!(t.table.row_count(), 1);
}

#[test]
fn a_scan_that_is_under_way_sees_what_its_session_writes_ahead_of_it() {
    let store = store();
    let mut t = create(&store, "d/t", &accounts());
    let mut writer = open(&store, "d/t", &accounts());
    let mut s = session(&store);
    s.statement_begin();
    for id in [1, 5] {
        t.insert(&mut s, &account(id, &format!("{id}"), 0)).unwrap();
    }
    t.cursor.start(None).unwrap();
    assert_eq!(t.next(&mut s), Some(account(1, "1", 0)));
    writer.insert(&mut s, &account(3, "3", 0)).unwrap();
    writer.read(&mut s, 0, &[V::I(5)], ReadFlag::Exact).unwrap();
    writer.cursor.delete(&mut s).unwrap();
    assert_eq!(t.next(&mut s), Some(account(3, "3", 0)));
    assert_eq!(t.next(&mut s), None);
    assert_eq!(t.prev(&mut s), Some(account(3, "3", 0)), "back from the end");
}

/// The server buffers the rows of INSERT … SELECT from the same table, then writes them; the reading cursor is done by then.
#[test]
fn a_table_can_be_inserted_into_from_itself() {
    let shape = Shape::hidden(&[int(4)], &[plain(&[part(0)])]);
    let (_store, mut t, mut s) = begun(&shape);
    for id in 0..10 {
        t.insert(&mut s, &[V::I(id)]).unwrap();
    }
    for _ in 0..3 {
        s.statement_begin();
        for row in t.scan(&mut s, None) {
            t.insert(&mut s, &row).unwrap();
        }
    }
    s.commit().unwrap();
    assert_eq!(t.table.row_count(), 80);
    s.statement_begin();
    assert_eq!(t.scan(&mut s, Some(0)).len(), 80);
}

#[test]
fn columns_that_were_not_read_survive_an_update() {
    let shape = Shape::new(
        &[int(4), varchar(30, Text::Binary), blob(4, Text::Binary).null(), double().null(), int(2)],
        &[unique(&[part(0)]), plain(&[part(1)])],
    );
    let (_store, mut t, mut s) = begun(&shape);
    let row = vec![V::I(1), text("name"), V::B(vec![9; 5000]), V::D(1.5), V::I(3)];
    t.insert(&mut s, &row).unwrap();
    // Only columns 0 and 4 are read; the rest of the record is whatever was in it.
    t.cursor.set_columns(Some(&[0b1_0001]));
    t.cursor.set_lock(RowLock::Exclusive);
    t.image.fill(0xee);
    t.cursor.start(Some(0)).unwrap();
    let tuple = shape.tuple(0, &[V::I(1)]);
    assert!(t.cursor.read(&mut s, &tuple, ReadFlag::Exact, &mut t.image).unwrap());
    let old = t.image.clone();
    let mut new = old.clone();
    let place = shape.descriptor().fields[4].offset as usize;
    new[place..place + 2].copy_from_slice(&8i16.to_le_bytes());
    t.cursor.update(&mut s, &old, tables::Record { image: &new, blobs: &[&[]] }).unwrap();
    t.cursor.set_columns(None);
    let mut expected = row;
    expected[4] = V::I(8);
    assert_eq!(t.scan(&mut s, None), [expected.clone()]);
    assert_eq!(t.scan(&mut s, Some(1)), [expected]);
}

#[test]
fn a_row_of_64_mib_comes_back() {
    let shape = Shape::new(&[int(4), blob(4, Text::Binary)], &[unique(&[part(0)])]);
    let (_store, mut t, mut s) = begun(&shape);
    let big: Vec<u8> = (0..64u32 << 20).map(|i| (i % 251) as u8).collect();
    t.insert(&mut s, &[V::I(1), V::B(big.clone())]).unwrap();
    s.commit().unwrap();
    s.statement_begin();
    let got = t.read(&mut s, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    assert!(got[1] == V::B(big), "every byte");
}

/// UPDATE t SET a = b: the new record's BLOB points into the memory of the row that is being replaced.
#[test]
fn a_blob_can_be_copied_from_the_row_that_is_being_updated() {
    let shape = Shape::new(
        &[int(4), blob(4, Text::Binary).null(), blob(4, Text::Binary).null()],
        &[unique(&[part(0)])],
    );
    let (_store, mut t, mut s) = begun(&shape);
    t.insert(&mut s, &[V::I(1), V::B(vec![1; 100]), V::B(vec![2; 3000])]).unwrap();
    // Without a lock the update has to read the row again, which must not disturb the one that the record points to.
    let row = t.read(&mut s, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    assert_eq!(row[2], V::B(vec![2; 3000]));
    let fields = shape.descriptor().fields;
    let (one, two) = (fields[1].offset as usize, fields[2].offset as usize);
    let old = t.image.clone();
    let mut new = old.clone();
    new.copy_within(two..two + 12, one);
    let address = usize::from_ne_bytes(new[one + 4..one + 12].try_into().unwrap());
    let copied = vec![2; 3000];
    assert_ne!(address, 0);
    t.cursor.update(&mut s, &old, tables::Record { image: &new, blobs: &[&copied, &[]] }).unwrap();
    assert_eq!(t.scan(&mut s, None), [vec![V::I(1), V::B(vec![2; 3000]), V::B(vec![2; 3000])]]);
}

#[test]
fn updating_or_deleting_a_row_that_is_gone_says_so() {
    let (store, mut t, mut s) = begun(&accounts());
    t.insert(&mut s, &account(1, "a", 0)).unwrap();
    t.read(&mut s, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    t.cursor.delete(&mut s).unwrap();
    assert!(matches!(t.cursor.delete(&mut s), Err(Error::RowGone)));
    assert!(matches!(t.update(&mut s, &account(2, "b", 0)), Err(Error::RowGone)));
    let mut fresh = open(&store, "d/t", &accounts());
    assert!(matches!(fresh.cursor.delete(&mut s), Err(Error::Malformed(_))), "there is no current row");
}

#[test]
fn positions_sort_as_bytes_in_primary_order() {
    let shape = Shape::new(&[varchar(10, Text::Caseless), int(2)], &[unique(&[part(0), part(1)])]);
    let (_store, mut t, mut s) = begun(&shape);
    for (name, number) in [("b", 1), ("B", -1), ("a", 5), ("a\t", 0), ("", 3)] {
        t.insert(&mut s, &[text(name), V::I(number)]).unwrap();
    }
    t.cursor.start(None).unwrap();
    let mut positions = Vec::new();
    while t.next(&mut s).is_some() {
        let mut position = vec![0xff; t.table.position_length()];
        t.cursor.position(&mut position);
        positions.push(position);
    }
    assert_eq!(positions.len(), 5);
    assert!(positions.is_sorted());
}

/// ALTER TABLE copies into a table of its own, row by row, and commits on the way.
#[test]
fn a_copy_that_commits_in_chunks_is_whole() {
    let store = store();
    let mut from = create(&store, "d/t", &accounts());
    let mut to = create(&store, "d/#sql-alter", &accounts());
    let mut s = session(&store);
    s.statement_begin();
    for id in 0..500 {
        from.insert(&mut s, &account(id, &format!("{id}"), id * 3)).unwrap();
    }
    s.commit().unwrap();
    s.statement_begin();
    to.cursor.set_alone(true);
    from.cursor.start(None).unwrap();
    let mut commits = 0;
    while let Some(row) = from.next(&mut s) {
        to.insert(&mut s, &row).unwrap();
        commits += u32::from(s.commit_chunk(60).unwrap());
    }
    assert_eq!(commits, 8);
    assert!(matches!(to.insert(&mut s, &account(7, "x", 0)), Err(Error::Duplicate { key: 0 })));
    s.commit().unwrap();
    s.statement_begin();
    for key in [None, Some(1), Some(2)] {
        assert_eq!(to.scan(&mut s, key), from.scan(&mut s, key));
    }
    assert_eq!(to.table.row_count(), 500);
}

#[test]
fn the_current_row_after_an_update_is_the_new_one() {
    let (_store, mut t, mut s) = begun(&accounts());
    t.insert(&mut s, &account(1, "a", 0)).unwrap();
    t.read(&mut s, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    t.update(&mut s, &account(2, "a", 0)).unwrap();
    let mut position = vec![0; t.table.position_length()];
    t.cursor.position(&mut position);
    t.cursor.delete(&mut s).unwrap();
    assert_eq!(t.scan(&mut s, Some(1)), Vec::<Vec<V>>::new());
    assert!(!t.cursor.read_position(&mut s, &position, &mut t.image).unwrap());
}

/// The server computes virtual columns; those that an index uses are kept, and every update brings their new value even if the record
/// happened to hold the same bytes before.
#[test]
fn virtual_columns_are_kept_only_for_their_indexes() {
    let shape = Shape::new(
        &[
            int(4),
            int(4),
            int(4).null().stored_as(Storage::Computed),
            varchar(10, Text::Binary).null().stored_as(Storage::Absent),
        ],
        &[unique(&[part(0)]), plain(&[part(2)])],
    );
    let (_store, mut t, mut s) = begun(&shape);
    t.insert(&mut s, &[V::I(1), V::I(10), V::I(20), text("absent")]).unwrap();
    // The NULL bit of the column that is not kept stays as the caller has it.
    let null_bit = 1 << 4;
    for before in [0, null_bit] {
        t.image.fill(0xee);
        t.image[0] = before;
        t.cursor.start(None).unwrap();
        assert!(t.cursor.next(&mut s, &mut t.image).unwrap());
        assert_eq!(t.image[0] & null_bit, before);
        assert_eq!(shape.columns_of(&t.image, &[0, 1, 2]), [V::I(1), V::I(10), V::I(20)]);
    }
    // Read without the computed column, while the buffer already holds what its new value will be.
    t.cursor.set_columns(Some(&[0b0011]));
    t.cursor.set_lock(RowLock::Exclusive);
    let new = shape.record(&[V::I(1), V::I(11), V::I(22), text("other")]);
    t.image = new.image.clone();
    t.cursor.start(Some(0)).unwrap();
    let tuple = shape.tuple(0, &[V::I(1)]);
    assert!(t.cursor.read(&mut s, &tuple, ReadFlag::Exact, &mut t.image).unwrap());
    let old = t.image.clone();
    new.with(|record| t.cursor.update(&mut s, &old, record)).unwrap();
    t.cursor.set_columns(Some(&[0b0111]));
    t.cursor.start(Some(1)).unwrap();
    let tuple = shape.tuple(1, &[V::I(22)]);
    assert!(t.cursor.read(&mut s, &tuple, ReadFlag::Exact, &mut t.image).unwrap());
    assert_eq!(shape.columns_of(&t.image, &[0, 1, 2]), [V::I(1), V::I(11), V::I(22)]);
}

#[test]
fn an_update_that_changes_nothing_says_so_and_writes_nothing() {
    let shape = Shape::new(&[varchar(9, Text::Caseless), blob(2, Text::Binary)], &[unique(&[part(0)])]);
    let store = store();
    let mut t = create(&store, "d/t", &shape);
    let mut s = session(&store);
    s.statement_begin();
    t.insert(&mut s, &[text("a"), text("long")]).unwrap();
    s.commit().unwrap();
    s.statement_begin();
    let update = |t: &mut Handler, s: &mut tables::Session, row: &[V]| {
        t.read(s, 0, &[text("a")], ReadFlag::Exact).unwrap();
        let old = t.image.clone();
        shape.record(row).with(|record| t.cursor.update(s, &old, record)).unwrap()
    };
    // The BLOB's bytes are elsewhere, and the same.
    assert!(!update(&mut t, &mut s, &[text("a"), text("long")]));
    assert!(!s.has_writes());
    assert!(update(&mut t, &mut s, &[text("A"), text("long")]), "equal keys, another text");
    assert!(update(&mut t, &mut s, &[text("A"), text("short")]));
    assert_eq!(t.scan(&mut s, None), [[text("A"), text("short")]]);
}

/// Bytes of wal and blocks looked at that `work` costs on a table.
fn cost(store: &Store, work: impl FnOnce()) -> (u64, u64) {
    let count = || {
        let status = store.engine().status();
        let [wal, hits, misses] =
            ["wal_bytes", "block_cache_hits", "block_cache_misses"].map(|name| status.get(name).unwrap());
        (wal, hits + misses)
    };
    let (wal, blocks) = count();
    work();
    (count().0 - wal, count().1 - blocks)
}

const COUNTED: i64 = 3000;

fn counted_row(id: i64) -> Vec<V> {
    let (a, b, c) = (id * 7919 % COUNTED, id * 104_729 % 50, id * 1_299_709 % 700);
    vec![V::I(id), V::I(a), V::I(b), text(&format!("name {c}")), V::I(id * 3), text(&"pad ".repeat(20))]
}

/// Tables of the same rows in ssts: without secondary keys, with some that may repeat, and with one more that may not.
fn counted() -> (Arc<Store>, [Handler; 3]) {
    let store = store_with(Settings { background: Background::Manual, ..Settings::default() });
    let columns =
        [int(4), int(4), int(4).null(), varchar(20, Text::Caseless), int(8), varchar(100, Text::Binary)];
    let primary = [unique(&[part(0)])];
    let repeating = [plain(&[part(1)]), plain(&[part(2).desc(), part(3)]), plain(&[part(3).prefix(6)])];
    let all = [
        primary.to_vec(),
        [&primary[..], &repeating].concat(),
        [&primary[..], &repeating, &[unique(&[part(4)])]].concat(),
    ];
    let mut number = 0;
    let tables = all.map(|keys| {
        number += 1;
        let mut t = create(&store, &format!("d/t{number}"), &Shape::new(&columns, &keys));
        let mut s = session(&store);
        s.statement_begin();
        // Every second number is free.
        (0..COUNTED).for_each(|id| t.insert(&mut s, &counted_row(id * 2)).unwrap());
        s.commit().unwrap();
        t.cursor.set_lock(RowLock::Exclusive);
        t
    });
    for job in [Job::Freeze, Job::Flush] {
        while store.engine().step(job).unwrap() {}
    }
    (store, tables)
}

#[test]
fn an_update_of_a_column_in_no_index_writes_and_reads_what_it_would_without_indexes() {
    let (store, mut tables) = counted();
    let mut update = |table: usize, field: usize, value: &V| {
        let t = &mut tables[table];
        let mut s = session(&store);
        s.statement_begin();
        cost(&store, || {
            for id in 0..200 {
                let mut row = t.read(&mut s, 0, &[V::I(id * 22)], ReadFlag::Exact).unwrap();
                row[field] = value.clone();
                t.update(&mut s, &row).unwrap();
            }
            s.commit().unwrap();
        })
    };
    let padding = text(&"new ".repeat(20));
    let alone = update(0, 5, &padding);
    assert!(alone.0 > 200 * 80 && alone.1 >= 200, "{alone:?} bytes of wal and blocks");
    for table in [1, 2] {
        assert_eq!(update(table, 5, &padding), alone, "table {table}");
    }
    // One index of three: an entry goes, another comes, and none is read.
    let (wal, blocks) = update(1, 1, &V::I(-1));
    assert!(wal > alone.0 + 200 * 2 * 8, "{wal} bytes of wal, {} without", alone.0);
    assert!(blocks <= alone.1, "{blocks} blocks, {} without", alone.1);
}

#[test]
fn an_insert_reads_nothing_of_indexes_whose_keys_may_repeat_and_asks_the_filter_of_others() {
    let (store, mut tables) = counted();
    let mut s = session(&store);
    for t in &mut tables {
        s.statement_begin();
        for id in 0..400 {
            t.read(&mut s, 0, &[V::I(id * 2)], ReadFlag::Exact).unwrap();
            t.cursor.delete(&mut s).unwrap();
        }
        s.commit().unwrap();
    }
    for job in [Job::Freeze, Job::Flush] {
        while store.engine().step(job).unwrap() {}
    }
    // Blocks, and rows that were refused.
    let mut insert = |table: usize, row: &dyn Fn(i64) -> Vec<V>| {
        let t = &mut tables[table];
        s.statement_begin();
        let mut refused = 0;
        let (_, blocks) = cost(&store, || {
            (0..400).for_each(|n| refused += u64::from(t.insert(&mut s, &row(n)).is_err()));
            s.rollback();
        });
        (blocks, refused)
    };
    // Whoever looked for their old entries would find that they are gone, in a block each.
    let back = |n| counted_row(n * 2);
    let (alone, _) = insert(0, &back);
    assert!(alone >= 400, "{alone} blocks to see that primary keys are free");
    // Some are read because a filter says perhaps.
    let few = 40;
    let (blocks, refused) = insert(1, &back);
    assert!(refused == 0 && blocks <= alone + few, "{blocks} blocks, {alone} without indexes");
    let (blocks, refused) = insert(2, &back);
    assert!(refused == 0 && blocks >= alone + 400, "{blocks} blocks, {alone} without indexes");

    let fresh = |n| counted_row(n * 6 + 1201);
    let (blocks, refused) = insert(2, &fresh);
    assert!(refused == 0 && blocks <= 2 * few, "{blocks} blocks for keys that nobody has");
    let taken = |n| [&fresh(n)[..4], &[V::I(n * 6 + 3000), text("pad")]].concat();
    let (blocks, refused) = insert(2, &taken);
    assert!(refused == 400 && blocks >= 400, "{blocks} blocks for {refused} keys that are taken");
}
