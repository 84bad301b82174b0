//! The catalogue's bytes: keys and values of tree 1. The byte format is `docs/formats/catalogue.md`, version 1.
//!
//! * One key space for each kind of thing, told apart by the first byte; never renumber.
//! * Every value starts with a version of its own; unknown ones are refused by name.

use engine::TreeId;

use crate::{Error, Result, varint};

/// The catalogue's tree.
pub(crate) const CATALOGUE: TreeId = TreeId(1);
/// Nothing is stored here: the locks of whole tables have keys in it, the tables' ids.
pub(crate) const TABLE_LOCKS: TreeId = TreeId(2);
/// What the value of the format key must be.
pub(crate) const FORMAT: &[u8] = b"cistern catalogue 1";

const DEFINITION_VERSION: u8 = 1;
const STATISTICS_VERSION: u8 = 1;
/// No index tree: the primary key is the primary tree.
const NO_TREE: u32 = 0;

/// First byte of a key of the catalogue. Stored: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Space {
    /// The format of the catalogue itself.
    Format = 0,
    /// `database/table` → definition.
    Table = 1,
    /// Path of a file of the server → its bytes.
    File = 2,
    /// Table id, slot → next value of its auto-increment column; the greatest counts.
    AutoIncrement = 3,
    /// Table id → statistics.
    Statistics = 4,
    /// Table id → the path that it had before ALTER TABLE put it aside.
    Origin = 5,
    /// Tree id → where the first part of its keys ends.
    FirstPart = 6,
}

pub(crate) fn key(space: Space, name: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + name.len());
    key.push(space as u8);
    key.extend_from_slice(name);
    key
}

pub(crate) fn table_key(space: Space, table: u64) -> [u8; 9] {
    let mut key = [space as u8; 9];
    key[1..].copy_from_slice(&table.to_be_bytes());
    key
}

pub(crate) fn first_part_key(tree: TreeId) -> Vec<u8> {
    key(Space::FirstPart, &tree.0.to_be_bytes())
}

/// Commits that run at the same time write the mark of a table's auto-increment column to a slot each, because the order in which they get durable
/// is not that in which they looked at the counter. Slot 0 is the table's key itself.
pub(crate) fn mark_key(table: u64, slot: u16) -> Vec<u8> {
    let mut key = table_key(Space::AutoIncrement, table).to_vec();
    if slot > 0 {
        key.extend_from_slice(&slot.to_be_bytes());
    }
    key
}

/// A table's definition as the catalogue keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Definition {
    /// Names the table for ever; a rename keeps it.
    pub table: u64,
    /// Grows with each change of the images.
    pub version: u64,
    /// The server's .frm image.
    pub frm: Vec<u8>,
    /// The partition engine's .par image; empty for most tables.
    pub par: Vec<u8>,
    /// Changes when the stored bytes of rows or keys would.
    pub(crate) fingerprint: u64,
    pub(crate) trees: Trees,
}

/// Where a table's rows and index entries are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trees {
    pub(crate) primary: TreeId,
    /// By number of the index; `None` for the primary key.
    pub(crate) indexes: Vec<Option<TreeId>>,
}

impl Trees {
    pub(crate) fn all(&self) -> impl Iterator<Item = TreeId> + '_ {
        std::iter::once(self.primary).chain(self.indexes.iter().flatten().copied())
    }
}

impl Definition {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + self.frm.len() + self.par.len());
        out.push(DEFINITION_VERSION);
        for number in [self.table, self.version, self.fingerprint] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.trees.primary.0.to_le_bytes());
        varint::put(self.trees.indexes.len() as u64, &mut out);
        for tree in &self.trees.indexes {
            out.extend_from_slice(&tree.map_or(NO_TREE, |tree| tree.0).to_le_bytes());
        }
        for image in [&self.frm, &self.par] {
            varint::put(image.len() as u64, &mut out);
            out.extend_from_slice(image);
        }
        out
    }

    pub(crate) fn decode(path: &str, bytes: &[u8]) -> Result<Self> {
        match bytes.first() {
            Some(&DEFINITION_VERSION) => {}
            Some(other) => {
                return Err(Error::Corrupt(format!(
                    "the definition of {path} has version {other}; this program knows version {DEFINITION_VERSION}"
                )));
            }
            None => return Err(Error::Corrupt(format!("the definition of {path} is empty"))),
        }
        Self::decode_body(&bytes[1..])
            .ok_or_else(|| Error::Corrupt(format!("the definition of {path} is garbled")))
    }

    fn decode_body(mut rest: &[u8]) -> Option<Self> {
        let (table, version, fingerprint) =
            (take_u64(&mut rest)?, take_u64(&mut rest)?, take_u64(&mut rest)?);
        let primary = TreeId(take_u32(&mut rest)?);
        let count = varint::take(&mut rest)?;
        let mut indexes = Vec::new();
        for _ in 0..count {
            let tree = take_u32(&mut rest)?;
            indexes.push((tree != NO_TREE).then_some(TreeId(tree)));
        }
        let (frm, par) = (take_bytes(&mut rest)?.to_vec(), take_bytes(&mut rest)?.to_vec());
        let trees = Trees { primary, indexes };
        rest.is_empty().then_some(Self { table, version, frm, par, fingerprint, trees })
    }
}

/// What is known of a table's contents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct StoredStatistics {
    pub(crate) rows: u64,
    /// Rows changed since the indexes were sampled.
    pub(crate) changed: u64,
    /// For each index, for each part (the user's, then the primary key's), rows that share a value, times
    /// [`PER_KEY_SCALE`]. Empty: never sampled.
    pub(crate) per_key: Vec<Vec<u64>>,
}

/// Fixed point of rows per key.
pub(crate) const PER_KEY_SCALE: u64 = 16;

impl StoredStatistics {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![STATISTICS_VERSION];
        varint::put(self.rows, &mut out);
        varint::put(self.changed, &mut out);
        varint::put(self.per_key.len() as u64, &mut out);
        for index in &self.per_key {
            varint::put(index.len() as u64, &mut out);
            index.iter().for_each(|part| varint::put(*part, &mut out));
        }
        out
    }

    /// Statistics of another version or garbled ones are none: they can be made again.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (version, mut rest) = bytes.split_first()?;
        if *version != STATISTICS_VERSION {
            return None;
        }
        let (rows, changed) = (varint::take(&mut rest)?, varint::take(&mut rest)?);
        let mut per_key = Vec::new();
        for _ in 0..varint::take(&mut rest)? {
            let parts = varint::take(&mut rest)?;
            per_key.push((0..parts).map(|_| varint::take(&mut rest)).collect::<Option<Vec<u64>>>()?);
        }
        Some(Self { rows, changed, per_key })
    }
}

fn take_u64(from: &mut &[u8]) -> Option<u64> {
    let (head, tail) = from.split_first_chunk::<8>()?;
    *from = tail;
    Some(u64::from_le_bytes(*head))
}

fn take_u32(from: &mut &[u8]) -> Option<u32> {
    let (head, tail) = from.split_first_chunk::<4>()?;
    *from = tail;
    Some(u32::from_le_bytes(*head))
}

fn take_bytes<'a>(from: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = usize::try_from(varint::take(from)?).ok()?;
    let (head, tail) = from.split_at_checked(len)?;
    *from = tail;
    Some(head)
}
