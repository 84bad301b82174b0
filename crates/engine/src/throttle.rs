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
    line: Mutex<Line>,
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
/// How long a writer that is slowed may not notice that the pressure has gone.
const LOOK: Duration = Duration::from_millis(20);

impl Throttle {
    pub(crate) fn new(shape: Shape, unuploaded_bytes_max: u64) -> Self {
        Self {
            shape,
            unuploaded_bytes_max,
            rate: AtomicU64::new(FREE),
            line: Mutex::default(),
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
        let mut place = None;
        loop {
            match self.rate.load(Ordering::Relaxed) {
                FREE => {
                    self.line.lock().let_pass(place.map_or(0, |(place, _)| place));
                    return Ok(());
                }
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
                    let now = clock.now();
                    let mut line = self.line.lock();
                    let (place, came) = *place.get_or_insert_with(|| (line.join(bytes, rate, now), now));
                    let left = line.time_to(place, rate, now).min((came + DELAY_MAX).saturating_sub(now));
                    if left.is_zero() {
                        line.let_pass(place);
                        return Ok(());
                    }
                    drop(line);
                    clock.sleep(left.min(LOOK));
                }
            }
        }
    }

    fn full(&self) -> Error {
        let message = format!(
            "{} bytes wait for their upload, the limit (unuploaded_bytes_max); the object store does not answer or is too slow",
            self.unuploaded_bytes_max
        );
        Error::new(Kind::Full, message)
    }
}

/// Writers that are slowed, one behind the other. It moves at the rate of the moment, whatever the rate was when they came.
#[derive(Debug, Default)]
struct Line {
    /// Bytes that have come so far.
    came: u64,
    /// Of these, bytes that have passed.
    passed: u64,
    /// When they had.
    at: Duration,
}

impl Line {
    /// Takes a writer of `bytes` in. It may go when as many have passed as is returned.
    fn join(&mut self, bytes: u64, rate: u64, now: Duration) -> u64 {
        self.advance(rate, now);
        self.came += bytes;
        self.came
    }

    /// How long until `place` has passed.
    fn time_to(&mut self, place: u64, rate: u64, now: Duration) -> Duration {
        self.advance(rate, now);
        (self.at + delay(place.saturating_sub(self.passed), rate)).saturating_sub(now)
    }

    /// Who stands at `place` has gone, and so have those before it, or they will at once.
    fn let_pass(&mut self, place: u64) {
        self.passed = self.passed.max(place);
    }

    fn advance(&mut self, rate: u64, now: Duration) {
        let waiting = self.came - self.passed;
        let time = now.saturating_sub(self.at);
        let bytes = (time.as_nanos() * u128::from(rate) / 1_000_000_000).min(waiting.into()) as u64;
        self.passed += bytes;
        // What was not enough time for a whole byte counts next time.
        self.at = if bytes == waiting { now } else { self.at + delay(bytes, rate) };
    }
}

fn stands_still() -> Error {
    Error::new(Kind::Unavailable, "writers wait for flush and compaction, which make no progress")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::FROZEN_MEMTABLES_MAX;

    const MEMTABLE: u64 = 64 << 20;
    const UNUPLOADED_MAX: u64 = 1 << 40;
    const STEP: Duration = Duration::from_millis(1);
    const BEAT: Duration = crate::pulse::BEAT;

    /// An engine of which only speeds are known: time passes when somebody sleeps, and then flushes and merges go on.
    struct World {
        throttle: Throttle,
        state: Mutex<State>,
        /// Bytes a second of a flush, and of a merge's input.
        flush: u64,
        merge: u64,
    }

    #[derive(Default)]
    struct State {
        now: Duration,
        active: u64,
        frozen: usize,
        l0: usize,
        l0_most: usize,
        frozen_most: usize,
        /// What the throttle was told last, and when.
        told: (usize, usize),
        told_at: Duration,
        /// Bytes of the oldest frozen memtable that are flushed.
        flushed: u64,
        /// Runs that are being merged, and bytes of them that are.
        merging: Option<(usize, u64)>,
    }

    impl World {
        fn new(flush: u64, merge: u64) -> Self {
            let throttle = Throttle::new(Shape::default(), UNUPLOADED_MAX);
            Self { throttle, state: Mutex::default(), flush, merge }
        }

        fn refresh(&self, state: &State) {
            self.throttle.refresh(Debt {
                l0_runs: state.l0,
                frozen_memtables: state.frozen,
                active_filled: state.active as f64 / MEMTABLE as f64,
                unuploaded_bytes_max: UNUPLOADED_MAX,
                ..Debt::default()
            });
        }

        fn pass(&self, time: Duration) {
            let state = &mut *self.state.lock();
            state.now += time;
            let share = |rate: u64| (u128::from(rate) * time.as_nanos() / 1_000_000_000) as u64;
            if state.frozen > 0 {
                state.flushed += share(self.flush);
                if state.flushed >= MEMTABLE {
                    (state.frozen, state.l0, state.flushed) = (state.frozen - 1, state.l0 + 1, 0);
                }
            }
            state.merging = match state.merging {
                None if state.l0 >= Shape::default().l0_runs => Some((state.l0, 0)),
                Some((runs, bytes)) if bytes >= runs as u64 * MEMTABLE => {
                    state.l0 -= runs;
                    None
                }
                merging => merging.map(|(runs, bytes)| (runs, bytes + share(self.merge))),
            };
            state.l0_most = state.l0_most.max(state.l0);
            state.frozen_most = state.frozen_most.max(state.frozen);
            // As the engine's threads do: when one of them has done something, and at each beat.
            let busy = (state.frozen, state.l0);
            if busy != state.told || state.now >= state.told_at + BEAT {
                (state.told, state.told_at) = (busy, state.now);
                self.refresh(state);
            }
        }

        /// Writers of `bytes` together that wish to write `offered` bytes a second, for `time`. Returns the longest delay.
        fn storm(&self, bytes: u64, offered: u64, time: Duration) -> (u64, Duration) {
            let end = self.now() + time;
            let (mut written, mut longest) = (0, Duration::ZERO);
            while self.now() < end {
                let came = self.now();
                self.throttle.admit(bytes, self, || Ok(true)).expect("it goes on");
                longest = longest.max(self.now() - came);
                written += bytes;
                self.sleep(delay(bytes, offered));
                let mut state = self.state.lock();
                state.active += bytes;
                if state.active >= MEMTABLE {
                    (state.active, state.frozen) = (0, state.frozen + 1);
                    self.refresh(&state);
                }
            }
            (written, longest)
        }
    }

    impl Clock for World {
        fn now(&self) -> Duration {
            self.state.lock().now
        }
        fn sleep(&self, pause: Duration) {
            let mut left = pause;
            while !left.is_zero() {
                let step = left.min(STEP);
                self.pass(step);
                left -= step;
            }
        }
    }

    /// Thirty-two writers of 2 KiB wish to write far more than is merged.
    #[test]
    fn a_storm_that_merges_do_not_keep_up_with_is_slowed_and_never_stopped() {
        for merge in [15_000_000, 40_000_000, 100_000_000] {
            let world = World::new(200_000_000, merge);
            let (written, longest) = world.storm(32 * 2048, 250_000_000, Duration::from_secs(900));
            let l0_most = world.state.lock().l0_most;
            println!("merges of {merge}: {written} bytes, {longest:?} at most, {l0_most} runs");
            assert!(world.throttle.delayed() > 0);
            assert!(l0_most < Shape::default().l0_runs_stop, "{l0_most} runs");
            assert!(
                longest <= Duration::from_millis(100),
                "{longest:?} with merges of {merge} bytes a second"
            );
            assert!(written > 900 * merge / 2, "{written} bytes: writers get what merges give");
        }
    }

    #[test]
    fn a_storm_that_flushes_do_not_keep_up_with_is_slowed_and_never_stopped() {
        for flush in [4_000_000, 8_000_000, 30_000_000] {
            let world = World::new(flush, 100_000_000);
            let (written, longest) = world.storm(32 * 2048, 250_000_000, Duration::from_secs(900));
            let frozen_most = world.state.lock().frozen_most;
            println!("flushes of {flush}: {written} bytes, {longest:?} at most, {frozen_most} frozen");
            assert!(world.throttle.delayed() > 0);
            assert!(frozen_most < FROZEN_MEMTABLES_MAX, "{frozen_most} frozen");
            assert!(
                longest <= Duration::from_millis(100),
                "{longest:?} with flushes of {flush} bytes a second"
            );
            assert!(written > 900 * flush / 2, "{written} bytes: writers get what flushes give");
        }
    }

    /// Below the least rate there is no smoothness left, only an end.
    #[test]
    fn where_flushes_are_slower_than_the_least_rate_writers_wait_for_one_at_most() {
        let world = World::new(500_000, 100_000_000);
        let (_, longest) = world.storm(32 * 2048, 250_000_000, Duration::from_secs(900));
        let frozen_most = world.state.lock().frozen_most;
        println!("{longest:?} at most, {frozen_most} frozen");
        assert_eq!(frozen_most, FROZEN_MEMTABLES_MAX);
        assert!(longest > DELAY_MAX && longest < WAIT_MAX);
    }

    /// Nor does who comes later wait behind those who have gone.
    #[test]
    fn who_is_slowed_notices_at_once_that_the_pressure_has_gone() {
        let slow = Debt { l0_runs: 23, unuploaded_bytes_max: 1, ..Debt::default() };
        let none = Debt { l0_runs: 0, ..slow };
        let world = Relief { now: Mutex::default(), throttle: Throttle::new(Shape::default(), 1), none };
        for _ in 0..100 {
            world.throttle.refresh(slow);
            *world.now.lock() = Duration::ZERO;
            world.throttle.admit(100 << 20, &world, || Ok(true)).expect("it goes on");
            assert!(world.now() >= RELIEF && world.now() <= RELIEF + LOOK, "{:?}", world.now());
        }
        world.throttle.refresh(slow);
        *world.now.lock() = Duration::ZERO;
        world.throttle.admit(1000, &world, || Ok(true)).expect("it goes on");
        assert!(world.now() < Duration::from_millis(2), "{:?} behind those who have gone", world.now());
    }

    const RELIEF: Duration = Duration::from_millis(100);

    /// After [`RELIEF`] the pressure is gone.
    struct Relief {
        now: Mutex<Duration>,
        throttle: Throttle,
        none: Debt,
    }

    impl Clock for Relief {
        fn now(&self) -> Duration {
            *self.now.lock()
        }
        fn sleep(&self, pause: Duration) {
            *self.now.lock() += pause;
            if self.now() >= RELIEF {
                self.throttle.refresh(self.none);
            }
        }
    }

    #[test]
    fn the_line_moves_at_the_rate_of_the_moment() {
        let mut line = Line::default();
        let second = Duration::from_secs(1);
        let places: Vec<u64> = (0..100).map(|_| line.join(1_000_000, 1_000_000, second)).collect();
        assert_eq!(line.time_to(places[0], 1_000_000, second), second);
        assert_eq!(line.time_to(places[99], 1_000_000, second), 100 * second);
        assert_eq!(line.time_to(places[99], 1_000_000, 11 * second), 90 * second);
        assert_eq!(line.time_to(places[99], 90_000_000, 11 * second), second);
        assert_eq!(line.time_to(places[99], 90_000_000, 12 * second), Duration::ZERO);
        // An empty line saves nothing up.
        let place = line.join(500, 1000, 60 * second);
        assert_eq!(line.time_to(place, 1000, 60 * second), second / 2);
        // However often it is looked at, and however short the steps.
        let mut now = 60 * second;
        while !line.time_to(place, 1000, now).is_zero() {
            now += Duration::from_nanos(12_345);
        }
        assert!(now - 60 * second < second / 2 + Duration::from_millis(1), "{now:?}");
    }
}
