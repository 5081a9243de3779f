//! Signals that arrive while a virtual CPU runs system-mode code: a host exception there leaves with all registers as they are; a
//! kick sets the flag that the code looks at where it jumps backwards or indirectly.
#![allow(unsafe_code)]

use crate::emit::slot;
use crate::system::area::at;
use crate::system::enter::{self, FAULT};
use bivisor_emulator::host::thread::{ENGINE_AREA_OFFSET, ThreadBlock};
use bivisor_emulator::vcpu::Kicker;

/// The engine's hook of the signal handler.
///
/// # Safety
/// Called by the handler of [`bivisor_emulator::host::signal`] with what the kernel gave it, on a thread whose area is mapped.
pub unsafe fn hook(block: &ThreadBlock, sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) -> bool {
    if sig == Kicker::SIGNAL {
        block.scratch[slot::LOOK].set(1);
        return true;
    }
    // SAFETY: the kernel's structures are valid while the handler runs.
    let (regs, code) = unsafe { (&mut (*uc).uc_mcontext.gregs, (*info).si_code) };
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
