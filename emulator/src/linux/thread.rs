//! Guest threads: each is a host thread with an engine of its own (clone(2) with CLONE_THREAD, set_tid_address(2), exit(2)).

use crate::cpu::CpuState;
use crate::host::thread::ThreadBlock;
use crate::host::{fork, signal as host_signal};
use crate::linux::clone::{Request, store_tid};
use crate::linux::frame::{AltStack, LastFault};
use crate::linux::host::{self, err};
use crate::linux::signal::{self, RESTART};
use crate::linux::syscall::{Args, Outcome};
use crate::linux::{ExitStatus, Process, Task, run};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Once};

/// Stack of a host thread: the guest runs on its own, this one is for engines and personality.
const HOST_STACK: usize = 1 << 20;

/// The second of the signals that the C library keeps for itself (nptl(7)).
const SIGSETXID: i32 = 33;

/// What a new thread takes along from its maker.
struct Seed {
    process: Arc<Process>,
    state: CpuState,
    mask: u64,
    last: LastFault,
    request: Request,
}

/// clone(2) with CLONE_THREAD: the thread's id or `-errno`.
pub fn spawn(task: &mut Task, request: Request) -> i64 {
    if task.signals.inbox.any() {
        return RESTART;
    }
    let seed = Seed {
        process: task.process.clone(),
        state: task.vcpu.state().clone(),
        mask: task.signals.mask,
        last: task.signals.last,
        request,
    };
    let (report, started) = channel();
    // A thread starts with its maker's mask; no signal may find it before it has an inbox.
    host_signal::set_mask(u64::MAX);
    let thread = std::thread::Builder::new().stack_size(HOST_STACK).spawn(move || main(seed, report));
    // With its first thread the host's C library takes the signal by which it changes ids; the guest's has it for itself.
    static ONCE: Once = Once::new();
    ONCE.call_once(|| task.process.signals.tell_again(SIGSETXID));
    let tid = match thread {
        Ok(_) => started.recv().unwrap_or(err(libc::EAGAIN)),
        Err(_) => err(libc::EAGAIN),
    };
    let mask = task.signals.mask;
    signal::set_mask(task, mask);
    tid
}

/// The life of a host thread.
fn main(seed: Seed, report: Sender<i64>) {
    // The C library starts a thread with its signal of cancellation (32) unblocked. The guest's may use it for timers, and send it as
    // soon as it knows the thread's id, which is after the report.
    host_signal::set_mask(u64::MAX);
    if ThreadBlock::make().is_err() {
        let _ = report.send(err(libc::EAGAIN));
        return;
    }
    host_signal::attach();
    let Seed { process, state, mask, last, request } = seed;
    let mut task = match Task::new(process) {
        Ok(task) => task,
        Err(_) => {
            let _ = report.send(err(libc::EAGAIN));
            return;
        }
    };
    task.signals.mask = mask;
    task.signals.last = last;
    task.signals.alt = AltStack::DISABLED;
    *task.vcpu.state() = state;
    request.apply(&mut task);
    // Host threads share these.
    for flag in [libc::CLONE_FILES, libc::CLONE_FS] {
        if !request.has(flag) {
            fork::unshare(flag as u64);
        }
    }
    let mem = task.process.mem();
    if request.has(libc::CLONE_PARENT_SETTID) {
        store_tid(mem, request.parent_tid, task.tid);
    }
    if request.has(libc::CLONE_CHILD_SETTID) {
        store_tid(mem, request.child_tid, task.tid);
    }
    if request.has(libc::CLONE_CHILD_CLEARTID) {
        task.clear_child_tid = request.child_tid;
    }
    let _ = report.send(i64::from(task.tid));
    drop(report);
    run::run_task(&mut task);
    let clear = task.clear_child_tid;
    // As long as a thread may still touch the guest's memory, it counts as one of the process.
    let _process = task.process.clone();
    drop(task);
    // From here on the guest may take it that the thread is gone.
    if clear != 0 {
        fork::clear_tid(clear);
    }
}

/// exit(2): the task alone. The host's first thread leaves its stack behind, others come back to `main`.
pub fn exit(task: &mut Task, a: Args) -> Outcome {
    if task.signals.inbox.any() {
        // What the process was sent is handled by somebody.
        return RESTART.into();
    }
    let code = a[0] as i32;
    if fork::is_leader() {
        signal::leave(task);
        if task.clear_child_tid != 0 {
            fork::clear_tid(task.clear_child_tid);
        }
        fork::exit_thread(code);
    }
    Outcome::Exit(ExitStatus::Code(code))
}

/// set_tid_address(2).
pub fn set_tid_address(task: &mut Task, a: Args) -> Outcome {
    task.clear_child_tid = a[0];
    i64::from(host::gettid()).into()
}
