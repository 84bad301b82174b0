//! Goes ahead of a scan of index entries whose rows are not in memory: the keys of the next rows are gathered from the entries, and what those
//! rows lack is fetched at once.
//!
//! * It looks when a row was missed, and not again before the scan has passed what it fetched.
//! * It tells the scan nothing: what it reads is read again. A scan may end at any row, so its window grows with what was wanted.

use engine::{Cursor, ReadAs, TreeId};

use crate::cursor::{PushedCondition, Verdict};
use crate::table::Table;
use crate::{Result, Session};

/// Rows that it looks for.
const WINDOW_MIN: usize = 8;
const WINDOW_MAX: usize = 128;
/// Entries that it looks at for each row.
const ENTRIES: usize = 8;
/// Rows that it leaves alone after it found that nothing has to be fetched.
const REST: u64 = 1024;

/// Of one scan.
pub(crate) struct Scout {
    cursor: Option<Cursor>,
    /// The last row was not in memory.
    pub(crate) missed: bool,
    /// Rows that the scan has read, and how many there have to be before it looks ahead again.
    rows: u64,
    next_look: u64,
    /// Rows that it looks for.
    window: usize,
}

/// Where the scan is that it goes ahead of.
pub(crate) struct Scan<'a> {
    pub(crate) table: &'a Table,
    pub(crate) index: usize,
    pub(crate) tree: TreeId,
    pub(crate) read: ReadAs,
    pub(crate) from: &'a [u8],
    pub(crate) backward: bool,
    /// It ends with the entries that start with this.
    pub(crate) prefix: &'a [u8],
}

impl Default for Scout {
    fn default() -> Self {
        Self { cursor: None, missed: false, rows: 0, next_look: 0, window: WINDOW_MIN }
    }
}

impl Scout {
    /// The scan has read a row, which was in memory or not.
    #[inline]
    pub(crate) fn note_row(&mut self, missed: bool) {
        self.missed = missed;
        self.rows += 1;
    }

    /// Whether it is to look, now that a row was missed; that is forgotten.
    pub(crate) fn is_due(&mut self) -> bool {
        self.missed = false;
        self.rows >= self.next_look
    }

    /// Fetches what the rows lack whose entries follow, the one that the scan stands on among them. `record` is written to if there is
    /// a condition.
    pub(crate) fn look(
        &mut self,
        session: &mut Session,
        scan: &Scan<'_>,
        mut condition: Option<&mut PushedCondition>,
        record: &mut [u8],
        weights: &mut Vec<u8>,
    ) -> Result<()> {
        let table = scan.table;
        let mut cursor = self.cursor.take().unwrap_or_else(|| Cursor::new(table.store.engine()));
        cursor.open(&mut session.txn, scan.tree, scan.read)?;
        let mut found = match scan.backward {
            false => cursor.seek(&mut session.txn, scan.from)?,
            true => cursor.seek_before(&mut session.txn, scan.from)?,
        };
        let codec = &table.layout.indexes[scan.index];
        let mut keys: Vec<Vec<u8>> = Vec::new();
        for _ in 0..self.window * ENTRIES {
            if !found || keys.len() == self.window {
                break;
            }
            let (key, value) = (cursor.key(), cursor.value());
            if !key.starts_with(scan.prefix) {
                break;
            }
            let verdict = match condition.as_deref_mut() {
                None => Verdict::Take,
                Some(condition) => {
                    codec
                        .decode(&condition.entry, key, value, record, weights)
                        .map_err(table.garbled("an index entry"))?;
                    (condition.check)(record)
                }
            };
            match verdict {
                Verdict::Take => {
                    let (primary, _) = codec.split(key, value).map_err(table.garbled("an index entry"))?;
                    keys.push(primary.to_vec());
                }
                Verdict::Skip => {}
                Verdict::PastTheEnd | Verdict::Killed => break,
            }
            found = match scan.backward {
                false => cursor.next(&mut session.txn)?,
                true => cursor.prev(&mut session.txn)?,
            };
        }
        cursor.close();
        self.cursor = Some(cursor);
        let fetched = session.txn.prefetch(table.state.primary_tree(), keys.iter().map(Vec::as_slice));
        self.next_look = self.rows + if fetched == 0 { REST } else { keys.len() as u64 };
        self.window = if fetched == 0 { WINDOW_MIN } else { (self.window * 2).min(WINDOW_MAX) };
        Ok(())
    }
}
