//! How many open files the process may have, and how many connections that carries.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a connection takes: its socket, and a second descriptor to watch the client while its request is held.
const PER_CONNECTION: u64 = 2;

/// Raises the soft limit of open files to the hard one; returns what is in force then. To be called once, before many are
/// open: a program's default of 1,024 carries a few hundred connections.
pub fn raise_limit() -> rustix::io::Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    }
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

/// How many connections of clients the limit of open files carries.
pub(crate) fn connections() -> usize {
    carried_by(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX))
}

/// A quarter stays for everything else: held streams of HTTP/2 beyond one for each connection, the microVMs' own channels
/// and files, the control API, builds.
fn carried_by(limit: u64) -> usize {
    usize::try_from((limit - limit / 4) / PER_CONNECTION).unwrap_or(usize::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_connections_as_the_limit_carries() {
        for (limit, connections) in [(1_024, 384), (20_000, 7_500), (1_048_576, 393_216), (0, 1)] {
            assert_eq!(carried_by(limit), connections);
        }
    }

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let before = getrlimit(Resource::Nofile);
        let in_force = raise_limit().unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX), in_force);
        assert_eq!(getrlimit(Resource::Nofile).maximum, before.maximum);
    }
}
