//! Writers that are faster than flushes and merges.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bucket::MemoryBucket;
use common::*;
use engine::limits::{FROZEN_MEMTABLES_MAX, Shape};
use engine::{Background, Engine, SimDisk, TreeId};

const TREE: TreeId = TreeId(7);
const WRITERS: u32 = 4;
const ROWS: u32 = 2000;
/// Commits of one more writer with as many rows, each of them larger than a memtable.
const LARGE: u32 = 20;

/// Memtables and ssts are so small that a few runs of L0 are there before the first is merged.
#[test]
fn writers_are_slowed_before_l0_grows_and_nothing_is_lost() {
    let mut settings = small(Background::Threads);
    settings.shape = Shape { l0_runs: 2, l0_runs_stop: 8, ..settings.shape };
    let most = settings.shape.l0_runs_stop + FROZEN_MEMTABLES_MAX + 2;
    let engine =
        Engine::open(parts(Arc::new(MemoryBucket::new()), &SimDisk::new(1)), settings).expect("it opens");
    let writing = AtomicBool::new(true);
    let (runs, frozen) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut seen = (0, 0);
            while writing.load(Ordering::Relaxed) {
                let now = engine.status();
                let now = |name| now.get(name).unwrap_or(0) as usize;
                seen = (seen.0.max(now("l0_runs")), seen.1.max(now("memtables_frozen")));
                std::thread::yield_now();
            }
            seen
        });
        let write = |writer: u32| {
            let engine = &engine;
            move || {
                for row in 0..ROWS {
                    let mut txn = engine.begin();
                    let key = (row * (WRITERS + 1) + writer).wrapping_mul(0x9e37_79b1).to_be_bytes();
                    txn.put(TREE, &key, &noise(row, 1000)).expect("fits");
                    txn.commit().expect("commits");
                }
            }
        };
        let write_much = || {
            for commit in 0..LARGE {
                let mut txn = engine.begin();
                for row in commit * ROWS / LARGE..(commit + 1) * ROWS / LARGE {
                    let key = (row * (WRITERS + 1) + WRITERS).wrapping_mul(0x9e37_79b1).to_be_bytes();
                    txn.put(TREE, &key, &noise(row, 1000)).expect("fits");
                }
                txn.commit().expect("commits");
            }
        };
        let writers: Vec<_> = (0..WRITERS).map(|writer| scope.spawn(write(writer))).collect();
        let all = writers.into_iter().chain([scope.spawn(write_much)]);
        all.for_each(|writer| writer.join().expect("it writes"));
        writing.store(false, Ordering::Relaxed);
        watcher.join().expect("it watches")
    });
    let delayed = status(&engine, "writes_delayed");
    println!("{delayed} commits delayed, {runs} runs and {frozen} frozen memtables at most");
    assert!(delayed > 0);
    // Who was let in before the limit was met may still fill a memtable.
    assert!(runs <= most, "{runs} runs in L0");
    assert!(frozen <= FROZEN_MEMTABLES_MAX + 1, "{frozen} frozen memtables");
    assert_eq!(all(&engine, &mut engine.begin(), TREE).len(), ((WRITERS + 1) * ROWS) as usize);
    engine.close().expect("it closes");
}
