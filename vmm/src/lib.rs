//! dormouse-vmm: one process per microVM, on KVM.
//!
//! Owns: the virtual machine ([`machine`]), its KVM state ([`kvm`]), what a PC's kernel expects to find ([`arch`],
//! [`devices`]), guest memory ([`memory`]) and the file of device state ([`snapshot`]). Never decides when a microVM sleeps,
//! never opens a file by name once it is jailed, never trusts what a guest or a snapshot file says.

#![deny(unsafe_code)]

pub mod arch;
pub mod arguments;
pub mod control;
pub mod devices;
#[expect(unsafe_code, reason = "system calls that no crate has in a safe form")]
pub mod jail;
#[expect(unsafe_code, reason = "KVM's shared pages, ioctls and signals")]
pub mod kvm;
pub mod log;
pub mod machine;
#[expect(unsafe_code, reason = "mappings of guest memory")]
pub mod memory;
pub mod snapshot;
