//! Errors, sorted by what the caller does next.

use std::fmt;

/// The reaction an error calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The object store or the disk did not answer; the same call may work later.
    Unavailable,
    /// The row changed after the transaction's snapshot: roll back and start again (SQL: 1213).
    Conflict,
    /// This transaction was chosen to end a deadlock; it must roll back (SQL: 1213).
    Deadlock,
    /// A lock was not granted in time (SQL: 1205).
    LockTimeout,
    /// The caller's session was killed or its client left while it waited (SQL: 1317).
    Interrupted,
    /// A newer writer owns the branch; this process may write nothing any more.
    Fenced,
    /// Local disk or the limit for data not yet uploaded is full (SQL: 1021). Nothing was lost.
    Full,
    /// A checksum or a structure is wrong. The message names the file or object.
    Corrupt,
    /// The caller or the operator asked for something impossible: a setting, a format version, a key too long.
    BadRequest,
    /// Credentials, permissions, a bucket that does not exist: a person must act.
    Denied,
    /// The wal can not be written any more; nothing is acknowledged until the process starts anew.
    Failed,
    /// An invariant of ours does not hold.
    Bug,
}

/// An error with its kind, a message that names the thing, and its cause.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// What fallible calls of the engine return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind`; `message` names the thing and says what to do next.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), cause: None }
    }
    /// The same with what caused it.
    pub fn with_cause(mut self, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.cause = Some(Box::new(cause));
        self
    }
    /// A broken checksum or structure.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(Kind::Corrupt, message)
    }
    /// The reaction it calls for.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(cause) = &self.cause {
            write!(f, ": {cause}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_ref().map(|cause| cause.as_ref() as &(dyn std::error::Error + 'static))
    }
}

impl From<bucket::BucketError> for Error {
    fn from(error: bucket::BucketError) -> Self {
        let kind = match error.kind {
            bucket::ErrorKind::NotFound => Kind::Corrupt,
            bucket::ErrorKind::Unavailable => Kind::Unavailable,
            bucket::ErrorKind::Denied => Kind::Denied,
            bucket::ErrorKind::BadRequest => Kind::BadRequest,
        };
        Self::new(kind, "object store").with_cause(error)
    }
}
