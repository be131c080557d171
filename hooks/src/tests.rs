//! The client against servers on loopback sockets: hyper's own, and ones that break the rules.

use std::{collections::VecDeque, convert::Infallible, net::SocketAddr, sync::Arc};

use http::{HeaderMap, Method, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use model::{Port, chain};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use vmm_runtime::{
    engine::{Engine as _, Exit, LaunchSpec},
    loopback::LoopbackEngine,
};

use super::*;

const PORT: Port = Port::DEFAULT;
/// Never the reason why a test passes.
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(300);

/// What the app was sent.
#[derive(Debug)]
struct Heard {
    from: SocketAddr,
    method: Method,
    path: String,
    headers: HeaderMap,
    body: Vec<u8>,
}

/// A microVM with an app that answers what it is told, one status after the other, the last one for ever.
struct Bench {
    engine: LoopbackEngine,
    id: MicrovmId,
    vm: Arc<dyn Vm>,
    heard: Arc<Mutex<Vec<Heard>>>,
    _dir: tempfile::TempDir,
}

impl Bench {
    async fn silent() -> Self {
        let (engine, dir, id) = (LoopbackEngine::new(), tempfile::tempdir().unwrap(), MicrovmId::random());
        let spec = LaunchSpec { id, dir: dir.path().to_owned(), image_dir: dir.path().to_owned(), identity: Default::default(), egress: Default::default() };
        let vm = engine.launch(spec).await.unwrap().vm;
        Self { engine, id, vm, heard: Arc::default(), _dir: dir }
    }

    async fn answering(statuses: &[u16]) -> Self {
        let bench = Self::silent().await;
        bench.answers(statuses).await;
        bench
    }

    async fn answers(&self, statuses: &[u16]) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.engine.listen(PORT, listener.local_addr().unwrap());
        let statuses: Arc<Mutex<VecDeque<u16>>> = Arc::new(Mutex::new(statuses.iter().copied().collect()));
        let heard = Arc::clone(&self.heard);
        tokio::spawn(async move {
            while let Ok((stream, from)) = listener.accept().await {
                let (statuses, heard) = (Arc::clone(&statuses), Arc::clone(&heard));
                let service = service_fn(move |request: Request<Incoming>| {
                    let (statuses, heard) = (Arc::clone(&statuses), Arc::clone(&heard));
                    async move {
                        let (head, body) = request.into_parts();
                        let body = body.collect().await.unwrap().to_bytes().to_vec();
                        heard.lock().push(Heard { from, method: head.method, path: head.uri.to_string(), headers: head.headers, body });
                        let mut statuses = statuses.lock();
                        let status = if statuses.len() > 1 { statuses.pop_front() } else { statuses.front().copied() };
                        Ok::<_, Infallible>(Response::builder().status(status.unwrap()).body(Full::<Bytes>::from("answer")).unwrap())
                    }
                });
                tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
    }

    /// Connections are handled by hand.
    async fn raw<F: Future<Output = ()> + Send>(&self, handle: impl Fn(usize, TcpStream) -> F + Send + 'static) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.engine.listen(PORT, listener.local_addr().unwrap());
        tokio::spawn(async move {
            for number in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                handle(number, stream).await;
            }
        });
    }

    async fn call(&self, hook: Hook, limit: Duration, body: Option<Bytes>) -> Result<(), Outcome> {
        let mut hooks = Hooks::none(PORT);
        hooks.enable(hook, limit);
        let called = tokio::time::timeout(LONG, call(&*self.vm, &hooks, hook, body)).await.expect("it ends by itself");
        called.map_err(|failed| {
            assert_eq!((failed.hook, failed.limit), (hook, limit), "{}", chain(&failed));
            failed.outcome
        })
    }
}

fn status(code: u16) -> Outcome {
    Outcome::Answered(StatusCode::from_u16(code).unwrap())
}

#[tokio::test]
async fn each_call_is_a_post_of_its_own_connection() {
    let bench = Bench::answering(&[200]).await;
    let payload = RunPayload(r#"{"tenant": "ä"}"#.to_owned());
    bench.call(Hook::Run, LONG, Some(run_body(bench.id, Some(&payload)))).await.unwrap();
    bench.call(Hook::Suspend, LONG, None).await.unwrap();
    bench.call(Hook::Resume, LONG, None).await.unwrap();
    let heard = bench.heard.lock();
    let paths: Vec<&str> = heard.iter().map(|call| call.path.as_str()).collect();
    assert_eq!(paths, ["run", "suspend", "resume"].map(|hook| format!("/aws/lambda-microvms/runtime/v1/{hook}")));
    for call in heard.iter() {
        assert_eq!(call.method, Method::POST);
        assert_eq!(call.headers["host"], format!("localhost:{PORT}"));
        assert_eq!(call.headers["connection"], "close");
        assert_eq!(call.headers["content-length"], call.body.len().to_string());
    }
    let run: serde_json::Value = serde_json::from_slice(&heard[0].body).unwrap();
    assert_eq!(run, json!({"microvmId": bench.id.to_string(), "runHookPayload": r#"{"tenant": "ä"}"#}));
    assert_eq!(heard[0].headers["content-type"], "application/json");
    assert!(heard[1].body.is_empty() && !heard[1].headers.contains_key("content-type"));
    assert!(heard[0].from != heard[1].from && heard[1].from != heard[2].from, "a connection was used twice");
}

#[tokio::test]
async fn each_try_of_ready_has_a_number_of_its_own() {
    let bench = Bench::answering(&[503, 200]).await;
    bench.call(Hook::Ready, LONG, None).await.unwrap();
    bench.call(Hook::Validate, LONG, None).await.unwrap();
    let heard = bench.heard.lock();
    let numbers: Vec<Option<&str>> = heard.iter().map(|call| call.headers.get("x-amzn-requestid").map(|id| id.to_str().unwrap())).collect();
    let [Some(first), Some(second), None] = numbers[..] else { panic!("{numbers:?}") };
    assert!(first != second && first.len() == 36, "{numbers:?}");
}

#[tokio::test]
async fn a_run_without_a_payload_has_an_empty_one() {
    let body: serde_json::Value = serde_json::from_slice(&run_body(MicrovmId::random(), None)).unwrap();
    assert_eq!(body["runHookPayload"], "");
}

#[tokio::test]
async fn a_hook_that_is_disabled_is_not_called() {
    let bench = Bench::answering(&[500]).await;
    call(&*bench.vm, &Hooks::none(PORT), Hook::Run, None).await.unwrap();
    assert!(bench.heard.lock().is_empty());
}

#[tokio::test]
async fn only_200_is_a_yes_and_an_answer_is_final() {
    for code in [201, 204, 301, 400, 404, 500, 503] {
        let bench = Bench::answering(&[code, 200]).await;
        assert_eq!(bench.call(Hook::Run, LONG, None).await.unwrap_err(), status(code));
        assert_eq!(bench.heard.lock().len(), 1);
    }
}

#[tokio::test]
async fn a_build_waits_while_the_app_says_503_and_for_nothing_else() {
    for hook in [Hook::Ready, Hook::Validate] {
        let bench = Bench::answering(&[503, 503, 503, 200]).await;
        bench.call(hook, LONG, None).await.unwrap();
        assert_eq!(bench.heard.lock().len(), 4);
        let bench = Bench::answering(&[500, 200]).await;
        assert_eq!(bench.call(hook, LONG, None).await.unwrap_err(), status(500));
        let bench = Bench::answering(&[503]).await;
        assert_eq!(bench.call(hook, SHORT, None).await.unwrap_err(), status(503));
    }
}

#[tokio::test]
async fn a_listener_that_comes_late_is_waited_for() {
    let bench = Bench::silent().await;
    let late = async {
        bench.engine.counted(|counts| counts.dials >= 3).await;
        bench.answers(&[200]).await;
    };
    let (called, ()) = tokio::join!(bench.call(Hook::Resume, LONG, None), late);
    called.unwrap();
}

#[tokio::test]
async fn a_listener_that_never_comes_is_a_refusal() {
    let bench = Bench::silent().await;
    assert_eq!(bench.call(Hook::Resume, SHORT, None).await.unwrap_err(), Outcome::Refused);
    assert!(bench.engine.counts().dials > 1);
}

#[tokio::test]
async fn a_connection_that_breaks_before_the_answer_is_tried_again() {
    let bench = Bench::silent().await;
    bench
        .raw(|number, mut stream| async move {
            let mut request = [0; 16];
            let _ = stream.read(&mut request).await;
            // The first two see the request and drop it without a word.
            if number >= 2 {
                let _ = stream.write_all(b"HTTP/1.0 200 fine\r\n\r\n").await;
            }
        })
        .await;
    bench.call(Hook::Suspend, LONG, None).await.unwrap();
    assert_eq!(bench.engine.counts().dials, 3);
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_not_asked_for_again() {
    for answer in [&b"HTTP/1.1 20"[..], b"SSH-2.0-OpenSSH\r\n"] {
        let bench = Bench::silent().await;
        bench
            .raw(move |_, mut stream| async move {
                let _ = stream.read(&mut [0; 16]).await;
                let _ = stream.write_all(answer).await;
            })
            .await;
        let outcome = bench.call(Hook::Run, LONG, None).await.unwrap_err();
        assert!(matches!(outcome, Outcome::Transport(_)), "{outcome:?}");
        assert_eq!(bench.engine.counts().dials, 1);
    }
}

#[tokio::test]
async fn an_app_that_does_not_answer_costs_its_time_and_no_more() {
    let bench = Bench::silent().await;
    bench
        .raw(|_, stream| async move {
            tokio::spawn(async move {
                let _open = stream;
                std::future::pending::<()>().await;
            });
        })
        .await;
    assert_eq!(bench.call(Hook::Run, SHORT, None).await.unwrap_err(), Outcome::TimedOut);
    assert_eq!(bench.engine.counts().dials, 1, "the app has the call; asking again would be another one");
}

#[tokio::test]
async fn a_body_without_an_end_changes_nothing() {
    let bench = Bench::silent().await;
    bench
        .raw(|_, mut stream| async move {
            let _ = stream.read(&mut [0; 16]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n").await;
            tokio::spawn(async move {
                let _open = stream;
                std::future::pending::<()>().await;
            });
        })
        .await;
    bench.call(Hook::Run, SHORT, None).await.unwrap();

    let bench = Bench::silent().await;
    bench
        .raw(|_, mut stream| async move {
            let _ = stream.read(&mut [0; 16]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
            // Ends when the client has had enough.
            while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
        })
        .await;
    bench.call(Hook::Run, LONG, None).await.unwrap();
}

#[tokio::test]
async fn a_header_without_an_end_is_cut() {
    let bench = Bench::silent().await;
    bench
        .raw(|_, mut stream| async move {
            let _ = stream.read(&mut [0; 16]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nx: ").await;
            while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
        })
        .await;
    let outcome = bench.call(Hook::Run, LONG, None).await.unwrap_err();
    assert!(matches!(outcome, Outcome::Transport(_)), "{outcome:?}");
}

#[tokio::test]
async fn the_end_of_the_app_ends_the_call() {
    let bench = Bench::silent().await;
    bench.raw(|_, _| std::future::pending()).await;
    let exit = Exit::App { code: 3 };
    let ending = async {
        bench.engine.counted(|counts| counts.dials >= 1).await;
        assert!(bench.engine.exit(bench.id, exit.clone()));
    };
    let (called, ()) = tokio::join!(bench.call(Hook::Run, LONG, None), ending);
    assert_eq!(called.unwrap_err(), Outcome::Ended(exit));
}
