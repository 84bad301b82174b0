//! For any two values of any column: the keys compare as the values do, and give the values back.

use std::cmp::Ordering;

use proptest::prelude::*;

use super::{Extent, Part, successor};
use crate::common::{self, Ascii, Column, Shape, Text, V, plain};
use crate::rows::{Parts, RowCodec};

fn any_text() -> impl Strategy<Value = Text> {
    prop::sample::select(Text::ALL.to_vec())
}

/// Bytes that come near each other and near spaces and zeros.
fn any_bytes(longest: usize) -> impl Strategy<Value = Vec<u8>> {
    let byte = prop::sample::select(vec![0u8, 1, 0x1f, b' ', b' ', b' ', b'!', b'a', b'A', b'b', 0xfe, 0xff]);
    prop::collection::vec(byte, 0..=longest)
}

fn stripped(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.iter().rposition(|byte| *byte != b' ').map_or(0, |last| last + 1));
    bytes
}

/// A column, the prefix its part counts, and values for it.
fn any_case() -> impl Strategy<Value = (Column, Option<u32>, Vec<V>)> {
    let number = prop_oneof![Just(1u32), Just(2), Just(3), Just(4), Just(8)];
    let ints = number.clone().prop_flat_map(|bytes| {
        let half = 1i64 << (8 * bytes - 1).min(62);
        let value = prop_oneof![-half..half, -2i64..3, Just(-half), Just(half - 1)].prop_map(V::I);
        (Just(common::int(bytes)), Just(None), prop::collection::vec(value, 2..6))
    });
    let uints = number.prop_flat_map(|bytes| {
        let greatest = u64::MAX >> (64 - 8 * bytes);
        let value = prop_oneof![0..=greatest, 0u64..3, Just(greatest)].prop_map(V::U);
        (Just(common::uint(bytes)), Just(None), prop::collection::vec(value, 2..6))
    });
    let double = prop_oneof![
        any::<f64>().prop_filter("SQL has no NaN", |value| !value.is_nan()),
        prop::sample::select(vec![0.0, -0.0, 1.0, -1.0, f64::MIN_POSITIVE, f64::MAX, f64::MIN])
    ];
    let doubles = prop::collection::vec(double.clone().prop_map(V::D), 2..6)
        .prop_map(|values| (common::double(), None, values));
    let floats = prop::collection::vec(double.prop_map(|value| V::F(value as f32)), 2..6)
        .prop_map(|values| (common::float(), None, values));
    let fixed = prop::collection::vec(prop::collection::vec(any::<u8>(), 5).prop_map(V::B), 2..6)
        .prop_map(|values| (common::fixed(5), None, values));
    let prefix = prop_oneof![Just(None), (1u32..6).prop_map(Some)];
    let varchars = (any_text(), prefix.clone(), prop::collection::vec(any_bytes(12).prop_map(V::B), 2..6))
        .prop_map(|(text, prefix, values)| (common::varchar(12, text), prefix, values));
    let long = (any_text(), prefix.clone(), prop::collection::vec(any_bytes(300).prop_map(V::B), 2..6))
        .prop_map(|(text, prefix, values)| (common::varchar(300, text), prefix, values));
    let runs =
        (any_text(), prop::collection::vec((0usize..600, any_bytes(3)), 2..6)).prop_map(|(text, values)| {
            let spaced = values.into_iter().map(|(run, end)| V::B([vec![b' '; run], end].concat()));
            (common::varchar(1000, text), None, spaced.collect())
        });
    let blobs = (any_text(), 1u32..6, prop::collection::vec(any_bytes(12).prop_map(V::B), 2..6))
        .prop_map(|(text, prefix, values)| (common::blob(2, text), Some(prefix), values));
    let chars =
        (any_text(), prefix, prop::collection::vec(any_bytes(8), 2..6)).prop_map(|(text, prefix, values)| {
            // CHAR is padded in the record, so NO PAD collations compare it padded too.
            let text = match text {
                Text::Binary => Text::BinaryPadded,
                Text::CaselessNoPad => Text::Caseless,
                text => text,
            };
            (common::char(8, text), prefix, values.into_iter().map(|value| V::B(stripped(value))).collect())
        });
    prop_oneof![ints, uints, doubles, floats, fixed, varchars, long, runs, blobs, chars]
}

fn same_bits(a: &V, b: &V) -> bool {
    match (a, b) {
        (V::D(a), V::D(b)) => a.to_bits() == b.to_bits(),
        (V::F(a), V::F(b)) => a.to_bits() == b.to_bits(),
        _ => a == b,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn keys_compare_as_values_do_and_give_them_back(
        (column, prefix, mut values) in any_case(),
        nullable: bool,
        descending: bool,
    ) {
        let column = if nullable { column.null() } else { column };
        if nullable {
            values.push(V::Null);
        }
        let index_part = common::Part { field: 0, prefix, descending };
        let shape = Shape::hidden(&[column], &[plain(&[index_part])]);
        let descriptor = shape.descriptor();
        descriptor.check().expect("a sound descriptor");
        let part = Part::new(&descriptor, &descriptor.indexes[0].parts[0], &Ascii);
        let rows = RowCodec::new(&descriptor, &Ascii);

        let mut encoded = Vec::new();
        for value in &values {
            let record = shape.record(std::slice::from_ref(value));
            let (mut key, mut restore, mut scratch) = (Vec::new(), Vec::new(), Vec::new());
            record.with(|record| {
                let value = rows.record_value(0, &record).expect("a sound record");
                part.encode(value, &Ascii, &mut scratch, &mut key);
                if let Some(value) = value {
                    part.restore_bytes(value, &mut restore);
                }
            });
            prop_assert!(key.len() <= part.max_len(&descriptor.indexes[0].parts[0]), "{} bytes", key.len());
            let mut more = key.clone();
            more.extend_from_slice(b"\x00\x20more");
            prop_assert_eq!(part.skip(&more, 0), Ok(key.len()));
            let stored = Extent::decode(&part.extent().encode()).expect("our own");
            prop_assert_eq!(engine::FirstPart::end(&stored, &more), Some(key.len()));

            if part.restorable() {
                let mut image = shape.empty();
                let mut left = &restore[..];
                let end = part.decode(&more, 0, &mut left, Some(&mut image), &mut scratch);
                prop_assert_eq!(end, Ok(key.len()));
                prop_assert!(left.is_empty());
                let back = shape.row(&image).remove(0);
                prop_assert!(same_bits(&back, value), "{value:?} came back as {back:?}");
            }

            // The same value in a key tuple makes the same key.
            let tuple = shape.tuple(0, std::slice::from_ref(value));
            let mut from_tuple = Vec::new();
            let value = part.tuple_value(&tuple).expect("a sound tuple");
            part.encode(value, &Ascii, &mut scratch, &mut from_tuple);
            prop_assert_eq!(&from_tuple, &key);
            encoded.push(key);
        }
        for (a, key_a) in values.iter().zip(&encoded) {
            for (b, key_b) in values.iter().zip(&encoded) {
                let order = shape.compare_part(&index_part, std::slice::from_ref(a), std::slice::from_ref(b));
                prop_assert_eq!(key_a.cmp(key_b), order, "{:?} and {:?}", a, b);
                if order != Ordering::Equal {
                    prop_assert!(!key_a.starts_with(key_b), "{b:?} is a prefix of {a:?}");
                }
            }
        }
    }

    #[test]
    fn a_row_gives_back_its_columns(text in any_text(), values in prop::collection::vec(any_bytes(40), 6), nulls: u8) {
        let columns = [
            common::int(4),
            common::varchar(40, text).null(),
            common::fixed(3).null(),
            common::blob(3, text).null(),
            common::char(40, Text::Caseless).null(),
            common::double().null(),
        ];
        let shape = Shape::new(&columns, &[common::unique(&[common::part(0).desc()])]);
        let row: Vec<V> = (0..6).map(|i| match i {
            0 => V::I(i64::from(nulls) - 100),
            i if nulls >> i & 1 == 1 => V::Null,
            1 | 3 => V::B(values[i].clone()),
            2 => V::B([&values[2][..], &[1, 2, 3]].concat()[..3].to_vec()),
            4 => V::B(stripped(values[4].clone())),
            _ => V::D(f64::from(nulls)),
        }).collect();
        let descriptor = shape.descriptor();
        let layout = crate::layout::Layout::new(descriptor, &Ascii);
        let record = shape.record(&row);
        let (mut bytes, mut key) = (Vec::new(), Vec::new());
        record.with(|record| {
            layout.rows.encode(&record, &mut bytes).expect("a sound record");
            let value = |field| layout.rows.record_value(field, &record);
            layout.indexes[0].encode_parts(&value, &Ascii, &mut Vec::new(), &mut key).expect("a sound record");
        });
        let mut program = Default::default();
        layout.rows.compile(|_| true, &mut program);
        let mut image = shape.empty();
        layout.rows.decode(&program, &bytes, &key, &mut image).expect("a sound row");
        prop_assert_eq!(shape.row(&image), row.clone());

        // Some columns only: those come back, no other byte of the record is touched but null bits.
        layout.rows.compile(|field| field % 2 == 1, &mut program);
        let mut image = shape.empty();
        layout.rows.decode(&program, &bytes, &key, &mut image).expect("a sound row");
        let some = shape.row(&image);
        for i in [1, 3, 5] {
            prop_assert_eq!(&some[i], &row[i]);
        }
        prop_assert_eq!(&image[1..5], &shape.empty()[1..5]);

        // A row cut short or of another version is refused.
        let mut parts = Parts::default();
        layout.rows.parse(&bytes, &key, &mut parts).expect("a sound row");
        bytes[0] = 9;
        prop_assert!(layout.rows.parse(&bytes, &key, &mut parts).is_err());
        bytes[0] = 1;
        bytes.pop();
        prop_assert!(layout.rows.parse(&bytes, &key, &mut parts).is_err() || nulls & 0b1_1010 == 0b1_1010);
    }

    #[test]
    fn garbled_keys_are_refused_not_believed(bytes in prop::collection::vec(any::<u8>(), 0..40), text in any_text(), nullable: bool, descending: bool) {
        let column = common::varchar(30, text);
        let column = if nullable { column.null() } else { column };
        let shape = Shape::hidden(&[column], &[plain(&[common::Part { field: 0, prefix: None, descending }])]);
        let descriptor = shape.descriptor();
        let part = Part::new(&descriptor, &descriptor.indexes[0].parts[0], &Ascii);
        let mut image = shape.empty();
        if let Ok(end) = part.decode(&bytes, 0, &mut &bytes[..], Some(&mut image), &mut Vec::new()) {
            prop_assert!(end <= bytes.len());
        }
        let mut program = Default::default();
        let rows = RowCodec::new(&descriptor, &Ascii);
        rows.compile(|_| true, &mut program);
        // Whatever the answer: no panic, no read beyond the row.
        _ = rows.decode(&program, &bytes, &[0; 8], &mut image);
        _ = rows.parse(&bytes, &[0; 8], &mut Parts::default());
    }
}

#[test]
fn the_successor_is_the_least_key_beyond_a_prefix() {
    let mut key = vec![1, 0xff, 0xff];
    assert!(successor(&mut key));
    assert_eq!(key, [2]);
    let mut key = vec![0xff];
    assert!(!successor(&mut key), "nothing is beyond the greatest prefix");
}

/// Bytes that are in buckets already. If this fails the format has changed: that is a new version, not a new expectation.
#[test]
fn the_bytes_of_version_1_stay() {
    let stored = |column: Column, descending: bool, value: V| {
        let index_part = common::Part { field: 0, prefix: None, descending };
        let descriptor = Shape::hidden(&[column], &[plain(&[index_part])]).descriptor();
        let shape = Shape::hidden(&[column], &[plain(&[index_part])]);
        let part = Part::new(&descriptor, &descriptor.indexes[0].parts[0], &Ascii);
        let rows = RowCodec::new(&descriptor, &Ascii);
        let (mut key, mut restore) = (Vec::new(), Vec::new());
        shape.record(&[value]).with(|record| {
            let value = rows.record_value(0, &record).expect("a sound record");
            part.encode(value, &Ascii, &mut Vec::new(), &mut key);
            if let Some(value) = value {
                part.restore_bytes(value, &mut restore);
            }
        });
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        format!("{} {}", hex(&key), hex(&restore))
    };
    let extent = |column: Column, descending: bool| {
        let index_part = common::Part { field: 0, prefix: None, descending };
        let descriptor = Shape::hidden(&[column], &[plain(&[index_part])]).descriptor();
        Part::new(&descriptor, &descriptor.indexes[0].parts[0], &Ascii).extent().encode()
    };
    assert_eq!(extent(common::int(4).null(), true), [1, 3, 0, 4]);
    assert_eq!(extent(common::varchar(9, Text::Binary), false), [1, 0, 1]);
    assert_eq!(extent(common::varchar(9, Text::CaselessWide).null(), false), [1, 1, 2, 0, b' ']);
    assert_eq!(extent(common::char(9, Text::TwoLevels), false), [1, 0, 3, 1, b' ', 0, 1]);
    for garbled in
        [&[][..], &[2, 0, 1], &[1, 4, 1], &[1, 0, 3], &[1, 0, 0], &[1, 0, 1, 0], &[1, 0, 2, 1, 1, 1, 1, 1]]
    {
        assert_eq!(Extent::decode(garbled), None, "{garbled:?}");
    }
    let text = common::text;
    assert_eq!(stored(common::int(4), false, V::I(-2)), "7ffffffe ");
    assert_eq!(stored(common::int(3).null(), true, V::I(1)), "fe7ffffe ");
    assert_eq!(stored(common::uint(2).null(), false, V::Null), "00 ");
    assert_eq!(stored(common::double(), false, V::D(-0.0)), "8000000000000000 01");
    assert_eq!(stored(common::float(), false, V::F(-1.0)), "407fffff 00");
    assert_eq!(stored(common::varchar(9, Text::Binary), false, V::B(vec![7, 0, 8])), "0700ff080000 ");
    assert_eq!(stored(common::varchar(9, Text::BinaryPadded), false, text("a b ")), "612003fe622002 01");
    assert_eq!(stored(common::varchar(9, Text::BinaryPadded), false, text("a  \t")), "61200102092002 00");
    assert_eq!(stored(common::char(9, Text::Caseless), false, text("Ab")), "41422002 024162");
    assert_eq!(stored(common::varchar(9, Text::CaselessWide), false, text("b ")), "0042002002 026220");
    assert_eq!(stored(common::varchar(9, Text::CaselessNoPad), true, text("a")), "beffff 0161");
    assert_eq!(
        stored(common::char(9, Text::TwoLevels), false, text("a B")),
        "0141012003fe01420120020002000102 03612042"
    );
    assert_eq!(
        stored(common::varchar(9, Text::CaselessStripped), false, text("a b ")),
        "4120420000 0461206220"
    );
    let long = V::B([vec![b' '; 300], vec![b'x']].concat());
    assert!(
        stored(common::varchar(400, Text::BinaryPadded), false, long).starts_with("200300fffffed3782002")
    );

    let shape = Shape::new(
        &[
            common::int(2),
            common::varchar(9, Text::Binary).null(),
            common::uint(1),
            common::char(4, Text::Caseless),
        ],
        &[common::unique(&[common::part(0)])],
    );
    let mut row = Vec::new();
    let record = shape.record(&[V::I(5), V::Null, V::U(7), text("xy")]);
    record
        .with(|record| RowCodec::new(&shape.descriptor(), &Ascii).encode(&record, &mut row))
        .expect("a sound record");
    assert_eq!(row, [1, 4, 7, 2, b'x', b'y']);
}

/// In UCS-2 the record pads with `00 20`: a value's own form ends in the middle of a character, and U+2020 (a dagger) is all spaces.
#[test]
fn a_char_of_two_bytes_a_character_is_weighed_whole() {
    let column = common::char(8, Text::Wide);
    let shape = Shape::hidden(&[column], &[plain(&[common::part(0)])]);
    let descriptor = shape.descriptor();
    let part = Part::new(&descriptor, &descriptor.indexes[0].parts[0], &Ascii);
    let rows = RowCodec::new(&descriptor, &Ascii);
    let record = |text: &str| {
        let mut units: Vec<u16> = text.encode_utf16().collect();
        units.resize(4, 0x20);
        let image: Vec<u8> = units.iter().flat_map(|unit| unit.to_be_bytes()).collect();
        shape.record(&[V::B(image)])
    };
    let texts = [
        "",
        "\t",
        "A",
        "A\u{9}",
        "AB",
        "AB\u{2020}",
        "AB\u{120}",
        "AB\u{2020}\u{2020}",
        "ABCD",
        "ABC\u{4120}",
    ];
    let mut keys = Vec::new();
    for text in texts {
        let (mut key, mut image) = (Vec::new(), shape.empty());
        let owned = record(text);
        owned.with(|record| {
            part.encode(
                rows.record_value(0, &record).expect("a sound record"),
                &Ascii,
                &mut Vec::new(),
                &mut key,
            );
            let mut row = Vec::new();
            rows.encode(&record, &mut row).expect("a sound record");
            let mut program = Default::default();
            rows.compile(|_| true, &mut program);
            rows.decode(&program, &row, &[], &mut image).expect("a sound row");
        });
        assert_eq!(image[1..], owned.image[1..], "{text:?} comes back");
        keys.push((owned.image[1..].to_vec(), key));
    }
    for (a, key_a) in &keys {
        for (b, key_b) in &keys {
            assert_eq!(key_a.cmp(key_b), Text::Wide.compare(a, b), "{a:?} {b:?}");
        }
    }
}
