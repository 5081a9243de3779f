//! IA-32e mode: 16-byte gates, interrupt stack table, an aligned stack and a frame of fixed shape (SDM 3A 6.14).

use crate::cpu::descriptor::{Descriptor, is_null, kind, rpl, selector_error};
use crate::cpu::{Attr, Fault};
use crate::interp::deliver::{Event, NewStack, enter, push_frame, set_segment};
use crate::interp::sensitive::selector::{self, null_stack};
use crate::interp::{Exec, Step, Stop, access};
use crate::isa::{Gpr, Seg, Width};
use crate::mem::By;

/// Offset of RSP0 in the 64-bit TSS, and of the interrupt stack table (SDM 3A figure 7-11).
const TSS_RSP0: u64 = 4;
const TSS_IST1: u64 = 0x24;

pub(super) fn deliver(x: &mut Exec<'_>, event: Event) -> Step {
    let ext = event.ext();
    let gate = gate(x, event)?;
    let cs_selector = gate.gate_selector();
    // "IF new code-segment selector is NULL: #GP(EXT)".
    if is_null(cs_selector) {
        return Err(Fault::Gp(ext).into());
    }
    let error = selector_error(cs_selector) | ext;
    let found = selector::find(x, cs_selector)?.ok_or(Fault::Gp(error))?;
    let code = found.descriptor;
    let cpl = x.cpu.cpl();
    // "IF descriptor is not a code segment, or DPL > CPL: #GP"; "IF not present: #NP"; "IF not a 64-bit code segment: #GP".
    if !code.is_code() || code.dpl() > cpl {
        return Err(Fault::Gp(error).into());
    }
    if !code.present() {
        return Err(Fault::Np(error).into());
    }
    if code.attr() & (Attr::L | Attr::DB) != Attr::L {
        return Err(Fault::Gp(error).into());
    }
    let new_cpl = if code.is_conforming() { cpl } else { code.dpl() };
    let ist = gate.gate_ist();
    let pointer = if ist != 0 {
        from_tss(x, TSS_IST1 + 8 * (u64::from(ist) - 1), ext)?
    } else if new_cpl != cpl {
        from_tss(x, TSS_RSP0 + 8 * u64::from(new_cpl), ext)?
    } else {
        x.cpu.gpr[Gpr::Rsp as usize]
    };
    let rip = gate.gate_offset();
    if !access::is_canonical(x.cpu, rip) {
        return Err(Fault::Gp(ext).into());
    }
    let stack = NewStack {
        base: 0,
        segment: None,
        address: Width::Q,
        pointer: pointer & !15,
        by: if new_cpl == 3 { By::User } else { By::Supervisor },
        fault: Fault::Ss(ext),
    };
    let (ss, old_cs) = (x.cpu.segment(Seg::Ss).selector, x.cpu.segment(Seg::Cs).selector);
    let frame = [
        u64::from(ss),
        x.cpu.gpr[Gpr::Rsp as usize],
        event.pushed_flags(x.cpu),
        u64::from(old_cs),
        event.return_rip(x),
        u64::from(event.error_code().unwrap_or(0)),
    ];
    let len = if event.error_code().is_some() { 6 } else { 5 };
    let rsp = push_frame(x, &stack, Width::Q, &frame[..len])?;
    selector::set_accessed(x, &found)?;
    x.cpu.gpr[Gpr::Rsp as usize] = rsp;
    set_segment(x, Seg::Cs, selector::segment_of(&found, cs_selector & !3 | u16::from(new_cpl)));
    if new_cpl != cpl {
        set_segment(x, Seg::Ss, null_stack(u16::from(new_cpl), new_cpl));
    }
    enter(x, rip, gate.kind() == kind::INTERRUPT_GATE);
    debug_assert_eq!(rpl(x.cpu.segment(Seg::Cs).selector), new_cpl);
    Ok(())
}

/// The gate of the event's vector, checked.
fn gate(x: &mut Exec<'_>, event: Event) -> Result<Descriptor, Stop> {
    let vector = u16::from(event.vector());
    let error = 8 * vector + 2 + event.ext();
    let at = 16 * u64::from(vector);
    if at + 15 > u64::from(x.cpu.idtr.limit) {
        return Err(Fault::Gp(error).into());
    }
    let laddr = x.cpu.idtr.base.wrapping_add(at);
    let low = access::load_system(x, laddr, Width::Q)?;
    let high = access::load_system(x, laddr.wrapping_add(8), Width::Q)?;
    let gate = Descriptor { low, high };
    if !gate.is_system() || !matches!(gate.kind(), kind::INTERRUPT_GATE | kind::TRAP_GATE) {
        return Err(Fault::Gp(error).into());
    }
    // "IF software interrupt and gate DPL < CPL: #GP(vector * 8 + 2)".
    if event.is_software() && gate.dpl() < x.cpu.cpl() {
        return Err(Fault::Gp(error).into());
    }
    if !gate.present() {
        return Err(Fault::Np(error).into());
    }
    Ok(gate)
}

/// A stack pointer of the TSS: beyond its limit #TS, not canonical #SS.
fn from_tss(x: &mut Exec<'_>, offset: u64, ext: u16) -> Result<u64, Stop> {
    if offset + 7 > u64::from(x.cpu.tr.limit) {
        return Err(Fault::Ts(selector_error(x.cpu.tr.selector) | ext).into());
    }
    let v = access::load_system(x, x.cpu.tr.base.wrapping_add(offset), Width::Q)?;
    if access::is_canonical(x.cpu, v) { Ok(v) } else { Err(Fault::Ss(ext).into()) }
}
