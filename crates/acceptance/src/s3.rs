//! An S3 store that nobody here wrote (moto), and before it a server that breaks every so many requests on purpose.
//!
//! * Both listen on free loopback ports and end with the value that holds them.
//! * moto keeps its objects in memory and takes any credentials; ours over `memory` checks signatures.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::server::{Plan, free_port, root};

const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// The bucket that every store here has.
const BUCKET: &str = "test";
/// The access key and its secret, unless a test has others.
const KEY: &str = "test";

/// moto with an empty bucket in it.
pub struct Moto {
    process: Child,
    port: u16,
}

impl Moto {
    /// Installs it if it is missing, starts it, makes the bucket.
    pub fn start() -> Self {
        let found = Command::new(root().join("tools/moto")).stderr(Stdio::inherit()).output();
        let found = found.expect("tools/moto can be run");
        assert!(found.status.success(), "tools/moto says why");
        let program = PathBuf::from(String::from_utf8_lossy(&found.stdout).trim());
        let port = free_port();
        let process = Command::new(&program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let moto = Self { process, port };
        wait_for(port, "moto");
        moto.make_bucket(&program.with_file_name("python"));
        moto
    }

    fn make_bucket(&self, python: &Path) {
        let script = format!(
            "import boto3; boto3.client('s3', endpoint_url='http://127.0.0.1:{}', region_name='us-east-1', \
             aws_access_key_id='test', aws_secret_access_key='test').create_bucket(Bucket='{BUCKET}')",
            self.port
        );
        let made = Command::new(python).args(["-W", "ignore", "-c", &script]).status();
        assert!(made.expect("moto's python runs").success(), "the bucket can be made");
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

/// `faulty-s3`, before moto or with a store in memory.
pub struct Weather {
    process: Child,
    port: u16,
}

impl Weather {
    /// `share` of all requests go wrong on their way to `moto`.
    pub fn before(moto: &Moto, share: f64, seed: u64) -> Self {
        Self::start(&format!("127.0.0.1:{}", moto.port), share, seed, KEY, Duration::ZERO)
    }
    /// A store of its own that checks signatures; the keys are `test` and `test`.
    pub fn clear() -> Self {
        Self::clear_for(KEY)
    }
    /// The same with another secret key.
    pub fn clear_for(secret: &str) -> Self {
        Self::start("memory", 0.0, 1, secret, Duration::ZERO)
    }
    /// A clear one with its objects in `directory`, and every request takes `each` longer than it must.
    pub fn slow(directory: &Path, each: Duration) -> Self {
        std::fs::create_dir_all(directory).expect("the directory can be made");
        Self::start(&directory.display().to_string(), 0.0, 1, KEY, each)
    }

    fn start(behind: &str, share: f64, seed: u64, secret: &str, each: Duration) -> Self {
        let port = free_port();
        let mut process = Command::new(faulty_s3())
            .args([&port.to_string(), behind, &share.to_string(), &seed.to_string()])
            .arg(each.as_millis().to_string())
            .env("FAULTY_S3_SECRET", secret)
            .stdin(Stdio::piped()) // it ends when this closes
            .stdout(Stdio::piped())
            .spawn()
            .expect("faulty-s3 starts");
        let mut line = String::new();
        BufReader::new(process.stdout.as_mut().expect("stdout is piped"))
            .read_line(&mut line)
            .expect("faulty-s3 says where it listens");
        assert!(line.starts_with("s3://"), "faulty-s3 ended: {line}");
        Self { process, port }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }
    /// Makes `plan` use this store, with the right keys.
    pub fn serve(&self, plan: &mut Plan) {
        point_at(plan, self.port, KEY, KEY);
    }
    /// What it counted. Ends it.
    pub fn counts(mut self) -> String {
        use std::io::Read as _;
        drop(self.process.stdin.take());
        let mut text = String::new();
        let mut stdout = self.process.stdout.take().expect("stdout is piped");
        stdout.read_to_string(&mut text).expect("faulty-s3 writes text");
        text.trim().to_owned()
    }
}

impl Drop for Weather {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

/// Makes `plan` use the store that listens on `port`, or that does not.
pub fn point_at(plan: &mut Plan, port: u16, key: &str, secret: &str) {
    point_without_keys(plan, port);
    plan.environment.push(("AWS_ACCESS_KEY_ID".into(), key.into()));
    plan.environment.push(("AWS_SECRET_ACCESS_KEY".into(), secret.into()));
}

/// The same with the credentials left out.
pub fn point_without_keys(plan: &mut Plan, port: u16) {
    plan.bucket = format!("s3://{BUCKET}/production");
    plan.options.push(format!("--endpoint=http://127.0.0.1:{port}"));
    plan.options.push("--path-style".into());
    plan.options.push("--region=us-east-1".into());
}

/// Beside this program, or beside the directory of the tests.
fn faulty_s3() -> PathBuf {
    let program = std::env::current_exe().expect("a program has a path");
    let found = program.ancestors().skip(1).take(2).map(|directory| directory.join("faulty-s3"));
    found.into_iter().find(|path| path.exists()).unwrap_or_else(|| {
        panic!(
            "no faulty-s3 beside {}: cargo build -p bucket --features s3,testkit --bin faulty-s3",
            program.display()
        )
    })
}

fn wait_for(port: u16, name: &str) {
    let end = Instant::now() + READY_TIMEOUT;
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < end, "{name} does not listen");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn end(process: &mut Child) {
    if process.kill().is_ok() {
        process.wait().expect("our own child can be waited for");
    }
}
