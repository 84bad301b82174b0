//! What is kept near: decoded blocks in memory, pieces of objects on the local disk.
//!
//! Never here: what a block means, when an object is wanted.

mod disk;
mod memory;

pub(crate) use disk::{
    COPIES, DiskCache, DiskCacheStatus, Lookup, bytes_known_in, chunk_at, chunk_range, chunks_of,
};
pub(crate) use memory::{BlockCache, BlockCacheStatus, Held, Loan, Slots};
