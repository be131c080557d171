//! Where the time of a memory difference goes, piece by piece and without a guest:
//! `cargo run --release -p vmm --example memory_cost [directory for the files]`
//!
//! Prints the median of 20 rounds, for 30 MiB that differ: in one run, and every second page. Asserts nothing.

use std::{
    fs::File,
    hint::black_box,
    io::BufWriter,
    os::unix::fs::FileExt,
    path::PathBuf,
    time::{Duration, Instant},
};

use vm_memory::{Bytes, GuestAddress};
use vmm::memory::{GuestRam, PAGE, difference};
use vmm_protocol::{
    control::MemoryUse,
    memdiff::{Reader, Writer},
};

const BYTES: u64 = 512 << 20;
const DIRTY_PAGES: u64 = 30 * 256;
const FIRST: u64 = 16 << 20;
const ROUNDS: usize = 20;

fn file(dir: &std::path::Path) -> File {
    let path = dir.join(format!("memory-cost-{}", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("the directory is writable");
    std::fs::remove_file(path).expect("it is there");
    file
}

fn guest(image: &File) -> GuestRam {
    GuestRam::map(image.try_clone().expect("a descriptor is free"), BYTES, MemoryUse::Private).expect("the image has this length")
}

/// `prepare` is not measured.
fn print<T, R>(what: &str, mut prepare: impl FnMut() -> T, mut work: impl FnMut(&T) -> R) {
    let mut took: Vec<Duration> = Vec::new();
    for _ in 0..ROUNDS {
        let prepared = prepare();
        let began = Instant::now();
        black_box(work(&prepared));
        took.push(began.elapsed());
    }
    took.sort_unstable();
    println!("  {what:62} {:7.2} ms (best {:.2})", took[ROUNDS / 2].as_secs_f64() * 1e3, took[0].as_secs_f64() * 1e3);
}

fn main() {
    let dir = std::env::args_os().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let image = file(&dir);
    image.set_len(BYTES).expect("there is room");
    image.write_all_at(&vec![0x44; 64 << 20], FIRST).expect("there is room");
    for apart in [1, 2] {
        println!("{DIRTY_PAGES} pages, {apart} apart:");
        let dirty = || {
            let ram = guest(&image);
            for page in 0..DIRTY_PAGES {
                ram.memory().write_slice(&[page as u8 | 1; PAGE as usize], GuestAddress(FIRST + page * apart * PAGE)).expect("it is memory");
            }
            ram
        };
        let pagemap = || File::open("/proc/self/pagemap").ok();
        let save = |ram: &GuestRam, out: &File| difference::write(ram, &ram.find_way(pagemap()), &image, out, &mut || false).expect("it can be saved");

        let saved = file(&dir);
        save(&dirty(), &saved);
        println!(" restore:");
        print("the whole (lay_over)", || guest(&image), |ram| difference::lay_over(ram, &saved).expect("it is whole"));
        print("  reading and checking alone (Reader, nowhere to)", || (), |()| {
            let mut source = &saved;
            Reader::open(&mut source, BYTES / PAGE).and_then(|mut reader| reader.apply(|_, _| Ok(()))).expect("it is whole");
        });
        print("  reading alone", || vec![0; (DIRTY_PAGES * PAGE) as usize], |_| {
            let mut buffer = vec![0; 1 << 20];
            for at in (0..DIRTY_PAGES * PAGE).step_by(1 << 20) {
                saved.read_exact_at(&mut buffer, PAGE + at).expect("it is there");
            }
        });
        print("  checksum alone", || vec![7_u8; (DIRTY_PAGES * PAGE) as usize], |bytes| bytes.chunks(1 << 20).map(crc32fast::hash).max());
        print("  storing pages into a private mapping, as a copy does", || guest(&image), |ram| {
            for page in 0..DIRTY_PAGES {
                ram.memory().write_slice(&[1; PAGE as usize], GuestAddress(FIRST + page * apart * PAGE)).expect("it is memory");
            }
        });
        println!(" save:");
        print("the whole (write, with a sync)", || (dirty(), file(&dir)), |(ram, out)| save(ram, out));
        print("  finding the pages' way (once per process in a VMM)", dirty, |ram| ram.find_way(pagemap()));
        print("  reading guest memory", dirty, |ram| {
            let mut buffer = vec![0; 1 << 20];
            for page in 0..DIRTY_PAGES {
                ram.memory().read_slice(&mut buffer[..PAGE as usize], GuestAddress(FIRST + page * apart * PAGE)).expect("it is memory");
            }
        });
        print("  reading the image", || (), |()| {
            let mut buffer = vec![0; 1 << 20];
            for page in (0..DIRTY_PAGES).step_by(256 / apart as usize) {
                image.read_exact_at(&mut buffer, FIRST + page * apart * PAGE).expect("it is there");
            }
        });
        // Memory that was touched before, or its first touch would be most of the figure.
        let touched = || (vec![7_u8; 256 * PAGE as usize], std::cell::Cell::new(vec![1_u8; 40 << 20]));
        print("  comparing with zeros, checksums, copying (Writer over memory)", touched, |(pages, to)| {
            let mut writer = Writer::new(std::io::Cursor::new(to.take()), BYTES / PAGE).expect("memory can be written");
            for first in (0..DIRTY_PAGES).step_by(256) {
                writer.pages(first, pages).expect("they are in order");
            }
            writer.finish().expect("memory can be written")
        });
        print("  writing the file without a sync", || (file(&dir), vec![7_u8; 1 << 20]), |(out, bytes)| {
            let mut out = BufWriter::with_capacity(1 << 20, out);
            for _ in 0..(DIRTY_PAGES * PAGE) >> 20 {
                std::io::Write::write_all(&mut out, bytes).expect("there is room");
            }
        });
    }
}
