//! Task switches: what is saved and loaded, links and busy bits, and the faults of SDM 3A tables 7-1 and 7-2.

use crate::cpu::{Attr, CpuState, Cr0, Fault, Mode, Rflags, Segment, Table};
use crate::interp::testing::{CODE, Machine};
use crate::isa::{Gpr, Seg, Width};
use crate::vcpu::{Exit, Intercepts, Vcpu};

const GDT: u64 = 0x5000;
const IDT: u64 = 0x7000;
const OLD: u64 = 0x6000;
const NEW: u64 = 0x6100;
const KC: u16 = 0x08;
const KD: u16 = 0x10;
const OLD_TSS: u16 = 0x18;
const NEW_TSS: u16 = 0x20;
const GATE: u16 = 0x28;
const SHORT_TSS: u16 = 0x30;
const ABSENT_TSS: u16 = 0x38;
const ABSENT_CODE: u16 = 0x40;
const TSS16: u16 = 0x48;
const STACK: u64 = 0x1_8000;

/// 32-bit protected mode at CPL 0 in the task of `OLD_TSS`; `NEW_TSS` holds a task at 0x9000.
fn machine(code: &[u8]) -> Machine {
    let mut m = Machine::long64(0, code);
    let entries: [u64; 10] = [
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x0000_8b00_6000_0067,
        0x0000_8900_6100_0067,
        0x0000_8500_0020_0000,
        0x0000_8900_6100_0066,
        0x0000_0900_6100_0067,
        0x00cf_1b00_0000_ffff,
        0x0000_8100_6100_002b,
    ];
    for (n, e) in (0..).zip(entries) {
        m.mem.store(GDT + 8 * n, Width::Q, e).expect("RAM");
    }
    put(&m, 0x20, 0x9000);
    put(&m, 0x24, 0x246);
    for n in 0..8 {
        put(&m, 0x28 + 4 * n, 0x1111_1111 * (n + 1));
    }
    put(&m, 0x38, STACK);
    for (offset, selector) in [(0x48, KD), (0x4c, KC), (0x50, KD), (0x54, KD), (0x58, 0), (0x5c, 0)] {
        put(&m, offset, u64::from(selector));
    }
    put(&m, 0x60, 0);
    let mut s = CpuState::reset();
    s.cr0 = Cr0::PE | Cr0::ET;
    s.gdtr = Table { base: GDT, limit: 79 };
    s.idtr = Table { base: IDT, limit: 0x7ff };
    s.ldtr = Segment::unusable(0);
    s.tr = Segment { base: OLD, limit: 0x67, attr: Attr::from_bits_retain(0x8b), selector: OLD_TSS };
    s.seg = [Segment::data32(KD, 0); 6];
    s.seg[Seg::Cs as usize] = Segment::code32(KC, 0);
    s.rip = CODE;
    s.gpr[..8].copy_from_slice(&[1, 2, 3, 4, 0x2_0000, 6, 7, 8]);
    s.dr7 = 0x7ff;
    *m.cpu() = s;
    m
}

/// Sets a field of the new task's TSS.
fn put(m: &Machine, offset: u64, v: u64) {
    m.mem.store(NEW + offset, Width::D, v).expect("RAM");
}

fn busy(m: &Machine, selector: u16) -> bool {
    m.load(GDT + u64::from(selector) + 5, Width::B) & 2 != 0
}

/// JMP or CALL to a selector, offset ignored.
fn far(opcode: u8, selector: u16) -> [u8; 7] {
    let [low, high] = selector.to_le_bytes();
    [opcode, 0xaa, 0xbb, 0xcc, 0xdd, low, high]
}
const JMP: u8 = 0xea;
const CALL: u8 = 0x9a;

#[test]
fn jmp_saves_and_loads_everything() {
    for selector in [NEW_TSS, GATE] {
        let mut m = machine(&far(JMP, selector));
        assert_eq!(m.run(1), Exit::Budget);
        let s = m.cpu();
        assert_eq!((s.rip, s.rflags.bits()), (0x9000, 0x246));
        let want: Vec<u64> = (1..=8).map(|n| if n == 5 { STACK } else { 0x1111_1111 * n }).collect();
        assert_eq!(s.gpr[..8], want);
        assert_eq!((s.tr.selector, s.tr.base, s.tr.attr.kind()), (NEW_TSS, NEW, 0xb));
        assert!(s.cr0.contains(Cr0::TS) && s.segment(Seg::Fs).attr.contains(Attr::UNUSABLE));
        // The local enables of DR7 are cleared.
        assert_eq!(s.dr7, 0x6aa);
        assert!(!busy(&m, OLD_TSS) && busy(&m, NEW_TSS));
        let saved = |offset, w| m.load(OLD + offset, w);
        assert_eq!((saved(0x20, Width::D), saved(0x24, Width::D)), (CODE + 7, 2));
        assert_eq!((saved(0x28, Width::D), saved(0x38, Width::D), saved(0x44, Width::D)), (1, 0x2_0000, 8));
        assert_eq!((saved(0x4c, Width::W), saved(0x50, Width::W)), (u64::from(KC), u64::from(KD)));
        assert_eq!(m.load(NEW, Width::W), 0);
    }
}

#[test]
fn call_nests_and_iret_goes_back() {
    let mut m = machine(&far(CALL, NEW_TSS));
    m.mem.write(0x9000, &[0xcf]).expect("RAM");
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!(m.cpu().rflags, Rflags::from_bits_retain(0x246) | Rflags::NT);
    assert_eq!(m.load(NEW, Width::W), u64::from(OLD_TSS));
    assert!(busy(&m, OLD_TSS) && busy(&m, NEW_TSS));
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!((m.cpu().rip, m.cpu().gpr[0], m.cpu().tr.selector), (CODE + 7, 1, OLD_TSS));
    assert!(busy(&m, OLD_TSS) && !busy(&m, NEW_TSS));
    // The saved flags are not nested any more; RIP is behind IRET.
    assert_eq!((m.load(NEW + 0x24, Width::D), m.load(NEW + 0x20, Width::D)), (0x246, 0x9001));
}

/// #GP through a task gate: the error code is on the new task's stack, the old task's EIP is that of the instruction, with RF.
#[test]
fn an_exception_as_a_task() {
    let mut m = machine(&[0x8e, 0xd8]);
    m.cpu().gpr[0] = 0x1f8;
    m.mem.store(IDT + 8 * 13, Width::Q, 0x0000_8500_0020_0000).expect("RAM");
    m.vcpu.set_intercepts(Intercepts::empty());
    // MOV DS, AX with a selector beyond the table.
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!((m.cpu().rip, m.cpu().gpr[Gpr::Rsp as usize], m.cpu().tr.selector), (0x9000, STACK - 4, NEW_TSS));
    assert_eq!(m.load(STACK - 4, Width::D), 0x1f8);
    assert_eq!((m.load(OLD + 0x20, Width::D), m.load(OLD + 0x24, Width::D)), (CODE, 0x1_0002));
    assert_eq!(m.load(NEW, Width::W), u64::from(OLD_TSS));
}

#[test]
fn faults_before_the_switch_change_nothing() {
    for (selector, want) in [
        (OLD_TSS, Fault::Gp(OLD_TSS)),
        (SHORT_TSS, Fault::Ts(SHORT_TSS)),
        (ABSENT_TSS, Fault::Np(ABSENT_TSS)),
        (NEW_TSS | 4, Fault::Gp(NEW_TSS | 4)),
    ] {
        let mut m = machine(&far(JMP, selector));
        let before = m.cpu().clone();
        assert_eq!(m.run(1), Exit::Exception(want), "{selector:#x}");
        assert_eq!(*m.cpu(), before, "{selector:#x}");
        assert!(!busy(&m, NEW_TSS));
    }
    // IRET to a task that is not busy.
    let mut m = machine(&[0xcf]);
    m.cpu().rflags |= Rflags::NT;
    m.mem.store(OLD, Width::W, u64::from(NEW_TSS)).expect("RAM");
    assert_eq!(m.run(1), Exit::Exception(Fault::Ts(NEW_TSS)));
}

/// Table 7-1, from the LDT on: the faults are the new task's.
#[test]
fn faults_after_the_switch_are_the_new_task_s() {
    let cases: [(u64, u64, Fault); 9] = [
        (0x60, 0x08, Fault::Ts(0x08)),           // LDT: not an LDT
        (0x60, 0x0c, Fault::Ts(0x0c)),           // LDT in the LDT
        (0x4c, 0, Fault::Ts(0)),                 // CS null
        (0x4c, 0x10, Fault::Ts(0x10)),           // CS data
        (0x4c, 0x40, Fault::Np(ABSENT_CODE)),    // CS not present
        (0x50, 0x08, Fault::Ts(0x08)),           // SS code
        (0x50, 0x13, Fault::Ts(0x10)),           // SS of another RPL
        (0x54, 0x1f8, Fault::Ts(0x1f8)),         // DS beyond the table
        (0x20, 0x1_0000_0000 - 1, Fault::Gp(0)), // EIP beyond the limit of CS, which is made short below
    ];
    for (offset, v, want) in cases {
        let mut m = machine(&far(JMP, NEW_TSS));
        put(&m, offset, v);
        if offset == 0x20 {
            m.mem.store(GDT + 8, Width::Q, 0x0040_9b00_0000_ffff).expect("RAM");
        }
        assert_eq!(m.run(1), Exit::Exception(want), "{offset:#x} {v:#x}");
        assert_eq!(m.cpu().tr.selector, NEW_TSS, "{offset:#x} {v:#x}");
        assert_eq!(m.load(OLD + 0x20, Width::D), CODE + 7);
    }
}

#[test]
fn the_t_bit_traps_before_the_first_instruction() {
    let mut m = machine(&far(JMP, NEW_TSS));
    put(&m, 0x64, 1);
    assert_eq!(m.run(1), Exit::Exception(Fault::Db(1 << 15)));
    assert_eq!((m.cpu().rip, m.cpu().gpr[0]), (0x9000, 0x1111_1111));
}

#[test]
fn a_virtual_8086_task() {
    let mut m = machine(&far(JMP, NEW_TSS));
    put(&m, 0x24, 0x2_0202);
    put(&m, 0x4c, 0x1234);
    put(&m, 0x58, 0x5678);
    assert_eq!(m.run(1), Exit::Budget);
    let s = m.cpu();
    assert_eq!((s.mode(), s.rip, s.cpl()), (Mode::Virtual8086, 0x9000, 3));
    assert_eq!((s.segment(Seg::Cs).base, s.segment(Seg::Fs).base), (0x1_2340, 0x5_6780));
}

/// A 16-bit TSS has words, no CR3, no FS and GS.
#[test]
fn sixteen_bits() {
    let mut m = machine(&far(JMP, TSS16));
    for (n, v) in [0x9000, 0x46, 1, 2, 3, 4, 0x7000, 6, 7, 8].iter().enumerate() {
        m.mem.store(NEW + 0x0e + 2 * n as u64, Width::W, *v).expect("RAM");
    }
    for (n, v) in [KD, KC, KD, KD, 0].iter().enumerate() {
        m.mem.store(NEW + 0x22 + 2 * n as u64, Width::W, u64::from(*v)).expect("RAM");
    }
    assert_eq!(m.run(1), Exit::Budget);
    let s = m.cpu();
    assert_eq!((s.rip, s.rflags.bits(), s.tr.attr.kind()), (0x9000, 0x46, 3));
    let low: Vec<u64> = s.gpr[..8].iter().map(|v| v & 0xffff).collect();
    assert_eq!(low, [1, 2, 3, 4, 0x7000, 6, 7, 8]);
    assert!(s.segment(Seg::Gs).attr.contains(Attr::UNUSABLE));
}
