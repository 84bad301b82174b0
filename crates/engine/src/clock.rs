//! Time comes in as an argument; the simulator turns it.

use std::time::Duration;

/// Monotonic time, and waiting.
pub trait Clock: Send + Sync + 'static {
    /// Time since some fixed moment; never goes back.
    fn now(&self) -> Duration;
    /// Returns after at least `pause` of this clock's time.
    fn sleep(&self, pause: Duration);
}

/// The machine's clock.
#[derive(Debug)]
pub struct SystemClock {
    start: std::time::Instant,
}

impl Default for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one place where the machine's clock is read")]
    fn default() -> Self {
        Self { start: std::time::Instant::now() }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }
    #[expect(clippy::disallowed_methods, reason = "the one place that waits on the machine's clock")]
    fn sleep(&self, pause: Duration) {
        std::thread::sleep(pause);
    }
}
