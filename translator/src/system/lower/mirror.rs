//! Memory operands in the mirror: the distance to the host's address comes from a table, or is the expected slot's, of which a load makes
//! sure; nothing is compared, and flags stay.

use super::Check;
use super::Lower;
use super::asm::{Assembler, At, W};
use super::memory::Host;
use super::scratch::{Window, bit};
#[cfg(doc)]
use super::usual::EARLY;
use crate::system::area::{CHECKED, at};
use crate::system::block::{Access, Item, Segment};
use crate::system::mirror::{END, REACH, SLOT_BITS, SLOTS};
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::mem::PAGE_SIZE;
use iced_x86::{Mnemonic, OpKind};

/// The first of the 16 bits of an address that are looked at to make sure of its slot.
const CHECK_BITS: u8 = 32;
/// What may be added to a short value.
const SMALL: i64 = 1 << 20;
/// Smaller values are no addresses.
pub(super) const LEAST: u64 = 0x1_0000;

/// What is known of addresses in the mirror.
#[derive(Clone, Debug, Default)]
pub struct Guess {
    /// The registers at the start of the block when it is made.
    pub gpr: [u64; 16],
    /// Slots in use, as bits.
    pub used: u64,
    /// Slots whose distance is FS base, as bits.
    pub usual: u64,
    /// Is the lowest slot at its own addresses on the host?
    pub low: bool,
    /// By distance of the instruction from the start of the block: the slot it was found in; `None`: several. [`EARLY`] and a register's
    /// number: it is not to be made sure of at the start of the block.
    pub learned: Vec<(u16, Option<u8>)>,
}

impl Lower<'_> {
    /// What was emitted since `from` accesses `a` at `host`.
    pub(super) fn touched(&mut self, item: &Item, from: usize, host: Host, a: &Access) {
        if host.mirrored {
            self.point_at(item, from, Some(*a));
        }
    }

    /// `delta = DELTAS[bits 41 to 48 of address]`
    fn delta(&mut self, delta: Gpr, address: Gpr) {
        self.rorx(delta, address, SLOT_BITS as u8);
        // MOVZX of the low byte; REX makes SIL and the like of it.
        let r = delta as u8;
        self.e.bytes.extend_from_slice(&[0x40 | r >> 3 << 2 | r >> 3, 0x0f, 0xb6, 0xc0 | (r & 7) << 3 | r & 7]);
        self.e.load(delta, At::row(at::DELTAS, delta));
    }

    fn rorx(&mut self, to: Gpr, from: Gpr, by: u8) {
        let (r, m) = (to as u8, from as u8);
        let high = (r >> 3 ^ 1) << 7 | 0x40 | (m >> 3 ^ 1) << 5 | 3;
        self.e.bytes.extend_from_slice(&[0xc4, high, 0xfb, 0xf0, 0xc0 | (r & 7) << 3 | m & 7, by]);
    }

    /// Which slot the address of the instruction's access is expected in.
    pub(super) fn expected(&self, item: &Item, base: Option<Gpr>) -> Option<u8> {
        let guess = &self.around.guess;
        if let Some((_, slot)) = guess.learned.iter().find(|(at, _)| *at == item.at) {
            return *slot;
        }
        let of = |r: Gpr| {
            let (v, slot) = (guess.gpr[r as usize], guess.gpr[r as usize] >> SLOT_BITS);
            (slot < SLOTS as u64 && guess.used >> slot & 1 != 0 && v >= LEAST).then_some(slot as u8)
        };
        // What it held when the block was met, or what others did.
        let others = || Gpr::ALL.into_iter().filter(|r| *r != Gpr::Rsp).find_map(of);
        base.and_then(of).or_else(others)
    }

    /// A register with the distance of a slot.
    pub(super) fn distance_of(&mut self, item: &Item, slot: u8) -> Option<Gpr> {
        let found = self.windows.iter().find(|w| w.slot == Some(slot) && !(item.high && w.delta as u8 >= 8));
        if let Some(w) = found {
            self.busy |= bit(w.delta);
            return Some(w.delta);
        }
        let delta = self.scratch(item, item.high)?;
        self.e.load(delta, At::slot(at::DELTAS + 8 * usize::from(slot)));
        self.windows.push(Window { slot: Some(slot), ..Window::over(None, 0, delta) });
        Some(delta)
    }

    /// Makes sure that `address` is in a slot: faults if not. `of`: it is this register of the guest, not the access's address.
    fn make_sure(&mut self, item: &Item, a: &Access, address: Gpr, slot: u8, of: Option<Gpr>) -> Option<()> {
        let t = self.passing(item, false)?;
        let page = CHECKED - PAGE_SIZE as usize * usize::from(slot);
        self.check(item, a, (address, page), t, Check { of, early: false });
        self.busy &= !bit(t);
        Some(())
    }

    /// Faults unless the page behind the area that bits 32 to 47 of `address` lead to, from `page` on, is readable; destroys `t`.
    pub(super) fn check(&mut self, item: &Item, a: &Access, (address, page): (Gpr, usize), t: Gpr, check: Check) {
        self.rorx(t, address, CHECK_BITS);
        // MOVZX of the low 16 bits.
        self.e.rr(W::D, &[0x0f, 0xb7], t as u8, t, &[]);
        let from = self.e.len();
        self.e.rm(W::D, &[0x8b], t as u8, At::row(page, t), &[]);
        self.point_at(item, from, Some(*a));
        if let Some(p) = self.points.last_mut() {
            p.checks = Some(check);
        }
    }

    pub(super) fn place_mirrored(&mut self, item: &Item, a: &Access) -> Option<Host> {
        if self.block.mode.is_narrow() {
            return self.mirrored_narrow(item, a);
        }
        if let Some(host) = self.mirrored_usual(item, a) {
            return Some(host);
        }
        if let Some(address) = a.constant() {
            return self.mirrored_constant(item, address);
        }
        match a.based() {
            Some(base) if self.around.share => self.mirrored_based(item, a, base),
            _ => self.mirrored_any(item, a),
        }
    }

    fn mirrored_based(&mut self, item: &Item, a: &Access, base: Gpr) -> Option<Host> {
        let (moved, version) = (self.moved[base as usize], self.version[base as usize]);
        let disp = i32::try_from(a.disp).ok()?;
        let found = self.windows.iter().find(|w| {
            w.mirrored
                && w.index.is_none()
                && !w.added
                && (w.base, w.version) == (Some(base), version)
                && (w.low..=w.high).contains(&moved)
                && !(item.high && w.delta as u8 >= 8)
        });
        let delta = match found {
            Some(w) => w.delta,
            None => {
                let slot = self.expected(item, Some(base));
                // Nobody waits for the stack pointer.
                let there = |slot: u8| base != Gpr::Rsp || self.windows.iter().any(|w| w.slot == Some(slot));
                let delta = match slot.filter(|slot| there(*slot)) {
                    Some(slot) => {
                        let delta = self.distance_of(item, slot)?;
                        self.make_sure(item, a, base, slot, Some(base))?;
                        delta
                    }
                    None => {
                        let delta = self.scratch(item, item.high)?;
                        self.delta(delta, base);
                        delta
                    }
                };
                let (low, high) = (moved - REACH, moved + REACH);
                self.windows.push(Window { low, high, ..Window::over(Some(base), version, delta) });
                delta
            }
        };
        self.busy |= bit(delta);
        Some(Host { base: Some(base), index: Some((delta, 1)), disp, mirrored: true, usual: false })
    }

    fn mirrored_constant(&mut self, item: &Item, address: u64) -> Option<Host> {
        if address >= END {
            return None;
        }
        // A register for the distance does for the lowest 2 GiB, else one for the host's address near by.
        if let Ok(disp) = i32::try_from(address) {
            if self.around.guess.low {
                return Some(Host { base: None, index: None, disp, mirrored: true, usual: false });
            }
            let delta = self.distance_of(item, 0)?;
            return Some(Host { base: Some(delta), index: None, disp, mirrored: true, usual: false });
        }
        let usual = self.around.guess.usual >> (address >> SLOT_BITS) & 1 != 0;
        let found = self.windows.iter().find(|w| {
            w.mirrored
                && w.base.is_none()
                && w.index.is_none()
                && w.slot.is_none()
                && (w.low - REACH..w.low + 2 * REACH).contains(&(address as i64))
                && w.low >> SLOT_BITS == (address >> SLOT_BITS) as i64
                && !(item.high && w.delta as u8 >= 8)
        });
        let (delta, low) = match found {
            Some(w) => (w.delta, w.low),
            None => {
                let delta = self.scratch(item, item.high)?;
                if !usual {
                    let row = at::DELTAS + 8 * (address >> SLOT_BITS) as usize;
                    self.e.load(delta, At::slot(row));
                    let t = self.passing(item, false)?;
                    self.e.constant(t, address);
                    self.e.lea(delta, At::sum(t, delta, 0));
                    self.busy &= !bit(t);
                } else {
                    self.e.constant(delta, address);
                }
                let low = address as i64;
                self.windows.push(Window { low, ..Window::over(None, 0, delta) });
                (delta, low)
            }
        };
        self.busy |= bit(delta);
        let disp = i32::try_from(address as i64 - low).ok()?;
        Some(Host { base: Some(delta), index: None, disp, mirrored: true, usual })
    }

    /// How far the registers of an access have been moved by constants.
    pub(super) fn moved_by(&self, base: Option<Gpr>, index: Option<(Gpr, u8)>) -> i64 {
        let moved = |r: Gpr| self.moved[r as usize];
        base.map_or(0, moved) + index.map_or(0, |(r, scale)| moved(r) * i64::from(scale))
    }

    /// Of a register that an instruction has changed: is what it holds now short?
    pub(super) fn follow_short(&mut self, item: &Item, r: Gpr) {
        use Mnemonic as M;
        if let Some((a, n)) = item.adds
            && a == r
            && n.abs() <= SMALL
        {
            return;
        }
        let iced = &item.iced;
        let to = iced.op0_register();
        let short = match iced.mnemonic() {
            M::Cdqe => r == Gpr::Rax,
            M::Movsxd | M::Movsx | M::Movzx => to.is_gpr64() || to.is_gpr32(),
            M::Mov | M::Lea | M::Add | M::Sub | M::And | M::Or | M::Xor | M::Inc | M::Dec | M::Neg | M::Not => {
                to.is_gpr32()
            }
            M::Imul => iced.op_count() > 1 && to.is_gpr32(),
            M::Shl | M::Shr | M::Sar => {
                to.is_gpr32() && iced.op1_kind() == OpKind::Immediate8 && iced.immediate8() & 31 != 0
            }
            _ => false,
        };
        let whole = iced.mnemonic() == M::Cdqe || iced.op0_kind() == OpKind::Register && Gpr::from_iced(to) == Some(r);
        self.short = if short && whole { self.short | bit(r) } else { self.short & !bit(r) };
    }

    /// An access with a short index: the base decides on the slot, and its host address serves all of them.
    fn mirrored_short(&mut self, item: &Item, a: &Access) -> Option<Host> {
        let simple = self.around.share && a.segment == Segment::Flat && !a.narrow && a.bit.is_none();
        let (base, index, scale) = match (a.base, a.index.filter(|_| simple)?) {
            (Some(base), (index, scale)) if self.short & bit(index) != 0 => (base, index, scale),
            (Some(base), (index, 1)) if self.short & bit(base) != 0 && index != Gpr::Rsp => (index, base, 1),
            _ => return None,
        };
        if base == index || index == Gpr::Rsp {
            return None;
        }
        let (moved, version) = (self.moved[base as usize], self.version[base as usize]);
        let found = self.windows.iter().find(|w| {
            w.added
                && (w.base, w.version) == (Some(base), version)
                && (moved - w.low).abs() < REACH
                && !(item.high && w.delta as u8 >= 8)
        });
        let (at, then) = match found {
            Some(w) => (w.delta, w.high),
            None => {
                let delta = match self.expected(item, Some(base)) {
                    Some(slot) => {
                        let delta = self.distance_of(item, slot)?;
                        self.make_sure(item, a, base, slot, Some(base))?;
                        delta
                    }
                    None => {
                        let delta = self.passing(item, item.high)?;
                        self.delta(delta, base);
                        delta
                    }
                };
                let at = self.scratch(item, item.high)?;
                self.e.lea(at, At::sum(base, delta, 0));
                let window = Window::over(Some(base), version, at);
                self.windows.push(Window { low: moved, high: moved, added: true, ..window });
                (at, moved)
            }
        };
        self.busy |= bit(at);
        let disp = i32::try_from(a.disp + moved - then).ok()?;
        Some(Host { base: Some(at), index: Some((index, scale)), disp, mirrored: true, usual: false })
    }

    /// What is known of an access with an index.
    pub(super) fn sum_window(&self, item: &Item, a: &Access, index: (Gpr, u8)) -> Option<&Window> {
        let version = |r: Option<Gpr>| r.map_or(0, |r| self.version[r as usize]);
        let versions = (version(a.base), version(Some(index.0)));
        let far = self.moved_by(a.base, a.index) + a.disp;
        self.windows.iter().find(|w| {
            w.mirrored
                && (w.base, w.index) == (a.base, Some(index))
                && (w.version, w.index_version) == versions
                && (far - w.low).abs() < REACH
                && !(item.high && w.delta as u8 >= 8)
        })
    }

    /// The distance of an access with an index, its base added, is kept where another follows, in the block or in the next round.
    fn mirrored_sum(&mut self, item: &Item, a: &Access) -> Option<Host> {
        let simple = self.around.share && a.segment == Segment::Flat && !a.narrow && a.bit.is_none();
        let index = a.index.filter(|_| simple)?;
        let version = |r: Option<Gpr>| r.map_or(0, |r| self.version[r as usize]);
        let (version, index_version) = (version(a.base), version(Some(index.0)));
        let far = self.moved_by(a.base, a.index) + a.disp;
        let base_moved = self.moved_by(a.base, None);
        let found = self.sum_window(item, a, index);
        let (at, moved) = match found {
            Some(w) => (w.delta, w.high),
            None => {
                let again = |i: &Item| {
                    i.access
                        .is_some_and(|b| (b.base, b.index, b.segment, b.narrow) == (a.base, a.index, a.segment, false))
                };
                if self.round.is_none() && !self.block.items[self.n + 1..].iter().any(again) {
                    return None;
                }
                let disp = i32::try_from(a.disp).ok()?;
                let at = self.scratch(item, item.high)?;
                self.e.lea(at, At::any(a.base, a.index, disp, false));
                let t = match self.expected(item, a.base) {
                    Some(slot) => {
                        let t = self.distance_of(item, slot)?;
                        self.make_sure(item, a, at, slot, None)?;
                        t
                    }
                    None => {
                        let t = self.passing(item, false)?;
                        self.delta(t, at);
                        self.busy &= !bit(t);
                        t
                    }
                };
                match a.base {
                    Some(base) => self.e.lea(at, At::sum(base, t, 0)),
                    None => self.e.copy(at, t),
                }
                let window = Window::over(a.base, version, at);
                self.windows.push(Window { index: a.index, index_version, low: far, high: base_moved, ..window });
                (at, base_moved)
            }
        };
        self.busy |= bit(at);
        let disp = i32::try_from(a.disp + base_moved - moved).ok()?;
        Some(Host { base: Some(at), index: a.index, disp, mirrored: true, usual: false })
    }

    fn mirrored_any(&mut self, item: &Item, a: &Access) -> Option<Host> {
        if let Some(host) = self.mirrored_short(item, a).or_else(|| self.mirrored_sum(item, a)) {
            return Some(host);
        }
        let disp = i32::try_from(a.disp).ok().or((a.narrow).then_some(a.disp as i32))?;
        let simple = a.segment == Segment::Flat && a.bit.is_none() && !a.narrow;
        if simple
            && a.index.is_some()
            && let Some(slot) = self.expected(item, a.base)
        {
            let delta = self.distance_of(item, slot)?;
            let address = self.passing(item, item.high)?;
            self.e.lea(address, At::any(a.base, a.index, disp, false));
            self.make_sure(item, a, address, slot, None)?;
            return Some(Host { base: Some(address), index: Some((delta, 1)), disp: 0, mirrored: true, usual: false });
        }
        let address = self.passing(item, item.high)?;
        let delta = self.passing(item, item.high)?;
        if a.base.is_none() && a.index.is_none() {
            self.e.constant(address, a.disp as u64);
        } else {
            self.e.lea(address, At::any(a.base, a.index, disp, a.narrow));
        }
        if let Some(r) = a.bit {
            self.give_up_flags(item);
            self.beyond(a, address, r, delta);
        }
        let segment = match a.segment {
            Segment::Flat => None,
            Segment::Fs => Some(at::FS_BASE),
            Segment::Gs => Some(at::GS_BASE),
            Segment::Fs32 | Segment::Gs32 => return None,
        };
        if let Some(slot) = segment {
            self.e.load(delta, At::slot(slot));
            self.e.lea(address, At::sum(address, delta, 0));
        }
        self.delta(delta, address);
        Some(Host { base: Some(address), index: Some((delta, 1)), disp: 0, mirrored: true, usual: false })
    }
}

const _: () = assert!(END >> SLOT_BITS == SLOTS as u64);
// Eight bytes for each value of the bits below those of the slot make a page.
const _: () = assert!(8 << (SLOT_BITS as usize - CHECK_BITS as usize) == PAGE_SIZE as usize);
const _: () = assert!(1 << (16 + CHECK_BITS as usize - SLOT_BITS as usize) <= 2 * SLOTS);
