//! The ACPI tables (version 6, "hardware-reduced": no fixed-hardware registers to emulate).
//!
//! ```text
//! RSDP ─► XSDT ─┬─► FADT ─► DSDT: COM1, RTC, power button, event device, VMGenID, virtio-mmio windows
//!               └─► MADT: a local APIC for each vCPU, one IOAPIC
//! ```
//! The start of the tables is told to the kernel by PVH. Debian's cloud kernel finds virtio-mmio devices only here (it does not
//! take them from its arguments).

use acpi_tables::{
    Aml,
    aml::{
        Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path,
        ResourceTemplate, Scope, Store, ZERO,
    },
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::arch::layout;

const OEM: [u8; 6] = *b"DORMSE";
const OEM_TABLE: [u8; 8] = *b"MICROVM ";

/// What the tables describe.
#[derive(Debug, Clone)]
pub struct Machine {
    /// How many vCPUs.
    pub vcpus: u8,
    /// Which virtio slots hold a device.
    pub slots: Vec<usize>,
}

/// Writes the tables to [`layout::ACPI`]; the address of the RSDP. `None`: they do not fit.
pub fn write(memory: &GuestMemoryMmap, machine: &Machine) -> Option<u64> {
    let mut at = layout::ACPI;
    let mut put = |bytes: Vec<u8>| {
        let here = at;
        // Tables are aligned to 16 bytes; the RSDP must be.
        at = (here + bytes.len() as u64).next_multiple_of(16);
        if at > layout::FIRMWARE {
            return None;
        }
        memory.write_slice(&bytes, GuestAddress(here)).ok()?;
        Some(here)
    };
    let dsdt = put(dsdt(machine))?;
    let fadt = put(fadt(dsdt))?;
    let madt = put(madt(machine.vcpus))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(bytes(&xsdt))?;
    put(bytes(&Rsdp::new(OEM, xsdt)))
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address))
}

fn fadt(dsdt: u64) -> Vec<u8> {
    // No VGA (bit 2), and no 8042 (bit 1 clear), so that the kernel does not look for them. The RTC is there (bit 5 clear).
    const BOOT_FLAGS: u16 = 1 << 2;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // With a control method instead of fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    fadt.reset_reg = port(layout::RESET);
    fadt.reset_value = crate::devices::power::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS);
    bytes(&fadt.finalize())
}

fn madt(vcpus: u8) -> Vec<u8> {
    let mut madt = MADT::new(OEM, OEM_TABLE, 1, LocalInterruptController::Address(layout::LAPIC));
    for vcpu in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    // Without overrides, interrupts below 16 are edges, active high, and numbered as on the IOAPIC: what ours are.
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    bytes(&madt)
}

fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn dsdt(machine: &Machine) -> Vec<u8> {
    let mut aml = Vec::new();
    // \_S5: what to write into the sleep control register to turn off.
    let off = crate::devices::power::SLEEP_TYPE_OFF;
    Name::new(Path::new("_S5_"), &Package::new(vec![&off, &off, &ZERO, &ZERO])).to_aml_bytes(&mut aml);

    // The tables say where the serial port's interrupt is; without a legacy PIC the kernel has no other way to know.
    let com1 = layout::COM1;
    Scope::new(
        Path::new("_SB_"),
        vec![
            &Device::new(
                Path::new("COM1"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&edge(layout::COM1_GSI), &IO::new(com1, com1, 1, 8)])),
                ],
            ),
            // No interrupt: nobody sets alarms. The kernel reads the time of day from it once.
            &Device::new(
                Path::new("RTC_"),
                vec![&Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")), &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&IO::new(0x70, 0x70, 1, 2)]))],
            ),
            &Device::new(Path::new("PWRB"), vec![&Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")), &Name::new(Path::new("_UID"), &ZERO)]),
            // VMGenID (Microsoft, "Virtual Machine Generation ID"): ADDR is where the identifier is.
            &Device::new(
                Path::new("VGEN"),
                vec![
                    &Name::new(Path::new("_HID"), &"DORM0001"),
                    &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
                    &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
                    &Name::new(Path::new("ADDR"), &Package::new(vec![&(layout::VMGENID as u32), &ZERO])),
                ],
            ),
            // The event device: reading its register tells what happened, and clears it.
            &Device::new(
                Path::new("EVNT"),
                vec![
                    &Name::new(Path::new("_HID"), &"ACPI0013"),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&edge(layout::ACPI_GSI)])),
                    &OpRegion::new(Path::new("EREG"), OpRegionSpace::SystemIO, &layout::ACPI_EVENTS, &1u8),
                    &Field::new(
                        Path::new("EREG"),
                        FieldAccessType::Byte,
                        FieldLockRule::NoLock,
                        FieldUpdateRule::WriteAsZeroes,
                        vec![FieldEntry::Named(*b"EBIT", 8)],
                    ),
                    &Method::new(
                        Path::new("_EVT"),
                        1,
                        true,
                        vec![
                            &Store::new(&Local(0), &Path::new("EBIT")),
                            &If::new(&acpi_tables::aml::And::new(&Local(1), &Local(0), &crate::devices::power::EVENT_BUTTON), vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80u8)]),
                            &If::new(&acpi_tables::aml::And::new(&Local(1), &Local(0), &crate::devices::power::EVENT_GENERATION), vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &0x80u8)]),
                        ],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut aml);

    for slot in &machine.slots {
        let name = format!("VIO{slot}");
        Scope::new(
            Path::new("_SB_"),
            vec![&Device::new(
                Path::new(&name),
                vec![
                    &Name::new(Path::new("_HID"), &"LNRO0005"),
                    &Name::new(Path::new("_UID"), &(*slot as u32)),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![&Memory32Fixed::new(true, layout::virtio_window(*slot) as u32, 0x1000), &edge(layout::virtio_gsi(*slot))]),
                    ),
                ],
            )],
        )
        .to_aml_bytes(&mut aml);
    }

    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, 1);
    table.append_slice(&aml);
    bytes(&table)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    #[test]
    fn every_table_is_found_and_its_checksum_is_right() {
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let rsdp = write(&memory, &Machine { vcpus: 16, slots: vec![0, 1, 2, 3, 4] }).unwrap();
        let read = |at: u64, length: usize| {
            let mut bytes = vec![0; length];
            memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes
        };
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        let root = read(rsdp, 36);
        assert_eq!((&root[..8], sum(&root[..20]), sum(&root)), (&b"RSD PTR "[..], 0, 0));
        let table = |at: u64| {
            let length = u32::from_le_bytes(read(at + 4, 4).try_into().unwrap()) as usize;
            let table = read(at, length);
            assert_eq!(sum(&table), 0);
            table
        };
        let address = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
        let xsdt = table(address(&root[24..32]));
        let entries: Vec<Vec<u8>> = xsdt[36..].chunks(8).map(|entry| table(address(entry))).collect();
        assert_eq!(entries.iter().map(|entry| &entry[..4]).collect::<Vec<_>>(), [b"FACP", b"APIC"]);
        let dsdt = table(address(&entries[0][140..148]));
        assert_eq!(dsdt.windows(8).filter(|window| window == b"LNRO0005").count(), 5);
        assert!(dsdt.windows(8).any(|window| window == b"ACPI0013"));
    }
}
