//! What the bucket is asked for when rows are written, counted on the engine alone, in one thread: the same figures each time.
//!
//! * Background work is done as soon as there is any, uploads as often as they would be if rows came at `--megabytes-a-second`.
//! * The disk and the bucket are in memory, so the room needs about three times the data.
//!
//! ```console
//! $ make bench-requests
//! ```

use std::sync::Arc;

use bucket::MemoryBucket;
use clap::Parser;
use engine::{Background, Engine, Job, Parts, Result, Settings, SimDisk, SystemClock, TreeId};

/// Requests and bytes for each byte that is written, without a clock
#[derive(Parser)]
struct Arguments {
    /// GiB of rows that are loaded first
    #[arg(long, default_value_t = 1.0)]
    gib: f64,
    /// How fast rows come
    #[arg(long, default_value_t = 20.0)]
    megabytes_a_second: f64,
    /// MiB up to which a level takes what leaves L0 directly; the engine's own choice without it
    #[arg(long)]
    level_base_mib: Option<u64>,
}

const TREE: TreeId = TreeId(70);
const ROW_BYTES: u64 = 200;
const STREAMS: u64 = 4;
/// As the server's.
const UPLOAD_SECONDS: f64 = 0.7;
const GIB: f64 = (1_u64 << 30) as f64;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let memory = Arc::new(MemoryBucket::new());
    let mut settings = Settings { background: Background::Manual, ..Settings::default() };
    if let Some(mib) = arguments.level_base_mib {
        settings.shape.level_base_bytes = mib << 20;
    }
    let parts = Parts {
        bucket: memory,
        disk: Arc::new(SimDisk::new(1)),
        clock: Arc::new(SystemClock::default()),
        seed: 1,
    };
    let engine = Engine::open(parts, settings)?;
    let rows = (arguments.gib * GIB / ROW_BYTES as f64) as u64;
    let room = Room { engine, slice_bytes: (arguments.megabytes_a_second * 1e6 * UPLOAD_SECONDS) as u64 };
    println!(
        "{:<34}{:>8}{:>8}{:>8}{:>8}{:>8}{:>8}{:>8}{:>9}{:>9}{:>9}{:>9}",
        "for each GiB",
        "PUT",
        "slices",
        "ssts",
        "edits",
        "GET+",
        "LIST",
        "DELETE",
        "bytes ×",
        "flush ×",
        "merge ×",
        "B a row"
    );
    // Ascending keys in as many streams as there are writers.
    room.measure("load, ascending in 4 streams", rows, rows, |n| {
        (n % STREAMS * (rows / STREAMS) + n / STREAMS, 0)
    })?;
    room.measure("load, ascending in 1 stream", rows / 4, rows * 5 / 4, |n| (rows + n, 0))?;
    let rows = rows * 5 / 4;
    room.measure("updates, uniform", rows / 4, rows, |n| (scattered(n) % rows, 1))?;
    // A fifth of the rows gets most updates, a fifth of these most of those, and so on.
    room.measure("updates, pareto", rows / 4, rows, |n| {
        let share = (scattered(n) >> 11) as f64 / (1u64 << 45) as f64;
        ((share.powf(7.2) * rows as f64) as u64 % rows, 2)
    })
}

struct Room {
    engine: Arc<Engine>,
    slice_bytes: u64,
}

impl Room {
    fn measure(&self, name: &str, writes: u64, rows: u64, row: impl Fn(u64) -> (u64, u64)) -> Result<()> {
        let before = self.counts();
        let mut txn = self.engine.begin();
        for n in 0..writes {
            let (id, round) = row(n);
            txn.put(TREE, &id.to_be_bytes(), &value(id, round))?;
            if n % 100 == 99 {
                txn.commit()?;
                self.work()?;
            }
        }
        txn.commit()?;
        while self.engine.step(Job::UploadWal)? {}
        self.work()?;
        let asked = self.counts();
        let gib = (writes * ROW_BYTES) as f64 / GIB;
        print!("{name:<34}");
        for (now, then) in asked.iter().zip(before).take(7) {
            print!("{:>8.0}", (now - then) as f64 / gib);
        }
        for (now, then) in asked.iter().zip(before).skip(7) {
            print!("{:>9.2}", (now - then) as f64 / (writes * ROW_BYTES) as f64);
        }
        println!("{:>9.0}", self.count("sst_bytes") as f64 / rows as f64);
        Ok(())
    }

    /// What the threads would do.
    fn work(&self) -> Result<()> {
        while self.count("wal_unuploaded_bytes") >= self.slice_bytes && self.engine.step(Job::UploadWal)? {}
        let jobs = [Job::Flush, Job::Publish, Job::Compact, Job::Publish, Job::CollectGarbage];
        while jobs.iter().any(|job| self.engine.step(*job).is_ok_and(|worked| worked)) {}
        Ok(())
    }

    fn count(&self, name: &str) -> u64 {
        self.engine.status().get(name).unwrap_or(0)
    }

    fn counts(&self) -> [u64; 10] {
        [
            self.count("bucket_put_requests"),
            self.count("wal_slices_uploaded"),
            self.count("ssts_uploaded"),
            self.count("edits_published"),
            self.count("bucket_get_requests") + self.count("bucket_head_requests"),
            self.count("bucket_list_requests"),
            self.count("bucket_delete_requests"),
            self.count("bucket_put_bytes"),
            self.count("flushed_bytes"),
            self.count("compacted_bytes_written"),
        ]
    }
}

fn scattered(n: u64) -> u64 {
    let n = (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (n ^ (n >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 8
}

/// 192 hexadecimal digits, as in `make bench ONLY=cost`: zstd halves them.
fn value(id: u64, round: u64) -> [u8; 192] {
    let mut value = [0; 192];
    for (word, digits) in value.chunks_exact_mut(12).enumerate() {
        let mut bits = scattered(id * 64 + round * 16 + word as u64);
        for digit in digits {
            *digit = b"0123456789abcdef"[(bits & 15) as usize];
            bits >>= 4;
        }
    }
    value
}
