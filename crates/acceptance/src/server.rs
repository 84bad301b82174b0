//! Servers under test: ours through `cistern serve`, and stock ones (InnoDB, MyRocks) beside it to compare with.
//!
//! * Each listens on a free loopback port of its own and is ended with the value that holds it.
//! * The programs come from `make build`; a missing one panics with that advice.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mysql::{Conn, OptsBuilder};
use rustix::process::{Pid, Signal, kill_process};

const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// The root of the checkout.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the checkout exists")
}

/// Where `make build` leaves its results.
pub fn build_directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let release = target.join("release");
    assert!(
        release.join("ha_cistern.so").exists(),
        "{} has no ha_cistern.so: run `make build`",
        release.display()
    );
    release
}

/// One value of `target/server/env`, which `tools/server` writes.
pub fn server_env(key: &str) -> PathBuf {
    value_of(&root().join("target/server/env"), key)
}

fn value_of(file: &Path, key: &str) -> PathBuf {
    let text = fs::read_to_string(file)
        .unwrap_or_else(|error| panic!("{}: {error}; run `make build`", file.display()));
    let prefix = format!("{key}=");
    let value = text.lines().find_map(|line| line.strip_prefix(&prefix));
    value.unwrap_or_else(|| panic!("{} has no {key}", file.display())).trim_matches('\'').into()
}

/// A port that nobody listens on now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    listener.local_addr().expect("a bound listener has an address").port()
}

/// How to start one of ours.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The bucket's URL.
    pub bucket: String,
    /// The data directory.
    pub data: PathBuf,
    /// Options of `cistern serve` before `--`.
    pub options: Vec<String>,
    /// Options of mariadbd after `--`.
    pub server_options: Vec<String>,
    /// Environment variables to add.
    pub environment: Vec<(String, String)>,
}

impl Plan {
    /// A bucket in `directory/bucket`, the data in `directory/data`.
    pub fn in_directory(directory: &Path) -> Self {
        Self {
            bucket: format!("file://{}", directory.join("bucket").display()),
            data: directory.join("data"),
            options: vec![],
            server_options: vec![],
            environment: vec![],
        }
    }

    /// A server that must start.
    ///
    /// # Panics
    /// With everything it said, if it does not.
    pub fn started(&self) -> Server {
        self.start()
            .unwrap_or_else(|ended| panic!("cistern did not start (code {}):\n{}", ended.code(), ended.said))
    }

    /// How a server ended that must not start.
    ///
    /// # Panics
    /// If it starts.
    pub fn refused(&self) -> Ended {
        match self.start() {
            Ok(_) => panic!("it started"),
            Err(ended) => ended,
        }
    }

    /// `cistern serve` on `port`; what it says comes through a pipe.
    pub fn command(&self, port: u16) -> Command {
        let mut command = Command::new(build_directory().join("cistern"));
        command.args(["serve", "--bucket", &self.bucket, "--data"]).arg(&self.data).args(&self.options);
        command
            .arg("--")
            .arg(format!("--port={port}"))
            .arg("--bind-address=127.0.0.1")
            .args(&self.server_options);
        command.envs(self.environment.iter().cloned());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// Starts `cistern serve` and returns once it accepts connections, with the port.
    ///
    /// # Errors
    /// The exit status and everything that was said, if it ended instead.
    pub fn start(&self) -> Result<Server, Ended> {
        let port = free_port();
        let started = Instant::now();
        let mut child = self.command(port).spawn().expect("cistern starts");
        let said = Arc::new(Mutex::new(String::new()));
        let (sender, ready) = std::sync::mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let sink = Arc::clone(&said);
        let reader = std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let is_ready = line.starts_with("cistern: ready");
                sink.lock().expect("no reader panics").push_str(&(line + "\n"));
                if is_ready && sender.send(()).is_err() {
                    // Nobody waits any more; the log goes on.
                }
            }
        });
        let answer = ready.recv_timeout(READY_TIMEOUT);
        let mut server = Server {
            child,
            reader: Some(reader),
            said,
            port,
            ready_in: started.elapsed(),
            data: self.data.clone(),
        };
        match answer {
            Ok(()) => Ok(server),
            Err(_) => {
                server.kill();
                Err(server.ended())
            }
        }
    }
}

/// How a server that is gone ended.
#[derive(Debug)]
pub struct Ended {
    /// Of `cistern`.
    pub status: ExitStatus,
    /// Everything it and mariadbd wrote to standard error.
    pub said: String,
}

impl Ended {
    /// The exit code, or 128 + signal.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }
}

/// A running `cistern serve`.
pub struct Server {
    child: Child,
    reader: Option<JoinHandle<()>>,
    said: Arc<Mutex<String>>,
    port: u16,
    ready_in: Duration,
    data: PathBuf,
}

impl Server {
    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }
    /// From the start of the program to the first connection it accepts.
    pub fn ready_in(&self) -> Duration {
        self.ready_in
    }
    /// Everything said so far.
    pub fn said(&self) -> String {
        self.said.lock().expect("no reader panics").clone()
    }
    /// A connection as root.
    pub fn connect(&self) -> mysql::Result<Conn> {
        connect(self.port)
    }
    /// The pid of `cistern`.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
    /// The pid of mariadbd itself.
    pub fn mariadbd_pid(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.data.join("run/mariadbd.pid")).ok()?;
        Pid::from_raw(text.trim().parse().ok()?)
    }
    /// `SIGKILL` to mariadbd, and to `cistern`; returns when both are gone.
    pub fn kill(&mut self) {
        // mariadbd first: it would stop cleanly if its parent died first.
        if let Some(pid) = self.mariadbd_pid()
            && kill_process(pid, Signal::KILL).is_ok()
        {
            // With its server gone `cistern` ends too, and then the last thread has let go of every file.
            let end = Instant::now() + Duration::from_secs(10);
            while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        if self.child.kill().is_err() {
            // It is gone already.
        }
        self.child.wait().expect("our own child can be waited for");
    }
    /// Asks for a clean stop and waits for the end.
    pub fn stop(mut self) -> Ended {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("our own child can be signalled");
        self.child.wait().expect("our own child can be waited for");
        self.ended()
    }
    /// Waits at most `limit` for it to end by itself.
    pub fn wait(mut self, limit: Duration) -> Option<Ended> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if self.child.try_wait().expect("our own child can be waited for").is_some() {
                return Some(self.ended());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }

    fn ended(&mut self) -> Ended {
        let status = self.child.wait().expect("our own child can be waited for");
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader does not panic");
        }
        Ended { status, said: self.said() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill();
        }
    }
}

/// A connection to a loopback server as root without a password.
pub fn connect(port: u16) -> mysql::Result<Conn> {
    let options = OptsBuilder::new()
        .ip_or_hostname(Some("127.0.0.1"))
        .tcp_port(port)
        .user(Some("root"))
        .prefer_socket(false)
        .tcp_connect_timeout(Some(Duration::from_secs(10)));
    Conn::new(options)
}

/// A storage engine of others, in a stock mariadbd of the same build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stock {
    /// 1 GiB of buffer pool, flushed at commit.
    InnoDb,
    /// 1 GiB of block cache, flushed at commit; `tools/server rocksdb` fetches it.
    MyRocks,
}

impl Stock {
    /// What its files are called.
    pub fn name(self) -> &'static str {
        match self {
            Self::InnoDb => "innodb",
            Self::MyRocks => "myrocks",
        }
    }

    fn options(self, bootstrap: bool) -> Vec<String> {
        let options: &[&str] = match self {
            Self::InnoDb => &["--innodb-flush-log-at-trx-commit=1", "--innodb-buffer-pool-size=1G"],
            // The system tables of the stock server stay where they are: in Aria, three of them in InnoDB.
            Self::MyRocks if bootstrap => &["--innodb-buffer-pool-size=16M"],
            Self::MyRocks => &[
                "--innodb-buffer-pool-size=16M",
                "--plugin-load-add=ha_rocksdb.so",
                "--default-storage-engine=ROCKSDB",
                "--rocksdb-flush-log-at-trx-commit=1",
                "--rocksdb-block-cache-size=1G",
            ],
        };
        let mut options: Vec<String> = options.iter().map(|&option| option.into()).collect();
        if self == Self::MyRocks {
            options.push(format!("--plugin-dir={}", rocksdb_directory().display()));
        }
        options
    }
}

/// Where `tools/server rocksdb` put the plugin.
fn rocksdb_directory() -> PathBuf {
    let found = Command::new(root().join("tools/server")).arg("rocksdb").status();
    assert!(found.expect("tools/server can be run").success(), "tools/server says why");
    value_of(&root().join("target/server/rocksdb"), "ROCKSDB_PLUGIN_DIR")
}

/// A stock mariadbd of the same build, to compare with.
pub struct Peer {
    child: Child,
    port: u16,
    directory: PathBuf,
    ready_in: Duration,
}

impl Peer {
    /// Makes an InnoDB data directory below `directory`, unless there is one, and starts a server on it.
    ///
    /// # Panics
    /// If the stock server does not come up: the peer is a given.
    pub fn start(directory: &Path, server_options: &[&str]) -> Self {
        Self::start_with(Stock::InnoDb, directory, server_options)
    }

    /// The same with any engine; its data is in `directory/<name>`.
    pub fn start_with(stock: Stock, directory: &Path, server_options: &[&str]) -> Self {
        let (mariadbd, share) = (server_env("MARIADBD"), server_env("SHARE_DIR"));
        let name = stock.name();
        let data = directory.join(name);
        let log = directory.join(format!("{name}.log"));
        let open_log =
            || fs::File::options().create(true).append(true).open(&log).expect("the log can be written");
        let temporary = directory.join(format!("{name}-tmp"));
        fs::create_dir_all(&temporary).expect("the directory can be written");
        let base = |bootstrap| {
            let mut command = Command::new(&mariadbd);
            command.arg("--no-defaults").arg(format!("--datadir={}", data.display()));
            command
                .arg(format!("--lc-messages-dir={}", share.display()))
                .arg("--character-set-server=utf8mb4");
            command
                .arg(format!("--character-sets-dir={}", share.join("charsets").display()))
                .arg("--user=root");
            command.arg(format!("--tmpdir={}", temporary.display())).args(stock.options(bootstrap));
            command.stdout(Stdio::null()).stderr(open_log());
            command
        };
        if !data.join("mysql").exists() {
            fs::create_dir_all(&data).expect("the directory can be written");
            let mut sql = String::from("CREATE DATABASE IF NOT EXISTS mysql;\nUSE mysql;\n");
            for script in
                ["mysql_system_tables.sql", "mysql_performance_tables.sql", "mysql_system_tables_data.sql"]
            {
                sql.push_str(
                    &fs::read_to_string(share.join(script)).expect("the server's scripts are readable"),
                );
            }
            let file = directory.join(format!("{name}-bootstrap.sql"));
            fs::write(&file, sql).expect("the directory can be written");
            let status =
                base(true).arg("--bootstrap").stdin(fs::File::open(file).expect("just written")).status();
            assert!(
                status.expect("mariadbd starts").success(),
                "the peer's bootstrap failed: {}",
                log.display()
            );
        }
        let port = free_port();
        let started = Instant::now();
        let child = base(false)
            .arg(format!("--port={port}"))
            .arg("--bind-address=127.0.0.1")
            .arg(format!("--socket={}", directory.join(format!("{name}.sock")).display()))
            .args(server_options)
            .stdin(Stdio::null())
            .spawn()
            .expect("mariadbd starts");
        let mut peer = Self { child, port, directory: directory.to_owned(), ready_in: Duration::ZERO };
        let end = Instant::now() + READY_TIMEOUT;
        while connect(port).is_err() {
            let gone = peer.child.try_wait().expect("our own child can be waited for");
            assert!(gone.is_none(), "the peer ended with {gone:?}: {}", log.display());
            assert!(Instant::now() < end, "the peer does not answer: {}", log.display());
            std::thread::sleep(Duration::from_millis(20));
        }
        peer.ready_in = started.elapsed();
        peer
    }
    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }
    /// From the start of the program to the first connection it accepts.
    pub fn ready_in(&self) -> Duration {
        self.ready_in
    }
    /// The process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
    /// Where its files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
    /// A connection as root.
    pub fn connect(&self) -> Conn {
        connect(self.port).expect("the peer answers")
    }
    /// Asks for a clean stop and waits for the end.
    pub fn stop(mut self) {
        kill_process(self.pid(), Signal::TERM).expect("our own child can be signalled");
        self.child.wait().expect("our own child can be waited for");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) && self.child.kill().is_ok() {
            self.child.wait().expect("our own child can be waited for");
        }
    }
}
