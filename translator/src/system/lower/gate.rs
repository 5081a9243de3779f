//! Ways over a border that stay in the cache: IN and OUT call the device, INVLPG what forgets the page, XSAVE64 and
//! XRSTOR64 what does them in assembly, SYSCALL, SYSRET and IRETQ go where they went before
//! ([`at::SYSCALL`], [`at::SYSRET`], [`at::IRET`]: what the interpreter made of the state when it did one).

use super::asm::{Assembler, At, W};
use super::memory::Host;
use super::scratch::bit;
use super::{Flags, Kind, Lower};
use crate::system::area::at;
use crate::system::block::{Access, Item, Segment as Relative, operand_of};
use crate::system::tlb;
use bivisor_emulator::cpu::xsave::Layout;
use bivisor_emulator::cpu::{CpuState, Rflags, Segment};
use bivisor_emulator::interp::sensitive::{fast, iret};
use bivisor_emulator::isa::{Gpr, Seg, Width};
use bivisor_emulator::mem::PAGE_SIZE;
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

    /// INVLPG at CPL 0.
    pub(super) fn invalidate(&mut self, item: &Item) -> Option<bool> {
        let a = operand_of(&item.iced, 1, false).filter(|a| !a.narrow)?;
        self.keep_flags()?;
        let address = self.scratch(item, false)?;
        if a.base.is_none() && a.index.is_none() {
            self.e.constant(address, a.disp as u64);
        } else {
            self.e.lea(address, At::any(a.base, a.index, i32::try_from(a.disp).ok()?, false));
        }
        match a.segment {
            Relative::Flat => {}
            Relative::Fs => self.e.add(address, At::slot(at::FS_BASE)),
            Relative::Gs => self.e.add(address, At::slot(at::GS_BASE)),
            Relative::Fs32 | Relative::Gs32 => return None,
        }
        self.e.store(At::slot(at::TEMP), address);
        // What follows asks the TLB anew.
        self.windows.clear();
        let exit = self.exit(Kind::Invalidate { resume: 0 }, self.block.next(item), Flags::Slot, self.n + 1);
        self.exits[exit].spilled = self.spilled;
        self.stub(exit);
        self.exits[exit].kind = Kind::Invalidate { resume: self.e.len() as u32 };
        Some(true)
    }

    /// XSAVE64 and XRSTOR64 in a kernel without the vector registers.
    pub(super) fn image(&mut self, item: &Item) -> Option<bool> {
        let write = item.iced.code() == Code::Xsave64_mem;
        let a = operand_of(&item.iced, 1, write).filter(|a| !a.narrow && a.segment == Relative::Flat)?;
        // What registers tell of flags they tell afterwards too.
        if self.flags != Flags::Slot || self.told.is_none() {
            self.keep_flags()?;
        }
        let (rip, n) = (self.block.rip(item), self.n);
        let [address, page, index] =
            [self.scratch(item, false)?, self.scratch(item, false)?, self.scratch(item, false)?];
        self.e.is_zero(At::slot(at::IMAGE));
        self.leave_if(&JE, item, Kind::Step, rip, n);
        if a.base.is_none() && a.index.is_none() {
            self.e.constant(address, a.disp as u64);
        } else {
            self.e.lea(address, At::any(a.base, a.index, i32::try_from(a.disp).ok()?, false));
        }
        self.e.store(At::slot(at::TEMP), address);
        // test address, 63
        self.e.rr(W::D, &[0xf7], 0, address, &63u32.to_le_bytes());
        self.leave_if(&JNE, item, Kind::Step, rip, n);
        let last = Layout::host().size as i32 - 1;
        for (to, disp) in [(at::IMAGE_FIRST, 0), (at::IMAGE_SECOND, last)] {
            self.index(index, address, disp);
            self.e.lea(page, At::base(address, disp));
            self.e.and(W::Q, page, -(PAGE_SIZE as i32));
            self.e.compare(page, At::table(self.tag(write), index));
            self.leave_if(&JNE, item, Kind::Step, rip, n);
            self.e.load(index, At::table(self.around.tlb + tlb::ADDEND, index));
            self.e.lea(index, At::sum(index, address, 0));
            self.e.store(At::slot(to), index);
        }
        let (after, slow) = (self.address_of(page), self.address_of(index));
        self.e.store(At::slot(at::ENTRY), page);
        self.e.store(At::slot(at::IMAGE_SLOW), index);
        let jump = self.branch(&[0xe9]);
        self.e.set_rel32(jump, if write { self.around.save } else { self.around.restore });
        let here = self.e.here();
        self.e.set_rel32(slow, here);
        self.leave_if(&[0xe9], item, Kind::Step, rip, n);
        let here = self.e.here();
        self.e.set_rel32(after, here);
        Some(true)
    }

    /// The address of a place to come in a register; gives what is to be set.
    pub(super) fn address_of(&mut self, r: Gpr) -> usize {
        // lea r, [rip + ..]
        self.e.bytes.extend_from_slice(&[0x48 | r as u8 >> 3 << 2, 0x8d, (r as u8 & 7) << 3 | 5]);
        let site = self.e.len();
        self.e.push_u32(0);
        site
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
        self.set_flags(Gpr::R11, rest, s, t);
        self.wake(t);
        self.home();
        self.e.rm(W::D, &[0xff], 4, At::slot(at::TARGET), &[]);
        Some(false)
    }

    /// All flags from register `from` into their slots; of those that are neither status flags nor IF only `rest`.
    fn set_flags(&mut self, from: Gpr, rest: Rflags, s: Gpr, t: Gpr) {
        self.e.copy(s, from);
        self.e.and(W::D, s, rest.bits() as i32);
        // or s, 2
        self.e.rr(W::D, &[0x83], 1, s, &[Rflags::FIXED.bits() as u8]);
        self.e.store(At::slot(at::FLAGS), s);
        self.e.copy(s, from);
        self.e.and(W::D, s, Rflags::IF.bits() as i32);
        self.e.store(At::slot(at::INTERRUPTS), s);
        self.e.copy(t, from);
        self.e.shr(W::D, t, 11);
        self.e.and(W::D, t, 1);
        // movzx s, the low byte
        self.e.rr(W::Q, &MOVZX_BYTE, s as u8, from, &[]);
        self.e.shl(W::D, s, 8);
        self.e.rr(W::D, &OR, s as u8, t, &[]);
        self.e.push(0x66);
        self.e.rm(W::D, &[0x89], s as u8, At::slot(at::STATUS), &[]);
    }

    /// IRETQ at CPL 0 to the user code segment of the last one, as long as frame and GDT have the same selectors and descriptors for it.
    pub(super) fn iret(&mut self, item: &Item) -> Option<bool> {
        const FLAGS: i32 = 2;
        self.keep_flags()?;
        let host = self.place(item, &item.access?)?;
        // Of the frame, by eight bytes: RIP, CS, RFLAGS, RSP, SS.
        let frame = |n: i32| Host { disp: host.disp + 8 * n, ..host }.at();
        let (s, t, u) = (self.scratch(item, false)?, self.scratch(item, false)?, self.scratch(item, false)?);
        let (rip, n) = (self.block.rip(item), self.n);
        self.e.load(s, At::slot(at::IRET));
        self.e.rr(W::Q, &TEST, s as u8, s, &[]);
        self.leave_if(&JE, item, Kind::Step, rip, n);
        // Where NMIs are blocked they are no more afterwards, and one may come.
        self.e.load(t, At::slot(at::CPU));
        self.e.rm(W::D, &[0x80], 7, At::base(t, offset_of!(CpuState, nmi_blocked) as i32), &[0]);
        self.leave_if(&JNE, item, Kind::Step, rip, n);
        self.e.rm(W::D, &[0xf7], 0, At::slot(at::FLAGS), &(Rflags::NT.bits() as u32).to_le_bytes());
        self.leave_if(&JNE, item, Kind::Step, rip, n);
        for (slot, at) in [(at::IRET_CS, 1), (at::IRET_SS, 4)] {
            self.e.rm(W::D, &[0x0f, 0xb7], t as u8, frame(at), &[]);
            self.e.compare(t, At::slot(slot));
            self.leave_if(&JNE, item, Kind::Step, rip, n);
        }
        self.e.load(t, frame(FLAGS));
        for forbidden in [at::IRET_FORBIDDEN, at::PENDING] {
            self.e.rm(W::Q, &TEST, t as u8, At::slot(forbidden), &[]);
            self.leave_if(&JNE, item, Kind::Step, rip, n);
        }
        self.e.load(t, At::slot(at::IRET_GDT));
        let gdt = self.place_any(item, &Access { base: Some(t), len: 16, ..Access::stack(0, false) })?;
        for at in [0, 8] {
            self.e.load(u, Host { disp: gdt.disp + at, ..gdt }.at());
            self.e.compare(u, At::slot(at::IRET_DESCRIPTORS + at as usize));
            self.leave_if(&JNE, item, Kind::Step, rip, n);
        }
        self.e.load(t, frame(0));
        self.hash(u, t);
        self.e.rr(W::Q, &[0x01], s as u8, u, &[]);
        self.e.compare(t, At::table(0, u));
        self.leave_if(&JNE, item, Kind::Step, rip, n);
        self.e.load(s, At::table(8, u));
        self.e.store(At::slot(at::TARGET), s);
        self.load_cs_ss(at::IRET_SEGMENTS, s, t);
        // RF is over before the next instruction: see the dispatch loop's `resume`.
        let rest = iret::RETURNED - Rflags::STATUS - Rflags::IF - Rflags::RF;
        self.e.load(u, frame(FLAGS));
        self.set_flags(u, rest, s, t);
        self.e.load(Gpr::Rsp, frame(3));
        self.wake(t);
        self.home();
        self.e.rm(W::D, &[0xff], 4, At::slot(at::TARGET), &[]);
        Some(false)
    }

    /// Loads the vector registers, if they are not. Nothing is in EFLAGS.
    fn wake(&mut self, t: Gpr) {
        self.e.is_zero(At::slot(at::ASLEEP));
        let awake = self.branch(&JE);
        let after = self.address_of(t);
        self.e.store(At::slot(at::ENTRY), t);
        let jump = self.branch(&[0xe9]);
        self.e.set_rel32(jump, self.around.wake);
        let here = self.e.here();
        self.e.set_rel32(awake, here);
        self.e.set_rel32(after, here);
    }
}
