//! Moves without arithmetic: MOV, MOVZX, MOVSX, XCHG, BSWAP, LEA, XLAT, sign extensions of the accumulator (SDM 2A, 2B).

use crate::interp::shape::Shape;
use crate::interp::{Exec, Step, access, operand};
use crate::isa::{Gpr, Insn, Operand, Width};
use iced_x86::Code;

/// MOV of general registers, memory and immediates; MOVNTI; MOVZX.
pub fn mov<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    let v = operand::read_as::<S>(x, i, 1)?;
    operand::write_as::<S>(x, i, 0, v)
}

/// MOVSX, MOVSXD.
pub fn movsx<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    let v = operand::width_as::<S>(i, 1).sign_extend(operand::read_as::<S>(x, i, 1)?);
    operand::write_as::<S>(x, i, 0, operand::width_of::<S>(i).cut(v))
}

/// XCHG: atomic with memory, LOCK or not.
pub fn xchg(x: &mut Exec<'_>, i: &Insn) -> Step {
    let b = operand::read(x, i, 1)?;
    let (a, _) = operand::modify(x, i, |_| b)?;
    operand::write(x, i, 1, a)
}

fn swap_bytes(w: Width, v: u64) -> u64 {
    v.swap_bytes() >> (64 - w.bits())
}

/// BSWAP. With a 16-bit register it is undefined: CPUs of both vendors clear the register.
pub fn bswap(x: &mut Exec<'_>, i: &Insn) -> Step {
    let v = if i.width == Width::W { 0 } else { swap_bytes(i.width, operand::read(x, i, 0)?) };
    operand::write(x, i, 0, v)
}

/// MOVBE.
pub fn movbe(x: &mut Exec<'_>, i: &Insn) -> Step {
    let v = operand::read(x, i, 1)?;
    operand::write(x, i, 0, swap_bytes(i.width, v))
}

/// LEA: the offset, cut or zero-extended from the address size to the operand size.
pub fn lea<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    if let Operand::Mem(m) = &i.ops[1] {
        let offset = operand::address_as(x, S::KINDS[1], m);
        operand::write_as::<S>(x, i, 0, operand::width_of::<S>(i).cut(offset))?;
    }
    Ok(())
}

/// XLAT: AL = [rBX + AL]; iced calls AL the index register.
pub fn xlat(x: &mut Exec<'_>, i: &Insn) -> Step {
    if let Operand::Mem(m) = i.ops[0] {
        let al = x.cpu.read(Gpr::Rax, Width::B);
        let offset = m.address.cut(x.cpu.gpr[Gpr::Rbx as usize].wrapping_add(al));
        let v = access::load(x, m.seg, offset, Width::B)?;
        x.cpu.write(Gpr::Rax, Width::B, v);
    }
    Ok(())
}

/// CBW, CWDE, CDQE: the accumulator sign-extended from half its width.
pub fn cbw(x: &mut Exec<'_>, i: &Insn) -> Step {
    let (from, to) = match i.iced.code() {
        Code::Cbw => (Width::B, Width::W),
        Code::Cwde => (Width::W, Width::D),
        _ => (Width::D, Width::Q),
    };
    let v = from.sign_extend(x.cpu.read(Gpr::Rax, from));
    x.cpu.write(Gpr::Rax, to, v);
    Ok(())
}

/// CWD, CDQ, CQO: the accumulator's sign fills rDX.
pub fn cwd(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = match i.iced.code() {
        Code::Cwd => Width::W,
        Code::Cdq => Width::D,
        _ => Width::Q,
    };
    let negative = x.cpu.gpr[Gpr::Rax as usize] & w.sign() != 0;
    x.cpu.write(Gpr::Rdx, w, if negative { u64::MAX } else { 0 });
    Ok(())
}
