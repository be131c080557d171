//! Real namespaces; needs root.

use super::*;

struct Ran {
    ended: Ended,
    lines: Vec<String>,
}

async fn run_for(script: &str, limit: Duration, cancel: &CancellationToken) -> Ran {
    let dir = tempfile::tempdir().unwrap();
    let mut lines = Vec::new();
    let job = Job { script, args: args([&"one", &"two words"]), env: Vec::new(), dir: dir.path(), deadline: Instant::now() + limit, cancel };
    let ended = run(job, &mut |line| lines.push(line.to_owned())).await.unwrap();
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

#[tokio::test]
async fn a_cancelled_job_takes_everything_with_it() {
    if !is_root() {
        return;
    }
    let (cancel, dir) = (CancellationToken::new(), tempfile::tempdir().unwrap());
    // The child leaves the session and the process group, and ignores every signal it can.
    let script = "mkdir $TMPDIR/m; mount -t tmpfs m $TMPDIR/m; setsid sh -c 'trap \"\" TERM INT HUP; echo up; while :; do echo >$TMPDIR/beat; done' & wait";
    let mut lines = 0;
    let job = Job { script, args: Vec::new(), env: Vec::new(), dir: dir.path(), deadline: Instant::now() + Duration::from_secs(60), cancel: &cancel };
    let ended = run(job, &mut |line| {
        lines += 1;
        assert_eq!(line, "up");
        cancel.cancel();
    })
    .await
    .unwrap();
    assert_eq!((ended, lines), (Ended::Cancelled, 1));
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
    let job = Job {
        script: "while :; do echo x >>$TMPDIR/beat; done",
        args: Vec::new(),
        env: Vec::new(),
        dir: dir.path(),
        deadline: Instant::now() + Duration::from_secs(60),
        cancel: &cancel,
    };
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
