//! Memory operands: each is looked up in the inline TLB, or lies in a range that was looked up before in the block.
//!
//! The index is made from the lowest byte of the range and the tag is compared with the page of its highest, so a range in two pages
//! is a miss.

use super::asm::{Assembler, At, W};
use super::narrow::notes_data;
use super::scratch::{Window, bit};
use super::{Cold, Flags, Kind, Lower, Walk};
use crate::system::area::at;
use crate::system::block::{Access, Item, Segment, Way, is_bit_string};
use crate::system::tlb;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::mem::PAGE_SIZE;
use iced_x86::{Encoder, Instruction, Register};

/// A page number moved to the offset of its entry.
const SHIFT: u8 = 12 - tlb::ENTRY.trailing_zeros() as u8;
/// Mask of that offset.
const MASK: i32 = ((tlb::ENTRIES - 1) * tlb::ENTRY) as i32;
pub(super) const JNE: [u8; 2] = [0x0f, 0x85];

/// Bytes that one check may cover.
fn reach(base: Gpr) -> i64 {
    match base {
        Gpr::Rsp => 256,
        Gpr::Rbp => 128,
        _ => 64,
    }
}

/// A host operand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Host {
    pub base: Option<Gpr>,
    pub index: Option<(Gpr, u8)>,
    pub disp: i32,
    /// In the mirror: the access may fault, and the caller tells where it is ([`Lower::touched`]).
    pub mirrored: bool,
    /// Relative to FS base.
    pub usual: bool,
}

impl Host {
    pub(super) fn at(self) -> At {
        let at = At::any(self.base, self.index, self.disp, false);
        if self.usual { at.fs() } else { at }
    }
}

impl Lower<'_> {
    /// Where the access finds its bytes on the host, in the mirror if the mode has one. `None`: it cannot be done here.
    pub(super) fn reach(&mut self, item: &Item, a: &Access) -> Option<Host> {
        if self.block.mode.is_mirrored() { self.place_mirrored(item, a) } else { self.place(item, a) }
    }

    /// Where the access finds its bytes in guest RAM. `None`: it cannot be done here.
    pub(super) fn place(&mut self, item: &Item, a: &Access) -> Option<Host> {
        if let Some(address) = a.constant() {
            return self.place_constant(item, a, address);
        }
        match a.based() {
            Some(base) if self.around.share => self.place_based(item, a, base),
            _ => self.place_any(item, a),
        }
    }

    /// A look at the TLB can begin: the exit it takes, and where it begins.
    pub(super) fn begin(&mut self, item: &Item) -> u32 {
        self.give_up_flags(item);
        self.e.len() as u32
    }

    /// Leaves unless equal, or asks again.
    pub(super) fn miss(&mut self, item: &Item, access: Access, range: (i64, i64, bool), walk: Walk, retry: u32) {
        let site = self.branch(&JNE);
        let (low, len, write) = range;
        let native = super::touches_vectors(item);
        let whole = range == (access.disp, access.len.into(), access.write);
        let alone = whole && item.way == Way::Memory && access.bit.is_none() && !native;
        let kind = Kind::Miss { access, low, len: len as u16, write, alone, retry };
        let exit = self.exit(kind, self.block.rip(item), Flags::Slot, self.n);
        self.exits[exit].spilled = self.spilled;
        self.exits[exit].native = native;
        let mode = self.block.mode;
        let walks = mode.user() && !mode.is_mirrored() && !mode.is_narrow() && !mode.is_counted();
        self.cold.push(Cold { site, reload: 0, exit, walk: walks.then_some(walk) });
        if self.around.counts {
            // inc qword; nothing is in EFLAGS.
            self.e.rm(W::Q, &[0xff], 0, At::slot(at::HITS), &[]);
        }
    }

    pub(super) fn tag(&self, write: bool) -> usize {
        self.around.tlb + if write { tlb::WRITE } else { tlb::READ }
    }

    /// `index = (from + disp) >> SHIFT & MASK`
    pub(super) fn index(&mut self, index: Gpr, from: Gpr, disp: i32) {
        let from = if disp == 0 {
            from
        } else {
            self.e.lea(index, At::base(from, disp));
            index
        };
        if std::is_x86_feature_detected!("bmi2") {
            // RORX index, from, SHIFT.
            let (r, m) = (index as u8, from as u8);
            let high = (r >> 3 ^ 1) << 7 | 0x40 | (m >> 3 ^ 1) << 5 | 3;
            self.e.bytes.extend_from_slice(&[0xc4, high, 0xfb, 0xf0, 0xc0 | (r & 7) << 3 | m & 7, SHIFT]);
        } else {
            if from != index {
                self.e.copy(index, from);
            }
            self.e.shr(W::Q, index, SHIFT);
        }
        self.e.and(W::D, index, MASK);
    }

    fn place_based(&mut self, item: &Item, a: &Access, base: Gpr) -> Option<Host> {
        let moved = self.moved[base as usize];
        let (low, high) = (moved + a.disp, moved + a.disp + i64::from(a.len));
        let version = self.version[base as usize];
        let disp = i32::try_from(a.disp).ok()?;
        let found = self.windows.iter().find(|w| {
            (w.base, w.version) == (Some(base), version)
                && w.low <= low
                && high <= w.high
                && (w.write || !a.write)
                && !w.mirrored
                && self.is_unwrapped(w, moved)
                && !(item.high && w.delta as u8 >= 8)
        });
        if let Some(&Window { delta, .. }) = found {
            self.busy |= bit(delta);
            return Some(Host { base: Some(base), index: Some((delta, 1)), disp, mirrored: false, usual: false });
        }
        let (low, high, write) = self.foresee(base, low, high, a.write);
        let (from, to) = (i32::try_from(low - moved).ok()?, i32::try_from(high - 1 - moved).ok()?);
        let delta = self.scratch(item, item.high)?;
        let page = self.passing(item, false)?;
        let retry = self.begin(item);
        self.index(delta, base, from);
        self.e.lea(page, At::base(base, to));
        self.e.and(W::Q, page, -(PAGE_SIZE as i32));
        self.e.compare(page, At::table(self.tag(write), delta));
        self.miss(
            item,
            *a,
            (i64::from(from), high - low, write),
            Walk { free: page, base: Some(base), disp: from.into() },
            retry,
        );
        self.e.load(delta, At::table(self.around.tlb + tlb::ADDEND, delta));
        self.busy &= !bit(page);
        let window = Window::over(Some(base), version, delta);
        self.windows.push(Window { low, high, write, mirrored: false, anchor: moved, ..window });
        Some(Host { base: Some(base), index: Some((delta, 1)), disp, mirrored: false, usual: false })
    }

    /// The range that later accesses with the same base make worth asking for at once.
    fn foresee(&self, base: Gpr, mut low: i64, mut high: i64, mut write: bool) -> (i64, i64, bool) {
        let mut moved = self.moved[base as usize];
        for (n, i) in self.block.items[self.n..].iter().enumerate() {
            if let Some(a) = i.access.filter(|a| n > 0 && a.based() == Some(base)) {
                let (l, h) = (low.min(moved + a.disp), high.max(moved + a.disp + i64::from(a.len)));
                if h - l <= reach(base) && (self.around.foresee || write || !a.write) {
                    (low, high, write) = (l, h, write || a.write);
                }
            }
            if i.way.ends() && n > 0 || i.way == Way::Invalidate {
                break;
            }
            if i.writes & bit(base) != 0 {
                match i.adds {
                    Some((r, by)) if r == base => moved += by,
                    _ => break,
                }
            }
        }
        (low, high, write)
    }

    fn place_constant(&mut self, item: &Item, a: &Access, address: u64) -> Option<Host> {
        let page = address & !(PAGE_SIZE - 1);
        let disp = (address - page) as i32;
        if address % PAGE_SIZE + u64::from(a.len) > PAGE_SIZE {
            return None;
        }
        let found = self.windows.iter().find(|w| {
            w.base.is_none()
                && !w.mirrored
                && w.low == page as i64
                && (w.write || !a.write)
                && !(item.high && w.delta as u8 >= 8)
        });
        if let Some(&Window { delta, .. }) = found {
            self.busy |= bit(delta);
            return Some(Host { base: Some(delta), index: None, disp, mirrored: false, usual: false });
        }
        let delta = self.scratch(item, item.high)?;
        let retry = self.begin(item);
        let entry = tlb::entry(address);
        self.e.constant(delta, page);
        self.e.compare(delta, At::slot(self.tag(a.write) + entry));
        let whole = (a.disp, i64::from(a.len), a.write);
        self.miss(item, *a, whole, Walk { free: delta, base: None, disp: address as i64 }, retry);
        self.e.add(delta, At::slot(self.around.tlb + tlb::ADDEND + entry));
        let window = Window::over(None, 0, delta);
        self.windows.push(Window { low: page as i64, write: a.write, mirrored: false, ..window });
        Some(Host { base: Some(delta), index: None, disp, mirrored: false, usual: false })
    }

    pub(super) fn place_any(&mut self, item: &Item, a: &Access) -> Option<Host> {
        let disp = i32::try_from(a.disp).ok().or((a.narrow).then_some(a.disp as i32))?;
        let address = self.passing(item, item.high)?;
        let index = self.passing(item, false)?;
        let page = self.passing(item, false)?;
        let retry = self.begin(item);
        if a.base.is_none() && a.index.is_none() {
            self.e.constant(address, a.disp as u64);
        } else {
            self.e.lea(address, At::any(a.base, a.index, disp, a.narrow));
        }
        if let Some(bit) = a.bit {
            self.beyond(a, address, bit, index);
            if a.narrow {
                self.cut(address);
            }
        }
        match a.segment {
            Segment::Flat => {}
            Segment::Fs => self.e.add(address, At::slot(at::FS_BASE)),
            Segment::Gs => self.e.add(address, At::slot(at::GS_BASE)),
            Segment::Fs32 => self.add_base(item, a, address, at::FS_BASE),
            Segment::Gs32 => self.add_base(item, a, address, at::GS_BASE),
        }
        self.index(index, address, 0);
        self.e.lea(page, At::base(address, i32::from(a.len) - 1));
        self.e.and(W::Q, page, -(PAGE_SIZE as i32));
        self.e.compare(page, At::table(self.tag(a.write), index));
        let whole = (a.disp, i64::from(a.len), a.write);
        self.miss(item, *a, whole, Walk { free: page, base: Some(address), disp: 0 }, retry);
        self.e.add(address, At::table(self.around.tlb + tlb::ADDEND, index));
        self.busy &= !(bit(index) | bit(page));
        Some(Host { base: Some(address), index: None, disp: 0, mirrored: false, usual: false })
    }

    /// Adds to `address` what [`Access::beyond`] says, with the help of `t`.
    pub(super) fn beyond(&mut self, a: &Access, address: Gpr, bit: Gpr, t: Gpr) {
        let (len, from, to) = (a.len, bit as u8, t as u8);
        match len {
            8 => self.e.copy(t, bit),
            // MOVSXD and MOVSX.
            4 => self.e.rr(W::Q, &[0x63], to, bit, &[]),
            _ => self.e.rr(W::Q, &[0x0f, 0xbf], to, bit, &[]),
        }
        debug_assert!(len != 1 && from != to, "BT has no byte form");
        let shift = 3 + len.trailing_zeros() as u8;
        // SAR by immediate.
        self.e.rr(W::Q, &[0xc1], 7, t, &[shift]);
        self.e.lea(address, At::any(Some(address), Some((t, len)), 0, false));
    }

    /// BT, BTS, BTR or BTC with the bit offset in a register, which is made to stay inside the operand.
    fn bit_string(&mut self, item: &Item) -> Option<bool> {
        let a = item.access?;
        let host = self.reach(item, &a)?;
        let offset = self.scratch(item, false)?;
        self.e.copy(offset, a.bit?);
        self.give_up_flags(item);
        self.e.and(W::D, offset, 8 * i32::from(a.len) - 1);
        self.flags_for(item)?;
        let mut iced = item.iced;
        let first = match a.len {
            2 => Register::AX,
            4 => Register::EAX,
            _ => Register::RAX,
        };
        iced.set_op1_register(first + offset as u32);
        self.with_operand(item, iced, host)
    }

    /// An instruction with one explicit memory operand.
    pub(super) fn memory(&mut self, item: &Item) -> Option<bool> {
        if is_bit_string(&item.iced) {
            return self.bit_string(item);
        }
        let a = item.access?;
        let host = self.reach(item, &a)?;
        self.check_divisor(item, Some(host));
        self.flags_for(item)?;
        self.with_operand(item, item.iced, host)?;
        if self.block.mode.is_narrow() && notes_data(&item.iced) {
            self.note_data(item, &a)?;
        }
        Some(true)
    }

    /// The instruction with another operand.
    fn with_operand(&mut self, item: &Item, mut iced: Instruction, host: Host) -> Option<bool> {
        iced.set_memory_base(host.base.map_or(Register::None, Gpr::to_iced));
        iced.set_memory_index(host.index.map_or(Register::None, |(r, _)| r.to_iced()));
        iced.set_memory_index_scale(host.index.map_or(1, |(_, scale)| u32::from(scale)));
        iced.set_memory_displacement64(i64::from(host.disp) as u64);
        iced.set_memory_displ_size(if host.disp == 0 && host.base.is_some() { 0 } else { 8 });
        iced.set_segment_prefix(if host.usual { Register::FS } else { Register::None });
        let mut encoder = Encoder::new(64);
        encoder.encode(&iced, 0).ok()?;
        let from = self.e.len();
        self.e.bytes.extend_from_slice(&encoder.take_buffer());
        self.point_at(item, from, item.access.filter(|_| host.mirrored));
        debug_assert_eq!(item.way, Way::Memory);
        Some(true)
    }
}
