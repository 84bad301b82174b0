//! A connection's transaction: statements, savepoints, row counts that follow commit and rollback.

use std::time::Duration;

use crate::{Error, Result};

/// A place to roll back to.
#[derive(Clone, Debug)]
pub struct Savepoint {}

/// One connection's transactions, one after another. Driven by one thread at a time.
pub struct Session {}

const NOT_YET: Error = Error::Malformed("call: this build has signatures only");

impl Session {
    /// Isolation for the transaction that has not read or written yet: true is REPEATABLE READ, false READ COMMITTED.
    pub fn set_repeatable_read(&mut self, _yes: bool) {}
    /// START TRANSACTION WITH CONSISTENT SNAPSHOT.
    pub fn snapshot_now(&mut self) {}
    /// How long a lock is waited for (50 s unless set).
    pub fn set_lock_timeout(&mut self, _timeout: Duration) {}

    /// A statement starts: remembers where to roll back to; in READ COMMITTED the next read takes a fresh snapshot.
    /// Once for each statement, however many tables it uses.
    pub fn statement_begin(&mut self) {}
    /// The statement failed: undoes its writes. Locks stay.
    pub fn statement_rollback(&mut self) {}

    /// Marks a place (SAVEPOINT).
    pub fn savepoint(&mut self) -> Savepoint {
        Savepoint {}
    }
    /// Undoes all writes made since `savepoint`, which stays usable.
    pub fn rollback_to(&mut self, _savepoint: &Savepoint) {}

    /// Durable and visible on return; on an error all is rolled back.
    pub fn commit(&mut self) -> Result<()> {
        Err(NOT_YET)
    }
    /// Undoes everything and lets go of all locks.
    pub fn rollback(&mut self) {}
    /// Whether a commit would write anything.
    pub fn has_writes(&self) -> bool {
        false
    }
    /// Ends a lock wait of this session from another thread (KILL).
    /// (Becomes `engine::Interrupt` as soon as the facade is on main.)
    pub fn interrupt_handle(&self) -> Box<dyn Fn() + Send + Sync> {
        Box::new(|| ())
    }
}
