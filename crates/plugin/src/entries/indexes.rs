//! Indexes that are added and dropped in place.

use std::ffi::c_int;

use tables::{BuiltIndexes, Descriptor, IndexPlan, TableImages};

use super::{CursorHandle, SessionHandle, TableHandle, record_mut, session_mut};
use crate::border::{Bytes, FfiDescriptor};
use crate::guard::{guard, guard_value};
use crate::life::life;

/// Built, and not in the definition yet.
pub struct IndexesHandle(BuiltIndexes);

/// # Safety
/// Both are the shim's; `kept` has a number for each index, −1 for one that is new.
unsafe fn plan(
    table: *const TableHandle,
    altered: *const FfiDescriptor,
    kept: *const i32,
) -> tables::Result<Option<IndexPlan>> {
    let life = life()?;
    // SAFETY: the caller's promise.
    let descriptor: Descriptor = unsafe { (*altered).to_descriptor(&*life.collations) };
    let count = descriptor.indexes.len();
    let kept: &[i32] = match count {
        0 => &[],
        // SAFETY: the caller's promise.
        _ => unsafe { std::slice::from_raw_parts(kept, count) },
    };
    let kept: Vec<_> = kept.iter().map(|index| usize::try_from(*index).ok()).collect();
    // SAFETY: a handle of ours.
    Ok(unsafe { &*table }.table.plan_indexes(descriptor, &kept))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_indexes_possible(
    table: *const TableHandle,
    altered: *const FfiDescriptor,
    kept: *const i32,
) -> c_int {
    // SAFETY: as the header says.
    guard_value(0, || unsafe { plan(table, altered, kept) }.is_ok_and(|plan| plan.is_some()).into())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_indexes_build(
    table: *const TableHandle,
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    altered: *const FfiDescriptor,
    kept: *const i32,
    record: *mut u8,
    built: *mut *mut IndexesHandle,
) -> c_int {
    guard(|| {
        // SAFETY: as the header says.
        unsafe {
            let (handle, session) = (&mut *cursor, session_mut(session)?);
            let plan = plan(table, altered, kept)?.ok_or(tables::Error::Malformed("plan of indexes"))?;
            let result = handle.cursor.build_indexes(&mut session.session, plan);
            let indexes = handle.noting_duplicate_row(result, record_mut(record, handle.record_length))?;
            *built = Box::into_raw(Box::new(IndexesHandle(indexes)));
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_indexes_commit(
    table: *const TableHandle,
    frm: Bytes,
    built: *mut IndexesHandle,
) -> c_int {
    guard(|| {
        // SAFETY: handles of ours, the last of which is used up, and an image that is valid for the call.
        let (table, frm, built) = unsafe { (&*table, frm.as_slice(), *Box::from_raw(built)) };
        life()?.store.set_indexes(&table.table, TableImages { frm, par: &[] }, built.0)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_indexes_free(built: *mut IndexesHandle) {
    // SAFETY: made by cistern_indexes_build, and not committed.
    guard_value((), || drop(unsafe { Box::from_raw(built) }));
}
