//! A real guest: Debian's kernel under QEMU's translator, the agent as its PID 1, a root disk with the probe.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use model::{Port, Rights};
use protocol::{
    agent::{AppSpec, Reply, Request},
    link::{AgentLink, Attach, LinkError, MuxStream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// A ceiling for everything. A boot takes 3 to 8 seconds on an idle machine.
pub const LIMIT: Duration = Duration::from_secs(90);
pub const PROBE: u16 = 8080;
pub const ECHO: u16 = 7000;

pub fn port(number: u16) -> Port {
    Port::new(number).expect("a test names real ports")
}

pub struct Machine {
    qemu: Child,
    pub link: Arc<AgentLink>,
    /// What the app wrote.
    pub output: Arc<Mutex<Vec<u8>>>,
    dir: tempfile::TempDir,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// What is missing on this host, said loudly, instead of a test that fails for want of it.
fn ingredients() -> Option<(PathBuf, PathBuf)> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let kernel = std::env::var_os("DORMOUSE_KERNEL_DIR").map(PathBuf::from).or_else(|| Some(cache?.join("dormouse/kernel")));
    let target = std::env::current_exe().ok().and_then(|test| Some(test.ancestors().nth(3)?.to_owned()));
    let agent = std::env::var_os("DORMOUSE_GUEST_AGENT")
        .map(PathBuf::from)
        .or_else(|| Some(target?.join("x86_64-unknown-linux-musl/release/guest-agent")));
    let there = |what: &str, path: Option<PathBuf>, mend: &str| {
        let found = path.clone().filter(|path| path.exists());
        if found.is_none() {
            // Past the test harness, which shows what a passing test says to nobody.
            let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: no {what} at {path:?}; run: {mend}\n"));
        }
        found
    };
    let kernel = there("guest kernel", kernel, "make setup")?;
    let agent = there("guest agent", agent, "cargo build -p guest-agent --release --target x86_64-unknown-linux-musl")?;
    there("QEMU", Some("/usr/bin/qemu-system-x86_64".into()), "make setup")?;
    Some((kernel, agent))
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn root_disk(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    for made in ["etc", "usr/bin", "opt"] {
        fs::create_dir_all(root.join(made)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/home/web:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nweb:x:1001:\nvideo:x:44:web\n").unwrap();
    fs::write(root.join("opt/closed"), "not executable").unwrap();
    fs::write(root.join("opt/text"), "no program").unwrap();
    fs::write(root.join("opt/no-interpreter"), "#!/bin/nothing\n").unwrap();
    for program in ["text", "no-interpreter"] {
        fs::set_permissions(root.join("opt").join(program), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/boot/probe.rs");
    run(Command::new("rustc")
        .args(["--edition=2024", "--target=x86_64-unknown-linux-musl", "-Copt-level=1", "-Cstrip=symbols", "-o"])
        .arg(root.join("usr/bin/probe"))
        .arg(source));
    fs::hard_link(root.join("usr/bin/probe"), root.join("probe")).unwrap();
    let disk = dir.join("root.ext4");
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&root).args(["-E", "root_owner=0:0"]).arg(&disk).arg("64M"));
    disk
}

impl Machine {
    /// Boots; `None` if the host lacks something.
    pub async fn boot() -> Option<Self> {
        let (kernel, agent) = ingredients()?;
        let dir = tempfile::tempdir().unwrap();
        let kit = vmm_runtime::guest_kit::assemble(&kernel, &agent, &dir.path().join("kit")).unwrap();
        let disk = root_disk(dir.path());
        let qemu = Command::new("/usr/bin/qemu-system-x86_64")
            .current_dir(dir.path())
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-M", "pc", "-accel", "tcg", "-m", "512"])
            .arg("-kernel")
            .arg(&kit.kernel)
            .arg("-initrd")
            .arg(&kit.initrd)
            // `no_timer_check`: on a machine that is busy the emulated timer fails the kernel's check of it.
            .args(["-append", "console=ttyS0 quiet panic=-1 no_timer_check tsc=reliable"])
            .args(["-serial", "file:console", "-chardev", "socket,id=agent,path=agent.sock,server=on,wait=off"])
            .args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=dormouse.agent"])
            .arg("-drive")
            .arg(format!("file={},if=virtio,format=raw", disk.display()))
            .args(["-device", "virtio-rng-pci"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let output = Arc::new(Mutex::new(Vec::new()));
        let mut machine = Self { qemu, link: link(&output), output, dir };
        let since = Instant::now();
        machine.attach(Attach::Boot).await;
        eprintln!("the agent answered after {:?}", since.elapsed());
        Some(machine)
    }

    /// A new connection to the same guest.
    async fn connect(&mut self) -> UnixStream {
        let since = Instant::now();
        loop {
            match UnixStream::connect(self.dir.path().join("agent.sock")).await {
                Ok(stream) => return stream,
                Err(error) => {
                    assert!(since.elapsed() < LIMIT, "connecting to QEMU: {error}; console: {}", self.console());
                    assert!(self.qemu.try_wait().unwrap().is_none(), "QEMU has ended");
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    pub async fn attach(&mut self, how: Attach) {
        let stream = self.connect().await;
        if let Err(error) = self.link.attach(stream, how, LIMIT).await {
            panic!("{error}; console: {}", self.console());
        }
        self.link.release_streams();
    }

    /// Another host takes over, as after a restart of `serve`.
    pub async fn adopt(&mut self) {
        self.link.close();
        self.link = link(&self.output);
        self.attach(Attach::Adopted).await;
    }

    fn console(&self) -> String {
        fs::read_to_string(self.dir.path().join("console")).unwrap_or_default()
    }

    pub async fn start(&self, argv: &[&str], workdir: &str, user: &str) -> Result<Reply, LinkError> {
        self.start_with(argv, workdir, user, Rights::default()).await
    }

    pub async fn start_with(&self, argv: &[&str], workdir: &str, user: &str, rights: Rights) -> Result<Reply, LinkError> {
        let spec = AppSpec {
            argv: argv.iter().map(|argument| (*argument).to_owned()).collect(),
            env: vec![("PATH".into(), "/bin:/usr/bin".into()), ("HOME".into(), "/root".into()), ("GREETING".into(), "hello world".into())],
            workdir: workdir.to_owned(),
            user: user.to_owned(),
            exposed: vec![port(PROBE)],
            rights,
        };
        self.link.call(Request::Start(spec), LIMIT).await
    }

    pub async fn ready(&self) {
        let limit_ms = LIMIT.as_millis() as u64;
        let ready = self.link.call(Request::AwaitReady { exposed: vec![port(PROBE)], limit_ms }, LIMIT).await;
        assert!(matches!(ready, Ok(Reply::Ready(which)) if which == port(PROBE)), "{ready:?}");
    }

    pub async fn dial(&self, number: u16) -> MuxStream {
        self.link.open(port(number), LIMIT).await.unwrap_or_else(|error| panic!("port {number}: {error}; console: {}", self.console()))
    }

    /// Asks the probe.
    pub async fn ask(&self, question: &str) -> String {
        let mut stream = self.dial(PROBE).await;
        stream.write_all(format!("{question}\n").as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        soon(question, stream.read_to_string(&mut answer)).await.unwrap();
        answer
    }

    /// Waits until the app's output says it.
    pub async fn hears(&self, text: &str) {
        let heard = async {
            while !String::from_utf8_lossy(&self.output.lock().unwrap()).contains(text) {
                self.link.call(Request::Stats, LIMIT).await.unwrap();
            }
        };
        soon(text, heard).await;
    }
}

fn link(output: &Arc<Mutex<Vec<u8>>>) -> Arc<AgentLink> {
    let output = output.clone();
    AgentLink::new(Box::new(move |piece| output.lock().unwrap().extend_from_slice(piece)))
}

pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("{what}: not within {LIMIT:?}"))
}
