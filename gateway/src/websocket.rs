//! The WebSocket handshake: what is a real one, what the platform's subprotocols in it say, what a guest may answer.
//!
//! The three platform subprotocols (aws-behaviour §1.2): `lambda-microvms` (the base, mandatory with the others),
//! `lambda-microvms.authentication.<token>` and `lambda-microvms.port.<n>`. The app sees none of them; the client gets the
//! app's choice or, if the app made none, the base, because a browser fails a handshake in which it offered
//! subprotocols and got none back.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header};
use sha1::{Digest as _, Sha1};

use crate::reply::Reason;

/// The base subprotocol.
pub(crate) const BASE: &str = "lambda-microvms";

/// What a client offers in `Sec-WebSocket-Protocol`, taken apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Offer {
    /// Whether the base is offered.
    pub base: bool,
    /// The texts after `lambda-microvms.authentication.`.
    pub tokens: Vec<String>,
    /// The texts after `lambda-microvms.port.`.
    pub ports: Vec<String>,
    /// Everything that is not the platform's, in order.
    pub app: Vec<String>,
}

impl Offer {
    fn read(headers: &HeaderMap) -> Self {
        let mut offer = Self::default();
        let lists = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|list| list.to_str().ok());
        for protocol in lists.flat_map(|list| list.split(',')).map(str::trim).filter(|protocol| !protocol.is_empty()) {
            match platform(protocol) {
                None => offer.app.push(protocol.to_owned()),
                Some("") => offer.base = true,
                Some(rest) => match rest.split_once('.') {
                    Some((kind, token)) if kind.eq_ignore_ascii_case("authentication") => offer.tokens.push(token.to_owned()),
                    Some((kind, port)) if kind.eq_ignore_ascii_case("port") => offer.ports.push(port.to_owned()),
                    // The rest of the platform's name space is reserved as well: it does nothing and the app never sees it.
                    _ => {}
                },
            }
        }
        offer
    }

    /// The platform's subprotocols mean something only beside the base.
    pub fn check_base(&self) -> Result<(), Reason> {
        let used = !self.tokens.is_empty() || !self.ports.is_empty();
        if used && !self.base { Err(Reason::SubprotocolBaseMissing) } else { Ok(()) }
    }
}

/// What follows the base and its dot; `Some("")` for the base alone, `None` for an app's own protocol.
fn platform(protocol: &str) -> Option<&str> {
    let rest = protocol.get(BASE.len()..)?;
    if !protocol[..BASE.len()].eq_ignore_ascii_case(BASE) {
        return None;
    }
    if rest.is_empty() { Some("") } else { rest.strip_prefix('.') }
}

/// A real WebSocket handshake of a client (RFC 6455 §4.1).
#[derive(Debug, Clone)]
pub(crate) struct Handshake {
    /// What it offers.
    pub offer: Offer,
    accept: String,
}

impl Handshake {
    /// `None` if the request is not one: then it is a plain request, tokens in its subprotocols do not count, and no
    /// upgrade of it is forwarded.
    pub fn read(method: &Method, version: Version, headers: &HeaderMap) -> Option<Self> {
        let real = method == Method::GET
            && version == Version::HTTP_11
            && has_token(headers, header::CONNECTION, "upgrade")
            && sole(headers, header::UPGRADE).is_some_and(|upgrade| upgrade.eq_ignore_ascii_case("websocket"))
            && sole(headers, header::SEC_WEBSOCKET_VERSION) == Some("13")
            && !headers.contains_key(header::TRANSFER_ENCODING)
            && headers.get(header::CONTENT_LENGTH).is_none_or(|length| length == "0");
        if !real {
            return None;
        }
        let key = sole(headers, header::SEC_WEBSOCKET_KEY)?;
        let key_fits = STANDARD.decode(key).is_ok_and(|bytes| bytes.len() == 16);
        key_fits.then(|| Self { offer: Offer::read(headers), accept: accept(key) })
    }

    /// The `Sec-WebSocket-Protocol` the app reads; `None`: no such field.
    pub fn offer_to_app(&self) -> Option<HeaderValue> {
        (!self.offer.app.is_empty()).then(|| HeaderValue::from_str(&self.offer.app.join(", ")).ok()).flatten()
    }

    /// Checks the app's 101 and says which `Sec-WebSocket-Protocol` the client reads.
    pub fn answer(&self, headers: &HeaderMap) -> Result<Option<HeaderValue>, Reason> {
        if sole(headers, header::SEC_WEBSOCKET_ACCEPT) != Some(self.accept.as_str()) {
            return Err(Reason::UnexpectedUpgrade);
        }
        let mut choices = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
        match (choices.next(), choices.next()) {
            (Some(choice), None) => {
                let offered = self.offer.app.iter().any(|protocol| protocol.as_bytes() == choice.as_bytes().trim_ascii());
                if offered { Ok(Some(choice.clone())) } else { Err(Reason::SubprotocolNotOffered) }
            }
            (Some(_), Some(_)) => Err(Reason::SubprotocolNotOffered),
            (None, _) => Ok(self.offer.base.then(|| HeaderValue::from_static(BASE))),
        }
    }
}

/// Whether a guest's answer may pass: a 101 only where a handshake asked for it.
pub(crate) fn check_switch(status: StatusCode, handshake: Option<&Handshake>) -> Result<(), Reason> {
    if status == StatusCode::SWITCHING_PROTOCOLS && handshake.is_none() { Err(Reason::UnexpectedUpgrade) } else { Ok(()) }
}

fn accept(key: &str) -> String {
    // The GUID of RFC 6455 §1.3.
    let digest = Sha1::new().chain_update(key).chain_update("258EAFA5-E914-47DA-95CA-C5AB0DC85B11").finalize();
    STANDARD.encode(digest)
}

fn sole(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value.trim())
}

fn has_token(headers: &HeaderMap, name: header::HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|item| item.trim().eq_ignore_ascii_case(token))
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;

    const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

    fn map(fields: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn handshake(protocols: &[&str]) -> Handshake {
        let mut headers =
            map(&[("connection", "keep-alive, Upgrade"), ("upgrade", "WebSocket"), ("sec-websocket-version", "13"), ("sec-websocket-key", KEY)]);
        for list in protocols {
            headers.append(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_str(list).unwrap());
        }
        Handshake::read(&Method::GET, Version::HTTP_11, &headers).expect("a real handshake")
    }

    #[test]
    fn the_key_of_the_rfc_gives_its_accept() {
        assert_eq!(accept(KEY), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn what_is_not_a_handshake() {
        let good = [("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-version", "13"), ("sec-websocket-key", KEY)];
        let is = |method: &Method, version, fields: &[(&str, &str)]| Handshake::read(method, version, &map(fields)).is_some();
        assert!(is(&Method::GET, Version::HTTP_11, &good));
        assert!(!is(&Method::POST, Version::HTTP_11, &good));
        assert!(!is(&Method::GET, Version::HTTP_10, &good));
        assert!(!is(&Method::GET, Version::HTTP_2, &good));
        for place in 0..good.len() {
            let mut fields = good.to_vec();
            fields.remove(place);
            assert!(!is(&Method::GET, Version::HTTP_11, &fields), "without {:?}", good[place]);
        }
        for (place, other) in [(0, "close"), (1, "h2c"), (2, "8"), (3, "c2hvcnQ="), (3, "not base64")] {
            let mut fields = good.to_vec();
            fields[place].1 = other;
            assert!(!is(&Method::GET, Version::HTTP_11, &fields), "{other}");
        }
        for extra in [("content-length", "5"), ("transfer-encoding", "chunked"), ("upgrade", "h2c"), ("sec-websocket-key", KEY)] {
            assert!(!is(&Method::GET, Version::HTTP_11, &[&good[..], &[extra]].concat()), "{extra:?}");
        }
    }

    #[test]
    fn the_platform_protocols_are_taken_out_of_the_offer() {
        let handshake = handshake(&["chat, lambda-microvms.port.3000", "LAMBDA-MICROVMS , lambda-microvms.authentication.a.b..c.d,superchat", "lambda-microvms.future.x, lambda-microvmsx"]);
        let offer = &handshake.offer;
        assert!(offer.base);
        assert_eq!(offer.tokens, ["a.b..c.d"]);
        assert_eq!(offer.ports, ["3000"]);
        assert_eq!(handshake.offer_to_app().unwrap(), "chat, superchat, lambda-microvmsx");
    }

    #[test]
    fn the_base_is_mandatory_beside_the_others() {
        for (offered, expected) in [
            ("lambda-microvms, lambda-microvms.authentication.t", Ok(())),
            ("lambda-microvms", Ok(())),
            ("chat", Ok(())),
            ("lambda-microvms.authentication.t", Err(Reason::SubprotocolBaseMissing)),
            ("chat, lambda-microvms.port.80", Err(Reason::SubprotocolBaseMissing)),
        ] {
            assert_eq!(handshake(&[offered]).offer.check_base(), expected, "{offered}");
        }
    }

    #[test]
    fn what_the_client_reads_of_the_apps_choice() {
        let accept = accept(KEY);
        let answer = |offered: &str, chosen: &[&str]| {
            let mut headers = map(&[("sec-websocket-accept", &accept)]);
            for choice in chosen {
                headers.append(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_str(choice).unwrap());
            }
            handshake(&[offered]).answer(&headers).map(|value| value.map(|value| value.to_str().unwrap().to_owned()))
        };
        assert_eq!(answer("lambda-microvms, chat", &[]), Ok(Some(BASE.to_owned())));
        assert_eq!(answer("lambda-microvms, chat", &["chat"]), Ok(Some("chat".to_owned())));
        assert_eq!(answer("chat", &[]), Ok(None));
        assert_eq!(answer("lambda-microvms, chat", &["other"]), Err(Reason::SubprotocolNotOffered));
        assert_eq!(answer("lambda-microvms", &["lambda-microvms"]), Err(Reason::SubprotocolNotOffered));
        assert_eq!(answer("chat, x", &["chat", "x"]), Err(Reason::SubprotocolNotOffered));
    }

    #[test]
    fn a_switch_needs_a_handshake_and_its_accept() {
        let real = handshake(&["chat"]);
        assert_eq!(check_switch(StatusCode::SWITCHING_PROTOCOLS, None), Err(Reason::UnexpectedUpgrade));
        assert_eq!(check_switch(StatusCode::OK, None), Ok(()));
        assert_eq!(check_switch(StatusCode::SWITCHING_PROTOCOLS, Some(&real)), Ok(()));
        assert_eq!(real.answer(&map(&[("sec-websocket-accept", "wrong")])), Err(Reason::UnexpectedUpgrade));
        assert_eq!(real.answer(&HeaderMap::new()), Err(Reason::UnexpectedUpgrade));
    }
}
