//! Clients that have not said yet which port they want, and the socket they come in by.
//!
//! Owns: the words before a stream (`CONNECT <port>\n`), and the ceiling and the deadline for those who are slow to say
//! them. A refusal is an end of file.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    event::epoll::EventFlags,
    io::Errno,
    net::{RecvFlags, SocketFlags, accept_with, recv},
};
use tracing::warn;

use crate::device::Watch;

/// Clients who may think at the same time; the next wait in the listener's backlog.
pub(super) const MAX_CLIENTS: usize = 64;
/// How long a client may think.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// `CONNECT 4294967295\n` has 19.
const MAX_LINE: usize = 32;

#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    deadline: Instant,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Clients {
    listener: OwnedFd,
    listener_token: u32,
    first_token: u32,
    watch: Watch,
    /// Whether the event loop watches the listener.
    listening: bool,
    /// Whether somebody may be waiting in the listener's backlog.
    waiting: bool,
    /// Edges at clients may have been lost.
    look_at_all: bool,
    places: Vec<Option<Client>>,
}

/// What a client has said.
enum Line {
    Port(u32),
    NotYet,
    Refused,
}

impl Clients {
    /// `listener` does not block. Tokens of clients are the [`MAX_CLIENTS`] from `first_token` on.
    pub fn new(listener: OwnedFd, watch: Watch, listener_token: u32, first_token: u32) -> Self {
        Self { listener, listener_token, first_token, watch, listening: false, waiting: true, look_at_all: false, places: Vec::new() }
    }

    /// Begins to hear the listener.
    pub fn listen(&mut self) -> std::io::Result<()> {
        self.waiting = true;
        if !self.listening {
            self.watch.add(&self.listener, self.listener_token, EventFlags::IN | EventFlags::ET)?;
            self.listening = true;
        }
        Ok(())
    }

    /// Clients stay in the listener's backlog; those who were accepted are refused.
    pub fn close(&mut self) {
        if self.listening {
            // It fails only if the epoll itself is gone.
            let _ = self.watch.remove(self.listener.as_fd());
            self.listening = false;
        }
        self.places.clear();
    }

    /// Refuses those who were accepted.
    pub fn forget(&mut self) {
        self.places.clear();
    }

    /// The machine slept: those who were thinking may think anew, or have decided meanwhile.
    pub fn resume(&mut self, now: Instant) {
        self.look_at_all = true;
        for client in self.places.iter_mut().flatten() {
            client.deadline = now + CONNECT_LIMIT;
        }
    }

    /// An edge at the listener.
    pub fn listener_ready(&mut self) {
        self.waiting = true;
    }

    /// Refuses clients whose time is over.
    pub fn sweep(&mut self, now: Instant) {
        for place in &mut self.places {
            if place.as_ref().is_some_and(|client| client.deadline <= now) {
                *place = None;
            }
        }
        self.waiting = true;
    }

    /// Whether [`Clients::sweep`] will have something to do.
    pub fn have_deadlines(&self) -> bool {
        self.places.iter().any(Option::is_some)
    }

    /// Accepts who waits, while there is room. Clients who have said their port already are handed to `connect`. Answers
    /// whether a [`Clients::sweep`] is to follow some time.
    pub fn accept(&mut self, now: Instant, mut connect: impl FnMut(u32, OwnedFd)) -> bool {
        let mut sweep_later = false;
        if std::mem::take(&mut self.look_at_all) {
            for token in (self.first_token..).take(self.places.len()) {
                if let Some((port, socket)) = self.client_ready(token) {
                    connect(port, socket);
                }
            }
        }
        while self.waiting {
            let Some(place) = self.free_place() else { break };
            match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => {
                    let token = self.first_token + place as u32;
                    if let Err(error) = self.watch.add(&socket, token, EventFlags::IN | EventFlags::RDHUP | EventFlags::ET) {
                        warn!(%error, "watching a vsock client failed; it is refused");
                        continue;
                    }
                    self.places[place] = Some(Client { socket, deadline: now + CONNECT_LIMIT });
                    sweep_later = true;
                    // What it said before it was watched makes no edge of its own.
                    if let Some((port, socket)) = self.client_ready(token) {
                        connect(port, socket);
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => self.waiting = false,
                Err(error) => {
                    // The host has no descriptor left, or no memory; a sweep looks again.
                    warn!(%error, "accepting a vsock client failed; trying again");
                    sweep_later = true;
                    break;
                }
            }
        }
        sweep_later
    }

    fn free_place(&mut self) -> Option<usize> {
        if let Some(free) = self.places.iter().position(Option::is_none) {
            return Some(free);
        }
        (self.places.len() < MAX_CLIENTS).then(|| {
            self.places.push(None);
            self.places.len() - 1
        })
    }

    /// An edge at a client: the port it wants, once it has said so. Its socket is not watched any more then.
    pub fn client_ready(&mut self, token: u32) -> Option<(u32, OwnedFd)> {
        let place = self.places.get_mut(token.checked_sub(self.first_token)? as usize)?;
        // An edge may be left over from one who had this place before.
        let client = place.as_ref()?;
        match read_line(&client.socket) {
            Line::NotYet => None,
            Line::Refused => {
                *place = None;
                None
            }
            Line::Port(port) => {
                let Client { socket, .. } = place.take()?;
                self.watch.remove(socket.as_fd()).ok()?;
                Some((port, socket))
            }
        }
    }

    #[cfg(test)]
    pub fn thinking(&self) -> usize {
        self.places.iter().flatten().count()
    }
}

/// Takes the line out of the socket, and not a byte of what follows.
fn read_line(socket: &OwnedFd) -> Line {
    let mut bytes = [0; MAX_LINE];
    let peeked = rustix::io::retry_on_intr(|| recv(socket, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT));
    let seen = match peeked {
        Ok((seen @ 1.., _)) => seen,
        Err(Errno::AGAIN) => return Line::NotYet,
        Ok(_) | Err(_) => return Line::Refused,
    };
    let Some(end) = bytes[..seen].iter().position(|byte| *byte == b'\n') else {
        return if seen < MAX_LINE { Line::NotYet } else { Line::Refused };
    };
    let taken = rustix::io::retry_on_intr(|| recv(socket, &mut bytes[..=end], RecvFlags::DONTWAIT));
    if !matches!(taken, Ok((len, _)) if len == end + 1) {
        return Line::Refused;
    }
    parse_line(&bytes[..end]).map_or(Line::Refused, Line::Port)
}

fn parse_line(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    // `parse` takes a sign too.
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let port = std::str::from_utf8(digits).ok()?.parse().ok()?;
    // The highest is "any port" (VMADDR_PORT_ANY), which nobody listens on.
    (port != u32::MAX).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_one_form_is_understood() {
        assert_eq!(parse_line(b"CONNECT 1024"), Some(1024));
        assert_eq!(parse_line(b"CONNECT 0"), Some(0));
        assert_eq!(parse_line(b"CONNECT 4294967294"), Some(u32::MAX - 1));
        for wrong in ["", "CONNECT", "CONNECT ", "connect 5"] {
            assert_eq!(parse_line(wrong.as_bytes()), None, "{wrong:?}");
        }
        for wrong in ["+5", "-5", "5 ", " 5", "5\r", "4294967295", "4294967296"] {
            assert_eq!(parse_line(format!("CONNECT {wrong}").as_bytes()), None, "{wrong:?}");
        }
    }
}
