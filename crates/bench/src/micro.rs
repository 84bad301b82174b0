//! What single steps of the engine cost, in nanoseconds, beside what DESIGN section 7 wants.
//!
//! 500,000 rows of 200 bytes under scattered 8-byte keys, as in the design's own table; everything in memory. Each
//! figure is the best of several rounds: on a shared machine the others measure the neighbours.
//!
//! ```console
//! $ cargo run --release -p bench --bin bench-micro [part of a name [rounds]]
//! ```

use std::cell::LazyCell;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bucket::MemoryBucket;
use engine::internals::{MeasuredSst, Memtable, Merge, Op, Source, Stream, Wal, WalLimits, WriteSet};
use engine::limits::Shape;
use engine::{
    Background, BranchId, Cursor, Disk, Engine, Epoch, Isolation, Job, LockMode, LockWait, OpKind, Parts,
    ReadAs, RealDisk, Result, Seqno, Settings, SimDisk, SystemClock, TreeId, Txn, WalPosition, full_key,
};

const ROWS: u64 = 500_000;
const VALUE: [u8; 200] = [0x5a; 200];
const TREE: TreeId = TreeId(70);
const NEWEST: Seqno = Seqno(u64::MAX);

/// Measures and prints one line: name, the design's first and second figure, what to measure.
type Report<'a> = &'a dyn Fn(&str, &str, &str, &mut dyn FnMut() -> Result<f64>) -> Result<()>;

fn main() -> Result<()> {
    let wanted = std::env::args().nth(1).unwrap_or_default();
    let rounds = std::env::args().nth(2).and_then(|rounds| rounds.parse().ok()).unwrap_or(5);
    println!("{:<58}{:>9}{:>8}{:>8}", "ns each", "measured", "first", "then");
    let report =
        |name: &str, first: &str, then: &str, measure: &mut dyn FnMut() -> Result<f64>| -> Result<()> {
            if name.contains(&wanted) {
                let mut best = f64::MAX;
                for _ in 0..rounds {
                    best = best.min(measure()?);
                }
                println!("{name:<58}{best:>9.0}{first:>8}{then:>8}");
            }
            Ok(())
        };

    if wanted.contains("wal") {
        return wals(&report);
    }
    if wanted.contains("tree") {
        return trees(&report);
    }
    if wanted.contains("cursor") {
        return cursors(&report);
    }
    if wanted.contains("sst") {
        return ssts(&report); // without the seconds that it takes to fill memtables
    }
    if wanted.contains("sort") {
        return sorts(&report);
    }
    let keys = scattered_keys(&[]);
    let full = filled(&keys, 1).pop().expect("one memtable was asked for");
    report("memtable insert, scattered", "1300", "1000", &mut || {
        let memtable = Memtable::new();
        Ok(each(&keys, |n, key| memtable.insert(key, Seqno(n), OpKind::Put, &VALUE)))
    })?;
    let mut appended = keys.clone();
    appended.sort();
    report("memtable insert, appended", "", "", &mut || {
        let memtable = Memtable::new();
        Ok(each(&appended, |n, key| memtable.insert(key, Seqno(n), OpKind::Put, &VALUE)))
    })?;
    report("memtable insert, scattered, 2 threads, ns of each", "", "", &mut || {
        let memtable = Memtable::new();
        let (left, right) = keys.split_at(keys.len() / 2);
        let took = std::thread::scope(|scope| {
            let threads = [left, right].map(|keys| {
                let memtable = &memtable;
                scope.spawn(move || each(keys, |n, key| memtable.insert(key, Seqno(n), OpKind::Put, &VALUE)))
            });
            threads.map(|thread| thread.join().expect("inserting does not panic"))
        });
        Ok(took.iter().sum::<f64>() / 2.0)
    })?;
    let asked = shuffled(&keys);
    report("memtable get", "1000", "800", &mut || Ok(each(&asked, |_, key| full.get(key, NEWEST))))?;
    report("memtable get, 2 threads, ns of each", "", "", &mut || {
        let (left, right) = asked.split_at(asked.len() / 2);
        let took = std::thread::scope(|scope| {
            let threads = [left, right].map(|keys| {
                let full = &full;
                scope.spawn(move || each(keys, |_, key| _ = black_box(full.get(key, NEWEST))))
            });
            threads.map(|thread| thread.join().expect("reading does not panic"))
        });
        Ok(took.iter().sum::<f64>() / 2.0)
    })?;
    let long = scattered_keys(b"https://www.example.com/a/long/way/in/common/");
    let long_full = filled(&long, 1).pop().expect("one memtable was asked for");
    let long_asked = shuffled(&long);
    report("memtable get, 45 bytes in common", "", "", &mut || {
        Ok(each(&long_asked, |_, key| long_full.get(key, NEWEST)))
    })?;
    report("memtable seek", "", "", &mut || {
        let mut iter = full.iter_tree(TREE);
        Ok(each(&asked, |_, key| iter.seek(key, NEWEST).expect("a memtable does not fail")))
    })?;
    report("memtable scan", "60", "35", &mut || scan(&mut full.iter_tree(TREE), true))?;
    report("memtable scan, backwards", "", "", &mut || scan(&mut full.iter_tree(TREE), false))?;
    for (sources, first, then) in [(1, "", ""), (4, "150", "90")] {
        let parts = filled(&keys, sources);
        report(&format!("merge of {sources} memtables, scan"), first, then, &mut || {
            let mut merge = Merge::new();
            parts.iter().for_each(|part| merge.add(part.iter_tree(TREE)));
            scan(&mut merge, true)
        })?;
    }
    report("merge of 1 memtable and 3 nearly empty ones, scan", "", "", &mut || {
        let mut merge = Merge::new();
        merge.add(full.iter_tree(TREE));
        for first in 0..3 {
            let small = Memtable::new();
            keys[first..first + 50].iter().for_each(|key| small.insert(key, NEWEST, OpKind::Put, &VALUE));
            merge.add(small.iter_tree(TREE));
        }
        scan(&mut merge, true)
    })?;
    report("write set: 4 puts, 4 gets, in order, clear; for each row", "", "", &mut || {
        let mut set = WriteSet::new();
        let rows: Vec<_> = keys.chunks_exact(4).collect();
        let each_four = each(&rows, |_, four| {
            four.iter().for_each(|key| set.put(key, &VALUE));
            four.iter().for_each(|key| _ = black_box(set.get(key)));
            black_box(set.in_order().count());
            set.clear();
        });
        Ok(each_four / 4.0)
    })?;
    report("write set put, scattered, one large transaction", "", "", &mut || {
        let mut set = WriteSet::new();
        Ok(each(&keys, |_, key| set.put(key, &VALUE)))
    })?;
    ssts(&report)?;
    cursors(&report)?;
    trees(&report)
}

/// What a row of a scan costs a transaction, by where the rows are. To count instead of timing: what two rounds take more than one
/// (the first walk reads blocks), over 200,000 rows.
///
/// ```console
/// $ valgrind --tool=callgrind --toggle-collect='*Walk::rows*' target/release/bench-micro "cursor: scan forward, four" 1
/// ```
fn cursors(report: Report<'_>) -> Result<()> {
    /// Rows in these trees, so that counting does not take hours.
    const FEW: u64 = 100_000;
    // The rows dealt out to runs at random, some of them again in the memtable.
    let fill = |parts: u64, again: u64| -> Result<Arc<Engine>> {
        let engine = open(Shape::default())?;
        let mut txn = engine.begin();
        for part in 0..parts {
            for n in (0..FEW).filter(|n| mixed(n + 1) % parts == part) {
                txn.put(TREE, &n.to_be_bytes(), &mixed_value(n))?;
            }
            txn.commit()?;
            engine.step(Job::Freeze)?;
            engine.step(Job::Flush)?;
        }
        for n in (0..FEW).filter(|n| mixed(n + 7) % 100 < again) {
            txn.put(TREE, &n.to_be_bytes(), &mixed_value(n + 1))?;
        }
        txn.commit()?;
        Ok(engine)
    };
    for (name, parts, again) in [
        ("one run alone", 1, 0),
        ("one run, 5 % again in the memtable", 1, 5),
        ("one run, 50 % again in the memtable", 1, 50),
        ("four runs", 4, 0),
    ] {
        let filled = LazyCell::new(|| fill(parts, again).expect("everything is in memory"));
        for (way, ahead) in [("forward", true), ("back", false)] {
            report(&format!("cursor: scan {way}, {name}"), "", "", &mut || {
                let mut walk = Walk::through(&filled)?;
                assert_eq!(
                    walk.rows(None, FEW, ahead)?,
                    FEW,
                    "every row is seen, and in memory from here on"
                );
                Ok(timed(|| walk.rows(None, FEW, ahead).map(drop))? / FEW as f64)
            })?;
            let starts: Vec<_> = (0..1000).map(|n| 100 + mixed(n) % (FEW - 200)).collect();
            report(&format!("cursor: seek and 100 rows {way}, {name}, each"), "", "", &mut || {
                let mut walk = Walk::through(&filled)?;
                walk.rows(None, FEW, ahead)?;
                Ok(each(&starts, |_, start| walk.rows(Some(*start), 100, ahead)) / 100.0)
            })?;
        }
    }
    Ok(())
}

/// A transaction that walks over rows and looks at them.
struct Walk {
    txn: Txn,
    cursor: Cursor,
}

impl Walk {
    fn through(engine: &Arc<Engine>) -> Result<Self> {
        let (mut txn, mut cursor) = (engine.begin(), Cursor::new(engine));
        cursor.open(&mut txn, TREE, ReadAs::Snapshot)?;
        Ok(Self { txn, cursor })
    }

    /// How many rows it saw, at most `most`, from a key or an end of the tree.
    fn rows(&mut self, from: Option<u64>, most: u64, ahead: bool) -> Result<u64> {
        let (txn, cursor) = (&mut self.txn, &mut self.cursor);
        let mut on = match (from, ahead) {
            (Some(from), true) => cursor.seek(txn, &from.to_be_bytes())?,
            (Some(from), false) => cursor.seek_before(txn, &from.to_be_bytes())?,
            (None, true) => cursor.seek_first(txn)?,
            (None, false) => cursor.seek_last(txn)?,
        };
        let (mut seen, mut sum) = (0, 0);
        while on {
            seen += 1;
            sum += u64::from(cursor.key()[7]) + u64::from(cursor.value()[100]);
            on = seen < most && if ahead { cursor.next(txn)? } else { cursor.prev(txn)? };
        }
        black_box(sum);
        Ok(seen)
    }
}

/// The engine behind its public face, on a disk that forgets: what a look-up, a lock, a commit and a merge cost when all
/// parts take part.
fn trees(report: Report<'_>) -> Result<()> {
    let engine = layered()?;
    let keys: Vec<_> = (0..ROWS).map(|n| short_key(n * 314_159 % ROWS)).collect();
    let get = |txn: &mut Txn, key: &[u8]| txn.get(TREE, key, ReadAs::Snapshot, |value| value[0]);
    let reader = || {
        let mut txn = engine.begin();
        txn.set_isolation(Isolation::ReadCommitted);
        txn.snapshot_now();
        txn
    };
    let mut txn = reader();
    report("tree: get, 2 runs of L0 over 3 levels", "2500", "1500", &mut || {
        Ok(each_in_quiet(&keys, |key| {
            get(&mut txn, key).expect("everything is in memory").expect("it is there")
        }))
    })?;
    report("tree: get, 2 threads, ns of each", "", "", &mut || {
        let (left, right) = keys.split_at(keys.len() / 2);
        let took = std::thread::scope(|scope| {
            let threads = [left, right].map(|keys| {
                let reader = &reader;
                scope.spawn(move || {
                    let mut txn = reader();
                    each(keys, |_, key| _ = black_box(get(&mut txn, key)))
                })
            });
            threads.map(|thread| thread.join().expect("reading does not panic"))
        });
        Ok(took.iter().sum::<f64>() / 2.0)
    })?;
    let absent: Vec<_> = keys.iter().map(|key| [&key[..], &[0]].concat()).collect();
    report("tree: get of an absent key, only filters", "", "", &mut || {
        Ok(each_in_quiet(&absent, |key| get(&mut txn, key).expect("everything is in memory")))
    })?;
    drop(txn);

    let wait = LockWait { timeout: std::time::Duration::from_secs(50), interrupted: &|| false };
    let hundreds: Vec<_> = keys.chunks_exact(100).collect();
    report("tree: lock and unlock a key, 100 to a transaction", "150", "80", &mut || {
        let mut txn = engine.begin();
        let each_hundred = each_in_quiet(&hundreds[..1000], |keys| {
            for key in *keys {
                txn.lock(TREE, key, LockMode::Exclusive, &wait).expect("nobody else locks");
            }
            txn.rollback();
        });
        Ok(each_hundred / 100.0)
    })?;
    report("tree: one row to a commit, no sync (lock, put, commit)", "6667", "3333", &mut || {
        let mut txn = engine.begin();
        Ok(each(&keys[..100_000], |_, key| {
            txn.lock(TREE, key, LockMode::Exclusive, &wait).expect("nobody else locks");
            txn.put(TREE, key, &VALUE).expect("there is room");
            txn.commit().expect("the disk forgets, but never fails")
        }))
    })?;
    report("tree: compaction of L0, for each KiB read", "", "", &mut || {
        let engine = open(Shape::default())?;
        let mut txn = engine.begin();
        for run in 0..5 {
            for n in (run..ROWS).step_by(5) {
                txn.put(TREE, &short_key(n), &mixed_value(n))?;
                if n % 5000 == run {
                    txn.commit()?;
                }
            }
            txn.commit()?;
            engine.step(Job::Freeze)?;
            engine.step(Job::Flush)?;
        }
        let took = timed(|| {
            while engine.step(Job::Compact)? {}
            Ok(())
        })?;
        let bytes = engine.status().get("compacted_bytes_read").unwrap_or(0);
        assert!(bytes > 0, "the runs of L0 are merged");
        println!("{:<58}{:>9.0} MB/s of packed bytes", "", bytes as f64 * 1000.0 / took);
        Ok(took * 1024.0 / bytes as f64)
    })
}

/// All rows in three levels, a hundredth of them again in each of two runs of L0.
fn layered() -> Result<Arc<Engine>> {
    // With 60 MB of packed rows at the bottom, levels of an eighth each reach this base in two steps.
    let engine = open(Shape { level_base_bytes: 1 << 20, sst_bytes: 4 << 20, ..Shape::default() })?;
    let mut txn = engine.begin();
    const PARTS: u64 = 25;
    for part in 0..PARTS {
        for n in (part..ROWS).step_by(PARTS as usize) {
            txn.put(TREE, &short_key(n), &mixed_value(n))?;
        }
        txn.commit()?;
        engine.step(Job::Freeze)?;
        let jobs = [Job::Flush, Job::UploadWal, Job::Publish, Job::Compact, Job::CollectGarbage];
        while jobs
            .iter()
            .try_fold(false, |worked, job| Ok::<_, engine::Error>(engine.step(*job)? | worked))?
        {}
    }
    for run in 0..2 {
        for n in (run..ROWS).step_by(100) {
            txn.put(TREE, &short_key(n), &mixed_value(n))?;
        }
        txn.commit()?;
        engine.step(Job::Freeze)?;
        engine.step(Job::Flush)?;
    }
    Ok(engine)
}

fn open(shape: Shape) -> Result<Arc<Engine>> {
    let settings = Settings {
        background: Background::Manual,
        memtable_bytes: 1 << 30,
        memory_bytes: 3 << 30,
        shape,
        ..Settings::default()
    };
    let parts = Parts {
        bucket: Arc::new(MemoryBucket::new()),
        disk: Arc::new(SimDisk::new(1)),
        clock: Arc::new(SystemClock::default()),
        seed: 1,
    };
    Engine::open(parts, settings)
}

fn short_key(n: u64) -> [u8; 8] {
    mixed(n + 1).to_be_bytes()
}

/// Half of it can be packed, as real rows are.
fn mixed_value(n: u64) -> [u8; 200] {
    let mut value = VALUE;
    for (word, bytes) in value[..100].chunks_exact_mut(4).enumerate() {
        bytes.copy_from_slice(&mixed(n * 25 + word as u64).to_be_bytes()[4..]);
    }
    value
}

/// Ssts whose blocks are in the cache, and the way there.
fn ssts(report: Report<'_>) -> Result<()> {
    let mut keys = scattered_keys(&[]);
    let asked = shuffled(&keys);
    keys.sort();
    let rows = || keys.iter().map(|key| (&key[..], Seqno(7), &VALUE[..]));
    let sst = MeasuredSst::build(rows(), usize::MAX)?;
    report("sst build, for each row", "", "", &mut || {
        timed(|| MeasuredSst::build(rows(), 0).map(drop)).map(|took| took / ROWS as f64)
    })?;
    report("sst get, cached", "600", "", &mut || Ok(each_in_quiet(&asked, |key| sst.get(key))))?;
    let few = &asked[..2000];
    report("sst get, cached, 2,000 rows again and again", "", "", &mut || {
        Ok((0..50).map(|_| each_in_quiet(few, |key| sst.get(key))).fold(f64::MAX, f64::min))
    })?;
    let absent: Vec<_> = asked.iter().map(|key| [key, &[0][..]].concat()).collect();
    report("sst get, absent key, filter cached", "", "", &mut || {
        Ok(each_in_quiet(&absent, |key| sst.get(key)))
    })?;
    report("sst seek, cached", "", "", &mut || {
        let mut iter = sst.iter();
        Ok(each_in_quiet(&asked, |key| iter.seek(key, NEWEST)))
    })?;
    report("sst scan, cached", "60", "35", &mut || scan(&mut sst.iter(), true))?;
    report("sst scan, cached, backwards", "", "", &mut || scan(&mut sst.iter(), false))?;
    report("sst scan, blocks checked and unpacked", "", "", &mut || scan(&mut sst.cold(0)?.iter(), true))?;
    let quarters: Result<Vec<_>> =
        (0..4).map(|quarter| MeasuredSst::build(rows().skip(quarter).step_by(4), usize::MAX)).collect();
    let quarters = quarters?;
    report("merge of 4 cached ssts, scan", "150", "90", &mut || {
        let mut merge = Merge::new();
        quarters.iter().for_each(|sst| merge.add(sst.iter()));
        scan(&mut merge, true)
    })
}

/// The sorter with the memory of one memtable (64 MiB) and runs in the directory for temporary files.
fn sorts(report: Report<'_>) -> Result<()> {
    let directory = std::env::temp_dir().join(format!("cistern-bench-sort-{}", std::process::id()));
    let parts = Parts {
        bucket: Arc::new(MemoryBucket::new()),
        disk: Arc::new(RealDisk::open(&directory)?),
        clock: Arc::new(SystemClock::default()),
        seed: 1,
    };
    let engine = Engine::open(parts, Settings::default())?;
    let sort = |name: &str, entries: u64, key: &dyn Fn(u64) -> u64, value: &[u8]| {
        report(name, "", "", &mut || {
            let took = timed(|| {
                let mut sorter = engine.sorter(1);
                for n in 0..entries {
                    let key = key(n);
                    sorter.push(&[&key.to_be_bytes()[..], &(n as u32).to_be_bytes()].concat(), value)?;
                }
                let (mut sorted, mut seen) = (sorter.finish()?, 0);
                while sorted.next()? {
                    seen += u64::from(black_box(sorted.value()).len() == value.len());
                }
                assert_eq!(seen, entries, "entries come back");
                Ok(())
            })?;
            Ok(took / entries as f64)
        })
    };
    sort("sort of index entries, in memory", ROWS, &mixed, &[])?;
    sort("sort of index entries, 10 times as many", 10 * ROWS, &mixed, &[])?;
    sort("sort of index entries, 10 times as many, ascending", 10 * ROWS, &|n| n, &[])?;
    sort("sort of rows of 200 bytes", 5 * ROWS, &mixed, &VALUE)?;
    engine.close()?;
    drop(engine);
    _ = std::fs::remove_dir_all(directory);
    Ok(())
}

/// The wal: what a commit of one row costs the processor, and what threads that wait for their syncs get from one disk
/// (the directory for temporary files; figures are nanoseconds for each commit, all threads together).
fn wals(report: Report<'_>) -> Result<()> {
    let directory = std::env::temp_dir().join(format!("cistern-bench-wal-{}", std::process::id()));
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::open(&directory)?);
    let epoch = AtomicU64::new(0);
    let create = || {
        let stream = Stream::new(BranchId::default(), Epoch(epoch.fetch_add(1, Ordering::Relaxed)));
        Wal::create(Arc::clone(&disk), stream, WalPosition(0), WalLimits::default())
    };
    let key = full_key(TREE, &[7; 8]);
    report("wal: a place, filled, without its sync", "", "", &mut || {
        let wal = create()?;
        let rows: Vec<_> = (0..20_000).collect();
        Ok(each(&rows, |n, _| append(&wal, Seqno(n), &key)))
    })?;
    for threads in [1_u64, 8, 64] {
        report(&format!("wal: commits of {threads} threads, synced"), "", "", &mut || {
            let wal = create()?;
            let turn = std::sync::Mutex::new(0);
            let each_thread = 4000 / threads.max(8);
            let took = timed(|| {
                std::thread::scope(|scope| {
                    for _ in 0..threads {
                        scope.spawn(|| {
                            for _ in 0..each_thread {
                                let mut turn = turn.lock().expect("no thread panics");
                                *turn += 1;
                                let op = Op::Put(&key, &VALUE);
                                let mut slot =
                                    wal.reserve(op.encoded_len(), Seqno(*turn)).expect("there is room");
                                drop(turn);
                                slot.write(op);
                                wal.sync_to(slot.finish()).expect("the disk works");
                            }
                        });
                    }
                });
                Ok(())
            })?;
            Ok(took / (each_thread * threads) as f64)
        })?;
    }
    drop(disk);
    std::fs::remove_dir_all(&directory).expect("what was made here can be removed");
    Ok(())
}

fn append(wal: &Wal, seqno: Seqno, key: &[u8]) -> WalPosition {
    let op = Op::Put(key, &VALUE);
    let mut slot = wal.reserve(op.encoded_len(), seqno).expect("there is room");
    slot.write(op);
    slot.finish()
}

/// The steps of splitmix64, which visits each number once, without any order.
fn mixed(n: u64) -> u64 {
    let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// Distinct keys without any order.
fn scattered_keys(beginning: &[u8]) -> Vec<Vec<u8>> {
    (1..=ROWS).map(|n| full_key(TREE, &[beginning, &mixed(n).to_be_bytes()].concat())).collect()
}

/// The same keys in another order.
fn shuffled(keys: &[Vec<u8>]) -> Vec<Vec<u8>> {
    // A step that shares no factor with the number of rows visits each row once.
    (0..keys.len()).map(|n| keys[n * 314_159 % keys.len()].clone()).collect()
}

/// The rows dealt out in turn.
fn filled(keys: &[Vec<u8>], memtables: usize) -> Vec<Arc<Memtable>> {
    let memtables: Vec<_> = (0..memtables).map(|_| Memtable::new()).collect();
    for (n, key) in keys.iter().enumerate() {
        memtables[n % memtables.len()].insert(key, Seqno(n as u64 + 1), OpKind::Put, &VALUE);
    }
    memtables
}

/// Nanoseconds of one step of a scan that looks at key and value as a reader of rows does.
fn scan(source: &mut impl Source, ahead: bool) -> Result<f64> {
    let (mut rows, mut sum) = (0_u64, 0_u64);
    let took = timed(|| {
        if ahead {
            source.seek(&full_key(TREE, &[]), NEWEST)?
        } else {
            source.seek_before(&full_key(TreeId(TREE.0 + 1), &[]))?
        }
        while source.valid() {
            rows += 1;
            sum += u64::from(source.key()[11]) + u64::from(source.value()[100]);
            if ahead { source.next()? } else { source.prev()? }
        }
        Ok(())
    })?;
    black_box(sum);
    assert!(rows >= ROWS, "{rows} of {ROWS} rows were seen");
    Ok(took / rows as f64)
}

/// Nanoseconds of `act` on one item.
fn each<T, R>(items: &[T], mut act: impl FnMut(u64, &T) -> R) -> f64 {
    let took = timed(|| {
        items.iter().zip(1..).for_each(|(item, n)| _ = black_box(act(n, item)));
        Ok(())
    });
    took.expect("nothing in it fails") / items.len() as f64
}

/// The same for steps that cost the same each time: the quickest tenth of batches of 500, when the neighbours slept.
fn each_in_quiet<T, R>(items: &[T], mut act: impl FnMut(&T) -> R) -> f64 {
    let mut batches: Vec<f64> = items.chunks(500).map(|batch| each(batch, |_, item| act(item))).collect();
    batches.sort_by(f64::total_cmp);
    batches[batches.len() / 10]
}

#[expect(clippy::disallowed_methods, reason = "a benchmark is about the machine's own time")]
#[inline(never)] // a profiler finds it by its name
fn timed(act: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    act()?;
    Ok(start.elapsed().as_nanos() as f64)
}
