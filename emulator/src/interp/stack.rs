//! The stack: one place that knows its address size (SDM 1 6.2.3, 6.2.5), and PUSH, POP, PUSHA, POPA, ENTER, LEAVE.

use crate::cpu::{Attr, CpuState};
use crate::interp::access::{self, is_long64};
use crate::interp::{Exec, Step, Stop};
use crate::isa::{Gpr, Seg, Width};

/// The stack-address size: 64 bits in 64-bit mode, else by the B flag of SS.
#[inline(always)]
pub fn address_width(cpu: &CpuState) -> Width {
    if is_long64(cpu) {
        Width::Q
    } else if cpu.seg[Seg::Ss as usize].attr.contains(Attr::DB) {
        Width::D
    } else {
        Width::W
    }
}

/// The stack pointer, cut to the stack-address size.
#[inline(always)]
pub fn pointer(cpu: &CpuState) -> u64 {
    cpu.read(Gpr::Rsp, address_width(cpu))
}

/// Sets the stack pointer: SP, ESP or RSP.
#[inline(always)]
pub fn set_pointer(cpu: &mut CpuState, v: u64) {
    let w = address_width(cpu);
    // Unlike a register write, a 32-bit stack pointer keeps nothing to keep: bits 63:32 are zero outside 64-bit mode.
    cpu.write(Gpr::Rsp, w, v);
}

/// Adds to RSP, ESP or SP.
#[inline(always)]
pub fn adjust(x: &mut Exec<'_>, delta: i64) {
    let v = pointer(x.cpu).wrapping_add_signed(delta);
    set_pointer(x.cpu, v);
}

/// Pushes one value; RSP moves when the store is done.
///
/// # Errors
/// #SS, #PF, #AC.
#[inline(always)]
pub fn push(x: &mut Exec<'_>, w: Width, v: u64) -> Step {
    let a = address_width(x.cpu);
    let to = a.cut(x.cpu.gpr[Gpr::Rsp as usize].wrapping_sub(w.bytes()));
    access::store(x, Seg::Ss, to, w, v)?;
    x.cpu.write(Gpr::Rsp, a, to);
    Ok(())
}

/// Pops one value.
///
/// # Errors
/// #SS, #PF, #AC.
#[inline(always)]
pub fn pop(x: &mut Exec<'_>, w: Width) -> Result<u64, Stop> {
    let a = address_width(x.cpu);
    let from = a.cut(x.cpu.gpr[Gpr::Rsp as usize]);
    let v = access::load(x, Seg::Ss, from, w)?;
    x.cpu.write(Gpr::Rsp, a, from.wrapping_add(w.bytes()));
    Ok(v)
}

/// Reads `depth_bytes` above the top without moving RSP.
///
/// # Errors
/// #SS, #PF, #AC.
pub fn peek(x: &mut Exec<'_>, depth_bytes: u64, w: Width) -> Result<u64, Stop> {
    let a = address_width(x.cpu);
    let from = a.cut(x.cpu.gpr[Gpr::Rsp as usize].wrapping_add(depth_bytes));
    access::load(x, Seg::Ss, from, w)
}
