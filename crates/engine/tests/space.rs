//! When nobody writes any more, the bucket comes to hold hardly anything twice, and then is left in peace.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::sync::Arc;

use bucket::MemoryBucket;
use common::{noise, parts, status};
use engine::{Background, Engine, Job, ReadAs, Settings, SimDisk, TreeId};

const TREE: TreeId = TreeId(70);
const ROWS: u32 = 20_000;

struct Room {
    bucket: Arc<MemoryBucket>,
    engine: Arc<Engine>,
}

impl Room {
    fn new() -> Self {
        let bucket = Arc::new(MemoryBucket::new());
        let mut settings =
            Settings { background: Background::Manual, memtable_bytes: 256 << 10, ..Settings::default() };
        settings.shape.sst_bytes = 128 << 10;
        settings.shape.level_base_bytes = 512 << 10;
        let engine = Engine::open(parts(Arc::clone(&bucket) as Arc<_>, &SimDisk::new(1)), settings).unwrap();
        Self { bucket, engine }
    }

    fn write(&self, rows: impl Iterator<Item = u32>, round: u32) {
        let mut txn = self.engine.begin();
        for row in rows {
            txn.put(TREE, &row.to_be_bytes(), &noise(row ^ round << 20, 100)).unwrap();
            if row % 64 == 0 {
                txn.commit().unwrap();
                self.work(&[]);
            }
        }
        txn.commit().unwrap();
        self.work(&[]);
    }

    /// What the threads would do, and `more`.
    fn work(&self, more: &[Job]) {
        let jobs = [Job::UploadWal, Job::Flush, Job::Publish, Job::Compact, Job::CollectGarbage];
        while jobs.iter().chain(more).any(|job| self.engine.step(*job).unwrap()) {}
    }

    fn bytes(&self) -> usize {
        self.bucket.contents().values().map(|object| object.len()).sum()
    }
}

#[test]
fn updated_rows_are_not_there_twice_for_long() {
    let room = Room::new();
    room.write(0..ROWS, 0);
    room.work(&[Job::SaveSpace]);
    let loaded = room.bytes();
    let mut at = 1_u32;
    let scattered = std::iter::repeat_with(|| {
        at = at.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (at >> 8) % ROWS
    });
    room.write(scattered.take(ROWS as usize / 4), 1);
    let updated = room.bytes();
    assert!(updated * 100 > loaded * 113, "{updated} bytes after {loaded}: then this test shows nothing");
    assert!(status(&room.engine, "surplus_bytes") > 0);

    room.work(&[Job::SaveSpace]);
    assert_eq!(status(&room.engine, "surplus_bytes"), 0);
    let rest = room.bytes();
    assert!(rest * 100 <= loaded * 113, "{rest} bytes after {loaded}, for as many rows");

    let puts = status(&room.engine, "bucket_put_requests");
    room.work(&[Job::SaveSpace]);
    assert_eq!(status(&room.engine, "bucket_put_requests"), puts, "there is nothing left to save");
    let mut txn = room.engine.begin();
    for row in (0..ROWS).step_by(97) {
        let found = txn.get(TREE, &row.to_be_bytes(), ReadAs::Snapshot, <[u8]>::to_vec).unwrap().unwrap();
        assert!([0, 1].iter().any(|round| found == noise(row ^ round << 20, 100)), "row {row}");
    }
}
