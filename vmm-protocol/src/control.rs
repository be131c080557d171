//! The control socket of a VMM process: what the node asks, what the process answers and says unasked.
//!
//! The socket is `SOCK_SEQPACKET` at `control` in the process's own directory; one connection at a time. A packet is one
//! JSON message, and descriptors travel with it (`SCM_RIGHTS`) in the order that the message names them. The process opens
//! nothing by name once it is jailed: every file it touches is handed to it here.
//!
//! ```text
//! start ─► Prepare ─► ready ─┬─ Boot ────► running ── Pause ─► paused ── Save{image} ─► paused ─► Quit
//!                            └─ Restore ─► paused ─── Run ──► running ── Pause ─► paused ── Save{difference} ─► Quit
//!                                                                └──────── Run ◄─────┘ (a suspend taken back)
//! ```

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::memdiff;

/// Both ends must speak the same one: node and VMM are installed together.
pub const VERSION: u32 = 1;
/// Stands for everything of the virtual machine that shows in a snapshot without being written there: addresses, interrupt
/// lines, device order, ACPI tables, which CPUID bits a guest is given. Whoever changes one of these adds one here, and
/// older snapshots are refused instead of loaded into another machine.
pub const MACHINE_LAYOUT: u32 = 1;
/// Name of the control socket in the process's own directory.
pub const CONTROL_SOCKET: &str = "control";
/// Name of the vsock muxer's socket in the process's own directory: a client says `CONNECT <port>\n`, reads
/// `OK <port>\n`, and the rest is the stream. A refused port is an end of file instead of the `OK`.
pub const VSOCK_SOCKET: &str = "vsock";
/// The vsock port that the guest agent listens on.
pub const AGENT_PORT: u32 = 1024;

/// No message is nearly as long; a longer one is refused unread.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Descriptors with one message: a disk with all its layers and maps, and what goes with a restore.
pub const MAX_DESCRIPTORS: usize = 64;

/// How guest memory is mapped from the file that comes with [`Request::Prepare`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryUse {
    /// Shared: what the guest writes is in the file. For a boot whose memory becomes an image.
    Shared,
    /// Private: the file is read only. For clones.
    Private,
}

/// What the node asks. Each is answered by one [`Reply`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Make a virtual machine of this size. Once. Descriptors: `/dev/kvm`, the memory file, and a TAP device if `net`.
    /// After the answer the process is in its jail for good.
    Prepare {
        /// [`VERSION`].
        version: u32,
        /// 1 to 16.
        vcpus: u8,
        /// Length of the memory file, in bytes; a multiple of 2 MiB.
        memory_bytes: u64,
        /// How it is mapped.
        memory: MemoryUse,
        /// Length of the disk, in bytes.
        disk_bytes: u64,
        /// Whether there is a network card.
        net: Option<NetSpec>,
    },
    /// Load a kernel and run it. Descriptors: kernel, initramfs, disk (raw, read and write).
    Boot {
        /// Kernel arguments, ASCII.
        cmdline: String,
    },
    /// Load a saved machine into this one, which must be of the same size; it is paused afterwards. Descriptors: state;
    /// memory difference if `difference`; then the disk: base (raw, read-only), for each of `sealed_layers` its data and
    /// its map, and an empty top layer (read and write); then the host ends of `streams`.
    Restore {
        /// Whether there is a memory difference.
        difference: bool,
        /// Sealed disk layers, the lowest first.
        sealed_layers: u32,
        /// Parked streams that go on: what [`Reply::Saved`] said of them. All others are reset in the guest.
        streams: Vec<ParkedStream>,
    },
    /// Let the vCPUs run.
    Run,
    /// Stop the vCPUs and the devices. Answered when nothing of the guest is in flight.
    Pause,
    /// Write out a paused machine; everything is synced when it is answered. Descriptors: state (empty, write); and, with
    /// [`SaveKind::Difference`], memory difference (empty, read and write), the image's memory file (read), map of the
    /// top disk layer (empty, write). The machine stays paused and may go on.
    Save {
        /// What of the memory and disk is written.
        kind: SaveKind,
    },
    /// Give up a [`Request::Save`] that is under way; it is answered with [`Fault::Cancelled`], or is done already.
    Cancel,
    /// Counters.
    Usage,
    /// The newest lines of the serial console.
    Console,
    /// End the process. The answer may not arrive.
    Quit,
}

impl Request {
    /// For logs and errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Prepare { .. } => "Prepare",
            Self::Boot { .. } => "Boot",
            Self::Restore { .. } => "Restore",
            Self::Run => "Run",
            Self::Pause => "Pause",
            Self::Save { .. } => "Save",
            Self::Cancel => "Cancel",
            Self::Usage => "Usage",
            Self::Console => "Console",
            Self::Quit => "Quit",
        }
    }
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Its address.
    pub mac: [u8; 6],
}

/// What [`Request::Save`] writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum SaveKind {
    /// Device state only: memory and disk are in their files already (after a boot).
    Image,
    /// Device state, memory difference, disk map.
    Difference {
        /// Copy the sealed disk layers into the top one first.
        merge_layers: bool,
    },
}

/// A stream between the host and a guest's vsock port, held still.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParkedStream {
    /// Port on the guest's side.
    pub guest_port: u32,
    /// Port on the host's side.
    pub host_port: u32,
}

/// What a save wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Length of the device state.
    pub state_bytes: u64,
    /// Its CRC-32.
    pub state_crc32: u32,
    /// The memory difference, if one was asked for.
    pub memory: Option<SavedMemory>,
    /// CRC-32 of the whole map of the top disk layer, if one was asked for.
    pub map_crc32: Option<u32>,
    /// Whether the sealed layers are not part of the chain any more.
    pub merged: bool,
    /// Streams that were open; their host ends come with the message, in this order. With more than a message can carry
    /// some are missing, but never those to the agent: they go on if the guest does, and are reset in it at a restore.
    pub streams: Vec<ParkedStream>,
    /// Time of each step, in microseconds; they add up to the whole.
    pub phases_us: Vec<(String, u64)>,
}

/// See [`memdiff::Written`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMemory {
    /// Length of the file.
    pub bytes: u64,
    /// Pages with data.
    pub data_pages: u64,
    /// Checksum of the header.
    pub header_crc32: u32,
}

impl From<memdiff::Written> for SavedMemory {
    fn from(written: memdiff::Written) -> Self {
        let memdiff::Written { bytes, data_pages, header_crc32 } = written;
        Self { bytes, data_pages, header_crc32 }
    }
}

/// Counters of one microVM; they only grow while the process lives.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// CPU time of the vCPU threads, in microseconds.
    pub vcpu_us: u64,
    /// CPU time of all other threads, in microseconds.
    pub vmm_us: u64,
    /// Memory that belongs to this process alone (`RssAnon`), in bytes.
    pub private_bytes: u64,
    /// The most that was resident at a time (`VmHWM`), in bytes.
    pub peak_resident_bytes: u64,
    /// Bytes read from the disk.
    pub block_read_bytes: u64,
    /// Bytes written to the disk.
    pub block_written_bytes: u64,
    /// Bytes that the guest sent into its network.
    pub net_sent_bytes: u64,
    /// Bytes that came to the guest out of its network.
    pub net_received_bytes: u64,
    /// Bytes from the guest over vsock.
    pub stream_sent_bytes: u64,
    /// Bytes to the guest over vsock.
    pub stream_received_bytes: u64,
    /// Exits of the vCPUs to this process.
    pub exits: u64,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done. For a restore: time of each step, in microseconds.
    Done {
        /// May be empty.
        phases_us: Vec<(String, u64)>,
    },
    /// See [`Request::Save`].
    Saved(Saved),
    /// See [`Request::Usage`].
    Usage(Usage),
    /// See [`Request::Console`].
    Console {
        /// Not trusted: whatever the guest wrote, as text.
        text: String,
    },
    /// Not done.
    Failed {
        /// Whose fault it is.
        fault: Fault,
        /// A sentence.
        why: String,
    },
}

/// Whose fault a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// The request does not fit the state of the process, or is malformed.
    Request,
    /// A file of the snapshot is not what it should be. Nothing of it was run.
    Snapshot,
    /// The host cannot do it.
    Host,
    /// [`Request::Cancel`].
    Cancelled,
}

/// What the process says unasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The guest will not run any more. The process waits for [`Request::Quit`].
    GuestStopped {
        /// For people: shut down, reset, or what KVM could not do, with RIP and instruction bytes where known.
        how: String,
    },
}

/// A packet to the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToVmm {
    /// Comes back with the answer.
    pub id: u64,
    /// What is asked.
    pub request: Request,
}

/// A packet from the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromVmm {
    /// Answers a request.
    Reply {
        /// Of the request.
        id: u64,
        /// The answer.
        reply: Reply,
    },
    /// Was not asked for.
    Event(Event),
}

/// Why a packet was not taken.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The other side has closed.
    #[error("the control connection is closed")]
    Closed,
    /// The socket failed; `WouldBlock` on a socket that does not wait.
    #[error("the control connection failed")]
    Io(#[from] io::Error),
    /// It is no message of ours.
    #[error("a control message was not understood: {0}")]
    Malformed(String),
}

/// Sends one packet.
pub fn send<M: Serialize>(socket: impl AsFd, message: &M, descriptors: &[BorrowedFd<'_>]) -> Result<(), PacketError> {
    let bytes = serde_json::to_vec(message).map_err(|error| PacketError::Malformed(error.to_string()))?;
    if bytes.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
        return Err(PacketError::Malformed("it is too long".to_owned()));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        let pushed = ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        debug_assert!(pushed, "the space is for as many as were counted above");
    }
    // A packet goes whole or not at all.
    rustix::io::retry_on_intr(|| sendmsg(&socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)).map_err(io::Error::from)?;
    Ok(())
}

/// Receives one packet with its descriptors, which are close-on-exec.
pub fn receive<M: DeserializeOwned>(socket: impl AsFd) -> Result<(M, Vec<OwnedFd>), PacketError> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC))
        .map_err(io::Error::from)?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Err(PacketError::Closed);
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(PacketError::Malformed("it is too long".to_owned()));
    }
    let message = serde_json::from_slice(&bytes[..received.bytes]).map_err(|error| PacketError::Malformed(error.to_string()))?;
    Ok((message, descriptors))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
    };

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn a_message_arrives_with_its_descriptors_in_order() {
        let (ours, theirs) = pair();
        let dir = tempfile::tempdir().unwrap();
        let files: Vec<File> = (0..MAX_DESCRIPTORS)
            .map(|index| {
                let path = dir.path().join(index.to_string());
                File::create(&path).unwrap().write_all(index.to_string().as_bytes()).unwrap();
                File::open(path).unwrap()
            })
            .collect();
        let sent = ToVmm { id: 7, request: Request::Restore { difference: true, sealed_layers: 30, streams: Vec::new() } };
        send(&ours, &sent, &files.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
        let (received, descriptors) = receive::<ToVmm>(&theirs).unwrap();
        assert_eq!((received, descriptors.len()), (sent, MAX_DESCRIPTORS));
        for (index, descriptor) in descriptors.into_iter().enumerate() {
            let mut text = String::new();
            File::from(descriptor).read_to_string(&mut text).unwrap();
            assert_eq!(text, index.to_string());
        }
    }

    #[test]
    fn what_is_no_message_is_refused_and_the_next_is_heard() {
        let (ours, theirs) = pair();
        for packet in [&b"{"[..], b"[]", b"{\"id\":1,\"request\":\"jump\"}", &[b' '; MAX_MESSAGE + 1]] {
            rustix::net::send(&ours, packet, SendFlags::empty()).unwrap();
            assert!(matches!(receive::<ToVmm>(&theirs), Err(PacketError::Malformed(_))));
        }
        send(&ours, &ToVmm { id: 1, request: Request::Run }, &[]).unwrap();
        assert_eq!(receive::<ToVmm>(&theirs).unwrap().0.request, Request::Run);
        drop(ours);
        assert!(matches!(receive::<ToVmm>(&theirs), Err(PacketError::Closed)));
    }
}
