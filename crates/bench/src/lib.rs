//! What the tools that measure share: what else the machine did meanwhile, the history that they keep, and an engine with all in memory.

pub mod history;
pub mod machine;

use std::sync::Arc;

use bucket::MemoryBucket;
use engine::limits::Shape;
use engine::{Background, Engine, Parts, Settings, SimDisk, SystemClock};

/// An engine whose bucket and disk are memory, which does in the background only what it is told to.
pub fn engine_in_memory(shape: Shape) -> engine::Result<Arc<Engine>> {
    let settings = Settings {
        background: Background::Manual,
        memtable_bytes: 1 << 30,
        memory_bytes: 3 << 30,
        shape,
        ..Settings::default()
    };
    let parts = Parts {
        bucket: Arc::new(MemoryBucket::new()),
        disk: Arc::new(SimDisk::new(1)),
        clock: Arc::new(SystemClock::default()),
        seed: 1,
    };
    Engine::open(parts, settings)
}
