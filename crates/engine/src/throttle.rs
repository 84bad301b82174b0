//! What a writer meets before its commit: nothing, a delay, a wait, or an error. Never a queue that grows.
//!
//! * Who is slowed stands in a line that moves at the rate of the moment. Small commits have a line of their own, and so never wait for the
//!   bytes of a large one; while there are both, each line gets half of the rate. Together they get the rate, never more.
//! * A large commit goes when all of its bytes have been granted. They count as written from the moment they are ([`Throttle::granted`]),
//!   so memtables have room for it when it goes, and nobody is stopped by its arrival.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::compaction::pressure::{Debt, Pressure, delay, pressure};
use crate::limits::Shape;
use crate::{Clock, Error, Kind, Result};

pub(crate) struct Throttle {
    shape: Shape,
    memtable_bytes: u64,
    unuploaded_bytes_max: u64,
    /// Bytes a second; `FREE`, `WAIT` and `FULL` stand for the rest of [`Pressure`].
    rate: AtomicU64,
    lines: Mutex<Lines>,
    delayed: AtomicU64,
}

const FREE: u64 = u64::MAX;
const WAIT: u64 = 0;
const FULL: u64 = u64::MAX - 1;
const POLL: Duration = Duration::from_millis(5);
/// A writer that was stopped for so long fails.
const WAIT_MAX: Duration = Duration::from_secs(120);
/// How long a writer that is slowed may not notice that the pressure has gone.
const LOOK: Duration = Duration::from_millis(20);
/// A commit of more bytes is a large one.
const SMALL_BYTES_MAX: u64 = 64 << 10;

impl Throttle {
    pub(crate) fn new(shape: Shape, memtable_bytes: u64, unuploaded_bytes_max: u64) -> Self {
        Self {
            shape,
            memtable_bytes,
            unuploaded_bytes_max,
            rate: AtomicU64::new(FREE),
            lines: Mutex::default(),
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

    /// Bytes of large commits that have been let pass and are not written yet.
    pub(crate) fn granted(&self) -> u64 {
        self.lines.lock().granted()
    }

    /// Returns when a writer of `bytes` may go on; what is returned is to be dropped when they are written. `work` is called again and
    /// again while it must wait; `false`: nothing can be done about it.
    #[inline]
    pub(crate) fn admit(
        &self,
        bytes: u64,
        clock: &dyn Clock,
        work: impl FnMut() -> Result<bool>,
    ) -> Result<Option<Place<'_>>> {
        match self.rate.load(Ordering::Relaxed) {
            FREE => Ok(None),
            _ => self.admit_slowly(bytes, clock, work),
        }
    }

    #[cold]
    fn admit_slowly(
        &self,
        bytes: u64,
        clock: &dyn Clock,
        mut work: impl FnMut() -> Result<bool>,
    ) -> Result<Option<Place<'_>>> {
        self.delayed.fetch_add(1, Ordering::Relaxed);
        let deadline = clock.now() + WAIT_MAX;
        let mut place = None;
        loop {
            match self.look(&mut place, bytes, clock.now()) {
                Look::Go => return Ok(place),
                Look::Later(pause) => clock.sleep(pause),
                Look::Wait if clock.now() < deadline => {
                    if !work()? {
                        return Err(stands_still());
                    }
                    if self.rate.load(Ordering::Relaxed) == WAIT {
                        clock.sleep(POLL);
                    }
                }
                Look::Wait => return Err(stands_still()),
                Look::Full => {
                    // What is known may be old.
                    work()?;
                    if self.rate.load(Ordering::Relaxed) == FULL {
                        return Err(self.full());
                    }
                }
            }
        }
    }

    /// What a writer of `bytes` meets now. `place`: where it stands, once it stands in a line.
    fn look<'a>(&'a self, place: &mut Option<Place<'a>>, bytes: u64, now: Duration) -> Look {
        match self.rate.load(Ordering::Relaxed) {
            FREE => {
                place.iter().for_each(|place| self.lines.lock().let_pass(place));
                Look::Go
            }
            WAIT => {
                self.lines.lock().stop(now);
                Look::Wait
            }
            FULL => Look::Full,
            rate => {
                let mut lines = self.lines.lock();
                lines.advance(rate, now);
                let place = place.get_or_insert_with(|| {
                    let (size, bytes) = self.sized(bytes);
                    let end = lines.join(size, bytes);
                    Place { throttle: self, size, bytes, end }
                });
                match lines.time_to(place.size, place.end, rate) {
                    Duration::ZERO => Look::Go,
                    left => Look::Later(left.min(LOOK)),
                }
            }
        }
    }

    /// What a commit of `bytes` counts as. It goes into one memtable even where it is larger.
    fn sized(&self, bytes: u64) -> (Size, u64) {
        let size = if bytes <= SMALL_BYTES_MAX { Size::Small } else { Size::Large };
        (size, bytes.min(self.memtable_bytes.max(SMALL_BYTES_MAX)))
    }

    fn full(&self) -> Error {
        let message = format!(
            "{} bytes wait for their upload, the limit (unuploaded_bytes_max); the object store does not answer or is too slow",
            self.unuploaded_bytes_max
        );
        Error::new(Kind::Full, message)
    }
}

enum Look {
    Go,
    /// Look again after this time.
    Later(Duration),
    /// Nobody goes until flush or compaction has caught up.
    Wait,
    Full,
}

#[derive(Clone, Copy, Debug)]
enum Size {
    Small,
    Large,
}

/// Where a writer stands, or stood until it was let go.
pub(crate) struct Place<'a> {
    throttle: &'a Throttle,
    size: Size,
    bytes: u64,
    /// It may go when as many bytes of its line have passed.
    end: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Size::Large = self.size {
            self.throttle.lines.lock().written += self.bytes;
        }
    }
}

/// The line of small commits and that of large ones. They move at the rate of the moment, whatever the rate was when writers came.
#[derive(Debug, Default)]
struct Lines {
    /// Bytes that have come so far, by [`Size`].
    came: [u64; 2],
    /// Of these, bytes that have passed.
    passed: [u64; 2],
    /// When they had.
    at: Duration,
    /// Bytes of large commits that are written, or given up.
    written: u64,
}

impl Lines {
    /// Takes a writer of `bytes` in. Returns the end of its place.
    fn join(&mut self, size: Size, bytes: u64) -> u64 {
        self.came[size as usize] += bytes;
        self.came[size as usize]
    }

    /// How long until the place that ends at `end` has passed if nobody else comes, from when the lines were advanced last.
    fn time_to(&self, size: Size, end: u64, rate: u64) -> Duration {
        let size = size as usize;
        let own = end.saturating_sub(self.passed[size]);
        delay(own + own.min(self.waiting()[1 - size]), rate)
    }

    /// Who stands at `place` has gone, and so have those before it, or they will at once.
    fn let_pass(&mut self, place: &Place<'_>) {
        let passed = &mut self.passed[place.size as usize];
        *passed = place.end.max(*passed);
    }

    /// Until `now` nobody was let pass.
    fn stop(&mut self, now: Duration) {
        self.at = now.max(self.at);
    }

    fn waiting(&self) -> [u64; 2] {
        [0, 1].map(|size| self.came[size] - self.passed[size])
    }

    fn granted(&self) -> u64 {
        self.passed[Size::Large as usize].saturating_sub(self.written)
    }

    fn advance(&mut self, rate: u64, now: Duration) {
        let [small, large] = self.waiting();
        let time = now.saturating_sub(self.at);
        let bytes = (time.as_nanos() * u128::from(rate) / 1_000_000_000).min((small + large).into()) as u64;
        // Each gets half, and what the other one does not need.
        let small = small.min(bytes - large.min(bytes / 2));
        self.passed[Size::Small as usize] += small;
        self.passed[Size::Large as usize] += bytes - small;
        // What was not enough time for a whole byte counts next time; empty lines save nothing up.
        self.at = if self.waiting() == [0, 0] { now.max(self.at) } else { self.at + delay(bytes, rate) };
    }
}

fn stands_still() -> Error {
    Error::new(Kind::Unavailable, "writers wait for flush and compaction, which make no progress")
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::limits::FROZEN_MEMTABLES_MAX;

    const MEMTABLE: u64 = 64 << 20;
    const UNUPLOADED_MAX: u64 = 1 << 40;
    const STEP: Duration = Duration::from_millis(1);
    const BEAT: Duration = crate::pulse::BEAT;
    /// What writers wish to write, in bytes a second.
    const WISH: u64 = 250_000_000;

    /// An engine of which only speeds are known: flushes and merges go on while time passes.
    struct World<'a> {
        throttle: &'a Throttle,
        now: Duration,
        active: u64,
        /// Bytes of each frozen memtable, oldest first.
        frozen: VecDeque<u64>,
        l0: usize,
        /// What the throttle was told last, and when.
        told: (usize, usize),
        told_at: Duration,
        /// Bytes of the oldest frozen memtable that are flushed.
        flushed: f64,
        /// Runs that are being merged, and bytes of them that are.
        merging: Option<(usize, f64)>,
        /// Bytes a second of a flush, and of a merge's input.
        flush: f64,
        merge: f64,
        seen: Seen,
    }

    /// What a storm has shown.
    #[derive(Debug, Default)]
    struct Seen {
        written: u64,
        l0_most: usize,
        frozen_most: usize,
        /// Bytes in memtables.
        held_most: u64,
        /// The longest delay of a small commit, and of a large one.
        longest: [Duration; 2],
        commits: [usize; 2],
    }

    /// Writers that commit `bytes` each time, and rest in between.
    #[derive(Clone, Copy)]
    struct Writers {
        count: usize,
        bytes: u64,
        rest: Duration,
    }

    impl Writers {
        /// As much as they can.
        fn restless(count: usize, bytes: u64) -> Self {
            Self { count, bytes, rest: delay(count as u64 * bytes, WISH) }
        }

        fn each<'a>(&self) -> impl Iterator<Item = Writer<'a>> + use<'a> {
            let Self { count, bytes, rest } = *self;
            (0..count).map(move |_| Writer { bytes, rest, wakes: rest, came: None, place: None })
        }
    }

    struct Writer<'a> {
        bytes: u64,
        rest: Duration,
        wakes: Duration,
        /// When it wished to commit.
        came: Option<Duration>,
        place: Option<Place<'a>>,
    }

    impl<'a> World<'a> {
        fn new(throttle: &'a Throttle, flush: f64, merge: f64) -> Self {
            Self {
                throttle,
                now: Duration::ZERO,
                active: 0,
                frozen: VecDeque::new(),
                l0: 0,
                told: (0, 0),
                told_at: Duration::ZERO,
                flushed: 0.0,
                merging: None,
                flush,
                merge,
                seen: Seen::default(),
            }
        }

        fn refresh(&mut self) {
            (self.told, self.told_at) = ((self.frozen.len(), self.l0), self.now);
            self.throttle.refresh(Debt {
                l0_runs: self.l0,
                frozen_memtables: self.frozen.len(),
                active_filled: self.active as f64 / MEMTABLE as f64,
                granted: self.throttle.granted() as f64 / MEMTABLE as f64,
                unuploaded_bytes_max: UNUPLOADED_MAX,
                ..Debt::default()
            });
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
            if let Some(oldest) = self.frozen.front() {
                self.flushed += self.flush * time.as_secs_f64();
                if self.flushed >= *oldest as f64 {
                    self.frozen.pop_front();
                    (self.l0, self.flushed) = (self.l0 + 1, 0.0);
                }
            }
            self.merging = match self.merging {
                None if self.l0 >= Shape::default().l0_runs => Some((self.l0, 0.0)),
                Some((runs, bytes)) if bytes >= (runs as u64 * MEMTABLE) as f64 => {
                    self.l0 -= runs;
                    None
                }
                merging => merging.map(|(runs, bytes)| (runs, bytes + self.merge * time.as_secs_f64())),
            };
            self.seen.l0_most = self.seen.l0_most.max(self.l0);
            // As the engine's threads do: when one of them has done something, and at each beat.
            if (self.frozen.len(), self.l0) != self.told || self.now >= self.told_at + BEAT {
                self.refresh();
            }
        }

        /// As the engine's commit does.
        fn write(&mut self, bytes: u64) {
            self.seen.written += bytes;
            let froze = self.active >= MEMTABLE;
            if froze {
                self.frozen.push_back(std::mem::take(&mut self.active));
                self.seen.frozen_most = self.seen.frozen_most.max(self.frozen.len());
            }
            self.active += bytes;
            self.seen.held_most = self.seen.held_most.max(self.active + self.frozen.iter().sum::<u64>());
            if froze {
                self.refresh();
            }
        }

        fn step(&mut self, writer: &mut Writer<'a>) {
            let came = *writer.came.get_or_insert(self.now);
            let pause = match self.throttle.look(&mut writer.place, writer.bytes, self.now) {
                Look::Later(pause) => pause,
                Look::Wait => POLL,
                Look::Full => panic!("nothing waits for its upload"),
                Look::Go => {
                    let delayed = self.now - came;
                    let size = self.throttle.sized(writer.bytes).0 as usize;
                    self.seen.longest[size] = delayed.max(self.seen.longest[size]);
                    self.seen.commits[size] += 1;
                    self.write(writer.bytes);
                    (writer.came, writer.place) = (None, None);
                    writer.rest
                }
            };
            writer.wakes = self.now + pause;
        }
    }

    /// What `writers` see for `time`, on an engine that flushes and merges so many bytes a second.
    fn storm(flush: u64, merge: u64, writers: &[Writers], time: Duration) -> Seen {
        let throttle = Throttle::new(Shape::default(), MEMTABLE, UNUPLOADED_MAX);
        let mut world = World::new(&throttle, flush as f64, merge as f64);
        let mut writers: Vec<Writer<'_>> = writers.iter().flat_map(Writers::each).collect();
        while world.now < time {
            let next = writers.iter_mut().min_by_key(|writer| writer.wakes).expect("somebody writes");
            while world.now < next.wakes {
                world.pass(STEP.min(next.wakes - world.now));
            }
            world.step(next);
        }
        println!("flushes of {flush}, merges of {merge}: {:?}", world.seen);
        assert!(world.seen.frozen_most <= FROZEN_MEMTABLES_MAX, "{} frozen", world.seen.frozen_most);
        world.seen
    }

    /// Thirty-two writers of 2 KiB, seen as one.
    fn many() -> Writers {
        Writers::restless(1, 32 * 2048)
    }

    /// Thirty-two writers of 2 KiB wish to write far more than is merged.
    #[test]
    fn a_storm_that_merges_do_not_keep_up_with_is_slowed_and_never_stopped() {
        for (merge, longest_ms) in
            [(1_000_000, 500), (15_000_000, 100), (40_000_000, 100), (100_000_000, 100)]
        {
            let seen = storm(200_000_000, merge, &[many()], Duration::from_secs(900));
            assert!(seen.l0_most < Shape::default().l0_runs_stop, "{} runs", seen.l0_most);
            assert!(seen.longest[0] <= Duration::from_millis(longest_ms));
            assert!(seen.written > 900 * merge / 2, "{} bytes: writers get what merges give", seen.written);
        }
    }

    #[test]
    fn a_storm_that_flushes_do_not_keep_up_with_is_slowed_and_never_stopped() {
        for (flush, longest_ms) in [(1_000_000, 500), (4_000_000, 100), (8_000_000, 100), (30_000_000, 100)] {
            let seen = storm(flush, 100_000_000, &[many()], Duration::from_secs(900));
            assert!(seen.frozen_most < FROZEN_MEMTABLES_MAX, "{} frozen", seen.frozen_most);
            assert!(seen.longest[0] <= Duration::from_millis(longest_ms));
            assert!(seen.written > 900 * flush / 2, "{} bytes: writers get what flushes give", seen.written);
        }
    }

    /// Below the least rate there is no smoothness left, only an end.
    #[test]
    fn where_flushes_are_slower_than_the_least_rate_writers_wait_for_one_at_most() {
        let seen = storm(200_000, 100_000_000, &[many()], Duration::from_secs(1800));
        assert_eq!(seen.frozen_most, FROZEN_MEMTABLES_MAX);
        assert!(seen.longest[0] > Duration::from_secs(10) && seen.longest[0] < WAIT_MAX);
    }

    fn eight() -> Writers {
        Writers::restless(8, 2048)
    }

    const QUARTER: Duration = Duration::from_secs(900);

    #[test]
    fn small_commits_do_not_wait_for_the_bytes_of_large_ones_and_all_together_get_what_flushes_do() {
        for flush in [1_000_000, 2_000_000, 8_000_000] {
            let calm = storm(flush, 100_000_000, &[eight()], QUARTER);
            assert!(calm.longest[0] < Duration::from_millis(100));
            for bytes in [100 << 10, 4 << 20, 20 << 20, 60 << 20] {
                let large = Writers { count: 1, bytes, rest: Duration::from_secs(10) };
                let seen = storm(flush, 100_000_000, &[eight(), large], QUARTER);
                assert!(seen.longest[0] < Duration::from_millis(250));
                assert!(
                    seen.longest[0] < 4 * calm.longest[0],
                    "half of the rate, and a larger memtable to flush"
                );
                assert!(seen.longest[1] > delay(bytes, flush) / 2, "a large commit waits for its own bytes");
                assert!(seen.longest[1] < 10 * delay(bytes, flush), "also while a flush is nearly done");
                assert!(seen.frozen_most < FROZEN_MEMTABLES_MAX);
                assert!(seen.written.abs_diff(calm.written) < calm.written / 50);
            }
        }
    }

    /// Larger than a memtable, and many at the same time.
    #[test]
    fn large_commits_do_not_exceed_the_limit_and_stop_nobody() {
        for (count, bytes) in [(8, 30 << 20), (8, 60 << 20), (1, 120 << 20), (8, 120 << 20)] {
            let large = Writers { count, bytes, rest: Duration::from_secs(10) };
            let seen = storm(8_000_000, 100_000_000, &[eight(), large], QUARTER);
            assert!(seen.frozen_most < FROZEN_MEMTABLES_MAX);
            assert!(
                seen.held_most < FROZEN_MEMTABLES_MAX as u64 * (MEMTABLE + bytes),
                "{} bytes",
                seen.held_most
            );
            assert!(seen.longest[0] < Duration::from_millis(250));
            assert!(seen.commits[1] > 10, "large commits have their share");
        }
    }

    /// Nor does who comes later wait behind those who have gone.
    #[test]
    fn who_is_slowed_notices_at_once_that_the_pressure_has_gone() {
        let slow = Debt { l0_runs: 23, unuploaded_bytes_max: 1, ..Debt::default() };
        let none = Debt { l0_runs: 0, ..slow };
        let throttle = Throttle::new(Shape::default(), MEMTABLE, 1);
        let world = Relief { now: Mutex::default(), begun: Mutex::default(), throttle, none };
        let slowed = |bytes| {
            world.throttle.refresh(slow);
            *world.begun.lock() = world.now();
            world.throttle.admit(bytes, &world, || Ok(true)).expect("it goes on");
            world.now() - *world.begun.lock()
        };
        for bytes in [SMALL_BYTES_MAX, 100 << 20] {
            for _ in 0..100 {
                let delayed = slowed(bytes);
                assert!(delayed >= RELIEF && delayed <= RELIEF + LOOK, "{delayed:?}");
            }
        }
        assert_eq!((world.throttle.delayed(), world.throttle.granted()), (200, 0));
        let delayed = slowed(100);
        assert!(delayed < Duration::from_millis(2), "{delayed:?} behind those who have gone");
    }

    /// A large commit was nearly through when everybody was stopped.
    #[test]
    fn nobody_is_let_pass_for_the_time_in_which_all_were_stopped() {
        let throttle = Throttle::new(Shape::default(), MEMTABLE, 1);
        let slow = Debt { l0_runs: 23, unuploaded_bytes_max: 1, ..Debt::default() };
        let mut place = None;
        let second = Duration::from_secs(1);
        throttle.refresh(slow);
        assert!(matches!(throttle.look(&mut place, MEMTABLE, second), Look::Later(_)));
        throttle.look(&mut place, MEMTABLE, 2 * second);
        let granted = throttle.granted();
        assert!(granted > 0);
        throttle.refresh(Debt { l0_runs: 24, ..slow });
        assert!(matches!(throttle.look(&mut place, MEMTABLE, 2 * second), Look::Wait));
        assert!(matches!(throttle.look(&mut place, MEMTABLE, 3600 * second), Look::Wait));
        throttle.refresh(slow);
        assert!(matches!(throttle.look(&mut place, MEMTABLE, 3600 * second), Look::Later(_)));
        assert_eq!(throttle.granted(), granted);
        drop(place);
        assert_eq!(throttle.granted(), 0);
    }

    const RELIEF: Duration = Duration::from_millis(100);

    /// After [`RELIEF`] the pressure is gone.
    struct Relief {
        now: Mutex<Duration>,
        begun: Mutex<Duration>,
        throttle: Throttle,
        none: Debt,
    }

    impl Clock for Relief {
        fn now(&self) -> Duration {
            *self.now.lock()
        }
        fn sleep(&self, pause: Duration) {
            *self.now.lock() += pause;
            if self.now() >= *self.begun.lock() + RELIEF {
                self.throttle.refresh(self.none);
            }
        }
    }

    const SMALL: usize = Size::Small as usize;
    const LARGE: usize = Size::Large as usize;
    const SECOND: Duration = Duration::from_secs(1);

    fn left(lines: &mut Lines, (size, end): (Size, u64), rate: u64, now: Duration) -> Duration {
        lines.advance(rate, now);
        lines.time_to(size, end, rate)
    }

    #[test]
    fn a_line_moves_at_the_rate_of_the_moment() {
        let mut lines = Lines::default();
        lines.advance(1_000_000, SECOND);
        let places: Vec<_> = (0..100).map(|_| (Size::Small, lines.join(Size::Small, 1_000_000))).collect();
        assert_eq!(left(&mut lines, places[0], 1_000_000, SECOND), SECOND);
        assert_eq!(left(&mut lines, places[99], 1_000_000, SECOND), 100 * SECOND);
        assert_eq!(left(&mut lines, places[99], 1_000_000, 11 * SECOND), 90 * SECOND);
        assert_eq!(left(&mut lines, places[99], 90_000_000, 11 * SECOND), SECOND);
        assert_eq!(left(&mut lines, places[99], 90_000_000, 12 * SECOND), Duration::ZERO);
        // Empty lines save nothing up.
        lines.advance(1000, 60 * SECOND);
        let place = (Size::Small, lines.join(Size::Small, 500));
        assert_eq!(left(&mut lines, place, 1000, 60 * SECOND), SECOND / 2);
        // However often they are looked at, and however short the steps.
        let mut now = 60 * SECOND;
        while !left(&mut lines, place, 1000, now).is_zero() {
            now += Duration::from_nanos(12_345);
        }
        assert!(now - 60 * SECOND < SECOND / 2 + Duration::from_millis(1), "{now:?}");
    }

    #[test]
    fn each_line_gets_half_of_the_rate_and_what_the_other_does_not_need() {
        let mut lines = Lines::default();
        lines.advance(1000, SECOND);
        let large = (Size::Large, lines.join(Size::Large, 10_000));
        let small = (Size::Small, lines.join(Size::Small, 1000));
        assert_eq!(left(&mut lines, small, 1000, SECOND), 2 * SECOND);
        assert_eq!(left(&mut lines, large, 1000, SECOND), 11 * SECOND);
        assert_eq!(left(&mut lines, small, 1000, 2 * SECOND), SECOND);
        assert_eq!(left(&mut lines, small, 1000, 3 * SECOND), Duration::ZERO);
        assert_eq!((lines.passed, lines.granted()), ([1000, 1000], 1000));
        assert_eq!(left(&mut lines, large, 1000, 5 * SECOND), 7 * SECOND);
        let small = (Size::Small, lines.join(Size::Small, 100));
        assert_eq!(left(&mut lines, small, 1000, 6 * SECOND), Duration::ZERO);
        assert_eq!(lines.passed, [1100, 3900]);
        assert_eq!(left(&mut lines, large, 1000, 13 * SECOND), Duration::ZERO);
    }

    /// Compared with one line that does not tell small from large.
    #[test]
    fn together_the_lines_let_as_many_bytes_pass_as_one_would() {
        let mut random = 1_u64;
        let mut below = |most: u64| {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (random >> 33) % most
        };
        let (mut lines, mut one, mut now) = (Lines::default(), Lines::default(), Duration::ZERO);
        for _ in 0..100_000 {
            now += Duration::from_micros(below(3000));
            let rate = 1 + below(2_000_000);
            lines.advance(rate, now);
            one.advance(rate, now);
            assert_eq!(lines.passed[SMALL] + lines.passed[LARGE], one.passed[LARGE]);
            let (size, bytes) = match below(20) {
                0 => (Size::Large, SMALL_BYTES_MAX + below(50_000)),
                1..10 => (Size::Small, below(1000)),
                _ => continue,
            };
            lines.join(size, bytes);
            one.join(Size::Large, bytes);
        }
        assert!(lines.passed.iter().all(|passed| *passed > 1_000_000), "{lines:?}");
    }
}
