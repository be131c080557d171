//! The session tickets of TLS 1.3, kept back until there is something to say to the client.
//!
//! rustls sends them by themselves as soon as the handshake is done, which is when a client sends its first request. A client
//! that reads and writes in two threads over OpenSSL, such as Python's `websockets.sync`, then takes them out of the
//! connection while it writes, which OpenSSL does not allow for, and now and then sends nothing at all or gives up
//! (measured on this project's tests: one connection in some hundred; openssl s_server with tickets shows it too, without
//! them not). Kept back they come with the begin of the first answer, in the same segment, and spare each connection a
//! packet of its own. BoringSSL's servers do the same. Without them nothing acknowledges the client's Finished at once, which a client
//! without TCP_NODELAY waits for; `socket` asks the kernel for it.
//!
//! Owns: which bytes are tickets. Never holds back what the handshake needs.

use std::{
    io::IoSlice,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// The content type of every record of TLS 1.3 that is encrypted (RFC 8446 §5.2).
const APPLICATION_DATA: u8 = 23;

/// What is known of a connection's handshake, and the tickets until they are sent.
#[derive(Debug)]
pub(crate) struct Tickets {
    handshake: Arc<AtomicBool>,
    /// Something came of the client since it was last written to.
    heard: bool,
    /// The last write was taken whole.
    whole: bool,
    held: Vec<u8>,
}

/// Says that a handshake is over.
#[derive(Debug, Clone)]
pub(crate) struct HandshakeEnd(Arc<AtomicBool>);

impl HandshakeEnd {
    /// From now on nothing more is held back.
    pub fn reached(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl Tickets {
    /// Of a connection whose handshake begins.
    pub fn new() -> (Self, HandshakeEnd) {
        let handshake = Arc::new(AtomicBool::new(true));
        (Self { handshake: handshake.clone(), heard: false, whole: true, held: Vec::new() }, HandshakeEnd(handshake))
    }

    /// The client said something.
    pub fn heard(&mut self) {
        self.heard = true;
    }

    /// Of `length` bytes `written` were taken. `None` if the handshake is over: then there is nothing more to hold.
    pub fn after(mut self, written: usize, length: usize) -> Option<Self> {
        self.heard = false;
        self.whole = written == length;
        self.handshake.load(Ordering::Relaxed).then_some(self)
    }

    /// Holds `bufs` back if they are tickets: what a server writes encrypted once it has read the client's Finished. Its
    /// first flight begins in the clear (RFC 8446 §4.1.3) and is written before the client says anything more; TLS 1.2 ends
    /// in the clear too (RFC 5246 §7.1).
    pub fn hold(&mut self, bufs: &[IoSlice<'_>]) -> bool {
        let tickets = self.heard
            && self.whole
            && bufs.iter().find_map(|buf| buf.first()) == Some(&APPLICATION_DATA)
            && self.handshake.load(Ordering::Relaxed);
        if tickets {
            bufs.iter().for_each(|buf| self.held.extend_from_slice(buf));
        }
        tickets
    }

    /// What is held, to be sent before anything else. What of it could not be sent is to be [`Tickets::put_back`].
    pub fn take(&mut self) -> Option<Vec<u8>> {
        (!self.held.is_empty()).then(|| std::mem::take(&mut self.held))
    }

    /// Holds the rest again.
    pub fn put_back(&mut self, rest: &[u8]) {
        self.held = rest.to_vec();
    }
}
