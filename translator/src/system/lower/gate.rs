//! Ways over a border that stay in the cache: IN and OUT call the device, SYSCALL and SYSRET go where they went before
//! ([`at::SYSCALL`], [`at::SYSRET`]: what the interpreter made of the state when it did one).

use super::asm::{Assembler, At, W};
use super::scratch::bit;
use super::{Flags, Kind, Lower};
use crate::system::area::at;
use crate::system::block::Item;
use bivisor_emulator::cpu::{CpuState, Rflags, Segment};
use bivisor_emulator::interp::sensitive::fast;
use bivisor_emulator::isa::{Gpr, Seg, Width};
use dynasmrt::DynasmApi;
use iced_x86::{Code, Register};
use std::mem::offset_of;

const JE: [u8; 2] = [0x0f, 0x84];
const JNE: [u8; 2] = [0x0f, 0x85];
const MOVZX_BYTE: [u8; 2] = [0x0f, 0xb6];
const TEST: [u8; 1] = [0x85];
const OR: [u8; 1] = [0x0b];

/// Port (`None`: DX), width and direction (OUT) of an IN or OUT.
fn port_of(item: &Item) -> Option<(Option<u16>, Width, bool)> {
    let i = &item.iced;
    let (write, port, value) = match i.code() {
        Code::In_AL_imm8 | Code::In_AX_imm8 | Code::In_EAX_imm8 => {
            (false, Some(i.immediate8().into()), i.op0_register())
        }
        Code::In_AL_DX | Code::In_AX_DX | Code::In_EAX_DX => (false, None, i.op0_register()),
        Code::Out_imm8_AL | Code::Out_imm8_AX | Code::Out_imm8_EAX => {
            (true, Some(i.immediate8().into()), i.op1_register())
        }
        Code::Out_DX_AL | Code::Out_DX_AX | Code::Out_DX_EAX => (true, None, i.op1_register()),
        _ => return None,
    };
    let width = match value {
        Register::AL => Width::B,
        Register::AX => Width::W,
        _ => Width::D,
    };
    Some((port, width, write))
}

impl Lower<'_> {
    /// The flags into their slot, whether they matter or not.
    fn keep_flags(&mut self) -> Option<()> {
        if self.flags == Flags::Slot && self.told.is_some() {
            return None;
        }
        self.save_flags();
        (self.flags, self.told, self.producer) = (Flags::Slot, None, None);
        Some(())
    }

    /// IN and OUT at CPL 0, which may always.
    pub(super) fn port(&mut self, item: &Item) -> Option<bool> {
        let (port, width, write) = port_of(item)?;
        self.keep_flags()?;
        let kind = Kind::Port { port, width, write, resume: 0 };
        let exit = self.exit(kind, self.block.next(item), Flags::Slot, self.n + 1);
        self.exits[exit].spilled = self.spilled & !item.writes;
        self.stub(exit);
        let resume = self.e.len() as u32;
        self.exits[exit].kind = Kind::Port { port, width, write, resume };
        Some(true)
    }

    /// CS and SS from their slots, one behind the other, to the state.
    fn load_cs_ss(&mut self, slot: usize, pointer: Gpr, temp: Gpr) {
        const WORDS: usize = size_of::<Segment>() / 8;
        self.e.load(pointer, At::slot(at::CPU));
        for (n, seg) in [Seg::Cs, Seg::Ss].into_iter().enumerate() {
            let to = offset_of!(CpuState, seg) + size_of::<Segment>() * seg as usize;
            for word in 0..WORDS {
                self.e.load(temp, At::slot(slot + 8 * (n * WORDS + word)));
                self.e.store(At::base(pointer, (to + 8 * word) as i32), temp);
            }
        }
    }

    /// SYSCALL.
    pub(super) fn syscall(&mut self, item: &Item) -> Option<bool> {
        self.home();
        self.keep_flags()?;
        // cmp qword [..], 0
        self.e.rm(W::Q, &[0x83], 7, At::slot(at::SYSCALL), &[0]);
        self.leave_if(&JE, item, Kind::Step, self.block.rip(item), self.n);
        // Both are overwritten.
        let (flags, x) = (Gpr::R11, Gpr::Rcx);
        self.load_cs_ss(at::SYSCALL_SEGMENTS, x, flags);
        self.e.rm(W::D, &MOVZX_BYTE, flags as u8, At::slot(at::STATUS + 1), &[]);
        self.e.rm(W::D, &MOVZX_BYTE, x as u8, At::slot(at::STATUS), &[]);
        self.e.shl(W::D, x, 11);
        self.e.rr(W::Q, &OR, flags as u8, x, &[]);
        self.e.rm(W::Q, &OR, flags as u8, At::slot(at::FLAGS), &[]);
        self.e.rm(W::Q, &OR, flags as u8, At::slot(at::INTERRUPTS), &[]);
        // What is kept of them: all 64 bits, then the low byte and OF as their slot has them.
        self.e.load(x, At::slot(at::SYSCALL_KEEP));
        self.e.rm(W::Q, &[0x21], x as u8, At::slot(at::FLAGS), &[]);
        self.e.rm(W::Q, &[0x21], x as u8, At::slot(at::INTERRUPTS), &[]);
        self.e.rm(W::D, &[0x20], x as u8, At::slot(at::STATUS + 1), &[]);
        self.e.shr(W::D, x, 11);
        self.e.rm(W::D, &[0x20], x as u8, At::slot(at::STATUS), &[]);
        self.e.constant(Gpr::Rcx, self.block.next(item));
        self.e.rm(W::D, &[0xff], 4, At::slot(at::SYSCALL), &[]);
        Some(false)
    }

    /// SYSRET to 64-bit code, at CPL 0.
    pub(super) fn sysret(&mut self, item: &Item) -> Option<bool> {
        let named = bit(Gpr::Rcx) | bit(Gpr::R11);
        if self.spilled & named != 0 {
            return None;
        }
        self.keep_flags()?;
        self.busy |= named;
        let (s, t) = (self.scratch(item, false)?, self.scratch(item, false)?);
        let rip = self.block.rip(item);
        self.e.load(s, At::slot(at::SYSRET));
        self.e.rr(W::Q, &TEST, s as u8, s, &[]);
        self.leave_if(&JE, item, Kind::Step, rip, self.n);
        // Where the user's code has no use for vector registers they must not be loaded.
        self.e.is_zero(At::slot(at::SYSRET_ASLEEP));
        self.leave_if(&JNE, item, Kind::Step, rip, self.n);
        for forbidden in [at::SYSRET_FORBIDDEN, at::PENDING] {
            self.e.load(t, At::slot(forbidden));
            self.e.rr(W::Q, &TEST, Gpr::R11 as u8, t, &[]);
            self.leave_if(&JNE, item, Kind::Step, rip, self.n);
        }
        self.hash(t, Gpr::Rcx);
        self.e.rr(W::Q, &[0x01], s as u8, t, &[]);
        self.e.compare(Gpr::Rcx, At::table(0, t));
        self.leave_if(&JNE, item, Kind::Step, rip, self.n);
        self.e.load(s, At::table(8, t));
        self.e.store(At::slot(at::TARGET), s);
        self.load_cs_ss(at::SYSRET_SEGMENTS, s, t);
        let rest = Rflags::from_bits_retain(fast::RETURNED) - Rflags::STATUS - Rflags::IF;
        self.e.copy(s, Gpr::R11);
        self.e.and(W::D, s, rest.bits() as i32);
        // or s, 2
        self.e.rr(W::D, &[0x83], 1, s, &[Rflags::FIXED.bits() as u8]);
        self.e.store(At::slot(at::FLAGS), s);
        self.e.copy(s, Gpr::R11);
        self.e.and(W::D, s, Rflags::IF.bits() as i32);
        self.e.store(At::slot(at::INTERRUPTS), s);
        self.e.copy(t, Gpr::R11);
        self.e.shr(W::D, t, 11);
        self.e.and(W::D, t, 1);
        // movzx s, r11b
        self.e.rr(W::Q, &MOVZX_BYTE, s as u8, Gpr::R11, &[]);
        self.e.shl(W::D, s, 8);
        self.e.rr(W::D, &OR, s as u8, t, &[]);
        self.e.push(0x66);
        self.e.rm(W::D, &[0x89], s as u8, At::slot(at::STATUS), &[]);
        self.wake(t);
        self.home();
        self.e.rm(W::D, &[0xff], 4, At::slot(at::TARGET), &[]);
        Some(false)
    }

    /// Loads the vector registers, if they are not. Nothing is in EFLAGS.
    fn wake(&mut self, t: Gpr) {
        self.e.is_zero(At::slot(at::ASLEEP));
        let awake = self.branch(&JE);
        // lea t, [rip + ..]
        self.e.bytes.extend_from_slice(&[0x48 | t as u8 >> 3 << 2, 0x8d, (t as u8 & 7) << 3 | 5]);
        let after = self.e.len();
        self.e.push_u32(0);
        self.e.store(At::slot(at::ENTRY), t);
        let jump = self.branch(&[0xe9]);
        self.e.set_rel32(jump, self.around.wake);
        let here = self.e.here();
        self.e.set_rel32(awake, here);
        self.e.set_rel32(after, here);
    }
}
