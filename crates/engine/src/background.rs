//! The engine's own threads: each does one kind of step when its bell rings, and now and then unasked.
//!
//! * A thread keeps no engine alive: it looks each time whether there still is one.
//! * A step that fails is reported here, once, and tried again after a pause that grows. After a fatal error the threads
//!   end. A panic is fatal: what it left behind is unknown, and a flush that stops in silence would be found out late.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::engine::{Engine, Job};
use crate::pulse::BEAT;
use crate::{Error, Kind, Result};

/// The threads of one engine, or none.
pub(crate) struct Workers {
    bells: Vec<(Job, Arc<Bell>)>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What a thread waits on.
#[derive(Default)]
struct Bell {
    state: Mutex<BellState>,
    rung: Condvar,
}

#[derive(Default)]
struct BellState {
    rung: bool,
    stopped: bool,
}

/// Threads that merge; each takes what the others leave.
const COMPACTION_THREADS: usize = 2;
/// By how much they are nicer than others.
const NICE: i32 = 5;
/// What is looked at unasked, in case readers have let go of something.
const IDLE: Duration = Duration::from_secs(10);
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(15);

impl Workers {
    pub(crate) fn new() -> Self {
        let jobs = [Job::PrepareWal, Job::UploadWal, Job::Flush, Job::Publish, Job::Validate].into_iter();
        let jobs = jobs.chain(std::iter::repeat_n(Job::Compact, COMPACTION_THREADS));
        Self { bells: jobs.map(|job| (job, Arc::default())).collect(), threads: Mutex::default() }
    }

    pub(crate) fn start(&self, engine: &Arc<Engine>) -> Result<()> {
        for (job, bell) in &self.bells {
            let (job, bell, engine) = (*job, Arc::clone(bell), Arc::downgrade(engine));
            let thread = std::thread::Builder::new()
                .name(format!("cistern-{}", name(job)))
                .spawn(move || work(job, &bell, &engine))
                .map_err(|error| Error::new(Kind::Unavailable, "a background thread").with_cause(error))?;
            self.threads.lock().push(thread);
        }
        // What recovery left: memtables to flush, levels to merge, garbage to collect.
        self.ring_all();
        Ok(())
    }

    /// Runs `work` once, in a thread of its own. It is told, when it asks, whether to end.
    pub(crate) fn run_once(
        &self,
        name: &str,
        work: impl FnOnce(&(dyn Fn() -> bool + Sync)) + Send + 'static,
    ) {
        let Some((_, bell)) = self.bells.first() else { return };
        let bell = Arc::clone(bell);
        let thread =
            std::thread::Builder::new().name(name.to_owned()).spawn(move || work(&|| !bell.stopped()));
        match thread {
            Ok(thread) => self.threads.lock().push(thread),
            Err(error) => tracing::warn!(%error, name, "no thread for it"),
        }
    }

    /// There is work of this kind.
    pub(crate) fn ring(&self, job: Job) {
        self.bells.iter().filter(|(of, _)| *of == job).for_each(|(_, bell)| bell.ring(false));
    }

    pub(crate) fn ring_all(&self) {
        self.bells.iter().for_each(|(_, bell)| bell.ring(false));
    }

    /// Whether `stop` was called.
    pub(crate) fn stopped(&self) -> bool {
        self.bells.iter().any(|(_, bell)| bell.stopped())
    }

    /// Returns when all threads have ended; a step under way is finished first.
    pub(crate) fn stop(&self) {
        self.bells.iter().for_each(|(_, bell)| bell.ring(true));
        for thread in self.threads.lock().drain(..) {
            // One of them may be the last to hold the engine, and be here itself.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a background thread had panicked");
            }
        }
    }
}

impl Bell {
    fn ring(&self, stop: bool) {
        let mut state = self.state.lock();
        state.rung = true;
        state.stopped |= stop;
        self.rung.notify_all();
    }

    /// Returns when it rings or after `pause`. `false`: the thread is to end.
    fn wait(&self, pause: Duration) -> bool {
        let mut state = self.state.lock();
        if !state.rung {
            self.rung.wait_for(&mut state, pause);
        }
        state.rung = false;
        !state.stopped
    }

    /// Returns after `pause`, or earlier with `false`: the thread is to end.
    fn pause(&self, pause: Duration) -> bool {
        let mut state = self.state.lock();
        if !state.stopped {
            self.rung.wait_for(&mut state, pause);
        }
        !state.stopped
    }

    fn stopped(&self) -> bool {
        self.state.lock().stopped
    }
}

fn name(job: Job) -> &'static str {
    match job {
        Job::PrepareWal => "wal-room",
        Job::UploadWal => "wal",
        Job::Freeze | Job::Flush => "flush",
        Job::Publish | Job::CollectGarbage => "publish",
        Job::Compact | Job::SaveSpace => "compact",
        Job::Validate => "claims",
    }
}

fn work(job: Job, bell: &Bell, engine: &Weak<Engine>) {
    if job == Job::Compact {
        step_back();
    }
    let mut failures = 0;
    loop {
        let Some(live) = engine.upgrade() else { return };
        let began = live.now();
        let done = std::panic::catch_unwind(AssertUnwindSafe(|| work_off(job, bell, &live)));
        let done = done.unwrap_or_else(|panic| Err(live.fail(name(job), panic_message(&*panic))));
        let dead = live.check_alive().is_err();
        // From start to start: what an upload took is not waited for once more.
        let wal_rest = live.settings.wal_upload_interval.saturating_sub(live.now() - began);
        drop(live);
        let go_on = match done {
            Ok(()) => {
                failures = 0;
                match job {
                    // The wal is not rung for: its time is its bell.
                    Job::UploadWal => bell.pause(wal_rest),
                    Job::Validate => bell.pause(BEAT),
                    _ => bell.wait(IDLE),
                }
            }
            Err(error) => {
                // A merge that was told to stop says so with an error.
                if dead || bell.stopped() {
                    return;
                }
                let retry = (RETRY_MIN * 2_u32.pow(failures)).min(RETRY_MAX);
                failures = (failures + 1).min(10);
                tracing::warn!(step = name(job), %error, ?retry, "a background step failed; it will be tried again");
                bell.pause(retry)
            }
        };
        if !go_on || dead {
            return;
        }
    }
}

/// This thread, and those that it starts, get a third of what others get when processors are short. Merges that fall behind
/// for that slow writers (`compaction/pressure.rs`), which gives the processors back.
fn step_back() {
    // On Linux the niceness is the thread's, whatever POSIX says.
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::debug!(%error, "merges go on with everybody's priority");
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// Steps until there is nothing left to do.
fn work_off(job: Job, bell: &Bell, engine: &Engine) -> Result<()> {
    if job == Job::Validate {
        return engine.beat();
    }
    while !bell.stopped() && engine.step(job)? {
        // While writers are at it there is always a little more of the wal: it waits for its time, or a full slice.
        if job == Job::UploadWal && !engine.has_full_slice() {
            break;
        }
    }
    if job == Job::Compact && engine.is_quiet() {
        while !bell.stopped() && engine.is_quiet() && engine.step(Job::SaveSpace)? {}
    }
    if job == Job::Publish {
        while !bell.stopped() && engine.step(Job::CollectGarbage)? {}
        engine.save_heat();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bucket::MemoryBucket;

    use super::*;
    use crate::{Background, Clock, Parts, Settings, SimDisk, TreeId};

    #[derive(Default)]
    struct Hand(Mutex<Duration>);

    impl Clock for Hand {
        fn now(&self) -> Duration {
            *self.0.lock()
        }
        fn sleep(&self, pause: Duration) {
            *self.0.lock() += pause;
        }
    }

    #[test]
    fn space_is_saved_only_after_a_while_without_writers() {
        let clock = Arc::new(Hand::default());
        let parts = Parts {
            bucket: Arc::new(MemoryBucket::new()),
            disk: Arc::new(SimDisk::new(1)),
            clock: Arc::clone(&clock) as Arc<dyn Clock>,
            seed: 1,
        };
        let settings = Settings { background: Background::Manual, ..Settings::default() };
        let engine = Engine::open(parts, settings).expect("it opens");
        let write = || {
            let mut txn = engine.begin();
            for row in 0..6 * 1024_u32 {
                txn.put(TreeId(70), &row.to_be_bytes(), &[7; 1000]).expect("there is room");
            }
            txn.commit().expect("the disk works");
        };
        let work = || {
            engine.beat().expect("nobody else claims");
            for job in [Job::Compact, Job::Flush] {
                work_off(job, &Bell::default(), &engine).expect("nothing fails");
            }
            engine.status().get("flushes").expect("a counter")
        };
        write();
        assert_eq!(work(), 0);
        clock.sleep(Duration::from_secs(9));
        assert_eq!(work(), 0, "somebody wrote just now");
        write();
        assert_eq!(work(), 0);
        clock.sleep(Duration::from_secs(9));
        assert_eq!(work(), 0, "and again");
        clock.sleep(Duration::from_secs(1));
        assert_eq!(work(), 1);
        write();
        assert_eq!(work(), 1);
    }
}
