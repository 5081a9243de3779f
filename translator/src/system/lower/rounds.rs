//! Loops inside a block, in the mirror or with all accesses at the same addresses in each round: after the first round the body follows
//! once more, and its rounds keep borrowed registers and what is known of memory.
//!
//! Distances stay right from round to round: registers that only have a small constant added in a round meet the empty space beside
//! their slot ([`crate::system::mirror`]) before another slot, because each is used for an access in every round; that faults, and the code is
//! entered anew.

use super::asm::{Assembler, At};
use super::branch::condition;
use super::scratch::{Window, bit};
use super::usual::Sure;
use super::{Cold, Flags, Kind, Lower};
use crate::system::block::{GuestBlock, Item, Way};
use bivisor_emulator::isa::Gpr;

/// What may be added to an address in a round.
const STEP: i64 = 1 << 20;

/// Bytes of a cache line.
const LINE: u64 = 64;

/// What held where the branch to the next round was met.
#[derive(Debug)]
pub(super) struct Round {
    site: usize,
    n: usize,
    spilled: u16,
    windows: Vec<Window>,
    moved: [i64; 16],
    version: [u32; 16],
    sure: [Option<Sure>; 16],
}

/// The conditional branch of a block to its own start, if rounds are made there.
pub(super) fn find(block: &GuestBlock) -> Option<usize> {
    let plain = !block.mode.is_counted() && !block.mode.is_narrow();
    let back = |i: &Item| i.way == Way::Conditional && i.iced.near_branch_target() == block.start;
    let n = block.items.iter().position(back).filter(|_| plain)?;
    (block.mode.is_mirrored() || stays(&block.items[..n])).then_some(n)
}

/// Is there memory that is accessed, by base registers that are not written, and no other?
fn stays(items: &[Item]) -> bool {
    let written = items.iter().fold(0, |m, i| m | i.writes);
    let mut accesses = items.iter().filter_map(|i| i.access).peekable();
    accesses.peek().is_some() && accesses.all(|a| a.based().is_some_and(|r| written & bit(r) == 0))
}

fn opcode(item: &Item) -> [u8; 2] {
    [0x0f, 0x80 | condition(item.iced.condition_code())]
}

impl Lower<'_> {
    /// The branch to the next round, in the first.
    pub(super) fn meet_round(&mut self, item: &Item) {
        let site = self.branch(&opcode(item));
        self.first_round = Some(Round {
            site,
            n: self.n,
            spilled: self.spilled,
            windows: self.windows.clone(),
            moved: self.moved,
            version: self.version,
            sure: self.sure,
        });
    }

    /// Lets host addresses follow what was added to their registers, and begins to count anew.
    fn follow(&mut self) {
        for n in 0..self.windows.len() {
            let w = self.windows[n];
            if !w.mirrored || w.base.is_none() && w.index.is_none() {
                continue;
            }
            let by = self.moved_by(w.base, None);
            if w.index.is_none() && !w.added {
                (self.windows[n].low, self.windows[n].high) = (w.low - by, w.high - by);
            } else if by != 0 {
                // Within STEP. The index is added by each access.
                self.e.lea(w.delta, At::base(w.delta, by as i32));
            }
        }
        self.follow_near();
        self.moved = [0; 16];
    }

    /// Registers, as bits, that a round does not change, or to which it only adds constants, and which it accesses memory with.
    fn kept(&self, n: usize) -> u32 {
        let items = &self.block.items[..=n];
        let kept = |r: &Gpr| {
            let based = items.iter().any(|i| i.access.is_some_and(|a| a.based() == Some(*r)));
            items.iter().all(|i| i.writes & bit(*r) == 0 || based && i.adds.is_some_and(|(a, _)| a == *r))
        };
        Gpr::ALL.into_iter().filter(kept).fold(0, |m, r| m | (u32::from(bit(r)) * 0x1_0001))
    }

    /// The body for all rounds but the first.
    pub(super) fn next_rounds(&mut self) {
        let Some(first) = self.first_round.take() else { return };
        self.round = None;
        let here = self.e.here();
        self.e.set_rel32(first.site, here);
        (self.spilled, self.windows, self.moved, self.version) =
            (first.spilled, first.windows, first.moved, first.version);
        (self.flags, self.told, self.producer) = (Flags::Host, None, None);
        self.short = 0;
        // Through the TLB what is known is a range beside a register.
        let small = |l: &Self, w: &Window| l.moved_by(w.base, w.index).abs() <= if w.mirrored { STEP } else { 0 };
        let mirrored = self.block.mode.is_mirrored();
        let windows: Vec<_> =
            self.windows.iter().copied().filter(|w| w.mirrored == mirrored && small(self, w)).collect();
        self.windows = windows;
        self.sure = first.sure;
        let near = self.near() & self.kept(first.n);
        self.follow();
        self.begin_near(near);
        // A loop that fits takes one line of the cache of decoded instructions.
        let past = (self.e.here() % LINE) as usize;
        self.e.nops((LINE as usize - past) % LINE as usize);
        let (start, spilled, windows) = (self.e.len() as u32, self.spilled, self.windows.clone());
        let block = self.block;
        for n in 0..first.n {
            self.n = n;
            self.busy = 0;
            if !self.one(&block.items[n]) {
                return;
            }
        }
        (self.n, self.busy) = (first.n, 0);
        let item = &block.items[first.n];
        self.restore_flags();
        let kept = windows.iter().all(|w| self.windows.iter().any(|v| same(v, w)) && small(self, w));
        let kept = kept && self.near() & near == near;
        let more = self.spilled & !spilled;
        if kept && self.spilled & spilled == spilled {
            self.reload(more);
            self.spilled = spilled;
            self.windows.retain(|v| windows.iter().any(|w| same(v, w)));
            self.follow();
            self.e.align_patch(2);
            let site = self.branch(&opcode(item));
            let exit = self.exit(Kind::To, block.start, Flags::Host, self.n + 1);
            self.exits[exit].site = Some(site as u32);
            self.exits[exit].spilled = self.spilled;
            self.exits[exit].again = Some(start);
            self.cold.push(Cold { site, reload: 0, exit, walk: None });
        } else {
            let recipe = self.leave_word();
            self.side_exit(&opcode(item), item, recipe);
        }
        self.n += 1;
        self.go_to(block.next(item));
    }
}

/// Do two windows stand for the same, wherever they were asked for?
fn same(v: &Window, w: &Window) -> bool {
    let range = |w: &Window| if w.base.is_some() && w.index.is_none() && !w.added { (0, 0) } else { (w.low, w.high) };
    let what =
        |w: &Window| (w.base, w.version, w.index, w.index_version, w.mirrored, w.added, w.slot, w.delta, range(w));
    what(v) == what(w)
}
