//! Sensitive instructions that are a few loads and stores: reads of control registers, SWAPGS, RDTSC.

use super::Lower;
use super::asm::{Assembler, At, W};
use crate::system::area::at;
use crate::system::block::Item;
use bivisor_emulator::cpu::{CpuState, Msrs, Segment};
use bivisor_emulator::isa::{Gpr, Seg};
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::Register;
use std::mem::offset_of;

impl Lower<'_> {
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
        self.e.load(r, At::base(r, offset as i32));
        Some(true)
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
