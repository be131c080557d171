//! The checks, one promise each.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::FileExt,
    time::{Duration, Instant, SystemTime},
};

use futures::future::BoxFuture;
use model::{Egress, Generation, MicrovmId};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tokio_util::sync::CancellationToken;

use super::{
    ECHO, Guests, NOBODY, Subject, Suite, chain,
    files::{self, Damaged, snapshot_files},
    guest::{echo, get, number, pattern, try_get, within},
};
use crate::engine::{DialError, EngineError, Exit, LaunchSpec, RestoreSpec, SuspendOutcome, Vm};

/// Long enough for a byte to come that must not.
const QUIET: Duration = Duration::from_millis(200);

type Check = for<'a> fn(&'a Suite<'a>) -> BoxFuture<'a, ()>;

/// Name, what it needs, and the check.
pub const ALL: &[(&str, Guests, Check)] = &[
    ("a_clone_goes_on_where_the_image_was", Guests::Real, |suite| Box::pin(clone_goes_on(suite))),
    ("a_stream_reaches_a_port_and_half_close_comes_through", Guests::Shared, |suite| Box::pin(streams(suite))),
    ("a_port_without_a_listener_refuses", Guests::Shared, |suite| Box::pin(refused(suite))),
    ("a_shell_is_no_port_and_speaks_websocket", Guests::Real, |suite| Box::pin(shell(suite))),
    ("memory_survives_a_sleep", Guests::Real, |suite| Box::pin(memory_survives(suite))),
    ("a_parked_stream_loses_no_byte", Guests::Shared, |suite| Box::pin(parked_stream(suite))),
    ("streams_are_held_until_they_are_released", Guests::Shared, |suite| Box::pin(held_streams(suite))),
    ("a_restored_microvm_can_be_thrown_away_with_its_streams_kept", Guests::Real, |suite| Box::pin(thrown_away(suite))),
    ("without_its_predecessor_a_stream_ends", Guests::Shared, |suite| Box::pin(orphaned_stream(suite))),
    ("a_suspend_is_taken_back", Guests::Shared, |suite| Box::pin(taken_back(suite))),
    ("a_suspend_that_is_given_up_is_taken_back", Guests::Shared, |suite| Box::pin(given_up(suite))),
    ("clones_share_nothing", Guests::Real, |suite| Box::pin(clones_differ(suite))),
    ("disk_layers_survive_many_sleeps", Guests::Real, |suite| Box::pin(many_sleeps(suite))),
    ("a_damaged_snapshot_is_refused_and_mended_is_taken", Guests::Real, |suite| Box::pin(damaged(suite))),
    ("the_snapshot_of_another_microvm_is_refused", Guests::Real, |suite| Box::pin(foreign_snapshot(suite))),
    ("a_damaged_image_is_refused", Guests::Real, |suite| Box::pin(damaged_image(suite))),
    ("a_failed_restore_keeps_snapshot_and_streams", Guests::Real, |suite| Box::pin(failed_restore(suite))),
    ("the_end_of_the_app_is_told", Guests::Real, |suite| Box::pin(app_exit(suite))),
    ("kill_ends_it_and_is_not_told", Guests::Shared, |suite| Box::pin(kill(suite))),
    ("kill_beats_a_suspend", Guests::Shared, |suite| Box::pin(kill_beats_suspend(suite))),
    ("a_microvm_is_adopted", Guests::Shared, |suite| Box::pin(adopted(suite))),
    ("another_generation_is_not_adopted", Guests::Shared, |suite| Box::pin(not_adopted(suite))),
    ("a_sleeping_microvm_is_restored_after_a_restart", Guests::Shared, |suite| Box::pin(restored_after_restart(suite))),
    ("a_sweep_ends_what_nobody_keeps", Guests::Shared, |suite| Box::pin(sweep(suite))),
    ("clocks_are_right_after_a_sleep", Guests::Real, |suite| Box::pin(clocks(suite))),
    ("usage_grows", Guests::Real, |suite| Box::pin(usage(suite))),
    ("a_guest_reaches_the_outside_if_it_may_and_where_it_may", Guests::Real, |suite| Box::pin(outside(suite))),
];

async fn suspend(subject: &Subject) -> crate::engine::SnapshotRecord {
    match within("suspend", subject.vm.suspend(CancellationToken::new())).await {
        Ok(SuspendOutcome::Suspended(record)) => {
            let phases: Vec<String> = record.phases.iter().map(|(name, time)| format!("{name} {time:.1?}")).collect();
            let total: Duration = record.phases.iter().map(|(_, time)| *time).sum();
            println!("    suspend {total:.1?}: {}; memory {} KiB, disk {} KiB", phases.join(", "), record.memory_bytes >> 10, record.disk_bytes >> 10);
            record
        }
        Ok(SuspendOutcome::TakenBack) => panic!("a suspend that nobody cancelled was taken back"),
        Err(error) => panic!("suspend: {}", chain(&error)),
    }
}

async fn end(subject: Subject) {
    within("kill", subject.vm.kill()).await;
}

async fn clone_goes_on(suite: &Suite<'_>) {
    let subject = suite.launch().await;
    assert_eq!(get(&*subject.vm, "/count").await, "2");
    assert_eq!(get(&*subject.vm, "/count").await, "3");
    assert_eq!(get(&*subject.vm, "/print/out-of-the-guest").await, "printed");
    assert_eq!(suite.engine.committed(subject.dir.clone()).await.expect("an empty directory is no damage"), None);
    end(subject).await;
}

async fn streams(suite: &Suite<'_>) {
    let subject = suite.launch().await;
    let mut stream = subject.vm.dial(ECHO).await.expect("the app listens");
    echo(&mut stream, 0, 1 << 20).await;
    stream.write_all(b"last words").await.expect("the stream is open");
    stream.shutdown().await.expect("the stream is open");
    let mut rest = Vec::new();
    within("end of file", stream.read_to_end(&mut rest)).await.expect("half-close is no error");
    assert_eq!(rest, b"last words");
    end(subject).await;
}

async fn refused(suite: &Suite<'_>) {
    let subject = suite.launch().await;
    let refused = within("dial", subject.vm.dial(NOBODY)).await;
    assert!(matches!(refused, Err(DialError::Refused { port }) if port == NOBODY), "{:?}", refused.err());
    end(subject).await;
}

async fn shell(suite: &Suite<'_>) {
    let subject = suite.launch().await;
    let mut stream = within("dial", subject.vm.dial_shell()).await.expect("the agent takes it");
    let handshake = "GET / HTTP/1.1\r\nhost: guest\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
        sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    stream.write_all(handshake.as_bytes()).await.expect("the stream is open");
    // The suite's root disk has the app and nothing else, and that is said where a terminal's first line would be.
    let (mut said, reason) = (Vec::new(), b"neither bash nor sh");
    while !said.windows(reason.len()).any(|piece| piece == reason) {
        let mut piece = [0; 1024];
        let read = within("the shell's words", stream.read(&mut piece)).await.expect("the stream is open");
        assert!(read > 0, "it ended after {:?}", String::from_utf8_lossy(&said));
        said.extend_from_slice(&piece[..read]);
    }
    assert!(said.starts_with(b"HTTP/1.1 101 "), "{:?}", String::from_utf8_lossy(&said));
    drop(stream);
    end(subject).await;
}

async fn memory_survives(suite: &Suite<'_>) {
    let mut subject = suite.launch().await;
    let (pid, sum) = (get(&*subject.vm, "/pid").await, get(&*subject.vm, "/fill/16").await);
    for expected in 2..5 {
        assert_eq!(get(&*subject.vm, "/count").await, expected.to_string());
        let record = suspend(&subject).await;
        assert_eq!(record.generation, subject.generation);
        assert!(record.memory_bytes > 16 << 20, "16 MiB of noise cannot fit in {} bytes", record.memory_bytes);
        let committed = suite.engine.committed(subject.dir.clone()).await.expect("it was just written").expect("it was just written");
        assert_eq!((committed.generation, committed.memory_bytes), (record.generation, record.memory_bytes));
        assert!(matches!(subject.vm.dial(ECHO).await, Err(DialError::Asleep)));
        suite.restore(&mut subject).await;
        assert_eq!(get(&*subject.vm, "/sum").await, sum);
    }
    assert_eq!(get(&*subject.vm, "/pid").await, pid);
    end(subject).await;
}

async fn parked_stream(suite: &Suite<'_>) {
    let mut subject = suite.launch().await;
    let mut stream = subject.vm.dial(ECHO).await.expect("the app listens");
    let mut at = 0;
    for _ in 0..3 {
        echo(&mut stream, at, 100_000).await;
        at += 100_000;
        // Bytes that are under way when the sleep begins: into the guest, in it, and out of it.
        stream.write_all(&pattern(at, 30_000)).await.expect("the stream is open");
        suspend(&subject).await;
        stream.write_all(&pattern(at + 30_000, 5_000)).await.expect("a parked stream takes what fits in its window");
        stream.flush().await.expect("a parked stream is open");
        within("parked_write", subject.vm.parked_write()).await;
        suite.restore(&mut subject).await;
        let mut received = vec![0; 35_000];
        within("parked bytes", stream.read_exact(&mut received)).await.expect("the stream goes on");
        assert!(received == pattern(at, 35_000), "bytes were lost or changed");
        at += 35_000;
    }
    end(subject).await;
    let mut rest = [0; 1];
    within("reset", stream.read(&mut rest)).await.expect_err("the end of the microVM is no orderly end of the stream");
}

async fn held_streams(suite: &Suite<'_>) {
    let mut subject = suite.launch().await;
    let mut stream = subject.vm.dial(ECHO).await.expect("the app listens");
    echo(&mut stream, 0, 1000).await;
    // Held after a restore.
    suspend(&subject).await;
    stream.write_all(&pattern(1000, 1000)).await.expect("a parked stream takes what fits in its window");
    subject.vm = suite.restore_held(&subject).await;
    subject.generation = subject.generation.next();
    let mut fresh = subject.vm.dial(ECHO).await.expect("new streams can be had");
    echo(&mut fresh, 0, 1000).await;
    let mut received = vec![0; 1000];
    assert!(tokio::time::timeout(QUIET, stream.read(&mut received)).await.is_err(), "a byte passed before its stream was released");
    subject.vm.release_streams();
    within("parked bytes", stream.read_exact(&mut received)).await.expect("the stream goes on");
    assert!(received == pattern(1000, 1000));
    echo(&mut fresh, 1000, 1000).await;

    // After a suspend that was taken back they may be; after the release they are not.
    let cancel = CancellationToken::new();
    cancel.cancel();
    assert!(matches!(within("suspend", subject.vm.suspend(cancel)).await, Ok(SuspendOutcome::TakenBack)));
    echo(&mut subject.vm.dial(ECHO).await.expect("new streams can be had"), 0, 1000).await;
    subject.vm.release_streams();
    echo(&mut stream, 2000, 1000).await;
    end(subject).await;
}

async fn thrown_away(suite: &Suite<'_>) {
    let mut subject = suite.launch().await;
    let mut stream = subject.vm.dial(ECHO).await.expect("the app listens");
    assert_eq!(get(&*subject.vm, "/count").await, "2");
    echo(&mut stream, 0, 1000).await;
    // Under way when the sleep begins: the guest will say some of it again in every restore.
    stream.write_all(&pattern(1000, 60_000)).await.expect("the stream is open");
    suspend(&subject).await;
    stream.write_all(&pattern(61_000, 1000)).await.expect("a parked stream takes what fits in its window");
    for _ in 0..2 {
        let attempt = suite.restore_held(&subject).await;
        assert_eq!(get(&*attempt, "/count").await, "3", "each begins where the snapshot was taken");
        within("kill", attempt.kill()).await;
        within("parked_write", subject.vm.parked_write()).await;
    }
    suite.restore(&mut subject).await;
    let mut received = vec![0; 61_000];
    within("parked bytes", stream.read_exact(&mut received)).await.expect("the stream goes on");
    assert!(received == pattern(1000, 61_000), "bytes were lost, doubled or changed");
    echo(&mut stream, 62_000, 1000).await;
    assert_eq!(get(&*subject.vm, "/count").await, "3");
    end(subject).await;
}

async fn orphaned_stream(suite: &Suite<'_>) {
    let mut subject = suite.launch().await;
    let mut stream = subject.vm.dial(ECHO).await.expect("the app listens");
    echo(&mut stream, 0, 1000).await;
    suspend(&subject).await;
    let spec = RestoreSpec { predecessor: None, ..suite.restore_spec(&subject) };
    let old = std::mem::replace(&mut subject.vm, suite.engine.restore(spec).await.unwrap_or_else(|error| panic!("restore: {}", chain(&error))).vm);
    let mut fresh = subject.vm.dial(ECHO).await.expect("the app listens");
    echo(&mut fresh, 0, 1000).await;
    within("kill", old.kill()).await;
    within("reset", stream.read(&mut [0; 1])).await.expect_err("nobody is at the other end any more");
    echo(&mut fresh, 1000, 1000).await;
    end(subject).await;
}

async fn taken_back(suite: &Suite<'_>) {
    let mut subject = suite.launch().await;
    let mut stream = subject.vm.dial(ECHO).await.expect("the app listens");
    let mut at = 0;
    // Early, late, and everything between: each cut must leave the microVM as it was, or suspended for good.
    let mut taken_back = 0;
    for delay_ms in [None, Some(0), Some(1), Some(2), Some(5), Some(10), Some(20), Some(40), Some(80)] {
        let cancel = CancellationToken::new();
        if delay_ms.is_none() {
            cancel.cancel();
        }
        let cancelling = async {
            tokio::time::sleep(Duration::from_millis(delay_ms.unwrap_or(0))).await;
            cancel.cancel();
        };
        let (outcome, ()) = tokio::join!(subject.vm.suspend(cancel.clone()), cancelling);
        match outcome {
            Ok(SuspendOutcome::TakenBack) => {
                taken_back += 1;
                subject.vm.release_streams();
            }
            Ok(SuspendOutcome::Suspended(_)) => suite.restore(&mut subject).await,
            Err(error) => panic!("suspend: {}", chain(&error)),
        }
        echo(&mut stream, at, 10_000).await;
        at += 10_000;
        let leftovers = fs::read_dir(&subject.dir).expect("the directory is there").flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("tmp"));
        assert!(!leftovers, "a suspend that was taken back left something");
    }
    assert!(taken_back > 0, "no suspend was taken back");
    end(subject).await;
}

async fn given_up(suite: &Suite<'_>) {
    let subject = suite.launch().await;
    let mut stream = subject.vm.dial(ECHO).await.expect("the app listens");
    {
        let mut suspending = Box::pin(subject.vm.suspend(CancellationToken::new()));
        assert!(futures::poll!(&mut suspending).is_pending() || suite.bench.guests() == Guests::Shared);
    }
    if suite.bench.guests() == Guests::Real {
        // The suspend undoes itself behind the back of whom gave it up.
        let undone = async {
            while subject.vm.dial(ECHO).await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        within("the suspend's end", undone).await;
        subject.vm.release_streams();
        echo(&mut stream, 0, 10_000).await;
        assert_eq!(suite.engine.committed(subject.dir.clone()).await.expect("nothing is damaged"), None);
    }
    end(subject).await;
}

async fn clones_differ(suite: &Suite<'_>) {
    let subjects = [suite.launch().await, suite.launch().await, suite.launch().await];
    let mut random = BTreeSet::new();
    for (index, subject) in subjects.iter().enumerate() {
        assert!(random.insert(get(&*subject.vm, "/random").await), "two clones drew the same random numbers");
        get(&*subject.vm, &format!("/write/mark/{index}")).await;
        for _ in 0..index {
            get(&*subject.vm, "/count").await;
        }
    }
    for (index, subject) in subjects.iter().enumerate() {
        assert_eq!(get(&*subject.vm, "/read/mark").await, index.to_string());
        assert_eq!(get(&*subject.vm, "/count").await, (index + 2).to_string());
    }
    for subject in subjects {
        end(subject).await;
    }
}

async fn many_sleeps(suite: &Suite<'_>) {
    let mut subject = suite.launch().await;
    for round in 0..8 {
        get(&*subject.vm, &format!("/write/{round}/content-{round}")).await;
        suspend(&subject).await;
        suite.restore(&mut subject).await;
        for earlier in 0..=round {
            assert_eq!(get(&*subject.vm, &format!("/read/{earlier}")).await, format!("content-{earlier}"));
        }
    }
    suspend(&subject).await;
    let layers = fs::read_dir(subject.dir.join("disk")).map_or(0, |entries| entries.count());
    assert!(layers <= 8, "{layers} disk layers are kept");
    suite.restore(&mut subject).await;
    for earlier in 0..8 {
        assert_eq!(get(&*subject.vm, &format!("/read/{earlier}")).await, format!("content-{earlier}"));
    }
    end(subject).await;
}

/// A sleeping microVM that has something to lose.
async fn asleep(suite: &Suite<'_>) -> Subject {
    let subject = suite.launch().await;
    get(&*subject.vm, "/write/mark/kept").await;
    get(&*subject.vm, "/fill/2").await;
    suspend(&subject).await;
    subject
}

async fn damaged(suite: &Suite<'_>) {
    let mut subject = asleep(suite).await;
    let files = snapshot_files(&subject.dir);
    assert!(files.len() >= 4, "{files:?}");
    for path in &files {
        for damage in files::ALL {
            let damaged = Damaged::new(path, damage).expect("the file can be written");
            match within("restore", suite.engine.restore(suite.restore_spec(&subject))).await.map(|started| started.vm) {
                Err(EngineError::BadSnapshot { why, .. }) => assert!(!why.is_empty()),
                Err(error) => panic!("{} {damage:?}: {}", path.display(), chain(&error)),
                Ok(_) => panic!("{} {damage:?}: was restored", path.display()),
            }
            drop(damaged);
        }
    }
    suite.restore(&mut subject).await;
    assert_eq!(get(&*subject.vm, "/read/mark").await, "kept");
    end(subject).await;
}

async fn foreign_snapshot(suite: &Suite<'_>) {
    let subject = asleep(suite).await;
    let spec = RestoreSpec { id: MicrovmId::random(), predecessor: None, ..suite.restore_spec(&subject) };
    let restored = suite.engine.restore(spec).await.map(|started| started.vm);
    assert!(matches!(restored, Err(EngineError::BadSnapshot { .. })));
    let spec = RestoreSpec { generation: subject.generation, ..suite.restore_spec(&subject) };
    let restored = suite.engine.restore(spec).await.map(|started| started.vm);
    assert!(matches!(restored, Err(EngineError::BadSnapshot { .. })));
    end(subject).await;
}

async fn damaged_image(suite: &Suite<'_>) {
    let files = snapshot_files(&suite.image_dir);
    for path in &files {
        // Where there is data, so that the file stays sparse.
        let length = fs::metadata(path).expect("it is there").len();
        let at = first_data(path);
        let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("it is ours");
        let byte_at = |at| {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("it is within the file");
            byte
        };
        let flip = || file.write_all_at(&[byte_at(at)[0] ^ 2], at).expect("it is within the file");
        let last = byte_at(length - 1);
        flip();
        // What a first engine has found right is not read again by it.
        let engine = suite.bench.engine().await;
        let launched = engine.launch(suite.launch_spec()).await.map(|started| started.vm);
        flip();
        match launched {
            Err(EngineError::BadSnapshot { .. }) => {}
            Err(error) => panic!("{}: {}", path.display(), chain(&error)),
            Ok(_) => panic!("{}: was launched", path.display()),
        }
        file.set_len(length - 1).expect("it is ours");
        let launched = engine.launch(suite.launch_spec()).await.map(|started| started.vm);
        file.set_len(length).expect("it is ours");
        if last != [0] {
            file.write_all_at(&last, length - 1).expect("it is within the file");
        }
        // The line end that a manifest ends with means nothing.
        if !path.ends_with("manifest.json") {
            assert!(matches!(launched, Err(EngineError::BadSnapshot { .. })), "{}: was launched", path.display());
        }
        engine.close().await;
    }
    end(suite.launch().await).await;
}

fn first_data(path: &std::path::Path) -> u64 {
    use std::io::Read;
    let mut file = fs::File::open(path).expect("it is there");
    let (mut at, mut block) = (0, vec![0; 1 << 20]);
    loop {
        let n = file.read(&mut block).expect("it can be read");
        if let Some(found) = block[..n].iter().position(|byte| *byte != 0) {
            return at + found as u64;
        }
        assert!(n > 0, "{} holds nothing", path.display());
        at += n as u64;
    }
}

async fn failed_restore(suite: &Suite<'_>) {
    let mut subject = suite.launch().await;
    let mut stream = subject.vm.dial(ECHO).await.expect("the app listens");
    echo(&mut stream, 0, 1000).await;
    suspend(&subject).await;
    stream.write_all(&pattern(1000, 1000)).await.expect("a parked stream takes what fits");
    for path in snapshot_files(&subject.dir) {
        let damaged = Damaged::new(&path, files::Damage::Flip { eighths: 6 }).expect("the file can be written");
        assert!(suite.engine.restore(suite.restore_spec(&subject)).await.is_err());
        drop(damaged);
    }
    // A start that is given up in its middle leaves everything as it was, too.
    for limit_ms in [0, 1, 3, 10, 20] {
        let restoring = suite.engine.restore(suite.restore_spec(&subject));
        assert!(tokio::time::timeout(Duration::from_millis(limit_ms), restoring).await.is_err(), "a restore in {limit_ms} ms was not expected");
    }
    suite.restore(&mut subject).await;
    let mut received = vec![0; 1000];
    within("parked bytes", stream.read_exact(&mut received)).await.expect("the stream goes on");
    assert!(received == pattern(1000, 1000));
    end(subject).await;
}

async fn app_exit(suite: &Suite<'_>) {
    let subject = suite.launch().await;
    // The answer never comes.
    let _ = within("exit", try_get(&*subject.vm, "/exit/7")).await;
    assert_eq!(within("exited", subject.vm.exited()).await, Exit::App { code: 7 });
    assert!(matches!(subject.vm.suspend(CancellationToken::new()).await, Err(EngineError::Ended { exit: Exit::App { code: 7 }, .. })));
    end(subject).await;
}

async fn kill(suite: &Suite<'_>) {
    let subject = suite.launch().await;
    let mut stream = subject.vm.dial(ECHO).await.expect("the app listens");
    echo(&mut stream, 0, 1000).await;
    within("kill", subject.vm.kill()).await;
    within("kill", subject.vm.kill()).await;
    assert!(matches!(subject.vm.dial(ECHO).await, Err(DialError::Gone)));
    within("reset", stream.read(&mut [0; 1])).await.expect_err("the microVM is gone");
    assert!(matches!(subject.vm.suspend(CancellationToken::new()).await, Err(EngineError::Ended { .. })));
    assert!(tokio::time::timeout(Duration::from_millis(50), subject.vm.exited()).await.is_err(), "an end that was asked for was told");
    let adopted = suite.engine.adopt(subject.id, subject.dir.clone(), suite.image_dir.clone(), Generation(0)).await;
    assert!(adopted.expect("nothing is there to fail").is_none());
}

async fn kill_beats_suspend(suite: &Suite<'_>) {
    for delay_ms in [0, 3, 10, 30] {
        let subject = suite.launch().await;
        let killing = async {
            tokio::time::sleep(Duration::from_millis(delay_ms)).await;
            within("kill", subject.vm.kill()).await;
        };
        // Either end is right; neither may hang.
        let (_outcome, ()) = within("suspend", async { tokio::join!(subject.vm.suspend(CancellationToken::new()), killing) }).await;
        within("kill", subject.vm.kill()).await;
    }
}

async fn adopted(suite: &Suite<'_>) {
    let Subject { id, dir, vm, .. } = suite.launch().await;
    let (pid, before) = (get(&*vm, "/pid").await, number(&*vm, "/count").await);
    let mut stream = vm.dial(ECHO).await.expect("the app listens");
    // In the middle of everything.
    stream.write_all(&pattern(0, 50_000)).await.expect("the stream is open");
    drop(stream);
    drop(vm);
    let engine = suite.bench.engine().await;
    let vm = engine.adopt(id, dir.clone(), suite.image_dir.clone(), Generation(0)).await.unwrap_or_else(|error| panic!("adopt: {}", chain(&error)));
    let mut subject = Subject { id, dir, vm: vm.expect("its process lives"), generation: Generation(0) };
    assert_eq!(get(&*subject.vm, "/pid").await, pid);
    assert_eq!(number(&*subject.vm, "/count").await, before + 1);
    let mut stream = subject.vm.dial(ECHO).await.expect("the app listens");
    echo(&mut stream, 0, 10_000).await;
    suspend(&subject).await;
    suite.restore(&mut subject).await;
    echo(&mut stream, 0, 10_000).await;
    assert_eq!(number(&*subject.vm, "/count").await, before + 2);
    end(subject).await;
    engine.close().await;
}

async fn not_adopted(suite: &Suite<'_>) {
    let Subject { id, dir, vm, .. } = suite.launch().await;
    drop(vm);
    for _ in 0..2 {
        let adopted = suite.engine.adopt(id, dir.clone(), suite.image_dir.clone(), Generation(4)).await;
        assert!(adopted.unwrap_or_else(|error| panic!("adopt: {}", chain(&error))).is_none());
    }
    let adopted = suite.engine.adopt(id, dir, suite.image_dir.clone(), Generation(0)).await;
    assert!(adopted.unwrap_or_else(|error| panic!("adopt: {}", chain(&error))).is_none(), "it was left behind");
}

async fn restored_after_restart(suite: &Suite<'_>) {
    let mut subject = suite.launch().await;
    let before = number(&*subject.vm, "/count").await;
    suspend(&subject).await;
    let engine = suite.bench.engine().await;
    let adopted = engine.adopt(subject.id, subject.dir.clone(), suite.image_dir.clone(), Generation(0)).await;
    assert!(adopted.unwrap_or_else(|error| panic!("adopt: {}", chain(&error))).is_none(), "a sleeping microVM has no process");
    let record = engine.committed(subject.dir.clone()).await.expect("it is whole").expect("it is there");
    assert_eq!(record.generation, Generation(0));
    let spec = RestoreSpec { predecessor: None, ..suite.restore_spec(&subject) };
    subject.vm = engine.restore(spec).await.unwrap_or_else(|error| panic!("restore: {}", chain(&error))).vm;
    assert_eq!(number(&*subject.vm, "/count").await, before + 1);
    end(subject).await;
    engine.close().await;
}

async fn sweep(suite: &Suite<'_>) {
    // An engine of its own, whose ready processes nobody ends.
    let earlier = suite.bench.engine().await;
    earlier.warm(suite.image_dir.clone()).await;
    let (kept, lost) = (suite.launch_with(&*earlier).await, suite.launch_with(&*earlier).await);
    let (kept_id, kept_dir, lost_id, lost_dir) = (kept.id, kept.dir, lost.id, lost.dir);
    drop((kept.vm, lost.vm, earlier));
    let engine = suite.bench.engine().await;
    within("sweep", engine.sweep(&[kept_id])).await.unwrap_or_else(|error| panic!("sweep: {}", chain(&error)));
    let adopted = engine.adopt(lost_id, lost_dir, suite.image_dir.clone(), Generation(0)).await;
    assert!(adopted.unwrap_or_else(|error| panic!("adopt: {}", chain(&error))).is_none());
    let adopted = engine.adopt(kept_id, kept_dir, suite.image_dir.clone(), Generation(0)).await;
    let vm = adopted.unwrap_or_else(|error| panic!("adopt: {}", chain(&error))).expect("it was kept");
    get(&*vm, "/count").await;
    vm.kill().await;
    engine.close().await;
}

fn realtime_ns() -> u128 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("the host's clock is set").as_nanos()
}

async fn assert_clock(vm: &dyn Vm) {
    let before = realtime_ns();
    let guest = number(vm, "/realtime-ns").await;
    let after = realtime_ns();
    let tolerance = 50_000_000;
    assert!(
        (before - tolerance..=after + tolerance).contains(&guest),
        "the guest's clock is {:.3} s off",
        (guest as f64 - before as f64) / 1e9
    );
}

async fn clocks(suite: &Suite<'_>) {
    // Time that passes is what is checked here, so this check waits for it.
    const SLEEP: Duration = Duration::from_secs(2);
    tokio::time::sleep_until((suite.captured_at + SLEEP).into()).await;
    let mut subject = suite.launch().await;
    assert_clock(&*subject.vm).await;
    let (uptime, asked_at) = (number(&*subject.vm, "/uptime-ms").await, Instant::now());
    suspend(&subject).await;
    let slept_from = Instant::now();
    tokio::time::sleep(SLEEP).await;
    let slept = slept_from.elapsed();
    suite.restore(&mut subject).await;
    assert_clock(&*subject.vm).await;
    let passed = Duration::from_millis(u64::try_from(number(&*subject.vm, "/uptime-ms").await - uptime).expect("it is short"));
    let awake = asked_at.elapsed() - slept;
    assert!(passed <= awake + Duration::from_millis(100), "the monotonic clock went on by {passed:?} in {awake:?} awake");
    end(subject).await;
}

async fn usage(suite: &Suite<'_>) {
    let subject = suite.launch().await;
    let before = subject.vm.usage().await;
    get(&*subject.vm, "/fill/32").await;
    let after = subject.vm.usage().await;
    println!("    private memory {} MiB, then {} MiB", before.private_bytes >> 20, after.private_bytes >> 20);
    assert!(after.private_bytes >= before.private_bytes + (24 << 20), "{before:?} {after:?}");
    assert!(after.cpu_micros > before.cpu_micros);
    end(subject).await;
}

async fn outside(suite: &Suite<'_>) {
    let Some(address) = suite.bench.outside() else {
        println!("SKIPPED: this host has no address that a guest may connect to; run it as root");
        return;
    };
    let listener = TcpListener::bind((address, 0)).await.expect("the address is this host's");
    let place = listener.local_addr().expect("it is bound");
    let host = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    let closed = suite.launch().await;
    let nowhere = within("a connect", try_get(&*closed.vm, &format!("/fetch/{place}/hello"))).await;
    assert!(nowhere.as_ref().is_err_and(|error| error.contains("unreachable")), "{nowhere:?}");
    end(closed).await;

    let mut subject = suite.launch_as(&*suite.engine, LaunchSpec { egress: Egress::Internet, ..suite.launch_spec() }).await;
    let out = |subject: &Subject| {
        let vm = subject.vm.clone();
        async move { get(&*vm, &format!("/fetch/{place}/hello")).await }
    };
    assert_eq!(out(&subject).await, "hello");
    // A private network, and nobody but the operator opens one.
    let private = within("a connect", try_get(&*subject.vm, &format!("/fetch/10.0.0.1:{}/hello", place.port()))).await;
    assert!(private.is_err(), "{private:?}");
    assert_eq!(get(&*subject.vm, &format!("/hold/{place}")).await, "held");
    suspend(&subject).await;
    let spec = RestoreSpec { egress: Egress::Internet, ..suite.restore_spec(&subject) };
    let started = within("restore", suite.engine.restore(spec)).await.unwrap_or_else(|error| panic!("restore: {}", chain(&error)));
    (subject.vm, subject.generation) = (started.vm, subject.generation.next());
    assert_eq!(get(&*subject.vm, "/held").await, "ConnectionReset", "a connection of before the sleep");
    assert_eq!(out(&subject).await, "hello");
    end(subject).await;
    host.abort();
}
