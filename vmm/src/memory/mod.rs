//! Guest memory.
//!
//! Owns: the mappings, and which of their pages no longer come from the memory file. A guest that boots has the file mapped
//! shared: what it writes is in the file, which becomes an image's. A clone has an image's file mapped private, and on it
//!
//! ```text
//! image's file, private ── pages of the difference (its file mapped over, or copied in) ── zero pages (anonymous) ── what the
//! guest has written (anonymous, by copy on write)
//! ```
//! Never makes a reference into guest memory: the guest may change it at any time. All access is volatile, or by the kernel.

pub mod difference;
pub mod dirty;

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, PoisonError},
};

use virtio_devices::device::Memory;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap,
    mmap::MmapRegionBuilder,
};
use vmm_protocol::control::MemoryUse;

use self::dirty::DirtyPages;
use crate::arch::layout;

/// Bytes of a page.
pub const PAGE: u64 = vmm_protocol::memdiff::PAGE as u64;

/// Why guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The file has another length than announced; a mapping beyond its end would end the process on first touch.
    #[error("the memory file has {found} bytes and should have {wanted}")]
    Length {
        /// What it has.
        found: u64,
        /// What it should have.
        wanted: u64,
    },
    /// Not a multiple of 2 MiB, or too little or much.
    #[error("a guest cannot have {0} bytes of memory")]
    Size(u64),
    /// The kernel refused.
    #[error("{doing} failed")]
    Host {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// One mapping: a piece of the memory file.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Where it begins in the file.
    offset: u64,
    bytes: u64,
    /// Where it is mapped in this process.
    host: u64,
    /// Where the guest has it.
    guest: u64,
}

/// Mappings that discards may bring about; the kernel's limit for a whole process is 65530, and at the limit this process's
/// own allocator would fail. A guest that gives back every second page gets there; one that gives back what is free does not.
const MAX_EDGES: u64 = 32 * 1024;

/// Pages that are mapped from something else than the memory file: one bit for each.
#[derive(Debug, Default)]
struct Overlaid {
    bits: Vec<u64>,
    /// Those of them that are zero pages; the others come from a difference's file. What is discarded in the middle of the
    /// latter cuts a mapping, too.
    zeros: Vec<u64>,
    /// Pages that come from something else than the page before: about as many mappings there are.
    edges: u64,
}

impl Overlaid {
    fn of(pages: u64) -> Self {
        let words = pages.div_ceil(64) as usize;
        Self { bits: vec![0; words], zeros: vec![0; words], edges: 0 }
    }

    /// Whether it is overlaid, and with zeros.
    fn get(&self, page: u64) -> (bool, bool) {
        let of = |bits: &[u64]| bits.get((page / 64) as usize).is_some_and(|bits| bits >> (page % 64) & 1 == 1);
        (of(&self.bits), of(&self.zeros))
    }

    fn edges(&self, pages: std::ops::RangeInclusive<u64>) -> u64 {
        pages.filter(|page| self.get(*page) != page.checked_sub(1).map_or((false, false), |before| self.get(before))).count() as u64
    }

    fn set(&mut self, first: u64, pages: u64, zeros: bool) {
        let before = self.edges(first..=first + pages);
        for page in first..first + pages {
            let (word, bit) = ((page / 64) as usize, 1 << (page % 64));
            self.bits[word] |= bit;
            if zeros {
                self.zeros[word] |= bit;
            } else {
                self.zeros[word] &= !bit;
            }
        }
        // Within, there is none any more.
        let end = first + pages;
        self.edges = self.edges + self.edges(first..=first) + self.edges(end..=end) - before;
    }
}

/// Memory of one guest. Offsets are those of the memory file: guest memory without the hole.
#[derive(Debug)]
pub struct GuestRam {
    memory: Memory,
    pieces: Vec<Piece>,
    bytes: u64,
    memory_use: MemoryUse,
    file: Arc<File>,
    overlaid: Mutex<Overlaid>,
}

impl GuestRam {
    /// Maps the file.
    pub fn map(file: File, bytes: u64, memory_use: MemoryUse) -> Result<Self, MemoryError> {
        // 16 MiB: less has no room for a kernel. 1 TiB: more has none in the page numbers of a difference.
        if !bytes.is_multiple_of(2 << 20) || !(2 << 20..=1 << 40).contains(&bytes) {
            return Err(MemoryError::Size(bytes));
        }
        let found = file.metadata().map_err(|source| MemoryError::Host { doing: "looking at the memory file", source })?.len();
        if found != bytes {
            return Err(MemoryError::Length { found, wanted: bytes });
        }
        let file = Arc::new(file);
        let flags = libc::MAP_NORESERVE
            | match memory_use {
                MemoryUse::Shared => libc::MAP_SHARED,
                MemoryUse::Private => libc::MAP_PRIVATE,
            };
        let (mut regions, mut pieces, mut offset) = (Vec::new(), Vec::new(), 0);
        for (guest, bytes) in layout::ram(bytes) {
            let mapping = MmapRegionBuilder::new(bytes as usize)
                .with_file_offset(FileOffset::from_arc(file.clone(), offset))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(flags)
                .build()
                .map_err(|error| MemoryError::Host { doing: "mapping guest memory", source: io::Error::other(error) })?;
            pieces.push(Piece { offset, bytes, host: mapping.as_ptr() as u64, guest });
            offset += bytes;
            regions.push(GuestRegionMmap::new(mapping, GuestAddress(guest)).ok_or(MemoryError::Size(bytes))?);
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(|error| MemoryError::Host { doing: "mapping guest memory", source: io::Error::other(error) })?;
        // A core dump of this process must not hold a guest's memory, nor a child get it (there is none).
        for piece in &pieces {
            // SAFETY: the range is one whole mapping of ours.
            unsafe { libc::madvise(piece.host as *mut libc::c_void, piece.bytes as usize, libc::MADV_DONTDUMP) };
        }
        let overlaid = Overlaid::of(bytes / PAGE);
        Ok(Self { memory: Arc::new(memory), pieces, bytes, memory_use, file, overlaid: Mutex::new(overlaid) })
    }

    /// For devices.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Pages of memory.
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE
    }

    /// How the file is mapped.
    pub fn memory_use(&self) -> MemoryUse {
        self.memory_use
    }

    /// Makes what the guest has written durable, if it is in the file.
    pub fn sync(&self) -> io::Result<()> {
        match self.memory_use {
            // Dirty pages of a shared mapping are dirty pages of the file.
            MemoryUse::Shared => self.file.sync_data(),
            MemoryUse::Private => Ok(()),
        }
    }

    /// Address in this process and length of what is contiguous from `offset`, at most `bytes`.
    fn host(&self, offset: u64, bytes: u64) -> io::Result<(u64, u64)> {
        let piece = self
            .pieces
            .iter()
            .find(|piece| (piece.offset..piece.offset + piece.bytes).contains(&offset))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("offset {offset:#x} is outside of guest memory")))?;
        let inside = offset - piece.offset;
        Ok((piece.host + inside, bytes.min(piece.bytes - inside)))
    }

    /// Guest address and length of what is contiguous from `offset`, at most `bytes`.
    fn guest(&self, offset: u64, bytes: u64) -> io::Result<(GuestAddress, u64)> {
        let (host, bytes) = self.host(offset, bytes)?;
        let piece = self.pieces.iter().find(|piece| (piece.host..piece.host + piece.bytes).contains(&host)).expect("`host` answers an address in a piece");
        Ok((GuestAddress(piece.guest + (host - piece.host)), bytes))
    }

    /// Offset of a range of guest addresses that is all memory.
    fn offset_of(&self, address: u64, bytes: u64) -> Option<u64> {
        let end = address.checked_add(bytes)?;
        let piece = self.pieces.iter().find(|piece| piece.guest <= address && end <= piece.guest + piece.bytes)?;
        Some(piece.offset + (address - piece.guest))
    }

    /// Maps pages of `file`, privately, or zero pages, over what is at `offset`. All are multiples of the page size.
    fn map_over(&self, offset: u64, bytes: u64, from: Option<(&File, u64)>) -> io::Result<()> {
        let (mut at, mut left, mut file_at) = (offset, bytes, from.map_or(0, |(_, at)| at));
        while left > 0 {
            let (host, length) = self.host(at, left)?;
            let (flags, descriptor) = match from {
                Some((file, _)) => (libc::MAP_PRIVATE, file.as_raw_fd()),
                None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
            };
            // SAFETY: `host` answered a page-aligned range that lies within one of our own mappings of guest memory, which are
            // replaced here and unmapped as a whole when they are dropped; nobody holds a reference into guest memory.
            let mapped = unsafe {
                libc::mmap(
                    host as *mut libc::c_void,
                    length as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    flags | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    descriptor,
                    if from.is_some() { file_at as libc::off_t } else { 0 },
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: as in `map`.
            unsafe { libc::madvise(mapped, length as usize, libc::MADV_DONTDUMP) };
            self.overlaid.lock().unwrap_or_else(PoisonError::into_inner).set(at / PAGE, length / PAGE, from.is_none());
            at += length;
            file_at += length;
            left -= length;
        }
        Ok(())
    }

    /// Gives pages that the guest does not need back to the host; they read as zeros afterwards. `address` is the guest's;
    /// what is not page-aligned, or not memory, is ignored: it comes from the guest.
    ///
    /// Never MADV_DONTNEED: on a private mapping of an image's file that would bring the image's page back, not zeros.
    pub fn discard(&self, address: u64, bytes: u64) -> io::Result<()> {
        let (begin, end) = (address.next_multiple_of(PAGE), address.saturating_add(bytes) / PAGE * PAGE);
        if begin >= end {
            return Ok(());
        }
        let Some(offset) = self.offset_of(begin, end - begin) else { return Ok(()) };
        match self.memory_use {
            MemoryUse::Private => {
                if self.overlaid.lock().unwrap_or_else(PoisonError::into_inner).edges >= MAX_EDGES {
                    return Err(io::Error::other("the guest gives its memory back in too many pieces"));
                }
                self.map_over(offset, end - begin, None)
            }
            MemoryUse::Shared => {
                // SAFETY: the descriptor is our file's; the range lies within it.
                let punched = unsafe {
                    libc::fallocate(self.file.as_raw_fd(), libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset as libc::off_t, (end - begin) as libc::off_t)
                };
                if punched != 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            }
        }
    }

    /// Finds out how this process can learn which pages its guest has written.
    pub fn find_way(&self, pagemap: Option<File>) -> DirtyPages {
        match self.memory_use {
            MemoryUse::Private => DirtyPages::find_way(pagemap, &self.file),
            // No difference is ever written.
            MemoryUse::Shared => DirtyPages::CompareAll,
        }
    }

    /// Pages that may differ from the memory file: those of this process alone, and those that come from elsewhere.
    pub(crate) fn candidates(&self, dirty: &DirtyPages) -> io::Result<Vec<std::ops::Range<u64>>> {
        let DirtyPages::PageTables { way, pagemap } = dirty else {
            return Ok(std::iter::once(0..self.pages()).collect());
        };
        let mut bits = self.overlaid.lock().unwrap_or_else(PoisonError::into_inner).bits.clone();
        for piece in &self.pieces {
            let first = piece.offset / PAGE;
            for pages in vmm_protocol::pagemap::private_pages_by(*way, pagemap, &(piece.host..piece.host + piece.bytes))? {
                for page in pages {
                    let page = first + page;
                    bits[(page / 64) as usize] |= 1 << (page % 64);
                }
            }
        }
        let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
        for (word, bits) in (0..).zip(bits).filter(|(_, bits)| *bits != 0) {
            for bit in (0..64).filter(|bit| bits >> bit & 1 == 1) {
                let page = word * 64 + bit;
                match ranges.last_mut() {
                    Some(range) if range.end == page => range.end += 1,
                    _ => ranges.push(page..page + 1),
                }
            }
        }
        Ok(ranges)
    }
}
