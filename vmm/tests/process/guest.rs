//! Guests of a few instructions: ELF files with a PVH entry (vmm.md §0.4), small enough for a KVM that emulates them.

/// Where it is loaded and entered, in 32-bit protected mode without paging.
const ENTRY: u32 = 0x10_0000;
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

fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    // name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY, name, descriptor.
    let mut note = Vec::new();
    for number in [4u32, 8, 18] {
        note.extend(number.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(u64::from(ENTRY).to_le_bytes());
    let code_at = 4096u64;

    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // ET_EXEC, EM_X86_64.
    for number in [2u16, 62] {
        file.extend(number.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes());
    for number in [u64::from(ENTRY), HEADER, 0] {
        file.extend(number.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for number in [HEADER as u16, PROGRAM_HEADER as u16, 2, 64, 0, 0] {
        file.extend(number.to_le_bytes());
    }
    let mut program_header = |kind: u32, flags: u32, offset: u64, address: u64, length: u64, align: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(flags.to_le_bytes());
        for number in [offset, address, address, length, length, align] {
            file.extend(number.to_le_bytes());
        }
    };
    // PT_LOAD, readable, writable and executable; PT_NOTE.
    program_header(1, 7, code_at, u64::from(ENTRY), code.len() as u64, 4096);
    program_header(4, 4, note_at, 0, note.len() as u64, 4);
    file.extend(note);
    file.resize(code_at as usize, 0);
    file.extend(code);
    file
}
