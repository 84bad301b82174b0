//! A loopback server that stands before an S3 store and goes wrong by the same rules as [`crate::FaultyBucket`].
//!
//! * The names that rules match are whole keys, prefix included.
//! * A late request lands after its number of further requests, or on [`FaultyServer::land_late`].

use std::collections::{HashMap, VecDeque};
use std::io::{self, BufReader, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::http::{Request, Response, decode};
use super::s3::S3OverBucket;
use crate::ObjectName;
use crate::faults::{Decision, Effect, Faults, Operation, Rule, When};

/// What answers the requests that are let through.
#[derive(Debug)]
pub enum Behind {
    /// Another HTTP server, without TLS.
    Server(SocketAddr),
    /// A bucket in this process.
    Bucket(S3OverBucket),
}

/// A running server; dropping it ends it.
#[derive(Debug)]
pub struct FaultyServer {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    behind: Behind,
    faults: Faults,
    late: Mutex<VecDeque<(u64, Request)>>,
    /// The last honest answer to each listing, to give again when a listing shall be stale.
    listings: Mutex<HashMap<String, Response>>,
    ended: AtomicBool,
}

impl FaultyServer {
    /// Listens on 127.0.0.1; port 0 picks a free one.
    pub fn start(port: u16, behind: Behind, seed: u64, rules: Vec<Rule>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            behind,
            faults: Faults::new(seed, rules),
            late: Mutex::default(),
            listings: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let serving = shared.clone();
        std::thread::Builder::new().name("faulty-accept".into()).spawn(move || {
            for stream in listener.incoming() {
                if serving.ended.load(Ordering::Relaxed) {
                    return;
                }
                let (Ok(stream), serving) = (stream, serving.clone()) else { continue };
                let connection = std::thread::Builder::new().name("faulty-connection".into());
                if let Err(error) = connection.spawn(move || serving.serve(stream)) {
                    tracing::warn!(%error, "no thread for a connection");
                }
            }
        })?;
        Ok(Self { address, shared })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Rules and log.
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// Carries out all late requests now. Returns how many.
    pub fn land_late(&self) -> usize {
        let late = std::mem::take(&mut *self.shared.late.lock());
        late.iter().for_each(|(_, request)| drop(self.shared.pass(request)));
        late.len()
    }
}

impl Drop for FaultyServer {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts; should that fail, the thread waits for the end of the process.
        drop(TcpStream::connect(self.address));
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) {
        let prepared =
            stream.set_read_timeout(Some(Duration::from_secs(60))).and_then(|()| stream.set_nodelay(true));
        let Ok(mut out) = prepared.and_then(|()| stream.try_clone()) else { return };
        let mut input = BufReader::new(stream);
        loop {
            match Request::read(&mut input) {
                Ok(Some(request)) if !self.ended.load(Ordering::Relaxed) => {
                    if !self.answer(&request, &mut out) {
                        break;
                    }
                }
                // Somebody speaks TLS to us, say.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    write_all(&failed(400, "BadRequest"), &mut out);
                    break;
                }
                _ => break,
            }
        }
        drop(out.shutdown(Shutdown::Both));
    }

    /// Whether the connection lives on.
    #[expect(clippy::disallowed_methods, reason = "this face runs in real time, before real servers")]
    fn answer(&self, request: &Request, out: &mut TcpStream) -> bool {
        self.land_due();
        let (operation, name) = classify(request);
        let decision = self.faults.decide(operation, &name);
        std::thread::sleep(decision.wait);
        let Some((when, effect)) = decision.fault else { return self.answer_honestly(request, out) };
        if matches!(
            effect,
            Effect::Reset | Effect::Status { .. } | Effect::ExpiredCredentials | Effect::ErrorInBody
        ) {
            match when {
                When::Before => (),
                When::After => drop(self.pass(request)),
                When::Late(operations) => {
                    let lands_at = self.faults.requests() + u64::from(operations);
                    self.late.lock().push_back((lands_at, request.clone()));
                }
            }
        }
        match effect {
            Effect::Reset => false,
            Effect::Status { code, .. } => write_all(&failed(code, code_of(code)), out),
            Effect::ExpiredCredentials => write_all(&failed(400, "ExpiredToken"), out),
            Effect::ErrorInBody if request.method == "POST" => {
                write_all(&Response { status: 200, ..failed(500, "InternalError") }, out)
            }
            Effect::ErrorInBody => write_all(&failed(500, "InternalError"), out),
            distortion => self.answer_distorted(request, distortion, decision, out),
        }
    }

    fn answer_honestly(&self, request: &Request, out: &mut TcpStream) -> bool {
        let Ok(response) = self.pass(request) else { return false };
        if classify(request).0 == Operation::List {
            self.listings.lock().insert(request.target.clone(), response.clone());
        }
        write_all(&response, out)
    }

    fn answer_distorted(
        &self,
        request: &Request,
        effect: Effect,
        decision: Decision,
        out: &mut TcpStream,
    ) -> bool {
        let Ok(mut response) = self.pass(request) else { return false };
        match effect {
            Effect::ShortBody if !response.body.is_empty() => {
                let length = decision.chance as usize % response.body.len();
                drop(response.write(out, length));
                return false;
            }
            Effect::WrongBody if !response.body.is_empty() && response.status < 300 => {
                let at = decision.chance as usize % response.body.len();
                response.body[at] ^= 1 << (decision.chance >> 61);
            }
            Effect::StaleList => {
                response = self.listings.lock().get(&request.target).cloned().unwrap_or(response);
            }
            Effect::ListTwice => repeat_an_entry(&mut response.body),
            _ => (),
        }
        write_all(&response, out)
    }

    fn land_due(&self) {
        let now = self.faults.requests();
        loop {
            let mut late = self.late.lock();
            let Some(due) = late.iter().position(|(lands_at, _)| *lands_at <= now) else { return };
            let (_, request) = late.remove(due).expect("position is inside");
            drop(late);
            drop(self.pass(&request));
        }
    }

    fn pass(&self, request: &Request) -> io::Result<Response> {
        match &self.behind {
            Behind::Server(address) => request.forward(*address),
            Behind::Bucket(bucket) => Ok(bucket.answer(request)),
        }
    }
}

fn write_all(response: &Response, out: &mut TcpStream) -> bool {
    response.write(out, usize::MAX).and_then(|()| out.flush()).is_ok()
}

/// As S3 bills it; path style.
fn classify(request: &Request) -> (Operation, ObjectName) {
    let path = request.path().trim_start_matches('/');
    let key = path.split_once('/').map_or("", |(_bucket, key)| key);
    let operation = match request.method.as_str() {
        "HEAD" => Operation::Head,
        "GET" if key.is_empty() => {
            let prefix = request.parameter("prefix").unwrap_or_default();
            return (Operation::List, ObjectName::from_listing(prefix));
        }
        "GET" => Operation::Get,
        "POST" if request.parameter("delete").is_some() => Operation::Delete,
        "DELETE" if request.parameter("uploadId").is_none() => Operation::Delete,
        _ => Operation::Put,
    };
    (operation, ObjectName::from_listing(decode(key)))
}

fn code_of(status: u16) -> &'static str {
    match status {
        503 => "SlowDown",
        429 => "TooManyRequests",
        409 => "ConditionalRequestConflict",
        403 => "AccessDenied",
        400 => "RequestTimeout",
        _ => "InternalError",
    }
}

/// The store's error, as S3 words it.
pub(super) fn failed(status: u16, code: &str) -> Response {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>injected or real: {code}</Message></Error>"
    );
    let headers = vec![("content-type".to_owned(), "application/xml".to_owned())];
    Response { status, headers, body: body.into_bytes(), length: None }
}

fn repeat_an_entry(body: &mut Vec<u8>) {
    let text = String::from_utf8_lossy(body).into_owned();
    let (start, end) = ("<Contents>", "</Contents>");
    if let (Some(from), Some(to)) = (text.find(start), text.find(end)) {
        let entry = &text[from..to + end.len()];
        *body = format!("{}{entry}{}", &text[..from], &text[from..]).into_bytes();
    }
}
