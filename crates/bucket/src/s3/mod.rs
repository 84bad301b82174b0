//! A bucket in an S3-compatible store.
//!
//! * `object_store` speaks the protocol: signatures, XML, roles. Retries, deadlines, coalescing and the meaning of errors
//!   are ours, because what a failed request may have left behind decides what the engine may do next.
//! * Callers block. Their futures run on their own threads; a small private runtime drives sockets and timers.
//! * A conditional put says `Created` only when the store did; 409 is no answer and is tried again. A store that ignores the
//!   condition is refused at the first object that this process creates.
//! * Credentials appear in no error, log line or `Debug`.

mod call;
mod credentials;
mod crypto;
mod failure;
mod http;

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, GetResult, ObjectStore, PutMode, PutOptions, RetryConfig};

use self::call::{Call, Hedge, RACED_WHOLE_BYTES_MAX};
use self::failure::Failure;
use crate::api::{check_prefix, check_ranges};
use crate::faulty::sort_and_drop_repeats;
use crate::open::S3Location;
use crate::{Bucket, BucketError, ErrorKind, Meters, ObjectInfo, ObjectName, Operation, Options, PutOutcome};

/// Ranges nearer than this share a request: the bytes between cost less than another round trip.
const COALESCE_GAP_BYTES: u64 = 64 << 10;
/// Ranges are merged up to this; larger ones of the caller are fetched in one piece all the same.
const COALESCED_BYTES_MAX: u64 = 8 << 20;
/// Requests of one call that are under way at once.
const CONCURRENCY: usize = 4;
/// Keys in one delete request, as S3 limits it.
const DELETE_BATCH: usize = 1000;
/// Pages of one listing: a hundred million objects.
const LIST_PAGES_MAX: usize = 100_000;

/// A prefix of an S3 bucket. Dropping it ends its threads.
pub struct S3Bucket {
    store: AmazonS3,
    prefix: String,
    /// For people: bucket and endpoint.
    place: String,
    deadline: Duration,
    whole_bytes_max: usize,
    part_bytes: usize,
    meters: Meters,
    hedge: Hedge,
    /// The store has refused a conditional put, as it must.
    keeps_conditions: AtomicBool,
    /// The store has shown that the bucket exists. (To a HEAD it says 404 either way.)
    exists: AtomicBool,
    /// Taken by `drop` alone.
    runtime: Option<tokio::runtime::Runtime>,
}

impl S3Bucket {
    /// Prepares requests to `location`; sends none. Refused: no credentials in sight, no region, a TLS that cannot work.
    pub(crate) fn open(location: &S3Location, options: &Options) -> Result<Self, BucketError> {
        let name = ObjectName::from_listing(format!("s3://{}/{}", location.bucket, location.prefix));
        let refuse = |kind, message: String| BucketError::new(kind, "OPEN", &name, message);
        let environment = &*options.environment;
        let endpoint = location
            .endpoint
            .clone()
            .or_else(|| environment("AWS_ENDPOINT_URL_S3"))
            .or_else(|| environment("AWS_ENDPOINT_URL"));
        let profile = credentials::Profile::load(environment).map_err(|m| refuse(ErrorKind::Denied, m))?;
        let region = location
            .region
            .clone()
            .or_else(|| environment("AWS_REGION"))
            .or_else(|| environment("AWS_DEFAULT_REGION"))
            .or_else(|| profile.region.clone());
        let region = match (region, &endpoint) {
            (Some(region), _) => region,
            (None, Some(_)) => "us-east-1".to_owned(),
            (None, None) => {
                let message = "the region is not known; set AWS_REGION or add ?region=… to the URL";
                return Err(refuse(ErrorKind::BadRequest, message.into()));
            }
        };
        let path_style = location.path_style.unwrap_or(endpoint.is_some() || location.bucket.contains('.'));
        let with_tls = endpoint.as_ref().is_none_or(|endpoint| endpoint.starts_with("https://"));
        let http = http::Http::new(environment, with_tls).map_err(|m| refuse(ErrorKind::BadRequest, m))?;

        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&location.bucket)
            .with_region(&region)
            .with_virtual_hosted_style_request(!path_style)
            .with_crypto_provider(Arc::new(crypto::Crypto))
            .with_http_connector(http)
            // One request for each call: tries are counted, bounded and understood here.
            .with_retry(RetryConfig { max_retries: 0, ..RetryConfig::default() });
        if let Some(endpoint) = &endpoint {
            let endpoint =
                if path_style { endpoint.clone() } else { with_bucket_in_host(endpoint, location) };
            builder = builder.with_allow_http(!with_tls).with_endpoint(endpoint);
        }
        builder = credentials::configure(builder, environment, profile)
            .map_err(|message| refuse(ErrorKind::Denied, message))?;
        if let Some(endpoint) = environment("AWS_EC2_METADATA_SERVICE_ENDPOINT") {
            builder = builder.with_config(AmazonS3ConfigKey::MetadataEndpoint, endpoint);
        }
        let store = builder.build().map_err(|error| refuse(ErrorKind::BadRequest, failure::chain(&error)))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(8)
            .thread_name("bucket-s3")
            .enable_all()
            .build()
            .map_err(|error| {
                refuse(ErrorKind::Unavailable, format!("no thread for network requests: {error}"))
            })?;
        Ok(Self {
            store,
            prefix: location.prefix.clone(),
            place: format!("s3://{} at {}", location.bucket, endpoint.as_deref().unwrap_or("Amazon")),
            deadline: options.deadline,
            whole_bytes_max: options.whole_bytes_max,
            part_bytes: options.part_bytes,
            meters: Meters::default(),
            hedge: Hedge::default(),
            keeps_conditions: AtomicBool::new(false),
            exists: AtomicBool::new(false),
            runtime: Some(runtime),
        })
    }

    fn run<T>(&self, call: impl Future<Output = T>) -> T {
        self.runtime.as_ref().expect("only drop takes the runtime").block_on(call)
    }

    fn path(&self, operation: Operation, name: &ObjectName) -> Result<Path, BucketError> {
        let key = self.key(name);
        Path::parse(&key).ok().filter(|path| path.as_ref() == key).ok_or_else(|| {
            BucketError::new(ErrorKind::BadRequest, operation.as_str(), name, "no object can have this name")
        })
    }

    fn key(&self, name: &ObjectName) -> String {
        match self.prefix.as_str() {
            "" => name.as_str().to_owned(),
            prefix => format!("{prefix}/{name}"),
        }
    }

    fn call<'a>(&'a self, operation: Operation, name: &'a ObjectName, bytes: u64) -> Call<'a> {
        let meter = self.meters.of(operation);
        Call { operation, name, bytes, deadline: self.deadline, meter, place: &self.place }
    }

    fn no_conditions(&self, name: &ObjectName) -> BucketError {
        let message = format!(
            "the store ignores If-None-Match, so two servers could overwrite each other's manifests; Cistern needs a store \
             with conditional writes; {}",
            self.place
        );
        BucketError::new(ErrorKind::BadRequest, "PUT", name, message)
    }

    async fn put_whole(
        &self,
        path: &Path,
        call: &Call<'_>,
        body: Bytes,
        mode: PutMode,
    ) -> Result<PutOutcome, BucketError> {
        call.send(async |seen| {
            let options = PutOptions::from(mode.clone());
            match self.store.put_opts(path, body.clone().into(), options).await {
                Ok(_) => Ok(PutOutcome::Created),
                // 409 says that another request is under way, not that the object is there; object_store does not tell
                // them apart.
                Err(_) if mode == PutMode::Create && matches!(seen.status(), Some(412 | 304)) => {
                    Ok(PutOutcome::Exists)
                }
                Err(error) => Err(error.into()),
            }
        })
        .await
    }

    async fn put_in_parts(&self, path: &Path, name: &ObjectName, body: &Bytes) -> Result<(), BucketError> {
        let part_bytes = self.part_bytes.max(body.len().div_ceil(10_000));
        let call = self.call(Operation::Put, name, 0);
        let upload = call.send(async |_| Ok(self.store.create_multipart(path).await?)).await?;
        let parts = (0..body.len()).step_by(part_bytes).enumerate().map(|(number, at)| {
            let part = body.slice(at..body.len().min(at + part_bytes));
            let (upload, path) = (&upload, path);
            async move {
                let call = self.call(Operation::Put, name, part.len() as u64);
                call.send(async |_| {
                    Ok(self.store.put_part(path, upload, number, part.clone().into()).await?)
                })
                .await
            }
        });
        let uploaded: Result<Vec<PartId>, _> = stream::iter(parts).buffered(CONCURRENCY).try_collect().await;
        let finished = match uploaded {
            Ok(parts) => self.finish_upload(path, name, &upload, parts, body.len()).await,
            Err(error) => Err(error),
        };
        match finished {
            Ok(()) => Ok(()),
            Err(mut error) => {
                self.abort_upload(path, &upload).await;
                // What is not found is the upload (somebody else aborted it), not the object that the caller means.
                if error.kind == ErrorKind::NotFound {
                    error.kind = ErrorKind::Unavailable;
                }
                Err(error)
            }
        }
    }

    async fn finish_upload(
        &self,
        path: &Path,
        name: &ObjectName,
        upload: &String,
        parts: Vec<PartId>,
        length: usize,
    ) -> Result<(), BucketError> {
        let call = self.call(Operation::Put, name, 0);
        call.send(async |seen| {
            match self.store.complete_multipart(path, upload, parts.clone()).await {
                Ok(_) => Ok(()),
                // An earlier try finished the upload and its answer was lost. The name is used once, so what is there
                // under it is ours.
                Err(error) if seen.code().as_deref() == Some("NoSuchUpload") => {
                    match self.store.get_opts(path, GetOptions { head: true, ..Default::default() }).await {
                        Ok(found) if found.meta.size == length as u64 => Ok(()),
                        _ => Err(error.into()),
                    }
                }
                Err(error) => Err(error.into()),
            }
        })
        .await
    }

    /// Best effort: parts left behind cost money until the bucket's lifecycle rule removes them.
    async fn abort_upload(&self, path: &Path, upload: &String) {
        let abort = self.store.abort_multipart(path, upload);
        if !matches!(tokio::time::timeout(Duration::from_secs(5), abort).await, Ok(Ok(()))) {
            tracing::warn!(%path, "an unfinished multipart upload stays in the bucket");
        }
        self.meters.put.count(0);
    }

    /// A range of an object, or all of it; and how long the object is.
    async fn read(
        &self,
        path: &Path,
        name: &ObjectName,
        range: Option<Range<u64>>,
    ) -> Result<(Bytes, u64), BucketError> {
        let bytes = range.as_ref().map(|range| range.end - range.start);
        let ask = || async {
            let range = range.clone().map(GetRange::Bounded);
            Ok(self.store.get_opts(path, GetOptions { range, ..Default::default() }).await?)
        };
        let receive = |answer: GetResult| async {
            let (size, expected) = (answer.meta.size, answer.range.end - answer.range.start);
            let body = answer.bytes().await.map_err(|error| Failure::Torn(failure::chain(&error)))?;
            if body.len() as u64 != expected {
                return Err(Failure::Torn(format!("{} of {expected} bytes arrived", body.len())));
            }
            Ok((body, size))
        };
        let hedged = &self.meters.hedged;
        let call = self.call(Operation::Get, name, bytes.unwrap_or(0));
        call.send(async |_| match bytes {
            Some(..=RACED_WHOLE_BYTES_MAX) => {
                self.hedge.first_of(hedged, || async { receive(ask().await?).await }).await
            }
            _ => receive(self.hedge.first_of(hedged, ask).await?).await,
        })
        .await
    }

    async fn fetch_ranges(
        &self,
        path: &Path,
        name: &ObjectName,
        ranges: &[Range<u64>],
    ) -> Result<Vec<Bytes>, BucketError> {
        let pieces = coalesce(ranges);
        let fetches = pieces.iter().map(|piece| self.read(path, name, Some(piece.clone())));
        let fetched: Vec<(Bytes, u64)> = stream::iter(fetches).buffered(CONCURRENCY).try_collect().await?;
        let size = match fetched.first() {
            Some((_, size)) => *size,
            None => self.length(path, name).await?.ok_or_else(|| {
                BucketError::new(ErrorKind::NotFound, "GET", name, "there is no such object")
            })?,
        };
        check_ranges(name, size, ranges)?;
        Ok(ranges
            .iter()
            .map(|range| {
                let Some(at) = pieces.iter().position(|piece| !range.is_empty() && contains(piece, range))
                else {
                    return Bytes::new();
                };
                let start = (range.start - pieces[at].start) as usize;
                fetched[at].0.slice(start..start + (range.end - range.start) as usize)
            })
            .collect())
    }

    async fn length(&self, path: &Path, name: &ObjectName) -> Result<Option<u64>, BucketError> {
        let call = self.call(Operation::Head, name, 0);
        let found = call
            .send(async |_| {
                let options = GetOptions { head: true, ..Default::default() };
                Ok(self.store.get_opts(path, options).await?.meta.size)
            })
            .await;
        match found {
            Ok(length) => Ok(Some(length)),
            Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn list_page(
        &self,
        prefix: &ObjectName,
        key: &str,
        token: Option<String>,
    ) -> Result<(Vec<ObjectInfo>, Option<String>), BucketError> {
        let call = self.call(Operation::List, prefix, 0);
        call.send(async |_| {
            let options = PaginatedListOptions { page_token: token.clone(), ..Default::default() };
            let page = self.store.list_paginated(Some(key).filter(|key| !key.is_empty()), options).await?;
            let skip = if self.prefix.is_empty() { 0 } else { self.prefix.len() + 1 };
            let objects = page.result.objects.into_iter().filter_map(|object| {
                // A marker that some tools leave for an empty directory is not below the directory.
                let name = object.location.as_ref().get(skip..)?;
                let below = object.location.as_ref().starts_with(key);
                below.then(|| ObjectInfo { name: ObjectName::from_listing(name), bytes: object.size })
            });
            Ok((objects.collect(), page.page_token))
        })
        .await
    }
}

impl Bucket for S3Bucket {
    fn put_if_absent(&self, name: &ObjectName, body: Bytes) -> Result<PutOutcome, BucketError> {
        let path = self.path(Operation::Put, name)?;
        let put = || {
            let call = self.call(Operation::Put, name, body.len() as u64);
            self.run(self.put_whole(&path, &call, body.clone(), PutMode::Create))
        };
        let outcome = put()?;
        if outcome == PutOutcome::Created && !self.keeps_conditions.load(Ordering::Relaxed) {
            // Once for each process: a store that takes the same name twice does so to two servers as well. No answer
            // is no proof of that; the next new object will ask again.
            match put() {
                Ok(PutOutcome::Created) => return Err(self.no_conditions(name)),
                Ok(PutOutcome::Exists) => self.keeps_conditions.store(true, Ordering::Relaxed),
                Err(_) => (),
            }
        }
        Ok(outcome)
    }

    fn put(&self, name: &ObjectName, body: Bytes) -> Result<(), BucketError> {
        let path = self.path(Operation::Put, name)?;
        self.run(async {
            if body.len() > self.whole_bytes_max {
                return self.put_in_parts(&path, name, &body).await;
            }
            let call = self.call(Operation::Put, name, body.len() as u64);
            self.put_whole(&path, &call, body, PutMode::Overwrite).await.map(drop)
        })
    }

    fn get(&self, name: &ObjectName) -> Result<Bytes, BucketError> {
        let path = self.path(Operation::Get, name)?;
        let (body, _) = self.run(self.read(&path, name, None))?;
        self.meters.get.count_bytes(body.len() as u64);
        Ok(body)
    }

    fn get_ranges(&self, name: &ObjectName, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, BucketError> {
        check_ranges(name, u64::MAX, ranges)?;
        if ranges.is_empty() {
            return Ok(Vec::new());
        }
        let path = self.path(Operation::Get, name)?;
        self.run(self.fetch_ranges(&path, name, ranges))
    }

    fn head(&self, name: &ObjectName) -> Result<Option<u64>, BucketError> {
        let path = self.path(Operation::Head, name)?;
        let length = self.run(self.length(&path, name))?;
        if length.is_none() && !self.exists.load(Ordering::Relaxed) {
            // A listing tells a missing object from a missing bucket.
            self.run(self.list_page(name, path.as_ref(), None))?;
        }
        self.exists.store(true, Ordering::Relaxed);
        Ok(length)
    }

    fn list(&self, prefix: &ObjectName) -> Result<Vec<ObjectInfo>, BucketError> {
        check_prefix(prefix)?;
        let key = self.key(prefix);
        let mut listing = Vec::new();
        let mut token = None;
        for _ in 0..LIST_PAGES_MAX {
            let (objects, next) = self.run(self.list_page(prefix, &key, token.clone()))?;
            listing.extend(objects);
            if next.is_none() {
                sort_and_drop_repeats(&mut listing);
                return Ok(listing);
            }
            if next == token {
                break;
            }
            token = next;
        }
        let message = format!("the listing does not end; {}", self.place);
        Err(BucketError::new(ErrorKind::Unavailable, "LIST", prefix, message))
    }

    fn delete(&self, names: &[ObjectName]) -> Result<(), BucketError> {
        for batch in names.chunks(DELETE_BATCH) {
            let paths: Vec<Path> =
                batch.iter().map(|name| self.path(Operation::Delete, name)).collect::<Result<_, _>>()?;
            let call = self.call(Operation::Delete, &batch[0], 0);
            self.run(call.send(async |_| {
                let paths = stream::iter(paths.clone()).map(Ok).boxed();
                let mut deleted = self.store.delete_stream(paths);
                while let Some(deleted) = deleted.next().await {
                    drop(deleted?);
                }
                Ok(())
            }))?;
        }
        Ok(())
    }

    fn meters(&self) -> &Meters {
        &self.meters
    }
}

impl Drop for S3Bucket {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A name lookup that hangs must not hang the server's end.
            runtime.shutdown_timeout(Duration::from_secs(2));
        }
    }
}

impl fmt::Debug for S3Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Bucket")
            .field("place", &self.place)
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

fn with_bucket_in_host(endpoint: &str, location: &S3Location) -> String {
    match endpoint.split_once("://") {
        Some((scheme, host)) => format!("{scheme}://{}.{host}", location.bucket),
        None => endpoint.to_owned(),
    }
}

fn contains(outer: &Range<u64>, inner: &Range<u64>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

/// The requests to make for `ranges`: sorted, near ones merged, empty ones left out.
fn coalesce(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut sorted: Vec<Range<u64>> = ranges.iter().filter(|range| !range.is_empty()).cloned().collect();
    sorted.sort_by_key(|range| (range.start, range.end));
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if contains(last, &range) => (),
            Some(last)
                if range.start <= last.end.saturating_add(COALESCE_GAP_BYTES)
                    && range.end - last.start <= COALESCED_BYTES_MAX =>
            {
                last.end = last.end.max(range.end);
            }
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::single_range_in_vec_init, reason = "one range is what is expected")]
    #[test]
    fn near_ranges_share_a_request_and_far_or_large_ones_do_not() {
        let gap = COALESCE_GAP_BYTES;
        assert_eq!(coalesce(&[10..20, 0..5, 7..7, 3..12]), [0..20]);
        assert_eq!(coalesce(&[0..10, 10 + gap..20 + gap]), [0..20 + gap]);
        assert_eq!(coalesce(&[0..10, 11 + gap..20 + gap]), [0..10, 11 + gap..20 + gap]);
        let large = COALESCED_BYTES_MAX;
        assert_eq!(coalesce(&[0..large, large..large + 1]), [0..large, large..large + 1]);
        assert_eq!(coalesce(&[0..large * 2, 5..6]), [0..large * 2]);
    }
}
