//! PCI host bridge with configuration mechanism 1 (PCI Local Bus Specification 3.0, 3.2.2.3; Intel 82441FX data sheet, 290549).

/// The bridge is the only function on its bus: bus 0, device 0, function 0.
const BRIDGE: u32 = 0;
const ENABLED: u32 = 1 << 31;

/// Configuration space of the 82441FX: which bytes software may write. Memory is RAM whatever the PAM registers say.
const COMMAND: usize = 4;
const PAM: std::ops::Range<usize> = 0x59..0x60;
const SMRAM: usize = 0x72;

/// The chip.
#[derive(Clone, Debug)]
pub struct PciHost {
    address: u32,
    space: [u8; 256],
}

impl Default for PciHost {
    fn default() -> PciHost {
        let mut space = [0; 256];
        let mut word = |at: usize, v: u16| space[at..at + 2].copy_from_slice(&v.to_le_bytes());
        word(0, 0x8086);
        word(2, 0x1237);
        word(COMMAND, 6);
        word(6, 0x0280);
        word(8, 2);
        // Class 6, subclass 0: host bridge.
        word(0xa, 0x0600);
        // QEMU's subsystem, by which firmware knows that the machine is virtual.
        word(0x2c, 0x1af4);
        word(0x2e, 0x1100);
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

    /// The register that a byte of the data port is, if there is a function.
    fn register(&self, byte: u8) -> Option<usize> {
        let there = self.address & ENABLED != 0 && self.address >> 8 & 0xffff == BRIDGE;
        there.then_some((self.address & 0xfc) as usize + usize::from(byte & 3))
    }

    /// Reads byte 0 to 3 of the data port. Nobody there: all ones.
    pub fn read(&self, byte: u8) -> u8 {
        self.register(byte).and_then(|r| self.space.get(r)).copied().unwrap_or(0xff)
    }

    /// Writes byte 0 to 3 of the data port.
    pub fn write(&mut self, byte: u8, v: u8) {
        match self.register(byte) {
            Some(r) if r == COMMAND + 1 || r == SMRAM || PAM.contains(&r) => self.space[r] = v,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(p: &mut PciHost, address: u32) -> u32 {
        p.set_address(address);
        u32::from_le_bytes([0, 1, 2, 3].map(|n| p.read(n)))
    }

    #[test]
    fn one_function_and_nobody_else() {
        let mut p = PciHost::default();
        assert_eq!(read(&mut p, ENABLED), 0x1237_8086);
        assert_eq!(read(&mut p, ENABLED | 8), 0x0600_0002);
        assert_eq!(read(&mut p, ENABLED | 1 << 11), u32::MAX);
        assert_eq!(read(&mut p, ENABLED | 1 << 16), u32::MAX);
        assert_eq!(read(&mut p, 0), u32::MAX, "not enabled");
    }

    #[test]
    fn identity_is_read_only_and_memory_registers_are_not() {
        let mut p = PciHost::default();
        p.set_address(ENABLED);
        p.write(0, 0x55);
        p.set_address(ENABLED | 0x58);
        p.write(1, 0x33);
        assert_eq!((read(&mut p, ENABLED) as u16, read(&mut p, ENABLED | 0x58)), (0x8086, 0x3300));
    }
}
