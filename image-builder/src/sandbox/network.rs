//! The network of a sandbox: the host's, none, or one of its own that leads to the internet.
//!
//! Owns: what slirp4netns, `ip` and the resolver are told. Never decides who gets which.
//!
//! A network of its own is a namespace whose only card is the end of a tap device; slirp4netns, which has the host's network, holds
//! the other end and makes connections for it as an ordinary process. What is closed (`EgressPolicy`) is closed by routes that
//! lead nowhere. RUN steps cannot change them: buildah leaves them neither CAP_NET_ADMIN nor, as [`super`]'s callers ask, CAP_NET_RAW,
//! with which packets could be made past every route. A socket bound to the card is no way around either: the kernel then
//! takes the address for a neighbour, and slirp4netns answers for no neighbour but its own two.

use std::{io, net::Ipv4Addr, path::Path};

use tokio::process::Command;
use vmm_runtime::EgressPolicy;

use super::{PATH, SandboxError};

/// slirp4netns's defaults (its manual page): the network between it and the namespace, and who it is there.
const GATEWAY: &str = "10.0.2.2";
const RESOLVER: &str = "10.0.2.3";
/// Asked for by our processes in a namespace of their own; everything else there goes to the host's own name servers.
const OWN_NETWORK: [u8; 3] = [10, 0, 2];

/// Which network a job has.
#[derive(Debug, Clone)]
pub(crate) enum Network<'a> {
    /// The host's.
    Host,
    /// None but a loopback of its own.
    Nothing,
    /// The internet, as far as the policy goes.
    Internet(&'a EgressPolicy),
}

impl Network<'_> {
    /// What the sandbox's script is told.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Nothing => "none",
            Self::Internet(_) => "internet",
        }
    }

    /// Writes what the sandbox's script needs into `dir`: `routes`, for `ip -batch`, and `resolv.conf`.
    pub(super) async fn prepare(&self, dir: &Path) -> Result<(), SandboxError> {
        let Self::Internet(policy) = self else { return Ok(()) };
        let write = |name: &str, text: String| {
            std::fs::write(dir.join(name), text).map_err(|source| SandboxError::Io { doing: format!("writing {name} of the sandbox"), source })
        };
        write("routes", routes(policy, &own_addresses().await?))?;
        // Without one the host knows no names either.
        write("resolv.conf", resolver(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default()))
    }
}

/// Commands for `ip -batch`.
fn routes(policy: &EgressPolicy, own: &[Ipv4Addr]) -> String {
    let mut lines: Vec<String> = policy.closed().iter().map(|network| format!("route replace unreachable {network}")).collect();
    // Its own network stays as it is: nobody answers there but slirp4netns.
    let is_between = |address: Ipv4Addr| address.octets()[..3] == OWN_NETWORK;
    let own = own.iter().filter(|address| !is_between(**address) && !policy.also.iter().any(|open| open.contains(&std::net::IpAddr::V4(**address))));
    lines.extend(own.map(|address| format!("route replace unreachable {address}")));
    for open in &policy.also {
        if let (std::net::IpAddr::V4(address), prefix) = (open.network(), open.prefix_len())
            && !(is_between(address) && prefix >= 24)
            && !address.is_loopback()
        {
            lines.push(format!("route replace {address}/{prefix} via {GATEWAY}"));
        }
    }
    lines.push(String::new());
    lines.join("\n")
}

/// The resolver's file: names are asked of slirp4netns, which asks as the host would; how they are completed stays as on the host.
fn resolver(hosts: &str) -> String {
    let kept = hosts.lines().filter(|line| ["search", "domain", "options"].contains(&line.split_whitespace().next().unwrap_or_default()));
    let lines: Vec<String> = std::iter::once(format!("nameserver {RESOLVER}")).chain(kept.map(str::to_owned)).chain([String::new()]).collect();
    lines.join("\n")
}

/// Addresses of this host. A listener of the node may be behind each, public as it may be.
async fn own_addresses() -> Result<Vec<Ipv4Addr>, SandboxError> {
    let failed = |source| SandboxError::Io { doing: "asking ip(8) for the addresses of this host".to_owned(), source };
    let output = Command::new("ip").args(["-4", "-json", "address", "show"]).env("PATH", PATH).kill_on_drop(true).output().await.map_err(failed)?;
    if !output.status.success() {
        return Err(failed(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned())));
    }
    addresses(&output.stdout).map_err(|error| failed(io::Error::other(error)))
}

pub(super) fn addresses(json: &[u8]) -> Result<Vec<Ipv4Addr>, serde_json::Error> {
    #[derive(serde::Deserialize)]
    struct Card {
        #[serde(default)]
        addr_info: Vec<Address>,
    }
    #[derive(serde::Deserialize)]
    struct Address {
        local: Option<Ipv4Addr>,
    }
    let cards: Vec<Card> = serde_json::from_slice(json)?;
    Ok(cards.into_iter().flat_map(|card| card.addr_info).filter_map(|address| address.local).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(also: &[&str]) -> EgressPolicy {
        EgressPolicy { also: also.iter().map(|network| network.parse().unwrap()).collect(), ..EgressPolicy::default() }
    }

    #[test]
    fn what_is_closed_and_what_is_the_hosts_leads_nowhere() {
        let own = ["127.0.0.1", "203.0.113.9", "10.0.2.15"].map(|address| address.parse().unwrap());
        let text = routes(&policy(&[]), &own);
        for line in ["route replace unreachable 169.254.0.0/16", "route replace unreachable 10.0.0.0/8", "route replace unreachable 203.0.113.9"] {
            assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("10.0.2.") && !text.contains("via") && text.ends_with('\n'), "{text}");
    }

    #[test]
    fn the_operator_opens_more_but_not_what_holds_the_namespace_up() {
        let text = routes(&policy(&["10.1.0.0/16", "192.168.0.0/15", "203.0.113.0/28", "10.0.2.0/24", "127.0.0.9/32", "fd00::/8"]), &["203.0.113.9".parse().unwrap()]);
        let opened: Vec<&str> = text.lines().filter(|line| line.contains("via")).collect();
        assert_eq!(opened, ["10.1.0.0/16", "192.168.0.0/15", "203.0.113.0/28"].map(|network| format!("route replace {network} via 10.0.2.2")));
        assert!(!text.contains("unreachable 192.168.0.0/16") && !text.contains("unreachable 203.0.113.9"), "{text}");
    }

    #[test]
    fn names_are_asked_of_slirp_alone() {
        let hosts = "# by hand\nnameserver 127.0.0.53\nsearch example.org\noptions edns0 trust-ad\n";
        assert_eq!(resolver(hosts), "nameserver 10.0.2.3\nsearch example.org\noptions edns0 trust-ad\n");
        assert_eq!(resolver(""), "nameserver 10.0.2.3\n");
    }

    #[test]
    fn addresses_are_read_of_what_ip_prints() {
        let json = br#"[{"ifname":"lo","addr_info":[{"family":"inet","local":"127.0.0.1","prefixlen":8}]},{},{"addr_info":[{"local":"192.0.2.2"},{}]}]"#;
        assert_eq!(addresses(json).unwrap(), [Ipv4Addr::LOCALHOST, Ipv4Addr::new(192, 0, 2, 2)]);
        assert!(addresses(b"{").is_err());
    }
}
