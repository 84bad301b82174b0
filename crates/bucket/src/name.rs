//! The names of all objects; made here and nowhere else (`docs/formats/names.md`).
//!
//! Numbers are written in 16 hexadecimal digits so that names sort as numbers do.

use std::fmt;

/// The full name of an object, or of a directory if it ends in `/`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(String);

impl ObjectName {
    /// A name as the store lists it.
    pub fn from_listing(name: impl Into<String>) -> Self {
        Self(name.into())
    }
    /// The name as the store knows it, without a leading slash.
    pub fn as_str(&self) -> &str {
        &self.0
    }
    /// The part after the last `/`.
    pub fn file_name(&self) -> &str {
        self.0.rsplit('/').next().expect("split yields at least one part")
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes and reads the names of one branch: `<branch>/epoch/…`, `<branch>/sst/…` and so on. The bucket's own prefix is
/// the store's affair and never part of a name.
#[derive(Clone, Debug)]
pub struct Names {
    branch: String,
}

impl Names {
    /// Names of `branch`; the first branch of a bucket is `main`.
    pub fn new(branch: &str) -> Self {
        assert!(
            !branch.is_empty() && !branch.contains('/'),
            "a branch is one path component, not {branch:?}"
        );
        Self { branch: branch.to_owned() }
    }
    /// The claim on an epoch.
    pub fn claim(&self, epoch: u64) -> ObjectName {
        self.object("epoch", format_args!("{epoch:016x}"))
    }
    /// Where all claims are.
    pub fn claims(&self) -> ObjectName {
        self.directory("epoch")
    }
    /// A manifest base: the whole tree of runs as of edit `number`.
    pub fn manifest_base(&self, number: u64) -> ObjectName {
        self.object("manifest", format_args!("base-{number:016x}"))
    }
    /// One numbered edit of the manifest.
    pub fn manifest_edit(&self, number: u64) -> ObjectName {
        self.object("manifest", format_args!("edit-{number:016x}"))
    }
    /// Where bases and edits are.
    pub fn manifests(&self) -> ObjectName {
        self.directory("manifest")
    }
    /// An sst.
    pub fn sst(&self, epoch: u64, counter: u64) -> ObjectName {
        self.object("sst", format_args!("{epoch:016x}-{counter:016x}"))
    }
    /// Where all ssts are.
    pub fn ssts(&self) -> ObjectName {
        self.directory("sst")
    }
    /// The wal slice of `epoch` whose first byte is at `position`.
    pub fn wal_slice(&self, epoch: u64, position: u64) -> ObjectName {
        self.object("wal", format_args!("{epoch:016x}/{position:016x}"))
    }
    /// Where the slices of one epoch are.
    pub fn wal_slices(&self, epoch: u64) -> ObjectName {
        self.directory_of("wal", epoch)
    }
    /// Where the slices of all epochs are.
    pub fn wals(&self) -> ObjectName {
        self.directory("wal")
    }

    /// What the writer of `epoch` found to be read most, told the `number`th time.
    pub fn heat(&self, epoch: u64, number: u64) -> ObjectName {
        self.object("heat", format_args!("{epoch:016x}-{number:016x}"))
    }
    /// Where heat maps are.
    pub fn heats(&self) -> ObjectName {
        self.directory("heat")
    }

    /// Says that the first start made the server's system tables to the end.
    pub fn system_tables_marker(&self) -> ObjectName {
        ObjectName(format!("{}/system-tables", self.branch))
    }

    /// The epoch of a claim's name.
    pub fn parse_claim(name: &ObjectName) -> Option<u64> {
        parse_hex(name.file_name())
    }
    /// The number of a base's name.
    pub fn parse_base(name: &ObjectName) -> Option<u64> {
        parse_hex(name.file_name().strip_prefix("base-")?)
    }
    /// The number of an edit's name.
    pub fn parse_edit(name: &ObjectName) -> Option<u64> {
        parse_hex(name.file_name().strip_prefix("edit-")?)
    }
    /// Epoch and counter of an sst's name.
    pub fn parse_sst(name: &ObjectName) -> Option<(u64, u64)> {
        let (epoch, counter) = name.file_name().split_once('-')?;
        Some((parse_hex(epoch)?, parse_hex(counter)?))
    }
    /// Epoch and first position of a slice's name.
    pub fn parse_wal_slice(name: &ObjectName) -> Option<(u64, u64)> {
        let (directory, position) = name.as_str().rsplit_once('/')?;
        Some((parse_hex(directory.rsplit('/').next()?)?, parse_hex(position)?))
    }

    fn object(&self, kind: &str, last: fmt::Arguments<'_>) -> ObjectName {
        ObjectName(format!("{}/{kind}/{last}", self.branch))
    }
    fn directory(&self, kind: &str) -> ObjectName {
        ObjectName(format!("{}/{kind}/", self.branch))
    }
    fn directory_of(&self, kind: &str, number: u64) -> ObjectName {
        ObjectName(format!("{}/{kind}/{number:016x}/", self.branch))
    }
}

fn parse_hex(digits: &str) -> Option<u64> {
    let canonical = digits.len() == 16 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if canonical { u64::from_str_radix(digits, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_back_as_the_numbers_it_was_made_of() {
        let names = Names::new("main");
        assert_eq!(Names::parse_claim(&names.claim(7)), Some(7));
        assert_eq!(Names::parse_base(&names.manifest_base(u64::MAX)), Some(u64::MAX));
        assert_eq!(Names::parse_edit(&names.manifest_edit(0)), Some(0));
        assert_eq!(Names::parse_sst(&names.sst(3, 0xabc)), Some((3, 0xabc)));
        assert_eq!(Names::parse_wal_slice(&names.wal_slice(9, 1 << 40)), Some((9, 1 << 40)));
        assert_eq!(Names::parse_edit(&names.manifest_base(1)), None);
    }
}
