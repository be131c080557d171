//! Descriptors that a parent left open by mistake end here.

use std::{
    fs::OpenOptions,
    os::fd::{AsRawFd, RawFd},
};

use super::{Doing, JailError};

/// Closes everything but standard input, output and error, and `keep`.
///
/// # Safety
///
/// Nothing in the process may own a descriptor other than those kept: this is for the first lines of `main`, and for a forked
/// child that does not use what it inherited.
pub unsafe fn close_others(keep: Option<RawFd>) -> Result<(), JailError> {
    let first = libc::STDERR_FILENO as u32 + 1;
    let ranges = match keep.and_then(|keep| u32::try_from(keep).ok()).filter(|keep| *keep >= first) {
        Some(keep) => [(first, keep.wrapping_sub(1)), (keep + 1, u32::MAX)],
        None => [(first, u32::MAX), (1, 0)],
    };
    for (from, to) in ranges {
        if from > to {
            continue;
        }
        // SAFETY: the call takes numbers only; that nobody owns what is closed is the caller's promise.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        if closed != 0 {
            return Err(std::io::Error::last_os_error()).doing("closing inherited descriptors");
        }
    }
    Ok(())
}

/// Reads from standard input find its end.
pub fn silence_stdin() -> Result<(), JailError> {
    let null = OpenOptions::new().read(true).open("/dev/null").doing("opening /dev/null")?;
    // SAFETY: both are open descriptors; the new standard input is a duplicate, which `null` going out of scope leaves open.
    if unsafe { libc::dup2(null.as_raw_fd(), libc::STDIN_FILENO) } < 0 {
        return Err(std::io::Error::last_os_error()).doing("replacing standard input");
    }
    Ok(())
}
