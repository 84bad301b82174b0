//! Split-block Bloom filter: eight bits for a key, all in one block of 32 bytes, so a probe is one cache miss.
//!
//! * No false negatives: a key that was added is always found.
//! * At 10 bits a key about 1 % of the absent keys are found too.

use xxhash_rust::xxh3::xxh3_64;

use crate::{Error, Result};

const LANES: usize = 8;
const BLOCK_BYTES: usize = LANES * 4;

/// Odd constants that spread one half of the hash over the lanes; part of the format (they are Parquet's).
const SALTS: [u32; LANES] =
    [0x47b6_137b, 0x4497_4d91, 0x8824_ad5b, 0xa2b7_289d, 0x7054_95c7, 0x2df1_424b, 0x9efc_4947, 0x5c6b_fb31];

/// The hash of a full key that filters are asked with. Part of the format.
#[inline]
pub(crate) fn hash(full_key: &[u8]) -> u64 {
    xxh3_64(full_key)
}

/// A filter in memory.
pub(crate) struct Filter {
    blocks: Box<[u8]>,
}

impl Filter {
    /// The stored form of a filter over `hashes`.
    pub(crate) fn build(hashes: &[u64], bits_per_key: usize) -> Vec<u8> {
        let blocks = (hashes.len() * bits_per_key).div_ceil(BLOCK_BYTES * 8).max(1);
        let mut filter = vec![0; blocks * BLOCK_BYTES];
        for &hash in hashes {
            let block = &mut filter[block_of(hash, blocks) * BLOCK_BYTES..][..BLOCK_BYTES];
            for (lane, salt) in block.as_chunks_mut::<4>().0.iter_mut().zip(SALTS) {
                *lane = (u32::from_le_bytes(*lane) | bit_of(hash, salt)).to_le_bytes();
            }
        }
        filter
    }

    /// Takes the stored form.
    pub(crate) fn decode(stored: Vec<u8>) -> Result<Self> {
        if stored.is_empty() || !stored.len().is_multiple_of(BLOCK_BYTES) {
            return Err(Error::corrupt(format!("a filter of {} bytes", stored.len())));
        }
        Ok(Self { blocks: stored.into_boxed_slice() })
    }

    /// `false`: the key is certainly not in the partition.
    #[inline]
    pub(crate) fn may_contain(&self, hash: u64) -> bool {
        let (blocks, _) = self.blocks.as_chunks::<BLOCK_BYTES>();
        let (lanes, _) = blocks[block_of(hash, blocks.len())].as_chunks::<4>();
        // No early exit: eight lanes are one vector operation.
        lanes
            .iter()
            .zip(SALTS)
            .fold(0, |missing, (lane, salt)| missing | (!u32::from_le_bytes(*lane) & bit_of(hash, salt)))
            == 0
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.blocks.len()
    }
}

/// A filter over the first parts of the keys of some trees.
pub(crate) struct FirstPartFilter {
    /// Ascending. Of all other trees it knows nothing.
    trees: Box<[u32]>,
    filter: Filter,
}

impl FirstPartFilter {
    /// The stored form: how many trees, the trees, a filter over `hashes`.
    pub(crate) fn build(trees: &[u32], hashes: &[u64], bits_per_key: usize) -> Vec<u8> {
        let mut out = (trees.len() as u32).to_le_bytes().to_vec();
        trees.iter().for_each(|tree| out.extend_from_slice(&tree.to_le_bytes()));
        out.extend_from_slice(&Filter::build(hashes, bits_per_key));
        out
    }

    /// Takes the stored form.
    pub(crate) fn decode(stored: &[u8]) -> Result<Self> {
        let wrong = || Error::corrupt(format!("a filter of first parts of {} bytes", stored.len()));
        let (count, rest) = stored.split_first_chunk().ok_or_else(wrong)?;
        let bytes = (u32::from_le_bytes(*count) as usize).checked_mul(4).ok_or_else(wrong)?;
        let (trees, filter) = rest.split_at_checked(bytes).ok_or_else(wrong)?;
        let trees: Box<[u32]> = trees.as_chunks().0.iter().map(|tree| u32::from_le_bytes(*tree)).collect();
        if !trees.is_sorted() {
            return Err(wrong());
        }
        Ok(Self { trees, filter: Filter::decode(filter.to_vec())? })
    }

    /// `false`: no key of `tree` in the partition has the first part whose hash, with the tree, is `hash`.
    pub(crate) fn may_contain(&self, tree: u32, hash: u64) -> bool {
        self.trees.binary_search(&tree).is_err() || self.filter.may_contain(hash)
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.trees.len() * 4 + self.filter.bytes()
    }
}

/// The upper half of the hash picks the block, the lower half the bits in it.
#[inline]
fn block_of(hash: u64, blocks: usize) -> usize {
    (((hash >> 32) * blocks as u64) >> 32) as usize
}

#[inline]
fn bit_of(hash: u64, salt: u32) -> u32 {
    1 << ((hash as u32).wrapping_mul(salt) >> 27)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_hash(i: u32) -> u64 {
        hash(&i.to_be_bytes())
    }

    #[test]
    fn what_was_added_is_found_and_few_others_are() {
        for keys in [1, 10, 1000, 40_000u32] {
            let hashes: Vec<u64> = (0..keys).map(key_hash).collect();
            let filter = Filter::decode(Filter::build(&hashes, 10)).unwrap();
            assert!(hashes.iter().all(|&hash| filter.may_contain(hash)));
            let wrong = (keys..keys + 20_000).filter(|&i| filter.may_contain(key_hash(i))).count();
            assert!(wrong < 20_000 * 2 / 100, "{wrong} of 20000 at {keys} keys");
        }
    }

    #[test]
    fn a_filter_of_first_parts_denies_only_for_trees_that_it_knows() {
        let stored = FirstPartFilter::build(&[3, 9], &[key_hash(1)], 10);
        let filter = FirstPartFilter::decode(&stored).unwrap();
        assert!(filter.may_contain(3, key_hash(1)));
        assert!(!filter.may_contain(9, key_hash(2)));
        assert!(filter.may_contain(4, key_hash(2)), "another tree's keys may be there");
        for damaged in [&stored[..3], &stored[..11], &stored[..stored.len() - 1], &[255; 40]] {
            assert!(FirstPartFilter::decode(damaged).is_err());
        }
    }

    #[test]
    fn a_filter_of_odd_length_is_corrupt() {
        assert!(Filter::decode(vec![0; 33]).is_err());
        assert!(Filter::decode(vec![]).is_err());
    }
}
