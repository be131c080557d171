//! What crosses the boundary of one VMM process: the words between it and the node, and the files that it writes and reads.
//!
//! Owns: [`control`], the messages of the control socket and how descriptors travel with them; [`memdiff`], the memory
//! difference of a snapshot; [`pagemap`], how changed pages are found; [`probe`], what the VMM says of its host. Never opens
//! a file by name, never talks to KVM.

#![deny(unsafe_code)]

pub mod control;
pub mod memdiff;
#[expect(unsafe_code, reason = "PAGEMAP_SCAN, which no crate has in a safe form")]
pub mod pagemap;
pub mod probe;
