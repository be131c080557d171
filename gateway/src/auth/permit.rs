//! Opens a token and holds its claims against the request, in an order that tells an outsider nothing: the token first,
//! and only for an authentic one is it looked up whether the host's microVM exists.

use std::time::SystemTime;

use http::HeaderMap;
use idle_controller::{Controller, MicrovmHandle};
use model::Port;
use token::{Claims, KeyRing, Refusal};

use crate::{auth::extract, ports, reply::Reason, route::Route, websocket::Handshake};

/// What of a guest a client may talk to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Door {
    /// What the app listens on.
    Port(Port),
    /// The guest agent, which has a shell behind it.
    Shell,
}

/// Proof that a request passed every check: its token is ours, in time, for this microVM and for this door of it.
pub(crate) struct Permit {
    microvm: MicrovmHandle,
    door: Door,
}

impl Permit {
    /// The microVM that may be woken and talked to.
    pub fn microvm(&self) -> &MicrovmHandle {
        &self.microvm
    }

    /// What of the guest may be talked to.
    pub fn door(&self) -> Door {
        self.door
    }

    /// The guest port, or the one that stands for the shell.
    pub fn port(&self) -> Port {
        match self.door {
            Door::Port(port) => port,
            Door::Shell => ports::SHELL,
        }
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
        let door = door(&claims, ports::requested(headers, offer)?, handshake)?;
        Ok(Self { microvm, door })
    }
}

/// What the token opens of what was asked for. A shell token opens the shell, to a WebSocket only, and an ordinary one never does
/// (aws-behaviour §2.1).
fn door(claims: &Claims, asked: Option<Port>, handshake: Option<&Handshake>) -> Result<Door, Reason> {
    if claims.shell {
        return match (handshake, asked) {
            (None, _) => Err(Reason::ShellToken),
            (Some(_), None | Some(ports::SHELL)) => Ok(Door::Shell),
            (Some(_), Some(_)) => Err(Reason::PortDenied),
        };
    }
    let port = asked.unwrap_or(Port::DEFAULT);
    if claims.ports.allows(port) { Ok(Door::Port(port)) } else { Err(Reason::PortDenied) }
}

fn reason(refusal: Refusal) -> Reason {
    match refusal {
        Refusal::Unreadable => Reason::TokenUnreadable,
        Refusal::UnknownKey | Refusal::NotAuthentic => Reason::TokenRefused,
        Refusal::Expired => Reason::TokenExpired,
        Refusal::NotYetValid => Reason::TokenNotYetValid,
    }
}
