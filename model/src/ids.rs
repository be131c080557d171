//! One id type per kind of thing, so that one kind can never be passed where another is meant.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Why a text is not an id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {wanted}")]
pub struct ParseIdError {
    /// What was given, cut to 80 characters.
    pub text: String,
    /// What was wanted, with its form.
    pub wanted: &'static str,
}

impl ParseIdError {
    fn new(text: &str, wanted: &'static str) -> Self {
        Self { text: text.chars().take(80).collect(), wanted }
    }
}

/// Parses exactly the lower-case hyphenated form, so that one id has one spelling.
fn canonical_uuid(text: &str) -> Option<Uuid> {
    let uuid = Uuid::try_parse(text).ok()?;
    let mut buffer = Uuid::encode_buffer();
    (uuid.hyphenated().encode_lower(&mut buffer) as &str == text).then_some(uuid)
}

/// One microVM for life: `microvm-<uuid>` (aws-behaviour §7.2).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MicrovmId(Uuid);

impl MicrovmId {
    /// A fresh random id.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for MicrovmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("microvm-")?;
        f.write_str(self.0.hyphenated().encode_lower(&mut Uuid::encode_buffer()))
    }
}

impl FromStr for MicrovmId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        text.strip_prefix("microvm-")
            .and_then(canonical_uuid)
            .map(Self)
            .ok_or_else(|| ParseIdError::new(text, "a microVM id of the form microvm-<uuid>"))
    }
}

/// The first label of a microVM's hostname: `<uuid>`. Differs from the microVM's own id (aws-behaviour §1.1).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId(Uuid);

impl EndpointId {
    /// A fresh random id.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.hyphenated().encode_lower(&mut Uuid::encode_buffer()))
    }
}

impl FromStr for EndpointId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        canonical_uuid(text).map(Self).ok_or_else(|| ParseIdError::new(text, "an endpoint id (a lower-case uuid)"))
    }
}

/// Counts the restores of one microVM; a pooled connection of an older generation is dead (design §4 rule 5).
/// 0 is the launch itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Generation(pub u64);

impl Generation {
    /// The one after this.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The name of an image: 1–64 of `[A-Za-z0-9_-]`, as in the AWS model.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageName(String);

impl ImageName {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ImageName {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let fits = (1..=64).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if fits { Ok(Self(text.to_owned())) } else { Err(ParseIdError::new(text, "an image name (1–64 of A–Z a–z 0–9 - _)")) }
    }
}

/// The version of an image: `1.0`, `2.0`, … (aws-behaviour §5.1).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageVersion {
    /// Counts the updates of the image, from 1.
    pub major: u32,
    /// 0 for every version made here.
    pub minor: u32,
}

impl ImageVersion {
    /// What a new image starts with.
    pub const FIRST: Self = Self { major: 1, minor: 0 };
}

impl fmt::Display for ImageVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for ImageVersion {
    type Err = ParseIdError;
    /// Takes `2.0` and, as AWS does for managed images, `2`.
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let wrong = || ParseIdError::new(text, "an image version of the form 1.0");
        let number = |digits: &str| -> Result<u32, ParseIdError> {
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) || (digits.len() > 1 && digits.starts_with('0')) {
                return Err(wrong());
            }
            digits.parse().map_err(|_| wrong())
        };
        match text.split_once('.') {
            Some((major, minor)) => Ok(Self { major: number(major)?, minor: number(minor)? }),
            None => Ok(Self { major: number(text)?, minor: 0 }),
        }
    }
}

macro_rules! text_serde {
    ($($kind:ty),*) => {$(
        impl fmt::Debug for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl Serialize for $kind {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $kind {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
text_serde!(MicrovmId, EndpointId, ImageName, ImageVersion);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_microvm_id_has_one_spelling() {
        let id = MicrovmId::random();
        assert_eq!(id.to_string().parse(), Ok(id));
        let text = id.to_string();
        for other in [text.to_uppercase(), text.replace('-', ""), format!("{text} "), text[..text.len() - 1].to_owned(), text[8..].to_owned(), String::new()] {
            assert!(other.parse::<MicrovmId>().is_err(), "{other}");
        }
    }

    #[test]
    fn endpoint_ids_refuse_braces_urns_and_upper_case() {
        let id = EndpointId::random().to_string();
        for other in [format!("{{{id}}}"), format!("urn:uuid:{id}"), id.to_uppercase(), id.replace('-', "")] {
            assert!(other.parse::<EndpointId>().is_err() || other == id, "{other}");
        }
    }

    #[test]
    fn image_versions_parse_as_aws_writes_them() {
        assert_eq!("1".parse(), Ok(ImageVersion::FIRST));
        assert_eq!("12.3".parse(), Ok(ImageVersion { major: 12, minor: 3 }));
        for bad in ["", ".", "1.", ".0", "01.0", "-1.0", "1.0.0", "1,0", "99999999999.0"] {
            assert!(bad.parse::<ImageVersion>().is_err(), "{bad}");
        }
    }

    #[test]
    fn image_names_are_plain() {
        for good in ["a", "hello-microvm-test", "A_1"] {
            assert!(good.parse::<ImageName>().is_ok());
        }
        for bad in ["", "a/b", "..", "a b", "ä", &"x".repeat(65)] {
            assert!(bad.parse::<ImageName>().is_err(), "{bad}");
        }
    }
}
