//! A stock kernel under our machine, on any host: QEMU's TCG emulates an AMD processor with SVM, Debian's kernel runs in it, and
//! in that, on its KVM, runs our machine with Debian's kernel again (kvm-hosts.md). See `examples/nested.rs` for what happens
//! there; here it is put together and its output read. Takes a minute; times in it say nothing about hardware.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
};

use vmm_runtime::guest_kit::{self, Archive};

const OUTER_MODULES: [&str; 1] = ["kvm_amd"];
const INNER_MODULES: [&str; 5] = ["virtio_mmio", "virtio_blk", "virtio_rng", "virtio_balloon", "vmw_vsock_virtio_transport"];
const TARGET: &str = "x86_64-unknown-linux-musl";

/// An initramfs with this init and these modules, to be added to.
fn initramfs(init: &[u8], modules: &[(String, PathBuf)]) -> Archive {
    let mut archive = Archive::default();
    for dir in ["dev", "proc", "sys", "modules"] {
        archive.directory(dir);
    }
    for (name, path) in modules {
        archive.file(&format!("modules/{name}.ko"), 0o644, &fs::read(path).unwrap());
    }
    archive.file("modules/order", 0o644, modules.iter().map(|(name, _)| format!("{name}.ko\n")).collect::<String>().as_bytes());
    archive.file("init", 0o755, init);
    archive
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
fn outer(arguments: &str, vcpus: u8) -> Option<String> {
    let kernel_dir = PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/dormouse/kernel");
    let of_kernel = |wanted: &[&str]| guest_kit::kernel_and_modules(&kernel_dir, wanted);
    let ((kernel, outer_modules), (_, inner_modules)) = match (of_kernel(&OUTER_MODULES), of_kernel(&INNER_MODULES)) {
        (Ok(outer), Ok(inner)) => (outer, inner),
        (Err(error), _) | (_, Err(error)) => {
            // Past the test harness, which shows what a passing test says to nobody.
            let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: {error}\n"));
            return None;
        }
    };
    if Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        // Past the test harness, which shows what a passing test says to nobody.
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: no qemu-system-x86_64 (make setup)\n"));
        return None;
    }
    let [init, vmm] = programs();
    let inner = initramfs(&init, &inner_modules).finish();
    let mut outer = initramfs(&init, &outer_modules);
    outer.file("vmlinux", 0o644, &vmm::arch::kernel::extract_vmlinux(&fs::read(&kernel).unwrap()).unwrap());
    outer.file("inner.cpio", 0o644, &inner);
    outer.file("dormouse-vmm", 0o755, &vmm);
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
    boots_sleeps_and_wakes(1, "INNER CPUS 0");
}

#[test]
fn a_stock_kernel_boots_sleeps_and_wakes_with_all_its_processors() {
    boots_sleeps_and_wakes(3, "INNER CPUS 0-2");
}

fn boots_sleeps_and_wakes(vcpus: u8, online: &str) {
    let Some(output) = outer("", vcpus) else { return };
    assert!(output.lines().any(|line| line.trim_end().ends_with(online)), "{online:?} is missing");
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
    let Some(output) = outer("process", 1) else { return };
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
