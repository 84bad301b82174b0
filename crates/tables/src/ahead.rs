//! Primary keys that a cursor is told it will read: before the first of each window of them is read, what the window lacks is fetched at once.
//!
//! * Windows go by the order of keys, which is the order that batches are read in. Reads in another order are right, too, and gain less.
//! * A key that is noted after reads have begun starts a new batch.

use std::ops::Range;

/// Keys of one window: their blocks are fetched together, and have to stay until they are read.
const WINDOW: usize = 128;
/// What is noted beyond these is forgotten.
const KEYS_MAX: usize = 1 << 16;
const BYTES_MAX: usize = 4 << 20;

/// The keys of a batch.
#[derive(Default)]
pub(crate) struct Ahead {
    bytes: Vec<u8>,
    /// Where each key is in `bytes`; in order once reads have begun.
    keys: Vec<Range<u32>>,
    reading: bool,
    /// The first key behind the windows so far.
    next: usize,
}

impl Ahead {
    /// This key will be read.
    pub(crate) fn note(&mut self, key: &[u8]) {
        if self.reading {
            self.clear();
        }
        if self.keys.len() < KEYS_MAX && self.bytes.len() + key.len() <= BYTES_MAX {
            let start = self.bytes.len() as u32;
            self.bytes.extend_from_slice(key);
            self.keys.push(start..self.bytes.len() as u32);
        }
    }

    /// None of them will.
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.keys.clear();
        self.reading = false;
        self.next = 0;
    }

    /// `key` is about to be read: the window that it opens, if it does and is not alone in it.
    #[inline]
    pub(crate) fn window(&mut self, key: &[u8]) -> Option<impl Iterator<Item = &[u8]>> {
        if self.next == self.keys.len() { None } else { self.next_window(key) }
    }

    #[cold]
    fn next_window(&mut self, key: &[u8]) -> Option<impl Iterator<Item = &[u8]>> {
        let Self { bytes, keys, .. } = self;
        let key_at = |span: &Range<u32>| &bytes[span.start as usize..span.end as usize];
        if !self.reading {
            keys.sort_unstable_by(|a, b| key_at(a).cmp(key_at(b)));
            keys.dedup_by(|a, b| key_at(a) == key_at(b));
            self.reading = true;
        }
        let from = self.next + keys[self.next..].partition_point(|span| key_at(span) < key);
        if from == self.next && key_at(&keys[from]) != key {
            return None; // in a window that was
        }
        self.next = (from + WINDOW).min(keys.len());
        let window = &keys[from..self.next];
        let bytes = &self.bytes;
        (window.len() > 1).then(|| window.iter().map(|span| &bytes[span.start as usize..span.end as usize]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(ahead: &mut Ahead, key: u32) -> Vec<u32> {
        let key = key.to_be_bytes();
        let keys = ahead.window(&key);
        keys.map(|keys| keys.map(|key| u32::from_be_bytes(key.try_into().unwrap())).collect())
            .unwrap_or_default()
    }

    #[test]
    fn each_window_is_told_once_before_its_first_key_is_read() {
        let mut ahead = Ahead::default();
        assert!(window(&mut ahead, 7).is_empty(), "nothing is noted");
        let keys: Vec<u32> = (0..300).map(|n| n * 7 % 300 * 2).collect();
        keys.iter().chain(&keys[..50]).for_each(|key| ahead.note(&key.to_be_bytes()));
        let mut sorted = keys.clone();
        sorted.sort_unstable();
        let told: Vec<Vec<u32>> = sorted.iter().map(|key| window(&mut ahead, *key)).collect();
        let told: Vec<Vec<u32>> = told.into_iter().filter(|window| !window.is_empty()).collect();
        assert_eq!(told, sorted.chunks(WINDOW).collect::<Vec<_>>());
        ahead.note(&5_u32.to_be_bytes());
        ahead.note(&4_u32.to_be_bytes());
        assert_eq!(window(&mut ahead, 4), [4, 5], "a batch of its own");
        ahead.note(&9_u32.to_be_bytes());
        assert!(window(&mut ahead, 9).is_empty(), "one key is no batch");
    }

    #[test]
    fn reads_in_any_order_and_of_other_keys_do_no_harm() {
        let mut ahead = Ahead::default();
        (0..1000_u32).for_each(|key| ahead.note(&(key * 2).to_be_bytes()));
        assert!(window(&mut ahead, 1001).len() == WINDOW, "from the next one on");
        assert!(window(&mut ahead, 0).is_empty(), "those were passed over");
        assert!(window(&mut ahead, 5000).is_empty());
        assert!(window(&mut ahead, 1998).is_empty());
    }
}
