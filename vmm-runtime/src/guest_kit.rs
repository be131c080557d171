//! What a guest boots from: Debian's kernel as it is, and an initramfs with our agent and the modules it needs.
//!
//! Owns: which modules, in which order, and the archive's form. Never changes the kernel, and never asks the host's own
//! kernel or `depmod`: Debian's package is unpacked, not installed, so there is no `modules.dep`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

/// What a guest's devices need, by the file in the initramfs that lists them; each is loaded after what it depends on. All
/// are modules in Debian 12's cloud kernel. A guest loads one list, by the bus that its devices are on: a module that is
/// loaded for nothing costs 10 ms where instructions are translated, and memory in every snapshot.
const WANTED: [(&str, &[&str]); 3] = [
    // QEMU's machines.
    ("modules/order", &["virtio_pci", "virtio_blk", "virtio_console", "virtio_rng"]),
    // Our VMM's.
    (
        "modules/order.mmio",
        &["virtio_mmio", "virtio_blk", "virtio_rng", "vsock", "vmw_vsock_virtio_transport", "virtio_balloon", "virtio_net"],
    ),
    // For apps with all capabilities.
    ("modules/order.fuse", &["fuse"]),
];

/// A kernel and its initramfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestKit {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initramfs; its name holds a hash of its content.
    pub initrd: PathBuf,
    /// Stands for both: the kernel's release and the hash of the initramfs.
    pub fingerprint: String,
}

/// Why there is nothing to boot from.
#[derive(Debug, thiserror::Error)]
pub enum GuestKitError {
    /// Something is not there.
    #[error("{what} is missing in {dir}; run: make setup")]
    Missing {
        /// What.
        what: String,
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// Something is there and cannot be used.
    #[error("{doing} failed")]
    File {
        /// What was tried, on what.
        doing: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Module dependencies go in a circle, which no kernel's do.
    #[error("the kernel modules in {dir} depend on each other in a circle at {name}")]
    Circle {
        /// A module in it.
        name: String,
        /// Where.
        dir: PathBuf,
    },
}

fn file<T>(result: io::Result<T>, doing: impl FnOnce() -> String) -> Result<T, GuestKitError> {
    result.map_err(|source| GuestKitError::File { doing: doing(), source })
}

/// Assembles the initramfs in `out_dir` from a kernel package unpacked into `kernel_dir` and the agent's binary. If it is
/// there already, nothing is written.
pub fn assemble(kernel_dir: &Path, agent: &Path, out_dir: &Path) -> Result<GuestKit, GuestKitError> {
    let boot = kernel_dir.join("boot");
    let (kernel, release) = newest_kernel(&boot)?;
    let modules_dir = kernel_dir.join("lib/modules").join(&release);
    let index = index(&modules_dir)?;

    let mut archive = Archive::default();
    for dir in ["dev", "proc", "sys", "run", "newroot", "modules"] {
        archive.directory(dir);
    }
    let mut packed = BTreeSet::new();
    for (list, wanted) in WANTED {
        let mut order = String::new();
        for (name, path) in load_order(&modules_dir, &index, wanted)? {
            order.push_str(&name);
            order.push_str(".ko\n");
            if packed.insert(name.clone()) {
                let bytes = file(fs::read(&path), || format!("reading {}", path.display()))?;
                archive.file(&format!("modules/{name}.ko"), 0o644, &bytes);
            }
        }
        archive.file(list, 0o644, order.as_bytes());
    }
    let agent_bytes = file(fs::read(agent), || format!("reading the guest agent {}", agent.display()))?;
    archive.file("init", 0o755, &agent_bytes);
    let bytes = archive.finish();

    let hash = hex::encode(&Sha256::digest(&bytes)[..8]);
    let initrd = out_dir.join(format!("initramfs-{hash}.cpio"));
    if !initrd.exists() {
        file(fs::create_dir_all(out_dir), || format!("making {}", out_dir.display()))?;
        let written = (|| {
            let mut fresh = tempfile::NamedTempFile::new_in(out_dir)?;
            io::Write::write_all(&mut fresh, &bytes)?;
            fresh.as_file().sync_all()?;
            fresh.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
            fresh.persist(&initrd)?;
            Ok(())
        })();
        file(written, || format!("writing {}", initrd.display()))?;
    }
    Ok(GuestKit { kernel, initrd, fingerprint: format!("{release}/{hash}") })
}

/// The newest kernel of a package unpacked into `kernel_dir`, and these modules of it with what they depend on, in the order of
/// loading. For guests that are no microVMs, such as the machine that tests run an engine in.
pub fn kernel_and_modules(kernel_dir: &Path, wanted: &[&str]) -> Result<(PathBuf, Vec<(String, PathBuf)>), GuestKitError> {
    let (kernel, release) = newest_kernel(&kernel_dir.join("boot"))?;
    let modules_dir = kernel_dir.join("lib/modules").join(release);
    Ok((kernel, load_order(&modules_dir, &index(&modules_dir)?, wanted)?))
}

/// The kernel in `boot` whose name sorts last, and its release.
fn newest_kernel(boot: &Path) -> Result<(PathBuf, String), GuestKitError> {
    let missing = || GuestKitError::Missing { what: "a kernel (vmlinuz-*)".to_owned(), dir: boot.to_owned() };
    let listed = fs::read_dir(boot).map_err(|_| missing())?;
    listed
        .flatten()
        .filter_map(|entry| {
            let release = entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned();
            Some((entry.path(), release))
        })
        .max_by(|(_, a), (_, b)| a.cmp(b))
        .ok_or_else(missing)
}

/// Every module below `dir`, by its name as the kernel has it (`-` is `_`).
fn index(dir: &Path) -> Result<BTreeMap<String, PathBuf>, GuestKitError> {
    let mut found = BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in file(fs::read_dir(&dir), || format!("looking for kernel modules in {}", dir.display()))? {
            let entry = file(entry, || format!("looking for kernel modules in {}", dir.display()))?;
            let path = entry.path();
            if file(entry.file_type(), || format!("looking at {}", path.display()))?.is_dir() {
                open.push(path);
            } else if let Some(name) = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".ko")) {
                found.insert(name.replace('-', "_"), path);
            }
        }
    }
    Ok(found)
}

/// What to load, dependencies first. A wanted module that is not there is built in, unless none is there at all.
fn load_order(dir: &Path, index: &BTreeMap<String, PathBuf>, wanted: &[&str]) -> Result<Vec<(String, PathBuf)>, GuestKitError> {
    if !index.contains_key("virtio_blk") {
        return Err(GuestKitError::Missing { what: "the kernel module virtio_blk.ko".to_owned(), dir: dir.to_owned() });
    }
    let mut order = Vec::new();
    let mut marks = BTreeMap::new();
    for name in wanted {
        visit(name, dir, index, &mut marks, &mut order)?;
    }
    Ok(order)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    Open,
    Done,
}

fn visit(name: &str, dir: &Path, index: &BTreeMap<String, PathBuf>, marks: &mut BTreeMap<String, Mark>, order: &mut Vec<(String, PathBuf)>) -> Result<(), GuestKitError> {
    match marks.get(name) {
        Some(Mark::Done) => return Ok(()),
        Some(Mark::Open) => return Err(GuestKitError::Circle { name: name.to_owned(), dir: dir.to_owned() }),
        None => {}
    }
    let Some(path) = index.get(name) else { return Ok(()) };
    marks.insert(name.to_owned(), Mark::Open);
    let bytes = file(fs::read(path), || format!("reading {}", path.display()))?;
    for needed in dependencies(&bytes) {
        visit(&needed, dir, index, marks, order)?;
    }
    marks.insert(name.to_owned(), Mark::Done);
    order.push((name.to_owned(), path.clone()));
    Ok(())
}

/// The names in a module's `depends=` (section `.modinfo`: NUL-terminated `key=value` strings).
fn dependencies(module: &[u8]) -> Vec<String> {
    module
        .split(|byte| *byte == 0)
        .find_map(|text| text.strip_prefix(b"depends="))
        .and_then(|list| std::str::from_utf8(list).ok())
        .map(|list| list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect())
        .unwrap_or_default()
}

/// A cpio archive in the form the kernel unpacks: "newc" (kernel: Documentation/driver-api/early-userspace/buffer-format).
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a directory; those above it are there already.
    pub fn directory(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    /// Adds a file with these permissions.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | mode, content);
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("an agent and modules of less than 4 GiB");
        // Owner, group and time are 0, so that the same content gives the same archive.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(depends: &str) -> Vec<u8> {
        format!("\x7fELF\0license=GPL\0depends={depends}\0name=x\0").into_bytes()
    }

    fn kernel(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("boot")).unwrap();
        fs::write(dir.path().join("boot/vmlinuz-6.1.0-1-cloud-amd64"), "kernel").unwrap();
        let modules_dir = dir.path().join("lib/modules/6.1.0-1-cloud-amd64/kernel/drivers");
        fs::create_dir_all(&modules_dir).unwrap();
        for (name, depends) in modules {
            fs::write(modules_dir.join(format!("{name}.ko")), module(depends)).unwrap();
        }
        fs::write(dir.path().join("agent"), "agent").unwrap();
        dir
    }

    fn kit(dir: &tempfile::TempDir) -> Result<GuestKit, GuestKitError> {
        assemble(dir.path(), &dir.path().join("agent"), &dir.path().join("out"))
    }

    fn order_in(dir: &tempfile::TempDir) -> Vec<String> {
        list_in(dir, "modules/order")
    }

    fn list_in(dir: &tempfile::TempDir, list: &str) -> Vec<String> {
        let archive = fs::read(kit(dir).unwrap().initrd).unwrap();
        let text = String::from_utf8_lossy(&archive).into_owned();
        let (_, rest) = text.split_once(&format!("{list}\0")).unwrap();
        rest.split("070701").next().unwrap().split(['\n', '\0']).filter(|name| name.ends_with(".ko")).map(str::to_owned).collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = kernel(&[("virtio_pci", "virtio,virtio_ring"), ("virtio", "virtio_ring"), ("virtio_ring", ""), ("virtio_blk", "virtio_ring,virtio"), ("virtio-rng", "virtio"), ("virtio_console", "virtio")]);
        assert_eq!(order_in(&dir), ["virtio_ring.ko", "virtio.ko", "virtio_pci.ko", "virtio_blk.ko", "virtio_console.ko", "virtio_rng.ko"]);
    }

    #[test]
    fn each_bus_has_a_list_and_a_module_in_both_is_packed_once() {
        let dir = kernel(&[
            ("virtio_pci", "virtio,virtio_ring"),
            ("virtio_mmio", "virtio,virtio_ring"),
            ("virtio", "virtio_ring"),
            ("virtio_ring", ""),
            ("virtio_blk", "virtio_ring,virtio"),
            ("virtio_net", "net_failover,virtio"),
            ("net_failover", "failover"),
            ("failover", ""),
            ("vsock", ""),
            ("vmw_vsock_virtio_transport", "vmw_vsock_virtio_transport_common,virtio,vsock"),
            ("vmw_vsock_virtio_transport_common", "vsock"),
        ]);
        assert_eq!(order_in(&dir), ["virtio_ring.ko", "virtio.ko", "virtio_pci.ko", "virtio_blk.ko"]);
        let mmio = ["virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport", "failover", "net_failover", "virtio_net"];
        assert_eq!(list_in(&dir, "modules/order.mmio"), mmio.map(|name| format!("{name}.ko")));
        let archive = fs::read(kit(&dir).unwrap().initrd).unwrap();
        assert_eq!(String::from_utf8_lossy(&archive).matches("modules/virtio_blk.ko\0").count(), 1);
    }

    #[test]
    fn the_name_follows_the_content_and_nothing_is_written_twice() {
        let dir = kernel(&[("virtio_blk", "")]);
        let first = kit(&dir).unwrap();
        assert_eq!(kit(&dir).unwrap(), first);
        fs::write(dir.path().join("agent"), "another agent").unwrap();
        assert_ne!(kit(&dir).unwrap().fingerprint, first.fingerprint);
    }

    #[test]
    fn what_is_missing_is_named() {
        let empty = tempfile::tempdir().unwrap();
        let error = assemble(empty.path(), Path::new("/nowhere"), empty.path()).unwrap_err();
        assert!(error.to_string().contains("make setup"), "{error}");
        let error = kit(&kernel(&[("virtio", "")])).unwrap_err();
        assert!(error.to_string().contains("virtio_blk.ko"), "{error}");
    }

    #[test]
    fn a_circle_is_refused() {
        let dir = kernel(&[("virtio_blk", "virtio_pci"), ("virtio_pci", "virtio_blk")]);
        assert!(matches!(kit(&dir), Err(GuestKitError::Circle { .. })));
    }
}
