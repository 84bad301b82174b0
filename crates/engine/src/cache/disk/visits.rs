//! How hot a chunk is.

use std::ops::Range;

use super::{CHUNK, Queue};

/// How often a chunk was read. Reads that go on where the last one ended are one visit: what passes by once, block by block, is not read again.
/// Nor is what is read in turns with the block beside it, or a read of no more than a step: that is the price.
#[derive(Clone, Copy, Debug)]
pub(super) struct Visits {
    /// Since it came to its queue. In the small one the read that it was fetched for is among them.
    pub(super) count: u8,
    /// Where in the chunk the last one was, in [`Self::STEP`]s.
    from: u8,
    to: u8,
}

impl Visits {
    const STEP: u64 = 1024;
    /// Nothing goes on where this ends.
    pub(super) const NONE: Self = Self { count: 0, from: u8::MAX, to: u8::MAX };

    /// A chunk that comes to its queue with `count` reads.
    pub(super) fn counted(count: u8) -> Self {
        Self { count, ..Self::NONE }
    }

    /// Reads since the chunk came to its queue (none: it is pinned), that which brought it included: in the main queue nothing is that nobody read.
    pub(super) fn reads(&self, queue: Option<Queue>) -> u8 {
        self.count.saturating_add((queue == Some(Queue::Main)).into())
    }

    /// `reads` says so many, or more.
    pub(super) fn heat_up(&mut self, reads: u8, queue: Option<Queue>) {
        self.count = self.count.max(reads.saturating_sub((queue == Some(Queue::Main)).into()));
    }

    /// The chunk goes to the main queue.
    pub(super) fn move_on(&mut self, from: Queue) {
        self.count = faded(self.reads(Some(from)));
    }

    /// A read of `range` of an object, as far as it is in `chunk`.
    pub(super) fn note(&mut self, range: &Range<u64>, chunk: u32) {
        let last = *self;
        self.stand(range, chunk);
        if self.from != last.to && self.to != last.from {
            self.count = self.count.saturating_add(1);
        }
    }

    pub(super) fn stand(&mut self, range: &Range<u64>, chunk: u32) {
        let start = u64::from(chunk) * CHUNK;
        self.from = (range.start.max(start).saturating_sub(start) / Self::STEP) as u8;
        self.to = (range.end.min(start + CHUNK).saturating_sub(start) / Self::STEP) as u8;
    }
}

const _: () = assert!(CHUNK / Visits::STEP < u8::MAX as u64);

/// What is left of reads when the chunk moves on: without the one that brought it. Few are as good as many, or else it would be there for long
/// after the last one.
pub(super) fn faded(reads: u8) -> u8 {
    reads.saturating_sub(1).min(3) / 2
}
