//! What is in a directory bucket, seen from outside: files, and what `cistern inspect` says about them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::server::build_directory;

/// All files below `directory` by their relative names, with what they hold.
pub fn files_below(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in fs::read_dir(&next).expect("the directory can be read") {
            let path = entry.expect("the directory can be read").path();
            if path.is_dir() {
                pending.push(path);
            } else {
                let name = path.strip_prefix(directory).expect("it is below").display().to_string();
                found.insert(name, fs::read(&path).unwrap_or_default());
            }
        }
    }
    found
}

/// The objects of a bucket at one moment.
#[derive(Clone, Debug)]
pub struct Objects {
    bucket: PathBuf,
    /// By name.
    pub bodies: BTreeMap<String, Vec<u8>>,
}

impl Objects {
    /// What is in `bucket` now.
    pub fn now(bucket: &Path) -> Self {
        let mut bodies = files_below(bucket);
        bodies.retain(|name, _| !name.starts_with(".unfinished/"));
        Self { bucket: bucket.to_owned(), bodies }
    }

    /// Names of `earlier` that are gone.
    pub fn gone_since<'a>(&self, earlier: &'a Self) -> Vec<&'a str> {
        earlier.bodies.keys().filter(|name| !self.bodies.contains_key(*name)).map(String::as_str).collect()
    }

    /// Names that were not there in `earlier`.
    pub fn new_since(&self, earlier: &Self) -> Vec<&str> {
        self.bodies.keys().filter(|name| !earlier.bodies.contains_key(*name)).map(String::as_str).collect()
    }

    /// Names of which the bytes differ.
    pub fn changed_since(&self, earlier: &Self) -> Vec<&str> {
        let changed = self
            .bodies
            .iter()
            .filter(|(name, body)| earlier.bodies.get(*name).is_some_and(|before| before != *body));
        changed.map(|(name, _)| name.as_str()).collect()
    }

    /// What the newest manifest needs: the objects of its ssts, and its own base with the edits after it. Nobody may
    /// write meanwhile.
    pub fn named_by_the_manifest(&self) -> BTreeSet<String> {
        let of_kind = |kind: &str| -> Vec<&String> {
            self.bodies.keys().filter(|name| name.starts_with(&format!("main/manifest/{kind}-"))).collect()
        };
        let number = |name: &str| name.rsplit('-').next().expect("a number comes last").to_owned();
        let base = *of_kind("base").last().expect("there is a base");
        let edits = of_kind("edit").into_iter().filter(|edit| number(edit) > number(base));
        let mut ssts = BTreeSet::new();
        let mut named = BTreeSet::new();
        for object in [base].into_iter().chain(edits) {
            named.insert(object.clone());
            for line in inspect(&self.bucket.join(object)).lines() {
                let words: Vec<&str> = line.split(' ').collect();
                match words[..] {
                    ["removes", "sst", id] => {
                        assert!(ssts.remove(id), "{object} removes {id}, which is not there")
                    }
                    ["level", _, "sst", id, ..]
                    | ["adds", "to", "level", _, "sst", id, ..]
                    | ["adds", "to", "level", _, _, "runs", "older:", "sst", id, ..] => {
                        assert!(ssts.insert(id.trim_end_matches(',').to_owned()), "{object} adds {id} twice");
                    }
                    _ => (),
                }
            }
        }
        let pad = |digits: &str| format!("{digits:0>16}");
        named.extend(ssts.iter().map(|id| {
            let (epoch, counter) = id.split_once('-').expect("an sst's id has two numbers");
            format!("main/sst/{}-{}", pad(epoch), pad(counter))
        }));
        named
    }

    /// That all the manifest needs is there and whole.
    pub fn check_whole(&self) {
        for name in self.named_by_the_manifest() {
            assert!(self.bodies.contains_key(&name), "the manifest names {name}, and it is not there");
            inspect(&self.bucket.join(name));
        }
    }
}

/// What `cistern inspect` says of a whole object.
///
/// # Panics
/// If it finds it damaged.
pub fn inspect(object: &Path) -> String {
    let said = Command::new(build_directory().join("cistern")).arg("inspect").arg(object).output();
    let said = said.expect("cistern starts");
    assert!(said.status.success(), "{}: {}", object.display(), String::from_utf8_lossy(&said.stderr));
    String::from_utf8_lossy(&said.stdout).into_owned()
}
