//! Far CALL JMP RET through code segments and call gates (SDM 2A CALL, JMP, 2B RET; SDM 3A 5.8).

use crate::cpu::descriptor::{Descriptor, is_null, kind, rpl, selector_error};
use crate::cpu::{Attr, CpuState, Fault, Segment};
use crate::interp::access::{self, is_canonical};
use crate::interp::sensitive::selector::{self, Found, is_ia32e, is_protected, null_stack, segment_of};
use crate::interp::sensitive::task;
use crate::interp::{Exec, Step, Stop, operand, stack};
use crate::isa::{Gpr, Insn, Seg, Width};
use crate::vcpu::Exit;
use iced_x86::{Code, MemorySize, OpKind};

/// Width of the offset in a far pointer: the operand size.
fn pointer_width(i: &Insn) -> Width {
    match (i.iced.op0_kind(), i.iced.memory_size()) {
        (OpKind::FarBranch16, _) | (_, MemorySize::SegPtr16) => Width::W,
        (_, MemorySize::SegPtr64) => Width::Q,
        _ => Width::D,
    }
}

/// Selector and offset of the far pointer, from the instruction or from memory.
fn pointer(x: &mut Exec<'_>, i: &Insn, w: Width) -> Result<(u16, u64), Stop> {
    match i.iced.op0_kind() {
        OpKind::FarBranch16 => Ok((i.iced.far_branch_selector(), u64::from(i.iced.far_branch16()))),
        OpKind::FarBranch32 => Ok((i.iced.far_branch_selector(), u64::from(i.iced.far_branch32()))),
        _ => {
            let m = i.mem().copied().ok_or(Fault::Ud)?;
            let at = operand::effective_address(x, i, &m);
            let offset = access::load(x, m.seg, at, w)?;
            let selector = access::load(x, m.seg, m.address.cut(at.wrapping_add(w.bytes())), Width::W)?;
            Ok((selector as u16, offset))
        }
    }
}

/// "If the target offset is beyond the new code segment limit", in 64-bit code "is in a non-canonical form": #GP(0).
pub fn check_target(cpu: &CpuState, cs: &Segment, offset: u64) -> Result<(), Fault> {
    let ok = if is_ia32e(cpu) && cs.attr.contains(Attr::L) {
        is_canonical(cpu, offset)
    } else {
        offset <= u64::from(cs.limit)
    };
    if ok { Ok(()) } else { Err(Fault::Gp(0)) }
}

/// "If the code segment descriptor's L and D bits are both set in IA-32e mode": #GP(selector).
pub fn check_long(cpu: &CpuState, d: Descriptor, error: u16) -> Result<(), Fault> {
    if is_ia32e(cpu) && d.attr().contains(Attr::L | Attr::DB) { Err(Fault::Gp(error)) } else { Ok(()) }
}

/// CS for a code segment found; its RPL becomes the CPL.
pub fn code_segment(found: &Found, selector: u16, cpl: u8) -> Segment {
    segment_of(found, selector & !3 | u16::from(cpl))
}

/// Pushes several values, the first one first. Nothing is written unless everything can be.
pub fn push_all(x: &mut Exec<'_>, w: Width, values: &[u64]) -> Step {
    let a = stack::address_width(x.cpu);
    let top = stack::pointer(x.cpu);
    let slot = |n: usize| a.cut(top.wrapping_sub(w.bytes() * (n as u64 + 1)));
    for n in 0..values.len() {
        access::check_write(x, Seg::Ss, slot(n), w.bytes())?;
    }
    for (n, v) in values.iter().enumerate() {
        access::store(x, Seg::Ss, slot(n), w, w.cut(*v))?;
    }
    stack::adjust(x, -((w.bytes() * values.len() as u64) as i64));
    Ok(())
}

/// Far JMP.
pub fn jmp(x: &mut Exec<'_>, i: &Insn) -> Step {
    transfer(x, i, false)
}

/// Far CALL.
pub fn call(x: &mut Exec<'_>, i: &Insn) -> Step {
    transfer(x, i, true)
}

fn transfer(x: &mut Exec<'_>, i: &Insn, is_call: bool) -> Step {
    let w = pointer_width(i);
    let (selector, offset) = pointer(x, i, w)?;
    if !is_protected(x.cpu) {
        let cs = selector::real_segment(x.cpu, Seg::Cs, selector);
        return direct(x, w, cs, offset, is_call);
    }
    // "If segment selector of the target is NULL": #GP(0); "is not within its descriptor table limits": #GP(selector).
    if is_null(selector) {
        return Err(Fault::Gp(0).into());
    }
    let error = selector_error(selector);
    let found = selector::find(x, selector)?.ok_or(Fault::Gp(error))?;
    let d = found.descriptor;
    if d.is_code() {
        let cs = direct_target(x, &found, selector)?;
        check_target(x.cpu, &cs, offset)?;
        return direct(x, w, cs, offset, is_call);
    }
    match d.kind() {
        kind::CALL_GATE if d.is_system() => gate(x, selector, is_call),
        kind::CALL_GATE16 if d.is_system() && !is_ia32e(x.cpu) => gate(x, selector, is_call),
        kind::TASK_GATE | kind::TSS_AVAILABLE | kind::TSS16_AVAILABLE if d.is_system() && !is_ia32e(x.cpu) => {
            Err(Stop::Exit(Exit::Unsupported))
        }
        // "If the segment descriptor for the selector ... is not for a conforming or nonconforming code segment, call gate, task gate, or
        // task state segment"; in IA-32e mode task gates, TSSs and 16-bit call gates are none: #GP(selector).
        _ => Err(Fault::Gp(error).into()),
    }
}

/// CONFORMING-CODE-SEGMENT and NONCONFORMING-CODE-SEGMENT.
fn direct_target(x: &mut Exec<'_>, found: &Found, selector: u16) -> Result<Segment, Stop> {
    let (d, cpl, error) = (found.descriptor, x.cpu.cpl(), selector_error(selector));
    check_long(x.cpu, d, error)?;
    // Conforming: "DPL > CPL: #GP(selector)"; nonconforming: "RPL > CPL or DPL ≠ CPL: #GP(selector)".
    let denied = if d.is_conforming() { d.dpl() > cpl } else { rpl(selector) > cpl || d.dpl() != cpl };
    if denied {
        return Err(Fault::Gp(error).into());
    }
    // "segment not present": #NP(selector).
    if !d.present() {
        return Err(Fault::Np(error).into());
    }
    selector::set_accessed(x, found)?;
    Ok(code_segment(found, selector, cpl))
}

/// The transfer itself, at the same privilege level.
fn direct(x: &mut Exec<'_>, w: Width, cs: Segment, offset: u64, is_call: bool) -> Step {
    check_target(x.cpu, &cs, offset)?;
    if is_call {
        let from = u64::from(x.cpu.segment(Seg::Cs).selector);
        push_all(x, w, &[from, x.next_rip])?;
    }
    x.cpu.seg[Seg::Cs as usize] = cs;
    x.next_rip = offset;
    Ok(())
}

/// CALL-GATE.
fn gate(x: &mut Exec<'_>, selector: u16, is_call: bool) -> Step {
    let error = selector_error(selector);
    let gate = selector::find_system(x, selector)?.ok_or(Fault::Gp(error))?.descriptor;
    let cpl = x.cpu.cpl();
    // "If the DPL from a call-gate ... is less than the CPL or than the RPL"; "upper type field of a 64-bit call gate is not 0": #GP(selector).
    if gate.dpl() < cpl || rpl(selector) > gate.dpl() || gate.high_kind() != 0 {
        return Err(Fault::Gp(error).into());
    }
    // "call gate not present": #NP(call-gate selector).
    if !gate.present() {
        return Err(Fault::Np(error).into());
    }
    // "call-gate code-segment selector is NULL": #GP(0); "outside descriptor table limits": #GP(code-segment selector).
    let target = gate.gate_selector();
    if is_null(target) {
        return Err(Fault::Gp(0).into());
    }
    let error = selector_error(target);
    let found = selector::find(x, target)?.ok_or(Fault::Gp(error))?;
    let d = found.descriptor;
    // "code-segment segment descriptor does not indicate a code segment or DPL > CPL": #GP; "IA-32e: not 64-bit code": #GP.
    let wrong_size = is_ia32e(x.cpu) && (!d.attr().contains(Attr::L) || d.attr().contains(Attr::DB));
    // A JMP cannot change the level: "nonconforming and DPL ≠ CPL": #GP.
    let wrong_level = d.dpl() > cpl || (!is_call && !d.is_conforming() && d.dpl() != cpl);
    if !d.is_code() || wrong_level || wrong_size {
        return Err(Fault::Gp(error).into());
    }
    if !d.present() {
        return Err(Fault::Np(error).into());
    }
    selector::set_accessed(x, &found)?;
    let w = if is_ia32e(x.cpu) {
        Width::Q
    } else if gate.kind() == kind::CALL_GATE16 {
        Width::W
    } else {
        Width::D
    };
    let offset = if w == Width::W { gate.gate_offset() & 0xffff } else { gate.gate_offset() };
    if !d.is_conforming() && d.dpl() < cpl {
        let cs = code_segment(&found, target, d.dpl());
        check_target(x.cpu, &cs, offset)?;
        return inner(x, w, cs, offset, gate.gate_parameters());
    }
    let cs = code_segment(&found, target, cpl);
    check_target(x.cpu, &cs, offset)?;
    if !is_call {
        return direct(x, w, cs, offset, false);
    }
    // The frame of a 64-bit gate is pushed by the rules of 64-bit code, also when compatibility code called.
    let from = *x.cpu.segment(Seg::Cs);
    let next = x.next_rip;
    x.cpu.seg[Seg::Cs as usize] = cs;
    if let Err(stop) = push_all(x, w, &[u64::from(from.selector), next]) {
        x.cpu.seg[Seg::Cs as usize] = from;
        return Err(stop);
    }
    x.next_rip = offset;
    Ok(())
}

/// MORE-PRIVILEGE: the stack of the inner level from the TSS, the old SS:rSP, parameters, the return address.
fn inner(x: &mut Exec<'_>, w: Width, cs: Segment, offset: u64, parameters: u8) -> Step {
    let cpl = cs.selector as u8 & 3;
    let (old_cs, old_ss, old_rsp) = (*x.cpu.segment(Seg::Cs), *x.cpu.segment(Seg::Ss), x.cpu.gpr[Gpr::Rsp as usize]);
    let old_pointer = stack::pointer(x.cpu);
    let mut frame = vec![u64::from(old_ss.selector), old_pointer];
    let (ss, rsp) = if w == Width::Q {
        (null_stack(u16::from(cpl), cpl), task::rsp(x, cpl)?)
    } else {
        for n in (0..u64::from(parameters)).rev() {
            frame.push(stack::peek(x, n * w.bytes(), w)?);
        }
        inner_stack(x, cpl)?
    };
    frame.extend([u64::from(old_cs.selector), x.next_rip]);
    x.cpu.seg[Seg::Cs as usize] = cs;
    x.cpu.seg[Seg::Ss as usize] = ss;
    stack::set_pointer(x.cpu, rsp);
    if let Err(stop) = push_all(x, w, &frame) {
        x.cpu.seg[Seg::Cs as usize] = old_cs;
        x.cpu.seg[Seg::Ss as usize] = old_ss;
        x.cpu.gpr[Gpr::Rsp as usize] = old_rsp;
        // "If the new stack does not have room": #SS(SS selector).
        return Err(match stop {
            Stop::Fault(Fault::Ss(_)) => Fault::Ss(selector_error(ss.selector)).into(),
            stop => stop,
        });
    }
    x.next_rip = offset;
    Ok(())
}

/// The stack of an inner level from a 16- or 32-bit TSS, its segment checked; faults are #TS.
pub fn inner_stack(x: &mut Exec<'_>, cpl: u8) -> Result<(Segment, u64), Stop> {
    let (selector, esp) = task::stack(x, cpl)?;
    let error = selector_error(selector);
    // "If the new stack segment selector is NULL, ... index is not within its descriptor table limits, ... RPL ≠ DPL of the code segment,
    // ... DPL ≠ DPL of the code segment, ... not a writable data segment": #TS(SS selector).
    if is_null(selector) {
        return Err(Fault::Ts(error).into());
    }
    let found = selector::find(x, selector)?.ok_or(Fault::Ts(error))?;
    let d = found.descriptor;
    if rpl(selector) != cpl || d.dpl() != cpl || !d.is_writable() {
        return Err(Fault::Ts(error).into());
    }
    // "If the stack segment is not present": #SS(SS selector).
    if !d.present() {
        return Err(Fault::Ss(error).into());
    }
    selector::set_accessed(x, &found)?;
    Ok((segment_of(&found, selector), esp))
}

/// Far RET, with and without an immediate.
pub fn ret(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = match i.iced.code() {
        Code::Retfw | Code::Retfw_imm16 => Width::W,
        Code::Retfq | Code::Retfq_imm16 => Width::Q,
        _ => Width::D,
    };
    let released = if i.iced.op_count() > 0 { u64::from(i.iced.immediate16()) } else { 0 };
    let offset = stack::peek(x, 0, w)?;
    let selector = stack::peek(x, w.bytes(), w)? as u16;
    if !is_protected(x.cpu) {
        let cs = selector::real_segment(x.cpu, Seg::Cs, selector);
        check_target(x.cpu, &cs, offset)?;
        x.cpu.seg[Seg::Cs as usize] = cs;
        x.next_rip = offset;
        stack::adjust(x, (2 * w.bytes() + released) as i64);
        return Ok(());
    }
    let (found, new_cpl) = return_code(x, selector)?;
    let cs = code_segment(&found, selector, new_cpl);
    if new_cpl == x.cpu.cpl() {
        check_target(x.cpu, &cs, offset)?;
        selector::set_accessed(x, &found)?;
        // The stack is the old one, its address size too.
        stack::adjust(x, (2 * w.bytes() + released) as i64);
        x.cpu.seg[Seg::Cs as usize] = cs;
        x.next_rip = offset;
        return Ok(());
    }
    let rsp = stack::peek(x, 2 * w.bytes() + released, w)?;
    let ss = stack::peek(x, 3 * w.bytes() + released, w)? as u16;
    let ss = return_stack(x, ss, &cs)?;
    check_target(x.cpu, &cs, offset)?;
    selector::set_accessed(x, &found)?;
    to_outer(x, cs, ss, rsp);
    stack::adjust(x, released as i64);
    x.next_rip = offset;
    Ok(())
}

/// The code segment that RET or IRET returns to, and the new CPL.
pub fn return_code(x: &mut Exec<'_>, selector: u16) -> Result<(Found, u8), Stop> {
    // "If the return code or stack segment selector is NULL": #GP(0); "... index is not within its descriptor table limits": #GP(selector).
    if is_null(selector) {
        return Err(Fault::Gp(0).into());
    }
    let error = selector_error(selector);
    let found = selector::find(x, selector)?.ok_or(Fault::Gp(error))?;
    let (d, new_cpl) = (found.descriptor, rpl(selector));
    // "If the return code segment descriptor does not indicate a code segment", "RPL < CPL", "conforming and DPL > RPL",
    // "nonconforming and DPL ≠ RPL": #GP(selector).
    let wrong_level = if d.is_conforming() { d.dpl() > new_cpl } else { d.dpl() != new_cpl };
    if !d.is_code() || new_cpl < x.cpu.cpl() || wrong_level {
        return Err(Fault::Gp(error).into());
    }
    check_long(x.cpu, d, error)?;
    // "If the return code segment is not present": #NP(selector).
    if !d.present() {
        return Err(Fault::Np(error).into());
    }
    Ok((found, new_cpl))
}

/// The stack segment that RET or IRET returns to, with the code segment `cs`.
pub fn return_stack(x: &mut Exec<'_>, selector: u16, cs: &Segment) -> Result<Segment, Stop> {
    let new_cpl = rpl(cs.selector);
    if is_null(selector) {
        // Only 64-bit code below CPL 3 may have a null SS; else "If the return stack segment selector is NULL": #GP(0).
        if is_ia32e(x.cpu) && cs.attr.contains(Attr::L) && new_cpl != 3 {
            return Ok(null_stack(selector, new_cpl));
        }
        return Err(Fault::Gp(0).into());
    }
    let error = selector_error(selector);
    // "... index is not within its descriptor table limits", "RPL ≠ RPL of the return code segment selector", "not a writable data
    // segment", "DPL ≠ RPL of the return code segment selector": #GP(selector).
    let found = selector::find(x, selector)?.ok_or(Fault::Gp(error))?;
    let d = found.descriptor;
    if rpl(selector) != new_cpl || !d.is_writable() || d.dpl() != new_cpl {
        return Err(Fault::Gp(error).into());
    }
    // "If the stack segment is not present": #SS(selector).
    if !d.present() {
        return Err(Fault::Ss(error).into());
    }
    selector::set_accessed(x, &found)?;
    Ok(segment_of(&found, selector))
}

/// Commits a return with a new stack.
pub fn to_outer(x: &mut Exec<'_>, cs: Segment, ss: Segment, rsp: u64) {
    let old_cpl = x.cpu.cpl();
    x.cpu.seg[Seg::Cs as usize] = cs;
    x.cpu.seg[Seg::Ss as usize] = ss;
    stack::set_pointer(x.cpu, rsp);
    let cpl = rpl(cs.selector);
    if cpl > old_cpl {
        selector::drop_privileged_segments(x.cpu, cpl);
    }
}
