//! What experience says of blocks: those that were made with a wrong expectation give way to others.

use super::Cache;
use crate::system::lower::EARLY;
use bivisor_emulator::isa::Gpr;

/// What experience says of a block.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Hints {
    /// Ranges lie in two pages.
    pub(super) apart: bool,
    /// What is loaded from may not be stored to.
    pub(super) strict: bool,
    /// A division faulted.
    pub(super) divides: bool,
}

impl Cache {
    /// The block of an exit was made with a wrong expectation.
    pub fn learn(&mut self, id: u32, apart: bool) {
        let stub = self.exits[id as usize].stub;
        self.hint_at(stub, if apart { |hints| &mut hints.apart } else { |hints| &mut hints.strict });
    }

    /// The base register of an access at this host address is not near to what is accessed.
    pub fn distant(&mut self, pc: u64) {
        self.hint(pc, |hints| &mut hints.apart);
    }

    /// The instruction at this host address accesses memory in another slot than was expected.
    pub fn astray(&mut self, pc: u64, slot: u8) {
        let Some((block, at)) = self.point(pc).map(|(b, p)| (b, p.at)) else { return };
        let key = (block.rip, block.gpa, block.mode);
        let at_this_host = pc.wrapping_sub(self.buffer.base()) as u32;
        let learned = self.learned.entry(key).or_default();
        match learned.iter_mut().find(|(n, _)| *n == at) {
            Some((_, known)) => *known = None,
            None => learned.push((at, Some(slot))),
        }
        if let Some(b) = self.blocks.partition_point(|b| b.at <= at_this_host).checked_sub(1) {
            self.kill(b as u32);
        }
    }

    /// The register that was made sure of early at this host address is somewhere else.
    pub fn not_early(&mut self, pc: u64, r: Gpr) {
        let Some(block) = self.point(pc).map(|(b, _)| b) else { return };
        let (key, at) = ((block.rip, block.gpa, block.mode), block.at);
        let (learned, entry) = (self.learned.entry(key).or_default(), (EARLY | r as u16, None));
        if !learned.contains(&entry) {
            learned.push(entry);
        }
        self.kill(self.blocks.partition_point(|b| b.at <= at) as u32 - 1);
    }

    /// A division at this host address faulted.
    pub fn divided(&mut self, pc: u64) {
        self.hint(pc, |hints| &mut hints.divides);
    }

    /// The block at this host address is to be made with another expectation.
    fn hint(&mut self, pc: u64, which: fn(&mut Hints) -> &mut bool) {
        self.hint_at(pc.wrapping_sub(self.buffer.base()) as u32, which);
    }

    /// The same by code offset.
    fn hint_at(&mut self, at: u32, which: fn(&mut Hints) -> &mut bool) {
        let Some(b) = self.blocks.partition_point(|b| b.at <= at).checked_sub(1) else { return };
        let block = &self.blocks[b];
        if !block.live {
            return;
        }
        let hints = self.hints.entry((block.rip, block.gpa, block.mode)).or_default();
        if !std::mem::replace(which(hints), true) {
            self.kill(b as u32);
        }
    }
}
