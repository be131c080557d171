//! Holds a request until its microVM is awake. Takes a [`Permit`], so that an unchecked request can wake nothing.

use std::{future::Future, time::Instant};

use idle_controller::{Awake, Refused, Unwoken, WakeReport};

use crate::{auth::permit::Permit, reply::Reason};

/// Why a held request goes no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotAwake {
    /// It is answered.
    Refused(Reason),
    /// Its client is gone; there is nobody to answer. A wake under way goes on for the others.
    ClientLeft,
}

/// Waits for the microVM until `deadline`, or until `left` says that the client is gone or may not wait. `left` is not
/// polled where the microVM is awake already. A wait in vain is reported as far as it is known.
pub(crate) async fn held(permit: &Permit, deadline: Instant, left: impl Future<Output = NotAwake>) -> Result<Awake, (NotAwake, WakeReport)> {
    let began = Instant::now();
    tokio::select! {
        // In this order: a microVM that is awake costs no watch of the client. Either arm may be dropped at any await.
        biased;
        awake = permit.microvm().awake_or_why(deadline) => {
            awake.map_err(|Unwoken { refused, report }| (NotAwake::Refused(reason(&refused)), report))
        }
        not_awake = left => Err((not_awake, WakeReport { waited: began.elapsed(), phases: Vec::new() })),
    }
}

fn reason(refused: &Refused) -> Reason {
    match refused {
        Refused::Asleep => Reason::Suspended,
        Refused::Terminated => Reason::Terminated,
        Refused::StartFailed { .. } => Reason::WakeFailed,
        Refused::TimedOut { .. } => Reason::WakeTimeout,
        Refused::Busy => Reason::TooManyWaiting,
        // Nobody on the request path asks for a suspend.
        Refused::SuspendFailed { .. } => Reason::Internal,
    }
}
