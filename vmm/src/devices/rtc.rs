//! The real-time clock of a PC (MC146818) as far as a kernel reads it at boot: the time of day in UTC, no alarm, no interrupt.
//!
//! Without it, or with one that never says it is not updating, Linux waits five seconds in its start (kernel: `mach_get_cmos_time`).

use std::time::{SystemTime, UNIX_EPOCH};

/// Index port; the data port follows.
pub const INDEX_PORT: u16 = 0x70;
/// See [`INDEX_PORT`].
pub const DATA_PORT: u16 = 0x71;

const REGISTERS: usize = 128;
/// Register A: divider of the oscillator, no update in progress.
const A: u8 = 0x26;
/// Register B: 24 hours, binary numbers.
const B: u8 = 0x06;
/// Register D: the battery is good.
const D: u8 = 0x80;

/// The clock. Registers that are not the time hold what was written to them.
#[derive(Debug, Clone)]
pub struct Rtc {
    index: u8,
    registers: [u8; REGISTERS],
}

impl Default for Rtc {
    fn default() -> Self {
        Self { index: 0, registers: [0; REGISTERS] }
    }
}

impl Rtc {
    /// Chooses a register; bit 7 would mask NMIs.
    pub fn select(&mut self, index: u8) {
        self.index = index & 0x7f;
    }

    /// Reads the register.
    pub fn read(&self) -> u8 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.read_at(now)
    }

    fn read_at(&self, unix_secs: u64) -> u8 {
        let (year, month, day) = civil(unix_secs / 86_400);
        let second = unix_secs % 86_400;
        let number = match self.index {
            0x00 => second % 60,
            0x02 => second / 60 % 60,
            0x04 => second / 3600,
            // The first of January 1970 was a Thursday, which is 5.
            0x06 => (unix_secs / 86_400 + 4) % 7 + 1,
            0x07 => day,
            0x08 => month,
            0x09 => year % 100,
            0x32 => year / 100,
            0x0a => u64::from(A),
            0x0b => u64::from(B),
            0x0c => 0,
            0x0d => u64::from(D),
            index => u64::from(self.registers[usize::from(index)]),
        };
        number as u8
    }

    /// Writes the register. The time cannot be set: it is the host's.
    pub fn write(&mut self, value: u8) {
        self.registers[usize::from(self.index)] = value;
    }

    /// Chosen register, for a snapshot; what the registers hold is of no use to anybody.
    pub fn selected(&self) -> u8 {
        self.index
    }
}

/// Year, month and day of a day since 1970, in the Gregorian calendar.
fn civil(day: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // 400 years have 146,097 days. 1970 is 30 years before a year that begins such a span, so count from 1600.
    const FROM_1600_TO_1970: u64 = 135_140;
    let mut left = day + FROM_1600_TO_1970;
    let mut year = 1600 + left / 146_097 * 400;
    left %= 146_097;
    loop {
        let days = if leap(year) { 366 } else { 365 };
        if left < days {
            break;
        }
        left -= days;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if left < days {
            break;
        }
        left -= days;
        month += 1;
    }
    (year, month, left + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(unix_secs: u64, index: u8) -> u8 {
        let mut rtc = Rtc::default();
        rtc.select(index | 0x80);
        rtc.read_at(unix_secs)
    }

    #[test]
    fn the_time_of_day_is_right() {
        // date -u -d @1709251199: Thu Feb 29 23:59:59 2024.
        let at = 1_709_251_199;
        assert_eq!([0, 2, 4, 6, 7, 8, 9, 0x32].map(|index| read(at, index)), [59, 59, 23, 5, 29, 2, 24, 20]);
        // One second later: Fri Mar  1 00:00:00 2024.
        assert_eq!([0, 2, 4, 6, 7, 8, 9, 0x32].map(|index| read(at + 1, index)), [0, 0, 0, 6, 1, 3, 24, 20]);
        assert_eq!([7, 8, 9, 0x32].map(|index| read(0, index)), [1, 1, 70, 19]);
    }

    #[test]
    fn it_never_updates_and_other_registers_are_memory() {
        assert_eq!(read(0, 0x0a) & 0x80, 0);
        let mut rtc = Rtc::default();
        rtc.select(0x40);
        rtc.write(7);
        assert_eq!(rtc.read(), 7);
    }
}
