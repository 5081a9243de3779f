//! Control registers and EFER (SDM 3A 2.5, 2.2.1).

bitflags::bitflags! {
    /// CR0.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    #[repr(transparent)]
    pub struct Cr0: u64 {
        /// Protection enable.
        const PE = 1;
        /// Monitor coprocessor.
        const MP = 1 << 1;
        /// Emulation: x87 and SSE give #UD or #NM.
        const EM = 1 << 2;
        /// Task switched.
        const TS = 1 << 3;
        /// Extension type, always one.
        const ET = 1 << 4;
        /// Numeric error: #MF rather than FERR#.
        const NE = 1 << 5;
        /// Supervisor writes obey read-only pages.
        const WP = 1 << 16;
        /// Alignment mask.
        const AM = 1 << 18;
        /// Not write-through.
        const NW = 1 << 29;
        /// Cache disable.
        const CD = 1 << 30;
        /// Paging.
        const PG = 1 << 31;
    }

    /// CR4.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    #[repr(transparent)]
    pub struct Cr4: u64 {
        /// Virtual-8086 mode extensions.
        const VME = 1;
        /// Protected-mode virtual interrupts.
        const PVI = 1 << 1;
        /// RDTSC needs CPL 0.
        const TSD = 1 << 2;
        /// Debugging extensions: DR4 and DR5 give #UD.
        const DE = 1 << 3;
        /// 4 MiB pages in 32-bit paging.
        const PSE = 1 << 4;
        /// Physical address extension.
        const PAE = 1 << 5;
        /// Machine check enable.
        const MCE = 1 << 6;
        /// Global pages.
        const PGE = 1 << 7;
        /// RDPMC allowed at any CPL.
        const PCE = 1 << 8;
        /// FXSAVE and SSE enabled.
        const OSFXSR = 1 << 9;
        /// Unmasked SSE exceptions give #XM.
        const OSXMMEXCPT = 1 << 10;
        /// User-mode instruction prevention.
        const UMIP = 1 << 11;
        /// 57-bit linear addresses.
        const LA57 = 1 << 12;
        /// RDFSBASE and friends enabled.
        const FSGSBASE = 1 << 16;
        /// Process-context identifiers.
        const PCIDE = 1 << 17;
        /// XSAVE and XCR0 enabled.
        const OSXSAVE = 1 << 18;
        /// Supervisor-mode execution prevention.
        const SMEP = 1 << 20;
        /// Supervisor-mode access prevention.
        const SMAP = 1 << 21;
        /// Protection keys for user pages.
        const PKE = 1 << 22;
    }

    /// The extended feature enable register, MSR 0xC0000080.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    #[repr(transparent)]
    pub struct Efer: u64 {
        /// SYSCALL enabled.
        const SCE = 1;
        /// Long mode enabled.
        const LME = 1 << 8;
        /// Long mode active.
        const LMA = 1 << 10;
        /// No-execute enabled.
        const NXE = 1 << 11;
    }
}
