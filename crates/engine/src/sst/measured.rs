//! An sst in memory, and its parts by themselves, for `bench`, which sees nothing else of this room.

use std::sync::Arc;

use bytes::Bytes;

use super::block::{Block, BlockBuilder};
use super::filter::Filter;
use super::{Purpose, Sst, SstBuilder, SstIter, SstOptions, hash};
use crate::cache::BlockCache;
use crate::store::ByteSource;
use crate::version::SstMeta;
use crate::{Epoch, OpKind, Result, Seqno, SstId};

/// An sst whose object is in memory.
pub struct MeasuredSst {
    meta: SstMeta,
    object: Bytes,
    sst: Arc<Sst>,
}

impl MeasuredSst {
    /// Builds and opens an sst of `rows`, with room for `cache_bytes` of blocks.
    pub fn build<'a>(
        rows: impl Iterator<Item = (&'a [u8], Seqno, &'a [u8])>,
        cache_bytes: usize,
    ) -> Result<Self> {
        let id = SstId { epoch: Epoch(1), counter: 1 };
        let mut builder = SstBuilder::new(id, SstOptions::default());
        rows.for_each(|(key, seqno, value)| builder.add(key, seqno, OpKind::Put, value));
        let (meta, object) = builder.finish();
        let sst = Self::open(&meta, &object, cache_bytes)?;
        Ok(Self { meta, object, sst })
    }

    /// The same object with an empty cache.
    pub fn cold(&self, cache_bytes: usize) -> Result<Self> {
        let sst = Self::open(&self.meta, &self.object, cache_bytes)?;
        Ok(Self { meta: self.meta.clone(), object: self.object.clone(), sst })
    }

    fn open(meta: &SstMeta, object: &Bytes, cache_bytes: usize) -> Result<Arc<Sst>> {
        Ok(Arc::new(Sst::open(meta, ByteSource::Memory(object.clone()), &BlockCache::new(cache_bytes))?))
    }

    /// Length of the object.
    pub fn bytes(&self) -> u64 {
        self.meta.bytes
    }

    /// A byte of the newest value of `full_key`.
    pub fn get(&self, full_key: &[u8]) -> Result<Option<u8>> {
        let found = self.sst.get_hashed(full_key, hash(full_key), Seqno(u64::MAX))?;
        Ok(found.and_then(|found| found.value().last().copied()))
    }

    /// Stands nowhere until the first seek.
    pub fn iter(&self) -> SstIter {
        SstIter::new(Arc::clone(&self.sst), Purpose::Query)
    }
}

/// A block in memory.
pub struct MeasuredBlock(Block);

impl MeasuredBlock {
    /// Builds one of all `rows`.
    pub fn build<'a>(rows: impl Iterator<Item = (&'a [u8], Seqno, &'a [u8])>) -> Self {
        let mut builder = BlockBuilder::default();
        rows.for_each(|(key, seqno, value)| builder.add(key, seqno, OpKind::Put, value));
        let mut stored = Vec::new();
        let rows = builder.finish(&mut stored);
        let block = Block::expand([vec![0; Block::room(rows)], stored].concat(), rows);
        Self(block.expect("what was just built is sound"))
    }

    /// Which row has the newest version of `full_key`, or would have it.
    pub fn search(&self, full_key: &[u8]) -> usize {
        self.0.lower_bound(full_key, Seqno(u64::MAX))
    }
}

/// A filter in memory.
pub struct MeasuredFilter(Filter);

impl MeasuredFilter {
    /// Builds one over full keys.
    pub fn build(full_keys: &[Vec<u8>]) -> Self {
        let hashes: Vec<_> = full_keys.iter().map(|key| hash(key)).collect();
        let stored = Filter::build(&hashes, SstOptions::default().filter_bits_per_key);
        Self(Filter::decode(stored).expect("what was just built is sound"))
    }

    /// `false`: the key is certainly not among them. Takes its hash too.
    pub fn may_contain(&self, full_key: &[u8]) -> bool {
        self.0.may_contain(hash(full_key))
    }
}
