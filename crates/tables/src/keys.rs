//! Index keys: bytes that sort as the values do. The byte format is `docs/formats/keys.md`, version 1.
//!
//! * Comparing two encodings byte by byte gives the order of the values, NULL first; a descending part is inverted.
//! * No encoding of a part is a proper prefix of another of the same part, so all keys that share their first n parts share
//!   exactly the bytes of those parts, and ranges are plain byte ranges.
//! * Equal values (in the column's collation) have equal encodings; what that loses is kept beside the key as *restore* bytes.

use crate::descriptor::{CollationId, Collations, Descriptor, Field, IndexPart, Kind, LEVELS_MAX, TextOrder};
use crate::rows::{KeyInt, Slot};
use crate::varint;

/// Byte in front of a value that can be NULL.
const NULL: u8 = 0;
const PRESENT: u8 = 1;
/// What follows a run of spaces: the value ends, or goes on with something less or greater than a space.
const THEN_LESS: u8 = 1;
const THEN_END: u8 = 2;
const THEN_GREATER: u8 = 3;
const EXTENT_VERSION: u8 = 1;
/// A run count that does not fit a byte follows in two.
const LONG_RUN: u8 = 255;

/// How one part of an index turns values into bytes.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// Number of the column.
    pub(crate) field: usize,
    shape: Shape,
    nullable: bool,
    /// 0xff for a descending part: its bytes are inverted.
    flip: u8,
    /// If only the start of the value counts: characters.
    cut: Option<usize>,
    /// CHAR of a charset whose space is longer than a byte (UCS-2, UTF-16, UTF-32): bytes of the whole column. Its own form has lost bytes
    /// of characters, so it is padded again before it is weighed.
    widen: Option<usize>,
    collation: CollationId,
    tuple: Tuple,
    tuple_bytes: usize,
    /// Where to put the value when it is read back from the key.
    slot: Slot,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    Int(usize),
    UInt(usize),
    Float,
    Double,
    Fixed(usize),
    Bytes,
    SpacedBytes,
    Weights,
    SpacedWeights { space: [u8; 4], unit: usize },
    SpacedLevels { spaces: [[u8; 2]; LEVELS_MAX] },
    StrippedWeights,
}

/// How the server lays the value out in a key tuple, after the null byte.
#[derive(Clone, Copy, Debug)]
enum Tuple {
    Plain(usize),
    SpacePadded(usize),
    Counted,
}

/// Where a part ends in a key: all that is needed to find the next one, or for the engine to group keys by it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Extent {
    nullable: bool,
    flip: u8,
    length: Length,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Length {
    Fixed(usize),
    Escaped,
    Spaced { space: [u8; 4], unit: usize },
    SpacedLevels { spaces: [[u8; 2]; LEVELS_MAX] },
}

/// A key that does not parse.
#[derive(Debug, PartialEq)]
pub(crate) struct Garbled;

impl Part {
    pub(crate) fn new(descriptor: &Descriptor, part: &IndexPart, collations: &dyn Collations) -> Self {
        let field = &descriptor.fields[part.field];
        let length = part.length as usize;
        let chars = length / usize::from(field.char_bytes_max.max(1));
        let shape = match field.kind {
            Kind::Int => Shape::Int(field.pack_length as usize),
            Kind::UInt => Shape::UInt(field.pack_length as usize),
            Kind::Float => Shape::Float,
            Kind::Double => Shape::Double,
            Kind::Fixed => Shape::Fixed(length.min(field.pack_length as usize)),
            Kind::Char | Kind::VarChar | Kind::Blob => match field.order {
                TextOrder::Bytes => Shape::Bytes,
                TextOrder::BytesSpacePadded => Shape::SpacedBytes,
                TextOrder::Weights => Shape::Weights,
                TextOrder::WeightsSpacePadded { space, space_bytes } => {
                    Shape::SpacedWeights { space, unit: usize::from(space_bytes) }
                }
                TextOrder::LevelsSpacePadded { spaces } => Shape::SpacedLevels { spaces },
                TextOrder::WeightsWithoutSpaces => Shape::StrippedWeights,
            },
        };
        let tuple = match field.kind {
            Kind::VarChar | Kind::Blob => Tuple::Counted,
            Kind::Char => Tuple::SpacePadded(length),
            _ => Tuple::Plain(length.min(field.pack_length as usize)),
        };
        Self {
            field: part.field,
            shape,
            nullable: field.null.is_some(),
            flip: if part.descending { 0xff } else { 0 },
            cut: (!is_whole(field, part)).then_some(chars),
            widen: (field.kind == Kind::Char
                && field.char_bytes_max > 1
                && collations.prefix_bytes(field.collation, b"    ", 1) > 1)
                .then_some(field.pack_length as usize),
            collation: field.collation,
            tuple,
            tuple_bytes: part.store_length as usize,
            slot: Slot::new(field),
        }
    }

    /// Bytes of every encoding of this part, if they are always as many.
    pub(crate) fn fixed_len(&self) -> Option<usize> {
        match self.shape {
            _ if self.nullable => None,
            Shape::Int(n) | Shape::UInt(n) | Shape::Fixed(n) => Some(n),
            Shape::Float => Some(4),
            Shape::Double => Some(8),
            _ => None,
        }
    }

    /// Most bytes of an encoding.
    pub(crate) fn max_len(&self, part: &IndexPart) -> usize {
        let text = match self.shape {
            Shape::Bytes | Shape::SpacedBytes => part.length as usize,
            _ => part.weight_bytes_max.max(part.length) as usize,
        };
        let value = match self.shape {
            Shape::Bytes | Shape::Weights | Shape::StrippedWeights => text * 2 + 2,
            // At worst each second unit is a lone space, which takes a marker and a count more.
            Shape::SpacedBytes => text * 2 + 6,
            Shape::SpacedWeights { unit, .. } => text * 2 + unit + 6,
            Shape::SpacedLevels { .. } => text * 2 + LEVELS_MAX * (2 + 6),
            Shape::Int(n) | Shape::UInt(n) | Shape::Fixed(n) => n,
            Shape::Float => 4,
            Shape::Double => 8,
        };
        value + usize::from(self.nullable)
    }

    /// How the key gives back the bytes of a value, all of them and always as many; `None`: it does not.
    pub(crate) fn key_int(&self) -> Option<KeyInt> {
        let (bytes, reversed, sign) = match self.shape {
            Shape::Int(n) => (n, true, 0x80),
            Shape::UInt(n) => (n, true, 0),
            Shape::Fixed(n) => (n, false, 0),
            _ => return None,
        };
        let whole = self.cut.is_none() && !self.nullable;
        whole.then_some(KeyInt { bytes, reversed, sign, flip: self.flip })
    }

    /// Where its value starts in a record.
    pub(crate) fn record_offset(&self) -> usize {
        self.slot.offset()
    }

    /// The value can be had back from the key and its restore bytes.
    pub(crate) fn restorable(&self) -> bool {
        self.cut.is_none() && !matches!(self.slot.form, crate::rows::Form::Blob(_))
    }

    /// The value can be had back from the key alone.
    pub(crate) fn restorable_from_key(&self) -> bool {
        self.restorable() && !self.keeps_restore()
    }

    /// Whether it keeps restore bytes for values that are not NULL.
    fn keeps_restore(&self) -> bool {
        self.restorable()
            && match self.shape {
                Shape::Int(_) | Shape::UInt(_) | Shape::Fixed(_) | Shape::Bytes => false,
                Shape::SpacedBytes => !matches!(self.slot.form, crate::rows::Form::Char(_)),
                _ => true,
            }
    }

    /// Appends the encoding of a value, given in its own form (see [`crate::rows`]); `None` is NULL.
    pub(crate) fn encode(
        &self,
        value: Option<&[u8]>,
        collations: &dyn Collations,
        scratch: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) {
        let start = out.len();
        match value {
            None => out.push(NULL),
            Some(value) => {
                if self.nullable {
                    out.push(PRESENT);
                }
                self.encode_value(value, collations, scratch, out);
            }
        }
        if self.flip != 0 {
            for byte in &mut out[start..] {
                *byte = !*byte;
            }
        }
    }

    fn encode_value(
        &self,
        value: &[u8],
        collations: &dyn Collations,
        scratch: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) {
        let widened;
        let value = match self.widen {
            None => value,
            Some(bytes) => {
                widened = [value, &vec![b' '; bytes.saturating_sub(value.len())]].concat();
                &widened[..]
            }
        };
        match self.shape {
            Shape::Int(n) => {
                let start = out.len();
                out.extend(value[..n].iter().rev());
                out[start] ^= 0x80;
            }
            Shape::UInt(n) => out.extend(value[..n].iter().rev()),
            Shape::Float => out.extend_from_slice(&float_key(value).to_be_bytes()),
            Shape::Double => out.extend_from_slice(&double_key(value).to_be_bytes()),
            Shape::Fixed(n) => out.extend_from_slice(&value[..n]),
            Shape::Bytes => escape_zeros(self.trim(value, collations), out),
            Shape::SpacedBytes => escape_spaces(self.trim(value, collations), b" ", out),
            Shape::Weights => {
                scratch.clear();
                collations.weights(self.collation, self.trim(value, collations), scratch);
                escape_zeros(scratch, out);
            }
            Shape::SpacedWeights { space, unit } => {
                scratch.clear();
                collations.weights(self.collation, self.trim(value, collations), scratch);
                escape_spaces(scratch, &space[..unit], out);
            }
            Shape::SpacedLevels { spaces } => {
                let value = self.trim(value, collations);
                for (level, space) in levels(&spaces) {
                    scratch.clear();
                    collations.level_weights(self.collation, level, value, scratch);
                    escape_spaces(scratch, space, out);
                }
            }
            Shape::StrippedWeights => {
                scratch.clear();
                let value = strip_spaces(self.trim(value, collations));
                collations.weights(self.collation, value, scratch);
                escape_zeros(scratch, out);
            }
        }
    }

    /// The start of the value that counts.
    fn trim<'a>(&self, value: &'a [u8], collations: &dyn Collations) -> &'a [u8] {
        match self.cut {
            None => value,
            // No character is shorter than a byte, so a short value is whole without looking.
            Some(chars) if value.len() <= chars => value,
            Some(chars) => &value[..collations.prefix_bytes(self.collation, value, chars).min(value.len())],
        }
    }

    /// Appends what the key loses of a value that is not NULL.
    pub(crate) fn restore_bytes(&self, value: &[u8], out: &mut Vec<u8>) {
        if !self.keeps_restore() {
            return;
        }
        match self.shape {
            Shape::Float => out.push(u8::from(value[..4] == (-0.0f32).to_ne_bytes())),
            Shape::Double => out.push(u8::from(value[..8] == (-0.0f64).to_ne_bytes())),
            Shape::SpacedBytes => varint::put(trailing_spaces(value) as u64, out),
            _ => {
                varint::put(value.len() as u64, out);
                out.extend_from_slice(value);
            }
        }
    }

    /// Where the next part starts, if this one starts at `at`.
    pub(crate) fn skip(&self, key: &[u8], at: usize) -> Result<usize, Garbled> {
        self.extent().skip(key, at)
    }

    /// Where it ends in a key.
    pub(crate) fn extent(&self) -> Extent {
        let length = match self.shape {
            Shape::Int(n) | Shape::UInt(n) | Shape::Fixed(n) => Length::Fixed(n),
            Shape::Float => Length::Fixed(4),
            Shape::Double => Length::Fixed(8),
            Shape::Bytes | Shape::Weights | Shape::StrippedWeights => Length::Escaped,
            Shape::SpacedBytes => Length::Spaced { space: [b' ', 0, 0, 0], unit: 1 },
            Shape::SpacedWeights { space, unit } => Length::Spaced { space, unit },
            Shape::SpacedLevels { spaces } => Length::SpacedLevels { spaces },
        };
        Extent { nullable: self.nullable, flip: self.flip, length }
    }

    /// Reads the value back into a record: from the key at `at` and from `restore`, which moves on. Returns where the next part
    /// starts. Without a record it only moves on. Only for a [`Part::restorable`] part if there is a record.
    pub(crate) fn decode(
        &self,
        key: &[u8],
        mut at: usize,
        restore: &mut &[u8],
        mut record: Option<&mut [u8]>,
        scratch: &mut Vec<u8>,
    ) -> Result<usize, Garbled> {
        if self.nullable {
            match key.get(at).ok_or(Garbled)? ^ self.flip {
                NULL => {
                    if let Some(record) = record {
                        self.slot.set_null(record);
                    }
                    return Ok(at + 1);
                }
                PRESENT => at += 1,
                _ => return Err(Garbled),
            }
        }
        let flip = self.flip;
        if let (Some(record), Shape::Int(n) | Shape::UInt(n)) = (record.as_deref_mut(), self.shape) {
            let bytes = key.get(at..at + n).filter(|bytes| self.slot.fits(bytes)).ok_or(Garbled)?;
            let sign = if matches!(self.shape, Shape::Int(_)) { 0x80 } else { 0 };
            self.slot.set_from_key(record, bytes, KeyInt { bytes: n, reversed: true, sign, flip });
            return Ok(at + n);
        }
        scratch.clear();
        let end = match self.shape {
            Shape::Int(n) => {
                let bytes = key.get(at..at + n).ok_or(Garbled)?;
                scratch.extend(bytes.iter().rev().map(|byte| byte ^ flip));
                scratch[n - 1] ^= 0x80;
                at + n
            }
            Shape::UInt(n) => {
                let bytes = key.get(at..at + n).ok_or(Garbled)?;
                scratch.extend(bytes.iter().rev().map(|byte| byte ^ flip));
                at + n
            }
            Shape::Fixed(n) => {
                let bytes = key.get(at..at + n).ok_or(Garbled)?;
                scratch.extend(bytes.iter().map(|byte| byte ^ flip));
                at + n
            }
            Shape::Float => {
                let bytes: [u8; 4] = key.get(at..at + 4).ok_or(Garbled)?.try_into().map_err(|_| Garbled)?;
                let ordered = u32::from_be_bytes(bytes.map(|byte| byte ^ flip));
                let bits = if ordered >> 31 == 0 { !ordered } else { ordered ^ (1 << 31) };
                let negative_zero = take(restore, 1)?[0] == 1;
                let bits = if negative_zero { (-0.0f32).to_bits() } else { bits };
                scratch.extend_from_slice(&bits.to_ne_bytes());
                at + 4
            }
            Shape::Double => {
                let bytes: [u8; 8] = key.get(at..at + 8).ok_or(Garbled)?.try_into().map_err(|_| Garbled)?;
                let ordered = u64::from_be_bytes(bytes.map(|byte| byte ^ flip));
                let bits = if ordered >> 63 == 0 { !ordered } else { ordered ^ (1 << 63) };
                let negative_zero = take(restore, 1)?[0] == 1;
                let bits = if negative_zero { (-0.0f64).to_bits() } else { bits };
                scratch.extend_from_slice(&bits.to_ne_bytes());
                at + 8
            }
            Shape::Bytes => {
                walk_zeros(key, at, flip, |bytes| scratch.extend(bytes.iter().map(|b| b ^ flip)))?
            }
            Shape::SpacedBytes => {
                let end =
                    walk_spaces(key, at, flip, b" ", |bytes| scratch.extend(bytes.iter().map(|b| b ^ flip)))?;
                if self.keeps_restore() {
                    let spaces = varint::take(restore).ok_or(Garbled)? as usize;
                    scratch.resize((scratch.len() + spaces).min(1 << 16), b' ');
                }
                end
            }
            Shape::Weights
            | Shape::SpacedWeights { .. }
            | Shape::SpacedLevels { .. }
            | Shape::StrippedWeights => {
                let end = self.extent().skip_value(key, at)?;
                if self.keeps_restore() {
                    let len = varint::take(restore).ok_or(Garbled)? as usize;
                    scratch.extend_from_slice(take(restore, len)?);
                }
                end
            }
        };
        if end > key.len() {
            return Err(Garbled);
        }
        match record {
            Some(record) if self.slot.fits(scratch) => self.slot.set(record, scratch),
            Some(_) => return Err(Garbled),
            None => {}
        }
        Ok(end)
    }

    /// The value at the start of `tuple` in its own form, which is how [`Part::encode`] wants it.
    pub(crate) fn tuple_value<'a>(&self, tuple: &'a [u8]) -> Result<Option<&'a [u8]>, Garbled> {
        let mut rest = tuple;
        if self.nullable {
            let (null, after) = rest.split_first().ok_or(Garbled)?;
            if *null != 0 {
                return Ok(None);
            }
            rest = after;
        }
        let value = match self.tuple {
            Tuple::Plain(n) => rest.get(..n).ok_or(Garbled)?,
            Tuple::SpacePadded(n) => strip_spaces(rest.get(..n).ok_or(Garbled)?),
            Tuple::Counted => {
                let len = rest.get(..2).ok_or(Garbled)?;
                rest.get(2..2 + usize::from(u16::from_le_bytes([len[0], len[1]]))).ok_or(Garbled)?
            }
        };
        Ok(Some(value))
    }

    /// Bytes in a key tuple.
    pub(crate) fn tuple_bytes(&self) -> usize {
        self.tuple_bytes
    }

    /// The value at the start of `key` as an unsigned number, for an integer part (the auto-increment column).
    pub(crate) fn decode_unsigned(&self, key: &[u8]) -> Option<u64> {
        let mut at = 0;
        if self.nullable {
            if key.first()? ^ self.flip != PRESENT {
                return None;
            }
            at = 1;
        }
        match self.shape {
            Shape::Int(n) | Shape::UInt(n) => {
                let mut value = 0u64;
                for (i, byte) in key.get(at..at + n)?.iter().enumerate() {
                    let sign = if i == 0 && matches!(self.shape, Shape::Int(_)) { 0x80 } else { 0 };
                    value = value << 8 | u64::from(byte ^ self.flip ^ sign);
                }
                let negative = matches!(self.shape, Shape::Int(_)) && key[at] ^ self.flip < 0x80;
                Some(if negative { 0 } else { value })
            }
            Shape::Float => {
                let ordered = u32::from_be_bytes(key.get(at..at + 4)?.try_into().ok()?)
                    ^ (self.flip as u32 * 0x0101_0101);
                Some(if ordered >> 31 == 0 { 0 } else { f32::from_bits(ordered ^ (1 << 31)) as u64 })
            }
            Shape::Double => {
                let ordered = u64::from_be_bytes(key.get(at..at + 8)?.try_into().ok()?)
                    ^ (u64::from(self.flip) * 0x0101_0101_0101_0101);
                Some(if ordered >> 63 == 0 { 0 } else { f64::from_bits(ordered ^ (1 << 63)) as u64 })
            }
            _ => None,
        }
    }

    /// Descending parts hold their greatest value first.
    pub(crate) fn descending(&self) -> bool {
        self.flip != 0
    }

    /// What of it decides the stored bytes, for the layout's fingerprint.
    pub(crate) fn describe(&self) -> String {
        format!("{} {:?} {} {} {:?}", self.field, self.shape, self.nullable, self.flip, self.cut)
    }
}

impl Extent {
    /// Where the part ends that starts at `at`. Looks at no byte beyond.
    fn skip(&self, key: &[u8], mut at: usize) -> Result<usize, Garbled> {
        if self.nullable {
            let marker = key.get(at).ok_or(Garbled)? ^ self.flip;
            at += 1;
            match marker {
                NULL => return Ok(at),
                PRESENT => {}
                _ => return Err(Garbled),
            }
        }
        let end = self.skip_value(key, at)?;
        if end > key.len() { Err(Garbled) } else { Ok(end) }
    }

    /// The same for a value that is not NULL, behind its marker. May be beyond the end of the key.
    fn skip_value(&self, key: &[u8], at: usize) -> Result<usize, Garbled> {
        Ok(match self.length {
            Length::Fixed(n) => at + n,
            Length::Escaped => walk_zeros(key, at, self.flip, |_| ())?,
            Length::Spaced { space, unit } => walk_spaces(key, at, self.flip, &space[..unit], |_| ())?,
            Length::SpacedLevels { spaces } => levels(&spaces)
                .try_fold(at, |at, (_, space)| walk_spaces(key, at, self.flip, space, |_| ()))?,
        })
    }

    /// The stored form (`docs/formats/catalogue.md`).
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (tag, argument) = match &self.length {
            Length::Fixed(n) => {
                let mut bytes = Vec::new();
                varint::put(*n as u64, &mut bytes);
                (0, bytes)
            }
            Length::Escaped => (1, Vec::new()),
            Length::Spaced { space, unit } => (2, space[..*unit].to_vec()),
            Length::SpacedLevels { spaces } => (3, levels(spaces).flat_map(|(_, space)| *space).collect()),
        };
        let flags = u8::from(self.nullable) | u8::from(self.flip != 0) << 1;
        [&[EXTENT_VERSION, flags, tag], &argument[..]].concat()
    }

    /// One of another version or a garbled one is none: it can be had from the table again.
    pub(crate) fn decode(stored: &[u8]) -> Option<Self> {
        let ([EXTENT_VERSION, flags @ 0..4, tag], mut argument) = stored.split_first_chunk()? else {
            return None;
        };
        let length = match (tag, argument.len()) {
            (0, _) => Length::Fixed(varint::take(&mut argument).filter(|_| argument.is_empty())? as usize),
            (1, 0) => Length::Escaped,
            (2, unit @ 1..=4) => {
                let mut space = [0; 4];
                space[..unit].copy_from_slice(argument);
                Length::Spaced { space, unit }
            }
            (3, 2 | 4 | 6 | 8) => {
                let mut spaces = [[0; 2]; LEVELS_MAX];
                for (to, from) in spaces.iter_mut().zip(argument.chunks_exact(2)) {
                    to.copy_from_slice(from);
                }
                Length::SpacedLevels { spaces }
            }
            _ => return None,
        };
        Some(Self { nullable: flags & 1 != 0, flip: if flags & 2 != 0 { 0xff } else { 0 }, length })
    }
}

impl engine::FirstPart for Extent {
    fn end(&self, key: &[u8]) -> Option<usize> {
        self.skip(key, 0).ok()
    }
}

/// The levels that a collation has, and a space's weight in each.
fn levels(spaces: &[[u8; 2]; LEVELS_MAX]) -> impl Iterator<Item = (u32, &[u8; 2])> {
    (0..).zip(spaces).filter(|(_, space)| **space != [0, 0])
}

/// Whether the part counts all of the column's value.
pub(crate) fn is_whole(field: &Field, part: &IndexPart) -> bool {
    match field.kind {
        Kind::Blob => false,
        Kind::VarChar => part.length >= field.pack_length - u32::from(field.length_bytes),
        _ => part.length >= field.pack_length,
    }
}

/// The least key greater than every key that starts with `prefix`, in place; false if there is none.
pub(crate) fn successor(prefix: &mut Vec<u8>) -> bool {
    while let Some(last) = prefix.last_mut() {
        if *last < 0xff {
            *last += 1;
            return true;
        }
        prefix.pop();
    }
    false
}

/// Without the 0x20 bytes at its end.
pub(crate) fn strip_spaces(text: &[u8]) -> &[u8] {
    &text[..text.len() - trailing_spaces(text)]
}

fn trailing_spaces(text: &[u8]) -> usize {
    // A CHAR(120) of utf8mb4 comes with hundreds of them.
    let mut end = text.len();
    while let Some(start) = end.checked_sub(16)
        && text[start..end] == [b' '; 16]
    {
        end = start;
    }
    while end > 0 && text[end - 1] == b' ' {
        end -= 1;
    }
    text.len() - end
}

fn take<'a>(from: &mut &'a [u8], n: usize) -> Result<&'a [u8], Garbled> {
    let (head, tail) = from.split_at_checked(n).ok_or(Garbled)?;
    *from = tail;
    Ok(head)
}

/// Both zeros are one value; negative numbers sort by inverted magnitude.
fn float_key(native: &[u8]) -> u32 {
    let value = f32::from_ne_bytes([native[0], native[1], native[2], native[3]]);
    let bits = if value == 0.0 { 0 } else { value.to_bits() };
    if bits >> 31 == 0 { bits ^ (1 << 31) } else { !bits }
}

fn double_key(native: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&native[..8]);
    let value = f64::from_ne_bytes(bytes);
    let bits = if value == 0.0 { 0 } else { value.to_bits() };
    if bits >> 63 == 0 { bits ^ (1 << 63) } else { !bits }
}

/// `00` becomes `00 FF`; `00 00` ends, so that a shorter value sorts first.
fn escape_zeros(mut value: &[u8], out: &mut Vec<u8>) {
    while let Some(zero) = value.iter().position(|byte| *byte == 0) {
        out.extend_from_slice(&value[..=zero]);
        out.push(0xff);
        value = &value[zero + 1..];
    }
    out.extend_from_slice(value);
    out.extend_from_slice(&[0, 0]);
}

fn walk_zeros(key: &[u8], start: usize, flip: u8, mut chunk: impl FnMut(&[u8])) -> Result<usize, Garbled> {
    let mut at = start;
    loop {
        let zero = at + key.get(at..).ok_or(Garbled)?.iter().position(|byte| *byte == flip).ok_or(Garbled)?;
        match key.get(zero + 1).ok_or(Garbled)? ^ flip {
            0 => {
                chunk(&key[at..zero]);
                return Ok(zero + 2);
            }
            0xff => chunk(&key[at..=zero]),
            _ => return Err(Garbled),
        }
        at = zero + 2;
    }
}

/// Makes values compare as if endless spaces followed. Units other than the space stay as they are. A run of spaces becomes one space,
/// what follows it (less than a space, the end, greater), and how long it is: before something less a longer run
/// sorts later, before something greater it sorts earlier. Spaces at the end vanish.
fn escape_spaces(value: &[u8], space: &[u8], out: &mut Vec<u8>) {
    let unit = space.len();
    let mut run = 0usize;
    for chunk in value.chunks(unit) {
        if chunk == space {
            run += 1;
            continue;
        }
        if run > 0 {
            put_run(run, chunk < space, space, out);
            run = 0;
        }
        out.extend_from_slice(chunk);
        // Weights come in whole units; should a collation ever break that, the key must still parse.
        out.resize(out.len() + unit - chunk.len(), 0);
    }
    out.extend_from_slice(space);
    out.push(THEN_END);
}

fn put_run(run: usize, then_less: bool, space: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(space);
    out.push(if then_less { THEN_LESS } else { THEN_GREATER });
    let start = out.len();
    if run < usize::from(LONG_RUN) {
        out.push(run as u8);
    } else {
        out.push(LONG_RUN);
        out.extend_from_slice(&u32::try_from(run).unwrap_or(u32::MAX).to_be_bytes());
    }
    if !then_less {
        for byte in &mut out[start..] {
            *byte = !*byte;
        }
    }
}

/// Calls `chunk` with the value's bytes, still flipped.
fn walk_spaces(
    key: &[u8],
    start: usize,
    flip: u8,
    space: &[u8],
    mut chunk: impl FnMut(&[u8]),
) -> Result<usize, Garbled> {
    let unit = space.len();
    let mut at = start;
    loop {
        let bytes = key.get(at..at + unit).ok_or(Garbled)?;
        at += unit;
        if bytes.iter().zip(space).any(|(byte, space)| byte ^ flip != *space) {
            chunk(bytes);
            continue;
        }
        let inverted = match key.get(at).ok_or(Garbled)? ^ flip {
            THEN_END => return Ok(at + 1),
            THEN_LESS => flip,
            THEN_GREATER => !flip,
            _ => return Err(Garbled),
        };
        at += 1;
        let mut run = u32::from(key.get(at).ok_or(Garbled)? ^ inverted);
        at += 1;
        if run == u32::from(LONG_RUN) {
            let long = key.get(at..at + 4).ok_or(Garbled)?;
            run = long.iter().fold(0, |run, byte| run << 8 | u32::from(byte ^ inverted));
            at += 4;
        }
        if run as usize > key.len().max(1 << 16) {
            return Err(Garbled);
        }
        for _ in 0..run {
            chunk(bytes);
        }
    }
}

#[cfg(test)]
mod tests;
