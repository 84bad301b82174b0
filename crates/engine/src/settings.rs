//! What an operator may turn, and what fits a machine's memory and disk when it is not turned.

use std::sync::Arc;
use std::time::Duration;

use crate::cache::{COPIES, bytes_known_in};
use crate::limits::Shape;
use crate::{Error, RealDisk, Result};

/// Less memory than this is no use.
pub const MEMORY_BYTES_MIN: usize = 32 << 20;

/// What an operator may turn.
#[derive(Clone)]
pub struct Settings {
    /// Which branch of the bucket to write.
    pub branch: String,
    /// Memory for all that grows: memtables, write sets, buffers of flush, compaction, upload and read-ahead, what is known of ssts and
    /// of cached chunks; decoded blocks have the rest.
    pub memory_bytes: usize,
    /// A memtable is frozen and flushed when it has this size.
    pub memtable_bytes: usize,
    /// Local disk for cached pieces of ssts.
    pub disk_cache_bytes: u64,
    /// Commits fail with [`crate::Kind::Full`] when this much waits for its upload: ssts, and the wal that they come from.
    pub unuploaded_bytes_max: u64,
    /// A transaction that writes more fails.
    pub transaction_bytes_max: usize,
    /// The wal is uploaded this often while there is something to upload.
    pub wal_upload_interval: Duration,
    /// Sizes that give the tree its shape; for tests to turn, not for operators.
    pub shape: Shape,
    /// Who does the work that no caller waits for.
    pub background: Background,
    /// Whom to tell.
    pub hooks: Hooks,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            branch: "main".to_owned(),
            memory_bytes: 512 << 20,
            memtable_bytes: 64 << 20,
            disk_cache_bytes: 10 << 30,
            unuploaded_bytes_max: 4 << 30,
            transaction_bytes_max: 512 << 20,
            wal_upload_interval: Duration::from_secs(1),
            shape: Shape::default(),
            background: Background::Threads,
            hooks: Hooks::default(),
        }
    }
}

impl Settings {
    /// For an engine that may take `memory_bytes`, at least [`MEMORY_BYTES_MIN`]: a memtable is a sixteenth (one takes writes, up to four
    /// wait), a transaction an eighth (it is there three times while it commits), and ten ssts in the making are at most half.
    pub fn for_memory(memory_bytes: usize) -> Self {
        let memory_bytes = memory_bytes.max(MEMORY_BYTES_MIN);
        let most = Self::default();
        let sst_bytes = (memory_bytes / 24 / 2 + 1).next_power_of_two();
        Self {
            memory_bytes,
            memtable_bytes: (memory_bytes / 16).min(most.memtable_bytes),
            transaction_bytes_max: (memory_bytes / 8).min(1 << 30),
            shape: Shape {
                sst_bytes: sst_bytes.min(most.shape.sst_bytes),
                wal_slice_bytes: (sst_bytes as u64).min(most.shape.wal_slice_bytes),
                ..most.shape
            },
            ..most
        }
    }

    /// With sizes for a local disk that has `space` bytes which are free or taken by copies (see [`Self::disk_space`]): half is for the cache, but no more than a sixteenth
    /// of the memory can know of. An eighth may wait for its upload, as ssts and again as the wal that they come from; a longer outage than 4 GiB
    /// would make the next start too slow.
    pub fn for_disk(self, space: u64) -> Self {
        let waits_least = 4 * self.memtable_bytes as u64;
        Self {
            disk_cache_bytes: (space / 2).min(bytes_known_in(self.memory_bytes / 16)),
            unuploaded_bytes_max: (space / 8).min(Self::default().unuploaded_bytes_max).max(waits_least),
            ..self
        }
    }

    /// What of a disk is free or taken by copies of what the bucket has.
    pub fn disk_space(disk: &RealDisk) -> Result<u64> {
        Ok(disk.space(&COPIES)?)
    }
}

/// Who does the work that no caller waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Background {
    /// The engine's own threads.
    Threads,
    /// The caller, with [`crate::Engine::step`]. No thread is started, and a lock that is taken fails at once.
    Manual,
}

/// Calls out of the engine.
#[derive(Clone)]
pub struct Hooks {
    /// The engine can not go on: it is fenced, or its wal failed. Called once, from any thread.
    pub on_fatal: Arc<dyn Fn(&Error) + Send + Sync>,
    /// By how many bytes the process is larger than it should be (negative: smaller), now. Asked several times a second by one thread, unless
    /// there are none; decoded blocks make up for it.
    pub oversize: Arc<dyn Fn() -> i64 + Send + Sync>,
}

impl Default for Hooks {
    fn default() -> Self {
        Self {
            on_fatal: Arc::new(|error| tracing::error!(%error, "the engine can not go on")),
            oversize: Arc::new(|| 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_for_a_disk_fit_it_and_the_memory() {
        let of = |memory: usize, space: u64| {
            let settings = Settings::for_memory(memory).for_disk(space);
            (settings.disk_cache_bytes, settings.unuploaded_bytes_max)
        };
        const GIB: u64 = 1 << 30;
        assert_eq!(of(1 << 30, 16 * GIB), (8 * GIB, 2 * GIB));
        assert_eq!(of(1 << 30, 48 * GIB), (24 * GIB, 4 * GIB));
        let (cache, waits) = of(512 << 20, 10_000 * GIB);
        assert!((28 * GIB..32 * GIB).contains(&cache) && waits == 4 * GIB, "{cache} {waits}");
        assert_eq!(
            of(1 << 30, 0),
            (0, 4 * (64 << 20)),
            "a full disk still takes what is flushed, as far as it goes"
        );
    }

    #[test]
    fn settings_for_little_memory_fit_it() {
        for mib in [1, 32, 100, 190, 500, 1000, 4000, 100_000] {
            let settings = Settings::for_memory(mib << 20);
            let memory = settings.memory_bytes;
            assert!(memory >= mib << 20);
            assert!(5 * settings.memtable_bytes <= memory / 3);
            assert!(
                10 * settings.shape.sst_bytes / 2 * 3 <= memory,
                "{mib} MiB: ssts of {}",
                settings.shape.sst_bytes
            );
            assert!(3 * settings.transaction_bytes_max <= memory / 2);
        }
        assert_eq!(
            Settings::for_memory(1 << 30).shape,
            Settings::default().shape,
            "what is common is not cut down"
        );
    }
}
