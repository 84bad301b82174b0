//! A store in memory with every version of every key: stands in for memtable, ssts and wal until they are joined up.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Bound;

use parking_lot::RwLock;

use crate::{OpKind, Seqno, TreeId, tree_of};

type VersionKey = (Vec<u8>, Reverse<Seqno>);

#[derive(Default)]
pub(crate) struct NaiveStore {
    versions: RwLock<BTreeMap<VersionKey, (OpKind, Vec<u8>)>>,
}

impl NaiveStore {
    pub(crate) fn apply<'a>(
        &self,
        seqno: Seqno,
        writes: impl Iterator<Item = (&'a [u8], Option<&'a [u8]>)>,
        drops: &[TreeId],
    ) {
        let mut versions = self.versions.write();
        for (key, value) in writes {
            let op = value.map_or((OpKind::Delete, Vec::new()), |value| (OpKind::Put, value.to_vec()));
            versions.insert((key.to_vec(), Reverse(seqno)), op);
        }
        if !drops.is_empty() {
            versions.retain(|(key, _), _| !drops.contains(&tree_of(key)));
        }
    }

    pub(crate) fn get<R>(&self, key: &[u8], at: Seqno, f: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let versions = self.versions.read();
        let from = (key.to_vec(), Reverse(at));
        let (found, (kind, value)) = versions.range(from..).next()?;
        (found.0 == key && *kind == OpKind::Put).then(|| f(value))
    }

    pub(crate) fn newest(&self, key: &[u8]) -> Option<Seqno> {
        let versions = self.versions.read();
        let (found, _) = versions.range((key.to_vec(), Reverse(Seqno(u64::MAX)))..).next()?;
        (found.0 == key).then_some(found.1.0)
    }

    /// The first visible entry in (`from`, `end`).
    pub(crate) fn after(&self, from: Bound<&[u8]>, end: &[u8], at: Seqno) -> Option<(Vec<u8>, Vec<u8>)> {
        let versions = self.versions.read();
        let start = match from {
            Bound::Included(key) => Bound::Included((key.to_vec(), Reverse(Seqno(u64::MAX)))),
            Bound::Excluded(key) => Bound::Excluded((key.to_vec(), Reverse(Seqno(0)))),
            Bound::Unbounded => Bound::Unbounded,
        };
        let mut decided: Option<&[u8]> = None;
        for ((key, Reverse(seqno)), (kind, value)) in versions.range((start, Bound::Unbounded)) {
            if key.as_slice() >= end {
                return None;
            }
            if *seqno > at || decided == Some(key) {
                continue;
            }
            if *kind == OpKind::Put {
                return Some((key.clone(), value.clone()));
            }
            decided = Some(key);
        }
        None
    }

    /// The last visible entry in [`begin`, `before`).
    pub(crate) fn before(&self, before: &[u8], begin: &[u8], at: Seqno) -> Option<(Vec<u8>, Vec<u8>)> {
        let versions = self.versions.read();
        let mut end = (before.to_vec(), Reverse(Seqno(u64::MAX)));
        loop {
            let (key, _) = versions.range(..end).next_back()?.0.clone();
            if key.as_slice() < begin {
                return None;
            }
            let visible = versions.range((key.clone(), Reverse(at))..).next();
            if let Some((found, (OpKind::Put, value))) = visible {
                if found.0 == key {
                    return Some((key, value.clone()));
                }
            }
            end = (key, Reverse(Seqno(u64::MAX)));
        }
    }
}
