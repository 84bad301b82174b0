//! Random statements on tables of several shapes, compared with a list of rows that is sorted anew for each question.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::cmp::Ordering;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use common::*;
use engine::Job;
use proptest::prelude::*;
use tables::{Error, Kind, ReadFlag, RowLock, Session, Store};

#[derive(Clone, Debug)]
enum Op {
    Insert(Vec<V>),
    /// Of the n-th row, found as the number says.
    Update(usize, u8, Vec<V>),
    Delete(usize, u8),
    /// Key, how many parts, flag, probe, and steps from there.
    Read(usize, usize, u8, Vec<V>, Vec<bool>),
    Same(usize, usize, Vec<V>),
    Covered(usize),
    StatementEnds,
    StatementFails,
    Commit,
    Rollback,
    /// What was committed goes to a run of its own.
    Flush,
}

/// A row and the number of its arrival.
type Row = (u64, Vec<V>);

#[derive(Clone, Debug, Default)]
struct Model {
    rows: Vec<Row>,
    arrivals: u64,
}

impl Model {
    fn order(shape: &Shape, key: Option<usize>, a: &Row, b: &Row) -> Ordering {
        let by_key = key.map_or(Ordering::Equal, |key| shape.compare_parts(key, usize::MAX, &a.1, &b.1));
        by_key.then_with(|| match shape.hidden {
            true => a.0.cmp(&b.0),
            false => shape.compare_parts(0, usize::MAX, &a.1, &b.1),
        })
    }
    fn sorted(&self, shape: &Shape, key: Option<usize>) -> Vec<Row> {
        let mut rows = self.rows.clone();
        rows.sort_by(|a, b| Self::order(shape, key, a, b));
        rows
    }
    /// The first unique key that `row` would break, and the row that has its value.
    fn duplicate(&self, shape: &Shape, row: &[V], except: Option<u64>) -> Option<(usize, Vec<V>)> {
        shape.keys.iter().enumerate().filter(|(_, key)| key.unique).find_map(|(number, key)| {
            let null = key.parts.iter().any(|part| row[part.field] == V::Null);
            let others = self.rows.iter().filter(|other| Some(other.0) != except && !null);
            let mut same = others
                .filter(|other| shape.compare_parts(number, usize::MAX, &other.1, row) == Ordering::Equal);
            same.next().map(|other| (number, other.1.clone()))
        })
    }
}

/// The parts of a key as the server may use them: the user's, then the primary key's.
fn extended(shape: &Shape, key: usize) -> Vec<Part> {
    let mut parts = shape.keys[key].parts.clone();
    if !shape.hidden && key > 0 && shape.extended {
        let primary = &shape.keys[0].parts;
        let missing = primary.iter().filter(|part| {
            !shape.keys[key].parts.iter().any(|own| own.field == part.field && own.prefix.is_none())
        });
        parts.extend(missing.copied());
    }
    parts
}

struct Run {
    t: Handler,
    other: Handler,
    session: Session,
    model: Model,
    statement: Model,
    committed: Model,
}

impl Run {
    fn new(shape: &Shape) -> Self {
        // One engine for all cases: to open one takes longer than to run a case.
        static STORE: OnceLock<Arc<Store>> = OnceLock::new();
        static TABLES: AtomicU64 = AtomicU64::new(0);
        let store = STORE.get_or_init(store);
        let path = format!("d/t{}", TABLES.fetch_add(1, Relaxed));
        let t = create(store, &path, shape);
        let other = open(store, &path, shape);
        let mut session = session(store);
        session.statement_begin();
        Self {
            t,
            other,
            session,
            model: Model::default(),
            statement: Model::default(),
            committed: Model::default(),
        }
    }

    fn apply(&mut self, op: &Op) {
        let shape = self.t.shape.clone();
        match op {
            Op::Insert(row) => self.insert(&shape, row),
            Op::Update(n, how, row) => self.update(&shape, *n, *how, row),
            Op::Delete(n, how) => {
                if let Some(row) = self.find(&shape, *n, *how) {
                    self.t.cursor.delete(&mut self.session).unwrap();
                    self.model.rows.retain(|other| other.0 != row.0);
                }
            }
            Op::Read(key, parts, flag, probe, steps) => self.read(&shape, *key, *parts, *flag, probe, steps),
            Op::Same(key, parts, probe) => self.read_same(&shape, *key, *parts, probe),
            Op::Covered(key) => self.covered(&shape, *key),
            Op::StatementEnds => {
                self.statement = self.model.clone();
                self.session.statement_begin();
            }
            Op::StatementFails => {
                self.session.statement_rollback();
                self.model.rows = self.statement.rows.clone();
            }
            Op::Commit => {
                self.session.commit().unwrap();
                self.committed = self.model.clone();
                self.statement = self.model.clone();
                self.session.statement_begin();
            }
            Op::Rollback => {
                self.session.rollback();
                self.model.rows = self.committed.rows.clone();
                self.statement = self.model.clone();
                self.session.statement_begin();
            }
            Op::Flush => {
                let engine = self.session.store().engine();
                engine.step(Job::Freeze).unwrap();
                engine.step(Job::Flush).unwrap();
            }
        }
    }

    fn insert(&mut self, shape: &Shape, row: &[V]) {
        let got = self.t.insert(&mut self.session, row);
        match self.model.duplicate(shape, row, None) {
            None => {
                got.unwrap();
                self.model.arrivals += 1;
                self.model.rows.push((self.model.arrivals, row.to_vec()));
            }
            Some(expected) => self.expect_duplicate(got, expected),
        }
    }

    fn expect_duplicate(&mut self, got: tables::Result<()>, (key, row): (usize, Vec<V>)) {
        match got {
            Err(Error::Duplicate { key: named }) => assert_eq!(named, key),
            other => panic!("key {key} is taken by {row:?}, but: {other:?}"),
        }
        let mut position = vec![0; self.t.table.position_length()];
        self.t.cursor.duplicate_position(&mut position);
        let found =
            self.other.cursor.read_position(&mut self.session, &position, &mut self.other.image).unwrap();
        assert_eq!(self.other.found(found), Some(row));
    }

    /// Makes the n-th row current, by a scan, a key, or its position.
    fn find(&mut self, shape: &Shape, n: usize, how: u8) -> Option<Row> {
        let row = self.model.rows.get(n % self.model.rows.len().max(1))?.clone();
        let lock = [RowLock::None, RowLock::Shared, RowLock::Exclusive][usize::from(how) % 3];
        self.t.cursor.set_lock(lock);
        let key = (usize::from(how) / 3) % (shape.keys.len() + 1);
        self.t.cursor.start((key < shape.keys.len()).then_some(key)).unwrap();
        let mut at = self.t.next(&mut self.session);
        // Rows of a hidden primary key may be equal: the model finds the one that came first.
        let twin = |found: &Vec<V>| *found == row.1;
        while !twin(at.as_ref().expect("the row is there")) {
            at = self.t.next(&mut self.session);
        }
        if how % 2 == 1 {
            let mut position = vec![0; self.t.table.position_length()];
            self.t.cursor.position(&mut position);
            assert!(self.t.cursor.read_position(&mut self.session, &position, &mut self.t.image).unwrap());
            assert_eq!(self.t.shape.row(&self.t.image), row.1);
        }
        self.t.cursor.set_lock(RowLock::None);
        let mut twins: Vec<&Row> = self.model.rows.iter().filter(|other| other.1 == row.1).collect();
        twins.sort();
        Some(twins[0].clone())
    }

    fn update(&mut self, shape: &Shape, n: usize, how: u8, row: &[V]) {
        let Some(before) = self.find(shape, n, how) else { return };
        // Now and then only one column changes.
        let mut after = row.to_vec();
        if !how.is_multiple_of(4) {
            let one = usize::from(how) % row.len();
            after = before.1.clone();
            after[one] = row[one].clone();
        }
        let got = self.t.update(&mut self.session, &after);
        match self.model.duplicate(shape, &after, Some(before.0)) {
            None => {
                got.unwrap();
                let at = self.model.rows.iter().position(|other| other.0 == before.0).unwrap();
                self.model.rows[at].1 = after;
            }
            Some(expected) => self.expect_duplicate(got, expected),
        }
    }

    fn read(&mut self, shape: &Shape, key: usize, parts: usize, flag: u8, probe: &[V], steps: &[bool]) {
        use ReadFlag::*;
        let key = key % shape.keys.len();
        let all = extended(shape, key);
        let parts = &all[..parts % all.len() + 1];
        let flag = ReadFlag::from_server(u32::from(flag) % 8).unwrap();
        let values: Vec<V> = parts.iter().map(|part| probe[part.field].clone()).collect();
        let rows = self.model.sorted(shape, Some(key));
        let order = |row: &Row| {
            parts.iter().fold(Ordering::Equal, |order, part| {
                order.then_with(|| shape.compare_part(part, &row.1, probe))
            })
        };
        let expected = match flag {
            Exact | Prefix => rows.iter().position(|row| order(row).is_eq()),
            OrNext => rows.iter().position(|row| order(row).is_ge()),
            After => rows.iter().position(|row| order(row).is_gt()),
            OrPrev | PrefixLastOrPrev => rows.iter().rposition(|row| order(row).is_le()),
            Before => rows.iter().rposition(|row| order(row).is_lt()),
            PrefixLast => rows.iter().rposition(|row| order(row).is_eq()),
        };
        let got = self.t.read(&mut self.session, key, &values, flag);
        assert_eq!(got.as_ref(), expected.map(|at| &rows[at].1), "{flag:?} {values:?} in key {key}");
        let Some(mut at) = expected else { return };
        for forward in steps {
            let to =
                if *forward { at.checked_add(1).filter(|at| *at < rows.len()) } else { at.checked_sub(1) };
            let got = if *forward { self.t.next(&mut self.session) } else { self.t.prev(&mut self.session) };
            assert_eq!(got.as_ref(), to.map(|to| &rows[to].1), "a step from {:?}", rows[at]);
            let Some(to) = to else { return };
            at = to;
        }
    }

    fn read_same(&mut self, shape: &Shape, key: usize, parts: usize, probe: &[V]) {
        let key = key % shape.keys.len();
        let own = &shape.keys[key].parts;
        let parts = parts % own.len() + 1;
        let values: Vec<V> = own[..parts].iter().map(|part| probe[part.field].clone()).collect();
        let rows = self.model.sorted(shape, Some(key));
        let expected: Vec<Vec<V>> = rows
            .into_iter()
            .filter(|row| shape.compare_parts(key, parts, &row.1, probe).is_eq())
            .map(|row| row.1)
            .collect();
        let tuple = shape.tuple(key, &values);
        let mut got = Vec::new();
        let mut at = self.t.read(&mut self.session, key, &values, ReadFlag::Exact);
        while let Some(row) = at {
            got.push(row);
            let found = self.t.cursor.next_same(&mut self.session, &tuple, &mut self.t.image).unwrap();
            at = self.t.found(found);
        }
        assert_eq!(got, expected);
    }

    /// Reads the columns of a key (and those of the primary key) from the index alone, and then the rows at the positions that were met.
    fn covered(&mut self, shape: &Shape, key: usize) {
        let key = key % shape.keys.len();
        let primary = if shape.hidden { &[][..] } else { &shape.keys[0].parts };
        let fields: Vec<usize> = shape.keys[key].parts.iter().chain(primary).map(|part| part.field).collect();
        let mut bits = vec![0u8; shape.columns.len() / 8 + 1];
        fields.iter().for_each(|field| bits[field / 8] |= 1 << (field % 8));
        self.t.cursor.set_columns(Some(&bits));
        self.t.cursor.set_key_only(true);
        self.t.cursor.start(Some(key)).unwrap();
        let (mut got, mut positions) = (Vec::new(), Vec::new());
        let mut position = vec![0; self.t.table.position_length()];
        while self.t.cursor.next(&mut self.session, &mut self.t.image).unwrap() {
            got.push(shape.columns_of(&self.t.image, &fields));
            self.t.cursor.position(&mut position);
            positions.push(position.clone());
            if positions.len() == self.model.rows.len() {
                break;
            }
        }
        self.t.cursor.stop();
        self.t.cursor.position(&mut position);
        assert!(positions.last().is_none_or(|last| *last == position), "the last row stays the current one");
        self.t.cursor.set_key_only(false);
        self.t.cursor.set_columns(None);
        let pick = |row: &Vec<V>| fields.iter().map(|field| row[*field].clone()).collect::<Vec<V>>();
        let rows = self.model.sorted(shape, Some(key));
        assert_eq!(got, rows.iter().map(|row| pick(&row.1)).collect::<Vec<_>>());
        for (position, row) in positions.iter().zip(&rows) {
            let found =
                self.other.cursor.read_position(&mut self.session, position, &mut self.other.image).unwrap();
            assert_eq!(self.other.found(found).as_ref(), Some(&row.1));
        }
    }

    fn compare_everything(&mut self) {
        let shape = self.t.shape.clone();
        let rows = self.model.sorted(&shape, None).len() as u64;
        assert_eq!(self.t.cursor.count(&mut self.session).unwrap(), Some(rows), "counted without reading");
        for key in std::iter::once(None).chain((0..shape.keys.len()).map(Some)) {
            let mut expected: Vec<Vec<V>> =
                self.model.sorted(&shape, key).into_iter().map(|row| row.1).collect();
            assert_eq!(self.t.scan(&mut self.session, key), expected, "forward by {key:?}");
            expected.reverse();
            assert_eq!(self.t.scan_back(&mut self.session, key), expected, "backward by {key:?}");
        }
    }
}

impl Eq for V {}
impl PartialOrd for V {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for V {
    fn cmp(&self, _: &Self) -> Ordering {
        // Only ever asked of rows that are equal.
        Ordering::Equal
    }
}

fn any_value(column: Column) -> BoxedStrategy<V> {
    let letters = prop::sample::select(vec![b'a', b'A', b'b', b' ', b'\t', 0u8]);
    let bytes = prop::collection::vec(letters, 0..3);
    let some = match column.kind {
        Kind::Int => (-3i64..4).prop_map(V::I).boxed(),
        Kind::UInt => (0u64..6).prop_map(V::U).boxed(),
        Kind::Float => prop::sample::select(vec![V::F(0.0), V::F(1.5), V::F(-2.0)]).boxed(),
        Kind::Double => prop::sample::select(vec![V::D(0.0), V::D(1.5), V::D(-1e10)]).boxed(),
        Kind::Fixed => prop::collection::vec(0u8..3, column.bytes as usize).prop_map(V::B).boxed(),
        Kind::Char => bytes
            .prop_map(|bytes| {
                V::B(
                    bytes[..bytes.iter().rposition(|byte| *byte != b' ').map_or(0, |last| last + 1)].to_vec(),
                )
            })
            .boxed(),
        Kind::VarChar => bytes.prop_map(V::B).boxed(),
        Kind::Blob => {
            prop_oneof![3 => bytes, 1 => prop::collection::vec(0u8..4, 0..400)].prop_map(V::B).boxed()
        }
    };
    if column.nullable { prop_oneof![1 => Just(V::Null), 3 => some].boxed() } else { some }
}

fn any_op(columns: &[Column]) -> impl Strategy<Value = Op> + use<> {
    let row = columns.iter().map(|column| any_value(*column)).collect::<Vec<_>>();
    let probe = row.clone();
    let steps = prop::collection::vec(any::<bool>(), 0..4);
    prop_oneof![
        8 => row.clone().prop_map(Op::Insert),
        4 => (any::<u8>(), any::<u8>(), row.clone()).prop_map(|(n, how, row)| Op::Update(n.into(), how, row)),
        2 => (any::<u8>(), any::<u8>()).prop_map(|(n, how)| Op::Delete(n.into(), how)),
        8 => (0usize..6, 0usize..4, 0u8..8, probe, steps)
            .prop_map(|(key, parts, flag, probe, steps)| Op::Read(key, parts, flag, probe, steps)),
        2 => (0usize..6, 0usize..4, row).prop_map(|(key, parts, probe)| Op::Same(key, parts, probe)),
        1 => (0usize..6).prop_map(Op::Covered),
        2 => Just(Op::StatementEnds),
        1 => Just(Op::StatementFails),
        1 => Just(Op::Commit),
        1 => Just(Op::Rollback),
    ]
}

fn shapes() -> Vec<Shape> {
    let numbers = Shape::new(
        &[int(4), uint(1).null(), double().null(), fixed(2)],
        &[
            unique(&[part(0)]),
            plain(&[part(1), part(2).desc()]),
            unique(&[part(3), part(1)]),
            plain(&[part(0), part(3)]),
            plain(&[part(2)]),
        ],
    );
    let texts = Shape::new(
        &[
            varchar(10, Text::Caseless),
            char(4, Text::BinaryPadded).null(),
            varchar(300, Text::CaselessWide).null(),
            blob(2, Text::Caseless).null(),
            int(8),
            varchar(5, Text::Binary),
        ],
        &[
            unique(&[part(0), part(4)]),
            unique(&[part(2).desc()]),
            plain(&[part(1), part(0)]),
            plain(&[part(3).prefix(1), part(5)]),
            plain(&[part(2).prefix(1).desc(), part(4).desc()]),
            unique(&[part(5), part(4)]),
        ],
    );
    let hidden = Shape::hidden(
        &[
            int(2).null(),
            char(3, Text::Caseless),
            varchar(6, Text::CaselessNoPad).null(),
            blob(4, Text::Binary),
        ],
        &[
            plain(&[part(0)]),
            unique(&[part(1).desc(), part(0)]),
            plain(&[part(2)]),
            plain(&[part(3).prefix(2)]),
        ],
    );
    let reversed = Shape::new(
        &[int(3), varchar(4, Text::BinaryPadded), char(5, Text::TwoLevels), float(), uint(8)],
        &[
            unique(&[part(4).desc(), part(1)]),
            plain(&[part(2).desc()]),
            plain(&[part(3).desc(), part(0)]),
            unique(&[part(0), part(1), part(4)]),
        ],
    );
    vec![numbers, texts, hidden, reversed]
}

fn check(shape: &Shape, ops: &[Op]) {
    let mut run = Run::new(shape);
    for op in ops {
        run.apply(op);
    }
    run.compare_everything();
    run.session.commit().unwrap();
    assert_eq!(run.t.table.row_count(), run.model.rows.len() as u64);
    run.compare_everything();
}

macro_rules! agrees {
    ($($name:ident: $number:literal),*) => {
        proptest! {
            #![proptest_config(ProptestConfig {
                max_shrink_iters: 2000,
                failure_persistence: None,
                ..ProptestConfig::with_cases(1000)
            })]
            $(#[test]
            fn $name(ops in prop::collection::vec(any_op(&shapes()[$number].columns), 1..60)) {
                check(&shapes()[$number], &ops);
            })*
        }
    };
}

agrees! {
    a_table_of_numbers_agrees_with_the_model: 0,
    a_table_of_texts_agrees_with_the_model: 1,
    a_table_without_primary_key_agrees_with_the_model: 2,
    a_table_with_descending_keys_agrees_with_the_model: 3
}

proptest! {
    // Each flush makes a run that somebody must merge, so there are fewer cases.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]
    #[test]
    fn a_table_in_many_runs_agrees_with_the_model(
        (number, ops) in (0usize..4).prop_flat_map(|number| {
            let op = prop_oneof![12 => any_op(&shapes()[number].columns), 1 => Just(Op::Commit), 1 => Just(Op::Flush)];
            (Just(number), prop::collection::vec(op, 1..100))
        }),
    ) {
        check(&shapes()[number], &ops);
    }
}
