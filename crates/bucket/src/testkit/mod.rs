//! The HTTP face of the fault-injecting twin, for tests of the real S3 client and the real server. Never shipped: behind the
//! feature `testkit`.

mod http;
mod proxy;
mod s3;

pub use proxy::{Behind, FaultyServer};
pub use s3::{Keys, S3OverBucket};
