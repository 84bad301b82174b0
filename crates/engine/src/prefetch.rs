//! A batch of point reads: what they would wait for one after the other is fetched at the same time.
//!
//! * It is a hint. What can not be fetched here is met again, and reported, by the read that needs it.
//! * What is in memory or on the local disk is left to the reads; what would come from the bucket is fetched, each piece once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use crate::limits::CHUNK_BYTES;
use crate::sst::{self, Piece, Reach, find_in_run};
use crate::store::SstStore;
use crate::version::SstMeta;
use crate::view::View;
use crate::{Result, SstId};

/// An sst is opened, then its filter and index are there, then the block: three rounds for all keys. The fourth is for filters that
/// promised a key which is in an older run.
const ROUNDS_MAX: usize = 4;
/// Keys whose data is looked for before that of all is: if none of theirs is missing, the batch is taken to be here.
const SAMPLE: usize = 8;

/// Something that only the bucket has.
struct Missing<'a> {
    meta: &'a Arc<SstMeta>,
    /// `None`: what opening the sst needs.
    piece: Option<Piece>,
}

/// Names what is fetched together: sst, kind of piece, number.
type Name = (SstId, u8, u64);

/// Fetches what reads of `keys` (full ones) from `view` lack, up to `at_once` pieces at a time; with 1 no thread is started. Returns how many came.
pub(crate) fn prefetch(view: &View, store: &Arc<SstStore>, keys: &[&[u8]], at_once: usize) -> usize {
    let apart = keys.len().div_ceil(SAMPLE).max(1);
    if missing(view, store, keys.iter().copied().step_by(apart)).is_empty() {
        return 0;
    }
    let mut came = 0;
    for _ in 0..ROUNDS_MAX {
        let wanted: Vec<Missing<'_>> = missing(view, store, keys.iter().copied()).into_values().collect();
        if wanted.is_empty() || !fetch_at_once(store, &wanted, at_once) {
            break;
        }
        came += wanted.len();
    }
    came
}

fn missing<'a, 'k>(
    view: &'a View,
    store: &Arc<SstStore>,
    keys: impl Iterator<Item = &'k [u8]>,
) -> BTreeMap<Name, Missing<'a>> {
    let mut found = BTreeMap::new();
    for key in keys {
        if let Err(error) = add_missing(view, store, key, &mut found) {
            tracing::debug!(%error, "not fetched ahead; the read will tell");
        }
    }
    found
}

/// What a read of `key` lacks that can be known now. All runs are looked at, although the key may turn out to be in the first: their filters are
/// wanted sooner or later, a round trip is lost at once.
fn add_missing<'a>(
    view: &'a View,
    store: &Arc<SstStore>,
    key: &[u8],
    found: &mut BTreeMap<Name, Missing<'a>>,
) -> Result<()> {
    if view.memtables().any(|memtable| memtable.newest(key).is_some()) {
        return Ok(());
    }
    let hash = sst::hash(key);
    for run in view.runs() {
        let Some(meta) = find_in_run(run, key) else { continue };
        if !store.opens_here(meta) {
            found.insert((meta.id, 0, 0), Missing { meta, piece: None });
            continue;
        }
        match store.open(meta)?.reach(key, hash)? {
            Reach::Absent => {}
            Reach::Block => return Ok(()),
            Reach::Missing(piece @ Piece::Partition(number)) => {
                found.insert((meta.id, 1, number as u64), Missing { meta, piece: Some(piece) });
            }
            Reach::Missing(piece @ Piece::Block(place)) => {
                // Blocks of one chunk come together.
                let chunk = place.offset() / CHUNK_BYTES as u64;
                found.insert((meta.id, 2, chunk), Missing { meta, piece: Some(piece) });
                return Ok(());
            }
        }
    }
    Ok(())
}

/// `false`: something did not come, and the rest was not tried.
fn fetch_at_once(store: &Arc<SstStore>, wanted: &[Missing<'_>], at_once: usize) -> bool {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = || {
        while !failed.load(Relaxed)
            && let Some(missing) = wanted.get(next.fetch_add(1, Relaxed))
        {
            if let Err(error) = missing.fetch(store) {
                tracing::debug!(%error, "not fetched ahead; the read will tell");
                failed.store(true, Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..at_once.min(wanted.len()) {
            if std::thread::Builder::new().spawn_scoped(scope, work).is_err() {
                break; // fewer at a time, then
            }
        }
        work();
    });
    !failed.load(Relaxed)
}

impl Missing<'_> {
    fn fetch(&self, store: &Arc<SstStore>) -> Result<()> {
        let sst = store.open(self.meta)?;
        self.piece.map_or(Ok(()), |piece| sst.fetch(piece))
    }
}
