//! A directory of this host as the artifact: copied under the rules that hold for a zip.

use std::{
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{OpenOptionsExt, PermissionsExt},
    },
    path::Path,
};

use super::{ArchiveError, EntryName, Tree};

pub(super) fn copy(from: &Path, tree: &mut Tree) -> Result<(), ArchiveError> {
    // A stack instead of recursion: the depth is up to whoever made the directory.
    let mut waiting = vec![from.to_owned()];
    while let Some(directory) = waiting.pop() {
        let failed = |source| ArchiveError::Read { path: directory.clone(), source };
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            // Cannot fail: every path on the stack began as `from`.
            let relative = path.strip_prefix(from).unwrap_or(&path);
            let Some(name) = EntryName::parse(relative.as_os_str().as_bytes())? else { continue };
            let failed = |source| ArchiveError::Read { path: path.clone(), source };
            let metadata = fs::symlink_metadata(&path).map_err(failed)?;
            let mode = Some(metadata.permissions().mode());
            if metadata.is_dir() {
                tree.directory(&name, mode)?;
                waiting.push(path);
            } else if metadata.is_symlink() {
                let target = fs::read_link(&path).map_err(failed)?;
                tree.link(name, target.as_os_str().as_bytes())?;
            } else if metadata.is_file() {
                // O_NOFOLLOW and O_NONBLOCK: it may have been exchanged for a link or a pipe since it was looked at.
                let mut file =
                    fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path).map_err(failed)?;
                tree.file(&name, mode, &mut file)?;
            } else {
                return Err(ArchiveError::Special { name: name.0 });
            }
        }
    }
    Ok(())
}
