//! Opens a token and holds its claims against the request, in an order that tells an outsider nothing: the token first,
//! and only for an authentic one is it looked up whether the host's microVM exists.

use std::time::SystemTime;

use http::HeaderMap;
use idle_controller::{Controller, MicrovmHandle};
use model::Port;
use token::{Claims, KeyRing, Refusal};

use crate::{auth::extract, ports, reply::Reason, route::Route, websocket::Handshake};

/// Proof that a request passed every check: its token is ours, in time, for this microVM and for this port.
pub(crate) struct Permit {
    microvm: MicrovmHandle,
    port: Port,
}

impl Permit {
    /// The microVM that may be woken and talked to.
    pub fn microvm(&self) -> &MicrovmHandle {
        &self.microvm
    }

    /// The guest port that may be talked to.
    pub fn port(&self) -> Port {
        self.port
    }

    /// Checks a request. Touches nothing: neither a wake nor the idle clock. `may_open` is asked once, before a token is
    /// opened.
    pub fn check(
        keys: &KeyRing,
        controller: &Controller,
        route: Route,
        headers: &HeaderMap,
        handshake: Option<&Handshake>,
        now: SystemTime,
        may_open: impl FnOnce() -> bool,
    ) -> Result<Self, Reason> {
        let offer = handshake.map(|handshake| &handshake.offer);
        let token = extract::token(headers, offer)?;
        if !may_open() {
            return Err(Reason::TooManyTokens);
        }
        let claims = keys.open(token, now).map_err(reason)?;
        // An unknown host and a token of another microVM are the same answer from here on.
        let microvm = route.endpoint().and_then(|endpoint| controller.route(endpoint));
        let microvm = microvm.filter(|microvm| microvm.id() == claims.microvm).ok_or(Reason::TokenForeign)?;
        let port = ports::requested(headers, offer)?;
        check_scope(&claims, port)?;
        Ok(Self { microvm, port })
    }
}

fn check_scope(claims: &Claims, port: Port) -> Result<(), Reason> {
    if claims.shell {
        return Err(Reason::ShellToken);
    }
    if claims.ports.allows(port) { Ok(()) } else { Err(Reason::PortDenied) }
}

fn reason(refusal: Refusal) -> Reason {
    match refusal {
        Refusal::Unreadable => Reason::TokenUnreadable,
        Refusal::UnknownKey | Refusal::NotAuthentic => Reason::TokenRefused,
        Refusal::Expired => Reason::TokenExpired,
        Refusal::NotYetValid => Reason::TokenNotYetValid,
    }
}
