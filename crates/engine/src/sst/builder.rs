//! Versions in order to the bytes of an sst.
//!
//! * Data blocks first, in order and without gaps; then for each partition its filters and its index; then top, summary
//!   and footer, so that one read of the tail opens the sst.
//! * An index key is at least the last key of its block and less than the first key of the next one, unless versions
//!   of one key fill both.

use std::sync::Arc;

use bytes::Bytes;

use super::block::BlockBuilder;
use super::filter::{self, Filter, FirstPartFilter};
use super::format::{BlockKind, Compression, Footer, Handle, Sealer, VERSION};
use super::reader::SstSummary;
use crate::first_part::{FirstPart, FirstParts};
use crate::limits::{BLOCK_BYTES, KEY_BYTES_MAX, VALUE_BYTES_MAX};
use crate::version::SstMeta;
use crate::{OpKind, Seqno, SstId, TreeId, tree_of};

/// How an sst is laid out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SstOptions {
    /// How blocks are packed.
    pub(crate) compression: Compression,
    /// Decoded size that data and index blocks are cut at. Tests use small ones.
    pub(crate) block_bytes: usize,
    /// Size of the filters.
    pub(crate) filter_bits_per_key: usize,
}

impl Default for SstOptions {
    /// What production uses.
    fn default() -> Self {
        Self { compression: Compression::Zstd, block_bytes: BLOCK_BYTES, filter_bits_per_key: 10 }
    }
}

/// Builds one sst in memory.
pub(crate) struct SstBuilder {
    id: SstId,
    options: SstOptions,
    sealer: Sealer,
    out: Vec<u8>,
    payload: Vec<u8>,
    data: BlockBuilder,
    index: BlockBuilder,
    /// Hashes of the keys that the current partition's data blocks hold.
    hashes: Vec<u64>,
    first_parts: Option<FirstPartHashes>,
    partitions: Vec<Partition>,
    summary: SstSummary,
    last_seqno: Seqno,
}

struct Partition {
    last_separator: Vec<u8>,
    first_block: u32,
    blocks: u32,
    /// Empty: of no tree in it a rule is known.
    first_parts: Vec<u8>,
    filter: Vec<u8>,
    /// And how many rows it has.
    index: (Vec<u8>, u16),
}

/// The first parts of the keys that the current partition's data blocks hold.
struct FirstPartHashes {
    rules: Arc<FirstParts>,
    /// Of the tree at hand. Asked for once, so that a rule that comes while an sst is built does not cover half a tree.
    rule: Option<(TreeId, Option<Arc<dyn FirstPart>>)>,
    trees: Vec<u32>,
    hashes: Vec<u64>,
}

impl SstBuilder {
    /// An empty sst that will be called `id`.
    pub(crate) fn new(id: SstId, options: SstOptions) -> Self {
        Self {
            id,
            options,
            sealer: Sealer::new(id, options.compression),
            out: Vec::new(),
            payload: Vec::new(),
            data: BlockBuilder::default(),
            index: BlockBuilder::default(),
            hashes: Vec::new(),
            first_parts: None,
            partitions: Vec::new(),
            summary: SstSummary::default(),
            last_seqno: Seqno(0),
        }
    }

    /// The same with filters of the first parts that `rules` know of.
    pub(crate) fn with_first_parts(mut self, rules: Arc<FirstParts>) -> Self {
        self.first_parts = Some(FirstPartHashes { rules, rule: None, trees: Vec::new(), hashes: Vec::new() });
        self
    }

    /// Adds the next version: keys ascend, seqnos of one key descend.
    ///
    /// # Panics
    /// If that order is broken or a limit of `limits` is passed: such an sst must never reach the bucket.
    pub(crate) fn add(&mut self, full_key: &[u8], seqno: Seqno, kind: OpKind, value: &[u8]) {
        let summary = &mut self.summary;
        let fresh = summary.entries == 0 || full_key != &summary.last_key[..];
        assert!(
            summary.entries == 0 || full_key > &summary.last_key[..] || (!fresh && seqno < self.last_seqno),
            "{}: a version out of order: {full_key:x?} at {seqno:?} after {:x?}",
            self.id,
            summary.last_key
        );
        assert!(full_key.len() <= KEY_BYTES_MAX + 4, "{}: a key of {} bytes", self.id, full_key.len());
        assert!(value.len() <= VALUE_BYTES_MAX, "{}: a value of {} bytes", self.id, value.len());
        summary.count(full_key, seqno, kind);
        self.last_seqno = seqno;

        let bytes = self.data.estimated_bytes() + BlockBuilder::cost_of(full_key, value);
        if bytes > self.options.block_bytes && !self.data.is_empty() {
            self.cut_data_block(Some(full_key));
        }
        if fresh || self.hashes.is_empty() {
            self.hashes.push(filter::hash(full_key));
            if let Some(first_parts) = &mut self.first_parts {
                first_parts.add(full_key);
            }
        }
        self.data.add(full_key, seqno, kind, value);
    }

    /// About how long the sst would be if it were finished now, before the block at hand is packed.
    pub(crate) fn estimated_bytes(&self) -> u64 {
        let partitions: usize =
            self.partitions.iter().map(|p| p.first_parts.len() + p.filter.len() + p.index.0.len()).sum();
        let first_parts = self.first_parts.as_ref().map_or(0, |first_parts| first_parts.hashes.len());
        let hashes = (self.hashes.len() + first_parts) * self.options.filter_bits_per_key / 8;
        (self.out.len() + self.data.estimated_bytes() + partitions + self.index.estimated_bytes() + hashes)
            as u64
    }

    /// Whether nothing was added.
    pub(crate) fn is_empty(&self) -> bool {
        self.summary.entries == 0
    }

    /// What the manifest must know, and the object's bytes.
    ///
    /// # Panics
    /// If nothing was added.
    pub(crate) fn finish(mut self) -> (SstMeta, Bytes) {
        assert!(!self.is_empty(), "{}: an sst without a version", self.id);
        self.cut_data_block(None);
        self.cut_partition();

        let mut top = BlockBuilder::default();
        for partition in std::mem::take(&mut self.partitions) {
            let first_parts = match &partition.first_parts[..] {
                [] => Handle { offset: self.out.len() as u64, bytes: 0 },
                stored => self.sealer.seal(&mut self.out, BlockKind::FirstParts, 0, stored),
            };
            let filter = self.sealer.seal(&mut self.out, BlockKind::Filter, 0, &partition.filter);
            let (index, rows) = &partition.index;
            let index = self.sealer.seal(&mut self.out, BlockKind::Index, *rows, index);
            let mut entry = Vec::with_capacity(3 * Handle::ENCODED_BYTES + 8);
            filter.encode(&mut entry);
            index.encode(&mut entry);
            entry.extend_from_slice(&partition.first_block.to_le_bytes());
            entry.extend_from_slice(&partition.blocks.to_le_bytes());
            first_parts.encode(&mut entry);
            top.add(&partition.last_separator, Seqno(0), OpKind::Put, &entry);
        }
        let rows = top.finish(&mut self.payload);
        let top = self.sealer.seal(&mut self.out, BlockKind::Top, rows, &self.payload);
        let summary = self.sealer.seal(&mut self.out, BlockKind::Summary, 0, &self.summary.encode());
        Footer { version: VERSION, top, summary }.encode(self.id, &mut self.out);
        let meta = self.summary.into_meta(self.id, self.out.len() as u64);
        (meta, Bytes::from(self.out))
    }

    /// Seals the data block at hand and gives it its place in the index; `next` is the key that follows it.
    fn cut_data_block(&mut self, next: Option<&[u8]>) {
        let last = self.data.last_key().expect("only blocks with a version are cut");
        let separator = next.map_or_else(|| last.to_vec(), |next| separator(last, next));
        let rows = self.data.finish(&mut self.payload);
        let handle = self.sealer.seal(&mut self.out, BlockKind::Data, rows, &self.payload);
        self.summary.blocks += 1;
        let mut entry = Vec::with_capacity(Handle::ENCODED_BYTES);
        handle.encode(&mut entry);
        self.index.add(&separator, Seqno(0), OpKind::Put, &entry);
        if self.index.estimated_bytes() >= self.options.block_bytes {
            self.cut_partition();
        }
    }

    fn cut_partition(&mut self) {
        let Some(last_separator) = self.index.last_key().map(<[u8]>::to_vec) else { return };
        let mut index = Vec::new();
        let rows = self.index.finish(&mut index);
        let filter = Filter::build(&self.hashes, self.options.filter_bits_per_key);
        self.hashes.clear();
        let bits_per_key = self.options.filter_bits_per_key;
        let first_parts = self.first_parts.as_mut().map_or_else(Vec::new, |parts| parts.cut(bits_per_key));
        let first_block = self.partitions.last().map_or(0, |p| p.first_block + p.blocks);
        let blocks = self.summary.blocks - first_block;
        self.partitions.push(Partition {
            last_separator,
            first_block,
            blocks,
            first_parts,
            filter,
            index: (index, rows),
        });
    }
}

impl FirstPartHashes {
    /// Keys ascend, so equal first parts come one after the other.
    fn add(&mut self, full_key: &[u8]) {
        let tree = tree_of(full_key);
        let rule = match &self.rule {
            Some((known, rule)) if *known == tree => rule,
            _ => &self.rule.insert((tree, self.rules.rule(tree))).1,
        };
        let Some(rule) = rule else { return };
        if self.trees.last() != Some(&tree.0) {
            self.trees.push(tree.0);
        }
        // A key without a whole first part starts with none that could be asked for.
        let Some(end) = rule.end(&full_key[4..]) else { return };
        let hash = filter::hash(&full_key[..4 + end]);
        if self.hashes.last() != Some(&hash) {
            self.hashes.push(hash);
        }
    }

    /// The stored filter of the partition that ends here; empty if there is nothing to tell.
    fn cut(&mut self, bits_per_key: usize) -> Vec<u8> {
        if self.trees.is_empty() {
            return Vec::new();
        }
        let stored = FirstPartFilter::build(&self.trees, &self.hashes, bits_per_key);
        self.trees.clear();
        self.hashes.clear();
        stored
    }
}

/// A short key in `last..next`, or `last` itself.
fn separator(last: &[u8], next: &[u8]) -> Vec<u8> {
    let shared = last.iter().zip(next).take_while(|(a, b)| a == b).count();
    // Raise the first byte after the difference that can be raised: still below `next`, which differs before it,
    // or at the difference itself if that leaves room.
    for (at, &byte) in last.iter().enumerate().skip(shared) {
        let room = if at == shared { next.get(at).copied().unwrap_or(0) } else { u8::MAX };
        let raised = byte.saturating_add(1);
        if (at == shared && raised < room) || (at > shared && byte < u8::MAX) {
            let mut short = last[..at].to_vec();
            short.push(raised);
            return if short.len() < last.len() { short } else { last.to_vec() };
        }
    }
    last.to_vec()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::separator;

    proptest! {
        #[test]
        fn a_separator_lies_between_its_neighbours(
            a in prop::collection::vec(prop::sample::select(vec![0u8, 1, 2, 254, 255]), 0..6),
            b in prop::collection::vec(prop::sample::select(vec![0u8, 1, 2, 254, 255]), 0..6),
        ) {
            let (last, next) = if a <= b { (a, b) } else { (b, a) };
            let short = separator(&last, &next);
            prop_assert!(last <= short && (short < next || (last == next && short == next)), "{short:?}");
            prop_assert!(short.len() <= last.len());
        }
    }

    #[test]
    fn a_separator_is_short() {
        assert_eq!(separator(b"apple pie", b"banana"), b"aq");
        assert_eq!(separator(b"apple pie", b"cherry"), b"b");
        assert_eq!(separator(b"same", b"same"), b"same");
    }
}
