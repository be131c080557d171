//! Devices of a PC that are not virtio, and the map of ports and addresses to all devices.
//!
//! Owns: the serial port, the RTC, reset and power, and the dispatch of every exit. Never reads guest memory except to write
//! the VMGenID and to show code in an error message.

pub mod bus;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod vmgenid;
