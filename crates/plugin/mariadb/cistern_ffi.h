/* The border between the shim (C++) and the plugin (Rust): plain C types, no decision on either side.
 *
 * - An int that is returned is 0 or a code of the server (HA_ERR_...); cistern_message has the text of this thread's last refusal.
 * - No panic and no exception crosses. Pointers that Rust gets are valid for the call only, unless a comment says otherwise.
 * - A session is driven by one thread at a time; its interrupt may be used by any thread until the session is freed.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct cistern_session cistern_session;
typedef struct cistern_interrupt cistern_interrupt;
typedef struct cistern_table cistern_table;
typedef struct cistern_cursor cistern_cursor;
typedef struct cistern_indexes cistern_indexes;

typedef struct { const char *start; size_t length; } cistern_text;
typedef struct { const uint8_t *start; size_t length; } cistern_bytes;

/* As tables::Kind; the numbers are the border's own. */
enum cistern_kind {
  CISTERN_INT= 0, CISTERN_UINT= 1, CISTERN_FLOAT= 2, CISTERN_DOUBLE= 3, CISTERN_FIXED= 4, CISTERN_CHAR= 5, CISTERN_VARCHAR= 6, CISTERN_BLOB= 7
};
enum cistern_storage { CISTERN_STORED= 0, CISTERN_COMPUTED= 1, CISTERN_ABSENT= 2 };
/* Facts about a collation; Rust draws the conclusions. */
enum cistern_collation_fact {
  CISTERN_BINARY= 1,          /* my_charset_bin */
  CISTERN_NO_PAD= 2,          /* MY_CS_NOPAD */
  CISTERN_BYTE_COMPARABLE= 4, /* a _bin collation whose order is that of the bytes */
  CISTERN_ONE_LEVEL= 8,       /* weights of one level */
  CISTERN_LEVELS_APART= 16    /* several levels, whose weights can be had apart */
};
typedef struct {
  const void *collation;      /* CHARSET_INFO, lives as long as the process */
  uint32_t offset, pack_length, null_offset;
  uint8_t null_mask, kind, length_bytes, storage, collation_facts, char_bytes_max;
} cistern_field;
typedef struct { uint32_t field, length, store_length, weight_bytes_max; uint8_t descending; } cistern_part;
typedef struct { const cistern_part *parts; uint32_t parts_count, extension_count; uint8_t unique; } cistern_index;
typedef struct {
  uint32_t record_length, null_bytes, fields_count, indexes_count;
  const cistern_field *fields;
  const cistern_index *indexes;
  int32_t primary, auto_increment;     /* -1: none */
} cistern_descriptor;

typedef struct {
  /* Weights of the text, unpadded and whole, into room; returns their length, or the negated room to try next. levels: MY_STRXFRM_LEVEL bits, 0 for all. */
  ptrdiff_t (*weights)(const void *collation, uint32_t levels, const uint8_t *text, size_t length, uint8_t *room, size_t room_length);
  size_t (*prefix_bytes)(const void *collation, const uint8_t *text, size_t length, size_t chars);
  int (*killed)(void *thd);                                /* also true when the client has gone away */
  /* Of the condition that the handler has pushed, for the entry whose columns are in its record: 0 no, 1 yes, 2 beyond the end of the range, else the statement is to end. */
  int (*meets_condition)(void *handler, uint8_t *record);
  void (*progress)(void *thd, uint64_t done, uint64_t total);   /* of the stage that the statement is in */
  void (*log)(int level, const char *text, size_t length); /* 0 information, 1 warning, 2 error */
} cistern_callbacks;

typedef struct {
  cistern_text bucket;                 /* URL; empty: the environment variable CISTERN_BUCKET */
  cistern_text branch;
  cistern_text data_dir;               /* engine's local files */
  cistern_text server_dir;             /* mariadbd's data directory */
  cistern_text temporary_dir;          /* where the server names temporary tables */
  uint64_t memory_bytes, memtable_bytes, disk_cache_bytes, unuploaded_bytes_max, transaction_bytes_max, wal_upload_interval_ms; /* 0: whatever fits, but for the last */
} cistern_config;

typedef void (*cistern_name_sink)(void *argument, const char *name, size_t length);
typedef void (*cistern_counter_sink)(void *argument, const char *name, size_t length, uint64_t value);

/* ---- life ---- */
/* 0, or the exit status that tells a supervisor why not: see exit codes in crates/plugin/README.md. The reason is in the log then. */
int cistern_start(const cistern_callbacks *callbacks, const cistern_config *config);
void cistern_drop_leftovers(void);     /* tables of an ALTER that a crash cut short, after the server had its chance to finish it */
void cistern_stop(void);
void cistern_status_text(cistern_name_sink sink, void *argument);            /* one call with the whole text */
void cistern_status_counters(cistern_counter_sink sink, void *argument);
/* ---- files that the server keeps beside its tables ---- */
int cistern_files_sync(void);          /* brings the catalogue up to what is in the data directory; cheap if nothing changed */
int cistern_may_remove_files(cistern_bytes text, int many);   /* 1 if the statement, or one of the many that may be in the text, may */
void cistern_statement_begins(void);   /* one that may remove files */
int cistern_statement_ends(int changed);  /* changed: it is of a kind that changes files; brings the catalogue up to them */
/* ---- catalogue; paths are the server's ("./db/table") ---- */
int cistern_table_create(cistern_text path, const cistern_descriptor *descriptor, cistern_bytes frm, uint64_t auto_increment);
int cistern_table_drop(cistern_text path);
int cistern_table_rename(cistern_text from, cistern_text to);
int cistern_table_exists(cistern_text path);                                 /* 1 or 0 */
int cistern_table_image(cistern_text path, uint8_t **frm, size_t *length);   /* to be freed with cistern_image_free */
int cistern_table_set_image(cistern_text path, const cistern_descriptor *descriptor, cistern_bytes frm);
void cistern_image_free(uint8_t *frm, size_t length);
int cistern_table_list(cistern_text directory, cistern_name_sink sink, void *argument);
int cistern_database_drop(cistern_text directory);
const char *cistern_message(size_t *length);                                 /* of this thread's last refused call */
/* ---- sessions ---- */
cistern_session *cistern_session_new(void *thd, cistern_interrupt **interrupt);
void cistern_session_free(cistern_session *session, cistern_interrupt *interrupt);
void cistern_session_interrupt(const cistern_interrupt *interrupt);
void cistern_session_isolation(cistern_session *session, int repeatable_read);
void cistern_session_lock_timeout(cistern_session *session, uint64_t milliseconds);
void cistern_session_conflicts(cistern_session *session, int detect);
int cistern_session_snapshot(cistern_session *session);
int cistern_statement_begin(cistern_session *session);
int cistern_statement_rollback(cistern_session *session);
int cistern_commit(cistern_session *session);
int cistern_rollback(cistern_session *session);
int cistern_savepoint_set(cistern_session *session, uint64_t *id);
int cistern_savepoint_rollback(cistern_session *session, uint64_t id);
int cistern_savepoint_release(cistern_session *session, uint64_t id);
/* ---- tables ---- */
int cistern_open(cistern_text path, const cistern_descriptor *descriptor, cistern_table **table, uint32_t *position_length);
void cistern_close(cistern_table *table);
uint64_t cistern_row_count(const cistern_table *table);
uint64_t cistern_statistics(const cistern_table *table);       /* samples anew if much has changed; a number that changes when cistern_records_per_key does */
uint64_t cistern_data_bytes(const cistern_table *table);
uint64_t cistern_index_bytes(const cistern_table *table);
uint64_t cistern_records_per_key(const cistern_table *table, uint32_t index, uint32_t part);
int cistern_analyze(const cistern_table *table);
typedef struct { cistern_bytes tuple; uint32_t flag; } cistern_range_end;    /* start NULL: open end */
uint64_t cistern_records_in_range(const cistern_table *table, uint32_t index, const cistern_range_end *low, const cistern_range_end *high);
int cistern_truncate(const cistern_table *table);
void cistern_auto_increment_reserve(const cistern_table *table, uint64_t offset, uint64_t increment, uint64_t count, uint64_t *first, uint64_t *reserved);
uint64_t cistern_auto_increment_next(const cistern_table *table);
int cistern_auto_increment_set(const cistern_table *table, uint64_t next);
/* ---- cursors: one for each handler ---- */
cistern_cursor *cistern_cursor_new(const cistern_table *table);
void cistern_cursor_free(cistern_cursor *cursor);
void cistern_cursor_columns(cistern_cursor *cursor, const uint8_t *read, const uint8_t *write, size_t bytes); /* read NULL: all */
void cistern_cursor_key_only(cistern_cursor *cursor, int yes);               /* 1: where entries hold all columns; 2: always, for only positions are wanted */
/* One of a batch of rows that will be read, in primary order: what they lack is fetched at once. */
void cistern_cursor_note_position(cistern_cursor *cursor, const uint8_t *position);
void cistern_cursor_note_key(cistern_cursor *cursor, uint32_t index, cistern_bytes tuple);
void cistern_cursor_lock(cistern_cursor *cursor, int lock);                  /* 0 none, 1 shared, 2 exclusive */
/* Leaves the handler's condition to reads by an index until it is cleared; columns: all that it may look at. 0: refused. 1: accepted, but entries can not tell the end of a range; 2: they can. */
int cistern_cursor_push_condition(cistern_cursor *cursor, cistern_session *session, uint32_t index, const uint8_t *columns, size_t bytes, void *handler);
void cistern_cursor_clear_condition(cistern_cursor *cursor);
int cistern_cursor_start(cistern_cursor *cursor, int32_t index);             /* -1: rows */
void cistern_cursor_stop(cistern_cursor *cursor);
int cistern_read(cistern_cursor *cursor, cistern_session *session, cistern_bytes tuple, uint32_t flag, uint8_t *record);
int cistern_first(cistern_cursor *cursor, cistern_session *session, uint8_t *record);
int cistern_last(cistern_cursor *cursor, cistern_session *session, uint8_t *record);
int cistern_next(cistern_cursor *cursor, cistern_session *session, uint8_t *record);
int cistern_prev(cistern_cursor *cursor, cistern_session *session, uint8_t *record);
int cistern_count(cistern_cursor *cursor, cistern_session *session, uint64_t *rows); /* not 0: the rows must be read to be counted */
int cistern_next_same(cistern_cursor *cursor, cistern_session *session, cistern_bytes tuple, uint8_t *record);
int cistern_read_position(cistern_cursor *cursor, cistern_session *session, const uint8_t *position, uint8_t *record);
void cistern_position(const cistern_cursor *cursor, uint8_t *position);
void cistern_unlock_row(cistern_cursor *cursor, cistern_session *session);
int cistern_insert(cistern_cursor *cursor, cistern_session *session, const uint8_t *record);
int cistern_update(cistern_cursor *cursor, cistern_session *session, const uint8_t *old_record, const uint8_t *new_record);
int cistern_delete(cistern_cursor *cursor, cistern_session *session);
/* ---- many rows into an empty table; see tables::BulkFacts ---- */
typedef struct { uint64_t rows; uint8_t copies, gathers, autocommit, refuses_duplicates, looks_back; } cistern_bulk_facts;
int cistern_bulk_begin(cistern_cursor *cursor, cistern_session *session, const cistern_bulk_facts *facts, int *begun);   /* begun 0: rows are inserted as always */
int cistern_bulk_end(cistern_cursor *cursor, cistern_session *session, uint8_t *record);     /* after HA_ERR_FOUND_DUPP_KEY the record is the row's */
void cistern_bulk_abort(cistern_cursor *cursor);
/* ---- indexes added and dropped in place; kept: for each index of the altered table, which of the table's it is, -1: it has to be built ---- */
int cistern_indexes_possible(const cistern_table *table, const cistern_descriptor *altered, const int32_t *kept);   /* 1 or 0: the rows have to be copied */
/* Nobody else writes to the table from here to the commit. After HA_ERR_FOUND_DUPP_KEY the record is the row's, and the key that of the altered table. */
int cistern_indexes_build(const cistern_table *table, cistern_cursor *cursor, cistern_session *session, const cistern_descriptor *altered, const int32_t *kept,
                          uint8_t *record, cistern_indexes **built);
int cistern_indexes_commit(const cistern_table *table, cistern_bytes frm, cistern_indexes *built);   /* frees them, whatever it returns */
void cistern_indexes_free(cistern_indexes *built);
uint32_t cistern_duplicate_key(const cistern_cursor *cursor);                /* after HA_ERR_FOUND_DUPP_KEY */
void cistern_duplicate_position(const cistern_cursor *cursor, uint8_t *position);

#ifdef __cplusplus
}
#endif
