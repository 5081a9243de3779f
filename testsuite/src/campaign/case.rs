//! A case of a campaign: an instruction at an address, the registers before it, and the memory it may touch.

use super::arena::{self, View};
use super::modes::segments::segment;
use super::outcome::NORMAL;
use bivisor_emulator::cpu::XsaveArea;
use iced_x86::Code;

/// Kinds of cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A single instruction of 64-bit user code.
    Insn,
    /// Several of them, with branches and loops.
    Block,
    /// Any bytes at CPL 3, interpreter against translator on paged memory.
    Bytes,
    /// A sequence at CPL 0, the same two.
    Cpl0,
    /// A single instruction of 32-bit user code.
    Insn32,
    /// Of 16-bit protected-mode user code.
    Insn16,
    /// A block of 32-bit user code.
    Block32,
    /// Of 16-bit protected-mode user code.
    Block16,
    /// A single instruction of 32-bit code at CPL 0.
    Kernel32,
    /// Of 16-bit protected-mode code at CPL 0.
    Kernel16,
    /// In real mode.
    Real,
    /// In virtual-8086 mode.
    Virtual,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 12] = [
        Kind::Insn,
        Kind::Block,
        Kind::Bytes,
        Kind::Cpl0,
        Kind::Insn32,
        Kind::Insn16,
        Kind::Block32,
        Kind::Block16,
        Kind::Kernel32,
        Kind::Kernel16,
        Kind::Real,
        Kind::Virtual,
    ];
    /// Those of code that a host CPU does not run for a user.
    pub const SYSTEM: [Kind; 4] = [Kind::Kernel32, Kind::Kernel16, Kind::Real, Kind::Virtual];

    /// As options and reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Insn => "insn",
            Kind::Block => "block",
            Kind::Bytes => "bytes",
            Kind::Cpl0 => "cpl0",
            Kind::Insn32 => "insn32",
            Kind::Insn16 => "insn16",
            Kind::Block32 => "block32",
            Kind::Block16 => "block16",
            Kind::Kernel32 => "cpl0-32",
            Kind::Kernel16 => "cpl0-16",
            Kind::Real => "real16",
            Kind::Virtual => "v86",
        }
    }

    /// 16, 32 or 64: what code.
    pub fn bits(self) -> u32 {
        match self {
            Kind::Insn32 | Kind::Block32 | Kind::Kernel32 => 32,
            Kind::Insn16 | Kind::Block16 | Kind::Kernel16 | Kind::Real | Kind::Virtual => 16,
            _ => 64,
        }
    }

    /// One instruction?
    pub fn is_single(self) -> bool {
        matches!(self, Kind::Insn | Kind::Insn32 | Kind::Insn16) || self.is_system()
    }

    /// One of [`Kind::SYSTEM`]?
    pub fn is_system(self) -> bool {
        Kind::SYSTEM.contains(&self)
    }

    /// By name.
    pub fn named(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|k| k.name() == name)
    }
}

/// One run of one instruction.
#[derive(Clone, Debug)]
pub struct Case {
    /// iced's code of it; [`Code::INVALID`] if it is none.
    pub insn: Code,
    /// What kind of case.
    pub kind: Kind,
    /// Its bytes.
    pub code: Vec<u8>,
    /// Where it stands: an offset in CS.
    pub rip: u64,
    /// Selectors of ES, CS, SS, DS, FS.
    pub selectors: [u16; 5],
    /// General registers.
    pub gpr: [u64; 16],
    /// Flags.
    pub rflags: u64,
    /// FS base.
    pub fs_base: u64,
    /// x87 and vector registers.
    pub xsave: Box<XsaveArea>,
    /// Memory it may touch: address and length. All else in the arena must stay.
    pub windows: Vec<(u64, u16)>,
    /// What stands in memory instead of the batch's contents.
    pub puts: Vec<(u64, Vec<u8>)>,
    /// Bits of general registers that get what is the machine's own (CPUID, RDTSC): any value is good.
    pub free_gpr: [u64; 16],
    /// The same of memory: address and length.
    pub free_memory: Option<(u64, u64)>,
}

impl Default for Case {
    fn default() -> Case {
        Case {
            insn: Code::INVALID,
            kind: Kind::Insn,
            code: Vec::new(),
            rip: 0,
            selectors: NORMAL,
            gpr: [0; 16],
            rflags: 0x202,
            fs_base: 0,
            xsave: Box::default(),
            windows: Vec::new(),
            puts: Vec::new(),
            free_gpr: [0; 16],
            free_memory: None,
        }
    }
}

impl Case {
    /// The linear address of its code.
    pub fn linear(&self) -> u64 {
        match self.kind.bits() {
            64 => self.rip,
            _ => self.rip.wrapping_add(segment(self.selectors[1]).map_or(0, |s| s.base)) & 0xffff_ffff,
        }
    }

    /// Adds the mapped part of a range to the windows.
    pub fn window(&mut self, start: u64, end: u64) {
        for (page, len, _) in arena::PAGES.into_iter().filter(|p| p.0 >= arena::DATA) {
            let (from, to) = (start.max(page), end.min(page + len));
            if from < to {
                self.windows.push((from, (to - from) as u16));
            }
        }
    }

    /// Puts bytes into data memory; what of them lies outside is dropped.
    pub fn put(&mut self, addr: u64, bytes: &[u8]) {
        for (page, len, _) in arena::PAGES.into_iter().filter(|p| p.0 >= arena::DATA) {
            let (from, to) = (addr.max(page), (addr + bytes.len() as u64).min(page + len));
            if from < to {
                self.puts.push((from, bytes[(from - addr) as usize..(to - addr) as usize].to_vec()));
            }
        }
        self.window(addr, addr + bytes.len() as u64);
    }

    /// Sets the memory up.
    pub fn fill(&self, view: View, pristine: &[u8]) {
        self.clean(view, pristine);
        for (addr, bytes) in &self.puts {
            view.write(*addr, bytes);
        }
    }

    /// Puts the batch's contents back.
    pub fn clean(&self, view: View, pristine: &[u8]) {
        for &(addr, len) in &self.windows {
            let at = (addr - arena::BASE) as usize;
            view.write(addr, &pristine[at..at + usize::from(len)]);
        }
    }
}
