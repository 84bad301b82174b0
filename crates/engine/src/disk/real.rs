//! The machine's disk: a directory that one process owns.
//!
//! * `lock` in the root is held for as long as the value lives, so two servers never share a data directory.
//! * Directories are made durable when they are made; files and renames when `sync_directory` says so.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Advice, FallocateFlags, OFlags};

use super::direct::DirectFile;
use super::{Disk, DiskError, DiskFile, LOG_BLOCK};

const LOCK: &str = "lock";

/// A directory of the local file system.
#[derive(Debug)]
pub struct RealDisk {
    root: PathBuf,
    _lock: File,
}

impl RealDisk {
    /// Opens `root`, making it if it is absent, and takes it for this process until the value is dropped.
    ///
    /// An error says that another process has it, or why it can't be written.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, DiskError> {
        let root = root.into();
        std::fs::create_dir_all(&root).map_err(|e| failed("create directory", &root, &e))?;
        let path = root.join(LOCK);
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|e| failed("open", &path, &e))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { root, _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                Err(failed("lock", &path, &io::Error::other("another process uses this data directory")))
            }
            Err(TryLockError::Error(e)) => Err(failed("lock", &path, &e)),
        }
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Bytes that are free for this directory, with those that the files under `given_up` take.
    pub fn space(&self, given_up: &[&str]) -> Result<u64, DiskError> {
        let answer = rustix::fs::statvfs(&self.root);
        let system = answer.map_err(|e| failed("ask for the space of", &self.root, &e.into()))?;
        let mut bytes = system.f_bavail.saturating_mul(system.f_frsize);
        for name in
            given_up.iter().map(|directory| self.list(directory)).collect::<Result<Vec<_>, _>>()?.concat()
        {
            // Its blocks, not its length: what was never written is free.
            let taken = std::fs::metadata(self.path(&name)).map_or(0, |found| found.blocks() * 512);
            bytes = bytes.saturating_add(taken);
        }
        Ok(bytes)
    }

    fn path(&self, name: &str) -> PathBuf {
        debug_assert!(
            !name.starts_with('/') && !name.split('/').any(|part| part == ".."),
            "{name} leaves the root"
        );
        self.root.join(name)
    }

    /// Makes the parents of `path`, each durable in its own parent.
    fn make_parents(&self, path: &Path) -> Result<(), DiskError> {
        let parent = path.parent().unwrap_or(&self.root);
        if parent.is_dir() {
            return Ok(());
        }
        std::fs::create_dir_all(parent).map_err(|e| failed("create directory", parent, &e))?;
        for directory in parent.ancestors().skip(1).take_while(|directory| directory.starts_with(&self.root))
        {
            sync_directory(directory)?;
        }
        Ok(())
    }

    fn open_with(&self, name: &str, options: &mut OpenOptions) -> Result<Arc<dyn DiskFile>, DiskError> {
        let path = self.path(name);
        let file = options.read(true).write(true).open(&path).map_err(|e| failed("open", &path, &e))?;
        Ok(Arc::new(RealFile { file, path }))
    }

    fn collect(&self, directory: &Path, found: &mut Vec<String>) -> Result<(), DiskError> {
        let entries = match std::fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(failed("list", directory, &e)),
        };
        for entry in entries {
            let entry = entry.map_err(|e| failed("list", directory, &e))?;
            let path = entry.path();
            let kind = entry.file_type().map_err(|e| failed("list", &path, &e))?;
            if kind.is_dir() {
                self.collect(&path, found)?;
            } else if kind.is_file() {
                // A name that is not UTF-8 is not one of ours.
                found.extend(path.strip_prefix(&self.root).ok().and_then(Path::to_str).map(str::to_owned));
            }
        }
        Ok(())
    }
}

impl Disk for RealDisk {
    fn create(&self, name: &str) -> Result<Arc<dyn DiskFile>, DiskError> {
        self.make_parents(&self.path(name))?;
        self.open_with(name, OpenOptions::new().create_new(true))
    }
    fn open(&self, name: &str) -> Result<Arc<dyn DiskFile>, DiskError> {
        self.open_with(name, &mut OpenOptions::new())
    }
    fn open_log(&self, name: &str) -> Result<Arc<dyn DiskFile>, DiskError> {
        let plain = self.open(name)?;
        if plain.len()? % LOG_BLOCK != 0 {
            return Ok(plain);
        }
        let path = self.path(name);
        let direct =
            OpenOptions::new().read(true).write(true).custom_flags(OFlags::DIRECT.bits() as i32).open(&path);
        match direct {
            Ok(file) => Ok(Arc::new(DirectFile::new(file, path))),
            // How a file system says that it has no such thing.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(plain),
            Err(e) => Err(failed("open", &path, &e)),
        }
    }
    fn rename(&self, from: &str, to: &str) -> Result<(), DiskError> {
        let (from, to) = (self.path(from), self.path(to));
        self.make_parents(&to)?;
        std::fs::rename(&from, &to).map_err(|e| failed("rename", &from, &e))
    }
    fn remove(&self, name: &str) -> Result<(), DiskError> {
        let path = self.path(name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path, &e)),
            _ => Ok(()),
        }
    }
    fn list(&self, directory: &str) -> Result<Vec<String>, DiskError> {
        let mut found = Vec::new();
        self.collect(&self.path(directory), &mut found)?;
        found.sort_unstable();
        Ok(found)
    }
    fn sync_directory(&self, directory: &str) -> Result<(), DiskError> {
        sync_directory(&self.path(directory))
    }
}

fn sync_directory(path: &Path) -> Result<(), DiskError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|e| failed("sync directory", path, &e))
}

struct RealFile {
    file: File,
    path: PathBuf,
}

impl DiskFile for RealFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.file.write_all_at(bytes, offset).map_err(|e| failed("write", &self.path, &e))
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.file.read_exact_at(buffer, offset).map_err(|e| failed("read", &self.path, &e))
    }
    fn sync(&self) -> Result<(), DiskError> {
        sync(&self.file, &self.path)
    }
    fn len(&self) -> Result<u64, DiskError> {
        len(&self.file, &self.path)
    }
    fn set_len(&self, bytes: u64) -> Result<(), DiskError> {
        set_len(&self.file, &self.path, bytes)
    }
    fn allocate(&self, bytes: u64) -> Result<(), DiskError> {
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) if self.len()? < bytes => {
                self.set_len(bytes)
            }
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            Err(e) => Err(failed("allocate", &self.path, &e.into())),
        }
    }
    fn forget(&self, range: std::ops::Range<u64>) {
        // No length would mean "to the end of the file".
        let Some(length) = std::num::NonZeroU64::new(range.end.saturating_sub(range.start)) else { return };
        if let Err(error) = rustix::fs::fadvise(&self.file, range.start, Some(length), Advice::DontNeed) {
            tracing::debug!(path = %self.path.display(), %error, "the kernel took no advice; nothing depends on it");
        }
    }
}

pub(super) fn sync(file: &File, path: &Path) -> Result<(), DiskError> {
    file.sync_data().map_err(|e| failed("sync", path, &e))
}

pub(super) fn len(file: &File, path: &Path) -> Result<u64, DiskError> {
    file.metadata().map(|metadata| metadata.len()).map_err(|e| failed("read length of", path, &e))
}

pub(super) fn set_len(file: &File, path: &Path, bytes: u64) -> Result<(), DiskError> {
    file.set_len(bytes).map_err(|e| failed("cut", path, &e))
}

pub(super) fn failed(operation: &'static str, path: &Path, error: &io::Error) -> DiskError {
    DiskError {
        operation,
        path: path.display().to_string(),
        message: error.to_string(),
        full: matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded),
        absent: error.kind() == io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_again_under_their_names() {
        let directory = tempfile::tempdir().unwrap();
        let disk = RealDisk::open(directory.path().join("data")).unwrap();
        let file = disk.create("wal/deep/b").unwrap();
        file.write_at(3, b"xyz").unwrap();
        file.allocate(4096).unwrap();
        file.sync().unwrap();
        disk.create("wal/a").unwrap();
        disk.sync_directory("wal").unwrap();
        assert_eq!(disk.list("wal").unwrap(), ["wal/a", "wal/deep/b"]);
        assert_eq!(disk.list("nothing").unwrap(), [""; 0]);
        disk.rename("wal/deep/b", "aside/b").unwrap();
        let mut read = [9; 7];
        let file = disk.open("aside/b").unwrap();
        file.read_at(0, &mut read).unwrap();
        assert_eq!(&read, b"\0\0\0xyz\0");
        assert_eq!(file.len().unwrap(), 4096);
        disk.remove("aside/b").unwrap();
        disk.remove("aside/b").unwrap();
        assert!(disk.open("aside/b").err().is_some_and(|e| e.absent && e.path.contains("aside/b")));
        assert!(disk.create("wal/a").is_err(), "create never opens an existing file");
    }

    #[test]
    fn space_counts_what_may_be_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let disk = RealDisk::open(directory.path().join("data")).unwrap();
        let own = |disk: &RealDisk| {
            // Others may write at the same time.
            (0..100).map(|_| disk.space(&["copies"]).unwrap().saturating_sub(disk.space(&[]).unwrap())).min()
        };
        assert!(own(&disk) < Some(1 << 20));
        let file = disk.create("copies/some/a").unwrap();
        file.write_at(0, &[7; 8 << 20]).unwrap();
        file.sync().unwrap();
        assert!(own(&disk).is_some_and(|bytes| (7 << 20..20 << 20).contains(&bytes)), "{:?}", own(&disk));
    }

    #[test]
    fn a_second_process_is_told_that_the_directory_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let first = RealDisk::open(directory.path()).unwrap();
        let error = RealDisk::open(directory.path()).expect_err("taken").to_string();
        assert!(error.contains("another process uses this data directory"), "{error}");
        drop(first);
        RealDisk::open(directory.path()).unwrap();
    }

    #[test]
    fn a_log_file_holds_what_a_plain_file_would() {
        const LENGTH: usize = 3 << 20;
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let disk = RealDisk::open(directory.path()).unwrap();
        disk.create("log").unwrap().set_len(LENGTH as u64).unwrap();
        let mut state = 7_u64;
        let mut random = |below: usize| {
            // The middle of a linear congruential generator (Knuth's MMIX).
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below.max(1)
        };
        let mut expected = vec![0; LENGTH];
        let mut at = 64;
        let mut log = disk.open_log("log").unwrap();
        loop {
            let most = if random(200) == 0 { 700_000 } else { 9_000 };
            let bytes: Vec<u8> = (0..=random(most)).map(|_| random(256) as u8).collect();
            if at + bytes.len() > LENGTH {
                break;
            }
            log.write_at(at as u64, &bytes).unwrap();
            expected[at..at + bytes.len()].copy_from_slice(&bytes);
            at += bytes.len();
            let from = random(at);
            let mut read = vec![0; random((at - from).min(300_000))];
            log.read_at(from as u64, &mut read).unwrap();
            assert_eq!(read, expected[from..from + read.len()]);
            match random(20) {
                0 => log = disk.open_log("log").unwrap(),
                // As a spare that is used again: the first bytes of a file are new, what follows them in the block is gone.
                1 => at = at.saturating_sub(random(10_000)),
                _ => {}
            }
        }
        log.sync().unwrap();
        let mut found = vec![0; LENGTH];
        disk.open("log").unwrap().read_at(0, &mut found).unwrap();
        assert!(found[..at] == expected[..at], "the page cache shows what was written past it");
        assert!(log.read_at(LENGTH as u64 - 10, &mut [0; 20]).is_err(), "the end of the file");
    }

    #[test]
    fn a_full_disk_is_told_apart() {
        // /dev/full answers every write as a full disk does.
        let file = RealFile {
            file: OpenOptions::new().write(true).open("/dev/full").unwrap(),
            path: PathBuf::from("/dev/full"),
        };
        assert!(file.write_at(0, b"x").expect_err("full").full);
    }
}
