//! The saved form of the device.
//!
//! A postcard record, then the bytes of all backlogs in the order of the streams. What is read here comes from a file
//! that is only half trusted: every number is checked before it is used.

use std::collections::{BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::{
    connection::{Connection, SavedConnection},
    muxer::{HOST_PORTS, MAX_CONNECTIONS, MAX_ORPHANS, Orphan, WINDOW},
};

/// Of this file's record.
const VERSION: u16 = 1;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedDevice {
    version: u16,
    pub next_host_port: u32,
    pub orphans: Vec<Orphan>,
    connections: Vec<SavedConnection>,
}

/// Writes everything.
pub(super) fn save<'a>(next_host_port: u32, orphans: Vec<Orphan>, connections: impl Iterator<Item = &'a Connection>) -> Vec<u8> {
    let (connections, backlogs): (Vec<_>, Vec<_>) = connections.map(Connection::save).unzip();
    let device = SavedDevice { version: VERSION, next_host_port, orphans, connections };
    let mut bytes = postcard::to_allocvec(&device).expect("integers and lists of them can always be written");
    for backlog in backlogs {
        let (front, back) = backlog.as_slices();
        bytes.extend_from_slice(front);
        bytes.extend_from_slice(back);
    }
    bytes
}

/// Reads what [`save`] wrote; the error is what is wrong with it.
pub(super) fn restore(bytes: &[u8]) -> Result<(SavedDevice, Vec<Connection>), String> {
    let (saved, mut rest): (SavedDevice, &[u8]) = postcard::take_from_bytes(bytes).map_err(|error| format!("it was not understood ({error})"))?;
    if saved.version != VERSION {
        return Err(format!("it has version {}, this program reads {VERSION}", saved.version));
    }
    if !HOST_PORTS.contains(&saved.next_host_port) {
        return Err(format!("the next host port is {}", saved.next_host_port));
    }
    if saved.connections.len() > MAX_CONNECTIONS || saved.orphans.len() > MAX_ORPHANS {
        return Err(format!("it holds {} streams and {} resets", saved.connections.len(), saved.orphans.len()));
    }
    let mut ports = BTreeSet::new();
    let mut connections = Vec::with_capacity(saved.connections.len());
    for connection in &saved.connections {
        let SavedConnection { host_port, window, backlog_bytes, .. } = *connection;
        if !HOST_PORTS.contains(&host_port) || !ports.insert(host_port) {
            return Err(format!("a stream has host port {host_port}, which is out of range or taken"));
        }
        if window > WINDOW || backlog_bytes > window {
            return Err(format!("a stream holds {backlog_bytes} bytes in a window of {window}"));
        }
        let Some((backlog, after)) = rest.split_at_checked(backlog_bytes as usize) else {
            return Err("bytes of a stream are missing".to_owned());
        };
        rest = after;
        connections.push(Connection::restore(connection, VecDeque::from(backlog.to_vec())));
    }
    if !rest.is_empty() {
        return Err(format!("{} bytes belong to no stream", rest.len()));
    }
    Ok((saved, connections))
}
