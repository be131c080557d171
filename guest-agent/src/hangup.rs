//! Whether an app has seen what a connection to it was given.
//!
//! An app closes connections that idle, and a host may use one again at that very moment. What is sent then is refused by the app's
//! kernel, and the host may send it elsewhere; but only if that is certain. A primer of what can be known:
//!
//! - The end of the app's direction (a FIN) says that the app has closed, or only that it will say no more. It has closed if its
//!   socket is nobody's any more: `/proc/net/tcp` shows it without an inode. What is sent then reaches nobody.
//! - The app may close between that look and the write. Its kernel then answers with a reset at once, on a machine's own
//!   loopback before the write returns. The FIN came first and acknowledged nothing of what was written: the socket had been
//!   closed when that came.
//! - A reset alone says nothing: who reads half of a request and dies sends one, and need not have acknowledged what it read.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
};

use protocol::guest::Listens;
use rustix::net::{RecvFlags, recv};
use tokio::net::TcpStream;

use crate::sys;

/// States of a socket, as in include/net/tcp_states.h.
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;

/// Whether the app at the other end of a connection still listens.
pub(crate) fn listens(connection: &TcpStream) -> Listens {
    if !sys::tcp_progress(connection).is_ok_and(|progress| progress.state == CLOSE_WAIT) {
        return Listens::Yes;
    }
    let (Ok(ours), Ok(apps)) = (connection.local_addr(), connection.peer_addr()) else { return Listens::Perhaps };
    let closed = ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|list| fs::read_to_string(list).is_ok_and(|list| is_orphan(&list, apps, ours)));
    if closed { Listens::No } else { Listens::Perhaps }
}

/// Whether an app had closed its end before it was given anything behind the first `before` bytes, and takes none of it. To be
/// asked right after a write. An error is the connection's.
pub(crate) fn has_refused(connection: &TcpStream, before: u64) -> io::Result<bool> {
    let progress = sys::tcp_progress(connection)?;
    // The SYN counts as a byte.
    if progress.state != CLOSE || progress.acked > before + 1 {
        return Ok(false);
    }
    // A socket that was reset shows a FIN that had come before.
    let mut byte = [0];
    Ok(recv(connection, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT)?.0 == 0)
}

/// Whether a `/proc/net/tcp` list has the socket from `local` to `remote` as one that was closed and belongs to nobody.
fn is_orphan(list: &str, local: SocketAddr, remote: SocketAddr) -> bool {
    let (plain, mapped) = ((written(local), written(remote)), (written(as_mapped(local)), written(as_mapped(remote))));
    list.lines().skip(1).any(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, local, remote, state, _, _, _, _, _, inode, ..] = fields[..] else { return false };
        let same = |pair: &(String, String)| pair.0 == local && pair.1 == remote;
        // One that has not been accepted yet has no inode either.
        let closed = u8::from_str_radix(state, 16).is_ok_and(|state| matches!(state, FIN_WAIT1 | FIN_WAIT2 | TIME_WAIT));
        (same(&plain) || same(&mapped)) && closed && inode == "0"
    })
}

/// As a socket for both families has an address of IPv4.
fn as_mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => (ip.to_ipv6_mapped(), address.port()).into(),
        IpAddr::V6(_) => address,
    }
}

/// As the kernel writes an address there: in words of the machine's byte order.
fn written(address: SocketAddr) -> String {
    let octets = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let words = octets.as_chunks().0.iter().map(|word| format!("{:08X}", u32::from_ne_bytes(*word)));
    format!("{}:{:04X}", words.collect::<String>(), address.port())
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    /// The agent's end and the app's, after each has said four bytes.
    async fn connected(address: &str) -> (TcpStream, std::net::TcpStream) {
        let listener = TcpListener::bind(format!("{address}:0")).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let to = if address == "[::1]" { "[::1]" } else { "127.0.0.1" };
        let mut ours = TcpStream::connect(format!("{to}:{port}")).await.unwrap();
        ours.set_nodelay(true).unwrap();
        let (mut apps, _) = listener.accept().await.unwrap();
        let mut four = [0; 4];
        ours.write_all(b"asks").await.unwrap();
        apps.read_exact(&mut four).await.unwrap();
        apps.write_all(b"says").await.unwrap();
        ours.read_exact(&mut four).await.unwrap();
        let apps = apps.into_std().unwrap();
        apps.set_nonblocking(false).unwrap();
        (ours, apps)
    }

    async fn end_of(ours: &mut TcpStream) {
        assert_eq!(ours.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn one_that_was_closed_does_not_listen_and_one_that_says_no_more_may() {
        for address in ["127.0.0.1", "[::1]", "[::]"] {
            let (mut ours, apps) = connected(address).await;
            assert_eq!(listens(&ours), Listens::Yes, "{address}");
            apps.shutdown(Shutdown::Write).unwrap();
            end_of(&mut ours).await;
            assert_eq!(listens(&ours), Listens::Perhaps, "{address}: the app still reads");
            drop(apps);
            assert_eq!(listens(&ours), Listens::No, "{address}");
            let (mut ours, apps) = connected(address).await;
            let shared = apps.try_clone().unwrap();
            drop(apps);
            assert_eq!(listens(&ours), Listens::Yes, "{address}: a child of the app has it");
            drop(shared);
            end_of(&mut ours).await;
            assert_eq!(listens(&ours), Listens::No, "{address}");
        }
    }

    #[tokio::test]
    async fn what_was_written_to_one_that_had_closed_is_refused() {
        let (mut ours, apps) = connected("127.0.0.1").await;
        drop(apps);
        ours.write_all(b"more").await.unwrap();
        assert!(has_refused(&ours, 4).unwrap());
        // It can still be read to its end.
        end_of(&mut ours).await;
    }

    #[tokio::test]
    async fn what_an_app_may_have_read_is_not() {
        use std::io::Read as _;
        // It takes it.
        let (mut ours, mut apps) = connected("127.0.0.1").await;
        ours.write_all(b"more").await.unwrap();
        assert!(!has_refused(&ours, 4).unwrap());
        // It reads a part and dies, which resets the connection.
        apps.read_exact(&mut [0; 2]).unwrap();
        drop(apps);
        let refused = has_refused(&ours, 4);
        assert!(refused.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset), "{refused:?}");
        // It takes it, says no more, and closes.
        let (mut ours, mut apps) = connected("127.0.0.1").await;
        ours.write_all(b"more").await.unwrap();
        apps.read_exact(&mut [0; 4]).unwrap();
        drop(apps);
        ours.write_all(b"and more").await.unwrap();
        assert!(!has_refused(&ours, 4).unwrap(), "only the second piece was refused");
    }

    #[test]
    fn a_socket_that_waits_to_be_accepted_has_no_inode_and_is_not_closed() {
        let header = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
        let line = |state: &str, inode: &str| {
            format!("{header}   1: 0100007F:1F90 0100007F:9C40 {state} 00000000:00000000 00:00000000 00000000  1000        0 {inode} 1 0 20 4 30 10 -1\n")
        };
        let (apps, ours) = (([127, 0, 0, 1], 8080).into(), ([127, 0, 0, 1], 40000).into());
        assert!(is_orphan(&line("05", "0"), apps, ours) && is_orphan(&line("06", "0"), apps, ours));
        assert!(!is_orphan(&line("01", "0"), apps, ours), "it waits to be accepted");
        assert!(!is_orphan(&line("05", "4711"), apps, ours) && !is_orphan(&line("05", "0"), ours, apps) && !is_orphan(header, apps, ours));
    }
}
