//! The wal in the bucket: slices, each named by where it starts, so each says where the next one is.
//!
//! * Slices go up in order, the next one after the one before is there; they hold whole records and leave no gap. So the
//!   chain that starts at a known slice ends where the uploaded wal ends.
//! * A slice that was sent once is sent again as it was: an earlier try may land later, and must not cut a longer one
//!   short.
//! * What can't be read back from the local disk any more is passed over once ssts hold it: the chain that starts there is the one that
//!   the edit of these ssts names.
//! * A slice is deleted only after the manifest says that reading starts behind it, and the claim was validated.

use std::collections::BTreeMap;
use std::sync::Arc;

use bucket::{Bucket, Names, ObjectName};
use bytes::Bytes;
use parking_lot::Mutex;

use super::format::{FILE_HEADER, RECORD_HEADER, Stream};
use super::{Record, Wal};
use crate::claim::Fence;
use crate::manifest::Manifest;
use crate::points::{self, Point};
use crate::{Epoch, Error, Result, WalPosition};

/// Names in one delete request; S3 takes a thousand.
const BATCH: usize = 1000;

/// Slices of one epoch that follow one another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Start and end of each.
    pub slices: Vec<(WalPosition, WalPosition)>,
}

impl Chain {
    /// Where the chain ends; `start` if it is empty.
    pub(crate) fn end_or(&self, start: WalPosition) -> WalPosition {
        self.slices.last().map_or(start, |(_, end)| *end)
    }
}

/// Finds the slices of `epoch` from `start` on, up to `end` if that is known. What was trimmed before `start` does not
/// matter.
pub(crate) fn chain(
    bucket: &dyn Bucket,
    names: &Names,
    epoch: Epoch,
    start: WalPosition,
    end: Option<WalPosition>,
) -> Result<Chain> {
    let listed = bucket.list(&names.wal_slices(epoch.0))?;
    let listed: BTreeMap<u64, u64> = listed
        .iter()
        .filter_map(|object| Some((Names::parse_wal_slice(&object.name)?.1, object.bytes)))
        .collect();
    let mut chain = Chain::default();
    let mut at = start;
    while end.is_none_or(|end| at < end) {
        let name = names.wal_slice(epoch.0, at.0);
        // A listing may be behind; asking for the object is not.
        let bytes = match listed.get(&at.0) {
            Some(bytes) => *bytes,
            None => match bucket.head(&name)? {
                Some(bytes) => bytes,
                None => break,
            },
        };
        let records = bytes.saturating_sub(FILE_HEADER as u64);
        if records == 0 {
            return Err(Error::corrupt(format!("{name}: the wal slice holds nothing")));
        }
        let next = WalPosition(at.0 + records);
        chain.slices.push((at, next));
        at = next;
    }
    match end {
        Some(end) if at < end => Err(Error::corrupt(format!(
            "{} is missing: the wal of epoch {} is needed up to {:#x}",
            names.wal_slice(epoch.0, at.0),
            epoch.0,
            end.0
        ))),
        Some(end) if at > end => Err(Error::corrupt(format!(
            "the wal slices of epoch {} do not meet at {:#x}, where its wal ends",
            epoch.0, end.0
        ))),
        _ => Ok(chain),
    }
}

/// Shows `visit` every record of the slice `object`, which starts at `first`. Every byte of it must be part of one.
pub(crate) fn read_slice(
    stream: &Stream,
    first: WalPosition,
    object: &[u8],
    name: &ObjectName,
    visit: &mut dyn FnMut(&Record<'_>) -> Result<()>,
) -> Result<()> {
    let records = stream.decode_slice(object, first, name.as_str())?;
    let mut at = 0;
    while at < records.len() {
        let record = Record::parse(stream, first.0 + at as u64, &records[at..]).ok_or_else(|| {
            Error::corrupt(format!("{name}: no whole wal record at offset {}", FILE_HEADER + at))
        })?;
        visit(&record)?;
        at = (record.end.0 - first.0) as usize;
    }
    Ok(())
}

/// Carries the wal of one epoch into the bucket, and takes away what is not needed any more, there and on the disk.
pub(crate) struct Uploader {
    wal: Arc<Wal>,
    bucket: Arc<dyn Bucket>,
    names: Names,
    fence: Fence,
    /// Held for the whole of a step: slices go up one after the other.
    step: Mutex<()>,
    state: Mutex<State>,
}

struct State {
    /// Slices in the bucket, by start: epoch and end.
    slices: BTreeMap<u64, (Epoch, u64)>,
    /// The end of what is uploaded.
    uploaded: u64,
    /// A slice that was sent and is not known to be there. It goes from `uploaded` to here.
    sent: Option<u64>,
    /// Where the local wal is damaged, at or behind `uploaded`.
    damaged: Option<u64>,
    /// What other epochs left behind was looked for.
    swept: bool,
}

impl Uploader {
    /// For `wal`, of which nothing is uploaded. `earlier`: the slices of earlier epochs that a start would read now.
    pub(crate) fn new(
        wal: Arc<Wal>,
        bucket: Arc<dyn Bucket>,
        names: Names,
        fence: Fence,
        earlier: impl IntoIterator<Item = (Epoch, Chain)>,
    ) -> Self {
        let slices = earlier
            .into_iter()
            .flat_map(|(epoch, chain)| {
                chain.slices.into_iter().map(move |(first, end)| (first.0, (epoch, end.0)))
            })
            .collect();
        let state = State { slices, uploaded: wal.start().0, sent: None, damaged: None, swept: false };
        Self { wal, bucket, names, fence, step: Mutex::new(()), state: Mutex::new(state) }
    }

    /// Uploads one slice of what is durable and not uploaded yet. False: there was none.
    ///
    /// After `Corrupt` see [`Self::damaged`].
    ///
    /// On true the slice is in the bucket and this writer was still the newest after that: it counts for every later
    /// writer. `Fenced`: it may not count.
    pub(crate) fn step(&self) -> Result<bool> {
        let _step = self.step.lock();
        let (first, sent) = {
            let state = self.state.lock();
            (state.uploaded, state.sent)
        };
        let durable = self.wal.durable().0;
        if durable == first {
            return Ok(false);
        }
        let (records, damaged) = self.wal.read_records(first, sent.unwrap_or(durable), sent.is_some())?;
        self.state.lock().damaged = damaged;
        if let Some(place) = damaged {
            return Err(self.wal.damaged(place));
        }
        let end = first + records.len() as u64;
        self.state.lock().sent = Some(end);
        let object = self.wal.stream.encode_slice(WalPosition(first), &records);
        self.bucket.put(&self.names.wal_slice(self.fence.epoch().0, first), Bytes::from(object))?;
        points::pass(Point::AfterSlicePut);
        self.fence.check()?;
        let mut state = self.state.lock();
        state.slices.insert(first, (self.fence.epoch(), end));
        state.sent = None;
        state.uploaded = end;
        Ok(true)
    }

    /// Where the local wal is damaged before its upload, if it is. What it said there is in memtables still, or in ssts.
    pub(crate) fn damaged(&self) -> Option<WalPosition> {
        self.state.lock().damaged.map(WalPosition)
    }

    /// Everything before `position`, a record's start, is in ssts that are about to be published: goes on from there if something
    /// before it is damaged. Slices before it can't be read together with those behind it from now on.
    pub(crate) fn pass_damage(&self, position: WalPosition) {
        if self.damaged().is_none() {
            return;
        }
        let _step = self.step.lock();
        let mut state = self.state.lock();
        if state.damaged.is_some_and(|place| place < position.0) {
            state.damaged = None;
            state.sent = None;
            state.uploaded = position.0;
        }
    }

    /// The end of what is uploaded.
    pub(crate) fn uploaded(&self) -> WalPosition {
        WalPosition(self.state.lock().uploaded)
    }

    /// How many slices a start would have to read after losing the local disk, at most.
    pub(crate) fn slices(&self) -> usize {
        self.state.lock().slices.len()
    }

    /// Where reading the wal from the bucket must start to meet `position`: the start of the slice that holds it, or of
    /// the one that comes next. Goes into [`crate::manifest::Flushed`].
    pub(crate) fn slice_at(&self, position: WalPosition) -> WalPosition {
        let state = self.state.lock();
        let holds = state.slices.range(..=position.0).next_back().filter(|(_, (_, end))| *end > position.0);
        if let Some((first, _)) = holds {
            return WalPosition(*first);
        }
        match state.sent {
            Some(end) if end <= position.0 => WalPosition(end),
            // A position before the wal that is not in a slice was flushed before this epoch and is not asked for.
            _ => WalPosition(state.uploaded.min(position.0)),
        }
    }

    /// Removes local segments and slices that no start needs any more, given what is published. Returns whether anything
    /// was removed.
    pub(crate) fn trim(&self, published: &Manifest) -> Result<bool> {
        let flushed = published.flushed.position.0;
        // What is not uploaded stays even if it is flushed: slices leave no gap.
        let removed = self.wal.segments.trim(flushed.min(self.uploaded().0))?;
        let old = self.outdated_slices(published)?;
        if !old.is_empty() {
            self.fence.check()?;
            for batch in old.chunks(BATCH) {
                self.bucket.delete(batch)?;
            }
        }
        let mut state = self.state.lock();
        let reading_starts = reading_starts(published).0;
        state.slices.retain(|first, _| *first >= reading_starts);
        state.swept = true;
        Ok(removed > 0 || !old.is_empty())
    }

    fn outdated_slices(&self, published: &Manifest) -> Result<Vec<ObjectName>> {
        let reading_starts = reading_starts(published).0;
        let state = self.state.lock();
        let known = state.slices.range(..reading_starts);
        let mut old: Vec<_> =
            known.map(|(first, (epoch, _))| self.names.wal_slice(epoch.0, *first)).collect();
        let swept = state.swept;
        drop(state);
        if !swept {
            // Once in a while, what earlier epochs left: slices behind their wal's end, or not deleted in time.
            let listed = self.bucket.list(&self.names.wals())?;
            old.extend(listed.into_iter().map(|object| object.name).filter(|name| {
                Names::parse_wal_slice(name).is_some_and(|(epoch, first)| {
                    Epoch(epoch) < self.fence.epoch() && !needed(published, Epoch(epoch), first)
                })
            }));
            old.sort();
            old.dedup();
        }
        Ok(old)
    }
}

/// The first slice that a start would read.
fn reading_starts(published: &Manifest) -> WalPosition {
    published.wals_to_replay().next().map_or(published.flushed.slice, |span| span.slice)
}

fn needed(published: &Manifest, epoch: Epoch, first: u64) -> bool {
    published
        .wals_to_replay()
        .any(|span| span.epoch == epoch && first >= span.slice.0 && span.end.is_none_or(|end| first < end.0))
}

impl Wal {
    /// Whole records from `first` on, all durable: up to `end` if `exact`, else up to the first record's end behind
    /// `slice_bytes`, or `end` if that comes first. What the disk gives back is checked before it leaves; if that is not what is
    /// asked for, the place where it is damaged comes with it.
    fn read_records(&self, first: u64, end: u64, exact: bool) -> Result<(Vec<u8>, Option<u64>)> {
        let mut stop = if exact { end } else { end.min(first + self.limits.slice_bytes) };
        let mut bytes = self.segments.read(first..stop)?;
        let mut at = 0;
        let mut lengthened = false;
        loop {
            match Record::parse(&self.stream, first + at as u64, &bytes[at..]) {
                Some(record) => at = (record.end.0 - first) as usize,
                // A record that is longer than a slice is a slice by itself.
                None if at == 0 && !lengthened && stop < end => {
                    lengthened = true;
                    stop = self.record_end(first, end)?;
                    bytes = self.segments.read(first..stop)?;
                }
                None => break,
            }
        }
        bytes.truncate(at);
        let damaged = at == 0 || (exact && at as u64 != end - first);
        Ok((bytes, damaged.then_some(first + at as u64)))
    }

    fn damaged(&self, place: u64) -> Error {
        Error::corrupt(format!("the local wal of epoch {} is damaged at {place:#x}", self.stream.epoch.0))
    }

    fn record_end(&self, first: u64, end: u64) -> Result<u64> {
        let header = self.segments.read(first..end.min(first + RECORD_HEADER as u64))?;
        let length = self.stream.parse_header(first, &header).map_or(0, |header| header.payload_bytes);
        Ok(end.min(first + (RECORD_HEADER + length) as u64))
    }
}

#[cfg(test)]
mod tests;
