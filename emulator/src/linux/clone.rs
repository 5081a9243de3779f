//! clone(2), clone3(2), fork(2), vfork(2): what is asked for, and which way it goes.

use crate::isa::{Gpr, Seg};
use crate::linux::host::err;
use crate::linux::syscall::{Args, Outcome};
use crate::linux::{Task, process_control, thread};
use crate::mem::GuestMemory;

/// What a new task shall be like: `struct clone_args` of clone3(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// CLONE_ flags, without the exit signal.
    pub flags: u64,
    /// Where CLONE_PIDFD puts the descriptor.
    pub pidfd: u64,
    /// For CLONE_CHILD_SETTID and CLONE_CHILD_CLEARTID.
    pub child_tid: u64,
    /// For CLONE_PARENT_SETTID.
    pub parent_tid: u64,
    /// Sent to the parent when the child ends; 0: nothing.
    pub exit_signal: u64,
    /// The new stack pointer; 0: the parent's.
    pub stack: u64,
    /// For CLONE_SETTLS: the base of FS.
    pub tls: u64,
}

const CLONE_VM: u64 = libc::CLONE_VM as u64;
const CLONE_VFORK: u64 = libc::CLONE_VFORK as u64;
const CLONE_THREAD: u64 = libc::CLONE_THREAD as u64;
const CLONE_SIGHAND: u64 = libc::CLONE_SIGHAND as u64;
const CLONE_FS: u64 = libc::CLONE_FS as u64;
const CLONE_NEWNS: u64 = libc::CLONE_NEWNS as u64;
const CLONE_NEWUSER: u64 = libc::CLONE_NEWUSER as u64;
const CLONE_NEWPID: u64 = libc::CLONE_NEWPID as u64;
const CLONE_PIDFD: u64 = libc::CLONE_PIDFD as u64;
const CLONE_DETACHED: u64 = 0x0040_0000;
/// A flag of clone3 alone: what is handled is default in the child.
pub const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
const CSIGNAL: u64 = 0xff;

impl Request {
    /// Has it this flag (a constant of libc)?
    pub fn has(&self, flag: i32) -> bool {
        self.flags & flag as u32 as u64 != 0
    }

    /// What the kernel refuses at once (copy_process).
    fn valid(&self) -> bool {
        let f = self.flags;
        let has = |x: u64| f & x == x;
        !(has(CLONE_NEWNS | CLONE_FS)
            || has(CLONE_NEWUSER | CLONE_FS)
            || has(CLONE_THREAD) && !has(CLONE_SIGHAND)
            || has(CLONE_SIGHAND) && !has(CLONE_VM)
            || has(CLONE_THREAD) && f & (CLONE_NEWUSER | CLONE_NEWPID) != 0
            || has(CLONE_PIDFD) && f & (CLONE_DETACHED | CLONE_THREAD) != 0
            || has(CLONE_SIGHAND) && has(CLONE_CLEAR_SIGHAND)
            || self.exit_signal > 64)
    }

    /// The registers of the new task: RAX 0, stack and FS base as asked for.
    pub fn apply(&self, task: &mut Task) {
        let state = task.vcpu.state();
        state.gpr[Gpr::Rax as usize] = 0;
        if self.stack != 0 {
            state.gpr[Gpr::Rsp as usize] = self.stack;
        }
        if self.has(libc::CLONE_SETTLS) {
            state.seg[Seg::Fs as usize].base = self.tls;
            state.seg[Seg::Fs as usize].selector = 0;
        }
    }
}

/// clone(2).
pub fn clone(task: &mut Task, [flags, stack, parent_tid, child_tid, tls, _]: Args) -> Outcome {
    // The upper half does not count (lower_32_bits).
    let flags = flags & 0xffff_ffff;
    let request = Request {
        flags: flags & !CSIGNAL,
        pidfd: parent_tid,
        child_tid,
        parent_tid,
        exit_signal: flags & CSIGNAL,
        stack,
        tls,
    };
    if request.has(libc::CLONE_PIDFD) && request.has(libc::CLONE_PARENT_SETTID) {
        return err(libc::EINVAL).into();
    }
    start(task, request)
}

/// fork(2).
pub fn fork(task: &mut Task, _: Args) -> Outcome {
    start(task, Request { exit_signal: libc::SIGCHLD as u64, ..Request::default() })
}

/// vfork(2).
pub fn vfork(task: &mut Task, _: Args) -> Outcome {
    let flags = CLONE_VM | CLONE_VFORK;
    start(task, Request { flags, exit_signal: libc::SIGCHLD as u64, ..Request::default() })
}

/// The first version of `struct clone_args`.
const ARGS_SIZE: u64 = 64;
/// All that is known here: set_tid, set_tid_size, cgroup are the last three.
const ARGS_KNOWN: usize = 88;

/// clone3(2).
pub fn clone3(task: &mut Task, [at, size, ..]: Args) -> Outcome {
    match read_args(task.process.mem(), at, size) {
        Ok(request) => start(task, request),
        Err(e) => e.into(),
    }
}

fn read_args(mem: &GuestMemory, at: u64, size: u64) -> Result<Request, i64> {
    if size > 4096 {
        return Err(err(libc::E2BIG));
    }
    if size < ARGS_SIZE {
        return Err(err(libc::EINVAL));
    }
    let mut bytes = vec![0u8; (size as usize).max(ARGS_KNOWN)];
    mem.read(at, &mut bytes[..size as usize]).ok_or(err(libc::EFAULT))?;
    if bytes[ARGS_KNOWN..].iter().any(|b| *b != 0) {
        return Err(err(libc::E2BIG));
    }
    let word = |i: usize| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().expect("8 bytes"));
    let (stack, stack_size) = (word(5), word(6));
    let wrong = word(0) & (CSIGNAL | CLONE_DETACHED) != 0
        || word(0) >> 34 != 0
        || word(4) & !CSIGNAL != 0
        || (stack == 0) != (stack_size == 0)
        // A thread or a sibling has no exit signal of its own.
        || word(0) & (CLONE_THREAD | libc::CLONE_PARENT as u64) != 0 && word(4) != 0
        // set_tid and cgroups are not offered.
        || word(8) != 0
        || word(9) != 0
        || word(0) >> 33 != 0;
    if wrong {
        return Err(err(libc::EINVAL));
    }
    Ok(Request {
        flags: word(0),
        pidfd: word(1),
        child_tid: word(2),
        parent_tid: word(3),
        exit_signal: word(4),
        stack: stack.wrapping_add(stack_size),
        tls: word(7),
    })
}

fn start(task: &mut Task, request: Request) -> Outcome {
    if !request.valid() {
        return err(libc::EINVAL).into();
    }
    if request.has(libc::CLONE_THREAD) {
        thread::spawn(task, request)
    } else if request.has(libc::CLONE_VM) && request.has(libc::CLONE_VFORK) {
        process_control::vfork(task, request)
    } else if request.has(libc::CLONE_VM) {
        // Two processes at work in one memory: the host's C library in it serves one only.
        err(libc::EINVAL)
    } else {
        process_control::fork(task, request)
    }
    .into()
}

/// Stores a thread or process id where the guest wants it; a bad address is ignored, as by the kernel.
pub fn store_tid(mem: &GuestMemory, addr: u64, tid: i32) {
    let _ = mem.write(addr, &tid.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_that_do_not_go_together() {
        let ok = |flags: u64| Request { flags, ..Request::default() }.valid();
        assert!(ok(0) && ok(CLONE_VM) && ok(CLONE_VM | CLONE_SIGHAND) && ok(CLONE_VM | CLONE_SIGHAND | CLONE_THREAD));
        assert!(!ok(CLONE_THREAD) && !ok(CLONE_SIGHAND) && !ok(CLONE_THREAD | CLONE_SIGHAND));
        assert!(!ok(CLONE_NEWNS | CLONE_FS));
    }
}
