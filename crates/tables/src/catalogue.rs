//! What the catalogue knows of a table.

/// A table's definition as the catalogue keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Definition {
    /// Names the table for ever; a rename keeps it.
    pub table: u64,
    /// Grows with each change of the images.
    pub version: u64,
    /// The server's .frm image.
    pub frm: Vec<u8>,
    /// The partition engine's .par image; empty for most tables.
    pub par: Vec<u8>,
}
