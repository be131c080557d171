//! An eventfd of a device's own: how a worker thread, or a device that stopped early, makes the event loop come back.

use std::{io, os::fd::OwnedFd};

use rustix::event::{EventfdFlags, epoll::EventFlags, eventfd};

use crate::device::Watch;

/// Rung from any thread; heard by the event loop as [`crate::device::VirtioDevice::ready`] with its token. Edge-triggered, so
/// it need not be read, and a ring that nobody wants to hear (the device is paused) does not keep the loop awake.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// Makes one and watches it for good.
    pub fn new(watch: &Watch, token: u32) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        watch.add(&event, token, EventFlags::IN | EventFlags::ET)?;
        Ok(Self(event))
    }

    /// Makes the event loop call `ready`.
    pub fn ring(&self) {
        // Refused only if the counter is full, which takes 2^64 rings.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}
