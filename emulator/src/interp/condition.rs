//! Conditions of Jcc, SETcc and CMOVcc (SDM 1 appendix B), SETcc and CMOVcc themselves.

use crate::cpu::Rflags;
use crate::interp::shape::Shape;
use crate::interp::{Exec, Step, operand};
use crate::isa::Insn;
use iced_x86::ConditionCode as Cc;

/// Does the condition hold? With a constant condition this is a test of the flags and no more.
#[inline(always)]
pub fn condition(f: Rflags, cc: Cc) -> bool {
    let less = f.contains(Rflags::SF) != f.contains(Rflags::OF);
    match cc {
        Cc::None => true,
        Cc::o => f.contains(Rflags::OF),
        Cc::no => !f.contains(Rflags::OF),
        Cc::b => f.contains(Rflags::CF),
        Cc::ae => !f.contains(Rflags::CF),
        Cc::e => f.contains(Rflags::ZF),
        Cc::ne => !f.contains(Rflags::ZF),
        Cc::be => f.intersects(Rflags::CF.union(Rflags::ZF)),
        Cc::a => !f.intersects(Rflags::CF.union(Rflags::ZF)),
        Cc::s => f.contains(Rflags::SF),
        Cc::ns => !f.contains(Rflags::SF),
        Cc::p => f.contains(Rflags::PF),
        Cc::np => !f.contains(Rflags::PF),
        Cc::l => less,
        Cc::ge => !less,
        Cc::le => f.contains(Rflags::ZF) || less,
        Cc::g => !f.contains(Rflags::ZF) && !less,
    }
}

/// SETcc.
pub fn setcc(x: &mut Exec<'_>, i: &Insn) -> Step {
    let holds = condition(x.cpu.rflags, i.iced.condition_code());
    operand::write(x, i, 0, u64::from(holds))
}

/// CMOVcc: the source is read whatever the condition says, and a 32-bit destination loses its upper half.
pub fn cmovcc<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    let new = operand::read_as::<S>(x, i, 1)?;
    let old = operand::read_as::<S>(x, i, 0)?;
    let v = if condition(x.cpu.rflags, i.iced.condition_code()) { new } else { old };
    operand::write_as::<S>(x, i, 0, v)
}
