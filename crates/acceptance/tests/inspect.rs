//! What `cistern inspect` says to the person who was sent to look at an object.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::path::Path;
use std::process::{Command, Output};

use acceptance::objects::Objects;
use acceptance::server::{Plan, build_directory};

fn inspect(what: impl AsRef<Path>) -> Output {
    let command = Command::new(build_directory().join("cistern")).arg("inspect").arg(what.as_ref()).output();
    command.expect("cistern starts")
}

#[test]
fn every_object_of_a_bucket_is_told_in_words_and_a_damaged_one_by_name() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let plan = Plan::in_directory(scratch.path());
    assert_eq!(plan.started().stop().code(), 0);
    let bucket = scratch.path().join("bucket");
    let objects = Objects::now(&bucket).bodies;
    for (kind, word) in [
        ("epoch", "claim of epoch"),
        ("manifest/base", "base"),
        ("manifest/edit", "takes over"),
        ("wal", "wal slice"),
    ] {
        let told = objects.keys().filter(|name| name.starts_with(&format!("main/{kind}"))).map(|name| {
            let [by_path, by_url] =
                [inspect(bucket.join(name)), inspect(format!("file://{}/{name}", bucket.display()))];
            assert!(by_path.status.success(), "{name}: {}", String::from_utf8_lossy(&by_path.stderr));
            assert_eq!(by_path.stdout, by_url.stdout, "{name}");
            String::from_utf8_lossy(&by_path.stdout).into_owned()
        });
        let told: String = told.collect();
        assert!(told.contains(word), "{kind}: {told}");
    }

    let edit = objects.keys().find(|name| name.contains("/edit-")).expect("there is an edit");
    let mut damaged = objects[edit].clone();
    damaged[20] ^= 4;
    std::fs::write(bucket.join(edit), damaged).expect("the bucket is ours");
    for wrong in [bucket.join(edit), bucket.join("main/manifest/edit-00000000000000ff"), "edit-1".into()] {
        let said = inspect(&wrong);
        assert_eq!(said.status.code(), Some(2));
        let (said, name) = (String::from_utf8_lossy(&said.stderr).into_owned(), wrong.file_name());
        assert!(said.contains(&*name.expect("it has one").to_string_lossy()), "{said}");
    }
    let help = String::from_utf8_lossy(&inspect("--help").stdout).into_owned();
    assert!(help.contains("cistern inspect file:///") && help.contains("names.md"), "{help}");
}
