//! 32-bit code: instructions encoded anew, the width of the stack, sums of addresses that wrap.

use super::asm::{Assembler, At, W};
use super::scratch::Window;
use super::{Kind, Lower};
use crate::system::block::{Access, Item};
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

    /// Adds a segment's base to the offset in `address`, whose access must not reach beyond offset FFFFFFFF.
    pub(super) fn add_base(&mut self, item: &Item, a: &Access, address: Gpr, slot: usize) {
        if a.len > 1 {
            // cmp address, -len: above that it does.
            self.e.rr(W::D, &[0x83], 7, address, &[(-i16::from(a.len)) as u8]);
            self.leave_if(&JA, item, Kind::Step, self.block.rip(item), self.n);
        }
        self.e.rm(W::D, &[0x03], address as u8, At::slot(slot), &[]);
    }
}
