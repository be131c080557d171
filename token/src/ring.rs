//! The keys that mint and open tokens, and the file they are kept in.
//!
//! Owns: `token-keys.json` (mode 0600, replaced whole or not at all), rotation, which key opens until when. Never shows
//! a key: `Debug` and errors name keys by their id. A lock file beside the ring keeps two processes from rotating at once.

use std::{
    collections::HashMap,
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Claims, MAX_LIFETIME, Refusal, cache::Cache, jwe};

/// The longest time by which an issuer's clock may be ahead of ours.
const MAX_SKEW: Duration = Duration::from_secs(5);
/// How long after a rotation another process may still mint with the key that was replaced, because it has not read the ring
/// again: what it mints lives its whole life all the same.
const REREAD_WITHIN: Duration = Duration::from_secs(60);
/// A ring holds a key per rotation of the last hour; a file larger than this is not a ring.
const MAX_FILE_BYTES: u64 = 256 * 1024;

/// What went wrong with the ring's file.
#[derive(Debug, thiserror::Error)]
#[error("the token key ring {path} cannot be used: {why}")]
pub struct KeyRingError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong, and what to do.
    pub why: String,
}

/// The keys that mint and open tokens. Cheap to clone; all clones see a rotation at once.
#[derive(Clone)]
pub struct KeyRing {
    shared: Arc<Shared>,
    skew: Duration,
}

struct Shared {
    path: PathBuf,
    /// Read on every request, replaced by a rotation.
    keys: ArcSwap<Keys>,
}

/// The ring in memory: the first key of the file mints; every key opens what begins with exactly one of its headers.
struct Keys {
    minting: Arc<Key>,
    by_header: HashMap<String, Arc<Key>>,
    n_keys: usize,
    /// What these keys have opened.
    opened: Cache,
}

struct Key {
    kid: Uuid,
    /// Of the tokens it mints.
    header: String,
    secret: [u8; jwe::KEY_BYTES],
    opens_until: Option<SystemTime>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedRing {
    version: u32,
    keys: Vec<SavedKey>,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedKey {
    kid: Uuid,
    /// 32 bytes, base64url.
    k: String,
    /// Seconds since 1970.
    created_at: u64,
    /// Seconds since 1970; null for the key that mints.
    opens_until: Option<u64>,
}

impl KeyRing {
    /// Reads the ring, or makes it with one fresh key (file mode 0600, written atomically).
    pub fn open_or_create(path: &Path) -> Result<Self, KeyRingError> {
        let file = RingFile { path };
        let _lock = file.lock()?;
        // Of a writer that was killed: with the lock held there is no other. It may hold a key.
        let _ = fs::remove_file(file.sibling("new"));
        let saved = match file.read()? {
            Some(saved) => saved,
            None => {
                let fresh = SavedRing { version: 1, keys: vec![SavedKey::fresh(SystemTime::now())] };
                file.write(&fresh)?;
                fresh
            }
        };
        let keys = file.checked(saved)?;
        Ok(Self::of(path, keys))
    }

    /// Reads the ring, which must be there.
    pub fn open_existing(path: &Path) -> Result<Self, KeyRingError> {
        let file = RingFile { path };
        let saved = file.read()?.ok_or_else(|| file.error("there is none; dormouse serve makes it at its first start"))?;
        Ok(Self::of(path, file.checked(saved)?))
    }

    fn of(path: &Path, keys: Keys) -> Self {
        Self { shared: Arc::new(Shared { path: path.to_owned(), keys: ArcSwap::from_pointee(keys) }), skew: Duration::ZERO }
    }

    /// Lets tokens be issued up to `skew` (at most 5 s) in the future, for nodes whose clocks differ. The default is 0.
    #[must_use]
    pub fn with_clock_skew(self, skew: Duration) -> Self {
        Self { skew: skew.min(MAX_SKEW), ..self }
    }

    /// Adds a fresh key for minting; the older ones still open whatever they have minted (cases.md 15). Every process that uses
    /// the ring must [`KeyRing::reload`] it within a minute.
    pub fn rotate(&self) -> Result<(), KeyRingError> {
        self.rotate_at(SystemTime::now())
    }

    pub(crate) fn rotate_at(&self, now: SystemTime) -> Result<(), KeyRingError> {
        let file = RingFile { path: &self.shared.path };
        let _lock = file.lock()?;
        // The file is read again, so that a rotation by another process is not undone.
        let mut saved = file.read()?.ok_or_else(|| file.error("it has disappeared; restore it or restart to make a new one"))?;
        let until = unix_seconds(now + MAX_LIFETIME + REREAD_WITHIN);
        saved.keys.retain(|key| key.opens_until.is_none_or(|end| end > unix_seconds(now)));
        for key in &mut saved.keys {
            key.opens_until.get_or_insert(until);
        }
        saved.keys.insert(0, SavedKey::fresh(now));
        file.write(&saved)?;
        let keys = file.checked(saved)?;
        tracing::info!(key.id = %keys.minting.kid, n_keys = keys.n_keys, "the token key was rotated");
        self.shared.keys.store(Arc::new(keys));
        Ok(())
    }

    /// Reads the file again (after a rotation by another process). On an error the keys stay as they were.
    pub fn reload(&self) -> Result<(), KeyRingError> {
        let file = RingFile { path: &self.shared.path };
        let saved = file.read()?.ok_or_else(|| file.error("it has disappeared; restore it or restart to make a new one"))?;
        self.shared.keys.store(Arc::new(file.checked(saved)?));
        Ok(())
    }

    /// A token for these claims. Claims that live longer than [`MAX_LIFETIME`] make a token that nobody opens.
    pub fn mint(&self, claims: &Claims) -> String {
        let keys = self.shared.keys.load();
        jwe::encrypt(&keys.minting.secret, &keys.minting.header, &claims.to_json())
    }

    /// Opens a token and checks its time against `now`. Which microVM and which port is the caller's to check.
    pub fn open(&self, token: &str, now: SystemTime) -> Result<Claims, Refusal> {
        let keys = self.shared.keys.load();
        let known = keys.opened.find(token, |entry| {
            still_opens(entry.key_opens_until, now)?;
            entry.claims.check_time(now, self.skew).map(|()| entry.claims.clone())
        });
        if let Some(answer) = known {
            return answer;
        }
        let parts = jwe::split(token)?;
        let key = keys.by_header.get(parts.header).ok_or(Refusal::UnknownKey)?;
        still_opens(key.opens_until, now)?;
        let claims = Claims::from_json(&jwe::decrypt(&key.secret, &parts)?)?;
        claims.check_time(now, self.skew)?;
        keys.opened.keep(token, &claims, key.opens_until);
        Ok(claims)
    }

    /// Makes the cache believe that the key of this token's header has opened it.
    #[cfg(test)]
    pub(crate) fn plant(&self, token: &str, claims: &Claims) {
        let keys = self.shared.keys.load();
        let header = token.split('.').next().unwrap_or_default();
        keys.opened.keep(token, claims, keys.by_header[header].opens_until);
    }

    /// How many tokens the cache knows.
    #[cfg(test)]
    pub(crate) fn n_opened(&self) -> usize {
        self.shared.keys.load().opened.len()
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = self.shared.keys.load();
        f.debug_struct("KeyRing")
            .field("path", &self.shared.path)
            .field("minting", &keys.minting.kid)
            .field("n_keys", &keys.n_keys)
            .finish_non_exhaustive()
    }
}

fn still_opens(key_opens_until: Option<SystemTime>, now: SystemTime) -> Result<(), Refusal> {
    if key_opens_until.is_some_and(|end| end <= now) { Err(Refusal::UnknownKey) } else { Ok(()) }
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl SavedKey {
    fn fresh(now: SystemTime) -> Self {
        Self {
            kid: Uuid::new_v4(),
            k: URL_SAFE_NO_PAD.encode(josekit::util::random_bytes(jwe::KEY_BYTES)),
            created_at: unix_seconds(now),
            opens_until: None,
        }
    }

    fn checked(&self) -> Result<Key, &'static str> {
        let secret = URL_SAFE_NO_PAD.decode(&self.k).map_err(|_| "is not base64url")?;
        let secret = secret.try_into().map_err(|_| "is not 32 bytes long")?;
        let opens_until = match self.opens_until {
            Some(end) => Some(UNIX_EPOCH.checked_add(Duration::from_secs(end)).ok_or("opens until a time that is none")?),
            None => None,
        };
        Ok(Key { kid: self.kid, header: jwe::header(&self.kid), secret, opens_until })
    }
}

/// The ring on disk.
struct RingFile<'a> {
    path: &'a Path,
}

impl RingFile<'_> {
    fn error(&self, why: impl Into<String>) -> KeyRingError {
        KeyRingError { path: self.path.to_owned(), why: why.into() }
    }

    /// Held while the file is read to be changed; ends with the value.
    fn lock(&self) -> Result<File, KeyRingError> {
        let path = self.sibling("lock");
        let lock = OpenOptions::new().create(true).append(true).mode(0o600).open(&path).and_then(|lock| {
            rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
            Ok(lock)
        });
        lock.map_err(|cause| self.error(format!("its lock {} cannot be taken: {cause}", path.display())))
    }

    /// `None` if there is no file.
    fn read(&self) -> Result<Option<SavedRing>, KeyRingError> {
        let mut file = match File::open(self.path) {
            Ok(file) => file,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(self.error(format!("opening it failed: {cause}"))),
        };
        let about = file.metadata().map_err(|cause| self.error(format!("its mode cannot be read: {cause}")))?;
        if about.mode() & 0o077 != 0 {
            return Err(self.error(format!("others may read it (mode {:04o}); run chmod 600 on it, and rotate if they may have", about.mode() & 0o7777)));
        }
        let mut text = String::new();
        (&mut file).take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|cause| self.error(format!("reading it failed: {cause}")))?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(self.error("it is too large to be a key ring"));
        }
        // serde's messages quote what they do not like, and that may be a key: only the place is told.
        let saved = serde_json::from_str(&text)
            .map_err(|cause| self.error(format!("its JSON is damaged at line {}, column {}; restore it from a copy", cause.line(), cause.column())))?;
        Ok(Some(saved))
    }

    fn write(&self, ring: &SavedRing) -> Result<(), KeyRingError> {
        let fresh = self.sibling("new");
        let written = (|| {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
            file.write_all(&serde_json::to_vec_pretty(ring).expect("a ring is plain data with text keys"))?;
            file.sync_all()?;
            fs::rename(&fresh, self.path)?;
            File::open(self.directory())?.sync_all()
        })();
        written.map_err(|cause: io::Error| {
            // The rename did not happen, so the new file is ours alone and may hold a key.
            let _ = fs::remove_file(&fresh);
            self.error(format!("writing it failed: {cause}"))
        })
    }

    fn checked(&self, saved: SavedRing) -> Result<Keys, KeyRingError> {
        if saved.version != 1 {
            return Err(self.error(format!("it has version {}, and this program knows version 1", saved.version)));
        }
        let mut by_header = HashMap::new();
        let mut minting = None;
        for key in &saved.keys {
            let key = Arc::new(key.checked().map_err(|why| self.error(format!("the key {} {why}", key.kid)))?);
            if key.opens_until.is_none() && minting.replace(Arc::clone(&key)).is_some() {
                return Err(self.error("more than one key mints; exactly one may have no opens_until"));
            }
            for header in jwe::headers(&key.kid) {
                if by_header.insert(header, Arc::clone(&key)).is_some() {
                    return Err(self.error("two keys have one id"));
                }
            }
        }
        let minting = minting.ok_or_else(|| self.error("no key mints; exactly one must have opens_until null"))?;
        Ok(Keys { minting, by_header, n_keys: saved.keys.len(), opened: Cache::new() })
    }

    fn sibling(&self, suffix: &str) -> PathBuf {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        self.path.with_file_name(format!(".{name}.{suffix}"))
    }

    fn directory(&self) -> &Path {
        self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }
}
