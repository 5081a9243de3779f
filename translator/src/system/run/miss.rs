//! Accesses that the inline TLB does not have, and stores that need care.

use super::{System, by};
use crate::block::page_of;
use crate::run::Translator;
use crate::system::area::at;
use crate::system::block::Access as GuestAccess;
use crate::system::tlb::Found;
use crate::system::walk;
use bivisor_emulator::cpu::{CpuState, Fault, Rflags};
use bivisor_emulator::mem::{Access, By, PAGE_SIZE, Ram};
use bivisor_emulator::vcpu::Board;

/// Small pages of a large one that are entered at once, if one is missed.
const TOGETHER: u64 = 4;

/// What became of a miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// The inline TLB has the page now.
    Yes,
    /// It cannot be there, or not for all of the range.
    No,
    /// The guest's tables do not allow the access.
    Fault(Fault),
}

impl System {
    /// Enters the page of an access that missed. [`Filled::No`], [`Filled::Fault`]: the
    /// interpreter does the instruction, or only raises the fault.
    pub(super) fn fill(
        &mut self,
        t: &mut Translator,
        board: Board<'_>,
        ram: &Ram,
        access: &GuestAccess,
        len: u16,
    ) -> Filled {
        let laddr = self.address(&t.cpu, access);
        let canonical = ((laddr << 16) as i64 >> 16) as u64 == laddr;
        // Sums that wrap in 32-bit code are the interpreter's.
        let narrow = laddr >> 32 != 0 && t.cpu.mode() != bivisor_emulator::cpu::Mode::Long64;
        if !canonical || narrow || laddr % PAGE_SIZE + u64::from(len) > PAGE_SIZE {
            return Filled::No;
        }
        // It faults, and then leaves the page's flags alone.
        if self.is_misaligned(t, access) {
            return Filled::No;
        }
        let kind = if access.write { Access::Write } else { Access::Read };
        let by = by(&t.cpu);
        // STAC, CLAC and SYSCALL in the code leave it to the slot.
        let ac = self.area.get(at::FLAGS) & Rflags::AC.bits() != 0;
        t.cpu.rflags.set(Rflags::AC, ac);
        let context = self.context(t);
        if context == 0 {
            walk::open(&self.area, &t.cpu, ram);
        }
        match t.core.mmu.translate(&t.cpu, board.mem, laddr, kind, by) {
            Ok(gpa) => {
                let global = t.core.mmu.is_global(context, laddr);
                if !self.tlb.fill(&self.area, ram, Found { context, laddr, gpa, global }, access.write) {
                    return Filled::No;
                }
                // The next pages of a kernel's mapping of all memory are likely wanted soon.
                if t.core.mmu.is_large(context, laddr) {
                    let (page, from) = (page_of(laddr), laddr & !(TOGETHER * PAGE_SIZE - 1));
                    for n in (0..TOGETHER).filter(|n| from + n * PAGE_SIZE != page) {
                        let laddr = from + n * PAGE_SIZE;
                        let gpa = page_of(gpa).wrapping_add(laddr.wrapping_sub(page));
                        self.tlb.fill(&self.area, ram, Found { context, laddr, gpa, global }, access.write);
                    }
                }
                Filled::Yes
            }
            Err(fault) => {
                if by == By::User && self.mirroring.page_fault() {
                    self.close_gates();
                }
                Filled::Fault(fault)
            }
        }
    }

    /// Is it #GP before anything of the page is looked at?
    fn is_misaligned(&self, t: &Translator, access: &GuestAccess) -> bool {
        access.aligned && !self.address(&t.cpu, access).is_multiple_of(access.len.into())
    }

    pub(super) fn address(&self, cpu: &CpuState, access: &GuestAccess) -> u64 {
        access.address(|r| cpu.gpr[r as usize], self.area.get(at::FS_BASE), self.area.get(at::GS_BASE))
    }

    /// Which TLB the code asks.
    pub(super) fn context(&self, t: &Translator) -> usize {
        let flags = Rflags::from_bits_retain(self.area.get(at::FLAGS));
        match (t.cpu.cpl(), flags.contains(Rflags::AC)) {
            (3, _) => 0,
            (_, true) if t.cpu.cr4.contains(bivisor_emulator::cpu::Cr4::SMAP) => 2,
            _ => 1,
        }
    }

    /// Of a store that the interpreter is about to do it is known what it hits, should that be a page with code.
    pub(super) fn store_carefully(&mut self, t: &mut Translator, board: Board<'_>, access: &GuestAccess) {
        if !access.write || self.is_misaligned(t, access) {
            return;
        }
        let (laddr, by, len) = (self.address(&t.cpu, access), by(&t.cpu), u64::from(access.len));
        if laddr % PAGE_SIZE + len <= PAGE_SIZE
            && let Ok(gpa) = t.core.mmu.translate(&t.cpu, board.mem, laddr, Access::Write, by)
        {
            self.store = Some((gpa, len));
        }
    }
}
