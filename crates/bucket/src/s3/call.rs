//! One call: tried again while that may help, and while its time lasts.

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use futures_util::future::{Either, select};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::failure::{Failure, Reaction, Seen};
use crate::{BucketError, ErrorKind, ObjectName, OpMeter, Operation};

/// A try that moved nothing for so long is given up, so that another one may do better.
const TRY_PATIENCE: Duration = Duration::from_secs(15);
/// What the last try gets, however late it is.
const LAST_TRY_PATIENCE: Duration = Duration::from_millis(500);
/// A try gets a second more for each of these.
const SLOWEST_BYTES_PER_SECOND: u64 = 512 << 10;
/// Waits between tries double from the first to the last, and are then cut at random. The first is short: most failures are
/// bad luck, and the newest second of commits may be what waits.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_LAST: Duration = Duration::from_secs(5);
/// An answer that no S3 would give is taken for a wrong endpoint after so many tries.
const NONSENSE_TRIES: u32 = 3;

pub(super) struct Call<'a> {
    pub operation: Operation,
    pub name: &'a ObjectName,
    /// Of one try's body, in either direction.
    pub bytes: u64,
    pub deadline: Duration,
    pub meter: &'a OpMeter,
    /// For people: where the request goes.
    pub place: &'a str,
}

impl Call<'_> {
    /// Sends what `attempt` sends, again and again while that may help.
    pub async fn send<T>(
        &self,
        mut attempt: impl AsyncFnMut(Seen) -> Result<T, Failure>,
    ) -> Result<T, BucketError> {
        let started = Instant::now();
        let patience = self.deadline + at_slowest(self.bytes);
        let mut tries = 0;
        loop {
            tries += 1;
            let left = patience.saturating_sub(started.elapsed());
            let limit = (TRY_PATIENCE + at_slowest(self.bytes)).min(left.max(LAST_TRY_PATIENCE));
            let seen = Seen::default();
            let answered = seen.clone().watch(tokio::time::timeout(limit, attempt(seen.clone()))).await;
            let failure = match answered {
                Ok(Ok(answer)) => {
                    self.meter.count(self.bytes);
                    return Ok(answer);
                }
                Ok(Err(failure)) => failure,
                Err(_) => Failure::Torn(format!("no answer within {:.1} s", limit.as_secs_f64())),
            };
            self.meter.count_error();
            let (reaction, message) = failure.explain(&seen);
            let wait = backoff(tries);
            let again = match reaction {
                Reaction::Retry => true,
                Reaction::RetryBriefly(_) => tries < NONSENSE_TRIES,
                Reaction::Stop(_) => false,
            };
            // A process that was stopped meanwhile, or starved, wakes up past its deadline; its one try proves nothing.
            if again && (tries == 1 || started.elapsed() + wait < patience) {
                tracing::debug!(operation = %self.operation, name = %self.name, tries, message, "trying again");
                tokio::time::sleep(wait).await;
                continue;
            }
            let kind = match reaction {
                Reaction::Retry => ErrorKind::Unavailable,
                Reaction::RetryBriefly(kind) | Reaction::Stop(kind) => kind,
            };
            return Err(self.error(kind, tries, started.elapsed(), &message));
        }
    }

    fn error(&self, kind: ErrorKind, tries: u32, took: Duration, message: &str) -> BucketError {
        let times = match tries {
            1 => String::new(),
            _ => format!(" (tried {tries} times in {:.0} s)", took.as_secs_f64()),
        };
        BucketError::new(
            kind,
            self.operation.as_str(),
            self.name,
            format!("{message}; {}{times}", self.place),
        )
    }
}

/// When a read has taken longer than nearly all before it, a second one is sent, and the first answer wins: a store's slow
/// requests are slow by bad luck more often than by load. Of a large read that is said of the wait until its answer begins.
#[derive(Debug)]
pub(super) struct Hedge(Mutex<Pace>);

#[derive(Clone, Copy, Debug)]
struct Pace {
    /// What about 95 % of reads stay below.
    slow: Duration,
    reads: u64,
    hedged: u64,
}

/// Where the estimate of the 95th percentile starts, and between what it stays.
const SLOW_AT_FIRST: Duration = Duration::from_millis(400);
const SLOW_MIN: Duration = Duration::from_millis(20);
const SLOW_MAX: Duration = Duration::from_secs(5);
/// At most one read in so many is sent twice, lest an overloaded store gets more load.
const HEDGED_SHARE: u64 = 20;
/// A read of more takes its time by its size once its answer has begun, and there would be much to throw away: that part is not raced.
pub(super) const RACED_WHOLE_BYTES_MAX: u64 = 1 << 20;

impl Default for Hedge {
    fn default() -> Self {
        Self(Mutex::new(Pace { slow: SLOW_AT_FIRST, reads: 0, hedged: 0 }))
    }
}

impl Hedge {
    /// The answer of `attempt`, or of a second one like it. That there is no such object is an answer, too. `meter` counts the second.
    pub async fn first_of<T, F>(&self, meter: &OpMeter, attempt: impl Fn() -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let started = Instant::now();
        let answer = self.race(meter, attempt).await;
        if answer.is_ok() {
            self.0.lock().learn(started.elapsed());
        }
        answer
    }

    async fn race<T, F>(&self, meter: &OpMeter, attempt: impl Fn() -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let slow = self.0.lock().slow;
        let mut first = Box::pin(explained(attempt()));
        if let Ok(answer) = tokio::time::timeout(slow, &mut first).await {
            return answer;
        }
        if !self.0.lock().take_hedge() {
            return first.await;
        }
        meter.count(0);
        let second = Box::pin(explained(attempt()));
        match select(first, second).await {
            Either::Left((Ok(answer), _)) | Either::Right((Ok(answer), _)) => Ok(answer),
            Either::Left((Err(failure), _)) | Either::Right((Err(failure), _)) if failure.is_final() => {
                Err(failure)
            }
            Either::Left((Err(failure), second)) => {
                second.await.map_err(|later| if later.is_final() { later } else { failure })
            }
            Either::Right((Err(_), first)) => first.await,
        }
    }
}

/// Each try's failure is explained by what was seen of it and not of the other.
async fn explained<T>(attempt: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let seen = Seen::default();
    let answer = seen.clone().watch(attempt).await;
    answer.map_err(|failure| {
        let (reaction, message) = failure.explain(&seen);
        Failure::Explained(reaction, message)
    })
}

impl Pace {
    /// Moves the estimate up by 19 steps or down by one, so that it rests where one in twenty is above.
    fn learn(&mut self, took: Duration) {
        self.reads += 1;
        let step = self.slow / 200;
        let slow = if took > self.slow { self.slow + 19 * step } else { self.slow - step };
        self.slow = slow.clamp(SLOW_MIN, SLOW_MAX);
    }

    fn take_hedge(&mut self) -> bool {
        let allowed = self.hedged * HEDGED_SHARE <= self.reads + HEDGED_SHARE;
        self.hedged += u64::from(allowed);
        allowed
    }
}

fn at_slowest(bytes: u64) -> Duration {
    Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND)
}

/// A wait before try `tries + 1`: between a tenth and the whole of a doubling step, so that clients that failed together
/// do not come back together.
fn backoff(tries: u32) -> Duration {
    let step = BACKOFF_FIRST.saturating_mul(1 << (tries - 1).min(10)).min(BACKOFF_LAST);
    // Each `RandomState` has keys of its own; this is all the chance that jitter needs.
    let chance = RandomState::new().hash_one(tries) as f64 / u64::MAX as f64;
    step.mul_f64(0.1 + 0.9 * chance)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn waits_grow_to_a_limit() {
        for tries in 1..100 {
            let wait = backoff(tries);
            assert!(wait >= BACKOFF_FIRST / 10 && wait <= BACKOFF_LAST, "{wait:?} after try {tries}");
        }
    }

    #[test]
    fn the_estimate_rests_where_one_read_in_twenty_is_slower() {
        let mut pace = *Hedge::default().0.lock();
        for read in 0..20_000u64 {
            pace.learn(Duration::from_millis(1 + read * 7919 % 1000));
        }
        let slow = pace.slow.as_millis();
        assert!((900..=990).contains(&slow), "{slow} ms of up to 1000");
    }

    /// How a try ends, after how many milliseconds.
    type End = (u64, Result<u8, u8>);

    /// The failure that says that there is no such object.
    const ABSENT: u8 = 0;

    /// What comes of a read whose tries end so, after how many milliseconds, and how many tries there were. The second one, if it may be
    /// sent, begins after 100.
    fn raced(ends: [End; 2], allowed: bool) -> (Result<u8, String>, u64, usize) {
        let hedged = if allowed { 0 } else { 2 };
        let hedge = Hedge(Mutex::new(Pace { slow: Duration::from_millis(100), reads: 0, hedged }));
        let (begun, under_way) = (Cell::new(0), Cell::new(0));
        let attempt = || {
            let (after, end) = ends[begun.replace(begun.get() + 1)];
            let under_way = &under_way;
            async move {
                under_way.set(under_way.get() + 1);
                let _end = Ends(under_way);
                tokio::time::sleep(Duration::from_millis(after)).await;
                end.map_err(|error| match error {
                    ABSENT => {
                        Seen::note_status(404);
                        let (path, source) = (String::new(), "404".into());
                        Failure::Store(object_store::Error::NotFound { path, source })
                    }
                    error => Failure::Torn(error.to_string()),
                })
            }
        };
        let meter = OpMeter::default();
        // Time stands still but for these waits, and goes by in an instant.
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_time().start_paused(true).build().unwrap().block_on(async {
            let started = Instant::now();
            let answer = hedge.first_of(&meter, attempt).await;
            assert_eq!(under_way.get(), 0, "whoever loses is not waited for, and does not go on");
            assert_eq!(meter.requests(), begun.get() as u64 - 1);
            let answer = answer.map_err(|failure| failure.explain(&Seen::default()).1);
            (answer, started.elapsed().as_millis() as u64, begun.get())
        })
    }

    struct Ends<'a>(&'a Cell<i32>);

    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.set(self.0.get() - 1);
        }
    }

    #[test]
    fn of_two_tries_the_first_good_answer_wins_and_a_failure_only_if_both_fail() {
        let torn = |error: &str| Err(error.to_owned());
        let absent = || Err("the store answered 404".to_owned());
        for (first, second, expected) in [
            ((99, Ok(1)), (0, Ok(2)), (Ok(1), 99, 1)),
            ((99, Err(1)), (0, Ok(2)), (torn("1"), 99, 1)),
            ((301, Ok(1)), (100, Ok(2)), (Ok(2), 200, 2)),
            // Slow, and then a failure: before the second answers, and after.
            ((151, Err(1)), (100, Ok(2)), (Ok(2), 200, 2)),
            ((301, Err(1)), (100, Ok(2)), (Ok(2), 200, 2)),
            // The second fails first: the first is still good.
            ((301, Ok(1)), (100, Err(2)), (Ok(1), 301, 2)),
            ((151, Ok(1)), (100, Err(2)), (Ok(1), 151, 2)),
            // That there is nothing is an answer.
            ((50, Err(ABSENT)), (0, Ok(2)), (absent(), 50, 1)),
            ((151, Err(ABSENT)), (9000, Ok(2)), (absent(), 151, 2)),
            ((9001, Ok(1)), (100, Err(ABSENT)), (absent(), 200, 2)),
            ((151, Err(1)), (100, Err(ABSENT)), (absent(), 200, 2)),
            ((301, Err(ABSENT)), (100, Err(2)), (absent(), 301, 2)),
            // Both: what is told is the first one's failure.
            ((151, Err(1)), (100, Err(2)), (torn("1"), 200, 2)),
            ((301, Err(1)), (100, Err(2)), (torn("1"), 301, 2)),
        ] {
            assert_eq!(raced([first, second], true), expected, "{first:?} {second:?}");
        }
    }

    #[test]
    fn two_tries_end_as_the_better_of_them_whatever_they_do() {
        let mut state = 20_261_123u64;
        let mut dice = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..3000 {
            let mut end = |odd: u64, name: u8| -> End {
                let end = [Ok(name), Err(name), Err(ABSENT)];
                (dice(200) * 2 + odd, end[dice(3) as usize])
            };
            // Never at the same moment.
            let (first, second) = (end(1, 1), end(0, 2));
            let allowed = dice(4) > 0;
            let late = (second.0 + 100, second.1);
            let answers = |end: &End| matches!(end.1, Ok(_) | Err(ABSENT));
            let (end, tries) = match (answers(&first), answers(&late)) {
                _ if first.0 < 100 || !allowed => (first, 1),
                (true, false) => (first, 2),
                (false, true) => (late, 2),
                (false, false) => ((first.0.max(late.0), first.1), 2),
                (true, true) => (if first.0 < late.0 { first } else { late }, 2),
            };
            let words = |error| match error {
                ABSENT => "the store answered 404".to_owned(),
                error => error.to_string(),
            };
            let expected = (end.1.map_err(words), end.0, tries);
            assert_eq!(raced([first, second], allowed), expected, "{first:?} {second:?} {allowed}");
        }
    }

    #[test]
    fn no_more_than_one_read_in_twenty_is_sent_twice() {
        let mut pace = *Hedge::default().0.lock();
        let hedged = (0..1000).filter(|_| {
            pace.learn(Duration::from_secs(9));
            pace.take_hedge()
        });
        assert!((45..=55).contains(&hedged.count()));
    }
}
