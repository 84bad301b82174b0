//! Machines and the world that they share: one bucket, one clock, the line of writers that the truth follows.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bucket::MemoryBucket;
use engine::{Clock, Disk, DiskError, DiskFile, SimDisk};
use parking_lot::Mutex;

use crate::model::History;
use crate::plan::{Plan, Planted};

/// What a check that failed says. The seed does the rest.
pub(crate) type Check<T> = Result<T, String>;

/// Trace lines kept for a failure's report.
const TRACE_LINES: usize = 400;

/// What outlives every process.
pub(crate) struct Shared {
    pub(crate) plan: Plan,
    pub(crate) bucket: Arc<MemoryBucket>,
    pub(crate) clock: Arc<TurnedClock>,
    pub(crate) line: Mutex<Line>,
    pub(crate) counters: Mutex<Counters>,
    /// Machines do not stop by themselves any more.
    pub(crate) calm: AtomicBool,
    trace: Mutex<Trace>,
}

/// Who wrote last, and what the next writer must find.
pub(crate) struct Line {
    pub(crate) history: Arc<Mutex<History>>,
    /// The machine whose disk holds the newest wal.
    pub(crate) machine: u64,
    /// Other machines have tried to open since, with or without success.
    pub(crate) disturbed: bool,
    /// What dead processes had sent landed since; a claim among it fences whoever opened meanwhile.
    pub(crate) letters_landed: bool,
    machines: u64,
}

/// What happened, to see that a run was worth it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Commits acknowledged.
    pub commits: u64,
    /// Engines opened with success.
    pub opens: u64,
    /// Machines stopped, with or without power loss.
    pub crashes: u64,
    /// Local directories lost.
    pub losses: u64,
    /// Writers that took over while another went on.
    pub takeovers: u64,
    /// Of these, in the middle of one of the other's requests.
    pub nested: u64,
    /// Times a writer found out that it is fenced.
    pub fenced: u64,
    /// Commits recovered from the bucket alone that were not known to be uploaded.
    pub lucky: u64,
    /// Commits that were lost with a directory, as promised.
    pub lost: u64,
    /// Compactions of the last writers.
    pub compactions: u64,
    /// Trees that were filled at once.
    pub loads: u64,
    /// Ssts in the trees that were left at the end.
    pub ssts: u64,
}

impl std::ops::AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        self.commits += other.commits;
        self.opens += other.opens;
        self.crashes += other.crashes;
        self.losses += other.losses;
        self.takeovers += other.takeovers;
        self.nested += other.nested;
        self.fenced += other.fenced;
        self.lucky += other.lucky;
        self.lost += other.lost;
        self.compactions += other.compactions;
        self.loads += other.loads;
        self.ssts += other.ssts;
    }
}

#[derive(Default)]
struct Trace {
    lines: std::collections::VecDeque<String>,
    hash: u64,
    loud: bool,
}

impl Shared {
    pub(crate) fn new(plan: Plan, loud: bool) -> Arc<Self> {
        Arc::new(Self {
            plan,
            bucket: Arc::new(MemoryBucket::new()),
            clock: Arc::default(),
            line: Mutex::new(Line {
                history: Arc::default(),
                machine: 0,
                disturbed: false,
                letters_landed: false,
                machines: 0,
            }),
            counters: Mutex::default(),
            calm: AtomicBool::new(false),
            trace: Mutex::new(Trace { loud, ..Trace::default() }),
        })
    }

    /// Writes a line of the run's story. All lines together decide the run's fingerprint.
    pub(crate) fn tell(&self, line: impl Display) {
        let mut trace = self.trace.lock();
        let line = line.to_string();
        for byte in line.bytes() {
            trace.hash = (trace.hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        if trace.loud {
            eprintln!("{line}");
        }
        if trace.lines.len() == TRACE_LINES {
            trace.lines.pop_front();
        }
        trace.lines.push_back(line);
    }

    pub(crate) fn fingerprint(&self) -> u64 {
        self.trace.lock().hash
    }

    pub(crate) fn story(&self, lines: usize) -> Vec<String> {
        let trace = self.trace.lock();
        trace.lines.iter().skip(trace.lines.len().saturating_sub(lines)).cloned().collect()
    }

    pub(crate) fn new_machine(&self, seed: u64) -> Machine {
        let mut line = self.line.lock();
        line.machines += 1;
        Machine { id: line.machines, disk: SimDisk::new(seed) }
    }
}

/// A machine: something with a disk.
#[derive(Clone)]
pub(crate) struct Machine {
    pub(crate) id: u64,
    pub(crate) disk: SimDisk,
}

impl Machine {
    /// The disk as a process on this machine gets it.
    pub(crate) fn disk_for(&self, planted: Option<Planted>) -> Arc<dyn Disk> {
        match planted {
            Some(Planted::SkipsSync | Planted::SkipsDirectorySync) => {
                Arc::new(LyingDisk { disk: self.disk.clone(), files: planted == Some(Planted::SkipsSync) })
            }
            _ => Arc::new(self.disk.clone()),
        }
    }
}

/// Time that passes when the simulation says so, or when somebody sleeps.
#[derive(Default)]
pub(crate) struct TurnedClock(AtomicU64);

impl TurnedClock {
    pub(crate) fn turn(&self, by: Duration) {
        self.0.fetch_add(u64::try_from(by.as_nanos()).expect("waits are short"), Ordering::Relaxed);
    }
}

impl Clock for TurnedClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
    fn sleep(&self, pause: Duration) {
        self.turn(pause);
    }
}

/// A planted bug: syncs of files, or of directories, do nothing.
struct LyingDisk {
    disk: SimDisk,
    files: bool,
}

struct LyingFile {
    file: Arc<dyn DiskFile>,
}

impl LyingDisk {
    fn lie(&self, file: Arc<dyn DiskFile>) -> Arc<dyn DiskFile> {
        if self.files { Arc::new(LyingFile { file }) } else { file }
    }
}

impl Disk for LyingDisk {
    fn create(&self, name: &str) -> Result<Arc<dyn DiskFile>, DiskError> {
        Ok(self.lie(self.disk.create(name)?))
    }
    fn open(&self, name: &str) -> Result<Arc<dyn DiskFile>, DiskError> {
        Ok(self.lie(self.disk.open(name)?))
    }
    fn open_log(&self, name: &str) -> Result<Arc<dyn DiskFile>, DiskError> {
        Ok(self.lie(self.disk.open_log(name)?))
    }
    fn rename(&self, from: &str, to: &str) -> Result<(), DiskError> {
        self.disk.rename(from, to)
    }
    fn remove(&self, name: &str) -> Result<(), DiskError> {
        self.disk.remove(name)
    }
    fn list(&self, directory: &str) -> Result<Vec<String>, DiskError> {
        self.disk.list(directory)
    }
    fn sync_directory(&self, directory: &str) -> Result<(), DiskError> {
        if self.files { self.disk.sync_directory(directory) } else { Ok(()) }
    }
}

impl DiskFile for LyingFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.file.write_at(offset, bytes)
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.file.read_at(offset, buffer)
    }
    fn sync(&self) -> Result<(), DiskError> {
        Ok(())
    }
    fn len(&self) -> Result<u64, DiskError> {
        self.file.len()
    }
    fn set_len(&self, bytes: u64) -> Result<(), DiskError> {
        self.file.set_len(bytes)
    }
}
