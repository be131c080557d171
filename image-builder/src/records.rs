//! Records of image versions on disk: one JSON file per version, replaced whole.
//!
//! Owns: where things lie in the catalog's directory, and that a crash leaves the old record or the new one. Never decides
//! what a record says.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use model::{ImageName, ImageVersion};

use crate::ImageRecord;

const RECORD: &str = "record.json";
/// No image can have this name: a dot is not allowed in one.
const WORK: &str = ".work";

/// The catalog's directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    dir: PathBuf,
}

impl Layout {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    pub fn version(&self, name: &ImageName, version: ImageVersion) -> PathBuf {
        self.dir.join(name.as_str()).join(version.to_string())
    }

    pub fn snapshot(&self, name: &ImageName, version: ImageVersion) -> PathBuf {
        self.version(name, version).join("snapshot")
    }

    pub fn log(&self, name: &ImageName, version: ImageVersion) -> PathBuf {
        self.version(name, version).join("build.log")
    }

    pub fn work(&self) -> PathBuf {
        self.dir.join(WORK)
    }

    /// Makes the directory of a new version and writes its first record. Fails if there is one.
    pub fn create(&self, record: &ImageRecord) -> io::Result<()> {
        let dir = self.version(&record.name, record.version);
        let image = self.dir.join(record.name.as_str());
        fs::create_dir_all(&image)?;
        fs::create_dir(&dir)?;
        let written = self.write(record).and_then(|()| sync_dir(&image)).and_then(|()| sync_dir(&self.dir));
        if written.is_err() {
            // Best effort: what cannot be written can perhaps not be removed either, and the caller learns of the first.
            let _ = fs::remove_dir_all(&dir);
            let _ = fs::remove_dir(&image);
        }
        written
    }

    /// Replaces the record; durable on return.
    pub fn write(&self, record: &ImageRecord) -> io::Result<()> {
        let dir = self.version(&record.name, record.version);
        let mut file = tempfile::NamedTempFile::new_in(&dir)?;
        serde_json::to_writer_pretty(&mut file, record)?;
        file.write_all(b"\n")?;
        file.as_file().sync_all()?;
        file.persist(dir.join(RECORD)).map_err(|error| error.error)?;
        sync_dir(&dir)
    }

    /// Every record that can be read. One that cannot is left where it is, and its name stays taken.
    pub fn read_all(&self) -> io::Result<Vec<ImageRecord>> {
        fs::create_dir_all(&self.dir)?;
        let mut records = Vec::new();
        for image in fs::read_dir(&self.dir)? {
            let image = image?;
            let Some(name) = image.file_name().to_str().and_then(|text| text.parse::<ImageName>().ok()) else { continue };
            for version in fs::read_dir(image.path())? {
                let path = version?.path();
                match read(&path.join(RECORD)) {
                    Ok(record) if record.name == name && self.version(&name, record.version) == path => records.push(record),
                    Ok(_) => tracing::error!(path = %path.display(), "an image record belongs to another image and is left alone"),
                    Err(error) => tracing::error!(path = %path.display(), %error, "an image record cannot be read and is left alone"),
                }
            }
        }
        Ok(records)
    }
}

fn read(path: &Path) -> io::Result<ImageRecord> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
