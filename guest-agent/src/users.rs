//! Who the app runs as: the image's USER, resolved with the image's own files as Docker does it. Pure.

use rustix::process::{Gid, Uid};

/// A resolved USER.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub uid: Uid,
    pub gid: Gid,
    /// Supplementary groups; only if USER names no group.
    pub groups: Vec<Gid>,
}

/// USER names what the image does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UserError {
    #[error("user `{0}` is not in the image's /etc/passwd")]
    NoUser(String),
    #[error("group `{0}` is not in the image's /etc/group")]
    NoGroup(String),
}

/// `text` is `name`, `uid`, `name:group`, `uid:gid` or a mixture; empty means root.
pub(crate) fn resolve(text: &str, passwd: &str, group: &str) -> Result<User, UserError> {
    let (user, wanted_group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    let entry = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        let uid = fields.get(2).and_then(|uid| uid.parse::<u32>().ok());
        fields.first() == Some(&user) || (number.is_some() && uid == number)
    });
    let field = |at: usize| entry.as_ref().and_then(|fields| fields.get(at)?.parse::<u32>().ok());
    let uid = field(2).or(number).filter(|uid| *uid != u32::MAX).ok_or_else(|| UserError::NoUser(user.to_owned()))?;
    let groups = || group.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let gid_of = |fields: &[&str]| fields.get(2).and_then(|gid| gid.parse::<u32>().ok()).filter(|gid| *gid != u32::MAX);
    let Some(wanted) = wanted_group else {
        let name = entry.as_ref().map_or(user, |fields| fields[0]);
        let supplementary = groups()
            .filter(|fields| fields.get(3).is_some_and(|members| members.split(',').any(|member| member == name)))
            .filter_map(|fields| gid_of(&fields).map(Gid::from_raw))
            .collect();
        return Ok(User { uid: Uid::from_raw(uid), gid: Gid::from_raw(field(3).unwrap_or(0)), groups: supplementary });
    };
    let gid = groups()
        .find(|fields| fields.first() == Some(&wanted))
        .and_then(|fields| gid_of(&fields))
        .or_else(|| wanted.parse().ok().filter(|gid| *gid != u32::MAX))
        .ok_or_else(|| UserError::NoGroup(wanted.to_owned()))?;
    Ok(User { uid: Uid::from_raw(uid), gid: Gid::from_raw(gid), groups: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnode:x:1000:1001::/home/node:/bin/sh\nbroken\n\nodd:x:many:1::/:\n";
    const GROUP: &str = "root:x:0:\nnode:x:1001:\nvideo:x:44:someone,node\nadm:x:4:node\nodd:x:many:node\n";

    #[track_caller]
    fn check(text: &str, uid: u32, gid: u32, groups: &[u32]) {
        let groups = groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        assert_eq!(resolve(text, PASSWD, GROUP), Ok(User { uid: Uid::from_raw(uid), gid: Gid::from_raw(gid), groups }), "{text}");
    }

    #[test]
    fn users_are_found_as_docker_finds_them() {
        check("", 0, 0, &[]);
        check("root", 0, 0, &[]);
        check("node", 1000, 1001, &[44, 4]);
        check("1000", 1000, 1001, &[44, 4]);
        check("node:video", 1000, 44, &[]);
        check("node:", 1000, 1001, &[44, 4]);
        check("node:5000", 1000, 5000, &[]);
        check("4711", 4711, 0, &[]);
        check("4711:adm", 4711, 4, &[]);
        check(":adm", 0, 4, &[]);
    }

    #[test]
    fn unknown_names_are_said() {
        assert_eq!(resolve("nobody", PASSWD, GROUP), Err(UserError::NoUser("nobody".to_owned())));
        assert_eq!(resolve("odd", PASSWD, GROUP), Err(UserError::NoUser("odd".to_owned())));
        assert_eq!(resolve("node:staff", PASSWD, GROUP), Err(UserError::NoGroup("staff".to_owned())));
        assert_eq!(resolve("-1", PASSWD, GROUP), Err(UserError::NoUser("-1".to_owned())));
        assert_eq!(resolve("4294967295", PASSWD, GROUP), Err(UserError::NoUser("4294967295".to_owned())));
        assert!(resolve("node", "", "").is_err());
        assert!(resolve("0", "", "").is_ok());
    }
}
