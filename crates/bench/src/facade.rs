//! What the engine costs through its public face, in nanoseconds: point reads, scans, locks, commits.
//!
//! 500,000 rows of 200 bytes, all in memory: in the memtable, in a run of L0 on top of the deepest level, and merged.
//! The disk forgets (it is the simulator's), so a commit is what the processor does for it. Best of five rounds. Then
//! commits of one row by many threads, on a real disk under `target/`, with every background thread at work.
//!
//! ```console
//! $ cargo run --release -p bench --bin bench-engine
//! ```

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::limits::Shape;
use engine::{
    Clock, Cursor, Engine, Isolation, Job, LockMode, LockWait, Parts, ReadAs, RealDisk, Result, Settings,
    SystemClock, TreeId,
};

const ROWS: u64 = 500_000;
const VALUE: [u8; 200] = [0x5a; 200];
const TREE: TreeId = TreeId(70);
const WAIT: LockWait<'static> = LockWait { timeout: Duration::from_secs(50), interrupted: &|| false };

fn main() -> Result<()> {
    let wanted = std::env::args().nth(1);
    match wanted.as_deref() {
        Some("synced") => return [1, 8, 64].into_iter().try_for_each(synced),
        Some("load") => return load(),
        Some("bulk") => return bulk(),
        _ => (),
    }
    let engine = bench::engine_in_memory(Shape::default())?;
    let mut txn = engine.begin();
    for n in 0..ROWS {
        txn.put(TREE, &key(n), &VALUE)?;
        if n % 1000 == 0 {
            txn.commit()?;
        }
    }
    txn.commit()?;
    println!("{:<58}{:>9}", "ns each", "measured");
    reads(&engine, "memtable")?;
    settle(&engine)?;
    reads(&engine, "merged")?;
    for n in (0..ROWS).step_by(20) {
        txn.put(TREE, &key(n), &VALUE)?;
    }
    txn.commit()?;
    engine.step(Job::Freeze)?;
    engine.step(Job::Flush)?;
    txn.put(TREE, &key(0), &VALUE)?;
    txn.commit()?;
    reads(&engine, "memtable, L0 and merged")?;
    writes(&engine)?;
    println!("\n{:<58}{:>9}{:>12}", "commits of one row on a real disk", "a second", "for a sync");
    [1, 8, 64].into_iter().try_for_each(synced)
}

fn synced(threads: u64) -> Result<()> {
    let (root, engine) = open_on_disk("engine", Settings { memtable_bytes: 4 << 20, ..Settings::default() })?;
    let clock = SystemClock::default();
    let time = Duration::from_secs(3);
    std::thread::scope(|scope| {
        let writers = (0..threads).map(|thread| {
            let (engine, clock) = (&engine, &clock);
            scope.spawn(move || {
                let mut txn = engine.begin();
                for n in 0.. {
                    if clock.now() > time {
                        break;
                    }
                    let key = key(thread << 32 | n);
                    txn.lock(TREE, &key, LockMode::Exclusive, &WAIT)?;
                    txn.put(TREE, &key, &VALUE)?;
                    txn.commit()?;
                }
                Ok::<(), engine::Error>(())
            })
        });
        let writers: Vec<_> = writers.collect();
        writers.into_iter().try_for_each(|writer| writer.join().expect("a writer does not panic"))
    })?;
    let count = |name: &str| engine.status().get(name).unwrap_or(0);
    let (commits, syncs) = (count("commits"), count("wal_syncs"));
    println!(
        "{:<58}{:>9}{:>12.1}",
        format!("{threads} threads ({} flushes, {} merges)", count("flushes"), count("compactions")),
        commits / 3,
        commits as f64 / syncs as f64
    );
    engine.close()?;
    drop(engine);
    _ = std::fs::remove_dir_all(root);
    Ok(())
}

fn reads(engine: &Arc<Engine>, place: &str) -> Result<()> {
    let mut txn = engine.begin();
    txn.set_isolation(Isolation::ReadCommitted);
    report(&format!("{place}: statement with one get"), 200_000, |n| {
        txn.statement_begin();
        let found = txn.get(TREE, &key(n * 7919 % ROWS), ReadAs::Snapshot, |value| value[0])?;
        txn.commit()?;
        assert!(found.is_some(), "row {n} is there");
        Ok(())
    })?;
    txn.snapshot_now();
    let mut cursor = Cursor::new(engine);
    let mut stands = false;
    report(&format!("{place}: open, seek, 10 steps, close; each row"), 200_000, |n| {
        if n % 10 == 0 {
            cursor.open(&mut txn, TREE, ReadAs::Snapshot)?;
            stands = cursor.seek(&mut txn, &key(n * 7919 % ROWS))?;
        } else if stands {
            stands = cursor.next(&mut txn)?;
        }
        if n % 10 == 9 {
            cursor.close();
        }
        Ok(())
    })?;
    cursor.open(&mut txn, TREE, ReadAs::Snapshot)?;
    report(&format!("{place}: open and close"), 200_000, |_| {
        cursor.open(&mut txn, TREE, ReadAs::Snapshot)?;
        cursor.close();
        Ok(())
    })?;
    for ahead in [true, false] {
        cursor.open(&mut txn, TREE, ReadAs::Snapshot)?;
        let direction = if ahead { "forward" } else { "backward" };
        let mut sum = 0;
        report(&format!("{place}: full scan {direction}"), ROWS, |n| {
            match (n, ahead) {
                (0, true) => cursor.seek_first(&mut txn)?,
                (0, false) => cursor.seek_last(&mut txn)?,
                (_, true) => cursor.next(&mut txn)?,
                (_, false) => cursor.prev(&mut txn)?,
            };
            sum += u64::from(cursor.key()[7]) + u64::from(cursor.value()[100]);
            Ok(())
        })?;
        black_box(sum);
    }
    Ok(())
}

fn writes(engine: &Arc<Engine>) -> Result<()> {
    let mut txn = engine.begin();
    report("commit of one inserted row (lock, put, commit)", 100_000, |n| {
        let key = key(n * 7919 % ROWS + ROWS);
        txn.lock(TREE, &key, LockMode::Exclusive, &WAIT)?;
        txn.put(TREE, &key, &VALUE)?;
        txn.commit().map(drop)
    })?;
    report("row of a commit of 100 updates (lock, get, put)", 200_000, |n| {
        let key = key(n * 7919 % ROWS);
        txn.lock(TREE, &key, LockMode::Exclusive, &WAIT)?;
        txn.get(TREE, &key, ReadAs::Newest, |value| black_box(value[0]))?;
        txn.put(TREE, &key, &VALUE)?;
        if n % 100 == 99 {
            txn.commit()?;
        }
        Ok(())
    })?;
    txn.commit().map(drop)
}

fn settle(engine: &Engine) -> Result<()> {
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

/// Half of it can be packed, as real rows are.
fn scattered_value(n: u64) -> [u8; 200] {
    let mut value = VALUE;
    for (word, bytes) in value[..100].chunks_exact_mut(4).enumerate() {
        bytes.copy_from_slice(&key(n * 25 + word as u64)[4..]);
    }
    value
}

/// An engine with everything in a directory below target/, which the caller removes.
fn open_on_disk(name: &str, settings: Settings) -> Result<(std::path::PathBuf, Arc<Engine>)> {
    let root = std::path::Path::new("target").join(format!("bench-{name}-{}", std::process::id()));
    std::fs::create_dir_all(root.join("bucket")).expect("target/ can be written");
    let parts = Parts {
        bucket: Arc::new(bucket::DirectoryBucket::open(&root.join("bucket"))?),
        disk: Arc::new(RealDisk::open(root.join("data"))?),
        clock: Arc::new(SystemClock::default()),
        seed: 1,
    };
    Ok((root, Engine::open(parts, settings)?))
}

/// The rows of `load`, in order, straight to ssts, while somebody else commits a row now and then.
fn bulk() -> Result<()> {
    const LOADED: u64 = 10_000_000;
    let (root, engine) = open_on_disk("bulk", Settings::default())?;
    let clock = SystemClock::default();
    let done = std::sync::atomic::AtomicBool::new(false);
    let small_commits = |until: &dyn Fn(usize) -> bool| {
        let mut took = Vec::new();
        while !until(took.len()) {
            let mut txn = engine.begin();
            txn.put(TREE, &key(took.len() as u64), &VALUE)?;
            let start = clock.now();
            txn.commit()?;
            took.push(clock.now() - start);
            clock.sleep(Duration::from_millis(2));
        }
        took.sort();
        let at = |share: f64| took[(share * (took.len() - 1) as f64) as usize];
        Ok::<_, engine::Error>(format!(
            "median {:.1?}, 99 % {:.1?}, slowest {:.1?}",
            at(0.5),
            at(0.99),
            at(1.0)
        ))
    };
    println!("a row committed alone: {}", small_commits(&|commits| commits == 1000)?);
    let tree = engine.allocate_tree();
    let start = clock.now();
    std::thread::scope(|scope| {
        let small = scope.spawn(|| small_commits(&|_| done.load(std::sync::atomic::Ordering::Relaxed)));
        let mut load = engine.load(tree)?;
        for n in 0..LOADED {
            load.put(&n.to_be_bytes(), &scattered_value(n))?;
        }
        let put = clock.now() - start;
        let mut txn = engine.begin();
        txn.add_loaded(load.finish()?)?;
        txn.commit()?;
        let took = clock.now() - start;
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        let user = (LOADED * 208) as f64;
        println!(
            "{:.0} MB a second ({took:.1?}, the last row taken after {put:.1?})",
            user / took.as_secs_f64() / 1e6
        );
        println!("a row committed meanwhile: {}", small.join().expect("a writer does not panic")?);
        let count = |name: &str| engine.status().get(name).unwrap_or(0) as f64;
        println!("in ssts: {:.2} of the user's bytes", count("loaded_bytes") / user);
        println!("put to the bucket: {:.2} times that", count("bucket_put_bytes") / count("loaded_bytes"));
        println!("requests: {:.0} a GiB", count("bucket_put_requests") / user * (1u64 << 30) as f64);
        Ok::<_, engine::Error>(())
    })?;
    engine.close()?;
    drop(engine);
    std::fs::remove_dir_all(root).expect("what was made here can be removed");
    Ok(())
}

/// 1 GiB of scattered rows by four threads: how fast, how evenly, and what the bucket is asked for.
fn load() -> Result<()> {
    const LOADED: u64 = 5_000_000;
    let (root, engine) = open_on_disk("load", Settings::default())?;
    let clock = SystemClock::default();
    let slowest = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|thread| {
                let (engine, clock) = (&engine, &clock);
                scope.spawn(move || {
                    let mut txn = engine.begin();
                    let mut slowest = Duration::ZERO;
                    for n in (thread..LOADED).step_by(4) {
                        txn.put(TREE, &key(n), &scattered_value(n))?;
                        if n / 4 % 100 == 99 {
                            let start = clock.now();
                            txn.commit()?;
                            slowest = slowest.max(clock.now() - start);
                        }
                    }
                    txn.commit()?;
                    Ok::<_, engine::Error>(slowest)
                })
            })
            .collect();
        let join =
            |writer: std::thread::ScopedJoinHandle<'_, _>| writer.join().expect("a writer does not panic");
        writers
            .into_iter()
            .map(join)
            .try_fold(Duration::ZERO, |slowest, one| Ok::<_, engine::Error>(slowest.max(one?)))
    })?;
    let loading = clock.now();
    let count = |name: &str| engine.status().get(name).unwrap_or(0);
    println!(
        "{} rows a second; slowest commit {slowest:?}; {} commits were delayed",
        LOADED * 1000 / loading.as_millis() as u64,
        count("writes_delayed")
    );
    while count("edits_queued") > 0 || count("l0_runs") >= 4 {
        clock.sleep(Duration::from_millis(100));
    }
    let user = (LOADED * 208) as f64;
    println!("settled after another {:.1?}", clock.now() - loading);
    println!(
        "put to the bucket: {:.1} times the user's bytes, {:.0} requests a GiB",
        count("bucket_put_bytes") as f64 / user,
        count("bucket_put_requests") as f64 / user * (1u64 << 30) as f64
    );
    println!(
        "{} flushes, {} merges, {} MiB in {} ssts",
        count("flushes"),
        count("compactions"),
        count("sst_bytes") >> 20,
        count("ssts")
    );
    engine.close()?;
    drop(engine);
    _ = std::fs::remove_dir_all(root);
    Ok(())
}

/// Scattered, but the same each time.
fn key(n: u64) -> [u8; 8] {
    let n = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (n ^ (n >> 31)).to_be_bytes()
}

#[expect(clippy::disallowed_methods, reason = "a benchmark is about the machine's own time")]
fn report(name: &str, times: u64, mut act: impl FnMut(u64) -> Result<()>) -> Result<()> {
    let mut best = f64::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        for n in 0..times {
            act(n)?;
        }
        best = best.min(start.elapsed().as_nanos() as f64 / times as f64);
    }
    println!("{name:<58}{best:>9.0}");
    Ok(())
}
