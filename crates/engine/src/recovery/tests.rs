//! Writers that crash, lose disks, are overtaken and come back as zombies, over a bucket that loses answers and carries
//! out requests late. A ledger outside of them knows what was promised.
//!
//! A transaction is one put of a number that is never used again; an "sst" is a list of such numbers, so that what a start
//! recovers can be compared with the ledger exactly.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bucket::{Effect, FaultyBucket, MemoryBucket, Operation, PutOutcome, Rule, When};

use bytes::Bytes;
use parking_lot::Mutex;

use super::*;
use crate::manifest::Flushed;
use crate::version::SstMeta;
use crate::{DiskFault, SstId, full_key};

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

/// What becomes of a request.
enum Go {
    On,
    FailBefore,
    FailAfter,
}

/// A bucket that asks before each request.
struct HookedBucket {
    inner: Arc<dyn Bucket>,
    hook: Box<dyn Fn() -> Go + Send + Sync>,
}

impl HookedBucket {
    fn request<T>(
        &self,
        name: &bucket::ObjectName,
        act: impl FnOnce() -> std::result::Result<T, bucket::BucketError>,
    ) -> std::result::Result<T, bucket::BucketError> {
        match (self.hook)() {
            Go::On => return act(),
            Go::FailBefore => (),
            Go::FailAfter => drop(act()),
        }
        Err(bucket::BucketError {
            kind: bucket::ErrorKind::Unavailable,
            operation: "ANY",
            name: name.clone(),
            message: "the test stops here".to_owned(),
        })
    }
}

impl Bucket for HookedBucket {
    fn put_if_absent(
        &self,
        name: &bucket::ObjectName,
        body: Bytes,
    ) -> std::result::Result<PutOutcome, bucket::BucketError> {
        self.request(name, || self.inner.put_if_absent(name, body))
    }
    fn put(&self, name: &bucket::ObjectName, body: Bytes) -> std::result::Result<(), bucket::BucketError> {
        self.request(name, || self.inner.put(name, body))
    }
    fn get(&self, name: &bucket::ObjectName) -> std::result::Result<Bytes, bucket::BucketError> {
        self.request(name, || self.inner.get(name))
    }
    fn get_ranges(
        &self,
        name: &bucket::ObjectName,
        ranges: &[std::ops::Range<u64>],
    ) -> std::result::Result<Vec<Bytes>, bucket::BucketError> {
        self.request(name, || self.inner.get_ranges(name, ranges))
    }
    fn head(&self, name: &bucket::ObjectName) -> std::result::Result<Option<u64>, bucket::BucketError> {
        self.request(name, || self.inner.head(name))
    }
    fn list(
        &self,
        prefix: &bucket::ObjectName,
    ) -> std::result::Result<Vec<bucket::ObjectInfo>, bucket::BucketError> {
        self.request(prefix, || self.inner.list(prefix))
    }
    fn delete(&self, names: &[bucket::ObjectName]) -> std::result::Result<(), bucket::BucketError> {
        self.request(&names[0], || self.inner.delete(names))
    }
    fn meters(&self) -> &bucket::Meters {
        self.inner.meters()
    }
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

/// Stops the first life at step `first`, the start after it at step `second`, and then starts in peace.
fn stop_twice(seed: u64, first: Stop, second: Stop) -> (bool, bool) {
    let (_, bucket) = memory();
    let disk = SimDiskHandle::new(seed);
    let (mut acknowledged, mut uploaded) = (Vec::new(), BTreeSet::new());
    // A calm life before, so that there is something to lose.
    let mut writer = Writer::open(&disk, &bucket, 1).unwrap();
    life(&mut writer, 0, &mut acknowledged, &mut uploaded).unwrap();

    let disk = disk.kill();
    let (view, stopped) = first.arm(&disk, &bucket);
    if let Ok(mut writer) = Writer::open(&disk, &view, 2) {
        drop(life(&mut writer, 100, &mut acknowledged, &mut uploaded));
    }
    let reached = (disk.stopped() || stopped.load(Ordering::Relaxed), false);
    let disk = disk.crash();

    let (view, stopped) = second.arm(&disk, &bucket);
    if let Ok(mut writer) = Writer::open(&disk, &view, 3) {
        drop(life(&mut writer, 200, &mut acknowledged, &mut uploaded));
    }
    let reached = (reached.0, disk.stopped() || stopped.load(Ordering::Relaxed));

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
    /// The bucket as it will be seen, and whether it has stopped.
    fn arm(self, disk: &SimDiskHandle, bucket: &Arc<dyn Bucket>) -> (Arc<dyn Bucket>, Arc<AtomicBool>) {
        let (mut requests, mut after) = (u64::MAX, false);
        match self {
            Self::Disk(step) => disk.arm(DiskFault::StopAt(disk.operations() + step)),
            Self::BucketBefore(step) => requests = step,
            Self::BucketAfter(step) => (requests, after) = (step, true),
        }
        let seen = AtomicU64::new(0);
        let stopped = Arc::new(AtomicBool::new(false));
        let reached = Arc::clone(&stopped);
        let hook = move || match seen.fetch_add(1, Ordering::Relaxed).cmp(&requests) {
            std::cmp::Ordering::Less => Go::On,
            order => {
                reached.store(true, Ordering::Relaxed);
                if after && order.is_eq() { Go::FailAfter } else { Go::FailBefore }
            }
        };
        (Arc::new(HookedBucket { inner: Arc::clone(bucket), hook: Box::new(hook) }), stopped)
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
                reached |= stop_twice(step * 10 + seed, stop, second).0;
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

/// What a faulty store may do to one writer.
fn faults(chance: &mut Chance) -> Vec<Rule> {
    let mut rule = |operation, when, effect, most: u64| Rule {
        operation,
        names: "*".to_owned(),
        probability: (chance.next() % (most + 1)) as f64 / 100.0,
        when,
        effect,
        times: None,
    };
    vec![
        rule(None, When::Before, Effect::Status { code: 503, burst: 1 }, 6),
        rule(Some(Operation::Put), When::After, Effect::Reset, 12),
        rule(Some(Operation::Put), When::Late(7), Effect::Reset, 8),
        rule(Some(Operation::Put), When::Late(1_000_000), Effect::Reset, 8),
        rule(Some(Operation::Delete), When::Late(9), Effect::Reset, 10),
        rule(Some(Operation::List), When::Before, Effect::ListTwice, 20),
    ]
}

/// A data directory and the process that runs on it, if one does.
struct Machine {
    disk: SimDiskHandle,
    writer: Option<Writer>,
    /// What was acknowledged in each epoch that this disk may continue: all that its writer knew.
    promised: Option<(Epoch, BTreeSet<u64>)>,
}

struct World {
    seed: u64,
    chance: Chance,
    inner: Arc<dyn Bucket>,
    machines: Vec<Machine>,
    faulty: Vec<Arc<FaultyBucket>>,
    number: u64,
    /// Promised to survive whatever happens to machines.
    safe: BTreeSet<u64>,
    /// Not in the history that a later writer started from.
    dead: BTreeSet<u64>,
    newest: Epoch,
    starts: u64,
    fenced: u64,
    set_aside: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let (_, inner) = memory();
        let machine = |n| Machine { disk: SimDiskHandle::new(seed * 3 + n), writer: None, promised: None };
        Self {
            seed,
            chance: Chance(seed),
            inner,
            machines: vec![machine(0), machine(1)],
            faulty: Vec::new(),
            number: 0,
            safe: BTreeSet::new(),
            dead: BTreeSet::new(),
            newest: Epoch(0),
            starts: 0,
            fenced: 0,
            set_aside: 0,
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.chance.next() % bound
    }

    fn step(&mut self) {
        let index = self.below(2) as usize;
        match self.below(40) {
            0 => self.end(index, SimDiskHandle::crash),
            1 => self.end(index, SimDiskHandle::kill),
            2 if self.below(4) == 0 => {
                let seed = self.chance.next();
                self.end(index, |_| SimDiskHandle::new(seed));
                self.machines[index].promised = None;
            }
            3 => {
                self.machines[index].disk.arm(DiskFault::StopAt(self.machines[index].disk.operations() + 20))
            }
            4 if self.below(4) == 0 => {
                let disk = &self.machines[index].disk;
                disk.arm(DiskFault::FailSyncAt(disk.operations()));
            }
            5 | 6 if !self.faulty.is_empty() => {
                let which = self.below(self.faulty.len() as u64) as usize;
                self.faulty[which].land_late();
            }
            7 => self.machines[index].disk.limit(self.machines[index].disk.used() + 600),
            8 => self.machines[index].disk.limit(u64::MAX),
            _ if self.machines[index].writer.is_some() => self.act(index),
            _ => self.start(index),
        }
        for index in 0..2 {
            if self.machines[index].disk.stopped() {
                self.end(index, SimDiskHandle::crash);
            }
        }
    }

    fn end(&mut self, index: usize, how: impl FnOnce(&SimDiskHandle) -> SimDiskHandle) {
        let machine = &mut self.machines[index];
        machine.writer = None;
        machine.disk = how(&machine.disk);
    }

    fn start(&mut self, index: usize) {
        // Mostly one machine runs; sometimes the other one takes over from a living one.
        if self.machines[1 - index].writer.is_some() && self.below(6) != 0 {
            return;
        }
        let rules = faults(&mut self.chance);
        let tries = 1 + self.below(2) as u32;
        let faulty =
            Arc::new(FaultyBucket::new(Arc::clone(&self.inner), self.chance.next(), rules).with_tries(tries));
        let (bucket, meanwhile) = self.busy_bucket(index, Arc::clone(&faulty));
        self.faulty.push(faulty);
        let before = self.claims();
        let opened = Writer::open(&self.machines[index].disk, &bucket, self.chance.next());
        self.take_back(index, &meanwhile);
        let seed = self.seed;
        match opened {
            Ok(writer) => self.started(index, writer),
            Err(error) => {
                let expected = matches!(error.kind(), Kind::Unavailable | Kind::Full | Kind::Failed)
                    || (error.kind() == Kind::Fenced && self.claims() > before);
                assert!(expected, "seed {seed}: {error}");
                assert!(!error.to_string().contains("all the time"), "seed {seed}: {error}");
            }
        }
    }

    /// `faulty` as a start sees it while the world goes on: between its requests the other machine's writer acts, and
    /// writes of dead writers land.
    fn busy_bucket(
        &mut self,
        index: usize,
        faulty: Arc<FaultyBucket>,
    ) -> (Arc<dyn Bucket>, Arc<Mutex<Meanwhile>>) {
        let meanwhile = Arc::new(Mutex::new(Meanwhile {
            writer: self.machines[1 - index].writer.take(),
            chance: Chance(self.chance.next()),
            faulty: self.faulty.clone(),
            number: self.number,
            safe: Vec::new(),
            promised: Vec::new(),
            failure: None,
        }));
        let shared = Arc::clone(&meanwhile);
        let hook = move || {
            shared.lock().go_on();
            Go::On
        };
        (Arc::new(HookedBucket { inner: faulty, hook: Box::new(hook) }), meanwhile)
    }

    fn take_back(&mut self, index: usize, meanwhile: &Mutex<Meanwhile>) {
        let mut meanwhile = meanwhile.lock();
        self.number = meanwhile.number;
        self.safe.extend(meanwhile.safe.drain(..));
        let machine = &mut self.machines[1 - index];
        machine.writer = meanwhile.writer.take();
        if let Some((_, promised)) = &mut machine.promised {
            promised.extend(meanwhile.promised.drain(..));
        }
        match meanwhile.failure.take() {
            Some(Kind::Fenced) => {
                self.fenced += 1;
                self.end(1 - index, SimDiskHandle::kill);
            }
            Some(_) => self.end(1 - index, SimDiskHandle::kill),
            None => (),
        }
    }

    fn claims(&self) -> usize {
        self.inner.list(&names().claims()).unwrap().len()
    }

    fn started(&mut self, index: usize, writer: Writer) {
        let seed = self.seed;
        self.starts += 1;
        let found = writer.numbers();
        assert!(found.windows(2).all(|pair| pair[0] < pair[1]), "seed {seed}: out of order: {found:?}");
        let found: BTreeSet<u64> = found.into_iter().collect();
        let lost: Vec<_> = self.safe.difference(&found).collect();
        assert!(lost.is_empty(), "seed {seed}: {lost:?} were in the bucket for good and are lost");
        let risen: Vec<_> = self.dead.intersection(&found).collect();
        assert!(risen.is_empty(), "seed {seed}: {risen:?} came back from the dead");

        let machine = &self.machines[index];
        if let Some((epoch, promised)) = &machine.promised {
            let lost: BTreeSet<u64> = promised.difference(&found).copied().collect();
            let foreign = self.foreign_since(*epoch, &writer);
            assert!(
                lost.is_empty() || foreign,
                "seed {seed}: {lost:?} were acknowledged on this disk and are lost"
            );
            let aside = aside(&machine.disk);
            let gone: Vec<_> = lost.iter().filter(|number| !aside.contains(number)).collect();
            assert!(
                gone.is_empty(),
                "seed {seed}: {gone:?} were acknowledged and neither recovered nor set aside"
            );
            self.set_aside += u64::from(!lost.is_empty());
        }
        self.newest = writer.recovered.epoch;
        self.dead.extend((1..=self.number).filter(|number| !found.contains(number)));
        let machine = &mut self.machines[index];
        machine.promised = Some((writer.recovered.epoch, found));
        machine.writer = Some(writer);
    }

    /// Whether another disk's writer took over after `epoch`.
    fn foreign_since(&self, epoch: Epoch, writer: &Writer) -> bool {
        let node =
            |epoch: Epoch| self.inner.get(&names().claim(epoch.0)).map(|body| body[20..36].to_vec()).ok();
        let own = node(writer.recovered.epoch);
        writer
            .recovered
            .manifest
            .manifest()
            .wals
            .iter()
            .any(|span| span.epoch > epoch && node(span.epoch) != own)
    }

    fn act(&mut self, index: usize) {
        let mut writer = self.machines[index].writer.take().expect("the caller looked");
        let result = match self.below(16) {
            0..8 => {
                self.number += 1;
                let number = self.number;
                if writer.recovered.epoch < self.newest {
                    self.dead.insert(number);
                }
                writer.commit(number).map(|()| {
                    let (_, promised) = self.machines[index].promised.as_mut().expect("set when it started");
                    promised.insert(number);
                    vec![]
                })
            }
            8..11 => writer.upload(),
            11..13 => {
                let rows = 1 + self.below(5) as usize;
                writer.flush(rows)
            }
            13 => writer.merge(),
            _ => writer.trim().map(|()| vec![]),
        };
        match result {
            Ok(safe) => {
                // Only a writer that still was the newest when it looked promises anything.
                self.safe.extend(safe);
                self.machines[index].writer = Some(writer);
            }
            Err(error) => match error.kind() {
                Kind::Unavailable | Kind::Full => self.machines[index].writer = Some(writer),
                Kind::Failed => self.end(index, SimDiskHandle::kill),
                Kind::Fenced => {
                    self.fenced += 1;
                    self.end(index, SimDiskHandle::kill);
                }
                _ => panic!("seed {}: {error}", self.seed),
            },
        }
    }
}

/// What happens while a machine starts.
struct Meanwhile {
    writer: Option<Writer>,
    chance: Chance,
    faulty: Vec<Arc<FaultyBucket>>,
    number: u64,
    safe: Vec<u64>,
    promised: Vec<u64>,
    failure: Option<Kind>,
}

impl Meanwhile {
    fn go_on(&mut self) {
        if !self.faulty.is_empty() && self.chance.next().is_multiple_of(12) {
            let which = self.chance.next() as usize % self.faulty.len();
            self.faulty[which].land_late();
        }
        let Some(writer) = self.writer.as_mut().filter(|_| self.failure.is_none()) else { return };
        let result = match self.chance.next() % 12 {
            0 => {
                self.number += 1;
                writer.commit(self.number).map(|()| {
                    self.promised.push(self.number);
                    vec![]
                })
            }
            1 => writer.upload(),
            2 => writer.flush(3),
            3 => writer.merge(),
            4 => writer.trim().map(|()| vec![]),
            _ => Ok(vec![]),
        };
        match result {
            Ok(safe) => self.safe.extend(safe),
            Err(error) if matches!(error.kind(), Kind::Unavailable | Kind::Full) => (),
            Err(error) if matches!(error.kind(), Kind::Fenced | Kind::Failed) => {
                self.failure = Some(error.kind())
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// The numbers that occur in what was set aside.
fn aside(disk: &SimDiskHandle) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    let mut bytes = Vec::new();
    for name in disk.list(SET_ASIDE).unwrap_or_default() {
        let Ok(file) = disk.open(&name) else { continue };
        let mut content = vec![0; file.len().unwrap() as usize];
        file.read_at(0, &mut content).unwrap();
        // Records run across files, whose names sort as positions do.
        bytes.extend_from_slice(content.get(64..).unwrap_or_default());
    }
    let prefix = [&[1, 12, 8][..], &TREE.0.to_be_bytes()].concat();
    for at in 0..bytes.len().saturating_sub(15) {
        if bytes[at..].starts_with(&prefix) {
            found.insert(be(&bytes[at + 7..at + 15]));
        }
    }
    found
}

#[test]
fn no_promise_is_broken_whatever_machines_and_store_do() {
    let seeds = std::env::var("SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(300);
    let first = std::env::var("SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let (mut starts, mut fenced, mut set_aside, mut commits, mut safe) = (0, 0, 0, 0, 0);
    for seed in first..first + seeds {
        let mut world = World::new(seed);
        for _ in 0..400 {
            world.step();
        }
        starts += world.starts;
        fenced += world.fenced;
        set_aside += world.set_aside;
        commits += world.number;
        safe += world.safe.len();
    }
    println!("{starts} starts, {fenced} fenced, {set_aside} set aside, {commits} commits, {safe} safe");
    // A run in which nothing happens proves nothing.
    assert!(
        seeds < 100
            || (starts > 5 * seeds && fenced > seeds / 4 && set_aside > seeds / 10 && commits > 50 * seeds)
    );
}
