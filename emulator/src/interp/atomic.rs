//! Exchange-and-add, compare-and-exchange: XADD CMPXCHG CMPXCHG8B CMPXCHG16B (SDM 2A, 2B; 3A 8.1.2).

use crate::cpu::{Fault, Rflags};
use crate::interp::access::{self, accessor};
use crate::interp::arith::set_status;
use crate::interp::{Exec, Step, Stop, alu, operand};
use crate::isa::{Gpr, Insn, MemRef, Operand, Width};
use crate::mem::Access;

/// XADD: with the same register twice the sum stays.
pub fn xadd(x: &mut Exec<'_>, i: &Insn) -> Step {
    let b = operand::read(x, i, 1)?;
    if !matches!(i.ops[0], Operand::Mem(_)) {
        let a = operand::read(x, i, 0)?;
        let (sum, f) = alu::add(i.width, a, b, false);
        operand::write(x, i, 1, a)?;
        operand::write(x, i, 0, sum)?;
        set_status(x, f);
        return Ok(());
    }
    let mut status = Rflags::empty();
    let (old, _) = operand::modify(x, i, |a| {
        let (sum, f) = alu::add(i.width, a, b, false);
        status = f;
        sum
    })?;
    operand::write(x, i, 1, old)?;
    set_status(x, status);
    Ok(())
}

/// CMPXCHG: the destination is written even if the comparison fails, then with what it held.
pub fn cmpxchg(x: &mut Exec<'_>, i: &Insn) -> Step {
    let new = operand::read(x, i, 1)?;
    let expected = x.cpu.read(Gpr::Rax, i.width);
    if !matches!(i.ops[0], Operand::Mem(_)) {
        let found = operand::read(x, i, 0)?;
        if found == expected {
            operand::write(x, i, 0, new)?;
        } else {
            x.cpu.write(Gpr::Rax, i.width, found);
        }
        set_status(x, alu::sub(i.width, expected, found, false).1);
        return Ok(());
    }
    let (found, _) = operand::modify(x, i, |v| if v == expected { new } else { v })?;
    if found != expected {
        x.cpu.write(Gpr::Rax, i.width, found);
    }
    set_status(x, alu::sub(i.width, expected, found, false).1);
    Ok(())
}

/// EDX:EAX or ECX:EBX.
fn pair(x: &Exec<'_>, high: Gpr, low: Gpr) -> u64 {
    x.cpu.read(high, Width::D) << 32 | x.cpu.read(low, Width::D)
}

/// CMPXCHG8B: changes ZF only.
pub fn cmpxchg8b(x: &mut Exec<'_>, i: &Insn) -> Step {
    let Operand::Mem(m) = i.ops[0] else { return Err(Fault::Ud.into()) };
    let expected = pair(x, Gpr::Rdx, Gpr::Rax);
    let new = pair(x, Gpr::Rcx, Gpr::Rbx);
    let offset = operand::effective_address(x, i, &m);
    let (found, _) = operand::modify_memory(x, i, m.seg, offset, Width::Q, |v| if v == expected { new } else { v })?;
    if found != expected {
        x.cpu.write(Gpr::Rax, Width::D, found);
        x.cpu.write(Gpr::Rdx, Width::D, found >> 32);
    }
    x.cpu.rflags.set(Rflags::ZF, found == expected);
    Ok(())
}

/// CMPXCHG16B: changes ZF only; a misaligned operand is #GP(0).
pub fn cmpxchg16b(x: &mut Exec<'_>, i: &Insn) -> Step {
    let Operand::Mem(m) = i.ops[0] else { return Err(Fault::Ud.into()) };
    let expected = [x.cpu.gpr[Gpr::Rax as usize], x.cpu.gpr[Gpr::Rdx as usize]];
    let new = [x.cpu.gpr[Gpr::Rbx as usize], x.cpu.gpr[Gpr::Rcx as usize]];
    let found = exchange_16(x, i, &m, expected, new)?;
    if found != expected {
        x.cpu.gpr[Gpr::Rax as usize] = found[0];
        x.cpu.gpr[Gpr::Rdx as usize] = found[1];
    }
    x.cpu.rflags.set(Rflags::ZF, found == expected);
    Ok(())
}

/// Gives what was found.
fn exchange_16(x: &mut Exec<'_>, i: &Insn, m: &MemRef, expected: [u64; 2], new: [u64; 2]) -> Result<[u64; 2], Stop> {
    let offset = operand::effective_address(x, i, m);
    // Before the address is known to be canonical (Zen 4).
    if !x.cpu.segment(m.seg).base.wrapping_add(offset).is_multiple_of(16) {
        return Err(Fault::Gp(0).into());
    }
    let laddr = access::linear(x, m.seg, offset, 16, Access::Write)?;
    let by = accessor(x.cpu);
    let gpa = x.mmu.translate(x.cpu, x.mem, laddr, Access::Write, by)?;
    if let Some(done) = x.mem.compare_exchange_16(gpa, expected, new) {
        return Ok(done.err().unwrap_or(expected));
    }
    // Not RAM: a device, or a process's page that faults. Nobody can see two accesses as one there.
    let mut bytes = [0; 16];
    access::check_write(x, m.seg, offset, 16)?;
    access::read_bytes(x, m.seg, offset, &mut bytes)?;
    let found = u128::from_le_bytes(bytes);
    let found = [found as u64, (found >> 64) as u64];
    let value = if found == expected { new } else { found };
    let bytes = (u128::from(value[1]) << 64 | u128::from(value[0])).to_le_bytes();
    access::write_bytes(x, m.seg, offset, &bytes)?;
    Ok(found)
}
