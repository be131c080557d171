//! The app of the boot test: one static program, standard library and libc only. A connection sends one line and gets an
//! answer to it. Port 7000 echoes, on IPv6 only.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    thread,
    time::{Duration, SystemTime},
};

unsafe extern "C" {
    fn kill(pid: i32, signal: i32) -> i32;
}

fn file(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| format!("{path}: {error}"))
}

fn answer(line: &str) -> String {
    let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
    match verb {
        "pid" => std::process::id().to_string(),
        "cwd" => std::env::current_dir().unwrap().display().to_string(),
        "env" => std::env::var(rest).unwrap_or_default(),
        "read" => file(rest),
        "is-dir" => fs::metadata(rest).is_ok_and(|found| found.is_dir()).to_string(),
        "list" => fs::read_dir(rest).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>().join(" "),
        "write" => {
            let (path, text) = rest.split_once(' ').unwrap();
            fs::write(path, text).map_or_else(|error| error.to_string(), |()| "written".to_owned())
        }
        "now-ns" => SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos().to_string(),
        "print" => {
            println!("{rest}");
            eprintln!("and an error");
            "printed".to_owned()
        }
        // By path, as images do whose log file is a link to it.
        "print-by-path" => fs::OpenOptions::new().write(true).open("/dev/stdout").and_then(|mut out| writeln!(out, "{rest}")).map_or_else(|error| error.to_string(), |()| "printed".to_owned()),
        "flood" => {
            thread::spawn(|| {
                for _ in 0..10_000 {
                    println!("{}", "x".repeat(99));
                }
            });
            "flooding".to_owned()
        }
        "kill-everyone" => unsafe { kill(-1, 9) }.to_string(),
        // A grandchild whose parent ends at once becomes a child of PID 1.
        "orphan" => {
            let mut child = Command::new("/probe");
            child.arg("fork").stdin(Stdio::null()).process_group(0);
            child.status().unwrap().to_string()
        }
        "exit" => std::process::exit(rest.parse().unwrap()),
        "abort" => std::process::abort(),
        _ => format!("? {line}"),
    }
}

fn serve(stream: TcpStream) {
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    let _ = (&stream).write_all(answer(line.trim_end()).as_bytes());
}

fn main() {
    if std::env::args().nth(1).as_deref() == Some("fork") {
        Command::new("/probe").arg("rest").spawn().unwrap();
        return;
    }
    if std::env::args().nth(1).as_deref() == Some("rest") {
        thread::sleep(Duration::from_millis(10));
        return;
    }
    println!("the probe starts");
    let echo = TcpListener::bind("[::1]:7000").unwrap();
    thread::spawn(move || {
        for stream in echo.incoming().flatten() {
            thread::spawn(move || {
                let _ = std::io::copy(&mut &stream, &mut &stream);
            });
        }
    });
    let listener = TcpListener::bind("127.0.0.1:8080").unwrap();
    for stream in listener.incoming().flatten() {
        thread::spawn(move || serve(stream));
    }
}
