//! Who may write: claims on epochs. No clock and no lease; a claim is an object that only one writer could create.
//!
//! * A writer owns epoch n if it created `epoch/<n>`. Claims are never deleted, and there is no gap between them.
//! * It is fenced from the moment `epoch/<n+1>` exists. It finds out when it looks, and it looks before anything that
//!   can't be undone and after each publication.

use std::sync::Arc;

use bucket::{Bucket, ErrorKind, Names, PutOutcome};
use bytes::Bytes;

use crate::{Disk, Epoch, Error, Kind, Result};

const MAGIC: [u8; 8] = *b"CISTCLAM";
const VERSION: u32 = 1;
const CLAIM_BYTES: usize = 48;
/// Others may claim at the same time, but not for ever.
const TRIES_MAX: usize = 100;
const IDENTITY: &str = "identity";

/// A data directory's random name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NodeId(pub(crate) [u8; 16]);

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl NodeId {
    /// The identity of this data directory, made of `fresh` at the first start.
    pub(crate) fn of(disk: &dyn Disk, fresh: [u8; 16]) -> Result<Self> {
        match disk.open(IDENTITY) {
            Ok(file) => {
                let mut bytes = [0; 16];
                // A crash at the first start may leave it shorter; it is made anew below.
                if file.len()? == 16 {
                    file.read_at(0, &mut bytes)?;
                    if bytes != [0; 16] {
                        return Ok(Self(bytes));
                    }
                }
            }
            Err(error) if error.absent => (),
            Err(error) => return Err(error.into()),
        }
        disk.remove(IDENTITY)?;
        let file = disk.create(IDENTITY)?;
        file.write_at(0, &fresh)?;
        file.sync()?;
        disk.sync_directory("")?;
        Ok(Self(fresh))
    }
}

/// Creates the next claim, for `node`. `nonce` is drawn by chance for this call: it tells our claim from others if the
/// answer was lost.
///
/// On an error the claim may exist; it then counts as one that published nothing.
pub(crate) fn claim(bucket: &dyn Bucket, names: &Names, node: NodeId, nonce: u64) -> Result<Epoch> {
    let listed = bucket.list(&names.claims())?;
    let mut epoch = listed.iter().filter_map(|object| Names::parse_claim(&object.name)).max().unwrap_or(0);
    // A listing may be behind; creation is not.
    for _ in 0..TRIES_MAX {
        epoch += 1;
        let name = names.claim(epoch);
        let body = encode(Epoch(epoch), node, nonce);
        match bucket.put_if_absent(&name, body.clone())? {
            PutOutcome::Created => return Ok(Epoch(epoch)),
            PutOutcome::Exists if bucket.get(&name)? == body => return Ok(Epoch(epoch)),
            PutOutcome::Exists => (),
        }
    }
    Err(Error::new(Kind::Unavailable, format!("{TRIES_MAX} other writers were quicker to claim an epoch")))
}

/// Tells a writer whether it still is the newest one.
#[derive(Clone)]
pub(crate) struct Fence {
    bucket: Arc<dyn Bucket>,
    names: Names,
    epoch: Epoch,
}

impl Fence {
    pub(crate) fn new(bucket: Arc<dyn Bucket>, names: Names, epoch: Epoch) -> Self {
        Self { bucket, names, epoch }
    }

    /// The writer's own epoch.
    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Ok: at some moment during the call nobody had claimed the next epoch. `Fenced`: somebody has.
    pub(crate) fn check(&self) -> Result<()> {
        let next = self.epoch.0 + 1;
        match self.bucket.get(&self.names.claim(next)) {
            Err(error) if error.kind == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error.into()),
            Ok(body) => Err(self.fenced_by(Epoch(next), decode(&body))),
        }
    }

    /// The error of a writer that found an object of `by`.
    pub(crate) fn fenced_by(&self, by: Epoch, node: Option<NodeId>) -> Error {
        let who = node.map_or_else(|| "another writer".to_owned(), |node| format!("node {node}"));
        Error::new(
            Kind::Fenced,
            format!(
                "fenced: {who} has claimed epoch {} of {}, newer than our epoch {}; this process writes nothing any more",
                by.0,
                self.names.claims(),
                self.epoch.0
            ),
        )
    }
}

fn encode(epoch: Epoch, node: NodeId, nonce: u64) -> Bytes {
    let mut body = Vec::with_capacity(CLAIM_BYTES);
    body.extend_from_slice(&MAGIC);
    body.extend_from_slice(&VERSION.to_le_bytes());
    body.extend_from_slice(&epoch.0.to_le_bytes());
    body.extend_from_slice(&node.0);
    body.extend_from_slice(&nonce.to_le_bytes());
    let crc = crc32fast::hash(&body);
    body.extend_from_slice(&crc.to_le_bytes());
    body.into()
}

/// Who made the claim, if it is whole. What a claim says is for people; that it exists is what counts.
fn decode(body: &[u8]) -> Option<NodeId> {
    let (body, crc) = body.split_at_checked(CLAIM_BYTES - 4)?;
    let whole = body.starts_with(&MAGIC) && crc == crc32fast::hash(body).to_le_bytes();
    if whole { Some(NodeId(body[20..36].try_into().ok()?)) } else { None }
}

/// A claim in words, or what is wrong with it.
pub(crate) fn describe(body: &[u8]) -> std::result::Result<String, &'static str> {
    let node = decode(body).ok_or("the claim is damaged; it counts all the same")?;
    let epoch = u64::from_le_bytes(body[12..20].try_into().expect("8 bytes"));
    Ok(format!("claim of epoch {epoch} by node {node}\n"))
}

/// Numbers from a seed, for names that must not meet (SplitMix64).
#[derive(Debug)]
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub(crate) fn bytes(&mut self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.next().to_le_bytes());
        bytes[8..].copy_from_slice(&self.next().to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use bucket::{Effect, FaultyBucket, MemoryBucket, Operation, Rule, When};

    use super::*;
    use crate::SimDisk;

    const NODE: NodeId = NodeId([7; 16]);

    fn names() -> Names {
        Names::new("main")
    }

    #[test]
    fn no_two_claimants_get_one_epoch_whatever_answers_are_lost_and_however_old_listings_are() {
        for seed in 0..100 {
            let memory = Arc::new(MemoryBucket::new());
            let rules = vec![
                Rule::lost_answer("*").with_probability(0.4),
                Rule::new("*", Effect::StaleList).on(Operation::List).with_probability(0.5),
                Rule::late_put("*", 3).with_probability(0.2),
            ];
            let tries = 1 + seed as u32 % 3;
            let faulty = FaultyBucket::new(memory.clone(), seed, rules).with_tries(tries);
            let mut epochs = Vec::new();
            for nonce in 0..30 {
                match claim(&faulty, &names(), NODE, nonce) {
                    Ok(epoch) => epochs.push(epoch.0),
                    Err(error) => assert_eq!(error.kind(), Kind::Unavailable, "seed {seed}: {error}"),
                }
            }
            assert!(epochs.windows(2).all(|pair| pair[0] < pair[1]), "seed {seed}: {epochs:?}");
            assert!(!epochs.is_empty(), "seed {seed}");
            faulty.land_late();
            let claims = memory.list(&names().claims()).unwrap();
            let numbers: Vec<_> =
                claims.iter().filter_map(|object| Names::parse_claim(&object.name)).collect();
            assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>(), "seed {seed}: no gaps");
        }
    }

    #[test]
    fn a_lost_answer_is_told_from_another_claimant() {
        let memory = Arc::new(MemoryBucket::new());
        let rule = Rule::new("*", Effect::Reset).on(Operation::Put).when(When::After).times(1);
        let faulty = FaultyBucket::new(memory.clone(), 1, vec![rule]).with_tries(2);
        assert_eq!(claim(&faulty, &names(), NODE, 5).unwrap(), Epoch(1), "our own, read back");
        // An epoch that our listing does not show yet, claimed by the same node in an earlier start.
        let stale = Rule::new("*", Effect::StaleList).on(Operation::List);
        let stale = FaultyBucket::new(memory.clone(), 1, vec![stale]);
        stale.put(&names().sst(1, 1), Bytes::new()).unwrap();
        stale.put_if_absent(&names().claim(2), encode(Epoch(2), NODE, 6)).unwrap();
        assert_eq!(claim(&stale, &names(), NODE, 7).unwrap(), Epoch(3));
        let fence = |epoch| Fence::new(memory.clone(), names(), Epoch(epoch));
        fence(3).check().unwrap();
        let error = fence(1).check().unwrap_err();
        assert!(error.kind() == Kind::Fenced && error.to_string().contains("node 070707070707"), "{error}");
    }

    #[test]
    fn a_data_directory_keeps_its_identity_and_a_torn_one_is_made_anew() {
        for seed in 0..50 {
            let disk = SimDisk::new(seed);
            disk.arm(crate::DiskFault::StopAt(seed % 6));
            let first = NodeId::of(&disk, [1; 16]);
            let disk = disk.crash();
            let second = NodeId::of(&disk, [2; 16]).unwrap();
            if let Ok(first) = first {
                assert_eq!(first, second, "seed {seed}: it was durable when it was returned");
            }
            assert_eq!(NodeId::of(&disk.crash(), [3; 16]).unwrap(), second, "seed {seed}");
        }
    }
}
