//! The engine's constants. What an operator may turn is in `Settings`.

/// Longest key a caller may use, tree id not counted: 3072 bytes of SQL key at its widest encoding, twice (secondary
/// key and primary key), with room for terminators.
pub const KEY_BYTES_MAX: usize = 16 * 1024;
/// Longest value: a row with a LONGTEXT of 64 MiB, escaped, with room for its other columns.
pub const VALUE_BYTES_MAX: usize = 256 << 20;
/// Decoded size that a block is cut at; a single larger record has a block of its own.
pub const BLOCK_BYTES: usize = 16 * 1024;
/// Encoded size that an sst is cut at.
pub const SST_BYTES: usize = 32 << 20;
/// Ratio between the sizes of neighbouring levels.
pub const LEVEL_RATIO: u64 = 8;
/// Levels of the tree, L0 included.
pub const LEVELS: usize = 7;
/// Runs in L0 at which compaction starts; writers slow down beyond it.
pub const L0_RUNS: usize = 4;
/// Frozen memtables that may wait for their flush before writers wait.
pub const FROZEN_MEMTABLES_MAX: usize = 4;
/// A disk-cache chunk.
pub const CHUNK_BYTES: usize = 128 * 1024;
/// Size up to which a level takes L0's output directly; beyond it a level is put in between.
pub const LEVEL_BASE_BYTES: u64 = 256 << 20;
/// L0 runs at which writers are made to wait for compaction altogether.
pub const L0_RUNS_STOP: usize = 24;
/// What lies above the deepest level, the wal of the memtable included, may take this part of its bytes when nobody writes: a row may be there
/// twice. Less would cost more than twelve bytes written for each byte of a writer who pauses at the worst moments.
pub const SURPLUS_PART: u64 = 10;
/// Bytes that a merge reads and writes in the time that a reader's step takes: 100 to 150 MB a second, and 100 ns.
pub const BYTES_A_STEP: u64 = 16;

/// Bytes of the wal in a segment file, which is 16 MiB long with its header: whole blocks. One is made ahead and up to four are kept as
/// spares, so an idle server holds six on disk.
pub const WAL_SEGMENT_BYTES: u64 = (16 << 20) - 64;
/// Bytes of wal after which a slice is cut; what is less goes up once in each upload interval.
pub const WAL_SLICE_BYTES: u64 = 16 << 20;

/// The sizes that give the tree its shape. Constants in production; the simulator shrinks them, so that a few thousand
/// rows make many ssts in several levels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Encoded size that an sst is cut at.
    pub sst_bytes: usize,
    /// See [`LEVEL_BASE_BYTES`].
    pub level_base_bytes: u64,
    /// See [`LEVEL_RATIO`].
    pub level_ratio: u64,
    /// See [`L0_RUNS`].
    pub l0_runs: usize,
    /// See [`L0_RUNS_STOP`].
    pub l0_runs_stop: usize,
    /// See [`BYTES_A_STEP`].
    pub bytes_a_step: u64,
    /// Length of a segment file of the wal.
    pub wal_segment_bytes: u64,
    /// Bytes of wal after which a slice is cut.
    pub wal_slice_bytes: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            sst_bytes: SST_BYTES,
            level_base_bytes: LEVEL_BASE_BYTES,
            level_ratio: LEVEL_RATIO,
            l0_runs: L0_RUNS,
            l0_runs_stop: L0_RUNS_STOP,
            bytes_a_step: BYTES_A_STEP,
            wal_segment_bytes: WAL_SEGMENT_BYTES,
            wal_slice_bytes: WAL_SLICE_BYTES,
        }
    }
}
