//! Decimal adjustments and SALC: DAA DAS AAA AAS AAM AAD, not in 64-bit mode, where iced does not decode them (SDM 2A).

use crate::cpu::{Fault, Rflags};
use crate::interp::arith::set_status;
use crate::interp::{Exec, Step, alu, operand};
use crate::isa::{Gpr, Insn, Width};

fn set(x: &mut Exec<'_>, w: Width, (r, f): alu::Out) -> Step {
    x.cpu.write(Gpr::Rax, w, r);
    set_status(x, f);
    Ok(())
}

/// DAA.
pub fn daa(x: &mut Exec<'_>, _: &Insn) -> Step {
    let al = x.cpu.read(Gpr::Rax, Width::B);
    set(x, Width::B, alu::daa(al, x.cpu.rflags))
}

/// DAS.
pub fn das(x: &mut Exec<'_>, _: &Insn) -> Step {
    let al = x.cpu.read(Gpr::Rax, Width::B);
    set(x, Width::B, alu::das(al, x.cpu.rflags))
}

/// AAA.
pub fn aaa(x: &mut Exec<'_>, _: &Insn) -> Step {
    let ax = x.cpu.read(Gpr::Rax, Width::W);
    set(x, Width::W, alu::aaa(ax, x.cpu.rflags))
}

/// AAS.
pub fn aas(x: &mut Exec<'_>, _: &Insn) -> Step {
    let ax = x.cpu.read(Gpr::Rax, Width::W);
    set(x, Width::W, alu::aas(ax, x.cpu.rflags))
}

/// AAM: #DE if the base is zero.
pub fn aam(x: &mut Exec<'_>, i: &Insn) -> Step {
    let base = operand::read(x, i, 0)? & 0xff;
    let al = x.cpu.read(Gpr::Rax, Width::B);
    set(x, Width::W, alu::aam(al, base).ok_or(Fault::De)?)
}

/// AAD.
pub fn aad(x: &mut Exec<'_>, i: &Insn) -> Step {
    let base = operand::read(x, i, 0)? & 0xff;
    let ax = x.cpu.read(Gpr::Rax, Width::W);
    set(x, Width::W, alu::aad(ax, base))
}

/// SALC: AL = CF ? FFh : 0. In no manual of Intel's, in all its processors (APM 3 lists D6 as invalid in 64-bit mode only).
pub fn salc(x: &mut Exec<'_>, _: &Insn) -> Step {
    let carry = x.cpu.rflags.contains(Rflags::CF);
    x.cpu.write(Gpr::Rax, Width::B, if carry { 0xff } else { 0 });
    Ok(())
}
