//! System mode: a machine's guest RAM behind page tables, code of 64-bit mode and flat 32-bit code at CPL 0 and 3.
//!
//! | module | holds |
//! | --- | --- |
//! | `access` | memory accesses |
//! | [`block`] | guest code, decoded inside one page, with what lowering wants to know |
//! | [`lower`] | guest block to host code |
//! | [`area`] | slots, inline TLB, code map and branch targets, reached through GS (unsafe) |
//! | [`tlb`] | the inline TLB |
//! | [`mirror`] | user pages mapped on the host, which spare long-running code the TLB (unsafe) |
//! | [`cache`] | blocks by address and mode, links, invalidation; `fast`: branch targets of code that uses the mirror |
//! | [`enter`] | the way in and out (unsafe) |
//! | `narrow` | 32-bit code: when it is translated, and what is different about its instructions |
//! | [`run`] | the dispatch loop; `calls`: instructions that the interpreter does; `gates`: SYSCALL, SYSRET, IN and OUT that stay in the cache; `image`: the x87 and vector state; `mirror`: when it is used; `miss`: what the inline TLB does not have |
//!
//! One virtual CPU has one cache, and only its thread touches it, so nothing is locked.
//!
//! A block is known by linear address, guest-physical address and [`Mode`], and lives as long as its bytes: changes of mappings do not
//! touch it. Inside a page, jumps lead straight from block to block. Into another page they first ask the code map, one number for each
//! linear page, whether the page is still mapped to the physical page the target was made from; flushing the code map is all that a
//! write of CR3 costs. Indirect branches look their target up in a cache by linear address, and what they arrive at asks the code map.
//! Code that uses the mirror asks nothing: its jumps to other pages are taken back, and its table of branch targets emptied, when a mapping
//! changes.
//!
//! Guest registers are the host's; three of them are borrowed for an access, the guest's value in a slot until the block needs it or
//! ends. Status flags stay in EFLAGS until a probe would destroy them, and are then kept in a slot if they still matter. Flags that
//! only the frame of an exception would show are told from what their instruction left in registers, in this block or in the one before
//! ([`lower::Told`]); where that cannot be they are kept.

mod access;
pub mod area;
pub mod block;
pub mod cache;
pub mod enter;
mod handler;
pub(crate) mod hash;
pub mod lower;
pub mod mirror;
mod narrow;
pub mod run;
pub mod tlb;
mod walk;
mod xsave;

use bivisor_emulator::cpu::{Activity, CpuState, Cr0, Cr4, Rflags};

/// What translated code takes for granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mode(u16);

impl Mode {
    const USER: u16 = 1;
    const AC: u16 = 2;
    const DOWN: u16 = 4;
    const VECTORS: u16 = 3;
    const COUNTED: u16 = 0x20;
    const SINGLE: u16 = 0x40;
    const NO_TIME: u16 = 0x80;
    const SMAP: u16 = 0x100;
    const MIRRORED: u16 = 0x200;
    const NARROW: u16 = 0x400;
    const COMPAT: u16 = 0x800;
    const FS: u16 = 0x1000;
    const GS: u16 = 0x2000;

    /// Of the state as it is; `None` if the interpreter must go on. At most the instructions of level `most` (see [`Mode::vectors`]) are
    /// translated.
    pub fn of(s: &CpuState, most: u16) -> Option<Mode> {
        Control::of(s)?.mode(s, most)
    }

    /// The same, for blocks whose instructions are counted: none leads straight to another.
    pub fn counted(self) -> Mode {
        Mode(self.0 | Mode::COUNTED)
    }

    /// The same, for blocks of one instruction.
    pub fn single(self) -> Mode {
        Mode(self.0 | Mode::COUNTED | Mode::SINGLE)
    }

    /// CPL 3?
    pub fn user(self) -> bool {
        self.0 & Mode::USER != 0
    }

    /// RFLAGS.DF?
    pub fn down(self) -> bool {
        self.0 & Mode::DOWN != 0
    }

    /// May RDTSC be executed?
    pub fn time(self) -> bool {
        self.0 & Mode::NO_TIME == 0
    }

    /// Do blocks leave instead of going on?
    pub fn is_counted(self) -> bool {
        self.0 & Mode::COUNTED != 0
    }

    /// So seldom that indirect branches leave, and have no cache of their targets.
    pub fn is_rare(self) -> bool {
        self.down() || self.0 & Mode::AC != 0 && self.vectors() > 0
    }

    /// One instruction a block?
    pub fn is_single(self) -> bool {
        self.0 & Mode::SINGLE != 0
    }

    /// The same, for code of CPL 3 that accesses memory in the mirror.
    pub fn mirrored(self) -> Mode {
        Mode(self.0 | Mode::MIRRORED)
    }

    /// Does it access memory in the mirror?
    pub fn is_mirrored(self) -> bool {
        self.0 & Mode::MIRRORED != 0
    }

    /// 32-bit code with flat segments?
    #[inline(always)]
    pub fn is_narrow(self) -> bool {
        self.0 & Mode::NARROW != 0
    }

    /// 32-bit code in IA-32e mode, where pages above 4 GiB may be mapped?
    pub fn is_compat(self) -> bool {
        self.0 & Mode::COMPAT != 0
    }

    /// May 32-bit code access all offsets through FS (`false`) or GS (`true`)?
    pub fn has_segment(self, gs: bool) -> bool {
        self.0 & if gs { Mode::GS } else { Mode::FS } != 0
    }

    /// The registers that the guest has no names for, as bits: their values stay in their slots.
    #[inline(always)]
    pub fn resident(self) -> u16 {
        if self.is_narrow() { 0xff00 } else { 0 }
    }

    /// RFLAGS.AC, where that is known.
    pub fn alignment(self) -> Option<bool> {
        (self.0 & Mode::SMAP != 0).then_some(self.0 & Mode::AC != 0)
    }

    /// The same with the other RFLAGS.AC.
    pub fn other_alignment(self) -> Mode {
        Mode(self.0 ^ Mode::AC)
    }

    /// 0: neither x87 nor SIMD; 1: x87 to SSE; 2: AVX too; 3: AVX-512 too.
    pub fn vectors(self) -> u16 {
        self.0 >> Mode::VECTORS & 3
    }

    /// Which TLB its accesses ask.
    pub fn context(self) -> usize {
        match (self.user(), self.0 & Mode::AC != 0) {
            (true, _) => 0,
            (false, false) => 1,
            (false, true) => 2,
        }
    }
}

/// What modes depend on that only a few instructions change.
#[derive(Clone, Copy, Debug)]
pub struct Control {
    vectors: u16,
    alignment: bool,
    smap: bool,
    no_time: bool,
}

impl Control {
    /// Of the state as it is; `None`: the interpreter must go on.
    pub fn of(s: &CpuState) -> Option<Control> {
        let plain = s.dr7 & 0xff == 0 && !s.cr4.contains(Cr4::LA57);
        plain.then(|| Control {
            vectors: vectors(s),
            alignment: s.cr0.contains(Cr0::AM),
            smap: s.cr4.contains(Cr4::SMAP),
            no_time: s.cr4.contains(Cr4::TSD),
        })
    }

    /// The mode: see [`Mode::of`].
    #[inline]
    pub fn mode(&self, s: &CpuState, most: u16) -> Option<Mode> {
        const NEVER: Rflags = Rflags::TF.union(Rflags::RF).union(Rflags::VM);
        let canonical = ((s.rip << 16) as i64 >> 16) as u64 == s.rip;
        let cpl = s.cpl();
        let ac = s.rflags.contains(Rflags::AC);
        let segments = match s.mode() {
            bivisor_emulator::cpu::Mode::Long64 => 0,
            _ => narrow::segments(s)?,
        };
        let plain = s.activity == Activity::Active
            && !s.rflags.intersects(NEVER)
            && !s.interrupt_shadow
            && canonical
            && !(ac && cpl == 3 && self.alignment)
            && matches!(cpl, 0 | 3);
        if !plain {
            return None;
        }
        let mut mode = segments | if cpl == 3 { Mode::USER } else { 0 };
        if cpl == 0 && self.smap {
            mode |= Mode::SMAP | if ac { Mode::AC } else { 0 };
        }
        if s.rflags.contains(Rflags::DF) {
            mode |= Mode::DOWN;
        }
        if cpl == 3 && self.no_time {
            mode |= Mode::NO_TIME;
        }
        Some(Mode(mode | self.vectors.min(most) << Mode::VECTORS))
    }
}

/// What the control registers allow: see [`Mode::vectors`].
fn vectors(s: &CpuState) -> u16 {
    let enabled = !s.cr0.intersects(Cr0::TS | Cr0::EM)
        && s.cr0.contains(Cr0::NE)
        && s.cr4.contains(Cr4::OSFXSR.union(Cr4::OSXMMEXCPT))
        && s.xsave.mxcsr() & !0xffff == 0;
    match (enabled, s.cr4.contains(Cr4::OSXSAVE)) {
        (false, _) => 0,
        (true, true) if s.xcr0 & 0xe7 == 0xe7 => 3,
        (true, true) if s.xcr0 & 7 == 7 => 2,
        (true, _) => 1,
    }
}
