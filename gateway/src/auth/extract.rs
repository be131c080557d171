//! Where a request carries its token: `X-aws-proxy-auth`, or a subprotocol of a real WebSocket handshake. Nowhere else:
//! not in the query, a cookie, Authorization or the body (cases.md 17).

use http::HeaderMap;

use crate::{headers::AUTH_FIELD, reply::Reason, websocket::Offer};

/// The one token of a request, still opaque. Never first wins or last wins: two tokens are refused unless they are the
/// same text in both places.
pub(crate) fn token<'a>(headers: &'a HeaderMap, offer: Option<&'a Offer>) -> Result<&'a str, Reason> {
    let mut fields = headers.get_all(&AUTH_FIELD).iter();
    // What else is no token is found out where it is opened.
    let field = fields.next().map(|value| str::from_utf8(value.as_bytes()).map_err(|_| Reason::TokenUnreadable));
    if fields.next().is_some() {
        return Err(Reason::TokenAmbiguous);
    }
    let offered = match offer {
        None => None,
        Some(offer) => {
            offer.check_base()?;
            match offer.tokens.as_slice() {
                [] => None,
                [token] => Some(token.as_str()),
                _ => return Err(Reason::TokenAmbiguous),
            }
        }
    };
    match (field.transpose()?, offered) {
        (None, None) => Err(Reason::TokenMissing),
        (Some(token), None) | (None, Some(token)) => Ok(token),
        (Some(one), Some(other)) if one == other => Ok(one),
        (Some(_), Some(_)) => Err(Reason::TokenAmbiguous),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn check(fields: &[&[u8]], offer: Option<Offer>, expected: Result<&str, Reason>) {
        let mut headers = HeaderMap::new();
        for field in fields {
            headers.append(&AUTH_FIELD, HeaderValue::from_bytes(field).unwrap());
        }
        assert_eq!(token(&headers, offer.as_ref()), expected, "{fields:?} {offer:?}");
    }

    fn offer(base: bool, tokens: &[&str]) -> Option<Offer> {
        Some(Offer { base, tokens: tokens.iter().map(|token| (*token).to_owned()).collect(), ..Offer::default() })
    }

    #[test]
    fn one_token_from_one_place() {
        check(&[b"t"], None, Ok("t"));
        check(&[], offer(true, &["t"]), Ok("t"));
        check(&[b"t"], offer(false, &[]), Ok("t"));
        check(&[b"t"], offer(true, &["t"]), Ok("t"));
    }

    #[test]
    fn none_or_too_many() {
        check(&[], None, Err(Reason::TokenMissing));
        check(&[], offer(true, &[]), Err(Reason::TokenMissing));
        check(&[b"t", b"t"], None, Err(Reason::TokenAmbiguous));
        check(&[b"good", b"bad"], None, Err(Reason::TokenAmbiguous));
        check(&[b"a"], offer(true, &["b"]), Err(Reason::TokenAmbiguous));
        check(&[], offer(true, &["t", "t"]), Err(Reason::TokenAmbiguous));
        check(&[], offer(false, &["t"]), Err(Reason::SubprotocolBaseMissing));
        check(&[b"t"], offer(false, &["t"]), Err(Reason::SubprotocolBaseMissing));
        check(&[b"\xe4"], None, Err(Reason::TokenUnreadable));
    }
}
