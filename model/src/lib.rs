//! The nouns every piece of Dormouse shares.
//!
//! Owns: ids, public states, ports, doors and port scopes, the idle policy, an app's rights, lifecycle hooks, the clock trait, what is used and what it costs, how an error is put into words. Never does I/O, never reads the
//! time by itself, knows nothing of engines, sockets or HTTP.
#![forbid(unsafe_code)]

pub mod chain;
pub mod clock;
pub mod hooks;
pub mod ids;
pub mod policy;
pub mod port;
pub mod rights;
pub mod size;
pub mod state;
pub mod usage;

pub use chain::chain;
pub use clock::{Clock, SystemClock};
pub use hooks::{Hook, Hooks, RunPayload};
pub use ids::{EndpointId, Generation, ImageName, ImageVersion, MicrovmId, ParseIdError};
pub use policy::{IdlePolicy, MAX_DURATION, SuspendHookFailure};
pub use port::{Door, Port, PortRange, PortScope};
pub use rights::{BuildNetwork, Capabilities, Egress, Rights};
pub use size::{MemorySize, Shape, SizeSeen};
pub use state::MicrovmState;
pub use usage::{Cost, Prices, Usage};
