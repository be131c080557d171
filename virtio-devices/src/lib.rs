//! The virtio devices of our VMM (virtio 1.2), as state machines over guest memory.
//!
//! Owns: the MMIO transport with its status machine, and the devices behind it. Never talks to KVM: a device is kicked by
//! an eventfd, raises its interrupt by another, and waits for what else it needs through [`device::Watch`]. The guest is
//! hostile: every index, length and address that it gives is checked before it is used, and a driver that breaks the rules
//! gets `DEVICE_NEEDS_RESET`, never a panic.

#![deny(unsafe_code)]

pub mod balloon;
mod bell;
pub mod block;
mod chain;
pub mod device;
pub mod net;
pub mod rng;
pub mod transport;
pub mod vsock;
