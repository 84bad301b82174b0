//! Rows: a record of the server turned into a value of the primary tree, and back. The byte format is
//! `docs/formats/rows.md`, version 1.
//!
//! * A column's *own form* is what is stored and what index keys are made of: the record's bytes for fixed kinds, the text without
//!   the padding for CHAR, the content for VARCHAR and BLOB.
//! * Fixed columns stand at fixed offsets, NULL or not, so that a read decodes only the columns that it wants; variable ones
//!   follow in order, absent when NULL.
//! * Primary-key columns that the key gives back exactly, at an offset known beforehand, are left out of the row.

use crate::cursor::Record;
use crate::descriptor::{Collations, Descriptor, Field, Kind, Storage};
use crate::keys::{Garbled, Part, strip_spaces};
use crate::varint;

/// First byte of every row.
pub(crate) const ROW_VERSION: u8 = 1;

/// A column's place in the record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    offset: usize,
    pub(crate) form: Form,
    null: Option<(usize, u8)>,
}

/// How the record holds a value.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Form {
    /// So many bytes.
    Plain(usize),
    /// So many bytes, spaces at the end do not count.
    Char(usize),
    /// Length bytes and room for so many.
    VarChar { length_bytes: usize, room: usize },
    /// Length bytes, then a pointer.
    Blob(usize),
}

impl Slot {
    pub(crate) fn new(field: &Field) -> Self {
        let (bytes, length_bytes) = (field.pack_length as usize, usize::from(field.length_bytes));
        let form = match field.kind {
            Kind::Char => Form::Char(bytes),
            Kind::VarChar => Form::VarChar { length_bytes, room: bytes - length_bytes },
            Kind::Blob => Form::Blob(length_bytes),
            _ => Form::Plain(bytes),
        };
        Self { offset: field.offset as usize, form, null: field.null.map(|(at, bit)| (at as usize, bit)) }
    }

    #[inline]
    pub(crate) fn is_null(&self, record: &[u8]) -> bool {
        self.null.is_some_and(|(at, bit)| record[at] & bit != 0)
    }

    /// Sets NULL, with a value of zeros or spaces so that equal rows make equal records.
    pub(crate) fn set_null(&self, record: &mut [u8]) {
        if let Some((at, bit)) = self.null {
            record[at] |= bit;
        }
        self.blank(record);
    }

    #[inline]
    fn blank(&self, record: &mut [u8]) {
        let (start, bytes, with) = match self.form {
            Form::Plain(n) => (self.offset, n, 0),
            Form::Char(n) => (self.offset, n, b' '),
            Form::VarChar { length_bytes, .. } => (self.offset, length_bytes, 0),
            Form::Blob(length_bytes) => (self.offset, length_bytes + 8, 0),
        };
        record[start..start + bytes].fill(with);
    }

    /// Whether a value in its own form has room here.
    #[inline]
    pub(crate) fn fits(&self, value: &[u8]) -> bool {
        match self.form {
            Form::Plain(n) => value.len() == n,
            Form::Char(n) => value.len() <= n,
            Form::VarChar { room, .. } => value.len() <= room,
            Form::Blob(length_bytes) => length_bytes >= 4 || value.len() >> (8 * length_bytes) == 0,
        }
    }

    /// Puts a value that `fits`, given in its own form. A BLOB's pointer points into `value`.
    pub(crate) fn set(&self, record: &mut [u8], value: &[u8]) {
        if let Some((at, bit)) = self.null {
            record[at] &= !bit;
        }
        self.put(record, value);
    }

    /// Puts an integer that `fits`, given as a key has it.
    #[inline]
    pub(crate) fn set_from_key(&self, record: &mut [u8], key: &[u8], int: KeyInt) {
        if let Some((at, bit)) = self.null {
            record[at] &= !bit;
        }
        int.copy(key, &mut record[self.offset..self.offset + key.len()]);
    }

    /// Where it starts in the record.
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    #[inline]
    fn put(&self, record: &mut [u8], value: &[u8]) {
        let to = &mut record[self.offset..];
        let n = value.len();
        match self.form {
            Form::Plain(_) => to[..n].copy_from_slice(value),
            Form::Char(all) => {
                to[..n].copy_from_slice(value);
                to[n..all].fill(b' ');
            }
            Form::VarChar { length_bytes: 1, .. } => {
                to[0] = n as u8;
                to[1..1 + n].copy_from_slice(value);
            }
            Form::VarChar { .. } => {
                to[..2].copy_from_slice(&(n as u16).to_le_bytes());
                to[2..2 + n].copy_from_slice(value);
            }
            Form::Blob(length_bytes) => {
                to[..length_bytes].copy_from_slice(&(n as u64).to_le_bytes()[..length_bytes]);
                // The address only: whoever follows it is on the other side of the border.
                let address = if n == 0 { 0 } else { value.as_ptr().expose_provenance() as u64 };
                to[length_bytes..length_bytes + 8].copy_from_slice(&address.to_ne_bytes());
            }
        }
    }

    /// A value that is not NULL, in its own form. BLOBs are not in the image.
    #[inline]
    fn get<'a>(&self, image: &'a [u8]) -> Result<&'a [u8], Garbled> {
        let from = &image[self.offset..];
        match self.form {
            Form::Plain(n) => Ok(&from[..n]),
            Form::Char(n) => Ok(strip_spaces(&from[..n])),
            Form::VarChar { length_bytes, room } => {
                let n = match length_bytes {
                    1 => usize::from(from[0]),
                    _ => usize::from(u16::from_le_bytes([from[0], from[1]])),
                };
                if n > room { Err(Garbled) } else { Ok(&from[length_bytes..length_bytes + n]) }
            }
            Form::Blob(_) => Err(Garbled),
        }
    }

    /// Whether two images hold different values; BLOBs are compared by length and address.
    fn differs(&self, old: &[u8], new: &[u8]) -> bool {
        match (self.is_null(old), self.is_null(new)) {
            (true, true) => return false,
            (false, false) => {}
            _ => return true,
        }
        match self.form {
            Form::Plain(n) | Form::Char(n) => {
                old[self.offset..self.offset + n] != new[self.offset..self.offset + n]
            }
            // A length out of range stands in a column that was never read: unequal only if it was written since.
            Form::VarChar { length_bytes, room } => match (self.get(old), self.get(new)) {
                (Ok(old), Ok(new)) => old != new,
                _ => old[self.offset..][..length_bytes + room] != new[self.offset..][..length_bytes + room],
            },
            Form::Blob(length_bytes) => {
                old[self.offset..][..length_bytes + 8] != new[self.offset..][..length_bytes + 8]
            }
        }
    }
}

/// Where the row holds a column.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    /// At this offset.
    Fixed(usize),
    /// The n-th of the variable ones.
    Variable(usize),
    /// In the primary key: offset there, and offset among the bytes that `Parts` takes from it.
    Key {
        at: usize,
        into: usize,
    },
    Absent,
}

#[derive(Clone, Debug)]
struct Column {
    slot: Slot,
    place: Place,
    /// Which of the record's BLOBs it is.
    blob: usize,
    computed: bool,
    /// For `Place::Key`.
    key_int: KeyInt,
}

/// How the bytes that a key has of a value become the record's.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct KeyInt {
    pub(crate) bytes: usize,
    pub(crate) reversed: bool,
    pub(crate) sign: u8,
    pub(crate) flip: u8,
}

impl KeyInt {
    /// `key` and `to` are `bytes` long. Most are four.
    #[inline(always)]
    pub(crate) fn copy(&self, key: &[u8], to: &mut [u8]) {
        if self.bytes == 4
            && self.reversed
            && let (Some(key), Some(to)) = (key.first_chunk(), to.first_chunk_mut())
        {
            let flips = u32::from_be_bytes([self.flip; 4]) ^ u32::from(self.sign) << 24;
            *to = (u32::from_be_bytes(*key) ^ flips).to_le_bytes();
        } else {
            self.copy_bytes(key, to);
        }
    }

    fn copy_bytes(&self, key: &[u8], to: &mut [u8]) {
        if let (true, Some(key), Some(to)) = (self.reversed, key.first_chunk(), to.first_chunk_mut::<8>())
            && self.bytes == 8
        {
            let flips = u64::from_be_bytes([self.flip; 8]) ^ u64::from(self.sign) << 56;
            *to = (u64::from_be_bytes(*key) ^ flips).to_le_bytes();
        } else if self.reversed {
            for (to, from) in to.iter_mut().zip(key.iter().rev()) {
                *to = from ^ self.flip;
            }
            to[self.bytes - 1] ^= self.sign;
        } else {
            for (to, from) in to.iter_mut().zip(key) {
                *to = from ^ self.flip;
            }
        }
    }
}

/// A table's row format.
#[derive(Clone, Debug)]
pub(crate) struct RowCodec {
    columns: Vec<Column>,
    /// Which bits of the record's null bytes are kept.
    null_mask: Vec<u8>,
    /// Offset of the first variable column.
    fixed_end: usize,
    fixed: Vec<usize>,
    variable: Vec<usize>,
    key_columns: Vec<usize>,
    key_column_bytes: usize,
}

/// Where a row's columns are; reused from row to row.
#[derive(Clone, Debug, Default)]
pub(crate) struct Parts {
    spans: Vec<(u32, u32)>,
    from_key: Vec<u8>,
}

/// What to copy for a certain set of columns; reused from set to set.
#[derive(Clone, Debug, Default)]
pub(crate) struct Program {
    /// From row, to record, bytes.
    copies: Vec<(usize, usize, usize)>,
    keys: Vec<(usize, usize, KeyInt)>,
    /// The variable columns up to the last wanted one.
    variable: Vec<VariableStep>,
}

#[derive(Clone, Copy, Debug)]
struct VariableStep {
    null: Option<(usize, u8)>,
    slot: Slot,
    wanted: bool,
}

impl Program {
    /// Whether BLOBs are among the wanted columns.
    pub(crate) fn has_blobs(&self) -> bool {
        self.variable.iter().any(|step| step.wanted && matches!(step.slot.form, Form::Blob(_)))
    }
}

impl RowCodec {
    pub(crate) fn new(descriptor: &Descriptor, collations: &dyn Collations) -> Self {
        let mut columns: Vec<Column> = Vec::with_capacity(descriptor.fields.len());
        let mut blobs = 0;
        for field in &descriptor.fields {
            let blob = blobs;
            blobs += usize::from(field.kind == Kind::Blob);
            columns.push(Column {
                slot: Slot::new(field),
                place: Place::Absent,
                blob,
                computed: field.storage == Storage::Computed,
                key_int: KeyInt::default(),
            });
        }
        let mut codec = Self {
            columns,
            null_mask: vec![0; descriptor.null_bytes as usize],
            fixed_end: 0,
            fixed: Vec::new(),
            variable: Vec::new(),
            key_columns: Vec::new(),
            key_column_bytes: 0,
        };
        codec.take_from_key(descriptor, collations);
        codec.place_in_row(descriptor);
        codec
    }

    fn take_from_key(&mut self, descriptor: &Descriptor, collations: &dyn Collations) {
        let Some(primary) = descriptor.primary else { return };
        let mut at = 0;
        for index_part in &descriptor.indexes[primary].parts {
            let part = Part::new(descriptor, index_part, collations);
            let Some(bytes) = part.fixed_len() else { return };
            let column = &mut self.columns[part.field];
            if let Some(key_int) = part.key_int().filter(|_| column.place == Place::Absent) {
                column.place = Place::Key { at, into: self.key_column_bytes };
                column.key_int = key_int;
                self.key_columns.push(part.field);
                self.key_column_bytes += bytes;
            }
            at += bytes;
        }
    }

    fn place_in_row(&mut self, descriptor: &Descriptor) {
        let mut at = 1 + descriptor.null_bytes as usize;
        for (i, field) in descriptor.fields.iter().enumerate() {
            if field.storage == Storage::Absent || matches!(self.columns[i].place, Place::Key { .. }) {
                continue;
            }
            if let Some((byte, bit)) = field.null {
                self.null_mask[byte as usize] |= bit;
            }
            self.columns[i].place = match self.columns[i].slot.form {
                Form::Plain(bytes) => {
                    self.fixed.push(i);
                    at += bytes;
                    Place::Fixed(at - bytes)
                }
                _ => {
                    self.variable.push(i);
                    Place::Variable(self.variable.len() - 1)
                }
            };
        }
        self.fixed_end = at;
    }

    /// What of it decides the stored bytes, for the layout's fingerprint.
    pub(crate) fn describe(&self, out: &mut String) {
        use std::fmt::Write;
        for column in &self.columns {
            // Writing to a string can not fail.
            _ = write!(
                out,
                "{:?} {:?};",
                column.place,
                column.slot.null.filter(|_| column.place != Place::Absent)
            );
        }
    }

    /// Whether reads of BLOBs are among the columns.
    pub(crate) fn has_blobs(&self) -> bool {
        self.columns.iter().any(|column| matches!(column.slot.form, Form::Blob(_)))
    }

    /// Compiles what a set of columns needs.
    pub(crate) fn compile(&self, wanted: impl Fn(usize) -> bool, program: &mut Program) {
        program.copies.clear();
        program.keys.clear();
        program.variable.clear();
        for &i in &self.fixed {
            let Place::Fixed(from) = self.columns[i].place else { continue };
            let Form::Plain(bytes) = self.columns[i].slot.form else { continue };
            if !wanted(i) {
                continue;
            }
            let to = self.columns[i].slot.offset;
            match program.copies.last_mut() {
                Some((last_from, last_to, n)) if *last_from + *n == from && *last_to + *n == to => {
                    *n += bytes
                }
                _ => program.copies.push((from, to, bytes)),
            }
        }
        for &i in &self.key_columns {
            let column = &self.columns[i];
            if let (Place::Key { at, .. }, true) = (column.place, wanted(i)) {
                program.keys.push((at, column.slot.offset, column.key_int));
            }
        }
        let used = self.variable.iter().rposition(|i| wanted(*i)).map_or(0, |last| last + 1);
        for &i in &self.variable[..used] {
            let slot = self.columns[i].slot;
            let null = slot.null.map(|(at, bit)| (at + 1, bit));
            program.variable.push(VariableStep { null, slot, wanted: wanted(i) });
        }
    }

    /// Writes a program's columns into a record. BLOB pointers point into `row`. Null bits of all stored columns are set.
    #[inline]
    pub(crate) fn decode(
        &self,
        program: &Program,
        row: &[u8],
        key: &[u8],
        record: &mut [u8],
    ) -> Result<(), Garbled> {
        if row.len() < self.fixed_end || row[0] != ROW_VERSION {
            return Err(Garbled);
        }
        for (i, mask) in self.null_mask.iter().enumerate() {
            record[i] = record[i] & !mask | row[1 + i] & mask;
        }
        for &(from, to, bytes) in &program.copies {
            record[to..to + bytes].copy_from_slice(&row[from..from + bytes]);
        }
        for &(at, to, int) in &program.keys {
            int.copy(key.get(at..at + int.bytes).ok_or(Garbled)?, &mut record[to..to + int.bytes]);
        }
        let mut rest = &row[self.fixed_end..];
        for step in &program.variable {
            if step.null.is_some_and(|(at, bit)| row[at] & bit != 0) {
                if step.wanted {
                    step.slot.blank(record);
                }
                continue;
            }
            let len = varint::take(&mut rest).ok_or(Garbled)? as usize;
            let (value, after) = rest.split_at_checked(len).ok_or(Garbled)?;
            rest = after;
            if step.wanted {
                if !step.slot.fits(value) {
                    return Err(Garbled);
                }
                step.slot.put(record, value);
            }
        }
        Ok(())
    }

    /// Finds where a row's columns are, for [`RowCodec::value`].
    pub(crate) fn parse(&self, row: &[u8], key: &[u8], parts: &mut Parts) -> Result<(), Garbled> {
        if row.len() < self.fixed_end || row[0] != ROW_VERSION {
            return Err(Garbled);
        }
        parts.spans.clear();
        let mut rest = &row[self.fixed_end..];
        for &i in &self.variable {
            let null = self.columns[i].slot.null.is_some_and(|(at, bit)| row[1 + at] & bit != 0);
            let len = if null { 0 } else { varint::take(&mut rest).ok_or(Garbled)? as usize };
            let start = row.len() - rest.len();
            rest = rest.get(len..).ok_or(Garbled)?;
            parts.spans.push((start as u32, len as u32));
        }
        parts.from_key.clear();
        parts.from_key.resize(self.key_column_bytes, 0);
        for &i in &self.key_columns {
            let (Place::Key { at, into }, int) = (self.columns[i].place, self.columns[i].key_int) else {
                continue;
            };
            let bytes = key.get(at..at + int.bytes).ok_or(Garbled)?;
            int.copy(bytes, &mut parts.from_key[into..into + int.bytes]);
        }
        Ok(())
    }

    /// A column of a parsed row, in its own form; `None` is NULL.
    pub(crate) fn value<'a>(&self, field: usize, row: &'a [u8], parts: &'a Parts) -> Option<&'a [u8]> {
        let column = &self.columns[field];
        match column.place {
            Place::Key { into, .. } => Some(&parts.from_key[into..into + column.key_int.bytes]),
            Place::Absent => None,
            _ if column.slot.null.is_some_and(|(at, bit)| row[1 + at] & bit != 0) => None,
            Place::Fixed(at) => match column.slot.form {
                Form::Plain(bytes) => Some(&row[at..at + bytes]),
                _ => None,
            },
            Place::Variable(n) => {
                let (start, len) = parts.spans[n];
                Some(&row[start as usize..(start + len) as usize])
            }
        }
    }

    /// A column of a record, in its own form; `None` is NULL.
    pub(crate) fn record_value<'a>(
        &self,
        field: usize,
        record: &Record<'a>,
    ) -> Result<Option<&'a [u8]>, Garbled> {
        let column = &self.columns[field];
        if column.slot.is_null(record.image) {
            return Ok(None);
        }
        match column.slot.form {
            Form::Blob(_) => Ok(Some(record.blobs.get(column.blob).ok_or(Garbled)?)),
            _ => column.slot.get(record.image).map(Some),
        }
    }

    /// Appends the row for a whole record.
    pub(crate) fn encode(&self, record: &Record, out: &mut Vec<u8>) -> Result<(), Garbled> {
        self.encode_with(|i| self.record_value(i, record), out)
    }

    /// Appends the row that an update makes: columns that differ between the images come from the new record, the others
    /// from the stored row. Sets `changed` for each column.
    pub(crate) fn encode_update(
        &self,
        old: &[u8],
        new: &Record,
        stored: (&[u8], &Parts),
        changed: &mut Vec<bool>,
        out: &mut Vec<u8>,
    ) -> Result<(), Garbled> {
        changed.clear();
        changed.extend(self.columns.iter().map(|column| {
            column.place != Place::Absent && (column.computed || column.slot.differs(old, new.image))
        }));
        self.encode_with(
            |i| if changed[i] { self.record_value(i, new) } else { Ok(self.value(i, stored.0, stored.1)) },
            out,
        )
    }

    fn encode_with<'a>(
        &self,
        value: impl Fn(usize) -> Result<Option<&'a [u8]>, Garbled>,
        out: &mut Vec<u8>,
    ) -> Result<(), Garbled> {
        let start = out.len();
        out.push(ROW_VERSION);
        out.resize(start + self.fixed_end, 0);
        for &i in &self.fixed {
            let (column, Place::Fixed(at)) = (&self.columns[i], self.columns[i].place) else { continue };
            match value(i)? {
                Some(bytes) => out[start + at..start + at + bytes.len()].copy_from_slice(bytes),
                None => mark_null(&mut out[start..], column),
            }
        }
        for &i in &self.variable {
            match value(i)? {
                Some(bytes) => {
                    varint::put(bytes.len() as u64, out);
                    out.extend_from_slice(bytes);
                }
                None => mark_null(&mut out[start..], &self.columns[i]),
            }
        }
        Ok(())
    }
}

fn mark_null(row: &mut [u8], column: &Column) {
    if let Some((at, bit)) = column.slot.null {
        row[1 + at] |= bit;
    }
}
