//! What an ALTER TABLE leaves behind that a crash cut short.

use tables::{Result, Store};

use crate::log::{Level, write};

/// Ends what the server's own log does not know of: a table that was put aside gets its name back, unless the altered one has it.
pub fn settle_backups(store: &Store) -> Result<()> {
    for end in store.settle_backups()? {
        let (level, what) = match (end.rename.as_slice(), end.drop.as_slice()) {
            ([], []) => (Level::Warning, "whose name is not known, was kept; drop or rename it".to_owned()),
            ([], _) => (Level::Information, "had done its work; the old table was dropped".to_owned()),
            ([(_, to), ..], _) => (Level::Information, format!("was undone; the table is {to} again")),
        };
        write(level, &format!("{}: the interrupted ALTER TABLE {what}", end.backup));
    }
    Ok(())
}

/// Drops half-made copies too. The server has finished or undone all that it remembers.
pub fn drop_all(store: &Store) -> Result<()> {
    settle_backups(store)?;
    for database in store.databases()? {
        let mut copies = Vec::new();
        store.list(&database, &mut |table| {
            if table.starts_with("#sql") && !table.starts_with("#sql-backup") {
                copies.push(format!("{database}/{table}"));
            }
        })?;
        for path in copies {
            write(Level::Information, &format!("dropping {path}, left by an interrupted ALTER TABLE"));
            store.drop_table(&path)?;
        }
    }
    Ok(())
}
