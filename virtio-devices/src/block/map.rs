//! Which blocks of the disk a layer holds: in memory a bitmap, in a sealed layer's map file a table of runs.
//!
//! Owns: the bitmap and the format of the file. Never trusts the file: it is read in pieces of a fixed size, every run is
//! checked before it is used, and nothing is allocated by what a file says of itself.
//!
//! ```text
//!  0  magic    "DORMLAYR"
//!  8  crc32    of everything after this field
//! 12  version  1
//! 16  block    4096
//! 20  zero
//! 24  disk     length of the disk, bytes
//! 32  runs     how many
//! 40  run      { first block: u32, blocks: u32 } × runs, ascending, apart from each other
//! ```
//! All little endian. The checksum stands before what it covers so that the checksum of the whole file, which the manifest
//! holds, says something of its content (a CRC over data followed by their own CRC is always the same).

use std::{fs::File, io, os::unix::fs::FileExt};

use crc32fast::Hasher;

/// Bytes of a block, the unit of copy-on-write: that of the guest's file system, so that it seldom writes parts of one.
pub const BLOCK_BYTES: u64 = 4096;
/// The bitmap of such a disk takes 32 MiB if every page of it is touched.
pub const MAX_DISK_BYTES: u64 = 1 << 40;

const MAGIC: &[u8; 8] = b"DORMLAYR";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 40;
/// Where what the checksum covers begins.
const COVERED: usize = 12;
const RUN_BYTES: usize = 8;
/// As much of the table as is in memory at a time.
const PIECE_BYTES: usize = 64 * 1024;

/// Why a map file was refused.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// It could not be read.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// It does not begin as a map does.
    #[error("it is not a map of a disk layer")]
    Magic,
    /// Of another version of this program.
    #[error("its version is {0}, and this program reads version {VERSION}")]
    Version(u32),
    /// A map of blocks of another size.
    #[error("its blocks have {0} bytes instead of {BLOCK_BYTES}")]
    BlockSize(u32),
    /// A map of another disk.
    #[error("it is for a disk of {found} bytes, and this one has {expected}")]
    Disk {
        /// What the file says.
        found: u64,
        /// What the disk has.
        expected: u64,
    },
    /// It ends too early, too late, or contradicts itself.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
}

/// A set of blocks of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocks {
    /// Zeroed by the allocator: pages of it that no block falls into are never resident.
    words: Vec<u64>,
    disk_bytes: u64,
}

impl Blocks {
    /// None of a disk of this length, which is at most [`MAX_DISK_BYTES`].
    pub fn none(disk_bytes: u64) -> Self {
        debug_assert!(disk_bytes <= MAX_DISK_BYTES);
        let words = disk_bytes.div_ceil(BLOCK_BYTES).div_ceil(64);
        Self { words: vec![0; words as usize], disk_bytes }
    }

    /// How many blocks the disk has; the last may be a short one.
    pub fn end(&self) -> u64 {
        self.disk_bytes.div_ceil(BLOCK_BYTES)
    }

    /// Whether `block` is in the set. Not of a disk's end or beyond.
    pub fn contains(&self, block: u64) -> bool {
        self.words[(block / 64) as usize] >> (block % 64) & 1 == 1
    }

    /// Adds `count` blocks from `first` on, all of them of the disk.
    pub fn insert(&mut self, first: u64, count: u64) {
        debug_assert!(first + count <= self.end());
        let mut block = first;
        while block < first + count {
            let bits = (64 - block % 64).min(first + count - block);
            let mask = if bits == 64 { u64::MAX } else { ((1 << bits) - 1) << (block % 64) };
            self.words[(block / 64) as usize] |= mask;
            block += bits;
        }
    }

    /// Whether `first` is in the set, and how many blocks from there on are the same in that, up to `most` (at least 1).
    pub fn run(&self, first: u64, most: u64) -> (bool, u64) {
        let held = self.contains(first);
        let limit = (first + most).min(self.end());
        let mut block = first;
        while block < limit {
            // Ones where it differs, from `block` on.
            let word = self.words[(block / 64) as usize] ^ if held { u64::MAX } else { 0 };
            let differs = word >> (block % 64);
            if differs != 0 {
                block += u64::from(differs.trailing_zeros());
                break;
            }
            block += 64 - block % 64;
        }
        (held, block.min(limit) - first)
    }

    /// Runs of blocks in the set: first and count, ascending, apart from each other.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut block = 0;
        std::iter::from_fn(move || {
            while block < self.end() {
                let (held, count) = self.run(block, u64::MAX - block);
                let first = block;
                block += count;
                if held {
                    return Some((first, count));
                }
            }
            None
        })
    }

    /// Writes the map file, without syncing it. Answers the CRC-32 of the whole file.
    pub fn write(&self, file: &File) -> io::Result<u32> {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(MAGIC);
        header[12..16].copy_from_slice(&VERSION.to_le_bytes());
        header[16..20].copy_from_slice(&(BLOCK_BYTES as u32).to_le_bytes());
        header[24..32].copy_from_slice(&self.disk_bytes.to_le_bytes());
        header[32..40].copy_from_slice(&(self.runs().count() as u64).to_le_bytes());
        let mut covered = Hasher::new();
        covered.update(&header[COVERED..]);

        let (mut piece, mut offset) = (Vec::with_capacity(PIECE_BYTES), HEADER_BYTES as u64);
        let mut runs = self.runs().peekable();
        while let Some((first, count)) = runs.next() {
            // Fits: MAX_DISK_BYTES has 2^28 blocks.
            piece.extend_from_slice(&(first as u32).to_le_bytes());
            piece.extend_from_slice(&(count as u32).to_le_bytes());
            if piece.len() == PIECE_BYTES || runs.peek().is_none() {
                covered.update(&piece);
                file.write_all_at(&piece, offset)?;
                offset += piece.len() as u64;
                piece.clear();
            }
        }
        let crc = covered.clone().finalize();
        header[8..12].copy_from_slice(&crc.to_le_bytes());
        file.write_all_at(&header, 0)?;
        let mut whole = Hasher::new();
        whole.update(&header[..COVERED]);
        whole.combine(&covered);
        Ok(whole.finalize())
    }

    /// Reads a map file of a layer of a disk of this length.
    pub fn read(file: &File, disk_bytes: u64) -> Result<Self, MapError> {
        let mut header = [0; HEADER_BYTES];
        read_exact(file, &mut header, 0)?;
        if &header[..8] != MAGIC {
            return Err(MapError::Magic);
        }
        let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if u32_at(12) != VERSION {
            return Err(MapError::Version(u32_at(12)));
        }
        if u32_at(16) != BLOCK_BYTES as u32 {
            return Err(MapError::BlockSize(u32_at(16)));
        }
        if u64_at(24) != disk_bytes {
            return Err(MapError::Disk { found: u64_at(24), expected: disk_bytes });
        }
        if u32_at(20) != 0 {
            return Err(MapError::Damaged("a field that is not used is not zero"));
        }
        let mut blocks = Self::none(disk_bytes);
        let n_runs = u64_at(32);
        // Every second block is the most there can be; this bounds the time that a table takes.
        if n_runs > blocks.end().div_ceil(2) {
            return Err(MapError::Damaged("it has more runs than the disk has room for"));
        }
        let mut covered = Hasher::new();
        covered.update(&header[COVERED..]);
        let mut piece = vec![0; PIECE_BYTES.min(n_runs as usize * RUN_BYTES)];
        let (mut offset, table_end) = (HEADER_BYTES as u64, HEADER_BYTES as u64 + n_runs * RUN_BYTES as u64);
        let mut after = None;
        while offset < table_end {
            let len = (piece.len() as u64).min(table_end - offset) as usize;
            read_exact(file, &mut piece[..len], offset)?;
            covered.update(&piece[..len]);
            for run in piece[..len].chunks_exact(RUN_BYTES) {
                let first = u64::from(u32::from_le_bytes([run[0], run[1], run[2], run[3]]));
                let count = u64::from(u32::from_le_bytes([run[4], run[5], run[6], run[7]]));
                // Strictly after the end of the last: two runs that touch would be one.
                if count == 0 || after.is_some_and(|after| first <= after) || first + count > blocks.end() {
                    return Err(MapError::Damaged("a run is out of order or not on the disk"));
                }
                blocks.insert(first, count);
                after = Some(first + count);
            }
            offset += len as u64;
        }
        if file.read_at(&mut [0], table_end)? != 0 {
            return Err(MapError::Damaged("something follows the table"));
        }
        if covered.finalize() != u32_at(8) {
            return Err(MapError::Damaged("the checksum does not match"));
        }
        Ok(blocks)
    }
}

fn read_exact(file: &File, piece: &mut [u8], offset: u64) -> Result<(), MapError> {
    file.read_exact_at(piece, offset).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => MapError::Damaged("it ends too early"),
        _ => MapError::Io(error),
    })
}
