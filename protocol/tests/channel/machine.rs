//! A guest in this process: the real guest end of the channel on an in-memory transport, with an app made of closures.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use model::{Door, Generation, Port};
use parking_lot::Mutex;
use protocol::{
    agent::{Reply, Request, Restored},
    guest::{Guest, GuestEnd, Listens},
    link::{AgentLink, Attach, LinkError},
};
use tokio::{
    io::{DuplexStream, duplex},
    sync::mpsc,
    task::JoinHandle,
};

/// A ceiling for everything; nothing here takes a tenth of it.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Nobody listens here.
pub const CLOSED: u16 = 1;
/// Sends back what it gets, and ends when its peer does.
pub const ECHO: u16 = 7;
/// Answers a connection never.
pub const SILENT: u16 = 9;
/// Hands its end to the test.
pub const APP: u16 = 8080;

pub fn port(number: u16) -> Port {
    Port::new(number).expect("a test names real ports")
}

pub struct TestGuest {
    pub said: Mutex<Vec<&'static str>>,
    pub frozen: AtomicBool,
    /// Freezing never ends.
    pub freeze_hangs: AtomicBool,
    pub freeze_fails: AtomicBool,
    pub resets: AtomicU64,
    pub has_shell: AtomicBool,
    /// What is known of every app.
    pub listens: Mutex<Listens>,
    /// Apps refuse what they are given.
    pub refuses: AtomicBool,
    accepted: mpsc::UnboundedSender<DuplexStream>,
}

impl Guest for TestGuest {
    type Conn = DuplexStream;

    async fn connect(&self, door: Door) -> io::Result<DuplexStream> {
        let (near, mut far) = duplex(10_000);
        let Door::Port(port) = door else {
            let has_shell = self.has_shell.load(Ordering::SeqCst);
            if has_shell {
                self.accepted.send(far).expect("the test holds the receiver");
            }
            return if has_shell { Ok(near) } else { Err(io::ErrorKind::NotFound.into()) };
        };
        match port.get() {
            CLOSED => return Err(io::ErrorKind::ConnectionRefused.into()),
            SILENT => std::future::pending().await,
            ECHO => {
                tokio::spawn(async move {
                    let (mut read, mut write) = tokio::io::split(&mut far);
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = tokio::io::AsyncWriteExt::shutdown(&mut write).await;
                });
            }
            _ => self.accepted.send(far).expect("the test holds the receiver"),
        }
        Ok(near)
    }

    fn listens(&self, _connection: &DuplexStream) -> Listens {
        *self.listens.lock()
    }

    fn has_refused(&self, _connection: &DuplexStream, _before: u64) -> io::Result<bool> {
        Ok(self.refuses.load(Ordering::SeqCst))
    }

    fn reset(&self, _connection: DuplexStream) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }

    async fn request(&self, request: Request) -> Reply {
        match request {
            Request::Stats => Reply::Stats { streams: 0, realtime_ns: 1 },
            Request::Role(_) => Reply::Done,
            Request::AwaitReady { .. } => std::future::pending().await,
            Request::Start(spec) => Reply::Failed(format!("{} bytes of argv", spec.argv.concat().len())),
        }
    }

    async fn freeze(&self) -> Result<(), String> {
        self.said.lock().push("freeze");
        if self.freeze_hangs.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        if self.freeze_fails.load(Ordering::SeqCst) {
            return Err("the freezer is broken".to_owned());
        }
        self.frozen.store(true, Ordering::SeqCst);
        Ok(())
    }

    async fn thaw(&self) -> Result<(), String> {
        self.said.lock().push("thaw");
        self.frozen.store(false, Ordering::SeqCst);
        Ok(())
    }

    async fn restored(&self, _restored: &Restored) -> Result<(), String> {
        self.said.lock().push("restored");
        Ok(())
    }
}

/// A guest and its power cord.
pub struct Machine {
    pub end: GuestEnd,
    pub guest: Arc<TestGuest>,
    pub accepted: mpsc::UnboundedReceiver<DuplexStream>,
    run: Option<JoinHandle<io::Result<()>>>,
    buffer: usize,
}

impl Machine {
    pub fn new(buffer: usize) -> Self {
        let (sender, accepted) = mpsc::unbounded_channel();
        let guest = Arc::new(TestGuest {
            said: Mutex::default(),
            frozen: AtomicBool::new(false),
            freeze_hangs: AtomicBool::new(false),
            freeze_fails: AtomicBool::new(false),
            resets: AtomicU64::new(0),
            has_shell: AtomicBool::new(false),
            listens: Mutex::new(Listens::Yes),
            refuses: AtomicBool::new(false),
            accepted: sender,
        });
        Self { end: GuestEnd::new(), guest, accepted, run: None, buffer }
    }

    /// The host's end of a new transport. The old one, if any, ends first: what was in it is lost.
    pub async fn plug(&mut self) -> DuplexStream {
        if let Some(run) = self.run.take() {
            run.abort();
            let _ = run.await;
        }
        let (host, guest) = duplex(self.buffer);
        let (end, app) = (self.end.clone(), self.guest.clone());
        self.run = Some(tokio::spawn(async move { end.run(guest, app).await }));
        host
    }

    /// Streams go on at once.
    pub async fn attach(&mut self, link: &Arc<AgentLink>, how: Attach) -> Result<(), LinkError> {
        self.attach_holding(link, how).await?;
        link.release_streams();
        Ok(())
    }

    pub async fn attach_holding(&mut self, link: &Arc<AgentLink>, how: Attach) -> Result<(), LinkError> {
        let transport = self.plug().await;
        link.attach(transport, how, LIMIT).await
    }

    pub async fn accept(&mut self) -> DuplexStream {
        tokio::time::timeout(LIMIT, self.accepted.recv()).await.expect("the app is connected to").expect("the guest holds the sender")
    }
}

pub fn restored() -> Attach {
    Attach::Restored(Restored { realtime_ns: 1, entropy: "00".repeat(64), generation: Generation(1), identity: Default::default(), egress: Default::default(), role: None })
}

/// A link without interest in output.
pub fn link() -> Arc<AgentLink> {
    AgentLink::new(Box::new(|_| {}))
}

/// A machine that has booted, with its link.
pub async fn booted(buffer: usize) -> (Arc<AgentLink>, Machine) {
    let (link, mut machine) = (link(), Machine::new(buffer));
    machine.attach(&link, Attach::Boot).await.expect("the agent answers");
    (link, machine)
}

/// Bytes that differ from their neighbours and from other seeds'.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

/// A future that must end.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("{what}: not within {LIMIT:?}"))
}

/// A future that must not have ended once everything that can run has run.
pub async fn not_yet<T>(what: &str, future: impl Future<Output = T>) {
    let mut future = std::pin::pin!(future);
    for _ in 0..200 {
        assert!(futures::poll!(future.as_mut()).is_pending(), "{what}: it has ended");
        tokio::task::yield_now().await;
    }
}
