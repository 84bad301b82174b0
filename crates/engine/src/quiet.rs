//! Notices that next to nothing is written, so that work which only saves space is in nobody's way.

use std::time::Duration;

/// How long hardly anything must have been written.
const QUIET: Duration = Duration::from_secs(10);
/// Bytes of wal that are hardly anything in that time.
const HARDLY_ANYTHING: u64 = 1 << 20;

/// Looked at several times a second.
pub(crate) struct Quiet {
    /// When more was written for the last time, and where the wal ended then.
    since: Duration,
    wal_end: u64,
}

impl Quiet {
    pub(crate) fn new(now: Duration, wal_end: u64) -> Self {
        Self { since: now, wal_end }
    }

    /// The wal ends at `wal_end`.
    pub(crate) fn look(&mut self, now: Duration, wal_end: u64) {
        if wal_end.saturating_sub(self.wal_end) > HARDLY_ANYTHING {
            *self = Self::new(now, wal_end);
        }
    }

    pub(crate) fn is_quiet(&self, now: Duration) -> bool {
        now.saturating_sub(self.since) >= QUIET
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trickle_is_quiet_and_a_stream_is_not() {
        let quiet_after = |bytes_a_second: u64| {
            let mut quiet = Quiet::new(Duration::ZERO, 7);
            let mut heard = 0;
            for second in 1..100 {
                quiet.look(Duration::from_secs(second), 7 + second * bytes_a_second);
                heard += u64::from(quiet.is_quiet(Duration::from_secs(second)));
            }
            heard
        };
        assert_eq!(quiet_after(0), 90);
        assert_eq!(quiet_after(1000), 90);
        assert!(quiet_after(HARDLY_ANYTHING / 20) > 40, "most of the time");
        assert_eq!(quiet_after(HARDLY_ANYTHING / 9), 0);
        assert_eq!(quiet_after(50 << 20), 0);
    }
}
