//! Bitwise logic: AND OR XOR NOT TEST (SDM 2A, 2B).

use crate::interp::arith::{binary, set_status};
use crate::interp::{Exec, Step, alu, operand};
use crate::isa::Insn;

/// AND.
pub fn and(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary(x, i, |w, a, b, _| alu::and(w, a, b))
}

/// OR.
pub fn or(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary(x, i, |w, a, b, _| alu::or(w, a, b))
}

/// XOR.
pub fn xor(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary(x, i, |w, a, b, _| alu::xor(w, a, b))
}

/// TEST.
pub fn test(x: &mut Exec<'_>, i: &Insn) -> Step {
    let a = operand::read(x, i, 0)?;
    let b = operand::read(x, i, 1)?;
    set_status(x, alu::and(i.width, a, b).1);
    Ok(())
}

/// NOT: no flags.
pub fn not(x: &mut Exec<'_>, i: &Insn) -> Step {
    operand::modify(x, i, |a| !a)?;
    Ok(())
}
