//! Where guests may connect to. Pure, but for one look at how the kernel would send a packet.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    sync::LazyLock,
};

use ipnet::{IpNet, Ipv4Net};

/// What no guest reaches unless the operator says so: this host, its links, private networks, and what is no unicast address
/// (IANA's special-purpose registry). Documentation's networks lead nowhere anyway.
static CLOSED: LazyLock<Vec<Ipv4Net>> = LazyLock::new(|| {
    [
        ("0.0.0.0", 8),
        ("10.0.0.0", 8),
        ("100.64.0.0", 10),
        ("127.0.0.0", 8),
        // Also the metadata services of clouds.
        ("169.254.0.0", 16),
        ("172.16.0.0", 12),
        ("192.0.0.0", 24),
        ("192.88.99.0", 24),
        ("192.168.0.0", 16),
        ("198.18.0.0", 15),
        ("224.0.0.0", 4),
        ("240.0.0.0", 4),
    ]
    .into_iter()
    .map(|(address, prefix)| Ipv4Net::new(address.parse::<Ipv4Addr>().expect("an address"), prefix).expect("a prefix of IPv4"))
    .collect()
});

/// Where guests with internet egress may connect to, and whom they ask for names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EgressPolicy {
    /// Networks that are open although they are private or the host's own.
    pub also: Vec<IpNet>,
    /// Name servers; empty: those of the host's `/etc/resolv.conf`.
    pub name_servers: Vec<SocketAddr>,
}

impl EgressPolicy {
    /// What is closed whatever host this is, but for networks that the operator has opened as a whole. The host's own addresses
    /// come on top.
    pub fn closed(&self) -> Vec<Ipv4Net> {
        let opened = |network: &Ipv4Net| self.also.iter().any(|open| open.contains(&IpNet::V4(*network)));
        CLOSED.iter().filter(|network| !opened(network)).copied().collect()
    }

    /// Whether a guest may connect there.
    pub fn allows(&self, ip: IpAddr) -> bool {
        if self.also.iter().any(|network| network.contains(&ip)) {
            return true;
        }
        match ip {
            IpAddr::V4(ip) => !CLOSED.iter().any(|network| network.contains(&ip)) && !is_own(ip),
            // Guests have no route for IPv6, and an agent that asks for one is not ours.
            IpAddr::V6(_) => false,
        }
    }
}

/// Whether this host itself has the address, public as it may be: a listener of the node's is behind it, too. Then the kernel would
/// send from the very address it sends to. It is asked without a packet. An address that cannot be reached is nobody's.
fn is_own(ip: Ipv4Addr) -> bool {
    let from = || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((ip, 9))?;
        socket.local_addr()
    };
    from().is_ok_and(|from| from.ip() == IpAddr::V4(ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(policy: &EgressPolicy, addresses: &[&str], expected: bool) {
        for address in addresses {
            assert_eq!(policy.allows(address.parse().unwrap()), expected, "{address}");
        }
    }

    #[test]
    fn the_internet_is_open_and_the_neighbourhood_is_not() {
        let policy = EgressPolicy::default();
        check(&policy, &["1.1.1.1", "93.184.216.34", "9.255.255.255", "11.0.0.1", "172.15.255.255", "172.32.0.1", "192.167.1.1", "223.255.255.254"], true);
        let closed = [
            "127.0.0.1", "127.255.255.255", "0.0.0.0", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "169.254.169.254",
            "100.64.0.1", "100.127.255.255", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "198.19.0.1", "::1", "2606:4700::1111", "fe80::1",
        ];
        check(&policy, &closed, false);
    }

    #[test]
    fn the_operator_opens_more() {
        let policy = EgressPolicy { also: vec!["10.1.0.0/16".parse().unwrap(), "127.0.0.9/32".parse().unwrap()], ..EgressPolicy::default() };
        check(&policy, &["10.1.2.3", "127.0.0.9"], true);
        check(&policy, &["10.2.0.1", "127.0.0.1"], false);
    }

    #[test]
    fn only_what_is_opened_as_a_whole_is_not_closed() {
        let policy = EgressPolicy { also: vec!["10.0.0.0/7".parse().unwrap(), "192.168.7.0/24".parse().unwrap()], ..EgressPolicy::default() };
        let closed: Vec<String> = policy.closed().iter().map(ToString::to_string).collect();
        assert!(!closed.contains(&"10.0.0.0/8".to_owned()) && closed.contains(&"192.168.0.0/16".to_owned()), "{closed:?}");
        assert_eq!(closed.len() + 1, EgressPolicy::default().closed().len());
    }

    #[test]
    fn an_address_of_this_host_is_its_own() {
        assert!(is_own(Ipv4Addr::LOCALHOST));
        assert!(!is_own(Ipv4Addr::new(192, 0, 2, 1)));
    }
}
