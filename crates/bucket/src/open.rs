//! From a URL to a bucket.
//!
//! * A URL never holds a secret: one that does is refused, and never repeated in the message.
//! * Opening a directory checks that it is there. Opening S3 sends nothing: the first request tells.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::{Bucket, BucketError, DirectoryBucket, ErrorKind, ObjectName};

/// What is not in the URL.
#[derive(Clone)]
pub struct Options {
    /// How long a call tries before it answers [`ErrorKind::Unavailable`].
    pub deadline: Duration,
    /// Bodies up to this travel in one request: each part of a larger one is paid for, and so are its beginning and its end.
    pub whole_bytes_max: usize,
    /// Larger ones travel in parts of this size. S3 takes parts from 5 MiB.
    pub part_bytes: usize,
    /// Looks up an environment variable: credentials and regions come from there.
    pub environment: Environment,
}

/// Looks up an environment variable.
pub type Environment = Arc<dyn Fn(&str) -> Option<String> + Send + Sync>;

impl Default for Options {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(60),
            whole_bytes_max: 96 << 20,
            part_bytes: 8 << 20,
            environment: Arc::new(|variable| std::env::var(variable).ok().filter(|value| !value.is_empty())),
        }
    }
}

/// Opens `file:///directory`, or `s3://bucket/prefix?endpoint=https://…&region=…&path_style=true`, where each parameter
/// is optional: without an endpoint it is Amazon's, unless `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` is set. An
/// endpoint that starts with `http://` is used without TLS.
pub fn open(url: &str, options: &Options) -> Result<Arc<dyn Bucket>, BucketError> {
    let location = Location::parse(url).map_err(|message| refuse(url, message))?;
    match location {
        Location::Directory(path) => Ok(Arc::new(DirectoryBucket::open(Path::new(&path))?)),
        #[cfg(feature = "s3")]
        Location::S3(location) => Ok(Arc::new(crate::s3::S3Bucket::open(&location, options)?)),
        #[cfg(not(feature = "s3"))]
        Location::S3(_) => {
            let _built_without = options;
            Err(refuse(url, "this build has no S3 client (cargo feature `s3`)".to_owned()))
        }
    }
}

fn refuse(url: &str, message: String) -> BucketError {
    // What stands before an `@` may be a password, and what a parameter holds may be a key.
    let shown = url.split('?').next().unwrap_or_default();
    if shown.trim_start_matches("s3://").contains(':') && shown.starts_with("s3://") {
        return BucketError::new(ErrorKind::BadRequest, "OPEN", &ObjectName::from_listing("s3://…"), message);
    }
    let shown = match shown.rsplit_once('@') {
        Some((_, after)) => format!("…@{after}"),
        None => shown.to_owned(),
    };
    BucketError::new(ErrorKind::BadRequest, "OPEN", &ObjectName::from_listing(shown), message)
}

/// Where a bucket is, as its URL says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    Directory(String),
    S3(S3Location),
}

/// A prefix in a bucket of an S3-compatible store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct S3Location {
    pub bucket: String,
    /// Without slashes at its ends; may be empty.
    pub prefix: String,
    pub endpoint: Option<String>,
    pub region: Option<String>,
    pub path_style: Option<bool>,
}

impl Location {
    pub(crate) fn parse(url: &str) -> Result<Self, String> {
        let Some((scheme, rest)) = url.split_once("://") else {
            let example = "file:///var/lib/cistern/bucket or s3://bucket/prefix";
            return Err(format!("a bucket's URL looks like {example}"));
        };
        match scheme {
            "file" => parse_directory(rest),
            "s3" => S3Location::parse(rest).map(Self::S3),
            _ => Err(format!("{scheme}:// is not supported; file:// and s3:// are")),
        }
    }
}

fn parse_directory(rest: &str) -> Result<Location, String> {
    let path = rest.strip_prefix("localhost").unwrap_or(rest);
    if !path.starts_with('/') {
        return Err("a directory's URL has three slashes and an absolute path: file:///path".to_owned());
    }
    if path.contains(['?', '#']) {
        return Err("a directory's URL takes no parameters; write ? as %3F and # as %23".to_owned());
    }
    Ok(Location::Directory(percent_decode(path)?))
}

impl S3Location {
    fn parse(rest: &str) -> Result<Self, String> {
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        if path.contains('@') {
            return Err(
                "credentials do not belong into a URL; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                    .into(),
            );
        }
        let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
        let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        if bucket.is_empty() || !bucket.bytes().all(fits) {
            // Not quoted: it may be a key that lost its `@`.
            return Err("what stands before the first / is no name of a bucket".into());
        }
        let prefix = percent_decode(prefix)?.trim_matches('/').to_owned();
        if prefix.split('/').any(|part| matches!(part, "." | "..")) || prefix.contains("//") {
            return Err(format!("the prefix {prefix:?} has an empty part, '.' or '..'"));
        }
        let mut location = Self { bucket: bucket.to_owned(), prefix, ..Self::default() };
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            location.set(key, percent_decode(value)?)?;
        }
        Ok(location)
    }

    fn set(&mut self, key: &str, value: String) -> Result<(), String> {
        match key {
            "endpoint" => {
                let (scheme, host) = value.split_once("://").unwrap_or(("", ""));
                if !matches!(scheme, "http" | "https") || host.is_empty() || host.contains(['@', '?', '#']) {
                    return Err("the endpoint must look like https://host:port, without credentials".into());
                }
                self.endpoint = Some(value.trim_end_matches('/').to_owned());
            }
            "region" => self.region = Some(value),
            "path_style" => {
                self.path_style = Some(match value.as_str() {
                    "true" | "1" | "" => true,
                    "false" | "0" => false,
                    _ => return Err(format!("path_style is true or false, not {value:?}")),
                });
            }
            _ => return Err(format!("{key:?} is no parameter; endpoint, region and path_style are")),
        }
        Ok(())
    }
}

pub(crate) fn percent_decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.ok_or_else(|| format!("{text:?} has a % without two hexadecimal digits"))?);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| format!("{text:?} is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s3(url: &str) -> S3Location {
        match Location::parse(url).unwrap() {
            Location::S3(location) => location,
            Location::Directory(path) => panic!("{url} is {path}"),
        }
    }

    fn message(url: &str) -> String {
        match open(url, &Options::default()) {
            Ok(_) => panic!("{url} was opened"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_directory_is_an_absolute_path() {
        assert_eq!(Location::parse("file:///a%20b/c").unwrap(), Location::Directory("/a b/c".into()));
        assert_eq!(Location::parse("file://localhost/a").unwrap(), Location::Directory("/a".into()));
        assert!(message("file://data/bucket").contains("three slashes"));
        assert!(message("/data/bucket").contains("file:///"));
    }

    #[test]
    fn an_s3_url_names_bucket_prefix_and_how_to_reach_them() {
        assert_eq!(s3("s3://shop").bucket, "shop");
        let location = s3("s3://shop/a/b/?endpoint=http://127.0.0.1:9000/&region=eu-west-1&path_style=true");
        assert_eq!((location.bucket.as_str(), location.prefix.as_str()), ("shop", "a/b"));
        assert_eq!(location.endpoint.as_deref(), Some("http://127.0.0.1:9000"));
        assert_eq!(location.region.as_deref(), Some("eu-west-1"));
        assert_eq!(location.path_style, Some(true));
        assert_eq!(
            s3("s3://shop?endpoint=https%3A%2F%2Fhost%3A1").endpoint.as_deref(),
            Some("https://host:1")
        );
    }

    #[test]
    fn a_url_that_cannot_work_is_refused_with_the_reason() {
        for (url, words) in [
            ("s3://", "no name of a bucket"),
            ("s3://a b/", "no name of a bucket"),
            ("s3://shop/a/../b", "'..'"),
            ("s3://shop?endpoint=host:9000", "must look like https://host:port"),
            ("s3://shop?path_style=maybe", "true or false"),
            ("s3://shop?regoin=x", "is no parameter"),
            ("gs://shop", "not supported"),
            ("file:///a?b=c", "no parameters"),
            ("file:///a%zz", "hexadecimal"),
        ] {
            assert!(message(url).contains(words), "{url}: {}", message(url));
        }
    }

    #[test]
    fn a_secret_in_a_url_is_refused_and_not_repeated() {
        for url in [
            "s3://AKIA:hunter2@shop/prefix",
            "s3://shop?secret_access_key=hunter2",
            "s3://shop?endpoint=https://key:hunter2@host",
            "s3://AKIA:hunter2/x@shop/prefix",
            "s3://AKIA:hunter2/x",
            "file://me:hunter2@host/x",
        ] {
            let message = message(url);
            assert!(!message.contains("hunter2"), "{message}");
        }
    }
}
