//! What every bucket promises, whatever stands behind it. Each check works below a directory of its own.

use std::sync::Barrier;

use bucket::{Bucket, ErrorKind, ObjectName, PutOutcome};
use bytes::Bytes;

/// Runs all checks below `directory`, which nothing else uses.
///
/// A conditional put may say `Exists` though this very call created the object, when `answers_get_lost`.
pub fn check_all(bucket: &dyn Bucket, directory: &str, answers_get_lost: bool) {
    let below = |check: &str| format!("{directory}/{check}");
    an_object_is_read_as_it_was_written(bucket, &below("read"));
    what_does_not_exist_is_not_found(bucket, &below("absent"));
    a_conditional_put_never_replaces(bucket, &below("conditional"), answers_get_lost);
    one_of_many_writers_creates_a_name(bucket, &below("race"), answers_get_lost);
    ranges_come_in_the_order_asked(bucket, &below("ranges"));
    ranges_beyond_the_end_are_refused(bucket, &below("beyond"));
    a_listing_is_sorted_and_stays_below_its_directory(bucket, &below("list"));
    deleting_twice_is_fine(bucket, &below("delete"));
    requests_and_bytes_are_counted(bucket, &below("meters"));
}

pub fn name(directory: &str, rest: &str) -> ObjectName {
    ObjectName::from_listing(format!("{directory}/{rest}"))
}

/// `length` bytes that tell where they are.
pub fn body(length: usize) -> Bytes {
    (0..length).map(|at| (at / 7 + at) as u8).collect::<Vec<_>>().into()
}

fn create(bucket: &dyn Bucket, name: &ObjectName, body: Bytes, answers_get_lost: bool) {
    let outcome = bucket.put_if_absent(name, body).unwrap();
    assert!(outcome == PutOutcome::Created || answers_get_lost, "{name} exists before anybody made it");
}

fn an_object_is_read_as_it_was_written(bucket: &dyn Bucket, directory: &str) {
    for (file, length) in [("empty", 0), ("one", 1), ("deep/er/two", 2), ("large", 300_000)] {
        let name = name(directory, file);
        bucket.put(&name, body(length)).unwrap();
        bucket.put(&name, body(length)).unwrap();
        assert_eq!(bucket.get(&name).unwrap(), body(length), "{name}");
        assert_eq!(bucket.head(&name).unwrap(), Some(length as u64), "{name}");
    }
}

fn what_does_not_exist_is_not_found(bucket: &dyn Bucket, directory: &str) {
    let name = name(directory, "never");
    assert_eq!(bucket.get(&name).unwrap_err().kind, ErrorKind::NotFound);
    let ranged = bucket.get_ranges(&name, std::slice::from_ref(&(0..1))).unwrap_err();
    assert_eq!(ranged.kind, ErrorKind::NotFound, "{ranged}");
    assert_eq!(bucket.head(&name).unwrap(), None);
    assert!(bucket.list(&ObjectName::from_listing(format!("{directory}/nothing/"))).unwrap().is_empty());
}

fn a_conditional_put_never_replaces(bucket: &dyn Bucket, directory: &str, answers_get_lost: bool) {
    let name = name(directory, "claim");
    create(bucket, &name, body(10), answers_get_lost);
    assert_eq!(bucket.put_if_absent(&name, body(20)).unwrap(), PutOutcome::Exists);
    assert_eq!(bucket.get(&name).unwrap(), body(10));
}

fn one_of_many_writers_creates_a_name(bucket: &dyn Bucket, directory: &str, answers_get_lost: bool) {
    const WRITERS: usize = 4;
    for round in 0..5 {
        let name = name(directory, &format!("epoch-{round}"));
        let start = Barrier::new(WRITERS);
        let created: Vec<usize> = std::thread::scope(|scope| {
            let (name, start) = (&name, &start);
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    scope.spawn(move || {
                        start.wait();
                        bucket.put_if_absent(name, vec![writer as u8; 1000].into()).unwrap()
                    })
                })
                .collect();
            let outcomes = writers.into_iter().map(|writer| writer.join().unwrap()).enumerate();
            outcomes
                .filter(|(_, outcome)| *outcome == PutOutcome::Created)
                .map(|(writer, _)| writer)
                .collect()
        });
        let stored = bucket.get(&name).unwrap();
        assert_eq!(stored.len(), 1000);
        assert!(stored.iter().all(|byte| *byte == stored[0]), "{name} is a mixture of two writers");
        assert!(created.len() <= 1, "{name} was created by {created:?}");
        assert!(created.len() == 1 || answers_get_lost, "nobody created {name}");
        assert!(created.iter().all(|writer| stored[0] == *writer as u8), "{name} is not its creator's");
    }
}

fn ranges_come_in_the_order_asked(bucket: &dyn Bucket, directory: &str) {
    let name = name(directory, "sst");
    let whole = body(3_000_000);
    bucket.put(&name, whole.clone()).unwrap();
    let asked = [2_900_000..3_000_000, 0..1, 100..100, 0..70_000, 65_000..80_000, 1_500_000..1_500_010, 5..9];
    let answered = bucket.get_ranges(&name, &asked).unwrap();
    assert_eq!(answered.len(), asked.len());
    for (range, bytes) in asked.iter().zip(answered) {
        assert_eq!(bytes, whole.slice(range.start as usize..range.end as usize), "{range:?}");
    }
    assert!(bucket.get_ranges(&name, &[]).unwrap().is_empty());
}

fn ranges_beyond_the_end_are_refused(bucket: &dyn Bucket, directory: &str) {
    let name = name(directory, "short");
    bucket.put(&name, body(100)).unwrap();
    for range in [90..101, 100..101, 200..300] {
        let error = bucket.get_ranges(&name, &[0..10, range.clone()]).unwrap_err();
        assert_eq!(error.kind, ErrorKind::BadRequest, "{range:?}: {error}");
    }
}

fn a_listing_is_sorted_and_stays_below_its_directory(bucket: &dyn Bucket, directory: &str) {
    // `-` sorts before `/`: a walk of directories in order would put `a-1` last.
    for file in ["wal/a/2", "wal/a/1", "wal/a-1", "wal/b", "wall/c"] {
        bucket.put(&name(directory, file), body(file.len())).unwrap();
    }
    let listing = bucket.list(&name(directory, "wal/")).unwrap();
    let names: Vec<&str> = listing.iter().map(|entry| &entry.name.as_str()[directory.len() + 1..]).collect();
    assert_eq!(names, ["wal/a-1", "wal/a/1", "wal/a/2", "wal/b"]);
    assert_eq!(listing.iter().map(|entry| entry.bytes).collect::<Vec<_>>(), [7, 7, 7, 5]);
    assert_eq!(bucket.list(&name(directory, "wa")).unwrap_err().kind, ErrorKind::BadRequest);
}

fn deleting_twice_is_fine(bucket: &dyn Bucket, directory: &str) {
    let names: Vec<_> = (0..5).map(|i| name(directory, &format!("sst & <more> {i}"))).collect();
    for name in &names {
        bucket.put(name, body(1)).unwrap();
    }
    bucket.delete(&names[1..]).unwrap();
    let left = bucket.list(&name(directory, "")).unwrap();
    assert_eq!(left.iter().map(|entry| &entry.name).collect::<Vec<_>>(), [&names[0]]);
    bucket.delete(&names).unwrap();
    bucket.delete(&names).unwrap();
    bucket.delete(&[]).unwrap();
    assert!(bucket.list(&name(directory, "")).unwrap().is_empty());
}

fn requests_and_bytes_are_counted(bucket: &dyn Bucket, directory: &str) {
    let meters = bucket.meters();
    let (puts, put_bytes, got_bytes) = (meters.put.requests(), meters.put.bytes(), meters.get.bytes());
    let name = name(directory, "counted");
    bucket.put(&name, body(1000)).unwrap();
    bucket.get(&name).unwrap();
    assert!(meters.put.requests() > puts);
    assert!(meters.put.bytes() >= put_bytes + 1000);
    assert!(meters.get.bytes() >= got_bytes + 1000);
}
