//! What the tools that measure share: what else the machine did meanwhile, and the history that they keep.

pub mod history;
pub mod machine;
