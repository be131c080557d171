//! Who calls: the holder of an access key, once a signature has shown it, and what that key may do.

use std::collections::BTreeSet;

use model::ImageName;

/// What an access key may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Everything.
    Admin,
    /// Everything but making, changing and deleting images and their tags.
    Operator,
    /// Mint tokens for the microVMs of these images, and look at them.
    TokenMinter(BTreeSet<ImageName>),
}

/// The signer of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The access key id. Client tokens and rates belong to it.
    pub(crate) key: String,
    /// The key's profile in the credentials file: the user's name in refusals.
    pub(crate) name: String,
    /// `None`: nobody has said that this key may do anything.
    pub(crate) role: Option<Role>,
}

impl Caller {
    /// Whether microVMs of an image may be looked at.
    pub(crate) fn sees(&self, image: &ImageName) -> bool {
        match &self.role {
            Some(Role::Admin | Role::Operator) => true,
            Some(Role::TokenMinter(images)) => images.contains(image),
            None => false,
        }
    }
}
