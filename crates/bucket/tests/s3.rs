//! The S3 client against two servers: our own, which checks signatures and is fast, and moto, which nobody here wrote.
//! Between them and the client stands a server that goes wrong on purpose.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod suite;

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bucket::testkit::{Behind, FaultyServer, Keys, S3OverBucket};
use bucket::{
    Bucket, BucketError, Effect, ErrorKind, MemoryBucket, ObjectName, Options, PutOutcome, Rule, When,
};
use bytes::Bytes;

const SECRET: &str = "s3cr3t/with+odd=characters";

fn options(variables: &[(&str, &str)]) -> Options {
    let variables: HashMap<String, String> =
        variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Options {
        deadline: Duration::from_secs(20),
        whole_bytes_max: 5 << 20,
        part_bytes: 5 << 20,
        environment: Arc::new(move |name| variables.get(name).cloned()),
    }
}

fn with_keys() -> Options {
    options(&[("AWS_ACCESS_KEY_ID", "AKIATEST"), ("AWS_SECRET_ACCESS_KEY", SECRET)])
}

fn quickly(options: Options) -> Options {
    Options { deadline: Duration::from_secs(1), ..options }
}

/// Our own S3 server over memory, behind `rules`.
fn ours(rules: Vec<Rule>) -> (FaultyServer, Arc<MemoryBucket>) {
    let memory = Arc::new(MemoryBucket::new());
    let keys = Keys { id: "AKIATEST".into(), secret: SECRET.into() };
    let store = S3OverBucket::new("shop", memory.clone(), keys).with_page(3);
    (FaultyServer::start(0, Behind::Bucket(store), 1, rules).unwrap(), memory)
}

fn url(address: SocketAddr, rest: &str) -> String {
    format!("s3://shop{rest}?endpoint=http://{address}")
}

fn client(server: &FaultyServer) -> Arc<dyn Bucket> {
    bucket::open(&url(server.address(), "/a prefix/x"), &with_keys()).unwrap()
}

fn refused(url: &str, options: &Options) -> BucketError {
    let root = ObjectName::from_listing("main/epoch/");
    match bucket::open(url, options) {
        Ok(bucket) => bucket.list(&root).unwrap_err(),
        Err(error) => error,
    }
}

fn name(text: &str) -> ObjectName {
    ObjectName::from_listing(text)
}

/// moto on a port of its own, with a bucket `shop`; killed when dropped.
struct Moto {
    process: Child,
    address: SocketAddr,
}

impl Moto {
    /// `more`: further arguments of its own.
    #[expect(clippy::disallowed_methods, reason = "waits for a real process")]
    fn start(scheme: &str, more: &[&str]) -> Self {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
        let found = Command::new(format!("{root}/tools/moto")).stderr(Stdio::inherit()).output().unwrap();
        assert!(found.status.success(), "tools/moto says why");
        let program = PathBuf::from(String::from_utf8(found.stdout).unwrap().trim());
        let ports = (13600..13650).cycle().skip(std::process::id() as usize % 50).take(200);
        for port in ports.filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()) {
            let process = Command::new(&program)
                .args(["-H", "127.0.0.1", "-p", &port.to_string()])
                .args(more)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let mut moto = Self { process, address: SocketAddr::from(([127, 0, 0, 1], port)) };
            for _ in 0..600 {
                if moto.process.try_wait().unwrap().is_some() {
                    break; // Somebody else took the port.
                }
                if TcpStream::connect(moto.address).is_ok() {
                    moto.create_bucket(&program.with_file_name("python"), scheme);
                    return moto;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        panic!("moto does not start");
    }

    fn create_bucket(&self, python: &Path, scheme: &str) {
        let script = format!(
            "import boto3; boto3.client('s3', endpoint_url='{scheme}://{}', region_name='us-east-1', verify=False, \
             aws_access_key_id='AKIATEST', aws_secret_access_key='x').create_bucket(Bucket='shop')",
            self.address
        );
        let created = Command::new(python).args(["-W", "ignore", "-c", &script]).status().unwrap();
        assert!(created.success());
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// Bad weather without late requests, which may undo what a test did after them.
fn weather(share: f64) -> Vec<Rule> {
    let mut rules = Rule::weather(share);
    rules.retain(|rule| !matches!(rule.when, When::Late(_)));
    rules
}

#[test]
fn our_server_and_our_client_keep_the_promises() {
    let (server, _) = ours(vec![]);
    suite::check_all(&*client(&server), "main", false);
}

#[test]
fn bad_weather_breaks_no_promise() {
    let (server, _) = ours(weather(0.25));
    let bucket = client(&server);
    for round in 0..2 {
        suite::check_all(&*bucket, &format!("main/{round}"), true);
    }
    let broken = server.faults().log().iter().filter(|request| request.decision.fault.is_some()).count();
    assert!(broken > 30, "only {broken} requests went wrong");
}

#[test]
fn moto_keeps_the_promises_with_every_twentieth_request_broken() {
    let moto = Moto::start("http", &[]);
    let direct = bucket::open(&url(moto.address, "/direct"), &with_keys()).unwrap();
    suite::check_all(&*direct, "main", false);
    suite_of_large_objects(&*direct);
    let between = FaultyServer::start(0, Behind::Server(moto.address), 1, weather(0.05)).unwrap();
    let broken = bucket::open(&url(between.address(), "/broken"), &with_keys()).unwrap();
    suite::check_all(&*broken, "main", true);
    suite_of_large_objects(&*broken);
    let faults = between.faults().log().iter().filter(|request| request.decision.fault.is_some()).count();
    assert!(faults > 3, "only {faults} of {} requests went wrong", between.faults().requests());
}

fn suite_of_large_objects(bucket: &dyn Bucket) {
    let body = suite::body((11 << 20) + 3);
    bucket.put(&name("large"), body.clone()).unwrap();
    assert_eq!(bucket.head(&name("large")).unwrap(), Some(body.len() as u64));
    assert!(bucket.get(&name("large")).unwrap() == body);
    let names: Vec<_> = (0..1100).map(|i| name(&format!("main/none/{i}"))).collect();
    bucket.delete(&names).unwrap();
}

#[test]
fn a_large_object_travels_in_parts_and_arrives_whole_in_bad_weather() {
    let (server, memory) = ours(weather(0.3));
    let bucket = client(&server);
    let body = suite::body((23 << 20) + 5);
    for round in 0..4 {
        let name = name(&format!("main/sst/{round}"));
        bucket.put(&name, body.clone()).unwrap();
        assert!(bucket.get(&name).unwrap() == body);
    }
    assert_eq!(memory.contents().len(), 4);
}

#[test]
fn an_upload_whose_last_answer_was_lost_is_there() {
    let (server, memory) = ours(vec![]);
    let bucket = client(&server);
    let body = suite::body((5 << 20) + 1);
    // Start, two parts, end. Half of all answers are lost, and for some of the uploads, that of the last request.
    let before = server.faults().requests();
    bucket.put(&name("counted"), body.clone()).unwrap();
    assert_eq!(server.faults().requests() - before, 4);
    server.faults().set_rules(vec![Rule::lost_answer("*").with_probability(0.5)]);
    for round in 0..4 {
        bucket.put(&name(&format!("lost/{round}")), body.clone()).unwrap();
    }
    let contents = memory.contents();
    assert_eq!(contents.len(), 5);
    assert!(contents.values().all(|stored| *stored == body));
}

#[test]
fn a_conflict_is_no_answer_to_a_conditional_put() {
    let (server, memory) = ours(vec![Rule::new("*", Effect::Status { code: 409, burst: 2 }).times(1)]);
    let bucket = client(&server);
    assert_eq!(bucket.put_if_absent(&name("a"), Bytes::from_static(b"1")).unwrap(), PutOutcome::Created);
    assert_eq!(memory.contents().len(), 1);
    assert_eq!(
        bucket.meters().put.requests(),
        5,
        "three conflicts, the put, and the proof that conditions hold"
    );
    assert_eq!(bucket.meters().put.errors(), 3);
}

#[test]
fn a_store_that_ignores_conditions_is_refused() {
    let keys = Keys { id: "AKIATEST".into(), secret: SECRET.into() };
    let store = S3OverBucket::new("shop", Arc::new(MemoryBucket::new()), keys).without_conditions();
    let server = FaultyServer::start(0, Behind::Bucket(store), 1, vec![]).unwrap();
    let error = client(&server).put_if_absent(&name("main/epoch/1"), Bytes::new()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::BadRequest);
    assert!(error.message.contains("If-None-Match"), "{error}");
}

#[test]
fn conditions_are_proved_once() {
    let (server, _) = ours(vec![]);
    let bucket = client(&server);
    for i in 0..10 {
        let outcome = bucket.put_if_absent(&name(&format!("main/manifest/{i}")), Bytes::new()).unwrap();
        assert_eq!(outcome, PutOutcome::Created);
    }
    assert_eq!(bucket.meters().put.requests(), 11);
}

#[test]
fn a_conditional_put_whose_answer_was_lost_says_exists_and_its_body_says_whose() {
    let (server, _) = ours(vec![Rule::lost_answer("*").times(1)]);
    let bucket = client(&server);
    assert_eq!(bucket.put_if_absent(&name("a"), Bytes::from_static(b"me")).unwrap(), PutOutcome::Exists);
    assert_eq!(bucket.get(&name("a")).unwrap(), "me");
}

#[test]
fn an_outage_ends_in_unavailable_at_the_deadline() {
    let (server, _) = ours(vec![Rule::outage()]);
    let bucket = bucket::open(&url(server.address(), ""), &quickly(with_keys())).unwrap();
    let error = bucket.get(&name("a")).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.message.contains("503 SlowDown") && error.message.contains("tried"), "{error}");
}

#[test]
fn a_server_that_never_answers_ends_in_unavailable_at_the_deadline() {
    let slow = Effect::Latency { p50: Duration::from_secs(30), p99: Duration::from_secs(30) };
    let (server, _) = ours(vec![Rule::new("*", slow)]);
    let bucket = bucket::open(&url(server.address(), ""), &quickly(with_keys())).unwrap();
    let started = Clock::now();
    std::thread::scope(|scope| {
        for reader in 0..8 {
            let (bucket, started) = (&bucket, &started);
            scope.spawn(move || {
                let error = bucket.get_ranges(&name(&reader.to_string()), &[0..1, 9..10]).unwrap_err();
                assert_eq!(error.kind, ErrorKind::Unavailable);
                assert!(error.message.contains("no answer within"), "{error}");
                assert!(started.elapsed() < Duration::from_secs(5), "the deadline of 1 s was forgotten");
            });
        }
    });
}

/// Real time, for tests of deadlines.
struct Clock(std::time::Instant);

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "deadlines of real requests pass in real time")]
    fn now() -> Self {
        Self(std::time::Instant::now())
    }
    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

#[test]
fn near_ranges_cost_one_request() {
    let (server, _) = ours(vec![]);
    let bucket = client(&server);
    bucket.put(&name("sst"), suite::body(1_000_000)).unwrap();
    let before = server.faults().requests();
    bucket.get_ranges(&name("sst"), &[0..100, 200..300, 20_000..20_001, 900_000..900_001]).unwrap();
    assert_eq!(server.faults().requests() - before, 2);
}

#[test]
fn a_read_that_is_slow_by_bad_luck_is_overtaken_by_a_second_one() {
    let (server, _) = ours(vec![]);
    let bucket = client(&server);
    bucket.put(&name("sst"), suite::body(1_000)).unwrap();
    // Longer than a try may take: without the second read this one would fail.
    let slow = Effect::Latency { p50: Duration::from_secs(60), p99: Duration::from_secs(60) };
    server.faults().set_rules(vec![Rule::new("*", slow).times(1)]);
    let read = bucket.get_ranges(&name("sst"), &[0..10, 20..30]).unwrap();
    assert_eq!(read.concat(), [&suite::body(1_000)[0..10], &suite::body(1_000)[20..30]].concat());
    assert_eq!(bucket.meters().hedged.requests(), 1);
    assert_eq!(bucket.meters().get.errors(), 0);
}

#[test]
fn a_large_read_that_does_not_begin_is_overtaken_too() {
    let (server, _) = ours(vec![]);
    let bucket = client(&server);
    let body = suite::body(4 << 20);
    bucket.put(&name("sst"), body.clone()).unwrap();
    let slow = Effect::Latency { p50: Duration::from_secs(60), p99: Duration::from_secs(60) };
    let stuck = || server.faults().set_rules(vec![Rule::new("*", slow).times(1)]);
    stuck();
    assert!(bucket.get(&name("sst")).unwrap() == body);
    stuck();
    let near = bucket.get_ranges(&name("sst"), &[5..1 << 20, 1 << 20..3 << 20]).unwrap();
    assert!(near.concat() == body[5..3 << 20]);
    assert_eq!(bucket.meters().hedged.requests(), 2);
    assert_eq!(bucket.meters().get.errors(), 0);
}

/// Numbers below what it is asked for, other ones for each seed.
fn dice(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed + 1;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

fn random_bytes(seed: u64, length: usize) -> Bytes {
    let mut dice = dice(seed);
    (0..length).map(|_| dice(256) as u8).collect::<Vec<_>>().into()
}

/// Ranges of an object of `length`: most short, one that alone is above what is raced in whole.
fn random_ranges(dice: &mut impl FnMut(u64) -> u64, length: u64) -> Vec<Range<u64>> {
    (0..1 + dice(4))
        .map(|_| {
            let longest = [100, 20_000, 200_000, 3 << 19][dice(4) as usize];
            let start = dice(length);
            start..(start + dice(longest)).min(length)
        })
        .collect()
}

/// Half of the slow ones are answered long after somebody else has won, while other reads are under way on the same connections.
#[test]
fn reads_that_are_overtaken_bring_the_same_bytes() {
    let (server, _) = ours(vec![]);
    let bucket = client(&server);
    let objects: Vec<Bytes> = (0..4).map(|n| random_bytes(n, (3 << 20) - n as usize * 1000)).collect();
    for (number, object) in objects.iter().enumerate() {
        bucket.put(&name(&format!("sst/{number}")), object.clone()).unwrap();
    }
    // So many that were quick that a read is soon a slow one, and that many may be overtaken.
    (0..1500).for_each(|_| drop(bucket.get_ranges(&name("sst/0"), &[7..9, 3..4]).unwrap()));
    let slow = |millis, share| {
        let wait = Duration::from_millis(millis);
        Rule::new("*", Effect::Latency { p50: wait, p99: wait }).with_probability(share)
    };
    let mut rules = vec![slow(80, 0.15), slow(300, 0.05)];
    rules.extend(weather(0.1));
    server.faults().set_rules(rules);
    std::thread::scope(|scope| {
        for reader in 0..4u64 {
            let (bucket, objects) = (&bucket, &objects);
            scope.spawn(move || {
                let mut dice = dice(reader);
                for _ in 0..150 {
                    let number = dice(4) as usize;
                    let (name, object) = (name(&format!("sst/{number}")), &objects[number]);
                    if dice(20) == 0 {
                        assert!(bucket.get(&name).unwrap() == object, "all of {name}");
                        continue;
                    }
                    let ranges = random_ranges(&mut dice, object.len() as u64);
                    let pieces = bucket.get_ranges(&name, &ranges).unwrap();
                    assert_eq!(pieces.len(), ranges.len());
                    for (range, piece) in ranges.iter().zip(pieces) {
                        assert!(
                            piece == object[range.start as usize..range.end as usize],
                            "{range:?} of {name}"
                        );
                    }
                }
            });
        }
    });
    let hedged = bucket.meters().hedged.requests();
    assert!(hedged > 20, "only {hedged} reads were overtaken");
}

#[test]
fn a_listing_of_many_pages_is_whole_though_entries_repeat() {
    let (server, _) = ours(vec![Rule::new("*", Effect::ListTwice)]);
    let bucket = client(&server);
    let names: Vec<_> = (0..20).map(|i| name(&format!("main/epoch/{i:02}"))).collect();
    names.iter().for_each(|name| bucket.put(name, Bytes::new()).unwrap());
    let listed: Vec<_> =
        bucket.list(&name("main/epoch/")).unwrap().into_iter().map(|entry| entry.name).collect();
    assert_eq!(listed, names);
    assert_eq!(bucket.meters().list.requests(), 7);
}

#[test]
fn wrong_keys_are_denied_and_named_without_the_secret() {
    let (server, _) = ours(vec![]);
    let url = url(server.address(), "");
    for (id, secret, code) in
        [("AKIAOTHER", SECRET, "InvalidAccessKeyId"), ("AKIATEST", "another-secret", "SignatureDoesNotMatch")]
    {
        let options = options(&[("AWS_ACCESS_KEY_ID", id), ("AWS_SECRET_ACCESS_KEY", secret)]);
        let error = refused(&url, &options);
        assert_eq!(error.kind, ErrorKind::Denied, "{error}");
        assert!(error.message.contains(code), "{error}");
        assert!(!format!("{error} {error:?}").contains(secret), "{error:?}");
    }
}

#[test]
fn a_bucket_that_does_not_exist_is_denied_by_name() {
    let (server, _) = ours(vec![]);
    let error = refused(&format!("s3://shpo?endpoint=http://{}", server.address()), &with_keys());
    assert_eq!(error.kind, ErrorKind::Denied);
    assert!(error.message.contains("NoSuchBucket") && error.message.contains("s3://shpo"), "{error}");
    // The answer to a HEAD has no body that could say so.
    let bucket =
        bucket::open(&format!("s3://shpo?endpoint=http://{}", server.address()), &with_keys()).unwrap();
    let error = bucket.head(&name("main/anything")).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Denied, "{error}");
}

#[test]
fn an_endpoint_where_nobody_listens_is_unavailable_and_named() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = refused(&url(port, ""), &quickly(with_keys()));
    assert_eq!(error.kind, ErrorKind::Unavailable);
    let text = error.to_string();
    assert!(text.contains(&port.to_string()) && text.contains("refused"), "{error}");
    let error = refused("s3://shop?endpoint=http://no-such-host.invalid", &quickly(with_keys()));
    assert!(error.message.contains("no-such-host.invalid"), "{error}");
}

#[test]
fn an_endpoint_that_speaks_no_tls_is_told_apart() {
    let (server, _) = ours(vec![]);
    let error = refused(&format!("s3://shop?endpoint=https://{}", server.address()), &with_keys());
    assert_eq!(error.kind, ErrorKind::Denied, "{error}");
}

#[test]
fn tls_is_trusted_only_as_far_as_the_certificate_authorities() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).display().to_string();
    let (certificate, key) = (file("certificate"), file("key"));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"])
        .args(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-keyout", &key, "-out", &certificate])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let moto = Moto::start("https", &["-s", "-c", &certificate, "-k", &key]);
    let url = format!("s3://shop/tls?endpoint=https://{}", moto.address);
    let keys = [("AWS_ACCESS_KEY_ID", "AKIATEST"), ("AWS_SECRET_ACCESS_KEY", SECRET)];

    let trusting = options(&[keys[0], keys[1], ("AWS_CA_BUNDLE", &certificate)]);
    let bucket = bucket::open(&url, &trusting).unwrap();
    bucket.put(&name("a"), suite::body(3 << 20)).unwrap();
    assert!(bucket.get(&name("a")).unwrap() == suite::body(3 << 20));

    let error = refused(&url, &options(&keys));
    assert_eq!(error.kind, ErrorKind::Denied, "{error}");
    assert!(error.message.contains("certificate"), "{error}");
}

#[test]
fn credentials_that_expire_are_denied() {
    let (server, _) = ours(vec![Rule::new("*", Effect::ExpiredCredentials)]);
    let error = refused(&url(server.address(), ""), &with_keys());
    assert_eq!(error.kind, ErrorKind::Denied);
    assert!(error.message.contains("expired"), "{error}");
}

/// Answers each request by its path, as the services do that give a machine its role. Ends with the process.
fn role_service(answers: &'static [(&'static str, &'static str)]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = String::new();
            BufReader::new(&mut stream).read_line(&mut request).unwrap();
            let path = request.split_whitespace().nth(1).unwrap_or_default();
            let found = answers.iter().find(|(known, _)| *known == path);
            let (status, body) = found.map_or((404, ""), |(_, body)| (200, *body));
            let length = body.len();
            write!(
                stream,
                "HTTP/1.1 {status} x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
            )
            .unwrap();
        }
    });
    address
}

const ROLE: &str = r#"{"Code":"Success","AccessKeyId":"AKIATEST","SecretAccessKey":"s3cr3t/with+odd=characters",
    "Token":"t","Expiration":"2099-01-01T00:00:00Z"}"#;

#[test]
fn an_instance_has_the_credentials_of_its_role() {
    let (server, memory) = ours(vec![]);
    let service = role_service(&[
        ("/latest/api/token", "token"),
        ("/latest/meta-data/iam/security-credentials/", "shop-role"),
        ("/latest/meta-data/iam/security-credentials/shop-role", ROLE),
    ]);
    let options = options(&[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &format!("http://{service}"))]);
    let bucket = bucket::open(&url(server.address(), ""), &options).unwrap();
    bucket.put(&name("a"), Bytes::new()).unwrap();
    assert_eq!(memory.contents().len(), 1);
}

#[test]
fn a_pod_has_the_credentials_of_its_role() {
    let (server, memory) = ours(vec![]);
    let token = tempfile::NamedTempFile::new().unwrap();
    let service = role_service(&[("/v1/credentials", ROLE)]);
    let options = options(&[
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", &format!("http://{service}/v1/credentials")),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", &token.path().display().to_string()),
    ]);
    let bucket = bucket::open(&url(server.address(), ""), &options).unwrap();
    bucket.put(&name("a"), Bytes::new()).unwrap();
    assert_eq!(memory.contents().len(), 1);
}

#[test]
fn a_machine_without_a_role_is_told_what_to_set() {
    let service = role_service(&[("/latest/api/token", "token")]);
    let options = options(&[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &format!("http://{service}"))]);
    let error = refused(&url(service, ""), &options);
    assert_eq!(error.kind, ErrorKind::Denied, "{error}");
    assert!(
        error.message.contains("AWS_ACCESS_KEY_ID") && error.message.contains(&service.to_string()),
        "{error}"
    );
}

#[test]
fn no_credentials_and_no_region_are_errors_that_say_what_to_set() {
    let without = options(&[("AWS_EC2_METADATA_DISABLED", "true")]);
    let error = refused("s3://shop?region=eu-west-1", &without);
    assert_eq!(error.kind, ErrorKind::Denied);
    assert!(error.message.contains("AWS_ACCESS_KEY_ID"), "{error}");
    let error = refused("s3://shop", &with_keys());
    assert_eq!(error.kind, ErrorKind::BadRequest);
    assert!(error.message.contains("AWS_REGION"), "{error}");
}
