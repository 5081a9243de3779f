//! From a host PC inside translated code back to the guest's state: which RIP, and which registers lie in slots.
//!
//! Every rewritten sequence can be undone to the start of its instruction until it has had an effect, and done to its end afterwards,
//! from the slots alone. So any signal finds a guest state at an instruction boundary, wherever it comes.

use crate::emit::slot;
use bivisor_emulator::isa::Gpr;

/// How the guest's state is found at a host PC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Instructions copied byte for byte from this distance from the block's start: each host PC is a guest RIP.
    Copied(u16),
    /// All registers are the guest's; the instruction at this distance has not begun.
    At(u16),
    /// As [`What::At`], but this register's value is in a slot.
    Undo(u16, Saved),
    /// As [`What::At`], but RCX, which holds the target of the branch, is in its slot; a fault here says that the target is no code that
    /// can be read.
    Probe(u16),
    /// As [`What::At`], but RCX and R11 are in their slots.
    UndoBoth(u16),
    /// As [`What::UndoBoth`] at the start of the block; a fault here says that the code cannot be read.
    Compare,
    /// RIP is in RCX; the guest's RCX and R11 are in their slots.
    Target,
    /// As [`What::Target`], but RCX holds RIP minus the block's start.
    TargetDifference,
    /// RIP is in [`slot::TARGET`]; the guest's RCX and R11 are in their slots or restored.
    Missed,
    /// All registers are the guest's; the exit of this number is about to be taken.
    Exit(u32),
    /// As [`What::Exit`], its number is in [`slot::PENDING`].
    Exiting,
}

/// Which register was saved to which slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saved {
    /// RCX in [`slot::RCX`].
    Rcx,
    /// R11 in [`slot::R11`].
    R11,
    /// Any in [`slot::TMP`].
    Tmp(Gpr),
}

impl Saved {
    /// The register and its slot.
    pub fn place(self) -> (Gpr, usize) {
        match self {
            Saved::Rcx => (Gpr::Rcx, slot::RCX),
            Saved::R11 => (Gpr::R11, slot::R11),
            Saved::Tmp(r) => (r, slot::TMP),
        }
    }
}

/// Holds from its offset to the next mark's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Offset from the start of the piece of code.
    pub at: u16,
    /// What holds.
    pub what: What,
}

/// The registers a captured state is mended with.
pub trait Registers {
    /// A general-purpose register.
    fn gpr(&self, r: Gpr) -> u64;
    /// Sets one.
    fn set_gpr(&mut self, r: Gpr, v: u64);
    /// A slot of the thread block.
    fn slot(&self, i: usize) -> u64;
}

/// Does the instruction `at` bytes into a piece of code only look at guest code, or whether the target of a branch can be read?
pub fn probes(marks: &[Mark], at: usize) -> bool {
    let i = marks.partition_point(|m| usize::from(m.at) <= at);
    i.checked_sub(1).is_some_and(|i| matches!(marks[i].what, What::Probe(_) | What::Compare))
}

/// Mends the registers of a thread stopped `at` bytes into a piece of code translated from `start`; gives RIP.
/// `exits` gives the RIP of an exit.
pub fn recover(marks: &[Mark], start: u64, at: usize, regs: &mut dyn Registers, exits: &dyn Fn(u32) -> u64) -> u64 {
    let i = marks.partition_point(|m| usize::from(m.at) <= at);
    let Some(mark) = i.checked_sub(1).and_then(|i| marks.get(i)) else { return start };
    let both = |regs: &mut dyn Registers| {
        for s in [Saved::Rcx, Saved::R11] {
            let (r, slot) = s.place();
            regs.set_gpr(r, regs.slot(slot));
        }
    };
    match mark.what {
        What::Copied(from) => start.wrapping_add(u64::from(from)).wrapping_add((at - usize::from(mark.at)) as u64),
        What::At(d) => start.wrapping_add(u64::from(d)),
        What::Undo(d, saved) => {
            let (r, slot) = saved.place();
            regs.set_gpr(r, regs.slot(slot));
            start.wrapping_add(u64::from(d))
        }
        What::Probe(d) => {
            regs.set_gpr(Gpr::Rcx, regs.slot(slot::RCX));
            start.wrapping_add(u64::from(d))
        }
        What::UndoBoth(d) => {
            both(regs);
            start.wrapping_add(u64::from(d))
        }
        What::Compare => {
            both(regs);
            start
        }
        What::Target => {
            let rip = regs.gpr(Gpr::Rcx);
            both(regs);
            rip
        }
        What::TargetDifference => {
            let rip = regs.gpr(Gpr::Rcx).wrapping_add(start);
            both(regs);
            rip
        }
        What::Missed => {
            both(regs);
            regs.slot(slot::TARGET)
        }
        What::Exit(id) => exits(id),
        What::Exiting => exits(regs.slot(slot::PENDING) as u32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake([u64; 16]);
    impl Registers for Fake {
        fn gpr(&self, r: Gpr) -> u64 {
            self.0[r as usize]
        }
        fn set_gpr(&mut self, r: Gpr, v: u64) {
            self.0[r as usize] = v;
        }
        fn slot(&self, i: usize) -> u64 {
            1000 + i as u64
        }
    }

    #[test]
    fn every_mark_gives_its_state() {
        let marks = [
            Mark { at: 0, what: What::At(0) },
            Mark { at: 4, what: What::Copied(7) },
            Mark { at: 20, what: What::Undo(9, Saved::Tmp(Gpr::Rdi)) },
            Mark { at: 30, what: What::TargetDifference },
            Mark { at: 40, what: What::Exit(5) },
        ];
        let mut f = Fake([0; 16]);
        let exits = |id| 0x5000 + u64::from(id);
        let mut at = |n| recover(&marks, 0x400000, n, &mut f, &exits);
        assert_eq!(at(3), 0x400000);
        assert_eq!(at(4), 0x400007);
        assert_eq!(at(10), 0x40000d);
        assert_eq!(at(21), 0x400009);
        assert_eq!(at(41), 0x5005);
        assert_eq!(f.0[Gpr::Rdi as usize], 1000 + slot::TMP as u64);
        f.0[Gpr::Rcx as usize] = 0x123;
        assert_eq!(recover(&marks, 0x400000, 30, &mut f, &exits), 0x400123);
        assert_eq!(f.0[Gpr::Rcx as usize], 1000 + slot::RCX as u64);
        assert_eq!(f.0[Gpr::R11 as usize], 1000 + slot::R11 as u64);
    }
}
