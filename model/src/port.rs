//! Guest ports, the doors of a guest, and the scope of ports that a token opens.

use std::{fmt, num::NonZeroU16, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::ids::ParseIdError;

/// A TCP port in a guest, 1–65535.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Port(NonZeroU16);

impl Port {
    /// Where a request goes that names no port (aws-behaviour §1.2).
    pub const DEFAULT: Self = Self(NonZeroU16::new(8080).unwrap());

    /// `None` for 0.
    pub const fn new(number: u16) -> Option<Self> {
        match NonZeroU16::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for Port {
    type Err = ParseIdError;
    /// Takes 1–5 ASCII digits without a leading zero, sign or blank, in 1–65535 (cases.md 7).
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let wrong = ParseIdError { text: text.chars().take(80).collect(), wanted: "a port (a decimal number from 1 to 65535)" };
        if !(1..=5).contains(&text.len()) || text.starts_with('0') || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong);
        }
        text.parse::<u16>().ok().and_then(Self::new).ok_or(wrong)
    }
}

/// What in a guest a stream leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Door {
    /// What the app listens on.
    Port(Port),
    /// A shell of the guest agent's, which speaks WebSocket (aws-behaviour §2.1).
    Shell,
    /// A way out: the agent says on it where to.
    Egress,
}

impl From<Port> for Door {
    fn from(port: Port) -> Self {
        Self::Port(port)
    }
}

/// An inclusive range of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRange {
    /// The lowest port in it.
    pub first: Port,
    /// The highest port in it, not below `first`.
    pub last: Port,
}

/// The set of guest ports that a token opens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortScope {
    /// Every port.
    All,
    /// Only these.
    Ranges(Vec<PortRange>),
}

impl PortScope {
    /// A scope of one port.
    pub fn single(port: Port) -> Self {
        Self::Ranges(vec![PortRange { first: port, last: port }])
    }

    /// Whether the scope holds `port`.
    pub fn allows(&self, port: Port) -> bool {
        match self {
            Self::All => true,
            Self::Ranges(ranges) => ranges.iter().any(|range| (range.first..=range.last).contains(&port)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(number: u16) -> Port {
        Port::new(number).unwrap()
    }

    #[test]
    fn only_plain_decimal_ports_are_ports() {
        for (text, number) in [("1", 1), ("8080", 8080), ("65535", 65535)] {
            assert_eq!(text.parse(), Ok(port(number)));
        }
        for bad in ["", "0", "65536", "-1", "+8080", "08080", " 8080", "8080 ", "0x1f90", "8080,9000", "8080@10.0.0.1", "８０８０", "99999", "123456"] {
            assert!(bad.parse::<Port>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_scope_holds_its_edges_and_nothing_beyond() {
        let scope = PortScope::Ranges(vec![PortRange { first: port(3000), last: port(3005) }, PortRange { first: port(80), last: port(80) }]);
        for inside in [3000, 3003, 3005, 80] {
            assert!(scope.allows(port(inside)));
        }
        for outside in [2999, 3006, 79, 81, 65535, 1] {
            assert!(!scope.allows(port(outside)));
        }
        assert!(PortScope::All.allows(port(65535)));
        assert!(!PortScope::Ranges(vec![]).allows(port(8080)));
    }
}
