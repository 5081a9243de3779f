//! Linear to guest-physical addresses: the TLB in front of the page walk (SDM 3A 4).

use crate::cpu::{CpuState, Fault};
use crate::mem::{Access, GuestMemory};

/// What one vCPU needs to translate addresses. A flat guest memory is not translated: linear address = address.
#[derive(Default)]
pub struct Mmu {
    generation: u64,
}

impl Mmu {
    /// Nothing cached.
    pub fn new() -> Mmu {
        Mmu::default()
    }

    /// The guest-physical address of `laddr` for an access at privilege `user` (CPL 3; false also for implicit supervisor accesses).
    ///
    /// # Errors
    /// The page fault.
    #[inline]
    pub fn translate(
        &mut self,
        cpu: &CpuState,
        mem: &GuestMemory,
        laddr: u64,
        access: Access,
        user: bool,
    ) -> Result<u64, Fault> {
        let _ = (cpu, mem, access, user);
        Ok(laddr)
    }

    /// Forgets everything: after writes of CR0, CR3 (non-global entries may stay), CR4, EFER.
    pub fn flush(&mut self) {
        self.generation += 1;
    }

    /// Forgets all but global pages: MOV to CR3.
    pub fn flush_non_global(&mut self) {
        self.flush();
    }

    /// Forgets one page, global or not: INVLPG.
    pub fn flush_page(&mut self, laddr: u64) {
        let _ = laddr;
        self.flush();
    }

    /// Changes with every flush: what is cached of translations elsewhere compares it.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}
