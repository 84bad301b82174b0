//! Which of the server's codes an error becomes.
//!
//! * A code below 200 is one that the server has its own text, number and reaction for (1062, 1213, 1205, 1317 …).
//! * Ours start at 1000: the server shows our own text with them (ER_GET_ERRMSG).

use engine::Kind;
use tables::Error;

pub const KEY_NOT_FOUND: i32 = 120;
pub const DUPLICATE_KEY: i32 = 121;
pub const WRONG_COMMAND: i32 = 131;
pub const END_OF_FILE: i32 = 137;
const LOCK_WAIT_TIMEOUT: i32 = 146;
const LOCK_DEADLOCK: i32 = 149;
pub const NO_SUCH_TABLE: i32 = 155;
const TABLE_EXISTS: i32 = 156;
const TABLE_DEFINITION_CHANGED: i32 = 159;
pub const RECORD_IS_THE_SAME: i32 = 169;
const ABORTED_BY_USER: i32 = 188;
const DISK_FULL: i32 = 189;

const UNAVAILABLE: i32 = 1001;
const FENCED: i32 = 1002;
const CORRUPT: i32 = 1003;
const BAD_REQUEST: i32 = 1004;
const DENIED: i32 = 1005;
const FAILED: i32 = 1006;
const BUG: i32 = 1007;
/// A panic that was caught at the border.
pub const PANIC: i32 = 1008;

/// What the handler returns for `error`.
pub fn code_of(error: &Error) -> i32 {
    match error {
        Error::Duplicate { .. } => DUPLICATE_KEY,
        Error::RowGone => KEY_NOT_FOUND,
        Error::NoSuchTable(_) => NO_SUCH_TABLE,
        Error::TableExists(_) => TABLE_EXISTS,
        Error::DefinitionChanged { .. } => TABLE_DEFINITION_CHANGED,
        Error::Malformed(_) => BUG,
        Error::Corrupt(_) => CORRUPT,
        Error::Engine(error) => code_of_kind(error.kind()),
    }
}

/// The text that goes with it, if the server asks: appended to its own for 1213, shown alone for codes that are ours.
pub fn text_of(error: &Error) -> String {
    match error {
        Error::Engine(error) if error.kind() == Kind::Deadlock => String::new(),
        Error::Engine(error) if error.kind() == Kind::Conflict => {
            "; the row changed after this transaction's snapshot (see cistern_snapshot_isolation)".to_owned()
        }
        _ => error.to_string(),
    }
}

fn code_of_kind(kind: Kind) -> i32 {
    match kind {
        Kind::Conflict | Kind::Deadlock => LOCK_DEADLOCK,
        Kind::LockTimeout => LOCK_WAIT_TIMEOUT,
        Kind::Interrupted => ABORTED_BY_USER,
        Kind::Full => DISK_FULL,
        Kind::Unavailable => UNAVAILABLE,
        Kind::Fenced => FENCED,
        Kind::Corrupt => CORRUPT,
        Kind::BadRequest => BAD_REQUEST,
        Kind::Denied => DENIED,
        Kind::Failed => FAILED,
        Kind::Bug => BUG,
    }
}

/// Exit statuses of mariadbd when the plugin ends it: those of `cistern serve`, which passes them on. Never renumber.
pub mod exit {
    use engine::Kind;

    /// A setting, a directory or the bucket's content can't work.
    pub const CONFIGURATION: i32 = 2;
    /// A newer writer owns the bucket.
    pub const FENCED: i32 = 3;
    /// The object store does not answer.
    pub const UNREACHABLE: i32 = 4;
    /// Everything else: starting again is right.
    pub const CRASH: i32 = 5;

    /// The status for an engine that can not start or go on.
    pub fn status_of(kind: Kind) -> i32 {
        match kind {
            Kind::Fenced => FENCED,
            Kind::Unavailable => UNREACHABLE,
            Kind::BadRequest | Kind::Denied | Kind::Corrupt | Kind::Full => CONFIGURATION,
            _ => CRASH,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conflicts_and_deadlocks_answer_1213_through_the_servers_own_code() {
        for kind in [Kind::Conflict, Kind::Deadlock] {
            assert_eq!(code_of(&Error::Engine(engine::Error::new(kind, "x"))), LOCK_DEADLOCK);
        }
    }

    #[test]
    fn what_the_server_has_no_text_for_is_above_its_own_codes() {
        for kind in [
            Kind::Unavailable,
            Kind::Fenced,
            Kind::Corrupt,
            Kind::BadRequest,
            Kind::Denied,
            Kind::Failed,
            Kind::Bug,
        ] {
            assert!(code_of_kind(kind) > 200, "{kind:?}");
        }
    }
}
