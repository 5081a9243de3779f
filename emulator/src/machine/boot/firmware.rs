//! What a BIOS leaves behind for programs of real mode when no BIOS has run: an interrupt vector table whose handlers return, interrupt
//! controllers with the bases of a PC, and the timer's tick.

use crate::bus::Bus;
use crate::mem::GuestMemory;

/// F000:FF53, where the PC's BIOS has its IRET.
const IRET: u64 = 0xf_ff53;
/// Handlers of the two controllers' interrupts: `push ax; mov al, 0x20; out 0xa0, al; out 0x20, al; pop ax; iret`, the first without the
/// second controller.
const FIRST: u64 = 0xf_ff60;
const SECOND: u64 = 0xf_ff70;
const END_FIRST: [u8; 7] = [0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf];
const END_SECOND: [u8; 9] = [0x50, 0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, 0x58, 0xcf];

/// Ports and bytes: ICW1 to ICW4 of both controllers (vectors 8 and 0x70, cascade on 2), the tick and the cascade unmasked, PCI's
/// lines 10 and 11 level-triggered; the timer's
/// channel 0 in mode 3 with the full count.
const PORTS: [(u16, u8); 14] = [
    (0x20, 0x11),
    (0x21, 0x08),
    (0x21, 0x04),
    (0x21, 0x01),
    (0xa0, 0x11),
    (0xa1, 0x70),
    (0xa1, 0x02),
    (0xa1, 0x01),
    (0x21, 0xfa),
    (0xa1, 0xff),
    (0x4d1, 0x0c),
    (0x43, 0x36),
    (0x40, 0x00),
    (0x40, 0x00),
];

/// Sets it all up. The table is written before a kernel is loaded, so that the kernel's own bytes win.
pub fn leave(mem: &GuestMemory, bus: &dyn Bus) {
    for (at, code) in [(IRET, &[0xcf][..]), (FIRST, &END_FIRST), (SECOND, &END_SECOND)] {
        // A machine without these first pages boots nothing, and says so when the kernel is loaded.
        let _ = mem.write(at, code);
    }
    for vector in 0..256u64 {
        let handler = match vector {
            0x08..=0x0f => FIRST,
            0x70..=0x77 => SECOND,
            _ => IRET,
        };
        let entry = (0xf000 << 16 | (handler & 0xffff)) as u32;
        let _ = mem.write(4 * vector, &entry.to_le_bytes());
    }
    for (port, byte) in PORTS {
        bus.write_port(port, &[byte]);
    }
}
