//! Row locks: who holds what, and who waits for whom.
//!
//! * A key has one exclusive holder, or any number of shared ones, never both.
//! * Waiters of a key are served in the order they came; only a holder that wants more goes ahead of them. A new
//!   request never overtakes a waiter, so nobody starves.
//! * Full keys are compared: two keys never conflict because their hashes do.
//! * New waits begin one at a time, under `graph`. Releases only take edges away from the waits-for graph, so it has no
//!   cycle once `acquire` has looked: the victim is chosen inside it.
//! * Order of the mutexes: `graph`, then one shard, then an owner's `state`.
//!
//! A lock that nobody contends for costs one hash, one short critical section each for taking and giving back, and no
//! allocation: entries and the memory of their keys are used again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::{Clock, Error, Kind, Result};

/// How a row is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Others may read it under a shared lock; nobody may change it.
    Shared,
    /// Nobody else may lock it.
    Exclusive,
}

/// What a lock request found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granted {
    /// The transaction did not hold the key before.
    New,
    /// It held the key already, perhaps in a weaker mode.
    Held,
}

/// How long, and how patiently, a lock is waited for.
pub struct LockWait<'a> {
    /// After this much time the request fails with [`Kind::LockTimeout`].
    pub timeout: Duration,
    /// Asked when a wait starts and every 100 ms; `true` ends it with [`Kind::Interrupted`].
    pub interrupted: &'a dyn Fn() -> bool,
}

impl LockWait<'_> {
    /// Fails at once instead of waiting (NOWAIT, SKIP LOCKED).
    pub const NOT_AT_ALL: LockWait<'static> = LockWait { timeout: Duration::ZERO, interrupted: &|| false };
}

/// Ends a transaction's lock wait from another thread.
#[derive(Clone)]
pub struct Interrupt {
    owner: Arc<Owner>,
}

impl Interrupt {
    /// If the transaction waits for a lock now, that wait fails with [`Kind::Interrupted`] at once. Otherwise nothing
    /// happens: set what [`LockWait::interrupted`] reads first, and no wait slips through between.
    pub fn interrupt(&self) {
        let state = self.owner.state.lock();
        if *state == WaitState::Waiting {
            self.owner.interrupted.store(true, Ordering::Relaxed);
            self.owner.wake.notify_one();
        }
    }
}

/// One transaction as the lock table knows it.
pub(crate) struct Owner {
    id: u64,
    state: Mutex<WaitState>,
    interrupted: AtomicBool,
    wake: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WaitState {
    Idle,
    Waiting,
    Granted,
    Victim,
}

impl Owner {
    /// `id` is greater than 0 and nobody else's.
    pub(crate) fn new(id: u64) -> Arc<Self> {
        assert!(id > 0, "0 means that a lock has no holder");
        Arc::new(Self {
            id,
            state: Mutex::new(WaitState::Idle),
            interrupted: AtomicBool::new(false),
            wake: Condvar::new(),
        })
    }
    pub(crate) fn id(&self) -> u64 {
        self.id
    }
    pub(crate) fn interrupt_handle(self: &Arc<Self>) -> Interrupt {
        Interrupt { owner: Arc::clone(self) }
    }
    fn settle(&self, end: WaitState) {
        let mut state = self.state.lock();
        assert_eq!(*state, WaitState::Waiting, "transaction {}: a wait ends once", self.id);
        *state = end;
        self.wake.notify_one();
    }
}

/// A lock that a transaction holds: where its entry is. Entries do not move while they are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    shard: u32,
    slot: u32,
}

/// Counts since the engine was opened.
#[derive(Debug, Default)]
pub(crate) struct LockCounters {
    pub(crate) waits: AtomicU64,
    pub(crate) deadlocks: AtomicU64,
    pub(crate) timeouts: AtomicU64,
}

/// All row locks of an engine.
pub(crate) struct LockTable {
    shards: Box<[Shard]>,
    graph: Mutex<BTreeMap<u64, Wait>>,
    seed: u64,
    clock: Arc<dyn Clock>,
    /// Without threads nobody could end a wait: then what would wait fails with `LockTimeout`.
    may_wait: bool,
    pub(crate) counters: LockCounters,
}

/// A wait in progress, or one that has just ended and whose thread did not wake yet.
struct Wait {
    owner: Arc<Owner>,
    at: Held,
    weight: u64,
}

const SHARDS: usize = 256;
const NONE: u32 = u32::MAX;
const POLL: Duration = Duration::from_millis(100);

impl LockTable {
    pub(crate) fn new(seed: u64, clock: Arc<dyn Clock>, may_wait: bool) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            graph: Mutex::default(),
            seed: seed | 1,
            clock,
            may_wait,
            counters: LockCounters::default(),
        }
    }

    /// Locks `key` for `owner` and adds it to `held` if it is new there. `weight` is how much the transaction has
    /// written: of the transactions in a deadlock the lightest fails, among equals the one that came last.
    ///
    /// A request that fails leaves behind what it found: nothing, or the weaker lock that was held before.
    pub(crate) fn acquire(
        &self,
        owner: &Arc<Owner>,
        key: &[u8],
        mode: LockMode,
        weight: u64,
        wait: &LockWait<'_>,
        held: &mut Vec<Held>,
    ) -> Result<Granted> {
        let hash = hash(self.seed, key);
        let shard = shard_of(hash);
        {
            let mut table = self.shards[shard as usize].table.lock();
            let slot = table.find_or_insert(hash, key);
            if let Some(granted) = table.entries[slot as usize].try_grant(owner.id, mode) {
                if granted == Granted::New {
                    held.push(Held { shard, slot });
                }
                return Ok(granted);
            }
        }
        self.acquire_slowly(owner, hash, key, mode, weight, wait, held)
    }

    /// Gives back one lock of `owner`, found by its key. Nothing happens if it is not held.
    pub(crate) fn release(&self, owner: &Owner, key: &[u8], held: &mut Vec<Held>) {
        let hash = hash(self.seed, key);
        let shard = shard_of(hash);
        let mut table = self.shards[shard as usize].table.lock();
        let Some(slot) = table.find(hash, key) else { return };
        // The lock to give back is nearly always the one taken last.
        let Some(index) = held.iter().rposition(|h| *h == Held { shard, slot }) else { return };
        held.swap_remove(index);
        table.release(slot, owner.id);
    }

    /// Gives back every lock in `held`.
    pub(crate) fn release_all(&self, owner: &Owner, held: &mut Vec<Held>) {
        for Held { shard, slot } in held.drain(..) {
            self.shards[shard as usize].table.lock().release(slot, owner.id);
        }
    }

    /// Keys that somebody holds now.
    pub(crate) fn held(&self) -> u64 {
        self.shards.iter().map(|shard| shard.table.lock().used as u64).sum()
    }

    /// Transactions that wait now.
    pub(crate) fn waiting(&self) -> u64 {
        self.graph.lock().len() as u64
    }

    #[expect(clippy::too_many_arguments, reason = "the arguments of `acquire` and the hash of its key")]
    #[cold]
    fn acquire_slowly(
        &self,
        owner: &Arc<Owner>,
        hash: u64,
        key: &[u8],
        mode: LockMode,
        weight: u64,
        wait: &LockWait<'_>,
        held: &mut Vec<Held>,
    ) -> Result<Granted> {
        let shard = shard_of(hash);
        let mut graph = self.graph.lock();
        let (at, granted) = {
            let mut table = self.shards[shard as usize].table.lock();
            let slot = table.find_or_insert(hash, key);
            let at = Held { shard, slot };
            let entry = &mut table.entries[slot as usize];
            if let Some(granted) = entry.try_grant(owner.id, mode) {
                if granted == Granted::New {
                    held.push(at);
                }
                return Ok(granted);
            }
            if wait.timeout.is_zero() {
                return Err(timed_out(wait.timeout));
            }
            *owner.state.lock() = WaitState::Waiting;
            owner.interrupted.store(false, Ordering::Relaxed);
            let upgrade = entry.enqueue(owner, mode);
            (at, if upgrade { Granted::Held } else { Granted::New })
        };
        self.counters.waits.fetch_add(1, Ordering::Relaxed);
        graph.insert(owner.id, Wait { owner: Arc::clone(owner), at, weight });
        self.break_cycles(&graph, owner.id);
        drop(graph);
        self.wait(owner, at, wait)?;
        if granted == Granted::New {
            held.push(at);
        }
        Ok(granted)
    }

    /// Returns when the lock is granted, or the request is withdrawn.
    fn wait(&self, owner: &Owner, at: Held, wait: &LockWait<'_>) -> Result<()> {
        let deadline = self.clock.now() + wait.timeout;
        let failure = loop {
            if *owner.state.lock() != WaitState::Waiting {
                break None;
            }
            if owner.interrupted.load(Ordering::Relaxed) || (wait.interrupted)() {
                break Some(Error::new(Kind::Interrupted, "the wait for a row lock was interrupted"));
            }
            let now = self.clock.now();
            if now >= deadline || !self.may_wait {
                break Some(timed_out(wait.timeout));
            }
            let mut state = owner.state.lock();
            if *state == WaitState::Waiting && !owner.interrupted.load(Ordering::Relaxed) {
                owner.wake.wait_for(&mut state, POLL.min(deadline - now));
            }
        };
        let mut graph = self.graph.lock();
        graph.remove(&owner.id);
        if failure.is_some() {
            // The lock may have been granted just now; then the caller has it.
            let mut table = self.shards[at.shard as usize].table.lock();
            if *owner.state.lock() == WaitState::Waiting {
                table.withdraw(at.slot, owner.id);
            }
        }
        match (std::mem::replace(&mut *owner.state.lock(), WaitState::Idle), failure) {
            (WaitState::Granted, _) => Ok(()),
            (WaitState::Waiting, Some(error)) => {
                if error.kind() == Kind::LockTimeout {
                    self.counters.timeouts.fetch_add(1, Ordering::Relaxed);
                }
                Err(error)
            }
            (WaitState::Victim, _) => {
                Err(Error::new(Kind::Deadlock, "deadlock between transactions; this one had written least"))
            }
            (state, _) => {
                Err(Error::new(Kind::Bug, format!("transaction {}: lock wait ended as {state:?}", owner.id)))
            }
        }
    }

    /// Ends the wait of one transaction in each cycle through `start`.
    fn break_cycles(&self, graph: &BTreeMap<u64, Wait>, start: u64) {
        while let Some(cycle) = self.find_cycle(graph, start) {
            let victim = cycle
                .iter()
                .min_by_key(|id| (graph[id].weight, **id != start, std::cmp::Reverse(**id)))
                .expect("a cycle has members");
            let wait = &graph[victim];
            if !self.shards[wait.at.shard as usize].table.lock().withdraw(wait.at.slot, *victim) {
                continue; // Its lock was granted a moment ago: that cycle is gone.
            }
            self.counters.deadlocks.fetch_add(1, Ordering::Relaxed);
            wait.owner.settle(WaitState::Victim);
            if *victim == start {
                return;
            }
        }
    }

    /// The members of a shortest cycle of waits through `start`, if there is one.
    fn find_cycle(&self, graph: &BTreeMap<u64, Wait>, start: u64) -> Option<Vec<u64>> {
        let mut came_from = BTreeMap::new();
        let mut frontier = VecDeque::from([start]);
        let mut seen = BTreeSet::from([start]);
        let mut blockers = Vec::new();
        while let Some(id) = frontier.pop_front() {
            let Some(wait) = graph.get(&id) else { continue };
            blockers.clear();
            self.shards[wait.at.shard as usize].table.lock().blockers(wait.at.slot, id, &mut blockers);
            for &blocker in &blockers {
                if blocker == start {
                    let mut cycle = vec![id];
                    while let Some(previous) = came_from.get(cycle.last().expect("starts with one")) {
                        cycle.push(*previous);
                    }
                    return Some(cycle);
                }
                if seen.insert(blocker) {
                    came_from.insert(blocker, id);
                    frontier.push_back(blocker);
                }
            }
        }
        None
    }
}

fn timed_out(timeout: Duration) -> Error {
    Error::new(Kind::LockTimeout, format!("a row lock was not granted within {} s", timeout.as_secs_f32()))
}

/// Alone on its cache lines, so that neighbours do not slow each other.
#[derive(Default)]
#[repr(align(128))]
struct Shard {
    table: Mutex<Table>,
}

/// A chained hash table whose entries have stable numbers.
#[derive(Default)]
struct Table {
    heads: Vec<u32>,
    entries: Vec<Entry>,
    free: Vec<u32>,
    used: usize,
}

struct Entry {
    hash: u64,
    next: u32,
    mode: LockMode,
    /// 0: nobody. Others that share the lock are in `crowd`.
    holder: u64,
    key: Vec<u8>,
    crowd: Option<Box<Crowd>>,
}

/// What an entry needs only when more than one transaction wants it.
#[derive(Default)]
struct Crowd {
    sharers: Vec<u64>,
    queue: VecDeque<Waiter>,
}

struct Waiter {
    owner: Arc<Owner>,
    mode: LockMode,
    upgrade: bool,
}

impl Table {
    fn find(&self, hash: u64, key: &[u8]) -> Option<u32> {
        if self.heads.is_empty() {
            return None;
        }
        let mut slot = self.heads[self.bucket(hash)];
        while slot != NONE {
            let entry = &self.entries[slot as usize];
            if entry.hash == hash && entry.key == key {
                return Some(slot);
            }
            slot = entry.next;
        }
        None
    }

    fn find_or_insert(&mut self, hash: u64, key: &[u8]) -> u32 {
        if let Some(slot) = self.find(hash, key) {
            return slot;
        }
        if self.used >= self.heads.len() {
            self.grow();
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry::empty());
            u32::try_from(self.entries.len() - 1).expect("fewer than 2^32 locks in a shard")
        });
        let bucket = self.bucket(hash);
        let entry = &mut self.entries[slot as usize];
        entry.hash = hash;
        entry.next = self.heads[bucket];
        entry.key.extend_from_slice(key);
        self.heads[bucket] = slot;
        self.used += 1;
        slot
    }

    /// Takes `owner` off the holders of `slot` and lets in who waited for that.
    fn release(&mut self, slot: u32, owner: u64) {
        let entry = &mut self.entries[slot as usize];
        entry.remove_holder(owner);
        entry.grant_waiters();
        self.forget_if_unused(slot);
    }

    /// Takes `owner` off the queue of `slot`, if it is there, and lets in who stood behind it.
    fn withdraw(&mut self, slot: u32, owner: u64) -> bool {
        let entry = &mut self.entries[slot as usize];
        let Some(crowd) = &mut entry.crowd else { return false };
        let Some(position) = crowd.queue.iter().position(|waiter| waiter.owner.id == owner) else {
            return false;
        };
        crowd.queue.remove(position);
        entry.grant_waiters();
        self.forget_if_unused(slot);
        true
    }

    /// Whom `owner` waits for at `slot`: holders, and the waiters before it back to the next exclusive one, who in turn
    /// waits for all before it.
    fn blockers(&self, slot: u32, owner: u64, blockers: &mut Vec<u64>) {
        let entry = &self.entries[slot as usize];
        let Some(crowd) = &entry.crowd else { return };
        let Some(position) = crowd.queue.iter().position(|waiter| waiter.owner.id == owner) else { return };
        let mode = crowd.queue[position].mode;
        if conflict(mode, entry.mode) {
            let holders = std::iter::once(entry.holder).chain(crowd.sharers.iter().copied());
            blockers.extend(holders.filter(|holder| *holder != owner && *holder != 0));
        }
        for before in crowd.queue.iter().take(position).rev() {
            if conflict(mode, before.mode) {
                blockers.push(before.owner.id);
            }
            if before.mode == LockMode::Exclusive {
                break;
            }
        }
    }

    fn forget_if_unused(&mut self, slot: u32) {
        let entry = &mut self.entries[slot as usize];
        if entry.holder != 0 || entry.crowd.as_ref().is_some_and(|crowd| !crowd.queue.is_empty()) {
            return;
        }
        entry.key.clear();
        entry.key.shrink_to(KEY_BYTES_KEPT);
        entry.crowd = None;
        entry.mode = LockMode::Shared;
        let (hash, next) = (entry.hash, entry.next);
        let bucket = self.bucket(hash);
        if self.heads[bucket] == slot {
            self.heads[bucket] = next;
        } else {
            let mut before = self.heads[bucket];
            while self.entries[before as usize].next != slot {
                before = self.entries[before as usize].next;
            }
            self.entries[before as usize].next = next;
        }
        self.used -= 1;
        self.free.push(slot);
        if self.used == 0 && self.entries.len() > ENTRIES_KEPT {
            *self = Self::default();
        }
    }

    fn grow(&mut self) {
        let buckets = (self.heads.len() * 2).max(16);
        let old = std::mem::replace(&mut self.heads, vec![NONE; buckets]);
        for head in old {
            let mut slot = head;
            while slot != NONE {
                let next = self.entries[slot as usize].next;
                let bucket = self.bucket(self.entries[slot as usize].hash);
                self.entries[slot as usize].next = self.heads[bucket];
                self.heads[bucket] = slot;
                slot = next;
            }
        }
    }

    fn bucket(&self, hash: u64) -> usize {
        hash as usize & (self.heads.len() - 1)
    }
}

/// A shard that one huge transaction blew up gives its memory back once it is empty.
const ENTRIES_KEPT: usize = 1024;
/// Longer keys give their memory back when they are unlocked.
const KEY_BYTES_KEPT: usize = 64;

impl Entry {
    fn empty() -> Self {
        Self { hash: 0, next: NONE, mode: LockMode::Shared, holder: 0, key: Vec::new(), crowd: None }
    }

    /// Grants the lock if that keeps nobody waiting longer.
    fn try_grant(&mut self, owner: u64, mode: LockMode) -> Option<Granted> {
        if self.holder == 0 {
            // An entry without a holder has no waiters: they would hold it.
            self.holder = owner;
            self.mode = mode;
            return Some(Granted::New);
        }
        if self.is_holder(owner) {
            if self.mode == LockMode::Exclusive || mode == LockMode::Shared {
                return Some(Granted::Held);
            }
            if self.holders() == 1 {
                self.mode = LockMode::Exclusive;
                return Some(Granted::Held);
            }
            return None;
        }
        let nobody_waits = self.crowd.as_ref().is_none_or(|crowd| crowd.queue.is_empty());
        if nobody_waits && !conflict(mode, self.mode) {
            self.crowd.get_or_insert_default().sharers.push(owner);
            return Some(Granted::New);
        }
        None
    }

    /// Puts `owner` in the queue; says whether it holds the key already.
    fn enqueue(&mut self, owner: &Arc<Owner>, mode: LockMode) -> bool {
        let upgrade = self.is_holder(owner.id);
        let queue = &mut self.crowd.get_or_insert_default().queue;
        let upgrades = queue.iter().take_while(|waiter| waiter.upgrade).count();
        let position = if upgrade { upgrades } else { queue.len() };
        queue.insert(position, Waiter { owner: Arc::clone(owner), mode, upgrade });
        upgrade
    }

    fn grant_waiters(&mut self) {
        while let Some(waiter) = self.crowd.as_ref().and_then(|crowd| crowd.queue.front()) {
            let others = self.holders() - usize::from(waiter.upgrade);
            if others > 0 && conflict(waiter.mode, self.mode) {
                return;
            }
            let crowd = self.crowd.as_mut().expect("it has a front");
            let waiter = crowd.queue.pop_front().expect("it has a front");
            if self.holder == 0 {
                self.holder = waiter.owner.id;
                self.mode = waiter.mode;
            } else if waiter.upgrade {
                self.mode = waiter.mode;
            } else {
                crowd.sharers.push(waiter.owner.id);
            }
            waiter.owner.settle(WaitState::Granted);
        }
    }

    fn remove_holder(&mut self, owner: u64) {
        if self.holder == owner {
            self.holder = self.crowd.as_mut().and_then(|crowd| crowd.sharers.pop()).unwrap_or(0);
        } else {
            let sharers = &mut self.crowd.as_mut().expect("a second holder is in the crowd").sharers;
            let index = sharers.iter().position(|id| *id == owner).expect("only holders release");
            sharers.swap_remove(index);
        }
    }

    fn is_holder(&self, owner: u64) -> bool {
        self.holder == owner || self.crowd.as_ref().is_some_and(|crowd| crowd.sharers.contains(&owner))
    }

    fn holders(&self) -> usize {
        usize::from(self.holder != 0) + self.crowd.as_ref().map_or(0, |crowd| crowd.sharers.len())
    }
}

fn conflict(a: LockMode, b: LockMode) -> bool {
    a == LockMode::Exclusive || b == LockMode::Exclusive
}

fn shard_of(hash: u64) -> u32 {
    (hash >> 56) as u32
}

/// Multiply-and-fold over words. Seeded, so that nobody can choose keys that collide.
fn hash(seed: u64, key: &[u8]) -> u64 {
    let fold = |a: u64, b: u64| {
        let product = u128::from(a) * u128::from(b);
        (product as u64) ^ (product >> 64) as u64
    };
    let mut hash = seed ^ (key.len() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut words = key.chunks_exact(8);
    for word in &mut words {
        let word = u64::from_le_bytes(word.try_into().expect("chunks of eight"));
        hash = fold(hash ^ word, 0xa076_1d64_78bd_642f);
    }
    let mut last = [0; 8];
    let rest = words.remainder();
    last[..rest.len()].copy_from_slice(rest);
    fold(hash ^ u64::from_le_bytes(last), 0xe703_7ed1_a0b4_28db)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SystemClock;

    const AT_ONCE: LockWait<'static> = LockWait::NOT_AT_ALL;

    fn table() -> LockTable {
        LockTable::new(5, Arc::new(SystemClock::default()), true)
    }

    fn try_lock(table: &LockTable, owner: &Arc<Owner>, key: &[u8], held: &mut Vec<Held>) -> Result<Granted> {
        table.acquire(owner, key, LockMode::Exclusive, 0, &AT_ONCE, held)
    }

    #[test]
    fn different_keys_never_conflict_however_many_share_a_shard() {
        let table = table();
        let owners = [Owner::new(1), Owner::new(2)];
        let mut held = [Vec::new(), Vec::new()];
        for n in 0..20_000_u64 {
            let who = (n % 2) as usize;
            let granted = try_lock(&table, &owners[who], &n.to_be_bytes(), &mut held[who]);
            assert_eq!(granted.expect("its own key"), Granted::New);
        }
        assert_eq!(table.held(), 20_000);
        for n in 0..20_000_u64 {
            let other = ((n + 1) % 2) as usize;
            let refused = try_lock(&table, &owners[other], &n.to_be_bytes(), &mut held[other]);
            assert_eq!(refused.expect_err("held by the other").kind(), Kind::LockTimeout);
        }
        for who in 0..2 {
            table.release_all(&owners[who], &mut held[who]);
        }
        assert_eq!(table.held(), 0);
    }

    #[test]
    fn an_unlocked_key_is_free_and_the_rest_stay_locked() {
        let table = table();
        let (one, two) = (Owner::new(1), Owner::new(2));
        let (mut held_one, mut held_two) = (Vec::new(), Vec::new());
        for key in [b"a", b"b", b"c"] {
            try_lock(&table, &one, key, &mut held_one).expect("free");
        }
        table.release(&one, b"b", &mut held_one);
        table.release(&one, b"never locked", &mut held_one);
        assert_eq!(try_lock(&table, &two, b"b", &mut held_two).expect("free again"), Granted::New);
        assert!(try_lock(&table, &two, b"a", &mut held_two).is_err());
        assert!(try_lock(&table, &two, b"c", &mut held_two).is_err());
    }

    #[test]
    fn exclusive_sections_never_overlap_and_every_thread_gets_through_deadlocks_and_all() {
        let table = table();
        let inside: Vec<AtomicU64> = (0..4).map(|_| AtomicU64::new(0)).collect();
        std::thread::scope(|scope| {
            for id in 1..=6_u64 {
                let (table, inside) = (&table, &inside);
                scope.spawn(move || {
                    let owner = Owner::new(id);
                    let mut random = id;
                    let mut done = 0;
                    while done < 300 {
                        let mut held = Vec::new();
                        let mut mine = [None; 3];
                        for place in &mut mine {
                            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                            let key = (random >> 33) % 4;
                            let shared = (random >> 40) % 3 == 0;
                            let mode = if shared { LockMode::Shared } else { LockMode::Exclusive };
                            let wait = LockWait { timeout: Duration::from_secs(60), interrupted: &|| false };
                            match table.acquire(&owner, &key.to_be_bytes(), mode, done, &wait, &mut held) {
                                Ok(_) if shared => {}
                                Ok(_) => *place = Some(key as usize),
                                Err(error) => {
                                    assert_eq!(error.kind(), Kind::Deadlock);
                                    break;
                                }
                            }
                        }
                        let mut keys: Vec<usize> = mine.iter().flatten().copied().collect();
                        keys.sort_unstable();
                        keys.dedup();
                        for key in &keys {
                            assert_eq!(inside[*key].swap(id, Ordering::SeqCst), 0, "two exclusive holders");
                        }
                        for key in &keys {
                            assert_eq!(inside[*key].swap(0, Ordering::SeqCst), id, "two exclusive holders");
                        }
                        table.release_all(&owner, &mut held);
                        done += 1;
                    }
                });
            }
        });
        assert_eq!((table.held(), table.waiting()), (0, 0));
    }

    /// `cargo test --release -p engine speed_of_a_free_lock -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn speed_of_a_free_lock() {
        let table = table();
        let owner = Owner::new(1);
        let mut held = Vec::new();
        let clock = SystemClock::default();
        for batch in [1_u64, 10, 1000] {
            let start = clock.now();
            let rounds = 2_000_000 / batch;
            for round in 0..rounds {
                for n in 0..batch {
                    let mut key = [0; 20];
                    key[4..12].copy_from_slice(&(round * batch + n).wrapping_mul(0x9e37_79b9).to_be_bytes());
                    try_lock(&table, &owner, &key, &mut held).expect("free");
                }
                table.release_all(&owner, &mut held);
            }
            let each = (clock.now() - start).as_nanos() as u64 / (rounds * batch);
            println!("{batch} locks a transaction: {each} ns for each lock and unlock");
        }
    }
}
