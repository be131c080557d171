//! Which guest port a request asks for: `X-aws-proxy-port` → subprotocol (aws-behaviour §1.2).

use http::HeaderMap;
use model::Port;

use crate::{headers::PORT_FIELD, reply::Reason, websocket::Offer};

/// The port that stands for a shell, where a client names one at all (aws-behaviour §2.1). Nothing listens there for it.
pub(crate) const SHELL: Port = Port::new(8022).expect("it is not 0");

/// The port asked for, if one is. The text is taken strictly: a malformed or doubled one is refused, also where another source would
/// have won, so that no two readers of one request can disagree about its port.
pub(crate) fn requested(headers: &HeaderMap, offer: Option<&Offer>) -> Result<Option<Port>, Reason> {
    let mut fields = headers.get_all(&PORT_FIELD).iter().map(|value| value.to_str().map_err(|_| Reason::PortMalformed));
    let field = fields.next().transpose()?;
    if fields.next().is_some() {
        return Err(Reason::PortMalformed);
    }
    let offered = match offer.map(|offer| offer.ports.as_slice()) {
        None | Some([]) => None,
        Some([port]) => Some(port.as_str()),
        Some(_) => return Err(Reason::PortMalformed),
    };
    let parse = |text: Option<&str>| text.map(|text| text.parse::<Port>().map_err(|_| Reason::PortMalformed)).transpose();
    let (field, offered) = (parse(field)?, parse(offered)?);
    Ok(field.or(offered))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn check(fields: &[&[u8]], offered: &[&str], expected: Result<Option<u16>, Reason>) {
        let mut headers = HeaderMap::new();
        for field in fields {
            headers.append(&PORT_FIELD, HeaderValue::from_bytes(field).unwrap());
        }
        let offer = Offer { ports: offered.iter().map(|port| (*port).to_owned()).collect(), ..Offer::default() };
        assert_eq!(requested(&headers, Some(&offer)).map(|port| port.map(Port::get)), expected, "{fields:?} {offered:?}");
    }

    #[test]
    fn the_field_wins_over_the_subprotocol() {
        check(&[], &[], Ok(None));
        check(&[], &["3000"], Ok(Some(3000)));
        check(&[b"9000"], &["3000"], Ok(Some(9000)));
        check(&[b"65535"], &[], Ok(Some(65535)));
        assert_eq!(requested(&HeaderMap::new(), None), Ok(None));
    }

    #[test]
    fn abuse_of_the_text_is_refused() {
        for bad in ["", "0", "65536", "-1", "+8080", "08080", "0x1f90", "8080,9000", "8080@10.0.0.1", "8080;", "٨٠٨٠"] {
            check(&[bad.as_bytes()], &[], Err(Reason::PortMalformed));
            check(&[], &[bad], Err(Reason::PortMalformed));
            check(&[b"8080"], &[bad], Err(Reason::PortMalformed));
        }
        check(&[b"\xff"], &[], Err(Reason::PortMalformed));
        check(&[b"8080", b"8080"], &[], Err(Reason::PortMalformed));
        check(&[], &["8080", "8080"], Err(Reason::PortMalformed));
    }
}
