//! The block that every thread which runs guest code has at its GS base: what a signal handler needs before it can trust anything.
//!
//! Translated code runs with the guest's FS base and the guest's RSP, so a signal handler may find neither Rust's thread-local
//! storage nor a Rust stack. It finds this block through GS, restores the host's FS base from it and runs on the alternate stack.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::c_void;

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
    static BLOCK: Attached = Attached::new();
}

/// Distance from a block to the address range after it that an engine may map per thread (`gs:[ENGINE_AREA_OFFSET + i]`).
pub const ENGINE_AREA_OFFSET: usize = 4096;

/// Bytes of that range.
pub const ENGINE_AREA_SIZE: usize = 8 << 20;

struct Attached {
    block: *mut ThreadBlock,
    stack: *mut c_void,
}

const STACK_SIZE: usize = 128 << 10;
/// Bytes after it, in which an engine may make pages readable.
pub const ENGINE_CHECKS_SIZE: usize = 1 << 20;
const BLOCK_SIZE: usize = ENGINE_AREA_OFFSET + ENGINE_AREA_SIZE + ENGINE_CHECKS_SIZE;
const _: () = assert!(size_of::<ThreadBlock>() <= ENGINE_AREA_OFFSET);

impl Attached {
    fn new() -> Attached {
        let host_fs = arch_prctl_get(ARCH_GET_FS);
        // SAFETY: a fresh anonymous mapping; its first page is the block's, the rest stays out of reach until an engine maps it.
        let block: *mut ThreadBlock = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let p = libc::mmap(std::ptr::null_mut(), BLOCK_SIZE, libc::PROT_NONE, flags, -1, 0);
            assert!(p != libc::MAP_FAILED, "no address space for the thread block");
            let failed = libc::mprotect(p, ENGINE_AREA_OFFSET, libc::PROT_READ | libc::PROT_WRITE);
            assert!(failed == 0, "no memory for the thread block");
            p.cast()
        };
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
        // SAFETY: a fresh anonymous mapping; sigaltstack gets exactly it.
        let stack = unsafe {
            block.write(first);
            let stack = libc::mmap(
                std::ptr::null_mut(),
                STACK_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            assert!(stack != libc::MAP_FAILED, "no memory for the alternate signal stack");
            let ss = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: STACK_SIZE };
            libc::sigaltstack(&ss, std::ptr::null_mut());
            // SAFETY: nothing in this program or in libc uses GS on x86-64 Linux; the block lives as long as the thread.
            libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, block);
            stack
        };
        Attached { block, stack }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: the thread is ending and runs on its own stack; GS is cleared before the block goes.
        unsafe {
            libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, 0u64);
            let ss = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
            libc::sigaltstack(&ss, std::ptr::null_mut());
            libc::munmap(self.stack, STACK_SIZE);
            libc::munmap(self.block.cast(), BLOCK_SIZE);
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
    pub fn current() -> &'static ThreadBlock {
        // SAFETY: the block does not move and lives until the thread ends; the reference is used on this thread only (Cell: !Sync).
        BLOCK.with(|a| unsafe { &*a.block })
    }
}
