//! The board of a PC: which chip answers at which port, at which address, and on which interrupt line.

mod bus;

use crate::bus::{Controllers, Ns};
use crate::devices::cmos::Cmos;
use crate::devices::fw_cfg::FwCfg;
use crate::devices::i8042::I8042;
use crate::devices::ioapic::{IoApic, Message};
use crate::devices::lapic::Lapic;
use crate::devices::pci::PciHost;
use crate::devices::pic::Pic;
use crate::devices::pit::Pit;
use crate::devices::pm::{self, Pm};
use crate::devices::testdev::TestDevice;
use crate::devices::uart::Uart;
use crate::devices::vga::Vga;
use crate::devices::virtio::pci::VirtioPci;
use crate::host::stopwatch::Stopwatch;
use crate::machine::End;
use crate::machine::clock::Clock;
use crate::machine::ide::{self, Ide};
use crate::machine::sink::Sink;
use crate::mem::GuestMemory;
use crate::vcpu::Kicker;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Guest-physical address of the I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Guest-physical address of the local APIC after RESET.
pub const LAPIC: u64 = 0xfee0_0000;
/// Where RAM must end: devices are above.
pub const RAM_END: u64 = 0xc000_0000;
/// First port of the ACPI registers.
pub const PM_BASE: u16 = 0x600;
/// The interrupt lines that INTA of the PCI devices are on, in turn: device n is on line n modulo 2 of these.
pub const PCI_IRQS: [u8; 2] = [10, 11];
/// The first virtio device on PCI, device number: on the first of these lines.
pub const FIRST_VIRTIO: u8 = 4;
/// Where their memory is put when no firmware does it, and how much each gets.
pub const VIRTIO_MEMORY: (u32, u32) = (0xfe00_0000, 0x8000);
/// The ACPI interrupt.
pub const SCI: u8 = 9;

/// Bits of [`Pc::lines`].
const INTR: u8 = 1;
const NMI: u8 = 2;

/// How often the processor turned to the chips.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// IN, a byte or word at a time.
    pub port_reads: u64,
    /// OUT.
    pub port_writes: u64,
    /// Loads from addresses without RAM.
    pub memory_reads: u64,
    /// Stores there.
    pub memory_writes: u64,
    /// Interrupts that were taken.
    pub interrupts: u64,
    /// RDMSR and WRMSR of the local APIC's registers.
    pub msrs: u64,
}

/// The chips and what connects them.
pub struct Chips {
    pub(super) traffic: Traffic,
    /// Of the time that they take.
    pub(super) watch: Stopwatch,
    pub(super) pic: Pic,
    pub(super) pit: Pit,
    /// Ticks of its counter 0 that came while another waited, because the host let the processor wait: given later, one behind the other, as
    /// a kernel that counts them in a loop by the time-stamp counter (Linux, `timer_irq_works`) would take them for missing.
    ticks_owed: u64,
    pub(super) cmos: Cmos,
    pub(super) com1: Uart,
    pub(super) keyboard: I8042,
    pub(super) lapic: Lapic,
    pub(super) ioapic: IoApic,
    /// Those of the engine, which are used instead of these three.
    pub(super) controllers: Option<Arc<dyn Controllers>>,
    /// One of the three was accessed all the same.
    strayed: bool,
    pub(super) pm: Pm,
    pub(super) fw_cfg: FwCfg,
    pci: PciHost,
    pub(super) virtio: Vec<VirtioPci>,
    /// There if a drive is.
    pub(super) ide: Option<Ide>,
    pub(super) vga: Vga,
    pub(super) test: Option<TestDevice>,
    /// Where the local APIC's page is.
    lapic_base: u64,
    /// Port 0x61: speaker data.
    speaker: bool,
    /// FERR# of the processor, and IGNNE#, which port 0xF0 sets until FERR# falls.
    ferr: bool,
    ignne: bool,
    /// Levels of the interrupt lines, by ISA number, 16 to 23 on the I/O APIC only; and as the controllers were told.
    levels: u32,
    told: u32,
    /// The 8259's output as LINT0 was told.
    lint0: bool,
    /// Up to here the timers were advanced.
    seen: Ns,
    /// Bytes on the way to the serial port's receiver.
    pub(super) typed: VecDeque<u8>,
    /// Scan codes on the way to the keyboard's queue.
    pub(super) keys: VecDeque<u8>,
    pub(super) serial: Sink,
    /// Ports that write raw bytes somewhere.
    pub(super) debugcon: Vec<(u16, Sink)>,
    pub(super) debug_exit: Option<u16>,
    pub(super) rom: Vec<u8>,
    pub(super) end: Option<End>,
    /// The processor waits by itself for the next event.
    pub(super) halted: bool,
    /// When the timer thread wakes up.
    pub(super) armed: Ns,
}

/// More ticks than that are not made up for: enough for a processor that waited for 64 ms of ticks at 250 Hz.
const MOST_OWED: u64 = 16;

/// The board: [`Bus`](crate::bus::Bus) for engines.
pub struct Pc {
    chips: Mutex<Chips>,
    /// What is waiting for the processor: asked at every turn, so outside the lock.
    lines: AtomicU8,
    pub(super) clock: Clock,
    /// The RAM, for devices that access it by themselves.
    pub(super) mem: Arc<GuestMemory>,
    /// Wakes a halted processor.
    pub(super) wake: Condvar,
    /// Wakes the timer thread.
    pub(super) rearm: Condvar,
    pub(super) kicker: Kicker,
}

/// The I/O APIC's input for an ISA interrupt (the MADT says the same).
pub fn gsi(irq: u8) -> usize {
    match irq {
        0 => 2,
        n => usize::from(n),
    }
}

impl Chips {
    pub(super) fn new(epoch: i64, serial: Sink) -> Chips {
        let mut pm = Pm::default();
        // There is no SMI command port, so the machine is in ACPI mode from the start.
        pm.set_acpi(true);
        Chips {
            traffic: Traffic::default(),
            watch: Stopwatch::default(),
            pic: Pic::default(),
            pit: Pit::default(),
            ticks_owed: 0,
            cmos: Cmos::new(epoch),
            com1: Uart::default(),
            keyboard: I8042::default(),
            lapic: Lapic::default(),
            ioapic: IoApic::default(),
            controllers: None,
            strayed: false,
            pm,
            fw_cfg: FwCfg::new(),
            pci: PciHost::default(),
            virtio: Vec::new(),
            ide: None,
            vga: Vga::default(),
            test: None,
            lapic_base: LAPIC,
            speaker: false,
            ferr: false,
            ignne: false,
            levels: 0,
            told: 0,
            lint0: false,
            seen: 0,
            typed: VecDeque::new(),
            keys: VecDeque::new(),
            serial,
            debugcon: Vec::new(),
            debug_exit: None,
            rom: Vec::new(),
            end: None,
            halted: false,
            armed: 0,
        }
    }

    /// The PCI map: which function (device << 3 | function) is what.
    fn read_config(&mut self, function: u8, at: u8) -> u8 {
        match function {
            0 => self.pci.space.read(at),
            ide::BRIDGE | ide::CONTROLLER => {
                self.ide.as_mut().and_then(|i| i.config(function)).map_or(0xff, |space| space.read(at))
            }
            _ => self.virtio_at(function).map_or(0xff, |v| v.read_config(at)),
        }
    }

    fn write_config(&mut self, function: u8, at: u8, v: u8) {
        match function {
            0 => self.pci.space.write(at, v),
            ide::BRIDGE | ide::CONTROLLER => {
                if let Some(space) = self.ide.as_mut().and_then(|i| i.config(function)) {
                    space.write(at, v);
                }
            }
            _ => {
                if let Some(device) = self.virtio_at(function) {
                    device.write_config(at, v);
                    self.wire_virtio();
                }
            }
        }
    }

    fn virtio_at(&mut self, function: u8) -> Option<&mut VirtioPci> {
        let n = (function >> 3).checked_sub(FIRST_VIRTIO)?;
        self.virtio.get_mut(usize::from(n)).filter(|_| function & 7 == 0)
    }

    /// Does something from outside to the virtio device of a kind.
    pub(super) fn with_virtio(&mut self, kind: u16, what: impl FnOnce(&mut VirtioPci)) {
        if let Some(device) = self.virtio.iter_mut().find(|v| v.kind() == kind) {
            what(device);
            self.wire_virtio();
            self.settle();
        }
    }

    /// Brings what the virtio devices want to the interrupt lines and the local APIC.
    fn wire_virtio(&mut self) {
        let mut levels = [false; PCI_IRQS.len()];
        for (n, device) in self.virtio.iter_mut().enumerate() {
            levels[n % PCI_IRQS.len()] |= device.intx();
            for (address, data) in device.take_messages() {
                if let Some(controllers) = &self.controllers {
                    controllers.message(address, data);
                } else if let Some(m) = Message::from_msi(address, data) {
                    self.lapic.deliver(m);
                }
            }
        }
        for (irq, level) in PCI_IRQS.into_iter().zip(levels) {
            self.wire(irq, level);
        }
    }

    /// Brings what the drives want to their lines.
    fn wire_ide(&mut self) {
        let levels = self.ide.as_ref().map_or([false; 2], Ide::irqs);
        for (irq, level) in ide::IRQS.into_iter().zip(levels) {
            self.wire(irq, level);
        }
    }

    /// The interrupt of the x87 unit.
    fn wire_ferr(&mut self) {
        self.wire(13, self.ferr && !self.ignne);
    }

    fn wire(&mut self, irq: u8, level: bool) {
        let bit = 1u32 << (irq & 31);
        self.levels = if level { self.levels | bit } else { self.levels & !bit };
    }

    /// The interrupt map: which chip is on which line.
    fn wire_chips(&mut self, now: Ns) {
        self.wire(0, self.pit.output(0, now));
        self.wire(1, self.keyboard.irq());
        self.wire(4, self.com1.irq());
        self.wire(8, self.cmos.irq());
        self.wire(SCI, self.pm.irq());
        self.wire_virtio();
        self.wire_ide();
        let test = self.test.as_ref().map_or(0, TestDevice::lines);
        for irq in [3, 5, 6, 7, 12, 16, 17, 18, 19, 20, 21, 22, 23] {
            self.wire(irq, test >> irq & 1 != 0);
        }
        self.wire_ferr();
        // The test device shares the lines of chips.
        self.levels |= test;
    }

    /// Brings what changed to the interrupt controllers, and the controllers' messages to the processor.
    fn settle(&mut self) {
        let changed = self.levels ^ self.told;
        if changed != 0 {
            self.told = self.levels;
            for irq in (0..24).filter(|irq| changed >> irq & 1 != 0) {
                let level = self.levels >> irq & 1 != 0;
                if let Some(controllers) = &self.controllers {
                    controllers.set_line(irq, level);
                    continue;
                }
                self.pic.set_line(irq, level);
                self.ioapic.set_line(gsi(irq), level);
            }
        }
        if self.controllers.is_some() {
            return;
        }
        // A level that nobody takes to its end is sent again, but not for ever.
        for _ in 0..64 {
            if let Some(vector) = self.lapic.take_ended() {
                self.ioapic.end_of_interrupt(vector);
            }
            match self.ioapic.take_message() {
                Some(m) => _ = self.lapic.deliver(m),
                None => break,
            }
        }
        let output = self.pic.is_pending();
        if output != self.lint0 {
            self.lapic.lint0(output);
            self.lint0 = output;
        }
    }

    /// What is waiting for the processor.
    fn waiting(&self) -> u8 {
        let external = self.lint0 && self.lapic.passes_external();
        let intr = external || self.lapic.pending().is_some();
        (if intr { INTR } else { 0 }) | if self.lapic.nmi_pending() { NMI } else { 0 }
    }

    fn feed_serial(&mut self) {
        while self.com1.room() > 0
            && let Some(byte) = self.typed.pop_front()
        {
            self.com1.receive(byte);
        }
        self.wire(4, self.com1.irq());
    }

    fn feed_keyboard(&mut self) {
        while self.keyboard.room() > 0
            && let Some(code) = self.keys.pop_front()
        {
            self.keyboard.press(&[code]);
        }
        self.wire(1, self.keyboard.irq());
    }

    /// An edge of the 8254's, also when it is low and high again in between.
    fn tick(&mut self) {
        self.wire(0, false);
        self.settle();
        self.wire(0, true);
        self.settle();
    }

    /// Is there a tick that the processor has not yet taken, but would? Another one would be lost.
    fn tick_waits(&self) -> bool {
        let requested = |v| self.lapic.is_requested(v);
        self.pic.has_request(0) || self.ioapic.edge_vector(gsi(0)).is_some_and(requested)
    }

    /// Carries out what the timers have due up to `now`.
    pub(super) fn advance(&mut self, now: Ns) {
        let from = std::mem::replace(&mut self.seen, now);
        self.lapic.advance(now);
        self.cmos.advance(now);
        self.pm.advance(now);
        let ticks = self.pit.rises(from, now);
        if ticks > 0 {
            let lost = match self.tick_waits() {
                // An engine's own controllers do not say what is taken.
                _ if self.controllers.is_some() => 0,
                true => ticks,
                false => ticks - 1,
            };
            self.ticks_owed = self.ticks_owed.saturating_add(lost).min(MOST_OWED);
            self.tick();
        }
        self.feed_serial();
        self.feed_keyboard();
        self.wire_chips(now);
        self.settle();
    }

    /// When a timer is due next.
    pub(super) fn next(&self, now: Ns) -> Option<Ns> {
        [self.lapic.next(), self.pit.next(now), self.cmos.next(now), self.pm.next(now)].into_iter().flatten().min()
    }

    /// The port map, a byte at a time; wider accesses are bytes at the following ports unless [`Chips::read_wide`] knows better.
    fn read_byte(&mut self, port: u16, now: Ns) -> u8 {
        match port {
            0x20 | 0x21 => self.pic.read(false, port & 1 != 0),
            0x40..=0x43 => self.pit.read(port as u8 & 3, now),
            0x60 => {
                let v = self.keyboard.data();
                // The line falls before it rises for the next code: the controllers want an edge for each.
                self.wire(1, false);
                self.settle();
                self.feed_keyboard();
                v
            }
            // Refresh toggles with the time, as BIOSes wait for it.
            0x61 => {
                let out = self.pit.output(2, now);
                let refresh = (now / 15_085) & 1 != 0;
                u8::from(self.pit.gate()) | u8::from(self.speaker) << 1 | u8::from(refresh) << 4 | u8::from(out) << 5
            }
            0x64 => self.keyboard.status(),
            0x71 => self.cmos.read(now),
            0x92 => u8::from(self.keyboard.a20()) << 1,
            0xa0 | 0xa1 => self.pic.read(true, port & 1 != 0),
            0x3b0..=0x3df => self.vga.read(port, now),
            0x3f8..=0x3ff => {
                let v = self.com1.read(port as u8 & 7);
                // As with the keyboard: a line that falls does so before the next byte raises it.
                self.wire(4, self.com1.irq());
                self.settle();
                self.feed_serial();
                v
            }
            0x4d0 | 0x4d1 => self.pic.elcr(port & 1 != 0),
            0x511 => self.fw_cfg.read(),
            0xcfc..=0xcff => self.pci.target(port as u8).map_or(0xff, |(function, at)| self.read_config(function, at)),
            PM_BASE..0x610 => self.pm.read((port - PM_BASE) as u8, now),
            _ if self.ide.as_ref().is_some_and(|i| i.answers(port)) => {
                let v = self.ide.as_mut().map_or(0xff, |i| i.read(port));
                self.wire_ide();
                v
            }
            // A debug console tells that it is there by 0xE9, wherever it is (QEMU's isa-debugcon).
            _ if self.debugcon.iter().any(|(p, _)| *p == port) => 0xe9,
            _ => 0xff,
        }
    }

    fn write_byte(&mut self, port: u16, v: u8, now: Ns) {
        match port {
            0x20 | 0x21 => self.pic.write(false, port & 1 != 0, v),
            0x40..=0x43 => {
                self.pit.write(port as u8 & 3, v, now);
                // What counter 0 had lost is no longer wanted.
                self.ticks_owed = if matches!(port, 0x40 | 0x43) { 0 } else { self.ticks_owed };
            }
            0x60 => self.keyboard.write_data(v),
            0x61 => {
                self.pit.set_gate(v & 1 != 0, now);
                self.speaker = v & 2 != 0;
            }
            0x64 => self.keyboard.write_command(v),
            0x70 => self.cmos.select(v),
            0x71 => self.cmos.write(v, now),
            0x92 => {
                self.keyboard.set_a20(v & 2 != 0);
                if v & 1 != 0 {
                    self.end = Some(End::Reset);
                }
            }
            0xa0 | 0xa1 => self.pic.write(true, port & 1 != 0, v),
            0xf0 => {
                self.ignne = self.ferr;
                self.wire_ferr();
            }
            0x3b0..=0x3df => self.vga.write(port, v),
            0x3f8..=0x3ff => {
                self.com1.write(port as u8 & 7, v);
                self.feed_serial();
                if self.com1.has_sent() {
                    let sent = self.com1.take_sent();
                    self.serial.write(&sent);
                }
            }
            0x4d0 | 0x4d1 => self.pic.set_elcr(port & 1 != 0, v),
            0xcfc..=0xcff => {
                if let Some((function, at)) = self.pci.target(port as u8) {
                    self.write_config(function, at, v);
                }
            }
            PM_BASE..0x610 => {
                self.pm.write((port - PM_BASE) as u8, v);
                if self.pm.take_sleep() == Some(pm::OFF) {
                    self.end = Some(End::PowerOff);
                }
            }
            _ => {
                if let Some(ide) = &mut self.ide {
                    ide.write(port, v);
                    self.wire_ide();
                }
            }
        }
        if self.keyboard.take_reset() {
            self.end = Some(End::Reset);
        }
    }

    /// Ports whose accesses are one whatever their width. False: none of them.
    fn read_wide(&mut self, port: u16, data: &mut [u8]) -> bool {
        if port == 0xcf8 && data.len() == 4 {
            data.copy_from_slice(&self.pci.address().to_le_bytes());
            return true;
        }
        if self.ide.as_mut().is_some_and(|i| i.read_data(port, data)) {
            self.wire_ide();
            return true;
        }
        self.test.as_mut().is_some_and(|t| t.read_port(port, data))
    }

    fn write_wide(&mut self, port: u16, data: &[u8]) -> bool {
        if let Some((_, sink)) = self.debugcon.iter_mut().find(|(p, _)| *p == port) {
            sink.write(data);
            return true;
        }
        if self.debug_exit == Some(port) {
            // `((v << 1) | 1) & 0xff`, as the program's exit status.
            self.end = Some(End::DebugExit(data[0] << 1 | 1));
            return true;
        }
        match port {
            // The reset control register lies inside PCI's address register, which takes 32 bits at a time.
            0xcf9 if data.len() == 1 => {
                if data[0] & 4 != 0 {
                    self.end = Some(End::Reset);
                }
                true
            }
            0xcf8 if data.len() == 4 => {
                self.pci.set_address(u32::from_le_bytes([data[0], data[1], data[2], data[3]]));
                true
            }
            0x510 if data.len() == 2 => {
                self.fw_cfg.select(u16::from_le_bytes([data[0], data[1]]));
                true
            }
            _ if self.ide.as_mut().is_some_and(|i| i.write_data(port, data)) => {
                self.wire_ide();
                true
            }
            _ => self.test.as_mut().is_some_and(|t| t.write_port(port, data)),
        }
    }

    /// Is it an address of an APIC?
    fn is_controllers(&self, gpa: u64) -> bool {
        let page = gpa & !0xfff;
        page == IOAPIC || page == self.lapic_base && self.lapic.is_mapped()
    }

    /// The memory map.
    fn read_memory(&mut self, gpa: u64, data: &mut [u8], now: Ns) {
        let word = match gpa {
            _ if gpa & !0xfff == self.lapic_base && self.lapic.is_mapped() => self.lapic.read(gpa & 0xfff, now),
            _ if gpa & !0xfff == IOAPIC => self.ioapic.read(gpa & 0xfff),
            _ => {
                if self.virtio.iter_mut().any(|v| v.read_memory(gpa, data)) {
                    self.wire_virtio();
                } else if !self.test.as_mut().is_some_and(|t| t.read_memory(gpa, data)) {
                    self.read_rom(gpa, data);
                }
                return;
            }
        };
        // Registers are 32 bits wide; parts of them are their bytes.
        let bytes = word.to_le_bytes();
        for (i, b) in data.iter_mut().enumerate() {
            *b = bytes.get((gpa & 3) as usize + i).copied().unwrap_or(0);
        }
    }

    /// The BIOS image ends at 4 GiB.
    fn read_rom(&self, gpa: u64, data: &mut [u8]) {
        let start = (1u64 << 32) - self.rom.len() as u64;
        for (i, b) in data.iter_mut().enumerate() {
            let at = (gpa + i as u64).checked_sub(start);
            *b = at.and_then(|at| self.rom.get(at as usize)).copied().unwrap_or(0xff);
        }
    }

    fn write_memory(&mut self, gpa: u64, data: &[u8], now: Ns) {
        let mut bytes = [0; 4];
        let n = data.len().min(4);
        bytes[..n].copy_from_slice(&data[..n]);
        let word = u32::from_le_bytes(bytes);
        match gpa {
            _ if gpa & !0xfff == self.lapic_base && self.lapic.is_mapped() => {
                // "All accesses to the registers ... must be 32-bit aligned": the rest has no effect.
                if gpa & 3 == 0 && data.len() >= 4 {
                    self.lapic.write(gpa & 0xfff, word, now);
                }
            }
            _ if gpa & !0xfff == IOAPIC => self.ioapic.write(gpa & 0xfff, word),
            _ if self.virtio.iter_mut().any(|v| v.write_memory(gpa, data)) => self.wire_virtio(),
            _ => _ = self.test.as_mut().is_some_and(|t| t.write_memory(gpa, data)),
        }
    }
}

impl Pc {
    pub(super) fn new(chips: Chips, mem: Arc<GuestMemory>, clock: Clock, kicker: Kicker) -> Pc {
        Pc {
            chips: Mutex::new(chips),
            mem,
            lines: AtomicU8::new(0),
            clock,
            wake: Condvar::new(),
            rearm: Condvar::new(),
            kicker,
        }
    }

    /// The chips. A panic of another thread does not matter: chips are always whole.
    pub(super) fn lock(&self) -> MutexGuard<'_, Chips> {
        self.chips.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the processor's side what is waiting, after a change of chips.
    pub(super) fn publish(&self, chips: &mut Chips) {
        self.lines.store(chips.waiting(), Ordering::Release);
        if chips.end.is_some() {
            self.kicker.kick();
        }
    }

    /// Is anything waiting that the processor could take?
    pub(super) fn is_waiting(&self, interrupts_on: bool) -> bool {
        let lines = self.lines.load(Ordering::Acquire);
        lines & NMI != 0 || interrupts_on && lines & INTR != 0
    }

    /// As a thread other than the processor's: after a change of chips.
    pub(super) fn publish_from_outside(&self, chips: &mut Chips) {
        self.publish(chips);
        if self.lines.load(Ordering::Relaxed) != 0 {
            self.kicker.kick();
            self.wake.notify_all();
        }
    }

    /// Is what is accessed the engine's, and the access one that should not have come here?
    fn look_for_strays(chips: &mut Chips, is_controllers: bool) {
        chips.strayed |= is_controllers && chips.controllers.is_some();
    }

    fn settle(&self, mut chips: MutexGuard<'_, Chips>, timers: bool, now: Ns) {
        if timers {
            chips.wire_chips(now);
        }
        chips.settle();
        self.publish(&mut chips);
        if timers && !self.clock.is_counted() && chips.next(now).is_some_and(|at| at < chips.armed) {
            self.rearm.notify_one();
        }
        chips.watch.back();
    }

    /// A line of the keyboard, the serial port or the test device may have changed.
    fn wire_some(chips: &mut Chips, port: u16) {
        match port {
            0x3f8..=0x3ff => chips.wire(4, chips.com1.irq()),
            0x60 | 0x64 => chips.wire(1, chips.keyboard.irq()),
            _ => {}
        }
    }
}
