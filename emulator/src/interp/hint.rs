//! Instructions without an effect a guest can see: NOP, PAUSE, ENDBR, prefetches, cache line flushes, fences (SDM 2A-2D).

use crate::cpu::Fault;
use crate::interp::alu::Vendor;
use crate::interp::{Exec, Step, access, operand};
use crate::isa::{Insn, Width};
use crate::mem::Access;
use iced_x86::{Code, OpKind};
use std::sync::atomic::{Ordering, fence};

/// NOP, the reserved NOPs, PAUSE, ENDBR, and the prefetches: no memory is touched, no fault is raised.
pub fn nop(_: &mut Exec<'_>, _: &Insn) -> Step {
    Ok(())
}

/// The reserved NOPs. 0F 0D with a register is one on Intel's CPUs; on AMD's it is a PREFETCH without memory, #UD (APM 3 PREFETCH).
pub fn reserved_nop(_: &mut Exec<'_>, i: &Insn) -> Step {
    let prefetch = matches!(
        i.iced.code(),
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    );
    if prefetch && i.iced.op0_kind() == OpKind::Register && Vendor::host() == Vendor::Amd {
        return Err(Fault::Ud.into());
    }
    Ok(())
}

/// MFENCE, LFENCE, SFENCE: other vCPUs are other threads.
pub fn mfence(_: &mut Exec<'_>, _: &Insn) -> Step {
    fence(Ordering::SeqCst);
    Ok(())
}

/// CLFLUSH, CLFLUSHOPT, CLWB, CLDEMOTE: checked like a load of one byte, but allowed in execute-only code segments; caches are the host's.
pub fn clflush(x: &mut Exec<'_>, i: &Insn) -> Step {
    let Some(m) = i.mem() else { return Ok(()) };
    let offset = operand::effective_address(x, i, m);
    if x.mem.flat().is_some() {
        return access::check(x, m.seg, offset, Width::B.bytes(), Access::Read);
    }
    let laddr = access::linear(x, m.seg, offset, Width::B.bytes(), Access::Execute)?;
    let by = access::accessor(x.cpu);
    access::place(x, laddr, Width::B.bytes(), Access::Read, by).map(|_| ())
}
