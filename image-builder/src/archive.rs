//! Unpacks the code of an image (a zip, or a directory) into a fresh build context.
//!
//! Owns: which names, links, sizes and kinds of entry are let in. An archive comes from whoever asked for the build and is
//! not trusted: nothing of it is ever written outside the context, and nothing is ever written through a link of its
//! own, because links are made last and names are checked component by component. Never looks into the files, except
//! for where the Dockerfile is.

mod directory;
mod zip_file;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use rustix::{
    fd::OwnedFd,
    fs::{CWD, Mode, OFlags, ResolveFlags, openat2},
    io::Errno,
};
use tokio_util::sync::CancellationToken;

use crate::Artifact;

/// How much an archive may hold. The sum of it fits the smallest disk (8 GiB) several times over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Files, directories and links together.
    pub entries: usize,
    /// Bytes of all files, unpacked.
    pub bytes: u64,
    /// Bytes of the zip itself.
    pub zip_bytes: u64,
    /// Unpacked bytes per byte of zip, once `ratio_from` bytes are unpacked. DEFLATE reaches 1032; code stays under 20.
    pub ratio: u64,
    /// Below this many unpacked bytes the ratio does not matter: a small bomb is harmless, a small log is not a bomb.
    pub ratio_from: u64,
}

impl Limits {
    /// What builds use.
    pub const DEFAULT: Self = Self { entries: 10_000, bytes: 1 << 30, zip_bytes: 1 << 30, ratio: 200, ratio_from: 64 << 20 };
}

/// What Linux lets a path and one component of it be (PATH_MAX, NAME_MAX).
const MAX_PATH: usize = 4095;
const MAX_COMPONENT: usize = 255;

/// Why an archive was refused, or could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveError {
    #[error("the archive is not a zip file: {why}")]
    NotAZip { why: String },
    #[error("the archive entry {name:?} has a name that is not allowed: {why}")]
    Name { name: String, why: &'static str },
    #[error("the archive entry {name:?} is a link to {target:?}, which is not allowed: {why}")]
    Link { name: String, target: String, why: &'static str },
    #[error("the archive holds {name:?} twice, or both as a file and as a directory")]
    Duplicate { name: String },
    #[error("the archive entry {name:?} is neither a file, a directory nor a symbolic link")]
    Special { name: String },
    #[error("the archive entry {name:?} is encrypted")]
    Encrypted { name: String },
    #[error("the archive entry {name:?} cannot be unpacked: {source}")]
    Damaged { name: String, source: io::Error },
    #[error("the archive is too large: {what}")]
    TooLarge { what: String },
    #[error("there is no Dockerfile at the root of the archive{hint}")]
    NoDockerfile { hint: String },
    #[error("the Dockerfile at the root of the archive is not a regular file")]
    DockerfileKind,
    #[error("{path} cannot be read: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("writing {path} failed: {source}", path = path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{uri} cannot be had: {why}")]
    Object { uri: String, code: &'static str, why: String },
    #[error("unpacking was cancelled")]
    Cancelled,
}

/// Fills `context`, which must be an empty directory, with the artifact, and makes sure that it has a Dockerfile.
pub(crate) fn unpack(artifact: &Artifact, context: &Path, limits: Limits, cancel: &CancellationToken) -> Result<(), ArchiveError> {
    let mut tree = Tree::new(context.to_owned(), limits, cancel.clone());
    match artifact {
        Artifact::Zip(path) => zip_file::unpack(path, &mut tree)?,
        Artifact::Directory(path) => directory::copy(path, &mut tree)?,
        Artifact::Object { uri, bucket, object } => {
            find_object(uri, bucket, object)?;
            zip_file::unpack(object, &mut tree)?;
        }
    }
    tree.finish()
}

/// Opens the place where an artifact lies, which has been checked under this very name (see [`Artifact`]): if a link has taken the
/// place of any part of it since, it leads to where nobody has looked.
fn open_place(path: &Path, flags: OFlags) -> Result<OwnedFd, ArchiveError> {
    let failed = |source| ArchiveError::Read { path: path.to_owned(), source };
    // Of a link at the end NOFOLLOW would make something else than LOOP.
    match openat2(CWD, path, (flags | OFlags::CLOEXEC) - OFlags::NOFOLLOW, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
        Err(Errno::LOOP) => Err(failed(io::Error::other("it has been exchanged for a symbolic link since the build was asked for"))),
        opened => opened.map_err(|error| failed(error.into())),
    }
}

/// Tells an object that can be read from one that cannot, by the codes of aws-behaviour §5.1.
fn find_object(uri: &str, bucket: &Path, object: &Path) -> Result<(), ArchiveError> {
    let refused = |code, why: String| Err(ArchiveError::Object { uri: uri.to_owned(), code, why });
    match fs::metadata(object) {
        Ok(about) if about.is_file() && about.len() == 0 => refused("S3_INVALID_OBJECT", "the object is empty".to_owned()),
        Ok(about) if about.is_file() => match fs::File::open(object) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => refused("S3_ACCESS_DENIED", error.to_string()),
            // Another error is met again by whoever unpacks it.
            _ => Ok(()),
        },
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => refused("S3_ACCESS_DENIED", error.to_string()),
        _ if bucket.is_dir() => refused("S3_NO_SUCH_KEY", "there is no such object in the bucket".to_owned()),
        _ => refused("S3_NO_SUCH_BUCKET", "there is no such bucket".to_owned()),
    }
}

/// The name of an entry, checked: relative, no `..`, nothing that a log or a shell would stumble over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EntryName(String);

impl EntryName {
    /// `Ok(None)` for the root itself (`./`).
    fn parse(raw: &[u8]) -> Result<Option<Self>, ArchiveError> {
        let wrong = |why| ArchiveError::Name { name: shown(raw), why };
        let text = std::str::from_utf8(raw).map_err(|_| wrong("it is not UTF-8"))?;
        if text.is_empty() {
            return Err(wrong("it is empty"));
        }
        if text.len() > MAX_PATH {
            return Err(wrong("it is longer than 4095 bytes"));
        }
        if text.starts_with('/') {
            return Err(wrong("it is an absolute path"));
        }
        if text.contains('\\') {
            return Err(wrong("it has a backslash"));
        }
        if text.chars().any(char::is_control) {
            return Err(wrong("it has a NUL or another control character"));
        }
        let mut parts = Vec::new();
        for part in text.split('/') {
            match part {
                "" | "." => {}
                ".." => return Err(wrong("it has a `..`")),
                part if part.len() > MAX_COMPONENT => return Err(wrong("a part of it is longer than 255 bytes")),
                part => parts.push(part),
            }
        }
        Ok((!parts.is_empty()).then(|| Self(parts.join("/"))))
    }

    /// How many directories it lies below the root.
    fn depth(&self) -> usize {
        self.0.matches('/').count()
    }

    fn parent(&self) -> Option<Self> {
        self.0.rsplit_once('/').map(|(parent, _)| Self(parent.to_owned()))
    }
}

/// A name for a message, however long or odd it is.
fn shown(raw: &[u8]) -> String {
    String::from_utf8_lossy(raw).chars().take(120).collect()
}

/// Whether a link at `name` may point to `target`: relative, and `..` only in front and never above the root.
///
/// A `..` behind a name could climb out of wherever another link has led; without it every step of a path through links
/// stays in the tree, by induction over the steps.
fn check_link(name: &EntryName, target: &[u8]) -> Result<String, ArchiveError> {
    let wrong = |why| ArchiveError::Link { name: name.0.clone(), target: shown(target), why };
    let text = std::str::from_utf8(target).map_err(|_| wrong("the target is not UTF-8"))?;
    if text.is_empty() || text.len() > MAX_PATH {
        return Err(wrong("the target is empty or longer than 4095 bytes"));
    }
    if text.chars().any(char::is_control) {
        return Err(wrong("the target has a NUL or another control character"));
    }
    if text.starts_with('/') {
        return Err(wrong("the target is an absolute path"));
    }
    let parts: Vec<&str> = text.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    let ups = parts.iter().take_while(|part| **part == "..").count();
    if ups > name.depth() {
        return Err(wrong("the target is outside of the archive"));
    }
    if parts[ups..].contains(&"..") {
        return Err(wrong("the target has a `..` behind a name"));
    }
    Ok(text.to_owned())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    /// A directory that only exists because something lies in it; it may still be named once.
    ImpliedDirectory,
    Leaf,
}

/// The build context while it is filled. It starts empty, and until [`Tree::finish`] it has no links.
pub(crate) struct Tree {
    root: PathBuf,
    limits: Limits,
    cancel: CancellationToken,
    /// Bytes of the zip, for the ratio; `None` for a directory.
    packed_bytes: Option<u64>,
    bytes: u64,
    kinds: BTreeMap<String, Kind>,
    modes: Vec<(PathBuf, u32)>,
    links: Vec<(EntryName, String)>,
}

impl Tree {
    fn new(root: PathBuf, limits: Limits, cancel: CancellationToken) -> Self {
        Self { root, limits, cancel, packed_bytes: None, bytes: 0, kinds: BTreeMap::new(), modes: Vec::new(), links: Vec::new() }
    }

    /// Counts a new entry and makes the directories above it.
    fn enter(&mut self, name: &EntryName, kind: Kind) -> Result<(), ArchiveError> {
        if self.cancel.is_cancelled() {
            return Err(ArchiveError::Cancelled);
        }
        let duplicate = || ArchiveError::Duplicate { name: name.0.clone() };
        match (self.kinds.get(&name.0), kind) {
            (None, _) | (Some(Kind::ImpliedDirectory), Kind::Directory | Kind::ImpliedDirectory) | (Some(Kind::Directory), Kind::ImpliedDirectory) => {}
            _ => return Err(duplicate()),
        }
        if let Some(parent) = name.parent() {
            match self.kinds.get(&parent.0) {
                Some(Kind::Leaf) => return Err(duplicate()),
                Some(_) => {}
                None => self.make_directory(&parent, Kind::ImpliedDirectory)?,
            }
        }
        if self.kinds.get(&name.0) != Some(&Kind::Directory) {
            self.kinds.insert(name.0.clone(), kind);
        }
        if self.kinds.len() > self.limits.entries {
            return Err(ArchiveError::TooLarge { what: format!("it has more than {} entries", self.limits.entries) });
        }
        Ok(())
    }

    fn make_directory(&mut self, name: &EntryName, kind: Kind) -> Result<(), ArchiveError> {
        self.enter(name, kind)?;
        let path = self.root.join(&name.0);
        match fs::create_dir(&path) {
            // It was implied by something in it, and is named only now.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            done => done.map_err(|source| ArchiveError::Write { path, source }),
        }
    }

    /// `mode`: permission bits, if the archive knows them.
    fn directory(&mut self, name: &EntryName, mode: Option<u32>) -> Result<(), ArchiveError> {
        self.make_directory(name, Kind::Directory)?;
        if let Some(mode) = mode {
            // Set at the end: a read-only directory must be filled first.
            self.modes.push((self.root.join(&name.0), mode & 0o777 | 0o700));
        }
        Ok(())
    }

    fn file(&mut self, name: &EntryName, mode: Option<u32>, from: &mut dyn Read) -> Result<(), ArchiveError> {
        self.enter(name, Kind::Leaf)?;
        let path = self.root.join(&name.0);
        let write = |source| ArchiveError::Write { path: path.clone(), source };
        let mut to = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(write)?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            if self.cancel.is_cancelled() {
                return Err(ArchiveError::Cancelled);
            }
            let n = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(ArchiveError::Damaged { name: name.0.clone(), source }),
            };
            // Counted as it is unpacked: what a header promises is only a promise.
            self.count_bytes(n as u64)?;
            to.write_all(&buffer[..n]).map_err(write)?;
        }
        // No set-user-id bits from an archive; the owner can always read.
        let mode = mode.map_or(0o644, |mode| mode & 0o777 | 0o400);
        to.set_permissions(fs::Permissions::from_mode(mode)).map_err(write)
    }

    fn count_bytes(&mut self, n: u64) -> Result<(), ArchiveError> {
        self.bytes += n;
        if self.bytes > self.limits.bytes {
            return Err(ArchiveError::TooLarge { what: format!("its files have more than {} MiB together", self.limits.bytes >> 20) });
        }
        if let Some(packed) = self.packed_bytes
            && self.bytes > self.limits.ratio_from
            && self.bytes > packed.saturating_mul(self.limits.ratio)
        {
            return Err(ArchiveError::TooLarge { what: format!("it unpacks to more than {} times its size", self.limits.ratio) });
        }
        Ok(())
    }

    fn link(&mut self, name: EntryName, target: &[u8]) -> Result<(), ArchiveError> {
        let target = check_link(&name, target)?;
        self.enter(&name, Kind::Leaf)?;
        self.links.push((name, target));
        Ok(())
    }

    fn finish(self) -> Result<(), ArchiveError> {
        for (name, target) in &self.links {
            let path = self.root.join(&name.0);
            symlink(target, &path).map_err(|source| ArchiveError::Write { path, source })?;
        }
        for (path, mode) in &self.modes {
            fs::set_permissions(path, fs::Permissions::from_mode(*mode)).map_err(|source| ArchiveError::Write { path: path.clone(), source })?;
        }
        match fs::symlink_metadata(self.root.join("Dockerfile")) {
            Ok(metadata) if metadata.is_file() => Ok(()),
            Ok(_) => Err(ArchiveError::DockerfileKind),
            Err(_) => Err(ArchiveError::NoDockerfile { hint: self.dockerfile_hint() }),
        }
    }

    /// The two usual mistakes: the directory was zipped instead of what is in it, or the name is in lower case.
    fn dockerfile_hint(&self) -> String {
        let near = self.kinds.keys().filter(|name| name.rsplit('/').next().is_some_and(|last| last.eq_ignore_ascii_case("dockerfile")));
        match near.min_by_key(|name| name.matches('/').count()) {
            Some(name) if name.contains('/') => {
                let (directory, _) = name.rsplit_once('/').unwrap_or_default();
                format!("; there is one at {name:?}: pack what is in {directory:?}, not the directory itself")
            }
            Some(name) => format!("; there is {name:?}, but the name must be spelled `Dockerfile`"),
            None if self.kinds.is_empty() => "; it is empty".to_owned(),
            None => String::new(),
        }
    }
}

#[cfg(test)]
mod tests;
