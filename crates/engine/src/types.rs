//! The numbers of the engine, each a type of its own so that they can not mix, and the shape of a key.

use std::fmt;

/// Names one ordered key space: one SQL index, or the catalogue. Never used twice in the life of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TreeId(pub u32);

/// Order of commits. All writes of one transaction carry the same one; 0 is before the first commit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Seqno(pub u64);

/// A writer's term. A higher one fences every lower one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// Offset in bytes in the wal, counted over the whole life of the bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalPosition(pub u64);

/// A random name that a branch gets with its first manifest and keeps: data of another bucket is not mistaken for its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BranchId(pub [u8; 16]);

/// Names one sst, for ever: the epoch of its writer and a count within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SstId {
    /// Who wrote it.
    pub epoch: Epoch,
    /// Which of that writer's it is.
    pub counter: u64,
}

impl fmt::Display for SstId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sst {:x}-{:x}", self.epoch.0, self.counter)
    }
}

/// What a version of a key says. Stored in wal and sst: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum OpKind {
    /// The key has a value.
    Put = 1,
    /// The key is gone.
    Delete = 2,
}

impl OpKind {
    /// The kind stored as `tag`, if there is one.
    pub fn from_tag(tag: u8) -> Option<Self> {
        match tag {
            1 => Some(Self::Put),
            2 => Some(Self::Delete),
            _ => None,
        }
    }
}

/// A *full key* is what every module below the cursor sees: the tree, big-endian, then the caller's bytes.
/// Versions of one full key sort by descending seqno.
pub fn full_key(tree: TreeId, key: &[u8]) -> Vec<u8> {
    let mut full = Vec::with_capacity(4 + key.len());
    full.extend_from_slice(&tree.0.to_be_bytes());
    full.extend_from_slice(key);
    full
}

/// The tree that a full key belongs to.
///
/// # Panics
/// If `full` is shorter than a tree id; full keys are made by [`full_key`] or checked where they are decoded.
pub fn tree_of(full: &[u8]) -> TreeId {
    TreeId(u32::from_be_bytes(full[..4].try_into().expect("a full key starts with four bytes of tree id")))
}
