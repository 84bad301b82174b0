//! Keeps the tree shallow: merges runs downward and leaves out what nobody can see any more.
//!
//! The rooms in the order of a compaction's life: [`pick`] decides what to merge, [`retain`] which versions survive,
//! [`cut`] where one sst ends and the next begins, [`run`] does the work, [`pressure`] slows writers down when all this
//! does not keep up. Only `run` reads or writes anything.
//!
//! Never here: who may publish (`manifest`), when an object may be deleted (`gc`).

pub(crate) mod cut;
pub(crate) mod pick;
pub(crate) mod pressure;
pub(crate) mod retain;
pub(crate) mod run;

#[cfg(test)]
mod tests;
