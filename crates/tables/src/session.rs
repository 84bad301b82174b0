//! A connection's transaction: statements, savepoints, row counts that follow commit and rollback.
//!
//! * What a transaction did to a table's row count reaches the table when it commits, not before, and not if it rolls back.
//! * The next auto-increment value of each table that got rows is written with the commit, so a restart knows it.

use std::sync::Arc;
use std::time::Duration;

use engine::{Granted, Interrupt, Isolation, Kind, LockMode, LockWait, Mark, ReadAs, TreeId, Txn};

use crate::bulk::Fresh;
use crate::catalogue::{CATALOGUE, Space, TABLE_LOCKS, Trees, mark_key, table_key};
use crate::table::{Table, TableState};
use crate::{Result, Store};

const LOCK_TIMEOUT: Duration = Duration::from_secs(50);
/// How long a write waits for whoever fills the table: as long as for an ALTER TABLE (the default of `lock_wait_timeout`). A large load takes
/// longer than any wait for a row should.
const FILLED_TIMEOUT: Duration = Duration::from_secs(86_400);

/// A place to roll back to. Means nothing after the end of its transaction.
#[derive(Clone, Copy, Debug)]
pub struct Savepoint {
    mark: Mark,
    counts_start: usize,
    counts_end: usize,
}

/// One connection's transactions, one after another. Driven by one thread at a time; dropping it rolls back.
pub struct Session {
    pub(crate) txn: Txn,
    store: Arc<Store>,
    interrupted: Interrupted,
    /// Told how much of how much is done.
    progress: Box<dyn Fn(u64, u64) + Send>,
    lock_timeout: Duration,
    repeatable: bool,
    finds_conflicts: bool,
    snapshot_taken: bool,
    /// Grows with each statement, commit and rollback: cursors opened before must look again.
    serial: u64,
    /// Grows with each write or rollback of writes.
    writes: u64,
    changes: Vec<TableChange>,
    /// Counts of `changes` at each savepoint of this transaction.
    history: Vec<Counts>,
    statement: Option<Savepoint>,
    statement_history: Vec<Counts>,
    exchanges: Vec<Exchange>,
}

/// Whether the session's statement is to end.
pub(crate) type Interrupted = Arc<dyn Fn() -> bool + Send + Sync>;

/// A table gets other trees with the commit.
struct Exchange {
    table: Arc<TableState>,
    old: Trees,
    new: Trees,
    fresh: Fresh,
}

/// The slots of auto-increment marks that a commit writes to.
#[derive(Default)]
struct Marks(Vec<(Arc<TableState>, u16)>);

impl Marks {
    fn take(&mut self, table: &Arc<TableState>) -> u16 {
        let slot = table.take_mark_slot();
        self.0.push((Arc::clone(table), slot));
        slot
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        for (table, slot) in &self.0 {
            table.give_mark_slot(*slot);
        }
    }
}

struct TableChange {
    table: Arc<TableState>,
    counts: Counts,
}

/// What a transaction did to a table.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) rows: i64,
    pub(crate) changed: u64,
    pub(crate) auto_increment: bool,
}

impl Session {
    pub(crate) fn new(store: Arc<Store>, interrupted: Interrupted) -> Self {
        Self {
            txn: store.engine().begin(),
            store,
            interrupted,
            progress: Box::new(|_, _| ()),
            lock_timeout: LOCK_TIMEOUT,
            repeatable: true,
            finds_conflicts: true,
            snapshot_taken: false,
            serial: 0,
            writes: 0,
            changes: Vec::new(),
            history: Vec::new(),
            statement: None,
            statement_history: Vec::new(),
            exchanges: Vec::new(),
        }
    }

    /// Isolation for the transaction that has not read or written yet: true is REPEATABLE READ, false READ COMMITTED.
    pub fn set_repeatable_read(&mut self, yes: bool) {
        self.repeatable = yes;
        self.txn.set_isolation(if yes { Isolation::RepeatableRead } else { Isolation::ReadCommitted });
    }
    /// Whether a write in REPEATABLE READ to a row that changed after the snapshot fails (it does unless told otherwise).
    pub fn set_conflict_detection(&mut self, on: bool) {
        self.finds_conflicts = on;
        self.txn.set_conflict_detection(on);
    }
    /// Whom long work tells now and then how much of how much is done.
    pub fn set_progress(&mut self, progress: Box<dyn Fn(u64, u64) + Send>) {
        self.progress = progress;
    }
    /// START TRANSACTION WITH CONSISTENT SNAPSHOT.
    pub fn snapshot_now(&mut self) {
        self.txn.snapshot_now();
        self.snapshot_taken = true;
    }
    /// How long a lock is waited for (50 s unless set).
    pub fn set_lock_timeout(&mut self, timeout: Duration) {
        self.lock_timeout = timeout;
    }

    /// A statement starts: remembers where to roll back to; in READ COMMITTED the next read takes a fresh snapshot.
    /// Once for each statement, however many tables it uses.
    pub fn statement_begin(&mut self) {
        self.serial += 1;
        self.txn.statement_begin();
        self.statement_history.clear();
        self.statement_history.extend(self.changes.iter().map(|change| change.counts));
        self.statement = Some(Savepoint { mark: self.txn.mark(), counts_start: 0, counts_end: 0 });
    }
    /// The statement failed: undoes its writes. Locks stay.
    pub fn statement_rollback(&mut self) {
        let Some(statement) = self.statement else { return };
        let history = std::mem::take(&mut self.statement_history);
        self.undo(statement.mark, &history);
        self.statement_history = history;
    }

    /// Marks a place (SAVEPOINT).
    pub fn savepoint(&mut self) -> Savepoint {
        let counts_start = self.history.len();
        self.history.extend(self.changes.iter().map(|change| change.counts));
        Savepoint { mark: self.txn.mark(), counts_start, counts_end: self.history.len() }
    }
    /// Undoes all writes made since `savepoint`, which stays usable.
    pub fn rollback_to(&mut self, savepoint: &Savepoint) {
        let history = std::mem::take(&mut self.history);
        self.undo(
            savepoint.mark,
            history.get(savepoint.counts_start..savepoint.counts_end).unwrap_or_default(),
        );
        self.history = history;
        // A statement that started since can not be undone a second time, and one that started before still can.
        self.statement = None;
    }

    fn undo(&mut self, mark: Mark, counts: &[Counts]) {
        self.txn.rollback_to(mark);
        // A load is the first that a transaction writes, so it is among what is undone.
        self.exchanges.clear();
        self.writes += 1;
        self.serial += 1;
        for (i, change) in self.changes.iter_mut().enumerate() {
            // A value that was handed out may be in the commit all the same: the mark is kept.
            let auto_increment = change.counts.auto_increment;
            change.counts = Counts { auto_increment, ..counts.get(i).copied().unwrap_or_default() };
        }
    }

    /// Durable and visible on return; on an error all is rolled back.
    pub fn commit(&mut self) -> Result<()> {
        // The slots are given back when the commit is durable, or never will be.
        let mut marks = Marks::default();
        let result = self.write_counters(&mut marks).and_then(|()| self.commit_exchanges());
        drop(marks);
        match result {
            Ok(()) => {
                for Exchange { old, fresh, .. } in self.exchanges.drain(..) {
                    fresh.keep();
                    old.all().for_each(|tree| self.store.engine().forget_first_part(tree));
                }
                self.changes.iter().for_each(|change| change.table.apply(&change.counts));
                self.end();
                Ok(())
            }
            Err(error) => {
                self.rollback();
                Err(error)
            }
        }
    }

    /// Tables that get other trees have them before the commit: those are as empty as the old ones until then, for everybody, and not for
    /// a moment after it. If it fails they go back before the locks do, so that nobody writes to trees that no definition names.
    fn commit_exchanges(&mut self) -> Result<()> {
        let exchanges = &self.exchanges;
        if exchanges.is_empty() {
            self.txn.commit()?;
            return Ok(());
        }
        exchanges.iter().for_each(|exchange| exchange.table.exchange_trees(&exchange.new));
        self.txn.commit_and(|result| {
            if result.is_err() {
                exchanges.iter().for_each(|exchange| exchange.table.exchange_trees(&exchange.old));
            }
        })?;
        Ok(())
    }
    /// Commits what was written so far once that is more than `rows_max` rows, so that a copy of a large table needs no transaction as
    /// large. Only for a table that nobody else can see and that is dropped if the statement fails (ALTER TABLE's copy). Scans of
    /// this session go on where they were. True: it committed.
    pub fn commit_chunk(&mut self, rows_max: u64) -> Result<bool> {
        let rows: u64 = self.changes.iter().map(|change| change.counts.changed).sum();
        if rows <= rows_max {
            return Ok(false);
        }
        self.commit()?;
        self.statement_begin();
        Ok(true)
    }
    /// Undoes everything and lets go of all locks.
    pub fn rollback(&mut self) {
        self.txn.rollback();
        self.end();
    }
    /// Whether a commit would write anything.
    pub fn has_writes(&self) -> bool {
        self.txn.has_writes()
    }
    /// Ends a lock wait of this session from another thread (KILL).
    pub fn interrupt_handle(&self) -> Interrupt {
        self.txn.interrupt_handle()
    }
    /// The store it works on.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    fn end(&mut self) {
        self.changes.clear();
        self.exchanges.clear();
        self.history.clear();
        self.statement = None;
        self.snapshot_taken = false;
        self.serial += 1;
        self.writes += 1;
    }

    fn write_counters(&mut self, marks: &mut Marks) -> Result<()> {
        if !self.txn.has_writes() {
            return Ok(());
        }
        for change in &self.changes {
            if change.counts.auto_increment {
                // The slot first: whoever had it before wrote a mark that is not greater than the counter is now.
                let key = mark_key(change.table.id, marks.take(&change.table));
                self.txn.put(CATALOGUE, &key, &change.table.next_auto_increment().to_le_bytes())?;
            }
            if let Some(statistics) = change.table.statistics_due(&change.counts) {
                self.txn.put(CATALOGUE, &table_key(Space::Statistics, change.table.id), &statistics)?;
            }
        }
        Ok(())
    }

    /// The same for many rows that were inserted.
    pub(crate) fn note_many(&mut self, table: &Arc<TableState>, rows: u64, auto_increment: bool) {
        if rows > 0 {
            self.note(table, rows as i64, auto_increment);
            let change = self.changes.iter_mut().find(|change| Arc::ptr_eq(&change.table, table));
            change.expect("`note` has just put it there").counts.changed += rows - 1;
        }
    }

    /// The table gets these trees with the commit.
    pub(crate) fn exchange_trees(&mut self, table: &Table, new: Trees, fresh: Fresh) -> Result<()> {
        let old = self.store.exchange_trees(&mut self.txn, &table.path, &table.layout, &new)?;
        self.exchanges.push(Exchange { table: Arc::clone(&table.state), old, new, fresh });
        Ok(())
    }

    /// Before each write to a table: waits for whoever fills it.
    #[inline]
    pub(crate) fn enter(&mut self, table: &Arc<TableState>) -> Result<()> {
        if self.changes.iter().any(|change| Arc::ptr_eq(&change.table, table)) {
            return Ok(());
        }
        let wait = LockWait { timeout: FILLED_TIMEOUT, interrupted: &*self.interrupted };
        self.txn.lock_name(TABLE_LOCKS, &table.id.to_be_bytes(), LockMode::Shared, &wait)?;
        Ok(())
    }
    /// Keeps all others from writing to a table, until the end of the transaction. False: somebody does or did.
    pub(crate) fn lock_table_alone(&mut self, table: &TableState) -> Result<bool> {
        let (key, mode) = (table.id.to_be_bytes(), LockMode::Exclusive);
        match self.txn.lock_name(TABLE_LOCKS, &key, mode, &LockWait::NOT_AT_ALL) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == Kind::LockTimeout => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
    pub(crate) fn unlock_table(&mut self, table: &TableState) {
        self.txn.unlock(TABLE_LOCKS, &table.id.to_be_bytes());
    }

    pub(crate) fn interrupted(&self) -> impl Fn() -> bool + Send + use<> {
        let interrupted = Arc::clone(&self.interrupted);
        move || interrupted()
    }
    /// So much of so much is done. An error: the statement is to end.
    pub(crate) fn go_on(&self, done: u64, total: u64) -> Result<()> {
        (self.progress)(done, total);
        if (self.interrupted)() {
            return Err(engine::Error::new(Kind::Interrupted, "the statement was interrupted").into());
        }
        Ok(())
    }

    /// Notes what was done to a table; counts once the transaction commits.
    #[inline]
    pub(crate) fn note(&mut self, table: &Arc<TableState>, rows: i64, auto_increment: bool) {
        self.writes += 1;
        let at = match self.changes.iter().rposition(|change| Arc::ptr_eq(&change.table, table)) {
            Some(at) => at,
            None => {
                self.changes.push(TableChange { table: Arc::clone(table), counts: Counts::default() });
                self.changes.len() - 1
            }
        };
        let counts = &mut self.changes[at].counts;
        counts.rows += rows;
        counts.changed += 1;
        counts.auto_increment |= auto_increment;
    }

    #[inline]
    pub(crate) fn serial(&self) -> (u64, u64) {
        (self.txn.id(), self.serial)
    }
    #[inline]
    pub(crate) fn writes(&self) -> u64 {
        self.writes
    }

    /// For reads that lock nothing. To be asked before the table is asked for its trees: a load that exchanges them after the snapshot was
    /// taken is not in it, and one that did so before is whole.
    #[inline]
    pub(crate) fn read_snapshot(&mut self) -> ReadAs {
        self.snapshot_taken = true;
        self.txn.snapshot_seqno();
        ReadAs::Snapshot
    }
    /// For reads that lock: the newest rows, or the snapshot's if a lock vouches that they are the newest.
    #[inline]
    pub(crate) fn read_for_lock(&self) -> ReadAs {
        let vouched = self.repeatable && self.snapshot_taken && self.finds_conflicts;
        if vouched { ReadAs::Snapshot } else { ReadAs::Newest }
    }
    #[inline]
    pub(crate) fn is_read_committed(&self) -> bool {
        !self.repeatable
    }

    /// Whether the statement was killed.
    pub(crate) fn is_interrupted(&self) -> bool {
        (self.interrupted)()
    }

    pub(crate) fn lock(&mut self, tree: TreeId, key: &[u8], mode: LockMode) -> Result<Granted> {
        let wait = LockWait { timeout: self.lock_timeout, interrupted: &*self.interrupted };
        Ok(self.txn.lock(tree, key, mode, &wait)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::{Ascii, Shape, V, create, int, open, part, session, store, store_with, unique};
    use engine::Settings;

    /// Both had looked at the counter; the one that had seen less was durable last, and its mark stayed: after a crash the other's value, whose
    /// row was gone, was handed out again.
    #[test]
    fn the_auto_increment_mark_of_the_slower_of_two_commits_does_not_go_back() {
        let mut shape = Shape::new(&[int(4)], &[unique(&[part(0)])]);
        shape.auto_increment = Some(0);
        let store = store();
        let mut t = create(&store, "d/t", &shape);
        let (mut slow, mut quick) = (session(&store), session(&store));
        slow.statement_begin();
        t.insert(&mut slow, &[V::I(1)]).expect("a row");
        let mut marks = Marks::default();
        slow.write_counters(&mut marks).expect("counters");
        quick.statement_begin();
        t.insert(&mut quick, &[V::I(2)]).expect("a row");
        quick.commit().expect("a commit");
        slow.txn.commit().expect("a commit");
        drop(marks);
        quick.statement_begin();
        t.read(&mut quick, 0, &[V::I(2)], crate::ReadFlag::Exact).expect("a read");
        t.cursor.delete(&mut quick).expect("a row");
        quick.txn.commit().expect("a commit");

        let again = Store::open(Arc::clone(store.engine()), Arc::new(Ascii)).expect("a restart");
        let t = open(&again, "d/t", &shape);
        assert_eq!(t.table.next_auto_increment(), 3);
        t.table.truncate().expect("a truncation");
        let again = Store::open(Arc::clone(store.engine()), Arc::new(Ascii)).expect("a restart");
        assert_eq!(open(&again, "d/t", &shape).table.next_auto_increment(), 1, "no slot is left over");
    }

    const LOAD: crate::BulkFacts = crate::BulkFacts {
        rows: 0,
        copies: false,
        gathers: true,
        autocommit: true,
        refuses_duplicates: true,
        looks_back: false,
    };

    /// The table had the load's trees while the commit was under way: whoever waited for its end wrote to trees that no definition names.
    #[test]
    fn a_load_whose_commit_fails_leaves_the_table_its_trees() {
        let shape = Shape::new(&[int(4)], &[unique(&[part(0)])]);
        let store = store_with(Settings { memtable_bytes: 1 << 10, ..Settings::default() });
        let mut t = create(&store, "d/t", &shape);
        let mut other = open(&store, "d/t", &shape);
        let (mut load, mut after) = (session(&store), session(&store));
        load.statement_begin();
        assert!(t.cursor.begin_bulk(&mut load, &LOAD).expect("an empty table"));
        (0..1000).for_each(|n| t.insert(&mut load, &[V::I(n)]).expect("a row"));
        t.cursor.end_bulk(&mut load).expect("all rows");
        let fresh = load.exchanges[0].new.primary;
        load.txn.put(fresh, b"in the way", b"").expect("a write");
        let error = load.commit().expect_err("a loaded tree must be empty");
        assert!(error.to_string().contains("tree"), "{error}");
        assert_ne!(t.table.state.primary_tree(), fresh);
        after.statement_begin();
        other.insert(&mut after, &[V::I(7)]).expect("a row");
        after.commit().expect("a commit");
        let again = Store::open(Arc::clone(store.engine()), Arc::new(Ascii)).expect("a restart");
        let mut s = session(&again);
        s.statement_begin();
        assert_eq!(open(&again, "d/t", &shape).scan(&mut s, None), [[V::I(7)]]);
    }
}
