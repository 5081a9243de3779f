//! Memory accesses of guest instructions.

use bivisor_emulator::isa::Gpr;

/// What a memory operand is relative to besides registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Base 0.
    Flat,
    /// FS.
    Fs,
    /// GS.
    Gs,
    /// FS in 32-bit code: linear addresses have 32 bits, and no access reaches beyond offset FFFFFFFF.
    Fs32,
    /// GS likewise.
    Gs32,
}

/// A memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Base register.
    pub base: Option<Gpr>,
    /// Index register and scale.
    pub index: Option<(Gpr, u8)>,
    /// Displacement; the address if there are no registers.
    pub disp: i64,
    /// Segment.
    pub segment: Segment,
    /// Addresses have 32 bits.
    pub narrow: bool,
    /// Bytes.
    pub len: u8,
    /// A store, or a load and a store.
    pub write: bool,
    /// Its instruction faults if the address is no multiple of the length, before the page is looked at.
    pub aligned: bool,
    /// The register with the bit offset of BT and the like, which may lead beyond the operand.
    pub bit: Option<Gpr>,
}

impl Access {
    /// Eight bytes of the stack.
    pub const fn stack(disp: i64, write: bool) -> Access {
        let segment = Segment::Flat;
        Access {
            base: Some(Gpr::Rsp),
            index: None,
            disp,
            segment,
            narrow: false,
            len: 8,
            write,
            aligned: false,
            bit: None,
        }
    }

    /// How far the operand with the bit is from the address, given the register (SDM 2A BT).
    pub fn beyond(&self, bit: u64) -> u64 {
        let bits = 8 * u32::from(self.len);
        let signed = (bit << (64 - bits)) as i64 >> (64 - bits);
        (signed.div_euclid(i64::from(bits)) * i64::from(self.len)) as u64
    }

    /// Is it a base register and a displacement, and nothing else?
    pub fn based(&self) -> Option<Gpr> {
        (self.index.is_none() && self.segment == Segment::Flat && !self.narrow && self.bit.is_none())
            .then_some(self.base)
            .flatten()
    }

    /// Its address, if that is known.
    pub fn constant(&self) -> Option<u64> {
        let known = self.base.is_none() && self.index.is_none() && self.segment == Segment::Flat && self.bit.is_none();
        known.then_some(self.disp as u64)
    }

    /// The linear address of its first byte.
    pub fn address(&self, gpr: impl Fn(Gpr) -> u64, fs: u64, gs: u64) -> u64 {
        let base = self.base.map_or(0, &gpr);
        let index = self.index.map_or(0, |(r, scale)| gpr(r).wrapping_mul(u64::from(scale)));
        let mut at = base.wrapping_add(index).wrapping_add(self.disp as u64);
        at = at.wrapping_add(self.bit.map_or(0, |r| self.beyond(gpr(r))));
        if self.narrow {
            at &= 0xffff_ffff;
        }
        match self.segment {
            Segment::Flat => at,
            Segment::Fs => at.wrapping_add(fs),
            Segment::Gs => at.wrapping_add(gs),
            Segment::Fs32 => at.wrapping_add(fs) & 0xffff_ffff,
            Segment::Gs32 => at.wrapping_add(gs) & 0xffff_ffff,
        }
    }
}
