//! Several sorted sources walked as one, both ways.
//!
//! * All versions of all sources are shown, in order; of equal ones (same key and seqno) the one from the source that
//!   was added first comes first.
//! * Each source stands on its own next version in the direction of travel. `order` holds the sources that stand on
//!   one, sorted, so the merge stands where the first of them does.
//! * A step moves one source and lets it sink to its place. Most versions of a table are in one deep level, so mostly
//!   it stays first, after one comparison of two integers: cheaper than a heap, which always compares twice a level.
//! * Where one source stays first for long, it is asked once how far ([`Merge::look_ahead`]), and glides there without a
//!   comparison.

use std::cmp::Ordering;

use crate::first_part::Probe;
use crate::memtable::MemtableIter;
use crate::source::{Glided, Source, Standing, Way, pass_by_steps};
use crate::sst::LevelIter;
use crate::writeset::WriteSetIter;
use crate::{OpKind, Result, Seqno};

/// What a cursor's merge is made of, told apart without a virtual call.
pub(crate) enum AnySource {
    /// Writes of the transaction that reads.
    WriteSet(WriteSetIter),
    /// A memtable, frozen or not.
    Memtable(MemtableIter),
    /// A run of L0, or a level below it.
    Level(LevelIter),
}

/// Steps that a source stays first before it is asked for how long it will.
const STAYS_MIN: i32 = 2;
/// Fewer free steps than this were not worth the question, and for so many steps it is not asked again.
const FREE_MIN: usize = 4;
const STAYS_AFTER_POOR_LOOK: i32 = -16;
const NO_SOURCE: usize = usize::MAX;

/// Several sorted sources as one [`Source`].
///
/// After a failed step or seek it stands on nothing, and only a seek is of use.
pub struct Merge<S> {
    sources: Vec<S>,
    /// What each source in `order` stands on.
    standings: Vec<Standing>,
    order: Vec<usize>,
    /// Direction of travel.
    ahead: bool,
    /// Steps ahead for which the first source surely stays first. While it glides its standing is not kept up.
    free: usize,
    /// For how many steps the first source has stayed first; below zero after a look ahead that was not worth it.
    stays: i32,
    /// The source whose look ahead was the last one that was worth it.
    glider: usize,
    /// Steps in vain that no sst was charged with yet; see [`Merge::charge`].
    wasted: usize,
    /// The key that the merge stands on and a zero byte, while sources are brought to it.
    key: Vec<u8>,
}

impl<S> Default for Merge<S> {
    fn default() -> Self {
        Self {
            sources: Vec::new(),
            standings: Vec::new(),
            order: Vec::new(),
            ahead: true,
            free: 0,
            stays: 0,
            glider: NO_SOURCE,
            wasted: 0,
            key: Vec::new(),
        }
    }
}

impl<S: Source> Merge<S> {
    /// A merge of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a source; then the merge stands on nothing until a seek. Only the first source may ever be stale: a write
    /// set is added before all others.
    pub fn add(&mut self, source: S) {
        self.sources.push(source);
        self.standings.push(Standing::NOWHERE);
        self.order.clear();
    }

    /// The source added last.
    pub(crate) fn last_mut(&mut self) -> Option<&mut S> {
        self.sources.last_mut()
    }

    /// Lets go of all sources and keeps the memory for others.
    pub fn clear(&mut self) {
        self.sources.clear();
        self.standings.clear();
        self.order.clear();
    }

    /// Sources added.
    pub fn len(&self) -> usize {
        self.sources.len()
    }

    /// Whether no source was added.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    #[inline]
    fn first(&self) -> &S {
        &self.sources[*self.order.first().expect("only a valid source is asked for its version")]
    }

    fn seek_all(&mut self, ahead: bool, mut seek: impl FnMut(&mut S) -> Result<()>) -> Result<()> {
        self.order.clear();
        (self.free, self.stays, self.glider) = (0, 0, NO_SOURCE);
        self.sources.iter_mut().try_for_each(&mut seek)?;
        self.ahead = ahead;
        self.sort();
        Ok(())
    }

    /// What it stands on. Not while it glides.
    #[inline]
    pub(crate) fn stands_on(&self) -> Option<&Standing> {
        debug_assert_eq!(self.free, 0, "the standing of a source that glides is not kept up");
        self.order.first().map(|&first| &self.standings[first])
    }

    /// The version that it stands on is of no use to the reader.
    #[inline]
    pub(crate) fn waste_one(&mut self) {
        if let Some(&first) = self.order.first() {
            self.sources[first].waste(1);
        }
    }

    /// One step in the direction of travel.
    #[inline]
    fn step(&mut self) -> Result<()> {
        let moving = *self.order.first().expect("a merge that stands on nothing was moved");
        self.go(0, if self.ahead { Way::Next } else { Way::Prev })?;
        self.note_first(moving);
        Ok(())
    }

    /// Past all versions of the key that it stands on; only on the way forward.
    #[inline]
    fn step_over_key(&mut self) -> Result<()> {
        let first = *self.order.first().expect("a merge that stands on nothing was moved");
        let head = self.standings[first].head;
        let is_same = |&other: &usize| {
            self.standings[other].head == head && self.compare_keys(first, other) == Ordering::Equal
        };
        let same = 1 + self.order[1..].iter().take_while(|other| is_same(other)).count();
        if same > 1 {
            self.sources[first].waste(same - 1);
        }
        // From the last one on, so that what is behind the one that moves is sorted.
        for at in (0..same).rev() {
            self.go(at, Way::PassKey)?;
        }
        self.note_first(first);
        Ok(())
    }

    /// Moves the source at `order[at]`, behind which all is sorted, and finds its place.
    #[inline]
    fn go(&mut self, at: usize, way: Way) -> Result<()> {
        let moving = self.order[at];
        match self.sources[moving].go(way, &mut self.standings[moving]) {
            Ok(true) => (),
            Ok(false) => {
                self.order.remove(at);
                return Ok(());
            }
            Err(error) => {
                self.order.clear();
                return Err(error);
            }
        }
        let head = self.standings[moving].head;
        let mut place = at;
        while let Some(&other) = self.order.get(place + 1) {
            let before = match self.standings[other].head.cmp(&head) {
                Ordering::Equal => self.is_before(other, moving),
                unequal => (unequal == Ordering::Less) == self.ahead,
            };
            if !before {
                break;
            }
            self.order[place] = other;
            place += 1;
        }
        self.order[place] = moving;
        Ok(())
    }

    /// Counts for how long the first source has been first. One that interrupts another's long glide does not count.
    #[inline]
    fn note_first(&mut self, was: usize) {
        let now = self.order.first();
        self.stays = match self.stays {
            stays if now == Some(&was) || stays < 0 => stays + 1,
            _ if now == Some(&self.glider) => STAYS_MIN,
            _ => 0,
        };
    }

    /// Where the same source has been first for some steps, finds out for how many more it will be, as long as keys are
    /// below `limit`; [`Merge::glide`] then takes those. Only of use on the way forward.
    #[inline]
    pub(crate) fn look_ahead(&mut self, limit: &[u8]) {
        if self.stays >= STAYS_MIN && self.free == 0 && self.ahead {
            self.find_free(limit);
        }
    }

    fn find_free(&mut self, limit: &[u8]) {
        let (Some(&first), second) = (self.order.first(), self.order.get(1)) else { return };
        let bound = second.map_or(limit, |&second| self.sources[second].key().min(limit));
        self.free = self.sources[first].steps_before(bound);
        let poor = self.free < FREE_MIN;
        (self.stays, self.glider) =
            if poor { (STAYS_AFTER_POOR_LOOK, NO_SOURCE) } else { (STAYS_MIN, first) };
    }

    /// Takes steps that [`Merge::look_ahead`] found, as [`Source::glide`] does. `false`: none is left, or they are not to
    /// be trusted any more; then only [`Source::next`] goes on, or [`Source::pass_key`] if it is still `passing`.
    #[inline]
    pub(crate) fn glide(&mut self, at: Seqno, passing: &mut bool) -> bool {
        if self.free == 0 {
            return false;
        }
        if self.stale() {
            // A source that is stale is looked at again by the next step, which reads all standings anew.
            self.stop_gliding();
            return false;
        }
        let first = self.order[0];
        let source = &mut self.sources[first];
        let glided = source.glide(self.free, at, passing);
        self.free -= glided.steps;
        if glided.dead > 0 {
            source.waste(glided.dead);
        }
        if self.free == 0 {
            self.standings[first] = source.standing();
        }
        glided.found
    }

    fn stop_gliding(&mut self) {
        if self.free > 0 {
            self.free = 0;
            let first = self.order[0];
            self.standings[first] = self.sources[first].standing();
        }
    }

    /// One step against the direction of travel so far.
    #[cold]
    fn turn(&mut self) -> Result<()> {
        let first = self.order[0];
        (self.free, self.stays, self.glider) = (0, 0, NO_SOURCE);
        self.ahead = !self.ahead;
        self.bring_to_first(|source| source != first)?;
        let source = &mut self.sources[first];
        let moved = if self.ahead { source.next() } else { source.prev() };
        if moved.is_ok() {
            self.sort();
        }
        moved
    }

    /// The first source has new versions, perhaps between here and the one it stands on.
    #[cold]
    fn refresh(&mut self) -> Result<()> {
        let first = self.order[0];
        (self.free, self.stays, self.glider) = (0, 0, NO_SOURCE);
        self.bring_to_first(|source| source == 0)?;
        self.sort();
        debug_assert_eq!(self.order.first(), Some(&first), "a refreshed source stands behind the merge");
        Ok(())
    }

    /// Moves the sources that are `wanted` to their next version behind the one that the merge stands on, in the
    /// direction of travel. `order` has to be sorted anew afterwards; after an error it is empty.
    fn bring_to_first(&mut self, wanted: impl Fn(usize) -> bool) -> Result<()> {
        let first = self.order[0];
        self.key.clear();
        self.key.extend_from_slice(self.sources[first].key());
        self.key.push(0);
        let seqno = self.sources[first].seqno();
        let (key, just_above) = (&self.key[..self.key.len() - 1], &self.key[..]);
        let bring = |(index, source): (usize, &mut S)| {
            let place = |source: &S| {
                source.key().cmp(key).then_with(|| seqno.cmp(&source.seqno())).then_with(|| index.cmp(&first))
            };
            if self.ahead {
                source.seek(key, seqno)?;
                while source.valid() && place(source) == Ordering::Less {
                    source.next()?;
                }
            } else {
                source.seek_before(just_above)?;
                while source.valid() && place(source) == Ordering::Greater {
                    source.prev()?;
                }
            }
            Ok(())
        };
        let brought =
            self.sources.iter_mut().enumerate().filter(|(index, _)| wanted(*index)).try_for_each(bring);
        if brought.is_err() {
            self.order.clear();
        }
        brought
    }

    fn sort(&mut self) {
        for (on, source) in self.standings.iter_mut().zip(&self.sources).filter(|(_, source)| source.valid())
        {
            *on = source.standing();
        }
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        order.extend((0..self.sources.len()).filter(|&source| self.sources[source].valid()));
        order.sort_unstable_by(|&a, &b| if self.ahead { self.compare(a, b) } else { self.compare(b, a) });
        self.order = order;
    }

    #[inline]
    fn is_before(&self, a: usize, b: usize) -> bool {
        self.compare(a, b) == if self.ahead { Ordering::Less } else { Ordering::Greater }
    }

    #[inline]
    fn compare(&self, a: usize, b: usize) -> Ordering {
        self.compare_keys(a, b)
            .then_with(|| self.standings[b].seqno.cmp(&self.standings[a].seqno))
            .then_with(|| a.cmp(&b))
    }

    #[inline]
    fn compare_keys(&self, a: usize, b: usize) -> Ordering {
        self.standings[a].cmp_key(&self.standings[b], || self.sources[a].key().cmp(self.sources[b].key()))
    }
}

impl Merge<AnySource> {
    /// Before its sources go: what was wasted on few steps is kept until it is many, and whose turn it is then pays for all. So
    /// small readers charge seldom, and each sst in proportion.
    pub(crate) fn charge(&mut self) {
        for source in &mut self.sources {
            if let AnySource::Level(run) = source {
                self.wasted = run.charge(self.wasted);
            }
        }
    }

    /// As [`Source::seek`], but runs that hold no key of `probe` are left out until the next seek or turn. `key` starts with the
    /// probe's prefix, and nobody asks for what comes after the last key that does.
    pub(crate) fn seek_within(&mut self, key: &[u8], seqno: Seqno, probe: &Probe<'_>) -> Result<()> {
        self.seek_all(true, |source| if source.left_out(probe)? { Ok(()) } else { source.seek(key, seqno) })
    }

    /// As [`Source::seek_before`], in the same way.
    pub(crate) fn seek_before_within(&mut self, key: &[u8], probe: &Probe<'_>) -> Result<()> {
        self.seek_all(false, |source| if source.left_out(probe)? { Ok(()) } else { source.seek_before(key) })
    }
}

impl AnySource {
    /// Makes it stand nowhere if it holds no key of `probe`.
    fn left_out(&mut self, probe: &Probe<'_>) -> Result<bool> {
        match self {
            Self::Level(run) if !run.may_hold(probe)? => {
                run.leave();
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

impl<S: Source> Source for Merge<S> {
    fn seek(&mut self, key: &[u8], seqno: Seqno) -> Result<()> {
        self.seek_all(true, |source| source.seek(key, seqno))
    }
    fn seek_before(&mut self, key: &[u8]) -> Result<()> {
        self.seek_all(false, |source| source.seek_before(key))
    }
    #[inline]
    fn next(&mut self) -> Result<()> {
        self.stop_gliding();
        if !self.ahead {
            return self.turn();
        }
        if self.stale() && self.order.first() != Some(&0) {
            self.refresh()?;
        }
        self.step()
    }
    #[inline]
    fn pass_key(&mut self) -> Result<()> {
        if !self.ahead {
            return pass_by_steps(self);
        }
        self.stop_gliding();
        if self.stale() && self.order.first() != Some(&0) {
            self.refresh()?;
        }
        self.step_over_key()
    }
    #[inline]
    fn prev(&mut self) -> Result<()> {
        if self.ahead {
            return self.turn();
        }
        if self.stale() && self.order.first() != Some(&0) {
            self.refresh()?;
        }
        self.step()
    }
    #[inline]
    fn valid(&self) -> bool {
        !self.order.is_empty()
    }
    #[inline]
    fn key(&self) -> &[u8] {
        self.first().key()
    }
    #[inline]
    fn seqno(&self) -> Seqno {
        self.first().seqno()
    }
    #[inline]
    fn kind(&self) -> OpKind {
        self.first().kind()
    }
    #[inline]
    fn value(&self) -> &[u8] {
        self.first().value()
    }
    #[inline]
    fn entry(&self) -> (&[u8], &[u8]) {
        self.first().entry()
    }
    #[inline]
    fn stale(&self) -> bool {
        self.sources.first().is_some_and(Source::stale)
    }
}

/// Calls a method of whichever source it is.
macro_rules! whichever {
    ($source:expr, $it:ident => $call:expr) => {
        match $source {
            AnySource::WriteSet($it) => $call,
            AnySource::Memtable($it) => $call,
            AnySource::Level($it) => $call,
        }
    };
}

impl Source for AnySource {
    fn seek(&mut self, key: &[u8], seqno: Seqno) -> Result<()> {
        whichever!(self, it => it.seek(key, seqno))
    }
    fn seek_before(&mut self, key: &[u8]) -> Result<()> {
        whichever!(self, it => it.seek_before(key))
    }
    #[inline]
    fn next(&mut self) -> Result<()> {
        whichever!(self, it => it.next())
    }
    #[inline]
    fn prev(&mut self) -> Result<()> {
        whichever!(self, it => it.prev())
    }
    #[inline]
    fn valid(&self) -> bool {
        whichever!(self, it => it.valid())
    }
    #[inline]
    fn key(&self) -> &[u8] {
        whichever!(self, it => it.key())
    }
    #[inline]
    fn seqno(&self) -> Seqno {
        whichever!(self, it => it.seqno())
    }
    #[inline]
    fn kind(&self) -> OpKind {
        whichever!(self, it => it.kind())
    }
    #[inline]
    fn value(&self) -> &[u8] {
        whichever!(self, it => it.value())
    }
    #[inline]
    fn entry(&self) -> (&[u8], &[u8]) {
        whichever!(self, it => it.entry())
    }
    #[inline]
    fn stale(&self) -> bool {
        whichever!(self, it => it.stale())
    }
    #[inline]
    fn pass_key(&mut self) -> Result<()> {
        whichever!(self, it => it.pass_key())
    }
    fn steps_before(&self, key: &[u8]) -> usize {
        whichever!(self, it => it.steps_before(key))
    }
    #[inline]
    fn standing(&self) -> Standing {
        whichever!(self, it => it.standing())
    }
    #[inline]
    fn go(&mut self, way: Way, on: &mut Standing) -> Result<bool> {
        whichever!(self, it => it.go(way, on))
    }
    #[inline]
    fn glide_step(&mut self) -> bool {
        whichever!(self, it => it.glide_step())
    }
    #[inline]
    fn glide(&mut self, most: usize, at: Seqno, passing: &mut bool) -> Glided {
        whichever!(self, it => it.glide(most, at, passing))
    }
    #[inline]
    fn waste(&mut self, steps: usize) {
        whichever!(self, it => it.waste(steps));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::memtable::Memtable;
    use crate::source::head;
    use crate::writeset::{WriteMark, WriteSet};
    use crate::{Error, Kind, TreeId, full_key};

    /// Versions in a vector. Fails when its steps are used up.
    struct Listed {
        versions: Vec<(Vec<u8>, Seqno)>,
        at: usize,
        steps_left: usize,
    }

    impl Listed {
        fn new(mut versions: Vec<(Vec<u8>, Seqno)>) -> Self {
            versions.sort_by_key(|(key, seqno)| (key.clone(), Reverse(*seqno)));
            versions.dedup();
            Self { versions, at: usize::MAX, steps_left: usize::MAX }
        }
        fn step(&mut self, by: isize) -> Result<()> {
            self.steps_left = self
                .steps_left
                .checked_sub(1)
                .ok_or_else(|| Error::new(Kind::Unavailable, "no steps left"))?;
            assert!(self.valid());
            self.at = self.at.checked_add_signed(by).unwrap_or(usize::MAX);
            Ok(())
        }
    }

    impl Source for Listed {
        fn seek(&mut self, key: &[u8], seqno: Seqno) -> Result<()> {
            self.at = self
                .versions
                .partition_point(|(own, at)| (own.as_slice(), Reverse(*at)) < (key, Reverse(seqno)));
            Ok(())
        }
        fn seek_before(&mut self, key: &[u8]) -> Result<()> {
            self.at = self.versions.partition_point(|(own, _)| own.as_slice() < key).wrapping_sub(1);
            Ok(())
        }
        fn next(&mut self) -> Result<()> {
            self.step(1)
        }
        fn prev(&mut self) -> Result<()> {
            self.step(-1)
        }
        fn valid(&self) -> bool {
            self.at < self.versions.len()
        }
        fn key(&self) -> &[u8] {
            &self.versions[self.at].0
        }
        fn seqno(&self) -> Seqno {
            self.versions[self.at].1
        }
        fn kind(&self) -> OpKind {
            OpKind::Put
        }
        fn value(&self) -> &[u8] {
            &[]
        }
        fn steps_before(&self, key: &[u8]) -> usize {
            self.versions.partition_point(|(own, _)| own.as_slice() < key).saturating_sub(self.at + 1)
        }
        fn glide_step(&mut self) -> bool {
            self.at += 1;
            self.versions[self.at].0 == self.versions[self.at - 1].0
        }
    }

    #[derive(Clone, Debug)]
    enum Move {
        Seek(Vec<u8>, u64),
        SeekBefore(Vec<u8>),
        Next,
        /// A look ahead with its limit, and a glide of a reader at a seqno.
        Glide(Vec<u8>, u64),
        PassKey,
        Prev,
    }

    /// Keys of all lengths around the 16 bytes that heads hold.
    fn key() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            prop::collection::vec(0_u8..3, 0..6),
            (0_usize..20, 0_u8..3).prop_map(|(long, end)| [vec![1; long], vec![end]].concat()),
            (0_u8..40).prop_map(|last| [b"eighteen bytes and".as_slice(), &[last]].concat()),
        ]
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let one = prop_oneof![
            1 => (key(), 0_u64..6).prop_map(|(key, seqno)| Move::Seek(key, seqno)),
            1 => key().prop_map(Move::SeekBefore),
            8 => Just(Move::Next),
            8 => (key(), 0_u64..6).prop_map(|(limit, at)| Move::Glide(limit, at)),
            8 => Just(Move::PassKey),
            8 => Just(Move::Prev),
        ];
        prop::collection::vec(one, 0..300)
    }

    fn shown(source: &impl Source) -> Option<(Vec<u8>, Seqno)> {
        source.valid().then(|| (source.key().to_vec(), source.seqno()))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

        #[test]
        fn it_moves_like_one_sorted_list(
            lists in prop::collection::vec(prop::collection::vec((key(), (1_u64..5).prop_map(Seqno)), 0..40), 0..6),
            moves in moves(),
        ) {
            let mut merge = Merge::new();
            let mut all = Vec::new();
            for list in lists {
                let list = Listed::new(list);
                all.extend(list.versions.iter().cloned());
                merge.add(list);
            }
            // Equal versions in several lists are shown as often as they are there.
            all.sort_by_key(|(key, seqno)| (key.clone(), Reverse(*seqno)));
            let mut at = usize::MAX;
            for step in moves {
                match step {
                    Move::Seek(key, seqno) => {
                        merge.seek(&key, Seqno(seqno)).unwrap();
                        at = all.partition_point(|(own, at)| (own, Reverse(*at)) < (&key, Reverse(Seqno(seqno))));
                    }
                    Move::SeekBefore(key) => {
                        merge.seek_before(&key).unwrap();
                        at = all.partition_point(|(own, _)| *own < key).wrapping_sub(1);
                    }
                    Move::Next if at < all.len() => {
                        merge.next().unwrap();
                        at += 1;
                    }
                    Move::Glide(limit, read_at) if at < all.len() => {
                        let fresh = merge.free == 0;
                        merge.look_ahead(&limit);
                        let (from, free, mut passing) = (at, merge.free, true);
                        let found = merge.glide(Seqno(read_at), &mut passing);
                        // The same, version by version.
                        let (mut steps, mut seen, mut passes) = (0, false, true);
                        while steps < free && !seen {
                            steps += 1;
                            at += 1;
                            passes &= all[at].0 == all[at - 1].0;
                            seen = !passes && all[at].1 <= Seqno(read_at);
                            passes |= seen;
                        }
                        prop_assert_eq!((found, passing, merge.free), (seen, passes, free - steps));
                        prop_assert!(!fresh || all[from..=at].iter().skip(1).all(|(own, _)| *own < limit));
                    }
                    Move::Prev if at < all.len() => {
                        merge.prev().unwrap();
                        at = at.wrapping_sub(1);
                    }
                    Move::PassKey if at < all.len() => {
                        merge.pass_key().unwrap();
                        at = all.partition_point(|(own, _)| *own <= all[at].0);
                    }
                    Move::Next | Move::Glide(..) | Move::PassKey | Move::Prev => (),
                }
                prop_assert_eq!(shown(&merge), all.get(at).cloned());
            }
        }

        #[test]
        fn standings_sort_like_their_keys(a in key(), b in key()) {
            let standing = |key: &[u8]| {
                Standing { head: head(key), key_bytes: key.len(), ..Standing::NOWHERE }
            };
            let compared = standing(&a).cmp_key(&standing(&b), || a.cmp(&b));
            prop_assert_eq!(compared, a.cmp(&b));
            prop_assert!(head(&a) == head(&b) || (head(&a) < head(&b)) == (a < b));
        }
    }

    type Values = BTreeMap<Vec<u8>, Vec<u8>>;

    #[derive(Clone, Debug)]
    enum Act {
        Put(u8, u8),
        Delete(u8),
        Commit(u8, u8),
        Mark,
        Rollback,
        Seek(u8),
        SeekBefore(u8),
        Next,
        Prev,
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            4 => any::<(u8, u8)>().prop_map(|(key, value)| Act::Put(key, value)),
            1 => any::<u8>().prop_map(Act::Delete),
            2 => any::<(u8, u8)>().prop_map(|(key, value)| Act::Commit(key, value)),
            1 => Just(Act::Mark),
            1 => Just(Act::Rollback),
            1 => any::<u8>().prop_map(Act::Seek),
            1 => any::<u8>().prop_map(Act::SeekBefore),
            8 => Just(Act::Next),
            8 => Just(Act::Prev),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

        /// A transaction walks over what is committed and what it writes on the way. Each step lands on the next version
        /// of the moment, except that what others commit meanwhile may or may not show.
        #[test]
        fn a_walk_sees_each_own_write_that_lies_ahead(acts in prop::collection::vec(act(), 0..400)) {
            let key_of = |number: u8| full_key(TreeId(5), &[number]);
            let memtables = [Memtable::new(), Memtable::new()];
            let mut committed = 0;
            // What the walk must show: committed before its last seek, and own writes.
            let mut model: BTreeMap<(Vec<u8>, Reverse<Seqno>), Vec<u8>> = BTreeMap::new();
            let mut set = WriteSet::new();
            let mut marks: Vec<(WriteMark, Values)> = Vec::new();
            let mut merge = Merge::new();
            merge.add(AnySource::WriteSet(set.iter_tree(TreeId(5))));
            for memtable in &memtables {
                merge.add(AnySource::Memtable(Memtable::iter_tree(memtable, TreeId(5))));
            }
            let own = Reverse(Seqno(u64::MAX));
            for act in acts {
                let stand = shown(&merge).map(|(key, seqno)| (key, Reverse(seqno)));
                let found = match (act, stand) {
                    (Act::Put(key, value), _) => {
                        set.put(&key_of(key), &[value]);
                        model.insert((key_of(key), own), vec![value]);
                        continue;
                    }
                    (Act::Delete(key), _) => {
                        set.delete(&key_of(key));
                        model.insert((key_of(key), own), vec![]);
                        continue;
                    }
                    (Act::Commit(key, value), None) => {
                        committed += 1;
                        let memtable: &Arc<Memtable> = &memtables[usize::from(value % 2)];
                        memtable.insert(&key_of(key), Seqno(committed), OpKind::Put, &[value]);
                        model.insert((key_of(key), Reverse(Seqno(committed))), vec![value]);
                        continue;
                    }
                    (Act::Mark, _) => {
                        let writes = model.iter().filter(|((_, seqno), _)| *seqno == own);
                        let writes = writes.map(|((key, _), value)| (key.clone(), value.clone())).collect();
                        marks.push((set.mark(), writes));
                        continue;
                    }
                    (Act::Rollback, _) => {
                        let Some((mark, writes)) = marks.pop() else { continue };
                        set.rollback_to(mark);
                        model.retain(|(_, seqno), _| *seqno != own);
                        model.extend(writes.into_iter().map(|(key, value)| ((key, own), value)));
                        continue;
                    }
                    (Act::Seek(key), _) => {
                        merge.seek(&key_of(key), Seqno(u64::MAX)).unwrap();
                        model.range((key_of(key), own)..).next()
                    }
                    (Act::SeekBefore(key), _) => {
                        merge.seek_before(&key_of(key)).unwrap();
                        model.range(..(key_of(key), own)).next_back()
                    }
                    (Act::Next, Some(stand)) => {
                        merge.next().unwrap();
                        model.range(stand.clone()..).find(|(at, _)| **at != stand)
                    }
                    (Act::Prev, Some(stand)) => {
                        merge.prev().unwrap();
                        model.range(..stand).next_back()
                    }
                    (Act::Commit(..), Some(_)) | (Act::Next | Act::Prev, None) => continue,
                };
                prop_assert_eq!(
                    merge.valid().then(|| (merge.key(), merge.seqno(), merge.value())),
                    found.map(|((key, seqno), value)| (key.as_slice(), seqno.0, value.as_slice()))
                );
            }
        }
    }

    #[test]
    fn after_a_failed_step_it_stands_on_nothing_until_a_seek() {
        let mut merge = Merge::new();
        for (first, steps_left) in [(0, usize::MAX), (1, 3)] {
            let versions = (0..10).map(|n| (vec![2 * n + first], Seqno(1))).collect();
            merge.add(Listed { steps_left, ..Listed::new(versions) });
        }
        merge.seek(&[], Seqno(u64::MAX)).unwrap();
        let mut seen = 0;
        let error = loop {
            seen += 1;
            if let Err(error) = merge.next() {
                break error;
            }
        };
        assert_eq!((error.kind(), seen, merge.valid()), (Kind::Unavailable, 8, false));
        merge.seek(&[5], Seqno(u64::MAX)).unwrap();
        assert_eq!(merge.key(), [5]);
    }
}
