//! What the conformance tests of the engines share: the guest's kernel, initramfs, app and root disk.
//!
//! Needs a kernel package unpacked in `$DORMOUSE_KERNEL_DIR` (default `~/.cache/dormouse/kernel`), and the guest agent built
//! for `x86_64-unknown-linux-musl` in release mode (or `$DORMOUSE_GUEST_AGENT`). Or, where nothing can be built, all of it in
//! `$DORMOUSE_PREBUILT`, as [`Guests::prebuild`] put it there.
#![allow(dead_code, reason = "each test binary uses some of it")]

use std::{
    env, fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use model::{MicrovmId, Rights, Shape};
use vmm_runtime::{
    EgressPolicy,
    conformance::{self, Bench, HTTP},
    engine::{AppSpec, Engine, LaunchSpec},
    guest_kit::{self, GuestKit},
    qemu::{DEFAULT_LOG_BYTES, HostConfig, Limits, PoolConfig, process::Process},
};

/// Length of a root disk.
const DISK_BYTES: u64 = 1 << 30;
/// The part of it that a file system takes where it has to be copied byte by byte.
const SMALL_DISK_BYTES: u64 = 48 << 20;

const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";
const DISK: &str = "root.ext4";

/// The target that guests and static programs are built for.
pub const MUSL: &str = "x86_64-unknown-linux-musl";

/// Where cargo puts everything: this program is in `<target dir>[/<target>]/<profile>/deps`.
pub fn target_dir() -> PathBuf {
    let program = env::current_exe().expect("Linux knows the path of a program");
    let above = program.ancestors().nth(3).unwrap_or(Path::new("/"));
    let dir = if above.ends_with(MUSL) { above.parent().unwrap_or(above) } else { above };
    dir.to_owned()
}

/// A program that was built for musl in release mode.
pub fn built(name: &str) -> PathBuf {
    target_dir().join(MUSL).join("release").join(name)
}

/// The path in a variable, or another.
pub fn path_or(variable: &str, default: impl FnOnce() -> PathBuf) -> PathBuf {
    env::var_os(variable).map_or_else(default, PathBuf::from)
}

/// Where the guest's kernel package is unpacked.
pub fn kernel_dir() -> PathBuf {
    path_or("DORMOUSE_KERNEL_DIR", || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cache/dormouse/kernel"))
}

/// What guests boot from, and a directory for everything.
pub struct Guests {
    pub kit: GuestKit,
    pub dir: tempfile::TempDir,
    /// A root disk with the app.
    disk: Option<PathBuf>,
}

impl Guests {
    /// `None` with a sentence on stderr: something that only setup can provide is missing.
    pub fn find(engine: &str) -> Option<Self> {
        let _ = tracing_subscriber::fmt().with_test_writer().with_max_level(tracing::Level::INFO).try_init();
        let dir = tempfile::tempdir().expect("the temporary directory is writable");
        if let Some(prebuilt) = env::var_os("DORMOUSE_PREBUILT").map(PathBuf::from) {
            let kit = GuestKit { kernel: prebuilt.join(KERNEL), initrd: prebuilt.join(INITRD), fingerprint: "prebuilt".to_owned() };
            return Some(Self { kit, dir, disk: Some(prebuilt.join(DISK)) });
        }
        let agent = path_or("DORMOUSE_GUEST_AGENT", || built("guest-agent"));
        match guest_kit::assemble(&kernel_dir(), &agent, &dir.path().join("kit")) {
            Ok(kit) => Some(Self { kit, dir, disk: None }),
            Err(error) => {
                // Past the test harness, which shows what a passing test says to nobody.
                let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: the {engine} engine is not tested: {error} ({})\n", std::error::Error::source(&error).map_or_else(String::new, ToString::to_string)));
                None
            }
        }
    }

    /// Puts what guests boot from into a directory that is to be `$DORMOUSE_PREBUILT`.
    pub fn prebuild(kit: &GuestKit, work_dir: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        fs::copy(&kit.kernel, to.join(KERNEL)).unwrap();
        fs::copy(&kit.initrd, to.join(INITRD)).unwrap();
        make_disk(work_dir, &to.join(DISK), SMALL_DISK_BYTES);
    }

    pub fn root_disk(&self, to: &Path) {
        match &self.disk {
            Some(disk) => {
                fs::copy(disk, to).unwrap();
                fs::File::options().write(true).open(to).unwrap().set_len(DISK_BYTES).unwrap();
            }
            None => make_disk(self.dir.path(), to, DISK_BYTES),
        }
    }
}

/// Starts engines of one kind.
#[async_trait]
pub trait Start: Send + Sync {
    /// The kind.
    type Started: Engine;

    /// One as after a start of `serve`.
    async fn start(&self, host: HostConfig) -> Self::Started;
}

/// A bench with real guests.
pub struct GuestBench<S> {
    pub guests: Guests,
    pub limits: Limits,
    pub start: S,
    /// What its app may do.
    pub rights: Rights,
    outside: Option<Outside>,
    /// The size of its guests.
    pub shape: Shape,
}

impl<S: Start> GuestBench<S> {
    pub fn new(guests: Guests, start: S) -> Self {
        Self { guests, limits: Limits::default(), start, rights: Rights::default(), outside: Outside::make(), shape: conformance::SHAPE }
    }

    pub fn run_dir(&self) -> PathBuf {
        self.work_dir().join("run")
    }

    pub async fn start(&self) -> S::Started {
        let GuestKit { kernel, initrd, fingerprint } = self.guests.kit.clone();
        let pool = PoolConfig { per_image: 1, total: 4 };
        let also = self.outside.iter().map(|outside| IpAddr::from(outside.address).into()).collect();
        let egress = Arc::new(EgressPolicy { also, ..EgressPolicy::default() });
        let host = HostConfig { kernel, initrd, guest_fingerprint: fingerprint, run_dir: self.run_dir(), pool, limits: self.limits, egress, roles: None, log_bytes: DEFAULT_LOG_BYTES };
        self.start.start(host).await
    }

    /// A new microVM of the suite's image.
    pub fn microvm(&self) -> LaunchSpec {
        let id = MicrovmId::random();
        let dir = self.work_dir().join(id.to_string());
        fs::create_dir(&dir).unwrap();
        LaunchSpec { id, dir, image_dir: self.work_dir().join("image"), identity: Default::default(), egress: Default::default() }
    }

    /// The whole suite.
    pub async fn conforms(self) {
        let _sweep = self.sweep_at_end();
        conformance::run_all(&self).await;
        let left = Process::find_all(&self.run_dir()).unwrap();
        assert!(left.is_empty(), "processes were left behind: {left:?}");
        self.leaves_nothing().await;
    }

    /// The next start finds nothing that it could not clear away.
    pub async fn leaves_nothing(&self) {
        self.start().await.sweep(&[]).await.unwrap();
        // Where a process has a cgroup, that goes first, and not before the kernel is done with it.
        let deadline = Instant::now() + Duration::from_secs(20);
        while let Some(left) = fs::read_dir(self.run_dir()).unwrap().next() {
            assert!(Instant::now() < deadline, "{left:?} stays");
            tokio::task::yield_now().await;
        }
    }

    /// Ends every process of the bench, also when a check has panicked.
    pub fn sweep_at_end(&self) -> SweepAtEnd {
        SweepAtEnd(self.run_dir())
    }
}

#[async_trait]
impl<S: Start> Bench for GuestBench<S> {
    async fn engine(&self) -> Arc<dyn Engine> {
        Arc::new(self.start().await)
    }

    fn work_dir(&self) -> &Path {
        self.guests.dir.path()
    }

    async fn root_disk(&self, to: &Path) {
        self.guests.root_disk(to);
    }

    fn app(&self) -> AppSpec {
        let env = [("PATH", "/bin"), ("HOME", "/root")].map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        AppSpec { argv: vec!["/app".into()], env, workdir: "/".into(), user: String::new(), exposed: vec![HTTP], rights: self.rights }
    }

    fn guests(&self) -> conformance::Guests {
        conformance::Guests::Real
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn outside(&self) -> Option<Ipv4Addr> {
        self.outside.as_ref().map(|outside| outside.address)
    }
}

/// An address of this host that is neither loopback nor private: one of documentation's (RFC 5737), given to `lo` under a label
/// of the bench's own until the drop: benches of one process run side by side, and the end of one must not take another's address.
struct Outside {
    label: String,
    address: Ipv4Addr,
}

impl Outside {
    /// `None` where this process may not give addresses.
    fn make() -> Option<Self> {
        static BENCHES: AtomicU32 = AtomicU32::new(0);
        let (process, bench) = (std::process::id(), BENCHES.fetch_add(1, Ordering::Relaxed));
        let address = Ipv4Addr::new(198, 51, 100, ((process + 83 * bench) % 250 + 1) as u8);
        let outside = Self { label: format!("lo:{process}.{bench}"), address };
        // `struct sockaddr_in`: the family, the port, the address.
        let value = |address: Ipv4Addr| {
            let [a, b, c, d] = address.octets();
            [libc::AF_INET as u8, 0, 0, 0, a, b, c, d]
        };
        // SIOCSIFADDR makes the alias, with its class's mask, and SIOCSIFNETMASK leaves the neighbours of the address nobody's.
        outside.configure(0x8916, value(outside.address)).ok()?;
        outside.configure(0x891c, value(Ipv4Addr::BROADCAST)).ok()?;
        Some(outside)
    }

    /// netdevice(7): `value` is the union of a `struct ifreq`, as far as it is set.
    fn configure(&self, request: libc::Ioctl, value: [u8; 8]) -> std::io::Result<()> {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let mut what = [0_u8; size_of::<libc::ifreq>()];
        what[..self.label.len()].copy_from_slice(self.label.as_bytes());
        what[libc::IFNAMSIZ..][..value.len()].copy_from_slice(&value);
        // SAFETY: both requests read a `struct ifreq` at the pointer, which has the length of the array.
        let done = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), request, what.as_mut_ptr()) };
        if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // SIOCSIFFLAGS without IFF_UP removes an alias.
        let _ = self.configure(0x8914, [0; 8]);
    }
}

/// See [`GuestBench::sweep_at_end`].
pub struct SweepAtEnd(PathBuf);

impl Drop for SweepAtEnd {
    fn drop(&mut self) {
        // Within the test's runtime; what is only signalled here is gone soon after.
        for process in Process::find_all(&self.0).unwrap_or_default() {
            process.signal_kill();
        }
    }
}

fn make_disk(work_dir: &Path, to: &Path, bytes: u64) {
    let tree = work_dir.join("tree");
    fs::create_dir_all(tree.join("tmp")).unwrap();
    fs::rename(guest_app(work_dir), tree.join("app")).unwrap();
    fs::File::create(to).unwrap().set_len(bytes).unwrap();
    make_file_system(&tree, to);
}

/// Makes a file system with these files in a file.
pub fn make_file_system(tree: &Path, file: &Path) {
    let output = Command::new("mkfs.ext4").args(["-q", "-F", "-O", "^has_journal", "-d"]).arg(tree).arg(file).output().expect("mkfs.ext4 is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Compiles `examples/guest_app.rs` into a directory.
pub fn guest_app(dir: &Path) -> PathBuf {
    static_program("examples/guest_app.rs", &dir.join("guest_app"))
}

/// Compiles a program for musl that needs nothing but the standard library, so the compiler alone does it.
pub fn static_program(source: &str, program: &Path) -> PathBuf {
    let compiler = env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let output = Command::new(compiler)
        .args(["--edition=2024", "--target", MUSL, "-Copt-level=2", "-Cstrip=symbols", "-o"])
        .arg(program)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(source))
        .output()
        .expect("rustc can be run");
    assert!(output.status.success(), "{source} does not compile: {}", String::from_utf8_lossy(&output.stderr));
    program.to_owned()
}
