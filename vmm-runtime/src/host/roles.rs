//! Credentials of execution roles, as the operator has written them down: a file in the form of AWS's shared credentials whose
//! profiles are named by the ARNs of roles. Read at each launch and wake, so that a new secret is there after the next sleep.

use std::{fs, io, path::Path};

use model::rights::EXECUTION_ROLE;
use protocol::agent::{Credentials, Role};

/// What the role of a microVM gives it, if it has one. A file that cannot be read gives nothing, and says so in the log.
pub(super) fn role(identity: &std::collections::BTreeMap<String, String>, file: Option<&Path>) -> Option<Role> {
    let arn = identity.get(EXECUTION_ROLE)?;
    let credentials = file.and_then(|file| match fs::read_to_string(file) {
        Ok(text) => credentials(&text, arn),
        Err(error) => {
            // Not the content: it is secrets.
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(file = %file.display(), %error, "the credentials of execution roles cannot be read");
            }
            None
        }
    });
    Some(Role { credentials })
}

fn credentials(text: &str, arn: &str) -> Option<Credentials> {
    let mut inside = false;
    let (mut id, mut secret, mut token) = (None, None, String::new());
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';'])) {
        if let Some(profile) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            inside = profile.trim() == arn;
        } else if let Some((key, value)) = line.split_once('=').filter(|_| inside) {
            let value = value.trim().to_owned();
            match key.trim() {
                "aws_access_key_id" => id = Some(value),
                "aws_secret_access_key" => secret = Some(value),
                "aws_session_token" => token = value,
                _ => {}
            }
        }
    }
    Some(Credentials { access_key_id: id?, secret_access_key: secret?, session_token: token })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# ours\n[arn:aws:iam::1:role/a]\naws_access_key_id = AKIAA\naws_secret_access_key=s=a\n\n[arn:aws:iam::1:role/b]\n\
        aws_access_key_id=AKIAB\naws_secret_access_key=sb\naws_session_token = t\nregion=x\n[arn:aws:iam::1:role/c]\naws_access_key_id=AKIAC\n";

    #[test]
    fn a_role_has_its_own_profile_or_nothing() {
        let found = |arn| credentials(FILE, arn).map(|found| [found.access_key_id, found.secret_access_key, found.session_token]);
        assert_eq!(found("arn:aws:iam::1:role/a"), Some(["AKIAA", "s=a", ""].map(str::to_owned)));
        assert_eq!(found("arn:aws:iam::1:role/b"), Some(["AKIAB", "sb", "t"].map(str::to_owned)));
        assert_eq!(found("arn:aws:iam::1:role/c"), None, "half of one");
        assert_eq!(found("arn:aws:iam::1:role/d"), None);
        assert_eq!(role(&Default::default(), None), None);
    }
}
