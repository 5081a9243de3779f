//! The loop of a task: run the engine, act on why it returned.

use crate::cpu::Fault;
use crate::host::signal::attach;
use crate::linux::{ExitStatus, Flow, Task, signal, syscall, vsyscall};
use crate::vcpu::{Exit, Intercepts};

/// Runs a task until it ends. The calling thread is its host thread.
///
/// `exit_group` and death by a signal do not come back here: they end the host process.
pub fn run_task(task: &mut Task) -> ExitStatus {
    attach();
    signal::enter(task);
    let status = loop {
        if let Flow::Exit(status) = signal::deliver_pending(task) {
            break status;
        }
        let exit = task.vcpu.run(task.process.board(), u64::MAX);
        if let Flow::Exit(status) = act(task, exit) {
            break status;
        }
    };
    signal::leave(task);
    status
}

fn act(task: &mut Task, exit: Exit) -> Flow {
    match exit {
        Exit::Intercept { what: Intercepts::SYSCALL, next_rip, .. } => syscall::dispatch(task, next_rip),
        Exit::Exception(fault) if vsyscall::call(task, fault) => Flow::Continue,
        Exit::Exception(fault) => signal::raise_fault(task, fault),
        Exit::Intercept { what: Intercepts::INT_N, vector, next_rip } => software_interrupt(task, vector, next_rip),
        // The engine stops before HLT, a privileged instruction, if it looks at the intercept before the privilege; and SYSENTER enters
        // the kernel's 32-bit door, which does not exist here.
        Exit::Intercept { .. } => signal::raise_fault(task, Fault::Gp(0)),
        Exit::Halt => {
            let state = task.vcpu.state();
            state.rip = state.rip.wrapping_sub(1);
            signal::raise_fault(task, Fault::Gp(0))
        }
        Exit::Made { number } => syscall::made(task, number),
        Exit::Kicked | Exit::Budget => Flow::Continue,
        Exit::Unsupported => signal::raise_fault(task, Fault::Ud),
        Exit::Shutdown => signal::raise_fault(task, Fault::Df),
    }
}

/// INT n: 3 and 4 have gates that user code may use (SDM 3A 6.12.1.2, as Linux sets up its IDT), 0x80 is the 32-bit system call,
/// everything else is #GP with the IDT flag and the vector in the error code.
fn software_interrupt(task: &mut Task, vector: u8, next_rip: u64) -> Flow {
    let fault = match vector {
        1 => Fault::Db(0),
        3 => Fault::Bp,
        4 => Fault::Of,
        _ => return signal::raise_fault(task, Fault::Gp(u16::from(vector) << 3 | 2)),
    };
    task.vcpu.state().rip = next_rip;
    signal::raise_fault(task, fault)
}
