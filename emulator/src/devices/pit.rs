//! 8254 programmable interval timer: three counters (Intel 8254 data sheet, 231164).
//!
//! A counter keeps when its count began, and works out count and output from the time it is asked at.

/// Input frequency in Hz.
pub const FREQUENCY: u64 = 1_193_182;

/// Nanoseconds.
type Ns = u64;

/// Ticks of the input clock since time 0.
fn ticks(now: Ns) -> u64 {
    (u128::from(now) * u128::from(FREQUENCY) / 1_000_000_000) as u64
}

/// The first time at which that many ticks have passed.
fn time_of(ticks: u64) -> Ns {
    (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(FREQUENCY)) as u64
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Bytes {
    Low,
    High,
    #[default]
    Both,
}

#[derive(Clone, Debug, Default)]
struct Counter {
    mode: u8,
    bcd: bool,
    bytes: Bytes,
    /// As written; 0 is the greatest count.
    reload: u16,
    /// A count was written since the control word.
    loaded: bool,
    /// The tick at which counting began.
    start: u64,
    /// For modes 1 and 5: a rising gate started it.
    triggered: bool,
    gate: bool,
    /// The gate went low: the tick at which counting stopped.
    stopped: Option<u64>,
    /// Counter latch, by the latch command.
    latch: Option<u16>,
    status: Option<u8>,
    /// The next byte is the high one of two.
    read_high: bool,
    write_high: bool,
    low: u8,
}

impl Counter {
    fn period(&self) -> u64 {
        match (self.reload, self.bcd) {
            (0, false) => 0x1_0000,
            (0, true) => 10_000,
            (v, false) => u64::from(v),
            (v, true) => [v >> 12, v >> 8 & 15, v >> 4 & 15, v & 15].iter().fold(0, |n, &d| n * 10 + u64::from(d)),
        }
        .max(1)
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// Ticks counted so far.
    fn elapsed(&self, now: u64) -> u64 {
        self.stopped.unwrap_or(now).saturating_sub(self.start)
    }

    fn is_counting(&self) -> bool {
        self.loaded && (self.triggered || !matches!(self.mode, 1 | 5))
    }

    fn count(&self, now: u64) -> u16 {
        if !self.is_counting() {
            return self.reload;
        }
        let (n, passed) = (self.period(), self.elapsed(now));
        let (left, wraps) = match self.mode {
            2 => (n - passed % n, n),
            // Counts by two, twice a period.
            3 => (n - passed * 2 % n, n),
            _ => {
                let wraps = if self.bcd { 10_000 } else { 0x1_0000 };
                ((n + wraps - passed % wraps) % wraps, wraps)
            }
        };
        let left = if left == wraps && wraps > 0xffff { 0 } else { left };
        if self.bcd {
            let d = |p: u64| (left / p % 10) as u16;
            d(1000) << 12 | d(100) << 8 | d(10) << 4 | d(1)
        } else {
            left as u16
        }
    }

    fn output(&self, now: u64) -> bool {
        if !self.is_counting() {
            return self.mode != 0;
        }
        let (n, passed) = (self.period(), self.elapsed(now));
        match self.mode {
            0 | 1 => passed >= n,
            2 => !self.gate || passed % n != n - 1,
            3 => !self.gate || passed % n < n.div_ceil(2),
            // A strobe of one tick.
            _ => passed != n,
        }
    }

    /// The next tick after `now` at which the output changes.
    fn next_change(&self, now: u64) -> Option<u64> {
        if !self.is_counting() || self.stopped.is_some() {
            return None;
        }
        let (n, passed) = (self.period(), self.elapsed(now));
        let round = passed - passed % n;
        let marks = match self.mode {
            0 | 1 => [n, n],
            2 => [round + n - 1, round + n],
            3 => [round + n.div_ceil(2), round + n],
            _ => [n, n + 1],
        };
        let next = marks.into_iter().find(|&m| m > passed);
        // Before the strobe of the next round, for periods of one tick.
        let next = next.or(self.is_periodic().then_some(round + 2 * n - 1));
        next.map(|m| self.start + m)
    }

    fn control(&mut self, v: u8, now: u64) {
        if v & 0x30 == 0 {
            self.latch = self.latch.or(Some(self.count(now)));
            return;
        }
        let gate = self.gate;
        let mode = v >> 1 & 7;
        let bytes = match v >> 4 & 3 {
            1 => Bytes::Low,
            2 => Bytes::High,
            _ => Bytes::Both,
        };
        *self = Counter {
            mode: if mode > 5 { mode - 4 } else { mode },
            bcd: v & 1 != 0,
            bytes,
            gate,
            stopped: (!gate).then_some(now),
            ..Counter::default()
        };
    }

    fn latch_status(&mut self, now: u64) {
        let bytes = match self.bytes {
            Bytes::Low => 1,
            Bytes::High => 2,
            Bytes::Both => 3,
        };
        let null = !self.loaded;
        let v =
            u8::from(self.output(now)) << 7 | u8::from(null) << 6 | bytes << 4 | self.mode << 1 | u8::from(self.bcd);
        self.status = self.status.or(Some(v));
    }

    fn write(&mut self, v: u8, now: u64) {
        let value = match (self.bytes, self.write_high) {
            (Bytes::Low, _) => u16::from(v),
            (Bytes::High, _) => u16::from(v) << 8,
            (Bytes::Both, false) => {
                self.low = v;
                self.write_high = true;
                // In mode 0 the first byte stops the count.
                if self.mode == 0 {
                    self.loaded = false;
                }
                return;
            }
            (Bytes::Both, true) => u16::from(v) << 8 | u16::from(self.low),
        };
        self.write_high = false;
        let begin = !self.loaded || !self.is_periodic();
        self.reload = value;
        if begin {
            // Modes 1 and 5 begin at the next rising gate.
            if !(self.loaded && matches!(self.mode, 1 | 5)) {
                self.start = now;
                self.stopped = (!self.gate).then_some(now);
            }
            self.loaded = true;
        } else {
            // The new count is for the next period; from a start that makes the present one end when it should.
            self.start = now;
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let count = self.latch.unwrap_or_else(|| self.count(now));
        let high = match self.bytes {
            Bytes::Low => false,
            Bytes::High => true,
            Bytes::Both => self.read_high,
        };
        if self.bytes == Bytes::Both {
            self.read_high = !self.read_high;
        }
        if high || self.bytes == Bytes::Low {
            self.latch = None;
        }
        if high { (count >> 8) as u8 } else { count as u8 }
    }

    fn set_gate(&mut self, level: bool, now: u64) {
        let rises = level && !self.gate;
        self.gate = level;
        match self.mode {
            1 | 5 if rises && self.loaded => {
                self.triggered = true;
                self.start = now;
                self.stopped = None;
            }
            1 | 5 => {}
            _ if !level => self.stopped = self.stopped.or(Some(now)),
            2 | 3 if rises => {
                self.start = now;
                self.stopped = None;
            }
            _ => {
                if let Some(stopped) = self.stopped.take() {
                    self.start += now.saturating_sub(stopped);
                }
            }
        }
    }
}

/// The chip.
#[derive(Clone, Debug)]
pub struct Pit {
    counters: [Counter; 3],
}

impl Default for Pit {
    /// Gates of counters 0 and 1 tied high, that of counter 2 low.
    fn default() -> Pit {
        let open = Counter { gate: true, ..Counter::default() };
        Pit { counters: [open.clone(), open, Counter::default()] }
    }
}

impl Pit {
    /// Reads register 0 to 3.
    pub fn read(&mut self, register: u8, now: Ns) -> u8 {
        match self.counters.get_mut(usize::from(register)) {
            Some(c) => c.read(ticks(now)),
            None => 0xff,
        }
    }

    /// Writes register 0 to 3; 3 is the control word.
    pub fn write(&mut self, register: u8, v: u8, now: Ns) {
        let now = ticks(now);
        if let Some(c) = self.counters.get_mut(usize::from(register)) {
            return c.write(v, now);
        }
        match v >> 6 {
            3 => {
                for (n, c) in self.counters.iter_mut().enumerate().filter(|(n, _)| v >> (n + 1) & 1 != 0) {
                    let _ = n;
                    if v & 0x20 == 0 {
                        c.latch = c.latch.or(Some(c.count(now)));
                    }
                    if v & 0x10 == 0 {
                        c.latch_status(now);
                    }
                }
            }
            n => self.counters[usize::from(n)].control(v, now),
        }
    }

    /// The output pin of counter 0, 1 or 2.
    pub fn output(&self, counter: usize, now: Ns) -> bool {
        self.counters.get(counter).is_some_and(|c| c.output(ticks(now)))
    }

    /// Sets the gate of counter 2.
    pub fn set_gate(&mut self, level: bool, now: Ns) {
        self.counters[2].set_gate(level, ticks(now));
    }

    /// The level of counter 2's gate.
    pub fn gate(&self) -> bool {
        self.counters[2].gate
    }

    /// When the output of counter 0 changes next.
    pub fn next(&self, now: Ns) -> Option<Ns> {
        self.counters[0].next_change(ticks(now)).map(time_of)
    }

    /// How often the output of counter 0 rose between two times. For a clock that makes long steps.
    pub fn rises(&self, from: Ns, to: Ns) -> u64 {
        let (from, to) = (ticks(from), ticks(to));
        let c = &self.counters[0];
        let mut at = from;
        // Two changes are one period: more steps find nothing new.
        for _ in 0..3 {
            match c.next_change(at) {
                Some(t) if t <= to => {
                    if c.output(t) && !c.output(t - 1) {
                        let periodic = matches!(c.mode, 2 | 3);
                        return 1 + if periodic { (to - t) / c.period().max(1) } else { 0 };
                    }
                    at = t;
                }
                _ => return 0,
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter(mode: u8, count: u16) -> Pit {
        let mut p = Pit::default();
        p.write(3, 0x30 | mode << 1, 0);
        p.write(0, count as u8, 0);
        p.write(0, (count >> 8) as u8, 0);
        p
    }

    fn read(p: &mut Pit, now: Ns) -> u16 {
        p.write(3, 0, now);
        u16::from(p.read(0, now)) | u16::from(p.read(0, now)) << 8
    }

    #[test]
    fn rate_generator() {
        let mut p = counter(2, 1000);
        assert_eq!(read(&mut p, 0), 1000);
        assert_eq!(read(&mut p, time_of(1)), 999);
        assert_eq!(read(&mut p, time_of(999)), 1);
        assert_eq!(read(&mut p, time_of(1000)), 1000);
        assert!(p.output(0, time_of(998)) && !p.output(0, time_of(999)) && p.output(0, time_of(1000)));
        assert_eq!(p.next(time_of(5)), Some(time_of(999)));
        assert_eq!([999, 1000, 1001, 1999, 2000, 5500].map(|to| p.rises(time_of(5), time_of(to))), [0, 1, 1, 1, 2, 5]);
    }

    #[test]
    fn square_wave() {
        let p = counter(3, 10);
        let wave: Vec<bool> = (0..20).map(|t| p.output(0, time_of(t))).collect();
        assert_eq!(wave, [[true; 5], [false; 5], [true; 5], [false; 5]].concat());
    }

    #[test]
    fn interrupt_on_terminal_count() {
        let mut p = counter(0, 100);
        assert!(!p.output(0, time_of(99)));
        assert!(p.output(0, time_of(100)) && p.output(0, time_of(5000)));
        assert_eq!(read(&mut p, time_of(101)), 0xffff);
        assert_eq!(p.next(time_of(100)), None);
    }

    /// What Linux's and SeaBIOS's calibrations do: gate of counter 2 up, mode 0, wait for the output.
    #[test]
    fn counter_two_waits_for_its_gate() {
        let mut p = Pit::default();
        p.write(3, 0xb0, 0);
        p.write(2, 0x10, 0);
        p.write(2, 0x27, 0);
        assert!(!p.output(2, time_of(1_000_000)));
        p.set_gate(true, time_of(50));
        assert!(!p.output(2, time_of(50 + 9999)) && p.output(2, time_of(50 + 10_000)));
    }

    #[test]
    fn status_and_latch_by_read_back() {
        let mut p = counter(2, 1000);
        p.write(3, 0xc2, time_of(10));
        assert_eq!(p.read(0, time_of(20)), 0xb4, "output high, both bytes, mode 2");
        assert_eq!((p.read(0, time_of(30)), p.read(0, time_of(30))), (0xde, 0x03), "990, latched at 10");
    }

    #[test]
    fn bcd_counts_decimally() {
        let mut p = Pit::default();
        p.write(3, 0x31 | 2 << 1, 0);
        p.write(0, 0x00, 0);
        p.write(0, 0x10, 0);
        assert_eq!(read(&mut p, time_of(1)), 0x0999);
    }
}
