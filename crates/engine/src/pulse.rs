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
    use std::sync::Arc;

    use bucket::MemoryBucket;

    use super::*;
    use crate::{Background, Clock, Engine, Kind, Parts, Settings, SimDisk};

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
        let parts = Parts { bucket: bucket.clone(), disk: Arc::new(SimDisk::new(seed)), clock, seed };
        Engine::open(parts, Settings { background: Background::Manual, ..Settings::default() })
            .expect("it opens")
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
}
