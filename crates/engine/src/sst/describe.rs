//! An sst in words, for people who inspect a bucket.

use std::fmt::Write;

use bytes::Bytes;

use super::reader::{each_block, meta_of, verify};
use crate::inspect::Hex;
use crate::{Result, SstId};

/// What `object` says of itself and one line for each data block, after every checksum was right.
pub(crate) fn describe(id: SstId, object: &Bytes) -> Result<String> {
    let meta = meta_of(id, object)?;
    verify(&meta, object)?;
    let seqnos = match (meta.seqno_min.0, meta.seqno_max.0) {
        (0, 0) => "seqno 0 (the commit of a load, as the manifest says)".to_owned(),
        (min, max) => format!("seqno {min} to {max}"),
    };
    let mut out = format!(
        "{id}, {} bytes, {} versions, of which {} deletions, {seqnos}\nkeys {} to {}\n",
        meta.bytes,
        meta.entries,
        meta.tombstones,
        Hex(&meta.first_key),
        Hex(&meta.last_key)
    );
    each_block(&meta, object, |handle, compression, block| {
        let first = Hex(block.key(&block.row(0)));
        let rows = block.rows();
        writeln!(
            out,
            "block at {:#x}, {} bytes, {compression:?}, {rows} versions from {first}",
            handle.offset, handle.bytes
        )
        .expect("writing to a string does not fail");
    })?;
    Ok(out)
}
