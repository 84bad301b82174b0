//! What is read most: told to the next node, which warms itself by it, and handed on by compaction.
//!
//! * A heat map is a hint. Without one, with an old or a damaged one, every answer is the same, only later.
//! * It is written when it has changed by a tenth, and at a clean stop: a server that rests writes none.
//! * Warming gives way to readers: while one waits for the bucket, one piece at a time is fetched beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bucket::{Bucket, Names, ObjectName};
use bytes::Bytes;
use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_64;

use crate::cache::chunk_at;
use crate::limits::CHUNK_BYTES;
use crate::sst::find_in_run;
use crate::store::SstStore;
use crate::version::{SstMeta, Version};
use crate::{Clock, Epoch, Error, Result, SstId};

/// Chunks that a map names: the hottest 8 GiB.
const CHUNKS_MAX: usize = 1 << 16;
/// A map is written no more often than this.
const SAVED_EVERY: Duration = Duration::from_secs(300);
/// Chunks that lie side by side and are fetched together.
const CHUNKS_AT_ONCE: usize = 8;
/// Requests under way at once, while no reader waits.
const REQUESTS: usize = 8;
/// How long a thread that gives way waits before it looks again.
const POLL: Duration = Duration::from_millis(10);

/// Chunks by heat, hottest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HeatMap {
    pub(crate) chunks: Vec<HotChunk>,
}

/// 128 KiB of an sst, and how much they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HotChunk {
    pub(crate) sst: SstId,
    pub(crate) chunk: u32,
    pub(crate) heat: u8,
}

impl HotChunk {
    fn place(&self) -> (SstId, u32) {
        (self.sst, self.chunk)
    }
}

const MAGIC: [u8; 8] = *b"CISTHEAT";
const VERSION: u32 = 1;

impl HeatMap {
    /// What of `version` is hot here, on the local disk and in memory; what nobody has read here yet is as hot as `inherited` says.
    pub(crate) fn collect(store: &SstStore, version: &Version, inherited: &Self) -> Self {
        let mut chunks = Vec::new();
        let mut live = BTreeSet::new();
        for (_, meta) in version.ssts() {
            live.insert(meta.id);
            let heat = store.heat_of(meta);
            // Doublings, so that neighbours that are read about as much are fetched together.
            let class = |heat: u8| heat.checked_ilog2().map_or(0, |log| log as u8 + 1);
            chunks.extend(heat.into_iter().map(|(chunk, heat)| HotChunk {
                sst: meta.id,
                chunk,
                heat: class(heat),
            }));
        }
        let known: BTreeSet<_> = chunks.iter().map(HotChunk::place).collect();
        let more = |hot: &&HotChunk| live.contains(&hot.sst) && !known.contains(&hot.place());
        chunks.extend(inherited.chunks.iter().filter(more));
        chunks.sort_by_key(|hot| (std::cmp::Reverse(hot.heat), hot.sst, hot.chunk));
        chunks.truncate(CHUNKS_MAX);
        Self { chunks }
    }

    /// Half as hot; what is hardly warm is forgotten.
    fn fade(&mut self) {
        self.chunks.iter_mut().for_each(|hot| hot.heat = hot.heat.saturating_sub(1));
        self.chunks.retain(|hot| hot.heat > 0);
    }

    /// `docs/formats/heat.md` draws it.
    pub(crate) fn encode(&self) -> Bytes {
        let mut ssts: BTreeMap<SstId, Vec<(u32, u8)>> = BTreeMap::new();
        for hot in &self.chunks {
            ssts.entry(hot.sst).or_default().push((hot.chunk, hot.heat));
        }
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(ssts.len() as u32).to_le_bytes());
        for (sst, chunks) in ssts {
            out.extend_from_slice(&sst.epoch.0.to_le_bytes());
            out.extend_from_slice(&sst.counter.to_le_bytes());
            out.extend_from_slice(&(chunks.len() as u32).to_le_bytes());
            for (chunk, heat) in chunks {
                out.extend_from_slice(&chunk.to_le_bytes());
                out.push(heat);
            }
        }
        let checksum = xxh3_64(&out);
        out.extend_from_slice(&checksum.to_le_bytes());
        Bytes::from(out)
    }

    /// What `encode` made; an error that says what is wrong with it.
    pub(crate) fn decode(object: &[u8]) -> Result<Self> {
        let wrong = |what: &str| Error::corrupt(format!("a heat map {what}"));
        let (body, checksum) = object.split_last_chunk().ok_or_else(|| wrong("is cut short"))?;
        let rest = body.strip_prefix(&MAGIC).ok_or_else(|| wrong("begins as something else"))?;
        if xxh3_64(body) != u64::from_le_bytes(*checksum) {
            return Err(wrong("has a wrong checksum"));
        }
        let (version, rest) = rest.split_first_chunk().ok_or_else(|| wrong("is cut short"))?;
        if u32::from_le_bytes(*version) != VERSION {
            return Err(wrong("is of an unknown version"));
        }
        Self::decode_ssts(rest).ok_or_else(|| wrong("does not add up"))
    }

    fn decode_ssts(mut rest: &[u8]) -> Option<Self> {
        fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
            let (taken, after) = rest.split_first_chunk()?;
            *rest = after;
            Some(*taken)
        }
        let rest = &mut rest;
        let mut chunks = Vec::new();
        for _ in 0..u32::from_le_bytes(take(rest)?) {
            let epoch = Epoch(u64::from_le_bytes(take(rest)?));
            let sst = SstId { epoch, counter: u64::from_le_bytes(take(rest)?) };
            for _ in 0..u32::from_le_bytes(take(rest)?) {
                let chunk = u32::from_le_bytes(take(rest)?);
                let [heat] = take(rest)?;
                chunks.push(HotChunk { sst, chunk, heat });
            }
        }
        chunks.sort_by_key(|hot| (std::cmp::Reverse(hot.heat), hot.sst, hot.chunk));
        rest.is_empty().then_some(Self { chunks })
    }

    /// Whether it is worth telling, if `told` was told before.
    fn differs(&self, told: &Self) -> bool {
        let known: BTreeSet<_> = told.chunks.iter().map(HotChunk::place).collect();
        let new = self.chunks.iter().filter(|hot| !known.contains(&hot.place())).count();
        new > self.chunks.len().max(8) / 10
    }
}

/// What a map says, for people.
pub(crate) fn describe(object: &[u8]) -> Result<String> {
    let map = HeatMap::decode(object)?;
    let mut out = format!("heat map of {} chunks, hottest first\n", map.chunks.len());
    for HotChunk { sst, chunk, heat } in &map.chunks {
        out.push_str(&format!("{sst} chunk {chunk} heat {heat}\n"));
    }
    Ok(out)
}

/// Writes heat maps to the bucket.
#[derive(Default)]
pub(crate) struct HeatKeeper(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    told: HeatMap,
    /// What the writer before told. It fades with each map that is written.
    inherited: HeatMap,
    told_at: Option<Duration>,
    /// Maps in the bucket: what the next one replaces.
    names: Vec<ObjectName>,
    written: u64,
}

impl HeatKeeper {
    /// Writes a map if there is something new to tell and the last one is old enough, or (`now_or_never`) however old it is.
    pub(crate) fn save(
        &self,
        (bucket, names, epoch): (&dyn Bucket, &Names, Epoch),
        now: Duration,
        now_or_never: bool,
        collect: impl FnOnce(&HeatMap) -> HeatMap,
    ) -> Result<bool> {
        let mut kept = self.0.lock();
        let due = kept.told_at.get_or_insert(now).saturating_add(SAVED_EVERY);
        if now < due && !now_or_never {
            return Ok(false);
        }
        kept.told_at = Some(now);
        let map = collect(&kept.inherited);
        if !map.differs(&kept.told) {
            return Ok(false);
        }
        kept.written += 1;
        let name = names.heat(epoch.0, kept.written);
        bucket.put(&name, map.encode())?;
        kept.told = map;
        kept.inherited.fade();
        let old = std::mem::replace(&mut kept.names, vec![name]);
        bucket.delete(&old)?;
        Ok(true)
    }

    /// The newest map of the writers before `epoch`, if there is one.
    pub(crate) fn load(
        &self,
        (bucket, names, epoch): (&dyn Bucket, &Names, Epoch),
    ) -> Result<Option<HeatMap>> {
        let mut found: Vec<ObjectName> =
            bucket.list(&names.heats())?.into_iter().map(|object| object.name).collect();
        // Who is fenced by now must not replace what its successor wrote.
        found.retain(|name| *name < names.heat(epoch.0, 0));
        found.sort();
        let Some(newest) = found.last().cloned() else { return Ok(None) };
        self.0.lock().names.extend(found);
        let map = HeatMap::decode(&bucket.get(&newest)?)?;
        let mut kept = self.0.lock();
        kept.told = map.clone();
        kept.inherited = map.clone();
        kept.inherited.fade();
        Ok(Some(map))
    }
}

/// Brings what `map` names of `version` to the local disk, hottest first, as long as there is room without evicting anything. Returns how many
/// chunks came; ends early when `goes_on` says so.
pub(crate) fn warm(
    store: &Arc<SstStore>,
    version: &Version,
    map: &HeatMap,
    clock: &dyn Clock,
    goes_on: &(dyn Fn() -> bool + Sync),
) -> usize {
    let live: BTreeMap<SstId, u64> = version.ssts().map(|(_, sst)| (sst.id, sst.bytes)).collect();
    let hot: Vec<HotChunk> = map.chunks.iter().filter(|hot| live.contains_key(&hot.sst)).copied().collect();
    let pieces = pieces(&hot);
    remember(store, &hot); // what is here from an earlier life, before something is evicted
    let (next, came) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let _memory = store.lend(REQUESTS * CHUNKS_AT_ONCE * CHUNK_BYTES);
    let work = |gives_way: bool| {
        while goes_on() && store.has_room_to_warm() {
            if gives_way && store.readers_wait() {
                clock.sleep(POLL);
                continue;
            }
            let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
            let HotChunk { sst, chunk, .. } = piece[0];
            match store.warm_chunks(sst, live[&sst], chunk..chunk.saturating_add(piece.len() as u32)) {
                Ok(0) => (),
                Ok(fetched) => {
                    remember(store, piece); // at once: readers may fill the disk meanwhile, and it is the oldest of what came
                    came.fetch_add(fetched, Ordering::Relaxed);
                }
                Err(error) => {
                    tracing::debug!(%error, "the rest is not warmed");
                    next.store(pieces.len(), Ordering::Relaxed);
                    return;
                }
            };
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..REQUESTS.min(pieces.len()) {
            if std::thread::Builder::new().spawn_scoped(scope, || work(true)).is_err() {
                break; // fewer at a time, then
            }
        }
        work(false);
    });
    came.into_inner()
}

/// What is on the local disk counts as half as hot as it was.
fn remember(store: &SstStore, chunks: &[HotChunk]) {
    for hot in chunks {
        let reads = 1_u8.checked_shl(hot.heat.saturating_sub(1).into()).unwrap_or(u8::MAX);
        store.heat_up(hot.sst, hot.chunk, reads / 2);
    }
}

/// Neighbours of about the same heat, hottest first.
fn pieces(hot: &[HotChunk]) -> Vec<&[HotChunk]> {
    let neighbours =
        |one: &HotChunk, next: &HotChunk| one.sst == next.sst && one.chunk.checked_add(1) == Some(next.chunk);
    hot.chunk_by(neighbours).flat_map(|run| run.chunks(CHUNKS_AT_ONCE)).collect()
}

/// What a merge wrote takes over the heat of what it read, before readers find it: chunks are as hot as those that held the same keys, and
/// blocks that were in memory are there again.
pub(crate) fn hand_on(store: &Arc<SstStore>, inputs: &[Arc<SstMeta>], outputs: &[Arc<SstMeta>]) {
    outputs.iter().for_each(|output| store.set_cold(output.id));
    for input in inputs {
        if let Err(error) = hand_on_of(store, input, outputs) {
            tracing::debug!(sst = %input.id, %error, "its heat is lost");
        }
    }
}

fn hand_on_of(store: &Arc<SstStore>, input: &Arc<SstMeta>, outputs: &[Arc<SstMeta>]) -> Result<()> {
    let Some(sst) = store.opened(input) else { return Ok(()) };
    // Where the blocks end index and filters begin: whoever opens an sst reads that chunk, which says nothing of its blocks.
    let end = chunk_at(sst.data_bytes());
    let disk = store.disk_heat_of(input.id);
    for (key, offset, heat) in sst.blocks_at_hand() {
        let chunk = chunk_at(offset);
        let read = disk.get(&chunk).copied().filter(|_| chunk < end).unwrap_or(0);
        if read == 0 && heat.is_none() {
            continue;
        }
        let Some(output) = find_in_run(outputs, &key) else { continue };
        let opened = store.open(output)?;
        let Some(place) = opened.find_block(&key)? else { continue };
        let read_here = heat.map_or(0, |hits| hits.saturating_add(1));
        store.heat_up(output.id, chunk_at(place.offset()), read.max(read_here));
        if heat.is_some_and(|hits| hits > 0) {
            opened.warm_block(&place)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(counter: u64) -> SstId {
        SstId { epoch: Epoch(3), counter }
    }

    fn map(chunks: &[(u64, u32, u8)]) -> HeatMap {
        let chunks = chunks.iter().map(|&(sst, chunk, heat)| HotChunk { sst: id(sst), chunk, heat });
        let mut chunks: Vec<_> = chunks.collect();
        chunks.sort_by_key(|hot| (std::cmp::Reverse(hot.heat), hot.sst, hot.chunk));
        HeatMap { chunks }
    }

    #[test]
    fn neighbours_of_the_same_heat_are_fetched_together_and_the_hottest_first() {
        let map = map(&[(1, 4, 1), (1, 5, 1), (2, 0, 9), (1, 6, 9), (1, 7, 1), (7, 0, 9)]);
        let pieces = pieces(&map.chunks);
        let places: Vec<_> = pieces.iter().map(|piece| (piece[0].sst, piece[0].chunk, piece.len())).collect();
        let expected = [(1, 6, 1), (2, 0, 1), (7, 0, 1), (1, 4, 2), (1, 7, 1)];
        assert_eq!(places, expected.map(|(sst, chunk, chunks)| (id(sst), chunk, chunks)));
    }

    #[test]
    fn a_map_is_written_when_a_tenth_of_it_is_new() {
        let bucket = bucket::MemoryBucket::new();
        let names = Names::new("main");
        let keeper = HeatKeeper::default();
        let puts = || bucket.meters().put.requests();
        let save = |seconds: u64, last: bool, chunks: u32| {
            let chunks: Vec<_> = (0..chunks).map(|chunk| (1, chunk, 1)).collect();
            let place: (&dyn Bucket, _, _) = (&bucket, &names, Epoch(5));
            keeper.save(place, Duration::from_secs(seconds), last, |_| map(&chunks)).unwrap()
        };
        assert!(!save(0, false, 100), "not right after the start");
        assert!(save(301, false, 100));
        assert!(!save(302, false, 200), "too soon");
        assert!(!save(700, false, 105), "hardly anything new");
        for hour in 1..5 {
            assert!(!save(3600 * hour, false, 100), "a server that rests writes nothing");
        }
        assert_eq!(puts(), 1);
        assert!(save(3600 * 5, true, 200));
        assert_eq!(bucket.contents().len(), 1, "the old one is gone");
        let next = HeatKeeper::default();
        let place: (&dyn Bucket, _, _) = (&bucket, &names, Epoch(6));
        assert_eq!(next.load(place).unwrap().unwrap().chunks.len(), 200);
        assert!(next.save(place, Duration::ZERO, true, |_| map(&[(9, 9, 9), (9, 8, 9)])).unwrap());
        assert_eq!(bucket.contents().len(), 1, "that of the writer before, too");
    }

    #[test]
    fn a_fenced_writer_leaves_the_map_of_its_successor_alone() {
        let bucket = bucket::MemoryBucket::new();
        let names = Names::new("main");
        let (old, new): ((&dyn Bucket, _, _), (&dyn Bucket, _, _)) =
            ((&bucket, &names, Epoch(5)), (&bucket, &names, Epoch(6)));
        let (fenced, successor) = (HeatKeeper::default(), HeatKeeper::default());
        assert!(successor.save(new, Duration::ZERO, true, |_| map(&[(1, 1, 1), (1, 2, 1)])).unwrap());
        assert_eq!(fenced.load(old).unwrap(), None);
        assert!(fenced.save(old, Duration::ZERO, true, |_| map(&[(2, 1, 1), (2, 2, 1)])).unwrap());
        let third = HeatKeeper::default();
        let found = third.load((&bucket, &names, Epoch(7))).unwrap().unwrap();
        assert_eq!(found, map(&[(1, 1, 1), (1, 2, 1)]));
    }

    #[test]
    fn what_a_new_writer_has_not_read_fades_and_is_not_forgotten_at_once() {
        let bucket = bucket::MemoryBucket::new();
        let names = Names::new("main");
        let place = |epoch| -> (&dyn Bucket, _, _) { (&bucket, &names, Epoch(epoch)) };
        let first = HeatKeeper::default();
        let told = map(&[(1, 1, 4), (1, 2, 2), (1, 3, 1)]);
        assert!(first.save(place(1), Duration::ZERO, true, |_| told.clone()).unwrap());
        let next = HeatKeeper::default();
        assert_eq!(next.load(place(2)).unwrap(), Some(told.clone()));
        assert!(!next.save(place(2), Duration::ZERO, true, HeatMap::clone).unwrap(), "it read nothing");
        let mut inherited = Vec::new();
        for number in 0..3 {
            let own = map(&[(7, 2 * number, 9), (7, 2 * number + 1, 9)]);
            let save = |old: &HeatMap| {
                inherited.push(old.clone());
                own
            };
            assert!(next.save(place(2), Duration::ZERO, true, save).unwrap());
        }
        assert_eq!(inherited, [map(&[(1, 1, 3), (1, 2, 1)]), map(&[(1, 1, 2)]), map(&[(1, 1, 1)])]);
    }

    proptest! {
        #[test]
        fn a_map_comes_back_as_it_was(chunks in prop::collection::btree_map((0..9u64, 0..999u32), 1..255u8, 0..50)) {
            let chunks: Vec<_> = chunks.into_iter().map(|((sst, chunk), heat)| (sst, chunk, heat)).collect();
            let map = map(&chunks);
            prop_assert_eq!(HeatMap::decode(&map.encode()).unwrap(), map);
        }

        #[test]
        fn a_damaged_map_is_refused(at in any::<prop::sample::Index>(), bit in 0..8u8, cut in any::<prop::sample::Index>()) {
            let whole = map(&[(1, 1, 1), (2, 2, 2)]).encode();
            let mut damaged = whole.to_vec();
            damaged[at.index(whole.len())] ^= 1 << bit;
            prop_assert!(HeatMap::decode(&damaged).is_err());
            prop_assert!(HeatMap::decode(&whole[..cut.index(whole.len())]).is_err());
        }

        #[test]
        fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(HeatMap::decode(&bytes).is_err());
        }
    }

    #[test]
    fn what_was_hot_before_a_restart_still_is_if_half_as_much() {
        let (bucket, disk) = (Arc::new(bucket::MemoryBucket::new()), crate::SimDisk::new(1));
        let store = |disk: &crate::SimDisk| {
            SstStore::new(crate::store::StoreParts {
                disk: Arc::new(disk.clone()),
                bucket: bucket.clone(),
                names: Names::new("main"),
                branch: crate::BranchId([1; 16]),
                memory_bytes: 0,
                disk_cache_bytes: 64 << 20,
                threads: false,
            })
        };
        let built = |counter| {
            let mut builder = crate::sst::SstBuilder::new(id(counter), crate::sst::SstOptions::default());
            let noise = |row: u64| {
                (0..4000).flat_map(move |at| xxh3_64(&[row, at].map(u64::to_le_bytes).concat()).to_le_bytes())
            };
            for row in 0..20_u64 {
                let value: Vec<u8> = noise(row).collect();
                builder.add(&row.to_be_bytes(), crate::Seqno(1), crate::OpKind::Put, &value);
            }
            let (meta, bytes) = builder.finish();
            (Arc::new(meta), bytes)
        };
        let ((file, file_bytes), (object, object_bytes)) = (built(1), built(2));
        let version = Version {
            l0: vec![[Arc::clone(&file)].into(), [Arc::clone(&object)].into()],
            ..Version::default()
        };
        let before = store(&disk);
        before.write_local(&file, &file_bytes).unwrap();
        before.upload(file.id).unwrap();
        before.upload_new(object.id, &object_bytes, false).unwrap();
        for sst in [&file, &object] {
            assert_eq!(before.warm_chunks(sst.id, sst.bytes, 0..3).unwrap() > 0, sst.id == object.id);
            before.heat_up(sst.id, 1, 40);
            before.heat_up(sst.id, 2, 1);
        }
        let mut map = HeatMap::collect(&before, &version, &HeatMap::default());
        let mut disk = disk.kill();
        for heat in [16, 8, 4, 2, 1] {
            let after = store(&disk);
            after.adopt(&version, []).unwrap();
            for sst in [&file, &object] {
                assert!(after.disk_heat_of(sst.id).is_empty());
            }
            warm(&after, &version, &map, &crate::SystemClock::default(), &|| true);
            for sst in [&file, &object] {
                assert_eq!(after.disk_heat_of(sst.id), [(1, heat)].into());
            }
            map = HeatMap::collect(&after, &version, &HeatMap::default());
            disk = disk.kill();
        }
        let after = store(&disk);
        after.adopt(&version, []).unwrap();
        warm(&after, &version, &map, &crate::SystemClock::default(), &|| true);
        assert!(HeatMap::collect(&after, &version, &HeatMap::default()).chunks.is_empty(), "all has faded");

        // On another machine each piece is hot as soon as it is there.
        let map = HeatMap { chunks: vec![HotChunk { sst: object.id, chunk: 1, heat: 3 }] };
        let other = store(&crate::SimDisk::new(2));
        let seen = Mutex::new(Vec::new());
        let goes_on = || {
            seen.lock().push(other.disk_heat_of(object.id));
            true
        };
        warm(&other, &version, &map, &crate::SystemClock::default(), &goes_on);
        assert_eq!(seen.into_inner(), [[].into(), [(1, 2)].into()]);
    }
}
