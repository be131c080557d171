//! Guests of a few instructions: ELF files with a PVH entry (vmm.md §0.4), small enough for a KVM that emulates them.

use crate::process::elf::{ENTRY, elf};

/// The counter of [`counts`].
pub const COUNTER: u64 = 0x20_0000;

/// Says `up` on the serial console, then counts in memory for ever.
pub fn counts() -> Vec<u8> {
    let mut code = say(b"up\n");
    // again: incl COUNTER; jmp again
    code.extend([0xff, 0x05]);
    code.extend((COUNTER as u32).to_le_bytes());
    code.extend([0xeb, 0xf8]);
    elf(&code)
}

/// Says `down` on the serial console, then resets the machine through the keyboard controller.
pub fn resets() -> Vec<u8> {
    let mut code = say(b"down\n");
    // mov al, 0xfe; out 0x64, al; hlt; jmp .-1
    code.extend([0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd]);
    elf(&code)
}

/// Loads an empty interrupt table and faults: a triple fault.
pub fn faults() -> Vec<u8> {
    // lidt [ENTRY + 0x800], which holds zeros; ud2
    let mut code = vec![0x0f, 0x01, 0x1d];
    code.extend((ENTRY + 0x800).to_le_bytes());
    code.extend([0x0f, 0x0b]);
    code.resize(0x810, 0);
    elf(&code)
}

fn say(text: &[u8]) -> Vec<u8> {
    // mov dx, 0x3f8
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for byte in text {
        // mov al, byte; out dx, al
        code.extend([0xb0, *byte, 0xee]);
    }
    code
}
