//! Credentials of execution roles, as the operator has written them down: a file in the form of AWS's shared credentials whose
//! profiles are named by the ARNs of roles. Read at each launch and wake, and again while a microVM runs when the file has changed,
//! since it may run for hours and what a role gives may last for one.

use std::{fs, io, os::unix::fs::MetadataExt as _, path::Path, time::Duration};

use protocol::agent::{Credentials, Role};

use super::blocking;

/// Between two looks at the file.
const LOOK: Duration = Duration::from_secs(5);

/// A role, and what the guest was told of it.
pub(super) struct Granted {
    /// Its ARN.
    pub arn: String,
    /// `None`: nobody knows, as after a restart of the node.
    pub last: Option<Role>,
}

/// What a role gives. A file that cannot be read gives nothing, and says so in the log.
pub(super) fn role(arn: &str, file: Option<&Path>) -> Role {
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
    Role { credentials }
}

/// Which file it is, as long as it is not changed: written in place or replaced, it is another one in one of these. `None`: there
/// is none.
type Stamp = Option<(u64, u64, i64, i64)>;

/// Looks after what a role gives. A file that was changed is read when it has been left alone for a while: half of one could be
/// read as a role without credentials, and those that an operator takes away are taken away.
pub(super) struct Follower<'a> {
    arn: &'a str,
    file: &'a Path,
    told: Option<Role>,
    looked: Option<Stamp>,
    /// What was read to the end and told.
    settled: Option<Stamp>,
}

impl<'a> Follower<'a> {
    /// From what was granted on.
    pub fn new(granted: &'a Granted, file: &'a Path) -> Self {
        Self { arn: &granted.arn, file, told: granted.last.clone(), looked: None, settled: None }
    }

    /// What the role gives, as soon as that is not what the guest was told last; again and again until it was.
    pub async fn news(&mut self) -> Role {
        loop {
            tokio::time::sleep(LOOK).await;
            let (path, arn, looked, settled) = (self.file.to_owned(), self.arn.to_owned(), self.looked, self.settled);
            let look = blocking(move || {
                let now = Some(fs::metadata(&path).map(|file| (file.ino(), file.len(), file.mtime(), file.mtime_nsec())).ok());
                (now, (now == looked && now != settled).then(|| role(&arn, Some(&path))))
            });
            let (now, role) = look.await;
            self.looked = now;
            match role {
                Some(role) if self.told.as_ref() != Some(&role) => return role,
                Some(_) => self.settled = now,
                None => {}
            }
        }
    }

    /// The guest was told.
    pub fn told(&mut self, role: Role) {
        (self.told, self.settled) = (Some(role), self.looked);
    }
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
        assert_eq!(role("arn:aws:iam::1:role/a", None), Role { credentials: None });
    }
}
