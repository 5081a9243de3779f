//! Signals of the guest: dispositions, masks, delivery at the boundary between two instructions (signal(7), kernel/signal.c).
//!
//! The host's kernel keeps what is pending: the host thread blocks what the guest thread blocks, and SIG_DFL and SIG_IGN are the
//! host's. Only what the guest handles is routed to [`crate::host::signal`], which leaves it in the task's [`Inbox`]. The faults and
//! the kick signal are always routed; for them mask and disposition are looked at here.

use crate::cpu::{CpuState, Fault};
use crate::host::inbox::{Inbox, Info};
use crate::host::signal::{self as host_signal, FAULTS, KernelAction, NEVER_BLOCKED, bit};
use crate::host::thread::ThreadBlock;
use crate::isa::Gpr;
use crate::linux::fault::{self, Raised};
use crate::linux::frame::{self, AltStack, Delivery, LastFault};
use crate::linux::{Flow, Task, crash, host, strace};
use crate::vcpu::Kicker;
use std::sync::{Mutex, MutexGuard};

/// SIG_DFL.
pub const DEFAULT: u64 = libc::SIG_DFL as u64;
/// SIG_IGN.
pub const IGNORE: u64 = libc::SIG_IGN as u64;
/// Signals whose mask bits do not count.
pub const UNBLOCKABLE: u64 = bit(libc::SIGKILL) | bit(libc::SIGSTOP);

/// The result of a system call that was not executed: RIP goes back to it (ERESTARTSYS of the kernel, which user code never sees).
pub const RESTART: i64 = -512;

/// What the guest process does about each signal; shared by its threads.
#[derive(Debug)]
pub struct Dispositions {
    actions: Mutex<[KernelAction; 64]>,
}

impl Default for Dispositions {
    /// As the program was started with: everything default, except what was ignored.
    fn default() -> Dispositions {
        let ignored = host_signal::inherited_ignored();
        let actions = std::array::from_fn(|i| KernelAction {
            handler: if ignored & 1 << i != 0 { IGNORE } else { DEFAULT },
            ..KernelAction::default()
        });
        Dispositions { actions: Mutex::new(actions) }
    }
}

impl Clone for Dispositions {
    fn clone(&self) -> Dispositions {
        Dispositions { actions: Mutex::new(*self.lock()) }
    }
}

impl Dispositions {
    fn lock(&self) -> MutexGuard<'_, [KernelAction; 64]> {
        self.actions.lock().expect("no panic under the lock")
    }

    /// Keeps other threads out, so that a fork does not copy a taken lock.
    pub fn lock_for_fork(&self) -> impl Drop + '_ {
        self.lock()
    }

    /// The action for a signal.
    pub fn get(&self, sig: i32) -> KernelAction {
        self.lock()[(sig - 1) as usize]
    }

    /// Sets the action for a signal, on the host too; gives the old one.
    pub fn set(&self, sig: i32, new: KernelAction) -> KernelAction {
        let mut actions = self.lock();
        tell_host(sig, &new);
        std::mem::replace(&mut actions[(sig - 1) as usize], new)
    }

    /// Makes the host's action for a signal ours again, if somebody else has changed it.
    pub fn tell_again(&self, sig: i32) {
        tell_host(sig, &self.lock()[(sig - 1) as usize]);
    }

    /// The action for a signal that is being delivered: SA_RESETHAND takes effect.
    fn take(&self, sig: i32) -> KernelAction {
        let mut actions = self.lock();
        let slot = &mut actions[(sig - 1) as usize];
        let action = *slot;
        if action.handler > IGNORE && action.flags & libc::SA_RESETHAND as u64 != 0 {
            slot.handler = DEFAULT;
            tell_host(sig, slot);
        }
        action
    }

    /// Everything that is handled becomes default (CLONE_CLEAR_SIGHAND).
    pub fn clear_handlers(&self) {
        let mut actions = self.lock();
        for (i, action) in actions.iter_mut().enumerate().filter(|(_, a)| a.handler > IGNORE) {
            *action = KernelAction::default();
            tell_host(i as i32 + 1, action);
        }
    }

    /// As after execve(2): what is ignored stays so, all else is default, without flags.
    pub fn after_exec(&self) {
        let mut actions = self.lock();
        for (i, action) in actions.iter_mut().enumerate() {
            let handler = if action.handler == IGNORE { IGNORE } else { DEFAULT };
            let new = KernelAction { handler, ..KernelAction::default() };
            if std::mem::replace(action, new) != new {
                tell_host(i as i32 + 1, action);
            }
        }
    }

    /// The host's dispositions and the thread's mask as execve(2) shall find them: what the guest ignores is ignored, what it blocks is
    /// blocked, also the signals we always route. [`Dispositions::restore_routes`] if it fails.
    pub fn prepare_exec(&self, mask: u64) {
        host_signal::block(mask & NEVER_BLOCKED);
        let actions = self.lock();
        for sig in FAULTS.into_iter().chain([Kicker::SIGNAL]) {
            if actions[(sig - 1) as usize].handler == IGNORE {
                host_signal::set_plain(sig, true, 0);
            }
        }
    }

    /// Takes [`Dispositions::prepare_exec`] back.
    pub fn restore_routes(&self) {
        for sig in FAULTS.into_iter().chain([Kicker::SIGNAL]) {
            host_signal::route(sig, libc::SA_RESTART as u64);
        }
    }
}

fn tell_host(sig: i32, action: &KernelAction) {
    if NEVER_BLOCKED & bit(sig) != 0 {
        return;
    }
    match action.handler {
        DEFAULT | IGNORE => host_signal::set_plain(sig, action.handler == IGNORE, action.flags),
        _ => host_signal::route(sig, action.flags),
    }
}

/// A task's queued and blocked signals.
#[derive(Debug)]
pub struct TaskSignals {
    /// What the handler left.
    pub inbox: Box<Inbox>,
    /// What the guest blocks.
    pub mask: u64,
    /// The mask that the interrupted system call had put in place of [`TaskSignals::mask`] (sigsuspend(2), ppoll(2)).
    pub temporary: Option<u64>,
    /// The alternate stack.
    pub alt: AltStack,
    /// What frames show of the last fault.
    pub last: LastFault,
    /// The number of the system call that just returned EINTR.
    interrupted: Option<u64>,
}

impl TaskSignals {
    /// For a task on the calling thread whose engine `kicker` belongs to; the guest's mask is the thread's.
    pub fn new(kicker: Kicker) -> TaskSignals {
        TaskSignals {
            inbox: Inbox::new(kicker),
            mask: host_signal::mask(),
            temporary: None,
            alt: AltStack::NONE,
            last: LastFault::default(),
            interrupted: None,
        }
    }

    /// The same for another engine.
    pub fn renewed(&self, kicker: Kicker) -> TaskSignals {
        TaskSignals { mask: self.mask, alt: self.alt, last: self.last, ..TaskSignals::new(kicker) }
    }
}

/// The calling thread begins to run `task`: signals come in.
pub fn enter(task: &mut Task) {
    let signals = &task.signals;
    signals.inbox.attach(ThreadBlock::current());
    signals.inbox.set_blocked(signals.mask);
    host_signal::set_mask(signals.mask);
}

/// The calling thread no longer runs `task`: everything is blocked, so that the process's signals go to other threads.
pub fn leave(task: &mut Task) {
    host_signal::set_mask(u64::MAX);
    task.signals.inbox.detach(ThreadBlock::current());
}

/// A new mask for the guest, and for the host thread. What becomes deliverable is in the inbox when this returns.
pub fn set_mask(task: &mut Task, mask: u64) {
    let mask = mask & !UNBLOCKABLE;
    task.signals.mask = mask;
    task.signals.inbox.set_blocked(mask);
    host_signal::set_mask(mask);
}

/// Before the guest runs on: starts the handlers of queued signals.
pub fn deliver_pending(task: &mut Task) -> Flow {
    if task.signals.inbox.any() {
        deliver(task);
    }
    task.signals.interrupted = None;
    task.signals.temporary = None;
    Flow::Continue
}

#[cold]
fn deliver(task: &mut Task) {
    // The frame of the first handler restores this one; handlers run under the temporary one.
    let mut restored = task.signals.mask;
    let before = restored;
    if let Some(mask) = task.signals.temporary {
        task.signals.mask = mask & !UNBLOCKABLE;
        task.signals.inbox.set_blocked(task.signals.mask);
    }
    let mut handled = false;
    loop {
        while let Some((sig, info)) = task.signals.inbox.take() {
            let action = task.process.signals.take(sig);
            match action.handler {
                IGNORE => {}
                DEFAULT => by_default(sig),
                _ => {
                    start_handler(task, sig, &info, &action, restored);
                    restored = task.signals.mask;
                    handled = true;
                }
            }
        }
        if !handled {
            task.signals.mask = before;
        }
        // The kernel may now have more for us, under the mask that the guest has.
        let mask = task.signals.mask;
        set_mask(task, mask);
        if !task.signals.inbox.any() {
            break;
        }
        restored = mask;
    }
    if !handled && task.signals.interrupted.is_some() {
        // Nobody handled what interrupted it.
        let number = task.signals.interrupted.unwrap_or_default();
        wind_back(task.vcpu.state(), number);
    }
}

/// RIP to the SYSCALL instruction just executed, the number to RAX.
fn wind_back(state: &mut CpuState, number: u64) {
    state.rip = state.rip.wrapping_sub(2);
    state.gpr[Gpr::Rax as usize] = number;
}

/// A signal that came in for a handler which is gone by now, or one of those that are always routed.
fn by_default(sig: i32) {
    match sig {
        libc::SIGCHLD | libc::SIGCONT | libc::SIGURG | libc::SIGWINCH => {}
        libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU | libc::SIGSTOP => host_signal::default_action(sig),
        _ => host::die_of(sig),
    }
}

/// Frame, registers and mask for a handler; a frame that cannot be written is a SIGSEGV of its own (signal_setup_done).
fn start_handler(task: &mut Task, sig: i32, info: &Info, action: &KernelAction, restored: u64) {
    let signals = &task.signals;
    let delivery = Delivery { sig, info, action, mask: restored, alt: signals.alt, last: signals.last };
    if frame::push(task.vcpu.state(), task.process.mem(), delivery).is_err() {
        if sig == libc::SIGSEGV {
            die(task, sig, "its handler has no stack to run on");
        }
        task.signals.mask = restored;
        force(task, libc::SIGSEGV, &fault::forced(libc::SIGSEGV), "a signal handler has no stack to run on");
        return;
    }
    if task.signals.alt.flags & frame::SS_AUTODISARM != 0 {
        task.signals.alt = AltStack::DISABLED;
    }
    if task.process.options.strace {
        strace::line(task, &format!("--- {} ---", strace::signal_name(sig)));
    }
    task.signals.mask |= action.mask;
    if action.flags & libc::SA_NODEFER as u64 == 0 {
        task.signals.mask |= bit(sig);
    }
    task.signals.mask &= !UNBLOCKABLE;
    task.signals.inbox.set_blocked(task.signals.mask);
}

/// A signal that the thread cannot put off: blocked or ignored, it is death (force_sig_info_to_task).
fn force(task: &mut Task, sig: i32, info: &Info, why: &str) {
    let action = task.process.signals.take(sig);
    if action.handler <= IGNORE || task.signals.mask & bit(sig) != 0 {
        die(task, sig, why);
    }
    let restored = task.signals.mask;
    start_handler(task, sig, info, &action, restored);
}

/// Death of something the guest did, with a line about it. Everything is blocked: a closed standard error shall not send SIGPIPE.
fn die(task: &mut Task, sig: i32, why: &str) -> ! {
    host_signal::set_mask(u64::MAX);
    crash::report(task, sig, why);
    task.process.finish();
    host::die_of(sig)
}

/// As `force`, at an instruction of the guest.
pub fn force_now(task: &mut Task, sig: i32, info: &Info, why: &str) -> Flow {
    force(task, sig, info, why);
    let mask = task.signals.mask;
    set_mask(task, mask);
    Flow::Continue
}

/// After a system call: RAX holds `result`. One that was not executed is to be made again after the handlers have run.
pub fn after_syscall(task: &mut Task, number: u64, result: i64) -> Flow {
    if result == RESTART {
        wind_back(task.vcpu.state(), number);
    } else if result == host::err(libc::EINTR) {
        task.signals.interrupted = Some(number);
        return Flow::Continue;
    }
    task.signals.temporary = None;
    Flow::Continue
}

/// An exception of the guest becomes a signal.
pub fn raise_fault(task: &mut Task, fault: Fault) -> Flow {
    let last = task.signals.last;
    let Raised { sig, info, last } = fault::raised(fault, task.vcpu.state(), task.process.mem().flat(), last);
    task.signals.last = last;
    force_now(task, sig, &info, &crash::cause(fault))
}
