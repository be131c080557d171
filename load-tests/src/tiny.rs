//! A guest of a few instructions that dirties as much memory as it is told to.
//!
//! An ELF file with a PVH entry (vmm.md §0.4), entered in 32-bit protected mode without paging; small enough for a KVM that
//! emulates it instruction by instruction. The instructions are written out: a load test is no place for an assembler.

#[path = "../../vmm/tests/process/elf.rs"]
mod elf;

use elf::elf;

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
