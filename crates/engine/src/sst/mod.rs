//! Sorted versions to immutable bytes, and back. Read the modules in this order.
//!
//! Never here: levels, the bucket, clocks. Bytes arrive from a [`ByteSource`](crate::store::ByteSource) or as
//! slices. The bytes themselves are described in `docs/formats/sst.md`.

mod block;
mod builder;
mod describe;
mod filter;
pub(crate) mod format;
mod iter;
mod measured;
mod reader;
#[cfg(test)]
mod tests;
mod window;

pub(crate) use builder::{SstBuilder, SstOptions};
pub(crate) use describe::describe;
pub(crate) use filter::hash;
pub(crate) use iter::estimate;
pub use iter::{LevelIter, SstIter};
pub use measured::{MeasuredBlock, MeasuredFilter, MeasuredSst};
pub(crate) use reader::{Piece, Purpose, Reach, Sst, find_in_run, tail_range, verify};
