//! Credential found → opened → permit. A [`permit::Permit`] is the proof that *this* request passed every check; nothing
//! that wakes or reaches a microVM can be called without one.

pub(crate) mod extract;
pub(crate) mod permit;
