//! A guest that echoes one vsock stream: the smallest driver of our device that obeys the credit rules of virtio 1.2
//! §5.10.6.3. 32-bit code without paging, stack or interrupts, which looks at its queues in a loop, so that a KVM in software
//! can run it (about a microsecond for each instruction).
//!
//! Never more than one connection: a REQUEST for port 1024 takes the place of what was there, one for another port is
//! refused. What happens is said on the serial console, a letter each: `+` the queues are set up, `C` connected, `R` reset by
//! the host, `S` shut down by the host (answered by RST; bytes on the way are lost), `!` the host's credit is wrong: it has sent
//! more than it was allowed to, or has passed on more than it was sent. The guest does nothing any more then.
//!
//! ```text
//! 20_0000 rx: descriptors, +100 available, +200 used     20_0300 tx: the same
//! 20_0600 variables                                      20_0700 header of the packet that is sent
//! 21_0000 eight rx buffers of 44 + 4096 bytes, 8 KiB apart
//! 24_0000 bytes received and not yet sent back: a ring of 64 KiB, which tx sends from
//! ```

use std::arch::global_asm;

use crate::process::elf::elf;

/// Bytes that the guest takes before it has sent any back: its `buf_alloc`.
pub const ROOM: u64 = 64 << 10;

// ebx: register window of slot 1. ebp: variables:
//  0 rx packets seen        4 id of the rx buffer in hand   8 bytes of the ring in flight   12 whether connected
// 16 the host's port       20 bytes received, ever         24 bytes sent back, ever         28 the same as the host knows it
// 32 the host's buf_alloc  36 its fwd_cnt                  40 RESPONSE is due              44 CREDIT_UPDATE is due
// 48 RST is due: 52 from this port, 56 to this one
global_asm!(
    ".code32",
    ".pushsection .rodata.echo_guest, \"a\"",
    ".macro echo_say letter",
    "    mov dx, 0x3f8",
    "    mov al, \\letter",
    "    out dx, al",
    ".endm",
    ".macro echo_queue index, at",
    "    mov dword ptr [ebx + 0x30], \\index",
    "    mov dword ptr [ebx + 0x38], 8",
    "    mov dword ptr [ebx + 0x80], \\at",
    "    mov dword ptr [ebx + 0x90], \\at + 0x100",
    "    mov dword ptr [ebx + 0xa0], \\at + 0x200",
    "    mov dword ptr [ebx + 0x44], 1",
    // Interrupts are of no use here.
    "    mov word ptr [\\at + 0x100], 1",
    ".endm",
    ".global echo_guest_begin",
    "echo_guest_begin:",
    "    cld",
    "    mov ebx, 0xd0001000",
    "    mov ebp, 0x200600",
    // ACKNOWLEDGE, DRIVER, VIRTIO_F_VERSION_1 and nothing else, FEATURES_OK.
    "    mov dword ptr [ebx + 0x70], 0",
    "    mov dword ptr [ebx + 0x70], 1",
    "    mov dword ptr [ebx + 0x70], 3",
    "    mov dword ptr [ebx + 0x24], 1",
    "    mov dword ptr [ebx + 0x20], 1",
    "    mov dword ptr [ebx + 0x70], 11",
    "    echo_queue 0, 0x200000",
    "    echo_queue 1, 0x200300",
    // All rx buffers are the device's.
    "    xor ecx, ecx",
    "    mov eax, 0x210000",
    "2:  mov edx, ecx",
    "    shl edx, 4",
    "    mov [edx + 0x200000], eax",
    "    mov dword ptr [edx + 0x200008], 44 + 4096",
    "    mov word ptr [edx + 0x20000c], 2",
    "    mov [ecx * 2 + 0x200104], cx",
    "    add eax, 0x2000",
    "    inc ecx",
    "    cmp ecx, 8",
    "    jb 2b",
    "    mov word ptr [0x200102], 8",
    // Each packet to be sent is descriptor 0, its header, and 1, a piece of the ring if there is data.
    "    mov dword ptr [0x200300], 0x200700",
    "    mov dword ptr [0x200308], 44",
    "    mov word ptr [0x20030e], 1",
    "    mov dword ptr [0x200700], 3",
    "    mov dword ptr [0x200708], 2",
    "    mov dword ptr [0x200724], 0x10000",
    // DRIVER_OK.
    "    mov dword ptr [ebx + 0x70], 15",
    "    echo_say 0x2b",

    "echo_look:",
    "    mov ecx, [ebp]",
    "    cmp cx, [0x200202]",
    "    je echo_send",
    "    inc dword ptr [ebp]",
    "    and ecx, 7",
    "    mov esi, [ecx * 8 + 0x200204]",
    "    mov [ebp + 4], esi",
    "    shl esi, 13",
    "    add esi, 0x210000",
    "    movzx eax, word ptr [esi + 30]",
    "    mov edx, [esi + 16]",
    "    cmp eax, 1",
    "    je echo_request",
    "    cmp dword ptr [ebp + 12], 0",
    "    je echo_give_back",
    "    cmp edx, [ebp + 16]",
    "    jne echo_give_back",
    "    mov ecx, [esi + 36]",
    "    mov [ebp + 32], ecx",
    "    mov ecx, [esi + 40]",
    "    mov [ebp + 36], ecx",
    "    cmp eax, 3",
    "    je echo_reset",
    // What the host says it has passed on cannot be more than it was sent, nor what is left more than it has room for.
    "    mov ecx, [ebp + 24]",
    "    add ecx, [ebp + 8]",
    "    sub ecx, [ebp + 36]",
    "    cmp ecx, [ebp + 32]",
    "    ja echo_broken",
    "    cmp eax, 4",
    "    je echo_shutdown",
    "    cmp eax, 5",
    "    je echo_data",
    "    cmp eax, 7",
    "    jne echo_give_back",
    "    mov dword ptr [ebp + 44], 1",
    "    jmp echo_give_back",

    "echo_request:",
    "    cmp dword ptr [esi + 20], 1024",
    "    jne echo_refuse",
    "    xor eax, eax",
    "    mov [ebp + 8], eax",
    "    mov [ebp + 20], eax",
    "    mov [ebp + 24], eax",
    "    mov [ebp + 28], eax",
    "    mov [ebp + 44], eax",
    "    mov [ebp + 16], edx",
    "    mov ecx, [esi + 36]",
    "    mov [ebp + 32], ecx",
    "    mov ecx, [esi + 40]",
    "    mov [ebp + 36], ecx",
    "    inc eax",
    "    mov [ebp + 12], eax",
    "    mov [ebp + 40], eax",
    "    echo_say 0x43",
    "    jmp echo_give_back",

    "echo_reset:",
    "    mov dword ptr [ebp + 12], 0",
    "    echo_say 0x52",
    "    jmp echo_give_back",

    "echo_shutdown:",
    "    mov dword ptr [ebp + 12], 0",
    "    mov ecx, edx",
    "    echo_say 0x53",
    "    mov edx, ecx",
    "echo_refuse:",
    "    mov ecx, [esi + 20]",
    "    mov [ebp + 52], ecx",
    "    mov [ebp + 56], edx",
    "    mov dword ptr [ebp + 48], 1",
    "    jmp echo_give_back",

    "echo_data:",
    "    mov ecx, [esi + 24]",
    "    mov eax, [ebp + 20]",
    "    mov edx, eax",
    "    sub edx, [ebp + 24]",
    "    add edx, ecx",
    "    cmp edx, 0x10000",
    "    ja echo_broken",
    "    add [ebp + 20], ecx",
    "    add esi, 44",
    "    and eax, 0xffff",
    "    lea edi, [eax + 0x240000]",
    "    mov edx, 0x10000",
    "    sub edx, eax",
    "    cmp ecx, edx",
    "    jbe 2f",
    "    mov eax, ecx",
    "    sub eax, edx",
    "    mov ecx, edx",
    "    rep movsb",
    "    mov edi, 0x240000",
    "    mov ecx, eax",
    "2:  rep movsb",

    "echo_give_back:",
    "    movzx eax, word ptr [0x200102]",
    "    mov edx, eax",
    "    and edx, 7",
    "    mov ecx, [ebp + 4]",
    "    mov [edx * 2 + 0x200104], cx",
    "    inc eax",
    "    mov [0x200102], ax",
    "    mov dword ptr [ebx + 0x50], 0",

    // One packet at a time: the last one's bytes leave the ring when the device has taken them.
    "echo_send:",
    "    mov ax, [0x200502]",
    "    cmp ax, [0x200402]",
    "    jne echo_look",
    "    mov eax, [ebp + 8]",
    "    add [ebp + 24], eax",
    "    xor ecx, ecx",
    "    mov [ebp + 8], ecx",
    "    mov word ptr [0x20030c], 0",
    "    cmp dword ptr [ebp + 48], 0",
    "    jne echo_send_reset",
    "    cmp dword ptr [ebp + 12], 0",
    "    je echo_look",
    "    mov eax, 2",
    "    cmp dword ptr [ebp + 40], 0",
    "    jne echo_send_packet",
    "    mov ecx, [ebp + 20]",
    "    sub ecx, [ebp + 24]",
    "    jz echo_send_update",
    // What the host has room for: its buf_alloc - (all that was sent - its fwd_cnt).
    "    mov eax, [ebp + 32]",
    "    sub eax, [ebp + 24]",
    "    add eax, [ebp + 36]",
    "    jle echo_send_update",
    "    cmp ecx, eax",
    "    jbe 2f",
    "    mov ecx, eax",
    "2:  mov edx, [ebp + 24]",
    "    and edx, 0xffff",
    "    mov eax, 0x10000",
    "    sub eax, edx",
    "    cmp ecx, eax",
    "    jbe 2f",
    "    mov ecx, eax",
    "2:  add edx, 0x240000",
    "    mov [0x200310], edx",
    "    mov [0x200318], ecx",
    "    mov word ptr [0x20030c], 1",
    "    mov [ebp + 8], ecx",
    "    mov eax, 5",
    "    jmp echo_send_packet",

    "echo_send_update:",
    "    xor ecx, ecx",
    "    mov eax, [ebp + 24]",
    "    sub eax, [ebp + 28]",
    "    or eax, [ebp + 44]",
    "    jz echo_look",
    "    mov eax, 6",

    // eax: operation, ecx: bytes of data.
    "echo_send_packet:",
    "    mov dword ptr [ebp + 40], 0",
    "    mov dword ptr [ebp + 44], 0",
    "    mov dword ptr [0x200710], 1024",
    "    mov edx, [ebp + 16]",
    "    mov [0x200714], edx",
    "    mov edx, [ebp + 24]",
    "    mov [ebp + 28], edx",
    "    mov [0x200728], edx",
    "echo_send_header:",
    "    mov [0x200718], ecx",
    "    shl eax, 16",
    "    inc eax",
    "    mov [0x20071c], eax",
    "    inc word ptr [0x200402]",
    "    mov dword ptr [ebx + 0x50], 1",
    "    jmp echo_look",

    "echo_send_reset:",
    "    mov dword ptr [ebp + 48], 0",
    "    mov edx, [ebp + 52]",
    "    mov [0x200710], edx",
    "    mov edx, [ebp + 56]",
    "    mov [0x200714], edx",
    "    mov eax, 3",
    "    jmp echo_send_header",

    "echo_broken:",
    "    echo_say 0x21",
    "2:  jmp 2b",
    ".global echo_guest_end",
    "echo_guest_end:",
    ".purgem echo_say",
    ".purgem echo_queue",
    ".popsection",
    ".code64",
);

unsafe extern "C" {
    static echo_guest_begin: u8;
    static echo_guest_end: u8;
}

fn code() -> &'static [u8] {
    let (begin, end) = (&raw const echo_guest_begin, &raw const echo_guest_end);
    // SAFETY: both are labels around the bytes above, in this order and in one section of this program, which never changes.
    unsafe { std::slice::from_raw_parts(begin, end as usize - begin as usize) }
}

/// The kernel file.
pub fn kernel() -> Vec<u8> {
    elf(code())
}
