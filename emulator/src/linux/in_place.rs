//! execve(2) without a new host process image: the guest's memory goes, the next program comes, bivisor stays.
//!
//! The host's exec of bivisor costs more than most short programs. What the kernel does to a process that executes is done here, one by
//! one (execve(2), fs/exec.c); where it is more than that, [`possible`] says no and the host's exec does it: other threads, a child of
//! vfork(2), whose memory is another's, locks that are still held, calls such as timer_create(2) or setuid(2)
//! ([`crate::linux::misc::until_exec`]). Nothing is changed before it is certain that the program can be run.

use crate::host::{fds, fork};
use crate::linux::exec::Strings;
use crate::linux::frame::{AltStack, LastFault};
use crate::linux::host::{self, err, host_call};
use crate::linux::{Image, Options, Process, Task, proc};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Is the host's exec not needed for what this process has been doing?
pub fn possible(task: &Task) -> bool {
    let process = &task.process;
    process.options.successor.0.is_some()
        && !process.host_exec.load(Ordering::Relaxed)
        // Each task has one.
        && Arc::strong_count(process) == 1
        && fork::is_leader()
        && !holds_robust_locks(task)
}

/// Would the kernel have to tell others that locks of this thread have lost their owner (get_robust_list(2))?
fn holds_robust_locks(task: &Task) -> bool {
    let (mut head, mut size) = (0u64, 0u64);
    let result = host_call(libc::SYS_get_robust_list as u64, [0, &raw mut head as u64, &raw mut size as u64, 0, 0, 0]);
    if result != 0 || head == 0 {
        return result != 0;
    }
    // struct robust_list_head: the first entry, an offset, the entry being worked at.
    let mut words = [0; 24];
    if task.process.space.flat().find(head).is_none() || task.process.mem().read(head, &mut words).is_none() {
        // Of the host's own C library, or gone.
        return false;
    }
    let word = |i: usize| u64::from_le_bytes(words[8 * i..8 * i + 8].try_into().expect("8 bytes"));
    word(0) != head || word(2) != 0
}

/// Do arguments and environment fit (bprm_stack_limits)?
pub fn fits(strings: &Strings, name: &[u8]) -> bool {
    let limit = (host::stack_limit() / 4).clamp(128 << 10, 6 << 20);
    let all = || strings.args.iter().chain(&strings.env);
    let bytes: usize = all().map(|s| s.len() + 1).sum::<usize>() + name.len() + 1;
    let pointers = 8 * (strings.args.len().max(1) + strings.env.len());
    (bytes + pointers) as u64 <= limit
}

/// The guest's descriptors that an exec closes; `None` if they cannot be told.
fn closing() -> Option<Vec<i32>> {
    let all: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .ok()?
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&fd| !fds::is_own(fd))
        .collect();
    // The one that was read from is closed by now.
    let flags = |fd: i32| host_call(libc::SYS_fcntl as u64, [fd as u64, libc::F_GETFD as u64, 0, 0, 0, 0]);
    Some(all.into_iter().filter(|&fd| flags(fd) > 0 && flags(fd) & i64::from(libc::FD_CLOEXEC) != 0).collect())
}

/// Goes on with the program. An error means that nothing has changed.
///
/// # Errors
/// `-errno`.
pub fn go_on(task: &mut Task, open: impl FnOnce() -> Result<(Image, Strings), i64>) -> Result<(), i64> {
    let closing = closing().ok_or(err(libc::ENOMEM))?;
    let (image, strings) = open()?;
    // From here on there is no way back.
    if task.clear_child_tid != 0 {
        fork::clear_tid(std::mem::take(&mut task.clear_child_tid));
    }
    host_call(libc::SYS_set_robust_list as u64, [0, 24, 0, 0, 0, 0]);
    fork::unshare(libc::CLONE_FILES as u64);
    let old = task.process.clone();
    let told = old.options.successor.0.as_ref();
    let last_words = told.map(|told| told(&image.exe, old.space.flat())).unwrap_or_default();
    let space = old.space.successor();
    let (mut state, placed) = match image.load(&space, &strings.env, &old.cpu) {
        Ok(loaded) => loaded,
        Err(error) => {
            eprintln!("bivisor: {error}");
            host::die_of(libc::SIGKILL)
        }
    };
    state.cr4 &= old.cpu.cr4();
    state.xcr0 &= old.cpu.xcr0();
    let shown_by_kernel = proc::tell_kernel(&placed);
    proc::set_name(image.name.as_os_str());
    old.signals.after_exec();
    task.process = Arc::new(Process {
        space: Arc::new(space),
        factory: old.factory.clone(),
        options: Options { last_words, ..old.options.clone() },
        exe: image.real_path(),
        args: image.args.clone(),
        env: strings.env,
        shown_by_kernel,
        first: old.first,
        signals: old.signals.clone(),
        cpu: old.cpu.clone(),
        host_exec: AtomicBool::new(false),
        address_limit: old.address_limit.inherited(),
    });
    // Its own descriptors are closed on exec too.
    drop(image);
    for fd in closing {
        host_call(libc::SYS_close as u64, [fd as u64, 0, 0, 0, 0, 0]);
    }
    task.signals.alt = AltStack::NONE;
    task.signals.last = LastFault::default();
    task.signals.temporary = None;
    *task.vcpu.state() = state;
    Ok(())
}
