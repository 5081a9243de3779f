//! From a host PC inside translated code back to the guest's state: which RIP, and which registers lie in slots.
//!
//! Every rewritten sequence can be undone to the start of its instruction until it has had an effect, and done to its end afterwards,
//! from the slots alone. So any signal finds a guest state at an instruction boundary, wherever it comes.

use crate::block::MAX_INSNS;
use crate::emit::slot;
use crate::lower::{Depends, Relocation, adds_up, exit_said};
use bivisor_emulator::isa::{Gpr, MAX_INSN_LEN};

/// How the guest's state is found at a host PC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Instructions copied byte for byte from this distance from the block's start: each host PC is a guest RIP.
    Copied(u16),
    /// All registers are the guest's; the instruction at this distance has not begun.
    At(u16),
    /// As [`What::At`], but this register's value is in [`slot::TMP`].
    Undo(u16, Gpr),
    /// As [`What::At`]; a fault here says that the target of the branch is no code that can be read.
    Probe(u16),
    /// The same, and RSP is behind the eight bytes of the target.
    ProbePopped(u16),
    /// The same, and RCX is in R10, if that is one of [`homed`], else in [`slot::TMP`].
    Returning(u16),
    /// As [`What::At`], and RCX is where [`What::Returning`] has it.
    Guessing(u16),
    /// The instruction that ends at this distance, SYSCALL, is done; what it says of RCX is still to be done.
    Called(u16),
    /// RCX is in [`slot::TMP`], the block has not begun; a fault here says that its code cannot be read.
    Compare,
    /// RIP is in [`slot::TARGET`].
    Target,
    /// As [`What::Target`], and the guest's RCX is in R11.
    Comparing,
    /// All registers are the guest's; the exit of this number is about to be taken.
    Exit(u32),
    /// As [`What::Exit`], [`slot::PENDING`] says which (see [`exit_said`]).
    Exiting,
}

/// Where the guest's R11 is, and with it R10 where branches need two registers ([`homed`]). Putting them away and fetching them again at
/// each indirect branch would make every branch wait for the one before. So they stay away until an instruction wants one of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Home {
    /// In [`slot::R11`]; the host's R11 means nothing.
    #[default]
    Slot,
    /// In the host's R11.
    Register,
}

/// The registers that have a [`Home`], and their slots: those that indirect branches use.
pub fn homed() -> &'static [(Gpr, usize)] {
    const BOTH: [(Gpr, usize); 2] = [(Gpr::R11, slot::R11), (Gpr::R10, slot::R10)];
    if adds_up() { &BOTH } else { &BOTH[..1] }
}

/// Fetches them from their slots.
pub fn fetch_homed(regs: &mut dyn Registers) {
    for &(r, slot) in homed() {
        regs.set_gpr(r, regs.slot(slot));
    }
}

/// Holds from its offset to the next mark's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Offset from the start of the piece of code.
    pub at: u16,
    /// What holds.
    pub what: What,
    /// Where R11 is, and R10 if it is one of [`homed`].
    pub home: Home,
}

/// A mark as it is kept, in 32 bits: where, a number, the kind, where R11 is. Exits are counted from the first of their piece of code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed(u32);

/// Bits of the number, which is an exit's or a distance in the guest's code of one block.
const NUMBER: u32 = 10;
/// R11 is in the host's register.
const REGISTER: u32 = 1 << 31;
/// The first kind of [`What::Undo`]; there is one for each register.
const UNDO: u32 = 16;
const _: () = assert!(MAX_INSNS * MAX_INSN_LEN < 1 << NUMBER);

impl What {
    /// A kind, which has five bits, and a number.
    fn pack(self) -> (u32, u32) {
        match self {
            What::Copied(d) => (0, d.into()),
            What::At(d) => (1, d.into()),
            What::Probe(d) => (2, d.into()),
            What::ProbePopped(d) => (9, d.into()),
            What::Returning(d) => (10, d.into()),
            What::Guessing(d) => (11, d.into()),
            What::Called(d) => (3, d.into()),
            What::Compare => (4, 0),
            What::Target => (5, 0),
            What::Comparing => (6, 0),
            What::Exit(n) => (7, n),
            What::Exiting => (8, 0),
            What::Undo(d, r) => (UNDO + r as u32, d.into()),
        }
    }

    /// What they say, if anything.
    fn unpack(kind: u32, number: u32) -> Option<What> {
        let d = number as u16;
        Some(match kind {
            0 => What::Copied(d),
            1 => What::At(d),
            2 => What::Probe(d),
            9 => What::ProbePopped(d),
            10 => What::Returning(d),
            11 => What::Guessing(d),
            3 => What::Called(d),
            4 => What::Compare,
            5 => What::Target,
            6 => What::Comparing,
            7 => What::Exit(number),
            8 => What::Exiting,
            _ => What::Undo(d, *Gpr::ALL.get(kind.checked_sub(UNDO)? as usize)?),
        })
    }
}

impl Mark {
    /// In a piece of code whose first exit has this number.
    pub fn pack(self, first_exit: u32) -> Packed {
        let what = match self.what {
            What::Exit(id) => What::Exit(id - first_exit),
            what => what,
        };
        let (kind, number) = what.pack();
        assert!(number < 1 << NUMBER, "more exits than a block can have");
        let home = if self.home == Home::Register { REGISTER } else { 0 };
        Packed(u32::from(self.at) | number << 16 | kind << (16 + NUMBER) | home)
    }
}

impl Packed {
    /// A relocation, which lies among the marks of a store.
    pub fn relocation(r: Relocation) -> Packed {
        Packed(u32::from(r.at) | u32::from(r.depends.pack()) << 16)
    }

    /// The relocation that it is.
    pub fn as_relocation(self) -> Relocation {
        Relocation { at: self.0 as u16, depends: Depends::unpack((self.0 >> 16) as u16) }
    }

    /// Bytes of one in a file.
    pub const SIZE: usize = 4;

    /// As bytes.
    pub fn bytes(self) -> [u8; Packed::SIZE] {
        self.0.to_le_bytes()
    }

    /// From bytes; [`Packed::is_of_block`] says whether they are one.
    pub fn read(bytes: [u8; Packed::SIZE]) -> Packed {
        Packed(u32::from_le_bytes(bytes))
    }

    /// Is it a mark, and one of a block with so many exits? The rest is of trampolines, or of code that compares.
    pub fn is_of_block(self, exits: u16) -> bool {
        match self.what() {
            Some(What::Exit(n)) => n < u32::from(exits),
            Some(what) => !matches!(what, What::Exiting | What::Compare),
            None => false,
        }
    }

    fn at(self) -> u16 {
        self.0 as u16
    }

    fn what(self) -> Option<What> {
        What::unpack((self.0 & !REGISTER) >> (16 + NUMBER), self.0 >> 16 & ((1 << NUMBER) - 1))
    }

    /// In a piece of code whose first exit has this number.
    pub fn unpack(self, first_exit: u32) -> Mark {
        let what = match self.what().expect("it was packed") {
            What::Exit(n) => What::Exit(n + first_exit),
            what => what,
        };
        Mark { at: self.at(), what, home: if self.0 & REGISTER == 0 { Home::Slot } else { Home::Register } }
    }
}

/// The last mark not behind `at`.
fn mark_at(marks: &[Packed], at: usize) -> Option<Packed> {
    let i = marks.partition_point(|m| usize::from(m.at()) <= at);
    marks.get(i.checked_sub(1)?).copied()
}

/// The registers a captured state is mended with.
pub trait Registers {
    /// A general-purpose register.
    fn gpr(&self, r: Gpr) -> u64;
    /// Sets one.
    fn set_gpr(&mut self, r: Gpr, v: u64);
    /// A slot of the thread block.
    fn slot(&self, i: usize) -> u64;
    /// Told if the thread has just come back from a system call, with RIP after it.
    fn called(&mut self, _next_rip: u64) {}
}

/// Does the instruction `at` bytes into a piece of code only look at guest code, or whether the target of a branch can be read?
pub fn probes(marks: &[Packed], at: usize) -> bool {
    let probes = |what| matches!(what, What::Probe(_) | What::ProbePopped(_) | What::Compare);
    mark_at(marks, at).is_some_and(|m| probes(m.unpack(0).what))
}

/// Mends the registers of a thread stopped `at` bytes into a piece of code with this first exit, of which `guest` gives the addresses;
/// gives RIP. `exits` gives the RIP of an exit and where R11 is then.
pub fn recover(
    marks: &[Packed],
    (guest, first_exit): (&dyn Fn(u64) -> u64, u32),
    at: usize,
    regs: &mut dyn Registers,
    exits: &dyn Fn(u32) -> (u64, Home),
) -> u64 {
    let Some(mark) = mark_at(marks, at).map(|m| m.unpack(first_exit)) else { return guest(0) };
    let (r10, r11) = (regs.gpr(Gpr::R10), regs.gpr(Gpr::R11));
    let exit = match mark.what {
        What::Exit(id) => Some(id),
        What::Exiting => Some(exit_said(regs.slot(slot::PENDING))),
        _ => None,
    }
    .map(exits);
    if exit.map_or(mark.home, |(_, home)| home) == Home::Slot {
        fetch_homed(regs);
    }
    if let What::Returning(_) | What::Guessing(_) = mark.what {
        let is_r10 = homed().iter().any(|&(r, _)| r == Gpr::R10);
        regs.set_gpr(Gpr::Rcx, if is_r10 { r10 } else { regs.slot(slot::TMP) });
    }
    match mark.what {
        What::Copied(from) => guest(u64::from(from) + (at - usize::from(mark.at)) as u64),
        What::At(d) | What::Guessing(d) => guest(d.into()),
        What::ProbePopped(d) | What::Returning(d) => {
            regs.set_gpr(Gpr::Rsp, regs.gpr(Gpr::Rsp).wrapping_sub(8));
            guest(d.into())
        }
        What::Undo(d, r) => {
            regs.set_gpr(r, regs.slot(slot::TMP));
            guest(d.into())
        }
        What::Called(d) => {
            let next = guest(d.into());
            regs.set_gpr(Gpr::Rcx, next);
            regs.called(next);
            next
        }
        What::Compare => {
            regs.set_gpr(Gpr::Rcx, regs.slot(slot::TMP));
            guest(0)
        }
        What::Probe(d) => guest(d.into()),
        What::Target => regs.slot(slot::TARGET),
        What::Comparing => {
            regs.set_gpr(Gpr::Rcx, r11);
            regs.slot(slot::TARGET)
        }
        What::Exit(_) | What::Exiting => exit.map_or(guest(0), |(rip, _)| rip),
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
        let mark = |at, what, home| Mark { at, what, home };
        let marks = [
            mark(0, What::At(0), Home::Register),
            mark(4, What::Copied(7), Home::Register),
            mark(20, What::Undo(9, Gpr::Rdi), Home::Register),
            mark(30, What::Comparing, Home::Slot),
            mark(40, What::Exit(5), Home::Register),
            mark(50, What::ProbePopped(8), Home::Slot),
            mark(60, What::Returning(5), Home::Slot),
            mark(70, What::Guessing(6), Home::Slot),
        ]
        .map(|m| m.pack(3));
        let guest = |d| 0x400000 + d;
        let mut f = Fake([0; 16]);
        let exits = |id| (0x5000 + u64::from(id), Home::Register);
        let mut at = |n| recover(&marks, (&guest, 3), n, &mut f, &exits);
        assert_eq!(at(3), 0x400000);
        assert_eq!(at(4), 0x400007);
        assert_eq!(at(10), 0x40000d);
        assert_eq!(at(21), 0x400009);
        assert_eq!(at(41), 0x5005);
        assert_eq!(f.0[Gpr::Rdi as usize], 1000 + slot::TMP as u64);
        assert_eq!((f.0[Gpr::R11 as usize], f.0[Gpr::R10 as usize]), (0, 0));
        f.0[Gpr::R11 as usize] = 0x123;
        assert_eq!(recover(&marks, (&guest, 3), 30, &mut f, &exits), 1000 + slot::TARGET as u64);
        assert_eq!(f.0[Gpr::Rcx as usize], 0x123);
        assert_eq!(f.0[Gpr::R11 as usize], 1000 + slot::R11 as u64);
        assert_eq!(f.0[Gpr::R10 as usize], if adds_up() { 1000 + slot::R10 as u64 } else { 0 });
        f.0[Gpr::Rsp as usize] = 4;
        assert_eq!(recover(&marks, (&guest, 3), 50, &mut f, &exits), 0x400008);
        assert_eq!(f.0[Gpr::Rcx as usize], 0x123);
        assert_eq!(f.0[Gpr::Rsp as usize], 4u64.wrapping_sub(8));
        assert!(probes(&marks, 50) && !probes(&marks, 49));
        for (at, rip, rsp) in [(60, 0x400005, 32), (70, 0x400006, 40)] {
            for (r, v) in [(Gpr::Rcx, 1), (Gpr::Rsp, 40), (Gpr::R10, 0x77)] {
                f.0[r as usize] = v;
            }
            assert_eq!(recover(&marks, (&guest, 3), at, &mut f, &exits), rip);
            assert_eq!(f.0[Gpr::Rcx as usize], if adds_up() { 0x77 } else { 1000 + slot::TMP as u64 });
            assert_eq!(f.0[Gpr::Rsp as usize], rsp);
        }
    }

    #[test]
    fn what_is_packed_comes_back() {
        let mut all: Vec<What> = Gpr::ALL.iter().map(|&r| What::Undo(960, r)).collect();
        all.extend([What::Copied(0), What::At(960), What::Probe(7), What::Called(2), What::Compare, What::Target]);
        all.extend([
            What::Comparing,
            What::Exit(100 + 1023),
            What::Exiting,
            What::ProbePopped(960),
            What::Returning(960),
            What::Guessing(9),
        ]);
        for what in all {
            for home in [Home::Slot, Home::Register] {
                let mark = Mark { at: u16::MAX, what, home };
                let packed = mark.pack(100);
                assert_eq!((packed.unpack(100), Packed::read(packed.bytes())), (mark, packed));
            }
        }
        for kind in 12..16u32 {
            assert!(!Packed::read((kind << 26).to_le_bytes()).is_of_block(9), "no such kind");
        }
    }
}
