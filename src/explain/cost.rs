//! What one instruction costs on each engine, in a loop of a ring-0 guest less the empty loop.

use crate::compare::nano::Bench;
use crate::guest::{ENGINES, EXIT, Engine, Guest, PARAM, WINDOW};
use anyhow::Result;
use bivisor_emulator::isa::Insn;
use iced_x86::code_asm::*;
use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Register};
use std::collections::BTreeMap;
use std::time::Duration;

/// Can it stand in a loop? It goes on behind itself, leaves the loop's counter alone and can be given back its stack.
fn fits(iced: &Instruction) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let taken = |r: Register| r.full_register() == Register::R15;
    let free = factory.info(iced).used_registers().iter().all(|u| !taken(u.register()));
    iced.flow_control() == FlowControl::Next && free && iced.mnemonic() != iced_x86::Mnemonic::Hlt
}

fn guest(insn: Option<&(Insn, Vec<u8>)>) -> Result<Guest> {
    Guest::new(|a| {
        let mut again = a.create_label();
        a.mov(r15, qword_ptr(PARAM))?;
        a.mov(eax, WINDOW as u32)?;
        for r in [rbx, rcx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14] {
            a.mov(r, rax)?;
        }
        a.xor(edx, edx)?;
        a.set_label(&mut again)?;
        if let Some((insn, bytes)) = insn {
            a.db(bytes)?;
            match insn.iced.stack_pointer_increment() {
                0 => {}
                moved => a.lea(rsp, ptr(rsp - moved))?,
            }
        }
        a.dec(r15)?;
        a.jnz(again)?;
        a.out(i32::from(EXIT), al)?;
        a.cli()?;
        a.hlt()?;
        Ok(Vec::new())
    })
}

/// Nanoseconds by engine; an engine where it faults or is not to be had is left out.
pub fn measure(insn: &Insn, bytes: &[u8]) -> BTreeMap<&'static str, f64> {
    let mut out = BTreeMap::new();
    if !fits(&insn.iced) {
        return out;
    }
    let this = (*insn, bytes.to_vec());
    for engine in ENGINES {
        let time = |what: Option<&(Insn, Vec<u8>)>| -> Result<f64> {
            let mut bench = Bench::of(guest(what)?, Engine::new(engine)?);
            Ok(bench.measure(5, Duration::from_millis(3))?.median)
        };
        if let (Ok(empty), Ok(full)) = (time(None), time(Some(&this))) {
            out.insert(engine, (full - empty).max(0.0));
        }
    }
    out
}
