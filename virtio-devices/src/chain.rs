//! Descriptor chains, taken apart before anything of them is used (virtio 1.2 §2.7).
//!
//! Owns: the walk from a head to its buffers with every rule checked, and the steps at the end of a request. Never trusts
//! the ring: an index, length or address that breaks a rule ends in [`Broken`], and the device then stops using the queue.
//! The driver may change a descriptor while it is read, so each is read once and only the copy is used.

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueOwnedT, QueueT, desc::split::Descriptor};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::device::{Interrupt, Memory};

/// Buffers of one chain at most. A chain may not be longer than its queue (§2.7.5.3.1), but Linux minds that only for
/// chains without an indirect table. The table of a well-behaved driver for our queues of 256 has 256 + 2 entries at most.
pub const MAX_BUFFERS: usize = 1024;

/// The driver broke a rule of the ring. Nothing more of the queue is used until the device is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// More heads are available than the queue has places.
    #[error("more chains are available than the queue holds")]
    AvailableIndex,
    /// A head, or the link of a descriptor, that is not in its table.
    #[error("a descriptor is not in its table")]
    Index,
    /// Longer than [`MAX_BUFFERS`] or its table, which a loop is too.
    #[error("a chain is too long, or a loop")]
    TooLong,
    /// A table within a table, of a size that is no table's, or used but not negotiated in that way.
    #[error("an indirect table is malformed")]
    Indirect,
    /// A buffer that the device reads after one that it writes.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// A buffer or a table that is not wholly in guest memory.
    #[error("a buffer is not in guest memory")]
    Address,
    /// The buffers are not what the device type prescribes.
    #[error("a request has not the buffers that it must have")]
    Layout,
}

/// A part of guest memory that was checked to exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Where it begins.
    pub address: GuestAddress,
    /// Length in bytes, not 0.
    pub len: u32,
}

/// The buffers of one request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    /// Goes back to the driver in the used ring.
    pub head: u16,
    /// For the device to read.
    pub readable: Buffers,
    /// For the device to write.
    pub writable: Buffers,
}

/// A sequence of buffers, read or written as if it were one. Drivers may cut a request into buffers as they like (§2.7.4).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Buffers {
    parts: Vec<Buffer>,
    len: u64,
}

impl Buffers {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffers one by one.
    pub fn parts(&self) -> &[Buffer] {
        &self.parts
    }

    fn push(&mut self, buffer: Buffer) {
        self.len += u64::from(buffer.len);
        self.parts.push(buffer);
    }

    /// Calls `each` with address and range of `data` for what is `offset` bytes after the beginning, up to `wanted` bytes.
    fn within(&self, offset: u64, wanted: usize, mut each: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), Broken>) -> Result<usize, Broken> {
        let (mut skip, mut done) = (offset, 0);
        for part in &self.parts {
            let part_len = u64::from(part.len);
            if skip >= part_len {
                skip -= part_len;
                continue;
            }
            if done == wanted {
                break;
            }
            let take = usize::try_from(part_len - skip).unwrap_or(usize::MAX).min(wanted - done);
            // Cannot overflow: the whole buffer was checked to be in guest memory.
            each(GuestAddress(part.address.0 + skip), done..done + take)?;
            done += take;
            skip = 0;
        }
        Ok(done)
    }

    /// Fills `data` with what is `offset` bytes after the beginning; answers how much there was.
    pub fn read(&self, memory: &Memory, offset: u64, data: &mut [u8]) -> Result<usize, Broken> {
        let wanted = data.len();
        self.within(offset, wanted, |address, range| memory.read_slice(&mut data[range], address).map_err(|_| Broken::Address))
    }

    /// Writes `data` at `offset` bytes after the beginning; answers how much there was room for.
    pub fn write(&self, memory: &Memory, offset: u64, data: &[u8]) -> Result<usize, Broken> {
        self.within(offset, data.len(), |address, range| memory.write_slice(&data[range], address).map_err(|_| Broken::Address))
    }
}

/// The next request of a queue, if there is one. After an error the queue is where it was before.
pub fn next(queue: &mut Queue, memory: &Memory) -> Result<Option<Chain>, Broken> {
    if !queue.ready() {
        return Ok(None);
    }
    let head = {
        let mut heads = queue.iter(memory.as_ref()).map_err(|_| Broken::AvailableIndex)?;
        match heads.next() {
            Some(chain) => chain.head_index(),
            None => return Ok(None),
        }
    };
    walk(queue, memory, head).map(Some).inspect_err(|_| queue.go_to_previous_position())
}

/// Gives a request back to the queue, as if it had not been taken. Only the one taken last, and before it is completed.
pub fn put_back(queue: &mut Queue) {
    queue.go_to_previous_position();
}

fn walk(queue: &Queue, memory: &Memory, head: u16) -> Result<Chain, Broken> {
    let mut chain = Chain { head, ..Chain::default() };
    let (mut table, mut entries) = (GuestAddress(queue.desc_table()), u32::from(queue.size()));
    let mut indirect = false;
    let mut index = u32::from(head);
    // Each turn reads one descriptor; a walk that visits more than its table has comes by one of them twice. A table of the
    // largest length would still be walked for seconds, hence the ceiling.
    let most = |entries: u32| entries.min(MAX_BUFFERS as u32);
    let mut left = most(entries);
    loop {
        if index >= entries {
            return Err(Broken::Index);
        }
        let Some(fewer) = left.checked_sub(1) else { return Err(Broken::TooLong) };
        left = fewer;
        // Cannot overflow: both tables were checked to be in guest memory.
        let place = GuestAddress(table.0 + u64::from(index) * DESCRIPTOR_BYTES);
        let descriptor: Descriptor = memory.read_obj(place).map_err(|_| Broken::Address)?;
        let (flags, address, len) = (u32::from(descriptor.flags()), descriptor.addr(), descriptor.len());
        if flags & VRING_DESC_F_INDIRECT != 0 {
            // §2.7.5.3: not inside a table, and it is the last of its chain. WRITE means nothing here.
            if indirect || flags & VRING_DESC_F_NEXT != 0 || len == 0 || !u64::from(len).is_multiple_of(DESCRIPTOR_BYTES) {
                return Err(Broken::Indirect);
            }
            check(memory, address, len, Permissions::Read)?;
            indirect = true;
            (table, entries, index) = (address, len / DESCRIPTOR_BYTES as u32, 0);
            left = most(entries);
            continue;
        }
        let writable = flags & VRING_DESC_F_WRITE != 0;
        if !writable && !chain.writable.parts.is_empty() {
            return Err(Broken::Order);
        }
        if len != 0 {
            check(memory, address, len, if writable { Permissions::Write } else { Permissions::Read })?;
            let side = if writable { &mut chain.writable } else { &mut chain.readable };
            side.push(Buffer { address, len });
        }
        if flags & VRING_DESC_F_NEXT == 0 {
            return Ok(chain);
        }
        index = u32::from(descriptor.next());
    }
}

const DESCRIPTOR_BYTES: u64 = 16;

fn check(memory: &Memory, address: GuestAddress, len: u32, access: Permissions) -> Result<(), Broken> {
    let fits = address.0.checked_add(u64::from(len)).is_some() && memory.check_range(address, len as usize, access);
    fits.then_some(()).ok_or(Broken::Address)
}

/// Gives a request back to the driver with `written` bytes in its writable buffers.
pub fn complete(queue: &mut Queue, memory: &Memory, head: u16, written: u32) -> Result<(), Broken> {
    queue.add_used(memory.as_ref(), head, written).map_err(|_| Broken::Address)
}

/// Interrupts the driver if it wants to hear of what was completed since the last time.
pub fn notify(queue: &mut Queue, memory: &Memory, interrupt: &Interrupt) -> Result<(), Broken> {
    if queue.needs_notification(memory.as_ref()).map_err(|_| Broken::Address)? {
        interrupt.used();
    }
    Ok(())
}

/// The queue as it is now, for a device that is paused.
pub fn copy(queue: &Queue) -> Queue {
    Queue::try_from(queue.state()).expect("a queue holds nothing that a queue would refuse")
}

/// Asks the driver for kicks again. `true`: something has come meanwhile, and may not be kicked for.
pub fn listen(queue: &mut Queue, memory: &Memory) -> Result<bool, Broken> {
    if !queue.ready() {
        return Ok(false);
    }
    queue.enable_notification(memory.as_ref()).map_err(|_| Broken::Address)
}

/// Tells the driver that it need not kick for now. A hint.
pub fn ignore(queue: &mut Queue, memory: &Memory) -> Result<(), Broken> {
    if !queue.ready() {
        return Ok(());
    }
    queue.disable_notification(memory.as_ref()).map_err(|_| Broken::Address)
}
