//! The content of a token and its strict JSON form.
//!
//! Owns: which content is claims and when claims hold. Never reads a clock: the caller brings the time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use model::{MicrovmId, Port, PortRange, PortScope};
use serde::{Deserialize, Serialize};

use crate::{MAX_LIFETIME, Refusal};

/// Plaintexts are filled up to a multiple of this, so that the length of a token says nothing about its ports for up
/// to about twenty ranges, and nothing at all about its lifetime (aws-behaviour §2).
const BLOCK_BYTES: usize = 512;

/// What a token says, once opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// The one microVM it is for.
    pub microvm: MicrovmId,
    /// The ports it opens.
    pub ports: PortScope,
    /// A shell token opens the shell only, an ordinary token everything but the shell.
    pub shell: bool,
    /// Whole seconds of wall time.
    pub issued_at: SystemTime,
    /// Whole seconds of wall time, at most [`MAX_LIFETIME`] after `issued_at`; at this instant the token is already dead.
    pub expires_at: SystemTime,
}

/// The JSON form. Every member is mandatory, every unknown or doubled one is refused, numbers are plain integers.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    sub: MicrovmId,
    ports: WireScope,
    shell: bool,
    iat: u64,
    exp: u64,
    /// Blanks up to the next multiple of [`BLOCK_BYTES`].
    pad: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum WireScope {
    All,
    Ranges(Vec<(Port, Port)>),
}

/// Whole seconds since 1970; an earlier time is 1970, at which everything has expired.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Claims {
    /// The plaintext of a token.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        let ports = match &self.ports {
            PortScope::All => WireScope::All,
            PortScope::Ranges(ranges) => WireScope::Ranges(ranges.iter().map(|range| (range.first, range.last)).collect()),
        };
        let mut wire = Wire {
            sub: self.microvm,
            ports,
            shell: self.shell,
            iat: seconds(self.issued_at),
            exp: seconds(self.expires_at),
            pad: String::new(),
        };
        let json = |wire: &Wire| serde_json::to_vec(wire).expect("claims are plain data with text keys");
        let bare = json(&wire).len();
        wire.pad = " ".repeat(bare.next_multiple_of(BLOCK_BYTES) - bare);
        json(&wire)
    }

    /// Reads a plaintext. Its time is not checked: see [`Claims::check_time`].
    pub(crate) fn from_json(plaintext: &[u8]) -> Result<Self, Refusal> {
        let wire: Wire = serde_json::from_slice(plaintext).map_err(|_| Refusal::NotAuthentic)?;
        let ports = match wire.ports {
            WireScope::All => PortScope::All,
            WireScope::Ranges(ranges) if ranges.iter().all(|(first, last)| first <= last) => {
                PortScope::Ranges(ranges.into_iter().map(|(first, last)| PortRange { first, last }).collect())
            }
            WireScope::Ranges(_) => return Err(Refusal::NotAuthentic),
        };
        match wire.exp.checked_sub(wire.iat) {
            Some(lifetime) if lifetime <= MAX_LIFETIME.as_secs() => {}
            _ => return Err(Refusal::NotAuthentic),
        }
        let time = |seconds: u64| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).ok_or(Refusal::NotAuthentic);
        Ok(Self { microvm: wire.sub, ports, shell: wire.shell, issued_at: time(wire.iat)?, expires_at: time(wire.exp)? })
    }
    /// Whether they hold at `now`. `skew` is how far in the future a token may be issued.
    pub(crate) fn check_time(&self, now: SystemTime, skew: Duration) -> Result<(), Refusal> {
        let now = seconds(now);
        if seconds(self.expires_at) <= now {
            return Err(Refusal::Expired);
        }
        if seconds(self.issued_at) > now.saturating_add(skew.as_secs()) {
            return Err(Refusal::NotYetValid);
        }
        Ok(())
    }
}
