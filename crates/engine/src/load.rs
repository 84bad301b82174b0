//! Fills a tree of which there is nothing with sorted data: ssts in the bucket at once, past wal and memtable. A commit makes them
//! visible (`commit`), with a record of the wal that names them and a place beside the memtable until its flush.
//!
//! * The caller's rows go in batches to a thread that builds ssts, and from there to a few that upload. Each waits for the next one,
//!   so a load takes the memory of a few ssts, however much there is to load.
//! * An sst is in the bucket before anything names it. What no transaction took is given up: garbage collection deletes it. After a
//!   crash the next start finds it named by nothing.
//! * The seqno of the commit is not known while ssts are written: they say 0, and the manifest says which one counts.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::cache::Loan;
use crate::engine::{Engine, Job};
use crate::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use crate::points::{self, Point};
use crate::settings::Background;
use crate::sst::{SstBuilder, SstOptions};
use crate::version::SstMeta;
use crate::{Error, Kind, OpKind, Result, Seqno, TreeId, full_key};

/// Rows that go to the builder at once.
const BATCH_BYTES: usize = 256 << 10;
/// Batches that may wait for it.
const BATCHES_MAX: usize = 16;
/// Ssts of one load on their way to the bucket.
const UPLOADS_MAX: usize = 3;
/// A load leaves copies of what it wrote in at most this part of the local cache, so that it does not push out all that is read.
const COPIED_SHARE: u64 = 4;
/// How long one sst is sent again and again before the load fails.
const PATIENCE: Duration = Duration::from_secs(600);
const RETRY: Duration = Duration::from_millis(500);
/// How often a wait looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(100);

/// A tree that is being filled. Dropping it gives up what was written.
pub struct Load {
    tree: TreeId,
    last_key: Vec<u8>,
    entries: u64,
    bytes: u64,
    work: Work,
    interrupted: Option<Box<dyn Fn() -> bool + Send>>,
    /// The sst in the making, those on their way, and batches before them.
    _memory: Loan,
}

/// Who builds.
enum Work {
    /// The caller's thread.
    Here(Box<Ssts>),
    /// A thread of its own.
    There { pipe: Arc<Pipe>, batch: Vec<u8> },
}

/// A load that is in the bucket, every byte of it, and that nobody sees. Dropping it gives it up.
pub struct Loaded {
    engine: Arc<Engine>,
    tree: TreeId,
    ssts: Vec<Arc<SstMeta>>,
    kept: bool,
}

impl Load {
    pub(crate) fn new(engine: &Arc<Engine>, tree: TreeId) -> Result<Self> {
        let threads = engine.settings.background == Background::Threads;
        let ssts = Ssts::new(Arc::clone(engine), tree);
        let work = if threads {
            let pipe = Arc::new(Pipe::default());
            let shared = Arc::clone(&pipe);
            let name = "cistern-load".to_owned();
            std::thread::Builder::new()
                .name(name)
                .spawn(move || shared.work(ssts))
                .map_err(|error| Error::new(Kind::Unavailable, "a thread for a load").with_cause(error))?;
            Work::There { pipe, batch: Vec::new() }
        } else {
            Work::Here(Box::new(ssts))
        };
        let sst_bytes = engine.settings.shape.sst_bytes;
        let memory =
            engine.store.lend(sst_bytes / 2 * 3 + UPLOADS_MAX * sst_bytes + BATCHES_MAX * BATCH_BYTES);
        Ok(Self {
            tree,
            last_key: Vec::new(),
            entries: 0,
            bytes: 0,
            work,
            interrupted: None,
            _memory: memory,
        })
    }

    /// `put` and `finish` ask `interrupted` every 100 ms while they wait for the bucket; `true` ends them with
    /// [`Kind::Interrupted`].
    pub fn interrupted_by(mut self, interrupted: impl Fn() -> bool + Send + 'static) -> Self {
        self.interrupted = Some(Box::new(interrupted));
        self
    }

    /// The next key (without its tree) and its value. Waits while earlier ones have not got far enough.
    ///
    /// [`Kind::BadRequest`] if the key is not greater than the one before, or something is too long. After any other error the load
    /// has failed, perhaps because of a row put long before: drop it.
    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.check(key, value)?;
        match &mut self.work {
            Work::Here(ssts) => ssts.add(key, value)?,
            Work::There { batch, .. } => {
                batch.extend_from_slice(&(key.len() as u32).to_le_bytes());
                batch.extend_from_slice(&(value.len() as u32).to_le_bytes());
                batch.extend_from_slice(key);
                batch.extend_from_slice(value);
                if batch.len() >= BATCH_BYTES {
                    self.hand_over()?;
                }
            }
        }
        self.last_key.clear();
        self.last_key.extend_from_slice(key);
        self.entries += 1;
        self.bytes += (key.len() + value.len()) as u64;
        Ok(())
    }

    /// Returns when all of it is in the bucket, and this writer was still the newest after that.
    ///
    /// While the bucket does not answer it waits, for minutes, and then fails with [`Kind::Unavailable`].
    pub fn finish(mut self) -> Result<Loaded> {
        if matches!(self.work, Work::There { .. }) {
            self.hand_over()?;
        }
        let tree = self.tree;
        let loaded = match &mut self.work {
            Work::Here(ssts) => ssts.finish()?,
            Work::There { pipe, .. } => pipe.end(self.interrupted.as_deref())?,
        };
        assert_eq!(loaded.entries(), self.entries, "tree {}: rows were lost on the way into ssts", tree.0);
        points::pass(Point::InLoad);
        Ok(loaded)
    }

    /// Rows so far.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Bytes of their keys and values.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn check(&self, key: &[u8], value: &[u8]) -> Result<()> {
        let refuse = |why: String| Err(Error::new(Kind::BadRequest, format!("tree {}: {why}", self.tree.0)));
        if self.entries > 0 && key <= &self.last_key[..] {
            return refuse("the keys of a load must ascend".to_owned());
        }
        if key.len() > KEY_BYTES_MAX || value.len() > VALUE_BYTES_MAX {
            let (k, v) = (key.len(), value.len());
            return refuse(format!(
                "a key of {k} bytes with a value of {v}; at most {KEY_BYTES_MAX} and {VALUE_BYTES_MAX} fit"
            ));
        }
        Ok(())
    }

    fn hand_over(&mut self) -> Result<()> {
        let Work::There { pipe, batch } = &mut self.work else { return Ok(()) };
        pipe.send(batch, self.interrupted.as_deref())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Work::There { pipe, .. } = &self.work {
            pipe.give_up();
        }
    }
}

impl Loaded {
    /// Rows in it.
    pub fn entries(&self) -> u64 {
        self.ssts.iter().map(|sst| sst.entries).sum()
    }

    /// Its bytes in the bucket.
    pub fn bytes(&self) -> u64 {
        self.ssts.iter().map(|sst| sst.bytes).sum()
    }

    /// What it fills.
    pub fn tree(&self) -> TreeId {
        self.tree
    }

    /// Whether there was no row.
    pub fn is_empty(&self) -> bool {
        self.ssts.is_empty()
    }

    pub(crate) fn is_of(&self, engine: &Arc<Engine>) -> bool {
        Arc::ptr_eq(&self.engine, engine)
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(crate) fn ssts(&self) -> &[Arc<SstMeta>] {
        &self.ssts
    }

    /// A commit has it: it is not given up any more.
    pub(crate) fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if !self.kept {
            self.engine.discard(self.ssts.iter().map(|sst| sst.id).collect());
        }
    }
}

/// Between the caller and the thread that builds.
#[derive(Default)]
struct Pipe {
    state: Mutex<PipeState>,
    news: Condvar,
    given_up: Arc<AtomicBool>,
}

#[derive(Default)]
struct PipeState {
    /// Rows: key length u32 │ value length u32 │ key │ value.
    batches: VecDeque<Vec<u8>>,
    /// Batches that were worked off, to be used again.
    empty: Vec<Vec<u8>>,
    /// No batch will come.
    ended: bool,
    outcome: Option<Result<Loaded>>,
}

type Asked<'a> = Option<&'a (dyn Fn() -> bool + Send)>;

impl Pipe {
    /// Hands `batch` over, and leaves an empty one in its place.
    fn send(&self, batch: &mut Vec<u8>, interrupted: Asked<'_>) -> Result<()> {
        let ready = |state: &PipeState| state.batches.len() < BATCHES_MAX || state.outcome.is_some();
        let mut state = self.state.lock();
        while !ready(&state) {
            self.wait(&mut state, interrupted)?;
        }
        if state.outcome.is_some() {
            // It ends by itself only with an error.
            return self.outcome(&mut state).map(drop);
        }
        let empty = state.empty.pop().unwrap_or_else(|| Vec::with_capacity(BATCH_BYTES + BATCH_BYTES / 8));
        state.batches.push_back(std::mem::replace(batch, empty));
        self.news.notify_all();
        Ok(())
    }

    /// What it all came to, when that is known.
    fn end(&self, interrupted: Asked<'_>) -> Result<Loaded> {
        let mut state = self.state.lock();
        state.ended = true;
        self.news.notify_all();
        while state.outcome.is_none() {
            self.wait(&mut state, interrupted)?;
        }
        self.outcome(&mut state)
    }

    fn wait(&self, state: &mut parking_lot::MutexGuard<'_, PipeState>, interrupted: Asked<'_>) -> Result<()> {
        if self.news.wait_for(state, LOOK).timed_out() && interrupted.is_some_and(|asked| asked()) {
            self.given_up.store(true, Ordering::Release);
            self.news.notify_all();
            return Err(given_up());
        }
        Ok(())
    }

    fn outcome(&self, state: &mut PipeState) -> Result<Loaded> {
        let failed = || Err(Error::new(Kind::Unavailable, "the load has failed before"));
        state.outcome.replace(failed()).unwrap_or_else(failed)
    }

    fn give_up(&self) {
        let _state = self.state.lock();
        self.given_up.store(true, Ordering::Release);
        self.news.notify_all();
    }

    /// The next batch; `None`: there is none.
    fn receive(&self, worked_off: Option<Vec<u8>>) -> Result<Option<Vec<u8>>> {
        let mut state = self.state.lock();
        if let Some(mut batch) = worked_off.filter(|batch| batch.capacity() <= 2 * BATCH_BYTES) {
            batch.clear();
            state.empty.push(batch);
        }
        loop {
            if self.given_up.load(Ordering::Acquire) {
                return Err(given_up());
            }
            if let Some(batch) = state.batches.pop_front() {
                self.news.notify_all();
                return Ok(Some(batch));
            }
            if state.ended {
                return Ok(None);
            }
            self.news.wait(&mut state);
        }
    }

    /// What the thread does.
    fn work(&self, mut ssts: Ssts) {
        ssts.given_up = Arc::clone(&self.given_up);
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| self.work_off(ssts)));
        let bug = |_| Err(Error::new(Kind::Bug, "the thread that builds the ssts of a load panicked"));
        self.state.lock().outcome = Some(outcome.unwrap_or_else(bug));
        self.news.notify_all();
    }

    fn work_off(&self, mut ssts: Ssts) -> Result<Loaded> {
        let mut batch = None;
        while let Some(next) = self.receive(batch.take())? {
            let mut rest = &next[..];
            while let Some((key, value, more)) = row(rest) {
                ssts.add(key, value)?;
                rest = more;
            }
            batch = Some(next);
        }
        ssts.finish()
    }
}

/// The first row of a batch, and the others.
fn row(batch: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (key_bytes, rest) = batch.split_first_chunk()?;
    let (value_bytes, rest) = rest.split_first_chunk()?;
    let (key, rest) = rest.split_at(u32::from_le_bytes(*key_bytes) as usize);
    let (value, rest) = rest.split_at(u32::from_le_bytes(*value_bytes) as usize);
    Some((key, value, rest))
}

fn given_up() -> Error {
    Error::new(Kind::Interrupted, "the load was given up")
}

/// The ssts of a load, as far as they are made.
struct Ssts {
    engine: Arc<Engine>,
    options: SstOptions,
    /// The tree, and the key at hand.
    key: Vec<u8>,
    builder: Option<SstBuilder>,
    /// Bytes added since the builder was asked how long the sst would be.
    unasked: usize,
    /// Bytes that have a copy on the local disk, or would if there were no limit.
    copied: u64,
    /// Finished ones, and perhaps not there yet.
    loaded: Loaded,
    uploads: VecDeque<JoinHandle<Result<()>>>,
    given_up: Arc<AtomicBool>,
}

impl Ssts {
    fn new(engine: Arc<Engine>, tree: TreeId) -> Self {
        Self {
            options: SstOptions::default(),
            key: full_key(tree, &[]),
            builder: None,
            unasked: 0,
            copied: 0,
            loaded: Loaded { engine: Arc::clone(&engine), tree, ssts: Vec::new(), kept: false },
            uploads: VecDeque::new(),
            given_up: Arc::default(),
            engine,
        }
    }

    fn add(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.key.truncate(4);
        self.key.extend_from_slice(key);
        let engine = &self.engine;
        let builder = self.builder.get_or_insert_with(|| {
            let rules = Arc::clone(engine.store().first_parts());
            SstBuilder::new(engine.next_sst(), self.options).with_first_parts(rules)
        });
        builder.add(&self.key, Seqno(0), OpKind::Put, value);
        self.unasked += key.len() + value.len();
        if self.unasked >= self.options.block_bytes {
            self.unasked = 0;
            if builder.estimated_bytes() >= engine.settings.shape.sst_bytes as u64 {
                self.end_sst()?;
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<Loaded> {
        self.end_sst()?;
        while let Some(upload) = self.uploads.pop_front() {
            join(upload)?;
        }
        // A newer writer would have deleted it as garbage.
        patiently(&self.engine, &self.given_up, || self.engine.step(Job::Validate).map(drop))?;
        let nothing = Loaded {
            engine: Arc::clone(&self.engine),
            tree: self.loaded.tree,
            ssts: Vec::new(),
            kept: false,
        };
        Ok(std::mem::replace(&mut self.loaded, nothing))
    }

    /// Sends the sst at hand on its way.
    fn end_sst(&mut self) -> Result<()> {
        let Some(builder) = self.builder.take() else { return Ok(()) };
        let (meta, bytes) = builder.finish();
        let id = meta.id;
        self.loaded.ssts.push(Arc::new(meta));
        self.copied += bytes.len() as u64;
        let copy = self.copied <= self.engine.settings.disk_cache_bytes / COPIED_SHARE;
        if self.engine.settings.background == Background::Manual {
            return self.engine.store().upload_new(id, &bytes, copy);
        }
        if self.uploads.len() >= UPLOADS_MAX {
            self.uploads.pop_front().map_or(Ok(()), join)?;
        }
        let (engine, given_up) = (Arc::clone(&self.engine), Arc::clone(&self.given_up));
        let upload = std::thread::Builder::new()
            .name("cistern-load-put".to_owned())
            .spawn(move || patiently(&engine, &given_up, || engine.store().upload_new(id, &bytes, copy)))
            .map_err(|error| Error::new(Kind::Unavailable, "a thread for an upload").with_cause(error))?;
        self.uploads.push_back(upload);
        Ok(())
    }
}

impl Drop for Ssts {
    fn drop(&mut self) {
        // What is given up is deleted: nothing of it may arrive after that.
        self.given_up.store(true, Ordering::Release);
        self.uploads.drain(..).for_each(|upload| _ = upload.join());
    }
}

fn join(upload: JoinHandle<Result<()>>) -> Result<()> {
    upload.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What `ask` asks of the bucket, again and again while it does not answer. (Without threads once: the caller has time in its hands.)
fn patiently(engine: &Engine, given_up: &AtomicBool, ask: impl Fn() -> Result<()>) -> Result<()> {
    let deadline = engine.now() + PATIENCE;
    loop {
        engine.check_alive()?;
        let error = match ask() {
            Err(error) if error.kind() == Kind::Unavailable => error,
            result => return result,
        };
        let manual = engine.settings.background == Background::Manual;
        if manual || given_up.load(Ordering::Acquire) || engine.now() >= deadline {
            return Err(error);
        }
        tracing::warn!(%error, "a load waits for the bucket");
        engine.pause(RETRY);
    }
}
