//! A disk in memory that does to a program what real disks do to it, and no better than they promise.
//!
//! * After a crash, each 512-byte sector written since the last sync is there, is not, or is torn, as the seed says;
//!   so is each creation, rename and removal in a directory that was not synced.
//! * Faults are armed by number of operation, so a test can stop the program at each step in turn.
//! * After `crash`, the old handles answer errors for ever, as a dead process's would.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Disk, DiskError, DiskFile, LOG_BLOCK};

const SECTOR: usize = 512;

/// What goes wrong, and when. Operations are counted over creations, renames, removals, writes, syncs and cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFault {
    /// The machine stops at the operation of this number: it takes no effect, and none after it does.
    StopAt(u64),
    /// The sync that comes at or after the operation of this number fails; what it should have kept is unknown.
    FailSyncAt(u64),
    /// Who asks for the operation of this number panics instead.
    PanicAt(u64),
}

/// A simulated disk; clones share it.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
    /// Handles of an earlier life of the machine are dead.
    life: u64,
}

struct State {
    random: Random,
    life: u64,
    operations: u64,
    stopped: bool,
    faults: Vec<DiskFault>,
    bytes_max: u64,
    nodes: BTreeMap<u64, Node>,
    node_next: u64,
    /// Names as the running program sees them, and as they would be found after a crash.
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    pending: Vec<NameChange>,
}

#[derive(Default)]
struct Node {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors written since the last sync.
    dirty: std::collections::BTreeSet<usize>,
    /// Its length or allocation changed since the last sync.
    resized: bool,
}

struct NameChange {
    what: Change,
    /// Directories that must be synced for it to last.
    directories: Vec<String>,
}

enum Change {
    Link(String, u64),
    Unlink(String),
    Rename(String, String),
}

impl SimDisk {
    /// An empty disk; `seed` decides what crashes leave behind.
    pub fn new(seed: u64) -> Self {
        let state = State {
            random: Random(seed),
            life: 0,
            operations: 0,
            stopped: false,
            faults: Vec::new(),
            bytes_max: u64::MAX,
            nodes: BTreeMap::new(),
            node_next: 0,
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            pending: Vec::new(),
        };
        Self { state: Arc::new(Mutex::new(state)), life: 0 }
    }

    /// Arms `fault`, beside those armed before.
    pub fn arm(&self, fault: DiskFault) {
        self.state.lock().faults.push(fault);
    }

    /// From now on the disk holds at most `bytes`.
    pub fn limit(&self, bytes: u64) {
        self.state.lock().bytes_max = bytes;
    }

    /// Bytes in all files.
    pub fn used(&self) -> u64 {
        self.state.lock().used()
    }

    /// Operations counted so far, for arming faults.
    pub fn operations(&self) -> u64 {
        self.state.lock().operations
    }

    /// Whether a [`DiskFault::StopAt`] was reached.
    pub fn stopped(&self) -> bool {
        self.state.lock().stopped
    }

    /// The machine loses power. What this disk held is found, as far as it lasts, in the returned one; this one and
    /// its files are dead. Faults are disarmed, the limit stays.
    pub fn crash(&self) -> SimDisk {
        let mut state = self.state.lock();
        state.crash();
        SimDisk { state: Arc::clone(&self.state), life: state.life }
    }

    /// The process ends and the machine lives on: everything written is there, synced or not.
    pub fn kill(&self) -> SimDisk {
        let mut state = self.state.lock();
        state.life += 1;
        state.stopped = false;
        state.faults.clear();
        SimDisk { state: Arc::clone(&self.state), life: state.life }
    }

    /// Changes a file behind everybody's back, as rot would: `change` gets its bytes, which become durable.
    pub fn tamper(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state.lock();
        let id = *state.names.get(name).expect("the test names an existing file");
        let node = state.nodes.get_mut(&id).expect("a name leads to a node");
        change(&mut node.bytes);
        node.durable.clone_from(&node.bytes);
    }

    fn enter(
        &self,
        operation: &'static str,
        path: &str,
    ) -> Result<parking_lot::MutexGuard<'_, State>, DiskError> {
        let state = self.state.lock();
        if state.life != self.life || state.stopped {
            return Err(refused(operation, path, "the simulated machine has stopped"));
        }
        Ok(state)
    }

    fn change(
        &self,
        operation: &'static str,
        path: &str,
    ) -> Result<parking_lot::MutexGuard<'_, State>, DiskError> {
        let mut state = self.enter(operation, path)?;
        let number = state.operations;
        if state.faults.iter().any(|fault| matches!(fault, DiskFault::StopAt(at) if *at <= number)) {
            state.stopped = true;
            return Err(refused(operation, path, "the simulated machine stops here"));
        }
        if let Some(index) = state.faults.iter().position(|fault| *fault == DiskFault::PanicAt(number)) {
            state.faults.remove(index);
            panic!("{operation} {path}: the simulated disk panics here");
        }
        state.operations += 1;
        Ok(state)
    }

    fn file(&self, name: &str, node: u64) -> Arc<dyn DiskFile> {
        Arc::new(SimFile { disk: self.clone(), name: name.to_owned(), node, is_log: false })
    }

    fn node(&self, name: &str) -> Result<u64, DiskError> {
        let absent = || DiskError { absent: true, ..refused("open", name, "No such file or directory") };
        self.enter("open", name)?.names.get(name).copied().ok_or_else(absent)
    }
}

impl Disk for SimDisk {
    fn create(&self, name: &str) -> Result<Arc<dyn DiskFile>, DiskError> {
        let mut state = self.change("create", name)?;
        if state.names.contains_key(name) {
            return Err(refused("create", name, "File exists"));
        }
        let node = state.node_next;
        state.node_next += 1;
        state.nodes.insert(node, Node::default());
        state.names.insert(name.to_owned(), node);
        state.remember(Change::Link(name.to_owned(), node), &[name]);
        Ok(self.file(name, node))
    }
    fn open(&self, name: &str) -> Result<Arc<dyn DiskFile>, DiskError> {
        Ok(self.file(name, self.node(name)?))
    }
    fn open_log(&self, name: &str) -> Result<Arc<dyn DiskFile>, DiskError> {
        let node = self.node(name)?;
        Ok(Arc::new(SimFile { disk: self.clone(), name: name.to_owned(), node, is_log: true }))
    }
    fn rename(&self, from: &str, to: &str) -> Result<(), DiskError> {
        let mut state = self.change("rename", from)?;
        let Some(node) = state.names.remove(from) else {
            return Err(DiskError { absent: true, ..refused("rename", from, "No such file or directory") });
        };
        state.names.insert(to.to_owned(), node);
        state.remember(Change::Rename(from.to_owned(), to.to_owned()), &[from, to]);
        Ok(())
    }
    fn remove(&self, name: &str) -> Result<(), DiskError> {
        let mut state = self.change("remove", name)?;
        if state.names.remove(name).is_some() {
            state.remember(Change::Unlink(name.to_owned()), &[name]);
        }
        Ok(())
    }
    fn list(&self, directory: &str) -> Result<Vec<String>, DiskError> {
        let state = self.enter("list", directory)?;
        let within = |name: &str| {
            directory.is_empty() || name.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
        };
        Ok(state.names.keys().filter(|name| within(name)).cloned().collect())
    }
    fn sync_directory(&self, directory: &str) -> Result<(), DiskError> {
        let mut state = self.change("sync directory", directory)?;
        if state.sync_fails() {
            return Err(refused("sync directory", directory, "Input/output error"));
        }
        let State { pending, durable_names, .. } = &mut *state;
        pending.retain_mut(|change| {
            change.directories.retain(|waits_for| waits_for != directory);
            if change.directories.is_empty() {
                change.what.apply(durable_names);
            }
            !change.directories.is_empty()
        });
        Ok(())
    }
}

struct SimFile {
    disk: SimDisk,
    name: String,
    node: u64,
    /// Written in whole blocks.
    is_log: bool,
}

impl DiskFile for SimFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let mut state = self.disk.change("write", &self.name)?;
        let (start, end) = (offset as usize, offset as usize + bytes.len());
        let room = state.bytes_max.saturating_sub(state.used());
        let node = state.node(self.node);
        if end.saturating_sub(node.bytes.len()) as u64 > room {
            return Err(DiskError { full: true, ..refused("write", &self.name, "No space left on device") });
        }
        if node.bytes.len() < end {
            node.bytes.resize(end, 0);
            node.resized = true;
        }
        node.bytes[start..end].copy_from_slice(bytes);
        let (mut start, mut end) = (start, end);
        if self.is_log {
            let block = LOG_BLOCK as usize;
            let whole = end.next_multiple_of(block).min(node.bytes.len());
            node.bytes[end..whole].fill(0);
            (start, end) = (start / block * block, whole);
        }
        node.dirty.extend(start / SECTOR..end.div_ceil(SECTOR));
        Ok(())
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let mut state = self.disk.enter("read", &self.name)?;
        let bytes = &state.node(self.node).bytes;
        let start = offset as usize;
        match bytes.get(start..start + buffer.len()) {
            Some(found) => buffer.copy_from_slice(found),
            None => return Err(refused("read", &self.name, "failed to fill whole buffer")),
        }
        Ok(())
    }
    fn sync(&self) -> Result<(), DiskError> {
        let mut state = self.disk.change("sync", &self.name)?;
        if state.sync_fails() {
            // As Linux does: the pages count as clean from now on, so a second sync succeeds and keeps nothing of them.
            state.node(self.node).dirty.clear();
            return Err(refused("sync", &self.name, "Input/output error"));
        }
        let node = state.node(self.node);
        if node.resized {
            node.durable.resize(node.bytes.len(), 0);
            node.resized = false;
        }
        for sector in std::mem::take(&mut node.dirty) {
            let range = sector * SECTOR..((sector + 1) * SECTOR).min(node.bytes.len());
            node.durable[range.clone()].copy_from_slice(&node.bytes[range]);
        }
        Ok(())
    }
    fn len(&self) -> Result<u64, DiskError> {
        Ok(self.disk.enter("read length of", &self.name)?.node(self.node).bytes.len() as u64)
    }
    fn set_len(&self, bytes: u64) -> Result<(), DiskError> {
        let mut state = self.disk.change("cut", &self.name)?;
        let room = state.bytes_max.saturating_sub(state.used());
        let node = state.node(self.node);
        if bytes.saturating_sub(node.bytes.len() as u64) > room {
            return Err(DiskError {
                full: true,
                ..refused("allocate", &self.name, "No space left on device")
            });
        }
        node.bytes.resize(bytes as usize, 0);
        node.dirty.retain(|sector| (sector * SECTOR) < bytes as usize);
        node.resized = true;
        Ok(())
    }
}

impl State {
    fn node(&mut self, id: u64) -> &mut Node {
        self.nodes.get_mut(&id).expect("nodes live as long as the disk")
    }

    fn used(&self) -> u64 {
        self.names.values().filter_map(|id| self.nodes.get(id)).map(|node| node.bytes.len() as u64).sum()
    }

    fn remember(&mut self, what: Change, names: &[&str]) {
        let parent = |name: &&str| name.rsplit_once('/').map_or("", |(parent, _)| parent).to_owned();
        let mut directories: Vec<_> = names.iter().map(parent).collect();
        directories.dedup();
        self.pending.push(NameChange { what, directories });
    }

    fn sync_fails(&mut self) -> bool {
        let number = self.operations;
        let armed = |fault: &DiskFault| matches!(fault, DiskFault::FailSyncAt(at) if *at < number);
        match self.faults.iter().position(armed) {
            Some(index) => {
                self.faults.remove(index);
                true
            }
            None => false,
        }
    }

    fn crash(&mut self) {
        self.life += 1;
        self.stopped = false;
        self.faults.clear();
        // Some crashes lose all that may be lost, some nothing, most a part: the extremes find different bugs.
        let kept_of_8 = match self.random.below(4) {
            0 => 0,
            1 => 8,
            _ => self.random.below(9),
        };
        for change in std::mem::take(&mut self.pending) {
            if self.random.below(8) < kept_of_8 {
                change.what.apply(&mut self.durable_names);
            }
        }
        self.names.clone_from(&self.durable_names);
        let named: std::collections::BTreeSet<u64> = self.names.values().copied().collect();
        self.nodes.retain(|id, _| named.contains(id));
        let Self { nodes, random, .. } = self;
        for node in nodes.values_mut() {
            node.crash(kept_of_8, random);
        }
    }
}

impl Node {
    fn crash(&mut self, kept_of_8: u64, random: &mut Random) {
        if self.resized && random.below(8) < kept_of_8 {
            self.durable.resize(self.bytes.len(), 0);
        }
        for sector in std::mem::take(&mut self.dirty) {
            let from = sector * SECTOR;
            let to = ((sector + 1) * SECTOR).min(self.bytes.len()).min(self.durable.len());
            if from >= to || random.below(8) >= kept_of_8 {
                continue;
            }
            // One sector in eight that reaches the disk is torn: its beginning is new, the rest is not.
            let to =
                if random.below(8) == 0 { from + random.below((to - from) as u64 + 1) as usize } else { to };
            self.durable[from..to].copy_from_slice(&self.bytes[from..to]);
        }
        self.resized = false;
        self.bytes.clone_from(&self.durable);
    }
}

impl Change {
    fn apply(self: &Change, names: &mut BTreeMap<String, u64>) {
        match self {
            Self::Link(name, node) => {
                names.insert(name.clone(), *node);
            }
            Self::Unlink(name) => {
                names.remove(name);
            }
            // Where the old name's own creation did not last, neither does the rename.
            Self::Rename(from, to) => {
                if let Some(node) = names.remove(from) {
                    names.insert(to.clone(), node);
                }
            }
        }
    }
}

fn refused(operation: &'static str, path: &str, message: &str) -> DiskError {
    DiskError { operation, path: path.to_owned(), message: message.to_owned(), full: false, absent: false }
}

/// SplitMix64: small, seeded, good enough to pick faults.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(disk: &SimDisk, name: &str) -> Option<Vec<u8>> {
        let file = disk.open(name).ok()?;
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_at(0, &mut bytes).unwrap();
        Some(bytes)
    }

    #[test]
    fn what_was_synced_survives_every_crash() {
        for seed in 0..200 {
            let disk = SimDisk::new(seed);
            let file = disk.create("wal/a").unwrap();
            file.write_at(0, &[1; 2000]).unwrap();
            file.sync().unwrap();
            disk.sync_directory("wal").unwrap();
            file.write_at(2000, &[2; 2000]).unwrap();
            let disk = disk.crash();
            let found = contents(&disk, "wal/a").expect("a synced name stays");
            assert_eq!(&found[..2000], [1; 2000], "seed {seed}");
            assert!(found[2000..].iter().all(|byte| matches!(byte, 0 | 2)), "seed {seed}");
            assert!(file.write_at(0, b"x").is_err(), "the dead process writes no more");
        }
    }

    #[test]
    fn what_was_not_synced_is_lost_torn_and_kept_by_turns() {
        let (mut lost, mut kept, mut torn, mut nameless) = (0, 0, 0, 0);
        for seed in 0..200 {
            let disk = SimDisk::new(seed);
            let file = disk.create("wal/a").unwrap();
            file.allocate(4096).unwrap();
            file.sync().unwrap();
            if seed % 2 == 0 {
                disk.sync_directory("wal").unwrap();
            }
            file.write_at(0, &[3; 4096]).unwrap();
            match contents(&disk.crash(), "wal/a").map(|b| b.iter().filter(|byte| **byte == 3).count()) {
                None => nameless += 1,
                Some(0) => lost += 1,
                Some(4096) => kept += 1,
                Some(_) => torn += 1,
            }
        }
        assert!(lost > 5 && kept > 5 && torn > 5 && nameless > 5, "{lost} {kept} {torn} {nameless}");
    }

    #[test]
    fn faults_come_when_they_were_armed() {
        let disk = SimDisk::new(1);
        disk.limit(1000);
        let file = disk.create("a").unwrap();
        assert!(file.write_at(0, &[0; 1001]).expect_err("full").full);
        file.write_at(0, &[7; 1000]).unwrap();
        disk.arm(DiskFault::FailSyncAt(disk.operations()));
        file.sync().expect_err("armed");
        file.sync().unwrap();
        disk.sync_directory("").unwrap();
        disk.arm(DiskFault::StopAt(disk.operations() + 1));
        file.write_at(0, b"y").unwrap();
        file.write_at(0, b"z").expect_err("stopped");
        assert!(disk.stopped() && disk.list("").is_err());
        let disk = disk.kill();
        assert_eq!(
            contents(&disk, "a").map(|bytes| bytes[0]),
            Some(b'y'),
            "the kernel keeps a killed process's writes"
        );
        let found = contents(&disk.crash(), "a").expect("its name was synced");
        assert!(found[512..].iter().all(|byte| *byte == 0), "a failed sync keeps nothing, nor does the next");
    }
}
