//! Protected and virtual-8086 mode: 16- and 32-bit interrupt and trap gates, stacks from the TSS (SDM 3A 6.12, 3B 20.3.1).

use crate::cpu::descriptor::{Descriptor, is_null, kind, rpl, selector_error};
use crate::cpu::{Fault, Rflags, Segment};
use crate::interp::deliver::{Event, NewStack, enter, push_frame, set_segment};
use crate::interp::sensitive::selector::{self, Found};
use crate::interp::sensitive::switch::{self, Cause};
use crate::interp::{Exec, Step, Stop, access, stack};
use crate::isa::{Gpr, Seg, Width};
use crate::mem::By;

pub(super) fn deliver(x: &mut Exec<'_>, event: Event) -> Step {
    let ext = event.ext();
    let gate = gate(x, event)?;
    if gate.kind() == kind::TASK_GATE {
        // The old task goes on where the event would return to.
        x.next_rip = event.return_rip(x);
        let flags = Rflags::from_bits_retain(event.pushed_flags(x.cpu));
        return switch::to_tss(x, gate.gate_selector(), Cause::Event { ext, error: event.error_code(), flags });
    }
    let wide = matches!(gate.kind(), kind::INTERRUPT_GATE | kind::TRAP_GATE);
    let w = if wide { Width::D } else { Width::W };
    let rip = w.cut(gate.gate_offset());
    let cs_selector = gate.gate_selector();
    if is_null(cs_selector) {
        return Err(Fault::Gp(ext).into());
    }
    let error = selector_error(cs_selector) | ext;
    let found = selector::find(x, cs_selector)?.ok_or(Fault::Gp(error))?;
    let code = found.descriptor;
    let cpl = x.cpu.cpl();
    if !code.is_code() || code.dpl() > cpl {
        return Err(Fault::Gp(error).into());
    }
    if !code.present() {
        return Err(Fault::Np(error).into());
    }
    let vm86 = x.cpu.rflags.contains(Rflags::VM);
    let new_cpl = if code.is_conforming() { cpl } else { code.dpl() };
    // "IF EFLAGS.VM = 1 and the new code segment is conforming or its DPL is not 0: #GP(selector)".
    if vm86 && new_cpl != 0 {
        return Err(Fault::Gp(error).into());
    }
    // "IF instruction pointer is not within the code-segment limits: #GP(EXT)".
    if rip > u64::from(code.limit()) {
        return Err(Fault::Gp(ext).into());
    }

    let mut frame = Frame::default();
    let (ss, new_ss) = if new_cpl == cpl {
        (*x.cpu.segment(Seg::Ss), None)
    } else {
        let (found_ss, s, esp) = inner_stack(x, new_cpl, ext)?;
        if vm86 {
            for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
                frame.push(u64::from(x.cpu.segment(seg).selector));
            }
        }
        frame.push(u64::from(x.cpu.segment(Seg::Ss).selector));
        frame.push(x.cpu.gpr[Gpr::Rsp as usize]);
        (s, Some((found_ss, esp)))
    };
    frame.push(event.pushed_flags(x.cpu));
    frame.push(u64::from(x.cpu.segment(Seg::Cs).selector));
    frame.push(event.return_rip(x));
    if let Some(code) = event.error_code() {
        frame.push(u64::from(code));
    }
    let address = if ss.attr.contains(crate::cpu::Attr::DB) { Width::D } else { Width::W };
    let stack = NewStack {
        base: ss.base,
        segment: Some(ss),
        address,
        pointer: new_ss.map_or(stack::pointer(x.cpu), |(_, esp)| esp),
        by: if new_cpl == 3 { By::User } else { By::Supervisor },
        fault: Fault::Ss(if new_ss.is_some() { selector_error(ss.selector) | ext } else { ext }),
    };
    let sp = push_frame(x, &stack, w, frame.values())?;
    selector::set_accessed(x, &found)?;
    if let Some((found_ss, esp)) = new_ss {
        selector::set_accessed(x, &found_ss)?;
        set_segment(x, Seg::Ss, ss);
        x.cpu.gpr[Gpr::Rsp as usize] = esp;
    }
    x.cpu.write(Gpr::Rsp, address, sp);
    set_segment(x, Seg::Cs, selector::segment_of(&found, cs_selector & !3 | u16::from(new_cpl)));
    if vm86 {
        for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
            set_segment(x, seg, Segment::unusable(0));
        }
    }
    enter(x, rip, matches!(gate.kind(), kind::INTERRUPT_GATE | kind::INTERRUPT_GATE16));
    Ok(())
}

/// What is pushed: at most ten values.
#[derive(Default)]
struct Frame {
    values: [u64; 10],
    len: usize,
}

impl Frame {
    fn push(&mut self, v: u64) {
        if let Some(slot) = self.values.get_mut(self.len) {
            *slot = v;
            self.len += 1;
        }
    }

    fn values(&self) -> &[u64] {
        &self.values[..self.len]
    }
}

fn gate(x: &mut Exec<'_>, event: Event) -> Result<Descriptor, Stop> {
    let vector = u16::from(event.vector());
    let error = 8 * vector + 2 + event.ext();
    let at = 8 * u64::from(vector);
    if at + 7 > u64::from(x.cpu.idtr.limit) {
        return Err(Fault::Gp(error).into());
    }
    let low = access::load_system(x, Width::D.cut(x.cpu.idtr.base.wrapping_add(at)), Width::Q)?;
    let gate = Descriptor::new(low);
    let known = matches!(
        gate.kind(),
        kind::TASK_GATE | kind::INTERRUPT_GATE16 | kind::TRAP_GATE16 | kind::INTERRUPT_GATE | kind::TRAP_GATE
    );
    if !gate.is_system() || !known || (event.is_software() && gate.dpl() < x.cpu.cpl()) {
        return Err(Fault::Gp(error).into());
    }
    if !gate.present() {
        return Err(Fault::Np(error).into());
    }
    Ok(gate)
}

/// SS and ESP for an inner level, from the TSS, checked (SDM 2A INT n, INTER-PRIVILEGE-LEVEL-INTERRUPT).
fn inner_stack(x: &mut Exec<'_>, cpl: u8, ext: u16) -> Result<(Found, Segment, u64), Stop> {
    let wide = matches!(x.cpu.tr.attr.kind(), kind::TSS_AVAILABLE | kind::TSS_BUSY);
    let (at, w) = if wide { (4 + 8 * u64::from(cpl), Width::D) } else { (2 + 4 * u64::from(cpl), Width::W) };
    if at + w.bytes() + 1 > u64::from(x.cpu.tr.limit) {
        return Err(Fault::Ts(selector_error(x.cpu.tr.selector) | ext).into());
    }
    let base = x.cpu.tr.base;
    let esp = access::load_system(x, Width::D.cut(base.wrapping_add(at)), w)?;
    let selector = access::load_system(x, Width::D.cut(base.wrapping_add(at + w.bytes())), Width::W)? as u16;
    if is_null(selector) {
        return Err(Fault::Ts(ext).into());
    }
    let error = selector_error(selector) | ext;
    let found = selector::find(x, selector)?.ok_or(Fault::Ts(error))?;
    let d = found.descriptor;
    // "RPL or DPL is not the DPL of the code segment, or no writable data segment: #TS(selector)".
    if rpl(selector) != cpl || d.dpl() != cpl || !d.is_writable() {
        return Err(Fault::Ts(error).into());
    }
    if !d.present() {
        return Err(Fault::Ss(error).into());
    }
    Ok((found, selector::segment_of(&found, selector), esp))
}
