//! x87, SSE, AVX and AVX-512 registers as an XSAVE image in standard format (SDM 1 13.4).
//!
//! The image is the host's own format, because host instructions run on it; the offsets of the extended components come from
//! CPUID leaf 0xD and differ between vendors. A component whose bit in XSTATE_BV is clear is in its initial configuration and its
//! bytes mean nothing: the accessors see to that.

use crate::isa::host_cpu::cpuid;
use std::sync::OnceLock;

/// Room for x87, SSE, AVX, AVX-512 and PKRU on every known CPU (Intel 2696 bytes, AMD 2440).
pub const XSAVE_SIZE: usize = 2752;

/// XCR0 bits.
#[allow(missing_docs)]
pub mod component {
    pub const X87: u64 = 1;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
    pub const OPMASK: u64 = 1 << 5;
    pub const ZMM_HI256: u64 = 1 << 6;
    pub const HI16_ZMM: u64 = 1 << 7;
    /// All of AVX-512.
    pub const AVX512: u64 = OPMASK | ZMM_HI256 | HI16_ZMM;
}

/// Byte offsets of the extended components in the host's standard format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Components the host has enabled and this program can hold.
    pub components: u64,
    /// Upper halves of YMM0-15.
    pub avx: usize,
    /// K0-7.
    pub opmask: usize,
    /// Upper halves of ZMM0-15.
    pub zmm_hi256: usize,
    /// ZMM16-31, whole.
    pub hi16_zmm: usize,
    /// Bytes in use.
    pub size: usize,
}

impl Layout {
    /// Offset of XMM0-15.
    pub const XMM: usize = 160;
    /// Offset of the header: XSTATE_BV, XCOMP_BV.
    pub const HEADER: usize = 512;

    /// The host's layout, asked once. Without XSAVE only x87 and SSE are there.
    #[inline]
    pub fn host() -> &'static Layout {
        static HOST: OnceLock<Layout> = OnceLock::new();
        HOST.get_or_init(Layout::probe)
    }

    fn probe() -> Layout {
        let mut l = Layout {
            components: component::X87 | component::SSE,
            avx: 576,
            opmask: 1088,
            zmm_hi256: 1152,
            hi16_zmm: 1664,
            size: 576,
        };
        if !std::is_x86_feature_detected!("xsave") {
            return l;
        }
        let [low, _, _, high] = cpuid(0xd, 0);
        let enabled = u64::from(low) | u64::from(high) << 32;
        let mut take = |bits: u64, parts: &mut [(u32, &mut usize)]| {
            if enabled & bits != bits {
                return;
            }
            let mut end = 0;
            for (i, offset) in parts.iter_mut() {
                let [size, at, ..] = cpuid(0xd, *i);
                **offset = at as usize;
                end = end.max(at as usize + size as usize);
            }
            if end <= XSAVE_SIZE {
                l.components |= bits;
                l.size = l.size.max(end);
            }
        };
        // XCR0 as the operating system set it is what CPUID says when OSXSAVE is set; detection of avx/avx512f includes that check.
        if std::is_x86_feature_detected!("avx") {
            take(component::AVX, &mut [(2, &mut l.avx)]);
        }
        if std::is_x86_feature_detected!("avx512f") {
            take(component::AVX512, &mut [(5, &mut l.opmask), (6, &mut l.zmm_hi256), (7, &mut l.hi16_zmm)]);
        }
        l
    }
}

/// An XSAVE image, aligned as XSAVE wants it.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct XsaveArea {
    /// The bytes: legacy region 0-511, header 512-575, extended region.
    pub bytes: [u8; XSAVE_SIZE],
}

impl Default for XsaveArea {
    /// All components in their initial configuration: FCW 0x37F, MXCSR 0x1F80.
    fn default() -> XsaveArea {
        let mut area = XsaveArea { bytes: [0; XSAVE_SIZE] };
        area.set_fcw(0x37f);
        area.set_mxcsr(0x1f80);
        area
    }
}

impl std::fmt::Debug for XsaveArea {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut s = f.debug_struct("XsaveArea");
        s.field("xstate_bv", &format_args!("{:#x}", self.xstate_bv()))
            .field("fcw", &format_args!("{:#x}", self.fcw()))
            .field("fsw", &format_args!("{:#x}", self.fsw()))
            .field("mxcsr", &format_args!("{:#x}", self.mxcsr()));
        for i in 0..32 {
            let z = self.zmm(i);
            if z != [0; 64] {
                s.field(&format!("zmm{i}"), &format_args!("{:02x?}", z));
            }
        }
        s.finish()
    }
}

impl PartialEq for XsaveArea {
    /// Equal as registers: initial and stored-as-initial are the same.
    fn eq(&self, other: &XsaveArea) -> bool {
        self.legacy() == other.legacy()
            && (0..32).all(|i| self.zmm(i) == other.zmm(i))
            && (0..8).all(|i| self.opmask(i) == other.opmask(i))
    }
}

macro_rules! legacy_field {
    ($(#[$doc:meta])* $get:ident, $set:ident, $t:ty, $offset:expr, $component:expr, $init:expr) => {
        $(#[$doc])*
        pub fn $get(&self) -> $t {
            let component: u64 = $component;
            if component != 0 && self.xstate_bv() & component == 0 {
                return $init;
            }
            <$t>::from_le_bytes(self.bytes[$offset..$offset + size_of::<$t>()].try_into().expect("length is the type's"))
        }
        /// Sets it.
        #[inline]
        pub fn $set(&mut self, v: $t) {
            if $component != 0 {
                self.activate($component);
            }
            self.bytes[$offset..$offset + size_of::<$t>()].copy_from_slice(&v.to_le_bytes());
        }
    };
}

impl XsaveArea {
    legacy_field!(/// x87 control word.
        fcw, set_fcw, u16, 0, component::X87, 0x37f);
    legacy_field!(/// x87 status word.
        fsw, set_fsw, u16, 2, component::X87, 0);
    legacy_field!(/// Abridged tag word: a set bit is a register in use.
        ftw_abridged, set_ftw_abridged, u8, 4, component::X87, 0);
    legacy_field!(/// Last x87 opcode.
        fop, set_fop, u16, 6, component::X87, 0);
    legacy_field!(/// Last x87 instruction pointer.
        fip, set_fip, u64, 8, component::X87, 0);
    legacy_field!(/// Last x87 data pointer.
        fdp, set_fdp, u64, 16, component::X87, 0);
    legacy_field!(/// MXCSR; it belongs to no component's initial state in XSTATE_BV alone, so it is always stored.
        mxcsr, set_mxcsr, u32, 24, 0, 0x1f80);

    /// XSTATE_BV.
    #[inline]
    pub fn xstate_bv(&self) -> u64 {
        u64::from_le_bytes(self.bytes[512..520].try_into().expect("8 bytes"))
    }

    /// Sets XSTATE_BV.
    #[inline]
    pub fn set_xstate_bv(&mut self, v: u64) {
        self.bytes[512..520].copy_from_slice(&v.to_le_bytes());
    }

    /// Makes the bytes of these components meaningful and the components in use: those in initial configuration are written out.
    #[inline]
    pub fn activate(&mut self, components: u64) {
        let missing = components & !self.xstate_bv();
        if missing != 0 {
            self.materialize(missing);
            self.set_xstate_bv(self.xstate_bv() | missing);
        }
    }

    /// Writes out the initial configuration of those of these components that are in it; they stay marked as initial.
    pub fn materialize(&mut self, components: u64) {
        let missing = components & !self.xstate_bv();
        if missing == 0 {
            return;
        }
        let l = Layout::host();
        if missing & component::X87 != 0 {
            self.bytes[..24].fill(0);
            self.bytes[..2].copy_from_slice(&0x37fu16.to_le_bytes());
            self.bytes[32..160].fill(0);
        }
        if missing & component::SSE != 0 {
            self.bytes[160..416].fill(0);
        }
        for (bit, offset, len) in [
            (component::AVX, l.avx, 256),
            (component::OPMASK, l.opmask, 64),
            (component::ZMM_HI256, l.zmm_hi256, 512),
            (component::HI16_ZMM, l.hi16_zmm, 1024),
        ] {
            if missing & bit != 0 && l.components & bit != 0 {
                self.bytes[offset..offset + len].fill(0);
            }
        }
    }

    /// ST(i) as its ten bytes, i counted from the top of the stack.
    pub fn st(&self, i: usize) -> [u8; 10] {
        if self.xstate_bv() & component::X87 == 0 {
            return [0; 10];
        }
        self.bytes[32 + 16 * i..42 + 16 * i].try_into().expect("10 bytes")
    }

    /// Sets ST(i).
    pub fn set_st(&mut self, i: usize, v: [u8; 10]) {
        self.activate(component::X87);
        self.bytes[32 + 16 * i..42 + 16 * i].copy_from_slice(&v);
    }

    /// K(i).
    pub fn opmask(&self, i: usize) -> u64 {
        let l = Layout::host();
        if self.xstate_bv() & l.components & component::OPMASK == 0 {
            return 0;
        }
        u64::from_le_bytes(self.bytes[l.opmask + 8 * i..][..8].try_into().expect("8 bytes"))
    }

    /// Sets K(i); ignored where the host has no opmask registers.
    pub fn set_opmask(&mut self, i: usize, v: u64) {
        let l = Layout::host();
        if l.components & component::OPMASK != 0 {
            self.activate(component::OPMASK);
            self.bytes[l.opmask + 8 * i..][..8].copy_from_slice(&v.to_le_bytes());
        }
    }

    /// ZMM(i), little-endian; parts the host does not have read as zero.
    pub fn zmm(&self, i: usize) -> [u8; 64] {
        let mut z = [0; 64];
        for (part, at, len, bit) in pieces(i) {
            if self.xstate_bv() & Layout::host().components & bit != 0 {
                z[part..part + len].copy_from_slice(&self.bytes[at..at + len]);
            }
        }
        z
    }

    /// Sets ZMM(i); parts the host does not have are dropped.
    pub fn set_zmm(&mut self, i: usize, v: [u8; 64]) {
        for (part, at, len, bit) in pieces(i) {
            if Layout::host().components & bit != 0 {
                self.activate(bit);
                self.bytes[at..at + len].copy_from_slice(&v[part..part + len]);
            }
        }
    }

    /// The x87 and SSE control part in a comparable form: control, status, tags, FOP, FIP, FDP, ST0-7, MXCSR.
    #[allow(clippy::type_complexity)]
    pub fn legacy(&self) -> (u16, u16, u8, u16, u64, u64, [[u8; 10]; 8], u32) {
        let st = std::array::from_fn(|i| self.st(i));
        (self.fcw(), self.fsw(), self.ftw_abridged(), self.fop(), self.fip(), self.fdp(), st, self.mxcsr())
    }
}

/// Where ZMM(i) lies: offset in the register, offset in the image, length, component.
pub fn pieces(i: usize) -> impl Iterator<Item = (usize, usize, usize, u64)> {
    let l = Layout::host();
    let low = [
        (0, Layout::XMM + 16 * i, 16, component::SSE),
        (16, l.avx + 16 * i, 16, component::AVX),
        (32, l.zmm_hi256 + 32 * i, 32, component::ZMM_HI256),
    ];
    let high = (0, l.hi16_zmm + 64 * (i.saturating_sub(16)), 64, component::HI16_ZMM);
    low.into_iter().filter(move |_| i < 16).chain((i >= 16).then_some(high))
}
