//! The saved state of a device, which a snapshot file holds.
#![no_main]

use dormouse_fuzz::devices::{SLOTS, restore};
use libfuzzer_sys::fuzz_target;

/// Slots by the first byte of an input.
const KINDS: [usize; SLOTS] = [2, 3, 0, 1, 4];

fuzz_target!(|data: &[u8]| {
    if let Some((&kind, state)) = data.split_first() {
        restore(KINDS[usize::from(kind) % KINDS.len()], state);
    }
});
