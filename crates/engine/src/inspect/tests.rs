//! Each object below was written by format version 1 and must be read for ever. The files were written by the first
//! program that had these formats; a test that wants them changed is wrong, unless it adds a version.

use std::path::PathBuf;
use std::sync::Arc;

use bucket::{Bucket, MemoryBucket};

use super::*;
use crate::recovery::{RecoveryParts, recover};
use crate::wal::WalLimits;
use crate::{Disk, SimDisk, TreeId, full_key};

fn fixture(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/v1").join(file)
}

/// A short life on a new branch, the same each time.
fn life() -> (SimDisk, Arc<MemoryBucket>) {
    let bucket = Arc::new(MemoryBucket::new());
    let disk = SimDisk::new(1);
    let limits = WalLimits { segment_bytes: 512, ..WalLimits::default() };
    let start = |seed| {
        let parts = RecoveryParts {
            bucket: bucket.clone(),
            disk: Arc::new(disk.clone()),
            names: Names::new("main"),
            seed,
            limits,
            fetches: 1,
        };
        recover(parts, &mut |_, _| Ok(())).unwrap()
    };
    let first = start(1);
    let mut seqno = first.next_seqno;
    let ops = [
        Op::Put(&full_key(TreeId(70), b"apple"), b"red"),
        Op::Put(&full_key(TreeId(70), b"pear"), b""),
        Op::Delete(&full_key(TreeId(70), b"apple")),
        Op::DropTree(TreeId(71)),
    ];
    for op in ops {
        let mut slot = first.wal.reserve(op.encoded_len(), seqno).unwrap();
        slot.write(op);
        let end = slot.finish();
        first.wal.sync_to(end).unwrap();
        seqno.0 += 1;
    }
    drop(first.wal.reserve(4, seqno).unwrap());
    first.wal.sync_to(first.wal.end()).unwrap();
    assert!(first.uploader.step().unwrap());
    start(2);
    (disk, bucket)
}

#[test]
fn files_of_version_1_are_written_and_read_byte_for_byte() {
    let (disk, bucket) = life();
    let mut files: Vec<(String, Vec<u8>)> = bucket
        .contents()
        .into_iter()
        .map(|(name, body)| (name.as_str().replace('/', "_"), body.to_vec()))
        .collect();
    for name in disk.list("wal").unwrap() {
        let file = disk.open(&name).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_at(0, &mut bytes).unwrap();
        files.push((format!("local_{}", name.replace('/', "_")), bytes));
    }
    assert_eq!(files.len(), 7, "{:?}", files.iter().map(|(name, _)| name).collect::<Vec<_>>());
    for (name, bytes) in files {
        let path = fixture(&name);
        if std::env::var_os("WRITE_FIXTURES").is_some() {
            std::fs::write(&path, &bytes).unwrap();
        }
        let kept = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(kept == bytes, "{name} is not what version 1 wrote");
    }
}

#[test]
fn what_version_1_left_is_told_in_words() {
    let bucket = MemoryBucket::new();
    let mut told = String::new();
    let mut names: Vec<_> =
        std::fs::read_dir(fixture("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    for file in names.iter().map(|name| name.to_str().unwrap()).filter(|name| name.starts_with("main_")) {
        let name = ObjectName::from_listing(file.replace('_', "/"));
        bucket.put(&name, std::fs::read(fixture(file)).unwrap().into()).unwrap();
        told += &inspect_object(&name, &bucket.get(&name).unwrap()).unwrap();
    }
    let expected = "\
claim of epoch 1 by node c15c0289ec2d
claim of epoch 2 by node c15c0289ec2d
base 0, last edited by epoch 0
";
    assert!(told.starts_with(expected), "{told}");
    for part in [
        "edit 1 by epoch 1\ntakes over; its wal begins at 0x0\n",
        "edit 2 by epoch 2\ntakes over; its wal begins at 0xce\n",
        "wal slice of epoch 1, from 0x0, 206 bytes of records\n",
        "seqno 1 put 000000466170706c65 (3 bytes)\n",
        "seqno 3 delete 000000466170706c65\n",
        "seqno 4 drop tree 71\n",
        "seqno 5 void\n",
    ] {
        assert!(told.contains(part), "{part} is not in\n{told}");
    }
}

#[test]
fn a_damaged_object_is_told_too() {
    let names = Names::new("main");
    for name in [
        names.claim(1),
        names.manifest_base(0),
        names.manifest_edit(1),
        names.wal_slice(1, 0),
        names.sst(1, 2),
    ] {
        let error = inspect_object(&name, b"garbage").unwrap_err();
        assert!(error.kind() == Kind::Corrupt && error.to_string().contains(name.as_str()), "{error}");
    }
    let stray = ObjectName::from_listing("main/stray");
    assert_eq!(inspect_object(&stray, b"").unwrap_err().kind(), Kind::BadRequest);
}
