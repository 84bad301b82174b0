//! Random worlds: machines that crash, lose disks, are overtaken and come back as zombies, over a bucket that loses answers and carries out
//! requests late. A ledger outside of them knows what was promised.

use std::time::Duration;

use bucket::Operation;
use parking_lot::Mutex;

use super::*;

/// What a faulty store may do to one writer.
fn faults(chance: &mut Chance) -> Vec<Rule> {
    let mut rule = |operation, when, effect, most: u64| {
        let probability = (chance.next() % (most + 1)) as f64 / 100.0;
        Rule { operation, ..Rule::new("*", effect).when(when).with_probability(probability) }
    };
    vec![
        rule(None, When::Before, Effect::Status { code: 503, burst: 1 }, 6),
        rule(Some(Operation::Put), When::After, Effect::Reset, 12),
        rule(Some(Operation::Put), When::Late(7), Effect::Reset, 8),
        rule(Some(Operation::Put), When::Late(1_000_000), Effect::Reset, 8),
        rule(Some(Operation::Delete), When::Late(9), Effect::Reset, 10),
        rule(Some(Operation::List), When::Before, Effect::ListTwice, 20),
    ]
}

/// A data directory and the process that runs on it, if one does.
struct Machine {
    disk: SimDiskHandle,
    writer: Option<Writer>,
    /// What was acknowledged in each epoch that this disk may continue: all that its writer knew.
    promised: Option<(Epoch, BTreeSet<u64>)>,
}

struct World {
    seed: u64,
    chance: Chance,
    inner: Arc<dyn Bucket>,
    machines: Vec<Machine>,
    faulty: Vec<Arc<FaultyBucket>>,
    number: u64,
    /// Promised to survive whatever happens to machines.
    safe: BTreeSet<u64>,
    /// Not in the history that a later writer started from.
    dead: BTreeSet<u64>,
    newest: Epoch,
    starts: u64,
    fenced: u64,
    set_aside: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let (_, inner) = memory();
        let machine = |n| Machine { disk: SimDiskHandle::new(seed * 3 + n), writer: None, promised: None };
        Self {
            seed,
            chance: Chance(seed),
            inner,
            machines: vec![machine(0), machine(1)],
            faulty: Vec::new(),
            number: 0,
            safe: BTreeSet::new(),
            dead: BTreeSet::new(),
            newest: Epoch(0),
            starts: 0,
            fenced: 0,
            set_aside: 0,
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.chance.next() % bound
    }

    fn step(&mut self) {
        let index = self.below(2) as usize;
        match self.below(40) {
            0 => self.end(index, SimDiskHandle::crash),
            1 => self.end(index, SimDiskHandle::kill),
            2 if self.below(4) == 0 => {
                let seed = self.chance.next();
                self.end(index, |_| SimDiskHandle::new(seed));
                self.machines[index].promised = None;
            }
            3 => {
                self.machines[index].disk.arm(DiskFault::StopAt(self.machines[index].disk.operations() + 20))
            }
            4 if self.below(4) == 0 => {
                let disk = &self.machines[index].disk;
                disk.arm(DiskFault::FailSyncAt(disk.operations()));
            }
            5 | 6 if !self.faulty.is_empty() => {
                let which = self.below(self.faulty.len() as u64) as usize;
                self.faulty[which].land_late();
            }
            7 => self.machines[index].disk.limit(self.machines[index].disk.used() + 600),
            8 => self.machines[index].disk.limit(u64::MAX),
            _ if self.machines[index].writer.is_some() => self.act(index),
            _ => self.start(index),
        }
        for index in 0..2 {
            if self.machines[index].disk.stopped() {
                self.end(index, SimDiskHandle::crash);
            }
        }
    }

    fn end(&mut self, index: usize, how: impl FnOnce(&SimDiskHandle) -> SimDiskHandle) {
        let machine = &mut self.machines[index];
        machine.writer = None;
        machine.disk = how(&machine.disk);
    }

    fn start(&mut self, index: usize) {
        // Mostly one machine runs; sometimes the other one takes over from a living one.
        if self.machines[1 - index].writer.is_some() && self.below(6) != 0 {
            return;
        }
        let (bucket, meanwhile) = self.busy_bucket(index);
        let before = self.claims();
        let opened = Writer::open(&self.machines[index].disk, &bucket, self.chance.next());
        self.take_back(index, &meanwhile);
        let seed = self.seed;
        match opened {
            Ok(writer) => self.started(index, writer),
            Err(error) => {
                let expected = matches!(error.kind(), Kind::Unavailable | Kind::Full | Kind::Failed)
                    || (error.kind() == Kind::Fenced && self.claims() > before);
                assert!(expected, "seed {seed}: {error}");
                assert!(!error.to_string().contains("all the time"), "seed {seed}: {error}");
            }
        }
    }

    /// A faulty bucket for a start, while the world goes on: between its requests the other machine's writer acts, and
    /// writes of dead writers land.
    fn busy_bucket(&mut self, index: usize) -> (Arc<dyn Bucket>, Arc<Mutex<Meanwhile>>) {
        let mut rules = faults(&mut self.chance);
        // Each request takes its time.
        let moment = Duration::from_nanos(1);
        rules.push(Rule::new("*", Effect::Latency { p50: moment, p99: moment }));
        let tries = 1 + self.below(2) as u32;
        let faulty = FaultyBucket::new(Arc::clone(&self.inner), self.chance.next(), rules);
        let meanwhile = Arc::new(Mutex::new(Meanwhile {
            writer: self.machines[1 - index].writer.take(),
            chance: Chance(self.chance.next()),
            faulty: self.faulty.clone(),
            number: self.number,
            safe: Vec::new(),
            promised: Vec::new(),
            failure: None,
        }));
        let shared = Arc::clone(&meanwhile);
        let pause = Arc::new(move |_| shared.lock().go_on());
        let faulty = Arc::new(faulty.with_tries(tries).with_pause(pause));
        self.faulty.push(Arc::clone(&faulty));
        (faulty, meanwhile)
    }

    fn take_back(&mut self, index: usize, meanwhile: &Mutex<Meanwhile>) {
        let mut meanwhile = meanwhile.lock();
        self.number = meanwhile.number;
        self.safe.extend(meanwhile.safe.drain(..));
        let machine = &mut self.machines[1 - index];
        machine.writer = meanwhile.writer.take();
        if let Some((_, promised)) = &mut machine.promised {
            promised.extend(meanwhile.promised.drain(..));
        }
        match meanwhile.failure.take() {
            Some(Kind::Fenced) => {
                self.fenced += 1;
                self.end(1 - index, SimDiskHandle::kill);
            }
            Some(_) => self.end(1 - index, SimDiskHandle::kill),
            None => (),
        }
    }

    fn claims(&self) -> usize {
        self.inner.list(&names().claims()).unwrap().len()
    }

    fn started(&mut self, index: usize, writer: Writer) {
        let seed = self.seed;
        self.starts += 1;
        let found = writer.numbers();
        assert!(found.windows(2).all(|pair| pair[0] < pair[1]), "seed {seed}: out of order: {found:?}");
        let found: BTreeSet<u64> = found.into_iter().collect();
        let lost: Vec<_> = self.safe.difference(&found).collect();
        assert!(lost.is_empty(), "seed {seed}: {lost:?} were in the bucket for good and are lost");
        let risen: Vec<_> = self.dead.intersection(&found).collect();
        assert!(risen.is_empty(), "seed {seed}: {risen:?} came back from the dead");

        let machine = &self.machines[index];
        if let Some((epoch, promised)) = &machine.promised {
            let lost: BTreeSet<u64> = promised.difference(&found).copied().collect();
            let foreign = self.foreign_since(*epoch, &writer);
            assert!(
                lost.is_empty() || foreign,
                "seed {seed}: {lost:?} were acknowledged on this disk and are lost"
            );
            let aside = aside(&machine.disk);
            let gone: Vec<_> = lost.iter().filter(|number| !aside.contains(number)).collect();
            assert!(
                gone.is_empty(),
                "seed {seed}: {gone:?} were acknowledged and neither recovered nor set aside"
            );
            self.set_aside += u64::from(!lost.is_empty());
        }
        self.newest = writer.recovered.epoch;
        self.dead.extend((1..=self.number).filter(|number| !found.contains(number)));
        let machine = &mut self.machines[index];
        machine.promised = Some((writer.recovered.epoch, found));
        machine.writer = Some(writer);
    }

    /// Whether another disk's writer took over after `epoch`.
    fn foreign_since(&self, epoch: Epoch, writer: &Writer) -> bool {
        let node =
            |epoch: Epoch| self.inner.get(&names().claim(epoch.0)).map(|body| body[20..36].to_vec()).ok();
        let own = node(writer.recovered.epoch);
        writer
            .recovered
            .manifest
            .manifest()
            .wals
            .iter()
            .any(|span| span.epoch > epoch && node(span.epoch) != own)
    }

    fn act(&mut self, index: usize) {
        let mut writer = self.machines[index].writer.take().expect("the caller looked");
        let result = match self.below(16) {
            0..8 => {
                self.number += 1;
                let number = self.number;
                if writer.recovered.epoch < self.newest {
                    self.dead.insert(number);
                }
                writer.commit(number).map(|()| {
                    let (_, promised) = self.machines[index].promised.as_mut().expect("set when it started");
                    promised.insert(number);
                    vec![]
                })
            }
            8..11 => writer.upload(),
            11..13 => {
                let rows = 1 + self.below(5) as usize;
                writer.flush(rows)
            }
            13 => writer.merge(),
            _ => writer.trim().map(|()| vec![]),
        };
        match result {
            Ok(safe) => {
                // Only a writer that still was the newest when it looked promises anything.
                self.safe.extend(safe);
                self.machines[index].writer = Some(writer);
            }
            Err(error) => match error.kind() {
                Kind::Unavailable | Kind::Full => self.machines[index].writer = Some(writer),
                Kind::Failed => self.end(index, SimDiskHandle::kill),
                Kind::Fenced => {
                    self.fenced += 1;
                    self.end(index, SimDiskHandle::kill);
                }
                _ => panic!("seed {}: {error}", self.seed),
            },
        }
    }
}

/// What happens while a machine starts.
struct Meanwhile {
    writer: Option<Writer>,
    chance: Chance,
    faulty: Vec<Arc<FaultyBucket>>,
    number: u64,
    safe: Vec<u64>,
    promised: Vec<u64>,
    failure: Option<Kind>,
}

impl Meanwhile {
    fn go_on(&mut self) {
        if !self.faulty.is_empty() && self.chance.next().is_multiple_of(12) {
            let which = self.chance.next() as usize % self.faulty.len();
            self.faulty[which].land_late();
        }
        let Some(writer) = self.writer.as_mut().filter(|_| self.failure.is_none()) else { return };
        let result = match self.chance.next() % 12 {
            0 => {
                self.number += 1;
                writer.commit(self.number).map(|()| {
                    self.promised.push(self.number);
                    vec![]
                })
            }
            1 => writer.upload(),
            2 => writer.flush(3),
            3 => writer.merge(),
            4 => writer.trim().map(|()| vec![]),
            _ => Ok(vec![]),
        };
        match result {
            Ok(safe) => self.safe.extend(safe),
            Err(error) if matches!(error.kind(), Kind::Unavailable | Kind::Full) => (),
            Err(error) if matches!(error.kind(), Kind::Fenced | Kind::Failed) => {
                self.failure = Some(error.kind())
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// The numbers that occur in what was set aside.
fn aside(disk: &SimDiskHandle) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    let mut bytes = Vec::new();
    for name in disk.list(SET_ASIDE).unwrap_or_default() {
        let Ok(file) = disk.open(&name) else { continue };
        let mut content = vec![0; file.len().unwrap() as usize];
        file.read_at(0, &mut content).unwrap();
        // Records run across files, whose names sort as positions do.
        bytes.extend_from_slice(content.get(64..).unwrap_or_default());
    }
    let prefix = [&[1, 12, 8][..], &TREE.0.to_be_bytes()].concat();
    for at in 0..bytes.len().saturating_sub(15) {
        if bytes[at..].starts_with(&prefix) {
            found.insert(be(&bytes[at + 7..at + 15]));
        }
    }
    found
}

#[test]
fn no_promise_is_broken_whatever_machines_and_store_do() {
    let seeds = std::env::var("SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(300);
    let first = std::env::var("SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let (mut starts, mut fenced, mut set_aside, mut commits, mut safe) = (0, 0, 0, 0, 0);
    for seed in first..first + seeds {
        let mut world = World::new(seed);
        for _ in 0..400 {
            world.step();
        }
        starts += world.starts;
        fenced += world.fenced;
        set_aside += world.set_aside;
        commits += world.number;
        safe += world.safe.len();
    }
    println!("{starts} starts, {fenced} fenced, {set_aside} set aside, {commits} commits, {safe} safe");
    // A run in which nothing happens proves nothing.
    assert!(
        seeds < 100
            || (starts > 5 * seeds && fenced > seeds / 4 && set_aside > seeds / 10 && commits > 50 * seeds)
    );
}
