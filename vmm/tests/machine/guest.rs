//! A guest of a few instructions: an ELF file with a PVH entry, whose code runs in 32-bit protected mode without paging. A KVM
//! in software emulates it at about a microsecond per instruction, hardware runs it as it is.

use std::arch::global_asm;

/// Where the code is loaded and begins.
const ENTRY: u32 = 0x10_0000;
/// The counter, in a page of its own.
pub const COUNTER: u64 = 0x20_0000;
/// Pages that are written one after the other, each with the count at that time.
pub const RING: u64 = 0x30_0000;
/// How many; a power of two.
pub const RING_PAGES: u64 = 256;

// Counts, writes the count into the next page of the ring, prints it as eight hexadecimal digits, and looks whether the power
// button was pressed, and then turns itself off.
global_asm!(
    ".code32",
    ".pushsection .rodata.tiny_guest, \"a\"",
    ".global tiny_guest_begin",
    "tiny_guest_begin:",
    "    mov edi, 0x200000",
    "2:  inc dword ptr [edi]",
    "    mov ebx, [edi]",
    "    mov ecx, ebx",
    "    and ecx, 0xff",
    "    shl ecx, 12",
    "    mov [ecx + 0x300000], ebx",
    "    mov ecx, 8",
    "3:  rol ebx, 4",
    "    mov al, bl",
    "    and al, 15",
    "    add al, 0x30",
    "    cmp al, 0x3a",
    "    jb 4f",
    "    add al, 0x27",
    "4:  mov dx, 0x3f8",
    "    out dx, al",
    "    dec ecx",
    "    jnz 3b",
    "    mov al, 10",
    "    out dx, al",
    "    mov dx, 0x604",
    "    in al, dx",
    "    test al, 1",
    "    jz 2b",
    "    mov dx, 0x600",
    "    mov al, 0x34",
    "    out dx, al",
    "5:  jmp 5b",
    ".global tiny_guest_end",
    "tiny_guest_end:",
    ".popsection",
    ".code64",
);

unsafe extern "C" {
    static tiny_guest_begin: u8;
    static tiny_guest_end: u8;
}

fn code() -> &'static [u8] {
    let (begin, end) = (&raw const tiny_guest_begin, &raw const tiny_guest_end);
    // SAFETY: both are labels around the bytes above, in this order and in one section of this program, which never changes.
    unsafe { std::slice::from_raw_parts(begin, end as usize - begin as usize) }
}

/// The kernel file.
pub fn kernel() -> Vec<u8> {
    const HEADERS: usize = 64 + 2 * 56;
    let code = code();
    let note: Vec<u8> = [4u32, 4, 18].iter().flat_map(|number| number.to_le_bytes()).chain(*b"Xen\0").chain(ENTRY.to_le_bytes()).collect();
    let (code_at, note_at) = (HEADERS as u64, (HEADERS + code.len()) as u64);
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes());
    for word in [u64::from(ENTRY), 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for (kind, at, address, length) in [(1u32, code_at, u64::from(ENTRY), code.len() as u64), (4, note_at, 0, note.len() as u64)] {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        for word in [at, address, address, length, length, 1] {
            file.extend(word.to_le_bytes());
        }
    }
    file.extend(code);
    file.extend(note);
    file
}
