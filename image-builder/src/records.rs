//! Records of images and of their versions on disk: one JSON file each, replaced whole.
//!
//! Owns: where things lie in the catalog's directory, and that a crash leaves the old state or the new one: an image and a
//! version appear by one rename and disappear by one rename. Never decides what a record says.
//!
//! ```text
//! <name>/image.json              what the image is beside its versions
//! <name>/<version>/record.json   a version
//! <name>/<version>/build.log     its build
//! <name>/<version>/snapshot/     what the engine made of it
//! .work/                         builds and what is being put together; empty after a start
//! .trash/                        what is being removed; emptied after a start
//! .deleted/<name>                an empty file for each image that was deleted
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

use model::{ImageName, ImageVersion};
use serde::{Serialize, de::DeserializeOwned};

use crate::{Image, ImageFacts, ImageRecord, image::BuildState};

const IMAGE: &str = "image.json";
const RECORD: &str = "record.json";
const LOG: &str = "build.log";
const SNAPSHOT: &str = "snapshot";
// No image can have such a name: a dot is not allowed in one.
const WORK: &str = ".work";
const TRASH: &str = ".trash";
const DELETED: &str = ".deleted";
/// Names of deleted images that are remembered; the oldest are forgotten at a start.
const MAX_DELETED: usize = 10_000;

/// The catalog's directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    dir: PathBuf,
}

/// What a start finds.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub images: Vec<Image>,
    /// Names of images that were deleted and not made again.
    pub deleted: BTreeSet<ImageName>,
}

impl Layout {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    fn image(&self, name: &ImageName) -> PathBuf {
        self.dir.join(name.as_str())
    }

    fn version(&self, name: &ImageName, version: ImageVersion) -> PathBuf {
        self.image(name).join(version.to_string())
    }

    pub fn snapshot(&self, name: &ImageName, version: ImageVersion) -> PathBuf {
        self.version(name, version).join(SNAPSHOT)
    }

    pub fn log(&self, name: &ImageName, version: ImageVersion) -> PathBuf {
        self.version(name, version).join(LOG)
    }

    pub fn work(&self) -> PathBuf {
        self.dir.join(WORK)
    }

    pub fn trash(&self) -> PathBuf {
        self.dir.join(TRASH)
    }

    fn deleted(&self, name: &ImageName) -> PathBuf {
        self.dir.join(DELETED).join(name.as_str())
    }

    /// Makes a new image with its first version; durable on return. Fails if there is anything of that name.
    pub fn create_image(&self, facts: &ImageFacts, first: &ImageRecord) -> io::Result<()> {
        let staged = self.stage()?;
        write_json(staged.path(), IMAGE, facts)?;
        let version = staged.path().join(first.version.to_string());
        fs::create_dir(&version)?;
        write_json(&version, RECORD, first)?;
        sync_dir(staged.path())?;
        commit(staged, &self.image(&first.name))?;
        // A name that is taken again was not deleted; the image itself says so as well.
        match fs::remove_file(self.deleted(&first.name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => tracing::warn!(image = %first.name, %error, "a deleted image of this name is still remembered"),
            _ => {}
        }
        Ok(())
    }

    /// Makes a new version; durable on return. Its number is taken first, so that a crash in between wastes a number and
    /// never gives one twice.
    pub fn create_version(&self, facts: &ImageFacts, record: &ImageRecord) -> io::Result<()> {
        self.write_image(facts)?;
        let staged = self.stage()?;
        write_json(staged.path(), RECORD, record)?;
        commit(staged, &self.version(&record.name, record.version))
    }

    fn stage(&self) -> io::Result<tempfile::TempDir> {
        let work = self.work();
        fs::create_dir_all(&work)?;
        tempfile::Builder::new().prefix("new-").permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).tempdir_in(&work)
    }

    /// Replaces what is known of an image; durable on return.
    pub fn write_image(&self, facts: &ImageFacts) -> io::Result<()> {
        write_json(&self.image(&facts.name), IMAGE, facts)
    }

    /// Replaces the record of a version; durable on return.
    pub fn write(&self, record: &ImageRecord) -> io::Result<()> {
        write_json(&self.version(&record.name, record.version), RECORD, record)
    }

    /// Takes a version away; durable on return. Its files are in the trash.
    pub fn discard_version(&self, name: &ImageName, version: ImageVersion) -> io::Result<()> {
        self.discard(&self.version(name, version))
    }

    /// Takes an image away; durable on return. Its name is remembered, its files are in the trash.
    pub fn discard_image(&self, name: &ImageName) -> io::Result<()> {
        let deleted = self.dir.join(DELETED);
        fs::create_dir_all(&deleted)?;
        File::create(self.deleted(name))?.sync_all()?;
        sync_dir(&deleted)?;
        self.discard(&self.image(name))
    }

    fn discard(&self, what: &Path) -> io::Result<()> {
        let trash = self.trash();
        fs::create_dir_all(&trash)?;
        match fs::rename(what, trash.join(uuid::Uuid::new_v4().simple().to_string())) {
            // Somebody else has removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            done => done?,
        }
        // Both names changed.
        sync_dir(&trash)?;
        what.parent().map_or(Ok(()), sync_dir)
    }

    /// Everything there is. A version whose record cannot be read is shown as one that failed (see [`ImageRecord::damaged`]) and left
    /// as it is: microVMs may sleep on its snapshot. What a crash left of something that never was a version goes to the trash.
    pub fn read_all(&self) -> io::Result<Found> {
        fs::create_dir_all(&self.dir)?;
        let mut found = Found::default();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let Some(name) = image_name(&entry.file_name()) else { continue };
            if !entry.file_type()?.is_dir() {
                tracing::warn!(path = %entry.path().display(), "this is not an image and is left alone");
                continue;
            }
            // One image that cannot be looked at hides itself and no other.
            match self.read_image(&name) {
                Ok(Some(image)) => found.images.push(image),
                Ok(None) => {}
                Err(error) => tracing::error!(path = %entry.path().display(), %error, "an image cannot be read and is left alone"),
            }
        }
        found.deleted = self.read_deleted()?;
        for image in &found.images {
            found.deleted.remove(&image.facts.name);
        }
        Ok(found)
    }

    fn read_image(&self, name: &ImageName) -> io::Result<Option<Image>> {
        let dir = self.image(name);
        let (mut versions, mut foreign): (Vec<ImageRecord>, _) = (Vec::new(), false);
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                // Of a writer that was killed (see `write_json`).
                if entry.file_name().as_encoded_bytes().starts_with(b".tmp") {
                    fs::remove_file(entry.path())?;
                }
                continue;
            }
            let path = entry.path();
            let why = match read_json::<ImageRecord>(&path.join(RECORD)) {
                Ok(record) if record.name == *name && self.version(name, record.version) == path => {
                    versions.push(record);
                    continue;
                }
                Ok(record) => format!("it is of version {} of the image {}", record.version, record.name),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), "what a crash left of a version that never was is removed");
                    self.discard(&path)?;
                    continue;
                }
                Err(error) => error.to_string(),
            };
            let Some(version) = entry.file_name().to_str().and_then(|text| text.parse().ok()).filter(|version| self.version(name, *version) == path) else {
                foreign = true;
                tracing::error!(path = %path.display(), why, "this is no version of the image, its record cannot be read, and it is left alone");
                continue;
            };
            tracing::error!(path = %path.display(), why, "the record of a version cannot be read; the version is shown as failed, can be deleted, and is left alone until then");
            let why = format!("the record of this version on the node's disk cannot be read ({why}); what lies in {} is left as it is until the version is deleted", path.display());
            let changed_at = entry.metadata()?.modified()?;
            versions.push(ImageRecord::damaged(name.clone(), version, changed_at, why));
        }
        versions.sort_by_key(|record| record.version);
        let (Some(first), Some(last)) = (versions.first(), versions.last()) else {
            if !foreign {
                tracing::warn!(path = %dir.display(), "what a crash left of an image that never was is removed");
                self.discard(&dir)?;
            }
            return Ok(None);
        };
        let mut facts = match read_json::<ImageFacts>(&dir.join(IMAGE)) {
            Ok(facts) if facts.name == *name => facts,
            // Nodes before updates of images did not write one. One that cannot be read is kept beside what follows from the versions.
            unread => {
                let why = match unread {
                    Ok(facts) => Some(format!("it is of the image {}", facts.name)),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                    // What is there and is no record; a disk that cannot be read may be read again.
                    Err(error) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) => Some(error.to_string()),
                    Err(error) => return Err(error),
                };
                if let Some(why) = why {
                    let kept = dir.join(format!("{IMAGE}.damaged-{}", uuid::Uuid::new_v4().simple()));
                    fs::rename(dir.join(IMAGE), &kept)?;
                    tracing::error!(path = %kept.display(), why, "the record of an image cannot be read and was moved aside; its versions are there, its tags are gone");
                }
                let facts = ImageFacts {
                    name: name.clone(),
                    id: uuid::Uuid::new_v4().to_string(),
                    created_at: first.created_at,
                    updated_at: last.updated_at,
                    last_version: last.version,
                    deletion: None,
                    tags: BTreeMap::new(),
                };
                self.write_image(&facts)?;
                facts
            }
        };
        facts.last_version = facts.last_version.max(last.version);
        Ok(Some(Image { facts, versions }))
    }

    fn read_deleted(&self) -> io::Result<BTreeSet<ImageName>> {
        let entries = match fs::read_dir(self.dir.join(DELETED)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            entries => entries?,
        };
        let mut deleted: Vec<(SystemTime, ImageName)> = Vec::new();
        for entry in entries {
            let entry = entry?;
            if let Some(name) = image_name(&entry.file_name()) {
                deleted.push((entry.metadata()?.modified()?, name));
            }
        }
        deleted.sort();
        for (_, name) in deleted.drain(..deleted.len().saturating_sub(MAX_DELETED)) {
            fs::remove_file(self.deleted(&name))?;
        }
        Ok(deleted.into_iter().map(|(_, name)| name).collect())
    }

    /// Removes what does not belong to a version: temporary files of writers that were killed, and everything that a build
    /// that failed has left beside its log.
    pub fn scrub(&self, record: &ImageRecord) -> io::Result<()> {
        if record.damaged {
            return Ok(());
        }
        let keeps = |name: &OsStr| name == RECORD || name == LOG || (name == SNAPSHOT && record.state == BuildState::Successful);
        for entry in fs::read_dir(self.version(&record.name, record.version))? {
            let entry = entry?;
            if keeps(&entry.file_name()) {
                continue;
            }
            if entry.file_type()?.is_dir() { fs::remove_dir_all(entry.path())? } else { fs::remove_file(entry.path())? }
        }
        Ok(())
    }
}

fn image_name(text: &OsStr) -> Option<ImageName> {
    text.to_str()?.parse().ok()
}

/// Gives what was staged its name, durably. Fails if there is anything of that name (but an empty directory).
fn commit(staged: tempfile::TempDir, to: &Path) -> io::Result<()> {
    fs::rename(staged.path(), to)?;
    // Nothing is left to remove.
    let _ = staged.keep();
    to.parent().map_or(Ok(()), sync_dir)
}

fn write_json<T: Serialize>(dir: &Path, name: &str, value: &T) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    serde_json::to_writer_pretty(&mut file, value)?;
    file.write_all(b"\n")?;
    file.as_file().sync_all()?;
    file.persist(dir.join(name)).map_err(|error| error.error)?;
    sync_dir(dir)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
