//! Named points at which a test may stop or kill this process, to see what a crash just there leaves behind.
//!
//! * Unarmed, a point costs one load of a static that never changes.
//! * An armed one acts once in the life of a process. Kill is `SIGKILL`, stop is `SIGSTOP`: nothing is told to the rest of
//!   the process, as in a real crash.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

/// A place in the code. Each stands between two effects that a crash may separate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// A commit has given back its row locks, and nobody has written it to the disk for it.
    AfterUnlock,
    /// Commits are written to the local wal and not synced: nobody was told.
    BeforeSync,
    /// Commits are durable on the disk, and nobody was told.
    AfterSync,
    /// A memtable is in ssts on the local disk, and no tree names them.
    InFlush,
    /// The ssts of a load are in the bucket, and no transaction names them.
    InLoad,
    /// A slice of the wal is in the bucket, and its writer has not looked for newer claims.
    AfterSlicePut,
    /// A flush's ssts are in the bucket, and no manifest names them.
    AfterSstPut,
    /// A manifest edit is made and not sent.
    BeforeEditPut,
    /// A manifest edit is in the bucket, and its writer has not looked for newer claims.
    AfterEditPut,
    /// A flush is published, and the wal before it is still there.
    BeforeTrim,
    /// The claim was found valid, and the objects that nothing names are still there.
    BeforeDelete,
}

const NAMES: [(&str, Point); 11] = [
    ("after-unlock", Point::AfterUnlock),
    ("before-sync", Point::BeforeSync),
    ("after-sync", Point::AfterSync),
    ("in-flush", Point::InFlush),
    ("in-load", Point::InLoad),
    ("after-slice-put", Point::AfterSlicePut),
    ("after-sst-put", Point::AfterSstPut),
    ("before-edit-put", Point::BeforeEditPut),
    ("after-edit-put", Point::AfterEditPut),
    ("before-trim", Point::BeforeTrim),
    ("before-delete", Point::BeforeDelete),
];

/// How long a stopped thread waits for the signal to reach the other threads; it sleeps on when the process resumes.
const SIGNAL_TIME: Duration = Duration::from_millis(50);

struct Armed {
    point: Point,
    signal: Signal,
    /// Passes left until it acts.
    passes: AtomicU64,
}

static ARMED: OnceLock<Armed> = OnceLock::new();

/// Arms one point of this process for good: `kill@before-sync`, or `stop@in-flush#3` at its third pass. For tests alone.
///
/// # Errors
/// What is wrong with `what`, in words.
pub fn arm(what: &str) -> std::result::Result<(), String> {
    let refuse = || {
        let names: Vec<_> = NAMES.iter().map(|(name, _)| *name).collect();
        format!("{what:?} is not kill@POINT or stop@POINT, perhaps with #PASS; points: {}", names.join(", "))
    };
    let (action, place) = what.split_once('@').ok_or_else(refuse)?;
    let signal = match action {
        "kill" => Signal::KILL,
        "stop" => Signal::STOP,
        _ => return Err(refuse()),
    };
    let (name, pass) = place.split_once('#').unwrap_or((place, "1"));
    let passes = pass.parse().map(AtomicU64::new).map_err(|_| refuse())?;
    let point = NAMES.iter().find(|(known, _)| *known == name).ok_or_else(refuse)?.1;
    ARMED.set(Armed { point, signal, passes }).map_err(|_| "a point is armed already".to_owned())
}

/// The process is at `point`.
#[inline]
pub(crate) fn pass(point: Point) {
    if let Some(armed) = ARMED.get()
        && armed.point == point
        && armed.passes.fetch_sub(1, Ordering::Relaxed) == 1
    {
        act(armed);
    }
}

#[cold]
#[expect(clippy::disallowed_methods, reason = "a real signal needs real time to arrive")]
fn act(armed: &Armed) {
    tracing::warn!(point = ?armed.point, signal = ?armed.signal, "a test ends or stops this process here");
    kill_process(getpid(), armed.signal).expect("a process may signal itself");
    std::thread::sleep(SIGNAL_TIME);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_be_armed_is_refused_with_all_that_can() {
        for what in ["", "in-flush", "kill@", "pause@in-flush", "kill@in-flush#x", "kill@nowhere"] {
            let error = arm(what).expect_err(what);
            assert!(error.contains("before-sync"), "{error}");
        }
    }
}
