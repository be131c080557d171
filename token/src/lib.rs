//! Endpoint tokens: minted for integrators, opened at the edge, refused when anything is off.
//!
//! Owns: the key ring and the form of a token (compact JWE, `dir` + A256GCM; aws-behaviour §2, pingora.md §6). Never
//! looks up a microVM, never logs a token or a part of one, and never hands josekit a token that has not passed the
//! structural check.
//!
//! ```text
//! token ─► cache: opened a moment ago? ─────────────────────────────┐
//!   └────► jwe: form, key by exact header, tag ─► claims: strict content ─► time ─► Claims
//! ```
#![forbid(unsafe_code)]

mod cache;
mod claims;
mod jwe;
mod ring;

pub use claims::Claims;
pub use ring::{KeyRing, KeyRingError};

use std::time::Duration;

/// The longest token that is looked at, in characters; AWS's model allows no longer value (aws-behaviour §2).
pub const MAX_TOKEN_CHARS: usize = 8_000;

/// No token lives longer than this; one that claims to is refused.
pub const MAX_LIFETIME: Duration = Duration::from_secs(60 * 60);

/// Port ranges that surely fit into [`MAX_TOKEN_CHARS`] (14 characters each, a third more in base64, and the frame).
/// A scope with more still mints, but the token may be too long to be opened; who takes scopes from outside refuses it.
pub const MAX_PORT_RANGES: usize = 384;

/// Why a token was refused. All the caller is ever told is one of two bodies; the variant is for the metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Not a compact JWE: too long, not five parts, or not base64url.
    Unreadable,
    /// Its header is not the header of any key on the ring (any more): another key, another algorithm, another spelling.
    UnknownKey,
    /// A part is not as this crate makes it, the tag does not fit, or the content is not claims.
    NotAuthentic,
    /// Its time is over.
    Expired,
    /// Issued in the future.
    NotYetValid,
}

#[cfg(test)]
mod tests;
