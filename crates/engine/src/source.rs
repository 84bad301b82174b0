//! One sorted sequence of versions that can be walked both ways: a memtable, a write set, an sst, a level, a merge.
//!
//! Order: full key ascending, then seqno descending (newest first). A source shows every version that it has;
//! visibility is the cursor's affair.

use std::cmp::Ordering;

use crate::{OpKind, Result, Seqno};

/// Versions that are stepped over one by one before a seek is cheaper.
pub(crate) const STEPS_MAX: usize = 24;

/// A position in a sorted sequence of versions.
///
/// `key` and `value` stay valid until the source is moved. Moving an invalid source is a bug, except by a seek.
pub trait Source {
    /// Moves to the first version at or after (`key`, `seqno`): versions of `key` newer than `seqno` are passed over.
    fn seek(&mut self, key: &[u8], seqno: Seqno) -> Result<()>;
    /// Moves to the last version that sorts before every version of `key`.
    fn seek_before(&mut self, key: &[u8]) -> Result<()>;
    /// Moves to the next version in order.
    fn next(&mut self) -> Result<()>;
    /// Moves to the previous version in order.
    fn prev(&mut self) -> Result<()>;
    /// Whether it stands on a version.
    fn valid(&self) -> bool;
    /// Full key of the version it stands on.
    fn key(&self) -> &[u8];
    /// Seqno of the version it stands on.
    fn seqno(&self) -> Seqno;
    /// Kind of the version it stands on.
    fn kind(&self) -> OpKind;
    /// Value of the version it stands on; empty for a deletion.
    fn value(&self) -> &[u8];
    /// Both, for less than each in turn.
    #[inline]
    fn entry(&self) -> (&[u8], &[u8]) {
        (self.key(), self.value())
    }
    /// Whether its next step may pass over a version that came after it was positioned. Only a write set, whose
    /// owner goes on writing, is ever stale; a seek helps.
    fn stale(&self) -> bool {
        false
    }

    /// Moves to the first version of the next key.
    fn pass_key(&mut self) -> Result<()> {
        pass_by_steps(self)
    }
    /// What it stands on.
    ///
    /// # Panics
    /// If it stands on nothing.
    #[inline]
    fn standing(&self) -> Standing {
        let key = self.key();
        Standing { head: head(key), key_bytes: key.len(), seqno: self.seqno(), kind: self.kind() }
    }
    /// Moves, and notes in `on` what it stands on then. `false`: nothing.
    #[inline]
    fn go(&mut self, way: Way, on: &mut Standing) -> Result<bool> {
        match way {
            Way::Next => self.next()?,
            Way::Prev => self.prev()?,
            Way::PassKey => self.pass_key()?,
        }
        let valid = self.valid();
        if valid {
            *on = self.standing();
        }
        Ok(valid)
    }

    /// For how many steps forward it surely stands on keys below `key`, as far as that is told without reading anything.
    fn steps_before(&self, _key: &[u8]) -> usize {
        0
    }
    /// One of the steps that [`Source::steps_before`] counted, with no other move between; whether it led to another
    /// version of the same key.
    fn glide_step(&mut self) -> bool {
        unreachable!("steps_before counted nothing")
    }
    /// At most `most` of those steps, until one leads to a put that a reader at `at` sees; `passing`: older versions of
    /// the key that it stands on are of no interest, and afterwards the same of where it stands then.
    #[inline]
    fn glide(&mut self, most: usize, at: Seqno, passing: &mut bool) -> Glided {
        let mut dead = 0;
        for steps in 1..=most {
            *passing &= self.glide_step();
            if !*passing && !sees(at, self.seqno()) {
                continue;
            }
            if !*passing && self.kind() == OpKind::Put {
                *passing = true;
                return Glided { steps, found: true, dead };
            }
            *passing = true;
            dead += 1;
        }
        Glided { steps: most, found: false, dead }
    }
    /// Notes steps that a reader took in vain and that a merge of this source with others would spare the next one.
    #[inline]
    fn waste(&mut self, _steps: usize) {}
}

/// How [`Source::glide`] went.
#[derive(Clone, Copy, Debug)]
pub struct Glided {
    /// Steps taken.
    pub(crate) steps: usize,
    /// Whether the last one led to a put.
    pub(crate) found: bool,
    /// How many led to deletions and to older versions than one that the reader sees.
    pub(crate) dead: usize,
}

/// The seqno of own writes.
pub(crate) const OWN: Seqno = Seqno(u64::MAX);

/// Whether a reader at `at` sees a version, or it is its own.
#[inline]
pub(crate) fn sees(at: Seqno, seqno: Seqno) -> bool {
    seqno <= at || seqno == OWN
}

/// A move of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// [`Source::next`]
    Next,
    /// [`Source::prev`]
    Prev,
    /// [`Source::pass_key`]
    PassKey,
}

/// What a merge wants to know again and again of the version that a source stands on.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// The beginning of its key; it decides most comparisons.
    pub(crate) head: u128,
    pub(crate) key_bytes: usize,
    pub(crate) seqno: Seqno,
    pub(crate) kind: OpKind,
}

impl Standing {
    /// Before the first seek.
    pub(crate) const NOWHERE: Self = Self { head: 0, key_bytes: 0, seqno: Seqno(0), kind: OpKind::Delete };

    /// How the keys compare; `whole` compares all of both, if it comes to that.
    #[inline]
    pub(crate) fn cmp_key(&self, other: &Self, whole: impl FnOnce() -> Ordering) -> Ordering {
        match self.head.cmp(&other.head) {
            // Of two equal heads the shorter key, if that is all head, is the beginning of the other.
            Ordering::Equal if self.key_bytes.min(other.key_bytes) <= HEAD_BYTES => {
                self.key_bytes.cmp(&other.key_bytes)
            }
            Ordering::Equal => whole(),
            unequal => unequal,
        }
    }
}

/// Bytes of a key in its head.
const HEAD_BYTES: usize = 16;

/// The first bytes of a key as a number that sorts like them; zeros stand for what is not there.
#[inline]
pub(crate) fn head(key: &[u8]) -> u128 {
    let half = |bytes: &[u8; 8]| u128::from(u64::from_be_bytes(*bytes));
    match (key.first_chunk(), key.last_chunk()) {
        (Some(first), _) if key.len() >= HEAD_BYTES => {
            half(first) << 64 | key[8..].first_chunk().map_or(0, half)
        }
        // Both halves overlap: what the last eight bytes repeat is shifted out.
        (Some(first), Some(last)) => {
            let tail = (half(last) << (8 * (HEAD_BYTES - key.len()))) & u128::from(u64::MAX);
            half(first) << 64 | tail
        }
        _ => key.iter().enumerate().fold(0, |head, (at, &byte)| head | u128::from(byte) << (120 - 8 * at)),
    }
}

/// [`Source::pass_key`] for whoever knows no shorter way.
pub(crate) fn pass_by_steps(source: &mut (impl Source + ?Sized)) -> Result<()> {
    let key = source.key().to_vec();
    for _ in 0..STEPS_MAX {
        source.next()?;
        if !source.valid() || source.key() != key {
            return Ok(());
        }
    }
    source.seek(&key, Seqno(0))
}
