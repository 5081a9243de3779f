//! Far CALL JMP RET through code segments and call gates (SDM 2A CALL, JMP, 2B RET; SDM 3A 5.8).

use crate::cpu::descriptor::{Descriptor, is_null, kind, rpl, selector_error};
use crate::cpu::{Attr, CpuState, Fault, Segment};
use crate::interp::access::{self, is_canonical};
use crate::interp::alu::Vendor;
use crate::interp::sensitive::selector::{self, Found, is_ia32e, is_protected, null_stack, segment_of};
use crate::interp::sensitive::switch::{self, Cause};
use crate::interp::sensitive::task;
use crate::interp::{Exec, Step, Stop, Why, operand, stack};
use crate::isa::{Gpr, Insn, Seg, Width};
use crate::mem::Access;
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

/// The RIP that `offset` comes to in the new code segment. "If the target offset is beyond the new code segment limit", in 64-bit code "is in a
/// non-canonical form": #GP(0). Of a 64-bit offset in code that is not, Raptor Cove takes the lower half (JMP, CALL, RET and IRET).
pub fn check_target(cpu: &CpuState, cs: &Segment, offset: u64) -> Result<u64, Fault> {
    let long = is_ia32e(cpu) && cs.attr.contains(Attr::L);
    let rip = if long || Vendor::host() == Vendor::Amd { offset } else { Width::D.cut(offset) };
    let ok = if long { is_canonical(cpu, rip) } else { rip <= u64::from(cs.limit) };
    if ok { Ok(rip) } else { Err(Fault::Gp(0)) }
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
        access::check_integer(x, Seg::Ss, slot(n), w, Access::Write)?;
    }
    for (n, v) in values.iter().enumerate() {
        access::store(x, Seg::Ss, slot(n), w, w.cut(*v))?;
    }
    stack::adjust(x, -((w.bytes() * values.len() as u64) as i64));
    Ok(())
}

/// The frame of a far CALL at the same level. Processors store word by word: the first is in memory though the second faults, and the
/// exceptions come in that order (seen on Zen 4 and Raptor Cove; APM 3 CALL writes them as two stores, SDM 2A CALL checks first that there is
/// room for all).
fn push_return(x: &mut Exec<'_>, w: Width, values: [u64; 2]) -> Step {
    let (a, top) = (stack::address_width(x.cpu), stack::pointer(x.cpu));
    for (n, v) in (1..).zip(values) {
        access::store(x, Seg::Ss, a.cut(top.wrapping_sub(w.bytes() * n)), w, w.cut(v))?;
    }
    stack::adjust(x, -2 * w.bytes() as i64);
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
        return direct(x, w, cs, offset, is_call);
    }
    match d.kind() {
        kind::CALL_GATE if d.is_system() => gate(x, selector, is_call),
        kind::CALL_GATE16 if d.is_system() && !is_ia32e(x.cpu) => gate(x, selector, is_call),
        kind::TASK_GATE | kind::TSS_AVAILABLE | kind::TSS16_AVAILABLE if d.is_system() && !is_ia32e(x.cpu) => {
            task(x, selector, d, is_call)
        }
        // "If the segment descriptor for the selector ... is not for a conforming or nonconforming code segment, call gate, task gate, or
        // task state segment"; in IA-32e mode task gates, TSSs and 16-bit call gates are none: #GP(selector).
        _ => Err(Fault::Gp(error).into()),
    }
}

/// TASK-GATE and TASK-STATE-SEGMENT.
fn task(x: &mut Exec<'_>, selector: u16, d: Descriptor, is_call: bool) -> Step {
    let error = selector_error(selector);
    // "If the DPL for a task gate or TSS is less than the CPL or than the RPL": #GP(selector).
    if d.dpl() < x.cpu.cpl() || d.dpl() < rpl(selector) {
        return Err(Fault::Gp(error).into());
    }
    if !d.present() {
        return Err(Fault::Np(error).into());
    }
    let by = if is_call { Cause::Call } else { Cause::Jmp };
    let tss = if d.kind() == kind::TASK_GATE { d.gate_selector() } else { selector };
    switch::to_tss(x, tss, by)
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

/// The transfer itself, at the same privilege level. Zen 4 checks the offset before it pushes, Raptor Cove after: the frame of a CALL to where
/// no code can be is in memory, and only RSP is as it was.
fn direct(x: &mut Exec<'_>, w: Width, cs: Segment, offset: u64, is_call: bool) -> Step {
    let checked = check_target(x.cpu, &cs, offset);
    if !is_call || Vendor::host() == Vendor::Amd {
        checked?;
    }
    let (from, rsp) = (*x.cpu.segment(Seg::Cs), x.cpu.gpr[Gpr::Rsp as usize]);
    // The frame is pushed by the rules of the code that is called: a 64-bit stack if compatibility code calls 64-bit code; 64-bit code has
    // one stack for all.
    if !access::is_long64(x.cpu) {
        x.cpu.seg[Seg::Cs as usize] = cs;
    }
    let pushed = if is_call { push_return(x, w, [u64::from(from.selector), x.next_rip]) } else { Ok(()) };
    match pushed.and_then(|()| Ok(checked?)) {
        Ok(rip) => {
            x.cpu.seg[Seg::Cs as usize] = cs;
            x.next_rip = rip;
            Ok(())
        }
        Err(stop) => {
            x.cpu.seg[Seg::Cs as usize] = from;
            x.cpu.gpr[Gpr::Rsp as usize] = rsp;
            Err(stop)
        }
    }
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
    direct(x, w, cs, offset, is_call)
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
        return Err(match stop.why() {
            Why::Fault(Fault::Ss(_)) => Fault::Ss(selector_error(ss.selector)).into(),
            _ => stop,
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

/// How much of a stack slot with a selector is read: Zen 4 reads all of it, Raptor Cove the word that counts.
pub fn selector_width(w: Width) -> Width {
    if Vendor::host() == Vendor::Amd { w } else { Width::W }
}

/// Offset and selector on top of the stack. The selector is read first (seen on Zen 4 and Raptor Cove).
pub fn return_address(x: &mut Exec<'_>, w: Width) -> Result<(u64, u16), Stop> {
    let selector = stack::peek(x, w.bytes(), selector_width(w))? as u16;
    Ok((stack::peek(x, 0, w)?, selector))
}

/// SP and SS above them, `depth` bytes from the top; SS is read first, as [`return_address`] has it.
pub fn return_pointer(x: &mut Exec<'_>, depth: u64, w: Width) -> Result<(u64, u16), Stop> {
    let selector = stack::peek(x, depth + w.bytes(), selector_width(w))? as u16;
    Ok((stack::peek(x, depth, w)?, selector))
}

/// Far RET, with and without an immediate.
pub fn ret(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = match i.iced.code() {
        Code::Retfw | Code::Retfw_imm16 => Width::W,
        Code::Retfq | Code::Retfq_imm16 => Width::Q,
        _ => Width::D,
    };
    let released = if i.iced.op_count() > 0 { u64::from(i.iced.immediate16()) } else { 0 };
    let (offset, selector) = return_address(x, w)?;
    if !is_protected(x.cpu) {
        let cs = selector::real_segment(x.cpu, Seg::Cs, selector);
        x.next_rip = check_target(x.cpu, &cs, offset)?;
        x.cpu.seg[Seg::Cs as usize] = cs;
        stack::adjust(x, (2 * w.bytes() + released) as i64);
        return Ok(());
    }
    let (found, new_cpl) = return_code(x, selector)?;
    let cs = code_segment(&found, selector, new_cpl);
    if new_cpl == x.cpu.cpl() {
        let rip = check_target(x.cpu, &cs, offset)?;
        selector::set_accessed(x, &found)?;
        // The frame is popped by the rules of the old code; parameters are released by those of the new: 64-bit code has all of RSP.
        stack::adjust(x, (2 * w.bytes()) as i64);
        x.cpu.seg[Seg::Cs as usize] = cs;
        stack::adjust(x, released as i64);
        x.next_rip = rip;
        return Ok(());
    }
    let (rsp, ss) = return_pointer(x, 2 * w.bytes() + released, w)?;
    let ss = return_stack(x, ss, &cs)?;
    let rip = check_target(x.cpu, &cs, offset)?;
    selector::set_accessed(x, &found)?;
    to_outer(x, cs, ss, rsp);
    stack::adjust(x, released as i64);
    x.next_rip = rip;
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

#[cfg(test)]
mod tests {
    use crate::cpu::{Fault, Mode, Segment};
    use crate::interp::sensitive::testing::*;
    use crate::interp::testing::{CODE, DATA, Machine, STACK};
    use crate::isa::{Gpr, Seg, Width};
    use crate::vcpu::Exit;

    const RSP: usize = Gpr::Rsp as usize;

    fn gp(code: u16) -> Exit {
        Exit::Exception(Fault::Gp(code))
    }

    /// A far pointer with a 32-bit offset at DATA.
    fn pointer(m: &Machine, selector: u16, offset: u32) {
        m.mem.store(DATA, Width::D, u64::from(offset)).expect("RAM");
        m.mem.store(DATA + 4, Width::W, u64::from(selector)).expect("RAM");
    }

    /// JMP FAR [DATA], CALL FAR [DATA].
    const JMP: [u8; 7] = [0xff, 0x2c, 0x25, 0, 0, 1, 0];
    const CALL: [u8; 7] = [0xff, 0x1c, 0x25, 0, 0, 1, 0];

    #[test]
    fn direct_targets() {
        let cases = [
            (0, KERNEL_CODE, Ok(KERNEL_CODE)),
            (0, CONFORMING, Ok(CONFORMING)),
            (3, CONFORMING, Ok(CONFORMING | 3)),
            (3, USER_CODE, Ok(USER_CODE | 3)),
            (3, USER_CODE32 | 3, Ok(USER_CODE32 | 3)),
            (3, KERNEL_CODE | 3, Err(gp(KERNEL_CODE))),
            (0, USER_CODE, Err(gp(USER_CODE))),
            (0, KERNEL_CODE | 3, Err(gp(KERNEL_CODE))),
            (0, 0, Err(gp(0))),
            (0, 3, Err(gp(0))),
            (0, KERNEL_DATA, Err(gp(KERNEL_DATA))),
            (0, TSS, Err(gp(TSS))),
            (0, 0xfff8, Err(gp(0xfff8))),
            (0, BAD_CODE, Err(gp(BAD_CODE))),
            (0, ABSENT_CODE, Err(Exit::Exception(Fault::Np(ABSENT_CODE)))),
        ];
        for (cpl, selector, want) in cases {
            for code in [JMP, CALL] {
                let mut m = machine(cpl, &code);
                pointer(&m, selector, 0x9000);
                let old = m.cpu().segment(Seg::Cs).selector;
                let exit = m.run(1);
                let what = format!("CPL {cpl} {selector:#x}");
                match want {
                    Ok(cs) => {
                        assert_eq!(exit, Exit::Budget, "{what}");
                        assert_eq!((m.cpu().segment(Seg::Cs).selector, m.cpu().rip), (cs, 0x9000), "{what}");
                        assert_eq!(m.cpu().cpl(), cpl, "{what}");
                        if code == CALL {
                            assert_eq!(m.cpu().gpr[RSP], STACK - 8, "{what}");
                            assert_eq!(m.load(STACK - 4, Width::D), u64::from(old), "{what}");
                            assert_eq!(m.load(STACK - 8, Width::D), CODE + 7, "{what}");
                        }
                    }
                    Err(want) => {
                        assert_eq!(exit, want, "{what}");
                        assert_eq!((m.cpu().rip, m.cpu().gpr[RSP]), (CODE, STACK), "{what}");
                    }
                }
            }
        }
    }

    /// Compatibility mode and back: the mode follows CS.
    #[test]
    fn compatibility_mode() {
        let mut m = machine(0, &JMP);
        pointer(&m, KERNEL_CODE32, 0x9000);
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().mode(), Mode::Compat32);
        // JMP 0x08:0x8000 (EA).
        m.mem.write(0x9000, &[0xea, 0x00, 0x80, 0, 0, 0x08, 0]).expect("RAM");
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().mode(), m.cpu().rip), (Mode::Long64, CODE));
    }

    /// A CALL through a 64-bit gate from CPL 3: stack from the TSS, null SS, a frame of four quadwords.
    #[test]
    fn call_gate_to_ring_0() {
        let mut m = machine(3, &CALL);
        m.mem.store(TSS_BASE + 4, Width::Q, 0x1_8000).expect("RAM");
        pointer(&m, GATE | 3, 0xdead);
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().rip, m.cpu().cpl()), (GATE_TARGET, 0));
        assert_eq!(m.cpu().segment(Seg::Cs).selector, KERNEL_CODE);
        assert_eq!(m.cpu().segment(Seg::Ss).selector, 0);
        assert_eq!(m.cpu().gpr[RSP], 0x1_8000 - 32);
        let frame: Vec<u64> = (0..4).map(|n| m.load(0x1_8000 - 32 + 8 * n, Width::Q)).collect();
        assert_eq!(frame, [CODE + 7, u64::from(USER_CODE | 3), STACK, u64::from(USER_DATA | 3)]);
        // RETFQ comes back; a kernel data segment left in DS becomes null.
        m.mem.write(GATE_TARGET, &[0x48, 0xcb]).expect("RAM");
        m.cpu().seg[Seg::Ds as usize] = Segment::data32(KERNEL_DATA, 0);
        m.cpu().seg[Seg::Es as usize] = Segment::data32(USER_DATA | 3, 3);
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().rip, m.cpu().cpl(), m.cpu().gpr[RSP]), (CODE + 7, 3, STACK));
        assert_eq!(*m.cpu().segment(Seg::Ds), Segment::unusable(0));
        assert_eq!(m.cpu().segment(Seg::Es).selector, USER_DATA | 3);
    }

    /// A JMP through a gate cannot change the level; at the same level it works.
    #[test]
    fn jmp_through_a_gate() {
        let mut m = machine(3, &JMP);
        pointer(&m, GATE | 3, 0);
        assert_eq!(m.run(1), gp(KERNEL_CODE));
        let mut m = machine(0, &JMP);
        pointer(&m, GATE, 0);
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().rip, GATE_TARGET);
    }

    #[test]
    fn gate_faults() {
        for (low, high, want) in [
            (0x0000_8c00_0008_9000u64, 0u64, gp(GATE)), // DPL 0, called at CPL 3
            (0x0000_6c00_0008_9000, 0, Exit::Exception(Fault::Np(GATE))),
            (0x0000_ec00_0008_9000, 0x0000_0100_0000_0000, gp(GATE)), // type in the upper half
            (0x0000_ec00_0000_9000, 0, gp(0)),                        // null code selector
            (0x0000_ec00_0010_9000, 0, gp(KERNEL_DATA)),
            (0x0000_ec00_00a0_9000, 0, gp(KERNEL_CODE32)), // not 64-bit code
            (0x0000_ec00_0098_9000, 0, Exit::Exception(Fault::Np(ABSENT_CODE))),
            (0x0000_ec00_0008_9000, 0x8000, gp(0)), // target not canonical
            (0x0000_e400_0008_9000, 0, gp(GATE)),   // a 16-bit gate is none here
        ] {
            let mut m = machine(3, &CALL);
            m.mem.store(TSS_BASE + 4, Width::Q, 0x1_8000).expect("RAM");
            m.mem.store(GDT + u64::from(GATE), Width::Q, low).expect("RAM");
            m.mem.store(GDT + u64::from(GATE) + 8, Width::Q, high).expect("RAM");
            pointer(&m, GATE | 3, 0);
            let before = m.cpu().clone();
            assert_eq!(m.run(1), want, "{low:#x} {high:#x}");
            assert_eq!(*m.cpu(), before, "{low:#x} {high:#x}");
        }
        // The TSS is too short for RSP0; RSP0 is not canonical.
        for (limit, rsp0, want) in [(0xa, 0x1_8000, Fault::Ts(TSS)), (0x67, 0x9000_0000_0000, Fault::Ss(0))] {
            let mut m = machine(3, &CALL);
            m.mem.store(TSS_BASE + 4, Width::Q, rsp0).expect("RAM");
            m.cpu().tr.limit = limit;
            pointer(&m, GATE | 3, 0);
            let before = m.cpu().clone();
            assert_eq!(m.run(1), Exit::Exception(want));
            assert_eq!(*m.cpu(), before);
        }
    }

    /// RETFQ with a frame of our own.
    fn retf(cpl: u8, code: &[u8], frame: [u64; 4]) -> (Exit, Machine) {
        let mut m = machine(cpl, code);
        for (n, v) in (0..).zip(frame) {
            m.mem.store(STACK + 8 * n, Width::Q, v).expect("RAM");
        }
        let exit = m.run(1);
        (exit, m)
    }

    #[test]
    fn returns_check_everything() {
        let (uc, ud, kc, kd) =
            (u64::from(USER_CODE | 3), u64::from(USER_DATA | 3), u64::from(KERNEL_CODE), u64::from(KERNEL_DATA));
        for (cpl, frame, want) in [
            (0, [0x9000, kc, 0, 0], Ok((0x9000, STACK + 16))),
            (0, [0x9000, uc, 0x1_9000, ud], Ok((0x9000, 0x1_9000))),
            (3, [0x9000, uc, 0, 0], Ok((0x9000, STACK + 16))),
            (3, [0x9000, kc, 0, 0], Err(gp(KERNEL_CODE))), // RPL < CPL
            (0, [0x9000, kc | 3, 0x1_9000, ud], Err(gp(KERNEL_CODE))),
            (0, [0x9000, 0, 0, 0], Err(gp(0))),
            (0, [0x9000, kd, 0, 0], Err(gp(KERNEL_DATA))),
            (0, [0x8000_0000_0000, kc, 0, 0], Err(gp(0))),
            (0, [0x9000, uc, 0x1_9000, 0], Err(gp(0))),
            (0, [0x9000, uc, 0x1_9000, kd], Err(gp(KERNEL_DATA))),
            (0, [0x9000, uc, 0x1_9000, ud & !3], Err(gp(USER_DATA))),
            (0, [0x8000_0000_0000, uc, 0x1_9000, ud], Err(gp(0))),
        ] {
            let (exit, mut m) = retf(cpl, &[0x48, 0xcb], frame);
            match want {
                Ok((rip, rsp)) => {
                    assert_eq!(exit, Exit::Budget, "{frame:x?}");
                    assert_eq!((m.cpu().rip, m.cpu().gpr[RSP]), (rip, rsp), "{frame:x?}");
                    assert_eq!(u64::from(m.cpu().segment(Seg::Cs).selector), frame[1]);
                }
                Err(want) => {
                    assert_eq!(exit, want, "{frame:x?}");
                    assert_eq!((m.cpu().rip, m.cpu().gpr[RSP], m.cpu().cpl()), (CODE, STACK, cpl), "{frame:x?}");
                }
            }
        }
        // RETFQ 16: the parameters go from both stacks.
        let mut m = machine(0, &[0x48, 0xca, 16, 0]);
        for (n, v) in (0..).zip([0x9000, uc, 0, 0, 0x1_9000, ud]) {
            m.mem.store(STACK + 8 * n, Width::Q, v).expect("RAM");
        }
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().rip, m.cpu().gpr[RSP], m.cpu().cpl()), (0x9000, 0x1_9010, 3));
    }

    /// Real mode: CALL 0x0100:0x2000 (9A) and RETF.
    #[test]
    fn real_mode() {
        let mut m = Machine::real(&[0x9a, 0x00, 0x20, 0x00, 0x01]);
        m.mem.write(0x3000, &[0xcb]).expect("RAM");
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().segment(Seg::Cs).base, m.cpu().rip), (0x1000, 0x2000));
        assert_eq!((m.load(0x6ffe, Width::W), m.load(0x6ffc, Width::W)), (0, CODE + 5));
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().segment(Seg::Cs).base, m.cpu().rip, m.cpu().gpr[RSP]), (0, CODE + 5, 0x7000));
    }
}
