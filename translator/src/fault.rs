//! Signals that arrive while a thread is in the code cache: its registers are saved and it is sent to the way out.
//!
//! The handler does nothing that needs a lock or memory: what the host PC means is found out afterwards in normal context.
#![allow(unsafe_code)]

use crate::astray::Caught;
use crate::emit::{NO_TRAP, slot};
use crate::enter::{self, CAPTURED};
use crate::lower::{JMP_R11, adds_up};
use bivisor_emulator::cpu::xsave::Layout;
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::host::thread::ThreadBlock;
use bivisor_emulator::host::ticker::Ticker;
use bivisor_emulator::vcpu::Kicker;
use libc::{REG_CR2, REG_EFL, REG_ERR, REG_RIP, REG_RSP, REG_TRAPNO};

/// gregs indexes in encoding order of the registers.
const ORDER: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// The engine's hook of the signal handler: takes host exceptions inside the code cache and [`Kicker::SIGNAL`].
///
/// # Safety
/// Called by the handler of [`bivisor_emulator::host::signal`] with what the kernel gave it.
pub unsafe fn hook(block: &ThreadBlock, sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) -> bool {
    // SAFETY: the kernel's structures are valid while the handler runs.
    let (regs, exception) = unsafe { (&mut (*uc).uc_mcontext.gregs, is_exception(sig, (*info).si_code)) };
    if !exception && sig != Kicker::SIGNAL {
        return false;
    }
    let pc = regs[REG_RIP as usize] as u64;
    let slots = &block.scratch;
    // SAFETY: as above.
    if !exception && unsafe { Ticker::has_ticked(sig, info) } {
        slots[slot::TICK].set(1);
    }
    let caught = Caught {
        pc,
        r11: regs[libc::REG_R11 as usize] as u64,
        trap: regs[REG_TRAPNO as usize] as u64,
        error: regs[REG_ERR as usize] as u64,
        cache: (slots[slot::CACHE_START].get(), slots[slot::CACHE_END].get()),
    };
    // SAFETY: `pc` is in the cache, and the thread has executed what is there.
    let jumps = |pc: u64| unsafe { (pc as *const [u8; 3]).read() } == JMP_R11;
    if exception
        && adds_up()
        && let Some(on) = caught.on(jumps)
    {
        regs[REG_RIP as usize] = on as i64;
        return true;
    }
    if (slots[slot::CACHE_START].get()..slots[slot::CACHE_END].get()).contains(&pc) {
        slots[slot::PC].set(pc);
        slots[slot::TRAP].set(if exception { regs[REG_TRAPNO as usize] as u64 } else { NO_TRAP });
        slots[slot::ERROR].set(regs[REG_ERR as usize] as u64);
        slots[slot::CR2].set(regs[REG_CR2 as usize] as u64);
        // SAFETY: the slot was set by the run loop to a state that nobody else uses while the thread is in the cache.
        unsafe { save(&mut *(slots[slot::CPU].get() as *mut CpuState), &*uc) };
        slots[slot::PENDING].set(slots[slot::EXIT].get());
        slots[slot::EXIT].set(u64::from(CAPTURED));
        redirect(regs, enter::leave_captured(), slots[slot::HOST_RSP].get());
        return true;
    }
    if sig == Kicker::SIGNAL && enter::entering().contains(&pc) {
        redirect(regs, enter::abort(), slots[slot::HOST_RSP].get());
        return true;
    }
    false
}

/// Raised by the instruction at PC, not sent by somebody.
fn is_exception(sig: i32, code: i32) -> bool {
    matches!(sig, libc::SIGSEGV | libc::SIGBUS | libc::SIGFPE | libc::SIGILL | libc::SIGTRAP) && code > 0
}

fn redirect(regs: &mut [i64; 23], to: u64, rsp: u64) {
    regs[REG_RIP as usize] = to as i64;
    regs[REG_RSP as usize] = rsp as i64;
    regs[REG_EFL as usize] = 0x202;
}

/// All registers but RIP and the FS base.
///
/// # Safety
/// `uc` is the kernel's, with its floating-point state.
unsafe fn save(cpu: &mut CpuState, uc: &libc::ucontext_t) {
    let regs = &uc.uc_mcontext.gregs;
    for (to, from) in cpu.gpr.iter_mut().zip(ORDER) {
        *to = regs[from as usize] as u64;
    }
    // RF is the kernel's business in a signal frame.
    cpu.rflags = Rflags::from_bits_retain(regs[REG_EFL as usize] as u64) - Rflags::RF;
    let frame = uc.uc_mcontext.fpregs.cast::<u8>();
    if frame.is_null() {
        return;
    }
    let l = Layout::host();
    let to = &mut cpu.xsave.bytes;
    // SAFETY: the frame has at least the 512 bytes of FXSAVE; with the magic number (linux/asm/sigcontext.h) it is an XSAVE image in
    // standard format of the size that is given next to it.
    unsafe {
        std::ptr::copy_nonoverlapping(frame, to.as_mut_ptr(), LEGACY);
        let magic = frame.add(SW_RESERVED).cast::<u32>().read_unaligned();
        let size = frame.add(SW_RESERVED + 16).cast::<u32>().read_unaligned() as usize;
        let components = if magic == FP_XSTATE_MAGIC1 && size >= l.size {
            let bv = frame.add(Layout::HEADER).cast::<u64>().read_unaligned();
            let rest = Layout::HEADER + 64;
            std::ptr::copy_nonoverlapping(frame.add(rest), to.as_mut_ptr().add(rest), l.size - rest);
            bv & l.components
        } else {
            3
        };
        cpu.xsave.set_xstate_bv(components);
    }
}

/// Bytes of an FXSAVE image up to the end of XMM15.
const LEGACY: usize = 416;
const SW_RESERVED: usize = 464;
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;

/// Gets a thread out of the code cache. It may belong to a process that shares our memory (vfork), so this is not tgkill(2).
pub fn kick(tid: i32) {
    // SAFETY: plain system call; the handler of the signal is installed in every thread that runs translated code.
    unsafe { libc::syscall(libc::SYS_tkill, tid, Kicker::SIGNAL) };
}
