//! The ssts of a branch, wherever their bytes are: a local file, the bucket, and on the way memory.
//!
//! * An sst that is not in the bucket yet has a synced local file, which nothing but `forget` removes.
//! * The bucket is the truth: what does not verify locally is dropped and read from there.
//! * Local files lie under the branch's identity, so a data directory that meets another bucket can't mix them up.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bucket::{Bucket, Names, ObjectName};
use bytes::Bytes;
use parking_lot::Mutex;

use crate::cache::{BlockCache, BlockCacheStatus};
use crate::disk::{Disk, DiskFile};
use crate::sst::{self, Sst};
use crate::version::SstMeta;
use crate::{BranchId, Error, Kind, Result, SstId};

/// What a store is made of.
pub(crate) struct StoreParts {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) bucket: Arc<dyn Bucket>,
    pub(crate) names: Names,
    /// Whose ssts these are.
    pub(crate) branch: BranchId,
    pub(crate) block_cache_bytes: usize,
    pub(crate) disk_cache_bytes: u64,
}

/// Ssts by name.
pub(crate) struct SstStore {
    disk: Arc<dyn Disk>,
    bucket: Arc<dyn Bucket>,
    names: Names,
    directory: String,
    blocks: Arc<BlockCache>,
    local: Mutex<HashMap<SstId, LocalFile>>,
}

#[derive(Clone)]
struct LocalFile {
    file: Arc<dyn DiskFile>,
    meta: Arc<SstMeta>,
    uploaded: bool,
}

impl SstStore {
    /// A store without local files; those of an earlier life come in with `adopt`.
    pub(crate) fn new(parts: StoreParts) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            disk: parts.disk,
            bucket: parts.bucket,
            names: parts.names,
            directory: format!("sst/{}", hex(&parts.branch.0)),
            blocks: BlockCache::new(parts.block_cache_bytes),
            local: Mutex::default(),
        }))
    }

    /// The open sst that the manifest calls `meta`; opened at its first use, for as long as `meta` lives.
    #[inline]
    pub(crate) fn open<'a>(self: &Arc<Self>, meta: &'a Arc<SstMeta>) -> Result<&'a Arc<Sst>> {
        match meta.opened.0.get() {
            Some(sst) => Ok(sst),
            None => self.open_first(meta),
        }
    }

    #[cold]
    fn open_first<'a>(self: &Arc<Self>, meta: &'a Arc<SstMeta>) -> Result<&'a Arc<Sst>> {
        let source = ByteSource::Stored { store: Arc::clone(self), id: meta.id };
        let sst = Arc::new(Sst::open(meta, source, &self.blocks)?);
        Ok(meta.opened.0.get_or_init(|| sst))
    }

    /// Returns once `bytes` are synced in a local file, which stays until they are in the bucket.
    ///
    /// [`Kind::Full`] if the disk is; nothing is left behind then.
    pub(crate) fn write_local(&self, meta: &Arc<SstMeta>, bytes: &Bytes) -> Result<()> {
        assert_eq!(bytes.len() as u64, meta.bytes, "{}: its meta says otherwise", meta.id);
        let name = self.file_name(meta.id);
        let written = self.write_synced(&name, bytes);
        let file = match written {
            Ok(file) => file,
            Err(error) => {
                if let Err(error) = self.disk.remove(&name) {
                    tracing::warn!(%error, "a half-written sst stays behind until the next start");
                }
                return Err(error);
            }
        };
        self.local.lock().insert(meta.id, LocalFile { file, meta: Arc::clone(meta), uploaded: false });
        Ok(())
    }

    fn write_synced(&self, name: &str, bytes: &[u8]) -> Result<Arc<dyn DiskFile>> {
        let file = self.disk.create(name)?;
        file.write_at(0, bytes)?;
        file.sync()?;
        self.disk.sync_directory(&self.directory)?;
        Ok(file)
    }

    /// Returns once the sst, written by `write_local`, is in the bucket. Calling it again is harmless.
    ///
    /// Its local file is read back and verified first: damage stays here and never becomes the truth.
    pub(crate) fn upload(&self, id: SstId) -> Result<()> {
        let local = self.local.lock().get(&id).cloned();
        let Some(local) = local else {
            return Err(Error::new(
                Kind::Bug,
                format!("{id}: to be uploaded, but it was never written here"),
            ));
        };
        if local.uploaded {
            return Ok(());
        }
        let mut bytes = vec![0; local.meta.bytes as usize];
        local.file.read_at(0, &mut bytes)?;
        let bytes = Bytes::from(bytes);
        sst::verify(&local.meta, &bytes)?;
        self.bucket.put(&self.object_name(id), bytes)?;
        if let Some(local) = self.local.lock().get_mut(&id) {
            local.uploaded = true;
        }
        Ok(())
    }

    /// Drops every local trace of an sst that nothing names any more.
    pub(crate) fn forget(&self, id: SstId) {
        if self.local.lock().remove(&id).is_some()
            && let Err(error) = self.disk.remove(&self.file_name(id))
        {
            tracing::warn!(%error, "an sst that nobody needs stays behind until the next start");
        }
    }

    /// Bytes that are only here so far.
    pub(crate) fn unuploaded_bytes(&self) -> u64 {
        self.local.lock().values().filter(|local| !local.uploaded).map(|local| local.meta.bytes).sum()
    }

    /// Counters of the block cache.
    pub(crate) fn block_cache_status(&self) -> BlockCacheStatus {
        self.blocks.status()
    }

    fn file_name(&self, id: SstId) -> String {
        format!("{}/{:016x}-{:016x}", self.directory, id.epoch.0, id.counter)
    }

    fn object_name(&self, id: SstId) -> ObjectName {
        self.names.sst(id.epoch.0, id.counter)
    }

    fn read(&self, id: SstId, range: Range<u64>) -> Result<Bytes> {
        let local = self.local.lock().get(&id).map(|local| Arc::clone(&local.file));
        if let Some(file) = local {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            file.read_at(range.start, &mut bytes)?;
            return Ok(Bytes::from(bytes));
        }
        let mut pieces = self.bucket.get_ranges(&self.object_name(id), &[range])?;
        pieces.pop().ok_or_else(|| Error::new(Kind::Bug, "a bucket that answers nothing to one range"))
    }

    /// Drops local copies of `range` that turned out to be damaged. `true`: reading again may give better bytes.
    fn distrust(&self, id: SstId, _range: Range<u64>) -> bool {
        let mut local = self.local.lock();
        match local.get(&id) {
            Some(file) if !file.uploaded => false,
            Some(_) => {
                local.remove(&id);
                true
            }
            None => true,
        }
    }
}

/// Where an open sst gets its bytes from.
pub(crate) enum ByteSource {
    /// All of them are here.
    Memory(Bytes),
    /// The store knows.
    Stored {
        /// Which store.
        store: Arc<SstStore>,
        /// Its name there.
        id: SstId,
    },
}

impl ByteSource {
    /// The bytes of `range`, all of them, unverified.
    pub(crate) fn read(&self, range: Range<u64>) -> Result<Bytes> {
        match self {
            Self::Memory(bytes) if range.end <= bytes.len() as u64 => {
                Ok(bytes.slice(range.start as usize..range.end as usize))
            }
            Self::Memory(bytes) => {
                Err(Error::corrupt(format!("bytes {range:?} of an sst that has {} only", bytes.len())))
            }
            Self::Stored { store, id } => store.read(*id, range),
        }
    }

    /// Told that `range` did not verify; `true`: reading it again may give better bytes.
    pub(crate) fn distrust(&self, range: Range<u64>) -> bool {
        match self {
            Self::Memory(_) => false,
            Self::Stored { store, id } => store.distrust(*id, range),
        }
    }
}

/// The open sst of a meta, once there is one. Says nothing about what the sst is, so all of them are equal.
#[derive(Clone, Default)]
pub struct OpenSst(OnceLock<Arc<Sst>>);

impl PartialEq for OpenSst {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for OpenSst {}
impl fmt::Debug for OpenSst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.get().is_some() { "open" } else { "closed" })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
