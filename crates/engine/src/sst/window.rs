//! The piece of an sst that an iterator reads from, and the pieces on their way.
//!
//! * Reads that follow each other, in either direction, make windows that grow. The larger they are the more of them are under way at the same
//!   time, so that a long scan waits for the bucket a few times and not at every window.
//! * What is on the local disk is read when it is wanted, by whoever wants it: that costs less than another thread.
//! * All windows of an engine take no more than half of its memory; where that is short they are small and come one by one.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::reader::Purpose;
use crate::cache::{BlockCache, Loan};
use crate::store::{ByteSource, Flight, Keep};
use crate::{Error, Kind, Result};

/// Windows grow from the first to the second.
const WINDOW_BYTES_MIN: u64 = 256 * 1024;
const WINDOW_BYTES_MAX: u64 = 4 << 20;
/// What a window of encoded bytes takes in all: itself, and its pieces while they are put together.
const COPIES: usize = 2;

pub(super) struct Window {
    start: u64,
    bytes: Bytes,
    /// Where the block read last starts and ends.
    last: Option<Range<u64>>,
    /// How large a window was last; 0: the reads did not look sequential.
    ahead: u64,
    forward: bool,
    /// Each begins where the one before ends; backwards, each ends where the one before begins.
    coming: VecDeque<Coming>,
    /// For who reads all of it.
    eager: bool,
    keep: Keep,
    memory: Option<Arc<Loan>>,
}

struct Coming {
    range: Range<u64>,
    flight: Arc<Flight>,
    memory: Arc<Loan>,
}

impl Window {
    pub(super) fn new(purpose: Purpose) -> Self {
        Self {
            start: 0,
            bytes: Bytes::new(),
            last: None,
            ahead: 0,
            forward: true,
            coming: VecDeque::new(),
            eager: purpose == Purpose::Compaction,
            keep: if purpose == Purpose::Query { Keep::Yes } else { Keep::No },
            memory: None,
        }
    }

    /// For the sst that follows in a run: bytes are dropped, the pace is kept.
    pub(super) fn carry_over(&mut self, data_bytes: u64, forward: bool) {
        self.drop_bytes();
        if self.last.is_some() {
            self.last = Some(if forward { 0..0 } else { data_bytes..data_bytes });
        }
    }

    /// A block was found in the cache.
    pub(super) fn pass(&mut self, range: Range<u64>) {
        self.last = Some(range);
    }

    /// The bytes of `range`, a block of an sst whose blocks end at `data_bytes`.
    pub(super) fn read(
        &mut self,
        source: &ByteSource,
        cache: &Arc<BlockCache>,
        range: Range<u64>,
        data_bytes: u64,
    ) -> Result<Bytes> {
        let last = self.last.replace(range.clone());
        if let Some(bytes) = self.within(&range) {
            return Ok(bytes);
        }
        let forward = self.eager || last.as_ref().is_some_and(|last| last.end == range.start);
        let backward = !forward && last.is_some_and(|last| last.start == range.end);
        if !forward && !backward {
            self.ahead = 0;
            self.drop_bytes();
            return source.read(range, self.keep);
        }
        if forward != self.forward {
            self.coming.clear();
            self.forward = forward;
        }
        if let Some(bytes) = self.arrived(source, &range) {
            self.grow(cache);
            self.send_for_more(source, cache, data_bytes);
            return Ok(bytes);
        }
        self.drop_bytes();
        self.grow(cache);
        let wide = if forward {
            range.start..(range.start + self.ahead).min(data_bytes).max(range.end)
        } else {
            range.end.saturating_sub(self.ahead).min(range.start)..range.end
        };
        self.memory = Some(Arc::new(cache.lend(COPIES * (wide.end - wide.start) as usize)));
        // The others first: they are under way while this one is waited for.
        (self.start, self.bytes) = (wide.start, Bytes::new());
        self.send_for(source, cache, if forward { wide.end } else { wide.start }, data_bytes);
        self.bytes = source.read(wide, self.keep)?;
        self.within(&range)
            .ok_or_else(|| Error::new(Kind::Bug, "a window without the block it was fetched for"))
    }

    fn within(&self, range: &Range<u64>) -> Option<Bytes> {
        let from = range.start.checked_sub(self.start)? as usize;
        let to = from + (range.end - range.start) as usize;
        (to <= self.bytes.len()).then(|| self.bytes.slice(from..to))
    }

    /// Goes on to the window on its way that `range` ends in (backwards: begins in), if there is one and it comes.
    fn arrived(&mut self, source: &ByteSource, range: &Range<u64>) -> Option<Bytes> {
        loop {
            let next = self.coming.pop_front()?;
            // Blocks that were in the cache after all may have filled all of it.
            let passed =
                if self.forward { next.range.end <= range.start } else { next.range.start >= range.end };
            if passed {
                continue;
            }
            let Some(bytes) = source.wait_for(&next.flight) else {
                self.coming.clear(); // the read that is made instead tells why
                return None;
            };
            let before = (self.start, std::mem::replace(&mut self.bytes, bytes));
            self.start = next.range.start;
            self.memory = Some(next.memory);
            return self.within(range).or_else(|| self.put_together(&before.1, before.0, range));
        }
    }

    /// A block that lies across the border between the window before and this one.
    fn put_together(&self, before: &Bytes, before_start: u64, range: &Range<u64>) -> Option<Bytes> {
        let (end, before_end) = (self.start + self.bytes.len() as u64, before_start + before.len() as u64);
        let (first, first_start, second, border) = if self.forward {
            (before, before_start, &self.bytes, self.start)
        } else {
            (&self.bytes, self.start, before, before_start)
        };
        let touch = if self.forward { before_end == self.start } else { end == before_start };
        let last_end = if self.forward { end } else { before_end };
        if !touch || range.start < first_start || range.end > last_end {
            return None;
        }
        let mut block = Vec::with_capacity((range.end - range.start) as usize);
        block.extend_from_slice(&first[(range.start - first_start) as usize..]);
        block.extend_from_slice(&second[..(range.end - border) as usize]);
        Some(Bytes::from(block))
    }

    fn grow(&mut self, cache: &BlockCache) {
        let most = if self.eager { WINDOW_BYTES_MAX } else { self.ahead * 2 };
        self.ahead = most.clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX);
        while self.ahead > WINDOW_BYTES_MIN && !cache.spares(COPIES * self.ahead as usize) {
            self.ahead /= 2;
        }
    }

    fn send_for_more(&mut self, source: &ByteSource, cache: &Arc<BlockCache>, data_bytes: u64) {
        let edge = if self.forward { self.start + self.bytes.len() as u64 } else { self.start };
        self.send_for(source, cache, edge, data_bytes);
    }

    /// Starts to fetch what follows `edge`, unless enough is under way.
    fn send_for(&mut self, source: &ByteSource, cache: &Arc<BlockCache>, edge: u64, data_bytes: u64) {
        // A part of a merge ends somewhere: not too much beyond it.
        let most = if self.eager { 1 } else { (self.ahead / WINDOW_BYTES_MIN).max(1).ilog2() as usize };
        while self.coming.len() < most {
            let back = self.coming.back();
            let range = if self.forward {
                let from = back.map_or(edge, |coming| coming.range.end);
                from..(from + self.ahead).min(data_bytes)
            } else {
                let to = back.map_or(edge, |coming| coming.range.start);
                to.saturating_sub(self.ahead)..to
            };
            let bytes = COPIES * range.end.saturating_sub(range.start) as usize;
            if bytes == 0 || !cache.spares(bytes) {
                return;
            }
            let memory = Arc::new(cache.lend(bytes));
            let Some(flight) = source.read_ahead(range.clone(), self.keep, &memory) else { return };
            self.coming.push_back(Coming { range, flight, memory });
        }
    }

    fn drop_bytes(&mut self) {
        self.bytes = Bytes::new();
        self.coming.clear();
        self.memory = None;
    }
}
