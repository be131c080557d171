//! The app that the conformance suite runs in its guests. Standard library only, so that one file is one static program.
//!
//! Answers HTTP on port 8080 (see `answer`) and echoes bytes on port 7000. Ports can be changed by two arguments.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

/// What of libc, which the standard library links, is used here.
mod c {
    // SAFETY: as the manual pages have them; addresses are of `u32`s.
    unsafe extern "C" {
        pub fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
        pub fn bind(socket: i32, address: *const u32, bytes: u32) -> i32;
        pub fn listen(socket: i32, backlog: i32) -> i32;
        pub fn accept(socket: i32, address: *mut u32, bytes: *mut u32) -> i32;
        pub fn ioctl(fd: i32, request: i32, ...) -> i32;
    }
}

static COUNTER: AtomicU64 = AtomicU64::new(0);
static MEMORY: Mutex<Vec<u64>> = Mutex::new(Vec::new());
/// A connection to somewhere outside.
static OUTSIDE: Mutex<Option<TcpStream>> = Mutex::new(None);

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

/// Connections on a vsock port that have not ended.
static VSOCK_OPEN: AtomicU64 = AtomicU64::new(0);

/// Echoes bytes on a vsock port.
fn vsock_echo(port: u32) -> io::Result<String> {
    let descriptor = |made: i32| {
        if made < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(made) })
    };
    // AF_VSOCK, SOCK_STREAM. SAFETY: numbers only.
    let listener = descriptor(unsafe { c::socket(40, 1, 0) })?;
    // `struct sockaddr_vm`: family, port, any context.
    let address = [40, port, u32::MAX, 0];
    // SAFETY: an address of 16 bytes that lives through the call; then numbers only.
    if unsafe { c::bind(listener.as_raw_fd(), address.as_ptr(), 16) < 0 || c::listen(listener.as_raw_fd(), 128) < 0 } {
        return Err(io::Error::last_os_error());
    }
    thread::spawn(move || {
        // SAFETY: no address is wanted.
        while let Ok(stream) = descriptor(unsafe { c::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) }) {
            VSOCK_OPEN.fetch_add(1, Ordering::SeqCst);
            thread::spawn(move || {
                let mut stream = File::from(stream);
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                }
                VSOCK_OPEN.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    Ok("listening".to_owned())
}

/// Gives eth0 an address with a prefix of 30 bits and switches it on (netdevice(7)).
fn network_up(address: [u8; 4]) -> io::Result<String> {
    let any = UdpSocket::bind("0.0.0.0:0")?;
    let internet = |address: [u8; 4]| [2, 0, 0, 0, address[0], address[1], address[2], address[3]];
    // SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFFLAGS with IFF_UP.
    for (request, value) in [(0x8916, internet(address)), (0x891c, internet([255, 255, 255, 252])), (0x8914, [1, 0, 0, 0, 0, 0, 0, 0])] {
        let mut what = [0u8; 40];
        what[..4].copy_from_slice(b"eth0");
        what[16..24].copy_from_slice(&value);
        // SAFETY: all three read a `struct ifreq`, which has 40 bytes, at the pointer.
        if unsafe { c::ioctl(any.as_raw_fd(), request, what.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    std::fs::read_to_string("/sys/class/net/eth0/address").or_else(|_| Ok("up".to_owned()))
}

/// Sends a datagram, again and again, until an answer comes.
fn ask_network(to: &str, text: &str) -> io::Result<String> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let mut last = io::Error::from(io::ErrorKind::TimedOut);
    for _ in 0..20 {
        socket.send_to(text.as_bytes(), to)?;
        let mut buffer = [0; 1500];
        match socket.recv_from(&mut buffer) {
            Ok((length, _)) => return Ok(String::from_utf8_lossy(&buffer[..length]).into_owned()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Connects to an address and says something.
fn say_outside(to: &str, text: &str) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(text.as_bytes())?;
    Ok(stream)
}

/// What is answered until the end of the connection.
fn fetch(to: &str, text: &str) -> io::Result<String> {
    let mut stream = say_outside(to, text)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

/// What becomes of the connection that was left open.
fn held() -> io::Result<String> {
    let mut stream = OUTSIDE.lock().unwrap().take().ok_or(io::ErrorKind::NotFound)?;
    let mut byte = [0];
    Ok(match stream.read(&mut byte) {
        Ok(0) => "the end".to_owned(),
        Ok(_) => format!("a byte, {}", byte[0]),
        Err(error) => format!("{:?}", error.kind()),
    })
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
        ["vsock-echo", port] => vsock_echo(port.parse().map_err(io::Error::other)?)?,
        ["vsock-open"] => VSOCK_OPEN.load(Ordering::SeqCst).to_string(),
        ["network-up", address] => network_up(address.parse::<std::net::Ipv4Addr>().map_err(io::Error::other)?.octets())?,
        ["ask-network", to, text] => ask_network(to, text)?,
        ["fetch", to, text] => fetch(to, text)?,
        ["hold", to] => {
            let mut stream = say_outside(to, "x")?;
            stream.read_exact(&mut [0])?;
            *OUTSIDE.lock().unwrap() = Some(stream);
            "held".to_owned()
        }
        ["held"] => held()?,
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
