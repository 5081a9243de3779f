//! Lockstep of machines: a small guest does the same on interpreter and translator, and a bug planted in the translator's results is
//! found and cut down to one instruction.

#[path = "common/planted.rs"]
mod planted;

use bivisor_emulator::cpu::Rflags;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::interp::sensitive::time::TimeSource;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::machine::{Config, Machine, boot};
use bivisor_emulator::vcpu::Vcpu;
use bivisor_testsuite::lockstep::machine::{Plan, run};
use bivisor_translator::Translator;
use iced_x86::code_asm::*;
use planted::{Bug, Planted};
use std::sync::Arc;

const CODE: u64 = 0x10_0000;
const ROUNDS: u64 = 30_000;

/// Arithmetic, memory, a port, a long repetition, the clock; for ever.
fn code() -> Vec<u8> {
    let assemble = || -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let mut again = a.create_label();
        a.mov(rsp, 0x30_0000u64)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.inc(rbx)?;
        a.lea(rcx, qword_ptr(rbx * 8 + 5))?;
        a.mov(rdi, 0x20_0000u64)?;
        a.mov(qword_ptr(rdi + 64), rcx)?;
        a.add(qword_ptr(rdi + 8), rcx)?;
        a.mov(ecx, 37)?;
        a.rep().stosb()?;
        a.imul_2(rcx, rbx)?;
        a.rdtsc()?;
        a.in_(al, 0x61)?;
        a.test(bl, 7)?;
        a.jne(again)?;
        a.pushfq()?;
        a.pop(rdx)?;
        a.jmp(again)?;
        a.assemble(CODE)
    };
    assemble().expect("it can be assembled")
}

fn machine(vcpu: Box<dyn Vcpu + Send>) -> Result<Machine, String> {
    let mut machine = Machine::new(vcpu, Config::bare(16 << 20))?;
    let (mem, cpu) = machine.guest();
    boot::start_long(mem, cpu, &code(), CODE)?;
    Ok(machine)
}

/// Interpreter and translator, the latter with a bug if `planted`.
fn pair(planted: Option<u64>) -> Result<(Machine, Machine), String> {
    let model = Arc::new(CpuModel::host());
    let mut reference = Interpreter::new(model.clone());
    reference.env().time = TimeSource::deterministic(0);
    let mut engine = Translator::new(model).map_err(|e| e.to_string())?;
    engine.env().time = TimeSource::deterministic(0);
    let tested: Box<dyn Vcpu + Send> = match planted {
        // It loses a bit of a register when the guest's counter has reached a value.
        Some(at) => {
            let mut last = 0;
            let bug: Bug = Box::new(move |_, s| {
                let count = s.gpr[Gpr::Rbx as usize];
                if last < at && count >= at {
                    s.rflags.toggle(Rflags::AF);
                    s.gpr[Gpr::R9 as usize] ^= 4;
                }
                last = count;
            });
            Box::new(Planted { engine, bug })
        }
        None => Box::new(engine),
    };
    Ok((machine(Box::new(reference))?, machine(tested)?))
}

#[test]
fn a_small_guest_does_the_same() {
    for every in [20_000, 100, 1] {
        let instructions = if every == 1 { 20_000 } else { 15 * ROUNDS };
        let outcome = run(&mut || pair(None), Plan { instructions, every }, &mut |_| {}).expect("machines");
        assert!(
            outcome.parting.is_none(),
            "every {every}: {:x?}",
            outcome.parting.map(|p| (p.after, p.within, p.changes))
        );
        assert!(outcome.instructions >= instructions && outcome.comparisons >= instructions / every, "{outcome:?}");
    }
}

#[test]
fn a_planted_bug_is_cut_down_to_an_instruction() {
    let plan = Plan { instructions: 15 * ROUNDS, every: 20_000 };
    let outcome = run(&mut || pair(Some(7_777)), plan, &mut |_| {}).expect("machines");
    let parting = outcome.parting.expect("found");
    assert_eq!((parting.within, parting.before.gpr[Gpr::Rbx as usize]), (1, 7_776), "{parting:x?}");
    // INC RBX.
    assert_eq!(&parting.code[..3], [0x48, 0xff, 0xc3]);
    let what: Vec<&str> = parting.changes.iter().map(|c| c.what.as_str()).collect();
    assert_eq!(what, ["r9", "rflags"], "{:?}", parting.changes);
}
