//! What recovery replays: into memtables, and into local ssts when more of these wait than a running engine lets wait.
//! So a restart needs no more memory than what came before it, however long the bucket was away.
//!
//! * Ssts written here are put into the tree when recovery is over, as flushes in the same order. If it does not get
//!   that far nothing names them, and the next start removes them and reads the wal again.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::commit::{Table, TableEnd, named_tree};
use crate::compaction::run::{self, Context};
use crate::limits::{FROZEN_MEMTABLES_MAX, Shape};
use crate::manifest::Manifest;
use crate::store::{SstStore, StoreParts};
use crate::version::SstMeta;
use crate::wal::{Op, Record};
use crate::{BranchId, OpKind, Result, Seqno, SstId, TreeId};

pub(crate) struct Replay<'a> {
    memtable_bytes: usize,
    shape: &'a Shape,
    /// Makes the store once it is known whose ssts it has.
    store_parts: &'a dyn Fn(BranchId) -> StoreParts,
    store: Option<Arc<SstStore>>,
    next_sst: AtomicU64,
    /// Oldest first; the last one takes what comes next.
    tables: VecDeque<Arc<Table>>,
    flushed: Vec<Replayed>,
    dropped: BTreeSet<TreeId>,
    last: Seqno,
    next_tree: TreeId,
}

/// A memtable that was written to local ssts during the replay.
pub(crate) struct Replayed {
    pub(crate) ssts: Vec<Arc<SstMeta>>,
    pub(crate) loads: Vec<Arc<SstMeta>>,
    pub(crate) drops: Vec<(TreeId, Seqno)>,
    pub(crate) end: TableEnd,
}

/// What a replay leaves to the engine.
pub(crate) struct Outcome {
    pub(crate) store: Arc<SstStore>,
    /// The counter of the next sst.
    pub(crate) next_sst: u64,
    /// Oldest first, older than all of `tables`.
    pub(crate) flushed: Vec<Replayed>,
    /// Oldest first; the last one takes writes.
    pub(crate) tables: VecDeque<Arc<Table>>,
    /// Of the last record.
    pub(crate) last: Seqno,
    /// Tree ids below this one were given out, as far as the records say.
    pub(crate) next_tree: TreeId,
}

impl<'a> Replay<'a> {
    pub(crate) fn new(
        memtable_bytes: usize,
        shape: &'a Shape,
        store_parts: &'a dyn Fn(BranchId) -> StoreParts,
    ) -> Self {
        Self {
            memtable_bytes,
            shape,
            store_parts,
            store: None,
            next_sst: AtomicU64::new(1),
            tables: VecDeque::from([Table::new()]),
            flushed: Vec::new(),
            dropped: BTreeSet::new(),
            last: Seqno(0),
            next_tree: TreeId(0),
        }
    }

    /// Applies one record; they come in order. `manifest` is what our take-over left.
    pub(crate) fn apply(&mut self, manifest: &Manifest, record: &Record<'_>) -> Result<()> {
        let table = self.tables.back().expect("there is always one");
        for op in record.ops() {
            match op? {
                Op::Put(key, value) => {
                    self.next_tree = self.next_tree.max(named_tree(key, value));
                    table.memtable.insert(key, record.seqno, OpKind::Put, value);
                }
                Op::Delete(key) => table.memtable.insert(key, record.seqno, OpKind::Delete, &[]),
                Op::DropTree(tree) => table.drop_tree(tree, record.seqno),
                Op::Load(sst) => {
                    self.next_tree = self.next_tree.max(named_tree(sst.first_key, &[]));
                    table.load(SstMeta::of_record(&sst, record.seqno));
                }
            }
        }
        self.last = record.seqno;
        if table.memtable.bytes() >= self.memtable_bytes {
            table.freeze(TableEnd { position: record.end, seqno: record.seqno, next_tree: self.next_tree });
            self.tables.push_back(Table::new());
            if self.tables.len() > FROZEN_MEMTABLES_MAX {
                self.flush_oldest(manifest)?;
            }
        }
        Ok(())
    }

    /// Once all records are applied.
    pub(crate) fn finish(mut self, manifest: &Manifest) -> Result<Outcome> {
        Ok(Outcome {
            store: self.store(manifest)?,
            next_sst: self.next_sst.into_inner(),
            flushed: self.flushed,
            tables: self.tables,
            last: self.last,
            next_tree: self.next_tree,
        })
    }

    fn store(&mut self, manifest: &Manifest) -> Result<Arc<SstStore>> {
        if let Some(store) = &self.store {
            return Ok(Arc::clone(store));
        }
        let store = SstStore::new((self.store_parts)(manifest.branch));
        let loads = self.tables.iter().flat_map(|table| table.loads());
        store.adopt(&manifest.version, loads)?;
        self.store = Some(Arc::clone(&store));
        Ok(store)
    }

    fn flush_oldest(&mut self, manifest: &Manifest) -> Result<()> {
        let store = self.store(manifest)?;
        let table = self.tables.pop_front().expect("more than a few wait");
        let end = table.end().expect("all but the last are frozen");
        let drops = table.drops();
        self.dropped.extend(manifest.dropped.keys().copied().chain(drops.iter().map(|(tree, _)| *tree)));
        let context = Context {
            store: &store,
            // Nobody has read anything yet, and nobody will read at an earlier state.
            snapshots: &[end.seqno],
            dropped: &self.dropped,
            shape: self.shape,
            next_id: &|| SstId {
                epoch: manifest.epoch,
                counter: self.next_sst.fetch_add(1, Ordering::Relaxed),
            },
            goes_on: &|| true,
        };
        let ssts = run::flush(&table.memtable, &context)?;
        self.flushed.push(Replayed { ssts, loads: table.loads(), drops, end });
        Ok(())
    }
}
