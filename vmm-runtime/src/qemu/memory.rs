//! Guest memory seen from outside: which pages of a clone are its own, and how they are read and written.
//!
//! A clone maps its image's memory file `MAP_PRIVATE`, so the pages that differ are exactly the anonymous ones in that
//! mapping (vmm.md §2.6; measured to the bit). That includes the pages that a restore wrote before the guest ran, so one
//! scan always covers the whole difference to the image. Pages are read and written through `/proc/<pid>/mem`, which
//! takes the rights of a tracer: root, or the same user without restrictions by Yama.

use std::{
    fs::{self, File},
    io::{self, BufWriter},
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
};

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};
use tokio_util::sync::CancellationToken;

use crate::snapshot::memdiff::{DiffError, PAGE, Reader, Writer, Written};

const PAGE_U64: u64 = PAGE as u64;
/// How much is read at a time; also how often a cancel is looked at.
const CHUNK: usize = 1 << 20;
static ZERO_PAGE: [u8; PAGE] = [0; PAGE];

/// Addresses of the guest's memory in the process.
pub type Mapping = Range<u64>;

/// Consecutive pages, as indices into guest memory.
pub type Pages = Range<u64>;

/// Finds where the process maps the whole of `memory`.
pub fn find_mapping(pid: i32, memory: &Path) -> io::Result<Mapping> {
    let metadata = fs::metadata(memory)?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    mapping_in(&maps, metadata.ino(), metadata.len())
        .ok_or_else(|| io::Error::other(format!("QEMU (pid {pid}) does not map {} as guest memory", memory.display())))
}

/// The kernel splits a mapping where attributes of its parts differ; the pieces are adjacent.
fn mapping_in(maps: &str, inode: u64, length: u64) -> Option<Mapping> {
    let mut found: Option<Mapping> = None;
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (addresses, _permissions, offset, _device, line_inode) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        if line_inode.parse() != Ok(inode) {
            continue;
        }
        let (start, end) = addresses.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        let offset = u64::from_str_radix(offset, 16).ok()?;
        match &mut found {
            None if offset == 0 => found = Some(start..end),
            Some(mapping) if mapping.end == start && mapping.end - mapping.start == offset => mapping.end = end,
            _ => return None,
        }
    }
    found.filter(|mapping| mapping.end - mapping.start == length)
}

/// The pages of the mapping that belong to the process alone.
pub fn private_pages(pid: i32, mapping: &Mapping) -> io::Result<Vec<Pages>> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    match scan(pagemap.as_fd(), mapping) {
        // Linux before 6.7.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => read_pagemap(&pagemap, mapping),
        scanned => scanned,
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

/// Why a difference was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Asked to stop.
    #[error("it was cancelled")]
    Cancelled,
    /// Something could not be read or written.
    #[error("{doing} failed")]
    Io {
        /// What was tried.
        doing: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn doing(what: impl Into<String>) -> impl FnOnce(io::Error) -> WriteError {
    let doing = what.into();
    move |source| WriteError::Io { doing, source }
}

/// Opens the memory of a process; the error says what is missing.
fn open_memory(pid: i32, write: bool) -> io::Result<File> {
    fs::OpenOptions::new().read(true).write(write).open(format!("/proc/{pid}/mem")).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => io::Error::new(
            error.kind(),
            format!("no permission for the memory of QEMU (pid {pid}); run as root, give CAP_SYS_PTRACE, or set kernel.yama.ptrace_scope=0: {error}"),
        ),
        _ => error,
    })
}

/// Writes what a stopped clone's memory has that its image has not, durably.
pub fn write_difference(pid: i32, mapping: &Mapping, image_memory: &Path, to: &Path, cancel: &CancellationToken) -> Result<Written, WriteError> {
    let private = private_pages(pid, mapping).map_err(doing("finding the changed pages"))?;
    let memory = open_memory(pid, false).map_err(doing("opening the guest's memory"))?;
    let image = File::open(image_memory).map_err(doing(format!("opening {}", image_memory.display())))?;
    let file = File::create_new(to).map_err(doing(format!("creating {}", to.display())))?;
    let write = || doing(format!("writing {}", to.display()));
    let mut writer = Writer::new(BufWriter::with_capacity(CHUNK, file), (mapping.end - mapping.start) / PAGE_U64).map_err(write())?;
    let (mut ours, mut base) = (vec![0; CHUNK], vec![0; CHUNK]);
    for pages in private {
        let mut at = pages.start;
        while at < pages.end {
            if cancel.is_cancelled() {
                return Err(WriteError::Cancelled);
            }
            let length = CHUNK.min((pages.end - at) as usize * PAGE);
            memory.read_exact_at(&mut ours[..length], mapping.start + at * PAGE_U64).map_err(doing("reading the guest's memory"))?;
            image.read_exact_at(&mut base[..length], at * PAGE_U64).map_err(doing(format!("reading {}", image_memory.display())))?;
            for (page, (ours, base)) in (at..).zip(ours[..length].chunks_exact(PAGE).zip(base.chunks_exact(PAGE))) {
                // A page may have been written and hold again, or still, what the image holds.
                if ours != base {
                    writer.pages(page, ours).map_err(write())?;
                }
            }
            at += (length / PAGE) as u64;
        }
    }
    let (file, written) = writer.finish().map_err(write())?;
    file.into_inner().map_err(io::IntoInnerError::into_error).and_then(|file| file.sync_all()).map_err(write())?;
    Ok(written)
}

/// Puts a difference into a clone that has not run yet.
pub fn apply_difference(pid: i32, mapping: &Mapping, difference: &mut Reader<File>) -> Result<(), DiffError> {
    let memory = open_memory(pid, true).map_err(DiffError::Sink)?;
    difference.apply(|offset, bytes| {
        // The reader has checked every offset against the size of the memory that it was opened with.
        memory.write_all_at(bytes, mapping.start + offset)
    })
}

/// What [`measure`] finds in a flat, sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// Bytes of pages that are not zero.
    pub data_bytes: u64,
    /// Checksum of those pages with their positions.
    pub crc32: u32,
}

/// Whether zero pages are made holes on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroPages {
    /// Left as they are.
    Keep,
    /// Punched out, so that they take no space and no time to read.
    Punch,
}

/// Reads the data of a flat, sparse file (memory or disk of an image) and sums it up. Holes and zero pages count alike.
pub fn measure(path: &Path, zero_pages: ZeroPages) -> io::Result<Measured> {
    let file = fs::OpenOptions::new().read(true).write(zero_pages == ZeroPages::Punch).open(path)?;
    let length = file.metadata()?.len();
    let (mut hasher, mut data_bytes, mut chunk) = (crc32fast::Hasher::new(), 0, vec![0; CHUNK]);
    let mut at = 0;
    while let Some((from, to)) = next_data(&file, at, length)? {
        at = from / PAGE_U64 * PAGE_U64;
        while at < to {
            let wanted = CHUNK.min((length - at) as usize);
            file.read_exact_at(&mut chunk[..wanted], at)?;
            let mut zeros: Option<Range<u64>> = None;
            for (page_at, page) in (at..).step_by(PAGE).zip(chunk[..wanted].chunks(PAGE)) {
                if page == &ZERO_PAGE[..page.len()] {
                    let end = page_at + page.len() as u64;
                    zeros = Some(zeros.map_or(page_at..end, |zeros| zeros.start..end));
                } else {
                    punch(&file, zeros.take(), zero_pages)?;
                    hasher.update(&page_at.to_le_bytes());
                    hasher.update(page);
                    data_bytes += page.len() as u64;
                }
            }
            punch(&file, zeros, zero_pages)?;
            at += wanted as u64;
        }
    }
    Ok(Measured { data_bytes, crc32: hasher.finalize() })
}

fn punch(file: &File, zeros: Option<Range<u64>>, zero_pages: ZeroPages) -> io::Result<()> {
    if let (Some(zeros), ZeroPages::Punch) = (zeros, zero_pages) {
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(file, flags, zeros.start, zeros.end - zeros.start) {
            // Costs space only.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The next stretch of the file, at or after `from`, that is no hole.
fn next_data(file: &File, from: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    use rustix::{fs::SeekFrom, io::Errno};
    if from >= length {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok(Some((start, end.min(length))))
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
        let pid = std::process::id() as i32;
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
        let mut state = 1u32;
        for page in 0..PAGES {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if state >> 30 == 0 {
                memory[skip + page * PAGE] = 1;
            }
        }
        let read = read_pagemap(&pagemap, &mapping).unwrap();
        assert!(read.len() > 5_000, "{} pieces show nothing", read.len());
        assert!(private_pages(pid, &mapping).unwrap() == read);
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
        let (pid, mapping) = (std::process::id() as i32, start..start + 290 * PAGE_U64);
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
        let read = read_pagemap(&pagemap, &mapping).unwrap();
        assert_eq!(private_pages(pid, &mapping).unwrap(), read);
        for page in [0, 1, 5, 6, 7, 200] {
            assert!(read.iter().any(|pages| pages.contains(&page)), "{read:?}");
        }
    }

    #[test]
    fn a_mapping_in_pieces_is_found_and_one_that_is_not_whole_is_not() {
        let line = |start: u64, end: u64, offset: u64, inode: u64| format!("{start:x}-{end:x} rw-p {offset:08x} fe:00 {inode} /memory\n");
        let other = line(0x1000, 0x2000, 0, 7);
        let whole = [other.clone(), line(0x10000, 0x20000, 0, 5), line(0x20000, 0x30000, 0x10000, 5)].concat();
        assert_eq!(mapping_in(&whole, 5, 0x20000), Some(0x10000..0x30000));
        assert_eq!(mapping_in(&whole, 5, 0x40000), None);
        assert_eq!(mapping_in(&[line(0x10000, 0x20000, 0, 5), line(0x30000, 0x40000, 0x10000, 5)].concat(), 5, 0x20000), None);
        assert_eq!(mapping_in(&other, 5, 0x1000), None);
    }

    #[test]
    fn punching_changes_neither_content_nor_sum() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let mut content = vec![0; 3 * CHUNK + 5 * PAGE];
        for page in [3, 4, 255, 256, 770] {
            content[page * PAGE + 17] = page as u8 | 1;
        }
        fs::write(&path, &content).unwrap();
        let before = measure(&path, ZeroPages::Keep).unwrap();
        assert_eq!(measure(&path, ZeroPages::Punch).unwrap(), before);
        assert_eq!(measure(&path, ZeroPages::Keep).unwrap(), before);
        assert_eq!(before.data_bytes, 5 * PAGE_U64);
        assert!(fs::read(&path).unwrap() == content);
        assert!(fs::metadata(&path).unwrap().blocks() * 512 < 64 * PAGE_U64);

        content[256 * PAGE + 100] ^= 1;
        fs::write(&path, &content).unwrap();
        assert_ne!(measure(&path, ZeroPages::Keep).unwrap().crc32, before.crc32);
    }
}
