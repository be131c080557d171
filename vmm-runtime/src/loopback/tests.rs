//! What tests above the engine rely on.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::engine::{DialError, SuspendOutcome};

async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                tokio::io::copy(&mut from, &mut to).await
            });
        }
    });
    address
}

fn port(number: u16) -> Port {
    Port::new(number).unwrap()
}

async fn launched(engine: &LoopbackEngine, dir: &Path) -> (MicrovmId, Arc<dyn Vm>) {
    let id = MicrovmId::random();
    let spec = LaunchSpec { id, dir: dir.to_owned(), image_dir: dir.join("image"), identity: BTreeMap::new(), egress: Default::default() };
    (id, engine.launch(spec).await.unwrap().vm)
}

fn restore(id: MicrovmId, dir: &Path, generation: u64, predecessor: Option<Arc<dyn Vm>>) -> RestoreSpec {
    RestoreSpec { id, dir: dir.to_owned(), image_dir: dir.join("image"), generation: Generation(generation), predecessor, identity: BTreeMap::new(), egress: Default::default() }
}

#[tokio::test]
async fn a_stream_survives_a_sleep_and_what_was_written_meanwhile_arrives() {
    let (engine, dir) = (LoopbackEngine::new(), tempfile::tempdir().unwrap());
    engine.listen(port(8080), echo().await);
    let (id, vm) = launched(&engine, dir.path()).await;
    let mut stream = vm.dial(port(8080)).await.unwrap();
    stream.write_all(b"awake").await.unwrap();
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).await.unwrap();

    let outcome = vm.suspend(CancellationToken::new()).await.unwrap();
    assert!(matches!(outcome, SuspendOutcome::Suspended(record) if record.generation == Generation(0)));
    assert!(matches!(vm.dial(port(8080)).await, Err(DialError::Asleep)));
    stream.write_all(b"sleep").await.unwrap();
    vm.parked_write().await;

    let started = engine.restore(restore(id, dir.path(), 1, Some(vm.clone()))).await.unwrap();
    started.vm.release_streams();
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"sleep");
    vm.kill().await;
    stream.write_all(b"again").await.unwrap();
    stream.read_exact(&mut answer).await.unwrap();
    started.vm.kill().await;
    assert_eq!(stream.read(&mut answer).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_held_suspend_is_taken_back_and_a_held_restore_waits() {
    let (engine, dir) = (LoopbackEngine::new(), tempfile::tempdir().unwrap());
    let (id, vm) = launched(&engine, dir.path()).await;
    let (hold, cancel) = (engine.hold_suspends(SuspendStep::BeforeCommit), CancellationToken::new());
    let (outcome, ()) = tokio::join!(vm.suspend(cancel.clone()), async {
        hold.arrived(1).await;
        cancel.cancel();
    });
    assert_eq!(outcome.unwrap(), SuspendOutcome::TakenBack);
    assert_eq!(engine.committed(dir.path().to_owned()).await.unwrap(), None);
    drop(hold);

    vm.suspend(CancellationToken::new()).await.unwrap();
    let hold = engine.hold_restores();
    engine.fail_next_restore(EngineError::Host { what: "test".to_owned() });
    let (failed, ()) = tokio::join!(engine.restore(restore(id, dir.path(), 1, None)), async {
        hold.arrived(1).await;
        hold.release();
    });
    assert!(matches!(failed, Err(EngineError::Host { .. })));
    assert!(engine.restore(restore(id, dir.path(), 1, None)).await.is_ok());
    assert_eq!(engine.counts().restores, 2);
}

#[tokio::test]
async fn processes_outlive_a_restart_and_exits_are_told_to_whom_adopted_them() {
    let (engine, dir) = (LoopbackEngine::new(), tempfile::tempdir().unwrap());
    let (id, vm) = launched(&engine, dir.path()).await;
    drop(vm);
    let after = engine.clone();
    assert!(after.adopt(MicrovmId::random(), dir.path().to_owned(), dir.path().to_owned(), Generation(0)).await.unwrap().is_none());
    let vm = after.adopt(id, dir.path().to_owned(), dir.path().to_owned(), Generation(0)).await.unwrap().unwrap();
    let exit = Exit::App { code: 3 };
    assert!(after.exit(id, exit.clone()));
    assert_eq!(vm.exited().await, exit);
    assert!(after.running().is_empty());
}
