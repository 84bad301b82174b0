//! The catalogue's door: tables by path, DDL steps, and the small files that the server keeps beside its tables.
//!
//! A *path* is `database/table` in the server's file-name encoding; a leading `./` is ignored. Every call is one engine
//! transaction, durable when it returns; none takes part in a session's transaction.

use std::sync::Arc;

use crate::{Collations, Definition, Descriptor, Error, Result, Session, Table};

/// The images that the server needs to recognise a table.
#[derive(Clone, Copy, Debug, Default)]
pub struct TableImages<'a> {
    /// The .frm image.
    pub frm: &'a [u8],
    /// The .par image, or nothing.
    pub par: &'a [u8],
}

/// All tables of one engine.
pub struct Store {}

const NOT_YET: Error = Error::Malformed("call: this build has signatures only");

impl Store {
    /// Opens the catalogue, making it in a fresh engine; an unknown catalogue format is refused by name.
    /// (The engine becomes the first argument as soon as its facade is on main: `engine: Arc<engine::Engine>`.)
    pub fn open(_collations: Arc<dyn Collations>) -> Result<Arc<Store>> {
        Err(NOT_YET)
    }
    /// Writes exact row counts and auto-increment marks. Call before the engine is closed.
    pub fn close(&self) -> Result<()> {
        Err(NOT_YET)
    }

    /// Makes an empty table. `auto_increment` is the first value handed out (0 is taken as 1).
    pub fn create(
        &self,
        _path: &str,
        _descriptor: &Descriptor,
        _images: TableImages,
        _auto_increment: u64,
    ) -> Result<()> {
        Err(NOT_YET)
    }
    /// Removes a table: gone when it returns, its space comes back later.
    pub fn drop_table(&self, _path: &str) -> Result<()> {
        Err(NOT_YET)
    }
    /// Renames a table, to another database too. Statistics and counters stay.
    pub fn rename(&self, _from: &str, _to: &str) -> Result<()> {
        Err(NOT_YET)
    }
    /// Puts new images in place of the old (in-place ALTER, partition metadata); rows are not touched, so the stored layout
    /// that follows from `descriptor` must be the old one.
    pub fn set_images(&self, _path: &str, _descriptor: &Descriptor, _images: TableImages) -> Result<()> {
        Err(NOT_YET)
    }
    /// What the catalogue knows of a table; `None` if there is no such table.
    pub fn definition(&self, _path: &str) -> Result<Option<Definition>> {
        Err(NOT_YET)
    }
    /// Whether there is such a table.
    pub fn exists(&self, _path: &str) -> Result<bool> {
        Err(NOT_YET)
    }
    /// Calls `each` with the file name (no directory) of every table in a database, in order; `#sql…` and `#P#` ones too.
    pub fn list(&self, _database: &str, _each: &mut dyn FnMut(&str)) -> Result<()> {
        Err(NOT_YET)
    }
    /// Names of all databases that hold a table or a file, in order.
    pub fn databases(&self) -> Result<Vec<String>> {
        Err(NOT_YET)
    }
    /// Drops every table whose path starts with `database/` and forgets its files: DROP DATABASE.
    pub fn drop_database(&self, _database: &str) -> Result<()> {
        Err(NOT_YET)
    }

    /// Opens a table for reading and writing. Cheap; one for each handler is fine.
    pub fn open_table(self: &Arc<Self>, _path: &str, _descriptor: Descriptor) -> Result<Arc<Table>> {
        Err(NOT_YET)
    }
    /// A connection's session. `interrupted` is polled during lock waits (thd_kill_level).
    pub fn session(self: &Arc<Self>, _interrupted: Box<dyn Fn() -> bool + Send>) -> Session {
        Session {}
    }

    /// Keeps a file under its path relative to the data directory (`shop/db.opt`, `shop/v.frm`, `shop/t.TRG`, `shop/p.par`).
    pub fn file_put(&self, _name: &str, _bytes: &[u8]) -> Result<()> {
        Err(NOT_YET)
    }
    /// Several at once, in one transaction: `None` removes.
    pub fn files_apply(&self, _changes: &[(&str, Option<&[u8]>)]) -> Result<()> {
        Err(NOT_YET)
    }
    /// Its bytes.
    pub fn file_get(&self, _name: &str) -> Result<Option<Vec<u8>>> {
        Err(NOT_YET)
    }
    /// Forgets a file; an absent one is fine.
    pub fn file_remove(&self, _name: &str) -> Result<()> {
        Err(NOT_YET)
    }
    /// Calls `each` with name and bytes of every file under `directory` (all with `""`), in order.
    pub fn files(&self, _directory: &str, _each: &mut dyn FnMut(&str, &[u8])) -> Result<()> {
        Err(NOT_YET)
    }
}
