//! The whole table, and what must hold for every history.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use model::{Generation, IdlePolicy, MicrovmState, SuspendHookFailure};
use proptest::prelude::*;
use vmm_runtime::engine::Exit;

use super::{Machine, Policy};
use crate::{
    Refused,
    machine::{event::*, phase::*},
};

const MAX_IDLE: Duration = Duration::from_secs(60);
const SUSPENDED: Duration = Duration::from_secs(600);
const LIFE: Duration = Duration::from_secs(28_800);

/// The policies that rules depend on. The first is the usual one; the table shows of the others what differs.
const POLICIES: [(&str, Option<IdlePolicy>); 4] = [
    ("autoResume", Some(IdlePolicy { max_idle: MAX_IDLE, suspended: SUSPENDED, auto_resume: true })),
    ("autoResume=false", Some(IdlePolicy { max_idle: MAX_IDLE, suspended: SUSPENDED, auto_resume: false })),
    ("suspendedDuration=0", Some(IdlePolicy { max_idle: MAX_IDLE, suspended: Duration::ZERO, auto_resume: true })),
    ("no idle policy", None),
];

fn policy(idle: Option<IdlePolicy>, start: Instant) -> Policy {
    let suspend_hook_failure = SuspendHookFailure::Keep;
    Policy { idle, max_duration: LIFE, ends_at: start + LIFE, keep_terminated: Duration::from_secs(3600), suspend_hook_failure }
}

fn trouble(start: Instant) -> Trouble {
    Trouble { reason: "it went wrong".into(), failures: 2, retry_at: start + Duration::from_secs(1200) }
}

/// Every phase, with every inner choice that a rule looks at.
fn phases(idle: Option<IdlePolicy>, start: Instant) -> Vec<Phase> {
    use {AfterStart::*, AfterTakeBack::*, SuspendCause::*};
    let until = idle.map(|idle| start + idle.suspended);
    let idle_at = idle.map(|idle| start + idle.max_idle);
    let detail = || "SIGKILL".to_owned();
    vec![
        Phase::Launching { next: Serve },
        Phase::Launching { next: Suspend },
        Phase::Running { idle_at, trouble: None },
        Phase::Running { idle_at, trouble: Some(trouble(start)) },
        Phase::Suspending { cause: Idle, failures: 1 },
        Phase::Suspending { cause: Asked, failures: 0 },
        Phase::TakingBack { committed: Wake, next: Serve, failures: 1 },
        Phase::TakingBack { committed: Wake, next: Suspend, failures: 0 },
        Phase::TakingBack { committed: Sleep, next: Serve, failures: 0 },
        Phase::TakingBack { committed: Sleep, next: Suspend, failures: 0 },
        Phase::Fallen { detail: detail(), wake: None },
        Phase::Fallen { detail: detail(), wake: Some(Serve) },
        Phase::Fallen { detail: detail(), wake: Some(Suspend) },
        Phase::Suspended { until, trouble: None },
        Phase::Suspended { until, trouble: Some(trouble(start)) },
        Phase::Waking { until, failures: 0, next: Serve },
        Phase::Waking { until, failures: 3, next: Suspend },
        Phase::Terminating { reason: EndReason::Asked },
        Phase::Terminated { reason: EndReason::Asked, forget_at: start + Duration::from_secs(3600) },
    ]
}

/// Every event, with every payload that a rule looks at, and when it happens.
fn events(start: Instant) -> Vec<(&'static str, Duration, Event)> {
    let at = Duration::from_secs;
    let soon = at(10);
    let quiet = |since: u64| Event::Tick { quiet_since: Some(start + at(since)) };
    vec![
        ("Tick, nothing is due", soon, quiet(0)),
        ("Tick, quiet for maxIdle", at(60), quiet(0)),
        ("Tick, bytes at +40s", at(60), quiet(40)),
        ("Tick, an answer is being computed", at(60), Event::Tick { quiet_since: None }),
        ("Tick, suspendedDuration is over", at(600), Event::Tick { quiet_since: None }),
        ("Tick, maxDuration is over", LIFE, Event::Tick { quiet_since: None }),
        ("Request", soon, Event::Request),
        ("ParkedWrite", soon, Event::ParkedWrite),
        ("ResumeAsked", soon, Event::ResumeAsked),
        ("SuspendAsked", soon, Event::SuspendAsked),
        ("TerminateAsked", soon, Event::TerminateAsked),
        ("Started", soon, Event::Started),
        ("StartFailed", soon, Event::StartFailed { reason: "no memory".into() }),
        ("HookFailed", soon, Event::HookFailed { reason: "the app said no".into() }),
        ("SnapshotDamaged", soon, Event::SnapshotDamaged { why: "bit flip".into() }),
        ("Suspended", soon, Event::Suspended),
        ("TakenBack", soon, Event::TakenBack),
        ("SuspendFailed", soon, Event::SuspendFailed { reason: "disk full".into() }),
        ("Exited, app", soon, Event::Exited { exit: Exit::App { code: 3 } }),
        ("Exited, VMM", soon, Event::Exited { exit: Exit::Vmm { detail: "SIGKILL".into() } }),
        ("Inspected, snapshot", soon, Event::Inspected { found: Inspection::Snapshot }),
        ("Inspected, nothing", soon, Event::Inspected { found: Inspection::Nothing }),
        ("Destroyed", soon, Event::Destroyed),
    ]
}

/// A phase with its times as seconds since `start`.
fn show(phase: &Phase, start: Instant) -> String {
    let time = |at: &Instant| format!("+{}s", at.saturating_duration_since(start).as_secs());
    let maybe = |at: &Option<Instant>| at.as_ref().map_or("never".to_owned(), time);
    let troubled = |trouble: &Option<Trouble>| match trouble {
        None => String::new(),
        Some(trouble) => format!(", trouble \"{}\" ×{} until {}", trouble.reason, trouble.failures, time(&trouble.retry_at)),
    };
    match phase {
        Phase::Launching { next } => format!("Launching {{ {next:?} }}"),
        Phase::Running { idle_at, trouble } => format!("Running {{ idle {}{} }}", maybe(idle_at), troubled(trouble)),
        Phase::Suspending { cause, failures } => format!("Suspending {{ {cause:?}, failures {failures} }}"),
        Phase::TakingBack { committed, next, failures } => {
            format!("TakingBack {{ too late: {committed:?}, then {next:?}, failures {failures} }}")
        }
        Phase::Fallen { detail, wake } => format!("Fallen {{ \"{detail}\", wake {wake:?} }}"),
        Phase::Suspended { until, trouble } => format!("Suspended {{ until {}{} }}", maybe(until), troubled(trouble)),
        Phase::Waking { until, failures, next } => format!("Waking {{ until {}, failures {failures}, then {next:?} }}", maybe(until)),
        Phase::Terminating { reason } => format!("Terminating {{ {reason} }}"),
        Phase::Terminated { reason, forget_at } => format!("Terminated {{ {reason}; until {} }}", time(forget_at)),
    }
}

fn row(machine: &Machine, start: Instant, after: Duration, event: &Event) -> String {
    let mut next = machine.clone();
    match next.step(start + after, event.clone()) {
        Err(refusal) => {
            assert_eq!(&next, machine, "a refused event changed something");
            format!("refused: {refusal}")
        }
        Ok(effects) => {
            let phase = if next.phase == machine.phase { "unchanged".to_owned() } else { show(&next.phase, start) };
            let generation = if next.generation == machine.generation { "" } else { " generation+1" };
            let effects: Vec<String> = effects
                .iter()
                .map(|effect| match effect {
                    Effect::Fail(refused) => format!("Fail({refused})"),
                    other => format!("{other:?}"),
                })
                .collect();
            let effects = if effects.is_empty() { String::new() } else { format!("  do {}", effects.join(", ")) };
            format!("{phase}{generation}{effects}")
        }
    }
}

#[test]
fn every_phase_answers_every_event_as_the_table_says() {
    let start = Instant::now();
    let mut table = String::from(
        "Every phase × every event. Times are seconds since the phases were set up; events happen at +10s unless they say\n\
         otherwise. Of every policy but the first, only what differs from the first is shown.\n\
         Written by machine/step/tests.rs with DORMOUSE_GOLDEN=update; read the diff.\n",
    );
    let usual = POLICIES[0].1;
    for (name, idle) in POLICIES {
        writeln!(table, "\n════ {name}").unwrap();
        for (phase, usual_phase) in phases(idle, start).into_iter().zip(phases(usual, start)) {
            let machine = Machine { phase, generation: Generation(7), policy: policy(idle, start) };
            let usual_machine = Machine { phase: usual_phase, generation: Generation(7), policy: policy(usual, start) };
            let rows: Vec<String> = events(start)
                .iter()
                .filter_map(|(label, after, event)| {
                    let says = row(&machine, start, *after, event);
                    let differs = idle == usual || says != row(&usual_machine, start, *after, event);
                    differs.then(|| format!("  {label:<34} → {says}"))
                })
                .collect();
            if !rows.is_empty() {
                writeln!(table, "\n{}  [{}]\n{}", show(&machine.phase, start), machine.phase.public(), rows.join("\n")).unwrap();
            }
        }
    }

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/machine/table.golden");
    if std::env::var_os("DORMOUSE_GOLDEN").is_some_and(|value| value == "update") {
        std::fs::write(path, &table).expect("the source folder can be written when goldens are updated");
    }
    let golden = std::fs::read_to_string(path).unwrap_or_default();
    for (number, (now, then)) in table.lines().zip(golden.lines()).enumerate() {
        assert_eq!(now, then, "line {} of table.golden; DORMOUSE_GOLDEN=update writes it anew", number + 1);
    }
    assert_eq!(table.lines().count(), golden.lines().count(), "table.golden has another length");
}

#[test]
fn a_failing_suspend_is_tried_later_and_later() {
    let mut now = Instant::now();
    let mut machine = Machine::adopted(policy(POLICIES[0].1, now), Generation(0), now);
    let mut waits = Vec::new();
    for _ in 0..8 {
        let due = machine.deadline(now).unwrap();
        waits.push((due - now).as_secs());
        now = due;
        assert_eq!(machine.step(now, Event::Tick { quiet_since: Some(now - MAX_IDLE) }), Ok(vec![Effect::Suspend]));
        assert_eq!(machine.step(now, Event::SuspendFailed { reason: "disk full".into() }), Ok(vec![]));
    }
    assert_eq!(waits, [60, 60, 120, 240, 480, 900, 900, 900]);
    assert_eq!(machine.phase.reason().as_deref(), Some("could not be suspended: disk full"));

    // One that works ends the trouble.
    machine.step(now, Event::SuspendAsked).unwrap();
    machine.step(now, Event::Suspended).unwrap();
    assert_eq!(machine.phase.reason(), None);
}

/// The only thing that the switch changes.
#[test]
fn an_app_that_refuses_to_be_suspended_ends_if_that_is_configured() {
    let start = Instant::now();
    let refused = || Event::HookFailed { reason: "Suspend lifecycle hook failed.".into() };
    for phase in phases(POLICIES[0].1, start) {
        let terminating = Policy { suspend_hook_failure: SuspendHookFailure::Terminate, ..policy(POLICIES[0].1, start) };
        let mut keeps = Machine { phase: phase.clone(), generation: Generation(7), policy: policy(POLICIES[0].1, start) };
        let mut ends = Machine { phase: phase.clone(), generation: Generation(7), policy: terminating };
        let (kept, ended) = (keeps.step(start, refused()), ends.step(start, refused()));
        if matches!(phase, Phase::Suspending { .. } | Phase::TakingBack { .. }) {
            assert_eq!(ended, Ok(vec![Effect::Fail(Refused::Terminated), Effect::Destroy]));
            assert_eq!(ends.phase.reason().as_deref(), Some("Suspend lifecycle hook failed."));
            assert_ne!(kept, ended);
        } else {
            assert_eq!((kept, keeps.phase), (ended, ends.phase));
        }
    }
}

#[test]
fn parked_bytes_do_not_repeat_a_failing_wake_for_ever() {
    let start = Instant::now();
    let mut machine = Machine::asleep(policy(POLICIES[0].1, start), Generation(0), Duration::ZERO, None, start);
    let mut now = start;
    let mut wakes = 0;
    while now < start + Duration::from_secs(60) {
        if machine.heeds_parked_writes(now) {
            assert_eq!(machine.step(now, Event::ParkedWrite), Ok(vec![Effect::Restore]));
            machine.step(now, Event::StartFailed { reason: "no memory".into() }).unwrap();
            wakes += 1;
        }
        assert!(!machine.heeds_parked_writes(now));
        now = machine.deadline(now).unwrap();
    }
    assert_eq!(wakes, 6, "1 s, 2 s, 4 s, … apart");
    // A request does not wait for that.
    assert_eq!(machine.step(now, Event::Request), Ok(vec![Effect::Restore]));
}

/// The operation that an effect starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Launch,
    Suspend,
    Restore,
    Inspect,
    Destroy,
}

/// What the driver would know: what is in flight, and who waits.
struct Model {
    machine: Machine,
    in_flight: Option<Operation>,
    waiting: usize,
    now: Instant,
    forgotten: bool,
}

impl Model {
    /// Feeds one event and checks everything that must hold after each.
    fn feed(&mut self, event: Event) {
        let before = self.machine.clone();
        let is_request = event == Event::Request;
        if is_request {
            self.waiting += 1;
        }
        match self.machine.step(self.now, event.clone()) {
            Err(_) => {
                assert_eq!(self.machine, before, "{event:?} was refused and changed something");
                if is_request {
                    self.waiting -= 1; // The refusal is its answer.
                }
            }
            Ok(effects) => {
                for effect in effects {
                    match effect {
                        Effect::Launch => self.begin(Operation::Launch),
                        Effect::Suspend => self.begin(Operation::Suspend),
                        Effect::Restore => self.begin(Operation::Restore),
                        Effect::Inspect => self.begin(Operation::Inspect),
                        Effect::TakeBack => assert_eq!(self.in_flight, Some(Operation::Suspend)),
                        Effect::Destroy => {
                            assert_ne!(self.in_flight, Some(Operation::Destroy), "destroyed twice");
                            self.in_flight = Some(Operation::Destroy);
                        }
                        Effect::TellAwake => panic!("only a start of the node has this told"),
                        Effect::Release | Effect::Fail(_) => self.waiting = 0,
                        Effect::Forget => self.forgotten = true,
                    }
                }
            }
        }
        assert!(self.machine.generation >= before.generation, "the generation fell");
        let settled = self.machine.phase.is_settled();
        assert_eq!(settled, self.in_flight.is_none(), "{:?} with {:?} in flight", self.machine.phase, self.in_flight);
        assert!(self.waiting == 0 || !settled, "somebody waits in {:?}", self.machine.phase);
        let ending = |machine: &Machine| matches!(machine.phase.public(), MicrovmState::Terminating | MicrovmState::Terminated);
        assert!(!ending(&before) || ending(&self.machine), "it came back from the end");
        if event == Event::TerminateAsked {
            assert!(ending(&self.machine), "terminate did not win");
        }
        if ending(&self.machine) {
            assert_eq!(self.waiting, 0);
        }
        if event == Event::ResumeAsked && !ending(&self.machine) {
            assert!(!matches!(self.machine.phase, Phase::Suspended { .. } | Phase::Suspending { .. }), "a resume was lost");
        }
    }

    fn begin(&mut self, operation: Operation) {
        assert_eq!(self.in_flight, None, "{operation:?} while another operation is in flight");
        self.in_flight = Some(operation);
    }

    /// The outcome of what is in flight, picked by `choice`.
    fn outcome(&mut self, choice: u8) {
        let exit = |code: i32| if code == 0 { Exit::App { code } } else { Exit::Vmm { detail: "gone".into() } };
        let Some(operation) = self.in_flight.take() else {
            // Only what runs can end by itself.
            if matches!(self.machine.phase, Phase::Running { .. }) && choice < 2 {
                self.feed(Event::Exited { exit: exit(choice.into()) });
            }
            return;
        };
        let event = match (operation, choice) {
            (Operation::Destroy, _) => Event::Destroyed,
            (Operation::Inspect, 0..2) => Event::Inspected { found: Inspection::Nothing },
            (Operation::Inspect, _) => Event::Inspected { found: Inspection::Snapshot },
            (Operation::Restore, 0) => Event::SnapshotDamaged { why: "bit flip".into() },
            (Operation::Restore | Operation::Launch, 1) => Event::StartFailed { reason: "no memory".into() },
            (Operation::Restore | Operation::Launch, 2) => Event::HookFailed { reason: "the app said no".into() },
            (Operation::Restore | Operation::Launch, _) => Event::Started,
            (Operation::Suspend, 0 | 1) => Event::Exited { exit: exit(choice.into()) },
            (Operation::Suspend, 2) => Event::SuspendFailed { reason: "disk full".into() },
            (Operation::Suspend, 3) => Event::TakenBack,
            (Operation::Suspend, 4) => Event::HookFailed { reason: "the app said no".into() },
            (Operation::Suspend, _) => Event::Suspended,
        };
        self.feed(event);
    }
}

#[derive(Debug, Clone)]
enum Move {
    Request,
    ParkedWrite,
    Resume,
    Suspend,
    Terminate,
    Outcome(u8),
    Time { secs: u64, quiet: Option<u64> },
    /// An outcome of something that may not be in flight at all.
    Stray(Event),
}

fn moves() -> impl Strategy<Value = Move> {
    let start = Instant::now();
    let stray = proptest::sample::select(events(start).into_iter().map(|(_, _, event)| event).collect::<Vec<_>>());
    prop_oneof![
        6 => Just(Move::Request),
        2 => Just(Move::ParkedWrite),
        3 => Just(Move::Resume),
        3 => Just(Move::Suspend),
        1 => Just(Move::Terminate),
        12 => (0..8u8).prop_map(Move::Outcome),
        6 => (0..200u64, proptest::option::of(0..200u64)).prop_map(|(secs, quiet)| Move::Time { secs, quiet }),
        1 => (Just(LIFE.as_secs()), Just(None)).prop_map(|(secs, quiet)| Move::Time { secs, quiet }),
        2 => stray.prop_map(Move::Stray),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn every_history_is_legal(which in 0..POLICIES.len(), history in proptest::collection::vec(moves(), 1..80)) {
        let start = Instant::now();
        let mut model = Model {
            machine: Machine::launching(policy(POLICIES[which].1, start)),
            in_flight: Some(Operation::Launch),
            waiting: 0,
            now: start,
            forgotten: false,
        };
        for step in history {
            match step {
                Move::Request => model.feed(Event::Request),
                Move::ParkedWrite => model.feed(Event::ParkedWrite),
                Move::Resume => model.feed(Event::ResumeAsked),
                Move::Suspend => model.feed(Event::SuspendAsked),
                Move::Terminate => model.feed(Event::TerminateAsked),
                Move::Outcome(choice) => model.outcome(choice),
                Move::Time { secs, quiet } => {
                    model.now += Duration::from_secs(secs);
                    let quiet_since = quiet.map(|quiet| (model.now - Duration::from_secs(quiet)).max(start));
                    model.feed(Event::Tick { quiet_since });
                }
                // The machine itself must refuse an outcome that cannot be: fed without the bookkeeping of `outcome`,
                // it may only be refused or be one that the phase waits for, which this test leaves to `outcome`.
                Move::Stray(event) => {
                    let mut stray = model.machine.clone();
                    if stray.step(model.now, event).is_err() {
                        prop_assert_eq!(&stray, &model.machine);
                    }
                }
            }
        }
        // Let everything that is under way end: nobody is left waiting, and the end can always be reached.
        for _ in 0..4 {
            model.outcome(7);
        }
        prop_assert_eq!(model.waiting, 0);
        model.feed(Event::TerminateAsked);
        model.outcome(7);
        prop_assert_eq!(model.machine.phase.public(), MicrovmState::Terminated);
        model.now += Duration::from_secs(3600);
        model.feed(Event::Tick { quiet_since: None });
        prop_assert!(model.forgotten);
    }
}

#[test]
fn who_waits_for_a_failed_start_learns_why() {
    let start = Instant::now();
    for (machine, ends_as) in [
        (Machine::launching(policy(POLICIES[0].1, start)), MicrovmState::Terminating),
        (Machine::asleep(policy(POLICIES[0].1, start), Generation(3), Duration::ZERO, None, start), MicrovmState::Suspended),
    ] {
        let mut machine = machine;
        machine.step(start, Event::Request).unwrap();
        let effects = machine.step(start, Event::StartFailed { reason: "no memory".into() }).unwrap();
        assert_eq!(effects[0], Effect::Fail(Refused::StartFailed { reason: "no memory".into() }));
        assert_eq!(machine.phase.public(), ends_as);
        assert!(machine.phase.reason().unwrap().contains("no memory"));
    }
}
