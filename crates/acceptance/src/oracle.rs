//! The outside oracle: writers that remember what they were told, and a judge that compares it with what is there.
//!
//! * Each writer inserts pairs of rows, one transaction a pair, and moves money between accounts in the same transaction.
//! * Acknowledged and missing is *lost*; half a pair, or money made or destroyed, is *torn*; a pair that nobody acknowledged
//!   may be there, at most one for each connection.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use mysql::Conn;
use mysql::prelude::Queryable;

/// Accounts; their sum never changes.
pub const ACCOUNTS: u64 = 200;
const BALANCE: i64 = 1_000;

/// Makes the tables.
pub fn prepare(connection: &mut Conn) -> mysql::Result<()> {
    connection.query_drop("CREATE DATABASE IF NOT EXISTS crash")?;
    connection.query_drop(
        "CREATE TABLE crash.pair (client INT, seq BIGINT, half TINYINT, note VARCHAR(200), PRIMARY KEY (client, seq, half), KEY (note(20)))",
    )?;
    connection.query_drop("CREATE TABLE crash.filler (id INT AUTO_INCREMENT PRIMARY KEY, b LONGTEXT)")?;
    connection.query_drop("CREATE TABLE crash.account (id INT PRIMARY KEY, balance BIGINT NOT NULL)")?;
    for id in 0..ACCOUNTS {
        connection.query_drop(format!("INSERT INTO crash.account VALUES ({id}, {BALANCE})"))?;
    }
    Ok(())
}

/// What one writer was told.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    client: u64,
    /// The next pair it will write.
    next: u64,
    /// Acknowledged pairs not yet judged, with the moment of the answer.
    acknowledged: Vec<(u64, Instant)>,
    /// Pairs below this were judged before.
    judged: u64,
}

impl Memory {
    /// Of writers who were told nothing yet, one for each number. No two writers of one database share a number.
    pub fn of(clients: Range<u64>) -> Vec<Self> {
        clients.map(|client| Self { client, ..Self::default() }).collect()
    }
    /// How many pairs were acknowledged later than `moment`, of those not yet judged.
    pub fn acknowledged_after(&self, moment: Instant) -> usize {
        self.acknowledged.iter().filter(|(_, at)| *at > moment).count()
    }
}

/// Writers at work.
pub struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Memory>>,
}

impl Writers {
    /// Starts one writer for each of `memories` against the server on `port`.
    pub fn start(port: u16, memories: Vec<Memory>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = memories
            .into_iter()
            .map(|memory| {
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || write(port, memory, &stop))
            })
            .collect();
        Self { stop, threads }
    }
    /// Ends the writers (the server may be dead already) and returns what each was told.
    pub fn stop(self) -> Vec<Memory> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().map(|thread| thread.join().expect("a writer does not panic")).collect()
    }
}

fn write(port: u16, mut memory: Memory, stop: &AtomicBool) -> Memory {
    let client = memory.client;
    let Ok(mut connection) = crate::server::connect(port) else { return memory };
    let mut random = client.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ memory.next;
    while !stop.load(Ordering::Relaxed) {
        let seq = memory.next;
        // A failed commit may have taken effect, so its number is not used again.
        memory.next += 1;
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (from, to) = ((random >> 33) % ACCOUNTS, (random >> 45) % ACCOUNTS);
        match transaction(&mut connection, client, seq, from.min(to), from.max(to)) {
            Ok(()) => memory.acknowledged.push((seq, Instant::now())),
            Err(mysql::Error::MySqlError(error)) if matches!(error.code, 1205 | 1213) => {
                if connection.query_drop("ROLLBACK").is_err() {
                    break;
                }
            }
            Err(_) => break,
        }
    }
    memory
}

fn transaction(connection: &mut Conn, client: u64, seq: u64, low: u64, high: u64) -> mysql::Result<()> {
    connection.query_drop("START TRANSACTION")?;
    let note = format!("{client}-{seq}-{}", "x".repeat((seq % 100) as usize));
    connection.query_drop(format!("INSERT INTO crash.pair VALUES ({client}, {seq}, 0, '{note}')"))?;
    connection.query_drop(format!("UPDATE crash.account SET balance = balance - 1 WHERE id = {low}"))?;
    connection.query_drop(format!("INSERT INTO crash.pair VALUES ({client}, {seq}, 1, '{note}')"))?;
    connection.query_drop(format!("UPDATE crash.account SET balance = balance + 1 WHERE id = {high}"))?;
    connection.query_drop("COMMIT")
}

/// A connection that fills memtables: rows of 96 KiB, one after the other.
pub struct Filler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Filler {
    /// Starts it against the server on `port`, where [`prepare`] has been.
    pub fn start(port: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let Ok(mut connection) = crate::server::connect(port) else { return };
            let row = "INSERT INTO crash.filler (b) VALUES (REPEAT(MD5(RAND()), 3072))";
            while !stopped.load(Ordering::Relaxed) && connection.query_drop(row).is_ok() {}
        });
        Self { stop, thread }
    }
    /// Ends it; the server may be dead already.
    pub fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the filler does not panic");
    }
}

/// What the judge found after one recovery.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Acknowledged pairs seen again.
    pub kept: u64,
    /// Acknowledged pairs that are missing although the promise covers them.
    pub lost: u64,
    /// Acknowledged pairs that are missing within the time that the promise leaves open.
    pub forgone: u64,
    /// Half pairs, sums that do not add up, and indexes that disagree with their table.
    pub torn: u64,
    /// Pairs that are there although nobody was told.
    pub in_doubt: u64,
}

/// Compares. Pairs acknowledged later than `promise_ends` may be missing; `None` promises all.
pub fn judge(
    connection: &mut Conn,
    memories: &mut [Memory],
    promise_ends: Option<Instant>,
) -> mysql::Result<Verdict> {
    let mut verdict = Verdict::default();
    for memory in memories {
        let client = memory.client;
        let rows: Vec<(u64, u64)> = connection.query(format!(
            "SELECT seq, COUNT(*) FROM crash.pair WHERE client = {client} AND seq >= {} GROUP BY seq ORDER BY seq",
            memory.judged
        ))?;
        let there: std::collections::BTreeMap<u64, u64> = rows.into_iter().collect();
        verdict.torn += there.values().filter(|halves| **halves != 2).count() as u64;
        let told: std::collections::BTreeSet<u64> = memory.acknowledged.iter().map(|(seq, _)| *seq).collect();
        for (seq, at) in &memory.acknowledged {
            if there.contains_key(seq) {
                verdict.kept += 1;
            } else if promise_ends.is_some_and(|end| *at > end) {
                verdict.forgone += 1;
            } else {
                verdict.lost += 1;
            }
        }
        let doubtful = there.keys().filter(|seq| !told.contains(seq)).count() as u64;
        verdict.in_doubt += doubtful;
        if doubtful > 1 {
            verdict.torn += doubtful - 1;
        }
        memory.acknowledged.clear();
        memory.judged = memory.next;
    }
    let sum: Option<i64> =
        connection.query_first("SELECT CAST(SUM(balance) AS SIGNED) FROM crash.account")?;
    verdict.torn += u64::from(sum != Some(ACCOUNTS as i64 * BALANCE));
    let by_table: Option<u64> =
        connection.query_first("SELECT COUNT(*) FROM crash.pair FORCE INDEX (PRIMARY)")?;
    let by_index: Option<u64> =
        connection.query_first("SELECT COUNT(*) FROM crash.pair FORCE INDEX (note) WHERE note > ''")?;
    verdict.torn += u64::from(by_table != by_index);
    Ok(verdict)
}
