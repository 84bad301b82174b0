//! What several test files need: an engine's parts, settings that make many ssts of few rows, rows that do not pack, and a
//! look at all that is there.

#![allow(dead_code, reason = "each test file is a program of its own and takes what it needs")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bucket::Bucket;
use engine::limits::Shape;
use engine::{Background, Cursor, Disk, Engine, Parts, ReadAs, Settings, SimDisk, SystemClock, TreeId, Txn};

/// What an engine stands on, with real time and a seed of its own.
pub fn parts(bucket: Arc<dyn Bucket>, disk: &SimDisk) -> Parts {
    parts_on(bucket, Arc::new(disk.clone()))
}

/// [`parts`] on any disk.
pub fn parts_on(bucket: Arc<dyn Bucket>, disk: Arc<dyn Disk>) -> Parts {
    static SEED: AtomicU64 = AtomicU64::new(1);
    let seed = SEED.fetch_add(1, Ordering::Relaxed);
    Parts { bucket, disk, clock: Arc::new(SystemClock::default()), seed }
}

/// Few rows make many ssts in several levels.
pub fn small(background: Background) -> Settings {
    Settings {
        background,
        memtable_bytes: 64 << 10,
        memory_bytes: 256 << 10,
        disk_cache_bytes: 8 << 20,
        wal_upload_interval: Duration::from_millis(20),
        shape: Shape { sst_bytes: 16 << 10, level_base_bytes: 64 << 10, ..Shape::default() },
        ..Settings::default()
    }
}

/// One number of SHOW STATUS.
pub fn status(engine: &Engine, name: &str) -> u64 {
    engine.status().get(name).unwrap_or_else(|| panic!("no counter {name}"))
}

/// `bytes` of a row that do not pack, the same for the same row.
pub fn noise(row: u32, bytes: usize) -> Vec<u8> {
    let mut random = Random(u64::from(row) + 1);
    (0..bytes).map(|_| random.below(256) as u8).collect()
}

/// All entries of a tree, checked to be the same forwards, backwards and one by one.
pub fn all(engine: &Arc<Engine>, txn: &mut Txn, tree: TreeId) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut cursor = Cursor::new(engine);
    cursor.open(txn, tree, ReadAs::Snapshot).expect("opens");
    let mut found = BTreeMap::new();
    let mut more = cursor.seek_first(txn).expect("seeks");
    while more {
        assert_eq!(cursor.entry(), (cursor.key(), cursor.value()));
        found.insert(cursor.key().to_vec(), cursor.value().to_vec());
        more = cursor.next(txn).expect("steps");
    }
    let mut backward = BTreeMap::new();
    more = cursor.seek_last(txn).expect("seeks");
    while more {
        assert_eq!(cursor.entry(), (cursor.key(), cursor.value()));
        backward.insert(cursor.key().to_vec(), cursor.value().to_vec());
        more = cursor.prev(txn).expect("steps");
    }
    assert_eq!(found, backward, "both directions show the same");
    for (key, value) in &found {
        let got = txn.get(tree, key, ReadAs::Snapshot, <[u8]>::to_vec).expect("reads");
        assert_eq!(got.as_ref(), Some(value), "a get finds what a scan shows");
    }
    found
}

/// Numbers that look random and are the same each time.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 20) % n
    }
}
