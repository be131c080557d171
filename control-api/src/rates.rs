//! How often one access key may call.
//!
//! Owns: one allowance per access key and group of operations: so many a second, a second's worth at once (as AWS's, whose
//! burst equals the rate). Only keys of the credentials file have one, so there are few.

use std::{collections::HashMap, num::NonZeroU32, time::Duration};

use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter,
    clock::{Clock as _, DefaultClock},
};
use parking_lot::Mutex;

use crate::{
    reply::{ApiError, ErrorKind},
    routes::Operation,
};

/// Calls a second of one access key, by operation; `None`: any number.
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs, reason = "each is named as its operation")]
pub struct Rates {
    pub run: Option<NonZeroU32>,
    pub suspend: Option<NonZeroU32>,
    pub resume: Option<NonZeroU32>,
    pub terminate: Option<NonZeroU32>,
    pub get_microvm: Option<NonZeroU32>,
    pub list_microvms: Option<NonZeroU32>,
    pub auth_token: Option<NonZeroU32>,
    pub shell_auth_token: Option<NonZeroU32>,
    /// CreateMicrovmImage, UpdateMicrovmImage, UpdateMicrovmImageVersion and the two deletes, together.
    pub image_changes: Option<NonZeroU32>,
    /// All others, together.
    pub others: Option<NonZeroU32>,
}

/// Operations with one allowance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Group {
    Run,
    Suspend,
    Resume,
    Terminate,
    Get,
    List,
    AuthToken,
    ShellAuthToken,
    ImageChanges,
    Others,
}

impl Group {
    fn of(operation: Operation) -> Self {
        use Operation as Op;
        match operation {
            Op::RunMicrovm => Self::Run,
            Op::SuspendMicrovm => Self::Suspend,
            Op::ResumeMicrovm => Self::Resume,
            Op::TerminateMicrovm => Self::Terminate,
            Op::GetMicrovm => Self::Get,
            Op::ListMicrovms => Self::List,
            Op::CreateMicrovmAuthToken => Self::AuthToken,
            Op::CreateMicrovmShellAuthToken => Self::ShellAuthToken,
            Op::CreateMicrovmImage
            | Op::UpdateMicrovmImage
            | Op::DeleteMicrovmImage
            | Op::UpdateMicrovmImageVersion
            | Op::DeleteMicrovmImageVersion => Self::ImageChanges,
            _ => Self::Others,
        }
    }
}

/// What each key has left.
pub(crate) struct Allowances {
    rates: Rates,
    clock: DefaultClock,
    /// Held for one look.
    by_key: Mutex<HashMap<(String, Group), DefaultDirectRateLimiter>>,
}

impl Allowances {
    pub(crate) fn new(rates: Rates) -> Self {
        Self { rates, clock: DefaultClock::default(), by_key: Mutex::default() }
    }

    /// Takes one call from a key's allowance. `key` is one of the credentials file.
    pub(crate) fn take(&self, key: &str, operation: Operation) -> Result<(), ApiError> {
        let group = Group::of(operation);
        let Some(rate) = self.rate(group) else { return Ok(()) };
        let mut by_key = self.by_key.lock();
        let limiter = by_key.entry((key.to_owned(), group)).or_insert_with(|| RateLimiter::direct(Quota::per_second(rate)));
        limiter.check().map_err(|early| {
            let wait = early.wait_time_from(self.clock.now());
            // Whole seconds, and one at least: the header knows no less.
            let secs = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            ApiError::new(ErrorKind::Throttling, "Rate exceeded").after(Duration::from_secs(secs.max(1)))
        })
    }

    fn rate(&self, group: Group) -> Option<NonZeroU32> {
        let rates = &self.rates;
        match group {
            Group::Run => rates.run,
            Group::Suspend => rates.suspend,
            Group::Resume => rates.resume,
            Group::Terminate => rates.terminate,
            Group::Get => rates.get_microvm,
            Group::List => rates.list_microvms,
            Group::AuthToken => rates.auth_token,
            Group::ShellAuthToken => rates.shell_auth_token,
            Group::ImageChanges => rates.image_changes,
            Group::Others => rates.others,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_a_seconds_worth_of_each_group_and_others_have_their_own() {
        // One in 1,000 s could come back while this runs; 5 a second could not be told from a slow test.
        let allowances = Allowances::new(Rates { run: NonZeroU32::new(3), ..Rates::default() });
        let take = |key: &str, operation| allowances.take(key, operation).map_err(|error| error.kind);
        let mut taken = 0;
        while take("A", Operation::RunMicrovm).is_ok() {
            taken += 1;
            assert!(taken < 1_000, "there is an end to it");
        }
        assert!(taken >= 3);
        assert_eq!(take("B", Operation::RunMicrovm), Ok(()), "another key");
        for operation in [Operation::GetMicrovm, Operation::ListTags, Operation::SuspendMicrovm] {
            assert_eq!(take("A", operation), Ok(()), "another operation, without a rate");
        }
        let mut refused = allowances.take("A", Operation::RunMicrovm);
        while refused.is_ok() {
            refused = allowances.take("A", Operation::RunMicrovm);
        }
        assert_eq!(refused.unwrap_err().retry_after, Duration::from_secs(1));
    }
}
