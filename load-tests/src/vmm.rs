//! `dormouse-vmm` by itself: real, jailed processes, spoken to through their control protocol as the node does.
//!
//! The guest is that of `tiny.rs`, so the figures are those of the VMM alone: no kernel, no agent, no app.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};
use vmm_protocol::control::{CONTROL_SOCKET, FromVmm, MemoryUse, Reply, Request, SaveKind, Saved, ToVmm, Usage, VERSION, receive, send};

use crate::{
    figures::{Figures, Phases, micros},
    tiny,
};

const SUBJECT: &str = "dormouse-vmm, tiny guest";
const MEMORY_BYTES: u64 = 512 << 20;
const DISK_BYTES: u64 = 1 << 30;
/// The part of the image's memory that holds data.
const FILLED_BYTES: u64 = 192 << 20;
const PAGE: u64 = 4096;
/// Far more than anything takes.
const LIMIT: Duration = Duration::from_secs(60);

/// A running process. Dropping it ends it.
struct Process {
    child: Child,
    dir: PathBuf,
    socket: OwnedFd,
    next: u64,
}

impl Process {
    fn start(program: &Path, dir: PathBuf) -> Result<Self> {
        fs::create_dir(&dir)?;
        let log = File::create(dir.join("log"))?;
        let mut command = Command::new(program);
        command.arg("--dir").arg(&dir).arg("--name").arg(format!("dormouse:{}", dir.display()));
        let mut child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn().context("starting dormouse-vmm")?;
        let address = SocketAddrUnix::new(dir.join(CONTROL_SOCKET))?;
        let deadline = Instant::now() + LIMIT;
        let socket = loop {
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
            if connect(&socket, &address).is_ok() {
                break socket;
            }
            ensure!(child.try_wait()?.is_none() && Instant::now() < deadline, "dormouse-vmm does not listen: {}", fs::read_to_string(dir.join("log"))?);
            std::thread::yield_now();
        };
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(LIMIT))?;
        Ok(Self { child, dir, socket, next: 1 })
    }

    fn ask(&mut self, request: Request, descriptors: &[BorrowedFd<'_>]) -> Result<Reply> {
        let (id, name) = (self.next, request.name());
        self.next += 1;
        send(&self.socket, &ToVmm { id, request }, descriptors)?;
        loop {
            match receive(&self.socket).with_context(|| format!("waiting for the answer to {name}"))? {
                (FromVmm::Reply { id: of, reply: Reply::Failed { why, .. } }, _) if of == id => bail!("{name}: {why}"),
                (FromVmm::Reply { id: of, reply }, _) if of == id => return Ok(reply),
                (FromVmm::Reply { .. }, _) => {}
                (FromVmm::Event(event), _) => bail!("during {name}: {event:?}"),
            }
        }
    }

    fn done(&mut self, request: Request, descriptors: &[BorrowedFd<'_>]) -> Result<Phases> {
        match self.ask(request, descriptors)? {
            Reply::Done { phases_us } => Ok(phases_us),
            other => bail!("an unexpected answer: {other:?}"),
        }
    }

    fn saved(&mut self, kind: SaveKind, descriptors: &[BorrowedFd<'_>]) -> Result<Saved> {
        match self.ask(Request::Save { kind }, descriptors)? {
            Reply::Saved(saved) => Ok(saved),
            other => bail!("an unexpected answer: {other:?}"),
        }
    }

    fn usage(&mut self) -> Result<Usage> {
        match self.ask(Request::Usage, &[])? {
            Reply::Usage(usage) => Ok(usage),
            other => bail!("an unexpected answer: {other:?}"),
        }
    }

    /// Waits until the guest has gone all through its memory, at least once from its start to its end.
    fn passed(&mut self) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.ask(Request::Console, &[])? {
                Reply::Console { text } if text.matches('.').count() >= 2 => return Ok(()),
                Reply::Console { .. } => ensure!(Instant::now() < deadline, "the guest does not come to an end"),
                other => bail!("an unexpected answer: {other:?}"),
            }
        }
    }

    /// This process and the jailed one that it waits for.
    fn pids(&self) -> Result<[u32; 2]> {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        Ok([pid, children.split_ascii_whitespace().next().context("it has no child")?.parse()?])
    }

    fn quit(mut self) -> Result<()> {
        // The answer may not arrive.
        let _ = self.ask(Request::Quit, &[]);
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A sleeping microVM.
struct Snapshot {
    state: PathBuf,
    memory: PathBuf,
    layer: [PathBuf; 2],
}

/// One image, and what is made of it.
pub struct Bench {
    program: PathBuf,
    dir: PathBuf,
    names: std::cell::Cell<u64>,
}

/// How a suspend went.
struct Slept {
    snapshot: Snapshot,
    phases: Phases,
    total_us: u64,
    dirty_mib: f64,
}

fn kvm() -> Result<File> {
    File::options().read(true).write(true).open("/dev/kvm").context("opening /dev/kvm")
}

fn fresh(path: &Path) -> Result<File> {
    File::options().read(true).write(true).create_new(true).open(path).with_context(|| format!("creating {}", path.display()))
}

/// Lines of a `/proc` file that say KiB, summed up by their key.
fn kib(text: &str, key: &str) -> u64 {
    text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix(':')?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).sum()
}

impl Bench {
    /// Boots the guest and makes an image of it.
    pub fn new(program: &Path, work_dir: &Path) -> Result<Self> {
        let dir = work_dir.join("vmm");
        fs::create_dir(&dir)?;
        let bench = Self { program: program.to_owned(), dir, names: std::cell::Cell::new(0) };
        fresh(&bench.path("memory"))?.set_len(MEMORY_BYTES)?;
        fresh(&bench.path("disk"))?.set_len(DISK_BYTES)?;
        let mut process = bench.prepared(MemoryUse::Shared)?;
        fs::write(bench.path("kernel"), tiny::guest())?;
        fs::write(bench.path("initramfs"), b"nothing")?;
        let (kernel, initramfs, disk) = (File::open(bench.path("kernel"))?, File::open(bench.path("initramfs"))?, File::options().read(true).write(true).open(bench.path("disk"))?);
        process.done(Request::Boot { cmdline: String::new() }, &[kernel.as_fd(), initramfs.as_fd(), disk.as_fd()])?;
        process.passed()?;
        process.done(Request::Pause, &[])?;
        process.saved(SaveKind::Image, &[fresh(&bench.path("state"))?.as_fd()])?;
        process.quit()?;
        // The memory of a real guest is not empty.
        let memory = File::options().write(true).open(bench.path("memory"))?;
        let mut page = 1_u64;
        for at in (tiny::REGION..FILLED_BYTES).step_by(1 << 20) {
            let bytes: Vec<u8> = std::iter::repeat_with(|| {
                page = page.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
                page.to_le_bytes()
            })
            .take(1 << 17)
            .flatten()
            .collect();
            memory.write_all_at(&bytes, at)?;
        }
        memory.sync_all()?;
        Ok(bench)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn name(&self, what: &str) -> PathBuf {
        self.names.set(self.names.get() + 1);
        self.path(&format!("{what}-{}", self.names.get()))
    }

    /// A process as the pool keeps it: jailed, with a machine and without a guest.
    fn prepared(&self, memory_use: MemoryUse) -> Result<Process> {
        let mut process = Process::start(&self.program, self.name("process"))?;
        let memory = File::options().read(true).write(memory_use == MemoryUse::Shared).open(self.path("memory"))?;
        let request = Request::Prepare { version: VERSION, vcpus: 1, memory_bytes: MEMORY_BYTES, memory: memory_use, disk_bytes: DISK_BYTES, net: None };
        process.done(request, &[kvm()?.as_fd(), memory.as_fd()])?;
        Ok(process)
    }

    /// Tells guests to come what to dirty. They see it when they read the page: it is in the file that all of them map.
    fn order(&self, pages: u64, apart: u64) -> Result<()> {
        let memory = File::options().write(true).open(self.path("memory"))?;
        let orders: Vec<u8> = [pages as u32, (apart * PAGE) as u32].into_iter().flat_map(u32::to_le_bytes).collect();
        Ok(memory.write_all_at(&orders, tiny::ORDERS)?)
    }

    /// Restores and runs; answers the phases and the whole time, from the first request to the last answer.
    fn restore(&self, process: &mut Process, from: Option<&Snapshot>) -> Result<(Phases, u64, PathBuf)> {
        let began = Instant::now();
        let state = File::open(from.map_or_else(|| self.path("state"), |from| from.state.clone()))?;
        let difference = from.map(|from| File::open(&from.memory)).transpose()?;
        let layer = from.map(|from| anyhow::Ok([File::open(&from.layer[0])?, File::open(&from.layer[1])?])).transpose()?;
        let top_path = self.name("layer");
        let (base, top) = (File::open(self.path("disk"))?, fresh(&top_path)?);
        let mut descriptors = vec![state.as_fd()];
        descriptors.extend(difference.as_ref().map(AsFd::as_fd));
        descriptors.push(base.as_fd());
        descriptors.extend(layer.iter().flatten().map(AsFd::as_fd));
        descriptors.push(top.as_fd());
        let opened = Instant::now();
        let request = Request::Restore { difference: difference.is_some(), sealed_layers: u32::from(layer.is_some()), streams: Vec::new() };
        let mut phases = vec![("open files".to_owned(), micros(opened - began))];
        let within = process.done(request, &descriptors)?;
        let restored = Instant::now();
        let inside: u64 = within.iter().map(|(_, us)| *us).sum();
        phases.extend(within);
        phases.push(("messages".to_owned(), micros(restored - opened).saturating_sub(inside)));
        process.done(Request::Run, &[])?;
        phases.push(("run".to_owned(), micros(restored.elapsed())));
        Ok((phases, micros(began.elapsed()), top_path))
    }

    /// A clone that has dirtied what it was told to is suspended.
    fn sleep(&self, mut process: Process, top: PathBuf) -> Result<Slept> {
        let snapshot = Snapshot { state: self.name("state"), memory: self.name("difference"), layer: [top, self.name("map")] };
        let (state, memory, map) = (fresh(&snapshot.state)?, fresh(&snapshot.memory)?, fresh(&snapshot.layer[1])?);
        let image = File::open(self.path("memory"))?;
        let began = Instant::now();
        process.done(Request::Pause, &[])?;
        let paused = Instant::now();
        let saved = process.saved(SaveKind::Difference { merge_layers: false }, &[state.as_fd(), memory.as_fd(), image.as_fd(), map.as_fd()])?;
        let total_us = micros(began.elapsed());
        let mut phases = vec![("pause".to_owned(), micros(paused - began))];
        phases.extend(saved.phases_us);
        let dirty_mib = saved.memory.map_or(0.0, |memory| (memory.data_pages * PAGE) as f64 / f64::from(1 << 20));
        process.quit()?;
        Ok(Slept { snapshot, phases, total_us, dirty_mib })
    }

    fn slept(&self, pages: u64, apart: u64) -> Result<Slept> {
        self.order(pages, apart)?;
        let mut process = self.prepared(MemoryUse::Private)?;
        let (_, _, top) = self.restore(&mut process, None)?;
        process.passed()?;
        self.sleep(process, top)
    }

    fn remove(&self, snapshot: Snapshot) {
        let [data, map] = snapshot.layer;
        for path in [snapshot.state, snapshot.memory, data, map] {
            let _ = fs::remove_file(path);
        }
    }

    /// Restores of three kinds.
    pub fn restores(&self, figures: &mut Figures, rounds: usize) -> Result<()> {
        figures.note(format!(
            "`{SUBJECT}`: a guest of two dozen instructions, 512 MiB and one vCPU; jailed processes that have answered Prepare wait; from opening the files \
             and sending Restore to the answer of Run, before which the vCPU was set going."
        ));
        for (what, pages, apart) in [("clone of the image", 0, 1), ("with 30 MiB in one run", 30 * 256, 1), ("with 30 MiB, every second page", 30 * 256, 2)] {
            let slept = if pages == 0 { None } else { Some(self.slept(pages, apart)?) };
            // Guests of the restores to come have little to do.
            self.order(0, 1)?;
            for round in 0..=rounds {
                let mut process = self.prepared(MemoryUse::Private)?;
                let (phases, total_us, top) = self.restore(&mut process, slept.as_ref().map(|slept| &slept.snapshot))?;
                process.quit()?;
                let _ = fs::remove_file(top);
                // The first one warms the page cache.
                if round > 0 {
                    figures.round(SUBJECT, what, slept.as_ref().map(|slept| slept.dirty_mib), phases, total_us)?;
                }
            }
            if let Some(slept) = slept {
                self.remove(slept.snapshot);
            }
        }
        Ok(())
    }

    /// Suspends of several sizes. The stop window is all of it: from the request to pause to the answer that all is synced.
    pub fn suspends(&self, figures: &mut Figures, rounds: usize) -> Result<()> {
        figures.note(format!("`{SUBJECT}`, suspend: from sending Pause to the answer of Save, files synced; the guest stands still all that time."));
        for mib in [0, 1, 4, 16, 30, 64, 128] {
            for _ in 0..rounds {
                let slept = self.slept(mib * 256, 1)?;
                figures.round(SUBJECT, &format!("suspend {mib} MiB"), Some(slept.dirty_mib), slept.phases, slept.total_us)?;
                self.remove(slept.snapshot);
            }
        }
        Ok(())
    }

    /// Memory of processes that wait, and of clones that run.
    pub fn memory(&self, figures: &mut Figures, clones: usize) -> Result<()> {
        figures.note(format!(
            "`{SUBJECT}`, private memory: RssAnon of the two processes of one microVM; a clone's includes the pages that its guest has written. \
             `less the guest's` is without the anonymous pages in mappings of the memory file."
        ));
        self.order(0, 1)?;
        let mut awake = Vec::new();
        for _ in 0..clones {
            let mut process = self.prepared(MemoryUse::Private)?;
            self.look(figures, &process, "ready process (pool)")?;
            let (_, _, top) = self.restore(&mut process, None)?;
            process.passed()?;
            awake.push((process, top));
        }
        for (process, _) in &mut awake {
            self.look(figures, process, "awake clone, idle")?;
            figures.memory(SUBJECT, "awake clone, as Usage says", process.usage()?.private_bytes >> 10)?;
        }
        let mut profile = None;
        for (process, top) in awake {
            profile = Some(self.profile(&process)?);
            process.quit()?;
            fs::remove_file(top)?;
        }
        // And one that has just written 30 MiB out of.
        self.order(30 * 256, 1)?;
        let mut process = self.prepared(MemoryUse::Private)?;
        let (_, _, top) = self.restore(&mut process, None)?;
        process.passed()?;
        self.look(figures, &process, "awake clone, 30 MiB dirty")?;
        process.done(Request::Pause, &[])?;
        let paths = [self.name("state"), self.name("difference"), self.name("map")];
        let [state, memory, map] = [fresh(&paths[0])?, fresh(&paths[1])?, fresh(&paths[2])?];
        process.saved(SaveKind::Difference { merge_layers: false }, &[state.as_fd(), memory.as_fd(), File::open(self.path("memory"))?.as_fd(), map.as_fd()])?;
        self.look(figures, &process, "the same, after a save")?;
        let status = fs::read_to_string(format!("/proc/{}/status", process.pids()?[1]))?;
        figures.note(format!("most ever resident of that process (VmHWM): {} KiB, file pages of the guest included.", kib(&status, "VmHWM")));
        process.quit()?;
        fs::remove_file(top)?;
        for path in paths {
            fs::remove_file(path)?;
        }
        if let Some(profile) = profile {
            figures.note(format!("anonymous memory of an idle clone's jailed process by mapping: {profile}."));
        }
        Ok(())
    }

    fn look(&self, figures: &mut Figures, process: &Process, what: &str) -> Result<()> {
        let (mut anonymous, mut guest) = (0, 0);
        for pid in process.pids()? {
            anonymous += kib(&fs::read_to_string(format!("/proc/{pid}/status"))?, "RssAnon");
            guest += self.mappings(pid)?.into_iter().filter(|(name, _)| name == "guest memory").map(|(_, kib)| kib).sum::<u64>();
        }
        figures.memory(SUBJECT, what, anonymous)?;
        figures.memory(SUBJECT, &format!("{what}, less the guest's"), anonymous.saturating_sub(guest))
    }

    /// Names of mappings with their anonymous KiB.
    fn mappings(&self, pid: u32) -> Result<Vec<(String, u64)>> {
        let memory = self.path("memory").display().to_string();
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        let mut found: Vec<(String, u64)> = Vec::new();
        let mut name = String::new();
        for line in smaps.lines() {
            if let Some(rest) = line.strip_prefix("Anonymous:") {
                let kib: u64 = rest.trim().trim_end_matches(" kB").trim().parse()?;
                match found.iter_mut().find(|(known, _)| *known == name) {
                    Some((_, sum)) => *sum += kib,
                    None => found.push((name.clone(), kib)),
                }
            } else if line.split_once(' ').is_some_and(|(range, _)| range.contains('-') && !range.contains(':')) {
                // Address, rights, offset, device, inode, path.
                let path = line.split_ascii_whitespace().nth(5).unwrap_or("anonymous");
                // A jailed process sees another root, so the path may be shortened; the file's own name is enough.
                name = if path == memory || path.ends_with("/memory") { "guest memory".to_owned() } else { path.rsplit('/').next().unwrap_or(path).to_owned() };
            }
        }
        Ok(found)
    }

    fn profile(&self, process: &Process) -> Result<String> {
        let mut mappings = self.mappings(process.pids()?[1])?;
        mappings.retain(|(_, kib)| *kib > 0);
        mappings.sort_by_key(|(_, kib)| std::cmp::Reverse(*kib));
        Ok(mappings.into_iter().map(|(name, kib)| format!("{name} {kib} KiB")).collect::<Vec<_>>().join(", "))
    }
}
