//! Deletes ssts that no manifest names and nobody reads. What goes is decided purely; the shell only carries it out.
//!
//! * Nothing is deleted that the published manifest names, that a version in memory names (readers and merges hold
//!   those), or that has a higher epoch than ours.
//! * Of our own epoch only what a published edit took out of the tree, and what a load gave up: an sst that is being uploaded is in
//!   no manifest yet. Of lower epochs all that neither the published manifest nor a record of the wal (a load) names: their
//!   writers are fenced and can't publish any more.
//! * Before the first deletion the claim is validated. A writer that is fenced between that and its deletions does no harm: both
//!   kinds of names are dead in the manifest it published last, every later one is built on that, and no
//!   name is ever used twice.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};

use bucket::{Bucket, Names, ObjectInfo, ObjectName};

use crate::points::{self, Point};
use crate::version::Version;
use crate::{Epoch, Result, SstId};

/// Names in one delete request; S3 takes a thousand.
const BATCH: usize = 1000;

/// Remembers which versions are alive in memory and which ssts of this writer are waiting to be deleted.
#[derive(Debug, Default)]
pub(crate) struct Graveyard {
    versions: Vec<Weak<Version>>,
    buried: BTreeSet<SstId>,
    /// Of these the bucket has nothing, and no manifest ever named one.
    unsent: BTreeSet<SstId>,
}

impl Graveyard {
    /// `version` may be read from now until its last `Arc` is gone. To be called before anybody else can take it.
    pub(crate) fn watch(&mut self, version: &Arc<Version>) {
        self.versions.retain(|seen| seen.strong_count() > 0);
        self.versions.push(Arc::downgrade(version));
    }

    /// An edit that takes `ssts` out of the tree has been published, or they were made for it and given up.
    pub(crate) fn bury(&mut self, ssts: impl IntoIterator<Item = SstId>) {
        self.buried.extend(ssts);
    }

    /// `ssts` have left the tree, and neither they nor the edit that brought them were ever sent, or will be.
    pub(crate) fn bury_unsent(&mut self, ssts: impl IntoIterator<Item = SstId>) {
        self.unsent.extend(ssts);
    }

    /// What was never sent and is held by nobody; forgotten here with the answer.
    pub(crate) fn dead_unsent(&mut self) -> Vec<SstId> {
        if self.unsent.is_empty() {
            return Vec::new();
        }
        let held = self.alive();
        let dead = self.unsent.iter().copied().filter(|id| !held.contains(id)).collect();
        self.unsent.retain(|id| held.contains(id));
        dead
    }

    /// What published edits took out, as far as nobody holds it. `published`: the tree as the bucket has it, which may
    /// have taken an sst in again (a move is a removal and an addition).
    pub(crate) fn dead(&self, published: &Version) -> Vec<SstId> {
        if self.buried.is_empty() {
            return Vec::new();
        }
        let held = self.held(published);
        self.buried.iter().copied().filter(|id| !held.contains(id)).collect()
    }

    /// `ssts` have been deleted.
    pub(crate) fn forget(&mut self, ssts: &[SstId]) {
        ssts.iter().for_each(|id| _ = self.buried.remove(id));
    }

    /// Every sst that must stay.
    pub(crate) fn held(&self, published: &Version) -> BTreeSet<SstId> {
        let mut held = self.alive();
        held.extend(published.ssts().map(|(_, sst)| sst.id));
        held
    }

    fn alive(&self) -> BTreeSet<SstId> {
        let alive: Vec<Arc<Version>> = self.versions.iter().filter_map(Weak::upgrade).collect();
        alive.iter().flat_map(|version| version.ssts()).map(|(_, sst)| sst.id).collect()
    }
}

/// The listed ssts of writers before `own` that are in no tree: uploaded, and then never published, or deleted by a writer that
/// did not get to the end. `held` as [`Graveyard::held`] tells it, after our first edit has been published.
pub(crate) fn orphans(listing: &[ObjectInfo], held: &BTreeSet<SstId>, own: Epoch) -> Vec<SstId> {
    let ids = listing.iter().filter_map(|object| Names::parse_sst(&object.name));
    let ids = ids.map(|(epoch, counter)| SstId { epoch: Epoch(epoch), counter });
    ids.filter(|id| id.epoch < own && !held.contains(id)).collect()
}

/// Deletes `ssts` from the bucket once `validate` has found that no newer writer claimed the branch. On an error some may be
/// gone; the same call again does the rest.
pub(crate) fn delete(
    bucket: &dyn Bucket,
    names: &Names,
    ssts: &[SstId],
    validate: impl Fn() -> Result<()>,
) -> Result<()> {
    let objects: Vec<ObjectName> = ssts.iter().map(|id| names.sst(id.epoch.0, id.counter)).collect();
    for batch in objects.chunks(BATCH) {
        validate()?;
        points::pass(Point::BeforeDelete);
        bucket.delete(batch)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::version::tests::{id, sst};
    use crate::{Error, Kind};

    fn names() -> Names {
        Names::new("main")
    }

    fn listed(ids: &[(u64, u64)]) -> Vec<ObjectInfo> {
        ids.iter()
            .map(|(epoch, counter)| ObjectInfo { name: names().sst(*epoch, *counter), bytes: 1 })
            .collect()
    }

    #[test]
    fn an_orphan_is_of_a_lower_epoch_and_in_no_tree() {
        let of = |epoch, counter| SstId { epoch: Epoch(epoch), counter };
        let held = BTreeSet::from([of(1, 1), of(2, 1)]);
        let mut listing = listed(&[(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1)]);
        listing.push(ObjectInfo { name: names().manifest_base(7), bytes: 1 });
        assert_eq!(orphans(&listing, &held, Epoch(3)), [of(1, 2), of(2, 2)]);
        assert_eq!(orphans(&listing, &held, Epoch(1)), []);
    }

    #[test]
    fn what_a_reader_holds_outlives_its_removal() {
        let mut graveyard = Graveyard::default();
        let old = Arc::new(
            Version::default()
                .apply(&[(1, sst(1, "a", "b", 1)), (1, sst(2, "c", "d", 1))], &[])
                .expect("fits"),
        );
        let new = Arc::new(old.apply(&[(2, sst(2, "c", "d", 1))], &[id(1), id(2)]).expect("fits"));
        graveyard.watch(&old);
        graveyard.watch(&new);
        graveyard.bury([id(1), id(2)]);
        assert_eq!(graveyard.dead(&new), [], "the old version is still read");
        drop(old);
        assert_eq!(graveyard.dead(&new), [id(1)], "the second was moved and not removed");
        graveyard.forget(&[id(1)]);
        assert_eq!(graveyard.dead(&new), []);
    }

    #[test]
    fn what_the_published_manifest_names_stays_though_memory_has_moved_on() {
        let mut graveyard = Graveyard::default();
        let published = Version::default().apply(&[(1, sst(1, "a", "b", 1))], &[]).expect("fits");
        let memory = Arc::new(Version::default());
        graveyard.watch(&memory);
        graveyard.bury([id(1)]);
        assert_eq!(graveyard.dead(&published), []);
        assert_eq!(graveyard.dead(&memory), [id(1)]);
    }

    #[test]
    fn a_fenced_writer_deletes_nothing() {
        let bucket = bucket::MemoryBucket::default();
        let name = names().sst(1, 1);
        bucket.put(&name, bytes::Bytes::from_static(b"rows")).expect("memory does not fail");
        let fenced = || Err(Error::new(Kind::Fenced, "epoch 2 is claimed"));
        let error = delete(&bucket, &names(), &[id(1)], fenced).expect_err("fenced");
        assert_eq!(error.kind(), Kind::Fenced);
        assert_eq!(bucket.head(&name).expect("memory does not fail"), Some(4));
        delete(&bucket, &names(), &[id(1)], || Ok(())).expect("the claim is valid");
        assert_eq!(bucket.head(&name).expect("memory does not fail"), None);
    }
}
