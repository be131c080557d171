//! AWS Signature Version 4: whether a request was signed by the holder of one of our access keys.
//!
//! Owns: the canonical request, the signature, the time and scope rules, AWS's words for what is wrong with them
//! (`Authorization` header and presigned query; body in one piece). Never serves S3: `s3s` verifies that with its own
//! rules. Secrets are compared in constant time and appear in no error.

mod canonical;
#[cfg(test)]
mod tests;

use std::time::{Duration, SystemTime};

use hmac::{Hmac, Mac as _};
use http::HeaderMap;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use time::{OffsetDateTime, PrimitiveDateTime, format_description::BorrowedFormatItem, macros::format_description};

use crate::reply::{ApiError, ErrorKind};

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const UNSIGNED: &str = "UNSIGNED-PAYLOAD";
const BASIC_DATE: &[BorrowedFormatItem<'_>] = format_description!("[year][month][day]T[hour][minute][second]Z");
/// How far the caller's clock may be from ours, either way. AWS's for all services but S3.
pub(crate) const MAX_SKEW: Duration = Duration::from_secs(5 * 60);
/// AWS's longest life of a presigned URL: seven days.
const MAX_EXPIRES_SECS: u64 = 604_800;

/// What was received, before anything was decoded.
pub(crate) struct Signed<'a> {
    pub(crate) method: &'a str,
    /// As on the request line.
    pub(crate) path: &'a str,
    /// As on the request line, without `?`.
    pub(crate) query: &'a str,
    pub(crate) headers: &'a HeaderMap,
    /// The authority of the request line or `:authority`, which HTTP/2 clients send instead of Host.
    pub(crate) authority: Option<&'a str>,
}

/// What a signature must fit.
pub(crate) struct Expected<'a> {
    pub(crate) region: &'a str,
    pub(crate) service: &'a str,
    pub(crate) now: SystemTime,
    /// The secret of an access key id.
    pub(crate) secret: &'a dyn Fn(&str) -> Option<String>,
}

/// The parts of a signature, wherever it stood.
struct Claimed {
    credential: String,
    signed_headers: String,
    signature: String,
    date: String,
    /// Seconds; only a presigned query has it.
    expires: Option<u64>,
}

/// The service a request says it is signed for, unverified; `None` if it carries no signature.
pub(crate) fn claimed_service(headers: &HeaderMap, query: &str) -> Option<String> {
    let credential = match headers.get(http::header::AUTHORIZATION) {
        Some(value) => value.to_str().ok()?.split_once("Credential=")?.1.split([',', ' ']).next()?.to_owned(),
        None => canonical::query_value(query, "X-Amz-Credential")?,
    };
    credential.split('/').nth(3).map(str::to_owned)
}

/// A request whose header is in order, as far as that can be known without its body: it names a key that there is, for
/// this service, at this time. If the header says what the body's hash is, the signature was found good as well.
pub(crate) struct Pending {
    id: String,
    secret: String,
    claimed: Claimed,
    scope: [String; 3],
    /// The canonical request up to the hash of the body.
    canonical: Vec<u8>,
    body: BodyHash,
}

/// What the header says of the body.
enum BodyHash {
    Untold,
    Told([u8; 32]),
    /// Only of a presigned URL, whose maker does not know the body.
    Open,
}

/// A request that was signed by the holder of a key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Verified {
    /// The access key id.
    pub(crate) id: String,
    pub(crate) signature: [u8; 32],
    /// The signature stands in the URL, which may be used until it expires.
    pub(crate) presigned: bool,
}

/// Checks all that the header shows, or says what AWS would say.
pub(crate) fn begin(request: &Signed<'_>, expected: &Expected<'_>) -> Result<Pending, ApiError> {
    let claimed = claim(request)?;
    let [id, scope_date, region, service, terminator] = scope(&claimed.credential)?;
    let mut wrong = String::new();
    if region != expected.region {
        wrong.push_str(&format!("Credential should be scoped to a valid region, not '{region}'. "));
    }
    if service != expected.service {
        wrong.push_str(&format!("Credential should be scoped to correct service: '{}'. ", expected.service));
    }
    if terminator != "aws4_request" {
        wrong.push_str(&format!("Credential should be scoped with a valid terminator: 'aws4_request', not '{terminator}'. "));
    }
    if claimed.date.get(..8) != Some(scope_date) {
        wrong.push_str(&format!(
            "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP: '{scope_date}' != '{}', from '{}'. ",
            claimed.date.get(..8).unwrap_or_default(),
            claimed.date
        ));
    }
    if !wrong.is_empty() {
        return Err(invalid(wrong.trim_end()));
    }
    check_time(&claimed, expected.now)?;
    let secret = (expected.secret)(id).ok_or_else(unrecognized)?;
    if security_token(request) {
        // This node gives out no temporary credentials, so no session token can be right.
        return Err(unrecognized());
    }
    let body = told_hash(request, claimed.expires.is_some())?;
    let canonical = canonical::head(request, &claimed.signed_headers).map_err(|missing| incomplete(&missing))?;
    let scope = [scope_date, region, service].map(str::to_owned);
    let pending = Pending { id: id.to_owned(), secret, scope, canonical, body, claimed };
    match &pending.body {
        BodyHash::Told(hash) => pending.check(&hex::encode(hash))?,
        BodyHash::Open => pending.check(UNSIGNED)?,
        BodyHash::Untold => {}
    }
    Ok(pending)
}

impl Pending {
    /// Checks what is left once the body is there.
    pub(crate) fn finish(self, body: &[u8]) -> Result<Verified, ApiError> {
        let hash: [u8; 32] = Sha256::digest(body).into();
        match &self.body {
            BodyHash::Told(told) if *told == hash => {}
            BodyHash::Told(_) => return Err(invalid("The value of x-amz-content-sha256 is not the SHA-256 of the body.")),
            BodyHash::Open => {}
            BodyHash::Untold => self.check(&hex::encode(hash))?,
        }
        let mut signature = [0; 32];
        hex::decode_to_slice(&self.claimed.signature, &mut signature).map_err(|_| mismatch())?;
        Ok(Verified { id: self.id, signature, presigned: self.claimed.expires.is_some() })
    }

    fn check(&self, payload_hash: &str) -> Result<(), ApiError> {
        let [date, region, service] = &self.scope;
        let mut canonical = Sha256::new_with_prefix(&self.canonical);
        canonical.update(payload_hash);
        let canonical = hex::encode(canonical.finalize());
        let to_sign = format!("{ALGORITHM}\n{}\n{date}/{region}/{service}/aws4_request\n{canonical}", self.claimed.date);
        let signature = hex::encode(sign(&self.secret, date, region, service, &to_sign));
        if bool::from(signature.as_bytes().ct_eq(self.claimed.signature.as_bytes())) { Ok(()) } else { Err(mismatch()) }
    }
}

fn sign(secret: &str, date: &str, region: &str, service: &str, to_sign: &str) -> [u8; 32] {
    let mut key: [u8; 32] = mac(format!("AWS4{secret}").as_bytes(), date);
    for step in [region, service, "aws4_request", to_sign] {
        key = mac(&key, step);
    }
    key
}

fn mac(key: &[u8], text: &str) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().into()
}

/// Finds the one signature of a request.
fn claim(request: &Signed<'_>) -> Result<Claimed, ApiError> {
    let mut headers = request.headers.get_all(http::header::AUTHORIZATION).iter();
    let header = headers.next();
    let in_query = canonical::query_value(request.query, "X-Amz-Algorithm").is_some()
        || canonical::query_value(request.query, "X-Amz-Signature").is_some();
    match (header, in_query) {
        (None, false) => Err(ApiError::new(ErrorKind::MissingAuthenticationToken, "Missing Authentication Token")),
        (Some(_), true) => Err(incomplete("The request is signed in the Authorization header and in the query; one of them is enough.")),
        (Some(_), false) if headers.next().is_some() => Err(incomplete("The request has more than one Authorization header.")),
        (Some(header), false) => claim_of_header(header, request.headers),
        (None, true) => claim_of_query(request.query),
    }
}

fn claim_of_header(header: &http::HeaderValue, headers: &HeaderMap) -> Result<Claimed, ApiError> {
    let text = header.to_str().map_err(|_| incomplete("The Authorization header is not ASCII text."))?;
    let parameters = text.strip_prefix(ALGORITHM).and_then(|rest| rest.strip_prefix([' ', '\t'])).ok_or_else(|| {
        ApiError::new(ErrorKind::IncompleteSignature, format!("Unsupported AWS 'algorithm'; this API takes {ALGORITHM}."))
    })?;
    let (mut credential, mut signed_headers, mut signature) = (None, None, None);
    for parameter in parameters.split(',') {
        let Some((name, value)) = parameter.trim().split_once('=') else {
            return Err(incomplete("A parameter of the Authorization header has no value."));
        };
        let place = match name {
            "Credential" => &mut credential,
            "SignedHeaders" => &mut signed_headers,
            "Signature" => &mut signature,
            _ => return Err(incomplete("The Authorization header has an unknown parameter.")),
        };
        if place.replace(value.to_owned()).is_some() {
            return Err(incomplete("A parameter of the Authorization header stands in it twice."));
        }
    }
    let date = headers.get("x-amz-date").and_then(|date| date.to_str().ok()).map(str::to_owned);
    let mut missing = String::new();
    for (name, value) in [("Credential", &credential), ("Signature", &signature), ("SignedHeaders", &signed_headers)] {
        if value.is_none() {
            missing.push_str(&format!("Authorization header requires '{name}' parameter. "));
        }
    }
    if date.is_none() {
        missing.push_str("Authorization header requires existence of an 'X-Amz-Date' header. ");
    }
    match (credential, signed_headers, signature, date) {
        (Some(credential), Some(signed_headers), Some(signature), Some(date)) => {
            Ok(Claimed { credential, signed_headers, signature, date, expires: None })
        }
        _ => Err(incomplete(missing.trim_end())),
    }
}

fn claim_of_query(query: &str) -> Result<Claimed, ApiError> {
    let value = |name: &str| {
        canonical::query_value(query, name).ok_or_else(|| incomplete(&format!("AWS query-string parameters must include '{name}'.")))
    };
    if value("X-Amz-Algorithm")? != ALGORITHM {
        return Err(incomplete(&format!("Unsupported AWS 'algorithm'; this API takes {ALGORITHM}.")));
    }
    let expires = value("X-Amz-Expires")?;
    let expires = expires.parse().ok().filter(|expires| (1..=MAX_EXPIRES_SECS).contains(expires));
    Ok(Claimed {
        credential: value("X-Amz-Credential")?,
        signed_headers: value("X-Amz-SignedHeaders")?,
        signature: value("X-Amz-Signature")?,
        date: value("X-Amz-Date")?,
        expires: Some(expires.ok_or_else(|| incomplete("X-Amz-Expires must be a number of seconds from 1 to 604800."))?),
    })
}

fn scope(credential: &str) -> Result<[&str; 5], ApiError> {
    let parts: Vec<&str> = credential.split('/').collect();
    parts.try_into().map_err(|_| {
        incomplete("Credential must have exactly 5 slash-delimited elements, e.g. keyid/date/region/service/term.")
    })
}

fn check_time(claimed: &Claimed, now: SystemTime) -> Result<(), ApiError> {
    let unreadable = || incomplete("Date must be in ISO-8601 'basic format', such as 20250909T120000Z.");
    if claimed.date.len() != 16 || !claimed.date.is_ascii() {
        return Err(unreadable());
    }
    let date = PrimitiveDateTime::parse(&claimed.date, BASIC_DATE).map_err(|_| unreadable())?.assume_utc();
    let now = OffsetDateTime::from(now);
    let shown = |time: OffsetDateTime| time.format(BASIC_DATE).unwrap_or_default();
    if date > now + MAX_SKEW {
        return Err(invalid(&format!(
            "Signature not yet current: {} is still later than {} ({} + 5 min.)",
            claimed.date,
            shown(now + MAX_SKEW),
            shown(now)
        )));
    }
    let expired = match claimed.expires {
        Some(expires) => date + Duration::from_secs(expires) < now,
        None => date + MAX_SKEW < now,
    };
    if expired {
        return Err(invalid(&match claimed.expires {
            Some(expires) => format!("Signature expired: {} is now earlier than {} by more than its X-Amz-Expires of {expires} seconds", claimed.date, shown(now)),
            None => format!("Signature expired: {} is now earlier than {} ({} - 5 min.)", claimed.date, shown(now - MAX_SKEW), shown(now)),
        }));
    }
    Ok(())
}

fn security_token(request: &Signed<'_>) -> bool {
    request.headers.contains_key("x-amz-security-token") || canonical::query_value(request.query, "X-Amz-Security-Token").is_some()
}

/// What the header says that the body's hash is. Only a presigned URL may leave it open; bodies in signed pieces are S3's.
fn told_hash(request: &Signed<'_>, presigned: bool) -> Result<BodyHash, ApiError> {
    let mut told = request.headers.get_all("x-amz-content-sha256").iter();
    let (Some(hash), None) = (told.next(), told.next()) else {
        return if request.headers.contains_key("x-amz-content-sha256") {
            Err(incomplete("The request has more than one x-amz-content-sha256 header."))
        } else {
            Ok(BodyHash::Untold)
        };
    };
    if hash.as_bytes() == UNSIGNED.as_bytes() {
        return if presigned { Ok(BodyHash::Open) } else { Err(invalid("A request that is signed in its header must sign its body; UNSIGNED-PAYLOAD is not taken.")) };
    }
    let mut bytes = [0; 32];
    let lower_case = !hash.as_bytes().iter().any(u8::is_ascii_uppercase);
    match hex::decode_to_slice(hash.as_bytes(), &mut bytes) {
        Ok(()) if lower_case => Ok(BodyHash::Told(bytes)),
        _ => Err(invalid("The value of x-amz-content-sha256 is not the SHA-256 of the body.")),
    }
}

fn incomplete(message: &str) -> ApiError {
    ApiError::new(ErrorKind::IncompleteSignature, message)
}

fn invalid(message: &str) -> ApiError {
    ApiError::new(ErrorKind::InvalidSignature, message)
}

fn unrecognized() -> ApiError {
    ApiError::new(ErrorKind::UnrecognizedClient, "The security token included in the request is invalid.")
}

fn mismatch() -> ApiError {
    invalid(
        "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key \
         and signing method. Consult the service documentation for details.",
    )
}
