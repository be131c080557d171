//! Records of image versions on disk: one JSON file per version, and one with the tags of each image, replaced whole.
//!
//! Owns: where things lie in the catalog's directory, and that a crash leaves the old record or the new one. Never decides
//! what a record says.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use model::{ImageName, ImageVersion};

use crate::ImageRecord;

const RECORD: &str = "record.json";
/// Beside the versions of an image; no version is called so.
const TAGS: &str = "tags.json";
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

    /// Makes the directory of a new version and writes its first record, after the tags of a new image. Fails if there is
    /// one.
    pub fn create(&self, record: &ImageRecord, tags: &BTreeMap<String, String>) -> io::Result<()> {
        let dir = self.version(&record.name, record.version);
        let image = self.dir.join(record.name.as_str());
        fs::create_dir_all(&image)?;
        if !tags.is_empty() {
            self.write_tags(&record.name, tags)?;
        }
        fs::create_dir(&dir)?;
        let written = self.write(record).and_then(|()| sync_dir(&image)).and_then(|()| sync_dir(&self.dir));
        if written.is_err() {
            // Best effort: what cannot be written can perhaps not be removed either, and the caller learns of the first.
            let _ = fs::remove_dir_all(&dir);
            let _ = fs::remove_file(image.join(TAGS));
            let _ = fs::remove_dir(&image);
        }
        written
    }

    /// The tags of an image; none if there never were any.
    pub fn read_tags(&self, name: &ImageName) -> io::Result<BTreeMap<String, String>> {
        match fs::read(self.dir.join(name.as_str()).join(TAGS)) {
            Ok(text) => Ok(serde_json::from_slice(&text)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(error),
        }
    }

    /// Replaces the tags of an image that is there; durable on return.
    pub fn write_tags(&self, name: &ImageName, tags: &BTreeMap<String, String>) -> io::Result<()> {
        replace(&self.dir.join(name.as_str()), TAGS, tags)
    }

    /// Replaces the record; durable on return.
    pub fn write(&self, record: &ImageRecord) -> io::Result<()> {
        replace(&self.version(&record.name, record.version), RECORD, record)
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
                if !path.is_dir() {
                    continue;
                }
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

/// Writes a file of JSON, the old one or the new one at every instant; durable on return.
fn replace(dir: &Path, name: &str, content: &impl serde::Serialize) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    serde_json::to_writer_pretty(&mut file, content)?;
    file.write_all(b"\n")?;
    file.as_file().sync_all()?;
    file.persist(dir.join(name)).map_err(|error| error.error)?;
    sync_dir(dir)
}

fn read(path: &Path) -> io::Result<ImageRecord> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use model::{MemorySize, Shape};

    use super::*;
    use crate::BuildState;

    fn record(name: &str) -> ImageRecord {
        let memory = MemorySize::DEFAULT;
        ImageRecord {
            name: name.parse().unwrap(),
            version: ImageVersion::FIRST,
            state: BuildState::Pending,
            failure: None,
            shape: Shape { memory_mib: memory.mib(), vcpus: 1, disk_gib: memory.disk_gib() },
            memory,
            created_at: SystemTime::UNIX_EPOCH,
            updated_at: SystemTime::UNIX_EPOCH,
            request: serde_json::Value::Null,
            ready_port: None,
            hooks: None,
        }
    }

    #[test]
    fn tags_are_the_images_and_are_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_owned());
        let (tagged, plain) = (record("tagged"), record("plain"));
        let tags = |pairs: &[(&str, &str)]| pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<BTreeMap<_, _>>();
        layout.create(&tagged, &tags(&[("a", "1"), ("b", "")])).unwrap();
        layout.create(&plain, &tags(&[])).unwrap();
        assert_eq!(layout.read_tags(&tagged.name).unwrap(), tags(&[("a", "1"), ("b", "")]));
        assert_eq!(layout.read_tags(&plain.name).unwrap(), tags(&[]));
        layout.write_tags(&tagged.name, &tags(&[("c", "2")])).unwrap();
        assert_eq!(layout.read_tags(&tagged.name).unwrap(), tags(&[("c", "2")]));
        // The file of the tags is no version, and nothing unfinished is left beside it.
        assert_eq!(layout.read_all().unwrap().len(), 2);
        assert_eq!(fs::read_dir(dir.path().join("tagged")).unwrap().count(), 2);
        assert!(layout.write_tags(&record("none").name, &tags(&[])).is_err(), "no image, no tags");
        // A damaged file is told of and not taken for no tags: the next change would make the loss lasting.
        fs::write(dir.path().join("tagged").join(TAGS), "{").unwrap();
        assert!(layout.read_tags(&tagged.name).is_err());
    }
}
