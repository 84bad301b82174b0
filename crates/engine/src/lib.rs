//! A transactional, ordered key-value store whose truth lives in a bucket. ARCHITECTURE.md has the order
//! in which to read the modules; `engine` comes first.
//!
//! Never here: SQL, MariaDB, Raft.

mod background;
mod cache;
mod claim;
mod clock;
mod commit;
mod compaction;
mod cursor;
mod disk;
mod engine;
mod error;
mod fetch;
mod first_part;
mod gc;
mod heat;
mod inspect;
pub mod limits;
mod load;
mod locks;
mod manifest;
mod memtable;
mod merge;
pub mod points;
mod prefetch;
mod pulse;
mod quiet;
mod recovery;
mod reload;
mod replay;
mod settings;
mod snapshots;
mod sorter;
mod source;
mod sst;
mod status;
mod store;
mod throttle;
mod tree;
mod txn;
mod types;
mod version;
mod view;
mod wal;
mod writeset;

pub use clock::{Clock, SystemClock};
pub use cursor::Cursor;
pub use disk::{Disk, DiskError, DiskFault, DiskFile, RealDisk, SimDisk};
pub use engine::{Engine, Estimate, FIRST_ALLOCATED_TREE, Job, Parts};
pub use error::{Error, Kind, Result};
pub use first_part::FirstPart;
pub use inspect::inspect_object;
pub use load::{Load, Loaded};
pub use locks::{Granted, Interrupt, LockMode, LockWait};
pub use settings::{Background, Hooks, MEMORY_BYTES_MIN, Settings};
pub use sorter::{Sorted, Sorter};
pub use status::Status;
pub use txn::{Isolation, Mark, ReadAs, Txn};
pub use types::{BranchId, Epoch, OpKind, Seqno, SstId, TreeId, WalPosition, full_key, tree_of};

/// Parts that only `bench` measures by themselves. No promise goes with them.
#[doc(hidden)]
pub mod internals {
    pub use crate::memtable::{Memtable, MemtableIter};
    pub use crate::merge::Merge;
    pub use crate::source::Source;
    pub use crate::sst::{LevelIter, MeasuredBlock, MeasuredFilter, MeasuredSst, SstIter};
    pub use crate::wal::{LoadedSst, Op, Slot, Stream, Wal, WalLimits};
    pub use crate::writeset::{WriteMark, WriteSet, WriteSetIter};
}
