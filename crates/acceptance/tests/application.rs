//! A real application's life: a dump of a million rows with views, triggers and procedures, and thirty analytical
//! queries, each compared with InnoDB's answer.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use acceptance::company;
use acceptance::server::{Peer, Plan, connect, server_env};
use mysql::prelude::Queryable;
use mysql::{Row, Value};

#[test]
fn a_dump_of_a_million_rows_answers_as_innodb_does() {
    let scale = std::env::var("COMPANY_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1.0);
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let dump = scratch.path().join("company.sql");
    let mut file = BufWriter::new(File::create(&dump).expect("the dump can be written"));
    company::dump(&mut file, scale, 42).and_then(|()| file.flush()).expect("the dump can be written");

    let plan = Plan::in_directory(scratch.path());
    let ours = plan.start().unwrap_or_else(|ended| panic!("cistern did not start:\n{}", ended.said));
    let peer = Peer::start(scratch.path(), &[]);
    load(ours.port(), &dump, "cistern");
    load(peer.port(), &dump, "innodb");
    compare(ours.port(), peer.port(), "after the load");

    for change in company::CHANGES {
        for port in [ours.port(), peer.port()] {
            let mut connection = connect(port).expect("it is ready");
            connection.query_drop("USE company").expect("the dump made it");
            connection.query_drop(change).unwrap_or_else(|error| panic!("{change} on port {port}: {error}"));
        }
    }
    compare(ours.port(), peer.port(), "after the changes");

    // Everything is in the bucket: without the directory, the answers are the same.
    let ended = ours.stop();
    assert_eq!(ended.code(), 0, "{}", ended.said);
    std::fs::remove_dir_all(&plan.data).expect("the data directory can be deleted");
    let ours = plan.start().unwrap_or_else(|ended| panic!("cistern did not start:\n{}", ended.said));
    eprintln!("ready from an empty directory in {:.2} s", ours.ready_in().as_secs_f64());
    compare(ours.port(), peer.port(), "from an empty directory");
    let programs = "SELECT * FROM (SELECT ROUTINE_NAME n FROM information_schema.ROUTINES WHERE ROUTINE_SCHEMA='company' UNION ALL \
        SELECT TRIGGER_NAME FROM information_schema.TRIGGERS WHERE TRIGGER_SCHEMA='company' UNION ALL \
        SELECT TABLE_NAME FROM information_schema.VIEWS WHERE TABLE_SCHEMA='company' UNION ALL \
        SELECT EVENT_NAME FROM information_schema.EVENTS WHERE EVENT_SCHEMA='company') x ORDER BY n";
    let names = answer(ours.port(), programs);
    assert_eq!(names.len(), 7, "{names:?}");
    assert_eq!(names, answer(peer.port(), programs));
}

fn load(port: u16, dump: &Path, name: &str) {
    let start = Instant::now();
    let output = Command::new(server_env("MARIADB_CLIENT"))
        .args([
            "--no-defaults",
            "-h127.0.0.1",
            "-uroot",
            "--default-character-set=utf8mb4",
            "--max-allowed-packet=64M",
        ])
        .arg(format!("-P{port}"))
        .stdin(File::open(dump).expect("just written"))
        .output()
        .expect("the client starts");
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    eprintln!("{name}: dump loaded in {:.1} s", start.elapsed().as_secs_f64());
}

fn compare(ours: u16, theirs: u16, when: &str) {
    let mut differences = vec![];
    for query in company::QUERIES {
        let start = Instant::now();
        let our_answer = answer(ours, query);
        let our_time = start.elapsed();
        let start = Instant::now();
        let their_answer = answer(theirs, query);
        eprintln!(
            "{:8.3} s, innodb {:8.3} s: {query}",
            our_time.as_secs_f64(),
            start.elapsed().as_secs_f64()
        );
        assert!(!their_answer.is_empty() || query.contains("WHERE"), "the query asks nothing: {query}");
        if our_answer != their_answer {
            let first = our_answer.iter().zip(&their_answer).find(|(a, b)| a != b);
            differences.push(format!(
                "{query}\n  {} rows, innodb {}; first difference {first:?}",
                our_answer.len(),
                their_answer.len()
            ));
        }
    }
    assert!(differences.is_empty(), "{when}: {} differences\n{}", differences.len(), differences.join("\n"));
}

fn answer(port: u16, query: &str) -> Vec<Vec<Value>> {
    let mut connection = connect(port).expect("it is ready");
    connection.query_drop("SET time_zone='+00:00'").expect("a setting");
    connection.query_drop("USE company").expect("the dump made it");
    let rows: Vec<Row> = connection.query(query).unwrap_or_else(|error| panic!("{query}: {error}"));
    rows.into_iter().map(Row::unwrap).collect()
}
