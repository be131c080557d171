//! How a process learns which pages of its guest's memory were written, and whether that way can be trusted on this host.
//!
//! The page tables say it for nothing ([`vmm_protocol::pagemap`]), but a kernel may lack them (`CONFIG_PROC_PAGE_MONITOR`), a
//! sandbox may forbid them, and a kernel that is not Linux's own may answer something else. A page that is overlooked is a guest
//! with a hole in its memory, so each way has to find a page that is known to be written before it is used.
//!
//! What remains is to compare every page with the image. KVM's dirty log is no way: it knows what vCPUs write, and nothing of what
//! this process writes for its devices; each of those writes would have to be noted, and one that is forgotten would be lost. A
//! comparison needs no notes. It costs a read of all memory, some 0.2 s for 512 MiB, where the page tables cost milliseconds.

use std::{fs::File, io, sync::Arc};

use vm_memory::{Bytes, FileOffset, VolatileMemory, mmap::MmapRegionBuilder};
use vmm_protocol::pagemap::{self, Way};

use crate::memory::PAGE;

/// How pages are found that may differ from the image.
#[derive(Debug)]
pub enum DirtyPages {
    /// By this process's page tables: exactly the pages that are private to it.
    PageTables {
        /// How the kernel is asked.
        way: Way,
        /// `/proc/self/pagemap`.
        pagemap: File,
    },
    /// Any page may.
    CompareAll,
}

impl DirtyPages {
    /// The first way that passes its test on a private mapping of `memory`, which has three pages at least.
    pub fn find_way(pagemap: Option<File>, memory: &Arc<File>) -> Self {
        let Some(pagemap) = pagemap else {
            tracing::warn!("/proc/self/pagemap cannot be opened; a save compares all memory with the image, which takes longer");
            return Self::CompareAll;
        };
        for way in [Way::Scan, Way::Read] {
            match finds_a_write(way, &pagemap, memory) {
                Ok(true) => return Self::PageTables { way, pagemap },
                Ok(false) => tracing::warn!(?way, "the kernel does not tell private pages from those of a file"),
                Err(error) => tracing::debug!(?way, %error, "a way to read the page tables cannot be used"),
            }
        }
        tracing::warn!("the page tables cannot be used; a save compares all memory with the image, which takes longer");
        Self::CompareAll
    }
}

/// Whether one written page is found between one that was read and one that was not touched.
fn finds_a_write(way: Way, pagemap: &File, memory: &Arc<File>) -> io::Result<bool> {
    let mapping = MmapRegionBuilder::<()>::new(3 * PAGE as usize)
        .with_file_offset(FileOffset::from_arc(memory.clone(), 0))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .build()
        .map_err(io::Error::other)?;
    let touched = mapping.as_volatile_slice();
    let _: u8 = touched.read_obj(0).map_err(io::Error::other)?;
    let byte: u8 = touched.read_obj(PAGE as usize).map_err(io::Error::other)?;
    touched.write_obj(byte, PAGE as usize).map_err(io::Error::other)?;
    let start = mapping.as_ptr() as u64;
    let found = pagemap::private_pages_by(way, pagemap, &(start..start + 3 * PAGE))?;
    Ok(matches!(found.as_slice(), [only] if *only == (1..2)))
}
