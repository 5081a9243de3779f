//! Every integer instruction of 16- and 32-bit code has a case with the result of a real CPU (`testsuite/modes.txt`), and random ones
//! with shrinking; code that stores into itself, too.
//!
//! `UPDATE=1` writes the lines anew from the host CPU; `SEED` and `RANDOM` draw other and more random cases.

use bivisor_emulator::cpu::Fault;
use bivisor_emulator::interp::alu::Vendor;
use bivisor_emulator::isa::{Class, facts};
use bivisor_testsuite::campaign::arena::{self, OWN};
use bivisor_testsuite::campaign::case::{Case, Kind};
use bivisor_testsuite::campaign::engine::Which;
use bivisor_testsuite::campaign::expected::Expected;
use bivisor_testsuite::campaign::modes::segments::{FLAT_CODE, FLAT_DATA, segment, selector};
use bivisor_testsuite::campaign::modes::source::{self, Source, codes};
use bivisor_testsuite::campaign::modes::{Modes, record};
use bivisor_testsuite::campaign::outcome::{End, Outcome, compare};
use bivisor_testsuite::campaign::values::Pool;
use bivisor_testsuite::case::disassembly;
use bivisor_testsuite::random::Random;
use iced_x86::{Code, Mnemonic};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::cell::RefCell;
use std::sync::{Mutex, PoisonError};

/// One arena a process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn modes() -> Modes {
    let modes = Modes::new(&[Which::InterpPaged, Which::BtPaged], true).expect("interpreter and translator");
    if !modes.has_host() {
        eprintln!("SKIPPED: no host CPU to compare with; interpreter and translator are compared");
    }
    modes
}

/// The integer instructions of such code.
fn integer(bits: u32) -> Vec<Code> {
    codes(bits).0.into_iter().filter(|c| !matches!(facts(*c).class, Class::Native | Class::Undefined)).collect()
}

/// A case for an instruction that goes well on the host CPU, if one is found; else one that ends as it does.
fn line(modes: &mut Modes, source: &mut Source, kind: Kind, code: Code, memory: &[u8]) -> Option<String> {
    let all = codes(kind.bits()).0;
    let index = all.iter().position(|c| *c == code)? as u64;
    let mut r = Random::new(code as u64);
    let pool = Pool::new(&mut r);
    let mut found = None;
    for _ in 0..200 {
        let Some(slot) = source.slot(&mut r, kind, 0, index).filter(|s| s.code == code && s.there == s.bytes.len())
        else {
            continue;
        };
        // LOOPE and LOOPNE with a REP prefix: see testsuite/expected.txt.
        let repeated = slot.bytes.iter().any(|b| matches!(b, 0xf2 | 0xf3));
        if repeated && matches!(code.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne) {
            continue;
        }
        let mut case = Case::default();
        source::state(&mut r, &pool, &slot, &mut case);
        (case.windows, case.free_memory) = (record::windows(), None);
        case.xsave.set_xstate_bv(0);
        case.xsave.set_mxcsr(0x1f80);
        let Ok(outcomes) = modes.outcomes(&case, memory) else { continue };
        let text = disassembly(kind.bits(), &case.code);
        let line = format!("{} => {}", record::start(&case, &text), record::result(&case, memory, &outcomes[0].1));
        if outcomes[0].1.end == End::Fault(Fault::Bp) && line.len() < 400 {
            return Some(line);
        }
        found.get_or_insert(line);
    }
    found
}

fn update(modes: &mut Modes) {
    assert!(modes.has_host(), "UPDATE=1 needs the host CPU as judge");
    let memory = record::memory();
    let mut source = Source::default();
    let mut out = String::from(
        "# What an AMD EPYC (Zen 4) did in compatibility mode; testsuite/src/campaign/modes/record.rs says how to read it.\n",
    );
    for kind in [Kind::Insn32, Kind::Insn16] {
        for code in integer(kind.bits()) {
            if let Some(line) = line(modes, &mut source, kind, code, &memory) {
                out += &line;
                out.push('\n');
            }
        }
    }
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/modes.txt"), out).expect("writable");
}

#[test]
fn every_integer_instruction_has_a_line_and_does_what_it_says() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut modes = modes();
    if std::env::var_os("UPDATE").is_some() {
        return update(&mut modes);
    }
    let memory = record::memory();
    let (mut wrong, mut seen) = (Vec::new(), Vec::new());
    for line in record::LINES.lines().filter(|l| !l.starts_with('#')) {
        let (case, should) = record::parse(line).expect("a line");
        seen.push((case.kind.bits(), case.insn));
        // Other makes have other undefined flags, and push selectors in another way.
        if Vendor::host() != Vendor::Amd {
            continue;
        }
        for (name, is) in modes.outcomes(&case, &memory).expect("an end") {
            let is = record::result(&case, &memory, &is);
            if is != should && !own(case.insn) {
                wrong.push(format!("{line}\n    on {name}: {is}"));
            }
        }
    }
    if Vendor::host() != Vendor::Amd {
        println!("SKIPPED: the lines are an AMD CPU's");
    }
    let missing: Vec<_> = [32, 16]
        .into_iter()
        .flat_map(|bits| integer(bits).into_iter().map(move |c| (bits, c)))
        .filter(|c| !seen.contains(c))
        .collect();
    println!("{} lines", seen.len());
    assert!(wrong.is_empty(), "{} wrong\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
    assert!(missing.is_empty(), "without a line: {missing:?}");
}

/// Gives what is the machine's own.
fn own(code: Code) -> bool {
    use Mnemonic as M;
    matches!(code.mnemonic(), M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdrand | M::Rdseed | M::Int1)
}

/// How the engines differ from the first of the outcomes.
fn difference(case: &Case, outcomes: &[(&'static str, Outcome)], expected: &Expected) -> Option<String> {
    let (judge, rest) = outcomes.split_first()?;
    rest.iter().find_map(|(name, is)| {
        let (part, what) = compare(case, is, &judge.1)?;
        let listed = case.kind.is_single() && expected.find(name, case, part, is, &judge.1).is_some();
        (!listed).then(|| format!("{name} beside {}: {what}", judge.0))
    })
}

/// `SEED=n` draws other cases, `RANDOM=n` more of them.
fn runner() -> TestRunner {
    let number = |name: &str, default| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let config = Config { cases: number("RANDOM", 3000u64) as u32, failure_persistence: None, ..Config::default() };
    let mut seed = [0x5a; 32];
    seed[..8].copy_from_slice(&number("SEED", 1).to_le_bytes());
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed))
}

/// Any instruction in any state; a counterexample shrinks to few registers.
#[test]
fn instructions_beside_the_host() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (modes, source, memory) = (RefCell::new(modes()), RefCell::new(Source::default()), record::memory());
    let (expected, pool) = (Expected::default(), Pool::new(&mut Random::new(1)));
    let strategy = (any::<bool>(), 0..3400u64, any::<u64>(), any::<u8>(), any::<bool>());
    let done = runner().run(&strategy, |(wide, index, seed, keep, vectors)| {
        let kind = if wide { Kind::Insn32 } else { Kind::Insn16 };
        let mut r = Random::new(seed);
        let Some(slot) = source.borrow_mut().slot(&mut r, kind, 0, index) else { return Ok(()) };
        if slot.there != slot.bytes.len() {
            return Ok(());
        }
        let mut case = Case::default();
        source::state(&mut r, &pool, &slot, &mut case);
        (0..8).filter(|n| keep >> n & 1 == 0).for_each(|n| case.gpr[n] = 0);
        if !vectors {
            case.xsave.set_xstate_bv(0);
            case.xsave.set_mxcsr(0x1f80);
        }
        let outcomes = modes.borrow_mut().outcomes(&case, &memory).map_err(TestCaseError::fail)?;
        match difference(&case, &outcomes, &expected) {
            None => Ok(()),
            Some(what) => {
                let text = disassembly(kind.bits(), &case.code);
                Err(TestCaseError::fail(format!("{:02x?}, {}-bit: {text}: {what}", case.code, kind.bits())))
            }
        }
    });
    done.unwrap_or_else(|e| panic!("{e}"));
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
        // MOV BYTE [absolute], value; a step that stores itself is left alone.
        let mut store = |step: usize, patch: &dyn Fn(&Step) -> Option<(u64, u8)>| {
            let step = step % steps.len();
            let Some((offset, value)) = patch(&steps[step]) else {
                return out.extend(vec![0x90; 3 + n]);
            };
            out.extend([0xc6, if bits == 16 { 0x06 } else { 0x05 }]);
            out.extend(&(place(step) + offset - data).to_le_bytes()[..n]);
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
    out.extend([0x49, 0x0f, 0x85]);
    let back = -((out.len() + n) as i64);
    out.extend(&back.to_le_bytes()[..n]);
    out.push(0xcc);
    out
}

/// Stores into the code that runs, before and behind the store: what is executed is what was stored.
#[test]
fn stores_into_the_own_code_beside_the_host() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (modes, expected) = (RefCell::new(modes()), Expected::default());
    if modes.borrow().has_host() && !arena::has_own() {
        eprintln!("SKIPPED: the host refuses a page that is writable and executable");
        return;
    }
    let memory = record::memory();
    let strategy =
        (any::<bool>(), prop::collection::vec(step(), 1..16), any::<[u32; 4]>(), 1..5u64, 0..2u64, any::<bool>());
    let done = runner().run(&strategy, |(wide, steps, values, rounds, skew, flags)| {
        let (kind, cs, ds) = match wide {
            true => (Kind::Block32, FLAT_CODE, FLAT_DATA),
            false => (Kind::Block16, selector(0), selector(5)),
        };
        let at = OWN + 0x100 + 61 * skew;
        let [code, data] = [cs, ds].map(|s| segment(s).expect("a segment").base);
        let mut case = Case { kind, rip: at - code, selectors: [ds, cs, ds, ds, ds], fs_base: data, ..Case::default() };
        case.code = assemble(&steps, kind.bits(), at, data);
        case.windows = vec![(OWN, 0x1000)];
        case.xsave.set_mxcsr(0x1f80);
        case.rflags = if flags { 0xad7 } else { 0x202 };
        REGISTERS.iter().zip(values).for_each(|(r, v)| case.gpr[usize::from(*r)] = v.into());
        case.gpr[1] = rounds;

        let outcomes = modes.borrow_mut().outcomes(&case, &memory).map_err(TestCaseError::fail)?;
        let done = outcomes[0].1.end == End::Fault(Fault::Bp) && outcomes[0].1.gpr[1] & 0xffff == 0;
        prop_assert!(done, "it did not come to its end: {:x?}", outcomes[0].1.end);
        match difference(&case, &outcomes, &expected) {
            None => Ok(()),
            Some(what) => Err(TestCaseError::fail(what)),
        }
    });
    done.unwrap_or_else(|e| panic!("{e}"));
}
