//! A worker: runs batches on the host CPU and on engines, compares, counts.
//!
//! Now and then it spoils an outcome on purpose: a comparison that does not see it is broken.

use super::arena;
use super::batch::{Batch, Source};
use super::case::Case;
use super::engine::{Engine, Which};
use super::expected::Expected;
use super::oracle::Oracle;
use super::outcome::{Compare, End, Outcome, Part, compare, take_memory};
use super::tally::{Count, Divergence, Tally};
use super::{encode, repro};
use crate::case::disassembly;
use crate::random::Random;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::mem::Prot;
use iced_x86::Code;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Everything one worker needs. One is at work in a process at a time: the arena's addresses are the same for all.
pub struct Worker {
    source: Source,
    oracle: Option<Oracle>,
    engines: Vec<Engine>,
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
    pub fn new(which: &[Which], host: bool, seed: u64) -> Result<Worker, String> {
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
            counts: vec![vec![Count::default(); Code::values().len()]; engines.len()],
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
        let mut batch = self.source.batch(self.seed, n);
        for engine in &mut self.engines {
            batch.load(engine.view);
            for (page, len, prot) in arena::PAGES {
                if prot.contains(Prot::EXEC) {
                    engine.code_changed(page..page + len);
                }
            }
        }
        if let (Some(_), Ok(view)) = (&self.oracle, arena::flat_view()) {
            batch.load(view);
        }
        for slot in 0..batch.slots.len() {
            for _ in 0..batch.slots[slot].states {
                self.one(&mut batch, slot, n);
            }
            self.strays(&mut batch, slot, n);
        }
        self.result.batches += 1;
        self.result.seconds += start.elapsed().as_secs_f64();
        self.result.cases - before
    }

    fn one(&mut self, batch: &mut Batch, slot: usize, n: u64) {
        let mut case = std::mem::take(&mut self.case);
        if batch.state(slot, &mut case) {
            self.result.cases += 1;
            self.all(batch, &case, n);
        }
        self.case = case;
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
            let count = &mut self.counts[e][case.insn as usize];
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

    fn differs(&mut self, case: &Case, e: usize, part: Part, what: String, batch: u64, pristine: &[u8]) {
        let which = self.engines[e].which;
        let code = format!("{:?}", case.insn);
        if self.result.wants(which, &code, part) {
            self.result.note(Divergence {
                engine: which.name().into(),
                code,
                bytes: case.code.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "),
                text: disassembly(64, &case.code),
                part: part.name().into(),
                what,
                seed: self.seed,
                batch,
                repro: serde_json::json!({
                    "request": repro::request(case, pristine),
                    "is": repro::outcome(&self.outcome),
                    "should": repro::outcome(&self.judge),
                }),
            });
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
                case.insn = batch.slots[slot].code;
                case.code.clone_from(&batch.slots[slot].bytes);
                self.counts[e][case.insn as usize].cases += 1;
                let what = format!("somebody wrote at {addr:#x}, outside the operand");
                let name = self.engines[e].which.name();
                match self.expected.find(name, &case, Part::Memory, &Outcome::default(), &Outcome::default()) {
                    Some(_) => self.counts[e][case.insn as usize].expected += 1,
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
            for (code, count) in Code::values().zip(counts.iter_mut()).filter(|(_, c)| c.cases > 0) {
                by_code.insert(format!("{code:?}"), std::mem::take(count));
            }
        }
        tally
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
