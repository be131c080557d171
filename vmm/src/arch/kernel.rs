//! The kernel proper (an ELF file, `vmlinux`) out of a bzImage.
//!
//! A bzImage is a real-mode header, a small decompressor and a compressed vmlinux. Our guests start at the vmlinux's PVH entry,
//! so it is unpacked on the host: the node does it once per kernel, and a boot does it itself for a file that is not
//! unpacked. Only LZ4 is understood, which is what Debian's kernels use.

/// "HdrS" (kernel: Documentation/arch/x86/boot.rst).
const HEADER_MAGIC: &[u8; 4] = b"HdrS";
const HEADER_MAGIC_AT: usize = 0x202;
const SETUP_SECTORS_AT: usize = 0x1f1;
const PAYLOAD_OFFSET_AT: usize = 0x248;
const PAYLOAD_LENGTH_AT: usize = 0x24c;
const ELF_MAGIC: &[u8; 4] = b"\x7fELF";
/// The kernel's build uses the "legacy" frame of lz4: this, then blocks of a length (u32) and that many bytes.
const LZ4_LEGACY_MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// Each block of that format unpacks to at most this.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;
/// A vmlinux has 50 to 100 MiB; what claims more is not one.
const MAX_VMLINUX: usize = 512 << 20;

/// Why there is no vmlinux in a file.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It is no kernel.
    #[error("it is neither a bzImage nor an ELF file")]
    NoKernel,
    /// It is a bzImage of a form that is not understood.
    #[error("it is a bzImage whose kernel is not packed with lz4; use Debian's kernel, or give its unpacked vmlinux")]
    OtherPacking,
    /// It is damaged.
    #[error("it is a damaged bzImage: {0}")]
    Damaged(&'static str),
}

/// Whether `file` is an ELF file already.
pub fn is_elf(file: &[u8]) -> bool {
    file.starts_with(ELF_MAGIC)
}

/// The vmlinux in a bzImage.
pub fn extract_vmlinux(image: &[u8]) -> Result<Vec<u8>, KernelError> {
    if image.get(HEADER_MAGIC_AT..HEADER_MAGIC_AT + 4) != Some(HEADER_MAGIC) {
        return Err(KernelError::NoKernel);
    }
    let u32_at = |bytes: &[u8], at: usize| bytes.get(at..at + 4).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four bytes")) as usize);
    let cut = KernelError::Damaged("it is cut short");
    let (Some(offset), Some(length)) = (u32_at(image, PAYLOAD_OFFSET_AT), u32_at(image, PAYLOAD_LENGTH_AT)) else { return Err(cut) };
    // 0 stands for 4 (the protocol's oldest form).
    let sectors = match image[SETUP_SECTORS_AT] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    // The payload's offset counts from the protected-mode code, which follows the boot sector and the setup sectors.
    let begin = (sectors + 1) * 512 + offset;
    let payload = begin.checked_add(length).and_then(|end| image.get(begin..end)).ok_or(cut)?;
    if !payload.starts_with(&LZ4_LEGACY_MAGIC) {
        return Err(KernelError::OtherPacking);
    }
    // The build appends the unpacked length.
    let size = payload.len().checked_sub(4).and_then(|at| u32_at(payload, at)).ok_or(KernelError::Damaged("it is cut short"))?;
    if size > MAX_VMLINUX {
        return Err(KernelError::Damaged("it claims to be larger than any kernel"));
    }
    let mut packed = &payload[4..payload.len() - 4];
    let (mut vmlinux, mut filled) = (vec![0; size], 0);
    while !packed.is_empty() {
        let block = u32_at(packed, 0).and_then(|length| packed.get(4..4 + length)).ok_or(KernelError::Damaged("a block of it is cut short"))?;
        let room = (size - filled).min(LZ4_LEGACY_BLOCK);
        filled += lz4_flex::block::decompress_into(block, &mut vmlinux[filled..filled + room]).map_err(|_| KernelError::Damaged("a block of it does not unpack"))?;
        packed = &packed[4 + block.len()..];
    }
    if filled != size || !is_elf(&vmlinux) {
        return Err(KernelError::Damaged("what it unpacks to is not the kernel that it announces"));
    }
    Ok(vmlinux)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A bzImage as the kernel's build makes it, around `vmlinux`.
    fn bzimage(vmlinux: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY_MAGIC.to_vec();
        for block in vmlinux.chunks(LZ4_LEGACY_BLOCK) {
            let packed = lz4_flex::block::compress(block);
            payload.extend((packed.len() as u32).to_le_bytes());
            payload.extend(packed);
        }
        payload.extend((vmlinux.len() as u32).to_le_bytes());
        let mut image = vec![0; 512 * 3];
        image[SETUP_SECTORS_AT] = 2;
        image[HEADER_MAGIC_AT..HEADER_MAGIC_AT + 4].copy_from_slice(HEADER_MAGIC);
        image[PAYLOAD_OFFSET_AT..PAYLOAD_OFFSET_AT + 4].copy_from_slice(&16u32.to_le_bytes());
        image[PAYLOAD_LENGTH_AT..PAYLOAD_LENGTH_AT + 4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend([0xcc; 16]);
        image.extend(payload);
        image.extend([0; 100]);
        image
    }

    #[test]
    fn what_was_packed_comes_out() {
        let vmlinux: Vec<u8> = ELF_MAGIC.iter().copied().chain((0..9_000_000u32).map(|n| (n / 300) as u8)).collect();
        assert_eq!(extract_vmlinux(&bzimage(&vmlinux)).unwrap(), vmlinux);
    }

    #[test]
    fn debians_kernel_is_unpacked() {
        let boot = std::path::Path::new(&std::env::var_os("HOME").unwrap()).join(".cache/dormouse/kernel/boot");
        let Some(kernel) = std::fs::read_dir(&boot).ok().and_then(|dir| dir.flatten().find(|entry| entry.file_name().to_string_lossy().starts_with("vmlinuz-"))) else {
            eprintln!("skipped: no kernel in {} (make setup)", boot.display());
            return;
        };
        let vmlinux = extract_vmlinux(&std::fs::read(kernel.path()).unwrap()).unwrap();
        assert!(vmlinux.len() > 40 << 20);
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_a_reason() {
        assert!(matches!(extract_vmlinux(b"\x7fELF"), Err(KernelError::NoKernel)));
        let mut gzip = bzimage(b"\x7fELF");
        let at = 512 * 3 + 16;
        gzip[at..at + 2].copy_from_slice(&[0x1f, 0x8b]);
        assert!(matches!(extract_vmlinux(&gzip), Err(KernelError::OtherPacking)));
    }

    proptest! {
        #[test]
        fn a_damaged_image_never_panics(at in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<prop::sample::Index>()) {
            let mut image = bzimage(&[&ELF_MAGIC[..], &[7; 5000]].concat());
            let at = at.index(image.len());
            image[at] = value;
            let _ = extract_vmlinux(&image);
            image.truncate(cut.index(image.len()));
            let _ = extract_vmlinux(&image);
        }
    }
}
