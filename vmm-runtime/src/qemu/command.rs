//! QEMU's command line: the machine that a guest boots on and that its clones are.
//!
//! Owns: every option that shows in the device state. Boot and clone differ in nothing that does (a clone has no kernel
//! to load, maps the memory privately, and gets its disk by `device_add`), and [`Machine::fingerprint`] names all of it,
//! so that a change here makes old snapshots be refused instead of loaded into another machine. The recipe was measured
//! on QEMU 7.2 (vmm.md §7): machine `pc`, because `microvm` hangs in timer calibration under load.

use std::path::Path;

use model::Shape;
use sha2::{Digest, Sha256};

use crate::host::process::name_argument;

/// How guest code is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// QEMU's translator: works everywhere.
    Tcg,
    /// Hardware virtualisation.
    Kvm,
}

impl Accel {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcg => "tcg",
            Self::Kvm => "kvm",
        }
    }

    /// Under TCG x86-64-v2 and what TLS likes. Not `max`: the translator's AVX is new in 7.2, and the CPU must not
    /// change with the host. Its vendor is AMD, which spares the guest page-table isolation.
    fn cpu(self) -> &'static str {
        match self {
            Self::Tcg => "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes,+pclmulqdq,+rdrand",
            Self::Kvm => "host",
        }
    }
}

/// Socket of the QMP server, in the process's own directory.
pub const QMP_SOCKET: &str = "qmp.sock";
/// Socket of the channel to the guest agent, in the process's own directory.
pub const AGENT_SOCKET: &str = "agent.sock";
/// Name of the virtio-serial port, under which the guest agent looks for it.
pub const AGENT_PORT: &str = "dormouse.agent";
/// The ring that holds the newest output of the serial console.
pub const CONSOLE: &str = "console";
/// Size of that ring. QEMU wants a power of two. A ring and not a file, because a guest can write without end.
pub const CONSOLE_BYTES: u32 = 64 * 1024;
/// Node name of the root disk's top layer.
pub const ROOT_NODE: &str = "root";

const DISK_DEVICE: &str = "virtio-blk-pci";
const DISK_ADDRESS: &str = "06.0";
const DISK_ID: &str = "disk0";

/// Kernel arguments of every boot. `tsc=reliable`: the watchdog of the clock source takes a stopped guest for a broken
/// TSC. `mitigations=off`: a guest is one trust domain, and TCG executes nothing speculatively.
pub const KERNEL_ARGUMENTS: &str =
    "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t tsc=reliable no_timer_check mitigations=off random.trust_cpu=on";

/// What a guest runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// How guest code is run.
    pub accel: Accel,
    /// Size of the guest.
    pub shape: Shape,
}

/// What is booted.
#[derive(Debug, Clone, Copy)]
pub struct Guest<'a> {
    /// Kernel image.
    pub kernel: &'a Path,
    /// Initramfs.
    pub initrd: &'a Path,
    /// Raw root disk.
    pub root_disk: &'a Path,
}

/// Commas separate the options of one argument; QEMU reads a doubled one as one.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

impl Machine {
    fn devices(&self, memory: &str) -> Vec<String> {
        let Shape { memory_mib, vcpus, disk_gib: _ } = self.shape;
        let accel = self.accel.name();
        [
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-no-shutdown",
            "-display",
            "none",
            "-M",
            "pc,smm=off,usb=off,vmport=off,hpet=off,suppress-vmdesc=on,memory-backend=ram0",
            "-accel",
            accel,
            "-cpu",
            self.accel.cpu(),
            "-smp",
            &vcpus.to_string(),
            "-m",
            &format!("{memory_mib}M"),
            "-object",
            &format!("memory-backend-file,id=ram0,size={memory_mib}M,{memory}"),
            "-global",
            "migration.send-configuration=off",
            "-rtc",
            "base=utc,clock=host",
            "-chardev",
            &format!("ringbuf,id={CONSOLE},size={CONSOLE_BYTES}"),
            "-serial",
            &format!("chardev:{CONSOLE}"),
            "-chardev",
            &format!("socket,id=agent,path={AGENT_SOCKET},server=on,wait=off"),
            "-device",
            "virtio-serial-pci,id=serial0,addr=04.0,max_ports=4",
            "-device",
            &format!("virtserialport,id=agent0,chardev=agent,name={AGENT_PORT}"),
            "-object",
            "rng-random,id=rng0,filename=/dev/urandom",
            "-device",
            "virtio-rng-pci,id=rngdev0,rng=rng0,addr=05.0",
        ]
        .map(str::to_owned)
        .into()
    }

    fn common(&self, process_dir: &Path, memory: &Path, share: &str) -> Vec<String> {
        let mut arguments = vec!["-name".to_owned(), name_argument(process_dir)];
        // No swap is set aside for what guests may touch: together they may be shown more than the host has.
        arguments.extend(self.devices(&format!("mem-path={},share={share},reserve=off", escaped(memory))));
        arguments.extend(["-qmp".to_owned(), format!("unix:{QMP_SOCKET},server=on,wait=off")]);
        arguments
    }

    /// The command line, without the program, of a process that boots a kernel, writing guest memory into the file.
    pub fn boot(&self, process_dir: &Path, memory: &Path, guest: &Guest<'_>) -> Vec<String> {
        let Guest { kernel, initrd, root_disk } = guest;
        let mut arguments = self.common(process_dir, memory, "on");
        let file = format!("driver=file,node-name=root-file,cache.no-flush=on,discard=unmap,filename={}", escaped(root_disk));
        arguments.extend(["-blockdev".to_owned(), file]);
        let raw = format!("driver=raw,node-name={ROOT_NODE},cache.no-flush=on,discard=unmap,file=root-file");
        arguments.extend(["-blockdev".to_owned(), raw]);
        arguments.extend(["-device".to_owned(), format!("{DISK_DEVICE},id={DISK_ID},drive={ROOT_NODE},addr={DISK_ADDRESS}")]);
        // These take a plain path.
        arguments.extend(["-kernel".to_owned(), kernel.display().to_string(), "-initrd".to_owned(), initrd.display().to_string()]);
        arguments.extend(["-append".to_owned(), KERNEL_ARGUMENTS.to_owned()]);
        arguments
    }

    /// The command line of a process that waits for device state, reading guest memory from the file and writing none of it
    /// back.
    pub fn clone_of(&self, process_dir: &Path, memory: &Path) -> Vec<String> {
        let mut arguments = self.common(process_dir, memory, "off");
        arguments.extend(["-incoming".to_owned(), "defer".to_owned()]);
        arguments
    }

    /// `device_add` of the root disk, for a clone.
    pub fn disk_device() -> serde_json::Value {
        serde_json::json!({ "driver": DISK_DEVICE, "id": DISK_ID, "drive": ROOT_NODE, "addr": DISK_ADDRESS })
    }

    /// Stands for everything that device state depends on.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for argument in self.devices("") {
            hash.update(argument.as_bytes());
            hash.update([0]);
        }
        hash.update(Self::disk_device().to_string());
        hex::encode(&hash.finalize()[..16])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(memory_mib: u32) -> Machine {
        Machine { accel: Accel::Tcg, shape: Shape { memory_mib, vcpus: 1, disk_gib: 8 } }
    }

    #[test]
    fn a_path_cannot_add_options() {
        let arguments = machine(512).clone_of(Path::new("/run/a,b"), Path::new("/d/x,share=on"));
        assert!(arguments.iter().any(|argument| argument.ends_with("mem-path=/d/x,,share=on,share=off,reserve=off")));
        assert_eq!(arguments[1], "dormouse:/run/a,,b");
    }

    #[test]
    fn the_fingerprint_names_the_machine_and_no_path() {
        assert_eq!(machine(512).fingerprint(), machine(512).fingerprint());
        assert_ne!(machine(512).fingerprint(), machine(1024).fingerprint());
        assert_ne!(machine(512).fingerprint(), Machine { accel: Accel::Kvm, ..machine(512) }.fingerprint());
    }

    #[test]
    fn boot_and_clone_are_the_same_machine() {
        let guest = Guest { kernel: Path::new("k"), initrd: Path::new("i"), root_disk: Path::new("d") };
        let (boot, clone) = (machine(512).boot(Path::new("r"), Path::new("m"), &guest), machine(512).clone_of(Path::new("r"), Path::new("m")));
        let same = boot.iter().zip(&clone).take_while(|(boot, clone)| boot.replace("share=on", "share=off") == **clone).count();
        assert_eq!(clone[same..], ["-incoming", "defer"]);
    }
}
