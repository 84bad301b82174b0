//! How a run ended, and the exit code that says so. The plugin ends the server with the same codes.

use std::fmt;
use std::io::Write as _;
use std::process::ExitCode;

/// Tells whoever reads our log. Nobody may be there any more, and that is no reason to end, or to stop listening.
pub fn say(line: fmt::Arguments<'_>) {
    _ = writeln!(std::io::stderr(), "{line}");
}

/// The end of a run. Codes are a contract with supervisors (README, "Exit codes"): never renumber.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Stopped because somebody asked.
    Clean,
    /// A setting, a directory, or the bucket's content can't work. A person must change something.
    BadConfiguration(String),
    /// A newer writer owns the bucket. Do not restart: it would take the bucket back.
    Fenced(String),
    /// The object store does not answer. Restarting later may help.
    BucketUnreachable(String),
    /// The server died. Restarting is right.
    ServerCrash(String),
}

impl Outcome {
    /// The code for the operating system.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Clean => 0,
            Self::BadConfiguration(_) => 2,
            Self::Fenced(_) => 3,
            Self::BucketUnreachable(_) => 4,
            Self::ServerCrash(_) => 5,
        })
    }

    /// What a request that failed means.
    pub fn of_bucket(error: bucket::BucketError) -> Self {
        match error.kind {
            bucket::ErrorKind::Unavailable => Self::BucketUnreachable(error.to_string()),
            _ => Self::BadConfiguration(error.to_string()),
        }
    }

    /// What mariadbd's end means; `said` is the last line in which the plugin or the server named the reason.
    pub fn of_server(status: std::process::ExitStatus, said: &str) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let reason = || if said.is_empty() { "see the lines above".to_owned() } else { said.to_owned() };
        match (status.code(), status.signal()) {
            (Some(0), _) => Self::Clean,
            (Some(2), _) => Self::BadConfiguration(reason()),
            (Some(3), _) => Self::Fenced(reason()),
            (Some(4), _) => Self::BucketUnreachable(reason()),
            (Some(code), _) => Self::ServerCrash(format!("mariadbd ended with code {code}: {}", reason())),
            (None, signal) => Self::ServerCrash(format!(
                "mariadbd was ended by signal {}; start again with the same command, nothing acknowledged is lost",
                signal.map_or_else(|| "unknown".to_owned(), |number| number.to_string())
            )),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clean => f.write_str("stopped"),
            Self::BadConfiguration(why) => write!(f, "can't run as configured: {why}"),
            Self::Fenced(why) => write!(f, "fenced, another writer owns this bucket: {why}"),
            Self::BucketUnreachable(why) => write!(f, "the bucket does not answer: {why}"),
            Self::ServerCrash(why) => write!(f, "the server died: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    #[test]
    fn each_end_of_the_server_has_its_own_meaning() {
        let ended = |code: i32| Outcome::of_server(ExitStatus::from_raw(code << 8), "because");
        assert_eq!(ended(0), Outcome::Clean);
        assert_eq!(ended(2), Outcome::BadConfiguration("because".into()));
        assert_eq!(ended(3), Outcome::Fenced("because".into()));
        assert_eq!(ended(4), Outcome::BucketUnreachable("because".into()));
        assert!(matches!(ended(1), Outcome::ServerCrash(why) if why.contains("code 1: because")));
        assert!(
            matches!(Outcome::of_server(ExitStatus::from_raw(9), ""), Outcome::ServerCrash(why) if why.contains("signal 9"))
        );
    }
}
