//! Shifts and rotations: SHL SHR SAR ROL ROR RCL RCR SHLD SHRD (SDM 2B). A masked count of zero changes no flag.

use crate::cpu::Rflags;
use crate::interp::arith::{binary, set_status};
use crate::interp::shape::{Any, Shape};
use crate::interp::{Exec, Step, alu, operand};
use crate::isa::{Insn, Operand, Width};

/// SHL, SAL.
pub fn shl<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<S>(x, i, alu::shl)
}

/// SHR.
pub fn shr<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<S>(x, i, alu::shr)
}

/// SAR.
pub fn sar<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<S>(x, i, alu::sar)
}

/// A rotation, whose flags depend on whether its operands are a register and an immediate.
#[inline(always)]
fn rotate<S: Shape>(x: &mut Exec<'_>, i: &Insn, f: impl Fn(Width, u64, u64, Rflags) -> alu::Out) -> Step {
    let immediate = matches!(i.ops, [Operand::Reg(_) | Operand::HighByte(_), Operand::Imm(_), _]);
    binary::<S>(x, i, |w, a, count, old| {
        let out = f(w, a, count, old);
        if immediate { alu::by_immediate(w, count, old, out) } else { out }
    })
}

/// ROL.
pub fn rol<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    rotate::<S>(x, i, alu::rol)
}

/// ROR.
pub fn ror<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    rotate::<S>(x, i, alu::ror)
}

/// RCL.
pub fn rcl(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<Any>(x, i, alu::rcl)
}

/// RCR.
pub fn rcr(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<Any>(x, i, alu::rcr)
}

/// Operand 0 is shifted by operand 2, bits of operand 1 move in.
fn double(x: &mut Exec<'_>, i: &Insn, f: impl Fn(Width, u64, u64, u64, Rflags) -> alu::Out) -> Step {
    let b = operand::read(x, i, 1)?;
    let count = operand::read(x, i, 2)?;
    let old = x.cpu.rflags;
    let mut status = Rflags::empty();
    operand::modify(x, i, |a| {
        let (r, f) = f(i.width, a, b, count, old);
        status = f;
        r
    })?;
    set_status(x, status);
    Ok(())
}

/// SHLD.
pub fn shld(x: &mut Exec<'_>, i: &Insn) -> Step {
    double(x, i, alu::shld)
}

/// SHRD.
pub fn shrd(x: &mut Exec<'_>, i: &Insn) -> Step {
    double(x, i, alu::shrd)
}
