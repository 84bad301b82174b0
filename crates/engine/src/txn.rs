//! A transaction: a snapshot to read at, private writes, row locks.
//!
//! * Its own writes are seen first, always; nobody else sees them before the commit.
//! * In REPEATABLE READ all snapshot reads answer as of one moment: the first of them, or `snapshot_now`.
//! * A lock is held until the end of the transaction, whatever is rolled back in between. The end of a commit's changes is its place in
//!   the wal, before the sync: who locks the row then may read what is not durable yet, and does not end before it is.
//! * In REPEATABLE READ a row that changed after the snapshot can not be locked, so no update is lost.

use std::sync::Arc;

use crate::cache::Loan;
use crate::commit::{Seen, not_empty};
use crate::engine::Engine;
use crate::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use crate::load::Loaded;
use crate::locks::{Granted, Held, Interrupt, LockMode, LockWait, Owner};
use crate::snapshots::SnapshotSlot;
use crate::view::View;
use crate::writeset::{WriteMark, WriteSet};
use crate::{Error, Kind, OpKind, Result, Seqno, TreeId, full_key};

/// What a held lock takes: its entry, its key, its place in the transaction's list.
const LOCK_BYTES: usize = 160;
/// Transactions up to this many bytes are taken for nothing.
const UNCOUNTED_BYTES: usize = 2 << 20;

/// Which snapshot a statement reads at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// Each statement has a snapshot of its own.
    ReadCommitted,
    /// The transaction has one snapshot.
    RepeatableRead,
}

/// Which version a read sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadAs {
    /// The newest at the snapshot.
    Snapshot,
    /// The newest committed one: what a locking read and a write act on. It may not be durable yet; it is when the transaction's
    /// commit or rollback returns.
    Newest,
}

/// A place in the sequence of a transaction's writes, to go back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    writes: WriteMark,
    drops: usize,
    loads: usize,
    round: u64,
}

/// A transaction. Driven by one thread at a time; dropping it rolls it back.
pub struct Txn {
    engine: Arc<Engine>,
    owner: Arc<Owner>,
    isolation: Isolation,
    detects_conflicts: bool,
    snapshot: Option<Seqno>,
    slot: Arc<SnapshotSlot>,
    held: Vec<Held>,
    /// What it has read that was not visible then.
    seen: Option<Seen>,
    drops: Vec<TreeId>,
    loads: Vec<Loaded>,
    pub(crate) writes: WriteSet,
    /// Counts commits and rollbacks.
    round: u64,
    key: Vec<u8>,
    /// What a large transaction takes of the engine's memory.
    memory: Option<Loan>,
    /// What is counted already, or need not be.
    counted: usize,
}

impl Txn {
    pub(crate) fn new(engine: Arc<Engine>, owner: Arc<Owner>) -> Self {
        Self {
            owner,
            isolation: Isolation::RepeatableRead,
            detects_conflicts: true,
            snapshot: None,
            slot: engine.snapshots.register(),
            held: Vec::new(),
            seen: None,
            drops: Vec::new(),
            loads: Vec::new(),
            writes: WriteSet::new(),
            round: 0,
            key: Vec::new(),
            memory: None,
            counted: UNCOUNTED_BYTES,
            engine,
        }
    }

    /// A number that no other transaction object of this engine has.
    pub fn id(&self) -> u64 {
        self.owner.id()
    }

    /// The engine it works on.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Takes effect with the next snapshot.
    pub fn set_isolation(&mut self, isolation: Isolation) {
        self.isolation = isolation;
    }

    /// Whether REPEATABLE READ refuses to lock a row that changed after the snapshot (it does unless told otherwise).
    pub fn set_conflict_detection(&mut self, on: bool) {
        self.detects_conflicts = on;
    }

    /// Takes the snapshot now instead of with the first snapshot read.
    pub fn snapshot_now(&mut self) {
        self.snapshot = None;
        self.snapshot();
    }

    /// What snapshot reads see is as of this commit. Takes the snapshot if there is none yet.
    #[inline]
    pub fn snapshot_seqno(&mut self) -> Seqno {
        self.snapshot()
    }

    /// A statement starts: in READ COMMITTED the next snapshot read takes a fresh snapshot.
    pub fn statement_begin(&mut self) {
        if self.isolation == Isolation::ReadCommitted {
            self.forget_snapshot();
        }
    }

    /// Calls `f` with the value of `key`, if it has one.
    pub fn get<R>(
        &mut self,
        tree: TreeId,
        key: &[u8],
        read: ReadAs,
        f: impl FnOnce(&[u8]) -> R,
    ) -> Result<Option<R>> {
        let snapshot = match read {
            // An own write found below is a snapshot read too.
            ReadAs::Snapshot => Some(self.snapshot()),
            ReadAs::Newest => None,
        };
        self.set_key(tree, key);
        if let Some((kind, value)) = self.writes.get(&self.key) {
            return Ok((kind == OpKind::Put).then(|| f(value)));
        }
        if self.drops.contains(&tree) {
            return Ok(None);
        }
        let (view, at) = match snapshot {
            Some(at) => (self.engine.view(), at),
            None => {
                let (view, at) = self.engine.newest();
                note_seen(&self.engine, &mut self.seen, at);
                (view, at)
            }
        };
        if !view.dropped.is_empty() && view.dropped.contains(&tree) {
            return Ok(None);
        }
        view.get(&self.engine.store, &self.key, at, f)
    }

    /// Fetches from the bucket, all at once, what reads of these keys would wait for one after the other. What is in memory or on the local
    /// disk is left to the reads. A hint: whatever fails here is met again by the read that needs it. Returns how many pieces came.
    pub fn prefetch<'k>(&self, tree: TreeId, keys: impl Iterator<Item = &'k [u8]>) -> usize {
        let full: Vec<Vec<u8>> = keys.map(|key| full_key(tree, key)).collect();
        let keys: Vec<&[u8]> = full.iter().map(Vec::as_slice).collect();
        self.engine.prefetch(&keys)
    }

    /// Locks a key, whether it exists or not. Waits as [`LockWait`] says.
    ///
    /// [`Kind::Conflict`]: in REPEATABLE READ the key changed after the snapshot; the lock is not kept.
    /// [`Kind::Deadlock`]: this transaction must roll back so that others can go on.
    pub fn lock(&mut self, tree: TreeId, key: &[u8], mode: LockMode, wait: &LockWait<'_>) -> Result<Granted> {
        let granted = self.lock_name(tree, key, mode, wait)?;
        if granted == Granted::Held {
            return Ok(granted);
        }
        self.count_memory();
        let changed = self.changed_since_snapshot();
        if !matches!(changed, Ok(false)) {
            self.engine.locks.release(&self.owner, &self.key, &mut self.held);
        }
        if changed? {
            return Err(Error::new(
                Kind::Conflict,
                format!("a row of tree {} changed after the transaction's snapshot", tree.0),
            ));
        }
        Ok(granted)
    }

    /// The same for a key that nobody ever writes to: there is nothing that could have changed.
    pub fn lock_name(
        &mut self,
        tree: TreeId,
        key: &[u8],
        mode: LockMode,
        wait: &LockWait<'_>,
    ) -> Result<Granted> {
        self.set_key(tree, key);
        let weight = self.writes.bytes() as u64;
        let granted =
            self.engine.locks.acquire(&self.owner, &self.key, mode, weight, wait, &mut self.held)?;
        // A snapshot taken after it shows what those before did under the lock.
        note_seen(&self.engine, &mut self.seen, self.engine.applied());
        Ok(granted)
    }

    /// Gives back a lock that was [`Granted::New`] for a row that was not wanted after all (READ COMMITTED).
    pub fn unlock(&mut self, tree: TreeId, key: &[u8]) {
        self.set_key(tree, key);
        self.engine.locks.release(&self.owner, &self.key, &mut self.held);
    }

    /// Sets `key` to `value` when the transaction commits. The caller holds its exclusive lock, or knows that nobody
    /// else can name the key.
    pub fn put(&mut self, tree: TreeId, key: &[u8], value: &[u8]) -> Result<()> {
        if value.len() > VALUE_BYTES_MAX {
            return Err(Error::new(
                Kind::BadRequest,
                format!("a value of {} bytes; at most {VALUE_BYTES_MAX} fit", value.len()),
            ));
        }
        self.write(tree, key, Some(value))
    }

    /// Removes `key`, which need not exist, when the transaction commits. The caller holds its exclusive lock.
    pub fn delete(&mut self, tree: TreeId, key: &[u8]) -> Result<()> {
        self.write(tree, key, None)
    }

    /// Removes all of `tree` when the transaction commits, at once and for everybody, older snapshots too. Nobody may
    /// use the id afterwards.
    pub fn drop_tree(&mut self, tree: TreeId) {
        self.drops.push(tree);
    }

    /// The commit will make `loaded` visible, all of it at once, together with the other writes. Until then this transaction does
    /// not see it either, and must not write to its tree. A rollback, also one to a mark before this call, gives it up.
    ///
    /// The commit fails with [`Kind::BadRequest`] if the tree has been written to meanwhile, by whomever.
    pub fn add_loaded(&mut self, loaded: Loaded) -> Result<()> {
        let tree = loaded.tree();
        assert!(loaded.is_of(&self.engine), "tree {}: a load of another engine", tree.0);
        if self.loads.iter().any(|other| other.tree() == tree) || self.drops.contains(&tree) {
            return Err(not_empty(tree));
        }
        if !loaded.is_empty() {
            self.loads.push(loaded);
        }
        Ok(())
    }

    /// Here in the sequence of writes.
    pub fn mark(&self) -> Mark {
        let (drops, loads) = (self.drops.len(), self.loads.len());
        Mark { writes: self.writes.mark(), drops, loads, round: self.round }
    }

    /// Takes back every write made since `mark` (`drop_tree` and `add_loaded` too). Locks stay.
    ///
    /// # Panics
    /// If `mark` is of another transaction, or of writes that were rolled back already.
    pub fn rollback_to(&mut self, mark: Mark) {
        assert_eq!(mark.round, self.round, "a mark of a transaction that has ended");
        self.writes.rollback_to(mark.writes);
        self.drops.truncate(mark.drops);
        self.loads.truncate(mark.loads);
    }

    /// Whether a commit would change anything.
    pub fn has_writes(&self) -> bool {
        !self.writes.is_empty() || !self.drops.is_empty() || !self.loads.is_empty()
    }

    /// On return the writes, and all that was read, are durable and visible to every later snapshot, the locks are given back, and the
    /// transaction is empty and can be used again. On an error nothing is visible, and the transaction is rolled
    /// back; after [`Kind::Failed`] or [`Kind::Fenced`] what a restart finds may include it.
    pub fn commit(&mut self) -> Result<Seqno> {
        if !self.has_writes() {
            self.end();
            let settled = self.settle();
            self.seen = None;
            return settled.map(|()| self.engine.visible());
        }
        let (engine, owner, held) = (&self.engine, &self.owner, &mut self.held);
        let unlock = || engine.locks.release_all(owner, held);
        let result = engine.commit(&self.writes, &self.drops, std::mem::take(&mut self.loads), unlock);
        self.ended(&result);
        result
    }

    /// The same; `settle` learns how it ended while all locks are still held.
    pub fn commit_and(&mut self, settle: impl FnOnce(&Result<Seqno>)) -> Result<Seqno> {
        let result = if self.has_writes() {
            self.engine.commit(&self.writes, &self.drops, std::mem::take(&mut self.loads), || ())
        } else {
            self.settle().map(|()| self.engine.visible())
        };
        settle(&result);
        self.ended(&result);
        result
    }

    fn ended(&mut self, result: &Result<Seqno>) {
        if result.is_ok() {
            // Its own place in the wal is behind all that it has seen.
            self.seen = None;
        }
        self.rollback();
    }

    /// Forgets all writes, gives back all locks and the snapshot. The transaction can be used again. Returns when what it has read is
    /// durable and visible, so that another try is not refused for the same commit; or never will be, and no commit succeeds any more.
    pub fn rollback(&mut self) {
        self.end();
        // The error is noted, and nothing hangs on it: whoever commits meets it again.
        _ = self.settle();
        self.seen = None;
    }

    fn end(&mut self) {
        self.writes.clear();
        (self.memory, self.counted) = (None, UNCOUNTED_BYTES);
        self.drops.clear();
        self.loads.clear();
        self.round += 1;
        self.forget_snapshot();
        self.engine.locks.release_all(&self.owner, &mut self.held);
    }

    /// What another thread ends this transaction's lock wait with.
    pub fn interrupt_handle(&self) -> Interrupt {
        self.owner.interrupt_handle()
    }

    /// What a cursor reads, and as of when.
    pub(crate) fn view_at(&mut self, read: ReadAs) -> (Arc<View>, Seqno) {
        match read {
            // The snapshot first: a view loaded before it may lack the newest memtable.
            ReadAs::Snapshot => {
                let at = self.snapshot();
                (Arc::clone(&self.engine.view()), at)
            }
            ReadAs::Newest => {
                let (view, at) = self.engine.newest();
                note_seen(&self.engine, &mut self.seen, at);
                (Arc::clone(&view), at)
            }
        }
    }

    pub(crate) fn drops(&self) -> &[TreeId] {
        &self.drops
    }

    pub(crate) fn round(&self) -> u64 {
        self.round
    }

    /// A new one is not older than what the transaction has read: who waits for the sync at the end in any case need not wait now.
    fn snapshot(&mut self) -> Seqno {
        if let Some(snapshot) = self.snapshot {
            return snapshot;
        }
        let snapshot = match self.seen {
            None => self.slot.take(|| self.engine.visible()),
            Some(_) => {
                let snapshot = self.slot.take(|| self.engine.applied());
                note_seen(&self.engine, &mut self.seen, snapshot);
                snapshot
            }
        };
        *self.snapshot.insert(snapshot)
    }

    /// Returns when what it has read is durable and visible.
    fn settle(&mut self) -> Result<()> {
        if let Some(seen) = self.seen {
            self.engine.settle(seen)?;
            self.seen = None;
        }
        Ok(())
    }

    fn forget_snapshot(&mut self) {
        if self.snapshot.take().is_some() {
            self.slot.let_go();
        }
    }

    /// Of a key that is locked: nobody changes it now, and what changed it before was applied when the lock was noted.
    fn changed_since_snapshot(&self) -> Result<bool> {
        let checked = self.detects_conflicts && self.isolation == Isolation::RepeatableRead;
        match self.snapshot.filter(|_| checked) {
            Some(snapshot) if snapshot != self.engine.applied() => {
                self.engine.view().changed_since(&self.engine.store, &self.key, snapshot)
            }
            _ => Ok(false),
        }
    }

    fn write(&mut self, tree: TreeId, key: &[u8], value: Option<&[u8]>) -> Result<()> {
        if key.len() > KEY_BYTES_MAX {
            return Err(Error::new(
                Kind::BadRequest,
                format!("a key of {} bytes; at most {KEY_BYTES_MAX} fit", key.len()),
            ));
        }
        let bytes = self.writes.bytes() + key.len() + value.map_or(0, <[u8]>::len);
        let limit = self.engine.settings.transaction_bytes_max;
        if bytes > limit {
            return Err(Error::new(
                Kind::BadRequest,
                format!("a transaction may write {limit} bytes; split it"),
            ));
        }
        self.set_key(tree, key);
        match value {
            Some(value) => self.writes.put(&self.key, value),
            None => self.writes.delete(&self.key),
        }
        self.count_memory();
        Ok(())
    }

    /// Small transactions are not counted: there are as many as connections, which have more of their own.
    #[inline]
    fn count_memory(&mut self) {
        // While it commits, its writes are in the wal's buffer and in the memtable, too.
        let bytes = 3 * self.writes.bytes() + LOCK_BYTES * self.held.len();
        if bytes > self.counted {
            self.borrow(bytes);
        }
    }

    #[cold]
    fn borrow(&mut self, bytes: usize) {
        let loan = self.memory.get_or_insert_with(|| self.engine.store.lend(0));
        self.counted = bytes.next_multiple_of(UNCOUNTED_BYTES);
        loan.resize(self.counted);
    }

    fn set_key(&mut self, tree: TreeId, key: &[u8]) {
        self.key.clear();
        self.key.extend_from_slice(&tree.0.to_be_bytes());
        self.key.extend_from_slice(key);
    }
}

/// The transaction reads at `at`.
fn note_seen(engine: &Engine, seen: &mut Option<Seen>, at: Seqno) {
    if let Some(unseen) = engine.not_yet_visible(at) {
        *seen = Some(unseen);
    }
}

impl Drop for Txn {
    fn drop(&mut self) {
        self.rollback();
        self.engine.snapshots.unregister(&self.slot);
    }
}
