//! The way of a system call: registers to arguments, the table's row, the result register (System V ABI A.2.1).

use crate::isa::Gpr;
use crate::linux::table::{self, Status};
use crate::linux::{ExitStatus, Flow, Task, host, host::err, signal, strace};

/// The six arguments, RDI RSI RDX R10 R8 R9.
pub type Args = [u64; 6];

/// What a handler says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The result for RAX, `-errno` on failure.
    Done(i64),
    /// The registers are as they shall be (rt_sigreturn).
    Resume,
    /// The task ends.
    Exit(ExitStatus),
}

impl From<i64> for Outcome {
    fn from(v: i64) -> Outcome {
        Outcome::Done(v)
    }
}

/// A handled system call.
pub type Handler = fn(&mut Task, Args) -> Outcome;

/// Carries out the SYSCALL at which the engine stopped.
///
/// When the handler runs, RIP is past the instruction and RCX and R11 are as the kernel leaves them; RAX still holds the number.
pub fn dispatch(task: &mut Task, next_rip: u64) -> Flow {
    let state = task.vcpu.integer_state();
    let [rcx, r11] = [Gpr::Rcx, Gpr::R11].map(|r| state.gpr[r as usize]);
    // SYSCALL: RCX = RIP of the next instruction, R11 = RFLAGS (SDM 2B SYSCALL).
    state.rip = next_rip;
    state.gpr[Gpr::Rcx as usize] = next_rip;
    state.gpr[Gpr::R11 as usize] = state.rflags.bits();
    // The kernel looks at EAX only.
    let number = u64::from(state.gpr[Gpr::Rax as usize] as u32);
    let args = [Gpr::Rdi, Gpr::Rsi, Gpr::Rdx, Gpr::R10, Gpr::R8, Gpr::R9].map(|r| state.gpr[r as usize]);
    let traced = if task.process.options.strace { table::row(number as u32) } else { None };
    if let Some(row) = traced.filter(|r| r.name.starts_with("exit") || r.name.starts_with("exec")) {
        strace::ending(task, row, &args);
    }
    match call(task, number, args) {
        Outcome::Done(result) => {
            if let Some(row) = traced {
                strace::returned(task, row, &args, result);
            }
            let state = task.vcpu.integer_state();
            state.gpr[Gpr::Rax as usize] = result as u64;
            if result == signal::RESTART {
                // The handler comes before the instruction.
                (state.gpr[Gpr::Rcx as usize], state.gpr[Gpr::R11 as usize]) = (rcx, r11);
            }
            signal::after_syscall(task, number, result)
        }
        Outcome::Resume => Flow::Continue,
        Outcome::Exit(status) => Flow::Exit(status),
    }
}

/// What is to be said of a system call that the engine has made, see [`Exit::Made`](crate::vcpu::Exit::Made): as [`pass`] does.
pub fn made(task: &mut Task, number: u32) -> Flow {
    let state = task.vcpu.integer_state();
    let (result, next_rip) = (state.gpr[Gpr::Rax as usize] as i64, state.rip);
    let again = match result == err(libc::EFAULT) {
        true => task.process.mem().flat().is_some_and(|space| space.expect_write(0..u64::MAX)),
        false => !task.signals.inbox.any() && task.signals.inbox.take_disturbed(),
    };
    if !again {
        return signal::after_syscall(task, u64::from(number), result);
    }
    task.vcpu.integer_state().gpr[Gpr::Rax as usize] = u64::from(number);
    dispatch(task, next_rip)
}

fn call(task: &mut Task, number: u64, args: Args) -> Outcome {
    match table::row(number as u32).map(|r| r.status) {
        Some(Status::PassedThrough) => pass(task, number, args).into(),
        Some(Status::Handled(handler)) => handler(task, args),
        Some(Status::Refused(errno)) => err(errno).into(),
        None => err(libc::ENOSYS).into(),
    }
}

/// The number of the call being handled: RAX still holds it.
pub fn number(task: &mut Task) -> u64 {
    u64::from(task.vcpu.integer_state().gpr[Gpr::Rax as usize] as u32)
}

/// A call to the host with the guest's arguments; may be interrupted by a signal for the guest ([`signal::RESTART`]).
pub fn pass(task: &mut Task, number: u64, args: Args) -> i64 {
    let inbox = &task.signals.inbox;
    inbox.take_disturbed();
    loop {
        let Ok(result) = host::interruptible(inbox.flag(), number, args) else { return signal::RESTART };
        // The kernel met a page that is write-protected only because code was cached from it.
        let protected = result == err(libc::EFAULT)
            && task.process.mem().flat().is_some_and(|space| space.expect_write(0..u64::MAX));
        // The host's handler ran for a signal that the guest does not get.
        let for_us = result == err(libc::EINTR) && !inbox.any() && inbox.take_disturbed();
        if !protected && !for_us {
            return result;
        }
    }
}
