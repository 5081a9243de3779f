//! PUSH, POP, LEAVE, PUSHF, POPF.
//!
//! TF is never set in translated code, and IF has a slot of its own, so that CLI is one store (VMware's was one AND).

use super::asm::{Assembler, At, W};
use super::scratch::bit;
use super::{Flags, Kind, Lower};
use crate::system::area::at;
use crate::system::block::Item;
use bivisor_emulator::cpu::Rflags;
use bivisor_emulator::isa::Gpr;
use dynasmrt::DynasmApi;

const OR: [u8; 1] = [0x0b];
const MOVZX_BYTE: [u8; 2] = [0x0f, 0xb6];
const JNE: [u8; 2] = [0x0f, 0x85];

impl Lower<'_> {
    pub(super) fn move_stack(&mut self, by: i32) {
        self.advance_word(Gpr::Rsp, Gpr::Rsp, by);
    }

    /// PUSH of a register or a constant.
    pub(super) fn push(&mut self, item: &Item) -> Option<bool> {
        let pushed = self.pushed();
        let host = self.reach(item, &pushed)?;
        let from = self.e.len();
        match Gpr::from_iced(item.iced.op0_register()) {
            Some(r) => self.store_word(host.at(), r),
            None => self.store_constant(host.at(), item.iced.immediate(0) as i32),
        }
        self.touched(item, from, host, &pushed);
        self.move_stack(-self.word_len());
        Some(true)
    }

    /// PUSH of a word of memory.
    pub(super) fn push_memory(&mut self, item: &Item) -> Option<bool> {
        let access = item.access?;
        let from = self.reach(item, &access)?;
        let v = self.scratch(item, false)?;
        let at = self.e.len();
        self.load_word(v, from.at());
        self.touched(item, at, from, &access);
        self.busy = bit(v);
        let pushed = self.pushed();
        let to = self.reach(item, &pushed)?;
        let at = self.e.len();
        self.store_word(to.at(), v);
        self.touched(item, at, to, &pushed);
        self.move_stack(-self.word_len());
        Some(true)
    }

    /// POP of a register.
    pub(super) fn pop(&mut self, item: &Item) -> Option<bool> {
        let r = Gpr::from_iced(item.iced.op0_register())?;
        let access = item.access?;
        let host = self.reach(item, &access)?;
        let from = self.e.len();
        self.load_word(r, host.at());
        self.touched(item, from, host, &access);
        if r != Gpr::Rsp {
            self.move_stack(self.word_len());
        }
        Some(true)
    }

    /// LEAVE.
    pub(super) fn leave(&mut self, item: &Item) -> Option<bool> {
        let access = item.access?;
        let host = self.reach(item, &access)?;
        let v = self.scratch(item, false)?;
        let from = self.e.len();
        self.load_word(v, host.at());
        self.touched(item, from, host, &access);
        self.advance_word(Gpr::Rsp, Gpr::Rbp, self.word_len());
        self.e.copy(Gpr::Rbp, v);
        Some(true)
    }

    /// PUSHFQ, PUSHFD: RF and VM are never set here.
    pub(super) fn push_flags(&mut self, item: &Item) -> Option<bool> {
        self.give_up_flags(item);
        let host = self.place(item, &self.pushed())?;
        let (v, overflow) = (self.scratch(item, true)?, self.scratch(item, false)?);
        self.e.rm(W::D, &MOVZX_BYTE, v as u8, At::slot(at::STATUS + 1), &[]);
        self.e.rm(W::D, &MOVZX_BYTE, overflow as u8, At::slot(at::STATUS), &[]);
        self.e.shl(W::D, overflow, 11);
        self.e.rr(W::Q, &OR, v as u8, overflow, &[]);
        self.e.rm(W::Q, &OR, v as u8, At::slot(at::FLAGS), &[]);
        self.e.rm(W::Q, &OR, v as u8, At::slot(at::INTERRUPTS), &[]);
        self.store_word(host.at(), v);
        self.move_stack(-self.word_len());
        Some(true)
    }

    /// POPFQ, POPFD: the interpreter does it if more than the status flags and IF change.
    pub(super) fn pop_flags(&mut self, item: &Item) -> Option<bool> {
        let mut other = Rflags::TF | Rflags::DF | Rflags::NT | Rflags::AC | Rflags::ID;
        let user = self.block.mode.user();
        self.give_up_flags(item);
        let host = self.place(item, &item.access?)?;
        let (v, x) = (self.scratch(item, true)?, self.scratch(item, true)?);
        if user {
            // At IOPL 3 IF could change (SDM 2B POPF).
            self.e.rm(W::D, &[0xf7], 0, At::slot(at::FLAGS), &0x3000u32.to_le_bytes());
            self.leave_if(&JNE, item, Kind::Step, self.block.rip(item), self.n);
        } else {
            other |= Rflags::IOPL;
        }
        self.load_word(v, host.at());
        self.e.load(x, At::slot(at::FLAGS));
        self.e.rr(W::Q, &[0x33], x as u8, v, &[]);
        self.e.rr(W::D, &[0xf7], 0, x, &(other.bits() as u32).to_le_bytes());
        self.leave_if(&JNE, item, Kind::Step, self.block.rip(item), self.n);
        // The status flags to their slot: low byte to AH's place, OF to AL's.
        self.e.copy(x, v);
        self.e.shr(W::D, x, 11);
        self.e.and(W::D, x, 1);
        if !user {
            let interrupts = self.scratch(item, false)?;
            self.e.copy(interrupts, v);
            self.e.and(W::D, interrupts, 0x200);
            self.e.store(At::slot(at::INTERRUPTS), interrupts);
        }
        // movzx v, v's low byte (REX makes SIL and the like of it)
        let n = v as u8;
        self.e.bytes.extend_from_slice(&[0x40, 0x0f, 0xb6, 0xc0 | n << 3 | n]);
        self.e.shl(W::D, v, 8);
        self.e.rr(W::D, &OR, x as u8, v, &[]);
        self.e.push(0x66);
        self.e.rm(W::D, &[0x89], x as u8, At::slot(at::STATUS), &[]);
        // From here on nothing of what was before tells them.
        (self.flags, self.told, self.producer) = (Flags::Slot, None, None);
        self.move_stack(self.word_len());
        if !user {
            // IF is on, and an interrupt waits.
            self.e.load(v, At::slot(at::INTERRUPTS));
            self.e.rm(W::Q, &[0x85], v as u8, At::slot(at::PENDING), &[]);
            let next = self.block.next(item);
            self.leave_if(&JNE, item, Kind::Look, next, self.n + 1);
        }
        Some(true)
    }
}
