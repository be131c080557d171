//! The microVMs, which may not be there yet.
//!
//! A gateway that takes over from an earlier process accepts connections before that process has let go of its microVMs.
//! Their requests wait here.

use std::sync::Arc;

use idle_controller::Controller;
use tokio::sync::SetOnce;

/// The controller, once there is one. Cheap to clone.
#[derive(Clone, Default)]
pub struct Microvms {
    controller: Arc<SetOnce<Controller>>,
}

impl Microvms {
    /// None yet: requests are held until [`Microvms::arrive`], for at most `hold` after the `grace` that the process before this one has.
    pub fn awaited() -> Self {
        Self::default()
    }

    /// They are there. Only the first call counts.
    pub fn arrive(&self, controller: Controller) {
        let _ = self.controller.set(controller);
    }

    /// The controller, if it is there.
    pub(crate) fn get(&self) -> Option<&Controller> {
        self.controller.get()
    }

    /// Waits until it is there.
    pub(crate) async fn there(&self) {
        self.controller.wait().await;
    }
}

impl From<Controller> for Microvms {
    fn from(controller: Controller) -> Self {
        let microvms = Self::awaited();
        microvms.arrive(controller);
        microvms
    }
}
