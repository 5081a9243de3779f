//! Bitwise logic: AND OR XOR NOT TEST (SDM 2A, 2B).

use crate::interp::arith::{binary, set_status};
use crate::interp::shape::Shape;
use crate::interp::{Exec, Step, alu, operand};
use crate::isa::Insn;

/// AND.
pub fn and<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<S>(x, i, |w, a, b, _| alu::and(w, a, b))
}

/// OR.
pub fn or<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<S>(x, i, |w, a, b, _| alu::or(w, a, b))
}

/// XOR.
pub fn xor<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<S>(x, i, |w, a, b, _| alu::xor(w, a, b))
}

/// TEST.
pub fn test<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    let a = operand::read_as::<S>(x, i, 0)?;
    let b = operand::read_as::<S>(x, i, 1)?;
    set_status(x, alu::and(operand::width_of::<S>(i), a, b).1);
    Ok(())
}

/// NOT: no flags.
pub fn not<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    operand::modify_as::<S>(x, i, |a| !a)?;
    Ok(())
}
