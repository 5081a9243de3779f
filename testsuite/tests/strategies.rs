//! proptest strategies, with shrinking, for code of 16, 32 and 64 bits beside the host CPU: single instructions, blocks with branches and
//! loops, code that stores into itself; and for sequences of a kernel at CPL 0 on interpreter and translator.
//!
//! `SEED` and `RANDOM` draw other and more cases.

use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{Fault, Rflags};
use bivisor_emulator::isa::{Class, Gpr, decode, facts};
use bivisor_testsuite::campaign::arena::{self, CODE, OWN};
use bivisor_testsuite::campaign::batch::{self, Batch};
use bivisor_testsuite::campaign::beside::Beside;
use bivisor_testsuite::campaign::blocks::{self, Members, ROOM};
use bivisor_testsuite::campaign::case::{Case, Kind};
use bivisor_testsuite::campaign::engine::Which;
use bivisor_testsuite::campaign::group::Group;
use bivisor_testsuite::campaign::modes::record;
use bivisor_testsuite::campaign::modes::segments::{FLAT_CODE, FLAT_DATA, segment, selector};
use bivisor_testsuite::campaign::modes::source;
use bivisor_testsuite::campaign::outcome::{End, NORMAL};
use bivisor_testsuite::campaign::sequence::{self, Sequence};
use bivisor_testsuite::campaign::values::Pool;
use bivisor_testsuite::campaign::worker::codes;
use bivisor_testsuite::random::Random;
use iced_x86::{FlowControl, InstructionInfoFactory};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseResult, TestError, TestRng, TestRunner};
use std::cell::RefCell;
use std::sync::{Mutex, PoisonError};

/// One arena a process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Runs a strategy; what it finds is shrunk.
fn run<S: Strategy>(
    cases: u64,
    strategy: &S,
    test: impl Fn(S::Value) -> TestCaseResult,
) -> Result<(), TestError<S::Value>> {
    let cases = number("RANDOM", cases) as u32;
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 20_000, ..Config::default() };
    let mut seed = [0x5a; 32];
    seed[..8].copy_from_slice(&number("SEED", 1).to_le_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
    runner.run(strategy, test)
}

/// Runs a strategy for code of each width.
fn each<S: Strategy>(cases: u64, strategy: &S, test: impl Fn(u32, S::Value) -> TestCaseResult) {
    for (bits, share) in SHARES {
        let done = run(share * cases, strategy, |value| test(bits, value));
        done.unwrap_or_else(|e| panic!("{bits}-bit: {e}"));
    }
}

/// For code of 64, 32 and 16 bits, one after the other (the local descriptor table is there for the narrow ones only): how many cases.
const SHARES: [(u32, u64); 3] = [(64, 2), (32, 1), (16, 1)];

/// What cases are made from and run on.
struct Ground {
    beside: Beside,
    wide: batch::Source,
    /// 64-bit code's memory, which draws its states.
    batch: Batch,
    narrow: source::Source,
    memory: Vec<u8>,
    pool: Pool,
}

impl Ground {
    fn new() -> Ground {
        let beside = Beside::new().expect("the engines");
        for bits in [16, 32, 64] {
            if !beside.has_host(bits) {
                eprintln!("SKIPPED: no host CPU to compare {bits}-bit code with; the engines are compared");
            }
        }
        let wide = batch::Source::new(&codes().0);
        Ground {
            beside,
            batch: wide.ground(1),
            wide,
            narrow: source::Source::default(),
            memory: record::memory(),
            pool: Pool::new(&mut Random::new(1)),
        }
    }

    /// A slot's case; which registers and what else is not plain is said, so that they shrink.
    fn case(&mut self, slot: Slot, plain: &Plain) -> Option<Case> {
        let mut case = Case::default();
        match slot {
            Slot::Wide(slot) => {
                self.batch.take(slot, plain.seed);
                if !self.batch.state(0, &mut case) {
                    return None;
                }
            }
            Slot::Narrow(slot) => source::state(&mut Random::new(plain.seed), &self.pool, &slot, &mut case),
        }
        plain.apply(&mut case);
        source::keep_from_hanging(&mut case);
        Some(case)
    }

    /// Is the outcome on all engines the host CPU's?
    fn judge(&mut self, case: &Case) -> TestCaseResult {
        let memory = if case.kind.bits() == 64 { &self.batch.pristine } else { &self.memory };
        let outcomes = self.beside.outcomes(case, memory).map_err(TestCaseError::fail)?;
        let Some(what) = self.beside.difference(case, &outcomes) else { return Ok(()) };
        let (bits, text) = (case.kind.bits(), blocks::text_in(&case.code, case.kind.bits()));
        let state = format!("RIP {:x}, flags {:x}, registers {:x?}", case.rip, case.rflags, case.gpr);
        Err(TestCaseError::fail(format!("{bits}-bit {:02x?}: {text}: {what}\n{state}", case.code)))
    }
}

enum Slot {
    Wide(batch::Slot),
    Narrow(source::Slot),
}

/// A state by its seed, and what of it is kept.
#[derive(Clone, Debug)]
struct Plain {
    seed: u64,
    registers: u16,
    flags: bool,
    vectors: bool,
}

fn plain() -> impl Strategy<Value = Plain> {
    (any::<u64>(), any::<u16>(), any::<bool>(), any::<bool>()).prop_map(|(seed, registers, flags, vectors)| Plain {
        seed,
        registers,
        flags,
        vectors,
    })
}

impl Plain {
    fn apply(&self, case: &mut Case) {
        let kept = self.registers | if case.kind.bits() == 64 { needed(case) } else { 0 };
        if case.kind.is_single() {
            (0..16).filter(|n| kept >> n & 1 == 0).for_each(|n| case.gpr[n] = 0);
        }
        if !self.flags {
            case.rflags &= !0x24_08d5;
        }
        if !self.vectors {
            case.xsave.set_xstate_bv(0);
            case.xsave.set_mxcsr(0x1f80);
        }
    }
}

/// Registers that say where an instruction of 64-bit code reaches or goes. (Of 32-bit code nothing but the arena is in reach.)
fn needed(case: &Case) -> u16 {
    let Ok(insn) = decode(&case.code, 64) else { return u16::MAX };
    if insn.iced.flow_control() != FlowControl::Next || facts(case.insn).class == Class::String {
        return u16::MAX;
    }
    let mut factory = InstructionInfoFactory::new();
    let memory = factory.info(&insn.iced).used_memory();
    let registers = memory.iter().flat_map(|m| [m.base(), m.index()]).filter_map(Gpr::from_iced);
    registers.fold(0, |all, g| all | 1 << g as u16)
}

/// Any instruction in any state.
#[test]
fn instructions_beside_the_host() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let ground = RefCell::new(Ground::new());
    let strategy = (0..3700u64, any::<u64>(), 0..20u8, plain());
    each(1500, &strategy, |bits, (index, seed, wild, plain)| {
        let g = &mut *ground.borrow_mut();
        let mut r = Random::new(seed);
        r.next();
        let slot = match bits {
            64 => g.wide.instruction(&mut r, index, wild == 19).map(Slot::Wide),
            _ => {
                let kind = if bits == 32 { Kind::Insn32 } else { Kind::Insn16 };
                let slot = g.narrow.slot(&mut r, kind, 0, index);
                slot.filter(|s| s.there == s.bytes.len()).map(Slot::Narrow)
            }
        };
        match slot.and_then(|slot| g.case(slot, &plain)) {
            Some(case) => g.judge(&case),
            None => Ok(()),
        }
    });
}

/// A part of a block: an instruction by its seed, and the branch before it.
fn part() -> impl Strategy<Value = (u64, Option<(usize, u8)>)> {
    (any::<u64>(), prop::option::weighted(0.25, (1..4usize, 0..16u8)))
}

/// What blocks are made of, for code of each width.
fn members() -> RefCell<[(u32, Members); 3]> {
    let model = CpuModel::host();
    RefCell::new([16, 32, 64].map(|bits| (bits, Members::in_code(&model, bits))))
}

/// A block in its place; `None`: it is too long, or empty.
fn block(members: &RefCell<[(u32, Members); 3]>, bits: u32, parts: &[(u64, Option<(usize, u8)>)]) -> Option<Slot> {
    let members = &mut *members.borrow_mut();
    let members = &mut members.iter_mut().find(|m| m.0 == bits)?.1;
    let made = parts.iter().filter_map(|&(seed, branch)| {
        let (mut r, (skip, condition)) = (Random::new(seed), branch.unwrap_or((0, 0)));
        let bytes = (0..40).find_map(|_| members.member(&mut r))?;
        Some(blocks::Part { bytes, skip, condition })
    });
    let made: Vec<_> = made.collect();
    // The last branch decides whether it is a loop.
    let in_loop = parts.last()?.1.is_some();
    let bytes = members.join(&made, in_loop);
    (!made.is_empty() && bytes.len() <= ROOM).then(|| match bits {
        64 => Slot::Wide(batch::Slot::block(CODE + 0x1000, bytes)),
        32 => Slot::Narrow(source::Slot::block(Kind::Block32, CODE + 0x800, bytes)),
        _ => Slot::Narrow(source::Slot::block(Kind::Block16, CODE + 0x800, bytes)),
    })
}

/// Several instructions with branches over some, in a loop or not; a counterexample shrinks to few of them.
#[test]
fn blocks_beside_the_host() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (members, ground) = (members(), RefCell::new(Ground::new()));
    let strategy = (prop::collection::vec(part(), 1..11), plain());
    each(750, &strategy, |bits, (parts, plain)| {
        let g = &mut *ground.borrow_mut();
        match block(&members, bits, &parts).and_then(|slot| g.case(slot, &plain)) {
            Some(case) => g.judge(&case),
            None => Ok(()),
        }
    });
}

/// A bug planted in the translator's results of one family of instructions: the counterexample is one instruction.
#[test]
fn a_counterexample_shrinks_to_one_instruction() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (members, mut ground) = (members(), Ground::new());
    ground.beside.engine(Which::Bt).expect("one of them").plant(Box::new(|case, cpu| {
        let wrong = |i: &[u8]| decode(i, 64).is_ok_and(|i| format!("{:?}", i.iced.mnemonic()).starts_with("Cmov"));
        if blocks::instructions(&case.code, 64).any(wrong) {
            cpu.rflags.toggle(Rflags::CF);
        }
    }));
    let ground = RefCell::new(ground);
    let strategy = (prop::collection::vec(part(), 1..11), plain());
    let found = run(3000, &strategy, |(parts, plain)| {
        let g = &mut *ground.borrow_mut();
        match block(&members, 64, &parts).and_then(|slot| g.case(slot, &plain)) {
            Some(case) => g.judge(&case),
            None => Ok(()),
        }
    });
    let Err(TestError::Fail(why, (parts, plain))) = found else { panic!("nothing found: {found:?}") };
    assert!(why.message().contains("bt beside") && why.message().contains("cmov"), "{why}");
    assert!(parts.len() == 1 && parts[0].1.is_none() && !plain.vectors, "{parts:?} {plain:?}");
}

/// A step of code that stores into itself.
#[derive(Clone, Debug)]
enum Step {
    /// `op a, b`
    Registers { op: u8, a: u8, b: u8 },
    /// `op a, immediate`
    Immediate { op: u8, a: u8, value: u32 },
    /// The operation of another step becomes this one.
    Operation { step: usize, op: u8 },
    /// A byte of another step's immediate, or its registers, become this.
    Operand { step: usize, value: u8 },
}

/// EAX, EDX, EBX, ESI. ECX counts.
const REGISTERS: [u8; 4] = [0, 2, 3, 6];

fn register() -> impl Strategy<Value = u8> {
    (0..4usize).prop_map(|n| REGISTERS[n])
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..8u8, register(), register()).prop_map(|(op, a, b)| Step::Registers { op, a, b }),
        (0..8u8, register(), any::<u32>()).prop_map(|(op, a, value)| Step::Immediate { op, a, value }),
        (0..16usize, 0..8u8).prop_map(|(step, op)| Step::Operation { step, op }),
        (0..16usize, any::<u8>()).prop_map(|(step, value)| Step::Operand { step, value }),
    ]
}

/// The bytes of the steps, in a loop of ECX rounds.
fn assemble(steps: &[Step], bits: u32, at: u64, data: u64) -> Vec<u8> {
    let n = if bits == 16 { 2 } else { 4 };
    let len = |s: &Step| match s {
        Step::Registers { .. } => 2,
        Step::Immediate { .. } => 2 + n,
        _ => 3 + n,
    };
    let place = |k: usize| at + steps[..k].iter().map(len).sum::<usize>() as u64;
    let mut out = Vec::new();
    for s in steps {
        // MOV BYTE [absolute, in 64-bit code relative to RIP], value; a step that stores itself is left alone.
        let mut store = |step: usize, patch: &dyn Fn(&Step) -> Option<(u64, u8)>| {
            let step = step % steps.len();
            let Some((offset, value)) = patch(&steps[step]) else {
                return out.extend(vec![0x90; 3 + n]);
            };
            out.extend([0xc6, if bits == 16 { 0x06 } else { 0x05 }]);
            let from = if bits == 64 { at + out.len() as u64 + 5 } else { data };
            out.extend(&(place(step) + offset).wrapping_sub(from).to_le_bytes()[..n]);
            out.push(value);
        };
        match *s {
            Step::Registers { op, a, b } => out.extend([op << 3 | 1, 0xc0 | b << 3 | a]),
            Step::Immediate { op, a, value } => {
                out.extend([0x81, 0xc0 | op << 3 | a]);
                out.extend(&value.to_le_bytes()[..n]);
            }
            Step::Operation { step, op } => store(step, &|to| match *to {
                Step::Registers { .. } => Some((0, op << 3 | 1)),
                Step::Immediate { a, .. } => Some((1, 0xc0 | op << 3 | a)),
                _ => None,
            }),
            Step::Operand { step, value } => store(step, &|to| match to {
                Step::Registers { .. } => {
                    let [a, b] = [value & 3, value >> 2 & 3].map(|n| REGISTERS[usize::from(n)]);
                    Some((1, 0xc0 | b << 3 | a))
                }
                Step::Immediate { .. } => Some((2, value)),
                _ => None,
            }),
        }
    }
    // DEC ECX; JNZ to the first step.
    out.extend([0xff, 0xc9, 0x0f, 0x85]);
    let back = -((out.len() + n) as i64);
    out.extend(&back.to_le_bytes()[..n]);
    out.push(0xcc);
    out
}

/// Stores into the code that runs, before and behind the store: what is executed is what was stored.
#[test]
fn stores_into_the_own_code_beside_the_host() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let ground = RefCell::new(Ground::new());
    if !arena::has_own() {
        eprintln!("SKIPPED: the host refuses a page that is writable and executable");
        return;
    }
    let steps = prop::collection::vec(step(), 1..16);
    let strategy = (steps, any::<[u32; 4]>(), 1..5u64, 0..2u64, any::<bool>());
    each(750, &strategy, |bits, (steps, values, rounds, skew, flags)| {
        let g = &mut *ground.borrow_mut();
        let (kind, cs, ds) = match bits {
            64 => (Kind::Block, NORMAL[1], NORMAL[3]),
            32 => (Kind::Block32, FLAT_CODE, FLAT_DATA),
            _ => (Kind::Block16, selector(0), selector(5)),
        };
        let base = |s: u16| if bits == 64 { 0 } else { segment(s).expect("a segment").base };
        let (at, data) = (OWN + 0x100 + 61 * skew, base(ds));
        let mut case = Case { kind, rip: at - base(cs), fs_base: data, ..Case::default() };
        if bits != 64 {
            case.selectors = [ds, cs, ds, ds, ds];
        }
        case.code = assemble(&steps, bits, at, data);
        case.windows = vec![(OWN, 0x1000)];
        case.xsave.set_mxcsr(0x1f80);
        case.rflags = if flags { 0xad7 } else { 0x202 };
        REGISTERS.iter().zip(values).for_each(|(r, v)| case.gpr[usize::from(*r)] = v.into());
        case.gpr[1] = rounds;
        let ends = g.beside.outcomes(&case, &g.memory).map_err(TestCaseError::fail)?;
        let done = ends[0].1.end == End::Fault(Fault::Bp) && ends[0].1.gpr[1] & 0xffff == 0;
        prop_assert!(done, "it did not come to its end: {:x?}", ends[0].1.end);
        match g.beside.difference(&case, &ends) {
            None => Ok(()),
            Some(what) => Err(TestCaseError::fail(format!("{bits}-bit {}: {what}", blocks::text_in(&case.code, bits)))),
        }
    });
}

/// Sequences at CPL 0: sensitive instructions, edits of the page tables, exceptions, an interrupt, and any bytes between; the same at
/// CPL 3. A counterexample shrinks to few pieces.
#[test]
fn kernels_on_interpreter_and_translator() {
    let group = RefCell::new(Group::new().expect("the engines"));
    let interrupt = prop::option::of((0..8usize, 32..232u8));
    let pieces = prop::collection::vec(any::<u64>(), 1..16);
    let strategy = (prop::bool::weighted(0.8), pieces, any::<u64>(), any::<u64>(), 0..8usize, interrupt);
    let done = run(2000, &strategy, |(kernel, pieces, seed, flags, steps, interrupt)| {
        let group = &mut *group.borrow_mut();
        let mut code = Vec::new();
        pieces.into_iter().for_each(|seed| group.source().piece(&mut Random::new(seed), kernel, &mut code));
        if sequence::is_own(&code) {
            return Ok(());
        }
        // One at a time is counted exactly; a large budget may be overshot, so a kernel runs to its HLT.
        let mut budgets = vec![1; steps];
        budgets.push(if kernel { 2000 } else { 40 });
        let s = Sequence {
            kernel,
            code,
            gpr: sequence::registers(&mut Random::new(seed)),
            rflags: 2 | flags & if kernel { 0xed5 } else { 0xcd5 } | if kernel { 0 } else { 0x200 },
            seed,
            interrupt: interrupt.filter(|_| kernel).map(|(at, vector)| (at.min(steps), vector)),
            budgets,
        };
        match group.difference(&s) {
            Some(what) if sequence::known(&s, &what).is_none() => {
                Err(TestCaseError::fail(format!("{what}\n{}\n{s:x?}", sequence::text(&s))))
            }
            _ => Ok(()),
        }
    });
    done.unwrap_or_else(|e| panic!("{e}"));
}
