//! systemd's readiness protocol (sd_notify(3)): that the node serves, and which process it is now.

use std::os::{
    linux::net::SocketAddrExt as _,
    unix::net::{SocketAddr, UnixDatagram},
};

/// Says that this process serves, if a service manager wants to know ($NOTIFY_SOCKET). After an upgrade it so learns of its
/// new main process (`NotifyAccess=all`).
pub fn ready() {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_encoded_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&name),
    };
    let text = format!("READY=1\nMAINPID={}\n", std::process::id());
    let said = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(text.as_bytes(), &address));
    if let Err(error) = said {
        tracing::warn!(%error, "the service manager could not be told that the node serves; is $NOTIFY_SOCKET right?");
    }
}
