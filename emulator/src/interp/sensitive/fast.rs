//! SYSCALL SYSRET SYSENTER SYSEXIT (SDM 2B; APM 3).
//!
//! Where Intel and AMD differ the vendor that CPUID shows decides:
//!
//! | | Intel | AMD |
//! | --- | --- | --- |
//! | SYSCALL in compatibility mode | #UD | goes to CSTAR |
//! | SYSRET to a non-canonical RIP | #GP(0) at CPL 0 | the jump faults at CPL 3 |
//! | SYSRET from compatibility mode | #UD | works |
//! | SYSENTER, SYSEXIT in IA-32e mode | work | #UD |
//! | SS after SYSRET | flat, from constants | hidden part kept as it was |
//!
//! The last row is done Intel's way for all: with the flat segments of every system the two are the same.

use crate::cpu::{CpuState, Efer, Fault, Mode, Rflags, Segment};
use crate::interp::access::{is_canonical, is_long64};
use crate::interp::sensitive::selector::{is_ia32e, is_protected};
use crate::interp::{Exec, Step};
use crate::isa::{Gpr, Insn, Seg, Width};
use iced_x86::Mnemonic;

const GP0: Fault = Fault::Gp(0);

/// A flat code segment as these instructions load it: 64-bit or 32-bit.
fn code(selector: u16, dpl: u8, long: bool) -> Segment {
    if long { Segment::code64(selector, dpl) } else { Segment::code32(selector, dpl) }
}

fn set_cs_ss(cpu: &mut CpuState, cs: Segment, ss: u16) {
    let dpl = cs.attr.dpl();
    cpu.seg[Seg::Cs as usize] = cs;
    cpu.seg[Seg::Ss as usize] = Segment::data32(ss, dpl);
}

/// "RFLAGS := (R11 & 3C7FD7H) | 2": what SYSRET takes.
pub const RETURNED: u64 = 0x3c_7fd7;

/// What SYSCALL leaves of RFLAGS; bit 1 is set besides.
pub fn kept(cpu: &CpuState) -> Rflags {
    !(Rflags::from_bits_retain(cpu.msr.fmask) | Rflags::RF)
}

/// SYSCALL.
pub fn syscall(x: &mut Exec<'_>, _: &Insn) -> Step {
    // "IF (CS.L ≠ 1) or (IA32_EFER.LMA ≠ 1) or (IA32_EFER.SCE ≠ 1): #UD". AMD asks for LMA only; its legacy-mode form is not offered.
    let long = is_long64(x.cpu);
    let mode_ok = long || (is_ia32e(x.cpu) && !x.env.cpu_model.is_intel());
    if !mode_ok || !x.cpu.efer.contains(Efer::SCE) {
        return Err(Fault::Ud.into());
    }
    let msr = x.cpu.msr;
    x.cpu.gpr[Gpr::Rcx as usize] = x.next_rip;
    x.cpu.gpr[Gpr::R11 as usize] = (x.cpu.rflags - Rflags::RF).bits();
    x.cpu.rflags &= kept(x.cpu);
    x.cpu.rflags.insert(Rflags::FIXED);
    // "CS.Selector := IA32_STAR[47:32] AND FFFCH; SS.Selector := IA32_STAR[47:32] + 8".
    let base = (msr.star >> 32) as u16;
    set_cs_ss(x.cpu, code(base & 0xfffc, 0, true), base.wrapping_add(8) & 0xfffc);
    x.next_rip = if long { msr.lstar } else { msr.cstar };
    Ok(())
}

/// SYSRET, with REX.W to 64-bit code, else to compatibility mode.
pub fn sysret(x: &mut Exec<'_>, i: &Insn) -> Step {
    let intel = x.env.cpu_model.is_intel();
    // "IF (CS.L ≠ 1) or (IA32_EFER.LMA ≠ 1) or (IA32_EFER.SCE ≠ 1): #UD". The CPL was checked before.
    let mode_ok = is_long64(x.cpu) || (is_ia32e(x.cpu) && !intel);
    if !mode_ok || !x.cpu.efer.contains(Efer::SCE) {
        return Err(Fault::Ud.into());
    }
    let long = i.iced.mnemonic() == Mnemonic::Sysretq;
    let target = x.cpu.gpr[Gpr::Rcx as usize];
    // "IF OperandSize = 64 and RCX is not canonical: #GP(0)".
    if long && intel && !is_canonical(x.cpu, target) {
        return Err(GP0.into());
    }
    let flags = x.cpu.gpr[Gpr::R11 as usize] & RETURNED | 2;
    // "CS.Selector := IA32_STAR[63:48] (+ 16 for 64-bit) OR 3; SS.Selector := (IA32_STAR[63:48] + 8) OR 3".
    let base = (x.cpu.msr.star >> 48) as u16;
    let cs = if long { base.wrapping_add(16) | 3 } else { base | 3 };
    set_cs_ss(x.cpu, code(cs, 3, long), base.wrapping_add(8) | 3);
    x.cpu.rflags = Rflags::from_bits_retain(flags);
    x.next_rip = if long { target } else { Width::D.cut(target) };
    Ok(())
}

/// SYSENTER and SYSEXIT: on AMD not in IA-32e mode.
fn need_sysenter(x: &Exec<'_>) -> Result<u16, Fault> {
    if is_ia32e(x.cpu) && !x.env.cpu_model.is_intel() {
        return Err(Fault::Ud);
    }
    // "If in real-address mode", "If IA32_SYSENTER_CS[15:2] = 0": #GP(0).
    let cs = x.cpu.msr.sysenter_cs as u16;
    if (!is_protected(x.cpu) && x.cpu.mode() != Mode::Virtual8086) || cs & 0xfffc == 0 {
        return Err(GP0);
    }
    Ok(cs)
}

/// SYSENTER.
pub fn sysenter(x: &mut Exec<'_>, _: &Insn) -> Step {
    let cs = need_sysenter(x)? & 0xfffc;
    let long = is_ia32e(x.cpu);
    let msr = x.cpu.msr;
    let w = if long { Width::Q } else { Width::D };
    x.cpu.rflags.remove(Rflags::VM | Rflags::IF | Rflags::RF);
    set_cs_ss(x.cpu, code(cs, 0, long), cs.wrapping_add(8));
    x.cpu.gpr[Gpr::Rsp as usize] = w.cut(msr.sysenter_esp);
    x.next_rip = w.cut(msr.sysenter_eip);
    Ok(())
}

/// SYSEXIT, with REX.W to 64-bit code.
pub fn sysexit(x: &mut Exec<'_>, i: &Insn) -> Step {
    let cs = need_sysenter(x)?;
    let long = i.iced.mnemonic() == Mnemonic::Sysexitq;
    let (rsp, rip) = (x.cpu.gpr[Gpr::Rcx as usize], x.cpu.gpr[Gpr::Rdx as usize]);
    // "If RCX or RDX contains a non-canonical address" (64-bit operand size): #GP(0).
    if long && !(is_canonical(x.cpu, rsp) && is_canonical(x.cpu, rip)) {
        return Err(GP0.into());
    }
    let cs = cs.wrapping_add(if long { 32 } else { 16 }) | 3;
    set_cs_ss(x.cpu, code(cs, 3, long), cs.wrapping_add(8));
    let w = if long { Width::Q } else { Width::D };
    x.cpu.gpr[Gpr::Rsp as usize] = w.cut(rsp);
    x.next_rip = w.cut(rip);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interp::sensitive::testing::machine;
    use crate::interp::testing::CODE;
    use crate::vcpu::Exit;

    const STAR: u64 = 0x0018_0008_0000_0000;
    const UD: Exit = Exit::Exception(Fault::Ud);

    #[test]
    fn syscall_and_sysretq() {
        let mut m = machine(3, &[0x0f, 0x05]);
        m.cpu().msr.star = STAR;
        m.cpu().msr.lstar = 0x9000;
        m.cpu().msr.fmask = 0x4_7700;
        m.cpu().rflags = Rflags::from_bits_retain(0x24_3ad7);
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().rip, m.cpu().cpl(), m.cpu().rflags.bits()), (0x9000, 0, 0x20_08d7));
        assert_eq!(m.cpu().gpr[Gpr::Rcx as usize], CODE + 2);
        assert_eq!(m.cpu().gpr[Gpr::R11 as usize], 0x24_3ad7);
        assert_eq!(*m.cpu().segment(Seg::Cs), Segment::code64(0x08, 0));
        assert_eq!(*m.cpu().segment(Seg::Ss), Segment::data32(0x10, 0));
        m.mem.write(0x9000, &[0x48, 0x0f, 0x07]).expect("RAM");
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().rip, m.cpu().cpl(), m.cpu().rflags.bits()), (CODE + 2, 3, 0x24_3ad7));
        assert_eq!(*m.cpu().segment(Seg::Cs), Segment::code64(0x2b, 3));
        assert_eq!(*m.cpu().segment(Seg::Ss), Segment::data32(0x23, 3));
    }

    /// SYSRET without REX.W: compatibility mode, 32-bit RIP, flags cut to 3C7FD7.
    #[test]
    fn sysretl() {
        let mut m = machine(0, &[0x0f, 0x07]);
        m.cpu().msr.star = STAR;
        m.cpu().gpr[Gpr::Rcx as usize] = 0xffff_ffff_0000_9000;
        m.cpu().gpr[Gpr::R11 as usize] = u64::MAX;
        // Unlike IRET, SYSRET that sets TF traps at once.
        assert_eq!(m.run(1), Exit::Exception(Fault::Db(1 << 14)));
        assert_eq!((m.cpu().rip, m.cpu().mode()), (0x9000, Mode::Compat32));
        assert_eq!(m.cpu().rflags.bits(), 0x3c_7fd7);
        assert_eq!(*m.cpu().segment(Seg::Cs), Segment::code32(0x1b, 3));
    }

    /// SYSRETQ to a non-canonical address: #GP(0) at CPL 0 on Intel; on AMD the jump is made and faults at CPL 3.
    #[test]
    fn sysret_canonical() {
        let mut m = machine(0, &[0x48, 0x0f, 0x07]);
        m.cpu().msr.star = STAR;
        m.cpu().gpr[Gpr::Rcx as usize] = 0x8000_0000_0000;
        if m.vcpu.env().cpu_model.is_intel() {
            assert_eq!(m.run(1), Exit::Exception(Fault::Gp(0)));
            assert_eq!(m.cpu().cpl(), 0);
        } else {
            assert_eq!(m.run(1), Exit::Budget);
            assert_eq!(m.run(1), Exit::Exception(Fault::Gp(0)));
            assert_eq!((m.cpu().cpl(), m.cpu().rip), (3, 0x8000_0000_0000));
        }
    }

    #[test]
    fn undefined_without_sce() {
        for code in [&[0x0f, 0x05][..], &[0x48, 0x0f, 0x07]] {
            let mut m = machine(0, code);
            m.cpu().efer.remove(Efer::SCE);
            assert_eq!(m.run(1), UD);
        }
    }

    /// Outside 64-bit code Intel's processors do not know SYSRET, whatever the CPL; AMD's ask for the CPL first.
    #[test]
    fn sysret_of_users_in_compatibility_mode() {
        let mut m = machine(3, &[0x0f, 0x07]);
        m.cpu().seg[Seg::Cs as usize] = Segment::code32(0x23, 3);
        let intel = m.vcpu.env().cpu_model.is_intel();
        assert_eq!(m.run(1), if intel { UD } else { Exit::Exception(GP0) });
    }

    #[test]
    fn sysenter_and_sysexit() {
        let mut m = machine(3, &[0x0f, 0x34]);
        m.cpu().msr.sysenter_cs = 0x0b;
        m.cpu().msr.sysenter_esp = 0xffff_8000_0000_1000;
        m.cpu().msr.sysenter_eip = 0x9000;
        m.cpu().rflags |= Rflags::IF;
        if !m.vcpu.env().cpu_model.is_intel() {
            assert_eq!(m.run(1), UD);
            return;
        }
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().rip, m.cpu().gpr[Gpr::Rsp as usize], m.cpu().cpl()), (0x9000, 0xffff_8000_0000_1000, 0));
        assert!(!m.cpu().rflags.contains(Rflags::IF));
        m.mem.write(0x9000, &[0x48, 0x0f, 0x35]).expect("RAM");
        m.cpu().gpr[Gpr::Rcx as usize] = 0x1_0000;
        m.cpu().gpr[Gpr::Rdx as usize] = 0xa000;
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().rip, m.cpu().cpl()), (0xa000, 3));
        assert_eq!(m.cpu().segment(Seg::Cs).selector, 0x2b);
        assert_eq!(m.cpu().segment(Seg::Ss).selector, 0x33);
    }
}
