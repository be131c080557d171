//! One typed, validated configuration: text in, [`Config`] or every problem with its key out.
//!
//! Owns: the settings, their defaults (which run on a laptop), their checks, and the generated `example.toml`. The only
//! crate that reads settings files or environment variables. Never opens a socket, never makes a directory.
#![forbid(unsafe_code)]

mod api;
mod problem;
mod reader;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

pub use api::{Api, ApiKey, ApiRates, KeyRole};
pub use problem::{ConfigError, Problem};
use ipnet::IpNet;
use model::{BuildNetwork, Prices, SizeSeen, SuspendHookFailure};
use reader::Reader;

/// Everything a node is told.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `[node]`
    pub node: Node,
    /// `[edge]`
    pub edge: Edge,
    /// `[api]`
    pub api: Api,
    /// `[admin]`
    pub admin: Admin,
    /// `[engine]`
    pub engine: Engine,
    /// `[guest]`
    pub guest: Guest,
    /// `[lifecycle]`
    pub lifecycle: Lifecycle,
    /// `[build]`
    pub build: Build,
    /// `[log]`
    pub log: Log,
    /// `[prices]`
    pub prices: Prices,
}

/// Where the node keeps its things and what it calls itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Everything that survives a restart.
    pub data_dir: PathBuf,
    /// Region in ARNs, signatures and the guest's AWS_REGION.
    pub region: String,
    /// Account in ARNs: 12 digits.
    pub account: String,
}

/// The gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edge {
    /// TLS listener.
    pub listen: SocketAddr,
    /// Endpoints are `<uuid>.<this>`.
    pub domain_suffix: String,
    /// The certificate chain it shows, PEM; `None`: one of the node's own authority.
    pub certificate: Option<PathBuf>,
    /// The key of `certificate`, PEM.
    pub private_key: Option<PathBuf>,
    /// What clients and guests may take. May be replaced while the node runs.
    pub limits: EdgeLimits,
}

/// What clients and guests may take of the gateway. The reason of each default stands with its key in [`Config::example`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeLimits {
    /// Client connections at a time. The limit of open files may allow fewer.
    pub max_connections: usize,
    /// Client connections at a time from one address (one /64 of IPv6).
    pub max_connections_per_address: usize,
    /// Streams at a time on a client's HTTP/2 connection. Takes effect at the start only.
    pub max_streams: u32,
    /// Bytes a client may send ahead of its guest on one HTTP/2 stream. Takes effect at the start only.
    pub stream_window: u32,
    /// The same for a whole HTTP/2 connection. Takes effect at the start only.
    pub connection_window: u32,
    /// From accept to the end of the TLS handshake.
    pub handshake_deadline: Duration,
    /// From the first byte of a request to the end of its header, and from the end of the TLS handshake to the end of
    /// the first header (HTTP/1.1) or of the preface (HTTP/2).
    pub header_deadline: Duration,
    /// How long a client's connection may idle between two requests.
    pub keepalive: Duration,
    /// How long a client may take for the next bytes of a request body.
    pub body_deadline: Duration,
    /// How long a client may refuse to take the next bytes of an answer.
    pub write_deadline: Duration,
    /// How long a client's host may leave what we send (keepalive probes included) without acknowledgement.
    pub vanished_deadline: Duration,
    /// How long a request waits for its microVM to wake.
    pub hold: Duration,
    /// Bytes that requests which wait for wakes may occupy, in all.
    pub max_held_bytes: u64,
    /// The same for the requests of one microVM.
    pub max_held_bytes_per_microvm: u64,
    /// How long a guest may take to accept a connection to a port.
    pub dial_deadline: Duration,
    /// How long a guest may take from the whole request header to the begin of its answer; `None`: for ever.
    pub first_byte_deadline: Option<Duration>,
    /// How long a guest that has not answered may take nothing of a request body; `None`: for ever.
    pub guest_body_deadline: Option<Duration>,
    /// How long a connection to a guest waits for its next request.
    pub upstream_keepalive: Duration,
    /// Bytes of a request header (names and values, the request line included).
    pub max_header_bytes: usize,
    /// Fields of a request header.
    pub max_header_fields: usize,
    /// Bytes of an answer's header that a guest may send.
    pub max_answer_header_bytes: usize,
    /// Bytes of a request body; `None`: any.
    pub max_body_bytes: Option<u64>,
    /// Tokens a second that are opened for one address (one /64 of IPv6); `None`: any.
    pub max_tokens_per_second: Option<u32>,
    /// Shells of one microVM at a time.
    pub max_shells_per_microvm: u64,
    /// How long running requests may go on after SIGTERM.
    pub grace: Duration,
}

/// Metrics and health.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// Plain HTTP listener.
    pub listen: SocketAddr,
}

/// Which engine, and how QEMU is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Engine {
    /// What was asked for.
    pub kind: EngineKind,
    /// Our own VMM, a static binary; `None`: beside the `dormouse` binary.
    pub vmm: Option<PathBuf>,
    /// The QEMU program: a path, or a name looked up in PATH.
    pub qemu: PathBuf,
    /// QEMU's accelerator.
    pub accelerator: Accelerator,
    /// Processes that wait ready for the next launch or wake.
    pub ready_processes: usize,
    /// Users and groups of VMM processes begin here, if the node is root: this plus the process's number.
    pub first_user: u32,
}

/// What runs microVMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// The best one that this host can run.
    Auto,
    /// Our own VMM on hardware virtualisation.
    Kvm,
    /// QEMU.
    Qemu,
}

/// QEMU's accelerator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Software emulation, everywhere.
    Tcg,
    /// Hardware virtualisation.
    Kvm,
}

/// What guests are made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// A Debian `linux-image-*-cloud-*` package, unpacked (`make setup`).
    pub kernel_dir: PathBuf,
    /// The guest agent, a static binary; `None`: beside the `dormouse` binary.
    pub agent: Option<PathBuf>,
    /// Base images and build caches, shared by all nodes of the host.
    pub base_dir: PathBuf,
    /// What guests see of their size.
    pub size_seen: SizeSeen,
    /// Private networks that guests with internet egress may connect to as well.
    pub egress_allow: Vec<IpNet>,
    /// Credentials of execution roles.
    pub roles: Option<PathBuf>,
    /// Whom guests ask for names; empty: the host's own name servers.
    pub name_servers: Vec<SocketAddr>,
}

/// The idle controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lifecycle {
    /// Launches and wakes at a time.
    pub max_concurrent_starts: usize,
    /// Requests that may wait for one microVM.
    pub max_waiting_per_microvm: usize,
    /// microVMs that are not terminated.
    pub max_microvms: usize,
    /// Baseline memory of microVMs that are not terminated, and of builds, together.
    pub max_memory_mib: u64,
    /// How long a terminated microVM stays readable.
    pub keep_terminated: Duration,
    /// The least maxIdleDurationSeconds that the API takes. AWS: 60.
    pub least_idle: Duration,
    /// What a `/suspend` hook that does not answer 200 means.
    pub suspend_hook_failure: SuspendHookFailure,
}

/// Image builds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Build {
    /// Builds at a time; more wait.
    pub max_concurrent: usize,
    /// Builds that run and wait together; one more is refused.
    pub max_unfinished: usize,
    /// Images of this node.
    pub max_images: usize,
    /// Versions of one image.
    pub max_versions: usize,
    /// How long the app has to listen on a port.
    pub ready_timeout: Duration,
    /// How long the container build has.
    pub timeout: Duration,
    /// Which network its RUN steps have.
    pub network: BuildNetwork,
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// A `tracing` filter such as `info` or `info,gateway=debug`.
    pub filter: String,
    /// JSON lines instead of text.
    pub json: bool,
    /// The file of the access log; `None`: standard error.
    pub access: Option<PathBuf>,
    /// What is kept of one microVM's output.
    pub microvm_bytes: u64,
}

impl Config {
    /// The defaults.
    pub fn defaults() -> Self {
        Self::parse("").expect("the empty text has no problem: every key has a default")
    }

    /// Reads a file; `None` means the defaults.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let Some(path) = path else { return Ok(Self::defaults()) };
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|problems| ConfigError::Problems { path: path.to_owned(), problems })
    }

    /// Reads a text and checks all of it.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        let mut reader = Reader::new(text)?;
        let config = Self::read(&mut reader);
        let problems = reader.finish();
        if problems.is_empty() { Ok(config) } else { Err(problems) }
    }

    /// A file with every key, its default and what it means.
    pub fn example() -> String {
        let mut reader = Reader::new("").expect("the empty text parses");
        Self::read(&mut reader);
        reader.example()
    }

    fn read(r: &mut Reader) -> Self {
        let cache = cache_dir();
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self {
            node: r.section("node", |s| Node {
                data_dir: s.path("data_dir", "./data", "Everything that survives a restart."),
                region: s.text("region", "us-east-1", "Region in ARNs, signatures and the guest's AWS_REGION.", |text| {
                    let fits = (1..=32).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
                    fits.then_some(()).ok_or("1–32 of a–z 0–9 -")
                }),
                account: s.text("account", "000000000000", "Account in ARNs.", |text| {
                    (text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit())).then_some(()).ok_or("12 digits")
                }),
            }),
            edge: r.section("edge", |s| Edge {
                listen: s.address("listen", local(8443), "Where clients connect (TLS, HTTP/1.1 and HTTP/2). Port 0 picks a free one."),
                domain_suffix: s.text("domain_suffix", "microvm.localhost", "Endpoints are <uuid>.<domain_suffix>.", domain),
                certificate: s.optional_path("certificate", "Certificate chain for *.<domain_suffix>, PEM, with private_key. Read again when it changes. Default: one of the node's own authority (ca.pem)."),
                private_key: s.optional_path("private_key", "The key of certificate, PEM."),
                limits: EdgeLimits {
                    max_connections: s.count("max_connections", 10_000, 1..=1_000_000, "Client connections at a time; more are told 503. At most 45 KiB of memory each while idle. Fewer if the limit of open files (RLIMIT_NOFILE, raised to its hard limit at the start) does not carry them."),
                    max_connections_per_address: s.count("max_connections_per_address", 2_500, 1..=1_000_000, "Client connections at a time from one address (one /64 of IPv6); more are told 503. A quarter of all, so that no one address can take every place."),
                    max_streams: s.count("max_streams", 100, 100..=1_000, "HTTP/2 streams at a time on one client connection; more are reset (REFUSED_STREAM). With max_header_bytes the bound on what a header bomb can make the gateway hold. Not below 100: clients open that many before they have read our settings. Read at the start only.") as u32,
                    stream_window: s.count("stream_window_bytes", 1 << 20, 65_535..=1 << 30, "What a client may send ahead of its guest on one HTTP/2 stream. AWS's 64 KiB throttles uploads; this carries 40 MB/s over 100 ms (with connection_window_bytes). Read at the start only.") as u32,
                    connection_window: s.count("connection_window_bytes", 1 << 22, 65_535..=1 << 30, "The same for one HTTP/2 connection: the bound on body bytes in memory for a connection whose guests read slowly. Read at the start only.") as u32,
                    handshake_deadline: s.seconds("handshake_deadline_secs", 10, 1..=600, "How long a TLS handshake may take; then the connection is closed. A lost packet is sent again after 1, 3 and 7 seconds: three losses in a row pass."),
                    header_deadline: s.seconds("header_deadline_secs", 30, 1..=600, "How long a client may take to send one request header (408) or, over HTTP/2, its preface. max_header_bytes take 20 seconds at 10 kbit/s."),
                    keepalive: s.seconds("keepalive_secs", 60, 1..=3_600, "How long a client's connection may idle between two requests; then it is closed. Longer than most clients keep theirs (Node.js 5, Go 90, browsers 60 to 300 seconds)."),
                    body_deadline: s.seconds("body_deadline_secs", 60, 1..=3_600, "How long a client may take for the next bytes of a request body (408). A stalled upload keeps its microVM awake."),
                    write_deadline: s.seconds("write_deadline_secs", 60, 1..=3_600, "How long a client may refuse to take the next bytes of an answer; then the connection is closed. A client that does not read keeps buffers of its guest full."),
                    vanished_deadline: s.seconds("vanished_deadline_secs", 120, 4..=3_600, "How long a client's host may acknowledge nothing (TCP keepalive and TCP_USER_TIMEOUT) before its connection is dropped, so that silent WebSockets and event streams of vanished clients do not stay for ever. Longer than a phone takes to change networks."),
                    hold: s.seconds("hold_secs", 60, 1..=3_600, "How long a request waits for a microVM to wake (502). Clients and proxies commonly give up after 60 seconds."),
                    max_held_bytes: s.count("max_held_bytes", 256 << 20, 1 << 16..=1 << 40, "Bytes that requests which wait for wakes may occupy in memory, headers and received bodies, in all; one more is told 503.") as u64,
                    max_held_bytes_per_microvm: s.count("max_held_bytes_per_microvm", 64 << 20, 1 << 16..=1 << 40, "The same for the requests of one microVM. A quarter of all, so that one microVM that wakes slowly does not keep the others from waking.") as u64,
                    dial_deadline: s.seconds("dial_deadline_secs", 10, 1..=600, "How long a guest may take to accept a connection to a port (502). It takes a guest under load milliseconds; this leaves room for one that swaps."),
                    first_byte_deadline: s.optional_count("first_byte_deadline_secs", 0, 0..=86_400, "How long a guest may take from the whole request header to the begin of its answer (504). 0: for ever, as a request that computes for long is a feature.").map(|secs| Duration::from_secs(secs as u64)),
                    guest_body_deadline: s.optional_count("guest_body_deadline_secs", 300, 0..=86_400, "How long a guest that has not answered may take nothing of a request body (504; over HTTP/2 the stream is reset and its connection goes on, over HTTP/1.1 the connection ends). Longer than write_deadline_secs: an app may compute between two messages. 0: for ever.").map(|secs| Duration::from_secs(secs as u64)),
                    upstream_keepalive: s.seconds("upstream_keepalive_secs", 1, 1..=3_600, "How long a connection to a guest waits for its next request. Shorter than common servers wait (gunicorn 2 s, Node.js and uvicorn 5 s): a request that meets the app's close on its way costs a second try, and where the app may have seen it a 502, because then it is not sent again. Also below AWS's least maxIdleDurationSeconds (60), so that idle connections are gone before their microVM falls asleep."),
                    max_header_bytes: s.count("max_header_bytes", 24 << 10, 10 << 10..=1 << 20, "Bytes of a request header (431). A token has up to 8,000 characters; the rest is room for cookies."),
                    max_header_fields: s.count("max_header_fields", 100, 16..=256, "Fields of a request header (431). Browsers send about 20, proxies add about 10."),
                    max_answer_header_bytes: s.count("max_answer_header_bytes", 64 << 10, 4 << 10..=1 << 20, "Bytes of an answer's header that a guest may send (502)."),
                    max_body_bytes: s.optional_count("max_body_bytes", 0, 0..=1 << 50, "Bytes of a request body (413). 0: any, as nothing is stored on the way.").map(|bytes| bytes as u64),
                    max_tokens_per_second: s.optional_count("max_tokens_per_second", 100_000, 0..=10_000_000, "Tokens a second that are opened for one address (one /64 of IPv6); more are told 429. Opening one takes 2 to 5 microseconds: no one address gets more than half a core to guess with. 0: any.").map(|rate| rate as u32),
                    max_shells_per_microvm: s.count("max_shells_per_microvm", 8, 0..=64, "Shells of one microVM at a time; one more is told 503. A shell is a process of the guest and some 200 KiB of its agent; a person rarely has more than a few windows. 0: no shells.") as u64,
                    grace: s.seconds("grace_secs", 30, 0..=3_600, "How long running requests may go on after SIGTERM."),
                },
            }),
            api: r.section("api", |s| api::read(s, local(9000))),
            admin: r.section("admin", |s| Admin {
                listen: s.address("listen", local(9090), "/metrics, /healthz, /readyz."),
            }),
            engine: r.section("engine", |s| Engine {
                kind: s.choice("kind", &[("auto", EngineKind::Auto), ("kvm", EngineKind::Kvm), ("qemu", EngineKind::Qemu)], "What runs microVMs. auto: kvm (dormouse-vmm) where /dev/kvm has hardware behind it, else qemu."),
                vmm: s.optional_path("vmm", "dormouse-vmm (static binary), for the kvm engine. Default: beside the dormouse binary."),
                qemu: s.path("qemu", "qemu-system-x86_64", "The QEMU program."),
                accelerator: s.choice("accelerator", &[("tcg", Accelerator::Tcg), ("kvm", Accelerator::Kvm)], "QEMU's accelerator, if qemu is the engine. tcg runs everywhere; kvm needs hardware virtualisation."),
                ready_processes: s.count("ready_processes", 4, 0..=64, "VMM processes that wait ready for the next launch or wake."),
                first_user: s.count("first_user", 2_000_000_000, 65_536..=4_290_000_000, "Users and groups of dormouse-vmm processes, if the node is root: this plus the process's number (up to 4194304). No account may be among them.") as u32,
            }),
            guest: r.section("guest", |s| Guest {
                kernel_dir: s.path("kernel_dir", &cache.join("kernel").to_string_lossy(), "A Debian linux-image-*-cloud-* package, unpacked (make setup)."),
                agent: s.optional_path("agent", "The guest agent (static binary). Default: beside the dormouse binary."),
                base_dir: s.path("base_dir", &cache.join("base").to_string_lossy(), "Base images and build caches."),
                size_seen: s.choice("size_seen", &[("peak", SizeSeen::Peak), ("baseline", SizeSeen::Baseline)], "What guests see of their size. peak: four times the baseline memory and vCPUs (as many as this host has processors at most), as at AWS; memory that a guest does not touch costs nothing. baseline: the memory that lifecycle.max_memory_mib counts, for hosts on which no guest may take more. Takes effect for images that are built from now on."),
                egress_allow: s.list("egress_allow", "a list of networks such as [\"10.1.0.0/16\", \"192.168.7.5/32\"]", "Networks that microVMs with INTERNET_EGRESS may connect to although they are private. Without it they reach public IPv4 addresses only, and never one of this host."),
                roles: s.optional_path("roles", "Credentials for microVMs with an execution role, which their apps read at 169.254.169.254: a file in the form of AWS's shared credentials, each profile named by the ARN of a role. Read again at every launch and wake, and within seconds when it has changed. What is in it has to be good for an hour from any moment on. Keep it to yourself (mode 0600)."),
                name_servers: s.list("name_servers", "a list of addresses such as [\"10.1.0.2:53\"]", "Name servers that microVMs with INTERNET_EGRESS ask, through the node. Default: those of /etc/resolv.conf."),
            }),
            lifecycle: r.section("lifecycle", |s| Lifecycle {
                max_concurrent_starts: s.count("max_concurrent_starts", 4, 1..=1_024, "Launches and wakes at a time; more wait their turn."),
                max_waiting_per_microvm: s.count("max_waiting_per_microvm", 1_024, 1..=1_000_000, "Requests that may wait for one sleeping microVM."),
                max_microvms: s.count("max_microvms", 1_000, 1..=1_000_000, "microVMs that are not terminated."),
                max_memory_mib: s.count("max_memory_mib", 1_048_576, 512..=1 << 40, "Baseline memory that all microVMs (asleep or awake) and builds may have together, in MiB; more are told 402. The default is AWS's quota of its large regions; one who sleeps costs this node disk, not memory, so it is not the memory of the host.") as u64,
                keep_terminated: s.seconds("keep_terminated_secs", 86_400, 0..=31_536_000, "How long a terminated microVM stays readable."),
                least_idle: s.seconds("least_idle_secs", 60, 1..=28_800, "The least maxIdleDurationSeconds that RunMicrovm takes (AWS: 60)."),
                suspend_hook_failure: s.choice("suspend_hook_failure", &[("keep", SuspendHookFailure::Keep), ("terminate", SuspendHookFailure::Terminate)], "A microVM whose /suspend hook does not answer 200: keep lets it run on and tries again after the next idle period; terminate ends it, as AWS was seen to do."),
            }),
            build: r.section("build", |s| Build {
                max_concurrent: s.count("max_concurrent", 2, 1..=64, "Image builds at a time; more wait. Each boots a guest and takes a processor for most of its time."),
                max_unfinished: s.count("max_unfinished", 10, 1..=10_000, "Image builds that run and wait together; one more is refused (402), as by AWS, whose quota is 5 to 10."),
                max_images: s.count("max_images", 100, 1..=1_000_000, "Images; one more is refused (402). AWS: 100. An image takes some hundred MiB of disk for each version."),
                max_versions: s.count("max_versions", 50, 1..=1_000_000, "Versions of one image; one more is refused (402). AWS: 50."),
                ready_timeout: s.seconds("ready_timeout_secs", 180, 1..=3_600, "How long the app has to listen on a port."),
                timeout: s.seconds("timeout_secs", 1_800, 1..=86_400, "How long the container build has."),
                network: s.choice("network", &[("internet", BuildNetwork::Internet), ("none", BuildNetwork::Nothing), ("host", BuildNetwork::Host)], "Which network the RUN steps of a Dockerfile have. internet: one of their own (slirp4netns), from which they reach what microVMs with INTERNET_EGRESS reach (guest.egress_allow included) and never a listener of this host; none: no network; host: this host's, its loopback included, where every Dockerfile can talk to [admin], which asks nobody who he is. A proxy on the loopback of this host is reached with host only. An image with NO_EGRESS is built without a network in any case. FROM is fetched by the node itself."),
            }),
            log: r.section("log", |s| Log {
                filter: s.text("filter", "info", "A tracing filter such as \"info\" or \"info,gateway=debug\".", |_| Ok(())),
                json: s.switch("json", false, "JSON lines instead of text."),
                access: s.optional_path("access", "The access log: one JSON line per request. The file is opened again once it has been renamed or removed (log rotation). Default: standard error."),
                microvm_bytes: s.count("microvm_bytes", 8 << 20, 64 << 10..=1 << 40, "Bytes kept of what one microVM's app says: the newest; between half of it and all of it. Eight MiB is 80,000 lines, and 8 GiB for 1,000 microVMs that all fill it. A guest that says more loses its oldest lines and is not held up. Takes effect for a microVM at its next launch or wake.") as u64,
            }),
            prices: r.section("prices", |s| Prices {
                vcpu_second: s.price("vcpu_second", "0.0000276944", "US dollars for a vCPU for a second, at the baseline and above it. These are AWS's in us-east-1 (arm); `dormouse usage` shows what microVMs would have cost there."),
                gb_second: s.price("gb_second", "0.0000036667", "For a GB (2^30 bytes) of memory for a second."),
                snapshot_read_gb: s.price("snapshot_read_gb", "0.0015467699", "For a GB of snapshots that launches and resumes read."),
                snapshot_written_gb: s.price("snapshot_written_gb", "0.0037977138", "For a GB of snapshots that suspends write."),
                storage_gb_hour: s.price("storage_gb_hour", "0.0001111111", "For a GB of suspended microVMs' snapshots for an hour."),
                transfer_gb: s.price("transfer_gb", "0.0", "For a GB that guests send to clients or into their network. AWS bills it as any other transfer out of a region, by volume and destination, which no one number says."),
            }),
        }
    }
}

/// What is shared by all nodes and checkouts of a host: `$XDG_CACHE_HOME/dormouse` or `~/.cache/dormouse`.
pub fn cache_dir() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(|| PathBuf::from("/var/cache"))
        .join("dormouse")
}

/// A lower-case DNS name of at least one label.
fn domain(text: &str) -> Result<(), &'static str> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    // 253 is the longest name (RFC 1035 §2.3.4), less the endpoint's uuid and its dot.
    (text.len() <= 253 - 37 && text.split('.').all(label)).then_some(()).ok_or("a lower-case DNS name")
}

#[cfg(test)]
mod tests;
