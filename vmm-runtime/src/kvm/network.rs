//! A network for each VMM process: a namespace with a TAP in it and nothing else.
//!
//! Owns: the namespace, the TAP's name and addresses. The VMM gets the TAP's descriptor and never enters the namespace; no thread
//! of the node is ever in it but one that makes it and ends. The namespace lives as long as the TAP's descriptor, so it goes with
//! the VMM and outlives the node. Nothing leads out of it: that is for whoever wants to let guests out, by the descriptor kept here.
//!
//! Who has which address. Every guest has the same ones, because a clone is a copy of a guest that runs: its kernel read its
//! card's address when the image was booted, will not read it again (virtio-net asks its device at the probe only), and its
//! programs know their own address. That is harmless because nobody sees two of them: each is alone on its wire with the host's
//! end. The host's end has the same address everywhere, too, so that what a guest remembers of its neighbour stays right when it
//! goes on in another namespace. The card itself says another address in each process, for a driver that asks anew.

use std::{
    fs::File,
    io,
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socket_with},
    thread::{UnshareFlags, unshare_unsafe},
};
use sha2::{Digest, Sha256};

/// The namespace's end of the wire, with a prefix of 30 bits.
pub const HOST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 107, 0, 1);
/// The other address of that prefix.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 107, 0, 2);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 252);
const TAP: &str = "tap0";
/// Locally administered, as all here.
const HOST_MAC: [u8; 6] = [0x02, b'd', b'o', b'r', b'm', 1];

const TUNSETIFF: u32 = 0x4004_54ca;
const SIOCSIFFLAGS: u32 = 0x8914;
const SIOCSIFADDR: u32 = 0x8916;
const SIOCSIFNETMASK: u32 = 0x891c;
const SIOCSIFHWADDR: u32 = 0x8924;
const ARPHRD_ETHER: u16 = 1;

/// A network namespace.
#[derive(Debug)]
pub struct Network {
    namespace: OwnedFd,
}

impl AsFd for Network {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}

impl Network {
    /// Makes one, with the TAP that is in it. Waits for the kernel, some milliseconds.
    pub fn make() -> io::Result<(Self, OwnedFd)> {
        // A thread's namespace is its own; this one's ends with it.
        std::thread::scope(|scope| scope.spawn(make_here).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// The card's address in this process: of its directory's random name, since a process is made ready before it is known for
/// which microVM. One process is one microVM's.
pub fn guest_mac(process_dir: &Path) -> [u8; 6] {
    let name = process_dir.file_name().unwrap_or_default();
    let hash = Sha256::digest(name.as_encoded_bytes());
    [0x02, hash[0], hash[1], hash[2], hash[3], hash[4]]
}

fn make_here() -> io::Result<(Network, OwnedFd)> {
    // SAFETY: descriptors stay shared with the other threads, which is what this is unsafe for.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET)? };
    let namespace = File::open("/proc/thread-self/ns/net")?.into();
    let tap: OwnedFd = File::options().read(true).write(true).open("/dev/net/tun")?.into();
    // What the VMM's card expects: whole frames behind a header of 10 bytes, the default of IFF_VNET_HDR.
    configure(&tap, TUNSETIFF, TAP, Value::Flags(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR))?;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    configure(&socket, SIOCSIFHWADDR, TAP, Value::Mac(HOST_MAC))?;
    configure(&socket, SIOCSIFADDR, TAP, Value::Address(HOST_ADDRESS))?;
    configure(&socket, SIOCSIFNETMASK, TAP, Value::Address(MASK))?;
    configure(&socket, SIOCSIFFLAGS, TAP, Value::Flags(libc::IFF_UP))?;
    Ok((Network { namespace }, tap))
}

enum Value {
    Flags(libc::c_int),
    Address(Ipv4Addr),
    Mac([u8; 6]),
}

/// netdevice(7).
fn configure(on: &OwnedFd, request: u32, interface: &str, value: Value) -> io::Result<()> {
    // SAFETY: an `ifreq` is numbers and bytes, for which all zeros are a value.
    let mut what: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    for (to, from) in what.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    match value {
        Value::Flags(flags) => what.ifr_ifru.ifru_flags = flags as libc::c_short,
        Value::Address(address) => {
            let mut socket_address = libc::sockaddr { sa_family: libc::AF_INET as u16, sa_data: [0; 14] };
            // `struct sockaddr_in`: the port, then the address as on the wire.
            for (to, from) in socket_address.sa_data[2..].iter_mut().zip(address.octets()) {
                *to = from.cast_signed();
            }
            what.ifr_ifru.ifru_addr = socket_address;
        }
        Value::Mac(mac) => {
            let mut socket_address = libc::sockaddr { sa_family: ARPHRD_ETHER, sa_data: [0; 14] };
            for (to, from) in socket_address.sa_data.iter_mut().zip(mac) {
                *to = from.cast_signed();
            }
            what.ifr_ifru.ifru_hwaddr = socket_address;
        }
    }
    // SAFETY: all these requests read an `ifreq` at the pointer, and TUNSETIFF writes one; `what` is one and lives on.
    let done = unsafe { libc::ioctl(on.as_raw_fd(), request as libc::Ioctl, &raw mut what) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_process_has_an_address_that_nobody_else_may_have() {
        let mac = guest_mac(Path::new("/run/a"));
        // Locally administered, and of one card.
        assert_eq!(mac[0] & 3, 2);
        assert_ne!(mac, guest_mac(Path::new("/run/b")));
        assert_ne!(mac, HOST_MAC);
    }

    #[test]
    fn a_network_is_made_without_leaving_anyone_in_it() {
        let here = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let before = here();
        let made = Network::make();
        assert_eq!(here(), before);
        let (network, tap) = match made {
            Ok(made) => made,
            Err(error) => {
                eprintln!("SKIPPED: this host does not let a network be made: {error}");
                return;
            }
        };
        let there = std::fs::read_link(format!("/proc/self/fd/{}", network.as_fd().as_raw_fd())).unwrap();
        assert_ne!(there, before);
        // Its kernel answers to its address (RFC 826), behind the header of 10 bytes.
        let mac = guest_mac(Path::new("/run/a"));
        let question = [&[0; 10][..], &[0xff; 6], &mac, &[8, 6], &[0, 1, 8, 0, 6, 4, 0, 1], &mac, &GUEST_ADDRESS.octets(), &[0; 6], &HOST_ADDRESS.octets()].concat();
        assert_eq!(rustix::io::write(&tap, &question).unwrap(), question.len());
        let answer = [&mac[..], &HOST_MAC, &[8, 6], &[0, 1, 8, 0, 6, 4, 0, 2], &HOST_MAC, &HOST_ADDRESS.octets(), &mac, &GUEST_ADDRESS.octets()].concat();
        let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        loop {
            let mut fds = [rustix::event::PollFd::new(&tap, rustix::event::PollFlags::IN)];
            assert_eq!(rustix::event::poll(&mut fds, Some(&limit)).unwrap(), 1, "there is no answer");
            // The kernel says things of its own, too.
            let mut frame = [0; 2048];
            let read = rustix::io::read(&tap, &mut frame).unwrap();
            if frame[..read][10..].starts_with(&answer) {
                break;
            }
        }
    }
}
