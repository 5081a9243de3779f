//! Local APIC with its timer, in xAPIC and x2APIC mode (SDM 3A 11).

use crate::devices::ioapic::Message;

type Ns = u64;

/// Byte offsets of registers (SDM 3A table 11-1); an x2APIC register's MSR is 0x800 + offset / 16.
#[allow(missing_docs)]
pub mod reg {
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const APR: u32 = 0x90;
    pub const PPR: u32 = 0xa0;
    pub const EOI: u32 = 0xb0;
    pub const LDR: u32 = 0xd0;
    pub const DFR: u32 = 0xe0;
    pub const SVR: u32 = 0xf0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const ICR: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_THERMAL: u32 = 0x330;
    pub const LVT_PMC: u32 = 0x340;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_LINT1: u32 = 0x360;
    pub const LVT_ERROR: u32 = 0x370;
    pub const INITIAL_COUNT: u32 = 0x380;
    pub const CURRENT_COUNT: u32 = 0x390;
    pub const DIVIDE: u32 = 0x3e0;
    pub const SELF_IPI: u32 = 0x3f0;
}

/// Version 0x14, six local vectors.
const VERSION: u32 = 0x0005_0014;
const SVR_ENABLED: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;
/// ESR: a vector below 16 was sent, or received; a register that does not exist was touched.
const SEND_ILLEGAL: u32 = 1 << 5;
const RECEIVE_ILLEGAL: u32 = 1 << 6;
const ILLEGAL_REGISTER: u32 = 1 << 7;

/// 256 bits, one a vector.
#[derive(Clone, Copy, Debug, Default)]
struct Vectors([u32; 8]);

impl Vectors {
    fn set(&mut self, v: u8, on: bool) {
        let bit = 1 << (v & 31);
        let word = &mut self.0[usize::from(v >> 5)];
        *word = if on { *word | bit } else { *word & !bit };
    }
    fn has(&self, v: u8) -> bool {
        self.0[usize::from(v >> 5)] >> (v & 31) & 1 != 0
    }
    fn highest(&self) -> Option<u8> {
        let (n, word) = self.0.iter().enumerate().rev().find(|(_, w)| **w != 0)?;
        Some((n as u32 * 32 + 31 - word.leading_zeros()) as u8)
    }
}

/// How the timer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timer {
    OneShot,
    Periodic,
    Deadline,
}

/// The chip, of the boot processor, with APIC ID 0. Its timer's clock is 1 GHz.
#[derive(Clone, Debug)]
pub struct Lapic {
    enabled: bool,
    x2apic: bool,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: Vectors,
    tmr: Vectors,
    irr: Vectors,
    /// Errors shown, and errors since.
    esr: u32,
    errors: u32,
    /// System-management interrupts that were ignored.
    smis: u64,
    icr: u64,
    /// Timer, thermal, counters, LINT0, LINT1, error.
    lvt: [u32; 6],
    initial: u32,
    divide: u32,
    /// When the count began.
    start: Ns,
    /// When the timer fires next.
    expires: Option<Ns>,
    /// IA32_TSC_DEADLINE as written; 0 when disarmed.
    deadline: u64,
    nmi: bool,
    /// The end of a level-triggered interrupt, to be told to the I/O APIC.
    ended: Option<u8>,
}

impl Default for Lapic {
    fn default() -> Lapic {
        let mut lvt = [LVT_MASKED; 6];
        // Virtual wire mode, as firmware leaves the boot processor: LINT0 is the 8259's, LINT1 is NMI.
        lvt[3] = 0x700;
        lvt[4] = 0x400;
        Lapic {
            enabled: true,
            x2apic: false,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: Vectors::default(),
            tmr: Vectors::default(),
            irr: Vectors::default(),
            esr: 0,
            errors: 0,
            smis: 0,
            icr: 0,
            lvt,
            initial: 0,
            divide: 0,
            start: 0,
            expires: None,
            deadline: 0,
            nmi: false,
            ended: None,
        }
    }
}

impl Lapic {
    /// IA32_APIC_BASE was written: bit 11 enables, bit 10 is x2APIC mode.
    pub fn set_base(&mut self, v: u64) {
        let (enabled, x2apic) = (v & 1 << 11 != 0, v & 3 << 10 == 3 << 10);
        if !enabled && self.enabled {
            *self = Lapic { lvt: [LVT_MASKED; 6], ..Lapic::default() };
        }
        if x2apic && !self.x2apic {
            // "Logical x2APIC ID = [(x2APIC ID[19:4] « 16) | (1 « x2APIC ID[3:0])]".
            self.ldr = 1;
            self.icr &= 0xffff_ffff;
        }
        self.enabled = enabled;
        self.x2apic = x2apic;
    }

    /// Are the registers in memory? In x2APIC mode they are MSRs, and a disabled APIC has none.
    pub fn is_mapped(&self) -> bool {
        self.enabled && !self.x2apic
    }

    /// Does the 8259's interrupt get through LINT0?
    pub fn passes_external(&self) -> bool {
        !self.enabled || self.lvt[3] & (LVT_MASKED | 0x700) == 0x700
    }

    /// The 8259's output at LINT0, as far as it is not [passed through](Lapic::passes_external).
    pub fn lint0(&mut self, rises: bool) {
        if rises && self.lvt[3] & (LVT_MASKED | 0x700) == 0 {
            self.request(self.lvt[3] as u8, false);
        }
    }

    /// A signal at the NMI input, LINT1.
    pub fn lint1(&mut self) {
        if !self.enabled || self.lvt[4] & (LVT_MASKED | 0x700) == 0x400 {
            self.nmi = true;
        }
    }

    fn software_enabled(&self) -> bool {
        self.enabled && self.svr & SVR_ENABLED != 0
    }

    /// A vector is asked for.
    fn request(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            return self.error(RECEIVE_ILLEGAL);
        }
        if self.software_enabled() {
            self.irr.set(vector, true);
            self.tmr.set(vector, level);
        }
    }

    fn error(&mut self, bit: u32) {
        self.errors |= bit;
        let lvt = self.lvt[5];
        if lvt & LVT_MASKED == 0 && self.software_enabled() && lvt as u8 >= 16 {
            self.irr.set(lvt as u8, true);
            self.tmr.set(lvt as u8, false);
        }
    }

    /// Does a message with this destination mean us (ID 0)?
    fn is_for_us(&self, destination: u32, logical: bool) -> bool {
        if self.x2apic {
            return match logical {
                _ if destination == u32::MAX => true,
                true => destination >> 16 == 0 && destination & 1 != 0,
                false => destination == 0,
            };
        }
        let destination = destination & 0xff;
        match logical {
            false => destination == 0 || destination == 0xff,
            // Flat model: bits; cluster model: cluster number and bits (SDM 3A 11.6.2.2).
            true if self.dfr >> 28 == 0xf => destination & self.ldr >> 24 != 0,
            true => {
                let own = self.ldr >> 24;
                let cluster = destination >> 4 == 0xf || destination >> 4 == own >> 4;
                cluster && destination & own & 0xf != 0
            }
        }
    }

    fn accept(&mut self, vector: u8, mode: u8, level: bool) {
        match mode {
            0 | 1 => self.request(vector, level),
            4 => self.nmi = true,
            // There is no system-management mode.
            2 => self.smis += 1,
            // INIT and start-up are for other processors.
            _ => {}
        }
    }

    /// How many system-management interrupts came and were ignored.
    pub fn ignored_smis(&self) -> u64 {
        self.smis
    }

    /// A message from the I/O APIC. False: nobody took it.
    pub fn deliver(&mut self, m: Message) -> bool {
        let ours = self.enabled && self.is_for_us(u32::from(m.destination), m.logical);
        if ours {
            self.accept(m.vector, m.mode, m.level);
        }
        ours
    }

    /// Processor priority (SDM 3A 11.8.3.1).
    fn ppr(&self) -> u8 {
        let serving = self.isr.highest().unwrap_or(0);
        if self.tpr >> 4 >= serving >> 4 { self.tpr } else { serving & 0xf0 }
    }

    /// Does this vector wait to be taken?
    pub fn is_requested(&self, vector: u8) -> bool {
        self.irr.has(vector)
    }

    /// The vector that the processor is to take.
    pub fn pending(&self) -> Option<u8> {
        let v = self.irr.highest()?;
        (self.software_enabled() && v >> 4 > self.ppr() >> 4).then_some(v)
    }

    /// The processor takes it.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let v = self.pending()?;
        self.irr.set(v, false);
        self.isr.set(v, true);
        Some(v)
    }

    /// Is a non-maskable interrupt waiting?
    pub fn nmi_pending(&self) -> bool {
        self.nmi
    }

    /// Takes it.
    pub fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }

    /// The level-triggered vector whose end was told.
    pub fn take_ended(&mut self) -> Option<u8> {
        self.ended.take()
    }

    fn end_of_interrupt(&mut self) {
        if let Some(v) = self.isr.highest() {
            self.isr.set(v, false);
            if self.tmr.has(v) && self.svr & 1 << 12 == 0 {
                self.ended = Some(v);
            }
        }
    }

    /// The task-priority class: CR8.
    pub fn task_priority(&self) -> u8 {
        self.tpr >> 4
    }

    /// MOV to CR8.
    pub fn set_task_priority(&mut self, class: u8) {
        self.tpr = class << 4;
    }

    fn timer(&self) -> Timer {
        match self.lvt[0] >> 17 & 3 {
            0 => Timer::OneShot,
            1 => Timer::Periodic,
            _ => Timer::Deadline,
        }
    }

    fn divisor(&self) -> u64 {
        match self.divide & 3 | self.divide >> 1 & 4 {
            7 => 1,
            n => 2 << n,
        }
    }

    /// One whole count in nanoseconds.
    fn period(&self) -> Ns {
        u64::from(self.initial) * self.divisor()
    }

    fn start_timer(&mut self, now: Ns) {
        self.start = now;
        self.expires =
            (self.initial != 0 && self.timer() != Timer::Deadline).then(|| now.saturating_add(self.period()));
    }

    fn current(&self, now: Ns) -> u32 {
        if self.timer() == Timer::Deadline || self.initial == 0 {
            return 0;
        }
        match self.expires {
            Some(at) => (at.saturating_sub(now) / self.divisor()).min(u64::from(self.initial)) as u32,
            None => 0,
        }
    }

    /// Carries out what was due up to `now`.
    pub fn advance(&mut self, now: Ns) {
        let Some(at) = self.expires.filter(|&at| at <= now) else { return };
        self.expires = match self.timer() {
            Timer::Periodic => {
                // Rounds that were missed are not made up for: IRR has one bit.
                let period = self.period().max(1);
                Some(at + ((now - at) / period + 1) * period)
            }
            _ => None,
        };
        self.deadline = 0;
        if self.lvt[0] & LVT_MASKED == 0 {
            self.request(self.lvt[0] as u8, false);
        }
    }

    /// When the timer fires next.
    pub fn next(&self) -> Option<Ns> {
        self.expires
    }

    /// IA32_TSC_DEADLINE.
    pub fn deadline(&self) -> u64 {
        if self.timer() == Timer::Deadline { self.deadline } else { 0 }
    }

    /// Writes IA32_TSC_DEADLINE, which is reached at `at`. Ignored in the other timer modes; 0 disarms.
    pub fn set_deadline(&mut self, v: u64, at: Ns) {
        if self.timer() == Timer::Deadline {
            self.deadline = v;
            self.expires = (v != 0).then_some(at);
        }
    }

    fn lvt_index(offset: u32) -> Option<usize> {
        (reg::LVT_TIMER..=reg::LVT_ERROR).contains(&offset).then(|| (offset - reg::LVT_TIMER) as usize / 16)
    }

    /// The registers; `None`: there is none at this offset.
    fn read_register(&self, offset: u32, now: Ns) -> Option<u32> {
        if let Some(n) = Lapic::lvt_index(offset) {
            return Some(self.lvt[n]);
        }
        let word = |v: &Vectors, base: u32| v.0[((offset - base) / 16) as usize & 7];
        Some(match offset {
            // The ID is 0 in either layout.
            reg::ID => 0,
            reg::VERSION => VERSION,
            reg::TPR => u32::from(self.tpr),
            reg::APR if !self.x2apic => 0,
            reg::PPR => u32::from(self.ppr()),
            reg::LDR => self.ldr,
            reg::DFR if !self.x2apic => self.dfr,
            reg::SVR => self.svr,
            reg::ISR..=0x170 => word(&self.isr, reg::ISR),
            reg::TMR..=0x1f0 => word(&self.tmr, reg::TMR),
            reg::IRR..=0x270 => word(&self.irr, reg::IRR),
            reg::ESR => self.esr,
            reg::ICR => self.icr as u32,
            reg::ICR_HIGH if !self.x2apic => (self.icr >> 32) as u32,
            reg::INITIAL_COUNT => self.initial,
            reg::CURRENT_COUNT => self.current(now),
            reg::DIVIDE => self.divide,
            _ => return None,
        })
    }

    /// Writes a register; `None`: there is none at this offset, or reserved bits were set (which only x2APIC mode checks).
    fn write_register(&mut self, offset: u32, v: u32, now: Ns) -> Option<()> {
        if let Some(n) = Lapic::lvt_index(offset) {
            return self.write_lvt(n, v);
        }
        let only = |mask: u32| (!self.x2apic || v & !mask == 0).then_some(v & mask);
        match offset {
            reg::ID if !self.x2apic => {}
            reg::TPR => self.tpr = only(0xff)? as u8,
            // "WRMSR of a non-zero value causes #GP(0)".
            reg::EOI => {
                only(0)?;
                self.end_of_interrupt();
            }
            reg::LDR if !self.x2apic => self.ldr = v & 0xff00_0000,
            reg::DFR if !self.x2apic => self.dfr = v | 0x0fff_ffff,
            reg::SVR => {
                self.svr = only(0x11ff)?;
                if v & SVR_ENABLED == 0 {
                    self.lvt.iter_mut().for_each(|l| *l |= LVT_MASKED);
                }
            }
            reg::ESR => {
                only(0)?;
                self.esr = std::mem::take(&mut self.errors);
            }
            reg::ICR => {
                self.icr = self.icr & !0xffff_ffff | u64::from(v & 0x000c_cfff);
                self.send();
            }
            reg::ICR_HIGH if !self.x2apic => self.icr = self.icr & 0xffff_ffff | u64::from(v & 0xff00_0000) << 32,
            reg::INITIAL_COUNT => {
                if self.timer() != Timer::Deadline {
                    self.initial = v;
                    self.start_timer(now);
                }
            }
            reg::DIVIDE => {
                let v = only(0xb)?;
                let left = self.current(now);
                self.divide = v;
                if self.expires.is_some() && self.timer() != Timer::Deadline {
                    self.expires = Some(now.saturating_add(u64::from(left) * self.divisor()));
                }
            }
            reg::SELF_IPI if self.x2apic => {
                let vector = only(0xff)? as u8;
                self.request(vector, false);
            }
            _ => return None,
        }
        Some(())
    }

    fn write_lvt(&mut self, n: usize, v: u32) -> Option<()> {
        let mask = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff][n];
        // Delivery status and remote IRR are read-only.
        if self.x2apic && v & !(mask | 0x5000) != 0 {
            return None;
        }
        let mode = self.timer();
        self.lvt[n] = v & mask;
        if self.svr & SVR_ENABLED == 0 {
            self.lvt[n] |= LVT_MASKED;
        }
        // "A write to the LVT Timer Register that changes the timer mode disarms the local APIC timer" for TSC-deadline mode. Between the other
        // two a count goes on, and one that has come to zero stays there.
        if n == 0 && mode != self.timer() && (mode == Timer::Deadline || self.timer() == Timer::Deadline) {
            self.expires = None;
            self.deadline = 0;
            self.initial = 0;
        }
        Some(())
    }

    /// Sends the interrupt in ICR. The only processor is this one.
    fn send(&mut self) {
        let (vector, mode) = (self.icr as u8, (self.icr >> 8) as u8 & 7);
        let logical = self.icr & 1 << 11 != 0;
        let destination = if self.x2apic { (self.icr >> 32) as u32 } else { (self.icr >> 56) as u32 };
        let us = match self.icr >> 18 & 3 {
            0 => self.is_for_us(destination, logical),
            1 | 2 => true,
            _ => false,
        };
        if mode <= 1 && vector < 16 {
            return self.error(SEND_ILLEGAL);
        }
        if us {
            self.accept(vector, mode, false);
        }
    }

    /// A 32-bit load from the registers' page.
    pub fn read(&mut self, offset: u64, now: Ns) -> u32 {
        self.advance(now);
        match self.read_register(offset as u32 & 0xff0, now) {
            Some(v) => v,
            None => {
                if offset as u32 & 0xff0 != reg::EOI {
                    self.error(ILLEGAL_REGISTER);
                }
                0
            }
        }
    }

    /// A 32-bit store to the registers' page.
    pub fn write(&mut self, offset: u64, v: u32, now: Ns) {
        self.advance(now);
        if self.write_register(offset as u32 & 0xff0, v, now).is_none() {
            self.error(ILLEGAL_REGISTER);
        }
    }

    /// RDMSR of 0x800 to 0x8FF; `None` is #GP(0).
    pub fn read_msr(&mut self, index: u32, now: Ns) -> Option<u64> {
        if !self.x2apic {
            return None;
        }
        self.advance(now);
        match (index & 0xff) << 4 {
            reg::ICR => Some(self.icr),
            reg::EOI | reg::SELF_IPI => None,
            offset if offset < 0x400 => self.read_register(offset, now).map(u64::from),
            _ => None,
        }
    }

    /// WRMSR of 0x800 to 0x8FF; `None` is #GP(0).
    pub fn write_msr(&mut self, index: u32, v: u64, now: Ns) -> Option<()> {
        if !self.x2apic {
            return None;
        }
        self.advance(now);
        match (index & 0xff) << 4 {
            reg::ICR if v & 0xfff3_3000 == 0 => {
                self.icr = v;
                self.send();
                Some(())
            }
            reg::ICR => None,
            // Read-only ones, and "bits 63:32 are reserved".
            reg::ID..=reg::VERSION | reg::PPR | reg::LDR | reg::ISR..=0x270 | reg::CURRENT_COUNT => None,
            offset if offset < 0x400 && v >> 32 == 0 => self.write_register(offset, v as u32, now),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on() -> Lapic {
        let mut a = Lapic::default();
        a.write(u64::from(reg::SVR), 0x1ff, 0);
        a
    }

    fn send(a: &mut Lapic, vector: u32) {
        a.write(u64::from(reg::ICR), 1 << 18 | vector, 0);
    }

    #[test]
    fn priorities_hold_back_until_the_end() {
        let mut a = on();
        send(&mut a, 0x41);
        send(&mut a, 0x52);
        assert_eq!(a.acknowledge(), Some(0x52));
        assert_eq!(a.pending(), None);
        send(&mut a, 0x58);
        assert_eq!(a.pending(), None, "the same class");
        a.write(u64::from(reg::EOI), 0, 0);
        assert_eq!(a.acknowledge(), Some(0x58));
        a.write(u64::from(reg::EOI), 0, 0);
        a.set_task_priority(4);
        assert_eq!((a.pending(), a.read(u64::from(reg::TPR), 0)), (None, 0x40));
        a.set_task_priority(3);
        assert_eq!(a.pending(), Some(0x41));
    }

    #[test]
    fn timer_modes() {
        let mut a = on();
        a.write(u64::from(reg::DIVIDE), 0xb, 0);
        a.write(u64::from(reg::LVT_TIMER), 0x20, 0);
        a.write(u64::from(reg::INITIAL_COUNT), 1000, 0);
        assert_eq!((a.next(), a.read(u64::from(reg::CURRENT_COUNT), 400)), (Some(1000), 600));
        a.advance(1500);
        assert_eq!((a.acknowledge(), a.next()), (Some(0x20), None));
        a.write(u64::from(reg::EOI), 0, 1500);
        a.write(u64::from(reg::LVT_TIMER), 1 << 17 | 0x20, 1500);
        assert_eq!((a.next(), a.read(u64::from(reg::CURRENT_COUNT), 1500)), (None, 0), "it stays at zero");
        a.write(u64::from(reg::LVT_TIMER), 0x20, 1500);
        a.write(u64::from(reg::INITIAL_COUNT), 1000, 1500);
        a.write(u64::from(reg::LVT_TIMER), 1 << 17 | 0x20, 1600);
        assert_eq!((a.next(), a.read(u64::from(reg::CURRENT_COUNT), 1700)), (Some(2500), 800), "it goes on");
        a.write(u64::from(reg::DIVIDE), 3, 1700);
        a.write(u64::from(reg::INITIAL_COUNT), 100, 2000);
        assert_eq!(a.next(), Some(3600));
        a.advance(5300);
        assert_eq!((a.acknowledge(), a.next()), (Some(0x20), Some(6800)), "by sixteen; a round missed");
        a.write(u64::from(reg::EOI), 0, 5300);
        a.write(u64::from(reg::LVT_TIMER), 2 << 17 | 0x20, 5300);
        assert_eq!(a.next(), None);
        a.set_deadline(77, 6000);
        assert_eq!((a.deadline(), a.next()), (77, Some(6000)));
        a.advance(6000);
        assert_eq!((a.deadline(), a.acknowledge()), (0, Some(0x20)));
    }

    #[test]
    fn level_interrupts_tell_their_end() {
        let mut a = on();
        let m = Message { vector: 0x60, mode: 0, level: true, destination: 0, logical: false };
        assert!(a.deliver(m));
        assert!(!a.deliver(Message { destination: 1, ..m }));
        a.write(u64::from(reg::LDR), 1 << 24, 0);
        assert!(a.deliver(Message { destination: 1, logical: true, ..m }));
        assert_eq!(a.acknowledge(), Some(0x60));
        a.write(u64::from(reg::EOI), 0, 0);
        assert_eq!((a.take_ended(), a.take_ended()), (Some(0x60), None));
    }

    #[test]
    fn system_management_interrupts_are_ignored_and_counted() {
        let mut a = on();
        a.write(u64::from(reg::ICR), 1 << 18 | 2 << 8, 0);
        assert!(a.deliver(Message { vector: 0, mode: 2, level: false, destination: 0, logical: false }));
        assert_eq!((a.ignored_smis(), a.take_nmi(), a.next()), (2, false, None));
    }

    #[test]
    fn x2apic_registers_are_msrs() {
        let mut a = on();
        assert_eq!(a.read_msr(0x802, 0), None);
        a.set_base(0xfee0_0d00);
        assert_eq!((a.read_msr(0x803, 0), a.read_msr(0x80d, 0)), (Some(u64::from(VERSION)), Some(1)));
        assert_eq!(a.write_msr(0x83f, 0x77, 0), Some(()));
        assert_eq!(a.acknowledge(), Some(0x77));
        assert_eq!((a.write_msr(0x80b, 1, 0), a.write_msr(0x80b, 0, 0)), (None, Some(())));
        assert_eq!((a.read_msr(0x83f, 0), a.write_msr(0x808, 0x100, 0), a.read_msr(0x80e, 0)), (None, None, None));
    }

    #[test]
    fn errors_are_shown_after_a_write() {
        let mut a = on();
        a.write(u64::from(reg::LVT_ERROR), 0xfe, 0);
        send(&mut a, 3);
        assert_eq!(a.acknowledge(), Some(0xfe));
        assert_eq!(a.read(u64::from(reg::ESR), 0), 0);
        a.write(u64::from(reg::ESR), 0, 0);
        assert_eq!(a.read(u64::from(reg::ESR), 0), SEND_ILLEGAL);
    }
}
