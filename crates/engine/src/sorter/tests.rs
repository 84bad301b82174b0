//! The sorter beside a stable sort of everything in memory.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::cache::BlockCache;
use crate::disk::{Disk, DiskError, DiskFile, SimDisk};

type Entries = Vec<(Vec<u8>, Vec<u8>)>;

fn space() -> Arc<SpillSpace> {
    SpillSpace::open(Arc::new(SimDisk::new(1))).unwrap()
}

fn memory() -> Loan {
    BlockCache::new(0).lend(0)
}

fn sorter(memory_bytes: usize, threads: bool) -> Sorter {
    Sorter::new(space(), memory(), memory_bytes, threads)
}

fn read(mut sorted: Sorted) -> Result<(Entries, Vec<bool>)> {
    let (mut entries, mut repeats) = (Entries::new(), Vec::new());
    while sorted.next()? {
        entries.push((sorted.key().to_vec(), sorted.value().to_vec()));
        repeats.push(sorted.repeats());
    }
    assert!(!sorted.next()?, "the end stays the end");
    Ok((entries, repeats))
}

fn keys() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(prop_oneof![Just(0u8), Just(255), any::<u8>()], 0..12),
        (0u16..50).prop_map(|n| [b"a common beginning ".as_slice(), &n.to_be_bytes()].concat()),
    ]
}

proptest! {
    #[test]
    fn entries_come_out_as_from_a_stable_sort(
        entries in prop::collection::vec((keys(), prop::collection::vec(any::<u8>(), 0..40)), 0..400),
        memory_bytes in 1usize..20_000,
        threads in any::<bool>(),
    ) {
        let mut sorter = sorter(memory_bytes, threads);
        for (key, value) in &entries {
            sorter.push(key, value).unwrap();
        }
        let mut expected = entries.clone();
        expected.sort_by(|a, b| a.0.cmp(&b.0));
        let (got, repeats) = read(sorter.finish().unwrap()).unwrap();
        for (at, repeats) in repeats.iter().enumerate() {
            prop_assert_eq!(*repeats, at > 0 && expected[at].0 == expected[at - 1].0);
        }
        prop_assert_eq!(got, expected);
    }
}

#[test]
fn what_it_has_in_memory_is_borrowed_for_as_long_as_it_has_it() {
    const ROOM: usize = 100_000;
    let cache = BlockCache::new(10 * ROOM);
    for threads in [false, true] {
        let mut sorters = [1u8, 2].map(|_| Sorter::new(space(), cache.lend(0), ROOM, threads));
        assert_eq!(cache.status().lent, 0);
        let mut held = 0;
        for n in 0..4000u64 {
            sorters
                .iter_mut()
                .for_each(|sorter| sorter.push(&(n * 7919 % 4001).to_be_bytes(), &[0; 100]).unwrap());
            held = sorters.iter().map(Sorter::bytes).sum();
            assert!(cache.status().lent >= held as u64, "{n}");
        }
        // Vectors double, and with a second thread there are two.
        assert!(held > 0 && cache.status().lent <= 2 * 4 * ROOM as u64, "{}", cache.status().lent);
        let mut sorted = Sorted::join(sorters.map(|sorter| sorter.finish().unwrap()).into());
        assert!(sorted.next().unwrap() && cache.status().lent > 0);
        drop(sorted);
        assert_eq!(cache.status().lent, 0);
    }
}

#[test]
fn parts_of_several_sorters_are_joined_to_what_one_would_give() {
    let (mut one, mut parts) = (sorter(700, false), [1, 2, 3].map(|_| sorter(300, true)));
    for n in 0..300u32 {
        // Equal keys come from different parts.
        let (key, value) = ((n * 7 % 50).to_be_bytes(), n.to_be_bytes());
        one.push(&key, &value).unwrap();
        parts[n as usize / 100].push(&key, &value).unwrap();
    }
    let joined = Sorted::join(parts.map(|part| part.finish().unwrap()).into());
    assert_eq!(read(joined).unwrap(), read(one.finish().unwrap()).unwrap());
    assert_eq!(read(Sorted::join(Vec::new())).unwrap(), (vec![], vec![]));
}

#[test]
fn what_ascends_is_handed_on_without_a_file() {
    let mut sorter = sorter(1000, true);
    let model: BTreeMap<[u8; 4], [u8; 3]> = (0..500u32).map(|n| (n.to_be_bytes(), [7; 3])).collect();
    let mut got = BTreeMap::new();
    for (key, value) in &model {
        if sorter.is_full() {
            assert!(sorter.ascends());
            sorter
                .drain(|key, value| {
                    got.insert(key.try_into().unwrap(), value.try_into().unwrap());
                    Ok(())
                })
                .unwrap();
        }
        sorter.push(key, value).unwrap();
    }
    let (rest, _) = read(sorter.finish().unwrap()).unwrap();
    assert!(rest.len() < 100);
    got.extend(rest.iter().map(|(key, value)| {
        (<[u8; 4]>::try_from(&key[..]).unwrap(), <[u8; 3]>::try_from(&value[..]).unwrap())
    }));
    assert_eq!(got, model);
}

#[test]
fn equal_neighbours_do_not_ascend() {
    let mut sorter = sorter(1000, false);
    sorter.push(b"a", b"").unwrap();
    assert!(sorter.ascends());
    sorter.push(b"a", b"").unwrap();
    assert!(!sorter.ascends());
}

#[test]
fn more_runs_than_are_merged_at_once_keep_equal_keys_in_order() {
    let mut sorter = sorter(1, false);
    for n in 0..3 * RUNS_MAX as u32 {
        sorter.push(&[(n % 5) as u8], &n.to_be_bytes()).unwrap();
    }
    assert!(sorter.runs.len() < RUNS_MAX);
    let (entries, _) = read(sorter.finish().unwrap()).unwrap();
    let mut expected: Vec<_> = (0..3 * RUNS_MAX as u32).collect();
    expected.sort_by_key(|n| n % 5);
    let got: Vec<_> =
        entries.iter().map(|(_, value)| u32::from_be_bytes(value[..].try_into().unwrap())).collect();
    assert_eq!(got, expected);
}

#[test]
fn a_full_disk_is_named() {
    let disk = SimDisk::new(1);
    disk.limit(100);
    let mut sorter = Sorter::new(SpillSpace::open(Arc::new(disk)).unwrap(), memory(), 10_000, false);
    let mut result = Ok(());
    for n in 0..1000u32 {
        result = sorter.push(&n.reverse_bits().to_be_bytes(), &n.wrapping_mul(0x9E37_79B9).to_be_bytes());
        if result.is_err() {
            break;
        }
    }
    let error = result.expect_err("the disk is full");
    assert_eq!(error.kind(), Kind::Full);
    assert!(error.to_string().contains("sort/0"), "{error}");
}

#[test]
fn no_file_has_a_name_and_a_crash_s_are_removed() {
    let disk = SimDisk::new(1);
    disk.create("sort/0").unwrap();
    let space = SpillSpace::open(Arc::new(disk.clone())).unwrap();
    assert_eq!(disk.list("sort").unwrap(), [""; 0]);
    let mut sorter = Sorter::new(space, memory(), 1, false);
    sorter.push(b"b", b"").unwrap();
    sorter.push(b"a", b"").unwrap();
    assert_eq!(sorter.runs.len(), 1);
    assert_eq!(disk.list("sort").unwrap(), [""; 0]);
}

/// Flips a bit of everything that is read.
struct Rotten(SimDisk);
struct RottenFile(Arc<dyn DiskFile>);

impl Disk for Rotten {
    fn create(&self, name: &str) -> std::result::Result<Arc<dyn DiskFile>, DiskError> {
        Ok(Arc::new(RottenFile(self.0.create(name)?)))
    }
    fn open(&self, name: &str) -> std::result::Result<Arc<dyn DiskFile>, DiskError> {
        self.0.open(name)
    }
    fn open_log(&self, name: &str) -> std::result::Result<Arc<dyn DiskFile>, DiskError> {
        self.0.open_log(name)
    }
    fn rename(&self, from: &str, to: &str) -> std::result::Result<(), DiskError> {
        self.0.rename(from, to)
    }
    fn remove(&self, name: &str) -> std::result::Result<(), DiskError> {
        self.0.remove(name)
    }
    fn list(&self, directory: &str) -> std::result::Result<Vec<String>, DiskError> {
        self.0.list(directory)
    }
    fn sync_directory(&self, directory: &str) -> std::result::Result<(), DiskError> {
        self.0.sync_directory(directory)
    }
}

impl DiskFile for RottenFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> std::result::Result<(), DiskError> {
        self.0.write_at(offset, bytes)
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::result::Result<(), DiskError> {
        self.0.read_at(offset, buffer)?;
        buffer[buffer.len() / 2] ^= 1;
        Ok(())
    }
    fn sync(&self) -> std::result::Result<(), DiskError> {
        self.0.sync()
    }
    fn len(&self) -> std::result::Result<u64, DiskError> {
        self.0.len()
    }
    fn set_len(&self, bytes: u64) -> std::result::Result<(), DiskError> {
        self.0.set_len(bytes)
    }
}

#[test]
fn rot_is_found_by_whoever_reads() {
    let space = SpillSpace::open(Arc::new(Rotten(SimDisk::new(1)))).unwrap();
    let mut sorter = Sorter::new(space, memory(), 1, false);
    sorter.push(b"b", b"x").unwrap();
    sorter.push(b"a", b"y").unwrap();
    let error = sorter.finish().and_then(read).expect_err("a bit is wrong");
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.to_string().contains("sort/0: block at 0: wrong checksum"), "{error}");
}
