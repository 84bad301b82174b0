//! What can go wrong with a table, sorted by the answer that the server gives.

/// A refusal. The server's code is in parentheses.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The row would repeat a value of a unique key (HA_ERR_FOUND_DUPP_KEY). Nothing of the row was written.
    #[error("duplicate value for key number {key}")]
    Duplicate {
        /// Number of the key, as in the descriptor.
        key: usize,
    },
    /// The row that a call wanted to change or to read by position is gone (HA_ERR_KEY_NOT_FOUND).
    #[error("the row is gone")]
    RowGone,
    /// HA_ERR_NO_SUCH_TABLE.
    #[error("no such table: {0}")]
    NoSuchTable(String),
    /// HA_ERR_TABLE_EXIST.
    #[error("table exists: {0}")]
    TableExists(String),
    /// The descriptor does not fit what is stored (HA_ERR_TABLE_DEF_CHANGED): the server holds a stale definition.
    #[error("the definition of {path} does not fit its stored rows: {reason}")]
    DefinitionChanged {
        /// The table.
        path: String,
        /// What differs.
        reason: &'static str,
    },
    /// A part of the descriptor or of a key tuple makes no sense (HA_ERR_INTERNAL_ERROR): a bug of the caller.
    #[error("malformed {0}")]
    Malformed(&'static str),
    /// A stored byte makes no sense (HA_ERR_CRASHED). The message names tree and place.
    #[error("corrupt: {0}")]
    Corrupt(String),
    /// What the engine says; its kind tells what to do.
    #[error(transparent)]
    Engine(#[from] engine::Error),
}

/// What fallible calls of this crate return.
pub type Result<T> = std::result::Result<T, Error>;
