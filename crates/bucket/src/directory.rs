//! A bucket in a directory (`docs/formats/bucket.md`): an object is a file, its name is the path below the root.
//!
//! * A file appears under its name whole and synced, or not at all; the name is synced before the call returns.
//! * Any number of processes may write; the file system picks the one that creates a name.
//! * After a directory could not be synced, nothing is acknowledged any more: what the disk holds is unknown.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::api::{check_prefix, check_ranges};
use crate::{Bucket, BucketError, ErrorKind, Meters, ObjectInfo, ObjectName, PutOutcome};

/// Files being written; never listed. Same file system as the objects, so that a rename is atomic.
const UNFINISHED: &str = ".unfinished";

/// An unfinished file that was not touched for so long has lost its writer.
const UNFINISHED_AGE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Objects as files below a root directory.
#[derive(Debug)]
pub struct DirectoryBucket {
    root: PathBuf,
    /// Directories whose own names this process has synced, up to the root.
    synced: Mutex<HashSet<PathBuf>>,
    /// Why nothing can be acknowledged any more.
    failed: Mutex<Option<String>>,
    unfinished: AtomicU64,
    orphans_removed: AtomicBool,
    meters: Meters,
}

impl DirectoryBucket {
    /// Opens the bucket at `root`, which is created, for this user alone, if its parent exists. (A missing parent is more often a typing
    /// error or a missing mount than a wish, and an empty bucket looks like lost data.) Reads and writes nothing else.
    pub fn open(root: &Path) -> Result<Self, BucketError> {
        let name = ObjectName::from_listing(root.display().to_string());
        let refuse = |error: io::Error| explain("OPEN", &name, root, &error);
        let root = std::path::absolute(root).map_err(refuse)?;
        // Whoever may read the files may read every table.
        match fs::DirBuilder::new().mode(0o700).create(&root) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists && !root.is_dir() => {
                return Err(match root.parent() {
                    Some(parent) if error.kind() == io::ErrorKind::NotFound => BucketError::new(
                        ErrorKind::BadRequest,
                        "OPEN",
                        &name,
                        format!("there is no directory {}; create it first", parent.display()),
                    ),
                    _ => refuse(error),
                });
            }
            _ if !root.is_dir() => {
                let message = "it is a file; a bucket is a directory";
                return Err(BucketError::new(ErrorKind::BadRequest, "OPEN", &name, message));
            }
            _ => (),
        }
        fs::read_dir(&root).map_err(refuse)?;
        Ok(Self {
            root,
            synced: Mutex::default(),
            failed: Mutex::default(),
            unfinished: AtomicU64::new(0),
            orphans_removed: AtomicBool::new(false),
            meters: Meters::default(),
        })
    }

    /// Where the objects are.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, operation: &'static str, name: &ObjectName) -> Result<PathBuf, BucketError> {
        let relative = name.as_str().strip_suffix('/').unwrap_or(name.as_str());
        let fits = |part: &str| {
            !matches!(part, "" | "." | "..") && !part.starts_with(UNFINISHED) && !part.contains('\0')
        };
        if relative.split('/').all(fits) {
            return Ok(self.root.join(relative));
        }
        Err(BucketError::new(ErrorKind::BadRequest, operation, name, "no file can have this name"))
    }

    /// Writes `body` where nobody looks, then gives it its name with `place`, and syncs both.
    fn store<T>(
        &self,
        name: &ObjectName,
        body: &[u8],
        place: impl FnOnce(&Path, &Path) -> io::Result<T>,
    ) -> Result<T, BucketError> {
        let path = self.path("PUT", name)?;
        self.check_not_failed(name)?;
        let parent = path.parent().expect("an object is below the root");
        self.make_directory(name, parent)?;
        let unfinished = self.write_unfinished(name, body)?;
        let placed = place(&unfinished, &path).map_err(|error| explain("PUT", name, &path, &error));
        if placed.is_err() || unfinished.exists() {
            remove_quietly(&unfinished);
        }
        let placed = placed?;
        // Also when the name was taken: its writer may not have synced it yet, and the caller will rely on it.
        self.sync_directory(name, parent)?;
        Ok(placed)
    }

    fn write_unfinished(&self, name: &ObjectName, body: &[u8]) -> Result<PathBuf, BucketError> {
        let directory = self.root.join(UNFINISHED);
        self.make_directory(name, &directory)?;
        let (path, mut file) =
            self.create_unfinished(&directory).map_err(|error| explain("PUT", name, &directory, &error))?;
        match file.write_all(body).and_then(|()| file.sync_all()) {
            Ok(()) => {
                if !self.orphans_removed.swap(true, Ordering::Relaxed) {
                    remove_orphans(&directory, &file);
                }
                Ok(path)
            }
            Err(error) => {
                remove_quietly(&path);
                Err(explain("PUT", name, &path, &error))
            }
        }
    }

    /// A new file. Two containers may see each other's files and have the same process id, hence the tries.
    fn create_unfinished(&self, directory: &Path) -> io::Result<(PathBuf, File)> {
        let mut tries = 1000;
        loop {
            let number = self.unfinished.fetch_add(1, Ordering::Relaxed);
            let path = directory.join(format!("{}-{number}", std::process::id()));
            match File::create_new(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && tries > 0 => tries -= 1,
                created => return Ok((path, created?)),
            }
        }
    }

    /// Makes `directory` and what is above it up to the root, all synced. Also syncs a directory that is there already
    /// when this process first meets it: whoever made it may have crashed before its own sync.
    fn make_directory(&self, name: &ObjectName, directory: &Path) -> Result<(), BucketError> {
        if directory.is_dir() && self.synced.lock().contains(directory) {
            return Ok(());
        }
        let parent = directory.parent().unwrap_or(directory);
        if directory != self.root {
            self.make_directory(name, parent)?;
        }
        fs::create_dir(directory)
            .or_else(exists_is_fine)
            .map_err(|error| explain("PUT", name, directory, &error))?;
        self.sync_directory(name, parent)?;
        self.synced.lock().insert(directory.to_owned());
        Ok(())
    }

    fn sync_directory(&self, name: &ObjectName, directory: &Path) -> Result<(), BucketError> {
        match File::open(directory).and_then(|directory| directory.sync_all()) {
            // A parent of the root that we may not open: it was there before us.
            Err(error)
                if error.kind() == io::ErrorKind::PermissionDenied && !directory.starts_with(&self.root) =>
            {
                Ok(())
            }
            Err(error) => {
                *self.failed.lock() = Some(format!("syncing {}: {error}", directory.display()));
                Err(explain("PUT", name, directory, &error))
            }
            Ok(()) => Ok(()),
        }
    }

    fn check_not_failed(&self, name: &ObjectName) -> Result<(), BucketError> {
        match &*self.failed.lock() {
            None => Ok(()),
            Some(failed) => {
                let message =
                    format!("nothing is written since an earlier failure ({failed}); restart to try again");
                Err(BucketError::new(ErrorKind::Unavailable, "PUT", name, message))
            }
        }
    }

    fn open_object(&self, name: &ObjectName) -> Result<(File, u64), BucketError> {
        let path = self.path("GET", name)?;
        let refuse = |error: io::Error| explain("GET", name, &path, &error);
        let file = File::open(&path).map_err(refuse)?;
        let metadata = file.metadata().map_err(refuse)?;
        if !metadata.is_file() {
            return Err(BucketError::new(
                ErrorKind::NotFound,
                "GET",
                name,
                "it is a directory, not an object",
            ));
        }
        Ok((file, metadata.len()))
    }

    fn read(&self, name: &ObjectName, file: &File, range: Range<u64>) -> Result<Bytes, BucketError> {
        let mut body = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut body, range.start)
            .map_err(|error| explain("GET", name, &self.root.join(name.as_str()), &error))?;
        Ok(body.into())
    }

    fn read_all(&self, name: &ObjectName) -> Result<Bytes, BucketError> {
        let (file, length) = self.open_object(name)?;
        self.read(name, &file, 0..length)
    }

    fn read_ranges(&self, name: &ObjectName, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, BucketError> {
        let (file, length) = self.open_object(name)?;
        check_ranges(name, length, ranges)?;
        ranges.iter().map(|range| self.read(name, &file, range.clone())).collect()
    }

    /// Adds what is below `directory`. What vanishes meanwhile was deleted, what is no file and no directory is not ours.
    fn walk(
        &self,
        prefix: &ObjectName,
        directory: &Path,
        found: &mut Vec<ObjectInfo>,
    ) -> Result<(), BucketError> {
        let refuse = |error: io::Error| explain("LIST", prefix, directory, &error);
        let entries = match fs::read_dir(directory) {
            Err(error) if is_absent(&error) => return Ok(()),
            entries => entries.map_err(refuse)?,
        };
        for entry in entries {
            let entry = entry.map_err(refuse)?;
            if entry.file_name() == OsStr::new(UNFINISHED) {
                continue;
            }
            let path = entry.path();
            match entry.metadata() {
                Err(error) if is_absent(&error) => (),
                Err(error) => return Err(refuse(error)),
                Ok(metadata) if metadata.is_dir() => self.walk(prefix, &path, found)?,
                Ok(metadata) if metadata.is_file() => {
                    let relative = path.strip_prefix(&self.root).expect("the walk stays below the root");
                    if let Some(name) = relative.to_str() {
                        found
                            .push(ObjectInfo { name: ObjectName::from_listing(name), bytes: metadata.len() });
                    }
                }
                Ok(_) => (),
            }
        }
        Ok(())
    }
}

impl Bucket for DirectoryBucket {
    fn put_if_absent(&self, name: &ObjectName, body: Bytes) -> Result<PutOutcome, BucketError> {
        let outcome = self.store(name, &body, place_if_absent);
        count(&self.meters.put, body.len(), &outcome);
        outcome
    }

    fn put(&self, name: &ObjectName, body: Bytes) -> Result<(), BucketError> {
        let outcome = self.store(name, &body, |from, to| fs::rename(from, to));
        count(&self.meters.put, body.len(), &outcome);
        outcome
    }

    fn get(&self, name: &ObjectName) -> Result<Bytes, BucketError> {
        let body = self.read_all(name);
        count(&self.meters.get, body.as_ref().map_or(0, Bytes::len), &body);
        body
    }

    fn get_ranges(&self, name: &ObjectName, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, BucketError> {
        let bodies = self.read_ranges(name, ranges);
        count(&self.meters.get, bodies.iter().flatten().map(Bytes::len).sum(), &bodies);
        bodies
    }

    fn head(&self, name: &ObjectName) -> Result<Option<u64>, BucketError> {
        let path = self.path("HEAD", name)?;
        let length = match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.is_file().then_some(metadata.len())),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(explain("HEAD", name, &path, &error)),
        };
        count(&self.meters.head, 0, &length);
        length
    }

    fn list(&self, prefix: &ObjectName) -> Result<Vec<ObjectInfo>, BucketError> {
        check_prefix(prefix)?;
        let directory =
            if prefix.as_str().is_empty() { self.root.clone() } else { self.path("LIST", prefix)? };
        // A root that is gone is a missing mount, not an empty bucket.
        fs::metadata(&self.root).map_err(|error| explain_lost_root(prefix, &self.root, &error))?;
        let mut found = Vec::new();
        let walked = self.walk(prefix, &directory, &mut found);
        count(&self.meters.list, 0, &walked);
        walked?;
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    fn delete(&self, names: &[ObjectName]) -> Result<(), BucketError> {
        let mut outcome = Ok(());
        for name in names {
            let path = self.path("DELETE", name)?;
            match fs::remove_file(&path) {
                Err(error) if !is_absent(&error) => outcome = Err(explain("DELETE", name, &path, &error)),
                _ => (),
            }
        }
        count(&self.meters.delete, 0, &outcome);
        outcome
    }

    fn meters(&self) -> &Meters {
        &self.meters
    }
}

/// Gives the file at `from` the name `to` unless that is taken; then `from` stays.
fn place_if_absent(from: &Path, to: &Path) -> io::Result<PutOutcome> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(PutOutcome::Created),
        Err(Errno::EXIST) => Ok(PutOutcome::Exists),
        // A file system without the flag (NFS, some FUSE ones): a hard link does not replace either.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => match fs::hard_link(from, to) {
            Ok(()) => Ok(PutOutcome::Created),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(PutOutcome::Exists),
            Err(error) => Err(error),
        },
        Err(error) => Err(error.into()),
    }
}

fn exists_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Best effort: a file left behind wastes space until [`remove_orphans`] finds it.
fn remove_quietly(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && !is_absent(&error)
    {
        tracing::warn!(path = %path.display(), %error, "an unfinished file stays behind");
    }
}

/// Removes files whose writers are long gone, as the file system's own clock tells by the file just written.
fn remove_orphans(directory: &Path, fresh: &File) {
    let Ok(now) = fresh.metadata().and_then(|metadata| metadata.modified()) else { return };
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        let age = modified.ok().and_then(|modified| now.duration_since(modified).ok());
        if age.is_some_and(|age| age > UNFINISHED_AGE_MAX) {
            remove_quietly(&entry.path());
        }
    }
}

fn count<T>(meter: &crate::OpMeter, bytes: usize, outcome: &Result<T, BucketError>) {
    match outcome {
        Ok(_) => meter.count(bytes as u64),
        Err(_) => meter.count_error(),
    }
}

/// The system's words, the path, and what to do about it.
fn explain(operation: &'static str, name: &ObjectName, path: &Path, error: &io::Error) -> BucketError {
    let path = path.display();
    let (kind, message) = match error.kind() {
        io::ErrorKind::NotFound if operation == "GET" => {
            (ErrorKind::NotFound, format!("there is no file {path}"))
        }
        io::ErrorKind::NotADirectory if operation == "GET" => {
            (ErrorKind::NotFound, format!("there is no file {path}"))
        }
        io::ErrorKind::PermissionDenied => {
            (ErrorKind::Denied, format!("{path}: this user may not ({error}); change its owner or mode"))
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            (ErrorKind::Denied, format!("{path} is on a file system that is mounted read-only"))
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            (ErrorKind::Unavailable, format!("{path}: no space is left ({error}); free some and try again"))
        }
        _ => (ErrorKind::Unavailable, format!("{path}: {error}")),
    };
    BucketError::new(kind, operation, name, message)
}

fn explain_lost_root(prefix: &ObjectName, root: &Path, error: &io::Error) -> BucketError {
    let message = format!("the bucket's directory {} is gone ({error}); is it mounted?", root.display());
    BucketError::new(ErrorKind::Unavailable, "LIST", prefix, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn name(text: &str) -> ObjectName {
        ObjectName::from_listing(text)
    }

    fn bucket() -> (tempfile::TempDir, DirectoryBucket) {
        let directory = tempfile::tempdir().unwrap();
        let bucket = DirectoryBucket::open(directory.path()).unwrap();
        (directory, bucket)
    }

    fn files_in(directory: &Path) -> usize {
        fs::read_dir(directory).map_or(0, Iterator::count)
    }

    #[test]
    fn the_bucket_is_created_but_not_the_directories_above_it() {
        let directory = tempfile::tempdir().unwrap();
        DirectoryBucket::open(&directory.path().join("bucket")).unwrap();
        let mode = fs::metadata(directory.path().join("bucket")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let error = DirectoryBucket::open(&directory.path().join("no/bucket")).unwrap_err();
        assert_eq!(error.kind, ErrorKind::BadRequest);
        assert!(error.message.contains("no; create it first"), "{error}");
    }

    #[test]
    fn a_file_is_no_bucket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "").unwrap();
        let error = DirectoryBucket::open(&path).unwrap_err();
        assert!(error.to_string().contains("it is a file"), "{error}");
    }

    #[test]
    fn unfinished_files_are_never_listed_and_do_not_stay() {
        let (directory, bucket) = bucket();
        bucket.put_if_absent(&name("a"), Bytes::from_static(b"1")).unwrap();
        bucket.put_if_absent(&name("a"), Bytes::from_static(b"2")).unwrap();
        bucket.put(&name("b"), Bytes::from_static(b"3")).unwrap();
        assert_eq!(files_in(&directory.path().join(UNFINISHED)), 0);
        fs::write(directory.path().join(UNFINISHED).join("crashed"), "half").unwrap();
        assert_eq!(bucket.list(&name("")).unwrap().len(), 2);
    }

    #[test]
    fn a_file_whose_writer_is_long_gone_is_removed_by_the_next_process_that_writes() {
        let (directory, bucket) = bucket();
        let unfinished = directory.path().join(UNFINISHED);
        fs::create_dir(&unfinished).unwrap();
        fs::write(unfinished.join("fresh"), "").unwrap();
        let old = File::create(unfinished.join("old")).unwrap();
        old.set_modified(std::time::UNIX_EPOCH).unwrap();
        bucket.put(&name("a"), Bytes::new()).unwrap();
        assert!(!unfinished.join("old").exists());
        assert!(unfinished.join("fresh").exists());
    }

    #[test]
    fn names_that_lead_out_of_the_bucket_are_refused() {
        let (_directory, bucket) = bucket();
        for bad in ["../a", "a/../../b", "/etc/passwd", "a//b", "", ".unfinished/x", "a\0b"] {
            let error = bucket.put(&name(bad), Bytes::new()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::BadRequest, "{bad:?}");
        }
    }

    #[test]
    fn a_lost_mount_is_not_an_empty_bucket() {
        let (directory, bucket) = bucket();
        drop(directory);
        let error = bucket.list(&name("main/epoch/")).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unavailable);
        assert!(error.message.contains("is it mounted?"), "{error}");
    }

    #[test]
    fn a_directory_that_may_not_be_written_says_so_by_name() {
        let (directory, bucket) = bucket();
        bucket.put(&name("a"), Bytes::new()).unwrap();
        fs::set_permissions(directory.path().join(UNFINISHED), fs::Permissions::from_mode(0o555)).unwrap();
        if File::create(directory.path().join(UNFINISHED).join("root")).is_ok() {
            return; // Root may write everywhere; CI runs this as a user too.
        }
        let error = bucket.put(&name("b"), Bytes::new()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Denied);
        assert!(error.message.contains(UNFINISHED), "{error}");
    }

    #[test]
    fn errors_of_the_system_are_sorted_by_what_to_do() {
        let kinds = [
            (Errno::NOSPC, ErrorKind::Unavailable, "no space is left"),
            (Errno::DQUOT, ErrorKind::Unavailable, "no space is left"),
            (Errno::ROFS, ErrorKind::Denied, "mounted read-only"),
            (Errno::ACCESS, ErrorKind::Denied, "change its owner or mode"),
            (Errno::IO, ErrorKind::Unavailable, "/b/a"),
        ];
        for (errno, kind, words) in kinds {
            let error = explain("PUT", &name("a"), Path::new("/b/a"), &errno.into());
            assert_eq!(error.kind, kind, "{error}");
            assert!(error.message.contains(words), "{error}");
        }
    }
}
