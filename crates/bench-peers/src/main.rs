//! Steps of the engine beside the same steps of others, in one run, on the same 500,000 rows of 200 bytes.
//!
//! * Memory: our memtable, `std::BTreeMap` (which no second thread may write to), `crossbeam-skiplist`.
//! * Whole stores, everything cached, no sync: ours behind its public face, fjall, RocksDB.
//! * One thread has all rows, two have a half each; the figure is what a row cost each thread.
//! * Each figure is the best of five rounds in which each has its turn; on a shared machine the others measure the neighbours.
//! * Steps of `make bench-micro` that are missing here have no counterpart; [`NO_COUNTERPART`] says why.
//!
//! `make bench-peers` links it to Debian's librocksdb.

use std::collections::BTreeMap;
use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use bucket::MemoryBucket;
use crossbeam_skiplist::SkipMap;
use engine::internals::{Memtable, Source};
use engine::{
    Background, Cursor, Engine, Isolation, Job, OpKind, Parts, ReadAs, Seqno, Settings, SimDisk, SystemClock,
    TreeId, full_key,
};
use fjall::{Database, Keyspace, KeyspaceCreateOptions};
use tempfile::TempDir;

const ROWS: u64 = 500_000;
const TREE: TreeId = TreeId(70);
const NEWEST: Seqno = Seqno(u64::MAX);
const ROUNDS: usize = 5;
const NO_COUNTERPART: &str = "Not beside peers: a lock alone (fjall's transactions are optimistic, RocksDB locks only what it reads or writes), \
    a search in one block and a filter's probe (inside their reads), a merge alone (they choose when).";

type Done<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;
type Key = [u8; 12];
type Value = [u8; 200];

fn main() -> Done {
    let rows = Rows::new();
    memory(&rows)?;
    stores(&rows)?;
    println!("\n{NO_COUNTERPART}");
    Ok(())
}

// ---- in memory ----

fn memory(rows: &Rows) -> Done {
    heading(&["memtable", "BTreeMap", "skiplist"]);
    // The deepest prefix of each key is its tree, as in the engine; the peers take the same twelve bytes.
    let (mut memtable, mut map, mut list) = (Memtable::new(), BTreeMap::new(), SkipMap::new());
    for threads in [1, 2] {
        let mut best = [f64::MAX; 3];
        for _ in 0..ROUNDS {
            memtable = Memtable::new();
            let insert = |n, (key, value): &(Key, Value)| memtable.insert(key, Seqno(n), OpKind::Put, value);
            keep(&mut best[0], by(threads, &rows.scattered, |rows| Ok(each(rows, insert)))?);
            if threads == 1 {
                map = BTreeMap::new();
                keep(&mut best[1], each(&rows.scattered, |_, (key, value)| map.insert(*key, *value)));
            }
            list = SkipMap::new();
            let insert = |_, (key, value): &(Key, Value)| drop(list.insert(*key, *value));
            keep(&mut best[2], by(threads, &rows.scattered, |rows| Ok(each(rows, insert)))?);
        }
        line("insert, scattered", threads, &best);
    }
    for threads in [1, 2] {
        let mut best = [f64::MAX; 3];
        for _ in 0..ROUNDS {
            let get = |_, key: &Key| memtable.get(key, NEWEST).is_some();
            keep(&mut best[0], by(threads, &rows.asked, |asked| Ok(each(asked, get)))?);
            let get = |_, key: &Key| map.get(key).map(|value| value[100]);
            keep(&mut best[1], by(threads, &rows.asked, |asked| Ok(each(asked, get)))?);
            let get = |_, key: &Key| list.get(key).map(|entry| entry.value()[100]);
            keep(&mut best[2], by(threads, &rows.asked, |asked| Ok(each(asked, get)))?);
        }
        line("get", threads, &best);
    }
    for threads in [1, 2] {
        let mut best = [f64::MAX; 3];
        for _ in 0..ROUNDS {
            let scan = |keys: &[Key]| Ok(scan(&mut memtable.iter_tree(TREE), keys)?);
            keep(&mut best[0], by(threads, &rows.sorted, |keys| per_row(keys, scan))?);
            let scan = |keys: &[Key]| {
                Ok(map.range(keys[0]..).take(keys.len()).map(|(key, value)| sum(key, value)).sum())
            };
            keep(&mut best[1], by(threads, &rows.sorted, |keys| per_row(keys, scan))?);
            let scan = |keys: &[Key]| {
                let entries = list.range(keys[0]..).take(keys.len());
                Ok(entries.map(|entry| sum(entry.key(), entry.value())).sum())
            };
            keep(&mut best[2], by(threads, &rows.sorted, |keys| per_row(keys, scan))?);
        }
        line("scan", threads, &best);
    }
    Ok(())
}

fn scan(source: &mut impl Source, keys: &[Key]) -> engine::Result<u64> {
    let mut total = 0;
    source.seek(&keys[0], NEWEST)?;
    for _ in keys {
        total += sum(source.key(), source.value());
        source.next()?;
    }
    Ok(total)
}

// ---- whole stores ----

/// One of each, with nothing in it.
struct Stores {
    ours: Arc<Engine>,
    // What it lives in.
    _database: Database,
    fjall: Keyspace,
    rocks: rocksdb::DB,
    unsynced: rocksdb::WriteOptions,
    _directory: TempDir,
}

fn stores(rows: &Rows) -> Done {
    heading(&["cistern", "fjall", "rocksdb"]);
    let stores = Stores::open()?;
    stores.commits(rows, 1)?;
    Stores::open()?.commits(rows, 2)?;
    stores.reads("newest rows in the memtable", rows)?;

    let Stores { ours, fjall, rocks, .. } = &stores;
    settle(ours)?;
    fjall.rotate_memtable_and_wait()?;
    fjall.major_compact()?;
    rocks.flush()?;
    rocks.compact_range(None::<&[u8]>, None::<&[u8]>);
    stores.reads("all merged", rows)?;

    // Two more runs on top, of a hundredth of the rows each.
    let mut txn = ours.begin();
    for run in 0..2 {
        for (key, value) in rows.scattered.iter().skip(run).step_by(100) {
            txn.put(TREE, &key[4..], value)?;
            fjall.insert(key, value)?;
            rocks.put_opt(key, value, &stores.unsynced)?;
        }
        txn.commit()?;
        ours.step(Job::Freeze)?;
        ours.step(Job::Flush)?;
        fjall.rotate_memtable_and_wait()?;
        rocks.flush()?;
    }
    stores.reads("two runs on top", rows)
}

impl Stores {
    fn open() -> Done<Self> {
        let directory = tempfile::tempdir()?;
        let settings = Settings {
            background: Background::Manual,
            memtable_bytes: 1 << 30,
            memory_bytes: 3 << 30,
            ..Settings::default()
        };
        let parts = Parts {
            bucket: Arc::new(MemoryBucket::new()),
            disk: Arc::new(SimDisk::new(1)),
            clock: Arc::new(SystemClock::default()),
            seed: 1,
        };
        let database = Database::builder(directory.path().join("fjall")).cache_size(1 << 30).open()?;
        let mut table = rocksdb::BlockBasedOptions::default();
        table.set_block_cache(&rocksdb::Cache::new_lru_cache(1 << 30)?);
        table.set_bloom_filter(10.0, false);
        let mut options = rocksdb::Options::default();
        options.create_if_missing(true);
        options.set_write_buffer_size(1 << 30);
        options.set_compression_type(rocksdb::DBCompressionType::Lz4);
        options.set_block_based_table_factory(&table);
        options.set_max_open_files(-1);
        let mut unsynced = rocksdb::WriteOptions::default();
        unsynced.set_sync(false);
        Ok(Self {
            ours: Engine::open(parts, settings)?,
            fjall: database.keyspace("rows", KeyspaceCreateOptions::default)?,
            _database: database,
            rocks: rocksdb::DB::open(&options, directory.path().join("rocksdb"))?,
            unsynced,
            _directory: directory,
        })
    }

    /// Once: a second insert would measure another tree.
    fn commits(&self, rows: &Rows, threads: usize) -> Done {
        let figures = [
            by(threads, &rows.scattered, |rows| {
                let mut txn = self.ours.begin();
                try_each(rows, |(key, value)| {
                    txn.put(TREE, &key[4..], value)?;
                    Ok(txn.commit().map(drop)?)
                })
            })?,
            by(threads, &rows.scattered, |rows| {
                try_each(rows, |(key, value)| Ok(self.fjall.insert(key, value)?))
            })?,
            by(threads, &rows.scattered, |rows| {
                try_each(rows, |(key, value)| Ok(self.rocks.put_opt(key, value, &self.unsynced)?))
            })?,
        ];
        line("insert, scattered, one to a commit, no sync", threads, &figures);
        Ok(())
    }

    fn reads(&self, place: &str, rows: &Rows) -> Done {
        for threads in [1, 2] {
            let mut best = [f64::MAX; 3];
            for _ in 0..ROUNDS {
                let ours = by(threads, &rows.asked, |asked| {
                    let mut txn = self.ours.begin();
                    txn.set_isolation(Isolation::ReadCommitted);
                    txn.snapshot_now();
                    try_each(asked, |key| {
                        let found = txn.get(TREE, &key[4..], ReadAs::Snapshot, |value| value[100])?;
                        Ok(assert!(found.is_some(), "every row is there"))
                    })
                });
                keep(&mut best[0], ours?);
                let get = |key: &Key| Ok(drop(black_box(self.fjall.get(key)?)));
                keep(&mut best[1], by(threads, &rows.asked, |asked| try_each(asked, get))?);
                let get = |key: &Key| Ok(drop(black_box(self.rocks.get_pinned(key)?)));
                keep(&mut best[2], by(threads, &rows.asked, |asked| try_each(asked, get))?);
            }
            line(&format!("get, {place}"), threads, &best);
        }
        for threads in [1, 2] {
            let mut best = [f64::MAX; 3];
            for _ in 0..ROUNDS {
                let keys = &rows.sorted;
                keep(&mut best[0], by(threads, keys, |keys| per_row(keys, |keys| self.scan_ours(keys)))?);
                keep(&mut best[1], by(threads, keys, |keys| per_row(keys, |keys| self.scan_fjall(keys)))?);
                keep(&mut best[2], by(threads, keys, |keys| per_row(keys, |keys| self.scan_rocks(keys)))?);
            }
            line(&format!("scan, {place}"), threads, &best);
        }
        Ok(())
    }

    fn scan_ours(&self, keys: &[Key]) -> Done<u64> {
        let (mut txn, mut cursor) = (self.ours.begin(), Cursor::new(&self.ours));
        cursor.open(&mut txn, TREE, ReadAs::Snapshot)?;
        let (mut total, mut stands) = (0, cursor.seek(&mut txn, &keys[0][4..])?);
        for _ in keys {
            assert!(stands, "every row is seen");
            total += sum(cursor.key(), cursor.value());
            stands = cursor.next(&mut txn)?;
        }
        Ok(total)
    }

    fn scan_fjall(&self, keys: &[Key]) -> Done<u64> {
        let mut total = 0;
        for guard in self.fjall.range(keys[0]..).take(keys.len()) {
            let (key, value) = guard.into_inner()?;
            total += sum(&key, &value);
        }
        Ok(total)
    }

    fn scan_rocks(&self, keys: &[Key]) -> Done<u64> {
        let mut iter = self.rocks.raw_iterator();
        iter.seek(keys[0]);
        let mut total = 0;
        for _ in keys {
            let (key, value) = iter.item().ok_or("every row is seen")?;
            total += sum(key, value);
            iter.next();
        }
        Ok(total)
    }
}

/// Everything flushed, merged and published.
fn settle(engine: &Engine) -> Done {
    engine.step(Job::Freeze)?;
    let jobs = [Job::Flush, Job::UploadWal, Job::Publish, Job::Compact, Job::CollectGarbage];
    loop {
        let mut worked = false;
        for job in jobs {
            worked |= engine.step(job)?;
        }
        if !worked {
            return Ok(());
        }
    }
}

// ---- rows, and what they cost ----

struct Rows {
    /// Without any order.
    scattered: Vec<(Key, Value)>,
    sorted: Vec<Key>,
    /// In another order without any.
    asked: Vec<Key>,
}

impl Rows {
    fn new() -> Self {
        let scattered: Vec<_> = (1..=ROWS).map(|n| (key(n), value(n))).collect();
        // A step that shares no factor with the number of rows visits each row once.
        let asked = (0..scattered.len()).map(|n| scattered[n * 314_159 % scattered.len()].0).collect();
        let mut sorted: Vec<_> = scattered.iter().map(|(key, _)| *key).collect();
        sorted.sort();
        Self { scattered, sorted, asked }
    }
}

/// Distinct, without any order (the steps of splitmix64, which visits each number once), behind the tree's id.
fn key(n: u64) -> Key {
    let full = full_key(TREE, &mixed(n).to_be_bytes());
    full.try_into().expect("a tree's id has four bytes")
}

/// Half of it can be packed, as in real rows.
fn value(n: u64) -> Value {
    let mut value = [0x5a; 200];
    for (word, bytes) in value[..100].chunks_exact_mut(4).enumerate() {
        bytes.copy_from_slice(&mixed(n * 25 + word as u64).to_be_bytes()[4..]);
    }
    value
}

fn mixed(n: u64) -> u64 {
    let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// A byte of each, so that both are touched.
fn sum(key: &[u8], value: &[u8]) -> u64 {
    u64::from(key[key.len() - 1]) + u64::from(value[100])
}

fn keep(best: &mut f64, figure: f64) {
    *best = best.min(figure);
}

fn each<T, R>(items: &[T], mut act: impl FnMut(u64, &T) -> R) -> f64 {
    let start = Instant::now();
    items.iter().zip(1..).for_each(|(item, n)| _ = black_box(act(n, item)));
    start.elapsed().as_nanos() as f64 / items.len() as f64
}

fn try_each<T>(items: &[T], mut act: impl FnMut(&T) -> Done) -> Done<f64> {
    let start = Instant::now();
    items.iter().try_for_each(|item| act(item))?;
    Ok(start.elapsed().as_nanos() as f64 / items.len() as f64)
}

/// What a row of a scan takes that begins at the first of `keys` and has as many rows.
fn per_row(keys: &[Key], act: impl FnOnce(&[Key]) -> Done<u64>) -> Done<f64> {
    let start = Instant::now();
    black_box(act(keys)?);
    Ok(start.elapsed().as_nanos() as f64 / keys.len() as f64)
}

/// `act` on `items` by so many threads, each with its part: the mean of their figures.
fn by<T: Sync>(threads: usize, items: &[T], act: impl Fn(&[T]) -> Done<f64> + Sync) -> Done<f64> {
    let took: Done<Vec<f64>> = std::thread::scope(|scope| {
        let act = &act;
        let parts = items.chunks(items.len().div_ceil(threads));
        let parts: Vec<_> = parts.map(|part| scope.spawn(move || act(part))).collect();
        parts.into_iter().map(|part| part.join().expect("no thread panics")).collect()
    });
    Ok(took?.iter().sum::<f64>() / threads as f64)
}

fn heading(names: &[&str; 3]) {
    let [ours, one, other] = names;
    println!("\n{:<66}{ours:>10}{one:>10}{:>8}{other:>10}{:>8}", "ns each", "ratio", "ratio");
}

fn line(name: &str, threads: usize, figures: &[f64; 3]) {
    let [ours, peers @ ..] = figures;
    let name = if threads > 1 { format!("{name}, {threads} threads, each") } else { name.to_owned() };
    let mut line = format!("{name:<66}{ours:>10.0}");
    for peer in peers {
        if *peer < f64::MAX {
            line.push_str(&format!("{peer:>10.0}{:>7.2}×", peer / ours));
        } else {
            line.push_str(&format!("{:>10}{:>8}", "–", ""));
        }
    }
    println!("{line}");
}
