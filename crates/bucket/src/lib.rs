//! The only door to object storage. Read the modules in this order.
//!
//! Never here: what the objects mean.

mod api;
pub mod name;

pub use api::{Bucket, BucketError, ErrorKind, Meters, ObjectInfo, OpMeter, PutOutcome};
pub use name::{Names, ObjectName};
