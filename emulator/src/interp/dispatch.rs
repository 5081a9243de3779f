//! Mnemonic to function: one match, one row a line, grouped by family. No row: #UD.

use crate::cpu::Fault;
use crate::interp::sensitive::{eflags, segment, table, time};
use crate::interp::{Exec, Op, Step, hint};
use crate::isa::{Class, Insn};
use iced_x86::Mnemonic as M;

/// The function of an instruction.
#[rustfmt::skip] // one row a line
pub fn op(i: &Insn) -> Op {
    match i.iced.mnemonic() {
        // sensitive: segments and descriptors; before the plain forms of MOV, PUSH, POP, CALL, JMP
        M::Mov if i.facts.class == Class::Segment => segment::mov,
        M::Push if i.facts.class == Class::Segment => segment::push,
        M::Pop if i.facts.class == Class::Segment => segment::pop,
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => segment::load_far_pointer,
        M::Arpl => segment::arpl,
        M::Lar => segment::lar,
        M::Lsl => segment::lsl,
        M::Verr => segment::verr,
        M::Verw => segment::verw,
        M::Swapgs => segment::swapgs,
        M::Rdfsbase | M::Rdgsbase => segment::rdbase,
        M::Wrfsbase | M::Wrgsbase => segment::wrbase,

        // sensitive: flags, tables, time
        M::Pushf | M::Pushfd | M::Pushfq => eflags::pushf,
        M::Popf | M::Popfd | M::Popfq => eflags::popf,
        M::Cli => eflags::cli,
        M::Sti => eflags::sti,
        M::Sgdt => table::sgdt,
        M::Sidt => table::sidt,
        M::Sldt => table::sldt,
        M::Str => table::str,
        M::Lgdt => table::lgdt,
        M::Lidt => table::lidt,
        M::Lldt => table::lldt,
        M::Ltr => table::ltr,
        M::Rdtsc => time::rdtsc,
        M::Rdtscp => time::rdtscp,
        M::Rdpmc => time::rdpmc,
        M::Rdrand | M::Rdseed => time::rdrand,

        // hint
        M::Nop | M::Reservednop => hint::nop,

        _ => undefined,
    }
}

/// No row: the offered CPU does not have the instruction.
pub fn undefined(_: &mut Exec<'_>, _: &Insn) -> Step {
    Err(Fault::Ud.into())
}
