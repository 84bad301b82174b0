//! Walking an sst, and a run of them, both ways.
//!
//! * A step within a block touches nothing but the block: no allocation, no lock, no reference count.
//! * An iterator that returned an error stands nowhere; a seek brings it back.

use std::sync::Arc;

use super::block::{Block, Row};
use super::reader::{PartitionBody, Purpose, Sst, handle_at};
use super::window::Window;
use crate::cache::Held;
use crate::first_part::Probe;
use crate::source::{Glided, Source, Standing, pass_by_steps};
use crate::store::SstStore;
use crate::version::Run;
use crate::{Error, Kind, OpKind, Result, Seqno};

/// A position in one sst.
pub struct SstIter {
    sst: Arc<Sst>,
    purpose: Purpose,
    window: Window,
    partition: usize,
    body: Option<Arc<Held<PartitionBody>>>,
    /// Within the partition.
    block: usize,
    /// `None`: stands nowhere.
    data: Option<Arc<Held<Block>>>,
    number: usize,
    rows: usize,
    row: Row,
}

impl SstIter {
    /// Stands nowhere until the first seek.
    pub(crate) fn new(sst: Arc<Sst>, purpose: Purpose) -> Self {
        Self {
            sst,
            purpose,
            window: Window::new(purpose),
            partition: 0,
            body: None,
            block: 0,
            data: None,
            number: 0,
            rows: 0,
            row: Row::NOWHERE,
        }
    }

    /// Moves to the first version.
    pub(crate) fn seek_first(&mut self) -> Result<()> {
        self.enter_partition(0)?;
        self.enter_block(0)?;
        self.stand_at(0);
        Ok(())
    }

    /// Moves to the last version.
    pub(crate) fn seek_last(&mut self) -> Result<()> {
        let blocks = self.enter_partition(self.sst.partitions() - 1)?;
        let rows = self.enter_block(blocks - 1)?;
        self.stand_at(rows - 1);
        Ok(())
    }

    /// Goes on with the next or previous sst of a run.
    fn change_sst(&mut self, sst: Arc<Sst>, forward: bool) {
        self.window.carry_over(sst.data_bytes(), forward);
        self.leave();
        self.body = None;
        self.sst = sst;
    }

    /// Loads a partition; returns how many blocks it has.
    fn enter_partition(&mut self, partition: usize) -> Result<usize> {
        self.leave();
        if self.body.is_none() || self.partition != partition {
            self.body = None;
            self.body = Some(self.sst.partition(partition)?);
            self.partition = partition;
        }
        Ok(self.body()?.index.rows())
    }

    /// Loads a block of the partition; returns how many rows it has. Stands nowhere until `stand_at`.
    fn enter_block(&mut self, block: usize) -> Result<usize> {
        self.leave();
        let handle = handle_at(&self.body()?.index, block);
        let data = self.sst.block_in_window(self.partition, block, handle, self.purpose, &mut self.window)?;
        self.rows = data.rows();
        self.block = block;
        self.data = Some(data);
        Ok(self.rows)
    }

    #[inline]
    fn stand_at(&mut self, number: usize) {
        self.number = number;
        self.row = self.data.as_ref().expect("a block was entered").row(number);
    }

    /// To the first version of the next key, if that is in this block; else to the last of this one.
    #[inline]
    fn pass_key_in_block(&mut self) -> bool {
        let data = self.data.as_ref().expect("the iterator is valid");
        for number in self.number + 1..self.rows {
            let row = data.row(number);
            let same = data.same_key_as_before(number, &row);
            (self.number, self.row) = (number, row);
            if !same {
                return true;
            }
        }
        false
    }

    #[cold]
    fn pass_key_and_block(&mut self) -> Result<()> {
        pass_by_steps(self)
    }

    fn leave(&mut self) {
        self.data = None;
        self.rows = 0;
    }

    fn body(&self) -> Result<&PartitionBody> {
        self.body
            .as_deref()
            .map(|held| &**held)
            .ok_or_else(|| Error::new(Kind::Bug, "an sst iterator nowhere"))
    }

    /// From the last row of a block to the first of the next.
    #[cold]
    fn next_block(&mut self) -> Result<()> {
        if self.block + 1 < self.body()?.index.rows() {
            self.enter_block(self.block + 1)?;
        } else if self.partition + 1 < self.sst.partitions() {
            self.enter_partition(self.partition + 1)?;
            self.enter_block(0)?;
        } else {
            self.leave();
            return Ok(());
        }
        self.stand_at(0);
        Ok(())
    }

    /// From the first row of a block to the last of the previous.
    #[cold]
    fn previous_block(&mut self) -> Result<()> {
        let rows = if self.block > 0 {
            self.enter_block(self.block - 1)?
        } else if self.partition > 0 {
            let blocks = self.enter_partition(self.partition - 1)?;
            self.enter_block(blocks - 1)?
        } else {
            self.leave();
            return Ok(());
        };
        self.stand_at(rows - 1);
        Ok(())
    }

    /// Enters the block that the first version at or after `key` is in, or the one before; `false`: all sort before.
    fn enter_block_of(&mut self, key: &[u8]) -> Result<bool> {
        let partition = self.sst.top().lower_bound(key, Seqno(u64::MAX));
        if partition == self.sst.partitions() {
            self.leave();
            return Ok(false);
        }
        let blocks = self.enter_partition(partition)?;
        let block = self.body()?.index.lower_bound(key, Seqno(u64::MAX));
        // The index ends with the separator that the top index has of it.
        self.enter_block(block.min(blocks - 1))?;
        Ok(true)
    }
}

impl Source for SstIter {
    fn seek(&mut self, key: &[u8], seqno: Seqno) -> Result<()> {
        if !self.enter_block_of(key)? {
            return Ok(());
        }
        loop {
            let data = self.data.as_ref().expect("a block was entered");
            let number = data.lower_bound(key, seqno);
            if number < self.rows {
                self.stand_at(number);
                return Ok(());
            }
            // All of this block is before it; the next one begins at or after it, unless versions of one key fill it.
            self.next_block()?;
            if self.data.is_none() {
                return Ok(());
            }
        }
    }

    fn seek_before(&mut self, key: &[u8]) -> Result<()> {
        if !self.enter_block_of(key)? {
            return self.seek_last();
        }
        let data = self.data.as_ref().expect("a block was entered");
        match data.lower_bound(key, Seqno(u64::MAX)) {
            0 => self.previous_block(),
            number => {
                self.stand_at(number - 1);
                Ok(())
            }
        }
    }

    #[inline]
    fn next(&mut self) -> Result<()> {
        if self.number + 1 < self.rows {
            self.stand_at(self.number + 1);
            return Ok(());
        }
        self.next_block()
    }

    #[inline]
    fn prev(&mut self) -> Result<()> {
        if self.number > 0 {
            self.stand_at(self.number - 1);
            return Ok(());
        }
        self.previous_block()
    }

    #[inline]
    fn valid(&self) -> bool {
        self.data.is_some()
    }

    #[inline]
    fn key(&self) -> &[u8] {
        self.data.as_ref().expect("the iterator is valid").key(&self.row)
    }

    #[inline]
    fn seqno(&self) -> Seqno {
        self.row.seqno
    }

    #[inline]
    fn kind(&self) -> OpKind {
        self.row.kind
    }

    #[inline]
    fn value(&self) -> &[u8] {
        self.data.as_ref().expect("the iterator is valid").value(&self.row)
    }

    #[inline]
    fn entry(&self) -> (&[u8], &[u8]) {
        let data = self.data.as_ref().expect("the iterator is valid");
        (data.key(&self.row), data.value(&self.row))
    }

    #[inline]
    fn pass_key(&mut self) -> Result<()> {
        if self.pass_key_in_block() { Ok(()) } else { self.pass_key_and_block() }
    }

    fn steps_before(&self, key: &[u8]) -> usize {
        let data = self.data.as_ref().expect("the iterator is valid");
        data.lower_bound(key, Seqno(u64::MAX)).saturating_sub(self.number + 1)
    }

    #[inline]
    fn glide_step(&mut self) -> bool {
        let data = self.data.as_ref().expect("the iterator is valid");
        self.number += 1;
        self.row = data.row(self.number);
        data.same_key_as_before(self.number, &self.row)
    }
}

/// A position in a run: its ssts one after the other, opened when they are reached.
pub struct LevelIter {
    store: Arc<SstStore>,
    run: Run,
    purpose: Purpose,
    at: usize,
    iter: Option<SstIter>,
    /// Whether there are runs of older data beneath.
    covers: bool,
    /// Where the last seek led to, if anywhere.
    sought: Option<(usize, usize, usize)>,
    /// Steps in vain that no sst was charged with yet.
    wasted: usize,
}

/// What a seek costs in a run where nothing comes of it, in steps.
const SEEK_STEPS: usize = 4;
/// Steps that an sst is charged with at once: threads meet there.
const CHARGED_MIN: usize = 64;

impl LevelIter {
    /// Stands nowhere until the first seek.
    pub(crate) fn new(store: Arc<SstStore>, run: Run, purpose: Purpose) -> Self {
        Self { store, run, purpose, at: 0, iter: None, covers: false, sought: None, wasted: 0 }
    }

    /// `false`: no key of the run starts with the probe's prefix. Reads at most filters.
    pub(crate) fn may_hold(&self, probe: &Probe<'_>) -> Result<bool> {
        let at = self.run.partition_point(|meta| &meta.last_key[..] < probe.prefix);
        let Some(meta) = self.run.get(at) else { return Ok(false) };
        if *meta.first_key > *probe.prefix && !meta.first_key.starts_with(probe.prefix) {
            return Ok(false);
        }
        // It ends after the prefix's first key. If it ends with one of the prefix it holds that one; if not, the ssts after it
        // begin after the last one.
        self.store.open(meta)?.may_hold(probe)
    }

    /// Stands nowhere until the next seek.
    pub(crate) fn leave(&mut self) {
        self.end_seek();
        self.iter = None;
    }

    /// There are runs of older data beneath it, so that it could be merged with them.
    pub(crate) fn cover(&mut self) {
        self.covers = true;
    }

    /// A seek is over. It was in vain if no step followed. (Or the one thing that was sought was here: then the seek beneath was
    /// in vain, and the same merge would have spared that one.)
    fn end_seek(&mut self) {
        if self.covers && self.sought.take().is_some_and(|sought| self.place() == Some(sought)) {
            self.waste(SEEK_STEPS);
        }
    }

    /// Charges the sst that it is in with its steps in vain and `more`, and returns those that are too few for that.
    pub(crate) fn charge(&mut self, more: usize) -> usize {
        self.end_seek();
        self.waste(more);
        std::mem::take(&mut self.wasted)
    }

    #[cold]
    fn charge_many(&mut self) {
        if let (Some(iter), Purpose::Query) = (&self.iter, self.purpose) {
            iter.sst.charge(self.wasted as u64);
            self.wasted = 0;
        }
    }

    fn place(&self) -> Option<(usize, usize, usize)> {
        let iter = self.iter.as_ref().filter(|iter| iter.valid())?;
        Some((iter.partition, iter.block, iter.number))
    }

    /// Opens an sst for a seek.
    fn enter(&mut self, at: usize) -> Result<&mut SstIter> {
        if self.iter.is_none() || self.at != at {
            self.iter = None;
            self.iter = Some(SstIter::new(Arc::clone(self.store.open(&self.run[at])?), self.purpose));
            self.at = at;
        }
        Ok(self.iter.as_mut().expect("just entered"))
    }

    /// Opens the neighbour after the last step went past the end.
    #[cold]
    fn step_over(&mut self, forward: bool) -> Result<()> {
        let at = if forward {
            Some(self.at + 1).filter(|&at| at < self.run.len())
        } else {
            self.at.checked_sub(1)
        };
        let Some(at) = at else { return Ok(()) };
        let sst = Arc::clone(self.store.open(&self.run[at])?);
        let iter = self.iter.as_mut().expect("a step comes after a seek");
        iter.change_sst(sst, forward);
        self.at = at;
        if forward { iter.seek_first() } else { iter.seek_last() }
    }

    #[cold]
    fn pass_key_and_block(&mut self) -> Result<()> {
        pass_by_steps(self)
    }

    #[inline]
    fn current(&self) -> &SstIter {
        self.iter.as_ref().expect("the iterator is valid")
    }

    fn standing(&self) -> bool {
        self.iter.as_ref().is_some_and(Source::valid)
    }
}

impl Source for LevelIter {
    fn seek(&mut self, key: &[u8], seqno: Seqno) -> Result<()> {
        self.end_seek();
        let at = self.run.partition_point(|meta| &meta.last_key[..] < key);
        if at == self.run.len() {
            self.iter = None;
            return Ok(());
        }
        for at in at..self.run.len() {
            self.enter(at)?.seek(key, seqno)?;
            // Only if its last key is `key` itself, all of whose versions here are too new, goes the search on.
            if self.standing() {
                break;
            }
        }
        self.sought = self.place();
        Ok(())
    }

    fn seek_before(&mut self, key: &[u8]) -> Result<()> {
        self.end_seek();
        let Some(at) = self.run.partition_point(|meta| &meta.first_key[..] < key).checked_sub(1) else {
            self.iter = None;
            return Ok(());
        };
        self.enter(at)?.seek_before(key)?;
        self.sought = self.place();
        Ok(())
    }

    #[inline]
    fn next(&mut self) -> Result<()> {
        let iter = self.iter.as_mut().expect("a step comes after a seek");
        iter.next()?;
        if iter.valid() { Ok(()) } else { self.step_over(true) }
    }

    #[inline]
    fn prev(&mut self) -> Result<()> {
        let iter = self.iter.as_mut().expect("a step comes after a seek");
        iter.prev()?;
        if iter.valid() { Ok(()) } else { self.step_over(false) }
    }

    #[inline]
    fn valid(&self) -> bool {
        self.standing()
    }

    #[inline]
    fn key(&self) -> &[u8] {
        self.current().key()
    }

    #[inline]
    fn seqno(&self) -> Seqno {
        self.current().seqno()
    }

    #[inline]
    fn kind(&self) -> OpKind {
        self.current().kind()
    }

    #[inline]
    fn value(&self) -> &[u8] {
        self.current().value()
    }

    #[inline]
    fn entry(&self) -> (&[u8], &[u8]) {
        self.current().entry()
    }

    #[inline]
    fn pass_key(&mut self) -> Result<()> {
        if self.iter.as_mut().expect("a step comes after a seek").pass_key_in_block() {
            return Ok(());
        }
        self.pass_key_and_block()
    }

    fn steps_before(&self, key: &[u8]) -> usize {
        self.current().steps_before(key)
    }

    #[inline]
    fn standing(&self) -> Standing {
        self.current().standing()
    }

    #[inline]
    fn glide_step(&mut self) -> bool {
        self.iter.as_mut().expect("the iterator is valid").glide_step()
    }

    #[inline]
    fn glide(&mut self, most: usize, at: Seqno, passing: &mut bool) -> Glided {
        self.iter.as_mut().expect("the iterator is valid").glide(most, at, passing)
    }

    #[inline]
    fn waste(&mut self, steps: usize) {
        self.wasted += steps;
        if self.wasted >= CHARGED_MIN {
            self.charge_many();
        }
    }
}

/// A place between versions: before the first one at or after (key, seqno).
pub(crate) type Edge<'a> = (&'a [u8], Seqno);

/// About how many versions of `sst` lie between two edges, and their bytes: counted if they lie in one block or in two
/// neighbours (which are read, for the query that asks will need them), else told from the index. All keys between them
/// start with the probe's prefix.
pub(crate) fn estimate(sst: &Sst, probe: &Probe<'_>, low: Edge<'_>, high: Edge<'_>) -> Result<(u64, u64)> {
    if low.0 > high.0 || !sst.may_hold(probe)? {
        return Ok((0, 0));
    }
    let Some((from, to)) = sst.find_blocks(low.0, high.0)? else { return Ok((0, 0)) };
    let (before, until) = (sst.rank(Some(&from)), sst.rank(to.as_ref()));
    if until.block > before.block + 1 {
        return Ok((until.entries - before.entries, until.bytes - before.bytes));
    }
    let share = |block: &Block, rows: usize| (block.bytes() * rows / block.rows()) as u64;
    let first = sst.look_at_block(&from)?;
    let start = first.lower_bound(low.0, low.1);
    let end = if until.block == before.block { first.lower_bound(high.0, high.1) } else { first.rows() };
    let rows = end.saturating_sub(start);
    let (mut entries, mut bytes) = (rows as u64, share(&first, rows));
    if let Some(to) = to.filter(|_| until.block > before.block) {
        let second = sst.look_at_block(&to)?;
        let rows = second.lower_bound(high.0, high.1);
        entries += rows as u64;
        bytes += share(&second, rows);
    }
    Ok((entries, bytes))
}
