//! A save: device state, memory difference, disk map (order: vmm.md §2.2).

use std::{fs::File, io::Write};

use serde::{Deserialize, Serialize};
use virtio_devices::{block::layers::Merged, vsock::Vsock};
use vmm_protocol::control::{Fault, ParkedStream};

use super::{Machine, MachineError, SaveParts, SavedMachine, Steps, slot};
use crate::{
    devices::{bus::lock, serial::SavedSerial},
    kvm::state::{VcpuState, VmState},
    memory::difference::{self, WriteError},
    snapshot::{self, format},
};

/// Version of every section that this program writes.
pub const SECTION_VERSION: u16 = 1;

/// What a machine must be like to take the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    pub vcpus: u8,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    /// Bit n: there is a device in virtio slot n.
    pub slots: u32,
}

impl Shape {
    pub fn of(machine: &Machine) -> Self {
        let slots = (0..).zip(&machine.bus.virtio).map(|(slot, device)| u32::from(device.is_some()) << slot).sum();
        Self { vcpus: machine.vcpus.len() as u8, memory_bytes: machine.ram.bytes(), disk_bytes: machine.disk_bytes, slots }
    }
}

/// State of the devices that are not virtio.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Legacy {
    pub serial: SavedSerial,
    pub rtc_index: u8,
    pub acpi_events: u8,
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    postcard::to_allocvec(value).expect("numbers and byte vectors into a growing buffer: nothing in it can fail")
}

fn cancelled_error() -> MachineError {
    MachineError { fault: Fault::Cancelled, why: "the save was cancelled".to_owned() }
}

/// See [`Machine::save`]; the machine is paused.
pub fn save(machine: &mut Machine, state: &File, parts: SaveParts, cancelled: &mut dyn FnMut() -> bool) -> Result<SavedMachine, MachineError> {
    let mut steps = Steps::begin();
    let mut sections = format::Writer::default();
    sections.section(snapshot::SHAPE, SECTION_VERSION, &encode(&Shape::of(machine)));

    // Devices before vCPUs and interrupt controllers: what they finished while they were being paused raised interrupts, and
    // those must be in the state of the controllers (or are raised again at the restore, see `Interrupt::restore`).
    let mut virtio = Vec::new();
    for (slot, device) in machine.bus.virtio.iter().enumerate().filter_map(|(slot, device)| Some((slot, device.as_ref()?))) {
        virtio.push((slot, lock(device).save()));
    }
    let streams = machine.device(slot::VSOCK, |transport| transport.device_as::<Vsock>().map(|vsock| vsock.take_streams())).flatten();
    let streams = streams.transpose().map_err(|error| MachineError::host("parking streams", &error))?.unwrap_or_default();
    steps.done("devices");

    for (vcpu, identity) in machine.vcpus.iter().zip(machine.identities.clone()) {
        let vm = machine.vm.clone();
        let saved = vcpu.with(move |fd| VcpuState::read(fd, &vm, identity)).and_then(|saved| saved).map_err(|error| MachineError::kvm("saving a vCPU", &error))?;
        sections.section(snapshot::VCPU, SECTION_VERSION, &encode(&saved));
    }
    let vm = VmState::read(&machine.vm).map_err(|error| MachineError::kvm("saving the machine", &error))?;
    sections.section(snapshot::VM, SECTION_VERSION, &encode(&vm));
    let legacy = Legacy { serial: lock(&machine.bus.console).save(), rtc_index: lock(&machine.bus.rtc).selected(), acpi_events: machine.bus.power.pending() };
    sections.section(snapshot::LEGACY, SECTION_VERSION, &encode(&legacy));
    for (slot, saved) in virtio {
        sections.section(snapshot::virtio(slot), SECTION_VERSION, &saved);
    }
    let bytes = sections.finish();
    steps.done("state");

    let (memory, map_crc32, merged) = match parts {
        SaveParts::Image => {
            machine.ram.sync().map_err(|error| MachineError::host("syncing guest memory", &error))?;
            steps.done("memory");
            machine.with_block(|block| block.seal(None))?.map_err(|error| MachineError::host("syncing the disk", &error))?;
            steps.done("disk");
            (None, None, false)
        }
        SaveParts::Difference { memory, image_memory, disk_map, merge_layers } => {
            let written = difference::write(&machine.ram, &machine.dirty, &image_memory, &memory, cancelled).map_err(|error| match error {
                WriteError::Cancelled => cancelled_error(),
                other => MachineError::host("writing the memory difference", &other),
            })?;
            steps.done("memory");
            let merged = if merge_layers {
                match machine.with_block(|block| block.merge(cancelled))?.map_err(|error| MachineError::host("merging disk layers", &error))? {
                    Merged::Wholly => true,
                    Merged::Cancelled => return Err(cancelled_error()),
                }
            } else {
                false
            };
            let crc = machine.with_block(|block| block.seal(Some(&disk_map)))?.map_err(|error| MachineError::host("sealing the disk layer", &error))?;
            steps.done("disk");
            (Some(written.into()), crc, merged)
        }
    };

    if cancelled() {
        return Err(cancelled_error());
    }
    let mut file = state;
    file.write_all(&bytes).and_then(|()| file.sync_data()).map_err(|error| MachineError::host("writing the device state", &error))?;
    steps.done("write");
    let streams = streams.into_iter().map(|stream| (ParkedStream { guest_port: stream.guest_port, host_port: stream.host_port }, stream.socket)).collect();
    Ok(SavedMachine { state_bytes: bytes.len() as u64, state_crc32: crc32fast::hash(&bytes), memory, map_crc32, merged, streams, phases: steps.phases })
}
