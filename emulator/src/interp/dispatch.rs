//! Mnemonic to function: one match, one row a line, grouped by family. No row: #UD.

use crate::cpu::Fault;
use crate::interp::{Exec, Op, Step, hint};
use crate::isa::Insn;
use iced_x86::Mnemonic as M;

/// The function of an instruction.
#[rustfmt::skip] // one row a line
pub fn op(i: &Insn) -> Op {
    match i.iced.mnemonic() {
        // hint
        M::Nop | M::Reservednop => hint::nop,

        _ => undefined,
    }
}

/// No row: the offered CPU does not have the instruction.
pub fn undefined(_: &mut Exec<'_>, _: &Insn) -> Step {
    Err(Fault::Ud.into())
}
