//! Writing rows: the primary tree and every index, or nothing.
//!
//! * Everything that can refuse a row (locks, duplicates) is asked before the first write, so a refused row leaves no trace.
//! * Whoever makes or removes the entry of a unique value holds the lock of that value, so two writers of one value meet there.
//! * An update takes from the new record only what differs from the record as it was read.

use engine::{Granted, LockMode, ReadAs};

use crate::cursor::{EntryChange, Place, Record, RowCursor, Scratch, put_position};
use crate::keys::Garbled;
use crate::layout::Layout;
use crate::table::{MALFORMED_RECORD, Table};
use crate::{Error, Result, Session};

impl RowCursor {
    /// write_row. Locks what must stay unique; on `Duplicate` nothing was written and `duplicate_position` tells the other row. An
    /// explicit AUTO_INCREMENT value moves the counter.
    pub fn insert(&mut self, session: &mut Session, record: Record) -> Result<()> {
        if self.bulk.is_some() {
            return self.insert_bulk(session, record);
        }
        let table = &*self.table;
        let (layout, collations) = (&table.layout, table.store.collations());
        let (scratch, state) = (&mut self.scratch, &table.state);
        if !self.alone {
            session.enter(state)?;
        }
        let primary_tree = state.primary_tree();
        table.encode_new(scratch, &record)?;
        if let Some(primary) = layout.descriptor.primary {
            if !self.alone {
                session.lock(primary_tree, &scratch.key, LockMode::Exclusive)?;
            }
            if session.txn.get(primary_tree, &scratch.key, ReadAs::Newest, |_| ())?.is_some() {
                scratch.duplicate.clone_from(&scratch.key);
                return Err(Error::Duplicate { key: primary });
            }
        }
        let value = |field| layout.rows.record_value(field, &record);
        scratch.entries.resize_with(layout.indexes.len(), EntryChange::default);
        for (index, entry) in scratch.entries.iter_mut().enumerate() {
            entry.touched = layout.descriptor.primary != Some(index);
            if !entry.touched {
                continue;
            }
            let buffers = (&mut entry.new_key, &mut entry.new_value);
            entry.alone = layout.indexes[index]
                .entry(&value, &scratch.key, collations, &mut scratch.weights, buffers)
                .map_err(|_| MALFORMED_RECORD)?;
            if entry.alone {
                let tree = state.index_tree(index);
                if !self.alone {
                    session.lock(tree, &entry.new_key, LockMode::Exclusive)?;
                }
                find_duplicate(session, layout, index, tree, entry, &mut scratch.duplicate)?;
            }
        }

        session.txn.put(primary_tree, &scratch.key, &scratch.row)?;
        for (index, entry) in scratch.entries.iter().enumerate().filter(|(_, entry)| entry.touched) {
            session.txn.put(state.index_tree(index), &entry.new_key, &entry.new_value)?;
        }
        table.note_number(&record);
        session.note(state, 1, layout.descriptor.auto_increment.is_some());
        Ok(())
    }

    /// update_row: the current row becomes `new`. Columns that are equal in `old` (the image as it was read) and `new` keep their
    /// stored value, so neither needs columns that were not read. The current row is then the new one. False: all columns are equal, and
    /// nothing was written.
    pub fn update(&mut self, session: &mut Session, old: &[u8], new: Record) -> Result<bool> {
        self.lock_current(session)?;
        let kept = self.load_stored(session)?;
        let table = &*self.table;
        let (layout, collations, state) = (&table.layout, table.store.collations(), &table.state);
        let (scratch, current) = (&mut self.scratch, &mut self.current);
        let stored = if kept { &current.row } else { &scratch.stored };
        layout.rows.parse(stored, &current.key, &mut scratch.parts).map_err(table.garbled("a row"))?;
        scratch.row.clear();
        layout
            .rows
            .encode_update(old, &new, (stored, &scratch.parts), &mut scratch.changed, &mut scratch.row)
            .map_err(|_| MALFORMED_RECORD)?;
        let changed = &scratch.changed;
        let before = |field| Ok(layout.rows.value(field, stored, &scratch.parts));
        let after = |field: usize| {
            if changed[field] { layout.rows.record_value(field, &new) } else { before(field) }
        };

        let primary_tree = state.primary_tree();
        scratch.key.clear();
        match layout.primary() {
            Some(primary) if primary.fields.iter().any(|field| changed[*field]) => {
                primary
                    .encode_parts(&after, collations, &mut scratch.weights, &mut scratch.key)
                    .map_err(|_| MALFORMED_RECORD)?;
            }
            _ => scratch.key.extend_from_slice(&current.key),
        }
        let moves = scratch.key != current.key;
        // What of a value the row does not keep, its key does.
        if !moves && scratch.row == *stored {
            return Ok(false);
        }
        if moves {
            session.lock(primary_tree, &scratch.key, LockMode::Exclusive)?;
            if session.txn.get(primary_tree, &scratch.key, ReadAs::Newest, |_| ())?.is_some() {
                scratch.duplicate.clone_from(&scratch.key);
                return Err(Error::Duplicate { key: layout.descriptor.primary.unwrap_or(0) });
            }
        }
        scratch.entries.resize_with(layout.indexes.len(), EntryChange::default);
        for (index, entry) in scratch.entries.iter_mut().enumerate() {
            let codec = &layout.indexes[index];
            entry.touched = layout.descriptor.primary != Some(index)
                && (moves || codec.fields.iter().any(|field| changed[*field]));
            if !entry.touched {
                continue;
            }
            let (weights, tree) = (&mut scratch.weights, state.index_tree(index));
            let buffers = (&mut entry.old_key, &mut entry.old_value);
            let was_alone = codec
                .entry(&before, &current.key, collations, weights, buffers)
                .map_err(table.garbled("a row"))?;
            let buffers = (&mut entry.new_key, &mut entry.new_value);
            entry.alone = codec
                .entry(&after, &scratch.key, collations, weights, buffers)
                .map_err(|_| MALFORMED_RECORD)?;
            if entry.old_key == entry.new_key {
                entry.touched = entry.old_value != entry.new_value;
                if was_alone && entry.touched {
                    session.lock(tree, &entry.old_key, LockMode::Exclusive)?;
                }
                continue;
            }
            if was_alone {
                session.lock(tree, &entry.old_key, LockMode::Exclusive)?;
            }
            if entry.alone {
                session.lock(tree, &entry.new_key, LockMode::Exclusive)?;
                find_duplicate(session, layout, index, tree, entry, &mut scratch.duplicate)?;
            }
        }

        if moves {
            session.txn.delete(primary_tree, &current.key)?;
        }
        session.txn.put(primary_tree, &scratch.key, &scratch.row)?;
        for (index, entry) in scratch.entries.iter().enumerate().filter(|(_, entry)| entry.touched) {
            let tree = state.index_tree(index);
            if entry.old_key != entry.new_key {
                session.txn.delete(tree, &entry.old_key)?;
            }
            session.txn.put(tree, &entry.new_key, &entry.new_value)?;
        }
        // A scan in progress must not come upon the row again where this put it.
        if self.place != Place::Unset {
            match self.index.filter(|index| layout.descriptor.primary != Some(*index)) {
                None if moves => drop(self.moved.insert(scratch.key.clone())),
                Some(index) if scratch.entries[index].touched => {
                    let entry = &scratch.entries[index];
                    if entry.old_key != entry.new_key {
                        self.moved.insert(entry.new_key.clone());
                    }
                }
                _ => {}
            }
        }
        let numbered = layout.descriptor.auto_increment.filter(|field| changed[*field]);
        if let Some(number) = numbered.and_then(|field| number(layout, field, after(field))) {
            state.note_auto_increment(number);
        }
        if moves {
            current.key.clone_from(&scratch.key);
        }
        current.row_as_of = None;
        session.note(state, 0, numbered.is_some());
        Ok(true)
    }

    /// delete_row: removes the current row.
    pub fn delete(&mut self, session: &mut Session) -> Result<()> {
        self.lock_current(session)?;
        let kept = self.load_stored(session)?;
        let table = &*self.table;
        let (layout, collations, state) = (&table.layout, table.store.collations(), &table.state);
        let (scratch, current) = (&mut self.scratch, &mut self.current);
        let stored = if kept { &current.row } else { &scratch.stored };
        layout.rows.parse(stored, &current.key, &mut scratch.parts).map_err(table.garbled("a row"))?;
        let parts = &scratch.parts;
        let before = |field| Ok(layout.rows.value(field, stored, parts));
        scratch.entries.resize_with(layout.indexes.len(), EntryChange::default);
        for (index, entry) in scratch.entries.iter_mut().enumerate() {
            entry.touched = layout.descriptor.primary != Some(index);
            if !entry.touched {
                continue;
            }
            let buffers = (&mut entry.old_key, &mut entry.old_value);
            let was_alone = layout.indexes[index]
                .entry(&before, &current.key, collations, &mut scratch.weights, buffers)
                .map_err(table.garbled("a row"))?;
            if was_alone {
                session.lock(state.index_tree(index), &entry.old_key, LockMode::Exclusive)?;
            }
        }
        session.txn.delete(state.primary_tree(), &current.key)?;
        for (index, entry) in scratch.entries.iter().enumerate().filter(|(_, entry)| entry.touched) {
            session.txn.delete(state.index_tree(index), &entry.old_key)?;
        }
        current.row_as_of = None;
        session.note(state, -1, false);
        Ok(())
    }

    /// The position of the row that made the last insert or update end in `Duplicate` (dup_ref).
    pub fn duplicate_position(&self, position: &mut [u8]) {
        put_position(&self.scratch.duplicate, position);
    }

    fn lock_current(&mut self, session: &mut Session) -> Result<()> {
        self.keep_current();
        if !self.current.known {
            return Err(Error::Malformed("call: no current row"));
        }
        session.enter(&self.table.state)?;
        let vouched = self.current.row_as_of == Some((session.txn.id(), session.writes()));
        if !(vouched && matches!(self.current.locked, Some((LockMode::Exclusive, _)))) {
            let granted =
                session.lock(self.table.state.primary_tree(), &self.current.key, LockMode::Exclusive)?;
            // A row that was written keeps its lock, whatever `unlock_row` is told.
            self.current.locked = Some((LockMode::Exclusive, granted));
        }
        if let Some((_, granted)) = &mut self.current.locked {
            *granted = Granted::Held;
        }
        Ok(())
    }

    /// Makes sure that the newest version of the current row is at hand: true: in `current.row`, false: in `scratch.stored`. The former
    /// is never overwritten here, because BLOBs of the record that is to be written may be in it.
    fn load_stored(&mut self, session: &mut Session) -> Result<bool> {
        if self.current.row_as_of == Some((session.txn.id(), session.writes())) {
            return Ok(true);
        }
        let stored = &mut self.scratch.stored;
        let tree = self.table.state.primary_tree();
        let found = session.txn.get(tree, &self.current.key, ReadAs::Newest, |row| {
            stored.clear();
            stored.extend_from_slice(row);
        })?;
        found.map(|()| false).ok_or(Error::RowGone)
    }
}

impl Table {
    /// A new row, into `scratch`: its key and its bytes.
    pub(crate) fn encode_new(&self, scratch: &mut Scratch, record: &Record) -> Result<()> {
        let layout = &self.layout;
        scratch.row.clear();
        layout.rows.encode(record, &mut scratch.row).map_err(|_| MALFORMED_RECORD)?;
        scratch.key.clear();
        match layout.primary() {
            None => scratch.key.extend_from_slice(&self.state.allocate_hidden().to_be_bytes()),
            Some(primary) => {
                let value = |field| layout.rows.record_value(field, record);
                primary
                    .encode_parts(&value, self.collations(), &mut scratch.weights, &mut scratch.key)
                    .map_err(|_| MALFORMED_RECORD)?;
            }
        }
        Ok(())
    }

    /// An explicit AUTO_INCREMENT value moves the counter.
    pub(crate) fn note_number(&self, record: &Record) {
        let layout = &self.layout;
        let numbered = layout.descriptor.auto_increment;
        let value = |field| layout.rows.record_value(field, record);
        if let Some(number) = numbered.and_then(|field| number(layout, field, value(field))) {
            self.state.note_auto_increment(number);
        }
    }
}

/// Refuses an entry whose key another row has already.
fn find_duplicate(
    session: &mut Session,
    layout: &Layout,
    index: usize,
    tree: engine::TreeId,
    entry: &EntryChange,
    duplicate: &mut Vec<u8>,
) -> Result<()> {
    let found = session.txn.get(tree, &entry.new_key, ReadAs::Newest, |value| {
        let (primary, _) = layout.indexes[index].split(&entry.new_key, value)?;
        duplicate.clear();
        duplicate.extend_from_slice(primary);
        Ok::<(), Garbled>(())
    })?;
    match found {
        None => Ok(()),
        Some(Ok(())) => Err(Error::Duplicate { key: index }),
        Some(Err(Garbled)) => Err(Error::Corrupt(format!("an entry of tree {}", tree.0))),
    }
}

/// The value of an auto-increment column, if it is positive.
fn number(layout: &Layout, field: usize, value: std::result::Result<Option<&[u8]>, Garbled>) -> Option<u64> {
    use crate::descriptor::Kind;
    let value = value.ok()??;
    match layout.descriptor.fields[field].kind {
        Kind::Float => Some(f32::from_ne_bytes(value.try_into().ok()?) as u64),
        Kind::Double => Some(f64::from_ne_bytes(value.try_into().ok()?) as u64),
        kind => {
            let unsigned = value.iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
            let negative = kind == Kind::Int && value.last()? & 0x80 != 0;
            (!negative).then_some(unsigned)
        }
    }
    .filter(|number| *number > 0)
}
