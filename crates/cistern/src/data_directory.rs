//! The directory on this machine: a cache, the newest second of log, and what mariadbd wants as files.
//!
//! * One process tree uses it at a time: the lock is inherited by the server, so that it outlives a killed `cistern`.
//! * Everything in it may be deleted while nothing runs; what the bucket holds comes back.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::{FdFlags, fcntl_setfd};

/// A data directory that this process tree has locked.
#[derive(Debug)]
pub struct DataDirectory {
    root: PathBuf,
    /// Held, not read: closing it in the last process of the tree frees the directory.
    _lock: File,
}

impl DataDirectory {
    /// Makes what is missing under `root` and locks it.
    ///
    /// # Errors
    /// A sentence for the operator: it can't be written, or another server uses it.
    pub fn open(root: &Path) -> Result<Self, String> {
        let name = root.display();
        let failed = |error: io::Error| format!("data directory {name}: {error}");
        fs::create_dir_all(root).map_err(failed)?;
        let root = fs::canonicalize(root).map_err(failed)?;
        let lock = File::options().create(true).append(true).open(root.join("lock")).map_err(failed)?;
        if !locked_in_time(&lock) {
            return Err(format!(
                "data directory {name} is in use by another server; stop it, or pass another --data"
            ));
        }
        fcntl_setfd(&lock, FdFlags::empty()).map_err(|error| failed(error.into()))?;
        let directory = Self { root, _lock: lock };
        for path in [directory.server(), directory.engine(), directory.run(), directory.temporary()] {
            fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        }
        Ok(directory)
    }

    /// mariadbd's own directory.
    pub fn server(&self) -> PathBuf {
        self.root.join("server")
    }
    /// The engine's log and cache.
    pub fn engine(&self) -> PathBuf {
        self.root.join("engine")
    }
    /// Socket, pid and what else lives as long as a run.
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }
    /// Where the server sorts and keeps temporary tables. Its own, because a starting server deletes what looks like an
    /// earlier one's, and another server on this machine may be using that.
    pub fn temporary(&self) -> PathBuf {
        self.root.join("tmp")
    }
    /// The local socket; under the temporary directory if the path would be too long for one.
    pub fn socket(&self) -> PathBuf {
        const SOCKET_PATH_MAX: usize = 100; // sun_path has 108 bytes
        let socket = self.run().join("mysqld.sock");
        if socket.as_os_str().len() <= SOCKET_PATH_MAX {
            return socket;
        }
        std::env::temp_dir().join(format!("cistern-{}.sock", std::process::id()))
    }
}

/// Takes the lock, waiting a little: a server that was killed a moment ago lets go of it when its last thread is gone.
#[expect(clippy::disallowed_methods, reason = "the dying server is another process, in real time")]
fn locked_in_time(lock: &File) -> bool {
    const PAUSE: Duration = Duration::from_millis(20);
    const TRIES: u32 = 250;
    for _ in 0..TRIES {
        if flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return true;
        }
        std::thread::sleep(PAUSE);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_in_use_is_refused() {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let first = DataDirectory::open(scratch.path()).expect("free");
        assert!(DataDirectory::open(scratch.path()).expect_err("locked").contains("in use"));
        drop(first);
        drop(DataDirectory::open(scratch.path()).expect("free again"));
    }

    #[test]
    fn a_long_path_does_not_break_the_socket() {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let deep = DataDirectory::open(&scratch.path().join("d".repeat(120))).expect("free");
        assert!(deep.socket().as_os_str().len() < 108);
    }
}
