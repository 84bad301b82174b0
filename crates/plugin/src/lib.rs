//! The plugin: `extern "C"` entries that mariadbd's shim calls. The only room with foreign pointers in it.
