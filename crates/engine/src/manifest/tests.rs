use bucket::{FaultyBucket, MemoryBucket, Rule};
use proptest::prelude::*;

use super::*;
use crate::claim::{NodeId, claim};
use crate::version::tests::{id, in_tree, sst};

const BRANCH: BranchId = BranchId([3; 16]);

fn names() -> Names {
    Names::new("main")
}

fn shared() -> (Arc<MemoryBucket>, Arc<dyn Bucket>) {
    let memory = Arc::new(MemoryBucket::new());
    (Arc::clone(&memory), memory)
}

/// Claims and takes over at `start`.
fn writer(bucket: &Arc<dyn Bucket>, nonce: u64, start: u64) -> Result<ManifestWriter> {
    let epoch = claim(&**bucket, &names(), NodeId([nonce as u8; 16]), nonce)?;
    loop {
        let manifest = match load(&**bucket, &names(), 3)? {
            Some(manifest) => manifest,
            None => found(&**bucket, &names(), BRANCH)?,
        };
        let edit = Edit { take_over: Some(WalPosition(start)), ..Edit::default() };
        let fence = Fence::new(Arc::clone(bucket), names(), epoch);
        match ManifestWriter::take_over(Arc::clone(bucket), names(), fence, nonce, manifest, &edit)? {
            TakeOver::Done(writer) => return Ok(*writer),
            TakeOver::Overtaken => (),
        }
    }
}

fn flush(counter: u64) -> Edit {
    let position = WalPosition(counter * 100);
    Edit {
        added: vec![(0, sst(counter, "a", "z", 10))],
        flushed: Some(Flushed { position, seqno: Seqno(counter), slice: position }),
        next_tree: Some(TreeId(counter as u32)),
        ..Edit::default()
    }
}

fn loaded(tree: u32, counter: u64, first: &str, last: &str, seqno: u64) -> Arc<SstMeta> {
    let sst = in_tree(tree, counter, first, last, 1);
    let unnamed = SstMeta { seqno_min: Seqno(0), seqno_max: Seqno(0), ..(*sst).clone() };
    Arc::new(unnamed.committed_at(Seqno(seqno)))
}

/// An edit with something of everything.
fn rich() -> Edit {
    Edit {
        added: vec![
            (0, in_tree(1, 7, "", "b", 1)),
            (0, in_tree(2, 8, "", "zz", 2)),
            (3, in_tree(2, 9, "c", "d", 3)),
            (6, loaded(5, 10, "e", "f", 77)),
        ],
        older_runs: vec![
            [in_tree(1, 10, "", "x", 1), in_tree(2, 11, "b", "c", 1)].into(),
            [in_tree(1, 12, "b", "y", 1)].into(),
        ],
        removed: vec![id(4), id(5)],
        dropped: vec![(TreeId(6), Seqno(60))],
        gone: vec![TreeId(1), TreeId(u32::MAX)],
        flushed: Some(Flushed { position: WalPosition(9), seqno: Seqno(8), slice: WalPosition(7) }),
        next_tree: Some(TreeId(99)),
        take_over: Some(WalPosition(1 << 40)),
    }
}

fn header() -> Header {
    Header { branch: BRANCH, number: 5, epoch: Epoch(6), nonce: 7 }
}

#[test]
fn what_is_published_is_loaded_again_across_bases_and_writers() {
    let (memory, bucket) = shared();
    let mut expected = None;
    for life in 1..=4 {
        let mut writer = writer(&bucket, life, life * 2000).unwrap();
        if let Some(expected) = expected {
            let found: &Manifest = writer.manifest();
            assert_eq!((&found.version, found.flushed), (&expected, Flushed { ..found.flushed }));
        }
        for counter in 1..=9 {
            let counter = life * 20 + counter;
            writer.publish(&flush(counter)).unwrap();
            writer
                .publish(&Edit { dropped: vec![(TreeId(counter as u32), Seqno(1))], ..Edit::default() })
                .unwrap();
        }
        let loaded = load(&*bucket, &names(), 1).unwrap().unwrap();
        assert_eq!(&loaded, writer.manifest());
        expected = Some(loaded.version);
    }
    let bases: Vec<_> = memory.contents().into_keys().filter_map(|name| Names::parse_base(&name)).collect();
    assert_eq!(bases, [0, 16, 32, 48, 64]);
}

#[test]
fn cleaning_keeps_two_bases_and_what_follows_them() {
    let (memory, bucket) = shared();
    let mut writer = writer(&bucket, 1, 0).unwrap();
    for counter in 1..60 {
        writer.publish(&flush(counter)).unwrap();
        writer.clean_step().unwrap();
        assert_eq!(&load(&*bucket, &names(), 1).unwrap().unwrap(), writer.manifest());
    }
    let contents = memory.contents();
    let bases: Vec<_> = contents.keys().filter_map(Names::parse_base).collect();
    let edits: Vec<_> = contents.keys().filter_map(Names::parse_edit).collect();
    assert_eq!(bases, [32, 48]);
    assert_eq!(edits, (33..=60).collect::<Vec<_>>());
}

#[test]
fn a_fenced_writer_cannot_publish() {
    let (memory, bucket) = shared();
    let mut old = writer(&bucket, 1, 0).unwrap();
    old.publish(&flush(1)).unwrap();
    let mut new = writer(&bucket, 2, 500).unwrap();
    let before = memory.contents();
    let error = old.publish(&flush(2)).unwrap_err();
    assert!(error.kind() == Kind::Fenced && error.to_string().contains("epoch 2"), "{error}");
    assert_eq!(memory.contents(), before);
    new.publish(&flush(6)).unwrap();
}

#[test]
fn a_sleeper_whose_number_was_cleaned_away_fools_nobody() {
    let (_, bucket) = shared();
    let mut old = writer(&bucket, 1, 0).unwrap();
    for counter in 1..6 {
        old.publish(&flush(counter)).unwrap();
    }
    let mut new = writer(&bucket, 2, 1000).unwrap();
    for counter in 20..70 {
        new.publish(&flush(counter)).unwrap();
    }
    new.clean_step().unwrap();
    let published = new.manifest().clone();
    // The number is free again: creation succeeds, validation does not.
    let error = old.publish(&flush(7)).unwrap_err();
    assert_eq!(error.kind(), Kind::Fenced);
    assert!(bucket.head(&names().manifest_edit(7)).unwrap().is_some());
    assert_eq!(load(&*bucket, &names(), 1).unwrap().unwrap(), published);
    let mut third = writer(&bucket, 3, 9000).unwrap();
    assert_eq!(third.manifest().version, published.version);
    for counter in 100..130 {
        third.publish(&flush(counter)).unwrap();
    }
    third.clean_step().unwrap();
    assert!(bucket.head(&names().manifest_edit(7)).unwrap().is_none(), "what it left is cleaned away too");
}

#[test]
fn a_take_over_that_lands_late_is_met_and_taken_in() {
    let (memory, bucket) = shared();
    writer(&bucket, 1, 0).unwrap().publish(&flush(1)).unwrap();
    // The second writer's take-over stays on its way.
    let rule = Rule::late_put("*/edit-*", 1000);
    let slow = Arc::new(FaultyBucket::new(Arc::clone(&bucket), 1, vec![rule]));
    let view: Arc<dyn Bucket> = slow.clone();
    assert_eq!(writer(&view, 2, 700).err().map(|error| error.kind()), Some(Kind::Unavailable));

    // The third one has read the manifest when it lands.
    let epoch = claim(&*bucket, &names(), NodeId([3; 16]), 3).unwrap();
    let before = load(&*bucket, &names(), 1).unwrap().unwrap();
    assert_eq!(slow.land_late(), 1);
    let edit = Edit { take_over: Some(WalPosition(800)), ..Edit::default() };
    let fence = || Fence::new(Arc::clone(&bucket), names(), epoch);
    let met = ManifestWriter::take_over(Arc::clone(&bucket), names(), fence(), 3, before, &edit).unwrap();
    assert!(matches!(met, TakeOver::Overtaken));
    let after = load(&*bucket, &names(), 1).unwrap().unwrap();
    let met = ManifestWriter::take_over(Arc::clone(&bucket), names(), fence(), 3, after, &edit).unwrap();
    let TakeOver::Done(third) = met else { panic!("nobody else is there") };
    let wals: Vec<_> =
        third.manifest().wals.iter().map(|span| (span.epoch.0, span.end.map(|end| end.0))).collect();
    assert_eq!(wals, [(1, Some(700)), (2, Some(800)), (3, None)]);
    assert_eq!(memory.contents().keys().filter_map(Names::parse_edit).max(), Some(4));
}

#[test]
fn a_lost_answer_is_read_back_and_the_edit_is_not_published_twice() {
    let (memory, bucket) = shared();
    let rules = [Rule::lost_answer("*/manifest/*"), Rule::late_put("*/manifest/*", 3)];
    for seed in 0..30 {
        let rules = rules.clone().map(|rule| rule.with_probability(0.5)).to_vec();
        let view: Arc<dyn Bucket> =
            Arc::new(FaultyBucket::new(Arc::clone(&bucket), seed, rules).with_tries(1 + seed as u32 % 3));
        let Ok(mut writer) = writer(&view, seed, seed * 10_000) else { continue };
        for counter in 1..10 {
            let edit = flush(seed * 100 + counter);
            let mut tries = 0;
            while let Err(error) = writer.publish(&edit) {
                assert_eq!(error.kind(), Kind::Unavailable, "seed {seed}: {error}");
                tries += 1;
                assert!(tries < 100, "seed {seed}");
                let other = writer.publish(&flush(999)).unwrap_err();
                assert!(
                    matches!(other.kind(), Kind::Bug | Kind::Unavailable),
                    "another edit under the number: {other}"
                );
            }
            let loaded = load(&*bucket, &names(), 1).unwrap().unwrap();
            assert_eq!(&loaded, writer.manifest(), "seed {seed}");
            let copies = loaded.version.ssts().filter(|(_, sst)| sst.id == id(seed * 100 + counter)).count();
            assert_eq!(copies, 1, "seed {seed}");
        }
    }
    assert!(memory.contents().len() > 100, "some writers got through");
}

#[test]
fn two_founders_agree_on_one_branch() {
    let (_, bucket) = shared();
    let first = found(&*bucket, &names(), BranchId([1; 16])).unwrap();
    let second = found(&*bucket, &names(), BranchId([2; 16])).unwrap();
    assert_eq!((first.branch, second.branch), (BranchId([1; 16]), BranchId([1; 16])));
}

#[test]
fn an_edit_that_does_not_fit_is_refused_with_its_reason() {
    let mut manifest = Manifest::empty(BRANCH);
    let refusal = |manifest: &Manifest, change: fn(&mut Header, &mut Edit)| {
        let mut header = Header { branch: BRANCH, number: manifest.number + 1, epoch: Epoch(2), nonce: 1 };
        let mut edit = Edit::default();
        change(&mut header, &mut edit);
        manifest.apply(&header, &edit).expect_err("must not fit")
    };
    assert!(refusal(&manifest, |_, _| ()).contains("takes nothing over"));
    let first = Header { branch: BRANCH, number: 1, epoch: Epoch(2), nonce: 1 };
    manifest = manifest
        .apply(&first, &Edit { take_over: Some(WalPosition(50)), ..Edit::default() })
        .expect("the first take-over");
    assert!(refusal(&manifest, |header, _| header.number = 9).contains("number 9"));
    assert!(refusal(&manifest, |header, _| header.branch = BranchId([9; 16])).contains("another branch"));
    assert!(refusal(&manifest, |header, _| header.epoch = Epoch(1)).contains("2 had taken over"));
    assert!(
        refusal(&manifest, |_, edit| edit.take_over = Some(WalPosition(60))).contains("takes over from 2")
    );
    assert!(
        refusal(&manifest, |header, edit| {
            header.epoch = Epoch(3);
            edit.take_over = Some(WalPosition(40));
        })
        .contains("before what is flushed")
    );
    assert!(refusal(&manifest, |_, edit| edit.removed = vec![id(1)]).contains("not in the tree"));
    let flushed = |position, slice| {
        Some(Flushed { position: WalPosition(position), seqno: Seqno(1), slice: WalPosition(slice) })
    };
    let edit = Edit { flushed: flushed(70, 60), ..Edit::default() };
    manifest = manifest.apply(&Header { number: 2, ..first }, &edit).expect("a flush");
    let back = Edit { flushed: flushed(60, 60), ..Edit::default() };
    assert!(manifest.apply(&Header { number: 3, ..first }, &back).unwrap_err().contains("takes back"));
    let ahead = Edit { flushed: flushed(80, 90), ..Edit::default() };
    assert!(
        manifest
            .apply(&Header { number: 3, ..first }, &ahead)
            .unwrap_err()
            .contains("behind what is flushed")
    );
}

#[test]
fn old_wals_are_forgotten_only_when_they_are_flushed() {
    let mut manifest = Manifest::empty(BRANCH);
    for number in 1..=100 {
        let header = Header { branch: BRANCH, number, epoch: Epoch(number), nonce: 1 };
        let edit = Edit { take_over: Some(WalPosition(number * 10)), ..Edit::default() };
        manifest = manifest.apply(&header, &edit).unwrap();
    }
    assert_eq!((manifest.wals.len(), manifest.wals_to_replay().count()), (100, 100), "nothing was flushed");
    let header = Header { branch: BRANCH, number: 101, epoch: Epoch(100), nonce: 1 };
    let position = WalPosition(905);
    let flushed = Some(Flushed { position, seqno: Seqno(1), slice: WalPosition(903) });
    manifest = manifest.apply(&header, &Edit { flushed, ..Edit::default() }).unwrap();
    assert_eq!(manifest.wals.len(), ENDED_WALS_KEPT);
    let left: Vec<_> = manifest.wals_to_replay().map(|span| (span.epoch.0, span.slice.0)).collect();
    assert_eq!(left.first(), Some(&(90, 903)), "the one that holds the place, from its slice on");
    assert_eq!(left.len(), 11);
}

#[test]
fn a_newer_format_is_refused_by_name() {
    let mut object = format::encode_edit(&header(), &rich());
    object[8] = 3;
    let error = format::decode_edit(&object, "the/name").unwrap_err();
    assert!(
        error.kind() == Kind::BadRequest
            && error.to_string().contains("the/name has manifest format version 3")
    );
    // An entry of a kind that comes later, under a right checksum.
    let mut object = format::encode_edit(&header(), &Edit { next_tree: Some(TreeId(1)), ..Edit::default() });
    object[64] = 200;
    let crc = crc32fast::hash(&[&object[..60], &object[64..]].concat());
    object[60..64].copy_from_slice(&crc.to_le_bytes());
    let error = format::decode_edit(&object, "the/name").unwrap_err();
    assert!(error.kind() == Kind::BadRequest && error.to_string().contains("kind 200"), "{error}");
}

/// The tag is in buckets: it stays. The body is that of an ordinary sst.
#[test]
fn the_sst_of_a_load_has_a_tag_of_its_own() {
    let entry = |sst: Arc<SstMeta>| {
        let object = format::encode_edit(&header(), &Edit { added: vec![(6, sst)], ..Edit::default() });
        (object[64], object[65..].to_vec())
    };
    let sst = loaded(5, 10, "e", "f", 77);
    let ordinary = Arc::new(SstMeta { loaded: false, ..(*sst).clone() });
    let ((tag, body), (ordinary_tag, ordinary_body)) = (entry(sst), entry(ordinary));
    assert_eq!((tag, ordinary_tag), (9, 1));
    assert_eq!(body, ordinary_body);
}

#[test]
fn edits_and_bases_come_back_as_they_were() {
    let one_run = Edit { older_runs: Vec::new(), ..rich() };
    for (edit, version) in [(rich(), 2), (one_run, 1)] {
        let object = format::encode_edit(&header(), &edit);
        assert_eq!(object[8], version, "programs that know one run for each edit read all others");
        assert_eq!(format::decode_edit(&object, "x").unwrap(), (header(), edit));
    }

    let mut manifest = Manifest::empty(BRANCH);
    let take_over = Edit { take_over: Some(WalPosition(0)), ..Edit::default() };
    let mut header = Header { number: 1, ..header() };
    manifest = manifest.apply(&header, &take_over).unwrap();
    for counter in 1..6 {
        header.number += 1;
        manifest = manifest.apply(&header, &flush(counter)).unwrap();
    }
    header.number += 1;
    let merge = Edit {
        added: vec![
            (1, sst(10, "a", "m", 1)),
            (1, sst(11, "n", "z", 1)),
            (2, in_tree(5, 12, "", "", 1)),
            (6, loaded(5, 13, "", "", 1)),
        ],
        removed: vec![id(1), id(2)],
        dropped: vec![(TreeId(4), Seqno(9)), (TreeId(3), Seqno(8))],
        ..Edit::default()
    };
    manifest = manifest.apply(&header, &merge).unwrap();
    let base = format::encode_base(&manifest);
    assert_eq!(format::decode_base(&base, "x").unwrap(), manifest);
    assert_eq!(format::encode_base(&format::decode_base(&base, "x").unwrap()), base, "byte for byte");
}

/// A random change that fits `manifest`: a flush, a merge of some runs of L0, moves, a drop, or the end of one.
fn any_edit(manifest: &Manifest, counter: &mut u64, choice: (u8, u8)) -> Edit {
    let mut fresh = || {
        *counter += 1;
        *counter
    };
    let version = &manifest.version;
    let (what, which) = choice;
    let l0: Vec<&Run> = version.l0.iter().collect();
    let dropped = manifest.dropped.keys().next().copied();
    match what % 6 {
        1 if !l0.is_empty() => {
            // The oldest runs of L0, and all of the level, into one sst of the level.
            let oldest = &l0[l0.len() - 1 - usize::from(which) % l0.len()..];
            let inputs = oldest.iter().flat_map(|run| run.iter()).chain(version.levels[2].iter());
            let removed = inputs.map(|sst| sst.id).collect();
            Edit { added: vec![(3, sst(fresh(), "a", "z", 1))], removed, ..Edit::default() }
        }
        2 if !version.levels[2].is_empty() && version.levels[3].is_empty() => {
            let moved = &version.levels[2][0];
            Edit { added: vec![(4, Arc::clone(moved))], removed: vec![moved.id], ..Edit::default() }
        }
        3 if !version.levels[3].is_empty() => {
            Edit { removed: version.levels[3].iter().map(|sst| sst.id).collect(), ..Edit::default() }
        }
        4 => Edit { dropped: vec![(TreeId(u32::from(which) % 3), Seqno(fresh()))], ..Edit::default() },
        5 if dropped.is_some() => Edit { gone: dropped.into_iter().collect(), ..Edit::default() },
        _ if which % 4 == 0 => {
            let (first, second) = (fresh(), fresh());
            Edit { added: vec![(0, sst(first, "a", "c", 1)), (0, sst(second, "d", "f", 1))], ..flush(second) }
        }
        _ => flush(fresh()),
    }
}

proptest! {
    #[test]
    fn edits_that_become_one_do_what_they_did_one_after_the_other(
        choices in proptest::collection::vec(any::<(u8, u8)>(), 0..25), before in 0usize..8,
    ) {
        let mut header = Header { number: 1, ..header() };
        let take_over = Edit { take_over: Some(WalPosition(0)), ..Edit::default() };
        let mut manifest = Manifest::empty(BRANCH).apply(&header, &take_over).unwrap();
        let mut counter = 0;
        let mut start = None;
        let mut all: Option<Edit> = None;
        for (index, choice) in choices.iter().enumerate() {
            if index == before {
                start = Some((manifest.clone(), header));
            }
            let edit = any_edit(&manifest, &mut counter, *choice);
            header.number += 1;
            manifest = manifest.apply(&header, &edit).unwrap();
            if start.is_some() {
                all = Some(match all {
                    None => edit,
                    Some(earlier) => earlier.followed_by(edit),
                });
            }
        }
        let (Some((start, mut header)), Some(all)) = (start, all) else { return Ok(()) };
        header.number += 1;
        let (_, all) = format::decode_edit(&format::encode_edit(&header, &all), "x").unwrap();
        let (from, at_once) = (start.version.ssts().count(), start.apply(&header, &all).unwrap());
        prop_assert_eq!(&at_once.version, &manifest.version);
        prop_assert_eq!((at_once.flushed, at_once.next_tree), (manifest.flushed, manifest.next_tree));
        prop_assert_eq!((&at_once.dropped, &at_once.wals), (&manifest.dropped, &manifest.wals));
        prop_assert!(all.removed.len() <= from, "it removes only what was there before");
        prop_assert!(all.ssts().count() <= manifest.version.ssts().count(), "it adds only what stays");
    }

    #[test]
    fn garbage_never_panics_and_never_passes(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(format::decode_edit(&bytes, "x").is_err());
        prop_assert!(format::decode_base(&bytes, "x").is_err());
    }

    #[test]
    fn damage_is_noticed(at in 0usize..2000, bit in 0u8..8, cut in 0usize..2000) {
        let object = format::encode_edit(&header(), &rich());
        let mut flipped = object.clone();
        flipped[at % object.len()] ^= 1 << bit;
        prop_assert!(format::decode_edit(&flipped, "x").is_err());
        prop_assert!(format::decode_edit(&object[..cut % object.len()], "x").is_err());
    }

    #[test]
    fn entries_that_lie_under_a_right_checksum_never_panic(changes in proptest::collection::vec((64usize..2000, any::<u8>()), 1..8)) {
        for base in [false, true] {
            let mut object = if base {
                let mut manifest = Manifest::empty(BRANCH);
                let take_over = Edit { take_over: Some(WalPosition(0)), ..Edit::default() };
                manifest = manifest.apply(&Header { number: 1, ..header() }, &take_over).unwrap();
                manifest = manifest.apply(&Header { number: 2, ..header() }, &flush(3)).unwrap();
                format::encode_base(&manifest)
            } else {
                format::encode_edit(&header(), &rich())
            };
            for (at, value) in &changes {
                let at = 64 + at % (object.len() - 64);
                object[at] = *value;
            }
            let crc = crc32fast::hash(&[&object[..60], &object[64..]].concat());
            object[60..64].copy_from_slice(&crc.to_le_bytes());
            let decoded = if base {
                format::decode_base(&object, "x").map(drop)
            } else {
                format::decode_edit(&object, "x").and_then(|(header, edit)| {
                    Manifest::empty(BRANCH).apply(&header, &edit).map(drop).map_err(Error::corrupt)
                })
            };
            if let Err(error) = decoded {
                prop_assert!(matches!(error.kind(), Kind::Corrupt | Kind::BadRequest), "{error}");
            }
        }
    }
}
