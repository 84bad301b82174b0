//! What a database must contain: a list of commits over a plain map. Too simple to be wrong.
//!
//! * A state is named by how many commits it holds; state 0 is empty.
//! * Commits up to `acknowledged` were promised to a client; those after it were in doubt when their writer died.
//! * Commits up to `uploaded` survive the loss of the machine.

use std::collections::BTreeMap;
use std::ops::Bound;

/// Tree and key.
pub(crate) type Key = (u32, Vec<u8>);
/// What a transaction writes: a value, or a deletion.
pub(crate) type Writes = BTreeMap<Key, Option<Vec<u8>>>;

/// Oldest first: the state that brought it, and the value.
type Versions = Vec<(usize, Option<Vec<u8>>)>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Commit {
    pub(crate) writes: Writes,
    pub(crate) drops: Vec<u32>,
}

/// The commits of one line of writers.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    commits: Vec<Commit>,
    versions: BTreeMap<Key, Versions>,
    acknowledged: usize,
    uploaded: usize,
}

impl History {
    /// Adds a commit whose outcome is not known yet.
    pub(crate) fn begin_commit(&mut self, commit: Commit) {
        let state = self.commits.len() + 1;
        for (key, value) in &commit.writes {
            self.versions.entry(key.clone()).or_default().push((state, value.clone()));
        }
        self.commits.push(commit);
    }

    /// The newest commit was acknowledged.
    pub(crate) fn acknowledge(&mut self) {
        assert_eq!(
            self.acknowledged + 1,
            self.commits.len(),
            "no commit is acknowledged after one that failed"
        );
        self.acknowledged = self.commits.len();
    }

    /// The newest commit failed and left nothing.
    pub(crate) fn take_back(&mut self) {
        self.truncate(self.commits.len() - 1);
    }

    /// Only the first `state` commits ever happened, and all of those are known to have.
    pub(crate) fn settle(&mut self, state: usize, uploaded: usize) {
        self.truncate(state);
        self.acknowledged = state;
        self.uploaded = uploaded.min(state);
    }

    /// All that is acknowledged now is in the bucket.
    pub(crate) fn mark_uploaded(&mut self) {
        self.uploaded = self.acknowledged;
    }

    pub(crate) fn len(&self) -> usize {
        self.commits.len()
    }
    pub(crate) fn acknowledged(&self) -> usize {
        self.acknowledged
    }
    pub(crate) fn uploaded(&self) -> usize {
        self.uploaded
    }

    /// The value of a key in a state.
    pub(crate) fn get(&self, key: &Key, state: usize) -> Option<&Vec<u8>> {
        visible(self.versions.get(key)?, state)
    }

    /// The state that changed a key last.
    pub(crate) fn newest(&self, key: &Key) -> usize {
        let of = |versions: &Vec<(usize, _)>| {
            versions.iter().rev().map(|(state, _)| *state).find(|s| *s <= self.acknowledged)
        };
        self.versions.get(key).and_then(of).unwrap_or(0)
    }

    /// The first entry of `tree` after `from`, in `state` with `own` writes over it.
    pub(crate) fn after(
        &self,
        tree: u32,
        from: Bound<&[u8]>,
        state: usize,
        own: &Writes,
    ) -> Option<(Vec<u8>, Vec<u8>)> {
        let from = match from {
            Bound::Unbounded => Bound::Included((tree, Vec::new())),
            bound => bound.map(|key| (tree, key.to_vec())),
        };
        let range = (from, Bound::Excluded((tree + 1, Vec::new())));
        let stored = self
            .versions
            .range(range.clone())
            .filter(|(key, versions)| !own.contains_key(*key) && visible(versions, state).is_some());
        let stored = stored.map(|(key, versions)| (key, visible(versions, state).expect("filtered"))).next();
        let own = own.range(range).find_map(|(key, value)| value.as_ref().map(|value| (key, value)));
        let first = match (stored, own) {
            (Some(a), Some(b)) => Some(if a.0 < b.0 { a } else { b }),
            (a, b) => a.or(b),
        };
        first.map(|(key, value)| (key.1.clone(), value.clone()))
    }

    /// The last entry of `tree` before `before` (`None`: its end).
    pub(crate) fn before(
        &self,
        tree: u32,
        before: Option<&[u8]>,
        state: usize,
        own: &Writes,
    ) -> Option<(Vec<u8>, Vec<u8>)> {
        let end = before.map_or((tree + 1, Vec::new()), |key| (tree, key.to_vec()));
        let range = (tree, Vec::new())..end;
        let mut stored = self
            .versions
            .range(range.clone())
            .rev()
            .filter(|(key, versions)| !own.contains_key(*key) && visible(versions, state).is_some());
        let stored = stored.next().map(|(key, versions)| (key, visible(versions, state).expect("filtered")));
        let own = own.range(range).rev().find_map(|(key, value)| value.as_ref().map(|value| (key, value)));
        let last = match (stored, own) {
            (Some(a), Some(b)) => Some(if a.0 > b.0 { a } else { b }),
            (a, b) => a.or(b),
        };
        last.map(|(key, value)| (key.1.clone(), value.clone()))
    }

    /// Everything in a state.
    pub(crate) fn contents(&self, state: usize) -> BTreeMap<Key, Vec<u8>> {
        let dropped = self.dropped(state);
        let live = self.versions.iter().filter(|(key, _)| !dropped.contains(&key.0));
        live.filter_map(|(key, versions)| Some((key.clone(), visible(versions, state)?.clone()))).collect()
    }

    /// Trees dropped up to a state.
    pub(crate) fn dropped(&self, state: usize) -> Vec<u32> {
        self.commits[..state].iter().flat_map(|commit| commit.drops.iter().copied()).collect()
    }

    /// Trees that the newest commit wrote to.
    pub(crate) fn newest_trees(&self) -> Vec<u32> {
        let writes = self.commits.iter().next_back().into_iter().flat_map(|commit| commit.writes.keys());
        let mut trees: Vec<u32> = writes.map(|(tree, _)| *tree).collect();
        trees.dedup();
        trees
    }

    /// Trees that any commit wrote to.
    pub(crate) fn trees(&self) -> Vec<u32> {
        let mut trees: Vec<u32> = self.versions.keys().map(|(tree, _)| *tree).collect();
        trees.dedup();
        trees
    }

    fn truncate(&mut self, state: usize) {
        for commit in self.commits.drain(state..).rev() {
            for key in commit.writes.keys() {
                let versions = self.versions.get_mut(key).expect("each write has a version");
                versions.pop();
                if versions.is_empty() {
                    self.versions.remove(key);
                }
            }
        }
    }
}

fn visible(versions: &[(usize, Option<Vec<u8>>)], state: usize) -> Option<&Vec<u8>> {
    versions.iter().rev().find(|(at, _)| *at <= state).and_then(|(_, value)| value.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(writes: &[(&str, Option<&str>)]) -> Commit {
        let writes =
            writes.iter().map(|(k, v)| ((1, k.as_bytes().to_vec()), v.map(|v| v.as_bytes().to_vec())));
        Commit { writes: writes.collect(), drops: Vec::new() }
    }

    #[test]
    fn a_history_reads_as_of_each_state_and_can_be_cut() {
        let mut history = History::default();
        for writes in [&[("a", Some("1")), ("b", Some("1"))][..], &[("a", None)], &[("c", Some("3"))]] {
            history.begin_commit(commit(writes));
            history.acknowledge();
        }
        let key = |k: &str| (1, k.as_bytes().to_vec());
        assert_eq!(history.get(&key("a"), 1), Some(&b"1".to_vec()));
        assert_eq!(history.get(&key("a"), 2), None);
        assert_eq!(history.newest(&key("a")), 2);
        assert_eq!(history.contents(3).len(), 2);
        let own = commit(&[("b", None), ("bb", Some("x"))]).writes;
        assert_eq!(history.after(1, Bound::Unbounded, 3, &own).map(|e| e.0), Some(b"bb".to_vec()));
        assert_eq!(history.before(1, Some(b"c"), 1, &Writes::new()).map(|e| e.0), Some(b"b".to_vec()));
        history.settle(1, 0);
        assert_eq!(history.contents(1).len(), 2);
        assert_eq!(history.get(&key("c"), 3), None);
    }
}
