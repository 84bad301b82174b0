//! Where one output sst ends and the next begins, and whether something older lies deeper. Both walk the deeper levels
//! along with the merge, so each question costs a comparison.
//!
//! * All versions of a key are in one sst.
//! * Below L0 an sst holds one tree. In L0 a tree gets an sst of its own if it fills one worth moving.
//! * Near its full size an output ends where an sst of the level beneath ends, so that the next merge touches few.
//! * An output never reaches across an sst that stays in its level: the runs of L0 have gaps, and what lies in a gap is no
//!   input.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::pick::MergePlan;
use crate::limits::Shape;
use crate::version::{SstMeta, Version};
use crate::{SstId, TreeId, tree_of};

/// Output may overlap this many full ssts of the next level before it is cut short.
const GRANDPARENTS_MAX: u64 = 10;

/// Decides where outputs end. Keys must ascend from call to call.
pub(crate) struct Cutter<'a> {
    to: usize,
    sst_bytes: u64,
    next_level: &'a [Arc<SstMeta>],
    staying: Vec<&'a SstMeta>,
    tree: Option<TreeId>,
    overlapped: u64,
}

impl<'a> Cutter<'a> {
    /// For a flush: outputs in L0. They may have twice the size, so that a memtable is one sst and not one and a bit.
    pub(crate) fn for_flush(shape: &Shape) -> Self {
        let sst_bytes = 2 * shape.sst_bytes as u64;
        Self { to: 0, sst_bytes, next_level: &[], staying: Vec::new(), tree: None, overlapped: 0 }
    }

    /// For the outputs of `plan`, made in `version`, beginning at or after `first`.
    pub(crate) fn for_merge(version: &'a Version, plan: &MergePlan, first: &[u8], shape: &Shape) -> Self {
        let inputs: BTreeSet<SstId> = plan.inputs().map(|sst| sst.id).collect();
        let beside = version.overlapping(plan.to, first, &plan.last).iter();
        // Taken from the end of the vector as the keys ascend.
        let staying = beside.rev().filter(|sst| !inputs.contains(&sst.id)).map(|sst| &**sst).collect();
        let run: &[_] = version.levels.get(plan.to).map_or(&[], |run| run);
        let next_level = &run[run.partition_point(|sst| *sst.last_key < *first)..];
        let sst_bytes = shape.sst_bytes as u64;
        Self { to: plan.to, sst_bytes, next_level, staying, ..Self::for_flush(shape) }
    }

    /// Whether the output, `bytes` long so far (0: not begun), must end before `key`, a key not seen before.
    pub(crate) fn ends_before(&mut self, key: &[u8], bytes: u64) -> bool {
        let crossed = self.cross(key);
        let over_staying = self.pass_staying(key);
        let tree = Some(tree_of(key));
        let other_tree = self.tree != tree;
        self.tree = tree;
        let other_tree_bytes = if self.to == 0 { self.sst_bytes / 16 } else { 1 };
        let ends = bytes > 0
            && (over_staying
                || (other_tree && bytes >= other_tree_bytes)
                || bytes >= self.sst_bytes
                || (crossed && bytes >= self.sst_bytes / 2)
                || (crossed && self.overlapped >= GRANDPARENTS_MAX * self.sst_bytes));
        if ends || bytes == 0 {
            self.overlapped = 0;
        }
        ends
    }

    fn cross(&mut self, key: &[u8]) -> bool {
        let mut crossed = false;
        while let Some((sst, rest)) = self.next_level.split_first().filter(|(sst, _)| *sst.last_key < *key) {
            self.overlapped += sst.bytes;
            self.next_level = rest;
            crossed = true;
        }
        crossed
    }

    fn pass_staying(&mut self, key: &[u8]) -> bool {
        let mut passed = false;
        while self.staying.pop_if(|sst| *sst.last_key < *key).is_some() {
            passed = true;
        }
        passed
    }
}

/// Tells whether levels deeper than the output may hold a key. Keys must ascend from call to call.
pub(crate) struct Deeper<'a> {
    levels: Vec<&'a [Arc<SstMeta>]>,
}

impl<'a> Deeper<'a> {
    /// Looks at all levels below `to`.
    pub(crate) fn new(version: &'a Version, to: usize) -> Self {
        Self {
            levels: version.levels[to..].iter().map(|run| &run[..]).filter(|run| !run.is_empty()).collect(),
        }
    }

    /// Whether there may be a version of `key` down there.
    pub(crate) fn may_hold(&mut self, key: &[u8]) -> bool {
        self.levels.iter_mut().any(|run| {
            // Far jumps are rare (a merge over a gap), steps of one the rule; a binary search serves both.
            if run.first().is_some_and(|sst| *sst.last_key < *key) {
                *run = &run[run.partition_point(|sst| *sst.last_key < *key)..];
            }
            run.first().is_some_and(|sst| *sst.first_key <= *key)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::full_key;
    use crate::version::tests::{in_tree, sst};

    fn shape() -> Shape {
        Shape { sst_bytes: 100, ..Shape::default() }
    }

    fn key(tree: u32, text: &str) -> Vec<u8> {
        full_key(TreeId(tree), text.as_bytes())
    }

    fn plan(to: usize, sources: &[Arc<SstMeta>]) -> MergePlan {
        MergePlan::new(vec![sources.into()], to)
    }

    #[test]
    fn outputs_end_at_their_size_and_at_tree_boundaries() {
        let version = Version::default();
        let plan = plan(3, &[sst(1, "a", "z", 1)]);
        let mut cutter = Cutter::for_merge(&version, &plan, &key(1, "a"), &shape());
        assert!(!cutter.ends_before(&key(1, "a"), 0));
        assert!(!cutter.ends_before(&key(1, "b"), 99));
        assert!(cutter.ends_before(&key(1, "c"), 100));
        assert!(cutter.ends_before(&key(2, "a"), 1));
    }

    #[test]
    fn a_small_tree_shares_its_sst_in_l0() {
        let mut cutter = Cutter::for_flush(&shape());
        assert!(!cutter.ends_before(&key(1, "a"), 0));
        assert!(!cutter.ends_before(&key(2, "a"), 11));
        assert!(cutter.ends_before(&key(3, "a"), 50));
    }

    #[test]
    fn a_half_full_output_ends_where_the_level_beneath_does() {
        let below = [(3, sst(1, "b", "d", 100)), (3, sst(2, "f", "h", 100)), (3, sst(3, "j", "k", 100))];
        let version = Version::default().apply(&below, &[]).expect("fits");
        let plan = plan(2, &[sst(9, "a", "z", 1)]);
        let mut cutter = Cutter::for_merge(&version, &plan, &key(1, "a"), &shape());
        assert!(!cutter.ends_before(&key(1, "a"), 0));
        assert!(!cutter.ends_before(&key(1, "e"), 49), "too small to end here");
        assert!(!cutter.ends_before(&key(1, "g"), 60), "no boundary here");
        assert!(cutter.ends_before(&key(1, "i"), 60));
    }

    #[test]
    fn an_output_over_much_of_the_level_beneath_is_cut_short() {
        let below = [(3, sst(1, "b", "d", 900)), (3, sst(2, "f", "h", 900))];
        let version = Version::default().apply(&below, &[]).expect("fits");
        let plan = plan(2, &[sst(9, "a", "z", 1)]);
        let mut cutter = Cutter::for_merge(&version, &plan, &key(1, "a"), &shape());
        assert!(!cutter.ends_before(&key(1, "a"), 0));
        assert!(!cutter.ends_before(&key(1, "e"), 1));
        assert!(cutter.ends_before(&key(1, "i"), 2));
    }

    #[test]
    fn an_output_never_reaches_across_an_sst_that_stays() {
        let version = Version::default()
            .apply(&[(2, sst(1, "a", "b", 1)), (2, sst(2, "m", "n", 1))], &[])
            .expect("fits");
        let plan = MergePlan::new(
            vec![[sst(8, "a", "c", 1), sst(9, "x", "z", 1)].into(), version.levels[1][..1].into()],
            2,
        );
        let mut cutter = Cutter::for_merge(&version, &plan, &key(1, "a"), &shape());
        assert!(!cutter.ends_before(&key(1, "a"), 0));
        assert!(!cutter.ends_before(&key(1, "c"), 1), "what it passes here is an input");
        assert!(cutter.ends_before(&key(1, "x"), 2));
        assert!(!cutter.ends_before(&key(1, "y"), 1));
    }

    #[test]
    fn deeper_levels_are_all_asked() {
        let version = Version::default()
            .apply(
                &[(2, sst(1, "b", "d", 1)), (4, sst(2, "f", "h", 1)), (4, in_tree(2, 3, "a", "c", 1))],
                &[],
            )
            .expect("fits");
        let mut below_l1 = Deeper::new(&version, 1);
        let answers: Vec<bool> =
            ["a", "b", "d", "e", "g", "z"].iter().map(|k| below_l1.may_hold(&key(1, k))).collect();
        assert_eq!(answers, [false, true, true, false, true, false]);
        assert!(below_l1.may_hold(&key(2, "b")));
        assert!(!Deeper::new(&version, 2).may_hold(&key(1, "b")));
        assert!(!Deeper::new(&version, 6).may_hold(&key(1, "g")));
    }
}
