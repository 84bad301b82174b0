//! What a writer meets before its commit: nothing, a delay, a wait, or an error. Never a queue that grows.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::compaction::pressure::{Debt, Pressure, delay, pressure};
use crate::limits::Shape;
use crate::{Clock, Error, Kind, Result};

pub(crate) struct Throttle {
    shape: Shape,
    unuploaded_bytes_max: u64,
    /// Bytes a second; `FREE`, `WAIT` and `FULL` stand for the rest of [`Pressure`].
    rate: AtomicU64,
    /// When the bytes admitted so far will have passed.
    busy_until: Mutex<Duration>,
    delayed: AtomicU64,
}

const FREE: u64 = u64::MAX;
const WAIT: u64 = 0;
const FULL: u64 = u64::MAX - 1;
const POLL: Duration = Duration::from_millis(5);
/// A writer that waited for so long fails.
const WAIT_MAX: Duration = Duration::from_secs(120);
/// No single commit is slowed by more.
const DELAY_MAX: Duration = Duration::from_secs(5);

impl Throttle {
    pub(crate) fn new(shape: Shape, unuploaded_bytes_max: u64) -> Self {
        Self {
            shape,
            unuploaded_bytes_max,
            rate: AtomicU64::new(FREE),
            busy_until: Mutex::default(),
            delayed: AtomicU64::new(0),
        }
    }

    /// What is owed has changed.
    pub(crate) fn refresh(&self, debt: Debt) {
        let rate = match pressure(&debt, &self.shape) {
            Pressure::None => FREE,
            Pressure::Slow { bytes_per_second } => bytes_per_second.clamp(1, FULL - 1),
            Pressure::Wait => WAIT,
            Pressure::Full => FULL,
        };
        self.rate.store(rate, Ordering::Relaxed);
    }

    /// Commits that were slowed.
    pub(crate) fn delayed(&self) -> u64 {
        self.delayed.load(Ordering::Relaxed)
    }

    /// Returns when a writer of `bytes` may go on. `work` is called again and again while it must wait; `false`: nothing
    /// can be done about it.
    #[inline]
    pub(crate) fn admit(
        &self,
        bytes: u64,
        clock: &dyn Clock,
        work: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        match self.rate.load(Ordering::Relaxed) {
            FREE => Ok(()),
            _ => self.admit_slowly(bytes, clock, work),
        }
    }

    #[cold]
    fn admit_slowly(
        &self,
        bytes: u64,
        clock: &dyn Clock,
        mut work: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        self.delayed.fetch_add(1, Ordering::Relaxed);
        let deadline = clock.now() + WAIT_MAX;
        loop {
            match self.rate.load(Ordering::Relaxed) {
                FREE => return Ok(()),
                WAIT if clock.now() < deadline => {
                    if !work()? {
                        return Err(stands_still());
                    }
                    if self.rate.load(Ordering::Relaxed) == WAIT {
                        clock.sleep(POLL);
                    }
                }
                WAIT => return Err(stands_still()),
                FULL => {
                    // What is known may be old.
                    work()?;
                    if self.rate.load(Ordering::Relaxed) == FULL {
                        return Err(self.full());
                    }
                }
                rate => {
                    clock.sleep(self.place(delay(bytes, rate), clock.now()));
                    return Ok(());
                }
            }
        }
    }

    /// How long until a writer that takes `time` has passed, all earlier ones before it.
    fn place(&self, time: Duration, now: Duration) -> Duration {
        let mut busy_until = self.busy_until.lock();
        *busy_until = (*busy_until).max(now) + time.min(DELAY_MAX);
        (*busy_until - now).min(DELAY_MAX)
    }

    fn full(&self) -> Error {
        let message = format!(
            "{} bytes wait for their upload, the limit (unuploaded_bytes_max); the object store does not answer or is too slow",
            self.unuploaded_bytes_max
        );
        Error::new(Kind::Full, message)
    }
}

fn stands_still() -> Error {
    Error::new(Kind::Unavailable, "writers wait for flush and compaction, which make no progress")
}
