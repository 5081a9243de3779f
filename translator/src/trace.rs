//! Traces: the way that a program takes through several blocks, calls and returns among them, as one piece of code.
//!
//! A clock that ticks with the thread's processor time finds what is hot. Then the interpreter does some instructions, and what it did is
//! looked through for the best trace: one that begins where a branch led and goes on until it is there again or can go no further. Indirect
//! branches in it, returns from its own calls included, compare their target with the one that was seen, instead of looking it up. How much
//! a trace is worth says what was done: how many such targets would have been right, less those that would not.
//!
//! Hot paths as traces are Dynamo's and DynamoRIO's (Bala, Duesterwald and Banerjia 2000; Bruening 2004); these count how often a block is
//! reached where here a clock ticks, so that code which is not hot has no counters.

use crate::block::{direct_target, leads};
use crate::cache::Via;
use crate::emit::slot;
use crate::route::{Route, Routes};
use crate::run::Translator;
use crate::system::hash::Map;
use bivisor_emulator::host::thread::ThreadBlock;
use bivisor_emulator::host::ticker::Ticker;
use bivisor_emulator::mem::GuestMemory;
use bivisor_emulator::vcpu::{Board, Exit};
use iced_x86::Instruction;
use std::time::Duration;

/// Instructions looked at after a tick.
const STEPS: usize = 2048;
/// Guest bytes of a trace, fewer than a mark can count.
const MOST_BYTES: usize = 960;
/// Conditional branches of a trace.
const MOST_BRANCHES: usize = 64;
/// Indirect branches of a trace, returns included.
const MOST_GUESSES: usize = 48;
/// Places where a trace might begin that are looked at.
const MOST_HEADS: usize = 64;
/// Of so many instructions, one must be a branch that a trace saves.
const WORTH: usize = 128;
/// Traces one thread makes.
const MOST_TRACES: usize = 256;
/// After so many blocks or targets that were not known, since the tick before, what is done is new, not hot.
const NEW: u64 = 32;
/// A thread that has left the code so often is worth a clock.
const BEFORE: u64 = 64;
/// Processor time between ticks, at first; after every one without a trace twice that, so many times.
const TICK: Duration = Duration::from_millis(8);
const MOST_DOUBLED: u32 = 6;

/// Of one virtual CPU: when to look for traces.
#[derive(Default)]
pub(crate) struct Sampler {
    ticker: Option<Ticker>,
    /// Ticks since a trace was made.
    fruitless: u32,
    /// The host has no clock for us.
    none: bool,
    /// Blocks and targets not known, up to the last tick.
    unknown: u64,
    /// See [`Translator::trace_every`].
    every: Option<u64>,
    /// The traces it made: their instructions.
    made: Vec<Box<[u64]>>,
}

/// What is known of an instruction.
#[derive(Clone, Copy)]
struct Known {
    at: u64,
    route: Route,
    len: u8,
    next: u64,
    /// Of a direct branch.
    target: Option<u64>,
}

impl Known {
    fn new(iced: &Instruction, routes: &Routes) -> Known {
        let route = routes.of(iced);
        let target = direct_target(iced, route);
        Known { at: iced.ip(), route, len: iced.len() as u8, next: iced.next_ip(), target }
    }

    /// Does translated code do it, and go on?
    fn is_plain(&self) -> bool {
        !matches!(self.route, Route::Step | Route::Syscall | Route::CopyAndEnd)
    }

    /// Does it compare its target, in a trace that goes on?
    fn guesses(&self) -> bool {
        matches!(self.route, Route::Return | Route::JumpIndirect | Route::CallIndirect)
    }
}

impl Translator {
    /// From now on looks for a trace whenever the code was entered so many times, instead of by the clock; 0: never.
    pub fn trace_every(&mut self, entries: u64) {
        self.sampler.every = Some(entries);
    }

    pub(crate) fn is_to_sample(&self, block: &ThreadBlock) -> bool {
        match self.sampler.every {
            Some(n) => n != 0 && self.stats.entries.is_multiple_of(n),
            None => block.scratch[slot::TICK].get() != 0 || self.stats.entries.is_multiple_of(BEFORE),
        }
    }

    /// Looks for a trace. `Some`: `run` returns.
    pub(crate) fn sample(&mut self, board: Board<'_>, block: &ThreadBlock, via: &mut Via) -> Option<Exit> {
        if self.sampler.every.is_some() {
            return self.look_for_trace(board, via);
        }
        let ticked = block.scratch[slot::TICK].take() != 0;
        let thread = block.tid.get();
        let has_clock = self.sampler.ticker.as_ref().is_some_and(|t| t.is_of(thread));
        if self.sampler.none || has_clock && !ticked {
            return None;
        }
        // Not in a forked child, which has none of its parent's.
        if !has_clock {
            self.sampler.ticker = Ticker::new(thread);
            self.sampler.none = self.sampler.ticker.is_none();
        }
        let unknown = self.stats.to_block + self.stats.misses;
        let new = unknown - std::mem::replace(&mut self.sampler.unknown, unknown);
        let exit = if ticked && new < NEW { self.look_for_trace(board, via) } else { None };
        if let Some(ticker) = &self.sampler.ticker {
            ticker.tick_after(TICK * (1 << self.sampler.fruitless.min(MOST_DOUBLED)));
        }
        exit
    }

    fn look_for_trace(&mut self, board: Board<'_>, via: &mut Via) -> Option<Exit> {
        if !self.translatable(false) {
            return None;
        }
        // What was to be found by it is left behind.
        *via = Via::Start;
        let mut exit = None;
        let mut done = Vec::with_capacity(STEPS);
        let mut known = Map::default();
        while done.len() < STEPS && exit.is_none() && !self.kicker.requested() {
            let Some(next) = self.known_at_rip(board.mem, &mut known).filter(Known::is_plain) else { break };
            done.push(next);
            match self.core.step(&mut self.cpu, board) {
                Exit::Budget => {}
                Exit::Unsupported => break,
                end => exit = Some(end),
            }
        }
        self.sampler.fruitless += 1;
        let cache = &self.cache;
        self.sampler.made.retain(|path| cache.is_trace(path[0]));
        if self.sampler.made.len() < MOST_TRACES
            && let Some(path) = best(&done, &self.sampler.made)
            && cache.add_trace(&mut { board.mem }, &path, &mut self.scratch)
        {
            self.sampler.made.push(path);
            self.sampler.fruitless = 0;
        }
        exit
    }

    fn known_at_rip(&mut self, mem: &GuestMemory, known: &mut Map<u64, Known>) -> Option<Known> {
        let rip = self.cpu.rip;
        if let Some(known) = known.get(&rip) {
            return Some(*known);
        }
        let (iced, _) = self.scratch.one(&mut { mem }, rip)?;
        let new = Known::new(&iced, self.cache.routes());
        known.insert(rip, new);
        Some(new)
    }
}

/// The best new trace of what was done: the addresses of its instructions.
fn best(done: &[Known], made: &[Box<[u64]>]) -> Option<Box<[u64]>> {
    let mut covered = vec![false; done.len()];
    for path in made {
        follow(done, path, |i, _| covered[i] = true);
    }
    // How often a branch led where a trace might begin, and where it did so first.
    let mut heads: Map<u64, (usize, usize)> = Map::default();
    let led = |&i: &usize| !covered[i] && done[i - 1].route != Route::Copy && done[i - 1].next != done[i].at;
    for i in (1..done.len()).filter(led) {
        heads.entry(done[i].at).or_insert((0, i)).0 += 1;
    }
    let mut heads: Vec<(usize, usize)> = heads.into_values().filter(|&(times, _)| times > 1).collect();
    heads.sort_unstable_by_key(|&(times, i)| (std::cmp::Reverse(times), i));
    heads.truncate(MOST_HEADS);
    let worth = |(_, from): (usize, usize)| {
        let path = path(done, from);
        let mut worth = 0;
        follow(done, &path, |i, right| {
            if done[i].guesses() && !covered[i] {
                worth += if right { 1 } else { -1 };
            }
        });
        (worth, path)
    };
    let (most, path) = heads.into_iter().map(worth).max_by_key(|(worth, path)| (*worth, path.len()))?;
    (most > 0 && most as usize * WORTH >= done.len()).then_some(path)
}

/// Of what was done, tells of each instruction that would have been done in a trace but its last, and whether the trace went the same way.
fn follow(done: &[Known], path: &[u64], mut tell: impl FnMut(usize, bool)) {
    let mut at = None;
    for (i, pair) in done.windows(2).enumerate() {
        let Some(now) = at.or_else(|| (pair[0].at == path[0]).then_some(0)) else { continue };
        at = path.get(now + 1).and_then(|&next| {
            let right = pair[1].at == next;
            tell(i, right);
            right.then_some(now + 1)
        });
    }
}

/// The trace that begins with this instruction.
fn path(done: &[Known], from: usize) -> Box<[u64]> {
    let (mut bytes, mut branches, mut guesses) = (0, 0, 0);
    let mut pushed: Vec<u64> = Vec::new();
    let mut path = Vec::new();
    for (i, now) in done.iter().enumerate().skip(from) {
        bytes += usize::from(now.len);
        branches += usize::from(now.route == Route::Conditional);
        guesses += usize::from(now.guesses());
        let too_much = bytes > MOST_BYTES || branches > MOST_BRANCHES || guesses > MOST_GUESSES;
        if i > from && now.at == done[from].at || too_much {
            break;
        }
        path.push(now.at);
        let Some(next) = done.get(i + 1).map(|k| k.at) else { break };
        if matches!(now.route, Route::Call | Route::CallIndirect) {
            pushed.push(now.next);
        }
        // A return from a call that is not in it is another one the next time.
        let is_strange = now.route == Route::Return && pushed.pop() != Some(next);
        if is_strange || !leads(now.route, now.next, now.target, next) {
            break;
        }
    }
    path.into()
}
