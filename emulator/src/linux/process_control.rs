//! New guest processes: a host process each (fork(2), vfork(2)).

use crate::host::thread::ThreadBlock;
use crate::host::{code_space, fds, fork as host_fork, signal as host_signal};
use crate::linux::clone::{CLONE_CLEAR_SIGHAND, Request, store_tid};
use crate::linux::host::{self, err};
use crate::linux::signal::{self, RESTART};
use crate::linux::{INTERCEPTS, Process, Task, exec, run};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// fork(2) and clone(2) without CLONE_VM: 0 in the child.
pub fn fork(task: &mut Task, request: Request) -> i64 {
    if task.signals.inbox.any() {
        return RESTART;
    }
    host_signal::set_mask(u64::MAX);
    let pid = fork_locked(task, &request);
    if pid == 0 {
        become_child(task, &request);
    }
    let mask = task.signals.mask;
    signal::set_mask(task, mask);
    if pid > 0 && by_library(&request) {
        let mem = task.process.mem();
        if request.has(libc::CLONE_PARENT_SETTID) {
            store_tid(mem, request.parent_tid, pid as i32);
        }
        if request.has(libc::CLONE_PIDFD) {
            let fd = host::host_call(libc::SYS_pidfd_open as u64, [pid as u64, 0, 0, 0, 0, 0]);
            store_tid(mem, request.pidfd, fd as i32);
        }
    }
    pid
}

/// Can the C library's fork do it? What it cannot, the kernel does without the library's knowledge.
fn by_library(request: &Request) -> bool {
    let known = libc::CLONE_PARENT_SETTID
        | libc::CLONE_CHILD_SETTID
        | libc::CLONE_CHILD_CLEARTID
        | libc::CLONE_PIDFD
        | libc::CLONE_SETTLS
        | libc::CLONE_SYSVSEM;
    request.exit_signal == libc::SIGCHLD as u64 && request.flags & !(known as u32 as u64 | CLONE_CLEAR_SIGHAND) == 0
}

fn clear_handlers(task: &Task, request: &Request) {
    if request.flags & CLONE_CLEAR_SIGHAND != 0 {
        task.process.signals.clear_handlers();
    }
}

/// Forks while this thread holds every lock that another one may hold.
fn fork_locked(task: &mut Task, request: &Request) -> i64 {
    let process = task.process.clone();
    let mut pid = err(libc::EAGAIN);
    task.vcpu.around_fork(&mut || {
        let _maps = process.space.lock();
        let _space = process.space.flat().lock_for_fork();
        let _actions = process.signals.lock_for_fork();
        let _fds = fds::lock_for_fork();
        let _code = code_space::lock_for_fork();
        pid = if by_library(request) {
            host_fork::fork()
        } else {
            let at = if request.has(libc::CLONE_PIDFD) { request.pidfd } else { request.parent_tid };
            host_fork::clone_process(request.flags | request.exit_signal, at, request.child_tid)
        };
    });
    pid
}

/// In the new process: what belongs to the old one goes.
fn become_child(task: &mut Task, request: &Request) {
    task.tid = host::gettid();
    if task.vcpu.survives_fork() {
        task.signals.inbox.clear();
    } else {
        let mut vcpu = match (task.process.factory)() {
            Ok(vcpu) => vcpu,
            Err(why) => {
                eprintln!("bivisor: no engine for the new process: {why}");
                host_fork::exit_group(127);
            }
        };
        vcpu.set_intercepts(INTERCEPTS);
        *vcpu.state() = task.vcpu.state().clone();
        task.signals.inbox.detach(ThreadBlock::current());
        task.signals = task.signals.renewed(vcpu.kicker());
        task.vcpu = vcpu;
        task.signals.inbox.attach(ThreadBlock::current());
    }
    clear_handlers(task, request);
    if request.has(libc::CLONE_VFORK) || request.exit_signal != libc::SIGCHLD as u64 {
        // An exec wakes the parent, or makes the exit signal the usual one.
        task.process.host_exec.store(true, Ordering::Relaxed);
    }
    request.apply(task);
    if by_library(request) && request.has(libc::CLONE_CHILD_SETTID) {
        store_tid(task.process.mem(), request.child_tid, task.tid);
    }
    task.clear_child_tid = if request.has(libc::CLONE_CHILD_CLEARTID) { request.child_tid } else { 0 };
}

/// vfork(2) and clone(2) with CLONE_VM and CLONE_VFORK: the child runs in a process that shares this one's memory, this very task and
/// its engine included, until it executes a program or ends; then the task goes on as if nothing had been.
pub fn vfork(task: &mut Task, request: Request) -> i64 {
    if task.signals.inbox.any() {
        return RESTART;
    }
    host_signal::set_mask(u64::MAX);
    let state = task.vcpu.state().clone();
    let (mask, alt, last) = (task.signals.mask, task.signals.alt, task.signals.last);
    let (tid, clear_child_tid) = (task.tid, task.clear_child_tid);
    let process = task.process.clone();
    let at = if request.has(libc::CLONE_PIDFD) { request.pidfd } else { request.parent_tid };
    let pid = host_fork::vfork(request.flags | request.exit_signal, at, request.child_tid, &mut || {
        // What the child does about signals is its own.
        task.process = Arc::new(process.sharing_memory());
        task.tid = host::gettid();
        task.clear_child_tid = 0;
        clear_handlers(task, &request);
        request.apply(task);
        // The first task of a process does not come back: exit(2) ends it.
        run::run_task(task);
    });
    task.process = process;
    task.exec = exec::Arguments::default();
    task.tid = tid;
    task.clear_child_tid = clear_child_tid;
    (task.signals.mask, task.signals.alt, task.signals.last) = (mask, alt, last);
    task.signals.inbox.clear();
    // Its exit has taken the hook away.
    task.signals.inbox.attach(ThreadBlock::current());
    *task.vcpu.state() = state;
    signal::set_mask(task, mask);
    pid
}

impl Process {
    /// The same process for a child that shares its memory but not what it does about signals.
    fn sharing_memory(&self) -> Process {
        Process {
            space: self.space.clone(),
            factory: self.factory.clone(),
            options: self.options.clone(),
            exe: self.exe.clone(),
            args: self.args.clone(),
            env: self.env.clone(),
            shown_by_kernel: self.shown_by_kernel,
            first: self.first,
            signals: self.signals.clone(),
            cpu: self.cpu.clone(),
            host_exec: AtomicBool::new(true),
            address_limit: self.address_limit.inherited(),
        }
    }
}
