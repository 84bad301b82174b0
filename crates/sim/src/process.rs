//! A running engine with its clients, on some machine: what it does, and what it may and may not answer.
//!
//! * An error must have a cause that the simulation knows of. `Bug`, `BadRequest` and, while nobody took over, `Corrupt` never have.
//! * After an answer that says the writer is finished, no commit is acknowledged any more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bucket::FaultyBucket;
use engine::{Cursor, DiskFault, Engine, Error, Job, Kind, Loaded, LockMode, Parts, ReadAs, Seqno, TreeId};
use parking_lot::Mutex;

use crate::client::{Client, Outcome, show, show_key};
use crate::gate::{Event, Gate};
use crate::machine::{Check, Machine, Shared};
use crate::model::{History, Key};
use crate::random::Random;

/// Trees that are always there.
const FIXED_TREES: [u32; 2] = [1, 2];
const CLIENTS_MAX: usize = 4;
const LIVE_TREES_MAX: usize = 5;
const JOBS: [Job; 8] = [
    Job::PrepareWal,
    Job::UploadWal,
    Job::Freeze,
    Job::Flush,
    Job::Publish,
    Job::Compact,
    Job::SaveSpace,
    Job::CollectGarbage,
];

pub(crate) struct Process {
    shared: Arc<Shared>,
    pub(crate) name: u64,
    pub(crate) machine: Machine,
    pub(crate) gate: Arc<Gate>,
    pub(crate) faulty: Arc<FaultyBucket>,
    pub(crate) history: Arc<Mutex<History>>,
    engine: Arc<Engine>,
    clients: Vec<Client>,
    trees: Vec<u32>,
    seqno: Seqno,
    values: u64,
    /// It has answered that it can not go on, and why.
    finished: Option<Kind>,
    disk_limited: bool,
    sync_fails: bool,
}

/// The doors of a process that is about to start.
pub(crate) struct Doors {
    pub(crate) machine: Machine,
    pub(crate) gate: Arc<Gate>,
    pub(crate) faulty: Arc<FaultyBucket>,
}

impl Doors {
    pub(crate) fn new(shared: &Arc<Shared>, machine: Machine, random: &mut Random) -> Self {
        let clock = Arc::clone(&shared.clock);
        let faulty = FaultyBucket::new(Arc::clone(&shared.bucket) as _, random.next(), shared.plan.rules())
            .with_pause(Arc::new(move |pause| clock.turn(pause)))
            .with_tries(random.pick(&[1, 3]));
        let faulty = Arc::new(faulty);
        let gate = Gate::new(Arc::clone(&faulty) as _, machine.disk.clone(), shared.plan.planted);
        Self { machine, gate: Arc::new(gate), faulty }
    }

    fn stopped(&self) -> bool {
        self.machine.disk.stopped() || self.gate.is_cut()
    }
}

impl Process {
    /// Opens the engine and compares all it holds with what the line of writers promises. `None`: the bucket or the
    /// machine did not let it.
    pub(crate) fn open(shared: &Arc<Shared>, doors: &Doors, random: &mut Random) -> Check<Option<Self>> {
        let machine = doors.machine.id;
        {
            let mut line = shared.line.lock();
            line.disturbed |= line.machine != machine;
        }
        let parts = Parts {
            bucket: Arc::clone(&doors.gate) as _,
            disk: doors.machine.disk_for(shared.plan.planted),
            clock: Arc::clone(&shared.clock) as _,
            seed: random.next(),
        };
        let opened = Engine::open(parts, shared.plan.settings());
        doors.gate.disarm();
        let engine = match opened {
            Ok(engine) => engine,
            Err(error) => {
                shared.tell(format_args!("machine {machine}: open: {error}"));
                let weather = shared.plan.weather > 0.0 || doors.stopped();
                return match error.kind() {
                    Kind::Unavailable if weather => Ok(None),
                    // Somebody claimed a newer epoch while it was opening.
                    Kind::Fenced => Ok(None),
                    _ if doors.stopped() => Ok(None),
                    kind => Err(format!("machine {machine} can not open ({kind:?}): {error}")),
                };
            }
        };
        if doors.stopped() {
            return Ok(None);
        }
        let mut counters = shared.counters.lock();
        counters.opens += 1;
        let mut process = Self {
            shared: Arc::clone(shared),
            name: counters.opens,
            machine: doors.machine.clone(),
            gate: Arc::clone(&doors.gate),
            faulty: Arc::clone(&doors.faulty),
            history: Arc::default(),
            engine,
            clients: Vec::new(),
            trees: Vec::new(),
            seqno: Seqno(0),
            values: 0,
            finished: None,
            disk_limited: false,
            sync_fails: false,
        };
        drop(counters);
        match process.join_line() {
            Ok(()) => Ok(Some(process)),
            // The machine stopped while it was being read.
            Err(_) if process.stopped() => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Reads everything and finds out which commits have survived; they must be the ones that had to.
    fn join_line(&mut self) -> Check<()> {
        let shared = Arc::clone(&self.shared);
        let (past, same_machine, disturbed) = {
            let line = shared.line.lock();
            (line.history.lock().clone(), line.machine == self.machine.id, line.disturbed)
        };
        let least = if same_machine && !disturbed { past.acknowledged() } else { past.uploaded() };
        let got = self.in_fair_weather(|process| process.read_everything(&past))?;
        // Of states that look alike the earliest: a lost commit that changed nothing visible (it dropped a tree that was
        // still empty) must not count as there, or its tree ids would seem to be given out twice.
        let Some(state) = (least..=past.len()).find(|state| past.contents(*state) == got) else {
            return Err(self.explain_loss(&past, least, &got));
        };
        shared.tell(format_args!(
            "process {} on machine {}: state {state} of {least}..={} (acknowledged {}, uploaded {})",
            self.name,
            self.machine.id,
            past.len(),
            past.acknowledged(),
            past.uploaded(),
        ));
        let mut counters = shared.counters.lock();
        counters.lost += past.acknowledged().saturating_sub(state) as u64;
        counters.lucky += if same_machine { 0 } else { state.saturating_sub(past.uploaded()) as u64 };
        let mut history = past;
        // What came from the bucket alone stays there.
        let uploaded =
            if same_machine && state >= history.acknowledged() { history.uploaded() } else { state };
        history.settle(state, uploaded);
        let dropped = history.dropped(state);
        self.trees =
            FIXED_TREES.into_iter().chain(history.trees()).filter(|tree| !dropped.contains(tree)).collect();
        self.trees.sort_unstable();
        self.trees.dedup();
        self.history = Arc::new(Mutex::new(history));
        let mut line = shared.line.lock();
        line.history = Arc::clone(&self.history);
        line.machine = self.machine.id;
        line.disturbed = false;
        line.letters_landed = false;
        Ok(())
    }

    fn explain_loss(&self, past: &History, least: usize, got: &BTreeMap<Key, Vec<u8>>) -> String {
        let differing = |state: usize| {
            let want = past.contents(state);
            let keys: std::collections::BTreeSet<_> = want.keys().chain(got.keys()).collect();
            keys.into_iter().filter(|key| want.get(*key) != got.get(*key)).cloned().collect::<Vec<_>>()
        };
        let nearest = (0..=past.len()).rev().min_by_key(|state| differing(*state).len()).unwrap_or(0);
        let differences: Vec<String> = differing(nearest)
            .iter()
            .take(5)
            .map(|key| {
                let want = past.contents(nearest);
                format!("{}: {} for {}", show_key(key), show(got.get(key)), show(want.get(key)))
            })
            .collect();
        format!(
            "process {} on machine {} recovered none of the states {least}..={} (acknowledged {}, uploaded {}); nearest is \
             state {nearest} with {} differences: {}",
            self.name,
            self.machine.id,
            past.len(),
            past.acknowledged(),
            past.uploaded(),
            differing(nearest).len(),
            differences.join(", "),
        )
    }

    /// Everything in every tree that was ever written, read forward; backward it must be the same.
    fn read_everything(&self, past: &History) -> Check<BTreeMap<Key, Vec<u8>>> {
        let mut txn = self.engine.begin();
        let mut cursor = Cursor::new(&self.engine);
        let mut all = BTreeMap::new();
        let failed = |error: Error| format!("process {} can not read what it recovered: {error}", self.name);
        for tree in past.trees() {
            cursor.open(&mut txn, TreeId(tree), ReadAs::Snapshot).map_err(failed)?;
            let mut forward = Vec::new();
            let mut on = cursor.seek_first(&mut txn).map_err(failed)?;
            while on {
                forward.push((cursor.key().to_vec(), cursor.value().to_vec()));
                on = cursor.next(&mut txn).map_err(failed)?;
            }
            let mut back = forward.iter().rev();
            on = cursor.seek_last(&mut txn).map_err(failed)?;
            while on {
                if back
                    .next()
                    .is_none_or(|(key, value)| (&key[..], &value[..]) != (cursor.key(), cursor.value()))
                {
                    return Err(format!(
                        "tree {tree} is not the same read forward and backward, near {:?}",
                        cursor.key()
                    ));
                }
                on = cursor.prev(&mut txn).map_err(failed)?;
            }
            if let Some((key, _)) = back.next() {
                return Err(format!(
                    "tree {tree} is not the same read forward and backward: {key:?} is missing"
                ));
            }
            all.extend(forward.into_iter().map(|(key, value)| ((tree, key), value)));
        }
        Ok(all)
    }

    /// Compares everything with the newest state.
    pub(crate) fn check_everything(&mut self) -> Check<()> {
        let past = self.history.lock().clone();
        let got = self.in_fair_weather(|process| process.read_everything(&past))?;
        if got != past.contents(past.acknowledged()) {
            return Err(self.explain_loss(&past, past.acknowledged(), &got));
        }
        Ok(())
    }

    pub(crate) fn in_fair_weather<T>(&mut self, act: impl FnOnce(&mut Self) -> T) -> T {
        self.faulty.faults().set_rules(Vec::new());
        let result = act(self);
        self.faulty.faults().set_rules(self.shared.plan.rules());
        result
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.finished.is_some() || self.stopped()
    }

    pub(crate) fn stopped(&self) -> bool {
        self.machine.disk.stopped() || self.gate.is_cut()
    }

    pub(crate) fn is_overtaken(&self) -> bool {
        let line = self.shared.line.lock();
        !Arc::ptr_eq(&line.history, &self.history)
    }

    /// Another process has tried to open since this one did, or has succeeded.
    fn is_disturbed(&self) -> bool {
        let line = self.shared.line.lock();
        !Arc::ptr_eq(&line.history, &self.history) || line.disturbed || line.letters_landed
    }

    pub(crate) fn limit_disk(&mut self, random: &mut Random) {
        let disk = &self.machine.disk;
        disk.limit(disk.used() + random.below(40 << 10));
        self.disk_limited = true;
        self.tell("the disk is nearly full");
    }

    pub(crate) fn free_disk(&mut self) {
        self.machine.disk.limit(u64::MAX);
        if std::mem::take(&mut self.disk_limited) {
            self.tell("the disk has space again");
        }
    }

    pub(crate) fn fail_a_sync(&mut self, random: &mut Random) {
        let disk = &self.machine.disk;
        disk.arm(DiskFault::FailSyncAt(disk.operations() + random.below(6)));
        self.sync_fails = true;
        self.tell("a sync will fail");
    }

    /// Stops the machine at one of the disk operations to come.
    pub(crate) fn stop_at_a_disk_operation(&self, random: &mut Random) {
        let disk = &self.machine.disk;
        disk.arm(DiskFault::StopAt(disk.operations() + random.below(12)));
        self.tell("the machine will stop at a disk operation");
    }

    /// Stops the machine at one of the requests to come.
    pub(crate) fn stop_at_a_request(&self, random: &mut Random) {
        self.gate.arm(1 + random.below(4), random.one_in(2), Event::Cut);
        self.tell("the machine will stop at a request");
    }

    /// One thing that clients or the background do.
    pub(crate) fn act(&mut self, random: &mut Random) -> Check<()> {
        self.shared.clock.turn(Duration::from_millis(random.below(200)));
        match random.below(100) {
            0..30 => self.step(random.pick(&JOBS)),
            30..34 => self.drain(random),
            34..36 => self.check_estimate(random),
            _ => self.client_acts(random),
        }
    }

    /// Does what background threads would.
    fn drain(&mut self, random: &mut Random) -> Check<()> {
        for job in JOBS {
            let times = random.below(4);
            for _ in 0..times {
                self.step(job)?;
            }
        }
        Ok(())
    }

    /// All background work there is, in fair weather. Ends with everything in the bucket.
    pub(crate) fn settle(&mut self) -> Check<()> {
        self.in_fair_weather(|process| {
            process.free_disk();
            // A transaction holds what it may still read.
            process.clients.clear();
            process.step(Job::Freeze)?;
            for round in 0.. {
                let mut worked = false;
                for job in [
                    Job::Flush,
                    Job::UploadWal,
                    Job::Publish,
                    Job::Compact,
                    Job::SaveSpace,
                    Job::CollectGarbage,
                ] {
                    match process.engine.step(job) {
                        Ok(more) => worked |= more,
                        Err(error) => return Err(format!("{job:?} fails in fair weather: {error}")),
                    }
                }
                if !worked {
                    break;
                }
                if round > 10_000 {
                    return Err("background work never ends".to_owned());
                }
            }
            process.history.lock().mark_uploaded();
            process.tell("settled");
            process.check_nothing_is_left_over()
        })
    }

    /// At rest the bucket holds the ssts of the tree, the one that counts of everything else, and no more.
    fn check_nothing_is_left_over(&self) -> Check<()> {
        let status = self.engine.status();
        let count = |row: &str| status.get(row).ok_or(format!("the status has no {row}"));
        let in_bucket = |kind: &str| {
            let names = self.shared.bucket.contents().into_keys();
            names.filter(|name| name.as_str().contains(&format!("/{kind}/"))).collect::<Vec<_>>()
        };
        let mut counters = self.shared.counters.lock();
        counters.compactions += count("compactions")?;
        counters.ssts += count("ssts")?;
        drop(counters);
        for (kind, want) in [("sst", count("ssts")?), ("wal", count("wal_slices")?)] {
            // Slices of earlier writers go with the first flush; a late put may bring back what was deleted.
            if kind == "wal" && (count("flushes")? == 0 || self.shared.plan.weather > 0.0) {
                continue;
            }
            let found = in_bucket(kind);
            if found.len() as u64 != want {
                return Err(format!("{found:?} are in the bucket at rest, and {want} of them are in use"));
            }
        }
        if count("surplus_bytes")? > 0 {
            return Err(format!("the bucket keeps more than it should at rest: {:?}", status.rows()));
        }
        if count("edits_queued")? + count("unuploaded_bytes")? + count("wal_unuploaded_bytes")? > 0 {
            return Err(format!("something waits for the bucket at rest: {:?}", status.rows()));
        }
        Ok(())
    }

    pub(crate) fn step(&mut self, job: Job) -> Check<()> {
        let overtaken = self.is_overtaken();
        let answer = self.engine.step(job);
        let text = match &answer {
            Ok(worked) => format!("{job:?}: {worked}"),
            Err(error) => format!("{job:?}: {error}"),
        };
        self.tell(text);
        match answer {
            Ok(true) if overtaken && matches!(job, Job::UploadWal) => {
                Err(format!("process {} thinks that it uploaded wal though another one took over", self.name))
            }
            Ok(false)
                if job == Job::UploadWal && !overtaken && !self.is_overtaken() && self.finished.is_none() =>
            {
                self.history.lock().mark_uploaded();
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(error) => self.excuse(&error),
        }
    }

    fn check_estimate(&mut self, random: &mut Random) -> Check<()> {
        use std::ops::Bound::{Excluded, Included};
        let (lo, hi) = (self.some_key(random), self.some_key(random));
        // Any number is right; a panic or an error is not, whatever the bounds.
        self.engine.estimate(TreeId(lo.0), Included(&lo.1), Excluded(&hi.1));
        self.engine.status();
        Ok(())
    }

    fn client_acts(&mut self, random: &mut Random) -> Check<()> {
        if self.clients.is_empty() || (self.clients.len() < CLIENTS_MAX && random.one_in(8)) {
            self.clients.push(Client::new(&self.engine, &self.history, random));
        }
        let which = random.index(self.clients.len());
        if random.one_in(3) {
            self.clients[which].statement();
        }
        match random.below(100) {
            0..34 => self.writes(which, random),
            34..46 => {
                let key = self.some_key(random);
                let read = random.pick(&[ReadAs::Snapshot, ReadAs::Newest]);
                let outcome = self.clients[which].get(&key, read)?;
                self.judge(outcome)
            }
            46..60 => self.scans(which, random),
            60..64 => {
                self.clients[which].mark();
                Ok(())
            }
            64..68 => {
                self.clients[which].rollback_to_some_mark(random);
                Ok(())
            }
            68..70 => self.drops_a_tree(which, random),
            70..71 => self.makes_a_tree(which, random),
            71..73 => self.loads_a_tree(which, random),
            73..75 => self.locks_and_unlocks(which, random),
            75..78 => {
                self.clients[which].rollback();
                if random.one_in(2) {
                    self.clients.remove(which);
                } else {
                    self.clients[which].begin(random);
                }
                Ok(())
            }
            _ => self.commits(which, random),
        }
    }

    fn writes(&mut self, which: usize, random: &mut Random) -> Check<()> {
        let near = self.some_key(random);
        for _ in 0..1 + random.below(self.shared.plan.txn_writes) {
            let key = if random.one_in(4) { self.some_key(random) } else { self.key_in(near.0, random) };
            let value = if random.one_in(4) { None } else { Some(self.value(random)) };
            if !self.locks(which, &key, LockMode::Exclusive)? {
                return Ok(());
            }
            let outcome = self.clients[which].write(&key, value)?;
            self.judge(outcome)?;
        }
        Ok(())
    }

    /// Whether the lock was granted.
    fn locks(&mut self, which: usize, key: &Key, mode: LockMode) -> Check<bool> {
        let others: Vec<LockMode> = self
            .clients
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != which)
            .filter_map(|(_, client)| client.locks.get(key).copied())
            .collect();
        match self.clients[which].lock(key, mode, &others)? {
            None => Ok(true),
            Some(outcome) => self.judge(outcome).map(|()| false),
        }
    }

    fn locks_and_unlocks(&mut self, which: usize, random: &mut Random) -> Check<()> {
        let key = self.some_key(random);
        let new = !self.clients[which].locks.contains_key(&key);
        let mode = random.pick(&[LockMode::Shared, LockMode::Exclusive]);
        if self.locks(which, &key, mode)? && new && random.one_in(2) {
            self.clients[which].unlock(&key);
        }
        Ok(())
    }

    fn scans(&mut self, which: usize, random: &mut Random) -> Check<()> {
        let near = self.some_key(random);
        let tree = match self.clients[which].cursor_tree() {
            Some(tree) if random.one_in(2) => tree,
            _ => {
                let read = random.pick(&[ReadAs::Snapshot, ReadAs::Newest]);
                let engine = Arc::clone(&self.engine);
                let outcome = self.clients[which].open_cursor(&engine, near.0, read)?;
                self.judge(outcome)?;
                near.0
            }
        };
        let (steps, whim) = (random.pick(&[1, 5, 40]), random.pick(&[3, 1000]));
        let mut forward = random.one_in(2);
        for step in 0..steps {
            if random.one_in(whim) {
                forward = !forward;
            }
            if random.one_in(12) {
                // What the cursor stands in may be merged away and collected under it.
                self.drain(random)?;
            }
            let seek = step == 0 && random.one_in(2);
            let near = self.key_in(tree, random);
            let outcome = self.clients[which].move_cursor(forward, seek, &near.1, random)?;
            self.judge(outcome)?;
            if random.one_in(20) && self.locks(which, &near, LockMode::Exclusive)? {
                let value = if random.one_in(2) { None } else { Some(self.value(random)) };
                let outcome = self.clients[which].write(&near, value)?;
                self.judge(outcome)?;
            }
        }
        if random.one_in(2) {
            self.clients[which].close_cursor();
        }
        Ok(())
    }

    fn allocates_a_tree(&mut self) -> Check<u32> {
        let tree = self.engine.allocate_tree().0;
        if self.history.lock().trees().contains(&tree) || self.trees.contains(&tree) {
            return Err(format!("tree {tree} was allocated a second time"));
        }
        self.tell(format_args!("tree {tree} is new"));
        Ok(tree)
    }

    fn makes_a_tree(&mut self, which: usize, random: &mut Random) -> Check<()> {
        if self.trees.len() >= LIVE_TREES_MAX {
            return Ok(());
        }
        let tree = self.allocates_a_tree()?;
        self.trees.push(tree);
        let key = self.key_in(tree, random);
        if self.locks(which, &key, LockMode::Exclusive)? {
            let value = self.value(random);
            let outcome = self.clients[which].write(&key, Some(value))?;
            self.judge(outcome)?;
        }
        Ok(())
    }

    /// Fills a new tree at once, while the background goes on, and commits that with whatever the client has written.
    fn loads_a_tree(&mut self, which: usize, random: &mut Random) -> Check<()> {
        if self.trees.len() >= LIVE_TREES_MAX {
            return Ok(());
        }
        let tree = self.allocates_a_tree()?;
        let mut rows = BTreeMap::new();
        let most = random.pick(&[5, 100, 600]);
        for _ in 0..1 + random.below(most) {
            rows.insert(self.key_in(tree, random), self.value(random));
        }
        let loaded = match self.load(&rows, random) {
            Ok(Some(loaded)) => loaded,
            Ok(None) => return Ok(()),
            Err(error) => {
                self.tell(format_args!("load of tree {tree}: {error}"));
                return self.excuse(&error);
            }
        };
        self.tell(format_args!("tree {tree} is loaded with {} rows", rows.len()));
        let outcome = self.clients[which].add_loaded(loaded, rows);
        self.judge(outcome)?;
        match random.below(4) {
            0 => self.drain(random)?,
            1 => {
                // Given up; it may not be seen anywhere, and nothing of it may stay.
                self.clients[which].rollback();
                self.clients[which].begin(random);
                return Ok(());
            }
            _ => (),
        }
        // Others may use it once it is committed.
        let committed = self.history.lock().acknowledged();
        let result = self.commits(which, random);
        if self.history.lock().acknowledged() > committed {
            self.trees.push(tree);
            self.shared.counters.lock().loads += 1;
        }
        result
    }

    fn load(&mut self, rows: &BTreeMap<Key, Vec<u8>>, random: &mut Random) -> engine::Result<Option<Loaded>> {
        let tree = TreeId(rows.first_key_value().expect("there are rows").0.0);
        let mut load = self.engine.load(tree)?;
        for ((_, key), value) in rows {
            load.put(key, value)?;
            if random.one_in(100) {
                let job = random.pick(&JOBS);
                let answer = self.engine.step(job);
                self.tell(format_args!("{job:?} while tree {} is loaded: {answer:?}", tree.0));
                answer?;
            }
        }
        if random.one_in(8) { Ok(None) } else { load.finish().map(Some) }
    }

    fn drops_a_tree(&mut self, which: usize, random: &mut Random) -> Check<()> {
        let unused =
            |tree: &u32| !FIXED_TREES.contains(tree) && !self.clients.iter().any(|c| c.trees.contains(tree));
        let candidates: Vec<u32> = self.trees.iter().copied().filter(unused).collect();
        if candidates.is_empty() {
            return Ok(());
        }
        let tree = random.pick(&candidates);
        // The drop of an empty tree leaves no trace that would tell whether it happened; another write does.
        let key = self.key_in(FIXED_TREES[0], random);
        if !self.locks(which, &key, LockMode::Exclusive)? {
            return Ok(());
        }
        let value = self.value(random);
        let outcome = self.clients[which].write(&key, Some(value))?;
        self.judge(outcome)?;
        // Nobody may use it from here on; a rollback gives it back.
        self.trees.retain(|live| *live != tree);
        self.clients[which].drop_tree(tree);
        self.tell(format_args!("tree {tree} is to be dropped"));
        self.commits(which, random)
    }

    fn commits(&mut self, which: usize, random: &mut Random) -> Check<()> {
        let drops = self.clients[which].drops().to_vec();
        let empty = self.clients[which].is_empty();
        let answer = self.clients[which].commit();
        let acknowledged = self.history.lock().acknowledged();
        match answer {
            Ok(_) if empty => (),
            Ok(seqno) => {
                if let Some(kind) = self.finished {
                    return Err(format!("process {} acknowledges a commit after it was {kind:?}", self.name));
                }
                if seqno <= self.seqno {
                    return Err(format!("commit {seqno:?} comes after {:?}", self.seqno));
                }
                self.seqno = seqno;
                self.history.lock().acknowledge();
                self.shared.counters.lock().commits += 1;
                let trees = self.history.lock().newest_trees();
                self.tell(format_args!("commit {} as {seqno:?} in trees {trees:?}", acknowledged + 1));
                self.check_dropped(&drops)?;
            }
            Err(error) => {
                self.tell(format_args!("commit {}: {error}", acknowledged + 1));
                let was_finished = self.finished.is_some();
                self.excuse(&error)?;
                let in_doubt = self.stopped() || (self.is_finished() && !was_finished);
                if !empty && !in_doubt {
                    self.history.lock().take_back();
                    self.trees.extend(&drops);
                }
            }
        }
        if random.one_in(2) {
            self.clients.remove(which);
        } else {
            self.clients[which].begin(random);
        }
        Ok(())
    }

    fn check_dropped(&self, drops: &[u32]) -> Check<()> {
        for tree in drops {
            let mut txn = self.engine.begin();
            let mut cursor = Cursor::new(&self.engine);
            let answer = cursor
                .open(&mut txn, TreeId(*tree), ReadAs::Newest)
                .and_then(|()| cursor.seek_first(&mut txn));
            if let Ok(true) = answer {
                return Err(format!("tree {tree} is dropped and still has {:?}", cursor.key()));
            }
        }
        Ok(())
    }

    fn judge(&mut self, outcome: Outcome) -> Check<()> {
        match outcome {
            Outcome::Fine => Ok(()),
            Outcome::Error(error) => self.excuse(&error),
        }
    }

    /// Whether an error has a cause that the simulation knows of.
    fn excuse(&mut self, error: &Error) -> Check<()> {
        let kind = error.kind();
        if self.stopped() {
            return Ok(());
        }
        let excused = match kind {
            Kind::Unavailable => {
                self.shared.plan.weather > 0.0
                    || self.disk_limited
                    || self.sync_fails
                    || self.finished.is_some()
            }
            Kind::Full => self.disk_limited || self.shared.plan.unuploaded_bytes_max < 1 << 30,
            Kind::Fenced => self.is_disturbed(),
            // What a failed commit wrote stays in the way of those that come after it.
            Kind::Conflict => self.finished.is_some(),
            Kind::Failed => self.sync_fails || self.disk_limited || self.finished.is_some(),
            // The newer writer deletes what its manifest does not name any more.
            Kind::Corrupt => self.is_overtaken(),
            _ => false,
        };
        if !excused {
            return Err(format!("process {} answers {kind:?} without a cause: {error}", self.name));
        }
        if matches!(kind, Kind::Fenced | Kind::Failed) && self.finished.is_none() {
            self.finished = Some(kind);
            if kind == Kind::Fenced {
                self.shared.counters.lock().fenced += 1;
            }
        }
        Ok(())
    }

    fn some_key(&self, random: &mut Random) -> Key {
        let tree = random.pick(&self.trees);
        self.key_in(tree, random)
    }

    fn key_in(&self, tree: u32, random: &mut Random) -> Key {
        let number = random.below(self.shared.plan.keys);
        let key = match (tree % 3, number) {
            (_, 0) => Vec::new(),
            (0, _) => format!("a long prefix that all keys share/{number:05}").into_bytes(),
            (1, _) => number.to_be_bytes()[6..].to_vec(),
            // Keys that are prefixes of each other.
            _ => vec![b'k'; 1 + (number % 40) as usize]
                .into_iter()
                .chain(number.to_string().into_bytes())
                .collect(),
        };
        (tree, key)
    }

    fn value(&mut self, random: &mut Random) -> Vec<u8> {
        self.values += 1;
        let mut value = format!("{}.{}", self.name, self.values).into_bytes();
        let bytes = if random.one_in(300) { 60_000 } else { self.shared.plan.value_bytes };
        let len = random.below(bytes) as usize;
        let fill = random.next().to_le_bytes();
        // Half of the values compress, half do not.
        match random.one_in(2) {
            true => value.resize(value.len().max(len), fill[0]),
            false => {
                while value.len() < len {
                    value.extend(random.next().to_le_bytes());
                }
            }
        }
        value
    }

    pub(crate) fn tell(&self, what: impl std::fmt::Display) {
        self.shared.tell(format_args!("process {}: {what}", self.name));
    }
}
