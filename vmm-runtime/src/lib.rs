//! The engines that run microVMs, and the snapshots they write.
//!
//! Owns: [`engine::Engine`], what every engine must do, with one conformance suite; the `qemu` and `kvm` engines; snapshot formats.
//! Never decides *when* a microVM sleeps or wakes, and never names the controller, the gateway or HTTP.

#![deny(unsafe_code)]

#[cfg(feature = "testing")]
pub mod conformance;
pub mod engine;
pub mod guest_kit;
mod host;
#[expect(unsafe_code, reason = "a network namespace's ioctls")]
pub mod kvm;
#[cfg(feature = "testing")]
pub mod loopback;
pub mod qemu;
pub mod snapshot;

pub use host::EgressPolicy;
