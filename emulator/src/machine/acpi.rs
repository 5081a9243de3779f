//! ACPI tables (ACPI 6.4, 5.2): RSDP, XSDT, FADT, MADT, and a DSDT that says how to turn the machine off and what is on the board.

use crate::devices::pm::OFF;
use crate::machine::pc::{IOAPIC, LAPIC, PCI_IRQS, PM_BASE, RAM_END, SCI, gsi};
use crate::mem::GuestMemory;
use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

/// Where the tables are, which is where systems search the RSDP too.
pub const TABLES: u64 = 0xe_0000;
/// What is free for them.
const SPACE: u64 = 0x1_0000;

const OEM: [u8; 6] = *b"BIVISR";
const TABLE: [u8; 8] = *b"BIVISOR ";

fn table(signature: [u8; 4], length: u32, revision: u8) -> Sdt {
    Sdt::new(signature, length, revision, OEM, TABLE, 1)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

/// The differentiated description: sleep state 5 and the legacy devices that have no other way to be found.
fn dsdt() -> Sdt {
    let off = OFF;
    let s5 = Name::new("\\_S5_".into(), &Package::new(vec![&off, &off, &0u8, &0u8]));
    let com1_id = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let com1_uid = Name::new("_UID".into(), &1u8);
    let io = IO::new(0x3f8, 0x3f8, 0, 8);
    let irq = Interrupt::new(true, true, false, false, 4);
    let com1_resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&io, &irq]));
    let com1 = Device::new("COM1".into(), vec![&com1_id, &com1_uid, &com1_resources]);
    let rtc_id = Name::new("_HID".into(), &EISAName::new("PNP0B00"));
    let rtc_io = IO::new(0x70, 0x70, 0, 2);
    let rtc_irq = Interrupt::new(true, true, false, false, 8);
    let rtc_resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&rtc_io, &rtc_irq]));
    let rtc = Device::new("RTC_".into(), vec![&rtc_id, &rtc_resources]);
    let keyboard_id = Name::new("_HID".into(), &EISAName::new("PNP0303"));
    let (data, command) = (IO::new(0x60, 0x60, 0, 1), IO::new(0x64, 0x64, 0, 1));
    let keyboard_irq = Interrupt::new(true, true, false, false, 1);
    let keyboard_resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&data, &command, &keyboard_irq]));
    let keyboard = Device::new("KBD_".into(), vec![&keyboard_id, &keyboard_resources]);
    let pci_id = Name::new("_HID".into(), &EISAName::new("PNP0A03"));
    let pci_bus = AddressSpace::new_bus_number(0u16, 0);
    let pci_config = IO::new(0xcf8, 0xcf8, 1, 8);
    let (pci_low, pci_high) = (AddressSpace::new_io(0u16, 0xcf7, None), AddressSpace::new_io(0xd00u16, 0xffff, None));
    let pci_memory =
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, RAM_END as u32, 0xfebf_ffff, None);
    let pci_windows = ResourceTemplate::new(vec![&pci_bus, &pci_config, &pci_low, &pci_high, &pci_memory]);
    let pci_resources = Name::new("_CRS".into(), &pci_windows);
    // INTA of each device is wired to an input of the I/O APIC, which is the same input of the 8259s.
    let inputs: Vec<(u32, u8)> =
        (1..32u8).map(|d| (u32::from(d) << 16 | 0xffff, PCI_IRQS[usize::from(d) % PCI_IRQS.len()])).collect();
    let routes: Vec<Package<'_>> =
        inputs.iter().map(|(device, input)| Package::new(vec![device, &0u8, &0u8, input])).collect();
    let routes = Package::new(routes.iter().map(|p| p as &dyn Aml).collect());
    let pci_routes = Name::new("_PRT".into(), &routes);
    let pci = Device::new("PCI0".into(), vec![&pci_id, &pci_resources, &pci_routes]);
    let board = Scope::new(Path::new("\\_SB_"), vec![&pci, &com1, &rtc, &keyboard]);
    let mut t = table(*b"DSDT", 36, 2);
    for part in [&s5 as &dyn Aml, &board] {
        t.append_slice(&bytes(part));
    }
    t
}

/// The fixed description (5.2.9): there is no SMI command port, so the machine is in ACPI mode already.
fn fadt(dsdt: u64) -> Sdt {
    const LEGACY_DEVICES_AND_8042: u16 = 3;
    // WBINVD works; C1 works; no sleep button; the RTC cannot wake; RESET_REG is there.
    const FLAGS: u32 = 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 10;
    let mut t = table(*b"FACP", 276, 6);
    t.write_u32(40, dsdt as u32);
    t.write_u16(46, u16::from(SCI));
    t.write_u32(56, u32::from(PM_BASE));
    t.write_u32(64, u32::from(PM_BASE) + 4);
    t.write_u32(76, u32::from(PM_BASE) + 8);
    t.write_bytes(88, &[4, 2, 0, 4]);
    t.write_u16(96, 0xfff);
    t.write_u16(98, 0xfff);
    // The century's register of the clock.
    t.write_u8(108, 0x32);
    t.write_u16(109, LEGACY_DEVICES_AND_8042);
    t.write_u32(112, FLAGS);
    // RESET_REG: system I/O, 8 bits, byte access, port 0xCF9; the value.
    t.write_bytes(116, &[1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0, 6]);
    t.write_u64(140, dsdt);
    t
}

/// Interrupt controllers (5.2.12) and where ISA interrupts differ.
fn madt() -> Sdt {
    const PCAT_COMPAT: u32 = 1;
    let mut t = table(*b"APIC", 44, 4);
    t.write_u32(36, LAPIC as u32);
    t.write_u32(40, PCAT_COMPAT);
    // Processor 0 with APIC ID 0, enabled.
    t.append_slice(&[0, 8, 0, 0, 1, 0, 0, 0]);
    let base = (IOAPIC as u32).to_le_bytes();
    t.append_slice(&[&[1, 12, 0, 0][..], &base, &[0; 4]].concat());
    for irq in 0..16 {
        let input = gsi(irq) as u32;
        // The SCI is level-triggered, active high.
        let flags: u16 = if irq == SCI { 0xd } else { 0 };
        if input != u32::from(irq) || flags != 0 {
            t.append_slice(&[&[2, 10, 0, irq][..], &input.to_le_bytes(), &flags.to_le_bytes()].concat());
        }
    }
    // LINT1 of all processors is NMI.
    t.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    t
}

/// Writes the tables; gives the address of the RSDP.
///
/// # Errors
/// A sentence, if they do not fit.
pub fn write(mem: &GuestMemory) -> Result<u64, String> {
    let mut at = TABLES + 64;
    let mut place = |t: &[u8]| {
        let here = at;
        at = (at + t.len() as u64).next_multiple_of(16);
        let fits = at <= TABLES + SPACE && mem.write(here, t).is_some();
        fits.then_some(here).ok_or_else(|| "the ACPI tables do not fit".to_owned())
    };
    let dsdt = place(dsdt().as_slice())?;
    let tables = [place(fadt(dsdt).as_slice())?, place(madt().as_slice())?];
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    tables.into_iter().for_each(|t| xsdt.add_entry(t));
    let xsdt = place(&bytes(&xsdt))?;
    mem.write(TABLES, &bytes(&Rsdp::new(OEM, xsdt))).ok_or("the ACPI tables do not fit")?;
    Ok(TABLES)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "This byte (checksum) ... the entire table, including the checksum field, must add to zero" (5.2.6).
    #[test]
    fn every_table_adds_up_to_zero() {
        let sum = |b: &[u8]| b.iter().fold(0u8, |s, v| s.wrapping_add(*v));
        for t in [dsdt(), fadt(0x1234_5678), madt()] {
            assert_eq!(sum(t.as_slice()), 0);
            assert_eq!(t.as_slice().len() as u32, u32::from_le_bytes(t.as_slice()[4..8].try_into().expect("four")));
        }
    }

    /// What the operating system looks for to turn the machine off: Name(\_S5_, Package(4) { 5, 5, 0, 0 }).
    #[test]
    fn power_off_is_named() {
        let t = dsdt();
        let at = t.as_slice().windows(4).position(|w| w == b"_S5_").expect("named");
        assert_eq!(&t.as_slice()[at + 4..at + 13], [0x12, 8, 4, 0x0a, 5, 0x0a, 5, 0, 0]);
    }
}
