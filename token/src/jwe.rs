//! The outer form of a token: `header..iv.ciphertext.tag`, each part base64url without padding (RFC 7516 §7.1).
//!
//! Owns: the structural check and the one cipher. Never parses a header: a key has two fixed texts for it, and a token
//! either starts with exactly one of them or is refused. So `alg`, `enc`, `zip`, `crit`, `p2c` and the like of a stranger
//! are never read, and of josekit only its A256GCM is reachable. The lengths of IV and tag are checked here because
//! josekit 0.10 takes a tag of any length and panics at an empty IV.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use josekit::jwe::{JweContentEncryption as _, enc::A256GCM};

use crate::{MAX_TOKEN_CHARS, Refusal};

/// Bytes of an A256GCM key.
pub(crate) const KEY_BYTES: usize = 32;
const IV_BYTES: usize = 12;
/// 12 bytes in base64url, no spare bits.
const IV_CHARS: usize = 16;
const TAG_BYTES: usize = 16;
/// 16 bytes in base64url, four spare bits.
const TAG_CHARS: usize = 22;

/// The protected header of the key `kid`, as it stands in a token. The order of members is AWS's (aws-behaviour §2).
pub(crate) fn header(kid: &uuid::Uuid) -> String {
    URL_SAFE_NO_PAD.encode(format!(r#"{{"kid":"{}","alg":"dir","enc":"A256GCM"}}"#, kid.hyphenated()))
}

/// The headers that a token of the key `kid` may have: ours, and the same three members sorted, as libraries write them that
/// leave their callers no choice (RFC 7516 knows no order).
pub(crate) fn headers(kid: &uuid::Uuid) -> [String; 2] {
    let sorted = URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"dir","enc":"A256GCM","kid":"{}"}}"#, kid.hyphenated()));
    [header(kid), sorted]
}

/// The parts of a text that may be a token; all are base64url letters, nothing is decoded yet.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) header: &'a str,
    encrypted_key: &'a str,
    iv: &'a str,
    ciphertext: &'a str,
    tag: &'a str,
}

/// Takes a text apart, or says that it is no compact JWE at all.
pub(crate) fn split(token: &str) -> Result<Parts<'_>, Refusal> {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if token.len() > MAX_TOKEN_CHARS || !token.bytes().all(|byte| is_letter(byte) || byte == b'.') {
        return Err(Refusal::Unreadable);
    }
    let mut parts = token.split('.');
    let mut next = || parts.next().ok_or(Refusal::Unreadable);
    let split = Parts { header: next()?, encrypted_key: next()?, iv: next()?, ciphertext: next()?, tag: next()? };
    if parts.next().is_some() || split.header.is_empty() {
        return Err(Refusal::Unreadable);
    }
    Ok(split)
}

/// The plaintext, if every part has exactly the form this crate makes and the tag fits.
pub(crate) fn decrypt(key: &[u8; KEY_BYTES], parts: &Parts<'_>) -> Result<Vec<u8>, Refusal> {
    let fits = parts.encrypted_key.is_empty() && parts.iv.len() == IV_CHARS && parts.tag.len() == TAG_CHARS && !parts.ciphertext.is_empty();
    if !fits {
        return Err(Refusal::NotAuthentic);
    }
    // The decoder refuses spare bits that are not zero, so that one token has one spelling.
    let decoded = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| Refusal::NotAuthentic);
    let (iv, ciphertext, tag) = (decoded(parts.iv)?, decoded(parts.ciphertext)?, decoded(parts.tag)?);
    debug_assert!(iv.len() == IV_BYTES && tag.len() == TAG_BYTES);
    A256GCM.decrypt(key, Some(&iv), &ciphertext, parts.header.as_bytes(), Some(&tag)).map_err(|_| Refusal::NotAuthentic)
}

/// A token with this plaintext, under a fresh random IV.
pub(crate) fn encrypt(key: &[u8; KEY_BYTES], header: &str, plaintext: &[u8]) -> String {
    let iv = josekit::util::random_bytes(IV_BYTES);
    let (ciphertext, tag) = A256GCM
        .encrypt(key, Some(&iv), plaintext, header.as_bytes())
        .expect("A256GCM takes every plaintext under a 32-byte key and a 12-byte IV");
    let tag = tag.expect("GCM makes a tag");
    let encoded = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    format!("{header}..{}.{}.{}", encoded(&iv), encoded(&ciphertext), encoded(&tag))
}

/// The parts of a token as they are, without the check of their letters.
#[cfg(test)]
pub(crate) fn parts<'a>(header: &'a str, encrypted_key: &'a str, iv: &'a str, ciphertext: &'a str, tag: &'a str) -> Parts<'a> {
    Parts { header, encrypted_key, iv, ciphertext, tag }
}
