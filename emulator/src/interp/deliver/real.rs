//! Real mode: the interrupt vector table (SDM 3B 20.1.4).

use crate::cpu::{Fault, Rflags};
use crate::interp::deliver::{Event, NewStack, push_frame, set_segment};
use crate::interp::sensitive::selector::real_segment;
use crate::interp::{Exec, Step, access, stack};
use crate::isa::{Gpr, Seg, Width};
use crate::mem::By;

pub(super) fn deliver(x: &mut Exec<'_>, event: Event) -> Step {
    let at = 4 * u64::from(event.vector());
    // SDM 2A INT n, real-address mode: beyond the limit of the IDT: #GP.
    if at + 3 > u64::from(x.cpu.idtr.limit) {
        return Err(Fault::Gp(0).into());
    }
    let entry = access::load_system(x, Width::D.cut(x.cpu.idtr.base.wrapping_add(at)), Width::D)?;
    let ss = *x.cpu.segment(Seg::Ss);
    let address = stack::address_width(x.cpu);
    let new = NewStack {
        base: ss.base,
        segment: Some(ss),
        address,
        pointer: x.cpu.gpr[Gpr::Rsp as usize],
        by: By::Supervisor,
        fault: Fault::Ss(0),
    };
    let frame = [event.pushed_flags(x.cpu), u64::from(x.cpu.segment(Seg::Cs).selector), event.return_rip(x)];
    let sp = push_frame(x, &new, Width::W, &frame)?;
    x.cpu.write(Gpr::Rsp, address, sp);
    let mut cs = real_segment(x.cpu, Seg::Cs, (entry >> 16) as u16);
    cs.attr = x.cpu.segment(Seg::Cs).attr;
    set_segment(x, Seg::Cs, cs);
    x.cpu.rip = entry & 0xffff;
    x.cpu.rflags.remove(Rflags::IF | Rflags::TF | Rflags::AC | Rflags::RF);
    Ok(())
}
