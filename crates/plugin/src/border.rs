//! The types of `mariadb/cistern_ffi.h`, field for field, and their translation into those of `tables`.
//!
//! * Every pointer that comes in is valid for the length of the call, as the header promises; nothing here keeps one,
//!   but for collations, which live as long as the server.

use std::ffi::{c_char, c_int, c_void};

use tables::{
    BulkFacts, CollationId, Collations, Descriptor, Field, Index, IndexPart, Kind, LEVELS_MAX, RangeEnd,
    ReadFlag, Storage, TextOrder,
};

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Text {
    start: *const c_char,
    length: usize,
}

impl Text {
    /// # Safety
    /// `start` points to `length` readable bytes for as long as the result is used.
    pub unsafe fn to_text(self) -> String {
        // SAFETY: the caller's promise.
        String::from_utf8_lossy(unsafe { slice(self.start.cast(), self.length) }).into_owned()
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Bytes {
    start: *const u8,
    length: usize,
}

impl Bytes {
    /// # Safety
    /// `start` points to `length` readable bytes for as long as the result is used.
    pub unsafe fn as_slice<'a>(&self) -> &'a [u8] {
        // SAFETY: the caller's promise.
        unsafe { slice(self.start, self.length) }
    }
}

/// # Safety
/// `start` is null, or points to `length` readable bytes that nobody changes while the result lives.
pub unsafe fn slice<'a>(start: *const u8, length: usize) -> &'a [u8] {
    if length == 0 || start.is_null() {
        return &[];
    }
    // SAFETY: not null, and the caller's promise.
    unsafe { std::slice::from_raw_parts(start, length) }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct FfiField {
    collation: *const c_void,
    offset: u32,
    pack_length: u32,
    null_offset: u32,
    null_mask: u8,
    kind: u8,
    length_bytes: u8,
    storage: u8,
    collation_facts: u8,
    char_bytes_max: u8,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct FfiPart {
    field: u32,
    length: u32,
    store_length: u32,
    weight_bytes_max: u32,
    descending: u8,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct FfiIndex {
    parts: *const FfiPart,
    parts_count: u32,
    extension_count: u32,
    unique: u8,
}

#[repr(C)]
pub struct FfiDescriptor {
    record_length: u32,
    null_bytes: u32,
    fields_count: u32,
    indexes_count: u32,
    fields: *const FfiField,
    indexes: *const FfiIndex,
    primary: i32,
    auto_increment: i32,
}

#[repr(C)]
pub struct FfiRangeEnd {
    tuple: Bytes,
    flag: u32,
}

impl FfiRangeEnd {
    /// # Safety
    /// The tuple is valid for as long as the result is used.
    pub unsafe fn to_end<'a>(&self) -> Option<RangeEnd<'a>> {
        // SAFETY: the caller's promise.
        Some(RangeEnd { tuple: unsafe { self.tuple.as_slice() }, flag: ReadFlag::from_server(self.flag)? })
    }
}

#[repr(C)]
pub struct FfiBulkFacts {
    rows: u64,
    copies: u8,
    gathers: u8,
    autocommit: u8,
    refuses_duplicates: u8,
    looks_back: u8,
}

impl FfiBulkFacts {
    pub fn to_facts(&self) -> BulkFacts {
        BulkFacts {
            rows: self.rows,
            copies: self.copies != 0,
            gathers: self.gathers != 0,
            autocommit: self.autocommit != 0,
            refuses_duplicates: self.refuses_duplicates != 0,
            looks_back: self.looks_back != 0,
        }
    }
}

pub type WeightsCall = unsafe extern "C" fn(*const c_void, u32, *const u8, usize, *mut u8, usize) -> isize;
pub type PrefixCall = unsafe extern "C" fn(*const c_void, *const u8, usize, usize) -> usize;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Callbacks {
    pub weights: WeightsCall,
    pub prefix_bytes: PrefixCall,
    pub killed: unsafe extern "C" fn(*mut c_void) -> c_int,
    pub meets_condition: unsafe extern "C" fn(*mut c_void, *mut u8) -> c_int,
    pub progress: unsafe extern "C" fn(*mut c_void, u64, u64),
    pub log: unsafe extern "C" fn(c_int, *const c_char, usize),
}

#[repr(C)]
pub struct Config {
    pub bucket: Text,
    pub branch: Text,
    pub data_dir: Text,
    pub server_dir: Text,
    pub temporary_dir: Text,
    pub memory_bytes: u64,
    pub memtable_bytes: u64,
    pub disk_cache_bytes: u64,
    pub unuploaded_bytes_max: u64,
    pub transaction_bytes_max: u64,
    pub wal_upload_interval_ms: u64,
}

pub type NameSink = unsafe extern "C" fn(*mut c_void, *const c_char, usize);
pub type CounterSink = unsafe extern "C" fn(*mut c_void, *const c_char, usize, u64);

const BINARY: u8 = 1;
const NO_PAD: u8 = 2;
const BYTE_COMPARABLE: u8 = 4;
const ONE_LEVEL: u8 = 8;
const LEVELS_APART: u8 = 16;

impl FfiDescriptor {
    /// # Safety
    /// All pointers in it are valid during the call.
    pub unsafe fn to_descriptor(&self, collations: &dyn Collations) -> Descriptor {
        // SAFETY: the caller's promise.
        let (fields, indexes) =
            unsafe { (many(self.fields, self.fields_count), many(self.indexes, self.indexes_count)) };
        Descriptor {
            record_length: self.record_length,
            null_bytes: self.null_bytes,
            fields: fields.iter().map(|field| field.to_field(collations)).collect(),
            // SAFETY: the caller's promise.
            indexes: indexes.iter().map(|index| unsafe { index.to_index() }).collect(),
            primary: usize::try_from(self.primary).ok(),
            auto_increment: usize::try_from(self.auto_increment).ok(),
        }
    }
}

/// # Safety
/// `start` points to `count` values that nobody changes while the result lives.
unsafe fn many<'a, T>(start: *const T, count: u32) -> &'a [T] {
    if count == 0 || start.is_null() {
        return &[];
    }
    // SAFETY: not null, and the caller's promise.
    unsafe { std::slice::from_raw_parts(start, count as usize) }
}

impl FfiField {
    fn to_field(self, collations: &dyn Collations) -> Field {
        let kind = kind_of(self.kind);
        let collation = CollationId(self.collation as usize);
        let text = matches!(kind, Kind::Char | Kind::VarChar | Kind::Blob);
        Field {
            offset: self.offset,
            pack_length: self.pack_length,
            null: (self.null_mask != 0).then_some((self.null_offset, self.null_mask)),
            kind,
            length_bytes: self.length_bytes,
            order: if text {
                text_order(self.collation_facts, kind, |level| space_weight(collation, level, collations))
            } else {
                TextOrder::Bytes
            },
            collation,
            char_bytes_max: self.char_bytes_max.max(1),
            storage: match self.storage {
                0 => Storage::Stored,
                1 => Storage::Computed,
                _ => Storage::Absent,
            },
        }
    }
}

fn kind_of(number: u8) -> Kind {
    match number {
        0 => Kind::Int,
        1 => Kind::UInt,
        2 => Kind::Float,
        3 => Kind::Double,
        5 => Kind::Char,
        6 => Kind::VarChar,
        7 => Kind::Blob,
        _ => Kind::Fixed,
    }
}

/// How values compare, from what the shim knows of the collation. Stored keys depend on it: never change an answer.
fn text_order(facts: u8, kind: Kind, space: impl Fn(Option<u32>) -> Vec<u8>) -> TextOrder {
    let is = |fact: u8| facts & fact != 0;
    // A CHAR comes with the spaces of its record, so padding never matters but for values that end in less than a space.
    let no_pad = is(NO_PAD) && kind != Kind::Char;
    if is(BINARY) {
        TextOrder::Bytes
    } else if is(BYTE_COMPARABLE) {
        if no_pad { TextOrder::Bytes } else { TextOrder::BytesSpacePadded }
    } else if no_pad {
        TextOrder::Weights
    } else if is(LEVELS_APART) {
        let weights = (0..LEVELS_MAX as u32).map(|level| space(Some(level)));
        let spaces: Vec<[u8; 2]> = weights.map(|weight| weight.try_into().unwrap_or_default()).collect();
        TextOrder::LevelsSpacePadded { spaces: spaces.try_into().expect("as many as there are levels") }
    } else if !is(ONE_LEVEL) {
        TextOrder::WeightsWithoutSpaces
    } else {
        let weight = space(None);
        if weight.len() > 4 || weight.iter().all(|&byte| byte == 0) {
            return TextOrder::WeightsWithoutSpaces;
        }
        let mut space = [0; 4];
        space[..weight.len()].copy_from_slice(&weight);
        TextOrder::WeightsSpacePadded { space, space_bytes: weight.len() as u8 }
    }
}

/// In one level, or in all of them.
fn space_weight(collation: CollationId, level: Option<u32>, collations: &dyn Collations) -> Vec<u8> {
    let (space, mut weight) = (collations_space(collation, collations), Vec::new());
    match level {
        None => collations.weights(collation, &space, &mut weight),
        Some(level) => collations.level_weights(collation, level, &space, &mut weight),
    }
    weight
}

/// One space as the collation's character set writes it: four bytes in UTF-32, two in UCS-2 and UTF-16, in either order.
fn collations_space(collation: CollationId, collations: &dyn Collations) -> Vec<u8> {
    let is_character = |bytes: &[u8]| collations.prefix_bytes(collation, bytes, 1) == bytes.len();
    let weight = |bytes: &[u8]| {
        let mut weight = Vec::new();
        collations.weights(collation, bytes, &mut weight);
        weight
    };
    // The longest first: a single byte may pass for a character, a malformed one, where characters have two.
    if is_character(&[0, 0, 0, b' ']) {
        return vec![0, 0, 0, b' '];
    }
    // In the wrong order it is U+2000, whose weight is that of a space or greater.
    let wide = [[0, b' '], [b' ', 0]].into_iter().filter(|space| is_character(space));
    match wide.min_by_key(|space| weight(space)) {
        Some(space) => space.to_vec(),
        None => b" ".to_vec(),
    }
}

impl FfiIndex {
    /// # Safety
    /// `parts` points to all parts and extensions.
    unsafe fn to_index(self) -> Index {
        // SAFETY: the caller's promise.
        let all = unsafe { many(self.parts, self.parts_count + self.extension_count) };
        let (parts, extension) = all.split_at(self.parts_count as usize);
        let translate = |parts: &[FfiPart]| parts.iter().map(|part| part.to_part()).collect();
        Index { parts: translate(parts), extension: translate(extension), unique: self.unique != 0 }
    }
}

impl FfiPart {
    fn to_part(self) -> IndexPart {
        IndexPart {
            field: self.field as usize,
            length: self.length,
            store_length: self.store_length,
            descending: self.descending != 0,
            weight_bytes_max: self.weight_bytes_max,
        }
    }
}

/// Where the BLOB columns are in a record.
pub struct Blobs {
    columns: Vec<BlobColumn>,
}

struct BlobColumn {
    offset: usize,
    length_bytes: usize,
    null: Option<(u32, u8)>,
}

impl Blobs {
    pub fn of(descriptor: &Descriptor) -> Self {
        let columns = descriptor.fields.iter().filter(|field| field.kind == Kind::Blob);
        Self {
            columns: columns
                .map(|field| BlobColumn {
                    offset: field.offset as usize,
                    length_bytes: usize::from(field.length_bytes),
                    null: field.null,
                })
                .collect(),
        }
    }

    /// The bytes of each BLOB of `image`. One that is NULL is empty, and so is one whose length and pointer are those in
    /// `old`: it was not changed, and may never have been read, in which case its pointer points nowhere.
    ///
    /// # Safety
    /// `image` is a record whose other BLOBs point to readable bytes for as long as the result is used.
    pub unsafe fn of_record<'a>(&self, image: &[u8], old: Option<&[u8]>) -> Vec<&'a [u8]> {
        let one = |column: &BlobColumn| {
            let end = column.offset + column.length_bytes + size_of::<usize>();
            let stored = &image[column.offset..end];
            let is_null = column.null.is_some_and(|(at, mask)| image[at as usize] & mask != 0);
            if is_null || old.is_some_and(|old| &old[column.offset..end] == stored) {
                return &[][..];
            }
            let (length, pointer) = stored.split_at(column.length_bytes);
            let length = length.iter().rev().fold(0_usize, |sum, &byte| sum << 8 | usize::from(byte));
            let pointer = usize::from_ne_bytes(pointer.try_into().expect("split at the pointer's width"));
            // SAFETY: the caller's promise.
            unsafe { slice(pointer as *const u8, length) }
        };
        self.columns.iter().map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collation_is_kept_in_the_order_that_its_facts_call_for() {
        let space = |_: Option<u32>| vec![0x20];
        assert_eq!(text_order(BINARY | BYTE_COMPARABLE, Kind::VarChar, space), TextOrder::Bytes);
        assert_eq!(text_order(BYTE_COMPARABLE, Kind::VarChar, space), TextOrder::BytesSpacePadded);
        assert_eq!(text_order(BYTE_COMPARABLE | NO_PAD, Kind::VarChar, space), TextOrder::Bytes);
        assert_eq!(text_order(BYTE_COMPARABLE | NO_PAD, Kind::Char, space), TextOrder::BytesSpacePadded);
        assert_eq!(text_order(ONE_LEVEL | NO_PAD, Kind::Blob, space), TextOrder::Weights);
        assert_eq!(text_order(0, Kind::VarChar, space), TextOrder::WeightsWithoutSpaces);
        assert_eq!(text_order(ONE_LEVEL, Kind::VarChar, |_| vec![]), TextOrder::WeightsWithoutSpaces);
        let level = |level: Option<u32>| {
            [vec![2, 9], vec![], vec![0, 2], vec![]][level.unwrap_or(3) as usize].clone()
        };
        assert_eq!(text_order(LEVELS_APART | NO_PAD, Kind::VarChar, level), TextOrder::Weights);
        for facts in [LEVELS_APART, LEVELS_APART | NO_PAD] {
            assert_eq!(
                text_order(facts, Kind::Char, level),
                TextOrder::LevelsSpacePadded { spaces: [[2, 9], [0, 0], [0, 2], [0, 0]] }
            );
        }
        assert_eq!(
            text_order(ONE_LEVEL, Kind::VarChar, |_| vec![0, 0x20]),
            TextOrder::WeightsSpacePadded { space: [0, 0x20, 0, 0], space_bytes: 2 }
        );
    }

    #[test]
    fn a_blob_that_was_not_touched_is_not_followed() {
        let blobs = Blobs { columns: vec![BlobColumn { offset: 1, length_bytes: 2, null: Some((0, 1)) }] };
        let text = b"hello";
        let mut record = vec![0_u8; 11];
        record[1..3].copy_from_slice(&[5, 0]);
        record[3..11].copy_from_slice(&(text.as_ptr() as usize).to_ne_bytes());
        // SAFETY: the pointer is that of `text`.
        unsafe {
            assert_eq!(blobs.of_record(&record, None), [&text[..]]);
            assert_eq!(blobs.of_record(&record, Some(&record)), [&[] as &[u8]]);
            record[0] = 1;
            assert_eq!(blobs.of_record(&record, None), [&[] as &[u8]]);
        }
    }
}
