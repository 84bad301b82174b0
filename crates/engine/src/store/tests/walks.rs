//! Walks over a run whose bytes come from a bucket by several threads, compared with the plain list of its rows.

use std::sync::atomic::AtomicU64;

use super::*;

/// Tells the requests of threads that read ahead from those of the reader.
struct Watched {
    /// What the reader asks goes through here, what is read ahead through the other.
    own: FaultyBucket,
    ahead: FaultyBucket,
    now: Mutex<usize>,
    most: Mutex<usize>,
    own_requests: AtomicU64,
    own_bytes: AtomicU64,
    ahead_bytes: AtomicU64,
    ahead_failed: AtomicU64,
}

impl Watched {
    /// It, and the bucket that asks it.
    fn new(
        bucket: &Arc<MemoryBucket>,
        seed: u64,
        own: Vec<Rule>,
        ahead: Vec<Rule>,
    ) -> (Arc<Self>, Arc<dyn Bucket>) {
        #[expect(clippy::disallowed_methods, reason = "real threads need real time to meet")]
        let pause = Arc::new(std::thread::sleep);
        let faulty = |seed, rules| FaultyBucket::new(bucket.clone(), seed, rules).with_pause(pause.clone());
        let watched = Arc::new(Self {
            own: faulty(seed, own),
            ahead: faulty(seed + 1000, ahead),
            now: Mutex::new(0),
            most: Mutex::new(0),
            own_requests: AtomicU64::new(0),
            own_bytes: AtomicU64::new(0),
            ahead_bytes: AtomicU64::new(0),
            ahead_failed: AtomicU64::new(0),
        });
        let asked = Arc::clone(&watched);
        let get_ranges =
            Box::new(move |name: &ObjectName, ranges: &[Range<u64>]| asked.get_ranges(name, ranges));
        (watched, Arc::new(Asked { bucket: bucket.clone(), get_ranges }))
    }

    fn get_ranges(&self, name: &ObjectName, ranges: &[Range<u64>]) -> Answer<Vec<Bytes>> {
        let ahead = std::thread::current().name() == Some("cistern-ahead");
        let now = {
            let mut now = self.now.lock();
            *now += 1;
            *now
        };
        let mut most = self.most.lock();
        *most = (*most).max(now);
        drop(most);
        let answer = if ahead { &self.ahead } else { &self.own }.get_ranges(name, ranges);
        *self.now.lock() -= 1;
        let bytes = answer.iter().flatten().map(|bytes| bytes.len() as u64).sum();
        if ahead {
            self.ahead_bytes.fetch_add(bytes, Ordering::Relaxed);
            self.ahead_failed.fetch_add(answer.is_err().into(), Ordering::Relaxed);
        } else {
            self.own_requests.fetch_add(1, Ordering::Relaxed);
            self.own_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        answer
    }
}

const SSTS: u32 = 3;
const ROWS: u32 = SSTS * 12_000;

type Rows = Vec<(Vec<u8>, Vec<u8>)>;

/// Three ssts of 6 MB in the bucket, and their rows.
fn uploaded() -> (World, Rows) {
    let world = World::new(ROOMY).with_ssts(SSTS, ROWS / SSTS).uploaded();
    (world, (0..ROWS).map(|row| (key(row), value(row))).collect())
}

/// A store on an empty disk, and the run as it has not opened it yet.
fn cold(world: &World, bucket: Arc<dyn Bucket>, disk_cache_bytes: u64) -> (Arc<SstStore>, Run) {
    let store = store_on(&SimDisk::new(2), bucket, disk_cache_bytes, PLENTY_AND_THREADS);
    let closed = |meta: &Arc<SstMeta>| Arc::new(SstMeta { opened: OpenSst::default(), ..(**meta).clone() });
    (store, world.metas.iter().map(closed).collect())
}

fn latency(milliseconds: u64) -> Rule {
    let time = Duration::from_millis(milliseconds);
    Rule::new("*", Effect::Latency { p50: time, p99: time * 2 })
}

/// Without a local disk nothing that was fetched for nothing is found again: what is asked for twice shows.
#[test]
fn all_of_a_run_is_fetched_once_and_most_of_it_ahead() {
    let (world, rows) = uploaded();
    for (purpose, backwards) in
        [(Purpose::Query, false), (Purpose::Query, true), (Purpose::Compaction, false)]
    {
        let (watched, bucket) = Watched::new(&world.bucket, 1, vec![latency(1)], vec![latency(1)]);
        let (store, run) = cold(&world, bucket, 0);
        let mut iter = LevelIter::new(Arc::clone(&store), run, purpose);
        let edge = if backwards { &[0xff; 8][..] } else { &[] };
        if backwards { iter.seek_before(edge) } else { iter.seek(edge, Seqno(u64::MAX)) }.unwrap();
        for at in 0..rows.len() {
            let (key, value) = &rows[if backwards { rows.len() - 1 - at } else { at }];
            assert_eq!(iter.entry(), (&key[..], &value[..]));
            if backwards { iter.prev() } else { iter.next() }.unwrap();
        }
        assert!(!iter.valid());
        let (own, ahead) =
            (watched.own_bytes.load(Ordering::Relaxed), watched.ahead_bytes.load(Ordering::Relaxed));
        let all: u64 = world.metas.iter().map(|meta| meta.bytes).sum();
        let what =
            format!("{purpose:?} backwards {backwards}: {own} bytes by the reader, {ahead} ahead, of {all}");
        let requests = watched.own_requests.load(Ordering::Relaxed);
        println!("{what}, {requests} requests, {} at once", watched.most.lock());
        assert!(own + ahead < all + all / 10, "{what}");
        assert!(ahead > all / 4, "{what}");
        assert!(requests < 40, "{what} in {requests} requests");
        assert!(*watched.most.lock() >= 2, "windows are on their way together");
        store.settle(&SystemClock::default(), Duration::MAX);
    }
}

/// What may go wrong in a walk.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Weather {
    /// Requests take their time.
    Fair,
    /// What is read ahead often does not come.
    AheadFails,
    /// And neither does what the reader waits for, now and then.
    AllFails,
    /// What is read ahead often comes damaged.
    AheadDamaged,
}

/// A reader that may be refused, and where the list says that it stands.
struct Walk<'a> {
    iter: LevelIter,
    rows: &'a Rows,
    at: Option<u32>,
    weather: Weather,
    errors: u32,
}

impl Walk<'_> {
    /// Stands on `at` of the list now, as far as the iterator is concerned through `moved`; where that failed, a seek does it.
    fn goes_to(&mut self, at: Option<u32>, moved: impl FnOnce(&mut LevelIter) -> Result<()>) {
        let mut answer = moved(&mut self.iter);
        self.at = at;
        for _ in 0..100 {
            let Err(error) = answer else { return self.check() };
            let excused = match self.weather {
                Weather::Fair | Weather::AheadFails => false,
                Weather::AllFails => error.kind() == Kind::Unavailable,
                Weather::AheadDamaged => error.kind() == Kind::Corrupt,
            };
            assert!(excused, "{:?}: {error}", self.weather);
            self.errors += 1;
            answer = match at {
                Some(row) => self.iter.seek(&key(row), Seqno(u64::MAX)),
                None => self.iter.seek(&key(ROWS), Seqno(u64::MAX)),
            };
        }
        panic!("{:?}: it never comes to row {at:?}", self.weather);
    }

    fn check(&self) {
        let stands = self.iter.valid().then(|| self.iter.entry());
        let should = self.at.map(|row| &self.rows[row as usize]);
        let should = should.map(|(key, value)| (&key[..], &value[..]));
        assert!(stands == should, "{:?}: not on row {:?}", self.weather, self.at);
    }

    fn walk(&mut self, forward: bool, steps: u64) {
        for _ in 0..steps {
            let Some(at) = self.at else { return };
            if forward {
                self.goes_to(Some(at + 1).filter(|next| *next < ROWS), LevelIter::next);
            } else {
                self.goes_to(at.checked_sub(1), LevelIter::prev);
            }
        }
    }
}

#[test]
fn whatever_comes_ahead_late_damaged_or_never_a_walk_reads_what_the_list_says() {
    let (world, rows) = uploaded();
    let (mut ahead_failed, mut most, mut errors, mut ahead_bytes) = (0, 0, 0, 0);
    for seed in 0..24u64 {
        let mut state = seed;
        let mut below = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        let weather =
            [Weather::Fair, Weather::AheadFails, Weather::AllFails, Weather::AheadDamaged][seed as usize % 4];
        let fails = |share: f64| Rule::new("*", Effect::Reset).with_probability(share);
        let (own, ahead) = match weather {
            Weather::Fair => (vec![], vec![]),
            Weather::AheadFails => (vec![], vec![fails(0.5)]),
            Weather::AllFails => (vec![fails(0.1)], vec![fails(0.5)]),
            Weather::AheadDamaged => (vec![], vec![Rule::new("*", Effect::WrongBody).with_probability(0.5)]),
        };
        let slow = |mut rules: Vec<Rule>, milliseconds| {
            rules.insert(0, latency(milliseconds));
            rules
        };
        let (watched, bucket) = Watched::new(&world.bucket, seed, slow(own, 1), slow(ahead, 1 + below(4)));
        let disk_cache_bytes = [0, 2 << 20, ROOMY][below(3) as usize];
        let (store, run) = cold(&world, bucket, disk_cache_bytes);
        // Some blocks are in memory already, and their chunks on the disk.
        for _ in 0..below(6) {
            let from = below(u64::from(ROWS) - 300) as u32;
            for row in from..from + below(300) as u32 {
                let sst = sst::find_in_run(&run, &key(row)).expect("the row is in some sst");
                let found =
                    store.open(sst).and_then(|sst| sst.get_hashed(&key(row), sst::hash(&key(row)), Seqno(9)));
                if let Ok(found) = found {
                    assert_eq!(found.expect("the row is there").value(), value(row));
                }
            }
        }
        let merges = seed % 8 == 4;
        let purpose = if merges { Purpose::Compaction } else { Purpose::Query };
        let iter = LevelIter::new(Arc::clone(&store), run, purpose);
        let mut walk = Walk { iter, rows: &rows, at: None, weather, errors: 0 };
        for _ in 0..12 {
            let row = below(u64::from(ROWS)) as u32;
            match below(5) {
                0 => walk.goes_to(Some(row), |iter| iter.seek(&key(row), Seqno(u64::MAX))),
                1 => walk.goes_to(row.checked_sub(1), |iter| iter.seek_before(&key(row))),
                2 => walk.walk(true, below(40)),
                3 if !merges => walk.walk(false, below(8000)),
                _ => walk.walk(true, below(8000)),
            }
            // A turn.
            if below(3) == 0 && !merges {
                let forward = below(2) == 0;
                walk.walk(forward, below(100));
                walk.walk(!forward, below(3000));
            }
            if walk.at.is_none() {
                walk.goes_to(Some(row), |iter| iter.seek(&key(row), Seqno(u64::MAX)));
            }
        }
        errors += walk.errors;
        drop(walk);
        store.settle(&SystemClock::default(), Duration::MAX);
        assert_eq!(store.ahead.load(Ordering::Relaxed), 0);
        ahead_failed += watched.ahead_failed.load(Ordering::Relaxed);
        ahead_bytes += watched.ahead_bytes.load(Ordering::Relaxed);
        most = most.max(*watched.most.lock());
    }
    println!(
        "{ahead_failed} flights failed, {ahead_bytes} bytes came ahead, {errors} errors, {most} at once"
    );
    assert!(ahead_failed > 10, "{ahead_failed} flights failed");
    assert!(ahead_bytes > 20 << 20, "{ahead_bytes} bytes came ahead");
    assert!(errors > 0, "the reader was refused, too");
    assert!(most >= 2, "{most} requests at once at most");
}
