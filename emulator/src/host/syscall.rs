//! A raw system call that a signal can abort: the window between "nothing is pending" and the SYSCALL instruction is closed.
//!
//! The routine looks at a flag and then enters the kernel. A signal handler that sets the flag while the interrupted PC is in that
//! window moves the PC to the abort exit ([`fixup`]). The same test catches what the kernel does for SA_RESTART: it winds the PC back
//! to the SYSCALL instruction (signal(7)), so "aborted" always means: not executed, may be executed again after the handler.
#![allow(unsafe_code)]

use std::arch::{asm, global_asm};
use std::sync::atomic::AtomicU32;

#[repr(C)]
struct Returned {
    value: i64,
    aborted: u64,
}

global_asm!(
    ".p2align 4",
    // Other codegen units refer to them.
    ".globl bivisor_syscall, bivisor_syscall_window, bivisor_syscall_done, bivisor_syscall_abort",
    // rdi = &flag, rsi = &[nr, a0, a1, a2, a3, a4, a5]
    "bivisor_syscall:",
    "mov rcx, rdi",
    "mov r11, rsi",
    "mov rax, [r11]",
    "mov rdi, [r11 + 8]",
    "mov rsi, [r11 + 16]",
    "mov rdx, [r11 + 24]",
    "mov r10, [r11 + 32]",
    "mov r8, [r11 + 40]",
    "mov r9, [r11 + 48]",
    "bivisor_syscall_window:",
    "cmp dword ptr [rcx], 0",
    "jne bivisor_syscall_abort",
    "syscall",
    "bivisor_syscall_done:",
    "xor edx, edx",
    "ret",
    "bivisor_syscall_abort:",
    "mov edx, 1",
    "ret",
);

unsafe extern "sysv64" {
    safe static bivisor_syscall_window: u8;
    safe static bivisor_syscall_done: u8;
    safe static bivisor_syscall_abort: u8;
    fn bivisor_syscall(flag: *const AtomicU32, args: *const [u64; 7]) -> Returned;
}

/// Where an interrupted thread at host address `pc` goes on if its system call is to be aborted; `None` if it is not about to make one.
pub fn fixup(pc: u64) -> Option<u64> {
    let at = |s: &u8| std::ptr::from_ref(s) as u64;
    (at(&bivisor_syscall_window)..at(&bivisor_syscall_done)).contains(&pc).then(|| at(&bivisor_syscall_abort))
}

/// The system call was not executed, because the flag was set: deliver what is pending, then it may be made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aborted;

/// Makes a system call unless `flag` is not 0; gives the kernel's value, `-errno` for an error.
///
/// # Errors
/// [`Aborted`]: not executed, or the kernel wants it restarted after a signal handler has run.
///
/// # Safety
/// The kernel does whatever the call says: pointers must be the guest's or valid for it.
#[inline]
pub unsafe fn interruptible(flag: &AtomicU32, nr: u64, args: [u64; 6]) -> Result<i64, Aborted> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the routine reads the two arguments and follows the C convention; the call itself is the caller's promise.
    let r = unsafe { bivisor_syscall(flag, &[nr, a, b, c, d, e, f]) };
    if r.aborted == 0 { Ok(r.value) } else { Err(Aborted) }
}

/// Makes a system call that is never aborted: it does not block, or must be carried out.
///
/// # Safety
/// As for [`interruptible`].
#[inline]
pub unsafe fn raw(nr: u64, args: [u64; 6]) -> i64 {
    let value: i64;
    // SAFETY: the kernel's calling convention: RCX and R11 are lost, everything else is kept; the call itself is the caller's promise.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") nr as i64 => value,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    value
}
