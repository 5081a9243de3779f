//! The system calls about signals: actions, masks, waiting, the alternate stack, the return from a handler (man-pages section 2).

use crate::host::inbox::Info;
use crate::host::signal::{KernelAction, NEVER_BLOCKED};
use crate::host::syscall::Aborted;
use crate::isa::Gpr;
use crate::linux::fault;
use crate::linux::frame::{self, AltStack, SS_AUTODISARM, SS_DISABLE, SS_ONSTACK};
use crate::linux::host::{self, err, interruptible};
use crate::linux::signal::{IGNORE, RESTART, UNBLOCKABLE, force_now};
use crate::linux::syscall::{Args, Outcome, pass};
use crate::linux::{Flow, Task};
use crate::mem::GuestMemory;

/// Size of the kernel's sigset_t.
const SET_SIZE: u64 = 8;
/// The flags that the kernel keeps (UAPI_SA_FLAGS).
const KNOWN_FLAGS: u64 = 0xdc00_0807;

const EFAULT: i64 = err(libc::EFAULT);
const EINVAL: i64 = err(libc::EINVAL);

fn read_u64(mem: &GuestMemory, at: u64) -> Result<u64, i64> {
    let mut v = [0; 8];
    mem.read(at, &mut v).ok_or(EFAULT)?;
    Ok(u64::from_le_bytes(v))
}

fn write_u64(mem: &GuestMemory, at: u64, v: u64) -> Result<(), i64> {
    mem.write(at, &v.to_le_bytes()).ok_or(EFAULT)
}

/// `Err` carries the result of a call that failed or is to be restarted.
fn outcome(r: Result<i64, i64>) -> Outcome {
    Outcome::Done(r.unwrap_or_else(|e| e))
}

/// rt_sigaction(2).
pub fn rt_sigaction(task: &mut Task, a: Args) -> Outcome {
    outcome(sigaction(task, a))
}

fn sigaction(task: &mut Task, [sig, new, old, size, ..]: Args) -> Result<i64, i64> {
    if size != SET_SIZE {
        return Err(EINVAL);
    }
    let mem = task.process.mem();
    let action = match new {
        0 => None,
        at => {
            let word = |i: u64| read_u64(mem, at.wrapping_add(8 * i));
            Some(KernelAction {
                handler: word(0)?,
                flags: word(1)? & KNOWN_FLAGS,
                restorer: word(2)?,
                mask: word(3)? & !UNBLOCKABLE,
            })
        }
    };
    let sig = sig as i32;
    if !(1..=64).contains(&sig) || action.is_some() && (sig == libc::SIGKILL || sig == libc::SIGSTOP) {
        return Err(EINVAL);
    }
    let previous = match action {
        Some(action) => task.process.signals.set(sig, action),
        None => task.process.signals.get(sig),
    };
    if old != 0 {
        let words = [previous.handler, previous.flags, previous.restorer, previous.mask];
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        mem.write(old, &bytes).ok_or(EFAULT)?;
    }
    if action.is_some_and(|a| a.handler == IGNORE) && NEVER_BLOCKED & 1 << (sig - 1) != 0 {
        // Ignoring a signal discards it if it is pending; the host's kernel does it for the others.
        task.signals.inbox.take_from(1 << (sig - 1));
    }
    Ok(0)
}

/// rt_sigprocmask(2).
pub fn rt_sigprocmask(task: &mut Task, a: Args) -> Outcome {
    outcome(sigprocmask(task, a))
}

fn sigprocmask(task: &mut Task, [how, set, old, size, ..]: Args) -> Result<i64, i64> {
    if size != SET_SIZE {
        return Err(EINVAL);
    }
    let before = task.signals.mask;
    if set != 0 {
        let set = read_u64(task.process.mem(), set)? & !UNBLOCKABLE;
        let mask = match how as i32 {
            libc::SIG_BLOCK => before | set,
            libc::SIG_UNBLOCK => before & !set,
            libc::SIG_SETMASK => set,
            _ => return Err(EINVAL),
        };
        change_mask(task, mask)?;
    }
    if old != 0 {
        write_u64(task.process.mem(), old, before)?;
    }
    Ok(0)
}

/// Sets the mask unless a signal is to be delivered first.
fn change_mask(task: &mut Task, mask: u64) -> Result<(), i64> {
    let host_mask = mask & !NEVER_BLOCKED;
    let a = [libc::SIG_SETMASK as u64, &raw const host_mask as u64, 0, SET_SIZE, 0, 0];
    interruptible(task.signals.inbox.flag(), libc::SYS_rt_sigprocmask as u64, a).map_err(|Aborted| RESTART)?;
    task.signals.mask = mask;
    task.signals.inbox.set_blocked(mask);
    Ok(())
}

/// rt_sigpending(2).
pub fn rt_sigpending(task: &mut Task, [set, size, ..]: Args) -> Outcome {
    if task.signals.inbox.any() {
        return RESTART.into();
    }
    let mut pending = 0u64;
    let r = host::host_call(libc::SYS_rt_sigpending as u64, [&raw mut pending as u64, size.min(SET_SIZE), 0, 0, 0, 0]);
    if r < 0 || size > SET_SIZE {
        return EINVAL.into();
    }
    pending |= task.signals.inbox.held();
    match task.process.mem().write(set, &pending.to_le_bytes()[..size as usize]) {
        Some(()) => 0.into(),
        None => EFAULT.into(),
    }
}

/// Where a system call finds its signal mask.
enum MaskAt {
    /// An argument is its address.
    Argument(usize),
    /// An argument is the address of its address and size.
    Pair(usize),
}

/// rt_sigsuspend(2).
pub fn rt_sigsuspend(task: &mut Task, a: Args) -> Outcome {
    if a[1] != SET_SIZE {
        return EINVAL.into();
    }
    outcome(under_mask(task, libc::SYS_rt_sigsuspend as u64, a, MaskAt::Argument(0)))
}

/// ppoll(2).
pub fn ppoll(task: &mut Task, a: Args) -> Outcome {
    outcome(under_mask(task, libc::SYS_ppoll as u64, a, MaskAt::Argument(3)))
}

/// pselect(2).
pub fn pselect6(task: &mut Task, a: Args) -> Outcome {
    outcome(under_mask(task, libc::SYS_pselect6 as u64, a, MaskAt::Pair(5)))
}

/// epoll_pwait(2).
pub fn epoll_pwait(task: &mut Task, a: Args) -> Outcome {
    outcome(under_mask(task, libc::SYS_epoll_pwait as u64, a, MaskAt::Argument(4)))
}

/// epoll_pwait2(2).
pub fn epoll_pwait2(task: &mut Task, a: Args) -> Outcome {
    outcome(under_mask(task, libc::SYS_epoll_pwait2 as u64, a, MaskAt::Argument(4)))
}

/// io_pgetevents(2).
pub fn io_pgetevents(task: &mut Task, a: Args) -> Outcome {
    outcome(under_mask(task, 333, a, MaskAt::Pair(5)))
}

/// A call that puts another mask in place while it waits. The host's kernel swaps the host's mask; what remains is to tell delivery
/// that handlers run under the temporary mask while frames restore the old one.
fn under_mask(task: &mut Task, number: u64, mut a: Args, at: MaskAt) -> Result<i64, i64> {
    let mem = task.process.mem();
    let (address, pair) = match at {
        MaskAt::Argument(i) => (a[i], None),
        MaskAt::Pair(i) if a[i] == 0 => (0, None),
        MaskAt::Pair(i) => (read_u64(mem, a[i])?, Some(read_u64(mem, a[i].wrapping_add(8))?)),
    };
    if address == 0 || pair.is_some_and(|size| size != SET_SIZE) {
        return Ok(pass(task, number, a));
    }
    let mask = read_u64(mem, address)? & !UNBLOCKABLE;
    let host_mask = mask & !NEVER_BLOCKED;
    let host_pair = [&raw const host_mask as u64, SET_SIZE];
    match at {
        MaskAt::Argument(i) => a[i] = host_pair[0],
        MaskAt::Pair(i) => a[i] = host_pair.as_ptr() as u64,
    }
    if task.signals.inbox.any() {
        return Err(RESTART);
    }
    task.signals.inbox.set_blocked(mask);
    // What we hold and the new mask lets through ends the wait at once.
    let r = if task.signals.inbox.any() { err(libc::EINTR) } else { pass(task, number, a) };
    if r == err(libc::EINTR) && task.signals.inbox.any() {
        task.signals.temporary = Some(mask);
    } else {
        let mask = task.signals.mask;
        task.signals.inbox.set_blocked(mask);
    }
    Ok(r)
}

/// rt_sigtimedwait(2). The host waits; the signals that are never blocked there are looked for in the inbox.
pub fn rt_sigtimedwait(task: &mut Task, a: Args) -> Outcome {
    outcome(sigtimedwait(task, a))
}

fn sigtimedwait(task: &mut Task, a: Args) -> Result<i64, i64> {
    let [set, info, _, size, ..] = a;
    if size != SET_SIZE {
        return Err(EINVAL);
    }
    let ours = read_u64(task.process.mem(), set)? & NEVER_BLOCKED;
    if ours == 0 {
        return Ok(pass(task, libc::SYS_rt_sigtimedwait as u64, a));
    }
    let taken = |task: &mut Task| task.signals.inbox.take_from(ours);
    if let Some(found) = taken(task) {
        return give_info(task, info, found);
    }
    if task.signals.inbox.any() {
        return Err(RESTART);
    }
    // While we wait, they shall wake us.
    let mask = task.signals.mask;
    task.signals.inbox.set_blocked(mask & !ours);
    let r = pass(task, libc::SYS_rt_sigtimedwait as u64, a);
    let found = if r == RESTART || r == err(libc::EINTR) { taken(task) } else { None };
    task.signals.inbox.set_blocked(mask);
    match found {
        Some(found) => {
            // The handler has blocked everything.
            crate::linux::signal::set_mask(task, mask);
            give_info(task, info, found)
        }
        None => Ok(r),
    }
}

fn give_info(task: &Task, at: u64, (sig, info): (i32, Info)) -> Result<i64, i64> {
    if at != 0 {
        task.process.mem().write(at, &info).ok_or(EFAULT)?;
    }
    Ok(i64::from(sig))
}

/// sigaltstack(2).
pub fn sigaltstack(task: &mut Task, [new, old, ..]: Args) -> Outcome {
    outcome(altstack(task, new, old))
}

fn altstack(task: &mut Task, new: u64, old: u64) -> Result<i64, i64> {
    let sp = task.vcpu.state().gpr[Gpr::Rsp as usize];
    let mem = task.process.mem();
    let previous = task.signals.alt;
    let wanted = match new {
        0 => None,
        at => Some(AltStack {
            sp: read_u64(mem, at)?,
            flags: read_u64(mem, at.wrapping_add(8))? as u32,
            size: read_u64(mem, at.wrapping_add(16))?,
        }),
    };
    if let Some(wanted) = wanted {
        task.signals.alt = changed(previous, wanted, sp)?;
    }
    if old != 0 {
        let flags = previous.state(sp) | previous.flags & SS_AUTODISARM;
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&previous.sp.to_le_bytes());
        bytes[8..12].copy_from_slice(&flags.to_le_bytes());
        bytes[16..].copy_from_slice(&previous.size.to_le_bytes());
        task.process.mem().write(old, &bytes).ok_or(EFAULT)?;
    }
    Ok(0)
}

/// What the alternate stack becomes (do_sigaltstack).
fn changed(previous: AltStack, wanted: AltStack, sp: u64) -> Result<AltStack, i64> {
    if previous.in_use(sp) {
        return Err(err(libc::EPERM));
    }
    let mode = wanted.flags & !SS_AUTODISARM;
    if ![0, SS_DISABLE, SS_ONSTACK].contains(&mode) {
        return Err(EINVAL);
    }
    if mode == SS_DISABLE {
        Ok(AltStack { sp: 0, size: 0, ..wanted })
    } else if wanted != previous && wanted.size < libc::MINSIGSTKSZ as u64 {
        Err(err(libc::ENOMEM))
    } else {
        Ok(wanted)
    }
}

/// rt_sigreturn(2).
pub fn rt_sigreturn(task: &mut Task, _: Args) -> Outcome {
    // The mask first: what the handler's mask lets through comes before the return.
    let mask = frame::mask(task.vcpu.state(), task.process.mem()).map(|m| m & !UNBLOCKABLE);
    if let Ok(mask) = mask
        && let Err(restart) = change_mask(task, mask)
    {
        return restart.into();
    }
    match frame::pop(task.vcpu.state(), task.process.mem()) {
        Ok(alt) => {
            let sp = task.vcpu.state().gpr[Gpr::Rsp as usize];
            // Errors are ignored, as by the kernel.
            if let Ok(alt) = changed(task.signals.alt, alt, sp) {
                task.signals.alt = alt;
            }
        }
        Err(frame::BadFrame) => {
            let sig = libc::SIGSEGV;
            let Flow::Continue = force_now(task, sig, &fault::forced(sig), "rt_sigreturn from a bad frame") else {
                return Outcome::Resume;
            };
        }
    }
    Outcome::Resume
}
