//! Executable memory for thunks, and the call into it.
//!
//! The memory is private and never writable and executable at once: new code is written in a short window in which the pages are not
//! executable. After a fork the child has its own copy of it. Only the thread that owns the buffer runs its code.
#![allow(unsafe_code)]

use crate::cpu::CpuState;
use crate::host::code_space::{self, Claim};
use crate::host::{probe::Reach, signal};
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
    _place: Claim,
}

// SAFETY: the mapping belongs to the buffer alone and is not tied to a thread.
unsafe impl Send for CodeBuffer {}

/// At the start of every buffer: where a thread goes on that had a fault inside a thunk, at offset 0 after SIGFPE and at
/// [`signal::THUNK_FAULT`] after SIGSEGV. Thunks keep RSI and RSP, so this is `stmxcsr [rsi + data]` (the flags as the processor left
/// them), `ldmxcsr [rsi + host_mxcsr]`, `vzeroupper`, `mov eax, 1 or 2`, `ret`.
fn recover() -> Vec<u8> {
    let mut all = Vec::new();
    for ran in [Ran::Exception, Ran::Fault] {
        let mut code = vec![0x0f, 0xae, 0x1e];
        code.extend([0x0f, 0xae, 0x96]);
        code.extend((std::mem::offset_of!(Bounce, host_mxcsr) as u32).to_le_bytes());
        if std::is_x86_feature_detected!("avx") {
            code.extend([0xc5, 0xf8, 0x77]);
        }
        code.extend([0xb8, ran as u8, 0, 0, 0, 0xc3]);
        code.resize(signal::THUNK_FAULT as usize, 0xcc);
        all.extend(code);
    }
    all
}

/// How a thunk ended; the values are what it returns in EAX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ran {
    /// By itself.
    Done = 0,
    /// An unmasked SIMD exception: MXCSR as the processor left it is in [`Bounce::data`], the registers are as before.
    Exception = 1,
    /// The memory operand faulted: the registers are as before.
    Fault = 2,
}

impl CodeBuffer {
    /// An empty buffer; `None` if the host gives no memory for it.
    pub fn new() -> Option<CodeBuffer> {
        let (base, place) = code_space::reserve(SIZE, PAGE).ok()?;
        let mut buffer = CodeBuffer { base: NonNull::new(base)?, used: 0, _place: place };
        // SAFETY: the range just reserved.
        if unsafe { libc::mprotect(base.cast(), SIZE, libc::PROT_READ | libc::PROT_EXEC) } != 0 {
            return None;
        }
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

    /// Calls a thunk, its memory operand in the bounce buffer or at `operand`, which must reach as many bytes as it has. Where
    /// anything may fault, the calling thread must have announced [`CodeBuffer::range`] by [`signal::expect_faults`].
    #[inline(always)]
    pub fn call(&self, entry: Entry, cpu: &mut CpuState, bounce: &mut Bounce, operand: Option<Reach>) -> Ran {
        let operand = operand.map_or(bounce.data.as_mut_ptr() as u64, Reach::address);
        // SAFETY: thunks are System V functions that the builder made: they access the state in RDI, the bounce buffer in RSI and the
        // operand in RDX, change no callee-saved register, and leave MXCSR, the direction flag and the upper halves of YMM as they
        // must be.
        let ran = unsafe {
            let f: extern "sysv64" fn(*mut CpuState, *mut Bounce, u64) -> u32 =
                std::mem::transmute(self.base.as_ptr().add(entry.0 as usize));
            f(cpu, bounce, operand)
        };
        match ran {
            0 => Ran::Done,
            1 => Ran::Exception,
            _ => Ran::Fault,
        }
    }

    /// The host addresses of all code.
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
