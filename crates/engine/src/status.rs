//! What the engine counts, for SHOW STATUS and for tests.

use std::time::Duration;

use parking_lot::Mutex;

/// Counters since the engine was opened, and sizes now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    rows: Vec<(&'static str, u64)>,
}

impl Status {
    pub(crate) fn push(&mut self, name: &'static str, value: u64) {
        self.rows.push((name, value));
    }
    /// Names (`locks_waits`, `bucket_put_requests` …) and numbers, in the order to show them.
    pub fn rows(&self) -> &[(&'static str, u64)] {
        &self.rows
    }
    /// One number by its name.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.rows.iter().find(|(n, _)| *n == name).map(|(_, value)| *value)
    }
}

/// How long uploads of the wal take, the one under way included. Tries that failed count towards the one that succeeds.
#[derive(Debug, Default)]
pub(crate) struct UploadTime(Mutex<(Option<Duration>, Duration)>);

impl UploadTime {
    /// An upload begins, or the last one is tried again.
    pub(crate) fn begin(&self, now: Duration) {
        self.0.lock().0.get_or_insert(now);
    }
    /// It has succeeded.
    pub(crate) fn end(&self, now: Duration) {
        let longest = self.longest(now);
        *self.0.lock() = (None, longest);
    }
    /// The longest so far.
    pub(crate) fn longest(&self, now: Duration) -> Duration {
        let (begun, longest) = *self.0.lock();
        longest.max(begun.map_or(Duration::ZERO, |begun| now.saturating_sub(begun)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_upload_counts_from_its_first_try_and_while_it_is_under_way() {
        let at = Duration::from_millis;
        let time = UploadTime::default();
        time.begin(at(100));
        time.end(at(150));
        assert_eq!(time.longest(at(1000)), at(50));
        time.begin(at(1000));
        time.begin(at(1400)); // the first try failed
        assert_eq!(time.longest(at(1500)), at(500));
        time.end(at(1600));
        assert_eq!(time.longest(at(9000)), at(600));
    }
}
