//! What a guest says on a stream that leads out of it, and what the host answers.
//!
//! ```text
//! host   opens a stream to the door Egress and waits                (a few such streams wait all the time)
//! guest  a header: where to                                          host   one byte: an Answer
//! then, if it is Open, the bytes of the connection both ways, with half-close; a reset is a reset
//! ```
//! Names are asked for in the form that DNS has over TCP: each message behind its length (RFC 1035 §4.2.2).

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 19;

const TCP: u8 = 1;
const NAMES: u8 = 2;

/// What a guest wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// A TCP connection to this address.
    Tcp(SocketAddr),
    /// Answers of a name server.
    Names,
}

impl Wanted {
    /// The header.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let (kind, address) = match self {
            Self::Tcp(address) => (TCP, address),
            Self::Names => (NAMES, SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))),
        };
        let octets = match address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = kind;
        bytes[1..17].copy_from_slice(&octets);
        bytes[17..].copy_from_slice(&address.port().to_be_bytes());
        bytes
    }

    /// `None`: no guest agent of ours says this.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let mut octets = [0; 16];
        octets.copy_from_slice(&bytes[1..17]);
        let address = SocketAddr::new(Ipv6Addr::from(octets).to_canonical(), u16::from_be_bytes([bytes[17], bytes[18]]));
        match bytes[0] {
            TCP => Some(Self::Tcp(address)),
            NAMES => Some(Self::Names),
            _ => None,
        }
    }
}

/// What the host answers to a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Answer {
    /// There it is.
    Open = 0,
    /// The host lets no guest there.
    Forbidden = 1,
    /// It cannot be reached.
    Failed = 2,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn headers_come_back() {
        for wanted in [
            Wanted::Names,
            Wanted::Tcp("1.2.3.4:443".parse().unwrap()),
            Wanted::Tcp("[2001:db8::1]:65535".parse().unwrap()),
        ] {
            assert_eq!(Wanted::from_bytes(&wanted.to_bytes()), Some(wanted));
        }
        // One address has one form, so that nobody gets past a rule about it in another.
        let mapped = Wanted::Tcp("[::ffff:127.0.0.1]:80".parse().unwrap());
        assert_eq!(Wanted::from_bytes(&mapped.to_bytes()), Some(Wanted::Tcp("127.0.0.1:80".parse().unwrap())));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_or_none(bytes: [u8; HEADER_BYTES]) {
            if let Some(wanted) = Wanted::from_bytes(&bytes) {
                prop_assert!(matches!(bytes[0], TCP | NAMES));
                if bytes[0] == TCP {
                    prop_assert_eq!(Wanted::from_bytes(&wanted.to_bytes()), Some(wanted));
                }
            }
        }
    }
}
