//! When each microVM sleeps, wakes and ends.
//!
//! Owns: the lifecycle (a pure machine), one driver task per microVM, the idle clock, the single-flight wake, the durable
//! registry, reconciliation at start. Never names Pingora, KVM, QEMU or HTTP; reaches microVMs through
//! [`vmm_runtime::engine::Engine`] only.
//!
//! ```text
//!  gateway, control API                                             engine
//!     │ MicrovmHandle::awake            (awake: past the driver)       ▲
//!     ├──────────────► activity gate ──────────────► Live { vm } ──────┤
//!     │ asks, kills                                                    │ operations, in child tasks
//!     └──────────────► driver ── event ──► machine ── effects ──► driver
//!                        │
//!                        └─► registry (durable first) ─► view (published after)
//! ```
//!
//! `machine/` decides, `driver.rs` does, `handle.rs` asks, `activity.rs` counts what happens meanwhile, `registry.rs`
//! remembers, `metering.rs` measures, `reconcile.rs` finds out what is true after a restart.
#![forbid(unsafe_code)]

mod activity;
mod controller;
pub mod database;
mod driver;
mod handle;
mod machine;
mod metering;
mod metrics;
mod operations;
mod reconcile;
mod registry;

pub use controller::{Controller, ControllerConfig, ControllerError, RunSpec};
pub use handle::{Awake, MicrovmHandle, MicrovmView, Refused, Unwoken, WakeReport};
