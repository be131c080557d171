//! The map file of a sealed disk layer.
#![no_main]

use std::os::unix::fs::FileExt;

use dormouse_fuzz::file;
use libfuzzer_sys::fuzz_target;
use virtio_devices::block::map::Blocks;

const DISK_BYTES: u64 = (1 << 22) + 512;

fuzz_target!(|data: &[u8]| {
    // The fuzzer shall not have to guess the checksum: it is right in every second input.
    let mut data = data.to_vec();
    if data.len() > 12 && data[0] == b'D' {
        let crc = crc32(&data[12..]);
        data[8..12].copy_from_slice(&crc.to_le_bytes());
    }
    let map = file();
    map.write_all_at(&data, 0).unwrap();
    if let Ok(blocks) = Blocks::read(&map, DISK_BYTES) {
        // Only one file says this.
        let again = file();
        blocks.write(&again).unwrap();
        let mut bytes = vec![0; again.metadata().unwrap().len() as usize];
        again.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes[12..], data[12..]);
    }
});

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    !crc
}
