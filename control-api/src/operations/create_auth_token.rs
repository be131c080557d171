//! CreateMicrovmAuthToken: a token for some ports of one microVM (aws-behaviour §2).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use idle_controller::MicrovmHandle;
use model::{MicrovmId, MicrovmState, Port, PortRange, PortScope};
use serde::Deserialize;
use serde_json::{Value, json};
use token::{Claims, MAX_PORT_RANGES};

use super::{Api, find_microvm, microvm_body::Remembered, read};
use crate::reply::{Answer, ApiError};

/// The header that carries a token.
const HEADER: &str = "X-aws-proxy-auth";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    microvm_identifier: String,
    expiration_in_minutes: u64,
    allowed_ports: Vec<Specification>,
}

/// One of three; the model says that exactly one is set.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Specification {
    port: Option<Port>,
    range: Option<Range>,
    all_ports: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Range {
    start_port: Port,
    end_port: Port,
}

pub(super) fn call(api: &Api, input: Value) -> Result<Answer, ApiError> {
    let input: Input = read(input)?;
    let lifetime = lifetime(input.expiration_in_minutes)?;
    let ports = scope(&input.allowed_ports)?;
    let handle = alive(api, &input.microvm_identifier)?;
    let remembered = Remembered::of(&handle.view());
    let ingress = &remembered.ingress_network_connectors;
    // A microVM of before this was recorded has HTTP.
    if !ingress.is_empty() && !remembered.has_ingress("HTTP_INGRESS") && !remembered.has_ingress("ALL_INGRESS") {
        return Err(ApiError::validation("HTTP access requires HTTP_INGRESS network connector to be configured on the MicroVM."));
    }
    Ok(minted(api, handle.id(), Opens::Ports(ports), lifetime))
}

/// How long a token lives that is asked for with so many minutes.
pub(super) fn lifetime(minutes: u64) -> Result<Duration, ApiError> {
    let longest = token::MAX_LIFETIME.as_secs() / 60;
    if minutes > longest {
        return Err(ApiError::validation(format!("ExpirationMinutes {minutes} exceeded max allowed of {longest}.")));
    }
    Ok(Duration::from_secs(minutes * 60))
}

/// The microVM of a token, which has an endpoint.
pub(super) fn alive(api: &Api, identifier: &str) -> Result<MicrovmHandle, ApiError> {
    let handle = find_microvm(api, identifier)?;
    if handle.state() == MicrovmState::Terminated {
        return Err(ApiError::validation(format!("The MicroVM {} has been terminated and has no endpoint any more.", handle.id())));
    }
    Ok(handle)
}

/// What a token is for.
pub(super) enum Opens {
    Ports(PortScope),
    Shell,
}

/// The answer with a token.
pub(super) fn minted(api: &Api, microvm: MicrovmId, opens: Opens, lifetime: Duration) -> Answer {
    let (ports, shell) = match opens {
        Opens::Ports(ports) => (ports, false),
        Opens::Shell => (PortScope::Ranges(Vec::new()), true),
    };
    let issued_at = whole_seconds(api.parts.clock.wall());
    let claims = Claims { microvm, ports, shell, issued_at, expires_at: issued_at + lifetime };
    Answer::ok(json!({"authToken": {HEADER: api.parts.tokens.mint(&claims)}}))
}

fn whole_seconds(time: SystemTime) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
}

/// The union of the specifications: ranges in order, those that touch as one.
fn scope(specifications: &[Specification]) -> Result<PortScope, ApiError> {
    let mut ranges = Vec::new();
    for (number, specification) in (1..).zip(specifications) {
        if specification.all_ports.is_some() {
            return Ok(PortScope::All);
        }
        let single = specification.port.map(|port| PortRange { first: port, last: port });
        let range = specification.range.as_ref().map(|range| PortRange { first: range.start_port, last: range.end_port });
        if range.is_some_and(|range| range.first > range.last) {
            return Err(ApiError::validation(format!(
                "1 validation error detected: Value at 'allowedPorts.{number}.member.range' failed to satisfy constraint: Member must have \
                 startPort less than or equal to endPort"
            )));
        }
        ranges.extend(single.or(range));
    }
    ranges.sort_by_key(|range| (range.first, range.last));
    let mut union: Vec<PortRange> = Vec::new();
    for range in ranges {
        match union.last_mut() {
            Some(before) if range.first.get() <= before.last.get().saturating_add(1) => before.last = before.last.max(range.last),
            _ => union.push(range),
        }
    }
    if union.len() > MAX_PORT_RANGES {
        return Err(ApiError::validation(format!(
            "1 validation error detected: Value at 'allowedPorts' failed to satisfy constraint: Member must have at most {MAX_PORT_RANGES} \
             separate ports or ranges"
        )));
    }
    Ok(PortScope::Ranges(union))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope_of(ports: Value) -> Result<Vec<(u16, u16)>, ApiError> {
        match scope(&read::<Vec<Specification>>(ports)?)? {
            PortScope::All => Ok(vec![(0, 0)]),
            PortScope::Ranges(ranges) => Ok(ranges.iter().map(|range| (range.first.get(), range.last.get())).collect()),
        }
    }

    #[test]
    fn specifications_are_united() {
        let range = |a, b| json!({"range": {"startPort": a, "endPort": b}});
        for (ports, expected) in [
            (json!([{"port": 8080}]), vec![(8080, 8080)]),
            (json!([{"allPorts": {}}]), vec![(0, 0)]),
            (json!([{"port": 1}, {"allPorts": {}}]), vec![(0, 0)]),
            (json!([range(3000, 3005), {"port": 3006}, range(3004, 3004), {"port": 80}]), vec![(80, 80), (3000, 3006)]),
            (json!([range(1, 65535), {"port": 65535}]), vec![(1, 65535)]),
            (json!([range(65535, 65535), {"port": 65535}]), vec![(65535, 65535)]),
            (json!([{"port": 1}, {"port": 3}]), vec![(1, 1), (3, 3)]),
        ] {
            assert_eq!(scope_of(ports.clone()).unwrap(), expected, "{ports}");
        }
        assert!(scope_of(json!([range(2, 1)])).is_err());
        let holes = |n: u16| (0..n).map(|n| json!({"port": 2 * n + 1})).collect::<Value>();
        assert_eq!(scope_of(holes(384)).unwrap().len(), 384);
        assert!(scope_of(holes(385)).is_err());
    }
}
