//! Who the process is, and what it may not do any more: identity, capabilities, new privileges, dumps, limits.

use std::io;

use rustix::{
    process::{DumpableBehavior, Gid, Resource, Rlimit, Uid, geteuid, getrlimit, set_dumpable_behavior, setrlimit},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
        set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};

use super::{Doing, JailError, Layer, Report};

/// Most descriptors: the vsock muxer's 1024 streams twice while they are handed over at a save, its 256 sockets that have not
/// ended and 64 clients that have not said a port; two for each of 30 sealed layers; 60 of the machine. With room.
const MAX_DESCRIPTORS: u64 = 4096;
/// Most tasks: 16 vCPUs, the main thread, the block worker, the waiting parent, and KVM's own worker, which Linux since 6.14
/// counts to the user that runs the first vCPU; twice that.
const MAX_TASKS: u64 = 40;
/// Highest capability number that any kernel has had; more are refused with EINVAL, which ends the loop.
const CAPABILITIES: u32 = 64;

/// Root becomes an ordinary user, but keeps its capabilities until [`drop_all`]: a host may permit namespaces to root only.
/// Anyone else stays who they are. A container may have no other user than its root; that is a refusal like any other.
///
/// The process must have a single thread: the kernel changes the calling one alone.
pub fn become_user(uid: u32, gid: u32, report: &mut Report) -> Result<(), JailError> {
    if !geteuid().is_root() {
        report.note(Layer::Identity, Ok::<_, String>(()));
        return Ok(());
    }
    set_keep_capabilities(true).doing("keeping capabilities for the namespaces")?;
    report.note(Layer::Identity, change(Uid::from_raw(uid), Gid::from_raw(gid)));
    let permitted = capabilities(None).doing("reading capabilities")?.permitted;
    set_capabilities(None, CapabilitySets { effective: permitted, permitted, inheritable: CapabilitySet::empty() })
        .doing("raising capabilities for the namespaces")?;
    // The change of user has made /proc/self root's; the maps of the user namespace are written there. Undone by `drop_all`.
    set_dumpable_behavior(DumpableBehavior::Dumpable).doing("owning /proc/self")
}

fn change(uid: Uid, gid: Gid) -> Result<(), String> {
    set_thread_groups(&[]).map_err(|error| format!("leaving all groups: {}", io::Error::from(error)))?;
    set_thread_res_gid(gid, gid, gid).map_err(|error| format!("becoming group {} (--gid): {}", gid.as_raw(), io::Error::from(error)))?;
    set_thread_res_uid(uid, uid, uid).map_err(|error| format!("becoming user {} (--uid): {}", uid.as_raw(), io::Error::from(error)))
}

/// Gives up all capabilities for good, closes the ways to new ones, and the process's memory to debuggers and dumps.
pub fn drop_all() -> Result<(), JailError> {
    clear_ambient_capability_set().doing("clearing ambient capabilities")?;
    for number in 0..CAPABILITIES {
        // EPERM: without CAP_SETPCAP (an ordinary user without a user namespace) the bounding set cannot be changed, and
        // no_new_privs below makes it meaningless. EINVAL: the kernel has no more capabilities.
        if remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)).is_err() {
            break;
        }
    }
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none }).doing("dropping capabilities")?;
    set_no_new_privs(true).doing("giving up new privileges")?;
    // Guest memory must not reach a core file, and another process of the same user must not attach to this one.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).doing("becoming non-dumpable")
}

/// Limits that cost nothing and stop what the filters would not. `own_user`: a user namespace counts this process's tasks
/// apart from all others of the user; without one a limit could hit the node.
pub fn limit(own_user: bool) -> Result<(), JailError> {
    // No file size: memory differences and disks are as large as the guest. No address space: KVM maps guests whole.
    lower(Resource::Core, 0)?;
    lower(Resource::Nofile, MAX_DESCRIPTORS)?;
    lower(Resource::Msgqueue, 0)?;
    if own_user {
        lower(Resource::Nproc, MAX_TASKS)?;
    }
    Ok(())
}

fn lower(resource: Resource, to: u64) -> Result<(), JailError> {
    let maximum = getrlimit(resource).maximum.map_or(to, |maximum| maximum.min(to));
    setrlimit(resource, Rlimit { current: Some(maximum), maximum: Some(maximum) }).doing(&format!("limiting {resource:?} to {maximum}"))
}
