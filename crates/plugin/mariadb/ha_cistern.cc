/* The shim: MariaDB's storage engine interface on one side, cistern_ffi.h on the other.
 *
 * - It translates and decides nothing that could be decided in Rust.
 * - THD is touched through the server's functions only: its layout changes between patch levels.
 * - No exception leaves it; the few containers it uses allocate a few hundred bytes when a table is opened.
 */
#define MYSQL_SERVER 1
#include <my_global.h>
#include "sql_class.h"
#include "handler.h"
#include "table.h"
#include "field.h"
#include "key.h"
#include "log.h"
#include "sql_table.h"
#include "sql_lex.h"
#include "sql_select.h"
#include "sql_parse.h"
#include "opt_range.h"
#include "mysqld.h"
#include <mysql/plugin.h>
#include <mysql/plugin_audit.h>
#include <vector>
#include "ha_cistern.h"

static handlerton *cistern_hton;

/* ---- settings ---- */

static char *setting_bucket, *setting_branch, *setting_data_dir;
static unsigned long long setting_memory, setting_memtable, setting_disk_cache, setting_unuploaded, setting_transaction;
static unsigned int setting_upload_interval;

#define SETTING_SIZE(name, variable, text, default_value, minimum) \
  MYSQL_SYSVAR_ULONGLONG(name, variable, PLUGIN_VAR_RQCMDARG | PLUGIN_VAR_READONLY, text, nullptr, nullptr, default_value, minimum, ULONGLONG_MAX >> 1, 4096)
#define KIB 1024ULL
#define MIB (1024ULL * KIB)

static MYSQL_SYSVAR_STR(bucket, setting_bucket, PLUGIN_VAR_RQCMDARG | PLUGIN_VAR_READONLY | PLUGIN_VAR_MEMALLOC,
  "URL of the bucket (file:///..., s3://bucket/prefix); without it the environment variable CISTERN_BUCKET. Credentials never go here", nullptr, nullptr, "");
static MYSQL_SYSVAR_STR(branch, setting_branch, PLUGIN_VAR_RQCMDARG | PLUGIN_VAR_READONLY | PLUGIN_VAR_MEMALLOC,
  "Branch of the bucket that this server writes", nullptr, nullptr, "main");
static MYSQL_SYSVAR_STR(data_dir, setting_data_dir, PLUGIN_VAR_RQCMDARG | PLUGIN_VAR_READONLY | PLUGIN_VAR_MEMALLOC,
  "Directory of the local wal and caches; without it '#cistern' in the data directory", nullptr, nullptr, "");
static SETTING_SIZE(memory_size, setting_memory, "Bytes of memory that the whole server may take; 0: half of the machine's, or most of what its control group allows", 0, 0);
static SETTING_SIZE(memtable_size, setting_memtable, "Bytes of memory that newest rows fill before they are flushed; 0: a sixteenth of the engine's, 64 MiB at most", 0, 0);
static SETTING_SIZE(disk_cache_size, setting_disk_cache, "Bytes of local disk for copies of what is in the bucket; 0: half of what is free there or taken by them", 0, 0);
static SETTING_SIZE(unuploaded_size_max, setting_unuploaded, "Bytes of flushed data that may wait for their upload before writes are refused; 0: an eighth of that, 4 GiB at most", 0, 0);
static SETTING_SIZE(transaction_size_max, setting_transaction, "Bytes that one transaction may write; 0: an eighth of the engine's memory, 1 GiB at most", 0, 0);
static MYSQL_SYSVAR_UINT(wal_upload_interval_ms, setting_upload_interval, PLUGIN_VAR_RQCMDARG | PLUGIN_VAR_READONLY,
  "Milliseconds between uploads of the wal: what a lost disk may cost, with the upload's own time", nullptr, nullptr, 700, 10, 3600000, 0);
static MYSQL_THDVAR_ULONG(lock_wait_timeout, PLUGIN_VAR_RQCMDARG,
  "Seconds that a statement waits for a row lock before it fails with 1205", nullptr, nullptr, 50, 0, 100000000, 0);

static MYSQL_THDVAR_BOOL(snapshot_isolation, PLUGIN_VAR_OPCMDARG,
  "In REPEATABLE READ, a write to a row that changed after the transaction's snapshot fails with 1213; OFF writes over it, as InnoDB long did", nullptr, nullptr, TRUE);

static struct st_mysql_sys_var *cistern_settings[]= {
  MYSQL_SYSVAR(bucket), MYSQL_SYSVAR(branch), MYSQL_SYSVAR(data_dir), MYSQL_SYSVAR(memory_size), MYSQL_SYSVAR(memtable_size), MYSQL_SYSVAR(disk_cache_size),
  MYSQL_SYSVAR(unuploaded_size_max), MYSQL_SYSVAR(transaction_size_max), MYSQL_SYSVAR(wal_upload_interval_ms), MYSQL_SYSVAR(lock_wait_timeout), MYSQL_SYSVAR(snapshot_isolation), nullptr };

/* Applications and dumps set these two of InnoDB's session variables; a plugin's variables start with its name, hence the names of the two small plugins below. */
namespace innodb_lock {
static MYSQL_THDVAR_ULONG(wait_timeout, PLUGIN_VAR_RQCMDARG,
  "As cistern_lock_wait_timeout, which it overrides when it is not 50", nullptr, nullptr, 50, 0, 100000000, 0);
static struct st_mysql_sys_var *settings[]= { MYSQL_SYSVAR(wait_timeout), nullptr };
static uint64_t milliseconds(THD *thd) { return THDVAR(thd, wait_timeout) * 1000ULL; }
}
namespace innodb_strict {
static MYSQL_THDVAR_BOOL(mode, PLUGIN_VAR_OPCMDARG, "Accepted for compatibility; does nothing", nullptr, nullptr, TRUE);
static struct st_mysql_sys_var *settings[]= { MYSQL_SYSVAR(mode), nullptr };
}
static uint64_t lock_timeout_ms(THD *thd)
{
  uint64_t alias= innodb_lock::milliseconds(thd);
  return alias != 50000 ? alias : THDVAR(thd, lock_wait_timeout) * 1000ULL;
}

/* ---- what Rust may ask of the server ---- */

static cistern_text text_of(const char *s) { return cistern_text{ s ? s : "", s ? strlen(s) : 0 }; }

static ptrdiff_t ask_weights(const void *collation, uint32_t levels, const uint8_t *text, size_t length, uint8_t *room, size_t room_length)
{
  CHARSET_INFO *cs= (CHARSET_INFO *) collation;
  /* strnxfrm cuts what finds no room. How much is needed nobody knows: strnxfrmlen forgets the separators of the Czech passes and the longest expansions. */
  size_t written= cs->coll->strnxfrm(cs, room, room_length, UINT_MAX32, text, length, levels);
  return written + 8 < room_length ? (ptrdiff_t) written : -(ptrdiff_t) (room_length * 2 + 64);
}

static size_t ask_prefix_bytes(const void *collation, const uint8_t *text, size_t length, size_t chars)
{
  CHARSET_INFO *cs= (CHARSET_INFO *) collation;
  size_t bytes= cs->charpos((const char *) text, (const char *) text + length, chars);
  return bytes < length ? bytes : length;
}

static int ask_killed(void *thd_pointer)
{
  THD *thd= (THD *) thd_pointer;
  return thd && (thd_kill_level(thd) != THD_IS_NOT_KILLED || !thd_is_connected(thd));
}

static void ask_progress(void *thd, uint64_t done, uint64_t total) { thd_progress_report((THD *) thd, done, total); }

static void ask_log(int level, const char *text, size_t length)
{
  switch (level) {
  case 0: sql_print_information("CISTERN: %.*s", (int) length, text); break;
  case 1: sql_print_warning("CISTERN: %.*s", (int) length, text); break;
  default: sql_print_error("CISTERN: %.*s", (int) length, text);
  }
}

static int ask_condition(void *asked, uint8_t *) { return ((ha_cistern *) asked)->meets_condition(); }

static const cistern_callbacks callbacks= { ask_weights, ask_prefix_bytes, ask_killed, ask_condition, ask_progress, ask_log };

/* ---- a table's shape ---- */

class Shape
{
  std::vector<cistern_field> fields;
  std::vector<std::vector<cistern_part>> parts;
  std::vector<cistern_index> indexes;
  cistern_descriptor all;

  static uint8_t facts_of(CHARSET_INFO *cs)
  {
    uint8_t facts= 0;
    if (cs == &my_charset_bin)
      facts|= CISTERN_BINARY;
    if (cs->state & MY_CS_NOPAD)
      facts|= CISTERN_NO_PAD;
    if ((cs->state & MY_CS_BINSORT) && (cs->mbmaxlen == 1 || !strncmp(cs->cs_name.str, "utf8", 4)))
      facts|= CISTERN_BYTE_COMPARABLE;
    if (cs->levels_for_order <= 1)
      facts|= CISTERN_ONE_LEVEL;
    else if (cs->uca)
      facts|= CISTERN_LEVELS_APART;
    return facts;
  }

  static uint8_t kind_of(const Field *field)
  {
    switch (field->real_type()) {
    case MYSQL_TYPE_TINY: case MYSQL_TYPE_SHORT: case MYSQL_TYPE_INT24: case MYSQL_TYPE_LONG: case MYSQL_TYPE_LONGLONG:
      return (field->flags & UNSIGNED_FLAG) ? CISTERN_UINT : CISTERN_INT;
    case MYSQL_TYPE_YEAR: case MYSQL_TYPE_NEWDATE: case MYSQL_TYPE_DATE: case MYSQL_TYPE_ENUM: case MYSQL_TYPE_SET:
      return CISTERN_UINT;
    case MYSQL_TYPE_DATETIME: case MYSQL_TYPE_TIMESTAMP:
      return field->decimals() ? CISTERN_FIXED : CISTERN_UINT;      /* with a fraction they are stored big-endian */
    case MYSQL_TYPE_TIME:
      return field->decimals() ? CISTERN_FIXED : CISTERN_INT;
    case MYSQL_TYPE_FLOAT: return CISTERN_FLOAT;
    case MYSQL_TYPE_DOUBLE: return CISTERN_DOUBLE;
    case MYSQL_TYPE_STRING:
      return field->type_handler()->is_traditional_scalar_type() && field->charset() != &my_charset_bin ? CISTERN_CHAR : CISTERN_FIXED;
    case MYSQL_TYPE_VARCHAR: case MYSQL_TYPE_VARCHAR_COMPRESSED: return CISTERN_VARCHAR;
    case MYSQL_TYPE_TINY_BLOB: case MYSQL_TYPE_MEDIUM_BLOB: case MYSQL_TYPE_LONG_BLOB: case MYSQL_TYPE_BLOB: case MYSQL_TYPE_BLOB_COMPRESSED: case MYSQL_TYPE_GEOMETRY:
      return CISTERN_BLOB;
    default: return CISTERN_FIXED;
    }
  }

  static cistern_field field_of(const TABLE *table, const Field *field)
  {
    cistern_field out{};
    out.offset= (uint32_t) (field->ptr - table->record[0]);
    out.pack_length= field->pack_length();
    if (field->real_maybe_null()) {
      out.null_offset= (uint32_t) (field->null_ptr - table->record[0]);
      out.null_mask= field->null_bit;
    }
    out.kind= kind_of(field);
    if (out.kind == CISTERN_VARCHAR)
      out.length_bytes= ((const Field_varstring *) field)->length_bytes;
    else if (out.kind == CISTERN_BLOB)
      out.length_bytes= ((const Field_blob *) field)->pack_length_no_ptr();
    out.collation= field->charset();
    out.collation_facts= facts_of(field->charset());
    out.char_bytes_max= field->charset()->mbmaxlen;
    out.storage= field->stored_in_db() ? CISTERN_STORED : (field->flags & (PART_KEY_FLAG | PART_INDIRECT_KEY_FLAG)) ? CISTERN_COMPUTED : CISTERN_ABSENT;
    return out;
  }

  static cistern_part part_of(const TABLE *table, const KEY_PART_INFO *part)
  {
    cistern_part out{};
    out.field= part->fieldnr - 1;
    out.length= part->length;
    out.store_length= part->store_length;
    out.descending= (part->key_part_flag & HA_REVERSE_SORT) != 0;
    CHARSET_INFO *cs= table->field[part->fieldnr - 1]->charset();
    out.weight_bytes_max= (uint32_t) cs->coll->strnxfrmlen(cs, part->length);
    return out;
  }

public:
  explicit Shape(const TABLE *table)
  {
    const TABLE_SHARE *share= table->s;
    for (uint i= 0; i < share->fields; i++)
      fields.push_back(field_of(table, table->field[i]));
    parts.resize(share->keys);
    for (uint i= 0; i < share->keys; i++) {
      const KEY *key= table->key_info + i;
      uint total= key->ext_key_parts > key->user_defined_key_parts ? key->ext_key_parts : key->user_defined_key_parts;
      for (uint p= 0; p < total; p++)
        parts[i].push_back(part_of(table, key->key_part + p));
      indexes.push_back(cistern_index{ parts[i].data(), key->user_defined_key_parts, total - key->user_defined_key_parts, (uint8_t) ((key->flags & HA_NOSAME) != 0) });
    }
    all= cistern_descriptor{ (uint32_t) share->reclength, share->null_bytes, (uint32_t) fields.size(), (uint32_t) indexes.size(), fields.data(), indexes.data(),
      share->primary_key == MAX_KEY ? -1 : (int32_t) share->primary_key,
      table->found_next_number_field ? (int32_t) table->found_next_number_field->field_index : -1 };
  }
  const cistern_descriptor *get() const { return &all; }
};

/* ---- transactions ---- */

struct Connection
{
  cistern_session *session;
  cistern_interrupt *interrupt;
  bool transaction, statement;          /* has begun */
};

static Connection *connection_of(THD *thd)
{
  Connection *connection= (Connection *) thd_get_ha_data(thd, cistern_hton);
  if (likely(connection != nullptr))
    return connection;
  connection= new Connection();
  connection->session= cistern_session_new(thd, &connection->interrupt);
  thd_set_ha_data(thd, cistern_hton, connection);
  return connection;
}

static bool several_statements(THD *thd) { return thd_test_options(thd, OPTION_NOT_AUTOCOMMIT | OPTION_BEGIN) != 0; }

static Connection *join_transaction(THD *thd)
{
  Connection *connection= connection_of(thd);
  if (!connection->transaction) {
    cistern_session_isolation(connection->session, thd_tx_isolation(thd) >= ISO_REPEATABLE_READ);
    connection->transaction= true;
  }
  if (!connection->statement) {
    cistern_session_lock_timeout(connection->session, lock_timeout_ms(thd));
    cistern_session_conflicts(connection->session, THDVAR(thd, snapshot_isolation));
    cistern_statement_begin(connection->session);
    connection->statement= true;
  }
  trans_register_ha(thd, false, cistern_hton, 0);
  if (several_statements(thd))
    trans_register_ha(thd, true, cistern_hton, 0);
  return connection;
}

static void report(int error)
{
  size_t length;
  const char *text= cistern_message(&length);
  if (error && length)
    my_printf_error(ER_GET_ERRMSG, "Got error %d '%.*s' from %s", MYF(0), error, (int) length, text, "CISTERN");
}

static int cistern_hton_commit(handlerton *, THD *thd, bool all)
{
  Connection *connection= connection_of(thd);
  connection->statement= false;
  if (!all && several_statements(thd))
    return 0;
  connection->transaction= false;
  int error= cistern_commit(connection->session);
  if (unlikely(error))
    report(error);
  return error;
}

static int cistern_hton_rollback(handlerton *, THD *thd, bool all)
{
  Connection *connection= connection_of(thd);
  bool whole= all || !several_statements(thd);
  int error= whole ? cistern_rollback(connection->session) : cistern_statement_rollback(connection->session);
  connection->statement= false;
  if (whole)
    connection->transaction= false;
  return error;
}

static int cistern_hton_close_connection(handlerton *, THD *thd)
{
  Connection *connection= (Connection *) thd_get_ha_data(thd, cistern_hton);
  if (!connection)
    return 0;
  /* First out of KILL's sight (it looks under the lock that this call takes), then gone. */
  thd_set_ha_data(thd, cistern_hton, nullptr);
  cistern_session_free(connection->session, connection->interrupt);
  delete connection;
  return 0;
}

static void cistern_hton_kill_query(handlerton *, THD *thd, enum thd_kill_levels)
{
  Connection *connection= (Connection *) thd_get_ha_data(thd, cistern_hton);
  if (connection)
    cistern_session_interrupt(connection->interrupt);
}

static int cistern_hton_savepoint_set(handlerton *, THD *thd, void *place)
{ return cistern_savepoint_set(connection_of(thd)->session, (uint64_t *) place); }
static int cistern_hton_savepoint_rollback(handlerton *, THD *thd, void *place)
{ return cistern_savepoint_rollback(connection_of(thd)->session, *(uint64_t *) place); }
static int cistern_hton_savepoint_release(handlerton *, THD *thd, void *place)
{ return cistern_savepoint_release(connection_of(thd)->session, *(uint64_t *) place); }
static bool cistern_hton_savepoint_can_release_mdl(handlerton *, THD *) { return true; }

static int cistern_hton_start_consistent_snapshot(handlerton *, THD *thd)
{
  Connection *connection= connection_of(thd);
  cistern_session_isolation(connection->session, thd_tx_isolation(thd) >= ISO_REPEATABLE_READ);
  connection->transaction= true;
  if (thd_tx_isolation(thd) < ISO_REPEATABLE_READ)
    push_warning(thd, Sql_condition::WARN_LEVEL_WARN, HA_ERR_UNSUPPORTED,
                 "CISTERN: WITH CONSISTENT SNAPSHOT was ignored because this phrase can only be used with REPEATABLE READ isolation level.");
  else
    cistern_session_snapshot(connection->session);
  trans_register_ha(thd, true, cistern_hton, 0);
  return 0;
}

/* ---- definitions: the catalogue is the truth, .frm files are a cache of the server's ---- */

static int cistern_hton_discover_table(handlerton *, THD *thd, TABLE_SHARE *share)
{
  uint8_t *frm;
  size_t length;
  if (int error= cistern_table_image(text_of(share->normalized_path.str), &frm, &length))
    return error;
  /* write: without a file, LOCK TABLES t WRITE; DROP TABLE t waits for itself for ever. */
  my_errno= 0;
  bool failed= share->init_from_binary_frm_image(thd, true, frm, length);
  cistern_image_free(frm, length);
  return failed ? (my_errno ? my_errno : HA_ERR_NO_SUCH_TABLE) : 0;
}

static int cistern_hton_discover_existence(handlerton *, const char *database, const char *table)
{
  char path[FN_REFLEN + 1];
  build_table_filename(path, sizeof(path) - 1, database, table, "", 0);
  return cistern_table_exists(text_of(path));
}

static void add_discovered(void *list, const char *name, size_t length)
{
  char file[FN_REFLEN];
  if (length >= sizeof(file) || memchr(name, '#', length))    /* #sql... and the parts of partitioned tables are nobody's business */
    return;
  memcpy(file, name, length);
  file[length]= 0;
  ((handlerton::discovered_list *) list)->add_file(file);
}

static int cistern_hton_discover_names(handlerton *, LEX_CSTRING *database, MY_DIR *, handlerton::discovered_list *list)
{
  char path[FN_REFLEN + 1];
  size_t length= build_table_filename(path, sizeof(path) - 1, database->str, "", "", 0);
  if (length && path[length - 1] == FN_LIBCHAR)
    path[--length]= 0;
  return cistern_table_list(cistern_text{ path, length }, add_discovered, list) != 0;
}

static int cistern_hton_drop_table(handlerton *, const char *path) { return cistern_table_drop(text_of(path)); }
static void cistern_hton_drop_database(handlerton *, char *path) { cistern_database_drop(text_of(path)); }

/* ---- status ---- */

struct Printer { THD *thd; stat_print_fn *print; bool failed; };
static void print_status(void *argument, const char *text, size_t length)
{
  Printer *to= (Printer *) argument;
  to->failed= to->print(to->thd, STRING_WITH_LEN("CISTERN"), STRING_WITH_LEN(""), text, length);
}
static bool cistern_hton_show_status(handlerton *, THD *thd, stat_print_fn *print, enum ha_stat_type type)
{
  if (type != HA_ENGINE_STATUS)
    return false;
  Printer to{ thd, print, false };
  cistern_status_text(print_status, &to);
  return to.failed;
}

static const size_t counters_max= 128;
struct Counters { struct st_mysql_show_var *vars; ulonglong *values; char (*names)[64]; size_t count; };
static void add_counter(void *argument, const char *name, size_t length, uint64_t value)
{
  Counters *to= (Counters *) argument;
  if (to->count == counters_max || length >= sizeof(to->names[0]))
    return;
  memcpy(to->names[to->count], name, length);
  to->names[to->count][length]= 0;
  to->values[to->count]= value;
  to->vars[to->count]= { to->names[to->count], &to->values[to->count], SHOW_ULONGLONG };
  to->count++;
}
static int show_counters(THD *thd, struct st_mysql_show_var *var, void *, struct system_status_var *, enum enum_var_type)
{
  Counters to;
  to.vars= (struct st_mysql_show_var *) thd_calloc(thd, sizeof(*to.vars) * (counters_max + 1));
  to.values= (ulonglong *) thd_calloc(thd, sizeof(*to.values) * counters_max);
  to.names= (char (*)[64]) thd_calloc(thd, sizeof(*to.names) * counters_max);
  to.count= 0;
  if (to.vars && to.values && to.names)
    cistern_status_counters(add_counter, &to);
  var->type= SHOW_ARRAY;
  var->value= to.vars;
  return 0;
}
static struct st_mysql_show_var cistern_status[]= { { "Cistern", (void *) show_counters, SHOW_FUNC }, { nullptr, nullptr, SHOW_UNDEF } };

/* ---- the handler ---- */

static handler *cistern_hton_create(handlerton *hton, TABLE_SHARE *share, MEM_ROOT *root) { return new (root) ha_cistern(hton, share); }

ulonglong ha_cistern::table_flags() const
{
  return HA_REC_NOT_IN_SEQ | HA_NULL_IN_KEY | HA_CAN_INDEX_BLOBS | HA_BINLOG_ROW_CAPABLE | HA_BINLOG_STMT_CAPABLE | HA_TABLE_SCAN_ON_INDEX | HA_CAN_SQL_HANDLER |
         HA_CAN_VIRTUAL_COLUMNS | HA_CAN_GEOMETRY | HA_CAN_TABLES_WITHOUT_ROLLBACK | HA_PARTIAL_COLUMN_READ | HA_PRIMARY_KEY_IN_READ_INDEX | HA_DUPLICATE_POS |
         HA_ONLINE_ANALYZE | HA_CAN_ONLINE_BACKUPS | HA_CONCURRENT_OPTIMIZE | HA_CRASH_SAFE | HA_HAS_RECORDS;
}

ulong ha_cistern::index_flags(uint index, uint, bool) const
{
  return HA_READ_NEXT | HA_READ_PREV | HA_READ_ORDER | HA_READ_RANGE | HA_KEYREAD_ONLY | HA_KEY_SCAN_NOT_ROR |
         (index == table_share->primary_key ? HA_CLUSTERED_INDEX : HA_DO_INDEX_COND_PUSHDOWN);
}

static const double page_bytes= 16384;

double ha_cistern::scan_time() { return (double) stats.data_file_length / page_bytes + 1; }

double ha_cistern::read_time(uint index, uint ranges, ha_rows rows)
{
  if (index != table_share->primary_key)
    return handler::read_time(index, ranges, rows);
  if (rows <= 2)
    return (double) rows;
  double whole= scan_time();
  return stats.records < rows ? whole : ranges + (double) rows / (double) stats.records * whole;
}

int ha_cistern::fail(int error)
{
  if (unlikely(error == HA_ERR_LOCK_DEADLOCK))
    ha_thd()->mark_transaction_to_rollback(true);
  return error;
}

bool ha_cistern::is_sequence() const { return table->s->table_type == TABLE_TYPE_SEQUENCE; }

cistern_session *ha_cistern::session()
{
  if (likely(statement_session != nullptr))
    return statement_session;
  if (!copying && !is_sequence())
    return connection_of(ha_thd())->session;
  if (!own_session) {
    own_session= cistern_session_new(ha_thd(), &own_interrupt);
    cistern_session_isolation(own_session, false);
    cistern_session_lock_timeout(own_session, lock_timeout_ms(ha_thd()));
    cistern_statement_begin(own_session);
  }
  return own_session;
}

int ha_cistern::own_commit()
{
  copied_bytes= 0;
  if (!own_session)
    return 0;
  int error= cistern_commit(own_session);
  cistern_statement_begin(own_session);
  return error;
}

void ha_cistern::end_own_session()
{
  if (own_session)
    cistern_session_free(own_session, own_interrupt);
  own_session= nullptr;
  own_interrupt= nullptr;
}

int ha_cistern::open(const char *name, int, uint)
{
  uint32_t position_length;
  if (int error= cistern_open(text_of(name), Shape(table).get(), &opened, &position_length))
    return error;
  ref_length= position_length;
  strmake(path, name, sizeof(path) - 1);
  mrr.init(this, table);
  cursor= cistern_cursor_new(opened);
  info(HA_STATUS_VARIABLE | HA_STATUS_CONST);
  return 0;
}

int ha_cistern::close()
{
  end_own_session();
  if (cursor)
    cistern_cursor_free(cursor);
  if (opened)
    cistern_close(opened);
  cursor= nullptr;
  opened= nullptr;
  return 0;
}

/* Foreign keys are accepted, so that dumps load, and not enforced; the user is told. */
static void warn_of_foreign_keys(THD *thd)
{
  List_iterator<Key> keys(thd->lex->alter_info.key_list);
  while (Key *key= keys++)
    if (key->type == Key::FOREIGN_KEY) {
      push_warning_printf(thd, Sql_condition::WARN_LEVEL_WARN, ER_ILLEGAL_HA_CREATE_OPTION, "CISTERN accepts FOREIGN KEY %s but does not enforce it yet",
                          key->name.str ? key->name.str : "");
      return;
    }
}

int ha_cistern::create(const char *name, TABLE *form, HA_CREATE_INFO *info)
{
  const LEX_CUSTRING *frm= form->s->frm_image;
  warn_of_foreign_keys(ha_thd());
  cistern_bytes image= { frm ? frm->str : (const uint8_t *) "", frm ? frm->length : 0 };
  return cistern_table_create(text_of(name), Shape(form).get(), image, info->auto_increment_value);
}

int ha_cistern::delete_table(const char *name) { return cistern_table_drop(text_of(name)); }
int ha_cistern::rename_table(const char *from, const char *to) { return cistern_table_rename(text_of(from), text_of(to)); }

int ha_cistern::write_row(const uchar *record)
{
  int error;
  if (table->next_number_field && record == table->record[0])
    if ((error= update_auto_increment()))
      return error;
  if (unlikely(bulk == BULK_WANTED) && (error= begin_bulk()))
    return error;
  if ((error= fail(cistern_insert(cursor, session(), record))))
    return error;
  if (unlikely(is_sequence()))
    return own_commit();
  if (unlikely(copying) && bulk != BULK_BEGUN && (copied_bytes+= table->s->reclength + 64) > 4 * MIB)
    return own_commit();
  return 0;
}

/* What kind of statement it is turns out between this and the first row. */
void ha_cistern::start_bulk_insert(ha_rows rows, uint)
{
  bulk= BULK_WANTED;
  bulk_rows= rows;
}

int ha_cistern::begin_bulk()
{
  int command= thd_sql_command(ha_thd()), begun= 0;
  cistern_bulk_facts facts{};
  facts.rows= bulk_rows;
  facts.copies= copying;
  facts.gathers= command == SQLCOM_LOAD || command == SQLCOM_INSERT_SELECT || command == SQLCOM_CREATE_TABLE;
  facts.autocommit= !several_statements(ha_thd());
  facts.refuses_duplicates= !accepts_duplicates;
  facts.looks_back= table->triggers || table->file != this || table->s->long_unique_table || table->s->period.unique_keys || is_sequence();
  bulk= BULK_NOT;
  if (int error= fail(cistern_bulk_begin(cursor, session(), &facts, &begun)))
    return error;
  if (begun)
    bulk= BULK_BEGUN;
  return 0;
}

int ha_cistern::end_bulk_insert()
{
  bool begun= bulk == BULK_BEGUN;
  bulk= BULK_NOT;
  if (!begun)
    return 0;
  THD *thd= ha_thd();
  if (thd_get_error_number(thd) || thd_kill_level(thd) != THD_IS_NOT_KILLED) {
    cistern_bulk_abort(cursor);
    return 0;
  }
  /* LOAD DATA and ALTER TABLE have stages already. */
  bool staged= thd_sql_command(thd) != SQLCOM_INSERT_SELECT && thd_sql_command(thd) != SQLCOM_CREATE_TABLE;
  if (!staged)
    thd_progress_init(thd, 1);
  int error= fail(cistern_bulk_end(cursor, session(), table->record[0]));
  if (!staged)
    thd_progress_end(thd);
  if (error)
    my_errno= error;
  return error;
}

int ha_cistern::update_row(const uchar *old_record, const uchar *new_record)
{
  int error= fail(cistern_update(cursor, session(), old_record, new_record));
  if (unlikely(is_sequence()) && !error)
    return own_commit();
  return error;
}

int ha_cistern::delete_row(const uchar *) { return fail(cistern_delete(cursor, session())); }

int ha_cistern::truncate() { return cistern_truncate(opened); }
int ha_cistern::reset_auto_increment(ulonglong value) { return cistern_auto_increment_set(opened, value); }

void ha_cistern::get_auto_increment(ulonglong offset, ulonglong increment, ulonglong wanted, ulonglong *first, ulonglong *reserved)
{
  uint64_t from, count;
  cistern_auto_increment_reserve(opened, offset, increment, wanted, &from, &count);
  *first= from;
  *reserved= count;
}

void ha_cistern::update_create_info(HA_CREATE_INFO *info)
{
  if (!(info->used_fields & HA_CREATE_USED_AUTO)) {
    this->info(HA_STATUS_AUTO);
    info->auto_increment_value= stats.auto_increment_value;
  }
}

/* Only the columns that the statement names are decoded; all for one that writes, as InnoDB does: what the server evaluates for an UPDATE may need more
   than it says (a DEFAULT that is bound to a parameter). */
void ha_cistern::set_columns()
{
  if (lock == 2 || !table->read_set || bitmap_is_set_all(table->read_set))
    cistern_cursor_columns(cursor, nullptr, nullptr, 0);
  else
    cistern_cursor_columns(cursor, (const uint8_t *) table->read_set->bitmap, (const uint8_t *) table->write_set->bitmap, (table->s->fields + 7) / 8);
}

void ha_cistern::column_bitmaps_signal()
{
  if (cursor && inited != NONE)             /* else index_init or rnd_init will tell */
    set_columns();
}

Item *ha_cistern::idx_cond_push(uint index, Item *condition)
{
  /* What the condition may look at is known by the server's rule alone: its own layout changes between patch levels. */
  uint8_t columns[(MAX_FIELDS + 7) / 8]= {};
  for (uint i= 0; i < table->s->fields; i++)
    if (table->field[i]->part_of_key_not_clustered.is_set(index)) {
      if (!table->field[i]->stored_in_db())
        return condition;
      columns[i / 8]|= (uint8_t) (1 << (i % 8));
    }
  cistern_cursor_lock(cursor, lock);
  int accepted= cistern_cursor_push_condition(cursor, session(), index, columns, sizeof(columns), this);
  if (!accepted)
    return condition;
  entries_tell_range= accepted == 2;
  pushed_idx_cond= condition;
  pushed_idx_cond_keyno= index;
  return nullptr;
}

void ha_cistern::cancel_pushed_idx_cond()
{
  if (pushed_idx_cond)
    cistern_cursor_clear_condition(cursor);
  handler::cancel_pushed_idx_cond();
}

/* The server looks at the table's first record, which is where all reads by an index go that can have a condition. */
int ha_cistern::meets_condition()
{
  key_range *end= end_range;
  if (!entries_tell_range)
    end_range= nullptr;
  int answer= handler_index_cond_check(this);
  end_range= end;
  return answer;
}

int ha_cistern::index_init(uint index, bool)
{
  active_index= index;
  set_columns();
  cistern_cursor_lock(cursor, lock);
  return cistern_cursor_start(cursor, (int32_t) index);
}

int ha_cistern::index_end()
{
  active_index= MAX_KEY;
  mrr.dsmrr_close();
  cistern_cursor_stop(cursor);
  return 0;
}

int ha_cistern::index_read(uchar *record, const uchar *key, uint length, enum ha_rkey_function flag)
{ return fail(cistern_read(cursor, session(), cistern_bytes{ key, length }, flag, record)); }
int ha_cistern::index_read_last(uchar *record, const uchar *key, uint length) { return index_read(record, key, length, HA_READ_PREFIX_LAST); }
int ha_cistern::index_next(uchar *record) { return fail(cistern_next(cursor, session(), record)); }
int ha_cistern::index_next_same(uchar *record, const uchar *key, uint length)
{ return fail(cistern_next_same(cursor, session(), cistern_bytes{ key, length }, record)); }
int ha_cistern::index_prev(uchar *record) { return fail(cistern_prev(cursor, session(), record)); }
int ha_cistern::index_first(uchar *record) { return fail(cistern_first(cursor, session(), record)); }
int ha_cistern::index_last(uchar *record) { return fail(cistern_last(cursor, session(), record)); }

int ha_cistern::rnd_init(bool scan)
{
  set_columns();
  cistern_cursor_lock(cursor, lock);
  return scan ? cistern_cursor_start(cursor, -1) : 0;
}

int ha_cistern::rnd_end()
{
  cistern_cursor_stop(cursor);
  return 0;
}

int ha_cistern::rnd_next(uchar *record) { return fail(cistern_next(cursor, session(), record)); }
int ha_cistern::rnd_pos(uchar *record, uchar *place) { return fail(cistern_read_position(cursor, session(), place, record)); }

void ha_cistern::position(const uchar *)
{
  cistern_position(cursor, ref);
  if (unlikely(original != nullptr))
    cistern_cursor_note_position(original->cursor, ref);
}
void ha_cistern::unlock_row() { cistern_unlock_row(cursor, session()); }

/* Made by the server to find positions by an index while this handler reads the rows. */
handler *ha_cistern::clone(const char *, MEM_ROOT *root)
{
  ha_cistern *copy= (ha_cistern *) handler::clone(path, root);
  if (copy) {
    copy->lock= lock;
    copy->original= this;
  }
  return copy;
}

/* The optimizer's own sequences can be walked twice, so keys are known before they are read. */
void ha_cistern::note_keys(RANGE_SEQ_IF *sequence, void *parameter, uint ranges, uint mode)
{
  if (sequence->next != quick_range_seq_next || ranges < 2 || active_index != table_share->primary_key)
    return;
  KEY_MULTI_RANGE range;
  range_seq_t walk= sequence->init(parameter, ranges, mode);
  while (!sequence->next(walk, &range))
    if (range.range_flag & EQ_RANGE)
      note_key(range.start_key);
}

/* A join's ranges, each key noted when the server takes it: it takes as many as its buffer holds, sorts them, and then reads. */
static range_seq_t noted_init(void *parameter, uint ranges, uint mode)
{
  noted_sequence *noted= (noted_sequence *) parameter;
  noted->walk= noted->sequence.init(noted->parameter, ranges, mode);
  return noted;
}

static void noted_key_info(void *parameter, uint *length, key_part_map *map)
{
  noted_sequence *noted= (noted_sequence *) parameter;
  noted->sequence.get_key_info(noted->parameter, length, map);
}

static bool noted_next(range_seq_t walk, KEY_MULTI_RANGE *range)
{
  noted_sequence *noted= (noted_sequence *) walk;
  bool end= noted->sequence.next(noted->walk, range);
  if (!end && (range->range_flag & EQ_RANGE))
    noted->reader->note_key(range->start_key);
  return end;
}

static bool noted_skip_record(range_seq_t walk, range_id_t range, uchar *place)
{
  noted_sequence *noted= (noted_sequence *) walk;
  return noted->sequence.skip_record(noted->walk, range, place);
}

static bool noted_skip_index_tuple(range_seq_t walk, range_id_t range)
{
  noted_sequence *noted= (noted_sequence *) walk;
  return noted->sequence.skip_index_tuple(noted->walk, range);
}

void ha_cistern::note_key(const key_range &key)
{ cistern_cursor_note_key(cursor, active_index, cistern_bytes{ key.key, key.length }); }

int ha_cistern::multi_range_read_init(RANGE_SEQ_IF *sequence, void *parameter, uint ranges, uint mode, HANDLER_BUFFER *buffer)
{
  note_keys(sequence, parameter, ranges, mode);
  if (active_index != table_share->primary_key || (mode & HA_MRR_USE_DEFAULT_IMPL) || !(mode & HA_MRR_SINGLE_POINT))
    return mrr.dsmrr_init(this, sequence, parameter, ranges, mode, buffer);
  noted= { this, *sequence, parameter, nullptr };
  RANGE_SEQ_IF noting= { sequence->get_key_info ? noted_key_info : nullptr, noted_init, noted_next,
                         sequence->skip_record ? noted_skip_record : nullptr,
                         sequence->skip_index_tuple ? noted_skip_index_tuple : nullptr };
  return mrr.dsmrr_init(this, &noting, &noted, ranges, mode, buffer);
}

/* Reads that lock go range by range: between an entry and its row another transaction could come. */
ha_rows ha_cistern::multi_range_read_info_const(uint index, RANGE_SEQ_IF *sequence, void *parameter, uint ranges, uint *buffer, uint *mode, Cost_estimate *cost)
{
  mrr.init(this, table);                /* opened as one of a MERGE table, it may have changed its table since */
  if (lock)
    *mode|= HA_MRR_USE_DEFAULT_IMPL;
  return mrr.dsmrr_info_const(index, sequence, parameter, ranges, buffer, mode, cost);
}

ha_rows ha_cistern::multi_range_read_info(uint index, uint ranges, uint keys, uint parts, uint *buffer, uint *mode, Cost_estimate *cost)
{
  mrr.init(this, table);
  if (lock)
    *mode|= HA_MRR_USE_DEFAULT_IMPL;
  return mrr.dsmrr_info(index, ranges, keys, parts, buffer, mode, cost);
}

/* Whether this is where the optimizer answers COUNT(*) of all rows (`opt_sum_query`). */
static bool wants_exact_count(const TABLE *table)
{
  SELECT_LEX *select= table->pos_in_table_list ? table->pos_in_table_list->select_lex : nullptr;
  JOIN *join= select ? select->join : nullptr;
  if (!join || !join->implicit_grouping || join->conds || table->in_use->lex->describe)
    return false;
  List_iterator_fast<TABLE_LIST> leaves(select->leaf_tables);
  while (TABLE_LIST *leaf= leaves++)
    for (TABLE_LIST *nest= leaf; nest; nest= nest->embedding)
      if (nest->on_expr)
        return false;
  List_iterator_fast<Item> items(join->all_fields);
  while (Item *item= items++) {
    Item_sum *sum= item->type() == Item::SUM_FUNC_ITEM ? (Item_sum *) item : nullptr;
    if (sum && sum->sum_func() == Item_sum::COUNT_FUNC && !sum->get_arg(0)->maybe_null() && !(sum->used_tables() & OUTER_REF_TABLE_BIT))
      return true;
  }
  return false;
}

/* The optimizer asks this way, too, where an estimate would do, for every statement that an index covers (`find_shortest_key`, which only compares
   indexes): it gets none. Where it would have counted all the same, of a merged view say, it then reads the rows. */
ha_rows ha_cistern::records()
{
  if (!wants_exact_count(table))
    return HA_POS_ERROR;
  query_id_t statement= table->in_use->query_id;
  if (counted_in != statement) {
    uint64_t rows;
    cistern_cursor_lock(cursor, lock);
    if (cistern_count(cursor, session(), &rows))
      return HA_POS_ERROR;
    counted= rows;
    counted_in= statement;
  }
  return counted;
}

ha_rows ha_cistern::records_in_range(uint index, const key_range *low, const key_range *high, page_range *)
{
  cistern_range_end from{}, to{};
  if (low)
    from= { { low->key, low->length }, (uint32_t) low->flag };
  if (high)
    to= { { high->key, high->length }, (uint32_t) high->flag };
  uint64_t rows= cistern_records_in_range(opened, index, low ? &from : nullptr, high ? &to : nullptr);
  return rows ? rows : 1;
}

int ha_cistern::info(uint flag)
{
  if (flag & HA_STATUS_ERRKEY) {
    errkey= cistern_duplicate_key(cursor);
    if (dup_ref)
      cistern_duplicate_position(cursor, dup_ref);
  }
  if (flag & HA_STATUS_VARIABLE) {
    uint64_t statistics= cistern_statistics(opened);
    if (statistics != statistics_seen) {
      statistics_seen= statistics;
      flag|= HA_STATUS_CONST;
    }
    stats.records= cistern_row_count(opened);
    stats.data_file_length= cistern_data_bytes(opened);
    stats.index_file_length= cistern_index_bytes(opened);
    stats.mean_rec_length= stats.records ? (ulong) (stats.data_file_length / stats.records) : table->s->reclength;
    stats.block_size= (uint) page_bytes;
    stats.deleted= 0;
    /* The optimizer takes 0 rows for a promise; it is an estimate, except where it is only shown. */
    if (!stats.records && !(flag & HA_STATUS_TIME))
      stats.records= 1;
  }
  if (flag & HA_STATUS_CONST)
    for (uint i= 0; i < table->s->keys; i++) {
      KEY *key= table->key_info + i;
      for (uint part= 0; part < key->ext_key_parts; part++)
        key->rec_per_key[part]= (ulong) cistern_records_per_key(opened, i, part);
    }
  if (flag & HA_STATUS_AUTO)
    stats.auto_increment_value= table->found_next_number_field ? cistern_auto_increment_next(opened) : 0;
  return 0;
}

int ha_cistern::extra(enum ha_extra_function operation)
{
  switch (operation) {
  case HA_EXTRA_KEYREAD: cistern_cursor_key_only(cursor, original ? 2 : 1); break;
  case HA_EXTRA_NO_KEYREAD: cistern_cursor_key_only(cursor, 0); break;
  case HA_EXTRA_BEGIN_ALTER_IGNORE_COPY:
    accepts_duplicates= true;
    /* fall through */
  case HA_EXTRA_BEGIN_COPY:
    copying= true;
    statement_session= nullptr;
    break;
  case HA_EXTRA_END_COPY: {
    int error= own_commit();
    end_own_session();
    copying= false;
    return error;
  }
  case HA_EXTRA_ABORT_COPY:
    forget_bulk();
    end_own_session();
    copying= false;
    break;
  case HA_EXTRA_IGNORE_DUP_KEY: case HA_EXTRA_WRITE_CAN_REPLACE: case HA_EXTRA_INSERT_WITH_UPDATE: accepts_duplicates= true; break;
  case HA_EXTRA_NO_IGNORE_DUP_KEY: accepts_duplicates= false; break;
  default: break;
  }
  return 0;
}

void ha_cistern::forget_bulk()
{
  if (bulk == BULK_BEGUN)
    cistern_bulk_abort(cursor);
  bulk= BULK_NOT;
}

int ha_cistern::reset()
{
  mrr.dsmrr_close();
  forget_bulk();
  accepts_duplicates= false;
  lock= 0;
  statement_session= nullptr;
  end_own_session();
  copying= false;
  cistern_cursor_key_only(cursor, 0);
  cistern_cursor_stop(cursor);
  return 0;
}

THR_LOCK_DATA **ha_cistern::store_lock(THD *thd, THR_LOCK_DATA **to, enum thr_lock_type type)
{
  if (type == TL_IGNORE || type == TL_UNLOCK)
    return to;
  if (type >= TL_FIRST_WRITE)
    lock= 2;
  else if (type == TL_READ_WITH_SHARED_LOCKS || (thd_tx_isolation(thd) == ISO_SERIALIZABLE && several_statements(thd)))
    lock= 1;
  else
    lock= 0;
  return to;
}

void ha_cistern::join_statement(THD *thd)
{
  Connection *connection= join_transaction(thd);
  statement_session= copying || is_sequence() ? nullptr : connection->session;
}

int ha_cistern::external_lock(THD *thd, int type)
{
  if (type == F_UNLCK) {
    statement_session= nullptr;
    return 0;
  }
  if (type == F_WRLCK)
    lock= 2;
  join_statement(thd);
  return 0;
}

int ha_cistern::start_stmt(THD *thd, thr_lock_type type)
{
  lock= type >= TL_FIRST_WRITE ? 2 : type == TL_READ_WITH_SHARED_LOCKS || (thd_tx_isolation(thd) == ISO_SERIALIZABLE && several_statements(thd)) ? 1 : 0;
  join_statement(thd);
  return 0;
}

int ha_cistern::analyze(THD *, HA_CHECK_OPT *) { return cistern_analyze(opened) ? HA_ADMIN_FAILED : HA_ADMIN_OK; }
int ha_cistern::optimize(THD *, HA_CHECK_OPT *) { return HA_ADMIN_OK; }
int ha_cistern::check(THD *, HA_CHECK_OPT *) { return HA_ADMIN_OK; }

bool ha_cistern::check_if_incompatible_data(HA_CREATE_INFO *info, uint changes)
{
  bool sets_counter= (info->used_fields & HA_CREATE_USED_AUTO) && info->auto_increment_value != 0;
  return changes != IS_EQUAL_YES || sets_counter ? COMPATIBLE_DATA_NO : COMPATIBLE_DATA_YES;
}

static const alter_table_operations index_changes=
  ALTER_ADD_NON_UNIQUE_NON_PRIM_INDEX | ALTER_DROP_NON_UNIQUE_NON_PRIM_INDEX | ALTER_ADD_UNIQUE_INDEX | ALTER_DROP_UNIQUE_INDEX;

/* For each index of the altered table, which of the table's it is, or -1. */
static std::vector<int32_t> kept_indexes(const TABLE *table, const TABLE *altered, const Alter_inplace_info *alter)
{
  std::vector<int32_t> kept(altered->s->keys, -1);
  for (uint i= 0; i < altered->s->keys; i++) {
    bool added= false;
    for (uint j= 0; j < alter->index_add_count; j++)
      added|= alter->index_add_buffer[j] == i;
    const char *name= altered->key_info[i].name.str;
    for (const Alter_inplace_info::Rename_key_pair &pair : alter->rename_keys)
      if (pair.new_key == alter->key_info_buffer + i)
        name= pair.old_key->name.str;
    for (uint old= 0; !added && old < table->s->keys; old++)
      if (!my_strcasecmp(system_charset_info, table->key_info[old].name.str, name))
        kept[i]= (int32_t) old;
  }
  return kept;
}

static enum_alter_inplace_result refuse_inplace(Alter_inplace_info *alter, const char *why)
{
  alter->unsupported_reason= why;
  return HA_ALTER_INPLACE_NOT_SUPPORTED;
}

enum_alter_inplace_result ha_cistern::check_if_supported_inplace_alter(TABLE *altered, Alter_inplace_info *alter)
{
  if (alter->handler_flags & (ALTER_VIRTUAL_GCOL_EXPR | ALTER_PARTITIONED))
    return refuse_inplace(alter, "values in indexes may change");
  if (!(alter->handler_flags & index_changes))
    return handler::check_if_supported_inplace_alter(altered, alter);
  bool only_indexes= !(alter->handler_flags & ~(index_changes | ALTER_RENAME_INDEX | ALTER_INDEX_IGNORABILITY | ALTER_CHANGE_INDEX_COMMENT | ALTER_INDEX_ORDER));
  bool server_checks= altered->s->long_unique_table || altered->s->period.unique_keys || table->s->long_unique_table || table->s->period.unique_keys;
  if (!only_indexes || server_checks || alter->ignore || table->file != this || altered->versioned() || is_sequence())
    return refuse_inplace(alter, server_checks ? "the server itself checks a key of the table" :
                                 !only_indexes ? "CISTERN changes nothing but indexes in place" :
                                 alter->ignore ? "IGNORE leaves out rows" : "CISTERN builds no indexes in place for this kind of table");
  if (!cistern_indexes_possible(opened, Shape(altered).get(), kept_indexes(table, altered, alter).data()))
    return refuse_inplace(alter, "the stored rows would change");
  /* No copy of the rows, but not instant either; nobody writes meanwhile. */
  return HA_ALTER_INPLACE_NOCOPY_LOCK;
}

/* From the building of indexes to the commit. */
class IndexBuild final : public inplace_alter_handler_ctx
{
public:
  cistern_indexes *built= nullptr;
  ~IndexBuild() override { if (built) cistern_indexes_free(built); }
};

bool ha_cistern::inplace_alter_table(TABLE *altered, Alter_inplace_info *alter)
{
  if (!(alter->handler_flags & index_changes))
    return false;
  IndexBuild *build= new IndexBuild();
  alter->handler_ctx= build;
  thd_progress_init(ha_thd(), 1);
  int error= fail(cistern_indexes_build(opened, cursor, session(), Shape(altered).get(), kept_indexes(table, altered, alter).data(), altered->record[0], &build->built));
  thd_progress_end(ha_thd());
  if (error == HA_ERR_FOUND_DUPP_KEY)
    print_keydup_error(altered, altered->key_info + cistern_duplicate_key(cursor), MYF(0));
  else if (error)
    print_error(error, MYF(0));
  return error != 0;
}

bool ha_cistern::commit_inplace_alter_table(TABLE *altered, Alter_inplace_info *alter, bool commit)
{
  if (!commit)
    return false;                       /* what was built goes with `alter` */
  const uchar *frm;
  size_t length;
  if (altered->s->read_frm_image(&frm, &length)) {
    my_error(ER_INTERNAL_ERROR, MYF(0), "CISTERN: the altered definition can not be read");
    return true;
  }
  IndexBuild *build= (IndexBuild *) alter->handler_ctx;
  int error;
  if (build) {
    error= cistern_indexes_commit(opened, cistern_bytes{ frm, length }, build->built);
    build->built= nullptr;
  } else
    error= cistern_table_set_image(text_of(path), Shape(altered).get(), cistern_bytes{ frm, length });
  altered->s->free_frm_image(frm);
  if (error)
    print_error(error, MYF(0));
  return error != 0;
}

bool ha_cistern::get_error_message(int, String *text)
{
  size_t length;
  const char *message= cistern_message(&length);
  text->copy(message, length, &my_charset_utf8mb4_general_ci);
  return false;
}

/* ---- audit: around each statement that may change a file that is not a table's ---- */

static bool changes_files(int command)
{
  switch (command) {
  case SQLCOM_SELECT: case SQLCOM_INSERT: case SQLCOM_UPDATE: case SQLCOM_DELETE: case SQLCOM_REPLACE: case SQLCOM_INSERT_SELECT: case SQLCOM_UPDATE_MULTI:
  case SQLCOM_DELETE_MULTI: case SQLCOM_SET_OPTION: case SQLCOM_COMMIT: case SQLCOM_ROLLBACK: case SQLCOM_BEGIN: case SQLCOM_LOAD: case SQLCOM_EMPTY_QUERY:
  case SQLCOM_SAVEPOINT: case SQLCOM_CHANGE_DB: case SQLCOM_END:
    return false;
  default:
    return true;
  }
}

static thread_local bool may_remove_files;   /* from the text's arrival to the end of its last statement */

static void audit_notify(THD *thd, unsigned int event_class, const void *event)
{
  if (event_class != MYSQL_AUDIT_GENERAL_CLASS || !cistern_hton)
    return;
  const struct mysql_event_general *general= (const struct mysql_event_general *) event;
  if (general->event_subclass == MYSQL_AUDIT_GENERAL_LOG) {
    bool statement= !strcmp(general->general_command, "Query") || !strcmp(general->general_command, "Execute");
    if (!may_remove_files && statement &&
        cistern_may_remove_files(cistern_bytes{ (const uint8_t *) general->general_query, general->general_query_length }, (thd->client_capabilities & CLIENT_MULTI_STATEMENTS) != 0)) {
      may_remove_files= true;
      cistern_statement_begins();
    }
  } else if (general->event_subclass == MYSQL_AUDIT_GENERAL_STATUS) {
    bool changed= changes_files(thd_sql_command(thd));
    if (may_remove_files && !(thd->server_status & SERVER_MORE_RESULTS_EXISTS)) {
      may_remove_files= false;
      cistern_statement_ends(changed);
    } else if (changed)
      cistern_files_sync();
  }
}
static struct st_mysql_audit cistern_audit= { MYSQL_AUDIT_INTERFACE_VERSION, nullptr, audit_notify, { MYSQL_AUDIT_GENERAL_CLASSMASK } };

/* ---- life ---- */

static int cistern_hton_panic(handlerton *, enum ha_panic_function) { return 0; }
static bool cistern_hton_flush_logs(handlerton *) { return false; }      /* each commit is durable when it returns */
static int cistern_hton_ddl_recovery_done(handlerton *) { cistern_drop_leftovers(); return 0; }
static const char *no_extensions[]= { nullptr };

static int cistern_init(void *pointer)
{
  handlerton *hton= (handlerton *) pointer;
  hton->create= cistern_hton_create;
  hton->flags= HTON_SUPPORTS_EXTENDED_KEYS | HTON_TRUNCATE_REQUIRES_EXCLUSIVE_USE;
  hton->commit= cistern_hton_commit;
  hton->rollback= cistern_hton_rollback;
  hton->close_connection= cistern_hton_close_connection;
  hton->kill_query= cistern_hton_kill_query;
  hton->savepoint_offset= sizeof(uint64_t);
  hton->savepoint_set= cistern_hton_savepoint_set;
  hton->savepoint_rollback= cistern_hton_savepoint_rollback;
  hton->savepoint_release= cistern_hton_savepoint_release;
  hton->savepoint_rollback_can_release_mdl= cistern_hton_savepoint_can_release_mdl;
  hton->start_consistent_snapshot= cistern_hton_start_consistent_snapshot;
  hton->discover_table= cistern_hton_discover_table;
  hton->discover_table_names= cistern_hton_discover_names;
  hton->discover_table_existence= cistern_hton_discover_existence;
  hton->drop_table= cistern_hton_drop_table;
  hton->drop_database= cistern_hton_drop_database;
  hton->show_status= cistern_hton_show_status;
  hton->panic= cistern_hton_panic;
  hton->flush_logs= cistern_hton_flush_logs;
  hton->signal_ddl_recovery_done= cistern_hton_ddl_recovery_done;
  hton->tablefile_extensions= no_extensions;
  cistern_config config= { text_of(setting_bucket), text_of(setting_branch), text_of(setting_data_dir), text_of(mysql_real_data_home), text_of(opt_mysql_tmpdir),
    setting_memory, setting_memtable, setting_disk_cache, setting_unuploaded, setting_transaction, setting_upload_interval };
  if (int status= cistern_start(&callbacks, &config)) {
    /* A server that can not have its tables ends here, with a status that tells its supervisor why; one that runs already stays. */
    if (!mysqld_server_started)
      _exit(status);
    return 1;
  }
  cistern_hton= hton;
  return 0;
}

static int cistern_deinit(void *)
{
  cistern_hton= nullptr;
  cistern_stop();
  return 0;
}

static struct st_mysql_storage_engine cistern_engine= { MYSQL_HANDLERTON_INTERFACE_VERSION };
/* Carriers of variables named innodb_...: audit plugins because those read their options after the storage engines, when --skip-innodb, which
   would match theirs by prefix, has found its owner. They listen to connections, and do nothing. */
static void audit_ignore(THD *, unsigned int, const void *) {}
static struct st_mysql_audit carrier= { MYSQL_AUDIT_INTERFACE_VERSION, nullptr, audit_ignore, { MYSQL_AUDIT_CONNECTION_CLASSMASK } };

maria_declare_plugin(cistern)
{ MYSQL_STORAGE_ENGINE_PLUGIN, &cistern_engine, "CISTERN", "Cistern", "Tables whose home is an object store", PLUGIN_LICENSE_GPL,
  cistern_init, cistern_deinit, 0x0001, cistern_status, cistern_settings, "0.1", MariaDB_PLUGIN_MATURITY_STABLE },
{ MYSQL_AUDIT_PLUGIN, &cistern_audit, "CISTERN_FILES", "Cistern", "Keeps views, triggers and schema options in the catalogue", PLUGIN_LICENSE_GPL,
  nullptr, nullptr, 0x0001, nullptr, nullptr, "0.1", MariaDB_PLUGIN_MATURITY_STABLE },
{ MYSQL_AUDIT_PLUGIN, &carrier, "INNODB_LOCK", "Cistern", "innodb_lock_wait_timeout, for applications that set it", PLUGIN_LICENSE_GPL,
  nullptr, nullptr, 0x0001, nullptr, innodb_lock::settings, "0.1", MariaDB_PLUGIN_MATURITY_STABLE },
{ MYSQL_AUDIT_PLUGIN, &carrier, "INNODB_STRICT", "Cistern", "innodb_strict_mode, for applications that set it", PLUGIN_LICENSE_GPL,
  nullptr, nullptr, 0x0001, nullptr, innodb_strict::settings, "0.1", MariaDB_PLUGIN_MATURITY_STABLE }
maria_declare_plugin_end;
