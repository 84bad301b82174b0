//! The seqnos that somebody reads at: what compaction must keep versions for.
//!
//! * Taking a snapshot touches only the taker's own slot. Whoever collects the live ones sees each snapshot that is
//!   older than the `visible` it has read, or one that is at least as new: the slot is marked before `visible` is read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::Seqno;

const NONE: u64 = u64::MAX;
const BEING_TAKEN: u64 = u64::MAX - 1;

/// One transaction's place.
pub(crate) struct SnapshotSlot(AtomicU64);

/// All places.
#[derive(Default)]
pub(crate) struct Snapshots {
    slots: Mutex<Vec<Arc<SnapshotSlot>>>,
}

impl Snapshots {
    pub(crate) fn register(&self) -> Arc<SnapshotSlot> {
        let slot = Arc::new(SnapshotSlot(AtomicU64::new(NONE)));
        self.slots.lock().push(Arc::clone(&slot));
        slot
    }

    pub(crate) fn unregister(&self, slot: &Arc<SnapshotSlot>) {
        self.slots.lock().retain(|other| !Arc::ptr_eq(other, slot));
    }

    /// What is read at now, ascending; the newest visible seqno is always the last.
    pub(crate) fn live(&self, visible: &AtomicU64) -> Vec<Seqno> {
        let visible = visible.load(Ordering::SeqCst);
        let mut live = vec![Seqno(visible)];
        for slot in self.slots.lock().iter() {
            let taken = slot.settled();
            if taken < visible {
                live.push(Seqno(taken));
            }
        }
        live.sort_unstable();
        live.dedup();
        live
    }

    /// Transactions that have a place.
    pub(crate) fn registered(&self) -> usize {
        self.slots.lock().len()
    }
}

impl SnapshotSlot {
    /// Takes a snapshot at what `newest` answers: what is visible (which it reads with `SeqCst`, not before it is called), or more.
    pub(crate) fn take(&self, newest: impl FnOnce() -> Seqno) -> Seqno {
        self.0.store(BEING_TAKEN, Ordering::SeqCst);
        let seqno = newest();
        self.0.store(seqno.0, Ordering::SeqCst);
        seqno
    }

    pub(crate) fn let_go(&self) {
        self.0.store(NONE, Ordering::Release);
    }

    fn settled(&self) -> u64 {
        loop {
            match self.0.load(Ordering::SeqCst) {
                BEING_TAKEN => std::thread::yield_now(),
                settled => return settled,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_live_until_it_is_let_go() {
        let visible = AtomicU64::new(5);
        let newest = || Seqno(visible.load(Ordering::SeqCst));
        let snapshots = Snapshots::default();
        let (one, two) = (snapshots.register(), snapshots.register());
        assert_eq!(one.take(newest), Seqno(5));
        visible.store(9, Ordering::SeqCst);
        assert_eq!(snapshots.live(&visible), [Seqno(5), Seqno(9)]);
        two.take(newest);
        assert_eq!(snapshots.live(&visible), [Seqno(5), Seqno(9)]);
        one.let_go();
        assert_eq!(snapshots.live(&visible), [Seqno(9)]);
        snapshots.unregister(&two);
        assert_eq!(snapshots.registered(), 1);
    }
}
