//! The guest as a machine: file systems, modules, the root disk, names, the loopback interface, the clock, entropy.

use std::{
    ffi::CString,
    fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt, symlink},
    path::Path,
    time::{Duration, Instant},
};

use model::Egress;
use protocol::agent::Restored;
use rustix::mount::{MountFlags, mount, mount_move};

use crate::{cgroup, egress::STUB, sys};

/// Where the initramfs has the modules, and the files that list them in the order of loading: for virtio devices on PCI, and
/// for those that ACPI announces as memory windows.
const MODULES: &str = "/modules";
const PCI_ORDER: &str = "/modules/order";
const MMIO_ORDER: &str = "/modules/order.mmio";
const FUSE: &str = "/modules/order.fuse";
/// How ACPI names a virtio-mmio window.
const MMIO_ACPI_ID: &str = "LNRO0005";
const NEW_ROOT: &str = "/newroot";
const ROOT_DISK: &str = "/dev/vda";
/// A disk that is not there by then does not come.
const DISK_LIMIT: Duration = Duration::from_secs(10);
const HOSTNAME: &str = "microvm";
/// What the last restore said of who this microVM is, as `KEY='value'` lines for a shell.
const IDENTITY: &str = "/run/dormouse/identity.env";

/// The guest could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("{doing} failed: {source}")]
pub(crate) struct SetupError {
    pub doing: String,
    pub source: io::Error,
}

/// Names what failed.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, SetupError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, SetupError> {
        self.map_err(|error| SetupError { doing: what(), source: error.into() })
    }
}

/// The kernel's file systems, in the initramfs.
pub(crate) fn mount_early() -> Result<(), SetupError> {
    let plain = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    for (what, at, flags, options) in [
        ("proc", "/proc", plain, ""),
        ("sysfs", "/sys", plain, ""),
        ("devtmpfs", "/dev", MountFlags::NOSUID, "mode=0755"),
        ("devpts", "/dev/pts", MountFlags::NOSUID | MountFlags::NOEXEC, "gid=5,mode=0620,ptmxmode=0666"),
        // Docker's size.
        ("tmpfs", "/dev/shm", plain, "mode=1777,size=64m"),
        ("cgroup2", cgroup::ROOT, plain, "nsdelegate"),
    ] {
        mount_on(what, at, flags, options)?;
    }
    for (link, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        let link = format!("/dev/{link}");
        match symlink(format!("/proc/self/fd{target}"), &link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error).doing(|| format!("making {link}")),
            _ => {}
        }
    }
    Ok(())
}

fn mount_on(what: &str, at: &str, flags: MountFlags, options: &str) -> Result<(), SetupError> {
    fs::create_dir_all(at).doing(|| format!("making {at}"))?;
    let options = CString::new(options).expect("options of ours hold no NUL");
    mount(what, at, what, flags, Some(options.as_c_str())).doing(|| format!("mounting {what} on {at}"))
}

/// Loads what the initramfs lists for this machine's bus. A module that is loaded or built in already is no fault.
pub(crate) fn load_modules() -> Result<(), SetupError> {
    load(if has_mmio_devices() { MMIO_ORDER } else { PCI_ORDER })
}

fn load(order: &str) -> Result<(), SetupError> {
    let listed = fs::read_to_string(order).doing(|| format!("reading {order}"))?;
    for name in listed.lines().filter(|line| !line.is_empty()) {
        let path = format!("{MODULES}/{name}");
        let file = fs::File::open(&path).doing(|| format!("opening {path}"))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error).doing(|| format!("loading {path}")),
        }
    }
    Ok(())
}

/// For an app that may mount: the rest of the modules is out of sight for it. `/dev/fuse` is there afterwards.
pub(crate) fn load_fuse() -> Result<(), SetupError> {
    load(FUSE)
}

fn has_mmio_devices() -> bool {
    let Ok(devices) = fs::read_dir("/sys/bus/acpi/devices") else { return false };
    devices.flatten().any(|device| device.file_name().to_string_lossy().starts_with(MMIO_ACPI_ID))
}

/// The kernel must take anybody else first when memory runs out.
pub(crate) fn protect_agent() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        crate::say!("setting oom_score_adj failed: {error}");
    }
}

/// Makes the root disk the root of everything. Once.
pub(crate) async fn switch_root() -> Result<(), SetupError> {
    let since = Instant::now();
    while !Path::new(ROOT_DISK).try_exists().unwrap_or(false) {
        if since.elapsed() > DISK_LIMIT {
            return Err(io::Error::from(io::ErrorKind::NotFound)).doing(|| format!("waiting for {ROOT_DISK}"));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    fs::create_dir_all(NEW_ROOT).doing(|| format!("making {NEW_ROOT}"))?;
    mount(ROOT_DISK, NEW_ROOT, "ext4", MountFlags::NOATIME, None).doing(|| format!("mounting {ROOT_DISK}"))?;
    for at in ["/dev", "/proc", "/sys"] {
        let to = format!("{NEW_ROOT}{at}");
        fs::create_dir_all(&to).doing(|| format!("making {at} on the root disk"))?;
        mount_move(at, &to).doing(|| format!("moving {at} to the root disk"))?;
    }
    // Nobody sees the initramfs again, but its files are memory.
    let _ = fs::remove_dir_all(MODULES);
    rustix::process::chdir(NEW_ROOT).doing(|| "entering the root disk".to_owned())?;
    mount_move(".", "/").doing(|| "moving the root disk to /".to_owned())?;
    rustix::process::chroot(".").doing(|| "changing the root".to_owned())?;
    rustix::process::chdir("/").doing(|| "entering the new root".to_owned())
}

/// What programs expect to find, where the image does not have it.
pub(crate) fn furnish(egress: Egress) -> Result<(), SetupError> {
    rustix::system::sethostname(HOSTNAME.as_bytes()).doing(|| "setting the hostname".to_owned())?;
    sys::loopback_up().doing(|| "bringing up the loopback interface".to_owned())?;
    let tmp = Path::new("/tmp");
    if !tmp.is_dir() {
        fs::DirBuilder::new().mode(0o1777).create(tmp).doing(|| "making /tmp".to_owned())?;
    }
    fs::set_permissions(tmp, fs::Permissions::from_mode(0o1777)).doing(|| "opening /tmp to all".to_owned())?;
    fs::create_dir_all("/etc").doing(|| "making /etc".to_owned())?;
    let hosts = format!("127.0.0.1 localhost {HOSTNAME}\n::1 localhost ip6-localhost ip6-loopback {HOSTNAME}\n");
    let names = match egress {
        Egress::Internet => format!("nameserver {STUB}\n"),
        Egress::Nothing => "# This microVM has no name server.\n".to_owned(),
    };
    for (path, text) in [("/etc/hosts", hosts.as_str()), ("/etc/resolv.conf", &names), ("/etc/hostname", "microvm\n")] {
        // Builders leave empty files where they mounted theirs.
        if fs::metadata(path).map_or(true, |file| file.is_file() && file.len() == 0) {
            // A dangling link of the image (systemd-resolved's) is replaced by a file.
            let _ = fs::remove_file(path);
            fs::write(path, text).doing(|| format!("writing {path}"))?;
        }
    }
    Ok(())
}

/// Sets right what a guest that wakes up in a snapshot has wrong. The app is frozen meanwhile.
pub(crate) fn wake_up(restored: &Restored) -> Result<(), SetupError> {
    let nanos = 1_000_000_000;
    let now = rustix::time::Timespec { tv_sec: (restored.realtime_ns / nanos) as i64, tv_nsec: (restored.realtime_ns % nanos) as i64 };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, now).doing(|| "setting the clock".to_owned())?;
    let mut entropy = [0; 64];
    hex::decode_to_slice(&restored.entropy, &mut entropy)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        .doing(|| "reading the host's entropy".to_owned())?;
    sys::reseed(&entropy).doing(|| "reseeding the random number generator".to_owned())?;

    let mut identity = format!("DORMOUSE_GENERATION='{}'\n", restored.generation);
    for (key, value) in &restored.identity {
        identity.push_str(&format!("{key}='{}'\n", value.replace('\'', "'\\''")));
    }
    let partial = format!("{IDENTITY}.new");
    fs::create_dir_all("/run/dormouse").doing(|| "making /run/dormouse".to_owned())?;
    fs::write(&partial, identity).doing(|| format!("writing {partial}"))?;
    fs::rename(&partial, IDENTITY).doing(|| format!("renaming {partial} to {IDENTITY}"))
}

/// CLOCK_REALTIME, nanoseconds since the epoch.
pub(crate) fn realtime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
