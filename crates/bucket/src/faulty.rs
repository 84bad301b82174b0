//! A bucket that goes wrong on purpose, by rules and a seed.
//!
//! * What a caller sees, a caller of the real thing may see: a faulty bucket keeps every promise of [`Bucket`], unless a
//!   rule says [`Effect::WrongBody`] or [`Effect::StaleList`].
//! * An error that is not [`ErrorKind::BadRequest`] or [`ErrorKind::NotFound`] says nothing about whether a write took
//!   effect, or will.
//! * Several faulty buckets may stand before one inner bucket: one for each process of a simulation.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::faults::{Decision, Effect, Faults, Operation, Request, Rule, When};
use crate::{Bucket, BucketError, ErrorKind, Meters, ObjectInfo, ObjectName, PutOutcome};

/// Waits; in the simulator, turns virtual time.
pub type Pause = Arc<dyn Fn(Duration) + Send + Sync>;

/// Wraps a bucket and breaks what the rules say.
pub struct FaultyBucket {
    inner: Arc<dyn Bucket>,
    faults: Faults,
    pause: Pause,
    tries: u32,
    late: Mutex<VecDeque<Late>>,
    recent: Mutex<VecDeque<Undo>>,
    meters: Meters,
}

#[derive(Debug)]
struct Late {
    lands_at: u64,
    write: Write,
}

#[derive(Clone, Debug)]
enum Write {
    PutIfAbsent(ObjectName, Bytes),
    Put(ObjectName, Bytes),
    Delete(Vec<ObjectName>),
}

/// How a listing looked before a write: the entry that `name` had, if any.
#[derive(Clone, Debug)]
struct Undo {
    name: ObjectName,
    before: Option<ObjectInfo>,
}

/// A stale listing misses at most this many writes.
const STALE_WRITES_MAX: usize = 8;

impl FaultyBucket {
    /// Stands before `inner` and answers each failure at once (one try); latency takes no time until
    /// [`Self::with_pause`].
    pub fn new(inner: Arc<dyn Bucket>, seed: u64, rules: Vec<Rule>) -> Self {
        Self {
            inner,
            faults: Faults::new(seed, rules),
            pause: Arc::new(|_| ()),
            tries: 1,
            late: Mutex::default(),
            recent: Mutex::default(),
            meters: Meters::default(),
        }
    }

    /// Where waiting happens.
    pub fn with_pause(mut self, pause: Pause) -> Self {
        self.pause = pause;
        self
    }

    /// Tries each request this often before the caller sees a failure that may pass, as the S3 client does. Then a
    /// conditional put whose first answer was lost says `Exists`.
    pub fn with_tries(mut self, tries: u32) -> Self {
        assert!(tries > 0, "a request is tried at least once");
        self.tries = tries;
        self
    }

    /// The rules and the log.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// The newest requests, oldest first, tries included.
    pub fn log(&self) -> Vec<Request> {
        self.faults.log()
    }

    /// How many writes are still under way though their callers were told otherwise.
    pub fn late_writes(&self) -> usize {
        self.late.lock().len()
    }

    /// Lets every late write land now, in the order in which they were sent. Returns how many.
    pub fn land_late(&self) -> usize {
        let late = std::mem::take(&mut *self.late.lock());
        let count = late.len();
        late.into_iter().for_each(|late| self.land(late.write));
        count
    }

    /// Late writes never land: the process that sent them, and its connections, are gone.
    pub fn drop_late(&self) {
        self.late.lock().clear();
    }

    fn land_due(&self) {
        let now = self.faults.requests();
        loop {
            let mut late = self.late.lock();
            let Some(due) = late.iter().position(|late| late.lands_at <= now) else { return };
            let due = late.remove(due).expect("position is inside");
            drop(late);
            self.land(due.write);
        }
    }

    fn land(&self, write: Write) {
        let landed = match &write {
            Write::PutIfAbsent(name, body) => self
                .write_and_remember(std::slice::from_ref(name), || {
                    self.inner.put_if_absent(name, body.clone())
                })
                .map(drop),
            Write::Put(name, body) => {
                self.write_and_remember(std::slice::from_ref(name), || self.inner.put(name, body.clone()))
            }
            Write::Delete(names) => self.write_and_remember(names, || self.inner.delete(names)),
        };
        if let Err(error) = landed {
            tracing::warn!(%error, "a late write was refused by the inner bucket");
        }
    }

    /// Tries `act` as the rules allow. `write` is what lands later if the rules say so.
    fn request<T>(
        &self,
        operation: Operation,
        name: &ObjectName,
        sent: u64,
        write: Option<Write>,
        mut act: impl FnMut(Option<Effect>, u64) -> Result<T, BucketError>,
    ) -> Result<T, BucketError> {
        let mut tried = 1;
        loop {
            self.land_due();
            let decision = self.faults.decide(operation, name);
            if !decision.wait.is_zero() {
                (self.pause)(decision.wait);
            }
            let answer = self.answer(operation, name, decision, &write, &mut act);
            match &answer {
                Ok(_) => self.meters.of(operation).count(sent),
                Err(_) => self.meters.of(operation).count_error(),
            }
            match answer {
                Err(error) if error.kind == ErrorKind::Unavailable && tried < self.tries => {
                    (self.pause)(Duration::from_millis(50 << tried.min(8)));
                    tried += 1;
                }
                answer => return answer,
            }
        }
    }

    fn answer<T>(
        &self,
        operation: Operation,
        name: &ObjectName,
        decision: Decision,
        write: &Option<Write>,
        act: &mut impl FnMut(Option<Effect>, u64) -> Result<T, BucketError>,
    ) -> Result<T, BucketError> {
        let Some((when, effect)) = decision.fault else { return act(None, decision.chance) };
        let (kind, message) = match effect {
            Effect::Reset => (ErrorKind::Unavailable, "the connection was reset".to_owned()),
            Effect::ErrorInBody => (ErrorKind::Unavailable, "the answer held an error".to_owned()),
            Effect::ExpiredCredentials => (ErrorKind::Denied, "the credentials have expired".to_owned()),
            Effect::Status { code, .. } => (kind_of_status(code), format!("the store answered {code}")),
            distortion => return act(Some(distortion), decision.chance),
        };
        match (when, write) {
            (When::Before, _) | (_, None) => (),
            // What the write itself answered is lost, as its sender's answer is.
            (When::After, Some(_)) => drop(act(None, decision.chance)),
            (When::Late(operations), Some(write)) => {
                let lands_at = self.faults.requests() + u64::from(operations);
                self.late.lock().push_back(Late { lands_at, write: write.clone() });
            }
        }
        Err(BucketError::new(kind, operation.as_str(), name, format!("{message} (injected)")))
    }

    /// Does a write and keeps what stale listings need.
    fn write_and_remember<T>(
        &self,
        names: &[ObjectName],
        write: impl FnOnce() -> Result<T, BucketError>,
    ) -> Result<T, BucketError> {
        for name in names {
            let before = self.inner.head(name)?.map(|bytes| ObjectInfo { name: name.clone(), bytes });
            let mut recent = self.recent.lock();
            recent.push_back(Undo { name: name.clone(), before });
            if recent.len() > STALE_WRITES_MAX {
                recent.pop_front();
            }
        }
        write()
    }

    fn make_stale(&self, prefix: &ObjectName, listing: &mut Vec<ObjectInfo>, chance: u64) {
        let recent = self.recent.lock();
        let writes_missed = 1 + chance as usize % STALE_WRITES_MAX;
        for undo in recent.iter().rev().take(writes_missed) {
            if !undo.name.as_str().starts_with(prefix.as_str()) {
                continue;
            }
            listing.retain(|entry| entry.name != undo.name);
            listing.extend(undo.before.clone());
        }
        listing.sort_by(|a, b| a.name.cmp(&b.name));
    }
}

/// What a caller can do about an HTTP status.
pub(crate) fn kind_of_status(code: u16) -> ErrorKind {
    match code {
        404 => ErrorKind::NotFound,
        401 | 403 => ErrorKind::Denied,
        408 | 409 | 425 | 429 | 500.. => ErrorKind::Unavailable,
        _ => ErrorKind::BadRequest,
    }
}

fn distort(
    name: &ObjectName,
    body: Bytes,
    distortion: Option<Effect>,
    chance: u64,
) -> Result<Bytes, BucketError> {
    match distortion {
        // The length that was asked for, or that the answer announced, gives it away.
        Some(Effect::ShortBody) => {
            let message = format!("the body ended before its {} bytes (injected)", body.len());
            Err(BucketError::new(ErrorKind::Unavailable, "GET", name, message))
        }
        Some(Effect::WrongBody) if !body.is_empty() => {
            let mut wrong = body.to_vec();
            let at = chance as usize % wrong.len();
            wrong[at] ^= 1 << (chance >> 61);
            Ok(wrong.into())
        }
        _ => Ok(body),
    }
}

impl Bucket for FaultyBucket {
    fn put_if_absent(&self, name: &ObjectName, body: Bytes) -> Result<PutOutcome, BucketError> {
        let write = Write::PutIfAbsent(name.clone(), body.clone());
        self.request(Operation::Put, name, body.len() as u64, Some(write), |_, _| {
            self.write_and_remember(std::slice::from_ref(name), || {
                self.inner.put_if_absent(name, body.clone())
            })
        })
    }

    fn put(&self, name: &ObjectName, body: Bytes) -> Result<(), BucketError> {
        let write = Write::Put(name.clone(), body.clone());
        self.request(Operation::Put, name, body.len() as u64, Some(write), |_, _| {
            self.write_and_remember(std::slice::from_ref(name), || self.inner.put(name, body.clone()))
        })
    }

    fn get(&self, name: &ObjectName) -> Result<Bytes, BucketError> {
        self.request(Operation::Get, name, 0, None, |distortion, chance| {
            distort(name, self.inner.get(name)?, distortion, chance)
        })
        .inspect(|body| self.meters.get.count_bytes(body.len() as u64))
    }

    fn get_ranges(&self, name: &ObjectName, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, BucketError> {
        self.request(Operation::Get, name, 0, None, |distortion, chance| {
            let mut bodies = self.inner.get_ranges(name, ranges)?;
            if let Some(body) = bodies.first_mut() {
                *body = distort(name, std::mem::take(body), distortion, chance)?;
            }
            Ok(bodies)
        })
        .inspect(|bodies| self.meters.get.count_bytes(bodies.iter().map(|body| body.len() as u64).sum()))
    }

    fn head(&self, name: &ObjectName) -> Result<Option<u64>, BucketError> {
        self.request(Operation::Head, name, 0, None, |_, _| self.inner.head(name))
    }

    fn list(&self, prefix: &ObjectName) -> Result<Vec<ObjectInfo>, BucketError> {
        self.request(Operation::List, prefix, 0, None, |distortion, chance| {
            let mut listing = self.inner.list(prefix)?;
            match distortion {
                Some(Effect::StaleList) => self.make_stale(prefix, &mut listing, chance),
                // The store repeats an entry, the client sorts and drops it: `list` promises each name once.
                Some(Effect::ListTwice) if !listing.is_empty() => {
                    let again = listing[chance as usize % listing.len()].clone();
                    listing.push(again);
                    sort_and_drop_repeats(&mut listing);
                }
                _ => (),
            }
            Ok(listing)
        })
    }

    fn delete(&self, names: &[ObjectName]) -> Result<(), BucketError> {
        let Some(first) = names.first() else { return Ok(()) };
        let write = Write::Delete(names.to_vec());
        self.request(Operation::Delete, first, 0, Some(write), |_, _| {
            self.write_and_remember(names, || self.inner.delete(names))
        })
    }

    fn meters(&self) -> &Meters {
        &self.meters
    }
}

impl fmt::Debug for FaultyBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyBucket")
            .field("faults", &self.faults)
            .field("late", &self.late)
            .finish_non_exhaustive()
    }
}

/// What `list` promises, from what a store may answer.
pub(crate) fn sort_and_drop_repeats(listing: &mut Vec<ObjectInfo>) {
    listing.sort_by(|a, b| a.name.cmp(&b.name));
    listing.dedup_by(|a, b| a.name == b.name);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryBucket;

    fn name(text: &str) -> ObjectName {
        ObjectName::from_listing(text)
    }

    fn faulty(rules: Vec<Rule>) -> (Arc<MemoryBucket>, FaultyBucket) {
        let memory = Arc::new(MemoryBucket::new());
        (memory.clone(), FaultyBucket::new(memory, 1, rules))
    }

    #[test]
    fn a_lost_answer_leaves_the_object_there_and_the_caller_in_doubt() {
        let (memory, bucket) = faulty(vec![Rule::lost_answer("a").times(1)]);
        let error = bucket.put_if_absent(&name("a"), Bytes::from_static(b"1")).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unavailable);
        assert_eq!(memory.get(&name("a")).unwrap(), "1");
        assert_eq!(bucket.put_if_absent(&name("a"), Bytes::from_static(b"1")).unwrap(), PutOutcome::Exists);
    }

    #[test]
    fn a_retried_put_whose_first_answer_was_lost_says_exists() {
        let (_, bucket) = faulty(vec![Rule::lost_answer("*").times(1)]);
        let bucket = bucket.with_tries(2);
        assert_eq!(bucket.put_if_absent(&name("a"), Bytes::new()).unwrap(), PutOutcome::Exists);
        assert_eq!(bucket.meters().put.requests(), 2);
        assert_eq!(bucket.meters().put.errors(), 1);
    }

    #[test]
    fn a_late_put_lands_after_so_many_operations() {
        let (memory, bucket) = faulty(vec![Rule::late_put("late", 3)]);
        bucket.put(&name("late"), Bytes::from_static(b"x")).unwrap_err();
        for _ in 0..3 {
            assert_eq!(memory.head(&name("late")).unwrap(), None);
            bucket.head(&name("other")).unwrap();
        }
        bucket.head(&name("other")).unwrap();
        assert_eq!(memory.head(&name("late")).unwrap(), Some(1));
    }

    #[test]
    fn a_late_conditional_put_does_not_replace_what_came_before_it() {
        let (memory, bucket) = faulty(vec![Rule::late_put("a", 1_000_000).times(1)]);
        bucket.put_if_absent(&name("a"), Bytes::from_static(b"late")).unwrap_err();
        assert_eq!(
            bucket.put_if_absent(&name("a"), Bytes::from_static(b"first")).unwrap(),
            PutOutcome::Created
        );
        assert_eq!(bucket.land_late(), 1);
        assert_eq!(memory.get(&name("a")).unwrap(), "first");
    }

    #[test]
    fn nothing_reaches_the_store_during_an_outage_and_everything_after_it() {
        let (memory, bucket) = faulty(vec![Rule::outage()]);
        assert_eq!(bucket.put(&name("a"), Bytes::new()).unwrap_err().kind, ErrorKind::Unavailable);
        assert_eq!(bucket.list(&name("")).unwrap_err().kind, ErrorKind::Unavailable);
        assert!(memory.contents().is_empty());
        bucket.faults().set_rules(vec![]);
        bucket.put(&name("a"), Bytes::new()).unwrap();
        assert_eq!(memory.contents().len(), 1);
    }

    #[test]
    fn expired_credentials_are_denied_and_a_short_body_is_never_returned() {
        let (_, bucket) = faulty(vec![]);
        bucket.put(&name("a"), Bytes::from_static(b"body")).unwrap();
        bucket.faults().set_rules(vec![Rule::new("*", Effect::ExpiredCredentials)]);
        assert_eq!(bucket.get(&name("a")).unwrap_err().kind, ErrorKind::Denied);
        bucket.faults().set_rules(vec![Rule::new("*", Effect::ShortBody)]);
        assert_eq!(bucket.get(&name("a")).unwrap_err().kind, ErrorKind::Unavailable);
        assert_eq!(bucket.get_ranges(&name("a"), &[0..2, 2..4]).unwrap_err().kind, ErrorKind::Unavailable);
    }

    #[test]
    fn a_wrong_body_has_the_right_length_and_one_wrong_bit() {
        let (_, bucket) = faulty(vec![Rule::new("*", Effect::WrongBody)]);
        bucket.put(&name("a"), Bytes::from(vec![0; 100])).unwrap();
        let body = bucket.get(&name("a")).unwrap();
        assert_eq!(body.len(), 100);
        assert_eq!(body.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
    }

    #[test]
    fn a_stale_listing_misses_new_objects_and_shows_deleted_ones() {
        let (_, bucket) = faulty(vec![]);
        bucket.put(&name("d/old"), Bytes::new()).unwrap();
        for i in 0..STALE_WRITES_MAX {
            bucket.head(&name("d/")).unwrap();
            bucket.put(&name(&format!("other/{i}")), Bytes::new()).unwrap();
        }
        bucket.put(&name("d/new"), Bytes::new()).unwrap();
        bucket.delete(&[name("d/old")]).unwrap();
        bucket.faults().set_rules(vec![Rule::new("d/", Effect::StaleList)]);
        let seen: std::collections::BTreeSet<String> = (0..64)
            .map(|_| {
                bucket.list(&name("d/")).unwrap().iter().map(|o| o.name.file_name().to_owned()).collect()
            })
            .collect();
        assert!(seen.contains("old"), "{seen:?}");
        assert!(seen.contains("newold"), "{seen:?}");
        bucket.faults().set_rules(vec![]);
        assert_eq!(bucket.list(&name("d/")).unwrap().len(), 1);
    }

    #[test]
    fn a_repeated_entry_is_dropped() {
        let (_, bucket) = faulty(vec![Rule::new("*", Effect::ListTwice)]);
        for i in 0..3 {
            bucket.put(&name(&format!("d/{i}")), Bytes::new()).unwrap();
        }
        assert_eq!(bucket.list(&name("d/")).unwrap().len(), 3);
    }

    #[test]
    fn waiting_happens_where_the_caller_says() {
        let waited = Arc::new(Mutex::new(Duration::ZERO));
        let (_, bucket) = faulty(vec![Rule::new(
            "*",
            Effect::Latency { p50: Duration::from_millis(30), p99: Duration::from_secs(2) },
        )]);
        let clock = waited.clone();
        let bucket = bucket.with_pause(Arc::new(move |pause| *clock.lock() += pause));
        bucket.put(&name("a"), Bytes::new()).unwrap();
        assert!(*waited.lock() > Duration::ZERO);
    }
}
