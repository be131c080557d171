//! Packets on the control socket of a VMM process, with descriptors.
#![no_main]

use std::{
    fmt::Debug,
    os::fd::{AsFd, OwnedFd},
};

use dormouse_fuzz::file;
use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::{Serialize, de::DeserializeOwned};
use vmm::control::{
    order::{Phase, admit},
    requests,
};
use vmm_protocol::control::{FromVmm, MAX_DESCRIPTORS, PacketError, Request, ToVmm, receive, send};

/// What was understood is said and understood again.
fn understood<M: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) -> Option<M> {
    let message: M = serde_json::from_slice(bytes).ok()?;
    let said = serde_json::to_vec(&message).expect("a message can be written");
    assert_eq!(serde_json::from_slice::<M>(&said).expect("what was written can be read"), message);
    Some(message)
}

/// What the process does with a request before it touches the machine.
fn look(request: Request, descriptors: Vec<OwnedFd>) {
    let fitting = Phase::ALL.into_iter().filter(|phase| admit(*phase, &request, descriptors.len()).is_ok()).count();
    let n_descriptors = descriptors.len();
    match request {
        Request::Prepare { .. } => {
            assert!(fitting <= 1);
            let _ = requests::shell(&request, descriptors);
        }
        Request::Boot { .. } | Request::Restore { .. } => {
            // Whatever it claims, it was counted: there are as many descriptors as it takes, and no more work than those.
            if fitting > 0 {
                assert!(n_descriptors <= MAX_DESCRIPTORS);
                let _ = requests::origin(request, descriptors);
            }
        }
        Request::Save { kind } => {
            let _ = requests::save(kind, descriptors);
        }
        _ => {}
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&count, packet)) = data.split_first() else { return };
    understood::<FromVmm>(packet);
    let message = understood::<ToVmm>(packet);

    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
    let files: Vec<_> = (0..usize::from(count) % (MAX_DESCRIPTORS + 1)).map(|_| file()).collect();
    let Some(message) = message else {
        if !packet.is_empty() && rustix::net::send(&ours, packet, rustix::net::SendFlags::empty()).is_ok() {
            assert!(matches!(receive::<ToVmm>(&theirs), Err(PacketError::Malformed(_))));
        }
        return;
    };
    match send(&ours, &message, &files.iter().map(AsFd::as_fd).collect::<Vec<_>>()) {
        Ok(()) => {
            let (received, descriptors) = receive::<ToVmm>(&theirs).expect("what was sent arrives");
            assert_eq!((&received, descriptors.len()), (&message, files.len()));
            look(received.request, descriptors);
        }
        // Its numbers take more room here than in the packet.
        Err(error) => assert!(matches!(error, PacketError::Malformed(_)), "{error}"),
    }
});
