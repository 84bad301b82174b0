use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;

use super::*;
use crate::{BranchId, DiskFault, Epoch, RealDisk, SimDisk};

pub(crate) const BRANCH: BranchId = BranchId([5; 16]);
const EPOCH: Epoch = Epoch(2);
const START: WalPosition = WalPosition(1000);

pub(crate) fn small() -> WalLimits {
    WalLimits { segment_bytes: 512, buffered_bytes_max: 4096, chunk_bytes: 256, slice_bytes: 700 }
}

fn create(disk: &SimDisk) -> Result<Wal> {
    Wal::create(Arc::new(disk.clone()), Stream::new(BRANCH, EPOCH), START, small())
}

/// Reserves and fills a record with one put of `value`.
fn add(wal: &Wal, seqno: u64, value: &[u8]) -> Result<WalPosition> {
    let op = Op::Put(b"\0\0\0\x01k", value);
    let mut slot = wal.reserve(op.encoded_len(), Seqno(seqno))?;
    slot.write(op);
    Ok(slot.finish())
}

fn value(seqno: u64) -> Vec<u8> {
    vec![seqno as u8; (seqno as usize * 37) % 300]
}

fn read(disk: &dyn Disk, from: WalPosition) -> Result<(Vec<u64>, WalPosition)> {
    let mut found = Vec::new();
    let wal = LocalWal::open(disk, EPOCH)?;
    let end = wal.read(BRANCH, from, &mut |record| {
        for op in record.ops() {
            assert_eq!(op?, Op::Put(b"\0\0\0\x01k", &value(record.seqno.0)));
        }
        found.push(record.seqno.0);
        Ok(())
    })?;
    Ok((found, end))
}

#[test]
fn what_was_synced_is_read_back_in_order_from_any_record_on() {
    let disk = SimDisk::new(1);
    let wal = create(&disk).unwrap();
    let ends: Vec<_> = (1..=50).map(|seqno| add(&wal, seqno, &value(seqno)).unwrap()).collect();
    wal.sync_to(ends[49]).unwrap();
    assert_eq!((wal.durable(), wal.end()), (ends[49], ends[49]));
    let disk = disk.crash();
    assert_eq!(read(&disk, START).unwrap(), ((1..=50).collect(), ends[49]));
    assert_eq!(read(&disk, ends[19]).unwrap(), ((21..=50).collect(), ends[49]));
    assert_eq!(read(&disk, ends[49]).unwrap(), (vec![], ends[49]));
}

#[test]
fn a_slot_that_was_given_up_holds_up_nobody() {
    let disk = SimDisk::new(1);
    let wal = create(&disk).unwrap();
    drop(wal.reserve(40, Seqno(1)).unwrap());
    let mut half = wal.reserve(100, Seqno(2)).unwrap();
    half.fill(&[1, 2, 3]);
    drop(half);
    let end = add(&wal, 3, &value(3)).unwrap();
    wal.sync_to(end).unwrap();
    let (found, found_end) = read(&disk, START).unwrap();
    assert_eq!((found, found_end), (vec![1, 2, 3], end), "void records are there and empty");
}

#[test]
fn a_crash_loses_nothing_that_was_synced_and_tears_nothing() {
    for seed in 0..400 {
        let disk = SimDisk::new(seed);
        disk.arm(DiskFault::StopAt(3 + seed % 97));
        let mut synced = 0;
        let mut tried = 0;
        if let Ok(wal) = create(&disk) {
            for group in 0.. {
                let mut end = START;
                let added = (0..=(seed + group) % 4).try_for_each(|_| {
                    tried += 1;
                    end = add(&wal, tried, &value(tried))?;
                    Ok::<_, Error>(())
                });
                if added.and_then(|()| wal.sync_to(end)).is_err() {
                    break;
                }
                synced = tried;
            }
        }
        let disk = if seed % 3 == 0 { disk.kill() } else { disk.crash() };
        let (found, end) = read(&disk, START).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let expected: Vec<u64> = (1..=found.len() as u64).collect();
        assert_eq!(found, expected, "seed {seed}: a prefix");
        assert!(found.len() as u64 >= synced, "seed {seed}: {} found, {synced} synced", found.len());
        assert!(found.len() as u64 <= tried && end >= START, "seed {seed}");
    }
}

#[test]
fn a_crash_loses_nothing_where_segments_that_were_trimmed_are_used_again() {
    let mut reused = 0;
    for seed in 0..600 {
        let disk = SimDisk::new(seed);
        disk.arm(DiskFault::StopAt(20 + seed % 211));
        // Some files are less than a block long, some have several.
        let segment_bytes = if seed % 2 == 0 { 512 } else { 3 * 4096 - 64 };
        let limits = WalLimits { segment_bytes, ..small() };
        let mut ends = vec![START];
        let (mut synced, mut trimmed) = (0, 0);
        if let Ok(wal) = Wal::create(Arc::new(disk.clone()), Stream::new(BRANCH, EPOCH), START, limits) {
            for group in 0.. {
                let added = (0..=(seed + group) % 4).try_for_each(|_| {
                    let seqno = ends.len() as u64;
                    ends.push(add(&wal, seqno, &value(seqno))?);
                    Ok::<_, Error>(())
                });
                let end = *ends.last().expect("it starts with one");
                if added.and_then(|()| wal.sync_to(end)).is_err() {
                    break;
                }
                synced = ends.len() - 1;
                if (seed + group) % 3 == 0 {
                    trimmed = synced - group as usize % 2;
                    let spares = wal.segments.spares();
                    let done = wal.segments.trim(ends[trimmed].0).is_ok() && wal.prepare().is_ok();
                    reused += usize::from(done && wal.segments.spares() < spares);
                    if !done {
                        break;
                    }
                }
            }
        }
        let disk = if seed % 3 == 0 { disk.kill() } else { disk.crash() };
        let (found, _) = read(&disk, ends[trimmed]).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let expected: Vec<u64> = (trimmed as u64 + 1..).take(found.len()).collect();
        assert_eq!(found, expected, "seed {seed}: what comes next");
        assert!(trimmed + found.len() >= synced, "seed {seed}: {} found of {synced}", trimmed + found.len());
        assert!(trimmed + found.len() < ends.len(), "seed {seed}: a record of an earlier use of the file");
        // The next run takes over the spares that fit.
        let next = WalPosition(1 << 40);
        let stream = Stream::new(BRANCH, Epoch(3));
        let wal = Wal::create(Arc::new(disk.clone()), stream, next, limits).unwrap();
        let end = add(&wal, 1, &value(1)).unwrap();
        wal.sync_to(end).unwrap();
        assert!(wal.segments.spares() <= 4, "seed {seed}");
    }
    assert!(reused > 100, "{reused} spares were used");
}

/// Segments were trimmed, and whether their new names are durable is unknown. What their files are used for next must not come back under the
/// old names.
#[test]
fn a_power_cut_brings_no_old_name_back_over_what_its_file_became() {
    for seed in 0..600 {
        let disk = SimDisk::new(seed);
        let wal = create(&disk).unwrap();
        let mut ends = vec![START];
        let sync_next = |ends: &mut Vec<WalPosition>| {
            let seqno = ends.len() as u64;
            let end = add(&wal, seqno, &value(seqno))?;
            wal.sync_to(end)?;
            ends.push(end);
            Ok::<_, Error>(())
        };
        (0..12 + seed % 7).for_each(|_| sync_next(&mut ends).unwrap());
        let trimmed = ends.len() - 1;
        let restarts = seed % 2 == 0;
        if restarts {
            // The process is killed between the renames and the sync, and the next one takes the spares over.
            disk.arm(DiskFault::PanicAt(disk.operations() + 1 + seed % 3));
            let trim = || wal.segments.trim(ends[trimmed].0).is_ok();
            _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(trim));
            let disk = disk.kill();
            let stream = Stream::new(BRANCH, Epoch(3));
            disk.arm(DiskFault::StopAt(disk.operations() + seed % 29));
            let used = Wal::create(Arc::new(disk.clone()), stream, WalPosition(1 << 40), small())
                .and_then(|wal| (1..20).try_for_each(|seqno| wal.sync_to(add(&wal, seqno, &value(seqno))?)));
            assert!(used.is_err(), "seed {seed}");
            let (found, _) =
                read(&disk.crash(), ends[trimmed]).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            assert!(found.is_empty(), "seed {seed}");
        } else {
            disk.arm(DiskFault::FailSyncAt(disk.operations()));
            wal.segments.trim(ends[trimmed].0).expect_err("its only sync fails");
            disk.arm(DiskFault::StopAt(disk.operations() + seed % 29));
            while sync_next(&mut ends).is_ok() {}
            let (found, _) =
                read(&disk.crash(), ends[trimmed]).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            let synced = ends.len() - 1;
            assert!(
                trimmed + found.len() >= synced,
                "seed {seed}: {} found of {synced}",
                trimmed + found.len()
            );
        }
    }
}

#[test]
fn nothing_is_acknowledged_behind_a_group_whose_leader_panicked() {
    let disk = SimDisk::new(1);
    let wal = create(&disk).unwrap();
    let first = add(&wal, 1, &value(1)).unwrap();
    wal.sync_to(first).unwrap();
    let lost = add(&wal, 2, &value(2)).unwrap();
    disk.arm(DiskFault::PanicAt(disk.operations()));
    let led = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| wal.sync_to(lost)));
    assert!(led.is_err(), "the leader panics");
    let behind = add(&wal, 3, &value(3)).map(|end| wal.sync_to(end));
    assert!(!matches!(behind, Ok(Ok(()))), "a restart would stop at the hole before it");
    assert_eq!(wal.sync_to(lost).unwrap_err().kind(), Kind::Failed);
    assert_eq!(wal.durable(), first);
    assert_eq!(read(&disk.crash(), START).unwrap(), (vec![1], first));
}

#[test]
fn damage_before_the_tail_is_an_error_that_names_the_file() {
    let disk = SimDisk::new(1);
    let wal = create(&disk).unwrap();
    let mut ends = vec![START];
    for seqno in 1..=12 {
        let end = add(&wal, seqno, &value(seqno)).unwrap();
        wal.sync_to(end).unwrap();
        ends.push(end);
    }
    let names: Vec<String> = LocalWal::files(&disk, EPOCH).unwrap();
    let disk = disk.kill();
    for (index, name) in names.iter().enumerate() {
        let first = START.0 + 512 * index as u64;
        for offset in (0..64 + 512).step_by(7) {
            // The newest record's own sync is proven by nothing behind it: it looks like a torn tail. Nor does the
            // header of a file matter once it is known whose wal this is.
            let stream = first + offset.max(64) as u64 - 64;
            disk.tamper(name, |bytes| bytes[offset] ^= 0x10);
            match read(&disk, START) {
                Ok((found, _)) if offset < 64 => assert_eq!(found.len(), 12),
                Ok((found, _)) => {
                    assert!(stream >= ends[11].0 && found.len() >= 11, "{name} at {offset}: {found:?}")
                }
                Err(error) => {
                    assert!(
                        stream < ends[11].0 && error.kind() == Kind::Corrupt,
                        "{name} at {offset}: {error}"
                    );
                    assert!(error.to_string().contains("wal/0000000000000002-"), "{error}");
                }
            }
            disk.tamper(name, |bytes| bytes[offset] ^= 0x10);
        }
    }
    disk.remove(&names[1]).unwrap();
    assert_eq!(read(&disk, START).unwrap_err().kind(), Kind::Corrupt, "a file is missing in the middle");
}

#[test]
fn a_failed_sync_ends_all_acknowledgement() {
    let disk = SimDisk::new(1);
    let wal = create(&disk).unwrap();
    let end = add(&wal, 1, &value(1)).unwrap();
    wal.sync_to(end).unwrap();
    let second = add(&wal, 2, &value(2)).unwrap();
    disk.arm(DiskFault::FailSyncAt(disk.operations()));
    let error = wal.sync_to(second).unwrap_err();
    assert!(error.kind() == Kind::Failed && error.to_string().contains("Input/output error"), "{error}");
    assert_eq!(wal.sync_to(second).unwrap_err().kind(), Kind::Failed, "the next sync would succeed and lie");
    assert_eq!(add(&wal, 3, &value(3)).unwrap_err().kind(), Kind::Failed);
    wal.sync_to(end).expect("what was durable stays so");
    assert_eq!(wal.durable(), end);
}

#[test]
fn a_full_disk_refuses_a_commit_before_it_has_a_place_and_takes_it_when_there_is_room() {
    let disk = SimDisk::new(1);
    let wal = create(&disk).unwrap();
    disk.limit(disk.used() + 700);
    let mut last = START;
    let refused = loop {
        match add(&wal, 1 + last.0, &[7; 100]) {
            Ok(end) => wal.sync_to(end).map(|()| last = end).expect("what has a place has room"),
            Err(error) => break error,
        }
    };
    assert_eq!(refused.kind(), Kind::Full);
    assert_eq!((wal.end(), wal.durable()), (last, last));
    disk.limit(u64::MAX);
    let end = add(&wal, 1 + last.0, &[7; 100]).expect("there is room again");
    wal.sync_to(end).unwrap();
}

#[test]
fn a_record_larger_than_segments_and_buffer_goes_through() {
    let disk = SimDisk::new(1);
    let wal = create(&disk).unwrap();
    let ops = [value(1), vec![9; 50_000], value(3)];
    let mut seqno = 0;
    for value in &ops {
        seqno += 1;
        add(&wal, seqno, value).unwrap();
    }
    wal.sync_to(wal.end()).unwrap();
    let mut sizes = Vec::new();
    LocalWal::open(&disk, EPOCH)
        .unwrap()
        .read(BRANCH, START, &mut |record| {
            sizes.push(record.payload.len());
            Ok(())
        })
        .unwrap();
    assert_eq!(sizes.len(), 3);
    assert!(sizes[1] > 50_000);
}

#[test]
fn many_threads_commit_in_groups_and_all_of_it_is_there() {
    const THREADS: usize = 8;
    const EACH: usize = 200;
    let directory = tempfile::tempdir().unwrap();
    let disk = Arc::new(RealDisk::open(directory.path()).unwrap());
    let limits = WalLimits { segment_bytes: 32 << 10, ..small() };
    let wal = Wal::create(disk.clone(), Stream::new(BRANCH, EPOCH), START, limits).unwrap();
    let commit = Mutex::new(0u64);
    let acknowledged = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..EACH {
                    let mut next = commit.lock();
                    *next += 1;
                    let value = value(*next);
                    let op = Op::Put(b"\0\0\0\x01k", &value);
                    let mut slot = wal.reserve(op.encoded_len(), Seqno(*next)).unwrap();
                    drop(next);
                    slot.write(op);
                    let end = slot.finish();
                    wal.sync_to(end).unwrap();
                    assert!(wal.durable() >= end);
                    acknowledged.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(acknowledged.into_inner(), THREADS * EACH);
    let (found, end) = read(&*disk, START).unwrap();
    assert_eq!((found.len(), end), (THREADS * EACH, wal.durable()));
    assert!(wal.syncs() < (THREADS * EACH) as u64, "groups share a sync");
}

#[test]
fn a_failed_sync_wakes_everyone_who_waits_for_it_or_behind_it() {
    const THREADS: usize = 8;
    for round in 0..100 {
        let disk = SimDisk::new(round);
        let limits = WalLimits { segment_bytes: 1 << 20, buffered_bytes_max: 1 << 20, ..small() };
        let wal = Wal::create(Arc::new(disk.clone()), Stream::new(BRANCH, EPOCH), START, limits).unwrap();
        disk.arm(DiskFault::FailSyncAt(disk.operations() + 10 + round));
        let commit = Mutex::new(0u64);
        let told = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    let failed = (0..1000).find_map(|_| {
                        let mut next = commit.lock();
                        *next += 1;
                        let op = Op::Put(b"\0\0\0\x01k", b"v");
                        let slot = wal.reserve(op.encoded_len(), Seqno(*next));
                        drop(next);
                        let synced = slot.and_then(|mut slot| {
                            slot.write(op);
                            wal.sync_to(slot.finish())
                        });
                        synced.err()
                    });
                    told.fetch_add(
                        usize::from(failed.is_some_and(|e| e.kind() == Kind::Failed)),
                        Ordering::Relaxed,
                    );
                });
            }
        });
        assert_eq!(told.into_inner(), THREADS, "round {round}");
    }
}

proptest! {
    #[test]
    fn garbage_files_never_panic(files in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..400), 1..4), from in any::<u64>()) {
        let disk = SimDisk::new(1);
        for (index, bytes) in files.iter().enumerate() {
            let file = disk.create(&segments::file_name(EPOCH, START.0 + 100 * index as u64)).unwrap();
            file.write_at(0, bytes).unwrap();
        }
        let wal = LocalWal::open(&disk, EPOCH).unwrap();
        let end = wal.read(BRANCH, WalPosition(from), &mut |_| Ok(())).unwrap();
        prop_assert_eq!(end, WalPosition(from));
    }
}
