//! Every encoding of every privileged instruction at CPL 3: #GP(0), or #UD where the manual says so; nothing else changes. The host
//! CPU judges (SDM 3A 5.9; SDM 2, "Exceptions" of each instruction).

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::{CpuModel, CpuState, Cr4, Fault, Rflags};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::isa::{Insn, Privilege, decode};
use bivisor_emulator::mem::GuestMemory;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_testsuite::host::{Host, Regs};
use bivisor_testsuite::world;
use iced_x86::{Mnemonic as M, OpKind, Register};
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// The encodings whose facts have one of these privileges.
fn encodings(privileges: &[Privilege]) -> Vec<(Vec<u8>, Insn)> {
    static ALL: OnceLock<Vec<(Vec<u8>, Insn)>> = OnceLock::new();
    let all = ALL.get_or_init(enumerate);
    all.iter().filter(|(_, i)| privileges.contains(&i.facts.privilege)).cloned().collect()
}

/// All encodings with one legacy prefix and REX.W, REX.R, REX.B or none, every opcode of the three legacy maps, every ModRM byte: the
/// first one of each form of each instruction that asks for a privilege. A form is code and operand kinds, and the number of a control
/// or debug register.
fn enumerate() -> Vec<(Vec<u8>, Insn)> {
    let mut found = BTreeMap::new();
    for legacy in [None, Some(0x66), Some(0xf2), Some(0xf3)] {
        for rex in [None, Some(0x48), Some(0x44), Some(0x41)] {
            let prefixes: Vec<u8> = legacy.into_iter().chain(rex).collect();
            for map in [&[][..], &[0x0f], &[0x0f, 0x38]] {
                for (opcode, modrm) in (0..=0xffffu16).map(|n| ((n >> 8) as u8, n as u8)) {
                    let bytes = [&prefixes[..], map, &[opcode, modrm, 0, 0, 0, 0, 0, 0, 0, 0]].concat();
                    let Ok(i) = decode(&bytes, 64) else { continue };
                    if i.facts.privilege == Privilege::Anyone {
                        continue;
                    }
                    let operands: Vec<(u32, u32)> = (0..i.iced.op_count()).map(|n| operand_form(&i, n)).collect();
                    let bytes = bytes[..usize::from(i.len)].to_vec();
                    found.entry((i.iced.code() as u32, operands)).or_insert((bytes, i));
                }
            }
        }
    }
    found.into_values().collect()
}

fn operand_form(i: &Insn, n: u32) -> (u32, u32) {
    let kind = i.iced.op_kind(n);
    let r = if kind == OpKind::Register { i.iced.op_register(n) } else { Register::None };
    (kind as u32, if r.is_cr() || r.is_dr() { r as u32 } else { 0 })
}

struct Bench {
    engine: Interpreter,
    mem: GuestMemory,
    setup: world::Setup,
}

impl Bench {
    fn new() -> Bench {
        let mut engine = Interpreter::default();
        engine.set_intercepts(Intercepts::EXCEPTIONS);
        // Every register holds an address that exists; DX is port 0 then.
        let gpr = [world::DATA; 16];
        let setup =
            world::Setup { bitness: 64, code: vec![], count: 1, gpr, rflags: 2, image: world::Image::default() };
        Bench { engine, mem: world::ram(), setup }
    }

    /// The exception of one instruction at CPL 3; the rest of the state must not change.
    fn run(&mut self, code: &[u8], change: impl Fn(&mut CpuState)) -> Result<(), Fault> {
        self.setup.code = code.to_vec();
        world::fill(&self.mem, &self.setup);
        let mut before = self.setup.state();
        change(&mut before);
        *self.engine.state() = before.clone();
        match self.engine.run(Board { mem: &self.mem, bus: &EmptyBus }, 1) {
            Exit::Exception(fault) => {
                assert!(*self.engine.state() == before, "{code:02x?}: {fault:?} changed the state");
                Err(fault)
            }
            Exit::Budget => Ok(()),
            exit => panic!("{code:02x?} left with {exit:?}"),
        }
    }
}

/// Control and debug registers that no processor has.
fn names_no_register(i: &Insn) -> bool {
    let absent = |r: Register| {
        (r.is_cr() && !matches!(r as u32 - Register::CR0 as u32, 0 | 2 | 3 | 4 | 8))
            || (r.is_dr() && r as u32 - Register::DR0 as u32 > 7)
    };
    i.iced.mnemonic() == M::Mov
        && (0..2).any(|n| i.iced.op_kind(n) == OpKind::Register && absent(i.iced.op_register(n)))
}

#[test]
fn privileged_instructions_fault_at_cpl_3() {
    let model = CpuModel::host();
    let privileged = encodings(&[Privilege::Cpl0, Privilege::Cpl0OrUd]);
    let mut bench = Bench::new();
    let mut host = Host::new(64).expect("64-bit code runs here");
    let (mut tried, mut judged) = (0, 0);
    for (code, i) in &privileged {
        let got = bench.run(code, |_| {});
        let what = format!("{code:02x?} {}", i.iced);
        let undefined =
            !model.supports(i.iced.code()) || i.facts.privilege == Privilege::Cpl0OrUd || names_no_register(i);
        let want = if undefined { Fault::Ud } else { Fault::Gp(0) };
        assert_eq!(got, Err(want), "{what}");
        tried += 1;
        if model.supports(i.iced.code()) {
            host.load(code);
            let regs = Regs { gpr: bench.setup.gpr, rflags: 0x202 };
            let (fault, _) = host.run(&regs);
            assert_eq!(fault, Some(want), "the host CPU at {what}");
            judged += 1;
        }
    }
    println!("{tried} encodings of privileged instructions, {judged} judged by the host CPU");
    assert!(tried > 60, "only {tried} encodings were found");
}

/// CLI, STI, IN, OUT, INS, OUTS: #GP(0) with CPL > IOPL, for every IOPL below 3; allowed with IOPL 3.
#[test]
fn iopl_instructions() {
    let all = encodings(&[Privilege::Iopl]);
    assert!(all.len() > 10);
    let mut bench = Bench::new();
    for (code, i) in &all {
        for iopl in 0..4 {
            let got = bench.run(code, |s| {
                s.rflags = Rflags::from_bits_retain(2 | iopl << 12);
                s.tr.limit = 0; // no I/O permission map
            });
            // INS and OUTS read and write memory that the setup maps.
            let want = if iopl == 3 { Ok(()) } else { Err(Fault::Gp(0)) };
            assert_eq!(got, want, "{code:02x?} {} IOPL {iopl}", i.iced);
        }
    }
}

/// UMIP, TSD, PCE: CR4 decides.
#[test]
fn rights_by_cr4() {
    for (privilege, bit, refused) in [
        (Privilege::Cr4Umip, Cr4::UMIP, true),
        (Privilege::Cr4Tsd, Cr4::TSD, true),
        (Privilege::Cr4Pce, Cr4::PCE, false),
    ] {
        let all = encodings(&[privilege]);
        assert!(!all.is_empty());
        let mut bench = Bench::new();
        for (code, i) in &all {
            let refuse = bench.run(code, |s| s.cr4.set(bit, refused));
            assert_eq!(refuse, Err(Fault::Gp(0)), "{code:02x?} {}", i.iced);
            let allow = bench.run(code, |s| s.cr4.set(bit, !refused));
            // No counters are offered, so that RDPMC faults even when it is allowed.
            let want = if privilege == Privilege::Cr4Pce { Err(Fault::Gp(0)) } else { Ok(()) };
            assert_eq!(allow, want, "{code:02x?} {}", i.iced);
        }
    }
}
