//! Who calls: the holder of an access key, once a signature has shown it.

/// The signer of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The access key id. Client tokens belong to it.
    pub(crate) key: String,
}
