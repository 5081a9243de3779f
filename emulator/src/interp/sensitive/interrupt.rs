//! INT n INT3 INTO INT1: interrupts that the program asks for (SDM 2A INT n; SDM 3B 20.3.3).

use crate::cpu::{Cr4, Fault, Mode, Rflags};
use crate::interp::deliver::{Event, deliver};
use crate::interp::sensitive::{far, selector, task};
use crate::interp::{Exec, Step, access};
use crate::isa::{Insn, Seg, Width};
use crate::vcpu::Intercepts;

/// INT n.
pub fn int(x: &mut Exec<'_>, i: &Insn) -> Step {
    let vector = i.iced.immediate8();
    if x.cpu.mode() == Mode::Virtual8086 {
        // With VME the redirection map decides; "VM = 1 and IOPL < 3" without redirection: #GP(0).
        if x.cpu.cr4.contains(Cr4::VME) && task::redirected(x, vector)? {
            return redirect(x, vector);
        }
        if x.cpu.rflags.iopl() < 3 {
            return Err(Fault::Gp(0).into());
        }
    }
    deliver(x, Event::Software(vector))
}

/// To the 8086 program's own handler, through the interrupt vector table at linear address 0.
fn redirect(x: &mut Exec<'_>, vector: u8) -> Step {
    let entry = access::load_system(x, u64::from(vector) * 4, Width::D)?;
    let mut image = x.cpu.rflags;
    if image.iopl() < 3 {
        image.set(Rflags::IF, image.contains(Rflags::VIF));
        image |= Rflags::IOPL;
    }
    let from = u64::from(x.cpu.segment(Seg::Cs).selector);
    far::push_all(x, Width::W, &[image.bits(), from, x.next_rip])?;
    let target = if x.cpu.rflags.iopl() < 3 { Rflags::VIF } else { Rflags::IF };
    x.cpu.rflags -= target | Rflags::TF;
    x.cpu.seg[Seg::Cs as usize] = selector::real_segment(x.cpu, Seg::Cs, (entry >> 16) as u16);
    x.next_rip = entry & 0xffff;
    Ok(())
}

/// INT3: #BP. Without an IOPL check, never redirected.
pub fn int3(_: &mut Exec<'_>, _: &Insn) -> Step {
    Err(Fault::Bp.into())
}

/// INTO: #OF if OF is set.
pub fn into(x: &mut Exec<'_>, _: &Insn) -> Step {
    if x.cpu.rflags.contains(Rflags::OF) { Err(Fault::Of.into()) } else { Ok(()) }
}

/// INT1: #DB without a cause in DR6, a trap.
pub fn int1(x: &mut Exec<'_>, _: &Insn) -> Step {
    if x.intercepts.contains(Intercepts::EXCEPTIONS) {
        x.cpu.rip = x.next_rip;
        return Err(Fault::Db(0).into());
    }
    deliver(x, Event::SoftwareIcebp)
}

#[cfg(test)]
mod tests {
    use crate::cpu::Fault;
    use crate::interp::sensitive::testing::*;
    use crate::interp::testing::{CODE, Machine, STACK};
    use crate::isa::{Gpr, Seg, Width};
    use crate::vcpu::{Exit, Intercepts, Vcpu};

    /// A 64-bit interrupt gate of the given DPL to `GATE_TARGET`, at `vector`.
    fn gate(m: &Machine, vector: u64, dpl: u64) {
        m.mem.store(IDT + 16 * vector, Width::Q, 0x0000_8e00_0008_9000 | dpl << 45).expect("RAM");
        m.mem.store(IDT + 16 * vector + 8, Width::Q, 0).expect("RAM");
    }

    /// INT 0x80 from CPL 3: the gate's DPL decides; RIP in the frame is behind the instruction.
    #[test]
    fn int_n_through_the_idt() {
        let mut m = machine(3, &[0xcd, 0x80]);
        gate(&m, 0x80, 3);
        m.mem.store(TSS_BASE + 4, Width::Q, 0x1_8000).expect("RAM");
        m.vcpu.set_intercepts(Intercepts::empty());
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().rip, m.cpu().cpl()), (GATE_TARGET, 0));
        assert_eq!(m.cpu().segment(Seg::Ss).selector, 0);
        let rsp = m.cpu().gpr[Gpr::Rsp as usize];
        assert_eq!(rsp, 0x1_8000 - 40);
        let frame: Vec<u64> = (0..5).map(|n| m.load(rsp + 8 * n, Width::Q)).collect();
        assert_eq!(frame, [CODE + 2, u64::from(USER_CODE | 3), 2, STACK, u64::from(USER_DATA | 3)]);
    }

    /// A gate of DPL 0: #GP(vector * 8 + 2), with the instruction's own address.
    #[test]
    fn int_n_checks_the_gate() {
        let mut m = machine(3, &[0xcd, 0x80]);
        gate(&m, 0x80, 0);
        gate(&m, 13, 0);
        m.mem.store(TSS_BASE + 4, Width::Q, 0x1_8000).expect("RAM");
        m.vcpu.set_intercepts(Intercepts::empty());
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().rip, GATE_TARGET);
        let rsp = m.cpu().gpr[Gpr::Rsp as usize];
        assert_eq!((m.load(rsp, Width::Q), m.load(rsp + 8, Width::Q)), (0x402, CODE));
    }

    /// INT3 and INT1 intercepted as exceptions: RIP is behind them.
    #[test]
    fn traps() {
        for (code, fault) in [(0xcc, Fault::Bp), (0xf1, Fault::Db(0))] {
            let mut m = machine(3, &[code]);
            assert_eq!(m.run(1), Exit::Exception(fault));
            assert_eq!(m.cpu().rip, CODE + 1);
        }
    }

    /// Real mode: INT 0x21 and INTO through the vector table.
    #[test]
    fn real_mode() {
        let mut m = Machine::real(&[0xcd, 0x21]);
        m.mem.store(0x84, Width::D, 0x0200_1234).expect("RAM");
        m.vcpu.set_intercepts(Intercepts::empty());
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().segment(Seg::Cs).selector, m.cpu().rip), (0x0200, 0x1234));
        assert_eq!(m.load(0x6ffa, Width::W), CODE + 2);
        let mut m = Machine::real(&[0xce]);
        assert_eq!(m.run(1), Exit::Budget);
        m.cpu().rip = CODE;
        m.cpu().rflags |= crate::cpu::Rflags::OF;
        assert_eq!(m.run(1), Exit::Exception(Fault::Of));
    }
}
