//! Signals of the guest: dispositions, what is queued, faults.

use crate::cpu::Fault;
use crate::linux::{Flow, Task, host};

/// What the guest process does about each signal; shared by its threads.
#[derive(Debug, Default)]
pub struct Dispositions {}

/// A task's queued and blocked signals.
#[derive(Debug, Default)]
pub struct TaskSignals {}

/// The calling thread begins to run `task`: hooks are set.
pub fn enter(_task: &mut Task) {}

/// The calling thread no longer runs `task`.
pub fn leave(_task: &mut Task) {}

/// Before the guest runs on: starts the handlers of queued signals.
pub fn deliver_pending(_task: &mut Task) -> Flow {
    Flow::Continue
}

/// After a system call: RAX holds `result`; an EINTR may have to become a restart.
pub fn after_syscall(_task: &mut Task, _number: u64, _result: i64) -> Flow {
    Flow::Continue
}

/// An exception of the guest becomes a signal, as arch/x86/kernel/traps.c of Linux does it.
pub fn raise_fault(task: &mut Task, fault: Fault) -> Flow {
    let sig = match fault {
        Fault::De | Fault::Mf | Fault::Xm => libc::SIGFPE,
        Fault::Db(_) | Fault::Bp => libc::SIGTRAP,
        Fault::Ud => libc::SIGILL,
        Fault::Ac => libc::SIGBUS,
        _ => libc::SIGSEGV,
    };
    eprintln!("bivisor: guest: {fault:?} at rip {:#x}", task.vcpu.state().rip);
    host::die_of(sig)
}
