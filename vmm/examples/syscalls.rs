//! Which system calls the process makes in practice, by class of threads, beside what its filters permit.
//!
//! ```text
//! DORMOUSE_TRACE=/tmp/trace cargo test -p vmm --test scenario     the tests attach strace to every process they start
//! cargo run -p vmm --example syscalls -- /tmp/trace               reads what it wrote
//! ```
//! A trace may be of any run: `strace -f -n --decode-pids=comm -e raw=all -o FILE -p PID`, begun before `Prepare`. Lines of a
//! thread count from the call that installs its filter.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use vmm::jail::seccomp::{self, Class};

/// One call as strace tells it: whose, which, and its arguments in hexadecimal.
struct Call<'a> {
    thread: &'a str,
    class: Option<Class>,
    number: i64,
    name: &'a str,
    arguments: Vec<u64>,
}

fn parse(line: &str) -> Option<Call<'_>> {
    let (thread, rest) = line.split_once('[')?;
    let (number, rest) = rest.split_once(']')?;
    let (name, arguments) = rest.trim_start().split_once('(')?;
    let arguments = arguments.split([',', ')']).map_while(|argument| {
        let argument = argument.trim();
        argument.strip_prefix("0x").map_or_else(|| argument.parse().ok(), |digits| u64::from_str_radix(digits, 16).ok())
    });
    let comm = thread.split_once('<')?.1.trim_end().strip_suffix('>')?;
    let class = match comm {
        "dormouse-vmm" => Some(Class::Main),
        "block" => Some(Class::Block),
        _ if comm.starts_with("vcpu") => Some(Class::Vcpu),
        _ => None,
    };
    Some(Call { thread, class, number: number.trim().parse().ok()?, name, arguments: arguments.collect() })
}

fn main() {
    let Some(dir) = std::env::args_os().nth(1) else {
        eprintln!("usage: syscalls DIR   (a directory of traces; see the head of examples/syscalls.rs)");
        std::process::exit(64);
    };
    let mut used: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
    let mut numbers: BTreeMap<String, BTreeSet<i64>> = BTreeMap::new();
    for entry in fs::read_dir(dir).expect("the directory of traces can be read") {
        let text = fs::read(entry.expect("its entries too").path()).expect("and the traces");
        let text = String::from_utf8_lossy(&text);
        let mut filtered = BTreeSet::new();
        for call in text.lines().filter_map(parse) {
            let Some(class) = call.class else { continue };
            if call.number == libc::SYS_seccomp {
                filtered.insert(call.thread);
                continue;
            }
            if !filtered.contains(call.thread) {
                continue;
            }
            let detail = match (call.number, call.arguments.as_slice()) {
                (libc::SYS_ioctl, [_, request, ..]) => format!("{} {request:#x}", call.name),
                (libc::SYS_fcntl, [_, command, ..]) => format!("{} {command}", call.name),
                (libc::SYS_mmap, [_, _, prot, flags, ..]) => format!("{} prot={prot:#x} flags={flags:#x}", call.name),
                (libc::SYS_tgkill, [_, _, signal, ..]) => format!("{} signal={signal}", call.name),
                _ => call.name.to_owned(),
            };
            let class = format!("{class:?}");
            *used.entry(class.clone()).or_default().entry(detail).or_default() += 1;
            numbers.entry(class).or_default().insert(call.number);
        }
    }
    for class in [Class::Main, Class::Vcpu, Class::Block] {
        let name = format!("{class:?}");
        println!("{name}");
        for (call, count) in used.get(&name).into_iter().flatten() {
            println!("  {count:>8}  {call}");
        }
        let permitted = seccomp::calls(class).expect("the lists are well formed");
        let made = numbers.remove(&name).unwrap_or_default();
        let unused: Vec<_> = permitted.iter().filter(|number| !made.contains(number)).map(i64::to_string).collect();
        println!("            permitted and not made (by number): {}", unused.join(" "));
    }
}
