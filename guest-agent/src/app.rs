//! The app: from what the image says to a running process, and its output.

use std::{
    ffi::{CString, NulError},
    fs,
    io::{self, ErrorKind},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::fchown,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use protocol::{agent::AppSpec, guest::GuestEnd};
use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{Pid, Rlimit},
};
use tokio::{io::AsyncReadExt, net::unix::pipe};

use crate::{
    cgroup::AppCgroup,
    machine::SetupError,
    sys::{self, Failure, Launch, Role, Step},
    users::{self, User, UserError},
};

/// Open files: 1024 for programs that still use `select`, and as Docker has it for those that ask for more.
const NOFILE: Rlimit = Rlimit { current: Some(1024), maximum: Some(1_048_576) };
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long the app's output may wait for the host before it is dropped.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(2);

/// Why the app did not start. The sentences are for whoever built the image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("the image has neither an ENTRYPOINT nor a CMD")]
    NoProgram,
    #[error("the app could not be started: {0}")]
    User(#[from] UserError),
    #[error("the app could not be started: an argument or variable holds a NUL byte")]
    Nul(#[from] NulError),
    #[error("the app could not be started: {0}")]
    Setup(#[from] SetupError),
    #[error("the app could not be started: {what}: {why}")]
    Program { what: String, why: String },
    #[error("the app could not be started: {doing}: {source}")]
    System { doing: &'static str, source: io::Error },
}

/// Names what failed.
pub(crate) fn system(doing: &'static str) -> impl Fn(io::Error) -> StartError {
    move |source| StartError::System { doing, source }
}

/// A running app.
pub(crate) struct App {
    pub pid: Pid,
    /// Its stdout and stderr.
    pub output: pipe::Receiver,
}

/// Starts the app in the root file system as it is now.
pub(crate) async fn start(spec: &AppSpec, cgroup: &AppCgroup) -> Result<App, StartError> {
    let program = spec.argv.first().ok_or(StartError::NoProgram)?;
    let user = user(spec)?;
    let (output, app_output) = pipe()?;
    blocking(&app_output).map_err(system("making a pipe"))?;
    // `/dev/stdout` is opened by path by many images, also by those that do not run as root.
    fchown(&app_output, Some(user.uid.as_raw()), Some(user.gid.as_raw())).map_err(system("handing over a pipe"))?;
    let stdin = fs::File::open("/dev/null").map_err(system("opening /dev/null"))?.into();
    let pid = run(spec, program.clone(), Role::App { stdin, output: app_output }, cgroup.open()?).await?;
    Ok(App { pid, output: pipe::Receiver::from_owned_fd(output).map_err(system("watching a pipe"))? })
}

fn user(spec: &AppSpec) -> Result<User, UserError> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    users::resolve(&spec.user, &read("/etc/passwd"), &read("/etc/group"))
}

fn pipe() -> Result<(OwnedFd, OwnedFd), StartError> {
    pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(|errno| system("making a pipe")(errno.into()))
}

/// Makes a process that is `role` and runs `program`, with what else `spec` says, and waits until it does.
pub(crate) async fn run(spec: &AppSpec, program: String, role: Role, cgroup: OwnedFd) -> Result<Pid, StartError> {
    let user = user(spec)?;
    let workdir = if spec.workdir.is_empty() { "/" } else { &spec.workdir };
    fs::create_dir_all(workdir).map_err(|error| StartError::Program { what: workdir.to_owned(), why: error.to_string() })?;

    let (failed, failure) = pipe()?;
    let launch = Launch {
        role,
        candidates: candidates(&program, workdir, path(spec)).into_iter().map(c_string).collect::<Result<_, _>>()?,
        argv: spec.argv.iter().map(|argument| c_string(argument.as_str())).collect::<Result<_, _>>()?,
        env: spec.env.iter().map(|(key, value)| c_string(format!("{key}={value}"))).collect::<Result<_, _>>()?,
        workdir: c_string(workdir)?,
        uid: user.uid,
        gid: user.gid,
        groups: user.groups,
        failure,
        cgroup,
        nofile: NOFILE,
        capabilities: spec.rights.capabilities,
    };
    let pid = sys::launch(&launch).map_err(system("making a process"))?;
    // This process's copies of the write ends: the pipes must end with the app.
    drop(launch);

    let mut failed = pipe::Receiver::from_owned_fd(failed).map_err(system("watching a pipe"))?;
    let mut failure = Vec::new();
    failed.read_to_end(&mut failure).await.map_err(system("waiting for the program"))?;
    if failure.is_empty() {
        return Ok(pid);
    }
    let failure = Failure::parse(&failure).ok_or_else(|| system("waiting for the program")(ErrorKind::InvalidData.into()))?;
    Err(explain(failure, &program, workdir, path(spec)))
}

/// Output is read without waiting here and written with waiting there.
fn blocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags - rustix::fs::OFlags::NONBLOCK)?)
}

fn c_string(text: impl Into<Vec<u8>>) -> Result<CString, NulError> {
    CString::new(text)
}

fn path(spec: &AppSpec) -> &str {
    spec.env.iter().find(|(key, _)| key == "PATH").map_or(DEFAULT_PATH, |(_, path)| path)
}

/// Where a program is looked for: as it stands if it has a slash, else in PATH.
fn candidates(program: &str, workdir: &str, path: &str) -> Vec<String> {
    if program.contains('/') {
        return vec![program.to_owned()];
    }
    let join = |directory: &str| Path::new(workdir).join(directory).join(program).to_string_lossy().into_owned();
    path.split(':').map(join).collect()
}

fn explain(failure: Failure, program: &str, workdir: &str, path: &str) -> StartError {
    let error = io::Error::from_raw_os_error(failure.errno);
    let doing = match failure.step {
        Step::Namespaces => "giving it namespaces",
        Step::Limits => "setting its limits",
        Step::User => "changing to its user",
        Step::Workdir => return StartError::Program { what: workdir.to_owned(), why: format!("entering the working directory failed: {error}") },
        Step::Exec => {
            let found = candidates(program, workdir, path).into_iter().map(|candidate| PathBuf::from(workdir).join(candidate)).find(|path| path.exists());
            let why = match (error.kind(), found) {
                (ErrorKind::NotFound, Some(found)) => format!("{} is there, but the interpreter or loader it asks for is not", found.display()),
                (ErrorKind::NotFound, None) if program.contains('/') => "not found".to_owned(),
                (ErrorKind::NotFound, None) => format!("not found in PATH ({path})"),
                (ErrorKind::PermissionDenied, _) => "permission denied (is it executable for the image's USER?)".to_owned(),
                _ if failure.errno == rustix::io::Errno::NOEXEC.raw_os_error() => {
                    "not a program this machine can run (built for another processor, or a script without #!)".to_owned()
                }
                _ => error.to_string(),
            };
            return StartError::Program { what: program.to_owned(), why };
        }
    };
    StartError::System { doing, source: error }
}

/// Carries the app's output to the host until every process that holds the pipe has ended.
pub(crate) async fn forward_output(mut output: pipe::Receiver, end: GuestEnd) {
    let mut piece = vec![0; 32 * 1024];
    loop {
        match output.read(&mut piece).await {
            Ok(0) => return,
            Ok(read) => end.output(&piece[..read], OUTPUT_PATIENCE).await,
            Err(error) => return crate::say!("reading the app's output (pipe {}) failed: {error}", output.as_raw_fd()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_like_a_shell_does() {
        assert_eq!(candidates("/bin/app", "/srv", "/bin"), ["/bin/app"]);
        assert_eq!(candidates("./app", "/srv", "/bin"), ["./app"]);
        assert_eq!(candidates("app", "/srv", "/usr/bin:/bin"), ["/usr/bin/app", "/bin/app"]);
        assert_eq!(candidates("app", "/srv", "bin:"), ["/srv/bin/app", "/srv/app"]);
    }

    #[test]
    fn a_failure_survives_its_pipe() {
        let parsed = Failure::parse(&[Step::Exec as u8, 2, 0, 0, 0]).expect("it is well formed");
        assert_eq!((parsed.step, parsed.errno), (Step::Exec, 2));
        assert!(Failure::parse(&[]).is_none() && Failure::parse(&[9, 0, 0, 0, 0]).is_none() && Failure::parse(&[1, 2]).is_none());
        let text = explain(parsed, "/foo", "/", DEFAULT_PATH).to_string();
        assert_eq!(text, "the app could not be started: /foo: not found");
    }
}
