//! Notices that this process slept: stopped by a signal, starved, or with its whole machine. Meanwhile another writer may
//! have taken over.
//!
//! * A thread stamps the time a few times a second, unless the last stamp is old: then it looks at the claims first.
//! * So a commit that finds the stamp old waits for that look before it is acknowledged. A process that wakes up fenced
//!   acknowledges nothing but what was on its way to the client already.
//! * A bucket that does not answer ends the wait too: an outage stops no commits.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::Clock;

/// How often the time is stamped.
pub(crate) const BEAT: Duration = Duration::from_millis(200);
/// A stamp older than this was left by a process that slept, or starved.
const SLEPT: Duration = Duration::from_secs(2);

pub(crate) struct Pulse {
    /// Milliseconds on the engine's clock.
    stamp: AtomicU64,
    beating: Mutex<()>,
    beat: Condvar,
}

impl Pulse {
    pub(crate) fn new(clock: &dyn Clock) -> Self {
        let pulse = Self { stamp: AtomicU64::new(0), beating: Mutex::new(()), beat: Condvar::new() };
        pulse.stamp(clock);
        pulse
    }

    /// Whether nobody stamped the time for too long.
    pub(crate) fn slept(&self, clock: &dyn Clock) -> bool {
        let stamp = Duration::from_millis(self.stamp.load(Ordering::Acquire));
        clock.now().saturating_sub(stamp) > SLEPT
    }

    /// The process is awake, and what it may have slept through was looked at.
    pub(crate) fn stamp(&self, clock: &dyn Clock) {
        let _beating = self.beating.lock();
        self.stamp.store(clock.now().as_millis() as u64, Ordering::Release);
        self.beat.notify_all();
    }

    /// Returns at the next stamp, or a little later.
    pub(crate) fn wait(&self) {
        let mut beating = self.beating.lock();
        self.beat.wait_for(&mut beating, BEAT);
    }
}
