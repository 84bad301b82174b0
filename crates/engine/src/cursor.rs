//! Walks the visible entries of one tree, both ways, merged with the transaction's own writes.
//!
//! * A cursor sees what its transaction wrote before each step, also since the step before.
//! * It reads one view at one seqno from `open` to `close`, whatever is flushed or compacted meanwhile.
//! * Moving off the end leaves it on nothing; then only a seek is of use.
//! * After a seek within a prefix the runs that hold nothing of it are left out. A step that leaves the prefix takes them in again.
//! * A step forward copies nothing. A step back copies key and value: of several versions the visible one is known only
//!   when the next has been seen.

use std::sync::Arc;

use crate::engine::Engine;
use crate::first_part::{Probe, successor_into};
use crate::merge::{AnySource, Merge};
use crate::source::{OWN, STEPS_MAX, Source, head, sees};
use crate::txn::{ReadAs, Txn};
use crate::view::View;
use crate::{Error, Kind, OpKind, Result, Seqno, TreeId, tree_of};

/// A place in one tree. Use it with the transaction it was opened with.
pub struct Cursor {
    engine: Arc<Engine>,
    open: Option<Open>,
    /// The own writes first: they are the newest.
    merge: Merge<AnySource>,
    place: Place,
    within: Within,
    /// Tree id and key that a seek goes to, and on the way back of the entry it stands on.
    key: Vec<u8>,
    /// Its value, on the way back.
    value: Vec<u8>,
}

struct Open {
    /// Keeps what `merge` reads from being deleted.
    view: Arc<View>,
    tree: TreeId,
    prefix: [u8; 4],
    /// The first key behind the tree.
    end: [u8; 4],
    /// Heads of both.
    head: u128,
    end_head: u128,
    at: Seqno,
    /// `Txn::round` that the own writes belong to.
    round: u64,
    /// The transaction has dropped the tree.
    dropped: bool,
}

/// If it is `on`, the last seek was only for keys that start with `prefix`; as in [`Probe`]. Its memory is used again.
#[derive(Default)]
struct Within {
    on: bool,
    prefix: Vec<u8>,
    /// The first key behind them.
    end: Vec<u8>,
    /// Heads of both.
    head: u128,
    end_head: u128,
    hash: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Nothing,
    /// `merge` stands on the entry.
    Forward,
    /// `merge` stands before all versions of the entry.
    Backward,
}

impl Cursor {
    /// A closed cursor.
    pub fn new(engine: &Arc<Engine>) -> Self {
        Self {
            engine: Arc::clone(engine),
            open: None,
            merge: Merge::new(),
            place: Place::Nothing,
            within: Within::default(),
            key: Vec::new(),
            value: Vec::new(),
        }
    }

    /// Opens it on `tree`. It stands on nothing until a seek. [`ReadAs::Newest`] is as of this call: a row whose lock
    /// is waited for afterwards is read again with [`Txn::get`]. Open on the same tree as of the same snapshot, it goes on reading the
    /// view that it has.
    pub fn open(&mut self, txn: &mut Txn, tree: TreeId, read: ReadAs) -> Result<()> {
        if read == ReadAs::Snapshot && self.is_open_on(txn, tree) {
            self.place = Place::Nothing;
            return Ok(());
        }
        let (view, at) = txn.view_at(read);
        let end = tree.0.checked_add(1).expect("tree ids stay below 2^32 - 1").to_be_bytes();
        let prefix = tree.0.to_be_bytes();
        let (head, end_head) = (head(&prefix), head(&end));
        let (round, dropped) = (txn.round(), false);
        self.open = Some(Open { view, tree, prefix, end, head, end_head, at, round, dropped });
        self.collect_sources(txn)
    }

    /// Whether opening it on `tree` again, as of the snapshot, would show just what it shows: a statement that reads many ranges opens
    /// it for each.
    fn is_open_on(&self, txn: &mut Txn, tree: TreeId) -> bool {
        let Some(open) = &self.open else { return false };
        open.tree == tree && open.at == txn.snapshot_seqno() && open.dropped == txn.drops().contains(&tree)
    }

    /// To the first entry at or after `key`. `false`: there is none.
    pub fn seek(&mut self, txn: &mut Txn, key: &[u8]) -> Result<bool> {
        self.set_key(key)?;
        self.seek_forward(txn, OWN)
    }

    /// To the first entry strictly after `key`.
    pub fn seek_after(&mut self, txn: &mut Txn, key: &[u8]) -> Result<bool> {
        self.set_key(key)?;
        self.seek_forward(txn, Seqno(0))
    }

    /// To the last entry strictly before `key`.
    pub fn seek_before(&mut self, txn: &mut Txn, key: &[u8]) -> Result<bool> {
        self.set_key(key)?;
        self.seek_backward(txn)
    }

    /// To the first entry that starts with `prefix`. Cheaper than [`Cursor::seek`] where few runs hold one.
    pub fn seek_within(&mut self, txn: &mut Txn, prefix: &[u8]) -> Result<bool> {
        self.set_key(prefix)?;
        self.stay_within();
        self.seek_forward(txn, OWN)
    }

    /// To the last entry that starts with `prefix`.
    pub fn seek_last_within(&mut self, txn: &mut Txn, prefix: &[u8]) -> Result<bool> {
        self.set_key(prefix)?;
        self.stay_within();
        self.key.clone_from(&self.within.end);
        self.seek_backward(txn)
    }

    /// To the first entry of the tree.
    pub fn seek_first(&mut self, txn: &mut Txn) -> Result<bool> {
        self.seek(txn, &[])
    }

    /// To the last entry of the tree.
    pub fn seek_last(&mut self, txn: &mut Txn) -> Result<bool> {
        let end = self.opened()?.end;
        self.key.clear();
        self.key.extend_from_slice(&end);
        self.within.on = false;
        self.seek_backward(txn)
    }

    /// To the next entry. Not allowed while it stands on nothing.
    #[inline]
    pub fn next(&mut self, txn: &mut Txn) -> Result<bool> {
        let found = self.next_within(txn)?;
        if found || !self.within.on { Ok(found) } else { self.leave_forward(txn) }
    }

    /// To the next entry, unless the last seek was within a prefix that it has not.
    #[inline]
    pub fn next_within(&mut self, txn: &mut Txn) -> Result<bool> {
        if self.place != Place::Forward || self.opened()?.round != txn.round() {
            self.remember_key()?;
            return self.seek_forward(txn, Seqno(0));
        }
        let open = self.open.as_ref().expect("seen above");
        let merge = &mut self.merge;
        // While one source is alone ahead. `passing`: older versions of the key it stands on are of no interest.
        let mut passing = true;
        if merge.glide(open.at, &mut passing) {
            return Ok(true);
        }
        self.place = Place::Nothing;
        if passing {
            merge.pass_key()?
        } else {
            merge.next()?
        }
        self.settle_forward()
    }

    /// Passes at most `most` entries, and says how many: if fewer, there were no more and it stands on nothing.
    pub fn skip(&mut self, txn: &mut Txn, most: u64) -> Result<u64> {
        for passed in 0..most {
            if !self.next(txn)? {
                return Ok(passed);
            }
        }
        Ok(most)
    }

    /// To the previous entry. Not allowed while it stands on nothing.
    pub fn prev(&mut self, txn: &mut Txn) -> Result<bool> {
        let found = self.prev_within(txn)?;
        if found || !self.within.on { Ok(found) } else { self.leave_backward(txn) }
    }

    /// To the previous entry, unless the last seek was within a prefix that it has not.
    pub fn prev_within(&mut self, txn: &mut Txn) -> Result<bool> {
        if self.place != Place::Backward || self.opened()?.round != txn.round() || self.merge.stale() {
            self.remember_key()?;
            return self.seek_backward(txn);
        }
        self.settle_backward()
    }

    /// Key of the entry it stands on, without the tree id. Valid until it moves.
    ///
    /// # Panics
    /// If it stands on nothing.
    #[inline]
    pub fn key(&self) -> &[u8] {
        match self.place {
            Place::Nothing => panic!("the cursor stands on nothing"),
            Place::Forward => &self.merge.key()[4..],
            Place::Backward => &self.key[4..],
        }
    }

    /// Value of the entry it stands on. Valid until it moves.
    ///
    /// # Panics
    /// If it stands on nothing.
    #[inline]
    pub fn value(&self) -> &[u8] {
        match self.place {
            Place::Nothing => panic!("the cursor stands on nothing"),
            Place::Forward => self.merge.value(),
            Place::Backward => &self.value,
        }
    }

    /// Key and value of the entry it stands on, for less than each in turn.
    ///
    /// # Panics
    /// If it stands on nothing.
    #[inline]
    pub fn entry(&self) -> (&[u8], &[u8]) {
        match self.place {
            Place::Nothing => panic!("the cursor stands on nothing"),
            Place::Forward => {
                let (key, value) = self.merge.entry();
                (&key[4..], value)
            }
            Place::Backward => (&self.key[4..], &self.value),
        }
    }

    /// To the first entry after those of the prefix.
    #[cold]
    fn leave_forward(&mut self, txn: &Txn) -> Result<bool> {
        self.within.on = false;
        self.key.clone_from(&self.within.end);
        self.seek_forward(txn, OWN)
    }

    /// To the last entry before those of the prefix.
    #[cold]
    fn leave_backward(&mut self, txn: &Txn) -> Result<bool> {
        self.within.on = false;
        self.key.clone_from(&self.within.prefix);
        self.seek_backward(txn)
    }

    /// Lets go of the data it reads from. A cursor that stays open keeps old data in memory and in the bucket.
    pub fn close(&mut self) {
        self.place = Place::Nothing;
        self.merge.charge();
        self.merge.clear();
        self.open = None;
    }

    fn opened(&self) -> Result<&Open> {
        self.open.as_ref().ok_or_else(|| Error::new(Kind::Bug, "a closed cursor was moved"))
    }

    /// So that a seek can start from the entry it stands on.
    fn remember_key(&mut self) -> Result<()> {
        match self.place {
            Place::Nothing => return Err(Error::new(Kind::Bug, "a cursor that stands on nothing was moved")),
            Place::Forward => {
                self.key.clear();
                self.key.extend_from_slice(self.merge.key());
            }
            Place::Backward => (),
        }
        Ok(())
    }

    fn set_key(&mut self, key: &[u8]) -> Result<()> {
        let prefix = self.opened()?.prefix;
        self.key.clear();
        self.key.extend_from_slice(&prefix);
        self.key.extend_from_slice(key);
        self.within.on = false;
        Ok(())
    }

    /// The key is a prefix that a seek is for.
    fn stay_within(&mut self) {
        let within = &mut self.within;
        within.on = true;
        within.prefix.clone_from(&self.key);
        successor_into(&self.key, &mut within.end);
        (within.head, within.end_head) = (head(&within.prefix), head(&within.end));
        within.hash = self.engine.store.first_parts().probe(&self.key).hash;
    }

    fn collect_sources(&mut self, txn: &Txn) -> Result<()> {
        self.place = Place::Nothing;
        self.merge.charge();
        self.merge.clear();
        let open = self.open.as_mut().expect("a cursor collects sources while it is open");
        open.dropped = txn.drops().contains(&open.tree);
        self.merge.add(AnySource::WriteSet(txn.writes.iter_tree(open.tree)));
        if !open.dropped {
            open.view.add_sources(&self.engine.store, open.tree, &mut self.merge);
        }
        Ok(())
    }

    /// If the transaction has ended since, its writes are no longer own ones, and it may have new ones.
    fn refresh_own(&mut self, txn: &Txn) -> Result<()> {
        let round = txn.round();
        if self.opened()?.round != round {
            self.collect_sources(txn)?;
            self.open.as_mut().expect("seen above").round = round;
        }
        Ok(())
    }

    /// To the first entry after `self.key`, or on it if `passing` is [`OWN`].
    fn seek_forward(&mut self, txn: &Txn, passing: Seqno) -> Result<bool> {
        self.refresh_own(txn)?;
        self.place = Place::Nothing;
        merge_seek(&mut self.merge, &self.within, &self.key, passing)?;
        self.settle_forward()
    }

    /// To the last entry before `self.key`.
    fn seek_backward(&mut self, txn: &Txn) -> Result<bool> {
        self.refresh_own(txn)?;
        self.place = Place::Nothing;
        match self.within.on {
            true => self.merge.seek_before_within(&self.key, &self.within.probe())?,
            false => self.merge.seek_before(&self.key)?,
        }
        self.settle_backward()
    }

    /// From any version forward to the first that is visible and a put. Versions of its key that are older than one that
    /// was passed are not ahead any more.
    #[inline]
    fn settle_forward(&mut self) -> Result<bool> {
        let (merge, within) = (&mut self.merge, &self.within);
        let open = self.open.as_ref().expect("a cursor moves while it is open");
        // Nothing before the prefix is ahead, and most heads tell that their keys are not behind it.
        let end = if within.on { within.end_head } else { open.end_head };
        let mut unseen = 0;
        while let Some(on) = merge.stands_on() {
            if on.head >= end && !open.holds(within, merge.key()) {
                break;
            }
            if sees(open.at, on.seqno) {
                if on.kind == OpKind::Put {
                    self.place = Place::Forward;
                    merge.look_ahead(if within.on { &within.end } else { &open.end });
                    return Ok(true);
                }
                merge.waste_one();
                merge.pass_key()?;
                unseen = 0;
                continue;
            }
            unseen += 1;
            if unseen < STEPS_MAX {
                merge.next()?;
                continue;
            }
            unseen = 0;
            // An own write of this key would have come first.
            self.key.clear();
            self.key.extend_from_slice(merge.key());
            merge_seek(merge, within, &self.key, open.at)?;
        }
        Ok(false)
    }

    /// From the last version of a key backward to the visible put of it, or of a key before it. Afterwards `merge`
    /// stands before all versions of that key.
    fn settle_backward(&mut self) -> Result<bool> {
        self.place = Place::Nothing;
        let (merge, key, value, within) = (&mut self.merge, &mut self.key, &mut self.value, &self.within);
        let open = self.open.as_ref().expect("a cursor moves while it is open");
        while let Some(on) = merge.stands_on() {
            let of = *on;
            // As on the way forward: nothing behind the prefix is ahead.
            if of.head <= if within.on { within.head } else { open.head } && !open.holds(within, merge.key())
            {
                break;
            }
            key.clear();
            key.extend_from_slice(merge.key());
            let mut found = OpKind::Delete;
            let mut steps = 0;
            while let Some(on) = merge.stands_on() {
                if on.cmp_key(&of, || merge.key().cmp(key)).is_ne() {
                    break;
                }
                if sees(open.at, on.seqno) {
                    found = on.kind;
                    value.clear();
                    value.extend_from_slice(merge.value());
                }
                steps += 1;
                if steps < STEPS_MAX {
                    merge.prev()?;
                    continue;
                }
                // So many versions that it is cheaper to look for the visible one from the other side.
                merge.seek(key, OWN)?;
                if merge.seqno() != OWN {
                    merge.seek(key, open.at)?;
                }
                if merge.valid() && merge.key() == key.as_slice() {
                    found = merge.kind();
                    value.clear();
                    value.extend_from_slice(merge.value());
                }
                merge.seek_before(key)?;
                break;
            }
            if found == OpKind::Put {
                self.place = Place::Backward;
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Seeks in all sources, or in those that hold something of the prefix.
fn merge_seek(merge: &mut Merge<AnySource>, within: &Within, key: &[u8], seqno: Seqno) -> Result<()> {
    match within.on {
        true => merge.seek_within(key, seqno, &within.probe()),
        false => merge.seek(key, seqno),
    }
}

impl Within {
    fn probe(&self) -> Probe<'_> {
        Probe { prefix: &self.prefix, tree: tree_of(&self.prefix), hash: self.hash }
    }
}

impl Open {
    /// Whether the cursor is to see this key.
    #[inline]
    fn holds(&self, within: &Within, key: &[u8]) -> bool {
        key.starts_with(if within.on { &within.prefix } else { &self.prefix[..] })
    }
}
