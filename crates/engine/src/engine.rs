//! The engine as its callers see it: open it on a bucket and a disk, begin transactions, ask for its status.
//!
//! * What a committed transaction wrote is visible to every snapshot taken after its commit returned.
//! * With [`Background::Manual`] nothing happens by itself: whoever holds the engine calls [`Engine::step`].

use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use bucket::Bucket;
use parking_lot::Mutex;

use crate::limits::Shape;
use crate::locks::{LockTable, Owner};
use crate::naive::NaiveStore;
use crate::status::Status;
use crate::txn::Txn;
use crate::{Clock, Disk, Error, Result, Seqno, TreeId, full_key};

/// The outside world, as the engine gets it.
pub struct Parts {
    /// Where the truth lives.
    pub bucket: Arc<dyn Bucket>,
    /// The machine's disk: a cache, and the newest bytes of the wal.
    pub disk: Arc<dyn Disk>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Chance.
    pub seed: u64,
}

/// What an operator may turn.
#[derive(Clone)]
pub struct Settings {
    /// Which branch of the bucket to write.
    pub branch: String,
    /// Memory for decoded blocks.
    pub block_cache_bytes: usize,
    /// A memtable is frozen and flushed when it has this size.
    pub memtable_bytes: usize,
    /// Local disk for cached pieces of ssts.
    pub disk_cache_bytes: u64,
    /// Commits fail with [`crate::Kind::Full`] when this much waits for its upload.
    pub unuploaded_bytes_max: u64,
    /// A transaction that writes more fails.
    pub transaction_bytes_max: usize,
    /// The wal is uploaded this often while there is something to upload.
    pub wal_upload_interval: Duration,
    /// Sizes that give the tree its shape; for tests to turn, not for operators.
    pub shape: Shape,
    /// Who does the work that no caller waits for.
    pub background: Background,
    /// Whom to tell.
    pub hooks: Hooks,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            branch: "main".to_owned(),
            block_cache_bytes: 256 << 20,
            memtable_bytes: 64 << 20,
            disk_cache_bytes: 10 << 30,
            unuploaded_bytes_max: 4 << 30,
            transaction_bytes_max: 1 << 30,
            wal_upload_interval: Duration::from_secs(1),
            shape: Shape::default(),
            background: Background::Threads,
            hooks: Hooks::default(),
        }
    }
}

/// Who does the work that no caller waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Background {
    /// The engine's own threads.
    Threads,
    /// The caller, with [`Engine::step`]. No thread is started, and a lock that is taken fails at once.
    Manual,
}

/// Calls out of the engine.
#[derive(Clone)]
pub struct Hooks {
    /// The engine can not go on: it is fenced, or its wal failed. Called once, from any thread.
    pub on_fatal: Arc<dyn Fn(&Error) + Send + Sync>,
}

impl Default for Hooks {
    fn default() -> Self {
        Self { on_fatal: Arc::new(|error| tracing::error!(%error, "the engine can not go on")) }
    }
}

/// A piece of background work, for [`Background::Manual`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Uploads the wal's next slice.
    UploadWal,
    /// Freezes the memtable that takes writes, if it has any.
    Freeze,
    /// Writes the oldest frozen memtable to ssts on the local disk.
    Flush,
    /// Uploads the oldest sst that waits, or publishes the manifest edit whose ssts are all uploaded.
    Publish,
    /// Does one compaction.
    Compact,
    /// Deletes objects that nothing names any more.
    CollectGarbage,
}

/// How much there is in a range, roughly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// Entries, with deletions and older versions not told apart.
    pub entries: u64,
    /// Their bytes, keys included.
    pub bytes: u64,
}

/// Trees below this one are never allocated: callers give them meanings of their own.
pub const FIRST_ALLOCATED_TREE: TreeId = TreeId(64);

/// A database.
pub struct Engine {
    pub(crate) settings: Settings,
    pub(crate) locks: LockTable,
    pub(crate) naive: NaiveStore,
    commit_lock: Mutex<()>,
    visible: AtomicU64,
    next_txn: AtomicU64,
    next_tree: AtomicU32,
    parts: Parts,
}

impl Engine {
    /// Takes over the branch (every earlier writer is fenced from now on) and recovers all that was committed.
    pub fn open(parts: Parts, settings: Settings) -> Result<Arc<Self>> {
        let may_wait = settings.background == Background::Threads;
        Ok(Arc::new(Self {
            locks: LockTable::new(parts.seed, Arc::clone(&parts.clock), may_wait),
            settings,
            naive: NaiveStore::default(),
            commit_lock: Mutex::new(()),
            visible: AtomicU64::new(0),
            next_txn: AtomicU64::new(1),
            next_tree: AtomicU32::new(FIRST_ALLOCATED_TREE.0),
            parts,
        }))
    }

    /// An empty transaction, in REPEATABLE READ.
    pub fn begin(self: &Arc<Self>) -> Txn {
        let id = self.next_txn.fetch_add(1, Ordering::Relaxed);
        Txn::new(Arc::clone(self), Owner::new(id))
    }

    /// A tree id that nobody has had before. A crash may give it out again only if no commit wrote to it.
    pub fn allocate_tree(&self) -> TreeId {
        TreeId(self.next_tree.fetch_add(1, Ordering::Relaxed))
    }

    /// About how much is stored between two keys of `tree`.
    pub fn estimate(&self, tree: TreeId, lo: Bound<&[u8]>, hi: Bound<&[u8]>) -> Estimate {
        let mut estimate = Estimate::default();
        let end = match hi {
            Bound::Included(key) => [&full_key(tree, key)[..], &[0]].concat(),
            Bound::Excluded(key) => full_key(tree, key),
            Bound::Unbounded => full_key(TreeId(tree.0 + 1), &[]),
        };
        let mut from = match lo {
            Bound::Included(key) => Bound::Included(full_key(tree, key)),
            Bound::Excluded(key) => Bound::Excluded(full_key(tree, key)),
            Bound::Unbounded => Bound::Included(full_key(tree, &[])),
        };
        let at = self.visible();
        while let Some((key, value)) = self.naive.after(from.as_ref().map(Vec::as_slice), &end, at) {
            estimate.entries += 1;
            estimate.bytes += (key.len() + value.len()) as u64;
            from = Bound::Excluded(key);
        }
        estimate
    }

    /// Does one piece of background work. `false`: there was none of this kind.
    pub fn step(&self, _job: Job) -> Result<bool> {
        Ok(false)
    }

    /// Counters and sizes.
    pub fn status(&self) -> Status {
        let mut status = Status::default();
        status.push("locks_held", self.locks.held());
        status.push("locks_waiting", self.locks.waiting());
        status.push("locks_waits", self.locks.counters.waits.load(Ordering::Relaxed));
        status.push("locks_deadlocks", self.locks.counters.deadlocks.load(Ordering::Relaxed));
        status.push("locks_timeouts", self.locks.counters.timeouts.load(Ordering::Relaxed));
        let meters = self.parts.bucket.meters();
        status.push("bucket_put_requests", meters.put.requests());
        status.push("bucket_put_bytes", meters.put.bytes());
        status.push("bucket_get_requests", meters.get.requests());
        status.push("bucket_get_bytes", meters.get.bytes());
        status.push("bucket_list_requests", meters.list.requests());
        status.push("bucket_delete_requests", meters.delete.requests());
        status
    }

    /// Stops background work. On return all that was committed is on the local disk, and in the bucket unless the
    /// error says otherwise. Transactions may not be used afterwards.
    pub fn close(&self) -> Result<()> {
        Ok(())
    }

    pub(crate) fn visible(&self) -> Seqno {
        Seqno(self.visible.load(Ordering::Acquire))
    }

    pub(crate) fn commit(&self, txn: &Txn) -> Result<Seqno> {
        let _turn = self.commit_lock.lock();
        let seqno = Seqno(self.visible().0 + 1);
        let writes = txn.writes.iter().map(|(key, value)| (key.as_slice(), value.as_deref()));
        self.naive.apply(seqno, writes, txn.drops());
        self.visible.store(seqno.0, Ordering::Release);
        Ok(seqno)
    }
}
