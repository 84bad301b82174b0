//! SQL tables as key ranges over the engine's ordered trees. Read the modules in this order.
//!
//! A caller fills a [`Descriptor`] from the server's table share, opens a [`Table`] through the [`Store`], and moves
//! [`RowCursor`]s over it inside a [`Session`]. Records and key tuples come and go in the server's own layout.
//!
//! Never here: the server's headers, foreign pointers that are followed, object storage.

mod ahead;
mod backup;
mod bulk;
mod catalogue;
mod cursor;
mod descriptor;
mod error;
mod indexes;
mod keys;
mod layout;
mod rows;
mod scout;
mod session;
mod statistics;
mod store;
mod table;
mod varint;
mod write;

pub use backup::Settled;
pub use bulk::BulkFacts;
pub use catalogue::Definition;
pub use cursor::{Condition, Pushed, ReadFlag, Record, RowCursor, RowLock, Verdict};
pub use descriptor::{
    CollationId, Collations, Descriptor, Field, Index, IndexPart, Kind, LEVELS_MAX, Storage, TextOrder,
};
pub use error::{Error, Result};
pub use indexes::{BuiltIndexes, IndexPlan};
pub use session::{Savepoint, Session};
pub use store::{Store, TableImages};
pub use table::{RangeEnd, Table};

// The stand-in for the server is written against the public face, and used from inside too.
#[cfg(test)]
extern crate self as tables;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;
