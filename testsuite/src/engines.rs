//! The engines a case runs on: the host CPU, and every [`Vcpu`] there is, on RAM and on the process's own memory.

use crate::host::{Host, Regs};
use crate::world::{self, Outcome, Setup};
use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Fault};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::mem::GuestMemory;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_kvm_backend::{HostKvm, KvmVm};
use bivisor_translator::Translator;
use iced_x86::{Decoder, DecoderOptions, FlowControl, OpKind};
use std::sync::Arc;

/// Runs one instruction; `Err` says why it cannot run this one.
type Run = Box<dyn FnMut(&Setup) -> Result<Outcome, String>>;

/// An engine with its world.
pub struct Engine {
    /// How it is called in reports.
    pub name: &'static str,
    /// Is it the host CPU itself, whose undefined results the others must share?
    pub is_host: bool,
    /// Why it cannot agree with the host CPU in corners, if so: a KVM that is software has bugs of its own.
    pub inexact: Option<String>,
    /// Runs one instruction.
    pub run: Run,
}

/// All engines to be had here, the host CPU first; and the others with the reason why not.
pub fn engines() -> (Vec<Engine>, Vec<(&'static str, String)>) {
    let mut have = Vec::new();
    let mut missing = Vec::new();
    let mut add = |name: &'static str, is_host, run: Result<Run, String>| match run {
        Ok(run) => {
            let kvm = bivisor_kvm_backend::host();
            let software = name.starts_with("kvm") && !kvm.usable_for_machine;
            have.push(Engine { name, is_host, inexact: software.then(|| kvm.reason.clone()), run });
        }
        Err(why) => missing.push((name, why)),
    };
    let flat = || world::flat().ok_or("the host has no room at the addresses of the test world".to_string());
    add("host", true, flat().map(host));
    let interpreter = || Box::<Interpreter>::default();
    add("interp", false, Ok(vcpu(interpreter(), world::ram(), Way::Once)));
    add("interp-flat", false, flat().map(|m| vcpu(interpreter(), m, Way::Once)));
    let model = Arc::new(CpuModel::host());
    let translator = || Translator::new(model.clone()).map_err(|e| format!("no executable memory: {e}"));
    add("bt", false, translator().map(|t| vcpu(Box::new(t), world::ram(), Way::ToInt3)));
    add("bt-step", false, translator().map(|t| vcpu(Box::new(t), world::ram(), Way::Once)));
    add("bt-flat", false, translator().and_then(|t| Ok(vcpu(Box::new(t), flat()?, Way::ToInt3))));
    add("bt-flat-step", false, translator().and_then(|t| Ok(vcpu(Box::new(t), flat()?, Way::Once))));
    let kvm = || KvmVm::new(model.clone()).map(|vm| Box::new(vm.vcpu()));
    let process = kvm().and_then(|k| Ok(vcpu(k, flat()?, Way::ToInt3)));
    add("kvm-flat", false, process.and_then(|p| usable(p, |h| h.usable_for_process)));
    let process = kvm().and_then(|k| Ok(vcpu(k, flat()?, Way::Once)));
    add("kvm-flat-step", false, process.and_then(|p| usable(p, |h| h.usable_for_process)));
    let machine = kvm().map(|k| vcpu(k, world::ram(), Way::Once));
    add("kvm", false, machine.and_then(|m| usable(m, |h| h.usable_for_process)));
    (have, missing)
}

/// Keeps an engine on KVM only where the host can have it.
fn usable(run: Run, is: fn(&HostKvm) -> bool) -> Result<Run, String> {
    let host = bivisor_kvm_backend::host();
    if is(host) { Ok(run) } else { Err(host.reason.clone()) }
}

/// Of a page fault's error code: it was an instruction fetch.
const FETCH: u16 = 16;

/// How an engine is told to do one instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// With a budget of one.
    Once,
    /// Without a budget, into the INT3 that is everywhere else on the page: what an engine does at full speed.
    ToInt3,
}

/// Runs the instruction through the contract of the engines.
fn vcpu(mut engine: Box<dyn Vcpu>, mem: GuestMemory, way: Way) -> Run {
    engine.set_intercepts(Intercepts::EXCEPTIONS);
    Box::new(move |setup| {
        if setup.bitness == 16 && mem.flat().is_some() {
            return Err("no real mode in a process".into());
        }
        if way == Way::ToInt3 && !reaches_int3(setup) {
            return Err("does not come to an INT3".into());
        }
        world::fill(&mem, setup);
        let before = setup.state();
        *engine.state() = before.clone();
        let board = Board { mem: &mem, bus: &EmptyBus };
        let exit = match way {
            Way::Once if setup.count > 1 => engine.run(board, setup.count),
            Way::Once => once(&mut *engine, board, before.rip),
            Way::ToInt3 => engine.run(board, u64::MAX),
        };
        let int3 = way == Way::ToInt3 && exit == Exit::Exception(Fault::Bp);
        if int3 {
            // A trap: RIP is behind it.
            let state = engine.state();
            state.rip = state.rip.wrapping_sub(1);
        }
        let fault = match exit {
            // Without a budget it jumps first, and fails to fetch then.
            Exit::Exception(Fault::Pf { code, .. }) if way == Way::ToInt3 && code & FETCH != 0 => {
                return Err("leaves the page of the code".into());
            }
            Exit::Exception(_) if way == Way::ToInt3 && !on_code_page(engine.state().rip) => {
                return Err("leaves the page of the code".into());
            }
            Exit::Budget => None,
            Exit::Exception(_) if int3 => None,
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
            other: others(&before, after),
        })
    })
}

/// One instruction; a repeated string instruction may take one budget for each element.
fn once(engine: &mut dyn Vcpu, board: Board<'_>, rip: u64) -> Exit {
    let mut exit = engine.run(board, 1);
    for _ in 0..64 {
        if exit != Exit::Budget || engine.state().rip != rip {
            break;
        }
        exit = engine.run(board, 1);
    }
    exit
}

fn on_code_page(rip: u64) -> bool {
    (world::CODE..world::CODE + 0x1000).contains(&rip)
}

/// Does the instruction go on to an INT3, wherever it goes? Not if it jumps to itself or leaves the page.
fn reaches_int3(setup: &Setup) -> bool {
    let insn = Decoder::with_ip(setup.bitness, &setup.code, world::CODE, DecoderOptions::NONE).decode();
    match insn.flow_control() {
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::Call => {
            insn.near_branch_target() != world::CODE && on_code_page(insn.near_branch_target())
        }
        FlowControl::Interrupt => false,
        _ => true,
    }
}

/// What changed besides registers, flags and RIP.
fn others(before: &CpuState, after: &CpuState) -> String {
    let mut expected = before.clone();
    expected.gpr = after.gpr;
    expected.rip = after.rip;
    expected.rflags = after.rflags;
    expected.cr2 = after.cr2;
    if expected == *after {
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
        let (fault, regs) = host.run(&Regs { gpr: setup.gpr, rflags: setup.rflags });
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
        let rflags = (regs.rflags & !0x1_0000) | (setup.rflags & 0x1_0000);
        // Where the fault was; without one it may have been anywhere.
        let advance = fault.and(host.fault_offset());
        Ok(Outcome { fault, gpr, rflags, advance, image: world::image(&mem), other: String::new() })
    })
}
