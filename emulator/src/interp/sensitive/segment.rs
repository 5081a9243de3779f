//! MOV PUSH POP of segment registers, LDS LES LFS LGS LSS, ARPL LAR LSL VERR VERW, SWAPGS, RDFSBASE and its family
//! (SDM 2A-2D).

use crate::cpu::descriptor::{Descriptor, is_null, kind, rpl};
use crate::cpu::{Cr4, Fault, Rflags};
use crate::interp::access::{self, is_canonical, is_long64};
use crate::interp::alu::Vendor;
use crate::interp::sensitive::far::selector_width;
use crate::interp::sensitive::selector;
use crate::interp::{Exec, Step, Stop, operand, stack};
use crate::isa::{Gpr, Insn, Seg, Width};
use iced_x86::{Mnemonic, OpKind};

/// The segment register that operand `n` is.
fn sreg(i: &Insn, n: u32) -> Result<Seg, Fault> {
    Seg::from_iced(i.iced.op_register(n)).ok_or(Fault::Ud)
}

/// Interrupts and debug traps are held for one instruction after SS was loaded by MOV or POP, so that the stack pointer can follow
/// (SDM 3A 6.8.3). LSS loads both and needs no shadow.
fn shadow_after(x: &mut Exec<'_>, seg: Seg) {
    if seg == Seg::Ss {
        (x.cpu.interrupt_shadow, x.cpu.ss_shadow) = (true, true);
    }
}

/// MOV r/m, Sreg and MOV Sreg, r/m.
pub fn mov(x: &mut Exec<'_>, i: &Insn) -> Step {
    if i.iced.op_kind(0) == OpKind::Register && i.iced.op0_register().is_segment_register() {
        mov_to_sreg(x, i)
    } else {
        mov_from_sreg(x, i)
    }
}

/// A register gets the selector zero-extended to its width, memory always 16 bits.
fn mov_from_sreg(x: &mut Exec<'_>, i: &Insn) -> Step {
    let seg = sreg(i, 1)?;
    let selector = u64::from(x.cpu.segment(seg).selector);
    operand::write(x, i, 0, selector)
}

fn mov_to_sreg(x: &mut Exec<'_>, i: &Insn) -> Step {
    let seg = sreg(i, 0)?;
    // "If attempt is made to load the CS register": #UD.
    if seg == Seg::Cs {
        return Err(Fault::Ud.into());
    }
    let selector = operand::read(x, i, 1)? as u16;
    selector::load(x, seg, selector)?;
    shadow_after(x, seg);
    Ok(())
}

/// PUSH Sreg.
pub fn push(x: &mut Exec<'_>, i: &Insn) -> Step {
    let seg = sreg(i, 0)?;
    let w = i.width;
    let selector = u64::from(x.cpu.segment(seg).selector);
    if w != Width::D || Vendor::host() == Vendor::Amd {
        // Zen 4 zero-extends.
        return stack::push(x, w, selector);
    }
    // "if the operand size is 32 bits, ... all recent Intel Core and Atom processors perform a 16-bit move, leaving the upper portion of
    // the stack location unmodified."
    let a = stack::address_width(x.cpu);
    let to = a.cut(stack::pointer(x.cpu).wrapping_sub(w.bytes()));
    access::store(x, Seg::Ss, to, Width::W, selector)?;
    stack::set_pointer(x.cpu, to);
    Ok(())
}

/// POP Sreg: only the low word of the slot is the selector. Zen 4 reads all of it, Raptor Cove only the word.
pub fn pop(x: &mut Exec<'_>, i: &Insn) -> Step {
    let seg = sreg(i, 0)?;
    let w = i.width;
    let selector = stack::peek(x, 0, selector_width(w))? as u16;
    // The stack-address size is that of the SS before.
    let old = x.cpu.gpr[Gpr::Rsp as usize];
    stack::adjust(x, w.bytes() as i64);
    if let Err(stop) = selector::load(x, seg, selector) {
        x.cpu.gpr[Gpr::Rsp as usize] = old;
        return Err(stop);
    }
    shadow_after(x, seg);
    Ok(())
}

/// LDS LES LFS LGS LSS: offset, then selector behind it.
pub fn load_far_pointer(x: &mut Exec<'_>, i: &Insn) -> Step {
    let seg = match i.iced.mnemonic() {
        Mnemonic::Lds => Seg::Ds,
        Mnemonic::Les => Seg::Es,
        Mnemonic::Lfs => Seg::Fs,
        Mnemonic::Lgs => Seg::Gs,
        _ => Seg::Ss,
    };
    // "If source operand is not a memory location": #UD.
    let m = i.mem().copied().ok_or(Fault::Ud)?;
    let w = operand::width(i, 0);
    let at = operand::effective_address(x, i, &m);
    let behind = m.address.cut(at.wrapping_add(w.bytes()));
    let offset = access::load(x, m.seg, at, w)?;
    let selector = access::load(x, m.seg, behind, Width::W)? as u16;
    selector::load(x, seg, selector)?;
    operand::write(x, i, 0, offset)
}

/// ARPL, LAR, LSL, VERR, VERW are not recognized in real-address and virtual-8086 mode: #UD.
fn need_protected(x: &Exec<'_>) -> Result<(), Fault> {
    if selector::is_protected(x.cpu) { Ok(()) } else { Err(Fault::Ud) }
}

/// ARPL: RPL of the destination raised to that of the source; ZF says so.
pub fn arpl(x: &mut Exec<'_>, i: &Insn) -> Step {
    need_protected(x)?;
    let source = operand::read(x, i, 1)? & 3;
    // Read, and written only if it changes: seen on Zen 4 by the error codes of page faults.
    let old = operand::read(x, i, 0)?;
    if old & 3 < source {
        operand::write(x, i, 0, old & !3 | source)?;
    }
    x.cpu.rflags.set(Rflags::ZF, old & 3 < source);
    Ok(())
}

/// The descriptor that LAR, LSL, VERR, VERW may look at: not null, inside its table, visible at CPL and RPL.
fn visible(x: &mut Exec<'_>, selector: u16) -> Result<Option<Descriptor>, Stop> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(found) = selector::find(x, selector)? else { return Ok(None) };
    let d = found.descriptor;
    // "IF not conforming code segment and (CPL > DPL) or (RPL > DPL): ZF := 0".
    let hidden = !d.is_conforming() && (x.cpu.cpl() > d.dpl() || rpl(selector) > d.dpl());
    Ok((!hidden).then_some(d))
}

/// LAR: access rights if the type is one of the manual's table.
pub fn lar(x: &mut Exec<'_>, i: &Insn) -> Step {
    need_protected(x)?;
    let selector = operand::read(x, i, 1)? as u16;
    let d = visible(x, selector)?.filter(|d| {
        !d.is_system()
            || match d.kind() {
                kind::LDT | kind::TSS_AVAILABLE | kind::TSS_BUSY | kind::CALL_GATE => true,
                kind::TSS16_AVAILABLE | kind::TSS16_BUSY | kind::CALL_GATE16 | kind::TASK_GATE => {
                    !selector::is_ia32e(x.cpu)
                }
                _ => false,
            }
    });
    if let Some(d) = d {
        // Processors give limit bits 19:16 too, which the manual leaves undefined.
        operand::write(x, i, 0, d.low >> 32 & 0x00ff_ff00)?;
    }
    x.cpu.rflags.set(Rflags::ZF, d.is_some());
    Ok(())
}

/// LSL: the limit in bytes if the type is one of the manual's table.
pub fn lsl(x: &mut Exec<'_>, i: &Insn) -> Step {
    need_protected(x)?;
    let selector = operand::read(x, i, 1)? as u16;
    let d = visible(x, selector)?.filter(|d| {
        !d.is_system()
            || match d.kind() {
                kind::LDT | kind::TSS_AVAILABLE | kind::TSS_BUSY => true,
                kind::TSS16_AVAILABLE | kind::TSS16_BUSY => !selector::is_ia32e(x.cpu),
                _ => false,
            }
    });
    if let Some(d) = d {
        operand::write(x, i, 0, u64::from(d.limit()))?;
    }
    x.cpu.rflags.set(Rflags::ZF, d.is_some());
    Ok(())
}

/// VERR.
pub fn verr(x: &mut Exec<'_>, i: &Insn) -> Step {
    verify(x, i, Descriptor::is_readable)
}

/// VERW.
pub fn verw(x: &mut Exec<'_>, i: &Insn) -> Step {
    verify(x, i, Descriptor::is_writable)
}

fn verify(x: &mut Exec<'_>, i: &Insn, allows: fn(Descriptor) -> bool) -> Step {
    need_protected(x)?;
    let selector = operand::read(x, i, 0)? as u16;
    let ok = visible(x, selector)?.is_some_and(allows);
    x.cpu.rflags.set(Rflags::ZF, ok);
    Ok(())
}

/// SWAPGS.
pub fn swapgs(x: &mut Exec<'_>, _: &Insn) -> Step {
    // "IF CS.L ≠ 1: #UD".
    if !is_long64(x.cpu) {
        return Err(Fault::Ud.into());
    }
    std::mem::swap(&mut x.cpu.seg[Seg::Gs as usize].base, &mut x.cpu.msr.kernel_gs_base);
    Ok(())
}

/// "If not in 64-bit mode", "If CR4.FSGSBASE\[bit 16\] = 0": #UD.
fn need_fsgsbase(x: &Exec<'_>) -> Result<(), Fault> {
    if is_long64(x.cpu) && x.cpu.cr4.contains(Cr4::FSGSBASE) { Ok(()) } else { Err(Fault::Ud) }
}

/// RDFSBASE, RDGSBASE.
pub fn rdbase(x: &mut Exec<'_>, i: &Insn) -> Step {
    need_fsgsbase(x)?;
    let seg = if i.iced.mnemonic() == Mnemonic::Rdfsbase { Seg::Fs } else { Seg::Gs };
    let base = x.cpu.segment(seg).base;
    operand::write(x, i, 0, base)
}

/// WRFSBASE, WRGSBASE: 32-bit sources are zero-extended.
pub fn wrbase(x: &mut Exec<'_>, i: &Insn) -> Step {
    need_fsgsbase(x)?;
    let seg = if i.iced.mnemonic() == Mnemonic::Wrfsbase { Seg::Fs } else { Seg::Gs };
    let base = operand::read(x, i, 0)?;
    // "If the source register contains a non-canonical address": #GP(0).
    if !is_canonical(x.cpu, base) {
        return Err(Fault::Gp(0).into());
    }
    x.cpu.seg[seg as usize].base = base;
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::cpu::{Attr, Cr4, Fault, Rflags, Segment};
    use crate::interp::sensitive::testing::*;
    use crate::interp::testing::{CODE, DATA, STACK};
    use crate::isa::{Gpr, Seg, Width};
    use crate::vcpu::Exit;

    type Load<'a> = (u8, &'a [u8; 2], u16, Result<(), Exit>);
    /// CPL, selector, what LAR and LSL give, what VERR and VERW say.
    type Inspection = (u8, u16, Option<u64>, Option<u64>, bool, bool);

    fn gp(code: u16) -> Exit {
        Exit::Exception(Fault::Gp(code))
    }

    /// MOV DS, AX (8E D8), MOV SS, AX (8E D0) with every kind of selector.
    #[test]
    fn loads_check_the_descriptor() {
        let ds = [0x8e, 0xd8];
        let ss = [0x8e, 0xd0];
        let cases: &[Load<'_>] = &[
            (0, &ds, KERNEL_DATA, Ok(())),
            (0, &ds, 3, Ok(())),
            (0, &ds, USER_DATA | 3, Ok(())),
            (3, &ds, KERNEL_DATA | 3, Err(gp(KERNEL_DATA))),
            (3, &ds, KERNEL_DATA, Err(gp(KERNEL_DATA))),
            (0, &ds, KERNEL_DATA | 3, Err(gp(KERNEL_DATA))),
            (0, &ds, ABSENT_DATA, Err(Exit::Exception(Fault::Np(ABSENT_DATA)))),
            (0, &ds, EXECUTE_ONLY, Err(gp(EXECUTE_ONLY))),
            (3, &ds, CONFORMING | 3, Ok(())),
            (0, &ds, TSS, Err(gp(TSS))),
            (0, &ds, 0xfff8, Err(gp(0xfff8))),
            (0, &ds, 0x0c, Err(gp(0x0c))),
            (0, &ss, KERNEL_DATA, Ok(())),
            (0, &ss, 0, Ok(())),
            (0, &ss, 3, Err(gp(0))),
            (3, &ss, 3, Err(gp(0))),
            (3, &ss, USER_DATA | 3, Ok(())),
            (3, &ss, USER_DATA, Err(gp(USER_DATA))),
            (0, &ss, USER_DATA, Err(gp(USER_DATA))),
            (0, &ss, READ_ONLY, Err(gp(READ_ONLY))),
            (0, &ss, ABSENT_DATA, Err(Exit::Exception(Fault::Ss(ABSENT_DATA)))),
            (0, &ss, KERNEL_CODE, Err(gp(KERNEL_CODE))),
        ];
        for &(cpl, code, selector, want) in cases {
            let mut m = machine(cpl, code);
            m.cpu().gpr[Gpr::Rax as usize] = u64::from(selector);
            let before = m.cpu().clone();
            let exit = m.run(1);
            let what = format!("CPL {cpl} {code:02x?} {selector:#x}");
            match want {
                Ok(()) => {
                    assert_eq!(exit, Exit::Budget, "{what}");
                    let seg = if code == &ds { Seg::Ds } else { Seg::Ss };
                    assert_eq!(m.cpu().segment(seg).selector, selector, "{what}");
                    assert_eq!(m.cpu().interrupt_shadow, code == &ss, "{what}");
                    assert_eq!(m.cpu().cpl(), cpl, "{what}");
                }
                Err(want) => {
                    assert_eq!(exit, want, "{what}");
                    assert_eq!(*m.cpu(), before, "{what}");
                }
            }
        }
    }

    #[test]
    fn loading_sets_the_accessed_bit() {
        let mut m = machine(0, &[0x8e, 0xd8]);
        m.cpu().gpr[Gpr::Rax as usize] = u64::from(FRESH_DATA);
        let at = GDT + u64::from(FRESH_DATA) + 5;
        assert_eq!(m.load(at, Width::B), 0x92);
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.load(at, Width::B), 0x93);
        assert_eq!(*m.cpu().segment(Seg::Ds), Segment::data32(FRESH_DATA, 0));
    }

    /// MOV EAX, CS; MOV RCX, SS; MOV word [DATA], CS; MOV DX, CS.
    #[test]
    fn reading_selectors_shows_the_level() {
        let code = [0x8c, 0xc8, 0x48, 0x8c, 0xd1, 0x8c, 0x0c, 0x25, 0, 0, 1, 0, 0x66, 0x8c, 0xca];
        let mut m = machine(3, &code);
        m.cpu().gpr = [u64::MAX; 16];
        m.mem.store(DATA, Width::Q, u64::MAX).expect("RAM");
        assert_eq!(m.run(4), Exit::Budget);
        assert_eq!(m.cpu().gpr[0], u64::from(USER_CODE | 3));
        assert_eq!(m.cpu().gpr[1], u64::from(USER_DATA | 3));
        assert_eq!(m.cpu().gpr[2], 0xffff_ffff_ffff_0000 | u64::from(USER_CODE | 3));
        assert_eq!(m.load(DATA, Width::Q), 0xffff_ffff_ffff_0000 | u64::from(USER_CODE | 3));
    }

    /// PUSH FS; POP GS.
    #[test]
    fn push_and_pop() {
        let mut m = machine(3, &[0x0f, 0xa0, 0x0f, 0xa9]);
        m.cpu().seg[Seg::Fs as usize] = Segment::data32(USER_DATA | 3, 3);
        m.mem.store(STACK - 8, Width::Q, u64::MAX).expect("RAM");
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.load(STACK - 8, Width::Q), u64::from(USER_DATA | 3));
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().segment(Seg::Gs).selector, USER_DATA | 3);
        assert_eq!(m.cpu().gpr[Gpr::Rsp as usize], STACK);
        // A pop that faults leaves RSP.
        let mut m = machine(3, &[0x0f, 0xa9]);
        m.mem.store(STACK, Width::Q, u64::from(KERNEL_DATA)).expect("RAM");
        assert_eq!(m.run(1), gp(KERNEL_DATA));
        assert_eq!(m.cpu().gpr[Gpr::Rsp as usize], STACK);
    }

    /// LAR EAX, CX; LSL EDX, CX; VERR CX; VERW CX: what the manual's tables say for each descriptor.
    #[test]
    fn inspection() {
        let cases: &[Inspection] = &[
            (0, KERNEL_CODE, Some(0x00af_9b00), Some(0xffff_ffff), true, false),
            (3, KERNEL_CODE, None, None, false, false),
            (0, KERNEL_CODE | 3, None, None, false, false),
            (3, USER_DATA | 3, Some(0x00cf_f300), Some(0xffff_ffff), true, true),
            (3, CONFORMING | 3, Some(0x00af_9f00), Some(0xffff_ffff), true, false),
            (0, READ_ONLY, Some(0x00cf_9100), Some(0xffff_ffff), true, false),
            (3, EXECUTE_ONLY | 3, Some(0x00af_f900), Some(0xffff_ffff), false, false),
            (0, ABSENT_DATA, Some(0x00cf_1300), Some(0xffff_ffff), true, true),
            (0, TSS, Some(0x0000_8900), Some(0x67), false, false),
            (0, LDT, Some(0x0000_8200), Some(0xf), false, false),
            (0, GATE, Some(0x0000_ec00), None, false, false),
            (0, 0, None, None, false, false),
            (0, 0xfff0, None, None, false, false),
        ];
        for &(cpl, selector, rights, limit, read, write) in cases {
            let code = [0x0f, 0x02, 0xc1, 0x0f, 0x03, 0xd1, 0x0f, 0x00, 0xe1, 0x0f, 0x00, 0xe9];
            let mut m = machine(cpl, &code);
            m.cpu().gpr[Gpr::Rcx as usize] = u64::from(selector);
            m.cpu().gpr[Gpr::Rax as usize] = 0x1111;
            m.cpu().gpr[Gpr::Rdx as usize] = 0x2222;
            let zf = |m: &mut crate::interp::testing::Machine| {
                assert_eq!(m.run(1), Exit::Budget);
                m.cpu().rflags.contains(Rflags::ZF)
            };
            let what = format!("CPL {cpl} {selector:#x}");
            assert_eq!(zf(&mut m), rights.is_some(), "lar {what}");
            assert_eq!(m.cpu().gpr[0], rights.unwrap_or(0x1111), "lar {what}");
            assert_eq!(zf(&mut m), limit.is_some(), "lsl {what}");
            assert_eq!(m.cpu().gpr[2], limit.unwrap_or(0x2222), "lsl {what}");
            assert_eq!(zf(&mut m), read, "verr {what}");
            assert_eq!(zf(&mut m), write, "verw {what}");
        }
    }

    /// WRFSBASE RAX; RDFSBASE ECX.
    #[test]
    fn bases() {
        let code = [0xf3, 0x48, 0x0f, 0xae, 0xd0, 0xf3, 0x0f, 0xae, 0xc1];
        let mut m = machine(3, &code);
        m.cpu().gpr[0] = 0x7fff_1234_5678;
        assert_eq!(m.run(2), Exit::Budget);
        assert_eq!(m.cpu().segment(Seg::Fs).base, 0x7fff_1234_5678);
        assert_eq!(m.cpu().gpr[1], 0x1234_5678);
        let mut m = machine(3, &code);
        m.cpu().gpr[0] = 0x0000_8000_0000_0000;
        assert_eq!(m.run(1), gp(0));
        m.cpu().cr4.remove(Cr4::FSGSBASE);
        assert_eq!(m.run(1), Exit::Exception(Fault::Ud));
    }

    #[test]
    fn swapgs_swaps() {
        let mut m = machine(0, &[0x0f, 0x01, 0xf8]);
        m.cpu().seg[Seg::Gs as usize].base = 1;
        m.cpu().msr.kernel_gs_base = 2;
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().segment(Seg::Gs).base, m.cpu().msr.kernel_gs_base), (2, 1));
    }

    /// LSS ESP, [DATA] with a good and with a privileged selector. (A 64-bit offset exists on Intel only.)
    #[test]
    fn lss() {
        let code = [0x0f, 0xb2, 0x24, 0x25, 0, 0, 1, 0];
        let mut m = machine(0, &code);
        m.mem.store(DATA, Width::D, 0x1_8000).expect("RAM");
        m.mem.store(DATA + 4, Width::W, u64::from(KERNEL_DATA)).expect("RAM");
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().gpr[Gpr::Rsp as usize], 0x1_8000);
        assert!(m.cpu().segment(Seg::Ss).attr.contains(Attr::WRITABLE));
        let mut m = machine(3, &code);
        m.mem.store(DATA + 4, Width::W, u64::from(KERNEL_DATA)).expect("RAM");
        assert_eq!(m.run(1), gp(KERNEL_DATA));
        assert_eq!((m.cpu().gpr[Gpr::Rsp as usize], m.cpu().rip), (STACK, CODE));
    }
}
