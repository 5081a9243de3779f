//! The architectural state of one logical processor: no cache, no host pointer, no lazy flag.

use crate::cpu::{Attr, Cr0, Cr4, Efer, Msrs, Rflags, Segment, Table, XsaveArea};
use crate::isa::{Gpr, Seg, Width};

/// The operating mode, by CR0.PE, RFLAGS.VM, EFER.LMA, CS.L and CS.D (SDM 3A 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Real-address mode.
    Real,
    /// Virtual-8086 mode.
    Virtual8086,
    /// Protected mode, 16-bit code.
    Protected16,
    /// Protected mode, 32-bit code.
    Protected32,
    /// Compatibility mode, 16-bit code.
    Compat16,
    /// Compatibility mode, 32-bit code.
    Compat32,
    /// 64-bit mode.
    Long64,
}

impl Mode {
    /// 16, 32 or 64.
    pub fn bitness(self) -> u32 {
        match self {
            Mode::Real | Mode::Virtual8086 | Mode::Protected16 | Mode::Compat16 => 16,
            Mode::Protected32 | Mode::Compat32 => 32,
            Mode::Long64 => 64,
        }
    }

    /// Real or virtual-8086: segments are 16 times the selector.
    pub fn is_real_like(self) -> bool {
        matches!(self, Mode::Real | Mode::Virtual8086)
    }
}

/// What the processor is doing (SDM 3C 24.4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum Activity {
    /// Executing instructions.
    #[default]
    Active,
    /// HLT, until an interrupt.
    Halted,
    /// Triple fault.
    Shutdown,
}

/// The registers. `#[repr(C)]`: generated code reads and writes fields by offset.
#[derive(Clone, Debug, PartialEq)]
#[repr(C)]
pub struct CpuState {
    /// General-purpose registers in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer (offset in CS; linear in 64-bit mode).
    pub rip: u64,
    /// Flags; bit 1 always set.
    pub rflags: Rflags,
    /// ES CS SS DS FS GS.
    pub seg: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: Table,
    /// Interrupt descriptor table register.
    pub idtr: Table,
    /// CR0.
    pub cr0: Cr0,
    /// CR2: address of the last page fault.
    pub cr2: u64,
    /// CR3: root of the page tables, PCID.
    pub cr3: u64,
    /// CR4.
    pub cr4: Cr4,
    /// CR8: task priority, 4 bits.
    pub cr8: u64,
    /// XCR0: state components enabled for XSAVE.
    pub xcr0: u64,
    /// EFER.
    pub efer: Efer,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// Other MSRs.
    pub msr: Msrs,
    /// Interrupts and debug traps are held for one instruction (STI, MOV SS, POP SS).
    pub interrupt_shadow: bool,
    /// The shadow is that of MOV SS or POP SS: it holds debug exceptions too.
    pub ss_shadow: bool,
    /// Data breakpoints that the load of SS hit, as bits of DR6: they are reported after the next instruction.
    pub pending_debug: u64,
    /// NMIs are held until IRET.
    pub nmi_blocked: bool,
    /// Active, halted or shut down.
    pub activity: Activity,
    /// x87, SSE, AVX, AVX-512 registers as an XSAVE image.
    pub xsave: XsaveArea,
}

impl Default for CpuState {
    fn default() -> CpuState {
        CpuState::reset()
    }
}

impl CpuState {
    /// After RESET (SDM 3A table 10-1): real mode at F000:FFF0.
    pub fn reset() -> CpuState {
        let mut cs = Segment::real(0xf000);
        cs.base = 0xffff_0000;
        cs.attr = Attr::from_bits_retain(0x9b);
        let mut seg = [Segment::real(0); 6];
        seg[Seg::Cs as usize] = cs;
        CpuState {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: Rflags::FIXED,
            seg,
            ldtr: Segment { limit: 0xffff, attr: Attr::from_bits_retain(0x82), ..Segment::default() },
            tr: Segment { limit: 0xffff, attr: Attr::from_bits_retain(0x8b), ..Segment::default() },
            gdtr: Table { base: 0, limit: 0xffff },
            idtr: Table { base: 0, limit: 0xffff },
            cr0: Cr0::CD | Cr0::NW | Cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: Cr4::empty(),
            cr8: 0,
            xcr0: 1,
            efer: Efer::empty(),
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            msr: Msrs::default(),
            interrupt_shadow: false,
            ss_shadow: false,
            pending_debug: 0,
            nmi_blocked: false,
            activity: Activity::Active,
            xsave: XsaveArea::default(),
        }
    }

    /// 64-bit mode with flat segments at the given privilege level, as an operating system leaves it: paging on, SSE and XSAVE
    /// enabled. CR3, the tables and RIP are the caller's. At CPL 3 the selectors are Linux's (CS 0x33, SS 0x2b, data 0).
    pub fn long64(cpl: u8) -> CpuState {
        let mut s = CpuState::reset();
        s.rip = 0;
        s.cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::AM | Cr0::PG;
        s.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE | Cr4::FSGSBASE;
        s.efer = Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE;
        s.xcr0 = xsave_components();
        let (code, data) = if cpl == 3 { (0x33, 0x2b) } else { (0x10, 0x18) };
        s.seg = [Segment::data32(data, cpl); 6];
        s.seg[Seg::Cs as usize] = Segment::code64(code, cpl);
        if cpl == 3 {
            for i in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
                s.seg[i as usize] = Segment::unusable(0);
            }
        }
        s
    }

    /// The operating mode.
    pub fn mode(&self) -> Mode {
        let attr = self.seg[Seg::Cs as usize].attr;
        let big = attr.contains(Attr::DB);
        if !self.cr0.contains(Cr0::PE) {
            Mode::Real
        } else if self.efer.contains(Efer::LMA) {
            match (attr.contains(Attr::L), big) {
                (true, _) => Mode::Long64,
                (false, true) => Mode::Compat32,
                (false, false) => Mode::Compat16,
            }
        } else if self.rflags.contains(Rflags::VM) {
            Mode::Virtual8086
        } else if big {
            Mode::Protected32
        } else {
            Mode::Protected16
        }
    }

    /// The current privilege level: SS.DPL (SDM 3C 24.4.1); 0 in real mode, 3 in virtual-8086 mode.
    #[inline(always)]
    pub fn cpl(&self) -> u8 {
        if !self.cr0.contains(Cr0::PE) {
            0
        } else if self.rflags.contains(Rflags::VM) && !self.efer.contains(Efer::LMA) {
            3
        } else {
            self.seg[Seg::Ss as usize].attr.dpl()
        }
    }

    /// The low bits of a register.
    #[inline(always)]
    pub fn read(&self, r: Gpr, w: Width) -> u64 {
        w.cut(self.gpr[r as usize])
    }

    /// Writes a register: 8- and 16-bit writes keep the rest, 32-bit writes clear bits 63:32 (SDM 1 3.4.1.1).
    #[inline(always)]
    pub fn write(&mut self, r: Gpr, w: Width, v: u64) {
        let slot = &mut self.gpr[r as usize];
        *slot = match w {
            Width::B | Width::W => (*slot & !w.mask()) | w.cut(v),
            Width::D | Width::Q => w.cut(v),
        };
    }

    /// A segment register.
    #[inline(always)]
    pub fn segment(&self, s: Seg) -> &Segment {
        &self.seg[s as usize]
    }
}

/// The state components this host can hold for a guest (XCR0 bits): x87, SSE, AVX, AVX-512.
pub fn xsave_components() -> u64 {
    crate::cpu::xsave::Layout::host().components
}
