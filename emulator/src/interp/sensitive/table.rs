//! LGDT LIDT LLDT LTR SGDT SIDT SLDT STR (SDM 2A, 2B). UMIP is checked by the facts, before.

use crate::cpu::descriptor::{Descriptor, is_null, kind, selector_error};
use crate::cpu::{CpuState, Fault, Segment, Table};
use crate::interp::access::{self, is_canonical, is_long64};
use crate::interp::sensitive::selector::{self, Found};
use crate::interp::{Exec, Step, Stop, operand};
use crate::isa::{Insn, MemRef, Width};
use iced_x86::Code;

/// The memory operand: SGDT and friends have no register form.
fn mem(i: &Insn) -> Result<MemRef, Stop> {
    i.mem().copied().ok_or_else(|| Fault::Ud.into())
}

/// Stores limit and base: 6 bytes, in 64-bit mode 10.
fn store(x: &mut Exec<'_>, i: &Insn, table: Table) -> Step {
    let m = mem(i)?;
    let offset = operand::effective_address(x, i, &m);
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let len = if is_long64(x.cpu) { 10 } else { 6 };
    access::write_bytes(x, m.seg, offset, &bytes[..len])
}

/// Loads limit and base.
fn fetch(x: &mut Exec<'_>, i: &Insn) -> Result<Table, Stop> {
    let m = mem(i)?;
    let offset = operand::effective_address(x, i, &m);
    let mut bytes = [0; 10];
    let len = if is_long64(x.cpu) { 10 } else { 6 };
    access::read_bytes(x, m.seg, offset, &mut bytes[..len])?;
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let mut base = 0;
    for b in bytes[2..].iter().rev() {
        base = base << 8 | u64::from(*b);
    }
    // "If the operand-size attribute is 16 bits, ... a 24-bit base (third, fourth, and fifth byte)".
    if matches!(i.iced.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0x00ff_ffff;
    }
    // "If the memory address (of the base) is in a non-canonical form": #GP(0).
    if is_long64(x.cpu) && !is_canonical(x.cpu, base) {
        return Err(Fault::Gp(0).into());
    }
    Ok(Table { base, limit })
}

/// SGDT.
pub fn sgdt(x: &mut Exec<'_>, i: &Insn) -> Step {
    store(x, i, x.cpu.gdtr)
}

/// SIDT.
pub fn sidt(x: &mut Exec<'_>, i: &Insn) -> Step {
    store(x, i, x.cpu.idtr)
}

/// LGDT.
pub fn lgdt(x: &mut Exec<'_>, i: &Insn) -> Step {
    x.cpu.gdtr = fetch(x, i)?;
    Ok(())
}

/// LIDT.
pub fn lidt(x: &mut Exec<'_>, i: &Insn) -> Step {
    x.cpu.idtr = fetch(x, i)?;
    Ok(())
}

/// SLDT, STR, LLDT, LTR are not recognized in real-address and virtual-8086 mode: #UD.
fn need_protected(cpu: &CpuState) -> Result<(), Fault> {
    if selector::is_protected(cpu) { Ok(()) } else { Err(Fault::Ud) }
}

/// SLDT: a register gets the selector zero-extended to its width, memory always 16 bits.
pub fn sldt(x: &mut Exec<'_>, i: &Insn) -> Step {
    need_protected(x.cpu)?;
    operand::write(x, i, 0, u64::from(x.cpu.ldtr.selector))
}

/// STR: as SLDT.
pub fn str(x: &mut Exec<'_>, i: &Insn) -> Step {
    need_protected(x.cpu)?;
    operand::write(x, i, 0, u64::from(x.cpu.tr.selector))
}

/// The descriptor of a system segment in the GDT, of one of the given types, present.
fn system_descriptor(x: &mut Exec<'_>, selector: u16, kinds: &[u8]) -> Result<Found, Stop> {
    let error = selector_error(selector);
    // "If the selector operand does not point into the GDT", "... is beyond the limit of the GDT": #GP(selector).
    if selector & 4 != 0 {
        return Err(Fault::Gp(error).into());
    }
    let found = selector::find_system(x, selector)?.ok_or(Fault::Gp(error))?;
    let d = found.descriptor;
    // "... or if the entry in the GDT is not a Local Descriptor Table / available TSS", and in IA-32e mode "if the descriptor type of
    // the upper 8-byte of the 16-byte descriptor is non-zero": #GP(selector).
    if !d.is_system() || !kinds.contains(&d.kind()) || d.high_kind() != 0 {
        return Err(Fault::Gp(error).into());
    }
    // "If the TSS (LDT descriptor) is marked not present": #NP(selector).
    if !d.present() {
        return Err(Fault::Np(error).into());
    }
    // In 64-bit mode the base must be canonical: #GP(selector).
    if selector::is_ia32e(x.cpu) && !is_canonical(x.cpu, d.base()) {
        return Err(Fault::Gp(error).into());
    }
    Ok(found)
}

/// LLDT.
pub fn lldt(x: &mut Exec<'_>, i: &Insn) -> Step {
    need_protected(x.cpu)?;
    let selector = operand::read(x, i, 0)? as u16;
    // "If bits 2-15 of the source operand are 0, LDTR is marked invalid and the LLDT instruction completes silently."
    if is_null(selector) {
        x.cpu.ldtr = Segment::unusable(selector);
        return Ok(());
    }
    let found = system_descriptor(x, selector, &[kind::LDT])?;
    x.cpu.ldtr = found.descriptor.segment(selector);
    Ok(())
}

/// LTR: the descriptor becomes busy, in memory too.
pub fn ltr(x: &mut Exec<'_>, i: &Insn) -> Step {
    need_protected(x.cpu)?;
    let selector = operand::read(x, i, 0)? as u16;
    // "If the source operand contains a NULL segment selector": #GP(0).
    if is_null(selector) {
        return Err(Fault::Gp(0).into());
    }
    // IA-32e mode knows no 16-bit TSS.
    let kinds: &[u8] =
        if selector::is_ia32e(x.cpu) { &[kind::TSS_AVAILABLE] } else { &[kind::TSS_AVAILABLE, kind::TSS16_AVAILABLE] };
    let mut found = system_descriptor(x, selector, kinds)?;
    set_busy(x, &mut found)?;
    x.cpu.tr = found.descriptor.segment(selector);
    Ok(())
}

/// Sets the busy bit of a TSS descriptor: bit 1 of the type.
fn set_busy(x: &mut Exec<'_>, found: &mut Found) -> Step {
    found.descriptor.low |= 1 << 41;
    let access = found.descriptor.low >> 40 & 0xff;
    access::store_system(x, found.laddr.wrapping_add(Descriptor::ACCESS_BYTE), Width::B, access)
}

#[cfg(test)]
mod tests {
    use crate::cpu::{Attr, Fault, Table};
    use crate::interp::sensitive::testing::*;
    use crate::interp::testing::DATA;
    use crate::isa::{Gpr, Width};
    use crate::vcpu::Exit;

    const SGDT: [u8; 8] = [0x0f, 0x01, 0x04, 0x25, 0, 0, 1, 0];
    const LGDT: [u8; 8] = [0x0f, 0x01, 0x14, 0x25, 0, 0, 1, 0];

    #[test]
    fn sgdt_stores_ten_bytes() {
        let mut m = machine(3, &SGDT);
        m.mem.write(DATA, &[0xff; 16]).expect("RAM");
        m.cpu().gdtr = Table { base: 0xffff_8000_1234_5678, limit: 0x7f };
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.load(DATA, Width::W), 0x7f);
        assert_eq!(m.load(DATA + 2, Width::Q), 0xffff_8000_1234_5678);
        assert_eq!(m.load(DATA + 10, Width::W), 0xffff);
    }

    #[test]
    fn lgdt_checks_the_base() {
        let mut m = machine(0, &LGDT);
        m.mem.store(DATA, Width::W, 0x1234).expect("RAM");
        m.mem.store(DATA + 2, Width::Q, 0xffff_8000_0000_1000).expect("RAM");
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().gdtr, Table { base: 0xffff_8000_0000_1000, limit: 0x1234 });
        let mut m = machine(0, &LGDT);
        m.mem.store(DATA + 2, Width::Q, 0x8000_0000_0000).expect("RAM");
        assert_eq!(m.run(1), Exit::Exception(Fault::Gp(0)));
        assert_eq!(m.cpu().gdtr.base, GDT);
    }

    /// LTR AX, LLDT AX.
    #[test]
    fn ltr_and_lldt() {
        let (ltr, lldt) = ([0x0f, 0x00, 0xd8], [0x0f, 0x00, 0xd0]);
        let gp = |s| Err(Exit::Exception(Fault::Gp(s)));
        for (code, selector, want) in [
            (ltr, TSS, Ok(())),
            (ltr, 0, gp(0)),
            (ltr, LDT, gp(LDT)),
            (ltr, 4, gp(4)),
            (ltr, 0xfff8, gp(0xfff8)),
            (ltr, KERNEL_DATA, gp(KERNEL_DATA)),
            (ltr, ABSENT_TSS, Err(Exit::Exception(Fault::Np(ABSENT_TSS)))),
            (lldt, LDT, Ok(())),
            (lldt, 2, Ok(())),
            (lldt, TSS, gp(TSS)),
        ] {
            let mut m = machine(0, &code);
            m.cpu().tr.selector = 0;
            m.cpu().gpr[Gpr::Rax as usize] = u64::from(selector);
            let exit = m.run(1);
            match want {
                Ok(()) => assert_eq!(exit, Exit::Budget, "{code:x?} {selector:x}"),
                Err(want) => assert_eq!(exit, want, "{code:x?} {selector:x}"),
            }
        }
        let mut m = machine(0, &ltr);
        m.cpu().gpr[Gpr::Rax as usize] = u64::from(TSS);
        assert_eq!(m.run(1), Exit::Budget);
        // Busy in the register and in memory; a second LTR faults.
        assert_eq!((m.cpu().tr.attr.kind(), m.cpu().tr.base, m.cpu().tr.limit), (0xb, TSS_BASE, 0x67));
        assert_eq!(m.load(GDT + u64::from(TSS) + 5, Width::B), 0x8b);
        m.cpu().rip = crate::interp::testing::CODE;
        assert_eq!(m.run(1), Exit::Exception(Fault::Gp(TSS)));
        let mut m = machine(0, &lldt);
        m.cpu().gpr[Gpr::Rax as usize] = 0;
        assert_eq!(m.run(1), Exit::Budget);
        assert!(m.cpu().ldtr.attr.contains(Attr::UNUSABLE));
    }

    /// STR EAX at CPL 3.
    #[test]
    fn str_register() {
        let mut m = machine(3, &[0x0f, 0x00, 0xc8]);
        m.cpu().tr.selector = TSS;
        m.cpu().gpr[0] = u64::MAX;
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().gpr[0], u64::from(TSS));
    }
}
