//! HLT MONITOR MWAIT (SDM 2A, 2B).

use crate::cpu::Fault;
use crate::interp::{Exec, Step, Stop};
use crate::isa::{Gpr, Insn, Width};
use crate::vcpu::Exit;

/// HLT: leaves; the loop commits RIP past it, where the interrupt that wakes the processor is taken.
pub fn hlt(_: &mut Exec<'_>, _: &Insn) -> Step {
    Err(Stop::exit(Exit::Halt))
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

#[cfg(test)]
mod tests {
    use crate::cpu::Activity;
    use crate::interp::sensitive::testing::machine;
    use crate::interp::testing::CODE;
    use crate::vcpu::Exit;

    #[test]
    fn hlt_waits_behind_itself() {
        let mut m = machine(0, &[0xf4, 0x90]);
        assert_eq!(m.run(5), Exit::Halt);
        assert_eq!((m.cpu().rip, m.cpu().activity), (CODE + 1, Activity::Halted));
        // Without an interrupt it stays halted.
        assert_eq!(m.run(5), Exit::Halt);
        assert_eq!(m.cpu().rip, CODE + 1);
    }
}
