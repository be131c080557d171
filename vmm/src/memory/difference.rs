//! The memory difference, laid over guest memory at a restore and written at a save.
//!
//! The file's form is [`vmm_protocol::memdiff`]'s. Pages are found by this process's page tables (vmm.md §2.6): of a file mapped
//! private, exactly the pages that were written are anonymous. To these come pages that are mapped from the difference before, or
//! are zeros by fiat ([`GuestRam`] remembers both). All are compared with the image's file: what is equal is not written.

use std::{
    fs::File,
    io::{self, BufWriter, Read, Seek, Write},
    os::unix::fs::FileExt,
};

use vm_memory::Bytes;
use vmm_protocol::memdiff::{DiffError, Kind, Reader, Writer, Written};

use crate::memory::{GuestRam, PAGE, dirty::DirtyPages};

/// A run of at least as many pages is mapped, a shorter one is copied. Mapping costs some 5 µs per run and then a fault per
/// page that is touched; copying some 2.6 µs per page (vmm.md §2.8: 6.3 ms for 1402 runs; 19.8 ms for 30 MiB).
const MAP_FROM_PAGES: u32 = 8;
/// Mappings of runs; the kernel's limit for a whole process is 65530.
const MAX_MAPPED_RUNS: usize = 4096;
/// Pages that are looked at between two questions whether to go on: 1 MiB, less than a millisecond.
const CHUNK_PAGES: u64 = 256;

/// Why no difference was written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// As asked.
    #[error("the save was cancelled")]
    Cancelled,
    /// Guest memory is in its file; there is no difference.
    #[error("guest memory is shared with its file, so there is no difference from it")]
    NotPrivate,
    /// A file or the page tables could not be used.
    #[error("{doing} failed")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn doing(doing: &'static str) -> impl Fn(io::Error) -> WriteError {
    move |source| WriteError::Io { doing, source }
}

/// Lays a difference over fresh, private guest memory. Every checksum has been found right when this returns, and before any page
/// could be run; after an error the memory must not be used. `file` is never changed as long as the guest lives.
pub fn lay_over(memory: &GuestRam, file: &File) -> Result<(), DiffError> {
    let mut source: &File = file;
    let mut reader = Reader::open(&mut source, memory.pages())?;
    let runs = reader.runs().to_vec();
    // With more long runs than mappings, the longest would be the best choice; such a difference is rare enough to copy whatever
    // comes after the limit.
    let mut left = MAX_MAPPED_RUNS;
    let mapped: Vec<bool> = runs
        .iter()
        .map(|run| {
            let map = run.pages >= MAP_FROM_PAGES && left > 0;
            left -= usize::from(map);
            map
        })
        .collect();
    // One pass over the payload checks all of it and copies the runs that are to be copied; the others are mapped afterwards, so
    // nothing is mapped that was not found right.
    let mut at = 0;
    reader.apply(|offset, bytes| {
        while offset >= (u64::from(runs[at].first) + u64::from(runs[at].pages)) * PAGE {
            at += 1;
        }
        if mapped[at] { Ok(()) } else { write_guest(memory, offset, bytes) }
    })?;
    let mut payload = PAGE;
    for (run, mapped) in runs.iter().zip(mapped) {
        let (offset, bytes) = (u64::from(run.first) * PAGE, u64::from(run.pages) * PAGE);
        match run.kind {
            Kind::Zero if mapped => memory.map_over(offset, bytes, None).map_err(DiffError::Sink)?,
            Kind::Data if mapped => memory.map_over(offset, bytes, Some((file, payload))).map_err(DiffError::Sink)?,
            _ => {}
        }
        if run.kind == Kind::Data {
            payload += bytes;
        }
    }
    Ok(())
}

fn write_guest(memory: &GuestRam, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let (address, length) = memory.guest(offset, bytes.len() as u64)?;
        let (now, later) = bytes.split_at(length as usize);
        memory.memory().write_slice(now, address).map_err(io::Error::other)?;
        (offset, bytes) = (offset + length, later);
    }
    Ok(())
}

fn read_guest(memory: &GuestRam, mut offset: u64, mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let (address, length) = memory.guest(offset, bytes.len() as u64)?;
        let (now, later) = bytes.split_at_mut(length as usize);
        memory.memory().read_slice(now, address).map_err(io::Error::other)?;
        (offset, bytes) = (offset + length, later);
    }
    Ok(())
}

/// Writes what differs from `image` into `out`, an empty file, and syncs it. The guest is paused. `dirty` says how pages are found
/// that may differ; `cancelled` is asked before each piece of work of about a millisecond.
pub fn write(memory: &GuestRam, dirty: &DirtyPages, image: &File, out: &File, cancelled: &mut dyn FnMut() -> bool) -> Result<Written, WriteError> {
    if memory.memory_use() != vmm_protocol::control::MemoryUse::Private {
        return Err(WriteError::NotPrivate);
    }
    let candidates = memory.candidates(dirty).map_err(doing("reading the page tables"))?;
    let mut writer = Writer::new(BufWriter::with_capacity(1 << 20, out), memory.pages()).map_err(doing("writing the memory difference"))?;
    let (mut ours, mut theirs) = (vec![0; (CHUNK_PAGES * PAGE) as usize], vec![0; (CHUNK_PAGES * PAGE) as usize]);
    for range in candidates {
        let mut first = range.start;
        while first < range.end {
            if cancelled() {
                return Err(WriteError::Cancelled);
            }
            let pages = CHUNK_PAGES.min(range.end - first);
            let (ours, theirs) = (&mut ours[..(pages * PAGE) as usize], &mut theirs[..(pages * PAGE) as usize]);
            read_guest(memory, first * PAGE, ours).map_err(doing("reading guest memory"))?;
            image.read_exact_at(theirs, first * PAGE).map_err(doing("reading the image's memory"))?;
            write_unequal(&mut writer, first, ours, theirs).map_err(doing("writing the memory difference"))?;
            first += pages;
        }
    }
    let (out, written) = writer.finish().map_err(doing("writing the memory difference"))?;
    if cancelled() {
        return Err(WriteError::Cancelled);
    }
    out.get_ref().sync_data().map_err(doing("syncing the memory difference"))?;
    Ok(written)
}

/// Writes each stretch of pages that are not equal in one piece.
fn write_unequal<W: Write + Seek>(writer: &mut Writer<W>, first: u64, ours: &[u8], theirs: &[u8]) -> io::Result<()> {
    let page = PAGE as usize;
    let mut begin = None;
    let mut unequal = ours.chunks_exact(page).zip(theirs.chunks_exact(page)).map(|(ours, theirs)| ours != theirs).collect::<Vec<_>>();
    // Ends the last stretch.
    unequal.push(false);
    for (index, unequal) in unequal.into_iter().enumerate() {
        match (begin, unequal) {
            (None, true) => begin = Some(index),
            (Some(from), false) => {
                writer.pages(first + from as u64, &ours[from * page..index * page])?;
                begin = None;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Checks a difference without a guest: all checksums, and that it is for `pages` pages.
pub fn verify(file: impl Read + Seek, pages: u64) -> Result<(), DiffError> {
    Reader::open(file, pages)?.apply(|_, _| Ok(()))
}

#[cfg(test)]
mod tests;
