//! `dormouse doctor`: what this host can do, what is missing, and the command that mends it.

use std::{path::{Path, PathBuf}, process::Command};

use config::Config;

/// One finding.
struct Finding {
    what: String,
    /// `None` if all is well; else the command or sentence that mends it.
    mend: Option<String>,
}

/// Prints the findings; returns whether a node can run here.
pub fn run(config: &Config) -> bool {
    let findings = [
        program(&config.engine.qemu, "apt-get install qemu-system-x86", &["--version"]),
        program(Path::new("qemu-img"), "apt-get install qemu-utils", &["--version"]),
        program(Path::new("buildah"), "apt-get install buildah", &["--version"]),
        program(Path::new("mmdebstrap"), "apt-get install mmdebstrap", &["--version"]),
        program(Path::new("mkfs.ext4"), "apt-get install e2fsprogs", &["-V"]),
        kernel(&config.guest.kernel_dir),
        agent(config),
        root(),
    ];
    for finding in &findings {
        match &finding.mend {
            None => println!("ok       {}", finding.what),
            Some(mend) => println!("MISSING  {}\n         {mend}", finding.what),
        }
    }
    println!("engine   {}", engine_choice(config));
    findings.iter().all(|finding| finding.mend.is_none())
}

/// The engine this node uses, and why, in a sentence.
pub fn engine_choice(config: &Config) -> String {
    let asked = match config.engine.kind {
        config::EngineKind::Auto => "auto",
        config::EngineKind::Qemu => "qemu",
    };
    let accelerator = match config.engine.accelerator {
        config::Accelerator::Tcg => "TCG (software emulation)",
        config::Accelerator::Kvm => "KVM",
    };
    format!("qemu with {accelerator} (engine.kind = \"{asked}\"; it is the only engine of this version). {}", kvm())
}

/// What `/dev/kvm` is worth here.
fn kvm() -> String {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let assisted = flags.lines().filter(|line| line.starts_with("flags")).any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"));
    match (std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm"), assisted) {
        (Ok(_), true) => "/dev/kvm opens and the CPU has hardware virtualisation: engine.accelerator = \"kvm\" may be tried.".to_owned(),
        (Ok(_), false) => "/dev/kvm opens, but the CPU shows neither vmx nor svm: it is a software KVM, which cannot run a stock kernel.".to_owned(),
        (Err(error), _) => format!("/dev/kvm does not open ({error})."),
    }
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

fn agent(config: &Config) -> Finding {
    match agent_path(config) {
        Ok(path) => Finding { what: format!("guest agent: {}", path.display()), mend: None },
        Err(why) => Finding { what: why, mend: Some("run: make build".to_owned()) },
    }
}

/// Where the guest agent is: as configured, or beside this binary.
pub fn agent_path(config: &Config) -> Result<PathBuf, String> {
    let path = match &config.guest.agent {
        Some(path) => path.clone(),
        None => std::env::current_exe().ok().and_then(|exe| exe.parent().map(|dir| dir.join("guest-agent"))).unwrap_or_else(|| PathBuf::from("guest-agent")),
    };
    if path.is_file() { Ok(path) } else { Err(format!("there is no guest agent at {}", path.display())) }
}

fn root() -> Finding {
    let root = rustix::process::geteuid().is_root();
    Finding {
        what: format!("runs as {}", if root { "root" } else { "an ordinary user" }),
        mend: (!root).then(|| "image builds (buildah, mmdebstrap) and snapshots of other processes' memory need root; run with sudo".to_owned()),
    }
}
