//! Executable memory for thunks, and the call into it.
//!
//! The memory is private and never writable and executable at once: new code is written in a short window in which the pages are not
//! executable. After a fork the child has its own copy of it. Only the thread that owns the buffer runs its code.
#![allow(unsafe_code)]

use crate::cpu::CpuState;
use std::ffi::c_void;
use std::ptr::NonNull;

/// Bytes of one buffer.
const SIZE: usize = 1 << 20;
const PAGE: usize = 4096;

/// What a thunk works on besides the registers; its address is in RSI, and its first bytes stand for the memory operand.
#[repr(C, align(64))]
pub struct Bounce {
    /// The memory operand.
    pub data: [u8; 128],
    /// MXCSR of the host, to go back to.
    pub host_mxcsr: u32,
    /// FCW after an instruction that may change it.
    pub fcw: u16,
}

impl Default for Bounce {
    fn default() -> Bounce {
        Bounce { data: [0; 128], host_mxcsr: 0x1f80, fcw: 0x37f }
    }
}

/// Where a thunk begins, as an offset in its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u32);

/// The buffer.
pub struct CodeBuffer {
    base: NonNull<u8>,
    used: usize,
}

// SAFETY: the mapping belongs to the buffer alone and is not tied to a thread.
unsafe impl Send for CodeBuffer {}

/// At offset 0 of every buffer: where a thread goes on that had a SIGFPE inside a thunk. Thunks keep RSI and RSP, so this is
/// `stmxcsr [rsi + data]` (the flags as the processor left them), `ldmxcsr [rsi + host_mxcsr]`, `mov eax, 1`, `ret`.
fn recover() -> Vec<u8> {
    let mut code = vec![0x0f, 0xae, 0x1e];
    code.extend([0x0f, 0xae, 0x96]);
    code.extend((std::mem::offset_of!(Bounce, host_mxcsr) as u32).to_le_bytes());
    if std::is_x86_feature_detected!("avx") {
        code.extend([0xc5, 0xf8, 0x77]);
    }
    code.extend([0xb8, 1, 0, 0, 0, 0xc3]);
    code
}

impl CodeBuffer {
    /// An empty buffer; `None` if the host gives no memory for it.
    pub fn new() -> Option<CodeBuffer> {
        // SAFETY: a fresh anonymous mapping.
        let base = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(std::ptr::null_mut(), SIZE, libc::PROT_READ | libc::PROT_EXEC, flags, -1, 0)
        };
        if base == libc::MAP_FAILED {
            return None;
        }
        let mut buffer = CodeBuffer { base: NonNull::new(base.cast())?, used: 0 };
        buffer.add(&recover())?;
        Some(buffer)
    }

    /// Forgets all code; entries given before must not be called again.
    pub fn clear(&mut self) {
        self.used = recover().len().next_multiple_of(16);
    }

    /// Adds a thunk: code that obeys the convention of [`CodeBuffer::call`]. `None` if the buffer is full or the host refuses.
    pub fn add(&mut self, code: &[u8]) -> Option<Entry> {
        let start = self.used;
        if start + code.len() > SIZE {
            return None;
        }
        let first = start & !(PAGE - 1);
        let len = (start + code.len()).next_multiple_of(PAGE) - first;
        // SAFETY: inside the mapping; no thread executes it now, because `&mut self` and its owner's call exclude each other.
        unsafe {
            let page = self.base.as_ptr().add(first).cast::<c_void>();
            if libc::mprotect(page, len, libc::PROT_READ | libc::PROT_WRITE) != 0 {
                return None;
            }
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.base.as_ptr().add(start), code.len());
            if libc::mprotect(page, len, libc::PROT_READ | libc::PROT_EXEC) != 0 {
                return None;
            }
        }
        self.used = (start + code.len()).next_multiple_of(16);
        Some(Entry(start as u32))
    }

    /// Calls a thunk. False if it was left by a SIGFPE (then MXCSR as the processor left it is in `bounce.data`); nothing is
    /// written to `cpu` in that case.
    #[inline(always)]
    pub fn call(&self, entry: Entry, cpu: &mut CpuState, bounce: &mut Bounce) -> bool {
        // SAFETY: thunks are System V functions that the builder made: they access the state in RDI and the bounce buffer in RSI,
        // change no callee-saved register, and leave MXCSR, the direction flag and the upper halves of YMM as they must be.
        let failed = unsafe {
            let f: extern "sysv64" fn(*mut CpuState, *mut Bounce) -> u32 =
                std::mem::transmute(self.base.as_ptr().add(entry.0 as usize));
            f(cpu, bounce)
        };
        failed == 0
    }

    /// The host addresses of all code: a SIGFPE in there goes on at the start.
    pub fn range(&self) -> std::ops::Range<u64> {
        let base = self.base.as_ptr() as u64;
        base..base + SIZE as u64
    }
}

impl Drop for CodeBuffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing runs in it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), SIZE) };
    }
}
