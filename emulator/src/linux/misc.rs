//! exit_group(2), prctl(2), arch_prctl(2), personality(2).

use crate::isa::Seg;
use crate::linux::Task;
use crate::linux::host::{self, err};
use crate::linux::mm::TASK_SIZE;
use crate::linux::syscall::{Args, Outcome, number, pass};
use std::sync::atomic::Ordering;

/// exit_group(2): all tasks; the host process goes with them.
pub fn exit_group(task: &mut Task, a: Args) -> Outcome {
    task.process.finish();
    host::exit_group(a[0] as i32)
}

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
const ARCH_GET_FS: u64 = 0x1003;
const ARCH_GET_GS: u64 = 0x1004;
const ARCH_GET_CPUID: u64 = 0x1011;
const ARCH_SET_CPUID: u64 = 0x1012;
const ARCH_GET_XCOMP_SUPP: u64 = 0x1021;
const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;

/// arch_prctl(2).
pub fn arch_prctl(task: &mut Task, [code, addr, ..]: Args) -> Outcome {
    let state = task.vcpu.state();
    let seg = if code == ARCH_SET_FS || code == ARCH_GET_FS { Seg::Fs } else { Seg::Gs } as usize;
    let value = match code {
        ARCH_SET_FS | ARCH_SET_GS => {
            if addr >= TASK_SIZE {
                return err(libc::EPERM).into();
            }
            state.seg[seg].base = addr;
            state.seg[seg].selector = 0;
            return 0.into();
        }
        ARCH_GET_FS | ARCH_GET_GS => state.seg[seg].base,
        ARCH_GET_CPUID => return 1.into(),
        // CPUID that faults: not offered.
        ARCH_SET_CPUID => return if addr != 0 { 0 } else { err(libc::ENODEV) }.into(),
        ARCH_GET_XCOMP_SUPP | ARCH_GET_XCOMP_PERM => state.xcr0,
        // Nothing needs permission that is not enabled from the start.
        ARCH_REQ_XCOMP_PERM => {
            let have = addr < 64 && state.xcr0 >> addr & 1 != 0;
            return if have { 0 } else { err(libc::EOPNOTSUPP) }.into();
        }
        _ => return err(libc::EINVAL).into(),
    };
    match task.process.mem().write(addr, &value.to_le_bytes()) {
        Some(()) => 0.into(),
        None => err(libc::EFAULT).into(),
    }
}

/// Options of prctl(2) that change the process in a way that would hit bivisor, or that the virtual CPU does not have.
const PR_REFUSED: &[(i32, i32)] = &[
    (libc::PR_SET_SECCOMP, libc::EINVAL),
    (libc::PR_SET_MM, libc::EPERM),
    (libc::PR_SET_TSC, libc::EINVAL),
    // PR_SET_SYSCALL_USER_DISPATCH, PR_SET_MDWE, PR_GET_AUXV (it would be bivisor's).
    (59, libc::EINVAL),
    (65, libc::EINVAL),
    (0x4155_5856, libc::EINVAL),
];

const PR_SET_VMA: i32 = 0x5356_4d41;

/// What only asks, or stays as it is over an exec that does not change who the process is.
const PR_KEPT: &[i32] = &[
    libc::PR_SET_PDEATHSIG,
    libc::PR_GET_PDEATHSIG,
    libc::PR_GET_DUMPABLE,
    libc::PR_GET_KEEPCAPS,
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_GET_SECCOMP,
    libc::PR_CAPBSET_READ,
    libc::PR_GET_SECUREBITS,
    libc::PR_SET_TIMERSLACK,
    libc::PR_GET_TIMERSLACK,
    libc::PR_SET_CHILD_SUBREAPER,
    libc::PR_GET_CHILD_SUBREAPER,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_GET_NO_NEW_PRIVS,
    libc::PR_SET_THP_DISABLE,
    libc::PR_GET_THP_DISABLE,
    PR_SET_VMA,
];

/// prctl(2).
pub fn prctl(task: &mut Task, a: Args) -> Outcome {
    let option = a[0] as i32;
    if let Some((_, errno)) = PR_REFUSED.iter().find(|(o, _)| *o == option) {
        return err(*errno).into();
    }
    if option == PR_SET_VMA && !task.process.space.flat().covers(a[2]..a[2].saturating_add(a[3])) {
        return err(libc::ENOMEM).into();
    }
    if !PR_KEPT.contains(&option) {
        task.process.host_exec.store(true, Ordering::Relaxed);
    }
    pass(task, libc::SYS_prctl as u64, a).into()
}

/// Calls whose effect the kernel's exec undoes or changes, such as timers and credentials: the next exec is the host's.
pub fn until_exec(task: &mut Task, a: Args) -> Outcome {
    task.process.host_exec.store(true, Ordering::Relaxed);
    let number = number(task);
    pass(task, number, a).into()
}

const READ_IMPLIES_EXEC: u64 = 0x0040_0000;

/// personality(2).
pub fn personality(task: &mut Task, a: Args) -> Outcome {
    if a[0] as u32 != u32::MAX && a[0] & READ_IMPLIES_EXEC != 0 {
        return err(libc::EINVAL).into();
    }
    pass(task, libc::SYS_personality as u64, a).into()
}
