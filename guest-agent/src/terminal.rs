//! A pseudo-terminal: the side that a terminal emulator holds, without waiting, and the side that programs see.

use std::{io, os::fd::OwnedFd};

use rustix::{
    fs::OFlags,
    io::Errno,
    pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{InputModes, OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize},
};
use tokio::io::unix::AsyncFd;

use crate::sys;

/// The emulator's side. Its end is the end of the terminal: whoever leads the session on it is hung up.
pub(crate) struct Terminal {
    side: AsyncFd<OwnedFd>,
}

impl Terminal {
    /// A new one, and the side for programs. It has the size 0 × 0 until it is told one.
    pub fn open() -> io::Result<(Self, OwnedFd)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = openpt(flags)?;
        unlockpt(&ours)?;
        let theirs = ioctl_tiocgptpeer(&ours, flags)?;
        // A backspace takes away a whole character of UTF-8.
        let mut modes = tcgetattr(&theirs)?;
        modes.input_modes |= InputModes::IUTF8;
        tcsetattr(&theirs, OptionalActions::Now, &modes)?;
        rustix::fs::fcntl_setfl(&ours, rustix::fs::fcntl_getfl(&ours)? | OFlags::NONBLOCK)?;
        Ok((Self { side: sys::watch_both(ours)? }, theirs))
    }

    /// What programs have printed. An error (EIO) when none of them has it open any more. Cancel-safe.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.side.readable().await?;
            match rustix::io::read(guard.get_inner(), &mut *buffer) {
                Ok(read) => return Ok(read),
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Types. Waits while no program reads what was typed before.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut guard = self.side.writable().await?;
            match rustix::io::write(guard.get_inner(), bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// In characters. Programs are told by SIGWINCH.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        Ok(tcsetwinsize(self.side.get_ref(), Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[tokio::test]
    async fn a_program_sees_a_terminal_of_the_size_it_is_told() {
        let (terminal, theirs) = Terminal::open().unwrap();
        let stdio = || Stdio::from(theirs.try_clone().unwrap());
        let mut child = Command::new("sh")
            .args(["-c", "test -t 0 && stty size && read line && stty size && echo \"got $line\""])
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap();
        drop(theirs);
        let mut heard = String::new();
        let mut sent = false;
        let end = loop {
            let mut piece = [0; 100];
            match terminal.read(&mut piece).await {
                Ok(read) => heard.push_str(std::str::from_utf8(&piece[..read]).unwrap()),
                Err(error) => break error,
            }
            if heard.contains("0 0\r\n") && !sent {
                sent = true;
                terminal.resize(132, 43).unwrap();
                terminal.write_all("λ\n".as_bytes()).await.unwrap();
            }
        };
        assert_eq!(end.raw_os_error(), Some(Errno::IO.raw_os_error()));
        assert_eq!(heard, "0 0\r\nλ\r\n43 132\r\ngot λ\r\n");
        assert!(child.wait().unwrap().success());
    }
}
