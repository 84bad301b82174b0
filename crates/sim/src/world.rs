//! One run: machines come and go, writers take over from each other, and in the end everything must be there.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bucket::FaultyBucket;
use parking_lot::Mutex;

use crate::gate::Event;
use crate::machine::{Check, Counters, Machine, Shared};
use crate::plan::{Options, Plan};
use crate::process::{Doors, Process};
use crate::random::Random;

/// Tries to open under the plan's weather before the weather clears.
const TRIES: u64 = 4;

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What was broken, if anything.
    pub failure: Option<String>,
    /// The last lines of the story, for a failure.
    pub story: Vec<String>,
    /// The same for each run of the seed.
    pub fingerprint: u64,
    /// What happened.
    pub counters: Counters,
}

/// Runs `seed`.
pub fn simulate(seed: u64, options: Options) -> Report {
    let mut random = Random::new(seed);
    let shared = Shared::new(Plan::new(&mut random, options), options.loud);
    shared.tell(format_args!("{:?}", shared.plan));
    let run = || World::new(&shared, random).and_then(World::run);
    // A panic in the engine is a finding like any other.
    let failure = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(Ok(())) => None,
        Ok(Err(failure)) => Some(failure),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Some(format!("panic: {}", text.unwrap_or_default()))
        }
    };
    let story = if failure.is_some() { shared.story(60) } else { Vec::new() };
    let counters = *shared.counters.lock();
    Report { seed, failure, story, fingerprint: shared.fingerprint(), counters }
}

/// A second writer, and what its failed attempts sent.
type Arrival = (Check<Process>, Vec<Arc<FaultyBucket>>);

struct World {
    shared: Arc<Shared>,
    random: Random,
    /// The newest writer.
    current: Process,
    /// Older ones that go on, unaware.
    older: Vec<Process>,
    /// Machines whose process is gone and whose disk is not.
    idle: Vec<Machine>,
    /// What dead processes sent and what has not landed yet.
    letters: Vec<Arc<FaultyBucket>>,
    disk_full_for: u64,
}

impl World {
    fn new(shared: &Arc<Shared>, mut random: Random) -> Check<Self> {
        let machine = shared.new_machine(random.next());
        let mut letters = Vec::new();
        let current = start(shared, machine, &mut random, &mut letters)?;
        Ok(Self {
            shared: Arc::clone(shared),
            random,
            current,
            older: Vec::new(),
            idle: Vec::new(),
            letters,
            disk_full_for: 0,
        })
    }

    fn run(mut self) -> Check<()> {
        for _ in 0..self.shared.plan.actions {
            self.act()?;
        }
        self.finish()
    }

    fn act(&mut self) -> Check<()> {
        let plan = self.shared.plan.clone();
        let random = &mut self.random;
        if self.current.is_finished() {
            // Fenced by a claim that went nowhere, or its wal failed, or the machine stopped: start again.
            return self.restart();
        }
        if self.disk_full_for > 0 {
            self.disk_full_for -= 1;
            if self.disk_full_for == 0 {
                self.current.free_disk();
            }
        }
        if random.one_in(plan.crash_every) {
            match random.below(4) {
                0 => self.current.stop_at_a_disk_operation(random),
                1 => self.current.stop_at_a_request(random),
                _ => return self.restart(),
            }
        }
        if random.one_in(plan.takeover_every) {
            return match random.below(3) {
                0 => self.take_over(),
                _ => self.take_over_in_a_request(),
            };
        }
        if random.one_in(plan.takeover_every.saturating_mul(3)) && !self.idle.is_empty() {
            return self.wake_an_old_machine();
        }
        if random.one_in(plan.disk_full_every) {
            self.current.limit_disk(random);
            self.disk_full_for = 20;
        }
        if random.one_in(plan.sync_fails_every) {
            self.current.fail_a_sync(random);
        }
        if random.one_in(10) {
            self.a_letter_arrives();
        }
        let random = &mut self.random;
        if !self.older.is_empty() && random.one_in(3) {
            let which = random.index(self.older.len());
            self.older[which].act(random)?;
            if self.older[which].is_finished() && random.one_in(4) {
                let gone = self.older.remove(which);
                self.retire(gone);
            }
            return Ok(());
        }
        self.current.act(random)
    }

    /// The newest writer's machine stops, or only its process; perhaps its disk is lost. Then it starts again.
    fn restart(&mut self) -> Check<()> {
        let lost = self.random.one_in(4);
        let machine = self.stop_current(lost);
        let next = start(&self.shared, machine, &mut self.random, &mut self.letters)?;
        self.replace_current(next);
        Ok(())
    }

    fn stop_current(&mut self, lost: bool) -> Machine {
        let Process { gate, faulty, machine, .. } = &self.current;
        gate.cut();
        self.letters.push(Arc::clone(faulty));
        let mut machine = machine.clone();
        let power_cut = self.random.one_in(2);
        machine.disk = if power_cut { machine.disk.crash() } else { machine.disk.kill() };
        machine.disk.limit(u64::MAX);
        self.disk_full_for = 0;
        self.shared.counters.lock().crashes += 1;
        self.current.tell(format_args!("stops (power cut: {power_cut}, disk lost: {lost})"));
        if lost {
            self.shared.counters.lock().losses += 1;
            return self.shared.new_machine(self.random.next());
        }
        machine
    }

    fn replace_current(&mut self, next: Process) {
        self.current = next;
    }

    fn retire(&mut self, process: Process) {
        process.gate.cut();
        self.letters.push(Arc::clone(&process.faulty));
        let mut machine = process.machine.clone();
        machine.disk = if self.random.one_in(2) { machine.disk.crash() } else { machine.disk.kill() };
        machine.disk.limit(u64::MAX);
        self.idle.push(machine);
    }

    /// A second writer takes over while the first goes on.
    fn take_over(&mut self) -> Check<()> {
        let machine = self.shared.new_machine(self.random.next());
        self.shared.tell(format_args!("machine {} takes over", machine.id));
        self.current.free_disk();
        let next = start(&self.shared, machine, &mut self.random, &mut self.letters)?;
        self.shared.counters.lock().takeovers += 1;
        let old = std::mem::replace(&mut self.current, next);
        self.older.push(old);
        Ok(())
    }

    /// The same while the first one is stopped in the middle of a request; the second has done some work when it resumes.
    fn take_over_in_a_request(&mut self) -> Check<()> {
        let arrived: Arc<Mutex<Option<Arrival>>> = Arc::default();
        let (shared, slot) = (Arc::clone(&self.shared), Arc::clone(&arrived));
        let mut random = Random::new(self.random.next());
        let run = move || {
            let machine = shared.new_machine(random.next());
            shared.tell(format_args!("machine {} takes over in the middle of a request", machine.id));
            let mut letters = Vec::new();
            let process = start(&shared, machine, &mut random, &mut letters).and_then(|mut process| {
                for _ in 0..random.pick(&[0, 10, 80]) {
                    process.act(&mut random)?;
                }
                Ok(process)
            });
            shared.tell("the first writer resumes");
            *slot.lock() = Some((process, letters));
        };
        let before = self.random.one_in(2);
        self.current.gate.arm(1 + self.random.below(6), before, Event::Takeover(Box::new(run)));
        for _ in 0..30 {
            let result = self.current.act(&mut self.random);
            let Some((process, letters)) = arrived.lock().take() else {
                result?;
                if self.current.is_finished() {
                    break;
                }
                continue;
            };
            let mut counters = self.shared.counters.lock();
            (counters.takeovers, counters.nested) = (counters.takeovers + 1, counters.nested + 1);
            drop(counters);
            self.letters.extend(letters);
            let next = process?;
            self.current.free_disk();
            let old = std::mem::replace(&mut self.current, next);
            self.older.push(old);
            return result;
        }
        self.current.gate.disarm();
        Ok(())
    }

    /// A machine with an old wal on its disk starts: what is there is of no use any more.
    fn wake_an_old_machine(&mut self) -> Check<()> {
        let machine = self.idle.swap_remove(self.random.index(self.idle.len()));
        self.shared.tell(format_args!("machine {} wakes up", machine.id));
        let next = start(&self.shared, machine, &mut self.random, &mut self.letters)?;
        self.shared.counters.lock().takeovers += 1;
        let old = std::mem::replace(&mut self.current, next);
        self.older.push(old);
        Ok(())
    }

    /// What a dead process sent lands at last, or never will.
    fn a_letter_arrives(&mut self) {
        if self.letters.is_empty() {
            return;
        }
        let letter = self.letters.swap_remove(self.random.index(self.letters.len()));
        if self.random.one_in(3) {
            letter.drop_late();
        } else {
            self.land(&letter);
        }
    }

    fn land(&self, letter: &FaultyBucket) {
        if letter.late_writes() > 0 {
            self.shared.line.lock().letters_landed = true;
            self.shared.tell(format_args!("{} late writes land", letter.land_late()));
        }
    }

    /// The weather clears; everything is uploaded; the directory is lost; everything must still be there.
    fn finish(mut self) -> Check<()> {
        for letter in std::mem::take(&mut self.letters) {
            self.land(&letter);
        }
        if self.shared.plan.gentle {
            self.current.settle()?;
            return self.current.check_everything();
        }
        // A claim among the letters may have fenced it. Nobody competes any more, so one new start is enough.
        self.shared.tell("the end begins");
        self.shared.calm.store(true, Ordering::Relaxed);
        let machine = self.stop_current(false);
        self.current = start(&self.shared, machine, &mut self.random, &mut self.letters)?;
        for _ in 0..20 {
            let random = &mut self.random;
            self.current.in_fair_weather(|process| process.act(random))?;
        }
        self.current.settle()?;
        self.current.check_everything()?;
        let machine = self.stop_current(true);
        let committed = self.shared.line.lock().history.lock().acknowledged();
        let last = start(&self.shared, machine, &mut self.random, &mut self.letters)?;
        let found = last.history.lock().acknowledged();
        if found != committed {
            return Err(format!("{committed} commits were uploaded and {found} came back"));
        }
        Ok(())
    }
}

/// Starts a process on `machine`, through crashes and bad weather on the way.
fn start(
    shared: &Arc<Shared>,
    mut machine: Machine,
    random: &mut Random,
    letters: &mut Vec<Arc<FaultyBucket>>,
) -> Check<Process> {
    for attempt in 0.. {
        let doors = Doors::new(shared, machine.clone(), random);
        if attempt >= TRIES {
            doors.faulty.faults().set_rules(Vec::new());
        } else if !shared.calm.load(Ordering::Relaxed) && random.one_in(shared.plan.crash_every / 8) {
            match random.below(2) {
                0 => doors.gate.arm(1 + random.below(12), random.one_in(2), Event::Cut),
                _ => {
                    let at = machine.disk.operations() + random.below(12);
                    machine.disk.arm(engine::DiskFault::StopAt(at));
                }
            }
        }
        if let Some(process) = Process::open(shared, &doors, random)? {
            process.faulty.faults().set_rules(shared.plan.rules());
            return Ok(process);
        }
        doors.gate.cut();
        letters.push(doors.faulty);
        machine.disk = if random.one_in(2) { machine.disk.crash() } else { machine.disk.kill() };
        if attempt > 2 * TRIES {
            return Err(format!("machine {} can not open though nothing stands in its way", machine.id));
        }
    }
    unreachable!("the loop returns")
}
