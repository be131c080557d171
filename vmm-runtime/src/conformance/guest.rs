//! Talking to the app in a guest.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{HTTP, chain};
use crate::engine::{GuestStream, Vm};

const LIMIT: Duration = Duration::from_secs(30);

/// Does not wait for ever.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("{what}: nothing within {LIMIT:?}"))
}

/// The body of the app's answer.
pub async fn get(vm: &dyn Vm, path: &str) -> String {
    let answer = within(path, try_get(vm, path)).await;
    answer.unwrap_or_else(|error| panic!("GET {path}: {error}"))
}

/// The body of the app's answer, if there is one.
pub async fn try_get(vm: &dyn Vm, path: &str) -> Result<String, String> {
    let mut stream = vm.dial(HTTP).await.map_err(|error| chain(&error))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: guest\r\n\r\n").as_bytes()).await.map_err(|error| error.to_string())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.map_err(|error| error.to_string())?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200 ") => Ok(body.to_owned()),
        _ => Err(format!("the answer was {answer:?}")),
    }
}

/// A number that the app answers.
pub async fn number(vm: &dyn Vm, path: &str) -> u128 {
    let text = get(vm, path).await;
    text.parse().unwrap_or_else(|_| panic!("GET {path}: {text:?} is no number"))
}

/// Bytes that depend on their place.
pub fn pattern(from: usize, length: usize) -> Vec<u8> {
    (from..from + length).map(|at| (at.wrapping_mul(31) ^ (at >> 8)) as u8).collect()
}

/// Sends a pattern through an echo and compares what comes back.
pub async fn echo(stream: &mut GuestStream, from: usize, length: usize) {
    let sent = pattern(from, length);
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut received = vec![0; length];
    let both = async {
        let write = async { writer.write_all(&sent).await };
        let read = async { reader.read_exact(&mut received).await };
        tokio::try_join!(write, read)
    };
    within("echo", both).await.expect("the stream is whole");
    assert!(received == sent, "the echo changed the bytes");
}
