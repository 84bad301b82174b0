//! What a failed try means, and what may be done about it.

use std::error::Error;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::ErrorKind;

/// Why a try failed.
pub(super) enum Failure {
    Store(object_store::Error),
    /// The answer did not arrive, or not whole.
    Torn(String),
    /// What [`Failure::explain`] said of it.
    Explained(Reaction, String),
}

impl From<object_store::Error> for Failure {
    fn from(error: object_store::Error) -> Self {
        Self::Store(error)
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reaction {
    /// Until the deadline.
    Retry,
    /// A few times: it is more likely wrong for good.
    RetryBriefly(ErrorKind),
    /// Never.
    Stop(ErrorKind),
}

/// What the HTTP client saw during one try; `object_store`'s errors tell it only as text.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen(Arc<Mutex<Answer>>);

#[derive(Clone, Debug, Default)]
struct Answer {
    status: Option<u16>,
    code: Option<String>,
    message: Option<String>,
    /// The request went to a service that hands out credentials, here.
    credentials_from: Option<String>,
    /// Why there is no answer.
    broken: Option<String>,
    broken_tls: bool,
}

tokio::task_local! {
    static SEEN: Seen;
}

impl Seen {
    /// Runs `attempt` and notes what its requests are answered.
    pub(super) async fn watch<T>(self, attempt: impl Future<Output = T>) -> T {
        SEEN.scope(self, attempt).await
    }

    pub(super) fn status(&self) -> Option<u16> {
        self.0.lock().status
    }

    pub(super) fn code(&self) -> Option<String> {
        self.0.lock().code.clone()
    }

    fn update(change: impl FnOnce(&mut Answer)) {
        // Outside of a watched try there is nobody to tell.
        let _nobody = SEEN.try_with(|seen| change(&mut seen.0.lock()));
    }

    /// `credentials_from`: the request asks this service for credentials, not the store for an object.
    pub(super) fn note_request(credentials_from: Option<&str>) {
        Self::update(|answer| {
            *answer = Answer { credentials_from: credentials_from.map(str::to_owned), ..Answer::default() };
        });
    }

    pub(super) fn note_status(status: u16) {
        Self::update(|answer| answer.status = Some(status));
    }

    pub(super) fn note_error_body(body: &str) {
        let element = |name: &str| {
            let (_, rest) = body.split_once(&format!("<{name}>"))?;
            Some(rest.split_once(&format!("</{name}>"))?.0.to_owned())
        };
        Self::update(|answer| {
            answer.code = element("Code");
            answer.message = element("Message");
        });
    }

    pub(super) fn note_broken(why: String, by_tls: bool) {
        Self::update(|answer| {
            answer.broken = Some(why);
            answer.broken_tls = by_tls;
        });
    }
}

impl Failure {
    /// Whether another try would end the same way. Only told of what is explained.
    pub(super) fn is_final(&self) -> bool {
        matches!(self, Self::Explained(Reaction::Stop(_), _))
    }

    /// The reaction, and words for a person.
    pub(super) fn explain(self, seen: &Seen) -> (Reaction, String) {
        let answer = seen.0.lock().clone();
        let error = match self {
            Self::Torn(message) => return (Reaction::Retry, message),
            Self::Explained(reaction, message) => return (reaction, message),
            Self::Store(error) => error,
        };
        if let (object_store::Error::Unauthenticated { .. }, None) = (&error, answer.status) {
            return (Reaction::Stop(ErrorKind::Denied), chain(&error));
        }
        if let Some(host) = answer.credentials_from {
            let message = format!(
                "no credentials: AWS_ACCESS_KEY_ID is not set, no profile has keys, and the role service at {host} \
                 did not give any: {}",
                answer.broken.unwrap_or_else(|| chain(&error))
            );
            return (Reaction::RetryBriefly(ErrorKind::Denied), message);
        }
        if answer.broken_tls {
            let why = answer.broken.unwrap_or_else(|| chain(&error));
            return (Reaction::Stop(ErrorKind::Denied), format!("TLS failed: {why}"));
        }
        match (answer.status, answer.code) {
            (None, _) => (Reaction::Retry, answer.broken.unwrap_or_else(|| chain(&error))),
            (Some(status @ 200..=299), _) => {
                let text = chain(&error);
                let passing = ["InternalError", "SlowDown", "ServiceUnavailable", "Interrupted"];
                if is_torn(&error) || passing.iter().any(|word| text.contains(word)) {
                    return (Reaction::Retry, text);
                }
                let message = format!("the answer ({status}) is not what S3 would say: {text}");
                (Reaction::RetryBriefly(ErrorKind::BadRequest), message)
            }
            (Some(status), code) => explain_status(status, code.as_deref(), answer.message.as_deref()),
        }
    }
}

/// A body that broke off is an I/O error somewhere down the chain.
fn is_torn(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<std::io::Error>() || error.is::<hyper::Error>() {
            return true;
        }
        next = error.source();
    }
    false
}

fn explain_status(status: u16, code: Option<&str>, message: Option<&str>) -> (Reaction, String) {
    use ErrorKind::{BadRequest, Denied, NotFound};
    let words = match (code, message) {
        (Some(code), Some(message)) => format!("the store answered {status} {code}: {message}"),
        (Some(code), None) => format!("the store answered {status} {code}"),
        _ => format!("the store answered {status}"),
    };
    let (reaction, advice) = match (status, code.unwrap_or_default()) {
        (_, "NoSuchBucket") => (Reaction::Stop(Denied), "create the bucket, or correct its name"),
        (_, "ExpiredToken" | "TokenRefreshRequired" | "RequestExpired") => {
            (Reaction::RetryBriefly(Denied), "the credentials have expired; renew them")
        }
        (_, "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken") => {
            (Reaction::Stop(Denied), "the credentials are wrong; check AWS_ACCESS_KEY_ID and its secret")
        }
        (_, "RequestTimeTooSkewed") => (Reaction::Stop(Denied), "this machine's clock is wrong"),
        (_, "AuthorizationHeaderMalformed" | "PermanentRedirect" | "TemporaryRedirect")
        | (301 | 307 | 308, _) => (Reaction::Stop(BadRequest), "the region or the endpoint is wrong"),
        // The store gave up on reading us, or what it read was damaged on the way.
        (400, "RequestTimeout" | "IncompleteBody" | "BadDigest" | "XAmzContentSHA256Mismatch") => {
            (Reaction::Retry, "")
        }
        (404, _) => (Reaction::Stop(NotFound), ""),
        (401 | 403, _) => (Reaction::Stop(Denied), "these credentials may not do this"),
        (501, _) => (Reaction::Stop(BadRequest), "the store lacks what Cistern needs"),
        (408 | 409 | 425 | 429 | 500.., _) => (Reaction::Retry, ""),
        _ => (Reaction::Stop(BadRequest), ""),
    };
    let message = if advice.is_empty() { words } else { format!("{words}; {advice}") };
    (reaction, message)
}

/// An error and its causes, each said once.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass_is_tried_again_and_what_a_person_must_mend_is_not() {
        for (status, code, reaction) in [
            (503, Some("SlowDown"), Reaction::Retry),
            (500, None, Reaction::Retry),
            (429, None, Reaction::Retry),
            (409, Some("ConditionalRequestConflict"), Reaction::Retry),
            (400, Some("RequestTimeout"), Reaction::Retry),
            (404, Some("NoSuchKey"), Reaction::Stop(ErrorKind::NotFound)),
            (404, None, Reaction::Stop(ErrorKind::NotFound)),
            (404, Some("NoSuchBucket"), Reaction::Stop(ErrorKind::Denied)),
            (403, Some("InvalidAccessKeyId"), Reaction::Stop(ErrorKind::Denied)),
            (403, None, Reaction::Stop(ErrorKind::Denied)),
            (400, Some("ExpiredToken"), Reaction::RetryBriefly(ErrorKind::Denied)),
            (301, Some("PermanentRedirect"), Reaction::Stop(ErrorKind::BadRequest)),
            (416, Some("InvalidRange"), Reaction::Stop(ErrorKind::BadRequest)),
            (501, Some("NotImplemented"), Reaction::Stop(ErrorKind::BadRequest)),
        ] {
            assert_eq!(explain_status(status, code, None).0, reaction, "{status} {code:?}");
        }
    }
}
