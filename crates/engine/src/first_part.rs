//! Where the first part of a key ends, for each tree whose keys have one: so that runs which hold no key with a certain
//! first part are passed over without a look at their blocks.
//!
//! * The engine knows nothing else about the insides of a key. A tree of which it knows no rule is read as a whole.
//! * What a tree's rule says never changes while ssts of it exist; it can be forgotten and told again.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::sst::hash;
use crate::{TreeId, tree_of};

/// The rule of one tree.
pub trait FirstPart: Send + Sync {
    /// How many bytes of `key` its first part has; `None` if `key` has no whole one. Looks at no byte after these, so that all
    /// keys that start with these bytes get the same answer.
    fn end(&self, key: &[u8]) -> Option<usize>;
}

/// The rules of all trees, as far as they are known. Asked for each seek by all threads, so a look takes no lock and touches no count that
/// they share; a change copies its part.
pub(crate) struct FirstParts {
    parts: [ArcSwap<Rules>; PARTS],
}

type Rules = BTreeMap<TreeId, Arc<dyn FirstPart>>;
/// Tree ids are given out one by one, so the low bits spread them well.
const PARTS: usize = 64;

impl Default for FirstParts {
    fn default() -> Self {
        Self { parts: std::array::from_fn(|_| ArcSwap::default()) }
    }
}

/// Which keys are sought: those that start with `prefix`.
pub(crate) struct Probe<'a> {
    /// A full key, or the beginning of one.
    pub(crate) prefix: &'a [u8],
    pub(crate) tree: TreeId,
    /// [`hash`] of tree and first part; `None`: it has no whole one, or where it ends is not known.
    pub(crate) hash: Option<u64>,
}

impl FirstParts {
    pub(crate) fn set(&self, tree: TreeId, rule: Arc<dyn FirstPart>) {
        self.change(tree, |rules| drop(rules.insert(tree, Arc::clone(&rule))));
    }

    pub(crate) fn forget(&self, tree: TreeId) {
        self.change(tree, |rules| drop(rules.remove(&tree)));
    }

    pub(crate) fn rule(&self, tree: TreeId) -> Option<Arc<dyn FirstPart>> {
        self.part(tree).load().get(&tree).cloned()
    }

    /// For the full keys that start with `prefix`.
    pub(crate) fn probe<'a>(&self, prefix: &'a [u8]) -> Probe<'a> {
        let tree = tree_of(prefix);
        let end = self.part(tree).load().get(&tree).and_then(|rule| rule.end(&prefix[4..]));
        Probe { prefix, tree, hash: end.map(|end| hash(&prefix[..4 + end])) }
    }

    fn part(&self, tree: TreeId) -> &ArcSwap<Rules> {
        &self.parts[tree.0 as usize % PARTS]
    }

    fn change(&self, tree: TreeId, change: impl Fn(&mut Rules)) {
        self.part(tree).rcu(|rules| {
            let mut rules = Rules::clone(rules);
            change(&mut rules);
            rules
        });
    }
}

/// The least full key after all that start with `prefix`.
pub(crate) fn successor(prefix: &[u8]) -> Vec<u8> {
    let mut after = Vec::new();
    successor_into(prefix, &mut after);
    after
}

/// The same, in memory that is there.
pub(crate) fn successor_into(prefix: &[u8], after: &mut Vec<u8>) {
    let kept = prefix.iter().rposition(|byte| *byte != u8::MAX).expect("tree ids stay below 2^32 - 1");
    after.clear();
    after.extend_from_slice(&prefix[..=kept]);
    after[kept] += 1;
}
