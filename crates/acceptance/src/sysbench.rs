//! sysbench 1.0.20, run from outside, through the server's Unix socket: TCP on loopback takes more processor time than the server does
//! for a point select, and it is not the servers' own.

use std::process::Command;

use mysql::prelude::Queryable;

/// Where and how to run it.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// A TCP port of the server, which is asked there for its socket.
    pub port: u16,
    /// What `--mysql-storage-engine` asks for.
    pub engine: &'a str,
    /// Its script, such as `oltp_read_write`.
    pub workload: &'a str,
    /// The schema, which exists.
    pub database: &'a str,
    /// Connections.
    pub threads: u32,
}

impl Run<'_> {
    /// `prepare`, `run` or `cleanup`; what it printed.
    ///
    /// # Errors
    /// It is not installed, or an error that it does not repeat: with all that it said.
    pub fn verb(&self, verb: &str, options: &[String]) -> Result<String, String> {
        let Self { port, engine, workload, database, threads } = self;
        let socket: String = crate::server::connect(*port)
            .and_then(|mut connection| connection.query_first("SELECT @@socket"))
            .map_err(|error| error.to_string())?
            .ok_or("a server without a socket")?;
        let output = Command::new("sysbench")
            .arg(workload)
            .args(["--db-driver=mysql", "--mysql-host=localhost", "--mysql-user=root"])
            .arg(format!("--mysql-storage-engine={engine}"))
            .arg(format!("--mysql-socket={socket}"))
            .arg(format!("--mysql-db={database}"))
            .arg(format!("--threads={threads}"))
            .args(options)
            .arg(verb)
            .output()
            .map_err(|error| format!("sysbench: {error}; `make setup` installs it"))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() && !said.contains("FATAL") {
            return Ok(said);
        }
        let complaint = String::from_utf8_lossy(&output.stderr);
        Err(format!("sysbench {workload} {verb} with {threads} threads failed:\n{said}{complaint}"))
    }
}
