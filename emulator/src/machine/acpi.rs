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

/// The tables but for the RSDP, one after the other from an address on.
struct Tables {
    bytes: Vec<u8>,
    /// Where the XSDT begins.
    xsdt: usize,
    /// Where addresses of other tables are, and in how many bytes.
    pointers: Vec<(usize, u8)>,
    /// Those that have such addresses: beginning and length.
    pointing: Vec<(usize, usize)>,
}

fn tables(base: u64) -> Tables {
    let mut t = Tables { bytes: Vec::new(), xsdt: 0, pointers: Vec::new(), pointing: Vec::new() };
    let mut place = |table: &[u8]| {
        let at = t.bytes.len().next_multiple_of(16);
        t.bytes.resize(at, 0);
        t.bytes.extend(table);
        at
    };
    let dsdt = place(dsdt().as_slice());
    let fixed = fadt(base + dsdt as u64);
    let (fadt, madt) = (place(fixed.as_slice()), place(madt().as_slice()));
    let mut root = XSDT::new(OEM, TABLE, 1);
    [fadt, madt].into_iter().for_each(|at| root.add_entry(base + at as u64));
    let root = bytes(&root);
    t.xsdt = place(&root);
    // The FADT's two addresses of the DSDT; the XSDT's entries.
    t.pointers = vec![(fadt + 40, 4), (fadt + 140, 8), (t.xsdt + 36, 8), (t.xsdt + 44, 8)];
    t.pointing = vec![(fadt, fixed.as_slice().len()), (t.xsdt, root.len())];
    t
}

/// Writes the tables; gives the address of the RSDP.
///
/// # Errors
/// A sentence, if they do not fit.
pub fn write(mem: &GuestMemory) -> Result<u64, String> {
    const BASE: u64 = TABLES + 64;
    let t = tables(BASE);
    let root = bytes(&Rsdp::new(OEM, BASE + t.xsdt as u64));
    let fits = BASE + t.bytes.len() as u64 <= TABLES + SPACE;
    let written = mem.write(BASE, &t.bytes).and_then(|()| mem.write(TABLES, &root));
    written.filter(|()| fits).map(|()| TABLES).ok_or_else(|| "the ACPI tables do not fit".to_owned())
}

/// The tables as files for firmware that puts them into memory itself, and the script by which it does (QEMU's
/// docs/specs/acpi_bios_linker_loader: allocate, add an address, add up).
pub fn firmware_files() -> [(&'static str, Vec<u8>); 3] {
    const NAMES: [&str; 3] = ["etc/acpi/rsdp", "etc/acpi/tables", "etc/table-loader"];
    let [root_file, tables_file, _] = NAMES;
    let t = tables(0);
    let root = bytes(&Rsdp::new(OEM, t.xsdt as u64));
    let mut script = Vec::new();
    let mut command = |number: u32, names: &[&str], rest: &[u8]| {
        let start = script.len();
        script.extend(number.to_le_bytes());
        for name in names {
            let mut field = [0; 56];
            field[..name.len()].copy_from_slice(name.as_bytes());
            script.extend(field);
        }
        script.extend(rest);
        script.resize(start + 128, 0);
    };
    let words = |words: &[usize]| words.iter().flat_map(|w| (*w as u32).to_le_bytes()).collect::<Vec<u8>>();
    // Alignment, and the zone: 1 anywhere, 2 where the RSDP is searched.
    command(1, &[root_file], &[&words(&[16])[..], &[2]].concat());
    command(1, &[tables_file], &[&words(&[64])[..], &[1]].concat());
    for (at, size) in &t.pointers {
        command(2, &[tables_file, tables_file], &[&words(&[*at])[..], &[*size]].concat());
    }
    command(2, &[root_file, tables_file], &[&words(&[24])[..], &[8]].concat());
    // Where the sum goes, and over what.
    for (start, len) in &t.pointing {
        command(3, &[tables_file], &words(&[start + 9, *start, *len]));
    }
    command(3, &[root_file], &words(&[32, 0, root.len()]));
    [(NAMES[0], root), (NAMES[1], t.bytes), (NAMES[2], script)]
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

    /// Firmware that follows the script has what [`write`] writes, at another place.
    #[test]
    fn the_script_makes_whole_tables() {
        const BASE: u64 = 0x12_3440;
        let [(_, mut root), (_, mut all), (_, script)] = firmware_files();
        let word = |c: &[u8], at: usize| u32::from_le_bytes(c[at..at + 4].try_into().expect("four")) as usize;
        for c in script.chunks_exact(128) {
            let file = if c[4..].starts_with(b"etc/acpi/rsdp\0") { &mut root } else { &mut all };
            match word(c, 0) {
                2 => {
                    let (at, size) = (word(c, 116), usize::from(c[120]));
                    let mut v = [0; 8];
                    v[..size].copy_from_slice(&file[at..at + size]);
                    let v = (u64::from_le_bytes(v) + BASE).to_le_bytes();
                    file[at..at + size].copy_from_slice(&v[..size]);
                }
                3 => {
                    let (at, start, len) = (word(c, 60), word(c, 64), word(c, 68));
                    let sum = file[start..start + len].iter().fold(0u8, |s, v| s.wrapping_add(*v));
                    file[at] = file[at].wrapping_sub(sum);
                }
                n => assert_eq!(n, 1),
            }
        }
        let there = tables(BASE);
        assert_eq!(all, there.bytes);
        assert_eq!(root, bytes(&Rsdp::new(OEM, BASE + there.xsdt as u64)));
    }

    /// What the operating system looks for to turn the machine off: Name(\_S5_, Package(4) { 5, 5, 0, 0 }).
    #[test]
    fn power_off_is_named() {
        let t = dsdt();
        let at = t.as_slice().windows(4).position(|w| w == b"_S5_").expect("named");
        assert_eq!(&t.as_slice()[at + 4..at + 13], [0x12, 8, 4, 0x0a, 5, 0x0a, 5, 0, 0]);
    }
}
