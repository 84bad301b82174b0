//! One sorted sequence of versions that can be walked both ways: a memtable, a write set, an sst, a level, a merge.
//!
//! Order: full key ascending, then seqno descending (newest first). A source shows every version that it has;
//! visibility is the cursor's affair.

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
    /// Whether its next step may pass over a version that came after it was positioned. Only a write set, whose
    /// owner goes on writing, is ever stale; a seek helps.
    fn stale(&self) -> bool {
        false
    }

    /// Moves to the first version of the next key.
    fn pass_key(&mut self) -> Result<()> {
        pass_by_steps(self)
    }
    /// For how many steps forward it surely stands on keys below `key`, as far as that is told without reading anything.
    fn steps_before(&self, _key: &[u8]) -> usize {
        0
    }
    /// One of the steps that [`Source::steps_before`] counted, with no other move between; whether it led to another
    /// version of the same key.
    fn glide(&mut self) -> bool {
        unreachable!("steps_before counted nothing")
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
