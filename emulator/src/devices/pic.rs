//! 8259A interrupt controllers, master and slave (Intel 8259A data sheet, 231468).

use crate::bus::Programmed;

/// One 8259A.
#[derive(Clone, Debug, Default)]
struct Chip {
    /// Levels of the input pins.
    lines: u8,
    /// Requests.
    irr: u8,
    /// In service.
    isr: u8,
    /// Masked inputs.
    imr: u8,
    /// Inputs that are level-triggered (the ELCR register of PCI chipsets).
    elcr: u8,
    /// ICW2: the vector of input 0.
    base: u8,
    /// The input with the highest priority.
    first: u8,
    /// Which initialisation word is expected next at the odd address; 0: none.
    icw: u8,
    /// ICW4 will come.
    wants_icw4: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    /// OCW3: the even address reads ISR instead of IRR.
    read_isr: bool,
    /// OCW3: the next read acknowledges.
    poll: bool,
    special_mask: bool,
    special_fully_nested: bool,
}

impl Chip {
    fn programmed(&self) -> Programmed {
        Programmed { base: self.base, masked: self.imr, by_level: self.elcr }
    }

    fn set_line(&mut self, n: u8, level: bool) {
        let bit = 1 << n;
        if self.elcr & bit != 0 {
            self.irr = if level { self.irr | bit } else { self.irr & !bit };
        } else if level && self.lines & bit == 0 {
            self.irr |= bit;
        } else if !level {
            // An edge-triggered request lasts only as long as the line (8259A "edge and level triggered modes").
            self.irr &= !bit;
        }
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
    }

    /// Position in the order of priorities, 0 highest, of the first input in `set`; 8 if there is none.
    fn rank(&self, set: u8) -> u8 {
        set.rotate_right(u32::from(self.first)).trailing_zeros() as u8
    }

    /// The input that the chip asks for service of.
    fn request(&self, is_master: bool) -> Option<u8> {
        let rank = self.rank(self.irr & !self.imr);
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        if self.special_fully_nested && is_master {
            // The slave may ask again while one of its own is in service.
            serving &= !(1 << 2);
        }
        (rank < 8 && rank < self.rank(serving)).then_some((rank + self.first) & 7)
    }

    fn acknowledge(&mut self, n: u8) {
        let bit = 1 << n;
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.first = (n + 1) & 7;
        }
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
    }

    fn read(&mut self, odd: bool, is_master: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.request(is_master) {
                Some(n) => {
                    self.acknowledge(n);
                    0x80 | n
                }
                None => 0,
            };
        }
        match (odd, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }

    fn write(&mut self, odd: bool, v: u8) {
        match (odd, self.icw) {
            (false, _) if v & 0x10 != 0 => self.icw1(v),
            (false, _) if v & 8 != 0 => self.ocw3(v),
            (false, _) => self.ocw2(v),
            (true, 2) => {
                self.base = v & 0xf8;
                self.icw = 3;
            }
            // ICW3 tells where the slave is; the wiring is fixed here.
            (true, 3) => self.icw = if self.wants_icw4 { 4 } else { 0 },
            (true, 4) => {
                self.auto_eoi = v & 2 != 0;
                self.special_fully_nested = v & 0x10 != 0;
                self.icw = 0;
            }
            (true, _) => self.imr = v,
        }
    }

    fn icw1(&mut self, v: u8) {
        let (lines, elcr) = (self.lines, self.elcr);
        *self = Chip { lines, elcr, icw: 2, wants_icw4: v & 1 != 0, ..Chip::default() };
        self.irr = lines & elcr;
    }

    fn ocw3(&mut self, v: u8) {
        if v & 2 != 0 {
            self.read_isr = v & 1 != 0;
        }
        self.poll = v & 4 != 0;
        if v & 0x40 != 0 {
            self.special_mask = v & 0x20 != 0;
        }
    }

    fn ocw2(&mut self, v: u8) {
        let named = v & 7;
        match v >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            // Non-specific end of interrupt, without and with rotation.
            1 | 5 => {
                let rank = self.rank(self.isr);
                if rank < 8 {
                    let n = (rank + self.first) & 7;
                    self.isr &= !(1 << n);
                    if v >> 5 == 5 {
                        self.first = (n + 1) & 7;
                    }
                }
            }
            3 => self.isr &= !(1 << named),
            7 => {
                self.isr &= !(1 << named);
                self.first = (named + 1) & 7;
            }
            6 => self.first = (named + 1) & 7,
            _ => {}
        }
    }
}

/// The pair as a PC has it: the slave on input 2 of the master.
#[derive(Clone, Debug, Default)]
pub struct Pic {
    master: Chip,
    slave: Chip,
}

/// The master's input that the slave is on.
const CASCADE: u8 = 2;

impl Pic {
    /// How it has been programmed, the master first.
    pub fn programmed(&self) -> [Programmed; 2] {
        [self.master.programmed(), self.slave.programmed()]
    }

    /// Sets the level of input 0 to 15; 2 is taken by the slave.
    pub fn set_line(&mut self, n: u8, level: bool) {
        match n {
            8..=15 => self.slave.set_line(n - 8, level),
            0..=7 if n != CASCADE => self.master.set_line(n, level),
            _ => {}
        }
        self.cascade();
    }

    fn cascade(&mut self) {
        let level = self.slave.request(false).is_some();
        // Each new request of the slave is an edge.
        if level && self.master.irr & 1 << CASCADE == 0 && self.master.isr & 1 << CASCADE == 0 {
            self.master.lines &= !(1 << CASCADE);
        }
        self.master.set_line(CASCADE, level);
    }

    /// Does the master have an unmasked request of this input?
    pub fn has_request(&self, n: u8) -> bool {
        self.master.irr & !self.master.imr & 1 << (n & 7) != 0
    }

    /// The INT pin to the processor.
    pub fn is_pending(&self) -> bool {
        self.master.request(true).is_some()
    }

    /// INTA: the vector. If the request has gone away it is the spurious one, input 7.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(n) = self.master.request(true) else { return self.master.base + 7 };
        self.master.acknowledge(n);
        let vector = if n != CASCADE {
            self.master.base + n
        } else if let Some(n) = self.slave.request(false) {
            self.slave.acknowledge(n);
            self.slave.base + n
        } else {
            self.slave.base + 7
        };
        self.cascade();
        vector
    }

    fn chip(&mut self, slave: bool) -> &mut Chip {
        if slave { &mut self.slave } else { &mut self.master }
    }

    /// Reads a register: of the slave or the master, at the odd or even address.
    pub fn read(&mut self, slave: bool, odd: bool) -> u8 {
        let v = self.chip(slave).read(odd, !slave);
        self.cascade();
        v
    }

    /// Writes a register.
    pub fn write(&mut self, slave: bool, odd: bool, v: u8) {
        self.chip(slave).write(odd, v);
        // After an end of interrupt the slave's other requests are a new edge for the master.
        self.cascade();
    }

    /// Reads the edge/level register.
    pub fn elcr(&self, slave: bool) -> u8 {
        if slave { self.slave.elcr } else { self.master.elcr }
    }

    /// Writes the edge/level register; inputs 0, 1, 2, 8 and 13 are always edge-triggered.
    pub fn set_elcr(&mut self, slave: bool, v: u8) {
        self.chip(slave).elcr = v & if slave { !0x21 } else { !0x07 };
        self.cascade();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As BIOS and Linux program it: vectors from `base` (master) and `base + 8`, nothing masked.
    fn ready(base: u8) -> Pic {
        let mut p = Pic::default();
        for slave in [false, true] {
            p.write(slave, false, 0x11);
            p.write(slave, true, base + 8 * u8::from(slave));
            p.write(slave, true, if slave { 2 } else { 4 });
            p.write(slave, true, 1);
        }
        p
    }

    #[test]
    fn the_lower_number_goes_first_and_waits_for_its_end() {
        let mut p = ready(0x20);
        p.set_line(4, true);
        p.set_line(1, true);
        assert_eq!(p.acknowledge(), 0x21);
        assert!(!p.is_pending(), "4 waits for 1");
        p.write(false, false, 0x20);
        assert_eq!(p.acknowledge(), 0x24);
        p.set_line(0, true);
        assert_eq!(p.acknowledge(), 0x20, "0 interrupts 4");
    }

    #[test]
    fn the_slave_comes_by_input_two() {
        let mut p = ready(0x20);
        p.set_line(14, true);
        p.set_line(9, true);
        assert_eq!(p.acknowledge(), 0x29);
        assert!(!p.is_pending());
        p.write(true, false, 0x20);
        assert!(!p.is_pending(), "the master still serves input 2");
        p.write(false, false, 0x20);
        assert_eq!(p.acknowledge(), 0x2e);
    }

    #[test]
    fn masks_edges_and_levels() {
        let mut p = ready(0x20);
        p.write(false, true, 0x10);
        p.set_line(4, true);
        assert!(!p.is_pending());
        p.write(false, true, 0);
        assert_eq!(p.acknowledge(), 0x24);
        p.write(false, false, 0x64);
        assert!(!p.is_pending(), "an edge counts once");
        p.set_elcr(true, 0xff);
        assert_eq!(p.elcr(true), 0xde);
        p.set_line(11, true);
        assert_eq!(p.acknowledge(), 0x2b);
        for slave in [true, false] {
            p.write(slave, false, 0x20);
        }
        assert_eq!(p.acknowledge(), 0x2b, "a level asks again");
    }

    #[test]
    fn a_request_that_went_away_is_spurious() {
        let mut p = ready(0x20);
        p.set_line(5, true);
        p.set_line(5, false);
        assert!(!p.is_pending());
        assert_eq!(p.acknowledge(), 0x27);
        p.write(false, false, 0x0b);
        assert_eq!(p.read(false, false), 0, "nothing is in service");
    }

    #[test]
    fn polling_acknowledges() {
        let mut p = ready(0x20);
        p.set_line(3, true);
        p.write(false, false, 0x0c);
        assert_eq!(p.read(false, false), 0x83);
        p.write(false, false, 0x0b);
        assert_eq!(p.read(false, false), 8);
    }
}
