//! The plugin: `extern "C"` entries that mariadbd's shim calls. The only room with foreign pointers in it.
//!
//! Read the modules in this order. [`border`] is `mariadb/cistern_ffi.h` in Rust; the `entries` modules are its functions,
//! one or two lines each; what they call is ordinary Rust without a foreign pointer.
//!
//! Never here: decisions about rows or storage.

#![expect(unsafe_code, reason = "the border with C++: each block says why it is sound")]

mod border;
mod codes;
mod collations;
mod entries;
mod files;
mod guard;
mod leftovers;
mod life;
mod log;
mod memory;
mod paths;
