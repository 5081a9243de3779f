//! Status flags between EFLAGS and their slot; STI.

use super::asm::{Assembler, At, W};
use super::scratch::bit;
use super::{Flags, Kind, Lower, Told};
use crate::system::area::at;
use crate::system::block::Item;
use bivisor_emulator::isa::Gpr;
use dynasmrt::{DynasmApi, dynasm};

impl Lower<'_> {
    /// May RAX be destroyed without saving it?
    fn rax_is_free(&self) -> bool {
        let held = self.windows.iter().any(|w| w.delta == Gpr::Rax);
        self.spilled & bit(Gpr::Rax) != 0 && !held && self.busy & bit(Gpr::Rax) == 0
    }

    fn with_rax(&mut self, f: impl FnOnce(&mut Self)) {
        if self.rax_is_free() {
            return f(self);
        }
        self.e.store(At::slot(at::TEMP), Gpr::Rax);
        f(self);
        self.e.load(Gpr::Rax, At::slot(at::TEMP));
    }

    /// EFLAGS to the slot too.
    pub(super) fn save_flags(&mut self) {
        if self.flags != Flags::Host {
            return;
        }
        self.with_rax(|l| {
            dynasm!(l.e; .arch x64; lahf; seto al);
            l.e.push(0x66);
            // The operand-size prefix and GS may come in any order.
            l.e.rm(W::D, &[0x89], 0, At::slot(at::STATUS), &[]);
        });
        self.flags = Flags::Both;
    }

    /// The slot to EFLAGS too.
    pub(super) fn restore_flags(&mut self) {
        if self.flags != Flags::Slot {
            return;
        }
        debug_assert!(self.told.is_none(), "flags that are wanted are kept");
        self.with_rax(|l| {
            l.e.rm(W::D, &[0x0f, 0xb7], 0, At::slot(at::STATUS), &[]);
            dynasm!(l.e; .arch x64; add al, 0x7f; sahf);
        });
        self.flags = Flags::Both;
    }

    /// What follows destroys EFLAGS.
    pub(super) fn give_up_flags(&mut self, item: &Item) {
        if self.flags == Flags::Host {
            self.told = if self.flags_live(item) { None } else { self.replayable().map(Told::Here) };
            if self.told.is_none() {
                self.save_flags();
            }
        }
        self.flags = Flags::Slot;
    }

    /// STI at CPL 0: leaves if an interrupt waits.
    pub(super) fn sti(&mut self, item: &Item) -> bool {
        self.give_up_flags(item);
        self.e.store_u32(At::slot(at::INTERRUPTS), 0x200);
        self.e.is_zero(At::slot(at::PENDING));
        let next = self.block.next(item);
        self.leave_if(&[0x0f, 0x85], item, Kind::Shadow, next, self.n + 1);
        true
    }
}
