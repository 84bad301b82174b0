//! `cistern`: the program a person runs. Logic of its own is not allowed in here; it prepares, starts and reports.

mod accounts;
mod bootstrap;
mod data_directory;
mod inspect;
mod location;
mod outcome;
mod serve;
mod server;

use clap::{Parser, Subcommand};
use outcome::{Outcome, say};

/// A MySQL-compatible database whose home is an object store.
///
/// Every table, user, grant, view, trigger and procedure is kept in a bucket; this machine holds a cache and the newest
/// second of log. Kill it, lose its disk, start it elsewhere: everything is there.
#[derive(Parser)]
#[command(
    name = "cistern",
    version,
    after_help = "Start here:  cistern serve --bucket file:///srv/bucket --data ./data"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve SQL from a bucket until stopped.
    Serve(serve::Arguments),
    /// Say in words what one object of a bucket holds.
    Inspect(inspect::Arguments),
}

fn main() -> std::process::ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Serve(arguments) => serve::serve(&arguments),
        Command::Inspect(arguments) => inspect::inspect(&arguments),
    };
    match &outcome {
        Outcome::Clean => {}
        other => say(format_args!("cistern: {other}")),
    }
    outcome.exit_code()
}
