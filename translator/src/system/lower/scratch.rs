//! Borrowed registers: which guest registers are in slots, and which hold the way to a page that was asked for.

use super::Lower;
use super::asm::{Assembler, At};
use crate::system::area::at;
use crate::system::block::{Item, Way};
use bivisor_emulator::isa::Gpr;

/// A range of guest memory that is known to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// The register it is relative to, with its version then; `None`: a page by its address.
    pub base: Option<Gpr>,
    pub version: u32,
    /// In the mirror: an index and its scale, and the index's version. Then `delta` has the base, if any, added to it, `low` is how far the
    /// sum with the displacement had been moved when it was looked up, and `high` how far the base.
    pub index: Option<(Gpr, u8)>,
    pub index_version: u32,
    /// The range, relative to the register's value when the version began; or the page.
    pub low: i64,
    pub high: i64,
    /// How far the register had been moved when the range was asked for; looked at in 32-bit code, where sums wrap.
    pub anchor: i64,
    /// For stores too.
    pub write: bool,
    /// In the mirror: accesses may fault.
    pub mirrored: bool,
    /// In the mirror: `delta` has the base added to it as it was when it had been moved by `high`, and there is no index: any short one may
    /// be added ([`Lower::short`](super::Lower)).
    pub added: bool,
    /// In the mirror: it is the distance of this slot, whatever the address.
    pub slot: Option<u8>,
    /// Holds host minus guest address; the page's host address if there is no base.
    pub delta: Gpr,
}

impl Window {
    /// In the mirror, for loads and stores, without an index.
    pub(super) fn over(base: Option<Gpr>, version: u32, delta: Gpr) -> Window {
        Window {
            base,
            version,
            index: None,
            index_version: 0,
            low: 0,
            high: 0,
            anchor: 0,
            write: true,
            mirrored: true,
            added: false,
            slot: None,
            delta,
        }
    }
}

pub(super) const fn bit(r: Gpr) -> u16 {
    1 << r as u16
}

impl Lower<'_> {
    /// Brings home what the instruction names.
    pub(super) fn fetch(&mut self, item: &Item) {
        let wanted = item.uses & self.spilled;
        if wanted == 0 {
            return;
        }
        self.windows.retain(|w| bit(w.delta) & wanted == 0);
        // What is only overwritten stays in its slot until that has happened.
        self.reload(wanted & item.reads);
        self.spilled &= !(wanted & item.reads);
    }

    /// Brings everything home.
    pub(super) fn home(&mut self) {
        let resident = self.block.mode.resident();
        self.reload(self.spilled & !resident);
        self.spilled = resident;
        self.windows.clear();
    }

    /// Loads registers from their slots.
    pub(super) fn reload(&mut self, mask: u16) {
        for r in Gpr::ALL.into_iter().filter(|r| mask & bit(*r) != 0) {
            self.e.load(r, At::slot(at::SPILL + 8 * r as usize));
        }
    }

    /// A register that may be destroyed while `item` is at hand, and be kept afterwards. `low`: one that is encoded without REX.
    pub(super) fn scratch(&mut self, item: &Item, low: bool) -> Option<Gpr> {
        self.take(item, item.uses, low)
    }

    /// As [`Lower::scratch`], for `item` alone: also what a load overwrites.
    pub(super) fn passing(&mut self, item: &Item, low: bool) -> Option<Gpr> {
        let overwritten = if matches!(item.way, Way::Memory | Way::Pop) { item.writes & !item.reads } else { 0 };
        self.take(item, item.uses & !overwritten, low)
    }

    fn take(&mut self, item: &Item, uses: u16, low: bool) -> Option<Gpr> {
        let mut best: Option<(usize, Gpr)> = None;
        let held = self.windows.iter().fold(0, |m, w| m | bit(w.delta));
        let taken = uses | self.busy | held | bit(Gpr::Rsp);
        for r in Gpr::ALL.into_iter().filter(|r| taken & bit(*r) == 0 && !(low && *r as u8 >= 8)) {
            let score = match () {
                () if self.spilled & bit(r) != 0 => usize::MAX,
                // Free in all rounds.
                () if self.round.is_some_and(|n| self.block.items[..=n].iter().all(|i| i.uses & bit(r) == 0)) => 5000,
                () if item.uses & bit(r) != 0 => 2000,
                () => self.distance(r),
            };
            if best.is_none_or(|(s, _)| score > s) {
                best = Some((score, r));
            }
        }
        let Some((_, r)) = best else {
            // Windows give way.
            if self.windows.is_empty() {
                return None;
            }
            self.windows.remove(0);
            return self.take(item, uses, low);
        };
        if self.spilled & bit(r) == 0 {
            self.e.store(At::slot(at::SPILL + 8 * r as usize), r);
            self.spilled |= bit(r);
        }
        self.busy |= bit(r);
        Some(r)
    }

    /// How long a register is not needed, in instructions.
    fn distance(&self, r: Gpr) -> usize {
        let later = &self.block.items[(self.n + 1).min(self.block.items.len())..];
        match later.iter().position(|i| i.uses & bit(r) != 0) {
            // Overwritten: it need never be brought home.
            Some(n) if later[n].reads & bit(r) == 0 => 1000 + n,
            Some(n) => n,
            None => 100,
        }
    }
}
