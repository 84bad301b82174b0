//! Traces of reads over a cache of a thousand chunks, small ones, on a simulated disk: what it has of what is read.
//! `docs/decisions/0007-s3-fifo.md` has the figures; `cargo test -p engine traces -- --nocapture` prints them.

use super::*;
use crate::Epoch;
use crate::disk::SimDisk;

/// Bytes of a chunk, each an object of its own.
const BYTES: u64 = 2048;
const CHUNKS: u64 = 1000;
const CAPACITY: u64 = CHUNKS * (BYTES + HEADER_BYTES);

struct Trace {
    cache: DiskCache,
    random: u64,
    hits: u64,
    reads: u64,
    came: u64,
}

fn id(object: u64) -> SstId {
    SstId { epoch: Epoch(1), counter: object }
}

fn content(object: u64) -> Bytes {
    let pattern = object.to_le_bytes();
    pattern.iter().copied().cycle().take(BYTES as usize).collect()
}

impl Trace {
    fn new() -> Self {
        let disk = Arc::new(SimDisk::new(1));
        Self {
            cache: DiskCache::of_chunks(disk, BranchId([1; 16]), CAPACITY, BYTES),
            random: 1,
            hits: 0,
            reads: 0,
            came: 0,
        }
    }

    /// Reads `range` of an object; whether it was here.
    fn look(&mut self, object: u64, range: Range<u64>) -> bool {
        match self.cache.look(id(object), range.clone(), true).unwrap() {
            Lookup::Hit(bytes) => {
                let whole = content(object);
                assert_eq!(bytes, whole.slice(range.start as usize..range.end as usize));
                true
            }
            Lookup::Lacks(_) => {
                self.came += 1;
                self.cache.keep(id(object), 0, &content(object));
                self.cache.read_first(id(object), &range);
                self.cache.make_room();
                false
            }
        }
    }

    fn read(&mut self, object: u64) {
        self.reads += 1;
        self.hits += u64::from(self.look(object, 0..BYTES));
    }

    /// Reads that are not counted, of objects from `first` on.
    fn scan(&mut self, first: u64, objects: u64) {
        for object in first..first + objects {
            self.look(object, 0..BYTES / 2);
            self.look(object, BYTES / 2..BYTES);
        }
    }

    fn random(&mut self) -> f64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// How much of what was read was here, of a thousand, and how many bytes were written for each that came.
    fn result(&self) -> (u64, f64) {
        let came = self.came * (BYTES + HEADER_BYTES);
        (self.hits * 1000 / self.reads, self.cache.status().written as f64 / came as f64)
    }
}

/// The inverse of a distribution: the object of rank n is read in proportion to 1 / n to the power of `skew`.
struct Zipf(Vec<f64>);

impl Zipf {
    fn new(objects: u64, skew: f64) -> Self {
        let mut sum = 0.0;
        let mut sums: Vec<f64> = (1..=objects)
            .map(|rank| {
                sum += (rank as f64).powf(-skew);
                sum
            })
            .collect();
        sums.iter_mut().for_each(|part| *part /= sum);
        Self(sums)
    }

    fn pick(&self, random: f64) -> u64 {
        self.0.partition_point(|sum| *sum < random) as u64
    }
}

const ONE_OFF: u64 = 1 << 32;

fn zipf(skew: f64) -> Trace {
    let (mut trace, zipf) = (Trace::new(), Zipf::new(10_000, skew));
    for _ in 0..100_000 {
        let object = zipf.pick(trace.random());
        trace.read(object);
    }
    trace
}

/// Each 20,000 reads a scan of five times the cache goes by.
fn zipf_and_scans() -> Trace {
    let (mut trace, zipf) = (Trace::new(), Zipf::new(10_000, 0.9));
    for read in 0..100_000 {
        if read % 20_000 == 10_000 {
            trace.scan(ONE_OFF + read, 5 * CHUNKS);
        }
        let object = zipf.pick(trace.random());
        trace.read(object);
    }
    trace
}

/// Every other read is of what is never read again: two neighbouring pieces, as a short range is.
fn zipf_and_one_off_ranges() -> Trace {
    let (mut trace, zipf) = (Trace::new(), Zipf::new(10_000, 0.9));
    for read in 0..100_000 {
        trace.scan(ONE_OFF + read, 1);
        let object = zipf.pick(trace.random());
        trace.read(object);
    }
    trace
}

/// Half as much again as fits, round and round.
fn looping() -> Trace {
    let mut trace = Trace::new();
    for _ in 0..30 {
        (0..CHUNKS * 3 / 2).for_each(|object| trace.read(object));
    }
    trace
}

/// Other objects are the hot ones after each 20,000 reads.
fn shifting() -> Trace {
    let (mut trace, zipf) = (Trace::new(), Zipf::new(10_000, 0.9));
    for read in 0..100_000 {
        let object = zipf.pick(trace.random());
        trace.read((object + read / 20_000 * 3_000) % 10_000);
    }
    trace
}

/// A hot set that fits by half, read evenly, and a scan of several times the cache.
fn uniform_and_scans() -> Trace {
    let mut trace = Trace::new();
    for read in 0..60_000 {
        if read % 10_000 == 5_000 {
            trace.scan(ONE_OFF + read, 5 * CHUNKS);
        }
        let object = (trace.random() * CHUNKS as f64 * 0.8) as u64;
        trace.read(object);
    }
    trace
}

/// Wanted again and again, but more seldom than the small queue can wait: only its ghosts tell that it comes back.
fn now_and_then() -> Trace {
    let mut trace = Trace::new();
    for round in 0..5 {
        (0..CHUNKS / 4).for_each(|object| trace.read(object));
        trace.scan(ONE_OFF + round * CHUNKS, CHUNKS);
    }
    trace
}

#[test]
fn a_scan_of_cold_data_leaves_what_is_hot() {
    let mut trace = now_and_then();
    trace.scan(2 * ONE_OFF, 5 * CHUNKS);
    (trace.hits, trace.reads) = (0, 0);
    (0..CHUNKS / 4).for_each(|object| trace.read(object));
    assert_eq!(trace.hits, CHUNKS / 4, "none of it is fetched again");
}

/// Hits of a thousand reads where one FIFO with reinsertion was in its place, and where this one was when it came.
#[test]
fn more_is_here_than_under_a_fifo_with_reinsertion() {
    for (name, trace, before, then) in [
        ("zipf 0.9", zipf(0.9), 557, 615),
        ("zipf 1.1", zipf(1.1), 781, 809),
        ("zipf 0.9 and scans", zipf_and_scans(), 545, 617),
        ("zipf 0.9 and one-off ranges", zipf_and_one_off_ranges(), 383, 609),
        ("a loop of 1.5 times the cache", looping(), 0, 410),
        ("zipf 0.9, shifting", shifting(), 549, 575),
        ("0.8 of the cache evenly, and scans", uniform_and_scans(), 899, 986),
    ] {
        let (hits, written) = trace.result();
        println!("{name:36} {before:4} before, now {hits:4}; {written:.2} bytes written for each that came");
        assert!(hits + 10 > then && hits > before, "{name}: {hits}");
        assert!(written < 1.25, "{name}: {written}");
    }
}

#[test]
fn a_load_on_a_full_disk_evicts_what_merges_of_unread_data_wrote() {
    const L0: u64 = 40;
    let mut trace = now_and_then();
    let write = |cache: &DiskCache, sst: u64, cold: bool| {
        cache.write_pinned(id(sst), &content(sst)).unwrap();
        if cold {
            cache.set_cold(id(sst));
        }
        cache.unpin(id(sst));
        cache.make_room();
    };
    let (mut next, mut merged) = (3 * ONE_OFF, Vec::new());
    for _ in 0..50 {
        let flushed = next..next + L0;
        flushed.clone().for_each(|sst| write(&trace.cache, sst, false));
        assert!(
            flushed.clone().all(|sst| trace.cache.has(id(sst), &(0..BYTES))),
            "the merge reads them here"
        );
        let outputs = next + L0..next + 2 * L0;
        outputs.clone().for_each(|sst| write(&trace.cache, sst, true));
        flushed.for_each(|sst| trace.cache.forget(id(sst)));
        merged.extend(outputs);
        next += 2 * L0;
    }
    let here = merged.iter().filter(|sst| trace.cache.has(id(**sst), &(0..BYTES))).count() as u64;
    assert!(here < CHUNKS / 5, "{here} outputs are here");
    // Nothing but outputs had to go, not even what was fetched once.
    let fetched = ONE_OFF + 5 * CHUNKS - CHUNKS / 2..ONE_OFF + 5 * CHUNKS;
    assert!(fetched.clone().all(|object| trace.cache.has(id(object), &(0..BYTES))), "it went before them");
    (trace.hits, trace.reads) = (0, 0);
    (0..CHUNKS / 4).for_each(|object| trace.read(object));
    assert_eq!(trace.hits, CHUNKS / 4, "what is hot stays");
}
