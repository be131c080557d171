//! The devices behind their transport, driven as Linux drives them, and as an attacker would.

mod balloon;
mod block;
mod hostile;
mod layers;
mod net;
mod rig;
mod rng;
mod transport;
