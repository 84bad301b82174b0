//! The shape of a table's records and keys, as the server lays them out in memory.
//!
//! Filled once when the server opens a table; everything else in this crate is driven by it.

use crate::{Error, Result};

/// The caller's name for a collation (a pointer to the server's CHARSET_INFO, say). Never stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CollationId(pub usize);

/// What the server knows about text. Called from any thread, often: no lock, no allocation beyond `out`.
pub trait Collations: Send + Sync + 'static {
    /// Appends to `out` the weights of `text`, all of them, without padding (`strnxfrm` with flags 0, and `nweights`
    /// and room large enough that nothing is cut: expansions make more weights than characters).
    fn weights(&self, collation: CollationId, text: &[u8], out: &mut Vec<u8>);
    /// The same of one level alone (`MY_STRXFRM_LEVEL1 << level`); nothing if the collation has no such level. Only asked where
    /// levels can be had apart: [`TextOrder::LevelsSpacePadded`].
    fn level_weights(&self, collation: CollationId, level: u32, text: &[u8], out: &mut Vec<u8>);
    /// How many bytes of `text` its first `chars` characters take (`charpos`, at most the length of `text`).
    fn prefix_bytes(&self, collation: CollationId, text: &[u8], chars: usize) -> usize;
}

/// How two values of a text column compare. The order of stored keys follows from it, so a column keeps it for life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextOrder {
    /// Bytes, a shorter value before a longer one: `my_charset_bin`, and `*_nopad_bin` of byte-comparable charsets
    /// (not for CHAR, see `SpacePadded`).
    Bytes,
    /// Bytes, compared as if both were followed by spaces without end: `latin1_bin`, `ascii_bin`, `utf8mb3_bin`,
    /// `utf8mb4_bin`; also CHAR columns of the `nopad_bin` kind, because the record pads them with spaces.
    BytesSpacePadded,
    /// Weights of the collation; a shorter value sorts before a longer one (NO PAD).
    Weights,
    /// Weights of the collation, compared as if both values were followed by spaces without end. `space` holds the weight
    /// of one space (`strnxfrm(" ")`), `space_bytes` (1–4) its length, which is also the unit of comparison. CHAR
    /// columns of NO PAD collations too.
    WeightsSpacePadded {
        /// The weight of a space, left-aligned.
        space: [u8; 4],
        /// How many bytes of `space` count.
        space_bytes: u8,
    },
    /// Several levels of the UCA, each compared as if both values were followed by spaces without end, the first that differs
    /// decides: `uca1400_as_cs`. CHAR columns of NO PAD collations too; others of those are [`TextOrder::Weights`], because all levels'
    /// weights in a row compare as the levels do: a weight of a later level is less than any of an earlier one.
    LevelsSpacePadded {
        /// The weight of a space in each level; zeros where the collation does without the level.
        spaces: [[u8; 2]; LEVELS_MAX],
    },
    /// Weights of the value without the spaces at its end, a shorter one first: the two Czech collations of several passes.
    WeightsWithoutSpaces,
}

/// Levels that a collation of [`TextOrder::LevelsSpacePadded`] may have.
pub const LEVELS_MAX: usize = 4;

/// How a column's bytes in the record are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Little-endian two's complement of `pack_length` bytes: TINYINT–BIGINT, old TIME (3 bytes).
    Int,
    /// Little-endian unsigned: unsigned integers, YEAR, ENUM, SET, DATE and NEWDATE (3 bytes), old DATETIME (8) and
    /// TIMESTAMP (4).
    UInt,
    /// 4 bytes of native FLOAT.
    Float,
    /// 8 bytes of native DOUBLE.
    Double,
    /// Bytes that `memcmp` orders: DECIMAL (new), TIME2/DATETIME2/TIMESTAMP2 and the "hires" temporals, BIT kept as bytes,
    /// UUID, INET4/6, BINARY(n), and everything not named elsewhere.
    Fixed,
    /// CHAR(n), padded with spaces (0x20 bytes, whatever the charset) to `pack_length` in the record.
    Char,
    /// VARCHAR, VARBINARY: `length_bytes` (1 or 2) of little-endian length, then the bytes.
    VarChar,
    /// BLOB, TEXT, JSON, GEOMETRY: `length_bytes` (1–4) of little-endian length, then a pointer of 8 bytes.
    Blob,
}

/// Where a column's value lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In the row.
    Stored,
    /// A virtual column that an index uses: kept in the row, and taken from the new record by every update.
    Computed,
    /// A virtual column that no index uses: not kept.
    Absent,
}

/// A column.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Of its first byte in the record.
    pub offset: u32,
    /// Its bytes in the record: VARCHAR with its length bytes, BLOB with its pointer.
    pub pack_length: u32,
    /// If it can be NULL: offset of the byte and the bit that says so. Lies in the first `null_bytes` of the record.
    pub null: Option<(u32, u8)>,
    /// How its bytes are read.
    pub kind: Kind,
    /// For VARCHAR and BLOB.
    pub length_bytes: u8,
    /// For CHAR, VARCHAR and BLOB.
    pub order: TextOrder,
    /// For CHAR, VARCHAR and BLOB.
    pub collation: CollationId,
    /// Most bytes a character takes (`mbmaxlen`), 1 for binary.
    pub char_bytes_max: u8,
    /// Where its value lives.
    pub storage: Storage,
}

/// A column's share in an index (KEY_PART_INFO).
#[derive(Clone, Copy, Debug)]
pub struct IndexPart {
    /// Number of the column.
    pub field: usize,
    /// `KEY_PART_INFO::length`: bytes of the value that count.
    pub length: u32,
    /// `KEY_PART_INFO::store_length`: its bytes in a key tuple, null byte and length bytes included.
    pub store_length: u32,
    /// HA_REVERSE_SORT.
    pub descending: bool,
    /// Most bytes of weights that `length` bytes of text can make (`strnxfrmlen(length)`). 0 for other kinds.
    pub weight_bytes_max: u32,
}

/// An index (KEY).
#[derive(Clone, Debug)]
pub struct Index {
    /// The user's parts (`user_defined_key_parts`), in order.
    pub parts: Vec<IndexPart>,
    /// The parts that the server adds from the primary key (`ext_key_parts` beyond the user's), in order; may be empty.
    pub extension: Vec<IndexPart>,
    /// HA_NOSAME.
    pub unique: bool,
}

/// A table's shape. Two descriptors made from the same frm image are equal but for collation ids.
#[derive(Clone, Debug)]
pub struct Descriptor {
    /// `TABLE_SHARE::reclength`.
    pub record_length: u32,
    /// `TABLE_SHARE::null_bytes`: the record's first bytes, holding all null bits.
    pub null_bytes: u32,
    /// Columns in order.
    pub fields: Vec<Field>,
    /// Indexes in order; the primary key is among them.
    pub indexes: Vec<Index>,
    /// Which index is the primary key; without one, rows are kept in order of arrival under a hidden number.
    pub primary: Option<usize>,
    /// `found_next_number_field`: the AUTO_INCREMENT column (an integer or a float kind).
    pub auto_increment: Option<usize>,
}

impl Descriptor {
    /// Checks that it makes sense: offsets inside the record, parts name columns, a primary key without NULLs and so on.
    pub fn check(&self) -> Result<()> {
        let ensure = |fine: bool, what| if fine { Ok(()) } else { Err(Error::Malformed(what)) };
        ensure(self.null_bytes <= self.record_length, "descriptor: null bytes beyond the record")?;
        for field in &self.fields {
            let bytes = field.pack_length;
            let inside = field.offset.checked_add(bytes).is_some_and(|end| end <= self.record_length);
            ensure(inside, "descriptor: a column beyond the record")?;
            ensure(
                field.null.is_none_or(|(at, bit)| at < self.null_bytes && bit.is_power_of_two()),
                "descriptor: a null bit outside the null bytes",
            )?;
            let fits = match field.kind {
                Kind::Int | Kind::UInt => (1..=8).contains(&bytes),
                Kind::Float => bytes == 4,
                Kind::Double => bytes == 8,
                Kind::Fixed => true,
                Kind::Char => !matches!(field.order, TextOrder::Bytes | TextOrder::Weights),
                Kind::VarChar => {
                    (1..=2).contains(&field.length_bytes) && u32::from(field.length_bytes) <= bytes
                }
                Kind::Blob => {
                    (1..=4).contains(&field.length_bytes) && u32::from(field.length_bytes) + 8 == bytes
                }
            };
            ensure(fits, "descriptor: a column's length or order does not fit its kind")?;
            if let TextOrder::WeightsSpacePadded { space_bytes, .. } = field.order {
                ensure((1..=4).contains(&space_bytes), "descriptor: the weight of a space")?;
            }
        }
        for index in &self.indexes {
            ensure(!index.parts.is_empty(), "descriptor: an index without parts")?;
            for part in index.parts.iter().chain(&index.extension) {
                let field = self.fields.get(part.field);
                let field = field.ok_or(Error::Malformed("descriptor: an index part without a column"))?;
                ensure(
                    field.storage != Storage::Absent,
                    "descriptor: an index on a column that is not kept",
                )?;
            }
        }
        if let Some(primary) = self.primary {
            let primary = self.indexes.get(primary).ok_or(Error::Malformed("descriptor: the primary key"))?;
            let nullable = primary.parts.iter().any(|part| self.fields[part.field].null.is_some());
            ensure(!nullable, "descriptor: a primary key with NULLs")?;
        }
        ensure(
            self.auto_increment.is_none_or(|field| field < self.fields.len()),
            "descriptor: the auto-increment column",
        )
    }
}
