//! The functions of `mariadb/cistern_ffi.h`: handles in, one call, code out.
//!
//! * A handle that comes in was made here (`Box::into_raw`), and not freed yet: the shim frees each exactly once, and mariadbd
//!   drives a session or a cursor from one thread at a time. A table and an interrupt are only ever shared.
//! * A record that comes in is as long as the descriptor said when its table was opened.

mod bulk;
mod indexes;

use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;
use std::time::Duration;

use tables::{
    Error, Pushed, ReadFlag, Record, Result, RowCursor, RowLock, Savepoint, Session, Table, TableImages,
    Verdict,
};

use crate::border::{
    Blobs, Bytes, Callbacks, Config, CounterSink, FfiDescriptor, FfiRangeEnd, NameSink, Text, slice,
};
use crate::codes;
use crate::files::may_remove_files;
use crate::guard::{guard, guard_found, guard_value, last_message};
use crate::leftovers;
use crate::life::{self, life};
use crate::log;
use crate::paths::{database_name, table_path};

/// A connection's session.
pub struct SessionHandle {
    session: Session,
    savepoints: Vec<(u64, Savepoint)>,
    next_savepoint: u64,
}

/// What KILL uses, from any thread.
pub struct InterruptHandle(engine::Interrupt);

/// An open table.
pub struct TableHandle {
    table: Arc<Table>,
    record_length: usize,
    blobs: Arc<Blobs>,
}

/// A handler's cursor.
pub struct CursorHandle {
    cursor: RowCursor,
    record_length: usize,
    position_length: usize,
    blobs: Arc<Blobs>,
    columns: Vec<u8>,
    duplicate: u32,
}

impl CursorHandle {
    fn noting_duplicate<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(Error::Duplicate { key }) = &result {
            self.duplicate = u32::try_from(*key).unwrap_or(u32::MAX);
        }
        result
    }
}

/// # Safety
/// `record` is a record buffer of `length` bytes that nobody else uses during the call.
unsafe fn record_mut<'a>(record: *mut u8, length: usize) -> &'a mut [u8] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(record, length) }
}

// ---- life ----

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_start(callbacks: *const Callbacks, config: *const Config) -> c_int {
    guard_value(codes::exit::CRASH, || {
        // SAFETY: both are the shim's, and valid for the call.
        let (callbacks, config) = unsafe { (&*callbacks, &*config) };
        // SAFETY: the texts in it are too.
        let text = |text: &Text| unsafe { text.to_text() };
        let start = life::Start {
            bucket: text(&config.bucket),
            branch: text(&config.branch),
            data_dir: text(&config.data_dir),
            server_dir: text(&config.server_dir),
            memory_bytes: config.memory_bytes,
            memtable_bytes: config.memtable_bytes,
            disk_cache_bytes: config.disk_cache_bytes,
            unuploaded_bytes_max: config.unuploaded_bytes_max,
            transaction_bytes_max: config.transaction_bytes_max,
            wal_upload_interval: Duration::from_millis(config.wal_upload_interval_ms),
        };
        life::start(callbacks, &start).err().unwrap_or(0)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cistern_stop() {
    guard_value((), life::stop);
}

#[unsafe(no_mangle)]
extern "C" fn cistern_drop_leftovers() {
    guard(|| leftovers::drop_all(&life()?.store));
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_status_text(sink: NameSink, argument: *mut c_void) {
    guard(|| {
        let text = life()?.status_text();
        // SAFETY: the sink copies before it returns.
        unsafe { sink(argument, text.as_ptr().cast(), text.len()) };
        Ok(())
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_status_counters(sink: CounterSink, argument: *mut c_void) {
    guard(|| {
        for (name, value) in life()?.counters() {
            // SAFETY: the sink copies before it returns.
            unsafe { sink(argument, name.as_ptr().cast(), name.len(), value) };
        }
        Ok(())
    });
}

#[unsafe(no_mangle)]
extern "C" fn cistern_files_sync() -> c_int {
    guard(|| life()?.files.sync())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_may_remove_files(text: Bytes, many: c_int) -> c_int {
    // SAFETY: valid for the call.
    guard_value(1, || may_remove_files(unsafe { text.as_slice() }, many != 0).into())
}

#[unsafe(no_mangle)]
extern "C" fn cistern_statement_begins() {
    guard(|| {
        life()?.files.statement_begins();
        Ok(())
    });
}

#[unsafe(no_mangle)]
extern "C" fn cistern_statement_ends(changed: c_int) -> c_int {
    guard(|| life()?.files.statement_ends(changed != 0))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_message(length: *mut usize) -> *const c_char {
    let (start, message_length) = last_message();
    // SAFETY: a place of the shim's.
    unsafe { *length = message_length };
    start.cast()
}

// ---- catalogue ----

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_table_create(
    path: Text,
    descriptor: *const FfiDescriptor,
    frm: Bytes,
    auto_increment: u64,
) -> c_int {
    guard(|| {
        let life = life()?;
        // SAFETY: all of the shim's, and valid for the call.
        let (path, descriptor, frm) =
            unsafe { (path.to_text(), (*descriptor).to_descriptor(&*life.collations), frm.as_slice()) };
        let images = TableImages { frm, par: &[] };
        life.store.create(&table_path(&path), &descriptor, images, auto_increment)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_table_set_image(
    path: Text,
    descriptor: *const FfiDescriptor,
    frm: Bytes,
) -> c_int {
    guard(|| {
        let life = life()?;
        // SAFETY: all of the shim's, and valid for the call.
        let (path, descriptor, frm) =
            unsafe { (path.to_text(), (*descriptor).to_descriptor(&*life.collations), frm.as_slice()) };
        life.store.set_images(&table_path(&path), &descriptor, TableImages { frm, par: &[] })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_table_drop(path: Text) -> c_int {
    // SAFETY: valid for the call.
    guard(|| life()?.store.drop_table(&table_path(&unsafe { path.to_text() })))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_table_rename(from: Text, to: Text) -> c_int {
    guard(|| {
        // SAFETY: valid for the call.
        let (from, to) = unsafe { (from.to_text(), to.to_text()) };
        life()?.store.rename(&table_path(&from), &table_path(&to))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_table_exists(path: Text) -> c_int {
    guard_value(0, || {
        // SAFETY: valid for the call.
        let path = table_path(&unsafe { path.to_text() });
        life().and_then(|life| life.store.exists(&path)).is_ok_and(|exists| exists).into()
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_table_image(path: Text, frm: *mut *mut u8, length: *mut usize) -> c_int {
    guard(|| {
        // SAFETY: valid for the call.
        let path = table_path(&unsafe { path.to_text() });
        let definition = life()?.store.definition(&path)?.filter(|definition| !definition.frm.is_empty());
        let image = definition.ok_or(Error::NoSuchTable(path))?.frm.into_boxed_slice();
        // SAFETY: two places of the shim's; the image is its own until cistern_image_free.
        unsafe {
            *length = image.len();
            *frm = Box::into_raw(image).cast();
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_image_free(frm: *mut u8, length: usize) {
    // SAFETY: made by cistern_table_image as a boxed slice of that length.
    drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(frm, length)) });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_table_list(directory: Text, sink: NameSink, argument: *mut c_void) -> c_int {
    guard(|| {
        // SAFETY: valid for the call.
        let directory = unsafe { directory.to_text() };
        life()?.store.list(database_name(&directory), &mut |name| {
            // SAFETY: the sink copies before it returns.
            unsafe { sink(argument, name.as_ptr().cast(), name.len()) };
        })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_database_drop(directory: Text) -> c_int {
    guard(|| {
        // SAFETY: valid for the call.
        let directory = unsafe { directory.to_text() };
        life()?.files.drop_database(database_name(&directory))
    })
}

// ---- sessions ----

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_session_new(
    thd: *mut c_void,
    interrupt: *mut *mut InterruptHandle,
) -> *mut SessionHandle {
    guard_value(std::ptr::null_mut(), || {
        let Ok(life) = life() else { return std::ptr::null_mut() };
        let thd = thd as usize;
        let killed = move || {
            // SAFETY: the session belongs to this THD, and asks only while one of its own calls runs.
            log::callbacks().is_some_and(|callbacks| unsafe { (callbacks.killed)(thd as *mut c_void) != 0 })
        };
        let mut session = life.store.session(Box::new(killed));
        session.set_progress(Box::new(move |done, total| {
            if let Some(callbacks) = log::callbacks() {
                // SAFETY: as above.
                unsafe { (callbacks.progress)(thd as *mut c_void, done, total) }
            }
        }));
        let handle = Box::new(InterruptHandle(session.interrupt_handle()));
        // SAFETY: a place of the shim's.
        unsafe { *interrupt = Box::into_raw(handle) };
        Box::into_raw(Box::new(SessionHandle { session, savepoints: Vec::new(), next_savepoint: 0 }))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_session_free(session: *mut SessionHandle, interrupt: *mut InterruptHandle) {
    guard_value((), || {
        // SAFETY: both were made by cistern_session_new, and nobody uses them any more.
        let (mut session, interrupt) = unsafe { (Box::from_raw(session), Box::from_raw(interrupt)) };
        session.session.rollback();
        drop((session, interrupt));
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_session_interrupt(interrupt: *const InterruptHandle) {
    // SAFETY: lives until its session is freed; shared only.
    guard_value((), || unsafe { &*interrupt }.0.interrupt());
}

/// # Safety
/// As the module says of handles.
unsafe fn session_mut<'a>(session: *mut SessionHandle) -> Result<&'a mut SessionHandle> {
    // SAFETY: the caller's promise; null if the engine was down when the session was asked for.
    unsafe { session.as_mut() }.ok_or_else(|| Error::Malformed("session: the engine is not running"))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_session_isolation(session: *mut SessionHandle, repeatable_read: c_int) {
    guard(|| {
        // SAFETY: a session of ours.
        unsafe { session_mut(session) }?.session.set_repeatable_read(repeatable_read != 0);
        Ok(())
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_session_lock_timeout(session: *mut SessionHandle, milliseconds: u64) {
    guard(|| {
        // SAFETY: a session of ours.
        unsafe { session_mut(session) }?.session.set_lock_timeout(Duration::from_millis(milliseconds));
        Ok(())
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_session_conflicts(session: *mut SessionHandle, detect: c_int) {
    guard(|| {
        // SAFETY: a session of ours.
        unsafe { session_mut(session) }?.session.set_conflict_detection(detect != 0);
        Ok(())
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_session_snapshot(session: *mut SessionHandle) -> c_int {
    guard(|| {
        // SAFETY: a session of ours.
        unsafe { session_mut(session) }?.session.snapshot_now();
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_statement_begin(session: *mut SessionHandle) -> c_int {
    guard(|| {
        // SAFETY: a session of ours.
        unsafe { session_mut(session) }?.session.statement_begin();
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_statement_rollback(session: *mut SessionHandle) -> c_int {
    guard(|| {
        // SAFETY: a session of ours.
        unsafe { session_mut(session) }?.session.statement_rollback();
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_commit(session: *mut SessionHandle) -> c_int {
    guard(|| {
        // SAFETY: a session of ours.
        let handle = unsafe { session_mut(session) }?;
        handle.savepoints.clear();
        handle.session.commit()
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_rollback(session: *mut SessionHandle) -> c_int {
    guard(|| {
        // SAFETY: a session of ours.
        let handle = unsafe { session_mut(session) }?;
        handle.savepoints.clear();
        handle.session.rollback();
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_savepoint_set(session: *mut SessionHandle, id: *mut u64) -> c_int {
    guard(|| {
        // SAFETY: a session of ours, and a place of the shim's.
        let (handle, id) = unsafe { (session_mut(session)?, &mut *id) };
        handle.next_savepoint += 1;
        *id = handle.next_savepoint;
        let savepoint = handle.session.savepoint();
        handle.savepoints.push((*id, savepoint));
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_savepoint_rollback(session: *mut SessionHandle, id: u64) -> c_int {
    guard(|| {
        // SAFETY: a session of ours.
        let handle = unsafe { session_mut(session) }?;
        handle.savepoints.retain(|(other, _)| *other <= id);
        let (_, savepoint) =
            handle.savepoints.iter().find(|(other, _)| *other == id).ok_or(Error::Malformed("savepoint"))?;
        handle.session.rollback_to(savepoint);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_savepoint_release(session: *mut SessionHandle, id: u64) -> c_int {
    guard(|| {
        // SAFETY: a session of ours.
        unsafe { session_mut(session) }?.savepoints.retain(|(other, _)| *other != id);
        Ok(())
    })
}

// ---- tables ----

thread_local! {
    /// The table whose definition this thread was last told to fetch anew.
    static STALE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// A definition that does not fit what is stored is fetched anew by the server, which then tries again. If the new one does not fit either (its
/// keys were written by another version of us, say), the server would go on for ever: the second refusal is final.
fn open_with_definition<T>(path: &str, open: impl FnOnce() -> tables::Result<T>) -> tables::Result<T> {
    let again = STALE.take().is_some_and(|stale| stale == path);
    let opened = open();
    match &opened {
        Err(error @ Error::DefinitionChanged { .. }) if again => {
            let refused = engine::Error::new(engine::Kind::BadRequest, error.to_string());
            log::write(log::Level::Error, &refused.to_string());
            Err(refused.into())
        }
        Err(Error::DefinitionChanged { .. }) => {
            STALE.set(Some(path.to_owned()));
            opened
        }
        _ => opened,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_open(
    path: Text,
    descriptor: *const FfiDescriptor,
    table: *mut *mut TableHandle,
    position_length: *mut u32,
) -> c_int {
    guard(|| {
        let life = life()?;
        // SAFETY: all of the shim's, and valid for the call.
        let (path, descriptor) = unsafe { (path.to_text(), (*descriptor).to_descriptor(&*life.collations)) };
        let blobs = Arc::new(Blobs::of(&descriptor));
        let record_length = descriptor.record_length as usize;
        let opened = open_with_definition(&path, || life.store.open_table(&table_path(&path), descriptor))?;
        // SAFETY: two places of the shim's.
        unsafe {
            *position_length = u32::try_from(opened.position_length()).unwrap_or(u32::MAX);
            *table = Box::into_raw(Box::new(TableHandle { table: opened, record_length, blobs }));
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_close(table: *mut TableHandle) {
    // SAFETY: made by cistern_open; its cursors hold the table by themselves.
    guard_value((), || drop(unsafe { Box::from_raw(table) }));
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_row_count(table: *const TableHandle) -> u64 {
    // SAFETY: a table of ours, shared.
    guard_value(0, || unsafe { &*table }.table.row_count())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_statistics(table: *const TableHandle) -> u64 {
    // SAFETY: a table of ours, shared. Without fresh statistics the old ones stand.
    guard_value(0, || unsafe { &*table }.table.refresh_statistics().unwrap_or(0))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_data_bytes(table: *const TableHandle) -> u64 {
    // SAFETY: a table of ours, shared.
    guard_value(0, || unsafe { &*table }.table.data_bytes())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_index_bytes(table: *const TableHandle) -> u64 {
    // SAFETY: a table of ours, shared.
    guard_value(0, || unsafe { &*table }.table.index_bytes())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_records_per_key(table: *const TableHandle, index: u32, part: u32) -> u64 {
    // SAFETY: a table of ours, shared.
    guard_value(1, || unsafe { &*table }.table.records_per_key(index as usize, part as usize))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_analyze(table: *const TableHandle) -> c_int {
    // SAFETY: a table of ours, shared.
    guard(|| unsafe { &*table }.table.analyze())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_records_in_range(
    table: *const TableHandle,
    index: u32,
    low: *const FfiRangeEnd,
    high: *const FfiRangeEnd,
) -> u64 {
    const UNKNOWN: u64 = 10;
    guard_value(UNKNOWN, || {
        // SAFETY: a table of ours, shared; the ends are null or valid for the call.
        let (table, low, high) = unsafe {
            (&*table, low.as_ref().and_then(|end| end.to_end()), high.as_ref().and_then(|end| end.to_end()))
        };
        table.table.records_in_range(index as usize, low, high).unwrap_or(UNKNOWN)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_truncate(table: *const TableHandle) -> c_int {
    // SAFETY: a table of ours, shared.
    guard(|| unsafe { &*table }.table.truncate())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_auto_increment_reserve(
    table: *const TableHandle,
    offset: u64,
    increment: u64,
    count: u64,
    first: *mut u64,
    reserved: *mut u64,
) {
    let (from, how_many) = guard_value((u64::MAX, 0), || {
        // SAFETY: a table of ours, shared.
        unsafe { &*table }.table.reserve_auto_increment(offset, increment, count)
    });
    // SAFETY: two places of the shim's.
    unsafe {
        *first = from;
        *reserved = how_many;
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_auto_increment_next(table: *const TableHandle) -> u64 {
    // SAFETY: a table of ours, shared.
    guard_value(1, || unsafe { &*table }.table.next_auto_increment())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_auto_increment_set(table: *const TableHandle, next: u64) -> c_int {
    // SAFETY: a table of ours, shared.
    guard(|| unsafe { &*table }.table.set_auto_increment(next))
}

// ---- cursors ----

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_cursor_new(table: *const TableHandle) -> *mut CursorHandle {
    guard_value(std::ptr::null_mut(), || {
        // SAFETY: a table of ours, shared.
        let table = unsafe { &*table };
        Box::into_raw(Box::new(CursorHandle {
            cursor: table.table.cursor(),
            record_length: table.record_length,
            position_length: table.table.position_length(),
            blobs: Arc::clone(&table.blobs),
            columns: Vec::new(),
            duplicate: 0,
        }))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_cursor_free(cursor: *mut CursorHandle) {
    // SAFETY: made by cistern_cursor_new.
    guard_value((), || drop(unsafe { Box::from_raw(cursor) }));
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_cursor_columns(
    cursor: *mut CursorHandle,
    read: *const u8,
    write: *const u8,
    bytes: usize,
) {
    guard_value((), || {
        // SAFETY: a cursor of ours; the bitmaps are null or that long.
        let (handle, read, written) =
            unsafe { (&mut *cursor, read.as_ref().map(|_| slice(read, bytes)), slice(write, bytes)) };
        let Some(read) = read else { return handle.cursor.set_columns(None) };
        handle.columns.clear();
        handle.columns.extend_from_slice(read);
        for (wanted, also) in handle.columns.iter_mut().zip(written) {
            *wanted |= also;
        }
        handle.cursor.set_columns(Some(&handle.columns));
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_cursor_key_only(cursor: *mut CursorHandle, yes: c_int) {
    guard_value((), || {
        // SAFETY: a cursor of ours.
        let cursor = unsafe { &mut (*cursor).cursor };
        cursor.set_key_only(yes != 0);
        cursor.set_positions_only(yes == 2);
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_cursor_lock(cursor: *mut CursorHandle, lock: c_int) {
    let lock = match lock {
        0 => RowLock::None,
        1 => RowLock::Shared,
        _ => RowLock::Exclusive,
    };
    // SAFETY: a cursor of ours.
    guard_value((), || unsafe { &mut *cursor }.cursor.set_lock(lock));
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_cursor_push_condition(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    index: u32,
    columns: *const u8,
    bytes: usize,
    handler: *mut c_void,
) -> c_int {
    guard_value(0, || {
        // SAFETY: handles of ours, and a bitmap that long.
        let (handle, session, columns) =
            unsafe { (&mut *cursor, session_mut(session), slice(columns, bytes)) };
        let (Ok(session), Some(callbacks)) = (session, log::callbacks()) else { return 0 };
        let (handler, meets) = (handler as usize, callbacks.meets_condition);
        let condition = move |record: &mut [u8]| {
            // SAFETY: the handler owns the cursor, and takes the condition back before it forgets it. The record is handed over for the call.
            match unsafe { meets(handler as *mut c_void, record.as_mut_ptr()) } {
                0 => Verdict::Skip,
                1 => Verdict::Take,
                2 => Verdict::PastTheEnd,
                _ => Verdict::Killed,
            }
        };
        match handle.cursor.push_condition(&session.session, index as usize, columns, Box::new(condition)) {
            Pushed::Refused => 0,
            Pushed::WithoutRange => 1,
            Pushed::WithRange => 2,
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_cursor_clear_condition(cursor: *mut CursorHandle) {
    // SAFETY: a cursor of ours.
    guard_value((), || unsafe { &mut *cursor }.cursor.clear_condition());
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_cursor_start(cursor: *mut CursorHandle, index: i32) -> c_int {
    // SAFETY: a cursor of ours.
    guard(|| unsafe { &mut *cursor }.cursor.start(usize::try_from(index).ok()))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_cursor_stop(cursor: *mut CursorHandle) {
    // SAFETY: a cursor of ours.
    guard_value((), || unsafe { &mut *cursor }.cursor.stop());
}

/// One step of a cursor that reads into `record`.
///
/// # Safety
/// As the module says of handles and records.
#[inline]
unsafe fn step(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    record: *mut u8,
    otherwise: i32,
    move_cursor: impl FnOnce(&mut RowCursor, &mut Session, &mut [u8]) -> Result<bool>,
) -> c_int {
    guard_found(otherwise, || {
        // SAFETY: the caller's promise.
        let (handle, session) = unsafe { (&mut *cursor, session_mut(session)?) };
        // SAFETY: the caller's promise.
        let record = unsafe { record_mut(record, handle.record_length) };
        move_cursor(&mut handle.cursor, &mut session.session, record)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_read(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    tuple: Bytes,
    flag: u32,
    record: *mut u8,
) -> c_int {
    let Some(flag) = ReadFlag::from_server(flag) else { return codes::WRONG_COMMAND };
    // SAFETY: handles and a record; the tuple is valid for the call.
    unsafe {
        step(cursor, session, record, codes::KEY_NOT_FOUND, |cursor, session, record| {
            cursor.read(session, tuple.as_slice(), flag, record)
        })
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_first(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    record: *mut u8,
) -> c_int {
    // SAFETY: handles and a record.
    unsafe { step(cursor, session, record, codes::END_OF_FILE, RowCursor::first) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_last(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    record: *mut u8,
) -> c_int {
    // SAFETY: handles and a record.
    unsafe { step(cursor, session, record, codes::END_OF_FILE, RowCursor::last) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_next(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    record: *mut u8,
) -> c_int {
    // SAFETY: handles and a record.
    unsafe { step(cursor, session, record, codes::END_OF_FILE, RowCursor::next) }
}

/// How many rows there are. Not 0: that can't be told without reading them, or something fails that a scan will meet too.
#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_count(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    rows: *mut u64,
) -> c_int {
    guard_found(codes::WRONG_COMMAND, || {
        // SAFETY: handles, and a place for the number.
        let (handle, session, rows) = unsafe { (&mut *cursor, session_mut(session)?, &mut *rows) };
        let counted = handle.cursor.count(&mut session.session)?;
        *rows = counted.unwrap_or(0);
        Ok(counted.is_some())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_prev(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    record: *mut u8,
) -> c_int {
    // SAFETY: handles and a record.
    unsafe { step(cursor, session, record, codes::END_OF_FILE, RowCursor::prev) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_next_same(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    tuple: Bytes,
    record: *mut u8,
) -> c_int {
    // SAFETY: handles and a record; the tuple is valid for the call.
    unsafe {
        step(cursor, session, record, codes::END_OF_FILE, |cursor, session, record| {
            cursor.next_same(session, tuple.as_slice(), record)
        })
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_read_position(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    position: *const u8,
    record: *mut u8,
) -> c_int {
    // SAFETY: handles and a record; a position is as long as cistern_open said.
    unsafe {
        let length = (*cursor).position_length;
        step(cursor, session, record, codes::KEY_NOT_FOUND, |cursor, session, record| {
            cursor.read_position(session, slice(position, length), record)
        })
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_position(cursor: *const CursorHandle, position: *mut u8) {
    guard_value((), || {
        // SAFETY: a cursor of ours; a position is as long as cistern_open said.
        let (handle, position) = unsafe {
            let handle = &*cursor;
            (handle, record_mut(position, handle.position_length))
        };
        handle.cursor.position(position);
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_cursor_note_position(cursor: *mut CursorHandle, position: *const u8) {
    guard_value((), || {
        // SAFETY: a cursor of ours; a position is as long as cistern_open said.
        unsafe {
            let handle = &mut *cursor;
            handle.cursor.note_position(slice(position, handle.position_length));
        }
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_cursor_note_key(cursor: *mut CursorHandle, index: u32, tuple: Bytes) {
    guard_value((), || {
        // SAFETY: a cursor of ours; the tuple is valid for the call.
        let (handle, tuple) = unsafe { (&mut *cursor, tuple.as_slice()) };
        handle.cursor.note_key(index as usize, tuple);
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_unlock_row(cursor: *mut CursorHandle, session: *mut SessionHandle) {
    guard(|| {
        // SAFETY: handles of ours.
        let (handle, session) = unsafe { (&mut *cursor, session_mut(session)?) };
        handle.cursor.unlock_row(&mut session.session);
        Ok(())
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_insert(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    record: *const u8,
) -> c_int {
    guard(|| {
        // SAFETY: handles and a record, whose BLOBs point to their bytes.
        unsafe {
            let (handle, session) = (&mut *cursor, session_mut(session)?);
            let image = slice(record, handle.record_length);
            let blobs = handle.blobs.of_record(image, None);
            let result = handle.cursor.insert(&mut session.session, Record { image, blobs: &blobs });
            handle.noting_duplicate(result)
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_update(
    cursor: *mut CursorHandle,
    session: *mut SessionHandle,
    old_record: *const u8,
    new_record: *const u8,
) -> c_int {
    guard_found(codes::RECORD_IS_THE_SAME, || {
        // SAFETY: handles and two records; a BLOB that was changed points to its bytes.
        unsafe {
            let (handle, session) = (&mut *cursor, session_mut(session)?);
            let (old, image) =
                (slice(old_record, handle.record_length), slice(new_record, handle.record_length));
            let blobs = handle.blobs.of_record(image, Some(old));
            let result = handle.cursor.update(&mut session.session, old, Record { image, blobs: &blobs });
            handle.noting_duplicate(result)
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_delete(cursor: *mut CursorHandle, session: *mut SessionHandle) -> c_int {
    guard(|| {
        // SAFETY: handles of ours.
        let (handle, session) = unsafe { (&mut *cursor, session_mut(session)?) };
        handle.cursor.delete(&mut session.session)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_duplicate_key(cursor: *const CursorHandle) -> u32 {
    // SAFETY: a cursor of ours.
    unsafe { &*cursor }.duplicate
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cistern_duplicate_position(cursor: *const CursorHandle, position: *mut u8) {
    guard_value((), || {
        // SAFETY: a cursor of ours; a position is as long as cistern_open said.
        let (handle, position) = unsafe {
            let handle = &*cursor;
            (handle, record_mut(position, handle.position_length))
        };
        handle.cursor.duplicate_position(position);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The server answered a definition that never fits by trying again without end.
    #[test]
    fn a_definition_that_does_not_fit_twice_is_refused_for_good() {
        let misfit = || Error::DefinitionChanged { path: "./a/b".to_owned(), reason: "other keys" };
        let open = |path, result: tables::Result<()>| open_with_definition(path, || result);
        let changed = |got: tables::Result<()>| matches!(got, Err(Error::DefinitionChanged { .. }));
        assert!(changed(open("./a/b", Err(misfit()))));
        let Err(Error::Engine(refused)) = open("./a/b", Err(misfit())) else { panic!("it is tried again") };
        assert!(refused.to_string().contains("./a/b"), "{refused}");
        assert!(changed(open("./a/b", Err(misfit()))), "a later statement asks anew");
        assert!(open("./a/b", Ok(())).is_ok());
        assert!(changed(open("./a/b", Err(misfit()))), "it had fitted in between");
        assert!(changed(open("./a/c", Err(misfit()))), "another table");
    }
}
