//! A directory as a zip, without what its `.dockerignore` names.
//!
//! Patterns are Docker's: each is matched from the root of the directory, also against the directories that a file is in; the last
//! one that matches decides; `!` takes back.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use globset::{GlobBuilder, GlobMatcher};
use sha2::{Digest as _, Sha256};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

/// A zip, in a file without a name.
pub struct Archive {
    /// At its begin.
    pub file: File,
    /// Its length.
    pub bytes: u64,
    /// SHA-256, in hex.
    pub digest: String,
    /// Files in it.
    pub files: usize,
}

/// Packs a directory.
pub fn pack(dir: &Path) -> Result<Archive> {
    if !dir.join("Dockerfile").is_file() {
        bail!("{} has no Dockerfile at its top", dir.display());
    }
    let ignored = Ignored::read(dir)?;
    let mut files = Vec::new();
    walk(dir, Path::new(""), &ignored, &mut files)?;
    // The same directory gives the same zip, and so the same object.
    files.sort();
    let mut zip = ZipWriter::new(tempfile::tempfile().context("making a temporary file")?);
    for path in &files {
        let from = dir.join(path);
        let mut add = || -> Result<()> {
            let metadata = fs::symlink_metadata(&from)?;
            let options = SimpleFileOptions::default()
                .compression_method(CompressionMethod::Deflated)
                .large_file(metadata.len() >= u64::from(u32::MAX))
                .last_modified_time(zip::DateTime::default())
                .unix_permissions(metadata.permissions().mode());
            if metadata.is_symlink() {
                zip.add_symlink_from_path(path, fs::read_link(&from)?, options)?;
            } else {
                zip.start_file_from_path(path, options)?;
                io::copy(&mut File::open(&from)?, &mut zip)?;
            }
            Ok(())
        };
        add().with_context(|| format!("packing {}", from.display()))?;
    }
    let mut file = zip.finish().context("finishing the zip")?;
    file.flush()?;
    let bytes = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(0))?;
    let (mut hash, mut piece) = (Sha256::new(), vec![0; 1 << 16]);
    loop {
        let read = file.read(&mut piece)?;
        if read == 0 {
            break;
        }
        hash.update(&piece[..read]);
    }
    file.seek(SeekFrom::Start(0))?;
    Ok(Archive { file, bytes, digest: hex::encode(hash.finalize()), files: files.len() })
}

fn walk(root: &Path, below: &Path, ignored: &Ignored, files: &mut Vec<PathBuf>) -> Result<()> {
    let dir = root.join(below);
    for entry in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry.with_context(|| format!("reading {}", dir.display()))?;
        let path = below.join(entry.file_name());
        let kind = entry.file_type().with_context(|| format!("looking at {}", entry.path().display()))?;
        if kind.is_dir() {
            // Not left out as a whole: a later `!` may take something in it back.
            walk(root, &path, ignored, files)?;
        } else if (kind.is_file() || kind.is_symlink()) && !ignored.ignores(&path) {
            files.push(path);
        }
    }
    Ok(())
}

/// The patterns of a `.dockerignore`.
struct Ignored {
    /// Whether it takes back, and what.
    patterns: Vec<(bool, GlobMatcher)>,
}

impl Ignored {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(".dockerignore");
        match fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text).with_context(|| format!("reading {}", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self { patterns: Vec::new() }),
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let mut patterns = Vec::new();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (taken_back, pattern) = line.strip_prefix('!').map_or((false, line), |rest| (true, rest.trim()));
            let pattern = pattern.trim_start_matches("./").trim_matches('/');
            if pattern.is_empty() || pattern == "." {
                continue;
            }
            let glob = GlobBuilder::new(pattern).literal_separator(true).backslash_escape(true).build().with_context(|| format!("the pattern {line:?}"))?;
            patterns.push((taken_back, glob.compile_matcher()));
        }
        Ok(Self { patterns })
    }

    fn ignores(&self, path: &Path) -> bool {
        // The build needs both, whatever is written there; Docker sends them, too.
        if path == Path::new("Dockerfile") || path == Path::new(".dockerignore") {
            return false;
        }
        let decides = self.patterns.iter().rev().find(|(_, glob)| path.ancestors().any(|part| part != Path::new("") && glob.is_match(part)));
        decides.is_some_and(|(taken_back, _)| !taken_back)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_dockers() {
        let ignored = Ignored::parse("# comment\n*.log\n/build/\n**/cache\ndocs\n!docs/keep.md\nDockerfile\n**/*.tmp\n!important.tmp\n").unwrap();
        for (path, wanted) in [
            ("a.log", true),
            ("sub/a.log", false),
            ("build/x/y", true),
            ("sub/build/x", false),
            ("cache/x", true),
            ("a/b/cache/x", true),
            ("docs/a.md", true),
            ("docs/keep.md", false),
            ("Dockerfile", false),
            (".dockerignore", false),
            ("x.tmp", true),
            ("a/x.tmp", true),
            ("important.tmp", false),
            ("app.py", false),
        ] {
            assert_eq!(ignored.ignores(Path::new(path)), wanted, "{path}");
        }
        assert!(Ignored::parse("[").is_err());
    }

    #[test]
    fn a_directory_is_packed_the_same_each_time_with_modes_and_links() {
        let dir = tempfile::tempdir().unwrap();
        assert!(pack(dir.path()).map(|_| ()).unwrap_err().to_string().contains("no Dockerfile"));
        fs::create_dir(dir.path().join("bin")).unwrap();
        for (name, text) in [("Dockerfile", "FROM scratch\n"), (".dockerignore", "*.log\n"), ("x.log", "noise"), ("bin/run", "#!/bin/sh\n")] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        fs::set_permissions(dir.path().join("bin/run"), fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink("bin/run", dir.path().join("start")).unwrap();
        let packed = pack(dir.path()).unwrap();
        assert_eq!((packed.files, packed.bytes), (4, packed.file.metadata().unwrap().len()));
        assert_eq!(pack(dir.path()).unwrap().digest, packed.digest);
        let mut zip = zip::ZipArchive::new(packed.file).unwrap();
        let names: Vec<String> = zip.file_names().map(str::to_owned).collect();
        assert_eq!(names, [".dockerignore", "Dockerfile", "bin/run", "start"]);
        assert_eq!(zip.by_name("bin/run").unwrap().unix_mode().unwrap() & 0o777, 0o755);
        assert!(zip.by_name("start").unwrap().is_symlink());
    }
}
