//! Reads by the first columns of an index pass over runs that hold nothing for them.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::sync::Arc;

use common::*;
use engine::{Background, Engine, Job, Parts, Settings, SimDisk, SystemClock};
use tables::{RangeEnd, ReadFlag, Store};

const RUNS: i64 = 6;

fn start(bucket: &Arc<bucket::MemoryBucket>) -> Arc<Store> {
    let parts = Parts {
        bucket: Arc::clone(bucket) as Arc<dyn bucket::Bucket>,
        disk: Arc::new(SimDisk::new(1)),
        clock: Arc::new(SystemClock::default()),
        seed: 1,
    };
    let mut settings = Settings { background: Background::Manual, ..Settings::default() };
    settings.shape.l0_runs = RUNS as usize;
    Store::open(Engine::open(parts, settings).unwrap(), Arc::new(Ascii)).unwrap()
}

/// An id, a customer, when, and something that takes room; by customer and time, by time alone, and with a unique number for each customer.
fn shape() -> Shape {
    let columns =
        [int(4), varchar(40, Text::CaselessWide).null(), int(8).null(), varchar(200, Text::Binary), int(4)];
    let keys = [
        unique(&[part(0)]),
        plain(&[part(1), part(2).desc()]),
        plain(&[part(2).desc()]),
        unique(&[part(4).desc(), part(1)]),
    ];
    Shape::new(&columns, &keys)
}

fn customer(number: i64) -> V {
    text(&format!("Customer  {number}"))
}

/// Customers `run`, `run + RUNS`, … have three orders each, all in one run.
fn fill(store: &Arc<Store>, t: &mut Handler, run: i64) {
    let mut s = session(store);
    for number in (run..300).step_by(RUNS as usize) {
        for order in 0..3 {
            let id = number * 10 + order;
            let unique = if order == 0 { number } else { 1000 + id };
            let row = [V::I(id), customer(number), V::I(id), V::B(vec![b'x'; 150]), V::I(unique)];
            t.insert(&mut s, &row).unwrap();
        }
    }
    s.commit().unwrap();
    store.engine().step(Job::Freeze).unwrap();
    store.engine().step(Job::Flush).unwrap();
}

fn blocks_read(store: &Store, read: impl FnOnce()) -> u64 {
    let count = || {
        let status = store.engine().status();
        status.get("block_cache_hits").unwrap() + status.get("block_cache_misses").unwrap()
    };
    let before = count();
    read();
    count() - before
}

/// Each of 300 absent customers by index 1, forward, backward and by estimate; times by index 2; numbers by index 3.
fn check(store: &Arc<Store>, t: &mut Handler) {
    let mut s = session(store);
    s.statement_begin();
    let flags = [ReadFlag::Exact, ReadFlag::Prefix, ReadFlag::PrefixLast];
    for number in 0..300 {
        for flag in flags {
            let found = t.read(&mut s, 1, &[customer(number)], flag).unwrap();
            assert_eq!(found[1], customer(number));
            let more = std::iter::from_fn(|| match flag {
                ReadFlag::PrefixLast => t.prev(&mut s).filter(|row| row[1] == customer(number)),
                _ => {
                    let tuple = t.shape.tuple(1, &[customer(number)]);
                    let found = t.cursor.next_same(&mut s, &tuple, &mut t.image).unwrap();
                    t.found(found)
                }
            });
            assert_eq!(more.count(), 2);
        }
    }
    let absent = blocks_read(store, || {
        for number in 0..300 {
            for flag in flags {
                assert_eq!(t.read(&mut s, 1, &[text(&format!("Customer  {number}x"))], flag), None);
                assert_eq!(t.read(&mut s, 2, &[V::I(number * 10 + 5)], flag), None);
                assert_eq!(t.read(&mut s, 3, &[V::I(300 + number)], flag), None);
            }
            let tuple = t.shape.tuple(1, &[text(&format!("Customer  {number}x"))]);
            let end = |flag| Some(RangeEnd { tuple: &tuple, flag });
            let range = t.table.records_in_range(1, end(ReadFlag::Exact), end(ReadFlag::After)).unwrap();
            assert_eq!(range, 1);
        }
    });
    assert!(absent < 3000 / 4, "{absent} blocks for 3000 look-ups of what is not there");
}

#[test]
fn a_read_by_the_first_columns_passes_over_runs_without_them() {
    let bucket = Arc::new(bucket::MemoryBucket::new());
    let store = start(&bucket);
    let mut t = create(&store, "d/t", &shape());
    (0..RUNS - 1).for_each(|run| fill(&store, &mut t, run));
    fill(&store, &mut t, RUNS - 1);
    check(&store, &mut t);
}

/// Nobody has opened the table when its runs are merged after a restart.
#[test]
fn what_is_merged_before_a_table_is_opened_has_its_filters() {
    let bucket = Arc::new(bucket::MemoryBucket::new());
    let store = start(&bucket);
    create(&store, "d/truncated", &shape()).table.truncate().unwrap();
    let mut t = create(&store, "d/t", &shape());
    t.table.truncate().unwrap();
    (0..RUNS).for_each(|run| fill(&store, &mut t, run));
    while store.engine().step(Job::Publish).unwrap() {}
    drop(t);
    store.close().unwrap();
    store.engine().close().unwrap();

    let store = start(&bucket);
    while store.engine().step(Job::Compact).unwrap() {}
    assert!(store.engine().status().get("compactions") > Some(0));
    let mut t = open(&store, "d/t", &shape());
    check(&store, &mut t);
}
