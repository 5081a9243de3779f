//! HLT MONITOR MWAIT (SDM 2A, 2B).

use crate::cpu::{Activity, Fault};
use crate::interp::{Exec, Step, Stop};
use crate::isa::{Gpr, Insn, Width};
use crate::vcpu::Exit;

/// HLT: leaves with RIP past it; the interrupt that wakes the processor is taken there.
pub fn hlt(x: &mut Exec<'_>, _: &Insn) -> Step {
    x.cpu.activity = Activity::Halted;
    x.cpu.rip = x.next_rip;
    Err(Stop::Exit(Exit::Halt))
}

/// MONITOR: no store is watched, so every MWAIT returns at once, as the manual allows.
pub fn monitor(x: &mut Exec<'_>, _: &Insn) -> Step {
    no_extensions(x)
}

/// MWAIT.
pub fn mwait(x: &mut Exec<'_>, _: &Insn) -> Step {
    no_extensions(x)
}

/// "If ECX ≠ 0 (ECX specifies an unsupported extension)": #GP(0).
fn no_extensions(x: &Exec<'_>) -> Step {
    if x.cpu.read(Gpr::Rcx, Width::D) != 0 {
        return Err(Fault::Gp(0).into());
    }
    Ok(())
}
