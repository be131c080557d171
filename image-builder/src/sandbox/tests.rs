//! Real namespaces; needs root.

use std::sync::LazyLock;

use vmm_runtime::EgressPolicy;

use super::*;

/// With the most that a job can have beside itself.
static POLICY: LazyLock<EgressPolicy> = LazyLock::new(EgressPolicy::default);

struct Ran {
    ended: Ended,
    lines: Vec<String>,
}

/// A job with a network of its own and a minute.
fn job<'a>(script: &'a str, dir: &'a Path, cancel: &'a CancellationToken) -> Job<'a> {
    let deadline = Instant::now() + Duration::from_secs(60);
    Job { script, args: args([&"one", &"two words"]), env: Vec::new(), dir, network: Network::Internet(&POLICY), deadline, cancel }
}

/// Command lines of the processes that name `dir`, slirp4netns's among them.
fn processes_of(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let dir = dir.to_str().unwrap();
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).filter(|line| line.contains(dir)).collect()
}

async fn run_for(script: &str, limit: Duration, cancel: &CancellationToken) -> Ran {
    run_with(script, limit, cancel, Network::Internet(&POLICY)).await
}

async fn run_with(script: &str, limit: Duration, cancel: &CancellationToken, network: Network<'_>) -> Ran {
    let dir = tempfile::tempdir().unwrap();
    let mut lines = Vec::new();
    let job = Job { deadline: Instant::now() + limit, network, ..job(script, dir.path(), cancel) };
    let ended = run(job, &mut |line| lines.push(line.to_owned())).await.unwrap();
    assert_eq!(processes_of(dir.path()), Vec::<String>::new());
    remove_dir(dir.path().to_owned()).await.unwrap();
    Ran { ended, lines }
}

async fn ran(script: &str) -> Ran {
    run_for(script, Duration::from_secs(60), &CancellationToken::new()).await
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        // Past the test harness, which shows what a passing test says to nobody.
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: the sandbox needs root\n"));
    }
    root
}

#[tokio::test]
async fn output_arguments_and_exit_status_come_through() {
    if !is_root() {
        return;
    }
    let ran = ran("echo \"$1/$2\"; echo err >&2; printf 'a\\rb\\n\\nlast'; exit 7").await;
    assert_eq!(ran.ended, Ended::Exit(7));
    assert_eq!(ran.lines, ["one/two words", "err", "a", "b", "last"]);
}

#[tokio::test]
async fn the_host_is_out_of_sight() {
    if !is_root() {
        return;
    }
    // Block devices and the processes of the host are not there; the environment is clean.
    let ran = ran("ls /dev; ls -d /proc/[0-9]* | wc -l; ls /dev/pts; env | grep -c CARGO || :").await;
    let text = ran.lines.join("\n");
    assert!(!text.contains("vda") && !text.contains("kmsg") && text.contains("null"), "{text}");
    assert!(ran.lines[ran.lines.len() - 3].parse::<u32>().unwrap() < 10, "{text}");
    assert_eq!(ran.lines.last().map(String::as_str), Some("0"));
}

/// Tries to connect to each `<address>/<port>`, as bash names them; says whether it could.
const KNOCK: &str = r#"for at in $KNOCK_AT; do if timeout 5 bash -c "exec 3<>/dev/tcp/$at" 2>/dev/null; then echo "$at open"; else echo "$at closed"; fi; done"#;

async fn knock(at: &[String], network: Network<'_>) -> Vec<String> {
    let (cancel, dir) = (CancellationToken::new(), tempfile::tempdir().unwrap());
    let mut lines = Vec::new();
    let job = Job { env: vec![("KNOCK_AT", at.join(" ").into())], network, ..job(KNOCK, dir.path(), &cancel) };
    let ended = run(job, &mut |line| lines.push(line.to_owned())).await.unwrap();
    assert_eq!(ended, Ended::Exit(0), "{lines:?}");
    lines
}

#[tokio::test]
async fn a_network_of_its_own_does_not_lead_to_the_host() {
    if !is_root() {
        return;
    }
    let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let ip = std::process::Command::new("ip").args(["-4", "-json", "address", "show"]).output().unwrap();
    let own = network::addresses(&ip.stdout).unwrap();
    assert!(!own.is_empty());
    // Each address of the host, and the names by which slirp4netns can be asked for it.
    let at: Vec<String> = own.iter().map(ToString::to_string).chain(["10.0.2.2".to_owned(), "10.0.2.3".to_owned()]).map(|address| format!("{address}/{port}")).collect();
    let all = |word: &str, at: &[String]| at.iter().map(|at| format!("{at} {word}")).collect::<Vec<_>>();
    let of_host = &at[..own.len()];
    assert_eq!(knock(of_host, Network::Host).await, all("open", of_host), "the listener can be met at all");
    assert_eq!(knock(&at, Network::Internet(&POLICY)).await, all("closed", &at));
    assert_eq!(knock(&at, Network::Nothing).await, all("closed", &at));
    for _ in of_host {
        listener.accept().await.unwrap();
    }
    assert!(tokio::time::timeout(Duration::ZERO, listener.accept()).await.is_err(), "nobody else came");

    // What the operator opens is open.
    let open = EgressPolicy { also: vec![format!("{}/32", own.last().unwrap()).parse().unwrap()], ..EgressPolicy::default() };
    if !own.last().unwrap().is_loopback() {
        let at = &at[own.len() - 1..own.len()];
        assert_eq!(knock(at, Network::Internet(&open)).await, all("open", at));
    }
}

#[tokio::test]
async fn a_network_of_its_own_has_names_and_no_other_card() {
    if !is_root() {
        return;
    }
    let ran = ran("grep ^nameserver /etc/resolv.conf; ls /sys/class/net; tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | sort").await;
    assert_eq!(ran.lines, ["nameserver 10.0.2.3", "lo", "tap0", "lo", "tap0"]);
    let none = run_with("ls /sys/class/net", Duration::from_secs(60), &CancellationToken::new(), Network::Nothing).await;
    assert_eq!(none.lines, ["lo"]);
}

#[tokio::test]
async fn who_gives_the_network_is_out_of_sight() {
    if !is_root() {
        return;
    }
    // Whoever could see slirp4netns could trace it, and so borrow the host's network.
    let ran = ran("for dir in /proc/[0-9]*; do cat $dir/comm; done").await;
    assert!(!ran.lines.is_empty() && !ran.lines.iter().any(|name| name.contains("slirp")), "{:?}", ran.lines);
}

#[tokio::test]
async fn a_cancelled_job_takes_everything_with_it() {
    if !is_root() {
        return;
    }
    let (cancel, dir) = (CancellationToken::new(), tempfile::tempdir().unwrap());
    // The child leaves the session and the process group, and ignores every signal it can.
    let script = "mkdir $TMPDIR/m; mount -t tmpfs m $TMPDIR/m; setsid sh -c 'trap \"\" TERM INT HUP; echo up; while :; do echo >$TMPDIR/beat; done' & wait";
    let mut lines = 0;
    let ended = run(job(script, dir.path(), &cancel), &mut |line| {
        lines += 1;
        assert_eq!(line, "up");
        cancel.cancel();
    })
    .await
    .unwrap();
    assert_eq!((ended, lines), (Ended::Cancelled, 1));
    assert_eq!(processes_of(dir.path()), Vec::<String>::new());
    // Nobody writes any more, and nothing is mounted: it can be removed at once.
    std::fs::remove_dir_all(dir.path().join("tmp")).unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(dir.path().to_str().unwrap()));
}

#[tokio::test]
async fn the_deadline_ends_it() {
    if !is_root() {
        return;
    }
    let begun = Instant::now();
    let ran = run_for("echo hi; sleep 1000", Duration::from_secs(5), &CancellationToken::new()).await;
    assert_eq!(ran.ended, Ended::DeadlinePassed);
    assert_eq!(ran.lines, ["hi"]);
    assert!(begun.elapsed() < Duration::from_secs(60));
}

#[tokio::test]
async fn a_killed_builder_leaves_no_processes() {
    if !is_root() {
        return;
    }
    // What the kernel does to the lifeline when this process is killed is to close it; a dropped future does the same.
    let (cancel, dir) = (CancellationToken::new(), tempfile::tempdir().unwrap());
    let beat = dir.path().join("tmp/beat");
    let job = job("while :; do echo x >>$TMPDIR/beat; done", dir.path(), &cancel);
    let mut ignore = |_: &str| {};
    let wait_for_beat = async {
        while !beat.exists() {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        ended = run(job, &mut ignore) => panic!("it ended by itself: {ended:?}"),
        () = wait_for_beat => {}
    }
    let all_ended = async {
        while !processes_of(dir.path()).is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all_ended).await.unwrap();
    // With nobody writing into it the directory can be removed and stays away.
    remove_dir(dir.path().to_owned()).await.unwrap();
    assert!(!dir.path().exists());
}

#[test]
fn lines_are_bounded() {
    let (mut lines, mut given) = (Lines::default(), Vec::new());
    for _ in 0..3 {
        lines.feed(&[b'x'; 3000], &mut |line: &str| given.push(line.len()));
    }
    lines.feed(b"\xff\n", &mut |line: &str| given.push(line.len()));
    lines.finish(&mut |line: &str| given.push(line.len()));
    assert!(given.iter().all(|len| *len <= MAX_LINE_BYTES), "{given:?}");
    assert_eq!(given.iter().sum::<usize>(), 9003, "nothing is lost; the odd byte became a three-byte sign");
}
