//! The program a person runs.
fn main() {}
