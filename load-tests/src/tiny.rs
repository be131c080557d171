//! A guest of a few instructions that dirties as much memory as it is told to.
//!
//! An ELF file with a PVH entry (vmm.md §0.4), entered in 32-bit protected mode without paging; small enough for a KVM that
//! emulates it instruction by instruction. The instructions are written out: a load test is no place for an assembler.

/// Where it is loaded and entered.
const ENTRY: u32 = 0x10_0000;
/// What it is told, in guest memory: how many writes a pass makes (u32), and how far apart they are in bytes (u32).
pub const ORDERS: u64 = 0x20_0000;
/// How often it has passed (u32); in a page that nothing else is in.
const PASSES: u32 = 0x20_1000;
/// The first byte that it dirties.
pub const REGION: u64 = 0x100_0000;

/// Makes one pass after the other: writes the number of the pass at each place, and prints a dot at its end.
pub fn guest() -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    // pass:
    code.extend([0xff, 0x05]); // inc dword ptr [PASSES]
    code.extend(PASSES.to_le_bytes());
    code.push(0xa1); // mov eax, [PASSES]
    code.extend(PASSES.to_le_bytes());
    code.extend([0x8b, 0x0d]); // mov ecx, [ORDERS]
    code.extend((ORDERS as u32).to_le_bytes());
    code.extend([0x8b, 0x1d]); // mov ebx, [ORDERS + 4]
    code.extend((ORDERS as u32 + 4).to_le_bytes());
    code.push(0xbf); // mov edi, REGION
    code.extend((REGION as u32).to_le_bytes());
    code.extend([0x85, 0xc9, 0x74, 0x07]); // test ecx, ecx; jz done
    code.extend([0x89, 0x07]); // write: mov [edi], eax
    code.extend([0x01, 0xdf]); // add edi, ebx
    code.push(0x49); // dec ecx
    code.extend([0x75, 0xf9]); // jnz write
    code.extend([0xb0, b'.', 0xee]); // done: mov al, '.'; out dx, al
    // `pass` is behind the first instruction, of four bytes.
    let back = 4 - (code.len() as i32 + 2);
    code.extend([0xeb, i8::try_from(back).expect("the loop is short") as u8]); // jmp pass
    elf(&code)
}

fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    const CODE_AT: u64 = 4096;
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    // Name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY, name, descriptor.
    let mut note: Vec<u8> = [4_u32, 8, 18].into_iter().flat_map(u32::to_le_bytes).collect();
    note.extend(b"Xen\0");
    note.extend(u64::from(ENTRY).to_le_bytes());

    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // ET_EXEC, EM_X86_64, version 1.
    file.extend([2_u16, 62].into_iter().flat_map(u16::to_le_bytes));
    file.extend(1_u32.to_le_bytes());
    file.extend([u64::from(ENTRY), HEADER, 0].into_iter().flat_map(u64::to_le_bytes));
    file.extend(0_u32.to_le_bytes());
    file.extend([HEADER as u16, PROGRAM_HEADER as u16, 2, 64, 0, 0].into_iter().flat_map(u16::to_le_bytes));
    // PT_LOAD, all rights; PT_NOTE.
    let bytes = code.len() as u64;
    for (kind, rights, at, address, length, align) in [(1_u32, 7_u32, CODE_AT, u64::from(ENTRY), bytes, 4096), (4, 4, note_at, 0, note.len() as u64, 4)] {
        file.extend([kind, rights].into_iter().flat_map(u32::to_le_bytes));
        file.extend([at, address, address, length, length, align].into_iter().flat_map(u64::to_le_bytes));
    }
    file.extend(note);
    file.resize(CODE_AT as usize, 0);
    file.extend(code);
    file
}
