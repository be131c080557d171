//! Puts a machine together: memory, KVM, devices, threads.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, mpsc},
};

use rustix::event::epoll;
use virtio_devices::{
    balloon::Balloon,
    block::Block,
    device::{Interrupt, VirtioDevice, Watch, descriptor_of},
    net::Net,
    rng::Rng,
    transport::{MmioTransport, QUEUE_NOTIFY},
    vsock::Vsock,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Machine, MachineError, OWN, Phase, Shell, ThreadKind, slot, usage::Counters};
use crate::{
    arch::layout::{self, VIRTIO_SLOTS},
    devices::{bus::Bus, power::Power, serial::Console},
    kvm::{KvmError, vcpu::Vcpu, vm::Vm},
    memory::GuestRam,
};

fn event() -> Result<EventFd, MachineError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|error| MachineError::host("making an event descriptor", &error))
}

/// See [`Machine::prepare`].
pub fn assemble(shell: Shell) -> Result<Machine, MachineError> {
    let Shell { kvm, memory, memory_bytes, memory_use, vcpus, disk_bytes, net, vsock, confine, mut process_files } = shell;
    if !(1..=16).contains(&vcpus) {
        return Err(MachineError::request(&format!("a machine has 1 to 16 vCPUs, not {vcpus}")));
    }
    let ram = Arc::new(GuestRam::map(memory, memory_bytes, memory_use).map_err(|error| MachineError::host("mapping guest memory", &error))?);
    let dirty = ram.find_way(process_files.pagemap.take());
    let kvm_failed = |error: KvmError| MachineError::kvm("making the machine", &error);
    let vm = Arc::new(Vm::new(kvm, &ram).map_err(kvm_failed)?);

    let epoll: Arc<OwnedFd> = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| MachineError::host("making an epoll", &io::Error::from(error)))?);
    let watch = |slot: usize| Watch::new(epoll.clone(), slot as u32);
    let stopped = event()?;
    Watch::new(epoll.clone(), OWN).add(descriptor_of(&stopped), 0, epoll::EventFlags::IN).map_err(|error| MachineError::host("watching the vCPUs", &error))?;

    let line = |gsi| {
        let line = event()?;
        vm.attach_interrupt(&line, gsi).map_err(kvm_failed)?;
        Ok::<_, MachineError>(line)
    };
    let made = |name: &str, error: io::Error| MachineError::host(&format!("making the {name} device"), &error);

    let mut counters = Counters::default();
    let mut virtio: [Option<Mutex<MmioTransport>>; VIRTIO_SLOTS] = Default::default();
    let mut put = |slot: usize, device: Box<dyn VirtioDevice>| -> Result<(), MachineError> {
        let interrupt = Interrupt::new(line(layout::virtio_gsi(slot))?);
        let transport = MmioTransport::new(device, ram.memory().clone(), interrupt, watch(slot)).map_err(|error| made("virtio-mmio", error))?;
        for (queue, kick) in (0..).zip(transport.kicks()) {
            vm.attach_kick(kick, layout::virtio_window(slot) + QUEUE_NOTIFY, queue).map_err(kvm_failed)?;
        }
        virtio[slot] = Some(Mutex::new(transport));
        Ok(())
    };

    let confine_block = {
        let confine = confine.clone();
        move || confine(ThreadKind::Block)
    };
    let block = Block::new(disk_bytes, &watch(slot::BLOCK), confine_block).map_err(|error| made("block", error))?;
    counters.block = Some(block.counters());
    put(slot::BLOCK, Box::new(block))?;
    put(slot::VSOCK, Box::new(Vsock::new(vsock.into(), watch(slot::VSOCK)).map_err(|error| made("vsock", error))?))?;
    put(slot::RNG, Box::new(Rng::new(&watch(slot::RNG)).map_err(|error| made("entropy", error))?))?;
    let discard = {
        let ram = ram.clone();
        Box::new(move |address: vm_memory::GuestAddress, bytes| ram.discard(address.0, bytes))
    };
    put(slot::BALLOON, Box::new(Balloon::new(discard, &watch(slot::BALLOON)).map_err(|error| made("balloon", error))?))?;
    if let Some((spec, tap)) = net {
        let net = Net::new(tap, spec.mac, watch(slot::NET)).map_err(|error| made("network", error))?;
        counters.net = Some(net.counters());
        put(slot::NET, Box::new(net))?;
    }

    let (stops, heard) = mpsc::channel();
    let ring = stopped.try_clone().map_err(|error| MachineError::host("making an event descriptor", &error))?;
    let bus = Arc::new(Bus::new(Console::new(line(layout::COM1_GSI)?), Power::new(line(layout::ACPI_GSI)?), virtio, ram.memory().clone(), stops, ring));
    let vcpus = (0..vcpus).map(|vcpu| Vcpu::new(&vm, vcpu, bus.clone(), &confine)).collect::<Result<Vec<_>, _>>().map_err(kvm_failed)?;
    Ok(Machine { vcpus, bus, vm, ram, identities: Vec::new(), phase: Phase::Ready, disk_bytes, epoll, stops: heard, stopped, untold: None, dirty, process_files, counters })
}
