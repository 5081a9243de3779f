//! Segment and gate descriptors as they lie in the GDT, LDT and IDT (SDM 3A 3.4.5, 3.5, 5.8.3, 6.14.1).

use crate::cpu::{Attr, Segment};

/// System-segment and gate types (SDM 3A table 3-2). In IA-32e mode the 16-bit types do not exist and 9, B, C, E, F are the
/// 64-bit ones.
#[allow(missing_docs)]
pub mod kind {
    pub const TSS16_AVAILABLE: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS_AVAILABLE: u8 = 9;
    pub const TSS_BUSY: u8 = 0xb;
    pub const CALL_GATE: u8 = 0xc;
    pub const INTERRUPT_GATE: u8 = 0xe;
    pub const TRAP_GATE: u8 = 0xf;
}

/// A descriptor: eight bytes, and for system descriptors of IA-32e mode the eight that follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Descriptor {
    /// The first eight bytes.
    pub low: u64,
    /// Bytes 8 to 15 of a 16-byte descriptor, else 0.
    pub high: u64,
}

impl Descriptor {
    /// Where the access byte lies; bit 0 of it is the accessed bit, bit 1 of a TSS's the busy bit.
    pub const ACCESS_BYTE: u64 = 5;

    /// An eight-byte descriptor.
    pub fn new(low: u64) -> Descriptor {
        Descriptor { low, high: 0 }
    }

    /// Access rights: the access byte, and the flags G, D/B, L, AVL in bits 15:12.
    pub fn attr(self) -> Attr {
        Attr::from_bits_retain((self.low >> 40) as u32 & 0xf0ff)
    }

    /// The type field.
    pub fn kind(self) -> u8 {
        self.attr().kind()
    }

    /// Descriptor privilege level.
    pub fn dpl(self) -> u8 {
        self.attr().dpl()
    }

    /// Present.
    pub fn present(self) -> bool {
        self.attr().contains(Attr::P)
    }

    /// System segment or gate: the S bit is clear.
    pub fn is_system(self) -> bool {
        !self.attr().contains(Attr::S)
    }

    /// A code segment.
    pub fn is_code(self) -> bool {
        self.attr().contains(Attr::S | Attr::CODE)
    }

    /// A conforming code segment.
    pub fn is_conforming(self) -> bool {
        self.attr().contains(Attr::S | Attr::CODE | Attr::EXPAND_DOWN)
    }

    /// A data segment.
    pub fn is_data(self) -> bool {
        self.attr().contains(Attr::S) && !self.is_code()
    }

    /// A writable data segment.
    pub fn is_writable(self) -> bool {
        self.is_data() && self.attr().contains(Attr::WRITABLE)
    }

    /// A data segment, or a readable code segment.
    pub fn is_readable(self) -> bool {
        self.is_data() || (self.is_code() && self.attr().contains(Attr::WRITABLE))
    }

    /// Base address, 64 bits of it for a 16-byte descriptor.
    pub fn base(self) -> u64 {
        (self.low >> 16 & 0x00ff_ffff) | (self.low >> 56) << 24 | self.high << 32
    }

    /// Limit in bytes, inclusive.
    pub fn limit(self) -> u32 {
        let raw = (self.low & 0xffff) as u32 | (self.low >> 32) as u32 & 0x000f_0000;
        if self.attr().contains(Attr::G) { raw << 12 | 0xfff } else { raw }
    }

    /// The type field of the second half: must be zero in a 16-byte descriptor (SDM 3A 5.8.3.1).
    pub fn high_kind(self) -> u8 {
        (self.high >> 40) as u8 & 0x1f
    }

    /// As a segment register holds it.
    pub fn segment(self, selector: u16) -> Segment {
        Segment { base: self.base(), limit: self.limit(), attr: self.attr(), selector }
    }

    /// Of a gate: the code-segment selector.
    pub fn gate_selector(self) -> u16 {
        (self.low >> 16) as u16
    }

    /// Of a 32- or 64-bit gate: the offset; a 16-bit gate's is its low word.
    pub fn gate_offset(self) -> u64 {
        (self.low & 0xffff) | (self.low >> 32 & 0xffff_0000) | self.high << 32
    }

    /// Of a call gate: the number of parameters to copy.
    pub fn gate_parameters(self) -> u8 {
        (self.low >> 32) as u8 & 0x1f
    }

    /// Of a 64-bit interrupt or trap gate: the interrupt stack table entry, 0 for none.
    pub fn gate_ist(self) -> u8 {
        (self.low >> 32) as u8 & 7
    }
}

/// The error code that names a selector: index and table, the RPL bits clear (SDM 3A 6.13).
pub fn selector_error(selector: u16) -> u16 {
    selector & !3
}

/// A null selector: index 0 of the GDT, any RPL (SDM 3A 3.4.2).
pub fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// The requested privilege level of a selector.
pub fn rpl(selector: u16) -> u8 {
    selector as u8 & 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_code_and_data() {
        // Linux's user code and data descriptors.
        let code = Descriptor::new(0x00af_fb00_0000_ffff);
        assert_eq!((code.base(), code.limit(), code.dpl()), (0, u32::MAX, 3));
        assert!(code.is_code() && !code.is_conforming() && code.is_readable() && !code.is_writable() && code.present());
        assert!(code.attr().contains(Attr::L) && !code.attr().contains(Attr::DB));
        assert_eq!(code.segment(0x33), Segment::code64(0x33, 3));
        let data = Descriptor::new(0x00cf_f300_0000_ffff);
        assert!(data.is_data() && data.is_writable());
        assert_eq!(data.segment(0x2b), Segment::data32(0x2b, 3));
    }

    #[test]
    fn scattered_fields() {
        // Base 0x12345678, limit 0xABCDE in bytes, 32-bit TSS busy, DPL 2.
        let d = Descriptor::new(0x120a_cb34_5678_bcde);
        assert_eq!((d.base(), d.limit(), d.kind(), d.dpl()), (0x1234_5678, 0xa_bcde, kind::TSS_BUSY, 2));
        assert!(d.is_system());
        let wide = Descriptor { low: 0x1200_8934_5678_0067, high: 0xffff_8880 };
        assert_eq!(wide.base(), 0xffff_8880_1234_5678);
        assert_eq!(wide.high_kind(), 0);
    }

    #[test]
    fn gates() {
        // 64-bit interrupt gate: selector 0x10, offset 0xffffffff81234567, IST 5, DPL 3.
        let g = Descriptor { low: 0x8123_ee05_0010_4567, high: 0xffff_ffff };
        assert_eq!((g.gate_selector(), g.gate_offset(), g.gate_ist()), (0x10, 0xffff_ffff_8123_4567, 5));
        assert_eq!((g.kind(), g.dpl(), g.present()), (kind::INTERRUPT_GATE, 3, true));
    }

    #[test]
    fn selectors() {
        assert_eq!(selector_error(0x33), 0x30);
        assert_eq!(selector_error(0x0f), 0x0c);
        assert!(is_null(3) && !is_null(4));
        assert_eq!(rpl(0x2b), 3);
    }
}
