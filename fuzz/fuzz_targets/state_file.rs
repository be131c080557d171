//! The state file of a snapshot, and what is restored from it without KVM.
#![no_main]

use dormouse_fuzz::devices::{SLOTS, restore};
use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};
use vmm::{
    devices::serial::{Console, SavedSerial},
    kvm::state::{VcpuState, VmState},
    snapshot::{
        self,
        format::{Section, Sections, Writer},
    },
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const HEADER: usize = 16;
const TRAILER: usize = 4;

/// The fuzzer need not guess checksums: all are made right, if the last byte is not 0. Lengths are believed as far as they go.
fn seal(file: &mut [u8]) {
    let Some(end) = file.len().checked_sub(TRAILER) else { return };
    if file[file.len() - 1] == 0 {
        return;
    }
    let mut at = HEADER;
    while at + 16 <= end {
        let length = u32::from_le_bytes(file[at + 8..at + 12].try_into().unwrap()) as usize;
        let Some(content) = file[..end].get(at + 16..(at + 16).saturating_add(length)) else { break };
        let crc = crc32fast::hash(content);
        file[at + 12..at + 16].copy_from_slice(&crc.to_le_bytes());
        at += 16 + length;
    }
    let crc = crc32fast::hash(&file[..end]);
    file[end..].copy_from_slice(&crc.to_be_bytes());
}

/// As the machine takes a section: all of it, or nothing. What was understood is written and understood again.
fn decode<T: Serialize + DeserializeOwned>(section: &Section<'_>) -> Option<T> {
    let (value, rest) = postcard::take_from_bytes::<T>(section.content).ok()?;
    if !rest.is_empty() {
        return None;
    }
    let once = postcard::to_allocvec(&value).expect("numbers and bytes can be written");
    let again: T = postcard::from_bytes(&once).expect("what was written can be read");
    assert_eq!(postcard::to_allocvec(&again).unwrap(), once);
    Some(value)
}

fuzz_target!(|data: &[u8]| {
    let mut file = data.to_vec();
    seal(&mut file);
    let Ok(sections) = Sections::parse(&file) else { return };
    let _ = sections.check_known(&[snapshot::SHAPE, snapshot::VCPU, snapshot::VM, snapshot::LEGACY]);
    let _ = sections.only(snapshot::VM);

    // Only one file says this, but for flags that nobody reads.
    let mut writer = Writer::default();
    for section in sections.iter() {
        let write = if section.optional { Writer::optional_section } else { Writer::section };
        write(&mut writer, section.tag, section.version, section.content);
    }
    let again = writer.finish();
    assert_eq!(again.len(), file.len());
    assert!(Sections::parse(&again).unwrap().iter().eq(sections.iter()));

    for section in sections.iter() {
        match section.tag {
            // vCPUs, bytes of memory, bytes of the disk, slots.
            snapshot::SHAPE => drop(decode::<(u8, u64, u64, u32)>(section)),
            snapshot::VCPU => drop(decode::<VcpuState>(section)),
            snapshot::VM => drop(decode::<VmState>(section)),
            snapshot::LEGACY => {
                // The serial port, the RTC's index, ACPI events.
                let Some((serial, _, _)) = decode::<(SavedSerial, u8, u8)>(section) else { continue };
                let console = || Console::new(EventFd::new(EFD_NONBLOCK).unwrap());
                let mut restored = console();
                if restored.restore(&serial).is_ok() {
                    console().restore(&restored.save()).expect("what was saved can be restored");
                    for register in 0..8 {
                        restored.read(register);
                        restored.write(register, 0xff);
                    }
                    restored.text();
                }
            }
            tag => {
                if let Some(slot) = (0..SLOTS).find(|slot| snapshot::virtio(*slot) == tag) {
                    restore(slot, section.content);
                }
            }
        }
    }
});
