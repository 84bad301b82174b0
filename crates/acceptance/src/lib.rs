//! Tests of the whole system from outside: real servers on loopback, killed for real, judged by what clients were told.
//!
//! Never here: anything that links the engine. What these tests know, a user could know.
#![allow(clippy::disallowed_methods, reason = "real processes run on real time")]

pub mod company;
pub mod objects;
pub mod oracle;
pub mod s3;
pub mod server;
pub mod sysbench;

pub use server::{Peer, Server};
