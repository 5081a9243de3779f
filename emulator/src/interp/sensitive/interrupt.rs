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
