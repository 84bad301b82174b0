//! A bucket in memory, for tests and the simulator.
//!
//! * Linearizable: each call takes effect at one moment between its start and its return.
//! * Never fails but for requests that are wrong in themselves.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::api::{check_prefix, check_ranges};
use crate::{Bucket, BucketError, ErrorKind, Meters, ObjectInfo, ObjectName, PutOutcome};

/// Objects in a sorted map. Share it in an `Arc`: it outlives the crash of whoever writes to it.
#[derive(Debug, Default)]
pub struct MemoryBucket {
    objects: Mutex<BTreeMap<ObjectName, Bytes>>,
    meters: Meters,
}

impl MemoryBucket {
    /// An empty bucket.
    pub fn new() -> Self {
        Self::default()
    }

    /// Changes an object behind everybody's back: what a damaged or meddled-with store would hold. `None` removes it.
    pub fn tamper(&self, name: &ObjectName, body: Option<Bytes>) {
        let mut objects = self.objects.lock();
        match body {
            Some(body) => objects.insert(name.clone(), body),
            None => objects.remove(name),
        };
    }

    /// All objects, for comparison.
    pub fn contents(&self) -> BTreeMap<ObjectName, Bytes> {
        self.objects.lock().clone()
    }

    fn find(&self, operation: &'static str, name: &ObjectName) -> Result<Bytes, BucketError> {
        self.objects
            .lock()
            .get(name)
            .cloned()
            .ok_or_else(|| BucketError::new(ErrorKind::NotFound, operation, name, "there is no such object"))
    }
}

impl Bucket for MemoryBucket {
    fn put_if_absent(&self, name: &ObjectName, body: Bytes) -> Result<PutOutcome, BucketError> {
        self.meters.put.count(body.len() as u64);
        let mut objects = self.objects.lock();
        if objects.contains_key(name) {
            return Ok(PutOutcome::Exists);
        }
        objects.insert(name.clone(), body);
        Ok(PutOutcome::Created)
    }

    fn put(&self, name: &ObjectName, body: Bytes) -> Result<(), BucketError> {
        self.meters.put.count(body.len() as u64);
        self.objects.lock().insert(name.clone(), body);
        Ok(())
    }

    fn get(&self, name: &ObjectName) -> Result<Bytes, BucketError> {
        let body = self.find("GET", name).inspect_err(|_| self.meters.get.count_error())?;
        self.meters.get.count(body.len() as u64);
        Ok(body)
    }

    fn get_ranges(&self, name: &ObjectName, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, BucketError> {
        let body = self.find("GET", name).inspect_err(|_| self.meters.get.count_error())?;
        check_ranges(name, body.len() as u64, ranges)?;
        self.meters.get.count(ranges.iter().map(|range| range.end - range.start).sum());
        Ok(ranges.iter().map(|range| body.slice(range.start as usize..range.end as usize)).collect())
    }

    fn head(&self, name: &ObjectName) -> Result<Option<u64>, BucketError> {
        self.meters.head.count(0);
        Ok(self.objects.lock().get(name).map(|body| body.len() as u64))
    }

    fn list(&self, prefix: &ObjectName) -> Result<Vec<ObjectInfo>, BucketError> {
        check_prefix(prefix)?;
        self.meters.list.count(0);
        let objects = self.objects.lock();
        Ok(objects
            .range((Bound::Included(prefix), Bound::Unbounded))
            .take_while(|(name, _)| name.as_str().starts_with(prefix.as_str()))
            .map(|(name, body)| ObjectInfo { name: name.clone(), bytes: body.len() as u64 })
            .collect())
    }

    fn delete(&self, names: &[ObjectName]) -> Result<(), BucketError> {
        self.meters.delete.count(0);
        let mut objects = self.objects.lock();
        for name in names {
            objects.remove(name);
        }
        Ok(())
    }

    fn meters(&self) -> &Meters {
        &self.meters
    }
}
