//! IRET IRETD IRETQ (SDM 2A IRET; SDM 3A 6.7.1, 6.14.3).

use crate::cpu::{CpuState, Cr4, Efer, Fault, Mode, Rflags, Segment};
use crate::interp::access::is_long64;
use crate::interp::sensitive::far::{
    check_target, code_segment, return_address, return_code, return_pointer, return_stack, to_outer,
};
use crate::interp::sensitive::{selector, switch};
use crate::interp::{Exec, Step, Stop, stack};
use crate::isa::{Insn, Seg, Width};
use iced_x86::Code;

/// CF PF AF ZF SF TF DF OF NT.
const COMMON: Rflags = Rflags::STATUS.union(Rflags::TF).union(Rflags::DF).union(Rflags::NT);
const WIDE: Rflags = Rflags::RF.union(Rflags::AC).union(Rflags::ID);

/// What IRETD and IRETQ take from the stack at CPL 0.
pub const RETURNED: Rflags =
    COMMON.union(WIDE).union(Rflags::IF).union(Rflags::IOPL).union(Rflags::VIF).union(Rflags::VIP);

/// What is on top of the stack.
struct Frame {
    w: Width,
    rip: u64,
    cs: u16,
    flags: Rflags,
}

/// IRET in all modes.
pub fn iret(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = match i.iced.code() {
        Code::Iretw => Width::W,
        Code::Iretq => Width::Q,
        _ => Width::D,
    };
    // SDM 3A 6.7.1: NMIs are unblocked by the execution of IRET, "even if it causes a fault".
    x.cpu.nmi_blocked = false;
    match x.cpu.mode() {
        Mode::Real => real(x, w, COMMON | Rflags::IOPL | Rflags::IF),
        Mode::Virtual8086 if x.cpu.rflags.iopl() == 3 => real(x, w, COMMON | Rflags::IF),
        Mode::Virtual8086 => virtual8086(x, w),
        _ => protected(x, w),
    }
}

fn pop_frame(x: &mut Exec<'_>, w: Width) -> Result<Frame, Stop> {
    // The flags are read first (seen on Zen 4 and Raptor Cove).
    let flags = Rflags::from_bits_retain(stack::peek(x, 2 * w.bytes(), w)?);
    let (rip, cs) = return_address(x, w)?;
    Ok(Frame { w, rip, cs, flags })
}

/// Real-address mode, and virtual-8086 mode with IOPL 3.
fn real(x: &mut Exec<'_>, w: Width, mask: Rflags) -> Step {
    let f = pop_frame(x, w)?;
    let cs = selector::real_segment(x.cpu, Seg::Cs, f.cs);
    let rip = check_target(x.cpu, &cs, f.rip)?;
    let mask = if w == Width::W { mask } else { mask | WIDE };
    stack::adjust(x, 3 * w.bytes() as i64);
    x.cpu.seg[Seg::Cs as usize] = cs;
    x.cpu.rflags.replace(mask, f.flags);
    x.next_rip = rip;
    Ok(())
}

/// Virtual-8086 mode with IOPL below 3: only the 16-bit form under VME, with VIF for IF.
fn virtual8086(x: &mut Exec<'_>, w: Width) -> Step {
    // "IF VME = 0 or OperandSize ≠ 16: #GP(0)".
    if !x.cpu.cr4.contains(Cr4::VME) || w != Width::W {
        return Err(Fault::Gp(0).into());
    }
    let f = pop_frame(x, w)?;
    let wants = f.flags.contains(Rflags::IF);
    // "IF (VIP = 1 and tempFLAGS.IF = 1) or tempFLAGS.TF = 1: #GP(0)".
    if (wants && x.cpu.rflags.contains(Rflags::VIP)) || f.flags.contains(Rflags::TF) {
        return Err(Fault::Gp(0).into());
    }
    real(x, w, COMMON)?;
    x.cpu.rflags.set(Rflags::VIF, wants);
    Ok(())
}

/// Which flags come from the stack, by the level that executes IRET.
fn mask(cpu: &CpuState, w: Width) -> Rflags {
    if cpu.cpl() == 0 {
        return if w == Width::W { COMMON | Rflags::IF | Rflags::IOPL } else { RETURNED };
    }
    let mut mask = COMMON;
    if w != Width::W {
        mask |= WIDE;
    }
    if cpu.cpl() <= cpu.rflags.iopl() {
        mask |= Rflags::IF;
    }
    mask
}

fn protected(x: &mut Exec<'_>, w: Width) -> Step {
    if x.cpu.rflags.contains(Rflags::NT) {
        // "If the NT flag is set in IA-32e mode": #GP(0); else a return to the previous task.
        let ia32e = x.cpu.efer.contains(Efer::LMA);
        return if ia32e { Err(Fault::Gp(0).into()) } else { switch::back(x) };
    }
    let f = pop_frame(x, w)?;
    let cpl = x.cpu.cpl();
    if f.flags.contains(Rflags::VM) && cpl == 0 && w == Width::D && !x.cpu.efer.contains(Efer::LMA) {
        return to_virtual8086(x, &f);
    }
    let (found, new_cpl) = return_code(x, f.cs)?;
    let cs = code_segment(&found, f.cs, new_cpl);
    let mask = mask(x.cpu, w);
    // 64-bit code pops SS:RSP always, other code only when it returns to an outer level.
    let rip = if is_long64(x.cpu) || new_cpl > cpl {
        let (rsp, ss) = return_pointer(x, 3 * w.bytes(), w)?;
        let ss = return_stack(x, ss, &cs)?;
        let rip = check_target(x.cpu, &cs, f.rip)?;
        selector::set_accessed(x, &found)?;
        to_outer(x, cs, ss, rsp);
        rip
    } else {
        let rip = check_target(x.cpu, &cs, f.rip)?;
        selector::set_accessed(x, &found)?;
        stack::adjust(x, 3 * w.bytes() as i64);
        x.cpu.seg[Seg::Cs as usize] = cs;
        rip
    };
    x.cpu.rflags.replace(mask, f.flags);
    x.next_rip = rip;
    Ok(())
}

/// RETURN-TO-VIRTUAL-8086-MODE: nine doublewords.
fn to_virtual8086(x: &mut Exec<'_>, f: &Frame) -> Step {
    let mut more = [0; 6];
    for (n, v) in more.iter_mut().enumerate() {
        *v = stack::peek(x, (3 + n as u64) * f.w.bytes(), f.w)?;
    }
    // "If the instruction pointer is not within the return code segment limit": #GP(0).
    if f.rip > 0xffff {
        return Err(Fault::Gp(0).into());
    }
    let [esp, ss, es, ds, fs, gs] = more;
    let all = COMMON | WIDE | Rflags::IF | Rflags::IOPL | Rflags::VM | Rflags::VIF | Rflags::VIP;
    x.cpu.rflags.replace(all, f.flags);
    for (seg, v) in
        [(Seg::Cs, u64::from(f.cs)), (Seg::Ss, ss), (Seg::Es, es), (Seg::Ds, ds), (Seg::Fs, fs), (Seg::Gs, gs)]
    {
        x.cpu.seg[seg as usize] = virtual_segment(v as u16);
    }
    x.cpu.write(crate::isa::Gpr::Rsp, Width::D, esp);
    x.next_rip = f.rip;
    Ok(())
}

fn virtual_segment(selector: u16) -> Segment {
    let mut s = Segment::real(selector);
    s.attr = crate::cpu::Attr::from_bits_retain(0xf3);
    s
}

#[cfg(test)]
mod tests {
    use crate::cpu::{Fault, Mode, Rflags, Segment};
    use crate::interp::alu::Vendor;
    use crate::interp::sensitive::testing::*;
    use crate::interp::testing::{CODE, Machine, STACK};
    use crate::isa::{Gpr, Seg, Width};
    use crate::vcpu::Exit;

    const IRETQ: [u8; 2] = [0x48, 0xcf];

    fn iretq(cpl: u8, flags: Rflags, frame: [u64; 5]) -> (Exit, Machine) {
        let mut m = machine(cpl, &IRETQ);
        m.cpu().rflags = flags | Rflags::FIXED;
        for (n, v) in (0..).zip(frame) {
            m.mem.store(STACK + 8 * n, Width::Q, v).expect("RAM");
        }
        let exit = m.run(1);
        (exit, m)
    }

    fn gp(code: u16) -> Exit {
        Exit::Exception(Fault::Gp(code))
    }

    const UC: u64 = (USER_CODE | 3) as u64;
    const UD: u64 = (USER_DATA | 3) as u64;
    const KC: u64 = KERNEL_CODE as u64;
    const KD: u64 = KERNEL_DATA as u64;

    #[test]
    fn frames() {
        let none = Rflags::empty();
        for (cpl, frame, want) in [
            (0, [0x9000, KC, 2, 0x1_9000, KD], Ok(0)),
            (0, [0x9000, KC, 2, 0x1_9000, 0], Ok(0)), // a null SS at CPL 0
            (0, [0x9000, UC, 2, 0x1_9000, UD], Ok(3)),
            (3, [0x9000, UC, 2, 0x1_9000, UD], Ok(3)),
            (0, [0x9000, u64::from(USER_CODE32 | 3), 2, 0x1_9000, UD], Ok(3)),
            (0, [0x9000, UC, 2, 0x1_9000, 3], Err(gp(0))), // a null SS at CPL 3
            (0, [0x9000, u64::from(KERNEL_CODE32), 2, 0x1_9000, 0], Err(gp(0))),
            (0, [0x9000, KC, 2, 0x1_9000, UD], Err(gp(USER_DATA))),
            (0, [0x9000, UC, 2, 0x1_9000, KD], Err(gp(KERNEL_DATA))),
            (0, [0x9000, UC, 2, 0x1_9000, u64::from(ABSENT_DATA | 3)], Err(gp(ABSENT_DATA))),
            (0, [0x9000, KC, 2, 0x1_9000, u64::from(ABSENT_DATA)], Err(Exit::Exception(Fault::Ss(ABSENT_DATA)))),
            (3, [0x9000, KC, 2, 0x1_9000, KD], Err(gp(KERNEL_CODE))),
            (0, [0x9000, 0, 2, 0x1_9000, KD], Err(gp(0))),
            (0, [0x9000, u64::from(ABSENT_CODE), 2, 0x1_9000, KD], Err(Exit::Exception(Fault::Np(ABSENT_CODE)))),
            (0, [0x9000_0000_0000, KC, 2, 0x1_9000, KD], Err(gp(0))),
        ] {
            let (exit, mut m) = iretq(cpl, none, frame);
            match want {
                Ok(new) => {
                    assert_eq!(exit, Exit::Budget, "{frame:x?}");
                    assert_eq!((m.cpu().rip, m.cpu().gpr[Gpr::Rsp as usize]), (frame[0], frame[3]), "{frame:x?}");
                    assert_eq!(m.cpu().cpl(), new, "{frame:x?}");
                    assert_eq!(u64::from(m.cpu().segment(Seg::Ss).selector), frame[4], "{frame:x?}");
                }
                Err(want) => {
                    assert_eq!(exit, want, "{frame:x?}");
                    assert_eq!((m.cpu().rip, m.cpu().gpr[Gpr::Rsp as usize]), (CODE, STACK), "{frame:x?}");
                }
            }
        }
    }

    /// Raptor Cove cuts the offset of a return to 32-bit code; else it is beyond the limit.
    #[test]
    fn a_64_bit_offset_in_32_bit_code() {
        let (exit, mut m) = iretq(0, Rflags::empty(), [0x1_0000_9000, u64::from(USER_CODE32 | 3), 2, 0, UD]);
        let want = if Vendor::host() == Vendor::Amd { (gp(0), CODE) } else { (Exit::Budget, 0x9000) };
        assert_eq!((exit, m.cpu().rip), want);
    }

    /// Which flags come back, by CPL and IOPL before the return (SDM 2A IRET).
    #[test]
    fn flags() {
        let iopl3 = Rflags::IOPL;
        let none = Rflags::empty();
        for (cpl, before, frame_cs, frame_ss, want) in [
            (0, none, KC, KD, 0x3d_7fd7u64),
            (0, none, UC, UD, 0x3d_7fd7),
            (3, none, UC, UD, 0x25_4dd7),
            (3, iopl3, UC, UD, 0x25_7fd7),
        ] {
            // VM is not a flag that IRETQ takes.
            let (exit, mut m) = iretq(cpl, before, [0x9000, frame_cs, 0x3f_7fd7, 0x1_9000, frame_ss]);
            assert_eq!(exit, Exit::Budget);
            assert_eq!(m.cpu().rflags.bits(), want, "CPL {cpl} {before:?}");
        }
    }

    #[test]
    fn nt_and_nmi() {
        let (exit, mut m) = iretq(0, Rflags::NT, [0x9000, KC, 2, 0x1_9000, KD]);
        assert_eq!(exit, gp(0));
        m.cpu().rflags.remove(Rflags::NT);
        m.cpu().nmi_blocked = true;
        assert_eq!(m.run(1), Exit::Budget);
        assert!(!m.cpu().nmi_blocked);
    }

    /// What is too privileged for the new level is taken away; GS of the user stays.
    #[test]
    fn segments_are_dropped() {
        let mut m = machine(0, &IRETQ);
        for (n, v) in (0..).zip([0x9000, UC, 2, 0x1_9000, UD]) {
            m.mem.store(STACK + 8 * n, Width::Q, v).expect("RAM");
        }
        m.cpu().seg[Seg::Ds as usize] = Segment::data32(KERNEL_DATA, 0);
        m.cpu().seg[Seg::Fs as usize] = Segment::data32(USER_DATA | 3, 3);
        m.cpu().seg[Seg::Gs as usize] = Segment { base: 0x1234, ..Segment::unusable(0) };
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(*m.cpu().segment(Seg::Ds), Segment::unusable(0));
        assert_eq!(m.cpu().segment(Seg::Fs).selector, USER_DATA | 3);
        assert_eq!(m.cpu().segment(Seg::Gs).base, 0x1234);
    }

    #[test]
    fn real_mode() {
        let mut m = Machine::real(&[0xcf]);
        for (at, v) in [(0x7000, 0x1234), (0x7002, 0x0100), (0x7004, 0xffff)] {
            m.mem.store(at, Width::W, v).expect("RAM");
        }
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().mode(), Mode::Real);
        assert_eq!((m.cpu().segment(Seg::Cs).base, m.cpu().rip), (0x1000, 0x1234));
        assert_eq!(m.cpu().rflags.bits(), 0x7fd7);
    }
}
