//! The vsyscall page: three functions at fixed addresses in the kernel's half, which old programs call instead of the vDSO
//! (arch/x86/entry/vsyscall of Linux, mode `xonly`: they can be called, the page cannot be read).

use crate::cpu::Fault;
use crate::isa::{Gpr, Width};
use crate::linux::Task;
use crate::linux::host::err;
use crate::linux::syscall::pass;

const PAGE: u64 = 0xffff_ffff_ff60_0000;

/// Carries the call out if that is what faulted: as if the page held `mov eax, NR; syscall; ret`. False: it is a real fault.
pub fn call(task: &mut Task, fault: Fault) -> bool {
    let state = task.vcpu.state();
    let Fault::Pf { addr, .. } = fault else { return false };
    let number = match addr.wrapping_sub(PAGE) {
        0 => libc::SYS_gettimeofday,
        0x400 => libc::SYS_time,
        0x800 => libc::SYS_getcpu,
        _ => return false,
    };
    if state.rip != addr {
        return false;
    }
    let sp = state.gpr[Gpr::Rsp as usize];
    // The third argument of getcpu means nothing.
    let args = [state.gpr[Gpr::Rdi as usize], state.gpr[Gpr::Rsi as usize], 0, 0, 0, 0];
    let Some(back) = task.process.mem().load(sp, Width::Q) else { return false };
    let result = pass(task, number as u64, args);
    if result == err(libc::EFAULT) {
        return false;
    }
    let state = task.vcpu.state();
    state.gpr[Gpr::Rax as usize] = result as u64;
    state.gpr[Gpr::Rsp as usize] = sp.wrapping_add(8);
    state.rip = back;
    true
}
