//! Operands: read, write, and read-modify-write, atomic under LOCK (SDM 2A 3.1.1.3, 3A 8.1.2).

use crate::cpu::CpuState;
use crate::interp::shape::{Any, Kind, Shape};
use crate::interp::{Exec, Step, Stop, access};
use crate::isa::{Base, Gpr, Insn, MemRef, Operand, Seg, Width};
use crate::mem::Access;
use iced_x86::Mnemonic;

/// Width of operand `n`: its own, or the operation's where it has none (immediates).
#[inline(always)]
pub fn width(i: &Insn, n: usize) -> Width {
    i.op_widths[n].unwrap_or(i.width)
}

/// The offset of a memory operand inside its segment, cut to the address width.
#[inline(always)]
pub fn effective_address(x: &Exec<'_>, _i: &Insn, m: &MemRef) -> u64 {
    address(x.cpu, x.next_rip, m)
}

/// The same without an [`Exec`]: `next_rip` is the address of the following instruction.
#[inline(always)]
pub fn address(cpu: &CpuState, next_rip: u64, m: &MemRef) -> u64 {
    let base = match m.base {
        Base::None => 0,
        Base::Reg(r) => cpu.gpr[r as usize],
        Base::Rip => next_rip,
    };
    let index = match m.index {
        Some(r) => cpu.gpr[r as usize] << m.scale,
        None => 0,
    };
    m.address.cut(base.wrapping_add(index).wrapping_add(m.disp))
}

/// Width of the operation.
#[inline(always)]
pub fn width_of<S: Shape>(i: &Insn) -> Width {
    match S::WIDTHS {
        Some([w, _]) => w,
        None => i.width,
    }
}

/// Width of operand `n` of an instruction of a shape.
#[inline(always)]
pub fn width_as<S: Shape>(i: &Insn, n: usize) -> Width {
    match S::WIDTHS {
        Some(widths) if n < 2 => widths[n],
        _ => width(i, n),
    }
}

#[inline(always)]
fn kind<S: Shape>(n: usize) -> Kind {
    if n < 2 { S::KINDS[n] } else { Kind::Any }
}

/// The offset of a memory operand of a known kind.
#[inline(always)]
pub fn address_as(x: &Exec<'_>, kind: Kind, m: &MemRef) -> u64 {
    match (kind, m.base) {
        (Kind::Base, Base::Reg(r)) => x.cpu.gpr[r as usize].wrapping_add(m.disp),
        _ => address(x.cpu, x.next_rip, m),
    }
}

/// Operand `n`, zero-extended from its own width; immediates as the decoder extended them, cut to the operation's width.
#[inline(always)]
pub fn read(x: &mut Exec<'_>, i: &Insn, n: usize) -> Result<u64, Stop> {
    read_as::<Any>(x, i, n)
}

/// The same, of an instruction of a shape.
#[inline(always)]
pub fn read_as<S: Shape>(x: &mut Exec<'_>, i: &Insn, n: usize) -> Result<u64, Stop> {
    let w = width_as::<S>(i, n);
    match (kind::<S>(n), &i.ops[n]) {
        (Kind::Any | Kind::Reg, Operand::Reg(r)) => Ok(x.cpu.read(*r, w)),
        (Kind::Any | Kind::Imm, Operand::Imm(v)) => Ok(width_of::<S>(i).cut(*v)),
        (Kind::Any, Operand::Mem(m)) => read_memory(x, m, w),
        (kind @ (Kind::Base | Kind::Mem), Operand::Mem(m)) => {
            let offset = address_as(x, kind, m);
            access::load(x, m.seg, offset, w)
        }
        (Kind::Any, Operand::HighByte(r)) => Ok(x.cpu.gpr[*r as usize] >> 8 & 0xff),
        _ => Err(Stop::exit(crate::vcpu::Exit::Unsupported)),
    }
}

#[inline(never)]
fn read_memory(x: &mut Exec<'_>, m: &MemRef, w: Width) -> Result<u64, Stop> {
    let offset = address(x.cpu, x.next_rip, m);
    access::load(x, m.seg, offset, w)
}

/// Writes operand `n`.
#[inline(always)]
pub fn write(x: &mut Exec<'_>, i: &Insn, n: usize, v: u64) -> Step {
    write_as::<Any>(x, i, n, v)
}

/// The same, of an instruction of a shape.
#[inline(always)]
pub fn write_as<S: Shape>(x: &mut Exec<'_>, i: &Insn, n: usize, v: u64) -> Step {
    let w = width_as::<S>(i, n);
    match (kind::<S>(n), &i.ops[n]) {
        (Kind::Any, Operand::Mem(m)) => write_memory(x, m, w, v),
        (kind @ (Kind::Base | Kind::Mem), Operand::Mem(m)) => {
            let offset = address_as(x, kind, m);
            access::store(x, m.seg, offset, w, v)
        }
        (Kind::Any | Kind::Reg, op) => write_register(x.cpu, op, w, v),
        _ => Err(Stop::exit(crate::vcpu::Exit::Unsupported)),
    }
}

#[inline(never)]
fn write_memory(x: &mut Exec<'_>, m: &MemRef, w: Width, v: u64) -> Step {
    let offset = address(x.cpu, x.next_rip, m);
    access::store(x, m.seg, offset, w, v)
}

/// Writes a register operand; what is none leaves the engine.
#[inline(always)]
fn write_register(cpu: &mut CpuState, op: &Operand, w: Width, v: u64) -> Step {
    match op {
        Operand::Reg(r) => cpu.write(*r, w, v),
        Operand::HighByte(r) => write_high_byte(cpu, *r, v),
        _ => return Err(Stop::exit(crate::vcpu::Exit::Unsupported)),
    }
    Ok(())
}

/// Sets bits 15:8 of a register.
#[inline(always)]
pub fn write_high_byte(cpu: &mut CpuState, r: Gpr, v: u64) {
    let slot = &mut cpu.gpr[r as usize];
    *slot = (*slot & !0xff00) | (v & 0xff) << 8;
}

/// Read-modify-write of operand 0: gives the old and the new value. Memory is checked for writing before it is read; under LOCK, and
/// always for XCHG, the exchange is atomic and `f` may be called several times.
#[inline]
pub fn modify(x: &mut Exec<'_>, i: &Insn, f: impl FnMut(u64) -> u64) -> Result<(u64, u64), Stop> {
    modify_as::<Any>(x, i, f)
}

/// The same, of an instruction of a shape.
#[inline(always)]
pub fn modify_as<S: Shape>(x: &mut Exec<'_>, i: &Insn, mut f: impl FnMut(u64) -> u64) -> Result<(u64, u64), Stop> {
    let w = width_as::<S>(i, 0);
    match (kind::<S>(0), &i.ops[0]) {
        (kind @ (Kind::Any | Kind::Base | Kind::Mem), Operand::Mem(m)) => {
            let offset = address_as(x, kind, m);
            let locked = S::WIDTHS.is_none() && is_locked(i);
            exchange(x, m.seg, offset, w, locked, f)
        }
        (Kind::Any | Kind::Reg, Operand::Reg(r)) => {
            let old = x.cpu.read(*r, w);
            let new = w.cut(f(old));
            x.cpu.write(*r, w, new);
            Ok((old, new))
        }
        (Kind::Any, op) => {
            let old = read(x, i, 0)?;
            let new = w.cut(f(old));
            write_register(x.cpu, op, w, new)?;
            Ok((old, new))
        }
        _ => Err(Stop::exit(crate::vcpu::Exit::Unsupported)),
    }
}

#[inline(always)]
fn is_locked(i: &Insn) -> bool {
    i.iced.has_lock_prefix() || i.iced.mnemonic() == Mnemonic::Xchg
}

/// Read-modify-write of memory: the same for an address that is not operand 0's own.
#[inline]
pub fn modify_memory(
    x: &mut Exec<'_>,
    i: &Insn,
    seg: Seg,
    offset: u64,
    w: Width,
    f: impl FnMut(u64) -> u64,
) -> Result<(u64, u64), Stop> {
    exchange(x, seg, offset, w, is_locked(i), f)
}

#[inline(always)]
fn exchange(
    x: &mut Exec<'_>,
    seg: Seg,
    offset: u64,
    w: Width,
    locked: bool,
    mut f: impl FnMut(u64) -> u64,
) -> Result<(u64, u64), Stop> {
    let place = access::place_for(x, seg, offset, w, Access::Write)?;
    loop {
        let old = access::load_at(x, &place, w)?;
        let new = w.cut(f(old));
        if !locked {
            access::store_at(x, &place, w, new)?;
            return Ok((old, new));
        }
        if access::compare_exchange_at(x, &place, w, old, new)? == old {
            return Ok((old, new));
        }
    }
}
