//! Which versions of a key somebody can still see.
//!
//! * Every live snapshot, and every one taken later, reads the same after the others are gone.
//! * A deletion goes once nothing older of its key is left for it to hide.

use crate::{OpKind, Seqno};

/// Judges a stream of versions in order (key ascending, newest first). One `Retention` for one stream.
pub(crate) struct Retention<'a> {
    snapshots: &'a [Seqno],
    /// Of the key last seen: the snapshot that its last version was judged for, and that version's seqno.
    last: Option<(usize, Seqno)>,
}

impl<'a> Retention<'a> {
    /// `snapshots`: what is read at now, ascending, the newest visible seqno last. Later snapshots are at or after that one.
    pub(crate) fn new(snapshots: &'a [Seqno]) -> Self {
        assert!(!snapshots.is_empty(), "the newest visible seqno is always a snapshot");
        assert!(snapshots.is_sorted(), "snapshots must ascend");
        Self { snapshots, last: None }
    }

    /// The stream has come to the next key.
    pub(crate) fn next_key(&mut self) {
        self.last = None;
    }

    /// Whether somebody needs this version of the current key. `older_elsewhere` is asked only for a deletion: may there be an older
    /// version of the key outside this stream?
    pub(crate) fn keeps(
        &mut self,
        seqno: Seqno,
        kind: OpKind,
        older_elsewhere: impl FnOnce() -> bool,
    ) -> bool {
        // The oldest snapshot that sees this version; none if it is newer than all of them.
        let stripe = self.snapshots.partition_point(|snapshot| *snapshot < seqno);
        let shadowed = match self.last {
            Some((_, newer)) if newer == seqno => true, // the same version twice
            Some((last, newer)) => {
                assert!(newer > seqno, "versions of one key must come newest first");
                last == stripe && stripe < self.snapshots.len()
            }
            None => false,
        };
        self.last = Some((stripe, seqno));
        let hides_nothing = kind == OpKind::Delete && stripe == 0 && !older_elsewhere();
        !shadowed && !hides_nothing
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kept(snapshots: &[u64], versions: &[(u64, OpKind)], older_elsewhere: bool) -> Vec<u64> {
        let snapshots: Vec<Seqno> = snapshots.iter().copied().map(Seqno).collect();
        let mut retention = Retention::new(&snapshots);
        let keeps =
            |(seqno, kind): &&(u64, OpKind)| retention.keeps(Seqno(*seqno), *kind, || older_elsewhere);
        versions.iter().filter(keeps).map(|(seqno, _)| *seqno).collect()
    }

    use OpKind::{Delete, Put};

    #[test]
    fn the_newest_version_of_each_snapshot_stays_and_what_is_newer_than_all() {
        let versions = [(9, Put), (8, Put), (7, Put), (5, Put), (4, Put), (2, Put)];
        assert_eq!(kept(&[3, 6, 7], &versions, true), [9, 8, 7, 5, 2]);
        assert_eq!(kept(&[9], &versions, true), [9]);
        assert_eq!(kept(&[0], &versions, true), [9, 8, 7, 5, 4, 2]);
    }

    #[test]
    fn a_deletion_goes_with_what_it_hides_and_not_before() {
        assert!(kept(&[9], &[(5, Delete), (3, Put)], false).is_empty());
        assert_eq!(kept(&[9], &[(5, Delete), (3, Put)], true), [5], "an older version lies deeper");
        assert_eq!(kept(&[4, 9], &[(5, Delete), (3, Put)], false), [5, 3], "snapshot 4 still reads the put");
        assert_eq!(kept(&[4], &[(5, Delete), (3, Put)], false), [5, 3], "nobody has seen the deletion yet");
    }

    #[test]
    fn a_version_that_comes_twice_stays_once() {
        assert_eq!(kept(&[9], &[(5, Put), (5, Put)], true), [5]);
        assert_eq!(kept(&[1], &[(5, Put), (5, Put), (4, Put), (4, Put)], true), [5, 4]);
    }

    fn read(versions: &[(u64, OpKind)], at: u64) -> Option<u64> {
        versions
            .iter()
            .find(|(seqno, _)| *seqno <= at)
            .filter(|(_, kind)| *kind == Put)
            .map(|(seqno, _)| *seqno)
    }

    proptest! {
        #[test]
        fn every_snapshot_reads_the_same_before_and_after(
            versions in prop::collection::btree_map(1u64..40, prop::bool::ANY, 0..20),
            snapshots in prop::collection::btree_set(0u64..40, 1..6),
            deeper in prop::bool::ANY,
        ) {
            let versions: Vec<(u64, OpKind)> =
                versions.iter().rev().map(|(s, put)| (*s, if *put { Put } else { Delete })).collect();
            let snapshots: Vec<u64> = snapshots.into_iter().collect();
            let names = kept(&snapshots, &versions, deeper);
            let after: Vec<_> = versions.iter().copied().filter(|(s, _)| names.contains(s)).collect();
            let visible = snapshots[snapshots.len() - 1];
            for at in snapshots.iter().copied().chain(visible..40) {
                prop_assert_eq!(read(&versions, at), read(&after, at), "at {}", at);
                if deeper {
                    // What lies deeper must stay hidden for whoever did not see it.
                    prop_assert_eq!(versions.iter().any(|(s, _)| *s <= at), after.iter().any(|(s, _)| *s <= at));
                }
            }
            let needed = snapshots.len() + versions.iter().filter(|(s, _)| *s > visible).count();
            prop_assert!(after.len() <= needed, "one version for each snapshot is enough");
        }
    }
}
