//! The kernel file of a guest of a few instructions: an ELF file with a PVH entry (vmm.md §0.4). Also of the guest of
//! `load-tests`.

/// Where the code is loaded and entered, in 32-bit protected mode without paging.
pub const ENTRY: u32 = 0x10_0000;

/// The file with this code.
pub fn elf(code: &[u8]) -> Vec<u8> {
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
