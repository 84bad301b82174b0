//! An S3 server on 127.0.0.1 that goes wrong on purpose, for tests of the real server by hand and by script.
//!
//! `faulty-s3 <port> memory|<directory>|<upstream address> [share of requests that go wrong] [seed] [ms that each takes]`,
//! where an upstream is another S3 server without TLS, such as `moto_server`. Keys for `memory` and a directory: `test`
//! and the value of FAULTY_S3_SECRET, or `test`; any bucket's name is served as `test`. Prints one line once it listens,
//! and its counts when its input ends.

use std::io::Read as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use bucket::testkit::{Behind, FaultyServer, Keys, S3OverBucket};
use bucket::{Bucket, DirectoryBucket, Effect, MemoryBucket, Rule};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<(), String> {
    let usage = "faulty-s3 <port> memory|<directory>|<upstream address> [share] [seed] [ms]";
    let (Some(port), Some(behind)) = (arguments.first(), arguments.get(1)) else { return Err(usage.into()) };
    let port = port.parse().map_err(|error| format!("port {port}: {error}"))?;
    let share =
        arguments.get(2).map_or(Ok(0.0), |share| share.parse()).map_err(|error| format!("share: {error}"))?;
    let seed =
        arguments.get(3).map_or(Ok(1), |seed| seed.parse()).map_err(|error| format!("seed: {error}"))?;
    let milliseconds =
        arguments.get(4).map_or(Ok(0), |ms| ms.parse()).map_err(|error| format!("milliseconds: {error}"))?;
    let mut rules = if share > 0.0 { Rule::weather(share) } else { Vec::new() };
    if milliseconds > 0 {
        let each = Duration::from_millis(milliseconds);
        rules.push(Rule::new("*", Effect::Latency { p50: each, p99: each }));
    }
    let server = FaultyServer::start(port, open(behind)?, seed, rules).map_err(|error| error.to_string())?;
    println!("s3://test?endpoint=http://{}", server.address());
    // Ends with whoever started it: the pipe to it closes.
    let mut ignored = Vec::new();
    drop(std::io::stdin().read_to_end(&mut ignored));
    let log = server.faults().log();
    let broken = log.iter().filter(|request| request.decision.fault.is_some()).count();
    println!(
        "{} requests, {broken} of the last {} went wrong on purpose",
        server.faults().requests(),
        log.len()
    );
    Ok(())
}

fn open(behind: &str) -> Result<Behind, String> {
    if let Ok(address) = behind.parse() {
        return Ok(Behind::Server(address));
    }
    let bucket: Arc<dyn Bucket> = match behind {
        "memory" => Arc::new(MemoryBucket::new()),
        directory => {
            Arc::new(DirectoryBucket::open(Path::new(directory)).map_err(|error| error.to_string())?)
        }
    };
    let secret = std::env::var("FAULTY_S3_SECRET").unwrap_or_else(|_| "test".into());
    let keys = Keys { id: "test".into(), secret };
    Ok(Behind::Bucket(S3OverBucket::new("test", bucket, keys)))
}
