//! How much writers are slowed when flush, compaction or upload fall behind: smoothly first, and only then altogether.
//! Pure: what is owed goes in, what to do comes out.
//!
//! * The more is owed the less may be written, down to [`RATE_MIN`]. So writers come to rest at the rate of what flushes and
//!   merges get done, and wait altogether only where that is about as little as the least rate.

use std::time::Duration;

use crate::limits::{FROZEN_MEMTABLES_MAX, Shape};

/// What is owed at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Debt {
    /// Runs in L0.
    pub(crate) l0_runs: usize,
    /// Memtables that wait for their flush.
    pub(crate) frozen_memtables: usize,
    /// How full the memtable is that takes writes; 1: it will be frozen.
    pub(crate) active_filled: f64,
    /// What large commits will write that are about to go, in memtables.
    pub(crate) granted: f64,
    /// Bytes by which levels exceed their targets ([`super::pick::debt_bytes`]).
    pub(crate) compaction_bytes: u64,
    /// Bytes on the local disk that the bucket does not have.
    pub(crate) unuploaded_bytes: u64,
    /// How many of those the operator allows.
    pub(crate) unuploaded_bytes_max: u64,
}

/// What a writer meets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Pressure {
    /// Go on.
    None,
    /// All writers together may write this many bytes a second.
    Slow { bytes_per_second: u64 },
    /// Wait until flush or compaction has caught up.
    Wait,
    /// The bucket has been away for too long: fail, and say so.
    Full,
}

/// The rate at which slowing begins: well above what one machine's compaction sustains, so that nobody feels it begin.
const RATE_MAX: f64 = 256e6;
/// The rate just before writers stop: eight that commit 2 KiB each still wait for a quarter of a second only.
const RATE_MIN: f64 = RATE_MAX / 4096.0;
/// Compaction debt at which slowing begins, in bases, and at which writers stop.
const DEBT_BASES: (f64, f64) = (16.0, 256.0);

/// What writers meet given what is owed.
pub(crate) fn pressure(debt: &Debt, shape: &Shape) -> Pressure {
    if debt.unuploaded_bytes >= debt.unuploaded_bytes_max {
        return Pressure::Full;
    }
    let base = shape.level_base_bytes as f64;
    // A memtable that is nearly full counts nearly as much as a frozen one: else its end would be a large step. Only frozen ones stop writers.
    let frozen = debt.frozen_memtables as f64;
    let memtables = frozen + debt.active_filled.min(1.0) + debt.granted;
    let memtables = memtables.min(FROZEN_MEMTABLES_MAX as f64 - 0.01).max(frozen);
    let strain = strain(debt.l0_runs as f64, l0_runs_felt(shape) as f64, shape.l0_runs_stop as f64)
        .max(strain(debt.compaction_bytes as f64, DEBT_BASES.0 * base, DEBT_BASES.1 * base))
        .max(strain(memtables, FROZEN_MEMTABLES_MAX as f64 / 2.0, FROZEN_MEMTABLES_MAX as f64));
    match strain {
        s if s <= 0.0 => Pressure::None,
        s if s >= 1.0 => Pressure::Wait,
        // Each step of strain takes the same share of the rate, so no single step is felt as a stall.
        s => Pressure::Slow { bytes_per_second: (RATE_MAX * (RATE_MIN / RATE_MAX).powf(s)) as u64 },
    }
}

/// Whether merges have to wait. Until the bucket answers, what they write adds to what waits for it, as far as their inputs are there already;
/// so beyond half of the limit the rest is left to writers, unless these would feel the runs in L0 before they meet the limit.
pub(crate) fn pauses_merges(debt: &Debt, shape: &Shape) -> bool {
    debt.unuploaded_bytes > debt.unuploaded_bytes_max / 2 && debt.l0_runs < l0_runs_felt(shape)
}

/// Runs in L0 beyond which writers are slowed.
fn l0_runs_felt(shape: &Shape) -> usize {
    (shape.l0_runs * 2).min(shape.l0_runs_stop / 2)
}

/// How long a writer of `bytes` waits under `pressure` if it is alone.
pub(crate) fn delay(bytes: u64, bytes_per_second: u64) -> Duration {
    Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / bytes_per_second.max(1))
}

/// 0 at `from` and below, 1 at `to` and above.
fn strain(now: f64, from: f64, to: f64) -> f64 {
    ((now - from) / (to - from)).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_l0(l0_runs: usize) -> Pressure {
        let debt = Debt { l0_runs, unuploaded_bytes_max: 1, ..Debt::default() };
        pressure(&debt, &Shape::default())
    }

    #[test]
    fn slowing_begins_softly_grows_steadily_and_ends_in_waiting() {
        assert_eq!(with_l0(8), Pressure::None);
        assert_eq!(with_l0(24), Pressure::Wait);
        let rates: Vec<u64> = (9..24)
            .map(|runs| match with_l0(runs) {
                Pressure::Slow { bytes_per_second } => bytes_per_second,
                other => panic!("{runs} runs meet {other:?}"),
            })
            .collect();
        assert!(rates[0] > 100_000_000, "the first step must not be felt: {}", rates[0]);
        for pair in rates.windows(2) {
            assert!(pair[1] < pair[0] && pair[1] * 2 >= pair[0], "no step halves the rate: {pair:?}");
        }
    }

    #[test]
    fn memtables_that_wait_are_felt_smoothly_while_the_next_one_fills() {
        let at = |frozen_memtables: usize, active_filled: f64| {
            let debt = Debt { frozen_memtables, active_filled, unuploaded_bytes_max: 1, ..Debt::default() };
            pressure(&debt, &Shape::default())
        };
        assert_eq!((at(1, 1.5), at(2, 0.0)), (Pressure::None, Pressure::None));
        assert_eq!(at(4, 0.0), Pressure::Wait);
        let steps = (1..10).map(|tenths| (2, tenths)).chain((0..10).map(|tenths| (3, tenths)));
        let rates: Vec<u64> = steps
            .map(|(frozen, tenths)| match at(frozen, f64::from(tenths) / 10.0) {
                Pressure::Slow { bytes_per_second } => bytes_per_second,
                other => panic!("{frozen} and {tenths} tenths meet {other:?}"),
            })
            .collect();
        assert!(rates[0] > 100_000_000, "the first step must not be felt: {}", rates[0]);
        for pair in rates.windows(2) {
            assert!(pair[1] < pair[0] && pair[1] * 2 >= pair[0], "no step halves the rate: {pair:?}");
        }
        assert!(matches!(at(3, 2.0), Pressure::Slow { .. }), "it can still be frozen");
    }

    #[test]
    fn what_large_commits_will_write_counts_as_written_but_stops_nobody() {
        let at = |frozen_memtables, active_filled, granted| {
            let unuploaded_bytes_max = 1;
            let debt =
                Debt { frozen_memtables, active_filled, granted, unuploaded_bytes_max, ..Debt::default() };
            pressure(&debt, &Shape::default())
        };
        assert_eq!(at(2, 0.25, 0.5), at(2, 0.75, 0.0));
        assert_eq!(at(2, 0.5, 1.0), at(3, 0.5, 0.0));
        assert!(matches!(at(3, 0.5, 7.0), Pressure::Slow { .. }));
        assert_eq!(at(4, 0.0, 1.0), Pressure::Wait);
    }

    #[test]
    fn the_upload_limit_is_an_error_and_not_a_wait() {
        let debt = Debt { l0_runs: 99, unuploaded_bytes: 10, unuploaded_bytes_max: 10, ..Debt::default() };
        assert_eq!(pressure(&debt, &Shape::default()), Pressure::Full);
    }

    #[test]
    fn merges_pause_beyond_half_of_the_upload_limit_unless_writers_would_feel_it() {
        let paused = |l0_runs, unuploaded_bytes| {
            let debt = Debt { l0_runs, unuploaded_bytes, unuploaded_bytes_max: 10, ..Debt::default() };
            pauses_merges(&debt, &Shape::default())
        };
        assert!(!paused(4, 5));
        assert!(paused(4, 6) && paused(7, 10));
        assert!(!paused(8, 10));
    }

    #[test]
    fn a_writer_waits_for_its_bytes() {
        assert_eq!(delay(1_000_000, 2_000_000), Duration::from_millis(500));
        assert_eq!(delay(u64::MAX, 0), Duration::from_nanos(u64::MAX));
    }
}
