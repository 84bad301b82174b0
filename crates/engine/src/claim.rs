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
