//! 16550A serial port (National Semiconductor PC16550D data sheet). Bytes leave at once, whatever the divisor says.

use std::collections::VecDeque;

const FIFO: usize = 16;

/// Line status: received data.
const LSR_DR: u8 = 1;
/// Line status: overrun.
const LSR_OE: u8 = 2;
/// Line status: transmitter empty (holding register, shift register).
const LSR_EMPTY: u8 = 0x60;

/// The chip.
#[derive(Clone, Debug)]
pub struct Uart {
    ier: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: u16,
    fifo_on: bool,
    overrun: bool,
    /// The transmitter has become empty and nobody has looked yet.
    thr_interrupt: bool,
    trigger: usize,
    received: VecDeque<u8>,
    sent: Vec<u8>,
    /// Changes of the modem lines, for the low half of the modem status.
    deltas: u8,
}

impl Default for Uart {
    fn default() -> Uart {
        Uart {
            ier: 0,
            lcr: 3,
            mcr: 8,
            scratch: 0,
            divisor: 12,
            fifo_on: false,
            overrun: false,
            thr_interrupt: false,
            trigger: 1,
            received: VecDeque::new(),
            sent: Vec::new(),
            deltas: 0,
        }
    }
}

impl Uart {
    fn capacity(&self) -> usize {
        if self.fifo_on { FIFO } else { 1 }
    }

    /// How many more bytes can be received now.
    pub fn room(&self) -> usize {
        self.capacity().saturating_sub(self.received.len())
    }

    /// A byte comes in on the line.
    pub fn receive(&mut self, byte: u8) {
        if self.mcr & 0x10 != 0 {
            return; // the receiver is on the transmitter's line
        }
        self.push(byte);
    }

    fn push(&mut self, byte: u8) {
        if self.room() == 0 {
            self.overrun = true;
        } else {
            self.received.push_back(byte);
        }
    }

    /// What was sent since the last call.
    pub fn take_sent(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.sent)
    }

    /// Is there something for [`Uart::take_sent`]?
    pub fn has_sent(&self) -> bool {
        !self.sent.is_empty()
    }

    /// The interrupt source with the highest priority, as IIR says it; 1: none.
    fn cause(&self) -> u8 {
        if self.ier & 4 != 0 && self.overrun {
            6
        } else if self.ier & 1 != 0 && self.received.len() >= self.trigger.min(self.capacity()) {
            4
        } else if self.ier & 1 != 0 && !self.received.is_empty() {
            // The character time-out of the FIFO, which has passed as soon as nothing more is there.
            0xc
        } else if self.ier & 2 != 0 && self.thr_interrupt {
            2
        } else if self.ier & 8 != 0 && self.deltas != 0 {
            0
        } else {
            1
        }
    }

    /// The interrupt line. A PC's serial card gates the pin with OUT2; as on QEMU's it goes through always, for there are systems (xv6) that
    /// were never tried with the gate and leave OUT2 off.
    pub fn irq(&self) -> bool {
        self.cause() != 1
    }

    /// Modem lines: with nobody at the other end, ready and carrier; in loopback, our own outputs.
    fn modem(&self) -> u8 {
        let lines = if self.mcr & 0x10 != 0 {
            (self.mcr & 1) << 5 | (self.mcr & 2) << 3 | (self.mcr & 4) << 4 | (self.mcr & 8) << 4
        } else {
            0xb0
        };
        lines | self.deltas
    }

    /// Reads register 0 to 7.
    pub fn read(&mut self, register: u8) -> u8 {
        let dlab = self.lcr & 0x80 != 0;
        match register {
            0 if dlab => self.divisor as u8,
            1 if dlab => (self.divisor >> 8) as u8,
            0 => self.received.pop_front().unwrap_or(0),
            1 => self.ier,
            2 => {
                let cause = self.cause();
                if cause == 2 {
                    self.thr_interrupt = false;
                }
                cause | if self.fifo_on { 0xc0 } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let overrun = if std::mem::take(&mut self.overrun) { LSR_OE } else { 0 };
                let ready = if self.received.is_empty() { 0 } else { LSR_DR };
                LSR_EMPTY | overrun | ready
            }
            6 => {
                let v = self.modem();
                self.deltas = 0;
                v
            }
            _ => self.scratch,
        }
    }

    /// Writes register 0 to 7.
    pub fn write(&mut self, register: u8, v: u8) {
        let dlab = self.lcr & 0x80 != 0;
        match register {
            0 if dlab => self.divisor = self.divisor & 0xff00 | u16::from(v),
            1 if dlab => self.divisor = self.divisor & 0xff | u16::from(v) << 8,
            0 => {
                if self.mcr & 0x10 != 0 {
                    self.push(v);
                } else {
                    self.sent.push(v);
                }
                self.thr_interrupt = true;
            }
            1 => {
                // Enabling it while the register is empty interrupts at once.
                if v & 2 != 0 && self.ier & 2 == 0 {
                    self.thr_interrupt = true;
                }
                self.ier = v & 0xf;
            }
            2 => {
                let on = v & 1 != 0;
                if on != self.fifo_on || v & 2 != 0 {
                    self.received.clear();
                }
                self.fifo_on = on;
                self.trigger = [1, 4, 8, 14][usize::from(v >> 6)];
            }
            3 => self.lcr = v,
            4 => {
                let before = self.modem() & 0xf0;
                self.mcr = v & 0x1f;
                let changed = (before ^ self.modem()) >> 4;
                // RI counts at its trailing edge only.
                self.deltas |= changed & 0xb | changed & before >> 4 & 4;
            }
            5 | 6 => {}
            _ => self.scratch = v,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sends_and_says_so() {
        let mut u = Uart::default();
        u.write(1, 2);
        assert!(u.irq(), "empty when enabled");
        assert_eq!((u.read(2), u.read(2)), (2, 1), "reading it clears it");
        u.write(0, b'a');
        assert_eq!((u.read(5), u.take_sent()), (0x60, b"a".to_vec()));
        assert!(u.irq() && u.read(2) == 2);
    }

    #[test]
    fn receives_with_and_without_fifo() {
        let mut u = Uart::default();
        u.write(1, 5);
        u.receive(1);
        u.receive(2);
        assert_eq!((u.read(2), u.read(5), u.read(5), u.read(0), u.room()), (6, 0x63, 0x61, 1, 1));
        u.write(2, 0x81);
        for n in 0..8 {
            u.receive(n);
        }
        assert_eq!(u.read(2), 0xc4, "the trigger level");
        assert_eq!(u.read(0), 0);
        assert_eq!(u.read(2), 0xcc, "the time-out for what is left");
        assert_eq!((1..8).map(|_| u.read(0)).collect::<Vec<_>>(), (1..8).collect::<Vec<_>>());
        assert_eq!((u.read(2), u.irq()), (0xc1, false));
    }

    /// xv6 sets no modem control, OUT2 included, and no FIFO.
    #[test]
    fn interrupts_without_out2() {
        let mut u = Uart::default();
        u.write(4, 0);
        u.write(1, 1);
        u.receive(b'a');
        assert!(u.irq());
        assert_eq!((u.read(0), u.irq()), (b'a', false));
    }

    /// What Linux's probe does: scratch register, loopback of the modem lines, the FIFO's bits.
    #[test]
    fn probes() {
        let mut u = Uart::default();
        u.write(7, 0x5a);
        u.write(4, 0x1a);
        assert_eq!((u.read(7), u.read(6) & 0xf0), (0x5a, 0x90));
        u.write(0, 0x42);
        assert_eq!((u.read(0), u.take_sent().len()), (0x42, 0));
        u.write(2, 1);
        assert_eq!(u.read(2) & 0xc0, 0xc0);
        u.write(3, 0x83);
        u.write(0, 1);
        u.write(1, 2);
        assert_eq!((u.read(0), u.read(1)), (1, 2));
        u.write(3, 3);
        assert_eq!(u.read(1), 0);
    }
}
