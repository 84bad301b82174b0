//! A descriptor turned into codecs: how a table's rows and index entries are made and read.
//!
//! * An entry of a non-unique index: key = encoded parts ‖ primary key, value = restore bytes.
//! * An entry of a unique index whose parts are all present: key = encoded parts, value = length ‖ primary key ‖ restore bytes, so that a
//!   duplicate is found by one `get`. With a NULL among its parts it is like a non-unique one.

use std::fmt::Write;

use engine::TreeId;

use crate::catalogue::Trees;
use crate::descriptor::{Collations, Descriptor};
use crate::keys::{Extent, Garbled, Part, is_whole};
use crate::rows::{KeyInt, RowCodec};
use crate::varint;

/// A table's codecs.
pub(crate) struct Layout {
    pub(crate) descriptor: Descriptor,
    pub(crate) rows: RowCodec,
    pub(crate) indexes: Vec<IndexCodec>,
    /// Bytes of a position: the longest primary key, and its length in two bytes.
    pub(crate) position_length: usize,
}

/// How one index's entries are made.
pub(crate) struct IndexCodec {
    pub(crate) parts: Vec<Part>,
    pub(crate) unique: bool,
    /// Columns that its parts use.
    pub(crate) fields: Vec<usize>,
    nullable: bool,
    /// The primary key's parts, empty for a hidden one; and for a secondary index the bytes of every primary key if they are always as many.
    primary: Vec<Part>,
    primary_bytes: Option<usize>,
    /// What a key tuple holds, in the order of the stored key.
    steps: Vec<TupleStep>,
    user_tuple_bytes: usize,
    user_steps: usize,
}

/// A part of the stored key, and where a key tuple has it.
struct TupleStep {
    part: Part,
    /// The layout of the tuple's bytes is this part's.
    source: Part,
    at: usize,
    /// The tuple must be at least this long for the part to be in it.
    needs: usize,
}

/// What a key tuple turned out to be.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TupleShape {
    /// Bytes of the encoding that the user's parts made.
    pub(crate) user_end: usize,
    /// All user's parts are there.
    pub(crate) full: bool,
    /// One of them is NULL.
    pub(crate) null: bool,
}

impl Layout {
    pub(crate) fn new(descriptor: Descriptor, collations: &dyn Collations) -> Self {
        let indexes: Vec<IndexCodec> = (0..descriptor.indexes.len())
            .map(|number| IndexCodec::new(&descriptor, number, collations))
            .collect();
        let longest = descriptor.primary.map_or(8, |primary| {
            let parts = &descriptor.indexes[primary].parts;
            parts.iter().map(|part| Part::new(&descriptor, part, collations).max_len(part)).sum()
        });
        Self {
            rows: RowCodec::new(&descriptor, collations),
            indexes,
            position_length: longest + 2,
            descriptor,
        }
    }

    /// The parts of the primary key; `None` if it is hidden.
    pub(crate) fn primary(&self) -> Option<&IndexCodec> {
        self.descriptor.primary.map(|primary| &self.indexes[primary])
    }

    /// For each of `trees` whose entries can share the first part of their keys, where it ends.
    pub(crate) fn first_parts(&self, trees: &Trees) -> Vec<(TreeId, Extent)> {
        let indexes = self.indexes.iter().zip(&trees.indexes);
        indexes
            .filter(|(index, _)| index.parts.len() > 1 || !index.unique)
            .map(|(index, tree)| (tree.unwrap_or(trees.primary), index.parts[0].extent()))
            .collect()
    }

    /// A number that changes when the stored bytes would.
    pub(crate) fn fingerprint(&self) -> u64 {
        let mut text = String::new();
        self.rows.describe(&mut text);
        _ = write!(text, "primary {:?}", self.descriptor.primary);
        self.indexes.iter().for_each(|index| text.push_str(&index.describe()));
        // FNV-1a.
        text.bytes()
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }
}

/// Which parts of an index entry a read decodes, the index's own and the primary key's, each up to the last one wanted; reused
/// from set to set.
#[derive(Clone, Debug, Default)]
pub(crate) struct EntryProgram {
    own: Vec<bool>,
    primary: Vec<bool>,
    /// The same as copies from known places, if all that is wanted is at one.
    copies: Option<EntryCopies>,
}

/// From the key's or the primary key's bytes, to the record.
#[derive(Clone, Debug, Default)]
struct EntryCopies {
    own: Vec<(usize, usize, KeyInt)>,
    primary: Vec<(usize, usize, KeyInt)>,
}

impl IndexCodec {
    fn new(descriptor: &Descriptor, number: usize, collations: &dyn Collations) -> Self {
        let index = &descriptor.indexes[number];
        let is_primary = descriptor.primary == Some(number);
        let parts: Vec<Part> =
            index.parts.iter().map(|part| Part::new(descriptor, part, collations)).collect();
        let primary: Vec<Part> = match descriptor.primary {
            Some(primary) if !is_primary => descriptor.indexes[primary]
                .parts
                .iter()
                .map(|part| Part::new(descriptor, part, collations))
                .collect(),
            _ => Vec::new(),
        };
        let primary_bytes = match descriptor.primary {
            None => Some(8),
            Some(_) => primary.iter().map(Part::fixed_len).sum(),
        };
        let mut codec = Self {
            fields: parts.iter().map(|part| part.field).collect(),
            nullable: index.parts.iter().any(|part| descriptor.fields[part.field].null.is_some()),
            parts,
            unique: index.unique || is_primary,
            primary,
            primary_bytes,
            steps: Vec::new(),
            user_tuple_bytes: 0,
            user_steps: index.parts.len(),
        };
        codec.lay_out_tuple(descriptor, number, collations);
        codec
    }

    /// A text that changes when the stored bytes of entries would, the primary key's share apart.
    pub(crate) fn describe(&self) -> String {
        let mut text = format!("index {}", self.unique);
        self.parts.iter().for_each(|part| text.push_str(&part.describe()));
        text
    }

    /// The server leaves out of a tuple's extension the primary-key parts that the user's parts have already; the stored key
    /// has them all, and their values are known.
    fn lay_out_tuple(&mut self, descriptor: &Descriptor, number: usize, collations: &dyn Collations) {
        let index = &descriptor.indexes[number];
        let mut at = 0;
        for part in &self.parts {
            let needs = at + part.tuple_bytes();
            self.steps.push(TupleStep { part: part.clone(), source: part.clone(), at, needs });
            at = needs;
        }
        self.user_tuple_bytes = at;
        let mut extension = index.extension.iter().peekable();
        for part in &self.primary {
            if let Some(added) = extension.next_if(|added| added.field == part.field) {
                let source = Part::new(descriptor, added, collations);
                let needs = at + source.tuple_bytes();
                self.steps.push(TupleStep { part: part.clone(), source, at, needs });
                at = needs;
                continue;
            }
            let known = index
                .parts
                .iter()
                .position(|user| user.field == part.field && is_whole(&descriptor.fields[user.field], user));
            let Some(user) = known else { return };
            let user = &self.steps[user];
            let step = TupleStep { part: part.clone(), source: user.source.clone(), at: user.at, needs: at };
            self.steps.push(step);
        }
    }

    /// Appends the encoding of a key tuple's parts.
    pub(crate) fn encode_tuple(
        &self,
        tuple: &[u8],
        collations: &dyn Collations,
        scratch: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<TupleShape, Garbled> {
        let mut shape = TupleShape::default();
        for (i, step) in self.steps.iter().enumerate() {
            if step.needs > tuple.len() {
                break;
            }
            let value = step.source.tuple_value(&tuple[step.at..])?;
            step.part.encode(value, collations, scratch, out);
            if i < self.user_steps {
                shape.user_end = out.len();
                shape.null |= value.is_none();
            }
        }
        shape.full = tuple.len() >= self.user_tuple_bytes;
        Ok(shape)
    }

    /// Appends the encoding of this index's parts. True: one of them is NULL.
    pub(crate) fn encode_parts<'a>(
        &self,
        value: &impl Fn(usize) -> Result<Option<&'a [u8]>, Garbled>,
        collations: &dyn Collations,
        scratch: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<bool, Garbled> {
        let mut null = false;
        for part in &self.parts {
            let value = value(part.field)?;
            null |= value.is_none();
            part.encode(value, collations, scratch, out);
        }
        Ok(null)
    }

    /// Makes an entry of this secondary index: its key and its value, in place of what the buffers hold. True: nobody else may have
    /// this key.
    pub(crate) fn entry<'a>(
        &self,
        value: &impl Fn(usize) -> Result<Option<&'a [u8]>, Garbled>,
        primary: &[u8],
        collations: &dyn Collations,
        scratch: &mut Vec<u8>,
        (entry_key, entry_value): (&mut Vec<u8>, &mut Vec<u8>),
    ) -> Result<bool, Garbled> {
        entry_key.clear();
        entry_value.clear();
        let null = self.encode_parts(value, collations, scratch, entry_key)?;
        let alone = self.unique && !null;
        if alone {
            varint::put(primary.len() as u64, entry_value);
            entry_value.extend_from_slice(primary);
        } else {
            entry_key.extend_from_slice(primary);
        }
        for part in &self.parts {
            if let Some(value) = value(part.field)? {
                part.restore_bytes(value, entry_value);
            }
        }
        Ok(alone)
    }

    /// Primary key and restore bytes of an entry of this secondary index.
    pub(crate) fn split<'a>(&self, key: &'a [u8], value: &'a [u8]) -> Result<(&'a [u8], &'a [u8]), Garbled> {
        if self.unique {
            let end = if self.nullable { self.parts_end(key)? } else { key.len() };
            if end == key.len() {
                let mut rest = value;
                let len = varint::take(&mut rest).ok_or(Garbled)? as usize;
                return rest.split_at_checked(len).ok_or(Garbled);
            }
            return Ok((&key[end..], value));
        }
        let end = match self.primary_bytes {
            Some(bytes) => key.len().checked_sub(bytes).ok_or(Garbled)?,
            None => self.parts_end(key)?,
        };
        Ok((&key[end..], value))
    }

    fn parts_end(&self, key: &[u8]) -> Result<usize, Garbled> {
        self.parts.iter().try_fold(0, |at, part| part.skip(key, at))
    }

    /// Where each of the first `ends.len()` parts of a stored key ends, the primary key's parts counted after the user's. Fewer if the key
    /// has fewer.
    pub(crate) fn part_ends(&self, key: &[u8], ends: &mut [usize]) -> Result<usize, Garbled> {
        let mut at = 0;
        let mut n = 0;
        for part in self.parts.iter().chain(&self.primary).take(ends.len()) {
            if at == key.len() {
                break;
            }
            at = part.skip(key, at)?;
            ends[n] = at;
            n += 1;
        }
        Ok(n)
    }

    /// Whether an entry alone gives back all wanted columns.
    pub(crate) fn covers(&self, columns: usize, wanted: impl Fn(usize) -> bool) -> bool {
        (0..columns).filter(|field| wanted(*field)).all(|field| {
            self.parts.iter().any(|part| part.field == field && part.restorable())
                || self.primary.iter().any(|part| part.field == field && part.restorable_from_key())
        })
    }

    /// Whether an entry gives back all columns of its key, those of the primary key too.
    pub(crate) fn gives_back_its_key(&self) -> bool {
        let by_parts = |field| self.parts.iter().any(|part| part.field == field && part.restorable());
        self.parts.iter().all(|part| part.restorable())
            && self.primary.iter().all(|part| part.restorable_from_key() || by_parts(part.field))
    }

    /// Compiles what reads of a set of columns decode.
    pub(crate) fn compile(&self, wanted: impl Fn(usize) -> bool, program: &mut EntryProgram) {
        let choose = |flags: &mut Vec<bool>, parts: &[Part], restorable: fn(&Part) -> bool| {
            flags.clear();
            flags.extend(parts.iter().map(|part| restorable(part) && wanted(part.field)));
            flags.truncate(flags.iter().rposition(|wanted| *wanted).map_or(0, |last| last + 1));
        };
        choose(&mut program.own, &self.parts, Part::restorable);
        choose(&mut program.primary, &self.primary, Part::restorable_from_key);
        program.copies = self.copies(program);
    }

    fn copies(&self, program: &EntryProgram) -> Option<EntryCopies> {
        let places = |parts: &[Part], wanted: &[bool]| {
            let mut at = 0;
            let mut copies = Vec::new();
            for (part, wanted) in parts.iter().zip(wanted) {
                if *wanted {
                    copies.push((at, part.record_offset(), part.key_int()?));
                }
                at += part.fixed_len()?;
            }
            Some(copies)
        };
        let own = places(&self.parts, &program.own)?;
        let primary = places(&self.primary, &program.primary)?;
        (primary.is_empty() || self.primary_len().is_some()).then_some(EntryCopies { own, primary })
    }

    /// How many bytes at the end of each entry's key are the primary key, if they always are as many.
    pub(crate) fn primary_len(&self) -> Option<usize> {
        self.primary_bytes.filter(|_| !self.unique)
    }

    /// Writes a program's columns into a record.
    #[inline]
    pub(crate) fn decode(
        &self,
        program: &EntryProgram,
        key: &[u8],
        value: &[u8],
        record: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> Result<(), Garbled> {
        let Some(copies) = &program.copies else {
            return self.decode_parts(program, key, value, record, scratch);
        };
        for &(at, to, int) in &copies.own {
            int.copy(key.get(at..at + int.bytes).ok_or(Garbled)?, &mut record[to..to + int.bytes]);
        }
        if let (Some(bytes), false) = (self.primary_bytes, copies.primary.is_empty()) {
            let primary = &key[key.len().checked_sub(bytes).ok_or(Garbled)?..];
            for &(at, to, int) in &copies.primary {
                int.copy(&primary[at..at + int.bytes], &mut record[to..to + int.bytes]);
            }
        }
        Ok(())
    }

    /// The same part by part, wherever they are.
    fn decode_parts(
        &self,
        program: &EntryProgram,
        key: &[u8],
        value: &[u8],
        record: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> Result<(), Garbled> {
        if program.own.is_empty() && program.primary.is_empty() {
            return Ok(());
        }
        let (primary, mut restore) = self.split(key, value)?;
        let mut at = 0;
        for (part, wanted) in self.parts.iter().zip(&program.own) {
            at = part.decode(key, at, &mut restore, wanted.then_some(&mut *record), scratch)?;
        }
        let mut at = 0;
        for (part, wanted) in self.primary.iter().zip(&program.primary) {
            at = match wanted {
                true => part.decode(primary, at, &mut &[][..], Some(record), scratch)?,
                false => part.skip(primary, at)?,
            };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
