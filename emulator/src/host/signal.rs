//! The one signal handler of the program, for threads that run guest code, and the host's dispositions and masks (signal(7)).
//!
//! Order: a fault inside [`crate::host::probe`] is fixed up; another fault belongs to the engine's hook (translated code). A signal
//! that was sent goes to the process personality's hook, which queues it; if that one wants the guest to stop, the engine's hook is
//! called with [`Kicker::SIGNAL`], whatever the signal was, to bring native guest code to an end at the interrupted context. A fault
//! nobody owns is a bug of ours: the default action is restored, so the thread dies of it.
//!
//! The host thread's mask mirrors the guest's, except for [`NEVER_BLOCKED`]: what engines need cannot be blocked.
#![allow(unsafe_code)]

use crate::host::kicker::Kicker;
use crate::host::probe;
use crate::host::syscall::raw;
use crate::host::thread::ThreadBlock;
use std::arch::naked_asm;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

/// Index of RIP in `ucontext_t.uc_mcontext.gregs`.
pub const REG_RIP: usize = libc::REG_RIP as usize;

/// Signals raised by instructions: always routed here.
pub const FAULTS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP];

/// A signal as a bit of the kernel's 64-bit sigset_t.
pub const fn bit(sig: i32) -> u64 {
    1 << (sig - 1)
}

/// Signals that no thread which runs guest code blocks on the host: the faults and the kick.
pub const NEVER_BLOCKED: u64 = bit(libc::SIGSEGV)
    | bit(libc::SIGBUS)
    | bit(libc::SIGILL)
    | bit(libc::SIGFPE)
    | bit(libc::SIGTRAP)
    | bit(Kicker::SIGNAL);

/// `struct sigaction` of the kernel (not of libc), x86-64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct KernelAction {
    /// SIG_DFL 0, SIG_IGN 1, or an address.
    pub handler: u64,
    /// SA_ flags.
    pub flags: u64,
    /// With SA_RESTORER: where the handler returns to.
    pub restorer: u64,
    /// Blocked while the handler runs.
    pub mask: u64,
}

/// SA_RESTORER; libc hides it.
pub const SA_RESTORER: u64 = 0x0400_0000;

/// rt_sigaction(2) of the host as the kernel has it, libc's reserved signals included.
///
/// # Errors
/// The kernel's `-errno`.
///
/// # Safety
/// A handler must be one that may run here.
unsafe fn kernel_sigaction(sig: i32, new: Option<&KernelAction>) -> Result<KernelAction, i64> {
    let mut old = KernelAction::default();
    let new = new.map_or(0, |n| std::ptr::from_ref(n) as u64);
    // SAFETY: both pointers are null or live; the handler is the caller's promise.
    let r = unsafe { raw(libc::SYS_rt_sigaction as u64, [sig as u64, new, &raw mut old as u64, 8, 0, 0]) };
    if r < 0 { Err(r) } else { Ok(old) }
}

static INHERITED_IGNORED: AtomicU64 = AtomicU64::new(0);

/// Which signals were SIG_IGN when the program was started: before Rust's runtime ignores SIGPIPE and before [`attach`].
pub fn inherited_ignored() -> u64 {
    INHERITED_IGNORED.load(Ordering::Relaxed)
}

extern "C" fn note_inherited() {
    let mut ignored = 0;
    for sig in 1..=64 {
        // SAFETY: nothing is changed.
        if unsafe { kernel_sigaction(sig, None) }.is_ok_and(|a| a.handler == libc::SIG_IGN as u64) {
            ignored |= bit(sig);
        }
    }
    INHERITED_IGNORED.store(ignored, Ordering::Relaxed);
}

// SAFETY: the linker's array of functions to call before main; this one makes plain system calls.
#[unsafe(link_section = ".init_array")]
#[used]
static NOTE_INHERITED: extern "C" fn() = note_inherited;

/// Installs the handler for the [`FAULTS`] and for the kick signal, once a process; and makes the calling thread's block. Every thread
/// that runs guest code calls it.
pub fn attach() -> &'static ThreadBlock {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Names the array's entry, so that the linker keeps it.
        std::hint::black_box(&NOTE_INHERITED);
        for sig in FAULTS.into_iter().chain([Kicker::SIGNAL]) {
            route(sig, libc::SA_RESTART as u64);
        }
    });
    ThreadBlock::current()
}

/// Routes a signal to the handler here, with SA_RESTART, SA_NOCLDSTOP and SA_NOCLDWAIT as in `flags`: whether an interrupted system
/// call is restarted is thus the kernel's decision (see [`crate::host::syscall`]). All signals are blocked while the handler runs, but
/// for SIGSEGV and SIGBUS, which the probes in hooks may raise.
pub fn route(sig: i32, flags: u64) {
    let kept = (libc::SA_RESTART | libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT) as u64;
    let action = KernelAction {
        handler: entry as *const () as u64,
        flags: (libc::SA_SIGINFO | libc::SA_ONSTACK) as u64 | SA_RESTORER | flags & kept,
        restorer: restorer as *const () as u64,
        mask: !(bit(libc::SIGSEGV) | bit(libc::SIGBUS)),
    };
    // SAFETY: the handler is async-signal-safe: it touches the thread block and calls the hooks, which promise the same. An error means
    // a signal that cannot be caught, and the guest was told so by `set_default`'s caller.
    let _ = unsafe { kernel_sigaction(sig, Some(&action)) };
}

/// Gives a signal's action to the host's kernel: SIG_DFL or SIG_IGN, with the flags that matter to it (SA_NOCLDWAIT).
pub fn set_plain(sig: i32, ignore: bool, flags: u64) {
    let handler = if ignore { libc::SIG_IGN } else { libc::SIG_DFL } as u64;
    // SAFETY: no handler.
    let _ = unsafe {
        kernel_sigaction(sig, Some(&KernelAction { handler, flags: flags & !SA_RESTORER, ..KernelAction::default() }))
    };
}

/// Sets the calling thread's mask, [`NEVER_BLOCKED`] taken out. Signals that become deliverable arrive before this returns.
pub fn set_mask(mask: u64) {
    let mask = mask & !NEVER_BLOCKED;
    // SAFETY: reads one u64.
    unsafe { raw(libc::SYS_rt_sigprocmask as u64, [libc::SIG_SETMASK as u64, &raw const mask as u64, 0, 8, 0, 0]) };
}

/// Blocks signals on the calling thread, also [`NEVER_BLOCKED`] ones: for the last moment before execve(2).
pub fn block(set: u64) {
    // SAFETY: reads one u64.
    unsafe { raw(libc::SYS_rt_sigprocmask as u64, [libc::SIG_BLOCK as u64, &raw const set as u64, 0, 8, 0, 0]) };
}

/// The calling thread's mask.
pub fn mask() -> u64 {
    let mut mask = 0u64;
    // SAFETY: writes one u64.
    unsafe { raw(libc::SYS_rt_sigprocmask as u64, [libc::SIG_SETMASK as u64, 0, &raw mut mask as u64, 8, 0, 0]) };
    mask
}

/// Sends a signal to one thread of this process.
pub fn send_to_thread(tid: i32, sig: i32) {
    // SAFETY: plain system calls.
    unsafe {
        let pid = raw(libc::SYS_getpid as u64, [0; 6]);
        raw(libc::SYS_tgkill as u64, [pid as u64, tid as u64, sig as u64, 0, 0, 0])
    };
}

/// Lets a signal's default action happen to the process; returns if that was not to die.
pub fn default_action(sig: i32) {
    set_plain(sig, false, 0);
    let old = mask();
    let unblocked = old & !bit(sig);
    // SAFETY: plain system calls; the mask is read from a live u64. Not `set_mask`: the signal may be one of NEVER_BLOCKED.
    unsafe {
        send_to_thread(raw(libc::SYS_gettid as u64, [0; 6]) as i32, sig);
        raw(libc::SYS_rt_sigprocmask as u64, [libc::SIG_SETMASK as u64, &raw const unblocked as u64, 0, 8, 0, 0]);
    }
    set_mask(old);
}

/// Returns from the handler: rt_sigreturn(2).
#[unsafe(naked)]
unsafe extern "sysv64" fn restorer() {
    naked_asm!("mov eax, 15", "syscall", "ud2")
}

/// The kernel calls this on the alternate stack, perhaps with the guest's FS base. Threads without a block have GS base 0 and the
/// host's FS.
#[unsafe(naked)]
unsafe extern "sysv64" fn entry(sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) {
    naked_asm!(
        // The kernel leaves AC as the guest had it; misaligned accesses of Rust code would fault.
        "pushfq",
        "and qword ptr [rsp], ~0x40000",
        "popfq",
        "rdgsbase rcx",
        "test rcx, rcx",
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

unsafe extern "sysv64" fn handle(
    sig: i32,
    info: *mut libc::siginfo_t,
    uc: *mut libc::ucontext_t,
    block: *const ThreadBlock,
) {
    // SAFETY: the kernel gave a valid context; the block is this thread's or null; hooks are called on the thread that set them.
    unsafe {
        // errno belongs to the interrupted code.
        let errno = *libc::__errno_location();
        let block = block.as_ref();
        // Hardware gives positive codes; kill(2), sigqueue(3) and timers do not.
        let taken = if (*info).si_code > 0 && FAULTS.contains(&sig) {
            let pc = (*uc).uc_mcontext.gregs[REG_RIP] as u64;
            let fixup = match sig {
                libc::SIGSEGV | libc::SIGBUS => {
                    probe::fixup(pc).or_else(|| Some(block.and_then(|b| thunk_at(b, pc))? + THUNK_FAULT))
                }
                libc::SIGFPE => block.and_then(|b| thunk_at(b, pc)),
                _ => None,
            };
            match fixup {
                Some(go_on) => {
                    (*uc).uc_mcontext.gregs[REG_RIP] = go_on as i64;
                    true
                }
                None => block.is_some_and(|b| b.engine_hook.get().is_some_and(|h| h(b, sig, info, uc))),
            }
        } else {
            block.is_some_and(|b| sent(b, sig, info, uc))
        };
        if !taken && sig != Kicker::SIGNAL {
            set_plain(sig, false, 0);
            // Faults come again on return; what was sent must be sent again.
            if (*info).si_code <= 0 {
                send_to_thread(raw(libc::SYS_gettid as u64, [0; 6]) as i32, sig);
            }
        }
        *libc::__errno_location() = errno;
    }
}

/// Where in its range of code a thread goes on that had a SIGSEGV or SIGBUS in a thunk; after a SIGFPE it goes on at the start.
pub const THUNK_FAULT: u64 = 64;

/// Makes faults of the calling thread inside a range of code go on at the start of the range; an empty range: no more.
pub fn expect_faults(code: std::ops::Range<u64>) {
    let block = attach();
    block.thunks[1].set(code.end - code.start);
    block.thunks[0].set(code.start);
}

fn thunk_at(block: &ThreadBlock, pc: u64) -> Option<u64> {
    let start = block.thunks[0].get();
    (start != 0 && pc.wrapping_sub(start) < block.thunks[1].get()).then_some(start)
}

/// A signal that no instruction raised.
///
/// # Safety
/// In the handler, with its arguments.
unsafe fn sent(block: &ThreadBlock, sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) -> bool {
    // SAFETY: the caller's arguments.
    unsafe {
        let stop = block.process_hook.get().is_some_and(|h| h(block, sig, info, uc));
        if (stop || sig == Kicker::SIGNAL)
            && let Some(hook) = block.engine_hook.get()
        {
            hook(block, Kicker::SIGNAL, info, uc);
        }
        // Whoever has a personality takes everything that is sent.
        block.process_hook.get().is_some()
    }
}
