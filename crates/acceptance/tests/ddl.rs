//! What was acknowledged of views, triggers and databases is there after kill -9: the server keeps them in files, and tells no engine.
//!
//! A client runs random statements and keeps what each of them left. The server is killed right after an answer, or in the middle
//! of a statement; then the server's own lists must say what the client remembers.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use acceptance::server::{Plan, Server};
use mysql::Conn;
use mysql::prelude::Queryable;
use rustix::process::{Signal, kill_process};

/// What there is: `d1` → its character set, `d1/t` → a table, `d1/v2` → a view's number, `d1/t/r1` → a trigger's.
type State = BTreeMap<String, String>;

const DATABASES: u64 = 3;
const CHARACTER_SETS: [&str; 3] = ["latin1", "utf8mb4", "ascii"];

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// One statement, and what is there after it.
struct Step {
    sql: String,
    after: State,
    /// The database that a stop in the middle may leave half made or half gone: the server's steps are several then.
    in_steps: Option<String>,
}

fn without(state: &State, name: &str) -> State {
    let below = format!("{name}/");
    state
        .iter()
        .filter(|(key, _)| *key != name && !key.starts_with(&below))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn with(state: &State, name: String, value: &str) -> State {
    let mut state = state.clone();
    state.insert(name, value.to_owned());
    state
}

fn next(state: &State, random: &mut Random, number: u64) -> Step {
    let d = format!("d{}", random.below(DATABASES));
    let set = CHARACTER_SETS[random.below(3) as usize];
    let (table, view) = (format!("{d}/t"), format!("{d}/v{}", random.below(3)));
    let trigger = format!("{table}/r{}", random.below(2));
    let sql_name = |path: &str| path.replace("/t/", "/").replace('/', ".");
    let text = number.to_string();
    let step = |sql: String, after: State| Step { sql, after, in_steps: None };
    let stepwise = |sql: String, after: State| Step { sql, after, in_steps: Some(d.clone()) };
    if !state.contains_key(&d) {
        return stepwise(format!("CREATE DATABASE {d} CHARACTER SET {set}"), with(state, d.clone(), set));
    }
    match random.below(10) {
        0 => stepwise(format!("DROP DATABASE {d}"), without(state, &d)),
        1 => stepwise(format!("ALTER DATABASE {d} CHARACTER SET {set}"), with(state, d.clone(), set)),
        2 if state.contains_key(&table) => stepwise(format!("DROP TABLE {d}.t"), without(state, &table)),
        3 | 4 if state.contains_key(&view) => {
            step(format!("DROP VIEW {}", sql_name(&view)), without(state, &view))
        }
        5 if state.contains_key(&trigger) => {
            step(format!("DROP TRIGGER {}", sql_name(&trigger)), without(state, &trigger))
        }
        6 | 7 if state.contains_key(&table) => {
            let sql = format!(
                "CREATE OR REPLACE TRIGGER {} BEFORE INSERT ON {d}.t FOR EACH ROW SET NEW.v = {number}",
                sql_name(&trigger)
            );
            step(sql, with(state, trigger, &text))
        }
        2..=7 if !state.contains_key(&table) => {
            step(format!("CREATE TABLE {d}.t (v INT)"), with(state, table, ""))
        }
        _ => {
            let sql = format!("CREATE OR REPLACE VIEW {} AS SELECT {number} AS n", sql_name(&view));
            step(sql, with(state, view, &text))
        }
    }
}

fn observed(server: &Server) -> State {
    let mut root = server.connect().expect("it is ready");
    let mut ask = |query: &str| -> Vec<(String, String)> {
        root.query(query).unwrap_or_else(|error| panic!("{query}: {error}"))
    };
    let mut state = State::new();
    state.extend(ask(
        "SELECT SCHEMA_NAME, DEFAULT_CHARACTER_SET_NAME FROM information_schema.SCHEMATA WHERE SCHEMA_NAME LIKE 'd_'",
    ));
    state.extend(ask("SELECT CONCAT(TABLE_SCHEMA, '/', TABLE_NAME), '' FROM information_schema.TABLES \
         WHERE TABLE_SCHEMA LIKE 'd_' AND TABLE_TYPE = 'BASE TABLE'"));
    state.extend(ask(
        "SELECT CONCAT(TRIGGER_SCHEMA, '/t/', TRIGGER_NAME), REPLACE(ACTION_STATEMENT, 'SET NEW.v = ', '') \
         FROM information_schema.TRIGGERS WHERE TRIGGER_SCHEMA LIKE 'd_'",
    ));
    let views =
        ask("SELECT TABLE_SCHEMA, TABLE_NAME FROM information_schema.VIEWS WHERE TABLE_SCHEMA LIKE 'd_'");
    for (database, view) in views {
        let n: Option<String> =
            root.query_first(format!("SELECT CAST(n AS CHAR) FROM {database}.{view}")).expect("a view");
        state.insert(format!("{database}/{view}"), n.expect("one row"));
    }
    state
}

/// What a client saw: each state, and when it was answered for. The last one may be of a statement without an answer.
struct Story {
    states: Vec<(Instant, State)>,
    unanswered: Option<Step>,
    /// Of the statement that led from a state to the next one.
    in_steps: Vec<Option<String>>,
}

impl Story {
    fn begin(state: State) -> Self {
        Self { states: vec![(Instant::now(), state)], unanswered: None, in_steps: vec![] }
    }

    fn last(&self) -> &State {
        &self.states.last().expect("it begins with one").1
    }

    /// Whether `found` is what was between the answer to statement `index` and that to the next one.
    fn explains(&self, index: usize, found: &State) -> bool {
        let (_, state) = &self.states[index];
        let next = match self.states.get(index + 1) {
            Some((_, after)) => Some((after, &self.in_steps[index])),
            None => self.unanswered.as_ref().map(|step| (&step.after, &step.in_steps)),
        };
        let Some((after, in_steps)) = next else { return found == state };
        let half = |database: &String| without(found, database) == without(state, database);
        found == state || found == after || in_steps.as_ref().is_some_and(half)
    }

    fn tell(&self) -> String {
        let last: Vec<_> = self.states.iter().rev().take(3).map(|(_, state)| state).collect();
        let unanswered = self.unanswered.as_ref().map(|step| &step.sql);
        format!("the last states were {last:#?}\nunanswered: {unanswered:?}")
    }
}

/// Runs statements until the server is dead: killed by this thread right after answer number `answers`, or by another one soon after
/// it.
fn run(server: &Server, story: &mut Story, random: &mut Random, number: &mut u64, answers: u64, exact: bool) {
    let mut root: Conn = server.connect().expect("it is ready");
    let pid = server.mariadbd_pid().expect("it runs");
    let end = move || kill_process(pid, Signal::KILL).expect("it runs");
    let mut killer = None;
    for answer in 0.. {
        if answer == answers && exact {
            return end();
        }
        if answer == answers {
            let pause = Duration::from_micros(random.below(6_000));
            killer = Some(std::thread::spawn(move || {
                std::thread::sleep(pause);
                end();
            }));
        }
        *number += 1;
        let step = next(story.last(), random, *number);
        match root.query_drop(&step.sql) {
            Ok(()) => {
                story.states.push((Instant::now(), step.after));
                story.in_steps.push(step.in_steps);
            }
            Err(error) if killer.is_some() => {
                assert!(!matches!(error, mysql::Error::MySqlError(_)), "{}: {error}", step.sql);
                story.unanswered = Some(step);
                break;
            }
            Err(error) => panic!("{}: {error}", step.sql),
        }
    }
    killer.expect("only it ends the loop").join().expect("no panic");
}

fn start(plan: &Plan) -> Server {
    plan.start().unwrap_or_else(|ended| panic!("cistern did not start:\n{}", ended.said))
}

#[test]
fn no_acknowledged_view_trigger_or_database_is_undone_by_a_kill() {
    const KILLS: u64 = 10;
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let plan = Plan::in_directory(scratch.path());
    let (mut random, mut number) = (Random(7), 0);
    let mut server = start(&plan);
    let mut state = observed(&server);
    for cycle in 0..KILLS {
        let mut story = Story::begin(state);
        let answers = 3 + random.below(12);
        run(&server, &mut story, &mut random, &mut number, answers, cycle % 3 != 2);
        server.kill();
        server = start(&plan);
        state = observed(&server);
        let last = story.states.len() - 1;
        assert!(story.explains(last, &state), "cycle {cycle}: found {state:#?}\n{}", story.tell());
    }
    println!("{number} statements, {KILLS} kills");
}

#[test]
fn the_loss_of_the_directory_costs_a_second_of_views_triggers_and_databases() {
    const PROMISE: Duration = Duration::from_millis(1_000);
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let plan = Plan::in_directory(scratch.path());
    let (mut random, mut number) = (Random(11), 0);
    let mut server = start(&plan);
    let mut state = observed(&server);
    for cycle in 0..3 {
        let mut story = Story::begin(state);
        let answers = 60 + random.below(60);
        run(&server, &mut story, &mut random, &mut number, answers, true);
        let killed = Instant::now();
        server.kill();
        fs::remove_dir_all(&plan.data).expect("the data directory can be deleted");
        server = start(&plan);
        state = observed(&server);
        // A state counts until the answer to the statement after it.
        let replaced = |index: usize| story.states.get(index + 1).map_or(killed, |(at, _)| *at);
        let recent = |index: &usize| replaced(*index) + PROMISE >= killed;
        let explained =
            (0..story.states.len()).filter(recent).rev().find(|index| story.explains(*index, &state));
        let Some(index) = explained else {
            panic!("cycle {cycle}: found {state:#?}\n{}", story.tell());
        };
        println!(
            "cycle {cycle}: {} of {} statements lost",
            story.states.len() - 1 - index,
            story.states.len() - 1
        );
    }
}
