//! Flat, sparse files: the memory and disk of an image, and disk layers.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt, path::Path};

use vmm_protocol::memdiff::PAGE;

const PAGE_U64: u64 = PAGE as u64;
/// How much is read at a time.
const CHUNK: usize = 1 << 20;
static ZERO_PAGE: [u8; PAGE] = [0; PAGE];

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

/// Reads the data of a flat, sparse file and sums it up. Holes and zero pages count alike.
pub fn measure(path: &Path, zero_pages: ZeroPages) -> io::Result<Measured> {
    let file = File::options().read(true).write(zero_pages == ZeroPages::Punch).open(path)?;
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
    use std::{fs, os::unix::fs::MetadataExt};

    use super::*;

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
