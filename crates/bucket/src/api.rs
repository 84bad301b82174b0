//! What the engine may ask of an object store, whatever stands behind it.
//!
//! * Calls block the calling thread; nothing async leaves this crate.
//! * Every implementation retries what is worth retrying, with jitter, until a total deadline, and then answers
//!   [`ErrorKind::Unavailable`]. A caller that must not give up calls again.
//! * A call that failed may still take effect later: names that carry an epoch are never reused, and a conditional
//!   put is read back by its caller.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::{ObjectName, Operation};

/// The object store. One implementation for directories, one for S3, one that fails on purpose.
pub trait Bucket: Send + Sync + 'static {
    /// Creates `name` if no object of that name exists; atomic against every other writer of the store.
    ///
    /// On `Created` the object is durable. `Exists` may mean that an earlier try of this very call took effect and its
    /// answer was lost: where that matters, the body names its writer and the caller reads it back.
    fn put_if_absent(&self, name: &ObjectName, body: Bytes) -> Result<PutOutcome, BucketError>;

    /// Stores an object whose name is used by nobody else, ever (it carries epoch and counter). Large bodies travel in
    /// parts. Durable on return. Storing the same bytes twice under the name is harmless.
    fn put(&self, name: &ObjectName, body: Bytes) -> Result<(), BucketError>;

    /// The whole object. [`ErrorKind::NotFound`] if there is none.
    fn get(&self, name: &ObjectName) -> Result<Bytes, BucketError>;

    /// The bytes of each range, in order; near ranges share a request. A range beyond the end is
    /// [`ErrorKind::BadRequest`]; a body shorter than asked is retried and never returned.
    fn get_ranges(&self, name: &ObjectName, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, BucketError>;

    /// The object's length, or `None` if there is no such object.
    fn head(&self, name: &ObjectName) -> Result<Option<u64>, BucketError>;

    /// All objects whose name starts with `prefix` (a directory: it ends in `/`), sorted by name, each once.
    fn list(&self, prefix: &ObjectName) -> Result<Vec<ObjectInfo>, BucketError>;

    /// Deletes; names that do not exist are fine. On an error some may be gone.
    fn delete(&self, names: &[ObjectName]) -> Result<(), BucketError>;

    /// Requests and bytes so far, by kind.
    fn meters(&self) -> &Meters;
}

/// What a conditional put did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// The object is there because of this call.
    Created,
    /// An object of that name was there already.
    Exists,
}

/// One row of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Full name, prefix included.
    pub name: ObjectName,
    /// Length in bytes.
    pub bytes: u64,
}

/// What the caller can do about a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// There is no such object.
    NotFound,
    /// The store did not answer in time, or answered with an error that may pass. Try again later.
    Unavailable,
    /// Credentials or permissions are wrong, or the bucket does not exist. A person must act.
    Denied,
    /// The request itself is wrong: our bug, or a setting that can't work.
    BadRequest,
}

/// A failed request, naming the object and the store's own words.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {name}: {message}")]
pub struct BucketError {
    /// The reaction it calls for.
    pub kind: ErrorKind,
    /// `PUT`, `GET`, `HEAD`, `LIST` or `DELETE`.
    pub operation: &'static str,
    /// The object or prefix asked for.
    pub name: ObjectName,
    /// What the store said, and after how many tries. Never a credential.
    pub message: String,
}

impl BucketError {
    /// An error about `name`, which may be a prefix.
    pub fn new(
        kind: ErrorKind,
        operation: &'static str,
        name: &ObjectName,
        message: impl Into<String>,
    ) -> Self {
        Self { kind, operation, name: name.clone(), message: message.into() }
    }
}

/// Refuses ranges that the object, `length` bytes long, does not have.
pub(crate) fn check_ranges(name: &ObjectName, length: u64, ranges: &[Range<u64>]) -> Result<(), BucketError> {
    match ranges.iter().find(|range| range.start > range.end || range.end > length) {
        None => Ok(()),
        Some(range) => {
            let message = format!("bytes {}..{} asked of an object of {length}", range.start, range.end);
            Err(BucketError::new(ErrorKind::BadRequest, "GET", name, message))
        }
    }
}

/// Refuses to list anything but a directory, or the whole bucket.
pub(crate) fn check_prefix(prefix: &ObjectName) -> Result<(), BucketError> {
    if prefix.as_str().is_empty() || prefix.as_str().ends_with('/') {
        return Ok(());
    }
    Err(BucketError::new(
        ErrorKind::BadRequest,
        "LIST",
        prefix,
        "only a directory, ending in '/', can be listed",
    ))
}

/// Requests (tries included) and bytes of one kind of operation.
#[derive(Debug, Default)]
pub struct OpMeter {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

impl OpMeter {
    /// Counts one request that moved `bytes` of body.
    pub fn count(&self, bytes: u64) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
    /// Counts body bytes of a request that is counted elsewhere.
    pub fn count_bytes(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
    /// Counts one request that failed.
    pub fn count_error(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.errors.fetch_add(1, Ordering::Relaxed);
    }
    /// Requests so far, failed ones included.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
    /// Body bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
    /// Failed requests so far.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }
}

/// What costs money, by kind.
#[derive(Debug, Default)]
pub struct Meters {
    /// Conditional and plain puts, and the requests of multipart uploads.
    pub put: OpMeter,
    /// Gets, ranged or whole.
    pub get: OpMeter,
    /// Second gets that were sent because the first was slow; the store bills them besides those in `get`.
    pub hedged: OpMeter,
    /// Heads.
    pub head: OpMeter,
    /// Pages of listings.
    pub list: OpMeter,
    /// Delete requests, one for each batch.
    pub delete: OpMeter,
}

impl Meters {
    /// The meter of one kind of operation.
    pub(crate) fn of(&self, operation: Operation) -> &OpMeter {
        match operation {
            Operation::Put => &self.put,
            Operation::Get => &self.get,
            Operation::Head => &self.head,
            Operation::List => &self.list,
            Operation::Delete => &self.delete,
        }
    }
}
