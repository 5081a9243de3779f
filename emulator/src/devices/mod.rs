//! The chips of a PC, one file each. A chip has registers and pins; it knows no bus, no IRQ number, no thread and no clock: whoever wires
//! it hands it offsets, bytes and the time.

pub mod cmos;
pub mod disk;
pub mod fw_cfg;
pub mod i8042;
pub mod ide;
pub mod ioapic;
pub mod lapic;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod pm;
pub mod testdev;
pub mod uart;
pub mod vga;
pub mod virtio;

/// A binary-coded decimal byte.
fn bcd(v: u8) -> u8 {
    ((v / 10) << 4) | (v % 10)
}
