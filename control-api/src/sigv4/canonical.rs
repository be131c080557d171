//! The canonical request of Signature Version 4, by the rules for every service but S3: the path is normalised and
//! encoded as it came, so what was `%3A` on the wire is `%253A` here.

use std::borrow::Cow;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

use super::Signed;

/// Everything but the unreserved characters of RFC 3986.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// The canonical request up to the hash of the body, as bytes (header values need not be text), or what the request lacks.
pub(super) fn head(request: &Signed<'_>, signed_headers: &str) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(512);
    for line in [request.method, &path(request.path), &query(request.query)] {
        out.extend_from_slice(line.as_bytes());
        out.push(b'\n');
    }
    headers(request, signed_headers, &mut out)?;
    out.push(b'\n');
    out.extend_from_slice(signed_headers.as_bytes());
    out.push(b'\n');
    Ok(out)
}

/// Without `.`, `..` and doubled slashes, every byte outside the unreserved ones encoded.
pub(super) fn path(raw: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    for segment in raw.split('/') {
        match segment {
            "" | "." => {}
            ".." => {
                kept.pop();
            }
            segment => kept.push(segment),
        }
    }
    let mut path = String::from("/");
    let encoded: Vec<Cow<'_, str>> = kept.iter().map(|segment| encode(segment.as_bytes())).collect();
    path.push_str(&encoded.join("/"));
    if raw.ends_with('/') && !kept.is_empty() {
        path.push('/');
    }
    path
}

/// Every pair but the signature itself, sorted by encoded name and then by encoded value.
pub(super) fn query(raw: &str) -> String {
    let mut pairs: Vec<(String, String)> = pairs(raw)
        .map(|(name, value)| {
            let again = |text: &str| encode(&percent_decode_str(text).collect::<Vec<u8>>()).into_owned();
            (again(name), again(value))
        })
        .filter(|(name, _)| name != "X-Amz-Signature")
        .collect();
    pairs.sort();
    pairs.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&")
}

/// The decoded value of the only pair of this name; `None` also if there are several.
pub(super) fn query_value(raw: &str, wanted: &str) -> Option<String> {
    let mut found = pairs(raw).filter(|(name, _)| percent_decode_str(name).eq(wanted.bytes()));
    let (_, value) = found.next()?;
    if found.next().is_some() {
        return None;
    }
    percent_decode_str(value).decode_utf8().ok().map(Cow::into_owned)
}

fn pairs(raw: &str) -> impl Iterator<Item = (&str, &str)> {
    raw.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

fn encode(bytes: &[u8]) -> Cow<'_, str> {
    percent_encode(bytes, RESERVED).into()
}

fn headers(request: &Signed<'_>, signed_headers: &str, out: &mut Vec<u8>) -> Result<(), String> {
    let names: Vec<&str> = signed_headers.split(';').collect();
    if !names.contains(&"host") {
        return Err("'Host' must be a 'SignedHeader' in the AWS Authorization.".to_owned());
    }
    if !names.is_sorted() || names.iter().any(|name| name.bytes().any(|byte| byte.is_ascii_uppercase())) {
        return Err("SignedHeaders must be in lower case and sorted.".to_owned());
    }
    for name in names {
        out.extend_from_slice(name.as_bytes());
        out.push(b':');
        let mut found = request.headers.get_all(name).iter().peekable();
        if found.peek().is_none() {
            match request.authority {
                Some(authority) if name == "host" => out.extend_from_slice(authority.as_bytes()),
                _ => return Err(format!("'{name}' is named a SignedHeader but the request does not have it.")),
            }
        }
        while let Some(value) = found.next() {
            trimmed(value.as_bytes(), out);
            if found.peek().is_some() {
                out.push(b',');
            }
        }
        out.push(b'\n');
    }
    Ok(())
}

/// Without blanks at both ends, runs of blanks inside as one.
fn trimmed(value: &[u8], out: &mut Vec<u8>) {
    let words = value.split(|byte| *byte == b' ' || *byte == b'\t').filter(|word| !word.is_empty());
    for (number, word) in words.enumerate() {
        if number > 0 {
            out.push(b' ');
        }
        out.extend_from_slice(word);
    }
}
