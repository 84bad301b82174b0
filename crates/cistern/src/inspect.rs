//! `cistern inspect`: one object of a bucket in words, or what is wrong with it. Changes nothing.

use std::io::Write;

use bucket::ObjectName;

use crate::location::Reach;
use crate::outcome::Outcome;

/// Say in words what one object of a bucket holds.
///
/// Shows claims, manifest bases and edits, slices of the wal and ssts. Keys are shown, values are not. An object that is
/// damaged is refused with what is wrong. Changes nothing, and may be used while servers run.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cistern inspect ./data/bucket/main/manifest/edit-0000000000000007
  cistern inspect file:///srv/bucket/main/epoch/0000000000000001
  cistern inspect s3://shop/production/main/wal/0000000000000002/0000000000000000 --region eu-central-1

What the objects are called is in docs/formats/names.md.")]
pub struct Arguments {
    /// A file, or the URL of an object: file:///bucket/main/… or s3://bucket/prefix/main/…
    #[arg(value_name = "FILE|URL")]
    object: String,
    #[command(flatten)]
    reach: Reach,
}

/// Writes to standard output.
pub fn inspect(arguments: &Arguments) -> Outcome {
    match try_inspect(arguments) {
        Ok(()) => Outcome::Clean,
        Err(outcome) => outcome,
    }
}

fn try_inspect(arguments: &Arguments) -> Result<(), Outcome> {
    let refuse = |message: String| Outcome::BadConfiguration(message);
    let (root, name) = split(&arguments.object).map_err(refuse)?;
    let object = if root.contains("://") {
        let bucket = bucket::open(&arguments.reach.url(&root), &bucket::Options::default());
        bucket.and_then(|bucket| bucket.get(&name)).map_err(Outcome::of_bucket)?.to_vec()
    } else {
        std::fs::read(&arguments.object).map_err(|error| refuse(format!("{}: {error}", arguments.object)))?
    };
    let words = engine::inspect_object(&name, &object).map_err(|error| refuse(error.to_string()))?;
    std::io::stdout().write_all(words.as_bytes()).map_err(|error| refuse(format!("standard output: {error}")))
}

/// The bucket and the object's name in it: `<branch>/<kind>/<file>`, or `<branch>/wal/<epoch>/<file>`.
fn split(object: &str) -> Result<(String, ObjectName), String> {
    let (place, parameters) = match object.split_once('?') {
        Some((place, parameters)) if place.contains("://") => (place, format!("?{parameters}")),
        _ => (object, String::new()),
    };
    let parts: Vec<&str> = place.split('/').collect();
    let of_wal = parts.len().checked_sub(3).is_some_and(|at| parts[at] == "wal");
    let root = parts.len().checked_sub(if of_wal { 4 } else { 3 });
    let Some((root, name)) = root.map(|root| parts.split_at(root)) else {
        return Err(format!(
            "{object}: an object's name ends in its branch, kind and number: main/manifest/edit-…"
        ));
    };
    Ok((format!("{}{parameters}", root.join("/")), ObjectName::from_listing(name.join("/"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_split_from_its_bucket() {
        for (object, root, name) in [
            ("file:///srv/b/main/epoch/01", "file:///srv/b", "main/epoch/01"),
            ("s3://shop/a/b/main/wal/01/02", "s3://shop/a/b", "main/wal/01/02"),
            ("s3://shop/main/sst/1-2?region=x", "s3://shop?region=x", "main/sst/1-2"),
            ("main/manifest/edit-1", "", "main/manifest/edit-1"),
            ("/b/main/wal/01/02", "/b", "main/wal/01/02"),
        ] {
            let (found_root, found) = split(object).unwrap();
            assert_eq!((found_root.as_str(), found.as_str()), (root, name), "{object}");
        }
        assert!(split("edit-1").unwrap_err().contains("edit-1"));
    }
}
