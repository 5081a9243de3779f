//! The block that every thread which runs guest code has at its GS base: what a signal handler needs before it can trust anything.
//!
//! Translated code runs with the guest's FS base and the guest's RSP, so a signal handler may find neither Rust's thread-local
//! storage nor a Rust stack. It finds this block through GS, restores the host's FS base from it and runs on the alternate stack.
#![allow(unsafe_code)]

use crate::host::reserved::Reserved;
use std::cell::{Cell, OnceCell};
use std::ffi::c_void;
use std::io::{Error, Result};
use std::sync::OnceLock;

/// Called by the signal handler before anything else is done about a signal. Gives true if the signal is dealt with: the handler then
/// returns to the (possibly changed) context.
pub type SignalHook = unsafe fn(&ThreadBlock, i32, *mut libc::siginfo_t, *mut libc::ucontext_t) -> bool;

/// Per-thread block; `#[repr(C)]`, its offsets are used by assembly and generated code.
#[repr(C, align(64))]
pub struct ThreadBlock {
    /// Address of this block (`gs:[0]`).
    pub this: *const ThreadBlock,
    /// The host's FS base of this thread (`gs:[8]`).
    pub host_fs: u64,
    /// The engine's hook: faults in translated code, and making native guest code return after an asynchronous signal.
    pub engine_hook: Cell<Option<SignalHook>>,
    /// For the engine's hook.
    pub engine_data: Cell<*mut c_void>,
    /// The process personality's hook: queues asynchronous signals.
    pub process_hook: Cell<Option<SignalHook>>,
    /// For the personality's hook.
    pub process_data: Cell<*mut c_void>,
    /// Code of thunks that may fault: first address and length, or zeros.
    pub thunks: [Cell<u64>; 2],
    /// For generated code (`gs:[64 + 8 * i]`).
    pub scratch: [Cell<u64>; 64],
    /// The thread's id; another while a vfork child runs on the thread's block (see [`crate::host::fork::vfork`]), stale after fork.
    pub tid: Cell<i32>,
}

/// Offset of [`ThreadBlock::scratch`].
pub const SCRATCH_OFFSET: i32 = 64;

thread_local! {
    static BLOCK: OnceCell<Attached> = const { OnceCell::new() };
}

/// Distance from a block to the address range after it that an engine may map per thread (`gs:[ENGINE_AREA_OFFSET + i]`).
pub const ENGINE_AREA_OFFSET: usize = 4096;

/// Bytes of that range.
pub const ENGINE_AREA_SIZE: usize = 8 << 20;

/// Bytes behind that range which nothing is ever mapped at, where the host has that much address space for every thread: all offsets of
/// 36 bits, from the start of the range, fault or are the engine's.
pub const GUARD_SIZE: usize = 128 << 30;

/// Is there a guard? Decided at the first thread; another that cannot have one then has no block at all.
static GUARDED: OnceLock<bool> = OnceLock::new();

/// Is there a limit on address space? What it leaves is for the guest.
fn is_limited() -> bool {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes one structure.
    unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) };
    limit.rlim_cur != libc::RLIM_INFINITY
}

/// Takes what little is free above the first guard, between what this program was loaded with. A guest's library that came to lie there,
/// by the chance of where the kernel puts things, would be too far from its translated code.
fn fill_gaps_above(guard: usize) {
    const MOST_OF_A_SIZE: usize = 4;
    for size in (14..=21).rev().map(|bits| 1 << bits) {
        for _ in 0..MOST_OF_A_SIZE {
            match Reserved::anywhere(size, 4096) {
                Ok(r) if r.start() > guard => _ = r.keep(),
                _ => break,
            }
        }
    }
}

struct Attached {
    size: usize,
    block: *mut ThreadBlock,
    stack: *mut c_void,
}

const STACK_SIZE: usize = 128 << 10;
/// Bytes after it, in which an engine may make pages readable.
pub const ENGINE_CHECKS_SIZE: usize = 2 << 20;
const BLOCK_SIZE: usize = ENGINE_AREA_OFFSET + ENGINE_AREA_SIZE + ENGINE_CHECKS_SIZE;
const _: () = assert!(size_of::<ThreadBlock>() <= ENGINE_AREA_OFFSET);

impl Attached {
    fn new() -> Result<Attached> {
        let host_fs = arch_prctl_get(ARCH_GET_FS);
        let mut reserved = None;
        let guarded = *GUARDED.get_or_init(|| {
            reserved =
                if is_limited() { None } else { Reserved::anywhere(BLOCK_SIZE + GUARD_SIZE, ENGINE_AREA_OFFSET).ok() };
            reserved.as_ref().inspect(|r| fill_gaps_above(r.start())).is_some()
        });
        let size = BLOCK_SIZE + if guarded { GUARD_SIZE } else { 0 };
        let block: *mut ThreadBlock = match reserved {
            Some(r) => r,
            None => Reserved::anywhere(size, ENGINE_AREA_OFFSET)?,
        }
        .keep()
        .cast();
        // SAFETY: a fresh mapping; its first page is the block's, the rest stays out of reach until an engine maps it.
        if unsafe { libc::mprotect(block.cast(), ENGINE_AREA_OFFSET, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
            let failed = Error::last_os_error();
            // SAFETY: nobody knows of it.
            unsafe { libc::munmap(block.cast(), size) };
            return Err(failed);
        }
        let first = ThreadBlock {
            this: block,
            host_fs,
            engine_hook: Cell::new(None),
            engine_data: Cell::new(std::ptr::null_mut()),
            process_hook: Cell::new(None),
            process_data: Cell::new(std::ptr::null_mut()),
            thunks: [Cell::new(0), Cell::new(0)],
            scratch: std::array::from_fn(|_| Cell::new(0)),
            tid: Cell::new(0),
        };
        let mut attached = Attached { size, block, stack: std::ptr::null_mut() };
        // SAFETY: fresh anonymous mappings; sigaltstack gets exactly the second.
        unsafe {
            block.write(first);
            let stack = libc::mmap(
                std::ptr::null_mut(),
                STACK_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if stack == libc::MAP_FAILED {
                return Err(Error::last_os_error());
            }
            attached.stack = stack;
            let ss = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: STACK_SIZE };
            libc::sigaltstack(&ss, std::ptr::null_mut());
            // SAFETY: nothing in this program or in libc uses GS on x86-64 Linux; the block lives as long as the thread.
            libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, block);
        }
        Ok(attached)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: the thread is ending and runs on its own stack; GS is cleared before the block goes.
        unsafe {
            libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, 0u64);
            let ss = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
            libc::sigaltstack(&ss, std::ptr::null_mut());
            if !self.stack.is_null() {
                libc::munmap(self.stack, STACK_SIZE);
            }
            libc::munmap(self.block.cast(), self.size);
        }
    }
}

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_GET_FS: u64 = 0x1003;

fn arch_prctl_get(code: u64) -> u64 {
    let mut v = 0u64;
    // SAFETY: writes one u64.
    unsafe { libc::syscall(libc::SYS_arch_prctl, code, &raw mut v) };
    v
}

impl ThreadBlock {
    /// Asks the kernel for the thread's id and keeps it in [`ThreadBlock::tid`].
    pub fn note_tid(&self) {
        // SAFETY: no arguments, cannot fail.
        self.tid.set(unsafe { libc::syscall(libc::SYS_gettid) } as i32);
    }

    /// The calling thread's block; made, with its alternate signal stack, at the first call.
    ///
    /// # Panics
    /// If there is no memory or no address space for it: see [`ThreadBlock::make`].
    pub fn current() -> &'static ThreadBlock {
        ThreadBlock::make().expect("memory for the thread's block")
    }

    /// As [`ThreadBlock::current`].
    ///
    /// # Errors
    /// The host's, if there is no memory or no address space for it.
    pub fn make() -> Result<&'static ThreadBlock> {
        BLOCK.with(|cell| {
            if cell.get().is_none() {
                // It is this thread's own: nobody else has set it meanwhile.
                let _ = cell.set(Attached::new()?);
            }
            let block = cell.get().expect("it was set").block;
            // SAFETY: the block does not move and lives until the thread ends; the reference is used on this thread only (Cell: !Sync).
            Ok(unsafe { &*block })
        })
    }

    /// Does a guard lie behind the engine's range of every thread ([`GUARD_SIZE`])? Known once there is a block.
    pub fn is_guarded() -> bool {
        GUARDED.get().copied().unwrap_or(false)
    }
}
