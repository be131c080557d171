//! From a permit to a connection with the guest.
//!
//! pingora as published keeps a connection for reuse only if it is a real descriptor whose peer has the address it was
//! asked for (pingora.md §3). A guest stream is neither; ours keeps those that carry a number of ours as well
//! (third_party/PATCHES.md, [`links`]): those of HTTP/2. Those of HTTP/1.1 wait in a pool of ours ([`pool`]). A WebSocket is
//! never reused and sits on its guest stream directly ([`guest_socket`], [`tunnel`]). Where the app speaks TLS, all sit on the
//! inside of it ([`transport`]).

pub(crate) mod connector;
pub(crate) mod deferred;
pub(crate) mod frames;
pub(crate) mod guest_socket;
pub(crate) mod h2_headers;
pub(crate) mod links;
pub(crate) mod pool;
pub(crate) mod transport;
pub(crate) mod turns;
pub(crate) mod tunnel;
