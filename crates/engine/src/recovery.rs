//! From a bucket, and what is left on the local disk, to an engine that may write.
//!
//! The truth is the published manifest, and after it the wal: slices in the bucket as far as they go, then the local wal
//! if it is the continuation of what the manifest ends with.
//!
//! * The local wal counts only if its epoch is the last one that took over. If another writer took over since, history
//!   went on without what it holds: that is set aside, counted and reported, never replayed and never deleted.
//! * What counts of it is first copied into our own epoch's wal and synced; then the take-over is published; only then
//!   is the old file removed. A stop at any point leaves either the old truth or the new one, with its wal.
//! * Nothing is applied before the take-over is published: up to then an edit of a dead writer may still land and change
//!   what there is to apply.

use std::sync::Arc;

use bucket::{Bucket, Names};

use crate::claim::{Chance, Fence, NodeId, claim};
use crate::fetch::fetch_all;
use crate::manifest::{self, Edit, Manifest, ManifestWriter, TakeOver, WalSpan};
use crate::wal::{
    Chain, LocalWal, Op, Record, SET_ASIDE, Stream, Uploader, Wal, WalLimits, chain, read_slice,
};
use crate::{BranchId, Disk, Epoch, Error, Kind, Result, Seqno, TreeId, WalPosition, tree_of};

/// How often writers that are fenced may come before us. Each time is an edit that was under way.
const OVERTAKEN_MAX: usize = 100;
/// The least segments of a wal that is made on a full disk.
const SEGMENT_BYTES_MIN: u64 = 16 << 10;

/// Slices that are in memory at the same time.
const SLICES_AT_ONCE: usize = 8;

/// What recovery works on.
pub(crate) struct RecoveryParts {
    pub bucket: Arc<dyn Bucket>,
    pub disk: Arc<dyn Disk>,
    pub names: Names,
    /// Drawn by chance for each start.
    pub seed: u64,
    pub limits: WalLimits,
    /// How many objects are read from the bucket at the same time. With 1 there is no other thread.
    pub fetches: usize,
}

/// Takes one transaction; also told the manifest as our take-over left it.
pub(crate) type Apply<'a> = dyn FnMut(&Manifest, &Record<'_>) -> Result<()> + 'a;

/// A branch that is ours to write. What was recovered went through `apply`.
pub(crate) struct Recovered {
    pub epoch: Epoch,
    pub fence: Fence,
    pub manifest: ManifestWriter,
    pub wal: Arc<Wal>,
    pub uploader: Arc<Uploader>,
    /// The next commit's.
    pub next_seqno: Seqno,
    /// No tree from here on was ever named by a commit.
    pub next_tree: TreeId,
    pub report: Report,
}

/// What recovery found and did, for the operator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// The epoch taken over from, if there was one.
    pub took_over_from: Option<Epoch>,
    /// The writer taken over from was this directory's: its local wal was here, and was continued.
    pub continued_local: bool,
    /// Slices read from the bucket.
    pub slices: usize,
    /// Transactions replayed, all in all.
    pub transactions: u64,
    /// Of these, those that only the local disk had.
    pub local_transactions: u64,
    /// Local wals that history went on without.
    pub set_aside: Vec<SetAside>,
}

/// A local wal that was moved out of the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SetAside {
    pub epoch: Epoch,
    /// Transactions in it that are not in the bucket; `None` if that can't be told.
    pub transactions: Option<u64>,
    /// Its files now begin with this.
    pub label: String,
}

/// Claims the next epoch, finds out what is true, takes over, and passes every transaction that the published ssts do not
/// hold to `apply`, in the order of commits.
///
/// On an error nothing is lost and the call may be repeated (it then claims another epoch); what `apply` got meanwhile
/// must be thrown away. `Fenced`: another writer started after us.
pub(crate) fn recover(parts: RecoveryParts, apply: &mut Apply<'_>) -> Result<Recovered> {
    let mut chance = Chance(parts.seed);
    let node = NodeId::of(&*parts.disk, chance.bytes())?;
    let nonce = chance.next();
    let epoch = claim(&*parts.bucket, &parts.names, node, nonce)?;
    let fence = Fence::new(Arc::clone(&parts.bucket), parts.names.clone(), epoch);
    let start = Start { parts, epoch, fence, nonce, new_branch: BranchId(chance.bytes()) };
    for _ in 0..OVERTAKEN_MAX {
        if let Some(taken) = start.take_over()? {
            return start.finish(taken, apply);
        }
    }
    Err(Error::new(Kind::Unavailable, "writers that are fenced published edits all the time"))
}

struct Start {
    parts: RecoveryParts,
    epoch: Epoch,
    fence: Fence,
    nonce: u64,
    new_branch: BranchId,
}

/// After the take-over.
struct Taken {
    manifest: ManifestWriter,
    wal: Wal,
    from: Option<WalSpan>,
    chains: Vec<(Epoch, Chain)>,
    /// The local wal that was continued.
    continued: Option<Epoch>,
}

impl Start {
    /// `None` if an edit of a lower epoch came first: what there is has changed.
    fn take_over(&self) -> Result<Option<Taken>> {
        let RecoveryParts { bucket, disk, names, .. } = &self.parts;
        let before = match manifest::load(&**bucket, names, self.parts.fetches)? {
            Some(manifest) => manifest,
            None => manifest::found(&**bucket, names, self.new_branch)?,
        };
        let chains = before
            .wals_to_replay()
            .map(|span| Ok((span.epoch, chain(&**bucket, names, span.epoch, span.slice, span.end)?)))
            .collect::<Result<Vec<_>>>()?;
        let from = before.wals.last().copied();
        let uploaded = match (&from, chains.last()) {
            (Some(span), Some((_, chain))) => chain.end_or(span.slice),
            _ => WalPosition(0),
        };
        let start = uploaded.max(before.flushed.position);

        // An earlier try of this start may have left files of our epoch; nothing counts on them yet.
        LocalWal::remove(&**disk, self.epoch)?;
        let wal = self.create_wal(&before, from.map(|span| span.epoch), start)?;
        let continued = match from {
            Some(span) => self.continue_local(&before, span.epoch, start, &wal)?,
            None => None,
        };

        let edit = Edit { take_over: Some(start), ..Edit::default() };
        let (bucket, fence) = (Arc::clone(bucket), self.fence.clone());
        match ManifestWriter::take_over(bucket, names.clone(), fence, self.nonce, before, &edit)? {
            TakeOver::Done(manifest) => Ok(Some(Taken { manifest: *manifest, wal, from, chains, continued })),
            TakeOver::Overtaken => Ok(None),
        }
    }

    /// Our own wal, from `start` on. On a full disk the space that `earlier`'s local wal has and does not need makes room for it, and if
    /// that is not enough its segments are smaller.
    fn create_wal(&self, before: &Manifest, earlier: Option<Epoch>, start: WalPosition) -> Result<Wal> {
        let mut limits = self.parts.limits;
        let mut asked = false;
        loop {
            let stream = Stream::new(before.branch, self.epoch);
            match Wal::create(Arc::clone(&self.parts.disk), stream, start, limits) {
                Err(error) if error.kind() == Kind::Full && limits.segment_bytes > SEGMENT_BYTES_MIN => {
                    if let Some(epoch) = earlier.filter(|_| !asked) {
                        tracing::warn!(%error, "the disk is full; making do with the space that the wal has");
                        self.give_back_space(before, epoch, start)?;
                    } else {
                        limits.segment_bytes = (limits.segment_bytes / 2).max(SEGMENT_BYTES_MIN);
                    }
                    asked = true;
                }
                created => return created,
            }
        }
    }

    /// Whatever edit lands meanwhile, `start` only moves on: what is before it is not needed again.
    fn give_back_space(&self, before: &Manifest, epoch: Epoch, start: WalPosition) -> Result<()> {
        let disk = &*self.parts.disk;
        let local = LocalWal::open(disk, epoch)?;
        if local.branch != Some(before.branch) || local.oldest().is_none_or(|oldest| oldest > start) {
            return Ok(());
        }
        let end = local.read(before.branch, start, &mut |_| Ok(()))?;
        local.keep_only(disk, start..end)
    }

    /// Copies what the local wal of `epoch` has from `start` on into `wal`, where it gets the same positions, and syncs
    /// it. `None`: there is no such local wal.
    fn continue_local(
        &self,
        before: &Manifest,
        epoch: Epoch,
        start: WalPosition,
        wal: &Wal,
    ) -> Result<Option<Epoch>> {
        let disk = &*self.parts.disk;
        if !LocalWal::epochs(disk)?.contains(&epoch) {
            return Ok(None);
        }
        let local = LocalWal::open(disk, epoch)?;
        if local.branch.is_some_and(|branch| branch != before.branch) {
            return Ok(None);
        }
        if let Some(oldest) = local.oldest().filter(|oldest| *oldest > start) {
            return Err(Error::corrupt(format!(
                "the local wal of epoch {} begins at {:#x}, but the bucket has it only up to {:#x}: \
                 the bucket lost objects, or is an older copy",
                epoch.0, oldest.0, start.0
            )));
        }
        let end = local.read(before.branch, start, &mut |record| {
            let mut slot = wal.reserve(record.payload.len(), record.seqno)?;
            if !record.void {
                slot.fill(record.payload);
                slot.finish();
            }
            Ok(())
        })?;
        assert_eq!(wal.end(), end, "a copied record keeps its position");
        wal.sync_to(end)?;
        Ok(Some(epoch))
    }

    fn finish(self, taken: Taken, apply: &mut Apply<'_>) -> Result<Recovered> {
        let Taken { manifest, wal, from, chains, continued } = taken;
        let set_aside = self.settle_local_wals(manifest.manifest(), continued)?;
        let mut replay = Replay::new(manifest.manifest(), apply);
        for (epoch, chain) in &chains {
            replay.slices(&self.parts, *epoch, chain)?;
        }
        let from_bucket = replay.transactions;
        LocalWal::open(&*self.parts.disk, self.epoch)?.read(
            manifest.manifest().branch,
            wal.start(),
            &mut |record| replay.record(record),
        )?;
        let report = Report {
            took_over_from: from.map(|span| span.epoch),
            continued_local: continued.is_some(),
            slices: chains.iter().map(|(_, chain)| chain.slices.len()).sum(),
            transactions: replay.transactions,
            local_transactions: replay.transactions - from_bucket,
            set_aside,
        };
        let (next_seqno, next_tree) = (Seqno(replay.newest.0 + 1), replay.next_tree);
        let wal = Arc::new(wal);
        let RecoveryParts { bucket, names, .. } = self.parts;
        let uploader = Uploader::new(Arc::clone(&wal), bucket, names, self.fence.clone(), chains);
        Ok(Recovered {
            epoch: self.epoch,
            fence: self.fence,
            manifest,
            wal,
            uploader: Arc::new(uploader),
            next_seqno,
            next_tree,
            report,
        })
    }

    /// Removes local wals of which everything lives on elsewhere, and moves the others out of the way. The oldest first:
    /// the wal that continued another one goes after it.
    fn settle_local_wals(&self, manifest: &Manifest, continued: Option<Epoch>) -> Result<Vec<SetAside>> {
        let disk = &*self.parts.disk;
        let epochs = LocalWal::epochs(disk)?;
        let mut set_aside = Vec::new();
        for epoch in epochs.iter().copied().filter(|epoch| *epoch != self.epoch) {
            match self.fate(manifest, &epochs, epoch, continued)? {
                Fate::Remove => LocalWal::remove(disk, epoch)?,
                Fate::SetAside(transactions) => {
                    let label = format!("epoch-{:x}-{:016x}", self.epoch.0, self.nonce);
                    let files = LocalWal::set_aside(disk, epoch, &label)?;
                    tracing::warn!(
                        epoch = epoch.0, ?transactions, files, directory = SET_ASIDE, %label,
                        "another writer went on without what this local wal holds; it was set aside"
                    );
                    set_aside.push(SetAside { epoch, transactions, label });
                }
            }
        }
        Ok(set_aside)
    }

    fn fate(
        &self,
        manifest: &Manifest,
        local: &[Epoch],
        epoch: Epoch,
        continued: Option<Epoch>,
    ) -> Result<Fate> {
        let wal = match LocalWal::open(&*self.parts.disk, epoch) {
            Ok(wal) => wal,
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::BadRequest) => {
                return Ok(Fate::SetAside(None));
            }
            Err(error) => return Err(error),
        };
        if wal.branch.is_some_and(|branch| branch != manifest.branch) || epoch > self.epoch {
            return Ok(Fate::SetAside(None));
        }
        let Some(index) = manifest.wals.iter().position(|span| span.epoch == epoch) else {
            // It never took over, so it holds copies only. But what a manifest has forgotten may have taken over.
            let unknown = !manifest.knows_all_wals() && epoch < manifest.wals[0].epoch;
            return Ok(if unknown { Fate::SetAside(None) } else { Fate::Remove });
        };
        let successor = manifest.wals.get(index + 1).map(|span| span.epoch);
        let lives_on = match successor {
            Some(successor) if successor == self.epoch => continued == Some(epoch),
            // A start of ours copied it, took over, and stopped before it removed it.
            Some(successor) => local.contains(&successor),
            None => false,
        };
        if lives_on {
            return Ok(Fate::Remove);
        }
        let Some(end) = manifest.wals[index].end else { return Ok(Fate::SetAside(None)) };
        if wal.oldest().is_some_and(|oldest| oldest > end) {
            return Ok(Fate::SetAside(None));
        }
        let mut lost = 0;
        let counted = wal.read(manifest.branch, end, &mut |record| {
            lost += u64::from(!record.void);
            Ok(())
        });
        match counted {
            Ok(_) if lost == 0 => Ok(Fate::Remove),
            Ok(_) => Ok(Fate::SetAside(Some(lost))),
            Err(error) if error.kind() == Kind::Corrupt => Ok(Fate::SetAside(None)),
            Err(error) => Err(error),
        }
    }
}

enum Fate {
    Remove,
    SetAside(Option<u64>),
}

struct Replay<'a> {
    flushed: WalPosition,
    branch: BranchId,
    newest: Seqno,
    next_tree: TreeId,
    transactions: u64,
    manifest: &'a Manifest,
    apply: &'a mut Apply<'a>,
}

impl<'a> Replay<'a> {
    fn new(manifest: &'a Manifest, apply: &'a mut Apply<'a>) -> Self {
        Self {
            flushed: manifest.flushed.position,
            branch: manifest.branch,
            newest: manifest.flushed.seqno,
            next_tree: manifest.next_tree,
            transactions: 0,
            manifest,
            apply,
        }
    }

    fn slices(&mut self, parts: &RecoveryParts, epoch: Epoch, chain: &Chain) -> Result<()> {
        let stream = Stream::new(self.branch, epoch);
        // A round at a time, so that what is fetched and not applied yet stays small.
        for round in chain.slices.chunks(parts.fetches.clamp(1, SLICES_AT_ONCE)) {
            let names: Vec<_> =
                round.iter().map(|(first, _)| parts.names.wal_slice(epoch.0, first.0)).collect();
            let objects = fetch_all(&*parts.bucket, &names, parts.fetches);
            for (((first, _), name), object) in round.iter().zip(&names).zip(objects) {
                let missing = || Error::corrupt(format!("{name} is missing; a start needs it"));
                let object = object?.ok_or_else(missing)?;
                read_slice(&stream, *first, &object, name, &mut |record| self.record(record))?;
            }
        }
        Ok(())
    }

    fn record(&mut self, record: &Record<'_>) -> Result<()> {
        if record.position < self.flushed {
            return Ok(());
        }
        if record.seqno <= self.newest {
            return Err(Error::corrupt(format!(
                "the wal record at {:#x} has seqno {}, and {} came before it",
                record.position.0, record.seqno.0, self.newest.0
            )));
        }
        self.newest = record.seqno;
        if record.void {
            return Ok(());
        }
        for op in record.ops() {
            let tree = match op? {
                Op::Put(key, _) | Op::Delete(key) => tree_of(key),
                Op::DropTree(tree) => tree,
                Op::Load(sst) => tree_of(sst.first_key),
            };
            self.next_tree = self.next_tree.max(TreeId(tree.0.saturating_add(1)));
        }
        self.transactions += 1;
        (self.apply)(self.manifest, record)
    }
}

#[cfg(test)]
mod tests;
