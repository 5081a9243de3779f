//! What the processor asks of the board: ports, memory-mapped registers, interrupts.

use super::{INTR, NMI, PM_BASE, Pc};
use crate::bus::{Bus, Controllers, Programmed};
use crate::devices::lapic::Lapic;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const APIC_BASE: u32 = 0x1b;
const TSC_DEADLINE: u32 = 0x6e0;

/// Ports of the 8259s.
fn is_controllers(port: u16) -> bool {
    matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1)
}

/// Chips of which a write may move the next timer event, or of which even a read changes an interrupt line.
fn has_timer(port: u16) -> bool {
    matches!(port, 0x40..=0x43 | 0x61 | 0x70 | 0x71 | PM_BASE..0x610)
}

impl Bus for Pc {
    fn read_port(&self, port: u16, data: &mut [u8]) {
        let now = self.clock.now();
        let mut chips = self.lock();
        chips.watch.out(|| "IN");
        chips.traffic.port_reads += 1;
        Pc::look_for_strays(&mut chips, is_controllers(port));
        if !chips.read_wide(port, data) {
            for (i, b) in data.iter_mut().enumerate() {
                let at = port.wrapping_add(i as u16);
                *b = chips.read_byte(at, now);
                Pc::wire_some(&mut chips, at);
            }
        }
        self.settle(chips, matches!(port, 0x70 | 0x71), now);
    }

    fn write_port(&self, port: u16, data: &[u8]) {
        let now = self.clock.now();
        let mut chips = self.lock();
        chips.watch.out(|| "OUT");
        chips.traffic.port_writes += 1;
        Pc::look_for_strays(&mut chips, is_controllers(port));
        let wide = chips.write_wide(port, data);
        if !wide {
            for (i, b) in data.iter().enumerate() {
                let at = port.wrapping_add(i as u16);
                chips.write_byte(at, *b, now);
                Pc::wire_some(&mut chips, at);
            }
        }
        self.settle(chips, wide || has_timer(port), now);
    }

    fn read_mmio(&self, gpa: u64, data: &mut [u8]) {
        let now = self.clock.now();
        let mut chips = self.lock();
        chips.watch.out(|| "load from an address without RAM");
        chips.traffic.memory_reads += 1;
        let is_controllers = chips.is_controllers(gpa);
        Pc::look_for_strays(&mut chips, is_controllers);
        chips.read_memory(gpa, data, now);
        self.settle(chips, false, now);
    }

    fn write_mmio(&self, gpa: u64, data: &[u8]) {
        let now = self.clock.now();
        let mut chips = self.lock();
        chips.watch.out(|| "store to an address without RAM");
        chips.traffic.memory_writes += 1;
        let is_controllers = chips.is_controllers(gpa);
        Pc::look_for_strays(&mut chips, is_controllers);
        chips.write_memory(gpa, data, now);
        let timers = gpa & !0xfff == chips.lapic_base;
        self.settle(chips, timers, now);
    }

    #[inline]
    fn interrupt_pending(&self) -> bool {
        self.lines.load(Ordering::Acquire) & INTR != 0
    }

    fn take_interrupt(&self) -> Option<u8> {
        let mut chips = self.lock();
        let ticked = chips.ticks_owed > 0 && chips.tick_waits();
        let vector = match chips.lapic.acknowledge() {
            Some(v) => Some(v),
            None if chips.lint0 && chips.lapic.passes_external() => Some(chips.pic.acknowledge()),
            None => None,
        };
        chips.traffic.interrupts += u64::from(vector.is_some());
        chips.settle();
        if ticked && !chips.tick_waits() {
            chips.ticks_owed -= 1;
            chips.tick();
        }
        self.publish(&mut chips);
        vector
    }

    fn nmi_pending(&self) -> bool {
        self.lines.load(Ordering::Acquire) & NMI != 0
    }

    fn take_nmi(&self) -> bool {
        let mut chips = self.lock();
        let taken = chips.lapic.take_nmi();
        self.publish(&mut chips);
        taken
    }

    fn read_msr(&self, index: u32) -> Option<u64> {
        let now = self.clock.now();
        let mut chips = self.lock();
        chips.traffic.msrs += 1;
        Pc::look_for_strays(&mut chips, true);
        match index {
            TSC_DEADLINE => {
                chips.lapic.advance(now);
                Some(chips.lapic.deadline())
            }
            0x800..=0x8ff => chips.lapic.read_msr(index, now),
            _ => None,
        }
    }

    fn write_msr(&self, index: u32, value: u64) -> Option<()> {
        let now = self.clock.now();
        let mut chips = self.lock();
        chips.watch.out(|| "WRMSR of the local APIC");
        chips.traffic.msrs += 1;
        Pc::look_for_strays(&mut chips, index != APIC_BASE);
        let done = match index {
            APIC_BASE => {
                chips.lapic_base = value & 0xf_ffff_f000;
                chips.lapic.set_base(value);
                Some(())
            }
            TSC_DEADLINE => {
                let at = self.clock.when(value);
                chips.lapic.set_deadline(value, at);
                chips.lapic.advance(now);
                Some(())
            }
            0x800..=0x8ff => chips.lapic.write_msr(index, value, now),
            _ => None,
        };
        self.settle(chips, true, now);
        done
    }

    fn time_stamp(&self) -> Option<u64> {
        self.clock.counter()
    }

    fn x87_error(&self, waits: bool) -> Option<bool> {
        let mut chips = self.lock();
        if chips.ferr != waits {
            (chips.ferr, chips.ignne) = (waits, false);
            chips.wire_ferr();
            chips.settle();
            self.publish(&mut chips);
        }
        Some(chips.ignne)
    }

    fn task_priority(&self) -> Option<u8> {
        let chips = self.lock();
        // CR8 of an engine with its own local APIC is in the state.
        chips.controllers.is_none().then(|| chips.lapic.task_priority())
    }

    fn use_controllers(&self, controllers: Arc<dyn Controllers>) -> Option<[Programmed; 2]> {
        let mut chips = self.lock();
        let programmed = chips.pic.programmed();
        // They have not been told of any line.
        chips.told = 0;
        chips.controllers = Some(controllers);
        chips.settle();
        (chips.lint0, chips.ticks_owed) = (false, 0);
        chips.lapic = Lapic::default();
        self.publish(&mut chips);
        Some(programmed)
    }

    fn has_strayed(&self) -> bool {
        std::mem::take(&mut self.lock().strayed)
    }

    fn set_task_priority(&self, class: u8) {
        let mut chips = self.lock();
        chips.lapic.set_task_priority(class);
        self.publish(&mut chips);
    }
}
