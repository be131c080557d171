//! The app that the conformance suite runs in its guests. Standard library only, so that one file is one static program.
//!
//! Answers HTTP on port 8080 (see `answer`) and echoes bytes on port 7000. Ports can be changed by two arguments.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Instant, SystemTime},
};

static COUNTER: AtomicU64 = AtomicU64::new(0);
static MEMORY: Mutex<Vec<u64>> = Mutex::new(Vec::new());

fn random() -> io::Result<String> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Fills this many MiB with numbers that depend on their place, and sums them up.
fn fill(mib: u64) -> u64 {
    let mut memory = MEMORY.lock().unwrap();
    *memory = (0..mib << 17).map(|at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1).collect();
    memory.iter().fold(0, |sum, number| sum.rotate_left(1) ^ number)
}

fn sum() -> u64 {
    MEMORY.lock().unwrap().iter().fold(0, |sum, number| sum.rotate_left(1) ^ number)
}

fn answer(path: &str, begun: Instant) -> io::Result<String> {
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    Ok(match parts[..] {
        ["count"] => (COUNTER.fetch_add(1, Ordering::SeqCst) + 1).to_string(),
        ["pid"] => std::process::id().to_string(),
        ["random"] => random()?,
        ["realtime-ns"] => SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos().to_string(),
        ["uptime-ms"] => begun.elapsed().as_millis().to_string(),
        ["fill", mib] => fill(mib.parse().unwrap_or(1)).to_string(),
        ["sum"] => sum().to_string(),
        ["write", name, text] => {
            let mut file = File::create(format!("/data-{name}"))?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            "written".to_owned()
        }
        ["read", name] => std::fs::read_to_string(format!("/data-{name}"))?,
        ["print", text] => {
            println!("{text}");
            "printed".to_owned()
        }
        ["exit", code] => std::process::exit(code.parse().unwrap_or(1)),
        _ => "hello".to_owned(),
    })
}

fn serve(stream: TcpStream, begun: Instant) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or("/");
    let (status, body) = match answer(path, begun) {
        Ok(body) => ("200 OK", body),
        Err(error) => ("500 Internal Server Error", error.to_string()),
    };
    let mut stream = stream;
    write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.shutdown(std::net::Shutdown::Write),
            n => stream.write_all(&buffer[..n])?,
        }
    }
}

fn listen(port: u16, handle: fn(TcpStream, Instant) -> io::Result<()>) {
    let begun = Instant::now();
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("the port is free");
    println!("listening on {}", listener.local_addr().expect("it is bound"));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || handle(stream, begun));
        }
    });
}

fn main() {
    let mut ports = std::env::args().skip(1).map(|port| port.parse().expect("a port"));
    // The echo port first: the suite takes the HTTP port for readiness.
    listen(ports.next().unwrap_or(7000), |stream, _| echo(stream));
    listen(ports.next().unwrap_or(8080), serve);
    loop {
        thread::park();
    }
}
