//! CPUID RDPID (SDM 2A, 2B).

use crate::interp::{Exec, Step, operand};
use crate::isa::{Gpr, Insn, Width};

/// CPUID.
pub fn cpuid(x: &mut Exec<'_>, _: &Insn) -> Step {
    let leaf = x.cpu.read(Gpr::Rax, Width::D) as u32;
    let subleaf = x.cpu.read(Gpr::Rcx, Width::D) as u32;
    let v = x.env.cpu_model.cpuid(x.cpu, leaf, subleaf);
    for (r, v) in [Gpr::Rax, Gpr::Rbx, Gpr::Rcx, Gpr::Rdx].into_iter().zip(v) {
        x.cpu.write(r, Width::D, u64::from(v));
    }
    Ok(())
}

/// RDPID: IA32_TSC_AUX.
pub fn rdpid(x: &mut Exec<'_>, i: &Insn) -> Step {
    operand::write(x, i, 0, x.cpu.msr.tsc_aux)
}
