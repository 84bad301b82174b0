//! The server's knowledge of text, as `tables` wants it.

use std::ffi::c_void;

use tables::{CollationId, Collations};

use crate::border::{Callbacks, PrefixCall, WeightsCall};

/// Asks the server.
pub struct ServerCollations {
    weights: WeightsCall,
    prefix_bytes: PrefixCall,
}

impl ServerCollations {
    pub fn new(callbacks: &Callbacks) -> Self {
        Self { weights: callbacks.weights, prefix_bytes: callbacks.prefix_bytes }
    }
}

fn pointer(collation: CollationId) -> *const c_void {
    collation.0 as *const c_void
}

impl ServerCollations {
    /// `levels` are the server's bits, 0 for all.
    fn ask(&self, collation: CollationId, levels: u32, text: &[u8], out: &mut Vec<u8>) {
        let mut room = 2 * text.len() + 16;
        loop {
            out.reserve(room);
            let spare = out.spare_capacity_mut();
            // SAFETY: a collation id is the address of a CHARSET_INFO, which is never freed; text and room are as long as said.
            let written = unsafe {
                (self.weights)(
                    pointer(collation),
                    levels,
                    text.as_ptr(),
                    text.len(),
                    spare.as_mut_ptr().cast(),
                    spare.len(),
                )
            };
            match usize::try_from(written) {
                Ok(written) => {
                    assert!(written <= spare.len(), "strnxfrm wrote beyond its room");
                    let length = out.len() + written;
                    // SAFETY: that many bytes were just written behind the old ones.
                    unsafe { out.set_len(length) };
                    return;
                }
                Err(_) => room = written.unsigned_abs(),
            }
        }
    }
}

impl Collations for ServerCollations {
    fn weights(&self, collation: CollationId, text: &[u8], out: &mut Vec<u8>) {
        self.ask(collation, 0, text, out);
    }

    fn level_weights(&self, collation: CollationId, level: u32, text: &[u8], out: &mut Vec<u8>) {
        self.ask(collation, 1 << level, text, out);
    }

    fn prefix_bytes(&self, collation: CollationId, text: &[u8], chars: usize) -> usize {
        // SAFETY: as above.
        unsafe { (self.prefix_bytes)(pointer(collation), text.as_ptr(), text.len(), chars) }
    }
}
