//! Which request fits which phase. Pure.

use vmm_protocol::control::{Request, SaveKind};

/// Where the process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waits for `Prepare`.
    New,
    /// There is a machine with nothing in it.
    Ready,
    /// The guest runs.
    Running,
    /// The guest stands still.
    Paused,
    /// The guest has ended by itself.
    Stopped,
    /// Making or loading the machine failed half-way: it is good for nothing.
    Broken,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::New, Self::Ready, Self::Running, Self::Paused, Self::Stopped, Self::Broken];

    fn told(self) -> &'static str {
        match self {
            Self::New => "there is no machine yet, Prepare comes first",
            Self::Ready => "nothing is loaded yet, Boot or Restore comes first",
            Self::Running => "the guest runs",
            Self::Paused => "the guest is paused",
            Self::Stopped => "the guest has ended",
            Self::Broken => "making or loading the machine failed, only Quit is left",
        }
    }
}

/// Whether a request may be performed now, with so many descriptors. An error is a sentence, and nothing has changed.
pub fn admit(phase: Phase, request: &Request, descriptors: usize) -> Result<(), String> {
    use Phase::{Broken, New, Paused, Ready, Running, Stopped};
    let fits = match request {
        Request::Prepare { .. } => phase == New,
        Request::Boot { .. } | Request::Restore { .. } => phase == Ready,
        // What is so already is done already.
        Request::Run | Request::Pause => matches!(phase, Running | Paused),
        Request::Save { .. } => phase == Paused,
        Request::Usage | Request::Console => matches!(phase, Ready | Running | Paused | Stopped),
        Request::Cancel | Request::Quit => true,
    };
    if !fits {
        let hint = match (request, phase) {
            (Request::Prepare { .. }, Ready | Running | Paused | Stopped | Broken) => ", and a process makes one machine in its life",
            (Request::Save { .. }, Running) => ", Pause comes first",
            _ => "",
        };
        return Err(format!("{} does not fit: {}{hint}", request.name(), phase.told()));
    }
    let wanted = descriptors_of(request);
    if wanted != Some(descriptors) {
        let wanted = wanted.map_or_else(|| "fewer layers and streams than that".to_owned(), |wanted| format!("{wanted}"));
        return Err(format!("{} came with {descriptors} descriptors, and takes {wanted}", request.name()));
    }
    Ok(())
}

/// How many descriptors come with a request; `None` if it claims more than there are numbers for.
fn descriptors_of(request: &Request) -> Option<usize> {
    match request {
        Request::Prepare { net, .. } => Some(2 + usize::from(net.is_some())),
        Request::Boot { .. } => Some(3),
        Request::Restore { difference, sealed_layers, streams } => {
            let layers = usize::try_from(*sealed_layers).ok()?.checked_mul(2)?;
            // State and difference; base, layers and top; streams.
            layers.checked_add(1 + usize::from(*difference) + 2)?.checked_add(streams.len())
        }
        Request::Save { kind: SaveKind::Image } => Some(1),
        Request::Save { kind: SaveKind::Difference { .. } } => Some(4),
        Request::Run | Request::Pause | Request::Cancel | Request::Usage | Request::Console | Request::Quit => Some(0),
    }
}

#[cfg(test)]
mod tests {
    use vmm_protocol::control::{MemoryUse, ParkedStream, VERSION};

    use super::*;

    fn every_request() -> Vec<Request> {
        vec![
            Request::Prepare { version: VERSION, vcpus: 1, memory_bytes: 2 << 20, memory: MemoryUse::Private, disk_bytes: 4096, net: None },
            Request::Boot { cmdline: String::new() },
            Request::Restore { difference: true, sealed_layers: 2, streams: vec![ParkedStream { guest_port: 1, host_port: 2 }] },
            Request::Run,
            Request::Pause,
            Request::Save { kind: SaveKind::Image },
            Request::Save { kind: SaveKind::Difference { merge_layers: false } },
            Request::Cancel,
            Request::Usage,
            Request::Console,
            Request::Quit,
        ]
    }

    #[test]
    fn the_whole_table() {
        // One line a phase, one column a request, in the order above.
        let wanted = "\
New      Prepare - - - - - - Cancel - - Quit
Ready    - Boot Restore - - - - Cancel Usage Console Quit
Running  - - - Run Pause - - Cancel Usage Console Quit
Paused   - - - Run Pause Save Save Cancel Usage Console Quit
Stopped  - - - - - - - Cancel Usage Console Quit
Broken   - - - - - - - Cancel - - Quit
";
        let mut table = String::new();
        for phase in Phase::ALL {
            let row: Vec<_> = every_request()
                .iter()
                .map(|request| {
                    let count = descriptors_of(request).unwrap();
                    admit(phase, request, count).map_or("-", |()| request.name())
                })
                .collect();
            table += &format!("{:<9}{}\n", format!("{phase:?}"), row.join(" "));
        }
        assert_eq!(table, wanted);
    }

    #[test]
    fn a_wrong_number_of_descriptors_is_refused_with_both_numbers() {
        for request in every_request() {
            let count = descriptors_of(&request).unwrap();
            let phase = Phase::ALL.into_iter().find(|phase| admit(*phase, &request, count).is_ok()).unwrap();
            for wrong in (0..=64).filter(|wrong| *wrong != count) {
                let why = admit(phase, &request, wrong).unwrap_err();
                assert!(why.contains(&format!("{wrong} descriptors")) && why.contains(&format!("takes {count}")), "{why}");
            }
        }
        // A claim that would overflow on a smaller machine, and never matches on this one.
        let huge = Request::Restore { difference: false, sealed_layers: u32::MAX, streams: Vec::new() };
        assert!(admit(Phase::Ready, &huge, 64).is_err());
    }
}
