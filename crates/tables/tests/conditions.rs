//! Conditions on index entries: what they are shown, and what becomes of the rows that do not meet them.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::*;
use engine::Kind;
use tables::{Error, Pushed, ReadFlag, RowLock, Session, Verdict};

const BY_NUMBER_AND_NAME: usize = 1;
const BY_START_OF_NAME: usize = 2;
const BY_CODE: usize = 3;

/// id, number, name, code, and a column that no index has.
fn shape(primary: Column) -> Shape {
    Shape::new(
        &[primary, int(4).null(), varchar(8, Text::Caseless), int(4), int(4)],
        &[
            unique(&[part(0)]),
            plain(&[part(1), part(2)]),
            plain(&[part(2).prefix(2), part(1)]),
            unique(&[part(3)]),
        ],
    )
}

fn row(id: i64) -> Vec<V> {
    let number = if id % 5 == 0 { V::Null } else { V::I(id % 5) };
    vec![V::I(id), number, text(if id % 2 == 0 { "Even" } else { "oDD" }), V::I(id * 10), V::I(id)]
}

fn filled() -> (Handler, Session) {
    let store = store();
    let mut handler = create(&store, "d/t", &shape(int(4)));
    let mut session = session(&store);
    (0..20).for_each(|id| handler.insert(&mut session, &row(id)).unwrap());
    session.commit().unwrap();
    session.statement_begin();
    (handler, session)
}

/// Bits of columns.
fn columns(fields: &[usize]) -> [u8; 1] {
    [fields.iter().fold(0, |bits, field| bits | 1 << field)]
}

/// Asks `check` with the columns of the index and of the primary key as the record has them.
fn push(
    handler: &mut Handler,
    session: &Session,
    index: usize,
    fields: &'static [usize],
    check: impl Fn(&[V]) -> Verdict + Send + 'static,
) -> Pushed {
    let shape = handler.shape.clone();
    let condition = move |record: &mut [u8]| check(&shape.columns_of(record, fields));
    handler.cursor.push_condition(session, index, &columns(fields), Box::new(condition))
}

#[test]
fn rows_whose_entries_do_not_meet_the_condition_are_passed_over_in_both_directions() {
    let (mut handler, mut session) = filled();
    let odd = |values: &[V]| if values[1] == text("oDD") { Verdict::Take } else { Verdict::Skip };
    let pushed = push(&mut handler, &session, BY_NUMBER_AND_NAME, &[1, 2], odd);
    assert_eq!(pushed, Pushed::WithRange);
    let mut expected: Vec<Vec<V>> = (0..20).filter(|id| id % 2 == 1).map(row).collect();
    expected
        .sort_by_key(|row| (if let V::I(number) = row[1] { number } else { -1 }, format!("{:?}", row[0])));
    let mut found = handler.scan(&mut session, Some(BY_NUMBER_AND_NAME));
    let mut back = handler.scan_back(&mut session, Some(BY_NUMBER_AND_NAME));
    back.reverse();
    assert_eq!(found, back);
    found.sort_by_key(|row| (if let V::I(number) = row[1] { number } else { -1 }, format!("{:?}", row[0])));
    assert_eq!(found, expected);
    assert!(handler.read(&mut session, BY_NUMBER_AND_NAME, &[V::I(2)], ReadFlag::Exact).is_some());
    handler.cursor.stop();
    assert_eq!(
        session.store().rows_spared(),
        10 + 10 + 2,
        "each way, and those before the first odd one of 2"
    );

    assert_eq!(handler.scan(&mut session, None).len(), 20, "other ways to the rows do not ask");
    assert_eq!(handler.scan(&mut session, Some(BY_CODE)).len(), 20);
    handler.cursor.clear_condition();
    assert_eq!(handler.scan(&mut session, Some(BY_NUMBER_AND_NAME)).len(), 20);
}

#[test]
fn a_unique_look_up_asks_too() {
    let (mut handler, mut session) = filled();
    let not_70 = |values: &[V]| if values[0] == V::I(70) { Verdict::Skip } else { Verdict::Take };
    assert_eq!(push(&mut handler, &session, BY_CODE, &[3], not_70), Pushed::WithRange);
    assert_eq!(handler.read(&mut session, BY_CODE, &[V::I(70)], ReadFlag::Exact), None);
    assert_eq!(handler.read(&mut session, BY_CODE, &[V::I(80)], ReadFlag::Exact), Some(row(8)));
}

#[test]
fn an_entry_beyond_the_end_ends_the_read_and_a_kill_fails_it() {
    let (mut handler, mut session) = filled();
    let below_3 = |values: &[V]| match values[0] {
        V::I(number) if number >= 3 => Verdict::PastTheEnd,
        _ => Verdict::Take,
    };
    push(&mut handler, &session, BY_NUMBER_AND_NAME, &[1], below_3);
    assert_eq!(handler.scan(&mut session, Some(BY_NUMBER_AND_NAME)).len(), 12);
    push(&mut handler, &session, BY_NUMBER_AND_NAME, &[1], |_| Verdict::Killed);
    handler.cursor.start(Some(BY_NUMBER_AND_NAME)).unwrap();
    let Err(Error::Engine(error)) = handler.cursor.first(&mut session, &mut handler.image) else {
        panic!("it was killed")
    };
    assert_eq!(error.kind(), Kind::Interrupted);
}

#[test]
fn a_condition_is_refused_where_entries_can_not_answer_it_or_locks_would_be_lost() {
    let (mut handler, mut session) = filled();
    let take = |_: &[V]| Verdict::Take;
    let refused: [(usize, &'static [usize], &str); 3] = [
        (0, &[0], "the primary key has no entries"),
        (BY_NUMBER_AND_NAME, &[1, 4], "no entry has the last column"),
        (BY_START_OF_NAME, &[2], "a prefix is not the value"),
    ];
    for (index, fields, why) in refused {
        assert_eq!(push(&mut handler, &session, index, fields, take), Pushed::Refused, "{why}");
    }
    let without = push(&mut handler, &session, BY_START_OF_NAME, &[1], take);
    assert_eq!(without, Pushed::WithoutRange, "the end of a range may be told by the prefix");
    let mut textual = create(session.store(), "d/textual", &shape(varchar(8, Text::Caseless)));
    let without = push(&mut textual, &session, BY_NUMBER_AND_NAME, &[1, 2], take);
    assert_eq!(without, Pushed::WithoutRange, "the end of a range may be told by the primary key");

    for (lock, repeatable, expected) in [
        (RowLock::Exclusive, true, Pushed::Refused),
        (RowLock::Shared, true, Pushed::Refused),
        (RowLock::Exclusive, false, Pushed::WithRange),
        (RowLock::None, true, Pushed::WithRange),
    ] {
        session.rollback();
        session.set_repeatable_read(repeatable);
        session.statement_begin();
        handler.cursor.set_lock(lock);
        let pushed = push(&mut handler, &session, BY_NUMBER_AND_NAME, &[1], take);
        assert_eq!(pushed, expected, "{lock:?}, repeatable: {repeatable}");
    }
}

/// A change of case keeps the entry's key, so the row that is locked at last is the one that the entry led to.
#[test]
fn under_a_lock_the_condition_is_asked_about_the_newest_spelling() {
    const BY_NAME: usize = 1;
    const BY_UNIQUE_NAME: usize = 2;
    let store = store();
    let shape = Shape::new(
        &[int(4), varchar(8, Text::Caseless)],
        &[unique(&[part(0)]), plain(&[part(1)]), unique(&[part(1)])],
    );
    let mut handler = create(&store, "d/t", &shape);
    let mut other = open(&store, "d/t", &shape);
    let (mut reader, mut writer) = (session(&store), session(&store));
    writer.statement_begin();
    for (id, name) in [(1, "ann"), (2, "bob"), (3, "cyd")] {
        other.insert(&mut writer, &[V::I(id), text(name)]).unwrap();
    }
    writer.commit().unwrap();
    let mut rename = |writer: &mut Session, id: i64, name: &str| {
        writer.statement_begin();
        other.cursor.set_lock(RowLock::Exclusive);
        other.read(writer, 0, &[V::I(id)], ReadFlag::Exact).unwrap();
        other.update(writer, &[V::I(id), text(name)]).unwrap();
    };
    reader.set_repeatable_read(false);
    reader.set_lock_timeout(std::time::Duration::from_secs(60));
    reader.statement_begin();
    handler.cursor.set_lock(RowLock::Exclusive);
    let lower = |values: &[V]| {
        let lower = ["ann", "bob", "cyd"].map(text).contains(&values[0]);
        if lower { Verdict::Take } else { Verdict::Skip }
    };

    assert_eq!(push(&mut handler, &reader, BY_NAME, &[1], lower), Pushed::WithRange);
    handler.cursor.start(Some(BY_NAME)).unwrap();
    assert_eq!(handler.next(&mut reader), Some(vec![V::I(1), text("ann")]));
    rename(&mut writer, 2, "BOB");
    writer.commit().unwrap();
    assert_eq!(handler.next(&mut reader), Some(vec![V::I(3), text("cyd")]), "2 is BOB by now");
    assert_eq!(handler.next(&mut reader), None);
    rename(&mut writer, 2, "bob");
    writer.commit().unwrap();
    reader.commit().unwrap();

    reader.statement_begin();
    assert_eq!(push(&mut handler, &reader, BY_UNIQUE_NAME, &[1], lower), Pushed::WithRange);
    rename(&mut writer, 2, "BOB");
    std::thread::scope(|scope| {
        let read = scope.spawn(|| handler.read(&mut reader, BY_UNIQUE_NAME, &[text("bob")], ReadFlag::Exact));
        while store.engine().status().get("locks_waiting") != Some(1) {
            assert!(!read.is_finished(), "the writer has the row");
            std::thread::yield_now();
        }
        writer.commit().unwrap();
        assert_eq!(read.join().expect("no panic"), None, "2 is BOB by now");
    });
    rename(&mut writer, 2, "bob");
    writer.commit().unwrap();
}
