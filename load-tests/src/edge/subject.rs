//! What is measured: starting it on its core, its addresses, its CPU time and its memory.

use std::{
    fmt::Write as _,
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{gateway_node, load::Load};

/// The subjects' core, and that of the upstream and the load.
pub const SUBJECT_CORE: &str = "1";
pub const LOAD_CORE: &str = "0";
/// USER_HZ is 100 in the kernel's interface, whatever its own tick is.
const TICK_MICROS: u64 = 10_000;
/// Nothing here takes longer to start, but for callgrind.
const START: Duration = Duration::from_secs(60);

/// One of the programs compared.
pub enum Kind {
    Nginx,
    Haproxy,
    /// A gateway: which build of this program holds it.
    Gateway { name: String, program: PathBuf },
}

impl Kind {
    pub fn name(&self) -> &str {
        match self {
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Gateway { name, .. } => name,
        }
    }
}

/// Certificate, upstream and directory of one run.
pub struct Bench {
    dir: PathBuf,
    log: bool,
    /// Answers everything with two bytes.
    pub upstream: SocketAddr,
    /// Takes WebSockets and stays silent.
    pub websockets: SocketAddr,
    _upstream: Running,
}

/// A process that ends with its value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // nginx's worker would outlive a master that is killed.
        let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), rustix::process::Signal::TERM);
        let _ = self.0.wait();
    }
}

/// A subject that runs.
pub struct Subject {
    pub name: String,
    pub address: SocketAddr,
    /// Host field of a request.
    pub host: String,
    /// Token of a request, for the gateway.
    pub token: Option<String>,
    /// Its certificate, which clients trust.
    pub certificate: PathBuf,
    dir: PathBuf,
    process: Running,
}

fn free_port() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("finding a free port")?;
    Ok(listener.local_addr()?)
}

fn pinned(core: &str) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", core]);
    command
}

fn spawn(command: &mut Command, log: &Path) -> Result<Running> {
    let log = fs::File::create(log).with_context(|| format!("creating {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let program = command.get_args().last().unwrap_or_default().to_owned();
    let child = command.spawn().with_context(|| format!("starting {program:?} (Debian packages: nginx-light haproxy wrk nghttp2-client util-linux valgrind)"))?;
    Ok(Running(child))
}

fn wait_for(what: &str, log: &Path, so: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + START;
    while !so() {
        if Instant::now() > deadline {
            bail!("{what} did not start within {START:?}; it said: {}", fs::read_to_string(log).unwrap_or_default());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

impl Bench {
    /// Makes the certificate and starts the upstreams.
    pub fn new(dir: &Path, log: bool) -> Result<Self> {
        let key = rcgen::KeyPair::generate().context("making a P-256 key")?;
        let certificate = rcgen::CertificateParams::new(vec![format!("*.{}", gateway_node::SUFFIX)])?.self_signed(&key)?;
        fs::write(dir.join("cert.pem"), certificate.pem())?;
        fs::write(dir.join("key.pem"), key.serialize_pem())?;
        fs::write(dir.join("both.pem"), certificate.pem() + &key.serialize_pem())?;
        let upstream = free_port()?;
        let own = dir.join("upstream");
        fs::create_dir(&own)?;
        let body = format!("server {{ listen {upstream} backlog=4096; location / {{ default_type text/plain; return 200 ok; }} }}");
        fs::write(own.join("nginx.conf"), nginx(&own, &body, "off"))?;
        let said = own.join("said");
        let process = spawn(pinned(LOAD_CORE).arg("nginx").arg("-e").arg(own.join("error.log")).arg("-c").arg(own.join("nginx.conf")), &said)?;
        wait_for("the upstream", &said, || TcpStream::connect(upstream).is_ok())?;
        Ok(Self { dir: dir.to_owned(), log, upstream, websockets: crate::idle::silent_websockets()?, _upstream: process })
    }

    /// Starts a subject.
    pub fn start(&self, kind: &Kind) -> Result<Subject> {
        self.start_by(kind, pinned(SUBJECT_CORE))
    }

    /// Starts it under callgrind, which counts nothing yet.
    pub fn start_under_callgrind(&self, kind: &Kind) -> Result<Subject> {
        let mut command = pinned(SUBJECT_CORE);
        command.args(["valgrind", "--tool=callgrind", "--instr-atstart=no", "--dump-instr=no"]).arg(format!("--callgrind-out-file={}", self.dir.join("callgrind.out").display()));
        self.start_by(kind, command)
    }

    fn start_by(&self, kind: &Kind, mut command: Command) -> Result<Subject> {
        let dir = tempfile::tempdir_in(&self.dir)?.keep();
        let said = dir.join("said");
        let access_log = if self.log { dir.join("access.log").display().to_string() } else { "off".to_owned() };
        let address = free_port()?;
        let (mut host, mut token) = (format!("a.{}", gateway_node::SUFFIX), None);
        let process = match kind {
            Kind::Nginx => {
                fs::write(dir.join("nginx.conf"), self.nginx_proxy(&dir, address, &access_log))?;
                spawn(command.args(["nginx", "-e"]).arg(dir.join("error.log")).arg("-c").arg(dir.join("nginx.conf")), &said)?
            }
            Kind::Haproxy => {
                fs::write(dir.join("haproxy.cfg"), self.haproxy(address))?;
                spawn(command.args(["haproxy", "-db", "-f"]).arg(dir.join("haproxy.cfg")), &said)?
            }
            Kind::Gateway { program, .. } => {
                let settings = serde_json::json!({ "listen": address, "upstream": self.upstream, "websockets": self.websockets, "cert": self.dir.join("cert.pem"), "key": self.dir.join("key.pem") });
                fs::write(dir.join(gateway_node::SETTINGS), settings.to_string())?;
                let process = spawn(command.arg(program).arg("--gateway").arg(&dir), &said)?;
                let ready = dir.join(gateway_node::READY);
                wait_for(kind.name(), &said, || ready.exists())?;
                let said: serde_json::Value = serde_json::from_str(&fs::read_to_string(ready)?)?;
                host = said["host"].as_str().context("no host")?.to_owned();
                token = Some(said["token"].as_str().context("no token")?.to_owned());
                process
            }
        };
        wait_for(kind.name(), &said, || TcpStream::connect(address).is_ok())?;
        Ok(Subject { name: kind.name().to_owned(), address, host, token, certificate: self.dir.join("cert.pem"), dir, process })
    }

    fn nginx_proxy(&self, dir: &Path, address: SocketAddr, access_log: &str) -> String {
        let mut body = String::new();
        let own = self.dir.display();
        let _ = write!(
            body,
            "upstream app {{ server {}; keepalive 128; keepalive_requests 1000000000; keepalive_timeout 600s; }}
             upstream websockets {{ server {}; }}
             server {{
               listen {address} ssl http2 backlog=4096;
               ssl_certificate {own}/cert.pem; ssl_certificate_key {own}/key.pem; ssl_protocols TLSv1.2 TLSv1.3;
               location / {{ proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header Host $host; }}
               location /websocket {{ proxy_pass http://websockets; proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade; proxy_read_timeout 600s; }}
             }}",
            self.upstream, self.websockets
        );
        nginx(dir, &body, access_log)
    }

    fn haproxy(&self, address: SocketAddr) -> String {
        format!(
            "global\n  nbthread 1\n  maxconn 4000\n  {}\ndefaults\n  mode http\n  {}\n  timeout connect 5s\n  timeout client 600s\n  timeout server 600s\n  timeout tunnel 600s\n  http-reuse always\n\
             frontend edge\n  bind {address} ssl crt {}/both.pem alpn h2,http/1.1 ssl-min-ver TLSv1.2\n  use_backend websockets if {{ path_beg /websocket }}\n  default_backend app\n\
             backend app\n  server app {}\nbackend websockets\n  server websockets {}\n",
            if self.log { "log stdout format raw local0" } else { "" },
            if self.log { "log global\n  option httplog" } else { "" },
            self.dir.display(),
            self.upstream,
            self.websockets
        )
    }
}

fn nginx(dir: &Path, body: &str, access_log: &str) -> String {
    let dir = dir.display();
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    format!(
        "{user} worker_processes 1; daemon off; pid {dir}/pid; error_log {dir}/error.log crit; worker_rlimit_nofile 20000; events {{ worker_connections 9000; }}
         http {{ access_log {access_log}; keepalive_requests 1000000000; keepalive_timeout 600s;
         client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3; uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;
         {body} }}\n"
    )
}

impl Subject {
    fn processes(&self) -> Vec<u32> {
        let own = self.process.0.id();
        let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
        std::iter::once(own).chain(children.split_whitespace().filter_map(|child| child.parse().ok())).collect()
    }

    /// CPU time of all its processes so far, in user space and kernel.
    pub fn cpu_micros(&self) -> Result<u64> {
        let mut ticks = 0;
        for process in self.processes() {
            let stat = fs::read_to_string(format!("/proc/{process}/stat")).with_context(|| format!("{} has ended", self.name))?;
            // The second field is a name in parentheses; utime and stime are fields 14 and 15 (proc(5)).
            let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
            for field in [11, 12] {
                ticks += fields.get(field).and_then(|ticks| ticks.parse::<u64>().ok()).context("reading /proc/<pid>/stat")?;
            }
        }
        Ok(ticks * TICK_MICROS)
    }

    /// Its share of memory.
    pub fn pss_kib(&self) -> Result<u64> {
        let mut sum = 0;
        for process in self.processes() {
            let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).with_context(|| format!("reading the memory of {}", self.name))?;
            let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss in smaps_rollup")?;
            sum += line.trim().trim_end_matches("kB").trim().parse::<u64>()?;
        }
        Ok(sum)
    }

    /// Instructions in user space for each request.
    pub fn instructions(self, bench: &Bench, load: &Load, requests: u64) -> Result<f64> {
        load.run_count(&self, requests / 4)?;
        let pid = self.processes().last().context("no process")?.to_string();
        let control = |argument: &str| -> Result<()> {
            let said = Command::new("callgrind_control").args([argument, "on", &pid]).output().context("running callgrind_control")?;
            anyhow::ensure!(said.status.success(), "callgrind_control {argument} on {pid}: {}", String::from_utf8_lossy(&said.stderr));
            Ok(())
        };
        control("-i")?;
        load.run_count(&self, requests)?;
        let said = Command::new("callgrind_control").args(["-d", "counted", &pid]).output().context("running callgrind_control")?;
        anyhow::ensure!(said.status.success(), "callgrind_control -d {pid}: {}", String::from_utf8_lossy(&said.stderr));
        let mut total = 0_u64;
        for entry in fs::read_dir(&bench.dir)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("callgrind.out")) {
                let text = fs::read_to_string(&path)?;
                total += text.lines().find_map(|line| line.strip_prefix("totals: ")?.trim().parse::<u64>().ok()).unwrap_or(0);
                fs::rename(&path, format!("/tmp/edge-{}-{}.callgrind", self.name, load.name))?;
            }
        }
        let _ = &self.dir;
        Ok(total as f64 / requests as f64)
    }
}
