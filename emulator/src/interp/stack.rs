//! The stack: one place that knows its address size (SDM 1 6.2.3, 6.2.5), and PUSH, POP, PUSHA, POPA, ENTER, LEAVE.

use crate::cpu::{Attr, CpuState};
use crate::interp::access::{self, is_long64};
use crate::interp::shape::Shape;
use crate::interp::{Exec, Step, Stop, operand};
use crate::isa::{Gpr, Insn, Seg, Width};
use crate::mem::Access;

/// The stack-address size: 64 bits in 64-bit mode, else by the B flag of SS.
#[inline(always)]
pub fn address_width(cpu: &CpuState) -> Width {
    if is_long64(cpu) {
        Width::Q
    } else if cpu.seg[Seg::Ss as usize].attr.contains(Attr::DB) {
        Width::D
    } else {
        Width::W
    }
}

/// The same, by what the loop knows.
#[inline(always)]
fn current_width(x: &Exec<'_>) -> Width {
    if x.lane.is_open() { Width::Q } else { address_width(x.cpu) }
}

/// The stack pointer, cut to the stack-address size.
#[inline(always)]
pub fn pointer(cpu: &CpuState) -> u64 {
    cpu.read(Gpr::Rsp, address_width(cpu))
}

/// Sets the stack pointer: SP, ESP or RSP.
#[inline(always)]
pub fn set_pointer(cpu: &mut CpuState, v: u64) {
    let w = address_width(cpu);
    // Unlike a register write, a 32-bit stack pointer keeps nothing to keep: bits 63:32 are zero outside 64-bit mode.
    cpu.write(Gpr::Rsp, w, v);
}

/// Adds to RSP, ESP or SP.
#[inline(always)]
pub fn adjust(x: &mut Exec<'_>, delta: i64) {
    let a = current_width(x);
    let v = x.cpu.read(Gpr::Rsp, a).wrapping_add_signed(delta);
    x.cpu.write(Gpr::Rsp, a, v);
}

/// Pushes one value; RSP moves when the store is done.
///
/// # Errors
/// #SS, #PF, #AC.
#[inline(always)]
pub fn push(x: &mut Exec<'_>, w: Width, v: u64) -> Step {
    let a = current_width(x);
    let to = a.cut(x.cpu.gpr[Gpr::Rsp as usize].wrapping_sub(w.bytes()));
    access::store(x, Seg::Ss, to, w, v)?;
    x.cpu.write(Gpr::Rsp, a, to);
    Ok(())
}

/// What [`push`] does, but RSP stays.
///
/// # Errors
/// #SS, #PF, #AC.
#[cold]
pub fn store_below(x: &mut Exec<'_>, w: Width, v: u64) -> Step {
    let to = current_width(x).cut(x.cpu.gpr[Gpr::Rsp as usize].wrapping_sub(w.bytes()));
    access::store(x, Seg::Ss, to, w, v)
}

/// The faults that [`push`] would have; nothing is written.
///
/// # Errors
/// #SS, #PF.
#[cold]
pub fn check_push(x: &mut Exec<'_>, w: Width) -> Step {
    let to = current_width(x).cut(x.cpu.gpr[Gpr::Rsp as usize].wrapping_sub(w.bytes()));
    if to & (w.bytes() - 1) != 0 && access::checks_alignment(x.cpu) {
        access::linear(x, Seg::Ss, to, w.bytes(), Access::Write)?;
        return Err(crate::cpu::Fault::Ac.into());
    }
    access::check_write(x, Seg::Ss, to, w.bytes())
}

/// Pops one value.
///
/// # Errors
/// #SS, #PF, #AC.
#[inline(always)]
pub fn pop(x: &mut Exec<'_>, w: Width) -> Result<u64, Stop> {
    let a = current_width(x);
    let from = a.cut(x.cpu.gpr[Gpr::Rsp as usize]);
    let v = access::load(x, Seg::Ss, from, w)?;
    x.cpu.write(Gpr::Rsp, a, from.wrapping_add(w.bytes()));
    Ok(v)
}

/// Reads `depth_bytes` above the top without moving RSP.
///
/// # Errors
/// #SS, #PF, #AC.
#[inline(always)]
pub fn peek(x: &mut Exec<'_>, depth_bytes: u64, w: Width) -> Result<u64, Stop> {
    let a = current_width(x);
    let from = a.cut(x.cpu.gpr[Gpr::Rsp as usize].wrapping_add(depth_bytes));
    access::load(x, Seg::Ss, from, w)
}

/// PUSH of a register, memory or immediate. (Segment registers: [`crate::interp::sensitive`].)
pub fn push_op<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    // SDM 2B PUSH: PUSH rSP pushes the value before; an operand addressed by rSP is addressed before rSP moves.
    let v = operand::read_as::<S>(x, i, 0)?;
    push(x, operand::width_of::<S>(i), v)
}

/// POP to a register or memory.
pub fn pop_op<S: Shape>(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = operand::width_of::<S>(i);
    let v = peek(x, 0, w)?;
    let before = x.cpu.gpr[Gpr::Rsp as usize];
    // SDM 2B POP: an operand addressed by rSP is addressed after rSP moved; POP rSP gives the popped value.
    adjust(x, w.bytes() as i64);
    let done = operand::write_as::<S>(x, i, 0, v);
    if done.is_err() {
        x.cpu.gpr[Gpr::Rsp as usize] = before;
    }
    done
}

/// PUSHA, PUSHAD. As on processors, a fault in the middle leaves what was written below a stack pointer that has not moved.
pub fn pusha(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = i.width;
    let a = address_width(x.cpu);
    let sp = x.cpu.gpr[Gpr::Rsp as usize];
    for (n, r) in Gpr::ALL[..8].iter().enumerate() {
        let v = x.cpu.read(*r, w);
        access::store(x, Seg::Ss, a.cut(sp.wrapping_sub((n as u64 + 1) * w.bytes())), w, v)?;
    }
    adjust(x, -8 * w.bytes() as i64);
    Ok(())
}

/// POPA, POPAD: the slot of rSP is skipped. As on processors, a fault in the middle leaves the registers loaded so far.
pub fn popa(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = i.width;
    for (n, r) in Gpr::ALL[..8].iter().rev().enumerate() {
        let v = peek(x, n as u64 * w.bytes(), w)?;
        if *r != Gpr::Rsp {
            x.cpu.write(*r, w, v);
        }
    }
    adjust(x, 8 * w.bytes() as i64);
    Ok(())
}

/// ENTER size, level.
pub fn enter(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = i.width;
    let a = address_width(x.cpu);
    let size = u64::from(i.iced.immediate16());
    let level = u64::from(i.iced.immediate8_2nd()) % 32;
    let sp = x.cpu.gpr[Gpr::Rsp as usize];
    let bp = x.cpu.gpr[Gpr::Rbp as usize];
    let slot = |n: u64| a.cut(sp.wrapping_sub((n + 1) * w.bytes()));
    // Values are pushed one by one, as processors do: a fault leaves what was written below the stack pointer, which has not moved.
    // The upper half of ESP goes along where the stack has 16 bits, as on Zen 4.
    let kept = if a == Width::W { sp & 0xffff_0000 } else { 0 };
    let frame = slot(0) | kept;
    access::store(x, Seg::Ss, slot(0), w, bp)?;
    for n in 1..level {
        let from = a.cut(bp.wrapping_sub(n * w.bytes()));
        let outer = access::load(x, Seg::Ss, from, w)?;
        access::store(x, Seg::Ss, slot(n), w, outer)?;
    }
    if level > 0 {
        access::store(x, Seg::Ss, slot(level), w, w.cut(frame))?;
    }
    // SDM 2A ENTER: a page fault if a write with the final stack pointer would fault.
    let end = a.cut(slot(level).wrapping_sub(size));
    if end & (w.bytes() - 1) != 0 && access::checks_alignment(x.cpu) {
        return Err(crate::cpu::Fault::Ac.into());
    }
    access::check_write(x, Seg::Ss, end, 1)?;
    x.cpu.write(Gpr::Rbp, w, frame);
    set_pointer(x.cpu, end);
    Ok(())
}

/// LEAVE.
pub fn leave(x: &mut Exec<'_>, i: &Insn) -> Step {
    let a = address_width(x.cpu);
    let from = x.cpu.read(Gpr::Rbp, a);
    let v = access::load(x, Seg::Ss, from, i.width)?;
    set_pointer(x.cpu, from.wrapping_add(i.width.bytes()));
    x.cpu.write(Gpr::Rbp, i.width, v);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Fault;
    use crate::interp::testing::{CODE, DATA, Machine, STACK};
    use crate::vcpu::Exit;

    #[test]
    fn widths_of_push() {
        // push rax; push ax; push -2 (imm8); push word 0x1234; push imm32 sign-extended
        let rows: [(&[u8], u64, u64, Width); 5] = [
            (&[0x50], 8, 0x1122_3344_5566_7788, Width::Q),
            (&[0x66, 0x50], 2, 0x7788, Width::W),
            (&[0x6a, 0xfe], 8, u64::MAX - 1, Width::Q),
            (&[0x66, 0x68, 0x34, 0x12], 2, 0x1234, Width::W),
            (&[0x68, 0, 0, 0, 0x80], 8, 0xffff_ffff_8000_0000, Width::Q),
        ];
        for (code, size, value, w) in rows {
            let mut m = Machine::long64(3, code);
            m.cpu().gpr[0] = 0x1122_3344_5566_7788;
            assert_eq!(m.run(1), Exit::Budget);
            assert_eq!(m.cpu().gpr[4], STACK - size, "{code:x?}");
            assert_eq!(m.load(STACK - size, w), value, "{code:x?}");
        }
    }

    #[test]
    fn push_and_pop_of_the_stack_pointer() {
        // push rsp; pop rsp
        let mut m = Machine::long64(3, &[0x54, 0x5c]);
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.load(STACK - 8, Width::Q), STACK);
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().gpr[4], STACK);
        // pop [rsp]: the address is that after the increment
        let mut m = Machine::long64(3, &[0x8f, 0x04, 0x24]);
        m.mem.store(STACK, Width::Q, 0x55).expect("in RAM");
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.load(STACK + 8, Width::Q), m.cpu().gpr[4]), (0x55, STACK + 8));
        // push [rsp]: the address is that before the decrement
        let mut m = Machine::long64(3, &[0xff, 0x34, 0x24]);
        m.mem.store(STACK, Width::Q, 0x55).expect("in RAM");
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.load(STACK - 8, Width::Q), 0x55);
    }

    #[test]
    fn a_pop_that_faults_leaves_the_stack_pointer() {
        // pop [rax], rax not mapped
        let mut m = Machine::long64(3, &[0x8f, 0x00]);
        m.cpu().gpr[0] = 0x4000_0000;
        assert_eq!(m.run(1), Exit::Exception(Fault::Pf { addr: 0x4000_0000, code: 6 }));
        assert_eq!((m.cpu().rip, m.cpu().gpr[4]), (CODE, STACK));
    }

    #[test]
    fn pusha_and_popa_in_order() {
        let mut m = Machine::real(&[0x60, 0x61]);
        for n in 0..8 {
            if n != 4 {
                m.cpu().gpr[n] = 0x1111 * (n as u64 + 1);
            }
        }
        assert_eq!(m.run(1), Exit::Budget);
        // AX CX DX BX SP BP SI DI downwards
        let slots: Vec<u64> = (1..=8).map(|n| m.load(0x7000 - 2 * n, Width::W)).collect();
        assert_eq!(slots, [0x1111, 0x2222, 0x3333, 0x4444, 0x7000, 0x6666, 0x7777, 0x8888]);
        m.mem.write(0x7000 - 16, &[0; 6]).expect("in RAM");
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().gpr, [0x1111, 0x2222, 0x3333, 0x4444, 0x7000, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn enter_copies_the_display_and_leave_undoes_it() {
        // enter 0x20, 3; leave
        let mut m = Machine::long64(3, &[0xc8, 0x20, 0, 3, 0xc9]);
        m.cpu().gpr[5] = DATA;
        m.mem.store(DATA - 8, Width::Q, 0xaaa).expect("in RAM");
        m.mem.store(DATA - 16, Width::Q, 0xbbb).expect("in RAM");
        assert_eq!(m.run(1), Exit::Budget);
        let slots: Vec<u64> = (1..=4).map(|n| m.load(STACK - 8 * n, Width::Q)).collect();
        assert_eq!(slots, [DATA, 0xaaa, 0xbbb, STACK - 8]);
        assert_eq!((m.cpu().gpr[5], m.cpu().gpr[4]), (STACK - 8, STACK - 32 - 0x20));
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().gpr[5], m.cpu().gpr[4]), (DATA, STACK));
    }
}
