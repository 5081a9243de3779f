//! RFLAGS (SDM 1 3.4.3).

bitflags::bitflags! {
    /// The flags register. Bit 1 is always set in a running CPU; [`Rflags::FIXED`] holds it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    #[repr(transparent)]
    pub struct Rflags: u64 {
        /// Carry.
        const CF = 1;
        /// Reads as one.
        const FIXED = 1 << 1;
        /// Parity of the low byte.
        const PF = 1 << 2;
        /// Auxiliary carry.
        const AF = 1 << 4;
        /// Zero.
        const ZF = 1 << 6;
        /// Sign.
        const SF = 1 << 7;
        /// Trap after each instruction.
        const TF = 1 << 8;
        /// Interrupts enabled.
        const IF = 1 << 9;
        /// String direction: down.
        const DF = 1 << 10;
        /// Overflow.
        const OF = 1 << 11;
        /// I/O privilege level, two bits.
        const IOPL = 3 << 12;
        /// Nested task.
        const NT = 1 << 14;
        /// Resume: suppresses instruction breakpoints for one instruction.
        const RF = 1 << 16;
        /// Virtual-8086 mode.
        const VM = 1 << 17;
        /// Alignment check, or access control for SMAP.
        const AC = 1 << 18;
        /// Virtual interrupt flag.
        const VIF = 1 << 19;
        /// Virtual interrupt pending.
        const VIP = 1 << 20;
        /// CPUID is available.
        const ID = 1 << 21;
        /// CF PF AF ZF SF OF.
        const STATUS = 0x8d5;
    }
}

impl Rflags {
    /// The status flags of a set of iced-x86's: those that an instruction leaves undefined, say.
    pub fn status_from_iced(bits: u32) -> Rflags {
        use iced_x86::RflagsBits as B;
        let names = [
            (B::CF, Rflags::CF),
            (B::PF, Rflags::PF),
            (B::AF, Rflags::AF),
            (B::ZF, Rflags::ZF),
            (B::SF, Rflags::SF),
            (B::OF, Rflags::OF),
        ];
        names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, flag)| *flag).collect()
    }

    /// The I/O privilege level, 0 to 3.
    pub fn iopl(self) -> u8 {
        (self.bits() >> 12) as u8 & 3
    }

    /// Replaces the bits of `mask` by those of `value`.
    #[inline(always)]
    pub fn replace(&mut self, mask: Rflags, value: Rflags) {
        *self = Rflags::from_bits_retain((self.bits() & !mask.bits()) | (value.bits() & mask.bits()));
    }
}
