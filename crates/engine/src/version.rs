//! The tree of runs at one moment: immutable, shared by readers without a lock.
//!
//! * L0 holds runs newest first; runs overlap, the ssts inside one run do not.
//! * From L1 down a level is one run, sorted by first key; an sst there holds a single tree.
//! * Every version of a key in a shallower place is newer than every version of it in a deeper one.

use std::sync::Arc;

use crate::limits::LEVELS;
use crate::{Seqno, SstId};

/// What the manifest knows of an sst. Immutable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SstMeta {
    /// Its name.
    pub id: SstId,
    /// Length of the object.
    pub bytes: u64,
    /// Versions in it.
    pub entries: u64,
    /// Of these, deletions.
    pub tombstones: u64,
    /// Full key of its first version.
    pub first_key: Box<[u8]>,
    /// Full key of its last version.
    pub last_key: Box<[u8]>,
    /// Least seqno in it.
    pub seqno_min: Seqno,
    /// Greatest seqno in it.
    pub seqno_max: Seqno,
}

/// Ssts sorted by key that do not overlap.
pub type Run = Arc<[Arc<SstMeta>]>;

/// The tree of runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Version {
    /// Newest first.
    pub l0: Vec<Run>,
    /// `levels[0]` is L1.
    pub levels: [Run; LEVELS - 1],
}
