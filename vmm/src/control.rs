//! The event loop of the process: what the node asks, what the machine reports.
//!
//! Owns: the control listener and its one connection, the order in which requests are taken ([`order`]), and the words of a
//! refusal. Never touches KVM, guest memory or a device. Nothing that arrives on the socket may stop the process but
//! [`Request::Quit`]: a packet that is no message is answered with id 0, a request out of order changes nothing.
//!
//! One connection at a time. A second one is turned away while the first lives, and replaces it when its other end is gone, so
//! that a restarted node finds the machine as the old one left it. A save under way is given up when the node goes: what it
//! writes into has no owner any more, and the machine can go on or be saved again.

pub mod connection;
pub mod order;
pub mod requests;

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
};

use rustix::event::epoll;
use vmm_protocol::control::{Event, Fault, FromVmm, Reply, Request, ToVmm};

use self::{
    connection::{Connection, Heard},
    order::Phase,
};
use crate::{
    jail::{ProcessFiles, seccomp},
    machine::{Confine, Machine, MachineError},
};

/// Requests that may wait while a save is under way; more are refused. The node asks for counters now and then, and sends a
/// `Cancel`.
const MAX_WAITING: usize = 16;

const LISTENER: u64 = 1;
const CONNECTION: u64 = 2;
const MACHINE: u64 = 3;

/// A request with its descriptors.
type Packet = (ToVmm, Vec<OwnedFd>);

/// What is there before a machine is: used up by [`Request::Prepare`].
pub struct Parts {
    /// Goes to the vsock device.
    pub vsock: UnixListener,
    /// Go to the machine.
    pub process_files: ProcessFiles,
    /// Confines the machine's threads.
    pub confine: Confine,
}

/// The process, from its start to its end.
pub struct Server {
    epoll: OwnedFd,
    listener: OwnedFd,
    connection: Option<Connection>,
    /// Heard during a save, answered after it.
    waiting: VecDeque<Packet>,
    parts: Option<Parts>,
    machine: Option<Machine>,
    phase: Phase,
    /// How the guest ended, for every node that connects.
    stopped: Option<String>,
}

/// Whether the loop goes on.
enum Go {
    On,
    Quit,
}

impl Server {
    /// `listener` is the bound and listening `control` socket; it does not wait.
    pub fn new(listener: OwnedFd, parts: Parts) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
        Ok(Self { epoll, listener, connection: None, waiting: VecDeque::new(), parts: Some(parts), machine: None, phase: Phase::New, stopped: None })
    }

    /// Serves until the node says [`Request::Quit`]. An error is one of the event loop itself: nothing is served without it.
    pub fn serve(mut self) -> io::Result<()> {
        loop {
            if let Go::Quit = self.turn()? {
                return Ok(());
            }
        }
    }

    /// Waits for something to happen and does all of it.
    fn turn(&mut self) -> io::Result<Go> {
        let mut events = Vec::with_capacity(4);
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |token| events.iter().any(|event: &epoll::Event| event.data.u64() == token);
        // The machine first: a guest that has stopped is told before a request finds it so. The connection before the
        // listener: what an old node has asked for comes before a new one is heard.
        if ready(MACHINE) {
            self.dispatch();
        }
        if ready(CONNECTION)
            && let Go::Quit = self.hear()
        {
            return Ok(Go::Quit);
        }
        if ready(LISTENER) {
            return Ok(self.accept());
        }
        Ok(Go::On)
    }

    fn dispatch(&mut self) {
        let Some(stopped) = self.machine.as_mut().and_then(Machine::dispatch) else { return };
        tracing::info!(how = %stopped.how, "the guest has stopped");
        self.phase = Phase::Stopped;
        self.stopped = Some(stopped.how);
        self.tell_stopped();
    }

    fn tell_stopped(&mut self) {
        if let Some(how) = self.stopped.clone() {
            self.send(&FromVmm::Event(Event::GuestStopped { how: connection::shortened(&how) }), &[]);
        }
    }

    /// Takes one packet; the next is a new event, so that devices are not starved by a node that never stops talking.
    fn hear(&mut self) -> Go {
        let heard = self.connection.as_ref().map_or(Heard::Nothing, Connection::hear);
        match heard {
            Heard::Nothing => Go::On,
            Heard::Packet(packet, descriptors) => self.take(packet, descriptors),
            Heard::Nonsense(why) => {
                self.nonsense(&why);
                Go::On
            }
            Heard::End(why) => {
                self.hang_up(&why);
                Go::On
            }
        }
    }

    fn nonsense(&mut self, why: &str) {
        tracing::warn!(%why, "the node sent what is no request");
        self.reply(0, refused(Fault::Request, why), &[]);
    }

    fn hang_up(&mut self, why: &str) {
        // Closing takes it out of the epoll: nothing else holds the socket.
        if self.connection.take().is_some() {
            tracing::info!(%why, "the node's connection has ended; waiting for another");
        }
        self.waiting.clear();
    }

    fn accept(&mut self) -> Go {
        // What the old connection still holds is done before it is replaced: a last `Quit` for one.
        while self.connection.as_ref().is_some_and(Connection::is_gone) {
            if let Go::Quit = self.hear() {
                return Go::Quit;
            }
        }
        let accepted = match Connection::accept(&self.listener) {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Go::On,
            Err(error) => {
                tracing::warn!(%error, "a connection of a node could not be taken");
                return Go::On;
            }
        };
        if self.connection.is_some() {
            tracing::warn!("a second node was turned away while the first is connected");
            accepted.turn_away();
            return Go::On;
        }
        if let Err(error) = epoll::add(&self.epoll, accepted.as_fd(), epoll::EventData::new_u64(CONNECTION), epoll::EventFlags::IN) {
            tracing::warn!(%error, "a connection of a node could not be watched");
            return Go::On;
        }
        self.connection = Some(accepted);
        self.tell_stopped();
        Go::On
    }

    /// Does a request, and then what was asked meanwhile.
    fn take(&mut self, packet: ToVmm, descriptors: Vec<OwnedFd>) -> Go {
        let mut next = Some((packet, descriptors));
        while let Some((ToVmm { id, request }, descriptors)) = next {
            if request == Request::Quit {
                self.reply(id, requests::done(Vec::new()), &[]);
                return Go::Quit;
            }
            let (reply, descriptors) = self.answer(request, descriptors);
            self.reply(id, reply, &descriptors);
            next = self.waiting.pop_front();
        }
        Go::On
    }

    fn answer(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> (Reply, Vec<OwnedFd>) {
        let done = match order::admit(self.phase, &request, descriptors.len()) {
            Ok(()) => self.perform(request, descriptors),
            Err(why) => Err(MachineError { fault: Fault::Request, why }),
        };
        done.unwrap_or_else(|MachineError { fault, why }| {
            tracing::warn!(?fault, %why, "a request was not done");
            (refused(fault, &why), Vec::new())
        })
    }

    /// What [`order::admit`] has let through.
    fn perform(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> Result<(Reply, Vec<OwnedFd>), MachineError> {
        let reply = match request {
            Request::Prepare { .. } => {
                let shell = requests::shell(&request, descriptors)?;
                let parts = self.parts.take().ok_or_else(|| MachineError { fault: Fault::Request, why: requests::ONCE.to_owned() })?;
                self.prepare(shell.with(parts))?
            }
            Request::Boot { .. } | Request::Restore { .. } => {
                let booted = matches!(request, Request::Boot { .. });
                // What is refused here has touched nothing; what fails in the machine has.
                let origin = requests::origin(request, descriptors)?;
                let machine = some(&mut self.machine)?;
                let phases = origin.load(machine).inspect_err(|_| self.phase = Phase::Broken)?;
                self.phase = if booted { Phase::Running } else { Phase::Paused };
                requests::done(phases)
            }
            Request::Run => {
                some(&mut self.machine)?.run()?;
                self.phase = Phase::Running;
                requests::done(Vec::new())
            }
            Request::Pause => {
                some(&mut self.machine)?.pause()?;
                self.phase = Phase::Paused;
                requests::done(Vec::new())
            }
            Request::Save { kind } => return self.save(kind, descriptors),
            Request::Usage => Reply::Usage(some(&mut self.machine)?.usage()),
            Request::Console => Reply::Console { text: connection::tail(&some(&mut self.machine)?.console()) },
            // A save that could be cancelled hears of it itself; here none is under way any more.
            Request::Cancel | Request::Quit => requests::done(Vec::new()),
        };
        Ok((reply, Vec::new()))
    }

    fn prepare(&mut self, shell: crate::machine::Shell) -> Result<Reply, MachineError> {
        let began = std::time::Instant::now();
        let made = Machine::prepare(shell).and_then(|machine| {
            let watched = epoll::add(&self.epoll, machine.events(), epoll::EventData::new_u64(MACHINE), epoll::EventFlags::IN);
            watched.map_err(|error| requests::host("watching the machine's events", &error.into()))?;
            Ok(machine)
        });
        // Used up: the listener of the vsock device is gone with a machine that could not be made.
        self.machine = Some(made.inspect_err(|_| self.phase = Phase::Broken)?);
        let machine_us = requests::micros(began);
        // The last step into the jail: whatever comes from here on, a guest may have written.
        seccomp::install(seccomp::Class::Main).map_err(|error| {
            self.phase = Phase::Broken;
            requests::host("installing the filter of the main thread", &error)
        })?;
        self.phase = Phase::Ready;
        Ok(requests::done(vec![("machine".to_owned(), machine_us), ("filter".to_owned(), requests::micros(began) - machine_us)]))
    }

    fn save(&mut self, kind: vmm_protocol::control::SaveKind, descriptors: Vec<OwnedFd>) -> Result<(Reply, Vec<OwnedFd>), MachineError> {
        let (state, parts) = requests::save(kind, descriptors)?;
        let Self { machine, connection, waiting, .. } = self;
        let machine = some(machine)?;
        let (mut cancelled, mut ended) = (false, None);
        let saved = machine.save(state, parts, &mut || {
            for _ in 0..MAX_WAITING {
                if cancelled || ended.is_some() {
                    break;
                }
                match connection.as_ref().map_or(Heard::Nothing, Connection::hear) {
                    Heard::Nothing => break,
                    Heard::Packet(packet, descriptors) => {
                        // Whoever wants the process to end does not want it to save first.
                        cancelled = matches!(packet.request, Request::Cancel | Request::Quit);
                        if cancelled || waiting.len() < MAX_WAITING {
                            waiting.push_back((packet, descriptors));
                        } else if let Some(connection) = connection {
                            // Not left in the socket: a `Cancel` may stand behind it.
                            let reply = refused(Fault::Request, "too many requests wait for the end of a save");
                            ended = connection.send(&FromVmm::Reply { id: packet.id, reply }, &[]).err();
                        }
                    }
                    Heard::Nonsense(why) => {
                        tracing::warn!(%why, "the node sent what is no request during a save; it is given up");
                        cancelled = true;
                    }
                    Heard::End(why) => ended = Some(why),
                }
            }
            cancelled || ended.is_some()
        });
        if let Some(why) = ended {
            self.hang_up(&why);
        }
        Ok(requests::saved(saved?))
    }

    fn reply(&mut self, id: u64, reply: Reply, descriptors: &[OwnedFd]) {
        self.send(&FromVmm::Reply { id, reply }, descriptors);
    }

    fn send(&mut self, message: &FromVmm, descriptors: &[OwnedFd]) {
        if let Some(connection) = &self.connection
            && let Err(why) = connection.send(message, descriptors)
        {
            self.hang_up(&why);
        }
    }
}

fn refused(fault: Fault, why: &str) -> Reply {
    Reply::Failed { fault, why: connection::shortened(why) }
}

/// The phases in which [`order::admit`] lets a request for the machine through have one; nothing hostile could reach the error.
fn some(machine: &mut Option<Machine>) -> Result<&mut Machine, MachineError> {
    machine.as_mut().ok_or_else(|| MachineError { fault: Fault::Request, why: "there is no machine yet; Prepare comes first".to_owned() })
}
