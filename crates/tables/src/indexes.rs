//! Adding and dropping indexes of a table that has rows, in place.
//!
//! * Whoever calls keeps all others from writing to the table, from before `build_indexes` to after `Store::set_indexes`; they may read.
//! * The entries of a new index are made from the newest rows, sorted and loaded into a tree of its own; nobody sees it before the
//!   commit that changes the definition, which also drops the trees of indexes that go. What is given up before leaves nothing.
//! * The rows stay as they are, so a transaction whose snapshot is older than the index would miss what it should see by it: it
//!   is told that the definition has changed.

use std::sync::Arc;

use engine::{Cursor, Loaded, ReadAs, TreeId};

use crate::bulk::{FEW_SHARE, Fresh, Progress, Stream, StreamError, look_at};
use crate::catalogue::Trees;
use crate::cursor::RowCursor;
use crate::layout::Layout;
use crate::rows::Parts;
use crate::table::Table;
use crate::{Descriptor, Error, Result, Session};

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
            let (streams, rows, bytes) = match gather(&table, &layout, &new, session) {
                Ok(gathered) => gathered,
                Err(GatherError::Other(error)) => return Err(error),
                Err(GatherError::Twice { index, row: (key, row) }) => {
                    self.set_duplicate(key, row);
                    return Err(Error::Duplicate { key: index });
                }
            };
            let few = bytes <= engine.memtable_bytes() as u64 / FEW_SHARE;
            let mut progress = Progress { done: rows, total: rows * (1 + new.len() as u64) };
            for (stream, (index, tree)) in streams.into_iter().zip(new) {
                let few = few && stream.is_unloaded();
                match finish(stream, few.then_some(tree), session, &mut progress) {
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

enum GatherError {
    /// This row has a value that another one has.
    Twice {
        index: usize,
        row: (Vec<u8>, Vec<u8>),
    },
    Other(Error),
}

impl<E: Into<Error>> From<E> for GatherError {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

/// The entries that all rows make, how many rows there are, and how many bytes the entries take.
fn gather(
    table: &Table,
    layout: &Layout,
    new: &[(usize, TreeId)],
    session: &mut Session,
) -> std::result::Result<(Vec<Stream>, u64, u64), GatherError> {
    let engine = table.store.engine();
    let mut streams: Vec<_> = new.iter().map(|(_, tree)| Stream::new(engine, *tree, new.len())).collect();
    let mut txn = engine.begin();
    let mut cursor = Cursor::new(engine);
    cursor.open(&mut txn, table.state.primary_tree(), ReadAs::Newest)?;
    let (mut rows, mut bytes) = (0, 0);
    let (mut parts, mut weights) = (Parts::default(), Vec::new());
    let (mut entry_key, mut entry_value) = (Vec::new(), Vec::new());
    // Reading takes about as long as writing one index.
    let total = table.row_count() * (1 + new.len() as u64);
    let mut more = cursor.seek_first(&mut txn)?;
    while more {
        let (key, row) = (cursor.key(), cursor.value());
        layout.rows.parse(row, key, &mut parts).map_err(table.garbled("a row"))?;
        let value = |field| Ok(layout.rows.value(field, row, &parts));
        for (stream, (index, _)) in streams.iter_mut().zip(new) {
            layout.indexes[*index]
                .entry(&value, key, table.collations(), &mut weights, (&mut entry_key, &mut entry_value))
                .map_err(table.garbled("a row"))?;
            bytes += (entry_key.len() + entry_value.len()) as u64;
            match stream.push(session, &entry_key, &entry_value) {
                Ok(()) => {}
                Err(StreamError::Other(error)) => return Err(error.into()),
                Err(StreamError::Twice(_)) => {
                    // As far as it got, the index is in the order of the rows.
                    let row = (key.to_vec(), row.to_vec());
                    return Err(GatherError::Twice { index: *index, row });
                }
            }
        }
        rows += 1;
        look_at(session, rows.min(total), total)?;
        more = cursor.next(&mut txn)?;
    }
    Ok((streams, rows, bytes))
}

fn finish(
    stream: Stream,
    few: Option<TreeId>,
    session: &mut Session,
    progress: &mut Progress,
) -> std::result::Result<BuiltIndex, StreamError> {
    let Some(tree) = few else { return Ok(BuiltIndex::Loaded(stream.load(session, progress)?)) };
    let mut entries = Vec::new();
    stream.in_order(session, progress, |_, key, value| {
        entries.push((key.to_vec(), value.to_vec()));
        Ok(())
    })?;
    Ok(BuiltIndex::Few(tree, entries))
}
