//! A directory of this host as the artifact: copied under the rules that hold for a zip.
//!
//! Nothing is found by following a link, not even one that takes the place of a file or directory while this runs: every
//! name is looked up below the descriptor of the directory that it was read from.

use std::{fs::File, os::unix::ffi::OsStrExt, path::{Path, PathBuf}};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};

use super::{ArchiveError, EntryName, Tree, open_place};

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
// NONBLOCK: what was a file may be a pipe by now.
const FILE: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// How deep directories may lie in each other. Each one on the way is open.
const MAX_DEPTH: usize = 128;

pub(super) fn copy(from: &Path, tree: &mut Tree) -> Result<(), ArchiveError> {
    let root = open_place(from, DIRECTORY)?;
    // A stack instead of recursion: the depth is up to whoever made the directory.
    let mut waiting = vec![(Dir::new(root).map_err(|error| read(from, error))?, PathBuf::new())];
    while let Some((directory, at)) = waiting.last_mut() {
        let Some(entry) = directory.read() else {
            waiting.pop();
            continue;
        };
        let entry = entry.map_err(|error| read(&from.join(&*at), error))?;
        if matches!(entry.file_name().to_bytes(), b"." | b"..") {
            continue;
        }
        let relative = at.join(std::ffi::OsStr::from_bytes(entry.file_name().to_bytes()));
        let Some(name) = EntryName::parse(relative.as_os_str().as_bytes())? else { continue };
        let failed = |error| read(&from.join(&relative), error);
        let fd = directory.fd().map_err(failed)?;
        let about = rustix::fs::statat(fd, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        let mode = Some(about.st_mode);
        match FileType::from_raw_mode(about.st_mode) {
            FileType::Directory => {
                let opened = rustix::fs::openat(fd, entry.file_name(), DIRECTORY, Mode::empty()).map_err(failed)?;
                let inner = Dir::new(opened).map_err(failed)?;
                tree.directory(&name, mode)?;
                if waiting.len() == MAX_DEPTH {
                    return Err(ArchiveError::TooLarge { what: format!("its directories lie more than {MAX_DEPTH} deep") });
                }
                waiting.push((inner, relative));
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(fd, entry.file_name(), Vec::new()).map_err(failed)?;
                tree.link(name, target.as_bytes())?;
            }
            FileType::RegularFile => {
                let opened = rustix::fs::openat(fd, entry.file_name(), FILE, Mode::empty()).map_err(failed)?;
                // Whatever is open now is what is read.
                let now = rustix::fs::fstat(&opened).map_err(failed)?;
                if FileType::from_raw_mode(now.st_mode) != FileType::RegularFile {
                    return Err(ArchiveError::Special { name: name.0 });
                }
                tree.file(&name, Some(now.st_mode), &mut File::from(opened))?;
            }
            _ => return Err(ArchiveError::Special { name: name.0 }),
        }
    }
    Ok(())
}

fn read(path: &Path, error: rustix::io::Errno) -> ArchiveError {
    ArchiveError::Read { path: path.to_owned(), source: error.into() }
}
