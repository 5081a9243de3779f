//! ACPI fixed hardware: PM1 event and control registers, the PM timer (ACPI 6.4, 4.8.3).

type Ns = u64;

/// The timer's frequency in Hz.
const FREQUENCY: u64 = 3_579_545;

/// PM1 control: SCI enable, sleep type, sleep enable.
const SCI_EN: u16 = 1;
const SLP_EN: u16 = 1 << 13;

/// PM1 status and enable: the timer's highest bit changed; the power button.
const TMR: u16 = 1;
const POWER_BUTTON: u16 = 1 << 8;

/// The SLP_TYP value that turns the machine off, as `\_S5` names it.
pub const OFF: u8 = 5;

/// The registers.
#[derive(Clone, Debug, Default)]
pub struct Pm {
    status: u16,
    enable: u16,
    control: u16,
    sleep: Option<u8>,
    seen: Ns,
}

fn ticks(now: Ns) -> u64 {
    (u128::from(now) * u128::from(FREQUENCY) / 1_000_000_000) as u64
}

impl Pm {
    /// Notes what has happened up to `now`.
    pub fn advance(&mut self, now: Ns) {
        let from = self.seen;
        self.seen = now.max(from);
        if ticks(from) >> 23 != ticks(now) >> 23 {
            self.status |= TMR;
        }
    }

    /// When the SCI may come next.
    pub fn next(&self, now: Ns) -> Option<Ns> {
        let change = ((ticks(now) >> 23) + 1) << 23;
        let at = (u128::from(change) * 1_000_000_000).div_ceil(u128::from(FREQUENCY)) as u64;
        (self.enable & !self.status & TMR != 0).then_some(at)
    }

    /// The system control interrupt.
    pub fn irq(&self) -> bool {
        self.control & SCI_EN != 0 && self.status & self.enable != 0
    }

    /// Somebody presses the power button.
    pub fn press_power_button(&mut self) {
        self.status |= POWER_BUTTON;
    }

    /// Has the operating system gone to sleep, and in which way? Asking clears it.
    pub fn take_sleep(&mut self) -> Option<u8> {
        self.sleep.take()
    }

    /// Switches between legacy and ACPI mode: what the SMI command port does.
    pub fn set_acpi(&mut self, on: bool) {
        self.control = self.control & !SCI_EN | u16::from(on);
    }

    /// Reads byte `offset`: status 0-1, enable 2-3, control 4-5, timer 8-11.
    pub fn read(&self, offset: u8, now: Ns) -> u8 {
        let word = match offset {
            0..=1 => u32::from(self.status) << 16 | u32::from(self.status),
            2..=3 => u32::from(self.enable) << 16,
            4..=5 => u32::from(self.control),
            8..=11 => ticks(now) as u32 & 0xff_ffff,
            _ => 0,
        };
        (word >> (8 * (offset & 3))) as u8
    }

    /// Writes byte `offset`.
    pub fn write(&mut self, offset: u8, v: u8) {
        let high = offset & 1 != 0;
        let merge = |old: u16| if high { old & 0xff | u16::from(v) << 8 } else { old & 0xff00 | u16::from(v) };
        match offset {
            // Ones clear.
            0..=1 => self.status &= !(u16::from(v) << if high { 8 } else { 0 }),
            2..=3 => self.enable = merge(self.enable),
            4..=5 => {
                let new = merge(self.control);
                self.control = new & !SLP_EN;
                if high && new & SLP_EN != 0 {
                    self.sleep = Some((new >> 10) as u8 & 7);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_off_is_a_sleep_type() {
        let mut p = Pm::default();
        p.write(4, 1);
        p.write(5, (OFF << 2) | 0x20);
        assert_eq!((p.take_sleep(), p.take_sleep()), (Some(OFF), None));
        assert_eq!(p.read(4, 0), 1);
    }

    #[test]
    fn the_timer_counts_and_its_carry_interrupts() {
        let mut p = Pm::default();
        let word = |p: &Pm, now| (8..12).rev().fold(0u32, |v, o| v << 8 | u32::from(p.read(o, now)));
        assert_eq!(word(&p, 1_000_000_000), 3_579_545);
        p.write(2, 1);
        p.set_acpi(true);
        let at = p.next(0).expect("enabled");
        p.advance(at - 1000);
        assert!(!p.irq());
        p.advance(at);
        assert!(p.irq());
        p.write(0, 1);
        assert!(!p.irq());
    }

    #[test]
    fn the_button() {
        let mut p = Pm::default();
        p.write(3, 1);
        p.set_acpi(true);
        p.press_power_button();
        assert!(p.irq());
        assert_eq!(p.read(1, 0), 1);
    }
}
