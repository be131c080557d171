//! Logs by the names that CloudWatch would give them (aws-behaviour §8): `<data>/logs/<group>/<stream>/<microVM>` leads to the
//! directory with the output of that microVM, `<data>/logs/<group>/<stream>/<image>-<version>.log` to the log of that build.
//!
//! Owns: the default names, and the tree of links. Never holds a byte of a log. What a caller names becomes one component of a
//! path, whatever is in it; two names never become the same one.

use std::{
    fmt::Write as _,
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use idle_controller::MicrovmView;
use image_builder::ImageRecord;
use model::MicrovmId;
use parking_lot::Mutex;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use time::{OffsetDateTime, format_description::BorrowedFormatItem, macros::format_description};

const DAY: &[BorrowedFormatItem<'_>] = format_description!("[year]/[month]/[day]");
/// Of a component; file systems take 255 bytes.
const MAX_COMPONENT: usize = 200;
/// How long links of forgotten microVMs may stay: they lead nowhere and take an inode each.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// Where the output of a microVM or a build is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LogName {
    pub(crate) group: String,
    pub(crate) stream: String,
}

impl LogName {
    /// What the `logging` of a RunMicrovm call says of a microVM. `None`: its output is not kept.
    pub(crate) fn of(view: &MicrovmView, logging: Option<&Value>) -> Option<Self> {
        let logging = logging.unwrap_or(&Value::Null);
        if !keeps_output(logging) {
            return None;
        }
        let named = |member: &str| logging["cloudWatch"][member].as_str().map(str::to_owned);
        Some(Self {
            group: named("logGroup").unwrap_or_else(|| format!("/aws/lambda-microvms/{}", view.image)),
            stream: named("logStream").unwrap_or_else(|| format!("{}[{}]{}", day(view.started_at), view.version, view.id)),
        })
    }

    /// What the `logging` of an image says of the build of one version. `None`: it has no name.
    pub(crate) fn of_build(record: &ImageRecord, logging: &Value) -> Option<Self> {
        if !keeps_output(logging) {
            return None;
        }
        let named = |member: &str| logging["cloudWatch"][member].as_str().map(str::to_owned);
        Some(Self {
            group: named("logGroup").unwrap_or_else(|| format!("/aws/lambda-microvms/{}", record.name)),
            // AWS's streams of builds have this version.
            stream: named("logStream").unwrap_or_else(|| format!("{}[0.0]{}-{}", day(record.created_at), record.name, record.version)),
        })
    }
}

/// A log, where it is, and what its link is called.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    name: LogName,
    file: String,
    target: PathBuf,
}

impl Link {
    /// To the directory of a microVM's output.
    pub(crate) fn to_microvm(id: MicrovmId, name: LogName, log_dir: PathBuf) -> Self {
        Self { name, file: id.to_string(), target: log_dir }
    }

    /// To the log of a build.
    pub(crate) fn to_build(record: &ImageRecord, name: LogName, log: PathBuf) -> Self {
        Self { name, file: format!("{}-{}.log", record.name, record.version), target: log }
    }
}

/// Whether output is kept at all.
pub(crate) fn keeps_output(logging: &Value) -> bool {
    logging["disabled"].is_null()
}

/// In UTC, as streams have it.
fn day(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(DAY).unwrap_or_default()
}

/// The tree of names.
pub(crate) struct LogNames {
    /// `<data>/logs`.
    dir: PathBuf,
    /// One change at a time; holds when links were last looked through.
    changes: Mutex<Instant>,
}

impl LogNames {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir, changes: Mutex::new(Instant::now()) }
    }

    /// Names all that there are, and nothing else: for the start of a node.
    pub(crate) fn restore(&self, all: impl IntoIterator<Item = Link>, known: impl Fn(MicrovmId) -> bool) {
        for link in all {
            self.add(&link);
        }
        self.told(self.prune(&known), "looking through");
    }

    /// Names the log of a new microVM or build. A name that cannot be made is told in the node's log: the output is kept all the same.
    pub(crate) fn began(&self, link: &Link, known: impl Fn(MicrovmId) -> bool) {
        self.add(link);
        let due = {
            let mut last = self.changes.lock();
            let due = last.elapsed() >= PRUNE_EVERY;
            if due {
                *last = Instant::now();
            }
            due
        };
        if due {
            self.told(self.prune(&known), "looking through");
        }
    }

    fn add(&self, link: &Link) {
        let _one = self.changes.lock();
        let dir = self.dir.join(component(&link.name.group)).join(component(&link.name.stream));
        let done = (|| {
            fs::create_dir_all(&dir)?;
            // Relative, so that the data directory may be moved: three up is the parent of `logs`.
            let target = match self.dir.parent().and_then(|parent| link.target.strip_prefix(parent).ok()) {
                Some(inside) => Path::new("../../..").join(inside),
                None => link.target.clone(),
            };
            match symlink(target, dir.join(&link.file)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                other => other,
            }
        })();
        self.told(done, "naming a log in");
    }

    /// Removes the links of microVMs that are not known any more, those of builds whose log has gone with its image, and what is
    /// empty then.
    fn prune(&self, known: &impl Fn(MicrovmId) -> bool) -> io::Result<()> {
        let _one = self.changes.lock();
        for group in entries(&self.dir)? {
            for stream in entries(&group)? {
                for link in entries(&stream)? {
                    let id = link.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<MicrovmId>().ok());
                    // A microVM that is about to be launched has no directory yet, so that only its id can tell.
                    let gone = id.map_or_else(|| !link.exists(), |id| !known(id));
                    if gone && link.is_symlink() {
                        fs::remove_file(&link)?;
                    }
                }
                remove_empty(&stream)?;
            }
            remove_empty(&group)?;
        }
        Ok(())
    }

    fn told(&self, done: io::Result<()>, doing: &str) {
        if let Err(error) = done {
            tracing::warn!(dir = %self.dir.display(), %error, doing, "the names of logs are not as they should be");
        }
    }
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path())).collect(),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn remove_empty(dir: &Path) -> io::Result<()> {
    match fs::remove_dir(dir) {
        Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory | io::ErrorKind::NotFound) => Ok(()),
        other => other,
    }
}

/// A name as one component of a path: letters, digits and `-_.[]` as they are, everything else as `%XX`, and so a dot at the
/// begin. What is too long ends in `~` and a hash.
fn component(name: &str) -> String {
    let mut text = String::new();
    for (index, byte) in name.bytes().enumerate() {
        let plain = byte.is_ascii_alphanumeric() || b"-_[]".contains(&byte) || (byte == b'.' && index > 0);
        if plain {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    if text.len() > MAX_COMPONENT {
        text.truncate(MAX_COMPONENT - 65);
        let _ = write!(text, "~{}", hex::encode(Sha256::digest(name)));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn name(group: &str, stream: &str) -> LogName {
        LogName { group: group.to_owned(), stream: stream.to_owned() }
    }

    #[test]
    fn no_name_leaves_its_directory_and_no_two_are_one() {
        let long = "a".repeat(512);
        let wide = "é".repeat(512);
        let names = [
            ".", "..", "...", "../../etc/passwd", "/", "//", "a/b", "a%2Fb", "/aws/lambda-microvms/hello", "a~b", "\0", "a\nb", ".hidden", "a.b",
            "2026/11/28[1.0]microvm-1", long.as_str(), &long[1..], wide.as_str(), &wide[2..], "#",
        ];
        let mut seen = HashSet::new();
        for name in names {
            let text = component(name);
            assert!(!text.is_empty() && text.len() <= 255 && !text.contains(['/', '\0', '\n']) && text != "." && text != "..", "{name:?}: {text}");
            assert!(seen.insert(text.clone()), "{name:?} is {text}, as another one");
        }
        assert_eq!(component("/aws/lambda-microvms/hello"), "%2Faws%2Flambda-microvms%2Fhello");
        assert_eq!(component("2026/11/28[1.0]microvm-1"), "2026%2F11%2F28[1.0]microvm-1");
    }

    #[test]
    fn a_log_is_found_under_its_name_until_its_microvm_is_forgotten() {
        let data = tempfile::tempdir().unwrap();
        let (one, two) = (MicrovmId::random(), MicrovmId::random());
        let log = |id: MicrovmId| data.path().join(format!("microvms/{id}/log"));
        for id in [one, two] {
            fs::create_dir_all(log(id)).unwrap();
            fs::write(log(id).join("app.log"), id.to_string()).unwrap();
        }
        let names = LogNames::new(data.path().join("logs"));
        let ours = name("/team/../apps", "../..");
        let link = |id: MicrovmId| Link::to_microvm(id, ours.clone(), log(id));
        for id in [one, one, two] {
            names.began(&link(id), |_| true);
        }
        let dir = data.path().join("logs/%2Fteam%2F..%2Fapps/%2E.%2F..");
        for id in [one, two] {
            assert_eq!(fs::read_to_string(dir.join(id.to_string()).join("app.log")).unwrap(), id.to_string());
        }
        // Only what the registry has forgotten goes; what a person put there stays.
        fs::write(dir.join("note"), "mine").unwrap();
        let build = Link { name: name("/team/../apps", "../.."), file: "app-1.0.log".to_owned(), target: data.path().join("images/app/1.0/build.log") };
        names.restore([link(two), build], |id| id == two);
        assert!(!dir.join("app-1.0.log").is_symlink(), "that build has no log");
        assert!(!dir.join(one.to_string()).is_symlink() && dir.join(two.to_string()).is_symlink() && dir.join("note").is_file());
        fs::remove_file(dir.join("note")).unwrap();
        names.restore([], |_| false);
        assert_eq!(fs::read_dir(data.path().join("logs")).unwrap().count(), 0);
        assert!(log(two).join("app.log").is_file());
    }
}
