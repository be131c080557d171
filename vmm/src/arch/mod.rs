//! What makes the machine a PC to a stock x86-64 kernel.
//!
//! Owns: where things are in guest physical memory, the tables that tell the kernel so, the kernel's way into memory and the
//! registers it starts with. Never talks to KVM except to set those registers.

pub mod acpi;
pub mod boot;
pub mod kernel;
pub mod layout;
