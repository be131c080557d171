//! The serial port (16550) that is the guest's console. Its output is kept in a ring: the newest lines tell why a boot failed.
//!
//! What the guest writes is never trusted, never logged as it comes and costs bounded memory.

use std::{
    collections::VecDeque,
    io::{self, Write},
    os::fd::OwnedFd,
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use vm_superio::{
    Serial, Trigger,
    serial::{NoEvents, SerialState},
};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of output that are kept. A control message has room for them even if each has to be escaped.
const RING_BYTES: usize = 8 * 1024;
/// Interrupt enable register: transmitter empty.
const IER_THR_EMPTY: u8 = 2;

/// The newest output.
#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// A copy goes there, if somebody looks at it (tests, debugging).
    copy: Option<Arc<OwnedFd>>,
}

impl Write for Ring {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let newest = &bytes[bytes.len().saturating_sub(RING_BYTES)..];
        let over = (self.bytes.len() + newest.len()).saturating_sub(RING_BYTES);
        self.bytes.drain(..over);
        self.bytes.extend(newest);
        if let Some(copy) = &self.copy {
            // The console is not worth an error.
            let _ = rustix::io::write(copy, bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An interrupt line.
#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The port's registers in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSerial {
    registers: [u8; 9],
    input: Vec<u8>,
}

/// The port.
pub struct Console {
    serial: Serial<Line, NoEvents, Ring>,
}

impl Console {
    /// `line` is the irqfd of [`crate::arch::layout::COM1_GSI`].
    pub fn new(line: EventFd) -> Self {
        Self { serial: Serial::new(Line(line), Ring::default()) }
    }

    /// Sends a copy of all output there.
    pub fn copy_to(&mut self, copy: Arc<OwnedFd>) {
        self.serial.writer_mut().copy = Some(copy);
    }

    /// Reads register 0 to 7.
    pub fn read(&mut self, register: u8) -> u8 {
        self.serial.read(register)
    }

    /// Writes register 0 to 7.
    pub fn write(&mut self, register: u8, value: u8) {
        // The ring takes everything, and an interrupt that cannot be raised is pending already.
        let _ = self.serial.write(register, value);
    }

    /// The newest output, as text.
    pub fn text(&self) -> String {
        let (front, back) = self.serial.writer().bytes.as_slices();
        String::from_utf8_lossy(&[front, back].concat()).into_owned()
    }

    /// For a snapshot.
    pub fn save(&self) -> SavedSerial {
        let SerialState { baud_divisor_low, baud_divisor_high, interrupt_enable, interrupt_identification, line_control, line_status, modem_control, modem_status, scratch, in_buffer } =
            self.serial.state();
        SavedSerial {
            registers: [baud_divisor_low, baud_divisor_high, interrupt_enable, interrupt_identification, line_control, line_status, modem_control, modem_status, scratch],
            input: in_buffer,
        }
    }

    /// Takes a saved state. The interrupt controllers are restored already, since this may raise the line.
    pub fn restore(&mut self, saved: &SavedSerial) -> Result<(), &'static str> {
        let [baud_divisor_low, baud_divisor_high, interrupt_enable, interrupt_identification, line_control, line_status, modem_control, modem_status, scratch] = saved.registers;
        let state =
            SerialState { baud_divisor_low, baud_divisor_high, interrupt_enable, interrupt_identification, line_control, line_status, modem_control, modem_status, scratch, in_buffer: saved.input.clone() };
        let line = self.serial.interrupt_evt().0.try_clone().map_err(|_| "the host has no more descriptors")?;
        let ring = std::mem::take(self.serial.writer_mut());
        self.serial = Serial::from_state(&state, Line(line), NoEvents, ring).map_err(|_| "the serial port's input is longer than its buffer")?;
        // A driver in the middle of a transmission waits for "transmitter empty". Its edge may have been lost with the old
        // process; one too many is harmless.
        if interrupt_enable & IER_THR_EMPTY != 0 {
            let _ = self.serial.interrupt_evt().trigger();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console() -> (Console, EventFd) {
        let line = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        (Console::new(line.try_clone().unwrap()), line)
    }

    #[test]
    fn only_the_newest_output_is_kept() {
        let (mut console, _line) = console();
        for byte in (0..RING_BYTES + 3).map(|n| b'a' + (n % 26) as u8) {
            console.write(0, byte);
        }
        let text = console.text();
        assert_eq!(text.len(), RING_BYTES);
        assert!(text.starts_with("defg"));
    }

    #[test]
    fn a_restored_port_is_the_same_and_wakes_its_driver() {
        let (mut console, _line) = console();
        console.write(1, IER_THR_EMPTY);
        console.write(7, 0x5a);
        let saved = console.save();
        let (mut other, line) = self::console();
        other.restore(&saved).unwrap();
        assert_eq!((other.read(7), other.save()), (0x5a, saved.clone()));
        assert!(line.read().unwrap() > 0);
        assert!(other.restore(&SavedSerial { input: vec![0; 100], ..saved }).is_err());
    }
}
