//! Steps of the engine beside the same steps of others, in one run, on the same 500,000 rows of 200 bytes.
//!
//! * Memory: our memtable, `std::BTreeMap` (which no second thread may write to), `crossbeam-skiplist`.
//! * Whole stores, everything cached, no sync: ours behind its public face, fjall, RocksDB.
//! * Each figure is the best of five rounds in which each has its turn; on a shared machine the others measure the neighbours.
//!
//! `make bench-peers` links it to Debian's librocksdb.

use std::collections::BTreeMap;
use std::error::Error;
use std::hint::black_box;
use std::ops::Bound;
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

const ROWS: u64 = 500_000;
const TREE: TreeId = TreeId(70);
const NEWEST: Seqno = Seqno(u64::MAX);
const ROUNDS: usize = 5;

type Done<T = ()> = Result<T, Box<dyn Error>>;
type Key = [u8; 12];
type Value = [u8; 200];

fn main() -> Done {
    let rows: Vec<(Key, Value)> = (1..=ROWS).map(|n| (key(n), value(n))).collect();
    // A step that shares no factor with the number of rows visits each row once.
    let asked: Vec<Key> = (0..rows.len()).map(|n| rows[n * 314_159 % rows.len()].0).collect();
    memory(&rows, &asked)?;
    stores(&rows, &asked)
}

// ---- in memory ----

fn memory(rows: &[(Key, Value)], asked: &[Key]) -> Done {
    heading(&["memtable", "BTreeMap", "skiplist"]);
    // The deepest prefix of each key is its tree, as in the engine; the peers take the same twelve bytes.
    let (memtable, mut map, list) = (Memtable::new(), BTreeMap::new(), SkipMap::new());
    let mut best = [f64::MAX; 3];
    for round in 0..ROUNDS {
        let fresh = Memtable::new();
        let target = if round == 0 { &memtable } else { &fresh };
        keep(&mut best[0], each(rows, |n, (key, value)| target.insert(key, Seqno(n), OpKind::Put, value)));
        let mut fresh = BTreeMap::new();
        let target = if round == 0 { &mut map } else { &mut fresh };
        keep(&mut best[1], each(rows, |_, (key, value)| target.insert(*key, *value)));
        let fresh = SkipMap::new();
        let target = if round == 0 { &list } else { &fresh };
        keep(&mut best[2], each(rows, |_, (key, value)| drop(target.insert(*key, *value))));
    }
    line("insert, scattered", &best);
    let mut best = [f64::MAX; 3];
    for _ in 0..ROUNDS {
        keep(&mut best[0], each(asked, |_, key| memtable.get(key, NEWEST).is_some()));
        keep(&mut best[1], each(asked, |_, key| map.get(key).map(|value| value[100])));
        keep(&mut best[2], each(asked, |_, key| list.get(key).map(|entry| entry.value()[100])));
    }
    line("get", &best);
    let mut best = [f64::MAX; 3];
    for _ in 0..ROUNDS {
        keep(
            &mut best[0],
            per_row(|| scan(&mut memtable.iter_tree(TREE)).expect("a memtable does not fail")),
        );
        keep(&mut best[1], per_row(|| map.iter().map(|(key, value)| sum(key, value)).sum()));
        keep(&mut best[2], per_row(|| list.iter().map(|entry| sum(entry.key(), entry.value())).sum()));
    }
    line("scan", &best);
    let mut best = [f64::MAX; 3];
    for _ in 0..ROUNDS {
        let memtable = Memtable::new();
        keep(
            &mut best[0],
            by_two(rows, |n, (key, value)| memtable.insert(key, Seqno(n), OpKind::Put, value)),
        );
        let list = SkipMap::new();
        keep(&mut best[2], by_two(rows, |_, (key, value)| drop(list.insert(*key, *value))));
    }
    line("insert, scattered, 2 threads, ns of each", &best);
    let mut best = [f64::MAX; 3];
    for _ in 0..ROUNDS {
        keep(&mut best[0], by_two(asked, |_, key| _ = black_box(memtable.get(key, NEWEST))));
        keep(&mut best[1], by_two(asked, |_, key| _ = black_box(map.get(key))));
        keep(
            &mut best[2],
            by_two(asked, |_, key| _ = black_box(list.get(key).map(|entry| entry.value()[100]))),
        );
    }
    line("get, 2 threads, ns of each", &best);
    Ok(())
}

fn scan(source: &mut impl Source) -> engine::Result<u64> {
    let mut total = 0;
    source.seek(&full_key(TREE, &[]), NEWEST)?;
    while source.valid() {
        total += sum(source.key(), source.value());
        source.next()?;
    }
    Ok(total)
}

// ---- whole stores ----

fn stores(rows: &[(Key, Value)], asked: &[Key]) -> Done {
    heading(&["cistern", "fjall", "rocksdb"]);
    let directory = tempfile::tempdir()?;
    let ours = open_ours()?;
    let database = Database::builder(directory.path().join("fjall")).cache_size(1 << 30).open()?;
    let fjall = database.keyspace("rows", KeyspaceCreateOptions::default)?;
    let rocks = open_rocks(&directory.path().join("rocksdb"))?;

    // Each figure once: a second insert would measure another tree.
    let mut unsynced = rocksdb::WriteOptions::default();
    unsynced.set_sync(false);
    let mut txn = ours.begin();
    let commits = [
        try_each(rows, |_, (key, value)| {
            txn.put(TREE, &key[4..], value)?;
            Ok(txn.commit().map(drop)?)
        })?,
        try_each(rows, |_, (key, value)| Ok(fjall.insert(key, value)?))?,
        try_each(rows, |_, (key, value)| Ok(rocks.put_opt(key, value, &unsynced)?))?,
    ];
    line("insert, scattered, one to a commit, no sync", &commits);
    reads("newest rows in the memtable", &ours, &fjall, &rocks, asked)?;

    settle(&ours)?;
    fjall.rotate_memtable_and_wait()?;
    fjall.major_compact()?;
    rocks.flush()?;
    rocks.compact_range(None::<&[u8]>, None::<&[u8]>);
    reads("all merged", &ours, &fjall, &rocks, asked)?;

    // Two more runs on top, of a hundredth of the rows each.
    for run in 0..2 {
        for (key, value) in rows.iter().skip(run).step_by(100) {
            txn.put(TREE, &key[4..], value)?;
            fjall.insert(key, value)?;
            rocks.put_opt(key, value, &unsynced)?;
        }
        txn.commit()?;
        ours.step(Job::Freeze)?;
        ours.step(Job::Flush)?;
        fjall.rotate_memtable_and_wait()?;
        rocks.flush()?;
    }
    reads("two runs on top", &ours, &fjall, &rocks, asked)
}

fn open_ours() -> Done<Arc<Engine>> {
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
    Ok(Engine::open(parts, settings)?)
}

fn open_rocks(path: &std::path::Path) -> Done<rocksdb::DB> {
    let mut table = rocksdb::BlockBasedOptions::default();
    table.set_block_cache(&rocksdb::Cache::new_lru_cache(1 << 30)?);
    table.set_bloom_filter(10.0, false);
    let mut options = rocksdb::Options::default();
    options.create_if_missing(true);
    options.set_write_buffer_size(1 << 30);
    options.set_compression_type(rocksdb::DBCompressionType::Lz4);
    options.set_block_based_table_factory(&table);
    options.set_max_open_files(-1);
    Ok(rocksdb::DB::open(&options, path)?)
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

fn reads(place: &str, ours: &Arc<Engine>, fjall: &Keyspace, rocks: &rocksdb::DB, asked: &[Key]) -> Done {
    let mut txn = ours.begin();
    txn.set_isolation(Isolation::ReadCommitted);
    let mut get = [f64::MAX; 3];
    let mut all = [f64::MAX; 3];
    for _ in 0..ROUNDS {
        txn.snapshot_now();
        let found = try_each(asked, |_, key| {
            let found = txn.get(TREE, &key[4..], ReadAs::Snapshot, |value| value[100])?;
            Ok(assert!(found.is_some(), "every row is there"))
        })?;
        keep(&mut get[0], found);
        keep(&mut get[1], try_each(asked, |_, key| Ok(drop(black_box(fjall.get(key)?))))?);
        keep(&mut get[2], try_each(asked, |_, key| Ok(drop(black_box(rocks.get_pinned(key)?))))?);

        let mut cursor = Cursor::new(ours);
        let start = Instant::now();
        cursor.open(&mut txn, TREE, ReadAs::Snapshot)?;
        let (mut total, mut seen, mut stands) = (0, 0, cursor.seek_first(&mut txn)?);
        while stands {
            total += sum(cursor.key(), cursor.value());
            seen += 1;
            stands = cursor.next(&mut txn)?;
        }
        cursor.close();
        assert_eq!(seen, ROWS, "every row is seen once");
        keep(&mut all[0], start.elapsed().as_nanos() as f64 / ROWS as f64);
        let mut wrong = None;
        let peer = per_row(|| {
            let rows = fjall.iter().map(|guard| guard.into_inner());
            rows.map(|row| {
                row.map_or_else(
                    |error| {
                        wrong = Some(error);
                        0
                    },
                    |(key, value)| sum(&key, &value),
                )
            })
            .sum()
        });
        wrong.map_or(Ok(()), Err)?;
        keep(&mut all[1], peer);
        let mut iter = rocks.raw_iterator();
        keep(
            &mut all[2],
            per_row(|| {
                iter.seek_to_first();
                let mut total = 0;
                while let Some((key, value)) = iter.item() {
                    total += sum(key, value);
                    iter.next();
                }
                total
            }),
        );
        black_box((total, Bound::Included(())));
    }
    line(&format!("get, {place}"), &get);
    line(&format!("scan, {place}"), &all);
    Ok(())
}

// ---- rows, and what they cost ----

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

fn try_each<T>(items: &[T], mut act: impl FnMut(u64, &T) -> Done) -> Done<f64> {
    let start = Instant::now();
    items.iter().zip(1..).try_for_each(|(item, n)| act(n, item))?;
    Ok(start.elapsed().as_nanos() as f64 / items.len() as f64)
}

fn by_two<T: Sync>(items: &[T], act: impl Fn(u64, &T) + Sync) -> f64 {
    let (left, right) = items.split_at(items.len() / 2);
    let took = std::thread::scope(|scope| {
        let threads = [left, right].map(|items| scope.spawn(|| each(items, &act)));
        threads.map(|thread| thread.join().expect("no thread panics"))
    });
    took.iter().sum::<f64>() / 2.0
}

fn per_row(act: impl FnOnce() -> u64) -> f64 {
    let start = Instant::now();
    black_box(act());
    start.elapsed().as_nanos() as f64 / ROWS as f64
}

fn heading(names: &[&str; 3]) {
    let [ours, one, other] = names;
    println!("\n{:<52}{ours:>10}{one:>10}{:>8}{other:>10}{:>8}", "ns each", "ratio", "ratio");
}

fn line(name: &str, figures: &[f64; 3]) {
    let [ours, peers @ ..] = figures;
    let mut line = format!("{name:<52}{ours:>10.0}");
    for peer in peers {
        if *peer < f64::MAX {
            line.push_str(&format!("{peer:>10.0}{:>7.2}×", peer / ours));
        } else {
            line.push_str(&format!("{:>10}{:>8}", "–", ""));
        }
    }
    println!("{line}");
}
