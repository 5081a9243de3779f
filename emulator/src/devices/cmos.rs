//! MC146818 real-time clock and CMOS RAM (Motorola MC146818A data sheet; PC use of the bytes as Bochs and SeaBIOS have it).

use crate::devices::bcd;

type Ns = u64;

const NS: u64 = 1_000_000_000;

/// Registers B and C: periodic, alarm, update-ended.
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATE: u8 = 0x10;
/// Register B: the clock is being set.
const SET: u8 = 0x80;
/// Register B: binary instead of BCD; 24 hours.
const BINARY: u8 = 4;
const HOURS_24: u8 = 2;

/// Clock and 128 bytes of RAM.
#[derive(Clone, Debug)]
pub struct Cmos {
    index: u8,
    bytes: [u8; 128],
    /// Seconds since 1970 at time 0.
    epoch: i64,
    flags: u8,
    /// Up to here the interrupt causes have been looked at.
    seen: Ns,
}

/// Days since 1970-01-01 to year, month, day (the civil calendar; H. Hinnant's algorithm).
fn civil(days: i64) -> (i64, u8, u8) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let m = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * m + 2) / 5 + 1;
    let month = if m < 10 { m + 3 } else { m - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month as u8, day as u8)
}

/// The other way round.
fn days(year: i64, month: u8, day: u8) -> i64 {
    let (m, d) = (i64::from(month), i64::from(day));
    let y = if m <= 2 { year - 1 } else { year };
    let year_of_era = y.rem_euclid(400);
    let day_of_year = (153 * (m + if m > 2 { -3 } else { 9 }) + 2) / 5 + d - 1;
    y.div_euclid(400) * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

impl Cmos {
    /// A clock that shows `epoch` (seconds since 1970, UTC) at time 0.
    pub fn new(epoch: i64) -> Cmos {
        let mut bytes = [0; 128];
        bytes[0xa] = 0x26;
        bytes[0xb] = HOURS_24;
        Cmos { index: 0, bytes, epoch, flags: 0, seen: 0 }
    }

    /// Sets a byte of the RAM, for what a BIOS wants to know of the machine.
    pub fn set(&mut self, index: u8, v: u8) {
        self.bytes[usize::from(index & 0x7f)] = v;
    }

    /// The index register; bit 7 is the PC's NMI mask.
    pub fn select(&mut self, v: u8) {
        self.index = v & 0x7f;
    }

    fn seconds(&self, now: Ns) -> i64 {
        self.epoch.saturating_add((now / NS) as i64)
    }

    /// As register B wants numbers.
    fn shown(&self, v: u8) -> u8 {
        if self.bytes[0xb] & BINARY != 0 { v } else { bcd(v) }
    }

    fn meant(&self, v: u8) -> u8 {
        if self.bytes[0xb] & BINARY != 0 { v } else { (v >> 4).saturating_mul(10).saturating_add(v & 15) }
    }

    fn hour(&self, hour: u8) -> u8 {
        if self.bytes[0xb] & HOURS_24 != 0 {
            return self.shown(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.shown(twelve) | if hour >= 12 { 0x80 } else { 0 }
    }

    /// Seconds, minutes, hours, weekday, day, month, year, century: registers 0 2 4 6 7 8 9 0x32.
    fn time(&self, register: u8, now: Ns) -> u8 {
        let t = self.seconds(now);
        let (day, second) = (t.div_euclid(86_400), t.rem_euclid(86_400));
        let (year, month, date) = civil(day);
        match register {
            0 => self.shown((second % 60) as u8),
            2 => self.shown((second / 60 % 60) as u8),
            4 => self.hour((second / 3600) as u8),
            6 => self.shown(((day + 4).rem_euclid(7) + 1) as u8),
            7 => self.shown(date),
            8 => self.shown(month),
            9 => self.shown(year.rem_euclid(100) as u8),
            _ => self.shown((year / 100).rem_euclid(100) as u8),
        }
    }

    fn set_time(&mut self, register: u8, v: u8, now: Ns) {
        let field = |r: u8| {
            let raw = if r == register { v } else { self.time(r, now) };
            let pm = r == 4 && self.bytes[0xb] & HOURS_24 == 0 && raw & 0x80 != 0;
            let n = self.meant(if pm { raw & 0x7f } else { raw });
            if r == 4 && self.bytes[0xb] & HOURS_24 == 0 { n % 12 + if pm { 12 } else { 0 } } else { n }
        };
        let year = i64::from(field(0x32)) * 100 + i64::from(field(9));
        let day = days(year, field(8).clamp(1, 12), field(7).clamp(1, 31));
        let t = day * 86_400 + i64::from(field(4)) * 3600 + i64::from(field(2)) * 60 + i64::from(field(0));
        self.epoch = t - (now / NS) as i64;
    }

    /// The period of the periodic interrupt, by register A.
    fn period(&self) -> Option<Ns> {
        let rate = match self.bytes[0xa] & 15 {
            0 => return None,
            r @ 1..=2 => r + 7,
            r => r,
        };
        Some(NS / (32_768 >> (rate - 1)))
    }

    /// Notes what has happened up to `now`.
    pub fn advance(&mut self, now: Ns) {
        if now <= self.seen {
            return;
        }
        let from = std::mem::replace(&mut self.seen, now);
        if self.period().is_some_and(|p| from / p != now / p) {
            self.flags |= PERIODIC;
        }
        if from / NS != now / NS && self.bytes[0xb] & SET == 0 {
            self.flags |= UPDATE;
            // An alarm byte of 0xC0 and more matches everything.
            let hit = |alarm: usize, time: u8| self.bytes[alarm] >= 0xc0 || self.bytes[alarm] == self.time(time, now);
            if hit(1, 0) && hit(3, 2) && hit(5, 4) {
                self.flags |= ALARM;
            }
        }
    }

    /// The interrupt pin.
    pub fn irq(&self) -> bool {
        self.flags & self.bytes[0xb] & (PERIODIC | ALARM | UPDATE) != 0
    }

    /// When the pin may change next.
    pub fn next(&self, now: Ns) -> Option<Ns> {
        let enabled = self.bytes[0xb] & !self.flags;
        let second = (enabled & (UPDATE | ALARM) != 0).then_some((now / NS + 1) * NS);
        let tick = self.period().filter(|_| enabled & PERIODIC != 0).map(|p| (now / p + 1) * p);
        second.into_iter().chain(tick).min()
    }

    /// Reads the register selected by the index.
    pub fn read(&mut self, now: Ns) -> u8 {
        self.advance(now);
        match self.index {
            r @ (0 | 2 | 4 | 6..=9 | 0x32) => self.time(r, now),
            // Update in progress for the last 244 us of a second.
            0xa => self.bytes[0xa] & 0x7f | if now % NS >= NS - 244_000 { 0x80 } else { 0 },
            0xc => {
                let any = if self.irq() { 0x80 } else { 0 };
                std::mem::take(&mut self.flags) | any
            }
            // The battery is good.
            0xd => 0x80,
            r => self.bytes[usize::from(r)],
        }
    }

    /// Writes the register selected by the index.
    pub fn write(&mut self, v: u8, now: Ns) {
        self.advance(now);
        match self.index {
            r @ (0 | 2 | 4 | 7..=9 | 0x32) => self.set_time(r, v, now),
            6 | 0xc | 0xd => {}
            r => self.bytes[usize::from(r)] = v,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(c: &mut Cmos, r: u8, now: Ns) -> u8 {
        c.select(r);
        c.read(now)
    }

    /// 2000-02-29 23:59:58 UTC, a Tuesday.
    const LEAP: i64 = 951_868_798;

    #[test]
    fn shows_the_date_in_bcd_and_goes_on() {
        let mut c = Cmos::new(LEAP);
        let all = |c: &mut Cmos, now| [0x32, 9, 8, 7, 6, 4, 2, 0].map(|r| read(c, r, now));
        assert_eq!(all(&mut c, 0), [0x20, 0x00, 0x02, 0x29, 0x03, 0x23, 0x59, 0x58]);
        assert_eq!(all(&mut c, 2 * NS), [0x20, 0x00, 0x03, 0x01, 0x04, 0x00, 0x00, 0x00]);
        c.select(0xb);
        c.write(BINARY, 0);
        assert_eq!(read(&mut c, 4, 0), 11 | 0x80, "11 pm");
    }

    #[test]
    fn can_be_set() {
        let mut c = Cmos::new(0);
        for (r, v) in [(0x32, 0x20), (9, 0x24), (8, 0x02), (7, 0x29), (4, 0x12), (2, 0x34), (0, 0x56)] {
            c.select(r);
            c.write(v, NS);
        }
        assert_eq!([9, 8, 7, 4, 2, 0].map(|r| read(&mut c, r, NS)), [0x24, 0x02, 0x29, 0x12, 0x34, 0x56]);
        assert_eq!(c.seconds(NS), 1_709_210_096);
    }

    #[test]
    fn periodic_interrupt() {
        let mut c = Cmos::new(0);
        c.select(0xb);
        c.write(PERIODIC | HOURS_24, 0);
        let next = c.next(0).expect("enabled");
        assert_eq!(next, NS / 1024);
        c.advance(next);
        assert!(c.irq());
        assert_eq!(read(&mut c, 0xc, next), 0x80 | PERIODIC);
        assert!(!c.irq());
    }
}
