//! Names of chunks that went not long ago, after one read: what comes back while its name is here is wanted for good.

use std::collections::{BTreeSet, VecDeque};

use xxhash_rust::xxh3::xxh3_64;

use crate::SstId;

/// Memory for one of them.
pub(super) const GHOST_BYTES: usize = 32;

#[derive(Default)]
pub(super) struct Ghosts {
    /// Hashes: two chunks that share one do no harm.
    known: BTreeSet<u64>,
    /// Oldest first. What was taken is still in it until its time comes; if it was added again, it is forgotten then: too early, which costs a fetch at most.
    order: VecDeque<u64>,
}

impl Ghosts {
    /// The oldest are forgotten beyond `most`.
    pub(super) fn add(&mut self, id: SstId, chunk: u32, most: usize) {
        let ghost = hash(id, chunk);
        if self.known.insert(ghost) {
            self.order.push_back(ghost);
        }
        while self.order.len() > most
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }

    /// Whether it was here.
    pub(super) fn take(&mut self, id: SstId, chunk: u32) -> bool {
        self.known.remove(&hash(id, chunk))
    }

    pub(super) fn len(&self) -> usize {
        self.order.len()
    }
}

fn hash(id: SstId, chunk: u32) -> u64 {
    let mut name = [0; 20];
    name[..8].copy_from_slice(&id.epoch.0.to_le_bytes());
    name[8..16].copy_from_slice(&id.counter.to_le_bytes());
    name[16..].copy_from_slice(&chunk.to_le_bytes());
    xxh3_64(&name)
}
