//! The server's knowledge of text, as `tables` wants it.

use std::ffi::c_void;

use tables::{CollationId, Collations};

use crate::border::{Callbacks, PaddedWeightsCall, PrefixCall, WeightsCall};

/// Asks the server.
pub struct ServerCollations {
    weights: WeightsCall,
    padded_weights: PaddedWeightsCall,
    prefix_bytes: PrefixCall,
}

impl ServerCollations {
    pub fn new(callbacks: &Callbacks) -> Self {
        Self {
            weights: callbacks.weights,
            padded_weights: callbacks.padded_weights,
            prefix_bytes: callbacks.prefix_bytes,
        }
    }
}

fn pointer(collation: CollationId) -> *const c_void {
    collation.0 as *const c_void
}

impl Collations for ServerCollations {
    fn weights(&self, collation: CollationId, text: &[u8], out: &mut Vec<u8>) {
        let mut room = 2 * text.len() + 16;
        loop {
            out.reserve(room);
            let spare = out.spare_capacity_mut();
            // SAFETY: a collation id is the address of a CHARSET_INFO, which is never freed; text and room are as long as said.
            let written = unsafe {
                (self.weights)(
                    pointer(collation),
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

    fn padded_weights(
        &self,
        collation: CollationId,
        text: &[u8],
        chars: usize,
        bytes: usize,
        out: &mut Vec<u8>,
    ) {
        let start = out.len();
        out.resize(start + bytes, 0);
        let room = &mut out[start..];
        // SAFETY: as above.
        unsafe {
            (self.padded_weights)(
                pointer(collation),
                text.as_ptr(),
                text.len(),
                chars,
                room.as_mut_ptr(),
                room.len(),
            );
        }
    }

    fn prefix_bytes(&self, collation: CollationId, text: &[u8], chars: usize) -> usize {
        // SAFETY: as above.
        unsafe { (self.prefix_bytes)(pointer(collation), text.as_ptr(), text.len(), chars) }
    }
}
