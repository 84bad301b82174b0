//! What is kept near: decoded blocks in memory, pieces of objects on the local disk.
//!
//! Never here: what a block means, when an object is wanted.

mod memory;

pub(crate) use memory::{BlockCache, BlockCacheStatus, Held, Slots};
