//! The bytes of manifest edits and bases. `docs/formats/manifest.md` draws them.
//!
//! * Both are one header and a list of tagged entries, under one checksum. An unknown tag or version is refused by name:
//!   to pass over what we do not know could lose an sst.
//! * A base is a function of the edits before it, so two writers of the same base write the same bytes.
//! * Decoding takes any bytes and never panics; whether the content makes sense is checked by `Manifest`.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Edit, Flushed, Manifest, WalSpan};
use crate::limits::LEVELS;
use crate::version::{Run, SstMeta, Version};
use crate::{BranchId, Epoch, Error, Kind, Result, Seqno, SstId, TreeId, WalPosition};

const EDIT_MAGIC: [u8; 8] = *b"CISTEDIT";
const BASE_MAGIC: [u8; 8] = *b"CISTBASE";
const VERSION: u32 = 1;
/// An edit that adds more than one run of level 0. All others stay readable to programs that know version 1 alone.
const VERSION_RUNS: u32 = 2;
const HEADER: usize = 64;

/// Stored in the bucket. Add tags at the end, never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Tag {
    SstAdded = 1,
    SstRemoved = 2,
    TreeDropped = 3,
    TreeGone = 4,
    Flushed = 5,
    NextTree = 6,
    TakeOver = 7,
    WalSpan = 8,
    SstLoaded = 9,
}

impl Tag {
    fn of(tag: u8) -> Option<Self> {
        [
            Self::SstAdded,
            Self::SstRemoved,
            Self::TreeDropped,
            Self::TreeGone,
            Self::Flushed,
            Self::NextTree,
            Self::TakeOver,
            Self::WalSpan,
            Self::SstLoaded,
        ]
        .into_iter()
        .find(|known| *known as u8 == tag)
    }

    fn of_sst(sst: &SstMeta) -> Self {
        if sst.loaded { Self::SstLoaded } else { Self::SstAdded }
    }
}

/// Who wrote an object of the manifest, and which one it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) branch: BranchId,
    pub(crate) number: u64,
    pub(crate) epoch: Epoch,
    /// Drawn by chance by each writer.
    pub(crate) nonce: u64,
}

pub(crate) fn encode_edit(header: &Header, edit: &Edit) -> Vec<u8> {
    let version = if edit.older_runs.is_empty() { VERSION } else { VERSION_RUNS };
    let mut out = Writer::new(EDIT_MAGIC, version, header);
    for (run, ssts) in (1..).zip(edit.older_runs.iter().rev()) {
        for sst in ssts.iter() {
            out.entry(Tag::of_sst(sst), |out| out.sst(0, run, sst));
        }
    }
    for (level, sst) in &edit.added {
        out.entry(Tag::of_sst(sst), |out| out.sst(*level, 0, sst));
    }
    for id in &edit.removed {
        out.entry(Tag::SstRemoved, |out| out.sst_id(*id));
    }
    for (tree, seqno) in &edit.dropped {
        out.entry(Tag::TreeDropped, |out| out.u32(tree.0).u64(seqno.0));
    }
    for tree in &edit.gone {
        out.entry(Tag::TreeGone, |out| out.u32(tree.0));
    }
    if let Some(flushed) = &edit.flushed {
        out.entry(Tag::Flushed, |out| out.flushed(flushed));
    }
    if let Some(tree) = edit.next_tree {
        out.entry(Tag::NextTree, |out| out.u32(tree.0));
    }
    if let Some(position) = edit.take_over {
        out.entry(Tag::TakeOver, |out| out.u64(position.0));
    }
    out.finish()
}

pub(crate) fn decode_edit(object: &[u8], name: &str) -> Result<(Header, Edit)> {
    let (header, entries) = open(object, EDIT_MAGIC, name)?;
    let mut edit = Edit::default();
    // By their number in the entry, which counts from the newest.
    let mut older_runs: BTreeMap<u32, Vec<Arc<SstMeta>>> = BTreeMap::new();
    for entry in entries {
        let (tag, mut body) = entry?;
        match tag {
            Tag::SstAdded | Tag::SstLoaded => match body.sst(tag)? {
                (level, 0, sst) => edit.added.push((level, sst)),
                (0, run, sst) => older_runs.entry(run).or_default().push(sst),
                _ => return Err(damaged(name, "an sst below level 0 stands in a run")),
            },
            Tag::SstRemoved => edit.removed.push(body.sst_id()?),
            Tag::TreeDropped => edit.dropped.push((TreeId(body.u32()?), Seqno(body.u64()?))),
            Tag::TreeGone => edit.gone.push(TreeId(body.u32()?)),
            Tag::Flushed => edit.flushed = Some(body.flushed()?),
            Tag::NextTree => edit.next_tree = Some(TreeId(body.u32()?)),
            Tag::TakeOver => edit.take_over = Some(WalPosition(body.u64()?)),
            Tag::WalSpan => return Err(damaged(name, "an entry of a base stands in an edit")),
        }
        body.end()?;
    }
    edit.older_runs = older_runs.into_values().rev().map(Run::from).collect();
    Ok((header, edit))
}

pub(crate) fn encode_base(manifest: &Manifest) -> Vec<u8> {
    let mut out = Writer::new(BASE_MAGIC, VERSION, &manifest.header());
    for (index, run) in manifest.version.l0.iter().enumerate() {
        for sst in run.iter() {
            out.entry(Tag::of_sst(sst), |out| out.sst(0, index as u32, sst));
        }
    }
    for (index, run) in manifest.version.levels.iter().enumerate() {
        for sst in run.iter() {
            out.entry(Tag::of_sst(sst), |out| out.sst(index as u8 + 1, 0, sst));
        }
    }
    for (tree, seqno) in &manifest.dropped {
        out.entry(Tag::TreeDropped, |out| out.u32(tree.0).u64(seqno.0));
    }
    out.entry(Tag::Flushed, |out| out.flushed(&manifest.flushed));
    out.entry(Tag::NextTree, |out| out.u32(manifest.next_tree.0));
    for span in &manifest.wals {
        // No position is that large: it stands for "not ended yet".
        let end = span.end.map_or(u64::MAX, |end| end.0);
        out.entry(Tag::WalSpan, |out| out.u64(span.epoch.0).u64(span.start.0).u64(span.slice.0).u64(end));
    }
    out.finish()
}

pub(crate) fn decode_base(object: &[u8], name: &str) -> Result<Manifest> {
    let (header, entries) = open(object, BASE_MAGIC, name)?;
    let mut manifest = Manifest::empty(header.branch);
    manifest.number = header.number;
    manifest.epoch = header.epoch;
    manifest.nonce = header.nonce;
    let mut l0: Vec<Vec<Arc<SstMeta>>> = Vec::new();
    let mut levels: [Vec<Arc<SstMeta>>; LEVELS - 1] = Default::default();
    for entry in entries {
        let (tag, mut body) = entry?;
        match tag {
            Tag::SstAdded | Tag::SstLoaded => {
                let (level, run, sst) = body.sst(tag)?;
                let (level, run) = (usize::from(level), run as usize);
                if level > 0 {
                    let place = levels.get_mut(level - 1);
                    place
                        .ok_or_else(|| damaged(name, "an sst stands in a level that there is not"))?
                        .push(sst);
                } else if run == l0.len() {
                    l0.push(vec![sst]);
                } else if run + 1 == l0.len() {
                    l0[run].push(sst);
                } else {
                    return Err(damaged(name, "the runs of level 0 are out of order"));
                }
            }
            Tag::TreeDropped => _ = manifest.dropped.insert(TreeId(body.u32()?), Seqno(body.u64()?)),
            Tag::Flushed => manifest.flushed = body.flushed()?,
            Tag::NextTree => manifest.next_tree = TreeId(body.u32()?),
            Tag::WalSpan => {
                let (epoch, start) = (Epoch(body.u64()?), WalPosition(body.u64()?));
                let (slice, end) = (WalPosition(body.u64()?), body.u64()?);
                let end = (end != u64::MAX).then_some(WalPosition(end));
                manifest.wals.push(WalSpan { epoch, start, slice, end });
            }
            Tag::SstRemoved | Tag::TreeGone | Tag::TakeOver => {
                return Err(damaged(name, "an entry of an edit stands in a base"));
            }
        }
        body.end()?;
    }
    manifest.version = version(l0, levels, name)?;
    Ok(manifest)
}

/// The version made of these runs, by the same checks that edits go through.
fn version(
    l0: Vec<Vec<Arc<SstMeta>>>,
    levels: [Vec<Arc<SstMeta>>; LEVELS - 1],
    name: &str,
) -> Result<Version> {
    let misfit = |error: crate::version::Misfit| damaged(name, &error.to_string());
    let mut version = Version::default();
    for run in l0.into_iter().rev() {
        let added: Vec<_> = run.into_iter().map(|sst| (0, sst)).collect();
        version = version.apply(&added, &[]).map_err(misfit)?;
    }
    let mut deeper = Vec::new();
    for (index, run) in levels.into_iter().enumerate() {
        deeper.extend(run.into_iter().map(|sst| (index as u8 + 1, sst)));
    }
    version.apply(&deeper, &[]).map_err(misfit)
}

struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    fn new(magic: [u8; 8], version: u32, header: &Header) -> Self {
        let mut out = Self { bytes: magic.to_vec() };
        out.u32(version).u32(0);
        out.bytes.extend_from_slice(&header.branch.0);
        out.u64(header.number).u64(header.epoch.0).u64(header.nonce).u32(0).u32(0);
        debug_assert_eq!(out.bytes.len(), HEADER);
        out
    }
    fn entry<'a>(&'a mut self, tag: Tag, body: impl FnOnce(&'a mut Self) -> &'a mut Self) {
        self.bytes.push(tag as u8);
        let at = self.bytes.len();
        self.u32(0);
        let bytes = &mut body(self).bytes;
        let length = u32::try_from(bytes.len() - at - 4).expect("an entry holds two keys at most");
        bytes[at..at + 4].copy_from_slice(&length.to_le_bytes());
    }
    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }
    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }
    fn key(&mut self, key: &[u8]) -> &mut Self {
        self.u32(u32::try_from(key.len()).expect("keys are short"));
        self.bytes.extend_from_slice(key);
        self
    }
    fn sst_id(&mut self, id: SstId) -> &mut Self {
        self.u64(id.epoch.0).u64(id.counter)
    }
    fn flushed(&mut self, flushed: &Flushed) -> &mut Self {
        self.u64(flushed.position.0).u64(flushed.seqno.0).u64(flushed.slice.0)
    }
    fn sst(&mut self, level: u8, run: u32, sst: &SstMeta) -> &mut Self {
        self.bytes.push(level);
        self.u32(run).sst_id(sst.id).u64(sst.bytes).u64(sst.entries).u64(sst.tombstones);
        self.u64(sst.seqno_min.0).u64(sst.seqno_max.0).key(&sst.first_key).key(&sst.last_key)
    }
    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len() - HEADER).expect("a manifest stays below 4 GiB");
        self.bytes[56..60].copy_from_slice(&length.to_le_bytes());
        let crc = checksum(&self.bytes);
        self.bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        self.bytes
    }
}

fn checksum(object: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&object[..60]);
    crc.update(&object[HEADER..]);
    crc.finalize()
}

fn open<'a>(object: &'a [u8], magic: [u8; 8], name: &'a str) -> Result<(Header, Entries<'a>)> {
    if object.len() < HEADER || object[..8] != magic {
        return Err(damaged(name, "it does not start as one"));
    }
    let mut header = Reader { bytes: &object[8..HEADER], name };
    let version = header.u32()?;
    let newest = if magic == EDIT_MAGIC { VERSION_RUNS } else { VERSION };
    if !(VERSION..=newest).contains(&version) {
        let message = format!(
            "{name} has manifest format version {version}; this program reads up to version {newest}"
        );
        return Err(Error::new(Kind::BadRequest, message));
    }
    header.u32()?;
    let branch = BranchId(header.take(16)?.try_into().map_err(|_| damaged(name, "it is cut short"))?);
    let (number, epoch, nonce) = (header.u64()?, Epoch(header.u64()?), header.u64()?);
    let (length, crc) = (header.u32()?, header.u32()?);
    if object.len() - HEADER != length as usize || checksum(object) != crc {
        return Err(damaged(name, "it is cut short or its checksum is wrong"));
    }
    Ok((Header { branch, number, epoch, nonce }, Entries { rest: Reader { bytes: &object[HEADER..], name } }))
}

fn damaged(name: &str, why: &str) -> Error {
    Error::corrupt(format!("the manifest object {name} is damaged: {why}"))
}

struct Entries<'a> {
    rest: Reader<'a>,
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<(Tag, Reader<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        (!self.rest.bytes.is_empty()).then(|| self.entry())
    }
}

impl<'a> Entries<'a> {
    fn split(&mut self) -> Result<(u8, &'a [u8])> {
        let tag = self.rest.take(1)?[0];
        let length = self.rest.u32()?;
        Ok((tag, self.rest.take(length as usize)?))
    }
    fn entry(&mut self) -> Result<(Tag, Reader<'a>)> {
        let name = self.rest.name;
        let (tag, bytes) = self.split().inspect_err(|_| self.rest.bytes = &[])?;
        match Tag::of(tag) {
            Some(tag) => Ok((tag, Reader { bytes, name })),
            None => {
                let message =
                    format!("{name} holds an entry of kind {tag}, which this program does not know");
                Err(Error::new(Kind::BadRequest, message))
            }
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    name: &'a str,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let (taken, rest) =
            self.bytes.split_at_checked(length).ok_or_else(|| damaged(self.name, "an entry is cut short"))?;
        self.bytes = rest;
        Ok(taken)
    }
    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("4 bytes")))
    }
    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("8 bytes")))
    }
    fn key(&mut self) -> Result<Box<[u8]>> {
        let length = self.u32()?;
        Ok(self.take(length as usize)?.into())
    }
    fn sst_id(&mut self) -> Result<SstId> {
        Ok(SstId { epoch: Epoch(self.u64()?), counter: self.u64()? })
    }
    fn flushed(&mut self) -> Result<Flushed> {
        Ok(Flushed {
            position: WalPosition(self.u64()?),
            seqno: Seqno(self.u64()?),
            slice: WalPosition(self.u64()?),
        })
    }
    fn sst(&mut self, tag: Tag) -> Result<(u8, u32, Arc<SstMeta>)> {
        let (level, run) = (self.take(1)?[0], self.u32()?);
        let sst = SstMeta {
            id: self.sst_id()?,
            bytes: self.u64()?,
            entries: self.u64()?,
            tombstones: self.u64()?,
            seqno_min: Seqno(self.u64()?),
            seqno_max: Seqno(self.u64()?),
            first_key: self.key()?,
            last_key: self.key()?,
            loaded: tag == Tag::SstLoaded,
            opened: Default::default(),
        };
        if sst.loaded && sst.seqno_min != sst.seqno_max {
            return Err(damaged(self.name, "the versions of a load have different seqnos"));
        }
        Ok((level, run, Arc::new(sst)))
    }
    fn end(&self) -> Result<()> {
        if self.bytes.is_empty() { Ok(()) } else { Err(damaged(self.name, "an entry is too long")) }
    }
}
