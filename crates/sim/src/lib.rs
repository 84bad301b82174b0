//! Whole-engine simulation: one thread, one seed, virtual time, disks that forget and a bucket that goes wrong. Read the
//! modules in this order.
//!
//! Never here: code that ships.

mod client;
mod gate;
mod machine;
mod model;
mod plan;
mod process;
mod random;
mod world;

pub use machine::Counters;
pub use plan::{Options, Planted};
pub use world::{Report, simulate};
