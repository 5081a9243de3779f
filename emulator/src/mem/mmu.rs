//! Linear to guest-physical addresses: the TLB in front of the page walk (SDM 3A 4).

use crate::cpu::{CpuState, Cr0, Cr4, Fault, Rflags};
use crate::mem::paging::{self, Page};
use crate::mem::tlb::{Rights, Tlb};
use crate::mem::{Access, By, GuestMemory};

/// What one vCPU needs to translate addresses. A flat guest memory is not translated: linear address = address.
#[derive(Default)]
pub struct Mmu {
    tlb: Tlb,
    generation: u64,
    last: Flushed,
    counts: bool,
    hits: u64,
    misses: u64,
}

/// What a flush forgot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flushed {
    /// Everything.
    #[default]
    All,
    /// All but global pages.
    Local,
    /// The 4 KiB with this linear address.
    Page(u64),
}

impl Mmu {
    /// Nothing cached.
    pub fn new() -> Mmu {
        Mmu::default()
    }

    /// The guest-physical address of `laddr`, of which the whole 4 KiB page may be accessed in the same way.
    ///
    /// # Errors
    /// The page fault.
    #[inline(always)]
    pub fn translate(
        &mut self,
        cpu: &CpuState,
        mem: &GuestMemory,
        laddr: u64,
        access: Access,
        by: By,
    ) -> Result<u64, Fault> {
        if matches!(mem, GuestMemory::Flat(_)) || !cpu.cr0.contains(Cr0::PG) {
            return Ok(laddr);
        }
        let context = Mmu::context(cpu, by);
        match self.tlb.get(context, laddr, access) {
            Some(gpa) => {
                self.hits += 1;
                Ok(gpa)
            }
            None => self.miss(cpu, mem, laddr, access, by, context),
        }
    }

    /// The part of the TLB that is asked for accesses by `by`.
    #[inline(always)]
    pub fn context(cpu: &CpuState, by: By) -> usize {
        match by {
            By::User => 0,
            By::Supervisor if cpu.rflags.contains(Rflags::AC) && cpu.cr4.contains(Cr4::SMAP) => 2,
            By::Supervisor | By::Implicit => 1,
        }
    }

    /// The guest-physical address if the TLB knows that the access is allowed; the context is that of [`Mmu::context`] under paging.
    #[inline(always)]
    pub fn known(&self, context: usize, laddr: u64, access: Access) -> Option<u64> {
        self.tlb.get(context, laddr, access)
    }

    #[cold]
    #[inline(never)]
    fn miss(
        &mut self,
        cpu: &CpuState,
        mem: &GuestMemory,
        laddr: u64,
        access: Access,
        by: By,
        context: usize,
    ) -> Result<u64, Fault> {
        self.misses += 1;
        let page: Page = paging::walk(cpu, mem, laddr, access, by)?;
        let rights = Rights {
            read: paging::allowed(cpu, &page, Access::Read, by),
            // The first write must set the dirty flag.
            write: page.dirty && paging::allowed(cpu, &page, Access::Write, by),
            execute: paging::allowed(cpu, &page, Access::Execute, by),
        };
        self.tlb.put(context, laddr, page.gpa, page.size, page.global, rights);
        Ok(page.gpa | laddr & 0xfff)
    }

    /// Forgets everything: after writes of CR0, CR4, EFER, and whenever the state was changed from outside.
    pub fn flush(&mut self) {
        self.tlb.flush();
        self.generation += 1;
        self.last = Flushed::All;
    }

    /// Forgets at least all but global pages: MOV to CR3. (The processor may forget global ones too, SDM 3A 4.10.2.4.)
    pub fn flush_non_global(&mut self) {
        if !self.tlb.flush_local() {
            return self.flush();
        }
        self.generation += 1;
        self.last = Flushed::Local;
    }

    /// Forgets one page, global or not: INVLPG.
    pub fn flush_page(&mut self, laddr: u64) {
        let small = self.tlb.flush_page(laddr);
        if !small {
            self.tlb.flush();
        }
        self.generation += 1;
        self.last = if small { Flushed::Page(laddr) } else { Flushed::All };
    }

    /// From now on whoever asks for a page asks [`Mmu::translate`], which counts.
    pub fn count(&mut self) {
        self.counts = true;
    }

    /// Is every access to be counted?
    #[inline(always)]
    pub fn counts(&self) -> bool {
        self.counts
    }

    /// Accesses that found their page, and those that did not, if they are counted.
    pub fn lookups(&self) -> Option<(u64, u64)> {
        self.counts.then_some((self.hits, self.misses))
    }

    /// What was forgotten when [`Mmu::generation`] was raised last.
    pub fn flushed(&self) -> Flushed {
        self.last
    }

    /// Is the page of an address, which was just translated, global?
    pub fn is_global(&self, context: usize, laddr: u64) -> bool {
        self.tlb.is_global(context, laddr)
    }

    /// Is the page, which is known, part of one of 2 MiB or more?
    pub fn is_large(&self, context: usize, laddr: u64) -> bool {
        self.tlb.is_large(context, laddr)
    }

    /// Changes with every flush: what is cached of translations elsewhere compares it.
    #[inline(always)]
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Width;
    use crate::mem::Ram;

    #[test]
    fn stale_until_flushed_and_never_for_what_was_absent() {
        let mem = GuestMemory::Ram(Ram::new(1 << 20).expect("1 MiB"));
        let put = |at, v| mem.store(at, Width::Q, v).expect("in RAM");
        put(0x1000, 0x2007);
        put(0x2000, 0x3007);
        put(0x3000, 0x4007);
        let leaf = 0x4000 + 5 * 8;
        let mut cpu = CpuState::long64(3);
        cpu.cr3 = 0x1000;
        let mut mmu = Mmu::new();
        let go = |mmu: &mut Mmu, access| mmu.translate(&cpu, &mem, 0x5123, access, By::User);
        assert_eq!(go(&mut mmu, Access::Read), Err(Fault::Pf { addr: 0x5123, code: 4 }));
        put(leaf, 0x9007);
        assert_eq!(go(&mut mmu, Access::Read), Ok(0x9123), "absence is not cached");
        put(leaf, 0xa007);
        assert_eq!(go(&mut mmu, Access::Read), Ok(0x9123), "stale as on a real CPU");
        mmu.flush_page(0x5000);
        assert_eq!(go(&mut mmu, Access::Read), Ok(0xa123));
        assert_eq!(mem.load(leaf, Width::Q), Some(0xa027));
        assert_eq!(go(&mut mmu, Access::Write), Ok(0xa123), "the first write walks again");
        assert_eq!(mem.load(leaf, Width::Q), Some(0xa067));
    }
}
