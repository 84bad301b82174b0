//! What kind of run a seed makes: sizes, weather, how often what goes wrong.

use std::time::Duration;

use bucket::{Effect, Rule};
use engine::limits::{BYTES_A_STEP, Shape};
use engine::{Background, Hooks, Settings};

use crate::random::Random;

/// A bug put in on purpose, to see it found. Each makes the engine's world break a promise, as an engine that forgot the call
/// would.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// A file's sync returns without doing anything.
    SkipsSync,
    /// A directory's sync returns without doing anything.
    SkipsDirectorySync,
    /// A put of a wal slice is answered and not carried out.
    LosesPuts,
    /// A conditional put overwrites.
    PutIfAbsentOverwrites,
    /// A writer that validates its claim never sees a newer one.
    BlindToClaims,
    /// An sst is deleted once a published edit takes it out of the tree, whoever still reads it.
    ForgetsReaders,
}

impl Planted {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::SkipsSync,
        Self::SkipsDirectorySync,
        Self::LosesPuts,
        Self::PutIfAbsentOverwrites,
        Self::BlindToClaims,
        Self::ForgetsReaders,
    ];
}

/// How to run a seed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// With a bug put in.
    pub planted: Option<Planted>,
    /// Nothing goes wrong: no crash, no other writer, no weather. For telling apart what a failure needs.
    pub gentle: bool,
    /// Tells the story while it happens.
    pub loud: bool,
}

/// The character of one run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) actions: u64,
    pub(crate) keys: u64,
    pub(crate) value_bytes: u64,
    pub(crate) txn_writes: u64,
    /// Share of requests that go wrong.
    pub(crate) weather: f64,
    pub(crate) latency: bool,
    /// One action in this many is a crash, a takeover, a full disk.
    pub(crate) crash_every: u64,
    pub(crate) takeover_every: u64,
    pub(crate) disk_full_every: u64,
    pub(crate) sync_fails_every: u64,
    pub(crate) memtable_bytes: usize,
    pub(crate) memory_bytes: usize,
    pub(crate) disk_cache_bytes: u64,
    pub(crate) unuploaded_bytes_max: u64,
    pub(crate) shape: Shape,
    pub(crate) planted: Option<Planted>,
    pub(crate) gentle: bool,
}

impl Plan {
    pub(crate) fn new(random: &mut Random, options: Options) -> Self {
        let sst_bytes = random.pick(&[4 << 10, 16 << 10, 64 << 10]);
        let l0_runs = random.pick(&[2, 4]);
        let never = u64::MAX / 64;
        let plan = Self {
            actions: random.pick(&[300, 800, 2000, 3000]),
            keys: random.pick(&[8, 60, 400, 2000]),
            value_bytes: random.pick(&[8, 40, 200, 1000]),
            txn_writes: random.pick(&[2, 6, 30]),
            weather: random.pick(&[0.0, 0.0, 0.03, 0.15]),
            latency: random.one_in(2),
            crash_every: random.pick(&[25, 60, 200, 1000]),
            takeover_every: random.pick(&[40, 150, 1000, never]),
            disk_full_every: random.pick(&[100, never]),
            sync_fails_every: random.pick(&[150, never]),
            memtable_bytes: random.pick(&[4 << 10, 16 << 10, 128 << 10]),
            memory_bytes: random.pick(&[0, 256 << 10, 16 << 20]),
            disk_cache_bytes: random.pick(&[0, 512 << 10, 16 << 20]),
            unuploaded_bytes_max: random.pick(&[256 << 10, 1 << 30, 1 << 30]),
            shape: Shape {
                sst_bytes,
                level_base_bytes: sst_bytes as u64 * 2,
                level_ratio: random.pick(&[2, 4, 8]),
                l0_runs,
                l0_runs_stop: l0_runs * 6,
                wal_segment_bytes: random.pick(&[4 << 10, 64 << 10]),
                wal_slice_bytes: random.pick(&[2 << 10, 1 << 20]),
                // Where ssts are small a reader's few steps pay for a merge.
                bytes_a_step: if sst_bytes == 4 << 10 { 4 << 10 } else { BYTES_A_STEP },
            },
            planted: options.planted,
            gentle: options.gentle,
        };
        if options.gentle {
            return Self {
                weather: 0.0,
                crash_every: never,
                takeover_every: never,
                disk_full_every: never,
                sync_fails_every: never,
                unuploaded_bytes_max: 1 << 30,
                ..plan
            };
        }
        plan
    }

    /// What goes wrong with requests in ordinary times.
    pub(crate) fn rules(&self) -> Vec<Rule> {
        let mut rules = if self.weather > 0.0 { Rule::weather(self.weather) } else { Vec::new() };
        if self.latency {
            let (p50, p99) = (Duration::from_millis(30), Duration::from_secs(2));
            rules.push(Rule::new("*", Effect::Latency { p50, p99 }));
        }
        rules
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            memory_bytes: self.memory_bytes,
            memtable_bytes: self.memtable_bytes,
            disk_cache_bytes: self.disk_cache_bytes,
            unuploaded_bytes_max: self.unuploaded_bytes_max,
            shape: self.shape.clone(),
            background: Background::Manual,
            hooks: Hooks { on_fatal: std::sync::Arc::new(|_| ()), ..Hooks::default() },
            ..Settings::default()
        }
    }
}
