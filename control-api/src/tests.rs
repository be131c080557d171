//! The whole API over a real socket: real controller over the loopback engine, real S3 store, images that a test builds
//! by saying so.

mod access;
mod artifacts;
mod bench;
mod by_hand;
mod calls;
mod extras;
mod images;
mod refusals;
mod tags;
