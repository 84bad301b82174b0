//! Several objects at once: a start waits for one round trip where it would have waited for many.

use bucket::{Bucket, ErrorKind, ObjectName};
use bytes::Bytes;

use crate::{Error, Kind, Result};

/// Each object, or `None` if there is none of that name, in the order of `names`; up to `at_once` requests are under way
/// at a time. With 1 no thread is started.
pub(crate) fn fetch_all(
    bucket: &dyn Bucket,
    names: &[ObjectName],
    at_once: usize,
) -> Vec<Result<Option<Bytes>>> {
    if at_once < 2 || names.len() < 2 {
        return names.iter().map(|name| fetch(bucket, name)).collect();
    }
    let mut objects = Vec::with_capacity(names.len());
    for group in names.chunks(at_once) {
        std::thread::scope(|scope| {
            let threads: Vec<_> = group.iter().map(|name| scope.spawn(move || fetch(bucket, name))).collect();
            let bug = || Err(Error::new(Kind::Bug, "a thread that fetched an object panicked"));
            objects.extend(threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bug())));
        });
    }
    objects
}

/// An object, or `None` if there is none of that name.
pub(crate) fn fetch(bucket: &dyn Bucket, name: &ObjectName) -> Result<Option<Bytes>> {
    match bucket.get(name) {
        Ok(object) => Ok(Some(object)),
        Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use bucket::{MemoryBucket, Names};

    use super::*;

    #[test]
    fn objects_come_in_the_order_they_were_asked_for_whatever_is_missing() {
        let bucket = MemoryBucket::new();
        let names: Vec<_> = (0..20).map(|number| Names::new("main").manifest_edit(number)).collect();
        for (number, name) in names.iter().enumerate().filter(|(number, _)| number % 3 != 0) {
            bucket.put(name, Bytes::from(vec![number as u8])).unwrap();
        }
        for at_once in [1, 2, 7, 100] {
            let objects = fetch_all(&bucket, &names, at_once);
            for (number, object) in objects.into_iter().enumerate() {
                let expected = (number % 3 != 0).then(|| Bytes::from(vec![number as u8]));
                assert_eq!(object.unwrap(), expected, "{number} of {at_once} at once");
            }
        }
    }
}
