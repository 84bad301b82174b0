//! The first start on an empty bucket: makes the system tables, in our engine, and the first accounts.
//!
//! * The server's own scripts do it, fed to `mariadbd --bootstrap`, with our engine where they say Aria.
//! * A marker in the bucket says that it was done to the end; without it the next start does it again, which is harmless.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::accounts::Accounts;
use crate::outcome::{Outcome, say};

/// The server's scripts, in the order in which they build on each other.
const SCRIPTS: [&str; 6] = [
    "mysql_system_tables.sql",
    "mysql_performance_tables.sql",
    "mysql_system_tables_data.sql",
    "fill_help_tables.sql",
    "maria_add_gis_sp_bootstrap.sql",
    "mysql_sys_schema.sql",
];

/// The log tables must stay CSV files of this machine: the server writes them without a transaction.
const LOG_TABLES: [&str; 2] = ["general_log", "slow_log"];

/// Everything that the bootstrap reads.
///
/// # Errors
/// A sentence that names the script that can't be read.
pub fn script(share: &Path, accounts: &Accounts) -> Result<String, String> {
    let mut sql =
        String::from("CREATE DATABASE IF NOT EXISTS mysql;\nUSE mysql;\nSET @auth_root_socket=NULL;\n");
    for name in SCRIPTS {
        let path = share.join(name);
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        for line in text.lines() {
            // The account of this machine's name would be in every copy of the bucket.
            if !line.contains("@current_hostname") {
                sql.push_str(&in_our_engine(line));
                sql.push('\n');
            }
        }
    }
    writeln!(sql, "USE mysql;\n{}", accounts.sql()).expect("writing to a string does not fail");
    Ok(sql)
}

/// The statements that give a fresh data directory its log tables, for `--init-file`.
///
/// # Errors
/// A sentence that names the script that can't be read.
pub fn log_tables(share: &Path) -> Result<String, String> {
    let path = share.join(SCRIPTS[0]);
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let wanted =
        |line: &&str| LOG_TABLES.iter().any(|table| line.contains(&format!("IF NOT EXISTS {table} ")));
    let mut sql = String::from("SET SESSION enforce_storage_engine=NULL;\nUSE mysql;\n");
    for line in text.lines().filter(wanted) {
        sql.push_str(line);
        sql.push('\n');
    }
    Ok(sql)
}

/// Runs `mariadbd`, set up for a bootstrap, on `sql`.
pub fn run(mut mariadbd: Command, sql: &str) -> Result<(), Outcome> {
    let crash = |error: std::io::Error| Outcome::ServerCrash(format!("mariadbd --bootstrap: {error}"));
    let mut child =
        mariadbd.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(crash)?;
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let sql = sql.to_owned();
    // A server that dies early closes the pipe; its own words say more than our broken pipe.
    let writer = std::thread::spawn(move || stdin.write_all(sql.as_bytes()).is_ok());
    let output = child.wait_with_output().map_err(crash)?;
    let complete = writer.join().unwrap_or(false);
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() && complete {
        return Ok(());
    }
    for line in said.lines() {
        say(format_args!("{line}"));
    }
    let last_error = said.lines().rfind(|line| line.contains("ERROR")).unwrap_or_default();
    match Outcome::of_server(output.status, last_error) {
        Outcome::Clean => {
            Err(Outcome::ServerCrash("mariadbd --bootstrap did not read its script to the end".into()))
        }
        other => Err(other),
    }
}

/// The scripts make durable tables in Aria; ours are in our engine.
fn in_our_engine(line: &str) -> String {
    const ENGINE: &str = "CISTERN";
    let mut rest = line;
    let mut out = String::with_capacity(line.len());
    while let Some(at) = find_ignoring_case(rest, "aria") {
        let before = &rest[..at];
        let trimmed = before.trim_end_matches([' ', '=', '\'']);
        let names_engine = trimmed.len() < before.len() && ends_with_ignoring_case(trimmed, "engine")
            || before.ends_with('\'') && rest[at + 4..].starts_with('\'');
        out.push_str(before);
        rest = &rest[at..];
        if names_engine {
            out.push_str(ENGINE);
            rest = &rest[4..];
            for option in [" transactional=1", " transactional=0"] {
                if rest.len() >= option.len()
                    && rest.as_bytes()[..option.len()].eq_ignore_ascii_case(option.as_bytes())
                {
                    rest = &rest[option.len()..];
                }
            }
        } else {
            out.push_str(&rest[..4]);
            rest = &rest[4..];
        }
    }
    out.push_str(rest);
    out
}

fn find_ignoring_case(text: &str, wanted: &str) -> Option<usize> {
    text.as_bytes().windows(wanted.len()).position(|window| window.eq_ignore_ascii_case(wanted.as_bytes()))
}

fn ends_with_ignoring_case(text: &str, wanted: &str) -> bool {
    text.len() >= wanted.len()
        && text.as_bytes()[text.len() - wanted.len()..].eq_ignore_ascii_case(wanted.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_tables_land_in_our_engine_and_other_words_stay() {
        assert_eq!(
            in_our_engine("CREATE TABLE t (a int) engine=Aria transactional=1 CHARACTER SET utf8"),
            "CREATE TABLE t (a int) engine=CISTERN CHARACTER SET utf8"
        );
        assert_eq!(in_our_engine("ENGINE = Aria;"), "ENGINE = CISTERN;");
        assert_eq!(
            in_our_engine("IF(@have_innodb <> 0, 'InnoDB', 'Aria');"),
            "IF(@have_innodb <> 0, 'InnoDB', 'CISTERN');"
        );
        assert_eq!(in_our_engine("see Variables and ariadne"), "see Variables and ariadne");
        assert_eq!(in_our_engine("engine=CSV CHARACTER SET utf8"), "engine=CSV CHARACTER SET utf8");
    }
}
