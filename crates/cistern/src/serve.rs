//! `cistern serve`: looks at the bucket, prepares the directory, starts mariadbd with our plugin, and waits for its end.
//!
//! * The server is started once. A crash, a fence and an unreachable bucket end this program with a code of their own;
//!   whether to start again is for whoever started it.
//! * Credentials go from this process's environment to the server's, never to a command line.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use bucket::{Names, PutOutcome};
use bytes::Bytes;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::accounts::{Accounts, VARIABLES};
use crate::bootstrap;
use crate::data_directory::DataDirectory;
use crate::location::Reach;
use crate::outcome::{Outcome, say};
use crate::server::Server;

/// Serve SQL from a bucket until stopped.
///
/// Prepares the data directory, starts the stock MariaDB server with the Cistern engine in it, and waits. The first
/// start on an empty bucket makes the system tables; MYSQL_ROOT_PASSWORD, MYSQL_ALLOW_EMPTY_PASSWORD, MYSQL_DATABASE,
/// MYSQL_USER and MYSQL_PASSWORD (or their _FILE forms) work as in the official images. Without them root has no password
/// and can connect from this machine only.
///
/// A second server on the same bucket takes over at once; the first notices at its next write to the bucket, and exits.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cistern serve --bucket file:///srv/bucket --data ./data
  cistern serve --bucket s3://shop/production --region eu-central-1 --data /var/lib/cistern -- --port=3307
  AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… \\
  cistern serve --bucket s3://test/db --endpoint http://127.0.0.1:9000 --path-style --data ./data

Credentials for S3 come from AWS_ACCESS_KEY_ID and its friends, the profile file (AWS_PROFILE), or the role of the
container or instance; never from the command line.

Exit codes:
  0  stopped on request
  2  a setting, a directory or the bucket's content can't work: read the message, change something
  3  fenced: a newer server owns the bucket. Do not restart this one
  4  the bucket does not answer: try again later
  5  the server died: start it again, nothing acknowledged is lost")]
pub struct Arguments {
    /// Where the database lives: file:///absolute/path or s3://bucket/prefix
    #[arg(long, value_name = "URL", env = "CISTERN_BUCKET")]
    bucket: String,
    /// Directory on this machine for cache, log and sockets; may be lost at any time
    #[arg(long, value_name = "DIR", default_value = "./data")]
    data: PathBuf,
    #[command(flatten)]
    reach: Reach,
    /// Options for mariadbd, after `--`
    #[arg(last = true, value_name = "SERVER OPTION")]
    server_options: Vec<OsString>,
}

/// Serves until the end of the server. Progress goes to standard error.
pub fn serve(arguments: &Arguments) -> Outcome {
    match try_serve(arguments) {
        Ok(outcome) | Err(outcome) => outcome,
    }
}

#[expect(clippy::disallowed_methods, reason = "the announcement says how long the start took")]
fn try_serve(arguments: &Arguments) -> Result<Outcome, Outcome> {
    let start = Instant::now();
    let program = std::env::current_exe().map_err(|error| Outcome::BadConfiguration(error.to_string()))?;
    let home =
        program.parent().ok_or_else(|| Outcome::BadConfiguration("this program has no directory".into()))?;
    let server = Server::beside(home).map_err(Outcome::BadConfiguration)?;
    let accounts =
        Accounts::from_environment(&|name| std::env::var(name).ok()).map_err(Outcome::BadConfiguration)?;
    let url = arguments.reach.url(&arguments.bucket);
    // The directory first: a bucket inside it, as in `make run`, has its parent then.
    let directory = DataDirectory::open(&arguments.data).map_err(Outcome::BadConfiguration)?;
    let bucket = bucket::open(&url, &bucket::Options::default()).map_err(Outcome::of_bucket)?;
    let command = || mariadbd(&url, &server, &directory);

    let marker = Names::new("main").system_tables_marker();
    if bucket.head(&marker).map_err(Outcome::of_bucket)?.is_none() {
        say(format_args!("cistern: {} is empty: making the system tables (once)", arguments.bucket));
        let sql = bootstrap::script(&server.share, &accounts).map_err(Outcome::BadConfiguration)?;
        let mut first = command();
        first.arg("--bootstrap");
        bootstrap::run(first, &sql)?;
        match bucket.put_if_absent(&marker, Bytes::from_static(b"1\n")).map_err(Outcome::of_bucket)? {
            PutOutcome::Created | PutOutcome::Exists => {}
        }
    }
    drop(bucket);

    let init = directory.run().join("init.sql");
    let sql = bootstrap::log_tables(&server.share).map_err(Outcome::BadConfiguration)?;
    fs::write(&init, sql)
        .map_err(|error| Outcome::BadConfiguration(format!("{}: {error}", init.display())))?;
    let mut server_command = command();
    server_command.arg(format!("--init-file={}", init.display()));
    server_command.args(&arguments.server_options);
    supervise(server_command, &server, start)
}

/// The command that every start of the server shares.
fn mariadbd(url: &str, server: &Server, directory: &DataDirectory) -> Command {
    let mut command = Command::new(&server.mariadbd);
    let option = |name: &str, value: &Path| format!("--{name}={}", value.display());
    command.arg("--no-defaults"); // must be the first one
    command.arg(option("lc-messages-dir", &server.share));
    command.arg(option("character-sets-dir", &server.share.join("charsets")));
    command.arg(option("datadir", &directory.server()));
    command.arg(option("plugin-dir", &server.plugins));
    command.arg(option("tmpdir", &directory.temporary()));
    command.arg(option("socket", &directory.socket()));
    command.arg(option("pid-file", &directory.run().join("mariadbd.pid")));
    command.args(["--plugin-load-add=ha_cistern.so", "--cistern=FORCE_PLUS_PERMANENT", "--skip-innodb"]);
    command.args(["--default-storage-engine=CISTERN", "--default-tmp-storage-engine=Aria"]);
    // The default mode without NO_ENGINE_SUBSTITUTION, so that a dump that says ENGINE=InnoDB loads, with a warning.
    command.args(["--enforce-storage-engine=CISTERN"]);
    command.arg("--sql-mode=STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_AUTO_CREATE_USER");
    command.args(["--character-set-server=utf8mb4", "--skip-log-bin"]);
    command.arg(format!("--cistern-bucket={url}"));
    command.arg(option("cistern-data-dir", &directory.engine()));
    if rustix::process::geteuid().is_root() {
        command.arg("--user=root"); // mariadbd wants it said
    }
    for name in VARIABLES {
        for family in ["MYSQL", "MARIADB"] {
            command.env_remove(format!("{family}_{name}")).env_remove(format!("{family}_{name}_FILE"));
        }
    }
    command.current_dir(directory.run());
    command.process_group(0); // Ctrl-C reaches us alone, and we stop the server cleanly
    // SAFETY: the closure runs between fork and exec and makes one system call; it allocates nothing and takes no lock.
    #[expect(unsafe_code, reason = "only here can the child ask to be ended with its parent")]
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
                .map_err(Into::into)
        });
    }
    command
}

fn supervise(mut command: Command, server: &Server, start: Instant) -> Result<Outcome, Outcome> {
    let crash =
        |error: std::io::Error| Outcome::ServerCrash(format!("{}: {error}", server.mariadbd.display()));
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(crash)?;
    let pid = rustix::process::Pid::from_child(&child);
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).map_err(crash)?;
    let stop = signals.handle();
    let forwarder = std::thread::spawn(move || {
        for _ in signals.forever() {
            say(format_args!("cistern: stopping"));
            if rustix::process::kill_process(pid, rustix::process::Signal::TERM).is_err() {
                return; // it is gone already
            }
        }
    });

    let mut last_error = String::new();
    for line in BufReader::new(child.stderr.take().expect("stderr is piped")).split(b'\n') {
        let line = String::from_utf8_lossy(&line.map_err(crash)?).into_owned();
        say(format_args!("{line}"));
        if line.contains("[ERROR]") {
            last_error = line.clone();
        }
        // The server's own banner, which comes once it accepts connections.
        if let Some((_, rest)) = line.strip_prefix("Version: ").and_then(|banner| banner.split_once("port: "))
        {
            let port = rest.split_whitespace().next().unwrap_or("3306");
            let seconds = start.elapsed().as_secs_f64();
            say(format_args!(
                "cistern: ready in {seconds:.2} s; connect with: mariadb -h127.0.0.1 -P{port} -uroot"
            ));
        }
    }
    let status = child.wait().map_err(crash)?;
    stop.close();
    if forwarder.join().is_err() {
        say(format_args!("cistern: the signal thread panicked"));
    }
    Ok(Outcome::of_server(status, &last_error))
}
