//! Fast tables of branch targets, for code that uses the mirror: they hold only as long as mappings stay as they are. And how code is left
//! in a hurry.

use super::Cache;
use crate::emit::Emitter;
use crate::system::Mode;
use crate::system::area::{self, Area, at};
use crate::system::lower::Flags;
use std::sync::atomic::Ordering;

impl Cache {
    /// Offset of the fast table of branch targets of a mode, if it has one.
    pub(super) fn fast(&mut self, mode: Mode) -> Option<usize> {
        if !mode.is_mirrored() || mode.is_counted() || mode.is_rare() {
            return None;
        }
        let n = match self.fast_modes.iter().position(|m| *m == mode) {
            Some(n) => n,
            None if self.fast_modes.len() < area::FAST_TABLES => {
                self.fast_modes.push(mode);
                self.fast_modes.len() - 1
            }
            None => return None,
        };
        Some(at::FAST + n * 2 * area::FAST_HALF)
    }

    /// Mappings of user pages have changed: what took them for granted asks again.
    pub fn forget_fast(&mut self, area: &Area) {
        if !std::mem::take(&mut self.fast_used) {
            return;
        }
        for n in 0..area::FAST_TABLES {
            // All ones stand for address 2, which has an entry of its own, where 0 stands for address 1.
            let table = at::FAST + n * 2 * area::FAST_HALF;
            area.fill(table..table + area::FAST_HALF, 0xff);
            area.set(table + 8 * area::fast_entry(2), 0);
        }
        for (site, stub) in self.loose.drain(..) {
            self.buffer.patch(site as usize, stub as usize);
        }
    }

    /// Enters block `b` in the fast table of its mode, if that has one.
    pub(super) fn enter_fast(&mut self, area: &Area, b: u32) {
        let (rip, mode) = (self.blocks[b as usize].rip, self.blocks[b as usize].mode);
        let Some(table) = self.fast(mode) else { return };
        let landing = match self.blocks[b as usize].fast_landing {
            Some(l) => l,
            None => self.fast_way_in(b),
        };
        self.blocks[b as usize].fast_landing = Some(landing);
        let entry = table + 8 * area::fast_entry(rip);
        area.set(entry, 1u64.wrapping_sub(rip));
        area.set(entry + area::FAST_HALF, self.host(landing));
        self.fast_used = true;
    }

    /// Code that goes to block `b`, with the flags in EFLAGS; gives its offset.
    fn fast_way_in(&mut self, b: u32) -> u32 {
        let offset = self.buffer.next() as u32;
        let to = self.blocks[b as usize].entries.host;
        let e = Emitter::new(self.host(offset));
        self.end_way_in(e, offset, b, to, &[], (Flags::Host, None));
        offset
    }

    /// The guest address that a fast way in leads to.
    pub fn fast_target(&self, host: u64) -> Option<u64> {
        let at = u32::try_from(host.checked_sub(self.buffer.base())?).ok()?;
        let w = &self.ways_in[self.ways_in.partition_point(|w| w.at <= at).checked_sub(1)?];
        (at < w.end).then(|| self.blocks[w.target as usize].rip)
    }

    /// Makes the thread that is in the code at `pc` leave soon: the jumps of what it executes lead to their stubs from now on. Called in the
    /// handler of a signal that interrupted this thread in the code, when nothing here is being changed.
    pub fn poison(&self, pc: u64) {
        let at = pc.wrapping_sub(self.buffer.base()) as u32;
        let last = self.ways_in.partition_point(|w| w.at <= at);
        if let Some(w) = last.checked_sub(1).map(|n| &self.ways_in[n]).filter(|w| at < w.end) {
            self.buffer.patch(w.jump as usize, w.stub as usize);
            self.poisoned.store(last as u32, Ordering::Relaxed);
            return;
        }
        let Some(n) = self.blocks.partition_point(|b| b.at <= at).checked_sub(1) else { return };
        let b = &self.blocks[n];
        for exit in &self.exits[b.first_exit as usize..][..b.exits as usize] {
            if let Some(site) = exit.site {
                self.buffer.patch(site as usize, exit.stub as usize);
            }
        }
        if let Some(jump) = b.jump {
            self.heal_jump();
            self.lead(jump, at::LOOKED);
            self.poisoned_jump.store(jump + 1, Ordering::Relaxed);
        }
    }

    /// Makes an indirect branch go through another slot.
    fn lead(&self, jump: u32, slot: usize) {
        // The displacement is not relative to the code.
        self.buffer.patch(jump as usize, (i64::from(jump) + 4 + i64::from(area::gs(slot))) as usize);
    }

    fn heal_jump(&self) {
        if let Some(jump) = self.poisoned_jump.swap(0, Ordering::Relaxed).checked_sub(1) {
            self.lead(jump, at::TARGET);
        }
    }

    /// Undoes what [`Cache::poison`] did and links do not.
    pub fn heal(&self) {
        self.heal_jump();
        let n = self.poisoned.swap(0, Ordering::Relaxed);
        let Some(w) = (n as usize).checked_sub(1).and_then(|n| self.ways_in.get(n)) else { return };
        if self.blocks[w.target as usize].live {
            self.buffer.patch(w.jump as usize, w.to as usize);
        }
    }
}
