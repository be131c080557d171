//! One request of the block driver (virtio 1.2 §5.2.6): from a checked chain to its status byte.
//!
//! Owns: the meaning of header, data and status. Never believes a length or sector before it is compared with the disk.
//! A request may be abandoned between two pieces of its data, since each may be carried out again from the beginning: the
//! driver leaves the buffers alone until it is completed.

use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{
    Counters,
    layers::{Disk, SECTOR_BYTES},
};
use crate::{
    chain::{Broken, Chain},
    device::Memory,
};

/// Data goes through a buffer of this size: one copy more, and no pointer into guest memory is ever given to the host.
pub const PIECE_BYTES: usize = 256 * 1024;
/// Ranges in one discard or write-zeroes request.
pub const MAX_RANGES: u32 = 32;
/// Sectors of one range to discard. 1 GiB; takes only bits and one call to the host.
pub const MAX_DISCARD_SECTORS: u32 = (1 << 30) / SECTOR_BYTES as u32;
/// Sectors of one range to fill with zeros, which the host may have to write. 32 MiB.
pub const MAX_ZERO_SECTORS: u32 = (32 << 20) / SECTOR_BYTES as u32;

const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;
/// A read of the device's name takes this much (§5.2.6).
const ID_BYTES: usize = 20;
/// What the name is. All disks have it: the guest learns nothing of the host by it.
const ID: &[u8] = b"dormouse";

/// What has become of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The status is in its place; so many bytes of the writable buffers count.
    Done(u32),
    /// Stopped because `hold` was set; as if it had not begun.
    Abandoned,
}

/// Why it ends without success.
enum Failure {
    Status(u32),
    Abandoned,
    Broken(Broken),
}

impl From<Broken> for Failure {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        tracing::warn!(%error, "the host could not carry out a request of the guest's disk");
        Self::Status(VIRTIO_BLK_S_IOERR)
    }
}

const IO_ERROR: Failure = Failure::Status(VIRTIO_BLK_S_IOERR);

/// Where one request works.
pub(super) struct Context<'a> {
    pub(super) memory: &'a Memory,
    pub(super) disk: &'a mut Disk,
    /// [`PIECE_BYTES`] long.
    pub(super) buffer: &'a mut [u8],
    pub(super) counters: &'a Counters,
    /// Set by who wants the device to stand still.
    pub(super) hold: &'a AtomicBool,
}

impl Context<'_> {
    /// Carries out the request in `chain`.
    pub(super) fn execute(&mut self, chain: &Chain) -> Result<Outcome, Broken> {
        // The last writable byte is the status; without it the driver could not be answered at all.
        let status_at = chain.writable.len().checked_sub(1).ok_or(Broken::Layout)?;
        let mut header = [0; HEADER_BYTES as usize];
        if chain.readable.read(self.memory, 0, &mut header)? != header.len() {
            return Err(Broken::Layout);
        }
        let kind = u32_at(&header, 0);
        let sector = u64::from(u32_at(&header, 8)) | u64::from(u32_at(&header, 12)) << 32;
        let result = match kind {
            VIRTIO_BLK_T_IN => self.read(chain, sector, status_at),
            VIRTIO_BLK_T_OUT => self.write(chain, sector),
            VIRTIO_BLK_T_FLUSH => self.flush(),
            VIRTIO_BLK_T_GET_ID => self.identify(chain, status_at),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => self.clear(chain, kind == VIRTIO_BLK_T_DISCARD),
            _ => Err(Failure::Status(VIRTIO_BLK_S_UNSUPP)),
        };
        let (status, data) = match result {
            Ok(data) => (VIRTIO_BLK_S_OK, data),
            Err(Failure::Status(status)) => (status, 0),
            Err(Failure::Abandoned) => return Ok(Outcome::Abandoned),
            Err(Failure::Broken(broken)) => return Err(broken),
        };
        chain.writable.write(self.memory, status_at, &[status as u8])?;
        // Only bytes from the first writable one on may be counted (§2.7.8.2): on an error the status is not among them.
        Ok(Outcome::Done(u32::try_from(if status == VIRTIO_BLK_S_OK { data + 1 } else { 0 }).unwrap_or(u32::MAX)))
    }

    fn held(&self) -> Result<(), Failure> {
        if self.hold.load(Ordering::Relaxed) { Err(Failure::Abandoned) } else { Ok(()) }
    }

    /// Where on the disk `len` bytes from `sector` on are.
    fn place(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR_BYTES).filter(|offset| offset.checked_add(len).is_some_and(|end| end <= self.disk.bytes()));
        match offset {
            Some(offset) if len.is_multiple_of(SECTOR_BYTES) => Ok(offset),
            _ => Err(IO_ERROR),
        }
    }

    fn read(&mut self, chain: &Chain, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = self.place(sector, len)?;
        let mut done = 0;
        while done < len {
            self.held()?;
            let piece = &mut self.buffer[..(len - done).min(PIECE_BYTES as u64) as usize];
            self.disk.read(offset + done, piece)?;
            chain.writable.write(self.memory, done, piece)?;
            done += piece.len() as u64;
        }
        self.counters.read_bytes.fetch_add(len, Ordering::Relaxed);
        Ok(len)
    }

    fn write(&mut self, chain: &Chain, sector: u64) -> Result<u64, Failure> {
        let len = chain.readable.len() - HEADER_BYTES;
        let offset = self.place(sector, len)?;
        let mut done = 0;
        while done < len {
            self.held()?;
            let piece = &mut self.buffer[..(len - done).min(PIECE_BYTES as u64) as usize];
            chain.readable.read(self.memory, HEADER_BYTES + done, piece)?;
            self.disk.write(offset + done, piece)?;
            done += piece.len() as u64;
        }
        self.counters.written_bytes.fetch_add(len, Ordering::Relaxed);
        Ok(0)
    }

    fn flush(&mut self) -> Result<u64, Failure> {
        self.disk.flush()?;
        self.counters.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(0)
    }

    fn identify(&mut self, chain: &Chain, room: u64) -> Result<u64, Failure> {
        let mut id = [0; ID_BYTES];
        id[..ID.len()].copy_from_slice(ID);
        let len = room.min(ID_BYTES as u64);
        chain.writable.write(self.memory, 0, &id[..len as usize])?;
        Ok(len)
    }

    /// Discard or write zeroes: the data are ranges.
    fn clear(&mut self, chain: &Chain, discard: bool) -> Result<u64, Failure> {
        let len = chain.readable.len() - HEADER_BYTES;
        if len == 0 || !len.is_multiple_of(RANGE_BYTES) || len > u64::from(MAX_RANGES) * RANGE_BYTES {
            return Err(IO_ERROR);
        }
        let max_sectors = if discard { MAX_DISCARD_SECTORS } else { MAX_ZERO_SECTORS };
        let known_flags = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        for at in (0..len).step_by(RANGE_BYTES as usize) {
            self.held()?;
            let mut range = [0; RANGE_BYTES as usize];
            chain.readable.read(self.memory, HEADER_BYTES + at, &mut range)?;
            let sector = u64::from(u32_at(&range, 0)) | u64::from(u32_at(&range, 4)) << 32;
            let (sectors, flags) = (u32_at(&range, 8), u32_at(&range, 12));
            // §5.2.6.2: bits that are not known, and unmap in a discard, are not supported.
            if flags & !known_flags != 0 {
                return Err(Failure::Status(VIRTIO_BLK_S_UNSUPP));
            }
            if sectors > max_sectors {
                return Err(IO_ERROR);
            }
            let bytes = u64::from(sectors) * SECTOR_BYTES;
            let offset = self.place(sector, bytes)?;
            if discard {
                self.disk.discard(offset, bytes)?;
            } else if flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                self.disk.zero(offset, bytes)?;
            } else {
                self.write_zeros(offset, bytes)?;
            }
        }
        Ok(0)
    }

    /// Without unmap the driver wants the room to stay its own, so the zeros are written.
    fn write_zeros(&mut self, offset: u64, bytes: u64) -> Result<(), Failure> {
        self.buffer.fill(0);
        let mut done = 0;
        while done < bytes {
            self.held()?;
            let piece = &self.buffer[..(bytes - done).min(PIECE_BYTES as u64) as usize];
            self.disk.write(offset + done, piece)?;
            done += piece.len() as u64;
        }
        self.counters.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
