//! Reads that go ahead of themselves because their rows are in the bucket alone: they find what a list of rows says, while others write.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use common::*;
use engine::{Background, Job, Settings, SimDisk};
use tables::{Pushed, ReadFlag, RowLock, Session, Store, Verdict};

const ROWS: i64 = 4000;
const ID: usize = 0;
const NAME: usize = 6;
const PAD: usize = 7;

/// What the table is told to be: its primary key is a number, text, or none that anybody sees.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Primary {
    Number,
    Text,
    Hidden,
}

fn shape(primary: Primary) -> Shape {
    let columns = [
        int(4),
        int(4).null(),
        int(2).null(),
        varchar(6, Text::Caseless).null(),
        char(3, Text::TwoLevels),
        blob(2, Text::CaselessWide).null(),
        varchar(12, Text::Caseless),
        varchar(250, Text::Binary),
    ];
    let mut keys = vec![
        unique(&[part(ID)]),
        unique(&[part(NAME)]),
        plain(&[part(1), part(2)]),
        plain(&[part(3), part(2).desc()]),
        plain(&[part(3).prefix(2), part(1)]),
        plain(&[part(4).desc(), part(5).prefix(3)]),
        unique(&[part(1), part(ID)]),
        plain(&[part(2).desc()]),
    ];
    if primary == Primary::Text {
        keys.swap(0, 1);
    }
    Shape { hidden: primary == Primary::Hidden, ..Shape::new(&columns, &keys) }
}

/// Rows by their id, each with the number of its arrival.
type Rows = BTreeMap<i64, (u64, Vec<V>)>;

/// A table in the bucket, what is in it, and who writes to it.
struct Table {
    shape: Shape,
    store: Arc<Store>,
    writer: Handler,
    session: Session,
    rows: Rows,
    arrivals: u64,
    dice: Dice,
}

fn start(bucket: &Arc<bucket::MemoryBucket>, background: Background, little: bool) -> Arc<Store> {
    let mut settings = Settings { background, memtable_bytes: 256 << 10, ..Settings::default() };
    if little {
        // Blocks are dropped almost as soon as they were read.
        settings.memory_bytes = 4 << 20;
        settings.disk_cache_bytes = 64 << 10;
    }
    settings.shape.sst_bytes = 24 << 10;
    settings.shape.level_base_bytes = 256 << 10;
    store_on(Arc::clone(bucket) as Arc<dyn bucket::Bucket>, SimDisk::new(1), settings)
}

impl Table {
    fn row(&mut self, id: i64) -> Vec<V> {
        let dice = &mut self.dice;
        let columns = &self.shape.columns;
        let mut row: Vec<V> = columns.iter().map(|column| dice.value(column, 30)).collect();
        row[ID] = V::I(id);
        row[NAME] = text(&format!("{}{id}", if dice.one_in(2) { "k" } else { "K" }));
        // Does not pack.
        row[PAD] = V::B((0..100 + dice.below(100)).map(|_| dice.below(256) as u8).collect());
        row
    }

    fn id_key(&self) -> usize {
        let is_id = |key: &Key| key.parts.len() == 1 && key.parts[0].field == ID;
        self.shape.keys.iter().position(is_id).unwrap()
    }

    /// Inserts, updates or deletes one row.
    fn write(&mut self) {
        let id = self.dice.below(ROWS as u64 * 2) as i64;
        let new = self.row(id);
        let key = self.id_key();
        let found = self.writer.read(&mut self.session, key, &[V::I(id)], ReadFlag::Exact);
        assert_eq!(found.as_ref(), self.rows.get(&id).map(|(_, row)| row));
        match self.rows.get_mut(&id) {
            None => {
                self.writer.insert(&mut self.session, &new).unwrap();
                self.rows.insert(id, (self.arrivals, new));
                self.arrivals += 1;
            }
            Some(_) if self.dice.one_in(3) => {
                self.writer.cursor.delete(&mut self.session).unwrap();
                self.rows.remove(&id);
            }
            Some((_, row)) => {
                let mut changed = row.clone();
                let fields: Vec<usize> = (1..PAD).filter(|_| self.dice.one_in(2)).collect();
                fields.into_iter().for_each(|field| changed[field] = new[field].clone());
                *row = changed;
                self.writer.update(&mut self.session, row).unwrap();
            }
        }
    }

    fn write_some(&mut self, most: u64) {
        self.session.statement_begin();
        (0..1 + self.dice.below(most)).for_each(|_| self.write());
        self.session.commit().unwrap();
    }

    /// What else goes on while somebody reads.
    fn disturb(&mut self, background: Background) {
        if self.dice.one_in(30) {
            self.write_some(5);
        }
        if background == Background::Manual && self.dice.one_in(300) {
            for job in [Job::Freeze, Job::Flush, Job::Publish, Job::Compact, Job::Publish] {
                self.store.engine().step(job).unwrap();
            }
        }
    }

    fn counter(&self, name: &str) -> u64 {
        self.store.engine().status().get(name).unwrap()
    }
}

fn filled(bucket: &Arc<bucket::MemoryBucket>, primary: Primary, seed: u64) -> (Rows, u64) {
    let store = start(bucket, Background::Manual, false);
    let shape = shape(primary);
    let mut table = Table {
        writer: create(&store, "d/t", &shape),
        session: session(&store),
        shape,
        rows: Rows::new(),
        arrivals: 0,
        dice: Dice::new(seed),
        store,
    };
    table.writer.cursor.set_lock(RowLock::Exclusive);
    let mut ids: Vec<i64> = (0..ROWS).collect();
    table.dice.shuffle(&mut ids);
    for some in ids.chunks(1000) {
        table.session.statement_begin();
        for id in some {
            if table.rows.contains_key(id) {
                continue;
            }
            let row = table.row(*id);
            table.writer.insert(&mut table.session, &row).unwrap();
            table.rows.insert(*id, (table.arrivals, row));
            table.arrivals += 1;
        }
        table.session.commit().unwrap();
        table.write_some(200);
        for job in [Job::Freeze, Job::Flush, Job::Publish, Job::Compact] {
            while table.store.engine().step(job).unwrap() {}
        }
    }
    table.session.rollback();
    while table.store.engine().step(Job::Publish).unwrap() {}
    let Table { rows, arrivals, store, writer, session, .. } = table;
    drop((writer, session));
    stop(store);
    (rows, arrivals)
}

/// A range of an index, in one direction, with a condition that entries answer.
#[derive(Debug)]
struct Query {
    key: usize,
    /// How many of the probe's values there are to compare with.
    parts: usize,
    probe: Vec<V>,
    flag: ReadFlag,
    /// By steps that stay with the tuple.
    same: bool,
    limit: usize,
    condition: Option<Wanted>,
}

/// Of an entry: a column is (not) above a value; and where the first column is beyond another, nothing that follows is wanted.
#[derive(Clone, Debug)]
struct Wanted {
    field: usize,
    value: V,
    above: bool,
    end: Option<V>,
}

impl Query {
    fn any(shape: &Shape, rows: &Rows, dice: &mut Dice) -> Self {
        use ReadFlag::*;
        let key = dice.index(shape.keys.len());
        let known = |dice: &mut Dice| {
            let from = dice.below(ROWS as u64 * 2) as i64;
            let near = rows.range(from..).next().or(rows.iter().next());
            near.map(|(_, (_, row))| row.clone()).unwrap()
        };
        let probe = known(dice);
        let parts = 1 + dice.index(shape.keys[key].parts.len());
        let flag =
            *dice.of(&[Exact, Exact, OrNext, After, OrPrev, Before, Prefix, PrefixLast, PrefixLastOrPrev]);
        let whole: Vec<usize> = shape.keys[key]
            .parts
            .iter()
            .filter(|part| part.prefix.is_none())
            .map(|part| part.field)
            .collect();
        let has_entries = shape.hidden || key > 0;
        let condition = (has_entries && !whole.is_empty() && dice.one_in(2)).then(|| {
            let field = *dice.of(&whole);
            let end = (dice.one_in(3) && shape.keys[key].parts[0].prefix.is_none())
                .then(|| known(dice)[shape.keys[key].parts[0].field].clone());
            Wanted { field, value: known(dice)[field].clone(), above: dice.one_in(2), end }
        });
        let same = matches!(flag, Exact | Prefix) && dice.one_in(2);
        Self { key, parts, probe, flag, same, limit: 1 + dice.index(400), condition }
    }

    fn backward(&self) -> bool {
        use ReadFlag::*;
        matches!(self.flag, OrPrev | Before | PrefixLast | PrefixLastOrPrev)
    }

    fn verdict(&self, shape: &Shape, row: &[V]) -> Verdict {
        let Some(wanted) = &self.condition else { return Verdict::Take };
        wanted.verdict(
            shape,
            self.key,
            self.backward(),
            &row[wanted.field],
            &row[shape.keys[self.key].parts[0].field],
        )
    }

    /// What the rows say.
    fn expected(&self, shape: &Shape, rows: &Rows) -> Vec<Vec<V>> {
        use ReadFlag::*;
        let place = |row: &[V]| shape.compare_parts(self.key, self.parts, row, &self.probe);
        let inside = |order: Ordering| match self.flag {
            Exact | Prefix if self.same => order.is_eq(),
            Exact | Prefix | OrNext => order.is_ge(),
            After => order.is_gt(),
            OrPrev | PrefixLast | PrefixLastOrPrev => order.is_le(),
            Before => order.is_lt(),
        };
        let mut found: Vec<&(u64, Vec<V>)> = rows.values().filter(|(_, row)| inside(place(row))).collect();
        found.sort_by(|a, b| {
            let by_key = shape.compare_parts(self.key, usize::MAX, &a.1, &b.1);
            by_key.then_with(|| match shape.hidden {
                true => a.0.cmp(&b.0),
                false => shape.compare_parts(0, usize::MAX, &a.1, &b.1),
            })
        });
        if self.backward() {
            found.reverse();
        }
        // The first one has to be there, and wanted.
        let of_tuple = matches!(self.flag, Exact | Prefix | PrefixLast);
        let in_tuple = found.iter().filter(|(_, row)| place(row).is_eq());
        let first =
            in_tuple.map(|(_, row)| self.verdict(shape, row)).find(|verdict| *verdict != Verdict::Skip);
        if of_tuple && first != Some(Verdict::Take) {
            return Vec::new();
        }
        found
            .into_iter()
            .map(|(_, row)| (self.verdict(shape, row), row))
            .take_while(|(verdict, _)| *verdict != Verdict::PastTheEnd)
            .filter(|(verdict, _)| *verdict == Verdict::Take)
            .map(|(_, row)| row.clone())
            .take(self.limit)
            .collect()
    }
}

impl Wanted {
    fn verdict(&self, shape: &Shape, key: usize, backward: bool, value: &V, first: &V) -> Verdict {
        let part = &shape.keys[key].parts[0];
        if let Some(end) = &self.end {
            let order = shape.columns[part.field].compare(first, end);
            let beyond = if part.descending == backward { order.is_gt() } else { order.is_lt() };
            if beyond {
                return Verdict::PastTheEnd;
            }
        }
        let above = shape.columns[self.field].compare(value, &self.value).is_gt();
        if above == self.above { Verdict::Take } else { Verdict::Skip }
    }
}

fn bits(fields: impl IntoIterator<Item = usize>) -> [u8; 1] {
    [fields.into_iter().fold(0, |bits, field| bits | 1 << field)]
}

/// One who reads, with two handlers as the server has them for batches.
struct Reader {
    t: Handler,
    rows: Handler,
    session: Session,
    background: Background,
}

impl Reader {
    /// Goes through the range; `each` is shown the handler on each row.
    fn read(&mut self, table: &mut Table, query: &Query, mut each: impl FnMut(&mut Handler)) {
        let Self { t, session, background, .. } = self;
        let shape = t.shape.clone();
        t.cursor.clear_condition();
        if let Some(wanted) = query.condition.clone() {
            let (key, backward, shape) = (query.key, query.backward(), shape.clone());
            let first = wanted.end.as_ref().map(|_| shape.keys[key].parts[0].field);
            let fields: Vec<usize> = [wanted.field].into_iter().chain(first).collect();
            let columns = bits(fields.iter().copied());
            let check = move |record: &mut [u8]| {
                let values = shape.columns_of(record, &fields);
                wanted.verdict(&shape, key, backward, &values[0], &values[fields.len() - 1])
            };
            let pushed = t.cursor.push_condition(session, key, &columns, Box::new(check));
            assert_ne!(pushed, Pushed::Refused, "{query:?}");
        }
        t.cursor.start(Some(query.key)).unwrap();
        let tuple = shape.tuple(query.key, &parts_of(&shape, query.key, query.parts, &query.probe));
        let mut found = t.cursor.read(session, &tuple, query.flag, &mut t.image).unwrap();
        for _ in 0..query.limit {
            if !found {
                break;
            }
            each(t);
            table.disturb(*background);
            found = match (query.backward(), query.same) {
                (true, _) => t.cursor.prev(session, &mut t.image).unwrap(),
                (false, false) => t.cursor.next(session, &mut t.image).unwrap(),
                (false, true) => t.cursor.next_same(session, &tuple, &mut t.image).unwrap(),
            };
        }
        t.cursor.stop();
    }

    fn range(&mut self, table: &mut Table, rows: &Rows) {
        let query = Query::any(&table.shape, rows, &mut table.dice);
        let columns: Vec<usize> = (0..=PAD).filter(|_| !table.dice.one_in(3)).collect();
        self.t.cursor.set_columns(Some(&bits(columns.iter().copied())));
        self.t.cursor.set_key_only(table.dice.one_in(4));
        let mut found = Vec::new();
        self.read(table, &query, |t| found.push(t.shape.columns_of(&t.image, &columns)));
        self.t.cursor.set_key_only(false);
        self.t.cursor.set_columns(None);
        let expected = query.expected(&table.shape, rows);
        let chosen = |row: &Vec<V>| columns.iter().map(|field| row[*field].clone()).collect::<Vec<V>>();
        let expected: Vec<Vec<V>> = expected.iter().map(chosen).collect();
        assert!(found == expected, "{} rows, not {}: {query:?}", found.len(), expected.len());
    }

    /// Positions first, then their rows, mostly in primary order.
    fn batch_of_positions(&mut self, table: &mut Table, rows: &Rows) {
        let query = Query::any(&table.shape, rows, &mut table.dice);
        let mut positions = Vec::new();
        let length = self.t.table.position_length();
        self.t.cursor.set_positions_only(true);
        self.read(table, &query, |t| {
            let mut position = vec![0; length];
            t.cursor.position(&mut position);
            positions.push(position);
        });
        self.t.cursor.set_positions_only(false);
        let expected = query.expected(&table.shape, rows);
        assert_eq!(positions.len(), expected.len(), "{query:?}");
        let mut batch: Vec<_> = positions.into_iter().zip(expected).collect();
        match table.dice.below(4) {
            0 => table.dice.shuffle(&mut batch),
            _ => batch.sort_by(|a, b| a.0.cmp(&b.0)),
        }
        let Self { rows: t, session, background, .. } = self;
        batch.iter().for_each(|(position, _)| t.cursor.note_position(position));
        for (position, row) in &batch {
            if table.dice.one_in(20) {
                continue;
            }
            let found = t.cursor.read_position(session, position, &mut t.image).unwrap();
            assert_eq!(t.found(found).as_ref(), Some(row), "{query:?}");
            table.disturb(*background);
        }
        t.cursor.stop();
    }

    /// Primary keys, some of which nobody has.
    fn batch_of_keys(&mut self, table: &mut Table, rows: &Rows) {
        let (shape, dice) = (table.shape.clone(), &mut table.dice);
        let mut ids: Vec<i64> =
            (0..1 + dice.below(400)).map(|_| dice.below(ROWS as u64 * 2) as i64).collect();
        if !dice.one_in(4) {
            ids.sort_unstable();
        }
        let Self { rows: t, session, background, .. } = self;
        let tuple = |id: i64| {
            let known = rows.get(&id).map_or_else(|| text(&format!("k{id}")), |(_, row)| row[NAME].clone());
            let value = if shape.keys[0].parts[0].field == ID { V::I(id) } else { known };
            shape.tuple(0, &[value])
        };
        t.cursor.start(Some(0)).unwrap();
        ids.iter().for_each(|id| t.cursor.note_key(0, &tuple(*id)));
        for id in &ids {
            let found = t.cursor.read(session, &tuple(*id), ReadFlag::Exact, &mut t.image).unwrap();
            assert_eq!(t.found(found).as_ref(), rows.get(id).map(|(_, row)| row));
            table.disturb(*background);
        }
        t.cursor.stop();
    }
}

/// The first values of a key, as a tuple has them.
fn parts_of(shape: &Shape, key: usize, parts: usize, row: &[V]) -> Vec<V> {
    let parts = shape.keys[key].parts.iter().take(parts);
    parts.map(|part| shape.columns[part.field].cut(&row[part.field], part.prefix)).collect()
}

fn check(primary: Primary, background: Background, seed: u64) {
    let bucket = Arc::new(bucket::MemoryBucket::new());
    let (mut rows, mut arrivals) = filled(&bucket, primary, seed);
    // Each time on a machine that has nothing yet.
    for life in 0..3 {
        let store = start(&bucket, background, true);
        let shape = shape(primary);
        let mut table = Table {
            writer: open(&store, "d/t", &shape),
            session: session(&store),
            shape: shape.clone(),
            rows,
            arrivals,
            dice: Dice::new(seed * 10 + life),
            store: Arc::clone(&store),
        };
        table.writer.cursor.set_lock(RowLock::Exclusive);
        let mut reader = Reader {
            t: open(&store, "d/t", &shape),
            rows: open(&store, "d/t", &shape),
            session: session(&store),
            background,
        };
        let (mut by_scans, mut by_batches) = (0, 0);
        for _ in 0..12 {
            let repeatable = table.dice.one_in(2);
            reader.session.set_repeatable_read(repeatable);
            let mut snapshot = None;
            for _ in 0..3 {
                reader.session.statement_begin();
                if snapshot.is_none() || !repeatable {
                    if repeatable {
                        reader.session.snapshot_now();
                    }
                    snapshot = Some(table.rows.clone());
                }
                let seen = snapshot.as_ref().unwrap();
                let before = table.counter("prefetched");
                match table.dice.below(4) {
                    0 if primary != Primary::Hidden => reader.batch_of_keys(&mut table, seen),
                    1 => reader.batch_of_positions(&mut table, seen),
                    _ => {
                        reader.range(&mut table, seen);
                        by_scans += table.counter("prefetched") - before;
                        continue;
                    }
                }
                by_batches += table.counter("prefetched") - before;
            }
            reader.session.commit().unwrap();
        }
        // Three times as much at least, when this was written.
        let (spared, missed) = (store.rows_spared(), table.counter("block_cache_misses"));
        let fetched = format!("{by_scans} pieces fetched ahead by scans and {by_batches} by batches");
        assert!(by_scans > 500 && by_batches > 100, "{primary:?}, life {life}: {fetched}");
        assert!(
            spared > 800 && missed > 1000,
            "{primary:?}, life {life}: {spared} rows spared, {missed} misses"
        );
        (rows, arrivals) = (std::mem::take(&mut table.rows), table.arrivals);
        table.session.rollback();
        drop((table, reader));
        stop(store);
    }
}

#[test]
fn cold_reads_by_a_number_find_what_there_is() {
    check(Primary::Number, Background::Manual, 1);
}

#[test]
fn cold_reads_by_text_find_what_there_is() {
    check(Primary::Text, Background::Manual, 2);
}

#[test]
fn cold_reads_without_a_primary_key_find_what_there_is() {
    check(Primary::Hidden, Background::Manual, 3);
}

#[test]
fn cold_reads_beside_threads_find_what_there_is() {
    check(Primary::Number, Background::Threads, 4);
}
