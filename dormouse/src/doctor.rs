//! `dormouse doctor`: what this host can do, what is missing, and the command that mends it.

use std::{path::{Path, PathBuf}, process::Command};

use config::{Config, EngineKind};
use model::{BuildNetwork, chain};
use vmm_runtime::kvm::{self, Probe};

/// One finding.
struct Finding {
    what: String,
    /// `None` if all is well; else the command or sentence that mends it.
    mend: Option<String>,
}

/// Prints the findings; returns whether a node can run here.
pub async fn run(config: &Config) -> bool {
    let mut findings = vec![
        program(&config.engine.qemu, "apt-get install qemu-system-x86", &["--version"]),
        program(Path::new("qemu-img"), "apt-get install qemu-utils", &["--version"]),
        program(Path::new("buildah"), "apt-get install buildah", &["--version"]),
        program(Path::new("mmdebstrap"), "apt-get install mmdebstrap", &["--version"]),
        program(Path::new("mkfs.ext4"), "apt-get install e2fsprogs", &["-V"]),
        program(Path::new("ip"), "apt-get install iproute2", &["-V"]),
        kernel(&config.guest.kernel_dir),
        beside("guest agent", agent_path(config)),
        beside("VMM of the kvm engine", vmm_path(config)),
        root(),
    ];
    if config.build.network == BuildNetwork::Internet {
        let mend = "apt-get install slirp4netns (or build without a network: network = \"none\" in [build]; builds never get the host's instead)";
        findings.push(program(Path::new("slirp4netns"), mend, &["--version"]));
        findings.push(tap());
    }
    for finding in &findings {
        match &finding.mend {
            None => println!("ok       {}", finding.what),
            Some(mend) => println!("MISSING  {}\n         {mend}", finding.what),
        }
    }
    println!("engine   {}", choose(config).await.why);
    findings.iter().all(|finding| finding.mend.is_none())
}

/// What runs microVMs here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// `dormouse-vmm`.
    Kvm,
    /// QEMU.
    Qemu,
}

/// The engine this node uses, and why.
pub struct Choice {
    /// Which.
    pub engine: Engine,
    /// A sentence.
    pub why: String,
}

/// Chooses as the configuration asks. A `/dev/kvm` that opens says little: it may be a software KVM, which cannot run a stock
/// kernel. So `auto` asks the VMM, which tries a guest of its own (kvm-hosts.md).
pub async fn choose(config: &Config) -> Choice {
    let accelerator = match config.engine.accelerator {
        config::Accelerator::Tcg => "TCG (software emulation)",
        config::Accelerator::Kvm => "KVM",
    };
    let qemu = |why: String| Choice { engine: Engine::Qemu, why: format!("qemu with {accelerator}: {why}") };
    match config.engine.kind {
        EngineKind::Qemu => qemu("engine.kind = \"qemu\" asks for it".to_owned()),
        EngineKind::Kvm => {
            let probed = probe(config).await.map_or_else(|why| why, |probe| probe.to_string());
            Choice { engine: Engine::Kvm, why: format!("kvm (dormouse-vmm): engine.kind = \"kvm\" asks for it; {probed}") }
        }
        EngineKind::Auto => match probe(config).await {
            Ok(hardware @ Probe::Hardware) => Choice { engine: Engine::Kvm, why: format!("kvm (dormouse-vmm): {hardware}") },
            Ok(other) => qemu(other.to_string()),
            Err(why) => qemu(why),
        },
    }
}

async fn probe(config: &Config) -> Result<Probe, String> {
    kvm::probe(&vmm_path(config)?).await.map_err(|error| chain(&error))
}

fn program(name: &Path, mend: &str, version: &[&str]) -> Finding {
    match Command::new(name).args(version).output() {
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            let line = String::from_utf8_lossy(&text).lines().next().unwrap_or_default().trim().to_owned();
            Finding { what: format!("{}: {line}", name.display()), mend: None }
        }
        Err(error) => Finding { what: format!("{}: {error}", name.display()), mend: Some(format!("run: {mend} (or make setup)")) },
    }
}

fn kernel(dir: &Path) -> Finding {
    let found = std::fs::read_dir(dir.join("boot"))
        .ok()
        .and_then(|entries| entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).find(|name| name.starts_with("vmlinuz-")));
    match found {
        Some(name) => Finding { what: format!("guest kernel: {name}"), mend: None },
        None => Finding { what: format!("guest kernel: none in {}", dir.display()), mend: Some("run: make setup".to_owned()) },
    }
}

fn beside(what: &str, path: Result<PathBuf, String>) -> Finding {
    match path {
        Ok(path) => Finding { what: format!("{what}: {}", path.display()), mend: None },
        Err(why) => Finding { what: why, mend: Some("run: make build".to_owned()) },
    }
}

/// Where the guest agent is: as configured, or beside this binary.
pub fn agent_path(config: &Config) -> Result<PathBuf, String> {
    installed(config.guest.agent.as_deref(), "guest-agent", "guest agent")
}

/// Where our VMM is: as configured, or beside this binary.
pub fn vmm_path(config: &Config) -> Result<PathBuf, String> {
    installed(config.engine.vmm.as_deref(), "dormouse-vmm", "VMM of the kvm engine")
}

fn installed(configured: Option<&Path>, name: &str, what: &str) -> Result<PathBuf, String> {
    let path = match configured {
        Some(path) => path.to_owned(),
        None => std::env::current_exe().ok().and_then(|exe| exe.parent().map(|dir| dir.join(name))).unwrap_or_else(|| PathBuf::from(name)),
    };
    if path.is_file() { Ok(path) } else { Err(format!("there is no {what} at {}", path.display())) }
}

/// What slirp4netns makes a network card of.
fn tap() -> Finding {
    let there = Path::new("/dev/net/tun").exists();
    Finding {
        what: format!("/dev/net/tun, for the network of image builds{}", if there { "" } else { ": not there" }),
        mend: (!there).then(|| "run: modprobe tun (in a container: let it have the device /dev/net/tun)".to_owned()),
    }
}

fn root() -> Finding {
    let root = rustix::process::geteuid().is_root();
    Finding {
        what: format!("runs as {}", if root { "root" } else { "an ordinary user" }),
        mend: (!root).then(|| "image builds (buildah, mmdebstrap) and snapshots of other processes' memory need root; run with sudo".to_owned()),
    }
}
