//! Adding and dropping indexes of a table that has rows, in place.
//!
//! * Whoever calls keeps all others from writing to the table, from before `build_indexes` to after `Store::set_indexes`; they may read.
//! * The entries of a new index are made from the newest rows, by several threads if there is much to read, sorted and loaded into a tree of its own; nobody sees it before the
//!   commit that changes the definition, which also drops the trees of indexes that go. What is given up before leaves nothing.
//! * The rows stay as they are, so a transaction whose snapshot is older than the index would miss what it should see by it: it
//!   is told that the definition has changed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::thread::available_parallelism;
use std::time::Duration;

use engine::{Cursor, Kind, Loaded, ReadAs, Sorted, TreeId};

use crate::bulk::{FEW_SHARE, Fresh, LOOK_EVERY, Progress, StreamError, in_order, load_sorted, open_load};
use crate::catalogue::Trees;
use crate::cursor::RowCursor;
use crate::layout::Layout;
use crate::rows::Parts;
use crate::table::Table;
use crate::{Descriptor, Error, Result, Session};

/// Threads that read rows for one ALTER, if there are as many processors.
const READERS_MAX: usize = 4;
/// How often who waits for the others tells how far they are, and looks whether it is interrupted.
const LOOK: Duration = Duration::from_millis(100);

/// Other indexes for a table.
pub struct IndexPlan {
    layout: Layout,
    /// For each of them, which of the table's it is; `None`: it has to be built.
    kept: Vec<Option<usize>>,
}

/// The indexes of an [`IndexPlan`], built. Dropping it gives them up.
pub struct BuiltIndexes {
    pub(crate) layout: Layout,
    /// Of all indexes.
    pub(crate) trees: Trees,
    pub(crate) built: Vec<BuiltIndex>,
    /// The trees of those that are built.
    pub(crate) fresh: Fresh,
}

pub(crate) enum BuiltIndex {
    Loaded(Loaded),
    /// Too few entries for ssts of their own.
    Few(TreeId, Vec<(Vec<u8>, Vec<u8>)>),
}

impl Table {
    /// What it takes to give the table the indexes of `descriptor`; `kept`: for each, which of the table's it is. `None`: they differ in
    /// more than that, and the rows have to be copied.
    pub fn plan_indexes(&self, descriptor: Descriptor, kept: &[Option<usize>]) -> Option<IndexPlan> {
        descriptor.check().ok()?;
        let layout = Layout::new(descriptor, self.collations());
        let old = &self.layout;
        let describe = |layout: &Layout| {
            let mut text = String::new();
            layout.rows.describe(&mut text);
            text
        };
        let primary = layout.descriptor.primary.map(|primary| kept.get(primary).copied().flatten());
        let same_rows = describe(&layout) == describe(old)
            && primary == old.descriptor.primary.map(Some)
            && layout.descriptor.auto_increment == old.descriptor.auto_increment;
        let is_kept = |(index, kept): (usize, &Option<usize>)| {
            kept.is_none_or(|kept| {
                old.indexes.get(kept).is_some_and(|old| old.describe() == layout.indexes[index].describe())
            })
        };
        let same = kept.len() == layout.indexes.len() && same_rows && kept.iter().enumerate().all(is_kept);
        same.then(|| IndexPlan { layout, kept: kept.to_vec() })
    }
}

impl RowCursor {
    /// Builds what a plan for this cursor's table wants. On `Duplicate`, whose key is counted as in the plan, `duplicate_record` has the row.
    pub fn build_indexes(&mut self, session: &mut Session, plan: IndexPlan) -> Result<BuiltIndexes> {
        let IndexPlan { layout, kept } = plan;
        let table = Arc::clone(&self.table);
        let (engine, state) = (table.store.engine(), &table.state);
        let own = |index| layout.descriptor.primary != Some(index);
        let mut trees = Trees { primary: state.primary_tree(), indexes: Vec::new() };
        let mut fresh = Trees { primary: trees.primary, indexes: vec![None; kept.len()] };
        for (index, kept) in kept.iter().enumerate() {
            let built = || *fresh.indexes[index].insert(engine.allocate_tree());
            let tree = own(index).then(|| kept.map_or_else(built, |kept| state.index_tree(kept)));
            trees.indexes.push(tree);
        }
        table.store.tell_first_parts(&layout, &trees);
        let new: Vec<(usize, TreeId)> =
            fresh.indexes.iter().enumerate().filter_map(|(index, tree)| Some((index, (*tree)?))).collect();
        let fresh = Fresh::new(&table.store, new.iter().map(|(_, tree)| *tree).collect());
        let mut built = Vec::new();
        if !new.is_empty() {
            let Gathered { entries, rows, bytes } = gather(&table, &layout, &new, session)?;
            let few = bytes <= engine.memtable_bytes() as u64 / FEW_SHARE;
            let mut progress = Progress { done: rows, total: rows * (1 + new.len() as u64) };
            for (entries, (index, tree)) in entries.into_iter().zip(new) {
                match finish(entries, tree, few, session, &mut progress) {
                    Ok(index) => built.push(index),
                    Err(StreamError::Other(error)) => return Err(error),
                    Err(StreamError::Twice(twice)) => {
                        let split = layout.indexes[index].split(&twice.key, &twice.value);
                        let (key, _) = split.map_err(table.garbled("an index entry"))?;
                        let mut txn = engine.begin();
                        let row = txn.get(state.primary_tree(), key, ReadAs::Newest, <[u8]>::to_vec)?;
                        self.set_duplicate(key.to_vec(), row.ok_or(Error::RowGone)?);
                        return Err(Error::Duplicate { key: index });
                    }
                }
            }
        }
        Ok(BuiltIndexes { layout, trees, built, fresh })
    }
}

/// What rows make for new indexes.
struct Gathered {
    /// For each index.
    entries: Vec<Sorted>,
    rows: u64,
    /// Of all entries.
    bytes: u64,
}

/// Reads the rows of a stretch of the table, for all new indexes.
struct Reader<'a> {
    table: &'a Table,
    layout: &'a Layout,
    new: &'a [(usize, TreeId)],
    /// How many there are.
    readers: usize,
    /// Rows that all of them have read, about.
    rows: AtomicU64,
    /// The first one, which makes the work of all be in vain.
    failure: OnceLock<Error>,
}

/// The entries that all rows make.
fn gather(
    table: &Table,
    layout: &Layout,
    new: &[(usize, TreeId)],
    session: &mut Session,
) -> Result<Gathered> {
    let most = available_parallelism().map_or(1, |processors| processors.get().min(READERS_MAX));
    let cuts = table.store.engine().cuts(table.state.primary_tree(), most);
    let readers = 1 + cuts.len();
    let reader = Reader { table, layout, new, readers, rows: AtomicU64::new(0), failure: OnceLock::new() };
    // Reading takes about as long as writing one index.
    let total = table.row_count() * (1 + new.len() as u64);
    let look = |session: &Session| session.go_on(reader.rows.load(Ordering::Relaxed).min(total), total);
    let mut parts: Vec<Option<Gathered>> = (0..readers).map(|_| None).collect();
    std::thread::scope(|scope| {
        let (done, outcomes) = channel();
        // The first stretch is the caller's own.
        for part in 1..readers {
            let (reader, done, to) = (&reader, done.clone(), cuts.get(part));
            let from = &cuts[part - 1];
            let read = move || _ = done.send((part, reader.read(from, to, || Ok(()))));
            let thread = std::thread::Builder::new().name("cistern-index".to_owned());
            if let Err(error) = thread.spawn_scoped(scope, read) {
                reader.fail(no_thread(error));
            }
        }
        drop(done);
        parts[0] = reader.read(&[], cuts.first(), || look(session));
        loop {
            match outcomes.recv_timeout(LOOK) {
                Ok((part, read)) => parts[part] = read,
                Err(RecvTimeoutError::Timeout) => look(session).unwrap_or_else(|error| reader.fail(error)),
                // All have ended. (A panic of one comes out of the scope.)
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    });
    match reader.failure.into_inner() {
        Some(error) => Err(error),
        None => Ok(join(parts.into_iter().flatten().collect(), new.len())),
    }
}

fn no_thread(error: std::io::Error) -> Error {
    engine::Error::new(Kind::Unavailable, "a thread that reads rows can not be started")
        .with_cause(error)
        .into()
}

/// What one reader would have made of all stretches.
fn join(parts: Vec<Gathered>, indexes: usize) -> Gathered {
    let mut all: Vec<Vec<Sorted>> = (0..indexes).map(|_| Vec::new()).collect();
    let (mut rows, mut bytes) = (0, 0);
    for part in parts {
        rows += part.rows;
        bytes += part.bytes;
        all.iter_mut().zip(part.entries).for_each(|(all, entries)| all.push(entries));
    }
    Gathered { entries: all.into_iter().map(Sorted::join).collect(), rows, bytes }
}

impl Reader<'_> {
    /// The rows from `from` to before `to`; asks `look` now and then whether to go on. `None`: it failed, or another reader did.
    fn read(&self, from: &[u8], to: Option<&Vec<u8>>, look: impl Fn() -> Result<()>) -> Option<Gathered> {
        self.try_read(from, to, look).unwrap_or_else(|error| {
            self.fail(error);
            None
        })
    }

    fn try_read(
        &self,
        from: &[u8],
        to: Option<&Vec<u8>>,
        look: impl Fn() -> Result<()>,
    ) -> Result<Option<Gathered>> {
        let Self { table, layout, new, .. } = self;
        let engine = table.store.engine();
        let sorter = |_| engine.sorter(new.len() * self.readers);
        let mut sorters: Vec<_> = new.iter().map(sorter).collect();
        let mut txn = engine.begin();
        let mut cursor = Cursor::new(engine);
        cursor.open(&mut txn, table.state.primary_tree(), ReadAs::Newest)?;
        let (mut rows, mut bytes) = (0, 0);
        let (mut parts, mut weights) = (Parts::default(), Vec::new());
        let (mut entry_key, mut entry_value) = (Vec::new(), Vec::new());
        let mut more = cursor.seek(&mut txn, from)?;
        while more && to.is_none_or(|to| cursor.key() < &to[..]) {
            let (key, row) = (cursor.key(), cursor.value());
            layout.rows.parse(row, key, &mut parts).map_err(table.garbled("a row"))?;
            let value = |field| Ok(layout.rows.value(field, row, &parts));
            for (sorter, (index, _)) in sorters.iter_mut().zip(*new) {
                layout.indexes[*index]
                    .entry(&value, key, table.collations(), &mut weights, (&mut entry_key, &mut entry_value))
                    .map_err(table.garbled("a row"))?;
                bytes += (entry_key.len() + entry_value.len()) as u64;
                sorter.push(&entry_key, &entry_value)?;
            }
            rows += 1;
            if rows % LOOK_EVERY == 0 {
                self.rows.fetch_add(LOOK_EVERY, Ordering::Relaxed);
                look()?;
                if self.failure.get().is_some() {
                    return Ok(None);
                }
            }
            more = cursor.next(&mut txn)?;
        }
        let entries: engine::Result<Vec<Sorted>> =
            sorters.into_iter().map(|sorter| sorter.finish()).collect();
        Ok(Some(Gathered { entries: entries?, rows, bytes }))
    }

    /// Ends all of them, if none has failed before.
    fn fail(&self, error: Error) {
        _ = self.failure.set(error);
    }
}

fn finish(
    entries: Sorted,
    tree: TreeId,
    few: bool,
    session: &mut Session,
    progress: &mut Progress,
) -> std::result::Result<BuiltIndex, StreamError> {
    if !few {
        let load = open_load(session, tree)?;
        return Ok(BuiltIndex::Loaded(load_sorted(load, entries, session, progress)?));
    }
    let mut kept = Vec::new();
    in_order(entries, session, progress, |_, key, value| {
        kept.push((key.to_vec(), value.to_vec()));
        Ok(())
    })?;
    Ok(BuiltIndex::Few(tree, kept))
}
