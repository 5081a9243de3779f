//! Segment registers with their hidden parts, and descriptor-table registers (SDM 3A 3.4, 24.4.1).

bitflags::bitflags! {
    /// Access rights in the layout of the VMCS (SDM 3C 24.4.1): bits 7:0 are the descriptor's access byte, 15:12 its flags.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    #[repr(transparent)]
    pub struct Attr: u32 {
        /// Accessed (code or data).
        const ACCESSED = 1;
        /// Writable (data) or readable (code).
        const WRITABLE = 1 << 1;
        /// Expand-down (data) or conforming (code).
        const EXPAND_DOWN = 1 << 2;
        /// Code segment.
        const CODE = 1 << 3;
        /// Code or data, not system.
        const S = 1 << 4;
        /// Descriptor privilege level, two bits.
        const DPL = 3 << 5;
        /// Present.
        const P = 1 << 7;
        /// Available to software.
        const AVL = 1 << 12;
        /// 64-bit code.
        const L = 1 << 13;
        /// Default operation size 32 bits; big stack.
        const DB = 1 << 14;
        /// Limit counted in 4 KiB.
        const G = 1 << 15;
        /// Unusable: loaded with a null selector.
        const UNUSABLE = 1 << 16;
    }
}

impl Attr {
    /// DPL, 0 to 3.
    #[inline(always)]
    pub fn dpl(self) -> u8 {
        (self.bits() >> 5) as u8 & 3
    }

    /// The type field, bits 3:0.
    pub fn kind(self) -> u8 {
        self.bits() as u8 & 0xf
    }
}

/// A segment register: selector and hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(C)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes (already scaled by G), inclusive.
    pub limit: u32,
    /// Access rights.
    pub attr: Attr,
    /// The visible selector.
    pub selector: u16,
}

impl Segment {
    /// As real mode loads it: base 16 times the selector, 64 KiB, read-write data.
    pub fn real(selector: u16) -> Segment {
        Segment { base: u64::from(selector) << 4, limit: 0xffff, attr: Attr::from_bits_retain(0x93), selector }
    }

    /// A flat 64-bit code segment of the given privilege.
    pub fn code64(selector: u16, dpl: u8) -> Segment {
        Segment { base: 0, limit: u32::MAX, attr: Attr::from_bits_retain(0xa09b | u32::from(dpl) << 5), selector }
    }

    /// A flat 32-bit read-write data segment of the given privilege.
    pub fn data32(selector: u16, dpl: u8) -> Segment {
        Segment { base: 0, limit: u32::MAX, attr: Attr::from_bits_retain(0xc093 | u32::from(dpl) << 5), selector }
    }

    /// A flat 32-bit code segment of the given privilege.
    pub fn code32(selector: u16, dpl: u8) -> Segment {
        Segment { base: 0, limit: u32::MAX, attr: Attr::from_bits_retain(0xc09b | u32::from(dpl) << 5), selector }
    }

    /// Loaded with a null selector.
    pub fn unusable(selector: u16) -> Segment {
        Segment { base: 0, limit: 0, attr: Attr::UNUSABLE, selector }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(C)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, inclusive.
    pub limit: u16,
}
