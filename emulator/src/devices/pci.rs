//! PCI configuration mechanism 1 and configuration spaces (PCI Local Bus Specification 3.0, 3.2.2.3 and 6), and the host bridge (Intel 82441FX
//! data sheet, 290549).

const ENABLED: u32 = 1 << 31;

/// Offsets in a configuration space.
#[allow(missing_docs)]
pub mod reg {
    pub const COMMAND: usize = 4;
    pub const STATUS: usize = 6;
    pub const BARS: usize = 0x10;
    pub const CAPABILITIES: usize = 0x34;
    pub const LINE: usize = 0x3c;
    pub const PIN: usize = 0x3d;
}

/// Bits of the command register: answer to ports, answer to memory, no INTx.
const IO: u16 = 1;
const MEMORY: u16 = 2;
const BUS_MASTER: u16 = 4;
const NO_INTX: u16 = 1 << 10;
/// Bits of the status register: INTx wanted, a list of capabilities.
const STATUS_INTX: u8 = 1 << 3;
const STATUS_LIST: u8 = 1 << 4;

/// Who a function is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface, as the upper 24 bits of the register have them.
    pub class: u32,
    /// Subsystem's vendor and number.
    pub subsystem: (u16, u16),
}

/// The configuration space of one function: its bytes, and which bits of them software can write.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    /// Where the next capability goes, and the pointer that will name it.
    free: usize,
    link: usize,
}

impl ConfigSpace {
    /// A function without base addresses and capabilities.
    pub fn new(who: Identity) -> ConfigSpace {
        let mut c = ConfigSpace { bytes: [0; 256], writable: [0; 256], free: 0x40, link: reg::CAPABILITIES };
        c.put(0, &who.vendor.to_le_bytes());
        c.put(2, &who.device.to_le_bytes());
        c.put(8, &(who.class << 8 | u32::from(who.revision)).to_le_bytes());
        c.put(0x2c, &who.subsystem.0.to_le_bytes());
        c.put(0x2e, &who.subsystem.1.to_le_bytes());
        c.allow(reg::COMMAND, &(IO | MEMORY | BUS_MASTER | NO_INTX).to_le_bytes());
        c.allow(reg::LINE, &[0xff]);
        c
    }

    /// Sets bytes, whatever software may do.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Which bits software can write from `at` on.
    pub fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    /// Base address `n` (0 to 5) decodes `size` bytes of memory below 4 GiB, a power of two from 16 on.
    pub fn memory_bar(&mut self, n: usize, size: u32) {
        self.allow(reg::BARS + 4 * n, &(!(size - 1)).to_le_bytes());
    }

    /// Base address `n` decodes `size` ports, a power of two from 4 on. All 32 bits can be written: SeaBIOS sizes them so.
    pub fn io_bar(&mut self, n: usize, size: u32) {
        self.put(reg::BARS + 4 * n, &[1]);
        self.allow(reg::BARS + 4 * n, &(!(size - 1)).to_le_bytes());
    }

    /// The function uses INTA.
    pub fn use_intx(&mut self) {
        self.put(reg::PIN, &[1]);
    }

    /// Appends a capability: its number and what follows the pointer to the next; gives its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.free;
        self.bytes[reg::STATUS] |= STATUS_LIST;
        self.bytes[self.link] = at as u8;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.link = at + 1;
        self.free = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Reads a byte.
    pub fn read(&self, at: u8) -> u8 {
        self.bytes[usize::from(at)]
    }

    /// Writes the bits of a byte that software can write.
    pub fn write(&mut self, at: u8, v: u8) {
        let at = usize::from(at);
        self.bytes[at] = self.bytes[at] & !self.writable[at] | v & self.writable[at];
    }

    /// The 16 bits at an offset.
    pub fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// The 32 bits at an offset.
    pub fn dword(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    /// Where base address `n` decodes memory, if it does.
    pub fn memory_base(&self, n: usize) -> Option<u64> {
        let base = self.dword(reg::BARS + 4 * n) & !0xf;
        (self.word(reg::COMMAND) & MEMORY != 0 && base != 0).then_some(u64::from(base))
    }

    /// Where base address `n` decodes ports, if it does.
    pub fn io_base(&self, n: usize) -> Option<u16> {
        let base = u16::try_from(self.dword(reg::BARS + 4 * n) & !3).ok()?;
        (self.word(reg::COMMAND) & IO != 0 && base != 0).then_some(base)
    }

    /// May the function read and write memory by itself?
    pub fn is_master(&self) -> bool {
        self.word(reg::COMMAND) & BUS_MASTER != 0
    }

    /// The function wants its INTx line at a level; gives the level that the command register lets through.
    pub fn intx(&mut self, wanted: bool) -> bool {
        let status = &mut self.bytes[reg::STATUS];
        *status = *status & !STATUS_INTX | if wanted { STATUS_INTX } else { 0 };
        wanted && self.word(reg::COMMAND) & NO_INTX == 0
    }
}

/// Configuration space of the 82441FX: which bytes software may write. Memory is RAM whatever the PAM registers say.
const PAM: std::ops::Range<usize> = 0x59..0x60;
const SMRAM: usize = 0x72;

/// The bridge, device 0 of bus 0, and the address register, which says whose configuration space the data port shows.
#[derive(Clone, Debug)]
pub struct PciHost {
    address: u32,
    /// The bridge's own space.
    pub space: ConfigSpace,
}

impl Default for PciHost {
    fn default() -> PciHost {
        // Class 6, subclass 0: host bridge. QEMU's subsystem, by which firmware knows that the machine is virtual.
        let (class, subsystem) = (0x06_0000, (0x1af4, 0x1100));
        let mut space = ConfigSpace::new(Identity { vendor: 0x8086, device: 0x1237, revision: 2, class, subsystem });
        space.put(reg::COMMAND, &[6, 0, 0x80, 0x02]);
        space.allow(reg::COMMAND, &[0, 0xff]);
        space.allow(reg::LINE, &[0]);
        space.allow(PAM.start, &[0xff; PAM.end - PAM.start]);
        space.allow(SMRAM, &[0xff]);
        PciHost { address: 0, space }
    }
}

impl PciHost {
    /// The address register, 32 bits at port 0xCF8.
    pub fn address(&self) -> u32 {
        self.address
    }

    /// Writes the address register.
    pub fn set_address(&mut self, v: u32) {
        self.address = v & (ENABLED | 0xff_fffc);
    }

    /// Whose register byte 0 to 3 of the data port is: device and function (device << 3 | function) of bus 0, and the register.
    pub fn target(&self, byte: u8) -> Option<(u8, u8)> {
        let there = self.address & ENABLED != 0 && self.address >> 16 & 0xff == 0;
        there.then_some(((self.address >> 8) as u8, (self.address & 0xfc) as u8 | byte & 3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dword(c: &ConfigSpace, at: u8) -> u32 {
        u32::from_le_bytes([0, 1, 2, 3].map(|n| c.read(at + n)))
    }

    fn write(c: &mut ConfigSpace, at: u8, v: u32) {
        v.to_le_bytes().into_iter().zip(at..).for_each(|(b, at)| c.write(at, b));
    }

    #[test]
    fn the_address_register_names_a_function() {
        let mut p = PciHost::default();
        assert_eq!(p.target(0), None, "not enabled");
        p.set_address(ENABLED | 3 << 11 | 1 << 8 | 0x44);
        assert_eq!(p.target(2), Some((3 << 3 | 1, 0x46)));
        p.set_address(ENABLED | 1 << 16);
        assert_eq!(p.target(0), None, "there is one bus");
    }

    #[test]
    fn the_bridge_has_an_identity_that_cannot_be_written_and_registers_that_can() {
        let mut space = PciHost::default().space;
        assert_eq!((dword(&space, 0), dword(&space, 8)), (0x1237_8086, 0x0600_0002));
        write(&mut space, 0, 0x5555_5555);
        write(&mut space, 0x58, 0x33 << 8);
        assert_eq!((dword(&space, 0), dword(&space, 0x58)), (0x1237_8086, 0x3300));
    }

    /// "Software ... writes all 1s to the register and reads it back" (6.2.5.1).
    #[test]
    fn base_addresses_tell_their_size() {
        let mut c = ConfigSpace::new(Identity::default());
        c.memory_bar(0, 0x4000);
        c.io_bar(4, 16);
        for at in [0x10, 0x14, 0x20] {
            write(&mut c, at, u32::MAX);
        }
        assert_eq!([0x10, 0x14, 0x20].map(|at| dword(&c, at)), [0xffff_c000, 0, 0xffff_fff1]);
        write(&mut c, 0x10, 0xfe00_0000);
        write(&mut c, 0x20, 0xc000);
        assert_eq!((c.memory_base(0), c.io_base(4)), (None, None), "not enabled");
        write(&mut c, 4, 3);
        assert_eq!((c.memory_base(0), c.io_base(4)), (Some(0xfe00_0000), Some(0xc000)));
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut c = ConfigSpace::new(Identity::default());
        assert_eq!(c.read(6) & STATUS_LIST, 0);
        let first = c.add_capability(9, &[1, 2, 3]);
        let second = c.add_capability(0x11, &[4; 10]);
        assert_eq!((c.read(6) & STATUS_LIST, c.read(0x34)), (STATUS_LIST, first as u8));
        assert_eq!((c.read(first as u8), c.read(first as u8 + 1)), (9, second as u8));
        assert_eq!((c.read(second as u8), c.read(second as u8 + 1)), (0x11, 0));
    }
}
