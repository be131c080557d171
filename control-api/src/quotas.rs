//! How much memory an account may have of this node at a time (aws-behaviour §7.4).
//!
//! Owns: the sum, and that of two who come at the same time for the last of it one is refused. What is admitted is held as
//! a reservation until it can be seen in the sum. The numbers of images, versions and builds are the catalog's.

use model::MicrovmState;
use parking_lot::Mutex;

use crate::{
    operations::{Api, microvm_memory_mib},
    reply::{ApiError, ErrorKind},
};

/// What was admitted and is not there yet; MiB. Locked while the sum is made.
#[derive(Default)]
pub(crate) struct MemoryQuota {
    coming: Mutex<u64>,
}

/// Memory that was admitted. Drop it when what it is for can be seen, or is given up.
pub(crate) struct Reservation<'a> {
    quota: &'a MemoryQuota,
    mib: u64,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        *self.quota.coming.lock() -= self.mib;
    }
}

impl MemoryQuota {
    /// Memory for one more microVM or build.
    pub(crate) fn admit<'a>(&'a self, api: &Api, mib: u32) -> Result<Reservation<'a>, ApiError> {
        let mib = u64::from(mib);
        // What was coming before the lock was taken is in the sum or still coming, so nothing is missed.
        let mut coming = self.coming.lock();
        if allocated_mib(api) + *coming + mib > api.config.max_memory_mib {
            return Err(ApiError::new(ErrorKind::ServiceQuotaExceeded, "The base maximum allocated memory limit has been reached for this account."));
        }
        *coming += mib;
        Ok(Reservation { quota: self, mib })
    }
}

/// Of microVMs in every state but TERMINATED, and of builds that wait or run.
fn allocated_mib(api: &Api) -> u64 {
    let microvms = api.parts.controller.list().into_iter().filter(|view| view.state != MicrovmState::Terminated);
    let microvms: u64 = microvms.map(|view| u64::from(microvm_memory_mib(api, &view))).sum();
    let images = api.parts.images.images();
    let builds = images.iter().flat_map(|image| &image.versions).filter(|record| !record.state.is_finished());
    microvms + builds.map(|record| u64::from(record.memory.mib())).sum::<u64>()
}
