//! Rows that are written together.

use std::ffi::c_int;

use super::{CursorHandle, SessionHandle, record_mut, session_mut};
use crate::border::FfiBulkFacts;
use crate::guard::{guard, guard_value};

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_bulk_begin(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    facts: *const FfiBulkFacts,
    begun: *mut c_int,
) -> c_int {
    guard(|| {
        // SAFETY: handles of ours, facts and a place of the shim's.
        unsafe {
            let (handle, session) = (&mut *cursor, session_mut(session)?);
            *begun = handle.cursor.begin_bulk(&mut session.session, &(*facts).to_facts())?.into();
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_bulk_end(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    record: *mut u8,
) -> c_int {
    guard(|| {
        // SAFETY: handles of ours, and a record.
        unsafe {
            let (handle, session) = (&mut *cursor, session_mut(session)?);
            let result = handle.cursor.end_bulk(&mut session.session);
            handle.noting_duplicate_row(result, record_mut(record, handle.record_length))
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_bulk_abort(cursor: *mut CursorHandle) {
    // SAFETY: a handle of ours.
    guard_value((), || unsafe { &mut *cursor }.cursor.abort_bulk());
}

impl CursorHandle {
    /// The row of a duplicate is shown to the user, from its record.
    pub(super) fn noting_duplicate_row<T>(
        &mut self,
        result: tables::Result<T>,
        record: &mut [u8],
    ) -> tables::Result<T> {
        if matches!(result, Err(tables::Error::Duplicate { .. })) {
            self.cursor.duplicate_record(record)?;
        }
        self.noting_duplicate(result)
    }
}
