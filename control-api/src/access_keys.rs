//! Who may call: access key pairs in the AWS shared-credentials format, and the role of each.
//!
//! Owns: the credentials file (mode 0600, written whole or not at all), and which role a key has that nobody gave one:
//! the first is admin, any other may do nothing. Never shows a secret in `Debug` or an error.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use parking_lot::RwLock;
use sha2::{Digest as _, Sha512};

use crate::caller::{Caller, Role};

/// A few thousand keys; a larger file is not a credentials file.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// One key pair.
#[derive(Clone, PartialEq, Eq)]
pub struct AccessKey {
    /// `AKIA…`: public.
    pub id: String,
    /// The signing secret.
    pub secret: String,
}

impl fmt::Debug for AccessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// What is wrong with the credentials file.
#[derive(Debug, thiserror::Error)]
#[error("the access keys in {path} cannot be used: {why}")]
pub struct AccessKeysError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong, and what to do.
    pub why: String,
}

/// The key pairs of this node. Cheap to clone; all clones see a reload.
#[derive(Clone)]
pub struct AccessKeys {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    /// Held only to look one key up or to replace all.
    keys: RwLock<Keys>,
    /// By access key id. Held only to look one up or to replace all.
    roles: RwLock<BTreeMap<String, Role>>,
}

struct Keys {
    first: AccessKey,
    by_id: BTreeMap<String, Profile>,
}

struct Profile {
    name: String,
    secret: String,
}

impl AccessKeys {
    /// Reads the file, or makes it with one fresh key as profile `default`.
    pub fn open_or_create(path: &Path) -> Result<Self, AccessKeysError> {
        let file = CredentialsFile { path };
        let keys = match file.read()? {
            Some(keys) => keys,
            None => {
                file.write(&fresh_key())?;
                file.read()?.ok_or_else(|| file.error("it disappeared right after it was written"))?
            }
        };
        Ok(Self { shared: Arc::new(Shared { path: path.to_owned(), keys: RwLock::new(keys), roles: RwLock::default() }) })
    }

    /// Reads the file again. On an error the keys stay as they were.
    pub fn reload(&self) -> Result<(), AccessKeysError> {
        let file = CredentialsFile { path: &self.shared.path };
        let keys = file.read()?.ok_or_else(|| file.error("it has disappeared; restore it or restart to make a new one"))?;
        *self.shared.keys.write() = keys;
        Ok(())
    }

    /// Gives keys their roles, by access key id; those of before are gone. Ids that the file does not have are kept for the
    /// time when it has them.
    pub fn set_roles(&self, roles: BTreeMap<String, Role>) {
        *self.shared.roles.write() = roles;
    }

    /// Who a key belongs to; `None`: the file does not have it.
    pub(crate) fn caller(&self, id: &str) -> Option<Caller> {
        let keys = self.shared.keys.read();
        let name = keys.by_id.get(id)?.name.clone();
        let given = self.shared.roles.read().get(id).cloned();
        let role = given.or_else(|| (keys.first.id == id).then_some(Role::Admin));
        Some(Caller { key: id.to_owned(), name, role })
    }

    /// The key of profile `default`, else the first of the file.
    pub fn first(&self) -> AccessKey {
        self.shared.keys.read().first.clone()
    }

    /// The secret that goes with an id.
    pub fn secret(&self, id: &str) -> Option<String> {
        self.shared.keys.read().by_id.get(id).map(|profile| profile.secret.clone())
    }
}

impl fmt::Debug for AccessKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = self.shared.keys.read();
        f.debug_struct("AccessKeys").field("path", &self.shared.path).field("n_keys", &keys.by_id.len()).finish_non_exhaustive()
    }
}

/// `AKIA` and 16 letters of base32, 40 letters of base64: the forms AWS's own keys have. Random are 122 bits of each
/// of the uuids, stretched by SHA-512.
fn fresh_key() -> AccessKey {
    const BASE32: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let random = |what: &str| {
        let mut hash = Sha512::new_with_prefix(what);
        hash.update(uuid::Uuid::new_v4().as_bytes());
        hash.update(uuid::Uuid::new_v4().as_bytes());
        hash.finalize()
    };
    let id = random("id").iter().take(16).map(|byte| char::from(BASE32[usize::from(byte % 32)])).collect::<String>();
    // 30 bytes make 40 letters. Slashes are legal but a nuisance in shells.
    let secret = STANDARD.encode(&random("secret")[..30]).replace('/', "x");
    AccessKey { id: format!("AKIA{id}"), secret }
}

struct CredentialsFile<'a> {
    path: &'a Path,
}

impl CredentialsFile<'_> {
    fn error(&self, why: impl Into<String>) -> AccessKeysError {
        AccessKeysError { path: self.path.to_owned(), why: why.into() }
    }

    fn read(&self) -> Result<Option<Keys>, AccessKeysError> {
        let file = match File::open(self.path) {
            Ok(file) => file,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(self.error(format!("opening it failed: {cause}"))),
        };
        let mode = file.metadata().map_err(|cause| self.error(format!("its mode cannot be read: {cause}")))?.mode();
        if mode & 0o077 != 0 {
            return Err(self.error(format!("others may read it (mode {:04o}); run chmod 600 on it, and replace the keys if they may have", mode & 0o7777)));
        }
        let mut text = String::new();
        file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|cause| self.error(format!("reading it failed: {cause}")))?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(self.error("it is too large to be a credentials file"));
        }
        parse(&text).map(Some).map_err(|why| self.error(why))
    }

    fn write(&self, key: &AccessKey) -> Result<(), AccessKeysError> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let fresh = self.path.with_file_name(format!(".{name}.{}", std::process::id()));
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let text = format!("[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n", key.id, key.secret);
        let written = (|| {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&fresh, self.path)?;
            File::open(directory)?.sync_all()
        })();
        written.map_err(|cause: io::Error| {
            // The rename did not happen, so the new file is ours alone and may hold the key.
            let _ = fs::remove_file(&fresh);
            self.error(format!("writing it failed: {cause}"))
        })
    }
}

/// The shared-credentials format: `[profile]` lines and `name = value` lines; other names are other tools' business.
fn parse(text: &str) -> Result<Keys, String> {
    let mut profiles: Vec<(String, Option<String>, Option<String>)> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(profile) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            profiles.push((profile.trim().to_owned(), None, None));
            continue;
        }
        let (name, value) = line.split_once('=').ok_or_else(|| format!("line {number} is neither [profile] nor name = value"))?;
        let profile = profiles.last_mut().ok_or_else(|| format!("line {number} stands before the first [profile]"))?;
        match name.trim() {
            "aws_access_key_id" => profile.1 = Some(value.trim().to_owned()),
            "aws_secret_access_key" => profile.2 = Some(value.trim().to_owned()),
            _ => {}
        }
    }
    let mut first: Option<AccessKey> = None;
    let mut by_id = BTreeMap::new();
    for (profile, id, secret) in profiles {
        let whole = |value: Option<String>, what| value.filter(|value| !value.is_empty()).ok_or(format!("the profile {profile} has no {what}"));
        let (id, secret) = (whole(id, "aws_access_key_id")?, whole(secret, "aws_secret_access_key")?);
        if first.is_none() || profile == "default" {
            first = Some(AccessKey { id: id.clone(), secret: secret.clone() });
        }
        if let Some(before) = by_id.insert(id.clone(), Profile { name: profile, secret }) {
            return Err(format!("the access key {id} stands in it twice, first in the profile {}", before.name));
        }
    }
    let first = first.ok_or("it holds no key; remove it and a start makes a new one")?;
    Ok(Keys { first, by_id })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_fresh_file_holds_one_key_and_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        let made = AccessKeys::open_or_create(&path).unwrap();
        let key = made.first();
        assert_eq!((key.id.len(), key.secret.len()), (20, 40));
        assert!(key.id.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit()));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let read = AccessKeys::open_or_create(&path).unwrap();
        assert_eq!(read.first(), key);
        assert_eq!(read.secret(&key.id), Some(key.secret.clone()));
        assert_eq!(read.secret("AKIAOTHER"), None);
        assert!(!format!("{made:?} {key:?}").contains(&key.secret));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn several_profiles_are_several_keys_and_default_is_first() {
        let text = "# ours\n[other]\naws_access_key_id=A1\naws_secret_access_key = s1=/+\nregion = x\n\n[default]\naws_secret_access_key=s2\naws_access_key_id=A2\n";
        let keys = parse(text).unwrap_or_else(|why| panic!("{why}"));
        assert_eq!(keys.first.id, "A2");
        assert_eq!((keys.by_id["A1"].name.as_str(), keys.by_id["A1"].secret.as_str()), ("other", "s1=/+"));
        assert_eq!(keys.by_id.len(), 2);
    }

    #[test]
    fn the_first_key_is_admin_and_the_others_are_what_they_are_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        let keys = AccessKeys::open_or_create(&path).unwrap();
        let first = keys.first().id;
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("[ops]\naws_access_key_id=A1\naws_secret_access_key=s\n{text}")).unwrap();
        keys.reload().unwrap();
        let role = |id: &str| keys.caller(id).map(|caller| (caller.name, caller.role));
        assert_eq!(role(&first), Some(("default".to_owned(), Some(Role::Admin))));
        assert_eq!(role("A1"), Some(("ops".to_owned(), None)));
        assert_eq!(role("A2"), None);
        keys.set_roles(BTreeMap::from([("A1".to_owned(), Role::Operator), (first.clone(), Role::TokenMinter(["a".parse().unwrap()].into()))]));
        assert_eq!(role("A1").unwrap().1, Some(Role::Operator));
        assert_eq!(role(&first).unwrap().1, Some(Role::TokenMinter(["a".parse().unwrap()].into())), "an entry counts for the first as well");
        keys.set_roles(BTreeMap::new());
        assert_eq!((role("A1").unwrap().1, role(&first).unwrap().1), (None, Some(Role::Admin)));
    }

    #[test]
    fn a_file_that_is_not_right_is_refused_with_the_reason() {
        for (text, why) in [
            ("", "holds no key"),
            ("aws_access_key_id=A\n", "before the first"),
            ("[default]\nnonsense\n", "line 2"),
            ("[default]\naws_access_key_id=A\n", "no aws_secret_access_key"),
            ("[default]\naws_access_key_id=\naws_secret_access_key=s", "no aws_access_key_id"),
            ("[a]\naws_access_key_id=A\naws_secret_access_key=s\n[b]\naws_access_key_id=A\naws_secret_access_key=t\n", "twice"),
        ] {
            let told = parse(text).map(|_| ()).unwrap_err();
            assert!(told.contains(why), "{text}: {told}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        let keys = AccessKeys::open_or_create(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(AccessKeys::open_or_create(&path).unwrap_err().why.contains("chmod 600"));
        assert!(keys.reload().is_err());
        fs::remove_file(&path).unwrap();
        assert!(keys.reload().unwrap_err().why.contains("disappeared"));
        assert!(keys.secret(&keys.first().id).is_some(), "a failed reload changes nothing");
    }
}
