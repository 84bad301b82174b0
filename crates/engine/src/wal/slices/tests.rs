use bucket::{Effect, FaultyBucket, MemoryBucket, Operation, Rule, When};

use super::*;
use crate::wal::{Op, WalLimits};
use crate::{BranchId, Disk, Kind, Seqno, SimDisk};

const BRANCH: BranchId = BranchId([5; 16]);
const EPOCH: Epoch = Epoch(2);
const START: WalPosition = WalPosition(1000);

fn stream() -> Stream {
    Stream::new(BRANCH, EPOCH)
}

fn names() -> Names {
    Names::new("main")
}

struct Fixture {
    disk: SimDisk,
    wal: Arc<Wal>,
    uploader: Uploader,
    seqno: u64,
}

impl Fixture {
    fn new(bucket: Arc<dyn Bucket>) -> Self {
        let limits =
            WalLimits { segment_bytes: 512, buffered_bytes_max: 4096, chunk_bytes: 256, slice_bytes: 300 };
        let disk = SimDisk::new(1);
        let wal = Arc::new(Wal::create(Arc::new(disk.clone()), stream(), START, limits).unwrap());
        let fence = Fence::new(Arc::clone(&bucket), names(), EPOCH);
        let uploader = Uploader::new(Arc::clone(&wal), bucket, names(), fence, []);
        Self { disk, wal, uploader, seqno: 0 }
    }

    fn commit(&mut self, bytes: usize) {
        self.seqno += 1;
        let value = vec![self.seqno as u8; bytes];
        let op = Op::Put(b"\0\0\0\x01k", &value);
        let mut slot = self.wal.reserve(op.encoded_len(), Seqno(self.seqno)).unwrap();
        slot.write(op);
        let end = slot.finish();
        self.wal.sync_to(end).unwrap();
    }
}

/// The seqnos in the chain from `START` on, as a start would read them.
fn read(bucket: &dyn Bucket) -> Vec<u64> {
    let mut seqnos = Vec::new();
    for (first, end) in chain(bucket, &names(), EPOCH, START, None).unwrap().slices {
        let name = names().wal_slice(EPOCH.0, first.0);
        let mut last = first;
        read_slice(&stream(), first, &bucket.get(&name).unwrap(), &name, &mut |record| {
            assert_eq!(record.position, last);
            last = record.end;
            seqnos.push(record.seqno.0);
            Ok(())
        })
        .unwrap();
        assert_eq!(last, end, "a slice ends where a record ends");
    }
    seqnos
}

fn put_rule(when: When, probability: f64) -> Vec<Rule> {
    let rule = Rule::new("*/wal/*", Effect::Reset).on(Operation::Put).when(when);
    vec![rule.with_probability(probability)]
}

#[test]
fn slices_hold_whole_records_and_follow_one_another() {
    let bucket = Arc::new(MemoryBucket::new());
    let mut fixture = Fixture::new(bucket.clone());
    assert!(!fixture.uploader.step().unwrap(), "nothing to upload is no request");
    assert_eq!(bucket.meters().put.requests() + bucket.meters().get.requests(), 0);
    for bytes in [10, 200, 200, 5000, 1, 299, 0] {
        fixture.commit(bytes);
    }
    let mut slices = 0;
    while fixture.uploader.step().unwrap() {
        slices += 1;
    }
    assert_eq!(read(&*bucket), (1..=7).collect::<Vec<_>>());
    assert!(slices > 3, "{slices}");
    assert_eq!(fixture.uploader.uploaded(), fixture.wal.durable());
}

#[test]
fn an_earlier_shorter_try_that_lands_late_cuts_nothing() {
    let bucket = Arc::new(MemoryBucket::new());
    let slow = Arc::new(FaultyBucket::new(bucket.clone(), 1, put_rule(When::Late(1_000_000), 1.0)));
    let mut fixture = Fixture::new(slow.clone());
    fixture.commit(10);
    assert_eq!(fixture.uploader.step().unwrap_err().kind(), Kind::Unavailable);
    // More commits come before the next try, which gets through.
    fixture.commit(10);
    fixture.commit(10);
    slow.faults().set_rules(vec![]);
    while fixture.uploader.step().unwrap() {}
    assert_eq!(read(&*bucket), [1, 2, 3]);
    assert_eq!(slow.land_late(), 1);
    assert_eq!(read(&*bucket), [1, 2, 3]);
}

#[test]
fn lost_answers_leave_no_gap_and_no_false_promise() {
    for seed in 0..100 {
        let bucket = Arc::new(MemoryBucket::new());
        let mut rules = put_rule(When::After, 0.3);
        rules.extend(put_rule(When::Late(seed as u32 % 7), 0.3));
        rules.extend(put_rule(When::Before, 0.1));
        let faulty = Arc::new(FaultyBucket::new(bucket.clone(), seed, rules));
        let mut fixture = Fixture::new(faulty.clone());
        for number in 0..60 {
            fixture.commit(number * 13 % 150);
            match fixture.uploader.step() {
                Ok(_) => (),
                Err(error) => assert_eq!(error.kind(), Kind::Unavailable),
            }
            let uploaded = fixture.uploader.uploaded();
            let there = chain(&*bucket, &names(), EPOCH, START, None).unwrap().end_or(START);
            assert!(there >= uploaded, "seed {seed}: {there:?} is there, {uploaded:?} was promised");
        }
        faulty.land_late();
        let seqnos = read(&*bucket);
        assert_eq!(seqnos, (1..=seqnos.len() as u64).collect::<Vec<_>>(), "seed {seed}");
    }
}

#[test]
fn what_the_local_disk_gives_back_wrongly_does_not_go_up() {
    let bucket = Arc::new(MemoryBucket::new());
    let mut fixture = Fixture::new(bucket.clone());
    fixture.commit(100);
    fixture.commit(100);
    let name = fixture.disk.list("wal").unwrap()[0].clone();
    fixture.disk.tamper(&name, |bytes| bytes[64 + 32 + 100 + 10 + 32 + 20] ^= 1);
    assert!(fixture.uploader.step().unwrap(), "the first record is whole");
    assert_eq!(fixture.uploader.step().unwrap_err().kind(), Kind::Corrupt);
    assert_eq!(read(&*bucket), [1]);
}

#[test]
fn a_hint_always_leads_to_the_place_it_was_asked_for() {
    let bucket = Arc::new(MemoryBucket::new());
    let faulty = Arc::new(FaultyBucket::new(bucket, 3, put_rule(When::After, 0.4)));
    let mut fixture = Fixture::new(faulty);
    let mut ends = vec![START];
    for number in 0..80 {
        fixture.commit(number * 17 % 120);
        ends.push(fixture.wal.durable());
        if number % 3 == 0 {
            drop(fixture.uploader.step());
        }
        for end in &ends {
            let hint = fixture.uploader.slice_at(*end);
            assert!(hint <= *end, "{hint:?} lies behind {end:?}");
            let known = fixture.uploader.state.lock();
            let begins = known.slices.contains_key(&hint.0);
            let next = known.uploaded == hint.0 || known.sent == Some(hint.0);
            assert!(begins || next, "no slice begins at {hint:?}, nor will the next one");
        }
    }
}

#[test]
fn a_missing_slice_in_a_wal_that_has_ended_is_named() {
    let bucket = Arc::new(MemoryBucket::new());
    let mut fixture = Fixture::new(bucket.clone());
    (0..10).for_each(|_| fixture.commit(200));
    while fixture.uploader.step().unwrap() {}
    let end = fixture.uploader.uploaded();
    let slices = chain(&*bucket, &names(), EPOCH, START, Some(end)).unwrap().slices;
    assert!(slices.len() > 5);
    // Beyond the end, whatever it is.
    bucket.put(&names().wal_slice(EPOCH.0, end.0), Bytes::from_static(b"late")).unwrap();
    assert_eq!(chain(&*bucket, &names(), EPOCH, START, Some(end)).unwrap().slices, slices);
    let gone = names().wal_slice(EPOCH.0, slices[3].0.0);
    bucket.tamper(&gone, None);
    let error = chain(&*bucket, &names(), EPOCH, START, Some(end)).unwrap_err();
    assert!(error.kind() == Kind::Corrupt && error.to_string().contains(gone.as_str()), "{error}");
    let open = chain(&*bucket, &names(), EPOCH, START, None).unwrap();
    assert_eq!(open.slices, slices[..3], "an open wal ends at the gap");
}

#[test]
fn a_listing_that_is_behind_hides_no_slice() {
    for seed in 0..50 {
        let bucket = Arc::new(MemoryBucket::new());
        let rule = Rule::new("*", if seed % 2 == 0 { Effect::StaleList } else { Effect::ListTwice });
        let faulty = Arc::new(FaultyBucket::new(bucket.clone(), seed, vec![rule]));
        let mut fixture = Fixture::new(faulty.clone());
        (0..10).for_each(|_| fixture.commit(200));
        while fixture.uploader.step().unwrap() {}
        assert_eq!(read(&*faulty), (1..=10).collect::<Vec<_>>(), "seed {seed}");
    }
}
