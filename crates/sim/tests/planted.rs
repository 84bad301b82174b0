//! The simulation proves itself: each bug put in on purpose is found within a few seeds.

use sim::{Options, Planted, simulate};

fn is_found(bug: Planted, seeds: u64) {
    let options = Options { planted: Some(bug), ..Options::default() };
    let found = (0..seeds).find_map(|seed| simulate(seed, options).failure);
    assert!(found.is_some(), "{bug:?} was not found in {seeds} seeds");
}

#[test]
fn a_sync_that_does_nothing_is_found() {
    is_found(Planted::SkipsSync, 20);
}

#[test]
fn a_directory_sync_that_does_nothing_is_found() {
    is_found(Planted::SkipsDirectorySync, 20);
}

#[test]
fn a_slice_that_never_arrives_is_found() {
    is_found(Planted::LosesPuts, 20);
}

#[test]
fn a_conditional_put_that_overwrites_is_found() {
    is_found(Planted::PutIfAbsentOverwrites, 40);
}

#[test]
fn a_writer_that_does_not_look_for_newer_claims_is_found() {
    is_found(Planted::BlindToClaims, 40);
}

#[test]
fn a_garbage_collector_that_forgets_readers_is_found() {
    is_found(Planted::ForgetsReaders, 100);
}
