//! A worker: runs batches on the host CPU and on engines, compares, counts.
//!
//! Now and then it spoils an outcome on purpose: a comparison that does not see it is broken.

use super::arena;
use super::batch::{Batch, Source};
use super::case::{Case, Kind};
use super::engine::{Engine, Which};
use super::expected::Expected;
use super::group::{self, Group};
use super::modes::Modes;
use super::modes::oracle::local_table;
use super::oracle::Oracle;
use super::outcome::{Compare, End, Outcome, Part, compare, take_memory};
use super::tally::{Count, Divergence, Tally};
use super::{blocks, encode, repro, sequence};
use crate::random::Random;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::isa::{Class, Gpr, facts};
use bivisor_emulator::mem::Prot;
use iced_x86::{Code, FlowControl};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Everything one worker needs. One is at work in a process at a time: the arena's addresses are the same for all.
pub struct Worker {
    source: Source,
    oracle: Option<Oracle>,
    engines: Vec<Engine>,
    kinds: Vec<Kind>,
    group: Option<Group>,
    modes: Option<Modes>,
    compare: Compare,
    expected: Expected,
    seed: u64,
    /// By engine and code.
    counts: Vec<Vec<Count>>,
    result: Tally,
    judge: Outcome,
    outcome: Outcome,
    case: Case,
    buffer: Vec<u8>,
    spoil: Random,
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

/// The codes of a campaign, and those it leaves out with the reason.
pub fn codes() -> (Vec<Code>, Vec<(Code, &'static str)>) {
    let model = CpuModel::host();
    encode::codes(|c| model.supports(c))
}

impl Worker {
    /// With these engines; `host`: the host CPU is the judge, else the first engine.
    ///
    /// # Errors
    /// A sentence: one of them is not to be had here.
    pub fn new(which: &[Which], host: bool, kinds: &[Kind], seed: u64) -> Result<Worker, String> {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let engines = which.iter().map(|w| Engine::new(*w)).collect::<Result<Vec<_>, _>>()?;
        let oracle = match host {
            true => Some(Oracle::new(arena::flat_view()?).ok_or("the host CPU has no XSAVE")?),
            false => None,
        };
        if engines.len() + usize::from(host) < 2 {
            return Err("a comparison needs two of interp, bt, kvm, host".into());
        }
        Ok(Worker {
            source: Source::new(&codes().0),
            counts: vec![vec![Count::default(); Code::values().len() + Kind::ALL.len()]; engines.len()],
            group: match kinds.iter().any(|k| matches!(k, Kind::Bytes | Kind::Cpl0)) {
                true => Some(Group::of(&kernel_engines(which, kinds))?),
                false => None,
            },
            modes: match kinds.iter().any(|k| k.bits() != 64) {
                true => Some(Modes::new(which, host)?),
                false => None,
            },
            kinds: kinds.into(),
            engines,
            oracle,
            compare,
            expected: Expected::default(),
            seed,
            result: Tally::default(),
            judge: Outcome::default(),
            outcome: Outcome::default(),
            case: Case::default(),
            buffer: Vec::new(),
            spoil: Random::new(seed),
            _alone: alone,
        })
    }

    /// Only these instructions.
    pub fn only(&mut self, codes: &[Code]) {
        self.source = Source::new(codes);
        if let Some(modes) = &mut self.modes {
            modes.only(codes);
        }
    }

    /// Another comparison: for tests of the campaign itself.
    pub fn compare_with(&mut self, compare: Compare) {
        self.compare = compare;
    }

    /// An engine of this worker.
    pub fn engine(&mut self, which: Which) -> Option<&mut Engine> {
        self.engines.iter_mut().find(|e| e.which == which)
    }

    /// Runs a batch; gives how many cases it had.
    pub fn batch(&mut self, n: u64) -> u64 {
        let start = Instant::now();
        let before = self.result.cases;
        for kind in self.kinds.clone() {
            match kind {
                Kind::Insn => {
                    let batch = self.source.batch(self.seed, n);
                    self.all_of(batch, n);
                }
                Kind::Block => {
                    let batch = self.source.blocks(self.seed, n);
                    self.all_of(batch, n);
                }
                Kind::Bytes | Kind::Cpl0 => self.sequences(kind, n),
                _ => {
                    if let Some(modes) = &mut self.modes {
                        modes.batch(kind, self.seed, n, &mut self.result);
                    }
                }
            }
        }
        self.result.batches += 1;
        self.result.seconds += start.elapsed().as_secs_f64();
        self.result.cases - before
    }

    /// Engines beside the interpreter.
    fn sequences(&mut self, kind: Kind, n: u64) {
        let Some(group) = &mut self.group else { return };
        let mut r = Random::new(self.seed.rotate_left(32) ^ n << 2 ^ kind as u64);
        r.next();
        for _ in 0..SEQUENCES {
            let s = group.source().draw(&mut r, kind == Kind::Cpl0);
            self.result.cases += 1;
            for (which, what) in group.run(&s) {
                let counts = self.result.counts.entry(which.name().into()).or_default();
                let count = counts.entry(kind.name().into()).or_default();
                count.cases += 1;
                let Some(what) = what else {
                    count.equal += 1;
                    continue;
                };
                let (s, what) = group.shrink(which, s.clone(), what);
                if let Some(row) = sequence::known(&s, &what) {
                    count.expected += 1;
                    *self.result.expected.entry(row.into()).or_default() += 1;
                    continue;
                }
                let code: Vec<String> = s.code.iter().map(|b| format!("{b:02x}")).collect();
                self.result.note(Divergence {
                    engine: which.name().into(),
                    code: kind.name().into(),
                    bytes: code.join(" "),
                    text: sequence::text(&s),
                    part: "other".into(),
                    what,
                    seed: self.seed,
                    batch: n,
                    repro: serde_json::json!({ "sequence": format!("{s:x?}") }),
                });
            }
        }
    }

    fn all_of(&mut self, mut batch: Batch, n: u64) {
        for engine in &mut self.engines {
            batch.load(engine.view);
            for (page, len, prot) in arena::PAGES {
                if prot.contains(Prot::EXEC) {
                    engine.code_changed(page..page + len);
                }
            }
        }
        if let (Some(_), Ok(view)) = (&self.oracle, arena::flat_view()) {
            // Emptying it cannot fail.
            let _ = local_table(false);
            batch.load(view);
        }
        for slot in 0..batch.slots.len() {
            // Not every draw is a state that is safe.
            let mut left = batch.slots[slot].states;
            for _ in 0..8 * left {
                left -= u64::from(self.one(&mut batch, slot, n));
                if left == 0 {
                    break;
                }
            }
            self.strays(&mut batch, slot, n);
        }
    }

    /// One case, if the dice give one.
    fn one(&mut self, batch: &mut Batch, slot: usize, n: u64) -> bool {
        let mut case = std::mem::take(&mut self.case);
        let drawn = batch.state(slot, &mut case);
        if drawn {
            self.result.cases += 1;
            self.all(batch, &case, n);
        }
        self.case = case;
        drawn
    }

    fn all(&mut self, batch: &Batch, case: &Case, n: u64) {
        let mut judged = false;
        if let (Some(oracle), Ok(view)) = (&mut self.oracle, arena::flat_view()) {
            case.fill(view, &batch.pristine);
            oracle.run(case, &mut self.judge);
            take_memory(case, view, &mut self.judge);
            judged = true;
        }
        for e in 0..self.engines.len() {
            let engine = &mut self.engines[e];
            case.fill(engine.view, &batch.pristine);
            let done = engine.run(case, &mut self.outcome);
            take_memory(case, engine.view, &mut self.outcome);
            case.clean(engine.view, &batch.pristine);
            if !judged {
                std::mem::swap(&mut self.judge, &mut self.outcome);
                judged = true;
                continue;
            }
            let found = match done {
                Ok(()) => (self.compare)(case, &self.outcome, &self.judge),
                Err(why) => Some((Part::Fault, why)),
            };
            let count = &mut self.counts[e][index(case)];
            count.cases += 1;
            match found {
                None => count.equal += 1,
                Some((part, what)) => {
                    let name = engine.which.name();
                    if let Some(row) = self.expected.find(name, case, part, &self.outcome, &self.judge) {
                        count.expected += 1;
                        *self.result.expected.entry(self.expected.0[row].what()).or_default() += 1;
                    } else {
                        self.differs(case, e, part, what, n, &batch.pristine);
                    }
                }
            }
        }
        if self.spoil.once_in(512) && case.free_gpr == [0; 16] {
            self.canary(case, n);
        }
    }

    /// The same difference with as few registers as it takes: they are set to their plainest values one by one.
    fn minimise(&mut self, case: &Case, e: usize, part: Part, pristine: &[u8]) -> Case {
        let mut best = case.clone();
        let plain: [&dyn Fn(&mut Case); 3] = [
            &|c| {
                c.xsave.set_xstate_bv(0);
                c.xsave.set_mxcsr(0x1f80);
            },
            &|c| c.rflags = 0x202,
            &|c| c.puts.clear(),
        ];
        // RBX counts the rounds of a block: 0 would be four thousand million.
        let counts = |g: &usize| case.kind == Kind::Block && *g == Gpr::Rbx as usize;
        let registers = (0..16).filter(|g| !counts(g)).map(|g| move |c: &mut Case| c.gpr[g] = 0);
        let registers: Vec<_> = registers.collect();
        let all = plain.into_iter().chain(registers.iter().map(|f| f as &dyn Fn(&mut Case)));
        for change in all {
            let mut other = best.clone();
            change(&mut other);
            if self.again(&other, e, pristine) == Some(part) {
                best = other;
            }
        }
        // The outcomes are those of what is reported.
        self.again(&best, e, pristine);
        best
    }

    /// Runs a case once more on the judge and one engine: what differs.
    fn again(&mut self, case: &Case, e: usize, pristine: &[u8]) -> Option<Part> {
        let (Some(oracle), Ok(view)) = (&mut self.oracle, arena::flat_view()) else { return None };
        case.fill(view, pristine);
        oracle.run(case, &mut self.judge);
        take_memory(case, view, &mut self.judge);
        case.clean(view, pristine);
        let engine = &mut self.engines[e];
        case.fill(engine.view, pristine);
        let done = engine.run(case, &mut self.outcome);
        take_memory(case, engine.view, &mut self.outcome);
        case.clean(engine.view, pristine);
        done.ok()?;
        (self.compare)(case, &self.outcome, &self.judge).map(|(part, _)| part)
    }

    fn differs(&mut self, case: &Case, e: usize, part: Part, what: String, batch: u64, pristine: &[u8]) {
        let which = self.engines[e].which;
        let code = name(index(case));
        if self.result.wants(which.name(), &code, part) {
            // Zero is a safe address: nothing is there. What a string instruction reaches was chosen with care.
            let plain = case.insn.flow_control() == FlowControl::Next && facts(case.insn).class != Class::String;
            let small = self.oracle.is_some() && part != Part::Memory && (plain || case.kind == Kind::Block);
            let judge = self.judge.clone();
            let case = &if small { self.minimise(case, e, part, pristine) } else { case.clone() };
            self.result.note(Divergence {
                engine: which.name().into(),
                code,
                bytes: case.code.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "),
                text: blocks::text(&case.code),
                part: part.name().into(),
                what,
                seed: self.seed,
                batch,
                repro: serde_json::json!({
                    "request": repro::request(case, pristine, None),
                    "is": repro::outcome(&self.outcome),
                    "should": repro::outcome(&self.judge),
                }),
            });
            // The other engines are compared with what it was.
            self.judge = judge;
        }
    }

    /// Spoils a copy of what came out: the comparison must see it.
    fn canary(&mut self, case: &Case, n: u64) {
        let mut spoilt = self.judge.clone();
        let part = spoil(&mut self.spoil, &mut spoilt);
        if (self.compare)(case, &spoilt, &self.judge).is_none() && part.is_some() {
            let code = "the comparison itself".to_string();
            let part = part.map_or("", Part::name);
            self.result.counts.entry("comparison".into()).or_default().entry(code.clone()).or_default().cases += 1;
            self.result.note(Divergence {
                engine: "comparison".into(),
                code,
                bytes: String::new(),
                text: String::new(),
                part: part.into(),
                what: format!("it does not see a difference in {part}"),
                seed: self.seed,
                batch: n,
                repro: serde_json::Value::Null,
            });
        }
    }

    /// Memory outside the windows must be as before.
    fn strays(&mut self, batch: &mut Batch, slot: usize, n: u64) {
        for e in 0..self.engines.len() {
            let view = self.engines[e].view;
            if let Some(addr) = batch.is_pristine(view, &mut self.buffer) {
                let mut case = std::mem::take(&mut self.case);
                (case.insn, case.kind) = (batch.slots[slot].code, batch.slots[slot].kind);
                case.code.clone_from(&batch.slots[slot].bytes);
                self.counts[e][index(&case)].cases += 1;
                let what = format!("somebody wrote at {addr:#x}, outside the operand");
                let name = self.engines[e].which.name();
                match self.expected.find(name, &case, Part::Memory, &Outcome::default(), &Outcome::default()) {
                    Some(_) => self.counts[e][index(&case)].expected += 1,
                    None => self.differs(&case, e, Part::Memory, what, n, &batch.pristine),
                }
                self.case = case;
                batch.load(view);
            }
        }
    }

    /// What was found since the last call.
    pub fn take(&mut self) -> Tally {
        let mut tally = std::mem::take(&mut self.result);
        for (engine, counts) in self.engines.iter().zip(&mut self.counts) {
            let by_code = tally.counts.entry(engine.which.name().into()).or_default();
            for (code, count) in counts.iter_mut().enumerate().filter(|(_, c)| c.cases > 0) {
                let sum: &mut Count = by_code.entry(name(code)).or_default();
                sum.add(&std::mem::take(count));
            }
        }
        tally
    }
}

/// Interpreter and translator, and KVM if it is wanted and can run kernels.
fn kernel_engines(which: &[Which], kinds: &[Kind]) -> Vec<Which> {
    let kvm = which.contains(&Which::Kvm) && kinds.contains(&Kind::Cpl0) && group::kvm_for_kernels().is_ok();
    [Which::InterpPaged, Which::BtPaged].into_iter().chain(kvm.then_some(Which::Kvm)).collect()
}

/// Sequences of each kind in a batch.
const SEQUENCES: u64 = 16;

/// Where a case is counted.
fn index(case: &Case) -> usize {
    match case.kind {
        Kind::Insn => case.insn as usize,
        kind => Code::values().len() + kind as usize,
    }
}

/// What is counted there.
fn name(index: usize) -> String {
    match Code::try_from(index) {
        Ok(code) => format!("{code:?}"),
        Err(_) => Kind::ALL[index - Code::values().len()].name().into(),
    }
}

/// Changes one bit somewhere; which part, if it means something there.
fn spoil(r: &mut Random, o: &mut Outcome) -> Option<Part> {
    let part =
        r.one_of(&[Part::Fault, Part::Rip, Part::Gpr, Part::Flags, Part::Mxcsr, Part::Vector, Part::Mask, Part::X87]);
    match part {
        Part::Fault => {
            o.end = match o.end {
                End::Left => End::Fault(bivisor_emulator::cpu::Fault::Ud),
                End::Fault(_) => End::Left,
            }
        }
        Part::Rip => o.rip ^= 1 << r.below(48),
        Part::Gpr => o.gpr[r.below(16) as usize] ^= 1 << r.below(64),
        Part::Flags => o.rflags ^= 1,
        Part::Mxcsr => {
            let v = o.xsave.mxcsr() ^ 1 << r.below(16);
            o.xsave.set_mxcsr(v);
        }
        Part::Vector => {
            let i = r.below(16) as usize;
            let mut z = o.xsave.zmm(i);
            z[r.below(16) as usize] ^= 1 << r.below(8);
            o.xsave.set_zmm(i, z);
        }
        Part::Mask => {
            let i = r.below(8) as usize;
            let k = o.xsave.opmask(i) ^ 1 << r.below(64);
            o.xsave.set_opmask(i, k);
            if o.xsave.opmask(i) != k {
                return None;
            }
        }
        _ => {
            let i = r.below(8) as usize;
            let mut st = o.xsave.st(i);
            st[r.below(10) as usize] ^= 1 << r.below(8);
            o.xsave.set_st(i, st);
        }
    }
    Some(part)
}
