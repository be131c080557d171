//! A guest of a few instructions: an ELF file with a PVH entry, whose code runs in 32-bit protected mode without paging. A KVM
//! in software emulates it at about a microsecond per instruction, hardware runs it as it is.

use std::arch::global_asm;

use crate::elf::elf;

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
    elf(code())
}
