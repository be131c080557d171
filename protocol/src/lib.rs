//! What the host and the guest agent say to each other, and the stream multiplexer that carries it over one byte channel.
//!
//! Owns: the frame format, the agent's messages, flow control, parking, resynchronisation. Never opens a device or a
//! socket by itself, and trusts nothing that the other side sends: every length is bounded before it is believed.
#![forbid(unsafe_code)]

pub mod agent;
pub mod egress;
pub mod frame;
pub mod guest;
pub mod link;

mod message;
mod mux;
mod pump;
mod splice;
mod stream;

pub use message::VERSION;
