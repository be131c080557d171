//! The agent's messages: what the host asks, what the agent answers, what it says unasked. JSON on the control stream.

use std::collections::BTreeMap;

use model::{Egress, Generation, Port, Rights};
use serde::{Deserialize, Serialize};

/// What the guest agent starts: an OCI image's configuration, resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppSpec {
    /// ENTRYPOINT followed by CMD; not empty.
    pub argv: Vec<String>,
    /// ENV, with PATH and HOME always present.
    pub env: Vec<(String, String)>,
    /// WORKDIR; `/` if the image names none.
    pub workdir: String,
    /// USER as the image has it (`name`, `uid`, `name:group`, `uid:gid`), resolved in the guest; empty means root.
    pub user: String,
    /// EXPOSEd TCP ports, in order; the first one that listens means ready. Empty: any port that listens.
    pub exposed: Vec<Port>,
    /// What it may do.
    #[serde(default)]
    pub rights: Rights,
}

/// What the host asks. Each is answered by exactly one [`Reply`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Mount the root disk if that is not done, and start the app. Once per guest.
    Start(AppSpec),
    /// Answer when the app listens on one of these ports (any if empty), or after the limit.
    AwaitReady {
        /// The ports that count.
        exposed: Vec<Port>,
        /// In milliseconds.
        limit_ms: u64,
    },
    /// Counters, and proof that the agent lives.
    Stats,
    /// What the execution role gives from now on. Only for a microVM that has one since its restore.
    Role(Role),
}

/// What the host tells the agent at every restore, before anything else moves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// CLOCK_REALTIME of the host, nanoseconds since the epoch, as of the call of `AgentLink::attach`. The agent is given
    /// what it is when it sets its clock, to within half a round trip of the channel.
    pub realtime_ns: u64,
    /// 64 bytes from the host's RNG, hex.
    pub entropy: String,
    /// The generation that begins.
    pub generation: Generation,
    /// See `LaunchSpec::identity`.
    pub identity: BTreeMap<String, String>,
    /// Where this microVM may connect to.
    pub egress: Egress,
    /// Its execution role, if it has one.
    #[serde(default)]
    pub role: Option<Role>,
}

/// What the execution role of a microVM gives it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Role {
    /// `None`: the operator has given it none.
    pub credentials: Option<Credentials>,
}

/// Credentials for AWS or whatever speaks its protocols.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// The access key's id.
    pub access_key_id: String,
    /// The access key's secret.
    pub secret_access_key: String,
    /// Empty for a key that lasts.
    pub session_token: String,
}

impl std::fmt::Debug for Credentials {
    /// Shows none of them.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credentials")
    }
}

/// The agent's answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// The app listens on this port.
    Ready(Port),
    /// Not within the limit.
    NotReady,
    /// Counters.
    Stats {
        /// Open streams the agent knows.
        streams: u32,
        /// CLOCK_REALTIME in the guest, nanoseconds since the epoch.
        realtime_ns: u64,
    },
    /// Could not be done; a sentence.
    Failed(String),
}

/// What the agent says unasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The app (pid 1 of its namespace) ended; 128 + signal for a signal.
    AppExited {
        /// Exit code.
        code: i32,
    },
}
