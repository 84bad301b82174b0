//! The engine as its callers see it: open it on a bucket and a disk, begin transactions, ask for its status.
//!
//! * What a committed transaction wrote is visible to every snapshot taken after its commit returned.
//! * With [`Background::Manual`] nothing happens by itself: whoever holds the engine calls [`Engine::step`].

use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use arc_swap::Guard;
use bucket::{Bucket, Names};
use parking_lot::Mutex;

use crate::background::Workers;
use crate::cache::Loan;
use crate::claim::Fence;
use crate::commit::{Commits, Committed, Loads, Seen, not_empty};
use crate::compaction::pressure::{Debt, pauses_merges};
use crate::compaction::run::{self, Context, Merged};
use crate::first_part::FirstPart;
use crate::heat::{self, HeatKeeper, HeatMap};
use crate::load::{Load, Loaded};
use crate::locks::{LockTable, Owner};
use crate::manifest::ManifestWriter;
use crate::points::{self, Point};
use crate::prefetch::prefetch;
use crate::pulse::{Pulse, SLEPT};
use crate::quiet::Quiet;
use crate::recovery::{RecoveryParts, Report, recover};
use crate::replay::Replay;
use crate::settings::{Background, Settings};
use crate::snapshots::Snapshots;
use crate::sorter::{Sorter, SpillSpace};
use crate::status::{Status, UploadTime};
use crate::store::{SstStore, StoreParts};
use crate::throttle::{Place, Throttle};
use crate::tree::{Begun, Sending, Tree};
use crate::txn::Txn;
use crate::version::SstMeta;
use crate::view::View;
use crate::wal::{Uploader, WalLimits};
use crate::writeset::WriteSet;
use crate::{Clock, Disk, Epoch, Error, Kind, Result, Seqno, SstId, TreeId, full_key, gc};

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

/// A piece of background work, for [`Background::Manual`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Makes the wal's next segment file, if the last one is half full.
    PrepareWal,
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
    /// The same, and if none is due one that only makes what the bucket keeps smaller: for times when next to nothing is written.
    SaveSpace,
    /// Deletes objects that nothing names any more.
    CollectGarbage,
    /// Looks whether a newer writer has claimed the branch.
    Validate,
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
    pub(crate) snapshots: Snapshots,
    pub(crate) store: Arc<SstStore>,
    commits: Commits,
    tree: Tree,
    /// Held through a publication: edits go up one after the other.
    manifest: Mutex<ManifestWriter>,
    uploader: Arc<Uploader>,
    fence: Fence,
    throttle: Throttle,
    heat: Arc<HeatKeeper>,
    /// What the wal's buffers take of the memory.
    _wal_buffers: Loan,
    upload_time: UploadTime,
    pulse: Pulse,
    quiet: Mutex<Quiet>,
    /// Memtables are flushed one after the other.
    flushing: Mutex<()>,
    /// What dead writers left in the bucket was looked for.
    swept: AtomicBool,
    fatal: Mutex<Option<(Kind, String)>>,
    next_txn: AtomicU64,
    next_tree: AtomicU32,
    counters: Counters,
    spill: Arc<SpillSpace>,
    report: Report,
    bucket: Arc<dyn Bucket>,
    names: Names,
    clock: Arc<dyn Clock>,
    workers: Workers,
}

#[derive(Default)]
struct Counters {
    commits: AtomicU64,
    flushes: AtomicU64,
    flushed_bytes: AtomicU64,
    loaded_bytes: AtomicU64,
    compactions: AtomicU64,
    compacted_bytes_read: AtomicU64,
    compacted_bytes_written: AtomicU64,
    published: AtomicU64,
    slices_uploaded: AtomicU64,
    ssts_uploaded: AtomicU64,
    ssts_deleted: AtomicU64,
    prefetched: AtomicU64,
    warmed: Arc<AtomicU64>,
    wal_damages: AtomicU64,
    /// The last of them.
    wal_damaged_at: AtomicU64,
}

/// Slices of the wal that a start may have to read from the bucket, before a flush makes them superfluous.
const SLICES_MAX: usize = 256;
/// How long `close` tries to reach the bucket.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(10);
/// Ssts sent to the bucket at the same time.
const UPLOADS: usize = 4;
/// Threads that share one large merge.
const SUBCOMPACTIONS: usize = 2;
/// Objects that a start fetches at the same time.
const FETCHES: usize = 16;
/// Pieces of ssts that one batch of reads fetches at the same time.
const PREFETCHES: usize = 32;

impl Engine {
    /// Takes over the branch (every earlier writer is fenced from now on) and recovers all that was committed.
    pub fn open(parts: Parts, settings: Settings) -> Result<Arc<Self>> {
        let names = Names::new(&settings.branch);
        let threads = settings.background == Background::Threads;
        let store_parts = |branch| StoreParts {
            disk: Arc::clone(&parts.disk),
            bucket: Arc::clone(&parts.bucket),
            names: names.clone(),
            branch,
            memory_bytes: settings.memory_bytes,
            disk_cache_bytes: settings.disk_cache_bytes,
            threads,
        };
        let mut replay = Replay::new(settings.memtable_bytes, &settings.shape, &store_parts);
        let recovery = RecoveryParts {
            bucket: Arc::clone(&parts.bucket),
            disk: Arc::clone(&parts.disk),
            names: names.clone(),
            seed: parts.seed,
            limits: WalLimits {
                segment_bytes: settings.shape.wal_segment_bytes,
                slice_bytes: settings.shape.wal_slice_bytes,
                ..WalLimits::default()
            },
            fetches: if threads { FETCHES } else { 1 },
        };
        let recovered = recover(recovery, &mut |manifest, record| replay.apply(manifest, record))?;
        let manifest = recovered.manifest.manifest();
        let outcome = replay.finish(manifest)?;
        let tree = Tree::new(manifest, settings.shape.clone(), recovered.epoch, outcome.next_sst);
        for replayed in outcome.flushed {
            let slice = recovered.uploader.slice_at(replayed.end.position);
            tree.add_replayed(replayed, slice)?;
        }
        let recorded_tree = recovered.next_tree.max(outcome.next_tree).max(FIRST_ALLOCATED_TREE);
        let commits = Commits::new(
            Arc::clone(&recovered.wal),
            outcome.tables,
            tree.version(),
            tree.dropped(),
            outcome.last.max(Seqno(recovered.next_seqno.0.saturating_sub(1))),
            recorded_tree,
        );
        let store = outcome.store;
        let spill = SpillSpace::open(parts.disk)?;
        let engine = Arc::new(Self {
            heat: Arc::default(),
            // A slice in the making, and one on its way.
            _wal_buffers: store.lend(2 * settings.shape.wal_slice_bytes as usize),
            locks: LockTable::new(parts.seed, Arc::clone(&parts.clock), threads),
            throttle: Throttle::new(
                settings.shape.clone(),
                settings.memtable_bytes as u64,
                settings.unuploaded_bytes_max,
            ),
            upload_time: UploadTime::default(),
            pulse: Pulse::new(parts.clock.now()),
            quiet: Mutex::new(Quiet::new(parts.clock.now(), recovered.wal.end().0)),
            settings,
            snapshots: Snapshots::default(),
            store,
            next_tree: AtomicU32::new(recorded_tree.0),
            commits,
            tree,
            manifest: Mutex::new(recovered.manifest),
            uploader: recovered.uploader,
            fence: recovered.fence,
            flushing: Mutex::new(()),
            swept: AtomicBool::new(false),
            fatal: Mutex::new(None),
            next_txn: AtomicU64::new(1),
            counters: Counters::default(),
            spill,
            report: recovered.report,
            bucket: parts.bucket,
            names,
            clock: parts.clock,
            workers: Workers::new(),
        });
        engine.refresh_throttle();
        if threads {
            engine.workers.start(&engine)?;
            engine.warm();
        }
        Ok(engine)
    }

    /// An empty transaction, in REPEATABLE READ.
    pub fn begin(self: &Arc<Self>) -> Txn {
        let id = self.next_txn.fetch_add(1, Ordering::Relaxed);
        Txn::new(Arc::clone(self), Owner::new(id))
    }

    /// A tree id that nobody has had before. A crash may give it out again only if no commit came after this call.
    pub fn allocate_tree(&self) -> TreeId {
        TreeId(self.next_tree.fetch_add(1, Ordering::SeqCst))
    }

    /// From now on the keys of `tree` have a first part: ssts that are written hold a filter of them, by which
    /// [`Cursor::seek_within`] passes over those that hold nothing. Tell it before the tree is written to, and again after each
    /// start; what was written without knowing it is read like anything else.
    pub fn set_first_part(&self, tree: TreeId, rule: Arc<dyn FirstPart>) {
        self.store.first_parts().set(tree, rule);
    }

    /// `tree` is gone.
    pub fn forget_first_part(&self, tree: TreeId) {
        self.store.first_parts().forget(tree);
    }

    /// How large a memtable gets.
    pub fn memtable_bytes(&self) -> usize {
        self.settings.memtable_bytes
    }

    /// Sorts what one of `share` trees gets that are loaded at the same time; together they have the memory of a memtable.
    pub fn sorter(&self, share: usize) -> Sorter {
        let threads = self.settings.background == Background::Threads;
        let memory = self.store.lend(0);
        Sorter::new(Arc::clone(&self.spill), memory, self.settings.memtable_bytes / share.max(1), threads)
    }

    /// Whether `tree` holds nothing, neither rows nor deletions nor what only old snapshots still see, but perhaps under its empty key.
    pub fn is_untouched(&self, tree: TreeId) -> Result<bool> {
        Ok(!self.view().holds_keys(&self.store, tree)?)
    }

    /// Keys of `tree`, ascending, at which to divide it among at most `parts` readers that go on side by side, each with about as much to do. None
    /// if there is little to read, or if this engine does everything on its callers' threads.
    pub fn cuts(&self, tree: TreeId, parts: usize) -> Vec<Vec<u8>> {
        match self.settings.background {
            Background::Threads => self.view().cuts(tree, parts),
            Background::Manual => Vec::new(),
        }
    }

    /// About how much is stored between two keys of `tree`. Never fails: what can not be read counts as nothing.
    pub fn estimate(&self, tree: TreeId, lo: Bound<&[u8]>, hi: Bound<&[u8]>) -> Estimate {
        let bound = |bound: Bound<&[u8]>, otherwise: TreeId| match bound {
            Bound::Included(key) => Bound::Included(full_key(tree, key)),
            Bound::Excluded(key) => Bound::Excluded(full_key(tree, key)),
            Bound::Unbounded => Bound::Included(full_key(otherwise, &[])),
        };
        let (low, high) = (bound(lo, tree), bound(hi, TreeId(tree.0.saturating_add(1))));
        self.view().estimate(
            &self.store,
            tree,
            low.as_ref().map(Vec::as_slice),
            high.as_ref().map(Vec::as_slice),
        )
    }

    /// Data blocks that reads did not find in memory, so far: a reader sees by it that what it reads is cold.
    #[inline]
    pub fn block_misses(&self) -> u64 {
        self.store.block_misses()
    }

    /// Begins to fill `tree`, of which there must be nothing: no version of any key, deletions included; and until the commit nobody
    /// may write to it. Otherwise [`Kind::BadRequest`], here or by the commit.
    pub fn load(self: &Arc<Self>, tree: TreeId) -> Result<Load> {
        self.check_alive()?;
        self.check_unwritten(&self.view(), tree)?;
        Load::new(self, tree)
    }

    /// Does one piece of background work. `false`: there was none of this kind.
    pub fn step(&self, job: Job) -> Result<bool> {
        self.check_alive()?;
        let result = match job {
            Job::PrepareWal => self.commits.wal().prepare(),
            Job::UploadWal => self.upload_wal(),
            Job::Freeze => self.commits.freeze_active(),
            Job::Flush => self.flush(),
            Job::Publish => self.publish(),
            Job::Compact => self.compact(self.subcompactions(), false),
            Job::SaveSpace => self.save_space(),
            Job::CollectGarbage => self.collect_garbage(),
            Job::Validate => self.fence.check().map(|()| false),
        };
        self.refresh_throttle();
        result.inspect_err(|error| self.note(error))
    }

    /// [`Job::Compact`] with a merge shared by so many threads, for `bench`.
    #[doc(hidden)]
    pub fn compact_by(&self, threads: usize) -> Result<bool> {
        self.compact(threads, false)
    }

    /// Counters and sizes.
    pub fn status(&self) -> Status {
        let mut status = Status::default();
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let version = self.tree.version();
        let wal = self.commits.wal();
        let cache = self.store.block_cache_status();
        let disk = self.store.disk_cache_status();
        let meters = self.bucket.meters();
        for (name, value) in [
            ("epoch", self.fence.epoch().0),
            ("commits", count(&self.counters.commits)),
            ("visible_seqno", self.visible().0),
            ("transactions_open", self.snapshots.registered() as u64),
            ("locks_held", self.locks.held()),
            ("locks_waiting", self.locks.waiting()),
            ("locks_waits", count(&self.locks.counters.waits)),
            ("locks_deadlocks", count(&self.locks.counters.deadlocks)),
            ("locks_timeouts", count(&self.locks.counters.timeouts)),
            ("wal_bytes", wal.end().0 - wal.start().0),
            ("wal_syncs", wal.syncs()),
            ("wal_unuploaded_bytes", self.unuploaded_wal()),
            ("wal_slices", self.uploader.slices() as u64),
            ("wal_damages", count(&self.counters.wal_damages)),
            ("wal_upload_ms_max", self.upload_time.longest(self.clock.now()).as_millis() as u64),
            ("memtable_bytes", self.view().active.bytes() as u64),
            ("memtables_frozen", self.commits.frozen_count() as u64),
            ("flushes", count(&self.counters.flushes)),
            ("flushed_bytes", count(&self.counters.flushed_bytes)),
            ("loaded_bytes", count(&self.counters.loaded_bytes)),
            ("compactions", count(&self.counters.compactions)),
            ("compactions_running", self.tree.merging() as u64),
            ("surplus_bytes", self.surplus()),
            ("compacted_bytes_read", count(&self.counters.compacted_bytes_read)),
            ("compacted_bytes_written", count(&self.counters.compacted_bytes_written)),
            ("read_steps_in_vain", version.ssts().map(|(_, sst)| sst.opened.wasted()).sum()),
            ("l0_runs", version.l0.len() as u64),
            ("ssts", version.ssts().count() as u64),
            ("sst_bytes", version.ssts().map(|(_, sst)| sst.bytes).sum()),
            ("wal_slices_uploaded", count(&self.counters.slices_uploaded)),
            ("ssts_uploaded", count(&self.counters.ssts_uploaded)),
            ("edits_published", count(&self.counters.published)),
            ("edits_queued", self.tree.queued() as u64),
            ("unuploaded_bytes", self.store.unuploaded_bytes()),
            ("unuploaded_bytes_max", self.settings.unuploaded_bytes_max),
            ("ssts_deleted", count(&self.counters.ssts_deleted)),
            ("prefetched", count(&self.counters.prefetched)),
            ("warmed_chunks", count(&self.counters.warmed)),
            ("writes_delayed", self.throttle.delayed()),
            ("block_cache_hits", cache.hits),
            ("block_cache_misses", cache.misses),
            ("block_cache_bytes", cache.bytes),
            ("block_cache_evictions", cache.evictions),
            ("block_cache_capacity", cache.capacity),
            ("memory_bytes", self.settings.memory_bytes as u64),
            ("memory_lent", cache.lent),
            ("memory_excess", cache.excess),
            ("disk_cache_hits", disk.hits),
            ("disk_cache_misses", disk.misses),
            ("disk_cache_bytes", disk.bytes),
            ("disk_cache_capacity", disk.capacity),
            ("disk_cache_written_bytes", disk.written),
            ("bucket_waits", self.store.waits()),
            ("recovered_transactions", self.report.transactions),
            ("recovered_local_transactions", self.report.local_transactions),
            ("recovered_slices", self.report.slices as u64),
            ("wals_set_aside", self.report.set_aside.len() as u64),
            ("bucket_put_requests", meters.put.requests()),
            ("bucket_put_bytes", meters.put.bytes()),
            ("bucket_put_errors", meters.put.errors()),
            ("bucket_get_requests", meters.get.requests()),
            ("bucket_get_bytes", meters.get.bytes()),
            ("bucket_get_errors", meters.get.errors()),
            ("bucket_get_hedged", meters.hedged.requests()),
            ("bucket_head_requests", meters.head.requests()),
            ("bucket_list_requests", meters.list.requests()),
            ("bucket_delete_requests", meters.delete.requests()),
        ] {
            status.push(name, value);
        }
        status
    }

    /// Stops background work. On return all that was committed is on the local disk, and in the bucket unless the
    /// error says otherwise. Every later commit fails.
    pub fn close(&self) -> Result<()> {
        self.commits.close(Kind::Unavailable, "the engine is closed");
        self.workers.stop();
        self.check_alive()?;
        let wal = self.commits.wal();
        wal.sync_to(wal.end())?;
        let deadline = self.clock.now() + CLOSE_TIME_MAX;
        loop {
            match self.uploader.step() {
                Ok(false) => {
                    self.store.settle(&*self.clock, deadline);
                    if self.settings.background == Background::Threads {
                        self.save_last_heat();
                    }
                    return Ok(());
                }
                Ok(true) => {}
                Err(error) if error.kind() == Kind::Unavailable && self.clock.now() < deadline => {
                    self.clock.sleep(Duration::from_millis(100));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The term that this engine writes in.
    pub fn epoch(&self) -> Epoch {
        self.fence.epoch()
    }

    /// True if the last writer before this start used the same local disk, and its wal is still there: nobody wrote in between, so what
    /// else that writer left on this machine is as new as anything.
    pub fn continues_local_wal(&self) -> bool {
        self.report.continued_local
    }

    pub(crate) fn visible(&self) -> Seqno {
        self.commits.visible()
    }

    pub(crate) fn visible_counter(&self) -> &AtomicU64 {
        self.commits.visible_counter()
    }

    #[inline]
    pub(crate) fn view(&self) -> Guard<Arc<View>> {
        self.commits.view()
    }

    #[inline]
    pub(crate) fn newest(&self) -> (Guard<Arc<View>>, Seqno) {
        self.commits.newest()
    }

    pub(crate) fn applied(&self) -> Seqno {
        self.commits.applied()
    }

    pub(crate) fn not_yet_visible(&self, at: Seqno) -> Option<Seen> {
        self.commits.not_yet_visible(at)
    }

    /// Returns when what was seen is durable and visible.
    pub(crate) fn settle(&self, seen: Seen) -> Result<()> {
        self.commits.settle(seen).inspect_err(|error| self.note(error))
    }

    pub(crate) fn prefetch(&self, keys: &[&[u8]]) -> usize {
        let at_once = if self.settings.background == Background::Threads { PREFETCHES } else { 1 };
        let view = Arc::clone(&self.view());
        let pieces = prefetch(&view, &self.store, keys, at_once);
        self.counters.prefetched.fetch_add(pieces as u64, Ordering::Relaxed);
        pieces
    }

    /// `unlock`: see [`Commits::commit`].
    pub(crate) fn commit(
        &self,
        writes: &WriteSet,
        drops: &[TreeId],
        loaded: Vec<Loaded>,
        unlock: impl FnOnce(),
    ) -> Result<Seqno> {
        let place = self.admit(writes.bytes() as u64)?;
        let unlock = || {
            // Its writes are in the memtable.
            drop(place);
            unlock();
        };
        let committed = if loaded.is_empty() {
            self.commit_now(writes, drops, None, unlock).map(|done| done.expect("nothing was checked"))
        } else {
            self.commit_loaded(writes, drops, loaded)
        };
        let committed = committed.inspect_err(|error| self.note(error))?;
        if self.settings.background == Background::Threads && self.slept() {
            self.wait_until_awake()?;
        }
        self.counters.commits.fetch_add(1, Ordering::Relaxed);
        if self.commits.wal().wants_room() {
            self.workers.ring(Job::PrepareWal);
        }
        if committed.froze {
            self.refresh_throttle();
            self.workers.ring(Job::Flush);
        }
        Ok(committed.seqno)
    }

    fn commit_now(
        &self,
        writes: &WriteSet,
        drops: &[TreeId],
        loads: Option<&mut Loads>,
        unlock: impl FnOnce(),
    ) -> Result<Option<Committed>> {
        let next_tree = TreeId(self.next_tree.load(Ordering::SeqCst));
        self.commits.commit(writes, drops, loads, next_tree, self.settings.memtable_bytes, unlock)
    }

    fn commit_loaded(&self, writes: &WriteSet, drops: &[TreeId], loaded: Vec<Loaded>) -> Result<Committed> {
        let trees: Vec<TreeId> = loaded.iter().map(Loaded::tree).collect();
        let own = |tree: &&TreeId| drops.contains(tree) || writes.holds(**tree);
        if let Some(tree) = trees.iter().find(own) {
            return Err(not_empty(*tree));
        }
        let mut loads = Loads { loaded, checked: self.tree.version() };
        loop {
            // To see what lies in ssts takes reading, which can't be done while other commits wait.
            let view = Arc::clone(&self.view());
            trees.iter().try_for_each(|tree| self.check_unwritten(&view, *tree))?;
            loads.checked = Arc::clone(&view.version);
            if let Some(committed) = self.commit_now(writes, drops, Some(&mut loads), || ())? {
                let bytes = loads.loaded.iter().map(|loaded| loaded.bytes()).sum();
                self.counters.loaded_bytes.fetch_add(bytes, Ordering::Relaxed);
                return Ok(committed);
            }
        }
    }

    fn check_unwritten(&self, view: &View, tree: TreeId) -> Result<()> {
        if view.dropped.contains(&tree) || view.holds(&self.store, tree)? {
            return Err(not_empty(tree));
        }
        Ok(())
    }

    pub(crate) fn pause(&self, pause: Duration) {
        self.clock.sleep(pause);
    }

    pub(crate) fn store(&self) -> &Arc<SstStore> {
        &self.store
    }

    /// A name that no sst has had.
    pub(crate) fn next_sst(&self) -> SstId {
        self.tree.next_sst()
    }

    /// `ssts` were written here, and nothing will ever name them.
    pub(crate) fn discard(&self, ssts: Vec<SstId>) {
        if !ssts.is_empty() {
            self.tree.discard(ssts);
            self.workers.ring(Job::Publish);
        }
    }

    /// Whether as much of the wal waits for its upload as fits into one object.
    pub(crate) fn has_full_slice(&self) -> bool {
        self.unuploaded_wal() >= self.settings.shape.wal_slice_bytes
    }

    pub(crate) fn now(&self) -> Duration {
        self.clock.now()
    }

    /// Whether this process may have slept since anybody looked at the claims.
    pub(crate) fn slept(&self) -> bool {
        self.pulse.slept(self.now())
    }

    /// Whether next to nothing was written for a while.
    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet.lock().is_quiet(self.now())
    }

    /// Stamps the time; after a sleep looks at the claims first.
    pub(crate) fn beat(&self) -> Result<()> {
        let (mut at, mut looked) = (self.now(), Ok(false));
        if self.pulse.slept(at) {
            // An answer that took long may be from before another sleep; where each one does the bucket is slow.
            let mut slow = false;
            for _ in 0..3 {
                at = self.now();
                looked = self.step(Job::Validate);
                slow = self.now() - at > SLEPT;
                if looked.is_err() || !slow {
                    break;
                }
            }
            if slow {
                at = self.now();
            }
            // The stamp stays old for commits that are past all other questions.
            self.check_alive()?;
        }
        self.pulse.stamp(at);
        self.quiet.lock().look(at, self.commits.wal().end().0);
        self.refresh_throttle();
        self.store.heed((self.settings.hooks.oversize)());
        looked.map(drop)
    }

    /// Returns when somebody has looked at the claims since this process slept; with the error if we are fenced.
    #[cold]
    fn wait_until_awake(&self) -> Result<()> {
        while self.slept() && !self.workers.stopped() {
            self.check_alive()?;
            self.pulse.wait();
        }
        self.check_alive()
    }

    /// Why the engine can not go on, if so.
    pub(crate) fn check_alive(&self) -> Result<()> {
        match &*self.fatal.lock() {
            None => Ok(()),
            Some((kind, message)) => Err(Error::new(*kind, message.clone())),
        }
    }

    /// A background thread panicked in a step called `step`: nothing goes on.
    pub(crate) fn fail(&self, step: &str, message: &str) -> Error {
        let error =
            Error::new(Kind::Failed, format!("a bug ended the background thread \"{step}\": {message}"));
        self.note(&error);
        error
    }

    /// An error that ends this writer ends it for everybody.
    fn note(&self, error: &Error) {
        if !matches!(error.kind(), Kind::Fenced | Kind::Failed) {
            return;
        }
        {
            let mut fatal = self.fatal.lock();
            if fatal.is_some() {
                return;
            }
            *fatal = Some((error.kind(), error.to_string()));
        }
        self.commits.close(error.kind(), &error.to_string());
        self.workers.ring_all();
        (self.settings.hooks.on_fatal)(error);
    }

    /// Lets a writer of `bytes` go on when flush, compaction and upload keep up.
    fn admit(&self, bytes: u64) -> Result<Option<Place<'_>>> {
        let manual = self.settings.background == Background::Manual;
        self.throttle.admit(bytes, &*self.clock, || {
            self.check_alive()?;
            if !manual {
                self.refresh_throttle();
                return Ok(true);
            }
            let worked = self.step(Job::Flush)? || self.step(Job::Compact)?;
            Ok(worked)
        })
    }

    fn refresh_throttle(&self) {
        self.throttle.refresh(self.debt());
        let view = self.view();
        self.store.count_memtable(&view.active, self.settings.memtable_bytes);
        view.frozen.iter().for_each(|memtable| self.store.count_memtable(memtable, 0));
    }

    fn debt(&self) -> Debt {
        let (l0_runs, compaction_bytes) = self.tree.debt();
        let memtable = self.settings.memtable_bytes as f64;
        Debt {
            l0_runs,
            frozen_memtables: self.commits.frozen_count(),
            active_filled: self.view().active.bytes() as f64 / memtable,
            granted: self.throttle.granted() as f64 / memtable,
            compaction_bytes,
            unuploaded_bytes: self.store.unuploaded_bytes() + self.unuploaded_wal(),
            unuploaded_bytes_max: self.settings.unuploaded_bytes_max,
        }
    }

    fn unuploaded_wal(&self) -> u64 {
        self.commits.wal().durable().0.saturating_sub(self.uploader.uploaded().0)
    }

    fn upload_wal(&self) -> Result<bool> {
        self.upload_time.begin(self.clock.now());
        let worked = match self.uploader.step() {
            Err(error) if self.uploader.damaged().is_some() => return self.flush_past_damage(&error),
            result => result?,
        };
        self.upload_time.end(self.clock.now());
        self.counters.slices_uploaded.fetch_add(u64::from(worked), Ordering::Relaxed);
        let flushing = self.commits.frozen_count() > 0 || self.tree.queued() > 0;
        if self.uploader.slices() >= SLICES_MAX && !flushing && self.commits.freeze_active()? {
            self.workers.ring(Job::Flush);
        }
        Ok(worked)
    }

    /// What the damaged wal says goes to the bucket in ssts instead, and the upload goes on behind them.
    fn flush_past_damage(&self, error: &Error) -> Result<bool> {
        let place = self.uploader.damaged().map_or(0, |place| place.0);
        if self.counters.wal_damaged_at.swap(place, Ordering::Relaxed) != place {
            self.counters.wal_damages.fetch_add(1, Ordering::Relaxed);
            tracing::error!(%error, "the local disk has damaged what is not in the bucket yet; it is still in memory and is flushed now");
        }
        if self.commits.frozen_count() == 0 {
            self.commits.freeze_active()?;
        }
        self.workers.ring(Job::Flush);
        Ok(false)
    }

    fn flush(&self) -> Result<bool> {
        let _one = self.flushing.lock();
        let Some(table) = self.commits.oldest_frozen() else { return Ok(false) };
        while !table.is_complete() {
            self.check_alive()?;
            self.clock.sleep(Duration::from_millis(1));
        }
        let end = table.end().expect("a frozen memtable has an end");
        let wal = self.commits.wal();
        if end.position > wal.start() {
            wal.sync_to(end.position)?;
        }
        let snapshots = self.snapshots.live(self.visible_counter());
        let dropped = self.tree.dropped();
        let ssts = self.rewrite(&snapshots, &dropped, |context| run::flush(&table.memtable, context))?;
        self.counters.flushes.fetch_add(1, Ordering::Relaxed);
        self.counters.flushed_bytes.fetch_add(ssts.iter().map(|sst| sst.bytes).sum(), Ordering::Relaxed);
        points::pass(Point::InFlush);
        self.uploader.pass_damage(end.position);
        let slice = self.uploader.slice_at(end.position);
        self.tree.install_flush(&self.commits, &table, ssts, slice)?;
        self.workers.ring(Job::Publish);
        self.workers.ring(Job::Compact);
        Ok(true)
    }

    fn publish(&self) -> Result<bool> {
        let mut manifest = self.manifest.lock();
        let threads = self.settings.background == Background::Threads;
        match self.tree.next_to_send(if threads { UPLOADS } else { 1 }) {
            None => return Ok(false),
            Some(Sending::Upload(ssts)) => {
                self.upload(&ssts)?;
                points::pass(Point::AfterSstPut);
                self.tree.uploaded(ssts.len());
                self.counters.ssts_uploaded.fetch_add(ssts.len() as u64, Ordering::Relaxed);
            }
            Some(Sending::Publish(edit)) => {
                manifest.publish(&edit)?;
                self.tree.published();
                // Merges may have paused for want of this.
                self.workers.ring(Job::Compact);
                self.counters.published.fetch_add(1, Ordering::Relaxed);
                if edit.flushed.is_some() {
                    points::pass(Point::BeforeTrim);
                    self.uploader.trim(manifest.manifest())?;
                }
                manifest.clean_step()?;
            }
        }
        Ok(true)
    }

    /// Returns when all `ssts` are in the bucket, sent side by side. After an error some may be, which does no harm.
    fn upload(&self, ssts: &[SstId]) -> Result<()> {
        let Some((last, others)) = ssts.split_last() else { return Ok(()) };
        std::thread::scope(|scope| {
            let others: Vec<_> = others.iter().map(|id| scope.spawn(|| self.store.upload(*id))).collect();
            let last = self.store.upload(*last);
            let join = |upload: std::thread::ScopedJoinHandle<'_, _>| {
                upload.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            others.into_iter().map(join).chain([last]).collect()
        })
    }

    fn subcompactions(&self) -> usize {
        match self.settings.background {
            Background::Threads => SUBCOMPACTIONS,
            Background::Manual => 1,
        }
    }

    /// Until it is flushed, the memtable is in the bucket as wal, which is not packed.
    fn save_space(&self) -> Result<bool> {
        let flushing = self.commits.frozen_count() > 0;
        let memtable_too_much = self.surplus() > self.tree.surplus(0);
        if memtable_too_much && !flushing && self.commits.freeze_active()? {
            self.workers.ring(Job::Flush);
            return Ok(true);
        }
        self.compact(self.subcompactions(), true)
    }

    fn surplus(&self) -> u64 {
        self.tree.surplus(self.view().active.bytes() as u64)
    }

    fn compact(&self, parts: usize, quiet: bool) -> Result<bool> {
        // Readers may have let go of something.
        self.forget_unsent();
        if pauses_merges(&self.debt(), &self.settings.shape) {
            return Ok(false);
        }
        let snapshots = self.snapshots.live(self.visible_counter());
        let oldest = *snapshots.first().expect("the newest visible seqno is always there");
        let (plan, version) = match self.tree.begin_compaction(&self.commits, oldest, quiet)? {
            None => return Ok(false),
            Some(Begun::Done) => {
                self.forget_unsent();
                self.workers.ring(Job::Publish);
                return Ok(true);
            }
            Some(Begun::Merge(plan, version)) => (plan, version),
        };
        let dropped = self.tree.dropped();
        let result =
            self.rewrite(&snapshots, &dropped, |context| run::merge(&plan, &version, parts, context));
        if let Ok(Merged { inputs, outputs }) = &result {
            heat::hand_on(&self.store, inputs, outputs);
            let bytes = |ssts: &[Arc<SstMeta>]| ssts.iter().map(|sst| sst.bytes).sum();
            self.counters.compactions.fetch_add(1, Ordering::Relaxed);
            self.counters.compacted_bytes_read.fetch_add(bytes(inputs), Ordering::Relaxed);
            self.counters.compacted_bytes_written.fetch_add(bytes(outputs), Ordering::Relaxed);
        }
        drop(version);
        let (merged, result) = match result {
            Ok(merged) => (Some(merged), Ok(true)),
            Err(error) => (None, Err(error)),
        };
        self.tree.end_merge(&self.commits, &plan, merged)?;
        self.forget_unsent();
        self.workers.ring(Job::Publish);
        result
    }

    /// Tells the next node what is hot, if that has changed and was not told a moment ago.
    pub(crate) fn save_heat(&self) {
        self.heat_teller(false)();
    }

    /// The same, if it has changed. A bucket that does not answer is not waited for: it is only a hint.
    fn save_last_heat(&self) {
        let tell = self.heat_teller(true);
        let (telling, told) = std::sync::mpsc::channel::<()>();
        let tell = move || {
            tell();
            drop(telling);
        };
        let thread = std::thread::Builder::new().name("cistern-heat".to_owned()).spawn(tell);
        if thread.is_err() || told.recv_timeout(CLOSE_TIME_MAX) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the last heat map was not written; a new node will warm itself more slowly");
        }
    }

    fn heat_teller(&self, now_or_never: bool) -> impl FnOnce() + Send + 'static {
        let (heat, bucket, names) = (Arc::clone(&self.heat), Arc::clone(&self.bucket), self.names.clone());
        let (store, version) = (Arc::clone(&self.store), self.tree.version());
        let (epoch, now) = (self.fence.epoch(), self.clock.now());
        move || {
            let collect = |inherited: &HeatMap| HeatMap::collect(&store, &version, inherited);
            if let Err(error) = heat.save((&*bucket, &names, epoch), now, now_or_never, collect) {
                tracing::warn!(%error, "the heat map was not written; a new node will warm itself more slowly");
            }
        }
    }

    /// Begins to bring to the local disk what was hot for the last writer.
    fn warm(&self) {
        let version = self.tree.version();
        if version.ssts().next().is_none() {
            return;
        }
        let (store, heat, bucket) =
            (Arc::clone(&self.store), Arc::clone(&self.heat), Arc::clone(&self.bucket));
        let (names, clock, warmed) =
            (self.names.clone(), Arc::clone(&self.clock), Arc::clone(&self.counters.warmed));
        let epoch = self.fence.epoch();
        self.workers.run_once("cistern-warm", move |goes_on| match heat.load((&*bucket, &names, epoch)) {
            Ok(None) => {}
            Ok(Some(map)) => {
                let came = heat::warm(&store, &version, &map, &*clock, goes_on);
                warmed.store(came as u64, Ordering::Relaxed);
            }
            Err(error) => tracing::warn!(%error, "no heat map; what is read comes from the bucket first"),
        });
    }

    fn rewrite<R>(
        &self,
        snapshots: &[Seqno],
        dropped: &BTreeSet<TreeId>,
        rewrite: impl FnOnce(&Context<'_>) -> Result<R>,
    ) -> Result<R> {
        rewrite(&Context {
            store: &self.store,
            snapshots,
            dropped,
            shape: &self.settings.shape,
            next_id: &|| self.tree.next_sst(),
            goes_on: &|| !self.workers.stopped() && self.check_alive().is_ok(),
        })
    }

    /// Local files of ssts that were merged away before their upload make room at once, whether the bucket answers or not.
    fn forget_unsent(&self) {
        self.tree.dead_unsent().iter().for_each(|id| self.store.forget(*id));
    }

    fn collect_garbage(&self) -> Result<bool> {
        self.forget_unsent();
        let manifest = self.manifest.lock();
        let published = &manifest.manifest().version;
        // Before the tree is asked: they go from here to there.
        let loaded = self.commits.loaded();
        let mut dead = self.tree.dead(published);
        let sweeping = !self.swept.load(Ordering::Relaxed);
        if sweeping {
            let listing = self.bucket.list(&self.names.ssts())?;
            dead.extend(gc::orphans(&listing, &self.tree.held(published), self.fence.epoch()));
        }
        dead.retain(|id| !loaded.contains(id));
        gc::delete(&*self.bucket, &self.names, &dead, || self.fence.check())?;
        self.swept.store(true, Ordering::Relaxed);
        dead.iter().for_each(|id| self.store.forget(*id));
        self.tree.forget(&dead);
        self.counters.ssts_deleted.fetch_add(dead.len() as u64, Ordering::Relaxed);
        Ok(!dead.is_empty())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.workers.stop();
    }
}
