//! Model-specific registers kept as state (SDM 4; numbers in [`index`]). FS and GS base live in the segments, EFER in its own field.

use std::mem::offset_of;

/// MSR numbers.
#[allow(missing_docs)]
pub mod index {
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1b;
    pub const TSC_ADJUST: u32 = 0x3b;
    /// AMD's name for it: patch level.
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    /// Base and mask of the first variable range; two numbers a range follow.
    pub const MTRR_VARIABLE: u32 = 0x200;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    /// CTL, STATUS, ADDR, MISC of the first machine-check bank; four numbers a bank follow.
    pub const MC_BANKS: u32 = 0x400;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    /// The first register of the local APIC in x2APIC mode.
    pub const X2APIC: u32 = 0x800;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

/// The fixed-range MTRRs (SDM 3A 11.11.2.2): 64K_00000, 16K_80000, 16K_A0000, 4K_C0000 to 4K_F8000.
pub const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// Variable-range MTRRs.
pub const MTRR_RANGES: u32 = 8;
/// Machine-check banks.
pub const MC_BANKS: u32 = 4;
/// Performance counters of AMD's K7 and later.
pub const K7_COUNTERS: u32 = 4;

/// The stored MSRs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    /// Added to the host's time-stamp counter.
    pub tsc_offset: u64,
    pub pat: u64,
    pub apic_base: u64,
    pub misc_enable: u64,
    /// What was added to the counter since RESET, by any way.
    pub tsc_adjust: u64,
    pub debugctl: u64,
    pub mtrr_def_type: u64,
    /// By index in [`MTRR_FIXED`].
    pub mtrr_fixed: [u64; 11],
    /// Base, mask, base, mask.
    pub mtrr_variable: [u64; 2 * MTRR_RANGES as usize],
    pub mcg_status: u64,
    /// CTL, STATUS, ADDR, MISC of each bank.
    pub mc: [u64; 4 * MC_BANKS as usize],
    /// AMD's event selectors and counters, which count nothing.
    pub k7_counters: [u64; 2 * K7_COUNTERS as usize],
    /// AMD's SYSCFG, HWCR, DE_CFG and NB_CFG.
    pub amd: [u64; 4],
}

impl Msrs {
    /// The offset of a register that RDMSR reads as it is, for generated code.
    pub fn plain(n: u32) -> Option<usize> {
        Some(match n {
            index::STAR => offset_of!(Msrs, star),
            index::LSTAR => offset_of!(Msrs, lstar),
            index::CSTAR => offset_of!(Msrs, cstar),
            index::FMASK => offset_of!(Msrs, fmask),
            index::SYSENTER_CS => offset_of!(Msrs, sysenter_cs),
            index::SYSENTER_ESP => offset_of!(Msrs, sysenter_esp),
            index::SYSENTER_EIP => offset_of!(Msrs, sysenter_eip),
            index::TSC_AUX => offset_of!(Msrs, tsc_aux),
            index::APIC_BASE => offset_of!(Msrs, apic_base),
            _ => return None,
        })
    }
}

impl Default for Msrs {
    /// Values after RESET (SDM 3A table 10-1): PAT 0x0007040600070406, local APIC at 0xFEE00000 enabled and boot processor.
    fn default() -> Msrs {
        Msrs {
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_offset: 0,
            pat: 0x0007_0406_0007_0406,
            apic_base: 0xfee0_0900,
            misc_enable: 1,
            tsc_adjust: 0,
            debugctl: 0,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 2 * MTRR_RANGES as usize],
            mcg_status: 0,
            mc: [0; 4 * MC_BANKS as usize],
            k7_counters: [0; 2 * K7_COUNTERS as usize],
            // HWCR.TscFreqSel, read-only on the processors that have it: the counter runs at the frequency of P0.
            amd: [0, 1 << 24, 0, 0],
        }
    }
}
