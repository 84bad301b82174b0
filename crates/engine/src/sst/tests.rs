//! Ssts against a sorted list, whole and damaged.

use std::cmp::Reverse;
use std::sync::Arc;

use bucket::{MemoryBucket, Names};
use bytes::Bytes;
use proptest::prelude::*;

use super::format::Compression;
use super::*;
use crate::cache::BlockCache;
use crate::disk::SimDisk;
use crate::first_part::{FirstPart, FirstParts, Probe};
use crate::source::Source;
use crate::store::{ByteSource, SstStore, StoreParts};
use crate::version::SstMeta;
use crate::{BranchId, Epoch, Kind, OpKind, Result, Seqno, SstId, TreeId};

const ID: SstId = SstId { epoch: Epoch(2), counter: 5 };

/// Key, seqno, kind, value.
pub(crate) type Version = (Vec<u8>, Seqno, OpKind, Vec<u8>);

fn order(version: &Version) -> (&[u8], Reverse<Seqno>) {
    (&version.0, Reverse(version.1))
}

fn small(compression: Compression) -> SstOptions {
    SstOptions { compression, block_bytes: 200, ..SstOptions::default() }
}

fn built(versions: &[Version], options: SstOptions) -> (SstMeta, Bytes) {
    let mut builder = SstBuilder::new(ID, options);
    for (key, seqno, kind, value) in versions {
        builder.add(key, *seqno, *kind, value);
    }
    let estimate = builder.estimated_bytes();
    let (meta, bytes) = builder.finish();
    if options.compression == Compression::None {
        let differs = estimate.abs_diff(meta.bytes);
        assert!(differs < meta.bytes / 4 + 1500, "estimated {estimate}, is {}", meta.bytes);
    }
    (meta, bytes)
}

fn open(meta: &SstMeta, bytes: Bytes, cache_bytes: usize) -> Result<Arc<Sst>> {
    Ok(Arc::new(Sst::open(meta, ByteSource::Memory(bytes), &BlockCache::new(cache_bytes))?))
}

fn standing(iter: &impl Source) -> Option<Version> {
    iter.valid().then(|| (iter.key().to_vec(), iter.seqno(), iter.kind(), iter.value().to_vec()))
}

fn versions(max: usize) -> impl Strategy<Value = Vec<Version>> {
    let key = (0..4u32, 0..60u64, 0..3usize).prop_map(|(tree, number, tail)| {
        [&tree.to_be_bytes()[..], &number.to_be_bytes(), &b"\0\xff"[..tail.min(2)]].concat()
    });
    let value = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        (0..600usize, any::<u8>()).prop_map(|(len, byte)| vec![byte; len])
    ];
    let version = (key, 0..30u64, any::<bool>(), value).prop_map(|(key, seqno, put, value)| {
        let (kind, value) = if put { (OpKind::Put, value) } else { (OpKind::Delete, vec![]) };
        (key, Seqno(seqno), kind, value)
    });
    prop::collection::vec(version, 1..max).prop_map(|mut versions| {
        versions.sort_by(|a, b| order(a).cmp(&order(b)));
        versions.dedup_by(|a, b| order(a) == order(b));
        versions
    })
}

fn compression() -> impl Strategy<Value = Compression> {
    prop::sample::select(vec![Compression::None, Compression::Zstd])
}

proptest! {
    #[test]
    fn gets_see_the_newest_version_that_is_old_enough(
        versions in versions(300), probes in versions(60), compression in compression(), cache in 0..40_000usize
    ) {
        let (meta, bytes) = built(&versions, small(compression));
        let sst = open(&meta, bytes, cache).unwrap();
        for (key, seqno, ..) in probes.iter().chain(&versions) {
            for at in [*seqno, Seqno(seqno.0 + 1), Seqno(u64::MAX)] {
                let expected = versions.iter().find(|version| version.0 == *key && version.1 <= at);
                let found = sst.get_hashed(key, hash(key), at).unwrap();
                let found = found.map(|found| (key.clone(), found.seqno(), found.kind(), found.value().to_vec()));
                prop_assert_eq!(found.as_ref(), expected);
            }
        }
    }

    #[test]
    fn an_iterator_stands_where_a_sorted_list_says(
        versions in versions(300), compression in compression(), cache in 0..40_000usize,
        purpose in prop::sample::select(vec![Purpose::Query, Purpose::Compaction]), walk in walk(),
    ) {
        let (meta, bytes) = built(&versions, small(compression));
        let mut iter = SstIter::new(open(&meta, bytes, cache).unwrap(), purpose);
        take(&mut iter, &versions, &walk)?;
        iter.seek_first().unwrap();
        prop_assert_eq!(standing(&iter), versions.first().cloned());
        iter.seek_last().unwrap();
        prop_assert_eq!(standing(&iter), versions.last().cloned());
    }

    /// Cuts may even fall between versions of one key.
    #[test]
    fn an_iterator_over_a_run_stands_where_a_sorted_list_says(
        versions in versions(300), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        purpose in prop::sample::select(vec![Purpose::Query, Purpose::Compaction]), walk in walk(),
    ) {
        let store = SstStore::new(StoreParts {
            disk: Arc::new(SimDisk::new(1)),
            bucket: Arc::new(MemoryBucket::new()),
            names: Names::new("main"),
            branch: BranchId([1; 16]),
            memory_bytes: 10_000,
            disk_cache_bytes: 1 << 20,
            threads: false,
        });
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(versions.len())).collect();
        cuts.extend([0, versions.len()]);
        cuts.sort();
        cuts.dedup();
        let mut run = Vec::new();
        for (number, part) in cuts.windows(2).enumerate() {
            let id = SstId { counter: number as u64, ..ID };
            let mut builder = SstBuilder::new(id, small(Compression::Zstd));
            versions[part[0]..part[1]].iter().for_each(|(key, seqno, kind, value)| builder.add(key, *seqno, *kind, value));
            let (meta, bytes) = builder.finish();
            let meta = Arc::new(meta);
            store.write_local(&meta, &bytes).unwrap();
            if number % 2 == 0 {
                store.upload(id).unwrap();
            }
            run.push(meta);
        }
        let mut iter = LevelIter::new(store, run.into(), purpose);
        take(&mut iter, &versions, &walk)?;
        iter.seek(&[], Seqno(u64::MAX)).unwrap();
        prop_assert_eq!(standing(&iter), versions.first().cloned());
        iter.seek_before(&[255; 20]).unwrap();
        prop_assert_eq!(standing(&iter), versions.last().cloned());
    }

    #[test]
    fn the_meta_says_what_is_in_it(versions in versions(200), compression in compression()) {
        let (meta, bytes) = built(&versions, small(compression));
        prop_assert_eq!(meta.id, ID);
        prop_assert_eq!(meta.bytes, bytes.len() as u64);
        prop_assert_eq!(meta.entries, versions.len() as u64);
        prop_assert_eq!(meta.tombstones, versions.iter().filter(|v| v.2 == OpKind::Delete).count() as u64);
        prop_assert_eq!(&meta.first_key[..], &versions[0].0[..]);
        prop_assert_eq!(&meta.last_key[..], &versions[versions.len() - 1].0[..]);
        prop_assert_eq!(Some(meta.seqno_min), versions.iter().map(|v| v.1).min());
        prop_assert_eq!(Some(meta.seqno_max), versions.iter().map(|v| v.1).max());
        verify(&meta, &bytes).unwrap();
    }

    /// Trees 0 and 2 have a rule, 1 and 3 have none; first parts of nine bytes hold several keys, of eight many.
    #[test]
    fn a_filter_of_first_parts_never_denies_what_is_there(
        versions in versions(300), probes in versions(60), compression in compression(), cache in 0..40_000usize,
        length in 4..10usize, longer in 0..3usize,
    ) {
        let rules = Arc::new(FirstParts::default());
        for tree in [0, 2] {
            rules.set(TreeId(tree), Arc::new(Bytewise(length)));
        }
        let mut builder = SstBuilder::new(ID, small(compression)).with_first_parts(Arc::clone(&rules));
        versions.iter().for_each(|(key, seqno, kind, value)| builder.add(key, *seqno, *kind, value));
        let (meta, bytes) = builder.finish();
        verify(&meta, &bytes).unwrap();
        read_all(&meta, bytes.clone(), &versions).unwrap();
        let sst = open(&meta, bytes, cache).unwrap();
        for (key, ..) in probes.iter().chain(&versions) {
            let probe = rules.probe(&key[..(4 + length + longer).min(key.len())]);
            let there = versions.iter().any(|version| version.0.starts_with(probe.prefix));
            prop_assert!(sst.may_hold(&probe).unwrap() || !there, "{:x?}", probe.prefix);
        }
    }

    #[test]
    fn two_keys_lead_to_the_blocks_that_each_leads_to(versions in versions(300), a in any::<prop::sample::Index>(), b in any::<prop::sample::Index>(), longer in 0usize..3) {
        let (meta, bytes) = built(&versions, small(Compression::None));
        let sst = open(&meta, bytes, 1 << 20).unwrap();
        let (low, mut high) = (a.get(&versions).0.clone(), b.get(&versions).0.clone());
        high.extend(std::iter::repeat_n(0xff, longer));
        let (low, high) = if low <= high { (low, high) } else { (high, low) };
        let each = |key: &[u8]| sst.find_block(key).unwrap().map(|place| place.offset());
        let both = sst.find_blocks(&low, &high).unwrap();
        prop_assert_eq!(both.map(|(from, _)| from.offset()), each(&low));
        prop_assert_eq!(both.and_then(|(_, to)| to).map(|place| place.offset()), each(&low).and(each(&high)));
    }

    #[test]
    fn an_estimate_is_near_the_truth(versions in versions(300), a in any::<prop::sample::Index>(), b in any::<prop::sample::Index>()) {
        let (meta, bytes) = built(&versions, small(Compression::None));
        let sst = open(&meta, bytes, 1 << 20).unwrap();
        let (low, high) = (&a.get(&versions).0, &b.get(&versions).0);
        let truth = versions.iter().filter(|v| low <= &v.0 && &v.0 < high).count() as u64;
        let newest = Seqno(u64::MAX);
        let all = Probe { prefix: &[0; 4], tree: TreeId(0), hash: None };
        let (entries, bytes) = estimate(&sst, &all, (low, newest), (high, newest)).unwrap();
        // Blocks hold at most a dozen of these rows; an even spread between them is assumed.
        prop_assert!(entries.abs_diff(truth) <= 24 + truth / 2, "{} for {}", entries, truth);
        prop_assert_eq!(entries == 0, bytes == 0);
    }
}

/// The first part has always as many bytes.
struct Bytewise(usize);

impl FirstPart for Bytewise {
    fn end(&self, key: &[u8]) -> Option<usize> {
        (key.len() >= self.0).then_some(self.0)
    }
}

#[test]
fn a_filter_of_first_parts_denies_what_is_not_there_and_is_damaged_like_the_rest() {
    let rules = Arc::new(FirstParts::default());
    rules.set(TreeId(7), Arc::new(Bytewise(4)));
    let row =
        |part: u32, row: u32| crate::full_key(TreeId(7), &[part.to_be_bytes(), row.to_be_bytes()].concat());
    let versions: Vec<Version> =
        (0..300u32).map(|i| (row(i / 3 * 2, i), Seqno(7), OpKind::Put, b"value".to_vec())).collect();
    let mut builder = SstBuilder::new(ID, small(Compression::Zstd)).with_first_parts(Arc::clone(&rules));
    versions.iter().for_each(|(key, seqno, kind, value)| builder.add(key, *seqno, *kind, value));
    let (meta, bytes) = builder.finish();
    let sst = open(&meta, bytes.clone(), 1 << 20).unwrap();
    assert!(sst.partitions() > 2, "prefixes lie across partitions");
    let wrong = (0..100u32)
        .filter(|i| {
            let prefix = &row(2 * i + 1, 0)[..8];
            sst.may_hold(&rules.probe(prefix)).unwrap()
        })
        .count();
    assert!(wrong < 5, "{wrong} of 100 absent first parts were not denied");

    let ask = |bytes: Bytes| -> Result<()> {
        let sst = open(&meta, bytes, 1 << 20)?;
        (0..200u32).try_for_each(|part| sst.may_hold(&rules.probe(&row(part, 0)[..8])).map(drop))
    };
    ask(bytes.clone()).unwrap();
    for at in 0..bytes.len() {
        let mut damaged = bytes.to_vec();
        damaged[at] ^= 1 << (at % 8);
        let damaged = Bytes::from(damaged);
        assert_eq!(verify(&meta, &damaged).unwrap_err().kind(), Kind::Corrupt, "byte {at}");
        if at >= sst.data_bytes() as usize
            && let Err(error) = ask(damaged)
        {
            assert_eq!(error.kind(), Kind::Corrupt, "byte {at}");
        }
    }
}

/// What to do, to which version's key and with what after it, and up to which seqno.
type Step = (u8, prop::sample::Index, usize, u64);

fn walk() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec((0..7u8, any::<prop::sample::Index>(), 0..3usize, 0..31u64), 1..80)
}

/// Moves `iter` about and compares each position with the list's.
fn take(
    iter: &mut impl Source,
    versions: &[Version],
    walk: &[Step],
) -> std::result::Result<(), TestCaseError> {
    let mut model: Option<usize> = None;
    for (step, probe, tail, seqno) in walk {
        let key = [&probe.get(versions).0[..], &b"\0\0"[..*tail]].concat();
        match step {
            0 => {
                iter.seek(&key, Seqno(*seqno)).unwrap();
                model = Some(versions.partition_point(|v| order(v) < (&key, Reverse(Seqno(*seqno)))));
            }
            1 => {
                iter.seek_before(&key).unwrap();
                model = versions.partition_point(|v| v.0 < key).checked_sub(1);
            }
            2..=4 if iter.valid() => {
                iter.next().unwrap();
                model = model.map(|at| at + 1);
            }
            _ if iter.valid() => {
                iter.prev().unwrap();
                model = model.and_then(|at| at.checked_sub(1));
            }
            _ => (),
        }
        model = model.filter(|&at| at < versions.len());
        let expected = model.map(|at| versions[at].clone());
        prop_assert_eq!(standing(iter), expected);
    }
    Ok(())
}

fn numbered(rows: u32) -> Vec<Version> {
    (0..rows)
        .map(|i| (i.to_be_bytes().repeat(2), Seqno(7), OpKind::Put, format!("value {i}").into_bytes()))
        .collect()
}

/// Reads everything in every way; an answer that differs from `versions` is the failure that we fear.
fn read_all(meta: &SstMeta, bytes: Bytes, versions: &[Version]) -> Result<()> {
    let sst = open(meta, bytes, 1 << 20)?;
    let mut errors = Vec::new();
    for (key, seqno, kind, value) in versions {
        match sst.get_hashed(key, hash(key), *seqno) {
            Ok(Some(found)) => {
                assert_eq!((found.seqno(), found.kind(), found.value()), (*seqno, *kind, &value[..]))
            }
            Ok(None) => panic!("a row is missing"),
            Err(error) => errors.push(error),
        }
    }
    let mut iter = SstIter::new(sst, Purpose::Query);
    let mut rows = versions.iter();
    let mut step = iter.seek_first();
    while step.is_ok() && iter.valid() {
        assert_eq!(standing(&iter).as_ref(), rows.next());
        step = iter.next();
    }
    match step {
        Err(error) => errors.push(error),
        Ok(()) => assert_eq!(rows.next(), None),
    }
    errors.into_iter().next().map_or(Ok(()), Err)
}

#[test]
fn every_damaged_byte_is_noticed_and_never_a_wrong_row() {
    for compression in [Compression::None, Compression::Zstd] {
        let versions = numbered(60);
        let (meta, bytes) = built(&versions, small(compression));
        read_all(&meta, bytes.clone(), &versions).unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.to_vec();
            damaged[at] ^= 1 << (at % 8);
            let damaged = Bytes::from(damaged);
            assert_eq!(
                read_all(&meta, damaged.clone(), &versions).unwrap_err().kind(),
                Kind::Corrupt,
                "byte {at}"
            );
            assert_eq!(verify(&meta, &damaged).unwrap_err().kind(), Kind::Corrupt, "byte {at}");
        }
    }
}

#[test]
fn a_truncated_padded_or_zeroed_sst_is_corrupt() {
    let versions = numbered(120);
    let (meta, bytes) = built(&versions, small(Compression::Zstd));
    for len in (0..bytes.len()).step_by(7) {
        assert_eq!(
            read_all(&meta, bytes.slice(..len), &versions).unwrap_err().kind(),
            Kind::Corrupt,
            "cut to {len}"
        );
        let shorter = SstMeta { bytes: len as u64, ..meta.clone() };
        assert_eq!(read_all(&shorter, bytes.slice(..len), &versions).unwrap_err().kind(), Kind::Corrupt);
    }
    let padded = Bytes::from([&bytes[..], &[0; 100]].concat());
    let longer = SstMeta { bytes: padded.len() as u64, ..meta.clone() };
    assert_eq!(read_all(&longer, padded, &versions).unwrap_err().kind(), Kind::Corrupt);
    for start in (0..bytes.len() - 64).step_by(64) {
        let mut zeroed = bytes.to_vec();
        zeroed[start..start + 64].fill(0);
        assert_eq!(
            read_all(&meta, zeroed.into(), &versions).unwrap_err().kind(),
            Kind::Corrupt,
            "zeroed at {start}"
        );
    }
}

#[test]
fn another_object_under_the_name_is_corrupt() {
    let versions = numbered(120);
    let (meta, bytes) = built(&versions, small(Compression::None));
    let mut other = SstBuilder::new(SstId { counter: 6, ..ID }, small(Compression::None));
    versions.iter().for_each(|(key, seqno, kind, value)| other.add(key, *seqno, *kind, value));
    let (_, other) = other.finish();
    assert_eq!(other.len(), bytes.len());
    assert_eq!(read_all(&meta, other.clone(), &versions).unwrap_err().kind(), Kind::Corrupt);

    // A single block of it, too, in its very place.
    let mut mixed = bytes.to_vec();
    mixed[..200].copy_from_slice(&other[..200]);
    assert_eq!(read_all(&meta, mixed.into(), &versions).unwrap_err().kind(), Kind::Corrupt);

    // An older state of the same name.
    let (_, older) = built(&numbered(119), small(Compression::None));
    let named = SstMeta { bytes: older.len() as u64, ..meta };
    assert_eq!(read_all(&named, older, &versions).unwrap_err().kind(), Kind::Corrupt);
}

#[test]
fn versions_of_one_key_may_fill_many_blocks() {
    let mut versions = vec![(b"0000a".to_vec(), Seqno(1), OpKind::Put, vec![])];
    versions.extend(
        (0..500).rev().map(|seqno| (b"0000k".to_vec(), Seqno(seqno), OpKind::Put, vec![seqno as u8; 50])),
    );
    versions.push((b"0000z".to_vec(), Seqno(1), OpKind::Put, vec![]));
    let (meta, bytes) = built(&versions, small(Compression::Zstd));
    let sst = open(&meta, bytes, 1 << 20).unwrap();
    for at in 0..500 {
        assert_eq!(sst.get_hashed(b"0000k", hash(b"0000k"), Seqno(at)).unwrap().unwrap().seqno(), Seqno(at));
        let mut iter = SstIter::new(Arc::clone(&sst), Purpose::Query);
        iter.seek(b"0000k", Seqno(at)).unwrap();
        assert_eq!((iter.key(), iter.seqno()), (&b"0000k"[..], Seqno(at)));
    }
    let mut iter = SstIter::new(Arc::clone(&sst), Purpose::Query);
    iter.seek_before(b"0000k").unwrap();
    assert_eq!(iter.key(), b"0000a");
}

#[test]
fn the_largest_record_has_a_block_of_its_own() {
    let large = vec![b'x'; 5 << 20];
    let versions: Vec<Version> = vec![
        (b"0000a".to_vec(), Seqno(1), OpKind::Put, b"small".to_vec()),
        (
            [&b"0000b"[..], &[1; crate::limits::KEY_BYTES_MAX - 1]].concat(),
            Seqno(1),
            OpKind::Put,
            large.clone(),
        ),
        (b"0000c".to_vec(), Seqno(1), OpKind::Put, b"small".to_vec()),
    ];
    for compression in [Compression::None, Compression::Zstd] {
        let (meta, bytes) = built(&versions, SstOptions { compression, ..SstOptions::default() });
        read_all(&meta, bytes, &versions).unwrap();
    }
}

#[test]
#[should_panic(expected = "out of order")]
fn a_version_out_of_order_never_leaves_the_builder() {
    let mut builder = SstBuilder::new(ID, small(Compression::None));
    builder.add(b"0000k", Seqno(5), OpKind::Put, b"");
    builder.add(b"0000k", Seqno(5), OpKind::Put, b"");
}

/// What any version wrote is read for ever. (`FIXTURES=write` makes the files of the version of today anew, after which they must not
/// differ.)
#[test]
fn the_files_of_every_format_version_open_and_say_the_same() {
    let mixed: Vec<Version> = (0..400u32)
        .map(|i| {
            let key = [&(7 + i / 300).to_be_bytes()[..], format!("key {:05}", i / 3).as_bytes()].concat();
            let (kind, value) = match i % 5 {
                0 => (OpKind::Delete, vec![]),
                length => (OpKind::Put, vec![i as u8; 1 << (2 * length)]),
            };
            (key, Seqno(u64::from(1000 - i)), kind, value)
        })
        .collect();
    let one_row = vec![(b"\0\0\0\x01k".to_vec(), Seqno(u64::MAX), OpKind::Put, b"v".to_vec())];
    let tombstones: Vec<Version> =
        (0..50u8).map(|i| (vec![0, 0, 0, 1, i], Seqno(9), OpKind::Delete, vec![])).collect();
    let rules = Arc::new(FirstParts::default());
    rules.set(TreeId(7), Arc::new(Bytewise(7)));
    let files = [
        (1, "one-row", one_row.clone()),
        (1, "tombstones", tombstones.clone()),
        (1, "mixed", mixed.clone()),
        (2, "mixed", mixed.clone()),
        (3, "one-row", one_row),
        (3, "tombstones", tombstones),
        (3, "mixed", mixed),
    ];
    for (version, name, versions) in files {
        let packings = [("none", Compression::None), ("zstd", Compression::Zstd), ("lz4", Compression::Zstd)];
        let written = version == 3;
        for (packing, compression) in packings.into_iter().take(if written { 2 } else { 3 }) {
            let directory = format!("{}/fixtures/sst/v{version}", env!("CARGO_MANIFEST_DIR"));
            let path = format!("{directory}/{name}-{packing}.sst");
            let options = SstOptions { compression, block_bytes: 2048, ..SstOptions::default() };
            let mut builder = SstBuilder::new(ID, options);
            if version > 1 {
                builder = builder.with_first_parts(Arc::clone(&rules));
            }
            versions.iter().for_each(|(key, seqno, kind, value)| builder.add(key, *seqno, *kind, value));
            let (meta, bytes) = builder.finish();
            if written && std::env::var("FIXTURES").is_ok_and(|wish| wish == "write") {
                std::fs::create_dir_all(&directory).unwrap();
                std::fs::write(&path, &bytes).unwrap();
            }
            let kept = Bytes::from(std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}")));
            // Packers may learn to pack better, so lengths may differ from what is written today.
            let meta = SstMeta { bytes: kept.len() as u64, ..meta };
            read_all(&meta, kept.clone(), &versions).unwrap();
            verify(&meta, &kept).unwrap();
            let sst = open(&meta, kept, 0).unwrap();
            if name == "mixed" {
                let may_hold = |prefix| sst.may_hold(&rules.probe(prefix)).unwrap();
                assert!(may_hold(b"\0\0\0\x07key 000"), "{path}");
                assert_eq!(may_hold(b"\0\0\0\x07key 0,0"), version == 1, "{path}: version 1 can not deny");
            }
        }
    }
}

#[test]
fn an_sst_is_told_in_words() {
    let (_, bytes) = built(&numbered(120), SstOptions::default());
    let told = describe(ID, &bytes).unwrap();
    let begins = format!(
        "sst 2-5, {} bytes, 120 versions, of which 0 deletions, seqno 7 to 7\n\
         keys 0000000000000000 to 0000007700000077\nblock at 0x0, ",
        bytes.len()
    );
    assert!(told.starts_with(&begins), "{told}");
    assert!(told.ends_with(" bytes, Zstd, 120 versions from 0000000000000000\n"), "{told}");
}
