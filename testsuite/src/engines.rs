//! The engines a case runs on: the host CPU, and every [`Vcpu`] there is, on RAM and on the process's own memory.

use crate::host::{Host, Regs};
use crate::world::{self, Outcome, Setup};
use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::{CpuState, Fault};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::mem::GuestMemory;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use iced_x86::{Decoder, DecoderOptions, FlowControl, OpKind};

/// Runs one instruction; `Err` says why it cannot run this one.
type Run = Box<dyn FnMut(&Setup) -> Result<Outcome, String>>;

/// An engine with its world.
pub struct Engine {
    /// How it is called in reports.
    pub name: &'static str,
    /// Is it the host CPU itself, whose undefined results the others must share?
    pub is_host: bool,
    /// Runs one instruction.
    pub run: Run,
}

/// All engines to be had here, the host CPU first; and the others with the reason why not.
pub fn engines() -> (Vec<Engine>, Vec<(&'static str, String)>) {
    let mut have = Vec::new();
    let mut missing = Vec::new();
    let mut add = |name, is_host, run: Result<Run, String>| match run {
        Ok(run) => have.push(Engine { name, is_host, run }),
        Err(why) => missing.push((name, why)),
    };
    let flat = || world::flat().ok_or("the host has no room at the addresses of the test world".to_string());
    add("host", true, flat().map(host));
    add("interp", false, Ok(vcpu(Box::<Interpreter>::default(), world::ram(), Compare::Everything)));
    add("interp-flat", false, flat().map(|m| vcpu(Box::<Interpreter>::default(), m, Compare::Everything)));
    (have, missing)
}

/// How much of the state an engine promises to keep bit by bit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compare {
    Everything,
}

/// Runs the instruction through the contract of the engines.
fn vcpu(mut engine: Box<dyn Vcpu>, mem: GuestMemory, compare: Compare) -> Run {
    engine.set_intercepts(Intercepts::EXCEPTIONS);
    Box::new(move |setup| {
        if setup.bitness == 16 && mem.flat().is_some() {
            return Err("no real mode in a process".into());
        }
        world::fill(&mem, setup);
        let before = setup.state();
        *engine.state() = before.clone();
        let board = Board { mem: &mem, bus: &EmptyBus };
        let mut exit = engine.run(board, 1);
        // A repeated string instruction may take one budget for each element.
        for _ in 0..64 {
            if exit != Exit::Budget || engine.state().rip != before.rip {
                break;
            }
            exit = engine.run(board, 1);
        }
        let fault = match exit {
            Exit::Budget => None,
            Exit::Exception(fault) => Some(fault),
            other => return Err(format!("left with {other:?}")),
        };
        let after = engine.state();
        Ok(Outcome {
            fault,
            gpr: after.gpr,
            rflags: after.rflags.bits(),
            advance: Some(after.rip.wrapping_sub(before.rip)),
            image: world::image(&mem),
            other: others(&before, after, compare),
        })
    })
}

/// What changed besides registers, flags and RIP.
fn others(before: &CpuState, after: &CpuState, compare: Compare) -> String {
    let mut expected = before.clone();
    expected.gpr = after.gpr;
    expected.rip = after.rip;
    expected.rflags = after.rflags;
    expected.cr2 = after.cr2;
    if compare == Compare::Everything && expected == *after {
        return String::new();
    }
    if expected.seg != after.seg {
        return format!("segments {:x?}", after.seg);
    }
    if expected.xsave != after.xsave {
        return "the XSAVE area".into();
    }
    "system registers or activity".into()
}

/// Runs the instruction on the host CPU.
fn host(mem: GuestMemory) -> Run {
    Box::new(move |setup| {
        let insn = Decoder::with_ip(setup.bitness, &setup.code, world::CODE, DecoderOptions::NONE).decode();
        let relative =
            (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) && insn.is_ip_rel_memory_operand();
        if !insn.is_invalid() && (insn.flow_control() != FlowControl::Next || relative) {
            return Err("depends on where it stands".into());
        }
        let Some(mut host) = Host::new(setup.bitness) else {
            return Err(format!("the host runs no {}-bit user code", setup.bitness));
        };
        world::fill(&mem, setup);
        host.load(&setup.code);
        let (fault, regs) = host.run(&Regs { gpr: setup.gpr, rflags: setup.rflags | 0x200 });
        let mut gpr = regs.gpr;
        if setup.bitness == 32 {
            // Neither stored by 32-bit code nor reachable from it.
            gpr[8..].copy_from_slice(&setup.gpr[8..]);
            gpr[..8].iter_mut().for_each(|r| *r &= 0xffff_ffff);
        }
        // The kernel tells a #GP from a #SS, but gives no error code for either; RF is set in what a fault pushes.
        let fault = fault.map(|f| match f {
            Fault::Gp(_) => Fault::Gp(0),
            f => f,
        });
        let rflags = (regs.rflags & !0x1_0200) | (setup.rflags & 0x1_0200);
        Ok(Outcome { fault, gpr, rflags, advance: None, image: world::image(&mem), other: String::new() })
    })
}
