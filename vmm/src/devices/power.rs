//! Turning off, resetting, the power button and the VMGenID's notice: the few registers that our ACPI tables speak of.
//!
//! ```text
//! SLEEP_CONTROL  w: SLP_EN | SLP_TYPx turns the machine off      (ACPI 6.5 §4.8.3.7)
//! SLEEP_STATUS   r: 0
//! RESET          w: RESET_VALUE resets
//! ACPI_EVENTS    r: which events happened since it was last read
//! ```

use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// What the kernel writes to reset.
pub const RESET_VALUE: u8 = 0x42;
/// What `_S5` tells the kernel to write as SLP_TYPx.
pub const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;
/// Bit of the event register: the power button was pressed.
pub const EVENT_BUTTON: u8 = 1;
/// Bit of the event register: the VMGenID is new.
pub const EVENT_GENERATION: u8 = 2;

/// The registers.
#[derive(Debug)]
pub struct Power {
    events: AtomicU8,
    line: EventFd,
}

impl Power {
    /// `line` is the irqfd of [`crate::arch::layout::ACPI_GSI`].
    pub fn new(line: EventFd) -> Self {
        Self { events: AtomicU8::new(0), line }
    }

    /// Lets an event happen.
    pub fn raise(&self, event: u8) {
        self.events.fetch_or(event, Ordering::SeqCst);
        // Full means that it is pending anyway.
        let _ = self.line.write(1);
    }

    /// The guest reads the event register.
    pub fn take(&self) -> u8 {
        self.events.swap(0, Ordering::SeqCst)
    }

    /// Events that were not read, for a snapshot.
    pub fn pending(&self) -> u8 {
        self.events.load(Ordering::SeqCst)
    }

    /// Whether what was written to the sleep control register turns the machine off.
    pub fn turns_off(value: u8) -> bool {
        value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_OFF
    }
}
