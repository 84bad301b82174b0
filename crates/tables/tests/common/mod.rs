//! A stand-in for the server: lays out records and key tuples as it does, and compares values as it would.

#![allow(dead_code, reason = "each test file uses its share")]
#![allow(clippy::unwrap_used, reason = "a test may fail")]

use std::cmp::Ordering;
use std::sync::Arc;

use engine::{Engine, Parts, Settings, SimDisk, SystemClock};
use tables::{
    CollationId, Collations, Descriptor, Field, Index, IndexPart, Kind, Record, RowCursor, Session, Storage,
    Store, Table, TableImages, TextOrder,
};

/// A value of a column. Text of CHAR columns has no spaces at its end.
#[derive(Clone, Debug, PartialEq)]
pub enum V {
    Null,
    I(i64),
    U(u64),
    F(f32),
    D(f64),
    B(Vec<u8>),
}

pub fn text(text: &str) -> V {
    V::B(text.as_bytes().to_vec())
}

/// Numbers that a seed decides.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1)
    }
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
    pub fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
    pub fn of<'a, T>(&mut self, some: &'a [T]) -> &'a T {
        &some[self.index(some.len())]
    }
    pub fn shuffle<T>(&mut self, some: &mut [T]) {
        (1..some.len()).for_each(|at| some.swap(at, self.index(at + 1)));
    }
    fn letters(&mut self, most: u64) -> Vec<u8> {
        (0..self.below(most + 1)).map(|_| *self.of(b"aAbB z")).collect()
    }
    /// For a column; numbers are less than `spread` away from zero.
    pub fn value(&mut self, column: &Column, spread: u64) -> V {
        if column.nullable && self.one_in(8) {
            return V::Null;
        }
        let near = |dice: &mut Self| dice.below(spread) as i64 - spread as i64 / 2;
        let short = |value: i64| {
            let shift = 64 - 8 * column.bytes;
            value << shift >> shift
        };
        match column.kind {
            Kind::Int => V::I(short(near(self))),
            Kind::UInt => V::U(short(near(self)).unsigned_abs()),
            Kind::Float => V::F(near(self) as f32 / 2.0),
            Kind::Double => V::D(near(self) as f64 / 2.0),
            Kind::Fixed => V::B((0..column.bytes).map(|_| self.below(3) as u8).collect()),
            Kind::Char => {
                let mut text = self.letters(u64::from(column.bytes));
                text.truncate(text.iter().rposition(|byte| *byte != b' ').map_or(0, |last| last + 1));
                V::B(text)
            }
            Kind::VarChar => V::B(self.letters(u64::from(column.bytes) - u64::from(column.length_bytes))),
            Kind::Blob => V::B(self.letters(40)),
        }
    }
}

/// How a text column compares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Text {
    Binary,
    BinaryPadded,
    Caseless,
    CaselessWide,
    CaselessNoPad,
    /// Letters first, then their case.
    TwoLevels,
    CaselessStripped,
    /// UCS-2: the bytes of a character are compared as a number, spaces are `00 20`.
    Wide,
}

impl Text {
    pub const ALL: [Text; 7] = [
        Text::Binary,
        Text::BinaryPadded,
        Text::Caseless,
        Text::CaselessWide,
        Text::CaselessNoPad,
        Text::TwoLevels,
        Text::CaselessStripped,
    ];

    fn order(self) -> TextOrder {
        match self {
            Text::Binary => TextOrder::Bytes,
            Text::BinaryPadded => TextOrder::BytesSpacePadded,
            Text::Caseless => TextOrder::WeightsSpacePadded { space: [b' ', 0, 0, 0], space_bytes: 1 },
            Text::CaselessWide => TextOrder::WeightsSpacePadded { space: [0, b' ', 0, 0], space_bytes: 2 },
            Text::CaselessNoPad => TextOrder::Weights,
            Text::TwoLevels => TextOrder::LevelsSpacePadded { spaces: [[1, b' '], [0, 0], [0, 1], [0, 0]] },
            Text::CaselessStripped => TextOrder::WeightsWithoutSpaces,
            Text::Wide => TextOrder::WeightsSpacePadded { space: [0, b' ', 0, 0], space_bytes: 2 },
        }
    }

    pub fn compare(self, a: &[u8], b: &[u8]) -> Ordering {
        if self == Text::Wide {
            let units = |text: &[u8]| {
                let mut units: Vec<[u8; 2]> = text.chunks_exact(2).map(|unit| [unit[0], unit[1]]).collect();
                units.resize(200, [0, b' ']);
                units
            };
            return units(a).cmp(&units(b));
        }
        let fold = |text: &[u8]| match self {
            Text::Binary | Text::BinaryPadded => text.to_vec(),
            _ => text.to_ascii_uppercase(),
        };
        if self == Text::TwoLevels {
            let levels = |text: &[u8]| {
                let mut text = text.to_vec();
                text.resize(1200, b' ');
                (text.to_ascii_uppercase(), text.iter().map(u8::is_ascii_lowercase).collect::<Vec<_>>())
            };
            return levels(a).cmp(&levels(b));
        }
        let (mut a, mut b) = (fold(a), fold(b));
        if self == Text::CaselessStripped {
            let stripped =
                |text: &[u8]| text.iter().rposition(|byte| *byte != b' ').map_or(0, |last| last + 1);
            a.truncate(stripped(&a));
            b.truncate(stripped(&b));
        } else if !matches!(self, Text::Binary | Text::CaselessNoPad) {
            let longest = a.len().max(b.len());
            a.resize(longest, b' ');
            b.resize(longest, b' ');
        }
        a.cmp(&b)
    }
}

/// One byte for each character, upper and lower case alike; `CollationId(2)` has weights of two bytes.
pub struct Ascii;

impl Collations for Ascii {
    fn weights(&self, collation: CollationId, text: &[u8], out: &mut Vec<u8>) {
        if collation.0 == 3 {
            assert!(text.len().is_multiple_of(2), "half a character: {text:?}");
            return out.extend_from_slice(text);
        }
        for byte in text {
            if collation.0 == 2 {
                out.push(0);
            }
            out.push(byte.to_ascii_uppercase());
        }
    }
    fn level_weights(&self, _: CollationId, level: u32, text: &[u8], out: &mut Vec<u8>) {
        for byte in text {
            match level {
                0 => out.extend([1, byte.to_ascii_uppercase()]),
                2 => out.extend([0, 1 + u8::from(byte.is_ascii_lowercase())]),
                level => panic!("there is no level {level}"),
            }
        }
    }
    fn prefix_bytes(&self, collation: CollationId, text: &[u8], chars: usize) -> usize {
        text.len().min(if collation.0 == 3 { chars * 2 } else { chars })
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Column {
    pub kind: Kind,
    pub bytes: u32,
    pub length_bytes: u8,
    pub nullable: bool,
    pub text: Text,
    pub storage: Storage,
}

fn column(kind: Kind, bytes: u32) -> Column {
    Column { kind, bytes, length_bytes: 0, nullable: false, text: Text::Binary, storage: Storage::Stored }
}
pub fn int(bytes: u32) -> Column {
    column(Kind::Int, bytes)
}
pub fn uint(bytes: u32) -> Column {
    column(Kind::UInt, bytes)
}
pub fn float() -> Column {
    column(Kind::Float, 4)
}
pub fn double() -> Column {
    column(Kind::Double, 8)
}
pub fn fixed(bytes: u32) -> Column {
    column(Kind::Fixed, bytes)
}
pub fn char(bytes: u32, text: Text) -> Column {
    Column { text, ..column(Kind::Char, bytes) }
}
pub fn varchar(bytes: u32, text: Text) -> Column {
    let length_bytes = if bytes < 256 { 1 } else { 2 };
    Column { text, length_bytes, ..column(Kind::VarChar, bytes + u32::from(length_bytes)) }
}
pub fn blob(length_bytes: u8, text: Text) -> Column {
    Column { text, length_bytes, ..column(Kind::Blob, 8 + u32::from(length_bytes)) }
}
impl Column {
    pub fn null(self) -> Self {
        Self { nullable: true, ..self }
    }
    pub fn stored_as(self, storage: Storage) -> Self {
        Self { storage, ..self }
    }
    pub fn compare(&self, a: &V, b: &V) -> Ordering {
        match (a, b) {
            (V::Null, V::Null) => Ordering::Equal,
            (V::Null, _) => Ordering::Less,
            (_, V::Null) => Ordering::Greater,
            (V::I(a), V::I(b)) => a.cmp(b),
            (V::U(a), V::U(b)) => a.cmp(b),
            (V::F(a), V::F(b)) => a.partial_cmp(b).expect("no NaN in SQL"),
            (V::D(a), V::D(b)) => a.partial_cmp(b).expect("no NaN in SQL"),
            (V::B(a), V::B(b)) if self.kind == Kind::Fixed => a.cmp(b),
            (V::B(a), V::B(b)) => self.text.compare(a, b),
            other => panic!("values of two kinds: {other:?}"),
        }
    }
    /// The start of a value that a part of `bytes` sees.
    pub fn cut(&self, value: &V, bytes: Option<u32>) -> V {
        match (value, bytes) {
            (V::B(value), Some(bytes)) => V::B(value[..value.len().min(bytes as usize)].to_vec()),
            _ => value.clone(),
        }
    }
}

/// A part of an index: column, bytes of a prefix, descending.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub field: usize,
    pub prefix: Option<u32>,
    pub descending: bool,
}
pub fn part(field: usize) -> Part {
    Part { field, prefix: None, descending: false }
}
impl Part {
    pub fn desc(self) -> Self {
        Self { descending: true, ..self }
    }
    pub fn prefix(self, bytes: u32) -> Self {
        Self { prefix: Some(bytes), ..self }
    }
}

#[derive(Clone, Debug)]
pub struct Key {
    pub parts: Vec<Part>,
    pub unique: bool,
}
pub fn unique(parts: &[Part]) -> Key {
    Key { parts: parts.to_vec(), unique: true }
}
pub fn plain(parts: &[Part]) -> Key {
    Key { parts: parts.to_vec(), unique: false }
}

/// A table as CREATE TABLE would make it; the first key is the primary key unless `hidden`.
#[derive(Clone, Debug)]
pub struct Shape {
    pub columns: Vec<Column>,
    pub keys: Vec<Key>,
    pub hidden: bool,
    pub auto_increment: Option<usize>,
    /// The server adds the primary key's columns to other keys.
    pub extended: bool,
}

impl Shape {
    pub fn new(columns: &[Column], keys: &[Key]) -> Self {
        Self {
            columns: columns.to_vec(),
            keys: keys.to_vec(),
            hidden: false,
            auto_increment: None,
            extended: true,
        }
    }
    pub fn hidden(columns: &[Column], keys: &[Key]) -> Self {
        Self { hidden: true, ..Self::new(columns, keys) }
    }

    fn null_bytes(&self) -> u32 {
        self.columns.len() as u32 / 8 + 1
    }

    pub fn descriptor(&self) -> Descriptor {
        let mut offset = self.null_bytes();
        let fields: Vec<Field> = self
            .columns
            .iter()
            .enumerate()
            .map(|(i, column)| {
                let bit = i as u32 + 1;
                let field = Field {
                    offset,
                    pack_length: column.bytes,
                    null: column.nullable.then_some((bit / 8, 1 << (bit % 8))),
                    kind: column.kind,
                    length_bytes: column.length_bytes,
                    order: match (column.text.order(), column.kind) {
                        (TextOrder::Bytes, Kind::Char) => TextOrder::BytesSpacePadded,
                        (TextOrder::Weights, Kind::Char) => Text::Caseless.order(),
                        (order, _) => order,
                    },
                    collation: CollationId(match column.text {
                        Text::CaselessWide => 2,
                        Text::Wide => 3,
                        _ => 1,
                    }),
                    char_bytes_max: if column.text == Text::Wide { 2 } else { 1 },
                    storage: column.storage,
                };
                offset += column.bytes;
                field
            })
            .collect();
        let index_part = |part: &Part| {
            let column = &self.columns[part.field];
            let whole = match column.kind {
                Kind::VarChar => column.bytes - u32::from(column.length_bytes),
                Kind::Blob => 3000,
                _ => column.bytes,
            };
            let length = part.prefix.unwrap_or(whole);
            let counted = matches!(column.kind, Kind::VarChar | Kind::Blob);
            IndexPart {
                field: part.field,
                length,
                store_length: length + u32::from(column.nullable) + if counted { 2 } else { 0 },
                descending: part.descending,
                weight_bytes_max: match column.text {
                    Text::CaselessWide => length * 2,
                    Text::TwoLevels => length * 4,
                    _ => length,
                },
            }
        };
        let indexes = self.keys.iter().enumerate().map(|(i, key)| {
            let extends = self.extended && !self.hidden && i > 0;
            let missing =
                self.keys.first().filter(|_| extends).into_iter().flat_map(|primary| &primary.parts);
            let has =
                |part: &&Part| key.parts.iter().any(|own| own.field == part.field && own.prefix.is_none());
            Index {
                parts: key.parts.iter().map(index_part).collect(),
                extension: missing.filter(|part| !has(part)).map(index_part).collect(),
                unique: key.unique,
            }
        });
        Descriptor {
            record_length: offset,
            null_bytes: self.null_bytes(),
            indexes: indexes.collect(),
            fields,
            primary: (!self.hidden).then_some(0),
            auto_increment: self.auto_increment,
        }
    }

    pub fn record(&self, row: &[V]) -> OwnedRecord {
        let descriptor = self.descriptor();
        let mut record =
            OwnedRecord { image: vec![0xa5; descriptor.record_length as usize], blobs: Vec::new() };
        record.image[..descriptor.null_bytes as usize].fill(0);
        for (field, value) in descriptor.fields.iter().zip(row) {
            let at = field.offset as usize;
            let bytes = own_form(field.kind, field.pack_length as usize, value);
            match bytes {
                None => {
                    let (byte, bit) = field.null.expect("a column that can be NULL");
                    record.image[byte as usize] |= bit;
                    if field.kind == Kind::Blob {
                        record.image[at..at + field.pack_length as usize].fill(0);
                        record.blobs.push(Vec::new());
                    }
                }
                Some(bytes) => {
                    let counted = usize::from(field.length_bytes);
                    record.image[at..at + counted].copy_from_slice(&bytes.len().to_le_bytes()[..counted]);
                    match field.kind {
                        Kind::Blob => {
                            let address = bytes.as_ptr().expose_provenance();
                            record.image[at + counted..at + counted + 8]
                                .copy_from_slice(&address.to_ne_bytes());
                            record.blobs.push(bytes);
                        }
                        _ => record.image[at + counted..at + counted + bytes.len()].copy_from_slice(&bytes),
                    }
                }
            }
        }
        record
    }

    pub fn empty(&self) -> Vec<u8> {
        vec![0x5a; self.descriptor().record_length as usize]
    }

    /// Reads a record as the server would.
    pub fn row(&self, image: &[u8]) -> Vec<V> {
        let descriptor = self.descriptor();
        descriptor.fields.iter().map(|field| self.value(field, image)).collect()
    }

    /// Reads some columns of a record.
    pub fn columns_of(&self, image: &[u8], fields: &[usize]) -> Vec<V> {
        let descriptor = self.descriptor();
        fields.iter().map(|field| self.value(&descriptor.fields[*field], image)).collect()
    }

    fn value(&self, field: &Field, image: &[u8]) -> V {
        if field.null.is_some_and(|(byte, bit)| image[byte as usize] & bit != 0) {
            return V::Null;
        }
        let from = &image[field.offset as usize..][..field.pack_length as usize];
        let counted = usize::from(field.length_bytes);
        let len = from[..counted].iter().rev().fold(0usize, |len, byte| len << 8 | usize::from(*byte));
        let number = || from.iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
        match field.kind {
            Kind::Int => {
                let shift = 64 - 8 * from.len() as u32;
                V::I((number() << shift) as i64 >> shift)
            }
            Kind::UInt => V::U(number()),
            Kind::Float => V::F(f32::from_ne_bytes(from.try_into().unwrap())),
            Kind::Double => V::D(f64::from_ne_bytes(from.try_into().unwrap())),
            Kind::Fixed => V::B(from.to_vec()),
            Kind::Char => {
                V::B(from[..from.iter().rposition(|b| *b != b' ').map_or(0, |last| last + 1)].to_vec())
            }
            Kind::VarChar => V::B(from[counted..counted + len].to_vec()),
            Kind::Blob => V::B(follow(&from[counted..], len)),
        }
    }

    /// A key tuple of the first parts of a key, as many as there are values (the extension's after the user's).
    pub fn tuple(&self, key: usize, values: &[V]) -> Vec<u8> {
        let descriptor = self.descriptor();
        let index = &descriptor.indexes[key];
        let mut tuple = Vec::new();
        for (part, value) in index.parts.iter().chain(&index.extension).zip(values) {
            let field = &descriptor.fields[part.field];
            let start = tuple.len();
            let bytes = own_form(field.kind, field.pack_length as usize, value);
            if field.null.is_some() {
                tuple.push(u8::from(bytes.is_none()));
            }
            if let Some(mut bytes) = bytes {
                bytes.truncate(part.length as usize);
                if matches!(field.kind, Kind::VarChar | Kind::Blob) {
                    tuple.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
                }
                tuple.extend_from_slice(&bytes);
            }
            tuple.resize(start + part.store_length as usize, 0);
        }
        tuple
    }

    /// Order of two rows in a key: its parts, then the primary key.
    pub fn compare_parts(&self, key: usize, parts: usize, a: &[V], b: &[V]) -> Ordering {
        let own = self.keys[key].parts.iter().take(parts);
        own.fold(Ordering::Equal, |order, part| order.then_with(|| self.compare_part(part, a, b)))
    }
    pub fn compare_part(&self, part: &Part, a: &[V], b: &[V]) -> Ordering {
        let column = &self.columns[part.field];
        let (a, b) = (column.cut(&a[part.field], part.prefix), column.cut(&b[part.field], part.prefix));
        let order = column.compare(&a, &b);
        if part.descending { order.reverse() } else { order }
    }
}

/// The bytes that the record holds for a value, without length.
fn own_form(kind: Kind, bytes: usize, value: &V) -> Option<Vec<u8>> {
    Some(match value {
        V::Null => return None,
        V::I(value) => value.to_le_bytes()[..bytes].to_vec(),
        V::U(value) => value.to_le_bytes()[..bytes].to_vec(),
        V::F(value) => value.to_ne_bytes().to_vec(),
        V::D(value) => value.to_ne_bytes().to_vec(),
        V::B(value) if kind == Kind::Char => {
            let mut value = value.clone();
            value.resize(bytes, b' ');
            value
        }
        V::B(value) => value.clone(),
    })
}

#[allow(unsafe_code)]
fn follow(pointer: &[u8], len: usize) -> Vec<u8> {
    let address = usize::from_ne_bytes(pointer.try_into().unwrap());
    if len == 0 {
        return Vec::new();
    }
    // SAFETY: the cursor promises that the pointer is good until its next read, and no test reads in between.
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), len) }.to_vec()
}

/// A record and the memory that its BLOBs point to.
#[derive(Clone, Debug)]
pub struct OwnedRecord {
    pub image: Vec<u8>,
    pub blobs: Vec<Vec<u8>>,
}

impl OwnedRecord {
    pub fn with<R>(&self, f: impl FnOnce(Record) -> R) -> R {
        let blobs: Vec<&[u8]> = self.blobs.iter().map(Vec::as_slice).collect();
        f(Record { image: &self.image, blobs: &blobs })
    }
}

pub fn engine_on(bucket: Arc<dyn bucket::Bucket>, disk: SimDisk, settings: Settings) -> Arc<Engine> {
    let clock = Arc::new(SystemClock::default());
    Engine::open(Parts { bucket, disk: Arc::new(disk), clock, seed: 1 }, settings).expect("an engine opens")
}

pub fn engine_with(settings: Settings) -> Arc<Engine> {
    engine_on(Arc::new(bucket::MemoryBucket::new()), SimDisk::new(1), settings)
}

pub fn store_on(bucket: Arc<dyn bucket::Bucket>, disk: SimDisk, settings: Settings) -> Arc<Store> {
    Store::open(engine_on(bucket, disk, settings), Arc::new(Ascii)).expect("a store opens")
}

pub fn store() -> Arc<Store> {
    store_with(Settings::default())
}

pub fn store_with(settings: Settings) -> Arc<Store> {
    Store::open(engine_with(settings), Arc::new(Ascii)).expect("a fresh store opens")
}

/// Ends both, so that another one can go on with bucket and disk.
pub fn stop(store: Arc<Store>) {
    store.close().expect("a store ends");
    store.engine().close().expect("an engine ends");
}

pub fn session(store: &Arc<Store>) -> Session {
    let mut session = store.session(Box::new(|| false));
    session.set_lock_timeout(std::time::Duration::from_millis(50));
    session
}

/// A table with one handler, and what a server does with it.
pub struct Handler {
    pub shape: Shape,
    pub table: Arc<Table>,
    pub cursor: RowCursor,
    pub image: Vec<u8>,
}

pub fn create(store: &Arc<Store>, path: &str, shape: &Shape) -> Handler {
    let images = TableImages { frm: b"frm", par: b"" };
    store.create(path, &shape.descriptor(), images, 0).expect("a new table");
    open(store, path, shape)
}

pub fn open(store: &Arc<Store>, path: &str, shape: &Shape) -> Handler {
    let table = store.open_table(path, shape.descriptor()).expect("an existing table");
    Handler { shape: shape.clone(), cursor: table.cursor(), image: shape.empty(), table }
}

impl Handler {
    pub fn insert(&mut self, session: &mut Session, row: &[V]) -> tables::Result<()> {
        self.shape.record(row).with(|record| self.cursor.insert(session, record))
    }
    /// The current row becomes `row`.
    pub fn update(&mut self, session: &mut Session, row: &[V]) -> tables::Result<()> {
        let mut record = self.shape.record(row);
        let old = self.image.clone();
        // The server changes the record as it was read: columns that stay keep their bytes.
        let before = self.shape.row(&old);
        for (field, (before, after)) in self.shape.descriptor().fields.iter().zip(before.iter().zip(row)) {
            let range = field.offset as usize..(field.offset + field.pack_length) as usize;
            if before == after {
                record.image[range.clone()].copy_from_slice(&old[range]);
            }
        }
        record.with(|record| self.cursor.update(session, &old, record)).map(drop)
    }
    pub fn found(&self, found: bool) -> Option<Vec<V>> {
        found.then(|| self.shape.row(&self.image))
    }
    pub fn read(
        &mut self,
        session: &mut Session,
        key: usize,
        values: &[V],
        flag: tables::ReadFlag,
    ) -> Option<Vec<V>> {
        self.cursor.start(Some(key)).unwrap();
        let tuple = self.shape.tuple(key, values);
        let found = self.cursor.read(session, &tuple, flag, &mut self.image).unwrap();
        self.found(found)
    }
    pub fn next(&mut self, session: &mut Session) -> Option<Vec<V>> {
        let found = self.cursor.next(session, &mut self.image).unwrap();
        self.found(found)
    }
    pub fn prev(&mut self, session: &mut Session) -> Option<Vec<V>> {
        let found = self.cursor.prev(session, &mut self.image).unwrap();
        self.found(found)
    }
    /// All rows, by a key or in primary order.
    pub fn scan(&mut self, session: &mut Session, key: Option<usize>) -> Vec<Vec<V>> {
        self.cursor.start(key).unwrap();
        let mut rows = Vec::new();
        while let Some(row) = self.next(session) {
            rows.push(row);
        }
        rows
    }
    pub fn scan_back(&mut self, session: &mut Session, key: Option<usize>) -> Vec<Vec<V>> {
        self.cursor.start(key).unwrap();
        let mut rows = Vec::new();
        while let Some(row) = self.prev(session) {
            rows.push(row);
        }
        rows
    }
}
