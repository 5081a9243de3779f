//! Cases of 16- and 32-bit user code: segments with bases and limits, 16-bit stacks, both address sizes; the host CPU in compatibility mode
//! is the judge.
//!
//! | module | holds |
//! | --- | --- |
//! | [`segments`] | the descriptor tables |
//! | [`source`] | instructions in their places, states for them |
//! | [`aim`] | memory operands, branch targets, selectors |
//! | [`oracle`] | the host CPU (unsafe) |
//! | [`engine`] | the engines |
//! | [`system`] | CPL 0, real mode, virtual-8086 mode |
//! | [`record`] | cases as text, with what the host CPU made of them |
//! | [`matrix`] | the results on record |

pub mod aim;
pub mod engine;
pub mod matrix;
pub mod oracle;
pub mod record;
pub mod segments;
pub mod source;
pub mod system;

use super::arena::{self, BASE, View};
use super::beside::{Outcomes, on_each};
use super::case::{Case, Kind};
use super::engine::Which;
use super::expected::Expected;
use super::outcome::{Outcome, Part, compare, take_memory};
use super::repro;
use super::tally::{Divergence, Tally};
use super::values::Pool;
use crate::case::disassembly;
use crate::random::Random;
use bivisor_emulator::cpu::CpuState;
use engine::{Engine, Place};
use iced_x86::Code;
use oracle::Oracle;
use source::{BLOCKS, SLOTS, Slot, Source};

/// Everything for such cases.
pub struct Modes {
    source: Source,
    oracle: Option<(Oracle, View)>,
    engines: Vec<Engine>,
    expected: Expected,
    judge: Outcome,
    outcome: Outcome,
    case: Case,
}

impl Modes {
    /// With these engines, as far as they take such code; `host`: the host CPU is the judge, else the first engine.
    ///
    /// # Errors
    /// A sentence: something is not to be had here.
    pub fn new(which: &[Which], host: bool) -> Result<Modes, String> {
        let mut wanted: Vec<Which> = which
            .iter()
            .filter_map(|w| match w {
                Which::Interp | Which::InterpPaged => Some(Which::InterpPaged),
                Which::Bt | Which::BtPaged => Some(Which::BtPaged),
                Which::Kvm => None,
            })
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        let oracle = match host.then(|| Ok::<_, String>((Oracle::new()?, arena::flat_view()?))) {
            Some(Err(why)) if wanted.len() < 2 => return Err(why),
            Some(Err(why)) => {
                eprintln!("SKIPPED: the host CPU is not the judge of 16- and 32-bit code: {why}");
                None
            }
            Some(Ok(oracle)) => Some(oracle),
            None => None,
        };
        Ok(Modes {
            source: Source::default(),
            oracle,
            engines: wanted
                .iter()
                .map(|w| (*w, Place::Compat))
                .chain(wanted.contains(&Which::BtPaged).then_some((Which::BtPaged, Place::Pae)))
                .chain(wanted.contains(&Which::BtPaged).then_some((Which::BtPaged, Place::PaeMirror)))
                .chain(wanted.iter().map(|w| (*w, Place::System)))
                .map(|(w, place)| Engine::new(w, place))
                .collect::<Result<_, _>>()?,
            expected: Expected::default(),
            judge: Outcome::default(),
            outcome: Outcome::default(),
            case: Case::default(),
        })
    }

    /// Only these instructions.
    pub fn only(&mut self, codes: &[Code]) {
        self.source.only(codes);
    }

    /// An engine of these.
    pub fn engine(&mut self, which: Which) -> Option<&mut Engine> {
        self.engines.iter_mut().find(|e| e.which == which)
    }

    /// Plants a bug in the translator where it runs cases of this kind.
    pub fn plant(&mut self, kind: Kind, wrong: impl Fn(&mut CpuState) + 'static) {
        let probe = Case { kind, ..Case::default() };
        if let Some(e) = self.engines.iter_mut().find(|e| e.which == Which::BtPaged && e.takes(&probe)) {
            e.plant(Box::new(move |_, cpu| wrong(cpu)));
        }
    }

    /// Is the host CPU the judge?
    pub fn has_host(&self) -> bool {
        self.oracle.is_some()
    }

    /// What comes out of one case on all memory set up anew: on the host CPU, if it is the judge, and on the engines, each with its name.
    ///
    /// # Errors
    /// An engine left in a way that no instruction of a case can cause.
    pub fn outcomes(&mut self, case: &Case, pristine: &[u8]) -> Result<Outcomes, String> {
        let host = match &mut self.oracle {
            Some((oracle, view)) => {
                oracle::local_table(true)?;
                Some((*view, |case: &Case, o: &mut Outcome| oracle.run(case, o)))
            }
            None => None,
        };
        let engines = self.engines.iter_mut().filter(|e| e.takes(case));
        on_each(case, pristine, &[(case.linear(), &case.code)], host, engines)
    }

    /// Batch number `n` of a kind.
    pub fn batch(&mut self, kind: Kind, seed: u64, n: u64, result: &mut Tally) {
        let mut r = Random::new(super::batch::mixed(seed ^ (kind as u64) << 56, n));
        let pool = Pool::new(&mut r);
        let mut pristine = Source::pristine(&pool, &mut r);
        if kind == Kind::Real {
            // Each vector leads to its own INT3.
            let vectors: Vec<u8> = (0..=255).flat_map(|n: u32| (0x2200 + n).to_le_bytes()).collect();
            pristine[..vectors.len()].copy_from_slice(&vectors);
        }
        for e in &mut self.engines {
            e.view.write(BASE, &pristine);
            arena::PAGES.iter().for_each(|p| (p.0..p.0 + p.1).step_by(0x1000).for_each(|page| e.code_changed(page)));
        }
        if let Some((_, view)) = &self.oracle {
            // It was filled once.
            let _ = oracle::local_table(true);
            view.write(BASE, &pristine);
        }
        let at = (seed, n);
        for i in 0..if kind.is_single() { SLOTS } else { BLOCKS } {
            let Some(slot) = self.source.slot(&mut r, kind, n, i) else { continue };
            // No window is there: what a case stored there is not put back, and not every engine takes every instruction.
            let own = (arena::OWN - BASE) as usize;
            self.own(&pristine[own..own + 0x1000]);
            self.place(&slot, &slot.bytes[..slot.there]);
            let code = (slot.at - BASE) as usize;
            let mut ram = pristine.clone();
            ram[code..code + slot.there].copy_from_slice(&slot.bytes[..slot.there]);
            for _ in 0..slot.states {
                source::state(&mut r, &pool, &slot, &mut self.case);
                let case = std::mem::take(&mut self.case);
                self.one(&case, (&pristine, &ram), at, result);
                self.case = case;
            }
            self.place(&slot, &vec![0xcc; slot.there]);
        }
    }

    /// Fills the page that can be written and executed in all memories.
    fn own(&mut self, bytes: &[u8]) {
        for e in &mut self.engines {
            e.view.write(arena::OWN, bytes);
            e.code_changed(arena::OWN);
        }
        if let Some((_, view)) = &self.oracle {
            view.write(arena::OWN, bytes);
        }
    }

    /// Puts code into all memories.
    fn place(&mut self, slot: &Slot, bytes: &[u8]) {
        for e in &mut self.engines {
            e.view.write(slot.at, bytes);
            e.code_changed(slot.at);
            e.code_changed(slot.at + bytes.len() as u64);
        }
        if let Some((_, view)) = &self.oracle {
            view.write(slot.at, bytes);
        }
    }

    fn one(&mut self, case: &Case, (pristine, ram): (&[u8], &[u8]), at: (u64, u64), result: &mut Tally) {
        result.cases += 1;
        let mut judged = false;
        let system = case.kind.is_system();
        // A loop ends nowhere: only the host CPU can say that there is none.
        let mut endless = false;
        let mut now = if system { ram.to_vec() } else { Vec::new() };
        for (at, bytes) in case.puts.iter().filter(|_| system) {
            let at = (at - BASE) as usize;
            now[at..at + bytes.len()].copy_from_slice(bytes);
        }
        if let Some((oracle, view)) = &mut self.oracle
            && (!system || system::is_judged(case))
        {
            // The pages that are no windows and that earlier cases changed.
            for page in [arena::NOTE, arena::CODE_NX + 0x1000, arena::OWN, arena::ROM].into_iter().filter(|_| system) {
                view.write(page, &pristine[(page - BASE) as usize..][..0x1000]);
            }
            case.fill(*view, pristine);
            oracle.run(case, &mut self.judge);
            take_memory(case, *view, &mut self.judge);
            judged = system::can_be(case, &self.judge);
        }
        for engine in &mut self.engines {
            if !system {
                // Some of it stays for later cases.
                case.fill(engine.view, pristine);
            }
            if !engine.takes(case) {
                continue;
            }
            if system {
                engine.restore(&now);
            }
            let done = engine.run(case, &mut self.outcome);
            take_memory(case, engine.view, &mut self.outcome);
            if !judged {
                std::mem::swap(&mut self.judge, &mut self.outcome);
                (judged, endless) = (true, done.is_err());
                continue;
            }
            let found = match done {
                _ if endless => None,
                Ok(()) => compare(case, &self.outcome, &self.judge),
                Err(why) => Some((Part::Fault, why)),
            };
            let name = match system {
                true => format!("{}:{}", engine.name(), case.kind.name()),
                false => format!("{}:{}", engine.name(), case.kind.bits()),
            };
            let code = match case.kind.is_single() {
                true => format!("{:?}", case.insn),
                false => case.kind.name().into(),
            };
            let count = result.counts.entry(name.clone()).or_default().entry(code.clone()).or_default();
            count.cases += 1;
            match found {
                None => count.equal += 1,
                Some((part, what)) => {
                    match self.expected.find(engine.which.name(), case, part, &self.outcome, &self.judge) {
                        Some(row) => {
                            count.expected += 1;
                            *result.expected.entry(self.expected.0[row].what()).or_default() += 1;
                        }
                        None if !result.wants(&name, &code, part) => {}
                        None => {
                            // No request says all of a kernel's world: seed and batch do.
                            let request = (!system).then(|| repro::request(case, pristine, Some(engine.template())));
                            let repro = serde_json::json!({
                                "request": request,
                                "is": repro::outcome(&self.outcome),
                                "should": repro::outcome(&self.judge),
                            });
                            result.note(divergence(case, name, code, (part, what), at, repro));
                        }
                    }
                }
            }
        }
    }
}

fn divergence(
    case: &Case,
    engine: String,
    code: String,
    (part, what): (Part, String),
    at: (u64, u64),
    repro: serde_json::Value,
) -> Divergence {
    let hex = |b: &[u8]| b.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
    let text = match case.kind.is_single() {
        true => disassembly(case.kind.bits(), &case.code),
        false => super::blocks::text_in(&case.code, case.kind.bits()),
    };
    Divergence {
        engine,
        code,
        bytes: hex(&case.code),
        text,
        part: part.name().into(),
        what,
        seed: at.0,
        batch: at.1,
        repro,
    }
}
