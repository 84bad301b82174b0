//! The only door to object storage. Read the modules in this order.
//!
//! Never here: what the objects mean.

mod api;
mod directory;
mod faults;
mod faulty;
mod memory;
pub mod name;
mod open;
#[cfg(feature = "s3")]
mod s3;
#[cfg(feature = "testkit")]
pub mod testkit;

pub use api::{Bucket, BucketError, ErrorKind, Meters, ObjectInfo, OpMeter, PutOutcome};
pub use directory::DirectoryBucket;
pub use faults::{Decision, Effect, Faults, Operation, Request, Rule, When};
pub use faulty::{FaultyBucket, Pause};
pub use memory::MemoryBucket;
pub use name::{Names, ObjectName};
pub use open::{Environment, Options, open};
