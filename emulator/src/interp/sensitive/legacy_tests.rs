//! Protected and virtual-8086 mode without IA-32e mode: gates with parameters, stacks from a 32-bit TSS, flags by IOPL and VME
//! (SDM 3A 5.8.5, 3B 20.2, 20.3).

use crate::cpu::{Attr, CpuState, Cr0, Cr4, Fault, Mode, Rflags, Segment, Table};
use crate::interp::alu::Vendor;
use crate::interp::testing::{CODE, Machine};
use crate::isa::{Gpr, Seg, Width};
use crate::vcpu::{Exit, Intercepts, Vcpu};

const GDT: u64 = 0x5000;
const TSS_BASE: u64 = 0x6000;
const IDT: u64 = 0x7000;
const STACK: u64 = 0x2_0000;
const INNER: u64 = 0x1_8000;

const KC: u16 = 0x08;
const KD: u16 = 0x10;
const UC: u16 = 0x18;
const UD: u16 = 0x20;
const GATE: u16 = 0x30;
const ABSENT: u16 = 0x38;

const RSP: usize = Gpr::Rsp as usize;

/// 32-bit protected mode without paging.
fn machine(cpl: u8, code: &[u8]) -> Machine {
    let mut m = Machine::long64(0, code);
    let entries: [u64; 8] = [
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x0000_8b00_6000_0067,
        0x0000_ec02_0008_9000, // call gate, DPL 3, two parameters, to 8:9000
        0x00cf_1300_0000_ffff,
    ];
    for (n, e) in (0..).zip(entries) {
        m.mem.store(GDT + 8 * n, Width::Q, e).expect("RAM");
    }
    m.mem.store(TSS_BASE + 4, Width::D, INNER).expect("RAM");
    m.mem.store(TSS_BASE + 8, Width::W, u64::from(KD)).expect("RAM");
    let mut s = CpuState::reset();
    s.cr0 = Cr0::PE | Cr0::ET;
    s.gdtr = Table { base: GDT, limit: 63 };
    s.idtr = Table { base: IDT, limit: 0x7ff };
    s.ldtr = Segment::unusable(0);
    s.tr = Segment { base: TSS_BASE, limit: 0x67, attr: Attr::from_bits_retain(0x8b), selector: 0x28 };
    let (cs, data) = if cpl == 0 { (KC, KD) } else { (UC | 3, UD | 3) };
    s.seg = [Segment::data32(data, cpl); 6];
    s.seg[Seg::Cs as usize] = Segment::code32(cs, cpl);
    s.rip = CODE;
    s.gpr[RSP] = STACK;
    *m.cpu() = s;
    m
}

/// The same in virtual-8086 mode: code at 0800:0000, stack at 1000:8000.
fn virtual8086(iopl: u64, code: &[u8]) -> Machine {
    let mut m = machine(3, code);
    let s = m.cpu();
    s.rflags = Rflags::FIXED | Rflags::VM | Rflags::from_bits_retain(iopl << 12);
    s.seg = [Segment { attr: Attr::from_bits_retain(0xf3), ..Segment::real(0x1000) }; 6];
    s.seg[Seg::Cs as usize] = Segment { attr: Attr::from_bits_retain(0xf3), ..Segment::real(0x0800) };
    s.rip = 0;
    s.gpr[RSP] = 0x8000;
    assert_eq!(s.mode(), Mode::Virtual8086);
    m
}

fn stack(m: &Machine, at: u64, values: &[u64]) {
    for (n, v) in (0..).zip(values) {
        m.mem.store(at + 4 * n, Width::D, *v).expect("RAM");
    }
}

fn frame(m: &Machine, at: u64, n: u64) -> Vec<u64> {
    (0..n).map(|n| m.load(at + 4 * n, Width::D)).collect()
}

const GP: Exit = Exit::Exception(Fault::Gp(0));

/// CALL 0x33:0 (9A) with two parameters on the outer stack, RET 8 back.
#[test]
fn call_gate_copies_parameters() {
    let mut m = machine(3, &[0x9a, 0, 0, 0, 0, GATE as u8 | 3, 0]);
    stack(&m, STACK, &[0x1111, 0x2222]);
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!((m.cpu().rip, m.cpu().cpl(), m.cpu().gpr[RSP]), (0x9000, 0, INNER - 24));
    assert_eq!(m.cpu().segment(Seg::Ss).selector, KD);
    assert_eq!(frame(&m, INNER - 24, 6), [CODE + 7, u64::from(UC | 3), 0x1111, 0x2222, STACK, u64::from(UD | 3)]);
    m.mem.write(0x9000, &[0xca, 8, 0]).expect("RAM");
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!((m.cpu().rip, m.cpu().cpl(), m.cpu().gpr[RSP]), (CODE + 7, 3, STACK + 8));
}

/// The stack segment of the TSS is bad: #TS, or #SS if it is not present, with its selector.
#[test]
fn inner_stack_faults() {
    for (ss, want) in [
        (0, Fault::Ts(0)),
        (KD | 3, Fault::Ts(KD)),
        (UD, Fault::Ts(UD)),
        (KC, Fault::Ts(KC)),
        (0xf8, Fault::Ts(0xf8)),
        (ABSENT, Fault::Ss(ABSENT)),
    ] {
        let mut m = machine(3, &[0x9a, 0, 0, 0, 0, GATE as u8 | 3, 0]);
        m.mem.store(TSS_BASE + 8, Width::W, u64::from(ss)).expect("RAM");
        let before = m.cpu().clone();
        assert_eq!(m.run(1), Exit::Exception(want), "{ss:#x}");
        assert_eq!(*m.cpu(), before, "{ss:#x}");
    }
}

/// IRETD to the same level pops three doublewords, to an outer one five.
#[test]
fn iretd() {
    let mut m = machine(0, &[0xcf]);
    stack(&m, STACK, &[0x9000, u64::from(KC), 0x202]);
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!((m.cpu().rip, m.cpu().gpr[RSP], m.cpu().rflags.bits()), (0x9000, STACK + 12, 0x202));
    let mut m = machine(0, &[0xcf]);
    stack(&m, STACK, &[0x9000, u64::from(UC | 3), 0x3202, 0x1_9000, u64::from(UD | 3)]);
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!((m.cpu().cpl(), m.cpu().gpr[RSP], m.cpu().rflags.bits()), (3, 0x1_9000, 0x3202));
    // Data segments of CPL 0 are gone.
    assert!(m.cpu().segment(Seg::Ds).attr.contains(Attr::UNUSABLE));
    // Beyond the limit of a 32-bit segment there is nothing; a null SS is an error.
    let mut m = machine(0, &[0xcf]);
    stack(&m, STACK, &[0x9000, u64::from(UC | 3), 2, 0x1_9000, 0]);
    assert_eq!(m.run(1), GP);
}

/// IRETD with VM set in the image at CPL 0: nine doublewords.
#[test]
fn to_virtual_8086_mode() {
    let mut m = machine(0, &[0xcf]);
    stack(&m, STACK, &[0x1234, 0x0800, 0x2_3202, 0x8000, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000]);
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!((m.cpu().mode(), m.cpu().cpl(), m.cpu().rip), (Mode::Virtual8086, 3, 0x1234));
    assert_eq!(m.cpu().rflags.bits(), 0x2_3202);
    let bases = Seg::ALL.map(|s| m.cpu().segment(s).base);
    assert_eq!(bases, [0x2_0000, 0x8000, 0x1_0000, 0x3_0000, 0x4_0000, 0x5_0000]);
    assert_eq!(m.cpu().gpr[RSP], 0x8000);
}

/// PUSHF, POPF, CLI, STI, IRET, INT n in virtual-8086 mode: by IOPL; with VME the 16-bit forms work on VIF.
#[test]
fn virtual_8086_flags() {
    for (code, what) in [
        (&[0x9c][..], "pushf"),
        (&[0x9d], "popf"),
        (&[0xfa], "cli"),
        (&[0xfb], "sti"),
        (&[0xcf], "iret"),
        (&[0xcd, 0x21], "int"),
    ] {
        assert_eq!(virtual8086(0, code).run(1), GP, "{what} with IOPL 0");
    }
    // With IOPL 3 PUSHF shows IF and IOPL; VM and RF never.
    let mut m = virtual8086(3, &[0x66, 0x9c]);
    m.cpu().rflags |= Rflags::IF;
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!(m.load(0x1_7ffc, Width::D), 0x3202);
    // VME: PUSHF shows VIF as IF and IOPL 3; the 32-bit form still faults.
    let mut m = virtual8086(0, &[0x9c]);
    m.cpu().cr4 |= Cr4::VME;
    m.cpu().rflags |= Rflags::VIF;
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!(m.load(0x1_7ffe, Width::W), 0x3202);
    let mut m = virtual8086(0, &[0x66, 0x9c]);
    m.cpu().cr4 |= Cr4::VME;
    assert_eq!(m.run(1), GP);
    // POPF of IF sets VIF and leaves IF and IOPL; with VIP pending it faults.
    let mut m = virtual8086(0, &[0x9d]);
    m.cpu().cr4 |= Cr4::VME;
    m.mem.store(0x1_8000, Width::W, 0x3fd7 & !0x100).expect("RAM");
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!(m.cpu().rflags.bits(), 0xa_0cd7);
    let mut m = virtual8086(0, &[0x9d]);
    m.cpu().cr4 |= Cr4::VME;
    m.cpu().rflags |= Rflags::VIP;
    m.mem.store(0x1_8000, Width::W, 0x200).expect("RAM");
    assert_eq!(m.run(1), GP);
}

/// INT n under VME with a clear bit in the redirection map goes to the 8086 program's own handler.
#[test]
fn virtual_8086_redirection() {
    let mut m = virtual8086(0, &[0xcd, 0x21]);
    m.cpu().cr4 |= Cr4::VME;
    m.cpu().rflags |= Rflags::VIF;
    m.mem.store(TSS_BASE + 0x66, Width::W, 0x60).expect("RAM"); // map at 0x40
    m.mem.store(0x84, Width::D, 0x0300_0456).expect("RAM");
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!((m.cpu().segment(Seg::Cs).selector, m.cpu().rip), (0x0300, 0x456));
    assert_eq!(m.cpu().mode(), Mode::Virtual8086);
    assert_eq!([0x7ffa, 0x7ffc, 0x7ffe].map(|at| m.load(0x1_0000 + at, Width::W)), [2, 0x0800, 0x3202]);
    assert!(!m.cpu().rflags.contains(Rflags::VIF));
    // A set bit: to the monitor, which needs IOPL 3.
    let mut m = virtual8086(0, &[0xcd, 0x21]);
    m.cpu().cr4 |= Cr4::VME;
    m.mem.store(TSS_BASE + 0x66, Width::W, 0x60).expect("RAM");
    m.mem.store(TSS_BASE + 0x44, Width::B, 2).expect("RAM");
    assert_eq!(m.run(1), GP);
}

/// INT n with IOPL 3 leaves virtual-8086 mode for the monitor at CPL 0 and IRETD brings it back.
#[test]
fn virtual_8086_to_monitor_and_back() {
    let mut m = virtual8086(3, &[0xcd, 0x21]);
    m.vcpu.set_intercepts(Intercepts::empty());
    m.mem.store(IDT + 8 * 0x21, Width::Q, 0x0000_ee00_0008_9000).expect("RAM");
    m.mem.write(0x9000, &[0xcf]).expect("RAM");
    let before = m.cpu().clone();
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!((m.cpu().mode(), m.cpu().cpl(), m.cpu().rip), (Mode::Protected32, 0, 0x9000));
    assert_eq!(m.cpu().gpr[RSP], INNER - 36);
    assert_eq!(frame(&m, INNER - 36, 5), [2, 0x0800, 0x2_3002, 0x8000, 0x1000]);
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!((m.cpu().mode(), m.cpu().rip), (Mode::Virtual8086, 2));
    assert_eq!((m.cpu().seg, m.cpu().gpr), (before.seg, before.gpr));
}

/// Not recognized in virtual-8086 mode: #UD, not #GP.
#[test]
fn virtual_8086_has_no_descriptors() {
    for code in [
        &[0x0f, 0x00, 0xd0][..],
        &[0x0f, 0x00, 0xd8],
        &[0x0f, 0x00, 0xc0],
        &[0x0f, 0x00, 0xc8],
        &[0x0f, 0x02, 0xc1],
        &[0x63, 0xc1],
    ] {
        assert_eq!(virtual8086(3, code).run(1), Exit::Exception(Fault::Ud), "{code:x?}");
    }
}

/// ARPL CX, AX.
#[test]
fn arpl() {
    let mut m = machine(0, &[0x63, 0xc1]);
    m.cpu().gpr[Gpr::Rax as usize] = 3;
    m.cpu().gpr[Gpr::Rcx as usize] = 0x9;
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!(m.cpu().gpr[Gpr::Rcx as usize], 0xb);
    assert!(m.cpu().rflags.contains(Rflags::ZF));
}

/// PUSH ES writes 16 bits of its 32-bit slot, AMD's all of it.
#[test]
fn push_sreg_moves_16_bits() {
    let mut m = machine(0, &[0x06, 0x07]);
    stack(&m, STACK - 4, &[0xaaaa_aaaa]);
    assert_eq!(m.run(1), Exit::Budget);
    let upper = if Vendor::host() == Vendor::Amd { 0 } else { 0xaaaa_0000 };
    assert_eq!(m.load(STACK - 4, Width::D), upper | 0x10);
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!(m.cpu().gpr[RSP], STACK);
}

/// LES EAX, [0x10000] and SGDT with six bytes; LGDT with a 16-bit operand takes 24 bits of base.
#[test]
fn far_pointers_and_tables() {
    let mut m = machine(0, &[0xc4, 0x05, 0, 0, 1, 0]);
    stack(&m, 0x1_0000, &[0x1234_5678, u64::from(UD | 3)]);
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!((m.cpu().gpr[0], m.cpu().segment(Seg::Es).selector), (0x1234_5678, UD | 3));
    let mut m = machine(0, &[0x0f, 0x01, 0x05, 0, 0, 1, 0]);
    m.mem.write(0x1_0000, &[0xff; 8]).expect("RAM");
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!(m.load(0x1_0000, Width::Q), 0xffff_0000_5000_003f);
    let mut m = machine(0, &[0x66, 0x0f, 0x01, 0x15, 0, 0, 1, 0]);
    m.mem.store(0x1_0000, Width::Q, 0x1234_5678_003f).expect("RAM");
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!(m.cpu().gdtr, Table { base: 0x34_5678, limit: 0x3f });
}
