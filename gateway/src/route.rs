//! Which endpoint a request names: Host or `:authority` → endpoint id.
//!
//! Never looks an endpoint up, so that no answer given here can depend on which microVMs exist.

use http::{HeaderMap, Uri, header};
use model::EndpointId;

/// The endpoint that a request names. `None` inside: the host is not of the form `<uuid>.<suffix>`, which is treated as
/// an endpoint of no microVM all the way down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route(Option<EndpointId>);

impl Route {
    /// Reads the authority of a request target (HTTP/2, or absolute form), else the Host field. That the two agree and
    /// that there is one Host was checked when the request was parsed.
    pub fn of(uri: &Uri, headers: &HeaderMap, suffix: &str) -> Self {
        let host = uri.authority().map(|authority| authority.as_str()).or_else(|| headers.get(header::HOST)?.to_str().ok());
        Self(host.and_then(|host| endpoint(host, suffix)))
    }

    /// The endpoint, if the host has the form of one.
    pub fn endpoint(self) -> Option<EndpointId> {
        self.0
    }
}

/// Case, one trailing dot and the port do not count (aws-behaviour §12).
fn endpoint(host: &str, suffix: &str) -> Option<EndpointId> {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if (1..=5).contains(&port.len()) && port.bytes().all(|b| b.is_ascii_digit()) => name,
        Some(_) => return None,
        None => host,
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    let (label, end) = name.split_at_checked(name.len().checked_sub(suffix.len())?)?;
    if !end.eq_ignore_ascii_case(suffix) {
        return None;
    }
    label.strip_suffix('.')?.to_ascii_lowercase().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_host() {
        let id = EndpointId::random();
        let upper = id.to_string().to_uppercase();
        for host in [
            format!("{id}.microvm.localhost"),
            format!("{id}.microvm.localhost:8443"),
            format!("{id}.microvm.localhost."),
            format!("{id}.microvm.localhost.:443"),
            format!("{upper}.MicroVM.LocalHost"),
        ] {
            assert_eq!(endpoint(&host, "microvm.localhost"), Some(id), "{host}");
        }
    }

    #[test]
    fn what_is_not_an_endpoint() {
        let id = EndpointId::random();
        for host in [
            String::new(),
            "microvm.localhost".into(),
            ".microvm.localhost".into(),
            format!("{id}"),
            format!("{id}microvm.localhost"),
            format!("{id}.microvm.localhost.."),
            format!("{id}.microvm.localhost:"),
            format!("{id}.microvm.localhost:x"),
            format!("{id}.microvm.localhost:123456"),
            format!("{id}.evil.localhost"),
            format!("a.{id}.microvm.localhost"),
            format!("user@{id}.microvm.localhost"),
            format!("{id}.microvm.localhost,other"),
            format!("{id}.microvm.localhost/path"),
            "127.0.0.1:8443".into(),
            "[::1]:8443".into(),
            "ä.microvm.localhost".into(),
        ] {
            assert_eq!(endpoint(&host, "microvm.localhost"), None, "{host}");
        }
    }

    #[test]
    fn the_authority_of_the_target_wins_over_host() {
        let (a, b) = (EndpointId::random(), EndpointId::random());
        let uri: Uri = format!("https://{a}.microvm.localhost/x").parse().unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, format!("{b}.microvm.localhost").parse().unwrap());
        assert_eq!(Route::of(&uri, &headers, "microvm.localhost").endpoint(), Some(a));
        assert_eq!(Route::of(&"/x".parse().unwrap(), &headers, "microvm.localhost").endpoint(), Some(b));
        assert_eq!(Route::of(&"/x".parse().unwrap(), &HeaderMap::new(), "microvm.localhost").endpoint(), None);
    }
}
