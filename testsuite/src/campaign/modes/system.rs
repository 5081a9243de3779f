//! Cases of 16- and 32-bit code where a host CPU does not run it for a user: at CPL 0, in real mode (SDM 3A 22.1), in virtual-8086 mode
//! (SDM 3A 22.2). Interpreter and translator run them; for what is the same there as in user code the host CPU is the judge all the same,
//! with the bases of its segments further up.

use super::engine::{ORDER, is_same_in_legacy_mode};
use super::segments::{self, segment};
use crate::campaign::arena::{self, BASE};
use crate::campaign::case::{Case, Kind};
use crate::campaign::never_decodes;
use crate::campaign::outcome::{End, Outcome};
use crate::campaign::reason_against;
use crate::random::Random;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{Attr, CpuState, Cr0, Efer, Fault, Rflags, Segment, Table};
use bivisor_emulator::isa::{Gpr, decode};
use bivisor_emulator::vcpu::Exit;
use iced_x86::{Code, EncodingKind, Mnemonic as M, Register};

/// The instructions of such code.
pub fn codes(bits: u32) -> Vec<Code> {
    let model = CpuModel::host();
    let decodes = |c: &Code| if bits == 32 { c.op_code().mode32() } else { c.op_code().mode16() };
    let wanted = |c: &Code| decodes(c) && c.op_code().is_instruction() && model.supports(*c) && !never_decodes(*c);
    Code::values().filter(wanted).collect()
}

/// Does the instruction of a case do the same as in user code, which the host CPU runs? VEX and EVEX are no prefixes in modes with real-mode
/// addresses (SDM 2A 2.3.1).
pub fn is_judged(case: &Case) -> bool {
    let vex = matches!(case.insn.op_code().encoding(), EncodingKind::VEX | EncodingKind::EVEX | EncodingKind::XOP);
    let flat = matches!(case.kind, Kind::Real | Kind::Virtual);
    // Bytes that are no instruction here may be one of those there; and the code segment can be written.
    let other = || decode(&case.code, 16).map_or(true, |i| i.iced.memory_segment() == Register::CS);
    is_same_in_legacy_mode(case.insn) && reason_against(case.insn).is_none() && !(flat && (vex || other()))
}

/// What a segment register of the case holds in its mode, and what its selector is there.
pub fn held(kind: Kind, selector: u16) -> Option<Segment> {
    let s = segment(selector)?;
    Some(match kind {
        Kind::Kernel32 | Kind::Kernel16 if s.attr.contains(Attr::UNUSABLE) => s,
        Kind::Kernel32 | Kind::Kernel16 => Segment { attr: s.attr & !Attr::DPL, selector: selector & !3, ..s },
        Kind::Real | Kind::Virtual => {
            let base = s.base.wrapping_sub(BASE);
            let v86 = kind == Kind::Virtual;
            let attr = Attr::from_bits_retain(if v86 { 0xf3 } else { 0x93 });
            Segment { base, limit: if v86 { 0xffff } else { s.limit }, attr, selector: (base >> 4) as u16 }
        }
        _ => s,
    })
}

/// Segments for data and stacks in real and virtual-8086 mode. In real mode limits may be others than 64 KiB.
pub fn data(kind: Kind) -> &'static [u16] {
    const REAL: [u16; 6] = [
        segments::selector(5),
        segments::selector(5),
        segments::selector(6),
        segments::selector(7),
        segments::selector(13),
        segments::selector(15),
    ];
    if kind == Kind::Real { &REAL } else { &REAL[..3] }
}

/// A selector of user code as it is in the mode, mostly.
pub fn selector(r: &mut Random, kind: Kind, selector: u16) -> u16 {
    if !kind.is_system() || r.once_in(8) {
        return selector;
    }
    held(kind, selector).map_or(selector, |s| s.selector)
}

/// MSRs that are there, and some that are not.
const MSRS: [u32; 24] = [
    0x10,
    0x17,
    0x1b,
    0x3a,
    0x79,
    0x8b,
    0xfe,
    0x174,
    0x175,
    0x176,
    0x179,
    0x17a,
    0x1a0,
    0x1d9,
    0x200,
    0x250,
    0x277,
    0x2ff,
    0x400,
    0x6e0,
    0xc000_0080,
    0xc000_0081,
    0xc000_0100,
    0xc001_0015,
];

/// Sets the operands of instructions for kernels so that they do something, mostly.
pub fn aim(r: &mut Random, case: &mut Case) {
    let Ok(insn) = decode(&case.code, case.kind.bits()) else { return };
    let (to, from) = (insn.iced.op0_register(), Gpr::from_iced(insn.iced.op1_register()));
    let bit = 1 << r.below(32);
    match (insn.iced.mnemonic(), from) {
        _ if r.once_in(8) => {}
        (M::Mov, Some(from)) if to.is_cr() => {
            case.gpr[from as usize] = match to.number() {
                0 => (if case.kind == Kind::Real { 0x10 } else { 0x8005_0033 }) ^ bit & 0x6005_003f,
                4 => 0x20 ^ bit,
                3 => arena::TABLES + 0x7000 + r.below(3) * 0x20,
                _ => r.below(16),
            }
        }
        (M::Mov, Some(from)) if to.is_dr() => {
            case.gpr[from as usize] &= if r.once_in(2) { 0xffff } else { 0xffff_ffff }
        }
        (M::Rdmsr | M::Wrmsr, _) => {
            case.gpr[Gpr::Rcx as usize] = r.one_of(&MSRS).into();
            if r.once_in(2) {
                case.gpr[Gpr::Rax as usize] &= 0xfff;
                case.gpr[Gpr::Rdx as usize] = 0;
            }
        }
        (M::Xsetbv, _) => {
            let c = [0, 1 | r.below(8), 0];
            for (g, v) in [Gpr::Rcx, Gpr::Rax, Gpr::Rdx].into_iter().zip(c) {
                case.gpr[g as usize] = v;
            }
        }
        _ => {}
    }
}

/// The state in which a case starts, from that of user code outside IA-32e mode.
pub fn start(case: &Case, template: &CpuState, s: &mut CpuState) -> Option<()> {
    *s = template.clone();
    match case.kind {
        Kind::Real => {
            s.cr0 -= Cr0::PE | Cr0::PG;
            s.efer = Efer::empty();
            s.idtr = Table { base: 0, limit: 0x3ff };
        }
        Kind::Virtual => s.cr3 += LOW_POINTERS,
        // Descriptors that are no gates, and some that are.
        _ => s.idtr = Table { base: s.gdtr.base, limit: arena::GDT_LIMIT },
    }
    s.gpr = case.gpr;
    s.rip = case.rip;
    s.rflags = Rflags::from_bits_retain(case.rflags);
    s.rflags.set(Rflags::VM, case.kind == Kind::Virtual);
    for (reg, selector) in ORDER.into_iter().zip(case.selectors) {
        s.seg[reg as usize] = held(case.kind, selector)?;
    }
    s.seg[5] = match case.kind {
        Kind::Real | Kind::Virtual => s.seg[3],
        _ => Segment::unusable(0),
    };
    s.xsave.bytes.copy_from_slice(&case.xsave.bytes);
    Some(())
}

/// From the page-directory pointers of user code to those of virtual-8086 mode.
pub const LOW_POINTERS: u64 = 0x20;

/// The exception as the host CPU reports it for the same in user code.
pub fn as_user(kind: Kind, fault: Fault) -> Fault {
    match (kind, fault) {
        (Kind::Real | Kind::Virtual, Fault::Pf { addr, code }) => Fault::Pf { addr: addr.wrapping_add(BASE), code },
        (Kind::Kernel32 | Kind::Kernel16, Fault::Pf { addr, code }) => Fault::Pf { addr, code: code | 4 },
        (_, other) => other,
    }
}

/// Is the outcome on the host CPU one that the mode can have? Without paging there are no page faults.
pub fn can_be(case: &Case, judge: &Outcome) -> bool {
    case.kind != Kind::Real || !matches!(judge.end, End::Fault(Fault::Pf { .. }))
}

/// All that an instruction can change besides what an [`Outcome`] has, as text.
pub fn description(exit: &Exit, s: &CpuState, ram: &[u8]) -> String {
    let segments = (&s.seg, &s.ldtr, &s.tr, &s.gdtr, &s.idtr);
    let registers = (s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.xcr0, s.efer, s.dr, s.dr6, s.dr7);
    let rest = (&s.msr, s.interrupt_shadow, s.ss_shadow, s.pending_debug, s.nmi_blocked, s.activity);
    format!("{exit:x?} {segments:x?} {registers:x?} {rest:x?} {:x}", sum(ram))
}

/// A sum of memory in which every byte counts.
fn sum(ram: &[u8]) -> u64 {
    let step = |h: u64, w: &[u8]| {
        let word = w.try_into().map_or(0, u64::from_le_bytes);
        (h ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    };
    ram.chunks_exact(8).fold(1, step)
}
