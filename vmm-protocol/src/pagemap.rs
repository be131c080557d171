//! Which pages of a private file mapping belong to one process alone.
//!
//! For a guest whose memory is its image's file mapped `MAP_PRIVATE`, these are exactly the pages that differ from the
//! image (vmm.md §2.6; measured to the bit).

use std::{
    fs::File,
    io,
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
};

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};

use crate::memdiff::PAGE;

const PAGE_U64: u64 = PAGE as u64;

/// Addresses of the mapping in the process.
pub type Mapping = Range<u64>;

/// Consecutive pages, as indices into the mapping.
pub type Pages = Range<u64>;

/// The pages of the mapping that belong to the process alone.
///
/// `pagemap` is `/proc/<pid>/pagemap` of the process, `mapping` a private mapping in it.
pub fn private_pages(pagemap: &File, mapping: &Mapping) -> io::Result<Vec<Pages>> {
    match scan(pagemap.as_fd(), mapping) {
        // Linux before 6.7.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => read_pagemap(pagemap, mapping),
        scanned => scanned,
    }
}

/// A way to ask the kernel for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The `PAGEMAP_SCAN` ioctl, since Linux 6.7.
    Scan,
    /// Every entry of the file.
    Read,
}

/// As [`private_pages`], in this way and no other.
pub fn private_pages_by(way: Way, pagemap: &File, mapping: &Mapping) -> io::Result<Vec<Pages>> {
    match way {
        Way::Scan => scan(pagemap.as_fd(), mapping),
        Way::Read => read_pagemap(pagemap, mapping),
    }
}

/// Bits of an entry of `/proc/<pid>/pagemap`.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;

fn read_pagemap(pagemap: &File, mapping: &Mapping) -> io::Result<Vec<Pages>> {
    let (mut pages, mut entries) = (Vec::new(), vec![0; 64 * 1024]);
    let (first, end) = (mapping.start / PAGE_U64, mapping.end / PAGE_U64);
    let mut at = first;
    while at < end {
        let wanted = entries.len().min((end - at) as usize * 8);
        pagemap.read_exact_at(&mut entries[..wanted], at * 8)?;
        for entry in entries[..wanted].chunks_exact(8) {
            let entry = u64::from_ne_bytes(entry.try_into().expect("eight bytes"));
            if entry & (PRESENT | SWAPPED) != 0 && entry & FILE_OR_SHARED == 0 {
                add(&mut pages, at - first..at - first + 1);
            }
            at += 1;
        }
    }
    Ok(pages)
}

fn add(pages: &mut Vec<Pages>, more: Pages) {
    match pages.last_mut() {
        Some(last) if last.end == more.start => last.end = more.end,
        _ => pages.push(more),
    }
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// The `PAGEMAP_SCAN` ioctl with what it reads and writes.
struct Scan<'a> {
    arg: ScanArg,
    /// Keeps the memory that `arg.vec` points at borrowed.
    _regions: &'a mut [Region],
}

impl<'a> Scan<'a> {
    fn new(range: Range<u64>, regions: &'a mut [Region]) -> Self {
        let arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: range.start,
            end: range.end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: PAGE_IS_FILE,
            category_mask: PAGE_IS_FILE,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT,
            ..ScanArg::default()
        };
        Self { arg, _regions: regions }
    }
}

// SAFETY: the opcode is `_IOWR('f', 16, struct pm_scan_arg)`, whose layout `ScanArg` repeats (a test checks its size). The
// kernel reads and writes `arg` and writes at most `vec_len` regions at `vec`; both are exclusively borrowed by `self` for
// the duration of the call, and a `Region` may hold any bits.
unsafe impl Ioctl for Scan<'_> {
    /// How many regions were written, and where the walk ended.
    type Output = (usize, u64);
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        rustix::ioctl::opcode::read_write::<ScanArg>(b'f', 16)
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        (&raw mut self.arg).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, arg: *mut rustix::ffi::c_void) -> rustix::io::Result<Self::Output> {
        // SAFETY: `arg` is what `as_ptr` returned, a valid and initialised `ScanArg`.
        let walk_end = unsafe { (*arg.cast::<ScanArg>()).walk_end };
        Ok((usize::try_from(out).unwrap_or(0), walk_end))
    }
}

fn scan(pagemap: BorrowedFd<'_>, mapping: &Mapping) -> io::Result<Vec<Pages>> {
    let (mut pages, mut regions) = (Vec::new(), vec![Region::default(); 1024]);
    let mut at = mapping.start;
    while at < mapping.end {
        let request = Scan::new(at..mapping.end, &mut regions);
        // SAFETY: the file is a pagemap, which is what the ioctl is for; on any other it fails with ENOTTY.
        let (found, walk_end) = unsafe { rustix::ioctl::ioctl(pagemap, request)? };
        for region in &regions[..found.min(regions.len())] {
            add(&mut pages, (region.start - mapping.start) / PAGE_U64..(region.end - mapping.start) / PAGE_U64);
        }
        // When the regions do not all fit, `walk_end` can lie before the end of the last one that was given (seen on Linux
        // 6.18): what lies between has been looked at, and would be given twice.
        let looked_at = regions[..found.min(regions.len())].last().map_or(walk_end, |region| region.end.max(walk_end));
        if looked_at <= at {
            return Err(io::Error::other("the scan of the page tables does not advance"));
        }
        at = looked_at;
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_kernels() {
        assert_eq!((size_of::<ScanArg>(), size_of::<Region>()), (96, 24));
        assert_eq!(rustix::ioctl::opcode::read_write::<ScanArg>(b'f', 16), 0xc060_6610);
    }

    /// More regions than one call of the kernel's scan gives, at places that do not repeat.
    #[test]
    fn memory_in_many_pieces_is_found_whole() {
        const PAGES: usize = 100_000;
        let mut memory = vec![0u8; (PAGES + 1) * PAGE];
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE_U64);
        let skip = (start - memory.as_ptr() as u64) as usize;
        let mapping = start..start + PAGES as u64 * PAGE_U64;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut state = 1u32;
        for page in 0..PAGES {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if state >> 30 == 0 {
                memory[skip + page * PAGE] = 1;
            }
        }
        let read = read_pagemap(&pagemap, &mapping).unwrap();
        assert!(read.len() > 5_000, "{} pieces show nothing", read.len());
        assert!(private_pages(&pagemap, &mapping).unwrap() == read);
    }

    #[test]
    fn both_ways_to_find_private_pages_agree() {
        // Anonymous memory of this process: every page that was written counts as private.
        let mut memory = vec![0u8; 300 * PAGE];
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE_U64);
        let skip = (start - memory.as_ptr() as u64) as usize;
        for page in [0, 1, 5, 6, 7, 200] {
            memory[skip + page * PAGE] = 1;
        }
        let mapping = start..start + 290 * PAGE_U64;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let read = read_pagemap(&pagemap, &mapping).unwrap();
        assert_eq!(private_pages(&pagemap, &mapping).unwrap(), read);
        for page in [0, 1, 5, 6, 7, 200] {
            assert!(read.iter().any(|pages| pages.contains(&page)), "{read:?}");
        }
    }
}
