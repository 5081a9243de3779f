//! Operand and address widths of integer instructions (SDM 1 4.1).

/// A width in the manual's letters: byte, word, doubleword, quadword.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Width {
    /// 8 bits.
    B = 0,
    /// 16 bits.
    W = 1,
    /// 32 bits.
    D = 2,
    /// 64 bits.
    Q = 3,
}

impl Width {
    /// All four, narrowest first.
    pub const ALL: [Width; 4] = [Width::B, Width::W, Width::D, Width::Q];

    /// Size in bytes.
    #[inline(always)]
    pub const fn bytes(self) -> u64 {
        1 << self as u32
    }

    /// Size in bits.
    #[inline(always)]
    pub const fn bits(self) -> u32 {
        8 << self as u32
    }

    /// All ones in this width.
    #[inline(always)]
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// The sign bit of this width.
    #[inline(always)]
    pub const fn sign(self) -> u64 {
        1 << (self.bits() - 1)
    }

    /// `v` cut to this width.
    #[inline(always)]
    pub const fn cut(self, v: u64) -> u64 {
        v & self.mask()
    }

    /// `v`, of this width, sign-extended to 64 bits.
    #[inline(always)]
    pub const fn sign_extend(self, v: u64) -> u64 {
        let shift = 64 - self.bits();
        (((v << shift) as i64) >> shift) as u64
    }

    /// The width of `bytes` bytes, if it is one of the four.
    pub const fn from_bytes(bytes: usize) -> Option<Width> {
        match bytes {
            1 => Some(Width::B),
            2 => Some(Width::W),
            4 => Some(Width::D),
            8 => Some(Width::Q),
            _ => None,
        }
    }
}
