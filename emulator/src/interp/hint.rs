//! Instructions without an effect a guest can see: NOP, PAUSE, ENDBR, prefetches, cache line flushes, fences (SDM 2A-2D).

use crate::interp::{Exec, Step, access, operand};
use crate::isa::{Insn, Width};
use crate::mem::Access;
use std::sync::atomic::{Ordering, fence};

/// NOP, the reserved NOPs, PAUSE, ENDBR, and the prefetches: no memory is touched, no fault is raised.
pub fn nop(_: &mut Exec<'_>, _: &Insn) -> Step {
    Ok(())
}

/// MFENCE, LFENCE, SFENCE: other vCPUs are other threads.
pub fn mfence(_: &mut Exec<'_>, _: &Insn) -> Step {
    fence(Ordering::SeqCst);
    Ok(())
}

/// CLFLUSH, CLFLUSHOPT, CLWB, CLDEMOTE: checked like a load of one byte; caches are the host's.
pub fn clflush(x: &mut Exec<'_>, i: &Insn) -> Step {
    if let Some(m) = i.mem() {
        let offset = operand::effective_address(x, i, m);
        access::check(x, m.seg, offset, Width::B.bytes(), Access::Read)?;
    }
    Ok(())
}
