//! Two processors' states side by side: every register a program can see.

use bivisor_emulator::cpu::{CpuState, Rflags, XsaveArea};
use bivisor_emulator::isa::{Gpr, Seg};
use iced_x86::{Decoder, DecoderOptions, Instruction};

/// A register or a piece of memory that is not the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// What.
    pub what: String,
    /// The reference's.
    pub reference: String,
    /// The tested engine's.
    pub tested: String,
}

/// Compares what user code sees, without flags of `undefined`.
pub fn same(a: &CpuState, b: &CpuState, undefined: Rflags) -> bool {
    a.gpr == b.gpr
        && a.rip == b.rip
        && ((a.rflags ^ b.rflags) - undefined).is_empty()
        && a.seg == b.seg
        && same_vectors(&a.xsave, &b.xsave)
}

/// Registers, whatever form the image has them in.
fn same_vectors(a: &XsaveArea, b: &XsaveArea) -> bool {
    (a.xstate_bv() == b.xstate_bv() && a.bytes[..] == b.bytes[..])
        || a.legacy() == b.legacy()
            && (0..32).all(|i| a.zmm(i) == b.zmm(i))
            && (0..8).all(|i| a.opmask(i) == b.opmask(i))
}

/// As [`same`] for machines: system registers, too.
pub fn same_system(a: &CpuState, b: &CpuState) -> bool {
    system(a) == system(b)
}

fn number(v: impl std::fmt::LowerHex) -> String {
    format!("{v:#x}")
}

fn wide(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().rev().map(|b| format!("{b:02x}")).collect();
    format!("0x{digits}")
}

fn user(s: &CpuState) -> Vec<(String, String)> {
    let mut out: Vec<(String, String)> =
        Gpr::ALL.iter().map(|r| (r.name().to_owned(), number(s.gpr[*r as usize]))).collect();
    out.push(("rip".into(), number(s.rip)));
    out.push(("rflags".into(), format!("{:#x} {:?}", s.rflags.bits(), s.rflags - Rflags::FIXED)));
    for seg in Seg::ALL {
        let v = s.segment(seg);
        let text = format!("{:#x} base {:#x} limit {:#x} attr {:#x}", v.selector, v.base, v.limit, v.attr.bits());
        out.push((Seg::NAMES[seg as usize].into(), text));
    }
    let x = &s.xsave;
    let words = [("fcw", x.fcw()), ("fsw", x.fsw()), ("ftw", u16::from(x.ftw_abridged())), ("fop", x.fop())];
    out.extend(words.map(|(n, v)| (n.to_owned(), number(v))));
    out.extend([("fip", x.fip()), ("fdp", x.fdp())].map(|(n, v)| (n.to_owned(), number(v))));
    out.push(("mxcsr".into(), number(x.mxcsr())));
    out.extend((0..8).map(|i| (format!("st{i}"), wide(&x.st(i)))));
    out.extend((0..32).map(|i| (format!("zmm{i}"), wide(&x.zmm(i)))));
    out.extend((0..8).map(|i| (format!("k{i}"), number(x.opmask(i)))));
    out
}

fn system(s: &CpuState) -> Vec<(String, String)> {
    let plain = [
        ("cr0", s.cr0.bits()),
        ("cr2", s.cr2),
        ("cr3", s.cr3),
        ("cr4", s.cr4.bits()),
        ("cr8", s.cr8),
        ("xcr0", s.xcr0),
        ("efer", s.efer.bits()),
        ("dr6", s.dr6),
        ("dr7", s.dr7),
    ];
    let mut out: Vec<(String, String)> = plain.map(|(n, v)| (n.to_owned(), number(v))).into();
    out.push(("dr0-3".into(), format!("{:x?}", s.dr)));
    out.push(("gdtr, idtr".into(), format!("{:x?} {:x?}", s.gdtr, s.idtr)));
    out.push(("ldtr, tr".into(), format!("{:x?} {:x?}", s.ldtr, s.tr)));
    out.push(("msrs".into(), format!("{:x?}", s.msr)));
    let held = (s.interrupt_shadow, s.ss_shadow, s.pending_debug, s.nmi_blocked, s.activity);
    out.push(("shadows, pending, activity".into(), format!("{held:x?}")));
    out
}

/// Everything that differs, `undefined` flags left out; of the system registers if `machine`.
pub fn changes(reference: &CpuState, tested: &CpuState, undefined: Rflags, machine: bool) -> Vec<Change> {
    let (mut a, mut b) = (user(reference), user(tested));
    if machine {
        a.extend(system(reference));
        b.extend(system(tested));
    }
    let flags = ((reference.rflags ^ tested.rflags) - undefined).is_empty();
    let pairs = a.into_iter().zip(b).filter(|(a, b)| a.1 != b.1 && !(flags && a.0 == "rflags"));
    pairs.map(|((what, reference), (_, tested))| Change { what, reference, tested }).collect()
}

/// The status flags that the manual leaves open after these instructions, each given by its address and bytes.
pub fn undefined<'a>(instructions: impl Iterator<Item = (u64, &'a [u8])>, bitness: u32) -> Rflags {
    let mut open = 0;
    for (ip, bytes) in instructions {
        let mut insn = Instruction::default();
        Decoder::with_ip(bitness, bytes, ip, DecoderOptions::NONE).decode_out(&mut insn);
        let set = insn.rflags_modified() & !insn.rflags_undefined();
        open = (open & !set) | insn.rflags_undefined();
    }
    Rflags::status_from_iced(open)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_compared() {
        let a = CpuState::long64(3);
        let differs = |change: fn(&mut CpuState), what: &str| {
            let mut b = a.clone();
            change(&mut b);
            assert!(!same(&a, &b, Rflags::empty()), "{what}");
            let found = changes(&a, &b, Rflags::empty(), false);
            assert!(found.iter().any(|c| c.what == what), "{what}: {found:?}");
        };
        differs(|s| s.gpr[11] = 1, "r11");
        differs(|s| s.rip = 1, "rip");
        differs(|s| s.rflags.insert(Rflags::AF), "rflags");
        differs(|s| s.seg[Seg::Fs as usize].base = 1, "fs");
        differs(|s| s.xsave.set_st(3, [1; 10]), "st3");
        differs(|s| s.xsave.set_mxcsr(0x1fa0), "mxcsr");
        differs(|s| s.xsave.set_zmm(9, [7; 64]), "zmm9");
        let mut b = a.clone();
        b.rflags.insert(Rflags::AF);
        assert!(same(&a, &b, Rflags::AF) && changes(&a, &b, Rflags::AF, false).is_empty());
        b.cr2 = 8;
        assert!(!same_system(&a, &b) && changes(&a, &b, Rflags::AF, true).len() == 1);
    }

    #[test]
    fn flags_are_open_until_something_sets_them() {
        // and eax, ebx; then mul rbx; then add eax, ebx
        let code: [&[u8]; 3] = [&[0x21, 0xd8], &[0x48, 0xf7, 0xe3], &[0x01, 0xd8]];
        let after = |n: usize| undefined(code[..n].iter().map(|c| (0, *c)), 64);
        assert_eq!(after(1), Rflags::AF);
        assert_eq!(after(2), Rflags::AF | Rflags::PF | Rflags::SF | Rflags::ZF);
        assert_eq!(after(3), Rflags::empty());
    }
}
