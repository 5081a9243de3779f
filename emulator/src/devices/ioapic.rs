//! I/O APIC with 24 inputs (Intel 82093AA data sheet; EOI register of ICH).

/// Inputs.
pub const PINS: usize = 24;

/// Redirection entry: delivery status, remote IRR (both read-only), trigger mode, mask.
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const ACTIVE_LOW: u64 = 1 << 13;

/// An interrupt message for local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The vector.
    pub vector: u8,
    /// Delivery mode: 0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 7 ExtINT.
    pub mode: u8,
    /// Level-triggered: its end is to be told.
    pub level: bool,
    /// Destination APIC or set of APICs.
    pub destination: u8,
    /// The destination is logical.
    pub logical: bool,
}

impl Message {
    /// What a write of 32 bits to an address means, if it is an interrupt (SDM 3A 11.11).
    pub fn from_msi(address: u64, data: u32) -> Option<Message> {
        (address >> 20 == 0xfee).then_some(Message {
            vector: data as u8,
            mode: (data >> 8) as u8 & 7,
            // A device tells no end of a level, so all are edges.
            level: false,
            destination: (address >> 12) as u8,
            logical: address & 4 != 0,
        })
    }
}

/// The chip.
#[derive(Clone, Debug)]
pub struct IoApic {
    select: u8,
    id: u8,
    entries: [u64; PINS],
    /// Levels of the pins.
    lines: u32,
    /// Edges not yet sent.
    edges: u32,
}

impl Default for IoApic {
    fn default() -> IoApic {
        IoApic { select: 0, id: 0, entries: [MASKED; PINS], lines: 0, edges: 0 }
    }
}

impl IoApic {
    /// Sets a pin: true is active, whatever the polarity, which only says what the wire does.
    pub fn set_line(&mut self, pin: usize, level: bool) {
        let Some(entry) = self.entries.get(pin) else { return };
        let bit = 1 << pin;
        let rises = level && self.lines & bit == 0;
        // An edge at a masked input is lost (82093AA, "interrupt mask").
        if rises && entry & (LEVEL | MASKED) == 0 {
            self.edges |= bit;
        }
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
    }

    /// The vector of a pin that takes edges and is not masked, with delivery mode fixed or lowest priority.
    pub fn edge_vector(&self, pin: usize) -> Option<u8> {
        self.entries.get(pin).filter(|e| **e & (LEVEL | MASKED | 0x600) == 0).map(|e| *e as u8)
    }

    /// The next message to send.
    pub fn take_message(&mut self) -> Option<Message> {
        if self.lines | self.edges == 0 {
            return None;
        }
        for (pin, entry) in self.entries.iter_mut().enumerate() {
            let bit = 1u32 << pin;
            let level = *entry & LEVEL != 0;
            let wants = if level { self.lines & bit != 0 && *entry & REMOTE_IRR == 0 } else { self.edges & bit != 0 };
            if !wants || *entry & MASKED != 0 {
                continue;
            }
            if level {
                *entry |= REMOTE_IRR;
            }
            self.edges &= !bit;
            return Some(Message {
                vector: *entry as u8,
                mode: (*entry >> 8) as u8 & 7,
                level,
                destination: (*entry >> 56) as u8,
                logical: *entry & 1 << 11 != 0,
            });
        }
        None
    }

    /// A local APIC tells the end of a level-triggered interrupt.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for entry in self.entries.iter_mut().filter(|e| **e & LEVEL != 0 && **e as u8 == vector) {
            *entry &= !REMOTE_IRR;
        }
    }

    /// Reads the 32-bit register at byte `offset`.
    pub fn read(&self, offset: u64) -> u32 {
        match offset & 0xff {
            0 => u32::from(self.select),
            0x10 => match self.select {
                0 | 2 => u32::from(self.id) << 24,
                1 => (PINS as u32 - 1) << 16 | 0x20,
                n @ 0x10..=0x3f => {
                    let entry = self.entries[usize::from(n - 0x10) / 2];
                    (entry >> (32 * (n & 1))) as u32
                }
                _ => 0,
            },
            _ => 0,
        }
    }

    /// Writes the 32-bit register at byte `offset`.
    pub fn write(&mut self, offset: u64, v: u32) {
        match offset & 0xff {
            0 => self.select = v as u8,
            0x10 => match self.select {
                0 => self.id = (v >> 24) as u8 & 0xf,
                n @ 0x10..=0x3f => {
                    let entry = &mut self.entries[usize::from(n - 0x10) / 2];
                    let shift = 32 * (n & 1);
                    let new = *entry & !(0xffff_ffff << shift) | u64::from(v) << shift;
                    let writable = !READ_ONLY & (0xff << 56 | 0x1_ffff) | ACTIVE_LOW;
                    *entry = new & writable & !READ_ONLY | *entry & READ_ONLY;
                    // What is edge-triggered has no remote IRR.
                    if *entry & LEVEL == 0 {
                        *entry &= !REMOTE_IRR;
                    }
                }
                _ => {}
            },
            0x40 => self.end_of_interrupt(v as u8),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(a: &mut IoApic, pin: u32, v: u64) {
        for half in 0..2 {
            a.write(0, 0x10 + 2 * pin + half);
            a.write(0x10, (v >> (32 * half)) as u32);
        }
    }

    #[test]
    fn edges_come_once_and_levels_until_their_end() {
        let mut a = IoApic::default();
        entry(&mut a, 4, 0x34);
        entry(&mut a, 9, LEVEL | 0x39);
        a.set_line(4, true);
        assert_eq!(a.take_message().map(|m| m.vector), Some(0x34));
        assert_eq!(a.take_message(), None);
        a.set_line(9, true);
        assert_eq!(a.take_message().map(|m| (m.vector, m.level)), Some((0x39, true)));
        assert_eq!(a.take_message(), None);
        a.end_of_interrupt(0x39);
        assert!(a.take_message().is_some(), "the line is still active");
        a.set_line(9, false);
        a.end_of_interrupt(0x39);
        assert_eq!(a.take_message(), None);
    }

    #[test]
    fn masked_levels_wait_and_masked_edges_are_lost() {
        let mut a = IoApic::default();
        entry(&mut a, 4, MASKED | 0x34);
        entry(&mut a, 5, MASKED | LEVEL | 0x35);
        a.set_line(4, true);
        a.set_line(5, true);
        assert_eq!(a.take_message(), None);
        entry(&mut a, 4, 0x34);
        entry(&mut a, 5, LEVEL | 0x35);
        assert_eq!(a.take_message().map(|m| m.vector), Some(0x35));
        assert_eq!(a.take_message(), None);
    }

    #[test]
    fn messages_are_writes_to_the_apics_addresses() {
        let m = Message::from_msi(0xfee0_3004, 0x4123).expect("an interrupt");
        let expected = Message { vector: 0x23, mode: 1, level: false, destination: 3, logical: true };
        assert_eq!(m, expected);
        assert_eq!(Message::from_msi(0xfed0_0000, 0x23), None);
        assert_eq!(Message::from_msi(0x1_fee0_0000, 0x23), None);
    }

    #[test]
    fn registers() {
        let mut a = IoApic::default();
        a.write(0, 1);
        assert_eq!(a.read(0x10), 0x0017_0020);
        entry(&mut a, 23, u64::MAX);
        a.write(0, 0x3e);
        assert_eq!(a.read(0x10), 0x0001_afff, "delivery status and remote IRR are read-only");
        a.write(0, 0x3f);
        assert_eq!(a.read(0x10), 0xff00_0000);
    }
}
