//! The memory difference: read, laid over a guest's memory, and written again.
#![no_main]

use std::{
    fs::File,
    io::Cursor,
    os::unix::fs::FileExt,
    sync::OnceLock,
};

use dormouse_fuzz::{Input, file};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::{GuestRam, difference, dirty::DirtyPages};
use vmm_protocol::{
    control::MemoryUse,
    memdiff::{PAGE, Reader},
};

/// The smallest guest there is.
const BYTES: usize = 2 << 20;
const PAGES: u64 = (BYTES / PAGE) as u64;
const BLOCK_PAGES: usize = (1 << 20) / PAGE;

/// The image's memory: every fourth page is zeros, the others are all alike but for their number.
fn image() -> &'static (File, Vec<u8>) {
    static IMAGE: OnceLock<(File, Vec<u8>)> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let mut bytes = vec![0; BYTES];
        for (page, bytes) in bytes.chunks_exact_mut(PAGE).enumerate().filter(|(page, _)| page % 4 != 0) {
            bytes.fill(0x55);
            bytes[..8].copy_from_slice(&(page as u64).to_le_bytes());
        }
        let file = file();
        file.write_all_at(&bytes, 0).unwrap();
        (file, bytes)
    })
}

/// A file whose checksums are right, or nearly so; what it says of itself may be wrong in every other way.
fn forge(input: &mut Input<'_>) -> Vec<u8> {
    let twist = input.u8();
    let mut payload = Vec::new();
    let mut table = Vec::new();
    let (mut end, mut data_pages, mut runs) = (0_u32, 0_u64, 0_u64);
    let n_runs = input.u8() % 64;
    for _ in 0..n_runs {
        let kind = input.u8();
        let (first, pages) = match kind % 32 {
            0 => (input.u32(), input.u32()),
            1 => (end.wrapping_sub(1), u32::from(input.u8() % 8)),
            _ => (end + u32::from(input.u8() % 8), u32::from(input.u8() % 24)),
        };
        let zero = match kind >> 5 {
            0 => input.u32(),
            1..4 => 1,
            _ => 0,
        };
        for number in [first, pages, zero] {
            table.extend(number.to_le_bytes());
        }
        runs += 1;
        end = first.wrapping_add(pages).min(1 << 20);
        if zero != 1 {
            for page in 0..pages.min(64) {
                // Now and then what the image has there, or zeros.
                let fill = input.u8();
                let image = first.checked_add(page).and_then(|page| image().1.chunks_exact(PAGE).nth(page as usize));
                match image {
                    Some(page) if fill.is_multiple_of(16) => payload.extend_from_slice(page),
                    _ => payload.extend([fill; PAGE]),
                }
                data_pages += 1;
            }
        }
    }
    for block in payload.chunks(BLOCK_PAGES * PAGE) {
        table.extend(crc32fast::hash(block).to_le_bytes());
    }
    let numbers = match twist % 16 {
        0 => [input.u64(), data_pages, runs],
        1 => [PAGES, input.u64(), runs],
        2 => [PAGES, data_pages, input.u64()],
        _ => [PAGES, data_pages, runs],
    };
    let mut header = b"dormdiff".to_vec();
    header.extend(if twist == 3 { input.u32() } else { 1 }.to_le_bytes());
    header.extend(crc32fast::hash(&table).to_le_bytes());
    header.extend(numbers.into_iter().flat_map(u64::to_le_bytes));
    header.resize(PAGE - 4, 0);
    header.extend(crc32fast::hash(&header).to_le_bytes());
    let mut bytes = [header, payload, table].concat();
    match twist >> 4 {
        0 => bytes.truncate(usize::from(input.u16()) % bytes.len()),
        1 => bytes.push(0),
        2 => {
            let at = input.u32() as usize % bytes.len();
            bytes[at] ^= 1 << (input.u8() % 8);
        }
        _ => {}
    }
    bytes
}

fn guest() -> GuestRam {
    GuestRam::map(image().0.try_clone().unwrap(), BYTES as u64, MemoryUse::Private).unwrap()
}

fn content(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let bytes = if input.u8().is_multiple_of(8) { input.0.to_vec() } else { forge(&mut input) };

    // What the node does to look at one.
    let mut expected = image().1.clone();
    let applied = Reader::open(Cursor::new(&bytes), PAGES).and_then(|mut reader| {
        let mut last = 0;
        reader.apply(|offset, pages| {
            let at = usize::try_from(offset).unwrap();
            assert!(at >= last && pages.len().is_multiple_of(PAGE) && !pages.is_empty());
            last = at + pages.len();
            expected[at..last].copy_from_slice(pages);
            Ok(())
        })
    });

    // What the VMM does.
    let on_disk = file();
    on_disk.write_all_at(&bytes, 0).unwrap();
    let ram = guest();
    let laid = difference::lay_over(&ram, &on_disk);
    assert_eq!(laid.is_ok(), applied.is_ok(), "{laid:?} {applied:?}");
    if laid.is_err() {
        return;
    }
    assert!(content(&ram) == expected, "the guest has other memory than the difference says");

    // The guest writes a little and is saved; what is restored from that is the same.
    let (at, fill) = (u64::from(input.u16()) * 16 % (BYTES as u64 - 256), input.u8());
    ram.memory().write_slice(&[fill; 200], GuestAddress(at)).unwrap();
    let dirty = if fill % 2 == 0 { DirtyPages::CompareAll } else { ram.find_way(File::open("/proc/self/pagemap").ok()) };
    let saved = file();
    let written = difference::write(&ram, &dirty, &image().0, &saved, &mut || false).unwrap();
    assert_eq!(written.bytes, saved.metadata().unwrap().len());
    let again = guest();
    difference::lay_over(&again, &saved).unwrap();
    assert!(content(&again) == content(&ram), "what was saved was not what is restored");
});
