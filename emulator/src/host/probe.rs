//! Loads and stores to host addresses that may fault: a host SIGSEGV or SIGBUS inside them becomes `None`.
//!
//! The functions are leaves in assembly; [`fixup`] tells the signal handler where to go on when one of them faults. The handler of
//! [`crate::host::signal`] must be installed first.
#![allow(unsafe_code)]

use crate::isa::Width;
use std::arch::global_asm;

/// A host address that is a guest's to read and write: [`crate::mem`] makes it, thunks access it. An access may fault where the
/// address is one of a flat space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach(u64);

impl Reach {
    /// # Safety
    /// As for [`store`], for as many bytes as will be accessed.
    #[inline(always)]
    pub unsafe fn new(addr: u64) -> Reach {
        Reach(addr)
    }

    /// The address.
    #[inline(always)]
    pub fn address(self) -> u64 {
        self.0
    }
}

#[repr(C)]
struct Probed {
    value: u64,
    failed: u64,
}

// Every routine may fault at its memory access with nothing on the stack but the return address, so that the fixup can `ret`.
global_asm!(
    // Inlined callers may stand in other object files.
    ".globl bivisor_probe_start; .globl bivisor_probe_end; .globl bivisor_probe_fail; .globl bivisor_probe_cas128_start; .globl bivisor_probe_cas128_end",
    ".hidden bivisor_probe_start; .hidden bivisor_probe_end; .hidden bivisor_probe_fail; .hidden bivisor_probe_cas128_start; .hidden bivisor_probe_cas128_end",
    ".globl bivisor_probe_cas128_fail; .globl bivisor_probe_load8; .globl bivisor_probe_load16; .globl bivisor_probe_load32; .globl bivisor_probe_load64",
    ".hidden bivisor_probe_cas128_fail; .hidden bivisor_probe_load8; .hidden bivisor_probe_load16; .hidden bivisor_probe_load32; .hidden bivisor_probe_load64",
    ".globl bivisor_probe_store8; .globl bivisor_probe_store16; .globl bivisor_probe_store32; .globl bivisor_probe_store64; .globl bivisor_probe_cas8",
    ".hidden bivisor_probe_store8; .hidden bivisor_probe_store16; .hidden bivisor_probe_store32; .hidden bivisor_probe_store64; .hidden bivisor_probe_cas8",
    ".globl bivisor_probe_cas16; .globl bivisor_probe_cas32; .globl bivisor_probe_cas64; .globl bivisor_probe_copy; .globl bivisor_probe_cas128",
    ".hidden bivisor_probe_cas16; .hidden bivisor_probe_cas32; .hidden bivisor_probe_cas64; .hidden bivisor_probe_copy; .hidden bivisor_probe_cas128",
    ".p2align 4",
    "bivisor_probe_start:",
    "bivisor_probe_load8: movzx eax, byte ptr [rdi]; xor edx, edx; ret",
    "bivisor_probe_load16: movzx eax, word ptr [rdi]; xor edx, edx; ret",
    "bivisor_probe_load32: mov eax, dword ptr [rdi]; xor edx, edx; ret",
    "bivisor_probe_load64: mov rax, qword ptr [rdi]; xor edx, edx; ret",
    "bivisor_probe_store8: mov byte ptr [rdi], sil; xor edx, edx; ret",
    "bivisor_probe_store16: mov word ptr [rdi], si; xor edx, edx; ret",
    "bivisor_probe_store32: mov dword ptr [rdi], esi; xor edx, edx; ret",
    "bivisor_probe_store64: mov qword ptr [rdi], rsi; xor edx, edx; ret",
    "bivisor_probe_cas8: mov rax, rsi; lock cmpxchg byte ptr [rdi], dl; mov edx, 0; ret",
    "bivisor_probe_cas16: mov rax, rsi; lock cmpxchg word ptr [rdi], dx; mov edx, 0; ret",
    "bivisor_probe_cas32: mov rax, rsi; lock cmpxchg dword ptr [rdi], edx; mov edx, 0; ret",
    "bivisor_probe_cas64: mov rax, rsi; lock cmpxchg qword ptr [rdi], rdx; mov edx, 0; ret",
    // rdi = to, rsi = from, rdx = length; returns how many bytes were not copied.
    "bivisor_probe_copy: mov rcx, rdx; rep movsb; xor eax, eax; xor edx, edx; ret",
    "bivisor_probe_end:",
    "bivisor_probe_fail: mov rax, rcx; mov edx, 1; ret",
    // rdi = address, rsi = &mut [old; 2] (replaced by what was found), rdx = &[new; 2]; rbx is saved in r8.
    "bivisor_probe_cas128_start:",
    "bivisor_probe_cas128:",
    "mov r8, rbx; mov r9, rsi; mov rbx, [rdx]; mov rcx, [rdx + 8]; mov rax, [r9]; mov rdx, [r9 + 8]",
    "lock cmpxchg16b [rdi]",
    "mov [r9], rax; mov [r9 + 8], rdx; mov rbx, r8; sete al; movzx eax, al; xor edx, edx; ret",
    "bivisor_probe_cas128_end:",
    "bivisor_probe_cas128_fail: mov rbx, r8; mov edx, 1; ret",
);

unsafe extern "sysv64" {
    safe static bivisor_probe_start: u8;
    safe static bivisor_probe_end: u8;
    safe static bivisor_probe_fail: u8;
    safe static bivisor_probe_cas128_start: u8;
    safe static bivisor_probe_cas128_end: u8;
    safe static bivisor_probe_cas128_fail: u8;
    // SAFETY (all): any address may be given; a fault is caught by the fixup. Stores and exchanges are the caller's responsibility.
    safe fn bivisor_probe_load8(addr: u64) -> Probed;
    safe fn bivisor_probe_load16(addr: u64) -> Probed;
    safe fn bivisor_probe_load32(addr: u64) -> Probed;
    safe fn bivisor_probe_load64(addr: u64) -> Probed;
    fn bivisor_probe_store8(addr: u64, v: u64) -> Probed;
    fn bivisor_probe_store16(addr: u64, v: u64) -> Probed;
    fn bivisor_probe_store32(addr: u64, v: u64) -> Probed;
    fn bivisor_probe_store64(addr: u64, v: u64) -> Probed;
    fn bivisor_probe_cas8(addr: u64, old: u64, new: u64) -> Probed;
    fn bivisor_probe_cas16(addr: u64, old: u64, new: u64) -> Probed;
    fn bivisor_probe_cas32(addr: u64, old: u64, new: u64) -> Probed;
    fn bivisor_probe_cas64(addr: u64, old: u64, new: u64) -> Probed;
    fn bivisor_probe_copy(to: u64, from: u64, len: u64) -> Probed;
    fn bivisor_probe_cas128(addr: u64, old: *mut [u64; 2], new: *const [u64; 2]) -> Probed;
}

/// Where a thread that faulted at host address `pc` goes on, if `pc` is in one of the routines here.
pub fn fixup(pc: u64) -> Option<u64> {
    let at = |s: &u8| std::ptr::from_ref(s) as u64;
    if (at(&bivisor_probe_start)..at(&bivisor_probe_end)).contains(&pc) {
        Some(at(&bivisor_probe_fail))
    } else if (at(&bivisor_probe_cas128_start)..at(&bivisor_probe_cas128_end)).contains(&pc) {
        Some(at(&bivisor_probe_cas128_fail))
    } else {
        None
    }
}

fn found(p: Probed) -> Option<u64> {
    (p.failed == 0).then_some(p.value)
}

/// Loads from `addr`, zero-extended.
#[inline]
pub fn load(addr: u64, width: Width) -> Option<u64> {
    found(match width {
        Width::B => bivisor_probe_load8(addr),
        Width::W => bivisor_probe_load16(addr),
        Width::D => bivisor_probe_load32(addr),
        Width::Q => bivisor_probe_load64(addr),
    })
}

/// Stores the low bits of `v` to `addr`.
///
/// # Safety
/// `addr` must be the guest's to write: not memory that Rust code owns.
#[inline]
pub unsafe fn store(addr: u64, width: Width, v: u64) -> Option<()> {
    // SAFETY: the caller's promise; a fault is caught.
    let p = unsafe {
        match width {
            Width::B => bivisor_probe_store8(addr, v),
            Width::W => bivisor_probe_store16(addr, v),
            Width::D => bivisor_probe_store32(addr, v),
            Width::Q => bivisor_probe_store64(addr, v),
        }
    };
    (p.failed == 0).then_some(())
}

/// Atomic compare-and-exchange; gives what was found there (equal to `old`: exchanged).
///
/// # Safety
/// As for [`store`].
#[inline]
pub unsafe fn compare_exchange(addr: u64, width: Width, old: u64, new: u64) -> Option<u64> {
    // SAFETY: the caller's promise; a fault is caught.
    let p = unsafe {
        match width {
            Width::B => bivisor_probe_cas8(addr, old, new),
            Width::W => bivisor_probe_cas16(addr, old, new),
            Width::D => bivisor_probe_cas32(addr, old, new),
            Width::Q => bivisor_probe_cas64(addr, old, new),
        }
    };
    found(p).map(|v| width.cut(v))
}

/// Atomic 16-byte compare-and-exchange at a 16-byte aligned address: `Ok` if exchanged, else what was found.
///
/// # Safety
/// As for [`store`].
pub unsafe fn compare_exchange_16(addr: u64, mut old: [u64; 2], new: [u64; 2]) -> Option<Result<(), [u64; 2]>> {
    // SAFETY: `old` and `new` are live; the rest is the caller's promise; a fault is caught.
    let p = unsafe { bivisor_probe_cas128(addr, &mut old, &new) };
    found(p).map(|done| if done != 0 { Ok(()) } else { Err(old) })
}

/// Copies from a host address that may fault. On failure gives how many bytes were copied.
///
/// # Errors
/// The count of bytes copied before the fault.
pub fn read(addr: u64, to: &mut [u8]) -> Result<(), usize> {
    // SAFETY: `to` is ours to write for its length; a fault on `addr` is caught.
    let p = unsafe { bivisor_probe_copy(to.as_mut_ptr() as u64, addr, to.len() as u64) };
    if p.failed == 0 { Ok(()) } else { Err(to.len() - p.value as usize) }
}

/// Copies to a host address that may fault.
///
/// # Errors
/// The count of bytes copied before the fault.
///
/// # Safety
/// As for [`store`].
pub unsafe fn write(addr: u64, from: &[u8]) -> Result<(), usize> {
    // SAFETY: `from` is readable; the rest is the caller's promise; a fault is caught.
    let p = unsafe { bivisor_probe_copy(addr, from.as_ptr() as u64, from.len() as u64) };
    if p.failed == 0 { Ok(()) } else { Err(from.len() - p.value as usize) }
}
