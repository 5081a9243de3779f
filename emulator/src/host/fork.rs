//! New host processes and what ends them: fork(2), a child that shares memory on a stack of its own (vfork(2)), execveat(2), exit(2).
#![allow(unsafe_code)]

use crate::host::syscall::raw;
use crate::host::thread::ThreadBlock;
use std::arch::naked_asm;
use std::ffi::c_void;

/// fork(2) by the C library, which brings its own locks through. 0 in the child; `-errno` on failure.
///
/// Locks of Rust code that other threads may hold are the caller's business: it holds them itself meanwhile.
pub fn fork() -> i64 {
    // SAFETY: the child has this thread alone; the caller holds every lock that the child will want.
    match unsafe { libc::fork() } {
        -1 => -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EAGAIN)),
        pid => i64::from(pid),
    }
}

/// clone(2) without CLONE_VM and without the C library's knowledge, for flags that fork(2) does not have. 0 in the child.
pub fn clone_process(flags: u64, parent_tid: u64, child_tid: u64) -> i64 {
    let flags = flags & !(libc::CLONE_VM | libc::CLONE_SETTLS | libc::CLONE_THREAD | libc::CLONE_SIGHAND) as u64;
    // SAFETY: the child gets a copy of the memory and goes on on this stack; as for `fork`.
    unsafe { raw(libc::SYS_clone as u64, [flags, 0, parent_tid, child_tid, 0, 0]) }
}

/// rdi = flags, rsi = top of the child's stack, rdx = parent's tid, rcx = child's tid, r8 = function, r9 = its argument.
#[unsafe(naked)]
unsafe extern "sysv64" fn clone_on_stack(
    flags: u64,
    stack: u64,
    parent_tid: u64,
    child_tid: u64,
    f: unsafe extern "sysv64" fn(*mut c_void) -> !,
    arg: *mut c_void,
) -> i64 {
    naked_asm!(
        "mov [rsi - 8], r9",
        "mov [rsi - 16], r8",
        "sub rsi, 16",
        "mov r10, rcx",
        "xor r8d, r8d",
        "mov eax, {clone}",
        "syscall",
        "test rax, rax",
        "jz 2f",
        "ret",
        "2:",
        "xor ebp, ebp",
        "pop rax",
        "pop rdi",
        // The stack is aligned as for a call.
        "call rax",
        "ud2",
        clone = const libc::SYS_clone,
    )
}

/// Size of the child's stack.
const STACK_SIZE: usize = 1 << 20;

/// clone(2) with CLONE_VM and CLONE_VFORK: `child` runs in a new process that shares all memory, on a stack made for it; the calling
/// thread sleeps until that process executes a program or ends. Gives the child's id or `-errno`.
///
/// The child runs with the caller's thread-local storage, thread block and alternate stack: nobody else uses them meanwhile. `child`
/// must not return and must not unwind; what it changes in memory stays changed.
///
/// The two addresses are the guest's, for the flags that want them; CLONE_SETTLS and CLONE_THREAD are not the host's business here.
pub fn vfork(flags: u64, parent_tid: u64, child_tid: u64, child: &mut dyn FnMut()) -> i64 {
    unsafe extern "sysv64" fn start(arg: *mut c_void) -> ! {
        // SAFETY: `arg` is the fat reference below, alive because its owner sleeps.
        let child = unsafe { &mut *arg.cast::<&mut dyn FnMut()>() };
        ThreadBlock::current().note_tid();
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
        exit_group(127)
    }
    let mut child = child;
    // SAFETY: a fresh mapping as stack, unmapped only after the child no longer uses it (CLONE_VFORK); what the kernel stores at the two
    // addresses it stores in the guest's memory, as for every other call.
    unsafe {
        let map = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK;
        let stack = libc::mmap(std::ptr::null_mut(), STACK_SIZE, libc::PROT_READ | libc::PROT_WRITE, map, -1, 0);
        if stack == libc::MAP_FAILED {
            return -i64::from(libc::ENOMEM);
        }
        let flags =
            flags & !(libc::CLONE_SETTLS | libc::CLONE_THREAD) as u64 | (libc::CLONE_VM | libc::CLONE_VFORK) as u64;
        let top = stack as u64 + STACK_SIZE as u64;
        let pid = clone_on_stack(flags, top, parent_tid, child_tid, start, (&raw mut child).cast());
        ThreadBlock::current().note_tid();
        libc::munmap(stack, STACK_SIZE);
        pid
    }
}

/// Leaves the calling thread's table of descriptors or its directories to itself (unshare(2)); 0 or `-errno`.
pub fn unshare(flags: u64) -> i64 {
    // SAFETY: plain system call.
    unsafe { raw(libc::SYS_unshare as u64, [flags, 0, 0, 0, 0, 0]) }
}

/// Ends the calling thread alone, without return: for the first thread of a process, whose stack is nobody's.
pub fn exit_thread(code: i32) -> ! {
    // SAFETY: does not return; what the frames above own stays allocated, as other threads may use it.
    unsafe { raw(libc::SYS_exit as u64, [code as u64, 0, 0, 0, 0, 0]) };
    exit_group(code)
}

/// Ends the process.
pub fn exit_group(code: i32) -> ! {
    loop {
        // SAFETY: does not return.
        unsafe { raw(libc::SYS_exit_group as u64, [code as u64, 0, 0, 0, 0, 0]) };
    }
}

/// Is the calling thread the first of its process?
pub fn is_leader() -> bool {
    // SAFETY: plain system calls; not the C library's, which may remember another process's.
    unsafe { raw(libc::SYS_getpid as u64, [0; 6]) == raw(libc::SYS_gettid as u64, [0; 6]) }
}

/// clear_child_tid of the kernel: stores 0 and wakes one waiter (set_tid_address(2)).
pub fn clear_tid(addr: u64) {
    let word = addr as *const u32;
    // SAFETY: the guest gave the address of a word of its own; a bad one faults in the probe, and FUTEX_WAKE only names it.
    unsafe {
        if crate::host::probe::store(addr, crate::isa::Width::D, 0).is_some() {
            raw(libc::SYS_futex as u64, [word as u64, libc::FUTEX_WAKE as u64, 1, 0, 0, 0]);
        }
    }
}
