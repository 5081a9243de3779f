//! Signals that arrive while a virtual CPU runs system-mode code: a host exception there leaves with all registers as they are; a
//! kick sets the flag that code reached by indirect branches looks at, and takes the jumps away from the code it interrupts.
#![allow(unsafe_code)]

use crate::emit::slot;
use crate::system::area::at;
use crate::system::cache::Cache;
use crate::system::enter::{self, FAULT};
use crate::system::{walk, xsave};
use bivisor_emulator::host::thread::{ENGINE_AREA_OFFSET, ThreadBlock};
use bivisor_emulator::vcpu::Kicker;

/// The engine's hook of the signal handler.
///
/// # Safety
/// Called by the handler of [`bivisor_emulator::host::signal`] with what the kernel gave it, on a thread whose area is mapped.
pub unsafe fn hook(block: &ThreadBlock, sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) -> bool {
    // SAFETY: the kernel's structures are valid while the handler runs.
    let (regs, code) = unsafe { (&mut (*uc).uc_mcontext.gregs, (*info).si_code) };
    if sig == Kicker::SIGNAL {
        let pc = regs[libc::REG_RIP as usize] as u64;
        block.scratch[slot::LOOK].set(1);
        if enter::entering().contains(&pc) {
            regs[libc::REG_RIP as usize] = enter::abort() as i64;
        } else if enter::returning().contains(&pc) {
            regs[libc::REG_RIP as usize] = enter::give_up() as i64;
        } else if xsave::returning().contains(&pc) {
            regs[libc::REG_RIP as usize] = xsave::again() as i64;
        } else if walk::returning().contains(&pc) {
            regs[libc::REG_RIP as usize] = walk::give_up() as i64;
        } else if (block.scratch[slot::CACHE_START].get()..block.scratch[slot::CACHE_END].get()).contains(&pc) {
            // SAFETY: the run loop has put its cache there, and this thread is in the code: nobody changes the cache.
            unsafe { &*block.engine_data.get().cast::<Cache>() }.poison(pc);
        }
        return true;
    }
    let raised = matches!(sig, libc::SIGSEGV | libc::SIGBUS | libc::SIGFPE | libc::SIGILL | libc::SIGTRAP) && code > 0;
    let pc = regs[libc::REG_RIP as usize] as u64;
    let slots = &block.scratch;
    if !raised || !(slots[slot::CACHE_START].get()..slots[slot::CACHE_END].get()).contains(&pc) {
        return false;
    }
    slots[slot::PC].set(pc);
    // SAFETY: the area behind the block is mapped while CACHE_END is not 0.
    unsafe { ((block.this as usize + ENGINE_AREA_OFFSET + at::EXIT) as *mut u64).write_volatile(u64::from(FAULT)) };
    regs[libc::REG_RIP as usize] = enter::leave() as i64;
    true
}
