//! Instructions without an effect a guest can see: NOP, PAUSE, ENDBR, prefetches, cache line flushes, fences (SDM 2A-2D).

use crate::interp::{Exec, Step};
use crate::isa::Insn;

/// NOP, the reserved NOPs, and what behaves as one.
pub fn nop(_: &mut Exec<'_>, _: &Insn) -> Step {
    Ok(())
}
