//! Walks the visible entries of one tree, both ways, merged with the transaction's own writes.
//!
//! * A cursor sees what its transaction wrote before each step, also since the step before.
//! * Moving off the end leaves it on nothing; then only a seek is of use.

use std::ops::Bound;
use std::sync::Arc;

use crate::engine::Engine;
use crate::txn::{ReadAs, Txn};
use crate::{Error, Kind, Result, Seqno, TreeId, full_key};

/// A place in one tree. Use it with the transaction it was opened with; it can be opened again without allocation.
pub struct Cursor {
    engine: Arc<Engine>,
    tree: Option<TreeId>,
    at: Seqno,
    entry: Option<(Vec<u8>, Vec<u8>)>,
}

impl Cursor {
    /// A closed cursor.
    pub fn new(engine: &Arc<Engine>) -> Self {
        Self { engine: Arc::clone(engine), tree: None, at: Seqno(0), entry: None }
    }

    /// Opens it on `tree`. It stands on nothing until a seek. [`ReadAs::Newest`] is as of this call: a row whose lock
    /// is waited for afterwards is read again with [`Txn::get`].
    pub fn open(&mut self, txn: &mut Txn, tree: TreeId, read: ReadAs) -> Result<()> {
        self.at = txn.read_at(read);
        self.tree = Some(tree);
        self.entry = None;
        Ok(())
    }

    /// To the first entry at or after `key`. `false`: there is none.
    pub fn seek(&mut self, txn: &mut Txn, key: &[u8]) -> Result<bool> {
        let key = full_key(self.tree()?, key);
        self.forward(txn, Bound::Included(&key))
    }

    /// To the first entry strictly after `key`.
    pub fn seek_after(&mut self, txn: &mut Txn, key: &[u8]) -> Result<bool> {
        let key = full_key(self.tree()?, key);
        self.forward(txn, Bound::Excluded(&key))
    }

    /// To the last entry strictly before `key`.
    pub fn seek_before(&mut self, txn: &mut Txn, key: &[u8]) -> Result<bool> {
        let key = full_key(self.tree()?, key);
        self.backward(txn, &key)
    }

    /// To the first entry of the tree.
    pub fn seek_first(&mut self, txn: &mut Txn) -> Result<bool> {
        self.seek(txn, &[])
    }

    /// To the last entry of the tree.
    pub fn seek_last(&mut self, txn: &mut Txn) -> Result<bool> {
        let end = self.end()?;
        self.backward(txn, &end)
    }

    /// To the next entry. Not allowed while it stands on nothing.
    #[expect(clippy::should_implement_trait, reason = "a cursor lends its entry, an iterator gives it away")]
    pub fn next(&mut self, txn: &mut Txn) -> Result<bool> {
        let (key, _) = self.entry.take().ok_or_else(stands_on_nothing)?;
        self.forward(txn, Bound::Excluded(&key))
    }

    /// To the previous entry. Not allowed while it stands on nothing.
    pub fn prev(&mut self, txn: &mut Txn) -> Result<bool> {
        let (key, _) = self.entry.take().ok_or_else(stands_on_nothing)?;
        self.backward(txn, &key)
    }

    /// Key of the entry it stands on, without the tree id. Valid until it moves.
    ///
    /// # Panics
    /// If it stands on nothing.
    pub fn key(&self) -> &[u8] {
        &self.entry.as_ref().expect("the cursor stands on an entry").0[4..]
    }

    /// Value of the entry it stands on. Valid until it moves.
    ///
    /// # Panics
    /// If it stands on nothing.
    pub fn value(&self) -> &[u8] {
        &self.entry.as_ref().expect("the cursor stands on an entry").1
    }

    /// Lets go of the data it reads from. A cursor that stays open keeps old data in memory and on disk.
    pub fn close(&mut self) {
        self.tree = None;
        self.entry = None;
    }

    fn forward(&mut self, txn: &mut Txn, from: Bound<&[u8]>) -> Result<bool> {
        let end = self.end()?;
        let dropped = txn.drops().contains(&self.tree()?);
        let mut from = from.map(<[u8]>::to_vec);
        self.entry = loop {
            let bound = from.as_ref().map(Vec::as_slice);
            let stored = if dropped { None } else { self.engine.naive.after(bound, &end, self.at) };
            let own = txn.writes.range::<[u8], _>((bound, Bound::Excluded(end.as_slice()))).next();
            match (stored, own) {
                (Some(stored), Some((key, _))) if stored.0 < *key => break Some(stored),
                (stored, None) => break stored,
                (_, Some((key, Some(value)))) => break Some((key.clone(), value.clone())),
                (_, Some((key, None))) => from = Bound::Excluded(key.clone()),
            }
        };
        Ok(self.entry.is_some())
    }

    fn backward(&mut self, txn: &mut Txn, before: &[u8]) -> Result<bool> {
        let begin = full_key(self.tree()?, &[]);
        let dropped = txn.drops().contains(&self.tree()?);
        let mut before = before.to_vec();
        self.entry = loop {
            let stored = if dropped { None } else { self.engine.naive.before(&before, &begin, self.at) };
            let own = txn.writes.range(begin.clone()..before.clone()).next_back();
            match (stored, own) {
                (Some(stored), Some((key, _))) if stored.0 > *key => break Some(stored),
                (stored, None) => break stored,
                (_, Some((key, Some(value)))) => break Some((key.clone(), value.clone())),
                (_, Some((key, None))) => before = key.clone(),
            }
        };
        Ok(self.entry.is_some())
    }

    fn tree(&self) -> Result<TreeId> {
        self.tree.ok_or_else(|| Error::new(Kind::Bug, "a closed cursor was moved"))
    }

    fn end(&self) -> Result<Vec<u8>> {
        let tree = self.tree()?;
        Ok(full_key(TreeId(tree.0.checked_add(1).expect("tree ids never reach 2^32 - 1")), &[]))
    }
}

fn stands_on_nothing() -> Error {
    Error::new(Kind::Bug, "a cursor that stands on nothing was moved")
}
