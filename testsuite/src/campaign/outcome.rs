//! What came out of a case, and the comparison of two outcomes: full state.

use super::arena::View;
use super::case::Case;
use crate::world::without_kernel;
use bivisor_emulator::cpu::xsave::{Layout, component};
use bivisor_emulator::cpu::{Fault, XsaveArea};
use bivisor_emulator::isa::Gpr;

/// Selectors of ES, CS, SS, DS, FS before a case: Linux's of 64-bit code.
pub const NORMAL: [u16; 5] = [0, 0x33, 0x2b, 0, 0];

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It came to a tail; RIP is the tail's address.
    Left,
    /// With an exception; RIP is what the handler would see.
    Fault(Fault),
}

/// After a case: registers, and the memory of its windows.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How.
    pub end: End,
    /// Instruction pointer.
    pub rip: u64,
    /// General registers.
    pub gpr: [u64; 16],
    /// Flags.
    pub rflags: u64,
    /// FS base.
    pub fs_base: u64,
    /// Selectors of ES, CS, SS, DS, FS.
    pub selectors: [u16; 5],
    /// x87 and vector registers.
    pub xsave: Box<XsaveArea>,
    /// The windows' bytes, one after the other.
    pub memory: Vec<u8>,
    /// What else changed, in words; empty if nothing.
    pub other: String,
}

impl Default for Outcome {
    fn default() -> Outcome {
        Outcome {
            end: End::Left,
            rip: 0,
            gpr: [0; 16],
            rflags: 0,
            fs_base: 0,
            selectors: NORMAL,
            xsave: Box::default(),
            memory: Vec::new(),
            other: String::new(),
        }
    }
}

/// A part of the state that can differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// One raised an exception, the other did not or another one, or with another error code or CR2.
    Fault,
    /// RIP.
    Rip,
    /// General registers.
    Gpr,
    /// RFLAGS.
    Flags,
    /// x87 control, status, tags, stack.
    X87,
    /// FOP, FIP, FDP.
    Pointers,
    /// MXCSR.
    Mxcsr,
    /// XMM, YMM, ZMM.
    Vector,
    /// Opmasks.
    Mask,
    /// Memory.
    Memory,
    /// Segments and system registers.
    Other,
}

impl Part {
    /// All of them.
    pub const ALL: [Part; 11] = [
        Part::Fault,
        Part::Rip,
        Part::Gpr,
        Part::Flags,
        Part::X87,
        Part::Pointers,
        Part::Mxcsr,
        Part::Vector,
        Part::Mask,
        Part::Memory,
        Part::Other,
    ];

    /// As reports and the list of expected divergences call it.
    pub fn name(self) -> &'static str {
        match self {
            Part::Fault => "fault",
            Part::Rip => "rip",
            Part::Gpr => "gpr",
            Part::Flags => "flags",
            Part::X87 => "x87",
            Part::Pointers => "pointers",
            Part::Mxcsr => "mxcsr",
            Part::Vector => "vector",
            Part::Mask => "mask",
            Part::Memory => "memory",
            Part::Other => "other",
        }
    }
}

/// Compares an outcome with the judge's: which part differs first, and how.
pub type Compare = fn(case: &Case, is: &Outcome, should: &Outcome) -> Option<(Part, String)>;

/// Without what a host does not say.
fn as_seen(end: End) -> End {
    match end {
        // Neither the vectors of #DB's causes nor a selector.
        End::Fault(Fault::Db(_)) => End::Fault(Fault::Db(0)),
        End::Fault(fault) => End::Fault(without_kernel(fault)),
        End::Left => End::Left,
    }
}

/// A thread switch of the host loses the RPL of a null selector.
fn without_null(selectors: [u16; 5]) -> [u16; 5] {
    selectors.map(|s| if s < 4 { 0 } else { s })
}

/// See [`Compare`]: everything.
pub fn compare(case: &Case, is: &Outcome, should: &Outcome) -> Option<(Part, String)> {
    if is.end != should.end && as_seen(is.end) != as_seen(should.end) {
        return Some((Part::Fault, format!("{:x?}, not {:x?}", is.end, should.end)));
    }
    if is.rip != should.rip {
        return Some((Part::Rip, format!("RIP is {:#x}, not {:#x}", is.rip, should.rip)));
    }
    if is.gpr != should.gpr
        && let Some(i) = (0..16).find(|&i| (is.gpr[i] ^ should.gpr[i]) & !case.free_gpr[i] != 0)
    {
        return Some((Part::Gpr, format!("{} is {:#x}, not {:#x}", Gpr::NAMES[i], is.gpr[i], should.gpr[i])));
    }
    if is.rflags != should.rflags {
        return Some((Part::Flags, format!("RFLAGS is {:#x}, not {:#x}", is.rflags, should.rflags)));
    }
    if is.fs_base != should.fs_base {
        return Some((Part::Other, format!("FS base is {:#x}, not {:#x}", is.fs_base, should.fs_base)));
    }
    if without_null(is.selectors) != without_null(should.selectors) {
        let (is, should) = (is.selectors, should.selectors);
        return Some((Part::Other, format!("ES, CS, SS, DS, FS are {is:x?}, not {should:x?}")));
    }
    if !same_image(&is.xsave, &should.xsave)
        && let Some(found) = image(&is.xsave, &should.xsave)
    {
        return Some(found);
    }
    if is.memory != should.memory {
        let at = case.windows.iter().flat_map(|w| w.0..w.0 + u64::from(w.1));
        let free = |a: &u64| case.free_memory.is_some_and(|(from, len)| (from..from + len).contains(a));
        let bytes = at.zip(is.memory.iter().zip(&should.memory));
        if let Some((addr, (a, b))) = bytes.into_iter().find(|(at, (a, b))| a != b && !free(at)) {
            return Some((Part::Memory, format!("byte at {addr:#x} is {a:#x}, not {b:#x}")));
        }
    }
    let wrong = is.other != should.other || !is.other.is_empty() && !case.kind.is_system();
    wrong.then(|| (Part::Other, format!("changed besides: {}", is.other)))
}

/// Are two images the same bytes where bytes mean something? If not they may still be equal as registers.
fn same_image(a: &XsaveArea, b: &XsaveArea) -> bool {
    let bv = a.xstate_bv();
    if bv != b.xstate_bv() || a.mxcsr() != b.mxcsr() {
        return false;
    }
    let l = Layout::host();
    let same = |bit: u64, at: usize, len: usize| bv & bit == 0 || a.bytes[at..at + len] == b.bytes[at..at + len];
    same(component::X87, 0, 24)
        && same(component::X87, 32, 128)
        && same(component::SSE, 160, 256)
        && same(component::AVX, l.avx, 256)
        && same(component::OPMASK, l.opmask, 64)
        && same(component::ZMM_HI256, l.zmm_hi256, 512)
        && same(component::HI16_ZMM, l.hi16_zmm, 1024)
}

/// How two images differ as registers.
pub fn image(a: &XsaveArea, b: &XsaveArea) -> Option<(Part, String)> {
    let x87 = |x: &XsaveArea| (x.fcw(), x.fsw(), x.ftw_abridged());
    if x87(a) != x87(b) {
        return Some((Part::X87, format!("FCW, FSW, tags are {:x?}, not {:x?}", x87(a), x87(b))));
    }
    if let Some(i) = (0..8).find(|&i| a.st(i) != b.st(i)) {
        return Some((Part::X87, format!("ST{i} is {:02x?}, not {:02x?}", a.st(i), b.st(i))));
    }
    let pointers = |x: &XsaveArea| (x.fop(), x.fip(), x.fdp());
    if pointers(a) != pointers(b) {
        return Some((Part::Pointers, format!("FOP, FIP, FDP are {:x?}, not {:x?}", pointers(a), pointers(b))));
    }
    if a.mxcsr() != b.mxcsr() {
        return Some((Part::Mxcsr, format!("MXCSR is {:#x}, not {:#x}", a.mxcsr(), b.mxcsr())));
    }
    if let Some(i) = (0..8).find(|&i| a.opmask(i) != b.opmask(i)) {
        return Some((Part::Mask, format!("k{i} is {:#x}, not {:#x}", a.opmask(i), b.opmask(i))));
    }
    let i = (0..32).find(|&i| a.zmm(i) != b.zmm(i))?;
    Some((Part::Vector, format!("zmm{i} is {:02x?}, not {:02x?}", a.zmm(i), b.zmm(i))))
}

/// Copies the case's windows out of memory.
pub fn take_memory(case: &Case, view: View, out: &mut Outcome) {
    let len: usize = case.windows.iter().map(|w| usize::from(w.1)).sum();
    out.memory.resize(len, 0);
    let mut at = 0;
    for &(addr, n) in &case.windows {
        let n = usize::from(n);
        view.read(addr, &mut out.memory[at..at + n]);
        at += n;
    }
}
