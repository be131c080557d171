//! The lifecycle of one microVM, as a pure machine: a phase, an event and the time in; the next phase and effects out.
//!
//! Owns: every rule about what may follow what (design §4). Never does I/O, never reads a clock, never blocks: whoever
//! drives it performs the [`Effect`]s and feeds their outcome back as an [`Event`].
//!
//! ```text
//!                     Started                 idle clock / SuspendAsked
//!   Launching ───────────────────► Running ─────────────────────────────► Suspending
//!       │                          ▲  │ ▲                                  │   │  ▲ │
//!       │ StartFailed              │  │ └───────── SuspendFailed ──────────┘   │  │ │ Request, ResumeAsked
//!       │                  Started │  │ VMM died                               │  │ ▼
//!       │                          │  ▼                            Suspended   │ TakingBack ── TakenBack ─► Running
//!       │                          │ Fallen ── snapshot? ───────┐   ┌──────────┘  │
//!       │                          │  │ none                    ▼   ▼             │ Suspended (it was too late)
//!       │                          │  │              ┌────► Suspended            │
//!       │                          │  │  StartFailed │          │ Request,         │
//!       │                          │  │              │          ▼ ResumeAsked      │
//!       │                          └──┼───────────── Waking ◄────────────────────┘
//!       ▼                             ▼
//!   Terminating ◄── from every phase: TerminateAsked, a duration that is over, the app's exit
//!       │ Destroyed
//!       ▼
//!   Terminated ── kept for a while ──► forgotten
//! ```
//!
//! One engine operation is in flight in `Launching`, `Suspending`, `TakingBack`, `Fallen` and `Waking`, none in the other
//! phases; `Terminating` alone overtakes what is in flight. Requests wait only in phases with an operation in flight, so
//! that there is always an outcome that answers them.

mod event;
mod phase;
mod step;

pub(crate) use event::{Effect, Event, Inspection, Refusal};
pub(crate) use phase::{EndReason, Phase};
pub(crate) use step::{Machine, Policy};
