//! One transaction beside its model: each call is made on both, and the answers must agree.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use engine::{
    Cursor, Engine, Error, Granted, Isolation, Kind, Loaded, LockMode, LockWait, Mark, ReadAs, TreeId, Txn,
};
use parking_lot::Mutex;

use crate::machine::Check;
use crate::model::{Commit, History, Key, Writes};
use crate::random::Random;

/// What a call came to when it did not break a promise.
pub(crate) enum Outcome {
    Fine,
    /// The engine answered an error; whether it may is for the process to judge.
    Error(Error),
}

/// An open transaction and what it must see.
pub(crate) struct Client {
    pub(crate) txn: Txn,
    history: Arc<Mutex<History>>,
    isolation: Isolation,
    snapshot: Option<usize>,
    writes: Writes,
    drops: Vec<u32>,
    marks: Vec<(Mark, Writes, Vec<u32>)>,
    pub(crate) locks: BTreeMap<Key, LockMode>,
    /// Trees it has touched in any way.
    pub(crate) trees: Vec<u32>,
    cursor: Option<OpenCursor>,
}

struct OpenCursor {
    cursor: Cursor,
    tree: u32,
    state: usize,
    stands_on: Option<Vec<u8>>,
}

impl Client {
    pub(crate) fn new(engine: &Arc<Engine>, history: &Arc<Mutex<History>>, random: &mut Random) -> Self {
        let mut client = Self {
            txn: engine.begin(),
            history: Arc::clone(history),
            isolation: Isolation::RepeatableRead,
            snapshot: None,
            writes: Writes::new(),
            drops: Vec::new(),
            marks: Vec::new(),
            locks: BTreeMap::new(),
            trees: Vec::new(),
            cursor: None,
        };
        client.begin(random);
        client
    }

    /// Starts a transaction in an object that is new or has ended one.
    pub(crate) fn begin(&mut self, random: &mut Random) {
        self.isolation = random.pick(&[Isolation::RepeatableRead, Isolation::ReadCommitted]);
        self.txn.set_isolation(self.isolation);
        if random.one_in(4) {
            self.txn.snapshot_now();
            self.snapshot = Some(self.history.lock().acknowledged());
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.drops.is_empty()
    }

    pub(crate) fn drops(&self) -> &[u32] {
        &self.drops
    }

    pub(crate) fn statement(&mut self) {
        self.txn.statement_begin();
        if self.isolation == Isolation::ReadCommitted {
            self.snapshot = None;
        }
    }

    pub(crate) fn get(&mut self, key: &Key, read: ReadAs) -> Check<Outcome> {
        self.touch(key.0);
        let state = self.state(read);
        let got = match self.txn.get(TreeId(key.0), &key.1, read, <[u8]>::to_vec) {
            Ok(got) => got,
            Err(error) => return Ok(Outcome::Error(error)),
        };
        let history = self.history.lock();
        let want = self.writes.get(key).map_or_else(|| history.get(key, state), Option::as_ref);
        if got.as_ref() != want {
            let (got, want) = (show(got.as_ref()), show(want));
            return Err(format!(
                "get {} {read:?} in state {state}: {got}, and it must be {want}",
                show_key(key)
            ));
        }
        Ok(Outcome::Fine)
    }

    /// Locks a key; `others`: what other transactions hold.
    pub(crate) fn lock(&mut self, key: &Key, mode: LockMode, others: &[LockMode]) -> Check<Option<Outcome>> {
        self.touch(key.0);
        let held = self.locks.get(key).copied();
        let enough = held == Some(LockMode::Exclusive) || held == Some(mode);
        let taken = !enough
            && (others.contains(&LockMode::Exclusive) || (mode == LockMode::Exclusive && !others.is_empty()));
        let changed = held.is_none()
            && self.isolation == Isolation::RepeatableRead
            && self.snapshot.is_some_and(|snapshot| self.history.lock().newest(key) > snapshot);
        let answer = self.txn.lock(TreeId(key.0), &key.1, mode, &LockWait::NOT_AT_ALL);
        let wrong = |got: &str, want: &str| {
            Err(format!("lock {} {mode:?}: {got}, and it must be {want}", show_key(key)))
        };
        match answer {
            Ok(_) if taken => wrong("granted", "refused: another transaction holds it"),
            Ok(_) if changed => wrong("granted", "a conflict: the row changed after the snapshot"),
            Ok(Granted::New) if held.is_some() => wrong("new", "held"),
            Ok(Granted::Held) if held.is_none() => wrong("held", "new"),
            Ok(_) => {
                if !enough {
                    self.locks.insert(key.clone(), mode);
                }
                Ok(None)
            }
            Err(error) => match error.kind() {
                Kind::LockTimeout | Kind::Deadlock if taken => Ok(Some(Outcome::Fine)),
                Kind::Conflict if changed && !taken => Ok(Some(Outcome::Fine)),
                Kind::LockTimeout | Kind::Deadlock => wrong(&error.to_string(), "granted"),
                _ => Ok(Some(Outcome::Error(error))),
            },
        }
    }

    /// Gives a lock back that no write needs.
    pub(crate) fn unlock(&mut self, key: &Key) {
        if !self.writes.contains_key(key) && self.marks.is_empty() {
            self.txn.unlock(TreeId(key.0), &key.1);
            self.locks.remove(key);
        }
    }

    /// Writes a key whose exclusive lock it holds.
    pub(crate) fn write(&mut self, key: &Key, value: Option<Vec<u8>>) -> Check<Outcome> {
        let tree = TreeId(key.0);
        let answer = match &value {
            Some(value) => self.txn.put(tree, &key.1, value),
            None => self.txn.delete(tree, &key.1),
        };
        match answer {
            Ok(()) => _ = self.writes.insert(key.clone(), value),
            Err(error) => return Ok(Outcome::Error(error)),
        }
        Ok(Outcome::Fine)
    }

    /// To be committed at once: what is loaded is not among its own writes before that.
    pub(crate) fn add_loaded(&mut self, loaded: Loaded, rows: BTreeMap<Key, Vec<u8>>) -> Outcome {
        match self.txn.add_loaded(loaded) {
            Ok(()) => self.writes.extend(rows.into_iter().map(|(key, value)| (key, Some(value)))),
            Err(error) => return Outcome::Error(error),
        }
        Outcome::Fine
    }

    pub(crate) fn drop_tree(&mut self, tree: u32) {
        self.touch(tree);
        self.txn.drop_tree(TreeId(tree));
        self.drops.push(tree);
    }

    pub(crate) fn mark(&mut self) {
        self.marks.push((self.txn.mark(), self.writes.clone(), self.drops.clone()));
    }

    pub(crate) fn rollback_to_some_mark(&mut self, random: &mut Random) {
        if self.marks.is_empty() {
            return;
        }
        self.marks.truncate(random.index(self.marks.len()) + 1);
        let (mark, writes, drops) = self.marks.last().cloned().expect("one is left");
        self.txn.rollback_to(mark);
        (self.writes, self.drops) = (writes, drops);
    }

    pub(crate) fn rollback(&mut self) {
        self.txn.rollback();
        self.clear();
    }

    /// The commit, begun in the history; the caller settles its outcome.
    pub(crate) fn commit(&mut self) -> engine::Result<engine::Seqno> {
        if !self.is_empty() {
            let commit = Commit { writes: self.writes.clone(), drops: self.drops.clone() };
            self.history.lock().begin_commit(commit);
        }
        let answer = self.txn.commit();
        self.clear();
        answer
    }

    fn clear(&mut self) {
        self.snapshot = None;
        self.writes.clear();
        self.drops.clear();
        self.marks.clear();
        self.locks.clear();
        self.trees.clear();
        self.cursor = None;
    }

    /// Whether it has a cursor open in `tree`, or at all.
    pub(crate) fn cursor_tree(&self) -> Option<u32> {
        self.cursor.as_ref().map(|cursor| cursor.tree)
    }

    pub(crate) fn close_cursor(&mut self) {
        self.cursor = None;
    }

    pub(crate) fn open_cursor(&mut self, engine: &Arc<Engine>, tree: u32, read: ReadAs) -> Check<Outcome> {
        self.touch(tree);
        let state = self.state(read);
        let mut cursor = self.cursor.take().map_or_else(|| Cursor::new(engine), |open| open.cursor);
        match cursor.open(&mut self.txn, TreeId(tree), read) {
            Ok(()) => self.cursor = Some(OpenCursor { cursor, tree, state, stands_on: None }),
            Err(error) => return Ok(Outcome::Error(error)),
        }
        Ok(Outcome::Fine)
    }

    /// Moves the cursor and compares what it stands on: a seek if it stands on nothing, else a step `forward` or back.
    pub(crate) fn move_cursor(
        &mut self,
        forward: bool,
        seek: bool,
        near: &[u8],
        random: &mut Random,
    ) -> Check<Outcome> {
        let Some(open) = &mut self.cursor else { return Ok(Outcome::Fine) };
        let (tree, state) = (open.tree, open.state);
        let history = Arc::clone(&self.history);
        let after = |from| history.lock().after(tree, from, state, &self.writes);
        let before = |before| history.lock().before(tree, before, state, &self.writes);
        let from = open.stands_on.clone().filter(|_| !seek);
        let (what, want, moved) = match (&from, forward) {
            (Some(key), true) => ("next", after(Bound::Excluded(key)), open.cursor.next(&mut self.txn)),
            (Some(key), false) => ("prev", before(Some(key)), open.cursor.prev(&mut self.txn)),
            (None, true) => match random.below(3) {
                0 => ("seek_first", after(Bound::Unbounded), open.cursor.seek_first(&mut self.txn)),
                1 => ("seek", after(Bound::Included(near)), open.cursor.seek(&mut self.txn, near)),
                _ => {
                    ("seek_after", after(Bound::Excluded(near)), open.cursor.seek_after(&mut self.txn, near))
                }
            },
            (None, false) => match random.below(2) {
                0 => ("seek_last", before(None), open.cursor.seek_last(&mut self.txn)),
                _ => ("seek_before", before(Some(near)), open.cursor.seek_before(&mut self.txn, near)),
            },
        };
        let got = match moved {
            Ok(true) => Some((open.cursor.key().to_vec(), open.cursor.value().to_vec())),
            Ok(false) => None,
            Err(error) => {
                self.cursor = None;
                return Ok(Outcome::Error(error));
            }
        };
        if got != want {
            let text = |entry: &Option<(Vec<u8>, Vec<u8>)>| {
                entry
                    .as_ref()
                    .map_or("nothing".to_owned(), |(k, v)| format!("{} {}", show_bytes(k), show(Some(v))))
            };
            let place = from.map_or_else(|| show_bytes(near), |key| show_bytes(&key));
            let (got, want) = (text(&got), text(&want));
            return Err(format!("{what} from {tree}:{place} in state {state}: {got}, and it must be {want}"));
        }
        open.stands_on = got.map(|(key, _)| key);
        Ok(Outcome::Fine)
    }

    fn state(&mut self, read: ReadAs) -> usize {
        let newest = self.history.lock().acknowledged();
        match read {
            ReadAs::Newest => newest,
            ReadAs::Snapshot => *self.snapshot.get_or_insert(newest),
        }
    }

    fn touch(&mut self, tree: u32) {
        if !self.trees.contains(&tree) {
            self.trees.push(tree);
        }
    }
}

pub(crate) fn show(value: Option<&Vec<u8>>) -> String {
    value.map_or("nothing".to_owned(), |value| match value.len() {
        0..=24 => show_bytes(value),
        len => format!("{}… ({len} bytes)", show_bytes(&value[..16])),
    })
}

pub(crate) fn show_key(key: &Key) -> String {
    format!("{}:{}", key.0, show_bytes(&key.1))
}

fn show_bytes(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes.escape_ascii())
}
