//! One connection of a node: packets in, packets out, never waiting for the other side.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{SocketFlags, accept_with},
};
use vmm_protocol::control::{Fault, FromVmm, MAX_MESSAGE, PacketError, Reply, ToVmm, receive, send};

/// What may be in a text that the guest wrote or caused, after JSON has escaped it; the rest of the message fits beside it.
const MAX_TEXT: usize = MAX_MESSAGE - 4096;
/// A sentence is cut here.
const MAX_SENTENCE: usize = 4096;

/// A connection.
pub struct Connection(OwnedFd);

/// What came.
pub enum Heard {
    /// Not yet anything.
    Nothing,
    /// A request.
    Packet(ToVmm, Vec<OwnedFd>),
    /// A packet that is none; its descriptors are closed.
    Nonsense(String),
    /// There will be nothing more.
    End(String),
}

impl Connection {
    /// Takes the next connection that waits.
    pub fn accept(listener: impl AsFd) -> io::Result<Self> {
        Ok(Self(accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?))
    }

    /// The next packet, if one is there.
    pub fn hear(&self) -> Heard {
        match receive(&self.0) {
            Ok((packet, descriptors)) => Heard::Packet(packet, descriptors),
            Err(PacketError::Malformed(why)) => Heard::Nonsense(format!("it was not understood: {why}")),
            Err(PacketError::Closed) => Heard::End("the node has closed it".to_owned()),
            Err(PacketError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Heard::Nothing,
            Err(PacketError::Io(error)) => Heard::End(error.to_string()),
        }
    }

    /// Sends a packet, or says why the connection is of no use any more: a node that does not read its answers is as good as
    /// gone, and the event loop does not wait for it.
    pub fn send(&self, message: &FromVmm, descriptors: &[OwnedFd]) -> Result<(), String> {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        send(&self.0, message, &descriptors).map_err(|error| match error {
            PacketError::Io(error) if error.kind() == io::ErrorKind::WouldBlock => "the node does not read its answers".to_owned(),
            PacketError::Io(error) => format!("an answer could not be sent: {error}"),
            other => other.to_string(),
        })
    }

    /// Whether the other end is closed. There may still be packets that it sent before.
    pub fn is_gone(&self) -> bool {
        let mut socket = [PollFd::new(&self.0, PollFlags::IN)];
        // On an error, which a valid descriptor does not give, `hear` finds out.
        poll(&mut socket, Some(&Timespec::default())).is_err() || socket[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// Tells why it is not taken, and ends it.
    pub fn turn_away(self) {
        let why = "another node is connected to this process".to_owned();
        // Who does not hear it sees the end.
        let _ = self.send(&FromVmm::Reply { id: 0, reply: Reply::Failed { fault: Fault::Request, why } }, &[]);
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A sentence that fits into a message whatever it holds.
pub fn shortened(text: &str) -> String {
    let mut room = MAX_SENTENCE;
    text.chars().take_while(|c| take(&mut room, *c)).collect()
}

/// As much of the end of a text as fits into a message.
pub fn tail(text: &str) -> String {
    let mut room = MAX_TEXT;
    let kept: usize = text.chars().rev().take_while(|c| take(&mut room, *c)).map(char::len_utf8).sum();
    text[text.len() - kept..].to_owned()
}

fn take(room: &mut usize, c: char) -> bool {
    // JSON writes a control character as `\u0000`, at worst.
    let length = match c {
        '"' | '\\' => 2,
        c if c.is_ascii_control() => 6,
        c => c.len_utf8(),
    };
    *room = room.saturating_sub(length);
    *room > 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketType, socketpair};

    use super::*;

    fn pair() -> (Connection, OwnedFd) {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None).unwrap();
        (Connection(ours), theirs)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn any_console_fits_into_a_message(piece in "(?s).{1,400}", times in 1usize..200) {
            let text = piece.repeat(times);
            let (ours, theirs) = pair();
            let reply = Reply::Console { text: tail(&text) };
            let message = FromVmm::Reply { id: u64::MAX, reply };
            prop_assert_eq!(ours.send(&message, &[]), Ok(()));
            let (received, _) = receive::<FromVmm>(&theirs).unwrap();
            prop_assert_eq!(received, message);
            prop_assert!(text.ends_with(&tail(&text)));
        }
    }

    #[test]
    fn a_console_of_control_characters_is_cut_at_its_beginning() {
        let text = "\u{1}".repeat(60_000) + "end";
        let kept = tail(&text);
        assert!(kept.ends_with("end") && kept.len() > 9_000 && kept.len() < 11_000, "{}", kept.len());
        assert!(shortened(&text).len() < 700);
        assert_eq!(shortened("a \"sentence\""), "a \"sentence\"");
    }

    #[test]
    fn a_node_that_does_not_read_is_not_waited_for() {
        let (ours, theirs) = pair();
        let message = FromVmm::Reply { id: 1, reply: Reply::Console { text: "x".repeat(50_000) } };
        let refusal = (0..1000).find_map(|_| ours.send(&message, &[]).err()).unwrap();
        assert_eq!(refusal, "the node does not read its answers");
        assert!(!ours.is_gone());
        drop(theirs);
        assert!(ours.is_gone());
    }
}
