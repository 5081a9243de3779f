//! 32-bit code: instructions encoded anew, the width of the stack, sums of addresses that wrap.

use super::asm::{Assembler, At, W};
use super::memory::Host;
use super::scratch::Window;
use super::{Kind, Lower};
use crate::system::area::at;
use crate::system::block::{Access, Item, Segment, Way, is_x87};
use crate::system::narrow::word;
use bivisor_emulator::isa::Gpr;
use iced_x86::{Encoder, Instruction, Mnemonic, Register};

const JA: [u8; 2] = [0x0f, 0x87];

/// As 64-bit code has it. `None`: it has no such instruction.
pub(super) fn encode(iced: &Instruction) -> Option<Vec<u8>> {
    let mut iced = *iced;
    if iced.mnemonic() == Mnemonic::Lea {
        // Of the sum the destination takes the low 32 bits, or 16.
        let disp = iced.memory_displacement64() as i32;
        iced.set_memory_base(iced.memory_base().full_register());
        iced.set_memory_index(iced.memory_index().full_register());
        iced.set_memory_displacement64(i64::from(disp) as u64);
        iced.set_memory_displ_size(if disp == 0 { 0 } else { 8 });
    }
    iced.set_segment_prefix(Register::None);
    let mut encoder = Encoder::new(64);
    encoder.encode(&iced, 0).ok()?;
    Some(encoder.take_buffer())
}

/// The opcode that an x87 instruction with a memory operand leaves: of its two bytes, 11 bits.
pub(super) fn fop(item: &Item, code: &[u8]) -> u16 {
    if item.way != Way::Memory || !notes_data(&item.iced) {
        return 0;
    }
    let escape = code.windows(2).find(|w| w[0] & 0xf8 == 0xd8);
    escape.map_or(0, |w| u16::from(w[0] & 7) << 8 | u16::from(w[1]))
}

/// An x87 instruction with a memory operand that becomes the data pointer (SDM 1 8.1.8)?
pub(super) fn notes_data(iced: &Instruction) -> bool {
    is_x87(iced) && !matches!(iced.mnemonic(), Mnemonic::Fldcw | Mnemonic::Fnstcw | Mnemonic::Fnstsw)
}

impl Lower<'_> {
    /// The width of addresses and of what the stack holds.
    pub(super) fn word(&self) -> W {
        if self.block.mode.is_narrow() { W::D } else { W::Q }
    }

    /// Bytes of that.
    pub(super) fn word_len(&self) -> i32 {
        if self.block.mode.is_narrow() { 4 } else { 8 }
    }

    /// What a push stores to.
    pub(super) fn pushed(&self) -> Access {
        let mode = self.block.mode;
        if mode.is_narrow() { word(mode, Gpr::Rsp, -4, true) } else { Access::stack(-8, true) }
    }

    /// Loads a word.
    pub(super) fn load_word(&mut self, to: Gpr, at: At) {
        self.e.rm(self.word(), &[0x8b], to as u8, at, &[]);
    }

    /// Stores a word.
    pub(super) fn store_word(&mut self, at: At, from: Gpr) {
        self.e.rm(self.word(), &[0x89], from as u8, at, &[]);
    }

    /// Stores a constant, sign-extended if words have 64 bits.
    pub(super) fn store_constant(&mut self, at: At, v: i32) {
        self.e.rm(self.word(), &[0xc7], 0, at, &v.to_le_bytes());
    }

    /// Adds to a register, which wraps as addresses do.
    pub(super) fn advance_word(&mut self, r: Gpr, from: Gpr, by: i32) {
        self.e.rm(self.word(), &[0x8d], r as u8, At::base(from, by), &[]);
    }

    /// The low 32 bits.
    pub(super) fn cut(&mut self, r: Gpr) {
        self.e.rr(W::D, &[0x89], r as u8, r, &[]);
    }

    /// In 32-bit code: was the base register not past either end of the address space between the look and now? It is not where the look
    /// was, nor in the range that was asked for, nor between.
    pub(super) fn is_unwrapped(&self, w: &Window, moved: i64) -> bool {
        !self.block.mode.is_narrow() || (w.low.min(w.anchor)..=w.high.max(w.anchor + 1) - 1).contains(&moved)
    }

    /// Leaves if an access at the offset in `address` reaches beyond offset FFFFFFFF of its segment.
    fn check_end(&mut self, item: &Item, a: &Access, address: Gpr) {
        let constant = a.base.is_none() && a.index.is_none();
        if a.len == 1 || constant && a.disp + i64::from(a.len) <= 1 << 32 {
            return;
        }
        self.give_up_flags(item);
        // cmp address, -len: above that it does.
        self.e.rr(W::D, &[0x83], 7, address, &[(-i16::from(a.len)) as u8]);
        self.leave_if(&JA, item, Kind::Step, self.block.rip(item), self.n);
    }

    /// Adds a segment's base to the offset in `address`. Nothing is in EFLAGS.
    pub(super) fn add_base(&mut self, item: &Item, a: &Access, address: Gpr, slot: usize) {
        self.check_end(item, a, address);
        self.e.rm(W::D, &[0x03], address as u8, At::slot(slot), &[]);
    }

    /// In the mirror 32-bit addresses are all in the first slot, and 64-bit sums that wrap lie in the empty space on either side of it.
    pub(super) fn mirrored_narrow(&mut self, item: &Item, a: &Access) -> Option<Host> {
        let delta = self.distance_of(item, 0)?;
        let host = |base, index, disp| Some(Host { base: Some(base), index, disp, mirrored: true, usual: false });
        if let Some(disp) = a.constant().and_then(|at| i32::try_from(at).ok()) {
            return host(delta, None, disp);
        }
        if let Some(base) = a.based() {
            return host(base, Some((delta, 1)), i32::try_from(a.disp).ok()?);
        }
        let address = self.passing(item, item.high)?;
        if a.base.is_none() && a.index.is_none() {
            self.e.constant(address, a.disp as u64);
        } else {
            self.e.rm(W::D, &[0x8d], address as u8, At::any(a.base, a.index, a.disp as i32, false), &[]);
        }
        if let Some(r) = a.bit {
            let t = self.passing(item, false)?;
            self.give_up_flags(item);
            self.beyond(a, address, r, t);
            self.cut(address);
            self.busy &= !(1 << t as u16);
        }
        let segment = match a.segment {
            Segment::Flat => None,
            Segment::Fs | Segment::Fs32 => Some(at::FS_BASE),
            Segment::Gs | Segment::Gs32 => Some(at::GS_BASE),
        };
        if let Some(slot) = segment {
            self.check_end(item, a, address);
            let t = self.passing(item, false)?;
            self.e.load(t, At::slot(slot));
            self.e.rm(W::D, &[0x8d], address as u8, At::sum(address, t, 0), &[]);
            self.busy &= !(1 << t as u16);
        }
        host(address, Some((delta, 1)), 0)
    }

    /// Notes the offset that an x87 instruction has accessed: the processor keeps the host's address.
    pub(super) fn note_data(&mut self, item: &Item, a: &Access) -> Option<()> {
        let t = self.scratch(item, false)?;
        if a.base.is_none() && a.index.is_none() {
            self.e.constant(t, a.disp as u64);
        } else {
            self.e.rm(W::D, &[0x8d], t as u8, At::any(a.base, a.index, a.disp as i32, false), &[]);
        }
        self.e.store(At::slot(at::X87_DATA), t);
        self.busy &= !(1 << t as u16);
        Some(())
    }
}
