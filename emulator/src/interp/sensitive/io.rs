//! IN OUT INS OUTS, with IOPL and the I/O permission map (SDM 1 19.5; SDM 2A, 2B).

use crate::cpu::{Fault, Rflags};
use crate::interp::sensitive::selector::is_protected;
use crate::interp::sensitive::task;
use crate::interp::{Exec, Step, Stop, access, operand};
use crate::isa::{Gpr, Insn, Operand, Seg, Width};
use iced_x86::{Mnemonic, OpKind};

/// "IF ((PE = 1) and ((CPL > IOPL) or (VM = 1))) and any I/O Permission Bit for the I/O port being accessed = 1: #GP(0)".
fn check(x: &mut Exec<'_>, port: u16, w: Width) -> Step {
    let by_level = if is_protected(x.cpu) {
        x.cpu.cpl() <= x.cpu.rflags.iopl()
    } else {
        // Virtual-8086 mode asks the map always, real mode never.
        !x.cpu.rflags.contains(Rflags::VM)
    };
    if by_level || task::ports_allowed(x, port, w.bytes())? { Ok(()) } else { Err(Fault::Gp(0).into()) }
}

fn read_port(x: &Exec<'_>, port: u16, w: Width) -> u64 {
    let mut data = [0; 8];
    x.bus.read_port(port, &mut data[..w.bytes() as usize]);
    u64::from_le_bytes(data)
}

fn write_port(x: &Exec<'_>, port: u16, w: Width, v: u64) {
    x.bus.write_port(port, &v.to_le_bytes()[..w.bytes() as usize]);
}

/// The port: an immediate byte or DX.
fn port(x: &mut Exec<'_>, i: &Insn, n: usize) -> Result<u16, Stop> {
    Ok(match i.ops[n] {
        Operand::Imm(v) => v as u16 & 0xff,
        _ => operand::read(x, i, n)? as u16,
    })
}

/// IN.
pub fn r#in(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = operand::width(i, 0);
    let port = port(x, i, 1)?;
    check(x, port, w)?;
    let v = read_port(x, port, w);
    x.cpu.write(Gpr::Rax, w, v);
    Ok(())
}

/// OUT.
pub fn out(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = operand::width(i, 1);
    let port = port(x, i, 0)?;
    check(x, port, w)?;
    write_port(x, port, w, x.cpu.read(Gpr::Rax, w));
    Ok(())
}

/// Elements done before the loop gets a look at interrupts.
const BATCH: u64 = 256;

/// Runs `element` once, or rCX times under REP; each is committed before the next. RIP stays until the last one.
fn repeat(
    x: &mut Exec<'_>,
    i: &Insn,
    address: Width,
    mut element: impl FnMut(&mut Exec<'_>) -> Result<(), Stop>,
) -> Step {
    if !(i.iced.has_rep_prefix() || i.iced.has_repne_prefix()) {
        return element(x);
    }
    // A single step traps after each element.
    let mut budget = if x.cpu.rflags.contains(Rflags::TF) { 1 } else { BATCH };
    loop {
        let left = x.cpu.read(Gpr::Rcx, address);
        if left == 0 {
            return Ok(());
        }
        if budget == 0 {
            x.next_rip = x.cpu.rip;
            return Ok(());
        }
        element(x)?;
        budget -= 1;
        x.cpu.write(Gpr::Rcx, address, left - 1);
    }
}

fn element_width(i: &Insn) -> Width {
    match i.iced.mnemonic() {
        Mnemonic::Insb | Mnemonic::Outsb => Width::B,
        Mnemonic::Insw | Mnemonic::Outsw => Width::W,
        _ => Width::D,
    }
}

fn advance(x: &mut Exec<'_>, r: Gpr, address: Width, w: Width) {
    let step = if x.cpu.rflags.contains(Rflags::DF) { w.bytes().wrapping_neg() } else { w.bytes() };
    let v = x.cpu.read(r, address).wrapping_add(step);
    x.cpu.write(r, address, v);
}

/// INS: the destination is known to be writable before the port is read, for a read cannot be taken back.
pub fn ins(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = element_width(i);
    let address = match i.iced.op0_kind() {
        OpKind::MemoryESDI => Width::W,
        OpKind::MemoryESEDI => Width::D,
        _ => Width::Q,
    };
    repeat(x, i, address, |x| {
        let port = x.cpu.read(Gpr::Rdx, Width::W) as u16;
        check(x, port, w)?;
        let to = x.cpu.read(Gpr::Rdi, address);
        access::check_write(x, Seg::Es, to, w.bytes())?;
        let v = read_port(x, port, w);
        access::store(x, Seg::Es, to, w, v)?;
        advance(x, Gpr::Rdi, address, w);
        Ok(())
    })
}

/// OUTS.
pub fn outs(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = element_width(i);
    let address = match i.iced.op1_kind() {
        OpKind::MemorySegSI => Width::W,
        OpKind::MemorySegESI => Width::D,
        _ => Width::Q,
    };
    let source = Seg::from_iced(i.iced.memory_segment()).unwrap_or(Seg::Ds);
    repeat(x, i, address, |x| {
        let port = x.cpu.read(Gpr::Rdx, Width::W) as u16;
        check(x, port, w)?;
        let from = x.cpu.read(Gpr::Rsi, address);
        let v = access::load(x, source, from, w)?;
        write_port(x, port, w, v);
        advance(x, Gpr::Rsi, address, w);
        Ok(())
    })
}
