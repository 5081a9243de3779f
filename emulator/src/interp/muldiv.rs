//! Multiplication and division: MUL IMUL DIV IDIV (SDM 2A, 2B).

use crate::cpu::{Fault, Rflags};
use crate::interp::arith::set_status;
use crate::interp::shape::Shape;
use crate::interp::{Exec, Step, alu, operand};
use crate::isa::{Gpr, Insn, Operand, Width};

/// A double-width value to AX, or to rDX:rAX.
fn write_pair(x: &mut Exec<'_>, w: Width, low: u64, high: u64) {
    if w == Width::B {
        x.cpu.write(Gpr::Rax, Width::W, high << 8 | low);
    } else {
        x.cpu.write(Gpr::Rax, w, low);
        x.cpu.write(Gpr::Rdx, w, high);
    }
}

/// MUL.
pub fn mul(x: &mut Exec<'_>, i: &Insn) -> Step {
    let b = operand::read(x, i, 0)?;
    let a = x.cpu.read(Gpr::Rax, i.width);
    let (low, high, f) = alu::mul(i.width, a, b, x.cpu.rflags);
    write_pair(x, i.width, low, high);
    set_status(x, f);
    Ok(())
}

/// IMUL with one, two or three operands.
pub fn imul<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = operand::width_of::<S>(i);
    if i.ops[1] == Operand::None {
        let (a, b) = (x.cpu.read(Gpr::Rax, w), operand::read(x, i, 0)?);
        let (low, high, f) = alu::imul(w, a, b, x.cpu.rflags);
        write_pair(x, w, low, high);
        set_status(x, f);
        return Ok(());
    }
    let (a, b) = match i.ops[2] {
        Operand::None => (operand::read_as::<S>(x, i, 0)?, operand::read_as::<S>(x, i, 1)?),
        _ => (operand::read_as::<S>(x, i, 1)?, operand::read(x, i, 2)?),
    };
    let (low, _, f) = alu::imul(w, a, b, x.cpu.rflags);
    operand::write_as::<S>(x, i, 0, low)?;
    set_status(x, f);
    Ok(())
}

type Division = fn(Width, u64, u64, u64, Rflags) -> Option<(u64, u64, Rflags)>;

/// Divides AX, or rDX:rAX. Division by zero and a quotient that does not fit: #DE, nothing changed.
fn divide(x: &mut Exec<'_>, i: &Insn, f: Division) -> Step {
    let w = i.width;
    let divisor = operand::read(x, i, 0)?;
    let low = x.cpu.read(Gpr::Rax, w);
    let high = match w {
        Width::B => x.cpu.read(Gpr::Rax, Width::W) >> 8,
        _ => x.cpu.read(Gpr::Rdx, w),
    };
    let (quotient, remainder, f) = f(w, high, low, divisor, x.cpu.rflags).ok_or(Fault::De)?;
    write_pair(x, w, quotient, remainder);
    set_status(x, f);
    Ok(())
}

/// DIV.
pub fn div(x: &mut Exec<'_>, i: &Insn) -> Step {
    divide(x, i, alu::div)
}

/// IDIV.
pub fn idiv(x: &mut Exec<'_>, i: &Insn) -> Step {
    divide(x, i, alu::idiv)
}
