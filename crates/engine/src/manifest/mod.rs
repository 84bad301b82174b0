//! The manifest: what the tree consists of, agreed on by all writers of a branch.
//!
//! * A base object holds the whole state as of one edit; edits after it are numbered without gaps. Edit 16k+1 exists only
//!   if base 16k does or did, so a base that was cleaned away is always followed by a newer one.
//! * An edit is named by its number alone. Two writers that want the same number collide, and put-if-absent picks one.
//! * The first edit of an epoch takes over: it says where the wal of the epoch before ends, for ever. Nothing is
//!   acknowledged in an epoch before its take-over is published and the claim was validated after that.
//! * An edit that was sent once is sent again as it was, or never: it may still land.

mod format;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bucket::{Bucket, Names, ObjectName, PutOutcome};
use bytes::Bytes;

use crate::claim::Fence;
use crate::fetch::{fetch, fetch_all};
use crate::inspect::Hex;
use crate::points::{self, Point};
use crate::version::{Misfit, Run, SstMeta, Version};
use crate::{BranchId, Epoch, Error, Kind, Result, Seqno, SstId, TreeId, WalPosition};
pub(crate) use format::Header;

/// A base is written after each so many edits. A start reads one base and up to this many edits, one after the other.
pub(crate) const EDITS_PER_BASE: u64 = 16;
/// Bases that stay when a newer one is there.
const BASES_KEPT: u64 = 2;
/// Ended wals that are remembered though they are flushed, so that a machine that comes back learns what it lost.
const ENDED_WALS_KEPT: usize = 32;

/// `Err` says why an edit does not fit.
type Fit<T> = std::result::Result<T, String>;

/// A change of the manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Edit {
    /// Ssts and the level each comes into; those of level 0 form one run, the newest.
    pub added: Vec<(u8, Arc<SstMeta>)>,
    /// Runs of level 0 that come before that one, oldest first: what [`Edit::followed_by`] makes of several flushes.
    pub older_runs: Vec<Run>,
    /// Ssts that leave the tree, before the added ones come.
    pub removed: Vec<SstId>,
    /// Trees dropped, each at a seqno.
    pub dropped: Vec<(TreeId, Seqno)>,
    /// Dropped trees of which nothing is left.
    pub gone: Vec<TreeId>,
    /// The tree now holds all of the wal below here.
    pub flushed: Option<Flushed>,
    /// Tree ids below this one were given out, as far as the flushed wal says.
    pub next_tree: Option<TreeId>,
    /// First edit of an epoch: the wal of the one before ends here, and ours begins.
    pub take_over: Option<WalPosition>,
}

impl Edit {
    /// One edit that does what this one and then `later` do. Neither may have been sent.
    ///
    /// What this one adds and `later` removes is in neither list of the result: no manifest ever names it. An sst that
    /// only moves stays among the removed, as one that was there before.
    pub(crate) fn followed_by(mut self, later: Edit) -> Edit {
        assert!(self.take_over.is_none() && later.take_over.is_none(), "a take-over is an edit by itself");
        let ours: BTreeSet<SstId> = self.ssts().map(|sst| sst.id).collect();
        let gone: BTreeSet<SstId> = later.removed.iter().copied().collect();
        self.removed.extend(later.removed.into_iter().filter(|id| !ours.contains(id)));
        self.added.retain(|(_, sst)| !gone.contains(&sst.id));
        for run in &mut self.older_runs {
            if run.iter().any(|sst| gone.contains(&sst.id)) {
                *run = run.iter().filter(|sst| !gone.contains(&sst.id)).cloned().collect();
            }
        }
        if later.added.iter().any(|(level, _)| *level == 0) {
            let (newest, deeper) = self.added.into_iter().partition(|(level, _)| *level == 0);
            let newest: Vec<(u8, Arc<SstMeta>)> = newest;
            self.added = deeper;
            self.older_runs.push(newest.into_iter().map(|(_, sst)| sst).collect());
        }
        self.older_runs.extend(later.older_runs);
        self.older_runs.retain(|run| !run.is_empty());
        self.added.extend(later.added);
        self.gone.retain(|tree| !later.dropped.iter().any(|(dropped, _)| dropped == tree));
        self.gone.extend(later.gone);
        self.dropped.extend(later.dropped);
        self.flushed = later.flushed.or(self.flushed);
        self.next_tree = self.next_tree.max(later.next_tree);
        self
    }

    /// Every sst that it adds or moves, oldest run of level 0 first.
    pub(crate) fn ssts(&self) -> impl Iterator<Item = &Arc<SstMeta>> {
        self.older_runs.iter().flat_map(|run| run.iter()).chain(self.added.iter().map(|(_, sst)| sst))
    }
}

/// How much of the wal the tree holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flushed {
    /// The end of the last record that it holds.
    pub position: WalPosition,
    /// Its seqno.
    pub seqno: Seqno,
    /// Where the slice begins that holds `position`, or the one that will. Reading the wal from the bucket starts there.
    pub slice: WalPosition,
}

/// The wal of one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WalSpan {
    /// Whose it is.
    pub epoch: Epoch,
    /// Where it begins.
    pub start: WalPosition,
    /// Where reading its slices starts.
    pub slice: WalPosition,
    /// Where it ends; what its writer wrote behind that does not count. `None`: it is the newest.
    pub end: Option<WalPosition>,
}

/// What the objects of the manifest add up to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// The branch's random name.
    pub branch: BranchId,
    /// Of the newest edit.
    pub number: u64,
    /// Who wrote that edit; 0 before the first.
    pub epoch: Epoch,
    nonce: u64,
    /// The tree of runs.
    pub version: Version,
    /// How much of the wal it holds.
    pub flushed: Flushed,
    /// See [`Edit::next_tree`].
    pub next_tree: TreeId,
    /// Dropped trees of which ssts may still hold something.
    pub dropped: BTreeMap<TreeId, Seqno>,
    /// The wals of all epochs that took over and of which a start may need something, oldest first.
    pub wals: Vec<WalSpan>,
}

impl Manifest {
    /// The manifest of an empty branch.
    pub(crate) fn empty(branch: BranchId) -> Self {
        Self {
            branch,
            number: 0,
            epoch: Epoch(0),
            nonce: 0,
            version: Version::default(),
            flushed: Flushed::default(),
            next_tree: TreeId(0),
            dropped: BTreeMap::new(),
            wals: Vec::new(),
        }
    }

    /// This manifest after `edit`, which `header` says who wrote. An error says what does not fit.
    pub(crate) fn apply(&self, header: &Header, edit: &Edit) -> Fit<Manifest> {
        if header.branch != self.branch {
            return Err("it belongs to another branch".to_owned());
        }
        if header.number != self.number + 1 {
            return Err(format!("it calls itself number {}", header.number));
        }
        let mut next =
            Manifest { number: header.number, epoch: header.epoch, nonce: header.nonce, ..self.clone() };
        next.apply_take_over(header.epoch, edit.take_over)?;
        next.version = self.apply_ssts(edit).map_err(|misfit| misfit.to_string())?;
        if let Some(flushed) = edit.flushed {
            next.apply_flushed(flushed)?;
        }
        if let Some(tree) = edit.next_tree {
            next.next_tree = self.next_tree.max(tree);
        }
        next.dropped.extend(edit.dropped.iter().copied());
        edit.gone.iter().for_each(|tree| _ = next.dropped.remove(tree));
        next.forget_old_wals();
        Ok(next)
    }

    fn apply_ssts(&self, edit: &Edit) -> std::result::Result<Version, Misfit> {
        if edit.older_runs.is_empty() {
            return self.version.apply(&edit.added, &edit.removed);
        }
        let mut version = self.version.apply(&[], &edit.removed)?;
        for run in &edit.older_runs {
            let added: Vec<_> = run.iter().map(|sst| (0, Arc::clone(sst))).collect();
            version = version.apply(&added, &[])?;
        }
        version.apply(&edit.added, &[])
    }

    fn apply_take_over(&mut self, epoch: Epoch, take_over: Option<WalPosition>) -> Fit<()> {
        let last = self.wals.last_mut();
        match (last, take_over) {
            (None, None) => Err("the first edit of all takes nothing over".to_owned()),
            (Some(last), None) if last.epoch == epoch => Ok(()),
            (Some(last), None) => {
                Err(format!("epoch {} wrote it and {} had taken over", epoch.0, last.epoch.0))
            }
            (Some(last), Some(_)) if last.epoch >= epoch => {
                Err(format!("epoch {} takes over from {}", epoch.0, last.epoch.0))
            }
            (last, Some(start)) => {
                if start < self.flushed.position || last.as_ref().is_some_and(|last| start < last.start) {
                    return Err(format!("it ends a wal at {:#x}, before what is flushed", start.0));
                }
                if let Some(last) = last {
                    last.end = Some(start);
                }
                self.wals.push(WalSpan { epoch, start, slice: start, end: None });
                Ok(())
            }
        }
    }

    fn apply_flushed(&mut self, flushed: Flushed) -> Fit<()> {
        if flushed.position < self.flushed.position || flushed.seqno < self.flushed.seqno {
            return Err("it takes back what was flushed".to_owned());
        }
        if flushed.slice > flushed.position {
            return Err("its first wal slice lies behind what is flushed".to_owned());
        }
        self.flushed = flushed;
        let holds = |span: &&mut WalSpan| {
            span.start <= flushed.position && span.end.is_none_or(|end| flushed.position < end)
        };
        match self.wals.iter_mut().find(holds) {
            Some(span) => span.slice = span.slice.max(flushed.slice),
            None => return Err("it says that a place in no wal is flushed".to_owned()),
        }
        Ok(())
    }

    fn forget_old_wals(&mut self) {
        let flushed = self.flushed.position;
        while self.wals.len() > ENDED_WALS_KEPT && self.wals[0].end.is_some_and(|end| end <= flushed) {
            self.wals.remove(0);
        }
    }

    /// The wals that hold something above what is flushed, or may.
    pub(crate) fn wals_to_replay(&self) -> impl Iterator<Item = &WalSpan> {
        self.wals
            .iter()
            .filter(|span| span.end.is_none_or(|end| end > self.flushed.position && end > span.start))
    }

    /// Whether `wals` goes back to the first one.
    pub(crate) fn knows_all_wals(&self) -> bool {
        self.wals.len() < ENDED_WALS_KEPT
    }

    fn header(&self) -> Header {
        Header { branch: self.branch, number: self.number, epoch: self.epoch, nonce: self.nonce }
    }
}

/// Reads the newest manifest, or `None` if the branch has none yet.
///
/// `Corrupt` names the object. `Unavailable` if the store did not answer, or if others changed too much meanwhile.
///
/// Up to `at_once` requests are under way at a time.
pub(crate) fn load(bucket: &dyn Bucket, names: &Names, at_once: usize) -> Result<Option<Manifest>> {
    let listed = bucket.list(&names.manifests())?;
    let newest = listed.iter().filter_map(|object| Names::parse_base(&object.name)).max();
    let Some(mut base) = newest else { return Ok(None) };
    // A listing that is behind may end at an older base. Edits after that one may be cleaned away already, and must not
    // look like edits that were never written.
    while bucket.head(&names.manifest_base(base + EDITS_PER_BASE))?.is_some() {
        base += EDITS_PER_BASE;
    }
    let name = names.manifest_base(base);
    let Some(object) = fetch(bucket, &name)? else {
        return Err(Error::new(Kind::Unavailable, format!("{name} went away while it was read; try again")));
    };
    let mut manifest = format::decode_base(&object, name.as_str())?;
    if manifest.number != base {
        return Err(Error::corrupt(format!("{name} holds manifest base {}", manifest.number)));
    }
    // Those that the listing shows, all at once; where it ends, or is behind, one by one.
    let edits: Vec<u64> = listed.iter().filter_map(|object| Names::parse_edit(&object.name)).collect();
    let edits: Vec<u64> = (base + 1..).take_while(|number| edits.binary_search(number).is_ok()).collect();
    let ahead: Vec<ObjectName> = edits.iter().map(|number| names.manifest_edit(*number)).collect();
    let mut ahead = fetch_all(bucket, &ahead, at_once).into_iter();
    loop {
        let name = names.manifest_edit(manifest.number + 1);
        let object = ahead.next().unwrap_or_else(|| fetch(bucket, &name))?;
        let Some(object) = object else { return Ok(Some(manifest)) };
        let (header, edit) = format::decode_edit(&object, name.as_str())?;
        manifest = manifest.apply(&header, &edit).map_err(|why| misfit(&name, &why))?;
    }
}

/// An edit or a base in words.
pub(crate) fn describe(name: &ObjectName, object: &[u8]) -> Result<String> {
    if Names::parse_base(name).is_some() {
        let manifest = format::decode_base(object, name.as_str())?;
        let mut out = format!("base {}, last edited by epoch {}\n", manifest.number, manifest.epoch.0);
        out += &format!("flushed: {:x?}\nnext tree: {}\n", manifest.flushed, manifest.next_tree.0);
        manifest.wals.iter().for_each(|span| out += &format!("wal: {span:x?}\n"));
        manifest
            .dropped
            .iter()
            .for_each(|(tree, seqno)| out += &format!("dropped: tree {} at {}\n", tree.0, seqno.0));
        manifest
            .version
            .ssts()
            .for_each(|(level, sst)| out += &format!("level {level}: {}\n", sst_line(sst)));
        return Ok(out);
    }
    let (header, edit) = format::decode_edit(object, name.as_str())?;
    let mut out = format!("edit {} by epoch {}\n", header.number, header.epoch.0);
    edit.take_over.iter().for_each(|start| out += &format!("takes over; its wal begins at {:#x}\n", start.0));
    edit.removed.iter().for_each(|id| out += &format!("removes {id}\n"));
    for (age, run) in edit.older_runs.iter().rev().enumerate() {
        run.iter()
            .for_each(|sst| out += &format!("adds to level 0, {} runs older: {}\n", age + 1, sst_line(sst)));
    }
    edit.added.iter().for_each(|(level, sst)| out += &format!("adds to level {level}: {}\n", sst_line(sst)));
    edit.flushed.iter().for_each(|flushed| out += &format!("flushed: {flushed:x?}\n"));
    edit.next_tree.iter().for_each(|tree| out += &format!("next tree: {}\n", tree.0));
    edit.dropped.iter().for_each(|(tree, seqno)| out += &format!("drops tree {} at {}\n", tree.0, seqno.0));
    edit.gone.iter().for_each(|tree| out += &format!("nothing is left of tree {}\n", tree.0));
    Ok(out)
}

fn sst_line(sst: &SstMeta) -> String {
    let (first, last) = (Hex(&sst.first_key), Hex(&sst.last_key));
    let SstMeta { id, bytes, entries, tombstones, seqno_min, seqno_max, loaded, .. } = sst;
    let seqnos = if *loaded {
        format!("loaded at seqno {}", seqno_min.0)
    } else {
        format!("seqno {} to {}", seqno_min.0, seqno_max.0)
    };
    format!(
        "{id}, {bytes} bytes, {entries} versions ({tombstones} deletions), {seqnos}, keys {first} to {last}"
    )
}

/// Gives a new branch its first base, unless another writer does so at the same time; returns what it got.
///
/// A branch that has data and no base has lost it, and is not taken for a new one: `Corrupt`.
pub(crate) fn found(bucket: &dyn Bucket, names: &Names, branch: BranchId) -> Result<Manifest> {
    for directory in [names.ssts(), names.wals()] {
        if let Some(object) = bucket.list(&directory)?.first() {
            // Another writer may have founded the branch since we looked; then its base is older than its data.
            return load(bucket, names, 1)?.ok_or_else(|| {
                Error::corrupt(format!(
                    "{} has no base, but there is data such as {}: the manifest was lost",
                    names.manifests(),
                    object.name
                ))
            });
        }
    }
    let base = format::encode_base(&Manifest::empty(branch)).into();
    bucket.put_if_absent(&names.manifest_base(0), base)?;
    let none = || Error::corrupt(format!("{} is absent just after it was written", names.manifest_base(0)));
    load(bucket, names, 1)?.ok_or_else(none)
}

/// Publishes edits for one epoch, one after the other. One owner calls.
pub(crate) struct ManifestWriter {
    bucket: Arc<dyn Bucket>,
    names: Names,
    fence: Fence,
    nonce: u64,
    published: Manifest,
    pending: Option<Pending>,
    /// The base of the newest multiple is known to be in the bucket.
    based: bool,
    /// What the base of this number made superfluous is deleted.
    cleaned: u64,
}

/// An edit that may be in the bucket or not.
struct Pending {
    object: Bytes,
    next: Manifest,
    landed: bool,
}

/// What became of an attempt to take over.
pub(crate) enum TakeOver {
    /// The epoch is ours.
    Done(Box<ManifestWriter>),
    /// An edit of a lower epoch came first. Load the manifest and decide again.
    Overtaken,
}

impl ManifestWriter {
    /// Publishes `edit`, which must take over, as the successor of `manifest`.
    ///
    /// On an error the edit may have landed or may still. It must not be tried again in this epoch.
    pub(crate) fn take_over(
        bucket: Arc<dyn Bucket>,
        names: Names,
        fence: Fence,
        nonce: u64,
        manifest: Manifest,
        edit: &Edit,
    ) -> Result<TakeOver> {
        assert!(edit.take_over.is_some(), "the first edit of an epoch takes over");
        let mut writer = Self {
            bucket,
            names,
            fence,
            nonce,
            published: manifest,
            pending: None,
            based: false,
            cleaned: 0,
        };
        match writer.publish_or_meet(edit)? {
            Met::Nobody => Ok(TakeOver::Done(Box::new(writer))),
            Met::LowerEpoch => Ok(TakeOver::Overtaken),
        }
    }

    /// Returns once `edit` is part of the manifest for ever and this writer was still the newest after that.
    ///
    /// On `Unavailable` the edit may have landed: call again with the same edit, and with no other before that.
    /// `Fenced`: a newer writer owns the branch.
    pub(crate) fn publish(&mut self, edit: &Edit) -> Result<()> {
        assert!(edit.take_over.is_none(), "an epoch is taken over once");
        match self.publish_or_meet(edit)? {
            Met::Nobody => Ok(()),
            Met::LowerEpoch => {
                let name = self.names.manifest_edit(self.published.number + 1);
                Err(Error::corrupt(format!("{name} is of a lower epoch than the edits before it")))
            }
        }
    }

    /// What is published.
    pub(crate) fn manifest(&self) -> &Manifest {
        &self.published
    }

    /// Deletes bases and edits that no start needs any more, if a base was published since the last time. Returns
    /// whether anything was deleted.
    pub(crate) fn clean_step(&mut self) -> Result<bool> {
        let base = self.published.number / EDITS_PER_BASE * EDITS_PER_BASE;
        if !self.based || base < BASES_KEPT * EDITS_PER_BASE || self.cleaned == base {
            return Ok(false);
        }
        let oldest_kept = base - (BASES_KEPT - 1) * EDITS_PER_BASE;
        let listed = bucket_names(self.bucket.list(&self.names.manifests())?);
        let outdated = |name: &ObjectName| {
            Names::parse_base(name).is_some_and(|number| number < oldest_kept)
                || Names::parse_edit(name).is_some_and(|number| number <= oldest_kept)
        };
        let old: Vec<ObjectName> = listed.into_iter().filter(outdated).collect();
        if old.is_empty() {
            self.cleaned = base;
            return Ok(false);
        }
        self.fence.check()?;
        // Bases first: with its base gone, nobody starts to read edits that are about to go.
        let (bases, edits): (Vec<_>, Vec<_>) =
            old.into_iter().partition(|name| Names::parse_base(name).is_some());
        for batch in bases.chunks(1000).chain(edits.chunks(1000)) {
            self.bucket.delete(batch)?;
        }
        self.cleaned = base;
        Ok(true)
    }

    fn publish_or_meet(&mut self, edit: &Edit) -> Result<Met> {
        self.publish_base()?;
        if self.pending.is_none() {
            self.pending = Some(self.prepare(edit)?);
        }
        let pending = self.pending.as_mut().expect("set on the line above");
        let name = self.names.manifest_edit(pending.next.number);
        let same = format::encode_edit(&pending.next.header(), edit);
        if pending.object != same {
            return Err(Error::new(
                Kind::Bug,
                format!("{name} was sent with other content and may still land"),
            ));
        }
        if !pending.landed {
            points::pass(Point::BeforeEditPut);
            if self.bucket.put_if_absent(&name, pending.object.clone())? == PutOutcome::Exists {
                let found = self.bucket.get(&name)?;
                if found != pending.object {
                    return self.meet(&name, &found);
                }
            }
            pending.landed = true;
            points::pass(Point::AfterEditPut);
        }
        self.fence.check()?;
        let done = self.pending.take().expect("set above");
        self.based = self.based && !done.next.number.is_multiple_of(EDITS_PER_BASE);
        self.published = done.next;
        Ok(Met::Nobody)
    }

    fn prepare(&self, edit: &Edit) -> Result<Pending> {
        let header = Header {
            branch: self.published.branch,
            number: self.published.number + 1,
            epoch: self.fence.epoch(),
            nonce: self.nonce,
        };
        let next = self
            .published
            .apply(&header, edit)
            .map_err(|why| Error::new(Kind::Bug, format!("a manifest edit does not fit: {why}")))?;
        Ok(Pending { object: format::encode_edit(&header, edit).into(), next, landed: false })
    }

    /// Somebody else's edit has our number.
    fn meet(&self, name: &ObjectName, found: &[u8]) -> Result<Met> {
        let (header, _) = format::decode_edit(found, name.as_str())?;
        match header.epoch.cmp(&self.fence.epoch()) {
            std::cmp::Ordering::Greater => Err(self.fence.fenced_by(header.epoch, None)),
            std::cmp::Ordering::Less => Ok(Met::LowerEpoch),
            std::cmp::Ordering::Equal => {
                Err(Error::corrupt(format!("{name} was written by another process with our epoch")))
            }
        }
    }

    /// Before the edit after a multiple of [`EDITS_PER_BASE`], the base of that multiple. It may have been another
    /// writer's edit: whoever comes to write the next one does it.
    fn publish_base(&mut self) -> Result<()> {
        if self.based || !self.published.number.is_multiple_of(EDITS_PER_BASE) {
            return Ok(());
        }
        let name = self.names.manifest_base(self.published.number);
        // Another writer's base of this number says the same.
        self.bucket.put_if_absent(&name, format::encode_base(&self.published).into())?;
        self.based = true;
        Ok(())
    }
}

enum Met {
    Nobody,
    LowerEpoch,
}

fn misfit(name: &ObjectName, why: &str) -> Error {
    Error::corrupt(format!("the manifest edit {name} does not fit what was before it: {why}"))
}

fn bucket_names(listed: Vec<bucket::ObjectInfo>) -> Vec<ObjectName> {
    listed.into_iter().map(|object| object.name).collect()
}

#[cfg(test)]
mod tests;
