//! Stories of starts: after a stop at any step, on another machine, with objects damaged or lost. What random worlds promise is in
//! `world`.
//!
//! A transaction is one put of a number that is never used again; an "sst" is a list of such numbers, so that what a start
//! recovers can be compared with the ledger exactly.

use std::collections::{BTreeMap, BTreeSet};

use bucket::{Effect, FaultyBucket, MemoryBucket, Rule, When};
use bytes::Bytes;

use super::*;
use crate::manifest::Flushed;
use crate::version::SstMeta;
use crate::{DiskFault, SstId, full_key};

mod world;

const LIMITS: WalLimits =
    WalLimits { segment_bytes: 512, buffered_bytes_max: 4096, chunk_bytes: 256, slice_bytes: 300 };
const TREE: TreeId = TreeId(77);

fn names() -> Names {
    Names::new("main")
}

/// An engine without an engine: it commits, uploads, flushes, merges and trims.
struct Writer {
    recovered: Recovered,
    bucket: Arc<dyn Bucket>,
    /// Seqno and number of all transactions that it knows of.
    all: BTreeMap<u64, u64>,
    /// Ends of the records of those that are in no sst.
    unflushed: BTreeMap<u64, (WalPosition, u64)>,
    seqno: u64,
    sst: u64,
    /// An edit that may be published or not.
    pending: Option<(Edit, BTreeSet<u64>)>,
}

impl Writer {
    fn open(disk: &SimDiskHandle, bucket: &Arc<dyn Bucket>, seed: u64) -> Result<Self> {
        let parts = RecoveryParts {
            bucket: Arc::clone(bucket),
            disk: Arc::new(disk.clone()),
            names: names(),
            seed,
            limits: LIMITS,
            // Worlds draw large seeds, and must replay: one thread.
            fetches: if seed < 100 { 1 + seed as usize % 2 } else { 1 },
        };
        let mut all = BTreeMap::new();
        let mut unflushed = BTreeMap::new();
        let recovered = recover(parts, &mut |_, record| {
            for op in record.ops() {
                let Op::Put(key, value) = op? else { panic!("only puts were written") };
                assert_eq!(&key[4..], value, "the record is whole");
                let number = u64::from_be_bytes(value.try_into().unwrap());
                assert_eq!(all.insert(record.seqno.0, number), None, "a seqno twice");
                unflushed.insert(record.seqno.0, (record.end, number));
            }
            Ok(())
        })?;
        let version = recovered.manifest.manifest().version.clone();
        for (_, sst) in version.ssts() {
            let object = bucket.get(&names().sst(sst.id.epoch.0, sst.id.counter)).map_err(|error| {
                let lost = error.kind == bucket::ErrorKind::NotFound;
                assert!(!lost, "{} is named by the manifest and gone", sst.id);
                Error::from(error)
            })?;
            for pair in object.chunks(16) {
                let (seqno, number) = (be(&pair[..8]), be(&pair[8..]));
                assert_eq!(all.insert(seqno, number), None, "seqno {seqno} twice");
            }
        }
        let newest = all.last_key_value().map_or(0, |(seqno, _)| *seqno);
        assert!(recovered.next_seqno.0 > newest);
        assert!(all.is_empty() || recovered.next_tree > TREE, "tree ids are never given out twice");
        let seqno = recovered.next_seqno.0;
        Ok(Self { recovered, bucket: Arc::clone(bucket), all, unflushed, seqno, sst: 0, pending: None })
    }

    fn commit(&mut self, number: u64) -> Result<()> {
        let key = full_key(TREE, &number.to_be_bytes());
        let op = Op::Put(&key, &key[4..]);
        let seqno = self.seqno;
        let mut slot = self.recovered.wal.reserve(op.encoded_len(), Seqno(seqno))?;
        self.seqno += 1;
        slot.write(op);
        let end = slot.finish();
        self.recovered.wal.sync_to(end)?;
        self.all.insert(seqno, number);
        self.unflushed.insert(seqno, (end, number));
        Ok(())
    }

    /// What is promised to survive the loss of the machine after the upload.
    fn upload(&self) -> Result<Vec<u64>> {
        self.recovered.uploader.step()?;
        Ok(self.uploaded())
    }

    fn uploaded(&self) -> Vec<u64> {
        let end = self.recovered.uploader.uploaded();
        self.unflushed.values().filter(|(at, _)| *at <= end).map(|(_, number)| *number).collect()
    }

    /// Uploads an sst with the oldest unflushed transactions and publishes that, or goes on with what was begun.
    fn flush(&mut self, at_most: usize) -> Result<Vec<u64>> {
        if self.pending.is_none() {
            let taken: Vec<_> =
                self.unflushed.iter().take(at_most).map(|(s, (end, n))| (*s, *end, *n)).collect();
            let Some((seqno, end, _)) = taken.last().copied() else { return Ok(vec![]) };
            let rows: Vec<_> = taken.iter().map(|(seqno, _, number)| (*seqno, *number)).collect();
            let meta = self.put_sst(&rows)?;
            let flushed =
                Flushed { position: end, seqno: Seqno(seqno), slice: self.recovered.uploader.slice_at(end) };
            let edit = Edit {
                added: vec![(0, meta)],
                flushed: Some(flushed),
                next_tree: Some(TreeId(TREE.0 + 1)),
                ..Edit::default()
            };
            self.pending = Some((edit, rows.iter().map(|(seqno, _)| *seqno).collect()));
        }
        self.publish()
    }

    /// Merges all ssts into one of level 1.
    fn merge(&mut self) -> Result<Vec<u64>> {
        if self.pending.is_none() {
            let version = self.recovered.manifest.manifest().version.clone();
            let removed: Vec<SstId> = version.ssts().map(|(_, sst)| sst.id).collect();
            let rows: Vec<_> = self
                .all
                .iter()
                .filter(|(s, _)| !self.unflushed.contains_key(s))
                .map(|(s, n)| (*s, *n))
                .collect();
            if rows.is_empty() {
                return Ok(vec![]);
            }
            let edit = Edit { added: vec![(1, self.put_sst(&rows)?)], removed, ..Edit::default() };
            self.pending = Some((edit, BTreeSet::new()));
        }
        self.publish()
    }

    fn publish(&mut self) -> Result<Vec<u64>> {
        let (edit, _) = self.pending.as_ref().unwrap();
        self.recovered.manifest.publish(edit)?;
        let (edit, flushed) = self.pending.take().unwrap();
        let safe = flushed.iter().map(|seqno| self.all[seqno]).collect();
        self.unflushed.retain(|seqno, _| !flushed.contains(seqno));
        if !edit.removed.is_empty() {
            self.recovered.fence.check()?;
            let gone: Vec<_> = edit.removed.iter().map(|id| names().sst(id.epoch.0, id.counter)).collect();
            self.bucket.delete(&gone)?;
        }
        Ok(safe)
    }

    fn put_sst(&mut self, rows: &[(u64, u64)]) -> Result<Arc<SstMeta>> {
        let id = SstId { epoch: self.recovered.epoch, counter: self.sst };
        self.sst += 1;
        let body: Vec<u8> =
            rows.iter().flat_map(|(s, n)| [s.to_be_bytes(), n.to_be_bytes()].concat()).collect();
        self.bucket.put(&names().sst(id.epoch.0, id.counter), body.clone().into())?;
        let key = |(_, number): &(u64, u64)| full_key(TREE, &number.to_be_bytes()).into();
        Ok(Arc::new(SstMeta {
            id,
            bytes: body.len() as u64,
            entries: rows.len() as u64,
            tombstones: 0,
            first_key: key(&rows[0]),
            last_key: key(rows.last().unwrap()),
            seqno_min: Seqno(rows[0].0),
            seqno_max: Seqno(rows.last().unwrap().0),
            loaded: false,
            opened: Default::default(),
        }))
    }

    fn trim(&mut self) -> Result<()> {
        self.recovered.uploader.trim(self.recovered.manifest.manifest())?;
        self.recovered.manifest.clean_step()?;
        Ok(())
    }

    fn numbers(&self) -> Vec<u64> {
        self.all.values().copied().collect()
    }
}

type SimDiskHandle = crate::SimDisk;

fn be(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().unwrap())
}

fn memory() -> (Arc<MemoryBucket>, Arc<dyn Bucket>) {
    let memory = Arc::new(MemoryBucket::new());
    (Arc::clone(&memory), memory)
}

#[test]
fn everything_comes_back_from_the_local_disk_and_what_was_uploaded_from_the_bucket_alone() {
    let (_, bucket) = memory();
    let disk = SimDiskHandle::new(1);
    let mut writer = Writer::open(&disk, &bucket, 1).unwrap();
    assert_eq!(writer.recovered.report, Report::default());
    for number in 1..=40 {
        writer.commit(number).unwrap();
        if number == 30 {
            while writer.recovered.uploader.step().unwrap() {}
        }
    }
    let writer = Writer::open(&disk.crash(), &bucket, 2).unwrap();
    assert_eq!(writer.numbers(), (1..=40).collect::<Vec<_>>());
    let Report { took_over_from, continued_local, transactions, local_transactions, .. } =
        writer.recovered.report;
    assert_eq!((took_over_from, transactions, local_transactions), (Some(Epoch(1)), 40, 10));
    assert!(continued_local);

    let mut elsewhere = Writer::open(&SimDiskHandle::new(2), &bucket, 3).unwrap();
    assert_eq!(elsewhere.numbers(), (1..=30).collect::<Vec<_>>(), "the second writer had uploaded nothing");
    assert!(!elsewhere.recovered.report.continued_local);
    elsewhere.commit(99).unwrap();
    while elsewhere.recovered.uploader.step().unwrap() {}

    let error = writer.upload().unwrap_err();
    assert_eq!(error.kind(), Kind::Fenced);
    assert!(
        error.to_string().contains("claimed epoch 3") && error.to_string().contains("our epoch 2"),
        "{error}"
    );
}

#[test]
fn flushed_transactions_come_from_the_tree_and_their_wal_goes_away() {
    let (memory, bucket) = memory();
    let mut disk = SimDiskHandle::new(1);
    let mut expected = Vec::new();
    for round in 0..8 {
        let mut writer = Writer::open(&disk, &bucket, round).unwrap();
        assert_eq!(writer.numbers(), expected, "round {round}");
        for number in round * 100..round * 100 + 50 {
            expected.push(number);
            writer.commit(number).unwrap();
            if number % 3 == 0 {
                writer.upload().unwrap();
            }
            if number % 10 == 0 {
                writer.flush(7).unwrap();
                writer.trim().unwrap();
            }
            if number % 20 == 0 {
                writer.merge().unwrap();
            }
        }
        while writer.recovered.uploader.step().unwrap() {}
        while !writer.flush(7).unwrap().is_empty() {}
        writer.trim().unwrap();
        let contents = memory.contents();
        let count =
            |directory: &str| contents.keys().filter(|name| name.as_str().contains(directory)).count();
        assert!(count("/wal/") <= 1, "round {round}: {} slices", count("/wal/"));
        assert!(count("/manifest/") <= 3 * 16 + 3, "round {round}: {} manifest objects", count("/manifest/"));
        assert!(disk.list("wal").unwrap().len() <= 3, "{:?}", disk.list("wal"));
        disk = disk.crash();
    }
    assert_eq!(Writer::open(&SimDiskHandle::new(9), &bucket, 77).unwrap().numbers(), expected);
}

#[test]
fn a_local_wal_that_history_went_on_without_is_set_aside_and_counted() {
    let (_, bucket) = memory();
    let disk = SimDiskHandle::new(1);
    let mut first = Writer::open(&disk, &bucket, 1).unwrap();
    for number in 1..=20 {
        first.commit(number).unwrap();
        if number == 5 {
            first.upload().unwrap();
        }
    }
    let mut second = Writer::open(&SimDiskHandle::new(2), &bucket, 2).unwrap();
    let kept = second.numbers();
    assert!(!kept.is_empty() && kept.len() < 20);
    second.commit(100).unwrap();
    while second.recovered.uploader.step().unwrap() {}

    let disk = disk.crash();
    let third = Writer::open(&disk, &bucket, 3).unwrap();
    assert_eq!(third.numbers(), [kept.clone(), vec![100]].concat());
    let set_aside = &third.recovered.report.set_aside;
    assert_eq!(set_aside.len(), 1);
    assert_eq!((set_aside[0].epoch, set_aside[0].transactions), (Epoch(1), Some(20 - kept.len() as u64)));
    let files = disk.list(SET_ASIDE).unwrap();
    assert!(!files.is_empty() && files.iter().all(|name| name.contains(&set_aside[0].label)));
    let again = Writer::open(&disk, &bucket, 4).unwrap();
    assert_eq!(again.recovered.report.set_aside, [], "reported once, when it happens");
    assert_eq!(disk.list(SET_ASIDE).unwrap(), files, "and never deleted");
}

#[test]
fn a_fenced_writer_deletes_nothing_and_overwrites_nothing() {
    let (memory, bucket) = memory();
    let mut old = Writer::open(&SimDiskHandle::new(1), &bucket, 1).unwrap();
    for number in 1..=30 {
        old.commit(number).unwrap();
        old.upload().unwrap();
    }
    old.flush(20).unwrap();
    old.flush(5).unwrap();
    old.commit(31).unwrap();
    let new = Writer::open(&SimDiskHandle::new(2), &bucket, 2).unwrap();
    let before = memory.contents();
    assert_eq!(old.trim().unwrap_err().kind(), Kind::Fenced);
    assert_eq!(memory.contents(), before, "not one slice is gone");
    assert_eq!(old.upload().unwrap_err().kind(), Kind::Fenced);
    assert_eq!(old.flush(1).unwrap_err().kind(), Kind::Fenced);
    let after = memory.contents();
    assert!(before.iter().all(|(name, body)| after.get(name) == Some(body)), "what it sent are new names");
    let again = Writer::open(&SimDiskHandle::new(3), &bucket, 3).unwrap();
    assert_eq!(again.numbers(), new.numbers(), "and nobody takes them for anything");
}

#[test]
fn a_start_elsewhere_that_never_took_over_costs_the_old_machine_nothing() {
    let (_, bucket) = memory();
    let disk = SimDiskHandle::new(1);
    let mut first = Writer::open(&disk, &bucket, 1).unwrap();
    first.commit(1).unwrap();
    // Another machine claims and dies before it publishes.
    bucket.put_if_absent(&names().claim(2), Bytes::from_static(b"claimed by a machine that died")).unwrap();
    assert_eq!(first.upload().unwrap_err().kind(), Kind::Fenced);
    let again = Writer::open(&disk.crash(), &bucket, 2).unwrap();
    assert_eq!((again.numbers(), again.recovered.epoch), (vec![1], Epoch(3)));
}

#[test]
fn the_disk_of_another_bucket_is_not_mistaken_for_ones_own() {
    let (_, one) = memory();
    let (_, other) = memory();
    let disk = SimDiskHandle::new(1);
    Writer::open(&disk, &one, 1).unwrap().commit(1).unwrap();
    Writer::open(&SimDiskHandle::new(2), &other, 2).unwrap().commit(2).unwrap();
    let writer = Writer::open(&disk.kill(), &other, 3).unwrap();
    assert!(writer.numbers().is_empty());
    assert_eq!(writer.recovered.report.set_aside.len(), 1, "both are epoch 1 of a branch called main");
}

#[test]
fn a_damaged_or_lost_object_is_refused_by_name() {
    let build = || {
        let (memory, bucket) = memory();
        let disk = SimDiskHandle::new(1);
        let mut writer = Writer::open(&disk, &bucket, 1).unwrap();
        for number in 1..=30 {
            writer.commit(number).unwrap();
            writer.upload().unwrap();
            if number == 10 {
                writer.flush(10).unwrap();
            }
        }
        (memory, bucket)
    };
    let (memory, _) = build();
    let objects: Vec<_> = memory.contents().into_keys().collect();
    for name in
        objects.iter().filter(|name| !name.as_str().contains("/epoch/") && !name.as_str().contains("/sst/"))
    {
        for damage in 0..4 {
            let (memory, bucket) = build();
            let body = memory.contents()[name].to_vec();
            let mut changed = body.clone();
            match damage {
                0 => changed[body.len() / 2] ^= 1,
                1 => changed.truncate(body.len() - 1),
                2 => changed[8] = 200,
                _ => changed.clear(),
            }
            memory.tamper(name, Some(changed.into()));
            match Writer::open(&SimDiskHandle::new(5), &bucket, 9) {
                Ok(writer) => {
                    // Only what no start reads: slices that are flushed.
                    assert_eq!(
                        writer.numbers(),
                        (1..=30).collect::<Vec<_>>(),
                        "{name} damaged in way {damage}"
                    );
                }
                Err(error) => {
                    assert!(error.to_string().contains(name.as_str()), "{name} in way {damage}: {error}")
                }
            }
        }
    }
    let (memory, bucket) = build();
    for name in memory.contents().into_keys().filter(|name| name.as_str().contains("/manifest/")) {
        memory.tamper(&name, None);
    }
    let error = Writer::open(&SimDiskHandle::new(5), &bucket, 9).err().expect("not taken for a new branch");
    assert!(error.to_string().contains("the manifest was lost"), "{error}");
}

/// A life of a writer with something of everything. Notes what was acknowledged, and what was uploaded.
fn life(
    writer: &mut Writer,
    from: u64,
    acknowledged: &mut Vec<u64>,
    uploaded: &mut BTreeSet<u64>,
) -> Result<()> {
    for number in from..from + 24 {
        writer.commit(number)?;
        acknowledged.push(number);
        if number % 4 == 1 {
            uploaded.extend(writer.upload()?);
        }
        if number % 6 == 2 {
            uploaded.extend(writer.flush(3)?);
        }
        if number % 8 == 3 {
            writer.trim()?;
        }
        if number % 12 == 7 {
            uploaded.extend(writer.merge()?);
        }
    }
    Ok(())
}

/// Stops the first life at step `first`, the start after it at step `second`, and then starts in peace. Whether there is a step `first`.
fn stop_twice(seed: u64, first: Stop, second: Stop) -> bool {
    let (_, bucket) = memory();
    let disk = SimDiskHandle::new(seed);
    let (mut acknowledged, mut uploaded) = (Vec::new(), BTreeSet::new());
    // A calm life before, so that there is something to lose.
    let mut writer = Writer::open(&disk, &bucket, 1).unwrap();
    life(&mut writer, 0, &mut acknowledged, &mut uploaded).unwrap();

    let disk = disk.kill();
    let (view, faulty) = first.arm(&disk, &bucket);
    if let Ok(mut writer) = Writer::open(&disk, &view, 2) {
        drop(life(&mut writer, 100, &mut acknowledged, &mut uploaded));
    }
    let reached = disk.stopped() || faulty.log().iter().any(|request| request.decision.fault.is_some());
    let disk = disk.crash();

    let (view, _) = second.arm(&disk, &bucket);
    if let Ok(mut writer) = Writer::open(&disk, &view, 3) {
        drop(life(&mut writer, 200, &mut acknowledged, &mut uploaded));
    }

    // The machine is lost, or comes back.
    let context = format!("seed {seed}, {first:?} then {second:?}");
    if seed.is_multiple_of(2) {
        let found: BTreeSet<u64> =
            Writer::open(&SimDiskHandle::new(9), &bucket, 4).expect(&context).numbers().into_iter().collect();
        let lost: Vec<_> = uploaded.difference(&found).collect();
        assert!(lost.is_empty(), "{context}: {lost:?} were uploaded and are lost");
    } else {
        let writer = Writer::open(&disk.crash(), &bucket, 4).expect(&context);
        let found: BTreeSet<u64> = writer.numbers().into_iter().collect();
        let lost: Vec<_> = acknowledged.iter().filter(|number| !found.contains(number)).collect();
        assert!(lost.is_empty(), "{context}: {lost:?} were acknowledged and are lost");
        assert_eq!(writer.recovered.report.set_aside, [], "{context}");
    }
    reached
}

#[derive(Clone, Copy, Debug)]
enum Stop {
    Disk(u64),
    BucketBefore(u64),
    BucketAfter(u64),
}

impl Stop {
    /// The bucket as it will be seen, twice.
    fn arm(self, disk: &SimDiskHandle, bucket: &Arc<dyn Bucket>) -> (Arc<dyn Bucket>, Arc<FaultyBucket>) {
        let stop = |requests| Rule::new("*", Effect::Reset).after(requests);
        let rules = match self {
            Self::Disk(step) => {
                disk.arm(DiskFault::StopAt(disk.operations() + step));
                vec![]
            }
            Self::BucketBefore(step) => vec![stop(step)],
            Self::BucketAfter(step) => vec![stop(step).times(1).when(When::After), stop(step + 1)],
        };
        let faulty = Arc::new(FaultyBucket::new(Arc::clone(bucket), 1, rules));
        (faulty.clone(), faulty)
    }
}

#[test]
fn a_stop_at_any_step_of_a_start_or_a_life_loses_nothing() {
    for step in 0.. {
        let mut reached = false;
        for (kind, stop) in
            [Stop::Disk(step), Stop::BucketBefore(step), Stop::BucketAfter(step)].into_iter().enumerate()
        {
            for seed in 0..2 {
                let second =
                    [Stop::Disk(step % 17), Stop::BucketAfter(step % 23)][(step as usize + kind) % 2];
                reached |= stop_twice(step * 10 + seed, stop, second);
            }
        }
        if !reached {
            assert!(step > 60, "the life has more steps than {step}");
            break;
        }
    }
}

#[test]
fn a_stop_at_any_step_of_the_start_after_a_stop_loses_nothing() {
    for step in 0..60 {
        for first in [
            Stop::Disk(7),
            Stop::Disk(23),
            Stop::BucketAfter(9),
            Stop::BucketBefore(31),
            Stop::BucketAfter(14),
        ] {
            for (seed, second) in
                [Stop::Disk(step), Stop::BucketBefore(step), Stop::BucketAfter(step)].into_iter().enumerate()
            {
                stop_twice(step * 10 + seed as u64, first, second);
                stop_twice(step * 10 + seed as u64 + 1, first, second);
            }
        }
    }
}
