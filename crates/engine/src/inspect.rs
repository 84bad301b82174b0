//! Objects of the bucket in words, for people. Changes nothing; what is wrong is said, not repaired.

use std::fmt::Write;

use bucket::{Names, ObjectName};
use bytes::Bytes;

use crate::claim;
use crate::heat;
use crate::manifest;
use crate::sst;
use crate::wal::{FileHeader, Op, Record, Stream, read_slice};
use crate::{Epoch, Error, Kind, Result, SstId};

/// What a claim, an edit, a base, a wal slice, an sst or a heat map says, one line for each thing. The name tells which of them it is.
///
/// Values of rows are not shown, keys are. `Corrupt` says what is wrong with the object; `BadRequest` if its kind or format
/// is unknown.
pub fn inspect_object(name: &ObjectName, object: &[u8]) -> Result<String> {
    let directory = name.as_str().rsplit('/').nth(1).unwrap_or_default();
    if directory == "epoch" && Names::parse_claim(name).is_some() {
        Ok(claim::describe(object).map_err(|why| Error::corrupt(format!("{name}: {why}")))?)
    } else if Names::parse_edit(name).is_some() || Names::parse_base(name).is_some() {
        manifest::describe(name, object)
    } else if Names::parse_wal_slice(name).is_some() {
        slice(name, object)
    } else if let Some((epoch, counter)) = Names::parse_sst(name).filter(|_| directory == "sst") {
        let id = SstId { epoch: Epoch(epoch), counter };
        sst::describe(id, &Bytes::copy_from_slice(object))
            .map_err(|error| Error::new(error.kind(), name.to_string()).with_cause(error))
    } else if directory == "heat" {
        heat::describe(object).map_err(|error| Error::new(error.kind(), name.to_string()).with_cause(error))
    } else {
        Err(Error::new(
            Kind::BadRequest,
            format!("{name} is no claim, edit, base, wal slice, sst or heat map"),
        ))
    }
}

fn slice(name: &ObjectName, object: &[u8]) -> Result<String> {
    let header = FileHeader::parse_slice(object, name.as_str())?;
    let mut out = format!(
        "wal slice of epoch {}, from {:#x}, {} bytes of records\n",
        header.epoch.0, header.first.0, header.bytes
    );
    let stream = Stream::new(header.branch, header.epoch);
    read_slice(&stream, header.first, object, name, &mut |record| {
        let line = record_line(record)?;
        out.push_str(&line);
        Ok(())
    })?;
    Ok(out)
}

fn record_line(record: &Record<'_>) -> Result<String> {
    let mut line = format!("{:#x} seqno {}", record.position.0, record.seqno.0);
    if record.void {
        line.push_str(" void");
    }
    for op in record.ops() {
        let written = match op? {
            Op::Put(key, value) => write!(line, " put {} ({} bytes)", Hex(key), value.len()),
            Op::Delete(key) => write!(line, " delete {}", Hex(key)),
            Op::DropTree(tree) => write!(line, " drop tree {}", tree.0),
            Op::Load(sst) => {
                let (first, last) = (Hex(sst.first_key), Hex(sst.last_key));
                write!(
                    line,
                    " load {} ({} bytes, {} versions, keys {first} to {last})",
                    sst.id, sst.bytes, sst.entries
                )
            }
        };
        written.expect("writing to a string does not fail");
    }
    line.push('\n');
    Ok(line)
}

/// Bytes as digits.
pub(crate) struct Hex<'a>(pub(crate) &'a [u8]);

impl std::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests;
