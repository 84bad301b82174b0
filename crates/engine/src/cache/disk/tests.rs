//! What restarts, full disks and earlier versions leave of the cache.

use super::*;
use crate::disk::SimDisk;
use crate::{Epoch, Kind};

const BRANCH: BranchId = BranchId([1; 16]);
const BYTES: u64 = 2048;
const CAPACITY: u64 = 200 * (BYTES + HEADER_BYTES);

fn id(counter: u64) -> SstId {
    SstId { epoch: Epoch(1), counter }
}

/// Every sst is one short chunk.
fn content(id: SstId) -> Bytes {
    id.counter.to_le_bytes().iter().copied().cycle().take(BYTES as usize).collect()
}

fn cache_on(disk: &SimDisk) -> DiskCache {
    DiskCache::of_chunks(Arc::new(disk.clone()), BRANCH, CAPACITY, BYTES)
}

/// What a process finds that comes after one that died.
fn restarted(disk: &SimDisk) -> (DiskCache, SimDisk) {
    let disk = disk.kill();
    let cache = cache_on(&disk);
    cache.adopt(&|_| Some(BYTES)).unwrap();
    (cache, disk)
}

/// Whether it was here.
fn read(cache: &DiskCache, id: SstId) -> bool {
    match cache.look(id, 0..BYTES, true).unwrap() {
        Lookup::Hit(bytes) => {
            assert_eq!(bytes, content(id), "{id}");
            true
        }
        Lookup::Lacks(_) => {
            cache.keep(id, 0, &content(id));
            cache.read_first(id, &(0..BYTES));
            cache.make_room();
            false
        }
    }
}

fn flush(cache: &DiskCache, id: SstId) -> Result<()> {
    cache.write_pinned(id, &content(id))?;
    cache.unpin(id);
    cache.make_room();
    Ok(())
}

/// Both queues, file by file, oldest first.
fn order(cache: &DiskCache) -> [Vec<String>; 2] {
    let state = cache.state.lock();
    let name = |unit: &Unit| match unit {
        Unit::Sst(id) => cache.sst_name(*id, state.ssts[id].place),
        Unit::Segment(number) => cache.segment_name(state.segments[number].place),
    };
    [&state.small, &state.main].map(|files| files.order.iter().map(name).collect())
}

/// What is counted is what is there.
fn check(cache: &DiskCache, disk: &SimDisk) {
    let bytes = |name: &String| disk.open(name).unwrap().len().unwrap();
    let [small, main] = order(cache);
    let state = cache.state.lock();
    assert_eq!(state.small.bytes, small.iter().map(bytes).sum::<u64>());
    assert_eq!(state.main.bytes, main.iter().map(bytes).sum::<u64>());
    assert!(state.evictable_bytes() <= CAPACITY);
    assert_eq!(disk.used(), state.evictable_bytes(), "nothing else is there");
    for (id, chunks) in &state.chunks {
        for (chunk, place) in chunks {
            assert!(state.segments[&place.segment].entries.contains(&(*id, *chunk)), "{id} will never go");
        }
    }
}

struct Life {
    random: u64,
    flushed: Vec<SstId>,
}

impl Life {
    fn new(seed: u64) -> Self {
        Self { random: seed, flushed: Vec::new() }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % end
    }

    /// Reads, of few objects more often than of others, and ssts that come and go.
    fn goes_on(&mut self, cache: &DiskCache, steps: u64) {
        for _ in 0..steps {
            let object = self.below(400).min(self.below(400)).min(self.below(400));
            match self.below(40) {
                0 | 1 => {
                    let sst = id(self.flushed.len() as u64 + 1000);
                    self.flushed.push(sst);
                    // The caller would wait.
                    let refused = flush(cache, sst).err();
                    assert!(refused.is_none_or(|error| error.kind() == Kind::Full), "{sst}");
                }
                2 => {
                    let at = self.below(self.flushed.len().max(1) as u64) as usize;
                    self.flushed.get(at).into_iter().for_each(|sst| cache.forget(*sst));
                }
                3..10 => {
                    let at = self.flushed.len().saturating_sub(1 + self.below(10) as usize);
                    let sst = self.flushed.get(at).filter(|sst| cache.has(**sst, &(0..BYTES)));
                    sst.into_iter().for_each(|sst| assert!(read(cache, *sst)));
                }
                _ => _ = read(cache, id(object)),
            }
        }
    }
}

#[test]
fn files_stand_where_they_stood_after_a_restart() {
    for seed in 0..20 {
        let (mut disk, mut life) = (SimDisk::new(seed), Life::new(seed));
        let mut cache = cache_on(&disk);
        for _ in 0..5 {
            life.goes_on(&cache, 600);
            check(&cache, &disk);
            let before = order(&cache);
            assert!(before.iter().all(|files| files.len() > 4), "{before:?}");
            (cache, disk) = restarted(&disk);
            assert_eq!(order(&cache), before);
            check(&cache, &disk);
        }
    }
}

#[test]
fn what_goes_first_after_a_restart_is_the_oldest_of_the_small_queue() {
    let disk = SimDisk::new(1);
    let cache = cache_on(&disk);
    (0..20).for_each(|object| flush(&cache, id(1000 + object)).unwrap());
    (0..100).for_each(|object| assert!(!read(&cache, id(object))));
    (20..40).for_each(|object| flush(&cache, id(1000 + object)).unwrap());
    cache.write_pinned(id(2000), &content(id(2000))).unwrap();
    cache.set_cold(id(2000));
    cache.unpin(id(2000));
    cache.write_pinned(id(3000), &content(id(3000))).unwrap(); // the process dies before it is unpinned
    let (cache, _) = restarted(&disk);
    let [small, main] = order(&cache);
    assert!(main.is_empty());
    let place = |name: &str| small.iter().position(|file| file.contains(name)).unwrap();
    let sst = |counter: u64| place(&format!("-{counter:016x}-"));
    let segments = small.iter().enumerate().filter(|(_, name)| name.starts_with("cache")).map(|(at, _)| at);
    let segments: Vec<_> = segments.collect();
    assert_eq!(sst(2000), 0, "what nobody read goes before all others");
    assert_eq!([sst(1000), sst(1019)], [1, 20]);
    assert_eq!(segments, (21..21 + segments.len()).collect::<Vec<_>>());
    assert_eq!(sst(1020), 21 + segments.len());
    assert_eq!(sst(3000), small.len() - 1);
}

#[test]
fn files_of_the_version_before_are_taken_over() {
    let disk = SimDisk::new(1);
    let cache = cache_on(&disk);
    (0..10).for_each(|object| flush(&cache, id(1000 + object)).unwrap());
    (0..100).for_each(|object| assert!(!read(&cache, id(object))));
    // As they were called when there was one queue.
    for name in disk.list("sst").unwrap() {
        disk.rename(&name, name.rsplit_once('-').unwrap().0).unwrap();
    }
    for name in disk.list("cache").unwrap() {
        disk.rename(&name, &name.replace("/s", "/")).unwrap();
    }
    let (cache, disk) = restarted(&disk);
    assert!((0..100).chain(1000..1010).all(|object| read(&cache, id(object))));
    let before = order(&cache);
    assert!(before[0].iter().all(|name| disk.open(name).is_ok()), "{before:?}");
    Life::new(1).goes_on(&cache, 1000);
    let (cache, disk) = restarted(&disk);
    check(&cache, &disk);
}

#[test]
fn a_disk_that_is_full_at_any_time_costs_copies_and_no_more() {
    for seed in 0..20 {
        let (disk, mut life) = (SimDisk::new(seed), Life::new(seed));
        let cache = cache_on(&disk);
        for _ in 0..10 {
            let limit = life.below(CAPACITY + CAPACITY / 4);
            disk.limit(limit);
            life.goes_on(&cache, 200);
            disk.limit(u64::MAX);
            life.goes_on(&cache, 100);
        }
        let (cache, disk) = restarted(&disk);
        life.goes_on(&cache, 2000);
        check(&cache, &disk);
    }
}

#[test]
fn what_passes_by_block_by_block_is_one_visit() {
    let visits = |reads: &[Range<u64>]| {
        let mut visits = Visits::NONE;
        let chunk = 3 * CHUNK;
        reads.iter().for_each(|read| visits.note(&(chunk + read.start..chunk + read.end), 3));
        visits.count
    };
    let forward: Vec<_> = (0..CHUNK).step_by(5000).map(|start| start..start + 5000).collect();
    let backward: Vec<_> = forward.iter().rev().cloned().collect();
    assert_eq!(visits(&forward), 1);
    assert_eq!(visits(&backward), 1);
    assert_eq!(visits(&[forward.clone(), forward].concat()), 2);
    assert_eq!(visits(&[5000..9000, 5000..9000, 60_000..70_000]), 3);
    assert_eq!(visits(&[0..CHUNK, 0..CHUNK]), 2);
}

#[test]
fn threads_that_read_write_and_drop_at_once_find_what_is_right_and_leave_the_books_in_order() {
    const THREADS: u64 = 4;
    for seed in 0..4 {
        let disk = SimDisk::new(seed);
        let cache = cache_on(&disk);
        let live = |thread: u64| {
            let mut life = Life::new(seed * THREADS + thread);
            for step in 0..1500 {
                let object = id(life.below(300).min(life.below(300)));
                // Of whichever thread.
                let sst = id((1 + life.below(THREADS)) * 10_000 + life.below(step + 1) / 8);
                match life.below(40) {
                    0..5 => {
                        let own = id((1 + thread) * 10_000 + step / 8);
                        if !cache.has(own, &(0..BYTES)) {
                            flush(&cache, own).unwrap();
                        }
                    }
                    5 => cache.forget(object),
                    6 => _ = cache.distrust(object, 0..BYTES),
                    7 => _ = cache.distrust(sst, 0..BYTES),
                    8 => cache.heat_up(if step % 2 == 0 { object } else { sst }, 0, 2),
                    9 => assert!(cache.heat(sst).len() <= 1),
                    10..16 => {
                        if let Lookup::Hit(bytes) = cache.look(sst, 0..BYTES, true).unwrap() {
                            assert_eq!(bytes, content(sst), "{sst}");
                        }
                    }
                    _ => _ = read(&cache, object),
                }
            }
        };
        std::thread::scope(|scope| {
            (0..THREADS).for_each(|thread| {
                drop(scope.spawn({
                    let live = &live;
                    move || live(thread)
                }))
            })
        });
        cache.make_room();
        check(&cache, &disk);
        let (cache, disk) = restarted(&disk);
        check(&cache, &disk);
        (0..300).for_each(|object| _ = read(&cache, id(object)));
    }
}
