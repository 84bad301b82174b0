//! On a machine that has nothing yet, what a batch of rows needs is fetched at once, and the answers stay the same.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::time::{Duration, Instant};

use acceptance::server::Plan;
use mysql::Conn;
use mysql::prelude::Queryable;

const ROWS: u32 = 240_000;

fn counter(root: &mut Conn, name: &str) -> u64 {
    let row: Option<(String, u64)> =
        root.query_first(format!("SHOW GLOBAL STATUS LIKE 'cistern_{name}'")).expect("a counter");
    row.expect("a counter").1
}

#[test]
fn a_batch_on_an_empty_machine_is_fetched_at_once() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut plan = Plan::in_directory(directory.path());
    plan.server_options = vec!["--cistern-memtable-size=524288".to_owned()];
    let server = plan.started();
    let mut root = server.connect().expect("it is ready");
    root.query_drop("CREATE DATABASE b; USE b; CREATE TABLE t (id INT PRIMARY KEY, k INT NOT NULL, pad CHAR(200) NOT NULL, KEY k (k))")
        .expect("a table");
    for chunk in 0..ROWS / 1000 {
        let (from, to) = (chunk * 1000, chunk * 1000 + 999);
        root.query_drop(format!(
            "INSERT INTO t SELECT seq, seq * 7919 MOD {ROWS}, CONCAT(SHA2(seq, 512), SHA2(seq, 256)) FROM seq_{from}_to_{to}"
        ))
        .expect("rows");
    }
    // What is not published yet would be made anew from the wal, on the machine.
    let published = |root: &mut Conn| counter(root, "unuploaded_bytes") + counter(root, "edits_queued") == 0;
    let begun = Instant::now();
    while !published(&mut root) {
        assert!(begun.elapsed() < Duration::from_secs(60), "the rows do not reach the bucket");
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(root);
    server.stop();
    let heat = directory.path().join("bucket/main/heat");
    assert!(heat.exists(), "a heat map was written");

    let list: Vec<String> = (0..100).map(|n| (n * 599 % ROWS).to_string()).collect();
    let by_key = format!("SELECT id, k, pad FROM t WHERE id IN ({})", list.join(","));
    // The server takes what fits into a join buffer, sorts it, and reads.
    let join = format!(
        "SELECT t.id, t.k, t.pad FROM seq_0_to_99 s STRAIGHT_JOIN t FORCE INDEX (PRIMARY) ON t.id = s.seq * 599 MOD {ROWS}"
    );
    let some =
        "SELECT id, k, pad FROM t FORCE INDEX (k) WHERE k BETWEEN 500 AND 900 AND k MOD 2 = 0".to_owned();
    let backwards =
        "SELECT id, k, pad FROM t FORCE INDEX (k) WHERE k BETWEEN 500 AND 700 ORDER BY k DESC".to_owned();
    let by_index = "SELECT id, k, pad FROM t FORCE INDEX (k) WHERE k BETWEEN 500 AND 700".to_owned();
    for (number, (sql, setting, rows)) in [
        (&by_key, "mrr=off", 100),
        (&join, "mrr=on,mrr_cost_based=off,mrr_sort_keys=on", 100),
        (&by_index, "mrr=on,mrr_cost_based=off", 201),
        (&by_index, "mrr=off", 201),
        (&some, "mrr=off", 201),
        (&backwards, "mrr=off", 201),
    ]
    .into_iter()
    .enumerate()
    {
        // A new machine would begin to fetch what was hot on the one before, and how much of it is there in time is chance.
        if heat.exists() {
            std::fs::remove_dir_all(&heat).expect("the bucket is ours");
        }
        plan.data = directory.path().join(format!("elsewhere-{number}"));
        let server = plan.started();
        let mut root = server.connect().expect("it is ready");
        root.query_drop(format!("USE b; SET join_cache_level=6, optimizer_switch='{setting}'"))
            .expect("a setting");
        let before = counter(&mut root, "prefetched");
        let mut answer: Vec<(u32, u32, String)> = root.query(sql).expect("rows");
        let prefetched = counter(&mut root, "prefetched") - before;
        answer.sort();
        // 20 to 30, as levels happen to lie, but for what a first look-up fetched of all runs at once.
        assert!(prefetched > 10, "{prefetched} pieces were fetched ahead: {sql}");
        root.query_drop("SET optimizer_switch='mrr=off'").expect("a setting");
        let mut expected: Vec<(u32, u32, String)> =
            root.query(sql.replace("FORCE INDEX (k)", "IGNORE INDEX (k)")).expect("rows");
        expected.sort();
        assert_eq!((answer.len(), &answer), (rows, &expected));
        let fetched = counter(&mut root, "prefetched");
        root.query_drop(sql).expect("rows");
        assert_eq!(counter(&mut root, "prefetched"), fetched, "what is here is not fetched again");
    }
}
