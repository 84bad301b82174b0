//! A transactional, ordered key-value store whose truth lives in a bucket. Read the modules in this order.
//!
//! Never here: SQL, MariaDB, Raft.

mod clock;
mod disk;
mod error;
pub mod limits;
mod source;
mod types;
mod version;

pub use clock::{Clock, SystemClock};
pub use disk::{Disk, DiskError, DiskFault, DiskFile, RealDisk, SimDisk};
pub use error::{Error, Kind, Result};
pub use types::{Epoch, OpKind, Seqno, SstId, TreeId, WalPosition, full_key, tree_of};
