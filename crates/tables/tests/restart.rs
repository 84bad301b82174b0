//! A process ends and another one starts: on the same disk, or on an empty one.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::sync::Arc;

use common::*;
use engine::{Engine, Parts, Settings, SimDisk, SystemClock};
use tables::{ReadFlag, Store};

fn shape() -> Shape {
    let mut shape = Shape::new(
        &[int(4), varchar(20, Text::Caseless), blob(4, Text::Binary).null()],
        &[unique(&[part(0)]), unique(&[part(1)])],
    );
    shape.auto_increment = Some(0);
    shape
}

fn start(bucket: &Arc<bucket::MemoryBucket>, disk: SimDisk) -> Arc<Store> {
    let parts = Parts {
        bucket: Arc::clone(bucket) as Arc<dyn bucket::Bucket>,
        disk: Arc::new(disk),
        clock: Arc::new(SystemClock::default()),
        seed: 1,
    };
    Store::open(Engine::open(parts, Settings::default()).unwrap(), Arc::new(Ascii)).unwrap()
}

fn stop(store: Arc<Store>) {
    store.close().unwrap();
    store.engine().close().unwrap();
}

#[test]
fn tables_files_and_counters_are_there_after_a_restart_with_and_without_the_disk() {
    let bucket = Arc::new(bucket::MemoryBucket::new());
    let disk = SimDisk::new(1);
    let store = start(&bucket, disk.clone());
    store.file_put("d/db.opt", b"utf8mb4").unwrap();
    create(&store, "d/empty", &shape());
    create(&store, "d/truncated", &shape()).table.truncate().unwrap();
    create(&store, "d/dropped", &shape());
    let mut t = create(&store, "d/t", &shape());
    let mut s = session(&store);
    let rows: Vec<Vec<V>> = (1..=50)
        .map(|id| vec![V::I(id), text(&format!("name {id}")), V::B(vec![id as u8; id as usize * 1000])])
        .collect();
    rows.iter().for_each(|row| t.insert(&mut s, row).unwrap());
    s.commit().unwrap();
    t.insert(&mut s, &[V::I(99), text("never committed"), V::Null]).unwrap();
    drop(s);
    store.drop_table("d/dropped").unwrap();
    drop(t);
    stop(store);

    for disk in [disk, SimDisk::new(2)] {
        let store = start(&bucket, disk);
        let mut names = Vec::new();
        store.list("d", &mut |name| names.push(name.to_owned())).unwrap();
        assert_eq!(names, ["empty", "t", "truncated"]);
        assert_eq!(store.file_get("d/db.opt").unwrap().as_deref(), Some(&b"utf8mb4"[..]));
        let (mut t, mut empty) = (open(&store, "d/t", &shape()), open(&store, "d/empty", &shape()));
        let mut truncated = open(&store, "d/truncated", &shape());
        let mut s = session(&store);
        s.statement_begin();
        assert_eq!(t.scan(&mut s, None), rows);
        assert_eq!(t.read(&mut s, 1, &[text("NAME 7")], ReadFlag::Exact), Some(rows[6].clone()));
        assert_eq!((t.table.row_count(), t.table.next_auto_increment()), (50, 51));
        // A table that had no row yet did not lend its trees to one that is made now.
        let mut fresh = create(&store, "d/fresh", &shape());
        fresh.insert(&mut s, &rows[0]).unwrap();
        for other in [&mut empty, &mut truncated] {
            assert_eq!(other.scan(&mut s, None), Vec::<Vec<V>>::new());
        }
        s.rollback();
        store.drop_table("d/fresh").unwrap();
        drop((t, empty, truncated, fresh, s));
        stop(store);
    }
}
