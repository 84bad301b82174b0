//! Sorts keys and values that need not fit into memory: what a bulk load brings for one tree.
//!
//! * Memory is bounded: a full buffer is sorted and written to the local disk as a *run*, by a second thread while the caller fills
//!   another buffer. One huge value may exceed it.
//! * What comes in ascending order is not sorted; and as long as nothing was spilled, [`Sorter::drain`] hands it on without a detour.
//! * Equal keys come out in the order in which they came in.
//! * A crash leaves no file behind.

mod buffer;
mod run;
#[cfg(test)]
mod tests;

use std::cmp::Ordering;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::cache::Loan;
use crate::{Error, Kind, Result};

use buffer::{Buffer, prefix_of};
use run::{Run, RunReader};

pub(crate) use run::SpillSpace;

/// Runs that are merged at once; more are first merged to one.
const RUNS_MAX: usize = 64;
/// A buffer's places are numbers of 32 bits, and one value of 256 MiB may come on top.
const ROOM_MAX: usize = 1 << 30;

/// Takes entries in any order.
pub struct Sorter {
    space: Arc<SpillSpace>,
    /// Bytes at which a buffer is full.
    room: usize,
    buffer: Buffer,
    spare: Buffer,
    /// Oldest first, all older than the buffer.
    runs: Vec<Run>,
    /// A buffer on its way to the disk, with all runs.
    spilling: Option<JoinHandle<Spilled>>,
    threads: bool,
    memory: Loan,
    /// Bytes of the buffer that `memory` covers.
    lent: usize,
}

struct Spilled {
    buffer: Buffer,
    runs: Result<Vec<Run>>,
}

impl Sorter {
    /// `memory`, which covers nothing yet, grows with what it holds.
    pub(crate) fn new(space: Arc<SpillSpace>, memory: Loan, memory_bytes: usize, threads: bool) -> Self {
        // With a second thread two buffers are in use at the same time.
        let room = if threads { memory_bytes / 2 } else { memory_bytes };
        Self {
            space,
            room: room.min(ROOM_MAX),
            buffer: Buffer::default(),
            spare: Buffer::default(),
            runs: Vec::new(),
            spilling: None,
            threads,
            memory,
            lent: 0,
        }
    }

    /// Takes an entry.
    ///
    /// [`Kind::Full`]: the local disk has no space for another run; the message names the file. After an error the sorter is of no more use.
    pub fn push(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        if self.is_full() {
            self.spill()?;
        }
        self.buffer.push(key, value);
        if self.buffer.reserved_bytes() > self.lent {
            self.lent = self.buffer.reserved_bytes();
            self.memory.at_least(self.lent);
        }
        Ok(())
    }

    /// The next `push` would go to the disk.
    pub fn is_full(&self) -> bool {
        self.buffer.bytes() >= self.room
    }

    /// All entries so far came in strictly ascending order, and are still in memory.
    pub fn ascends(&self) -> bool {
        self.buffer.ascends() && self.runs.is_empty() && self.spilling.is_none()
    }

    /// Bytes of the entries that are in memory.
    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    /// Hands on all entries in the order in which they came, and forgets them. Only while they [`Sorter::ascends`].
    pub fn drain(&mut self, mut each: impl FnMut(&[u8], &[u8]) -> Result<()>) -> Result<()> {
        assert!(self.ascends(), "entries that do not ascend must be sorted");
        for at in 0..self.buffer.len() {
            let (key, value) = self.buffer.entry(at);
            each(key, value)?;
        }
        self.buffer.clear();
        Ok(())
    }

    /// No more entries. What is in memory is sorted there, and merged with the runs by whoever reads.
    pub fn finish(mut self) -> Result<Sorted> {
        self.await_spill()?;
        let mut buffer = std::mem::take(&mut self.buffer);
        self.spare = Buffer::default();
        buffer.sort();
        let mut sources = Vec::new();
        for run in std::mem::take(&mut self.runs) {
            sources.extend(RunReader::open(run)?.map(Source::Run));
        }
        if buffer.len() > 0 {
            sources.push(Source::Memory { buffer, at: 0 });
        }
        Ok(Sorted::new(sources, vec![self.memory]))
    }

    fn spill(&mut self) -> Result<()> {
        self.await_spill()?;
        if self.threads {
            self.memory.at_least(2 * self.lent);
        }
        let mut buffer = std::mem::replace(&mut self.buffer, std::mem::take(&mut self.spare));
        let (space, mut runs) = (Arc::clone(&self.space), std::mem::take(&mut self.runs));
        let work = move || {
            buffer.sort();
            let written = Run::write(&space, |run| {
                (0..buffer.len()).try_for_each(|at| {
                    let (key, value) = buffer.entry(at);
                    run.push(key, value)
                })
            });
            let runs = written.and_then(|run| {
                runs.push(run);
                if runs.len() < RUNS_MAX { Ok(runs) } else { merge(&space, runs).map(|run| vec![run]) }
            });
            buffer.clear();
            Spilled { buffer, runs }
        };
        if !self.threads {
            return self.take_back(work());
        }
        let thread = std::thread::Builder::new().name("cistern-sort".to_owned()).spawn(work);
        self.spilling = Some(thread.map_err(|error| {
            Error::new(Kind::Unavailable, "a thread that sorts can not be started").with_cause(error)
        })?);
        Ok(())
    }

    fn await_spill(&mut self) -> Result<()> {
        match self.spilling.take() {
            None => Ok(()),
            Some(thread) => {
                let spilled = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                self.take_back(spilled)
            }
        }
    }

    fn take_back(&mut self, spilled: Spilled) -> Result<()> {
        self.spare = spilled.buffer;
        self.runs = spilled.runs?;
        Ok(())
    }
}

fn merge(space: &SpillSpace, runs: Vec<Run>) -> Result<Run> {
    let mut sources = Vec::with_capacity(runs.len());
    for run in runs {
        sources.extend(RunReader::open(run)?.map(Source::Run));
    }
    let mut sorted = Sorted::new(sources, Vec::new());
    Run::write(space, |run| {
        while sorted.next()? {
            run.push(sorted.key(), sorted.value())?;
        }
        Ok(())
    })
}

/// Gives all entries of a [`Sorter`] in ascending order.
pub struct Sorted {
    sources: Vec<Source>,
    /// A heap of sources that are not at their end, the least entry on top.
    heads: Vec<Head>,
    started: bool,
    before: Vec<u8>,
    repeats: bool,
    /// Of the sorters that it came from.
    memory: Vec<Loan>,
}

#[derive(Clone, Copy)]
struct Head {
    prefix: u64,
    source: usize,
}

enum Source {
    Memory { buffer: Buffer, at: usize },
    Run(RunReader),
}

impl Source {
    fn entry(&self) -> (&[u8], &[u8]) {
        match self {
            Source::Memory { buffer, at } => buffer.entry(*at),
            Source::Run(run) => run.entry(),
        }
    }
    /// False: there is no further entry.
    fn advance(&mut self) -> Result<bool> {
        match self {
            Source::Memory { buffer, at } => {
                *at += 1;
                Ok(*at < buffer.len())
            }
            Source::Run(run) => run.advance(),
        }
    }
}

impl Sorted {
    /// What several sorters had, as if one had got all of it: of equal keys, those of earlier parts come first. `parts` are not begun.
    pub fn join(parts: Vec<Self>) -> Self {
        let (mut sources, mut memory) = (Vec::new(), Vec::new());
        for part in parts {
            sources.extend(part.sources);
            memory.extend(part.memory);
        }
        Self::new(sources, memory)
    }

    /// Each source stands on its first entry; of equal entries the earlier source's comes first.
    fn new(sources: Vec<Source>, memory: Vec<Loan>) -> Self {
        let heads = sources.iter().enumerate();
        let heads = heads.map(|(source, of)| Head { prefix: prefix_of(of.entry().0), source }).collect();
        let mut sorted = Self { sources, heads, started: false, before: Vec::new(), repeats: false, memory };
        for at in (0..sorted.heads.len() / 2).rev() {
            sorted.sink(at);
        }
        sorted
    }

    /// Moves to the next entry, at first to the least. False: there is none.
    #[expect(clippy::should_implement_trait, reason = "entries are lent until the next call")]
    pub fn next(&mut self) -> Result<bool> {
        if !self.started {
            self.started = true;
            return Ok(!self.heads.is_empty());
        }
        let Some(top) = self.heads.first().copied() else { return Ok(false) };
        let source = &mut self.sources[top.source];
        self.before.clear();
        self.before.extend_from_slice(source.entry().0);
        if source.advance()? {
            self.heads[0].prefix = prefix_of(source.entry().0);
        } else {
            self.heads.swap_remove(0);
        }
        self.sink(0);
        self.repeats = !self.heads.is_empty() && self.key() == self.before;
        Ok(!self.heads.is_empty())
    }

    /// Of the entry that `next` moved to.
    pub fn key(&self) -> &[u8] {
        self.entry().0
    }
    /// Of the entry that `next` moved to.
    pub fn value(&self) -> &[u8] {
        self.entry().1
    }
    /// Whether its key is that of the entry before.
    pub fn repeats(&self) -> bool {
        self.repeats
    }

    fn entry(&self) -> (&[u8], &[u8]) {
        let top = self.heads.first().expect("`next` said that there is an entry");
        self.sources[top.source].entry()
    }

    fn sink(&mut self, mut at: usize) {
        loop {
            let (left, right) = (2 * at + 1, 2 * at + 2);
            if left >= self.heads.len() {
                return;
            }
            let child = if right < self.heads.len() && self.before(right, left) { right } else { left };
            if !self.before(child, at) {
                return;
            }
            self.heads.swap(at, child);
            at = child;
        }
    }

    fn before(&self, a: usize, b: usize) -> bool {
        let (a, b) = (self.heads[a], self.heads[b]);
        let order = a.prefix.cmp(&b.prefix).then_with(|| {
            let key = |head: Head| self.sources[head.source].entry().0;
            key(a).cmp(key(b)).then(a.source.cmp(&b.source))
        });
        order == Ordering::Less
    }
}
