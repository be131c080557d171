//! From messages with descriptors to what the machine takes, and back.
//!
//! Owns: what can be checked of a request before the machine is touched, so that a refusal changes nothing. Descriptors are
//! counted already ([`super::order::admit`]); a missing one here is answered all the same.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    time::Instant,
};

use rustix::fs::{FileType, fstat};
use vmm_protocol::control::{AGENT_PORT, Fault, MAX_DESCRIPTORS, MemoryUse, NetSpec, Reply, Request, SaveKind, Saved, VERSION};

use super::Parts;
use crate::machine::{Boot, Machine, MachineError, Phases, Restore, SaveParts, SavedMachine, SealedLayer, Shell};

/// Why a second `Prepare` is refused.
pub const ONCE: &str = "a process makes one machine in its life";

const MIB: u64 = 1 << 20;
/// Far more than the hosts that this runs on have; keeps sums of addresses from overflowing.
const MAX_MEMORY: u64 = 1 << 40;
/// As [`MAX_MEMORY`].
const MAX_DISK: u64 = 1 << 46;
/// A kernel's own limit (`COMMAND_LINE_SIZE`), with room for what the machine adds.
const MAX_CMDLINE: usize = 1900;
const PAGE: u64 = 4096;
/// Streams of one save: what fits beside the other descriptors of the restore to come. One message is enough: the node goes
/// on with one stream, the agent's; what a client opened beside it is reset in the guest, as after a restart of the node.
const MAX_STREAMS: usize = MAX_DESCRIPTORS - 4;

fn refuse(why: impl Into<String>) -> MachineError {
    MachineError { fault: Fault::Request, why: why.into() }
}

/// An error of the host.
pub fn host(doing: &str, error: &io::Error) -> MachineError {
    MachineError { fault: Fault::Host, why: format!("{doing} failed: {error}") }
}

/// Time since then.
pub fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// The usual answer.
pub fn done(phases: Phases) -> Reply {
    Reply::Done { phases_us: phases }
}

/// What a request brings for a machine that is to be made.
#[derive(Debug)]
pub struct Bare {
    kvm: OwnedFd,
    memory: File,
    memory_bytes: u64,
    memory_use: MemoryUse,
    vcpus: u8,
    disk_bytes: u64,
    net: Option<(NetSpec, OwnedFd)>,
}

impl Bare {
    /// Together with what the process has.
    pub fn with(self, parts: Parts) -> Shell {
        let Self { kvm, memory, memory_bytes, memory_use, vcpus, disk_bytes, net } = self;
        let Parts { vsock, process_files, confine } = parts;
        Shell { kvm, memory, memory_bytes, memory_use, vcpus, disk_bytes, net, vsock, confine, process_files }
    }
}

/// Takes descriptors one after the other.
struct Take(std::vec::IntoIter<OwnedFd>);

impl Take {
    fn next(&mut self) -> Result<OwnedFd, MachineError> {
        self.0.next().ok_or_else(|| refuse("a descriptor is missing"))
    }

    /// A regular file: nothing else may be mapped, and reading from it never waits for someone else.
    fn file(&mut self, what: &str) -> Result<File, MachineError> {
        let descriptor = self.next()?;
        let status = fstat(&descriptor).map_err(|error| host(&format!("looking at the {what}"), &error.into()))?;
        match FileType::from_raw_mode(status.st_mode) {
            FileType::RegularFile => Ok(File::from(descriptor)),
            other => Err(refuse(format!("the {what} is {other:?}, not a regular file"))),
        }
    }
}

fn length(file: &File, what: &str) -> Result<u64, MachineError> {
    let status = fstat(file).map_err(|error| host(&format!("looking at the {what}"), &error.into()))?;
    // The kernel keeps it positive.
    Ok(u64::try_from(status.st_size).unwrap_or(0))
}

/// Checks a `Prepare`.
pub fn shell(request: &Request, descriptors: Vec<OwnedFd>) -> Result<Bare, MachineError> {
    let Request::Prepare { version, vcpus, memory_bytes, memory, disk_bytes, net } = request else {
        return Err(refuse("that is no Prepare"));
    };
    let (&version, &vcpus, &memory_bytes, &memory_use, &disk_bytes) = (version, vcpus, memory_bytes, memory, disk_bytes);
    if version != VERSION {
        return Err(refuse(format!("the node speaks version {version} and this process {VERSION}; they must be installed together")));
    }
    if !(1..=16).contains(&vcpus) {
        return Err(refuse(format!("a machine has 1 to 16 vCPUs, not {vcpus}")));
    }
    if memory_bytes == 0 || memory_bytes % (2 * MIB) != 0 || memory_bytes > MAX_MEMORY {
        return Err(refuse(format!("{memory_bytes} bytes of memory are not a multiple of 2 MiB between that and 1 TiB")));
    }
    if disk_bytes == 0 || disk_bytes % PAGE != 0 || disk_bytes > MAX_DISK {
        return Err(refuse(format!("{disk_bytes} bytes of disk are not a multiple of 4 KiB between that and 64 TiB")));
    }
    let mut take = Take(descriptors.into_iter());
    let kvm = take.next()?;
    let file = take.file("memory file")?;
    let has = length(&file, "memory file")?;
    if has != memory_bytes {
        // Touching what lies beyond the end of a file would be SIGBUS.
        return Err(refuse(format!("the memory file has {has} bytes and the machine {memory_bytes}")));
    }
    let net = net.clone().map(|spec| take.next().map(|tap| (spec, tap))).transpose()?;
    Ok(Bare { kvm, memory: file, memory_bytes, memory_use, vcpus, disk_bytes, net })
}

/// What a machine is filled with.
pub enum Origin {
    /// A kernel.
    Boot(Boot),
    /// A snapshot.
    Restore(Restore),
}

impl Origin {
    /// Fills it.
    pub fn load(self, machine: &mut Machine) -> Result<Phases, MachineError> {
        match self {
            Self::Boot(boot) => machine.boot(boot),
            Self::Restore(restore) => machine.restore(restore),
        }
    }
}

/// Checks a `Boot` or `Restore`.
pub fn origin(request: Request, descriptors: Vec<OwnedFd>) -> Result<Origin, MachineError> {
    let mut take = Take(descriptors.into_iter());
    match request {
        Request::Boot { cmdline } => {
            if !cmdline.bytes().all(|byte| matches!(byte, b' '..=b'~')) || cmdline.len() > MAX_CMDLINE {
                return Err(refuse(format!("kernel arguments are at most {MAX_CMDLINE} printable ASCII characters")));
            }
            let (kernel, initramfs, disk) = (take.file("kernel")?, take.file("initramfs")?, take.file("disk")?);
            Ok(Origin::Boot(Boot { kernel, initramfs, disk, cmdline }))
        }
        Request::Restore { difference, sealed_layers, streams } => {
            let state = take.file("device state")?;
            let difference = if difference { Some(take.file("memory difference")?) } else { None };
            let disk_base = take.file("base disk")?;
            let layer = |take: &mut Take| Ok(SealedLayer { data: take.file("disk layer")?, map: take.file("disk layer's map")? });
            let sealed_layers = (0..sealed_layers).map(|_| layer(&mut take)).collect::<Result<_, MachineError>>()?;
            let disk_top = take.file("top disk layer")?;
            let streams = streams.into_iter().map(|stream| Ok((stream, take.next()?))).collect::<Result<_, MachineError>>()?;
            Ok(Origin::Restore(Restore { state, difference, disk_base, sealed_layers, disk_top, streams }))
        }
        _ => Err(refuse("that loads nothing")),
    }
}

/// Checks a `Save`.
pub fn save(kind: SaveKind, descriptors: Vec<OwnedFd>) -> Result<(File, SaveParts), MachineError> {
    let mut take = Take(descriptors.into_iter());
    let state = take.file("file for the device state")?;
    let parts = match kind {
        SaveKind::Image => SaveParts::Image,
        SaveKind::Difference { merge_layers } => SaveParts::Difference {
            memory: take.file("file for the memory difference")?,
            image_memory: take.file("image's memory file")?,
            disk_map: take.file("file for the disk's map")?,
            merge_layers,
        },
    };
    let empty = |file: &File, what: &str| match length(file, what)? {
        0 => Ok(()),
        bytes => Err(refuse(format!("the {what} should be empty and has {bytes} bytes"))),
    };
    empty(&state, "file for the device state")?;
    if let SaveParts::Difference { memory, disk_map, .. } = &parts {
        empty(memory, "file for the memory difference")?;
        empty(disk_map, "file for the disk's map")?;
    }
    Ok((state, parts))
}

/// The answer to a save, with the host ends of the streams.
pub fn saved(saved: SavedMachine) -> (Reply, Vec<OwnedFd>) {
    let SavedMachine { state_bytes, state_crc32, memory, map_crc32, merged, mut streams, phases } = saved;
    if streams.len() > MAX_STREAMS {
        // The guest sees a reset of those that are not handed back at the restore. Never the node's own, which may be the
        // youngest; the order is kept otherwise.
        streams.sort_by_key(|(stream, _)| stream.guest_port != AGENT_PORT);
        tracing::warn!(open = streams.len(), kept = MAX_STREAMS, "more streams are open than one message can carry; the rest will be reset");
        streams.truncate(MAX_STREAMS);
    }
    let (streams, descriptors) = streams.into_iter().unzip();
    (Reply::Saved(Saved { state_bytes, state_crc32, memory, map_crc32, merged, streams, phases_us: phases }), descriptors)
}

#[cfg(test)]
mod tests {
    use vmm_protocol::control::{FromVmm, ParkedStream, receive, send};

    use super::*;

    #[test]
    fn of_a_hundred_streams_as_many_as_fit_are_handed_over_and_the_agents_is_one_of_them() {
        let stream = |host_port| (ParkedStream { guest_port: if host_port == 99 { AGENT_PORT } else { 5000 }, host_port }, File::open("/dev/null").unwrap().into());
        let phases = Phases::new();
        let machine = SavedMachine { state_bytes: 0, state_crc32: 0, memory: None, map_crc32: None, merged: false, streams: (0..100).map(stream).collect(), phases };
        let (reply, descriptors) = saved(machine);
        let Reply::Saved(Saved { streams, .. }) = &reply else { panic!("{reply:?}") };
        let ports: Vec<u32> = streams.iter().map(|stream| stream.host_port).collect();
        assert_eq!(ports, std::iter::once(99).chain(0..59).collect::<Vec<_>>());
        assert_eq!(descriptors.len(), ports.len());
        // And the message goes through.
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let (ours, theirs) = rustix::net::socketpair(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::SEQPACKET, flags, None).unwrap();
        let borrowed: Vec<_> = descriptors.iter().map(std::os::fd::AsFd::as_fd).collect();
        send(&ours, &FromVmm::Reply { id: 1, reply: reply.clone() }, &borrowed).unwrap();
        let (heard, arrived) = receive::<FromVmm>(&theirs).unwrap();
        assert_eq!((heard, arrived.len()), (FromVmm::Reply { id: 1, reply }, 60));
    }
}
