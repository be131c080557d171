//! What every engine's snapshots have in common: manifests and atomic commits.
//!
//! Owns: the formats and the order of writes that makes a crash leave either the old snapshot or the new one. Never
//! talks to a VMM. A snapshot file is semi-trusted: every length in it is checked before it is believed.

pub mod atomic;
pub mod manifest;
