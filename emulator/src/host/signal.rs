//! The one signal handler of the program, for threads that run guest code.
//!
//! Order: a fault inside [`crate::host::probe`] is fixed up; then the engine's hook (faults in translated code); then the process
//! personality's hook (queues what the guest wants to handle); then the engine's hook once more for asynchronous signals is the
//! personality's business. A fault nobody owns is a bug of ours: the default action is restored, so the thread dies of it.
#![allow(unsafe_code)]

use crate::host::probe;
use crate::host::thread::ThreadBlock;
use std::arch::naked_asm;
use std::sync::Once;

/// Index of RIP in `ucontext_t.uc_mcontext.gregs`.
pub const REG_RIP: usize = libc::REG_RIP as usize;

/// Installs the handler for the synchronous faults (SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP) and for the kick signal, once a process;
/// and makes the calling thread's block. Every thread that runs guest code calls it.
pub fn attach() -> &'static ThreadBlock {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for sig in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, crate::vcpu::Kicker::SIGNAL]
        {
            route(sig);
        }
    });
    ThreadBlock::current()
}

/// Routes a signal to the handler here: no SA_RESTART, so that blocking system calls return EINTR; all signals blocked while it runs.
pub fn route(sig: i32) {
    // SAFETY: the handler is async-signal-safe: it touches the thread block and calls the hooks, which promise the same.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = entry as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&mut action.sa_mask);
        for s in [libc::SIGSEGV, libc::SIGBUS] {
            libc::sigdelset(&mut action.sa_mask, s);
        }
        libc::sigaction(sig, &action, std::ptr::null_mut());
    }
}

/// Sends a signal to one thread of this process.
pub fn send_to_thread(tid: i32, sig: i32) {
    // SAFETY: plain system call.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, sig) };
}

/// The kernel calls this on the alternate stack, perhaps with the guest's FS base. Threads without a block have GS base 0 and the
/// host's FS.
#[unsafe(naked)]
unsafe extern "sysv64" fn entry(sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) {
    naked_asm!(
        "rdgsbase rax",
        "test rax, rax",
        "jz {handle}",
        "push rbx",
        "rdfsbase rbx",
        "mov rax, gs:[8]",
        "wrfsbase rax",
        "call {handle}",
        "wrfsbase rbx",
        "pop rbx",
        "ret",
        handle = sym handle,
    )
}

unsafe extern "sysv64" fn handle(sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) {
    // SAFETY: the kernel gave a valid context; hooks are called on the thread that set them.
    unsafe {
        // errno belongs to the interrupted code.
        let errno = *libc::__errno_location();
        let pc = (*uc).uc_mcontext.gregs[REG_RIP] as u64;
        if let Some(go_on) = probe::fixup(pc).filter(|_| sig == libc::SIGSEGV || sig == libc::SIGBUS) {
            (*uc).uc_mcontext.gregs[REG_RIP] = go_on as i64;
        } else {
            let block = ThreadBlock::current();
            let hooks = [
                (block.engine_hook.get(), block.engine_data.get()),
                (block.process_hook.get(), block.process_data.get()),
            ];
            let taken = hooks.iter().any(|(hook, _)| hook.is_some_and(|h| h(block, sig, info, uc)));
            if !taken && sig != crate::vcpu::Kicker::SIGNAL {
                libc::signal(sig, libc::SIG_DFL);
                // Faults come again on return; what was sent must be sent again.
                if (*info).si_code <= 0 {
                    libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), sig);
                }
            }
        }
        *libc::__errno_location() = errno;
    }
}
