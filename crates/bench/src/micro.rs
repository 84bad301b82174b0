//! What single steps of the engine cost, in nanoseconds, in one thread and in two, beside what DESIGN section 7 wants.
//!
//! * 500,000 rows of 200 bytes under scattered 8-byte keys, as in the design's own table; everything in memory.
//! * A step is a closure over a share of numbers: one thread has all of them, two have a half each and begin together. The figure is
//!   what one number cost each thread, so a step that does not scale shows more with two.
//! * Each figure is the best of several rounds: on a shared machine the others measure the neighbours.
//! * A complete run appends itself to docs/performance.md.
//!
//! ```console
//! $ cargo run --release -p bench --bin bench-micro [part of a name [rounds]]
//! ```

use std::hint::black_box;
use std::ops::Range;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, LazyLock};
use std::time::{Duration, Instant};

use bench::engine_in_memory;
use bench::history::{self, figure};
use bench::machine::Watch;
use bucket::MemoryBucket;
use clap::Parser;
use engine::internals::{
    MeasuredBlock, MeasuredFilter, MeasuredSst, Memtable, Merge, Op, Source, Stream, Wal, WalLimits, WriteSet,
};
use engine::limits::Shape;
use engine::{
    BranchId, Cursor, Disk, Engine, Epoch, Isolation, Job, LockMode, LockWait, OpKind, Parts, ReadAs,
    RealDisk, Result, Seqno, Settings, SystemClock, TreeId, Txn, WalPosition, full_key,
};

/// Measures single steps of the engine, in nanoseconds
#[derive(Parser)]
#[command(name = "make bench-micro")]
struct Arguments {
    /// Only steps with this in their name; those of `wal` and `sort` run only if they are asked for
    #[arg(default_value = "")]
    name: String,
    /// The best of so many rounds counts
    #[arg(default_value_t = ROUNDS)]
    rounds: usize,
    /// Leave the second thread out, to count instructions instead
    #[arg(long)]
    one_thread: bool,
    /// Record this run in docs/performance.md although it is not complete
    #[arg(long)]
    record: bool,
}

const ROUNDS: usize = 5;
const ROWS: usize = 500_000;
const VALUE: [u8; 200] = [0x5a; 200];
const TREE: TreeId = TreeId(70);
const NEWEST: Seqno = Seqno(u64::MAX);
const WAIT: LockWait<'static> = LockWait { timeout: Duration::from_secs(50), interrupted: &|| false };
const MEMORY: &str = "everything is in memory, which does not fail";
const DISK: &str = "the disk works";

fn main() -> ExitCode {
    let mut report = Report::begin(Arguments::parse());
    match report.arguments.name.split([':', ' ']).next() {
        Some("wal") => wals(&mut report),
        Some("sort") => sorts(&mut report),
        _ => {
            let rows = Rows::new(&[]);
            memtables(&mut report, &rows);
            ssts(&mut report, &rows);
            cursors(&mut report);
            trees(&mut report);
        }
    }
    match report.end() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("bench-micro: {reason}");
            ExitCode::FAILURE
        }
    }
}

// ---- the steps ----

fn memtables(report: &mut Report, rows: &Rows) {
    let Rows { scattered, sorted, asked } = rows;
    for (order, goals, keys) in [("scattered", ["1300", "1000"], scattered), ("appended", NO_GOALS, sorted)] {
        let name = format!("memtable insert, {order}");
        report.step_on(&name, goals, ROWS, Memtable::new, |memtable, share| {
            share.each(|n| memtable.insert(&keys[n], Seqno(n as u64 + 1), OpKind::Put, &VALUE))
        });
    }
    let full = LazyLock::new(|| filled(scattered, 1).remove(0));
    report.step("memtable get", ["1000", "800"], ROWS, |share| {
        let full = &**full;
        share.each(|n| full.get(&asked[n], NEWEST).is_some())
    });
    let long = LazyLock::new(|| {
        let long = Rows::new(b"https://www.example.com/a/long/way/in/common/");
        (filled(&long.scattered, 1).remove(0), long.asked)
    });
    report.step("memtable get, 45 bytes in common", NO_GOALS, ROWS, |share| {
        let (full, asked) = &*long;
        share.each(|n| full.get(&asked[n], NEWEST).is_some())
    });
    drop(long);
    report.step("memtable seek", NO_GOALS, ROWS, |share| {
        let mut iter = full.iter_tree(TREE);
        share.each(|n| iter.seek(&asked[n], NEWEST).expect(MEMORY))
    });
    report.step("memtable scan", ["60", "35"], ROWS, |share| {
        share.scan(&mut full.iter_tree(TREE), sorted, true)
    });
    report.step("memtable scan, backwards", NO_GOALS, ROWS, |share| {
        share.scan(&mut full.iter_tree(TREE), sorted, false)
    });
    for (sources, goals) in [(1, NO_GOALS), (4, ["150", "90"])] {
        let parts = LazyLock::new(|| filled(scattered, sources));
        report.step(&format!("merge of {sources} memtables, scan"), goals, ROWS, |share| {
            let mut merge = Merge::new();
            parts.iter().for_each(|part| merge.add(part.iter_tree(TREE)));
            share.scan(&mut merge, sorted, true)
        });
    }
    report.step("merge of 1 memtable and 3 nearly empty ones, scan", NO_GOALS, ROWS, |share| {
        let mut merge = Merge::new();
        merge.add(full.iter_tree(TREE));
        for first in [1000, 1001, 1002] {
            filled(&scattered[first..first + 50], 1)
                .iter()
                .for_each(|small| merge.add(small.iter_tree(TREE)));
        }
        share.scan(&mut merge, sorted, true)
    });
    let name = "write set: 4 puts, 4 gets, in order, clear; for each row";
    report.step(name, NO_GOALS, ROWS / 4, |share| {
        let mut set = WriteSet::new();
        let each_four = share.each(|n| {
            let four = &scattered[4 * n..4 * n + 4];
            four.iter().for_each(|key| set.put(key, &VALUE));
            four.iter().for_each(|key| _ = black_box(set.get(key)));
            black_box(set.in_order().count());
            set.clear();
        });
        each_four / 4.0
    });
    report.step("write set put, scattered, one large transaction", NO_GOALS, ROWS, |share| {
        let mut set = WriteSet::new();
        share.each(|n| set.put(&scattered[n], &VALUE))
    });
}

/// Blocks, filters, and ssts whose blocks are in the cache.
fn ssts(report: &mut Report, rows: &Rows) {
    /// As many of these rows as production cuts a block at.
    const BLOCK_ROWS: usize = 70;
    /// So few that their blocks stay in the processor's caches.
    const FEW: usize = 2000;
    let Rows { sorted, asked, .. } = rows;
    let of = |numbers: Range<usize>| sorted[numbers].iter().map(|key| (&key[..], Seqno(7), &VALUE[..]));
    let absent: Vec<_> = asked.iter().map(|key| [key, &[0][..]].concat()).collect();

    let blocks = LazyLock::new(|| {
        let block = |start| MeasuredBlock::build(of(start..ROWS.min(start + BLOCK_ROWS)));
        (0..ROWS).step_by(BLOCK_ROWS).map(block).collect::<Vec<_>>()
    });
    report.step("block search, in 29 blocks again and again", NO_GOALS, 100_000, |share| {
        let blocks = &**blocks;
        share.each_in_quiet(|n| {
            let row = scramble(n) % FEW;
            blocks[row / BLOCK_ROWS].search(&sorted[row])
        })
    });
    report.step("block search, anywhere", NO_GOALS, ROWS, |share| {
        let blocks = &**blocks;
        share.each_in_quiet(|n| {
            let row = scramble(n);
            blocks[row / BLOCK_ROWS].search(&sorted[row])
        })
    });
    drop(blocks);
    let filter = LazyLock::new(|| MeasuredFilter::build(sorted));
    for (name, keys) in [("a key that is there", asked), ("an absent key", &absent)] {
        report.step(&format!("filter probe, {name}"), NO_GOALS, ROWS, |share| {
            let filter = &*filter;
            share.each_in_quiet(|n| filter.may_contain(&keys[n]))
        });
    }

    let built = |numbers, cache| MeasuredSst::build(of(numbers), cache).expect(MEMORY);
    report.step("sst build, for each row", NO_GOALS, ROWS, |share| {
        share.whole(|numbers| drop(built(numbers, 0)))
    });
    let sst = LazyLock::new(|| built(0..ROWS, usize::MAX));
    report.step("sst get, cached", NO_GOALS, ROWS, |share| {
        let sst = &*sst;
        share.each_in_quiet(|n| sst.get(&asked[n]))
    });
    report.step("sst get, cached, 2,000 rows again and again", NO_GOALS, 50 * FEW, |share| {
        let sst = &*sst;
        share.each_in_quiet(|n| sst.get(&asked[n % FEW]))
    });
    report.step("sst get, absent key, filter cached", NO_GOALS, ROWS, |share| {
        let sst = &*sst;
        share.each_in_quiet(|n| sst.get(&absent[n]))
    });
    report.step("sst seek, cached", NO_GOALS, ROWS, |share| {
        let mut iter = sst.iter();
        share.each_in_quiet(|n| iter.seek(&asked[n], NEWEST))
    });
    report.step("sst scan, cached", ["60", "35"], ROWS, |share| share.scan(&mut sst.iter(), sorted, true));
    report.step("sst scan, cached, backwards", NO_GOALS, ROWS, |share| {
        share.scan(&mut sst.iter(), sorted, false)
    });
    let cold = || sst.cold(0).expect(MEMORY);
    report.step_on("sst scan, blocks checked and unpacked", NO_GOALS, ROWS, cold, |cold, share| {
        share.scan(&mut cold.iter(), sorted, true)
    });
    let quarters = LazyLock::new(|| {
        let quarter = |part| MeasuredSst::build(of(0..ROWS).skip(part).step_by(4), usize::MAX);
        (0..4).map(|part| quarter(part).expect(MEMORY)).collect::<Vec<_>>()
    });
    report.step("merge of 4 cached ssts, scan", ["150", "90"], ROWS, |share| {
        let mut merge = Merge::new();
        quarters.iter().for_each(|sst| merge.add(sst.iter()));
        share.scan(&mut merge, sorted, true)
    });
}

/// What a row of a scan costs a transaction, by where the rows are. To count instead of timing: what two rounds take more than one,
/// over 100,000 rows.
///
/// ```console
/// $ valgrind --tool=callgrind --toggle-collect='*Walk::rows*' target/release/bench-micro "cursor: scan forward, four" 1 --one-thread
/// ```
fn cursors(report: &mut Report) {
    /// Rows in these trees, so that counting does not take hours.
    const FEW: usize = 100_000;
    // The rows dealt out to runs at random, some of them again in the memtable.
    let fill = |parts: u64, again: u64| -> Result<Arc<Engine>> {
        let engine = engine_in_memory(Shape::default())?;
        let mut txn = engine.begin();
        for part in 0..parts {
            for n in (0..FEW as u64).filter(|n| mixed(n + 1) % parts == part) {
                txn.put(TREE, &n.to_be_bytes(), &mixed_value(n))?;
            }
            txn.commit()?;
            engine.step(Job::Freeze)?;
            engine.step(Job::Flush)?;
        }
        for n in (0..FEW as u64).filter(|n| mixed(n + 7) % 100 < again) {
            txn.put(TREE, &n.to_be_bytes(), &mixed_value(n + 1))?;
        }
        txn.commit()?;
        assert_eq!(
            Walk::through(&engine)?.rows(0, FEW, true)?,
            FEW,
            "all is there, and in memory from here on"
        );
        Ok(engine)
    };
    for (name, goals, parts, again) in [
        ("one run alone", ["60", "35"], 1, 0),
        ("one run, 5 % again in the memtable", NO_GOALS, 1, 5),
        ("one run, 50 % again in the memtable", NO_GOALS, 1, 50),
        ("four runs", ["150", "90"], 4, 0),
    ] {
        let filled = LazyLock::new(|| fill(parts, again).expect(MEMORY));
        for (way, ahead) in [("forward", true), ("back", false)] {
            let goals = if ahead { goals } else { NO_GOALS };
            report.step(&format!("cursor: scan {way}, {name}"), goals, FEW, |share| {
                let mut walk = Walk::through(&filled).expect(MEMORY);
                share.whole(|rows| {
                    let from = if ahead { rows.start } else { rows.end };
                    assert_eq!(walk.rows(from, rows.len(), ahead).expect(MEMORY), rows.len(), "all are seen");
                })
            });
            let name = format!("cursor: seek and 100 rows {way}, {name}, each");
            report.step(&name, NO_GOALS, 1000, |share| {
                let mut walk = Walk::through(&filled).expect(MEMORY);
                let start = |n| 100 + mixed(n as u64) as usize % (FEW - 200);
                share.each(|n| walk.rows(start(n), 100, ahead)) / 100.0
            });
        }
    }
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

    /// How many rows it saw, at most `most`, from the one with this number on, or from the one before it back.
    fn rows(&mut self, from: usize, most: usize, ahead: bool) -> Result<usize> {
        let (txn, cursor, from) = (&mut self.txn, &mut self.cursor, (from as u64).to_be_bytes());
        let mut on = if ahead { cursor.seek(txn, &from)? } else { cursor.seek_before(txn, &from)? };
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
fn trees(report: &mut Report) {
    let engine = LazyLock::new(|| layered().expect(MEMORY));
    let keys: Vec<_> = (0..ROWS).map(|n| short_key(scramble(n) as u64)).collect();
    let absent: Vec<_> = keys.iter().map(|key| [&key[..], &[0]].concat()).collect();
    let reader = || {
        let mut txn = engine.begin();
        txn.set_isolation(Isolation::ReadCommitted);
        txn.snapshot_now();
        txn
    };
    let get = |txn: &mut Txn, key: &[u8]| {
        txn.get(TREE, key, ReadAs::Snapshot, |value| value[0]).expect(MEMORY).is_some()
    };
    report.step("tree: get, 2 runs of L0 over 3 levels", ["2500", "1500"], ROWS, |share| {
        let mut txn = reader();
        share.each_in_quiet(|n| assert!(get(&mut txn, &keys[n]), "it is there"))
    });
    report.step("tree: get of an absent key, only filters", NO_GOALS, ROWS, |share| {
        let mut txn = reader();
        share.each_in_quiet(|n| assert!(!get(&mut txn, &absent[n]), "it is not there"))
    });
    let lock = |txn: &mut Txn, key: &[u8]| {
        txn.lock(TREE, key, LockMode::Exclusive, &WAIT).expect("nobody else locks this row");
    };
    let name = "tree: lock and unlock a key, 100 to a transaction";
    report.step(name, ["150", "80"], 100_000, |share| {
        let mut txn = engine.begin();
        share.each_in_quiet(|n| {
            lock(&mut txn, &keys[n]);
            if n % 100 == 99 {
                txn.rollback();
            }
        })
    });
    drop(engine);

    let open_new = || engine_in_memory(Shape::default()).expect(MEMORY);
    let name = "tree: one row to a commit, no sync (lock, put, commit)";
    report.step_on(name, ["6667", "3333"], 100_000, open_new, |engine, share| {
        let mut txn = engine.begin();
        share.each(|n| {
            lock(&mut txn, &keys[n]);
            txn.put(TREE, &keys[n], &VALUE).expect("there is room");
            txn.commit().expect("the disk forgets, but never fails")
        })
    });
    // Threads share one merge, so its time counts for each of them.
    report.row("tree: compaction of L0, MB/s of packed bytes", NO_GOALS, |threads| {
        let engine = runs_in_l0().expect(MEMORY);
        let took = timed(|| while engine.compact_by(threads).expect(MEMORY) {});
        let bytes = engine.status().get("compacted_bytes_read").unwrap_or(0);
        assert!(bytes > 0, "the runs of L0 are merged");
        Figure::Rate(bytes as f64 * 1000.0 / took / threads as f64)
    });
}

/// Rows dealt out to five runs of L0, in ssts so small that two threads can share their merge.
fn runs_in_l0() -> Result<Arc<Engine>> {
    const FEW: u64 = 200_000;
    let engine = engine_in_memory(Shape { sst_bytes: 1 << 20, ..Shape::default() })?;
    let mut txn = engine.begin();
    for run in 0..5 {
        for n in (run..FEW).step_by(5) {
            txn.put(TREE, &short_key(n), &mixed_value(n))?;
            if n % 5000 == run {
                txn.commit()?;
            }
        }
        txn.commit()?;
        engine.step(Job::Freeze)?;
        engine.step(Job::Flush)?;
    }
    Ok(engine)
}

/// All rows in three levels, a hundredth of them again in each of two runs of L0.
fn layered() -> Result<Arc<Engine>> {
    // With 60 MB of packed rows at the bottom, levels of an eighth each reach this base in two steps.
    let engine =
        engine_in_memory(Shape { level_base_bytes: 1 << 20, sst_bytes: 4 << 20, ..Shape::default() })?;
    let mut txn = engine.begin();
    const PARTS: u64 = 25;
    for part in 0..PARTS {
        for n in (part..ROWS as u64).step_by(PARTS as usize) {
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
        for n in (run..ROWS as u64).step_by(100) {
            txn.put(TREE, &short_key(n), &mixed_value(n))?;
        }
        txn.commit()?;
        engine.step(Job::Freeze)?;
        engine.step(Job::Flush)?;
    }
    Ok(engine)
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

/// The sorter with the memory of one memtable (64 MiB) and runs in the directory for temporary files.
fn sorts(report: &mut Report) {
    type Sort = (&'static str, usize, fn(u64) -> u64, &'static [u8]);
    const SORTS: [Sort; 4] = [
        ("sort of index entries, in memory", ROWS, mixed, &[]),
        ("sort of index entries, 10 times as many", 10 * ROWS, mixed, &[]),
        ("sort of index entries, 10 times as many, ascending", 10 * ROWS, |n| n, &[]),
        ("sort of rows of 200 bytes", 5 * ROWS, mixed, &VALUE),
    ];
    let directory = std::env::temp_dir().join(format!("cistern-bench-sort-{}", std::process::id()));
    let parts = Parts {
        bucket: Arc::new(MemoryBucket::new()),
        disk: Arc::new(RealDisk::open(&directory).expect(DISK)),
        clock: Arc::new(SystemClock::default()),
        seed: 1,
    };
    let engine = Engine::open(parts, Settings::default()).expect(DISK);
    for (name, entries, key, value) in SORTS {
        report.alone(name, || {
            let took = timed(|| {
                let mut sorter = engine.sorter(1);
                for n in 0..entries as u64 {
                    let key = [&key(n).to_be_bytes()[..], &(n as u32).to_be_bytes()].concat();
                    sorter.push(&key, value).expect(DISK);
                }
                let (mut sorted, mut seen) = (sorter.finish().expect(DISK), 0);
                while sorted.next().expect(DISK) {
                    seen += usize::from(black_box(sorted.value()).len() == value.len());
                }
                assert_eq!(seen, entries, "entries come back");
            });
            took / entries as f64
        });
    }
    engine.close().expect(DISK);
    drop(engine);
    _ = std::fs::remove_dir_all(directory);
}

/// The wal: what a commit of one row costs the processor, and what threads that wait for their syncs get from one disk
/// (the directory for temporary files; figures are nanoseconds for each commit, all threads together).
fn wals(report: &mut Report) {
    let directory = std::env::temp_dir().join(format!("cistern-bench-wal-{}", std::process::id()));
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::open(&directory).expect(DISK));
    let epoch = AtomicU64::new(0);
    let create = || {
        let stream = Stream::new(BranchId::default(), Epoch(epoch.fetch_add(1, Ordering::Relaxed)));
        Wal::create(Arc::clone(&disk), stream, WalPosition(0), WalLimits::default()).expect(DISK)
    };
    let key = full_key(TREE, &[7; 8]);
    report.alone("wal: a place, filled, without its sync", || {
        const PLACES: u64 = 20_000;
        let wal = create();
        timed(|| (1..=PLACES).for_each(|n| _ = black_box(append(&wal, Seqno(n), &key)))) / PLACES as f64
    });
    for threads in [1_u64, 8, 64] {
        report.alone(&format!("wal: commits of {threads} threads, synced"), || {
            let wal = create();
            let turn = std::sync::Mutex::new(0);
            let each_thread = 4000 / threads.max(8);
            let commit = || {
                let mut turn = turn.lock().expect("no thread panics");
                *turn += 1;
                let op = Op::Put(&key, &VALUE);
                let mut slot = wal.reserve(op.encoded_len(), Seqno(*turn)).expect("there is room");
                drop(turn);
                slot.write(op);
                wal.sync_to(slot.finish()).expect(DISK);
            };
            let took = timed(|| {
                std::thread::scope(|scope| {
                    for _ in 0..threads {
                        scope.spawn(|| (0..each_thread).for_each(|_| commit()));
                    }
                });
            });
            took / (each_thread * threads) as f64
        });
    }
    drop(disk);
    std::fs::remove_dir_all(&directory).expect("what was made here can be removed");
}

fn append(wal: &Wal, seqno: Seqno, key: &[u8]) -> WalPosition {
    let op = Op::Put(key, &VALUE);
    let mut slot = wal.reserve(op.encoded_len(), seqno).expect("there is room");
    slot.write(op);
    slot.finish()
}

// ---- the rows ----

/// Full keys.
struct Rows {
    /// Without any order.
    scattered: Vec<Vec<u8>>,
    /// As they sort.
    sorted: Vec<Vec<u8>>,
    /// In another order without any.
    asked: Vec<Vec<u8>>,
}

impl Rows {
    fn new(beginning: &[u8]) -> Self {
        let key = |n| full_key(TREE, &[beginning, &mixed(n).to_be_bytes()].concat());
        let scattered: Vec<_> = (1..=ROWS as u64).map(key).collect();
        let asked = (0..ROWS).map(|n| scattered[scramble(n)].clone()).collect();
        let mut sorted = scattered.clone();
        sorted.sort();
        Self { scattered, sorted, asked }
    }
}

/// Visits each row once: the step shares no factor with their number.
fn scramble(n: usize) -> usize {
    n * 314_159 % ROWS
}

/// The steps of splitmix64, which visits each number once, without any order.
fn mixed(n: u64) -> u64 {
    let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// The rows dealt out in turn.
fn filled(keys: &[Vec<u8>], memtables: usize) -> Vec<Arc<Memtable>> {
    let memtables: Vec<_> = (0..memtables).map(|_| Memtable::new()).collect();
    for (n, key) in keys.iter().enumerate() {
        memtables[n % memtables.len()].insert(key, Seqno(n as u64 + 1), OpKind::Put, &VALUE);
    }
    memtables
}

// ---- measuring ----

/// The design's first and second figure.
type Goals = [&'static str; 2];
const NO_GOALS: Goals = ["", ""];

/// What came out of a round.
enum Figure {
    /// Nanoseconds of one number in each thread.
    Cost(f64),
    /// More is better.
    Rate(f64),
}

/// What a thread has of a step.
struct Share<'a> {
    numbers: Range<usize>,
    start: &'a Barrier,
}

impl Share<'_> {
    /// Nanoseconds of `act` for each number that it does, all at once. All threads begin together.
    fn whole(&self, act: impl FnOnce(Range<usize>)) -> f64 {
        self.start.wait();
        timed(|| act(self.numbers.clone())) / self.numbers.len() as f64
    }

    /// Nanoseconds of `act` on one number.
    fn each<R>(&self, mut act: impl FnMut(usize) -> R) -> f64 {
        self.whole(|numbers| numbers.for_each(|n| _ = black_box(act(n))))
    }

    /// The same for steps that cost the same each time: the quickest tenth of batches of 500, when the neighbours slept.
    fn each_in_quiet<R>(&self, mut act: impl FnMut(usize) -> R) -> f64 {
        self.start.wait();
        let mut batches: Vec<f64> = Vec::new();
        for start in self.numbers.clone().step_by(500) {
            let batch = start..self.numbers.end.min(start + 500);
            let size = batch.len() as f64;
            batches.push(timed(|| batch.for_each(|n| _ = black_box(act(n)))) / size);
        }
        batches.sort_by(f64::total_cmp);
        batches[batches.len() / 10]
    }

    /// Nanoseconds of one step of a scan that looks at key and value as a reader of rows does. `keys` are all that `source` has, in order.
    fn scan(&self, source: &mut impl Source, keys: &[Vec<u8>], ahead: bool) -> f64 {
        let mut sum = 0_u64;
        let took = self.whole(|numbers| {
            if ahead {
                source.seek(&keys[numbers.start], NEWEST).expect(MEMORY);
            } else {
                let end = keys.get(numbers.end).cloned().unwrap_or_else(|| full_key(TreeId(TREE.0 + 1), &[]));
                source.seek_before(&end).expect(MEMORY);
            }
            for _ in numbers {
                sum += u64::from(source.key()[11]) + u64::from(source.value()[100]);
                if ahead { source.next() } else { source.prev() }.expect(MEMORY);
            }
        });
        black_box(sum);
        took
    }
}

/// The table.
struct Report {
    arguments: Arguments,
    rows: Vec<[String; COLUMNS.len()]>,
    whole: Watch,
}

const COLUMNS: [&str; 7] = ["step (ns each)", "one thread", "two, each", "first", "then", "load", "others"];

impl Report {
    fn begin(arguments: Arguments) -> Self {
        let report = Self { arguments, rows: Vec::new(), whole: Watch::begin() };
        report.print(&COLUMNS.map(str::to_owned));
        report
    }

    /// A step on all of `0..count`, by one thread and by two.
    fn step(&mut self, name: &str, goals: Goals, count: usize, act: impl Fn(&Share) -> f64 + Sync) {
        self.step_on(name, goals, count, || (), |(), share| act(share));
    }

    /// The same, each time on something new that its threads share.
    fn step_on<T: Sync>(
        &mut self,
        name: &str,
        goals: Goals,
        count: usize,
        make: impl Fn() -> T,
        act: impl Fn(&T, &Share) -> f64 + Sync,
    ) {
        self.row(name, goals, |threads| {
            let (made, start) = (make(), Barrier::new(threads));
            let part = |thread| {
                let numbers = count * thread / threads..count * (thread + 1) / threads;
                act(&made, &Share { numbers, start: &start })
            };
            let took: f64 = std::thread::scope(|scope| {
                let part = &part;
                let others: Vec<_> = (1..threads).map(|thread| scope.spawn(move || part(thread))).collect();
                let own = part(0);
                own + others.into_iter().map(|other| other.join().expect("no step panics")).sum::<f64>()
            });
            Figure::Cost(took / threads as f64)
        });
    }

    /// What makes use of its own threads, or of none.
    fn alone(&mut self, name: &str, mut act: impl FnMut() -> f64) {
        let one_thread = std::mem::replace(&mut self.arguments.one_thread, true);
        self.row(name, NO_GOALS, |_| Figure::Cost(act()));
        self.arguments.one_thread = one_thread;
    }

    /// The best of some rounds with one thread and of as many with two, in turn.
    fn row(&mut self, name: &str, goals: Goals, mut act: impl FnMut(usize) -> Figure) {
        if !name.contains(&self.arguments.name) {
            return;
        }
        let watch = Watch::begin();
        let most = if self.arguments.one_thread { 1 } else { 2 };
        let mut best = [None; 2];
        for _ in 0..self.arguments.rounds {
            for (threads, best) in (1..=most).zip(&mut best) {
                let before = best.unwrap_or(f64::NAN); // which loses against every number
                *best = Some(match act(threads) {
                    Figure::Cost(figure) => figure.min(before),
                    Figure::Rate(figure) => figure.max(before),
                });
            }
        }
        let [one, two] = best.map(|best| best.map_or_else(String::new, figure));
        let load = watch.end();
        let [first, then] = goals.map(str::to_owned);
        let row = [name.to_owned(), one, two, first, then, load.averages(), load.beside()];
        self.print(&row);
        self.rows.push(row);
    }

    fn print(&self, [name, rest @ ..]: &[String; COLUMNS.len()]) {
        let [one, two, first, then, load, others] = rest;
        println!("{name:<74}{one:>11}{two:>11}{first:>7}{then:>7}{load:>14}{others:>8}");
    }

    /// Appends a complete run to the history.
    fn end(&self) -> std::result::Result<(), String> {
        let Arguments { name, rounds, one_thread, record } = &self.arguments;
        let complete = name.is_empty() && *rounds >= ROUNDS && !one_thread;
        let heading = history::heading(&self.whole.end());
        println!("\n{heading}");
        if complete || *record {
            let busy = self.rows.iter().any(|row| row[6].contains('!'));
            let remarks = if busy { history::BUSY } else { "" };
            let command = history::command_line("bench-micro");
            let file = history::append(&heading, &command, &COLUMNS, &self.rows, remarks)?;
            println!("recorded in {}", file.display());
        }
        Ok(())
    }
}

#[expect(clippy::disallowed_methods, reason = "a benchmark is about the machine's own time")]
#[inline(never)] // a profiler finds it by its name
fn timed(act: impl FnOnce()) -> f64 {
    let start = Instant::now();
    act();
    start.elapsed().as_nanos() as f64
}
