//! What the process is told on its command line; everything else comes over the control socket.
//!
//! Pure: words in, a checked [`Command`] or a sentence out.

use std::{ffi::OsString, os::fd::RawFd, path::PathBuf};

use crate::jail::{Layer, seccomp::Mode};

/// What is printed for `--help` and after a mistake.
pub const USAGE: &str = "\
usage: dormouse-vmm --dir DIR --name dormouse:DIR [options]   serve one microVM
       dormouse-vmm --probe                                   say what /dev/kvm of this host is, as JSON
       dormouse-vmm --version                                 say `dormouse-vmm` and a version, which snapshots are bound to

  --dir DIR            the process's own directory; `control` and `vsock` are made there
  --name dormouse:DIR  by this the node finds the process again in /proc
  --cgroup PATH|fd:N   a cgroup v2 directory to join first
  --uid N --gid N      whom to become when started as root (default 65534, nobody)
  --uid-base N         or: user and group N plus the number of this process, which no other living process has
  --seccomp MODE       kill (default), log, off
  --require LAYERS     layers of the jail without which the process does not start: all, or some of
                       identity,user,mount,pid,network,ipc,uts,cgroup,root,landlock separated by commas
";

/// Whom to become when started as root, if the node does not say: `nobody`.
const NOBODY: u32 = 65_534;

/// `PID_MAX_LIMIT` of Linux on 64 bits; `kernel.pid_max` can be no larger.
const MAX_PID: u32 = 1 << 22;

/// What the process is for.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve one microVM.
    Serve(Serve),
    /// Look at `/dev/kvm`, say what it is, end.
    Probe,
    /// Print the version.
    Version,
    /// Print [`USAGE`].
    Help,
}

/// How to serve.
#[derive(Debug, PartialEq, Eq)]
pub struct Serve {
    /// The process's own directory.
    pub dir: PathBuf,
    /// Joined before anything else is done.
    pub cgroup: Option<Cgroup>,
    /// Whom to become when started as root.
    pub uid: u32,
    /// As `uid`.
    pub gid: u32,
    /// Instead: the first of the numbers that processes get by their own number.
    pub uid_base: Option<u32>,
    /// What a forbidden system call does.
    pub seccomp: Mode,
    /// Layers without which the process ends at its start.
    pub required: Vec<Layer>,
}

impl Serve {
    /// User and group to become, for the process of this number.
    pub fn user(&self, pid: u32) -> (u32, u32) {
        // Neither overflows: both were looked at.
        self.uid_base.map_or((self.uid, self.gid), |base| (base + pid.min(MAX_PID), base + pid.min(MAX_PID)))
    }
}

/// A cgroup v2 directory.
#[derive(Debug, PartialEq, Eq)]
pub enum Cgroup {
    /// By name.
    Path(PathBuf),
    /// By a descriptor that the node left open.
    Descriptor(RawFd),
}

/// Reads the arguments, without the program's name.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut arguments = arguments.into_iter();
    let (mut dir, mut named, mut probe) = (None, false, false);
    let mut serve = Serve { dir: PathBuf::new(), cgroup: None, uid: NOBODY, gid: NOBODY, uid_base: None, seccomp: Mode::Kill, required: Vec::new() };
    while let Some(option) = arguments.next() {
        let option = option.into_string().map_err(|option| format!("{} is no option", option.display()))?;
        let mut value = || arguments.next().ok_or_else(|| format!("{option} lacks its value"));
        match option.as_str() {
            "--help" | "-h" => return Ok(Command::Help),
            "--version" => return Ok(Command::Version),
            "--probe" => probe = true,
            "--dir" => dir = Some(PathBuf::from(value()?)),
            // Only there to be seen in /proc/<pid>/cmdline.
            "--name" => named = !value()?.is_empty(),
            "--cgroup" => {
                let value = value()?;
                serve.cgroup = Some(match value.to_str().and_then(|text| text.strip_prefix("fd:")) {
                    Some(number) => Cgroup::Descriptor(number.parse().map_err(|_| format!("--cgroup {}: that is no descriptor", value.display()))?),
                    None => Cgroup::Path(PathBuf::from(value)),
                });
            }
            "--uid" => serve.uid = id(&option, value()?)?,
            "--uid-base" => {
                let base = id(&option, value()?)?;
                if base >= u32::MAX - MAX_PID {
                    return Err(format!("--uid-base {base}: it and the largest process number ({MAX_PID}) make no number of a user"));
                }
                serve.uid_base = Some(base);
            }
            "--gid" => serve.gid = id(&option, value()?)?,
            "--seccomp" => {
                serve.seccomp = match value()?.to_str() {
                    Some("kill") => Mode::Kill,
                    Some("log") => Mode::Log,
                    Some("off") => Mode::Off,
                    _ => return Err("--seccomp takes kill, log or off".to_owned()),
                }
            }
            "--require" => serve.required = layers(&value()?)?,
            _ => return Err(format!("{option} is no option")),
        }
    }
    match (probe, dir) {
        (true, None) => Ok(Command::Probe),
        (true, Some(_)) => Err("--probe stands alone".to_owned()),
        (false, Some(dir)) if named => Ok(Command::Serve(Serve { dir, ..serve })),
        (false, _) => Err("--dir and --name are needed".to_owned()),
    }
}

fn id(option: &str, value: OsString) -> Result<u32, String> {
    let number = value.to_str().and_then(|text| text.parse().ok());
    // 0 would be root again, u32::MAX means "leave it" to the kernel.
    number.filter(|number| (1..u32::MAX).contains(number)).ok_or_else(|| format!("{option} {}: that is no number of an ordinary user", value.display()))
}

fn layers(value: &OsString) -> Result<Vec<Layer>, String> {
    let text = value.to_str().unwrap_or_default();
    if text == "all" {
        return Ok(Layer::ALL.to_vec());
    }
    text.split(',')
        .map(|name| Layer::ALL.into_iter().find(|layer| layer.name() == name).ok_or_else(|| format!("--require: {name:?} is no layer of the jail")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
        parse(line.split_ascii_whitespace().map(OsString::from))
    }

    #[test]
    fn what_the_node_passes_is_understood() {
        let Ok(Command::Serve(serve)) = parsed("--dir /run/x --name dormouse:/run/x") else { panic!() };
        assert_eq!((serve.dir, serve.cgroup, serve.uid, serve.seccomp), (PathBuf::from("/run/x"), None, NOBODY, Mode::Kill));
        let Ok(Command::Serve(serve)) =
            parsed("--name dormouse:d --dir d --cgroup fd:7 --uid 90001 --gid 90002 --seccomp log --require user,landlock")
        else {
            panic!()
        };
        assert_eq!((serve.user(7), serve.seccomp), ((90_001, 90_002), Mode::Log));
        assert_eq!((serve.cgroup, serve.required), (Some(Cgroup::Descriptor(7)), vec![Layer::User, Layer::Landlock]));
        let Ok(Command::Serve(serve)) = parsed("--name dormouse:d --dir d --uid-base 2000000000") else { panic!() };
        assert_eq!(serve.user(4_194_303), (2_004_194_303, 2_004_194_303));
        assert_eq!(parsed("--probe"), Ok(Command::Probe));
        assert_eq!(parsed("--dir d --help"), Ok(Command::Help));
        assert_eq!(parsed("--version"), Ok(Command::Version));
    }

    #[test]
    fn a_mistake_is_named() {
        for (line, part) in [
            ("", "needed"),
            ("--dir d", "needed"),
            ("--dir", "lacks"),
            ("--dir d --name n --seccomp trap", "kill, log or off"),
            ("--dir d --name n --uid 0", "ordinary user"),
            ("--dir d --name n --uid 4294967295", "ordinary user"),
            ("--dir d --name n --uid-base 0", "ordinary user"),
            ("--dir d --name n --uid-base 4290772991", "largest process number"),
            ("--dir d --name n --require walls", "walls"),
            ("--dir d --name n --cgroup fd:x", "descriptor"),
            ("--probe --dir d", "alone"),
            ("--frobnicate", "--frobnicate"),
        ] {
            let error = parsed(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
