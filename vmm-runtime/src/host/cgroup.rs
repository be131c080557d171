//! A cgroup v2 for each VMM process: what it may take of the host's memory, tasks and processors.
//!
//! Owns: the directory `dormouse` below the node's own cgroup, or below the root where the node's own has processes in it (the
//! kernel then permits no limits below it), and one cgroup in there for each process, named as the process's own directory. A
//! link in that directory says which one it is, so that whoever removes the directory removes the cgroup first, also after a
//! restart of the node. Never kills but what is left of a process that has ended.
//!
//! A host without such a hierarchy has no limits; that is said once, when the engine starts.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The link in a process's directory.
const LINK: &str = "cgroup";
/// Below the cgroup that is the node's.
const OURS: &str = "dormouse";
/// Without these there is no use in it.
const NEEDED: [&str; 2] = ["memory", "pids"];
/// Of use where it is there.
const WANTED: &str = "cpu";
/// Of `cpu.max`, in microseconds; the kernel's default.
const PERIOD_US: u64 = 100_000;
/// What the last threads of a killed process may take to be gone.
const GONE_LIMIT: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What one process may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ceiling {
    /// Memory, page cache and what the kernel holds for it, in bytes. None of it may go to swap.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub tasks: u32,
    /// Processors at a time.
    pub cpus: u32,
}

/// Where cgroups are made.
#[derive(Debug)]
pub struct Cgroups {
    dir: PathBuf,
    has_cpu: bool,
}

impl Cgroups {
    /// Looks for a hierarchy that can be used. An error is a sentence.
    pub fn find() -> Result<Self, String> {
        let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("{path} cannot be read: {error}"));
        Self::find_in(&read("/proc/self/mounts")?, &read("/proc/self/cgroup")?)
    }

    fn find_in(mounts: &str, own: &str) -> Result<Self, String> {
        // proc(5), cgroups(7): of version 2 is the line with number 0 and no names.
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).filter(|own| !own.split('/').any(|name| name == ".."));
        let mut why = Vec::new();
        for root in mounts.lines().filter_map(mount_of_version_2) {
            let mut candidates: Vec<_> = own.map(|own| root.join(own)).into_iter().collect();
            if candidates.first() != Some(&root) {
                candidates.push(root);
            }
            for base in candidates {
                match Self::below(&base) {
                    Ok(made) => return Ok(made),
                    Err(error) => why.push(format!("{}: {error}", base.display())),
                }
            }
        }
        if why.is_empty() { Err("no cgroup2 is mounted".to_owned()) } else { Err(why.join("; ")) }
    }

    fn below(base: &Path) -> io::Result<Self> {
        let controllers = fs::read_to_string(base.join("cgroup.controllers"))?;
        let has = |name: &str| controllers.split_ascii_whitespace().any(|controller| controller == name);
        if let Some(missing) = NEEDED.iter().find(|name| !has(name)) {
            return Err(io::Error::other(format!("there is no controller {missing}")));
        }
        let mut enable: String = NEEDED.iter().map(|name| format!("+{name} ")).collect();
        if has(WANTED) {
            enable += &format!("+{WANTED}");
        }
        let dir = base.join(OURS);
        // The controllers first: where that is refused, nothing is left behind.
        set(base, "cgroup.subtree_control", enable.trim_end())?;
        match fs::create_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        set(&dir, "cgroup.subtree_control", enable.trim_end())?;
        Ok(Self { dir, has_cpu: has(WANTED) })
    }

    /// Where they are, for people.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the cgroup of the process that is about to be started in this directory.
    pub fn create(&self, process_dir: &Path, ceiling: Ceiling) -> io::Result<PathBuf> {
        let name = process_dir.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let cgroup = self.dir.join(name);
        // Before there is something to be forgotten.
        symlink(&cgroup, process_dir.join(LINK))?;
        fs::create_dir(&cgroup)?;
        set(&cgroup, "memory.max", &ceiling.memory_bytes.to_string())?;
        set_if_there(&cgroup, "memory.swap.max", "0")?;
        // The VMM is two processes, of which neither is of use without the other.
        set_if_there(&cgroup, "memory.oom.group", "1")?;
        set(&cgroup, "pids.max", &ceiling.tasks.to_string())?;
        if self.has_cpu {
            set(&cgroup, "cpu.max", &format!("{} {PERIOD_US}", u64::from(ceiling.cpus) * PERIOD_US))?;
        }
        Ok(cgroup)
    }
}

/// Puts a process, with what it will start, into a cgroup.
pub fn join(cgroup: &Path, pid: i32) -> io::Result<()> {
    set(cgroup, "cgroup.procs", &pid.to_string())
}

/// The cgroup of the process with this directory, if it has one.
pub fn of(process_dir: &Path) -> Option<PathBuf> {
    fs::read_link(process_dir.join(LINK)).ok()
}

/// Removes the directory of a process that has ended or been killed, and its cgroup before. Where the kernel is not done with
/// the process yet, this goes on in the background; a node that ends meanwhile finds both again at its next start.
pub fn remove_process_dir(process_dir: &Path) {
    let Some(cgroup) = of(process_dir) else { return remove_dir(process_dir) };
    // Nothing may live on in it. Kernels before 5.14 do not have the file, and nothing should be left anyway.
    let _ = set_if_there(&cgroup, "cgroup.kill", "1");
    if !remove(&cgroup) {
        let process_dir = process_dir.to_owned();
        // Ends by itself, at the limit at the latest.
        std::thread::spawn(move || {
            let deadline = Instant::now() + GONE_LIMIT;
            while !remove(&cgroup) {
                if Instant::now() >= deadline {
                    tracing::warn!(cgroup = %cgroup.display(), "the cgroup of an ended VMM process cannot be removed; the next start tries again");
                    return;
                }
                std::thread::sleep(LOOK_EVERY);
            }
            remove_dir(&process_dir);
        });
        return;
    }
    remove_dir(process_dir);
}

fn remove_dir(process_dir: &Path) {
    match fs::remove_dir_all(process_dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(dir = %process_dir.display(), %error, "the directory of an ended VMM process cannot be removed");
        }
        _ => {}
    }
}

/// Whether it is gone.
fn remove(cgroup: &Path) -> bool {
    match fs::remove_dir(cgroup) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// The place of a line of `/proc/self/mounts`, if that is a cgroup2.
fn mount_of_version_2(line: &str) -> Option<PathBuf> {
    let mut fields = line.split(' ').skip(1);
    let (place, kind) = (fields.next()?, fields.next()?);
    // Blanks and the like are written as three octal digits.
    let blank = place.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\");
    (kind == "cgroup2").then(|| PathBuf::from(blank))
}

fn set(cgroup: &Path, file: &str, value: &str) -> io::Result<()> {
    let path = cgroup.join(file);
    fs::write(&path, value).map_err(|error| io::Error::new(error.kind(), format!("writing {value:?} to {}: {error}", path.display())))
}

fn set_if_there(cgroup: &Path, file: &str, value: &str) -> io::Result<()> {
    if cgroup.join(file).exists() { set(cgroup, file, value) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plain files where the kernel has its own: what is written can be read again.
    fn tree(controllers: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (dir, controllers) in controllers {
            fs::create_dir_all(root.path().join(dir)).unwrap();
            fs::write(root.path().join(dir).join("cgroup.controllers"), controllers).unwrap();
        }
        root
    }

    fn find(root: &Path, own: &str) -> Result<Cgroups, String> {
        let root = root.display().to_string().replace(' ', "\\040");
        Cgroups::find_in(&format!("tmpfs /run tmpfs rw 0 0\ncgroup /nowhere cgroup rw,memory 0 0\ncgroup2 {root} cgroup2 rw,relatime 0 0\n"), own)
    }

    fn read(path: impl AsRef<Path>) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn it_is_made_below_the_nodes_own_with_all_limits() {
        let root = tree(&[("", "memory pids"), ("node service", "cpuset cpu memory pids\n")]);
        let cgroups = find(root.path(), "3:memory:/elsewhere\n0::/node service\n").unwrap();
        let base = root.path().join("node service");
        assert_eq!(cgroups.dir(), base.join("dormouse"));
        for dir in [&base, &base.join("dormouse")] {
            assert_eq!(read(dir.join("cgroup.subtree_control")), "+memory +pids +cpu");
        }
        // A second engine, or the next start, finds it there.
        assert_eq!(find(root.path(), "0::/node service").unwrap().dir(), cgroups.dir());

        let process = tempfile::tempdir().unwrap();
        let cgroup = cgroups.create(process.path(), Ceiling { memory_bytes: 123 << 20, tasks: 40, cpus: 3 }).unwrap();
        assert_eq!(cgroup, cgroups.dir().join(process.path().file_name().unwrap()));
        assert_eq!(of(process.path()), Some(cgroup.clone()));
        for (file, value) in [("memory.max", "128974848"), ("pids.max", "40"), ("cpu.max", "300000 100000")] {
            assert_eq!(read(cgroup.join(file)), value);
        }
        assert!(!cgroup.join("memory.swap.max").exists());
        join(&cgroup, 17).unwrap();
        assert_eq!(read(cgroup.join("cgroup.procs")), "17");
    }

    #[test]
    fn where_the_nodes_own_has_no_controllers_it_is_made_below_the_root() {
        let root = tree(&[("", "memory pids"), ("node", "pids")]);
        let cgroups = find(root.path(), "0::/node").unwrap();
        assert_eq!(cgroups.dir(), root.path().join("dormouse"));
        let process = tempfile::tempdir().unwrap();
        let cgroup = cgroups.create(process.path(), Ceiling { memory_bytes: 1, tasks: 1, cpus: 1 }).unwrap();
        assert!(!cgroup.join("cpu.max").exists());
    }

    #[test]
    fn a_path_out_of_the_namespace_is_not_followed() {
        let root = tree(&[("", "memory pids"), ("a", "")]);
        assert_eq!(find(&root.path().join("a"), "0::/../").unwrap_err(), format!("{}/a: there is no controller memory", root.path().display()));
    }

    #[test]
    fn why_there_are_no_limits_is_said() {
        assert_eq!(Cgroups::find_in("proc /proc proc rw 0 0\n", "0::/\n").unwrap_err(), "no cgroup2 is mounted");
        let root = tree(&[("", "")]);
        assert!(find(root.path(), "0::/").unwrap_err().ends_with(": there is no controller memory"));
        assert!(!root.path().join("dormouse").exists());
        assert!(find(&root.path().join("nothing"), "0::/").unwrap_err().contains("No such file"));
    }

    #[test]
    fn a_directory_goes_with_its_cgroup_and_stays_while_that_does() {
        let root = tree(&[("", "memory pids")]);
        let cgroup = root.path().join("one");
        let process = root.path().join("process");
        for dir in [&cgroup, &process] {
            fs::create_dir(dir).unwrap();
        }
        symlink(&cgroup, process.join(LINK)).unwrap();
        // As long as something is in it, it cannot be removed.
        let busy = cgroup.join("busy");
        fs::write(&busy, "").unwrap();
        remove_process_dir(&process);
        assert!(process.exists() && cgroup.exists());
        fs::remove_file(busy).unwrap();
        let deadline = Instant::now() + GONE_LIMIT;
        while process.exists() {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        assert!(!cgroup.exists());
        remove_process_dir(&process);
    }
}
