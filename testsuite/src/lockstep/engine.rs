//! The pair: an engine under test that a process runs on, and the reference beside it.

use super::reference::{Apart, Reference, Stop, Touched};
use super::repro;
use super::state::{self, Change};
use super::turn::Turn;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Fault, Rflags};
use bivisor_emulator::mem::{FlatSpace, PAGE_SIZE, Prot};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Kicker, Vcpu};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: usize = PAGE_SIZE as usize;
/// Instructions of a stretch, at most: the translator's blocks are not longer.
pub const BLOCK: usize = 64;
/// Stretches between two looks whether another thread waits.
const FAIR: u32 = 32;
/// More often than this no repetition comes back without an instruction done.
const PATIENCE: u32 = 1 << 20;

/// What was done, of all threads together.
#[derive(Debug, Default)]
pub struct Counts {
    /// Stretches compared.
    pub stretches: AtomicU64,
    /// Instructions compared.
    pub instructions: AtomicU64,
    /// Instructions that the tested engine did alone, by [`Apart`].
    pub apart: [AtomicU64; 4],
    /// Stretches that a signal came into: not judged where something differed.
    pub interrupted: AtomicU64,
    /// Differences.
    pub differences: AtomicU64,
}

/// A stretch after which something is not the same.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Before it.
    pub start: CpuState,
    /// The pages it touches as they were, with their rights.
    pub pages: Vec<(u64, Prot, Vec<u8>)>,
    /// RIP after each of its instructions, as the reference had it.
    pub trace: Vec<u64>,
    /// How each ended.
    pub ends: (String, String),
    /// What is not the same.
    pub changes: Vec<Change>,
}

impl Difference {
    /// As a request of `bivisor exec`, what differed in its note.
    pub fn request(&self, engine: &str) -> serde_json::Value {
        let mut request = repro::request(&self.start, &self.pages, self.trace.len().max(1) as u64);
        let side = |c: &Change| serde_json::json!({ "what": c.what, "interp": c.reference, engine: c.tested });
        request["note"] = serde_json::json!({
            "engines": ["interp", engine],
            "ends": { "interp": self.ends.0, engine: self.ends.1 },
            "differs": self.changes.iter().map(side).collect::<Vec<_>>(),
        });
        request
    }
}

/// Told of a difference; the program goes on after it.
pub type Report = Box<dyn Fn(&Difference) + Send + Sync>;

/// What the threads of a process have in common.
pub struct Shared {
    /// What was done.
    pub counts: Counts,
    turn: Turn,
    report: Report,
    model: Arc<CpuModel>,
}

impl Shared {
    /// For engines that offer `model`.
    pub fn new(model: Arc<CpuModel>, report: Report) -> Arc<Shared> {
        Arc::new(Shared { counts: Counts::default(), turn: Turn::default(), report, model })
    }
}

/// An engine under test with the reference beside it.
pub struct Lockstep<V> {
    /// The engine that the program runs on.
    pub tested: V,
    reference: Reference,
    shared: Arc<Shared>,
    /// Instructions of a stretch, at most.
    most: usize,
    intercepts: Intercepts,
    start: Box<CpuState>,
}

/// What came of a stretch.
enum Done {
    Goes,
    Leaves(Exit),
}

impl<V: Vcpu> Lockstep<V> {
    /// Compares after stretches of at most `most` instructions: 1 is after each.
    ///
    /// # Errors
    /// A sentence: no memory.
    pub fn new(tested: V, shared: Arc<Shared>, most: usize) -> Result<Lockstep<V>, String> {
        let reference = Reference::new(shared.model.clone())?;
        let start = Box::new(CpuState::reset());
        Ok(Lockstep { tested, reference, shared, most, intercepts: Intercepts::empty(), start })
    }

    /// One stretch on both; `Some` if the engine leaves. For callers that know that nobody else runs guest code.
    pub fn stretch(&mut self, board: Board<'_>, flat: &FlatSpace) -> Option<Exit> {
        match self.once(board, flat) {
            Done::Goes => None,
            Done::Leaves(exit) => Some(exit),
        }
    }

    /// Memory may have changed since the last stretch.
    pub fn forget(&mut self) {
        self.reference.forget();
    }

    fn once(&mut self, board: Board<'_>, flat: &FlatSpace) -> Done {
        (*self.start).clone_from(self.tested.state());
        let stop = self.reference.run(flat, &self.start, self.most);
        let wanted = self.reference.trace.len() as u64;
        let shared = self.shared.clone();
        let counts = &shared.counts;
        if let (Stop::Apart(why, _), 0) = (stop, wanted) {
            counts.apart[why as usize].fetch_add(1, Ordering::Relaxed);
            let (exit, _) = self.tested.run_stretch(board, 1);
            // What it has written, the copies do not have.
            self.reference.forget();
            return if exit == Exit::Budget { Done::Goes } else { Done::Leaves(exit) };
        }
        let touched = self.reference.touched();
        // What is only read is in the copies.
        let before = |t: &Touched| if t.written { page_of(flat, t.addr) } else { Vec::new() };
        let before: Vec<Vec<u8>> = touched.iter().map(before).collect();
        let (exit, done, interrupted) = self.run_for_real(board, wanted, matches!(stop, Stop::Exit(_)));
        counts.stretches.fetch_add(1, Ordering::Relaxed);
        counts.instructions.fetch_add(done, Ordering::Relaxed);
        // A part of the instruction that is not done here was done.
        let judged = !matches!(stop, Stop::Apart(_, true));
        let mut changes = Vec::new();
        if judged {
            changes = self.compare(flat, &touched, stop, exit);
        }
        if !changes.is_empty() {
            if interrupted {
                counts.interrupted.fetch_add(1, Ordering::Relaxed);
            } else {
                counts.differences.fetch_add(1, Ordering::Relaxed);
                let pages = touched.iter().zip(before).map(|(t, bytes)| self.page_before(t, bytes)).collect();
                let end = |e: &dyn std::fmt::Debug| format!("{e:x?}");
                let reference_end = match stop {
                    Stop::Exit(exit) => end(&exit),
                    _ => end(&Exit::Budget),
                };
                let trace = self.reference.trace.clone();
                let ends = (reference_end, end(&exit));
                let difference = Difference { start: (*self.start).clone(), pages, trace, ends, changes };
                (shared.report)(&difference);
            }
            self.reference.forget();
        }
        if !judged {
            self.reference.forget();
        }
        if exit == Exit::Budget { Done::Goes } else { Done::Leaves(exit) }
    }

    fn page_before(&self, t: &Touched, mut bytes: Vec<u8>) -> (u64, Prot, Vec<u8>) {
        if !t.written {
            let mut copy = [0; PAGE];
            self.reference.copy(t, &mut copy);
            bytes = copy.to_vec();
        }
        (t.addr, t.prot, bytes)
    }

    /// `wanted` instructions, and if `leaves` the attempt of one more: why it came back, how many it did, and whether a signal came.
    fn run_for_real(&mut self, board: Board<'_>, wanted: u64, leaves: bool) -> (Exit, u64, bool) {
        let (mut done, mut interrupted) = (0, false);
        let kicker = self.tested.kicker();
        let counts = self.tested.instructions().is_some();
        for _ in 0..PATIENCE {
            if done >= wanted && !leaves || done > wanted {
                return (Exit::Budget, done, interrupted);
            }
            let rip = if counts { 0 } else { self.tested.integer_state().rip };
            let (exit, n) = self.tested.run_stretch(board, wanted.saturating_sub(done).max(1));
            // An engine that takes an element of a repetition for an instruction has stayed where it was.
            let stayed = !counts && n == 1 && exit == Exit::Budget && {
                let now = self.tested.integer_state().rip;
                now == rip && self.reference.trace.get(done as usize).is_some_and(|&next| next != rip)
            };
            done += if stayed { 0 } else { n };
            interrupted |= kicker.requested();
            match exit {
                Exit::Budget => {}
                // It is said when the stretch is over.
                Exit::Kicked => {
                    interrupted = true;
                    kicker.request();
                    if done >= wanted || n == 0 {
                        kicker.take();
                        return (Exit::Kicked, done, true);
                    }
                }
                exit => return (exit, done, interrupted),
            }
        }
        (Exit::Budget, done, interrupted)
    }

    fn compare(&mut self, flat: &FlatSpace, touched: &[Touched], stop: Stop, exit: Exit) -> Vec<Change> {
        let mut changes = Vec::new();
        let should = match stop {
            Stop::Exit(exit) => exit,
            _ => Exit::Budget,
        };
        if exit != Exit::Kicked && !same_exit(should, exit) {
            let (reference, tested) = (format!("{should:x?}"), format!("{exit:x?}"));
            changes.push(Change { what: "end".into(), reference, tested });
        }
        let cr3 = self.start.cr3;
        self.reference.cpu.cr3 = cr3;
        let tested = self.tested.state();
        if !state::same(&self.reference.cpu, tested, Rflags::empty()) {
            let undefined = self.undefined(flat);
            changes.extend(state::changes(&self.reference.cpu, self.tested.state(), undefined, false));
        }
        let mut copy = [0; PAGE];
        for t in touched {
            self.reference.copy(t, &mut copy);
            let real = page_of(flat, t.addr);
            if real[..] != copy[..] {
                let at = real.iter().zip(&copy).position(|(a, b)| a != b).unwrap_or(0);
                let end = (at + 16).min(PAGE);
                let show = |b: &[u8]| b[at..end].iter().map(|b| format!("{b:02x}")).collect::<String>();
                let what = format!("memory {:#x}", t.addr + at as u64);
                changes.push(Change { what, reference: show(&copy), tested: show(&real) });
            }
        }
        changes
    }

    /// The flags that are open after the stretch.
    fn undefined(&self, flat: &FlatSpace) -> Rflags {
        let starts = [self.start.rip].into_iter().chain(self.reference.trace.iter().copied());
        let code: Vec<(u64, [u8; 15])> = starts
            .take(self.reference.trace.len())
            .map(|rip| {
                let mut bytes = [0; 15];
                let _ = flat.read(rip, &mut bytes);
                (rip, bytes)
            })
            .collect();
        state::undefined(code.iter().map(|(ip, b)| (*ip, &b[..])), 64)
    }
}

/// The bytes of a page; zeros where it cannot be read any more.
fn page_of(flat: &FlatSpace, addr: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    let _ = flat.read(addr, &mut bytes);
    bytes
}

/// A host says neither the causes of a #DB nor, of its own half and of pages not yet there, whether a page is present.
fn same_exit(a: Exit, b: Exit) -> bool {
    let plain = |e: Exit| match e {
        Exit::Exception(Fault::Pf { addr, code }) => Exit::Exception(Fault::Pf { addr, code: code & !1 }),
        Exit::Exception(Fault::Db(_)) => Exit::Exception(Fault::Db(0)),
        other => other,
    };
    plain(a) == plain(b)
}

impl<V: Vcpu> Vcpu for Lockstep<V> {
    fn run(&mut self, board: Board<'_>, budget: u64) -> Exit {
        let Some(flat) = board.mem.flat().filter(|_| budget == u64::MAX) else {
            return self.tested.run(board, budget);
        };
        let shared = self.shared.clone();
        let kicker = self.tested.kicker();
        let mut n = 0;
        shared.turn.take();
        self.reference.forget();
        let exit = loop {
            if kicker.requested() && kicker.take() {
                break Exit::Kicked;
            }
            if let Done::Leaves(exit) = self.once(board, flat) {
                break exit;
            }
            n += 1;
            if n % FAIR == 0 && shared.turn.is_wanted() {
                shared.turn.give();
                shared.turn.take();
                self.reference.forget();
            }
        };
        shared.turn.give();
        exit
    }

    fn state(&mut self) -> &mut CpuState {
        self.tested.state()
    }

    fn integer_state(&mut self) -> &mut CpuState {
        self.tested.integer_state()
    }

    fn set_intercepts(&mut self, intercepts: Intercepts) {
        self.intercepts = intercepts;
        self.tested.set_intercepts(intercepts);
        self.reference.set_intercepts(intercepts);
    }

    fn kicker(&self) -> Kicker {
        self.tested.kicker()
    }

    fn around_fork(&mut self, fork: &mut dyn FnMut()) {
        let parent = std::process::id();
        let shared = self.shared.clone();
        shared.turn.take();
        self.tested.around_fork(fork);
        if std::process::id() != parent {
            shared.turn.alone();
        }
        shared.turn.give();
    }

    fn survives_fork(&mut self) -> bool {
        self.tested.survives_fork()
    }

    fn instructions(&self) -> Option<u64> {
        self.tested.instructions()
    }
}

/// Why instructions were left to the tested engine, in words, in the order of [`Counts::apart`].
pub const APART: [(Apart, &str); 4] = [
    (Apart::Clock, "the clock"),
    (Apart::Random, "random numbers"),
    (Apart::Shared, "memory shared with others"),
    (Apart::Large, "more memory than is copied"),
];
