//! The agent where it lives: in a guest that boots, runs an app, is quiesced, changes hosts, and ends.
//!
//! Skips loudly on a host without the guest kernel (`make setup`) or the agent's static build.

mod machine;

use std::time::{Duration, Instant, SystemTime};

use machine::{ECHO, LIMIT, Machine, PROBE, port, soon};
use model::Generation;
use protocol::{
    agent::{Event, Reply, Request, Restored},
    link::{Attach, LinkError},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn field<'a>(status: &'a str, name: &str) -> Vec<&'a str> {
    let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {status}"));
    line.split_ascii_whitespace().skip(1).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_runs_as_root_sleeps_and_ends() {
    let Some(mut guest) = Machine::boot().await else { return };
    let early = guest.link.open(port(PROBE), LIMIT).await;
    assert!(matches!(early, Err(LinkError::Refused(_))), "{early:?}");
    assert_eq!(guest.start(&["/probe"], "/", "").await.expect("the app starts"), Reply::Done);
    guest.ready().await;
    guest.hears("the probe starts\n").await;

    // Its world.
    assert_eq!(guest.ask("pid").await, "1");
    assert_eq!(guest.ask("env GREETING").await, "hello world");
    let processes = guest.ask("list /proc").await;
    let processes: Vec<_> = processes.split(' ').filter(|name| name.parse::<u32>().is_ok()).collect();
    assert_eq!(processes, ["1"], "it sees itself only");
    let status = guest.ask("read /proc/self/status").await;
    assert_eq!(field(&status, "Uid:"), ["0"; 4]);
    assert_eq!(u64::from_str_radix(field(&status, "SigIgn:")[0], 16), Ok(1 << 12), "SIGPIPE is ignored by the probe's own runtime only");
    assert_eq!(field(&status, "SigBlk:"), ["0000000000000000"]);
    assert_eq!(guest.ask("read /proc/self/oom_score_adj").await, "0\n");
    assert_eq!(guest.ask("read /proc/self/cgroup").await, "0::/\n");
    assert!(guest.ask("list /sys/fs/cgroup").await.contains("cgroup.freeze"), "its cgroup is the root of what it sees");
    let limits = guest.ask("read /proc/self/limits").await;
    assert!(limits.lines().any(|line| line.split_ascii_whitespace().eq(["Max", "open", "files", "1024", "1048576", "files"])), "{limits}");
    assert_eq!(guest.ask("read /proc/sys/kernel/hostname").await, "microvm\n");
    assert!(guest.ask("read /etc/hosts").await.contains("127.0.0.1 localhost"));
    assert_eq!(guest.ask("write /tmp/x y").await, "written");
    assert_eq!(guest.ask("write /dev/shm/x y").await, "written");
    assert_eq!(guest.ask("is-dir /modules").await, "false", "the initramfs is out of sight");

    // It cannot hurt the agent, and its orphans are reaped.
    guest.ask("kill-everyone").await;
    assert_eq!(guest.ask("orphan").await, "exit status: 0");
    assert!(matches!(guest.link.call(Request::Stats, LIMIT).await, Ok(Reply::Stats { .. })));
    let again = guest.start(&["/probe"], "/", "").await;
    assert!(matches!(&again, Err(LinkError::Agent(why)) if why == "the app has been started already"), "{again:?}");

    // Ports, IPv6 too.
    let refused = guest.link.open(port(9), LIMIT).await;
    assert!(matches!(refused, Err(LinkError::Refused(which)) if which == port(9)), "{refused:?}");
    let mut echo = guest.dial(ECHO).await;
    echo.write_all(b"hello").await.unwrap();
    soon("the echo", echo.read_exact(&mut [0; 5])).await.unwrap();

    // Silence, and back.
    for _ in 0..3 {
        let since = Instant::now();
        guest.link.quiesce(LIMIT).await.unwrap();
        eprintln!("quiesced in {:?}", since.elapsed());
        guest.link.unquiesce(LIMIT).await.unwrap();
        guest.link.release_streams();
        assert_eq!(guest.ask("pid").await, "1");
    }

    // A restore, as far as the agent can tell: the same epoch on another connection, with a message. The stream goes on.
    guest.link.quiesce(LIMIT).await.unwrap();
    guest.link.detach();
    echo.write_all(b"while you slept").await.unwrap();
    let later = SystemTime::now() + Duration::from_secs(1_000_000);
    let realtime_ns = later.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let identity = [("REGION".to_owned(), "here".to_owned()), ("NAME".to_owned(), "it's".to_owned())].into();
    let since = Instant::now();
    guest.attach(Attach::Restored(Restored { realtime_ns, entropy: "5a".repeat(64), generation: Generation(7), identity, egress: Default::default(), role: None })).await;
    eprintln!("attached in {:?}", since.elapsed());
    soon("the echo", echo.read_exact(&mut [0; 15])).await.unwrap();
    let now_ns: u64 = guest.ask("now-ns").await.parse().unwrap();
    assert!(now_ns >= realtime_ns && now_ns - realtime_ns < 60_000_000_000, "{now_ns} and {realtime_ns}");
    assert_eq!(guest.ask("read /run/dormouse/identity.env").await, "DORMOUSE_GENERATION='7'\nNAME='it'\\''s'\nREGION='here'\n");

    // Bad entropy fails the attachment with a sentence, and the next one works.
    guest.link.quiesce(LIMIT).await.unwrap();
    guest.link.detach();

    // Another host, without a word of farewell, while the guest is quiesced.
    guest.adopt().await;
    assert!(soon("the reset", echo.read(&mut [0; 1])).await.is_err());
    assert_eq!(guest.ask("pid").await, "1");
    // And once more in the middle of a flood.
    guest.ask("flood").await;
    guest.adopt().await;
    assert_eq!(guest.ask("pid").await, "1");

    // The end.
    guest.ask("print last words").await;
    let mut stream = guest.dial(PROBE).await;
    stream.write_all(b"exit 42\n").await.unwrap();
    assert_eq!(soon("the event", guest.link.event()).await, Event::AppExited { code: 42 });
    guest.hears("last words\n").await;
    guest.hears("and an error\n").await;
    assert!(matches!(guest.link.call(Request::Stats, LIMIT).await, Ok(Reply::Stats { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_starts_say_why_and_an_app_runs_as_a_user() {
    let Some(guest) = Machine::boot().await else { return };
    for (argv, workdir, user, sentence) in [
        (&["/foo"][..], "/", "", "the app could not be started: /foo: not found"),
        (&["foo"], "/", "", "the app could not be started: foo: not found in PATH (/bin:/usr/bin)"),
        (&[], "/", "", "the image has neither an ENTRYPOINT nor a CMD"),
        (&["/opt/closed"], "/", "", "the app could not be started: /opt/closed: permission denied (is it executable for the image's USER?)"),
        (&["/opt/text"], "/", "", "the app could not be started: /opt/text: not a program this machine can run (built for another processor, or a script without #!)"),
        (&["./no-interpreter"], "/opt", "", "the app could not be started: ./no-interpreter: /opt/./no-interpreter is there, but the interpreter or loader it asks for is not"),
        (&["/probe"], "/", "nobody", "the app could not be started: user `nobody` is not in the image's /etc/passwd"),
        (&["/probe"], "/etc/passwd", "", "the app could not be started: /etc/passwd: File exists (os error 17)"),
    ] {
        let failed = guest.start(argv, workdir, user).await;
        assert!(matches!(&failed, Err(LinkError::Agent(why)) if why == sentence), "{argv:?}: {failed:?}");
    }
    assert_eq!(guest.start(&["probe"], "/srv/made/for/it", "web").await.expect("the app starts"), Reply::Done);
    guest.ready().await;
    assert_eq!(guest.ask("cwd").await, "/srv/made/for/it");
    let status = guest.ask("read /proc/self/status").await;
    assert_eq!(field(&status, "Uid:"), ["1000"; 4]);
    assert_eq!(field(&status, "Gid:"), ["1001"; 4]);
    assert_eq!(field(&status, "Groups:"), ["44"]);
    assert_eq!(field(&status, "CapEff:"), ["0000000000000000"]);
    assert_eq!(guest.ask("print-by-path to a path").await, "printed");
    guest.hears("to a path\n").await;
    assert!(guest.ask("write /etc/x y").await.contains("denied"));

    // Bytes, a lot of them, both ways.
    let sent: Vec<u8> = (0..8_000_000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (mut read, mut write) = tokio::io::split(guest.dial(ECHO).await);
    let mut back = Vec::new();
    let since = Instant::now();
    let writing = async {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    };
    soon("the bulk", async { tokio::join!(writing, read.read_to_end(&mut back)) }).await.1.unwrap();
    eprintln!("8 MB there and back in {:?}", since.elapsed());
    assert!(back == sent);

    // PID 1 of a namespace does not get its own SIGABRT; musl then ends it with SIGSEGV, which is 128 + 11.
    let mut stream = guest.dial(PROBE).await;
    stream.write_all(b"abort\n").await.unwrap();
    assert_eq!(soon("the event", guest.link.event()).await, Event::AppExited { code: 139 });
}
