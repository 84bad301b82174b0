/* The handler: MariaDB's calls for one open table, translated for a cursor of ours. */
#pragma once
#include "cistern_ffi.h"

class ha_cistern;

/* The ranges of a multi-range read, and who reads them. */
struct noted_sequence {
  ha_cistern *reader;
  RANGE_SEQ_IF sequence;
  void *parameter;
  range_seq_t walk;
};

class ha_cistern final : public handler
{
  cistern_table *opened= nullptr;
  cistern_cursor *cursor= nullptr;
  /* What reads do to rows: 0 none, 1 shared, 2 exclusive. */
  int lock= 0;
  /* A session apart from the connection's: for sequences, whose numbers are not rolled back, and for the copying of ALTER TABLE, which
     commits now and then because one transaction has to fit into memory. */
  cistern_session *own_session= nullptr;
  cistern_session *statement_session= nullptr;   /* the connection's, from the lock of a statement to its reset */
  cistern_interrupt *own_interrupt= nullptr;
  bool copying= false;
  uint64_t copied_bytes= 0;
  /* Rows that are written together: from the first one to end_bulk_insert. */
  enum { BULK_NOT, BULK_WANTED, BULK_BEGUN } bulk= BULK_NOT;
  uint64_t bulk_rows= 0;
  query_id_t counted_in= 0;             /* the statement that `counted` rows were counted for */
  ha_rows counted= 0;
  bool accepts_duplicates= false;       /* the statement leaves them out, or puts them in the other's place */
  uint64_t statistics_seen= 0;
  /* Whether entries of the index of the pushed condition can tell the end of a range. */
  bool entries_tell_range= false;
  noted_sequence noted= {};
  DsMrr_impl mrr;                       /* the server's multi-range read: rows in order of their positions */
  ha_cistern *original= nullptr;        /* the handler that this one finds positions for */
  /* As it was opened: the share of a partition has the path of the whole table. */
  char path[FN_REFLEN + 1]= "";

  cistern_session *session();
  int fail(int error);
  int own_commit();
  void end_own_session();
  void join_statement(THD *thd);
  void register_statement(THD *thd);
  void set_columns();
  int begin_bulk();
  void forget_bulk();
  void note_keys(RANGE_SEQ_IF *sequence, void *parameter, uint ranges, uint mode);
  bool is_sequence() const;

public:
  ha_cistern(handlerton *hton, TABLE_SHARE *share) : handler(hton, share) {}
  int meets_condition();
  void note_key(const key_range &key);

  enum row_type get_row_type() const override { return ROW_TYPE_DYNAMIC; }
  ulonglong table_flags() const override;
  ulong index_flags(uint index, uint part, bool all_parts) const override;
  uint max_supported_keys() const override { return MAX_KEY; }
  uint max_supported_key_length() const override { return 3072; }
  uint max_supported_key_part_length() const override { return 3072; }
  const char *index_type(uint) override { return "BTREE"; }
  uint8 table_cache_type() override { return HA_CACHE_TBL_NOCACHE; }
  double scan_time() override;
  double read_time(uint index, uint ranges, ha_rows rows) override;
  /* Sizes the buffer of a sort, which spills if there are more. */
  ha_rows estimate_rows_upper_bound() override { return 2 * stats.records + EXTRA_RECORDS; }

  int open(const char *name, int mode, uint test_if_locked) override;
  int close() override;
  int create(const char *name, TABLE *form, HA_CREATE_INFO *info) override;
  int delete_table(const char *name) override;
  int rename_table(const char *from, const char *to) override;

  int write_row(const uchar *record) override;
  void start_bulk_insert(ha_rows rows, uint flags) override;
  int end_bulk_insert() override;
  int update_row(const uchar *old_record, const uchar *new_record) override;
  int delete_row(const uchar *record) override;
  int delete_all_rows() override { return HA_ERR_WRONG_COMMAND; }
  int truncate() override;
  int reset_auto_increment(ulonglong value) override;
  void get_auto_increment(ulonglong offset, ulonglong increment, ulonglong wanted, ulonglong *first, ulonglong *reserved) override;
  void update_create_info(HA_CREATE_INFO *info) override;

  int index_init(uint index, bool sorted) override;
  int index_end() override;
  int index_read(uchar *record, const uchar *key, uint length, enum ha_rkey_function flag) override;
  int index_read_last(uchar *record, const uchar *key, uint length) override;
  int index_next(uchar *record) override;
  int index_next_same(uchar *record, const uchar *key, uint length) override;
  int index_prev(uchar *record) override;
  int index_first(uchar *record) override;
  int index_last(uchar *record) override;
  int rnd_init(bool scan) override;
  int rnd_end() override;
  int rnd_next(uchar *record) override;
  int rnd_pos(uchar *record, uchar *position) override;
  void position(const uchar *record) override;
  void unlock_row() override;
  handler *clone(const char *name, MEM_ROOT *root) override;
  int multi_range_read_init(RANGE_SEQ_IF *sequence, void *parameter, uint ranges, uint mode, HANDLER_BUFFER *buffer) override;
  int multi_range_read_next(range_id_t *id) override { return mrr.dsmrr_next(id); }
  ha_rows multi_range_read_info_const(uint index, RANGE_SEQ_IF *sequence, void *parameter, uint ranges, uint *buffer, uint *mode, Cost_estimate *cost) override;
  ha_rows multi_range_read_info(uint index, uint ranges, uint keys, uint parts, uint *buffer, uint *mode, Cost_estimate *cost) override;
  int multi_range_read_explain_info(uint mode, char *text, size_t size) override { return mrr.dsmrr_explain_info(mode, text, size); }
  void column_bitmaps_signal() override;
  Item *idx_cond_push(uint index, Item *condition) override;
  void cancel_pushed_idx_cond() override;
  ha_rows records() override;
  double key_scan_time(uint index) override { return keyread_time(index, 1, stats.records); }
  ha_rows records_in_range(uint index, const key_range *low, const key_range *high, page_range *pages) override;

  int info(uint flag) override;
  int extra(enum ha_extra_function operation) override;
  int reset() override;
  uint lock_count() const override { return 0; }
  THR_LOCK_DATA **store_lock(THD *thd, THR_LOCK_DATA **to, enum thr_lock_type type) override;
  int external_lock(THD *thd, int type) override;
  int start_stmt(THD *thd, thr_lock_type type) override;
  int analyze(THD *thd, HA_CHECK_OPT *options) override;
  int check(THD *thd, HA_CHECK_OPT *options) override;
  int optimize(THD *thd, HA_CHECK_OPT *options) override;
  /* ALTER TABLE ... DISABLE KEYS, as dumps say around their rows: accepted, and nothing to do. */
  int disable_indexes(key_map, bool) override { return 0; }
  int enable_indexes(key_map, bool) override { return 0; }
  /* Changes of names, defaults, comments and options leave every stored byte as it is: only the definition is replaced. */
  bool check_if_incompatible_data(HA_CREATE_INFO *info, uint changes) override;
  enum_alter_inplace_result check_if_supported_inplace_alter(TABLE *altered, Alter_inplace_info *alter) override;
  bool inplace_alter_table(TABLE *altered, Alter_inplace_info *alter) override;
  bool commit_inplace_alter_table(TABLE *altered, Alter_inplace_info *alter, bool commit) override;
  bool get_error_message(int error, String *text) override;
};
