//! The S3 protocol over any bucket: as much as an S3 client of ours may ask, path style.
//!
//! * Signatures (SigV4) and the digests of bodies are checked, so a client that signs wrongly fails here as it would there.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::http::{Request, Response, decode};
use super::proxy::failed;
use crate::{Bucket, BucketError, ErrorKind, ObjectName, PutOutcome};

/// The one pair of keys that is let in.
#[derive(Clone)]
pub struct Keys {
    /// Access key id.
    pub id: String,
    /// Secret access key.
    pub secret: String,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("id", &self.id).finish_non_exhaustive()
    }
}

/// One bucket, by its name.
pub struct S3OverBucket {
    name: String,
    bucket: Arc<dyn Bucket>,
    keys: Keys,
    page: usize,
    conditions: bool,
    uploads: Mutex<Uploads>,
}

#[derive(Debug, Default)]
struct Uploads {
    last: u64,
    parts: HashMap<String, BTreeMap<u32, Bytes>>,
}

impl S3OverBucket {
    /// Serves `bucket` as `name`.
    pub fn new(name: &str, bucket: Arc<dyn Bucket>, keys: Keys) -> Self {
        Self { name: name.into(), bucket, keys, page: 1000, conditions: true, uploads: Mutex::default() }
    }

    /// Lists this many objects in a page.
    pub fn with_page(mut self, page: usize) -> Self {
        self.page = page;
        self
    }

    /// Ignores `If-None-Match`, as old stores do.
    pub fn without_conditions(mut self) -> Self {
        self.conditions = false;
        self
    }

    pub(super) fn answer(&self, request: &Request) -> Response {
        self.try_answer(request).unwrap_or_else(|refusal| refusal)
    }

    fn try_answer(&self, request: &Request) -> Result<Response, Response> {
        self.check_signature(request)?;
        let path = request.path().trim_start_matches('/');
        let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
        if decode(bucket) != self.name {
            return Err(failed(404, "NoSuchBucket"));
        }
        let name = ObjectName::from_listing(decode(key));
        let parameter = |name: &str| request.parameter(name);
        match (request.method.as_str(), key.is_empty()) {
            ("GET", true) => self.list(request),
            ("POST", true) if parameter("delete").is_some() => self.delete_batch(request),
            ("PUT", false) => match (parameter("uploadId"), parameter("partNumber")) {
                (Some(upload), Some(number)) => self.put_part(request, &upload, &number),
                _ => self.put(request, &name),
            },
            ("POST", false) if parameter("uploads").is_some() => Ok(self.start_upload()),
            ("POST", false) => self.complete_upload(&name, &parameter("uploadId").unwrap_or_default()),
            ("GET", false) => self.get(request, &name),
            ("HEAD", false) => self.head(&name),
            ("DELETE", false) => match parameter("uploadId") {
                Some(upload) => {
                    self.uploads.lock().parts.remove(&upload);
                    Ok(ok(204, Vec::new()))
                }
                None => self.bucket.delete(&[name]).map_err(refusal).map(|()| ok(204, Vec::new())),
            },
            _ => Err(failed(405, "MethodNotAllowed")),
        }
    }

    fn put(&self, request: &Request, name: &ObjectName) -> Result<Response, Response> {
        let body = Bytes::from(request.body.clone());
        let etag = etag(body.len() as u64);
        if self.conditions && request.header("if-none-match") == Some("*") {
            if self.bucket.put_if_absent(name, body).map_err(refusal)? == PutOutcome::Exists {
                return Err(failed(412, "PreconditionFailed"));
            }
        } else {
            self.bucket.put(name, body).map_err(refusal)?;
        }
        Ok(with_header(ok(200, Vec::new()), "etag", etag))
    }

    fn start_upload(&self) -> Response {
        let mut uploads = self.uploads.lock();
        uploads.last += 1;
        let id = format!("upload-{}", uploads.last);
        uploads.parts.insert(id.clone(), BTreeMap::new());
        xml(&format!(
            "<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
        ))
    }

    fn put_part(&self, request: &Request, upload: &str, number: &str) -> Result<Response, Response> {
        let number = number.parse().map_err(|_| failed(400, "InvalidArgument"))?;
        let body = Bytes::from(request.body.clone());
        let etag = etag(body.len() as u64);
        let mut uploads = self.uploads.lock();
        uploads.parts.get_mut(upload).ok_or_else(|| failed(404, "NoSuchUpload"))?.insert(number, body);
        Ok(with_header(ok(200, Vec::new()), "etag", etag))
    }

    fn complete_upload(&self, name: &ObjectName, upload: &str) -> Result<Response, Response> {
        let parts = self.uploads.lock().parts.get(upload).cloned();
        let parts = parts.ok_or_else(|| failed(404, "NoSuchUpload"))?;
        let mut body = Vec::new();
        parts.values().for_each(|part| body.extend_from_slice(part));
        let etag = etag(body.len() as u64);
        self.bucket.put(name, body.into()).map_err(refusal)?;
        self.uploads.lock().parts.remove(upload);
        let location = "<Location>here</Location>";
        Ok(xml(&format!(
            "<CompleteMultipartUploadResult>{location}<ETag>{}</ETag></CompleteMultipartUploadResult>",
            escape(&etag)
        )))
    }

    fn get(&self, request: &Request, name: &ObjectName) -> Result<Response, Response> {
        let range = request.header("range").and_then(|range| range.strip_prefix("bytes="));
        let Some((from, to)) = range.and_then(|range| range.split_once('-')) else {
            let body = self.bucket.get(name).map_err(refusal)?;
            let etag = etag(body.len() as u64);
            return Ok(with_header(ok(200, body.to_vec()), "etag", etag));
        };
        let length = self.bucket.head(name).map_err(refusal)?.ok_or_else(|| failed(404, "NoSuchKey"))?;
        let from: u64 = from.parse().map_err(|_| failed(400, "InvalidArgument"))?;
        if from >= length {
            return Err(failed(416, "InvalidRange"));
        }
        let to = to.parse().unwrap_or(u64::MAX).min(length - 1);
        let body =
            self.bucket.get_ranges(name, std::slice::from_ref(&(from..to + 1))).map_err(refusal)?.concat();
        let response = with_header(ok(206, body), "content-range", format!("bytes {from}-{to}/{length}"));
        Ok(with_header(response, "etag", etag(length)))
    }

    fn head(&self, name: &ObjectName) -> Result<Response, Response> {
        let length = self.bucket.head(name).map_err(refusal)?;
        let Some(length) = length else {
            return Err(Response { body: Vec::new(), length: Some(0), ..failed(404, "NoSuchKey") });
        };
        Ok(with_header(Response { length: Some(length), ..ok(200, Vec::new()) }, "etag", etag(length)))
    }

    fn list(&self, request: &Request) -> Result<Response, Response> {
        let prefix = request.parameter("prefix").unwrap_or_default();
        let directory = prefix.rfind('/').map_or("", |at| &prefix[..=at]);
        let listing = self.bucket.list(&ObjectName::from_listing(directory)).map_err(refusal)?;
        let after = request.parameter("continuation-token").unwrap_or_default();
        let fits = |name: &str| name.starts_with(&prefix) && (after.is_empty() || name > after.as_str());
        let mut objects: Vec<_> = listing.iter().filter(|object| fits(object.name.as_str())).collect();
        let more = objects.len() > self.page;
        objects.truncate(self.page);
        let mut body = format!("<ListBucketResult><IsTruncated>{more}</IsTruncated>");
        if let (true, Some(last)) = (more, objects.last()) {
            let token = escape(last.name.as_str());
            body.push_str(&format!("<NextContinuationToken>{token}</NextContinuationToken>"));
        }
        for object in objects {
            body.push_str(&format!(
                "<Contents><Key>{}</Key><Size>{}</Size><LastModified>2026-11-23T00:00:00.000Z</LastModified>\
                 <ETag>&quot;list&quot;</ETag></Contents>",
                escape(object.name.as_str()),
                object.bytes
            ));
        }
        Ok(xml(&(body + "</ListBucketResult>")))
    }

    fn delete_batch(&self, request: &Request) -> Result<Response, Response> {
        let text = String::from_utf8_lossy(&request.body);
        let names: Vec<_> = text
            .split("<Key>")
            .skip(1)
            .filter_map(|rest| rest.split("</Key>").next())
            .map(|key| ObjectName::from_listing(unescape(key)))
            .collect();
        self.bucket.delete(&names).map_err(refusal)?;
        let deleted =
            names.iter().map(|name| format!("<Deleted><Key>{}</Key></Deleted>", escape(name.as_str())));
        Ok(xml(&format!("<DeleteResult>{}</DeleteResult>", deleted.collect::<String>())))
    }

    /// Computes the signature anew, as Amazon's documentation of SigV4 tells.
    fn check_signature(&self, request: &Request) -> Result<(), Response> {
        let header = |name: &str| request.header(name).unwrap_or_default();
        let part = |name: &str| {
            let (_, rest) = header("authorization").split_once(&format!("{name}="))?;
            rest.split([',', ' ']).next()
        };
        let (Some(credential), Some(signed), Some(signature)) =
            (part("Credential"), part("SignedHeaders"), part("Signature"))
        else {
            return Err(failed(403, "AccessDenied"));
        };
        let Some((id, scope)) = credential.split_once('/') else { return Err(failed(403, "AccessDenied")) };
        if id != self.keys.id {
            return Err(failed(403, "InvalidAccessKeyId"));
        }
        let digest = header("x-amz-content-sha256");
        if digest != "UNSIGNED-PAYLOAD" && digest != hex(&Sha256::digest(&request.body)) {
            return Err(failed(400, "XAmzContentSHA256Mismatch"));
        }
        // Decoded and encoded anew: clients may write a space as `+`.
        let query = request.query().into_iter();
        let mut query: Vec<_> =
            query.map(|(key, value)| format!("{}={}", encode(&key), encode(&value))).collect();
        query.sort();
        let headers: String = signed.split(';').map(|name| format!("{name}:{}\n", header(name))).collect();
        let canonical = format!(
            "{}\n{}\n{}\n{headers}\n{signed}\n{digest}",
            request.method,
            request.path(),
            query.join("&")
        );
        let to_sign = format!(
            "AWS4-HMAC-SHA256\n{}\n{scope}\n{}",
            header("x-amz-date"),
            hex(&Sha256::digest(canonical.as_bytes()))
        );
        let first = format!("AWS4{}", self.keys.secret).into_bytes();
        let key = scope.split('/').fold(first, |key, part| sign(&key, part));
        if hex(&sign(&key, &to_sign)) == signature {
            Ok(())
        } else {
            Err(failed(403, "SignatureDoesNotMatch"))
        }
    }
}

impl fmt::Debug for S3OverBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3OverBucket").field("name", &self.name).finish_non_exhaustive()
    }
}

fn sign(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("a key of HMAC may have any length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

fn encode(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~');
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Clients of ours want to see one and do not look at it.
fn etag(length: u64) -> String {
    format!("\"{length:x}\"")
}

fn ok(status: u16, body: Vec<u8>) -> Response {
    let headers = vec![("last-modified".to_owned(), "Mon, 23 Nov 2026 00:00:00 GMT".to_owned())];
    Response { status, headers, body, length: None }
}

fn xml(body: &str) -> Response {
    let body = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{body}");
    with_header(ok(200, body.into_bytes()), "content-type", "application/xml".into())
}

fn with_header(mut response: Response, name: &str, value: String) -> Response {
    response.headers.push((name.to_owned(), value));
    response
}

fn refusal(error: BucketError) -> Response {
    match error.kind {
        ErrorKind::NotFound => failed(404, "NoSuchKey"),
        ErrorKind::Unavailable => failed(503, "SlowDown"),
        ErrorKind::Denied => failed(403, "AccessDenied"),
        ErrorKind::BadRequest => failed(400, "InvalidRequest"),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&apos;", "'")
        .replace("&amp;", "&")
}
