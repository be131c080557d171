//! What the agent does for the host.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use model::{Capabilities, Door};
use protocol::{
    agent::{AppSpec, Reply, Request, Restored},
    guest::{Guest, GuestEnd, Listens},
};
use rustix::process::{Pid, WaitOptions, WaitStatus};
use tokio::{
    net::TcpStream,
    signal::unix::{SignalKind, signal},
    sync::Mutex,
    task::{JoinHandle, JoinSet},
};
use tokio_util::either::Either;

use crate::{
    app,
    cgroup::AppCgroup,
    egress::{Answerers, Egress, Reach},
    hangup,
    listeners,
    machine::{self, SetupError},
    pipe::Pipe,
    shell::{self, World},
};

/// How long the end of the app waits for the last of its output.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The agent. Lock order: `root` before `app`.
pub(crate) struct Agent {
    end: GuestEnd,
    cgroup: AppCgroup,
    shells: std::sync::Mutex<JoinSet<()>>,
    answerers: Answerers,
    egress: std::sync::Mutex<Option<Egress>>,
    /// Whether the root disk is the root, and one start at a time.
    root: Mutex<Root>,
    app: std::sync::Mutex<Running>,
}

#[derive(PartialEq, Eq)]
enum Root {
    Initramfs,
    Disk,
}

#[derive(Default)]
struct Running {
    pid: Option<Pid>,
    /// What it was started from.
    spec: Option<Arc<AppSpec>>,
    /// Ends with the app's output.
    output: Option<JoinHandle<()>>,
    /// Of a process that ended before its number was noted.
    ended: Option<(Pid, i32)>,
    ends: Option<JoinHandle<()>>,
}

impl Agent {
    pub fn new(end: GuestEnd) -> Result<Self, SetupError> {
        Ok(Self {
            end,
            cgroup: AppCgroup::create()?,
            shells: std::sync::Mutex::default(),
            answerers: Answerers { streams: Arc::default(), metadata: Arc::default() },
            egress: std::sync::Mutex::default(),
            root: Mutex::new(Root::Initramfs),
            app: std::sync::Mutex::default(),
        })
    }

    async fn start(&self, spec: &AppSpec) -> Result<(), String> {
        let mut root = self.root.lock().await;
        if self.running().pid.is_some() {
            return Err("the app has been started already".to_owned());
        }
        if *root == Root::Initramfs {
            if spec.rights.capabilities == Capabilities::All {
                machine::load_fuse().map_err(|error| error.to_string())?;
            }
            machine::switch_root().await.map_err(|error| error.to_string())?;
            *root = Root::Disk;
        }
        machine::furnish(spec.rights.egress).map_err(|error| error.to_string())?;
        self.lead_out(spec.rights.egress)?;
        let started = app::start(spec, &self.cgroup).await.map_err(|error| error.to_string())?;
        let output = tokio::spawn(app::forward_output(started.output, self.end.clone()));
        let mut running = self.running();
        running.pid = Some(started.pid);
        running.spec = Some(Arc::new(spec.clone()));
        running.output = Some(output);
        if let Some((pid, code)) = running.ended.take()
            && pid == started.pid
        {
            self.app_ended(&mut running, code);
        }
        Ok(())
    }

    /// Lets the app connect to what the host lets it, or to nothing but the metadata of its role.
    fn lead_out(&self, wanted: model::Egress) -> Result<(), String> {
        let mut egress = self.egress.lock().expect("nobody panics while holding it");
        let failed = |error: io::Error| format!("leading the app's connections out failed: {error}");
        let wanted = Reach::of(wanted, &self.answerers.metadata);
        if egress.as_ref().map(Egress::reach) == wanted {
            return Ok(());
        }
        if let Some(open) = egress.take() {
            open.close().map_err(failed)?;
        }
        *egress = wanted.map(|reach| Egress::open(reach, &self.answerers)).transpose().map_err(failed)?;
        Ok(())
    }

    /// A connection to a new shell beside the app.
    fn shell(&self) -> io::Result<Pipe> {
        let (app, spec) = {
            let running = self.running();
            running.pid.zip(running.spec.clone()).filter(|_| running.ends.is_none()).ok_or(io::ErrorKind::NotFound)?
        };
        let (connection, served) = shell::open(World::of(app, &self.cgroup, spec)?);
        let mut shells = self.shells.lock().expect("nobody panics while holding it");
        while shells.try_join_next().is_some() {}
        shells.spawn(served);
        Ok(connection)
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Running> {
        self.app.lock().expect("nobody panics while holding it")
    }

    /// Collects ended processes, as PID 1 must, and notices the app among them.
    pub fn reap(self: Arc<Self>) -> io::Result<JoinHandle<()>> {
        let mut ended = signal(SignalKind::child())?;
        Ok(tokio::spawn(async move {
            while ended.recv().await.is_some() {
                // One signal may stand for many ends.
                while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
                    self.ended(pid, exit_code(status));
                }
            }
        }))
    }

    fn ended(&self, pid: Pid, code: i32) {
        let mut running = self.running();
        match running.pid {
            Some(app) if app == pid => self.app_ended(&mut running, code),
            // `start` is between making the process and noting its number, or the process never became the app.
            None => running.ended = Some((pid, code)),
            Some(_) => {}
        }
    }

    fn app_ended(&self, running: &mut Running, code: i32) {
        crate::say!("the app ended with code {code}");
        let (output, end) = (running.output.take(), self.end.clone());
        running.ends = Some(tokio::spawn(async move {
            // The namespace died with its PID 1, so the pipe ends; what is in it is often why.
            let last_words = async {
                if let Some(output) = output {
                    let _ = output.await;
                }
                end.output_sent().await;
            };
            let _ = tokio::time::timeout(LAST_WORDS, last_words).await;
            end.app_exited(code);
        }));
    }
}

fn exit_code(status: WaitStatus) -> i32 {
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal)).unwrap_or(255)
}

impl Guest for Agent {
    type Conn = Either<TcpStream, Pipe>;

    async fn connect(&self, door: Door) -> io::Result<Self::Conn> {
        let port = match door {
            Door::Port(port) => port,
            Door::Shell => return self.shell().map(Either::Right),
            Door::Egress => return Ok(Either::Right(self.answerers.streams.add())),
        };
        let connect = |address: SocketAddr| TcpStream::connect(address);
        let stream = match connect((Ipv4Addr::LOCALHOST, port.get()).into()).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => connect((Ipv6Addr::LOCALHOST, port.get()).into()).await?,
            other => other?,
        };
        stream.set_nodelay(true)?;
        Ok(Either::Left(stream))
    }

    fn listens(&self, connection: &Self::Conn) -> Listens {
        match connection {
            Either::Left(connection) => hangup::listens(connection),
            Either::Right(_) => Listens::Yes,
        }
    }

    fn has_refused(&self, connection: &Self::Conn, before: u64) -> io::Result<bool> {
        match connection {
            Either::Left(connection) => hangup::has_refused(connection, before),
            Either::Right(_) => Ok(false),
        }
    }

    fn reset(&self, connection: Self::Conn) {
        // A pipe that is dropped unfinished is one that is reset.
        let Either::Left(connection) = connection else { return };
        // Without it the app would see an orderly end. It fails only on a socket that is gone, which is as good.
        let _ = connection.set_zero_linger();
    }

    async fn request(&self, request: Request) -> Reply {
        match request {
            Request::Start(spec) => match self.start(&spec).await {
                Ok(()) => Reply::Done,
                Err(why) => Reply::Failed(why),
            },
            Request::AwaitReady { exposed, limit_ms } => match listeners::ready(&exposed, Duration::from_millis(limit_ms)).await {
                Some(port) => Reply::Ready(port),
                None => Reply::NotReady,
            },
            Request::Role(role) => {
                self.answerers.metadata.set(Some(role));
                Reply::Done
            }
            Request::Stats => Reply::Stats { streams: self.end.streams() as u32, realtime_ns: machine::realtime_ns() },
        }
    }

    async fn freeze(&self) -> Result<(), String> {
        self.cgroup.freeze().await.map_err(|error| error.to_string())
    }

    async fn thaw(&self) -> Result<(), String> {
        self.cgroup.thaw().map_err(|error| error.to_string())
    }

    async fn restored(&self, restored: &Restored) -> Result<(), String> {
        machine::wake_up(restored).map_err(|error| error.to_string())?;
        self.answerers.metadata.set(restored.role.clone());
        self.lead_out(restored.egress)
    }
}
