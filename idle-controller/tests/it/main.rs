//! The controller as its users see it, over the loopback engine: real registry, real files, driven time.

mod failures;
mod hooks;
mod lifecycle;
mod requests;
mod restart;
mod storm;
mod support;
