//! The gateway from outside: real sockets, real TLS, the real controller over the loopback engine, other people's clients.
//!
//! Numbers in names of tests are cases of the list of 52 that the project keeps.

mod admission;
mod app;
mod connections;
mod drain;
mod eager;
mod exchange;
mod forwarding;
mod guest_tls;
mod hostile;
mod lifecycle;
mod limits;
mod log;
mod pingora;
mod rig;
mod timing;
mod websocket;
