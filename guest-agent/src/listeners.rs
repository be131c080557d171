//! Which TCP ports something in the guest listens on, as the kernel lists them.

use std::{
    fs,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use model::Port;

const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// Waits until something listens on one of `exposed` (any port if it is empty). The first in that order wins.
pub(crate) async fn ready(exposed: &[Port], limit: Duration) -> Option<Port> {
    let since = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        // A kernel without IPv6 has no second list.
        let lists = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
        let mut listening = lists.iter().flat_map(|list| listening(list));
        let found = if exposed.is_empty() {
            listening.next()
        } else {
            let listening: Vec<_> = listening.collect();
            exposed.iter().copied().find(|port| listening.contains(port))
        };
        if found.is_some() || since.elapsed() >= limit {
            return found;
        }
        tokio::time::sleep(pause.min(limit.saturating_sub(since.elapsed()))).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// The local ports of a `/proc/net/tcp` list whose state is LISTEN (0A), but for the agent's own, which are link-local.
fn listening(list: &str) -> impl Iterator<Item = Port> {
    list.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, state) = (fields.next()?, fields.nth(1)?);
        let (address, port) = local.rsplit_once(':')?;
        // As the kernel prints an address: a number of the machine's byte order.
        if u32::from_str_radix(address, 16).is_ok_and(|number| Ipv4Addr::from(number.to_ne_bytes()).is_link_local()) {
            return None;
        }
        let port = u16::from_str_radix(port, 16).ok()?;
        if state == "0A" { Port::new(port) } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listening_sockets_count() {
        let v4 = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            \x20  0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n\
            \x20  1: 0100007F:0050 0100007F:ABCD 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 20 4 30 10 -1\n\
            \x20  2: rubbish\n\
            \x20  3: 3535FEA9:0001 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n";
        let v6 = "  sl  local_address                         remote_address                        st\n\
            \x20  0: 00000000000000000000000000000000:0BB8 00000000000000000000000000000000:0000 0A 0 0 0\n";
        assert_eq!(listening(v4).map(Port::get).collect::<Vec<_>>(), [8080]);
        assert_eq!(listening(v6).map(Port::get).collect::<Vec<_>>(), [3000]);
        assert_eq!(listening("").count(), 0);
    }
}
