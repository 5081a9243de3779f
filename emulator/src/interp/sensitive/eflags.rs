//! PUSHF POPF CLI STI: the instructions that tell and quietly keep IF, IOPL and VM (SDM 2A CLI, 2B POPF PUSHF STI; SDM 3B 20.3).

use crate::cpu::{CpuState, Cr4, Fault, Mode, Rflags};
use crate::interp::{Exec, Step, stack};
use crate::isa::{Insn, Width};

/// The arithmetic flags and what anybody may change: CF PF AF ZF SF TF DF OF NT.
const COMMON: Rflags = Rflags::STATUS.union(Rflags::TF).union(Rflags::DF).union(Rflags::NT);

/// PUSHF, PUSHFD, PUSHFQ.
pub fn pushf(x: &mut Exec<'_>, i: &Insn) -> Step {
    let mut image = x.cpu.rflags;
    if x.cpu.mode() == Mode::Virtual8086 && x.cpu.rflags.iopl() < 3 {
        // "IF VME = 0 or OperandSize = 32: #GP(0)"; else VIF is shown in the place of IF, and IOPL 3.
        if !x.cpu.cr4.contains(Cr4::VME) || i.width != Width::W {
            return Err(Fault::Gp(0).into());
        }
        image.set(Rflags::IF, image.contains(Rflags::VIF));
        image |= Rflags::IOPL;
    }
    // "the VM and RF flags are cleared in the EFLAGS image stored on the stack".
    image -= Rflags::VM | Rflags::RF;
    stack::push(x, i.width, i.width.cut(image.bits()))
}

/// Which flags POPF changes outside virtual-8086 mode (SDM 2B POPF, table "Effect of POPF/POPFD on the EFLAGS Register").
fn popf_mask(cpu: &CpuState, w: Width) -> Rflags {
    let mut mask = COMMON;
    if cpu.cpl() == 0 {
        mask |= Rflags::IOPL;
    }
    // "CPL > IOPL: IF unchanged", without a fault.
    if cpu.cpl() <= cpu.rflags.iopl() {
        mask |= Rflags::IF;
    }
    if w != Width::W {
        mask |= Rflags::AC | Rflags::ID;
    }
    mask
}

/// POPF, POPFD, POPFQ. VM, VIF and VIP stay as they are; RF is cleared.
pub fn popf(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = i.width;
    let vm86 = x.cpu.mode() == Mode::Virtual8086;
    if vm86 && x.cpu.rflags.iopl() < 3 && !(x.cpu.cr4.contains(Cr4::VME) && w == Width::W) {
        // Virtual-8086 mode with IOPL < 3, and no VME or a 32-bit operand: #GP(0).
        return Err(Fault::Gp(0).into());
    }
    let image = Rflags::from_bits_retain(stack::peek(x, 0, w)?);
    if vm86 && x.cpu.rflags.iopl() < 3 {
        popf_vme(x, image)?;
    } else {
        let mask = if vm86 { popf_mask(x.cpu, w) | Rflags::IF } else { popf_mask(x.cpu, w) };
        x.cpu.rflags.replace(mask, image);
    }
    x.cpu.rflags.remove(Rflags::RF);
    stack::adjust(x, w.bytes() as i64);
    Ok(())
}

/// 16-bit POPF under VME: IF goes to VIF.
fn popf_vme(x: &mut Exec<'_>, image: Rflags) -> Step {
    let wants = image.contains(Rflags::IF);
    // "IF (VIP = 1 AND tempFLAGS[9] = 1) OR tempFLAGS[8] = 1: #GP(0)".
    if (wants && x.cpu.rflags.contains(Rflags::VIP)) || image.contains(Rflags::TF) {
        return Err(Fault::Gp(0).into());
    }
    x.cpu.rflags.replace(COMMON, image);
    x.cpu.rflags.set(Rflags::VIF, wants);
    Ok(())
}

/// Which flag CLI and STI work on.
enum Target {
    If,
    Vif,
}

/// SDM 2A CLI, table "Decision Table for CLI Results": IF where CPL <= IOPL, VIF under VME and PVI, else #GP(0).
fn target(cpu: &CpuState) -> Result<Target, Fault> {
    let iopl = cpu.rflags.iopl();
    match cpu.mode() {
        Mode::Real => Ok(Target::If),
        Mode::Virtual8086 if iopl == 3 => Ok(Target::If),
        Mode::Virtual8086 if cpu.cr4.contains(Cr4::VME) => Ok(Target::Vif),
        Mode::Virtual8086 => Err(Fault::Gp(0)),
        _ if cpu.cpl() <= iopl => Ok(Target::If),
        _ if cpu.cpl() == 3 && cpu.cr4.contains(Cr4::PVI) => Ok(Target::Vif),
        _ => Err(Fault::Gp(0)),
    }
}

/// CLI.
pub fn cli(x: &mut Exec<'_>, _: &Insn) -> Step {
    match target(x.cpu)? {
        Target::If => x.cpu.rflags.remove(Rflags::IF),
        Target::Vif => x.cpu.rflags.remove(Rflags::VIF),
    }
    Ok(())
}

/// STI: interrupts are recognized after the next instruction only, if IF was clear before.
pub fn sti(x: &mut Exec<'_>, _: &Insn) -> Step {
    match target(x.cpu)? {
        Target::If => {
            if !x.cpu.rflags.contains(Rflags::IF) {
                (x.cpu.interrupt_shadow, x.cpu.ss_shadow) = (true, false);
            }
            x.cpu.rflags.insert(Rflags::IF);
        }
        // "VIP = 1: #GP(0)".
        Target::Vif if x.cpu.rflags.contains(Rflags::VIP) => return Err(Fault::Gp(0).into()),
        Target::Vif => x.cpu.rflags.insert(Rflags::VIF),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::cpu::{Cr4, Fault, Rflags};
    use crate::interp::sensitive::testing::machine;
    use crate::interp::testing::STACK;
    use crate::isa::{Gpr, Width};
    use crate::vcpu::Exit;

    const ALL: u64 = 0xffff_ffff_ffff_ffff;

    /// PUSHFQ shows everything but VM and RF.
    #[test]
    fn pushf_image() {
        let mut m = machine(0, &[0x9c]);
        m.cpu().rflags = Rflags::from_bits_retain(0x25_7fd7);
        // TF is set: a single-step trap follows.
        assert_eq!(m.run(1), Exit::Exception(Fault::Db(1 << 14)));
        assert_eq!(m.load(STACK - 8, Width::Q), 0x24_7fd7);
    }

    /// POPFQ with all ones and all zeros at each CPL and IOPL (SDM 2B POPF, table of effects).
    #[test]
    fn popf_by_level() {
        for (cpl, iopl, ones, zeros) in [
            (0, 0, 0x24_7fd7u64, 0x2u64),
            (3, 3, 0x24_7fd7, 0x3002),
            (3, 0, 0x24_4dd7, 0x0002),
            (3, 2, 0x24_6dd7, 0x2002),
        ] {
            for (value, want) in [(ALL, ones), (0, zeros)] {
                let mut m = machine(cpl, &[0x9d]);
                m.mem.store(STACK, Width::Q, value).expect("RAM");
                m.cpu().rflags = Rflags::from_bits_retain(2 | iopl << 12);
                assert_eq!(m.run(1), Exit::Budget);
                assert_eq!(m.cpu().rflags.bits(), want, "CPL {cpl} IOPL {iopl} {value:x}");
                assert_eq!(m.cpu().gpr[Gpr::Rsp as usize], STACK + 8);
            }
        }
    }

    /// CPL 3 with IOPL 0 keeps a set IF: POPF is sensitive, not privileged.
    #[test]
    fn popf_keeps_if_silently() {
        let mut m = machine(3, &[0x9d]);
        m.mem.store(STACK, Width::Q, 0).expect("RAM");
        m.cpu().rflags |= Rflags::IF;
        assert_eq!(m.run(1), Exit::Budget);
        assert!(m.cpu().rflags.contains(Rflags::IF));
    }

    /// 16-bit POPF keeps AC and ID.
    #[test]
    fn popfw() {
        let mut m = machine(0, &[0x66, 0x9d]);
        m.cpu().rflags |= Rflags::AC | Rflags::ID;
        m.mem.store(STACK, Width::Q, 0x8d5).expect("RAM");
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().rflags.bits(), 0x24_08d7);
        assert_eq!(m.cpu().gpr[Gpr::Rsp as usize], STACK + 2);
    }

    #[test]
    fn sti_shadows_only_when_if_was_clear() {
        let mut m = machine(0, &[0xfb]);
        assert_eq!(m.run(1), Exit::Budget);
        assert!(m.cpu().rflags.contains(Rflags::IF) && m.cpu().interrupt_shadow);
        let mut m = machine(0, &[0xfb]);
        m.cpu().rflags |= Rflags::IF;
        assert_eq!(m.run(1), Exit::Budget);
        assert!(!m.cpu().interrupt_shadow);
    }

    /// CLI and STI at CPL 3: #GP(0) with IOPL 0, IF with IOPL 3, VIF with CR4.PVI, #GP(0) with PVI and VIP.
    #[test]
    fn cli_sti_at_cpl_3() {
        let gp = Exit::Exception(Fault::Gp(0));
        for (code, iopl, cr4, flags, want) in [
            (0xfa, 0, Cr4::empty(), Rflags::IF, Err(gp)),
            (0xfb, 2, Cr4::empty(), Rflags::empty(), Err(gp)),
            (0xfa, 3, Cr4::empty(), Rflags::IF, Ok(Rflags::empty())),
            (0xfb, 3, Cr4::empty(), Rflags::empty(), Ok(Rflags::IF)),
            (0xfa, 0, Cr4::PVI, Rflags::IF | Rflags::VIF, Ok(Rflags::IF)),
            (0xfb, 0, Cr4::PVI, Rflags::empty(), Ok(Rflags::VIF)),
            (0xfb, 0, Cr4::PVI, Rflags::VIP, Err(gp)),
        ] {
            let mut m = machine(3, &[code]);
            m.cpu().cr4 |= cr4;
            m.cpu().rflags = Rflags::FIXED | flags | Rflags::from_bits_retain(iopl << 12);
            let exit = m.run(1);
            match want {
                Ok(want) => {
                    assert_eq!(exit, Exit::Budget, "{code:x} {iopl} {cr4:?}");
                    assert_eq!(
                        m.cpu().rflags & (Rflags::IF | Rflags::VIF | Rflags::VIP),
                        want,
                        "{code:x} {iopl} {cr4:?}"
                    );
                }
                Err(want) => assert_eq!(exit, want, "{code:x} {iopl} {cr4:?}"),
            }
        }
    }
}
