//! Notices that this process slept: stopped by a signal, starved, or with its whole machine. Meanwhile another writer may
//! have taken over.
//!
//! * A thread stamps the time a few times a second, unless the last stamp is old: then it looks at the claims first. It stamps the time
//!   as of before it looked (at the clock, or at the claims), so a sleep in the middle leaves an old stamp.
//! * So a commit that finds the stamp old waits for that look before it is acknowledged. A process that wakes up fenced
//!   acknowledges nothing but what was on its way to the client already.
//! * A bucket that does not answer, or three times only after a while, ends the wait too: an outage stops no commits.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// How often the time is stamped.
pub(crate) const BEAT: Duration = Duration::from_millis(200);
/// A stamp older than this was left by a process that slept, or starved.
pub(crate) const SLEPT: Duration = Duration::from_secs(2);

pub(crate) struct Pulse {
    /// Milliseconds on the engine's clock.
    stamp: AtomicU64,
    beating: Mutex<()>,
    beat: Condvar,
}

impl Pulse {
    pub(crate) fn new(now: Duration) -> Self {
        let pulse = Self { stamp: AtomicU64::new(0), beating: Mutex::new(()), beat: Condvar::new() };
        pulse.stamp(now);
        pulse
    }

    /// Whether nobody stamped the time for too long before `now`.
    pub(crate) fn slept(&self, now: Duration) -> bool {
        let stamp = Duration::from_millis(self.stamp.load(Ordering::Acquire));
        now.saturating_sub(stamp) > SLEPT
    }

    /// At `at` the process was awake, and what it may have slept through before was looked at.
    pub(crate) fn stamp(&self, at: Duration) {
        let _beating = self.beating.lock();
        self.stamp.store(at.as_millis() as u64, Ordering::Release);
        self.beat.notify_all();
    }

    /// Returns at the next stamp, or a little later.
    pub(crate) fn wait(&self) {
        let mut beating = self.beating.lock();
        self.beat.wait_for(&mut beating, BEAT);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::{Arc, OnceLock, Weak};

    use bucket::{Bucket, Effect, FaultyBucket, MemoryBucket, Rule};

    use super::*;
    use crate::{Background, Clock, Engine, Kind, Parts, Result, Settings, SimDisk, TreeId};

    /// Sleeps a minute before it tells the time for the nth time.
    #[derive(Default)]
    struct Sleeper {
        state: Mutex<(Duration, Option<usize>)>,
        others: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    }

    impl Clock for Sleeper {
        fn now(&self) -> Duration {
            let (now, due) = {
                let mut state = self.state.lock();
                let due = state.1 == Some(0);
                state.1 = state.1.and_then(|left| left.checked_sub(1));
                state.0 += Duration::from_millis(1) + Duration::from_secs(if due { 60 } else { 0 });
                (state.0, due)
            };
            if due && let Some(others) = self.others.lock().take() {
                others();
            }
            now
        }
        fn sleep(&self, pause: Duration) {
            self.state.lock().0 += pause;
        }
    }

    fn open(bucket: &Arc<MemoryBucket>, clock: Arc<dyn Clock>, seed: u64) -> Arc<Engine> {
        open_with(bucket.clone(), clock, seed, Background::Manual)
    }

    fn open_with(
        bucket: Arc<dyn Bucket>,
        clock: Arc<dyn Clock>,
        seed: u64,
        background: Background,
    ) -> Arc<Engine> {
        // Nothing but its beats looks at the claims, once it is open.
        let wal_upload_interval = Duration::from_secs(3600);
        let parts = Parts { bucket, disk: Arc::new(SimDisk::new(seed)), clock, seed };
        Engine::open(parts, Settings { background, wal_upload_interval, ..Settings::default() })
            .expect("it opens")
    }

    /// An engine that slept, of whose next looks at the claims the first `slow` take longer than a sleep that counts. Another writer
    /// claims in the middle of look `claimed`.
    struct SlowLooks {
        engine: Arc<Engine>,
        looks: Arc<AtomicUsize>,
    }

    impl SlowLooks {
        fn new(background: Background, slow: u32, claimed: Option<usize>) -> Self {
            let (memory, clock) = (Arc::new(MemoryBucket::new()), Arc::new(Sleeper::default()));
            let looks = Arc::new(AtomicUsize::new(0));
            let looking = Arc::new(OnceLock::<Weak<Engine>>::new());
            let pause = {
                let (memory, clock, looks) = (memory.clone(), clock.clone(), looks.clone());
                let looking = looking.clone();
                move |pause: Duration| {
                    let look = looks.fetch_add(1, Ordering::SeqCst) + 1;
                    if background == Background::Manual {
                        let engine = looking.get().and_then(Weak::upgrade).expect("it is open");
                        assert!(engine.slept(), "a commit need not wait for look {look}");
                    }
                    if claimed == Some(look) {
                        drop(open(&memory, Arc::new(Sleeper::default()), 2));
                    }
                    clock.sleep(pause.saturating_sub(Duration::from_millis(1)));
                }
            };
            let faulty = Arc::new(FaultyBucket::new(memory, 1, Vec::new()).with_pause(Arc::new(pause)));
            let engine = open_with(faulty.clone(), clock.clone(), 1, background);
            looking.set(Arc::downgrade(&engine)).expect("once");
            put(&engine, b"a").expect("nobody else is there");
            // Each is paused for, so that it is counted.
            let pause = |pause| Rule::new("*/epoch/*", Effect::Latency { p50: pause, p99: pause });
            let quick = pause(Duration::from_millis(1));
            faulty.faults().set_rules(vec![pause(2 * SLEPT).times(slow), quick]);
            clock.sleep(Duration::from_secs(60));
            Self { engine, looks }
        }

        fn looks(&self) -> usize {
            self.looks.load(Ordering::SeqCst)
        }
    }

    fn put(engine: &Arc<Engine>, key: &[u8]) -> Result<()> {
        let mut txn = engine.begin();
        txn.put(TreeId(7), key, b"")?;
        txn.commit().map(drop)
    }

    /// Another writer claims while this one sleeps, wherever in its beat that is. It must not take itself for awake then.
    #[test]
    fn a_sleep_anywhere_in_a_beat_is_noticed() {
        for slept_before in [false, true] {
            let mut call = 0;
            loop {
                let (bucket, clock) = (Arc::new(MemoryBucket::new()), Arc::new(Sleeper::default()));
                let engine = open(&bucket, clock.clone(), 1);
                if slept_before {
                    clock.sleep(Duration::from_secs(60));
                }
                let newer = bucket.clone();
                let claim = move || drop(open(&newer, Arc::new(Sleeper::default()), 2));
                *clock.others.lock() = Some(Box::new(claim));
                clock.state.lock().1 = Some(call);
                _ = engine.beat();
                if clock.others.lock().is_some() {
                    break;
                }
                match engine.check_alive() {
                    Err(error) => assert_eq!(error.kind(), Kind::Fenced),
                    Ok(()) => {
                        assert!(engine.slept(), "a sleep before call {call} of the clock, {slept_before}")
                    }
                }
                call += 1;
            }
            assert!(call > 0, "a beat looks at the clock");
        }
    }

    /// A slow answer may be from before a claim. Three of them are enough, or nobody would ever go on beside a slow bucket.
    #[test]
    fn a_slow_bucket_is_asked_up_to_three_times() {
        for (slow, looks) in [(0, 1), (1, 2), (2, 3), (3, 3), (9, 3)] {
            let slept = SlowLooks::new(Background::Manual, slow, None);
            assert!(slept.engine.slept());
            slept.engine.beat().expect("nobody has claimed");
            assert_eq!(slept.looks(), looks, "{slow} are slow");
            assert!(!slept.engine.slept(), "{slow} are slow: commits go on");
            slept.engine.beat().expect("nobody has claimed");
            assert_eq!(slept.looks(), looks, "who is awake need not look");
        }
        for claimed in 1..=3 {
            let slept = SlowLooks::new(Background::Manual, 9, Some(claimed));
            assert_eq!(slept.engine.beat().map_err(|error| error.kind()), Err(Kind::Fenced));
            assert_eq!(slept.looks(), claimed);
            assert!(slept.engine.slept(), "claimed in look {claimed}: no commit takes itself for awake");
        }
    }

    #[test]
    fn a_commit_waits_for_a_slow_bucket_to_be_asked_three_times() {
        for claimed in [None, Some(1), Some(2), Some(3)] {
            let slept = SlowLooks::new(Background::Threads, 9, claimed);
            let answer = put(&slept.engine, b"b").map_err(|error| error.kind());
            assert_eq!(answer, if claimed.is_some() { Err(Kind::Fenced) } else { Ok(()) }, "{claimed:?}");
            assert!(slept.looks() >= claimed.unwrap_or(3), "{claimed:?}: {} looks", slept.looks());
        }
    }
}
