//! Addition and its kin: ADD ADC SUB SBB CMP INC DEC NEG ADCX ADOX, and BOUND (SDM 2A, 2B).

use crate::cpu::{Fault, Rflags};
use crate::interp::alu::Vendor;
use crate::interp::shape::{Any, Shape};
use crate::interp::{Exec, Step, access, alu, operand};
use crate::isa::{Insn, Operand, Width};

/// Sets the six status flags.
#[inline(always)]
pub(super) fn set_status(x: &mut Exec<'_>, f: Rflags) {
    x.cpu.rflags.replace(Rflags::STATUS, f);
}

/// Operand 0 becomes `f(width, operand 0, operand 1, flags)`.
#[inline(always)]
pub(super) fn binary<S: Shape>(x: &mut Exec<'_>, i: &Insn, f: impl Fn(Width, u64, u64, Rflags) -> alu::Out) -> Step {
    let b = operand::read_as::<S>(x, i, 1)?;
    let old = x.cpu.rflags;
    let mut status = Rflags::empty();
    operand::modify_as::<S>(x, i, |a| {
        let (r, f) = f(operand::width_of::<S>(i), a, b, old);
        status = f;
        r
    })?;
    set_status(x, status);
    Ok(())
}

/// Operand 0 becomes `f(width, operand 0, flags)`.
#[inline(always)]
pub(super) fn unary<S: Shape>(x: &mut Exec<'_>, i: &Insn, f: impl Fn(Width, u64, Rflags) -> alu::Out) -> Step {
    let old = x.cpu.rflags;
    let mut status = Rflags::empty();
    operand::modify_as::<S>(x, i, |a| {
        let (r, f) = f(operand::width_of::<S>(i), a, old);
        status = f;
        r
    })?;
    set_status(x, status);
    Ok(())
}

/// ADD.
pub fn add<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<S>(x, i, |w, a, b, _| alu::add(w, a, b, false))
}

/// ADC.
pub fn adc<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<S>(x, i, |w, a, b, f| alu::add(w, a, b, f.contains(Rflags::CF)))
}

/// SUB.
pub fn sub<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<S>(x, i, |w, a, b, _| alu::sub(w, a, b, false))
}

/// SBB.
pub fn sbb<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<S>(x, i, |w, a, b, f| alu::sub(w, a, b, f.contains(Rflags::CF)))
}

/// CMP.
pub fn cmp<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    let a = operand::read_as::<S>(x, i, 0)?;
    let b = operand::read_as::<S>(x, i, 1)?;
    set_status(x, alu::sub(operand::width_of::<S>(i), a, b, false).1);
    Ok(())
}

/// INC.
pub fn inc<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    unary::<S>(x, i, alu::inc)
}

/// DEC.
pub fn dec<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    unary::<S>(x, i, alu::dec)
}

/// NEG.
pub fn neg<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    unary::<S>(x, i, |w, a, _| alu::neg(w, a))
}

/// ADCX.
pub fn adcx(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<Any>(x, i, alu::adcx)
}

/// ADOX.
pub fn adox(x: &mut Exec<'_>, i: &Insn) -> Step {
    binary::<Any>(x, i, alu::adox)
}

/// BOUND: lower bound at the operand, upper bound behind it, both signed and inclusive.
pub fn bound(x: &mut Exec<'_>, i: &Insn) -> Step {
    let Operand::Mem(m) = i.ops[1] else { return Err(Fault::Ud.into()) };
    let w = i.width;
    let signed = |v| w.sign_extend(v) as i64;
    let index = signed(operand::read(x, i, 0)?);
    let offset = operand::effective_address(x, i, &m);
    let lower = signed(access::load(x, m.seg, offset, w)?);
    // Raptor Cove compares before it reads the other bound; Zen 4 reads both first.
    if index < lower && Vendor::host() == Vendor::Intel {
        return Err(Fault::Br.into());
    }
    let upper = signed(access::load(x, m.seg, m.address.cut(offset.wrapping_add(w.bytes())), w)?);
    if index < lower || index > upper {
        return Err(Fault::Br.into());
    }
    Ok(())
}
