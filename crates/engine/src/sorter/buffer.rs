//! Entries in memory, in the order in which they came, with an array of places that is what gets sorted.

const HEADER_BYTES: usize = 8;

#[derive(Default)]
pub(super) struct Buffer {
    /// Key length and value length (u32 each), key, value; one after the other.
    records: Vec<u8>,
    places: Vec<Place>,
    descends: bool,
    /// Where the last record starts.
    last: usize,
}

#[derive(Clone, Copy)]
struct Place {
    prefix: u64,
    record: u32,
}

/// The first eight bytes of a key, as a number that sorts as they do.
#[inline]
pub(super) fn prefix_of(key: &[u8]) -> u64 {
    match key.first_chunk() {
        Some(bytes) => u64::from_be_bytes(*bytes),
        None => key.iter().rev().fold(0, |prefix, byte| prefix >> 8 | u64::from(*byte) << 56),
    }
}

/// Key and value of the record at `at`, and where the next one starts.
#[inline]
pub(super) fn record(bytes: &[u8], at: usize) -> (&[u8], &[u8], usize) {
    let length = |at: usize| {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes are four bytes")) as usize
    };
    let key = at + HEADER_BYTES;
    let value = key + length(at);
    let end = value + length(at + 4);
    (&bytes[key..value], &bytes[value..end], end)
}

pub(super) fn put_record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let length =
        |bytes: &[u8]| u32::try_from(bytes.len()).expect("keys and values have limits").to_le_bytes();
    out.extend_from_slice(&length(key));
    out.extend_from_slice(&length(value));
    out.extend_from_slice(key);
    out.extend_from_slice(value);
}

impl Buffer {
    pub(super) fn push(&mut self, key: &[u8], value: &[u8]) {
        if !self.descends && !self.places.is_empty() {
            self.descends = record(&self.records, self.last).0 >= key;
        }
        self.last = self.records.len();
        let at = u32::try_from(self.last).expect("a buffer is cut below 4 GiB");
        self.places.push(Place { prefix: prefix_of(key), record: at });
        put_record(&mut self.records, key, value);
    }

    pub(super) fn sort(&mut self) {
        if self.descends {
            let records = &self.records;
            let key = |place: &Place| record(records, place.record as usize).0;
            self.places.sort_unstable_by(|a, b| {
                a.prefix.cmp(&b.prefix).then_with(|| key(a).cmp(key(b))).then_with(|| a.record.cmp(&b.record))
            });
        }
    }

    pub(super) fn entry(&self, at: usize) -> (&[u8], &[u8]) {
        let (key, value, _) = record(&self.records, self.places[at].record as usize);
        (key, value)
    }
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }
    pub(super) fn bytes(&self) -> usize {
        self.records.len() + self.places.len() * size_of::<Place>()
    }
    /// With what it holds for entries to come.
    pub(super) fn reserved_bytes(&self) -> usize {
        self.records.capacity() + self.places.capacity() * size_of::<Place>()
    }
    /// Strictly.
    pub(super) fn ascends(&self) -> bool {
        !self.descends
    }
    pub(super) fn clear(&mut self) {
        self.records.clear();
        self.places.clear();
        self.descends = false;
    }
}
