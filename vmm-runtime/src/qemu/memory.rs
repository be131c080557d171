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
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use tokio_util::sync::CancellationToken;

use vmm_protocol::{
    memdiff::{DiffError, PAGE, Reader, Writer, Written},
    pagemap,
};

const PAGE_U64: u64 = PAGE as u64;
/// How much is read at a time; also how often a cancel is looked at.
const CHUNK: usize = 1 << 20;

/// Addresses of the guest's memory in the process.
pub type Mapping = Range<u64>;

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
    let private = File::open(format!("/proc/{pid}/pagemap"))
        .and_then(|file| pagemap::private_pages(&file, mapping))
        .map_err(doing("finding the changed pages"))?;
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
