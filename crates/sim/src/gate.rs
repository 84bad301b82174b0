//! Stands between one process and its bucket and makes things happen in the middle of a request.
//!
//! * A *cut* stops the machine at a request: that one and all later ones fail, and so does the disk from then on.
//! * A *takeover* lets another process run while this one is stopped in a request (SIGSTOP … SIGCONT).

use std::ops::Range;
use std::sync::Arc;

use bucket::{Bucket, BucketError, ErrorKind, Meters, Names, ObjectInfo, ObjectName, PutOutcome};
use bytes::Bytes;
use engine::{DiskFault, SimDisk};
use parking_lot::Mutex;

use crate::plan::Planted;

/// What happens in the middle of a request.
pub(crate) enum Event {
    Cut,
    Takeover(Box<dyn FnOnce() + Send>),
}

pub(crate) struct Gate {
    inner: Arc<dyn Bucket>,
    disk: SimDisk,
    planted: Option<Planted>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    requests: u64,
    /// At which request, whether before the store sees it, and what.
    armed: Option<(u64, bool, Event)>,
    is_cut: bool,
    fired: bool,
    /// What the last conditional put was for.
    claimed: Option<ObjectName>,
}

impl Gate {
    pub(crate) fn new(inner: Arc<dyn Bucket>, disk: SimDisk, planted: Option<Planted>) -> Self {
        Self { inner, disk, planted, state: Mutex::default() }
    }

    /// Makes `event` happen after `requests` more requests, before or after the store has seen the one it stops at.
    pub(crate) fn arm(&self, requests: u64, before: bool, event: Event) {
        let mut state = self.state.lock();
        let at = state.requests + requests;
        state.armed = Some((at, before, event));
    }

    /// Whether what was armed has happened; disarms it if not.
    pub(crate) fn disarm(&self) -> bool {
        let mut state = self.state.lock();
        state.armed = None;
        std::mem::take(&mut state.fired)
    }

    /// No request reaches the store any more: the process is dead.
    pub(crate) fn cut(&self) {
        self.state.lock().is_cut = true;
    }

    /// Whether the machine has stopped at a request.
    pub(crate) fn is_cut(&self) -> bool {
        self.state.lock().is_cut
    }

    fn pass<T>(
        &self,
        operation: &'static str,
        name: &ObjectName,
        request: impl FnOnce() -> Result<T, BucketError>,
    ) -> Result<T, BucketError> {
        self.state.lock().requests += 1;
        self.happen(true);
        self.check(operation, name)?;
        let answer = request();
        self.happen(false);
        self.check(operation, name)?;
        answer
    }

    fn happen(&self, before: bool) {
        let mut state = self.state.lock();
        let now = state.requests;
        let Some((_, _, event)) = state.armed.take_if(|(at, when, _)| *at <= now && *when == before) else {
            return;
        };
        state.fired = true;
        match event {
            Event::Cut => {
                state.is_cut = true;
                self.disk.arm(DiskFault::StopAt(0));
            }
            Event::Takeover(run) => {
                drop(state);
                run();
            }
        }
    }

    fn check(&self, operation: &'static str, name: &ObjectName) -> Result<(), BucketError> {
        if self.state.lock().is_cut {
            let message = "the simulated machine has stopped".to_owned();
            return Err(BucketError { kind: ErrorKind::Unavailable, operation, name: name.clone(), message });
        }
        Ok(())
    }
}

impl Bucket for Gate {
    fn put_if_absent(&self, name: &ObjectName, body: Bytes) -> Result<PutOutcome, BucketError> {
        self.state.lock().claimed = Some(name.clone());
        self.pass("PUT", name, || {
            if self.planted == Some(Planted::PutIfAbsentOverwrites) {
                self.inner.put(name, body)?;
                return Ok(PutOutcome::Created);
            }
            let outcome = self.inner.put_if_absent(name, body.clone())?;
            if self.planted == Some(Planted::ForgetsReaders) && outcome == PutOutcome::Created {
                self.inner.delete(&removed_by(name, &body))?;
            }
            Ok(outcome)
        })
    }
    fn put(&self, name: &ObjectName, body: Bytes) -> Result<(), BucketError> {
        self.pass("PUT", name, || match self.planted {
            Some(Planted::LosesPuts) if name.as_str().contains("/wal/") => Ok(()),
            _ => self.inner.put(name, body),
        })
    }
    fn get(&self, name: &ObjectName) -> Result<Bytes, BucketError> {
        self.pass("GET", name, || {
            // A claim is also read back by who has just tried to make it; that one is not to be misled.
            let validates =
                name.as_str().contains("/epoch/") && self.state.lock().claimed.as_ref() != Some(name);
            if self.planted == Some(Planted::BlindToClaims) && validates {
                let message = "there is no such object".to_owned();
                return Err(BucketError {
                    kind: ErrorKind::NotFound,
                    operation: "GET",
                    name: name.clone(),
                    message,
                });
            }
            self.inner.get(name)
        })
    }
    fn get_ranges(&self, name: &ObjectName, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, BucketError> {
        self.pass("GET", name, || self.inner.get_ranges(name, ranges))
    }
    fn head(&self, name: &ObjectName) -> Result<Option<u64>, BucketError> {
        self.pass("HEAD", name, || self.inner.head(name))
    }
    fn list(&self, prefix: &ObjectName) -> Result<Vec<ObjectInfo>, BucketError> {
        self.pass("LIST", prefix, || self.inner.list(prefix))
    }
    fn delete(&self, names: &[ObjectName]) -> Result<(), BucketError> {
        let Some(first) = names.first() else { return Ok(()) };
        self.pass("DELETE", first, || self.inner.delete(names))
    }
    fn meters(&self) -> &Meters {
        self.inner.meters()
    }
}

/// The ssts that an edit takes out of the tree for good; none if `name` is something else.
fn removed_by(name: &ObjectName, object: &[u8]) -> Vec<ObjectName> {
    let Ok(words) = engine::inspect_object(name, object) else { return Vec::new() };
    // "removes sst 8-4"; a move adds it again: "adds to level 2: sst 8-4, …".
    let removed = words.lines().filter_map(|line| line.strip_prefix("removes "));
    let gone = removed.filter(|sst| !words.contains(&format!(": {sst},")));
    let number = |digits| u64::from_str_radix(digits, 16).ok();
    let objects = gone.filter_map(|sst| {
        let (epoch, counter) = sst.strip_prefix("sst ")?.split_once('-')?;
        Some(Names::new("main").sst(number(epoch)?, number(counter)?))
    });
    objects.collect()
}
