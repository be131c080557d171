//! A restore (order: vmm.md §2.3). The boot path is never run: nothing is loaded, no register gets its start.

use std::{fs::File, os::unix::fs::FileExt};

use serde::de::DeserializeOwned;
use virtio_devices::{block::layers::Disk, vsock::Vsock};
use vmm_protocol::{
    control::{Fault, MemoryUse},
    memdiff::DiffError,
};

use super::{
    Machine, MachineError, Phases, Restore, Steps,
    save::{Legacy, SECTION_VERSION, Shape},
    slot,
};
use crate::{
    devices::{bus::lock, power, vmgenid},
    kvm::{
        cpuid,
        state::{self, VcpuState, VmState},
    },
    memory::difference,
    snapshot::{
        self,
        format::{FormatError, MAX_BYTES, Section, Sections},
    },
};

/// That of a vCPU, the longest that is decoded here, has some 20 KiB; with every tile register and CPUID leaf, 40.
const MAX_SECTION: usize = 128 << 10;

fn bad(error: &FormatError) -> MachineError {
    MachineError::new(Fault::Snapshot, "reading the device state", error)
}

fn refused(why: impl Into<String>) -> MachineError {
    MachineError { fault: Fault::Snapshot, why: why.into() }
}

fn read_state(file: &File) -> Result<Vec<u8>, MachineError> {
    let host = |error: std::io::Error| MachineError::host("reading the device state", &error);
    let bytes = file.metadata().map_err(host)?.len();
    if bytes > MAX_BYTES {
        return Err(refused(format!("the device state has {bytes} bytes; no state has more than {MAX_BYTES}")));
    }
    let mut content = vec![0; bytes as usize];
    file.read_exact_at(&mut content, 0).map_err(host)?;
    Ok(content)
}

fn decode<T: DeserializeOwned>(section: &Section<'_>) -> Result<T, MachineError> {
    if section.version != SECTION_VERSION {
        return Err(bad(&section.not_understood()));
    }
    let damaged = || bad(&FormatError::Damaged(format!("its section {} is not well formed", snapshot::format::name(section.tag))));
    // A byte may claim to be a whole structure of the kernel's, and its fields be zeros.
    if section.content.len() > MAX_SECTION {
        return Err(damaged());
    }
    match postcard::take_from_bytes(section.content) {
        Ok((value, [])) => Ok(value),
        _ => Err(damaged()),
    }
}

/// See [`Machine::restore`].
pub fn restore(machine: &mut Machine, restore: Restore) -> Result<Phases, MachineError> {
    let Restore { state, difference, disk_base, sealed_layers, disk_top, streams } = restore;
    let mut steps = Steps::begin();

    // Everything is parsed, and compared with machine and host, before anything is touched.
    let bytes = read_state(&state)?;
    let sections = Sections::parse(&bytes).map_err(|error| bad(&error))?;
    let slots: Vec<usize> = (0..machine.bus.virtio.len()).collect();
    let known: Vec<u32> = [snapshot::SHAPE, snapshot::VCPU, snapshot::VM, snapshot::LEGACY].into_iter().chain(slots.iter().map(|slot| snapshot::virtio(*slot))).collect();
    sections.check_known(&known).map_err(|error| bad(&error))?;
    let only = |tag| sections.only(tag).map_err(|error| bad(&error));
    let shape: Shape = decode(only(snapshot::SHAPE)?)?;
    let here = Shape::of(machine);
    if shape != here {
        return Err(refused(format!("the snapshot is of another machine ({shape:?}) than this one ({here:?})")));
    }
    let vcpus = sections.iter().filter(|section| section.tag == snapshot::VCPU).map(decode).collect::<Result<Vec<VcpuState>, _>>()?;
    if vcpus.len() != machine.vcpus.len() {
        return Err(refused(format!("the snapshot holds {} vCPUs of {}", vcpus.len(), machine.vcpus.len())));
    }
    let vm: VmState = decode(only(snapshot::VM)?)?;
    let legacy: Legacy = decode(only(snapshot::LEGACY)?)?;
    for vcpu in &vcpus {
        cpuid::check_host(&vcpu.cpuid, machine.vm.cpuid()).map_err(|error| MachineError::kvm("comparing processors", &error))?;
    }
    steps.done("parse");

    // A guest that runs on shared memory would write into its image.
    if machine.ram.memory_use() != MemoryUse::Private {
        return Err(MachineError::request("a restored guest's memory must be private"));
    }
    if let Some(difference) = &difference {
        difference::lay_over(&machine.ram, difference).map_err(|error| {
            let fault = if matches!(error, DiffError::Sink(_) | DiffError::Read(_)) { Fault::Host } else { Fault::Snapshot };
            MachineError::new(fault, "restoring guest memory", &error)
        })?;
    }
    steps.done("memory");

    let sealed = sealed_layers.into_iter().map(|layer| (layer.data, layer.map)).collect();
    let disk = Disk::layered(disk_base, sealed, disk_top).map_err(|error| MachineError::new(Fault::Snapshot, "opening the disk", &error))?;
    machine.with_block(|block| block.set_disk(disk))?.map_err(|error| MachineError::new(Fault::Snapshot, "attaching the disk", &error))?;
    steps.done("disk");

    let several = vcpus.len() > 1;
    machine.identities = vcpus.iter().map(|vcpu| vcpu.cpuid.clone()).collect();
    for (vcpu, saved) in machine.vcpus.iter().zip(vcpus) {
        let vm = machine.vm.clone();
        vcpu.with(move |fd| saved.write(fd, &vm)).and_then(|written| written).map_err(|error| MachineError::kvm("restoring a vCPU", &error))?;
    }
    if several {
        equalise_clocks(machine)?;
    }
    vm.write(&machine.vm).map_err(|error| MachineError::kvm("restoring the machine", &error))?;
    steps.done("vcpus");

    // After the interrupt controllers: an interrupt that a device raises now would be overwritten otherwise.
    lock(&machine.bus.console).restore(&legacy.serial).map_err(|why| refused(format!("the state of the serial port cannot be used: {why}")))?;
    lock(&machine.bus.rtc).select(legacy.rtc_index);
    for slot in slots.into_iter().filter(|slot| machine.bus.virtio[*slot].is_some()) {
        let section = only(snapshot::virtio(slot))?;
        if section.version != SECTION_VERSION {
            return Err(bad(&section.not_understood()));
        }
        let restored = machine.device(slot, |transport| transport.restore(section.content));
        restored.transpose().map_err(|error| MachineError::new(Fault::Snapshot, "restoring devices", &error))?;
    }
    let streams = streams.into_iter().map(|(stream, socket)| (stream.guest_port, stream.host_port, socket)).collect();
    machine.device(slot::VSOCK, |transport| {
        if let Some(vsock) = transport.device_as::<Vsock>() {
            vsock.give_streams(streams);
        }
    });
    // The guest is a copy: its kernel must not hand out random numbers that its siblings get, too.
    vmgenid::renew(machine.ram.memory()).map_err(|error| MachineError::host("writing the VMGenID", &error))?;
    machine.bus.power.raise(legacy.acpi_events | power::EVENT_GENERATION);
    steps.done("devices");
    Ok(steps.phases)
}

/// Each vCPU's TSC was set a moment after the other's. A guest has seen them agree, and may take a clock that goes backwards
/// between vCPUs for broken.
fn equalise_clocks(machine: &Machine) -> Result<(), MachineError> {
    let failed = |error: crate::kvm::KvmError| MachineError::kvm("setting the vCPUs' clocks", &error);
    let first = machine.vcpus[0].with(|fd| state::tsc_offset(fd)).map_err(failed)?;
    // Without the attribute (a KVM in software) the TSC is the host's, and agrees.
    let Some(offset) = first else { return Ok(()) };
    for vcpu in &machine.vcpus[1..] {
        vcpu.with(move |fd| state::set_tsc_offset(fd, offset)).and_then(|set| set).map_err(failed)?;
    }
    Ok(())
}
