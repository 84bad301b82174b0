//! Who waits for whom, and what a reader sees after it waited.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::time::Duration;

use common::*;
use engine::Kind;
use tables::{Error, ReadFlag, Result, RowLock, Session};

fn numbers() -> Shape {
    Shape::new(&[int(4), int(4).null(), int(4)], &[unique(&[part(0)]), unique(&[part(1)]), plain(&[part(2)])])
}

fn row(id: i64, code: Option<i64>, kind: i64) -> Vec<V> {
    vec![V::I(id), code.map_or(V::Null, V::I), V::I(kind)]
}

fn kind(result: Result<impl std::fmt::Debug>) -> Kind {
    match result {
        Err(Error::Engine(error)) => error.kind(),
        other => panic!("an error of the engine, not {other:?}"),
    }
}

/// Two sessions with a handler each on a table with rows 1, 2 and 3.
fn pair() -> ((Handler, Session), (Handler, Session)) {
    let store = store();
    let mut a = create(&store, "d/t", &numbers());
    let b = open(&store, "d/t", &numbers());
    let (mut sa, sb) = (session(&store), session(&store));
    for id in 1..4 {
        a.insert(&mut sa, &row(id, Some(id * 10), id % 2)).unwrap();
    }
    sa.commit().unwrap();
    ((a, sa), (b, sb))
}

fn begin(sessions: &mut [&mut Session], repeatable: bool) {
    for session in sessions {
        session.set_repeatable_read(repeatable);
        session.statement_begin();
    }
}

#[test]
fn a_locked_row_can_not_be_locked_or_changed_by_another_session() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], false);
    a.cursor.set_lock(RowLock::Exclusive);
    assert!(a.read(&mut sa, 0, &[V::I(1)], ReadFlag::Exact).is_some());
    b.cursor.set_lock(RowLock::Shared);
    b.cursor.start(Some(0)).unwrap();
    let tuple = b.shape.tuple(0, &[V::I(1)]);
    let got = b.cursor.read(&mut sb, &tuple, ReadFlag::Exact, &mut b.image);
    assert_eq!(kind(got), Kind::LockTimeout);
    // Plain reads do not wait, and another row is free.
    b.cursor.set_lock(RowLock::None);
    assert!(b.read(&mut sb, 0, &[V::I(1)], ReadFlag::Exact).is_some());
    b.cursor.set_lock(RowLock::Exclusive);
    assert!(b.read(&mut sb, 0, &[V::I(2)], ReadFlag::Exact).is_some());
    sa.commit().unwrap();
    assert!(b.read(&mut sb, 0, &[V::I(1)], ReadFlag::Exact).is_some());
}

#[test]
fn shared_locks_are_shared() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], false);
    a.cursor.set_lock(RowLock::Shared);
    b.cursor.set_lock(RowLock::Shared);
    assert_eq!(a.scan(&mut sa, Some(2)).len(), 3);
    assert_eq!(b.scan(&mut sb, None).len(), 3);
    assert_eq!(kind(b.cursor.delete(&mut sb)), Kind::LockTimeout, "a reader is in the way");
}

/// A locking reader that had to wait acts on what the other one left, not on what it saw when it started.
#[test]
fn a_locking_read_sees_the_newest_version_after_its_wait() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], false);
    sb.set_lock_timeout(Duration::from_secs(20));
    a.cursor.set_lock(RowLock::Exclusive);
    a.read(&mut sa, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    a.update(&mut sa, &row(1, Some(10), 77)).unwrap();
    a.read(&mut sa, 0, &[V::I(3)], ReadFlag::Exact).unwrap();
    a.cursor.delete(&mut sa).unwrap();
    let waiter = std::thread::spawn(move || {
        b.cursor.set_lock(RowLock::Exclusive);
        b.scan(&mut sb, Some(2))
    });
    while sa.store().engine().status().get("locks_waiting") == Some(0) {
        std::thread::yield_now();
    }
    sa.commit().unwrap();
    // By the index on `kind` the scan met row 2 (0), then row 1 where it was (1): it has left that place, and is met again at 77.
    assert_eq!(waiter.join().unwrap(), [row(2, Some(20), 0), row(1, Some(10), 77)]);
}

#[test]
fn in_repeatable_read_a_row_that_changed_since_the_snapshot_is_a_conflict() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], true);
    assert_eq!(b.scan(&mut sb, None).len(), 3);
    a.cursor.set_lock(RowLock::Exclusive);
    a.read(&mut sa, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    a.update(&mut sa, &row(1, Some(10), 5)).unwrap();
    sa.commit().unwrap();
    assert_eq!(
        b.read(&mut sb, 0, &[V::I(1)], ReadFlag::Exact),
        Some(row(1, Some(10), 1)),
        "the snapshot stays"
    );
    b.cursor.set_lock(RowLock::Exclusive);
    b.cursor.start(Some(0)).unwrap();
    let tuple = b.shape.tuple(0, &[V::I(1)]);
    let got = b.cursor.read(&mut sb, &tuple, ReadFlag::Exact, &mut b.image);
    assert_eq!(kind(got), Kind::Conflict);
    sb.rollback();
    assert_eq!(b.read(&mut sb, 0, &[V::I(1)], ReadFlag::Exact), Some(row(1, Some(10), 5)));
}

#[test]
fn rows_are_counted_as_the_reader_sees_them_and_not_at_all_where_they_must_be_locked() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], true);
    assert_eq!(b.cursor.count(&mut sb).unwrap(), Some(3));
    a.insert(&mut sa, &row(4, None, 0)).unwrap();
    a.insert(&mut sa, &row(5, None, 0)).unwrap();
    assert_eq!((a.cursor.count(&mut sa).unwrap(), b.cursor.count(&mut sb).unwrap()), (Some(5), Some(3)));
    sa.commit().unwrap();
    assert_eq!(b.cursor.count(&mut sb).unwrap(), Some(3), "the snapshot stays");
    sb.rollback();
    assert_eq!(b.cursor.count(&mut sb).unwrap(), Some(5));
    b.cursor.set_lock(RowLock::Shared);
    assert_eq!(b.cursor.count(&mut sb).unwrap(), None);
}

#[test]
fn in_read_committed_each_statement_sees_what_was_committed_before_it() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], false);
    assert_eq!(b.scan(&mut sb, None).len(), 3);
    a.insert(&mut sa, &row(4, None, 0)).unwrap();
    sa.commit().unwrap();
    assert_eq!(b.scan(&mut sb, None).len(), 3, "the same statement, the same snapshot");
    sb.statement_begin();
    assert_eq!(b.scan(&mut sb, None).len(), 4);
}

#[test]
fn in_read_committed_a_row_that_was_not_wanted_is_given_back() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], false);
    a.cursor.set_lock(RowLock::Exclusive);
    a.read(&mut sa, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    a.cursor.unlock_row(&mut sa);
    b.cursor.set_lock(RowLock::Exclusive);
    assert!(b.read(&mut sb, 0, &[V::I(1)], ReadFlag::Exact).is_some());
    sb.rollback();
    // One that was changed is kept, whatever the server says later.
    a.read(&mut sa, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    a.update(&mut sa, &row(1, Some(10), 9)).unwrap();
    a.cursor.unlock_row(&mut sa);
    a.read(&mut sa, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    a.cursor.unlock_row(&mut sa);
    b.cursor.start(Some(0)).unwrap();
    let tuple = b.shape.tuple(0, &[V::I(1)]);
    let got = b.cursor.read(&mut sb, &tuple, ReadFlag::Exact, &mut b.image);
    assert_eq!(kind(got), Kind::LockTimeout);
}

/// The second writer of a unique value must wait to learn whether the first one commits.
#[test]
fn writers_of_one_unique_value_meet_at_its_lock() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], false);
    a.insert(&mut sa, &row(7, Some(70), 0)).unwrap();
    assert_eq!(kind(b.insert(&mut sb, &row(8, Some(70), 0))), Kind::LockTimeout);
    sa.rollback();
    b.insert(&mut sb, &row(8, Some(70), 0)).unwrap();
    sb.commit().unwrap();
    let got = a.insert(&mut sa, &row(9, Some(70), 0));
    assert!(matches!(got, Err(Error::Duplicate { key: 1 })), "{got:?}");
}

#[test]
fn a_unique_value_that_is_being_removed_is_not_free_yet() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], false);
    a.read(&mut sa, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    a.cursor.delete(&mut sa).unwrap();
    assert_eq!(kind(b.insert(&mut sb, &row(8, Some(10), 0))), Kind::LockTimeout);
    a.read(&mut sa, 0, &[V::I(2)], ReadFlag::Exact).unwrap();
    a.update(&mut sa, &row(2, Some(21), 0)).unwrap();
    assert_eq!(kind(b.insert(&mut sb, &row(8, Some(20), 0))), Kind::LockTimeout);
    sa.commit().unwrap();
    b.insert(&mut sb, &row(8, Some(10), 0)).unwrap();
    b.insert(&mut sb, &row(9, Some(20), 0)).unwrap();
}

#[test]
fn nulls_never_conflict() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], false);
    a.insert(&mut sa, &row(7, None, 0)).unwrap();
    b.insert(&mut sb, &row(8, None, 0)).unwrap();
    sa.commit().unwrap();
    sb.commit().unwrap();
    sa.statement_begin();
    assert_eq!(a.scan(&mut sa, Some(1))[..2], [row(7, None, 0), row(8, None, 0)]);
}

/// Two increments of one row, each of which read it under a lock, must both count.
#[test]
fn no_update_is_lost() {
    let store = store();
    create(&store, "d/t", &numbers());
    let mut first = open(&store, "d/t", &numbers());
    let mut s = session(&store);
    first.insert(&mut s, &row(1, None, 0)).unwrap();
    s.commit().unwrap();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let store = store.clone();
            std::thread::spawn(move || {
                let mut t = open(&store, "d/t", &numbers());
                let mut s = session(&store);
                s.set_repeatable_read(false);
                s.set_lock_timeout(Duration::from_secs(60));
                for _ in 0..50 {
                    s.statement_begin();
                    t.cursor.set_lock(RowLock::Exclusive);
                    let found = t.read(&mut s, 0, &[V::I(1)], ReadFlag::Exact).expect("the row");
                    let V::I(count) = found[2] else { panic!("a number") };
                    t.update(&mut s, &row(1, None, count + 1)).unwrap();
                    s.commit().unwrap();
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    s.statement_begin();
    assert_eq!(first.scan(&mut s, Some(2)), [row(1, None, 200)]);
}

#[test]
fn a_killed_session_stops_waiting() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], false);
    sb.set_lock_timeout(Duration::from_secs(60));
    a.read(&mut sa, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    a.cursor.delete(&mut sa).unwrap();
    let interrupt = sb.interrupt_handle();
    let waiter = std::thread::spawn(move || kind(b.insert(&mut sb, &row(1, None, 0))));
    while sa.store().engine().status().get("locks_waiting") == Some(0) {
        std::thread::yield_now();
    }
    interrupt.interrupt();
    assert_eq!(waiter.join().unwrap(), Kind::Interrupted);
}

/// A join may read one row with two cursors; what one of them changed must not be unlocked by the other.
#[test]
fn a_row_that_another_cursor_of_the_session_changed_stays_locked() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], false);
    let mut twin = open(&sa.store().clone(), "d/t", &numbers());
    a.cursor.set_lock(RowLock::Exclusive);
    a.read(&mut sa, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    twin.cursor.set_lock(RowLock::Exclusive);
    twin.read(&mut sa, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    twin.update(&mut sa, &row(1, Some(10), 9)).unwrap();
    a.cursor.unlock_row(&mut sa);
    b.cursor.set_lock(RowLock::Exclusive);
    b.cursor.start(Some(0)).unwrap();
    let tuple = b.shape.tuple(0, &[V::I(1)]);
    assert_eq!(kind(b.cursor.read(&mut sb, &tuple, ReadFlag::Exact, &mut b.image)), Kind::LockTimeout);
}

/// HANDLER … READ NEXT is a statement of its own on a cursor that stays where it is.
#[test]
fn a_cursor_kept_over_statements_goes_on_where_it_was_with_the_new_snapshot() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], false);
    b.cursor.start(Some(0)).unwrap();
    assert_eq!(b.next(&mut sb), Some(row(1, Some(10), 1)));
    a.read(&mut sa, 0, &[V::I(2)], ReadFlag::Exact).unwrap();
    a.update(&mut sa, &row(2, Some(20), 55)).unwrap();
    a.insert(&mut sa, &row(0, None, 0)).unwrap();
    sa.commit().unwrap();
    sb.statement_begin();
    assert_eq!(b.next(&mut sb), Some(row(2, Some(20), 55)));
    sb.commit().unwrap();
    assert_eq!(b.prev(&mut sb), Some(row(1, Some(10), 1)));
    assert_eq!(b.prev(&mut sb), Some(row(0, None, 0)));
}

/// Rows that came after the snapshot are no conflict for a locking scan: as in the snapshot, they are not there.
#[test]
fn a_locking_scan_in_repeatable_read_stays_with_its_snapshot() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], true);
    assert_eq!(b.scan(&mut sb, None).len(), 3);
    a.insert(&mut sa, &row(9, None, 0)).unwrap();
    sa.commit().unwrap();
    b.cursor.set_lock(RowLock::Exclusive);
    assert_eq!(b.scan(&mut sb, None).len(), 3);
    assert_eq!(b.scan(&mut sb, Some(2)).len(), 3);
    sb.set_conflict_detection(false);
    assert_eq!(b.scan(&mut sb, Some(2)).len(), 4, "InnoDB's way: the newest");
}

#[test]
fn an_update_to_a_value_that_another_session_is_writing_waits_for_it() {
    let ((mut a, mut sa), (mut b, mut sb)) = pair();
    begin(&mut [&mut sa, &mut sb], false);
    a.insert(&mut sa, &row(7, Some(70), 0)).unwrap();
    b.read(&mut sb, 0, &[V::I(1)], ReadFlag::Exact).unwrap();
    assert_eq!(kind(b.update(&mut sb, &row(7, Some(10), 1))), Kind::LockTimeout, "the primary key");
    assert_eq!(kind(b.update(&mut sb, &row(1, Some(70), 1))), Kind::LockTimeout, "a unique value");
    sa.commit().unwrap();
    assert!(matches!(b.update(&mut sb, &row(7, Some(10), 1)), Err(Error::Duplicate { key: 0 })));
    assert!(matches!(b.update(&mut sb, &row(1, Some(70), 1)), Err(Error::Duplicate { key: 1 })));
    b.update(&mut sb, &row(8, Some(80), 1)).unwrap();
}
