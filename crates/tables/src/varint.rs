//! Lengths as LEB128: seven bits a byte, least first.

pub(crate) fn put(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Takes a number off the front; `None` if there is none.
#[inline]
pub(crate) fn take(from: &mut &[u8]) -> Option<u64> {
    let (first, rest) = from.split_first()?;
    if *first < 0x80 {
        *from = rest;
        return Some(u64::from(*first));
    }
    let mut value = 0u64;
    for (i, byte) in from.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f) << (7 * i);
        if *byte < 0x80 {
            *from = &from[i + 1..];
            return Some(value);
        }
    }
    None
}
