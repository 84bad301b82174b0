//! The memtable against a `BTreeMap`, alone and under many threads.
#![allow(clippy::unwrap_used)]

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::full_key;
use crate::source::Source;

type Version = (Vec<u8>, Reverse<Seqno>);
type Op = (OpKind, Vec<u8>);
type Model = BTreeMap<Version, Op>;
type Entry = (Vec<u8>, Seqno, OpKind, Vec<u8>);

fn shown(source: &impl Source) -> Option<Entry> {
    source.valid().then(|| (source.key().to_vec(), source.seqno(), source.kind(), source.value().to_vec()))
}

fn forward(source: &mut impl Source) -> Vec<Entry> {
    let mut all = Vec::new();
    while let Some(entry) = shown(source) {
        all.push(entry);
        source.next().unwrap();
    }
    all
}

fn backward(source: &mut impl Source) -> Vec<Entry> {
    let mut all = Vec::new();
    while let Some(entry) = shown(source) {
        all.push(entry);
        source.prev().unwrap();
    }
    all
}

fn entry((key, value): (&Version, &Op)) -> Entry {
    (key.0.clone(), key.1.0, value.0, value.1.clone())
}

/// Keys that collide in their first bytes, are prefixes of each other, and spread over a few trees.
fn key() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        prop::collection::vec(0_u8..3, 0..4),
        prop::collection::vec(any::<u8>(), 0..12),
        (0_u64..2000).prop_map(|n| n.to_be_bytes().to_vec()),
        (0_u64..500)
            .prop_map(|n| [b"a long beginning that all share ".as_slice(), &n.to_be_bytes()].concat()),
    ];
    (0_u32..4, part).prop_map(|(tree, key)| full_key(TreeId([1, 2, 300, u32::MAX][tree as usize]), &key))
}

fn writes(most: usize) -> impl Strategy<Value = Vec<(Vec<u8>, u64, bool, Vec<u8>)>> {
    let value = prop::collection::vec(any::<u8>(), 0..5);
    prop::collection::vec((key(), 1_u64..40, prop::bool::weighted(0.8), value), 0..most)
}

fn fill(memtable: &Memtable, writes: Vec<(Vec<u8>, u64, bool, Vec<u8>)>) -> Model {
    let mut model = Model::new();
    for (key, seqno, put, value) in writes {
        let kind = if put { OpKind::Put } else { OpKind::Delete };
        memtable.insert(&key, Seqno(seqno), kind, &value);
        model.entry((key, Reverse(Seqno(seqno)))).or_insert((kind, value));
    }
    model
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn it_reads_like_a_sorted_map(writes in writes(1500), asked in prop::collection::vec((key(), 0_u64..45), 60)) {
        let memtable = Memtable::new();
        let known: Vec<_> = writes.iter().map(|write| (write.0.clone(), write.1)).take(60).collect();
        let model = fill(&memtable, writes);
        let mut iter = memtable.iter();
        for (key, at) in asked.into_iter().chain(known) {
            let at = Seqno(at);
            let next = model.range((key.clone(), Reverse(at))..).next().map(entry);
            let got = memtable.get(&key, at).map(|(kind, seqno, value)| (key.clone(), seqno, kind, value.to_vec()));
            prop_assert_eq!(got, next.clone().filter(|next| next.0 == key));
            iter.seek(&key, at).unwrap();
            prop_assert_eq!(shown(&iter), next);
            iter.seek_before(&key).unwrap();
            let before = model.range(..(key.clone(), Reverse(Seqno(u64::MAX)))).next_back().map(entry);
            prop_assert_eq!(shown(&iter), before);
            let mut only = memtable.iter_tree(tree_of(&key));
            only.seek_before(&key).unwrap();
            prop_assert_eq!(shown(&only), shown(&iter).filter(|before| tree_of(&before.0) == tree_of(&key)));
        }
    }

    #[test]
    fn it_walks_like_a_sorted_map_both_ways(writes in writes(1500), turns in prop::collection::vec(any::<bool>(), 200)) {
        let memtable = Memtable::new();
        let model = fill(&memtable, writes);
        let all: Vec<_> = model.iter().map(entry).collect();
        prop_assert_eq!(memtable.entries() >= all.len(), true);
        let mut iter = memtable.iter();
        iter.seek(&[], Seqno(u64::MAX)).unwrap();
        prop_assert_eq!(forward(&mut iter), all.clone());
        iter.seek_before(&[0xff; 40]).unwrap();
        let reversed: Vec<_> = all.iter().rev().cloned().collect();
        prop_assert_eq!(backward(&mut iter), reversed);
        for tree in [1, 2, 300, 301, u32::MAX] {
            let expected: Vec<_> = all.iter().filter(|entry| tree_of(&entry.0) == TreeId(tree)).cloned().collect();
            let mut iter = memtable.iter_tree(TreeId(tree));
            iter.seek(&[], Seqno(u64::MAX)).unwrap();
            prop_assert_eq!(forward(&mut iter), expected);
        }
        // To and fro from the middle.
        let Some(mut at) = all.len().checked_sub(1).map(|last| last / 2) else { return Ok(()) };
        iter.seek(&all[at].0, all[at].1).unwrap();
        for ahead in turns {
            if ahead && at + 1 < all.len() {
                at += 1;
                iter.next().unwrap();
            } else if !ahead && at > 0 {
                at -= 1;
                iter.prev().unwrap();
            }
            prop_assert_eq!(shown(&iter), Some(all[at].clone()));
        }
    }
}

fn numbered(tree: u32, number: u64) -> Vec<u8> {
    full_key(TreeId(tree), &number.to_be_bytes())
}

/// The numbers below `count`, each once, in a scattered order; `count` has no factor 7919.
fn scattered(count: u64) -> impl Iterator<Item = u64> {
    (0..count).map(move |n| n * 7919 % count)
}

#[test]
fn appended_and_scattered_keys_are_all_found() {
    for scatter in [false, true] {
        let memtable = Memtable::new();
        let keys: Vec<u64> = if scatter { scattered(20_011).collect() } else { (0..20_011).collect() };
        for &n in &keys {
            memtable.insert(&numbered(7, n), Seqno(n + 1), OpKind::Put, &n.to_le_bytes());
        }
        for &n in &keys {
            let (kind, seqno, value) = memtable.get(&numbered(7, n), Seqno(u64::MAX)).unwrap();
            assert_eq!((kind, seqno, value), (OpKind::Put, Seqno(n + 1), n.to_le_bytes().as_slice()));
        }
        assert_eq!(memtable.in_order().count(), keys.len());
        assert_eq!(memtable.seqnos(), Some((Seqno(1), Seqno(20_011))));
    }
}

#[test]
fn a_key_with_more_versions_than_a_leaf_has_room_shows_the_right_one() {
    let memtable = Memtable::new();
    memtable.insert(&numbered(1, 4), Seqno(1), OpKind::Put, b"below");
    memtable.insert(&numbered(1, 6), Seqno(1), OpKind::Put, b"above");
    for seqno in scattered(1000) {
        memtable.insert(&numbered(1, 5), Seqno(seqno * 2 + 2), OpKind::Put, &seqno.to_le_bytes());
    }
    for at in 2..2002 {
        let (_, seqno, _) = memtable.get(&numbered(1, 5), Seqno(at)).unwrap();
        assert_eq!(seqno, Seqno(at / 2 * 2));
    }
    assert_eq!(memtable.get(&numbered(1, 5), Seqno(1)), None);
    assert_eq!(memtable.newest(&numbered(1, 6)), Some(Seqno(1)));
}

#[test]
fn a_dropped_tree_is_passed_over() {
    let memtable = Memtable::new();
    for tree in [1, 2, 3] {
        for n in 0..100 {
            memtable.insert(&numbered(tree, n), Seqno(5), OpKind::Put, b"");
        }
    }
    memtable.drop_tree(TreeId(2), Seqno(6));
    assert_eq!(memtable.get(&numbered(2, 1), Seqno(6)), None);
    assert!(memtable.get(&numbered(2, 1), Seqno(5)).is_some(), "an older snapshot still sees it");
    let trees: Vec<_> = memtable.in_order().map(|(key, ..)| tree_of(key).0).collect();
    assert_eq!((trees.len(), trees.contains(&2)), (200, false));
    let mut iter = memtable.iter();
    iter.seek_before(&numbered(3, 0)).unwrap();
    assert_eq!(iter.key(), numbered(1, 99));
    iter.seek(&numbered(2, 50), Seqno(9)).unwrap();
    assert_eq!(iter.key(), numbered(3, 0));
}

#[test]
fn estimates_are_exact_when_small_and_near_when_large() {
    let memtable = Memtable::new();
    for n in scattered(50_021) {
        memtable.insert(&numbered(9, n), Seqno(1), OpKind::Put, b"");
    }
    let between = |low: u64, high: u64| {
        memtable.estimate(Bound::Included(&numbered(9, low)), Bound::Excluded(&numbered(9, high)))
    };
    assert_eq!(between(1000, 1000), 0);
    assert_eq!(between(1000, 1001), 1);
    assert_eq!(between(1000, 1100), memtable.in_order().skip(1000).take(100).count() as u64);
    for (low, high) in [(0, 50_021), (10_000, 40_000), (49_000, 50_021), (100, 2_100)] {
        let (got, exact) = (between(low, high) as f64, (high - low) as f64);
        assert!((got / exact) > 0.6 && (got / exact) < 1.6, "{low}..{high}: {got}");
    }
}

#[test]
fn a_reset_memtable_is_empty_and_works_again() {
    let mut memtable = Memtable::for_one_thread();
    for round in 0..5_u64 {
        assert_eq!((memtable.bytes(), memtable.entries(), memtable.in_order().count()), (0, 0, 0));
        for n in 0..2000 {
            memtable.insert(&numbered(n as u32 % 3, n), Seqno(round), OpKind::Put, &[round as u8; 300]);
        }
        assert!(memtable.in_order().all(|(.., value)| value == [round as u8; 300]));
        assert_eq!(memtable.in_order().count(), 2000);
        memtable.reset();
    }
}

/// Many writers and readers at once: what an insert returned from is found by everyone from then on, walks are sorted
/// and miss nothing that was there before they began.
#[test]
fn under_many_threads_nothing_inserted_is_ever_missed() {
    const WRITERS: u64 = 4;
    const EACH: u64 = 30_000;
    let memtable = Memtable::new();
    // Per writer: all its keys up to this count are in.
    let done: Arc<Vec<AtomicU64>> = Arc::new((0..WRITERS).map(|_| AtomicU64::new(0)).collect());
    // Neighbouring keys from different writers, half appended, half scattered, some trees made on the way.
    let key_of = |writer: u64, n: u64| {
        let place = if n.is_multiple_of(2) { n } else { n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20 };
        full_key(
            TreeId(1 + (n % 64 / 48) as u32),
            &[place.to_be_bytes(), writer.to_be_bytes(), n.to_be_bytes()].concat(),
        )
    };
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (memtable, done) = (&memtable, &done);
            scope.spawn(move || {
                for n in 0..EACH {
                    memtable.insert(&key_of(writer, n), Seqno(n + 1), OpKind::Put, &n.to_le_bytes());
                    done[writer as usize].store(n + 1, Ordering::Release);
                }
            });
        }
        for reader in 0..3_u64 {
            let (memtable, done) = (&memtable, &done);
            scope.spawn(move || {
                let mut random = reader + 1;
                let mut iter = memtable.iter();
                loop {
                    let before: Vec<u64> = done.iter().map(|count| count.load(Ordering::Acquire)).collect();
                    for _ in 0..500 {
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        let writer = (random >> 33) % WRITERS;
                        let Some(n) = (random >> 20).checked_rem(before[writer as usize]) else { continue };
                        let key = key_of(writer, n);
                        let (_, seqno, value) =
                            memtable.get(&key, Seqno(u64::MAX)).expect("it was inserted before");
                        assert_eq!((seqno, value), (Seqno(n + 1), n.to_le_bytes().as_slice()));
                        iter.seek(&key, Seqno(n + 1)).unwrap();
                        assert_eq!(iter.key(), key);
                        iter.seek_before(&key).unwrap();
                        assert!(!iter.valid() || iter.key() < key.as_slice());
                    }
                    let mut seen = vec![0_u64; WRITERS as usize];
                    let mut last: Option<Vec<u8>> = None;
                    let mut walk = |iter: &MemtableIter, ahead: bool| {
                        let key = iter.key().to_vec();
                        if let Some(last) = &last {
                            assert!(if ahead { *last < key } else { *last > key }, "out of order");
                        }
                        let writer = u64::from_be_bytes(key[12..20].try_into().unwrap());
                        let n = u64::from_be_bytes(key[20..28].try_into().unwrap());
                        seen[writer as usize] += u64::from(n < before[writer as usize]);
                        last = Some(key);
                    };
                    if reader % 2 == 0 {
                        iter.seek(&[], Seqno(u64::MAX)).unwrap();
                        while iter.valid() {
                            walk(&iter, true);
                            iter.next().unwrap();
                        }
                    } else {
                        iter.seek_before(&[0xff; 8]).unwrap();
                        while iter.valid() {
                            walk(&iter, false);
                            iter.prev().unwrap();
                        }
                    }
                    assert_eq!(seen, before, "a walk missed or repeated what was there before it began");
                    if before.iter().all(|&count| count == EACH) {
                        break;
                    }
                }
            });
        }
    });
    assert_eq!(memtable.entries() as u64, WRITERS * EACH);
    assert_eq!(memtable.in_order().count() as u64, WRITERS * EACH);
}

/// Each insert shifts a whole leaf under the readers' eyes; they must never see it half shifted.
#[test]
fn a_leaf_is_never_seen_half_changed() {
    const KEYS: u64 = 150;
    for round in 0..300 {
        let memtable = Memtable::new();
        let least = AtomicU64::new(KEYS);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in (0..KEYS).rev() {
                    memtable.insert(&numbered(1, n), Seqno(1), OpKind::Put, b"");
                    least.store(n, Ordering::Release);
                }
            });
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut iter = memtable.iter_tree(TreeId(1));
                    let number = |key: &[u8]| u64::from_be_bytes(key[4..].try_into().unwrap());
                    loop {
                        let there = least.load(Ordering::Acquire);
                        iter.seek(&numbered(1, 0), Seqno(u64::MAX)).unwrap();
                        let seen: Vec<u64> =
                            forward(&mut iter).iter().map(|entry| number(&entry.0)).collect();
                        let first = seen.first().copied().unwrap_or(KEYS);
                        assert!(first <= there, "round {round}: {there} was there, {first} is the first");
                        assert!(seen.iter().copied().eq(first..KEYS), "round {round}: {seen:?}");
                        if let Some(n) = (there..KEYS).nth((KEYS - there) as usize / 2) {
                            assert!(
                                memtable.get(&numbered(1, n), Seqno(1)).is_some(),
                                "round {round}: {n} is gone"
                            );
                        }
                        if there == 0 {
                            break;
                        }
                    }
                });
            }
        });
    }
}
