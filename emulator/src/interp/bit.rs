//! Bit tests and scans: BT BTS BTR BTC BSF BSR TZCNT LZCNT POPCNT (SDM 2A, 2B, 2D), CRC32.

use crate::interp::arith::set_status;
use crate::interp::{Exec, Step, access, alu, operand};
use crate::isa::{Gpr, Insn, MemRef, Operand, Width};

/// SDM 2A 3.1.1.9: a bit offset in a register is signed and reaches beyond a memory operand; an immediate does not.
fn bit_address(x: &Exec<'_>, i: &Insn, m: &MemRef, bit: u64) -> u64 {
    let offset = operand::effective_address(x, i, m);
    match i.ops[1] {
        Operand::Reg(_) => {
            let bits = i64::from(i.width.bits());
            let element = (i.width.sign_extend(bit) as i64).div_euclid(bits);
            m.address.cut(offset.wrapping_add_signed(element.wrapping_mul(bits / 8)))
        }
        _ => offset,
    }
}

/// BT.
pub fn bt(x: &mut Exec<'_>, i: &Insn) -> Step {
    let bit = operand::read(x, i, 1)?;
    let v = match i.ops[0] {
        Operand::Mem(m) => {
            let offset = bit_address(x, i, &m, bit);
            access::load(x, m.seg, offset, i.width)?
        }
        _ => operand::read(x, i, 0)?,
    };
    set_status(x, alu::bt(i.width, v, bit, x.cpu.rflags));
    Ok(())
}

/// The bit is tested, then the operand becomes `f(operand, mask of the bit)`.
#[inline(always)]
fn test_and(x: &mut Exec<'_>, i: &Insn, f: impl Fn(u64, u64) -> u64) -> Step {
    let bit = operand::read(x, i, 1)?;
    let mask = alu::bit_mask(i.width, bit);
    let (old, _) = match i.ops[0] {
        Operand::Mem(m) => {
            let offset = bit_address(x, i, &m, bit);
            operand::modify_memory(x, i, m.seg, offset, i.width, |v| f(v, mask))?
        }
        _ => operand::modify(x, i, |v| f(v, mask))?,
    };
    set_status(x, alu::bt(i.width, old, bit, x.cpu.rflags));
    Ok(())
}

/// BTS.
pub fn bts(x: &mut Exec<'_>, i: &Insn) -> Step {
    test_and(x, i, |v, mask| v | mask)
}

/// BTR.
pub fn btr(x: &mut Exec<'_>, i: &Insn) -> Step {
    test_and(x, i, |v, mask| v & !mask)
}

/// BTC.
pub fn btc(x: &mut Exec<'_>, i: &Insn) -> Step {
    test_and(x, i, |v, mask| v ^ mask)
}

/// BSF.
pub fn bsf(x: &mut Exec<'_>, i: &Insn) -> Step {
    let v = operand::read(x, i, 1)?;
    scanned(x, i, alu::bsf(i.width, v))
}

/// BSR.
pub fn bsr(x: &mut Exec<'_>, i: &Insn) -> Step {
    let v = operand::read(x, i, 1)?;
    scanned(x, i, alu::bsr(i.width, v))
}

fn scanned(x: &mut Exec<'_>, i: &Insn, (index, f): (Option<u64>, crate::cpu::Rflags)) -> Step {
    if let Some(index) = index {
        operand::write(x, i, 0, index)?;
    }
    set_status(x, f);
    Ok(())
}

/// Operand 0 becomes `f(width, operand 1)`.
#[inline(always)]
fn counted(x: &mut Exec<'_>, i: &Insn, f: impl Fn(Width, u64) -> alu::Out) -> Step {
    let v = operand::read(x, i, 1)?;
    let (r, f) = f(i.width, v);
    operand::write(x, i, 0, r)?;
    set_status(x, f);
    Ok(())
}

/// TZCNT.
pub fn tzcnt(x: &mut Exec<'_>, i: &Insn) -> Step {
    let old = x.cpu.rflags;
    counted(x, i, |w, v| alu::tzcnt(w, v, old))
}

/// LZCNT.
pub fn lzcnt(x: &mut Exec<'_>, i: &Insn) -> Step {
    let old = x.cpu.rflags;
    counted(x, i, |w, v| alu::lzcnt(w, v, old))
}

/// POPCNT.
pub fn popcnt(x: &mut Exec<'_>, i: &Insn) -> Step {
    counted(x, i, |_, v| alu::popcnt(v))
}

/// CRC32: bits 63:32 of a 64-bit destination become zero.
pub fn crc32(x: &mut Exec<'_>, i: &Insn) -> Step {
    let v = operand::read(x, i, 1)?;
    let crc = operand::read(x, i, 0)?;
    operand::write(x, i, 0, alu::crc32(operand::width(i, 1), crc, v))
}

/// The BMI instructions are VEX-encoded: #UD in real and virtual-8086 mode (SDM 2A 2.8, exception class 13).
fn check_vex(x: &Exec<'_>) -> Step {
    if x.cpu.mode().is_real_like() {
        return Err(crate::cpu::Fault::Ud.into());
    }
    Ok(())
}

/// Operand 0 becomes `f(width, operand 1, operand 2)`, with flags.
#[inline(always)]
fn ternary(x: &mut Exec<'_>, i: &Insn, f: impl Fn(Width, u64, u64) -> alu::Out) -> Step {
    check_vex(x)?;
    let a = operand::read(x, i, 1)?;
    let b = operand::read(x, i, 2)?;
    let (r, f) = f(i.width, a, b);
    operand::write(x, i, 0, r)?;
    set_status(x, f);
    Ok(())
}

/// The same without flags.
#[inline(always)]
fn ternary_no_flags(x: &mut Exec<'_>, i: &Insn, f: impl Fn(Width, u64, u64) -> u64) -> Step {
    check_vex(x)?;
    let a = operand::read(x, i, 1)?;
    let b = operand::read(x, i, 2)?;
    operand::write(x, i, 0, f(i.width, a, b))
}

/// ANDN.
pub fn andn(x: &mut Exec<'_>, i: &Insn) -> Step {
    ternary(x, i, alu::andn)
}

/// BEXTR.
pub fn bextr(x: &mut Exec<'_>, i: &Insn) -> Step {
    ternary(x, i, alu::bextr)
}

/// BZHI.
pub fn bzhi(x: &mut Exec<'_>, i: &Insn) -> Step {
    ternary(x, i, alu::bzhi)
}

/// BLSI.
pub fn blsi(x: &mut Exec<'_>, i: &Insn) -> Step {
    check_vex(x)?;
    counted(x, i, alu::blsi)
}

/// BLSMSK.
pub fn blsmsk(x: &mut Exec<'_>, i: &Insn) -> Step {
    check_vex(x)?;
    counted(x, i, alu::blsmsk)
}

/// BLSR.
pub fn blsr(x: &mut Exec<'_>, i: &Insn) -> Step {
    check_vex(x)?;
    counted(x, i, alu::blsr)
}

/// PDEP.
pub fn pdep(x: &mut Exec<'_>, i: &Insn) -> Step {
    ternary_no_flags(x, i, |_, v, mask| alu::pdep(v, mask))
}

/// PEXT.
pub fn pext(x: &mut Exec<'_>, i: &Insn) -> Step {
    ternary_no_flags(x, i, |_, v, mask| alu::pext(v, mask))
}

/// RORX.
pub fn rorx(x: &mut Exec<'_>, i: &Insn) -> Step {
    ternary_no_flags(x, i, alu::rorx)
}

/// SARX.
pub fn sarx(x: &mut Exec<'_>, i: &Insn) -> Step {
    ternary_no_flags(x, i, alu::sarx)
}

/// SHLX.
pub fn shlx(x: &mut Exec<'_>, i: &Insn) -> Step {
    ternary_no_flags(x, i, alu::shlx)
}

/// SHRX.
pub fn shrx(x: &mut Exec<'_>, i: &Insn) -> Step {
    ternary_no_flags(x, i, alu::shrx)
}

/// MULX: rDX times operand 2; the low half goes to operand 1, then the high half to operand 0, which wins if they are the same.
pub fn mulx(x: &mut Exec<'_>, i: &Insn) -> Step {
    check_vex(x)?;
    let a = x.cpu.read(Gpr::Rdx, i.width);
    let b = operand::read(x, i, 2)?;
    let (low, high, _) = alu::mul(i.width, a, b, x.cpu.rflags);
    operand::write(x, i, 1, low)?;
    operand::write(x, i, 0, high)
}
