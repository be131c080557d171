//! A stock kernel under our machine, on any host: QEMU's TCG emulates an AMD processor with SVM, Debian's kernel runs in it, and
//! in that, on its KVM, runs our machine with Debian's kernel again (kvm-hosts.md). See `examples/nested.rs` for what happens
//! there; here it is put together and its output read. Takes a minute; times in it say nothing about hardware.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const OUTER_MODULES: [&str; 1] = ["kvm_amd"];
const INNER_MODULES: [&str; 5] = ["virtio_mmio", "virtio_blk", "virtio_rng", "virtio_balloon", "vmw_vsock_virtio_transport"];
const TARGET: &str = "x86_64-unknown-linux-musl";

/// The kernel's modules, with what each needs.
struct Modules(BTreeMap<String, PathBuf>);

impl Modules {
    fn below(dir: &Path) -> Self {
        let (mut found, mut open) = (BTreeMap::new(), vec![dir.to_owned()]);
        while let Some(dir) = open.pop() {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    open.push(path);
                } else if let Some(name) = path.file_name().unwrap().to_str().unwrap().strip_suffix(".ko") {
                    found.insert(name.replace('-', "_"), path);
                }
            }
        }
        Self(found)
    }

    fn add(&self, name: &str, order: &mut Vec<(String, Vec<u8>)>) {
        let Some(path) = self.0.get(name) else { return };
        if order.iter().any(|(there, _)| there == name) {
            return;
        }
        let module = fs::read(path).unwrap();
        let depends = module.split(|byte| *byte == 0).find_map(|text| text.strip_prefix(b"depends=")).unwrap_or_default().to_vec();
        for needed in String::from_utf8(depends).unwrap().split(',').filter(|name| !name.is_empty()) {
            self.add(&needed.replace('-', "_"), order);
        }
        order.push((name.to_owned(), module));
    }
}

/// A cpio archive ("newc").
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        let fields = [1, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.0.extend(b"070701");
        for field in fields {
            self.0.extend(format!("{field:08x}").bytes());
        }
        for bytes in [&[name.as_bytes(), &[0]].concat()[..], content] {
            self.0.extend(bytes);
            self.0.resize(self.0.len().next_multiple_of(4), 0);
        }
    }

    fn initramfs(init: &[u8], modules: &Modules, wanted: &[&str]) -> Self {
        let mut order = Vec::new();
        for name in wanted {
            modules.add(name, &mut order);
        }
        let mut archive = Self::default();
        for dir in ["dev", "proc", "sys", "modules"] {
            archive.add(dir, 0o040_755, &[]);
        }
        for (name, content) in &order {
            archive.add(&format!("modules/{name}.ko"), 0o100_644, content);
        }
        archive.add("modules/order", 0o100_644, order.iter().map(|(name, _)| format!("{name}.ko\n")).collect::<String>().as_bytes());
        archive.add("init", 0o100_755, init);
        archive
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.0
    }
}

/// The program of `examples/nested.rs` and the VMM, static.
fn programs() -> [Vec<u8>; 2] {
    let target = std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned();
    let built = Command::new(env!("CARGO"))
        .args(["build", "-p", "vmm", "--example", "nested", "--bin", "dormouse-vmm", "--target", TARGET, "--target-dir"])
        .arg(&target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(built.success(), "the programs for the guests do not build");
    ["examples/nested", "dormouse-vmm"].map(|program| fs::read(target.join(TARGET).join("debug").join(program)).unwrap())
}

/// What the outer guest printed; `None` if it cannot be run here, which is said.
fn outer(arguments: &str) -> Option<String> {
    let kernel_dir = PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/dormouse/kernel");
    let Some(kernel) = fs::read_dir(kernel_dir.join("boot"))
        .ok()
        .and_then(|dir| dir.flatten().map(|entry| entry.path()).filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("vmlinuz-")).max())
    else {
        // Past the test harness, which shows what a passing test says to nobody.
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: no kernel in {} (make setup)\n", kernel_dir.display()));
        return None;
    };
    if Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        // Past the test harness, which shows what a passing test says to nobody.
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: no qemu-system-x86_64 (make setup)\n"));
        return None;
    }
    let vcpus = std::env::var("NESTED_VCPUS").unwrap_or_else(|_| "1".to_owned());
    let modules = Modules::below(&kernel_dir.join("lib/modules"));
    let [init, vmm] = programs();
    let inner = Archive::initramfs(&init, &modules, &INNER_MODULES).finish();
    let mut outer = Archive::initramfs(&init, &modules, &OUTER_MODULES);
    outer.add("vmlinux", 0o100_644, &vmm::arch::kernel::extract_vmlinux(&fs::read(&kernel).unwrap()).unwrap());
    outer.add("inner.cpio", 0o100_644, &inner);
    outer.add("dormouse-vmm", 0o100_755, &vmm);
    let dir = tempfile::tempdir().unwrap();
    let initrd = dir.path().join("outer.cpio");
    fs::write(&initrd, outer.finish()).unwrap();

    // Without XSAVE: TCG does not tell a hypervisor of XSETBV, so KVM would save and show an XCR0 that is not the guest's.
    let ran = Command::new("timeout")
        .args(["-k", "5", "240", "qemu-system-x86_64", "-accel", "tcg", "-cpu", "EPYC,+svm,+npt,-xsave", "-m", "2048", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"])
        .arg("-kernel")
        .arg(&kernel)
        .arg("-initrd")
        .arg(&initrd)
        .args(["-append", &format!("console=ttyS0 panic=-1 quiet no_timer_check vcpus={vcpus} {arguments}")])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&ran.stdout).into_owned();
    // The whole of it is the best description of what went wrong.
    println!("{output}");
    Some(output)
}

#[test]
fn a_stock_kernel_boots_sleeps_and_wakes_on_a_nested_kvm() {
    let Some(output) = outer("") else { return };
    for wanted in ["INNER UP", "OUTER BOOT", "OUTER RESTORED 0", "OUTER RESTORED 1", "OUTER RESUMED", "STOPPED the guest reset itself", "STOPPED the guest turned itself off", "OUTER DONE"] {
        assert!(output.contains(wanted), "{wanted:?} is missing");
    }
    // The kernel has heard of each new VMGenID: none after the boot, one after a restore, two after the next.
    for (acpi, when) in [(0, "booted"), (1, "restored"), (2, "resumed")] {
        assert!(output.contains(&format!("acpi=Some({acpi})")), "no ACPI event device, or not {acpi} events when {when}");
    }
    let devices = output.lines().find(|line| line.contains("INNER DEVICES")).unwrap();
    for device in ["0x0002=virtio_blk", "0x0004=virtio_rng", "0x0005=virtio_balloon", "0x0013=vmw_vsock_virtio_transport"] {
        assert!(devices.contains(device), "{devices}");
    }
}

#[test]
fn a_stock_kernel_boots_sleeps_and_wakes_in_jailed_processes_under_their_filters() {
    let Some(output) = outer("process") else { return };
    for wanted in [
        "KVM {\"kvm\":\"hardware\"}",
        "OUTER BOOT",
        "OUTER CANCELLED",
        "OUTER SUSPENDED",
        "layers=identity,user,mount,pid,network,ipc,uts,cgroup,root,landlock",
        "OUTER DONE",
    ] {
        assert!(output.contains(wanted), "{wanted:?} is missing");
    }
}
