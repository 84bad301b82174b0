//! What the engine counts, for SHOW STATUS and for tests.

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
