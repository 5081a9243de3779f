//! Expected values from SDM 3A 6.14 (64-bit) and 3B 20.1.4 (real mode).

use super::*;
use crate::interp::sensitive::testing::{
    ABSENT_CODE, IDT, KERNEL_CODE, KERNEL_DATA, TSS, TSS_BASE, USER_CODE, USER_DATA, machine,
};
use crate::interp::testing::{CODE, DATA, Machine, STACK};
use crate::isa::Gpr;
use crate::vcpu::{Exit, Intercepts, Vcpu};

const HANDLER: u64 = 0x9000;
const RSP0: u64 = 0x1_8000;

/// An interrupt gate (0xe) or trap gate (0xf) in the IDT.
fn set_gate(m: &Machine, vector: u64, selector: u16, access: u64, ist: u64) {
    let low = HANDLER | u64::from(selector) << 16 | ist << 32 | access << 40;
    m.mem.store(IDT + 16 * vector, Width::Q, low).expect("in RAM");
    m.mem.store(IDT + 16 * vector + 8, Width::Q, 0).expect("in RAM");
}

/// Exceptions are delivered; RSP0 is set.
fn delivering(cpl: u8, code: &[u8]) -> Machine {
    let mut m = machine(cpl, code);
    m.mem.store(TSS_BASE + 4, Width::Q, RSP0).expect("in RAM");
    m.vcpu.set_intercepts(Intercepts::empty());
    m
}

fn frame(m: &Machine, rsp: u64, len: u64) -> Vec<u64> {
    (0..len).map(|n| m.load(rsp + 8 * n, Width::Q)).collect()
}

#[test]
fn a_fault_at_cpl_3_changes_the_stack() {
    // mov to CR3 would need CPL 0: HLT gives #GP(0)
    let mut m = delivering(3, &[0xf4]);
    set_gate(&m, 13, KERNEL_CODE, 0x8e, 0);
    m.cpu().gpr[Gpr::Rsp as usize] = STACK - 3;
    m.cpu().rflags = Rflags::from_bits_retain(0x4302); // NT, IF, TF clear below
    m.cpu().rflags -= Rflags::TF;
    assert_eq!(m.run(1), Exit::Budget);
    let cpu = m.cpu().clone();
    assert_eq!((cpu.rip, cpu.cpl(), cpu.seg[1].selector), (HANDLER, 0, KERNEL_CODE));
    assert_eq!(cpu.seg[2].selector, 0, "SS is null");
    assert_eq!(cpu.gpr[4], RSP0 - 48);
    assert_eq!(cpu.rflags.bits(), 2, "IF, NT cleared");
    let expected = [0, CODE, u64::from(USER_CODE | 3), 0x4202 | 1 << 16, STACK - 3, u64::from(USER_DATA | 3)];
    assert_eq!(frame(&m, RSP0 - 48, 6), expected);
}

#[test]
fn the_same_level_keeps_its_stack_but_aligns_it() {
    // ud2 through a trap gate
    let mut m = delivering(0, &[0x0f, 0x0b]);
    set_gate(&m, 6, KERNEL_CODE, 0x8f, 0);
    m.cpu().gpr[Gpr::Rsp as usize] = STACK - 3;
    m.cpu().rflags |= Rflags::IF;
    assert_eq!(m.run(1), Exit::Budget);
    let cpu = m.cpu().clone();
    assert_eq!((cpu.rip, cpu.gpr[4]), (HANDLER, STACK - 16 - 40));
    assert!(cpu.rflags.contains(Rflags::IF));
    let expected = [CODE, u64::from(KERNEL_CODE), 0x1_0202, STACK - 3, u64::from(KERNEL_DATA)];
    assert_eq!(frame(&m, STACK - 56, 5), expected);
    assert_eq!(cpu.seg[2].selector, KERNEL_DATA);
}

#[test]
fn the_interrupt_stack_table_is_used_at_any_level() {
    let mut m = delivering(0, &[0x0f, 0x0b]);
    set_gate(&m, 6, KERNEL_CODE, 0x8e, 2);
    m.mem.store(TSS_BASE + 0x2c, Width::Q, DATA + 0x808).expect("in RAM");
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!(m.cpu().gpr[4], DATA + 0x800 - 40);
    assert_eq!(m.load(DATA + 0x800 - 16, Width::Q), STACK);
}

#[test]
fn page_faults_set_cr2_and_push_their_code() {
    // mov [rax], al
    let mut m = delivering(3, &[0x88, 0x00]);
    set_gate(&m, 14, KERNEL_CODE, 0x8e, 0);
    m.cpu().gpr[0] = 0x1234_5678_9000;
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!(m.cpu().cr2, 0x1234_5678_9000);
    assert_eq!(m.load(RSP0 - 48, Width::Q), 6);
}

#[test]
fn error_codes_of_bad_gates() {
    // Gate of #UD, and the #GP or #NP that comes instead (through a good gate), EXT set.
    let rows: &[(u16, u64, u64, u64)] = &[
        // selector, access, vector seen, error code seen
        (KERNEL_CODE, 0x0e, 11, 6 * 8 + 3),
        (KERNEL_CODE, 0x8c, 13, 6 * 8 + 3),
        (KERNEL_CODE, 0x85, 13, 6 * 8 + 3),
        (0, 0x8e, 13, 1),
        (KERNEL_DATA, 0x8e, 13, KERNEL_DATA as u64 + 1),
        (ABSENT_CODE, 0x8e, 11, ABSENT_CODE as u64 + 1),
        (0x7f8, 0x8e, 13, 0x7f9),
    ];
    for &(selector, access, vector, error) in rows {
        let mut m = delivering(0, &[0x0f, 0x0b]);
        for good in [11, 13] {
            set_gate(&m, good, KERNEL_CODE, 0x8e, good - 10);
            m.mem.store(TSS_BASE + 0x24 + 8 * (good - 11), Width::Q, DATA + 0x100 * good).expect("in RAM");
        }
        set_gate(&m, 6, selector, access, 0);
        assert_eq!(m.run(1), Exit::Budget, "{selector:#x} {access:#x}");
        assert_eq!(m.cpu().gpr[4], DATA + 0x100 * vector - 48, "{selector:#x} {access:#x}");
        assert_eq!(m.load(DATA + 0x100 * vector - 48, Width::Q), error, "{selector:#x} {access:#x}");
        assert_eq!(m.load(DATA + 0x100 * vector - 40, Width::Q), CODE);
    }
}

#[test]
fn double_and_triple_faults() {
    // #GP whose gate is no gate: #GP again, both contributory: #DF with code 0.
    let mut m = delivering(3, &[0xf4]);
    set_gate(&m, 8, KERNEL_CODE, 0x8e, 0);
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!(frame(&m, RSP0 - 48, 2), [0, CODE]);
    // No gate for it either: shutdown, and it stays so.
    let mut m = delivering(3, &[0xf4]);
    assert_eq!(m.run(1), Exit::Shutdown);
    assert_eq!(m.cpu().rip, CODE);
    assert_eq!(m.run(1), Exit::Shutdown);
}

#[test]
fn a_benign_exception_makes_no_double_fault() {
    // #UD with an absent gate: #NP is delivered as it is.
    let mut m = delivering(0, &[0x0f, 0x0b]);
    set_gate(&m, 6, KERNEL_CODE, 0x0e, 0);
    set_gate(&m, 11, KERNEL_CODE, 0x8e, 0);
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!(m.load(STACK - 48, Width::Q), 6 * 8 + 3);
}

/// SDM 3A table 6-5: what becomes of a second exception while the first is delivered.
#[test]
fn the_table_of_double_faults() {
    // The first: #UD, benign; #GP(0), contributory; #PF.
    let firsts: [(u64, &[u8]); 3] = [(6, &[0x0f, 0x0b]), (13, &[0xf4]), (14, &[0xa0, 0, 0, 0, 0x40, 0, 0, 0, 0])];
    // The second: #NP because its gate is absent, #PF because its stack is.
    for (first, code) in firsts {
        for second in [11, 14] {
            let mut m = delivering(3, code);
            for vector in [8, 11, 14] {
                set_gate(&m, vector, KERNEL_CODE, 0x8e, 0);
            }
            set_gate(&m, first, KERNEL_CODE, if second == 11 { 0x0e } else { 0x8e }, 1);
            m.mem.store(TSS_BASE + 0x24, Width::Q, 8 << 20).expect("in RAM");
            let name = format!("{second} behind {first}");
            if (first, second) == (14, 14) {
                // #DF has another stack, so it is delivered.
                set_gate(&m, 8, KERNEL_CODE, 0x8e, 2);
                m.mem.store(TSS_BASE + 0x2c, Width::Q, RSP0).expect("in RAM");
            }
            assert_eq!(m.run(1), Exit::Budget, "{name}");
            let error = match (first, second) {
                (6 | 13, 14) => 2,
                (6, _) => first * 8 + 3,
                // Contributory behind contributory or #PF, #PF behind #PF.
                _ => 0,
            };
            assert_eq!(frame(&m, RSP0 - 48, 2), [error, CODE], "{name}");
            let cr2 = if second == 14 {
                (8 << 20) - 8
            } else if first == 14 {
                0x4000_0000
            } else {
                0
            };
            assert_eq!(m.cpu().cr2, cr2, "{name}");
        }
    }
}

/// SDM 3B 17.3.1.1: RF is set in the image that a fault pushes, so that its instruction is not stopped at again; not in that of a trap or INT n.
#[test]
fn rf_in_the_pushed_flags() {
    for (vector, code, rf) in [
        (6, &[0x0f, 0x0b][..], true),
        (13, &[0xf4], true),
        (14, &[0xa0, 0, 0, 0, 0x40, 0, 0, 0, 0], true),
        (3, &[0xcc], false),
        (0x40, &[0xcd, 0x40], false),
    ] {
        let mut m = delivering(3, code);
        set_gate(&m, vector, KERNEL_CODE, 0xee, 0);
        assert_eq!(m.run(1), Exit::Budget);
        let flags = RSP0 - 24;
        assert_eq!(m.load(flags, Width::Q) & Rflags::RF.bits() != 0, rf, "vector {vector}");
    }
}

#[test]
fn a_stack_without_room_leaves_all_as_it_was() {
    // RSP0 is not mapped: #PF, then #DF with the same stack: shutdown. CR2 is the lowest slot's page.
    let mut m = delivering(3, &[0xf4]);
    set_gate(&m, 13, KERNEL_CODE, 0x8e, 0);
    set_gate(&m, 8, KERNEL_CODE, 0x8e, 0);
    m.mem.store(TSS_BASE + 4, Width::Q, (2 << 20) + 0x1000).expect("in RAM");
    let before = m.cpu().clone();
    assert_eq!(m.run(1), Exit::Shutdown);
    let after = m.cpu().clone();
    assert_eq!((after.rip, after.gpr, after.seg, after.rflags), (before.rip, before.gpr, before.seg, before.rflags));
    assert_eq!(after.cr2, (2 << 20) + 0xff8);
    // TSS too short for RSP0: #TS(selector of the TSS + EXT) for a #UD.
    let mut m = delivering(3, &[0x0f, 0x0b]);
    set_gate(&m, 6, KERNEL_CODE, 0x8e, 0);
    set_gate(&m, 10, KERNEL_CODE, 0x8e, 1);
    m.cpu().tr.limit = 0x0a;
    assert_eq!(m.run(1), Exit::Shutdown, "no IST within the limit either");
    assert_eq!(m.cpu().tr.selector, TSS);
}

#[test]
fn real_mode_vectors() {
    // ud2
    let mut m = Machine::real(&[0x0f, 0x0b]);
    m.vcpu.set_intercepts(Intercepts::empty());
    m.mem.store(4 * 6, Width::D, 0x1234_5678).expect("in RAM");
    m.cpu().idtr.limit = 0x3ff;
    m.cpu().rflags |= Rflags::IF | Rflags::CF;
    assert_eq!(m.run(1), Exit::Budget);
    let cpu = m.cpu().clone();
    assert_eq!((cpu.rip, cpu.seg[1].selector, cpu.seg[1].base, cpu.gpr[4]), (0x5678, 0x1234, 0x12340, 0x6ffa));
    assert_eq!(cpu.rflags.bits(), 3);
    assert_eq!([0, 2, 4].map(|n| m.load(0x6ffa + n, Width::W)), [CODE, 0, 0x203]);
}

#[test]
fn protected_mode_through_a_32_bit_gate_from_ring_3() {
    let mut m = delivering(3, &[0x0f, 0x0b]);
    let cpu = m.cpu();
    cpu.efer = Efer::empty();
    cpu.cr0 -= crate::cpu::Cr0::PG;
    cpu.cr4 -= crate::cpu::Cr4::PAE;
    cpu.seg[1] = Segment::code32(0x1b, 3);
    cpu.tr.attr = crate::cpu::Attr::from_bits_retain(0x8b);
    m.mem.store(IDT + 8 * 6, Width::Q, HANDLER | 0xa0 << 16 | 0x8e << 40).expect("in RAM"); // 32-bit kernel code
    m.mem.store(TSS_BASE + 4, Width::D, RSP0).expect("in RAM");
    m.mem.store(TSS_BASE + 8, Width::D, u64::from(KERNEL_DATA)).expect("in RAM");
    assert_eq!(m.run(1), Exit::Budget);
    let cpu = m.cpu().clone();
    assert_eq!((cpu.rip, cpu.cpl(), cpu.gpr[4], cpu.seg[2].selector), (HANDLER, 0, RSP0 - 20, KERNEL_DATA));
    let frame: Vec<u64> = (0..5).map(|n| m.load(RSP0 - 20 + 4 * n, Width::D)).collect();
    assert_eq!(frame, [CODE, 0x1b, 0x1_0002, STACK, u64::from(USER_DATA | 3)]);
}
