//! Sensitive instructions that are a few loads and stores: control registers, model-specific ones that the code names itself, SWAPGS,
//! RDTSC, CPUID; and the divisor.

use super::asm::{Assembler, At, W};
use super::memory::Host;
use super::{Flags, Kind, Lower};
use crate::system::area::at;
use crate::system::block::{Access, Item};
use bivisor_emulator::cpu::msr::index;
use bivisor_emulator::cpu::{CpuState, Msrs, Rflags, Segment};
use bivisor_emulator::isa::{Gpr, Seg};
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, Mnemonic, Register};
use std::mem::offset_of;

const JE: [u8; 2] = [0x0f, 0x84];
const JNE: [u8; 2] = [0x0f, 0x85];
const JA: [u8; 2] = [0x0f, 0x87];

/// Where a base is while code runs.
fn base_slot(n: u32) -> Option<usize> {
    match n {
        index::FS_BASE => Some(at::FS_BASE),
        index::GS_BASE => Some(at::GS_BASE),
        index::KERNEL_GS_BASE => Some(at::KERNEL_GS_BASE),
        _ => None,
    }
}

impl Lower<'_> {
    /// VERW of a data segment of the GDT that may be written, as kernels execute it on each way out for what processors do besides (SDM 2C
    /// VERW); the interpreter does all others.
    pub(super) fn verify_write(&mut self, item: &Item) -> Option<bool> {
        let host = self.place(item, &item.access?)?;
        let v = self.scratch(item, false)?;
        self.give_up_flags(item);
        let rip = self.block.rip(item);
        self.e.rm(W::D, &[0x0f, 0xb7], v as u8, host.at(), &[]);
        // RPL and TI are 0; it is not the null selector, and inside the table.
        self.e.rr(W::D, &[0xf7], 0, v, &7u32.to_le_bytes());
        self.leave_if(&JNE, item, Kind::Step, rip, self.n);
        self.e.rr(W::D, &[0x85], v as u8, v, &[]);
        self.leave_if(&JE, item, Kind::Step, rip, self.n);
        self.e.compare(v, At::slot(at::GDT_LAST));
        self.leave_if(&JA, item, Kind::Step, rip, self.n);
        self.e.add(v, At::slot(at::GDT));
        let upper = Access { base: Some(v), disp: 4, len: 4, ..Access::stack(0, false) };
        let host = self.place_any(item, &upper)?;
        self.e.rm(W::D, &[0x8b], v as u8, host.at(), &[]);
        // S is 1, it is no code, W is 1 (SDM 3A 3.4.5).
        self.e.and(W::D, v, 0x1a00);
        self.e.rr(W::D, &[0x81], 7, v, &0x1200u32.to_le_bytes());
        self.leave_if(&JNE, item, Kind::Step, rip, self.n);
        // ZF, where LAHF has it.
        self.e.rm(W::D, &[0x80], 1, At::slot(at::STATUS + 1), &[0x40]);
        (self.flags, self.told, self.producer) = (Flags::Slot, None, None);
        Some(true)
    }

    /// STAC and CLAC where RFLAGS.AC is known to be the other.
    pub(super) fn toggle_ac(&mut self, item: &Item) -> Option<bool> {
        let ac = Rflags::AC.bits() as i32;
        let v = self.scratch(item, false)?;
        self.e.load(v, At::slot(at::FLAGS));
        self.e.lea(v, At::base(v, if item.iced.code() == Code::Stac { ac } else { -ac }));
        self.e.store(At::slot(at::FLAGS), v);
        self.n += 1;
        self.go_to(self.block.next(item));
        self.n -= 1;
        let exit = self.exits.last_mut()?;
        exit.toggles = true;
        Some(false)
    }

    /// MOV from CR0, CR2, CR3 or CR4 at CPL 0.
    pub(super) fn read_control(&mut self, item: &Item) -> Option<bool> {
        let offset = match item.iced.op1_register() {
            Register::CR0 => offset_of!(CpuState, cr0),
            Register::CR2 => offset_of!(CpuState, cr2),
            Register::CR3 => offset_of!(CpuState, cr3),
            Register::CR4 => offset_of!(CpuState, cr4),
            _ => return None,
        };
        let r = Gpr::from_iced(item.iced.op0_register())?;
        self.e.load(r, At::slot(at::CPU));
        self.load_word(r, At::base(r, offset as i32));
        Some(true)
    }

    /// MOV from CR8: while it is not known the interpreter asks the bus.
    pub(super) fn read_priority(&mut self, item: &Item) -> Option<bool> {
        let r = Gpr::from_iced(item.iced.op0_register())?;
        self.give_up_flags(item);
        // cmp qword [..], -1
        self.e.rm(W::Q, &[0x83], 7, At::slot(at::CR8_BUS), &[0xff]);
        self.leave_if(&JE, item, Kind::Step, self.block.rip(item), self.n);
        self.e.load(r, At::slot(at::CR8));
        Some(true)
    }

    /// MOV to CR8. What is not below what the bus knows holds no interrupt back that could come now, and is told when the code is left
    /// (as VT-x does below its TPR threshold).
    pub(super) fn write_priority(&mut self, item: &Item) -> Option<bool> {
        let r = Gpr::from_iced(item.iced.op1_register())?;
        self.give_up_flags(item);
        self.e.rr(W::Q, &[0x83], 7, r, &[15]);
        self.leave_if(&JA, item, Kind::Step, self.block.rip(item), self.n);
        // cmp [..], r
        self.e.rm(W::Q, &[0x39], r as u8, At::slot(at::CR8_BUS), &[]);
        self.leave_if(&JA, item, Kind::Step, self.block.rip(item), self.n);
        self.e.store(At::slot(at::CR8), r);
        Some(true)
    }

    /// RDMSR.
    pub(super) fn read_msr(&mut self, n: u32) -> Option<bool> {
        let (low, high) = match base_slot(n) {
            Some(slot) => (At::slot(slot), At::slot(slot + 4)),
            None => {
                let offset = (offset_of!(CpuState, msr) + Msrs::plain(n)?) as i32;
                self.e.load(Gpr::Rdx, At::slot(at::CPU));
                (At::base(Gpr::Rdx, offset), At::base(Gpr::Rdx, offset + 4))
            }
        };
        self.e.rm(W::D, &[0x8b], Gpr::Rax as u8, low, &[]);
        self.e.rm(W::D, &[0x8b], Gpr::Rdx as u8, high, &[]);
        Some(true)
    }

    /// WRMSR of a base, which must be canonical, or of IA32_TSC_AUX, whose upper half must be 0.
    pub(super) fn write_msr(&mut self, item: &Item, n: u32) -> Option<bool> {
        let Some(slot) = base_slot(n) else {
            let offset = offset_of!(CpuState, msr) + Msrs::plain(n).filter(|_| n == index::TSC_AUX)?;
            let t = self.scratch(item, false)?;
            self.give_up_flags(item);
            // test edx, edx
            self.e.rr(W::D, &[0x85], Gpr::Rdx as u8, Gpr::Rdx, &[]);
            self.leave_if(&JNE, item, Kind::Step, self.block.rip(item), self.n);
            self.e.load(t, At::slot(at::CPU));
            self.e.rm(W::D, &[0x89], Gpr::Rax as u8, At::base(t, offset as i32), &[]);
            return Some(true);
        };
        let (v, t) = (self.scratch(item, false)?, self.scratch(item, false)?);
        self.give_up_flags(item);
        self.e.copy(v, Gpr::Rdx);
        self.e.shl(W::Q, v, 32);
        self.e.rr(W::D, &[0x89], Gpr::Rax as u8, t, &[]);
        self.e.rr(W::Q, &[0x0b], v as u8, t, &[]);
        self.e.copy(t, v);
        self.e.shl(W::Q, t, 16);
        // sar t, 16
        self.e.rr(W::Q, &[0xc1], 7, t, &[16]);
        self.e.rr(W::Q, &[0x3b], t as u8, v, &[]);
        self.leave_if(&JNE, item, Kind::Step, self.block.rip(item), self.n);
        self.e.store(At::slot(slot), v);
        if slot == at::FS_BASE {
            let offset =
                offset_of!(CpuState, seg) + size_of::<Segment>() * Seg::Fs as usize + offset_of!(Segment, base);
            self.e.load(t, At::slot(at::CPU));
            self.e.store(At::base(t, offset as i32), v);
        }
        Some(true)
    }

    /// CPUID.
    pub(super) fn identify(&mut self, values: [u32; 4]) -> Option<bool> {
        for (r, v) in [Gpr::Rax, Gpr::Rbx, Gpr::Rcx, Gpr::Rdx].into_iter().zip(values) {
            self.e.constant(r, u64::from(v));
        }
        Some(true)
    }

    /// Division by zero is found before the host finds it: for code that does it.
    pub(super) fn check_divisor(&mut self, item: &Item, host: Option<Host>) {
        let (iced, zero) = (&item.iced, [0]);
        let divides = matches!(iced.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
        if !self.around.divides || !divides {
            return;
        }
        let len = host.map_or(iced.op0_register().size(), |_| iced.memory_size().size());
        let register = Gpr::from_iced(iced.op0_register());
        if len == 1 {
            return;
        }
        self.give_up_flags(item);
        let from = self.e.len();
        if len == 2 {
            self.e.push(0x66);
        }
        let w = if len == 8 { W::Q } else { W::D };
        match (host, register) {
            (Some(host), _) => self.e.rm(w, &[0x83], 7, host.at(), &zero),
            (None, Some(r)) => self.e.rr(w, &[0x83], 7, r, &zero),
            (None, None) => {}
        }
        if let Some((host, access)) = host.zip(item.access) {
            self.touched(item, from, host, &access);
        }
        self.leave_if(&JE, item, Kind::Step, self.block.rip(item), self.n);
    }

    /// MOV from a segment register, whose upper bits are zero.
    pub(super) fn read_selector(&mut self, item: &Item) -> Option<bool> {
        let seg = Seg::from_iced(item.iced.op1_register())?;
        let offset = offset_of!(CpuState, seg) + size_of::<Segment>() * seg as usize + offset_of!(Segment, selector);
        let r = Gpr::from_iced(item.iced.op0_register())?;
        self.e.load(r, At::slot(at::CPU));
        self.e.rm(W::D, &[0x0f, 0xb7], r as u8, At::base(r, offset as i32), &[]);
        Some(true)
    }

    /// RDTSCP.
    pub(super) fn read_time_and_id(&mut self, item: &Item) -> Option<bool> {
        self.read_time(item)?;
        self.e.load(Gpr::Rcx, At::slot(at::CPU));
        let offset = offset_of!(CpuState, msr) + offset_of!(Msrs, tsc_aux);
        self.e.rm(W::D, &[0x8b], Gpr::Rcx as u8, At::base(Gpr::Rcx, offset as i32), &[]);
        Some(true)
    }

    /// SWAPGS at CPL 0.
    pub(super) fn swap_gs(&mut self, item: &Item) -> Option<bool> {
        let (a, b) = (self.scratch(item, false)?, self.scratch(item, false)?);
        self.e.load(a, At::slot(at::GS_BASE));
        self.e.load(b, At::slot(at::KERNEL_GS_BASE));
        self.e.store(At::slot(at::KERNEL_GS_BASE), a);
        self.e.store(At::slot(at::GS_BASE), b);
        Some(true)
    }

    /// RDTSC: the host's counter and the guest's offset.
    pub(super) fn read_time(&mut self, item: &Item) -> Option<bool> {
        self.give_up_flags(item);
        dynasm!(self.e; .arch x64; rdtsc; shl rdx, 32; or rax, rdx);
        self.e.add(Gpr::Rax, At::slot(at::TSC_OFFSET));
        self.e.copy(Gpr::Rdx, Gpr::Rax);
        self.e.shr(W::Q, Gpr::Rdx, 32);
        dynasm!(self.e; .arch x64; mov eax, eax);
        Some(true)
    }
}
