//! Accesses to the usual slots of the mirror, which are the guest's own relative to FS base, and to the lowest, if that is at its own
//! addresses: then they are the guest's own. Which registers are known to be near those slots, from one instruction to the next and from
//! one block to the next.
//!
//! What is near may be in such a slot, or in the empty space beside it ([`crate::system::mirror`]). A register is, if a load made sure, if
//! an access near by did not fault, if it was made from one that is, or if all ways into the block say so ([`Entries::sure`]). Small
//! constants may be added as long as no block passes on what has been moved since it was last accessed: else rounds could add up.

#[cfg(doc)]
use super::Entries;
use super::asm::{Assembler, At};
use super::memory::Host;
use super::mirror::LEAST;
use super::scratch::bit;
use super::{Check, Lower};
use crate::system::area::{CHECKED, USUALLY};
use crate::system::block::{Access, Item, Segment, Way};
use crate::system::mirror::{NEAR, REACH, SLOT_BITS, SLOTS};
use bivisor_emulator::isa::Gpr;
use iced_x86::{Mnemonic, OpKind, Register};

/// See [`Guess::learned`](super::Guess::learned).
pub const EARLY: u16 = 0x8000;
/// Conditional branches behind which registers are not made sure of early.
const EARLY_BRANCHES: usize = 2;

/// How near.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    /// In a usual slot.
    Inside,
    /// Not farther than [`NEAR`].
    Near,
    /// A short index has been added.
    Far,
}

/// A register is near the usual slots or the lowest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sure {
    /// It was when it had been moved so far since its version began.
    anchor: i64,
    place: Where,
    /// Near the lowest slot, not the usual ones.
    low: bool,
}

/// A sum of registers is in such a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sum {
    base: Option<Gpr>,
    index: (Gpr, u8),
    /// How far the sum with the displacement had been moved.
    far: i64,
    low: bool,
}

impl Sum {
    /// Is the register a part of it?
    pub(super) fn of(&self, r: Gpr) -> bool {
        self.base == Some(r) || self.index.0 == r
    }
}

/// As [`Entries::sure`].
fn flag(r: Gpr, low: bool) -> u32 {
    u32::from(bit(r)) << if low { 16 } else { 0 }
}

impl Lower<'_> {
    fn has_usual(&self) -> bool {
        let mode = self.block.mode;
        (self.around.guess.usual != 0 || self.around.guess.low)
            && self.around.share
            && mode.is_mirrored()
            && !mode.is_narrow()
    }

    /// Is a slot the lowest, at its own addresses, or a usual one?
    fn class(&self, slot: u64) -> Option<bool> {
        match slot {
            0 if self.around.guess.low => Some(true),
            _ => (slot < SLOTS as u64 && self.around.guess.usual >> slot & 1 != 0).then_some(false),
        }
    }

    /// The register that decides on the slot of an access, and whether a short index is added to it.
    fn pointer(&self, a: &Access) -> Option<(Gpr, bool)> {
        if a.segment != Segment::Flat || a.narrow || a.bit.is_some() {
            return None;
        }
        match (a.base?, a.index) {
            (base, None) => Some((base, false)),
            (base, Some((index, _))) if base == index => None,
            (base, Some((index, _))) if self.short & bit(index) != 0 => Some((base, true)),
            (base, Some((index, 1))) if self.short & bit(base) != 0 => Some((index, true)),
            _ => None,
        }
    }

    /// Is the register near a slot, so that it may be used with a displacement, or with a short index besides? Then: the lowest?
    fn is_sure(&self, r: Gpr, indexed: bool) -> Option<bool> {
        let near = |s: &Sure| (self.moved[r as usize] - s.anchor).abs() <= REACH && !(indexed && s.place == Where::Far);
        self.sure[r as usize].filter(near).map(|s| s.low)
    }

    /// Registers that the next block may take for near: as [`Entries::sure`].
    pub(super) fn near(&self) -> u32 {
        let passes = |r: Gpr| {
            let moved = self.moved[r as usize];
            let s = self.sure[r as usize]?;
            let near = match s.place {
                Where::Inside => (moved - s.anchor).abs() <= NEAR,
                Where::Near => moved == s.anchor,
                Where::Far => false,
            };
            near.then_some(flag(r, s.low))
        };
        Gpr::ALL.into_iter().filter_map(passes).fold(0, |m, r| m | r)
    }

    /// What has been moved counts from here on.
    pub(super) fn follow_near(&mut self) {
        self.sums.clear();
        for (sure, moved) in self.sure.iter_mut().zip(self.moved) {
            if let Some(s) = sure {
                s.anchor -= moved;
            }
        }
    }

    /// Begins with registers that are near.
    pub(super) fn begin_near(&mut self, near: u32) {
        self.sums.clear();
        for r in Gpr::ALL {
            let low = near & flag(r, true) != 0;
            let sure = Sure { anchor: self.moved[r as usize], place: Where::Near, low };
            self.sure[r as usize] = (near & flag(r, low) != 0).then_some(sure);
        }
    }

    /// Faults unless `address` is in the lowest slot, or in a usual one; destroys `t`.
    fn check_class(&mut self, item: &Item, a: &Access, (address, low): (Gpr, bool), t: Gpr, check: Check) {
        self.check(item, a, (address, if low { CHECKED } else { USUALLY }), t, check);
    }

    /// Is the access expected in the lowest slot, or a usual one?
    fn usually(&self, item: &Item, base: Option<Gpr>) -> Option<bool> {
        self.expected(item, base).and_then(|slot| self.class(slot.into()))
    }

    /// An access that is expected in the lowest or a usual slot.
    pub(super) fn mirrored_usual(&mut self, item: &Item, a: &Access) -> Option<Host> {
        if !self.has_usual() || a.segment != Segment::Flat || a.narrow || a.bit.is_some() {
            return None;
        }
        let disp = i32::try_from(a.disp).ok()?;
        let host = |low: bool| Some(Host { base: a.base, index: a.index, disp, mirrored: true, usual: !low });
        if let Some((r, indexed)) = self.pointer(a) {
            let moved = self.moved[r as usize];
            let low = match self.is_sure(r, indexed) {
                Some(low) => low,
                None => {
                    let low = self.usually(item, Some(r))?;
                    let t = self.passing(item, false)?;
                    self.check_class(item, a, (r, low), t, Check { of: Some(r), early: false });
                    self.busy &= !bit(t);
                    self.sure[r as usize] = Some(Sure { anchor: moved, place: Where::Inside, low });
                    low
                }
            };
            if !indexed {
                // The access does not fault when what follows is executed.
                self.sure[r as usize] = Some(Sure { anchor: moved + a.disp, place: Where::Inside, low });
            }
            return host(low);
        }
        let index = a.index?;
        if a.base.is_none() && self.short & bit(index.0) != 0 && self.around.guess.low {
            // A short index is near the lowest slot itself.
            return host(true);
        }
        let far = self.moved_by(a.base, a.index) + a.disp;
        let known = |s: &&Sum| (s.base, s.index) == (a.base, index) && (s.far - far).abs() <= REACH;
        if let Some(s) = self.sums.iter().find(known) {
            return host(s.low);
        }
        if self.round.is_some() || self.sum_window(item, a, index).is_some() {
            // A register holds the host's address from round to round; to make sure each time takes four instructions.
            return None;
        }
        let low = self.usually(item, a.base)?;
        let t = self.passing(item, false)?;
        self.e.lea(t, At::any(a.base, a.index, disp, false));
        self.check_class(item, a, (t, low), t, Check { of: None, early: false });
        self.busy &= !bit(t);
        self.sums.push(Sum { base: a.base, index, far, low });
        host(low)
    }

    /// What an instruction makes of a register that is near, in another or the same.
    pub(super) fn inherited(&self, item: &Item) -> Option<(Gpr, Sure)> {
        if !self.has_usual() {
            return None;
        }
        // It becomes what the other was when that had been moved by `by` more.
        let moved = |from: Gpr, by: i64, far: bool| {
            let s = self.sure[from as usize].filter(|_| self.is_sure(from, far).is_some())?;
            let anchor = s.anchor - self.moved[from as usize] - by;
            (anchor.abs() <= REACH).then_some(Sure {
                anchor,
                place: if far { Where::Far } else { s.place },
                low: s.low,
            })
        };
        let iced = &item.iced;
        let to = || Gpr::from_iced(iced.op0_register()).filter(|_| iced.op0_register().is_gpr64());
        let register = |n| iced.op_kind(n) == OpKind::Register && iced.op_register(n).is_gpr64();
        let (to, sure) = match (item.way, iced.mnemonic()) {
            (Way::Leave, _) => (Gpr::Rsp, moved(Gpr::Rbp, 8, false)?),
            (Way::Constant(v), _) => {
                (to()?, Sure { anchor: 0, place: Where::Inside, low: self.class(v >> SLOT_BITS)? })
            }
            (Way::Plain, Mnemonic::Mov) if register(0) && register(1) => {
                (to()?, moved(Gpr::from_iced(iced.op1_register())?, 0, false)?)
            }
            (Way::Plain, Mnemonic::Lea) if iced.memory_base().is_gpr64() && item.adds.is_none() => {
                let (base, by) = (Gpr::from_iced(iced.memory_base())?, iced.memory_displacement64() as i64);
                if iced.memory_index() == Register::None {
                    (to()?, moved(base, by, false)?)
                } else {
                    let index = Gpr::from_iced(iced.memory_index())?;
                    let short = |r: Gpr| self.short & bit(r) != 0 && base != index;
                    match () {
                        () if short(index) => (to()?, moved(base, by, true)?),
                        () if short(base) && iced.memory_index_scale() == 1 => (to()?, moved(index, by, true)?),
                        () => return None,
                    }
                }
            }
            (Way::Plain, Mnemonic::Add | Mnemonic::Sub) if register(0) && register(1) => {
                let (to, by) = (to()?, Gpr::from_iced(iced.op1_register())?);
                let short = |r: Gpr| self.short & bit(r) != 0 && to != by;
                match () {
                    () if short(by) => (to, moved(to, 0, true)?),
                    () if short(to) && iced.mnemonic() == Mnemonic::Add => (to, moved(by, 0, true)?),
                    () => return None,
                }
            }
            _ => return None,
        };
        Some((to, sure))
    }

    /// Makes sure of registers at the start of the block, so that those who know them can jump past it: gives that place, and which.
    pub(super) fn early(&mut self) -> Option<(u32, u32)> {
        if !self.has_usual() || self.block.mode.is_counted() {
            return None;
        }
        let block = self.block;
        let guess = &self.around.guess;
        let good = |r: Gpr| {
            let v = guess.gpr[r as usize];
            v >= LEAST && self.class(v >> SLOT_BITS).is_some() && !guess.learned.contains(&(EARLY | r as u16, None))
        };
        let good: u16 = Gpr::ALL.into_iter().filter(|r| good(*r)).fold(0, |m, r| m | bit(r));
        let (mut asked, mut written, mut branches) = (Vec::<(Gpr, Access, bool)>::new(), 0, 0);
        for item in &block.items {
            let access = match item.way {
                Way::Call => Some(self.pushed()),
                _ => item.access,
            };
            if let Some(a) = access
                && let Some((r, _)) = self.pointer(&a)
                && good & !written & bit(r) != 0
                && let Some(low) = self.usually(item, Some(r))
                && self.class(guess.gpr[r as usize] >> SLOT_BITS) == Some(low)
                && asked.iter().all(|(other, ..)| *other != r)
            {
                asked.push((r, a, low));
            }
            for r in Gpr::ALL.into_iter().filter(|r| item.writes & bit(*r) != 0) {
                self.follow_short(item, r);
                if item.adds.is_none_or(|(a, _)| a != r) {
                    written |= bit(r);
                }
            }
            branches += usize::from(item.way == Way::Conditional);
            if branches == EARLY_BRANCHES && self.round.is_none() {
                break;
            }
        }
        self.short = 0;
        let sure = asked.iter().fold(0, |m, (r, _, low)| m | flag(*r, *low));
        if sure == 0 {
            return None;
        }
        let item = &block.items[0];
        self.busy = (sure | sure >> 16) as u16;
        let t = self.scratch(item, false)?;
        for (r, a, low) in &asked {
            self.check_class(item, a, (*r, *low), t, Check { of: Some(*r), early: true });
        }
        self.reload(bit(t));
        self.spilled &= !bit(t);
        self.busy = 0;
        self.begin_near(sure);
        Some((self.e.len() as u32, sure))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Around, Guess, Kind, lower};
    use super::*;
    use crate::route::{Policy, Routes};
    use crate::system::Mode;
    use crate::system::block::{Source, decode};
    use crate::system::mirror::USUAL;
    use bivisor_emulator::cpu::CpuState;
    use bivisor_emulator::cpu::cpuid::CpuModel;
    use bivisor_emulator::mem::Ram;
    use iced_x86::IcedError;
    use iced_x86::code_asm::{CodeAssembler, *};
    use std::sync::Arc;

    /// What the last exit that leads to a block passes on of registers that are in the slot of programs when the block begins.
    fn passed_on(fill: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u32 {
        let mut a = CodeAssembler::new(64).expect("64-bit code");
        fill(&mut a).expect("an instruction");
        let code = a.assemble(0x1000).expect("code");
        let ram = Ram::new(1 << 16).expect("RAM");
        ram.write(0x1000, &code).expect("RAM");
        let routes = Routes::new(Arc::new(CpuModel::host()), Policy::default());
        let mode = Mode::of(&CpuState::long64(3), 1).expect("64-bit mode").mirrored();
        let mut none = || None;
        let mut source = Source { ram: &ram, gpa: 0x1000, next: &mut none, known: &|_| false };
        let (block, _) = decode(&mut source, 0x1000, mode, &routes, 16).expect("a block");
        let pointers = [0x5555_0000_0000; 16];
        let around = Around {
            at: 0x10_0000,
            first_exit: 0,
            first_recipe: 0,
            leave: 0,
            leave_light: 0,
            port: 0,
            wake: 0,
            save: 0,
            restore: 0,
            walk: 0,
            counts: false,
            targets: 0,
            fast: None,
            tlb: 0,
            share: true,
            foresee: true,
            divides: false,
            guess: Guess { gpr: pointers, used: USUAL, usual: USUAL, low: false, learned: Vec::new() },
        };
        let unit = lower(&block, &around);
        unit.exits.iter().rfind(|e| e.kind == Kind::To).expect("a way on").sure
    }

    /// Else a loop of two blocks, one of which moves a register without an access, would carry it to the host's own memory.
    #[test]
    fn what_has_been_moved_since_an_access_goes_no_further_than_one_block() {
        let rbx_bit = 1 << Gpr::Rbx as u32;
        let near = NEAR as i32;
        assert_eq!(passed_on(|a| a.add(rbx, 8).and_then(|()| a.jmp(0x9000))), 0, "nothing is known");
        let after = |moved: i32| {
            passed_on(|a| {
                a.mov(rax, qword_ptr(rbx + 8))?;
                a.add(rbx, moved)?;
                a.jmp(0x9000)
            })
        };
        assert_eq!(after(0), rbx_bit);
        // The access was 8 bytes further on.
        assert_eq!(after(8 + near), rbx_bit);
        assert_eq!(after(8 - near), rbx_bit);
        assert_eq!(after(9 + near), 0);
        assert_eq!(after(7 - near), 0);
        // Made sure of at the start of the block, for the access behind the branch.
        let conditional = |moved: i32| {
            passed_on(|a| {
                a.add(rbx, moved)?;
                a.test(ecx, ecx)?;
                a.jz(0x9000)?;
                a.mov(rax, qword_ptr(rbx))?;
                a.hlt()
            })
        };
        assert_eq!(conditional(0), rbx_bit, "near, and where it was");
        assert_eq!(conditional(1), 0, "who comes in at the start may know it only to be near");
        // An index may be 32 GiB away.
        let indexed = passed_on(|a| {
            a.mov(rax, qword_ptr(rbx))?;
            a.mov(ecx, dword_ptr(rbx))?;
            a.lea(rbx, qword_ptr(rbx + rcx * 8))?;
            a.jmp(0x9000)
        });
        assert_eq!(indexed, 0);
    }
}
