//! Near control transfer: JMP, CALL, RET, Jcc, LOOP, JrCXZ (SDM 2A, 2B). Far forms are in [`crate::interp::sensitive`].
//!
//! The target is checked before anything else is written: #GP(0) for a non-canonical address or one behind the limit of CS. Only CALL on
//! Intel's processors has stored the return address by then.

use crate::cpu::{CpuState, Fault, Rflags};
use crate::interp::access::{is_canonical, is_long64};
use crate::interp::alu::Vendor;
use crate::interp::condition::condition;
use crate::interp::{Exec, Step, operand, stack};
use crate::isa::{Gpr, Insn, Seg, Width};
use iced_x86::{Code, ConditionCode as Cc};

/// Sets the next RIP to `target`, cut to `w`.
///
/// # Errors
/// #GP(0) if nothing can be fetched from there.
#[inline(always)]
pub fn jump_to(x: &mut Exec<'_>, w: Width, target: u64) -> Step {
    x.next_rip = checked(x, w, target)?;
    Ok(())
}

#[inline(always)]
fn checked(x: &Exec<'_>, w: Width, target: u64) -> Result<u64, Fault> {
    let target = w.cut(target);
    let cpu: &CpuState = x.cpu;
    let ok = if x.lane.is_open() || is_long64(cpu) {
        is_canonical(cpu, target)
    } else {
        // SDM 2A JMP: tempEIP beyond the limit of CS: #GP(0).
        target <= u64::from(cpu.segment(Seg::Cs).limit)
    };
    if ok { Ok(target) } else { Err(Fault::Gp(0)) }
}

#[inline(always)]
fn jump_if(x: &mut Exec<'_>, i: &Insn, taken: bool) -> Step {
    if taken {
        let target = relative(x, i);
        return jump_to(x, i.width, target);
    }
    Ok(())
}

/// Target of a near branch with an immediate displacement.
#[inline(always)]
fn relative(x: &Exec<'_>, i: &Insn) -> u64 {
    match i.ops[0] {
        crate::isa::Operand::Imm(d) => x.next_rip.wrapping_add(d),
        _ => x.next_rip,
    }
}

/// Target of JMP and CALL: displacement, register or memory.
#[inline(always)]
fn target(x: &mut Exec<'_>, i: &Insn) -> Result<u64, crate::interp::Stop> {
    match i.ops[0] {
        crate::isa::Operand::Imm(d) => Ok(x.next_rip.wrapping_add(d)),
        _ => operand::read(x, i, 0),
    }
}

/// JMP near.
pub fn jmp(x: &mut Exec<'_>, i: &Insn) -> Step {
    let to = target(x, i)?;
    jump_to(x, i.width, to)
}

/// CALL near.
pub fn call(x: &mut Exec<'_>, i: &Insn) -> Step {
    let to = target(x, i)?;
    let to = match checked(x, i.width, to) {
        Ok(to) => to,
        Err(fault) => {
            // The faults of the push come first. Raptor Cove has even stored it, and only RSP is as it was; Zen 4 stores nothing.
            match Vendor::host() {
                Vendor::Amd => stack::check_push(x, i.width)?,
                Vendor::Intel => stack::store_below(x, i.width, x.next_rip)?,
            }
            return Err(fault.into());
        }
    };
    stack::push(x, i.width, x.next_rip)?;
    x.next_rip = to;
    Ok(())
}

/// RET near, with or without a count of bytes to release.
pub fn ret(x: &mut Exec<'_>, i: &Insn) -> Step {
    let to = stack::peek(x, 0, i.width)?;
    jump_to(x, i.width, to)?;
    let release = match i.ops[0] {
        crate::isa::Operand::Imm(n) => n & 0xffff,
        _ => 0,
    };
    stack::adjust(x, (i.width.bytes() + release) as i64);
    Ok(())
}

#[inline(always)]
fn flag(x: &Exec<'_>, f: Rflags) -> bool {
    x.cpu.rflags.intersects(f)
}

/// JO: OF = 1.
pub fn jo(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::o))
}

/// JNO: OF = 0.
pub fn jno(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::no))
}

/// JB, JC, JNAE: CF = 1.
pub fn jb(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::b))
}

/// JAE, JNB, JNC: CF = 0.
pub fn jae(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::ae))
}

/// JE, JZ: ZF = 1.
pub fn je(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::e))
}

/// JNE, JNZ: ZF = 0.
pub fn jne(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::ne))
}

/// JBE, JNA: CF = 1 or ZF = 1.
pub fn jbe(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::be))
}

/// JA, JNBE: CF = 0 and ZF = 0.
pub fn ja(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::a))
}

/// JS: SF = 1.
pub fn js(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::s))
}

/// JNS: SF = 0.
pub fn jns(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::ns))
}

/// JP, JPE: PF = 1.
pub fn jp(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::p))
}

/// JNP, JPO: PF = 0.
pub fn jnp(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::np))
}

/// JL, JNGE: SF <> OF.
pub fn jl(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::l))
}

/// JGE, JNL: SF = OF.
pub fn jge(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::ge))
}

/// JLE, JNG: ZF = 1 or SF <> OF.
pub fn jle(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::le))
}

/// JG, JNLE: ZF = 0 and SF = OF.
pub fn jg(x: &mut Exec<'_>, i: &Insn) -> Step {
    jump_if(x, i, condition(x.cpu.rflags, Cc::g))
}

/// The count register of LOOP and JrCXZ: CX, ECX or RCX by the address size.
fn count_width(i: &Insn) -> Width {
    match i.iced.code() {
        Code::Loop_rel8_16_CX | Code::Loop_rel8_32_CX => Width::W,
        Code::Loope_rel8_16_CX | Code::Loope_rel8_32_CX => Width::W,
        Code::Loopne_rel8_16_CX | Code::Loopne_rel8_32_CX => Width::W,
        Code::Jcxz_rel8_16 | Code::Jcxz_rel8_32 => Width::W,
        Code::Loop_rel8_16_RCX | Code::Loop_rel8_64_RCX => Width::Q,
        Code::Loope_rel8_16_RCX | Code::Loope_rel8_64_RCX => Width::Q,
        Code::Loopne_rel8_16_RCX | Code::Loopne_rel8_64_RCX => Width::Q,
        Code::Jrcxz_rel8_16 | Code::Jrcxz_rel8_64 => Width::Q,
        _ => Width::D,
    }
}

/// Counts down and jumps while the count is not zero and `also` holds. The count stays if the target faults.
fn count_down(x: &mut Exec<'_>, i: &Insn, also: bool) -> Step {
    let w = count_width(i);
    let count = w.cut(x.cpu.read(Gpr::Rcx, w).wrapping_sub(1));
    jump_if(x, i, count != 0 && also)?;
    x.cpu.write(Gpr::Rcx, w, count);
    Ok(())
}

/// LOOP.
pub fn r#loop(x: &mut Exec<'_>, i: &Insn) -> Step {
    count_down(x, i, true)
}

/// LOOPE, LOOPZ.
pub fn loope(x: &mut Exec<'_>, i: &Insn) -> Step {
    count_down(x, i, flag(x, Rflags::ZF))
}

/// LOOPNE, LOOPNZ.
pub fn loopne(x: &mut Exec<'_>, i: &Insn) -> Step {
    count_down(x, i, !flag(x, Rflags::ZF))
}

/// JCXZ, JECXZ, JRCXZ.
pub fn jrcxz(x: &mut Exec<'_>, i: &Insn) -> Step {
    let zero = x.cpu.read(Gpr::Rcx, count_width(i)) == 0;
    jump_if(x, i, zero)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interp::testing::{CODE, Machine, STACK};
    use crate::vcpu::Exit;

    #[test]
    fn call_and_ret() {
        // call +3; (3 bytes); ret 0x10
        let mut m = Machine::long64(3, &[0xe8, 3, 0, 0, 0, 0x90, 0x90, 0x90, 0xc2, 0x10, 0]);
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().rip, CODE + 8);
        assert_eq!(m.load(STACK - 8, Width::Q), CODE + 5);
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().rip, CODE + 5);
        assert_eq!(m.cpu().gpr[Gpr::Rsp as usize], STACK + 0x10);
    }

    #[test]
    fn a_target_that_is_not_canonical_changes_no_register() {
        // jmp rax; call rax; ret
        for code in [&[0xff, 0xe0][..], &[0xff, 0xd0], &[0xc3]] {
            let mut m = Machine::long64(3, code);
            m.cpu().gpr[0] = 0x0000_8000_0000_0000;
            m.mem.store(STACK, Width::Q, 0x0000_8000_0000_0000).expect("in RAM");
            let before = m.cpu().clone();
            assert_eq!(m.run(1), Exit::Exception(Fault::Gp(0)));
            assert_eq!(*m.cpu(), before);
            // Raptor Cove has stored where a CALL would return to.
            let stored = code == [0xff, 0xd0] && Vendor::host() == Vendor::Intel;
            assert_eq!(m.load(STACK - 8, Width::Q), if stored { CODE + 2 } else { 0 });
        }
    }

    #[test]
    fn the_faults_of_a_calls_push_come_before_that_of_its_target() {
        let mut m = Machine::long64(3, &[0xff, 0xd0]);
        m.cpu().gpr[0] = 0x0000_8000_0000_0000;
        m.cpu().gpr[Gpr::Rsp as usize] = 0x0000_8000_0000_1000;
        assert_eq!(m.run(1), Exit::Exception(Fault::Ss(0)));
    }

    #[test]
    fn conditions() {
        // Opcode 0x70 + n; flags for which it is taken, and for which it is not (SDM 1 appendix B).
        let (o, c, z, s, p) = (Rflags::OF, Rflags::CF, Rflags::ZF, Rflags::SF, Rflags::PF);
        let none = Rflags::empty();
        let rows: [(&[Rflags], &[Rflags]); 8] = [
            (&[o], &[none, c | z | s | p]),
            (&[c], &[none, o | z | s | p]),
            (&[z], &[none, o | c | s | p]),
            (&[c, z, c | z], &[none, o | s | p]),
            (&[s], &[none, o | c | z | p]),
            (&[p], &[none, o | c | z | s]),
            (&[s, o], &[none, s | o, z | c]),
            (&[s, o, z, z | s | o], &[none, s | o, c | p]),
        ];
        for (n, (taken, not)) in rows.iter().enumerate() {
            for (set, flags, jumps) in taken
                .iter()
                .map(|f| (0, f, true))
                .chain(not.iter().map(|f| (0, f, false)))
                .flat_map(|(_, f, j)| [(0, f, j), (1, f, !j)])
            {
                let mut m = Machine::long64(3, &[0x70 + 2 * n as u8 + set, 0x10]);
                m.cpu().rflags = *flags | Rflags::FIXED;
                assert_eq!(m.run(1), Exit::Budget);
                let expected = CODE + if jumps { 0x12 } else { 2 };
                assert_eq!(m.cpu().rip, expected, "{:#x} with {flags:?}", 0x70 + 2 * n as u8 + set);
            }
        }
    }

    #[test]
    fn loops_count_in_the_address_size() {
        // loop -2 with RCX = 1_0000_0001; with 67: ECX.
        let mut m = Machine::long64(3, &[0xe2, 0xfe]);
        m.cpu().gpr[1] = 0x1_0000_0001;
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().rip, m.cpu().gpr[1]), (CODE, 0x1_0000_0000));
        let mut m = Machine::long64(3, &[0x67, 0xe2, 0xfd]);
        m.cpu().gpr[1] = 0x1_0000_0001;
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().rip, m.cpu().gpr[1]), (CODE + 3, 0));
        let mut m = Machine::real(&[0xe2, 0xfe]);
        m.cpu().gpr[1] = 0x1_0000;
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!((m.cpu().rip, m.cpu().gpr[1]), (CODE, 0x1_ffff));
    }
}
