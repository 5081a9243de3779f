//! IN OUT INS OUTS, with IOPL and the I/O permission map (SDM 1 19.5; SDM 2A, 2B).

use crate::bus::Bus;
use crate::cpu::{Fault, Rflags};
use crate::interp::sensitive::selector::is_protected;
use crate::interp::sensitive::task;
use crate::interp::{Exec, Step, Stop, access, operand, watch};
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
    if !by_level && !task::ports_allowed(x, port, w.bytes())? {
        return Err(Fault::Gp(0).into());
    }
    watch::port(x, port, w.bytes());
    Ok(())
}

/// Reads a port; whoever asks may.
#[inline]
pub fn read_port(bus: &dyn Bus, port: u16, w: Width) -> u64 {
    // Each is read back in the width it was written in, so that the processor can forward it.
    match w {
        Width::B => {
            let mut data = [0; 1];
            bus.read_port(port, &mut data);
            data[0].into()
        }
        Width::W => {
            let mut data = [0; 2];
            bus.read_port(port, &mut data);
            u16::from_le_bytes(data).into()
        }
        Width::D | Width::Q => {
            let mut data = [0; 4];
            bus.read_port(port, &mut data);
            u32::from_le_bytes(data).into()
        }
    }
}

/// Writes a port; whoever asks may.
#[inline]
pub fn write_port(bus: &dyn Bus, port: u16, w: Width, v: u64) {
    bus.write_port(port, &v.to_le_bytes()[..w.bytes() as usize]);
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
    let v = read_port(x.bus, port, w);
    x.cpu.write(Gpr::Rax, w, v);
    Ok(())
}

/// OUT.
pub fn out(x: &mut Exec<'_>, i: &Insn) -> Step {
    let w = operand::width(i, 1);
    let port = port(x, i, 0)?;
    check(x, port, w)?;
    write_port(x.bus, port, w, x.cpu.read(Gpr::Rax, w));
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
    // A single step traps after each element, and so may a breakpoint.
    let mut budget = if x.cpu.rflags.contains(Rflags::TF) || x.watching { 1 } else { BATCH };
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
    let port = x.cpu.read(Gpr::Rdx, Width::W) as u16;
    // Also if nothing is to be repeated.
    check(x, port, w)?;
    repeat(x, i, address, |x| {
        let to = x.cpu.read(Gpr::Rdi, address);
        access::check_write(x, Seg::Es, to, w.bytes())?;
        let v = read_port(x.bus, port, w);
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
    let source = i.implicit_segment();
    let port = x.cpu.read(Gpr::Rdx, Width::W) as u16;
    check(x, port, w)?;
    repeat(x, i, address, |x| {
        let from = x.cpu.read(Gpr::Rsi, address);
        let v = access::load(x, source, from, w)?;
        write_port(x.bus, port, w, v);
        advance(x, Gpr::Rsi, address, w);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use crate::bus::Bus;
    use crate::cpu::{Fault, Rflags};
    use crate::interp::sensitive::testing::machine;
    use crate::interp::testing::{CODE, DATA, Machine};
    use crate::isa::{Gpr, Width};
    use crate::vcpu::{Board, Exit, Vcpu};
    use std::sync::Mutex;

    /// Reads count upwards from 0x11; all accesses are noted: port, bytes written or `None` for a read of that many.
    #[derive(Default)]
    struct Ports(Mutex<Vec<(u16, usize, Option<u64>)>>);

    impl Bus for Ports {
        fn read_port(&self, port: u16, data: &mut [u8]) {
            let mut log = self.0.lock().expect("one thread");
            data.fill(0x11 + log.len() as u8);
            log.push((port, data.len(), None));
        }
        fn write_port(&self, port: u16, data: &[u8]) {
            let v = data.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b));
            self.0.lock().expect("one thread").push((port, data.len(), Some(v)));
        }
        fn read_mmio(&self, _: u64, _: &mut [u8]) {}
        fn write_mmio(&self, _: u64, _: &[u8]) {}
        fn take_interrupt(&self) -> Option<u8> {
            None
        }
    }

    fn run(m: &mut Machine, n: u64) -> (Exit, Vec<(u16, usize, Option<u64>)>) {
        let ports = Ports::default();
        let exit = m.vcpu.run(Board { mem: &m.mem, bus: &ports }, n);
        (exit, ports.0.into_inner().expect("one thread"))
    }

    /// IN AL, 0x60; IN AX, DX; IN EAX, DX; OUT 0x61, AL; OUT DX, EAX: widths, and what IN leaves of RAX.
    #[test]
    fn widths() {
        let mut m = machine(0, &[0xe4, 0x60, 0x66, 0xed, 0xed, 0xe6, 0xf1, 0xef]);
        m.cpu().gpr[Gpr::Rdx as usize] = 0xffff_1234;
        m.cpu().gpr[Gpr::Rax as usize] = u64::MAX;
        assert_eq!(run(&mut m, 1), (Exit::Budget, vec![(0x60, 1, None)]));
        assert_eq!(m.cpu().gpr[0], 0xffff_ffff_ffff_ff11);
        assert_eq!(run(&mut m, 1).1, [(0x1234, 2, None)]);
        assert_eq!(m.cpu().gpr[0], 0xffff_ffff_ffff_1111);
        assert_eq!(run(&mut m, 1).1, [(0x1234, 4, None)]);
        assert_eq!(m.cpu().gpr[0], 0x1111_1111);
        assert_eq!(run(&mut m, 1).1, [(0xf1, 1, Some(0x11))]);
        assert_eq!(run(&mut m, 1).1, [(0x1234, 4, Some(0x1111_1111))]);
    }

    /// REP INSW to two pages of which the second is absent: the port is read for the elements that fit, and no more.
    #[test]
    fn ins_does_not_read_what_it_cannot_store() {
        let mut m = machine(0, &[0xf3, 0x66, 0x6d]);
        m.cpu().gpr[Gpr::Rdx as usize] = 0x1f0;
        m.cpu().gpr[Gpr::Rcx as usize] = 8;
        // RAM ends at 2 MiB, the mapping too.
        m.cpu().gpr[Gpr::Rdi as usize] = (2 << 20) - 6;
        let (exit, log) = run(&mut m, 1);
        assert_eq!(exit, Exit::Exception(Fault::Pf { addr: 2 << 20, code: 2 }));
        assert_eq!(log, [(0x1f0, 2, None); 3]);
        assert_eq!((m.cpu().gpr[Gpr::Rcx as usize], m.cpu().gpr[Gpr::Rdi as usize], m.cpu().rip), (5, 2 << 20, CODE));
        assert_eq!(m.load((2 << 20) - 2, Width::W), 0x1313);
    }

    /// REP OUTSB, downwards.
    #[test]
    fn outs() {
        let mut m = machine(0, &[0xf3, 0x6e]);
        m.mem.write(DATA, b"abc").expect("RAM");
        m.cpu().gpr[Gpr::Rdx as usize] = 0xe9;
        m.cpu().gpr[Gpr::Rcx as usize] = 3;
        m.cpu().gpr[Gpr::Rsi as usize] = DATA + 2;
        m.cpu().rflags |= Rflags::DF;
        let (exit, log) = run(&mut m, 1);
        assert_eq!(exit, Exit::Budget);
        assert_eq!(log, [(0xe9, 1, Some(0x63)), (0xe9, 1, Some(0x62)), (0xe9, 1, Some(0x61))]);
        assert_eq!((m.cpu().gpr[Gpr::Rcx as usize], m.cpu().gpr[Gpr::Rsi as usize]), (0, DATA - 1));
        // Nothing to do: no access.
        m.cpu().rip = CODE;
        assert_eq!(run(&mut m, 1), (Exit::Budget, vec![]));
    }

    /// A repetition longer than a batch is one instruction of the budget.
    #[test]
    fn long_repetitions() {
        let mut m = machine(0, &[0xf3, 0x6e, 0x90]);
        m.cpu().gpr[Gpr::Rcx as usize] = 1000;
        m.cpu().gpr[Gpr::Rsi as usize] = DATA;
        let (exit, log) = run(&mut m, 1);
        assert_eq!((exit, log.len(), m.cpu().rip), (Exit::Budget, 1000, CODE + 2));
    }
}
