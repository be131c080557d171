//! The loopback engine keeps those promises of an engine that need no guest.

mod support;

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use vmm_runtime::{
    conformance::{self, Bench, ECHO, Guests, HTTP},
    engine::{AppSpec, Engine},
    loopback::LoopbackEngine,
};

struct LoopbackBench {
    engine: LoopbackEngine,
    dir: tempfile::TempDir,
}

#[async_trait]
impl Bench for LoopbackBench {
    async fn engine(&self) -> Arc<dyn Engine> {
        Arc::new(self.engine.clone())
    }

    fn work_dir(&self) -> &Path {
        self.dir.path()
    }

    async fn root_disk(&self, to: &Path) {
        std::fs::write(to, b"no disk").unwrap();
    }

    fn app(&self) -> AppSpec {
        AppSpec { argv: vec!["/app".into()], env: Vec::new(), workdir: "/".into(), user: String::new(), exposed: vec![HTTP], rights: Default::default() }
    }

    fn guests(&self) -> Guests {
        Guests::Shared
    }
}

/// The app on this host; ends with the test.
struct App(Child);

impl Drop for App {
    fn drop(&mut self) {
        self.0.kill().expect("it is our child");
        self.0.wait().expect("it is our child");
    }
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn await_listener(address: SocketAddr) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < deadline, "nobody listens on {address}");
        std::thread::yield_now();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_loopback_engine_conforms() {
    let bench = LoopbackBench { engine: LoopbackEngine::new(), dir: tempfile::tempdir().unwrap() };
    let (echo, http) = (free_address(), free_address());
    let program = support::guest_app(bench.dir.path());
    let child = Command::new(program).args([echo.port().to_string(), http.port().to_string()]).stdout(Stdio::null()).spawn().unwrap();
    let _app = App(child);
    await_listener(http);
    bench.engine.listen(ECHO, echo);
    bench.engine.listen(HTTP, http);
    conformance::run_all(&bench).await;
}
