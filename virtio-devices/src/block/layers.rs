//! The disk behind the block device: a raw file, or a raw base with copy-on-write layers over it.
//!
//! ```text
//! top      writable   what this microVM wrote since its last restore
//! sealed   read-only  what it wrote before, the newest above
//! base     read-only  the image's disk, shared by all its clones
//! ```
//! A layer is a sparse file with the offsets of the disk and the set of blocks that it holds ([`Blocks`]); the topmost layer
//! that holds a block has its content, and a hole in a held block is zeros (so a discarded block needs no mark of its own).
//!
//! Owns: the files and who holds what. Never writes below the top, never opens a file by name. A block is added to the top's
//! set only after all of its bytes are in the file, so a write that fails halfway leaves the old content.

use std::{fs::File, io, os::unix::fs::FileExt};

use rustix::fs::FallocateFlags;

use super::map::{BLOCK_BYTES, Blocks, MAX_DISK_BYTES, MapError};

/// Sectors are the unit of the device (virtio 1.2 §5.2), whatever the block size.
pub const SECTOR_BYTES: u64 = 512;
/// As much as a merge copies between two looks at whether it shall stop.
const MERGE_BYTES: u64 = 256 * 1024;

/// Why files are no disk. `Display` is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The length is none that a disk can have.
    #[error("a disk of {0} bytes is not possible: it must be a multiple of {SECTOR_BYTES}, not 0, and at most {MAX_DISK_BYTES}")]
    Length(u64),
    /// A file is not as long as the disk.
    #[error("the {file} has {found} bytes instead of the disk's {expected}")]
    FileLength {
        /// Which file.
        file: String,
        /// Its length.
        found: u64,
        /// That of the disk.
        expected: u64,
    },
    /// The map of a sealed layer was refused.
    #[error("the map of sealed disk layer {layer} cannot be used: {source}")]
    Map {
        /// Which layer, the lowest is 0.
        layer: usize,
        /// What is wrong with it.
        source: MapError,
    },
    /// A file could not be looked at or prepared.
    #[error("the {file} cannot be used: {source}")]
    Io {
        /// Which file.
        file: String,
        /// What the host said.
        source: io::Error,
    },
    /// The disk is not the one that the device was prepared for.
    #[error("the disk has {found} bytes, and the device was prepared for {expected}")]
    Other {
        /// Length of the disk.
        found: u64,
        /// Capacity that the guest is told.
        expected: u64,
    },
}

/// How a merge ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merged {
    /// The sealed layers are not part of the disk any more.
    Wholly,
    /// It was told to stop. The disk is as before, only part of it is in the top now as well.
    Cancelled,
}

#[derive(Debug)]
struct Layer {
    data: File,
    blocks: Blocks,
}

#[derive(Debug)]
enum Backing {
    Raw(File),
    Layered {
        base: File,
        /// The lowest first.
        sealed: Vec<Layer>,
        top: Layer,
    },
}

/// A disk of a fixed length.
#[derive(Debug)]
pub struct Disk {
    bytes: u64,
    backing: Backing,
}

impl Disk {
    /// A raw file that is read and written in place, for a boot whose disk becomes an image.
    pub fn raw(file: File) -> Result<Self, DiskError> {
        let bytes = length(&file, "disk")?;
        check_length(bytes)?;
        Ok(Self { bytes, backing: Backing::Raw(file) })
    }

    /// Layers over a raw base that is never written. `sealed` are data and map of each sealed layer, the lowest first. `top`
    /// may hold anything: nothing of it is seen before it is written here.
    pub fn layered(base: File, sealed: Vec<(File, File)>, top: File) -> Result<Self, DiskError> {
        let bytes = length(&base, "disk base")?;
        check_length(bytes)?;
        let mut layers = Vec::with_capacity(sealed.len());
        for (layer, (data, map)) in sealed.into_iter().enumerate() {
            let file = || format!("data of sealed disk layer {layer}");
            let found = length(&data, &file())?;
            if found != bytes {
                return Err(DiskError::FileLength { file: file(), found, expected: bytes });
            }
            let blocks = Blocks::read(&map, bytes).map_err(|source| DiskError::Map { layer, source })?;
            layers.push(Layer { data, blocks });
        }
        // Reads of held blocks must not end early, and a sealed layer has the length of the disk.
        top.set_len(bytes).map_err(|source| DiskError::Io { file: "top disk layer".to_owned(), source })?;
        let top = Layer { data: top, blocks: Blocks::none(bytes) };
        Ok(Self { bytes, backing: Backing::Layered { base, sealed: layers, top } })
    }

    /// Length in bytes, a multiple of [`SECTOR_BYTES`].
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many sealed layers there are; 0 after a merge and for a raw disk.
    pub fn sealed_layers(&self) -> usize {
        match &self.backing {
            Backing::Raw(_) => 0,
            Backing::Layered { sealed, .. } => sealed.len(),
        }
    }

    /// Bytes in the top layer's blocks, holes included; 0 for a raw disk.
    pub fn top_bytes(&self) -> u64 {
        match &self.backing {
            Backing::Raw(_) => 0,
            Backing::Layered { top, .. } => top.blocks.runs().map(|(_, count)| count * BLOCK_BYTES).sum(),
        }
    }

    /// Fills `data` from `offset` on; all of it must be on the disk.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.check(offset, data.len() as u64)?;
        match &self.backing {
            Backing::Raw(file) => file.read_exact_at(data, offset),
            Backing::Layered { base, sealed, top } => {
                let mut done = 0;
                while done < data.len() {
                    let at = offset + done as u64;
                    let block = at / BLOCK_BYTES;
                    let most = (offset + data.len() as u64).div_ceil(BLOCK_BYTES) - block;
                    let (layer, count) = holder(std::iter::once(top).chain(sealed.iter().rev()), block, most);
                    let end = ((block + count) * BLOCK_BYTES - offset).min(data.len() as u64) as usize;
                    layer.map_or(base, |layer| &layer.data).read_exact_at(&mut data[done..end], at)?;
                    done = end;
                }
                Ok(())
            }
        }
    }

    /// Writes `data` at `offset`; all of it must be on the disk.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(offset, data.len() as u64)?;
        if let Backing::Raw(file) = &self.backing {
            return file.write_all_at(data, offset);
        }
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let rest = &data[done..];
            let whole = self.whole_blocks(at, rest.len() as u64);
            if whole != 0 {
                self.top()?.data.write_all_at(&rest[..whole as usize], at)?;
                self.top()?.blocks.insert(at / BLOCK_BYTES, whole.div_ceil(BLOCK_BYTES));
                done += whole as usize;
            } else {
                let part = (BLOCK_BYTES - at % BLOCK_BYTES).min(rest.len() as u64) as usize;
                self.write_part(at, &rest[..part])?;
                done += part;
            }
        }
        Ok(())
    }

    /// Makes a range of the disk zeros without writing them where the host can do that.
    pub fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        if let Backing::Raw(file) = &self.backing {
            return punch(file, offset, len);
        }
        let mut at = offset;
        while at < offset + len {
            let rest = offset + len - at;
            let whole = self.whole_blocks(at, rest);
            if whole != 0 {
                punch(&self.top()?.data, at, whole)?;
                self.top()?.blocks.insert(at / BLOCK_BYTES, whole.div_ceil(BLOCK_BYTES));
                at += whole;
            } else {
                let part = (BLOCK_BYTES - at % BLOCK_BYTES).min(rest);
                self.write_part(at, &[0; BLOCK_BYTES as usize][..part as usize])?;
                at += part;
            }
        }
        Ok(())
    }

    /// The driver does not need this range any more. What it reads afterwards is not defined, so the parts of blocks at both
    /// ends stay as they are.
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        let first = offset.next_multiple_of(BLOCK_BYTES);
        let end = if offset + len == self.bytes { self.bytes } else { (offset + len) / BLOCK_BYTES * BLOCK_BYTES };
        if first < end { self.zero(first, end - first) } else { Ok(()) }
    }

    /// The driver's flush: what was written before must not be lost when what is written later is kept.
    ///
    /// A raw disk becomes an image's, whose guest may have told its own clients that something is durable: it is synced.
    /// Layers are not. Their content means nothing without the memory of the same moment, and both become durable together,
    /// at [`Disk::seal`]; if the host dies before, the microVM is the one of the last seal, in which nothing later had
    /// happened. Within a seal order does not matter, and writes are carried out in the order in which they came.
    pub fn flush(&self) -> io::Result<()> {
        match &self.backing {
            Backing::Raw(file) => file.sync_data(),
            Backing::Layered { .. } => Ok(()),
        }
    }

    /// Makes the disk durable as it is: syncs a raw disk; or writes the map of the top layer to `map`, an empty file, and syncs
    /// that and the top layer. Answers the CRC-32 of the map file, if one was written. The disk stays usable; what is written
    /// to it afterwards is not part of what was sealed, and its map is then worth nothing.
    pub fn seal(&self, map: Option<&File>) -> io::Result<Option<u32>> {
        match (&self.backing, map) {
            (Backing::Raw(file), None) => file.sync_all().map(|()| None),
            (Backing::Layered { top, .. }, Some(map)) => {
                let crc = top.blocks.write(map)?;
                map.sync_all()?;
                top.data.sync_all()?;
                Ok(Some(crc))
            }
            (Backing::Raw(_), Some(_)) => Err(io::Error::other("a raw disk has no layer to seal")),
            (Backing::Layered { .. }, None) => Err(io::Error::other("a map file is needed to seal a disk layer")),
        }
    }

    /// Copies what the sealed layers hold, and the top does not hide, into the top, and drops the sealed layers. Looks at
    /// `cancelled` after each piece. On an error the disk is as before, as it is when cancelled.
    pub fn merge(&mut self, cancelled: &mut dyn FnMut() -> bool) -> io::Result<Merged> {
        let Backing::Layered { sealed, top, .. } = &mut self.backing else { return Ok(Merged::Wholly) };
        let mut buffer = Vec::new();
        let mut block = 0;
        while block < top.blocks.end() {
            let (hidden, count) = top.blocks.run(block, top.blocks.end() - block);
            let (layer, count) = if hidden { (None, count) } else { holder(sealed.iter().rev(), block, count) };
            let Some(layer) = layer else {
                block += count;
                continue;
            };
            if cancelled() {
                return Ok(Merged::Cancelled);
            }
            let count = count.min(MERGE_BYTES / BLOCK_BYTES);
            let offset = block * BLOCK_BYTES;
            buffer.resize((count * BLOCK_BYTES).min(self.bytes - offset) as usize, 0);
            layer.data.read_exact_at(&mut buffer, offset)?;
            write_sparsely(&top.data, &buffer, offset)?;
            top.blocks.insert(block, count);
            block += count;
        }
        sealed.clear();
        Ok(Merged::Wholly)
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.bytes) {
            Ok(())
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "the range is not on the disk"))
        }
    }

    /// How much of a range, from its beginning, is whole blocks. The last block of the disk is whole even if it is short.
    fn whole_blocks(&self, at: u64, len: u64) -> u64 {
        if !at.is_multiple_of(BLOCK_BYTES) {
            0
        } else if at + len == self.bytes {
            len
        } else {
            len / BLOCK_BYTES * BLOCK_BYTES
        }
    }

    /// Writes into one block. If the top does not hold it yet, its other bytes come up from below.
    fn write_part(&mut self, at: u64, data: &[u8]) -> io::Result<()> {
        let block = at / BLOCK_BYTES;
        if self.top()?.blocks.contains(block) {
            return self.top()?.data.write_all_at(data, at);
        }
        let start = block * BLOCK_BYTES;
        let mut whole = [0; BLOCK_BYTES as usize];
        let whole = &mut whole[..BLOCK_BYTES.min(self.bytes - start) as usize];
        self.read(start, whole)?;
        whole[(at - start) as usize..][..data.len()].copy_from_slice(data);
        self.top()?.data.write_all_at(whole, start)?;
        self.top()?.blocks.insert(block, 1);
        Ok(())
    }

    fn top(&mut self) -> io::Result<&mut Layer> {
        match &mut self.backing {
            Backing::Layered { top, .. } => Ok(top),
            Backing::Raw(_) => Err(io::Error::other("a raw disk has no layers")),
        }
    }
}

/// The first of `layers` (the topmost first) that holds `block`, and for how many blocks, up to `most`, that is so. `None`:
/// none of them does.
fn holder<'a>(layers: impl Iterator<Item = &'a Layer>, block: u64, most: u64) -> (Option<&'a Layer>, u64) {
    let mut count = most;
    for layer in layers {
        let (held, same) = layer.blocks.run(block, count);
        count = same;
        if held {
            return (Some(layer), count);
        }
    }
    (None, count)
}

fn length(file: &File, name: &str) -> Result<u64, DiskError> {
    Ok(file.metadata().map_err(|source| DiskError::Io { file: name.to_owned(), source })?.len())
}

fn check_length(bytes: u64) -> Result<(), DiskError> {
    if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) || bytes > MAX_DISK_BYTES { Err(DiskError::Length(bytes)) } else { Ok(()) }
}

/// Makes a range zeros and gives its room back. On a file system without holes the zeros are written.
fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP) => {
            let zeros = [0; BLOCK_BYTES as usize];
            let mut at = offset;
            while at < offset + len {
                let part = (offset + len - at).min(BLOCK_BYTES);
                file.write_all_at(&zeros[..part as usize], at)?;
                at += part;
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Writes whole blocks, leaving holes where they are zeros.
fn write_sparsely(file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    let is_zero = |block: &&[u8]| block.iter().all(|&byte| byte == 0);
    let mut at = offset;
    for run in data.chunks(BLOCK_BYTES as usize).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let len: usize = run.iter().map(|block| block.len()).sum();
        let start = (at - offset) as usize;
        if run.first().is_some_and(is_zero) {
            punch(file, at, len as u64)?;
        } else {
            file.write_all_at(&data[start..start + len], at)?;
        }
        at += len as u64;
    }
    Ok(())
}
